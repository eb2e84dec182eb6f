//go:build unix

package main

import (
	"net"
	"runtime"
	"syscall"
	"time"
)

// fdOf returns the file descriptor of a connection, or -1 if it has none. It belongs to
// the connection until that is closed.
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

// setUserTimeout has the kernel end a connection whose client has acknowledged nothing,
// or taken nothing, for the time d: one whose network is gone. Otherwise the kernel
// would try again for a quarter of an hour, and the user would stay online. It reports
// whether the kernel does so: Linux does (tcp(7), TCP_USER_TIMEOUT).
func setUserTimeout(fd int, d time.Duration) bool {
	const userTimeout = 18
	return runtime.GOOS == "linux" && syscall.SetsockoptInt(fd, syscall.IPPROTO_TCP, userTimeout, int(d/time.Millisecond)) == nil
}

// tryWrite writes what the socket takes of b without waiting, which net.Conn cannot do. It
// returns 0 if the socket is full. Go sets all its sockets to non-blocking.
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
