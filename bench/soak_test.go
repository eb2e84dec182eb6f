//go:build linux

// The soak: a relay under moderate load for as long as one likes, with readers that are
// cut off, readers that stop reading, and restarts. All of them record what they were promised, and none may miss anything.
//
//	SOAK=30m go test -run TestSoak -v -timeout 1h ./bench
//
// A relay that is restarted never gets old. SOAK_EVERY=24h leaves out the restarts, to
// see whether memory grows over hours.

package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/coder/websocket"
)

const (
	soakRooms = 50
	soakSlow  = 50 // readers that stop reading, beside the others
	soakBig   = 16 << 10
)

// soakKinds are the techniques of the readers of one room.
var soakKinds = slices.Concat(slices.Repeat([]string{"sse", "stream", "ws"}, 8), slices.Repeat([]string{"multipart", "iframe", "longpoll"}, 4),
	[]string{"poll", "poll", "poll", "jsonp"})

// A soak is what readers, publishers and the test share.
type soak struct {
	ctx       context.Context // done when all readers are to leave
	addr      string
	every     time.Duration // time between two restarts
	life      time.Duration // of a connection, on average
	started   atomic.Bool   // all readers are connected, and something is published
	ending    atomic.Bool   // nothing more is published, and nobody is cut off
	joined    atomic.Int64  // readers with a cursor
	epoch     atomic.Int64  // odd while the relay stops and starts; grows at the beginning and the end of that
	startedAt atomic.Int64  // a moment before the relay started, in Unix microseconds; its ids are higher

	mu       sync.Mutex                              // guards what follows
	counts   map[string]int64                        // what happened, by name
	failures map[string]int64                        // what must not happen, by name
	examples []string                                // three examples of each failure
	acked    [soakRooms]struct{ n, id int64 }        // the last publish that was acknowledged
	first    [soakRooms]struct{ startedAt, n int64 } // the first message of a process that readers received
	restarts []*soakRestart
	volley   chan struct{} // closed when all publishers are to publish, just before a restart
	slowest  time.Duration // from publish to delivery by a stream, without the time between connections
}

// A soakRestart is the record of one restart.
type soakRestart struct {
	due        [soakRooms]int64 // the last message acknowledged by the process that was stopped
	took       time.Duration    // time to stop
	byes, gaps int
	missed     int64 // acknowledged messages that returning readers did not get, and were sent a gap for
}

func (s *soak) count(what string, n int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.counts[what] += n
}

func (s *soak) fail(what string, n int64, format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.failures[what] < 3 {
		s.examples = append(s.examples, what+": "+fmt.Sprintf(format, args...))
	}
	s.failures[what] += n
}

// restart returns the latest one. The caller holds s.mu.
func (s *soak) restart() *soakRestart {
	if len(s.restarts) == 0 {
		return &soakRestart{}
	}
	return s.restarts[len(s.restarts)-1]
}

// due returns the last message of each room that the current process has acknowledged.
func (s *soak) due() (last [soakRooms]int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for room, a := range s.acked {
		if a.id >= s.startedAt.Load() {
			last[room] = a.n
		}
	}
	return last
}

// stopped reports whether the relay was stopping at some time since the epoch.
func (s *soak) stopped(epoch int64) bool { return epoch%2 == 1 || s.epoch.Load() != epoch }

// sleep reports whether the soak goes on afterwards.
func (s *soak) sleep(d time.Duration) bool {
	select {
	case <-time.After(d):
		return true
	case <-s.ctx.Done():
		return false
	}
}

func soakRoom(i int) string { return fmt.Sprintf("soak%d", i) }

// Readers.

type soakReader struct {
	s         *soak
	name      string
	kind      string
	query     string
	slow      bool
	positions []*soakPosition
	after     int64 // the cursor, or -1 for none

	// Of the connection.
	opened     bool          // a hello was received
	retryAfter time.Duration // a bye was received, with this time to wait; 0 for none
	open       time.Time     // when the connection was opened
	was        [2]time.Time  // when the previous connection was opened, and ended
}

// A soakPosition is what a reader has received of one room.
type soakPosition struct {
	room    int
	last    atomic.Int64 // the number of the newest message
	base    int64        // the id of the newest message or gap
	gapSent bool         // a gap was received, and no message since
}

func newSoakReader(s *soak, i int) *soakReader {
	room, j := i%soakRooms, i/soakRooms
	r := &soakReader{s: s, after: -1, slow: j >= len(soakKinds), query: "?callback=tell"}
	if r.slow { // in the room with large messages
		r.kind, room = []string{"sse", "stream", "ws", "multipart", "iframe"}[i%5], 0
	} else {
		r.kind = soakKinds[j]
	}
	r.positions = []*soakPosition{{room: room}}
	if !r.slow && j%5 == 3 {
		r.positions = append(r.positions, &soakPosition{room: (room + 7) % soakRooms})
	}
	if j%4 == 1 {
		r.query += fmt.Sprintf("&user=user%d-%d", room, j/8) // a user with two tabs
	}
	r.name = fmt.Sprintf("%s %d", r.kind, i)
	return r
}

// once reads over one connection, and returns how long to wait before the next.
func (r *soakReader) once() time.Duration {
	s, epoch, soon := r.s, r.s.epoch.Load(), rand.N(time.Second)
	r.opened, r.retryAfter = false, 0
	d := net.Dialer{Timeout: 10 * time.Second}
	if r.slow { // what is not read stays with the relay
		d.Control = func(_, _ string, raw syscall.RawConn) error {
			return raw.Control(func(fd uintptr) { syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVBUF, 4096) })
		}
	}
	conn, err := d.DialContext(s.ctx, "tcp", s.addr)
	if err == nil {
		defer conn.Close()
		defer context.AfterFunc(s.ctx, func() { conn.Close() })()
		life := time.Duration(rand.ExpFloat64() * float64(s.life))
		if r.slow {
			life = time.Second + rand.N(2*time.Second)
		}
		if !s.ending.Load() {
			conn.SetReadDeadline(time.Now().Add(life))
		}
		err = r.read(conn)
	}
	if r.opened {
		r.was = [2]time.Time{r.open, time.Now()}
	}
	switch enough := conn != nil && errors.Is(err, os.ErrDeadlineExceeded); {
	case s.ctx.Err() != nil:
	case r.retryAfter > 0:
		return min(r.retryAfter, s.every/6)
	case enough && r.slow && s.started.Load():
		r.stall(conn, epoch)
	case enough:
		r.cut(conn)
	case !s.stopped(epoch):
		s.fail("broken off", 1, "%s: %v", r.name, err)
	case r.opened:
		s.fail("ended without a bye", 1, "%s: %v", r.name, err)
	}
	return soon
}

// cut disconnects, like a closed tab or a lost network.
func (r *soakReader) cut(conn net.Conn) {
	r.s.count("cuts", 1)
	if rand.N(2) == 0 {
		conn.(*net.TCPConn).SetLinger(0) // a reset
	} else if r.kind == "ws" && r.opened {
		conn.Write(maskedFrame(8, "\x03\xe8"))
	}
}

// stall stops reading until the relay closes the connection. A client that does not
// read notices that by writing.
func (r *soakReader) stall(conn net.Conn, epoch int64) {
	nudge := []byte("\n")
	if r.kind == "ws" {
		nudge = maskedFrame(10, "")
	}
	for range 90 {
		if !r.s.sleep(500*time.Millisecond) || r.s.ending.Load() {
			return
		}
		if _, err := conn.Write(nudge); err != nil {
			if !r.s.stopped(epoch) {
				r.s.count("slow readers dropped", 1)
			}
			return
		}
	}
	r.s.fail("slow, and not dropped", 1, "%s", r.name)
}

// read makes requests, and reads what comes.
func (r *soakReader) read(conn net.Conn) error {
	in := bufio.NewReader(conn)
	for {
		resp, err := r.ask(conn, in)
		if err != nil {
			return err
		}
		if resp.StatusCode != http.StatusOK && resp.StatusCode != http.StatusSwitchingProtocols {
			return fmt.Errorf("answered %s", resp.Status)
		}
		switch r.kind {
		case "poll", "longpoll", "jsonp":
			b, err := io.ReadAll(resp.Body)
			if err != nil {
				return err
			}
			b = bytes.TrimSuffix(bytes.TrimPrefix(b, []byte("/**/tell(")), []byte(");\n"))
			var answer struct {
				Cursor int64
				Events []json.RawMessage
			}
			if err := json.Unmarshal(b, &answer); err != nil {
				return err
			}
			r.setCursor(max(0, r.after)) // the cursor before the events, of which there may be some already
			for _, e := range answer.Events {
				r.got(e)
			}
			r.setCursor(answer.Cursor)
			if resp.Close || r.kind == "poll" && !r.s.sleep(2*time.Second+rand.N(2*time.Second)) {
				return io.EOF
			}
		case "ws":
			return r.frames(conn, in)
		default:
			for lines := bufio.NewReader(resp.Body); ; {
				b, err := lines.ReadBytes('\n')
				if err != nil {
					return err
				}
				if i := bytes.IndexByte(b, '{'); i >= 0 { // after "data: ", or in a script
					r.got(bytes.TrimSuffix(b[i:], []byte(")</script>\n")))
				}
			}
		}
	}
}

func (r *soakReader) ask(conn net.Conn, in *bufio.Reader) (*http.Response, error) {
	var rooms []string
	for _, p := range r.positions {
		rooms = append(rooms, soakRoom(p.room))
	}
	query, head := r.query, ""
	switch {
	case r.after < 0:
		query += "&wait=0"
	case r.kind == "sse":
		head = fmt.Sprintf("Last-Event-ID: %d\r\n", r.after)
	default:
		query += fmt.Sprintf("&wait=20&after=%d", r.after)
	}
	if r.kind == "ws" {
		head = webSocketHead
	}
	if _, err := fmt.Fprintf(conn, "GET /rooms/%s/%s%s HTTP/1.1\r\nHost: soak\r\n%s\r\n", strings.Join(rooms, ","), r.kind, query, head); err != nil {
		return nil, err
	}
	return http.ReadResponse(in, nil)
}

// frames reads the frames of a WebSocket.
func (r *soakReader) frames(conn net.Conn, in *bufio.Reader) error {
	for {
		var head [2]byte
		if _, err := io.ReadFull(in, head[:]); err != nil {
			return err
		}
		n := uint64(head[1])
		if n >= 126 { // the length comes in two bytes, or with 127 in eight
			var long [8]byte
			if _, err := io.ReadFull(in, long[6-6*(n-126):]); err != nil {
				return err
			}
			n = binary.BigEndian.Uint64(long[:])
		}
		b := make([]byte, n)
		if _, err := io.ReadFull(in, b); err != nil {
			return err
		}
		switch head[0] & 15 {
		case 1:
			for line := range bytes.Lines(b) {
				r.got(line)
			}
		case 8:
			return io.EOF
		case 9:
			conn.Write(maskedFrame(10, string(b)))
		}
	}
}

// setCursor sets the cursor of a poll or a hello.
func (r *soakReader) setCursor(cursor int64) {
	if r.after < 0 {
		r.s.joined.Add(1)
		for _, p := range r.positions {
			p.base = r.s.startedAt.Load()
		}
	}
	if cursor < r.after {
		r.s.fail("out of order", 1, "%s: the cursor goes from %d to %d", r.name, r.after, cursor)
	}
	r.after = cursor
}

// got takes an event, and checks that it is the expected one.
func (r *soakReader) got(line []byte) {
	s := r.s
	var e struct {
		ID, Time   int64
		Room, Type string
		Data       json.RawMessage
	}
	if err := json.Unmarshal(line, &e); err != nil {
		s.fail("malformed", 1, "%s: %.100s", r.name, line)
		return
	}
	var data struct {
		N, Retry int64
		Reason   string
	}
	if e.Type != "presence" {
		json.Unmarshal(e.Data, &data)
	}
	switch {
	case e.Type == "hello":
		r.opened, r.open = true, time.Now()
		r.setCursor(e.ID)
		return
	case e.Type == "bye":
		r.bye(time.Duration(data.Retry) * time.Millisecond)
		return
	case e.ID == 0: // a heartbeat, or the roster
		return
	case e.ID < r.after || e.ID == r.after && e.Type != "gap": // gaps of several rooms may have the same id
		s.fail("out of order", 1, "%s: behind %d came %.100s", r.name, r.after, line)
	}
	r.after = e.ID
	for _, p := range r.positions {
		if soakRoom(p.room) != e.Room {
			continue
		}
		switch e.Type {
		case "gap":
			r.gap(p, data.Reason)
			p.base = e.ID
		case "message":
			r.message(p, e.ID, data.N, time.UnixMilli(e.Time))
			p.base = e.ID
		}
		return
	}
	s.fail("of another room", 1, "%s: %.100s", r.name, line)
}

func (r *soakReader) gap(p *soakPosition, reason string) {
	s := r.s
	if p.gapSent = true; reason != "restart" { // the history is long enough for all readers of this test
		s.fail("gap for another reason", 1, "%s: %s", r.name, reason)
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	last := s.restart()
	last.gaps++
	if !r.slow {
		last.missed += max(0, last.due[p.room]-p.last.Load())
	}
}

func (r *soakReader) message(p *soakPosition, id, n int64, at time.Time) {
	s := r.s
	last, gap := p.last.Load(), p.gapSent
	p.gapSent = false
	s.count("delivered", 1)
	startedAt := s.startedAt.Load()
	if id >= startedAt && p.base < startedAt && !gap {
		s.fail("not sent a gap after a restart", 1, "%s: message %d of room %d, last was %d", r.name, n, p.room, last)
	}
	switch {
	case n == last && gap: // the answer was lost with the process, which knew the key
		s.count("again after a restart", 1)
	case n <= last:
		s.fail("doubled", 1, "%s: message %d of room %d, last was %d", r.name, n, p.room, last)
	case n > last+1 && !gap:
		s.fail("lost", n-last-1, "%s: message %d of room %d, last was %d", r.name, n, p.room, last)
	}
	p.last.Store(n)

	s.mu.Lock()
	defer s.mu.Unlock()
	if first := &s.first[p.room]; gap && id >= startedAt { // all that return after a restart must begin with the same message
		if first.startedAt != startedAt {
			first.startedAt, first.n = startedAt, n
		} else if first.n != n {
			s.failures["begun late after a restart"]++
		}
	}
	if r.opened && !r.slow { // poll and long-poll have no hello
		now, waited := time.Now(), time.Duration(0)
		for _, span := range [][2]time.Time{r.was, {r.open, now}} {
			if span[0].Before(at) {
				span[0] = at
			}
			waited += max(0, span[1].Sub(span[0]))
		}
		s.slowest = max(s.slowest, waited)
	}
}

// bye takes a bye. Everything that was acknowledged before the stop must have come.
func (r *soakReader) bye(retry time.Duration) {
	s := r.s
	r.retryAfter = max(retry, time.Millisecond)
	s.mu.Lock()
	last := s.restart()
	last.byes++
	s.mu.Unlock()
	for _, p := range r.positions {
		if n := last.due[p.room] - p.last.Load(); n > 0 && r.opened { // without a hello, the client was never accepted
			s.fail("not delivered before the bye", n, "%s: room %d has %d, of %d", r.name, p.room, p.last.Load(), last.due[p.room])
		}
	}
}

// Publishers, one per room.

func (s *soak) publish(room int) {
	path := "/rooms/" + soakRoom(room)
	p := &soakPublisher{s: s, url: "http://" + s.addr + path, client: &http.Client{Transport: &http.Transport{}}}
	defer p.client.CloseIdleConnections()
	send, pad, pause := p.post, 200, 2*time.Second
	if room%10 == 9 {
		send = p.publishOnce
		defer p.disconnect()
	}
	switch {
	case room == 0:
		pad = soakBig
	case room%10 == 8: // in a room without another message to wake a forgotten reader
		pause = 20 * time.Second
	}
	for n := int64(1); ; n++ {
		s.mu.Lock()
		volley := s.volley
		s.mu.Unlock()
		select {
		case <-time.After(rand.N(pause)):
		case <-volley:
		}
		if s.ending.Load() {
			return
		}
		key, body := fmt.Sprintf("key%d", n), fmt.Sprintf(`{"n":%d,"pad":"%s"}`, n, strings.Repeat("x", pad))
		if room%10 != 9 && rand.N(20) == 0 { // disconnects before the answer, and sends it again
			if conn, err := net.Dial("tcp", s.addr); err == nil {
				fmt.Fprintf(conn, "POST %s?key=%s HTTP/1.1\r\nHost: soak\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", path, key, len(body), body)
				time.Sleep(rand.N(time.Millisecond))
				conn.(*net.TCPConn).SetLinger(0)
				conn.Close()
				s.count("answers not waited for", 1)
			}
		}
		for late := time.Now().Add(time.Minute); ; {
			ctx, cancel := context.WithTimeout(s.ctx, 5*time.Second)
			id, err := send(ctx, key, body)
			cancel()
			if err == nil {
				s.mu.Lock()
				s.acked[room].n, s.acked[room].id = n, id
				s.counts["published"]++
				s.mu.Unlock()
				break
			}
			s.count("publishes tried again", 1)
			if time.Now().After(late) {
				s.fail("not published for a minute", 1, "message %d of room %d: %v", n, room, err)
				return
			}
			if !s.sleep(100*time.Millisecond + rand.N(200*time.Millisecond)) {
				return
			}
		}
	}
}

type soakPublisher struct {
	s      *soak
	url    string
	client *http.Client
	socket *websocket.Conn
}

// post publishes by POST.
func (p *soakPublisher) post(ctx context.Context, key, body string) (int64, error) {
	r, _ := http.NewRequestWithContext(ctx, "POST", p.url+"?key="+key, strings.NewReader(body))
	r.Header.Set("Content-Type", "application/json")
	resp, err := p.client.Do(r)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	var answer struct{ ID int64 }
	if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil || answer.ID == 0 {
		return 0, fmt.Errorf("answered %s: %v", resp.Status, err)
	}
	return answer.ID, nil
}

// publishOnce publishes by WebSocket, and waits for the ack.
func (p *soakPublisher) publishOnce(ctx context.Context, key, body string) (id int64, err error) {
	defer func() {
		if err != nil {
			p.disconnect()
		}
	}()
	if p.socket == nil {
		if p.socket, _, err = websocket.Dial(ctx, p.url+"/ws", nil); err != nil {
			return 0, err
		}
		p.socket.SetReadLimit(1 << 20)
	}
	if err := p.socket.Write(ctx, websocket.MessageText, fmt.Appendf(nil, `{"key":%q,"data":%s}`, key, body)); err != nil {
		return 0, err
	}
	for {
		_, b, err := p.socket.Read(ctx)
		if err != nil {
			return 0, err
		}
		for line := range bytes.Lines(b) {
			var answer struct {
				Type, Key string
				ID        int64
			}
			if json.Unmarshal(line, &answer); answer.Key == key && answer.Type == "ack" {
				return answer.ID, nil
			} else if answer.Key == key {
				return 0, fmt.Errorf("answered %s", line)
			}
		}
	}
}

func (p *soakPublisher) disconnect() {
	if p.socket != nil {
		p.socket.CloseNow()
		p.socket = nil
	}
}

// A soakSample is the resources of the relay at one moment, by soakColumns.
type soakSample map[string]float64

var soakColumns = []string{"seconds", "resident", "memory", "goroutines", "descriptors", "clients", "rooms", "users", "dropped", "written"}

func (c *child) sample(t *testing.T, since time.Time) soakSample {
	p := soakSample{"seconds": time.Since(since).Seconds(), "descriptors": float64(c.descriptors())}
	status, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", c.cmd.Process.Pid))
	_, rest, _ := strings.Cut(string(status), "VmRSS:")
	kilobytes := 0.0
	fmt.Sscan(rest, &kilobytes)
	p["resident"] = kilobytes / 1e3
	_, text, err := c.get("/metrics")
	if err != nil {
		t.Errorf("after %.0f s: %v", p["seconds"], err)
		return p
	}
	p["memory"], p["dropped"] = metricOf(t, text, "memory_bytes")/1e6, metricOf(t, text, "dropped_total")
	for _, name := range []string{"goroutines", "rooms", "users"} {
		p[name] = metricOf(t, text, name)
	}
	for _, tech := range techniques {
		p["clients"] += metricOf(t, text, fmt.Sprintf("connections{technique=%q}", tech.name))
		p["written"] += metricOf(t, text, fmt.Sprintf("delivered_total{technique=%q}", tech.name))
	}
	return p
}

// residentAt returns the relay's average resident memory in the time before end, once
// it has its readers: just after a restart they are still returning.
func residentAt(samples []soakSample, end, before time.Duration) float64 {
	most, sum, n := 0.0, 0.0, 0.0
	for _, p := range samples {
		most = max(most, p["clients"])
	}
	for _, p := range samples {
		if p["seconds"] <= end.Seconds() && p["seconds"] > (end-before).Seconds() && p["clients"] >= most*0.8 {
			sum, n = sum+p["resident"], n+1
		}
	}
	return sum / n
}

// freeSoakAddr returns a free port outside the range of ports that clients get.
// Otherwise a client could connect to itself while the relay is away.
func freeSoakAddr(t *testing.T) string {
	for range 100 {
		addr := fmt.Sprintf("127.0.0.1:%d", 10_000+rand.N(20_000))
		if l, err := net.Listen("tcp", addr); err == nil {
			l.Close()
			return addr
		}
	}
	t.Fatal("there is no free port")
	return ""
}

func TestSoak(t *testing.T) {
	if os.Getenv("SOAK") == "" {
		t.Skip("set SOAK=30m to run it")
	}
	lasts, err := time.ParseDuration(os.Getenv("SOAK"))
	if err != nil {
		t.Fatal(err)
	}
	if end, ok := t.Deadline(); ok && time.Until(end) < lasts+4*time.Minute {
		t.Fatalf("go test gives it too little time: -timeout %v", lasts+5*time.Minute)
	}
	ctx, leave := context.WithCancel(t.Context())
	defer leave()
	s := &soak{ctx: ctx, addr: freeSoakAddr(t), life: min(time.Minute, lasts/2),
		volley: make(chan struct{}), counts: map[string]int64{}, failures: map[string]int64{}}
	// A client that reads nothing is dropped after 10 s; with a shorter interval that
	// would never happen.
	s.every = min(3*time.Minute, max(lasts/10, 20*time.Second))
	if v := os.Getenv("SOAK_EVERY"); v != "" {
		if s.every, err = time.ParseDuration(v); err != nil {
			t.Fatal(err)
		}
	}
	start := func() *child {
		s.startedAt.Store(time.Now().UnixMicro())
		return startRelay(t, nil, "-addr", s.addr, "-present", "10s", "-idle", "10s")
	}
	c := start()
	stop := func() time.Duration {
		began := time.Now()
		if err := c.stop(); err != nil || time.Since(began) > 5*time.Second {
			t.Errorf("the relay stopped after %v: %v", time.Since(began), err)
		}
		if log := c.log.String(); strings.Contains(log, "ERROR") || strings.Contains(log, "panic") || strings.Contains(log, "DATA RACE") {
			t.Errorf("its log:\n%.4000s", log)
		}
		return time.Since(began)
	}
	c.get("/metrics") // the first sample is more expensive
	before := c.sample(t, time.Now())

	var readers, publishers sync.WaitGroup
	var all []*soakReader
	for i := range soakRooms*len(soakKinds) + soakSlow {
		r := newSoakReader(s, i)
		all = append(all, r)
		readers.Go(func() {
			for s.sleep(r.once()) {
			}
		})
	}
	eventually(t, time.Minute, "all readers have a cursor", func() bool { return s.joined.Load() == int64(len(all)) })
	s.started.Store(true)
	for room := range soakRooms {
		publishers.Go(func() { s.publish(room) })
	}

	began := time.Now()
	var samples []soakSample
	dropped := 0.0 // by earlier processes
	sample := func() soakSample {
		p := c.sample(t, began)
		p["dropped"] += dropped
		return p
	}
	nextSample, nextRestart := began, began.Add(s.every)
	for end := began.Add(lasts); time.Now().Before(end); time.Sleep(time.Until(slices.MinFunc([]time.Time{nextSample, nextRestart, end}, time.Time.Compare))) {
		if !time.Now().Before(nextSample) {
			nextSample = time.Now().Add(min(15*time.Second, lasts/20))
			samples = append(samples, sample())
		}
		if time.Now().Before(nextRestart) {
			continue
		}
		if nextRestart = nextRestart.Add(s.every); nextRestart.Add(s.every / 2).After(end) {
			nextRestart = end // the last process gets some time of its own
		}
		dropped = sample()["dropped"]
		this := &soakRestart{}
		s.mu.Lock()
		close(s.volley)
		s.volley = make(chan struct{})
		s.mu.Unlock()
		time.Sleep(rand.N(10 * time.Millisecond))
		this.due = s.due()
		s.mu.Lock()
		s.restarts = append(s.restarts, this)
		s.mu.Unlock()
		s.epoch.Add(1)
		this.took = stop()
		c = start()
		s.epoch.Add(1)
	}
	samples = append(samples, sample())

	s.ending.Store(true)
	close(s.volley)
	publishers.Wait()
	due := s.due()
	eventually(t, time.Minute, "everybody has the last message of every room", func() bool {
		return !slices.ContainsFunc(all, func(r *soakReader) bool {
			return slices.ContainsFunc(r.positions, func(p *soakPosition) bool { return p.last.Load() < due[p.room] })
		})
	})
	leave()
	readers.Wait()
	var after soakSample
	eventually(t, time.Minute, "all is given back", func() bool {
		time.Sleep(500 * time.Millisecond)
		after = sample()
		return after["clients"] == 0 && after["rooms"] == 0 && after["users"] == 0 &&
			after["goroutines"] <= before["goroutines"]+5 && after["descriptors"] <= before["descriptors"]+3
	})

	stop()

	b := bytes.NewBufferString("\n")
	for _, name := range soakColumns {
		fmt.Fprintf(b, " %12s", name)
	}
	fmt.Fprintln(b)
	for _, p := range slices.Concat([]soakSample{before}, samples, []soakSample{after}) {
		for _, name := range soakColumns {
			fmt.Fprintf(b, " %12.0f", p[name])
		}
		fmt.Fprintln(b)
	}
	fmt.Fprintf(b, "\n%8s %8s %8s %8s %8s\n", "restart", "took", "byes", "gaps", "missed")
	for i, x := range s.restarts {
		fmt.Fprintf(b, "%8d %8s %8d %8d %8d\n", i+1, x.took.Round(time.Millisecond), x.byes, x.gaps, x.missed)
	}
	fmt.Fprintln(b)
	for _, what := range slices.Sorted(maps.Keys(s.counts)) {
		fmt.Fprintf(b, "%s %d, ", what, s.counts[what])
	}
	fmt.Fprintf(b, "the slowest after %v; lost %d, doubled %d, out of order %d", s.slowest.Round(time.Millisecond), s.failures["lost"], s.failures["doubled"], s.failures["out of order"])
	t.Log(b.String())

	for _, what := range slices.Sorted(maps.Keys(s.failures)) {
		t.Errorf("%s: %d", what, s.failures[what])
	}
	if len(s.examples) > 0 {
		t.Errorf("such as\n%s", strings.Join(s.examples, "\n"))
	}
	if s.slowest > 5*time.Second {
		t.Errorf("a connected reader waited for a message for %v", s.slowest)
	}
	if s.counts["slow readers dropped"] == 0 {
		t.Error("none of those that read nothing was dropped")
	}
	early, late := residentAt(samples, lasts/4, min(s.every, lasts/4)), residentAt(samples, lasts+time.Second, min(s.every, lasts/4))
	t.Logf("resident at the end of the first quarter %.1f MB, of the last %.1f MB", early, late)
	if !(late <= 1.3*early) {
		t.Errorf("its memory grows: from %.1f MB to %.1f MB", early, late)
	}
}
