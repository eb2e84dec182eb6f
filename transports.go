// The techniques, and the HTTP around them. Each technique is a way to write the same
// events: what goes out before the first, how one event is framed, what a heartbeat looks
// like. This file reads from the techniques to the requests:
//
//   - the table of techniques, in the order of their age, and a function for each
//   - the loop that drives every technique that streams
//   - WebSocket
//   - requests: what they may ask for, and what is refused
//
// To learn comet, read each technique beside what curl -N shows of it.

package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"html"
	"io"
	"log/slog"
	"maps"
	"math"
	mathrand "math/rand/v2"
	"mime"
	"net/http"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/coder/websocket"
)

// A technique is a name in the URL, how long it holds a request, and how it writes.
type technique struct {
	name    string
	mode    mode
	encoder newEncoder
	as      map[string]newEncoder // encoders that the parameter as can ask for instead
	open    atomic.Int64          // requests that are held now
}

// A mode is how long a technique holds a request.
type mode int

const (
	immediate mode = iota // the answer comes at once
	longPoll              // the answer comes with the first event
	streaming             // the answer never ends
)

// A newEncoder reads the parameters that are the technique's own, and returns the encoder
// for a request.
type newEncoder func(*request) encoder

func newTechniques() []*technique {
	return []*technique{
		{name: "refresh", mode: immediate, encoder: refresh},
		{name: "multipart", mode: streaming, encoder: multipart, as: map[string]newEncoder{"json": multipart}},
		{name: "html", mode: streaming, encoder: endlessPage},
		{name: "poll", mode: immediate, encoder: poll},
		{name: "iframe", mode: streaming, encoder: iframe},
		{name: "longpoll", mode: longPoll, encoder: poll},
		{name: "stream", mode: streaming, encoder: ndjson},
		{name: "jsonp", mode: longPoll, encoder: jsonp},
		{name: "sse", mode: streaming, encoder: sse, as: map[string]newEncoder{"data": sse}},
		{name: "ws", mode: streaming, encoder: frames, as: map[string]newEncoder{"data": frames}},
	}
}

// An encoder is how a technique writes. It has either event, which is called for one event
// after the other, or batch, which is given all that are due at once. Both append to b.
type encoder struct {
	event       func(b []byte, e *event) []byte
	batch       func(b []byte, sub *subscriber, events []*event) []byte
	contentType string
	header      map[string]string // more headers
	preamble    string            // before everything
	heartbeat   string
	last        int // messages to begin with, unless the request says how many

	// The rest may be nil.
	choose    func([]*event) []*event                                              // returns the events of a batch that are to be written
	beat      func(*subscriber) string                                             // makes each heartbeat
	subscribe func(*subscriber, subscribeRequest) (unsubscribed func(), err error) // subscribes to another log than the relay's
}

func (enc *encoder) encode(b []byte, sub *subscriber, events ...*event) []byte {
	if enc.batch != nil {
		return enc.batch(b, sub, events)
	}
	for _, e := range events {
		b = enc.event(b, e)
	}
	return b
}

// poll and longpoll: the page asks again and again. The answer is one JSON object, with the
// cursor to ask with next:
//
//	{"cursor":1795351418000042,"events":[{"id":1795351418000042,…}]}
//
// A poll is answered at once, usually without an event. A long-poll (about 2000) is answered
// when there is an event, and then the page asks again at once.
func poll(*request) encoder {
	return encoder{
		contentType: "application/json; charset=utf-8",
		batch: func(b []byte, sub *subscriber, events []*event) []byte {
			return append(pollBody(b, sub.cursor, events), '\n')
		},
	}
}

// pollBody appends the object without a line end.
func pollBody(b []byte, cursor int64, events []*event) []byte {
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

// jsonp, 2005: a long-poll by a <script> tag, once the only way for a page to read from
// another origin. The answer is a program that calls a function of the page.
//
//	/**/callback({"cursor":1795351418000042,"events":[…]});
//
// The comment in front makes sure that the answer is a script and nothing else. Without it
// the name of the callback would come first, and a Flash movie can be spelled in letters
// and digits.
func jsonp(q *request) encoder {
	callback := strings.Clone(q.param("callback")) // a clone does not keep the whole URL in memory
	if !validCallback(callback) {
		q.fail(badRequest("callback must be a JavaScript name, or several with dots between them, of at most %d characters", maxName))
	}
	return encoder{
		contentType: "application/javascript; charset=utf-8",
		batch: func(b []byte, sub *subscriber, events []*event) []byte {
			b = append(append(b, "/**/"...), callback...)
			return append(pollBody(append(b, '('), sub.cursor, events), ");\n"...)
		},
	}
}

// stream: an answer that never ends, with one line for each event. A page reads it with
// fetch; about 2004 it was an XMLHttpRequest at readyState 3. A heartbeat is an empty line.
//
//	{"id":1795351418000042,…}
func ndjson(*request) encoder {
	return encoder{
		contentType: "application/x-ndjson; charset=utf-8",
		event: func(b []byte, e *event) []byte {
			return append(append(b, e.json...), '\n')
		},
		heartbeat: "\n",
	}
}

// sse, 2006: the same in a format that browsers parse themselves
// (https://html.spec.whatwg.org/multipage/server-sent-events.html). They also
// reconnect by themselves, and then send the last id as Last-Event-ID.
//
//	retry: 2718
//	event: hello
//	data: {"type":"hello",…}
//	id: 1795351418000041
//
//	data: {"id":1795351418000042,…}
//	id: 1795351418000042
//
// The id comes last: some clients take it for their cursor as soon as they have read it,
// and would lose an event whose connection is cut between its id and its data.
// A heartbeat is an event, since a page cannot see a comment. Nor does it see an event whose
// name it has no listener for; names=0 leaves out the names. Some clients make an event of
// every block, and parse its data as JSON. So retry has no block of its own, and a heartbeat
// has data. The retry differs from client to client, so that they do not all return at once.
// With as=data an event is its data alone.
func sse(q *request) encoder {
	unnamed := q.intParam("names", 0, 1, 1) == 0
	dataOnly := q.as == "data"
	heartbeat := "event: beat\ndata: " + beatJSON + "\n\n"
	if dataOnly {
		heartbeat = "event: beat\ndata:\n\n"
	}
	return encoder{
		contentType: "text/event-stream; charset=utf-8",
		preamble:    fmt.Sprintf("retry: %d\n", 2000+mathrand.IntN(2000)),
		event: func(b []byte, e *event) []byte {
			if e.kind != "message" && !unnamed {
				b = append(append(append(b, "event: "...), e.kind...), '\n')
			}
			if dataOnly {
				text := lineEnds.Replace(asText(e.decode().Data))
				for line := range strings.SplitSeq(text, "\n") {
					b = append(append(append(b, "data: "...), line...), '\n')
				}
			} else {
				b = append(append(append(b, "data: "...), e.json...), '\n')
			}
			if e.id != 0 || e.kind == "hello" {
				b = append(strconv.AppendInt(append(b, "id: "...), e.id, 10), '\n')
			}
			return append(b, '\n')
		},
		heartbeat: heartbeat,
	}
}

// In this format a carriage return ends a line, too.
var lineEnds = strings.NewReplacer("\r\n", "\n", "\r", "\n")

// multipart, Netscape's server push of 1995: each part replaces the one before. A
// browser shows a part when it sees the boundary that ends it. So the boundary is sent
// right behind the part, together with the next part's headers: without those, Chromium
// shows each picture only when the next one comes. A heartbeat is an empty line in the
// part that has begun.
//
//	--8b1f…
//	Content-Type: application/json
//
//	{"id":1795351418000042,…}
//	--8b1f…
//	Content-Type: application/json
//
// The boundary is random, so no event can contain it.
func multipart(*request) encoder {
	enc, next := multipartOf("application/json; charset=utf-8")
	enc.event = func(b []byte, e *event) []byte { return append(append(b, e.json...), next...) }
	return enc
}

// multipartOf returns an encoder for parts of one type, and what goes between them.
func multipartOf(contentType string) (enc encoder, next string) {
	boundary := rand.Text()
	next = "\r\n--" + boundary + "\r\nContent-Type: " + contentType + "\r\n\r\n"
	return encoder{
		contentType: "multipart/x-mixed-replace; boundary=" + boundary,
		preamble:    next[2:],
		heartbeat:   "\r\n",
	}, next
}

// iframe, the forever frame (about 2000): a page in a hidden frame that never ends. The
// browser runs each <script> as it arrives, and the script hands its event to the page
// around the frame.
//
//	<script nonce="8b1f…">tell({"id":1795351418000042,…})</script>
//
// Only scripts with the nonce run, so an event cannot bring a script of its own.
func iframe(q *request) encoder {
	nonce := rand.Text()
	target := "location.origin"
	if q.permit.origin != "" {
		quoted, _ := json.Marshal(q.permit.origin)
		target = string(quoted)
	}
	open := `<script nonce="` + nonce + `">`
	const end = "</script>\n"
	tell := open + "tell("
	return encoder{
		contentType: "text/html; charset=utf-8",
		header:      map[string]string{"Content-Security-Policy": "default-src 'none'; script-src 'nonce-" + nonce + "'; base-uri 'none'; frame-ancestors " + q.permit.ancestors},
		preamble: "<!DOCTYPE html>\n<title>Cometes</title>\n" +
			open + "const tell = event => parent.postMessage(event, " + target + ")" + end,
		event: func(b []byte, e *event) []byte {
			return append(append(append(b, tell...), e.json...), ")"+end...)
		},
		heartbeat: tell + beatJSON + ")" + end,
	}
}

// ws: the messages on a WebSocket (RFC 6455, 2011). A message is an event, or several that
// are due at once, with newlines between them. With as=data a message is the data of one
// event that somebody published, and nothing else is sent.
func frames(q *request) encoder {
	if q.as == "data" {
		q.sub.maxBatchBytes = 1 // one event a message
		return encoder{
			choose: func(events []*event) []*event {
				return slices.DeleteFunc(events, func(e *event) bool { return e.publishedAt == 0 || e.kind == "presence" })
			},
			event: func(b []byte, e *event) []byte { return append(b, asText(e.decode().Data)...) },
		}
	}
	return encoder{
		batch: func(b []byte, _ *subscriber, events []*event) []byte {
			for i, e := range events {
				if i > 0 {
					b = append(b, '\n')
				}
				b = append(b, e.json...)
			}
			return b
		},
		heartbeat: beatJSON,
	}
}

const beatJSON = `{"type":"beat"}`

// Pages for people, without JavaScript.

// pageMessages is how many of the newest messages a page begins with.
const pageMessages = 50

// html, the page that never ends (about 1995): a browser shows what it has of a page
// while the rest is loading, so the server goes on sending.
//
//	<p><time>14:03</time> <b>ada</b> hi</p>
func endlessPage(q *request) encoder {
	s := q.server
	return encoder{
		contentType: "text/html; charset=utf-8",
		header:      map[string]string{"Content-Security-Policy": q.pagePolicy()},
		preamble:    s.pageHead(q, "") + "<main class=\"log endless\">\n",
		event:       func(b []byte, e *event) []byte { return append(b, s.eventHTML(e)...) },
		heartbeat:   "<!-- beat -->\n",
		last:        pageMessages,
	}
}

// refresh is client pull (Netscape, 1995): a whole page, and a header that has the
// browser load it again. This page has the form to publish with. A page that never ends
// has none: to post a form ends the page it is on.
//
//	Refresh: 10
func refresh(q *request) encoder {
	s := q.server
	wait := strconv.FormatInt(q.intParam("wait", 1, maxWait, 10), 10) // with 0 a browser asks thirty times a second
	return encoder{
		contentType: "text/html; charset=utf-8",
		header:      map[string]string{"Refresh": wait, "Content-Security-Policy": q.pagePolicy()},
		batch: func(b []byte, _ *subscriber, events []*event) []byte {
			return s.appendPage(append(b, s.pageHead(q, wait)...), events) // not before: now q's user is present
		},
		last: pageMessages,
	}
}

// plainHead is the simplest way to begin a page. One that refreshes itself has the form.
func plainHead(q *request, refresh string) string {
	head := "<!DOCTYPE html>\n<html lang=\"en\">\n<title>Cometes</title>\n"
	if refresh == "" {
		return head
	}
	return head + `<form method="post" action="../` + q.rooms[0] + `"><input type="hidden" name="then" value="refresh">` +
		`Name <input name="user" value="` + html.EscapeString(q.user) + `"> Message <input name="data" required> <button>Send</button></form>` + "\n"
}

// appendPage appends the body of a page, the newest message first.
func (s *server) appendPage(b []byte, events []*event) []byte {
	b = append(b, "<main class=\"log\">\n"...)
	for _, e := range slices.Backward(events[max(0, len(events)-pageMessages):]) {
		if e.kind != "hello" {
			b = append(b, s.eventHTML(e)...)
		}
	}
	return append(b, "</main>\n"...)
}

// pagePolicy is the Content-Security-Policy of a page: no script runs in it.
func (q *request) pagePolicy() string {
	return "default-src 'none'; style-src 'self'; img-src 'self' data:; frame-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors " + q.permit.ancestors
}

// decode returns fields of the event's JSON.
func (e *event) decode() (fields struct {
	Room, Type, From string
	Time             int64
	Data             json.RawMessage
}) {
	json.Unmarshal(e.json, &fields) // which the relay made, so it cannot fail
	return fields
}

// asText returns data for people: a string as it is, anything else as JSON.
func asText(data json.RawMessage) string {
	var text string
	if !bytes.HasPrefix(data, []byte(`"`)) || json.Unmarshal(data, &text) != nil {
		return string(data)
	}
	return text
}

// plainHTML returns an event as a line of a page, in the simplest form.
func plainHTML(e *event) []byte {
	f := e.decode()
	class, kind := e.kind, ""
	if class != "message" && class != "gap" {
		class, kind = "note", "<i>"+e.kind+"</i> "
	}
	return fmt.Appendf(nil, "<p class=%q>%s<b><bdi>%s</bdi></b> <span dir=\"auto\">%s</span></p>\n", class, kind, html.EscapeString(f.From), html.EscapeString(asText(f.Data)))
}

// The loop.

// A server is the relay as HTTP clients see it. Layers replace its function values.
type server struct {
	relay      *relay
	techniques []*technique
	heartbeat  time.Duration // a stream is never silent for longer
	maxAge     time.Duration // of a stream; 0 for no limit
	maxBody    int64         // bytes of a publish
	instance   string        // names this process in hello

	publish   func(publishRequest) (id int64, isNew bool, err error)
	image     func(contentType string, body []byte) (data []byte, err error) // what the event of a published image holds
	erase     func(room string) error
	setState  func(room, user, client, state string) error
	subscribe func(*subscriber, subscribeRequest) error
	pageHead  func(q *request, refresh string) string // begins a page, which may refresh itself after so many seconds
	eventHTML func(*event) []byte
	takeOver  func(http.ResponseWriter, *http.Request, *stream, *request) (taken bool, err error) // drives a stream in place of the loop
	count     counter
	refused   func(reason string) // counts what is refused

	activeAtStop atomic.Int64
}

func newServer(r *relay) *server {
	return &server{
		relay:      r,
		techniques: newTechniques(),
		heartbeat:  15 * time.Second,
		maxBody:    64 << 10,
		instance:   rand.Text()[:8],
		publish:    r.publish,
		image: func(string, []byte) ([]byte, error) {
			return nil, newError(http.StatusUnsupportedMediaType, "images of this type are not taken")
		},
		erase:     r.erase,
		setState:  r.setPresence,
		subscribe: r.subscribe,
		pageHead:  plainHead,
		eventHTML: plainHTML,
		count:     func(*technique, []*event, int, int64) {},
		refused:   func(string) {},
	}
}

// A scratch has the buffers to write with. A silent stream has none.
type scratch struct {
	events []*event
	buf    []byte
	count  counter
}

// A counter is called for what a technique writes: the events, how many bytes they take,
// and the time now in Unix milliseconds.
type counter func(t *technique, events []*event, bytes int, now int64)

const (
	writeTimeout = 10 * time.Second // a client that takes nothing for so long is gone
	writeChunk   = 16 << 10         // bytes that are written with one deadline
	maxAnswer    = 256 << 10        // bytes at which the answer to a poll ends
)

// serve answers a request for events.
func (s *server) serve(w http.ResponseWriter, r *http.Request, q *request, t *technique) error {
	enc := q.parseSubscribe(r.Header, t)
	if q.err != nil {
		return q.err
	}
	h := w.Header()
	h.Set("Cache-Control", "no-store, no-transform")
	h.Set("X-Accel-Buffering", "no") // nginx buffers otherwise
	if enc.contentType != "" {
		h.Set("Content-Type", enc.contentType)
	}
	for name, value := range enc.header {
		h.Set(name, value)
	}
	st := &stream{server: s, technique: t, enc: enc, quota: q.permit.quota}
	switch {
	case t.name == "ws":
		if err := checkUpgrade(w, r); err != nil {
			return err
		}
	case r.Method == http.MethodHead:
		return nil
	case t.mode == immediate:
		return st.serveOnce(w, r, q)
	}
	err := s.hold(st.quota, t)
	if err == nil {
		err = st.serveHeld(w, r, q)
	}
	if limit, ok := err.(httpError); ok && limit.retryAfter > 0 && t.name == "sse" {
		// An EventSource gives up for good on any status but 200.
		s.refused(limit.reason)
		return write(w, enc.encode([]byte(enc.preamble), &st.sub, s.bye()))
	}
	return err
}

// hold counts a request that is held, if it may be; release ends that.
func (s *server) hold(quota quota, t *technique) error {
	if s.relay.isStopping() {
		return errStopping
	}
	if err := quota.hold(); err != nil {
		return err
	}
	t.open.Add(1)
	return nil
}

func (s *server) release(quota quota, t *technique) {
	t.open.Add(-1)
	quota.release()
}

// active returns how many requests are held.
func (s *server) active() (n int64) {
	for _, t := range s.techniques {
		n += t.open.Load()
	}
	return n
}

// serveOnce answers a poll, or a long-poll when there is an event or its wait is over.
func (st *stream) serveOnce(w http.ResponseWriter, r *http.Request, q *request) error {
	q.sub.maxBatchBytes = maxAnswer
	if err := st.server.subscribe(&st.sub, q.sub); err != nil {
		return err
	}
	defer st.sub.unsubscribe()
	events := st.sub.next(nil)
	if st.technique.mode == longPoll {
		clock := time.NewTimer(q.wait)
		defer clock.Stop()
		for more := true; more && len(events) == 0; {
			more = st.sub.wait(r.Context(), clock.C)
			events = st.sub.next(events) // also at the end: there may be an event from just before the relay stopped
		}
	}
	return st.answer(w, events)
}

// answer writes events as a whole answer.
func (st *stream) answer(w http.ResponseWriter, events []*event) error {
	size := 0
	for _, e := range events {
		size += len(e.json)
	}
	if err := st.quota.reserve(size); err != nil {
		return err
	}
	b := st.enc.encode([]byte(st.enc.preamble), &st.sub, events...)
	w.Header().Set("Content-Length", strconv.Itoa(len(b)))
	st.server.count(st.technique, events, len(b), time.Now().UnixMilli())
	return write(w, b)
}

// A stream is what is known of one client while it is answered. For a poll, most of it is
// not used.
type stream struct {
	server         *server
	technique      *technique
	enc            encoder
	sub            subscriber
	quota          quota
	opened, closed bool         // hello was sent; bye was sent
	tokenExpiresAt int64        // Unix nanoseconds
	expiresAt      int64        // when its token or its age ends it, Unix nanoseconds
	heartbeatAt    atomic.Int64 // when a heartbeat is due, Unix nanoseconds
	heartbeatEvery int64        // nanoseconds

	send         func(sc *scratch, b []byte, events []*event) error // writes b, which holds the events
	headroom     int                                                // free bytes that send needs at the front of b
	unsubscribed func()                                             // see encoder.subscribe
}

// serveHeld answers a request that is held: a long-poll, or one that streams.
func (st *stream) serveHeld(w http.ResponseWriter, r *http.Request, q *request) error {
	s, t := st.server, st.technique
	if s.takeOver != nil {
		if taken, err := s.takeOver(w, r, st, q); taken {
			return err
		}
	}
	if t.mode == longPoll {
		defer s.release(st.quota, t)
		return st.serveOnce(w, r, q)
	}
	if err := st.open(q, nil); err != nil {
		return err
	}
	defer st.close()
	if t.name == "ws" {
		return st.webSocket(w, r, q)
	}
	rc := http.NewResponseController(w)
	st.send = func(_ *scratch, b []byte, _ []*event) error {
		if err := st.quota.unsent(len(b)); err != nil {
			return err
		}
		defer st.quota.unsent(-len(b))
		if write(w, b) != nil || rc.Flush() != nil {
			return errClientGone
		}
		return rc.SetWriteDeadline(time.Time{}) // over HTTP/2 a deadline would end a silent stream, too
	}
	return st.loop(r.Context())
}

// open subscribes the stream. The caller calls close, unless there was an error: then open
// has released everything.
func (st *stream) open(q *request, driver any) error {
	s := st.server
	q.sub.driver = driver
	q.sub.maxBatchBytes = cmp.Or(q.sub.maxBatchBytes, writeChunk) // so many wait, at most, for a client whose socket is full
	var err error
	if st.enc.subscribe != nil {
		st.unsubscribed, err = st.enc.subscribe(&st.sub, q.sub)
	} else {
		err = s.subscribe(&st.sub, q.sub)
	}
	if err != nil {
		s.release(st.quota, st.technique)
		return err
	}
	st.heartbeatEvery = int64(s.heartbeat*14/15 - mathrand.N(s.heartbeat/6)) // not all at once
	st.tokenExpiresAt = q.permit.expiresAt
	st.expiresAt = st.tokenExpiresAt
	if age := s.maxAge; age > 0 {
		age -= mathrand.N(age/10 + 1) // not all at once
		st.expiresAt = min(st.expiresAt, time.Now().Add(age).UnixNano())
	}
	return nil
}

func (st *stream) close() {
	st.sub.unsubscribe()
	if st.unsubscribed != nil {
		st.unsubscribed()
	}
	st.server.release(st.quota, st.technique)
}

// loop drives a stream: it writes what is due, and waits.
func (st *stream) loop(ctx context.Context) error {
	clock := time.NewTimer(0)
	defer clock.Stop()
	for {
		err := st.step(&scratch{count: st.server.count}, time.Now().UnixNano(), st.server.relay.isStopping())
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		clock.Reset(time.Until(time.Unix(0, min(st.heartbeatAt.Load(), st.expiresAt))))
		if !st.sub.wait(ctx, clock.C) && ctx.Err() != nil {
			return nil
		}
	}
}

// step writes all that is due at the time now, in Unix nanoseconds: hello at first, then
// the events after the cursor, the roster, and a heartbeat if there was nothing else. At the
// end of the stream it writes bye and returns io.EOF. The caller finds out beforehand whether
// the relay is stopping: so what was published before the stop comes before the bye.
func (st *stream) step(sc *scratch, now int64, stopping bool) error {
	if st.closed {
		return io.EOF
	}
	if err := st.begin(sc, now); err != nil {
		return err
	}
	expired := now >= st.expiresAt
	for more := !expired; more; more = st.sub.more {
		sc.events = st.sub.next(sc.events[:0])
		if st.sub.needsRoster && !st.sub.more {
			sc.events = st.sub.appendRosters(sc.events)
		}
		err := st.emit(sc, now, "", sc.events...)
		clear(sc.events) // so that they are freed when the log drops them
		if err != nil {
			return err
		}
	}
	if expired || stopping {
		st.closed = true
		return cmp.Or(st.emit(sc, now, "", st.server.bye()), io.EOF)
	}
	if !st.due(now) {
		return nil
	}
	st.heartbeatAt.Store(now + st.heartbeatEvery)
	if st.enc.beat != nil {
		return st.emit(sc, now, st.enc.beat(&st.sub))
	}
	return st.emit(sc, now, st.enc.heartbeat)
}

// begin writes hello, once.
func (st *stream) begin(sc *scratch, now int64) error {
	if st.opened {
		return nil
	}
	st.opened = true
	st.sub.wantRoster()
	preamble := st.enc.preamble
	st.enc.preamble, st.enc.header = "", nil // not needed again
	return st.emit(sc, now, preamble, st.hello())
}

// due reports whether a heartbeat is due, or the end of the stream. If the heartbeat is
// further off than it can be, the clock was set back; then it is due, too.
func (st *stream) due(now int64) bool {
	at := st.heartbeatAt.Load()
	return now >= min(at, st.expiresAt) || at-now > st.heartbeatEvery
}

// emit writes text, such as a preamble or a heartbeat, and events.
func (st *stream) emit(sc *scratch, now int64, text string, events ...*event) error {
	if st.enc.choose != nil {
		events = st.enc.choose(events)
	}
	if text == "" && len(events) == 0 && !st.closed {
		return nil
	}
	b := append(sc.buf[:0], make([]byte, st.headroom)...)
	b = append(b, text...)
	if len(events) > 0 {
		b = st.enc.encode(b, &st.sub, events...)
	}
	sc.buf = b
	st.heartbeatAt.Store(now + st.heartbeatEvery)
	sc.count(st.technique, events, len(b)-st.headroom, now/1e6)
	return st.send(sc, b, events)
}

func (st *stream) hello() *event {
	var data struct {
		Rooms    []string `json:"rooms"`
		Beat     int      `json:"beat"`
		Instance string   `json:"instance"`
	}
	for i := range st.sub.subscriptions {
		data.Rooms = append(data.Rooms, st.sub.subscriptions[i].room.name)
	}
	data.Beat, data.Instance = int(st.server.heartbeat/time.Second), st.server.instance
	return notice{Type: "hello", ID: &st.sub.cursor, Time: time.Now().UnixMilli(), Data: data}.event()
}

// bye tells a client to come back after some milliseconds: a second at least, and then at
// random, so that about a hundred clients a second return, but all within half a minute.
func (s *server) bye() *event {
	spread := min(max(s.active()*10, s.activeAtStop.Load()*10, 2000), 30_000)
	return notice{Type: "bye", Data: map[string]int64{"retry": 1000 + mathrand.Int64N(spread)}}.event()
}

// stop ends every stream.
func (s *server) stop() {
	s.activeAtStop.Store(s.active())
	s.relay.stop()
}

// write writes a part of an answer, or all of it, in chunks, and gives each of them
// writeTimeout. The last chunk goes out when the caller flushes, or the handler returns. It is
// not flushed here, deep within the handler, where that would make the stack of each
// goroutine larger.
func write(w http.ResponseWriter, b []byte) error {
	rc := http.NewResponseController(w)
	for len(b) > 0 {
		chunk := b[:min(len(b), writeChunk)]
		rc.SetWriteDeadline(time.Now().Add(writeTimeout))
		if _, err := w.Write(chunk); err != nil {
			return errClientGone
		}
		if b = b[len(chunk):]; len(b) > 0 && rc.Flush() != nil {
			return errClientGone
		}
	}
	return nil
}

// WebSocket.

// checkUpgrade says what a request for a WebSocket lacks.
func checkUpgrade(w http.ResponseWriter, r *http.Request) error {
	h, connection := r.Header, strings.ToLower(strings.Join(r.Header.Values("Connection"), ","))
	if r.Method != http.MethodGet || !r.ProtoAtLeast(1, 1) || !strings.EqualFold(h.Get("Upgrade"), "websocket") || !strings.Contains(connection, "upgrade") {
		if r.ProtoMajor == 1 { // HTTP/2 has no such headers
			w.Header().Set("Connection", "Upgrade")
			w.Header().Set("Upgrade", "websocket")
		}
		return newError(http.StatusUpgradeRequired, "this path is for a WebSocket; ask over HTTP/1.1, with Connection: Upgrade and Upgrade: websocket")
	}
	keys := h.Values("Sec-WebSocket-Key")
	if key, err := base64.StdEncoding.DecodeString(strings.Join(keys, "")); err != nil || len(key) != 16 || len(keys) != 1 || h.Get("Sec-WebSocket-Version") != "13" {
		w.Header().Set("Sec-WebSocket-Version", "13")
		return badRequest("a WebSocket is asked for with Sec-WebSocket-Version: 13, and 16 bytes in base64 as Sec-WebSocket-Key")
	}
	return nil
}

// acceptOptions are those of every WebSocket. The origin is not checked here, since a layer
// checks that of every request. The relay speaks no subprotocol, but accepts the first that is
// offered: browsers fail otherwise.
func acceptOptions(r *http.Request) *websocket.AcceptOptions {
	offered, _, _ := strings.Cut(strings.Join(r.Header.Values("Sec-WebSocket-Protocol"), ","), ",")
	return &websocket.AcceptOptions{InsecureSkipVerify: true, Subprotocols: []string{strings.TrimSpace(offered)}}
}

// webSocket drives a stream over a WebSocket. The loop writes; another goroutine reads what
// the client sends.
func (st *stream) webSocket(w http.ResponseWriter, r *http.Request, q *request) error {
	conn, err := websocket.Accept(w, r, acceptOptions(r))
	if err != nil {
		return nil // Accept has answered
	}
	defer conn.CloseNow()
	conn.SetReadLimit(st.server.maxBody)
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	write := func(b []byte) error {
		ctx, cancel := context.WithTimeout(ctx, writeTimeout)
		defer cancel()
		if conn.Write(ctx, websocket.MessageText, b) != nil {
			return errClientGone
		}
		return nil
	}
	var mu sync.Mutex // held while a message is answered, so that its ack comes before a bye
	st.send = func(_ *scratch, b []byte, _ []*event) error {
		mu.Lock()
		defer mu.Unlock()
		if st.closed && len(b) == 0 { // with as=data there is no bye
			return nil
		}
		return write(b)
	}
	author := st.author(q)
	go func() {
		defer cancel()
		for {
			kind, message, err := conn.Read(ctx)
			if err != nil {
				return
			}
			mu.Lock()
			if reply := st.server.handleMessage(author, kind, message); reply != nil {
				err = write(reply.event().json)
			}
			mu.Unlock()
			if err != nil {
				return
			}
		}
	}()
	if err = st.loop(ctx); err == nil && st.closed {
		conn.Close(st.closeCode())
	}
	return err
}

// closeCode says why the relay ends a WebSocket.
func (st *stream) closeCode() (websocket.StatusCode, string) {
	if time.Now().UnixNano() >= st.tokenExpiresAt {
		return websocket.StatusPolicyViolation, "the token has expired"
	}
	return websocket.StatusServiceRestart, "come back in a moment"
}

// An author is who publishes through a WebSocket. It is all that is kept of the request.
type author struct {
	user, client string
	room         string // where messages go that name no room; "" if the WebSocket reads several
	permit       *permit
	onlyKeyed    bool // only messages with a key are replied to
}

func (st *stream) author(q *request) *author {
	a := &author{user: q.user, client: q.sub.client, permit: q.permit, onlyKeyed: q.as == "data"}
	if len(st.sub.subscriptions) == 1 {
		a.room = st.sub.subscriptions[0].room.name // not the request's string, which would keep the request in memory
	}
	return a
}

// handleMessage publishes what a client sends through its WebSocket, and returns the reply, or
// nil. A message that is refused is replied to with an error, and the WebSocket stays open.
func (s *server) handleMessage(a *author, kind websocket.MessageType, message []byte) *notice {
	p, err := parseMessage(a, kind, message)
	id := int64(0)
	if err == nil {
		id, err = s.publishMessage(a, p)
	}
	if len(p.key) > maxKey {
		p.key = ""
	}
	if p.key == "" && (err == nil || a.onlyKeyed) {
		return nil
	}
	reply := &notice{Type: "ack", Key: p.key}
	if id != 0 { // presence has none
		reply.ID = &id
	}
	if err != nil {
		e, _ := err.(httpError)
		s.refused(e.reason)
		reply.Type, reply.ID, reply.Data = "error", e.id, err.Error()
	}
	return reply
}

// parseMessage reads a publish from a message. If the message is malformed, it still tries to
// find its key, for the reply.
func parseMessage(a *author, kind websocket.MessageType, message []byte) (p publishRequest, err error) {
	if kind != websocket.MessageText || !utf8.Valid(message) {
		return p, badRequest("a message must be text in UTF-8")
	}
	p = publishRequest{room: a.room, from: a.user, kind: "message"}
	if !bytes.HasPrefix(message, []byte("{")) {
		p.data = appendQuoted(nil, message)
		return p, nil
	}
	var data json.RawMessage
	var ttl *int64
	fields := map[string]any{"type": &p.kind, "room": &p.room, "key": &p.key, "ttl": &ttl, "if": &p.onlyIf, "data": &data}
	if err := parseObject(message, maxDepth+1, fields); err != nil {
		var only struct{ Key string }
		json.Unmarshal(message, &only)
		return publishRequest{key: only.Key}, err
	}
	p.data, p.kind = marshal(data), cmp.Or(p.kind, "message")
	if ttl != nil {
		if *ttl < 1 || *ttl > maxTTL {
			return p, badRequest("ttl must be 1 to %d seconds", maxTTL)
		}
		p.ttl = time.Duration(*ttl) * time.Second
	}
	return p, nil
}

// publishMessage publishes an event, or sets the state of the author.
func (s *server) publishMessage(a *author, p publishRequest) (id int64, err error) {
	if err := a.permit.quota.publish(); err != nil {
		return 0, err
	}
	if time.Now().UnixNano() >= a.permit.expiresAt { // the WebSocket is about to be closed
		return 0, limitError(http.StatusUnauthorized, "the token has expired", "token", 0)
	}
	if p.kind == "presence" {
		var state string
		json.Unmarshal(p.data, &state) // what is not a string leaves it empty, and is refused
		return 0, s.checkAndSetState(a.permit, p.room, a.user, a.client, state)
	}
	id, _, err = s.checkAndPublish(a.permit, p)
	return id, err
}

// Requests. What comes in is checked here, once; everything behind relies on that.

const (
	maxName  = 64        // characters of a name: of a room, type, client, callback or user
	maxKey   = 128       // bytes of a publish key
	maxRooms = 32        // in one request
	maxDepth = 64        // of nested JSON: parsers of other languages give up soon after
	maxTTL   = 24 * 3600 // seconds of a signal
	maxWait  = 55        // seconds of a long-poll: many proxies cut at 60
)

// A permit says what the client behind a request may do. A layer puts one into the
// request's context; without one a client may do anything, for ever.
type permit struct {
	user      string // if not empty, the only user that the client may be
	expiresAt int64  // Unix nanoseconds
	origin    string // of the page that asks, if it is not the relay's own; "*" if that is unknown
	ancestors string // which pages may frame the relay's, as in a Content-Security-Policy
	rights    rights
	quota     quota
}

// rights say which rooms a client may use.
type rights interface {
	read(room string) error
	write(room string) error
	operate(*http.Request) error // to list rooms, and to erase them
}

// A quota bounds what a client takes. Each function returns an error if it would be too much.
type quota interface {
	publish() error              // called before a publish, or a change of presence, is read
	publishTo(room string) error // called before an event is appended; may not block
	hold() error                 // called before a stream or long-poll; release is called after it
	release()
	reserve(bytes int) error // called before an answer is made that may be long
	unsent(bytes int) error  // called before a stream writes; and after, with as many below 0
}

// unlimited has all rights, and no quota.
type unlimited struct{}

func (unlimited) read(string) error           { return nil }
func (unlimited) write(string) error          { return nil }
func (unlimited) operate(*http.Request) error { return nil }
func (unlimited) publish() error              { return nil }
func (unlimited) publishTo(string) error      { return nil }
func (unlimited) hold() error                 { return nil }
func (unlimited) release()                    {}
func (unlimited) reserve(int) error           { return nil }
func (unlimited) unsent(int) error            { return nil }

func newPermit() *permit {
	return &permit{expiresAt: math.MaxInt64, ancestors: "*", rights: unlimited{}, quota: unlimited{}}
}

type permitKey struct{}

// withPermit returns the request and its permit, which a layer may change.
func withPermit(r *http.Request) (*http.Request, *permit) {
	p, ok := r.Context().Value(permitKey{}).(*permit)
	if !ok {
		p = newPermit()
		r = r.WithContext(context.WithValue(r.Context(), permitKey{}, p))
	}
	return r, p
}

// An httpError is an error that the client is told.
type httpError struct {
	status     int
	message    string
	reason     string // for counting, if it is a limit or about access
	retryAfter int    // seconds
	id         *int64 // with status 412: that of the room's newest message
}

func (e httpError) Error() string { return e.message }

func newError(status int, message string) httpError {
	return httpError{status: status, message: message}
}

func badRequest(format string, args ...any) error {
	return newError(http.StatusBadRequest, fmt.Sprintf(format, args...))
}

func limitError(status int, message, reason string, retryAfter int) httpError {
	return httpError{status: status, message: message, reason: reason, retryAfter: retryAfter}
}

// conflict is the error of a publish whose if is not the newest message.
func conflict(newest int64) error {
	message := "another message was published to this room since; its id is the one to go on from"
	if newest == 0 {
		message = "this room has no message; if=0 publishes the first"
	}
	return httpError{status: http.StatusPreconditionFailed, message: message, id: &newest}
}

var (
	errClientGone = errors.New("the client left, or takes nothing")
	errReserved   = newError(http.StatusForbidden, "rooms whose names begin with _ belong to the relay; publish to another")
	errTooBig     = limitError(http.StatusRequestEntityTooLarge, "the body is too big; the flag -body of the relay sets the limit", "body", 0)
	errUser       = badRequest("user must be 1 to %d characters of UTF-8, at least one of them visible; no control character, line separator or bidirectional control, and no space at either end", maxName)
	errOneRoom    = badRequest("presence is set in one room; name it")
	errIf         = badRequest("if must be the id of a message, or 0")
)

// Headers that every answer to a publish has. They are made once, which saves time.
var (
	nosniff  = []string{"nosniff"}
	jsonUTF8 = []string{"application/json; charset=utf-8"}
)

// ServeHTTP answers a request.
func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) { s.answer(w, r, s.route) }

// answer calls do. If that returns an error, the client is told.
func (s *server) answer(w http.ResponseWriter, r *http.Request, do func(http.ResponseWriter, *http.Request) error) {
	h := w.Header()
	h["X-Content-Type-Options"] = nosniff
	if r.Method != http.MethodPost { // no cache keeps the answer to a POST, and there are no links in it
		h.Set("Cache-Control", "no-store")
		h.Set("Referrer-Policy", "same-origin") // a URL may hold a token
	}
	err := do(w, r)
	if err == nil {
		return
	}
	e, ok := err.(httpError)
	if !ok {
		if r.Context().Err() != nil || errors.Is(err, errClientGone) {
			return
		}
		id := rand.Text()[:8]
		e = newError(http.StatusInternalServerError, "the relay failed; its log says why, under "+id)
		slog.Error("request failed", "id", id, "method", r.Method, "path", r.URL.Path, "error", err)
	}
	s.refused(e.reason)
	if e.retryAfter > 0 {
		h.Set("Retry-After", strconv.Itoa(e.retryAfter))
	}
	if e.status == http.StatusUnauthorized {
		h.Set("WWW-Authenticate", "Bearer")
	}
	body := map[string]any{"error": e.message}
	if e.id != nil {
		body["id"] = *e.id
	}
	writeJSON(w, e.status, body)
	if e.status < 500 && e.status != http.StatusRequestTimeout {
		discardBody(w, r)
	}
}

// discardBody reads what is left of a refused body, for up to a second, if the connection is
// going to be closed. Many clients read the answer only when they have sent the whole body. To
// close a connection with unread bytes resets it, and such a client would not see the answer.
// net/http itself reads what is left only if the connection stays open, and up to 256 KB.
func discardBody(w http.ResponseWriter, r *http.Request) {
	closes := r.Close || r.ContentLength > 256<<10 || w.Header().Get("Connection") == "close"
	if r.ProtoMajor != 1 || !closes || r.Body == http.NoBody || r.Header.Get("Expect") != "" {
		return
	}
	rc := http.NewResponseController(w)
	rc.Flush()
	rc.SetReadDeadline(time.Now().Add(time.Second))
	io.Copy(io.Discard, r.Body)
}

func writeJSON(w http.ResponseWriter, status int, v any) {
	b, _ := json.Marshal(v)
	w.Header()["Content-Type"] = jsonUTF8
	w.WriteHeader(status)
	w.Write(append(b, '\n'))
}

var (
	roomMethods     = []string{"POST", "PUT", "DELETE", "OPTIONS"}
	presenceMethods = []string{"GET", "HEAD", "POST", "OPTIONS"}
	readMethods     = []string{"GET", "HEAD", "OPTIONS"}
)

// route finds out what a path asks for. It is not http.ServeMux, which would redirect some
// paths. It uses the escaped path, where a slash within a name is not taken for a separator.
func (s *server) route(w http.ResponseWriter, r *http.Request) error {
	path, ok := strings.CutPrefix(r.URL.EscapedPath(), "/rooms/")
	if !ok {
		return newError(http.StatusNotFound, "there is nothing here; rooms are at /rooms/{room}")
	}
	name, verb, _ := strings.Cut(path, "/")
	rooms, err := parseRooms(name)
	if err != nil {
		return err
	}
	_, p := withPermit(r)
	q := &request{server: s, rooms: rooms, permit: p}
	switch verb {
	case "":
		return s.handle(w, r, q, roomMethods, p.rights.write, s.handleRoom)
	case "presence":
		return s.handle(w, r, q, presenceMethods, p.rights.read, s.handlePresence)
	}
	if t := s.technique(verb); t != nil {
		return s.handle(w, r, q, readMethods, p.rights.read, func(w http.ResponseWriter, r *http.Request, q *request) error {
			return s.serve(w, r, q, t)
		})
	}
	return newError(http.StatusNotFound, "there is no such technique; the techniques are "+s.techniqueNames())
}

// technique returns the technique of that name, or nil.
func (s *server) technique(name string) *technique {
	for _, t := range s.techniques {
		if t.name == name {
			return t
		}
	}
	return nil
}

func (s *server) techniqueNames() string {
	var names []string
	for _, t := range s.techniques {
		names = append(names, t.name)
	}
	return strings.Join(names, " ")
}

// A handler answers a request, or returns an error for the client.
type handler func(http.ResponseWriter, *http.Request, *request) error

// handle calls do if the method is one of methods, and may allows each room. It answers
// OPTIONS itself.
func (s *server) handle(w http.ResponseWriter, r *http.Request, q *request, methods []string, may func(room string) error, do handler) (err error) {
	isAllowed := slices.Contains(methods, r.Method)
	if !isAllowed || r.Method == http.MethodOptions {
		allowed := strings.Join(methods, ", ")
		w.Header().Set("Allow", allowed)
		if isAllowed {
			w.WriteHeader(http.StatusNoContent)
			return nil
		}
		message := r.Method + " is not allowed here; " + allowed + " are"
		if slices.Contains(methods, http.MethodPut) {
			message += ". Events are read from /rooms/{room}/{technique}: " + s.techniqueNames()
		}
		return newError(http.StatusMethodNotAllowed, message)
	}
	if q.values, err = url.ParseQuery(r.URL.RawQuery); err != nil {
		return badRequest("the query is malformed: %v", err)
	}
	for _, room := range q.rooms {
		if err := may(room); err != nil {
			return err
		}
	}
	if r.Method == http.MethodPost || r.Method == http.MethodPut {
		if err := q.permit.quota.publish(); err != nil {
			return err
		}
	}
	return do(w, r, q)
}

// A request is what an HTTP request asks for.
type request struct {
	server *server
	rooms  []string
	values url.Values // the parameters
	isForm bool       // the body is a form; its fields are parameters, too
	permit *permit
	err    error // the first error of a parameter

	user string           // who asks
	as   string           // the representation
	wait time.Duration    // of a long-poll
	sub  subscribeRequest // what it reads
}

// fail keeps the first error. All parameters are read before q.err is checked.
func (q *request) fail(err error) { q.err = cmp.Or(q.err, err) }

// param returns a parameter, or "". To give one twice is an error.
func (q *request) param(name string) string {
	values := q.values[name]
	if len(values) == 0 {
		return ""
	}
	if len(values) > 1 {
		q.fail(badRequest("%s is given twice", name))
	}
	return values[0]
}

// add adds values of a parameter that came with the body or a header. It is no error if they
// are the same as in the query.
func (q *request) add(name string, values ...string) {
	given := q.values[name]
	if len(given) == 1 && len(values) == 1 && (given[0] == "" || given[0] == values[0]) {
		given = nil
	}
	q.values[name] = append(given, values...)
}

// intParam returns a parameter as an integer from low to high, or absent.
func (q *request) intParam(name string, low, high, absent int64) int64 {
	v := q.param(name)
	if v == "" {
		return absent
	}
	n, err := strconv.ParseInt(v, 10, 64)
	if err != nil || n < low || n > high || v[0] == '+' {
		q.fail(badRequest("%s must be an integer from %d to %d", name, low, high))
	}
	return n
}

// parseSubscribe reads what a technique takes, and returns its encoder.
func (q *request) parseSubscribe(header http.Header, t *technique) encoder {
	q.user = strings.Clone(q.userParam()) // a clone does not keep the whole URL in memory
	q.sub = subscribeRequest{rooms: q.rooms, client: strings.Clone(q.clientParam()), longLived: t.mode != immediate, cursor: q.cursorParam(header)}
	q.wait = time.Duration(q.intParam("wait", 0, maxWait, 25)) * time.Second
	q.wait = min(q.wait, time.Until(time.Unix(0, q.permit.expiresAt)))
	switch presence := q.param("presence"); presence {
	case "":
		if q.param("user") != "" {
			q.sub.user, q.sub.seesPresence = q.user, true
		}
	case "0", "1":
		q.sub.seesPresence = presence == "1"
	default:
		q.fail(badRequest("presence must be 1, to receive it, or 0"))
	}
	enc := q.representation(t)(q)
	q.sub.last = int(q.intParam("last", 0, math.MaxInt32, int64(enc.last)))
	return enc
}

// representation returns the encoder that the parameter as asks for. Another technique's as is
// ignored, like any other parameter of it; but not data, without which a client would fail.
func (q *request) representation(t *technique) newEncoder {
	as := q.param("as")
	if enc, ok := t.as[as]; ok {
		q.as = as
		return enc
	}
	if as == "data" || as != "" && t.name == "multipart" {
		others := cmp.Or(strings.Join(slices.Sorted(maps.Keys(t.as)), ", "), "none")
		q.fail(badRequest("%s has no as=%.80s; it has %s", t.name, as, others))
	}
	return t.encoder
}

var joinWords = strings.NewReplacer("-", "", "_", "")

// cursorParam returns the cursor, or -1. The header Last-Event-ID counts first, then
// lastEventId in the query, then after. Clients that cannot set the header, such as
// EventSource polyfills and Mercure's, spell it in many ways: lastEventID, last-event-id.
// Some add theirs to a URL that has one already: they have got as far as the greatest.
func (q *request) cursorParam(header http.Header) int64 {
	var ids []string
	for name, values := range q.values {
		if strings.EqualFold(joinWords.Replace(name), "lastEventId") {
			ids = append(ids, values...)
		}
	}
	if len(ids) > 0 {
		greatest := slices.MaxFunc(ids, func(a, b string) int { return cmp.Or(cmp.Compare(len(a), len(b)), strings.Compare(a, b)) })
		q.values["lastEventId"] = []string{greatest}
	}
	q.values["Last-Event-ID"] = header.Values("Last-Event-ID")
	cursor := q.intParam("after", 0, math.MaxInt64, -1)
	cursor = q.intParam("lastEventId", 0, math.MaxInt64, cursor)
	return q.intParam("Last-Event-ID", 0, math.MaxInt64, cursor)
}

// userParam returns the user who asks, or "".
func (q *request) userParam() string {
	user := q.param("user")
	if !validUser(user) {
		q.fail(errUser)
	}
	if q.permit.user == "" {
		return user
	}
	if user != "" && user != q.permit.user {
		q.fail(limitError(http.StatusForbidden, fmt.Sprintf("the token is for the user %q, and nobody else", q.permit.user), "token", 0))
	}
	return q.permit.user
}

func (q *request) clientParam() string {
	client := q.param("client")
	if client != "" && !validName(client) {
		q.fail(badRequest("client must be 1 to %d of A-Z a-z 0-9 _ . : -", maxName))
	}
	return client
}

func badRoom(name string) error {
	return badRequest("%.80q cannot be the name of a room, which is 1 to %d of A-Z a-z 0-9 _ . : -", name, maxName)
}

func parseRooms(escaped string) ([]string, error) {
	list, err := url.PathUnescape(escaped)
	if err != nil {
		return nil, badRequest("the path is malformed: %v", err)
	}
	rooms := strings.Split(list, ",")
	if len(rooms) > maxRooms {
		return nil, badRequest("these are %d rooms; one request can name %d", len(rooms), maxRooms)
	}
	for i, room := range rooms {
		if !validName(room) {
			return nil, badRoom(room)
		}
		if slices.Contains(rooms[:i], room) {
			return nil, badRequest("the room %q is named twice", room)
		}
	}
	return rooms, nil
}

// validName reports whether s can name a room, a type or a client. It is a loop and not a
// regular expression, since every publish calls it three times.
func validName(s string) bool {
	for i := range len(s) {
		switch c := s[i]; {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '_', c == '.', c == ':', c == '-':
		default:
			return false
		}
	}
	return 1 <= len(s) && len(s) <= maxName
}

var callbackPattern = regexp.MustCompile(`^[A-Za-z_$][A-Za-z0-9_$]*(\.[A-Za-z_$][A-Za-z0-9_$]*)*$`)

// validCallback reports whether s is a JavaScript name, or several with dots between
// them, in ASCII.
func validCallback(s string) bool { return len(s) <= maxName && callbackPattern.MatchString(s) }

// validUser reports whether s can name a user, or is "", which names nobody. A name is shown
// beside others, so it must be visible, and must not reverse the text next to it.
func validUser(s string) bool {
	return utf8.ValidString(s) && utf8.RuneCountInString(s) <= maxName && strings.TrimSpace(s) == s &&
		(s == "" || strings.ContainsFunc(s, visible)) &&
		!strings.ContainsFunc(s, func(r rune) bool {
			return unicode.IsControl(r) || unicode.In(r, unicode.Bidi_Control, unicode.Zl, unicode.Zp)
		})
}

// visible reports whether one sees r.
func visible(r rune) bool {
	const brailleBlank = 0x2800
	return unicode.IsGraphic(r) && !unicode.IsSpace(r) && !unicode.Is(unicode.Other_Default_Ignorable_Code_Point, r) && r != brailleBlank
}

// reservedTypes are those of events that only the relay makes.
var reservedTypes = []string{"hello", "presence", "gap", "beat", "ack", "error", "bye"}

// checkAndPublish checks everything but data and ttl, and publishes.
func (s *server) checkAndPublish(by *permit, p publishRequest) (id int64, isNew bool, err error) {
	switch {
	case p.room == "":
		err = badRequest("this WebSocket reads several rooms; name the one to publish to")
	case !validName(p.room):
		err = badRoom(p.room)
	case !validName(p.kind):
		err = badRequest("%.80q cannot be a type, which is 1 to %d of A-Z a-z 0-9 _ . : -", p.kind, maxName)
	case slices.Contains(reservedTypes, p.kind):
		err = badRequest("the type %s is the relay's own; publish another", p.kind)
	case p.onlyIf != nil && *p.onlyIf < 0:
		err = errIf
	case len(p.key) > maxKey || !utf8.ValidString(p.key) || strings.ContainsFunc(p.key, unicode.IsControl):
		err = badRequest("key must be at most %d bytes of UTF-8, without control characters", maxKey)
	case p.room[0] == '_':
		err = errReserved
	default:
		err = by.rights.write(p.room)
	}
	if err != nil {
		return 0, false, err
	}
	room := p.room
	p.allow = func() error { return by.quota.publishTo(room) }
	return s.publish(p)
}

// checkAndSetState checks everything, and sets the state of a user in a room.
func (s *server) checkAndSetState(by *permit, room, user, client, state string) error {
	if !validName(room) {
		return errOneRoom
	}
	if err := by.rights.read(room); err != nil {
		return err
	}
	switch {
	case room[0] == '_':
		return errReserved
	case user == "":
		return badRequest("presence needs a user; name one")
	case !slices.Contains(presenceStates, state):
		return badRequest("the state must be online, typing, away or offline")
	}
	return s.setState(room, user, client, state)
}

// handleRoom is POST, PUT and DELETE /rooms/{room}.
func (s *server) handleRoom(w http.ResponseWriter, r *http.Request, q *request) error {
	if len(q.rooms) > 1 {
		return badRequest("name one room; events are published to one at a time, and rooms are erased one at a time")
	}
	if r.Method != http.MethodDelete {
		return s.handlePublish(w, r, q)
	}
	if q.rooms[0][0] == '_' {
		return errReserved
	}
	if err := q.permit.rights.operate(r); err != nil {
		return err
	}
	if err := s.erase(q.rooms[0]); err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

func (s *server) handlePublish(w http.ResponseWriter, r *http.Request, q *request) error {
	p, err := s.parsePublish(w, r, q)
	if err != nil {
		return err
	}
	id, isNew, err := s.checkAndPublish(q.permit, p)
	if err != nil {
		return err
	}
	if then := q.param("then"); q.isForm && (then == "form" || then == "refresh") {
		// Back to the page with the form. The address is relative, since a proxy may add a prefix.
		to := "./" + p.room + "/" + then + "?" + url.Values{"user": {p.from}}.Encode()
		if then == "form" {
			to += "#data" // gives the field the focus; not for refresh, since Chromium would not refresh a page with a fragment
		}
		w.Header().Set("Location", to)
		w.WriteHeader(http.StatusSeeOther)
		return nil
	}
	status := http.StatusOK
	if isNew {
		status = http.StatusCreated
	}
	w.Header()["Content-Type"] = jsonUTF8
	w.WriteHeader(status)
	b := append(make([]byte, 0, 32), `{"id":`...)
	w.Write(append(strconv.AppendInt(b, id, 10), "}\n"...))
	return nil
}

// parsePublish reads a publish from a request's query, headers and body.
func (s *server) parsePublish(w http.ResponseWriter, r *http.Request, q *request) (p publishRequest, err error) {
	body, contentType, err := s.readContent(w, r, q, "data")
	if err != nil {
		return p, err
	}
	if keys := r.Header["Idempotency-Key"]; strings.Join(keys, "") != "" {
		q.add("key", keys...)
	}
	p.room, p.from, p.key = q.rooms[0], q.userParam(), q.param("key")
	p.kind = cmp.Or(q.param("type"), "message")
	p.ttl = time.Duration(q.intParam("ttl", 1, maxTTL, 0)) * time.Second
	if q.values.Has("if") {
		p.onlyIf = new(q.intParam("if", 0, math.MaxInt64, -1)) // -1, of an empty one, is refused
	}
	switch {
	case q.err != nil:
		err = q.err
	case strings.HasPrefix(contentType, "image/"):
		p.kind = cmp.Or(q.param("type"), "image")
		p.data, err = s.image(contentType, body)
	case isJSON(contentType):
		if err = checkJSON(body, maxDepth); err == nil {
			p.data = marshal(json.RawMessage(body))
		}
	case !utf8.Valid(body):
		err = badRequest("the body is not UTF-8; the relay carries text and JSON")
	default:
		p.data = appendQuoted(nil, body)
	}
	return p, err
}

// handlePresence is GET and POST /rooms/{room}/presence.
func (s *server) handlePresence(w http.ResponseWriter, r *http.Request, q *request) error {
	if len(q.rooms) > 1 {
		return errOneRoom
	}
	room := q.rooms[0]
	if r.Method != http.MethodPost {
		if err := q.permit.quota.reserve(s.relay.users(room) * rosterCost); err != nil {
			return err
		}
		ros := s.relay.roster(room)
		ros.Room = room
		writeJSON(w, http.StatusOK, ros)
		return nil
	}
	body, contentType, err := s.readContent(w, r, q, "state")
	if err != nil {
		return err
	}
	state := string(body)
	if !q.isForm {
		state = strings.TrimSpace(state)
	}
	if isJSON(contentType) || strings.HasPrefix(state, "{") {
		state = ""
		if err := parseObject(body, maxDepth, map[string]any{"state": &state}); err != nil {
			return err
		}
	}
	user, client := q.userParam(), q.clientParam()
	if q.err != nil {
		return q.err
	}
	if err := s.checkAndSetState(q.permit, room, user, client, state); err != nil {
		return err
	}
	writeJSON(w, http.StatusOK, map[string]string{"room": room, "user": user, "state": state})
	return nil
}

// mediaType returns the type of the body, and an error if that is compressed or not UTF-8.
func mediaType(h http.Header) (string, error) {
	given := h.Get("Content-Type")
	contentType, params, err := mime.ParseMediaType(given)
	if err != nil { // of application/json; utf-8 for example, the type is good
		contentType, _, _ = strings.Cut(strings.ReplaceAll(given, ",", ";"), ";")
		contentType = strings.ToLower(strings.TrimSpace(contentType))
	}
	encoding, charset := h.Get("Content-Encoding"), strings.ToLower(params["charset"])
	if encoding != "" && encoding != "identity" || !slices.Contains([]string{"", "utf-8", "utf8", "us-ascii"}, charset) {
		return "", newError(http.StatusUnsupportedMediaType, fmt.Sprintf("the body must be in UTF-8, and not compressed; this has the encoding %q and the charset %q", encoding, charset))
	}
	return contentType, nil
}

// readBody reads a body of at most maxBody bytes.
func (s *server) readBody(w http.ResponseWriter, r *http.Request) ([]byte, error) {
	if r.ContentLength > s.maxBody {
		return nil, errTooBig // at once, so that a client that expects 100-continue sends nothing
	}
	b, err := io.ReadAll(http.MaxBytesReader(w, r.Body, s.maxBody))
	_, tooBig := errors.AsType[*http.MaxBytesError](err)
	switch limit, ok := errors.AsType[httpError](err); {
	case tooBig:
		return nil, errTooBig
	case ok:
		w.Header().Set("Connection", "close") // otherwise net/http would wait for the rest first
		return nil, limit
	case errors.Is(err, os.ErrDeadlineExceeded):
		w.Header().Set("Connection", "close")
		return nil, limitError(http.StatusRequestTimeout, "the body did not arrive in time", "body", 0)
	case err != nil:
		return nil, badRequest("the body is incomplete")
	}
	return bytes.TrimPrefix(b, []byte("\ufeff")), nil // a byte order mark, as in files of Windows
}

// readContent reads the body and its media type. Of a form it returns the field of that name,
// and the other fields become parameters. curl -d declares any text as a form; so a form
// without the field is taken as text.
func (s *server) readContent(w http.ResponseWriter, r *http.Request, q *request, field string) (b []byte, contentType string, err error) {
	if contentType, err = mediaType(r.Header); err == nil {
		b, err = s.readBody(w, r)
	}
	if err != nil {
		return nil, "", err
	}
	var form url.Values
	switch contentType {
	case "application/x-www-form-urlencoded":
		form = parseForm(string(b))
		if !form.Has(field) || !bytes.Contains(b, []byte(field+"=")) {
			return b, contentType, nil
		}
	case "multipart/form-data":
		r.Body = io.NopCloser(bytes.NewReader(b))
		if err := r.ParseMultipartForm(s.maxBody); err != nil || !url.Values(r.MultipartForm.Value).Has(field) {
			return nil, "", badRequest("the form has no field %s", field)
		}
		form = r.MultipartForm.Value
	default:
		return b, contentType, nil
	}
	if len(form[field]) > 1 {
		return nil, "", badRequest("%s is given twice", field)
	}
	q.isForm = true
	for name, values := range form {
		q.add(name, values...)
	}
	return []byte(form.Get(field)), contentType, nil
}

var percent = regexp.MustCompile(`%[0-9A-Fa-f]{0,2}`)

// parseForm reads a form as browsers do (https://url.spec.whatwg.org/#urlencoded-parsing):
// what people write with curl -d may hold a ; or a % that encodes nothing, and means itself.
func parseForm(body string) url.Values {
	body = percent.ReplaceAllStringFunc(strings.ReplaceAll(body, ";", "%3B"), func(s string) string {
		if len(s) < len("%3B") {
			return "%25" + s[1:]
		}
		return s
	})
	form, _ := url.ParseQuery(body)
	return form
}

// JSON that every parser takes.

func isJSON(contentType string) bool {
	return contentType == "application/json" || contentType == "text/json" || strings.HasSuffix(contentType, "+json") // RFC 6839
}

// marshal returns v as one line of JSON. Like json.Marshal does with U+2028, it escapes
// U+0085, where Python's str.splitlines would end the line.
func marshal(v any) []byte {
	b, _ := json.Marshal(v)
	if bytes.Contains(b, []byte("\u0085")) {
		b = bytes.ReplaceAll(b, []byte("\u0085"), []byte(`\u0085`))
	}
	return b
}

// appendQuoted appends text as a JSON string. Most text needs only quotes around it, which is
// faster.
func appendQuoted(b, text []byte) []byte {
	for _, c := range text {
		if c < ' ' || c > '~' || strings.IndexByte(`"\<>&`, c) >= 0 {
			return append(b, marshal(string(text))...)
		}
	}
	b = slices.Grow(b, len(text)+2)
	return append(append(append(b, '"'), text...), '"')
}

var (
	goodEscapes   = regexp.MustCompile(`\\\\|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}`)
	loneSurrogate = regexp.MustCompile(`\\u[dD][89a-fA-F]`)
)

// checkJSON refuses what a parser stricter than Go's would refuse (I-JSON, RFC 7493): half of a
// surrogate pair, a number beyond a double, a name twice in one object, and nesting deeper
// than depth.
func checkJSON(b []byte, depth int) error {
	switch {
	case !utf8.Valid(b):
		return badRequest("this is not UTF-8")
	case !json.Valid(b):
		return badRequest("this is not JSON; send text as text/plain")
	case loneSurrogate.Match(b) && loneSurrogate.Match(goodEscapes.ReplaceAll(b, nil)):
		return badRequest("this JSON has half of a surrogate pair")
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.UseNumber()
	return checkValue(d, depth)
}

// checkValue checks the next value, which may be nested to this depth.
func checkValue(d *json.Decoder, depth int) error {
	token, _ := d.Token()
	if n, ok := token.(json.Number); ok {
		if _, err := n.Float64(); err != nil {
			return badRequest("this JSON has a number beyond what a double holds: %.80s", n)
		}
	}
	open, ok := token.(json.Delim)
	if !ok {
		return nil
	}
	if depth == 0 {
		return badRequest("this JSON is nested deeper than %d", maxDepth)
	}
	names := map[json.Token]bool{}
	for d.More() {
		if open == '{' {
			name, _ := d.Token()
			if names[name] {
				return badRequest("this JSON has the name %.80q twice in one object", name)
			}
			names[name] = true
		}
		if err := checkValue(d, depth-1); err != nil {
			return err
		}
	}
	d.Token() // the closing bracket
	return nil
}

// parseObject reads fields of a JSON object, by their exact names: json.Unmarshal would
// ignore case.
func parseObject(b []byte, depth int, fields map[string]any) error {
	if err := checkJSON(b, depth); err != nil {
		return err
	}
	var raw map[string]json.RawMessage
	err := json.Unmarshal(b, &raw)
	for name, to := range fields {
		if v, ok := raw[name]; ok && err == nil {
			err = json.Unmarshal(v, to)
		}
	}
	if err != nil {
		return badRequest("a field of this JSON has the wrong type")
	}
	return nil
}
