// Tests of the pictures.

package main

import (
	"bufio"
	"encoding/base64"
	"fmt"
	"io"
	"net/http/httptest"
	"strings"
	"sync"
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

// What is kept for a picture is the picture, and not the messages that it shows.
func TestAPictureKeepsLittle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestbed(t, pipe)
		e := b.subscribe(variantOf("multipart"), "a", "as=svg", "w=2000")
		for range drawMessages {
			b.post("a", strings.Repeat("word ", 12_000))
		}
		time.Sleep(time.Second)
		b.pictures.log.mu.Lock()
		kept := b.pictures.log.bytes
		b.pictures.log.mu.Unlock()
		b.pictures.mu.Lock()
		defer b.pictures.mu.Unlock()
		if kept == 0 || kept > 12*300+2_000 || kept > b.pictures.bytes { // so many lines are shown
			t.Errorf("%d messages of 60 KB are kept as %d bytes; %d are counted", drawMessages, kept, b.pictures.bytes)
		}
		e.close()
	})
}

// A graph shows the numbers of a room whose messages are numbers for the most part; each of
// the others is counted once. Other types are not shown.
func TestAGraphOfNumbers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestbed(t, pipe)
		e := b.subscribe(variantOf("multipart"), "a", "as=svg")
		for range 9 {
			b.do("POST", "/rooms/a?type=note", "nothing")
		}
		for _, text := range []string{"1", "nothing", "2", "3", "4e1"} {
			b.post("a", text)
			time.Sleep(time.Second)
		}
		if n := b.stats.skipped.Load(); n != 1 {
			t.Errorf("%d messages are counted that are no numbers, want 1", n)
		}
		history := b.pictures.log.rooms["a 480 240"].history.Load()
		if svg := string(history.messages.events[0].json); !strings.Contains(svg, "<path") || !strings.Contains(svg, ">40</text>") || strings.Contains(svg, "nothing") {
			t.Errorf("the picture of numbers is %s", svg)
		}
		b.relay.erase("a")
		time.Sleep(time.Second)
		history = b.pictures.log.rooms["a 480 240"].history.Load()
		if svg := string(history.messages.events[0].json); !strings.Contains(svg, "Nothing was said yet") {
			t.Errorf("the picture of an erased room is %s", svg)
		}
		e.close()
	})
}

// The least that is taken for an image of each type, with bytes behind it that are no text.
var testImages = map[string]string{
	"image/png":  "\x89PNG\r\n\x1a\n\x00\xff\r\n--",
	"image/jpeg": "\xff\xd8\xff\xe0\x00\"\\",
	"image/gif":  "GIF89a\x00<script>",
	"image/webp": "RIFF\x00\x00\x00\x00WEBPVP8 \x80",
}

func dataURL(contentType, image string) string {
	return "data:" + contentType + ";base64," + base64.StdEncoding.EncodeToString([]byte(image))
}

// A published image becomes an event whose data is a data: URL. What is not an image of
// the four types, by its name and by its first bytes, is refused.
func TestPublishedImages(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestbed(t, pipe)
		for contentType, image := range testImages {
			for _, method := range []string{"POST", "PUT"} {
				if res, body := b.do(method, "/rooms/a?user=ada", image, "Content-Type: "+contentType); res.StatusCode != 201 {
					t.Fatalf("%s of %s: %s %s", method, contentType, res.Status, body)
				}
				if e := b.newest("a"); e != `{"data":"`+dataURL(contentType, image)+`","from":"ada","type":"image"}` {
					t.Errorf("%s: the event is %s", contentType, e)
				}
			}
			for other := range testImages {
				if res, _ := b.do("POST", "/rooms/a", image, "Content-Type: "+other); (res.StatusCode == 201) != (other == contentType) {
					t.Errorf("%s as %s: %s", contentType, other, res.Status)
				}
			}
		}
		if b.do("POST", "/rooms/a?type=photo", testImages["image/png"], "Content-Type: image/png"); !strings.Contains(b.newest("a"), `"type":"photo"`) {
			t.Errorf("with a type of its own the event is %s", b.newest("a"))
		}
		for _, contentType := range []string{"image/svg+xml", "image/bmp", "image/x+json", "image/", "image/PNG"} {
			body := "<svg xmlns='http://www.w3.org/2000/svg'/>"
			if res, answer := b.do("POST", "/rooms/b", body, "Content-Type: "+contentType); res.StatusCode != 415 || !isError(answer) {
				t.Errorf("%s: %s %s", contentType, res.Status, answer)
			}
		}
		w := newDeadlineRecorder()
		r := httptest.NewRequest("POST", "/rooms/a", strings.NewReader(testImages["image/png"]))
		r.Header.Set("Content-Type", "image/png")
		if newServer(newRelay(defaultLimits)).ServeHTTP(w, r); w.Code != 415 {
			t.Errorf("the core alone answers %d", w.Code)
		}
		if res, _ := b.do("POST", "/rooms/b", "", "Content-Type: image/png"); res.StatusCode != 415 {
			t.Errorf("an image without bytes: %s", res.Status)
		}
		big := testImages["image/png"] + strings.Repeat("x", 64<<10)
		if res, _ := b.do("POST", "/rooms/b", big[:64<<10], "Content-Type: image/png"); res.StatusCode != 201 {
			t.Errorf("an image of 64 KB: %s", res.Status)
		}
		if res, _ := b.do("POST", "/rooms/b", big[:64<<10+1], "Content-Type: image/png"); res.StatusCode != 413 {
			t.Errorf("an image of more: %s", res.Status)
		}
	})
}

// An imageReader reads multipart?as=image.
type imageReader struct {
	t    *testing.T
	r    *bufio.Reader
	next string // before each part but the first
}

func (b *testbed) readImages(t *testing.T, path string) *imageReader {
	t.Helper()
	res, err := b.client.Get(b.url + path)
	if err != nil {
		t.Fatal(err)
	}
	_, boundary, ok := strings.Cut(res.Header.Get("Content-Type"), "multipart/x-mixed-replace; boundary=")
	if res.StatusCode != 200 || !ok {
		t.Fatalf("%s: %s %v", path, res.Status, res.Header)
	}
	t.Cleanup(func() { res.Body.Close() })
	r := &imageReader{t, bufio.NewReader(res.Body), "\r\n--" + boundary + "\r\n"}
	if first := r.until(r.next[2:]); first != "" {
		t.Fatalf("before the first boundary is %q", first)
	}
	return r
}

// until reads to the end of mark, and returns what is before it.
func (r *imageReader) until(mark string) string {
	r.t.Helper()
	var b strings.Builder
	for !strings.HasSuffix(b.String(), mark) {
		c, err := r.r.ReadByte()
		if err != nil {
			r.t.Fatalf("after %q: %v", b.String(), err)
		}
		b.WriteByte(c)
	}
	return strings.TrimSuffix(b.String(), mark)
}

// part returns the type and the bytes of a part, when it is complete.
func (r *imageReader) part() string {
	r.t.Helper()
	head := r.until("\r\n\r\n")
	_, contentType, _ := strings.Cut(head, "Content-Type: ")
	return contentType + " " + r.until(r.next)
}

// multipart?as=image pushes images with their types and bytes: the newest at once, then
// each as it comes. Other events are left out.
func TestPushedImages(t *testing.T) {
	for _, network := range []string{pipe, core, pipe10, pipeH2} {
		t.Run(network, func(t *testing.T) {
			runOnNetwork(t, network, func(t *testing.T) {
				b := newTestbed(t, network)
				publish := func(room, contentType, more string) string {
					t.Helper()
					if res, body := b.do("POST", "/rooms/"+room, testImages[contentType]+more, "Content-Type: "+contentType); res.StatusCode != 201 {
						t.Fatal(res.Status, body)
					}
					return contentType + " " + testImages[contentType] + more
				}
				json := func(data string) { b.do("POST", "/rooms/a?type=image", data, "Content-Type: application/json") }
				publish("a", "image/png", "old")
				newest := publish("a", "image/png", "new")
				for range 20 {
					b.post("a", "text")
				}
				for _, no := range []string{`"text"`, `7`, `{"image":"x"}`, `"data:image/png;base64,"`, `"data:image/png;base64,$$$$"`, `"data:text/html;base64,PGI+"`, `"` + dataURL("image/png", "<script>") + `"`, `"` + dataURL("image/svg+xml", "<svg/>") + `"`} {
					json(no)
				}
				start := time.Now()
				r := b.readImages(t, "/rooms/a/multipart?as=image&user=ada")
				expect := func(want string) {
					t.Helper()
					if got := r.part(); got != want {
						t.Fatalf("%s: %q, and not %q", network, got, want)
					}
				}
				expect(newest)
				b.post("a", "text")
				expect(publish("a", "image/png", "newer"))
				json(strings.ReplaceAll(`"`+dataURL("image/png", testImages["image/png"]+"???")+`"`, "/", `\/`)) // as PHP writes it
				expect("image/png " + testImages["image/png"] + "???")
				checkImmediate(t, start)

				jpeg := publish("a", "image/jpeg", "")
				expect("image/png " + testImages["image/jpeg"]) // its head went out before
				expect(jpeg)
				start = time.Now()
				expect(jpeg)
				if silence := time.Since(start); silence < b.heartbeat/2 || silence > b.heartbeat {
					t.Errorf("the heartbeat came after %v", silence)
				}
				b.relay.erase("a")
				var later sync.WaitGroup
				later.Go(func() { time.Sleep(3 * b.heartbeat); publish("a", "image/jpeg", "last") })
				expect("image/jpeg " + testImages["image/jpeg"] + "last") // meanwhile there was nothing to repeat
				later.Wait()
			})
		})
	}
}

// Parameters of multipart?as=image, and what a viewer is sent who is slow, or early.
func TestImageViewers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestbed(t, pipe)
		publish := func(room, more string) (part string, id int64) {
			b.do("POST", "/rooms/"+room, testImages["image/gif"]+more, "Content-Type: image/gif")
			return "image/gif " + testImages["image/gif"] + more, b.relay.lastID.Load()
		}
		early := b.readImages(t, "/rooms/a,b/multipart?as=image")
		var later sync.WaitGroup
		later.Go(func() { time.Sleep(2 * b.heartbeat); publish("b", "1") })
		if head := early.until("\r\n\r\n"); !strings.Contains(head, "\r\nX-Beat: 1\r\n") || !strings.HasSuffix(head, "\r\nContent-Type: image/gif") || len(head) < 1024 {
			t.Errorf("the head of the first image is %q", head)
		}
		early.until(early.next)
		later.Wait()

		_, id := publish("a", "2")
		newest, _ := publish("b", "3")
		for _, path := range []string{"/rooms/a,b/multipart?as=image", "/rooms/b/multipart?as=image&last=1",
			fmt.Sprintf("/rooms/a,b/multipart?as=image&after=%d", id),
			fmt.Sprintf("/rooms/b/multipart?as=image&after=%d", id+1000)} { // not from this log: all that there is
			if got := b.readImages(t, path).part(); got != newest {
				t.Errorf("%s: first comes %q, and not %q", path, got, newest)
			}
		}
		r := b.readImages(t, "/rooms/b/multipart?as=image&last=0")
		newest, _ = publish("b", "4")
		if got := r.part(); got != newest {
			t.Errorf("with last=0 first comes %q, and not %q", got, newest)
		}
		time.Sleep(time.Second)
		for i := range 300 { // while early reads nothing
			newest, _ = publish("b", fmt.Sprint("n", i))
		}
		n := 1
		for early.part() != newest {
			n++
		}
		if n > 5 {
			t.Errorf("a slow viewer was sent %d images of 300", n)
		}
		if res, _ := b.do("HEAD", "/rooms/a/multipart?as=image", ""); res.StatusCode != 200 || !strings.HasPrefix(res.Header.Get("Content-Type"), "multipart/x-mixed-replace") {
			t.Errorf("HEAD: %s %v", res.Status, res.Header)
		}
	})
}
