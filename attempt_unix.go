//go:build unix

package main

import "syscall"

// canTry says that a write can be tried without waiting.
const canTry = true

// An attempt is one write that does not wait: net.Conn has none. It is kept
// from write to write, for RawConn makes what it is called with escape.
type attempt struct {
	b    []byte
	n    int
	err  error
	call func(fd uintptr) bool
}

// write returns how much of b the socket took, 0 if it is full.
func (a *attempt) write(raw syscall.RawConn, b []byte) (int, error) {
	if a.call == nil {
		a.call = func(fd uintptr) bool {
			for {
				a.n, a.err = syscall.Write(int(fd), a.b)
				if a.err != syscall.EINTR {
					return true // and don't wait for the socket
				}
			}
		}
	}
	a.b = b
	err := raw.Write(a.call)
	a.b = nil
	switch {
	case err != nil:
		return 0, err
	case a.err == syscall.EAGAIN:
		return 0, nil
	}
	return max(a.n, 0), a.err
}
