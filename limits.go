// Limits. A small container stays up because everything that clients take is bounded,
// and a bound is met with an answer: 429 for a client that asks for too much, 503 when
// there is no room, with the time to try again. Without this file only what the relay
// keeps is bounded.
//
// A budget bounds the bytes that are being received and, of answers with an end, taken
// (budget.go); another the connections that net/http serves (connections.go).
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
	streamCost  = 10 << 10 // bytes of memory that a stream counts for
	requestCost = 30 << 10 // and one that net/http drives: HTTP/2, or HTTP/1.0

	// A body or an answer of this size, in bytes, is part of what its connection costs.
	smallSize = 4 << 10

	// Bytes of memory for each byte of a body: parts of it, and then the whole.
	bodyFactor = 2
)

// A limiter bounds what clients take together, and each address.
type limiter struct {
	addrs          addrLimiter
	maxStreams     int64 // streams and waiting long-polls
	maxStreamBytes int64 // of memory, for them
	streams        atomic.Int64
	streamBytes    atomic.Int64
	maxBody        int64
	roomRate       float64      // publishes a second to a room
	open           atomic.Int64 // connections
	receipts       *budget      // bytes that are being received or, of answers with an end, taken
	served         *budget      // connections that net/http serves

	mu    sync.Mutex // guards rooms
	rooms map[string]*tokenBucket
}

func newLimiter(c config) *limiter {
	b := boundsFor(c.memory)
	return &limiter{
		addrs:          addrLimiter{trustProxy: c.trustProxy, fly: c.fly, perAddr: c.perAddr, rate: c.rate},
		maxStreams:     int64(c.streams),
		maxStreamBytes: int64(max(c.streams, b.streams)) * streamCost,
		maxBody:        c.body,
		roomRate:       c.roomRate,
		receipts:       newBudget(max(b.receipts, 4*bodyFactor*c.body)),
		served:         newBudget(b.served),
	}
}

// wrap returns a handler that gives requests their quota, and reserves memory for bodies.
func (l *limiter) wrap(s *server, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r, p := withPermit(r)
		q := &clientQuota{l: l, addr: l.addrs.clientAddr(r), http11: r.ProtoMajor == 1 && r.ProtoMinor == 1}
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
	l      *limiter
	addr   netip.Addr
	conn   *limitedConn // nil if the listener is not ours
	http11 bool
	body   *reservedBody
	cut    func() // ends what the request waits for
	parts  []*allotment
}

// begin reserves what the request takes before it is read.
func (q *clientQuota) begin(w http.ResponseWriter, r *http.Request) error {
	if r.ProtoMajor == 1 && r.ContentLength == 0 {
		return nil
	}
	rc := http.NewResponseController(w)
	part := q.open(func() { rc.SetReadDeadline(past) })
	if r.ProtoMajor == 2 {
		q.cut = func() { rc.SetWriteDeadline(past) }
		if err := part.grow(requestCost); err != nil {
			return err
		}
		part.due.Store(0)
	}
	if r.ContentLength == 0 || r.ContentLength > q.l.maxBody { // the latter is refused before it is read
		return nil
	}
	q.body = &reservedBody{ReadCloser: r.Body, part: part, reserved: smallSize}
	r.Body = q.body
	if r.ContentLength > smallSize {
		q.body.reserved = r.ContentLength
		return part.grow(r.ContentLength * bodyFactor)
	}
	return nil
}

// open returns an allotment of the receipts, until the request ends.
func (q *clientQuota) open(cut func()) *allotment {
	part := q.l.receipts.open(cut)
	q.parts = append(q.parts, part)
	return part
}

// free gives back what was reserved. It may be called again: a long-poll that waits
// without net/http keeps its quota.
func (q *clientQuota) free() {
	for _, part := range q.parts {
		part.free()
	}
}

// reserve is for an answer that is in memory until the client has taken it.
func (q *clientQuota) reserve(bytes int) error {
	if bytes <= smallSize {
		return nil
	}
	cut := q.cut
	if cut == nil && q.conn != nil {
		cut = func() { q.conn.Close() }
	}
	if cut == nil {
		return nil
	}
	return q.open(cut).grow(int64(bytes))
}

// A reservedBody is a body whose bytes are reserved before they are read.
type reservedBody struct {
	io.ReadCloser
	part     *allotment
	reserved int64 // and not yet read
	began    int64 // when it was first read, Unix nanoseconds
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
	if b.began == 0 {
		b.began = time.Now().UnixNano()
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
	l := q.l
	streams, bytes := l.streams.Add(1), l.streamBytes.Add(q.cost())
	most := l.maxStreamBytes
	if !q.http11 {
		most -= most / 4 // a quarter is for those that cost less
	}
	err := error(nil)
	if streams > l.maxStreams || bytes > most {
		err = errTooManyStreams
	} else if !l.addrs.acquire(q.addr) {
		err = errTooManyPerAddr
	}
	if err != nil {
		l.streams.Add(-1)
		l.streamBytes.Add(-q.cost())
		return err
	}
	q.free() // a stream is not paid for twice
	q.conn.hold(1)
	return nil
}

func (q *clientQuota) release() {
	q.l.streams.Add(-1)
	q.l.streamBytes.Add(-q.cost())
	q.l.addrs.release(q.addr)
	q.conn.hold(-1)
}

// cost is how many bytes of memory a held request takes.
func (q *clientQuota) cost() int64 {
	if q.http11 {
		return streamCost
	}
	return requestCost
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
