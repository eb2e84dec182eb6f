// Limits. A small container stays up because everything that clients take is bounded,
// and a bound is met with an answer: 429 for a client that asks for too much, 503 when
// there is no room, with the time to try again. Without this file only what the relay
// keeps is bounded.
//
// A budget bounds the bytes that are being received and, of answers with an end, taken
// (budget.go); another the connections that net/http serves (connections.go). What streams
// have not taken yet has a plain bound: who exceeds it is dropped.
//
// Addresses of the machine itself are not limited, since a proxy asks from there, or a
// test. Budgets are for all.

package main

import (
	"io"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

var (
	errTooFast        = limitError(http.StatusTooManyRequests, "this address publishes too fast", "rate", 1)
	errRoomTooFast    = limitError(http.StatusTooManyRequests, "this room is published to too fast", "room", 1)
	errTooManyPerAddr = limitError(http.StatusTooManyRequests, "this address holds too many connections", "address", 10)
	errTooManyStreams = limitError(http.StatusServiceUnavailable, "the relay holds as many connections as it may; try again later", "streams", 10)
	errTooMuch        = limitError(http.StatusServiceUnavailable, "the relay receives and sends as much at once as it may; try again", "memory", 1)
)

const (
	// A stream that net/http drives to its end, over HTTP/2 or HTTP/1.0, counts as so many.
	streamWeight = 3

	// Bytes of memory that a request of HTTP/2 takes.
	requestCost = 30 << 10

	// A body or an answer of this size, in bytes, is part of what its connection costs.
	smallSize = 4 << 10

	// Bytes of memory for each byte of a body: parts of it, and then the whole.
	bodyFactor = 2
)

// A limiter bounds what clients take together, and each address.
type limiter struct {
	flags     config
	maxWeight int    // of streams and waiting long-polls
	maxUnsent int64  // bytes
	dropped   func() // counts clients that are dropped

	unsentBytes atomic.Int64 // that streams have not taken yet
	open        atomic.Int64 // connections
	receipts    *budget      // bytes that are being received or, of answers with an end, taken
	served      *budget      // connections that net/http serves
	publishes   rateLimiter[netip.Addr]
	rooms       rateLimiter[string]
	held        addrLimiter // streams and waiting long-polls

	mu      sync.Mutex // guards what follows
	streams int
	weight  int // of all streams: 1 for most, streamWeight for some
}

func newLimiter(c config) *limiter {
	b := boundsFor(c.memory)
	return &limiter{
		flags:     c,
		maxWeight: max(c.streams, b.streams),
		maxUnsent: b.unsent,
		dropped:   func() {},
		receipts:  newBudget(max(b.receipts, 4*bodyFactor*c.body)),
		served:    newBudget(b.served),
		publishes: rateLimiter[netip.Addr]{rate: c.rate},
		rooms:     rateLimiter[string]{rate: c.roomRate},
		held:      addrLimiter{perAddr: c.perAddr},
	}
}

// wrap returns a handler that gives requests their quota, and reserves memory for bodies.
func (l *limiter) wrap(s *server, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r, p := withPermit(r)
		q := &clientQuota{l: l, addr: l.clientAddr(r), weight: 1}
		if r.ProtoMajor != 1 || r.ProtoMinor != 1 {
			q.weight = streamWeight
		}
		q.conn, _ = r.Context().Value(connKey{}).(*limitedConn)
		p.quota = q
		defer q.free()
		if err := q.begin(w, r); err != nil {
			s.answer(w, r, func(w http.ResponseWriter, r *http.Request) error {
				w.Header().Set("Connection", "close") // or net/http would wait for the body first
				return err
			})
		} else {
			next.ServeHTTP(w, r)
		}
		if q.body != nil && !q.body.ended && w.Header().Get("Connection") == "close" {
			http.NewResponseController(w).SetReadDeadline(past) // or it would wait for the body now
			q.conn.leave()
		}
	})
}

// A clientQuota is the quota of one client, for one request.
type clientQuota struct {
	l       *limiter
	addr    netip.Addr
	conn    *limitedConn // nil if the listener is not ours
	weight  int          // as a stream
	body    *reservedBody
	cut     func()     // ends a client of HTTP/2 that takes no answer
	in, out *allotment // of l.receipts: for the request and its body, and for a long answer; or nil
}

// begin reserves what the request takes before it is read.
func (q *clientQuota) begin(w http.ResponseWriter, r *http.Request) error {
	if r.ProtoMajor == 1 && r.ContentLength == 0 {
		return nil
	}
	rc := http.NewResponseController(w)
	q.in = q.l.receipts.open(func() { rc.SetReadDeadline(past) })
	if r.ProtoMajor == 2 {
		q.cut = func() { rc.SetWriteDeadline(past) }
		if err := q.in.grow(requestCost); err != nil {
			return err
		}
		q.in.due.Store(0)
	}
	if r.ContentLength == 0 || r.ContentLength > q.l.flags.body { // the latter is refused before it is read
		return nil
	}
	q.body = &reservedBody{ReadCloser: r.Body, part: q.in, reserved: smallSize, began: time.Now().UnixNano()}
	r.Body = q.body
	if r.ContentLength > smallSize {
		q.body.reserved = r.ContentLength
		return q.in.grow(r.ContentLength * bodyFactor)
	}
	return nil
}

// reserve is for an answer that is in memory until the client has taken it.
func (q *clientQuota) reserve(bytes int) error {
	cut := q.cut
	if cut == nil && q.conn != nil {
		cut = func() { q.conn.Close() }
	}
	if bytes <= smallSize || cut == nil {
		return nil
	}
	q.out = q.l.receipts.open(cut)
	return q.out.grow(int64(bytes))
}

// free gives back what was reserved. It may be called again: a long-poll that waits
// without net/http keeps its quota.
func (q *clientQuota) free() {
	q.in.free()
	q.out.free()
}

// A reservedBody is a body whose bytes are reserved before they are read.
type reservedBody struct {
	io.ReadCloser
	part     *allotment
	reserved int64 // and not yet read
	began    int64 // Unix nanoseconds
	received int64 // bytes since
	ended    bool
}

func (b *reservedBody) Read(p []byte) (int, error) {
	if b.reserved == 0 {
		if err := b.part.grow(smallSize * bodyFactor); err != nil {
			return 0, err
		}
		b.reserved = smallSize
	}
	b.part.due.Store(dueAt(b.began, b.received))
	n, err := b.ReadCloser.Read(p[:min(int64(len(p)), b.reserved)])
	b.part.due.Store(0)
	b.reserved -= int64(n)
	b.received += int64(n)
	b.ended = err == io.EOF
	return n, err
}

func (q *clientQuota) publish() error {
	if isUnlimited(q.addr) || q.l.publishes.allow(q.addr, time.Now()) {
		return nil
	}
	return errTooFast
}

func (q *clientQuota) publishTo(room string) error {
	if q.addr.IsLoopback() || q.l.rooms.allow(room, time.Now()) {
		return nil
	}
	return errRoomTooFast
}

func (q *clientQuota) hold() error {
	l := q.l
	most := l.maxWeight
	if q.weight > 1 {
		most = most * 3 / 4 // the rest is for those that cost less
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.streams >= l.flags.streams || l.weight+q.weight > most {
		return errTooManyStreams
	}
	if !l.held.acquire(q.addr) {
		return errTooManyPerAddr
	}
	l.streams++
	l.weight += q.weight
	q.free() // a stream is not paid for twice
	q.conn.hold(1)
	return nil
}

func (q *clientQuota) release() {
	l := q.l
	l.mu.Lock()
	defer l.mu.Unlock()
	l.streams--
	l.weight -= q.weight
	l.held.release(q.addr)
	q.conn.hold(-1)
}

// unsent counts bytes that a stream has not taken yet, and drops one for whose bytes there is
// no room left; with a negative number, bytes that it has taken.
func (q *clientQuota) unsent(bytes int) error {
	if q.l.unsentBytes.Add(int64(bytes)) > q.l.maxUnsent && bytes > 0 {
		q.l.unsentBytes.Add(-int64(bytes))
		q.l.dropped()
		return errClientGone
	}
	return nil
}

// A rateLimiter lets each key do something rate times a second, and two seconds' worth at
// once. It is a token bucket for each, kept as the time when that is full again.
type rateLimiter[K comparable] struct {
	rate float64

	mu     sync.Mutex // guards what follows
	fullAt map[K]time.Time
}

// maxBuckets is how many keys have a bucket that is not full. When there are more, all are
// full again.
const maxBuckets = 1 << 16

// allow takes a token, if there is one.
func (l *rateLimiter[K]) allow(key K, now time.Time) bool {
	interval := time.Duration(min(1/l.rate, 1e9) * 1e9) // a Duration holds no more than 9e9 seconds
	l.mu.Lock()
	defer l.mu.Unlock()
	fullAt := l.fullAt[key]
	if fullAt.Before(now) {
		fullAt = now
	}
	fullAt = fullAt.Add(interval)
	if fullAt.Sub(now) > max(2*time.Second, interval) {
		return false
	}
	if len(l.fullAt) >= maxBuckets || l.fullAt == nil {
		l.fullAt = map[K]time.Time{}
	}
	l.fullAt[key] = fullAt
	return true
}

// An addrLimiter bounds how many connections, or held requests, each client address has.
type addrLimiter struct {
	perAddr int

	mu   sync.Mutex // guards what follows
	open map[netip.Addr]int
}

// acquire takes one of the address's places; release gives it back.
func (g *addrLimiter) acquire(a netip.Addr) bool {
	if isUnlimited(a) {
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
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.open[a] > 1 {
		g.open[a]--
	} else {
		delete(g.open, a)
	}
}

// isUnlimited reports whether an address is the machine's own, or that of no TCP connection.
func isUnlimited(a netip.Addr) bool { return a.IsLoopback() || !a.IsValid() }

// clientAddr returns the client's address: that of the connection; or, behind a trusted
// proxy, what the proxy says. The last entry of X-Forwarded-For is from the proxy, all
// before it from the client. Fly has a header of its own
// (https://fly.io/docs/networking/request-headers/), which elsewhere a client can send
// too, so there it counts only without X-Forwarded-For.
func (l *limiter) clientAddr(r *http.Request) netip.Addr {
	said := ""
	if l.flags.trustProxy {
		said = strings.Join(r.Header.Values("X-Forwarded-For"), ",")
		if fly := r.Header.Get("Fly-Client-IP"); fly != "" && (l.flags.fly || said == "") {
			said = fly
		}
	}
	if said == "" {
		return addrOf(r.RemoteAddr)
	}
	hop := strings.TrimSpace(said[strings.LastIndexByte(said, ',')+1:])
	if a := addrOf(hop); a.IsValid() { // with a port, as some proxies write it
		return a
	}
	if a, err := netip.ParseAddr(hop); err == nil {
		return addrKey(a)
	}
	return netip.IPv6Unspecified() // unreadable: one address for all such clients, and not the machine's own
}

// addrOf returns the address of one with a port.
func addrOf(s string) netip.Addr {
	a, _ := netip.ParseAddrPort(s)
	return addrKey(a.Addr())
}

// addrKey is the address that counts: an IPv6 address counts by its /64, which is what one
// customer gets.
func addrKey(a netip.Addr) netip.Addr {
	if a = a.Unmap().WithZone(""); a.Is6() && !a.IsLoopback() {
		p, _ := a.Prefix(64)
		return p.Addr()
	}
	return a
}
