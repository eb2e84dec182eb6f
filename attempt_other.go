//go:build !unix

package main

import "syscall"

// canTry says that every write waits, in a goroutine of its own.
const canTry = false

type attempt struct{}

func (*attempt) write(syscall.RawConn, []byte) (int, error) { return 0, nil }
