package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestTheLimitListenerAcceptsNoMoreThanItMay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newLimitedTestbed(t, "-streams", "1000", "-per-addr", "20")
		const most = 1100
		var in, out int
		var conns []net.Conn
		for i := range 2000 {
			c, err := b.dialFrom(fmt.Sprintf("198.51.%d.%d", i/20/256, i/20%256)) // 20 from each address
			if err != nil {
				t.Fatal(err)
			}
			c.SetWriteDeadline(time.Now().Add(time.Second))
			go io.WriteString(c, "GET /rooms/a/stream HTTP/1.1\r\nHost: x\r\n\r\n")
			c.SetReadDeadline(time.Now().Add(5 * time.Second))
			data := make([]byte, 1024)
			n, _ := c.Read(data)
			switch {
			case strings.Contains(string(data[:n]), "too many connections"):
				out++
				c.Close()
			case strings.HasPrefix(string(data[:n]), "HTTP/1.1 200 "), strings.Contains(string(data[:n]), errTooManyStreams.message):
				in++
				conns = append(conns, c)
			default:
				t.Fatalf("connection %d is answered %q", i, data[:n])
			}
		}
		if in != most || out != 2000-most || b.refusals("connections") != out {
			t.Errorf("%d were accepted, %d refused and %d counted; want %d and %d", in, out, b.refusals("connections"), most, 2000-most)
		}
		for _, c := range conns[:100] {
			c.Close()
		}
		time.Sleep(time.Second)
		if got := b.status("192.0.2.1", "GET /healthz"); got != 200 {
			t.Errorf("when some have gone: %d", got)
		}
		time.Sleep(idleTimeout)
		for range 3 { // and each releases its place once
			for _, r := range openStreams(b, 20, "198.51.0.0", "GET /rooms/a/stream", nil) {
				r.stop()
			}
			time.Sleep(time.Second)
		}
	})
}

func TestThoseThatStandStillGiveWayToNewcomers(t *testing.T) {
	const places = 10
	for name, text := range map[string]string{
		"in a body":         "POST /rooms/a HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nhello",
		"in a chunk":        "POST /rooms/a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nhello",
		"in a second head":  "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\nGET /he",
		"between requests":  "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n",
		"before they read":  strings.Repeat("GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n", 100),
		"in an unread body": "POST /nothing HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nhello",
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newLimitedTestbed(t)
				b.limiter.served.max = places
				var conns []net.Conn
				for i := range 3 * places {
					c, err := b.dialFrom(fmt.Sprintf("192.0.2.%d", i+1))
					if err != nil {
						t.Fatal(err)
					}
					conns = append(conns, c)
					go io.WriteString(c, text)
					if name != "before they read" {
						go io.Copy(io.Discard, c)
					}
				}
				synctest.Wait()
				start := time.Now()
				if status := b.status("198.51.100.1", "POST /rooms/a"); status != 200 {
					t.Errorf("a newcomer is answered %d", status)
				}
				if d, most := time.Since(start), 4*(stillTime+cutEvery); d == 0 || d > most {
					t.Errorf("a newcomer waited for %v, want %v at most", d, most)
				}
				for _, c := range conns {
					c.Close()
				}
				b.clientFrom("198.51.100.1").CloseIdleConnections()
				time.Sleep(time.Second)
				if after := b.held(); after != nothingHeld {
					t.Errorf("at the end there are %s", after)
				}
			})
		})
	}
}

func TestACrowdThatComesAtOnceWaitsItsTurn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newLimitedTestbed(t)
		b.limiter.served.max = 10
		answers := make(chan int)
		for i := range 500 {
			go func() {
				answers <- b.status(fmt.Sprintf("10.0.%d.%d", i/250, i%250+1), "POST /rooms/a")
			}()
		}
		start := time.Now()
		for range 500 {
			if status := <-answers; status != 200 {
				t.Errorf("one of a crowd is answered %d", status)
			}
		}
		if d := time.Since(start); d > 5*time.Second {
			t.Errorf("the last was answered after %v", d)
		}
		for _, r := range openStreams(b, 200, "10.1.0.%d", "GET /rooms/a/sse", nil) { // and these keep no place
			defer r.stop()
		}
	})
}

// A body that is refused unread must not take the answer with it: closing on unread bytes
// resets the connection. net/http half-closes it first, if it can.
func TestARefusedBodyDoesNotTakeTheAnswer(t *testing.T) {
	c, err := parseFlags(nil, testEnv(), defaultMemory)
	if err != nil {
		t.Fatal(err)
	}
	a, err := newApp(c)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	a.limiter.receipts.max = 50_000
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- serve(ctx, a, a.http(false), a.listen(l)) }()
	defer func() { stop(); <-done }()

	const waits = "GET /rooms/a/longpoll?wait=1 HTTP/1.1\r\nHost: x\r\n\r\n" // is taken over, and comes back
	for _, before := range []string{"", waits} {
		// What is too big is refused unread, and what there is no memory for.
		for status, size := range map[string]int{" 413 ": 5_000_000, " 503 ": 60_000} {
			conn, err := net.Dial("tcp", l.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			fmt.Fprintf(conn, "%sPOST /rooms/a HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n", before, size)
			conn.Write(make([]byte, 59_000))
			answers, err := io.ReadAll(conn)
			if err != nil || !strings.Contains(string(answers), status) {
				t.Errorf("a body of %d bytes: the answer is %.300q, and reading ends with %v", size, answers, err)
			}
			conn.Close()
		}
	}
}
