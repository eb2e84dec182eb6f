// Streams without a goroutine each. For every connection net/http keeps two buffers
// of 4 KB and a goroutine with a stack of 8 KB, or two while a request is served: some
// 26 KB, which is right for requests, and too much for ten thousand clients that are
// sent something now and then. This file takes a stream's connection over with
// http.Hijacker, and keeps a session: the connection, a subscriber, and a goroutine that
// waits to read, which is how one notices that a client left.
//
// A few writers serve all sessions, since waking a goroutine for each reader of each
// message costs more than the write. Who wakes a session puts it into a queue; a writer
// takes it from there, and sends what is due. Writers never wait: a full socket is left
// to the goroutine that reads, or to one of its own, until it has room again, or its time
// is up.
//
// websocket.go has what is special about WebSockets, and longpoll.go about long-polls.
// Without the three files every request is driven by net/http's own goroutine, in
// (*stream).loop. That is also how HTTP/2 and HTTP/1.0 are served, which have no
// connection of their own or no chunks.

package main

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"io"
	"log/slog"
	"math"
	"net"
	"net/http"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// Bytes that the kernel may keep for a client that is slow to take them. Left to
	// itself, Linux would keep megabytes.
	socketBuffer = 32 << 10

	// An event of this size, in bytes, is kept once for all clients that are slow to
	// take it, and not copied for each.
	shareFrom = 512

	// Bytes that the client of a stream may send, which are discarded.
	maxDiscarded = 16 << 10

	// With so many streams, memory is worth more than time. To deliver an event
	// allocates nothing, so collecting garbage more often costs little.
	gcThreshold = 100

	maxScratch = 256 << 10 // bytes that a writer keeps of its buffer

	// How many sessions a writer takes from the queue at once.
	batchSize = 32
)

// A session is a stream whose connection was taken over.
type session struct {
	state atomic.Int32
	gone  atomic.Bool // the client left
	index int         // in pool.sessions, guarded like that
	*stream
	pool          *writerPool
	conn          *limitedConn
	fd            int         // of its socket, or -1: kept here, since a write finds little in the cache
	before        []byte      // what the next write begins with: the head of the answer, or a ping
	pending       net.Buffers // what a full socket did not take
	kernelTimeout bool        // the kernel ends the connection when the client acknowledges nothing
	poll          *heldPoll   // of a long-poll
	ws            *webSocket  // of a WebSocket
}

// The states of a session. To wake it is to queue it if it is idle, and to have its writer
// look once more if there is one. What is not atomic in a session is touched only by who
// has it: the writer that took it from the queue, or the goroutine that waits for its full
// socket.
const (
	stateOut     = iota // no writer will come: it is new, or a long-poll that has its answer
	stateIdle           // there is nothing to write
	stateQueued         // a writer will come
	stateWriting        // a writer has it
	stateDirty          // the same, and it was woken meanwhile
	stateBlocked        // its socket is full, and somebody waits for that
	stateClosed         // it holds nothing any more
)

// A writerPool is the writers, and the sessions they serve. Writers live while there is
// something to write, so a pool needs neither start nor stop.
type writerPool struct {
	server     *server
	trustProxy bool
	newCounter func() counter                          // for a writer; called for no technique, it adds up what it has counted
	received   func(t *technique, requests, bytes int) // counts what net/http does not see
	dropped    func()                                  // counts clients that took nothing for too long
	receipts   *budget                                 // of the messages that arrive
	resume     func(*limitedConn)                      // gives the connection of a long-poll back to net/http

	scratches sync.Pool

	mu        sync.Mutex // guards what follows
	queue     []*session
	taken     int // so many at the front of the queue were taken
	writers   int
	sessions  []*session
	ticking   bool                 // a tick is due
	questions map[string]*question // of long-polls, by their heads without the cursor
}

// newWriterPool has the server's streams served by a pool.
func newWriterPool(s *server, trustProxy bool, receipts *budget) *writerPool {
	p := &writerPool{server: s, trustProxy: trustProxy, receipts: receipts, received: func(*technique, int, int) {}, dropped: func() {}}
	p.newCounter = func() counter { return s.count }
	p.scratches.New = func() any { return &scratch{count: p.newCounter()} }
	s.takeOver = p.takeOver
	s.relay.wakeRoom = p.wakeRoom
	publish := s.publish
	s.publish = func(req publishRequest) (int64, bool, error) {
		id, isNew, err := publish(req)
		if isNew {
			p.throttle()
		}
		return id, isNew, err
	}
	return p
}

// takeOver serves a stream by the pool if it has a connection of its own.
func (p *writerPool) takeOver(w http.ResponseWriter, r *http.Request, st *stream, q *request) (taken bool, err error) {
	if st.technique.mode == longPoll {
		return p.takeOverPoll(w, r, st, q)
	}
	isWebSocket := st.technique.name == "ws"
	if !isWebSocket && (r.ProtoMajor != 1 || r.ProtoMinor != 1) {
		return false, nil
	}
	ses := &session{stream: st, pool: p}
	if err := st.open(q, ses); err != nil {
		return true, err
	}
	if ses.conn, _, err = hijack(w); err != nil {
		ses.close()
		return true, err
	}
	h := w.Header()
	h.Set("Date", time.Now().UTC().Format(http.TimeFormat))
	if isWebSocket {
		ses.beginWebSocket(h, r, q)
	} else {
		ses.beginChunks(h)
	}
	return true, nil
}

// hijack takes over a request's connection. What the client has sent beyond the request is
// what is read first. It returns the head of the request, too, if that is known.
func hijack(w http.ResponseWriter) (conn *limitedConn, head []byte, err error) {
	c, rw, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return nil, nil, err
	}
	conn = c.(*limitedConn)
	early, _ := rw.Reader.Peek(rw.Reader.Buffered())
	if len(early) == 0 {
		head = conn.wholeHead()
	}
	conn.putBack(early)
	return conn, head, nil
}

// beginChunks begins a stream whose length nobody knows: each write is a chunk.
func (ses *session) beginChunks(h http.Header) {
	h.Set("Transfer-Encoding", "chunked")
	h.Set("Connection", "close")
	ses.before = []byte(answerHead("200 OK", h) + "\r\n")
	ses.headroom, ses.send = chunkHeadSize, ses.sendChunk
	ses.pool.add(ses)
	go ses.watch()
}

// answerHead returns the head of an answer, without the empty line that ends it.
func answerHead(status string, h http.Header) string {
	var head strings.Builder
	head.WriteString("HTTP/1.1 " + status + "\r\n")
	h.Write(&head)
	return head.String()
}

// Writing.

// chunkHeadSize is the size of a chunk in hexadecimal and a line end (RFC 9112, 7.1).
// Leading zeros are allowed, so the size can be filled in last.
const chunkHeadSize = len("00000000\r\n")

// sendChunk writes b, whose first chunkHeadSize bytes are free, as a chunk.
func (ses *session) sendChunk(sc *scratch, b []byte, events []*event) error {
	var size [4]byte
	binary.BigEndian.PutUint32(size[:], uint32(len(b)-chunkHeadSize))
	copy(b[hex.Encode(b, size[:]):], "\r\n")
	if b = append(b, "\r\n"...); len(b) == chunkHeadSize+len("\r\n") {
		b = b[:0] // an empty chunk would be the end
	}
	if ses.closed {
		b = append(b, "0\r\n\r\n"...)
	}
	sc.count(ses.technique, nil, chunkHeadSize+len("\r\n")+len(ses.before), 0)
	return ses.write(b, events)
}

// errBlocked says that a socket took only a part, and the rest is kept.
var errBlocked = errors.New("the socket is full")

// write gives the socket what it takes, and keeps the rest.
func (ses *session) write(b []byte, events []*event) error {
	if ses.before != nil {
		b = append(ses.before, b...)
		ses.before = nil
	}
	n, err := tryWrite(ses.fd, b)
	if err != nil || n == len(b) {
		return err
	}
	if err := ses.quota.unsent(len(b) - n); err != nil { // before it is copied
		return err
	}
	ses.pending = unwritten(b, n, events)
	return errBlocked
}

// unwritten returns b, which holds the events, without its first n bytes. What is
// around the events is copied, since b is reused; a big event is shared, unless most of
// it was sent: the rest would keep the whole in memory, and only the rest is counted.
func unwritten(b []byte, n int, events []*event) (rest net.Buffers) {
	copied := func(b []byte) {
		if n < len(b) {
			rest = append(rest, bytes.Clone(b[n:]))
		}
		n = max(0, n-len(b))
	}
	for _, e := range events {
		if len(e.json) < shareFrom {
			continue
		}
		i := bytes.Index(b, e.json)
		if i < 0 {
			break // this technique writes something else, and it would cost to look for all
		}
		copied(b[:i])
		if n < len(e.json)/2 {
			rest = append(rest, e.json[n:])
			n = 0
		} else {
			copied(b[i : i+len(e.json)])
		}
		b = b[i+len(e.json):]
	}
	copied(b)
	return rest
}

// The pool.

// add begins to serve a session.
func (p *writerPool) add(ses *session) {
	ses.fd = -1
	if s, ok := ses.conn.Conn.(*socket); ok {
		ses.fd = s.fd
		s.SetWriteBuffer(socketBuffer)
		ses.kernelTimeout = s.setUserTimeout(2 * max(p.server.heartbeat, writeTimeout))
	}
	p.mu.Lock()
	ses.index = len(p.sessions)
	if p.sessions = append(p.sessions, ses); len(p.sessions) == gcThreshold {
		go setGCPercent(25)
	}
	if !p.ticking {
		p.ticking = true
		p.tick()
	}
	p.mu.Unlock()
	ses.enqueue()
}

// remove ends what add began.
func (p *writerPool) remove(ses *session) {
	p.mu.Lock()
	defer p.mu.Unlock()
	last := p.sessions[len(p.sessions)-1]
	p.sessions[ses.index], last.index = last, ses.index
	p.sessions[len(p.sessions)-1] = nil
	if p.sessions = p.sessions[:len(p.sessions)-1]; len(p.sessions) == gcThreshold/2 {
		go setGCPercent(100)
	}
}

// setGCPercent sets how much garbage there may be, in percent of the memory in use,
// unless GOGC does.
func setGCPercent(percent int) {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(percent)
	}
}

// tick wakes the streams that are due a heartbeat, while there are any sessions. One walk
// now and then costs less than a timer for each.
func (p *writerPool) tick() {
	time.AfterFunc(p.server.heartbeat/15, func() {
		var due []*session
		p.mu.Lock()
		now := time.Now().UnixNano()
		for _, ses := range p.sessions {
			if ses.poll == nil && ses.due(now) && ses.claim() {
				due = append(due, ses)
			}
		}
		if p.ticking = len(p.sessions) > 0; p.ticking {
			p.tick()
		}
		p.mu.Unlock()
		p.enqueue(false, due...)
	})
}

// Waking.

// wakeRoom wakes the subscribers of a room. The last handful is served here, by the
// goroutine that publishes, if writers are not busy: that costs less than to wake one.
func (p *writerPool) wakeRoom(rm *room) {
	var array [batchSize]*session
	woken := array[:0]
	rm.mu.Lock()
	for _, s := range rm.subscriptions {
		ses, ok := s.subscriber.driver.(*session)
		if !ok {
			s.subscriber.wake()
		} else if ses.claim() {
			if woken = append(woken, ses); len(woken) == batchSize {
				p.enqueue(false, woken...)
				woken = woken[:0]
			}
		}
	}
	rm.mu.Unlock()
	if len(woken) > 0 {
		p.enqueue(true, woken...)
	}
}

// wakeAll has all sessions served, so they see that the relay stops. Connections that
// wait for a request end.
func (p *writerPool) wakeAll() {
	p.mu.Lock()
	all := slices.Clone(p.sessions) // to wake takes the lock
	p.mu.Unlock()
	for _, ses := range all {
		if ses.poll != nil {
			ses.gone.Store(true)
			ses.conn.SetReadDeadline(past)
		}
		ses.wake()
	}
}

// wake has the session served, now or once more.
func (ses *session) wake() {
	if ses.claim() {
		ses.enqueue()
	}
}

// claim reports whether the caller is to put the session into the queue.
func (ses *session) claim() bool {
	for {
		switch ses.state.Load() {
		case stateIdle:
			if ses.state.CompareAndSwap(stateIdle, stateQueued) {
				return true
			}
		case stateWriting:
			if ses.state.CompareAndSwap(stateWriting, stateDirty) {
				return false
			}
		default:
			return false
		}
	}
}

// enqueue has a writer serve the session.
func (ses *session) enqueue() {
	ses.state.Store(stateQueued)
	ses.pool.enqueue(false, ses)
}

// enqueue puts sessions whose state is stateQueued into the queue, and starts writers: one
// for each batch, while there are fewer than processors. If here, this goroutine may be
// one of them, for one batch.
func (p *writerPool) enqueue(here bool, sessions ...*session) {
	p.mu.Lock()
	if p.taken > 0 && p.taken >= len(p.queue)/2 {
		n := copy(p.queue, p.queue[p.taken:])
		clear(p.queue[n:])
		p.queue, p.taken = p.queue[:n], 0
	}
	p.queue = append(p.queue, sessions...)
	batches := (len(p.queue) - p.taken + batchSize - 1) / batchSize
	more := max(0, min(batches, runtime.GOMAXPROCS(0)-p.writers))
	p.writers += more
	p.mu.Unlock()
	if more == 0 {
		return
	}
	for range more - 1 {
		go p.run(math.MaxInt)
	}
	if here {
		p.run(1)
	} else {
		go p.run(math.MaxInt)
	}
}

// throttle holds a publisher up, for a tenth of a second at most, while the session that
// waits longest is a quarter of a history behind. Without it a few that publish as
// fast as they can would run away from a thousand that read.
func (p *writerPool) throttle() {
	r := p.server.relay
	for range 100 {
		p.mu.Lock()
		waiting := p.queue[p.taken:]
		behind := len(waiting) > 0 && waiting[0].sub.relay == r && r.lastID.Load()-waiting[0].sub.cursor > int64(r.maxEvents)/4
		p.mu.Unlock()
		if !behind {
			return
		}
		time.Sleep(time.Millisecond)
	}
}

// Writers.

// run is a writer: it serves the queue until that is empty, or so many batches of it. The
// goroutine that publishes serves one: sessions that are served may wake others without end.
func (p *writerPool) run(batches int) {
	sc := p.scratches.Get().(*scratch)
	defer p.scratches.Put(sc)
	var array [batchSize]*session
	for ; batches > 0; batches-- {
		p.mu.Lock()
		n := copy(array[:], p.queue[p.taken:])
		p.taken += n
		p.mu.Unlock()
		if n == 0 {
			break
		}
		now := time.Now().UnixNano()
		for _, ses := range array[:n] {
			ses.state.Store(stateWriting)
			ses.afterWrite(ses.writeDue(sc, now))
		}
		sc.count(nil, nil, 0, 0)
		if cap(sc.buf) > maxScratch { // it wrote a big page
			sc.buf = nil
		}
		if batches > 1 { // publishers get a turn: the more they publish meanwhile, the more goes out in one write
			runtime.Gosched()
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.taken < len(p.queue) {
		go p.run(math.MaxInt) // in the place of this one
		return
	}
	clear(p.queue)
	p.queue, p.taken = p.queue[:0], 0
	p.writers--
}

// writeDue writes what is due.
func (ses *session) writeDue(sc *scratch, now int64) (err error) {
	defer func() {
		if p := recover(); p != nil {
			slog.Error("a stream failed", "panic", p, "stack", string(debug.Stack()))
			err = errors.New("panic")
		}
	}()
	if ses.poll != nil {
		return ses.answerPoll(sc, now)
	}
	stopping := ses.server.relay.isStopping()
	if ses.ws != nil {
		stopping = stopping && !ses.ws.handling.Load() // asked before the replies are taken
		if err := ses.writeReplies(sc, now); err != nil {
			return err
		}
	}
	if ses.gone.Load() {
		return net.ErrClosed
	}
	if ses.ws != nil && ses.due(now) && now < ses.expiresAt && !stopping {
		if err := ses.ping(); err != nil {
			return err
		}
	}
	return ses.step(sc, now, stopping)
}

// afterWrite ends a writer's turn: the session is idle again, in the queue, left to who waits
// for its socket, or released.
func (ses *session) afterWrite(err error) {
	switch {
	case err == errAnswered:
		ses.finishAnswer()
	case err == errBlocked && (ses.ws != nil || ses.poll != nil): // whose goroutine does nothing but read
		ses.state.Store(stateBlocked)
		go ses.writePending()
	case err == errBlocked:
		ses.state.Store(stateBlocked)
		ses.conn.SetReadDeadline(past)
		if ses.gone.Load() {
			ses.releaseBlocked()
		}
	case err != nil:
		ses.release(err == io.EOF)
	case !ses.state.CompareAndSwap(stateWriting, stateIdle):
		ses.enqueue()
	}
}

// Full sockets, and the end.

// watch waits for the client to leave or, interrupted by a deadline, for its socket to
// take what is pending. A client has no reason to send anything; what it sends is
// discarded.
func (ses *session) watch() {
	var b [64]byte
	for received := 0; received <= maxDiscarded; {
		n, err := ses.conn.Read(b[:])
		received += n
		if errors.Is(err, os.ErrDeadlineExceeded) {
			ses.conn.SetReadDeadline(time.Time{}) // before state is read, or the next interruption would be undone
			err = nil
		}
		if ses.state.Load() == stateBlocked {
			ses.writePending()
		} else if err != nil {
			break
		}
	}
	ses.abort()
	ses.releaseBlocked()
}

// writePending waits for a full socket to take the rest. Each time it takes something it
// gets a new writeTimeout.
func (ses *session) writePending() {
	for len(ses.pending) > 0 {
		ses.conn.SetWriteDeadline(time.Now().Add(writeTimeout))
		n, err := ses.conn.Write(ses.pending[0])
		ses.quota.unsent(-n)
		if ses.pending[0] = bytes.Clone(ses.pending[0][n:]); len(ses.pending[0]) == 0 { // nothing of it, or all, unless the time was up
			ses.pending = ses.pending[1:]
		}
		if err != nil && (n == 0 || ses.gone.Load()) {
			if !ses.gone.Load() && errors.Is(err, os.ErrDeadlineExceeded) {
				ses.pool.dropped()
			}
			ses.release(false)
			return
		}
	}
	ses.pending = nil
	ses.conn.SetWriteDeadline(time.Time{})
	if ses.poll != nil {
		ses.finishAnswer()
		return
	}
	ses.enqueue()
}

// abort has the session released, and ends all waiting for its socket. The socket is
// closed in the session's turn, or after its end, never beside it: its number would
// be the next connection's, and a write could go there.
func (ses *session) abort() {
	ses.gone.Store(true)
	ses.conn.SetDeadline(past)
	ses.wake()
	if ses.state.Load() == stateClosed {
		ses.conn.Close()
	}
}

// releaseBlocked releases a session whose socket is full when nobody watches it any more.
func (ses *session) releaseBlocked() {
	if ses.state.CompareAndSwap(stateBlocked, stateWriting) {
		ses.release(false)
	}
}

// release gives up all that the session holds. After a bye the client is to close first.
func (ses *session) release(byeSent bool) {
	ses.state.Store(stateClosed)
	for _, b := range ses.pending {
		ses.quota.unsent(-len(b))
	}
	ses.pool.remove(ses)
	ses.close()
	if ses.poll != nil {
		ses.poll.answered <- struct{}{}
	}
	if byeSent {
		closeGently(ses.conn)
	} else {
		ses.conn.Close()
	}
}
