//go:build !linux

package main

import (
	"net"
	"time"
)

// On other systems every write waits, in a goroutine of its own.
type socket struct{ *net.TCPConn }

func newSocket(conn net.Conn) net.Conn {
	if tcp, ok := conn.(*net.TCPConn); ok {
		return &socket{tcp}
	}
	return conn
}

func (*socket) tryWrite([]byte) (int, error) { return 0, nil }

func (*socket) setUserTimeout(time.Duration) bool { return false }
