// Tests of the limits: what a client is sent at each, what is counted, and when it is
// over, in virtual time. Floods and a lack of descriptors need a process of their own;
// see limits_linux_test.go.

package main

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coder/websocket"
)

func TestABucketHoldsTwoSecondsWorthAndFillsAtItsRate(t *testing.T) {
	start := time.Unix(0, 0)
	for _, tc := range []struct {
		rate  float64
		at    []time.Duration
		taken string // y or n for each request
	}{
		{2, []time.Duration{0, 0, 0, 0, 0, 499 * time.Millisecond, 500 * time.Millisecond, 500 * time.Millisecond}, "yyyynnyn"},
		{2, []time.Duration{0, time.Hour, time.Hour, time.Hour, time.Hour, time.Hour}, "yyyyyn"},
		{0.1, []time.Duration{0, 0, 9 * time.Second, 10 * time.Second, 10 * time.Second}, "ynnyn"},
		{0.5, []time.Duration{0, 0, time.Second, 2 * time.Second}, "ynny"},
	} {
		l := rateLimiter[string]{rate: tc.rate}
		var got strings.Builder
		for _, at := range tc.at {
			if l.allow("a", start.Add(at)) {
				got.WriteByte('y')
			} else {
				got.WriteByte('n')
			}
		}
		if got.String() != tc.taken {
			t.Errorf("%v a second, at %v: %s, want %s", tc.rate, tc.at, &got, tc.taken)
		}
	}
}

func TestTheAddressOfAClient(t *testing.T) {
	for _, tc := range []struct {
		trust         bool
		conn, headers string
		want          string
	}{
		{false, "192.0.2.1:99", "", "192.0.2.1"},
		{false, "192.0.2.1:99", "X-Forwarded-For: 198.51.100.1", "192.0.2.1"},
		{false, "192.0.2.1:99", "Fly-Client-IP: 198.51.100.1", "192.0.2.1"},
		{false, "192.0.2.1:99", "Forwarded: for=198.51.100.1|X-Real-IP: 198.51.100.1", "192.0.2.1"},
		{false, "[2001:db8:1:2:3:4:5:6]:99", "", "2001:db8:1:2::"},
		{false, "[2001:db8:1:2:ffff::1]:99", "", "2001:db8:1:2::"},
		{false, "[2001:db8:1:3::1]:99", "", "2001:db8:1:3::"},
		{false, "[fe80::1%eth0]:99", "", "fe80::"},
		{false, "[::ffff:192.0.2.1]:99", "", "192.0.2.1"},
		{false, "[::1]:99", "", "::1"},
		{false, "[::ffff:127.0.0.1]:99", "", "127.0.0.1"},
		{false, "pipe", "", "invalid IP"},

		{true, "10.0.0.1:99", "", "10.0.0.1"},
		{true, "10.0.0.1:99", "X-Forwarded-For: 198.51.100.1", "198.51.100.1"},
		{true, "10.0.0.1:99", "X-Forwarded-For: 203.0.113.9, 127.0.0.1,198.51.100.1", "198.51.100.1"},
		{true, "10.0.0.1:99", "X-Forwarded-For: 203.0.113.9|X-Forwarded-For: 198.51.100.1", "198.51.100.1"},
		{true, "10.0.0.1:99", "X-Forwarded-For: 2001:db8:1:2:3::9", "2001:db8:1:2::"},
		{true, "10.0.0.1:99", "X-Forwarded-For: ::ffff:198.51.100.1", "198.51.100.1"},
		{true, "10.0.0.1:99", "X-Forwarded-For: 198.51.100.1|Fly-Client-IP: 203.0.113.9", "198.51.100.1"},
		{true, "10.0.0.1:99", "X-Forwarded-For: 198.51.100.1|Fly-Client-IP: 203.0.113.9|Fly: yes", "203.0.113.9"},
		{false, "10.0.0.1:99", "Fly-Client-IP: 203.0.113.9|Fly: yes", "10.0.0.1"},
		{true, "10.0.0.1:99", "X-Forwarded-For: 198.51.100.1:4711", "198.51.100.1"},
		{true, "10.0.0.1:99", "X-Forwarded-For: [2001:db8:1:2:3::9]:4711", "2001:db8:1:2::"},
		{true, "10.0.0.1:99", "Fly-Client-IP: 203.0.113.9", "203.0.113.9"},
		{true, "10.0.0.1:99", "X-Forwarded-For: unknown", "::"},
		{true, "127.0.0.1:99", "X-Forwarded-For: unknown", "::"},
		{true, "127.0.0.1:99", "X-Forwarded-For: 198.51.100.1,", "::"},
		{true, "127.0.0.1:99", "", "127.0.0.1"},
	} {
		r := httptest.NewRequest("GET", "/", nil)
		r.RemoteAddr = tc.conn
		for line := range strings.SplitSeq(tc.headers, "|") {
			if name, value, ok := strings.Cut(line, ": "); ok {
				r.Header.Add(name, value)
			}
		}
		if got := (&limiter{flags: config{trustProxy: tc.trust, fly: strings.Contains(tc.headers, "Fly: yes")}}).clientAddr(r).String(); got != tc.want {
			t.Errorf("from %s with %q, trusted: %v, it is %s, want %s", tc.conn, tc.headers, tc.trust, got, tc.want)
		}
	}
}

func TestNoClientBehindAProxyCanClaimALocalAddress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newLimitedTestbed(t, "-trust-proxy", "-rate", "1", "-room-rate", "5")
		published := 0
		for i := range 20 {
			r, _ := b.ask("10.0.0.1", "POST /rooms/a", "hi", "X-Forwarded-For: 198.51.100.1", fmt.Sprintf("Fly-Client-IP: 127.0.0.%d", i+1))
			if r.StatusCode == 201 {
				published++
			}
		}
		if published != 2 {
			t.Errorf("a client of one address published %d messages at once, want 2", published)
		}
	})
}

// openStreams opens n streams, each from an address of its own.
func openStreams(b *testbed, n int, from, what string, headers func(i int) []string) (all []*response) {
	b.t.Helper()
	for i := range n {
		addr := from
		if strings.Contains(from, "%") {
			addr = fmt.Sprintf(from, i+1)
		}
		var with []string
		if headers != nil {
			with = headers(i)
		}
		r := b.open(addr, what, "", with...)
		if r.StatusCode != 200 {
			b.t.Fatalf("stream %d is refused with %d", i+1, r.StatusCode)
		}
		all = append(all, r)
	}
	return all
}

func TestEveryRefusalIsCountedSaysWhenToRetryAndEnds(t *testing.T) {
	forwarded := func(addr string) []string { return []string{"X-Forwarded-For: 203.0.113.7, " + addr} }
	var held []*response
	leave := func(*testbed) { held[0].stop(); time.Sleep(time.Second) }
	wait := func(d time.Duration) func(*testbed) { return func(*testbed) { time.Sleep(d) } }
	post := func(b *testbed, from string, rooms ...string) {
		for _, room := range rooms {
			if r, body := b.ask(from, "POST /rooms/"+room, "hi"); r.StatusCode != 201 {
				b.t.Fatalf("%d %s", r.StatusCode, body)
			}
		}
	}
	const first, second = "192.0.2.1", "192.0.2.2"
	covered := map[string]bool{"descriptors": true} // see TestOutOfDescriptors…
	for _, tc := range []struct {
		name, reason string
		args         []string
		fill         func(*testbed)
		from, what   string // is refused after fill
		body         string
		headers      []string
		status       int
		retry        string
		other        string         // another address that the limit concerns, if it does
		relief       func(*testbed) // after it, requests are accepted again
	}{
		{"streams in all", "streams", []string{"-streams", "3"},
			func(b *testbed) { held = openStreams(b, 3, "192.0.2.%d", "GET /rooms/a/stream", nil) },
			second, "GET /rooms/b/multipart", "", nil, 503, "10", "", leave},
		{"waiting polls in all", "streams", []string{"-streams", "3"},
			func(b *testbed) { held = openStreams(b, 3, "192.0.2.%d", "GET /rooms/a/sse", nil) },
			second, "GET /rooms/b/longpoll?wait=1", "", nil, 503, "10", "", leave},
		{"a picture is a stream", "streams", []string{"-streams", "3"},
			func(b *testbed) { held = openStreams(b, 3, "192.0.2.%d", "GET /rooms/a/multipart?as=svg", nil) },
			second, "GET /rooms/b/jsonp?callback=f&wait=1", "", nil, 503, "10", "", leave},
		{"connections of an IPv4 address", "address", []string{"-per-addr", "3"},
			func(b *testbed) { held = openStreams(b, 3, first, "GET /rooms/a/html", nil) },
			first, "GET /healthz", "", nil, 503, "10", second, leave},
		{"connections of an IPv6 /64", "address", []string{"-per-addr", "3"},
			func(b *testbed) { held = openStreams(b, 3, "2001:db8:1:2::%d", "GET /rooms/a/iframe", nil) },
			"2001:db8:1:2:9::9", "GET /rooms/a/poll", "", nil, 503, "10", "2001:db8:1:3::1", leave},
		{"streams of an address behind a proxy", "address", []string{"-per-addr", "3", "-trust-proxy"},
			func(b *testbed) {
				held = openStreams(b, 3, "10.0.0.1", "GET /rooms/a/stream", func(int) []string { return forwarded("192.0.2.1") })
			},
			"10.0.0.1", "GET /rooms/a/stream", "", forwarded("192.0.2.1"), 429, "10", "", leave},
		{"streams of a /64 behind a proxy", "address", []string{"-per-addr", "3", "-trust-proxy"},
			func(b *testbed) {
				held = openStreams(b, 3, "10.0.0.1", "GET /rooms/a/stream", func(i int) []string { return forwarded(fmt.Sprintf("2001:db8::%d", i)) })
			},
			"10.0.0.1", "GET /rooms/a/longpoll?wait=1", "", forwarded("2001:db8::9:9:9"), 429, "10", "", leave},
		{"connections in all, idle ones", "connections", []string{"-streams", "3"},
			func(b *testbed) {
				for i := range 103 {
					if _, err := b.dialFrom(fmt.Sprintf("192.0.2.%d", i+1)); err != nil {
						b.t.Fatal(err)
					}
				}
			},
			"198.51.100.1", "GET /healthz", "", nil, 503, "10", "", wait(headTimeout)},
		{"publishes of an address", "rate", []string{"-rate", "2"},
			func(b *testbed) { post(b, first, "a", "b", "c", "a") },
			first, "POST /rooms/a", "hi", nil, 429, "1", second, wait(500 * time.Millisecond)},
		{"publishes of a /64", "rate", []string{"-rate", "2"},
			func(b *testbed) { post(b, "2001:db8::1", "a", "b"); post(b, "2001:db8::2", "a", "b") },
			"2001:db8::3", "POST /rooms/a", "hi", nil, 429, "1", "2001:db8:0:1::", wait(500 * time.Millisecond)},
		{"presence of an address", "rate", []string{"-rate", "2"},
			func(b *testbed) { post(b, first, "a", "b", "c", "a") },
			first, "POST /rooms/a/presence?user=ada", "away", nil, 429, "1", second, wait(500 * time.Millisecond)},
		{"publishes with the X-Forwarded-For of another address", "rate", []string{"-rate", "2"},
			func(b *testbed) { post(b, first, "a", "b", "c", "a") },
			first, "POST /rooms/a", "hi", append(forwarded(second), "Fly-Client-IP: "+second), 429, "1", second, wait(500 * time.Millisecond)},
		{"publishes of a slow address", "rate", []string{"-rate", "0.1"},
			func(b *testbed) { post(b, first, "a") },
			first, "POST /rooms/a", "hi", nil, 429, "1", second, wait(10 * time.Second)},
		{"publishes to a room", "room", []string{"-room-rate", "2"},
			func(b *testbed) { post(b, first, "a", "a"); post(b, second, "a", "a") },
			"192.0.2.3", "POST /rooms/a", "hi", nil, 429, "1", "", wait(500 * time.Millisecond)},
		{"rooms", "rooms", []string{"-rooms", "2", "-idle", "10m"},
			func(b *testbed) { post(b, first, "b", "c") },
			first, "POST /rooms/a", "hi", nil, 503, "60", "", wait(11 * time.Minute)},
		{"users who set presence", "users", []string{"-users", "2", "-present", "1m"},
			func(b *testbed) {
				b.ask(first, "POST /rooms/a/presence?user=bob", "away")
				b.ask(first, "POST /rooms/b/presence?user=bob", "away")
			},
			first, "POST /rooms/a/presence?user=ada", "away", nil, 503, "60", "", wait(63 * time.Second)},
		{"users who read", "users", []string{"-users", "2"},
			func(b *testbed) { held = openStreams(b, 1, first, "GET /rooms/a,b/stream?user=bob", nil) },
			first, "GET /rooms/a/stream?user=ada", "", nil, 503, "60", "", func(b *testbed) { leave(b); time.Sleep(leaveGrace + announceInterval) }},
		{"a big body", "body", []string{"-body", "10"}, func(b *testbed) { b.ask(first, "POST /rooms/a", "0123456789") },
			first, "POST /rooms/a", "0123456789a", nil, 413, "", "", nil},
		{"a big form", "body", []string{"-body", "10"}, func(b *testbed) {},
			first, "POST /rooms/a", "data=678901", []string{"Content-Type: application/x-www-form-urlencoded"}, 413, "", "", nil},
		{"a big state", "body", []string{"-body", "10"}, func(b *testbed) {},
			first, "POST /rooms/a/presence?user=ada", "away          ", nil, 413, "", "", nil},
		{"pictures", "pictures", nil,
			func(b *testbed) {
				held = nil
				for i := range maxPictures {
					held = append(held, openStreams(b, 1, first, fmt.Sprintf("GET /rooms/a/multipart?as=svg&w=%d", 100+i), nil)...)
				}
			},
			first, "GET /rooms/a/multipart?as=svg&w=99", "", nil, 503, "10", "", leave},
		{"an origin", "origin", nil, func(*testbed) {}, first, "POST /rooms/a", "hi", []string{"Origin: https://evil.example"}, 403, "", "", nil},
		{"bodies that are being received", "memory", nil,
			func(b *testbed) {
				for i := range b.limiter.receipts.max * 3 / 4 / (bodyFactor * 50_000) {
					c, _ := b.dialFrom(fmt.Sprintf("192.0.2.%d", i+3))
					go io.WriteString(c, "POST /rooms/a HTTP/1.1\r\nHost: x\r\nContent-Length: 50000\r\n\r\n")
				}
				synctest.Wait()
			},
			first, "POST /rooms/a", strings.Repeat("x", 50_000), nil, 503, "1", "", wait(stillTime + time.Millisecond)},
		{"a token", "token", []string{"-secret", firstSecret}, func(*testbed) {}, first, "POST /rooms/a", "hi", nil, 401, "", "", nil},
	} {
		covered[tc.reason] = true
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newLimitedTestbed(t, tc.args...)
				tc.fill(b)
				before := b.refusals(tc.reason)
				// A new connection: the one that fill left open would be accepted.
				b.clientFrom(tc.from).CloseIdleConnections()
				synctest.Wait()
				r, body := b.ask(tc.from, tc.what, tc.body, tc.headers...)
				var answer struct{ Error string }
				if err := json.Unmarshal([]byte(body), &answer); r.StatusCode != tc.status || r.Header.Get("Retry-After") != tc.retry || answer.Error == "" {
					t.Errorf("%s is answered %d, Retry-After %q, %s %v; want %d and %q", tc.what, r.StatusCode, r.Header.Get("Retry-After"), body, err, tc.status, tc.retry)
				}
				for _, reason := range reasons {
					want := 0
					if reason == tc.reason {
						want = 1
					}
					if got := b.refusals(reason); got != want || before != 0 {
						t.Errorf("%d refusals are counted under %s, want %d; before it were %d", got, reason, want, before)
					}
				}
				ok := func(name, from string) {
					t.Helper()
					r := b.open(from, tc.what, tc.body, tc.headers...)
					if r.StatusCode > 201 {
						t.Errorf("%s %s is answered %d", tc.what, name, r.StatusCode)
					}
					r.stop()
				}
				if tc.other != "" {
					headers := tc.headers
					tc.headers = nil
					ok("from another address", tc.other)
					tc.headers = headers
				}
				if tc.relief != nil {
					tc.relief(b)
					ok("when the limit has gone", tc.from)
				}
				for _, r := range held {
					r.stop()
				}
				held = nil
			})
		})
	}
	for _, reason := range reasons {
		if !covered[reason] && reason != "redis" { // see redis_test.go
			t.Errorf("no test is refused for %s", reason)
		}
	}
}

func TestLocalClientsAreNotLimited(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newLimitedTestbed(t, "-per-addr", "2", "-rate", "1", "-room-rate", "1")
		for _, from := range []string{"127.0.0.1", "::1", "::ffff:127.0.0.2"} {
			for _, r := range openStreams(b, 5, from, "GET /rooms/a/stream", nil) {
				defer r.stop()
			}
			for range 10 {
				if r, body := b.ask(from, "POST /rooms/a", "hi"); r.StatusCode != 201 {
					t.Fatalf("%s publishes: %d %s", from, r.StatusCode, body)
				}
			}
		}
	})
}

func TestAnEventSourceThatIsRefusedIsSentByeAndReconnects(t *testing.T) {
	for _, tc := range []struct{ name, args, reason string }{
		{"at the limit of all", "-streams 1", "streams"},
		{"at the limit of its address", "-per-addr 1 -trust-proxy", "address"},
		{"while the relay stops", "-streams 9", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newLimitedTestbed(t, strings.Fields(tc.args)...)
				first := b.open("192.0.2.1", "GET /rooms/a/stream", "")
				defer first.stop()
				first.readUntil("hello")
				if tc.reason == "" {
					b.relay.stop()
				}
				r, body := b.ask("192.0.2.1", "GET /rooms/a/sse", "")
				if r.StatusCode != 200 || r.Header.Get("Content-Type") != "text/event-stream; charset=utf-8" ||
					!strings.HasPrefix(body, "retry: ") || !strings.Contains(body, "\nevent: bye\ndata: {\"type\":\"bye\",\"data\":{\"retry\":") || strings.Contains(body, "hello") {
					t.Errorf("it is answered %d %v\n%s", r.StatusCode, r.Header, body)
				}
				if tc.reason != "" && b.refusals(tc.reason) != 1 {
					t.Errorf("%d refusals are counted under %s", b.refusals(tc.reason), tc.reason)
				}
				if held := b.active(); held > 1 {
					t.Errorf("%d streams are held", held)
				}
			})
		})
	}
}

func TestWhatAWebSocketIsRefusedIsSentAndCounted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newLimitedTestbed(t, "-rate", "3", "-room-rate", "2", "-rooms", "1", "-users", "1", "-body", "200")
		c, _ := b.webSocketFrom("192.0.2.1", "/rooms/a,b/ws")
		defer c.CloseNow()
		wantReply := func(want string) {
			t.Helper()
			got := exchange(t, c, `{"type":"message","room":"a","data":"hi","key":"`+want+`"}`)
			if !strings.Contains(got, want) {
				t.Errorf("answered %s, want %s", got, want)
			}
		}
		for range 4 {
			exchange(t, c, `{"room":"a","data":"hi","key":"`+fmt.Sprint(time.Now().UnixNano())+`"}`)
			time.Sleep(time.Millisecond)
		}
		wantReply("room is published to too fast")
		time.Sleep(time.Second)
		if got := exchange(t, c, `{"room":"b","data":"hi","key":"k"}`); !strings.Contains(got, "too many rooms") {
			t.Errorf("a second room: %s", got)
		}
		for range 9 {
			exchange(t, c, `{"type":"hello","room":"a","key":"x"}`)
		}
		wantReply("address publishes too fast")
		if n := b.refusals("rate"); n == 0 {
			t.Error("what came too fast is not counted under rate")
		}
		for _, reason := range []string{"room", "rooms"} {
			if n := b.refusals(reason); n != 1 {
				t.Errorf("%d refusals are counted under %s, want 1", n, reason)
			}
		}
	})
}

// At the limit of streams, others are answered 503, and are accepted again when
// somebody has left.
func TestStreamLimit(t *testing.T) {
	for _, network := range []string{pipe, pipeH2} {
		t.Run(network, func(t *testing.T) {
			runOnNetwork(t, network, func(t *testing.T) {
				b := newTestbed(t, network, func(c *config) { c.streams, c.maxUsers = 2, 1 })
				if res, body := b.do("GET", "/rooms/a,b/stream?user=ada", ""); res.StatusCode != 503 || res.Header.Get("Retry-After") == "" || !isError(body) {
					t.Errorf("two users where the bound is one: %s %s", res.Status, body)
				}
				b.checkIdle() // a refused request holds nothing
				one, two := b.subscribe(variantOf("stream"), "a").begin(), b.subscribe(variantOf("sse"), "a").begin()
				for _, v := range variants {
					path := "/rooms/a/" + v.technique + "?" + v.query
					if v.technique == "ws" {
						continue
					}
					res, body := b.do("GET", path, "")
					switch {
					case v.technique == "sse":
						if res.StatusCode != 200 || !strings.Contains(body, "event: bye") || !strings.HasPrefix(body, "retry: ") {
							t.Errorf("sse: %s %q, want 200, retry and bye", res.Status, body)
						}
					case v.technique == "poll" || v.technique == "refresh":
						if res.StatusCode != 200 {
							t.Errorf("%s: %s", v.name, res.Status)
						}
					case res.StatusCode != 503 || res.Header.Get("Retry-After") == "" || !isError(body):
						t.Errorf("%s: %s %q, want 503 and Retry-After", v.name, res.Status, body)
					}
				}
				if _, _, err := websocket.Dial(t.Context(), "ws://cometes.test/rooms/a/ws", &websocket.DialOptions{HTTPClient: b.newClient(b.dial, false)}); err == nil || !strings.Contains(err.Error(), "503") {
					t.Errorf("ws: %v, want 503", err)
				}
				b.post("a", "hi")
				one.expect("message hi")
				two.expect("message hi")
				two.close()
				b.settle()
				b.subscribe(variantOf("multipart"), "a").begin()
			})
		})
	}
}

// A room accepts a number of publishes a second, and two seconds' worth at once.
// Presence has bounds of its own, and a retry with a known key is not counted.
func TestARoomsRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newTestRelay(limits{})
		quota := &clientQuota{l: &limiter{rooms: rateLimiter[string]{rate: 5}}}
		put := func(room, key string) error {
			allow := func() error { return quota.publishTo(room) }
			_, _, err := r.publish(publishRequest{room: room, kind: "message", key: key, data: []byte("1"), allow: allow})
			return err
		}
		for i := range 10 {
			if err := put("a", fmt.Sprint("k", i)); err != nil {
				t.Errorf("publish %d: %v", i, err)
			}
		}
		for i := range 3 {
			head := r.lastID.Load()
			before := fmt.Sprint(head, r.bytes)
			if err := put("a", "k10"); err != errRoomTooFast {
				t.Errorf("one too many: %v", err)
			}
			if after := fmt.Sprint(r.lastID.Load(), r.bytes); after != before {
				t.Errorf("a refused publish made %s of %s", after, before)
			}
			checkAccounting(t, r)
			if err := put("a", "k9"); err != nil {
				t.Errorf("a retry: %v", err)
			}
			if err := r.setPresence("a", fmt.Sprint("user", i), "", "online"); err != nil || r.lastID.Load() == head {
				t.Errorf("presence was refused: %v", err)
			}
			if err := put("b", ""); err != nil {
				t.Errorf("another room: %v", err)
			}
			time.Sleep(200 * time.Millisecond)
			if err := put("a", ""); err != nil {
				t.Errorf("a fifth of a second later: %v", err)
			}
		}
		time.Sleep(time.Hour)
		for range 10 {
			put("a", "")
		}
		if err := put("a", ""); err != errRoomTooFast {
			t.Errorf("after an hour, the eleventh at once: %v", err)
		}
	})
}

// held is what the limiter has given away.
func (b *testbed) held() string {
	synctest.Wait()
	b.limiter.mu.Lock()
	defer b.limiter.mu.Unlock()
	return fmt.Sprintf("%d bytes reserved, %d connections served, %d streams of weight %d", b.limiter.receipts.inUse(), b.limiter.served.inUse(), b.limiter.streams, b.limiter.weight)
}

const nothingHeld = "0 bytes reserved, 0 connections served, 0 streams of weight 0"

func TestWhatIsReservedIsGivenBackOnEveryWayOut(t *testing.T) {
	body, big := strings.Repeat("x", 20_000), strings.Repeat("x", 40_000)
	post := func(path, more, body string) string {
		return "POST " + path + " HTTP/1.1\r\nHost: x\r\n" + more + "\r\n" + body
	}
	const length = "Content-Length: 20000\r\n"
	const ws = "GET /rooms/a/ws HTTP/1.1\r\nHost: x\r\n" + webSocketHeaders
	for _, tc := range []struct {
		name, send string
		during     string // what is held then
		wait       time.Duration
		answer     string
	}{
		{"a publish", post("/rooms/a", length, body), "0 bytes reserved, 1 connections served, 0 streams of weight 0", 0, "201"},
		{"a publish in chunks", post("/rooms/a", "Transfer-Encoding: chunked\r\n", "4e20\r\n"+body+"\r\n0\r\n\r\n"), "0 bytes reserved, 1 connections served, 0 streams of weight 0", 0, "201"},
		{"a client that leaves in a body", post("/rooms/a", length, body[1:]), "40000 bytes reserved, 1 connections served, 0 streams of weight 0", 0, ""},
		{"one that leaves in a chunk", post("/rooms/a", "Transfer-Encoding: chunked\r\n", "4e20\r\n"+body[:6_000]), "8192 bytes reserved, 1 connections served, 0 streams of weight 0", 0, ""},
		{"a body that does not come in time", post("/rooms/a", length, body[1:]), "40000 bytes reserved, 1 connections served, 0 streams of weight 0", requestTimeout, "408"},
		{"a body that is too big", post("/rooms/a", "Content-Length: 80000\r\n", big+big), "0 bytes reserved, 1 connections served, 0 streams of weight 0", 0, "413"},
		{"one that says so late", post("/rooms/a", "Transfer-Encoding: chunked\r\n", strings.Repeat("9c40\r\n"+big+"\r\n", 2)), "", 0, "413"},
		{"a body nobody reads", post("/nothing", length, body), "0 bytes reserved, 1 connections served, 0 streams of weight 0", 0, "404"},
		{"a body of an unknown kind", post("/rooms/a", length+"Content-Type: image/tiff\r\n", body), "", 0, "415"},
		{"a form that is none", post("/rooms/a", length+"Content-Type: multipart/form-data; boundary=b\r\n", body), "", 0, "400"},
		{"a client that leaves in a head", "GET /rooms/a/poll HTTP/1.1\r\nX: " + body[:10_000], "15872 bytes reserved, 0 connections served, 0 streams of weight 0", 0, ""},
		{"a head that does not come in time", "GET /rooms/a/poll HTTP/1.1\r\nX: " + body[:10_000], "15872 bytes reserved, 0 connections served, 0 streams of weight 0", headTimeout, ""},
		{"a head of many lines", "GET /healthz HTTP/1.1\r\nHost: x\r\n" + strings.Repeat("x:y\r\n", 1000) + "\r\n", "0 bytes reserved, 1 connections served, 0 streams of weight 0", 0, "200"},
		{"a head that is too long", "GET /healthz HTTP/1.1\r\nX: " + body + big, "", time.Second, "431"},
		{"a second head", "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\nGET /healthz HTTP/1.1\r\nX: " + body[:14_000], "", 0, "200"},
		{"no HTTP", "\x16\x03\x01\r\n", "", 0, "400"},
		{"no request line", "hello\r\n", "", 0, "400"},
		{"nothing", "", nothingHeld, headTimeout, ""},
		{"a stream", "GET /rooms/a/sse HTTP/1.1\r\nHost: x\r\n\r\n", "0 bytes reserved, 0 connections served, 1 streams of weight 1", 0, "200"},
		{"a WebSocket", ws, "0 bytes reserved, 0 connections served, 1 streams of weight 1", 0, "101"},
		{"a long-poll", "GET /rooms/a/longpoll HTTP/1.1\r\nHost: x\r\n\r\n", "0 bytes reserved, 0 connections served, 1 streams of weight 1", 0, ""},
		{"a stream of HTTP/1.0", "GET /rooms/a/sse HTTP/1.0\r\n\r\n", "0 bytes reserved, 0 connections served, 1 streams of weight 3", 0, "200"},
		{"a long-poll of HTTP/1.0", "GET /rooms/a/longpoll?wait=1 HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", "0 bytes reserved, 0 connections served, 1 streams of weight 3", 0, ""},
		{"and after it", "GET /rooms/a/longpoll?wait=1 HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", "", 2 * time.Second, "200"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newLimitedTestbed(t)
				c, err := b.dialFrom("192.0.2.1")
				if err != nil {
					t.Fatal(err)
				}
				go io.WriteString(c, tc.send)
				var answer syncedLog
				go io.Copy(&answer, c)
				if during := b.held(); tc.during != "" && during != tc.during {
					t.Errorf("there are %s, want %s", during, tc.during)
				}
				time.Sleep(tc.wait)
				synctest.Wait()
				if _, got, _ := strings.Cut(answer.String(), " "); !strings.HasPrefix(got, tc.answer) {
					t.Errorf("answered %.80q, want %s", answer.String(), tc.answer)
				}
				c.Close()
				time.Sleep(2 * time.Second) // net/http waits half a second for a client to read why it is turned away
				if after := b.held(); after != nothingHeld {
					t.Errorf("at the end there are %s", after)
				}
			})
		})
	}
}

const webSocketHeaders = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"

func TestABodyThatStandsStillIsAnswered408WhenOthersNeedItsMemory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newLimitedTestbed(t)
		b.limiter.receipts.max = 160_000 // one of 60,000 bytes, since a quarter is for small ones
		c, _ := b.dialFrom("192.0.2.1")
		defer c.Close()
		go io.WriteString(c, "POST /rooms/a HTTP/1.1\r\nHost: x\r\nContent-Length: 60000\r\n\r\n"+strings.Repeat("x", 50_000))
		synctest.Wait()
		big := strings.Repeat("y", 55_000)
		r, body := b.ask("192.0.2.2", "POST /rooms/a", big)
		if r.StatusCode != 503 || r.Header.Get("Retry-After") != "1" || !strings.Contains(body, errTooMuch.message) {
			t.Errorf("beside it: %d %v %s", r.StatusCode, r.Header, body)
		}
		if r, body := b.ask("192.0.2.3", "POST /rooms/a", strings.Repeat("z", 10_000)); r.StatusCode != 201 {
			t.Errorf("a small one beside it: %d %s", r.StatusCode, body)
		}
		time.Sleep(stillTime + time.Millisecond)
		if r, body := b.ask("192.0.2.2", "POST /rooms/a", big); r.StatusCode != 201 {
			t.Errorf("when it stood still: %d %s", r.StatusCode, body)
		}
		data, _ := io.ReadAll(c)
		if !strings.HasPrefix(string(data), "HTTP/1.1 408 ") {
			t.Errorf("who stood still is answered %.80q", data)
		}
	})
}

func TestASlowBodyIsReceivedWhileNobodyNeedsItsMemory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newLimitedTestbed(t)
		answer, d := sendSlowly(t, b, "POST /rooms/a HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 10\r\n\r\n", "0123456789", time.Second)
		if !strings.HasPrefix(answer, "HTTP/1.1 201 ") || d < 10*time.Second {
			t.Errorf("after %v: %s", d, answer)
		}
	})
}

func TestAStreamThatNetHTTPDrivesCountsForWhatItCosts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestbed(t, pipeH2)
		b.limiter.maxWeight = 4 * streamWeight
		var held []*eventReader
		for range 3 {
			held = append(held, b.subscribe(variantOf("stream"), "a").begin())
		}
		if res, body := b.do("GET", "/rooms/a/stream", ""); res.StatusCode != 503 || res.Header.Get("Retry-After") == "" || !isError(body) {
			t.Errorf("a fourth stream: %s %s", res.Status, body)
		}
		held[0].close()
		b.settle()
		b.subscribe(variantOf("stream"), "a").begin()
	})
}

func TestALongAnswerIsReservedUntilItIsTaken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newLimitedTestbed(t)
		for range 4 {
			b.ask("192.0.2.9", "POST /rooms/a", strings.Repeat("x", 60_000))
		}
		b.limiter.receipts.max = 400_000
		c, _ := b.dialFrom("192.0.2.1")
		go io.WriteString(c, "GET /rooms/a/poll?last=9 HTTP/1.1\r\nHost: x\r\n\r\n")
		if held := b.held(); !strings.HasPrefix(held, "24") {
			t.Errorf("there are %s", held)
		}
		if r, body := b.ask("192.0.2.2", "GET /rooms/a/poll?last=9", ""); r.StatusCode != 503 || r.Header.Get("Retry-After") != "1" {
			t.Errorf("beside it: %d %.80s", r.StatusCode, body)
		}
		time.Sleep(5 * time.Second) // 250,000 bytes at slowRate, and a bit
		if r, body := b.ask("192.0.2.2", "GET /rooms/a/poll?last=9", ""); r.StatusCode != 200 {
			t.Errorf("when it was not taken: %d %.80s", r.StatusCode, body)
		}
		if data, _ := io.ReadAll(c); len(data) > 100_000 {
			t.Errorf("who took nothing still has %d bytes of its answer", len(data))
		}
		for _, a := range []string{"192.0.2.2", "192.0.2.9"} {
			b.clientFrom(a).CloseIdleConnections()
		}
		time.Sleep(time.Second)
		if after := b.held(); after != nothingHeld {
			t.Errorf("at the end there are %s", after)
		}
	})
}
