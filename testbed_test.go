// The tests' common ground. A testbed is a whole relay, most often on a network in
// memory and in a bubble of testing/synctest, where time is virtual: a test can say
// "after 25 s" and mean it exactly. An eventReader is a client of one technique; it
// takes apart what the technique sends, and fails on anything else.

package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"html"
	"io"
	"log/slog"
	"math/rand/v2"
	mimemultipart "mime/multipart"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"reflect"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coder/websocket"
)

// A testbed is a relay that serves, and the connections to it.
type testbed struct {
	*app
	t                testing.TB
	network          string
	failOnDisconnect bool   // log messages about clients that left fail the test, too
	url              string // such as http://cometes.test
	client           *http.Client
	dial             func(context.Context) (net.Conn, error)
	stop             context.CancelFunc // what SIGTERM does
	served           chan error         // what serve returned, once

	listener *pipeListener // of a testbed in memory
	close    func()        // of a limited testbed

	mu         sync.Mutex // guards what follows
	conns      []net.Conn
	transports map[string]*http.Transport // of a limited testbed, by the client's address
}

// The networks of a testbed. All but tcp and remote are in memory, for bubbles.
const (
	pipe   = "pipe"    // HTTP/1.1 over net.Pipe: a client that does not read has no buffer
	core   = "core"    // the same, with the core's own loop in place of the writer pool
	pipe10 = "pipe1.0" // HTTP/1.0, which nginx speaks to its upstream unless told otherwise
	pipeH2 = "pipeH2"  // HTTP/2 without TLS
	tcp    = "tcp"     // HTTP/1.1 over loopback, with real sockets
	remote = "remote"  // a relay that is running elsewhere; see TestConformance
)

// techniques are those of every server.
var techniques = newTechniques()

func newTestbed(t testing.TB, network string, tune ...func(*config)) *testbed {
	t.Helper()
	c, err := parseFlags(nil, func(string) string { return "" }, defaultMemory)
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
	slog.SetDefault(slog.New(strictLog{b}))
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
		b.listener = newPipeListener(&net.UnixAddr{Name: "memory"})
		listener = b.listener
		b.dial = func(ctx context.Context) (net.Conn, error) { return b.listener.dial(ctx, nil) }
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
	if network == core {
		s.takeOver, s.relay.wakeRoom = nil, wakeEach
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
	go func() { b.served <- serve(ctx, s, srv, s.listen(listener)) }()

	t.Cleanup(func() {
		b.disconnect()
		b.settle()
		b.stop()
		if err := <-b.served; err != nil {
			t.Errorf("serve: %v", err)
		}
		b.checkIdle()
		slog.SetDefault(before)
	})
	return b
}

// newLimitedTestbed runs a relay with the given flags in memory, behind the listener
// that limits connections. Clients connect from any address; see dialFrom.
func newLimitedTestbed(t testing.TB, args ...string) *testbed {
	t.Helper()
	c, err := parseFlags(args, func(string) string { return "" }, defaultMemory)
	if err != nil {
		t.Fatal(err)
	}
	a, err := newApp(c)
	if err != nil {
		t.Fatal(err)
	}
	b := &testbed{app: a, t: t, network: pipe, url: "http://" + limitedHost, transports: map[string]*http.Transport{}}
	b.listener = newPipeListener(&net.TCPAddr{IP: net.IPv6loopback, Port: 80})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		serve(ctx, a, a.http(c.h2c), a.listen(b.listener))
	}()
	b.close = sync.OnceFunc(func() {
		cancel()
		for _, c := range b.transports {
			c.CloseIdleConnections()
		}
		<-done
		time.Sleep(2 * lingerTimeout)
		synctest.Wait()
	})
	t.Cleanup(b.close)
	return b
}

const limitedHost = "relay.example"

// newRemoteTestbed returns a testbed for a relay that is already running.
func newRemoteTestbed(t testing.TB, url string) *testbed {
	b := &testbed{t: t, network: remote, url: strings.TrimSuffix(url, "/")}
	b.client = &http.Client{
		Transport:     &http.Transport{DisableCompression: true},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	t.Cleanup(b.client.CloseIdleConnections)
	return b
}

// keep sets how many messages a room keeps. The lock orders this before what the relay does:
// its reads and writes of a socket are system calls that the race detector does not see.
func (b *testbed) keep(messages int) {
	b.relay.mu.Lock()
	defer b.relay.mu.Unlock()
	b.relay.maxEvents = messages
}

// dialFrom connects from an address.
func (b *testbed) dialFrom(from string) (net.Conn, error) {
	port := uint16(1024 + rand.IntN(60000))
	return b.listener.dial(context.Background(), net.TCPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(from), port)))
}

// clientFrom returns an HTTP client with an address.
func (b *testbed) clientFrom(from string) *http.Client {
	b.mu.Lock()
	defer b.mu.Unlock()
	c := b.transports[from]
	if c == nil {
		c = &http.Transport{DialContext: func(context.Context, string, string) (net.Conn, error) { return b.dialFrom(from) }}
		b.transports[from] = c
	}
	return &http.Client{Transport: c, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
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

// disconnect closes every connection at the client's end.
func (b *testbed) disconnect() {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, conn := range b.conns {
		conn.Close()
	}
	b.conns = nil
	b.client.CloseIdleConnections()
}

// settle waits until every goroutine is blocked. Over real sockets that cannot be
// known, so it waits until the clients that left are gone.
func (b *testbed) settle() {
	b.mu.Lock()
	left := len(b.conns) == 0
	b.mu.Unlock()
	if b.network != tcp {
		synctest.Wait()
	} else if left {
		b.waitUntil(func() bool { return b.subscriptions() == 0 && b.active() == 0 })
	}
}

// waitUntil waits for a condition, and reports whether it came true.
func (b *testbed) waitUntil(is func() bool) bool {
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

// checkIdle fails if anybody is still subscribed. Every test must end without.
func (b *testbed) checkIdle() {
	b.t.Helper()
	if n := b.active(); n != 0 {
		b.t.Errorf("%d streams are still counted", n)
	}
	if n := b.subscriptions(); n != 0 {
		b.t.Errorf("%d readers are still subscribed", n)
	}
}

func (b *testbed) subscriptions() int {
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

// A strictLog fails the test for warnings that should not have to be logged.
type strictLog struct{ testbed *testbed }

func (l strictLog) Enabled(_ context.Context, level slog.Level) bool { return level >= slog.LevelWarn }

func (l strictLog) WithAttrs([]slog.Attr) slog.Handler { return l }

func (l strictLog) WithGroup(string) slog.Handler { return l }

func (l strictLog) Handle(_ context.Context, r slog.Record) error {
	attrs := ""
	r.Attrs(func(a slog.Attr) bool { attrs += " " + a.String(); return true })
	for _, left := range []string{"client disconnected", "closed pipe", "connection reset", "broken pipe"} {
		if strings.Contains(attrs, left) && !l.testbed.failOnDisconnect {
			return nil // see TestLeavingIsNoError
		}
	}
	l.testbed.t.Errorf("logged: %s%s", r.Message, attrs)
	return nil
}

// A pipeListener is a network in memory.
type pipeListener struct {
	addr   net.Addr
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
}

func newPipeListener(addr net.Addr) *pipeListener {
	return &pipeListener{addr: addr, conns: make(chan net.Conn), closed: make(chan struct{})}
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

func (l *pipeListener) Addr() net.Addr { return l.addr }

// dial connects from an address; nil stands for a network without addresses.
func (l *pipeListener) dial(ctx context.Context, from net.Addr) (net.Conn, error) {
	client, server := net.Pipe()
	if from != nil {
		server = addrConn{server, from}
	}
	select {
	case l.conns <- server:
		return client, nil
	case <-l.closed:
		return nil, syscall.ECONNREFUSED
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// An addrConn is the relay's end of a connection from an address.
type addrConn struct {
	net.Conn
	from net.Addr
}

func (c addrConn) RemoteAddr() net.Addr { return c.from }

// An oldConn sends HTTP/1.0 where its client writes HTTP/1.1.
type oldConn struct{ net.Conn }

func (c *oldConn) Write(b []byte) (int, error) {
	n := len(b)
	if _, err := c.Conn.Write(bytes.Replace(b, []byte(" HTTP/1.1\r\n"), []byte(" HTTP/1.0\r\n"), 1)); err != nil {
		return 0, err
	}
	return n, nil
}

// cursor returns the cursor after everything that was published.
func (b *testbed) cursor() int64 {
	b.t.Helper()
	if b.network != remote {
		return b.relay.lastID.Load()
	}
	_, body := b.do("GET", "/rooms/nothing/poll", "")
	var answer struct{ Cursor int64 }
	if err := json.Unmarshal([]byte(body), &answer); err != nil {
		b.t.Fatalf("%v: %s", err, body)
	}
	return answer.Cursor
}

// do makes a request and reads the whole answer. A header is "Name: value".
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

// post publishes text to a room, "lobby" or "lobby?type=typing", and returns the id.
func (b *testbed) post(room, text string) int64 {
	b.t.Helper()
	res, body := b.do("POST", "/rooms/"+room, text)
	var answer struct{ ID int64 }
	if err := json.Unmarshal([]byte(body), &answer); err != nil || res.StatusCode != 201 {
		b.t.Fatalf("publish to %s: %d %s", room, res.StatusCode, body)
	}
	return answer.ID
}

// A response is the head of an answer, and its body as it comes.
type response struct {
	*http.Response
	t    testing.TB
	body *bufio.Reader
	stop context.CancelFunc
}

// open makes a request from an address: "GET /rooms/a/sse", with headers such as
// "Origin: https://a.example". It reads only the head of the answer.
func (b *testbed) open(from, what, body string, headers ...string) *response {
	b.t.Helper()
	method, path, _ := strings.Cut(what, " ")
	ctx, cancel := context.WithTimeout(context.Background(), 24*time.Hour)
	var in io.Reader
	if method != "GET" && method != "HEAD" {
		in = strings.NewReader(body)
	}
	r, err := http.NewRequestWithContext(ctx, method, "http://"+limitedHost+path, in)
	if err != nil {
		b.t.Fatal(err)
	}
	for _, line := range headers {
		name, value, _ := strings.Cut(line, ": ")
		if name == "Host" {
			r.Host = value
			continue
		}
		r.Header.Add(name, value)
	}
	resp, err := b.clientFrom(from).Do(r)
	if err != nil {
		b.t.Fatalf("%s from %s: %v", what, from, err)
	}
	return &response{resp, b.t, bufio.NewReader(resp.Body), func() { cancel(); resp.Body.Close() }}
}

// ask makes a request like open, and reads the whole answer.
func (b *testbed) ask(from, what, body string, headers ...string) (*response, string) {
	b.t.Helper()
	r := b.open(from, what, body, headers...)
	defer r.stop()
	return r, r.readAll()
}

// readAll returns the rest of the body.
func (r *response) readAll() string {
	r.t.Helper()
	b, err := io.ReadAll(r.body)
	if err != nil {
		r.t.Fatalf("the answer broke off: %v", err)
	}
	return string(b)
}

// readUntil reads up to the line that contains want, and returns that line.
func (r *response) readUntil(want string) string {
	r.t.Helper()
	for {
		line, err := r.body.ReadString('\n')
		if strings.Contains(line, want) {
			return line
		}
		if err != nil {
			r.t.Fatalf("the answer ended before %s: %v", want, err)
		}
	}
}

// webSocketFrom opens a WebSocket, or returns the status of the refusal.
func (b *testbed) webSocketFrom(from, path string, headers ...string) (*websocket.Conn, int) {
	b.t.Helper()
	o := &websocket.DialOptions{HTTPClient: b.clientFrom(from), HTTPHeader: http.Header{}}
	for _, line := range headers {
		name, value, _ := strings.Cut(line, ": ")
		if name == "Host" {
			o.Host = value
			continue
		}
		o.HTTPHeader.Add(name, value)
	}
	c, resp, err := websocket.Dial(context.Background(), "ws://"+limitedHost+path, o)
	if resp == nil {
		b.t.Fatalf("%s from %s: %v", path, from, err)
	}
	if err != nil {
		resp.Body.Close()
	}
	return c, resp.StatusCode
}

// readWebSocketUntil reads a WebSocket until a message contains want, and returns that
// message.
func readWebSocketUntil(t testing.TB, c *websocket.Conn, want string) string {
	t.Helper()
	for {
		_, b, err := c.Read(context.Background())
		if err != nil {
			t.Fatalf("the WebSocket closed before %s: %v", want, err)
		}
		if strings.Contains(string(b), want) {
			return string(b)
		}
	}
}

// exchange sends a message by WebSocket and returns the ack or error.
func exchange(t testing.TB, c *websocket.Conn, frame string) string {
	t.Helper()
	if err := c.Write(context.Background(), websocket.MessageText, []byte(frame)); err != nil {
		t.Fatal(err)
	}
	for {
		b := readWebSocketUntil(t, c, "")
		if strings.Contains(b, `"type":"ack"`) || strings.Contains(b, `"type":"error"`) {
			return b
		}
	}
}

// metric returns a value of /metrics.
func (b *testbed) metric(name string) float64 {
	b.t.Helper()
	return metricOf(b.t, b.stats.metrics(), name)
}

func metricOf(t testing.TB, text, name string) (value float64) {
	t.Helper()
	_, rest, ok := strings.Cut(text, "\ncometes_"+name+" ")
	if _, err := fmt.Sscan(rest, &value); !ok || err != nil {
		t.Fatalf("there is no metric %s", name)
	}
	return value
}

// refusals returns how many requests were refused for a reason.
func (b *testbed) refusals(reason string) int {
	return int(b.metric(fmt.Sprintf("refused_total{reason=%q}", reason)))
}

// status makes a request, by WebSocket if it is for one, and returns the status of the
// answer: 200 for everything that succeeds.
func (b *testbed) status(from, what string, headers ...string) int {
	b.t.Helper()
	code := 0
	if strings.Contains(what, "/ws") {
		c, status := b.webSocketFrom(from, strings.TrimPrefix(what, "GET "), headers...)
		if c != nil {
			c.CloseNow()
		}
		code = status
	} else {
		r := b.open(from, what, bodyFor(what), headers...)
		r.stop()
		code = r.StatusCode
	}
	switch code {
	case http.StatusCreated, http.StatusSwitchingProtocols:
		return http.StatusOK
	}
	return code
}

// http2Client returns a function that makes requests by HTTP/2 without TLS.
func http2Client(b *testbed) func(path string) *http.Response {
	tr := &http.Transport{DialContext: func(context.Context, string, string) (net.Conn, error) { return b.dialFrom("192.0.2.1") }}
	tr.Protocols = new(http.Protocols)
	tr.Protocols.SetUnencryptedHTTP2(true)
	b.transports["h2"] = tr
	return func(path string) *http.Response {
		resp, err := tr.RoundTrip(httptest.NewRequest("GET", "http://"+limitedHost+path, nil).WithContext(context.Background()))
		if err != nil {
			b.t.Fatal(err)
		}
		return resp
	}
}

// A syncedLog is a log that several goroutines may write to.
type syncedLog struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *syncedLog) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(b)
}

func (l *syncedLog) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

const (
	formType = "Content-Type: application/x-www-form-urlencoded"
	jsonType = "Content-Type: application/json"
	textType = "Content-Type: text/plain"
)

// newest returns the newest event of a room, without id and time.
func (b *testbed) newest(room string) string {
	b.t.Helper()
	_, body := b.do("GET", "/rooms/"+room+"/poll?last=1", "")
	var answer struct{ Events []map[string]any }
	if err := json.Unmarshal([]byte(body), &answer); err != nil || len(answer.Events) != 1 {
		b.t.Fatalf("%v: %s", err, body)
	}
	e := answer.Events[0]
	for _, name := range []string{"id", "time", "room"} {
		if e[name] == nil {
			b.t.Errorf("no %s: %s", name, body)
		}
		delete(e, name)
	}
	line, _ := json.Marshal(e)
	return string(line)
}

// formParts returns a multipart form, and its content type.
func formParts(fields ...string) (body, kind string) {
	var b bytes.Buffer
	w := mimemultipart.NewWriter(&b)
	for i := 0; i < len(fields); i += 2 {
		w.WriteField(fields[i], fields[i+1])
	}
	w.Close()
	return b.String(), "Content-Type: " + w.FormDataContentType()
}

// doRaw makes a request with a path that an HTTP client would not send unchanged.
func (b *testbed) doRaw(method, path, body string, headers ...string) (*http.Response, string) {
	b.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute) // in case it is a stream
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, b.url, strings.NewReader(body))
	if err != nil {
		b.t.Fatal(err)
	}
	req.URL.Opaque = "//cometes.test" + path
	if p, q, ok := strings.Cut(path, "?"); ok {
		req.URL.Opaque, req.URL.RawQuery = "//cometes.test"+p, q
	}
	for _, h := range headers {
		name, value, _ := strings.Cut(h, ": ")
		req.Header.Add(name, value)
	}
	res, err := b.client.Do(req)
	if err != nil {
		b.t.Fatalf("%s %s: %v", method, path, err)
	}
	defer res.Body.Close()
	answer, _ := io.ReadAll(res.Body)
	return res, string(answer)
}

// newTestEncoder returns a technique's encoder for a typical query.
func newTestEncoder(tb testing.TB, t *technique) encoder {
	q := &request{rooms: []string{"lobby"}, user: "ada", permit: newPermit(), values: url.Values{"callback": {"comet.receive"}}}
	defer func() {
		if q.err != nil {
			tb.Fatal(q.err)
		}
	}()
	q.server = newTestApp(tb).server
	return q.server.technique(t.name).encoder(q)
}

// newTestApp returns a relay without a listener.
func newTestApp(t testing.TB) *app {
	c, err := parseFlags(nil, func(string) string { return "" }, defaultMemory)
	if err != nil {
		t.Fatal(err)
	}
	c.roomRate, c.rate = 1e12, 1e12
	s, err := newApp(c)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// dialRawWebSocket opens a WebSocket whose bytes the test writes itself.
func dialRawWebSocket(t *testing.T, b *testbed, path string) net.Conn {
	t.Helper()
	c, err := b.dialFrom("192.0.2.1")
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n", path)
	for head := ""; !strings.HasSuffix(head, "\r\n\r\n"); {
		var data [1]byte
		if _, err := c.Read(data[:]); err != nil {
			t.Fatalf("%v after %q", err, head)
		}
		head += string(data[:])
	}
	return c
}

// maskedFrame returns a client's frame.
func maskedFrame(opcode byte, text string) []byte {
	b := []byte{0x80 | opcode, 0x80 | byte(len(text))}
	if len(text) > 125 {
		b = binary.BigEndian.AppendUint16([]byte{0x80 | opcode, 0x80 | 126}, uint16(len(text)))
	}
	return append(append(b, 0, 0, 0, 0), text...)
}

// A deadlineRecorder is a ResponseRecorder that accepts deadlines.
type deadlineRecorder struct{ *httptest.ResponseRecorder }

func newDeadlineRecorder() deadlineRecorder { return deadlineRecorder{httptest.NewRecorder()} }

func (deadlineRecorder) SetReadDeadline(time.Time) error { return nil }

func (deadlineRecorder) SetWriteDeadline(time.Time) error { return nil }

// A received is one event as a client received it, taken apart.
type received struct {
	kind string // the event's type; beat is a heartbeat
	id   int64
	room string
	from string
	data string // JSON; empty for techniques that show text
	json string // the whole event, byte for byte
	text string // the data as text
}

func (h received) String() string { return strings.TrimRight(h.kind+" "+h.text, " ") }

// A variant is a technique with some parameters, and the function that reads it.
type variant struct {
	name, technique, query string
	contentType            string // a regular expression
	forPeople              bool   // shows text or HTML, not JSON
	read                   func(*eventReader) error
}

var variants = []variant{
	{"refresh", "refresh", "", `text/html; charset=utf-8`, true, (*eventReader).readRefresh},
	{"multipart", "multipart", "", `multipart/x-mixed-replace; boundary=[A-Z2-7]{20,70}`, false, (*eventReader).readMultipart},
	{"multipart-text", "multipart", "as=text", `multipart/x-mixed-replace; boundary=[A-Z2-7]{20,70}`, true, (*eventReader).readMultipart},
	{"multipart-html", "multipart", "as=html&last=0", `multipart/x-mixed-replace; boundary=[A-Z2-7]{20,70}`, true, (*eventReader).readMultipart},
	{"html", "html", "last=0", `text/html; charset=utf-8`, true, (*eventReader).readHTML},
	{"poll", "poll", "", `application/json; charset=utf-8`, false, (*eventReader).readAnswer},
	{"iframe", "iframe", "", `text/html; charset=utf-8`, false, (*eventReader).readIframe},
	{"longpoll", "longpoll", "wait=0", `application/json; charset=utf-8`, false, (*eventReader).readAnswer},
	{"jsonp", "jsonp", "wait=0&callback=my.$cb_1", `application/javascript; charset=utf-8`, false, (*eventReader).readAnswer},
	{"stream", "stream", "", `application/x-ndjson; charset=utf-8`, false, (*eventReader).readLine},
	{"sse", "sse", "", `text/event-stream; charset=utf-8`, false, (*eventReader).readSSE},
	{"ws", "ws", "", ``, false, (*eventReader).readWebSocket},
}

func (v variant) streams() bool {
	return !slices.Contains([]string{"refresh", "poll", "longpoll", "jsonp"}, v.technique)
}

func variantOf(name string) variant {
	return variants[slices.IndexFunc(variants, func(v variant) bool { return v.name == name })]
}

// An eventReader receives events by one technique. A stream is requested once. For
// other techniques the eventReader makes a new request when it needs one, with the
// cursor of the last answer.
type eventReader struct {
	variant
	*testbed
	ctx     context.Context
	client  *http.Client
	path    string // of the first request
	header  http.Header
	opened  bool
	after   int64 // the cursor of the last answer
	pending []received

	res      *http.Response
	body     *bufio.Reader
	conn     *websocket.Conn
	boundary string
	retry    string          // of sse
	seen     map[string]bool // lines of earlier pages of refresh
}

// A malformed error says that an answer is not what its technique sends.
type malformed struct{ error }

func malformedf(format string, args ...any) error { return malformed{fmt.Errorf(format, args...)} }

// subscribe begins to receive. A parameter is "after=5", or as a header
// "Last-Event-ID: 5". A test that waits for more than an hour fails.
func (b *testbed) subscribe(v variant, rooms string, parameters ...string) *eventReader {
	b.t.Helper()
	timeout := time.Hour
	if b.network == remote {
		timeout = 30 * time.Second
	}
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	b.t.Cleanup(cancel)
	e, err := b.trySubscribe(ctx, b.client, v, rooms, parameters...)
	if err != nil {
		b.t.Fatalf("%s: %v", v.name, err)
	}
	return e
}

func (b *testbed) trySubscribe(ctx context.Context, client *http.Client, v variant, rooms string, parameters ...string) (*eventReader, error) {
	e := &eventReader{variant: v, testbed: b, ctx: ctx, client: client, header: http.Header{}, after: -1, seen: map[string]bool{}}
	q, _ := url.ParseQuery(v.query)
	for _, a := range parameters {
		if name, value, ok := strings.Cut(a, ": "); ok {
			e.header.Add(name, value)
		} else {
			name, value, _ := strings.Cut(a, "=")
			q.Set(name, value)
		}
	}
	if v.name == "refresh" && !q.Has("after") && !q.Has("last") && e.header.Get("Last-Event-ID") == "" {
		q.Set("after", fmt.Sprint(b.cursor()))
	}
	e.path = "/rooms/" + rooms + "/" + v.technique + "?" + q.Encode()
	if !v.streams() {
		return e, nil
	}
	if v.technique == "ws" {
		conn, _, err := websocket.Dial(ctx, "ws"+strings.TrimPrefix(b.url, "http")+e.path, &websocket.DialOptions{HTTPClient: client, HTTPHeader: e.header})
		if err != nil {
			return nil, err
		}
		conn.SetReadLimit(1 << 20)
		e.conn = conn
		return e, nil
	}
	res, err := e.get(e.path)
	if err != nil {
		return nil, err
	}
	e.res, e.body = res, bufio.NewReader(res.Body)
	return e, nil
}

func (e *eventReader) get(path string) (*http.Response, error) {
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
		return nil, malformedf("%s: %s %s", path, res.Status, body)
	}
	return res, nil
}

// close disconnects.
func (e *eventReader) close() {
	if e.res != nil {
		e.res.Body.Close()
	}
	if e.conn != nil {
		e.conn.CloseNow()
	}
}

// receive returns the next event or heartbeat.
func (e *eventReader) receive() (received, error) {
	for len(e.pending) == 0 {
		if err := e.read(e); err != nil {
			return received{}, err
		}
	}
	h := e.pending[0]
	e.pending = e.pending[1:]
	return h, nil
}

func (e *eventReader) next() received {
	e.t.Helper()
	h, err := e.receive()
	if err != nil {
		e.t.Fatalf("%s: %v", e.name, err)
	}
	return h
}

// begin reads the hello of a stream. For other techniques it makes a first request,
// for a cursor.
func (e *eventReader) begin() *eventReader {
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

// expect receives exactly these events, each as "type text".
func (e *eventReader) expect(want ...string) (got []received) {
	e.t.Helper()
	for i, w := range want {
		h := e.next()
		if h.String() != w {
			e.t.Fatalf("%s received %q in place %d, want %q", e.name, h, i, w)
		}
		got = append(got, h)
	}
	return got
}

// expectEnd fails unless the stream ends here, in the way that its technique ends
// without an error.
func (e *eventReader) expectEnd() {
	e.t.Helper()
	h, err := e.receive()
	switch {
	case err == nil:
		e.t.Fatalf("%s received %v, want the end", e.name, h)
	case e.conn != nil && websocket.CloseStatus(err) != websocket.StatusServiceRestart:
		e.t.Fatalf("ws ended with %v, want 1012", err)
	case e.conn == nil && err != io.EOF:
		e.t.Fatalf("%s ended with %v, want EOF", e.name, err)
	}
}

func (e *eventReader) add(h received) { e.pending = append(e.pending, h) }

// addJSON adds an event. Its JSON must be one line that is safe in a <script>.
func (e *eventReader) addJSON(line string) error {
	if strings.ContainsAny(line, "\n\r<>&\u2028\u2029") || !json.Valid([]byte(line)) {
		return malformedf("an event that is not one line of safe JSON: %q", line)
	}
	var ev struct {
		ID               int64
		Type, Room, From string
		Data             json.RawMessage
	}
	if err := json.Unmarshal([]byte(line), &ev); err != nil {
		return malformedf("%v: %q", err, line)
	}
	h := received{ev.Type, ev.ID, ev.Room, ev.From, string(ev.Data), line, ""}
	if json.Unmarshal(ev.Data, &h.text) != nil && ev.Type != "hello" && ev.Type != "gap" && ev.Type != "bye" {
		h.text = h.data
	}
	e.add(h)
	return nil
}

func (e *eventReader) line() (string, error) {
	s, err := e.body.ReadString('\n')
	if err == io.EOF && s != "" {
		err = io.ErrUnexpectedEOF
	}
	return strings.TrimSuffix(s, "\n"), err
}

// stream: a line per event; a heartbeat is an empty line.
func (e *eventReader) readLine() error {
	line, err := e.line()
	if err != nil {
		return err
	}
	if line == "" {
		e.add(received{kind: "beat"})
		return nil
	}
	return e.addJSON(line)
}

// sse: fields, up to an empty line.
func (e *eventReader) readSSE() error {
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
			return malformedf("sse: %q", line)
		}
		fields[name] = strings.TrimPrefix(value, " ")
	}
	data := fields["data"]
	if data == `{"type":"beat"}` && fields["event"] == "beat" && len(fields) == 2 {
		e.add(received{kind: "beat"})
		return nil
	}
	if retry, ok := fields["retry"]; ok { // in the first block, and not in a block of its own, which some clients take for an event
		if e.retry != "" || data == "" {
			return malformedf("sse: retry in %q", fields)
		}
		e.retry = retry
	}
	if err := e.addJSON(data); err != nil {
		return err
	}
	h := e.pending[len(e.pending)-1]
	id := ""
	if h.id != 0 || h.kind == "hello" {
		id = fmt.Sprint(h.id)
	}
	if fields["id"] != id || fields["event"] != strings.TrimPrefix(h.kind, "message") {
		return malformedf("sse: the fields %q do not fit %s", fields, h.json)
	}
	return nil
}

// multipart: a part per event, followed at once by the next boundary and the next
// part's headers. A heartbeat is an empty line before the content of a part.
func (e *eventReader) readMultipart() error {
	mime := map[string]string{"multipart": "application/json", "multipart-text": "text/plain", "multipart-html": "text/html"}[e.name]
	if e.boundary == "" {
		_, params, ok := strings.Cut(e.res.Header.Get("Content-Type"), "boundary=")
		if !ok {
			return malformedf("multipart without a boundary")
		}
		e.boundary = "\r\n--" + params + "\r\nContent-Type: " + mime + "; charset=utf-8\r\n\r\n"
		if err := e.copyUntil(io.Discard, e.boundary[2:]); err != nil {
			return err
		}
	}
	first, err := e.body.Peek(1)
	if err != nil {
		return err
	}
	if first[0] == '\r' {
		if b, err := io.ReadAll(io.LimitReader(e.body, 2)); err != nil || string(b) != "\r\n" {
			return malformedf("multipart: a heartbeat that is %q", b)
		}
		e.add(received{kind: "beat"})
		return nil
	}
	var part strings.Builder
	if err := e.copyUntil(&part, e.boundary); err != nil {
		return err
	}
	switch e.name {
	case "multipart":
		return e.addJSON(part.String())
	case "multipart-html":
		if !e.opened {
			e.opened = true
			e.add(received{kind: "hello"})
		}
		return e.addPage(part.String())
	}
	line, ok := strings.CutSuffix(part.String(), "\n")
	if !ok || strings.Contains(line, "\n") {
		return malformedf("multipart: not a line of text: %q", part.String())
	}
	who, text, isMessage := strings.Cut(line, ": ")
	kind, rest, _ := strings.Cut(line, " ")
	switch {
	case line == "Connected.":
		e.add(received{kind: "hello"})
	case kind == "gap" || kind == "bye":
		e.add(received{kind: kind})
	case strings.HasPrefix(rest, " ") || kind == "presence":
		_, text, _ := strings.Cut(rest, " ")
		e.add(received{kind: kind, text: text})
	case isMessage:
		e.add(received{kind: "message", from: who, text: text})
	default:
		e.add(received{kind: "message", text: line})
	}
	return nil
}

// copyUntil copies the body up to the given text, which it leaves out.
func (e *eventReader) copyUntil(w io.Writer, mark string) error {
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

// iframe: a script per event, which calls the function of the page around it. Every
// script has the nonce of the Content-Security-Policy.
func (e *eventReader) readIframe() error {
	policy := e.res.Header.Get("Content-Security-Policy")
	_, nonce, _ := strings.Cut(policy, "script-src 'nonce-")
	nonce, _, ok := strings.Cut(nonce, "'")
	if !ok || len(nonce) < 20 {
		return malformedf("iframe: no nonce in the policy %q", policy)
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
			e.add(received{kind: "beat"})
			return nil
		}
		e.opened = true
		return e.addJSON(call)
	case e.opened:
		return malformedf("iframe: %q", line)
	case strings.HasPrefix(line, "<!DOCTYPE html>"), strings.HasPrefix(line, "<title>"), strings.HasPrefix(line, open+"const tell = "):
		return nil
	}
	return malformedf("iframe: %q", line)
}

// html: the head of a page, then a paragraph per event; a heartbeat is a comment.
func (e *eventReader) readHTML() error {
	line, err := e.line()
	switch {
	case err != nil:
		return err
	case line == "<!-- beat -->":
		e.add(received{kind: "beat"})
		return nil
	case line == `<main class="log endless">`:
		e.opened = true
		return nil
	case !e.opened:
		return nil
	}
	return e.addParagraph(line)
}

// refresh: a whole page, the newest event first. Lines of an earlier page are not
// received again.
func (e *eventReader) readRefresh() error {
	res, err := e.get(e.path)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	e.res = res
	page, err := io.ReadAll(res.Body)
	if err != nil {
		return err
	}
	due := len(e.pending)
	if err := e.addPage(string(page)); err != nil {
		return err
	}
	if len(e.pending) == due {
		e.add(received{kind: "beat"})
	}
	return nil
}

func (e *eventReader) addPage(page string) error {
	_, log, ok := strings.Cut(page, "<main class=\"log\">\n")
	log, closed := strings.CutSuffix(log, "</main>\n")
	if !ok || !closed || !strings.HasPrefix(page, "<!DOCTYPE html>") {
		return malformedf("not a page: %q", page)
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
	paragraphPattern = regexp.MustCompile(`^<p class="(message|note|gap)">(.*)</p>$`)
	messagePattern   = regexp.MustCompile(`^<time datetime="[0-9TZ:-]{20}">\d\d:\d\d UTC</time> (?:<i>([\w.:-]+)</i> )?<b><bdi>([^<]*)</bdi></b> <span dir="auto">([^<]*)</span>$`)
	plainPattern     = regexp.MustCompile(`^(?:<time [^>]*>\d\d:\d\d UTC</time> )?(?:<i>([\w.:-]+)</i> )?<b><bdi>([^<]*)</bdi></b> <span dir="auto">([^<]*)</span>$`)
	byePattern       = regexp.MustCompile(`^The relay is going away.*<meta http-equiv="refresh" content="\d+">$`)
)

func (e *eventReader) addParagraph(line string) error {
	m := paragraphPattern.FindStringSubmatch(line)
	if m == nil {
		return malformedf("not a paragraph: %q", line)
	}
	pattern := messagePattern
	if e.network == remote { // the core alone shows no times, and all events in the same way
		pattern = plainPattern
	}
	speech := pattern.FindStringSubmatch(m[2])
	switch {
	case e.network == remote && speech != nil && speech[1] == "hello":
		e.add(received{kind: "hello"})
	case m[1] == "gap":
		e.add(received{kind: "gap"})
	case m[2] == "Connected.":
		e.add(received{kind: "hello"})
	case byePattern.MatchString(m[2]):
		e.add(received{kind: "bye"})
	case speech != nil && (speech[1] == "") == (m[1] == "message"):
		kind := speech[1]
		if kind == "" {
			kind = "message"
		}
		e.add(received{kind: kind, from: html.UnescapeString(speech[2]), text: html.UnescapeString(speech[3])})
	default:
		e.add(received{kind: "presence", text: html.UnescapeString(strings.NewReplacer("<bdi>", "", "</bdi>", "").Replace(m[2]))})
	}
	return nil
}

// poll, longpoll, jsonp: a whole answer, with the cursor for the next request. An
// answer without events counts as a heartbeat.
func (e *eventReader) readAnswer() error {
	path := e.path
	if e.after >= 0 {
		name, query, _ := strings.Cut(path, "?")
		q, _ := url.ParseQuery(query)
		q.Set("after", fmt.Sprint(e.after))
		q.Del("lastEventId")
		q.Del("Last-Event-ID")
		path = name + "?" + q.Encode()
		e.header.Del("Last-Event-ID")
	}
	res, err := e.get(path)
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
			return malformedf("jsonp: %q", body)
		}
		body = call + "\n"
	}
	var answer struct {
		Cursor *int64
		Events []json.RawMessage
	}
	if err := json.Unmarshal([]byte(body), &answer); err != nil || answer.Cursor == nil || answer.Events == nil || !strings.HasSuffix(body, "]}\n") {
		return malformedf("%v: %q", err, body)
	}
	e.after = *answer.Cursor
	for _, event := range answer.Events {
		if err := e.addJSON(string(event)); err != nil {
			return err
		}
	}
	if len(answer.Events) == 0 {
		e.add(received{kind: "beat"})
	}
	return nil
}

// ws: text messages with an event per line.
func (e *eventReader) readWebSocket() error {
	kind, frame, err := e.conn.Read(e.ctx)
	if err != nil {
		return err
	}
	if kind != websocket.MessageText {
		return malformedf("ws: a binary frame %q", frame)
	}
	for line := range strings.SplitSeq(string(frame), "\n") {
		if line == `{"type":"beat"}` {
			e.add(received{kind: "beat"})
		} else if err := e.addJSON(line); err != nil {
			return err
		}
	}
	return nil
}

// runOnNetwork runs a test, in a bubble if the network is in memory.
func runOnNetwork(t *testing.T, network string, test func(*testing.T)) {
	switch network {
	case tcp:
		test(t)
		return
	case pipeH2:
		// net/http keeps channels in a pool, and a channel must not go from one bubble
		// to another. Two garbage collections empty the pool.
		runtime.GC()
		runtime.GC()
	}
	synctest.Test(t, test)
}

// checkImmediate fails if virtual time has passed.
func checkImmediate(t *testing.T, since time.Time) {
	t.Helper()
	if d := time.Since(since); since.Year() == 2000 && d != 0 {
		t.Errorf("it took %v, want it at once", d)
	}
}

// isError reports whether the body is {"error":"a sentence"} and a newline.
func isError(body string) bool {
	var e struct{ Error string }
	d := json.NewDecoder(strings.NewReader(body))
	d.DisallowUnknownFields()
	return d.Decode(&e) == nil && len(e.Error) > 10 && strings.HasSuffix(body, "}\n") && strings.Count(body, "\n") == 1
}

// unreliableClient returns a client whose connections break after some bytes.
func (b *testbed) unreliableClient(rng *rand.Rand, h2 bool) *http.Client {
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

// tryPublish publishes over an unreliable connection, and reports whether it was
// acknowledged.
func (b *testbed) tryPublish(rng *rand.Rand, h2 bool, room, key, text string) bool {
	client := b.unreliableClient(rng, h2 && rng.IntN(2) == 0)
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
	client = b.unreliableClient(rng, false)
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

// readSome receives for a while, by a random technique, from some of the rooms.
func (b *testbed) readSome(ctx context.Context, t *testing.T, rng *rand.Rand, h2 bool, rooms []string, cursor int64) segment {
	var v variant
	for v.name == "" || v.forPeople {
		v = variants[rng.IntN(len(variants))]
	}
	some := []string{}
	for len(some) == 0 {
		for _, i := range rng.Perm(len(rooms)) {
			if rng.IntN(3) > 0 {
				some = append(some, rooms[i])
			}
		}
	}
	client := b.unreliableClient(rng, h2 && rng.IntN(2) == 0 && v.technique != "ws")
	defer client.CloseIdleConnections()
	parameters := []string{"wait=20", fmt.Sprint("after=", cursor)}
	if rng.IntN(2) == 0 {
		parameters = []string{"wait=20", "after=1", fmt.Sprint("Last-Event-ID: ", cursor)}
	}
	s := segment{v.name, some, cursor, cursor, nil}
	e, err := b.trySubscribe(ctx, client, v, strings.Join(some, ","), parameters...)
	if err == nil {
		defer e.close()
		s.receive(t, e, 1+rng.IntN(30))
	} else if _, ok := err.(malformed); ok {
		t.Error(err)
	}
	return s
}

func inBubble(test func(*testing.T)) func(*testing.T) {
	return func(t *testing.T) { synctest.Test(t, test) }
}

func (b *testbed) tryGet(ctx context.Context, path string) {
	req, _ := http.NewRequestWithContext(ctx, "GET", b.url+path, nil)
	if res, err := b.client.Do(req); err == nil {
		res.Body.Close()
	}
}

func (b *testbed) measure() (goroutines int, heap uint64) {
	if b.network != tcp {
		time.Sleep(time.Hour) // idle rooms, leases and connections end
	}
	b.settle()
	b.waitUntil(func() bool { return runtime.NumGoroutine() < 12 || b.network != tcp }) // a closed connection lingers for a second
	var m runtime.MemStats
	for range 3 {
		runtime.GC()
	}
	runtime.ReadMemStats(&m)
	return runtime.NumGoroutine(), m.HeapAlloc
}

// rawStream requests the room a as a stream over the connection, and returns the lines
// after the hello.
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

// webSocket opens a WebSocket and reads its hello.
func (b *testbed) webSocket(rooms string, parameters ...string) *eventReader {
	b.t.Helper()
	return b.subscribe(variantOf("ws"), rooms, parameters...).begin()
}

func (e *eventReader) send(frame string) {
	e.t.Helper()
	if err := e.conn.Write(e.ctx, websocket.MessageText, []byte(frame)); err != nil {
		e.t.Fatal(err)
	}
}

// rawWebSocket makes a WebSocket handshake by hand, and returns the connection after
// it.
func (b *testbed) rawWebSocket(path string, headers ...string) (net.Conn, *bufio.Reader) {
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

// errCut is the error of a connection that was cut.
var errCut = errors.New("cut")

// A cutConn breaks after a number of bytes.
type cutConn struct {
	net.Conn
	left atomic.Int64
}

func (c *cutConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	return c.count(n, err)
}

func (c *cutConn) Write(b []byte) (int, error) {
	if left := c.left.Load(); int64(len(b)) > left {
		n, _ := c.Conn.Write(b[:max(left, 0)])
		c.Conn.Close()
		return n, errCut
	}
	n, err := c.Conn.Write(b)
	return c.count(n, err)
}

func (c *cutConn) count(n int, err error) (int, error) {
	if left := c.left.Add(int64(-n)); left < 0 {
		c.Conn.Close()
		return max(n+int(left), 0), errCut
	}
	return n, err
}

func sameJSON(a, b string) bool {
	var x, y any
	return json.Unmarshal([]byte(a), &x) == nil && json.Unmarshal([]byte(b), &y) == nil && reflect.DeepEqual(x, y)
}
