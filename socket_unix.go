//go:build unix

package main

import (
	"net"
	"runtime"
	"syscall"
	"time"
)

// fdOf returns the number of a connection's socket, or -1 if it has none.
// It is the connection's until that is closed.
func fdOf(conn net.Conn) int {
	c, ok := conn.(syscall.Conn)
	if !ok {
		return -1
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return -1
	}
	n := -1
	raw.Control(func(fd uintptr) { n = int(fd) })
	return n
}

// setUserTimeout has the kernel end a connection whose client has acknowledged, or
// with a shut window taken, nothing for so long: one whose network went without
// a word. Else it would try again for a quarter of an hour, and the user would
// be online as long. It reports whether the kernel does: Linux
// (tcp(7), TCP_USER_TIMEOUT); other systems are left to their own ways.
func setUserTimeout(fd int, d time.Duration) bool {
	const userTimeout = 18
	return runtime.GOOS == "linux" && syscall.SetsockoptInt(fd, syscall.IPPROTO_TCP, userTimeout, int(d/time.Millisecond)) == nil
}

// tryWrite writes what a socket takes of b without waiting, which net.Conn can't;
// 0 bytes if it is full. Go's sockets are all set not to block.
func tryWrite(fd int, b []byte) (int, error) {
	for {
		n, err := syscall.Write(fd, b)
		switch err {
		case nil:
			return n, nil
		case syscall.EAGAIN:
			return 0, nil
		case syscall.EINTR:
		default:
			return 0, err
		}
	}
}
