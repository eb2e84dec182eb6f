package main

import (
	"io"
	"net"
	"syscall"
	"time"
	"unsafe"
)

// A socket is a TCP connection whose system calls Go's scheduler does not see. For any other
// system call, since it may block, the scheduler wakes a thread that watches it. Those of a
// socket never block, and in a relay that wakes up a thousand times a second that thread
// would take a sixth of the CPU.
type socket struct {
	*net.TCPConn
	raw     syscall.RawConn
	fd      int                   // belongs to the connection until that is closed
	tryRead func(fd uintptr) bool // made once

	// Of the Read that goes on.
	buf []byte
	n   int
	err syscall.Errno
}

func newSocket(conn net.Conn) net.Conn {
	tcp, ok := conn.(*net.TCPConn)
	if !ok {
		return conn
	}
	raw, err := tcp.SyscallConn()
	if err != nil {
		return conn
	}
	s := &socket{TCPConn: tcp, raw: raw}
	raw.Control(func(fd uintptr) { s.fd = int(fd) })
	s.tryRead = func(uintptr) bool {
		s.n, s.err = transfer(syscall.SYS_READ, s.fd, s.buf)
		return s.err != syscall.EAGAIN
	}
	return s
}

// Read is called by one goroutine at a time.
func (s *socket) Read(b []byte) (int, error) {
	s.buf = b
	err := s.raw.Read(s.tryRead)
	s.buf = nil
	switch {
	case err != nil:
		return 0, err
	case s.err != 0:
		return 0, &net.OpError{Op: "read", Net: "tcp", Err: s.err}
	case s.n == 0 && len(b) > 0:
		return 0, io.EOF
	}
	return s.n, nil
}

func (s *socket) Write(b []byte) (n int, err error) {
	rawErr := s.raw.Write(func(uintptr) bool {
		var m int
		m, err = tryWrite(s.fd, b[n:])
		n += m
		return err != nil || n == len(b)
	})
	if rawErr != nil {
		return n, rawErr
	}
	return n, err
}

// tryWrite writes what a socket takes of b without waiting, which net.Conn cannot do. It
// returns 0 if the socket is full, or fd is -1. It must not be called when the connection
// may be closed at the same time.
func tryWrite(fd int, b []byte) (int, error) {
	if fd < 0 {
		return 0, nil
	}
	n, err := transfer(syscall.SYS_WRITE, fd, b)
	if err == 0 || err == syscall.EAGAIN {
		return n, nil
	}
	return 0, err
}

// transfer reads or writes b. Go sets all its sockets to non-blocking.
func transfer(call uintptr, fd int, b []byte) (int, syscall.Errno) {
	for {
		n, _, err := syscall.RawSyscall(call, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)))
		switch err {
		case 0:
			return int(n), 0
		case syscall.EINTR:
		default:
			return 0, err
		}
	}
}

// setUserTimeout has the kernel end a connection whose client has acknowledged nothing,
// or taken nothing, for the time d: one whose network is gone. Otherwise the kernel
// would try again for a quarter of an hour, and the user would stay online. It reports
// whether the kernel does so (tcp(7), TCP_USER_TIMEOUT).
func (s *socket) setUserTimeout(d time.Duration) bool {
	const userTimeout = 18
	return syscall.SetsockoptInt(s.fd, syscall.IPPROTO_TCP, userTimeout, int(d/time.Millisecond)) == nil
}
