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
func newLimitListener(inner net.Listener, l *limiter, maxConns, perAddr int, countRefusal func(reason string)) *limitListener {
	d := &limitListener{
		Listener: inner, limiter: l, maxConns: int64(maxConns), addrs: addrLimiter{perAddr: perAddr}, countRefusal: countRefusal,
		admitted: make(chan *limitedConn),
	}
	d.closed, d.close = context.WithCancelCause(context.Background())
	d.spareFD, _ = os.Open(os.DevNull)
	go d.acceptAll()
	return d
}

// acceptAll accepts connections until the listener is closed.
func (d *limitListener) acceptAll() {
	for {
		conn, err := d.Listener.Accept()
		switch {
		case errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE):
			d.rejectOne()
		case err != nil:
			d.close(err)
			return
		default:
			d.accept(conn)
		}
	}
}

// accept takes a connection, or refuses it.
func (d *limitListener) accept(conn net.Conn) {
	addr := addrOf(conn.RemoteAddr().String())
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
		go d.admit(&limitedConn{Conn: newSocket(conn), listener: d, addr: addr})
	}
}

// admit hands a connection to net/http when the head of a request has come, and there is
// a place for it. Until then it costs a small goroutine and the head, and not the buffers
// of net/http. A connection that was taken over may come back here.
func (d *limitListener) admit(v *limitedConn) {
	if v.readHead() {
		v.enter()
		if v.countHead(v.ahead) {
			select {
			case d.admitted <- v:
				return
			case <-d.closed.Done():
			}
		}
	}
	v.setPhase(http.StateClosed)
	v.Close()
}

func (d *limitListener) Accept() (net.Conn, error) {
	select {
	case v := <-d.admitted:
		return v, nil
	case <-d.closed.Done():
		return nil, context.Cause(d.closed)
	}
}

func (d *limitListener) Close() error {
	d.close(net.ErrClosed)
	return d.Listener.Close()
}

const tooManyConns = "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json; charset=utf-8\r\nRetry-After: 10\r\nConnection: close\r\n\r\n" +
	`{"error":"there are too many connections; try again later"}` + "\n"

// rejectOne refuses the next connection when there is no descriptor for it.
func (d *limitListener) rejectOne() {
	if d.spareFD == nil {
		time.Sleep(10 * time.Millisecond)
	} else {
		d.spareFD.Close()
		if conn, err := d.Listener.Accept(); err == nil {
			d.reject(conn, "descriptors")
			conn.Close() // at once: the next connection needs the descriptor
		}
	}
	d.spareFD, _ = os.Open(os.DevNull)
}

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
func (v *limitedConn) Close() error {
	if v.lingers.Swap(false) {
		closeGently(v)
		return nil
	}
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
	if v.given < len(v.ahead) {
		n := copy(b, v.ahead[v.given:])
		v.given += n
		return n, nil
	}
	phase := v.phase.Load()
	if phase == outside || len(b) == 1 || phase == inBody && v.http2 { // 1: net/http waits for the client to leave
		return v.Conn.Read(b)
	}
	v.setDue(dueAt(v.began.Load(), v.received.Load()))
	n, err := v.Conn.Read(b)
	v.setDue(0)
	first := v.received.Add(int64(n)) == int64(n)
	if phase == inBody {
		return n, err
	}
	if first {
		v.began.Store(time.Now().UnixNano())
	}
	if !v.http2 && !v.countHead(b[:n]) {
		return 0, os.ErrDeadlineExceeded // for which net/http has no answer of its own
	}
	return n, err
}

// putBack has b be read next.
func (v *limitedConn) putBack(b []byte) {
	v.ahead, v.given, v.isWhole = slices.Concat(b, v.ahead[v.given:]), 0, false
}

// wholeHead returns the head of the request that is being served, or nil if it is not known.
func (v *limitedConn) wholeHead() []byte {
	if v.isWhole && v.given == len(v.ahead) {
		return v.ahead
	}
	return nil
}

// setDue says when the client's time is up, while it is waited for; 0: it is not.
func (v *limitedConn) setDue(at int64) {
	v.place.setDue(at)
	v.head.setDue(at)
}

// readHead waits for the head of a request, and keeps it to be read again. It returns
// false if the head does not come, or is more than may be received now.
func (v *limitedConn) readHead() bool {
	b := append(make([]byte, 0, 512), v.ahead...)
	v.began.Store(time.Now().UnixNano())
	v.Conn.SetReadDeadline(time.Now().Add(headTimeout))
	for !handOver(b) {
		if len(b) == cap(b) {
			if !v.reserveHead(int64(len(b))) {
				return false
			}
			b = append(make([]byte, 0, 2*len(b)), b...)
		}
		v.head.setDue(dueAt(v.began.Load(), int64(len(b))))
		n, err := v.Conn.Read(b[len(b):cap(b)])
		if b = b[:len(b)+n]; err != nil {
			return false
		}
	}
	v.head.setDue(0)
	v.Conn.SetReadDeadline(time.Time{})
	v.ahead, v.given, v.isWhole = b, 0, true
	v.http2 = bytes.HasPrefix(b, []byte("PRI * HTTP/2"))
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
	v.head.setDue(0)
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
	v.begin()
}

// begin begins to wait for a request.
func (v *limitedConn) begin() {
	v.began.Store(time.Now().UnixNano())
	v.received.Store(0)
	v.phase.Store(inHead)
}

// setPhase is what net/http says of the connection.
func (v *limitedConn) setPhase(state http.ConnState) {
	switch state {
	case http.StateActive:
		v.phase.Store(inBody)
		v.place.setDue(0)
	case http.StateIdle:
		if !v.http2 { // of which a request may be read already
			v.freeHead()
			v.putBack(nil)
		}
		v.begin()
		v.place.setDue(v.began.Load() + allowance(0))
	case http.StateHijacked, http.StateClosed:
		v.phase.Store(outside)
		v.freeHead()
		v.place.free()
	}
}

func (v *limitedConn) freeHead() {
	v.head.free()
	v.head, v.headCost = nil, 0
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

// leave gives up the place of a connection that net/http is about to close, although not all
// of a request was read, and has Close be gentle.
func (v *limitedConn) leave() {
	if v != nil {
		v.place.free()
		v.lingers.Store(true)
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

// socket returns the socket, or nil if there is none, as in a test.
func (v *limitedConn) socket() *socket {
	s, _ := v.Conn.(*socket)
	return s
}

// CloseWrite is called by net/http before it closes: the client reads the answer to its
// end, even if some of its request was never read.
func (v *limitedConn) CloseWrite() error { return closeWrite(v.Conn) }

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
