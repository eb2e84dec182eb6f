// Tests of the techniques and of requests, as clients see them: what each technique
// sends, when it ends, what is refused. conformance_test.go has what is the same for
// all techniques.

package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
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
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"
	"weak"

	"github.com/coder/websocket"
)

// The heartbeats of streams that began together are spread out.
func TestHeartbeatsAreSpreadOut(t *testing.T) {
	for _, network := range []string{pipe, core, pipeH2} {
		t.Run(network, func(t *testing.T) {
			runOnNetwork(t, network, func(t *testing.T) {
				b := newTestbed(t, network)
				start := time.Now()
				at := make(chan time.Duration)
				for range 50 {
					e := b.subscribe(variantOf("stream"), "a").begin()
					go func() {
						e.receive()
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
	for _, network := range []string{pipe, core, pipeH2, tcp} {
		t.Run(network, func(t *testing.T) { runOnNetwork(t, network, testSameBytes) })
	}
}

func testSameBytes(t *testing.T) {
	network := t.Name()[strings.LastIndex(t.Name(), "/")+1:]
	b := newTestbed(t, network)
	var readers []*eventReader
	for _, v := range variants {
		if v.forPeople || v.technique == "ws" && network == pipeH2 {
			continue
		}
		readers = append(readers, b.subscribe(v, "a,b").begin())
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
		for j, e := range readers {
			h := e.next()
			if j == 0 {
				want = append(want, h.json)
			} else if h.json != want[i] {
				t.Errorf("%s sends\n%s, and %s\n%s", e.name, h.json, readers[0].name, want[i])
			}
		}
		var sent, got any
		h := received{}
		json.Unmarshal([]byte(want[i]), &struct {
			Data *any
			From *string
		}{&got, &h.from})
		json.Unmarshal([]byte(data), &sent)
		if fmt.Sprint(sent) != fmt.Sprint(got) || h.from != user {
			t.Errorf("sent %s as %q, came %s", data, user, want[i])
		}
	}
	for _, e := range readers { // and from the history
		again := b.subscribe(e.variant, "a,b", "last=100")
		if e.streams() {
			again.begin()
		}
		for i := range want {
			if h := again.next(); h.json != want[i] {
				t.Errorf("%s sends\n%s, want\n%s", e.name, h.json, want[i])
			}
		}
		again.close()
	}
}

// Clients switch techniques, over connections that break at any byte, while others
// publish over such connections. Nothing is lost, nothing comes twice, everything is
// in order.
func TestSwitchingTechniquesLosesNothing(t *testing.T) {
	for _, network := range []string{pipe, core, pipeH2, tcp} {
		t.Run(network, func(t *testing.T) {
			seed := rand.Uint64()
			if s := os.Getenv("HOP_SEED"); s != "" {
				seed, _ = strconv.ParseUint(s, 10, 64)
			}
			t.Logf("HOP_SEED=%d", seed)
			runOnNetwork(t, network, func(t *testing.T) { switchTechniques(t, network, seed) })
		})
	}
}

// A segment is what a client received over one connection.
type segment struct {
	by       string
	rooms    []string
	from, to int64 // cursors
	got      []received
}

func switchTechniques(t *testing.T, network string, seed uint64) {
	b := newTestbed(t, network, func(c *config) { c.maxEvents, c.maxRoomBytes, c.maxBytes = 10_000, 1<<25, 1<<26 })
	rooms := []string{"a", "b", "c"}
	const publishers, each, clients = 3, 60, 4
	ctx, done := context.WithCancel(t.Context()) // done when everything is published
	start := b.relay.lastID.Load()

	var publishing sync.WaitGroup
	for p := range publishers {
		rng := rand.New(rand.NewPCG(seed, uint64(p)))
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
					if b.tryPublish(rng, network == pipeH2, room, fmt.Sprintf("%d.%d", p, i), text) {
						break
					}
				}
			}
		})
	}
	var reading sync.WaitGroup
	segments := make([][]segment, clients)
	for n := range clients {
		rng := rand.New(rand.NewPCG(seed, uint64(100+n)))
		reading.Go(func() {
			cursor := start
			for ctx.Err() == nil {
				s := b.readSome(ctx, t, rng, network == pipeH2, rooms, cursor)
				cursor = s.to
				segments[n] = append(segments[n], s)
			}
			end := b.relay.lastID.Load()
			for cursor < end && !t.Failed() { // the rest, over a connection that does not break
				e, _ := b.trySubscribe(t.Context(), b.client, variantOf("poll"), "a,b,c", fmt.Sprint("after=", cursor))
				s := segment{"poll", rooms, cursor, cursor, nil}
				s.receive(t, e, 1000)
				cursor = s.to
				segments[n] = append(segments[n], s)
			}
		})
	}
	publishing.Wait()
	done()
	reading.Wait()

	// The log: what all clients must have received.
	var log []received
	e := b.subscribe(variantOf("poll"), "a,b,c", fmt.Sprint("after=", start))
	for h := e.next(); h.kind != "beat"; h = e.next() {
		log = append(log, h)
	}
	if len(log) != publishers*each {
		t.Errorf("%d events in the log, want %d", len(log), publishers*each)
	}
	next := [publishers]int{}
	for _, h := range log { // events of one publisher keep their order
		var p, i int
		fmt.Sscanf(h.text, "%d %d", &p, &i)
		if next[p] != i {
			t.Errorf("publisher %d: %d came, want %d", p, i, next[p])
		}
		next[p] = i + 1
	}
	segmentCount, byTechnique := 0, map[string]int{}
	for n := range segments {
		for _, s := range segments[n] {
			var want []received
			for _, h := range log {
				if slices.Contains(s.rooms, h.room) && s.from < h.id && h.id <= s.to {
					want = append(want, h)
				}
			}
			if !slices.Equal(s.got, want) {
				t.Errorf("client %d, by %s in %v from %d to %d: received %d events, want %d\n%v\n%v", n, s.by, s.rooms, s.from, s.to, len(s.got), len(want), s.got, want)
				return
			}
			segmentCount++
			byTechnique[s.by] += len(s.got)
		}
	}
	t.Logf("%d hops, events by technique: %v", segmentCount, byTechnique)
	for _, v := range variants {
		if !v.forPeople && byTechnique[v.name] == 0 && network != tcp {
			t.Errorf("%s received nothing", v.name)
		}
	}
}

// receive takes at most n events.
func (s *segment) receive(t *testing.T, e *eventReader, n int) {
	for ; n > 0; n-- {
		h, err := e.receive()
		if err != nil {
			if _, ok := err.(malformed); ok {
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
			t.Errorf("%s: received %s", s.by, h.json)
		}
	}
	if len(e.pending) == 0 && e.after >= 0 {
		s.to = e.after // the cursor of an answer covers more than its events
	}
}

func TestLongPoll(t *testing.T) {
	for _, name := range []string{"longpoll", "jsonp"} {
		v := variantOf(name)
		path := "/rooms/a,b/" + v.technique + "?callback=my.$cb_1&after="
		// ask makes one request, and returns what it received and how long it took.
		asks := func(b *testbed, more string) (*eventReader, time.Duration) {
			start := time.Now()
			e := b.subscribe(v, "a,b")
			e.path = path + more
			if err := e.read(e); err != nil {
				b.t.Fatal(err)
			}
			return e, time.Since(start)
		}
		after := func(t *testing.T, d time.Duration, do func()) {
			done := make(chan struct{})
			time.AfterFunc(d, func() { do(); close(done) })
			t.Cleanup(func() { <-done })
		}

		t.Run(name+"/the first event is the answer", inBubble(func(t *testing.T) {
			b := newTestbed(t, pipe)
			after(t, 7*time.Second, func() { b.post("b", "hi") })
			e, took := asks(b, "")
			e.expect("message hi")
			if took != 7*time.Second || len(e.pending) > 0 || e.after != b.relay.lastID.Load() {
				t.Errorf("it took %v, the cursor is %d", took, e.after)
			}
		}))
		t.Run(name+"/after 25 s, an empty answer with the cursor", inBubble(func(t *testing.T) {
			b := newTestbed(t, pipe)
			b.post("a", "before")
			after(t, 10*time.Second, func() { b.post("c", "elsewhere") })
			e, took := asks(b, "")
			e.expect("beat")
			if took != 25*time.Second || e.after != b.relay.lastID.Load() {
				t.Errorf("it took %v, the cursor is %d, want 25 s and %d", took, e.after, b.relay.lastID.Load())
			}
		}))
		t.Run(name+"/after as long as it asks for, an empty answer", inBubble(func(t *testing.T) {
			b := newTestbed(t, pipe)
			for _, wait := range []int{0, 1, 3, 55} {
				if _, took := asks(b, fmt.Sprint("&wait=", wait)); took != time.Duration(wait)*time.Second {
					t.Errorf("wait=%d took %v", wait, took)
				}
			}
		}))
		t.Run(name+"/what the cursor asks for is there at once", inBubble(func(t *testing.T) {
			b := newTestbed(t, pipe)
			first := b.post("a", "one")
			for i := range 300 {
				b.post([]string{"a", "b"}[i%2], fmt.Sprint(i))
			}
			e, took := asks(b, fmt.Sprint(first, "&wait=55"))
			if took != 0 || len(e.pending) != 256 || e.pending[0].text != "0" || e.after != first+256 {
				t.Errorf("%d events after %v, the first %v, the cursor %d", len(e.pending), took, e.pending[0], e.after)
			}
			e, took = asks(b, fmt.Sprint(e.after, "&wait=55")) // and the rest
			if took != 0 || len(e.pending) != 44 || e.pending[43].text != "299" {
				t.Errorf("%d events after %v", len(e.pending), took)
			}
		}))
		t.Run(name+"/presence does not end the wait of a client that does not see it", inBubble(func(t *testing.T) {
			b := newTestbed(t, pipe)
			after(t, time.Second, func() { b.do("POST", "/rooms/a/presence?user=bob", "online") })
			e, took := asks(b, "&user=ada&presence=0")
			e.expect("beat")
			if took != 25*time.Second {
				t.Errorf("it took %v", took)
			}
		}))
		t.Run(name+"/a stop ends the wait", inBubble(func(t *testing.T) {
			b := newTestbed(t, pipe)
			after(t, 5*time.Second, b.stop)
			e, took := asks(b, "")
			e.expect("beat")
			if took != 5*time.Second || e.after < b.relay.epoch {
				t.Errorf("it took %v, the cursor is %d", took, e.after)
			}
		}))
		t.Run(name+"/who leaves is noticed at once", inBubble(func(t *testing.T) {
			for _, network := range []string{pipe, pipe10} {
				b := newTestbed(t, network)
				ctx, leave := context.WithCancel(t.Context())
				go b.tryGet(ctx, path)
				time.Sleep(time.Second)
				if n := b.subscriptions(); n != 2 {
					t.Errorf("%d places in rooms, want 2", n)
				}
				leave()
				synctest.Wait()
				b.checkIdle()
			}
		}))
	}
}

// Pages.

// refresh is a whole page with a form, and has the browser load it again.
func TestRefresh(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestbed(t, pipe)
		for i := range 60 {
			b.post("a", fmt.Sprint(i))
		}
		res, page := b.do("GET", "/rooms/a/refresh", "")
		if n := strings.Count(page, `<p class="message">`); n != 50 || res.Header.Get("Refresh") != "10" {
			t.Errorf("%d messages, Refresh: %s; want 50 and 10", n, res.Header.Get("Refresh"))
		}
		if strings.Index(page, ">59<") > strings.Index(page, ">10<") || strings.Contains(page, ">9<") {
			t.Error("the page does not begin with the newest message and end with the fiftieth")
		}
		if !strings.Contains(page, `<form method="post" action="../a"`) || !strings.Contains(page, `name="data"`) {
			t.Error("the page has no form")
		}
		if res, _ := b.do("GET", "/rooms/a/refresh?wait=3&last=1", ""); res.Header.Get("Refresh") != "3" {
			t.Errorf("Refresh: %s, want 3", res.Header.Get("Refresh"))
		}
		if _, page := b.do("GET", "/rooms/a/refresh?form=0", ""); strings.Contains(page, "<form") {
			t.Error("a page with form=0 has a form")
		}
		// The page that never ends must not have a form: sending it would end the
		// page.
		e := b.subscribe(variantOf("html"), "a", "last=2").begin()
		e.expect("message 58", "message 59")
	})
}

// What users write is text in a page, in a part and in a script, and nothing else.
func TestNoMarkup(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestbed(t, pipe)
		evil := "</script><script>alert(1)</script><img src=x onerror='alert(2)'>\"&amp;\u2028\u2029--> ]]> \x00 \r\n\r\n--boundary\r\ndata: {}\n\n"
		who := `"><svg onload=alert(3)>'&`
		for _, kind := range []string{"message", "typing"} {
			b.post("a?"+url.Values{"user": {who}, "type": {kind}}.Encode(), evil)
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
				continue // text/plain and nosniff: any text is harmless
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

// Clients that leave, and clients that stall.

// A thousand clients of all techniques connect and leave, with or without closing
// properly, and leave nothing behind.
func TestNothingIsLeft(t *testing.T) {
	for _, network := range []string{pipe, core, tcp} {
		t.Run(network, func(t *testing.T) {
			runOnNetwork(t, network, func(t *testing.T) {
				b := newTestbed(t, network)
				n := map[string]int{pipe: 1000, core: 1000, tcp: 300}[network]
				connectAndLeave(b, n) // first let pools, maps and the runtime grow
				goroutines, heap := b.measure()
				connectAndLeave(b, n)
				goroutines2, heap2 := b.measure()
				if goroutines2 > goroutines+5 {
					stacks := make([]byte, 1<<20)
					t.Errorf("%d goroutines before, %d after\n%s", goroutines, goroutines2, stacks[:runtime.Stack(stacks, true)])
				}
				if heap2 > heap+1<<20 {
					t.Errorf("%d bytes of heap before, %d after", heap, heap2)
				}
				b.checkIdle()
			})
		})
	}
}

func connectAndLeave(b *testbed, n int) {
	b.t.Helper()
	ctx, leave := context.WithCancel(context.Background())
	var readers []*eventReader
	waiting := 0
	for i := range n {
		v := variants[i%len(variants)]
		parameters := []string{}
		if i%3 == 0 {
			parameters = append(parameters, fmt.Sprint("user=u", i))
		}
		if v.streams() {
			e, err := b.trySubscribe(ctx, b.client, v, fmt.Sprintf("a,r%d", i%50), parameters...)
			if err != nil {
				b.t.Fatal(err)
			}
			readers = append(readers, e)
			for h := e.next(); h.kind != "hello"; h = e.next() {
			}
		} else {
			if v.technique == "longpoll" || v.technique == "jsonp" {
				waiting++
			}
			go b.tryGet(ctx, fmt.Sprintf("/rooms/a,r%d/%s?callback=f&%s", i%50, v.technique, strings.Join(parameters, "")))
		}
	}
	b.settle()
	if !b.waitUntil(func() bool { return int(b.active()) == len(readers)+waiting }) {
		b.t.Errorf("%d are held, want %d streams and %d requests", b.active(), len(readers), waiting)
	}
	b.post("a", "to all of you")
	for i, e := range readers {
		switch i % 3 {
		case 0: // reads to the end, and closes properly
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
	b.disconnect()
	b.settle()
}

// Unsent bytes of streams that were not taken over are bounded, too.
func TestUnsentBytesOfPlainStreamsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestbed(t, pipe10, func(c *config) { c.maxRoomBytes, c.maxBytes = 50_000, 100_000 })
		b.limiter.maxUnsent = 100_000
		for range 20 {
			b.subscribe(variantOf("stream"), "a").begin()
		}
		b.post("a", strings.Repeat("x", 10_000))
		b.settle()
		if n, dropped := b.limiter.unsentBytes.Load(), b.stats.dropped.Load(); n == 0 || n > 100_000 || dropped == 0 {
			t.Errorf("%d bytes are unsent to 20 clients that do not read, and %d were dropped; want at most 100000", n, dropped)
		}
		time.Sleep(2 * writeTimeout)
		if n, held := b.limiter.unsentBytes.Load(), b.active(); n != 0 || held != 0 {
			t.Errorf("after the write timeout %d are held, and %d bytes are unsent", held, n)
		}
	})
}

// Answering a long-poll takes no larger stack than waiting: the stack would be kept by
// all that wait again.
func TestAnAnswerTakesNoLargerStack(t *testing.T) {
	if info, _ := debug.ReadBuildInfo(); info != nil && slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"}) {
		t.Skip("with the race detector every stack is larger; without it this is tested")
	}
	defer debug.SetGCPercent(debug.SetGCPercent(-1)) // garbage collection makes stacks smaller again
	const n = 200
	b := newTestbed(t, tcp)
	conns := make([]net.Conn, n)
	askAll := func() (stacks uint64) {
		for _, conn := range conns {
			fmt.Fprintf(conn, "GET /rooms/a/longpoll?wait=55&after=%d HTTP/1.1\r\nHost: cometes.test\r\n\r\n", b.cursor())
		}
		if !b.waitUntil(func() bool { return b.active() == n }) {
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
	answerAll := func() {
		b.post("a", "hi")
		for _, conn := range conns {
			res, err := http.ReadResponse(bufio.NewReader(conn), nil)
			if err != nil || res.StatusCode != 200 {
				t.Fatal(res, err)
			}
			if body, err := io.ReadAll(res.Body); err != nil || !strings.Contains(string(body), `"hi"`) {
				t.Fatalf("%s, %v", body, err)
			}
		}
	}
	for range 3 { // until net/http sees no more of them
		askAll()
		answerAll()
	}
	before := askAll()
	for range 3 {
		answerAll()
		askAll()
	}
	if after := askAll(); after > before+n<<10 {
		t.Errorf("%d long-polls had %d bytes of stacks before they were answered, and %d after", n, before, after)
	}
}

// A client that does not read is ended 10 s after the last write that made progress.
// Other clients receive everything at once.
func TestAStalledClientIsEndedAlone(t *testing.T) {
	for _, network := range []string{pipe, core, pipe10} {
		for _, v := range variants {
			if !v.streams() || v.technique == "ws" && network == pipe10 {
				continue
			}
			t.Run(network+"/"+v.name, inBubble(func(t *testing.T) {
				b := newTestbed(t, network)
				others := []*eventReader{b.subscribe(variantOf("stream"), "a").begin(), b.subscribe(variantOf("sse"), "a").begin()}
				still := b.subscribe(v, "a").begin()
				time.Sleep(time.Second)
				for i := range 100 {
					b.post("a", fmt.Sprint(i, strings.Repeat("x", 1000)))
				}
				start := time.Now()
				for i := range 100 {
					for _, e := range others {
						if h := e.next(); !strings.HasPrefix(h.text, fmt.Sprint(i, "x")) {
							t.Fatalf("%s received %.20v, want %d", e.name, h, i)
						}
					}
				}
				checkImmediate(t, start)
				time.Sleep(9900 * time.Millisecond)
				if n := b.active(); n != 3 {
					t.Errorf("after 9.9 s there are %d streams, want 3", n)
				}
				time.Sleep(200 * time.Millisecond)
				if n := b.active(); n != 2 {
					t.Errorf("after 10.1 s there are %d streams, want 2", n)
				}
				var err error
				for h := (received{}); err == nil; h, err = still.receive() {
					if h.kind == "bye" {
						t.Error("the stalled client was sent a bye")
					}
				}
				if err == io.EOF && network != pipe10 { // over HTTP/1.0 that is the only way to end
					t.Error("the stalled stream ended properly, want a broken connection")
				}
				b.post("a", "later")
				for _, e := range others {
					for h := e.next(); h.text != "later"; h = e.next() {
					}
				}
			}))
		}
	}
}

// The same over HTTP/2, where the window of one stream is full, next to others on the
// connection.
func TestAStalledHTTP2StreamIsEndedAlone(t *testing.T) {
	runOnNetwork(t, pipeH2, func(t *testing.T) {
		b := newTestbed(t, pipeH2, func(c *config) { c.maxRoomBytes = 10 << 20 })
		other := b.subscribe(variantOf("sse"), "a").begin()
		still := b.subscribe(variantOf("stream"), "a").begin()
		for i := range 100 { // 6 MB; the client's window is 4 MB
			b.post("a", fmt.Sprint(i, strings.Repeat("x", 60_000)))
			if h := other.next(); !strings.HasPrefix(h.text, fmt.Sprint(i, "x")) {
				t.Fatalf("received %.20v, want %d", h, i)
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
		b.post("a", "later")
		for h := other.next(); h.text != "later"; h = other.next() {
		}
		still.close()
	})
}

// The same for an answer that is not a stream.
func TestAStalledAnswerIsEnded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestbed(t, pipe)
		b.post("a", strings.Repeat("x", 60_000))
		for _, path := range []string{"/rooms/a/poll?last=1", "/rooms/a/longpoll?last=1", "/rooms/a/refresh", "/rooms/a/jsonp?last=1&callback=f"} {
			conn, _ := b.dial(t.Context())
			fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: cometes.test\r\n\r\n", path)
			time.Sleep(10*time.Second - time.Millisecond)
			if n := b.subscriptions(); n != 1 {
				t.Errorf("%s: %d are served, want 1", path, n)
			}
			time.Sleep(2 * time.Millisecond)
			b.checkIdle()
			conn.Close()
		}
	})
}

// A client that reads slowly is not ended.
func TestSlow(t *testing.T) {
	for _, name := range []string{"stream", "ws"} {
		t.Run(name, inBubble(func(t *testing.T) {
			b := newTestbed(t, pipe, func(c *config) { c.maxEvents = 1000 })
			client := b.newClient(func(ctx context.Context) (net.Conn, error) {
				conn, err := b.dial(ctx)
				return &slowConn{Conn: conn}, err
			}, false)
			e, err := b.trySubscribe(t.Context(), client, variantOf(name), "a")
			if err != nil {
				t.Fatal(err)
			}
			e.begin()
			for i := range 200 {
				b.post("a", fmt.Sprint(i, strings.Repeat("x", 1000)))
			}
			start := time.Now()
			for i := range 200 {
				h := e.next()
				for h.kind == "beat" {
					h = e.next()
				}
				if !strings.HasPrefix(h.text, fmt.Sprint(i, "x")) {
					t.Fatalf("received %.20v, want %d", h, i)
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

// A client that leaves is no error, even while the relay writes to it.
func TestLeavingIsNoError(t *testing.T) {
	for _, network := range []string{pipe, core, pipe10, pipeH2, tcp} {
		t.Run(network, func(t *testing.T) {
			runOnNetwork(t, network, func(t *testing.T) {
				b := newTestbed(t, network)
				b.failOnDisconnect = true
				for range 20 {
					client := b.newClient(b.dial, network == pipeH2)
					e, err := b.trySubscribe(t.Context(), client, variantOf("stream"), "a", "last=100")
					if err != nil {
						t.Fatal(err)
					}
					b.post("a", strings.Repeat("x", 50_000))
					e.next()
					b.disconnect()
					b.settle()
				}
			})
		})
	}
}

// Python's urllib reads no answer before it has sent the whole body, and asks for the
// connection to be closed. It reads why it is refused all the same.
func TestAClientThatSendsFirstReadsTheRefusal(t *testing.T) {
	b := newTestbed(t, tcp)
	for status, head := range map[string]string{
		" 413 ": "POST /rooms/a HTTP/1.1\r\nContent-Length: 5000000\r\n",
		" 415 ": "POST /rooms/a HTTP/1.1\r\nContent-Length: 5000000\r\nContent-Encoding: gzip\r\n",
		" 405 ": "POST /rooms/a/poll HTTP/1.0\r\nContent-Length: 5000000\r\n",
	} {
		conn, err := b.dial(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(conn, head+"Host: x\r\nConnection: close\r\n\r\n")
		if _, err := conn.Write(make([]byte, 5_000_000)); err != nil {
			t.Errorf("%s: sending ends with %v", status, err)
		}
		answer, err := io.ReadAll(conn)
		if !strings.Contains(string(answer), status) || err != nil {
			t.Errorf("the answer is %q, and reading ends with %v; want %s", answer, err, status)
		}
		conn.Close()
	}
}

// Some clients of sse take an id for their cursor as soon as they have read its line. They
// lose nothing either when the connection is cut: by then they have read the event.
func TestTheIDComesLast(t *testing.T) {
	for _, parameters := range []url.Values{{}, {"names": {"0"}}, {"as": {"data"}}} {
		q := &request{rooms: []string{"a"}, as: parameters.Get("as"), permit: newPermit(), values: parameters}
		enc := sse(q)
		for _, e := range []*event{
			{id: 7, kind: "message", json: []byte(`{"id":7,"data":"two\nlines"}`)},
			{id: 8, kind: "x", json: []byte(`{"id":8,"data":""}`)},
			notice{Type: "hello", ID: new(int64)}.event(),
		} {
			block := string(enc.event(nil, e))
			if !strings.HasSuffix(block, fmt.Sprintf("\nid: %d\n\n", e.id)) || strings.Count(block, "id: ") != 1 {
				t.Errorf("%v: the event is %q", parameters, block)
			}
		}
	}
}

// With as=data an event is its data alone: a string as its text, line by line,
// anything else as JSON.
func TestDataAlone(t *testing.T) {
	texts := []string{`"hi"`, `"two\nlines"`, `"\r\na\rb\n"`, `""`, `" <b> & é\u2028"`, `{"a":["<"]}`, "42", "null"}
	synctest.Test(t, func(t *testing.T) {
		b := newTestbed(t, pipe)
		sse := b.subscribe(variantOf("sse"), "a", "as=data", "user=ada")
		ws, r := b.rawWebSocket("/rooms/a/ws?as=data&presence=1")
		for _, text := range texts {
			b.do("POST", "/rooms/a?type=x", text, jsonType)
		}
		b.post("a", "the last")
		// By WebSocket each event is a message of its own, and nothing else is sent
		// but pings.
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

		// Only the sender gets a reply, and nothing that is refused reaches others.
		e := b.subscribe(variantOf("ws"), "a", "as=data")
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
		if _, _, err := e.conn.Read(e.ctx); websocket.CloseStatus(err) != websocket.StatusServiceRestart {
			t.Errorf("when the relay stops: %v, want 1012", err)
		}
	})
}

// The relay speaks no subprotocol, but must choose one for a browser that offers some.
func TestSubprotocols(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestbed(t, pipe)
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

func TestWebSocketPublishes(t *testing.T) {
	for _, network := range []string{pipe, tcp} {
		t.Run(network, func(t *testing.T) { runOnNetwork(t, network, testWebSocketPublishes) })
	}
}

func testWebSocketPublishes(t *testing.T) {
	network := t.Name()[strings.LastIndex(t.Name(), "/")+1:]
	b := newTestbed(t, network)
	ws := b.webSocket("a", "user=ada", "presence=0")
	reader := b.subscribe(variantOf("stream"), "a,b").begin()
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
			reply := ws.next()
			if reply.kind == "ack" {
				ack = reply.json
			} else {
				own = reply.json
			}
		}
		if h.room == "a" && own != h.json {
			t.Errorf("the sender received %s, want %s", own, h.json)
		}
		if want := strings.Replace(test.ack, "ID", fmt.Sprint(h.id), 1); ack != want {
			t.Errorf("ack %s, want %s", ack, want)
		}
	}
	// A key that is sent twice is one message, with one id.
	mark := b.relay.lastID.Load()
	ws.send(`{"data":"k","key":"k1"}`)
	if h := ws.next(); h.kind != "ack" || b.relay.lastID.Load() != mark {
		t.Errorf("again: %s", h.json)
	}
	if res, body := b.do("POST", "/rooms/a?key=k1", "k"); res.StatusCode != 200 {
		t.Errorf("the key is not known to HTTP: %s %s", res.Status, body)
	}
}

// What is refused is answered with the reason. Nothing is published, and the WebSocket
// stays open.
func TestWebSocketRefusals(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestbed(t, pipe)
		one, two := b.webSocket("a", "user=ada", "presence=0"), b.webSocket("a,b")
		deep := strings.Repeat("[", 65) + strings.Repeat("]", 65)
		for _, test := range []struct {
			ws    *eventReader
			frame string
			key   string // of the reply
			why   string // part of the message
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
			if !utf8.ValidString(test.frame) { // invalid in a text message
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
		one.send("still open")
		one.expect("message still open")
		two.expect("message still open")
		one.send(`{"data":` + deep[1:len(deep)-1] + `}`) // as deep as in a POST
		if h := one.next(); h.kind != "message" {
			t.Errorf("64 deep: %s", h.json)
		}
	})
}

// 65,536 bytes are accepted; one more closes the WebSocket with 1009.
func TestWebSocketTooBig(t *testing.T) {
	for _, network := range []string{pipe, tcp} {
		t.Run(network, func(t *testing.T) {
			runOnNetwork(t, network, func(t *testing.T) {
				b := newTestbed(t, network)
				other := b.webSocket("a")
				for _, head := range []string{"", `{"data":"`} {
					tail := ""
					if head != "" {
						tail = `"}`
					}
					ws := b.webSocket("b")
					ws.send(head + strings.Repeat("x", 65_536-len(head)-len(tail)) + tail)
					if h := ws.next(); h.kind != "message" || len(h.text) != 65_536-len(head)-len(tail) {
						t.Errorf("received %.50v of %d", h, len(h.text))
					}
					mark := b.relay.lastID.Load()
					go ws.conn.Write(ws.ctx, websocket.MessageText, []byte(head+strings.Repeat("x", 65_537-len(head)-len(tail))+tail))
					if h, err := ws.receive(); websocket.CloseStatus(err) != websocket.StatusMessageTooBig {
						t.Errorf("65,537 bytes: %.50v %v, want 1009", h, err)
					}
					if b.relay.lastID.Load() != mark {
						t.Error("65,537 bytes were published")
					}
					b.settle()
				}
				if n := b.subscriptions(); network != tcp && n != 1 {
					t.Errorf("%d readers, want 1", n)
				}
				b.post("a", "hi")
				other.expect("message hi")
			})
		})
	}
}

// Events that are due together come in few messages, an event per line.
func TestWebSocketJoins(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestbed(t, pipe)
		for i := range 100 {
			b.post("a", fmt.Sprint(i))
		}
		e := b.webSocket("a", "last=100")
		_, frame, err := e.conn.Read(t.Context())
		if n := strings.Count(string(frame), "\n"); err != nil || n != 99 {
			t.Errorf("a frame with %d newlines, %v; want 99", n, err)
		}
	})
}

// A WebSocket answers a close frame and pings, and accepts a message in several
// frames.
func TestAWebSocketAnswersCloseAndPing(t *testing.T) {
	for _, network := range []string{pipe, core, tcp} {
		t.Run(network, func(t *testing.T) {
			runOnNetwork(t, network, func(t *testing.T) {
				b := newTestbed(t, network)
				e := b.webSocket("a")
				w, _ := e.conn.Writer(e.ctx, websocket.MessageText)
				io.WriteString(w, `{"data":`)
				io.WriteString(w, `"in pieces"}`)
				w.Close()
				e.expect("message in pieces")
				ctx := e.conn.CloseRead(t.Context())
				if err := e.conn.Ping(ctx); err != nil {
					t.Errorf("ping: %v", err)
				}
				e = b.webSocket("a")
				if err := e.conn.Close(websocket.StatusNormalClosure, "enough"); err != nil {
					t.Errorf("the close frame was not answered: %v", err)
				}
			})
		})
	}
}

// A WebSocket announces its user, and receives presence.
func TestWebSocketPresence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestbed(t, pipe)
		ada := b.webSocket("a", "user=ada")
		h := ada.next()
		if h.json != `{"type":"presence","room":"a","data":{"count":1,"users":{"ada":"online"}}}` {
			t.Errorf("the roster is %s", h.json)
		}
		time.Sleep(2 * time.Second)
		bob := b.webSocket("a", "user=bob")
		ada.expect("presence online")
		time.Sleep(2 * time.Second)
		bob.send(`{"type":"presence","data":"typing"}`)
		if h := ada.next(); h.kind != "presence" || h.from != "bob" || h.data != `"typing"` {
			t.Errorf("ada received %s", h.json)
		}
		bob.send(`{"type":"presence","room":"a","data":"away","key":"k"}`)
		for h := bob.next(); h.json != `{"type":"ack","key":"k"}`; h = bob.next() {
		}
		ada.expect("presence away")
	})
}

// A bad handshake is refused, with a reason.
func TestWebSocketHandshake(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestbed(t, pipe)
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
			b.checkIdle()
		}
		b = newTestbed(t, pipeH2)
		if res, body := b.do("GET", "/rooms/a/ws", ""); res.StatusCode != 426 || !isError(body) || res.Header.Get("Upgrade")+res.Header.Get("Connection") != "" {
			t.Errorf("over HTTP/2, which knows neither Upgrade nor Connection: %s %v %q", res.Status, res.Header, body)
		}
	})
}

// Setting the clock back, as a machine may at its start, stops no heartbeats.
func TestAHeartbeatIsDueWhenTheClockWasSetBack(t *testing.T) {
	now := time.Now().UnixNano()
	st := &stream{heartbeatEvery: int64(14 * time.Second), expiresAt: math.MaxInt64}
	st.heartbeatAt.Store(now + st.heartbeatEvery)
	if st.due(now) || st.due(now+st.heartbeatEvery-1) || !st.due(now+st.heartbeatEvery) {
		t.Error("a heartbeat is due when its interval is over, and not before")
	}
	if back := now - int64(time.Hour); !st.due(back) {
		t.Error("the clock is an hour back, and for an hour there is no heartbeat")
	}
}

// Each body and its headers become this event.
func TestPublish(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestbed(t, pipe)
		parts, asParts := formParts("user", "ada", "data", "hi\r\nthere", "type", "note")
		file, asFile := formParts("data", "hi", "else", "where")
		for _, test := range []struct {
			name, query, kind, body, want string
		}{
			{"curl -d hi", "", formType, "hi", `{"data":"hi","type":"message"}`},
			{"curl -d of a sentence", "", formType, "100% of a=b & c", `{"data":"100% of a=b \u0026 c","type":"message"}`},
			{"curl -d of a form without data", "", formType, "user=ada&say=hi", `{"data":"user=ada\u0026say=hi","type":"message"}`},
			{"curl -d of the field's name", "", formType, "data", `{"data":"data","type":"message"}`},
			{"curl -d of JSON", "", formType, `{"a":1}`, `{"data":"{\"a\":1}","type":"message"}`},
			{"no type", "", "X: y", "hi", `{"data":"hi","type":"message"}`},
			{"an unknown type", "", "Content-Type: application/octet-stream", "hi", `{"data":"hi","type":"message"}`},
			{"a malformed type", "", "Content-Type: /;;", "hi", `{"data":"hi","type":"message"}`},
			{"text", "?user=ada&type=x", textType, "é \u2028 <&> \x00\r\n", `{"data":"é \u2028 \u003c\u0026\u003e \u0000\r\n","from":"ada","type":"x"}`},
			{"text that looks like JSON", "", textType, `{"a":1}`, `{"data":"{\"a\":1}","type":"message"}`},
			{"text with a charset", "", textType + `; charset="UTF-8"`, "hi", `{"data":"hi","type":"message"}`},
			{"nothing", "", textType, "", `{"data":"","type":"message"}`},
			{"JSON", "?user=%C3%A9&type=a.b:c-d_E9", jsonType, " {\n\t\"a\" : [ 1 , null , \"<\" ] }\n", `{"data":{"a":[1,null,"\u003c"]},"from":"é","type":"a.b:c-d_E9"}`},
			{"JSON with a charset", "", jsonType + "; charset=utf-8", `"hi"`, `{"data":"hi","type":"message"}`},
			{"JSON by another name", "", "Content-Type: text/json", `[1]`, `{"data":[1],"type":"message"}`},
			{"JSON after a byte order mark", "", jsonType, "\ufeff[1]", `{"data":[1],"type":"message"}`},
			{"text after a byte order mark", "", textType, "\ufeffhi", `{"data":"hi","type":"message"}`},
			{"a form after a byte order mark", "", formType, "\ufeffdata=hi", `{"data":"hi","type":"message"}`},
			{"JSON with a parameter that is none", "", jsonType + "; utf-8", "[1]", `{"data":[1],"type":"message"}`},
			{"JSON with an empty parameter", "", jsonType + ";;", "[1]", `{"data":[1],"type":"message"}`},
			{"JSON whose type a proxy joined with another", "", jsonType + ", text/plain", "[1]", `{"data":[1],"type":"message"}`},
			{"curl -d of a form with a semicolon", "", formType, "data=a; b&user=ada", `{"data":"a; b","from":"ada","type":"message"}`},
			{"curl -d of a form with a percent sign", "", formType, "data=100% of %C3%A9 %zz%&user=ada", `{"data":"100% of é %zz%","from":"ada","type":"message"}`},
			{"JSON by a name of its own", "", "Content-Type: application/cloudevents+json; charset=utf-8", `{"id":"x"}`, `{"data":{"id":"x"},"type":"message"}`},
			{"JSON with whole surrogate pairs", "", jsonType, `["\ud83d\ude00","\\ud800","\uFFFD"]`, `{"data":["😀","\\ud800","�"],"type":"message"}`},
			{"JSON with a name again in another object", "", jsonType, `{"a":{"a":1},"b":[{"a":1},{"a":2}],"c":"a"}`, `{"data":{"a":{"a":1},"b":[{"a":1},{"a":2}],"c":"a"},"type":"message"}`},
			{"JSON with large and small numbers", "", jsonType, `[1.7e308,-1.7E+308,1e-400,12345678901234567890,0.1]`, `{"data":[1.7e308,-1.7e308,0,12345678901234567890,0.1],"type":"message"}`},
			{"null", "", jsonType, "null", `{"data":null,"type":"message"}`},
			{"a number", "", jsonType, "-0.5e-3", `{"data":-0.0005,"type":"message"}`},
			{"JSON as deep as may be", "", jsonType, strings.Repeat("[", 64) + strings.Repeat("]", 64), `{"data":` + strings.Repeat("[", 64) + strings.Repeat("]", 64) + `,"type":"message"}`},
			{"JSON with brackets in a string", "", jsonType, `"\"` + strings.Repeat("[{", 100) + `"`, `{"data":"\"` + strings.Repeat("[{", 100) + `","type":"message"}`},
			{"a form", "", formType, "data=a+b%26c%3D%C3%A9&user=ada&type=note", `{"data":"a b\u0026c=é","from":"ada","type":"note"}`},
			{"a form and the query", "?user=ada", formType, "data=hi&type=x", `{"data":"hi","from":"ada","type":"x"}`},
			{"a form and the query that agree", "?user=ada&type=x", formType, "data=hi&type=x&user=ada", `{"data":"hi","from":"ada","type":"x"}`},
			{"a form with more", "", formType, "data=&other=1&other=2", `{"data":"","type":"message"}`},
			{"a form in parts", "", asParts, parts, `{"data":"hi\r\nthere","from":"ada","type":"note"}`},
			{"a form in parts with more", "?user=ada", asFile, file, `{"data":"hi","from":"ada","type":"message"}`},
			{"a user of 64 characters", "?user=" + strings.Repeat("%C3%A9", 64), textType, "", `{"data":"","from":"` + strings.Repeat("é", 64) + `","type":"message"}`},
			{"a user that is markup", "?user=%3Cb%3E%22%27", textType, "", `{"data":"","from":"\u003cb\u003e\"'","type":"message"}`},
			{"a type of 64", "?type=" + strings.Repeat("x", 64), textType, "", `{"data":"","type":"` + strings.Repeat("x", 64) + `"}`},
			{"parameters that are empty", "?type=&user=&key=&ttl=", textType, "hi", `{"data":"hi","type":"message"}`},
			{"not encoded", "", "Content-Encoding: identity", "hi", `{"data":"hi","type":"message"}`},
		} {
			mark := b.relay.lastID.Load()
			res, body := b.do("POST", "/rooms/r"+test.query, test.body, test.kind)
			if want := fmt.Sprintf("{\"id\":%d}\n", mark+1); res.StatusCode != 201 || body != want {
				t.Errorf("%s: %s %s, want 201 %s", test.name, res.Status, body, want)
				continue
			}
			if h := res.Header; h.Get("Content-Type") != "application/json; charset=utf-8" || h.Get("X-Content-Type-Options") != "nosniff" {
				t.Errorf("%s: headers %v", test.name, h)
			}
			// Compared with the output of Go's encoder, byte for byte.
			if got := b.newest("r"); got != test.want && !sameJSON(got, test.want) {
				t.Errorf("%s: became %s, want %s", test.name, got, test.want)
			}
		}
		for _, room := range []string{"A-Z.a:z_09", strings.Repeat("x", 64), "a%2Db", "%61"} {
			if res, body := b.do("POST", "/rooms/"+room, "hi"); res.StatusCode != 201 {
				t.Errorf("the room %s: %s %s", room, res.Status, body)
			}
		}
	})
}

// Python's str.splitlines, which some clients use, ends lines at more than
// . None of these characters is in an event.
func TestAnEventIsOneLineInPython(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestbed(t, pipe)
		const ends = "a\n\r\v\f\x1c\x1d\x1e\u0085\u2028\u2029b"
		quoted, _ := json.Marshal(ends)
		for _, post := range [][2]string{{ends, textType}, {url.Values{"data": {ends}}.Encode(), formType}, {string(quoted), jsonType}, {"{\"\u0085\":\"\u0085\"}", jsonType}} {
			b.do("POST", "/rooms/a", post[0], post[1])
			_, body := b.do("GET", "/rooms/a/poll?last=1", "")
			if i := strings.IndexAny(strings.TrimSuffix(body, "\n"), ends[1:len(ends)-1]); i >= 0 {
				t.Errorf("%q came as %q, with a line that ends at %d", post[0], body, i)
			}
			if got := b.newest("a"); post[0][0] != '{' && !sameJSON(got, `{"type":"message","data":`+string(quoted)+`}`) {
				t.Errorf("%q became %s", post[0], got)
			}
		}
	})
}

// 65,536 bytes are accepted in every way to publish, and not one more.
func TestPublishLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestbed(t, pipe)
		fill := func(head, tail string, size int) string {
			return head + strings.Repeat("x", size-len(head)-len(tail)) + tail
		}
		parts, asParts := formParts("data", "CUT")
		head, tail, _ := strings.Cut(parts, "CUT")
		for _, test := range []struct{ kind, head, tail string }{
			{textType, "", ""}, {jsonType, `"`, `"`}, {jsonType, `[[[{"a":"`, `"}]]]`}, {formType, "data=", ""}, {formType, "", ""}, {asParts, head, tail},
		} {
			mark := b.relay.lastID.Load()
			if res, body := b.do("POST", "/rooms/a", fill(test.head, test.tail, 65_536), test.kind); res.StatusCode != 201 {
				t.Errorf("%s of 65,536 bytes: %s %s", test.kind, res.Status, body)
			}
			if res, body := b.do("POST", "/rooms/a", fill(test.head, test.tail, 65_537), test.kind); res.StatusCode != 413 || !isError(body) {
				t.Errorf("%s of 65,537 bytes: %s %s", test.kind, res.Status, body)
			}
			if n := b.relay.lastID.Load() - mark; n != 1 {
				t.Errorf("%s: %d were published, want 1", test.kind, n)
			}
		}
		// Of a body without a declared size, no more than that is read.
		body := &endlessReader{}
		req, _ := http.NewRequestWithContext(t.Context(), "POST", b.url+"/rooms/a", body)
		if res, err := b.client.Do(req); err != nil || res.StatusCode != 413 {
			t.Errorf("a body without end: %v %v", res, err)
		}
		if n := body.n.Load(); n > 1<<20 {
			t.Errorf("%d bytes were read of it", n)
		}
	})
}

// An endlessReader is a body without end.
type endlessReader struct{ n atomic.Int64 }

func (b *endlessReader) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = 'x'
	}
	b.n.Add(int64(len(p)))
	return len(p), nil
}

// A key makes a retry safe.
func TestKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestbed(t, pipe, func(c *config) { c.maxEvents = 4 })
		post := func(path, body string, headers ...string) (status int, answer string) {
			res, answer := b.do("POST", path, body, headers...)
			return res.StatusCode, answer
		}
		_, first := post("/rooms/a?key=k", "one")
		parts, asParts := formParts("data", "x", "key", "k")
		for _, again := range [][]string{
			{"/rooms/a?key=k", "one"},
			{"/rooms/a?key=k&type=other&user=bob&ttl=5", "something else"},
			{"/rooms/a", "one", "Idempotency-Key: k"},
			{"/rooms/a?key=k", "one", "Idempotency-Key: k"},
			{"/rooms/a", "data=x&key=k", formType},
			{"/rooms/a?key=k", "data=x&key=k", formType},
			{"/rooms/a", parts, asParts},
		} {
			mark := b.relay.lastID.Load()
			if status, answer := post(again[0], again[1], again[2:]...); status != 200 || answer != first || b.relay.lastID.Load() != mark {
				t.Errorf("%q: %d %s, want 200 %s and nothing published", again, status, answer, first)
			}
		}
		for _, no := range [][]string{
			{"/rooms/a?key=k", "one", "Idempotency-Key: other"},
			{"/rooms/a?key=other", "data=x&key=k", formType},
			{"/rooms/a?key=other", "data=x&key=k", formType, "Idempotency-Key: k"},
			{"/rooms/a", "data=x&key=k", formType, "Idempotency-Key: other"},
			{"/rooms/a?key=k&key=k", "one"},
			{"/rooms/a", "data=x&key=k&key=k", formType},
			{"/rooms/a?key=" + strings.Repeat("k", 129), "one"},
			{"/rooms/a", "one", "Idempotency-Key: " + strings.Repeat("k", 129)},
			{"/rooms/a?key=%00", "one"},
			{"/rooms/a?key=%ff", "one"},
		} {
			mark := b.relay.lastID.Load()
			if status, answer := post(no[0], no[1], no[2:]...); status != 400 || !isError(answer) || b.relay.lastID.Load() != mark {
				t.Errorf("%q: %d %s, want 400 and nothing published", no, status, answer)
			}
		}
		if status, answer := post("/rooms/b?key=k", "one"); status != 201 || answer == first {
			t.Errorf("in another room: %d %s, want 201", status, answer)
		}
		if status, _ := post("/rooms/b?key="+strings.Repeat("k", 128), "one"); status != 201 {
			t.Errorf("a key of 128 bytes: %d", status)
		}
		for range 4 {
			post("/rooms/a", "more")
		}
		if status, answer := post("/rooms/a?key=k", "one"); status != 201 || answer == first {
			t.Errorf("when the history forgot it: %d %s, want 201", status, answer)
		}
	})
}

// PUT publishes like POST, for curl -T.
func TestPut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestbed(t, pipe)
		if res, body := b.do("PUT", "/rooms/a?user=ada", "notes\n"); res.StatusCode != 201 || b.newest("a") != `{"data":"notes\n","from":"ada","type":"message"}` {
			t.Errorf("%s %s", res.Status, body)
		}
	})
}

// With if, a message is published only if the newest one is still the one named. Of
// two clients that both read it, one wins, and the other is told where to go on.
func TestIf(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestbed(t, pipe, func(c *config) { c.maxEvents = 2 })
		newest := int64(0)
		try := func(query, body string, headers ...string) (status int, id int64) {
			t.Helper()
			mark := b.relay.lastID.Load()
			res, answer := b.do("POST", "/rooms/a?"+query, body, headers...)
			var parsed struct {
				ID    *int64
				Error string
			}
			if json.Unmarshal([]byte(answer), &parsed) != nil || parsed.ID == nil {
				t.Fatalf("%s: %s %s", query, res.Status, answer)
			}
			if published := b.relay.lastID.Load() - mark; (published == 1) != (res.StatusCode == 201) || (res.StatusCode == 412) != (parsed.Error != "") {
				t.Errorf("%s: %s %s, and %d were published", query, res.Status, answer, published)
			}
			return res.StatusCode, *parsed.ID
		}
		wants := func(status int, id int64, query, body string, headers ...string) int64 {
			t.Helper()
			got, gotID := try(query, body, headers...)
			if got != status || id >= 0 && gotID != id {
				t.Errorf("%s %s: %d with %d, want %d with %d", query, body, got, gotID, status, id)
			}
			return gotID
		}
		wants(412, 0, "if=1", "in a room that has none")
		newest = wants(201, -1, "if=0", "first")
		wants(412, newest, "if=0", "too late")
		b.post("b", "in another room")
		b.post("a?ttl=60&type=typing", "a signal is no message")
		second := wants(201, -1, fmt.Sprint("key=k&if=", newest), "second")
		wants(200, second, fmt.Sprint("key=k&if=", newest), "a key that is known answers first")
		wants(412, second, fmt.Sprint("if=", newest), "from before")
		third := wants(201, -1, "", fmt.Sprint("data=by+a+form&if=", second), formType)
		for range 3 { // the history grows
			third = wants(201, -1, fmt.Sprint("if=", third), "more")
		}

		e := b.webSocket("a")
		e.send(fmt.Sprintf(`{"data":"no","key":"x","if":%d}`, second))
		if h := e.next(); h.json != fmt.Sprintf(`{"type":"error","key":"x","id":%d,"data":"another message was published to this room since; its id is the one to go on from"}`, third) {
			t.Errorf("by WebSocket: %s", h.json)
		}
		e.send(fmt.Sprintf(`{"data":"yes","if":%d}`, third))
		e.expect("message yes")
		e.send(`{"data":"no","if":-1,"key":"x"}`)
		e.expect("error " + errIf.Error())
		e.send(`{"data":"no","if":1,"room":"nobody"}`)
		if h := e.next(); !strings.Contains(h.json, `"id":0,`) {
			t.Errorf("in a room that has none: %s", h.json)
		}
		if b.relay.isRead("nobody") || b.relay.rooms["nobody"] != nil {
			t.Error("a publish that was refused made a room")
		}
	})
}

// Clients that cannot set a header send the cursor in the query, each in its own way.
func TestTheCursorByItsOtherNames(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestbed(t, pipe)
		start := b.relay.epoch
		for _, text := range []string{"one", "two", "three"} {
			b.post("a", text)
		}
		after := func(name string, n int64) string { return fmt.Sprintf("%s=%d", name, start+n) }
		for _, test := range []struct{ query, header, want string }{
			{after("lastEventId", 2), "", "three"},
			{after("lastEventID", 2), "", "three"},
			{after("Last-Event-ID", 2), "", "three"},
			{after("last_event_id", 2), "", "three"},
			{after("lastEventId", 2) + "&" + after("after", 1), "", "three"},
			{after("after", 1) + "&" + after("lastEventID", 2) + "&" + after("lastEventId", 2), "", "three"},
			{after("lastEventID", 1) + "&" + after("lastEventId", 2), "", "three"}, // a polyfill's, behind the page's own
			{after("lastEventId", 2) + "&" + after("lastEventId", 1), "", "three"},
			{"lastEventID=9&" + after("lastEventId", 2), "", "three"},
			{after("lastEventId", 1), fmt.Sprint("Last-Event-ID: ", start+2), "three"},
			{after("lastEventId", 2), "Last-Event-ID: ", "three"},
			{"lastEventId=&" + after("after", 2), "", "three"},
			{"lastEventIds=1&" + after("after", 2), "", "three"},
		} {
			headers := []string{}
			if test.header != "" {
				headers = append(headers, test.header)
			}
			if _, body := b.do("GET", "/rooms/a/poll?"+test.query, "", headers...); strings.Count(body, `"id":`) != 1 || !strings.Contains(body, `"data":"three"`) {
				t.Errorf("%s %q: %s, want %s alone", test.query, test.header, body, test.want)
			}
		}
		b.subscribe(variantOf("sse"), "a", after("lastEventId", 1)).expect("hello", "message two", "message three")
	})
}

// A signal is delivered until it expires, and is no part of the history.
func TestPublishSignal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestbed(t, pipe)
		e := b.subscribe(variantOf("stream"), "a").begin()
		b.post("a", "before")
		for _, ttl := range []string{"1", "500", "86400"} {
			b.post("a?type=typing&ttl="+ttl, ttl)
		}
		e.expect("message before", "typing 1", "typing 500", "typing 86400")
		time.Sleep(500*time.Second - time.Millisecond)
		b.subscribe(variantOf("stream"), "a", fmt.Sprint("after=", b.relay.epoch)).expect("hello", "message before", "typing 500", "typing 86400")
		time.Sleep(time.Millisecond)
		b.subscribe(variantOf("stream"), "a", fmt.Sprint("after=", b.relay.epoch)).expect("hello", "message before", "typing 86400")
	})
}

// The form of a page without JavaScript publishes once and returns to the page,
// whatever else its fields say.
func TestForm(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestbed(t, pipe)
		post := func(body string) (status int, location string) {
			res, _ := b.do("POST", "/rooms/a", body, formType)
			return res.StatusCode, res.Header.Get("Location")
		}
		for _, test := range []struct {
			then, user, location string
			status               int
		}{
			{"form", "ada", "./a/form?user=ada#data", 303},
			{"refresh", "ada", "./a/refresh?user=ada", 303},
			{"form", "", "./a/form?user=#data", 303},
			{"form", "é \"<&?#/\r", "", 400},
			{"form", "é \"<&?#/", "./a/form?user=%C3%A9+%22%3C%26%3F%23%2F#data", 303},
			{"https://evil.example", "ada", "", 201},
			{"//evil.example", "ada", "", 201},
			{"/\\evil.example", "ada", "", 201},
			{"../../evil", "ada", "", 201},
			{"form\r\nX: y", "ada", "", 201},
			{"poll", "ada", "", 201},
			{"", "ada", "", 201},
		} {
			mark := b.relay.lastID.Load()
			status, location := post(url.Values{"data": {"hi"}, "then": {test.then}, "user": {test.user}}.Encode())
			if status != test.status || location != test.location {
				t.Errorf("then %q as %q: %d %q, want %d %q", test.then, test.user, status, location, test.status, test.location)
			}
			if published := b.relay.lastID.Load() > mark; published != (status < 400) {
				t.Errorf("then %q as %q: %d, published: %v", test.then, test.user, status, published)
			}
		}
		if res, _ := b.do("POST", "/rooms/a?then=form", "hi"); res.StatusCode != 201 {
			t.Errorf("then in the query: %s", res.Status)
		}

		// The form in the page works, and a double click is one message.
		for _, path := range []string{"/rooms/a/form?user=%22%3E%3Cb%3E", "/rooms/a/refresh?user=%22%3E%3Cb%3E", "/rooms/a/form?live=refresh"} {
			res, page := b.do("GET", path, "")
			if h := res.Header; res.StatusCode != 200 || h.Get("Content-Type") != "text/html; charset=utf-8" || !strings.Contains(h.Get("Cache-Control"), "no-store") || h.Get("X-Content-Type-Options") != "nosniff" {
				t.Errorf("%s: %s %v", path, res.Status, h)
			}
			_, key, ok := strings.Cut(page, `name="key" value="`)
			key, _, _ = strings.Cut(key, `"`)
			if !ok || len(key) < 16 || strings.Contains(page, "<b>") && strings.Contains(path, "form?user") {
				t.Fatalf("%s: %s", path, page)
			}
			mark := b.relay.lastID.Load()
			for range 2 {
				if status, location := post("user=ada&data=hi&then=form&key=" + key); status != 303 || location != "./a/form?user=ada#data" {
					t.Errorf("%d %s", status, location)
				}
			}
			if n := b.relay.lastID.Load() - mark; n != 1 {
				t.Errorf("a double click published %d", n)
			}
		}
		for _, method := range []string{"POST", "PUT"} {
			if res, _ := b.do(method, "/rooms/a/form", ""); res.StatusCode != 405 || res.Header.Get("Allow") != "GET, HEAD, OPTIONS" {
				t.Errorf("%s of the form: %s", method, res.Status)
			}
		}
		if res, body := b.do("HEAD", "/rooms/a/form", ""); res.StatusCode != 200 || body != "" {
			t.Errorf("HEAD of the form: %s", res.Status)
		}
		if res, body := b.do("GET", "/rooms/a/form?live=javascript:", ""); res.StatusCode != 400 || !isError(body) {
			t.Errorf("live: %s", res.Status)
		}
	})
}

// A refusal says why, in JSON, and changes nothing.
func TestRefusals(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestbed(t, pipe)
		b.post("a", "before")
		names := func(n int) string {
			var rooms []string
			for i := range n {
				rooms = append(rooms, fmt.Sprint("r", i))
			}
			return strings.Join(rooms, ",")
		}
		deep := strings.Repeat("[", 65) + strings.Repeat("]", 65)
		deepObject := strings.Repeat(`{"a":`, 65) + "1" + strings.Repeat("}", 65)
		twice, asTwice := formParts("data", "x", "data", "y")
		without, asWithout := formParts("say", "x")
		latin, asLatin := formParts("data", "\xe9")
		contrary, asContrary := formParts("data", "x", "user", "bob")
		type refusal struct {
			status       int
			method, path string
			body         string
			headers      []string
		}
		var all []refusal
		get := func(status int, paths ...string) {
			for _, p := range paths {
				all = append(all, refusal{status, "GET", p, "", nil})
			}
		}
		post := func(status int, path, body string, headers ...string) {
			all = append(all, refusal{status, "POST", path, body, headers})
		}

		// Names of rooms, wherever they occur.
		for _, room := range []string{"a%2Fb", "%2F", "%2e%2e%2Fa", "a%00", "%00", "a%20b", "a+b", "a%0Ab", "%C3%A9", "%FF", "%C3%28", "a;b", "a=b", "a@b", "a*", "a~b", "%22", "%3Cb%3E", "", ",", "a,", ",a", "a,,b", "a,a", "a,b,a", strings.Repeat("x", 65), strings.Repeat("x", 10_000), "a%25", "a%252F", "a%2F..%2Fb", names(33)} {
			get(400, "/rooms/"+room+"/poll", "/rooms/"+room+"/sse", "/rooms/"+room+"/ws", "/rooms/"+room+"/presence", "/rooms/"+room+"/form")
			post(400, "/rooms/"+room, "hi")
			post(400, "/rooms/"+room+"/presence?user=ada", "online")
		}
		get(404, "/room/a/poll", "/rooms/a/b/poll", "/rooms/a/poll/", "/rooms/a/nothing", "/rooms/a//poll", "/rooms/a/POLL", "/x", "/static/index.html", "/rooms.", "/%72ooms/a/poll")
		post(400, "/rooms/a,b", "hi")
		post(400, "/rooms/a,b/presence?user=ada", "online")
		get(400, "/rooms/a,b/presence")
		post(403, "/rooms/_stats", "hi")
		post(403, "/rooms/_", "hi")
		post(403, "/rooms/_stats/presence?user=ada", "online")

		// Numbers.
		for _, n := range []string{"-1", "x", "1.5", "NaN", "Infinity", "9223372036854775808", "99999999999999999999999", "-9223372036854775809", "%2B1", "%201", "1%20", "1e3", "0x10", "1_000", "%D9%A1", "1,2", "%00", "''"} {
			get(400, "/rooms/a/poll?after="+n, "/rooms/a/poll?last="+n, "/rooms/a/longpoll?wait="+n, "/rooms/a/sse?after="+n, "/rooms/a/stream?last="+n, "/rooms/a/ws?after="+n, "/rooms/a/poll?presence="+n)
			post(400, "/rooms/a?ttl="+n, "hi")
			if v, _ := url.QueryUnescape(n); v == strings.TrimSpace(v) && v != "\x00" { // what a header can hold
				all = append(all, refusal{400, "GET", "/rooms/a/sse", "", []string{"Last-Event-ID: " + v}}, refusal{400, "GET", "/rooms/a/poll?after=0", "", []string{"Last-Event-ID: " + v}})
			}
		}
		get(400, "/rooms/a/longpoll?wait=56", "/rooms/a/jsonp?callback=f&wait=56", "/rooms/a/refresh?wait=0", "/rooms/a/refresh?wait=56", "/rooms/a/poll?last=2147483648", "/rooms/a/poll?presence=true", "/rooms/a/poll?presence=2")
		for _, ttl := range []string{"0", "86401", "9223372036854775807"} {
			post(400, "/rooms/a?ttl="+ttl, "hi")
		}

		// Parameters that are given twice or contradict each other, and malformed
		// queries.
		for _, name := range []string{"after=1", "last=1", "user=a", "presence=1"} {
			get(400, "/rooms/a/poll?"+name+"&"+name, "/rooms/a/sse?"+name+"&"+name)
		}
		get(400, "/rooms/a/longpoll?wait=1&wait=1", "/rooms/a/jsonp?callback=f&callback=f", "/rooms/a/multipart?as=json&as=text", "/rooms/a/poll?after=1&after=2", "/rooms/a/form?user=a&user=b")
		get(400, "/rooms/a/poll?after=%zz", "/rooms/a/poll?a=1;b=2", "/rooms/a/multipart?as=xml", "/rooms/a/multipart?as=JSON")
		all = append(all, refusal{400, "GET", "/rooms/a/sse", "", []string{"Last-Event-ID: 1", "Last-Event-ID: 1"}})
		for _, name := range []string{"type=x", "user=a", "key=k", "ttl=1"} {
			post(400, "/rooms/a?"+name+"&"+name, "hi")
			post(400, "/rooms/a?"+name+"&"+strings.ToUpper(name[:1])+name[1:]+"&"+name, "hi")
		}
		post(400, "/rooms/a?type=%zz", "hi")
		post(400, "/rooms/a", "hi", "Idempotency-Key: 1", "Idempotency-Key: 2")
		post(400, "/rooms/a", "data=x&ttl=0", formType)
		post(400, "/rooms/a?ttl=1", "data=x&ttl=2", formType)
		post(400, "/rooms/a", "data=x&data=x", formType)
		post(400, "/rooms/a", "data=x&user=a&user=a", formType)
		post(400, "/rooms/a?user=ada", "data=x&user=bob", formType)
		post(400, "/rooms/a?type=x", "data=x&type=y", formType)
		post(400, "/rooms/a?user=ada", contrary, asContrary)
		post(400, "/rooms/a/presence?user=ada", "state=away&user=bob", formType)
		post(400, "/rooms/a/presence?user=ada", "state=away&state=online", formType)
		post(400, "/rooms/a", twice, asTwice)
		post(400, "/rooms/a", without, asWithout)
		post(400, "/rooms/a", "data=x", "Content-Type: multipart/form-data")
		post(400, "/rooms/a", "--x", "Content-Type: multipart/form-data; boundary=x")
		post(400, "/rooms/a", "--x\r\nContent-Disposition: form-data; name=\"data\"; filename=\"f\"\r\n\r\nhi\r\n--x--\r\n", "Content-Type: multipart/form-data; boundary=x")

		// Types, users, callbacks.
		for _, kind := range append([]string{"a%20b", "a/b", "%00", "%C3%A9", "%3Cb%3E", strings.Repeat("x", 65)}, reservedTypes...) {
			post(400, "/rooms/a?type="+kind, "hi")
			post(400, "/rooms/a", "data=x&type="+kind, formType)
		}
		for _, user := range []string{"%20", "%E2%80%AEeve", "eve%E2%80%8E", "a%D8%9Cb", "%E2%81%A6x%E2%81%A9", "a%E2%80%A8b", "%20eve", "eve+", "%C2%A0eve", "%E3%80%80", "%E2%80%8B", "%EF%BB%BF", "%E3%85%A4", "%E2%A0%80", "%FF", "%C3", "%00", "a%0Ab", "%C2%85", "%7F", strings.Repeat("x", 65), strings.Repeat("%C3%A9", 65)} {
			post(400, "/rooms/a?user="+user, "hi")
			post(400, "/rooms/a", "data=x&user="+user, formType)
			post(400, "/rooms/a/presence?user="+user, "online")
			get(400, "/rooms/a/poll?user="+user, "/rooms/a/sse?user="+user, "/rooms/a/form?user="+user)
		}
		get(400, "/rooms/a/jsonp")
		for _, f := range []string{"", "1a", "a%20b", "a-b", "a..b", ".a", "a.", ".", "a.1", "a[0]", "a(", "alert(1)//", "a;b", "%C3%A9", "a%0A", "%00", "a%E2%80%A8", "<script>", "a'", "a%22", "a%5Cu0041", strings.Repeat("x", 65), strings.Repeat("a.", 32) + "b"} {
			get(400, "/rooms/a/jsonp?callback="+f)
		}

		// Bodies.
		for _, text := range []string{"\xff", "hi \xc3\x28", "\xed\xa0\x80", "\xf5\x80\x80\x80", "hi\xc3"} {
			post(400, "/rooms/a", text)
			post(400, "/rooms/a", text, textType)
			post(400, "/rooms/a", `"`+text+`"`, jsonType)
			post(400, "/rooms/a", "data="+url.QueryEscape(text), formType)
		}
		post(400, "/rooms/a", latin, asLatin)
		for _, text := range []string{"", " ", "{", "[1,]", "{'a':1}", "nul", "True", "1 2", `"a`, `"a` + "\n" + `"`, "01", "+1", ".5", "NaN", "{\"a\":1}}", "hi", deep, deepObject, strings.Repeat("[", 60_000), strings.Repeat(`{"a":`, 10_000)} {
			post(400, "/rooms/a", text, jsonType)
		}
		// JSON that other parsers refuse: half of a surrogate pair, numbers beyond a
		// double, names twice.
		for _, text := range []string{`"\ud800"`, `"\uDFFF"`, `"\ude00\ud83d"`, `"\ud800\ud800"`, `"\ud800x"`, `"\ud800\\udc00"`, `["x",{"\ud800":1}]`, "1e400", `{"n":-1e309}`, strings.Repeat("9", 400),
			`{"a":1,"a":2}`, `{"a":1,"\u0061":2}`, `[{"b":{"a":[],"c":1 , "a" : 2}}]`, `{"":1,"":1}`} {
			post(400, "/rooms/a", text, jsonType)
			post(400, "/rooms/a", text, "Content-Type: application/vnd.api+json")
			post(400, "/rooms/a/presence?user=ada", `{"state":"online","x":`+text+"}", jsonType)
		}
		post(400, "/rooms/a/presence?user=ada", `{"State":"online"}`, jsonType)
		for _, id := range []string{"-1", "x", "", "1.5", "+1", "9223372036854775808", "1&if=1"} {
			post(400, "/rooms/a?if="+id, "hi")
			post(400, "/rooms/a", "data=hi&if="+id, formType)
		}
		post(400, "/rooms/a?if=1", "data=hi&if=2", formType)
		get(400, "/rooms/a/poll?lastEventId=x", "/rooms/a/sse?Last-Event-ID=-1", "/rooms/a/poll?after=1&after=2")
		get(400, "/rooms/a/stream?as=data", "/rooms/a/poll?as=data", "/rooms/a/html?as=data", "/rooms/a/refresh?as=data", "/rooms/a/iframe?as=data", "/rooms/a/longpoll?as=data", "/rooms/a/jsonp?callback=f&as=data", "/rooms/a/multipart?as=data")
		get(400, "/rooms/a/sse?client="+strings.Repeat("x", 65), "/rooms/a/sse?client=a%20b", "/rooms/a/poll?client=a&client=b")
		post(400, "/rooms/a/presence?user=ada&client=%3Cb%3E", "online")
		post(413, "/rooms/a", strings.Repeat("x", 65_537))
		post(413, "/rooms/a", strings.Repeat(" ", 65_537), jsonType)
		post(413, "/rooms/a/presence?user=ada", strings.Repeat(" ", 65_537))
		for _, coding := range []string{"gzip", "br", "deflate", "x", "gzip, gzip"} {
			post(415, "/rooms/a", "hi", "Content-Encoding: "+coding)
			post(415, "/rooms/a/presence?user=ada", "online", "Content-Encoding: "+coding)
		}
		for _, charset := range []string{"iso-8859-1", "utf-16", "UTF-7"} {
			post(415, "/rooms/a", "hi", textType+"; charset="+charset)
			post(415, "/rooms/a", `"hi"`, jsonType+"; charset="+charset)
			post(415, "/rooms/a", "data=x", formType+"; charset="+charset)
		}
		for _, state := range []string{"", "dancing", "Online", "online offline", "{", "{}", `{"state":1}`, `{"state":"x"}`, `{"state":null}`, "\xff"} {
			post(400, "/rooms/a/presence?user=ada", state)
			post(400, "/rooms/a/presence?user=ada", state, jsonType)
		}
		post(400, "/rooms/a/presence", "online")
		post(400, "/rooms/a/presence?user=", "online")

		// Methods.
		for _, method := range []string{"PATCH", "GET", "HEAD", "FOO"} {
			all = append(all, refusal{405, method, "/rooms/a", "hi", nil})
		}
		all = append(all, refusal{403, "DELETE", "/rooms/a", "", nil}, refusal{403, "GET", "/rooms", "", nil}, refusal{405, "POST", "/rooms", "hi", nil})
		for _, method := range []string{"PUT", "DELETE", "PATCH"} {
			all = append(all, refusal{405, method, "/rooms/a/presence?user=ada", "online", nil}, refusal{405, method, "/healthz", "", nil}, refusal{405, method, "/", "", nil})
		}
		all = append(all, refusal{405, "POST", "/", "", nil}, refusal{405, "POST", "/healthz", "", nil})

		rooms := func() int {
			b.relay.mu.Lock()
			defer b.relay.mu.Unlock()
			return len(b.relay.rooms) + b.relay.maxUsers
		}
		mark, before := b.relay.lastID.Load(), rooms()
		for _, r := range all {
			res, body := b.doRaw(r.method, r.path, r.body, r.headers...)
			name := fmt.Sprintf("%s %.100s %q %.100q", r.method, r.path, r.headers, r.body)
			if res.StatusCode != r.status {
				t.Errorf("%s: %s %s, want %d", name, res.Status, body, r.status)
				continue
			}
			if r.method != "HEAD" && (!isError(body) || res.Header.Get("Content-Type") != "application/json; charset=utf-8") {
				t.Errorf("%s: %s %s, want JSON with an error", name, res.Header.Get("Content-Type"), body)
			}
			if r.status == 405 && res.Header.Get("Allow") == "" {
				t.Errorf("%s: no Allow", name)
			}
			if len(body) > 1000 {
				t.Errorf("%s: the error has %d bytes", name, len(body))
			}
			if b.relay.lastID.Load() != mark || rooms() != before {
				t.Fatalf("%s: something changed", name)
			}
		}
		t.Logf("%d refusals", len(all))
	})
}

// A ttl makes an event a signal, in the query or in a form.
func TestAnEventWithATTLIsASignal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestbed(t, pipe)
		for i, parameters := range [][]string{{"?ttl=5", "data=hi"}, {"", "data=hi&ttl=5"}, {"?ttl=5", "data=hi&ttl=5"}} {
			b.do("POST", "/rooms/a"+parameters[0], parameters[1], formType)
			v := b.relay.rooms["a"].history.Load()
			if len(v.messages.events) != 0 || len(v.signals.events) != i+1 || v.signals.events[i].expiresAt != v.signals.events[i].publishedAt+5000 {
				t.Fatalf("%q made %d messages and %d signals", parameters, len(v.messages.events), len(v.signals.events))
			}
		}
	})
}

// Values just within the bounds are accepted.
func TestWithinBounds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestbed(t, pipe)
		var rooms []string
		for i := range 32 {
			rooms = append(rooms, fmt.Sprint("r", i))
		}
		for _, path := range []string{
			"/rooms/" + strings.Join(rooms, ",") + "/poll",
			"/rooms/" + strings.Repeat("x", 64) + "/poll",
			"/rooms/a%2Cb/poll",
			"/rooms/_stats/poll",
			"/rooms/a/poll?after=0&last=0", "/rooms/a/poll?after=9223372036854775807", "/rooms/a/poll?last=2147483647", "/rooms/a/poll?after=&last=&user=&presence=",
			"/rooms/a/poll?unknown=1&unknown=2", "/rooms/a/poll?presence=0", "/rooms/a/poll?presence=1",
			"/rooms/a/longpoll?wait=0", "/rooms/a/longpoll?wait=55&after=0", "/rooms/a/refresh?wait=1", "/rooms/a/refresh?wait=55",
			"/rooms/a/jsonp?wait=0&callback=" + strings.Repeat("x", 64), "/rooms/a/jsonp?wait=0&callback=$", "/rooms/a/jsonp?wait=0&callback=_.$1.a9",
			"/rooms/a/poll?user=" + strings.Repeat("%C3%A9", 64),
		} {
			if res, body := b.doRaw("GET", path, ""); res.StatusCode != 200 {
				t.Errorf("%s: %s %s", path, res.Status, body)
			}
		}
	})
}

func TestAFrameThatIsTooBigEndsItsWebSocket(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newLimitedTestbed(t, "-body", "100")
		c, _ := b.webSocketFrom("192.0.2.1", "/rooms/a/ws")
		defer c.CloseNow()
		if err := c.Write(context.Background(), websocket.MessageText, bytes.Repeat([]byte("x"), 100)); err != nil {
			t.Fatal(err)
		}
		readWebSocketUntil(t, c, strings.Repeat("x", 100))
		c.Write(context.Background(), websocket.MessageText, bytes.Repeat([]byte("y"), 101))
		for {
			_, data, err := c.Read(context.Background())
			if err == nil && !strings.Contains(string(data), "yy") {
				continue
			}
			if websocket.CloseStatus(err) != websocket.StatusMessageTooBig {
				t.Errorf("%s %v, want the code 1009", data, err)
			}
			break
		}
	})
}

func TestAStreamEndsAtAJitteredAge(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const age = 100 * time.Second
		b := newLimitedTestbed(t, "-age", age.String(), "-beat", "15s")
		start := time.Now()
		var mu sync.Mutex
		ends := map[time.Duration]int{}
		var wg sync.WaitGroup
		ended := func(name string) {
			mu.Lock()
			defer mu.Unlock()
			d := time.Since(start)
			if ends[d]++; d < age*9/10 || d > age+b.heartbeat/15 {
				t.Errorf("%s ended after %v, want 90 to 100 s", name, d)
			}
		}
		for i := range 40 {
			tech := []string{"sse", "stream", "multipart", "iframe", "html"}[i%5]
			wg.Go(func() {
				r := b.open("192.0.2.1", "GET /rooms/a/"+tech, "")
				defer r.stop()
				if body := r.readAll(); !strings.Contains(body, `"type":"bye","data":{"retry":`) && !strings.Contains(body, "this page comes back by itself") {
					t.Errorf("%s ended without a bye:\n%s", tech, body)
				}
				ended(tech)
			})
		}
		wg.Go(func() {
			c, _ := b.webSocketFrom("192.0.2.1", "/rooms/a/ws")
			defer c.CloseNow()
			readWebSocketUntil(t, c, `"type":"bye"`)
			if _, _, err := c.Read(context.Background()); websocket.CloseStatus(err) != websocket.StatusServiceRestart {
				t.Errorf("the socket closed with %v, want the code 1012", err)
			}
			ended("ws")
		})
		wg.Wait()
		if len(ends) < 5 {
			t.Errorf("the streams ended at %v, want different times", ends)
		}
		if got := b.status("192.0.2.1", "GET /rooms/a/sse"); got != 200 {
			t.Errorf("coming back: %d", got)
		}
	})
}

func TestWithoutAnAgeAStreamLasts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newLimitedTestbed(t)
		r := b.open("192.0.2.1", "GET /rooms/a/stream", "")
		defer r.stop()
		r.readUntil("hello")
		go func() {
			time.Sleep(12 * time.Hour)
			b.ask("192.0.2.1", "POST /rooms/a", "still there?")
		}()
		r.readUntil("still there?")
	})
}

func TestOverHTTP2AStreamLasts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newLimitedTestbed(t, "-h2c")
		get := http2Client(b)
		for _, tech := range []string{"sse", "stream", "multipart", "iframe", "html"} {
			resp := get("/rooms/a/" + tech)
			r := &response{resp, t, bufio.NewReader(resp.Body), func() { resp.Body.Close() }}
			read := make(chan struct{})
			go func() {
				defer close(read)
				r.readUntil("still there?")
			}()
			time.Sleep(3 * time.Minute)
			b.ask("192.0.2.1", "POST /rooms/a", "still there?")
			<-read
			r.stop()
		}
	})
}

// BenchmarkFrame measures encoding one event into a buffer with room for it.
func BenchmarkFrame(b *testing.B) {
	r := benchRelay(b)
	events := openSubscriber(b, r, "lobby", r.lastID.Load()-r.epoch-1, subscribeRequest{}).next(nil)
	for _, t := range newTechniques() {
		b.Run(t.name, func(b *testing.B) {
			f := newTestEncoder(b, t)
			buf, sub := make([]byte, 0, 64<<10), &subscriber{cursor: 1}
			b.ReportAllocs()
			for b.Loop() {
				if len(f.encode(buf, sub, events...)) == 0 {
					b.Fatal("nothing was framed")
				}
			}
		})
	}
}

// A postRecorder takes the answers to publishes, and allocates nothing.
type postRecorder struct {
	header http.Header
	status int
}

func (w *postRecorder) Header() http.Header         { return w.header }
func (w *postRecorder) WriteHeader(status int)      { w.status = status }
func (w *postRecorder) Write(b []byte) (int, error) { return len(b), nil }

// BenchmarkPost measures a publish through all layers, without net/http's part.
func BenchmarkPost(b *testing.B) {
	a := newTestApp(b)
	r := httptest.NewRequest("POST", "/rooms/lobby?user=ada", nil)
	r.Header.Set("Content-Type", "text/plain")
	r.ContentLength = int64(len("hello, world"))
	body := strings.NewReader("")
	closer := io.NopCloser(body)
	w := &postRecorder{header: http.Header{}}
	b.ReportAllocs()
	for b.Loop() {
		body.Reset("hello, world")
		r.Body = closer
		clear(w.header)
		a.ServeHTTP(w, r)
		if w.status != http.StatusCreated {
			b.Fatal(w.status)
		}
	}
}

func TestFramingAllocatesNothing(t *testing.T) {
	r := benchRelay(t)
	publishEvent(t, r, publishRequest{room: "lobby", kind: "typing", from: "ada", ttl: time.Minute})
	events := openSubscriber(t, r, "lobby", r.lastID.Load()-r.epoch-2, subscribeRequest{}).next(nil)
	if len(events) != 2 {
		t.Fatalf("read %d events, want a message and a signal", len(events))
	}
	buf, sub := make([]byte, 0, 64<<10), &subscriber{cursor: 1}
	for _, technique := range newTechniques() {
		if technique.mode != streaming {
			continue
		}
		f := newTestEncoder(t, technique)
		for _, due := range [][]*event{events[:1], events[1:], events} {
			if n := testing.AllocsPerRun(100, func() { f.encode(buf, sub, due...) }); n > 0 {
				t.Errorf("framing %d events as %s is %v allocations, want none", len(due), technique.name, n)
			}
		}
	}
}

// A list of rooms that is accepted has 1 to 32 different names, and parses to the same
// again.
func FuzzRooms(f *testing.F) {
	for _, seed := range []string{"", "lobby", "a,b", "a,,b", "a,a", "a%2Cb", "a%2Fb", "%00", "%", "%zz", "_stats", "A-Z.a:z_09", strings.Repeat("x", 65), strings.Repeat("x,", 33), "é", "%C3%A9", "a b", "a+b"} {
		f.Add(seed)
	}
	name := regexp.MustCompile(`^[A-Za-z0-9_.:-]{1,64}$`)
	f.Fuzz(func(t *testing.T, path string) {
		rooms, err := parseRooms(path)
		if err != nil {
			if httpErr, ok := err.(httpError); !ok || httpErr.status != 400 || !utf8.ValidString(httpErr.message) || len(httpErr.message) > 1000 {
				t.Errorf("%q: %v, want an error with 400", path, err)
			}
			return
		}
		if len(rooms) < 1 || len(rooms) > 32 || len(slices.Compact(slices.Sorted(slices.Values(rooms)))) != len(rooms) {
			t.Errorf("%q: %q", path, rooms)
		}
		for _, r := range rooms {
			if !name.MatchString(r) {
				t.Errorf("%q: the room %q", path, r)
			}
		}
		if again, err := parseRooms(strings.Join(rooms, ",")); err != nil || !slices.Equal(again, rooms) {
			t.Errorf("%q: %q, and again %q %v", path, rooms, again, err)
		}
	})
}

// An accepted number has one spelling, is within its bounds, and has the value it
// says.
func FuzzNumber(f *testing.F) {
	for _, seed := range []string{"0", "1", "-1", "+1", "007", "1e3", "0x10", "1_000", " 1", "1 ", "9223372036854775807", "9223372036854775808", "-9223372036854775808", "NaN", "٣", "", "1795351418000042"} {
		f.Add(seed, int64(0), int64(1<<62))
	}
	f.Fuzz(func(t *testing.T, v string, low, high int64) {
		if v == "" {
			return // stands for an absent parameter
		}
		q := request{values: url.Values{"after": {v}}}
		n := q.intParam("after", low, high, -1)
		if err := q.err; err != nil {
			if !strings.Contains(err.Error(), "after") {
				t.Errorf("%q: %v", v, err)
			}
			return
		}
		if n < low || n > high || !regexp.MustCompile(`^-?[0-9]+$`).MatchString(v) {
			t.Errorf("%q: %d, want %d to %d", v, n, low, high)
		}
		if s := strconv.FormatInt(n, 10); s != strings.TrimPrefix(v, "-") && s != v && strings.TrimLeft(strings.TrimPrefix(v, "-"), "0") != strings.TrimLeft(strings.TrimPrefix(s, "-"), "0") {
			t.Errorf("%q is read as %d", v, n)
		}
	})
}

// Any parameters of any technique give 200, or 4xx with a JSON error.
func FuzzQuery(f *testing.F) {
	for _, seed := range []string{"", "after=1&last=2&user=ada&presence=1", "after=-1", "after=1&after=1", "callback=a.b&wait=0", "callback=alert(1)//", "as=html", "as=svg&w=80&h=80", "wait=x", "%", "a;b", "user=%ff", "last=2147483648", "token=x"} {
		for n := range uint8(3) {
			f.Add(n, seed, "")
			f.Add(n, seed, "7")
		}
	}
	s := newTestApp(f)
	s.checkAndPublish(newPermit(), publishRequest{room: "a", kind: "message", data: []byte(`"hi"`)})
	f.Fuzz(func(t *testing.T, n uint8, query, last string) {
		answers := []string{"refresh", "poll", "jsonp"}
		technique := answers[int(n)%len(answers)]
		if technique == "jsonp" {
			query += "&wait=0"
		}
		r := httptest.NewRequest("GET", "/rooms/a/"+technique, nil)
		r.URL.RawQuery = query
		if last != "" {
			r.Header.Set("Last-Event-ID", last)
		}
		w := newDeadlineRecorder()
		s.ServeHTTP(w, r)
		kind := w.Header().Get("Content-Type")
		switch body := w.Body.String(); {
		case w.Code == 303 && technique == "refresh": // a token is moved to a cookie
		case w.Code >= 400 && w.Code < 500:
			if !isError(body) {
				t.Errorf("%s?%s: %d %q", technique, query, w.Code, body)
			}
		case w.Code != 200:
			t.Errorf("%s?%s: %d %q", technique, query, w.Code, body)
		case technique == "poll":
			var answer struct {
				Cursor *int64
				Events []json.RawMessage
			}
			if json.Unmarshal([]byte(body), &answer) != nil || answer.Cursor == nil {
				t.Errorf("%s?%s: %q", technique, query, body)
			}
		case technique == "jsonp":
			if !regexp.MustCompile(`^/\*\*/[A-Za-z_$][\w$]*(\.[A-Za-z_$][\w$]*)*\(\{"cursor":\d+,"events":\[.*\]\}\);\n$`).MatchString(body) || !strings.HasPrefix(kind, "application/javascript") {
				t.Errorf("%s?%s: %q", technique, query, body)
			}
		case !strings.HasPrefix(kind, "text/html") || w.Header().Get("Refresh") == "0":
			t.Errorf("%s?%s: %s %v", technique, query, kind, w.Header())
		}
	})
}

// An accepted callback is a name in ASCII that cannot be anything else in a script.
func FuzzCallback(f *testing.F) {
	for _, seed := range []string{"f", "a.b.c", "$", "_", "$1", "1a", "", ".", "a.", ".a", "a..b", "a b", "a(", "a[0]", "é", "a\u2028", "a\x00", "alert(1)//", "</script>", strings.Repeat("x", 64), strings.Repeat("x", 65)} {
		f.Add(seed)
	}
	safe := regexp.MustCompile(`^[A-Za-z_$][A-Za-z0-9_$]*(\.[A-Za-z_$][A-Za-z0-9_$]*)*$`)
	f.Fuzz(func(t *testing.T, name string) {
		if got, want := validCallback(name), safe.MatchString(name) && len(name) <= 64; got != want {
			t.Errorf("%q: %v, want %v", name, got, want)
		}
	})
}

// A publish with any type of body is one event that can be read back, or is refused
// and changes nothing.
func FuzzPublish(f *testing.F) {
	parts, partsKind := formParts("data", "hi", "user", "ada")
	for _, seed := range []struct{ kind, query, key, body string }{
		{"text/plain", "", "", "hi </script> \u2028 <&>"},
		{"", "user=ada&type=x&key=k&ttl=5", "k", "hi"},
		{"application/json", "", "", `{"a":[1,2,{"b":"<\u2028"}]}`},
		{"application/json", "", "", strings.Repeat("[", 65)},
		{"application/json; charset=utf-16", "", "", `1`},
		{"application/x-www-form-urlencoded", "", "", "data=a%26b&user=ada&type=t&key=k&then=form"},
		{"application/x-www-form-urlencoded", "", "", "hi"},
		{"application/x-www-form-urlencoded", "", "", "data=%ff&then=refresh"},
		{strings.TrimPrefix(partsKind, "Content-Type: "), "", "", parts},
		{"multipart/form-data; boundary=x", "", "", "--x\r\nContent-Disposition: form-data; name=\"data\"\r\n\r\nhi\r\n--x--\r\n"},
		{"multipart/form-data; boundary=x", "", "", "--x\r\nContent-Disposition: form-data; name=\"data\"\r\nContent-Transfer-Encoding: base64\r\n\r\n\xff\r\n--x--\r\n"},
		{"text/plain", "type=bye", "", ""},
		{"text/plain", "user=%ff", "\x7f", "\xff"},
	} {
		f.Add(seed.kind, seed.query, seed.key, []byte(seed.body))
	}
	s := newTestApp(f)
	f.Fuzz(func(t *testing.T, kind, query, key string, body []byte) {
		r := httptest.NewRequest("POST", "/rooms/a", bytes.NewReader(body))
		r.URL.RawQuery = query
		r.Header.Set("Content-Type", kind)
		if key != "" {
			r.Header.Set("Idempotency-Key", key)
		}
		before := s.relay.lastID.Load()
		w := newDeadlineRecorder()
		s.ServeHTTP(w, r)
		published := s.relay.lastID.Load() - before
		var answer struct{ ID int64 }
		json.Unmarshal(w.Body.Bytes(), &answer)
		switch w.Code {
		case 201:
			if published != 1 || answer.ID != before+1 {
				t.Errorf("201 %s, and %d were published after %d", w.Body, published, before)
			}
		case 303:
			to, err := url.Parse(w.Header().Get("Location"))
			if err != nil || to.Host != "" || to.Scheme != "" || !slices.Contains([]string{"./a/form", "./a/refresh"}, to.Path) {
				t.Errorf("303 to %q", w.Header().Get("Location"))
			}
			if published > 1 {
				t.Errorf("303, and %d were published", published)
			}
		case 200:
			if published != 0 || answer.ID > before || answer.ID <= 0 {
				t.Errorf("200 %s, and %d were published after %d", w.Body, published, before)
			}
		default:
			if w.Code < 400 || w.Code > 499 || !isError(w.Body.String()) || published != 0 {
				t.Errorf("%d %q, and %d were published", w.Code, w.Body, published)
			}
		}
		if published != 1 {
			return
		}
		line := newestEvent(t, s, before)
		safeEvent(t, line)
		var e struct {
			ID   int64
			Room string
			Data json.RawMessage
		}
		if err := json.Unmarshal([]byte(line), &e); err != nil || e.ID != before+1 || e.Room != "a" {
			t.Errorf("it reads back as %s", line)
		}
		var text string
		if kind == "text/plain" && (json.Unmarshal(e.Data, &text) != nil || text != string(body)) {
			t.Errorf("%q became %s", body, e.Data)
		}
		if kind == "application/json" {
			var sent, got any
			json.Unmarshal(body, &sent)
			json.Unmarshal(e.Data, &got)
			if fmt.Sprint(sent) != fmt.Sprint(got) {
				t.Errorf("%s became %s", body, e.Data)
			}
		}
	})
}

// A message by WebSocket publishes one safe event, or is answered with an error and
// changes nothing.
func FuzzFrame(f *testing.F) {
	for _, seed := range []string{
		"", "hi", "{", "{}", `{"data":1}`, `{"type":"message","room":"b","data":{"a":"</script>"},"key":"k","ttl":5}`, `{"type":"presence","data":"typing"}`,
		`{"type":"bye"}`, `{"ttl":-1}`, `{"ttl":1e3}`, `{"room":null,"key":null,"ttl":null,"data":null}`, `{"TYPE":"x","Type":"y"}`, `{"data":` + strings.Repeat("[", 70), "\xff", "{\"data\":\"\xff\"}", `{"key":"` + strings.Repeat("k", 129) + `"}`,
	} {
		f.Add(true, false, []byte(seed))
		f.Add(true, true, []byte(seed))
		f.Add(false, false, []byte(seed))
	}
	f.Fuzz(func(t *testing.T, text, two bool, frame []byte) {
		synctest.Test(t, func(t *testing.T) { // no lease may end, and be announced, between two counts
			checkFrame(t, text, two, frame)
		})
	})
}

// checkFrame is one case of FuzzFrame.
func checkFrame(t *testing.T, text, two bool, frame []byte) {
	s := newTestApp(t)
	q := &author{room: "a", user: "ada", permit: newPermit()}
	if two {
		q.room = ""
	}
	kind := websocket.MessageText
	if !text {
		kind = websocket.MessageBinary
	}
	before := s.relay.lastID.Load()
	answer := s.handleMessage(q, kind, frame)
	published := s.relay.lastID.Load() - before
	if answer != nil {
		safeEvent(t, string(answer.event().json))
	}
	switch {
	case answer != nil && answer.Type == "error":
		if published != 0 {
			t.Errorf("%q: %s, and %d were published", frame, answer.event().json, published)
		}
		return
	case answer != nil && answer.Type == "ack" && answer.event().id != 0:
		if published > 1 || answer.event().id > before+1 || published == 1 && answer.event().id != before+1 {
			t.Errorf("%q: %s, and %d were published after %d", frame, answer.event().json, published, before)
		}
	case answer != nil && answer.Type != "ack":
		t.Errorf("%q: %s", frame, answer.event().json)
	}
	if !text || !utf8.Valid(frame) {
		t.Errorf("%q was accepted", frame)
	}
	if published == 0 {
		return
	}
	w := newDeadlineRecorder()
	s.ServeHTTP(w, httptest.NewRequest("GET", fmt.Sprint("/rooms/a,b/poll?presence=1&after=", before), nil))
	var all struct {
		Events []json.RawMessage
	}
	json.Unmarshal(w.Body.Bytes(), &all)
	for _, e := range all.Events {
		safeEvent(t, string(e))
		if !bytes.HasPrefix(frame, []byte("{")) {
			var parsed struct{ Data string }
			if json.Unmarshal(e, &parsed) != nil || parsed.Data != string(frame) {
				t.Errorf("%q became %s", frame, e)
			}
		}
	}
}

// safeEvent fails unless the JSON is one line that is safe in every technique.
func safeEvent(t *testing.T, line string) {
	t.Helper()
	if !json.Valid([]byte(line)) || !utf8.ValidString(line) || strings.ContainsAny(line, "<>&\n\r\u2028\u2029\x00") {
		t.Errorf("an event that is not one safe line of JSON: %q", line)
	}
}

// newestEvent returns the newest event of a room, by poll.
func newestEvent(t *testing.T, s *app, after int64) string {
	t.Helper()
	w := newDeadlineRecorder()
	s.ServeHTTP(w, httptest.NewRequest("GET", fmt.Sprint("/rooms/a,b/poll?after=", after), nil))
	var answer struct{ Events []json.RawMessage }
	if err := json.Unmarshal(w.Body.Bytes(), &answer); err != nil || len(answer.Events) != 1 {
		t.Fatalf("%v: %s, want one event", err, w.Body)
	}
	return string(answer.Events[0])
}

// No stream keeps an event that the log has dropped, whatever it shows of it.
func TestStreamsKeepNoEvents(t *testing.T) {
	for _, network := range []string{pipe, core} {
		runOnNetwork(t, network, func(t *testing.T) {
			b := newTestbed(t, network, func(c *config) { c.maxEvents = 8 })
			paths := []string{"multipart?as=svg", "multipart?as=image", "sse?as=data"}
			for _, v := range variants {
				if v.streams() && v.technique != "ws" {
					paths = append(paths, v.technique+"?"+v.query)
				}
			}
			for _, path := range paths {
				res, err := b.client.Get(b.url + "/rooms/a/" + path)
				if err != nil {
					t.Fatal(err)
				}
				defer res.Body.Close()
				go io.Copy(io.Discard, res.Body)
			}
			defer b.webSocket("a").close()
			var events []weak.Pointer[event]
			for i := range 40 {
				b.post("a", strings.Repeat("word ", 400*(i%3)))
				time.Sleep(time.Second) // all are sent it, one by one
				published := weakMessages(b.relay, "a")
				events = append(events, published[len(published)-1])
			}
			time.Sleep(time.Minute)
			if kept, small := countAlive(events), 5; kept > 8+small { // of small ones the log's array may hold some
				t.Errorf("%s: %d events are in memory; the log has 8", network, kept)
			}
		})
	}
}

// A stream keeps nothing of the request that opened it.
func TestStreamsKeepNoRequests(t *testing.T) {
	b := newTestbed(t, tcp)
	heap := func() uint64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.GC()
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	const n, size = 50, 12 << 10
	for _, path := range []string{"sse?", "html?", "multipart?as=html&", "multipart?as=image&", "ws?", "iframe?", "longpoll?presence=0&wait=55&", "jsonp?presence=0&wait=55&callback=f&"} {
		before := heap()
		for i := range n {
			conn, err := b.dial(context.Background())
			if err != nil {
				t.Fatal(err)
			}
			fmt.Fprintf(conn, "GET /rooms/a/%suser=u%d&client=c&x=%s HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n", path, i, strings.Repeat("x", size))
		}
		b.waitUntil(func() bool { return b.active() == n })
		b.settle()
		if grown := int64(heap()-before) / n; grown > size {
			t.Errorf("%s keeps %d bytes a client; its request had %d", path, grown, size)
		}
		b.disconnect()
		b.settle()
	}
}

// The README shows the loop as it is, and names functions that there are.
func TestREADME(t *testing.T) {
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	var core string
	for _, name := range []string{"relay.go", "transports.go", "presence.go"} {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		core += string(b)
	}
	_, section, _ := strings.Cut(string(readme), "## The whole relay in three files\n")
	section, _, _ = strings.Cut(section, "\nEverything else is a layer")
	_, loop, _ := strings.Cut(section, "```go\n")
	loop, _, _ = strings.Cut(loop, "```")
	if loop == "" || !strings.Contains(core, loop) {
		t.Errorf("the README shows a loop that is not in the code:\n%s", loop)
	}
	names := regexp.MustCompile("`(?:\\(\\*\\w+\\)\\.)?(\\w+)`").FindAllStringSubmatch(section, -1)
	for _, m := range names {
		if !regexp.MustCompile(`\b`+m[1]+`\b`).MatchString(core) && m[1] != "synctest" {
			t.Errorf("the README names %s, which is not in the code", m[1])
		}
	}
	if len(names) < 10 {
		t.Errorf("the README names %d functions", len(names))
	}
}
