// Tests of counting, of /metrics, of the room _stats, and of the list of rooms.

package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// An operator can list the rooms and erase one.
func TestRoomsAreListedAndErased(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newLimitedTestbed(t)
		const here, local = "127.0.0.1", "Host: 127.0.0.1:8080"
		list := func(query string) string {
			_, body := b.ask(here, "GET /rooms"+query, "", local)
			return body
		}
		if got := list(""); got != `{"more":false,"rooms":[]}`+"\n" {
			t.Errorf("of a relay without rooms: %s", got)
		}
		start := b.relay.epoch
		b.relay.publish(publishRequest{room: "a", kind: "message", data: []byte(`"one"`)})
		time.Sleep(time.Second)
		b.relay.publish(publishRequest{room: "b", kind: "message", data: []byte(`"two"`)})
		time.Sleep(time.Second)
		b.relay.publish(publishRequest{room: "a", kind: "typing", data: []byte(`true`), ttl: time.Minute})
		watcher := b.open(here, "GET /rooms/b,c/stream?user=ada", "")
		picture := b.open(here, "GET /rooms/a/multipart?as=svg", "")
		synctest.Wait()
		var got struct {
			Rooms []roomStatus
			More  bool
		}
		json.Unmarshal([]byte(list("")), &got)
		for i := range got.Rooms {
			if got.Rooms[i].Bytes < eventOverhead {
				t.Errorf("%+v", got.Rooms[i])
			}
			got.Rooms[i].Bytes = 0
		}
		ms := start / 1000
		if want := []roomStatus{{"c", 1, 1, 0, 0, 0, ms + 2000}, {"b", 1, 1, 1, 0, start + 2, ms + 2000}, {"a", 1, 0, 1, 0, start + 1, ms + 2000}}; !slices.Equal(got.Rooms, want) {
			t.Errorf("%+v\nwant %+v", got.Rooms, want)
		}
		if got := list("?prefix=b"); !strings.Contains(got, `"b"`) || strings.Contains(got, `"a"`) {
			t.Errorf("those that begin with b: %s", got)
		}
		if r, body := b.ask(here, "GET /rooms?prefix=a&prefix=b", "", local); r.StatusCode != 400 {
			t.Errorf("%d %s", r.StatusCode, body)
		}
		for _, room := range []string{"b", "nobody", "b"} {
			if r, body := b.ask(here, "DELETE /rooms/"+room, "", local); r.StatusCode != 204 || body != "" {
				t.Errorf("%s is erased: %d %s", room, r.StatusCode, body)
			}
		}
		for path, status := range map[string]int{"/rooms/a,b": 400, "/rooms/_stats": 403, "/rooms/no%20name": 400, "/rooms/a/poll": 405} {
			if r, _ := b.ask(here, "DELETE "+path, "", local); r.StatusCode != status {
				t.Errorf("DELETE %s: %d, want %d", path, r.StatusCode, status)
			}
		}
		if got := list("?prefix=b"); !strings.Contains(got, `"messages":0`) || !strings.Contains(got, `"newest":0`) || !strings.Contains(got, `"users":1`) {
			t.Errorf("of an erased room: %s", got)
		}
		if r, _ := b.ask(here, "POST /rooms/b?if=0", "first again"); r.StatusCode != 201 {
			t.Errorf("publish to it again: %d", r.StatusCode)
		}
		watcher.stop()
		picture.stop()
		for i := range maxListed {
			b.relay.publish(publishRequest{room: fmt.Sprint("x", i), kind: "message", data: []byte(`1`)})
		}
		if got := list(""); strings.Count(got, `"room":`) != maxListed || !strings.HasPrefix(got, `{"more":true,"rooms":[{"room":"x999",`) {
			t.Errorf("of many: %d, %.60s", strings.Count(got, `"room":`), got)
		}
	})
}

// The declared length of a request is not counted, only what arrives.
func TestOnlyReceivedBytesAreCounted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestbed(t, pipe)
		conn, _ := b.dial(t.Context())
		fmt.Fprint(conn, "POST /rooms/a HTTP/1.1\r\nHost: cometes.test\r\nContent-Length: 9000000000000000000\r\n\r\n")
		if res, err := http.ReadResponse(bufio.NewReader(conn), nil); err != nil || res.StatusCode != 413 {
			t.Fatal(res, err)
		}
		if n := b.stats.publishedBytes.Load(); n < 50 || n > 500 {
			t.Errorf("%d bytes are counted, want those of the head", n)
		}
		before := b.stats.publishedBytes.Load()
		b.do("POST", "/rooms/a", strings.Repeat("x", 10_000))
		if n := b.stats.publishedBytes.Load() - before; n < 10_000 || n > 10_500 {
			t.Errorf("%d bytes are counted of a request with a body of 10000", n)
		}
	})
}

// The room _stats is the relay's own, and not subject to the rate of others.
func TestStatsAreNotRateLimited(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestbed(t, pipe, func(c *config) { c.roomRate = 0.1 })
		e := b.subscribe(variantOf("stream"), "_stats").begin()
		for range 5 {
			if h := e.next(); h.kind != "stats" {
				t.Fatalf("received %v, want stats", h)
			}
		}
	})
}
