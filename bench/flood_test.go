//go:build linux

// Floods. A relay in a process of its own, on loopback, and next to every flood honest
// clients that must not notice it.

package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/coder/websocket"
)

func TestOutOfDescriptorsTheRelayAnswers503AndDoesNotSpin(t *testing.T) {
	c := startRelay(t, []string{"COMETES_TEST_NOFILE=48"})
	before := c.descriptors()
	var mu sync.Mutex
	var conns []net.Conn
	answers := map[string]int{}
	ask := func() {
		conn, err := net.Dial("tcp", c.addr)
		if err != nil {
			t.Error(err)
			return
		}
		io.WriteString(conn, "GET /rooms/a/stream HTTP/1.1\r\nHost: x\r\n\r\n")
		conn.SetReadDeadline(time.Now().Add(5 * time.Second))
		b := make([]byte, 1024)
		n, err := conn.Read(b)
		first, rest, _ := strings.Cut(string(b[:n]), "\r\n")
		if strings.Contains(first, "503") && !strings.Contains(rest, "Retry-After: ") {
			t.Errorf("refused without Retry-After: %s", b[:n])
		}
		if n == 0 {
			first = err.Error()
			if strings.Contains(first, "reset") { // it was closed with our request unread
				first = "reset"
			}
		}
		mu.Lock()
		defer mu.Unlock()
		answers[first]++
		conns = append(conns, conn)
	}
	for range 200 {
		ask()
	}
	t.Log(answers)
	if n := answers["HTTP/1.1 200 OK"]; n < 20 || n > 48 {
		t.Errorf("%d streams with 48 descriptors: %v", n, answers)
	}
	// The refusal is sent before the connection is closed, but the kernel discards it
	// if the client has sent something that was not read. For most clients that is not
	// so.
	if n := answers["HTTP/1.1 503 Service Unavailable"]; n < 100 {
		t.Errorf("%d of 200 had an answer: %v", n, answers)
	}
	if n := answers["HTTP/1.1 200 OK"] + answers["HTTP/1.1 503 Service Unavailable"] + answers["reset"]; n != 200 {
		t.Errorf("some had no end: %v", answers)
	}

	// Many connect at once while there is no descriptor.
	start := c.cpu()
	var wg sync.WaitGroup
	for range 300 {
		wg.Go(ask)
	}
	wg.Wait()
	time.Sleep(500 * time.Millisecond)
	if d := c.cpu() - start; d > 400*time.Millisecond {
		t.Errorf("it used %v of processor time to refuse 300", d)
	}
	for _, conn := range conns {
		conn.Close()
	}
	eventually(t, 3*time.Second, "recovered", func() bool { status, _, _ := c.get("/healthz"); return status == 200 })
	if n := c.refusals("descriptors"); n < 400 || n > 500 {
		t.Errorf("%d refusals are counted under descriptors, want all but those accepted of 500", n)
	}
	eventually(t, 3*time.Second, "the descriptors are given back", func() bool { return c.descriptors() <= before+3 })
	if err := c.stop(); err != nil {
		t.Errorf("it ended with %v:\n%s", err, c.log)
	}
}

// Honest clients: one that publishes fifty times a second, and readers that must
// receive every message, in order, once.

type honest struct {
	c         *child
	stop      chan struct{}
	publisher sync.WaitGroup
	readers   sync.WaitGroup
	end       context.CancelFunc

	mu        sync.Mutex // guards what follows
	published []int64
	at        map[int64]time.Time
	read      map[string][]int64 // by technique
	slowest   time.Duration      // from the answer to a publish to its delivery
	failed    []string
}

var honestEvent = regexp.MustCompile(`\{"id":(\d+),"room":"honest","type":"message"`)

// honestClients starts n readers of each kind, and a publisher, each at an address of
// its own.
func honestClients(c *child, kinds ...string) *honest {
	ctx, end := context.WithCancel(context.Background())
	h := &honest{c: c, stop: make(chan struct{}), end: end, at: map[int64]time.Time{}, read: map[string][]int64{}}
	var ready sync.WaitGroup
	for i, kind := range kinds {
		ready.Add(1)
		started := sync.OnceFunc(ready.Done)
		h.readers.Go(func() {
			defer started()
			if err := h.reader(ctx, kind, fmt.Sprintf("198.51.100.%d", i+1), started); err != nil && ctx.Err() == nil {
				h.fail("%s: %v", kind, err)
			}
		})
	}
	ready.Wait()
	first := make(chan struct{})
	started := sync.OnceFunc(func() { close(first) })
	h.publisher.Go(func() {
		defer started()
		client := &http.Client{Transport: &http.Transport{}, Timeout: 5 * time.Second}
		for n := 0; ; n++ {
			select {
			case <-h.stop:
				client.CloseIdleConnections()
				return
			case <-time.After(20 * time.Millisecond):
			}
			r, _ := http.NewRequest("POST", "http://"+c.addr+"/rooms/honest", strings.NewReader(strconv.Itoa(n)))
			r.Header.Set("X-Forwarded-For", "198.51.100.100")
			resp, err := client.Do(r)
			if err != nil {
				h.fail("publishing: %v", err)
				return
			}
			b, _ := io.ReadAll(resp.Body)
			resp.Body.Close()
			var answer struct{ ID int64 }
			if json.Unmarshal(b, &answer); resp.StatusCode != 201 {
				h.fail("publishing: %s %s", resp.Status, b)
				continue
			}
			h.mu.Lock()
			h.published = append(h.published, answer.ID)
			if _, early := h.at[answer.ID]; !early {
				h.at[answer.ID] = time.Now()
			}
			h.mu.Unlock()
			started()
		}
	})
	<-first
	return h
}

func (h *honest) fail(format string, args ...any) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.failed) < 5 {
		h.failed = append(h.failed, fmt.Sprintf(format, args...))
	}
}

// got records the events in a text.
func (h *honest) got(kind string, text []byte) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, m := range honestEvent.FindAllSubmatch(text, -1) {
		id, _ := strconv.ParseInt(string(m[1]), 10, 64)
		h.read[kind] = append(h.read[kind], id)
		if at, ok := h.at[id]; ok {
			h.slowest = max(h.slowest, time.Since(at))
		} else {
			h.at[id] = time.Now()
		}
	}
}

// reader reads by one technique until ctx is done.
func (h *honest) reader(ctx context.Context, kind, from string, started func()) error {
	client := &http.Client{Transport: &http.Transport{}}
	defer client.CloseIdleConnections()
	url := "http://" + h.c.addr + "/rooms/honest/" + kind
	if kind == "ws" {
		conn, _, err := websocket.Dial(ctx, url, &websocket.DialOptions{HTTPClient: client, HTTPHeader: http.Header{"X-Forwarded-For": {from}}})
		if err != nil {
			return err
		}
		defer conn.CloseNow()
		for {
			_, b, err := conn.Read(ctx)
			if err != nil {
				return err
			}
			started()
			h.got(kind, b)
		}
	}
	ask := func(query string) (*http.Response, error) {
		r, _ := http.NewRequestWithContext(ctx, "GET", url+query, nil)
		r.Header.Set("X-Forwarded-For", from)
		for {
			resp, err := client.Do(r)
			if err != nil || resp.StatusCode == 200 {
				return resp, err
			}
			io.Copy(io.Discard, resp.Body) // keeps the connection: a new one might not be accepted
			resp.Body.Close()
			if kind != "longpoll" || resp.Header.Get("Retry-After") == "" {
				return nil, fmt.Errorf("answered %s", resp.Status)
			}
			time.Sleep(50 * time.Millisecond) // between two polls another client may take its place
		}
	}
	if kind == "poll" || kind == "longpoll" {
		query := "?wait=0"
		for {
			resp, err := ask(query)
			if err != nil {
				return err
			}
			b, err := io.ReadAll(resp.Body)
			resp.Body.Close()
			if err != nil {
				return err
			}
			started()
			h.got(kind, b)
			var answer struct{ Cursor int64 }
			if err := json.Unmarshal(b, &answer); err != nil {
				return err
			}
			query = fmt.Sprintf("?wait=5&after=%d", answer.Cursor)
			if kind == "poll" {
				time.Sleep(100 * time.Millisecond)
			}
		}
	}
	resp, err := ask("")
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	for lines := bufio.NewReader(resp.Body); ; started() {
		b, err := lines.ReadSlice('\n')
		if err != nil {
			return err
		}
		h.got(kind, b)
	}
}

// finish stops publishing, and checks that every reader has everything.
func (h *honest) finish(t *testing.T) {
	t.Helper()
	close(h.stop)
	h.publisher.Wait()
	all := func() bool {
		h.mu.Lock()
		defer h.mu.Unlock()
		for _, ids := range h.read {
			if !slices.Equal(ids, h.published) {
				return false
			}
		}
		return true
	}
	for end := time.Now().Add(3 * time.Second); !all() && time.Now().Before(end); {
		time.Sleep(10 * time.Millisecond)
	}
	h.end()
	h.readers.Wait()
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, wrong := range h.failed {
		t.Errorf("an honest client: %s", wrong)
	}
	for kind, ids := range h.read {
		if !slices.Equal(ids, h.published) {
			t.Errorf("of %d messages the honest reader by %s has %d; or in another order", len(h.published), kind, len(ids))
		}
	}
	if h.slowest > 2*time.Second {
		t.Errorf("an honest client waited for a message for %v", h.slowest)
	}
	t.Logf("honest clients: %d messages, the slowest after %v", len(h.published), h.slowest.Round(time.Millisecond))
}

// Floods.

type floodTest struct {
	t    *testing.T
	c    *child
	over chan struct{} // closed when the flood has lasted long enough
	wg   sync.WaitGroup

	mu      sync.Mutex // guards what follows
	conns   []net.Conn
	answers map[string]int // first lines of answers, counted
}

// floodFrom returns the address of the attacker's i-th machine.
func floodFrom(i int) string { return fmt.Sprintf("10.%d.%d.%d", i>>16&255, i>>8&255, i&255) }

// each calls do for 0 to n-1 concurrently.
func (f *floodTest) each(n int, do func(i int)) {
	for i := range n {
		f.wg.Go(func() { do(i) })
	}
}

func (f *floodTest) isOver() bool {
	select {
	case <-f.over:
		return true
	default:
		return false
	}
}

// dial connects with small buffers, so that what is not read stays with the relay.
func (f *floodTest) dial() net.Conn {
	d := net.Dialer{Timeout: 5 * time.Second, Control: func(_, _ string, raw syscall.RawConn) error {
		return raw.Control(func(fd uintptr) { syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVBUF, 4096) })
	}}
	conn, err := d.Dial("tcp", f.c.addr)
	if err != nil {
		f.count(fmt.Sprintf("%.30v", err))
		return nil
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.conns = append(f.conns, conn)
	return conn
}

func (f *floodTest) count(what string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.answers[what]++
}

// request writes a request from an address and counts the answer's first line.
func (f *floodTest) request(from, request, headers, body string) net.Conn {
	conn := f.dial()
	if conn == nil {
		return nil
	}
	fmt.Fprintf(conn, "%s HTTP/1.1\r\nHost: x\r\nX-Forwarded-For: %s\r\n%s\r\n%s", request, from, headers, body)
	return conn
}

// sendSlowly sends bytes at intervals, until the flood or the connection is over.
func (f *floodTest) sendSlowly(conn net.Conn, every time.Duration, bytes int) {
	for conn != nil && !f.isOver() {
		time.Sleep(every)
		if _, err := conn.Write([]byte(strings.Repeat("x", bytes))); err != nil {
			return
		}
	}
}

// readFirst reads and counts the first line of an answer.
func (f *floodTest) readFirst(conn net.Conn) string {
	conn.SetReadDeadline(time.Now().Add(3 * time.Second))
	b := make([]byte, 32)
	n, err := io.ReadFull(conn, b)
	line, _, _ := strings.Cut(string(b[:n]), "\r\n")
	if n == 0 {
		line = fmt.Sprintf("%.60v", err)
	}
	if _, status, ok := strings.Cut(line, " "); ok && strings.HasPrefix(line, "HTTP/1.1 ") {
		line = status
	}
	f.count(line)
	return line
}

// posts publishes from many addresses, one connection each, as fast as possible.
func (f *floodTest) posts(workers int, request func(worker, n int) (path, body string)) {
	f.each(workers, func(worker int) {
		client := &http.Client{Transport: &http.Transport{}, Timeout: 5 * time.Second}
		defer client.CloseIdleConnections()
		for n := 0; !f.isOver(); n++ {
			path, body := request(worker, n)
			r, _ := http.NewRequest("POST", "http://"+f.c.addr+path, strings.NewReader(body))
			r.Header.Set("X-Forwarded-For", floodFrom(worker*1000+n%1000))
			resp, err := client.Do(r)
			if err != nil {
				f.count(fmt.Sprintf("%.60v", err))
				return
			}
			io.Copy(io.Discard, resp.Body)
			resp.Body.Close()
			f.count(resp.Status)
		}
	})
}

const (
	floodFor     = 1500 * time.Millisecond
	floodStreams = 600 // -streams of the relay, whose listener accepts 100 more, and closes up to 100 slowly
)

var floods = []struct {
	name       string
	run        func(f *floodTest)
	refused    string // the reason that is counted
	full       bool   // no new client is accepted while it lasts
	kept       int    // MB that the relay may need beside its normal need
	expected   string // some answers begin with it
	unexpected string // and none begins with this
}{
	{"connections that send nothing", func(f *floodTest) {
		f.each(1500, func(int) { f.dial() })
	}, "connections", true, 60, "", ""},

	{"slow heads", func(f *floodTest) {
		f.each(1500, func(i int) {
			f.sendSlowly(f.request(floodFrom(i), "GET /rooms/a/sse", "X-Slow: ", ""), 100*time.Millisecond, 1)
		})
	}, "connections", true, 60, "", ""},

	{"slow bodies", func(f *floodTest) {
		f.each(400, func(i int) {
			f.sendSlowly(f.request(floodFrom(i), "POST /rooms/a", "Content-Length: 60000\r\n", "x"), 50*time.Millisecond, 100)
		})
	}, "", false, 60, "", ""},

	{"streams that close their half", func(f *floodTest) {
		f.each(4, func(worker int) {
			for i := 0; !f.isOver(); i++ {
				if conn := f.request(floodFrom(worker<<16+i), "GET /rooms/a/stream", "", ""); conn != nil {
					conn.(*net.TCPConn).CloseWrite()
					f.readFirst(conn)
					conn.Close()
				}
			}
		})
	}, "", false, 60, "", "503 Service Unavailable"}, // a client that left has no place any more

	{"slow readers", func(f *floodTest) {
		f.each(400, func(i int) {
			if conn := f.request(floodFrom(i), "GET /rooms/big/"+[]string{"sse", "stream", "html", "iframe"}[i%4], "", ""); conn != nil {
				f.readFirst(conn)
			}
		})
		time.Sleep(floodFor / 4)
		f.posts(2, func(int, int) (string, string) { return "/rooms/big", strings.Repeat("x", 64<<10) })
	}, "", false, 60, "", ""},

	{"streams in all", func(f *floodTest) {
		f.each(1200, func(i int) {
			if conn := f.request(floodFrom(i), "GET /rooms/a/stream", "", ""); conn != nil {
				f.readFirst(conn)
			}
		})
	}, "streams", true, 60, "", ""},

	{"streams of one address", func(f *floodTest) {
		f.each(300, func(i int) {
			if conn := f.request("192.0.2.1", "GET /rooms/a/sse", "", ""); conn != nil {
				f.readFirst(conn)
			}
		})
	}, "address", false, 60, "", ""},

	{"rooms", func(f *floodTest) {
		f.posts(8, func(worker, n int) (string, string) { return fmt.Sprintf("/rooms/r%d-%d", worker, n), "hi" })
	}, "rooms", false, 60, "", ""},

	{"rooms that are only read", func(f *floodTest) {
		f.each(400, func(i int) {
			var rooms []string
			for n := range 32 {
				rooms = append(rooms, fmt.Sprintf("%060d-%d", i, n))
			}
			if conn := f.request(floodFrom(i), "GET /rooms/"+strings.Join(rooms, ",")+"/stream", "", ""); conn != nil {
				f.readFirst(conn)
			}
		})
	}, "", false, 60, "", ""},

	{"users", func(f *floodTest) {
		f.posts(8, func(worker, n int) (string, string) {
			return fmt.Sprintf("/rooms/a/presence?user=%064d", worker<<24+n), "online"
		})
	}, "users", false, 60, "", ""},

	{"keys", func(f *floodTest) {
		f.posts(8, func(worker, n int) (string, string) {
			return fmt.Sprintf("/rooms/k%d?key=%0128d", n%100, worker<<24+n), "hi"
		})
	}, "", false, 60, "", ""},

	{"publishes of one address", func(f *floodTest) {
		f.each(8, func(int) {
			client := &http.Client{Transport: &http.Transport{}, Timeout: 5 * time.Second}
			defer client.CloseIdleConnections()
			for !f.isOver() {
				r, _ := http.NewRequest("POST", "http://"+f.c.addr+"/rooms/a", strings.NewReader(strings.Repeat("x", 10000)))
				r.Header.Set("X-Forwarded-For", "192.0.2.1")
				if resp, err := client.Do(r); err == nil {
					resp.Body.Close()
					f.count(resp.Status)
				}
			}
		})
	}, "rate", false, 60, "", ""},

	{"WebSockets that do nothing", func(f *floodTest) {
		f.each(1200, func(i int) {
			if conn := f.request(floodFrom(i), "GET /rooms/a/ws", webSocketHead, ""); conn != nil {
				f.readFirst(conn)
			}
		})
	}, "streams", true, 60, "", ""},

	{"pings, and pongs that are not read", func(f *floodTest) {
		f.each(50, func(i int) {
			for !f.isOver() {
				conn := f.request(floodFrom(i), "GET /rooms/a/ws", webSocketHead, "")
				if conn == nil {
					return
				}
				pings := bytes.Repeat(maskedFrame(9, strings.Repeat("p", 125)), 100)
				conn.SetWriteDeadline(time.Now().Add(floodFor + time.Second/2))
				for !f.isOver() {
					if _, err := conn.Write(pings); err != nil {
						if !f.isOver() {
							f.count("cut off")
						}
						break
					}
				}
				conn.Close()
			}
		})
	}, "", false, 60, "cut off", ""},

	{"frames too many and too long", func(f *floodTest) {
		f.each(20, func(i int) {
			for n := 0; !f.isOver(); n++ {
				conn := f.request(floodFrom(i), "GET /rooms/a/ws", webSocketHead, "")
				if conn == nil {
					return
				}
				go io.Copy(io.Discard, conn)
				conn.SetWriteDeadline(time.Now().Add(floodFor + time.Second/2))
				frame := maskedFrame(1, strings.Repeat("x", 1000))
				if n%2 == 1 { // begins a message that never ends
					frame[0] &^= 0x80
				}
				for !f.isOver() {
					if _, err := conn.Write(frame); err != nil {
						if !f.isOver() {
							f.count("cut off")
						}
						break
					}
					frame[0] &^= byte(n % 2) // continues it
				}
				conn.Close()
			}
		})
	}, "rate", false, 60, "cut off", ""},
}

func TestAClientThatReadsNothingCostsLittle(t *testing.T) {
	if testing.Short() {
		t.Skip("takes 2 s")
	}
	const readers = 200
	for _, tc := range []struct{ name, body string }{
		{"of text", strings.Repeat("x", 64<<10)},
		{"of what JSON makes six times as long", strings.Repeat("<", 64<<10)},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := startRelay(t, nil)
			before := c.metric("memory_bytes")
			f := &floodTest{t: t, c: c, over: make(chan struct{}), answers: map[string]int{}}
			for range readers {
				if conn := f.request("", "GET /rooms/big/stream", "", ""); conn != nil {
					defer conn.Close()
					f.readFirst(conn)
				}
			}
			for range 80 {
				resp, err := c.http.Post("http://"+c.addr+"/rooms/big", "text/plain", strings.NewReader(tc.body))
				if err != nil {
					t.Fatal(err)
				}
				resp.Body.Close()
			}
			time.Sleep(500 * time.Millisecond)
			ours, kernels := (c.metric("memory_bytes")-before)/readers/1e3, float64(c.unsent())/readers/1e3
			t.Logf("of each the relay keeps %.0f KB, and the kernel %.0f KB", ours, kernels)
			if ours+kernels > 400 {
				t.Errorf("that is too much")
			}
		})
	}
}

func TestHonestClientsNoticeNoFloodAndAllMemoryIsReleasedAfterwards(t *testing.T) {
	if testing.Short() {
		t.Skip("takes 40 s")
	}
	c := startRelay(t, nil, "-trust-proxy", "-streams", strconv.Itoa(floodStreams), "-per-addr", "100", "-rate", "100",
		"-rooms", "1000", "-users", "1000", "-idle", "1s", "-present", "1s", "-beat", "1s")
	memory := func() float64 {
		c.cmd.Process.Signal(syscall.SIGUSR1) // collect garbage
		time.Sleep(50 * time.Millisecond)
		return c.metric("memory_bytes") / 1e6
	}
	warm := honestClients(c, "sse", "ws", "longpoll")
	time.Sleep(200 * time.Millisecond)
	warm.finish(t)
	start, descriptors := memory(), c.descriptors()
	for _, fl := range floods {
		t.Run(fl.name, func(t *testing.T) {
			h := honestClients(c, "sse", "stream", "multipart", "ws", "longpoll", "poll")
			before := 0
			if fl.refused != "" {
				before = c.refusals(fl.refused)
			}
			f := &floodTest{t: t, c: c, over: make(chan struct{}), answers: map[string]int{}}
			began := time.Now()
			go func() { time.Sleep(floodFor); close(f.over) }()
			fl.run(f)
			peak, most := 0.0, 0
			for !f.isOver() {
				time.Sleep(floodFor / 10)
				peak, most = max(peak, c.metric("memory_bytes")/1e6), max(most, c.descriptors())
				if fl.full {
					continue
				}
				// A new client connects.
				client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 2 * time.Second}
				r, _ := http.NewRequest("GET", "http://"+c.addr+"/rooms/honest/poll", nil)
				r.Header.Set("X-Forwarded-For", "198.51.100.200")
				resp, err := client.Do(r)
				if err != nil {
					t.Errorf("a new client: %v", err)
					continue
				}
				resp.Body.Close()
				if resp.StatusCode != 200 {
					t.Errorf("a new client: %s", resp.Status)
				}
			}
			f.wg.Wait()
			for _, conn := range f.conns {
				conn.Close()
			}
			if fl.refused != "" && c.refusals(fl.refused) == before {
				t.Errorf("no refusal is counted under %s; this was no flood: %v", fl.refused, f.answers)
			}
			if fl.expected != "" && f.answers[fl.expected] == 0 || f.answers[fl.unexpected] > 0 {
				t.Errorf("the answers are %v; want %q, and not %q", f.answers, fl.expected, fl.unexpected)
			}
			if limit := floodStreams + 100 + 100 + 20; most > limit {
				t.Errorf("it had %d descriptors open; its limits make %d", most, limit)
			}
			if peak > start+float64(fl.kept) {
				t.Errorf("it needed %.0f MB, and before %.0f", peak, start)
			}
			h.finish(t)
			eventually(t, 3*time.Second, "its descriptors are given back", func() bool { return c.descriptors() <= descriptors+5 })
			eventually(t, 5*time.Second, "its rooms and users are forgotten", func() bool { return c.metric("rooms") <= 1 && c.metric("users") == 0 })
			after := 0.0
			eventually(t, 3*time.Second, "its memory is given back", func() bool { after = memory(); return after < start+12 })
			t.Logf("%.1f s, %v, %.0f MB at most, %.0f before it, %.0f after, %d descriptors at most", time.Since(began).Seconds(), f.answers, peak, start, after, most)
		})
	}
	if err := c.stop(); err != nil {
		t.Errorf("it ended with %v", err)
	}
	if log := c.log.String(); strings.Contains(log, "ERROR") || strings.Contains(log, "panic") || len(log) > 4000 {
		t.Errorf("floods fill its log:\n%.4000s", log)
	}
}
