// Tests of the techniques, as clients see them. Most run in a bubble of
// testing/synctest, a real http.Server at one end of net.Pipe and a real client
// at the other, so they can say "after 25 s" and mean it exactly. Read first
// the testbed, then the ears, which take apart what each technique sends,
// then TestTechniques, which asks the same of all of them.

package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"html"
	"io"
	"log/slog"
	"math"
	mathrand "math/rand/v2"
	"mime"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"reflect"
	"regexp"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"

	"github.com/coder/websocket"
)

// A testbed is a relay that serves, with the connections made to it.
type testbed struct {
	*app
	t       testing.TB
	network string
	tattle  bool   // that a client left while something was written to it
	url     string // http://cometes.test
	client  *http.Client
	dial    func(context.Context) (net.Conn, error)
	stop    context.CancelFunc // what SIGTERM does
	served  chan error         // what serve returned, once

	mu    sync.Mutex
	conns []net.Conn
}

// The networks of a testbed. All but tcp are in memory, for bubbles.
const (
	pipe   = "pipe"    // HTTP/1.1 over net.Pipe: a client that does not read has no buffer
	pipe10 = "pipe1.0" // HTTP/1.0, which nginx speaks to what is behind it unless told otherwise
	pipeH2 = "pipeH2"  // HTTP/2 without TLS
	tcp    = "tcp"     // HTTP/1.1 over loopback, sockets of the kernel
)

// techniques are those of every server.
var techniques = newTechniques()

func newBed(t testing.TB, network string, tune ...func(*config)) *testbed {
	t.Helper()
	c, err := parseFlags(nil, func(string) string { return "" })
	if err != nil {
		t.Fatal(err)
	}
	for _, change := range tune {
		change(&c)
	}
	s, err := newApp(c)
	if err != nil {
		t.Fatal(err)
	}
	before := slog.Default()
	b := &testbed{app: s, t: t, network: network, url: "http://cometes.test", served: make(chan error, 1)}
	slog.SetDefault(slog.New(tattler{b}))
	var listener net.Listener
	if network == tcp {
		listener, err = net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		b.url = "http://" + listener.Addr().String()
		b.dial = func(ctx context.Context) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "tcp", listener.Addr().String())
		}
	} else {
		l := &pipeListener{conns: make(chan net.Conn), closed: make(chan struct{})}
		listener, b.dial = l, l.dial
	}
	plain := b.dial
	b.dial = func(ctx context.Context) (net.Conn, error) {
		conn, err := plain(ctx)
		if err != nil {
			return nil, err
		}
		if network == pipe10 {
			conn = &oldConn{Conn: conn}
		}
		b.mu.Lock()
		b.conns = append(b.conns, conn)
		b.mu.Unlock()
		return conn, nil
	}
	srv := s.http(false)
	if network == pipeH2 {
		srv.Protocols = new(http.Protocols)
		srv.Protocols.SetHTTP1(true)
		srv.Protocols.SetUnencryptedHTTP2(true)
	}
	b.client = b.newClient(b.dial, network == pipeH2)
	var ctx context.Context
	ctx, b.stop = context.WithCancel(context.Background())
	go func() { b.served <- serve(ctx, s, srv, listener) }()

	t.Cleanup(func() {
		b.hangUp()
		b.settle()
		b.stop()
		if err := <-b.served; err != nil {
			t.Errorf("serve: %v", err)
		}
		b.idle()
		slog.SetDefault(before)
	})
	return b
}

func (b *testbed) newClient(dial func(context.Context) (net.Conn, error), h2 bool) *http.Client {
	p := new(http.Protocols)
	p.SetHTTP1(!h2)
	p.SetUnencryptedHTTP2(h2)
	return &http.Client{
		Transport: &http.Transport{
			DialContext:        func(ctx context.Context, _, _ string) (net.Conn, error) { return dial(ctx) },
			DisableCompression: true,
			Protocols:          p,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

// hangUp closes every connection at the client's end.
func (b *testbed) hangUp() {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, conn := range b.conns {
		conn.Close()
	}
	b.conns = nil
	b.client.CloseIdleConnections()
}

// settle waits until everybody waits for somebody; over sockets, where that
// can't be known, until those who left are gone.
func (b *testbed) settle() {
	b.mu.Lock()
	left := len(b.conns) == 0
	b.mu.Unlock()
	if b.network != tcp {
		synctest.Wait()
	} else if left {
		b.until(func() bool { return b.readers() == 0 && b.active() == 0 })
	}
}

// until waits for what will be, and reports whether it is.
func (b *testbed) until(is func() bool) bool {
	if b.network != tcp {
		synctest.Wait()
		return is()
	}
	for end := time.Now().Add(10 * time.Second); !is(); runtime.Gosched() {
		if time.Now().After(end) {
			return false
		}
	}
	return true
}

// idle fails unless nobody is subscribed, which every test has to end with.
func (b *testbed) idle() {
	b.t.Helper()
	if n := b.active(); n != 0 {
		b.t.Errorf("%d streams are still counted", n)
	}
	if n := b.readers(); n != 0 {
		b.t.Errorf("%d readers are still subscribed", n)
	}
}

func (b *testbed) readers() int {
	b.relay.mu.Lock()
	defer b.relay.mu.Unlock()
	n := 0
	for _, rm := range b.relay.rooms {
		rm.mu.Lock()
		n += len(rm.subscriptions)
		rm.mu.Unlock()
	}
	return n
}

// A tattler is a log that fails the test for what should not have to be logged.
type tattler struct{ b *testbed }

func (l tattler) Enabled(_ context.Context, level slog.Level) bool { return level >= slog.LevelWarn }
func (l tattler) WithAttrs([]slog.Attr) slog.Handler               { return l }
func (l tattler) WithGroup(string) slog.Handler                    { return l }
func (l tattler) Handle(_ context.Context, r slog.Record) error {
	attrs := ""
	r.Attrs(func(a slog.Attr) bool { attrs += " " + a.String(); return true })
	for _, left := range []string{"client disconnected", "closed pipe", "connection reset", "broken pipe"} {
		if strings.Contains(attrs, left) && !l.b.tattle {
			return nil // TestLeavingIsNoError
		}
	}
	l.b.t.Errorf("logged: %s%s", r.Message, attrs)
	return nil
}

// A pipeListener is a network in memory.
type pipeListener struct {
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
}

func (l *pipeListener) Accept() (net.Conn, error) {
	select {
	case conn := <-l.conns:
		return conn, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *pipeListener) Close() error {
	l.once.Do(func() { close(l.closed) })
	return nil
}

func (l *pipeListener) Addr() net.Addr { return &net.UnixAddr{Name: "memory"} }

func (l *pipeListener) dial(ctx context.Context) (net.Conn, error) {
	here, there := net.Pipe()
	select {
	case l.conns <- there:
		return here, nil
	case <-l.closed:
		return nil, syscall.ECONNREFUSED
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// An oldConn says HTTP/1.0 where its client says HTTP/1.1.
type oldConn struct{ net.Conn }

func (c *oldConn) Write(b []byte) (int, error) {
	n := len(b)
	if _, err := c.Conn.Write(bytes.Replace(b, []byte(" HTTP/1.1\r\n"), []byte(" HTTP/1.0\r\n"), 1)); err != nil {
		return 0, err
	}
	return n, nil
}

// do makes a request and reads the whole answer. Headers are "Name: value".
func (b *testbed) do(method, path, body string, headers ...string) (*http.Response, string) {
	b.t.Helper()
	req, err := http.NewRequest(method, b.url+path, strings.NewReader(body))
	if err != nil {
		b.t.Fatal(err)
	}
	for _, h := range headers {
		name, value, _ := strings.Cut(h, ": ")
		req.Header.Add(name, value)
	}
	if host := req.Header.Get("Host"); host != "" {
		req.Host = host
		req.Header.Del("Host")
	}
	res, err := b.client.Do(req)
	if err != nil {
		b.t.Fatalf("%s %s: %v", method, path, err)
	}
	defer res.Body.Close()
	answer, err := io.ReadAll(res.Body)
	if err != nil {
		b.t.Fatalf("%s %s: %v", method, path, err)
	}
	return res, string(answer)
}

// publish posts text to a room, "lobby" or "lobby?type=typing", and returns the id.
func (b *testbed) say(room, text string) int64 {
	b.t.Helper()
	res, body := b.do("POST", "/rooms/"+room, text)
	var answer struct{ ID int64 }
	if err := json.Unmarshal([]byte(body), &answer); err != nil || res.StatusCode != 201 {
		b.t.Fatalf("publish to %s: %d %s", room, res.StatusCode, body)
	}
	return answer.ID
}

// A heard is one thing that a technique said, taken apart.
type heard struct {
	kind string // the event's type; beat is a heartbeat
	id   int64
	room string
	from string
	data string // JSON, of events for programs
	json string // all of the event, byte for byte
	text string // the data, as people read it
}

func (h heard) String() string { return strings.TrimRight(h.kind+" "+h.text, " ") }

// An earKind is one way to listen: a technique, and its mirror here.
type earKind struct {
	name, technique, query string
	mime                   string // a regular expression
	people                 bool   // for people, who don't read JSON
	hear                   func(*ear) error
}

var earKinds = []earKind{
	{"refresh", "refresh", "", `text/html; charset=utf-8`, true, (*ear).hearRefresh},
	{"multipart", "multipart", "", `multipart/x-mixed-replace; boundary=[A-Z2-7]{20,70}`, false, (*ear).hearMultipart},
	{"multipart-text", "multipart", "as=text", `multipart/x-mixed-replace; boundary=[A-Z2-7]{20,70}`, true, (*ear).hearMultipart},
	{"multipart-html", "multipart", "as=html&last=0", `multipart/x-mixed-replace; boundary=[A-Z2-7]{20,70}`, true, (*ear).hearMultipart},
	{"html", "html", "last=0", `text/html; charset=utf-8`, true, (*ear).hearHTML},
	{"poll", "poll", "", `application/json; charset=utf-8`, false, (*ear).hearAnswer},
	{"iframe", "iframe", "", `text/html; charset=utf-8`, false, (*ear).hearIframe},
	{"longpoll", "longpoll", "wait=0", `application/json; charset=utf-8`, false, (*ear).hearAnswer},
	{"jsonp", "jsonp", "wait=0&callback=my.$cb_1", `application/javascript; charset=utf-8`, false, (*ear).hearAnswer},
	{"stream", "stream", "", `application/x-ndjson; charset=utf-8`, false, (*ear).hearLine},
	{"sse", "sse", "", `text/event-stream; charset=utf-8`, false, (*ear).hearSSE},
	{"ws", "ws", "", ``, false, (*ear).hearWebSocket},
}

func (k earKind) streams() bool {
	return !slices.Contains([]string{"refresh", "poll", "longpoll", "jsonp"}, k.technique)
}

func kindOf(name string) earKind {
	return earKinds[slices.IndexFunc(earKinds, func(k earKind) bool { return k.name == name })]
}

// An ear listens by one technique. A stream is asked once; for the others the
// ear asks again whenever it is asked, with the cursor it was given.
type ear struct {
	earKind
	*testbed
	ctx    context.Context
	client *http.Client
	path   string // with what to ask for first
	header http.Header
	begun  bool
	after  int64 // the cursor of the last answer
	due    []heard

	res      *http.Response
	body     *bufio.Reader
	conn     *websocket.Conn
	boundary string
	retry    string          // of sse
	seen     map[string]bool // lines of pages that come anew
}

// A garbled error is an answer that its technique does not allow.
type garbled struct{ error }

func garble(format string, args ...any) error { return garbled{fmt.Errorf(format, args...)} }

// listen begins to listen. What to ask for is "after=5", or as a header
// "Last-Event-ID: 5". A test that waits for more than an hour fails.
func (b *testbed) listen(k earKind, rooms string, ask ...string) *ear {
	b.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Hour)
	b.t.Cleanup(cancel)
	e, err := b.tryListen(ctx, b.client, k, rooms, ask...)
	if err != nil {
		b.t.Fatalf("%s: %v", k.name, err)
	}
	return e
}

func (b *testbed) tryListen(ctx context.Context, client *http.Client, k earKind, rooms string, ask ...string) (*ear, error) {
	e := &ear{earKind: k, testbed: b, ctx: ctx, client: client, header: http.Header{}, after: -1, seen: map[string]bool{}}
	q, _ := url.ParseQuery(k.query)
	for _, a := range ask {
		if name, value, ok := strings.Cut(a, ": "); ok {
			e.header.Add(name, value)
		} else {
			name, value, _ := strings.Cut(a, "=")
			q.Set(name, value)
		}
	}
	if k.name == "refresh" && !q.Has("after") && !q.Has("last") && e.header.Get("Last-Event-ID") == "" {
		q.Set("after", fmt.Sprint(b.relay.lastID.Load()))
	}
	e.path = "/rooms/" + rooms + "/" + k.technique + "?" + q.Encode()
	if !k.streams() {
		return e, nil
	}
	if k.technique == "ws" {
		conn, _, err := websocket.Dial(ctx, "ws"+strings.TrimPrefix(b.url, "http")+e.path, &websocket.DialOptions{HTTPClient: client, HTTPHeader: e.header})
		if err != nil {
			return nil, err
		}
		conn.SetReadLimit(1 << 20)
		e.conn = conn
		return e, nil
	}
	res, err := e.ask(e.path)
	if err != nil {
		return nil, err
	}
	e.res, e.body = res, bufio.NewReader(res.Body)
	return e, nil
}

func (e *ear) ask(path string) (*http.Response, error) {
	req, err := http.NewRequestWithContext(e.ctx, "GET", e.url+path, nil)
	if err != nil {
		return nil, err
	}
	req.Header = e.header
	res, err := e.client.Do(req)
	if err != nil {
		return nil, err
	}
	if res.StatusCode != 200 {
		body, _ := io.ReadAll(res.Body)
		res.Body.Close()
		return nil, garble("%s: %s %s", path, res.Status, body)
	}
	return res, nil
}

// close leaves.
func (e *ear) close() {
	if e.res != nil {
		e.res.Body.Close()
	}
	if e.conn != nil {
		e.conn.CloseNow()
	}
}

// hears returns what is heard next.
func (e *ear) hears() (heard, error) {
	for len(e.due) == 0 {
		if err := e.hear(e); err != nil {
			return heard{}, err
		}
	}
	h := e.due[0]
	e.due = e.due[1:]
	return h, nil
}

func (e *ear) next() heard {
	e.t.Helper()
	h, err := e.hears()
	if err != nil {
		e.t.Fatalf("%s: %v", e.name, err)
	}
	return h
}

// begin passes over the hello of a stream; what only asks asks once, to get a
// cursor.
func (e *ear) begin() *ear {
	e.t.Helper()
	if e.streams() {
		if h := e.next(); h.kind != "hello" {
			e.t.Fatalf("%s began with %v, want hello", e.name, h)
		}
	} else {
		e.expect("beat")
	}
	return e
}

// expect hears exactly what is wanted, each as "type text".
func (e *ear) expect(want ...string) (got []heard) {
	e.t.Helper()
	for i, w := range want {
		h := e.next()
		if h.String() != w {
			e.t.Fatalf("%s heard %q in place %d, want %q", e.name, h, i, w)
		}
		got = append(got, h)
	}
	return got
}

// ends fails unless the stream ends here, in the way that its technique ends well.
func (e *ear) ends() {
	e.t.Helper()
	h, err := e.hears()
	switch {
	case err == nil:
		e.t.Fatalf("%s heard %v, want the end", e.name, h)
	case e.conn != nil && websocket.CloseStatus(err) != websocket.StatusGoingAway:
		e.t.Fatalf("ws ended with %v, want 1001", err)
	case e.conn == nil && err != io.EOF:
		e.t.Fatalf("%s ended with %v, want EOF", e.name, err)
	}
}

func (e *ear) add(h heard) { e.due = append(e.due, h) }

// addJSON adds an event, which is one line of JSON that is safe in a script.
func (e *ear) addJSON(line string) error {
	if strings.ContainsAny(line, "\n\r<>&\u2028\u2029") || !json.Valid([]byte(line)) {
		return garble("an event that is not one line of safe JSON: %q", line)
	}
	var ev struct {
		ID               int64
		Type, Room, From string
		Data             json.RawMessage
	}
	if err := json.Unmarshal([]byte(line), &ev); err != nil {
		return garble("%v: %q", err, line)
	}
	h := heard{ev.Type, ev.ID, ev.Room, ev.From, string(ev.Data), line, ""}
	if json.Unmarshal(ev.Data, &h.text) != nil && ev.Type != "hello" && ev.Type != "gap" && ev.Type != "bye" {
		h.text = h.data
	}
	e.add(h)
	return nil
}

func (e *ear) line() (string, error) {
	s, err := e.body.ReadString('\n')
	if err == io.EOF && s != "" {
		err = io.ErrUnexpectedEOF
	}
	return strings.TrimSuffix(s, "\n"), err
}

// stream: a line an event, an empty one a heartbeat.
func (e *ear) hearLine() error {
	line, err := e.line()
	if err != nil {
		return err
	}
	if line == "" {
		e.add(heard{kind: "beat"})
		return nil
	}
	return e.addJSON(line)
}

// sse: fields up to an empty line.
func (e *ear) hearSSE() error {
	fields := map[string]string{}
	for {
		line, err := e.line()
		if err != nil {
			return err
		}
		if line == "" {
			break
		}
		name, value, ok := strings.Cut(line, ":")
		if _, twice := fields[name]; !ok || twice || !slices.Contains([]string{"id", "event", "data", "retry"}, name) {
			return garble("sse: %q", line)
		}
		fields[name] = strings.TrimPrefix(value, " ")
	}
	data := fields["data"]
	if data == `{"type":"beat"}` && fields["event"] == "beat" && len(fields) == 2 {
		e.add(heard{kind: "beat"})
		return nil
	}
	if retry, ok := fields["retry"]; ok { // in the first block, and not in one of its own, which some clients take for an event
		if e.retry != "" || data == "" {
			return garble("sse: retry in %q", fields)
		}
		e.retry = retry
	}
	if err := e.addJSON(data); err != nil {
		return err
	}
	h := e.due[len(e.due)-1]
	id := ""
	if h.id != 0 || h.kind == "hello" {
		id = fmt.Sprint(h.id)
	}
	if fields["id"] != id || fields["event"] != strings.TrimPrefix(h.kind, "message") {
		return garble("sse: the fields %q do not fit %s", fields, h.json)
	}
	return nil
}

// multipart: a part an event, and at once the next boundary and the next
// part's headers. An empty line before a part's content is a heartbeat.
func (e *ear) hearMultipart() error {
	mime := map[string]string{"multipart": "application/json", "multipart-text": "text/plain", "multipart-html": "text/html"}[e.name]
	if e.boundary == "" {
		_, params, ok := strings.Cut(e.res.Header.Get("Content-Type"), "boundary=")
		if !ok {
			return garble("multipart without a boundary")
		}
		e.boundary = "\r\n--" + params + "\r\nContent-Type: " + mime + "; charset=utf-8\r\n\r\n"
		if err := e.until(io.Discard, e.boundary[2:]); err != nil {
			return err
		}
	}
	first, err := e.body.Peek(1)
	if err != nil {
		return err
	}
	if first[0] == '\r' {
		if b, err := io.ReadAll(io.LimitReader(e.body, 2)); err != nil || string(b) != "\r\n" {
			return garble("multipart: a heartbeat that is %q", b)
		}
		e.add(heard{kind: "beat"})
		return nil
	}
	var part strings.Builder
	if err := e.until(&part, e.boundary); err != nil {
		return err
	}
	switch e.name {
	case "multipart":
		return e.addJSON(part.String())
	case "multipart-html":
		if !e.begun {
			e.begun = true
			e.add(heard{kind: "hello"})
		}
		return e.addPage(part.String())
	}
	line, ok := strings.CutSuffix(part.String(), "\n")
	if !ok || strings.Contains(line, "\n") {
		return garble("multipart: not a line of text: %q", part.String())
	}
	who, text, said := strings.Cut(line, ": ")
	kind, rest, _ := strings.Cut(line, " ")
	switch {
	case line == "Connected.":
		e.add(heard{kind: "hello"})
	case kind == "gap" || kind == "bye":
		e.add(heard{kind: kind})
	case strings.HasPrefix(rest, " ") || kind == "presence":
		_, text, _ := strings.Cut(rest, " ")
		e.add(heard{kind: kind, text: text})
	case said:
		e.add(heard{kind: "message", from: who, text: text})
	default:
		e.add(heard{kind: "message", text: line})
	}
	return nil
}

// until copies the body up to and without the mark, which must be all there is.
func (e *ear) until(w io.Writer, mark string) error {
	var b []byte
	for !bytes.HasSuffix(b, []byte(mark)) {
		c, err := e.body.ReadByte()
		if err == io.EOF && len(b) > 0 {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			return err
		}
		b = append(b, c)
	}
	w.Write(b[:len(b)-len(mark)])
	return nil
}

// iframe: a script an event, which tells the page around. Every script has
// the nonce that the policy names.
func (e *ear) hearIframe() error {
	policy := e.res.Header.Get("Content-Security-Policy")
	_, nonce, _ := strings.Cut(policy, "script-src 'nonce-")
	nonce, _, ok := strings.Cut(nonce, "'")
	if !ok || len(nonce) < 20 {
		return garble("iframe: no nonce in the policy %q", policy)
	}
	line, err := e.line()
	if err != nil {
		return err
	}
	open := `<script nonce="` + nonce + `">`
	call, ok := strings.CutPrefix(line, open+"tell(")
	call, closed := strings.CutSuffix(call, ")</script>")
	switch {
	case ok && closed:
		if call == `{"type":"beat"}` {
			e.add(heard{kind: "beat"})
			return nil
		}
		e.begun = true
		return e.addJSON(call)
	case e.begun:
		return garble("iframe: %q", line)
	case strings.HasPrefix(line, "<!DOCTYPE html>"), strings.HasPrefix(line, "<title>"), strings.HasPrefix(line, open+"const tell = "):
		return nil
	}
	return garble("iframe: %q", line)
}

// html: a page's head, then a paragraph an event, and comments for heartbeats.
func (e *ear) hearHTML() error {
	line, err := e.line()
	switch {
	case err != nil:
		return err
	case line == "<!-- beat -->":
		e.add(heard{kind: "beat"})
		return nil
	case line == `<main class="log endless">`:
		e.begun = true
		return nil
	case !e.begun:
		return nil
	}
	return e.addParagraph(line)
}

// refresh: a whole page, the newest first. What was on the page before is not
// heard again.
func (e *ear) hearRefresh() error {
	res, err := e.ask(e.path)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	e.res = res
	page, err := io.ReadAll(res.Body)
	if err != nil {
		return err
	}
	due := len(e.due)
	if err := e.addPage(string(page)); err != nil {
		return err
	}
	if len(e.due) == due {
		e.add(heard{kind: "beat"})
	}
	return nil
}

func (e *ear) addPage(page string) error {
	_, log, ok := strings.Cut(page, "<main class=\"log\">\n")
	log, closed := strings.CutSuffix(log, "</main>\n")
	if !ok || !closed || !strings.HasPrefix(page, "<!DOCTYPE html>") {
		return garble("not a page: %q", page)
	}
	lines := strings.SplitAfter(log, "\n")
	for _, line := range slices.Backward(lines[:len(lines)-1]) {
		if e.seen[line] {
			continue
		}
		e.seen[line] = true
		if err := e.addParagraph(strings.TrimSuffix(line, "\n")); err != nil {
			return err
		}
	}
	return nil
}

var (
	paragraphForm = regexp.MustCompile(`^<p class="(message|note|gap)">(.*)</p>$`)
	speechForm    = regexp.MustCompile(`^<time datetime="[0-9TZ:-]{20}">\d\d:\d\d</time> (?:<i>([\w.:-]+)</i> )?<b><bdi>([^<]*)</bdi></b> <span dir="auto">([^<]*)</span>$`)
	byeForm       = regexp.MustCompile(`^The relay is going away.*<meta http-equiv="refresh" content="\d+">$`)
)

func (e *ear) addParagraph(line string) error {
	m := paragraphForm.FindStringSubmatch(line)
	if m == nil {
		return garble("not a paragraph: %q", line)
	}
	speech := speechForm.FindStringSubmatch(m[2])
	switch {
	case m[1] == "gap":
		e.add(heard{kind: "gap"})
	case m[2] == "Connected.":
		e.add(heard{kind: "hello"})
	case byeForm.MatchString(m[2]):
		e.add(heard{kind: "bye"})
	case speech != nil && (speech[1] == "") == (m[1] == "message"):
		kind := speech[1]
		if kind == "" {
			kind = "message"
		}
		e.add(heard{kind: kind, from: html.UnescapeString(speech[2]), text: html.UnescapeString(speech[3])})
	default:
		e.add(heard{kind: "presence", text: html.UnescapeString(strings.NewReplacer("<bdi>", "", "</bdi>", "").Replace(m[2]))})
	}
	return nil
}

// poll, longpoll, jsonp: a whole answer, with the cursor to ask with next. An
// answer with nothing is a heartbeat.
func (e *ear) hearAnswer() error {
	path := e.path
	if e.after >= 0 {
		name, query, _ := strings.Cut(path, "?")
		q, _ := url.ParseQuery(query)
		q.Set("after", fmt.Sprint(e.after))
		path = name + "?" + q.Encode()
		e.header.Del("Last-Event-ID")
	}
	res, err := e.ask(path)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	e.res = res
	b, err := io.ReadAll(res.Body)
	if err != nil {
		return err
	}
	body := string(b)
	if e.technique == "jsonp" {
		call, ok := strings.CutPrefix(body, "/**/my.$cb_1(")
		call, closed := strings.CutSuffix(call, ");\n")
		if !ok || !closed {
			return garble("jsonp: %q", body)
		}
		body = call + "\n"
	}
	var answer struct {
		Cursor *int64
		Events []json.RawMessage
	}
	if err := json.Unmarshal([]byte(body), &answer); err != nil || answer.Cursor == nil || answer.Events == nil || !strings.HasSuffix(body, "]}\n") {
		return garble("%v: %q", err, body)
	}
	e.after = *answer.Cursor
	for _, event := range answer.Events {
		if err := e.addJSON(string(event)); err != nil {
			return err
		}
	}
	if len(answer.Events) == 0 {
		e.add(heard{kind: "beat"})
	}
	return nil
}

// ws: text frames of an event a line.
func (e *ear) hearWebSocket() error {
	kind, frame, err := e.conn.Read(e.ctx)
	if err != nil {
		return err
	}
	if kind != websocket.MessageText {
		return garble("ws: a binary frame %q", frame)
	}
	for line := range strings.SplitSeq(string(frame), "\n") {
		if line == `{"type":"beat"}` {
			e.add(heard{kind: "beat"})
		} else if err := e.addJSON(line); err != nil {
			return err
		}
	}
	return nil
}

// What is asked of every technique.

var conformance = []struct {
	sentence string
	streams  bool // asked of streams only
	virtual  bool // it takes its time
	check    func(*testing.T, *testbed, earKind)
}{
	{"its headers let nobody hold it back", false, false, checkHeaders},
	{"it says hello at once", true, false, checkHello},
	{"it tells what happens in its rooms, in order", false, false, checkLive},
	{"it passes over what only another technique takes", false, false, checkOthers},
	{"it catches up from a cursor", false, false, checkCatchUp},
	{"it tells of a gap", false, false, checkGap},
	{"it tells signals while they last", false, true, checkSignals},
	{"its heart beats when it is silent", true, true, checkHeart},
	{"it says bye after all that was published", true, false, checkBye},
	{"HEAD is answered at once, without a body", false, false, checkHead},
	{"OPTIONS tells the methods, and others are refused", false, false, checkMethods},
}

func TestTechniques(t *testing.T) {
	for _, technique := range techniques {
		if !slices.ContainsFunc(earKinds, func(k earKind) bool { return k.technique == technique.name }) {
			t.Errorf("nobody listens to %s here", technique.name)
		}
	}
	for _, network := range []string{pipe, pipe10, pipeH2, tcp} {
		for _, k := range earKinds {
			if k.technique == "ws" && (network == pipe10 || network == pipeH2) || !k.streams() && network == pipe10 {
				continue
			}
			for _, c := range conformance {
				if c.streams && !k.streams() || c.virtual && network == tcp {
					continue
				}
				t.Run(network+"/"+k.name+"/"+c.sentence, func(t *testing.T) {
					onNetwork(t, network, func(t *testing.T) { c.check(t, newBed(t, network), k) })
				})
			}
		}
	}
}

// onNetwork runs a test in a bubble, if the network is one in memory.
func onNetwork(t *testing.T, network string, test func(*testing.T)) {
	switch network {
	case tcp:
		test(t)
		return
	case pipeH2:
		// net/http keeps channels in a pool, and none may go from one bubble to
		// another. Two collections empty it.
		runtime.GC()
		runtime.GC()
	}
	synctest.Test(t, test)
}

// inNoTime fails if virtual time went by.
func inNoTime(t *testing.T, since time.Time) {
	t.Helper()
	if d := time.Since(since); since.Year() == 2000 && d != 0 {
		t.Errorf("it took %v, want it at once", d)
	}
}

func checkOthers(t *testing.T, b *testbed, k earKind) {
	if k.technique != "multipart" {
		e := b.listen(k, "a", "as=svg", "w=1", "h=1").begin()
		b.say("a", "one")
		e.expect("message one")
	}
}

func checkHeaders(t *testing.T, b *testbed, k earKind) {
	e := b.listen(k, "a")
	var h http.Header
	if k.technique == "ws" {
		res, _ := b.do("GET", e.path, "")
		if res.StatusCode != 426 || !strings.EqualFold(res.Header.Get("Upgrade"), "websocket") {
			t.Errorf("a GET that is no WebSocket: %s %v, want 426 and Upgrade", res.Status, res.Header)
		}
		h = res.Header
	} else {
		e.next()
		h = e.res.Header
		if got := h.Get("Content-Type"); !regexp.MustCompile("^(" + k.mime + ")$").MatchString(got) {
			t.Errorf("Content-Type: %s, want %s", got, k.mime)
		}
		if h.Get("Cache-Control") != "no-store, no-transform" || h.Get("X-Accel-Buffering") != "no" {
			t.Errorf("headers %v, want Cache-Control: no-store, no-transform and X-Accel-Buffering: no", h)
		}
		if _, _, err := mime.ParseMediaType(h.Get("Content-Type")); err != nil {
			t.Error(err)
		}
	}
	if h.Get("X-Content-Type-Options") != "nosniff" || !slices.Contains([]string{"no-referrer", "same-origin"}, h.Get("Referrer-Policy")) {
		t.Errorf("headers %v, want nosniff and no referrer for others", h)
	}
	if !slices.Contains(strings.Split(strings.Join(h["Vary"], ", "), ", "), "Origin") {
		t.Errorf("Vary: %q, want Origin in it", h["Vary"])
	}
	if b.network == pipe10 && len(e.res.TransferEncoding) > 0 {
		t.Errorf("Transfer-Encoding: %q, which HTTP/1.0 does not know", e.res.TransferEncoding)
	}
	if got := h.Get("Refresh"); (got == "10") != (k.technique == "refresh") {
		t.Errorf("Refresh: %q", got)
	}
	if len(h["Content-Length"]) > 0 && k.streams() && k.technique != "ws" {
		t.Errorf("a stream with Content-Length: %q", h["Content-Length"])
	}
}

func checkHello(t *testing.T, b *testbed, k earKind) {
	b.say("a", "before")
	start := time.Now()
	e := b.listen(k, "a,b.c:d-e_F")
	h := e.next()
	inNoTime(t, start)
	if h.kind != "hello" {
		t.Fatalf("began with %v", h)
	}
	if k.technique == "sse" && !regexp.MustCompile(`^[23]\d\d\d$`).MatchString(e.retry) {
		t.Errorf("retry: %q, want 2000 to 3999", e.retry)
	}
	if k.people {
		return
	}
	var hello struct {
		Type     string
		ID, Time int64
		Data     struct {
			Rooms    []string
			Beat     int
			Instance string
		}
	}
	d := json.NewDecoder(strings.NewReader(h.json))
	d.DisallowUnknownFields()
	if err := d.Decode(&hello); err != nil {
		t.Fatal(err)
	}
	if hello.ID != b.relay.lastID.Load() || hello.Data.Beat != 15 || hello.Data.Instance != b.instance || b.instance == "" {
		t.Errorf("hello %s", h.json)
	}
	if !slices.Equal(hello.Data.Rooms, []string{"a", "b.c:d-e_F"}) {
		t.Errorf("hello to the rooms %q", hello.Data.Rooms)
	}
	if d := time.Since(time.UnixMilli(hello.Time)); d < 0 || start.Year() == 2000 && d != 0 {
		t.Errorf("hello's time is %v ago", d)
	}
	// A cursor that was given is the one it goes on from.
	if h := b.listen(k, "a", fmt.Sprintf("after=%d", hello.ID-1)).next(); h.id != hello.ID-1 {
		t.Errorf("hello %s, want the cursor given, %d", h.json, hello.ID-1)
	}
}

func checkLive(t *testing.T, b *testbed, k earKind) {
	b.say("a", "before")
	e := b.listen(k, "a,b").begin()
	start := time.Now()
	id := b.say("a", "one")
	got := e.expect("message one")[0]
	if !k.people && (got.id != id || got.room != "a" || got.data != `"one"`) {
		t.Errorf("heard %s", got.json)
	}
	b.say("c", "elsewhere")
	b.say("b?user=ada", "two")
	got = e.expect("message two")[0]
	if got.from != "ada" {
		t.Errorf("two is from %q", got.from)
	}
	b.say("a", "three")
	b.say("b?type=x:y", "four")
	e.expect("message three", "x:y four")
	inNoTime(t, start)
}

func checkCatchUp(t *testing.T, b *testbed, k earKind) {
	type said struct {
		id         int64
		room, text string
	}
	var log []said
	say := func(room, text string) { log = append(log, said{b.say(room, text), room, text}) }
	for i := range 6 {
		say([]string{"a", "b"}[i%2], fmt.Sprintf("m%d", i))
	}
	ids := make([]string, len(log))
	for i, s := range log {
		ids[i] = fmt.Sprint(s.id)
	}
	for i, test := range []struct {
		rooms string
		after int // the index of the cursor in the log, or -1
		last  int
		ask   []string
	}{
		{"a,b", 2, 0, []string{"after=" + ids[2]}},
		{"b,a", 2, 0, []string{"after=" + ids[2]}},
		{"a,b", 0, 0, []string{"after=" + ids[0]}},
		{"a,b", 3, 0, []string{"Last-Event-ID: " + ids[3]}},
		{"a,b", 4, 0, []string{"after=" + ids[0], "Last-Event-ID: " + ids[4]}},
		{"a,b", 3, 0, []string{"after=" + ids[4], "Last-Event-ID: " + ids[3]}},
		{"a,b", 4, 0, []string{"after=" + ids[4], "Last-Event-ID: "}},
		{"a,b", -1, 2, []string{"last=2"}},
		{"a,b", -1, 999, []string{"last=999"}},
		{"a,b", 3, 0, []string{"last=1", "after=" + ids[3]}},
		{"b", -1, 2, []string{"last=2"}},
		{"b", 0, 0, []string{"after=" + ids[0]}},
		{"empty", 0, 0, []string{"after=" + ids[0]}},
	} {
		var want []string
		for i, s := range log {
			if slices.Contains(strings.Split(test.rooms, ","), s.room) && i > test.after {
				want = append(want, "message "+s.text)
			}
		}
		if test.after < 0 {
			want = want[max(0, len(want)-test.last):]
		}
		e := b.listen(k, test.rooms, test.ask...)
		if k.streams() {
			e.begin()
		}
		e.expect(want...)
		if want == nil {
			if !k.streams() {
				e.expect("beat")
			}
			continue
		}
		say(test.rooms[:1], fmt.Sprint("now", i)) // and goes on, with nothing in between
		e.expect(fmt.Sprint("message now", i))
		e.close()
	}
}

func checkGap(t *testing.T, b *testbed, k earKind) {
	b.relay.maxEvents = 4 // are kept
	var ids []string
	for i := range 10 {
		ids = append(ids, fmt.Sprint(b.say("a", fmt.Sprintf("m%d", i))))
	}
	b.say("b", "other")
	kept := []string{"message m6", "message m7", "message m8", "message m9"}
	for _, test := range []struct{ after, reason, id string }{
		{ids[1], "history", ids[5]},
		{ids[4], "history", ids[5]},
		{fmt.Sprint(b.relay.epoch), "history", ids[5]},
		{"0", "restart", ids[5]},
		{fmt.Sprint(b.relay.epoch - 1), "restart", ids[5]},
		{fmt.Sprint(b.relay.lastID.Load() + 1), "future", ids[5]},
		{"9223372036854775807", "future", ids[5]},
	} {
		e := b.listen(k, "a", "after="+test.after)
		if k.streams() {
			e.begin()
		}
		gap := e.expect(append([]string{"gap"}, kept...)...)[0]
		want := fmt.Sprintf(`{"type":"gap","room":"a","id":%s,"data":{"reason":"%s"}}`, test.id, test.reason)
		if !k.people && gap.json != want {
			t.Errorf("after %s: %s, want %s", test.after, gap.json, want)
		}
		e.close()
	}
	// Who goes on from the gap has lost nothing more, and who gave no cursor lost nothing.
	for _, ask := range []string{"after=" + ids[5], "last=4"} {
		e := b.listen(k, "a", ask)
		if k.streams() {
			e.begin()
		}
		e.expect(kept...)
		e.close()
	}
	// A gap is a room's: b, beside it, has lost nothing.
	e := b.listen(k, "a,b", "after="+ids[0])
	if k.streams() {
		e.begin()
	}
	e.expect(append(append([]string{"gap"}, kept...), "message other")...)
	e.close()
	// A stream that falls behind while it is read is told too.
	if k.streams() {
		e := b.listen(k, "a").begin()
		b.settle()
		b.relay.mu.Lock() // ten messages at once
		for i := range 10 {
			b.relay.publishLocked(publishRequest{room: "a", kind: "message", data: []byte(fmt.Sprintf(`"n%d"`, i))})
		}
		b.relay.mu.Unlock()
		b.relay.wake(b.relay.rooms["a"])
		e.expect("gap", "message n6", "message n7", "message n8", "message n9")
	}
}

func checkSignals(t *testing.T, b *testbed, k earKind) {
	b.relay.maxEvents = 4
	before := fmt.Sprint(b.relay.lastID.Load())
	live := b.listen(k, "a").begin()
	for i := range 4 { // as many as are kept
		b.say("a", fmt.Sprintf("m%d", i))
		b.say("a?type=typing&ttl=5", fmt.Sprintf("s%d", i))
	}
	all := []string{"message m0", "typing s0", "message m1", "typing s1", "message m2", "typing s2", "message m3", "typing s3"}
	live.expect(all...)
	time.Sleep(4900 * time.Millisecond) // TestPublishSignal has the moment
	e := b.listen(k, "a", "after="+before)
	if k.streams() {
		e.begin()
	}
	e.expect(all...)
	time.Sleep(200 * time.Millisecond)
	e = b.listen(k, "a", "after="+before)
	if k.streams() {
		e.begin()
	}
	e.expect("message m0", "message m1", "message m2", "message m3")
	for range 50 {
		b.say("a?ttl=1", "signal") // push out no message
	}
	e = b.listen(k, "a", "after="+before)
	if k.streams() {
		e.begin()
	}
	e.expect("message m0", "message m1", "message m2", "message m3")
}

func checkHeart(t *testing.T, b *testbed, k earKind) {
	e := b.listen(k, "a").begin()
	since := time.Now()
	for range 40 {
		h := e.next()
		d := time.Since(since)
		since = time.Now()
		if h.kind != "beat" || d < 15*time.Second*3/4 || d > 15*time.Second {
			t.Fatalf("heard %v after %v, want a heartbeat after 11.25 to 15 s", h, d)
		}
	}
	for i := range 20 { // what is said counts as a heartbeat
		time.Sleep(7 * time.Second)
		b.say("a", fmt.Sprint(i))
		e.expect("message " + fmt.Sprint(i))
	}
	since = time.Now()
	if h, d := e.next(), time.Since(since); h.kind != "beat" || d < 15*time.Second*3/4 || d > 15*time.Second {
		t.Errorf("heard %v after %v, want a heartbeat after 11.25 to 15 s", h, d)
	}
}

func checkBye(t *testing.T, b *testbed, k earKind) {
	b.relay.maxEvents = 1000
	e := b.listen(k, "a").begin()
	want := []string{}
	for i := range 300 { // more than one batch
		data, _ := json.Marshal(fmt.Sprint(i))
		if _, _, err := b.checkAndPublish(newPermit(), publishRequest{room: "a", kind: "message", data: data}); err != nil {
			t.Fatal(err)
		}
		want = append(want, "message "+fmt.Sprint(i))
	}
	start := time.Now() // publishers may have been held up, readers are not
	b.stop()
	if k.name == "multipart-html" {
		for h := e.next(); h.kind != "bye"; h = e.next() { // shows the last fifty, of some moments
		}
	} else {
		e.expect(want...)
		bye := e.expect("bye")[0]
		if m := regexp.MustCompile(`^{"type":"bye","data":{"retry":(\d+)}}$`).FindStringSubmatch(bye.json); !k.people && m == nil {
			t.Errorf("%s", bye.json)
		} else if !k.people {
			if retry, _ := strconv.Atoi(m[1]); retry < 1000 || retry > 31_000 {
				t.Errorf("retry in %d ms", retry)
			}
		}
	}
	e.ends()
	inNoTime(t, start)
}

func checkHead(t *testing.T, b *testbed, k earKind) {
	b.say("a", "before")
	e := b.listen(k, "a", "last=1")
	start := time.Now()
	res, body := b.do("HEAD", e.path, "")
	inNoTime(t, start)
	if body != "" {
		t.Errorf("HEAD has the body %q", body)
	}
	if k.technique == "ws" {
		if res.StatusCode != 426 {
			t.Errorf("HEAD: %s", res.Status)
		}
		return
	}
	e.next()
	if res.StatusCode != 200 {
		t.Errorf("HEAD: %s", res.Status)
	}
	for _, name := range []string{"Content-Type", "Cache-Control", "X-Accel-Buffering", "X-Content-Type-Options", "Vary", "Refresh"} {
		if get, head := e.res.Header.Get(name), res.Header.Get(name); get != head && !strings.HasPrefix(get, "multipart/") {
			t.Errorf("%s: %q by GET, %q by HEAD", name, get, head)
		}
	}
	if n := b.active(); k.streams() && n > 1 {
		t.Errorf("HEAD left %d streams", n-1)
	}
	for _, wrong := range []string{"after=x", "last=-1", "presence=2"} {
		if res, body := b.do("HEAD", e.path+"&"+wrong+"&x=", ""); res.StatusCode != 400 || body != "" {
			t.Errorf("HEAD with %s: %s %q, want 400", wrong, res.Status, body)
		}
	}
}

func checkMethods(t *testing.T, b *testbed, k earKind) {
	start := time.Now()
	path := "/rooms/a/" + k.technique
	const allow = "GET, HEAD, OPTIONS"
	res, body := b.do("OPTIONS", path, "")
	if res.StatusCode != 204 || res.Header.Get("Allow") != allow || body != "" {
		t.Errorf("OPTIONS: %s, Allow: %s %q", res.Status, res.Header.Get("Allow"), body)
	}
	for _, method := range []string{"POST", "PUT", "PATCH", "DELETE", "TRACE", "get", "PROPFIND"} {
		res, body := b.do(method, path, "")
		if res.StatusCode != 405 || res.Header.Get("Allow") != allow || !isError(body) {
			t.Errorf("%s: %s, Allow: %s %q", method, res.Status, res.Header.Get("Allow"), body)
		}
	}
	for _, no := range []string{k.technique + "x", strings.ToUpper(k.technique), k.technique + "/", k.technique + "/x", "%" + fmt.Sprintf("%02X", k.technique[0]) + k.technique[1:]} {
		if res, body := b.do("GET", "/rooms/a/"+no, ""); res.StatusCode != 404 || !isError(body) || !strings.Contains(body, "longpoll") {
			t.Errorf("%s: %s %q, want 404 and the techniques there are", no, res.Status, body)
		}
	}
	inNoTime(t, start)
}

// isError reports whether the body is {"error":"some sentence"} and a newline.
func isError(body string) bool {
	var e struct{ Error string }
	d := json.NewDecoder(strings.NewReader(body))
	d.DisallowUnknownFields()
	return d.Decode(&e) == nil && len(e.Error) > 10 && strings.HasSuffix(body, "}\n") && strings.Count(body, "\n") == 1
}

// The hearts of streams that began together do not beat together.
func TestHeartsDiffer(t *testing.T) {
	for _, network := range []string{pipe, pipeH2} {
		t.Run(network, func(t *testing.T) {
			onNetwork(t, network, func(t *testing.T) {
				b := newBed(t, network)
				start := time.Now()
				at := make(chan time.Duration)
				for range 50 {
					e := b.listen(kindOf("stream"), "a").begin()
					go func() {
						e.hears()
						at <- time.Since(start).Round(100 * time.Millisecond)
					}()
				}
				times := map[time.Duration]int{}
				for range 50 {
					times[<-at]++
				}
				for d, n := range times {
					if n > 40 {
						t.Errorf("%d of 50 beat after %v", n, d)
					}
				}
			})
		})
	}
}

// Every transport sends the same bytes.
func TestSameBytes(t *testing.T) {
	for _, network := range []string{pipe, pipeH2, tcp} {
		t.Run(network, func(t *testing.T) { onNetwork(t, network, testSameBytes) })
	}
}

func testSameBytes(t *testing.T) {
	network := t.Name()[strings.LastIndex(t.Name(), "/")+1:]
	b := newBed(t, network)
	var listening []*ear
	for _, k := range earKinds {
		if k.people || k.technique == "ws" && network == pipeH2 {
			continue
		}
		listening = append(listening, b.listen(k, "a,b").begin())
	}
	var want []string
	for i, data := range []string{
		`"plain"`, `null`, `true`, `-1.5e300`, `""`, `[]`, `{"a":{"b":[1,2,{"c":null}]}}`,
		`"</script><!-- & -->"`, `"\u2028\u2029 \u0000 \ud83d\ude00 😀"`, "\"\u2028\u2029\"", `"\\ \" \n \r \t"`,
		"{ \"a\" :\n [ 1 ,\r\n\t2 ] }", `"` + strings.Repeat("long ", 10_000) + `"`, `1234567890123456789012345678901234567890`,
	} {
		user := []string{"", "ada", `<b>"&'é`}[i%3]
		res, body := b.do("POST", "/rooms/"+[]string{"a", "b"}[i%2]+"?"+url.Values{"user": {user}}.Encode(), data, "Content-Type: application/json")
		if res.StatusCode != 201 {
			t.Fatalf("%s: %s", data, body)
		}
		for j, e := range listening {
			h := e.next()
			if j == 0 {
				want = append(want, h.json)
			} else if h.json != want[i] {
				t.Errorf("%s says\n%s, and %s\n%s", e.name, h.json, listening[0].name, want[i])
			}
		}
		var sent, got any
		h := heard{}
		json.Unmarshal([]byte(want[i]), &struct {
			Data *any
			From *string
		}{&got, &h.from})
		json.Unmarshal([]byte(data), &sent)
		if fmt.Sprint(sent) != fmt.Sprint(got) || h.from != user {
			t.Errorf("sent %s as %q, came %s", data, user, want[i])
		}
	}
	for _, e := range listening { // and from the history
		again := b.listen(e.earKind, "a,b", "last=100")
		if e.streams() {
			again.begin()
		}
		for i := range want {
			if h := again.next(); h.json != want[i] {
				t.Errorf("%s says\n%s, want\n%s", e.name, h.json, want[i])
			}
		}
		again.close()
	}
}

// Clients go from technique to technique, over connections that break at any
// byte, while others publish over such connections: nothing is lost,
// nothing comes twice, all is in order.
func TestHop(t *testing.T) {
	for _, network := range []string{pipe, pipeH2, tcp} {
		t.Run(network, func(t *testing.T) {
			seed := mathrand.Uint64()
			if s := os.Getenv("HOP_SEED"); s != "" {
				seed, _ = strconv.ParseUint(s, 10, 64)
			}
			t.Logf("HOP_SEED=%d", seed)
			onNetwork(t, network, func(t *testing.T) { hop(t, network, seed) })
		})
	}
}

// errCut is what a connection says that was cut.
var errCut = errors.New("cut")

// A cutConn breaks when so many bytes went through it.
type cutConn struct {
	net.Conn
	left atomic.Int64
}

func (c *cutConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	return c.pass(n, err)
}

func (c *cutConn) Write(b []byte) (int, error) {
	if left := c.left.Load(); int64(len(b)) > left {
		n, _ := c.Conn.Write(b[:max(left, 0)])
		c.Conn.Close()
		return n, errCut
	}
	n, err := c.Conn.Write(b)
	return c.pass(n, err)
}

func (c *cutConn) pass(n int, err error) (int, error) {
	if left := c.left.Add(int64(-n)); left < 0 {
		c.Conn.Close()
		return max(n+int(left), 0), errCut
	}
	return n, err
}

// frail is a client whose connections are cut.
func (b *testbed) frail(rng *mathrand.Rand, h2 bool) *http.Client {
	cut := rng.Int64N(8000)
	return b.newClient(func(ctx context.Context) (net.Conn, error) {
		conn, err := b.dial(ctx)
		if err != nil {
			return nil, err
		}
		c := &cutConn{Conn: conn}
		c.left.Store(cut)
		return c, nil
	}, h2)
}

// A visit is what a hopper heard at one place.
type visit struct {
	by       string
	rooms    []string
	from, to int64 // cursors
	got      []heard
}

func hop(t *testing.T, network string, seed uint64) {
	b := newBed(t, network, func(c *config) { c.maxEvents, c.maxRoomBytes, c.maxBytes = 10_000, 1<<25, 1<<26 })
	rooms := []string{"a", "b", "c"}
	const publishers, each, hoppers = 3, 60, 4
	ctx, done := context.WithCancel(t.Context()) // done when all is published
	start := b.relay.lastID.Load()

	var publishing sync.WaitGroup
	for p := range publishers {
		rng := mathrand.New(mathrand.NewPCG(seed, uint64(p)))
		publishing.Go(func() {
			for i := range each {
				if network != tcp && rng.IntN(4) == 0 {
					time.Sleep(time.Duration(rng.IntN(100)) * time.Millisecond)
				}
				room, text := rooms[rng.IntN(3)], fmt.Sprintf("%d %d </%s>", p, i, strings.Repeat("é", rng.IntN(1000)))
				for tries := 0; ; tries++ {
					if tries > 1000 {
						t.Errorf("publisher %d: %d could not be published", p, i)
						return
					}
					if b.insist(rng, network == pipeH2, room, fmt.Sprintf("%d.%d", p, i), text) {
						break
					}
				}
			}
		})
	}
	var hopping sync.WaitGroup
	stays := make([][]visit, hoppers)
	for n := range hoppers {
		rng := mathrand.New(mathrand.NewPCG(seed, uint64(100+n)))
		hopping.Go(func() {
			cursor := start
			for ctx.Err() == nil {
				s := b.stay(ctx, t, rng, network == pipeH2, rooms, cursor)
				cursor = s.to
				stays[n] = append(stays[n], s)
			}
			end := b.relay.lastID.Load()
			for cursor < end && !t.Failed() { // what is left, without a cut
				e, _ := b.tryListen(t.Context(), b.client, kindOf("poll"), "a,b,c", fmt.Sprint("after=", cursor))
				s := visit{"poll", rooms, cursor, cursor, nil}
				s.hear(t, e, 1000)
				cursor = s.to
				stays[n] = append(stays[n], s)
			}
		})
	}
	publishing.Wait()
	done()
	hopping.Wait()

	// The log, which is what all should have heard.
	var log []heard
	e := b.listen(kindOf("poll"), "a,b,c", fmt.Sprint("after=", start))
	for h := e.next(); h.kind != "beat"; h = e.next() {
		log = append(log, h)
	}
	if len(log) != publishers*each {
		t.Errorf("%d events in the log, want %d", len(log), publishers*each)
	}
	next := [publishers]int{}
	for _, h := range log { // everybody's in their order
		var p, i int
		fmt.Sscanf(h.text, "%d %d", &p, &i)
		if next[p] != i {
			t.Errorf("publisher %d: %d came, want %d", p, i, next[p])
		}
		next[p] = i + 1
	}
	hops, byTechnique := 0, map[string]int{}
	for n := range stays {
		for _, s := range stays[n] {
			var want []heard
			for _, h := range log {
				if slices.Contains(s.rooms, h.room) && s.from < h.id && h.id <= s.to {
					want = append(want, h)
				}
			}
			if !slices.Equal(s.got, want) {
				t.Errorf("hopper %d, by %s in %v from %d to %d: heard %d events, want %d\n%v\n%v", n, s.by, s.rooms, s.from, s.to, len(s.got), len(want), s.got, want)
				return
			}
			hops++
			byTechnique[s.by] += len(s.got)
		}
	}
	t.Logf("%d hops, events by technique: %v", hops, byTechnique)
	for _, k := range earKinds {
		if !k.people && byTechnique[k.name] == 0 && network != tcp {
			t.Errorf("%s heard nothing", k.name)
		}
	}
}

// insist publishes over a frail connection, and reports whether it was told so.
func (b *testbed) insist(rng *mathrand.Rand, h2 bool, room, key, text string) bool {
	client := b.frail(rng, h2 && rng.IntN(2) == 0)
	defer client.CloseIdleConnections()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if rng.IntN(2) == 0 {
		req, _ := http.NewRequestWithContext(ctx, "POST", b.url+"/rooms/"+room+"?key="+key, strings.NewReader(text))
		res, err := client.Do(req)
		if err != nil {
			return false
		}
		defer res.Body.Close()
		_, err = io.ReadAll(res.Body)
		if res.StatusCode != 200 && res.StatusCode != 201 {
			b.t.Errorf("publish: %s", res.Status)
		}
		return err == nil
	}
	client = b.frail(rng, false)
	conn, _, err := websocket.Dial(ctx, "ws"+strings.TrimPrefix(b.url, "http")+"/rooms/elsewhere/ws", &websocket.DialOptions{HTTPClient: client})
	if err != nil {
		return false
	}
	defer conn.CloseNow()
	frame, _ := json.Marshal(map[string]string{"room": room, "key": key, "data": text})
	if conn.Write(ctx, websocket.MessageText, frame) != nil {
		return false
	}
	for {
		_, frame, err := conn.Read(ctx)
		if err != nil {
			return false
		}
		if strings.HasPrefix(string(frame), `{"type":"ack","key":"`+key+`","id":`) {
			return true
		}
	}
}

// stay listens for a while, by any technique, in some of the rooms.
func (b *testbed) stay(ctx context.Context, t *testing.T, rng *mathrand.Rand, h2 bool, rooms []string, cursor int64) visit {
	var k earKind
	for k.name == "" || k.people {
		k = earKinds[rng.IntN(len(earKinds))]
	}
	some := []string{}
	for len(some) == 0 {
		for _, i := range rng.Perm(len(rooms)) {
			if rng.IntN(3) > 0 {
				some = append(some, rooms[i])
			}
		}
	}
	client := b.frail(rng, h2 && rng.IntN(2) == 0 && k.technique != "ws")
	defer client.CloseIdleConnections()
	ask := []string{"wait=20", fmt.Sprint("after=", cursor)}
	if rng.IntN(2) == 0 {
		ask = []string{"wait=20", "after=1", fmt.Sprint("Last-Event-ID: ", cursor)}
	}
	s := visit{k.name, some, cursor, cursor, nil}
	e, err := b.tryListen(ctx, client, k, strings.Join(some, ","), ask...)
	if err == nil {
		defer e.close()
		s.hear(t, e, 1+rng.IntN(30))
	} else if _, ok := err.(garbled); ok {
		t.Error(err)
	}
	return s
}

// hear takes at most n things.
func (s *visit) hear(t *testing.T, e *ear, n int) {
	for ; n > 0; n-- {
		h, err := e.hears()
		if err != nil {
			if _, ok := err.(garbled); ok {
				t.Error(err)
			}
			break
		}
		switch h.kind {
		case "hello":
			if h.id != s.from {
				t.Errorf("%s: hello %d, want %d", s.by, h.id, s.from)
			}
		case "beat":
		case "message":
			s.got = append(s.got, h)
			s.to = h.id
		default:
			t.Errorf("%s: heard %s", s.by, h.json)
		}
	}
	if len(e.due) == 0 && e.after >= 0 {
		s.to = e.after // an answer's cursor covers what is not in it
	}
}

// The long-polls.

func bubble(test func(*testing.T)) func(*testing.T) {
	return func(t *testing.T) { synctest.Test(t, test) }
}

func TestLongPoll(t *testing.T) {
	for _, name := range []string{"longpoll", "jsonp"} {
		k := kindOf(name)
		path := "/rooms/a,b/" + k.technique + "?callback=my.$cb_1&after="
		// asks makes one request, and returns what it heard and how long it took.
		asks := func(b *testbed, more string) (*ear, time.Duration) {
			start := time.Now()
			e := b.listen(k, "a,b")
			e.path = path + more
			if err := e.hear(e); err != nil {
				b.t.Fatal(err)
			}
			return e, time.Since(start)
		}
		after := func(t *testing.T, d time.Duration, do func()) {
			done := make(chan struct{})
			time.AfterFunc(d, func() { do(); close(done) })
			t.Cleanup(func() { <-done })
		}

		t.Run(name+"/the first event is the answer", bubble(func(t *testing.T) {
			b := newBed(t, pipe)
			after(t, 7*time.Second, func() { b.say("b", "hi") })
			e, took := asks(b, "")
			e.expect("message hi")
			if took != 7*time.Second || len(e.due) > 0 || e.after != b.relay.lastID.Load() {
				t.Errorf("it took %v, the cursor is %d", took, e.after)
			}
		}))
		t.Run(name+"/after 25 s, an empty answer with the cursor", bubble(func(t *testing.T) {
			b := newBed(t, pipe)
			b.say("a", "before")
			after(t, 10*time.Second, func() { b.say("c", "elsewhere") })
			e, took := asks(b, "")
			e.expect("beat")
			if took != 25*time.Second || e.after != b.relay.lastID.Load() {
				t.Errorf("it took %v, the cursor is %d, want 25 s and %d", took, e.after, b.relay.lastID.Load())
			}
		}))
		t.Run(name+"/after as long as it asks for, an empty answer", bubble(func(t *testing.T) {
			b := newBed(t, pipe)
			for _, wait := range []int{0, 1, 3, 55} {
				if _, took := asks(b, fmt.Sprint("&wait=", wait)); took != time.Duration(wait)*time.Second {
					t.Errorf("wait=%d took %v", wait, took)
				}
			}
		}))
		t.Run(name+"/what the cursor asks for is there at once", bubble(func(t *testing.T) {
			b := newBed(t, pipe)
			first := b.say("a", "one")
			for i := range 300 {
				b.say([]string{"a", "b"}[i%2], fmt.Sprint(i))
			}
			e, took := asks(b, fmt.Sprint(first, "&wait=55"))
			if took != 0 || len(e.due) != 256 || e.due[0].text != "0" || e.after != first+256 {
				t.Errorf("%d events after %v, the first %v, the cursor %d", len(e.due), took, e.due[0], e.after)
			}
			e, took = asks(b, fmt.Sprint(e.after, "&wait=55")) // and the rest
			if took != 0 || len(e.due) != 44 || e.due[43].text != "299" {
				t.Errorf("%d events after %v", len(e.due), took)
			}
		}))
		t.Run(name+"/nobody's presence ends the wait of who doesn't see it", bubble(func(t *testing.T) {
			b := newBed(t, pipe)
			after(t, time.Second, func() { b.do("POST", "/rooms/a/presence?user=bob", "online") })
			e, took := asks(b, "&user=ada&presence=0")
			e.expect("beat")
			if took != 25*time.Second {
				t.Errorf("it took %v", took)
			}
		}))
		t.Run(name+"/a stop ends the wait", bubble(func(t *testing.T) {
			b := newBed(t, pipe)
			after(t, 5*time.Second, b.stop)
			e, took := asks(b, "")
			e.expect("beat")
			if took != 5*time.Second || e.after < b.relay.epoch {
				t.Errorf("it took %v, the cursor is %d", took, e.after)
			}
		}))
		t.Run(name+"/who leaves is noticed at once", bubble(func(t *testing.T) {
			for _, network := range []string{pipe, pipe10} {
				b := newBed(t, network)
				ctx, leave := context.WithCancel(t.Context())
				go b.tryAsk(ctx, path)
				time.Sleep(time.Second)
				if n := b.readers(); n != 2 {
					t.Errorf("%d places in rooms, want 2", n)
				}
				leave()
				synctest.Wait()
				b.idle()
			}
		}))
	}
}

func (b *testbed) tryAsk(ctx context.Context, path string) {
	req, _ := http.NewRequestWithContext(ctx, "GET", b.url+path, nil)
	if res, err := b.client.Do(req); err == nil {
		res.Body.Close()
	}
}

// The pages.

// A refresh is a whole page with a form, which asks to be fetched again.
func TestRefresh(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t, pipe)
		for i := range 60 {
			b.say("a", fmt.Sprint(i))
		}
		res, page := b.do("GET", "/rooms/a/refresh", "")
		if n := strings.Count(page, `<p class="message">`); n != 50 || res.Header.Get("Refresh") != "10" {
			t.Errorf("%d messages, Refresh: %s; want 50 and 10", n, res.Header.Get("Refresh"))
		}
		if strings.Index(page, ">59<") > strings.Index(page, ">10<") || strings.Contains(page, ">9<") {
			t.Error("the page does not begin with the newest message and end with the fiftieth")
		}
		if !strings.Contains(page, `<form method="post" action="../a">`) || !strings.Contains(page, `name="data"`) {
			t.Error("the page has no form")
		}
		if res, _ := b.do("GET", "/rooms/a/refresh?wait=3&last=1", ""); res.Header.Get("Refresh") != "3" {
			t.Errorf("Refresh: %s, want 3", res.Header.Get("Refresh"))
		}
		if _, page := b.do("GET", "/rooms/a/refresh?form=0", ""); strings.Contains(page, "<form") {
			t.Error("a page with form=0 has a form")
		}
		// The page that never ends must not have a form: it would end it.
		e := b.listen(kindOf("html"), "a", "last=2").begin()
		e.expect("message 58", "message 59")
	})
}

// What users say is text in a page, a part and a script, and nothing else.
func TestNoMarkup(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t, pipe)
		evil := "</script><script>alert(1)</script><img src=x onerror='alert(2)'>\"&amp;\u2028\u2029--> ]]> \x00 \r\n\r\n--boundary\r\ndata: {}\n\n"
		who := `"><svg onload=alert(3)>'&`
		for _, kind := range []string{"message", "typing"} {
			b.say("a?"+url.Values{"user": {who}, "type": {kind}}.Encode(), evil)
		}
		for _, path := range []string{
			"refresh?last=9", "refresh?last=9&user=" + url.QueryEscape(who), "poll?last=9", "longpoll?last=9", "jsonp?last=9&callback=f",
			"html?last=9&user=" + url.QueryEscape(who), "iframe?last=9", "stream?last=9", "sse?last=9",
			"multipart?last=9", "multipart?as=text&last=9", "multipart?as=html&last=9&user=" + url.QueryEscape(who),
			"../form?user=" + url.QueryEscape(who), "../form?live=refresh&user=" + url.QueryEscape(who),
		} {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			req, _ := http.NewRequestWithContext(ctx, "GET", b.url+strings.Replace("/rooms/a/"+path, "/a/../", "/a/", 1), nil)
			res, err := b.client.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			all, _ := io.ReadAll(res.Body)
			res.Body.Close()
			cancel()
			body := string(all)
			if strings.HasPrefix(path, "multipart?as=text") {
				continue // text/plain and nosniff: it may say what it wants
			}
			script := !strings.Contains(path, "html") && !strings.Contains(path, "refresh") // or data for one
			for _, no := range []string{"<script>alert", "<img", "<svg", "onload=alert(3)>", "\u2028"} {
				if strings.Contains(body, no) && (script || no != "\u2028") {
					t.Errorf("%s: %q gets through:\n%s", path, no, body)
				}
			}
			if n := strings.Count(body, "</script>") - strings.Count(body, "<script nonce="); n != 0 {
				t.Errorf("%s: %d scripts end too early", path, n)
			}
			policy := res.Header.Get("Content-Security-Policy")
			page := strings.HasPrefix(res.Header.Get("Content-Type"), "text/html")
			if page && (policy == "" || strings.Contains(policy, "unsafe") || !strings.Contains(policy, "default-src 'none'")) {
				t.Errorf("%s: the policy is %q", path, policy)
			}
		}
	})
}

// Who leaves, and who stands still.

// A thousand clients of all techniques come and go, politely or not, and
// nothing is left of them.
func TestNothingIsLeft(t *testing.T) {
	for _, network := range []string{pipe, tcp} {
		t.Run(network, func(t *testing.T) {
			onNetwork(t, network, func(t *testing.T) {
				b := newBed(t, network)
				n := map[string]int{pipe: 1000, tcp: 300}[network]
				comeAndGo(b, n) // pools, maps and the runtime have their size
				goroutines, heap := b.weigh()
				comeAndGo(b, n)
				goroutines2, heap2 := b.weigh()
				if goroutines2 > goroutines+5 {
					stacks := make([]byte, 1<<20)
					t.Errorf("%d goroutines before, %d after\n%s", goroutines, goroutines2, stacks[:runtime.Stack(stacks, true)])
				}
				if heap2 > heap+1<<20 {
					t.Errorf("%d bytes of heap before, %d after", heap, heap2)
				}
				b.idle()
			})
		})
	}
}

func (b *testbed) weigh() (goroutines int, heap uint64) {
	if b.network != tcp {
		time.Sleep(time.Hour) // rooms, leases and connections without a request are forgotten
	}
	b.settle()
	b.until(func() bool { return runtime.NumGoroutine() < 12 || b.network != tcp }) // who has said goodbye lingers for a second
	var m runtime.MemStats
	for range 3 {
		runtime.GC()
	}
	runtime.ReadMemStats(&m)
	return runtime.NumGoroutine(), m.HeapAlloc
}

func comeAndGo(b *testbed, n int) {
	b.t.Helper()
	ctx, leave := context.WithCancel(context.Background())
	var ears []*ear
	waiting := 0
	for i := range n {
		k := earKinds[i%len(earKinds)]
		ask := []string{}
		if i%3 == 0 {
			ask = append(ask, fmt.Sprint("user=u", i))
		}
		if k.streams() {
			e, err := b.tryListen(ctx, b.client, k, fmt.Sprintf("a,r%d", i%50), ask...)
			if err != nil {
				b.t.Fatal(err)
			}
			ears = append(ears, e)
			for h := e.next(); h.kind != "hello"; h = e.next() {
			}
		} else {
			if k.technique == "longpoll" || k.technique == "jsonp" {
				waiting++
			}
			go b.tryAsk(ctx, fmt.Sprintf("/rooms/a,r%d/%s?callback=f&%s", i%50, k.technique, strings.Join(ask, "")))
		}
	}
	b.settle()
	if !b.until(func() bool { return int(b.active()) == len(ears)+waiting }) {
		b.t.Errorf("%d are held, want %d streams and %d requests", b.active(), len(ears), waiting)
	}
	b.say("a", "to all of you")
	for i, e := range ears {
		switch i % 3 {
		case 0: // reads to the end, and says goodbye
			for h := e.next(); h.text != "to all of you"; h = e.next() {
			}
			if e.conn != nil {
				e.conn.Close(websocket.StatusNormalClosure, "")
			}
			e.close()
		case 1: // closes in the middle
			e.close()
		}
	}
	leave() // and all others
	b.hangUp()
	b.settle()
}

// A chunk may be as long as a page of fifty of the longest messages.
func TestALongChunk(t *testing.T) {
	s := newServer(testRelay(limits{maxBytes: 1 << 30, maxRoomBytes: 1 << 20}))
	st := &session{stream: &stream{server: s, headroom: chunkHeadSize}}
	st.fd = -1
	ours, theirs := net.Pipe()
	body := bytes.Repeat([]byte("x"), 17<<20)
	if err := st.sendChunk(s.scratches.New().(*scratch), append(make([]byte, chunkHeadSize), body...)); err != errBlocked {
		t.Fatal(err)
	}
	go func() {
		st.pending.WriteTo(ours)
		io.WriteString(ours, "0\r\n\r\n")
		ours.Close()
	}()
	if got, err := io.ReadAll(httputil.NewChunkedReader(theirs)); err != nil || !bytes.Equal(got, body) {
		t.Errorf("%d bytes came, %v; want %d", len(got), err, len(body))
	}
}

// What streams that were not taken over have to write is bounded too.
func TestWhatIsWrittenTheOrdinaryWayIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t, pipe10, func(c *config) { c.maxRoomBytes, c.maxBytes = 50_000, 100_000 })
		for range 20 {
			b.listen(kindOf("stream"), "a").begin()
		}
		b.say("a", strings.Repeat("x", 10_000))
		b.settle()
		if n, dropped := b.unsentBytes.Load(), b.stats.dropped.Load(); n == 0 || n > 100_000 || dropped == 0 {
			t.Errorf("20 clients that do not read are owed %d bytes, and %d were dropped; want at most 100000", n, dropped)
		}
		time.Sleep(2 * writeTimeout)
		if n, held := b.unsentBytes.Load(), b.active(); n != 0 || held != 0 {
			t.Errorf("when their time is up %d are held, and owed %d bytes", held, n)
		}
	})
}

// To answer a long-poll takes no larger stack than to wait: it would be kept by
// all that wait again. A flush from deep within the handler takes 16 KB, and not 8.
func TestAnAnswerTakesNoLargerStack(t *testing.T) {
	if info, _ := debug.ReadBuildInfo(); info != nil && slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"}) {
		t.Skip("with the race detector every stack is larger; without it this is tested")
	}
	defer debug.SetGCPercent(debug.SetGCPercent(-1)) // which makes stacks smaller again
	const n = 200
	b := newBed(t, tcp)
	conns := make([]net.Conn, n)
	askAll := func() (stacks uint64) {
		for _, conn := range conns {
			fmt.Fprint(conn, "GET /rooms/a/longpoll?wait=55 HTTP/1.1\r\nHost: cometes.test\r\n\r\n")
		}
		if !b.until(func() bool { return b.active() == n }) {
			t.Fatalf("%d wait, want %d", b.active(), n)
		}
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.StackInuse
	}
	for i := range conns {
		var err error
		if conns[i], err = b.dial(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	before := askAll()
	b.say("a", "hi")
	for _, conn := range conns {
		res, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil || res.StatusCode != 200 {
			t.Fatal(res, err)
		}
		if body, err := io.ReadAll(res.Body); err != nil || !strings.Contains(string(body), `"hi"`) {
			t.Fatalf("%s, %v", body, err)
		}
	}
	if after := askAll(); after > before+n<<10 {
		t.Errorf("%d long-polls had %d bytes of stacks before they were answered, and %d after", n, before, after)
	}
}

// A client that comes and goes leaves no clock behind.
func TestNoClockIsLeft(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t, pipe)
		allocations := func() uint64 {
			var before, after runtime.MemStats
			e := b.listen(kindOf("stream"), "a").begin()
			runtime.ReadMemStats(&before)
			for range 20 {
				e.expect("beat")
			}
			runtime.ReadMemStats(&after)
			e.close()
			synctest.Wait()
			return after.Mallocs - before.Mallocs
		}
		once := allocations()
		for range 1000 { // all at once
			b.listen(kindOf("stream"), "a").begin().close()
			synctest.Wait()
		}
		stays := b.listen(kindOf("stream"), "a").begin()
		go io.Copy(io.Discard, stays.body)
		for range 100 { // one now and then, while somebody stays
			b.listen(kindOf("stream"), "a").begin().close()
			time.Sleep(300 * time.Millisecond)
		}
		if again := allocations(); again > 3*once+1000 {
			t.Errorf("twenty heartbeats took %d allocations at first, and %d after many clients had come and gone", once, again)
		}
	})
}

// A client that does not read is ended 10 s after a write that made no
// progress, alone; the others hear all at once.
func TestStandstill(t *testing.T) {
	for _, network := range []string{pipe, pipe10} {
		for _, k := range earKinds {
			if !k.streams() || k.technique == "ws" && network == pipe10 {
				continue
			}
			t.Run(network+"/"+k.name, bubble(func(t *testing.T) {
				b := newBed(t, network)
				others := []*ear{b.listen(kindOf("stream"), "a").begin(), b.listen(kindOf("sse"), "a").begin()}
				still := b.listen(k, "a").begin()
				time.Sleep(time.Second)
				for i := range 100 {
					b.say("a", fmt.Sprint(i, strings.Repeat("x", 1000)))
				}
				start := time.Now()
				for i := range 100 {
					for _, e := range others {
						if h := e.next(); !strings.HasPrefix(h.text, fmt.Sprint(i, "x")) {
							t.Fatalf("%s heard %.20v, want %d", e.name, h, i)
						}
					}
				}
				inNoTime(t, start)
				time.Sleep(9900 * time.Millisecond)
				if n := b.active(); n != 3 {
					t.Errorf("after 9.9 s there are %d streams, want 3", n)
				}
				time.Sleep(200 * time.Millisecond)
				if n := b.active(); n != 2 {
					t.Errorf("after 10.1 s there are %d streams, want 2", n)
				}
				var err error
				for h := (heard{}); err == nil; h, err = still.hears() {
					if h.kind == "bye" {
						t.Error("who stood still was told bye")
					}
				}
				if err == io.EOF && network != pipe10 { // where it is the only end there is
					t.Error("who stood still heard a good end, want a broken connection")
				}
				b.say("a", "later")
				for _, e := range others {
					for h := e.next(); h.text != "later"; h = e.next() {
					}
				}
			}))
		}
	}
}

// rawStream asks for the room a as lines over a connection that the test keeps,
// and returns those behind the hello.
func rawStream(t *testing.T, conn net.Conn) *bufio.Scanner {
	t.Helper()
	io.WriteString(conn, "GET /rooms/a/stream HTTP/1.1\r\nHost: cometes.test\r\n\r\n")
	res, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(res.Body)
	if !lines.Scan() || !strings.Contains(lines.Text(), "hello") {
		t.Fatalf("the stream begins with %q", lines.Text())
	}
	return lines
}

// A client has nothing to say to a stream. If it does that is lost, and its
// going is noticed as ever; if it says more than a request may, it is given up.
func TestWhoSpeaksToAStream(t *testing.T) {
	for _, network := range []string{pipe, tcp} {
		onNetwork(t, network, func(t *testing.T) {
			b := newBed(t, network)
			for _, size := range []int{10, maxHeader + 100} {
				conn, err := b.dial(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				lines := rawStream(t, conn)
				go io.WriteString(conn, strings.Repeat("x", size))
				if size < maxHeader {
					b.say("a", "hi")
					if !lines.Scan() || !strings.Contains(lines.Text(), `"hi"`) {
						t.Errorf("%d bytes were said, and then came %q", size, lines.Text())
					}
					conn.Close()
				} else if lines.Scan() {
					t.Errorf("%d bytes were said, and then came %q", size, lines.Text())
				}
				b.until(func() bool { return b.active() == 0 })
				conn.Close()
			}
		})
	}
}

// A lateConn is slow to rouse who reads it.
type lateConn struct{ net.Conn }

func (c lateConn) SetReadDeadline(at time.Time) error {
	if at.Equal(longAgo) {
		time.Sleep(100 * time.Millisecond)
	}
	return c.Conn.SetReadDeadline(at)
}

// Who speaks while their socket is full has its goroutine see to it before it
// is roused. The rousing comes late then, and ends nobody.
func TestALateRousingEndsNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t, pipe)
		l := &pipeListener{conns: make(chan net.Conn), closed: make(chan struct{})}
		srv := b.http(false)
		go srv.Serve(l)
		defer srv.Close()
		conn, theirs := net.Pipe()
		defer conn.Close()
		l.conns <- lateConn{theirs}
		lines := rawStream(t, conn)
		for i := range 5 {
			b.say("a", fmt.Sprint("message ", i))
			time.Sleep(50 * time.Millisecond)
			go io.WriteString(conn, "x")
			if !lines.Scan() || !strings.Contains(lines.Text(), fmt.Sprint("message ", i)) {
				t.Fatalf("message %d is %q, %v", i, lines.Text(), lines.Err())
			}
			time.Sleep(time.Second)
		}
		if n := b.active(); n != 1 {
			t.Errorf("%d streams", n)
		}
	})
}

// The same over HTTP/2, where it is the window that is full, of one stream
// beside others in the connection.
func TestStandstillHTTP2(t *testing.T) {
	onNetwork(t, pipeH2, func(t *testing.T) {
		b := newBed(t, pipeH2, func(c *config) { c.maxRoomBytes = 10 << 20 })
		other := b.listen(kindOf("sse"), "a").begin()
		still := b.listen(kindOf("stream"), "a").begin()
		for i := range 100 { // 6 MB; the client's window has 4
			b.say("a", fmt.Sprint(i, strings.Repeat("x", 60_000)))
			if h := other.next(); !strings.HasPrefix(h.text, fmt.Sprint(i, "x")) {
				t.Fatalf("heard %.20v, want %d", h, i)
			}
		}
		time.Sleep(9900 * time.Millisecond)
		if n := b.active(); n != 2 {
			t.Errorf("after 9.9 s there are %d streams, want 2", n)
		}
		time.Sleep(200 * time.Millisecond)
		if n := b.active(); n != 1 {
			t.Errorf("after 10.1 s there are %d streams, want 1", n)
		}
		b.say("a", "later")
		for h := other.next(); h.text != "later"; h = other.next() {
		}
		still.close()
	})
}

// The same for an answer that ends.
func TestStandstillAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t, pipe)
		b.say("a", strings.Repeat("x", 60_000))
		for _, path := range []string{"/rooms/a/poll?last=1", "/rooms/a/longpoll?last=1", "/rooms/a/refresh", "/rooms/a/jsonp?last=1&callback=f"} {
			conn, _ := b.dial(t.Context())
			fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: cometes.test\r\n\r\n", path)
			time.Sleep(10*time.Second - time.Millisecond)
			if n := b.readers(); n != 1 {
				t.Errorf("%s: %d are served, want 1", path, n)
			}
			time.Sleep(2 * time.Millisecond)
			b.idle()
			conn.Close()
		}
	})
}

// A client that reads slowly, but reads, is not ended.
func TestSlow(t *testing.T) {
	for _, name := range []string{"stream", "ws"} {
		t.Run(name, bubble(func(t *testing.T) {
			b := newBed(t, pipe, func(c *config) { c.maxEvents = 1000 })
			client := b.newClient(func(ctx context.Context) (net.Conn, error) {
				conn, err := b.dial(ctx)
				return &slowConn{Conn: conn}, err
			}, false)
			e, err := b.tryListen(t.Context(), client, kindOf(name), "a")
			if err != nil {
				t.Fatal(err)
			}
			e.begin()
			for i := range 200 {
				b.say("a", fmt.Sprint(i, strings.Repeat("x", 1000)))
			}
			start := time.Now()
			for i := range 200 {
				h := e.next()
				for h.kind == "beat" {
					h = e.next()
				}
				if !strings.HasPrefix(h.text, fmt.Sprint(i, "x")) {
					t.Fatalf("heard %.20v, want %d", h, i)
				}
			}
			if d := time.Since(start); d < 10*time.Minute {
				t.Errorf("it took %v; this client is not slow", d)
			}
			client.CloseIdleConnections()
		}))
	}
}

// A slowConn reads 2,000 bytes in 9 s.
type slowConn struct{ net.Conn }

func (c *slowConn) Read(b []byte) (int, error) {
	time.Sleep(9 * time.Second)
	return c.Conn.Read(b[:min(len(b), 2000)])
}

// A client that leaves is no error, even if something is being written to it.
func TestLeavingIsNoError(t *testing.T) {
	for _, network := range []string{pipe, pipe10, pipeH2, tcp} {
		t.Run(network, func(t *testing.T) {
			onNetwork(t, network, func(t *testing.T) {
				b := newBed(t, network)
				b.tattle = true
				for range 20 {
					client := b.newClient(b.dial, network == pipeH2)
					e, err := b.tryListen(t.Context(), client, kindOf("stream"), "a", "last=100")
					if err != nil {
						t.Fatal(err)
					}
					b.say("a", strings.Repeat("x", 50_000))
					e.next()
					b.hangUp()
					b.settle()
				}
			})
		})
	}
}

// The WebSocket.

// dials a WebSocket, past its hello.
func (b *testbed) socket(rooms string, ask ...string) *ear {
	b.t.Helper()
	return b.listen(kindOf("ws"), rooms, ask...).begin()
}

// With as=data an event is its data alone: text as it is, line by line, and
// anything else as JSON.
func TestDataAlone(t *testing.T) {
	texts := []string{`"hi"`, `"two\nlines"`, `"\r\na\rb\n"`, `""`, `" <b> & é\u2028"`, `{"a":["<"]}`, "42", "null"}
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t, pipe)
		sse := b.listen(kindOf("sse"), "a", "as=data", "user=ada")
		ws, r := b.raw("/rooms/a/ws?as=data&presence=1")
		for _, text := range texts {
			b.do("POST", "/rooms/a?type=x", text, jsonKind)
		}
		b.say("a", "the last")
		// By WebSocket each is a frame of its own, and there is nothing else but pings.
		var frames []string
		for len(frames) < len(texts)+1 {
			var head [2]byte
			if _, err := io.ReadFull(r, head[:]); err != nil {
				t.Fatal(err)
			}
			body := make([]byte, head[1])
			io.ReadFull(r, body)
			if head[0] == 0x81 {
				frames = append(frames, string(body))
			} else if head[0] != 0x89 {
				t.Errorf("a frame that begins with %x", head[0])
			}
		}
		if want := []string{"hi", "two\nlines", "\r\na\rb\n", "", " <b> & é\u2028", `{"a":["\u003c"]}`, "42", "null", "the last"}; !slices.Equal(frames, want) {
			t.Errorf("ws: %q\nwant %q", frames, want)
		}
		ws.Close()

		want := strings.Join([]string{
			"event: hello\ndata: " + `{"rooms":["a"],"beat":15,"instance":"` + b.instance + `"}`,
			"event: presence\ndata: " + `{"count":1,"users":{"ada":"online"}}`,
			"event: x\ndata: hi",
			"event: x\ndata: two\ndata: lines",
			"event: x\ndata: \ndata: a\ndata: b\ndata: ",
			"event: x\ndata: ",
			"event: x\ndata:  <b> & é\u2028",
			"event: x\ndata: " + `{"a":["\u003c"]}`,
			"event: x\ndata: 42",
			"event: x\ndata: null",
			"data: the last",
		}, "\n\n") + "\n\nevent: beat\ndata:\n\n"
		var got strings.Builder
		for !strings.HasSuffix(got.String(), "beat\ndata:\n\n") {
			line, err := sse.line()
			if err != nil {
				t.Fatal(err)
			}
			if !strings.HasPrefix(line, "id: ") && !strings.HasPrefix(line, "retry: ") {
				got.WriteString(line + "\n")
			}
		}
		if got.String() != want {
			t.Errorf("sse: %q\nwant %q", got.String(), want)
		}

		// An answer has only who asks for it; what can't be taken is not told to others.
		e := b.listen(kindOf("ws"), "a", "as=data")
		e.send(`{"data":`)
		e.send("hi")
		e.send(`{"data":"with a key","key":"k"}`)
		e.send(`{"data":"","room":"_x","key":"k2"}`)
		e.send("bye")
		var all []string
		for range 5 {
			_, frame, err := e.conn.Read(e.ctx)
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, string(frame))
		}
		slices.Sort(all)
		if !slices.Equal(all[:3], []string{"bye", "hi", "with a key"}) || !strings.Contains(all[3], `"ack"`) || !strings.Contains(all[4], `"error"`) {
			t.Errorf("%q", all)
		}
		b.relay.stop()
		b.pool.wakeAll()
		if _, _, err := e.conn.Read(e.ctx); websocket.CloseStatus(err) != websocket.StatusGoingAway {
			t.Errorf("when the relay stops: %v, want 1001", err)
		}
	})
}

// The relay speaks no subprotocol, but to a browser that offers some it has to name one.
func TestSubprotocols(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t, pipe)
		hundred := strings.TrimSuffix(strings.Repeat("p, ", 100), ", ")
		for offered, want := range map[string]string{"": "", "chat": "chat", "mqtt, chat": "mqtt", "x," + hundred: "x", " a ,b": "a", ",b": ""} {
			headers := http.Header{}
			if offered != "" {
				headers.Set("Sec-WebSocket-Protocol", offered)
			}
			conn, res, err := websocket.Dial(t.Context(), b.url+"/rooms/a/ws", &websocket.DialOptions{HTTPClient: b.client, HTTPHeader: headers, Subprotocols: []string{want}})
			if err != nil {
				t.Errorf("%.20q: %v", offered, err)
				continue
			}
			if got := res.Header.Get("Sec-WebSocket-Protocol"); got != want {
				t.Errorf("%.20q is answered %q, want %q", offered, got, want)
			}
			conn.CloseNow()
		}
	})
}

func (e *ear) send(frame string) {
	e.t.Helper()
	if err := e.conn.Write(e.ctx, websocket.MessageText, []byte(frame)); err != nil {
		e.t.Fatal(err)
	}
}

func TestWebSocketPublishes(t *testing.T) {
	for _, network := range []string{pipe, tcp} {
		t.Run(network, func(t *testing.T) { onNetwork(t, network, testWebSocketPublishes) })
	}
}

func testWebSocketPublishes(t *testing.T) {
	network := t.Name()[strings.LastIndex(t.Name(), "/")+1:]
	b := newBed(t, network)
	ws := b.socket("a", "user=ada", "presence=0")
	reader := b.listen(kindOf("stream"), "a,b").begin()
	for _, test := range []struct{ frame, want, ack string }{
		{"hi", `"room":"a","type":"message","from":"ada","time":T,"data":"hi"`, ""},
		{"", `"room":"a","type":"message","from":"ada","time":T,"data":""`, ""},
		{` {"data":1}`, `"room":"a","type":"message","from":"ada","time":T,"data":" {\"data\":1}"`, ""},
		{"[1]", `"room":"a","type":"message","from":"ada","time":T,"data":"[1]"`, ""},
		{`{"type":"message","data":{"x": [1, "<"]}}`, `"room":"a","type":"message","from":"ada","time":T,"data":{"x":[1,"\u003c"]}`, ""},
		{`{"data":"there","room":"b"}`, `"room":"b","type":"message","from":"ada","time":T,"data":"there"`, ""},
		{`{}`, `"room":"a","type":"message","from":"ada","time":T,"data":null`, ""},
		{`{"type":"x.y:z-1_","data":0,"ttl":86400}`, `"room":"a","type":"x.y:z-1_","from":"ada","time":T,"data":0`, ""},
		{`{"data":"k","key":"k1"}`, `"room":"a","type":"message","from":"ada","time":T,"data":"k"`, `{"type":"ack","key":"k1","id":ID}`},
		{`{"data":"é","key":"ключ \u003c"}`, `"room":"a","type":"message","from":"ada","time":T,"data":"é"`, `{"type":"ack","key":"ключ \u003c","id":ID}`},
	} {
		ws.send(test.frame)
		h := reader.next()
		got := regexp.MustCompile(`"time":\d+`).ReplaceAllString(h.json, `"time":T`)
		if want := fmt.Sprintf(`{"id":%d,%s}`, h.id, test.want); got != want {
			t.Errorf("%s became\n%s, want\n%s", test.frame, got, want)
		}
		var own, ack string
		for h.room == "a" && own == "" || test.ack != "" && ack == "" {
			said := ws.next()
			if said.kind == "ack" {
				ack = said.json
			} else {
				own = said.json
			}
		}
		if h.room == "a" && own != h.json {
			t.Errorf("the socket itself heard %s, want %s", own, h.json)
		}
		if want := strings.Replace(test.ack, "ID", fmt.Sprint(h.id), 1); ack != want {
			t.Errorf("ack %s, want %s", ack, want)
		}
	}
	// A key said twice is one message, with one id.
	mark := b.relay.lastID.Load()
	ws.send(`{"data":"k","key":"k1"}`)
	if h := ws.next(); h.kind != "ack" || b.relay.lastID.Load() != mark {
		t.Errorf("again: %s", h.json)
	}
	if res, body := b.do("POST", "/rooms/a?key=k1", "k"); res.StatusCode != 200 {
		t.Errorf("the key is not known to HTTP: %s %s", res.Status, body)
	}
}

// What can't be taken is said so, with the reason; nothing is published, and the socket lives on.
func TestWebSocketRefusals(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t, pipe)
		one, two := b.socket("a", "user=ada", "presence=0"), b.socket("a,b")
		deep := strings.Repeat("[", 65) + strings.Repeat("]", 65)
		for _, test := range []struct {
			ws    *ear
			frame string
			key   string // that the error has
			why   string // that it says
		}{
			{two, "hi", "", "several rooms"},
			{two, `{"data":1}`, "", "several rooms"},
			{two, `{"data":1,"key":"k"}`, "k", "several rooms"},
			{one, "\xff", "", "UTF-8"},
			{one, "{\"data\":\"\xc3\x28\"}", "", "UTF-8"},
			{one, "{", "", "JSON"},
			{one, `{"data":}`, "", "JSON"},
			{one, `{"data":1} {"data":2}`, "", "JSON"},
			{one, `{"data":NaN}`, "", "JSON"},
			{one, `{"data":` + deep + `}`, "", "deeper"},
			{one, `{"data":1,"type":5}`, "", "JSON"},
			{one, `{"data":1,"room":["a"]}`, "", "JSON"},
			{one, `{"data":1,"key":7}`, "", "JSON"},
			{one, `{"data":1,"type":"a b"}`, "", "type"},
			{one, `{"data":1,"type":"` + strings.Repeat("x", 65) + `"}`, "", "type"},
			{one, `{"data":1,"type":"<b>","key":"k"}`, "k", "type"},
			{one, `{"data":1,"room":"a/b"}`, "", "room"},
			{one, `{"data":1,"room":""}`, "", "room"},
			{one, `{"data":1,"room":"a,b"}`, "", "room"},
			{one, `{"data":1,"room":"_stats","key":"k"}`, "k", "belong to the relay"},
			{one, `{"data":1,"ttl":0}`, "", "ttl"},
			{one, `{"data":1,"ttl":-1}`, "", "ttl"},
			{one, `{"data":1,"ttl":86401,"key":"k"}`, "k", "ttl"},
			{one, `{"data":1,"ttl":9223372036854775807}`, "", "ttl"},
			{one, `{"data":1,"ttl":1.5}`, "", "JSON"},
			{one, `{"data":1,"ttl":"5"}`, "", "JSON"},
			{one, `{"data":1,"key":"` + strings.Repeat("x", 129) + `"}`, "", "key"},
			{one, `{"data":1,"key":"a\nb"}`, "a\nb", "key"},
			{one, `{"type":"hello","data":1}`, "", "relay's own"},
			{one, `{"type":"gap","data":1}`, "", "relay's own"},
			{one, `{"type":"beat","data":1}`, "", "relay's own"},
			{one, `{"type":"ack","data":1,"key":"k"}`, "k", "relay's own"},
			{one, `{"type":"error","data":1}`, "", "relay's own"},
			{one, `{"type":"bye","data":1}`, "", "relay's own"},
			{one, `{"type":"presence","data":"dancing","key":"k"}`, "k", "state"},
			{one, `{"type":"presence","data":{"a":1}}`, "", "state"},
			{one, `{"type":"presence"}`, "", "state"},
			{two, `{"type":"presence","data":"online","room":"a"}`, "", "user"},
			{one, `{"type":"presence","data":"online","room":"_x"}`, "", "belong to the relay"},
		} {
			mark := b.relay.lastID.Load()
			if !utf8.ValidString(test.frame) { // which a client may not send as text, but can
				one.conn.Write(one.ctx, websocket.MessageText, []byte(test.frame))
			} else {
				test.ws.send(test.frame)
			}
			h := test.ws.next()
			want := map[string]any{"type": "error", "data": h.text}
			if test.key != "" {
				want["key"] = test.key
			}
			var got map[string]any
			json.Unmarshal([]byte(h.json), &got)
			if !reflect.DeepEqual(got, want) || !strings.Contains(h.text, test.why) {
				t.Errorf("%.100q: %s, want an error about %q", test.frame, h.json, test.why)
			}
			if b.relay.lastID.Load() != mark {
				t.Errorf("%.100q changed something", test.frame)
			}
		}
		one.conn.Write(one.ctx, websocket.MessageBinary, []byte("hi"))
		if h := one.next(); h.kind != "error" || !strings.Contains(h.text, "text") {
			t.Errorf("binary: %s", h.json)
		}
		one.send("still here")
		one.expect("message still here")
		two.expect("message still here")
		one.send(`{"data":` + deep[1:len(deep)-1] + `}`) // as deep as a POST may be
		if h := one.next(); h.kind != "message" {
			t.Errorf("64 deep: %s", h.json)
		}
	})
}

// 65,536 bytes are taken, and with one more the socket is closed, 1009.
func TestWebSocketTooBig(t *testing.T) {
	for _, network := range []string{pipe, tcp} {
		t.Run(network, func(t *testing.T) {
			onNetwork(t, network, func(t *testing.T) {
				b := newBed(t, network)
				other := b.socket("a")
				for _, head := range []string{"", `{"data":"`} {
					tail := ""
					if head != "" {
						tail = `"}`
					}
					ws := b.socket("b")
					ws.send(head + strings.Repeat("x", 65_536-len(head)-len(tail)) + tail)
					if h := ws.next(); h.kind != "message" || len(h.text) != 65_536-len(head)-len(tail) {
						t.Errorf("heard %.50v of %d", h, len(h.text))
					}
					mark := b.relay.lastID.Load()
					go ws.conn.Write(ws.ctx, websocket.MessageText, []byte(head+strings.Repeat("x", 65_537-len(head)-len(tail))+tail))
					if h, err := ws.hears(); websocket.CloseStatus(err) != websocket.StatusMessageTooBig {
						t.Errorf("65,537 bytes: %.50v %v, want 1009", h, err)
					}
					if b.relay.lastID.Load() != mark {
						t.Error("65,537 bytes were published")
					}
					b.settle()
				}
				if n := b.readers(); network != tcp && n != 1 {
					t.Errorf("%d readers, want 1", n)
				}
				b.say("a", "hi")
				other.expect("message hi")
			})
		})
	}
}

// Many that are due come in few frames, an event a line.
func TestWebSocketJoins(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t, pipe)
		for i := range 100 {
			b.say("a", fmt.Sprint(i))
		}
		e := b.socket("a", "last=100")
		_, frame, err := e.conn.Read(t.Context())
		if n := strings.Count(string(frame), "\n"); err != nil || n != 99 {
			t.Errorf("a frame with %d newlines, %v; want 99", n, err)
		}
	})
}

// A frame's length is said in one, two or eight bytes.
func TestWebSocketLengths(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t, pipe, func(c *config) { c.body = 1 << 20 })
		e := b.socket("a")
		b.say("a", "")
		least := len(e.next().json)
		for _, size := range []int{125, 126, 127, 65_535, 65_536, 65_537} {
			text := strings.Repeat("x", size-least)
			b.say("a", text)
			if h := e.next(); len(h.json) != size || h.text != text {
				t.Errorf("an event of %d bytes came with %d", size, len(h.json))
			}
		}
	})
}

// raw is a WebSocket by hand: its connection after the handshake.
func (b *testbed) raw(path string, headers ...string) (net.Conn, *bufio.Reader) {
	b.t.Helper()
	conn, err := b.dial(context.Background())
	if err != nil {
		b.t.Fatal(err)
	}
	fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: cometes.test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n", path)
	for _, h := range headers {
		io.WriteString(conn, h+"\r\n")
	}
	io.WriteString(conn, "\r\n")
	r := bufio.NewReader(conn)
	res, err := http.ReadResponse(r, nil)
	if err != nil || res.StatusCode != 101 {
		b.t.Fatalf("the handshake: %v %v", res, err)
	}
	return conn, r
}

// A WebSocket is woken whatever minor version of HTTP/1 it was asked for with.
func TestAWebSocketOfALaterHTTP(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t, pipe)
		conn, err := b.dial(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		io.WriteString(conn, "GET /rooms/a/ws HTTP/1.2\r\nHost: cometes.test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n")
		heard := make([]byte, 0, 4096)
		go func() {
			for b := make([]byte, 4096); ; {
				n, err := conn.Read(b)
				if heard = append(heard, b[:n]...); err != nil {
					return
				}
			}
		}()
		synctest.Wait()
		b.say("a", "at once")
		synctest.Wait()
		if !bytes.Contains(heard, []byte("at once")) {
			t.Errorf("heard %q", heard)
		}
	})
}

// Who was published for as the relay stops is answered before the bye.
func TestAnAckIsNotLostToAStop(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t, pipe)
		e := b.socket("a")
		st := b.pool.sessions[0]
		st.handling.Store(true) // hear has published, and is on its way to say so
		b.stop()
		synctest.Wait()
		ack := notice{Type: "ack", Key: "k", ID: new(int64(1))}.event().json
		st.enqueueFrames(textFrame(append(make([]byte, maxFrameHead), ack...)))
		st.handling.Store(false)
		st.wake()
		if h := e.next(); h.kind != "ack" {
			t.Errorf("heard %v, want the ack", h)
		}
		if h := e.next(); h.kind != "bye" {
			t.Errorf("heard %v, want the bye", h)
		}
	})
}

// Who answers no ping is gone within a minute, who does may stay.
func TestWebSocketPings(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t, pipe)
		alive := b.socket("a")
		heartbeats := make(chan int, 1)
		go func() {
			n := 0
			for h, err := alive.hears(); err == nil; h, err = alive.hears() {
				if h.kind == "beat" {
					n++
				}
			}
			heartbeats <- n
		}()
		conn, r := b.raw("/rooms/a/ws")
		dead := make(chan time.Duration, 1)
		start := time.Now()
		go func() {
			io.Copy(io.Discard, r) // takes everything, says nothing
			dead <- time.Since(start)
		}()
		time.Sleep(10*time.Second - time.Millisecond)
		if n := b.active(); n != 2 {
			t.Errorf("after 10 s there are %d streams, want 2", n)
		}
		time.Sleep(50*time.Second + time.Millisecond)
		if n := b.active(); n != 1 {
			t.Errorf("after a minute there are %d streams, want 1", n)
		}
		time.Sleep(time.Hour - 2*time.Minute)
		if n := b.active(); n != 1 {
			t.Errorf("after an hour there are %d streams, want 1", n)
		}
		select {
		case d := <-dead:
			t.Logf("ended after %v", d)
		default:
			t.Error("the connection that answers no ping is still open")
		}
		conn.Close()
		alive.close()
		if n := <-heartbeats; n < 200 {
			t.Errorf("%d heartbeats in an hour", n)
		}
	})
}

// What a full socket leaves is the rest, to the byte, and of a big event there
// is one for all who are slow.
func TestLeft(t *testing.T) {
	r := benchRelay(t)
	big := strings.Repeat("long hair, ", 200)
	publishPost(t, r, publishRequest{room: "lobby", kind: "message", data: []byte(`"` + big + `"`)})
	publishPost(t, r, publishRequest{room: "lobby", kind: "message", data: []byte(`"short"`)})
	publishPost(t, r, publishRequest{room: "lobby", kind: "comet", data: []byte(`"` + big + `"`), from: "ada"})
	events := openReader(t, r, "lobby", r.lastID.Load()-r.epoch-3, subscribeRequest{}).next(nil)
	quoted := &event{id: 1, kind: "message", json: slices.Concat([]byte(`{"data":`), events[0].json, []byte("}"))} // holds the next
	for _, technique := range techniques {
		if technique.mode != streaming {
			continue
		}
		f := benchFraming(t, technique)
		for _, due := range [][]*event{events, events[:1], events[1:2], {quoted, events[0]}, {events[0], quoted}} {
			b := f.encode([]byte("head"), 1, due...)
			for n := range b {
				rest := unwritten(b, n, due)
				if got := bytes.Join(rest, nil); !bytes.Equal(got, b[n:]) {
					t.Fatalf("%s, %d events, without %d bytes: %.80q, want %.80q", technique.name, len(due), n, got, b[n:])
				}
				if technique.name == "html" || n > 100 || due[0] != events[0] { // html has no JSON in it
					continue
				}
				shared := slices.ContainsFunc(rest, func(b []byte) bool { return len(b) > 0 && &b[len(b)-1] == &events[0].json[len(events[0].json)-1] })
				if !shared {
					t.Fatalf("%s: a big event was copied", technique.name)
				}
			}
		}
	}
}

// Pings are few where the kernel knows of the client itself.
func TestHowManyPings(t *testing.T) {
	b := newBed(t, tcp)
	for _, test := range []struct {
		patient, proxied bool
		pings            int
	}{{false, false, 16}, {false, true, 16}, {true, true, 16}, {true, false, 4}} {
		st := &session{stream: &stream{server: b.server, enc: frames(b.server, &request{})}, fd: -1}
		st.kernelTimeout, st.proxied = test.patient, test.proxied
		pings := 0
		for range 48 {
			st.pending = nil
			if err := st.sendPing(); err != nil {
				t.Fatal(err)
			}
			if st.sendMessage(new(scratch), append(make([]byte, maxFrameHead), beatJSON...)); st.pending[0][0] == 0x89 {
				pings++
			}
			st.awaitingPong.Store(false)
		}
		if pings != test.pings {
			t.Errorf("patient %v, proxied %v: %d pings in 48 heartbeats, want %d", test.patient, test.proxied, pings, test.pings)
		}
	}
}

// Frames that are broken end their socket, and nothing else.
func TestWebSocketBroken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t, pipe)
		other := b.socket("a")
		for name, bytes := range map[string]string{
			"not masked":           "\x81\x02hi",
			"reserved bits":        "\xf1\x82\x00\x00\x00\x00hi",
			"a reserved opcode":    "\x83\x82\x00\x00\x00\x00hi",
			"a negative length":    "\x81\xff\xff\xff\xff\xff\xff\xff\xff\xff\x00\x00\x00\x00",
			"a control frame cut":  "\x09\x80\x00\x00\x00\x00",
			"a ping of 126 bytes":  "\x89\xfe\x00\x7e\x00\x00\x00\x00" + strings.Repeat("x", 126),
			"goes on with nothing": "\x80\x82\x00\x00\x00\x00hi",
			"text within a text":   "\x01\x82\x00\x00\x00\x00hi\x81\x82\x00\x00\x00\x00hi",
			"no WebSocket at all":  "GET / HTTP/1.1\r\n\r\n",
		} {
			mark := b.relay.lastID.Load()
			conn, r := b.raw("/rooms/a/ws")
			go conn.Write([]byte(bytes))
			start := time.Now()
			rest, _ := io.ReadAll(r)
			if d := time.Since(start); d > 5*time.Second {
				t.Errorf("%s: ended after %v", name, d)
			}
			if i := strings.LastIndexByte(string(rest), 0x88); i >= 0 && !strings.HasPrefix(string(rest[i+2:]), "\x03\xea") {
				t.Errorf("%s: ended with %q, want 1002", name, rest[i:])
			}
			conn.Close()
			synctest.Wait()
			if n := b.readers(); n != 1 || b.relay.lastID.Load() != mark {
				t.Errorf("%s: %d readers, want 1, and nothing published", name, n)
			}
		}
		b.say("a", "hi")
		other.expect("message hi")
	})
}

// A socket says goodbye to who says goodbye, answers pings, and takes frames in pieces.
func TestWebSocketManners(t *testing.T) {
	for _, network := range []string{pipe, tcp} {
		t.Run(network, func(t *testing.T) {
			onNetwork(t, network, func(t *testing.T) {
				b := newBed(t, network)
				e := b.socket("a")
				w, _ := e.conn.Writer(e.ctx, websocket.MessageText)
				io.WriteString(w, `{"data":`)
				io.WriteString(w, `"in pieces"}`)
				w.Close()
				e.expect("message in pieces")
				ctx := e.conn.CloseRead(t.Context())
				if err := e.conn.Ping(ctx); err != nil {
					t.Errorf("ping: %v", err)
				}
				e = b.socket("a")
				if err := e.conn.Close(websocket.StatusNormalClosure, "enough"); err != nil {
					t.Errorf("the goodbye was not answered: %v", err)
				}
			})
		})
	}
}

// Who leaves 16 KiB of answers unread, beside what the socket holds, is given up.
func TestWebSocketFlood(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t, pipe)
		other := b.socket("a")
		conn, _ := b.raw("/rooms/b/ws")
		var sent atomic.Int64
		go func() {
			for i := range 100_000 {
				frame := fmt.Sprintf(`{"type":"x","data":%6d,"key":"%6d"}`, i, i)
				if _, err := conn.Write(append([]byte{0x81, 0x80 | byte(len(frame)), 0, 0, 0, 0}, frame...)); err != nil {
					return
				}
				sent.Add(1)
			}
		}()
		time.Sleep(9 * time.Second)
		if n := sent.Load(); n > maxQueuedReplies/15 {
			t.Errorf("%d frames were taken whose answers nobody read", n)
		}
		time.Sleep(2 * time.Second)
		if n := b.readers(); n != 1 {
			t.Errorf("after 11 s there are %d readers, want 1", n)
		}
		b.say("a", "hi")
		other.expect("message hi")
		conn.Close()
	})
}

// A WebSocket says who is here, and is told.
func TestWebSocketPresence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t, pipe)
		ada := b.socket("a", "user=ada")
		h := ada.next()
		if h.json != `{"type":"presence","room":"a","data":{"count":1,"users":{"ada":"online"}}}` {
			t.Errorf("the roster is %s", h.json)
		}
		time.Sleep(2 * time.Second)
		bob := b.socket("a", "user=bob")
		ada.expect("presence online")
		time.Sleep(2 * time.Second)
		bob.send(`{"type":"presence","data":"typing"}`)
		if h := ada.next(); h.kind != "presence" || h.from != "bob" || h.data != `"typing"` {
			t.Errorf("ada heard %s", h.json)
		}
		bob.send(`{"type":"presence","room":"a","data":"away","key":"k"}`)
		for h := bob.next(); h.json != `{"type":"ack","key":"k"}`; h = bob.next() {
		}
		ada.expect("presence away")
	})
}

// A handshake that isn't one is refused, with a reason.
func TestWebSocketHandshake(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t, pipe)
		for _, headers := range [][]string{
			{},
			{"Connection: Upgrade", "Upgrade: h2c"},
			{"Upgrade: websocket"},
			{"Upgrade: websocket", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="},
			{"Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="},
			{"Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 12", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="},
			{"Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13"},
			{"Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: short"},
		} {
			if res, body := b.do("GET", "/rooms/a/ws", "", headers...); res.StatusCode != 400 && res.StatusCode != 426 || !isError(body) {
				t.Errorf("%q: %s %q", headers, res.Status, body)
			}
			b.idle()
		}
		b = newBed(t, pipeH2)
		if res, body := b.do("GET", "/rooms/a/ws", ""); res.StatusCode != 426 || !isError(body) || res.Header.Get("Upgrade")+res.Header.Get("Connection") != "" {
			t.Errorf("over HTTP/2, which knows neither Upgrade nor Connection: %s %v %q", res.Status, res.Header, body)
		}
	})
}

// Hello is first, however soon the client speaks.
func TestHelloIsBeforeAnyAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t, pipe)
		st := &session{ws: true, fd: -1, stream: &stream{server: b.server, technique: b.techniques[len(b.techniques)-1], enc: frames(b.server, &request{}), headroom: maxFrameHead, expiresAt: math.MaxInt64}}
		st.send = st.sendMessage
		if err := b.relay.subscribe(&st.sub, subscribeRequest{rooms: []string{"a"}, cursor: -1, maxBatchBytes: 1, driver: st}); err != nil {
			t.Fatal(err)
		}
		defer st.sub.unsubscribe()
		st.replies = []byte("an answer")
		st.writeDue(b.scratches.New().(*scratch), time.Now().UnixNano()) // its first turn, on a socket that takes nothing
		if first := string(slices.Concat(st.pending...)); !strings.Contains(first, `"hello"`) {
			t.Errorf("the first it says is %q", first)
		}
	})
}

// A client may speak before it has read the answer to its handshake.
func TestWebSocketEarly(t *testing.T) {
	for _, network := range []string{pipe, tcp} {
		t.Run(network, func(t *testing.T) {
			onNetwork(t, network, func(t *testing.T) {
				b := newBed(t, network)
				e := b.listen(kindOf("stream"), "a").begin()
				conn, err := b.dial(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				go io.Copy(io.Discard, conn)
				long := strings.Repeat("x", 300) // longer than a small buffer
				io.WriteString(conn, "GET /rooms/a/ws HTTP/1.1\r\nHost: cometes.test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"+
					"\x81\x82\x00\x00\x00\x00hi\x81\xfe\x01\x2c\x00\x00\x00\x00"+long+"\x81\x85\x00\x00\x00\x00th")
				e.expect("message hi", "message "+long)
				io.WriteString(conn, "ere")
				e.expect("message there")
			})
		})
	}
}

// multipart as=svg is a picture of the room: one at once, a new one when the
// room has changed, ten a second at most, drawn while somebody looks.
func TestPicture(t *testing.T) {
	for _, network := range []string{pipe, pipe10, pipeH2} {
		t.Run(network, func(t *testing.T) {
			onNetwork(t, network, func(t *testing.T) {
				b := newBed(t, network)
				b.say("a", "early </text><script>")
				start := time.Now()
				e := b.listen(kindOf("multipart"), "a", "as=svg", "w=300", "h=200")
				inNoTime(t, start)
				_, boundary, _ := strings.Cut(e.res.Header.Get("Content-Type"), "boundary=")
				mark := "\r\n--" + boundary + "\r\nContent-Type: image/svg+xml\r\n\r\n"
				if err := e.until(io.Discard, mark[2:]); err != nil {
					t.Fatal(err)
				}
				picture := func() string {
					var b strings.Builder
					if err := e.until(&b, mark); err != nil {
						t.Fatal(err)
					}
					return strings.TrimLeft(b.String(), "\r\n")
				}
				first := picture()
				inNoTime(t, start)
				if len(first) < 1024 {
					t.Errorf("the first picture has %d bytes; Chromium waits for 1024 before it shows one of another origin", len(first))
				}
				if !strings.HasPrefix(first, "<svg ") || !strings.Contains(first, `width="300" height="200"`) || !strings.Contains(first, "early") || strings.Contains(first, "<script") {
					t.Errorf("the first picture is %s", first)
				}
				time.Sleep(time.Second)
				start = time.Now()
				b.say("a", "later")
				if p := picture(); !strings.Contains(p, "later") {
					t.Errorf("the second picture is %s", p)
				}
				inNoTime(t, start)
				for i := range 100 { // in five seconds
					time.Sleep(50 * time.Millisecond)
					b.say("a", fmt.Sprint("n", i))
				}
				start = time.Now()
				n := 1
				for !strings.Contains(picture(), "n99") {
					n++
				}
				if time.Since(start) > 100*time.Millisecond || n > 51 {
					t.Errorf("%d pictures of a hundred messages in five seconds, the last after %v", n, time.Since(start))
				}
				e.close()
				b.hangUp()
				b.settle()
				if b.idle(); len(b.pictures.renderers) != 0 {
					t.Errorf("%d pictures are still drawn", len(b.pictures.renderers))
				}
			})
		})
	}
}

// A clock that is set back, as when a machine finds out the time, silences nobody.
func TestAHeartbeatIsDueWhenTheClockWasSetBack(t *testing.T) {
	now := time.Now().UnixNano()
	st := &stream{heartbeatEvery: int64(14 * time.Second), expiresAt: math.MaxInt64}
	st.heartbeatAt.Store(now + st.heartbeatEvery)
	if st.due(now) || st.due(now+st.heartbeatEvery-1) || !st.due(now+st.heartbeatEvery) {
		t.Error("a heartbeat is due when its pause is over, and not before")
	}
	if back := now - int64(time.Hour); !st.due(back) {
		t.Error("the clock is an hour back, and for an hour there is no heartbeat")
	}
}
