//go:build !unix

package main

import (
	"net"
	"time"
)

// On other systems every write waits, in a goroutine of its own.
func fdOf(net.Conn) int { return -1 }

func setUserTimeout(int, time.Duration) bool { return false }

func tryWrite(int, []byte) (int, error) { return 0, nil }
