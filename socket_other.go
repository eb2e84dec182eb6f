//go:build !linux

package main

import (
	"net"
	"time"
)

// On other systems every write waits, in a goroutine of its own.
type socket struct {
	*net.TCPConn
	fd int
}

func newSocket(conn net.Conn) net.Conn {
	if tcp, ok := conn.(*net.TCPConn); ok {
		return &socket{tcp, -1}
	}
	return conn
}

func tryWrite(int, []byte) (int, error) { return 0, nil }

func (*socket) setUserTimeout(time.Duration) bool { return false }
