// HEADER

package main

import (
	"encoding/json"
	"fmt"
	"mime"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// What is asked of every technique.

var conformance = []struct {
	sentence string
	streams  bool // asked of streams only
	virtual  bool // it takes its time
	check    func(*testing.T, *testbed, variant)
}{
	{"its headers let nobody hold it back", false, false, checkHeaders},
	{"it says hello at once", true, false, checkHello},
	{"it tells what happens in its rooms, in order", false, false, checkLive},
	{"it passes over what only another technique takes", false, false, checkForeignParameters},
	{"it catches up from a cursor", false, false, checkCatchUp},
	{"it tells of a gap", false, false, checkGap},
	{"it tells signals while they last", false, true, checkSignals},
	{"its heart beats when it is silent", true, true, checkHeartbeat},
	{"it says bye after all that was published", true, false, checkBye},
	{"HEAD is answered at once, without a body", false, false, checkHead},
	{"OPTIONS tells the methods, and others are refused", false, false, checkMethods},
}

func TestTechniques(t *testing.T) {
	for _, technique := range techniques {
		if !slices.ContainsFunc(variants, func(k variant) bool { return k.technique == technique.name }) {
			t.Errorf("nobody listens to %s here", technique.name)
		}
	}
	for _, network := range []string{pipe, pipe10, pipeH2, tcp} {
		for _, k := range variants {
			if k.technique == "ws" && (network == pipe10 || network == pipeH2) || !k.streams() && network == pipe10 {
				continue
			}
			for _, c := range conformance {
				if c.streams && !k.streams() || c.virtual && network == tcp {
					continue
				}
				t.Run(network+"/"+k.name+"/"+c.sentence, func(t *testing.T) {
					runOnNetwork(t, network, func(t *testing.T) { c.check(t, newTestbed(t, network), k) })
				})
			}
		}
	}
}

func checkForeignParameters(t *testing.T, b *testbed, k variant) {
	if k.technique != "multipart" {
		e := b.subscribe(k, "a", "as=svg", "w=1", "h=1").begin()
		b.post("a", "one")
		e.expect("message one")
	}
}

func checkHeaders(t *testing.T, b *testbed, k variant) {
	e := b.subscribe(k, "a")
	var h http.Header
	if k.technique == "ws" {
		res, _ := b.do("GET", e.path, "")
		if res.StatusCode != 426 || !strings.EqualFold(res.Header.Get("Upgrade"), "websocket") {
			t.Errorf("a GET that is no WebSocket: %s %v, want 426 and Upgrade", res.Status, res.Header)
		}
		h = res.Header
	} else {
		e.next()
		h = e.res.Header
		if got := h.Get("Content-Type"); !regexp.MustCompile("^(" + k.contentType + ")$").MatchString(got) {
			t.Errorf("Content-Type: %s, want %s", got, k.contentType)
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
	if got := h.Get("Refresh"); (got == "10") != (k.technique == "refresh") {
		t.Errorf("Refresh: %q", got)
	}
	if len(h["Content-Length"]) > 0 && k.streams() && k.technique != "ws" {
		t.Errorf("a stream with Content-Length: %q", h["Content-Length"])
	}
}

func checkHello(t *testing.T, b *testbed, k variant) {
	b.post("a", "before")
	start := time.Now()
	e := b.subscribe(k, "a,b.c:d-e_F")
	h := e.next()
	checkImmediate(t, start)
	if h.kind != "hello" {
		t.Fatalf("began with %v", h)
	}
	if k.technique == "sse" && !regexp.MustCompile(`^[23]\d\d\d$`).MatchString(e.retry) {
		t.Errorf("retry: %q, want 2000 to 3999", e.retry)
	}
	if k.forPeople {
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
	// A cursor that was given is the one it goes on from.
	if h := b.subscribe(k, "a", fmt.Sprintf("after=%d", hello.ID-1)).next(); h.id != hello.ID-1 {
		t.Errorf("hello %s, want the cursor given, %d", h.json, hello.ID-1)
	}
}

func checkLive(t *testing.T, b *testbed, k variant) {
	b.post("a", "before")
	e := b.subscribe(k, "a,b").begin()
	start := time.Now()
	id := b.post("a", "one")
	got := e.expect("message one")[0]
	if !k.forPeople && (got.id != id || got.room != "a" || got.data != `"one"`) {
		t.Errorf("heard %s", got.json)
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

func checkCatchUp(t *testing.T, b *testbed, k variant) {
	type said struct {
		id         int64
		room, text string
	}
	var log []said
	say := func(room, text string) { log = append(log, said{b.post(room, text), room, text}) }
	for i := range 6 {
		say([]string{"a", "b"}[i%2], fmt.Sprintf("m%d", i))
	}
	ids := make([]string, len(log))
	for i, s := range log {
		ids[i] = fmt.Sprint(s.id)
	}
	for i, test := range []struct {
		rooms string
		after int // the index of the cursor in the log, or -1
		last  int
		ask   []string
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
		e := b.subscribe(k, test.rooms, test.ask...)
		if k.streams() {
			e.begin()
		}
		e.expect(want...)
		if want == nil {
			if !k.streams() {
				e.expect("beat")
			}
			continue
		}
		say(test.rooms[:1], fmt.Sprint("now", i)) // and goes on, with nothing in between
		e.expect(fmt.Sprint("message now", i))
		e.close()
	}
}

func checkGap(t *testing.T, b *testbed, k variant) {
	b.relay.maxEvents = 4 // are kept
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
		e := b.subscribe(k, "a", "after="+test.after)
		if k.streams() {
			e.begin()
		}
		gap := e.expect(append([]string{"gap"}, kept...)...)[0]
		want := fmt.Sprintf(`{"type":"gap","room":"a","id":%s,"data":{"reason":"%s"}}`, test.id, test.reason)
		if !k.forPeople && gap.json != want {
			t.Errorf("after %s: %s, want %s", test.after, gap.json, want)
		}
		e.close()
	}
	// Who goes on from the gap has lost nothing more, and who gave no cursor lost nothing.
	for _, ask := range []string{"after=" + ids[5], "last=4"} {
		e := b.subscribe(k, "a", ask)
		if k.streams() {
			e.begin()
		}
		e.expect(kept...)
		e.close()
	}
	// A gap is a room's: b, beside it, has lost nothing.
	e := b.subscribe(k, "a,b", "after="+ids[0])
	if k.streams() {
		e.begin()
	}
	e.expect(append(append([]string{"gap"}, kept...), "message other")...)
	e.close()
	// A stream that falls behind while it is read is told too.
	if k.streams() {
		e := b.subscribe(k, "a").begin()
		b.settle()
		b.relay.mu.Lock() // ten messages at once
		for i := range 10 {
			b.relay.publishLocked(publishRequest{room: "a", kind: "message", data: []byte(fmt.Sprintf(`"n%d"`, i))})
		}
		b.relay.mu.Unlock()
		b.relay.wake(b.relay.rooms["a"])
		e.expect("gap", "message n6", "message n7", "message n8", "message n9")
	}
}

func checkSignals(t *testing.T, b *testbed, k variant) {
	b.relay.maxEvents = 4
	before := fmt.Sprint(b.relay.lastID.Load())
	live := b.subscribe(k, "a").begin()
	for i := range 4 { // as many as are kept
		b.post("a", fmt.Sprintf("m%d", i))
		b.post("a?type=typing&ttl=5", fmt.Sprintf("s%d", i))
	}
	all := []string{"message m0", "typing s0", "message m1", "typing s1", "message m2", "typing s2", "message m3", "typing s3"}
	live.expect(all...)
	time.Sleep(4900 * time.Millisecond) // TestPublishSignal has the moment
	e := b.subscribe(k, "a", "after="+before)
	if k.streams() {
		e.begin()
	}
	e.expect(all...)
	time.Sleep(200 * time.Millisecond)
	e = b.subscribe(k, "a", "after="+before)
	if k.streams() {
		e.begin()
	}
	e.expect("message m0", "message m1", "message m2", "message m3")
	for range 50 {
		b.post("a?ttl=1", "signal") // push out no message
	}
	e = b.subscribe(k, "a", "after="+before)
	if k.streams() {
		e.begin()
	}
	e.expect("message m0", "message m1", "message m2", "message m3")
}

func checkHeartbeat(t *testing.T, b *testbed, k variant) {
	e := b.subscribe(k, "a").begin()
	since := time.Now()
	for range 40 {
		h := e.next()
		d := time.Since(since)
		since = time.Now()
		if h.kind != "beat" || d < 15*time.Second*3/4 || d > 15*time.Second {
			t.Fatalf("heard %v after %v, want a heartbeat after 11.25 to 15 s", h, d)
		}
	}
	for i := range 20 { // what is said counts as a heartbeat
		time.Sleep(7 * time.Second)
		b.post("a", fmt.Sprint(i))
		e.expect("message " + fmt.Sprint(i))
	}
	since = time.Now()
	if h, d := e.next(), time.Since(since); h.kind != "beat" || d < 15*time.Second*3/4 || d > 15*time.Second {
		t.Errorf("heard %v after %v, want a heartbeat after 11.25 to 15 s", h, d)
	}
}

func checkBye(t *testing.T, b *testbed, k variant) {
	b.relay.maxEvents = 1000
	e := b.subscribe(k, "a").begin()
	want := []string{}
	for i := range 300 { // more than one batch
		data, _ := json.Marshal(fmt.Sprint(i))
		if _, _, err := b.checkAndPublish(newPermit(), publishRequest{room: "a", kind: "message", data: data}); err != nil {
			t.Fatal(err)
		}
		want = append(want, "message "+fmt.Sprint(i))
	}
	start := time.Now() // publishers may have been held up, readers are not
	b.stop()
	if k.name == "multipart-html" {
		for h := e.next(); h.kind != "bye"; h = e.next() { // shows the last fifty, of some moments
		}
	} else {
		e.expect(want...)
		bye := e.expect("bye")[0]
		if m := regexp.MustCompile(`^{"type":"bye","data":{"retry":(\d+)}}$`).FindStringSubmatch(bye.json); !k.forPeople && m == nil {
			t.Errorf("%s", bye.json)
		} else if !k.forPeople {
			if retry, _ := strconv.Atoi(m[1]); retry < 1000 || retry > 31_000 {
				t.Errorf("retry in %d ms", retry)
			}
		}
	}
	e.expectEnd()
	checkImmediate(t, start)
}

func checkHead(t *testing.T, b *testbed, k variant) {
	b.post("a", "before")
	e := b.subscribe(k, "a", "last=1")
	start := time.Now()
	res, body := b.do("HEAD", e.path, "")
	checkImmediate(t, start)
	if body != "" {
		t.Errorf("HEAD has the body %q", body)
	}
	if k.technique == "ws" {
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
	if n := b.active(); k.streams() && n > 1 {
		t.Errorf("HEAD left %d streams", n-1)
	}
	for _, wrong := range []string{"after=x", "last=-1", "presence=2"} {
		if res, body := b.do("HEAD", e.path+"&"+wrong+"&x=", ""); res.StatusCode != 400 || body != "" {
			t.Errorf("HEAD with %s: %s %q, want 400", wrong, res.Status, body)
		}
	}
}

func checkMethods(t *testing.T, b *testbed, k variant) {
	start := time.Now()
	path := "/rooms/a/" + k.technique
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
	for _, no := range []string{k.technique + "x", strings.ToUpper(k.technique), k.technique + "/", k.technique + "/x", "%" + fmt.Sprintf("%02X", k.technique[0]) + k.technique[1:]} {
		if res, body := b.do("GET", "/rooms/a/"+no, ""); res.StatusCode != 404 || !isError(body) || !strings.Contains(body, "longpoll") {
			t.Errorf("%s: %s %q, want 404 and the techniques there are", no, res.Status, body)
		}
	}
	checkImmediate(t, start)
}
