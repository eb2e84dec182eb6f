// Tests of the program: its flags, how it starts, and how it stops.

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"regexp"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coder/websocket"
)

// testEnv returns a getenv with these variables.
func testEnv(env ...string) func(string) string {
	return func(name string) string {
		for _, e := range env {
			if v, ok := strings.CutPrefix(e, name+"="); ok {
				return v
			}
		}
		return ""
	}
}

// A flag overrides its environment variable, and that the default.
func TestFlags(t *testing.T) {
	for _, test := range []struct {
		args, env []string
		get       func(config) any
		want      any
	}{
		{nil, nil, func(c config) any { return c.addr }, ":8080"},
		{nil, []string{"PORT=9"}, func(c config) any { return c.addr }, ":9"},
		{nil, []string{"PORT=9", "COMETES_ADDR=host:8"}, func(c config) any { return c.addr }, "host:8"},
		{[]string{"-addr", "host:7"}, []string{"PORT=9", "COMETES_ADDR=host:8"}, func(c config) any { return c.addr }, "host:7"},
		{nil, nil, func(c config) any { return c.beat }, 15 * time.Second},
		{nil, []string{"COMETES_BEAT=1m"}, func(c config) any { return c.beat }, time.Minute},
		{[]string{"--beat=2s"}, []string{"COMETES_BEAT=1m"}, func(c config) any { return c.beat }, 2 * time.Second},
		{nil, nil, func(c config) any { return c.origins }, ""},
		{[]string{"-origins", "*"}, nil, func(c config) any { return c.origins }, "*"},
		{nil, nil, func(c config) any { return c.maxEvents }, 256},
		{nil, []string{"COMETES_EVENTS="}, func(c config) any { return c.maxEvents }, 256},
		{nil, nil, func(c config) any { return c.maxRoomBytes }, 1 << 20},
		{nil, []string{"COMETES_ROOM_BYTES=100000"}, func(c config) any { return c.maxRoomBytes }, 100_000},
		{nil, nil, func(c config) any { return c.maxBytes }, 32 << 20},
		{nil, nil, func(c config) any { return c.maxRooms }, 10_000},
		{nil, nil, func(c config) any { return c.roomIdle }, 10 * time.Minute},
		{[]string{"-idle=1s", "-present", "1h"}, nil, func(c config) any { return c.presenceTTL }, time.Hour},
	} {
		c, err := parseFlags(test.args, testEnv(test.env...), 256<<20)
		if err != nil || test.get(c) != test.want {
			t.Errorf("%q %q: %v %v, want %v", test.args, test.env, test.get(c), err, test.want)
		}
	}
}

func TestFlagsRefused(t *testing.T) {
	silence(t)
	for _, test := range []struct {
		args, env []string
		names     string // part of the error
	}{
		{[]string{"-beat", "999ms"}, nil, "-beat"},
		{[]string{"-beat", "-15s"}, nil, "-beat"},
		{[]string{"-beat", "15"}, nil, "-beat"},
		{[]string{"-events", "0"}, nil, "-events"},
		{[]string{"-events", "x"}, nil, "-events"},
		{[]string{"-room-bytes", "0"}, nil, "-room-bytes"},
		{[]string{"-all-bytes", "70000", "-room-bytes", "80000"}, nil, "-all-bytes"},
		{[]string{"-rooms", "-1"}, nil, "-rooms"},
		{[]string{"-idle", "0s"}, nil, "-idle"},
		{[]string{"-present", "0s"}, nil, "-present"},
		{[]string{"-nothing"}, nil, "-nothing"},
		{[]string{"serve"}, nil, `"serve"`},
		{nil, []string{"COMETES_BEAT=soon"}, "COMETES_BEAT"},
		{nil, []string{"COMETES_BEAT=1ms"}, "-beat"},
		{nil, []string{"COMETES_ROOM_BYTES=1e6"}, "COMETES_ROOM_BYTES"},
		{nil, []string{"COMETES_ALL_BYTES=1"}, "-all-bytes"},
	} {
		if _, err := parseFlags(test.args, testEnv(test.env...), defaultMemory); err == nil || !strings.Contains(err.Error(), test.names) {
			t.Errorf("%q %q: %v, want an error that names %s", test.args, test.env, err, test.names)
		}
	}
	stopped, stop := context.WithCancel(t.Context())
	stop()
	for _, secret := range []string{" ", ",", " , "} {
		if err := run(stopped, []string{"-addr", "127.0.0.1:0", "-secret", secret}, testEnv()); err == nil || !strings.Contains(err.Error(), "-secret") {
			t.Errorf("-secret %q: %v; want an error, not an open relay", secret, err)
		}
	}
	if _, err := parseFlags([]string{"-help"}, testEnv(), defaultMemory); !errors.Is(err, flag.ErrHelp) {
		t.Errorf("-help: %v", err)
	}
	for _, list := range []string{"example.com", "https://", "https://a.example/", "https://a.example/path", "ftp:a", "null", "https://a.example,b"} {
		if err := run(t.Context(), []string{"-addr", "127.0.0.1:0", "-origins", list}, testEnv()); err == nil || !strings.Contains(err.Error(), "origin") {
			t.Errorf("-origins %s: %v", list, err)
		}
	}
}

// silence discards the messages of package flag, and the log.
func silence(t *testing.T) {
	null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	was, log := os.Stderr, slog.Default()
	os.Stderr = null
	slog.SetDefault(slog.New(slog.NewTextHandler(null, nil)))
	t.Cleanup(func() { os.Stderr = was; slog.SetDefault(log); null.Close() })
}

// Every flag has a line of help with its environment variable.
func TestHelp(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	was := os.Stderr
	os.Stderr = w
	parseFlags([]string{"-help"}, testEnv(), defaultMemory)
	os.Stderr = was
	w.Close()
	help, _ := io.ReadAll(r)
	flags := regexp.MustCompile(`(?m)^  -(\S+)`).FindAllStringSubmatch(string(help), -1)
	if len(flags) < 9 {
		t.Errorf("the help has %d flags:\n%s", len(flags), help)
	}
	for _, f := range flags {
		if name := "(COMETES_" + strings.ToUpper(strings.ReplaceAll(f[1], "-", "_")) + ")"; !strings.Contains(string(help), name) {
			t.Errorf("-%s: the help does not name %s", f[1], name)
		}
	}
}

// An addrLog is a log handler that reports where run listens.
type addrLog struct {
	slog.Handler
	addr chan string
}

func (l addrLog) Enabled(context.Context, slog.Level) bool { return true }

func (l addrLog) Handle(_ context.Context, r slog.Record) error {
	r.Attrs(func(a slog.Attr) bool {
		if r.Message == "listening" && a.Key == "addr" {
			l.addr <- a.Value.String()
		}
		return true
	})
	return nil
}

// The whole program over loopback: it answers, streams, and on a signal sends bye and
// returns.
func TestRun(t *testing.T) {
	before := slog.Default()
	defer slog.SetDefault(before)
	log := addrLog{addr: make(chan string, 1)}
	slog.SetDefault(slog.New(log))
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	done := make(chan error, 1)
	go func() { done <- run(ctx, []string{"-addr", "127.0.0.1:0"}, testEnv()) }()
	var addr string
	select {
	case addr = <-log.addr:
	case err := <-done:
		t.Fatal(err)
	}
	res, err := http.Get("http://" + addr + "/healthz")
	if err != nil || res.StatusCode != 200 {
		t.Fatal(res, err)
	}
	res.Body.Close()
	stream, err := http.Get("http://" + addr + "/rooms/lobby/stream?last=1")
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Body.Close()
	lines := bufio.NewScanner(stream.Body)
	says := func(what string) {
		t.Helper()
		if !lines.Scan() || !strings.Contains(lines.Text(), what) {
			t.Fatalf("the stream sends %q, want %s (%v)", lines.Text(), what, lines.Err())
		}
	}
	says(`"hello"`)
	if res, err = http.Post("http://"+addr+"/rooms/lobby", "application/x-www-form-urlencoded", strings.NewReader("hi")); err != nil || res.StatusCode != 201 {
		t.Fatal(res, err)
	}
	res.Body.Close()
	says(`"data":"hi"`)
	if err := run(ctx, []string{"-addr", addr}, testEnv()); err == nil {
		t.Error("two listen on one address")
	}
	stop()
	says(`"bye"`)
	if lines.Scan() || lines.Err() != nil {
		t.Errorf("after bye: %q %v", lines.Text(), lines.Err())
	}
	if err := <-done; err != nil {
		t.Errorf("run: %v", err)
	}
	if conn, err := net.Dial("tcp", addr); err == nil {
		conn.Close()
		t.Error("it still listens")
	}
	http.DefaultClient.CloseIdleConnections()
}

// Stopping.

// A thousand streams are ended at once, and their clients return spread over time, a
// bounded number in each second.
func TestStopSpreadsReconnects(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestbed(t, pipe)
		const n = 1000
		var readers []*eventReader
		for i := range n {
			readers = append(readers, b.subscribe(variantOf([]string{"sse", "stream", "ws"}[i%3]), "a").begin())
		}
		b.post("a", "last")
		start := time.Now()
		b.stop()
		perSecond := map[int]int{}
		for _, e := range readers {
			bye := e.expect("message last", "bye")[1]
			var parsed struct{ Data struct{ Retry int } }
			json.Unmarshal([]byte(bye.json), &parsed)
			perSecond[parsed.Data.Retry/1000]++
			if parsed.Data.Retry < 1000 || parsed.Data.Retry > 31_000 {
				t.Errorf("retry in %d ms", parsed.Data.Retry)
			}
			if e.conn != nil {
				e.expectEnd()
			}
		}
		checkImmediate(t, start)
		for second, n := range perSecond {
			if n > 400 {
				t.Errorf("%d return in second %d", n, second)
			}
		}
		if len(perSecond) < 8 {
			t.Errorf("they return within %d seconds", len(perSecond))
		}
	})
}

// A stop takes at most 5 s, whatever clients do; earlier requests are still answered.
func TestStopWithin5s(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestbed(t, pipe)
		polling := make(chan *http.Response, 1)
		go func() {
			res, err := b.client.Get(b.url + "/rooms/a/longpoll?wait=55")
			if err != nil {
				t.Error(err)
			}
			polling <- res
		}()
		body, send := io.Pipe()
		publishing := make(chan *http.Response, 1)
		go func() {
			res, err := b.client.Post(b.url+"/rooms/a", "text/plain", body)
			if err != nil {
				t.Error(err)
			}
			publishing <- res
		}()
		send.Write([]byte("begun "))
		for _, v := range variants { // clients that stall
			if v.streams() {
				b.subscribe(v, "a").begin()
			}
		}
		dead, _ := b.rawWebSocket("/rooms/a/ws") // never reads, never closes
		defer dead.Close()
		half, _ := b.dial(t.Context()) // an unfinished request head
		io.WriteString(half, "GET /rooms/a/po")
		var idle net.Conn
		idle, _ = b.dial(t.Context())
		defer idle.Close()
		time.Sleep(time.Second)

		start := time.Now()
		b.stop()
		res := <-polling
		if res.StatusCode != 200 || time.Since(start) != 0 {
			t.Errorf("the long-poll: %s after %v", res.Status, time.Since(start))
		}
		res.Body.Close()
		time.Sleep(time.Second)
		send.Write([]byte("and ended"))
		send.Close()
		res = <-publishing
		answer, _ := io.ReadAll(res.Body)
		published := b.relay.lastID.Load() > b.relay.epoch
		if !(res.StatusCode == 201 && published) && !(res.StatusCode == 503 && !published && res.Header.Get("Retry-After") != "" && isError(string(answer))) {
			t.Errorf("a publish that was under way: %s %s, published: %v", res.Status, answer, published)
		}
		if _, err := b.dial(t.Context()); err == nil {
			t.Error("it still listens")
		}
		err := <-b.served
		if d := time.Since(start); d > 5*time.Second {
			t.Errorf("it took %v to stop", d)
		}
		b.served <- nil // the cleanup reads it again
		if err != nil {
			t.Errorf("serve: %v", err)
		}
		half.Close()
	})
}

// Without clients, a stop is immediate.
func TestStopIsImmediateWithoutClients(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestbed(t, pipe)
		for _, name := range []string{"sse", "ws", "stream"} {
			b.subscribe(variantOf(name), "a").begin().close()
		}
		b.do("GET", "/healthz", "")
		synctest.Wait()
		start := time.Now()
		b.stop()
		err := <-b.served
		if d := time.Since(start); d > 100*time.Millisecond || err != nil {
			t.Errorf("it took %v to stop: %v", d, err)
		}
		b.served <- nil
	})
}

// An EventSource that connects while the relay stops is sent a bye: with any status
// but 200 it would give up for good.
func TestSSEWhileStopping(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestbed(t, pipe)
		b.post("a", "before")
		b.relay.stop()
		b.wantBye(b.record("GET", "/rooms/a/sse?last=1", ""))
	})
}

func (b *testbed) record(method, path, body string) deadlineRecorder {
	w := newDeadlineRecorder()
	b.ServeHTTP(w, httptest.NewRequest(method, path, strings.NewReader(body)))
	return w
}

func (b *testbed) wantBye(w deadlineRecorder) {
	b.t.Helper()
	if w.Code != 200 || w.Header().Get("Content-Type") != "text/event-stream; charset=utf-8" || !regexp.MustCompile(`^retry: \d{4}\nevent: bye\ndata: \{"type":"bye","data":\{"retry":\d+\}\}\n\n$`).MatchString(w.Body.String()) {
		b.t.Errorf("sse: %d %q, want 200, retry and bye", w.Code, w.Body)
	}
}

// A request while the relay stops is refused in the way that its client understands.
func TestRequestsWhileStopping(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestbed(t, pipe)
		b.post("a", "before")
		b.relay.stop()
		for _, r := range [][3]string{{"POST", "/rooms/a", "hi"}, {"POST", "/rooms/new", "hi"}, {"POST", "/rooms/a/presence?user=ada", "online"}, {"GET", "/healthz", ""}} {
			w := b.record(r[0], r[1], r[2])
			if w.Code != 503 || w.Header().Get("Retry-After") == "" || !isError(w.Body.String()) {
				t.Errorf("%s: %d %q %v, want 503 and Retry-After", r[1], w.Code, w.Body, w.Header())
			}
		}
		for _, v := range variants {
			if v.technique == "sse" || v.technique == "ws" {
				continue
			}
			start := time.Now()
			w := b.record("GET", "/rooms/a/"+v.technique+"?"+v.query, "")
			refused := w.Code == 503 && w.Header().Get("Retry-After") != "" && isError(w.Body.String())
			bye := w.Code == 200 && (!v.streams() || strings.Contains(w.Body.String(), "bye") || strings.Contains(w.Body.String(), "going away"))
			if !refused && !bye {
				t.Errorf("%s: %d %q, want 503 or a bye", v.name, w.Code, w.Body)
			}
			checkImmediate(t, start)
		}
		_, _, err := websocket.Dial(t.Context(), "ws://cometes.test/rooms/a/ws", &websocket.DialOptions{HTTPClient: b.client})
		if err == nil || !strings.Contains(err.Error(), "503") {
			t.Errorf("ws: %v, want 503", err)
		}
		if n := b.subscriptions(); n != 0 {
			t.Errorf("%d readers are left", n)
		}
		b.relay.mu.Lock()
		if len(b.relay.rooms) != 1 {
			t.Errorf("%d rooms", len(b.relay.rooms))
		}
		b.relay.mu.Unlock()
	})
}

// A person at a terminal is shown an address to open, and who may use it.
func TestGreeting(t *testing.T) {
	for _, tc := range []struct {
		addr   string
		tokens bool
		want   string
	}{
		{"[::]:8080", false, "Cometes is at http://localhost:8080\nOpen to anybody who can reach this machine; -secret asks for tokens."},
		{"127.0.0.1:80", false, "Cometes is at http://localhost:80\nOpen to anybody on this machine; -secret asks for tokens."},
		{"192.0.2.1:8080", true, "Cometes is at http://192.0.2.1:8080\nOpen to those with a token; `cometes token` makes one."},
	} {
		if got := greeting(tc.addr, tc.tokens); got != tc.want {
			t.Errorf("%s: %q, want %q", tc.addr, got, tc.want)
		}
	}
}

// A body has 20 s to arrive, a request head 10 s.
func TestSlowRequests(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestbed(t, pipe)
		for name, test := range map[string]struct {
			request string
			trickle bool
			status  int
		}{
			"half a body":         {"POST /rooms/a HTTP/1.1\r\nHost: cometes.test\r\nContent-Length: 100\r\n\r\nhi", false, 408},
			"a trickle":           {"POST /rooms/a HTTP/1.1\r\nHost: cometes.test\r\nContent-Length: 100\r\n\r\nhi", true, 408},
			"half a chunk":        {"POST /rooms/a HTTP/1.1\r\nHost: cometes.test\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhi", false, 408},
			"half a presence":     {"POST /rooms/a/presence?user=ada HTTP/1.1\r\nHost: cometes.test\r\nContent-Length: 100\r\n\r\nhi", false, 408},
			"half a head":         {"POST /rooms/a HTTP/1.1\r\nHost: come", false, 0},
			"nothing but silence": {"", false, 0},
		} {
			conn, _ := b.dial(t.Context())
			start := time.Now()
			asked := make(chan struct{})
			go func() {
				defer close(asked)
				conn.Write([]byte(test.request))
				for test.trickle {
					time.Sleep(time.Second)
					if _, err := conn.Write([]byte("x")); err != nil {
						return
					}
				}
			}()
			answer, _ := io.ReadAll(conn)
			d := time.Since(start)
			if d != 20*time.Second && !(test.status == 0 && len(answer) == 0 && d <= 10*time.Second) {
				t.Errorf("%s: ended after %v", name, d)
			}
			if want := fmt.Sprintf("HTTP/1.1 %d", test.status); test.status != 0 && !strings.HasPrefix(string(answer), want) {
				t.Errorf("%s: %q, want %s", name, answer, want)
			}
			if b.relay.lastID.Load() != b.relay.epoch {
				t.Errorf("%s: something was published", name)
			}
			conn.Close()
			<-asked
		}
		// A body that ends early publishes nothing.
		conn, _ := b.dial(t.Context())
		io.WriteString(conn, "POST /rooms/a HTTP/1.1\r\nHost: cometes.test\r\nContent-Length: 100\r\n\r\nhi")
		conn.Close()
		synctest.Wait()
		if b.relay.lastID.Load() != b.relay.epoch {
			t.Error("half a body was published")
		}
		// A request head of 32 KB is too big.
		if res, _ := b.do("GET", "/rooms/a/poll", "", "X: "+strings.Repeat("x", 32<<10)); res.StatusCode != 431 {
			t.Errorf("a head of 32 KB: %s", res.Status)
		}
	})
}

// Slow clients.

// sendSlowly sends text, a byte per pause, and returns the answer and how long the
// connection lived.
func sendSlowly(t *testing.T, b *testbed, first, rest string, pause time.Duration) (string, time.Duration) {
	t.Helper()
	c, err := b.dialFrom("192.0.2.1")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	start := time.Now()
	go func() {
		if _, err := io.WriteString(c, first); err != nil {
			return
		}
		for i := range len(rest) {
			time.Sleep(pause)
			if _, err := io.WriteString(c, rest[i:i+1]); err != nil {
				return
			}
		}
	}()
	c.SetReadDeadline(start.Add(time.Hour))
	data, _ := io.ReadAll(c)
	return string(data), time.Since(start)
}

func TestASlowHeadIsNotWaitedFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newLimitedTestbed(t)
		for _, first := range []string{"", "G", "GET /rooms/a/sse HTTP/1.1\r\nHost: x\r\nX-A: "} {
			if answer, d := sendSlowly(t, b, first, strings.Repeat("x", 1000), time.Second); d > headTimeout+time.Second {
				t.Errorf("a head that begins %q and never ends is given %v, want %v: %q", first, d, headTimeout, answer)
			}
		}
		// Nor is a second head, after an answer.
		ok := "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
		if _, d := sendSlowly(t, b, ok+"GET /he", strings.Repeat("x", 1000), time.Second); d > headTimeout+time.Second {
			t.Errorf("a second head that never ends is given %v", d)
		}
		if _, d := sendSlowly(t, b, ok, "", 0); d > idleTimeout+time.Second {
			t.Errorf("a connection without a second request is kept for %v, want %v", d, idleTimeout)
		}
		if answer, d := sendSlowly(t, b, "GET / HTTP/1.1\r\nHost: x\r\nX: "+strings.Repeat("x", 30<<10)+"\r\n\r\n", "", 0); !strings.HasPrefix(answer, "HTTP/1.1 431 ") || d > time.Second {
			t.Errorf("a head of 30 KiB is answered after %v: %.100s", d, answer)
		}
	})
}

func TestASlowBodyIsNotWaitedFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newLimitedTestbed(t)
		for _, first := range []string{
			"POST /rooms/a HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nhi",
			"POST /rooms/a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3e8\r\nhi",
			"POST /rooms/a/presence?user=ada HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\naw",
		} {
			before := b.refusals("body")
			answer, d := sendSlowly(t, b, first, strings.Repeat("x", 500), time.Second)
			if !strings.HasPrefix(answer, "HTTP/1.1 408 ") || !strings.Contains(answer, "Connection: close") || d < requestTimeout || d > requestTimeout+2*time.Second {
				t.Errorf("%q and then a byte a second is answered after %v: %s", first, d, answer)
			}
			if n := b.refusals("body"); n != before+1 {
				t.Errorf("%d are counted under body, want %d", n, before+1)
			}
		}
		if n := b.stats.published.Load(); n != 0 {
			t.Errorf("%d messages were published", n)
		}
	})
}

func TestABodyThatNobodyAskedForIsNotWaitedFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newLimitedTestbed(t, "-rate", "0.001")
		b.ask("192.0.2.1", "POST /rooms/a", "hi") // the rate allows no second publish
		for _, first := range []string{"GET /rooms/a/poll", "GET /healthz", "POST /healthz", "GET /rooms/a/refresh", "POST /rooms/a", "POST /rooms/a,b", "PUT /rooms/a", "GET /rooms/a/longpoll?wait=1"} {
			if _, d := sendSlowly(t, b, first+" HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n", "", 0); d > idleTimeout+time.Minute {
				t.Errorf("%s with a body that does not come keeps its connection for %v", first, d)
			}
		}
	})
}

// Over HTTP/2 a body ends with its stream, whatever length its header gave.
func TestABodyThatIsLongerThanItSaidIsNotPublished(t *testing.T) {
	frame := func(kind, flags byte, payload string) string { // of stream 1 (RFC 9113, 4.1)
		return string([]byte{0, 0, byte(len(payload)), kind, flags, 0, 0, 0, 1}) + payload
	}
	synctest.Test(t, func(t *testing.T) {
		for _, length := range []string{"0", "2", "abc"} {
			b := newLimitedTestbed(t, "-h2c")
			c, err := b.dialFrom("192.0.2.1")
			if err != nil {
				t.Fatal(err)
			}
			go io.Copy(io.Discard, c)
			var head string // literals without indexing (RFC 7541, 6.2.2)
			for _, field := range []string{":method", "POST", ":scheme", "http", ":authority", "x", ":path", "/rooms/a", "content-length", length} {
				if field[0] == ':' || field[0] == 'c' {
					head += "\x00"
				}
				head += string(byte(len(field))) + field
			}
			io.WriteString(c, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"+"\x00\x00\x00\x04\x00\x00\x00\x00\x00") // without settings
			io.WriteString(c, frame(1, 4, head)+frame(0, 0, "hi"))
			synctest.Wait()
			io.WriteString(c, frame(0, 1, "more"))
			synctest.Wait()
			if n := b.stats.published.Load(); n != 0 {
				t.Errorf("a body longer than %s is published", length)
			}
			c.Close()
		}
	})
}
