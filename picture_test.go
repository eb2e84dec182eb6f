// Tests of the pictures.

package main

import (
	"fmt"
	"io"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// multipart?as=svg is a picture of the room: one at once, and a new one after each
// change, at most ten a second, drawn while somebody watches.
func TestPicture(t *testing.T) {
	for _, network := range []string{pipe, pipe10, pipeH2} {
		t.Run(network, func(t *testing.T) {
			runOnNetwork(t, network, func(t *testing.T) {
				b := newTestbed(t, network)
				b.post("a", "early </text><script>")
				start := time.Now()
				e := b.subscribe(variantOf("multipart"), "a", "as=svg", "w=300", "h=200")
				checkImmediate(t, start)
				_, boundary, _ := strings.Cut(e.res.Header.Get("Content-Type"), "boundary=")
				mark := "\r\n--" + boundary + "\r\nContent-Type: image/svg+xml\r\n\r\n"
				if err := e.copyUntil(io.Discard, mark[2:]); err != nil {
					t.Fatal(err)
				}
				picture := func() string {
					var b strings.Builder
					if err := e.copyUntil(&b, mark); err != nil {
						t.Fatal(err)
					}
					return strings.TrimLeft(b.String(), "\r\n")
				}
				first := picture()
				checkImmediate(t, start)
				if len(first) < 1024 {
					t.Errorf("the first picture has %d bytes; Chromium waits for 1024 before it shows one of another origin", len(first))
				}
				if !strings.HasPrefix(first, "<svg ") || !strings.Contains(first, `width="300" height="200"`) || !strings.Contains(first, "early") || strings.Contains(first, "<script") {
					t.Errorf("the first picture is %s", first)
				}
				time.Sleep(time.Second)
				start = time.Now()
				b.post("a", "later")
				if p := picture(); !strings.Contains(p, "later") {
					t.Errorf("the second picture is %s", p)
				}
				checkImmediate(t, start)
				for i := range 100 { // within five seconds
					time.Sleep(50 * time.Millisecond)
					b.post("a", fmt.Sprint("n", i))
				}
				start = time.Now()
				n := 1
				for !strings.Contains(picture(), "n99") {
					n++
				}
				if time.Since(start) > 100*time.Millisecond || n > 51 {
					t.Errorf("%d pictures of a hundred messages in five seconds, the last after %v", n, time.Since(start))
				}
				e.close()
				b.disconnect()
				b.settle()
				if b.checkIdle(); len(b.pictures.renderers) != 0 {
					t.Errorf("%d pictures are still drawn", len(b.pictures.renderers))
				}
			})
		})
	}
}

// A picture keeps what it draws of a message, and not the message.
func TestAPictureKeepsLittle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestbed(t, pipe)
		e := b.subscribe(variantOf("multipart"), "a", "as=svg", "w=2000")
		for range drawMessages {
			b.post("a", strings.Repeat("word ", 12_000))
		}
		time.Sleep(time.Second)
		b.pictures.mu.Lock()
		defer b.pictures.mu.Unlock()
		kept := 0
		for _, c := range b.pictures.renderers {
			c.mu.Lock()
			for _, p := range c.points {
				kept += len(p.from) + len(p.text)
			}
			c.mu.Unlock()
		}
		if kept == 0 || kept > drawMessages*300 {
			t.Errorf("%d messages of 60 KB are kept as %d bytes", drawMessages, kept)
		}
		e.close()
	})
}
