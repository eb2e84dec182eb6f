// Connections. The relay accepts so many, and so many from one address. Only some of them are
// with net/http at a time, since it needs 30 KB for each: a connection waits outside until
// the head of a request has come and there is a place. It gives the place back when it is
// taken over, and when all its requests are held, which are paid for as streams. While
// somebody waits for a place, connections that stand still are closed.

package main

import (
	"bytes"
	"context"
	"errors"
	"net"
	"net/http"
	"net/netip"
	"os"
	"runtime/debug"
	"slices"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	// Bytes of memory for each line of a head, beside its own; and those that are part of
	// what a connection costs.
	headLineCost = 200
	freeHead     = 8 << 10

	// How long a connection that has ended waits for its client to close first.
	lingerTimeout = time.Second

	// Bytes that the kernel may keep of a connection, in each direction.
	kernelBuffer = 64 << 10
)

// A limitListener is what net/http accepts connections from. It takes so many, and so many
// from one address. It answers the others with 503, even when the process has no
// descriptor left.
type limitListener struct {
	net.Listener
	limiter      *limiter
	maxConns     int64       // connections in all
	addrs        addrLimiter // by the address of the connection
	countRefusal func(reason string)
	spareFD      *os.File     // closed for the moment it takes to answer
	rejecting    atomic.Int64 // connections that are being refused
	most         atomic.Int64 // the most that were open since memory was given back

	admitted chan *limitedConn // the next for net/http
	closed   context.Context   // is done when there will be no more; its cause is why
	close    context.CancelCauseFunc
}

// newLimitListener returns a limitListener around another, which has begun to accept.
func newLimitListener(inner net.Listener, limiter *limiter, maxConns, perAddr int, countRefusal func(reason string)) *limitListener {
	l := &limitListener{
		Listener: inner, limiter: limiter, maxConns: int64(maxConns), addrs: addrLimiter{perAddr: perAddr}, countRefusal: countRefusal,
		admitted: make(chan *limitedConn),
	}
	l.closed, l.close = context.WithCancelCause(context.Background())
	l.spareFD, _ = os.Open(os.DevNull)
	go l.acceptAll()
	return l
}

// acceptAll accepts connections until the listener is closed.
func (l *limitListener) acceptAll() {
	for {
		conn, err := l.Listener.Accept()
		switch {
		case errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE):
			l.rejectOne()
		case err != nil:
			l.close(err)
			return
		default:
			l.accept(conn)
		}
	}
}

// accept takes a connection, or refuses it.
func (l *limitListener) accept(conn net.Conn) {
	addr := addrOf(conn.RemoteAddr().String())
	switch {
	case l.limiter.open.Load() >= l.maxConns:
		l.rejectGently(conn, "connections")
	case !l.addrs.acquire(addr):
		l.rejectGently(conn, "address")
	default:
		if c, ok := conn.(*net.TCPConn); ok { // left to itself, Linux would keep megabytes
			c.SetReadBuffer(kernelBuffer)
			c.SetWriteBuffer(kernelBuffer)
		}
		l.most.Store(max(l.most.Load(), l.limiter.open.Add(1)))
		go l.admit(&limitedConn{Conn: newSocket(conn), listener: l, addr: addr})
	}
}

// admit hands a connection to net/http when the head of a request has come, and there is
// a place for it. Until then it costs a small goroutine and the head, and not the buffers
// of net/http. A connection that was taken over may come back here.
func (l *limitListener) admit(c *limitedConn) {
	if c.readHead() {
		c.enter()
		if c.countHead(c.ahead) {
			select {
			case l.admitted <- c:
				return
			case <-l.closed.Done():
			}
		}
	}
	c.setPhase(http.StateClosed)
	c.Close()
}

func (l *limitListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.admitted:
		return c, nil
	case <-l.closed.Done():
		return nil, context.Cause(l.closed)
	}
}

func (l *limitListener) Close() error {
	l.close(net.ErrClosed)
	return l.Listener.Close()
}

const tooManyConns = "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json; charset=utf-8\r\nRetry-After: 10\r\nConnection: close\r\n\r\n" +
	`{"error":"there are too many connections; try again later"}` + "\n"

// rejectOne refuses the next connection when there is no descriptor for it.
func (l *limitListener) rejectOne() {
	if l.spareFD == nil {
		time.Sleep(10 * time.Millisecond)
	} else {
		l.spareFD.Close()
		if conn, err := l.Listener.Accept(); err == nil {
			l.reject(conn, "descriptors")
			conn.Close() // at once: the next connection needs the descriptor
		}
	}
	l.spareFD, _ = os.Open(os.DevNull)
}

// reject answers a connection that is not accepted.
func (l *limitListener) reject(conn net.Conn, reason string) {
	l.countRefusal(reason)
	conn.SetDeadline(time.Now().Add(time.Second))
	conn.Write([]byte(tooManyConns))
}

// rejectGently waits a second for the request, since some clients take no answer that
// comes before it, and then for the client to close: closing on unread bytes would
// take the answer from it. In a flood it does not wait.
func (l *limitListener) rejectGently(conn net.Conn, reason string) {
	if l.rejecting.Add(1) > 100 {
		l.rejecting.Add(-1)
		l.reject(conn, reason)
		conn.Close()
		return
	}
	go func() {
		defer l.rejecting.Add(-1)
		defer conn.Close()
		var b [512]byte
		conn.SetReadDeadline(time.Now().Add(time.Second))
		conn.Read(b[:])
		l.reject(conn, reason)
		closeWrite(conn)
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
	lingers  atomic.Bool // Close is to be gentle, see leave

	ahead   []byte // what was read before net/http had the connection
	given   int    // so much of it net/http has read
	isWhole bool   // it is the head of the request that is being served, and no more
	http2   bool

	phase    atomic.Int32
	began    atomic.Int64 // when the request did, or the phase before it, Unix nanoseconds
	received atomic.Int64 // bytes since
	writes   atomic.Int32 // that are going on
	held     atomic.Int32 // requests that are paid for as streams
	place    *allotment   // of limiter.served
	head     *allotment   // of limiter.receipts, for more than most heads have
	headCost int64        // bytes of memory that the head takes
}

// The phases of a connection.
const (
	outside = iota // not with net/http
	inHead         // in the head of a request, or before it
	inBody         // or while it is answered
)

// Close closes the connection at once, or gently after leave.
func (c *limitedConn) Close() error {
	if c.lingers.Swap(false) {
		closeGently(c)
		return nil
	}
	if !c.closed.Swap(true) {
		c.listener.left(c.listener.limiter.open.Add(-1))
		c.listener.addrs.release(c.addr)
	}
	return c.Conn.Close()
}

// left has memory given back when most of a crowd has left: the runtime by itself would
// keep for minutes what nobody uses.
func (l *limitListener) left(open int64) {
	if most := l.most.Load(); most > 100 && open < most/2 && l.most.CompareAndSwap(most, open) {
		time.AfterFunc(5*time.Second, debug.FreeOSMemory)
	}
}

func (c *limitedConn) Read(b []byte) (int, error) {
	if c.given < len(c.ahead) {
		n := copy(b, c.ahead[c.given:])
		c.given += n
		return n, nil
	}
	phase := c.phase.Load()
	if phase == outside || len(b) == 1 || phase == inBody && c.http2 { // 1: net/http waits for the client to leave
		return c.Conn.Read(b)
	}
	c.setDue(dueAt(c.began.Load(), c.received.Load()))
	n, err := c.Conn.Read(b)
	c.setDue(0)
	first := c.received.Add(int64(n)) == int64(n)
	if phase == inBody {
		return n, err
	}
	if first {
		c.began.Store(time.Now().UnixNano())
	}
	if !c.http2 && !c.countHead(b[:n]) {
		return 0, os.ErrDeadlineExceeded // for which net/http has no answer of its own
	}
	return n, err
}

// putBack has b be read next.
func (c *limitedConn) putBack(b []byte) {
	c.ahead, c.given, c.isWhole = slices.Concat(b, c.ahead[c.given:]), 0, false
}

// wholeHead returns the head of the request that is being served, or nil if it is not known.
func (c *limitedConn) wholeHead() []byte {
	if c.isWhole && c.given == len(c.ahead) {
		return c.ahead
	}
	return nil
}

// setDue says when the client's time is up, while it is waited for; 0: it is not.
func (c *limitedConn) setDue(at int64) {
	c.place.setDue(at)
	c.head.setDue(at)
}

// readHead waits for the head of a request, and keeps it to be read again. It returns
// false if the head does not come, or is more than may be received now.
func (c *limitedConn) readHead() bool {
	b := append(make([]byte, 0, 512), c.ahead...)
	c.began.Store(time.Now().UnixNano())
	c.Conn.SetReadDeadline(time.Now().Add(headTimeout))
	for !handOver(b) {
		if len(b) == cap(b) {
			if !c.reserveHead(int64(len(b))) {
				return false
			}
			b = append(make([]byte, 0, 2*len(b)), b...)
		}
		c.head.setDue(dueAt(c.began.Load(), int64(len(b))))
		n, err := c.Conn.Read(b[len(b):cap(b)])
		if b = b[:len(b)+n]; err != nil {
			return false
		}
	}
	c.head.setDue(0)
	c.Conn.SetReadDeadline(time.Time{})
	c.ahead, c.given, c.isWhole = b, 0, true
	c.http2 = bytes.HasPrefix(b, []byte("PRI * HTTP/2"))
	return true
}

// handOver reports whether net/http can do something with what a client has sent: a whole
// head, too much for one, or what is no request.
func handOver(b []byte) bool {
	line, _, isLine := bytes.Cut(b, []byte("\n"))
	switch {
	case bytes.Contains(b, []byte("\n\r\n")), bytes.Contains(b, []byte("\n\n")): // the head is whole
	case len(b) > maxHeader+4<<10:
	case isLine && !bytes.Contains(line, []byte(" HTTP/")):
	case len(b) > 0 && (b[0] < 'A' || b[0] > 'Z'):
	default:
		return false
	}
	return true
}

// countHead reserves what a part of a head takes, and reports whether it could.
func (c *limitedConn) countHead(b []byte) bool {
	head, _, _ := bytes.Cut(b, []byte("\r\n\r\n"))
	had := max(c.headCost, freeHead)
	c.headCost += int64(len(head) + headLineCost*bytes.Count(head, []byte("\n")))
	return c.headCost <= had || c.reserveHead(c.headCost-had)
}

func (c *limitedConn) reserveHead(n int64) bool {
	if c.head == nil {
		c.head = c.listener.limiter.receipts.open(func() { c.Close() })
	}
	if c.head.grow(n) != nil {
		c.listener.reject(c.Conn, errTooMuch.reason)
		return false
	}
	c.head.setDue(0)
	return true
}

func (c *limitedConn) Write(b []byte) (int, error) {
	if c.phase.Load() == outside {
		return c.Conn.Write(b)
	}
	before, due := c.place.due.Load(), time.Now().UnixNano()+allowance(int64(len(b)))
	c.place.due.Store(due)
	c.writes.Add(1)
	n, err := c.Conn.Write(b)
	c.writes.Add(-1)
	c.place.due.CompareAndSwap(due, before)
	return n, err
}

// enter waits until net/http may serve the connection.
func (c *limitedConn) enter() {
	c.place = c.listener.limiter.served.open(c.giveWay)
	c.place.wait()
	c.place.take(c.weight() - 1)
	c.begin()
}

// begin begins to wait for a request.
func (c *limitedConn) begin() {
	c.began.Store(time.Now().UnixNano())
	c.received.Store(0)
	c.phase.Store(inHead)
}

// setPhase is what net/http says of the connection.
func (c *limitedConn) setPhase(state http.ConnState) {
	switch state {
	case http.StateActive:
		c.phase.Store(inBody)
		c.place.setDue(0)
	case http.StateIdle:
		if !c.http2 { // of which a request may be read already
			c.freeHead()
			c.putBack(nil)
		}
		c.begin()
		c.place.setDue(c.began.Load() + allowance(0))
	case http.StateHijacked, http.StateClosed:
		c.phase.Store(outside)
		c.freeHead()
		c.place.free()
	}
}

func (c *limitedConn) freeHead() {
	c.head.free()
	c.head, c.headCost = nil, 0
}

// giveWay ends a connection that stands still. A body that does not arrive is answered.
func (c *limitedConn) giveWay() {
	if c.phase.Load() == inBody && c.writes.Load() == 0 {
		c.Conn.SetReadDeadline(past)
	} else {
		c.Close()
	}
}

// hold counts held requests. While there are any, the connection is paid for by them.
func (c *limitedConn) hold(n int32) {
	if c == nil {
		return
	}
	switch held := c.held.Add(n); {
	case c.phase.Load() == outside: // it has no place to give back
	case n > 0 && held == 1:
		c.place.give()
	case n < 0 && held == 0:
		c.place.take(c.weight())
	}
}

// leave gives up the place of a connection that net/http is about to close, although not all
// of a request was read, and has Close be gentle.
func (c *limitedConn) leave() {
	if c != nil {
		c.place.free()
		c.lingers.Store(true)
	}
}

// weight is for how many connections this one counts: over HTTP/2 it may have received
// 64 KB that no request has read yet.
func (c *limitedConn) weight() int64 {
	if c.http2 {
		return 3
	}
	return 1
}

// CloseWrite is called by net/http before it closes: the client reads the answer to its
// end, even if some of its request was never read.
func (c *limitedConn) CloseWrite() error { return closeWrite(c.Conn) }

// closeGently ends a connection so that its client reads all that was sent: to close on
// bytes that nobody has read resets the connection, and would take that from the client.
func closeGently(conn net.Conn) {
	if closeWrite(conn) != nil {
		conn.Close()
		return
	}
	time.AfterFunc(lingerTimeout, func() { conn.Close() })
}

func closeWrite(conn net.Conn) error {
	if c, ok := conn.(interface{ CloseWrite() error }); ok {
		return c.CloseWrite()
	}
	return errors.ErrUnsupported
}

type connKey struct{}

// attach has the server tell the limiter of its connections.
func (l *limiter) attach(srv *http.Server) {
	srv.ConnState = func(c net.Conn, state http.ConnState) {
		c.(*limitedConn).setPhase(state)
	}
	srv.ConnContext = func(ctx context.Context, c net.Conn) context.Context {
		return context.WithValue(ctx, connKey{}, c)
	}
}
