// Limits. A small container stays up because everything that clients take is bounded,
// and a bound is met with an answer: 429 for a client that asks for too much, 503 when
// there is no room, with the time to try again. Without this file only what the relay
// keeps is bounded.
//
// What is in memory for a while (a body that is being received, an answer that is being
// taken, a connection that net/http serves) is on a budget. While a budget is used up,
// whoever is slow gives way: thousands that stand still cannot keep out those that do not.
//
// Addresses of the machine itself are not limited, since a proxy asks from there, or a
// test. Budgets are for all.

package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"io"
	"io/fs"
	"math"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// Memory.

// defaultMemory is how much memory the relay takes itself to have where nothing limits it.
const defaultMemory = 256 << 20

// The bounds for a container of 256 MiB. All at once they leave some 40 MiB to the kernel,
// and to garbage. In a larger container they are in proportion. In a smaller one streams
// come first, since to hold many is what the relay is for: 10,000 down to 128 MiB. What
// they leave is shared by the others.
//
//	streams          10,000 of 7 KB (long-polls) or less   68 MiB
//	the log          1/8 of the memory                     32
//	receipts         1/8: bodies, messages, poll answers   32
//	unsent           1/16: what streams have not taken     16
//	served           1,024 connections, of 30 KB           30
//	waiting, ending  1,100 connections of 3 KB, and as
//	                 many as are served, of 12 KB          15
//	rooms and users  10,000 and 20,000, of 0.5 KB          15
//	the process                                            10
type bounds struct {
	streams  int   // streams and waiting long-polls
	logBytes int   // see limits.maxBytes
	unsent   int64 // see server.maxUnsent
	receipts int64 // see limiter.receipts
	served   int64 // see limiter.served
}

func boundsFor(memory int64) bounds {
	memory = max(memory, 32<<20) // less would not do for the process itself
	mib := memory >> 20
	streams := max(min(mib*10_000/128, 10_000), mib*10_000/256)
	share := min(memory, max((memory-streams*7000-26<<20)*7/4, 16<<20))
	return bounds{
		streams:  int(streams),
		logBytes: int(share / 8),
		unsent:   share / 16,
		receipts: share / 8,
		served:   share >> 20 * 4,
	}
}

// availableMemory returns how much memory the container has, and what says so: its memory
// cgroup (v2 or v1), or a group around it, or GOMEMLIMIT if that is less. Without a limit
// it returns defaultMemory.
func availableMemory(root fs.FS) (memory int64, source string) {
	memory, source = math.MaxInt64, "default"
	groups, _ := fs.ReadFile(root, "proc/self/cgroup")
	for line := range strings.Lines(string(groups)) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3) // cgroups(7): number, controllers, path
		if len(f) < 3 {
			continue
		}
		base, file := "sys/fs/cgroup", "memory.max"
		if f[1] != "" {
			base, file = "sys/fs/cgroup/memory", "memory.limit_in_bytes"
			if !slices.Contains(strings.Split(f[1], ","), "memory") {
				continue
			}
		}
		for dir := path.Clean("/" + f[2]); ; dir = path.Dir(dir) { // a container may see its own group as the root
			b, _ := fs.ReadFile(root, path.Join(base, dir, file))
			n, err := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
			if err == nil && n > 0 && n < 1<<50 && n < memory { // v1 has a huge number for none
				memory, source = n, "cgroup"
			}
			if dir == "/" {
				break
			}
		}
	}
	if n := debug.SetMemoryLimit(-1); n < memory && n < 1<<50 {
		memory, source = n, "GOMEMLIMIT"
	}
	if source == "default" {
		memory = defaultMemory
	}
	return memory, source
}

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

	// Bytes of memory for each line of a head, beside its own; and those that are part of
	// what a connection costs.
	headLineCost = 200
	freeHead     = 8 << 10

	// Bytes that the kernel may keep of a connection, in each direction.
	kernelBuffer = 64 << 10
)

// past is a deadline that ends what is going on.
var past = time.Unix(1, 0)

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

// A limitListener accepts so many connections, and so many from one address. It answers
// the others with 503, even when the process has no descriptor left.
type limitListener struct {
	net.Listener
	maxConns     int64       // connections in all
	addrs        addrLimiter // by the address of the connection
	limiter      *limiter
	most         atomic.Int64 // the most that were open since memory was given back
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
		case d.limiter.open.Load() >= d.maxConns:
			d.rejectGently(conn, "connections")
		case !d.addrs.acquire(addr):
			d.rejectGently(conn, "address")
		default:
			if c, ok := conn.(*net.TCPConn); ok { // left to itself, Linux would keep megabytes
				c.SetReadBuffer(kernelBuffer)
				c.SetWriteBuffer(kernelBuffer)
			}
			d.most.Store(max(d.most.Load(), d.limiter.open.Add(1)))
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
// While net/http serves it, it is on the budget for that, and knows how long its client
// has stood still.
type limitedConn struct {
	net.Conn
	listener *limitListener
	addr     netip.Addr
	closed   atomic.Bool

	early []byte // what was read before net/http had the connection

	phase    atomic.Int32
	http2    bool
	began    atomic.Int64 // when the phase or the request did, Unix nanoseconds
	received atomic.Int64 // bytes since
	place    *allotment   // of limiter.served
	head     *allotment   // of limiter.receipts, for more than most heads have
	headCost int64
	writes   atomic.Int32 // that are going on
	held     atomic.Int32 // requests that are paid for as streams
}

// The phases of a connection.
const (
	outside = iota // not with net/http
	idle           // between two requests
	inHead         // of a request
	inBody         // or while it is answered
)

func (v *limitedConn) Close() error {
	if !v.closed.Swap(true) {
		v.listener.left(v.listener.limiter.open.Add(-1))
		v.listener.addrs.release(v.addr)
	}
	return v.Conn.Close()
}

// left has memory given back when most of a crowd has left: the runtime by itself would
// keep for minutes what nobody uses.
func (d *limitListener) left(open int64) {
	if most := d.most.Load(); most > 100 && open < most/2 && d.most.CompareAndSwap(most, open) {
		time.AfterFunc(5*time.Second, debug.FreeOSMemory)
	}
}

func (v *limitedConn) Read(b []byte) (int, error) {
	if len(v.early) > 0 {
		n := copy(b, v.early)
		if v.early = v.early[n:]; len(v.early) == 0 {
			v.early = nil
		}
		return n, nil
	}
	phase := v.phase.Load()
	if phase == outside || len(b) == 1 || phase == inBody && v.http2 { // 1: net/http waits for the client to leave
		return v.Conn.Read(b)
	}
	due := dueAt(v.began.Load(), v.received.Load())
	v.place.due.Store(due)
	if v.head != nil {
		v.head.due.Store(due)
	}
	n, err := v.Conn.Read(b)
	v.place.due.Store(0)
	if v.head != nil {
		v.head.due.Store(0)
	}
	if phase == idle && n > 0 {
		v.phase.CompareAndSwap(idle, inHead)
		v.began.Store(time.Now().UnixNano())
		v.received.Store(0)
	}
	v.received.Add(int64(n))
	if phase != inBody && !v.http2 && !v.countHead(b[:n]) {
		return 0, os.ErrDeadlineExceeded // for which net/http has no answer of its own
	}
	return n, err
}

// readHead waits for the head of the first request, and keeps what comes with it. It
// returns false if the head does not come, or is more than may be received now.
func (v *limitedConn) readHead() bool {
	b := make([]byte, 0, 512)
	v.began.Store(time.Now().UnixNano())
	v.Conn.SetReadDeadline(time.Now().Add(headTimeout))
	for !handOver(b) {
		if len(b) == cap(b) {
			if !v.reserveHead(int64(len(b))) {
				return false
			}
			b = append(make([]byte, 0, 2*len(b)), b...)
		}
		if v.head != nil {
			v.head.due.Store(dueAt(v.began.Load(), int64(len(b))))
		}
		n, err := v.Conn.Read(b[len(b):cap(b)])
		if b = b[:len(b)+n]; err != nil {
			return false
		}
	}
	if v.head != nil {
		v.head.due.Store(0)
	}
	v.Conn.SetReadDeadline(time.Time{})
	v.early, v.http2 = b, bytes.HasPrefix(b, []byte("PRI * HTTP/2"))
	return true
}

// handOver reports whether net/http can do something with what a client has sent: a whole
// head, too much for one, or what is no request.
func handOver(b []byte) bool {
	line, _, ok := bytes.Cut(b, []byte("\n"))
	return bytes.Contains(b, []byte("\n\r\n")) || bytes.Contains(b, []byte("\n\n")) || len(b) > maxHeader+4<<10 ||
		ok && !bytes.Contains(line, []byte(" HTTP/")) || len(b) > 0 && (b[0] < 'A' || b[0] > 'Z')
}

// countHead reserves what a part of a head takes, and reports whether it could.
func (v *limitedConn) countHead(b []byte) bool {
	head, _, _ := bytes.Cut(b, []byte("\r\n\r\n"))
	had := max(v.headCost, freeHead)
	v.headCost += int64(len(head) + headLineCost*bytes.Count(head, []byte("\n")))
	return v.headCost <= had || v.reserveHead(v.headCost-had)
}

func (v *limitedConn) reserveHead(n int64) bool {
	if v.head == nil {
		v.head = v.listener.limiter.receipts.open(func() { v.Close() })
	}
	if v.head.grow(n) != nil {
		v.listener.reject(v.Conn, errTooMuch.reason)
		return false
	}
	v.head.due.Store(0)
	return true
}

func (v *limitedConn) Write(b []byte) (int, error) {
	if v.phase.Load() == outside {
		return v.Conn.Write(b)
	}
	before, due := v.place.due.Load(), time.Now().UnixNano()+allowance(int64(len(b)))
	v.place.due.Store(due)
	v.writes.Add(1)
	n, err := v.Conn.Write(b)
	v.writes.Add(-1)
	v.place.due.CompareAndSwap(due, before)
	return n, err
}

// enter waits until net/http may serve the connection.
func (v *limitedConn) enter() {
	l := v.listener.limiter
	v.place = l.served.open(v.giveWay)
	v.place.wait()
	v.place.take(v.weight() - 1)
	v.phase.Store(inHead)
	v.began.Store(time.Now().UnixNano())
	v.received.Store(0)
}

// setPhase is what net/http says of the connection.
func (v *limitedConn) setPhase(state http.ConnState) {
	switch state {
	case http.StateActive:
		v.phase.Store(inBody)
		v.place.due.Store(0)
	case http.StateIdle:
		v.freeHead()
		v.began.Store(time.Now().UnixNano())
		v.received.Store(0)
		v.phase.Store(idle)
		v.place.due.Store(v.began.Load() + allowance(0))
	case http.StateHijacked, http.StateClosed:
		v.phase.Store(outside)
		v.freeHead()
		v.place.free()
	}
}

func (v *limitedConn) freeHead() {
	if v.head != nil {
		v.head.free()
		v.head = nil
	}
	v.headCost = 0
}

// giveWay ends a connection that stands still. A body that does not arrive is answered.
func (v *limitedConn) giveWay() {
	if v.phase.Load() == inBody && v.writes.Load() == 0 {
		v.Conn.SetReadDeadline(past)
	} else {
		v.Close()
	}
}

// hold counts held requests. While there are any, the connection is paid for by them.
func (v *limitedConn) hold(n int32) {
	if v == nil {
		return
	}
	switch held := v.held.Add(n); {
	case v.phase.Load() == outside: // it has no place to give back
	case n > 0 && held == 1:
		v.place.give()
	case n < 0 && held == 0:
		v.place.take(v.weight())
	}
}

// leave gives up the place of a connection that net/http is about to close. Half a second
// later, that is, so that its client can read the answer.
func (v *limitedConn) leave() {
	if v != nil {
		v.place.free()
	}
}

// weight is for how many connections this one counts: over HTTP/2 it may have received
// 64 KB that no request has read yet.
func (v *limitedConn) weight() int64 {
	if v.http2 {
		return 3
	}
	return 1
}

// NetConn returns the connection within.
func (v *limitedConn) NetConn() net.Conn { return v.Conn }

// limitedConnOf returns the limitedConn in a connection, or nil.
func limitedConnOf(c net.Conn) *limitedConn {
	for {
		switch v := c.(type) {
		case *limitedConn:
			return v
		case interface{ NetConn() net.Conn }:
			c = v.NetConn()
		default:
			return nil
		}
	}
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

// Budgets.

const (
	// How long a client may stand still while a budget is used up, beside the time that
	// its bytes take at slowRate: short enough for ten thousand that stand still to make
	// way, a thousand at a time, for one that waits, within seconds.
	stillTime = 300 * time.Millisecond

	slowRate = 64 << 10 // bytes a second: a client's, in either direction

	// A quarter of a budget is for those who have so much at most, in bytes: who sends a
	// little is not kept out by those who send a lot.
	smallPart = 32 << 10

	// How often those who wait look for others that stand still.
	cutEvery = 25 * time.Millisecond
)

// allowance is how long a client may take for so many bytes, in nanoseconds.
func allowance(bytes int64) int64 {
	return int64(stillTime) + bytes*int64(time.Second)/slowRate
}

// dueAt is when a client's time is up that has sent so many bytes since it began: when
// it has not sent another for stillTime, or fell behind slowRate by as much.
func dueAt(began, received int64) int64 {
	return min(time.Now().UnixNano()+int64(stillTime), began+allowance(received))
}

// A budget bounds what is taken from it. Who takes something has an allotment. When it does
// not suffice, those whose time is up are cut off, the one that is most late first, and
// what they had is taken from them at once.
type budget struct {
	max int64

	mu      sync.Mutex // guards what follows
	used    int64
	shares  map[*allotment]struct{} // that have something
	waiting []*allotment
	cutAt   int64 // when all that were late had been cut off, Unix nanoseconds
}

func newBudget(max int64) *budget { return &budget{max: max, shares: map[*allotment]struct{}{}} }

// An allotment is what one client has of a budget.
type allotment struct {
	budget *budget
	cut    func()       // ends the client; called once
	due    atomic.Int64 // when its time is up, Unix nanoseconds; 0: it does not stand still

	// Guarded by budget.mu.
	size  int64
	ended bool          // it was cut off, or has left
	ready chan struct{} // closed when it waited, and has its part
}

// open returns an allotment without anything.
func (b *budget) open(cut func()) *allotment { return &allotment{budget: b, cut: cut} }

// inUse is how much is taken.
func (b *budget) inUse() int64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.used
}

// grow takes n for what is to come, and gives its client the time that so many bytes
// take; or it returns errTooMuch, and takes nothing.
func (s *allotment) grow(n int64) error {
	b, now := s.budget, time.Now().UnixNano()
	b.mu.Lock()
	defer b.mu.Unlock()
	bound := b.max
	if s.size+n > smallPart {
		bound -= b.max / 4
	}
	if over := b.used + n - bound; over > 0 && !s.ended {
		b.cutLate(now, over)
	}
	if s.ended || b.used+n > bound {
		return errTooMuch
	}
	s.due.Store(now + allowance(s.size+n))
	b.add(s, n)
	return nil
}

// wait takes 1, and waits until it can.
func (s *allotment) wait() {
	b := s.budget
	b.mu.Lock()
	if len(b.waiting) == 0 && b.used < b.max {
		b.add(s, 1)
		b.mu.Unlock()
		return
	}
	s.ready = make(chan struct{})
	if b.waiting = append(b.waiting, s); len(b.waiting) == 1 {
		b.tick()
	}
	b.mu.Unlock()
	<-s.ready
}

// take takes n, beyond the bound if it must, unless the allotment has ended; give gives all
// back, and free does that for good.
func (s *allotment) take(n int64) {
	s.budget.mu.Lock()
	defer s.budget.mu.Unlock()
	if !s.ended {
		s.budget.add(s, n)
	}
}

func (s *allotment) give() {
	s.budget.mu.Lock()
	defer s.budget.mu.Unlock()
	s.budget.drop(s)
	s.budget.admit()
}

func (s *allotment) free() {
	s.budget.mu.Lock()
	defer s.budget.mu.Unlock()
	s.ended = true
	s.budget.drop(s)
	s.budget.admit()
}

// The caller of what follows holds b.mu.

func (b *budget) add(s *allotment, n int64) {
	s.size += n
	b.used += n
	b.shares[s] = struct{}{}
}

func (b *budget) drop(s *allotment) {
	b.used -= s.size
	s.size = 0
	delete(b.shares, s)
}

// admit lets in those who wait, in their order.
func (b *budget) admit() {
	for len(b.waiting) > 0 && b.used < b.max {
		s := b.waiting[0]
		b.waiting[0] = nil
		b.waiting = b.waiting[1:]
		b.add(s, 1)
		close(s.ready)
	}
}

// cutLate cuts off those whose time is up, until so much is free. In a flood it does not
// look each time.
func (b *budget) cutLate(now, want int64) {
	if now-b.cutAt < int64(cutEvery) {
		return
	}
	var late []*allotment
	for s := range b.shares {
		if due := s.due.Load(); due != 0 && due < now {
			late = append(late, s)
		}
	}
	slices.SortFunc(late, func(s, o *allotment) int { return cmp.Compare(s.due.Load(), o.due.Load()) })
	for _, s := range late {
		if want <= 0 {
			return
		}
		want -= s.size
		s.ended = true
		b.drop(s)
		go s.cut()
	}
	if want > 0 {
		b.cutAt = now
	}
}

// tick makes way for those who wait, as long as there are any.
func (b *budget) tick() {
	time.AfterFunc(cutEvery, func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.cutLate(time.Now().UnixNano(), int64(len(b.waiting)))
		b.admit()
		if len(b.waiting) > 0 {
			b.tick()
		}
	})
}

// Admission to net/http.

// An admission is the listener that net/http accepts from. A connection is handed over
// when the head of its first request has come, and there is a place for it: until then
// it costs a small goroutine and the head, and not the buffers of net/http.
type admission struct {
	net.Listener
	accepted chan acceptance
	done     chan struct{}
	close    func()
}

type acceptance struct {
	conn net.Conn
	err  error
}

// listen returns a listener for net/http. A connection of inner that is around a
// *limitedConn, and no *limitedConn itself, comes back with its first byte read already.
func (l *limiter) listen(inner net.Listener) net.Listener {
	a := &admission{Listener: inner, accepted: make(chan acceptance), done: make(chan struct{})}
	a.close = sync.OnceFunc(func() { close(a.done) })
	go func() {
		for {
			conn, err := inner.Accept()
			if err != nil {
				a.hand(acceptance{nil, err})
				if errors.Is(err, net.ErrClosed) {
					return
				}
				continue
			}
			go a.admit(conn)
		}
	}()
	return a
}

func (a *admission) admit(conn net.Conn) {
	if v := limitedConnOf(conn); v != nil {
		if v == conn && !v.readHead() {
			v.freeHead()
			conn.Close()
			return
		}
		v.enter()
		if !v.countHead(v.early) {
			v.setPhase(http.StateClosed)
			conn.Close()
			return
		}
	}
	a.hand(acceptance{conn, nil})
}

// hand hands over a connection, or an error, unless nobody accepts any more.
func (a *admission) hand(got acceptance) {
	select {
	case a.accepted <- got:
	case <-a.done:
		if v := limitedConnOf(got.conn); v != nil {
			v.setPhase(http.StateClosed)
		}
		if got.conn != nil {
			got.conn.Close()
		}
	}
}

func (a *admission) Accept() (net.Conn, error) {
	select {
	case got := <-a.accepted:
		return got.conn, got.err
	case <-a.done:
		return nil, net.ErrClosed
	}
}

func (a *admission) Close() error {
	a.close()
	return a.Listener.Close()
}

type connKey struct{}

// attach has the server tell the limiter of its connections.
func (l *limiter) attach(srv *http.Server) {
	srv.ConnState = func(c net.Conn, state http.ConnState) {
		if v := limitedConnOf(c); v != nil {
			v.setPhase(state)
		}
	}
	srv.ConnContext = func(ctx context.Context, c net.Conn) context.Context {
		return context.WithValue(ctx, connKey{}, limitedConnOf(c))
	}
}
