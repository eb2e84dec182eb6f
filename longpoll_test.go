// Tests of long-polls that wait without net/http: heads that repeat the one before,
// and connections that go back and forth.

package main

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"runtime"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// A pollingClient asks on one connection.
type pollingClient struct {
	net.Conn
	t  *testing.T
	in *bufio.Reader
}

func newPollingClient(t *testing.T, b *testbed) *pollingClient {
	conn, err := b.dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return &pollingClient{conn, t, bufio.NewReader(conn)}
}

// pollHead is the head of a request; a pattern such as after=%d stands in the path.
func pollHead(path string, headers ...string) string {
	return "GET " + path + " HTTP/1.1\r\nHost: cometes.test\r\n" + strings.Join(append(headers, ""), "\r\n") + "\r\n"
}

func (c *pollingClient) send(s string) { go io.WriteString(c, s) }

// answer reads an answer.
func (c *pollingClient) answer() (*http.Response, string) {
	c.t.Helper()
	res, err := http.ReadResponse(c.in, nil)
	if err != nil {
		c.t.Fatalf("no answer: %v", err)
	}
	body, err := io.ReadAll(res.Body)
	if err != nil {
		c.t.Fatal(err)
	}
	return res, string(body)
}

// expect reads an answer that has a text in it, with status 200.
func (c *pollingClient) expect(text string) {
	c.t.Helper()
	if res, body := c.answer(); res.StatusCode != 200 || !strings.Contains(body, text) {
		c.t.Fatalf("answered %d %s, want %q", res.StatusCode, body, text)
	}
}

// expectEnd fails if the connection is not closed.
func (c *pollingClient) expectEnd() {
	c.t.Helper()
	c.SetReadDeadline(time.Now().Add(time.Minute))
	if rest, err := io.ReadAll(c.in); err != nil || len(rest) > 0 {
		c.t.Fatalf("the connection goes on with %q, %v", rest, err)
	}
}

// repeat has the client ask until net/http sees no more of it, and returns the cursor.
func (c *pollingClient) repeat(b *testbed, head string) int64 {
	for range 3 {
		c.send(fmt.Sprintf(head, b.cursor()))
		synctest.Wait()
		b.post("a", "again")
		c.expect("again")
	}
	return b.cursor()
}

// countRepeated counts the requests that net/http does not see.
func countRepeated(b *testbed) *int {
	n, counted := new(int), b.pool.received
	b.pool.received = func(t *technique, requests, bytes int) { *n += requests; counted(t, requests, bytes) }
	return n
}

const repeatedPoll = "/rooms/a/longpoll?after=%d"

func TestALongPollThatRepeatsIsHeldWithoutNetHTTP(t *testing.T) {
	for _, head := range []string{
		pollHead(repeatedPoll),
		pollHead("/rooms/a,b/longpoll?wait=5&after=%d&presence=0", "Cookie: a=1", "X-Long: "+strings.Repeat("x", 500)),
		pollHead("/rooms/a/jsonp?callback=f&after=%d"),
		pollHead("/rooms/a/longpoll?user=ada&presence=0&after=%d"),
		strings.ReplaceAll(pollHead(repeatedPoll), "\r\n", "\n"),
	} {
		synctest.Test(t, func(t *testing.T) {
			b := newTestbed(t, pipe)
			repeated := countRepeated(b)
			c := newPollingClient(t, b)
			for i := range 5 {
				c.send(fmt.Sprintf(head, b.cursor()))
				synctest.Wait()
				if n := b.active(); n != 1 {
					t.Fatalf("%q: %d requests are held at %d", head, n, i)
				}
				if i == 3 { // one that is missed for a moment
					time.Sleep(4 * time.Second)
				}
				text := fmt.Sprint("message ", i)
				b.post("a", text)
				c.expect(text)
				synctest.Wait()
				if n := b.active(); n != 0 {
					t.Fatalf("%d requests are held after the answer", n)
				}
			}
			if *repeated != 4 {
				t.Errorf("%q: %d requests were held without net/http, want all but the first of 5", head, *repeated)
			}
			name, _, _ := strings.Cut(strings.TrimPrefix(head[strings.LastIndex(head[:20], "/")+1:], "/"), "?")
			if n := b.metric(fmt.Sprintf("requests_total{technique=%q}", name)); n != 5 {
				t.Errorf("%v requests are counted, want 5", n)
			}
			if n := b.metric(fmt.Sprintf("delivered_total{technique=%q}", name)); n != 5 {
				t.Errorf("%v events are counted, want 5", n)
			}
		})
	}
}

// Between two polls the subscription stays: what was published meanwhile is answered at once.
// Who asks for another room, in words that are known, reads that one.
func TestALongPollBetweenTwoRequests(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestbed(t, pipe)
		repeated := countRepeated(b)
		heads := map[string]string{"a": pollHead("/rooms/a/longpoll?after=%d"), "b": pollHead("/rooms/b/longpoll?after=%d")}
		c := newPollingClient(t, b)
		for _, room := range []string{"b", "b", "b", "a", "a", "a"} {
			c.send(fmt.Sprintf(heads[room], b.cursor()))
			synctest.Wait()
			b.post(room, "again")
			c.expect("again")
		}
		for _, room := range []string{"a", "b", "b", "a", "a"} {
			*repeated = 0
			cursor, start := b.cursor(), time.Now()
			b.post(room, "between")
			c.send(fmt.Sprintf(heads[room], cursor))
			c.expect("between")
			if d := time.Since(start); d != 0 {
				t.Errorf("what was published between two requests is answered after %v", d)
			}
			cursor = b.cursor()
			c.send(fmt.Sprintf(heads[room], cursor))
			synctest.Wait()
			b.post("a", "for a")
			b.post("b", "for b")
			c.expect("for " + room)
			synctest.Wait()
			if n := b.subscriptions(); n != 1 || *repeated != 2 {
				t.Errorf("%d are subscribed, and %d requests were held without net/http; want 1 and 2", n, *repeated)
			}
		}
		c.Close()
		synctest.Wait()
		if n := b.subscriptions(); n != 0 {
			t.Errorf("%d are subscribed when the client has left", n)
		}
	})
}

// What differs in anything but the digits of the cursor goes to net/http, with the same
// answer as on a fresh connection.
func TestALongPollThatDiffersIsReadByNetHTTP(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestbed(t, pipe)
		b.post("a", "first")
		b.post("b", "other")
		head := pollHead("/rooms/a/longpoll?x=7&after=%d&wait=3", "X-Number: 7")
		for _, next := range []string{
			strings.Replace(head, "/rooms/a/", "/rooms/b/", 1),
			strings.Replace(head, "x=7", "x=8", 1),
			strings.Replace(head, "X-Number: 7", "X-Number: 8", 1),
			strings.Replace(head, "&wait=3", "&wait=3&after=1", 1),
			strings.Replace(head, "after=%d", "after=%d1", 1),
			strings.Replace(head, "after=%d", "after=99999999999999999999&x=%d", 1),
			strings.Replace(head, "after=%d", "after=%dx", 1),
			strings.Replace(head, "after=%d", "after=-1&x=%d", 1),
			strings.Replace(head, "after=%d", "after=&x=%d", 1),
			strings.Replace(head, "after=%d", "After=%d", 1),
			strings.Replace(head, "\r\n\r\n", "\r\nLast-Event-ID: 0\r\n\r\n", 1),
			strings.Replace(head, "GET", "HEAD", 1),
			strings.Replace(head, "GET", "get", 1),
			strings.Replace(head, "HTTP/1.1", "HTTP/1.0", 1),
			strings.ReplaceAll(head, "\r\n", "\n"),
			strings.Replace(head, "longpoll", "poll", 1),
			pollHead("/rooms/a/poll?after=%d"),
			"POST /rooms/a?x=%d HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nhi",
		} {
			c := newPollingClient(t, b)
			cursor := c.repeat(b, head)
			ask := func(c *pollingClient) (int, string, http.Header) {
				c.send(fmt.Sprintf(next, cursor))
				method, _, _ := strings.Cut(next, " ")
				res, err := http.ReadResponse(c.in, &http.Request{Method: method})
				if err != nil {
					t.Fatalf("%q: %v", next, err)
				}
				body, _ := io.ReadAll(res.Body)
				res.Header.Del("Date")
				return res.StatusCode, string(body), res.Header
			}
			status, body, header := ask(c)
			wantStatus, wantBody, wantHeader := ask(newPollingClient(t, b))
			if strings.HasPrefix(next, "POST") {
				body, wantBody = "", ""
			}
			if status != wantStatus || body != wantBody || fmt.Sprint(header) != fmt.Sprint(wantHeader) {
				t.Errorf("%q is answered\n%d %v %s, and on a fresh connection\n%d %v %s", next, status, header, body, wantStatus, wantHeader, wantBody)
			}
			c.Close()
		}
	})
}

// The answer has the headers that net/http's own has.
func TestTheHeadersOfALongPoll(t *testing.T) {
	answers := func(network string) (all []string) {
		synctest.Test(t, func(t *testing.T) {
			b := newTestbed(t, network, func(c *config) { c.origins = "https://a.example" })
			c := newPollingClient(t, b)
			for i := range 4 {
				connection := "X-Nothing: 1"
				if i == 3 {
					connection = "Connection: close"
				}
				c.send(fmt.Sprintf(pollHead(repeatedPoll, "Origin: https://a.example", connection), b.cursor()))
				synctest.Wait()
				b.post("a", "hi")
				res, body := c.answer()
				lines := strings.Split(fmt.Sprint(res.Header, res.ContentLength, res.Close, len(body)), " ")
				slices.Sort(lines)
				all = append(all, strings.Join(lines, " "))
			}
			c.expectEnd()
		})
		return all
	}
	if ours, plain := answers(pipe), answers(core); !slices.Equal(ours, plain) {
		t.Errorf("the answers are\n%s\nand net/http's\n%s", strings.Join(ours, "\n"), strings.Join(plain, "\n"))
	}
}

// A wait that is over is answered with the cursor to go on from, to the second, however
// the request came to be held.
func TestALongPollThatWaitsInVain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestbed(t, pipe)
		c := newPollingClient(t, b)
		for range 5 {
			start, cursor := time.Now(), b.cursor()
			c.send(fmt.Sprintf(pollHead(repeatedPoll+"&wait=7"), cursor))
			c.expect(fmt.Sprintf(`{"cursor":%d,"events":[]}`, cursor))
			if d := time.Since(start); d != 7*time.Second {
				t.Errorf("answered after %v", d)
			}
		}
	})
}

func TestPipelinedLongPolls(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestbed(t, pipe)
		head := pollHead(repeatedPoll + "&wait=9")
		for _, learned := range []bool{false, true} {
			c := newPollingClient(t, b)
			if learned {
				c.repeat(b, head)
			}
			cursor := b.cursor()
			one := fmt.Sprintf(head, cursor)
			c.send(one + one + pollHead("/rooms/a/poll?last=1") + one)
			time.Sleep(5 * time.Second) // less than the wait
			b.post("a", "to all")
			for range 4 {
				c.expect("to all")
			}
			cursor = b.cursor()
			one = fmt.Sprintf(head, cursor)
			start := time.Now()
			c.send(one + one)
			for range 2 { // the wait is over for one after the other
				c.expect(`"events":[]`)
			}
			if d := time.Since(start); d != 18*time.Second {
				t.Errorf("two waits of 9 s took %v", d)
			}
			c.Close()
		}
	})
}

func TestTheHeadOfALongPollInPieces(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestbed(t, pipe)
		c := newPollingClient(t, b)
		head := pollHead(repeatedPoll)
		c.repeat(b, head)
		one := fmt.Sprintf(head, b.cursor())
		for n := 1; n < len(one); n += 5 {
			one := fmt.Sprintf(head, b.cursor())
			io.WriteString(c, one[:n])
			time.Sleep(time.Second)
			c.send(one[n:])
			synctest.Wait()
			b.post("a", "hi")
			c.expect("hi")
		}
	})
}

// A head that comes after a long-poll, in pieces, takes no place in net/http before it is whole.
func TestAHeadAfterALongPollWaitsForItsRest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newLimitedTestbed(t)
		conn, err := b.dialFrom("192.0.2.1")
		if err != nil {
			t.Fatal(err)
		}
		c := &pollingClient{conn, t, bufio.NewReader(conn)}
		c.send(pollHead("/rooms/a/longpoll?wait=1"))
		c.expect(`"events":[]`)
		c.send("GET /rooms/a/poll HTTP/1.1\r\nX: " + strings.Repeat("x", 10_000))
		if held := b.held(); strings.HasPrefix(held, "0 bytes") || !strings.Contains(held, " 0 connections served, 0 streams") {
			t.Errorf("there are %s", held)
		}
		c.send("\r\nHost: x\r\n\r\n")
		c.expect(`"events":[]`)
		c.Close()
		time.Sleep(time.Second)
		if after := b.held(); after != nothingHeld {
			t.Errorf("at the end there are %s", after)
		}
	})
}

// A client that leaves while it waits, or between two requests, leaves nothing behind.
func TestALongPollWhoseClientLeaves(t *testing.T) {
	for _, network := range []string{pipe, tcp} {
		runOnNetwork(t, network, func(t *testing.T) {
			b := newTestbed(t, network)
			b.settle()
			for _, asked := range []int{0, 1, 2, 3, 4} {
				c := newPollingClient(t, b)
				for i := range asked {
					c.send(fmt.Sprintf(pollHead(repeatedPoll), b.cursor()))
					b.waitUntil(func() bool { return b.active() == 1 && b.subscriptions() == 1 })
					if i == asked-1 && asked%2 == 0 {
						break // leaves while it waits
					}
					b.post("a", "hi")
					c.expect("hi")
				}
				c.Close()
				b.client.CloseIdleConnections()
				if !b.waitUntil(func() bool {
					b.pool.mu.Lock()
					defer b.pool.mu.Unlock()
					return b.active() == 0 && b.subscriptions() == 0 && len(b.pool.sessions) == 0 && waitingReaders() == 0
				}) {
					t.Errorf("after %d requests: %d are held, %d subscribed, %d sessions, %d goroutines that read", asked, b.active(), b.subscriptions(), len(b.pool.sessions), waitingReaders())
				}
			}
		})
	}
}

// waitingReaders is how many goroutines wait for what clients of long-polls send.
func waitingReaders() int {
	stacks := make([]byte, 1<<20)
	return bytes.Count(stacks[:runtime.Stack(stacks, true)], []byte(".readRequests("))
}

func TestALongPollsConnectionIsClosedWhenIdle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestbed(t, pipe)
		for _, asked := range []int{1, 2, 5} {
			c := newPollingClient(t, b)
			for range asked {
				c.send(fmt.Sprintf(pollHead(repeatedPoll), b.cursor()))
				synctest.Wait()
				b.post("a", "hi")
				c.expect("hi")
			}
			start := time.Now()
			c.SetReadDeadline(start.Add(time.Hour))
			if _, err := c.in.ReadByte(); err != io.EOF || time.Since(start) != idleTimeout {
				t.Errorf("after %d requests: %v after %v", asked, err, time.Since(start))
			}
			c.Close()
		}
	})
}

// When the relay stops, those who wait are answered, and idle connections close.
func TestLongPollsWhenTheRelayStops(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestbed(t, pipe)
		head := pollHead(repeatedPoll)
		waiting, idle, fresh := newPollingClient(t, b), newPollingClient(t, b), newPollingClient(t, b)
		for _, c := range []*pollingClient{waiting, idle} {
			c.repeat(b, head)
		}
		cursor := b.cursor()
		for _, c := range []*pollingClient{waiting, fresh} {
			c.send(fmt.Sprintf(head, cursor))
		}
		synctest.Wait()
		start := time.Now()
		b.stop()
		for _, c := range []*pollingClient{waiting, fresh} {
			res, body := c.answer()
			if !res.Close || !strings.Contains(body, fmt.Sprintf(`"cursor":%d`, cursor)) {
				t.Errorf("answered %s, close: %v", body, res.Close)
			}
			c.expectEnd()
		}
		idle.expectEnd()
		if err := <-b.served; err != nil || time.Since(start) > stopTimeout {
			t.Errorf("stopped after %v: %v", time.Since(start), err)
		}
		b.served <- nil
	})
}

// A token that has expired, and a limit that is met, are found when a request repeats
// the one before.
func TestALongPollThatMayNotRepeat(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestbed(t, pipe, func(c *config) { c.secret, c.streams = firstSecret, 1 })
		write := "Authorization: Bearer " + signedToken(`{"read":["*"],"write":["*"]}`)
		post := func() { b.do("POST", "/rooms/a", "hi", write) }
		repeated := countRepeated(b)
		token := "Authorization: Bearer " + signedToken(`{"read":["a"],"exp":`+unixIn(20*time.Second)+`}`)
		c := newPollingClient(t, b)
		ask := func() { c.send(fmt.Sprintf(pollHead(repeatedPoll, token), b.relay.lastID.Load())); synctest.Wait() }
		for range 4 {
			ask()
			post()
			c.expect("hi")
		}
		synctest.Wait() // its place is free again
		other := newPollingClient(t, b)
		other.send(pollHead("/rooms/a/longpoll", token))
		synctest.Wait()
		ask()
		if res, body := c.answer(); res.StatusCode != 503 || res.Header.Get("Retry-After") == "" {
			t.Errorf("beyond -streams: %d %s", res.StatusCode, body)
		}
		other.Close()
		synctest.Wait()
		for range 3 {
			ask()
			post()
			c.expect("hi")
		}
		if *repeated < 3 {
			t.Errorf("%d requests were held without net/http", *repeated)
		}
		ask()
		c.expect(`"events":[]`) // when the token expires
		ask()
		if res, body := c.answer(); res.StatusCode != 401 {
			t.Errorf("with an expired token: %d %s", res.StatusCode, body)
		}
	})
}

// An answer that a full socket does not take at once arrives whole, and the next request
// is held. A client that takes nothing is dropped.
func TestALongPollWithAFullSocket(t *testing.T) {
	for _, network := range []string{pipe, tcp} {
		runOnNetwork(t, network, func(t *testing.T) {
			b := newTestbed(t, network, func(c *config) { c.body, c.maxRoomBytes = 2<<20, 3<<20 })
			head := pollHead(repeatedPoll)
			c := newPollingClient(t, b)
			for range 3 {
				c.send(fmt.Sprintf(head, b.cursor()))
				b.waitUntil(func() bool { return b.subscriptions() == 1 })
				big := strings.Repeat("x", 1<<20)
				b.post("a", big)
				c.expect(big)
			}
			if network == tcp {
				return
			}
			c.send(fmt.Sprintf(head, b.cursor()))
			synctest.Wait()
			b.post("a", "nobody reads this")
			time.Sleep(writeTimeout + time.Second)
			if n, unsent := b.active(), b.limiter.unsentBytes.Load(); n != 0 || unsent != 0 || len(b.pool.sessions) != 0 {
				t.Errorf("%d are held, %d bytes unsent", n, unsent)
			}
		})
	}
}

// A head that counts as the repetition of another asks the same, after another cursor.
func FuzzRepeatedHead(f *testing.F) {
	for _, path := range []string{"/rooms/a/longpoll?after=1", "/rooms/a/longpoll?x=1&after=22&y=3", "/rooms/a/longpoll?x=1?after=2&after=3", "/a?%61fter=1&after=7", "/a?after=1#&after=2", "http://h/a?after=1"} {
		head := pollHead(path)
		f.Add(head, strings.Replace(head, "after=", "after=1", 1))
		f.Add(strings.ReplaceAll(head, "\r\n", "\n"), head)
	}
	f.Fuzz(func(t *testing.T, first, second string) {
		read := func(s string) (*http.Request, url.Values) {
			in := bufio.NewReader(strings.NewReader(s))
			r, err := http.ReadRequest(in)
			if err != nil || in.Buffered() > 0 || r.ContentLength != 0 {
				return nil, nil
			}
			values, err := url.ParseQuery(r.URL.RawQuery)
			if err != nil || len(values["after"]) != 1 {
				return nil, nil
			}
			return r, values
		}
		r, values := read(first)
		if r == nil {
			return
		}
		pool := &writerPool{trustProxy: true} // so a head is compared with the last alone
		p := pool.questionOf(&stream{}, r, &request{values: values, permit: newPermit()}, http.Header{}, []byte(first))
		if p.before == "" {
			return
		}
		for _, head := range []string{first, second} {
			same, cursor := pool.known(p, []byte(head))
			ok := same != nil
			if head == first && !ok && len(values.Get("after")) <= maxCursorDigits {
				t.Fatalf("%q does not repeat itself", first)
			}
			if !ok {
				continue
			}
			again, now := read(head)
			q := &request{values: now}
			if again == nil || q.intParam("after", 0, 1<<62, -1) != cursor {
				t.Fatalf("%q repeats %q with the cursor %d", head, first, cursor)
			}
			values.Del("after")
			now.Del("after")
			if again.Method != r.Method || again.URL.Path != r.URL.Path || again.Proto != r.Proto || fmt.Sprint(again.Header, again.Host, now) != fmt.Sprint(r.Header, r.Host, values) {
				t.Fatalf("%q does not repeat %q", head, first)
			}
		}
	})
}

// Whose words somebody else has used is held without net/http from its second request
// on; not so behind a proxy, which may speak for several clients on one connection.
func TestALongPollInTheWordsOfAnother(t *testing.T) {
	for _, proxy := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			b := newTestbed(t, pipe, func(c *config) { c.trustProxy, c.secret = proxy, firstSecret })
			repeated := countRepeated(b)
			token := "Authorization: Bearer " + signedToken(`{"read":["a"],"write":["a"]}`)
			ask := func(c *pollingClient, head string) {
				c.send(fmt.Sprintf(head, b.relay.lastID.Load()))
				synctest.Wait()
				b.do("POST", "/rooms/a", "hi", token)
				c.expect("hi")
			}
			for i := range 4 {
				c := newPollingClient(t, b)
				*repeated = 0
				ask(c, pollHead(repeatedPoll, "X-First: 1", token))
				ask(c, pollHead(repeatedPoll, token))
				ask(c, pollHead(repeatedPoll, token))
				if want := map[bool]int{true: 2, false: 1}[i > 0 && !proxy]; *repeated != want {
					t.Errorf("connection %d, proxy %v: %d requests were held without net/http, want %d", i, proxy, *repeated, want)
				}
				c.send(fmt.Sprintf(pollHead(repeatedPoll), b.relay.lastID.Load())) // without the token
				if res, body := c.answer(); res.StatusCode != 401 {
					t.Errorf("without a token: %d %s", res.StatusCode, body)
				}
				c.Close()
			}
		})
	}
}
