// The techniques. Each is a way of writing the same events: what goes out
// before the first of them, how one is framed, what a heartbeat looks like. One
// function, step, drives all that stream; the rest read once, in answer.
//
// The table below is in the order of their age; the functions begin with the
// simplest. To learn comet, read each beside what `curl -N` shows of it. What a
// stream has of turns and of a takeover is told in takeover.go: on a first
// reading, pass it over.

package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"os"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode/utf8"

	"github.com/coder/websocket"
)

// How long a technique holds the request.
type hold int

const (
	atOnce  hold = iota // the answer comes at once
	once                // with the first event
	forever             // and never ends
)

// A technique is a name in the URL, how long it holds, and how it writes.
type technique struct {
	name    string
	hold    hold
	framing func(*query) framing
	as      []string // what as= may say, if anything; the first if it says nothing
}

var techniques = []technique{
	{"refresh", atOnce, refresh, nil},
	{"multipart", forever, multipart, []string{"json", "text", "html", "svg"}},
	{"html", forever, endless, nil},
	{"poll", atOnce, poll, nil},
	{"iframe", forever, iframe, nil},
	{"longpoll", once, poll, nil},
	{"stream", forever, lines, nil},
	{"jsonp", once, jsonp, nil},
	{"sse", forever, sse, []string{"json", "data"}},
	{"ws", forever, frames, []string{"json", "data"}},
}

// A framing is how a technique writes: with event, one after the other, or
// with batch, all that are due at once.
type framing struct {
	event  func(b []byte, e *event) []byte
	batch  func(b []byte, cursor int64, events []*event) []byte
	beat   string // a heartbeat
	mime   string
	header map[string]string // further headers
	head   string            // before everything
}

// frame appends what is due to b.
func (f *framing) frame(b []byte, cursor int64, events ...*event) []byte {
	if f.batch != nil {
		return f.batch(b, cursor, events)
	}
	for _, e := range events {
		b = f.event(b, e)
	}
	return b
}

// poll, and longpoll: the page asks again and again. One JSON object:
//
//	{"cursor":1795351418000042,"events":[{"id":1795351418000042,…}]}
//
// A poll answers at once, mostly with nothing; a long-poll (2000) is the same
// question with a patient answer, and the next one is asked at once.
func poll(*query) framing {
	return framing{
		mime: "application/json; charset=utf-8",
		batch: func(b []byte, cursor int64, events []*event) []byte {
			return append(answer(b, cursor, events), '\n')
		},
	}
}

func answer(b []byte, cursor int64, events []*event) []byte {
	b = strconv.AppendInt(append(b, `{"cursor":`...), cursor, 10)
	b = append(b, `,"events":[`...)
	for i, e := range events {
		if i > 0 {
			b = append(b, ',')
		}
		b = append(b, e.json...)
	}
	return append(b, `]}`...)
}

// jsonp, 2005: a long-poll through a <script> tag, the only request that once
// went across origins. The answer is a program that calls the page's function.
//
//	/**/callback({"cursor":1795351418000042,"events":[…]});
//
// The comment keeps a callback name from being read as another kind of file
// (a Flash movie can be spelled in letters and digits).
func jsonp(q *query) framing {
	return framing{
		mime: "application/javascript; charset=utf-8",
		batch: func(b []byte, cursor int64, events []*event) []byte {
			b = append(append(b, "/**/"...), q.callback...)
			return append(answer(append(b, '('), cursor, events), ");\n"...)
		},
	}
}

// lines, the technique stream: an answer that never ends, one line an event, read
// with fetch or at XMLHttpRequest's readyState 3 (about 2004). A heartbeat is an
// empty line.
//
//	{"id":1795351418000042,…}
func lines(*query) framing {
	return framing{
		mime: "application/x-ndjson; charset=utf-8",
		event: func(b []byte, e *event) []byte {
			return append(append(b, e.json...), '\n')
		},
		beat: "\n",
	}
}

// sse, 2006 and HTML5: the same with a format that browsers read by themselves
// (https://html.spec.whatwg.org/multipage/server-sent-events.html). They
// reconnect by themselves too, and send the last id as Last-Event-ID.
//
//	retry: 2718
//	id: 1795351418000041
//	event: hello
//	data: {"type":"hello",…}
//
//	id: 1795351418000042
//	event: typing
//	data: {"id":1795351418000042,…}
//
// With as=data an event is its data alone. A comment would do for a heartbeat,
// but a page can't see a comment; nor an event whose name it doesn't listen for,
// so names=0 leaves them out. Some clients take every block for an event, and
// what it says for JSON: so retry has no block of its own, and a heartbeat says
// something. The retry differs by client, so that they don't return all at once.
func sse(q *query) framing {
	nameless, alone := q.nameless, q.as == "data" // and not q, which each stream would keep
	beat := "event: beat\ndata: " + beatJSON + "\n\n"
	if alone {
		beat = "event: beat\ndata:\n\n"
	}
	return framing{
		mime: "text/event-stream; charset=utf-8",
		head: fmt.Sprintf("retry: %d\n", 2000+mathrand.IntN(2000)),
		event: func(b []byte, e *event) []byte {
			if e.id != 0 || e.kind == "hello" {
				b = strconv.AppendInt(append(b, "id: "...), e.id, 10)
				b = append(b, '\n')
			}
			if e.kind != "message" && !nameless {
				b = append(append(b, "event: "...), e.kind...)
				b = append(b, '\n')
			}
			if alone {
				return append(dataLines(b, asText(e.content().Data)), '\n')
			}
			b = append(append(b, "data: "...), e.json...)
			return append(b, "\n\n"...)
		},
		beat: beat,
	}
}

// dataLines appends text, a field for each line of it; a line may end in any of
// the ways that the standard knows.
func dataLines(b []byte, text string) []byte {
	for line := range strings.SplitSeq(strings.NewReplacer("\r\n", "\n", "\r", "\n").Replace(text), "\n") {
		b = append(append(append(b, "data: "...), line...), '\n')
	}
	return b
}

// multipart, Netscape's server push of 1995: each part replaces the one before.
// A browser shows a part when it sees the boundary that ends it, so that is
// sent right behind the part, and the next part's headers with it: without
// them Chromium shows every picture one late. Inside a part that has begun,
// an empty line says nothing and keeps the connection alive.
//
//	--8b1f…
//	Content-Type: application/json
//
//	{"id":1795351418000042,…}
//	--8b1f…
//	Content-Type: application/json
//
// The boundary is random, so that nobody's text can contain it.
func multipart(q *query) framing {
	mime := map[string]string{
		"json": "application/json; charset=utf-8",
		"text": "text/plain; charset=utf-8",
		"html": "text/html; charset=utf-8",
		"svg":  "image/svg+xml",
	}[q.as]
	boundary := rand.Text()
	open := "\r\n--" + boundary + "\r\nContent-Type: " + mime + "\r\n\r\n"
	f := framing{
		mime: "multipart/x-mixed-replace; boundary=" + boundary,
		head: open[2:],
		beat: "\r\n",
	}
	switch q.as {
	case "json":
		f.event = func(b []byte, e *event) []byte { return append(append(b, e.json...), open...) }
	case "text":
		f.event = func(b []byte, e *event) []byte { return append(append(b, e.text()...), open...) }
	case "svg":
		f.event = func(b []byte, e *event) []byte {
			if e.kind != "picture" {
				return b
			}
			return append(append(b, e.json...), open...)
		}
	case "html":
		var shown []*event
		f.batch = func(b []byte, _ int64, events []*event) []byte {
			for _, e := range events {
				if e.erases() {
					shown = nil
				}
				shown = append(shown, e)
			}
			shown = append([]*event(nil), shown[max(0, len(shown)-pageMessages):]...)
			return append(page(b, q, shown), open...)
		}
	}
	return f
}

// iframe, the forever frame, about 2000: a page in a hidden frame that never ends.
// The browser runs each <script> as it arrives, and that hands the event to
// the page around it.
//
//	<script nonce="8b1f…">tell({"id":1795351418000042,…})</script>
//
// The nonce is all that may run here: an event can't bring a script of its
// own. Only a page of an origin that may read is told: see (*origins).allow.
func iframe(q *query) framing {
	nonce := rand.Text()
	origin := "location.origin"
	if q.origin != "" {
		quoted, _ := json.Marshal(q.origin)
		origin = string(quoted)
	}
	open := `<script nonce="` + nonce + `">`
	const end = "</script>\n"
	tell := open + "tell("
	return framing{
		mime:   "text/html; charset=utf-8",
		header: map[string]string{"Content-Security-Policy": "default-src 'none'; script-src 'nonce-" + nonce + "'; base-uri 'none'; frame-ancestors " + q.ancestors},
		head: "<!DOCTYPE html>\n<title>Cometes</title>\n" +
			open + "const tell = event => parent.postMessage(event, " + origin + ")" + end,
		event: func(b []byte, e *event) []byte {
			return append(append(append(b, tell...), e.json...), ")"+end...)
		},
		beat: tell + beatJSON + ")" + end,
	}
}

// frames are what a WebSocket carries (RFC 6455, 2011): a text frame an event,
// or for several, when many are due, with a newline between them.
//
//	0x81 0x7e 0x00 0xc4 {"id":1795351418000042,…}
//
// They are written here and not by the library, which has a writer of its own
// for each socket. A ping asks whether the client is there; a page can't see
// it, so a heartbeat is a frame as well. With as=data a frame is the data of one
// event that somebody published, and nothing else is sent.
func frames(q *query) framing {
	if q.as == "data" {
		return framing{
			event: func(b []byte, e *event) []byte {
				if e.at == 0 || e.kind == "presence" {
					return b // the relay's own
				}
				text := asText(e.content().Data)
				return append(textFrame(b, len(text)), text...)
			},
			beat: ping,
		}
	}
	return framing{
		batch: func(b []byte, _ int64, events []*event) []byte {
			size := len(events) - 1
			for _, e := range events {
				size += len(e.json)
			}
			b = textFrame(b, size)
			for i, e := range events {
				if i > 0 {
					b = append(b, '\n')
				}
				b = append(b, e.json...)
			}
			return b
		},
		beat: ping + string(textFrame(nil, len(beatJSON))) + beatJSON,
	}
}

const (
	beatJSON = `{"type":"beat"}`
	ping     = "\x89\x00" // a frame
)

// textFrame appends the head of a whole text frame of so many bytes (5.2): its
// length in one byte, or behind 126 in two, or behind 127 in eight.
func textFrame(b []byte, size int) []byte {
	switch b = append(b, 0x81); {
	case size < 126:
		return append(b, byte(size))
	case size < 1<<16:
		return binary.BigEndian.AppendUint16(append(b, 126), uint16(size))
	}
	return binary.BigEndian.AppendUint64(append(b, 127), uint64(size))
}

// appendClose appends a frame that closes the socket (5.5.1).
func appendClose(b []byte, code websocket.StatusCode, reason string) []byte {
	b = append(b, 0x88, byte(2+len(reason)))
	return append(binary.BigEndian.AppendUint16(b, uint16(code)), reason...)
}

// Pages for people, without a script.

// endless is the page that never ends, about 1995: the browser shows what it
// has of a page while the rest is still to come, so the server just goes on.
//
//	<p><time>14:03</time> <b>ada</b> hi</p>
//
// A form in a page that still loads would end it, whatever the answer, so the
// form is in a frame of its own. New lines come last in the page, and the
// style sheet puts them on top.
func endless(q *query) framing {
	return framing{
		mime:   "text/html; charset=utf-8",
		header: map[string]string{"Content-Security-Policy": q.pagePolicy()},
		head:   pageHead(q) + "<main class=\"log endless\">\n",
		event:  func(b []byte, e *event) []byte { return append(b, e.html()...) },
		beat:   "<!-- beat -->\n",
	}
}

// refresh is client pull, Netscape 1995: a whole page, and a header that has
// the browser fetch it again.
//
//	Refresh: 10
//
// A form is lost when the page comes anew, so what takes longer to write has
// a page of its own, with this one in a frame.
func refresh(q *query) framing {
	return framing{
		mime: "text/html; charset=utf-8",
		header: map[string]string{
			"Refresh":                 strconv.Itoa(max(1, int(q.wait/time.Second))),
			"Content-Security-Policy": q.pagePolicy(),
		},
		batch: func(b []byte, _ int64, events []*event) []byte { return page(b, q, events) },
	}
}

// The loop.

const (
	// A write that makes no progress in this time ends its client.
	writeTimeout = 10 * time.Second

	// The kernel takes what fits its buffers, so a client that reads slowly, but
	// reads, is given a new deadline for each piece.
	writePiece = 16 << 10
)

// A desk is what it takes to write, passed from stream to stream: one with
// nothing to say needs none, so ten thousand idle streams share a few.
type desk struct {
	events []*event
	buf    []byte
	framed []*event // those in buf
	count  count
}

var desks = sync.Pool{New: func() any { return new(desk) }}

// serve answers a request for events by a technique, until there is no more to
// say or the client is gone.
func (s *server) serve(w http.ResponseWriter, r *http.Request, t technique, q *query) error {
	f := t.framing(q)
	h := w.Header()
	if f.mime != "" {
		h.Set("Content-Type", f.mime)
	}
	for k, v := range f.header {
		h.Set(k, v)
	}
	if slices.Contains(q.rooms, statsRoom) {
		s.startStats()
	}
	switch {
	case r.Method == http.MethodHead && t.name != "ws":
		return nil
	case t.hold == atOnce:
		return s.answer(w, r, t, &f, q)
	}
	err := s.hold(q)
	switch {
	case err != nil:
	case t.hold == once:
		defer s.free(q.addr)
		err = s.answer(w, r, t, &f, q)
	default:
		err = s.stream(w, r, t, f, q)
	}
	if limit, ok := err.(fault); ok && limit.retry > 0 && t.name == "sse" {
		// An EventSource gives up for ever on any status but 200.
		s.refused(limit.reason)
		return writer(w)(f.frame([]byte(f.head), 0, s.bye()))
	}
	return err
}

// answer reads once, after waiting for an event if the technique does, and
// answers whole.
func (s *server) answer(w http.ResponseWriter, r *http.Request, t technique, f *framing, q *query) error {
	var rd reader
	if err := s.relay.subscribe(&rd, q.want(t.hold)); err != nil {
		return err
	}
	defer rd.leave()
	c := s.stats.tallies[t.name]
	c.connections.Add(1)
	defer c.connections.Add(-1)
	events := rd.next(nil)
	if t.hold == once {
		clock := time.NewTimer(q.wait)
		defer clock.Stop()
		for more := true; more && len(events) == 0; {
			more = rd.wait(r.Context(), clock.C)
			events = rd.next(events) // at the end, too: the relay may have stopped right behind an event
		}
	}
	if q.pull && q.presence {
		q.here = s.relay.whoIsIn(q.rooms[0]).sentence()
	}
	b := f.frame(nil, rd.after, events...)
	w.Header().Set("Content-Length", strconv.Itoa(len(b)))
	var n count
	n.delivered(c, events, int(headSize(len("HTTP/1.1 200 OK"), w.Header()))+len(b), time.Now().UnixMilli())
	n.flush()
	return writer(w)(b)
}

// hold takes a place for a request that is held, of all there are and of the
// client's address; free gives it back.
func (s *server) hold(q *query) error {
	if s.relay.isStopping() {
		return errStopping
	}
	if s.held.Add(1) > s.most {
		s.held.Add(-1)
		return errFullUp
	}
	if !s.gate.hold(q.addr) {
		s.held.Add(-1)
		return errTooMany
	}
	return nil
}

func (s *server) free(addr netip.Addr) {
	s.held.Add(-1)
	s.gate.free(addr)
}

// stream begins a stream, over the request's connection if that may be taken
// over, else from the request itself.
func (s *server) stream(w http.ResponseWriter, r *http.Request, t technique, f framing, q *query) error {
	st := &stream{s: s, addr: q.addr, f: f, tally: s.stats.tallies[t.name], ws: t.name == "ws"}
	takes := st.ws || r.ProtoMajor == 1 && r.ProtoMinor == 1
	var err error
	if st.ws {
		err = upgradable(w, r)
	}
	if err == nil {
		err = st.open(q, takes)
	}
	switch {
	case err != nil:
		s.free(q.addr)
		return err
	case st.ws:
		return st.serveWebSocket(w, r, q)
	case takes:
		return st.takeOver(w)
	}
	defer st.close()
	return st.follow(w, r)
}

// A stream is one client that is told of events for ever.
//
// With ten thousand of them, what a turn costs beside the write is waiting for
// memory; so what every turn needs comes first, and lies together.
type stream struct {
	turn   atomic.Int32 // whose turn it is
	begun  bool         // hello was said
	ended  bool         // bye was said
	ws     bool
	gone   atomic.Bool // the client left
	at     int         // in pump.streams
	s      *server
	fd     int          // the socket, for writes that don't wait; -1 where there are none
	until  int64        // when its token or its age ends it, in Unix nanoseconds
	beatAt atomic.Int64 // when a heartbeat is due, in the same
	pause  int64        // how long it is silent before, in nanoseconds
	send   func(*stream, *desk, []byte) error
	front  int // free bytes that send wants there
	tally  *tally
	f      framing
	rd     reader
	takeover
	addr netip.Addr // the client's
	away func()     // of a picture: called when nobody looks any more
}

// open takes the stream's place in the log. If its connection is taken over the
// writers are woken for it, else it wakes by itself, in follow. Close gives up
// all it holds.
func (st *stream) open(q *query, takes bool) (err error) {
	if q.as == "svg" {
		if st.away, err = st.s.look(q.picture); err != nil {
			return err
		}
	}
	st.pause = st.s.pause()
	w := q.want(forever)
	if takes {
		w.stream = st
	}
	if err = st.s.relay.subscribe(&st.rd, w); err != nil {
		if st.away != nil {
			st.away()
		}
		return err
	}
	st.tally.connections.Add(1)
	st.until = q.claims.until()
	if age := st.s.age; age > 0 {
		age -= mathrand.N(age/10 + 1) // not all at once
		st.until = min(st.until, time.Now().Add(age).UnixNano())
	}
	return nil
}

func (st *stream) close() {
	st.rd.leave()
	st.tally.connections.Add(-1)
	if st.away != nil {
		st.away()
	}
	st.s.free(st.addr)
}

// step says all that is due at the time now, in Unix nanoseconds: hello, what the
// cursor asks for, the roster, whatever happened since, or that nothing did. It
// returns io.EOF when the stream is to end and there is no more to say.
func (st *stream) step(d *desk, now int64) error {
	if st.ended {
		return io.EOF
	}
	if !st.begun {
		st.begun = true
		st.rd.expectRoster()
		head, hello := st.f.head, st.hello()
		st.f.head, st.f.header = "", nil // said once, and not kept by ten thousand
		if err := st.emit(d, now, head, hello); err != nil {
			return err
		}
	}
	expired := now >= st.until
	stopping := st.s.relay.isStopping() // asked before reading: what was published before the stop comes before the bye
	for more := !expired; more; more = st.rd.cut {
		d.events = st.rd.next(d.events[:0])
		if st.rd.rosterDue && !st.rd.cut {
			d.events = st.rd.rosters(d.events)
		}
		if len(d.events) > 0 {
			err := st.emit(d, now, "", d.events...)
			clear(d.events) // not to keep what the log drops
			if err != nil {
				return err
			}
		}
	}
	if expired || stopping && !st.owes {
		st.ended = true
		return cmp.Or(st.emit(d, now, "", st.s.bye()), io.EOF)
	}
	if st.due(now) {
		return st.emit(d, now, st.f.beat)
	}
	return nil
}

// emit sends a head, or a heartbeat, as it is, and events, framed.
func (st *stream) emit(d *desk, now int64, head string, events ...*event) error {
	b := append(d.buf[:0], make([]byte, st.front)...)
	b = append(b, head...)
	if len(events) > 0 {
		b = st.f.frame(b, st.rd.after, events...)
	}
	d.buf = b
	if len(b) == st.front && !st.ended {
		return nil // nothing that this technique shows
	}
	st.beatAt.Store(now + st.pause)
	d.count.delivered(st.tally, events, len(b), now/1e6)
	d.framed = events
	err := st.send(st, d, b)
	d.framed = nil
	return err
}

// due reports whether the stream was silent, or has lasted, as long as it may.
func (st *stream) due(now int64) bool { return now >= min(st.beatAt.Load(), st.until) }

func (st *stream) hello() *event {
	var rooms []string
	for i := range st.rd.seats {
		rooms = append(rooms, st.rd.seats[i].room.name)
	}
	data, _ := json.Marshal(struct {
		Rooms    []string `json:"rooms"`
		Beat     int      `json:"beat"`
		Instance string   `json:"instance"`
	}{rooms, int(st.s.beat / time.Second), st.s.instance})
	return &event{id: st.rd.after, kind: "hello", json: fmt.Appendf(nil,
		`{"type":"hello","id":%d,"time":%d,"data":%s}`, st.rd.after, time.Now().UnixMilli(), data)}
}

// follow drives a stream the ordinary way, from its own request. It returns
// when the client is gone or the stream has ended.
func (st *stream) follow(w http.ResponseWriter, r *http.Request) error {
	write, rc := writer(w), http.NewResponseController(w)
	st.send = func(_ *stream, _ *desk, b []byte) error {
		defer st.s.unsent.Add(-int64(len(b)))
		if err := st.s.owe(len(b)); err != nil {
			return err
		}
		err := write(b)
		if err == nil && rc.Flush() != nil {
			err = errGone
		}
		return cmp.Or(err, rc.SetWriteDeadline(time.Time{})) // over HTTP/2 a deadline ends a stream that is silent, too
	}
	clock := time.NewTimer(0)
	defer clock.Stop()
	for {
		d := desks.Get().(*desk)
		err := st.step(d, time.Now().UnixNano())
		d.count.flush()
		desks.Put(d)
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		clock.Reset(time.Until(time.Unix(0, min(st.beatAt.Load(), st.until))))
		if !st.rd.wait(r.Context(), clock.C) && r.Context().Err() != nil {
			return nil
		}
	}
}

// pause is how long a stream is silent before a heartbeat: a little less than
// the beat it promises, and not the same for all.
func (s *server) pause() int64 {
	return int64(s.beat*14/15 - mathrand.N(s.beat/6))
}

// bye sends a client away until the retry it names, in milliseconds: a second
// at least, and in all a hundred clients a second, but within half a minute.
func (s *server) bye() *event {
	spread := min(max(s.held.Load()*10, s.leaving.Load()*10, 2000), 30_000)
	return notice{Type: "bye", Data: map[string]int64{"retry": 1000 + mathrand.Int64N(spread)}}.event()
}

// writer returns what writes an answer, in pieces that each have writeTimeout
// to go out. The last goes when the handler returns, or is flushed; to flush
// from deep within a handler would have the stack of each that waits grow from
// 8 KB to 16.
func writer(w http.ResponseWriter) func([]byte) error {
	rc := http.NewResponseController(w)
	return func(b []byte) error {
		for {
			piece := b[:min(len(b), writePiece)]
			b = b[len(piece):]
			rc.SetWriteDeadline(time.Now().Add(writeTimeout))
			if _, err := w.Write(piece); err != nil {
				return errGone
			}
			if len(b) == 0 {
				return nil
			}
			if err := rc.Flush(); err != nil {
				return errGone
			}
		}
	}
}

// The WebSocket.

// upgradable says what a request for a WebSocket lacks.
func upgradable(w http.ResponseWriter, r *http.Request) error {
	connection := strings.ToLower(strings.Join(r.Header.Values("Connection"), ","))
	if !r.ProtoAtLeast(1, 1) || !strings.Contains(connection, "upgrade") || !strings.EqualFold(r.Header.Get("Upgrade"), "websocket") {
		if r.ProtoMajor == 1 { // HTTP/2 has no such headers, nor upgrades
			w.Header().Set("Connection", "Upgrade")
			w.Header().Set("Upgrade", "websocket")
		}
		return refuse(http.StatusUpgradeRequired, "this is a WebSocket; ask for it over HTTP/1.1 with Connection: Upgrade and Upgrade: websocket")
	}
	if key, err := base64.StdEncoding.DecodeString(r.Header.Get("Sec-WebSocket-Key")); err != nil || len(key) != 16 || len(r.Header.Values("Sec-WebSocket-Key")) > 1 || r.Header.Get("Sec-WebSocket-Version") != "13" {
		w.Header().Set("Sec-WebSocket-Version", "13")
		return bad("a WebSocket is asked for with Sec-WebSocket-Version: 13, and 16 bytes in base64 as Sec-WebSocket-Key")
	}
	return nil
}

// serveWebSocket begins a stream that speaks both ways: the writers send what is
// framed, and a goroutine reads what the client has to say.
func (st *stream) serveWebSocket(w http.ResponseWriter, r *http.Request, q *query) error {
	st.send = (*stream).sendFrames
	st.token = q.claims.until()
	st.proxied = st.s.gate.trustProxy || r.Header["X-Forwarded-For"] != nil || r.Header["Via"] != nil || r.Header["Forwarded"] != nil
	offered, _, _ := strings.Cut(strings.Join(r.Header.Values("Sec-WebSocket-Protocol"), ","), ",")
	conn, err := websocket.Accept(hijacker{w, st}, r, &websocket.AcceptOptions{
		// The relay speaks none, but a browser that offers some fails without an answer.
		Subprotocols: []string{strings.TrimSpace(offered)},
		// The origin was judged by allow, as for everything else. The library
		// compares it with Host alone, which a proxy may set to something else.
		InsecureSkipVerify: true,
		OnPongReceived:     func(context.Context, []byte) { st.silent.Store(false) },
	})
	if err != nil {
		st.close()
		return nil // Accept has answered
	}
	conn.SetReadLimit(st.s.body)
	st.s.pump.add(st)
	sp := &speaker{user: q.user, client: q.client, claims: q.claims, addr: q.addr, quiet: q.as == "data"}
	if len(st.rd.seats) == 1 {
		sp.room = st.rd.seats[0].room.name // and not the request's, which would be kept for it
	}
	go st.listen(conn, sp)
	return nil
}

// To every so many heartbeats there is a ping, which asks the client itself; and
// its pong costs more than the heartbeat. Where the kernel asks already, see
// patience, and no proxy says that it is in between, there are few.
const (
	pingEvery  = 3
	pingSeldom = 12
)

// sendFrames writes frames, which need nothing around them. A client that has
// not answered the last ping when the next is due is gone, and its network
// did not say so.
func (st *stream) sendFrames(d *desk, b []byte) error {
	if bytes.HasPrefix(b, []byte(ping)) { // a heartbeat: a ping, and what a page can see
		st.beats++
		asks := st.beats%pingEvery == 1
		if st.patient && !st.proxied {
			asks = st.beats%pingSeldom == 0
		}
		if !asks {
			b = b[len(ping):]
		} else if st.silent.Swap(true) {
			return os.ErrDeadlineExceeded
		}
	}
	if st.ended && time.Now().UnixNano() >= st.token {
		b = appendClose(b, websocket.StatusPolicyViolation, "the token has expired")
	} else if st.ended {
		b = appendClose(b, websocket.StatusGoingAway, "come back in a moment")
	}
	return st.write(d, b)
}

// A speaker is who speaks through a WebSocket, and all that is kept of its
// request for as long as it lasts.
type speaker struct {
	user, client, room string // room is the only one read, or ""
	claims             *claims
	addr               netip.Addr
	quiet              bool // hears an answer only to what had a key
}

// listen takes what the client says, until it says no more.
func (st *stream) listen(conn *websocket.Conn, sp *speaker) {
	defer conn.CloseNow()
	defer func() { // as net/http does for a request
		if p := recover(); p != nil {
			slog.Error("a socket failed", "panic", p, "stack", string(debug.Stack()))
		}
	}()
	for {
		kind, frame, err := conn.Read(context.Background())
		if err != nil {
			return
		}
		st.tally.in.Add(int64(len(frame)) + 6) // a head and a mask, of the shortest
		st.hearing.Store(true)                 // what is published is answered, be it the last that is
		if answer := st.s.hear(sp, kind, frame); answer != nil && (answer.Key != "" || !sp.quiet) {
			b := answer.event().json
			st.say(append(textFrame(nil, len(b)), b...))
		}
		if st.hearing.Store(false); st.s.relay.isStopping() {
			st.wake()
		}
	}
}

// maxAnswers is how many bytes of answers a client may leave unread, beside
// what its socket holds, before it is given up.
const maxAnswers = 16 << 10

// say hands frames to the writers.
func (st *stream) say(frames []byte) {
	st.mu.Lock()
	full := len(st.answers)+len(frames) > maxAnswers
	if !full {
		st.answers = append(st.answers, frames...)
		st.parting = st.parting || frames[0] == 0x88
	}
	st.mu.Unlock()
	if full {
		st.giveUp()
		return
	}
	st.wake()
}

// maxControl is the size of a frame that pings, pongs or closes (5.5), which
// must come to the writers whole.
const maxControl = 2 + 125

// A hijacker hands the library its connection with small buffers, for mostly
// it waits; and in a guise that leaves the writing to the writers.
type hijacker struct {
	http.ResponseWriter
	st *stream
}

func (h hijacker) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	conn, rw, err := http.NewResponseController(h.ResponseWriter).Hijack()
	if err != nil {
		return nil, nil, err
	}
	h.st.conn = conn
	guise := guise{conn, h.st}
	early, _ := rw.Reader.Peek(rw.Reader.Buffered()) // a client may speak before it has our answer
	in := bufio.NewReaderSize(bytes.NewReader(bytes.Clone(early)), max(128, len(early)))
	in.Peek(len(early))
	return guise, bufio.NewReadWriter(in, bufio.NewWriterSize(guise, maxControl)), nil
}

// A guise is a WebSocket's connection as its library sees it. What the library
// writes, pongs and the goodbye, goes through the writers like all else, so
// that no frame gets into the middle of another.
type guise struct {
	net.Conn
	st *stream
}

func (g guise) Write(b []byte) (int, error) {
	g.st.say(b)
	return len(b), nil
}

// Close lets the writers send what is due first.
func (g guise) Close() error {
	g.st.leave()
	return nil
}

// hear takes what a client says through its socket, and returns the answer,
// if it is owed one. What can't be taken is said so, and the socket lives on.
func (s *server) hear(sp *speaker, kind websocket.MessageType, frame []byte) *notice {
	if kind != websocket.MessageText || !utf8.Valid(frame) {
		return &notice{Type: "error", Data: "frames are text, in UTF-8"}
	}
	var said struct {
		kind, key string
		room      *string
		ttl       *int64
		onlyIf    *int64
		data      json.RawMessage
	}
	spoken := !bytes.HasPrefix(frame, []byte("{"))
	if !spoken {
		fields := map[string]any{"type": &said.kind, "room": &said.room, "key": &said.key, "ttl": &said.ttl, "if": &said.onlyIf, "data": &said.data}
		if err := parseObject(frame, maxDepth+1, fields); err != nil {
			var only struct{ Key string } // for the answer, if it can be found
			json.Unmarshal(frame, &only)
			return s.ack(only.Key, 0, err)
		}
	}
	if !s.gate.take(sp.addr) {
		return s.ack(said.key, 0, errTooFast)
	}
	if time.Now().UnixNano() >= sp.claims.until() { // a socket that is slow to read may not have been closed yet
		return s.ack(said.key, 0, errExpired)
	}
	room := sp.room
	if said.room != nil {
		room = *said.room
	}
	if said.kind == "presence" {
		var state string
		if json.Unmarshal(said.data, &state) != nil {
			return s.ack(said.key, 0, errState)
		}
		if room != "" && !sp.claims.may(room, false) {
			return s.ack(said.key, 0, errNotGood)
		}
		return s.ack(said.key, 0, s.declare(room, sp.user, sp.client, state))
	}
	p := post{room: room, kind: cmp.Or(said.kind, "message"), from: sp.user, key: said.key, onlyIf: said.onlyIf, unmetered: sp.addr.IsLoopback()}
	if p.onlyIf != nil && *p.onlyIf < 0 {
		return s.ack(said.key, 0, errIf)
	}
	if said.ttl != nil {
		p.ttl = time.Duration(*said.ttl) * time.Second
		if *said.ttl < 1 || *said.ttl > maxTTL {
			return s.ack(said.key, 0, errTTL)
		}
	}
	if room != "" && !sp.claims.may(room, true) {
		return s.ack(said.key, 0, errNotGood)
	}
	if spoken {
		p.data = quote(frame)
	} else {
		p.data = oneLine(said.data)
	}
	id, _, err := s.post(p)
	return s.ack(said.key, id, err)
}

// ack is the answer to a frame that was taken, if it has a key, or could not be.
func (s *server) ack(key string, id int64, err error) *notice {
	if err == nil {
		if key == "" {
			return nil
		}
		answer := &notice{Type: "ack", Key: key}
		if id != 0 {
			answer.ID = &id
		}
		return answer
	}
	if len(key) > maxKey {
		key = ""
	}
	answer := &notice{Type: "error", Key: key, Data: err.Error()}
	if f, ok := err.(fault); ok {
		s.refused(f.reason)
		if f.status == http.StatusPreconditionFailed {
			answer.ID = &f.newest
		}
	}
	return answer
}
