// Tests of WebSockets that the writer pool serves: frames, replies, pings, and messages on
// the budget.

package main

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"math"
	"net"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coder/websocket"
)

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

// A client whose message is refused reads why, although it is still sending.
func TestARefusedMessageDoesNotTakeTheCloseFrame(t *testing.T) {
	b := newTestbed(t, tcp)
	conn, r := b.rawWebSocket("/rooms/a/ws?as=data")
	defer conn.Close()
	const size = 5_000_000
	frame := binary.BigEndian.AppendUint64([]byte{0x81, 0x80 | 127}, size)
	go conn.Write(append(frame, make([]byte, 4+size)...))
	answer, err := io.ReadAll(r)
	if want := closeFrame(errLongMessage.Code, errLongMessage.Reason); !bytes.Equal(answer, want) || err != nil {
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
		st := &session{stream: &stream{server: b.server, technique: b.technique("ws"), quota: unlimited{}, enc: frames(&request{})}, ws: &webSocket{proxied: test.proxied}, fd: -1}
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
		st := &session{ws: &webSocket{}, fd: -1, stream: &stream{server: b.server, technique: b.techniques[len(b.techniques)-1], enc: frames(&request{}), quota: unlimited{}, headroom: maxFrameHead, expiresAt: math.MaxInt64}}
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
		st.enqueueFrames(closeFrame(websocket.StatusNormalClosure, ""), net.ErrClosed)
		b.status("192.0.2.2", "POST /rooms/a")
		c.SetReadDeadline(time.Now().Add(time.Minute))
		data, err := io.ReadAll(c)
		if err != nil || !bytes.HasSuffix(data, closeFrame(websocket.StatusNormalClosure, "")) {
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
