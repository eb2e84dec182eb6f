// Tests of the writer pool: sessions that were taken over, full sockets, and WebSocket
// frames.

package main

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"math"
	"net"
	"net/http/httputil"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coder/websocket"
)

// A chunk may be as long as a page with fifty of the longest messages.
func TestALongChunk(t *testing.T) {
	s := newServer(newTestRelay(limits{maxBytes: 1 << 30, maxRoomBytes: 1 << 20}))
	st := &session{stream: &stream{server: s, quota: unlimited{}, headroom: chunkHeadSize}, conn: &limitedConn{}}
	ours, theirs := net.Pipe()
	body := bytes.Repeat([]byte("x"), 17<<20)
	if err := st.sendChunk(&scratch{count: s.count}, append(make([]byte, chunkHeadSize), body...), nil); err != errBlocked {
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

// A client that connects and leaves leaves no timer behind.
func TestNoTimerIsLeft(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestbed(t, pipe)
		allocations := func() uint64 {
			var before, after runtime.MemStats
			e := b.subscribe(variantOf("stream"), "a").begin()
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
			b.subscribe(variantOf("stream"), "a").begin().close()
			synctest.Wait()
		}
		staying := b.subscribe(variantOf("stream"), "a").begin()
		go io.Copy(io.Discard, staying.body)
		for range 100 { // one now and then, next to one that stays
			b.subscribe(variantOf("stream"), "a").begin().close()
			time.Sleep(300 * time.Millisecond)
		}
		if again := allocations(); again > 3*once+1000 {
			t.Errorf("twenty heartbeats took %d allocations at first, and %d after many clients had come and gone", once, again)
		}
	})
}

// What a client sends to a stream is discarded, and the relay still notices when it
// leaves. A client that sends more than a request may is disconnected.
func TestBytesSentToAStreamAreDiscarded(t *testing.T) {
	for _, network := range []string{pipe, tcp} {
		runOnNetwork(t, network, func(t *testing.T) {
			b := newTestbed(t, network)
			for _, size := range []int{10, maxHeader + 100} {
				conn, err := b.dial(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				lines := rawStream(t, conn)
				go io.WriteString(conn, strings.Repeat("x", size))
				if size < maxHeader {
					b.post("a", "hi")
					if !lines.Scan() || !strings.Contains(lines.Text(), `"hi"`) {
						t.Errorf("after %d bytes were sent came %q", size, lines.Text())
					}
					conn.Close()
				} else if lines.Scan() {
					t.Errorf("after %d bytes were sent came %q", size, lines.Text())
				}
				b.waitUntil(func() bool { return b.active() == 0 })
				conn.Close()
			}
		})
	}
}

// A slowWakeConn takes time to wake its reader.
type slowWakeConn struct{ net.Conn }

func (c slowWakeConn) SetReadDeadline(at time.Time) error {
	if at.Equal(past) {
		time.Sleep(100 * time.Millisecond)
	}
	return c.Conn.SetReadDeadline(at)
}

// A client that sends while its socket is full wakes the session's goroutine before
// the writer does. The late wake-up ends no stream.
func TestALateWakeUpEndsNoStream(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestbed(t, pipe)
		l := newPipeListener(&net.UnixAddr{Name: "memory"})
		srv := b.http(false)
		go srv.Serve(b.listen(l))
		defer srv.Close()
		conn, theirs := net.Pipe()
		defer conn.Close()
		l.conns <- slowWakeConn{theirs}
		lines := rawStream(t, conn)
		for i := range 5 {
			b.post("a", fmt.Sprint("message ", i))
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

// The length of a frame has one, two or eight bytes.
func TestWebSocketLengths(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestbed(t, pipe, func(c *config) { c.body = 1 << 20 })
		e := b.webSocket("a")
		b.post("a", "")
		least := len(e.next().json)
		for _, size := range []int{125, 126, 127, 65_535, 65_536, 65_537} {
			text := strings.Repeat("x", size-least)
			b.post("a", text)
			if h := e.next(); len(h.json) != size || h.text != text {
				t.Errorf("an event of %d bytes came with %d", size, len(h.json))
			}
		}
	})
}

// A WebSocket is served by the pool whatever minor version of HTTP/1 it was requested
// with.
func TestAWebSocketOfALaterHTTP(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestbed(t, pipe)
		conn, err := b.dial(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		io.WriteString(conn, "GET /rooms/a/ws HTTP/1.2\r\nHost: cometes.test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n")
		output := make([]byte, 0, 4096)
		go func() {
			for b := make([]byte, 4096); ; {
				n, err := conn.Read(b)
				if output = append(output, b[:n]...); err != nil {
					return
				}
			}
		}()
		synctest.Wait()
		b.post("a", "at once")
		synctest.Wait()
		if !bytes.Contains(output, []byte("at once")) {
			t.Errorf("received %q", output)
		}
	})
}

// A message that was published as the relay stops is acknowledged before the bye.
func TestAnAckIsSentBeforeTheBye(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestbed(t, pipe)
		e := b.webSocket("a")
		st := b.pool.sessions[0]
		st.ws.handling.Store(true) // the message is published, and its ack is about to be queued
		b.stop()
		synctest.Wait()
		ack := notice{Type: "ack", Key: "k", ID: new(int64(1))}.event().json
		st.enqueueFrames(textFrame(append(make([]byte, maxFrameHead), ack...)), nil)
		st.ws.handling.Store(false)
		st.wake()
		if h := e.next(); h.kind != "ack" {
			t.Errorf("received %v, want the ack", h)
		}
		if h := e.next(); h.kind != "bye" {
			t.Errorf("received %v, want the bye", h)
		}
	})
}

// A client that answers no ping is disconnected within a minute; one that does may
// stay.
func TestWebSocketPings(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestbed(t, pipe)
		alive := b.webSocket("a")
		heartbeats := make(chan int, 1)
		go func() {
			n := 0
			for h, err := alive.receive(); err == nil; h, err = alive.receive() {
				if h.kind == "beat" {
					n++
				}
			}
			heartbeats <- n
		}()
		conn, r := b.rawWebSocket("/rooms/a/ws")
		dead := make(chan time.Duration, 1)
		start := time.Now()
		go func() {
			io.Copy(io.Discard, r) // reads everything, and sends nothing
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

// unwritten returns what a full socket did not take, to the byte, and shares a large
// event among all slow clients.
func TestUnwritten(t *testing.T) {
	r := benchRelay(t)
	big := strings.Repeat("long hair, ", 200)
	publishEvent(t, r, publishRequest{room: "lobby", kind: "message", data: []byte(`"` + big + `"`)})
	publishEvent(t, r, publishRequest{room: "lobby", kind: "message", data: []byte(`"short"`)})
	publishEvent(t, r, publishRequest{room: "lobby", kind: "comet", data: []byte(`"` + big + `"`), from: "ada"})
	events := openSubscriber(t, r, "lobby", r.lastID.Load()-r.epoch-3, subscribeRequest{}).next(nil)
	quoted := &event{id: 1, kind: "message", json: slices.Concat([]byte(`{"data":`), events[0].json, []byte("}"))} // contains the next event
	for _, technique := range techniques {
		if technique.mode != streaming {
			continue
		}
		f := newTestEncoder(t, technique)
		for _, due := range [][]*event{events, events[:1], events[1:2], {quoted, events[0]}, {events[0], quoted}} {
			b := f.encode([]byte("head"), &subscriber{cursor: 1}, due...)
			for n := range b {
				rest := unwritten(b, n, due)
				if got := bytes.Join(rest, nil); !bytes.Equal(got, b[n:]) {
					t.Fatalf("%s, %d events, without %d bytes: %.80q, want %.80q", technique.name, len(due), n, got, b[n:])
				}
				if technique.name == "html" || n > 100 || due[0] != events[0] { // html contains no JSON
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

// A client whose message is refused reads why, although it is still sending.
func TestARefusedMessageDoesNotTakeTheCloseFrame(t *testing.T) {
	b := newTestbed(t, tcp)
	conn, r := b.rawWebSocket("/rooms/a/ws?as=data")
	defer conn.Close()
	const size = 5_000_000
	frame := binary.BigEndian.AppendUint64([]byte{0x81, 0x80 | 127}, size)
	go conn.Write(append(frame, make([]byte, 4+size)...))
	answer, err := io.ReadAll(r)
	if want := appendClose(nil, errLongMessage.Code, errLongMessage.Reason); !bytes.Equal(answer, want) || err != nil {
		t.Errorf("the answer is %q, and reading ends with %v; want %q", answer, err, want)
	}
}

// Pings are rare where the kernel detects a dead client by itself.
func TestHowManyPings(t *testing.T) {
	b := newTestbed(t, tcp)
	for _, test := range []struct {
		kernelTimeout, proxied bool
		pings                  int
	}{{false, false, 16}, {false, true, 16}, {true, true, 16}, {true, false, 4}} {
		st := &session{stream: &stream{server: b.server, technique: b.technique("ws"), quota: unlimited{}, enc: frames(b.server, &request{})}, ws: &webSocket{proxied: test.proxied}, conn: &limitedConn{}}
		st.kernelTimeout = test.kernelTimeout
		pings := 0
		for range 48 {
			st.pending = nil
			if err := st.ping(); err != nil {
				t.Fatal(err)
			}
			if st.sendMessage(&scratch{count: b.count}, append(make([]byte, maxFrameHead), beatJSON...), nil); st.pending[0][0] == 0x89 {
				pings++
			}
			st.ws.awaitingPong.Store(false)
		}
		if pings != test.pings {
			t.Errorf("kernel timeout %v, proxied %v: %d pings in 48 heartbeats, want %d", test.kernelTimeout, test.proxied, pings, test.pings)
		}
	}
}

// Malformed frames end their WebSocket, and nothing else.
func TestWebSocketBroken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestbed(t, pipe)
		other := b.webSocket("a")
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
			conn, r := b.rawWebSocket("/rooms/a/ws")
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
			if n := b.subscriptions(); n != 1 || b.relay.lastID.Load() != mark {
				t.Errorf("%s: %d readers, want 1, and nothing published", name, n)
			}
		}
		b.post("a", "hi")
		other.expect("message hi")
	})
}

// A client that leaves 16 KiB of replies unread, beside what its socket holds, is
// disconnected.
func TestWebSocketFlood(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestbed(t, pipe)
		other := b.webSocket("a")
		conn, _ := b.rawWebSocket("/rooms/b/ws")
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
			t.Errorf("%d frames were accepted whose replies are not read", n)
		}
		time.Sleep(2 * time.Second)
		if n := b.subscriptions(); n != 1 {
			t.Errorf("after 11 s there are %d readers, want 1", n)
		}
		b.post("a", "hi")
		other.expect("message hi")
		conn.Close()
	})
}

// Hello comes first, however early the client sends.
func TestHelloComesBeforeAnyReply(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestbed(t, pipe)
		st := &session{ws: &webSocket{}, conn: &limitedConn{}, stream: &stream{server: b.server, technique: b.techniques[len(b.techniques)-1], enc: frames(b.server, &request{}), quota: unlimited{}, headroom: maxFrameHead, expiresAt: math.MaxInt64}}
		st.send = st.sendMessage
		if err := b.relay.subscribe(&st.sub, subscribeRequest{rooms: []string{"a"}, cursor: -1, maxBatchBytes: 1, driver: st}); err != nil {
			t.Fatal(err)
		}
		defer st.sub.unsubscribe()
		st.ws.replies = []byte("an answer")
		st.writeDue(&scratch{count: b.count}, time.Now().UnixNano()) // its first turn, with a socket that is full
		if first := string(slices.Concat(st.pending...)); !strings.Contains(first, `"hello"`) {
			t.Errorf("the first message is %q", first)
		}
	})
}

// A client may send before it has read the answer to its handshake.
func TestAWebSocketClientMaySendBeforeTheHandshakeIsAnswered(t *testing.T) {
	for _, network := range []string{pipe, tcp} {
		t.Run(network, func(t *testing.T) {
			runOnNetwork(t, network, func(t *testing.T) {
				b := newTestbed(t, network)
				e := b.subscribe(variantOf("stream"), "a").begin()
				conn, err := b.dial(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				go io.Copy(io.Discard, conn)
				long := strings.Repeat("x", 300) // more than the small read buffer
				io.WriteString(conn, "GET /rooms/a/ws HTTP/1.1\r\nHost: cometes.test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"+
					"\x81\x82\x00\x00\x00\x00hi\x81\xfe\x01\x2c\x00\x00\x00\x00"+long+"\x81\x85\x00\x00\x00\x00th")
				e.expect("message hi", "message "+long)
				io.WriteString(conn, "ere")
				e.expect("message there")
			})
		})
	}
}

func TestAClientThatLeavesWithAFullSocketIsNotCountedAsDropped(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newLimitedTestbed(t)
		b.ask("192.0.2.9", "POST /rooms/a", strings.Repeat("x", 10<<10))
		stream, err := b.dialFrom("192.0.2.1")
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(stream, "GET /rooms/a/stream?last=1 HTTP/1.1\r\nHost: x\r\n\r\n")
		socket := dialRawWebSocket(t, b, "/rooms/a/ws?last=1")
		synctest.Wait()
		for _, st := range b.pool.sessions {
			if st.state.Load() != stateBlocked {
				t.Fatalf("a socket without a reader is not full: %d", st.state.Load())
			}
		}
		time.Sleep(writeTimeout - time.Second)
		stream.Close()
		socket.Close()
		time.Sleep(time.Minute)
		if n, held := b.metric("dropped_total"), b.active(); n != 0 || held != 0 {
			t.Errorf("%v are counted as dropped, %d are still there", n, held)
		}
	})
}

func TestAClientThatReadsNothingIsDroppedAndASlowOneIsNot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newLimitedTestbed(t)
		ask := func(tech string) net.Conn {
			c, err := b.dialFrom("192.0.2.1")
			if err != nil {
				t.Fatal(err)
			}
			fmt.Fprintf(c, "GET /rooms/a/%s?last=100 HTTP/1.1\r\nHost: x\r\n\r\n", tech)
			return c
		}
		b.ask("192.0.2.9", "POST /rooms/a", strings.Repeat("x", 10<<10))
		var stuck []net.Conn
		for _, tech := range []string{"stream", "poll", "refresh"} {
			stuck = append(stuck, ask(tech))
		}
		slow := ask("stream")
		defer readSlowly(t, slow, 100, 9*time.Second)()
		time.Sleep(writeTimeout - time.Second)
		if n := b.metric(`connections{technique="stream"}`); n != 2 {
			t.Errorf("after 9 s %v streams are open, want 2", n)
		}
		time.Sleep(3 * time.Second)
		if n := b.metric(`connections{technique="stream"}`); n != 1 {
			t.Errorf("after 12 s %v streams are open, want the one that reads", n)
		}
		if n := b.metric("dropped_total"); n != 1 {
			t.Errorf("%v are counted as dropped, want 1", n)
		}
		if n := b.metric(`connections{technique="poll"}`) + b.metric(`connections{technique="refresh"}`); n != 0 {
			t.Errorf("%v polls that are not read are still open", n)
		}
		for _, c := range stuck {
			c.SetReadDeadline(time.Now().Add(time.Second))
			if _, err := io.ReadAll(c); err != nil {
				t.Errorf("a client that read nothing is still connected: %v", err)
			}
		}
		time.Sleep(time.Minute)
		if n := b.metric(`connections{technique="stream"}`); n != 1 {
			t.Errorf("after a minute %v streams are open, want the one that reads", n)
		}
		slow.Close()
	})
}

// readSlowly reads n bytes per pause, until stop is called.
func readSlowly(t *testing.T, c net.Conn, n int, pause time.Duration) (stop func()) {
	stopped, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for b := make([]byte, n); ; {
			if _, err := c.Read(b); err != nil {
				return
			}
			select {
			case <-time.After(pause):
			case <-stopped:
				return
			}
		}
	}()
	return func() { close(stopped); c.Close(); <-done }
}

// Nothing may follow a close frame (RFC 6455, 5.5.1), even while the library has not
// closed the connection yet.
func TestNothingFollowsACloseFrame(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newLimitedTestbed(t)
		c := dialRawWebSocket(t, b, "/rooms/a/ws")
		defer c.Close()
		synctest.Wait()
		b.pool.mu.Lock()
		st := b.pool.sessions[0]
		b.pool.mu.Unlock()
		go io.CopyN(io.Discard, c, 16) // read some, so that the session can write
		synctest.Wait()
		st.enqueueFrames(appendClose(nil, websocket.StatusNormalClosure, ""), net.ErrClosed)
		b.status("192.0.2.2", "POST /rooms/a")
		c.SetReadDeadline(time.Now().Add(time.Minute))
		data, err := io.ReadAll(c)
		if err != nil || !bytes.HasSuffix(data, appendClose(nil, websocket.StatusNormalClosure, "")) {
			t.Errorf("the socket ended with %v after %q", err, data)
		}
	})
}

func TestASlowWebSocketPublishesNothingAfterItsTokenHasExpired(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newLimitedTestbed(t, "-secret", firstSecret)
		c := dialRawWebSocket(t, b, "/rooms/a/ws?token="+signedToken(`{"read":["a"],"write":["a"],"exp":`+unixIn(20*time.Second)+`}`))
		defer c.Close()
		defer readSlowly(t, c, 1, 5*time.Second)()
		time.Sleep(time.Second)
		c.Write(maskedFrame(1, "in time"))
		time.Sleep(time.Minute)
		c.SetWriteDeadline(time.Now().Add(time.Second))
		c.Write(maskedFrame(1, "40 s after it expired"))
		time.Sleep(time.Second)
		if n := b.stats.published.Load(); n != 1 {
			t.Errorf("%d messages were published, want the one in time", n)
		}
	})
}

func TestNothingIsSentThatWasPublishedAfterATokenExpired(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newLimitedTestbed(t, "-secret", firstSecret)
		write := "Authorization: Bearer " + signedToken(`{"write":["a"]}`)
		time.Sleep(300 * time.Millisecond)
		r := b.open("192.0.2.1", "GET /rooms/a/stream?token="+signedToken(`{"read":["a"],"exp":`+unixIn(10*time.Second)+`}`), "")
		defer r.stop()
		time.Sleep(9900 * time.Millisecond)
		b.ask("192.0.2.2", "POST /rooms/a", "too late", write)
		if body := r.readAll(); strings.Contains(body, "too late") {
			t.Errorf("200 ms after the token expired:\n%s", body)
		}
	})
}

func TestASilentWebSocketThatAnswersNoPingsIsDropped(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newLimitedTestbed(t)
		c := dialRawWebSocket(t, b, "/rooms/a/ws")
		defer c.Close()
		start := time.Now()
		io.Copy(io.Discard, c) // reads everything, and sends nothing
		if d := time.Since(start); d < 3*b.heartbeat || d > 5*b.heartbeat {
			t.Errorf("it was dropped after %v; the second ping is due after four beats, 60 s", d)
		}
	})
}

// The goroutine that publishes serves a small room itself. Of a large room it serves a
// handful at most, and the order is the same for all.
func TestAPublisherServesAHandful(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestbed(t, pipe)
		var here, elsewhere atomic.Int64
		subscribe := func(room string, n int) (all []*eventReader) {
			for range n {
				all = append(all, b.subscribe(variantOf("stream"), room).begin())
			}
			synctest.Wait()
			for _, ses := range b.pool.sessions {
				plain := ses.enc.event
				ses.enc.event = func(b []byte, e *event) []byte {
					if strings.Contains(string(debug.Stack()), "publishEvent") {
						here.Add(1)
					} else {
						elsewhere.Add(1)
					}
					return plain(b, e)
				}
			}
			return all
		}
		publish := func(room string, readers []*eventReader) {
			for i := range 10 {
				publishEvent(t, b.relay, publishRequest{room: room, kind: "message", data: fmt.Appendf(nil, "%d", i)})
				for _, e := range readers {
					e.expect(fmt.Sprint("message ", i))
				}
				synctest.Wait()
			}
		}
		publish("small", subscribe("small", 3))
		if n, others := here.Load(), elsewhere.Load(); n != 30 || others != 0 {
			t.Errorf("the publisher served %d, and writers %d; want 30 and none", n, others)
		}
		here.Store(0)
		publish("large", subscribe("large", 3*wakeBatchSize))
		if n := here.Load(); n > 10*wakeBatchSize {
			t.Errorf("of %d the publisher served %d", 10*3*wakeBatchSize, n)
		}
	})
}

// A message of a WebSocket is reserved before it is read, and given back when it was
// taken, does not come whole in time, or its client leaves.
func TestAMessageIsReservedWhileItArrives(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestbed(t, pipe)
		reserved := b.limiter.receipts.inUse
		open := func() (net.Conn, *bufio.Reader) { return b.rawWebSocket("/rooms/a/ws") }
		frame := maskedFrame(1, strings.Repeat("x", 20<<10))
		for what, do := range map[string]func(c net.Conn, r *bufio.Reader){
			"the rest comes": func(c net.Conn, r *bufio.Reader) {
				c.Write(frame[10<<10:])
			},
			"it stands still": func(c net.Conn, r *bufio.Reader) {
				start := time.Now()
				rest, _ := io.ReadAll(r)
				if d := time.Since(start); d != requestTimeout || !bytes.Contains(rest, []byte("did not arrive in time")) {
					t.Errorf("after %v came %q", d, rest)
				}
			},
			"the client leaves": func(c net.Conn, r *bufio.Reader) { c.Close() },
			"it is cut off": func(c net.Conn, r *bufio.Reader) {
				b.limiter.receipts.mu.Lock()
				b.limiter.receipts.cutLate(math.MaxInt64, 1)
				b.limiter.receipts.mu.Unlock()
				if rest, _ := io.ReadAll(r); !bytes.Contains(rest, []byte{3, 0xf5}) { // 1013
					t.Errorf("ended with %q", rest)
				}
			},
		} {
			c, r := open()
			c.Write(frame[:10<<10])
			synctest.Wait()
			if n := reserved(); n != 40<<10 {
				t.Errorf("%s: half of 20 KB reserved %d bytes", what, n)
			}
			do(c, r)
			synctest.Wait()
			if n := reserved(); n != 0 {
				t.Errorf("%s: %d bytes are still reserved", what, n)
			}
			c.Close()
		}
		// Piece by piece, and small ones for nothing.
		c, _ := open()
		piece := maskedFrame(0, strings.Repeat("x", 600))
		c.Write(append([]byte{1}, piece[1:]...))
		synctest.Wait()
		if n := reserved(); n != 0 {
			t.Errorf("600 bytes reserved %d", n)
		}
		for i := range 4 {
			c.Write(append([]byte{0}, piece[1:]...))
			synctest.Wait()
			if n := reserved(); n != int64(2*600*(i+2)) {
				t.Errorf("%d bytes reserved %d", 600*(i+2), n)
			}
		}
		c.Close()
		// Beyond the budget.
		b.limiter.receipts.mu.Lock()
		b.limiter.receipts.max = 100
		b.limiter.receipts.mu.Unlock()
		c, r := open()
		go c.Write(frame)
		if rest, _ := io.ReadAll(r); !bytes.Contains(rest, []byte{3, 0xf5}) {
			t.Errorf("ended with %q", rest)
		}
		if n := b.refusals("memory"); n != 1 {
			t.Errorf("%d refusals are counted", n)
		}
		c.Close()
	})
}

// A control frame may come in the middle of a message, and the message goes on.
func TestAPingWithinAMessage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestbed(t, pipe)
		other := b.webSocket("a")
		c, r := b.rawWebSocket("/rooms/a/ws")
		first, second := maskedFrame(1, "one "), maskedFrame(0, "message")
		first[0] &^= 0x80
		go c.Write(slices.Concat(first, maskedFrame(9, "are you there?"), second))
		other.expect("message one message")
		synctest.Wait()
		var got []byte
		for !bytes.Contains(got, []byte("one message")) {
			piece := make([]byte, 4096)
			n, err := r.Read(piece)
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, piece[:n]...)
		}
		if !bytes.Contains(got, []byte("\x8a\x0eare you there?")) {
			t.Errorf("no pong in %q", got)
		}
		c.Close()
	})
}
