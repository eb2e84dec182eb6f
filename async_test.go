// Tests of the writer pool: sessions that were taken over, and full sockets.

package main

import (
	"bytes"
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
)

// A chunk may be as long as a page with fifty of the longest messages.
func TestALongChunk(t *testing.T) {
	s := newServer(newTestRelay(limits{maxBytes: 1 << 30, maxRoomBytes: 1 << 20}))
	st := &session{stream: &stream{server: s, quota: unlimited{}, headroom: chunkHeadSize}, fd: -1}
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
		publish("large", subscribe("large", 3*batchSize))
		if n := here.Load(); n > 10*batchSize {
			t.Errorf("of %d the publisher served %d", 10*3*batchSize, n)
		}
	})
}

// A session that is woken while a writer has it is served once more.
func TestASessionThatIsWokenInItsTurnGetsAnother(t *testing.T) {
	p := &writerPool{writers: runtime.GOMAXPROCS(0)} // no more are started
	ses := &session{pool: p}
	ses.state.Store(stateWriting)
	ses.wake()
	if len(p.queue) > 0 {
		t.Error("it is in the queue while a writer has it")
	}
	ses.afterWrite(nil)
	if ses.state.Load() != stateQueued || len(p.queue) != 1 {
		t.Errorf("after the turn its state is %d, and %d are in the queue", ses.state.Load(), len(p.queue))
	}
}

// A writer that ends leaves the rest of the queue to another.
func TestAWriterLeavesTheRestToAnother(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestbed(t, pipe)
		var all []*eventReader
		for range 2 * batchSize {
			all = append(all, b.subscribe(variantOf("stream"), "a").begin())
		}
		synctest.Wait()
		writers := func(n int) {
			b.pool.mu.Lock()
			b.pool.writers = n
			b.pool.mu.Unlock()
		}
		writers(math.MaxInt)
		publishEvent(t, b.relay, publishRequest{room: "a", kind: "message", data: []byte("1")})
		writers(1) // this goroutine
		go b.pool.run(1)
		for _, e := range all {
			e.expect("message 1")
		}
		synctest.Wait()
		if n := b.pool.writers; n != 0 {
			t.Errorf("there are %d writers when nothing is left", n)
		}
	})
}
