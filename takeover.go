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
var errFull = errors.New("the socket is full")

// lingerFor is how long a stream that has ended waits for its client to close
// first; closing on what it still says would take the end from it.
const lingerFor = time.Second

// sendBuffer is how many bytes the kernel may keep for a client that is slow to
// take them. Left to itself, Linux would keep megabytes.
const sendBuffer = 32 << 10

// A takeover is what a stream over a connection that was taken over has more
// than one that is driven by its own request.
type takeover struct {
	opening []byte      // sent before everything, once
	rest    net.Buffers // what a full socket did not take
	conn    net.Conn
	patient bool // the kernel ends it when the client acknowledges nothing

	// Of a WebSocket.
	proxied bool  // a proxy is in between, or may be
	token   int64 // when its token expires, in Unix nanoseconds
	beats   int
	silent  atomic.Bool // it did not answer the last ping yet
	mu      sync.Mutex  // guards answers and parting
	answers []byte      // frames that the library, or hear, has to send
	parting bool        // the last of them closes the socket; nothing may follow (RFC 6455, 5.5.1)
	hearing atomic.Bool // hear is at it, and may owe an answer
	owes    bool        // the same, as this turn began
}

// Whose turn it is. Only who serves a stream, the writer that took it from the
// queue or the goroutine that waits for its full socket, touches what is not atomic.
const (
	unborn = iota // its connection is not taken over yet
	idle
	queued // a writer will come
	served // somebody serves it
	again  // the same, and there is more to do
	full   // its socket is; drain has it, and no writer comes
	over
)

// A pump is the writers, and the streams they serve. Writers live while there
// is something to write, so a pump needs neither start nor stop.
type pump struct {
	mu      sync.Mutex // guards what follows
	queue   []*stream
	taken   int // so many in front of the queue were taken
	writers int
	streams []*stream
	ticking bool // a tick is due
}

// takeOver serves the stream over the request's own connection. The handler is
// done then.
func (st *stream) takeOver(w http.ResponseWriter) error {
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
	st.opening = head.Bytes()
	st.front = chunkHead
	st.send = (*stream).sendChunk
	st.s.pump.add(st)
	go st.watch()
	return nil
}

// watch waits for the client to leave, or, roused by a deadline, for its socket
// to take the rest. What the client says, which it has no reason to, is lost;
// who says more than a request's head is given up.
func (st *stream) watch() {
	var b [64]byte
	for said := 0; ; {
		n, err := st.conn.Read(b[:])
		said += n
		roused := errors.Is(err, os.ErrDeadlineExceeded)
		if roused { // before the look at turn, lest the next rousing is undone
			st.conn.SetReadDeadline(time.Time{})
		}
		if st.turn.Load() == full {
			st.drain()
		} else if err != nil && !roused || said > maxHeader {
			st.giveUp()
			st.abandon()
			return
		}
	}
}

var past = time.Unix(1, 0)

// giveUp has the stream finished, and nobody wait for its socket any more. The
// socket is closed in the stream's turn, or when that is over, never beside it:
// its number would be the next connection's, and a write could go there.
func (st *stream) giveUp() {
	st.gone.Store(true)
	st.conn.SetDeadline(past)
	st.leave()
}

// leave has the stream finished when what is due was sent.
func (st *stream) leave() {
	st.gone.Store(true)
	st.wake()
	if st.turn.Load() == over {
		st.conn.Close()
	}
}

// chunkHead is the size of a chunk in hexadecimal and a line end
// (RFC 9112, 7.1); leading zeros are allowed, and let it be filled in last.
const chunkHead = len("00000000\r\n")

// sendChunk writes b, whose first chunkHead bytes are free, as a chunk.
func (st *stream) sendChunk(d *desk, b []byte) error {
	const hex = "0123456789abcdef"
	copy(b[chunkHead-2:], "\r\n")
	for i, n := chunkHead-3, len(b)-chunkHead; i >= 0; i, n = i-1, n>>4 {
		b[i] = hex[n&15]
	}
	if b = append(b, "\r\n"...); len(b) == chunkHead+len("\r\n") {
		b = b[:0] // an empty chunk would be the end
	}
	if st.ended {
		b = append(b, "0\r\n\r\n"...)
	}
	if st.opening != nil {
		d.count.out += int64(len(st.opening))
		b = append(st.opening, b...)
		st.opening = nil
	}
	return st.write(d, b)
}

// write gives the socket what it takes, and keeps the rest.
func (st *stream) write(d *desk, b []byte) error {
	n := 0
	if st.fd >= 0 {
		var err error
		if n, err = try(st.fd, b); err != nil {
			return err
		}
	}
	if n < len(b) {
		st.rest = left(b, n, d.framed)
		return cmp.Or(st.s.owe(len(b)-n), errFull)
	}
	return nil
}

// owe counts bytes that a client has not taken yet. It returns errGone if there
// is no room to wait for all who are slow.
func (s *server) owe(n int) error {
	if s.unsent.Add(int64(n)) > int64(s.relay.allBytes) {
		s.stats.dropped.Add(1)
		return errGone
	}
	return nil
}

// worthSharing is the size in bytes from which an event is kept once for all who
// are slow to take it, and not copied for each.
const worthSharing = 512

// left is b, which holds the events framed, without its first n bytes. The
// frames are copied, for b is needed again; of big events there is one for all.
func left(b []byte, n int, events []*event) (rest net.Buffers) {
	copied := func(b []byte) {
		if n < len(b) {
			rest = append(rest, bytes.Clone(b[n:]))
		}
		n = max(0, n-len(b))
	}
	for _, e := range events {
		if len(e.json) < worthSharing {
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
func (p *pump) add(st *stream) {
	if c, ok := st.conn.(interface{ SetWriteBuffer(int) error }); ok {
		c.SetWriteBuffer(sendBuffer)
	}
	if st.fd = socket(st.conn); st.fd >= 0 {
		st.patient = patience(st.fd, 2*max(st.s.beat, writeTimeout))
	}
	p.mu.Lock()
	st.at = len(p.streams)
	if p.streams = append(p.streams, st); len(p.streams) == many {
		go collectAt(25)
	}
	if !p.ticking {
		p.ticking = true
		p.tick(st.s)
	}
	st.turn.Store(queued)
	p.push(st)
	p.mu.Unlock()
}

// many is how many streams make memory worth more than time: to deliver an
// event allocates nothing, so to collect garbage more often then costs little.
const many = 100

// collectAt sets how much garbage there may be, in percent of what is in use,
// unless GOGC does.
func collectAt(percent int) {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(percent)
	}
}

// tick has the streams served that are due a heartbeat, while there are any.
// One walk now and then costs less than a timer for each.
func (p *pump) tick(s *server) {
	time.AfterFunc(s.beat/15, func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		now := time.Now().UnixNano()
		for _, st := range p.streams {
			if st.due(now) && st.turn.CompareAndSwap(idle, queued) {
				p.push(st)
			}
		}
		if p.ticking = len(p.streams) > 0; p.ticking {
			p.tick(s)
		}
	})
}

// wakeAll has all streams served, to tell them that the relay stops.
func (p *pump) wakeAll() {
	p.mu.Lock()
	all := slices.Clone(p.streams) // a hand takes the lock
	p.mu.Unlock()
	var h hand
	for _, st := range all {
		st.wakeBy(&h)
	}
	h.empty()
}

// wake has the stream served, now or once more.
func (st *stream) wake() {
	var h hand
	st.wakeBy(&h)
	h.empty()
}

// wakeBy is wake when the hand is emptied.
func (st *stream) wakeBy(h *hand) {
	for {
		switch st.turn.Load() {
		case idle:
			if st.turn.CompareAndSwap(idle, queued) {
				h.take(st)
				return
			}
		case served:
			if st.turn.CompareAndSwap(served, again) {
				return
			}
		default:
			return
		}
	}
}

// A hand carries a few streams to the queue at once, lest who wakes ten
// thousand and who writes to them wait for each other at each.
type hand struct {
	streams [handful]*stream
	n       int
}

// handful is how many streams are queued, or taken from the queue, at once.
const handful = 32

func (h *hand) take(st *stream) {
	h.streams[h.n] = st
	if h.n++; h.n == len(h.streams) {
		h.empty()
	}
}

func (h *hand) empty() {
	if h.n > 0 {
		h.streams[0].s.pump.enqueue(h.streams[:h.n]...)
		h.n = 0
	}
}

// enqueue puts streams whose turn is queued in the queue.
func (p *pump) enqueue(streams ...*stream) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.push(streams...)
}

// push is enqueue for a caller who holds p.mu.
func (p *pump) push(streams ...*stream) {
	if p.taken > 0 && p.taken >= len(p.queue)/2 {
		n := copy(p.queue, p.queue[p.taken:])
		clear(p.queue[n:])
		p.queue, p.taken = p.queue[:n], 0
	}
	p.queue = append(p.queue, streams...)
	if p.writers < runtime.GOMAXPROCS(0) {
		p.writers++
		go p.write()
	}
}

// ease holds a publisher up, for a tenth of a second at most, while the stream
// that waits longest is a quarter of a history behind. Without it a few that
// publish as fast as they can would run away from a thousand who read.
func (s *server) ease() {
	for range 100 {
		s.pump.mu.Lock()
		waiting := s.pump.queue[s.pump.taken:]
		ahead := len(waiting) > 0 && s.relay.mark.Load()-waiting[0].rd.after > int64(s.relay.events)/4
		s.pump.mu.Unlock()
		if !ahead {
			return
		}
		time.Sleep(time.Millisecond)
	}
}

// write is a writer: it serves what is in the queue until there is nothing.
func (p *pump) write() {
	d := desks.Get().(*desk)
	defer desks.Put(d)
	var few [handful]*stream
	for {
		p.mu.Lock()
		batch := few[:copy(few[:], p.queue[p.taken:])]
		p.taken += len(batch)
		if len(batch) == 0 {
			clear(p.queue)
			p.queue, p.taken = p.queue[:0], 0
			p.writers--
		}
		p.mu.Unlock()
		if len(batch) == 0 {
			return
		}
		now := time.Now().UnixNano()
		for _, st := range batch {
			st.turn.Store(served)
			st.yield(st.serve(d, now))
		}
		d.count.flush()
		clear(batch)
	}
}

// serve writes what is due.
func (st *stream) serve(d *desk, now int64) (err error) {
	defer func() {
		if p := recover(); p != nil {
			slog.Error("a stream failed", "panic", p, "stack", string(debug.Stack()))
			err = errors.New("panic")
		}
	}()
	if st.ws {
		if err := st.begin(d, now); err != nil { // a client may speak at once, and hello is first
			return err
		}
		st.owes = st.hearing.Load() // asked before the answers are taken
		st.mu.Lock()
		answers, parting := st.answers, st.parting
		st.answers = nil
		st.mu.Unlock()
		if len(answers) > 0 && !st.ended { // to a second goodbye Chromium says the connection failed
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

// yield ends a turn.
func (st *stream) yield(err error) {
	switch {
	case err == errFull && st.ws: // whose goroutine reads in the library
		st.turn.Store(full)
		go st.drain()
	case err == errFull:
		st.turn.Store(full)
		st.conn.SetReadDeadline(past)
		if st.gone.Load() {
			st.abandon()
		}
	case err != nil:
		st.finish(err == io.EOF)
	case !st.turn.CompareAndSwap(served, idle):
		st.requeue()
	}
}

func (st *stream) requeue() {
	st.turn.Store(queued)
	st.s.pump.enqueue(st)
}

// abandon finishes a stream whose socket is full when nobody watches any more.
func (st *stream) abandon() {
	if st.turn.CompareAndSwap(full, served) {
		st.finish(false)
	}
}

// drain waits for a full socket to take the rest. Each time it takes something
// it is given writeTimeout anew.
func (st *stream) drain() {
	for len(st.rest) > 0 {
		st.conn.SetWriteDeadline(time.Now().Add(writeTimeout))
		n, err := st.conn.Write(st.rest[0])
		st.s.unsent.Add(-int64(n))
		if st.rest[0] = st.rest[0][n:]; len(st.rest[0]) == 0 {
			st.rest = st.rest[1:]
		}
		if err != nil && (n == 0 || st.gone.Load()) {
			if !st.gone.Load() && errors.Is(err, os.ErrDeadlineExceeded) {
				st.s.stats.dropped.Add(1)
			}
			st.finish(false)
			return
		}
	}
	st.rest = nil
	st.conn.SetWriteDeadline(time.Time{})
	st.requeue()
}

// finish gives up all that the stream held. A stream that has said goodbye
// leaves it to the client to close.
func (st *stream) finish(said bool) {
	st.turn.Store(over)
	for _, b := range st.rest {
		st.s.unsent.Add(-int64(len(b)))
	}
	p := &st.s.pump
	p.mu.Lock()
	last := p.streams[len(p.streams)-1]
	p.streams[st.at], last.at = last, st.at
	p.streams[len(p.streams)-1] = nil
	if p.streams = p.streams[:len(p.streams)-1]; len(p.streams) == many/2 {
		go collectAt(100)
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
	time.AfterFunc(lingerFor, func() { st.conn.Close() })
}
