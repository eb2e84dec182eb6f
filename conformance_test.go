// Conformance. One table lists what every technique must do, and one test walks it
// over all techniques and all ways to drive them: the writer pool of async.go, the
// loop of the core (HTTP/1.0, HTTP/2), and sockets. A second test asks the same from
// outside, of any relay that is running.

package main

import (
	"bufio"
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"mime"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"
)

// What every technique must do.

var conformance = []struct {
	sentence string
	streams  bool // applies to streams only
	virtual  bool // takes virtual time
	check    func(*testing.T, *testbed, variant)
}{
	{"its headers keep proxies and caches from holding it back", false, false, checkHeaders},
	{"it says hello at once", true, false, checkHello},
	{"it delivers the events of its rooms, in order", false, false, checkLive},
	{"it ignores parameters of other techniques", false, false, checkForeignParameters},
	{"it catches up from a cursor", false, false, checkCatchUp},
	{"it sends a gap", false, false, checkGap},
	{"it delivers signals until they expire", false, true, checkSignals},
	{"it sends heartbeats when it is silent", true, true, checkHeartbeat},
	{"it says bye after all that was published", true, false, checkBye},
	{"HEAD is answered at once, without a body", false, false, checkHead},
	{"OPTIONS lists the methods, and others are refused", false, false, checkMethods},
}

func TestTechniques(t *testing.T) {
	for _, technique := range techniques {
		if !slices.ContainsFunc(variants, func(v variant) bool { return v.technique == technique.name }) {
			t.Errorf("there is no variant for %s", technique.name)
		}
	}
	for _, network := range []string{pipe, core, pipe10, pipeH2, tcp} {
		for _, v := range variants {
			if v.technique == "ws" && (network == pipe10 || network == pipeH2) || !v.streams() && (network == core || network == pipe10) {
				continue
			}
			for _, c := range conformance {
				if c.streams && !v.streams() || c.virtual && network == tcp {
					continue
				}
				t.Run(network+"/"+v.name+"/"+c.sentence, func(t *testing.T) {
					runOnNetwork(t, network, func(t *testing.T) { c.check(t, newTestbed(t, network), v) })
				})
			}
		}
	}
}

func checkForeignParameters(t *testing.T, b *testbed, v variant) {
	if v.technique != "multipart" {
		e := b.subscribe(v, "a", "as=svg", "w=1", "h=1").begin()
		b.post("a", "one")
		e.expect("message one")
	}
}

func checkHeaders(t *testing.T, b *testbed, v variant) {
	e := b.subscribe(v, "a")
	var h http.Header
	if v.technique == "ws" {
		res, _ := b.do("GET", e.path, "")
		if res.StatusCode != 426 || !strings.EqualFold(res.Header.Get("Upgrade"), "websocket") {
			t.Errorf("a GET that is no WebSocket: %s %v, want 426 and Upgrade", res.Status, res.Header)
		}
		h = res.Header
	} else {
		e.next()
		h = e.res.Header
		if got := h.Get("Content-Type"); !regexp.MustCompile("^(" + v.contentType + ")$").MatchString(got) {
			t.Errorf("Content-Type: %s, want %s", got, v.contentType)
		}
		if h.Get("Cache-Control") != "no-store, no-transform" || h.Get("X-Accel-Buffering") != "no" {
			t.Errorf("headers %v, want Cache-Control: no-store, no-transform and X-Accel-Buffering: no", h)
		}
		if _, _, err := mime.ParseMediaType(h.Get("Content-Type")); err != nil {
			t.Error(err)
		}
	}
	if h.Get("X-Content-Type-Options") != "nosniff" || !slices.Contains([]string{"no-referrer", "same-origin"}, h.Get("Referrer-Policy")) {
		t.Errorf("headers %v, want nosniff and no referrer for others", h)
	}
	if !slices.Contains(strings.Split(strings.Join(h["Vary"], ", "), ", "), "Origin") {
		t.Errorf("Vary: %q, want Origin in it", h["Vary"])
	}
	if b.network == pipe10 && len(e.res.TransferEncoding) > 0 {
		t.Errorf("Transfer-Encoding: %q, which HTTP/1.0 does not know", e.res.TransferEncoding)
	}
	if got := h.Get("Refresh"); (got == "10") != (v.technique == "refresh") {
		t.Errorf("Refresh: %q", got)
	}
	if len(h["Content-Length"]) > 0 && v.streams() && v.technique != "ws" {
		t.Errorf("a stream with Content-Length: %q", h["Content-Length"])
	}
}

func checkHello(t *testing.T, b *testbed, v variant) {
	b.post("a", "before")
	start := time.Now()
	e := b.subscribe(v, "a,b.c:d-e_F")
	h := e.next()
	checkImmediate(t, start)
	if h.kind != "hello" {
		t.Fatalf("began with %v", h)
	}
	if v.technique == "sse" && !regexp.MustCompile(`^[23]\d\d\d$`).MatchString(e.retry) {
		t.Errorf("retry: %q, want 2000 to 3999", e.retry)
	}
	if v.forPeople {
		return
	}
	var hello struct {
		Type     string
		ID, Time int64
		Data     struct {
			Rooms    []string
			Beat     int
			Instance string
		}
	}
	d := json.NewDecoder(strings.NewReader(h.json))
	d.DisallowUnknownFields()
	if err := d.Decode(&hello); err != nil {
		t.Fatal(err)
	}
	if hello.ID != b.relay.lastID.Load() || hello.Data.Beat != 15 || hello.Data.Instance != b.instance || b.instance == "" {
		t.Errorf("hello %s", h.json)
	}
	if !slices.Equal(hello.Data.Rooms, []string{"a", "b.c:d-e_F"}) {
		t.Errorf("hello to the rooms %q", hello.Data.Rooms)
	}
	if d := time.Since(time.UnixMilli(hello.Time)); d < 0 || start.Year() == 2000 && d != 0 {
		t.Errorf("hello's time is %v ago", d)
	}
	// A subscription goes on from the cursor that was given.
	if h := b.subscribe(v, "a", fmt.Sprintf("after=%d", hello.ID-1)).next(); h.id != hello.ID-1 {
		t.Errorf("hello %s, want the cursor given, %d", h.json, hello.ID-1)
	}
}

func checkLive(t *testing.T, b *testbed, v variant) {
	b.post("a", "before")
	e := b.subscribe(v, "a,b").begin()
	start := time.Now()
	id := b.post("a", "one")
	got := e.expect("message one")[0]
	if !v.forPeople && (got.id != id || got.room != "a" || got.data != `"one"`) {
		t.Errorf("received %s", got.json)
	}
	b.post("c", "elsewhere")
	b.post("b?user=ada", "two")
	got = e.expect("message two")[0]
	if got.from != "ada" {
		t.Errorf("two is from %q", got.from)
	}
	b.post("a", "three")
	b.post("b?type=x:y", "four")
	e.expect("message three", "x:y four")
	checkImmediate(t, start)
}

func checkCatchUp(t *testing.T, b *testbed, v variant) {
	type message struct {
		id         int64
		room, text string
	}
	var log []message
	publish := func(room, text string) { log = append(log, message{b.post(room, text), room, text}) }
	for i := range 6 {
		publish([]string{"a", "b"}[i%2], fmt.Sprintf("m%d", i))
	}
	ids := make([]string, len(log))
	for i, s := range log {
		ids[i] = fmt.Sprint(s.id)
	}
	for i, test := range []struct {
		rooms      string
		after      int // the index of the cursor's message in the log, or -1
		last       int
		parameters []string
	}{
		{"a,b", 2, 0, []string{"after=" + ids[2]}},
		{"b,a", 2, 0, []string{"after=" + ids[2]}},
		{"a,b", 0, 0, []string{"after=" + ids[0]}},
		{"a,b", 3, 0, []string{"Last-Event-ID: " + ids[3]}},
		{"a,b", 4, 0, []string{"after=" + ids[0], "Last-Event-ID: " + ids[4]}},
		{"a,b", 3, 0, []string{"after=" + ids[4], "Last-Event-ID: " + ids[3]}},
		{"a,b", 4, 0, []string{"after=" + ids[4], "Last-Event-ID: "}},
		{"a,b", -1, 2, []string{"last=2"}},
		{"a,b", -1, 999, []string{"last=999"}},
		{"a,b", 3, 0, []string{"last=1", "after=" + ids[3]}},
		{"b", -1, 2, []string{"last=2"}},
		{"b", 0, 0, []string{"after=" + ids[0]}},
		{"empty", 0, 0, []string{"after=" + ids[0]}},
	} {
		var want []string
		for i, s := range log {
			if slices.Contains(strings.Split(test.rooms, ","), s.room) && i > test.after {
				want = append(want, "message "+s.text)
			}
		}
		if test.after < 0 {
			want = want[max(0, len(want)-test.last):]
		}
		e := b.subscribe(v, test.rooms, test.parameters...)
		if v.streams() {
			e.begin()
		}
		e.expect(want...)
		if want == nil {
			if !v.streams() {
				e.expect("beat")
			}
			continue
		}
		publish(test.rooms[:1], fmt.Sprint("now", i)) // and goes on, without anything in between
		e.expect(fmt.Sprint("message now", i))
		e.close()
	}
}

func checkGap(t *testing.T, b *testbed, v variant) {
	b.keep(4)
	var ids []string
	for i := range 10 {
		ids = append(ids, fmt.Sprint(b.post("a", fmt.Sprintf("m%d", i))))
	}
	b.post("b", "other")
	kept := []string{"message m6", "message m7", "message m8", "message m9"}
	for _, test := range []struct{ after, reason, id string }{
		{ids[1], "history", ids[5]},
		{ids[4], "history", ids[5]},
		{fmt.Sprint(b.relay.epoch), "history", ids[5]},
		{"0", "restart", ids[5]},
		{fmt.Sprint(b.relay.epoch - 1), "restart", ids[5]},
		{fmt.Sprint(b.relay.lastID.Load() + 1), "future", ids[5]},
		{"9223372036854775807", "future", ids[5]},
	} {
		e := b.subscribe(v, "a", "after="+test.after)
		if v.streams() {
			e.begin()
		}
		gap := e.expect(append([]string{"gap"}, kept...)...)[0]
		want := fmt.Sprintf(`{"type":"gap","room":"a","id":%s,"data":{"reason":"%s"}}`, test.id, test.reason)
		if !v.forPeople && gap.json != want {
			t.Errorf("after %s: %s, want %s", test.after, gap.json, want)
		}
		e.close()
	}
	// A client that goes on from the gap has lost nothing more; one without a cursor
	// has lost nothing.
	for _, parameters := range []string{"after=" + ids[5], "last=4"} {
		e := b.subscribe(v, "a", parameters)
		if v.streams() {
			e.begin()
		}
		e.expect(kept...)
		e.close()
	}
	// A gap belongs to one room: b has lost nothing.
	e := b.subscribe(v, "a,b", "after="+ids[0])
	if v.streams() {
		e.begin()
	}
	e.expect(append(append([]string{"gap"}, kept...), "message other")...)
	e.close()
	// A stream that falls behind while it is open is sent a gap, too.
	if v.streams() {
		e := b.subscribe(v, "a").begin()
		b.settle()
		b.relay.mu.Lock() // ten messages at once
		for i := range 10 {
			b.relay.add(publishRequest{room: "a", kind: "message", data: []byte(fmt.Sprintf(`"n%d"`, i))}, time.Now())
		}
		b.relay.unlock()
		e.expect("gap", "message n6", "message n7", "message n8", "message n9")
	}
}

func checkSignals(t *testing.T, b *testbed, v variant) {
	b.keep(4)
	before := fmt.Sprint(b.relay.lastID.Load())
	live := b.subscribe(v, "a").begin()
	for i := range 4 { // as many as the history keeps
		b.post("a", fmt.Sprintf("m%d", i))
		b.post("a?type=typing&ttl=5", fmt.Sprintf("s%d", i))
	}
	all := []string{"message m0", "typing s0", "message m1", "typing s1", "message m2", "typing s2", "message m3", "typing s3"}
	live.expect(all...)
	time.Sleep(4900 * time.Millisecond) // TestPublishSignal tests the exact moment
	e := b.subscribe(v, "a", "after="+before)
	if v.streams() {
		e.begin()
	}
	e.expect(all...)
	time.Sleep(200 * time.Millisecond)
	e = b.subscribe(v, "a", "after="+before)
	if v.streams() {
		e.begin()
	}
	e.expect("message m0", "message m1", "message m2", "message m3")
	for range 50 {
		b.post("a?ttl=1", "signal") // they push out no message
	}
	e = b.subscribe(v, "a", "after="+before)
	if v.streams() {
		e.begin()
	}
	e.expect("message m0", "message m1", "message m2", "message m3")
}

func checkHeartbeat(t *testing.T, b *testbed, v variant) {
	e := b.subscribe(v, "a").begin()
	since := time.Now()
	for range 40 {
		h := e.next()
		d := time.Since(since)
		since = time.Now()
		if h.kind != "beat" || d < 15*time.Second*3/4 || d > 15*time.Second {
			t.Fatalf("received %v after %v, want a heartbeat after 11.25 to 15 s", h, d)
		}
	}
	for i := range 20 { // an event replaces a heartbeat
		time.Sleep(7 * time.Second)
		b.post("a", fmt.Sprint(i))
		e.expect("message " + fmt.Sprint(i))
	}
	since = time.Now()
	if h, d := e.next(), time.Since(since); h.kind != "beat" || d < 15*time.Second*3/4 || d > 15*time.Second {
		t.Errorf("received %v after %v, want a heartbeat after 11.25 to 15 s", h, d)
	}
}

func checkBye(t *testing.T, b *testbed, v variant) {
	b.keep(1000)
	e := b.subscribe(v, "a").begin()
	want := []string{}
	for i := range 300 { // more than one batch
		data, _ := json.Marshal(fmt.Sprint(i))
		if _, _, err := b.checkAndPublish(newPermit(), publishRequest{room: "a", kind: "message", data: data}); err != nil {
			t.Fatal(err)
		}
		want = append(want, "message "+fmt.Sprint(i))
	}
	start := time.Now() // publishers may have been throttled; readers are not
	b.stop()
	if v.name == "multipart-html" {
		for h := e.next(); h.kind != "bye"; h = e.next() { // pages show the newest fifty messages, at some moments
		}
	} else {
		e.expect(want...)
		bye := e.expect("bye")[0]
		if m := regexp.MustCompile(`^{"type":"bye","data":{"retry":(\d+)}}$`).FindStringSubmatch(bye.json); !v.forPeople && m == nil {
			t.Errorf("%s", bye.json)
		} else if !v.forPeople {
			if retry, _ := strconv.Atoi(m[1]); retry < 1000 || retry > 31_000 {
				t.Errorf("retry in %d ms", retry)
			}
		}
	}
	e.expectEnd()
	checkImmediate(t, start)
}

func checkHead(t *testing.T, b *testbed, v variant) {
	b.post("a", "before")
	e := b.subscribe(v, "a", "last=1")
	start := time.Now()
	res, body := b.do("HEAD", e.path, "")
	checkImmediate(t, start)
	if body != "" {
		t.Errorf("HEAD has the body %q", body)
	}
	if v.technique == "ws" {
		if res.StatusCode != 426 {
			t.Errorf("HEAD: %s", res.Status)
		}
		return
	}
	e.next()
	if res.StatusCode != 200 {
		t.Errorf("HEAD: %s", res.Status)
	}
	for _, name := range []string{"Content-Type", "Cache-Control", "X-Accel-Buffering", "X-Content-Type-Options", "Vary", "Refresh"} {
		if get, head := e.res.Header.Get(name), res.Header.Get(name); get != head && !strings.HasPrefix(get, "multipart/") {
			t.Errorf("%s: %q by GET, %q by HEAD", name, get, head)
		}
	}
	if n := b.active(); v.streams() && n > 1 {
		t.Errorf("HEAD left %d streams", n-1)
	}
	for _, wrong := range []string{"after=x", "last=-1", "presence=2"} {
		if res, body := b.do("HEAD", e.path+"&"+wrong+"&x=", ""); res.StatusCode != 400 || body != "" {
			t.Errorf("HEAD with %s: %s %q, want 400", wrong, res.Status, body)
		}
	}
}

func checkMethods(t *testing.T, b *testbed, v variant) {
	start := time.Now()
	path := "/rooms/a/" + v.technique
	const allow = "GET, HEAD, OPTIONS"
	res, body := b.do("OPTIONS", path, "")
	if res.StatusCode != 204 || res.Header.Get("Allow") != allow || body != "" {
		t.Errorf("OPTIONS: %s, Allow: %s %q", res.Status, res.Header.Get("Allow"), body)
	}
	for _, method := range []string{"POST", "PUT", "PATCH", "DELETE", "TRACE", "get", "PROPFIND"} {
		res, body := b.do(method, path, "")
		if res.StatusCode != 405 || res.Header.Get("Allow") != allow || !isError(body) {
			t.Errorf("%s: %s, Allow: %s %q", method, res.Status, res.Header.Get("Allow"), body)
		}
	}
	for _, no := range []string{v.technique + "x", strings.ToUpper(v.technique), v.technique + "/", v.technique + "/x", "%" + fmt.Sprintf("%02X", v.technique[0]) + v.technique[1:]} {
		if res, body := b.do("GET", "/rooms/a/"+no, ""); res.StatusCode != 404 || !isError(body) || !strings.Contains(body, "longpoll") {
			t.Errorf("%s: %s %q, want 404 and the techniques there are", no, res.Status, body)
		}
	}
	checkImmediate(t, start)
}

// The same from outside.

// TestConformance tests a relay that is already running, with HTTP and WebSocket
// alone. It is how the core without any layer, and the relay without one of its
// layers, are tested:
//
//	COMETES_URL=http://localhost:8080 go test -run TestConformance .
//
// Without COMETES_URL it is skipped. What only a layer adds is left out where it is
// missing. Time is real here, so nothing is asserted about durations.
func TestConformance(t *testing.T) {
	address := os.Getenv("COMETES_URL")
	if address == "" {
		t.Skip("COMETES_URL is not set: the address of a relay, such as http://localhost:8080")
	}
	testConformance(t, address)
}

func testConformance(t *testing.T, address string) {
	b := newRemoteTestbed(t, address)
	b.do("GET", "/rooms/a/poll", "") // fails early if nothing answers
	lost := fillRoom(b)
	for _, v := range variants {
		switch res, _ := b.do("HEAD", "/rooms/a/"+v.technique+"?"+v.query, ""); {
		case res.StatusCode == 404:
			t.Errorf("this relay has no %s", v.technique)
		case res.StatusCode == 400 && strings.Contains(v.query, "as="):
			t.Logf("this relay has no %s", v.name)
			continue
		}
		for _, c := range remoteConformance {
			if c.streams && !v.streams() {
				continue
			}
			t.Run(v.name+"/"+c.sentence, func(t *testing.T) {
				t.Parallel()
				c.check(&remoteTest{newRemoteTestbed(t, address), v, rand.Text()[:16], lost})
			})
		}
	}
	for _, c := range remoteContract {
		t.Run(c.sentence, func(t *testing.T) {
			t.Parallel()
			c.check(newRemoteTestbed(t, address), rand.Text()[:16])
		})
	}
}

// A remoteTest is one check of one variant, in a room of its own.
type remoteTest struct {
	*testbed
	variant
	room string
	lost lostHistory
}

// A lostHistory is a room whose history has lost its oldest messages.
type lostHistory struct {
	room   string
	oldest int64 // the id of a message that is lost
	newest int64
}

// fillRoom publishes until a room drops its oldest message.
func fillRoom(b *testbed) (l lostHistory) {
	b.t.Helper()
	l.room = rand.Text()[:16]
	l.oldest = b.post(l.room, "the first")
	for i := 1; i < 100_000; i++ {
		l.newest = b.post(l.room, fmt.Sprint("message ", i))
		if i%100 > 0 {
			continue
		}
		if _, body := b.do("GET", fmt.Sprintf("/rooms/%s/poll?after=%d", l.room, l.oldest-1), ""); strings.Contains(body, `"gap"`) {
			return l
		}
	}
	b.t.Fatal("a room keeps 100,000 messages; this test is for smaller ones")
	return l
}

// open subscribes, and reads the hello of a stream.
func (r *remoteTest) open(rooms string, parameters ...string) *eventReader {
	r.t.Helper()
	e := r.subscribe(r.variant, rooms, parameters...)
	if r.streams() {
		e.begin()
	}
	return e
}

// remoteConformance is what every technique must do.
var remoteConformance = []struct {
	sentence string
	streams  bool // applies to streams only
	check    func(*remoteTest)
}{
	{"it begins with hello", true, remoteHello},
	{"it delivers live events in order", false, remoteLive},
	{"it catches up from a cursor", false, remoteCatchUp},
	{"it sends a gap for a cursor that is too old", false, remoteGap},
	{"a signal is not in the history when its time is over", false, remoteSignals},
	{"HEAD has the headers of GET", false, remoteHead},
	{"OPTIONS names the methods, and others are refused", false, remoteMethods},
	{"what it cannot take is refused", false, remoteBadQueries},
}

func remoteHello(r *remoteTest) {
	id := r.post(r.room, "before")
	h := r.subscribe(r.variant, r.room+",other").next()
	if h.kind != "hello" {
		r.t.Fatalf("it began with %v", h)
	}
	if r.forPeople {
		return
	}
	var hello struct {
		Time int64
		Data struct {
			Rooms    []string
			Beat     int
			Instance string
		}
	}
	if err := json.Unmarshal([]byte(h.json), &hello); err != nil {
		r.t.Fatal(err)
	}
	if h.id < id || hello.Time == 0 || !slices.Equal(hello.Data.Rooms, []string{r.room, "other"}) || hello.Data.Beat == 0 || hello.Data.Instance == "" {
		r.t.Errorf("hello is %s", h.json)
	}
}

func remoteLive(r *remoteTest) {
	second := r.room + ".b"
	r.post(r.room, "before")
	e := r.open(r.room + "," + second)
	if !r.streams() {
		e.expect("beat")
	}
	id := r.post(r.room, "one")
	r.post(r.room+".elsewhere", "elsewhere")
	r.post(second+"?user=ada", "two")
	r.post(r.room+"?type=x:y", "three")
	got := e.expect("message one", "message two", "x:y three")
	if !r.forPeople && (got[0].id != id || got[0].room != r.room || got[0].data != `"one"` || got[1].room != second) {
		r.t.Errorf("received %s and %s", got[0].json, got[1].json)
	}
	if got[1].from != "ada" {
		r.t.Errorf("two is from %q, want ada", got[1].from)
	}
}

func remoteCatchUp(r *remoteTest) {
	second := r.room + ".b"
	var ids []string
	var texts []string
	for i := range 6 {
		texts = append(texts, fmt.Sprint("message m", i))
		ids = append(ids, fmt.Sprint(r.post([]string{r.room, second}[i%2], fmt.Sprint("m", i))))
	}
	for _, tc := range []struct {
		parameters []string
		from       int // index of the first of texts that is due
	}{
		{[]string{"after=" + ids[2]}, 3},
		{[]string{"Last-Event-ID: " + ids[3]}, 4},
		{[]string{"lastEventId=" + ids[3]}, 4},
		{[]string{"Last-Event-ID=" + ids[3]}, 4},
		{[]string{"after=" + ids[0], "Last-Event-ID: " + ids[4]}, 5},
		{[]string{"after=" + ids[0], "lastEventId=" + ids[4]}, 5},
		{[]string{"lastEventId=" + ids[0], "Last-Event-ID: " + ids[4]}, 5},
		{[]string{"last=1000"}, 0},
		{[]string{"last=1", "after=" + ids[3]}, 4},
	} {
		e := r.open(r.room+","+second, tc.parameters...)
		e.expect(texts[tc.from:]...)
		now := fmt.Sprint("now", len(texts))
		texts, ids = append(texts, "message "+now), append(ids, fmt.Sprint(r.post(r.room, now)))
		e.expect("message " + now) // without anything in between
		e.close()
	}
}

func remoteGap(r *remoteTest) {
	one, two := r.post(r.room, "one"), r.post(r.room, "two")
	gap := func(room string, after int64, reason string) (*eventReader, received) {
		r.t.Helper()
		e := r.open(room, fmt.Sprint("after=", after))
		h := e.expect("gap")[0]
		if !r.forPeople && !strings.Contains(h.json, fmt.Sprintf(`"data":{"reason":%q}`, reason)) {
			r.t.Errorf("after %d: %s, want the reason %s", after, h.json, reason)
		}
		return e, h
	}
	for after, reason := range map[int64]string{0: "restart", one - 1_000_000_000: "restart", math.MaxInt64: "future"} {
		e, _ := gap(r.room, after, reason)
		if h := e.expect("message one", "message two")[1]; !r.forPeople && h.id != two {
			r.t.Errorf("after the gap came %s, want the id %d", h.json, two)
		}
		e.close()
	}
	if r.technique == "refresh" || r.name == "multipart-html" {
		return // a page does not show a whole history
	}
	e, h := gap(r.lost.room, r.lost.oldest-1, "history")
	defer e.close()
	for last := h; last.id != r.lost.newest && !r.forPeople; last = h {
		if h = e.next(); h.kind != "message" || h.id <= last.id {
			r.t.Fatalf("after %s came %s", last.json, h.json)
		}
	}
}

func remoteSignals(r *remoteTest) {
	after := fmt.Sprint("after=", r.post(r.room, "before"))
	r.post(r.room, "one")
	r.post(r.room+"?type=typing&ttl=60", "a signal that lasts")
	r.post(r.room+"?type=typing&ttl=1", "a signal")
	r.post(r.room, "two")
	for there := true; there; { // until it has expired by the relay's clock
		e := r.open(r.room, after)
		e.expect("message one", "typing a signal that lasts")
		h := e.next()
		if there = h.String() == "typing a signal"; there {
			h = e.next()
		}
		if h.String() != "message two" {
			r.t.Fatalf("received %v, want the second message", h)
		}
		e.close()
	}
}

func remoteHead(r *remoteTest) {
	path := "/rooms/" + r.room + "/" + r.technique + "?" + r.query
	res, body := r.do("HEAD", path, "")
	if r.technique == "ws" {
		if res.StatusCode != 426 || !strings.EqualFold(res.Header.Get("Upgrade"), "websocket") {
			r.t.Errorf("HEAD: %s %v, want 426 and Upgrade", res.Status, res.Header)
		}
		return
	}
	if res.StatusCode != 200 || body != "" {
		r.t.Errorf("HEAD: %s %q", res.Status, body)
	}
	if !regexp.MustCompile("^(" + r.contentType + ")$").MatchString(res.Header.Get("Content-Type")) {
		r.t.Errorf("Content-Type: %q, want %s", res.Header.Get("Content-Type"), r.contentType)
	}
	if res.Header.Get("Cache-Control") != "no-store, no-transform" || res.Header.Get("X-Accel-Buffering") != "no" || res.Header.Get("X-Content-Type-Options") != "nosniff" {
		r.t.Errorf("headers %v", res.Header)
	}
}

func remoteMethods(r *remoteTest) {
	path := "/rooms/" + r.room + "/" + r.technique
	const allow = "GET, HEAD, OPTIONS"
	if res, body := r.do("OPTIONS", path, ""); res.StatusCode != 204 || res.Header.Get("Allow") != allow || body != "" {
		r.t.Errorf("OPTIONS: %s, Allow: %s %q", res.Status, res.Header.Get("Allow"), body)
	}
	for _, method := range []string{"POST", "PUT", "PATCH", "DELETE"} {
		if res, body := r.do(method, path, ""); res.StatusCode != 405 || res.Header.Get("Allow") != allow || !isError(body) {
			r.t.Errorf("%s: %s, Allow: %s %q", method, res.Status, res.Header.Get("Allow"), body)
		}
	}
	if res, body := r.do("GET", path+"x", ""); res.StatusCode != 404 || !isError(body) {
		r.t.Errorf("%sx: %s %q, want 404", r.technique, res.Status, body)
	}
}

func remoteBadQueries(r *remoteTest) {
	if r.technique == "ws" {
		return // the handshake is checked before the query
	}
	for _, query := range []string{"after=x", "after=-1", "after=1&after=2", "last=-1", "presence=2", "user=%00", "user=%20", "client=a%20b", "Last-Event-ID=x"} {
		if res, body := r.do("GET", "/rooms/"+r.room+"/"+r.technique+"?"+query+"&"+r.query, ""); res.StatusCode != 400 || !isError(body) {
			r.t.Errorf("%s: %s %q, want 400", query, res.Status, body)
		}
	}
	for _, rooms := range []string{"a%20b", "a,a", "a,", strings.Repeat("x", 65)} {
		if res, body := r.do("GET", "/rooms/"+rooms+"/"+r.technique+"?"+r.query, ""); res.StatusCode != 400 || !isError(body) {
			r.t.Errorf("the rooms %s: %s %q, want 400", rooms, res.Status, body)
		}
	}
}

// remoteContract is what the relay must do beside its techniques.
var remoteContract = []struct {
	sentence string
	check    func(b *testbed, room string)
}{
	{"what is published becomes an event", remotePublish},
	{"what cannot be published is refused, and changes nothing", remotePublishErrors},
	{"a key publishes once", remoteKey},
	{"if publishes only after the newest message", remoteIf},
	{"a room is erased", remoteErase},
	{"users come, type and leave", remotePresence},
	{"a bad handshake is refused with a reason", remoteHandshake},
	{"a WebSocket publishes, and is answered", remoteWebSocket},
	{"a long-poll waits", remoteLongPoll},
	{"as=data is the data alone", remoteData},
	{"a picture of a room is sent, if there are pictures", remotePicture},
}

func remotePublish(b *testbed, room string) {
	form, formDataType := formParts("data", "hi", "user", "ada")
	for _, tc := range []struct {
		method, query, contentType, body string
		want                             string
	}{
		{"POST", "", "", "hi", `{"data":"hi","type":"message"}`},
		{"PUT", "", "", "hi", `{"data":"hi","type":"message"}`},
		{"POST", "", textType, "grüße\n", `{"data":"grüße\n","type":"message"}`},
		{"POST", "?type=x.y&user=ada", "", "hi", `{"data":"hi","from":"ada","type":"x.y"}`},
		{"POST", "", jsonType, `{"a": [1, null]}`, `{"data":{"a":[1,null]},"type":"message"}`},
		{"POST", "", "Content-Type: application/merge-patch+json", `{"a":1}`, `{"data":{"a":1},"type":"message"}`},
		{"POST", "", formType, "data=hi+there&user=ada&type=note", `{"data":"hi there","from":"ada","type":"note"}`},
		{"POST", "", formType, "only text", `{"data":"only text","type":"message"}`},
		{"POST", "", formDataType, form, `{"data":"hi","from":"ada","type":"message"}`},
	} {
		var headers []string
		if tc.contentType != "" {
			headers = []string{tc.contentType}
		}
		res, body := b.do(tc.method, "/rooms/"+room+tc.query, tc.body, headers...)
		if !regexp.MustCompile(`^{"id":[1-9]\d+}\n$`).MatchString(body) || res.StatusCode != 201 {
			b.t.Errorf("%s %s %s: %s %s", tc.method, tc.contentType, tc.body, res.Status, body)
			continue
		}
		if got := b.newest(room); !sameJSON(got, tc.want) {
			b.t.Errorf("%s %s %s became %s, want %s", tc.method, tc.contentType, tc.body, got, tc.want)
		}
	}
}

func remotePublishErrors(b *testbed, room string) {
	newest := b.post(room, "before")
	for _, tc := range []struct {
		query, header, body string
		status              int
	}{
		{"?type=hello", textType, "hi", 400},
		{"?type=a%20b", textType, "hi", 400},
		{"?user=%20", textType, "hi", 400},
		{"?user=a%E2%80%AEb", textType, "hi", 400}, // a bidirectional control
		{"?ttl=0", textType, "hi", 400},
		{"?ttl=x", textType, "hi", 400},
		{"?if=x", textType, "hi", 400},
		{"?key=" + strings.Repeat("k", 129), textType, "hi", 400},
		{"", textType, "\xff", 400},
		{"", jsonType, "{", 400},
		{"", jsonType, `{"a":1,"a":2}`, 400},
		{"", jsonType, `"\ud800"`, 400},
		{"", jsonType, `1e400`, 400},
		{"", jsonType, strings.Repeat("[", 100) + strings.Repeat("]", 100), 400},
		{"?user=bob", formType, "data=hi&user=ada", 400},
		{"?if=1", textType, "hi", 412},
		{"", textType, strings.Repeat("x", 64<<10+1), 413},
		{"", "Content-Encoding: gzip", "hi", 415},
		{"", "Content-Type: text/plain; charset=utf-16", "hi", 415},
	} {
		res, body := b.do("POST", "/rooms/"+room+tc.query, tc.body, tc.header)
		if res.StatusCode != tc.status || tc.status != 412 && !isError(body) {
			b.t.Errorf("POST %s %s %.80q: %s %s, want %d", tc.query, tc.header, tc.body, res.Status, body, tc.status)
		}
	}
	if res, body := b.do("POST", "/rooms/"+room+",other", "hi"); res.StatusCode != 400 || !isError(body) {
		b.t.Errorf("to two rooms: %s %s", res.Status, body)
	}
	if res, body := b.do("POST", "/rooms/_stats", "hi"); res.StatusCode != 403 || !isError(body) {
		b.t.Errorf("to a room of the relay's own: %s %s", res.Status, body)
	}
	if res, body := b.do("PATCH", "/rooms/"+room, "hi"); res.StatusCode != 405 || !isError(body) || res.Header.Get("Allow") != "POST, PUT, DELETE, OPTIONS" {
		b.t.Errorf("PATCH: %s, Allow: %s %s", res.Status, res.Header.Get("Allow"), body)
	}
	b.subscribe(variantOf("poll"), room, fmt.Sprint("after=", newest)).expect("beat")
}

func remoteKey(b *testbed, room string) {
	res, first := b.do("POST", "/rooms/"+room+"?key=k", "one")
	if res.StatusCode != 201 {
		b.t.Errorf("first: %s %s", res.Status, first)
	}
	if res, again := b.do("POST", "/rooms/"+room, "two", "Idempotency-Key: k"); res.StatusCode != 200 || again != first {
		b.t.Errorf("again: %s %s, want 200 and %s", res.Status, again, first)
	}
	if res, other := b.do("POST", "/rooms/"+room+"?key=other", "three"); res.StatusCode != 201 || other == first {
		b.t.Errorf("another key: %s %s", res.Status, other)
	}
	b.subscribe(variantOf("poll"), room, "last=10").expect("message one", "message three")
}

func remoteIf(b *testbed, room string) {
	conflict := func(query string, newest int64) {
		b.t.Helper()
		res, body := b.do("POST", "/rooms/"+room+query, "lost")
		var e struct {
			Error string
			ID    *int64
		}
		if json.Unmarshal([]byte(body), &e); res.StatusCode != 412 || e.Error == "" || e.ID == nil || *e.ID != newest {
			b.t.Errorf("%s: %s %s, want 412 and the id %d", query, res.Status, body, newest)
		}
	}
	conflict("?if=1", 0)
	first := b.post(room+"?if=0&key=k", "one")
	conflict("?if=0", first)
	second := b.post(fmt.Sprintf("%s?if=%d", room, first), "two")
	conflict(fmt.Sprintf("?if=%d", first), second)
	b.post(room+"?ttl=60", "a signal") // not a message
	b.post(fmt.Sprintf("%s?if=%d", room, second), "three")
	if res, body := b.do("POST", "/rooms/"+room+"?if=0&key=k", "one"); res.StatusCode != 200 || body != fmt.Sprintf("{\"id\":%d}\n", first) {
		b.t.Errorf("a known key: %s %s, want 200 and the id %d", res.Status, body, first)
	}
}

func remoteErase(b *testbed, room string) {
	before := b.post(room, "secret")
	e := b.subscribe(variantOf("stream"), room).begin()
	res, body := b.do("DELETE", "/rooms/"+room, "")
	if res.StatusCode == 401 || res.StatusCode == 403 {
		b.t.Skip("this test is no operator: ", body)
	}
	if res.StatusCode != 204 {
		b.t.Fatalf("%s %s", res.Status, body)
	}
	b.post(room, "later")
	if gap := e.expect("gap", "message later")[0]; !strings.Contains(gap.json, `"erased"`) {
		b.t.Errorf("the gap is %s", gap.json)
	}
	b.subscribe(variantOf("poll"), room, "last=10").expect("message later")
	b.subscribe(variantOf("poll"), room, fmt.Sprint("after=", before-1)).expect("gap", "message later")
}

func remotePresence(b *testbed, room string) {
	path := "/rooms/" + room + "/presence"
	ada := b.subscribe(variantOf("stream"), room, "user=ada").begin()
	if h := ada.next(); h.kind != "presence" || !sameJSON(h.data, `{"count":1,"users":{"ada":"online"}}`) {
		b.t.Fatalf("the roster is %s", h.json)
	}
	expect := func(state string) {
		b.t.Helper()
		if h := ada.next(); h.kind != "presence" || h.from != "bob" || h.text != state {
			b.t.Fatalf("received %s, want that bob is %s", h.json, state)
		}
	}
	bob := b.subscribe(variantOf("ws"), room, "user=bob", "client=one")
	expect("online")
	if res, body := b.do("POST", path+"?user=bob&client=one", "typing"); res.StatusCode != 200 || !sameJSON(body, fmt.Sprintf(`{"room":%q,"user":"bob","state":"typing"}`, room)) {
		b.t.Errorf("%s %s", res.Status, body)
	}
	expect("typing")
	if _, body := b.do("GET", path, ""); !sameJSON(body, fmt.Sprintf(`{"room":%q,"count":2,"users":{"ada":"online","bob":"typing"}}`, room)) {
		b.t.Errorf("present are %s", body)
	}
	b.do("POST", path+"?user=bob&client=one", `{"state":"offline"}`, jsonType)
	expect("offline")
	bob.close()
	for _, query := range []string{"", "?user=%20", "?user=bob"} {
		state := map[bool]string{true: "away", false: "elsewhere"}[query != "?user=bob"]
		if res, body := b.do("POST", path+query, state); res.StatusCode != 400 || !isError(body) {
			b.t.Errorf("%s is %s: %s %s, want 400", query, state, res.Status, body)
		}
	}
}

func remoteWebSocket(b *testbed, room string) {
	other := b.subscribe(variantOf("stream"), room).begin()
	e := b.webSocket(room, "user=ada")
	reply := func(kind string) received { // events may come before it
		b.t.Helper()
		h := e.next()
		for h.kind != kind {
			h = e.next()
		}
		return h
	}
	e.send("as it is")
	if h := other.expect("message as it is")[0]; h.from != "ada" {
		b.t.Errorf("received %s, want it from ada", h.json)
	}
	e.send(`{"type":"note","data":{"n":1},"key":"k"}`)
	h := other.expect(`note {"n":1}`)[0]
	if ack := reply("ack"); ack.json != fmt.Sprintf(`{"type":"ack","key":"k","id":%d}`, h.id) {
		b.t.Errorf("the ack of %s is %s", h.json, ack.json)
	}
	e.send(`{"data":1,"key":"k"}`)
	if ack := reply("ack"); ack.id != h.id {
		b.t.Errorf("the ack of a known key is %s", ack.json)
	}
	for _, wrong := range []string{`{"type":"hello"}`, `{"data":`, `{"ttl":0}`, `{"room":"_stats","data":1}`, `{"data":1e400}`, `{"type":"presence","data":"elsewhere"}`} {
		e.send(wrong)
		if h := reply("error"); len(h.text) < 10 {
			b.t.Errorf("%s is answered with %s", wrong, h.json)
		}
	}
	e.send(`{"data":"lost","key":"x","if":1}`)
	if h := reply("error"); !strings.HasPrefix(h.json, fmt.Sprintf(`{"type":"error","key":"x","id":%d,`, b.cursorOf(room))) {
		b.t.Errorf("if is answered with %s", h.json)
	}
	e.send(`{"room":"` + room + `.other","data":"elsewhere","ttl":60}`)
	e.send("still open")
	other.expect("message still open")
}

// cursorOf returns the id of a room's newest message.
func (b *testbed) cursorOf(room string) int64 {
	b.t.Helper()
	return b.subscribe(variantOf("poll"), room, "last=1").next().id
}

func remoteHandshake(b *testbed, room string) {
	const version, key = "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="
	for _, tc := range []struct {
		status  int
		headers []string
	}{
		{426, []string{}},
		{426, []string{"Upgrade: websocket", version, key}},
		{426, []string{"Connection: Upgrade", "Upgrade: h2c", version, key}},
		{400, []string{"Connection: Upgrade", "Upgrade: websocket", version}},
		{400, []string{"Connection: Upgrade", "Upgrade: websocket", key}},
		{400, []string{"Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 8", key}},
		{400, []string{"Connection: Upgrade", "Upgrade: websocket", version, "Sec-WebSocket-Key: short"}},
	} {
		res, body := b.do("GET", "/rooms/"+room+"/ws", "", tc.headers...)
		if res.StatusCode != tc.status || !isError(body) {
			b.t.Errorf("%q: %s %q, want %d", tc.headers, res.Status, body, tc.status)
		}
	}
}

func remoteLongPoll(b *testbed, room string) {
	for _, name := range []string{"longpoll", "jsonp"} {
		e := b.subscribe(variantOf(name), room, "wait=25", fmt.Sprint("after=", b.cursor()))
		answered := make(chan error)
		go func() { answered <- e.read(e) }()
		b.post(room, name)
		if err := <-answered; err != nil {
			b.t.Fatal(err)
		}
		e.expect("message " + name)
	}
}

func remoteData(b *testbed, room string) {
	res, err := b.client.Get(b.url + "/rooms/" + room + "/sse?as=data")
	if err != nil {
		b.t.Fatal(err)
	}
	defer res.Body.Close()
	conn, _, err := websocket.Dial(context.Background(), "ws"+strings.TrimPrefix(b.url, "http")+"/rooms/"+room+"/ws?as=data", nil)
	if err != nil {
		b.t.Fatal(err)
	}
	defer conn.CloseNow()
	lines := bufio.NewScanner(res.Body)
	for lines.Scan() && lines.Text() != "" { // the hello
	}
	id := b.post(room, "two\nlines")
	for _, want := range []string{"data: two", "data: lines", fmt.Sprint("id: ", id), ""} {
		if !lines.Scan() || lines.Text() != want {
			b.t.Fatalf("sse: %q, want %q", lines.Text(), want)
		}
	}
	if _, data, err := conn.Read(context.Background()); err != nil || string(data) != "two\nlines" {
		b.t.Errorf("ws: %q %v", data, err)
	}
}

func remotePicture(b *testbed, room string) {
	path := "/rooms/" + room + "/multipart?as=svg"
	if res, _ := b.do("HEAD", path, ""); res.StatusCode == 400 {
		b.t.Skip("this relay has no pictures")
	}
	b.post(room, "in the picture")
	e := b.subscribe(variantOf("multipart"), room, "as=svg")
	_, boundary, _ := strings.Cut(e.res.Header.Get("Content-Type"), "boundary=")
	next := "\r\n--" + boundary + "\r\nContent-Type: image/svg+xml\r\n\r\n"
	if err := e.copyUntil(io.Discard, next[2:]); err != nil {
		b.t.Fatal(err)
	}
	var picture strings.Builder
	if err := e.copyUntil(&picture, next); err != nil || !strings.HasPrefix(picture.String(), "<svg ") || !strings.Contains(picture.String(), "in the picture") {
		b.t.Errorf("the picture is %s, %v", &picture, err)
	}
}
