// Tests of the program: its settings, its files, and how it ends.

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path"
	"regexp"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coder/websocket"
)

// fromMap is a getenv.
func fromMap(env ...string) func(string) string {
	return func(name string) string {
		for _, e := range env {
			if v, ok := strings.CutPrefix(e, name+"="); ok {
				return v
			}
		}
		return ""
	}
}

// A flag goes before its environment variable, and that before the default.
func TestSettings(t *testing.T) {
	for _, test := range []struct {
		args, env []string
		get       func(settings) any
		want      any
	}{
		{nil, nil, func(c settings) any { return c.addr }, ":8080"},
		{nil, []string{"PORT=9"}, func(c settings) any { return c.addr }, ":9"},
		{nil, []string{"PORT=9", "COMETES_ADDR=host:8"}, func(c settings) any { return c.addr }, "host:8"},
		{[]string{"-addr", "host:7"}, []string{"PORT=9", "COMETES_ADDR=host:8"}, func(c settings) any { return c.addr }, "host:7"},
		{nil, nil, func(c settings) any { return c.beat }, 15 * time.Second},
		{nil, []string{"COMETES_BEAT=1m"}, func(c settings) any { return c.beat }, time.Minute},
		{[]string{"--beat=2s"}, []string{"COMETES_BEAT=1m"}, func(c settings) any { return c.beat }, 2 * time.Second},
		{nil, nil, func(c settings) any { return c.origins }, ""},
		{[]string{"-origins", "*"}, nil, func(c settings) any { return c.origins }, "*"},
		{nil, nil, func(c settings) any { return c.events }, 256},
		{nil, []string{"COMETES_EVENTS="}, func(c settings) any { return c.events }, 256},
		{nil, nil, func(c settings) any { return c.roomBytes }, 1 << 20},
		{nil, []string{"COMETES_ROOM_BYTES=100000"}, func(c settings) any { return c.roomBytes }, 100_000},
		{nil, nil, func(c settings) any { return c.allBytes }, 32 << 20},
		{nil, nil, func(c settings) any { return c.rooms }, 10_000},
		{nil, nil, func(c settings) any { return c.idle }, 10 * time.Minute},
		{[]string{"-idle=1s", "-present", "1h"}, nil, func(c settings) any { return c.present }, time.Hour},
	} {
		c, err := parse(test.args, fromMap(test.env...))
		if err != nil || test.get(c) != test.want {
			t.Errorf("%q %q: %v %v, want %v", test.args, test.env, test.get(c), err, test.want)
		}
	}
}

func TestSettingsRefused(t *testing.T) {
	quiet(t)
	for _, test := range []struct {
		args, env []string
		names     string // what is wrong is said
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
		if _, err := parse(test.args, fromMap(test.env...)); err == nil || !strings.Contains(err.Error(), test.names) {
			t.Errorf("%q %q: %v, want an error that names %s", test.args, test.env, err, test.names)
		}
	}
	stopped, stop := context.WithCancel(t.Context())
	stop()
	for _, secret := range []string{" ", ",", " , "} {
		if err := run(stopped, []string{"-addr", "127.0.0.1:0", "-secret", secret}, fromMap()); err == nil || !strings.Contains(err.Error(), "-secret") {
			t.Errorf("-secret %q: %v; whoever sets one does not want an open relay", secret, err)
		}
	}
	if _, err := parse([]string{"-help"}, fromMap()); !errors.Is(err, flag.ErrHelp) {
		t.Errorf("-help: %v", err)
	}
	for _, list := range []string{"example.com", "https://", "https://a.example/", "https://a.example/path", "ftp:a", "null", "https://a.example,b"} {
		if err := run(t.Context(), []string{"-addr", "127.0.0.1:0", "-origins", list}, fromMap()); err == nil || !strings.Contains(err.Error(), "origin") {
			t.Errorf("-origins %s: %v", list, err)
		}
	}
}

// quiet keeps what flag says of wrong flags, and the log, to itself.
func quiet(t *testing.T) {
	null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	was, log := os.Stderr, slog.Default()
	os.Stderr = null
	slog.SetDefault(slog.New(slog.NewTextHandler(null, nil)))
	t.Cleanup(func() { os.Stderr = was; slog.SetDefault(log); null.Close() })
}

// Every flag has a line of help that names its environment variable.
func TestHelp(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	was := os.Stderr
	os.Stderr = w
	parse([]string{"-help"}, fromMap())
	os.Stderr = was
	w.Close()
	help, _ := io.ReadAll(r)
	flags := regexp.MustCompile(`(?m)^  -(\S+)`).FindAllStringSubmatch(string(help), -1)
	if len(flags) < 9 {
		t.Errorf("%d flags are helped with:\n%s", len(flags), help)
	}
	for _, f := range flags {
		if name := "(COMETES_" + strings.ToUpper(strings.ReplaceAll(f[1], "-", "_")) + ")"; !strings.Contains(string(help), name) {
			t.Errorf("-%s: the help does not name %s", f[1], name)
		}
	}
}

// A listening is a log that tells where run listens.
type listening struct {
	slog.Handler
	addr chan string
}

func (l listening) Enabled(context.Context, slog.Level) bool { return true }
func (l listening) Handle(_ context.Context, r slog.Record) error {
	r.Attrs(func(a slog.Attr) bool {
		if r.Message == "listening" && a.Key == "addr" {
			l.addr <- a.Value.String()
		}
		return true
	})
	return nil
}

// The whole program over loopback: it answers, streams, and when it is told to
// stop says bye and returns.
func TestRun(t *testing.T) {
	before := slog.Default()
	defer slog.SetDefault(before)
	log := listening{addr: make(chan string, 1)}
	slog.SetDefault(slog.New(log))
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	done := make(chan error, 1)
	go func() { done <- run(ctx, []string{"-addr", "127.0.0.1:0"}, fromMap()) }()
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
			t.Fatalf("the stream says %q, want %s (%v)", lines.Text(), what, lines.Err())
		}
	}
	says(`"hello"`)
	if res, err = http.Post("http://"+addr+"/rooms/lobby", "application/x-www-form-urlencoded", strings.NewReader("hi")); err != nil || res.StatusCode != 201 {
		t.Fatal(res, err)
	}
	res.Body.Close()
	says(`"data":"hi"`)
	if err := run(ctx, []string{"-addr", addr}, fromMap()); err == nil {
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

// The files of static/ come with their type and an ETag, and nothing else does.
func TestFiles(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t, pipe)
		names, _ := os.ReadDir("static")
		etags := map[string]string{}
		for _, name := range append([]string{"/"}, func() (paths []string) {
			for _, n := range names {
				paths = append(paths, "/"+n.Name())
			}
			return paths
		}()...) {
			file := "static" + name
			if name == "/" {
				file = "static/index.html"
			}
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			res, body := b.do("GET", name, "")
			h := res.Header
			if res.StatusCode != 200 || body != string(want) {
				t.Errorf("%s: %s, %d bytes, want %d", name, res.Status, len(body), len(want))
			}
			kind := map[string]string{".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".svg": "image/svg+xml"}[path.Ext(file)]
			if h.Get("Access-Control-Allow-Origin") != "*" {
				t.Errorf("%s: %v; a page of another origin could not import it", name, h)
			}
			if kind != "" && h.Get("Content-Type") != kind || h.Get("Content-Type") == "" || h.Get("X-Content-Type-Options") != "nosniff" {
				t.Errorf("%s: %v, want %s and nosniff", name, h, kind)
			}
			etag := h.Get("ETag")
			if other, ok := etags[etag]; ok && other != string(want) {
				t.Errorf("%s: the ETag %s is another file's", name, etag)
			}
			etags[etag] = string(want)
			if !regexp.MustCompile(`^"[0-9a-f]{16,}"$`).MatchString(etag) || h.Get("Cache-Control") == "" || h.Get("Content-Security-Policy") == "" {
				t.Errorf("%s: %v", name, h)
			}
			res, body = b.do("GET", name, "", "If-None-Match: "+etag)
			if res.StatusCode != 304 || body != "" || res.Header.Get("ETag") != etag {
				t.Errorf("%s again: %s, %d bytes, want 304", name, res.Status, len(body))
			}
			if res, _ = b.do("GET", name, "", `If-None-Match: "other"`); res.StatusCode != 200 {
				t.Errorf("%s, changed: %s", name, res.Status)
			}
			if res, body = b.do("HEAD", name, ""); res.StatusCode != 200 || body != "" || res.ContentLength != int64(len(want)) || res.Header.Get("ETag") != etag {
				t.Errorf("HEAD %s: %s", name, res.Status)
			}
			if res, _ = b.do("POST", name, "hi"); res.StatusCode != 405 || !strings.Contains(res.Header.Get("Allow"), "GET") {
				t.Errorf("POST %s: %s, Allow: %s", name, res.Status, res.Header.Get("Allow"))
			}
		}
		for _, name := range []string{"/..", "/../main.go", "/static/index.html", "/static/../main.go", "/%2e%2e/main.go", "/..%2fmain.go", "//index.html", "/index.html/", "/index.html%00", "/.", "/main.go", "/\\index.html", "/static", "/favicon.ico2", "/.git/config"} {
			res, body := b.raw1("GET", name, "")
			if res.StatusCode != 404 || !isError(body) {
				t.Errorf("%s: %s %.60s, want 404", name, res.Status, body)
			}
		}
		res, body := b.do("GET", "/healthz", "")
		if res.StatusCode != 200 || !json.Valid([]byte(body)) || res.Header.Get("Cache-Control") != "no-store" {
			t.Errorf("healthz: %s %s %v", res.Status, body, res.Header)
		}
	})
}

// Stopping.

// A thousand streams are sent away at once, to return at different times, as
// many as can be in each second.
func TestStopSpreadsTheReturn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t, pipe)
		const n = 1000
		var ears []*ear
		for i := range n {
			ears = append(ears, b.listen(kindOf([]string{"sse", "stream", "ws"}[i%3]), "a").begin())
		}
		b.say("a", "last")
		start := time.Now()
		b.stop()
		perSecond := map[int]int{}
		for _, e := range ears {
			bye := e.expect("message last", "bye")[1]
			var said struct{ Data struct{ Retry int } }
			json.Unmarshal([]byte(bye.json), &said)
			perSecond[said.Data.Retry/1000]++
			if said.Data.Retry < 1000 || said.Data.Retry > 31_000 {
				t.Errorf("retry in %d ms", said.Data.Retry)
			}
			if e.conn != nil {
				e.ends()
			}
		}
		inNoTime(t, start)
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

// A stop takes 5 s at most, whoever does not go; what was asked before is answered.
func TestStopWithin5s(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t, pipe)
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
		for _, k := range earKinds { // who stand still
			if k.streams() {
				b.listen(k, "a").begin()
			}
		}
		dead, _ := b.raw("/rooms/a/ws") // never reads, never says goodbye
		defer dead.Close()
		half, _ := b.dial(t.Context()) // half a head
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
		published := b.relay.mark.Load() > b.relay.start
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
		b.served <- nil // for the cleanup
		if err != nil {
			t.Errorf("serve: %v", err)
		}
		half.Close()
	})
}

// With nobody there, a stop takes no time.
func TestStopAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t, pipe)
		for _, name := range []string{"sse", "ws", "stream"} {
			b.listen(kindOf(name), "a").begin().close()
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

// An EventSource that asks while the relay stops is told to come back: it
// would give up for ever on any status but 200.
func TestSSEWhileStopping(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t, pipe)
		b.say("a", "before")
		b.relay.stop()
		b.saysBye(b.whileStopping("GET", "/rooms/a/sse?last=1", ""))
	})
}

// A recorder is an answer without a connection.
type recorder struct{ *httptest.ResponseRecorder }

func newRecorder() recorder { return recorder{httptest.NewRecorder()} }

func (recorder) SetReadDeadline(time.Time) error  { return nil }
func (recorder) SetWriteDeadline(time.Time) error { return nil }

func (b *testbed) whileStopping(method, path, body string) recorder {
	w := newRecorder()
	b.ServeHTTP(w, httptest.NewRequest(method, path, strings.NewReader(body)))
	return w
}

func (b *testbed) saysBye(w recorder) {
	b.t.Helper()
	if w.Code != 200 || w.Header().Get("Content-Type") != "text/event-stream; charset=utf-8" || !regexp.MustCompile(`^retry: \d{4}\nevent: bye\ndata: \{"type":"bye","data":\{"retry":\d+\}\}\n\n$`).MatchString(w.Body.String()) {
		b.t.Errorf("sse: %d %q, want 200, retry and bye", w.Code, w.Body)
	}
}

// The same at the limit of streams; others are answered 503, and have a place
// when somebody left.
func TestStreamLimit(t *testing.T) {
	for _, network := range []string{pipe, pipeH2} {
		t.Run(network, func(t *testing.T) {
			onNetwork(t, network, func(t *testing.T) {
				b := newBed(t, network, func(c *settings) { c.streams, c.users = 2, 1 })
				if res, body := b.do("GET", "/rooms/a,b/stream?user=ada", ""); res.StatusCode != 503 || res.Header.Get("Retry-After") == "" || !isError(body) {
					t.Errorf("two users where one may be: %s %s", res.Status, body)
				}
				b.idle() // what was refused holds nothing
				one, two := b.listen(kindOf("stream"), "a").begin(), b.listen(kindOf("sse"), "a").begin()
				for _, k := range earKinds {
					path := "/rooms/a/" + k.technique + "?" + k.query
					if k.technique == "ws" {
						continue
					}
					res, body := b.do("GET", path, "")
					switch {
					case k.technique == "sse":
						if res.StatusCode != 200 || !strings.Contains(body, "event: bye") || !strings.HasPrefix(body, "retry: ") {
							t.Errorf("sse: %s %q, want 200, retry and bye", res.Status, body)
						}
					case k.technique == "poll" || k.technique == "refresh":
						if res.StatusCode != 200 {
							t.Errorf("%s: %s", k.name, res.Status)
						}
					case res.StatusCode != 503 || res.Header.Get("Retry-After") == "" || !isError(body):
						t.Errorf("%s: %s %q, want 503 and Retry-After", k.name, res.Status, body)
					}
				}
				if _, _, err := websocket.Dial(t.Context(), "ws://cometes.test/rooms/a/ws", &websocket.DialOptions{HTTPClient: b.newClient(b.dial, false)}); err == nil || !strings.Contains(err.Error(), "503") {
					t.Errorf("ws: %v, want 503", err)
				}
				b.say("a", "hi")
				one.expect("message hi")
				two.expect("message hi")
				two.close()
				b.settle()
				b.listen(kindOf("multipart"), "a").begin()
			})
		})
	}
}

// Who asks while the relay stops is sent away in the way that their client
// understands.
func TestAskedWhileStopping(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t, pipe)
		b.say("a", "before")
		b.relay.stop()
		for _, r := range [][3]string{{"POST", "/rooms/a", "hi"}, {"POST", "/rooms/new", "hi"}, {"POST", "/rooms/a/presence?user=ada", "online"}, {"GET", "/healthz", ""}} {
			w := b.whileStopping(r[0], r[1], r[2])
			if w.Code != 503 || w.Header().Get("Retry-After") == "" || !isError(w.Body.String()) {
				t.Errorf("%s: %d %q %v, want 503 and Retry-After", r[1], w.Code, w.Body, w.Header())
			}
		}
		for _, k := range earKinds {
			if k.technique == "sse" || k.technique == "ws" {
				continue
			}
			start := time.Now()
			w := b.whileStopping("GET", "/rooms/a/"+k.technique+"?"+k.query, "")
			refused := w.Code == 503 && w.Header().Get("Retry-After") != "" && isError(w.Body.String())
			bye := w.Code == 200 && (!k.streams() || strings.Contains(w.Body.String(), "bye") || strings.Contains(w.Body.String(), "going away"))
			if !refused && !bye {
				t.Errorf("%s: %d %q, want 503 or a bye", k.name, w.Code, w.Body)
			}
			inNoTime(t, start)
		}
		_, _, err := websocket.Dial(t.Context(), "ws://cometes.test/rooms/a/ws", &websocket.DialOptions{HTTPClient: b.client})
		if err == nil || !strings.Contains(err.Error(), "503") {
			t.Errorf("ws: %v, want 503", err)
		}
		if n := b.readers(); n != 0 {
			t.Errorf("%d readers are left", n)
		}
		b.relay.mu.Lock()
		if len(b.relay.rooms) != 1 {
			t.Errorf("%d rooms", len(b.relay.rooms))
		}
		b.relay.mu.Unlock()
	})
}

// Somebody at a terminal is told an address to open, and who may.
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
