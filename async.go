// Streams without a goroutine each. For every connection net/http keeps two buffers
// of 4 KB and a goroutine with a stack of 8 KB, or two while a request is served: some
// 26 KB, which is right for requests, and too much for ten thousand clients that are
// sent something now and then. This file takes a stream's connection over with
// http.Hijacker and keeps what a silent stream needs: the socket, a subscriber, and a
// goroutine that waits to read, which is how one notices that a client left.
//
// A few writers serve all these streams, since waking a goroutine for each reader of
// each message costs more than the write. Writers never wait: a full socket is left
// to the goroutine that reads (for a WebSocket, to one of its own) until it has room
// again, or its time is up.
//
// Without this file every stream is driven by its own request, in (*stream).loop. That
// is also how HTTP/2 and HTTP/1.0 are served, which have no connection of their own or
// no chunks.

package main

import (
	"bufio"
	"bytes"
	"crypto/sha1"
	"encoding/base64"
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
	"unicode/utf8"

	"github.com/coder/websocket"
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

	// Bytes of replies that the client of a WebSocket may leave unread, beside what its
	// socket holds.
	maxQueuedReplies = 16 << 10

	// With so many streams, memory is worth more than time. To deliver an event
	// allocates nothing, so collecting garbage more often costs little.
	gcThreshold = 100

	maxScratch = 256 << 10 // bytes that a writer keeps of its buffer

	// How many streams are queued, or taken from the queue, at once.
	wakeBatchSize = 32

	// Every so many heartbeats a WebSocket is sent a ping, whose pong costs more than the
	// heartbeat. Where the kernel asks already, and no proxy is in between, there are few.
	pingEvery  = 3
	pingRarely = 12
)

// errBlocked says that a socket took only a part, and the rest is kept.
var errBlocked = errors.New("the socket is full")

// A session is a stream whose connection was taken over.
type session struct {
	state atomic.Int32
	gone  atomic.Bool // the client left
	index int         // in pool.sessions
	*stream
	pool          *writerPool
	conn          *limitedConn
	before        []byte      // what the next write begins with: the head of the answer, or a ping
	pending       net.Buffers // what a full socket did not take
	kernelTimeout bool        // the kernel ends the connection when the client acknowledges nothing
	poll          *heldPoll   // of a long-poll
	ws            *webSocket  // of a WebSocket
}

// A webSocket is what a session keeps of a WebSocket.
type webSocket struct {
	proxied      bool // there is, or may be, a proxy in between
	heartbeats   int
	awaitingPong atomic.Bool
	handling     atomic.Bool // a message is being answered

	mu      sync.Mutex // guards what follows
	replies []byte     // frames that are to be sent
	ending  error      // if the last of them closes the WebSocket: io.EOF, or net.ErrClosed if the client has closed it; nothing may follow (RFC 6455, 5.5.1)
}

// The states of a session. What is not atomic is touched only by what serves it: the
// writer that took it from the queue, or the goroutine that waits for its full socket.
const (
	stateOut     = iota // not for writers: it is new, or a long-poll that has its answer
	stateIdle           // there is nothing to write
	stateQueued         // a writer will come
	stateWriting        // a writer serves it
	stateDirty          // the same, and there is more to do
	stateBlocked        // its socket is full; no writer comes
	stateClosed
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
	if isWebSocket {
		if err := checkUpgrade(w, r); err != nil {
			p.server.release(st.quota, st.technique)
			return true, err
		}
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

// watch waits for the client to leave or, interrupted by a deadline, for its socket to
// take what is pending. A client has no reason to send anything; what it sends is
// discarded.
func (ses *session) watch() {
	var b [64]byte
	for received := 0; ; {
		n, err := ses.conn.Read(b[:])
		received += n
		interrupted := errors.Is(err, os.ErrDeadlineExceeded)
		if interrupted { // before state is read, or the next interruption would be undone
			ses.conn.SetReadDeadline(time.Time{})
		}
		if ses.state.Load() == stateBlocked {
			ses.writePending()
		} else if err != nil && !interrupted || received > maxDiscarded {
			ses.abort()
			ses.releaseBlocked()
			return
		}
	}
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

// write gives the socket what it takes, and keeps the rest.
func (ses *session) write(b []byte, events []*event) error {
	if ses.before != nil {
		b = append(ses.before, b...)
		ses.before = nil
	}
	n, err := ses.conn.socket().tryWrite(b)
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
	if s := ses.conn.socket(); s != nil {
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
		var batch wakeBatch
		now := time.Now().UnixNano()
		for _, ses := range p.all() {
			if ses.poll == nil && ses.due(now) {
				batch.add(ses)
			}
		}
		batch.flush()
		p.mu.Lock()
		defer p.mu.Unlock()
		if p.ticking = len(p.sessions) > 0; p.ticking {
			p.tick()
		}
	})
}

// all returns the sessions. To wake one takes the pool's lock.
func (p *writerPool) all() []*session {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.sessions)
}

// wakeRoom wakes the subscribers of a room. The last handful is served here, by the
// goroutine that publishes: in a small room that costs less than to wake a writer.
func (p *writerPool) wakeRoom(rm *room) {
	var batch wakeBatch
	rm.mu.Lock()
	for _, s := range rm.subscriptions {
		if ses, ok := s.subscriber.driver.(*session); ok {
			batch.add(ses)
		} else {
			s.subscriber.wake()
		}
	}
	rm.mu.Unlock()
	if batch.n > 0 && p.push(batch.sessions[:batch.n]...) {
		p.run(1)
	}
}

// wakeAll has all sessions served, so they see that the relay stops. Connections that
// wait for a request end.
func (p *writerPool) wakeAll() {
	var batch wakeBatch
	for _, ses := range p.all() {
		if ses.poll != nil {
			ses.gone.Store(true)
			ses.conn.SetReadDeadline(past)
		}
		batch.add(ses)
	}
	batch.flush()
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

// A wakeBatch carries a few sessions to the queue at once, so that a publisher that wakes ten
// thousand and the writers do not wait for each other at each.
type wakeBatch struct {
	sessions [wakeBatchSize]*session
	n        int
}

func (b *wakeBatch) add(ses *session) {
	if !ses.claim() {
		return
	}
	b.sessions[b.n] = ses
	if b.n++; b.n == len(b.sessions) {
		b.flush()
	}
}

func (b *wakeBatch) flush() {
	if b.n > 0 {
		b.sessions[0].pool.enqueue(b.sessions[:b.n]...)
		b.n = 0
	}
}

// enqueue has a writer serve the session.
func (ses *session) enqueue() {
	ses.state.Store(stateQueued)
	ses.pool.enqueue(ses)
}

// enqueue has writers serve sessions whose state is stateQueued.
func (p *writerPool) enqueue(sessions ...*session) {
	if p.push(sessions...) {
		go p.run(math.MaxInt)
	}
}

// push puts sessions into the queue. It reports whether one more writer may serve it, which
// is then the caller's to run.
func (p *writerPool) push(sessions ...*session) (mayRun bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.taken > 0 && p.taken >= len(p.queue)/2 {
		n := copy(p.queue, p.queue[p.taken:])
		clear(p.queue[n:])
		p.queue, p.taken = p.queue[:n], 0
	}
	p.queue = append(p.queue, sessions...)
	if mayRun = p.writers < runtime.GOMAXPROCS(0); mayRun {
		p.writers++
	}
	return mayRun
}

// take moves sessions from the queue to batch, as many as it has room for.
func (p *writerPool) take(batch []*session) []*session {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := copy(batch, p.queue[p.taken:])
	p.taken += n
	return batch[:n]
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

// run is a writer: it serves so many batches of the queue, or until there is nothing. Of
// the goroutine that publishes it is one batch: who is woken here may wake others.
func (p *writerPool) run(batches int) {
	sc := p.scratches.Get().(*scratch)
	defer p.scratches.Put(sc)
	var array [wakeBatchSize]*session
	for ; batches > 0; batches-- {
		batch := p.take(array[:])
		if len(batch) == 0 {
			break
		}
		now := time.Now().UnixNano()
		for _, ses := range batch {
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

// afterWrite ends a turn.
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

// releaseBlocked releases a session whose socket is full when nobody watches it any more.
func (ses *session) releaseBlocked() {
	if ses.state.CompareAndSwap(stateBlocked, stateWriting) {
		ses.release(false)
	}
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

// release gives up all that the session holds. After a bye the client is to close.
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
	if !byeSent {
		ses.conn.Close()
		return
	}
	closeGently(ses.conn)
}

// WebSocket (RFC 6455). The core has a library for it, which keeps 5 KB for each
// connection, and reads a message without asking whether there is room for it. Here a
// goroutine waits for a frame with a buffer of 128 bytes.

// beginWebSocket begins a stream over a WebSocket: the pool writes, and a goroutine reads.
func (ses *session) beginWebSocket(h http.Header, r *http.Request, q *request) {
	accept := sha1.Sum([]byte(strings.TrimSpace(r.Header.Get("Sec-WebSocket-Key")) + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"))
	h.Set("Upgrade", "websocket")
	h.Set("Connection", "Upgrade")
	h.Set("Sec-WebSocket-Accept", base64.StdEncoding.EncodeToString(accept[:]))
	if protocol := acceptOptions(r).Subprotocols[0]; protocol != "" {
		h.Set("Sec-WebSocket-Protocol", protocol)
	}
	ses.before = []byte(answerHead("101 Switching Protocols", h) + "\r\n")
	ses.headroom, ses.send = maxFrameHead, ses.sendMessage
	ses.ws = &webSocket{proxied: ses.pool.trustProxy || r.Header["X-Forwarded-For"] != nil || r.Header["Via"] != nil || r.Header["Forwarded"] != nil}
	author := ses.author(q)
	ses.pool.add(ses)
	go ses.readMessages(bufio.NewReaderSize(ses.conn, 128), author)
}

// checkUpgrade says what a request for a WebSocket lacks.
func checkUpgrade(w http.ResponseWriter, r *http.Request) error {
	connection := strings.ToLower(strings.Join(r.Header.Values("Connection"), ","))
	if r.Method != http.MethodGet || !r.ProtoAtLeast(1, 1) || !strings.Contains(connection, "upgrade") {
		return upgradeRequired(w, r)
	}
	keys := r.Header.Values("Sec-WebSocket-Key")
	if key, err := base64.StdEncoding.DecodeString(strings.Join(keys, "")); err != nil || len(key) != 16 || len(keys) != 1 || r.Header.Get("Sec-WebSocket-Version") != "13" {
		w.Header().Set("Sec-WebSocket-Version", "13")
		return badRequest("a WebSocket is asked for with Sec-WebSocket-Version: 13, and 16 bytes in base64 as Sec-WebSocket-Key")
	}
	return nil
}

// maxFrameHead is the size of the head of a frame of eight bytes of length.
const maxFrameHead = 10

// textFrame writes the head of a text frame (RFC 6455, 5.2) into the last of the
// maxFrameHead free bytes at the front of b, and returns the frame: the length in one
// byte, or after 126 in two, or after 127 in eight.
func textFrame(b []byte) []byte {
	switch size := len(b) - maxFrameHead; {
	case size < 126:
		b = b[maxFrameHead-2:]
		b[1] = byte(size)
	case size < 1<<16:
		b = b[maxFrameHead-4:]
		b[1] = 126
		binary.BigEndian.PutUint16(b[2:], uint16(size))
	default:
		b[1] = 127
		binary.BigEndian.PutUint64(b[2:], uint64(size))
	}
	b[0] = 0x81
	return b
}

// appendClose appends a close frame (5.5.1).
func appendClose(b []byte, code websocket.StatusCode, reason string) []byte {
	b = append(b, 0x88, byte(2+len(reason)))
	return append(binary.BigEndian.AppendUint16(b, uint16(code)), reason...)
}

// sendMessage writes b, whose first maxFrameHead bytes are free, as a message.
func (ses *session) sendMessage(sc *scratch, b []byte, events []*event) error {
	size := len(b) - maxFrameHead
	if size > 0 || !ses.closed {
		b = textFrame(b)
	} else {
		b = b[:0] // a bye that this client does not see
	}
	sc.count(ses.technique, nil, len(b)-size+len(ses.before), 0)
	if ses.closed {
		code, reason := ses.closeCode()
		b = appendClose(b, code, reason)
	}
	return ses.write(b, events)
}

// ping asks the client of a WebSocket now and then whether it is still there. A client that
// has not answered the last ping is gone.
func (ses *session) ping() error {
	ses.ws.heartbeats++
	due := ses.ws.heartbeats%pingEvery == 1
	if ses.kernelTimeout && !ses.ws.proxied {
		due = ses.ws.heartbeats%pingRarely == 0
	}
	if !due {
		return nil
	}
	if ses.ws.awaitingPong.Swap(true) {
		return os.ErrDeadlineExceeded
	}
	ses.before = pingFrame[:] // the heartbeat, in one write
	if ses.enc.heartbeat == "" {
		return ses.write(nil, nil)
	}
	return nil
}

var pingFrame = [2]byte{0x80 | opPing, 0}

// The opcodes of frames (5.2).
const (
	opContinuation = 0
	opClose        = 8
	opPing         = 9
	opPong         = 10
)

// maxFreeMessage is the size of a message, in bytes, that is on no budget.
const maxFreeMessage = 1 << 10

// A message is what has arrived of it.
type message struct {
	kind    websocket.MessageType // 0 before its first frame
	data    []byte
	whole   bool
	began   time.Time
	receipt *allotment // for the data of a message that is longer than maxFreeMessage, or nil
}

// Why a WebSocket is closed.
var (
	errFrame        = websocket.CloseError{Code: websocket.StatusProtocolError, Reason: "no such frame may come here"}
	errLongMessage  = websocket.CloseError{Code: websocket.StatusMessageTooBig, Reason: "the message is too big"}
	errLateMessage  = websocket.CloseError{Code: websocket.StatusPolicyViolation, Reason: "the message did not arrive in time"}
	errNoReceipt    = websocket.CloseError{Code: websocket.StatusTryAgainLater, Reason: "the relay receives as much at once as it may; try again"}
	errClientCloses = errors.New("the client closes")
)

// readMessages takes what the client sends, until it closes.
func (ses *session) readMessages(in *bufio.Reader, a *author) {
	var m message
	defer func() {
		if p := recover(); p != nil { // as net/http does for a request
			slog.Error("a WebSocket failed", "panic", p, "stack", string(debug.Stack()))
			ses.abort()
		}
		m.receipt.free()
	}()
	for {
		_, err := in.Peek(2) // here most of them are
		if err == nil {
			err = ses.readFrame(in, &m)
		}
		if errors.Is(err, os.ErrDeadlineExceeded) && !ses.gone.Load() {
			err = errLateMessage
		}
		if refusal, ok := err.(websocket.CloseError); ok {
			ses.enqueueFrames(appendClose(nil, refusal.Code, refusal.Reason), io.EOF)
			m.receipt.free()
			m = message{}
			ses.conn.SetReadDeadline(time.Time{})
			io.Copy(io.Discard, in) // until release closes: the client may still send, and is to read why it was refused
			return
		}
		if err != nil {
			if err != errClientCloses {
				ses.abort()
			}
			return
		}
		if m.whole {
			ses.take(a, m.kind, m.data)
		}
		if m.whole || m.kind == 0 { // the message, or a control frame between two
			m.receipt.free()
			m = message{}
			ses.conn.SetReadDeadline(time.Time{})
		}
	}
}

// take handles a message.
func (ses *session) take(a *author, kind websocket.MessageType, data []byte) {
	ses.pool.received(ses.technique, 0, len(data)+6) // with the shortest head and a mask
	ses.ws.handling.Store(true)                      // what is published is answered, even if the relay stops meanwhile
	if reply := ses.server.handleMessage(a, kind, data); reply != nil {
		ses.enqueueFrames(textFrame(append(make([]byte, maxFrameHead), reply.event().json...)), nil)
	}
	if ses.ws.handling.Store(false); ses.server.relay.isStopping() {
		ses.wake()
	}
}

// readFrame reads a frame (5.2) whose first two bytes are there.
func (ses *session) readFrame(in *bufio.Reader, m *message) error {
	if m.began.IsZero() {
		m.began = time.Now()
		ses.conn.SetReadDeadline(m.began.Add(requestTimeout))
	}
	head, _ := in.Peek(2)
	opcode, last, masked := head[0]&15, head[0]&0x80 != 0, head[1]&0x80 != 0
	size, n := uint64(head[1]&127), 2
	switch {
	case head[0]&0x70 != 0, !masked:
		return errFrame
	case opcode >= opClose && (opcode > opPong || !last || size > 125):
		return errFrame
	case opcode < opClose && (opcode > byte(websocket.MessageBinary) || (opcode == opContinuation) == (m.kind == 0)):
		return errFrame
	case size == 126:
		n = 4
	case size == 127:
		n = 10
	}
	head, err := in.Peek(n + 4)
	if err != nil {
		return err
	}
	switch n {
	case 4:
		size = uint64(binary.BigEndian.Uint16(head[2:]))
	case 10:
		size = binary.BigEndian.Uint64(head[2:])
	}
	mask := [4]byte(head[n:])
	in.Discard(n + 4)
	if opcode >= opClose {
		payload := make([]byte, size)
		if err := readMasked(in, payload, mask); err != nil {
			return err
		}
		return ses.control(opcode, payload)
	}
	if size >= 1<<63 {
		return errFrame
	}
	if size > uint64(ses.server.maxBody)-uint64(len(m.data)) {
		return errLongMessage
	}
	if err := ses.reserve(m, int(size)); err != nil {
		return err
	}
	from := len(m.data)
	m.data = slices.Grow(m.data, int(size))[:from+int(size)]
	if m.whole = last; m.kind == 0 {
		m.kind = websocket.MessageType(opcode)
	}
	return readMasked(in, m.data[from:], mask)
}

func readMasked(in io.Reader, b []byte, mask [4]byte) error {
	_, err := io.ReadFull(in, b)
	for i := range b {
		b[i] ^= mask[i&3]
	}
	return err
}

// reserve reserves memory for so many more bytes of a message: twice, since it grows by
// copying, and is then parsed.
func (ses *session) reserve(m *message, size int) error {
	if len(m.data)+size <= maxFreeMessage {
		return nil
	}
	if m.receipt == nil {
		m.receipt = ses.pool.receipts.open(func() { ses.enqueueFrames(appendClose(nil, errNoReceipt.Code, errNoReceipt.Reason), io.EOF) })
		size += len(m.data)
	}
	if m.receipt.grow(int64(2*size)) != nil {
		ses.server.refused("memory")
		return errNoReceipt
	}
	return nil
}

// control answers a control frame (5.5).
func (ses *session) control(opcode byte, payload []byte) error {
	switch opcode {
	case opPing:
		ses.enqueueFrames(append([]byte{0x80 | opPong, byte(len(payload))}, payload...), nil)
	case opPong:
		ses.ws.awaitingPong.Store(false)
	case opClose:
		if !validClose(payload) {
			return errFrame
		}
		ses.enqueueFrames(append([]byte{0x80 | opClose, byte(len(payload))}, payload...), net.ErrClosed)
		return errClientCloses
	}
	return nil
}

// validClose reports whether a close frame says why, as it may (7.4), or nothing.
func validClose(payload []byte) bool {
	if len(payload) < 2 {
		return len(payload) == 0
	}
	code := binary.BigEndian.Uint16(payload)
	return utf8.Valid(payload[2:]) && (code >= 1000 && code <= 1003 || code >= 1007 && code <= 1014 || code >= 3000 && code <= 4999)
}

// writeReplies writes the frames that answer what the client has sent. A client may send at
// once, but hello is first.
func (ses *session) writeReplies(sc *scratch, now int64) error {
	if err := ses.begin(sc, now); err != nil {
		return err
	}
	if ses.before != nil { // there is no hello for this client
		if err := ses.write(nil, nil); err != nil {
			return err
		}
	}
	ws := ses.ws
	ws.mu.Lock()
	replies, ending := ws.replies, ws.ending
	ws.replies = nil
	ws.mu.Unlock()
	if len(replies) > 0 && !ses.closed { // after a second close frame Chromium reports that the connection failed
		if err := ses.write(replies, nil); err != nil {
			return err
		}
	}
	return ending
}

// enqueueFrames has whole frames written by the pool, and then perhaps the session ended. A
// client that leaves too many unread is dropped.
func (ses *session) enqueueFrames(frames []byte, ending error) {
	ws := ses.ws
	ws.mu.Lock()
	full := len(ws.replies)+len(frames) > maxQueuedReplies
	if !full && ws.ending == nil {
		ws.replies = append(ws.replies, frames...)
		ws.ending = ending
	}
	ws.mu.Unlock()
	if full {
		ses.abort()
		return
	}
	ses.wake()
}
