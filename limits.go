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
type tokenBucket struct {
	tokens   float64
	filledAt time.Time
}

// allow takes a token, if there is one.
func (b *tokenBucket) allow(rate float64, now time.Time) bool {
	full := max(2*rate, 1)
	if b.filledAt.IsZero() {
		b.tokens = full
	} else {
		b.tokens = min(full, b.tokens+rate*now.Sub(b.filledAt).Seconds())
	}
	b.filledAt = now
	if b.tokens < 1 {
		return false
	}
	b.tokens--
	return true
}

// A gate counts what each client address has, and refuses more.
type addrLimiter struct {
	trustProxy bool
	fly        bool    // that is Fly's
	perAddr    int     // connections, and requests held, of one address
	rate       float64 // publishes a second of one address

	mu      sync.Mutex // guards what follows
	open    map[netip.Addr]int
	buckets map[netip.Addr]*tokenBucket
}

// maxAddrs is how many addresses a gate keeps buckets for. When there are more,
// all begin anew.
const maxAddrs = 1 << 16

// clientAddr is the client's address: that of the connection; or, behind a proxy that
// is to be trusted, what the proxy says. Of X-Forwarded-For the last hop is the
// proxy's own word, and all before it the client's. Fly says it in a header of
// its own (https://fly.io/docs/networking/request-headers/), which elsewhere a
// client can send too, so there it is heard only if nothing else is said. IPv6
// counts by /64, which is what one customer is given.
func (g *addrLimiter) clientAddr(r *http.Request) netip.Addr {
	from, _ := netip.ParseAddrPort(r.RemoteAddr)
	if g.trustProxy {
		said := strings.Join(r.Header.Values("X-Forwarded-For"), ",")
		if fly := r.Header.Get("Fly-Client-IP"); fly != "" && (g.fly || said == "") {
			said = fly
		}
		hop := strings.TrimSpace(said[strings.LastIndexByte(said, ',')+1:])
		if a, err := netip.ParseAddr(hop); err == nil {
			return addrKey(a)
		}
		if a, err := netip.ParseAddrPort(hop); err == nil { // as some proxies write it
			return addrKey(a.Addr())
		}
		if said != "" { // and can't be read: one address for all such, and not the machine's own
			return netip.IPv6Unspecified()
		}
	}
	return addrKey(from.Addr())
}

func addrKey(a netip.Addr) netip.Addr {
	if a = a.Unmap().WithZone(""); a.Is6() && !a.IsLoopback() {
		p, _ := a.Prefix(64)
		return p.Addr()
	}
	return a
}

// acquire takes one of the address's places; free gives it back.
func (g *addrLimiter) acquire(a netip.Addr) bool {
	if a.IsLoopback() || !a.IsValid() {
		return true
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.open[a] >= g.perAddr {
		return false
	}
	if g.open == nil {
		g.open = map[netip.Addr]int{}
	}
	g.open[a]++
	return true
}

func (g *addrLimiter) release(a netip.Addr) {
	if a.IsLoopback() || !a.IsValid() {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.open[a]--; g.open[a] == 0 {
		delete(g.open, a)
	}
}

// allow takes a token of the address's bucket.
func (g *addrLimiter) allow(a netip.Addr) bool {
	if a.IsLoopback() || !a.IsValid() {
		return true
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	b := g.buckets[a]
	if b == nil {
		if len(g.buckets) >= maxAddrs || g.buckets == nil {
			g.buckets = map[netip.Addr]*tokenBucket{}
		}
		b = &tokenBucket{}
		g.buckets[a] = b
	}
	return b.allow(g.rate, time.Now())
}

// A doorman is a listener that lets in so many connections, and so many from one
// address, and tells the others so; and does that still when the process has
// no descriptor left.
type limitListener struct {
	net.Listener
	maxConns     int64       // connections in all
	addrs        addrLimiter // by the address of the connection
	open         atomic.Int64
	rejecting    atomic.Int64 // connections that are being refused
	spareFD      *os.File     // given up for the moment it takes to refuse
	countRefusal func(reason string)
}

func (d *limitListener) Accept() (net.Conn, error) {
	for {
		conn, err := d.Listener.Accept()
		if errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE) {
			if d.spareFD == nil {
				time.Sleep(10 * time.Millisecond)
			} else {
				d.spareFD.Close()
				if conn, err = d.Listener.Accept(); err == nil {
					d.reject(conn, "descriptors")
					conn.Close() // at once, for there is none for the next
				}
			}
			d.spareFD, _ = os.Open(os.DevNull)
			continue
		}
		if err != nil {
			return nil, err
		}
		from, _ := netip.ParseAddrPort(conn.RemoteAddr().String())
		addr := addrKey(from.Addr())
		switch {
		case d.open.Load() >= d.maxConns:
			d.rejectGently(conn, "connections")
		case !d.addrs.acquire(addr):
			d.rejectGently(conn, "address")
		default:
			d.open.Add(1)
			return &limitedConn{Conn: conn, listener: d, addr: addr}, nil
		}
	}
}

const tooManyConns = "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json; charset=utf-8\r\nRetry-After: 10\r\nConnection: close\r\n\r\n" +
	`{"error":"there are too many connections; try again later"}` + "\n"

// reject answers a connection that can't be let in.
func (d *limitListener) reject(conn net.Conn, reason string) {
	d.countRefusal(reason)
	conn.SetDeadline(time.Now().Add(time.Second))
	conn.Write([]byte(tooManyConns))
}

// rejectGently refuses a connection the polite way: it waits a second for the request,
// since some clients take no answer that comes before it, and another for the
// client to close, since to close on what is unread would take the answer from it.
// In a flood it does not wait.
func (d *limitListener) rejectGently(conn net.Conn, reason string) {
	if d.rejecting.Add(1) > 100 {
		d.rejecting.Add(-1)
		d.reject(conn, reason)
		conn.Close()
		return
	}
	go func() {
		defer d.rejecting.Add(-1)
		defer conn.Close()
		var b [512]byte
		conn.SetReadDeadline(time.Now().Add(time.Second))
		conn.Read(b[:])
		d.reject(conn, reason)
		if c, ok := conn.(*net.TCPConn); ok {
			c.CloseWrite()
		}
		for n := 1; n > 0; {
			n, _ = conn.Read(b[:])
		}
	}()
}

// A visitor is a connection that was let in, and gives its place back.
type limitedConn struct {
	net.Conn
	listener *limitListener
	addr     netip.Addr
	closed   atomic.Bool
}

func (v *limitedConn) Close() error {
	if !v.closed.Swap(true) {
		v.listener.open.Add(-1)
		v.listener.addrs.release(v.addr)
	}
	return v.Conn.Close()
}

// CloseWrite, SetWriteBuffer and SyscallConn are those of the TCP connection within.
func (v *limitedConn) CloseWrite() error {
	if c, ok := v.Conn.(*net.TCPConn); ok {
		return c.CloseWrite()
	}
	return errors.ErrUnsupported
}

func (v *limitedConn) SetWriteBuffer(bytes int) error {
	if c, ok := v.Conn.(*net.TCPConn); ok {
		return c.SetWriteBuffer(bytes)
	}
	return errors.ErrUnsupported
}

func (v *limitedConn) SyscallConn() (syscall.RawConn, error) {
	if c, ok := v.Conn.(*net.TCPConn); ok {
		return c.SyscallConn()
	}
	return nil, errors.ErrUnsupported
}
