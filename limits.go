// Limits. A small container stays up because everything it holds for others is
// bounded, and a bound is met with an answer: 429 to one who asks for too
// much, 503 when there is no room, or no request yet to answer, with the time to
// try again.
//
// The machine itself, a loopback address, is not limited: there it is a proxy
// that asks, or a test.

package main

import (
	"errors"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// A bucket is a token bucket: it fills with rate tokens a second, up to two
// seconds' worth.
type bucket struct {
	tokens float64
	at     time.Time
}

// take takes a token, if there is one.
func (b *bucket) take(rate float64, now time.Time) bool {
	full := max(2*rate, 1)
	if b.at.IsZero() {
		b.tokens = full
	} else {
		b.tokens = min(full, b.tokens+rate*now.Sub(b.at).Seconds())
	}
	b.at = now
	if b.tokens < 1 {
		return false
	}
	b.tokens--
	return true
}

// A gate counts what each client address has, and refuses more.
type gate struct {
	trustProxy bool
	fly        bool    // that is Fly's
	perAddr    int     // connections, and requests held, of one address
	rate       float64 // publishes a second of one address

	mu      sync.Mutex // guards what follows
	held    map[netip.Addr]int
	buckets map[netip.Addr]*bucket
}

// maxAddrs is how many addresses a gate keeps buckets for. When there are more,
// all begin anew.
const maxAddrs = 1 << 16

// addr is the client's address: that of the connection; or, behind a proxy that
// is to be trusted, what the proxy says. Of X-Forwarded-For the last hop is the
// proxy's own word, and all before it the client's. Fly says it in a header of
// its own (https://fly.io/docs/networking/request-headers/), which elsewhere a
// client can send too, so there it is heard only if nothing else is said. IPv6
// counts by /64, which is what one customer is given.
func (g *gate) addr(r *http.Request) netip.Addr {
	from, _ := netip.ParseAddrPort(r.RemoteAddr)
	if g.trustProxy {
		said := strings.Join(r.Header.Values("X-Forwarded-For"), ",")
		if fly := r.Header.Get("Fly-Client-IP"); fly != "" && (g.fly || said == "") {
			said = fly
		}
		hop := strings.TrimSpace(said[strings.LastIndexByte(said, ',')+1:])
		if a, err := netip.ParseAddr(hop); err == nil {
			return network(a)
		}
		if a, err := netip.ParseAddrPort(hop); err == nil { // as some proxies write it
			return network(a.Addr())
		}
		if said != "" { // and can't be read: one address for all such, and not the machine's own
			return netip.IPv6Unspecified()
		}
	}
	return network(from.Addr())
}

func network(a netip.Addr) netip.Addr {
	if a = a.Unmap().WithZone(""); a.Is6() && !a.IsLoopback() {
		p, _ := a.Prefix(64)
		return p.Addr()
	}
	return a
}

// hold takes one of the address's places; free gives it back.
func (g *gate) hold(a netip.Addr) bool {
	if a.IsLoopback() || !a.IsValid() {
		return true
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.held[a] >= g.perAddr {
		return false
	}
	if g.held == nil {
		g.held = map[netip.Addr]int{}
	}
	g.held[a]++
	return true
}

func (g *gate) free(a netip.Addr) {
	if a.IsLoopback() || !a.IsValid() {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.held[a]--; g.held[a] == 0 {
		delete(g.held, a)
	}
}

// take takes a token of the address's bucket.
func (g *gate) take(a netip.Addr) bool {
	if a.IsLoopback() || !a.IsValid() {
		return true
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	b := g.buckets[a]
	if b == nil {
		if len(g.buckets) >= maxAddrs || g.buckets == nil {
			g.buckets = map[netip.Addr]*bucket{}
		}
		b = &bucket{}
		g.buckets[a] = b
	}
	return b.take(g.rate, time.Now())
}

// A doorman is a listener that lets in so many connections, and so many from one
// address, and tells the others so; and does that still when the process has
// no descriptor left.
type doorman struct {
	net.Listener
	most  int64 // connections in all
	gate  gate  // by the address of the connection
	in    atomic.Int64
	out   atomic.Int64 // connections that are being refused
	spare *os.File     // given up for the moment it takes to refuse
	count func(reason string)
}

func (d *doorman) Accept() (net.Conn, error) {
	for {
		conn, err := d.Listener.Accept()
		if errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE) {
			if d.spare == nil {
				time.Sleep(10 * time.Millisecond)
			} else {
				d.spare.Close()
				if conn, err = d.Listener.Accept(); err == nil {
					d.refuse(conn, "descriptors")
					conn.Close() // at once, for there is none for the next
				}
			}
			d.spare, _ = os.Open(os.DevNull)
			continue
		}
		if err != nil {
			return nil, err
		}
		from, _ := netip.ParseAddrPort(conn.RemoteAddr().String())
		addr := network(from.Addr())
		switch {
		case d.in.Load() >= d.most:
			d.turnAway(conn, "connections")
		case !d.gate.hold(addr):
			d.turnAway(conn, "address")
		default:
			d.in.Add(1)
			return &visitor{Conn: conn, d: d, addr: addr}, nil
		}
	}
}

const refusal503 = "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json; charset=utf-8\r\nRetry-After: 10\r\nConnection: close\r\n\r\n" +
	`{"error":"there are too many connections; try again later"}` + "\n"

// refuse answers a connection that can't be let in.
func (d *doorman) refuse(conn net.Conn, reason string) {
	d.count(reason)
	conn.SetDeadline(time.Now().Add(time.Second))
	conn.Write([]byte(refusal503))
}

// turnAway refuses a connection the polite way: it waits a second for the request,
// since some clients take no answer that comes before it, and another for the
// client to close, since to close on what is unread would take the answer from it.
// In a flood it does not wait.
func (d *doorman) turnAway(conn net.Conn, reason string) {
	if d.out.Add(1) > 100 {
		d.out.Add(-1)
		d.refuse(conn, reason)
		conn.Close()
		return
	}
	go func() {
		defer d.out.Add(-1)
		defer conn.Close()
		var b [512]byte
		conn.SetReadDeadline(time.Now().Add(time.Second))
		conn.Read(b[:])
		d.refuse(conn, reason)
		if c, ok := conn.(*net.TCPConn); ok {
			c.CloseWrite()
		}
		for n := 1; n > 0; {
			n, _ = conn.Read(b[:])
		}
	}()
}

// A visitor is a connection that was let in, and gives its place back.
type visitor struct {
	net.Conn
	d    *doorman
	addr netip.Addr
	left atomic.Bool
}

func (v *visitor) Close() error {
	if !v.left.Swap(true) {
		v.d.in.Add(-1)
		v.d.gate.free(v.addr)
	}
	return v.Conn.Close()
}

// CloseWrite, SetWriteBuffer and SyscallConn are those of the TCP connection within.
func (v *visitor) CloseWrite() error {
	if c, ok := v.Conn.(*net.TCPConn); ok {
		return c.CloseWrite()
	}
	return errors.ErrUnsupported
}

func (v *visitor) SetWriteBuffer(bytes int) error {
	if c, ok := v.Conn.(*net.TCPConn); ok {
		return c.SetWriteBuffer(bytes)
	}
	return errors.ErrUnsupported
}

func (v *visitor) SyscallConn() (syscall.RawConn, error) {
	if c, ok := v.Conn.(*net.TCPConn); ok {
		return c.SyscallConn()
	}
	return nil, errors.ErrUnsupported
}
