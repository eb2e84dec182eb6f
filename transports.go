// The techniques. Each is a way of writing the same events: what goes out
// before the first of them, how one is framed, what a heartbeat looks like. One
// loop, follow, drives all that stream; the rest read once and answer.
//
// The table below is in the order of their age. To learn comet, read it from
// the top, and each technique's function beside what `curl -N` shows of it.

package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	mathrand "math/rand/v2"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/coder/websocket"
)

// How long a technique holds the request.
type hold int

const (
	now     hold = iota // answers at once
	once                // waits for the first event, then answers
	forever             // goes on answering
)

// A technique is a name in the URL, how long it holds, and how it writes.
type technique struct {
	name    string
	hold    hold
	framing func(*query) framing
}

var techniques = []technique{
	{"refresh", now, refresh},
	{"multipart", forever, multipart},
	{"html", forever, endless},
	{"poll", now, poll},
	{"iframe", forever, iframe},
	{"longpoll", once, poll},
	{"jsonp", once, jsonp},
	{"stream", forever, stream},
	{"sse", forever, sse},
	{"ws", forever, frames},
}

// A framing is how a technique writes: with event, one after the other, or
// with batch, all that are due at once.
type framing struct {
	mime   string
	header map[string]string // further headers
	head   string            // before everything
	event  func(b []byte, e *event) []byte
	batch  func(b []byte, cursor int64, events []*event) []byte
	beat   string // a heartbeat
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

// stream: an answer that never ends, one line an event, read with fetch or at
// XMLHttpRequest's readyState 3 (about 2004). A heartbeat is an empty line.
//
//	{"id":1795351418000042,…}
func stream(*query) framing {
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
//
//	id: 1795351418000042
//	event: typing
//	data: {"id":1795351418000042,…}
//
// A comment would do for a heartbeat, but a page can't see a comment. The
// retry differs by client, lest all of them return at once.
func sse(*query) framing {
	return framing{
		mime: "text/event-stream; charset=utf-8",
		head: fmt.Sprintf("retry: %d\n\n", 2000+mathrand.IntN(2000)),
		event: func(b []byte, e *event) []byte {
			if e.id != 0 {
				b = strconv.AppendInt(append(b, "id: "...), e.id, 10)
				b = append(b, '\n')
			}
			if e.kind != "message" {
				b = append(append(b, "event: "...), e.kind...)
				b = append(b, '\n')
			}
			b = append(append(b, "data: "...), e.json...)
			return append(b, "\n\n"...)
		},
		beat: "event: beat\ndata:\n\n",
	}
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
	case "html":
		var shown []*event
		f.batch = func(b []byte, _ int64, events []*event) []byte {
			shown = append(shown, events...)
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
// own. Only a page of an origin that may read is told: see (*server).reader.
func iframe(q *query) framing {
	nonce := rand.Text()
	origin := "location.origin"
	if q.origin != "" {
		quoted, _ := json.Marshal(q.origin)
		origin = string(quoted)
	}
	open, end := `<script nonce="`+nonce+`">`, "</script>\n"
	return framing{
		mime:   "text/html; charset=utf-8",
		header: map[string]string{"Content-Security-Policy": "default-src 'none'; script-src 'nonce-" + nonce + "'; base-uri 'none'; frame-ancestors " + q.ancestors},
		head: "<!DOCTYPE html>\n<title>Cometes</title>\n" +
			open + "const tell = event => parent.postMessage(event, " + origin + ")" + end,
		event: func(b []byte, e *event) []byte {
			b = append(append(b, open...), "tell("...)
			return append(append(append(b, e.json...), ')'), end...)
		},
		beat: open + `tell({"type":"beat"})` + end,
	}
}

// frames are what a WebSocket (RFC 6455, 2011) carries: an event a text frame,
// or several with a newline between them when many are due. A page can't see
// a ping, so a heartbeat is a frame as well.
func frames(*query) framing {
	return framing{
		event: func(b []byte, e *event) []byte {
			return append(append(b, e.json...), '\n')
		},
		beat: `{"type":"beat"}` + "\n",
	}
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
		head:   string(append(pageHead(nil, q), `<main class="log endless">`+"\n"...)),
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
			"Refresh":                 strconv.Itoa(int(q.wait / time.Second)),
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

// A scratch is what a stream needs while it writes. One with nothing to say
// holds none, so ten thousand idle streams share a few.
type scratch struct {
	events []*event
	buf    []byte
}

var scratches = sync.Pool{New: func() any { return new(scratch) }}

// serve answers a request for events by a technique, until there is no more to
// say or the client is gone.
func (s *server) serve(w http.ResponseWriter, r *http.Request, t technique, q *query) error {
	f := t.framing(q)
	if t.name == "ws" {
		return s.serveWebSocket(w, r, q, &f)
	}
	h := w.Header()
	h.Set("Content-Type", f.mime)
	for k, v := range f.header {
		h.Set(k, v)
	}
	if r.Method == http.MethodHead {
		return nil
	}
	write := writer(w)
	if t.name == "sse" && s.relay.isStopping() {
		// An EventSource gives up for ever on any status but 200.
		return write(f.frame([]byte(f.head), 0, s.bye()))
	}
	rd, err := s.relay.subscribe(q.want(t.hold))
	if err != nil {
		return err
	}
	defer rd.leave()
	if t.hold == forever {
		return s.follow(r.Context(), rd, &f, q, write)
	}
	events := rd.next(nil)
	if t.hold == once {
		clock := time.NewTimer(q.wait)
		defer clock.Stop()
		for len(events) == 0 && rd.wait(r.Context(), clock.C) {
			events = rd.next(events)
		}
		if len(events) == 0 {
			events = rd.next(events) // what came in the last moment, before the relay stopped say
		}
	}
	return write(f.frame(nil, rd.after, events...))
}

// follow drives a stream: hello, what the cursor asks for, the roster, and then
// whatever happens, with a heartbeat when nothing does. It returns when
// the client is gone (write says so, or ctx) or the relay stops.
func (s *server) follow(ctx context.Context, rd *reader, f *framing, q *query, write func([]byte) error) error {
	s.streams.Add(1)
	defer s.streams.Add(-1)
	hello := notice{Type: "hello", ID: rd.after, Time: time.Now().UnixMilli(), Data: map[string]any{
		"rooms": q.rooms, "beat": int(s.beat / time.Second), "instance": s.instance,
	}}
	if err := write(f.frame([]byte(f.head), rd.after, hello.event())); err != nil {
		return err
	}
	rd.expectRoster()
	clock := time.NewTimer(s.pause())
	defer clock.Stop()
	for {
		stopping := s.relay.isStopping() // asked first: what was published before the stop is written before the bye
		wrote, err := rd.catchUp(f, write)
		if err != nil {
			return err
		}
		if wrote {
			clock.Reset(s.pause())
		}
		if stopping {
			return write(f.frame(nil, rd.after, s.bye()))
		}
		switch {
		case rd.wait(ctx, clock.C), s.relay.isStopping():
		case ctx.Err() != nil:
			return nil
		default:
			if err := write([]byte(f.beat)); err != nil {
				return err
			}
			clock.Reset(s.pause())
		}
	}
}

// catchUp writes all that lies behind the reader's cursor, and reports whether
// that was anything.
func (rd *reader) catchUp(f *framing, write func([]byte) error) (wrote bool, err error) {
	sc := scratches.Get().(*scratch)
	defer func() {
		clear(sc.events[:cap(sc.events)]) // not to keep what the log drops
		scratches.Put(sc)
	}()
	for {
		sc.events = rd.next(sc.events[:0])
		if rd.rosterDue && !rd.cut {
			sc.events = rd.rosters(sc.events)
		}
		if len(sc.events) == 0 {
			return wrote, nil
		}
		sc.buf = f.frame(sc.buf[:0], rd.after, sc.events...)
		if err := write(sc.buf); err != nil {
			return wrote, err
		}
		wrote = true
	}
}

// pause is how long a stream is silent before a heartbeat: a little less than
// the beat it promises, and not the same for all.
func (s *server) pause() time.Duration {
	return s.beat - mathrand.N(s.beat/4)
}

// bye sends a client away until the retry it names, in milliseconds: a second
// at least, and in all a hundred clients a second, but within half a minute.
func (s *server) bye() *event {
	spread := min(max(s.streams.Load()*10, 2000), 30_000)
	retry := 1000 + mathrand.Int64N(spread)
	return notice{Type: "bye", Data: map[string]int64{"retry": retry}}.event()
}

// writer returns what writes an answer at once, in pieces that each have
// writeTimeout to go out.
func writer(w http.ResponseWriter) func([]byte) error {
	rc := http.NewResponseController(w)
	return func(b []byte) error {
		for len(b) > 0 {
			piece := b[:min(len(b), writePiece)]
			b = b[len(piece):]
			if err := rc.SetWriteDeadline(time.Now().Add(writeTimeout)); err != nil {
				return err
			}
			if _, err := w.Write(piece); err != nil {
				return err
			}
			if err := rc.Flush(); err != nil {
				return err
			}
		}
		return nil
	}
}

// The WebSocket.

// serveWebSocket speaks both ways: this goroutine writes what follow frames,
// another reads what the client has to say.
func (s *server) serveWebSocket(w http.ResponseWriter, r *http.Request, q *query, f *framing) error {
	if r.Method == http.MethodHead || !strings.EqualFold(r.Header.Get("Upgrade"), "websocket") {
		w.Header().Set("Connection", "Upgrade")
		w.Header().Set("Upgrade", "websocket")
		return fault{http.StatusUpgradeRequired, "this is a WebSocket; ask for it with Upgrade: websocket"}
	}
	rd, err := s.relay.subscribe(q.want(forever))
	if err != nil {
		return err
	}
	defer rd.leave()
	conn, err := websocket.Accept(w, r, s.origins.websocket())
	if err != nil {
		return nil // Accept has answered
	}
	defer conn.CloseNow()
	conn.SetReadLimit(maxBody)

	// The request's context says nothing of a connection that was taken over:
	// its reader is who notices that the client is gone.
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	write := func(b []byte) error {
		ctx, cancel := context.WithTimeout(ctx, writeTimeout)
		defer cancel()
		return conn.Write(ctx, websocket.MessageText, bytes.TrimSuffix(b, []byte("\n")))
	}
	read := make(chan struct{}) // closed when the client says no more
	go func() {
		defer close(read)
		defer cancel()
		for {
			kind, frame, err := conn.Read(ctx)
			if err != nil {
				return
			}
			if reply := s.hear(q, kind, frame); reply != nil && write(reply.event().json) != nil {
				return
			}
		}
	}()
	go s.ping(ctx, cancel, conn)

	if err := s.follow(ctx, rd, f, q, write); err != nil || ctx.Err() != nil {
		return nil
	}
	// The relay is stopping. Close waits for the client's goodbye, but not for long.
	go conn.Close(websocket.StatusGoingAway, "the relay is stopping")
	select {
	case <-read:
	case <-time.After(time.Second):
	}
	return nil
}

// ping asks whether the client is there, every beat, and cancels when it does
// not answer: a machine that vanished closes nothing.
func (s *server) ping(ctx context.Context, cancel func(), conn *websocket.Conn) {
	defer cancel()
	for {
		select {
		case <-ctx.Done():
			return
		case <-time.After(s.pause()):
		}
		within, done := context.WithTimeout(ctx, writeTimeout)
		err := conn.Ping(within)
		done()
		if err != nil {
			return
		}
	}
}

// hear takes what a client says through its socket, and returns the answer,
// if it is owed one. What can't be taken is said so, and the socket lives on.
func (s *server) hear(q *query, kind websocket.MessageType, frame []byte) *notice {
	if kind != websocket.MessageText || !utf8.Valid(frame) {
		return &notice{Type: "error", Data: "frames are text, in UTF-8"}
	}
	p := post{kind: "message", from: q.user}
	if !bytes.HasPrefix(frame, []byte("{")) {
		p.data, _ = json.Marshal(string(frame))
		_, _, err := s.post(q.oneRoom(), p)
		return refusal("", err)
	}
	var said struct {
		Type string
		Room *string
		Key  string
		TTL  *int64
		Data json.RawMessage
	}
	if err := parseJSON(frame, &said); err != nil {
		return refusal("", err)
	}
	room := q.oneRoom()
	if said.Room != nil {
		room = *said.Room
	}
	if said.Type == "presence" {
		var state string
		if json.Unmarshal(said.Data, &state) != nil {
			return refusal(said.Key, errState)
		}
		err := s.declare(room, q.user, state)
		if err != nil || said.Key == "" {
			return refusal(said.Key, err)
		}
		return &notice{Type: "ack", Key: said.Key}
	}
	if said.Type != "" {
		p.kind = said.Type
	}
	if said.TTL != nil {
		p.ttl = time.Duration(*said.TTL) * time.Second
		if *said.TTL < 1 || *said.TTL > maxTTL {
			return refusal(said.Key, errTTL)
		}
	}
	p.key = said.Key
	p.data = said.Data
	id, _, err := s.post(room, p)
	if err != nil || said.Key == "" {
		return refusal(said.Key, err)
	}
	return &notice{Type: "ack", Key: said.Key, ID: id}
}

// refusal is the answer to what could not be taken, or nil if it could.
func refusal(key string, err error) *notice {
	if err == nil {
		return nil
	}
	if len(key) > maxKey {
		key = ""
	}
	return &notice{Type: "error", Key: key, Data: err.Error()}
}
