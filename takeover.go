// Connections taken over. For every connection net/http keeps two buffers of
// 4 KB and a goroutine with a stack of 8 KB, or two while a request is served:
// 26 KB, which is right for requests and too much for ten thousand clients that
// are told something now and then. So where a stream has a connection of its own
// and chunks (HTTP/1.1), it takes that over with http.Hijacker and keeps what a
// silent stream needs: the socket, a place in the log, and a goroutine waiting to
// read, which is how one notices that a client left. HTTP/2 and 1.0 go the
// ordinary way, in follow.
//
// Nor has such a stream a goroutine to write. To wake one for every reader of
// every message costs more than the write; instead a few writers serve whoever is
// behind. They never wait: a socket that is full is left to the goroutine that
// reads (a WebSocket's, to one of its own) until it has room again, or its time
// is up.
//
// What net/http did is done here: the head, chunks, deadlines, panics, stopping.

package main

import (
	"bytes"
	"cmp"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// errFull says that a socket took only a part, and the rest is kept.
var errBlocked = errors.New("the socket is full")

// lingerFor is how long a stream that has ended waits for its client to close
// first; closing on what it still says would take the end from it.
const lingerTimeout = time.Second

// sendBuffer is how many bytes the kernel may keep for a client that is slow to
// take them. Left to itself, Linux would keep megabytes.
const socketBuffer = 32 << 10

// A takeover is what a stream over a connection that was taken over has more
// than one that is driven by its own request.
type hijacked struct {
	head          []byte      // sent before everything, once
	pending       net.Buffers // what a full socket did not take
	conn          net.Conn
	kernelTimeout bool // the kernel ends it when the client acknowledges nothing

	// Of a WebSocket.
	proxied      bool  // a proxy is in between, or may be
	tokenExpires int64 // when its token expires, in Unix nanoseconds
	heartbeats   int
	awaitingPong atomic.Bool // it did not answer the last ping yet
	mu           sync.Mutex  // guards answers and parting
	replies      []byte      // frames that the library, or hear, has to send
	closing      bool        // the last of them closes the socket; nothing may follow (RFC 6455, 5.5.1)
	handling     atomic.Bool // hear is at it, and may owe an answer
	replyDue     bool        // the same, as this turn began
}

// Whose turn it is. Only who serves a stream, the writer that took it from the
// queue or the goroutine that waits for its full socket, touches what is not atomic.
const (
	stateNew = iota // its connection is not taken over yet
	stateIdle
	stateQueued  // a writer will come
	stateWriting // somebody serves it
	stateDirty   // the same, and there is more to do
	stateBlocked // its socket is; drain has it, and no writer comes
	stateClosed
)

// A pump is the writers, and the streams they serve. Writers live while there
// is something to write, so a pump needs neither start nor stop.
type writerPool struct {
	mu       sync.Mutex // guards what follows
	queue    []*session
	head     int // so many in front of the queue were taken
	writers  int
	sessions []*session
	ticking  bool // a tick is due
}

// hijack serves the stream over the request's own connection. The handler is
// done then.
func (st *session) hijack(w http.ResponseWriter) error {
	conn, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		st.close()
		return err
	}
	h := w.Header()
	h.Set("Date", time.Now().UTC().Format(http.TimeFormat))
	h.Set("Transfer-Encoding", "chunked")
	h.Set("Connection", "close")
	var head bytes.Buffer
	head.WriteString("HTTP/1.1 200 OK\r\n")
	h.Write(&head)
	head.WriteString("\r\n")

	st.conn = conn
	st.head = head.Bytes()
	st.headroom = chunkHeadSize
	st.send = (*session).sendChunk
	st.srv.pool.add(st)
	go st.watchRead()
	return nil
}

// watchRead waits for the client to leave, or, roused by a deadline, for its socket
// to take the rest. What the client says, which it has no reason to, is lost;
// who says more than a request's head is given up.
func (st *session) watchRead() {
	var b [64]byte
	for said := 0; ; {
		n, err := st.conn.Read(b[:])
		said += n
		roused := errors.Is(err, os.ErrDeadlineExceeded)
		if roused { // before the look at turn, lest the next rousing is undone
			st.conn.SetReadDeadline(time.Time{})
		}
		if st.state.Load() == stateBlocked {
			st.writePending()
		} else if err != nil && !roused || said > maxHeader {
			st.abort()
			st.releaseBlocked()
			return
		}
	}
}

var longAgo = time.Unix(1, 0)

// abort has the stream finished, and nobody wait for its socket any more. The
// socket is closed in the stream's turn, or when that is over, never beside it:
// its number would be the next connection's, and a write could go there.
func (st *session) abort() {
	st.gone.Store(true)
	st.conn.SetDeadline(longAgo)
	st.closeWhenSent()
}

// closeWhenSent has the stream finished when what is due was sent.
func (st *session) closeWhenSent() {
	st.gone.Store(true)
	st.wake()
	if st.state.Load() == stateClosed {
		st.conn.Close()
	}
}

// chunkHead is the size of a chunk in hexadecimal and a line end
// (RFC 9112, 7.1); leading zeros are allowed, and let it be filled in last.
const chunkHeadSize = len("00000000\r\n")

// sendChunk writes b, whose first chunkHead bytes are free, as a chunk.
func (st *session) sendChunk(d *scratch, b []byte) error {
	const hex = "0123456789abcdef"
	copy(b[chunkHeadSize-2:], "\r\n")
	for i, n := chunkHeadSize-3, len(b)-chunkHeadSize; i >= 0; i, n = i-1, n>>4 {
		b[i] = hex[n&15]
	}
	if b = append(b, "\r\n"...); len(b) == chunkHeadSize+len("\r\n") {
		b = b[:0] // an empty chunk would be the end
	}
	if st.closed {
		b = append(b, "0\r\n\r\n"...)
	}
	if st.head != nil {
		d.count.out += int64(len(st.head))
		b = append(st.head, b...)
		st.head = nil
	}
	return st.write(d, b)
}

// write gives the socket what it takes, and keeps the rest.
func (st *session) write(d *scratch, b []byte) error {
	n := 0
	if st.fd >= 0 {
		var err error
		if n, err = tryWrite(st.fd, b); err != nil {
			return err
		}
	}
	if n < len(b) {
		st.pending = unwritten(b, n, d.encoded)
		return cmp.Or(st.srv.reserveUnsent(len(b)-n), errBlocked)
	}
	return nil
}

// reserveUnsent counts bytes that a client has not taken yet. It returns errGone if there
// is no room to wait for all who are slow.
func (s *server) reserveUnsent(n int) error {
	if s.unsentBytes.Add(int64(n)) > int64(s.relay.maxBytes) {
		s.stats.dropped.Add(1)
		return errClientGone
	}
	return nil
}

// worthSharing is the size in bytes from which an event is kept once for all who
// are slow to take it, and not copied for each.
const shareFrom = 512

// unwritten is b, which holds the events framed, without its first n bytes. The
// frames are copied, for b is needed again; of big events there is one for all.
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
		if b = b[i+len(e.json):]; n < len(e.json) {
			rest = append(rest, e.json[n:])
		}
		n = max(0, n-len(e.json))
	}
	copied(b)
	return rest
}

// add begins to serve a stream.
func (p *writerPool) add(st *session) {
	if c, ok := st.conn.(interface{ SetWriteBuffer(int) error }); ok {
		c.SetWriteBuffer(socketBuffer)
	}
	if st.fd = fdOf(st.conn); st.fd >= 0 {
		st.kernelTimeout = setUserTimeout(st.fd, 2*max(st.srv.beat, writeTimeout))
	}
	p.mu.Lock()
	st.index = len(p.sessions)
	if p.sessions = append(p.sessions, st); len(p.sessions) == gcThreshold {
		go setGCPercent(25)
	}
	if !p.ticking {
		p.ticking = true
		p.tick(st.srv)
	}
	st.state.Store(stateQueued)
	p.pushLocked(st)
	p.mu.Unlock()
}

// many is how many streams make memory worth more than time: to deliver an
// event allocates nothing, so to collect garbage more often then costs little.
const gcThreshold = 100

// setGCPercent sets how much garbage there may be, in percent of what is in use,
// unless GOGC does.
func setGCPercent(percent int) {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(percent)
	}
}

// tick has the streams served that are due a heartbeat, while there are any.
// One walk now and then costs less than a timer for each.
func (p *writerPool) tick(s *server) {
	time.AfterFunc(s.beat/15, func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		now := time.Now().UnixNano()
		for _, st := range p.sessions {
			if st.due(now) && st.state.CompareAndSwap(stateIdle, stateQueued) {
				p.pushLocked(st)
			}
		}
		if p.ticking = len(p.sessions) > 0; p.ticking {
			p.tick(s)
		}
	})
}

// wakeAll has all streams served, to tell them that the relay stops.
func (p *writerPool) wakeAll() {
	p.mu.Lock()
	all := slices.Clone(p.sessions) // a hand takes the lock
	p.mu.Unlock()
	var h wakeBatch
	for _, st := range all {
		st.wakeIn(&h)
	}
	h.flush()
}

// wake has the stream served, now or once more.
func (st *session) wake() {
	var h wakeBatch
	st.wakeIn(&h)
	h.flush()
}

// wakeIn is wake when the hand is emptied.
func (st *session) wakeIn(h *wakeBatch) {
	for {
		switch st.state.Load() {
		case stateIdle:
			if st.state.CompareAndSwap(stateIdle, stateQueued) {
				h.add(st)
				return
			}
		case stateWriting:
			if st.state.CompareAndSwap(stateWriting, stateDirty) {
				return
			}
		default:
			return
		}
	}
}

// A hand carries a few streams to the queue at once, lest who wakes ten
// thousand and who writes to them wait for each other at each.
type wakeBatch struct {
	streams [wakeBatchSize]*session
	n       int
}

// handful is how many streams are queued, or taken from the queue, at once.
const wakeBatchSize = 32

func (h *wakeBatch) add(st *session) {
	h.streams[h.n] = st
	if h.n++; h.n == len(h.streams) {
		h.flush()
	}
}

func (h *wakeBatch) flush() {
	if h.n > 0 {
		h.streams[0].srv.pool.enqueue(h.streams[:h.n]...)
		h.n = 0
	}
}

// enqueue puts streams whose turn is queued in the queue.
func (p *writerPool) enqueue(streams ...*session) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.pushLocked(streams...)
}

// pushLocked is enqueue for a caller who holds p.mu.
func (p *writerPool) pushLocked(streams ...*session) {
	if p.head > 0 && p.head >= len(p.queue)/2 {
		n := copy(p.queue, p.queue[p.head:])
		clear(p.queue[n:])
		p.queue, p.head = p.queue[:n], 0
	}
	p.queue = append(p.queue, streams...)
	if p.writers < runtime.GOMAXPROCS(0) {
		p.writers++
		go p.run()
	}
}

// throttle holds a publisher up, for a tenth of a second at most, while the stream
// that waits longest is a quarter of a history behind. Without it a few that
// publish as fast as they can would run away from a thousand who read.
func (s *server) throttle() {
	for range 100 {
		s.pool.mu.Lock()
		waiting := s.pool.queue[s.pool.head:]
		ahead := len(waiting) > 0 && s.relay.lastID.Load()-waiting[0].sub.cursor > int64(s.relay.maxEvents)/4
		s.pool.mu.Unlock()
		if !ahead {
			return
		}
		time.Sleep(time.Millisecond)
	}
}

// run is a writer: it serves what is in the queue until there is nothing.
func (p *writerPool) run() {
	d := scratches.Get().(*scratch)
	defer scratches.Put(d)
	var few [wakeBatchSize]*session
	for {
		p.mu.Lock()
		batch := few[:copy(few[:], p.queue[p.head:])]
		p.head += len(batch)
		if len(batch) == 0 {
			clear(p.queue)
			p.queue, p.head = p.queue[:0], 0
			p.writers--
		}
		p.mu.Unlock()
		if len(batch) == 0 {
			return
		}
		now := time.Now().UnixNano()
		for _, st := range batch {
			st.state.Store(stateWriting)
			st.afterWrite(st.writeDue(d, now))
		}
		d.count.flush()
		clear(batch)
	}
}

// writeDue writes what is due.
func (st *session) writeDue(d *scratch, now int64) (err error) {
	defer func() {
		if p := recover(); p != nil {
			slog.Error("a stream failed", "panic", p, "stack", string(debug.Stack()))
			err = errors.New("panic")
		}
	}()
	if st.ws {
		st.replyDue = st.handling.Load() // asked before the answers are taken
		st.mu.Lock()
		answers, parting := st.replies, st.closing
		st.replies = nil
		st.mu.Unlock()
		if len(answers) > 0 && !st.closed { // to a second goodbye Chromium says the connection failed
			if err := st.write(d, answers); err != nil {
				return err
			}
		}
		if parting {
			return net.ErrClosed
		}
	}
	if st.gone.Load() {
		return net.ErrClosed
	}
	return st.step(d, now)
}

// afterWrite ends a turn.
func (st *session) afterWrite(err error) {
	switch {
	case err == errBlocked && st.ws: // whose goroutine reads in the library
		st.state.Store(stateBlocked)
		go st.writePending()
	case err == errBlocked:
		st.state.Store(stateBlocked)
		st.conn.SetReadDeadline(longAgo)
		if st.gone.Load() {
			st.releaseBlocked()
		}
	case err != nil:
		st.release(err == io.EOF)
	case !st.state.CompareAndSwap(stateWriting, stateIdle):
		st.requeue()
	}
}

func (st *session) requeue() {
	st.state.Store(stateQueued)
	st.srv.pool.enqueue(st)
}

// releaseBlocked finishes a stream whose socket is full when nobody watches any more.
func (st *session) releaseBlocked() {
	if st.state.CompareAndSwap(stateBlocked, stateWriting) {
		st.release(false)
	}
}

// writePending waits for a full socket to take the rest. Each time it takes something
// it is given writeTimeout anew.
func (st *session) writePending() {
	for len(st.pending) > 0 {
		st.conn.SetWriteDeadline(time.Now().Add(writeTimeout))
		n, err := st.conn.Write(st.pending[0])
		st.srv.unsentBytes.Add(-int64(n))
		if st.pending[0] = st.pending[0][n:]; len(st.pending[0]) == 0 {
			st.pending = st.pending[1:]
		}
		if err != nil && (n == 0 || st.gone.Load()) {
			if !st.gone.Load() && errors.Is(err, os.ErrDeadlineExceeded) {
				st.srv.stats.dropped.Add(1)
			}
			st.release(false)
			return
		}
	}
	st.pending = nil
	st.conn.SetWriteDeadline(time.Time{})
	st.requeue()
}

// release gives up all that the stream held. A stream that has said goodbye
// leaves it to the client to close.
func (st *session) release(said bool) {
	st.state.Store(stateClosed)
	for _, b := range st.pending {
		st.srv.unsentBytes.Add(-int64(len(b)))
	}
	p := &st.srv.pool
	p.mu.Lock()
	last := p.sessions[len(p.sessions)-1]
	p.sessions[st.index], last.index = last, st.index
	p.sessions[len(p.sessions)-1] = nil
	if p.sessions = p.sessions[:len(p.sessions)-1]; len(p.sessions) == gcThreshold/2 {
		go setGCPercent(100)
	}
	p.mu.Unlock()
	st.close()
	if !said {
		st.conn.Close()
		return
	}
	if c, ok := st.conn.(interface{ CloseWrite() error }); ok {
		c.CloseWrite()
	}
	time.AfterFunc(lingerTimeout, func() { st.conn.Close() })
}
