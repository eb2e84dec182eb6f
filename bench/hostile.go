package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// Hostile: thousands of connections do one thing each and then stand still, against a relay with
// its default flags in a memory cgroup of 256 MiB. All the while a polite client opens a stream,
// publishes, and waits for what it published, each on a new connection.

// An attack is one row of the table.
type attack struct {
	name  string
	cheap bool   // runs in CI
	n     int    // connections; 0: 9,000
	args  string // flags of the relay
	first func(a *attack)
	open  func(a *attack, c net.Conn, i int) // what one connection does
	then  func(a *attack)                    // once all are open

	ctx   context.Context // done when the attack is over
	addr  string
	fail  atomic.Int64 // connections that could not be opened
	tries atomic.Int64
}

const (
	hostileMemory = 256 << 20
	servedWithin  = 5 * time.Second // a polite client, at any time
	keptAfter     = hostileMemory / 10
	bigBody       = 60_000 // bytes of the 65,536 that a publish may have
)

func post(path, contentType, more string, body string) func(*attack, net.Conn, int) {
	return send("POST "+path+" HTTP/1.1\r\nHost: x\r\nContent-Type: "+contentType+"\r\n"+more+"\r\n", body)
}

// send sends text, and then waits for the server to end the connection.
func send(text ...string) func(*attack, net.Conn, int) {
	b := []byte(strings.Join(text, ""))
	return func(a *attack, c net.Conn, _ int) {
		c.Write(b)
		io.Copy(io.Discard, c)
	}
}

// dribble sends a head and then a byte five times a second.
func dribble(head string) func(*attack, net.Conn, int) {
	return func(a *attack, c net.Conn, _ int) {
		io.WriteString(c, head)
		for pause(a.ctx, 200*time.Millisecond) == nil {
			if _, err := c.Write([]byte("x")); err != nil {
				return
			}
		}
	}
}

// deaf asks for something and reads nothing of it.
func deaf(text string) func(*attack, net.Conn, int) {
	return func(a *attack, c net.Conn, i int) {
		c.(*net.TCPConn).SetReadBuffer(4096)
		io.WriteString(c, strings.ReplaceAll(text, "%", fmt.Sprint(i)))
		<-a.ctx.Done()
	}
}

func get(path string) string { return "GET " + path + " HTTP/1.1\r\nHost: x\r\n\r\n" }

const upgrade = "GET /rooms/r/ws HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"

// fragment is a masked frame of 1,000 bytes that ends no message.
func fragment(first bool) string {
	op := "\x00"
	if first {
		op = "\x01"
	}
	return op + "\xfe\x03\xe8\x00\x00\x00\x00" + strings.Repeat("x", 1000)
}

// rounds asks, is answered, and asks again.
func rounds(path string) func(*attack, net.Conn, int) {
	return func(a *attack, c net.Conn, _ int) {
		r := bufio.NewReaderSize(c, 512)
		for a.ctx.Err() == nil {
			if _, err := io.WriteString(c, get(path)); err != nil {
				return
			}
			resp, err := http.ReadResponse(r, nil)
			if err != nil {
				return
			}
			io.Copy(io.Discard, resp.Body)
			if resp.StatusCode != http.StatusOK {
				return
			}
		}
	}
}

// say publishes to rooms in turn, a few at a time, as long as the attack lasts.
func say(n, rooms, size int, every time.Duration) func(*attack) {
	return func(a *attack) {
		c, err := dial(a.ctx, a.addr)
		if err != nil {
			return
		}
		defer c.conn.Close()
		body := bytes.Repeat([]byte("x"), size)
		for i := 0; i < n && a.ctx.Err() == nil; i++ {
			if _, err := c.do("POST", fmt.Sprintf("/rooms/r%d", i%rooms), "text/plain", body); err != nil {
				c.conn.Close()
				if c, err = dial(a.ctx, a.addr); err != nil {
					return
				}
			}
			pause(a.ctx, every)
		}
	}
}

// flood has each connection make one request after the other, and read the answers.
func flood(request func(i, n int) string) func(*attack, net.Conn, int) {
	return func(a *attack, c net.Conn, i int) {
		r := bufio.NewReader(c)
		for n := 0; a.ctx.Err() == nil; n++ {
			if _, err := io.WriteString(c, request(i, n)); err != nil {
				return
			}
			resp, err := http.ReadResponse(r, nil)
			if err != nil {
				return
			}
			io.Copy(io.Discard, resp.Body)
		}
	}
}

func smallPost(path, body string) string {
	return fmt.Sprintf("POST %s HTTP/1.1\r\nHost: x\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n%s", path, len(body), body)
}

// h2streams opens streams over HTTP/2, 250 on each connection.
func h2streams(a *attack) {
	p := new(http.Protocols)
	p.SetUnencryptedHTTP2(true)
	for range 40 {
		t := &http.Transport{Protocols: p, MaxConnsPerHost: 1}
		var g sync.WaitGroup
		for range 250 {
			g.Go(func() {
				r, _ := http.NewRequestWithContext(a.ctx, "GET", "http://"+a.addr+"/rooms/r/stream", nil)
				if resp, err := t.RoundTrip(r); err == nil {
					io.Copy(io.Discard, resp.Body)
					resp.Body.Close()
				}
			})
		}
		go func() {
			g.Wait()
			t.CloseIdleConnections()
		}()
		pause(a.ctx, 50*time.Millisecond)
	}
}

func attacks() []*attack {
	body := strings.Repeat("x", bigBody)
	const length = "Content-Length: 65536\r\n"
	form := "--b\r\nContent-Disposition: form-data; name=\"data\"\r\n\r\n" + body
	head := "GET /rooms/r/sse HTTP/1.1\r\nHost: x\r\n"
	oneHeader := head + "X-A: " + strings.Repeat("h", 15_000)
	lines := func(n, size int) string {
		s := head
		for i := range n {
			s += fmt.Sprintf("X%x: %s\r\n", i, strings.Repeat("h", size))
		}
		return s
	}
	wsMessage := "\x81\xfe\xff\xff\x00\x00\x00\x00"
	fragments := fragment(true) + strings.Repeat(fragment(false), 58)
	many := func(i int) string {
		var names []string
		for k := range 32 {
			names = append(names, fmt.Sprintf("%050d-%d", i, k))
		}
		return strings.Join(names, ",")
	}
	fill := say(20, 1, bigBody, 0)
	return []*attack{
		{name: "bodies: text; 60 of 64 KB", open: post("/rooms/r", "text/plain", length, body), cheap: true},
		{name: "bodies: chunked", open: post("/rooms/r", "text/plain", "Transfer-Encoding: chunked\r\n", "ffff\r\n"+body)},
		{name: "bodies: multipart form", open: post("/rooms/r", "multipart/form-data; boundary=b", length, form)},
		{name: "bodies: presence; JSON", open: post("/rooms/r/presence?user=u", "application/json", length, `{"state":"`+body)},
		{name: "bodies: announced only", open: post("/rooms/r", "text/plain", length, "")},
		{name: "bodies: announced; 100-continue", open: post("/rooms/r", "text/plain", length+"Expect: 100-continue\r\n", "")},
		{name: "bodies: 5 of 10 bytes", open: post("/rooms/r", "text/plain", "Content-Length: 10\r\n", "hello")},
		{name: "bodies: 3900 of 4000 bytes", open: post("/rooms/r", "text/plain", "Content-Length: 4000\r\n", body[:3900])},
		{name: "bodies: for no path", open: post("/nothing", "text/plain", length, body)},
		{name: "bodies: a byte now and then", open: dribble("POST /rooms/r HTTP/1.1\r\nHost: x\r\n" + length + "\r\n" + body[:40_000])},
		{name: "heads: 15 KB; one header", open: send(oneHeader), cheap: true},
		{name: "heads: 15 KB; 350 headers", open: send(lines(350, 36))},
		{name: "heads: 15 KB; 2500 headers", open: send(lines(2500, 0))},
		{name: "heads: the second of a connection", open: send(get("/rooms/r/poll"), oneHeader)},
		{name: "heads: a byte now and then", open: dribble(head + "X-A: ")},
		{name: "nothing sent", open: send("")},
		{name: "idle after a publish", open: send(smallPost("/rooms/r", "hi"))},
		{name: "WebSocket: 60 of 64 KB; one frame", open: send(upgrade, wsMessage, body)},
		{name: "WebSocket: 60 of 64 KB; 60 fragments", open: send(upgrade, fragments)},
		{name: "WebSocket: 1 KB; a fragment", open: send(upgrade, fragment(true))},
		{name: "WebSocket: pings; pongs unread", n: 2000, open: deaf(upgrade + strings.Repeat("\x89\x8a\x00\x00\x00\x00pingpingpi", 300))},
		{name: "long-poll; asked and answered", open: rounds("/rooms/r0/longpoll?wait=50"), then: say(20, 1, 64, 800*time.Millisecond)},
		{name: "jsonp; asked and answered", open: rounds("/rooms/r0/jsonp?callback=f&wait=50"), then: say(20, 1, 64, 800*time.Millisecond)},
		{name: "stalled readers: sse", open: deaf(get("/rooms/r0/sse")), then: say(60, 1, bigBody, 50*time.Millisecond)},
		{name: "stalled readers: stream; HTTP/1.0", open: deaf("GET /rooms/r0/stream HTTP/1.0\r\n\r\n"), then: say(60, 1, bigBody, 50*time.Millisecond)},
		{name: "stalled readers: WebSocket", open: deaf(strings.Replace(upgrade, "/r/", "/r0/", 1)), then: say(60, 1, bigBody, 50*time.Millisecond)},
		{name: "stalled readers: multipart", open: deaf(get("/rooms/r0/multipart")), then: say(60, 1, bigBody, 50*time.Millisecond)},
		{name: "stalled readers: multipart?as=html", open: deaf(get("/rooms/r0/multipart?as=html")), then: say(60, 1, bigBody, 50*time.Millisecond)},
		{name: "stalled readers: poll", first: fill, open: deaf(get("/rooms/r0/poll?last=9")), cheap: true},
		{name: "stalled readers: long-poll", open: deaf(get("/rooms/r0/longpoll?wait=50")), then: say(60, 1, bigBody, 50*time.Millisecond)},
		{name: "stalled readers: refresh", first: fill, open: deaf(get("/rooms/r0/refresh"))},
		{name: "stalled readers: who is present", first: users, open: deaf(get("/rooms/r0/presence"))},
		{name: "requests in advance; answers unread", first: say(100, 1, 60, 0), open: deaf(strings.Repeat(get("/rooms/r0/poll?last=99"), 100))},
		{name: "pictures: 100 rooms; as=svg", n: 100, open: viewer("multipart?as=svg"), then: say(2332, 100, bigBody, 0)},
		{name: "pages: 200 rooms; as=html", n: 200, open: viewer("multipart?as=html"), then: say(1587, 200, bigBody, 0)},
		{name: "streams of 32 rooms each", open: func(a *attack, c net.Conn, i int) { send(get("/rooms/"+many(i)+"/sse"))(a, c, i) }},
		{name: "streams of users", open: func(a *attack, c net.Conn, i int) {
			send(get(fmt.Sprintf("/rooms/r%d/sse?user=%064d", i%500, i)))(a, c, i)
		}},
		{name: "streams: HTTP/1.0", open: send("GET /rooms/r/sse HTTP/1.0\r\n\r\n")},
		{name: "streams: HTTP/2", n: 1, args: "-h2c", open: send(""), then: h2streams},
		{name: "HTTP/2 and no request", args: "-h2c", open: send("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00")},
		{name: "publishes that JSON makes six times as long", n: 300, open: flood(func(int, int) string { return smallPost("/rooms/r", strings.Repeat("<", 65_000)) })},
		{name: "publishes to many rooms; with keys", n: 64, open: flood(func(i, n int) string { return smallPost(fmt.Sprintf("/rooms/r%d-%d?key=%0120d", i, n, n), "hi") })},
	}
}

// users sets the presence of more users than may be present.
func users(a *attack) {
	c, err := dial(a.ctx, a.addr)
	if err != nil {
		return
	}
	defer c.conn.Close()
	for i := range 20_000 {
		if _, err := c.do("POST", fmt.Sprintf("/rooms/r0/presence?user=%064d", i), "text/plain", []byte("online")); err != nil {
			return
		}
	}
}

func viewer(technique string) func(*attack, net.Conn, int) {
	return func(a *attack, c net.Conn, i int) { send(get(fmt.Sprintf("/rooms/r%d/%s", i, technique)))(a, c, i) }
}

// run opens all connections, each again 3 s after it was ended, until ctx is done.
func (a *attack) run(ctx context.Context, opened func()) {
	a.ctx = ctx
	if a.first != nil {
		a.first(a)
	}
	var g sync.WaitGroup
	dialing := make(chan struct{}, 100)
	var up atomic.Int64
	for i := range a.n {
		g.Go(func() {
			d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 2, byte(i>>12), 1)}, Timeout: 5 * time.Second}
			for first := true; ctx.Err() == nil; first = false {
				dialing <- struct{}{}
				c, err := d.DialContext(ctx, "tcp", a.addr)
				<-dialing
				a.tries.Add(1)
				if err != nil {
					a.fail.Add(1)
				}
				if first && up.Add(1) == int64(a.n) {
					opened()
				}
				if err == nil {
					c.(*net.TCPConn).SetLinger(0)
					stop := context.AfterFunc(ctx, func() { c.Close() })
					a.open(a, c, i)
					stop()
					c.Close()
				}
				pause(ctx, 3*time.Second)
			}
		})
	}
	g.Wait()
}

// polite opens a stream, publishes, and waits for what it published. Refused or cut off, it tries
// again, as a polite client does. It returns how long that took.
func polite(ctx context.Context, addr string) time.Duration {
	start := time.Now()
	for ctx.Err() == nil && time.Since(start) < 6*servedWithin {
		within, cancel := context.WithTimeout(ctx, 2*servedWithin)
		err := politely(within, addr)
		cancel()
		if err == nil {
			break
		}
		pause(ctx, 250*time.Millisecond)
	}
	return time.Since(start)
}

func politely(ctx context.Context, addr string) error {
	client := &http.Client{Transport: &http.Transport{}}
	defer client.CloseIdleConnections()
	r, _ := http.NewRequestWithContext(ctx, "GET", "http://"+addr+"/rooms/polite/sse?presence=0", nil)
	resp, err := client.Do(r)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	events := bufio.NewReader(resp.Body)
	if err := readTo(events, "event: hello"); err != nil {
		return err
	}
	word := fmt.Sprintf("%d", time.Now().UnixNano())
	p, _ := http.NewRequestWithContext(ctx, "POST", "http://"+addr+"/rooms/polite", strings.NewReader(word+strings.Repeat(".", 6000)))
	p.Header.Set("Content-Type", "text/plain")
	answer, err := client.Do(p)
	if err != nil {
		return err
	}
	io.Copy(io.Discard, answer.Body)
	answer.Body.Close()
	if answer.StatusCode != http.StatusCreated {
		return errors.New(answer.Status)
	}
	return readTo(events, word)
}

func readTo(r *bufio.Reader, text string) error {
	for {
		line, err := r.ReadString('\n')
		if err != nil || strings.Contains(line, text) {
			return err
		}
	}
}

// hostile runs the attacks, and fails unless the relay lives through each and serves the polite.
func (b *bench) hostile(ctx context.Context) error {
	after := b.after
	if b.cheap { // on a slower machine: a third of all
		after, b.n, b.cgroupMax = 8*time.Second, or(b.n, 3000), 128<<20
	}
	lines := [][]string{{"connections", "n", "alive", "peak MB", "polite during, s", "after, s", "MB before", "MB after", "held"}}
	defer func() { table(lines) }()
	var failed []string
	for _, a := range attacks() {
		if b.cheap && !a.cheap || b.only != "" && !slices.ContainsFunc(strings.Split(b.only, ","), func(part string) bool { return strings.Contains(a.name, part) }) {
			continue
		}
		a.n = or(a.n, or(b.n, 9000))
		line, err := b.attack(ctx, a, after)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		lines = append(lines, line)
		verdict := "ok"
		if err != nil {
			failed = append(failed, a.name)
			verdict = err.Error()
		}
		fmt.Fprintf(os.Stderr, "%s: %s\n", strings.Join(line, " | "), verdict)
	}
	if failed != nil {
		return fmt.Errorf("not lived through: %s", strings.Join(failed, "; "))
	}
	return nil
}

func (b *bench) attack(ctx context.Context, a *attack, after time.Duration) ([]string, error) {
	limit, args := b.cgroupMax, b.args
	defer func() { b.cgroupMax, b.args = limit, args }()
	if b.args += " " + a.args; b.cgroupMax == 0 {
		b.cgroupMax = hostileMemory
	}
	srv, err := b.start(ctx, "relay", 0)
	if err != nil {
		b.cgroupMax = -1 // no cgroup here: what is resident is compared with the limit
		if srv, err = b.start(ctx, "relay", 0); err != nil {
			return nil, err
		}
	}
	defer srv.stop()
	a.addr = srv.addr
	polite(ctx, a.addr)
	before, _ := memory(srv.pids)

	attackCtx, end := context.WithCancel(ctx)
	defer end()
	opened, ended := make(chan struct{}), make(chan struct{})
	go func() { a.run(attackCtx, func() { close(opened) }); close(ended) }()
	var slowest time.Duration
	over := time.Now().Add(time.Minute)
	for wait := opened; time.Now().Before(over); {
		slowest = max(slowest, polite(ctx, a.addr))
		select {
		case <-wait:
			wait = nil
			d := 8 * time.Second
			if a.then != nil {
				go a.then(a)
				d = 20 * time.Second
			} else if b.cheap {
				d = 3 * time.Second
			}
			over = time.Now().Add(d)
		case <-time.After(100 * time.Millisecond):
		}
		if len(srv.ended) > 0 {
			break
		}
	}
	end()
	<-ended
	alive := len(srv.ended) == 0
	afterwards := time.Duration(0)
	if alive {
		afterwards = polite(ctx, a.addr)
		pause(ctx, after)
	}
	rss, peak := memory(srv.pids)
	held, kept := b.held(a.addr)
	said := srv.stop()
	if i := strings.Index(said, "peak "); i >= 0 { // of the cgroup: kernel memory, too
		peak = max(peak, float64(number([]byte(said[i+5:]))<<20))
	}
	line := []string{a.name, fmt.Sprint(a.n), fmt.Sprint(alive), num(peak/1e6, 0), num(slowest.Seconds(), 1), num(afterwards.Seconds(), 1), num(before/1e6, 0), num(rss/1e6, 0), held}
	switch {
	case !alive, peak > hostileMemory:
		return line, errors.New("killed: " + said)
	case slowest > servedWithin, afterwards > servedWithin:
		return line, errors.New("a polite client waited too long")
	case rss > before+keptAfter+kept:
		return line, errors.New("its memory is not given back")
	case held != "0":
		return line, errors.New("places are not given back")
	}
	return line, nil
}

// held sums the gauges of what is held: it is to be 0 when all have gone, but for this request.
// It also returns how many bytes of messages are kept.
func (b *bench) held(addr string) (held string, kept float64) {
	resp, err := http.Get("http://" + addr + "/metrics")
	if err != nil {
		return "–", 0
	}
	defer resp.Body.Close()
	text, _ := io.ReadAll(resp.Body)
	sum := int64(0)
	for line := range strings.Lines(string(text)) {
		name, value, _ := strings.Cut(line, " ")
		switch name, _, _ := strings.Cut(name, "{"); name {
		case "cometes_connections", "cometes_reserved_bytes", "cometes_unsent_bytes":
			sum += number([]byte(value))
		case "cometes_served_connections", "cometes_open_connections":
			sum += number([]byte(value)) - 1
		case "cometes_history_bytes":
			kept = float64(number([]byte(value)))
		}
	}
	return fmt.Sprint(sum), kept
}
