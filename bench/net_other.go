//go:build !linux

package main

import (
	"net"
	"os/exec"
	"sync"
	"time"
)

// Elsewhere a goroutine reads each client: good enough to count, too dear to time by.
type engine struct {
	held  sync.Mutex // guards conns
	conns []net.Conn
}

func (s *swarm) start() error { return nil }

func (s *swarm) stop() {
	s.held.Lock()
	defer s.held.Unlock()
	for _, conn := range s.conns {
		conn.Close()
	}
}

func (s *swarm) open(c *client) error {
	conn, err := net.Dial("tcp", s.addr)
	if err != nil {
		return err
	}
	conn.(*net.TCPConn).SetLinger(0)
	if c.stall {
		conn.(*net.TCPConn).SetReadBuffer(4096)
	}
	s.held.Lock()
	s.conns = append(s.conns, conn)
	s.held.Unlock()
	if _, err := conn.Write(c.request()); err != nil {
		return err
	}
	go func() {
		buf := make([]byte, 4<<10)
		for !(c.stall && c.up) {
			n, err := conn.Read(buf)
			var reply []byte
			var ask bool
			var wait time.Duration
			if err == nil {
				reply, ask, wait, err = c.feed(buf[:n], time.Now().UnixNano())
			}
			if err == nil && ask {
				time.Sleep(wait)
				reply = append(reply, c.request()...)
			}
			if err == nil && len(reply) > 0 {
				_, err = conn.Write(reply)
			}
			if err != nil {
				s.ended(c, err)
				return
			}
		}
	}()
	return nil
}

func killWithParent(*exec.Cmd) {}

func raiseFiles() error { return nil } // Go's runtime has done it
