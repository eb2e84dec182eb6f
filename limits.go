// Limits. A small container stays up because everything that clients take is bounded,
// and a bound is met with an answer: 429 for a client that asks for too much, 503 when
// there is no room, with the time to try again. Without this file only what the relay
// keeps is bounded.
//
// Loopback addresses are not limited: on the machine itself a proxy asks, or a test.

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

var (
	errTooFast        = limitError(http.StatusTooManyRequests, "this address publishes too fast", "rate", 1)
	errRoomTooFast    = limitError(http.StatusTooManyRequests, "this room is published to too fast", "room", 1)
	errTooManyPerAddr = limitError(http.StatusTooManyRequests, "this address holds too many connections", "address", 10)
	errTooManyStreams = limitError(http.StatusServiceUnavailable, "the relay holds as many connections as it may; try again later", "streams", 10)
)

// A limiter bounds what clients take together, and each address.
type limiter struct {
	addrs      addrLimiter
	maxStreams int64 // streams and waiting long-polls
	streams    atomic.Int64
	roomRate   float64 // publishes a second to a room

	mu    sync.Mutex // guards rooms
	rooms map[string]*tokenBucket
}

// wrap returns a handler that gives requests their quota.
func (l *limiter) wrap(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r, p := withPermit(r)
		p.quota = &clientQuota{l, l.addrs.clientAddr(r)}
		next.ServeHTTP(w, r)
	})
}

// A clientQuota is the quota of one client.
type clientQuota struct {
	l    *limiter
	addr netip.Addr
}

func (q *clientQuota) publish() error {
	if !q.l.addrs.allow(q.addr) {
		return errTooFast
	}
	return nil
}

func (q *clientQuota) publishTo(room string) error {
	if q.addr.IsLoopback() || q.l.allowRoom(room) {
		return nil
	}
	return errRoomTooFast
}

func (q *clientQuota) hold() error {
	if q.l.streams.Add(1) > q.l.maxStreams {
		q.l.streams.Add(-1)
		return errTooManyStreams
	}
	if !q.l.addrs.acquire(q.addr) {
		q.l.streams.Add(-1)
		return errTooManyPerAddr
	}
	return nil
}

func (q *clientQuota) release() {
	q.l.streams.Add(-1)
	q.l.addrs.release(q.addr)
}

func (l *limiter) allowRoom(room string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return bucketOf(&l.rooms, room).allow(l.roomRate, time.Now())
}

// A tokenBucket fills with rate tokens a second, up to those of two seconds.
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

// An addrLimiter bounds what each client address has.
type addrLimiter struct {
	trustProxy bool
	fly        bool    // the proxy is Fly.io's
	perAddr    int     // connections, and requests held, of one address
	rate       float64 // publishes a second of one address

	mu      sync.Mutex // guards what follows
	open    map[netip.Addr]int
	buckets map[netip.Addr]*tokenBucket
}

// maxBuckets is how many addresses, or rooms, have a bucket. When there are more, all
// begin again with full ones.
const maxBuckets = 1 << 16

func bucketOf[K comparable](buckets *map[K]*tokenBucket, key K) *tokenBucket {
	b := (*buckets)[key]
	if b == nil {
		if len(*buckets) >= maxBuckets || *buckets == nil {
			*buckets = map[K]*tokenBucket{}
		}
		b = &tokenBucket{}
		(*buckets)[key] = b
	}
	return b
}

// clientAddr returns the client's address: that of the connection; or, behind a trusted
// proxy, what the proxy says. The last entry of X-Forwarded-For is from the proxy, all
// before it from the client. Fly has a header of its own
// (https://fly.io/docs/networking/request-headers/), which elsewhere a client can send
// too, so there it counts only without X-Forwarded-For. IPv6 counts by /64, which is
// what one customer gets.
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
		if said != "" { // but unreadable: one address for all such clients, and not the machine's own
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

// acquire takes one of the address's places; release gives it back.
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

// allow takes a token from the address's bucket.
func (g *addrLimiter) allow(a netip.Addr) bool {
	if a.IsLoopback() || !a.IsValid() {
		return true
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	return bucketOf(&g.buckets, a).allow(g.rate, time.Now())
}

// A limitListener accepts so many connections, and so many from one address. It answers
// the others with 503, even when the process has no descriptor left.
type limitListener struct {
	net.Listener
	maxConns     int64       // connections in all
	addrs        addrLimiter // by the address of the connection
	open         atomic.Int64
	rejecting    atomic.Int64 // connections that are being refused
	spareFD      *os.File     // closed for the moment it takes to answer
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
					conn.Close() // at once: the next connection needs the descriptor
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

// reject answers a connection that is not accepted.
func (d *limitListener) reject(conn net.Conn, reason string) {
	d.countRefusal(reason)
	conn.SetDeadline(time.Now().Add(time.Second))
	conn.Write([]byte(tooManyConns))
}

// rejectGently waits a second for the request, since some clients take no answer that
// comes before it, and then for the client to close: closing on unread bytes would
// take the answer from it. In a flood it does not wait.
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

// A limitedConn is an accepted connection. It gives its place back when it is closed.
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
