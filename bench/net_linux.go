package main

import (
	"fmt"
	"os/exec"
	"slices"
	"sync/atomic"
	"syscall"
	"time"
)

// One thread reads all clients of a swarm with epoll and plain read calls. Go's own poller would
// wake a goroutine for each, which costs the machine more than the reading.
type engine struct {
	ep   int
	quit atomic.Bool
	done chan struct{}
	due  []later // in order of time
}

type later struct {
	c  *client
	at time.Time
}

func (s *swarm) start() (err error) {
	s.done = make(chan struct{})
	if s.ep, err = syscall.EpollCreate1(syscall.EPOLL_CLOEXEC); err != nil {
		return err
	}
	go s.loop()
	return nil
}

// stop closes everything. The sockets do not linger: they are reset, and leave no
// TIME_WAIT behind that would use up the ports.
func (s *swarm) stop() {
	if s.quit.Swap(true) {
		return
	}
	<-s.done
	for i := range s.clients {
		s.closeClient(&s.clients[i])
	}
	syscall.Close(s.ep)
}

func (s *swarm) closeClient(c *client) {
	if c.fd > 0 {
		syscall.Close(c.fd)
		c.fd = 0
	}
}

// open connects, asks, and hands the socket to the loop. Every 10,000 clients have a loopback
// address of their own: an address has 28,000 ports.
func (s *swarm) open(c *client) error {
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("socket: %w", err)
	}
	c.fd = fd
	if c.stall { // so that it is the server's buffers that fill
		syscall.SetsockoptInt(fd, syscall.SOL_SOCKET, syscall.SO_RCVBUF, 4096)
	}
	const bindAddressNoPort = 24 // IP_BIND_ADDRESS_NO_PORT: choose the port when connecting
	syscall.SetsockoptInt(fd, syscall.IPPROTO_IP, bindAddressNoPort, 1)
	syscall.SetsockoptInt(fd, syscall.IPPROTO_TCP, syscall.TCP_NODELAY, 1)
	syscall.SetsockoptLinger(fd, syscall.SOL_SOCKET, syscall.SO_LINGER, &syscall.Linger{Onoff: 1})
	if err := syscall.Bind(fd, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, byte(1 + c.i/10000)}}); err != nil {
		return fmt.Errorf("bind: %w", err)
	}
	if err := syscall.Connect(fd, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}, Port: portOf(s.addr)}); err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	if err := s.write(c, c.request()); err != nil {
		return err
	}
	if err := syscall.SetNonblock(fd, true); err != nil {
		return err
	}
	return syscall.EpollCtl(s.ep, syscall.EPOLL_CTL_ADD, fd, &syscall.EpollEvent{Events: syscall.EPOLLIN, Fd: int32(c.i)})
}

// write sends a request or a pong. Both are small and follow an answer, so there is room for them.
func (s *swarm) write(c *client, b []byte) error {
	if n, err := syscall.Write(c.fd, b); err != nil || n < len(b) {
		return fmt.Errorf("wrote %d of %d: %v", n, len(b), err)
	}
	return nil
}

func (s *swarm) loop() {
	defer close(s.done)
	buf := make([]byte, 256<<10)
	events := make([]syscall.EpollEvent, 256)
	for !s.quit.Load() {
		timeout := 100 * time.Millisecond
		for len(s.due) > 0 {
			c := s.due[0].c
			if timeout = min(timeout, time.Until(s.due[0].at)); timeout > 0 {
				break
			}
			s.due = s.due[1:]
			if c.fd > 0 {
				if err := s.write(c, c.request()); err != nil {
					s.ended(c, err)
					s.closeClient(c)
				}
			}
			timeout = 100 * time.Millisecond
		}
		n, err := syscall.EpollWait(s.ep, events, int((timeout+time.Millisecond-1)/time.Millisecond))
		if err != nil && err != syscall.EINTR {
			panic(err)
		}
		s.mu.Lock()   // pairs with open, which the way through the kernel does not in Go's memory model
		s.mu.Unlock() //lint:ignore SA2001 there is nothing to do in between
		for _, e := range events[:max(n, 0)] {
			c := &s.clients[e.Fd]
			if err := s.read(c, buf); err != nil {
				s.ended(c, err)
				s.closeClient(c)
			} else if c.stall && c.up {
				syscall.EpollCtl(s.ep, syscall.EPOLL_CTL_DEL, c.fd, nil)
			}
		}
	}
}

func (s *swarm) read(c *client, buf []byte) error {
	n, err := syscall.Read(c.fd, buf)
	if err == syscall.EAGAIN || err == syscall.EINTR {
		return nil
	}
	if err != nil {
		return err
	}
	if n == 0 {
		return errEnd
	}
	reply, ask, wait, err := c.feed(buf[:n], time.Now().UnixNano())
	switch {
	case err != nil:
		return err
	case reply != nil:
		return s.write(c, reply)
	case ask && wait == 0:
		return s.write(c, c.request())
	case ask:
		at, i := time.Now().Add(wait), len(s.due)
		for i > 0 && s.due[i-1].at.After(at) { // seldom: most wait equally long
			i--
		}
		s.due = slices.Insert(s.due, i, later{c, at})
	}
	return nil
}

// killWithParent has the kernel end the child when this process dies.
func killWithParent(cmd *exec.Cmd) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
}

// raiseFiles raises the limit of open files as far as it goes, for the children too.
func raiseFiles() error {
	var r syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &r); err != nil {
		return err
	}
	r.Cur = r.Max
	return syscall.Setrlimit(syscall.RLIMIT_NOFILE, &r)
}
