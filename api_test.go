// Tests of the interface: what is taken and becomes which event, what is
// refused and changes nothing, and who may ask.

package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	mimemultipart "mime/multipart"
	"net/http"
	"net/url"
	"reflect"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

const (
	formKind = "Content-Type: application/x-www-form-urlencoded"
	jsonKind = "Content-Type: application/json"
	textKind = "Content-Type: text/plain"
)

// newest is the newest event of a room, without id and time.
func (b *testbed) newest(room string) string {
	b.t.Helper()
	_, body := b.do("GET", "/rooms/"+room+"/poll?last=1", "")
	var answer struct{ Events []map[string]any }
	if err := json.Unmarshal([]byte(body), &answer); err != nil || len(answer.Events) != 1 {
		b.t.Fatalf("%v: %s", err, body)
	}
	e := answer.Events[0]
	for _, name := range []string{"id", "time", "room"} {
		if e[name] == nil {
			b.t.Errorf("no %s: %s", name, body)
		}
		delete(e, name)
	}
	line, _ := json.Marshal(e)
	return string(line)
}

// formParts is a multipart form, and its content type.
func formParts(fields ...string) (body, kind string) {
	var b bytes.Buffer
	w := mimemultipart.NewWriter(&b)
	for i := 0; i < len(fields); i += 2 {
		w.WriteField(fields[i], fields[i+1])
	}
	w.Close()
	return b.String(), "Content-Type: " + w.FormDataContentType()
}

// What is published becomes this event.
func TestPublish(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t, pipe)
		parts, asParts := formParts("user", "ada", "data", "hi\r\nthere", "type", "note")
		file, asFile := formParts("data", "hi", "else", "where")
		for _, test := range []struct {
			name, query, kind, body, want string
		}{
			{"curl -d hi", "", formKind, "hi", `{"data":"hi","type":"message"}`},
			{"curl -d of a sentence", "", formKind, "100% of a=b & c", `{"data":"100% of a=b \u0026 c","type":"message"}`},
			{"curl -d of a form without data", "", formKind, "user=ada&say=hi", `{"data":"user=ada\u0026say=hi","type":"message"}`},
			{"curl -d of the field's name", "", formKind, "data", `{"data":"data","type":"message"}`},
			{"curl -d of JSON", "", formKind, `{"a":1}`, `{"data":"{\"a\":1}","type":"message"}`},
			{"no type at all", "", "X: y", "hi", `{"data":"hi","type":"message"}`},
			{"an unknown type", "", "Content-Type: application/octet-stream", "hi", `{"data":"hi","type":"message"}`},
			{"a type that is none", "", "Content-Type: /;;", "hi", `{"data":"hi","type":"message"}`},
			{"text", "?user=ada&type=x", textKind, "é \u2028 <&> \x00\r\n", `{"data":"é \u2028 \u003c\u0026\u003e \u0000\r\n","from":"ada","type":"x"}`},
			{"text that looks like JSON", "", textKind, `{"a":1}`, `{"data":"{\"a\":1}","type":"message"}`},
			{"text with a charset", "", textKind + `; charset="UTF-8"`, "hi", `{"data":"hi","type":"message"}`},
			{"nothing", "", textKind, "", `{"data":"","type":"message"}`},
			{"JSON", "?user=%C3%A9&type=a.b:c-d_E9", jsonKind, " {\n\t\"a\" : [ 1 , null , \"<\" ] }\n", `{"data":{"a":[1,null,"\u003c"]},"from":"é","type":"a.b:c-d_E9"}`},
			{"JSON with a charset", "", jsonKind + "; charset=utf-8", `"hi"`, `{"data":"hi","type":"message"}`},
			{"JSON by another name", "", "Content-Type: text/json", `[1]`, `{"data":[1],"type":"message"}`},
			{"JSON behind a byte order mark", "", jsonKind, "\ufeff[1]", `{"data":[1],"type":"message"}`},
			{"text behind a byte order mark", "", textKind, "\ufeffhi", `{"data":"hi","type":"message"}`},
			{"a form behind a byte order mark", "", formKind, "\ufeffdata=hi", `{"data":"hi","type":"message"}`},
			{"JSON with a parameter that is none", "", jsonKind + "; utf-8", "[1]", `{"data":[1],"type":"message"}`},
			{"JSON with an empty parameter", "", jsonKind + ";;", "[1]", `{"data":[1],"type":"message"}`},
			{"JSON whose type a proxy joined with another", "", jsonKind + ", text/plain", "[1]", `{"data":[1],"type":"message"}`},
			{"curl -d of a form with a semicolon", "", formKind, "data=a; b&user=ada", `{"data":"a; b","from":"ada","type":"message"}`},
			{"curl -d of a form with a percent sign", "", formKind, "data=100% of %C3%A9 %zz%&user=ada", `{"data":"100% of é %zz%","from":"ada","type":"message"}`},
			{"JSON by a name of its own", "", "Content-Type: application/cloudevents+json; charset=utf-8", `{"id":"x"}`, `{"data":{"id":"x"},"type":"message"}`},
			{"JSON with whole surrogate pairs", "", jsonKind, `["\ud83d\ude00","\\ud800","\uFFFD"]`, `{"data":["😀","\\ud800","�"],"type":"message"}`},
			{"JSON with a name again in another object", "", jsonKind, `{"a":{"a":1},"b":[{"a":1},{"a":2}],"c":"a"}`, `{"data":{"a":{"a":1},"b":[{"a":1},{"a":2}],"c":"a"},"type":"message"}`},
			{"JSON with large and small numbers", "", jsonKind, `[1.7e308,-1.7E+308,1e-400,12345678901234567890,0.1]`, `{"data":[1.7e308,-1.7e308,0,12345678901234567890,0.1],"type":"message"}`},
			{"null", "", jsonKind, "null", `{"data":null,"type":"message"}`},
			{"a number", "", jsonKind, "-0.5e-3", `{"data":-0.0005,"type":"message"}`},
			{"JSON as deep as may be", "", jsonKind, strings.Repeat("[", 64) + strings.Repeat("]", 64), `{"data":` + strings.Repeat("[", 64) + strings.Repeat("]", 64) + `,"type":"message"}`},
			{"JSON with brackets in a string", "", jsonKind, `"\"` + strings.Repeat("[{", 100) + `"`, `{"data":"\"` + strings.Repeat("[{", 100) + `","type":"message"}`},
			{"a form", "", formKind, "data=a+b%26c%3D%C3%A9&user=ada&type=note", `{"data":"a b\u0026c=é","from":"ada","type":"note"}`},
			{"a form and the query", "?user=ada", formKind, "data=hi&type=x", `{"data":"hi","from":"ada","type":"x"}`},
			{"a form and the query that agree", "?user=ada&type=x", formKind, "data=hi&type=x&user=ada", `{"data":"hi","from":"ada","type":"x"}`},
			{"a form with more", "", formKind, "data=&other=1&other=2", `{"data":"","type":"message"}`},
			{"a form in parts", "", asParts, parts, `{"data":"hi\r\nthere","from":"ada","type":"note"}`},
			{"a form in parts with more", "?user=ada", asFile, file, `{"data":"hi","from":"ada","type":"message"}`},
			{"a user of 64 characters", "?user=" + strings.Repeat("%C3%A9", 64), textKind, "", `{"data":"","from":"` + strings.Repeat("é", 64) + `","type":"message"}`},
			{"a user that is markup", "?user=%3Cb%3E%22%27", textKind, "", `{"data":"","from":"\u003cb\u003e\"'","type":"message"}`},
			{"a type of 64", "?type=" + strings.Repeat("x", 64), textKind, "", `{"data":"","type":"` + strings.Repeat("x", 64) + `"}`},
			{"parameters that are empty", "?type=&user=&key=&ttl=", textKind, "hi", `{"data":"hi","type":"message"}`},
			{"not encoded", "", "Content-Encoding: identity", "hi", `{"data":"hi","type":"message"}`},
		} {
			mark := b.relay.lastID.Load()
			res, body := b.do("POST", "/rooms/r"+test.query, test.body, test.kind)
			if want := fmt.Sprintf("{\"id\":%d}\n", mark+1); res.StatusCode != 201 || body != want {
				t.Errorf("%s: %s %s, want 201 %s", test.name, res.Status, body, want)
				continue
			}
			if h := res.Header; h.Get("Content-Type") != "application/json; charset=utf-8" || h.Get("X-Content-Type-Options") != "nosniff" {
				t.Errorf("%s: headers %v", test.name, h)
			}
			// Compared as Go's encoder writes it, which is how it must have come.
			if got := b.newest("r"); got != test.want && !sameJSON(got, test.want) {
				t.Errorf("%s: became %s, want %s", test.name, got, test.want)
			}
		}
		for _, room := range []string{"A-Z.a:z_09", strings.Repeat("x", 64), "a%2Db", "%61"} {
			if res, body := b.do("POST", "/rooms/"+room, "hi"); res.StatusCode != 201 {
				t.Errorf("the room %s: %s %s", room, res.Status, body)
			}
		}
	})
}

// Python's str.splitlines, which some clients take for the lines of an answer,
// ends them at more than \n. So nothing of the kind is in an event as it is sent.
func TestAnEventIsOneLineForPythonToo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t, pipe)
		const ends = "a\n\r\v\f\x1c\x1d\x1e\u0085\u2028\u2029b"
		quoted, _ := json.Marshal(ends)
		for _, post := range [][2]string{{ends, textKind}, {url.Values{"data": {ends}}.Encode(), formKind}, {string(quoted), jsonKind}, {"{\"\u0085\":\"\u0085\"}", jsonKind}} {
			b.do("POST", "/rooms/a", post[0], post[1])
			_, body := b.do("GET", "/rooms/a/poll?last=1", "")
			if i := strings.IndexAny(strings.TrimSuffix(body, "\n"), ends[1:len(ends)-1]); i >= 0 {
				t.Errorf("%q came as %q, with a line that ends at %d", post[0], body, i)
			}
			if got := b.newest("a"); post[0][0] != '{' && !sameJSON(got, `{"type":"message","data":`+string(quoted)+`}`) {
				t.Errorf("%q became %s", post[0], got)
			}
		}
	})
}

func sameJSON(a, b string) bool {
	var x, y any
	return json.Unmarshal([]byte(a), &x) == nil && json.Unmarshal([]byte(b), &y) == nil && reflect.DeepEqual(x, y)
}

// 65,536 bytes are taken by every way in, and nothing of one more.
func TestPublishLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t, pipe)
		fill := func(head, tail string, size int) string {
			return head + strings.Repeat("x", size-len(head)-len(tail)) + tail
		}
		parts, asParts := formParts("data", "CUT")
		head, tail, _ := strings.Cut(parts, "CUT")
		for _, test := range []struct{ kind, head, tail string }{
			{textKind, "", ""}, {jsonKind, `"`, `"`}, {jsonKind, `[[[{"a":"`, `"}]]]`}, {formKind, "data=", ""}, {formKind, "", ""}, {asParts, head, tail},
		} {
			mark := b.relay.lastID.Load()
			if res, body := b.do("POST", "/rooms/a", fill(test.head, test.tail, 65_536), test.kind); res.StatusCode != 201 {
				t.Errorf("%s of 65,536 bytes: %s %s", test.kind, res.Status, body)
			}
			if res, body := b.do("POST", "/rooms/a", fill(test.head, test.tail, 65_537), test.kind); res.StatusCode != 413 || !isError(body) {
				t.Errorf("%s of 65,537 bytes: %s %s", test.kind, res.Status, body)
			}
			if n := b.relay.lastID.Load() - mark; n != 1 {
				t.Errorf("%s: %d were published, want 1", test.kind, n)
			}
		}
		// Of a body whose size is not said, no more than that is read.
		body := &boundless{}
		req, _ := http.NewRequestWithContext(t.Context(), "POST", b.url+"/rooms/a", body)
		if res, err := b.client.Do(req); err != nil || res.StatusCode != 413 {
			t.Errorf("a body without end: %v %v", res, err)
		}
		if n := body.n.Load(); n > 1<<20 {
			t.Errorf("%d bytes were read of it", n)
		}
	})
}

// boundless is a body without end.
type boundless struct{ n atomic.Int64 }

func (b *boundless) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = 'x'
	}
	b.n.Add(int64(len(p)))
	return len(p), nil
}

// A key makes a retry safe.
func TestKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t, pipe, func(c *config) { c.maxEvents = 4 })
		post := func(path, body string, headers ...string) (status int, answer string) {
			res, answer := b.do("POST", path, body, headers...)
			return res.StatusCode, answer
		}
		_, first := post("/rooms/a?key=k", "one")
		parts, asParts := formParts("data", "x", "key", "k")
		for _, again := range [][]string{
			{"/rooms/a?key=k", "one"},
			{"/rooms/a?key=k&type=other&user=bob&ttl=5", "something else"},
			{"/rooms/a", "one", "Idempotency-Key: k"},
			{"/rooms/a?key=k", "one", "Idempotency-Key: k"},
			{"/rooms/a", "data=x&key=k", formKind},
			{"/rooms/a?key=k", "data=x&key=k", formKind},
			{"/rooms/a", parts, asParts},
		} {
			mark := b.relay.lastID.Load()
			if status, answer := post(again[0], again[1], again[2:]...); status != 200 || answer != first || b.relay.lastID.Load() != mark {
				t.Errorf("%q: %d %s, want 200 %s and nothing published", again, status, answer, first)
			}
		}
		for _, no := range [][]string{
			{"/rooms/a?key=k", "one", "Idempotency-Key: other"},
			{"/rooms/a?key=other", "data=x&key=k", formKind},
			{"/rooms/a?key=other", "data=x&key=k", formKind, "Idempotency-Key: k"},
			{"/rooms/a", "data=x&key=k", formKind, "Idempotency-Key: other"},
			{"/rooms/a?key=k&key=k", "one"},
			{"/rooms/a", "data=x&key=k&key=k", formKind},
			{"/rooms/a?key=" + strings.Repeat("k", 129), "one"},
			{"/rooms/a", "one", "Idempotency-Key: " + strings.Repeat("k", 129)},
			{"/rooms/a?key=%00", "one"},
			{"/rooms/a?key=%ff", "one"},
		} {
			mark := b.relay.lastID.Load()
			if status, answer := post(no[0], no[1], no[2:]...); status != 400 || !isError(answer) || b.relay.lastID.Load() != mark {
				t.Errorf("%q: %d %s, want 400 and nothing published", no, status, answer)
			}
		}
		if status, answer := post("/rooms/b?key=k", "one"); status != 201 || answer == first {
			t.Errorf("in another room: %d %s, want 201", status, answer)
		}
		if status, _ := post("/rooms/b?key="+strings.Repeat("k", 128), "one"); status != 201 {
			t.Errorf("a key of 128 bytes: %d", status)
		}
		for range 4 {
			post("/rooms/a", "more")
		}
		if status, answer := post("/rooms/a?key=k", "one"); status != 201 || answer == first {
			t.Errorf("when the history forgot it: %d %s, want 201", status, answer)
		}
	})
}

// PUT publishes as POST does, for curl -T.
func TestPut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t, pipe)
		if res, body := b.do("PUT", "/rooms/a?user=ada", "notes\n"); res.StatusCode != 201 || b.newest("a") != `{"data":"notes\n","from":"ada","type":"message"}` {
			t.Errorf("%s %s", res.Status, body)
		}
	})
}

// With if, it is published only if the newest message is still the one named: of
// two who both read it, one wins, and the other is told where to go on from.
func TestIf(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t, pipe, func(c *config) { c.maxEvents = 2 })
		newest := int64(0)
		try := func(query, body string, headers ...string) (status int, id int64) {
			t.Helper()
			mark := b.relay.lastID.Load()
			res, answer := b.do("POST", "/rooms/a?"+query, body, headers...)
			var said struct {
				ID    *int64
				Error string
			}
			if json.Unmarshal([]byte(answer), &said) != nil || said.ID == nil {
				t.Fatalf("%s: %s %s", query, res.Status, answer)
			}
			if published := b.relay.lastID.Load() - mark; (published == 1) != (res.StatusCode == 201) || (res.StatusCode == 412) != (said.Error != "") {
				t.Errorf("%s: %s %s, and %d were published", query, res.Status, answer, published)
			}
			return res.StatusCode, *said.ID
		}
		wants := func(status int, id int64, query, body string, headers ...string) int64 {
			t.Helper()
			got, gotID := try(query, body, headers...)
			if got != status || id >= 0 && gotID != id {
				t.Errorf("%s %s: %d with %d, want %d with %d", query, body, got, gotID, status, id)
			}
			return gotID
		}
		wants(412, 0, "if=1", "in a room that has none")
		newest = wants(201, -1, "if=0", "first")
		wants(412, newest, "if=0", "too late")
		b.say("b", "in another room")
		b.say("a?ttl=60&type=typing", "a signal is no message")
		second := wants(201, -1, fmt.Sprint("key=k&if=", newest), "second")
		wants(200, second, fmt.Sprint("key=k&if=", newest), "a key that is known answers first")
		wants(412, second, fmt.Sprint("if=", newest), "from before")
		third := wants(201, -1, "", fmt.Sprint("data=by+a+form&if=", second), formKind)
		for range 3 { // the history moves on
			third = wants(201, -1, fmt.Sprint("if=", third), "more")
		}

		e := b.socket("a")
		e.send(fmt.Sprintf(`{"data":"no","key":"x","if":%d}`, second))
		if h := e.next(); h.json != fmt.Sprintf(`{"type":"error","key":"x","id":%d,"data":"another message was published to this room since; its id is the one to go on from"}`, third) {
			t.Errorf("by WebSocket: %s", h.json)
		}
		e.send(fmt.Sprintf(`{"data":"yes","if":%d}`, third))
		e.expect("message yes")
		e.send(`{"data":"no","if":-1,"key":"x"}`)
		e.expect("error " + errIf.Error())
		e.send(`{"data":"no","if":1,"room":"nobody"}`)
		if h := e.next(); !strings.Contains(h.json, `"id":0,`) {
			t.Errorf("in a room that has none: %s", h.json)
		}
		if b.relay.isRead("nobody") || b.relay.rooms["nobody"] != nil {
			t.Error("a publish that was refused made a room")
		}
	})
}

// Those that can't set a header say in the query where they were, each in its own way.
func TestTheCursorByItsOtherNames(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t, pipe)
		start := b.relay.epoch
		for _, text := range []string{"one", "two", "three"} {
			b.say("a", text)
		}
		after := func(name string, n int64) string { return fmt.Sprintf("%s=%d", name, start+n) }
		for _, test := range []struct{ query, header, want string }{
			{after("lastEventId", 2), "", "three"},
			{after("lastEventID", 2), "", "three"},
			{after("Last-Event-ID", 2), "", "three"},
			{after("last_event_id", 2), "", "three"},
			{after("lastEventId", 2) + "&" + after("after", 1), "", "three"},
			{after("after", 1) + "&" + after("lastEventID", 2) + "&" + after("lastEventId", 2), "", "three"},
			{after("lastEventId", 1), fmt.Sprint("Last-Event-ID: ", start+2), "three"},
			{after("lastEventId", 2), "Last-Event-ID: ", "three"},
			{"lastEventId=&" + after("after", 2), "", "three"},
			{"lastEventIds=1&" + after("after", 2), "", "three"},
		} {
			headers := []string{}
			if test.header != "" {
				headers = append(headers, test.header)
			}
			if _, body := b.do("GET", "/rooms/a/poll?"+test.query, "", headers...); strings.Count(body, `"id":`) != 1 || !strings.Contains(body, `"data":"three"`) {
				t.Errorf("%s %q: %s, want %s alone", test.query, test.header, body, test.want)
			}
		}
		b.listen(kindOf("sse"), "a", after("lastEventId", 1)).expect("hello", "message two", "message three")
	})
}

// A person who types an address comes to a page; a program is told what there is.
func TestAddressesThatPeopleType(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t, pipe)
		for path, want := range map[string]string{
			"/rooms/lobby":          "../?room=lobby",
			"/rooms/lobby?token=x":  "../?room=lobby&token=x",
			"/rooms/a:b,c":          "../?room=a%3Ab",
			"/rooms/lobby/":         "../../?room=lobby",
			"/rooms/lobby?room=x":   "../?room=lobby",
			"/rooms":                "./stats.html#rooms",
			"/rooms/":               "../stats.html#rooms",
			"/lab":                  "./lab.html",
			"/stats?room=temp":      "./stats.html?room=temp",
			"/rooms/no%20name":      "",
			"/nothing":              "",
			"/rooms/lobby/presence": "",
		} {
			for _, method := range []string{"GET", "HEAD"} {
				res, body := b.do(method, path, "", "Accept: text/html,application/xhtml+xml,*/*;q=0.8")
				if got := res.Header.Get("Location"); got != want || (res.StatusCode == 303) != (want != "") {
					t.Errorf("%s %s by a browser: %s %q %s, want %q", method, path, res.Status, got, body, want)
				}
			}
			if res, _ := b.do("GET", path, "", "Accept: */*"); res.StatusCode == 303 {
				t.Errorf("%s by a program: %s to %s", path, res.Status, res.Header.Get("Location"))
			}
		}
		if res, body := b.do("GET", "/rooms/lobby", ""); res.StatusCode != 405 || !strings.Contains(body, b.techniqueNames()) {
			t.Errorf("GET of a room: %s %s, want 405 and the techniques", res.Status, body)
		}
	})
}

// A signal is heard while it lasts and is no part of the history.
func TestPublishSignal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t, pipe)
		e := b.listen(kindOf("stream"), "a").begin()
		b.say("a", "before")
		for _, ttl := range []string{"1", "500", "86400"} {
			b.say("a?type=typing&ttl="+ttl, ttl)
		}
		e.expect("message before", "typing 1", "typing 500", "typing 86400")
		time.Sleep(500*time.Second - time.Millisecond)
		b.listen(kindOf("stream"), "a", fmt.Sprint("after=", b.relay.epoch)).expect("hello", "message before", "typing 500", "typing 86400")
		time.Sleep(time.Millisecond)
		b.listen(kindOf("stream"), "a", fmt.Sprint("after=", b.relay.epoch)).expect("hello", "message before", "typing 86400")
	})
}

// The form of a page without script: it publishes once and goes back to the
// page, wherever else it is told to go.
func TestForm(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t, pipe)
		post := func(body string) (status int, location string) {
			res, _ := b.do("POST", "/rooms/a", body, formKind)
			return res.StatusCode, res.Header.Get("Location")
		}
		for _, test := range []struct {
			then, user, location string
			status               int
		}{
			{"form", "ada", "./a/form?user=ada", 303},
			{"refresh", "ada", "./a/refresh?user=ada", 303},
			{"form", "", "./a/form?user=", 303},
			{"form", "é \"<&?#/\r", "", 400},
			{"form", "é \"<&?#/", "./a/form?user=%C3%A9+%22%3C%26%3F%23%2F", 303},
			{"https://evil.example", "ada", "", 201},
			{"//evil.example", "ada", "", 201},
			{"/\\evil.example", "ada", "", 201},
			{"../../evil", "ada", "", 201},
			{"form\r\nX: y", "ada", "", 201},
			{"poll", "ada", "", 201},
			{"", "ada", "", 201},
		} {
			mark := b.relay.lastID.Load()
			status, location := post(url.Values{"data": {"hi"}, "then": {test.then}, "user": {test.user}}.Encode())
			if status != test.status || location != test.location {
				t.Errorf("then %q as %q: %d %q, want %d %q", test.then, test.user, status, location, test.status, test.location)
			}
			if published := b.relay.lastID.Load() > mark; published != (status < 400) {
				t.Errorf("then %q as %q: %d, published: %v", test.then, test.user, status, published)
			}
		}
		if res, _ := b.do("POST", "/rooms/a?then=form", "hi"); res.StatusCode != 201 {
			t.Errorf("then in the query: %s", res.Status)
		}

		// The form that the page has works, and a double click is one message.
		for _, path := range []string{"/rooms/a/form?user=%22%3E%3Cb%3E", "/rooms/a/refresh?user=%22%3E%3Cb%3E", "/rooms/a/form?live=refresh"} {
			res, page := b.do("GET", path, "")
			if h := res.Header; res.StatusCode != 200 || h.Get("Content-Type") != "text/html; charset=utf-8" || !strings.Contains(h.Get("Cache-Control"), "no-store") || h.Get("X-Content-Type-Options") != "nosniff" {
				t.Errorf("%s: %s %v", path, res.Status, h)
			}
			_, key, ok := strings.Cut(page, `name="key" value="`)
			key, _, _ = strings.Cut(key, `"`)
			if !ok || len(key) < 16 || strings.Contains(page, "<b>") && strings.Contains(path, "form?user") {
				t.Fatalf("%s: %s", path, page)
			}
			mark := b.relay.lastID.Load()
			for range 2 {
				if status, location := post("user=ada&data=hi&then=form&key=" + key); status != 303 || location != "./a/form?user=ada" {
					t.Errorf("%d %s", status, location)
				}
			}
			if n := b.relay.lastID.Load() - mark; n != 1 {
				t.Errorf("a double click published %d", n)
			}
		}
		for _, method := range []string{"POST", "PUT"} {
			if res, _ := b.do(method, "/rooms/a/form", ""); res.StatusCode != 405 || res.Header.Get("Allow") != "GET, HEAD, OPTIONS" {
				t.Errorf("%s of the form: %s", method, res.Status)
			}
		}
		if res, body := b.do("HEAD", "/rooms/a/form", ""); res.StatusCode != 200 || body != "" {
			t.Errorf("HEAD of the form: %s", res.Status)
		}
		if res, body := b.do("GET", "/rooms/a/form?live=javascript:", ""); res.StatusCode != 400 || !isError(body) {
			t.Errorf("live: %s", res.Status)
		}
	})
}

// What is refused says why, in JSON, and changes nothing.
func TestRefusals(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t, pipe)
		b.say("a", "before")
		names := func(n int) string {
			var rooms []string
			for i := range n {
				rooms = append(rooms, fmt.Sprint("r", i))
			}
			return strings.Join(rooms, ",")
		}
		deep := strings.Repeat("[", 65) + strings.Repeat("]", 65)
		deepObject := strings.Repeat(`{"a":`, 65) + "1" + strings.Repeat("}", 65)
		twice, asTwice := formParts("data", "x", "data", "y")
		without, asWithout := formParts("say", "x")
		latin, asLatin := formParts("data", "\xe9")
		contrary, asContrary := formParts("data", "x", "user", "bob")
		type refusal struct {
			status       int
			method, path string
			body         string
			headers      []string
		}
		var all []refusal
		get := func(status int, paths ...string) {
			for _, p := range paths {
				all = append(all, refusal{status, "GET", p, "", nil})
			}
		}
		post := func(status int, path, body string, headers ...string) {
			all = append(all, refusal{status, "POST", path, body, headers})
		}

		// Names of rooms, in every place they have.
		for _, room := range []string{"a%2Fb", "%2F", "%2e%2e%2Fa", "a%00", "%00", "a%20b", "a+b", "a%0Ab", "%C3%A9", "%FF", "%C3%28", "a;b", "a=b", "a@b", "a*", "a~b", "%22", "%3Cb%3E", "", ",", "a,", ",a", "a,,b", "a,a", "a,b,a", strings.Repeat("x", 65), strings.Repeat("x", 10_000), "a%25", "a%252F", "a%2F..%2Fb", names(33)} {
			get(400, "/rooms/"+room+"/poll", "/rooms/"+room+"/sse", "/rooms/"+room+"/ws", "/rooms/"+room+"/presence", "/rooms/"+room+"/form")
			post(400, "/rooms/"+room, "hi")
			post(400, "/rooms/"+room+"/presence?user=ada", "online")
		}
		get(404, "/room/a/poll", "/rooms/a/b/poll", "/rooms/a/poll/", "/rooms/a/nothing", "/rooms/a//poll", "/rooms/a/POLL", "/x", "/static/index.html", "/rooms.", "/%72ooms/a/poll")
		post(400, "/rooms/a,b", "hi")
		post(400, "/rooms/a,b/presence?user=ada", "online")
		get(400, "/rooms/a,b/presence")
		post(403, "/rooms/_stats", "hi")
		post(403, "/rooms/_", "hi")
		post(403, "/rooms/_stats/presence?user=ada", "online")

		// Numbers.
		for _, n := range []string{"-1", "x", "1.5", "NaN", "Infinity", "9223372036854775808", "99999999999999999999999", "-9223372036854775809", "%2B1", "%201", "1%20", "1e3", "0x10", "1_000", "%D9%A1", "1,2", "%00", "''"} {
			get(400, "/rooms/a/poll?after="+n, "/rooms/a/poll?last="+n, "/rooms/a/longpoll?wait="+n, "/rooms/a/sse?after="+n, "/rooms/a/stream?last="+n, "/rooms/a/ws?after="+n, "/rooms/a/poll?presence="+n)
			post(400, "/rooms/a?ttl="+n, "hi")
			if v, _ := url.QueryUnescape(n); v == strings.TrimSpace(v) && v != "\x00" { // what a header can say
				all = append(all, refusal{400, "GET", "/rooms/a/sse", "", []string{"Last-Event-ID: " + v}}, refusal{400, "GET", "/rooms/a/poll?after=0", "", []string{"Last-Event-ID: " + v}})
			}
		}
		get(400, "/rooms/a/longpoll?wait=56", "/rooms/a/jsonp?callback=f&wait=56", "/rooms/a/refresh?wait=0", "/rooms/a/refresh?wait=56", "/rooms/a/poll?last=2147483648", "/rooms/a/poll?presence=true", "/rooms/a/poll?presence=2")
		for _, ttl := range []string{"0", "86401", "9223372036854775807"} {
			post(400, "/rooms/a?ttl="+ttl, "hi")
		}

		// Parameters given twice, or that contradict, and queries that are none.
		for _, name := range []string{"after=1", "last=1", "user=a", "presence=1"} {
			get(400, "/rooms/a/poll?"+name+"&"+name, "/rooms/a/sse?"+name+"&"+name)
		}
		get(400, "/rooms/a/longpoll?wait=1&wait=1", "/rooms/a/jsonp?callback=f&callback=f", "/rooms/a/multipart?as=json&as=text", "/rooms/a/poll?after=1&after=2", "/rooms/a/form?user=a&user=b")
		get(400, "/rooms/a/poll?after=%zz", "/rooms/a/poll?a=1;b=2", "/rooms/a/multipart?as=xml", "/rooms/a/multipart?as=JSON")
		all = append(all, refusal{400, "GET", "/rooms/a/sse", "", []string{"Last-Event-ID: 1", "Last-Event-ID: 1"}})
		for _, name := range []string{"type=x", "user=a", "key=k", "ttl=1"} {
			post(400, "/rooms/a?"+name+"&"+name, "hi")
			post(400, "/rooms/a?"+name+"&"+strings.ToUpper(name[:1])+name[1:]+"&"+name, "hi")
		}
		post(400, "/rooms/a?type=%zz", "hi")
		post(400, "/rooms/a", "hi", "Idempotency-Key: 1", "Idempotency-Key: 2")
		post(400, "/rooms/a", "data=x&ttl=0", formKind)
		post(400, "/rooms/a?ttl=1", "data=x&ttl=2", formKind)
		post(400, "/rooms/a", "data=x&data=x", formKind)
		post(400, "/rooms/a", "data=x&user=a&user=a", formKind)
		post(400, "/rooms/a?user=ada", "data=x&user=bob", formKind)
		post(400, "/rooms/a?type=x", "data=x&type=y", formKind)
		post(400, "/rooms/a?user=ada", contrary, asContrary)
		post(400, "/rooms/a/presence?user=ada", "state=away&user=bob", formKind)
		post(400, "/rooms/a/presence?user=ada", "state=away&state=online", formKind)
		post(400, "/rooms/a", twice, asTwice)
		post(400, "/rooms/a", without, asWithout)
		post(400, "/rooms/a", "data=x", "Content-Type: multipart/form-data")
		post(400, "/rooms/a", "--x", "Content-Type: multipart/form-data; boundary=x")
		post(400, "/rooms/a", "--x\r\nContent-Disposition: form-data; name=\"data\"; filename=\"f\"\r\n\r\nhi\r\n--x--\r\n", "Content-Type: multipart/form-data; boundary=x")

		// Types, users, callbacks.
		for _, kind := range append([]string{"a%20b", "a/b", "%00", "%C3%A9", "%3Cb%3E", strings.Repeat("x", 65)}, reservedTypes...) {
			post(400, "/rooms/a?type="+kind, "hi")
			post(400, "/rooms/a", "data=x&type="+kind, formKind)
		}
		for _, user := range []string{"%20", "%E2%80%AEeve", "eve%E2%80%8E", "a%D8%9Cb", "%E2%81%A6x%E2%81%A9", "a%E2%80%A8b", "%20eve", "eve+", "%C2%A0eve", "%E3%80%80", "%E2%80%8B", "%EF%BB%BF", "%E3%85%A4", "%E2%A0%80", "%FF", "%C3", "%00", "a%0Ab", "%C2%85", "%7F", strings.Repeat("x", 65), strings.Repeat("%C3%A9", 65)} {
			post(400, "/rooms/a?user="+user, "hi")
			post(400, "/rooms/a", "data=x&user="+user, formKind)
			post(400, "/rooms/a/presence?user="+user, "online")
			get(400, "/rooms/a/poll?user="+user, "/rooms/a/sse?user="+user, "/rooms/a/form?user="+user)
		}
		get(400, "/rooms/a/jsonp")
		for _, f := range []string{"", "1a", "a%20b", "a-b", "a..b", ".a", "a.", ".", "a.1", "a[0]", "a(", "alert(1)//", "a;b", "%C3%A9", "a%0A", "%00", "a%E2%80%A8", "<script>", "a'", "a%22", "a%5Cu0041", strings.Repeat("x", 65), strings.Repeat("a.", 32) + "b"} {
			get(400, "/rooms/a/jsonp?callback="+f)
		}

		// Bodies.
		for _, text := range []string{"\xff", "hi \xc3\x28", "\xed\xa0\x80", "\xf5\x80\x80\x80", "hi\xc3"} {
			post(400, "/rooms/a", text)
			post(400, "/rooms/a", text, textKind)
			post(400, "/rooms/a", `"`+text+`"`, jsonKind)
			post(400, "/rooms/a", "data="+url.QueryEscape(text), formKind)
		}
		post(400, "/rooms/a", latin, asLatin)
		for _, text := range []string{"", " ", "{", "[1,]", "{'a':1}", "nul", "True", "1 2", `"a`, `"a` + "\n" + `"`, "01", "+1", ".5", "NaN", "{\"a\":1}}", "hi", deep, deepObject, strings.Repeat("[", 60_000), strings.Repeat(`{"a":`, 10_000)} {
			post(400, "/rooms/a", text, jsonKind)
		}
		// What some parsers take and others don't: half of a surrogate pair, numbers beyond a double, names twice.
		for _, text := range []string{`"\ud800"`, `"\uDFFF"`, `"\ude00\ud83d"`, `"\ud800\ud800"`, `"\ud800x"`, `"\ud800\\udc00"`, `["x",{"\ud800":1}]`, "1e400", `{"n":-1e309}`, strings.Repeat("9", 400),
			`{"a":1,"a":2}`, `{"a":1,"\u0061":2}`, `[{"b":{"a":[],"c":1 , "a" : 2}}]`, `{"":1,"":1}`} {
			post(400, "/rooms/a", text, jsonKind)
			post(400, "/rooms/a", text, "Content-Type: application/vnd.api+json")
			post(400, "/rooms/a/presence?user=ada", `{"state":"online","x":`+text+"}", jsonKind)
		}
		post(400, "/rooms/a/presence?user=ada", `{"State":"online"}`, jsonKind)
		for _, id := range []string{"-1", "x", "", "1.5", "+1", "9223372036854775808", "1&if=1"} {
			post(400, "/rooms/a?if="+id, "hi")
			post(400, "/rooms/a", "data=hi&if="+id, formKind)
		}
		post(400, "/rooms/a?if=1", "data=hi&if=2", formKind)
		get(400, "/rooms/a/poll?lastEventId=x", "/rooms/a/sse?Last-Event-ID=-1", "/rooms/a/sse?lastEventId=1&lastEventId=2", "/rooms/a/sse?lastEventId=1&lastEventID=2")
		get(400, "/rooms/a/stream?as=data", "/rooms/a/poll?as=data", "/rooms/a/html?as=data", "/rooms/a/refresh?as=data", "/rooms/a/iframe?as=data", "/rooms/a/longpoll?as=data", "/rooms/a/jsonp?callback=f&as=data", "/rooms/a/multipart?as=data")
		get(400, "/rooms/a/sse?client="+strings.Repeat("x", 65), "/rooms/a/sse?client=a%20b", "/rooms/a/poll?client=a&client=b")
		post(400, "/rooms/a/presence?user=ada&client=%3Cb%3E", "online")
		post(413, "/rooms/a", strings.Repeat("x", 65_537))
		post(413, "/rooms/a", strings.Repeat(" ", 65_537), jsonKind)
		post(413, "/rooms/a/presence?user=ada", strings.Repeat(" ", 65_537))
		for _, coding := range []string{"gzip", "br", "deflate", "x", "gzip, gzip"} {
			post(415, "/rooms/a", "hi", "Content-Encoding: "+coding)
			post(415, "/rooms/a/presence?user=ada", "online", "Content-Encoding: "+coding)
		}
		for _, charset := range []string{"iso-8859-1", "utf-16", "UTF-7"} {
			post(415, "/rooms/a", "hi", textKind+"; charset="+charset)
			post(415, "/rooms/a", `"hi"`, jsonKind+"; charset="+charset)
			post(415, "/rooms/a", "data=x", formKind+"; charset="+charset)
		}
		for _, state := range []string{"", "dancing", "Online", "online offline", "{", "{}", `{"state":1}`, `{"state":"x"}`, `{"state":null}`, "\xff"} {
			post(400, "/rooms/a/presence?user=ada", state)
			post(400, "/rooms/a/presence?user=ada", state, jsonKind)
		}
		post(400, "/rooms/a/presence", "online")
		post(400, "/rooms/a/presence?user=", "online")

		// Methods.
		for _, method := range []string{"PATCH", "GET", "HEAD", "FOO"} {
			all = append(all, refusal{405, method, "/rooms/a", "hi", nil})
		}
		all = append(all, refusal{403, "DELETE", "/rooms/a", "", nil}, refusal{403, "GET", "/rooms", "", nil}, refusal{405, "POST", "/rooms", "hi", nil})
		for _, method := range []string{"PUT", "DELETE", "PATCH"} {
			all = append(all, refusal{405, method, "/rooms/a/presence?user=ada", "online", nil}, refusal{405, method, "/healthz", "", nil}, refusal{405, method, "/", "", nil})
		}
		all = append(all, refusal{405, "POST", "/", "", nil}, refusal{405, "POST", "/healthz", "", nil})

		rooms := func() int {
			b.relay.mu.Lock()
			defer b.relay.mu.Unlock()
			return len(b.relay.rooms) + b.relay.maxUsers
		}
		mark, before := b.relay.lastID.Load(), rooms()
		for _, r := range all {
			res, body := b.raw1(r.method, r.path, r.body, r.headers...)
			name := fmt.Sprintf("%s %.100s %q %.100q", r.method, r.path, r.headers, r.body)
			if res.StatusCode != r.status {
				t.Errorf("%s: %s %s, want %d", name, res.Status, body, r.status)
				continue
			}
			if r.method != "HEAD" && (!isError(body) || res.Header.Get("Content-Type") != "application/json; charset=utf-8") {
				t.Errorf("%s: %s %s, want JSON with an error", name, res.Header.Get("Content-Type"), body)
			}
			if r.status == 405 && res.Header.Get("Allow") == "" {
				t.Errorf("%s: no Allow", name)
			}
			if len(body) > 1000 {
				t.Errorf("%s: the error has %d bytes", name, len(body))
			}
			if b.relay.lastID.Load() != mark || rooms() != before {
				t.Fatalf("%s: something changed", name)
			}
		}
		t.Logf("%d refusals", len(all))
	})
}

// raw1 makes a request with a path that a client might not send as it is.
func (b *testbed) raw1(method, path, body string, headers ...string) (*http.Response, string) {
	b.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute) // if it should be a stream
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, b.url, strings.NewReader(body))
	if err != nil {
		b.t.Fatal(err)
	}
	req.URL.Opaque = "//cometes.test" + path
	if p, q, ok := strings.Cut(path, "?"); ok {
		req.URL.Opaque, req.URL.RawQuery = "//cometes.test"+p, q
	}
	for _, h := range headers {
		name, value, _ := strings.Cut(h, ": ")
		req.Header.Add(name, value)
	}
	res, err := b.client.Do(req)
	if err != nil {
		b.t.Fatalf("%s %s: %v", method, path, err)
	}
	defer res.Body.Close()
	answer, _ := io.ReadAll(res.Body)
	return res, string(answer)
}

// A ttl makes a signal, in the query or in a form.
func TestATTLMakesASignal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t, pipe)
		for i, ask := range [][]string{{"?ttl=5", "data=hi"}, {"", "data=hi&ttl=5"}, {"?ttl=5", "data=hi&ttl=5"}} {
			b.do("POST", "/rooms/a"+ask[0], ask[1], formKind)
			v := b.relay.rooms["a"].history.Load()
			if len(v.messages) != 0 || len(v.signals) != i+1 || v.signals[i].expiresAt != v.signals[i].publishedAt+5000 {
				t.Fatalf("%q made %d messages and %d signals", ask, len(v.messages), len(v.signals))
			}
		}
	})
}

// What a request says of its length is not counted before it has come.
func TestOnlyWhatComesIsCounted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t, pipe)
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

// The room _stats is the relay's own, and not bound by the rate of others.
func TestStatsGoOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t, pipe, func(c *config) { c.roomRate = 0.1 })
		e := b.listen(kindOf("stream"), "_stats").begin()
		for range 5 {
			if h := e.next(); h.kind != "stats" {
				t.Fatalf("heard %v, want stats", h)
			}
		}
	})
}

// What is just within the bounds is taken.
func TestWithinBounds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t, pipe)
		var rooms []string
		for i := range 32 {
			rooms = append(rooms, fmt.Sprint("r", i))
		}
		for _, path := range []string{
			"/rooms/" + strings.Join(rooms, ",") + "/poll",
			"/rooms/" + strings.Repeat("x", 64) + "/poll",
			"/rooms/a%2Cb/poll",
			"/rooms/_stats/poll",
			"/rooms/a/poll?after=0&last=0", "/rooms/a/poll?after=9223372036854775807", "/rooms/a/poll?last=2147483647", "/rooms/a/poll?after=&last=&user=&presence=",
			"/rooms/a/poll?unknown=1&unknown=2", "/rooms/a/poll?presence=0", "/rooms/a/poll?presence=1",
			"/rooms/a/longpoll?wait=0", "/rooms/a/longpoll?wait=55&after=0", "/rooms/a/refresh?wait=1", "/rooms/a/refresh?wait=55",
			"/rooms/a/jsonp?wait=0&callback=" + strings.Repeat("x", 64), "/rooms/a/jsonp?wait=0&callback=$", "/rooms/a/jsonp?wait=0&callback=_.$1.a9",
			"/rooms/a/poll?user=" + strings.Repeat("%C3%A9", 64),
		} {
			if res, body := b.raw1("GET", path, ""); res.StatusCode != 200 {
				t.Errorf("%s: %s %s", path, res.Status, body)
			}
		}
	})
}

// A body that does not come is waited for 20 s; a head 10 s.
func TestSlowRequests(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t, pipe)
		for name, test := range map[string]struct {
			request string
			trickle bool
			status  int
		}{
			"half a body":         {"POST /rooms/a HTTP/1.1\r\nHost: cometes.test\r\nContent-Length: 100\r\n\r\nhi", false, 408},
			"a trickle":           {"POST /rooms/a HTTP/1.1\r\nHost: cometes.test\r\nContent-Length: 100\r\n\r\nhi", true, 408},
			"half a chunk":        {"POST /rooms/a HTTP/1.1\r\nHost: cometes.test\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhi", false, 408},
			"half a presence":     {"POST /rooms/a/presence?user=ada HTTP/1.1\r\nHost: cometes.test\r\nContent-Length: 100\r\n\r\nhi", false, 408},
			"half a head":         {"POST /rooms/a HTTP/1.1\r\nHost: come", false, 0},
			"nothing but silence": {"", false, 0},
		} {
			conn, _ := b.dial(t.Context())
			start := time.Now()
			asked := make(chan struct{})
			go func() {
				defer close(asked)
				conn.Write([]byte(test.request))
				for test.trickle {
					time.Sleep(time.Second)
					if _, err := conn.Write([]byte("x")); err != nil {
						return
					}
				}
			}()
			answer, _ := io.ReadAll(conn)
			d := time.Since(start)
			if d != 20*time.Second && !(test.status == 0 && len(answer) == 0 && d <= 10*time.Second) {
				t.Errorf("%s: ended after %v", name, d)
			}
			if want := fmt.Sprintf("HTTP/1.1 %d", test.status); test.status != 0 && !strings.HasPrefix(string(answer), want) {
				t.Errorf("%s: %q, want %s", name, answer, want)
			}
			if b.relay.lastID.Load() != b.relay.epoch {
				t.Errorf("%s: something was published", name)
			}
			conn.Close()
			<-asked
		}
		// One that ends in the middle publishes nothing.
		conn, _ := b.dial(t.Context())
		io.WriteString(conn, "POST /rooms/a HTTP/1.1\r\nHost: cometes.test\r\nContent-Length: 100\r\n\r\nhi")
		conn.Close()
		synctest.Wait()
		if b.relay.lastID.Load() != b.relay.epoch {
			t.Error("half a body was published")
		}
		// And a head of 32 KB is too big.
		if res, _ := b.do("GET", "/rooms/a/poll", "", "X: "+strings.Repeat("x", 32<<10)); res.StatusCode != 431 {
			t.Errorf("a head of 32 KB: %s", res.Status)
		}
	})
}

// Who may ask.
func TestAccess(t *testing.T) {
	const friend, stranger = "https://friend.example", "https://stranger.example"
	type asking struct {
		name    string
		headers []string
		// Who lets them: nobody has to be listed for own, "list" needs -origins
		// with friend, "all" needs *, and "never" is not let in but by *, or not
		// to publish.
		read, publish string
	}
	all := []asking{
		{"a program", nil, "own", "own"},
		{"an own page", []string{"Origin: http://cometes.test", "Sec-Fetch-Site: same-origin"}, "own", "own"},
		{"an own page that names no origin", []string{"Sec-Fetch-Site: same-origin", "Referer: http://cometes.test/"}, "own", "own"},
		{"an own page in an old browser", []string{"Origin: http://cometes.test"}, "own", "own"},
		{"an address typed in", []string{"Sec-Fetch-Site: none", "Sec-Fetch-Mode: navigate", "Sec-Fetch-Dest: document"}, "own", "own"},
		{"a friend's page", []string{"Origin: " + friend, "Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: cors"}, "list", "list"},
		{"a friend's page in an old browser", []string{"Origin: " + friend}, "list", "list"},
		{"a friend's page with a port", []string{"Origin: http://localhost:3000", "Sec-Fetch-Site: same-site"}, "list", "list"},
		{"a friend's script", []string{"Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: no-cors", "Sec-Fetch-Dest: script", "Referer: " + friend + "/page?x"}, "list", ""},
		{"a friend's frame", []string{"Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: navigate", "Sec-Fetch-Dest: iframe", "Referer: " + friend + "/"}, "list", ""},
		{"a friend's picture", []string{"Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: no-cors", "Sec-Fetch-Dest: image", "Referer: " + friend + "/"}, "list", ""},
		{"a stranger's page", []string{"Origin: " + stranger, "Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: cors"}, "all", "all"},
		{"a stranger's page in an old browser", []string{"Origin: " + stranger}, "all", "all"},
		{"a stranger next door", []string{"Origin: http://evil.cometes.test", "Sec-Fetch-Site: same-site"}, "all", "all"},
		{"a stranger on another port", []string{"Origin: http://cometes.test:81", "Sec-Fetch-Site: same-site"}, "all", "all"},
		{"a sandboxed page", []string{"Origin: null", "Sec-Fetch-Site: cross-site"}, "all", "all"},
		{"a sandboxed page in an old browser", []string{"Origin: null"}, "all", "all"},
		{"a name that ends like a friend's", []string{"Origin: https://evilfriend.example", "Sec-Fetch-Site: cross-site"}, "all", "all"},
		{"a name that begins like a friend's", []string{"Origin: https://friend.example.evil", "Sec-Fetch-Site: cross-site"}, "all", "all"},
		{"a friend without TLS", []string{"Origin: http://friend.example", "Sec-Fetch-Site: cross-site"}, "all", "all"},
		{"a friend on another port", []string{"Origin: https://friend.example:444", "Sec-Fetch-Site: cross-site"}, "all", "all"},
		{"a stranger's script", []string{"Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: no-cors", "Sec-Fetch-Dest: script", "Referer: " + stranger + "/"}, "all", ""},
		{"a stranger's frame", []string{"Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: navigate", "Sec-Fetch-Dest: iframe", "Referer: " + stranger + "/"}, "all", ""},
		{"a stranger's picture", []string{"Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: no-cors", "Sec-Fetch-Dest: image", "Referer: " + stranger + "/"}, "all", ""},
		{"a stranger's script that hides whose it is", []string{"Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: no-cors", "Sec-Fetch-Dest: script"}, "all", ""},
		{"a stranger's script that says it is a friend's", []string{"Sec-Fetch-Site: cross-site", "Sec-Fetch-Dest: script", "Referer: https://friend.example@stranger.example/"}, "all", ""},
		{"a link from a stranger", []string{"Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: navigate", "Sec-Fetch-Dest: document", "Referer: " + stranger + "/"}, "own", ""},
		{"a stranger's form", []string{"Origin: " + stranger, "Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: navigate", "Sec-Fetch-Dest: document"}, "", "all"},
		{"a hidden form", []string{"Origin: null", "Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: navigate", "Sec-Fetch-Dest: iframe"}, "", "all"},
		{"an object", []string{"Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: navigate", "Sec-Fetch-Dest: object"}, "all", ""},
	}
	for open, list := range map[string]string{"own": "", "list": friend + ", http://localhost:3000", "all": "*"} {
		t.Run(open, bubble(func(t *testing.T) {
			b := newBed(t, pipe, func(c *config) { c.origins = list })
			for _, a := range all {
				origin := ""
				for _, h := range a.headers {
					if o, ok := strings.CutPrefix(h, "Origin: "); ok {
						origin = o
					}
				}
				try := func(what, needs string, ok int, method, path string) {
					allowed := needs == "own" || needs == open || needs == "list" && open == "all"
					want := ok
					if !allowed {
						want = 403
					}
					mark := b.relay.lastID.Load()
					var body io.Reader
					if method == "POST" {
						body = strings.NewReader("hi")
					}
					req, _ := http.NewRequestWithContext(t.Context(), method, b.url+path, body)
					for _, h := range a.headers {
						name, value, _ := strings.Cut(h, ": ")
						req.Header.Set(name, value)
					}
					if ok == 101 {
						for _, h := range []string{"Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="} {
							name, value, _ := strings.Cut(h, ": ")
							req.Header.Set(name, value)
						}
					}
					res, err := b.client.Do(req)
					if err != nil {
						t.Fatal(err)
					}
					defer res.Body.Close()
					if res.StatusCode != want {
						t.Errorf("%s may %s: %s, want %d", a.name, what, res.Status, want)
						return
					}
					if want == 403 {
						if body, _ := io.ReadAll(res.Body); isError(string(body)) == (method == "HEAD") || b.relay.lastID.Load() != mark {
							t.Errorf("%s: %s", a.name, body)
						}
					}
					cors := ""
					if allowed && origin != "" && open != "own" && (needs != "own" || open == "all") {
						cors = origin
					}
					if got := res.Header.Get("Access-Control-Allow-Origin"); got != cors && want != 101 {
						t.Errorf("%s may %s: Access-Control-Allow-Origin: %q, want %q", a.name, what, got, cors)
					}
					credentials := res.Header.Get("Access-Control-Allow-Credentials")
					if (credentials == "true") != (cors != "" && open == "list") && want != 101 {
						t.Errorf("%s may %s: Access-Control-Allow-Credentials: %q", a.name, what, credentials)
					}
					if cors != "" && !strings.Contains(res.Header.Get("Access-Control-Expose-Headers"), "Retry-After") {
						t.Errorf("%s may not see Retry-After", a.name)
					}
					if origin != "" && !strings.Contains(strings.Join(res.Header["Vary"], ","), "Origin") {
						t.Errorf("%s: Vary: %q", a.name, res.Header["Vary"])
					}
				}
				if a.read != "" {
					for _, technique := range techniques {
						if technique.name != "ws" {
							try("read by "+technique.name, a.read, 200, "GET", "/rooms/a/"+technique.name+"?callback=f&wait=1")
						}
					}
					try("see who is here", a.read, 200, "GET", "/rooms/a/presence")
					try("see a form", a.read, 200, "GET", "/rooms/a/form")
					try("ask for the head", a.read, 200, "HEAD", "/rooms/a/sse")
				}
				if a.publish != "" {
					try("publish", a.publish, 201, "POST", "/rooms/a")
					if origin != "" || len(a.headers) == 0 { // a browser's WebSocket names its origin
						needs := a.publish
						if origin != "" && !strings.Contains(a.name, "form") {
							try("open a WebSocket", needs, 101, "GET", "/rooms/a/ws")
						}
					}
				}
			}
		}))
	}
}

// What a page has to ask before, it is answered: a listed one, with the
// headers it needs.
func TestPreflight(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t, pipe, func(c *config) { c.origins = "https://friend.example" })
		for path, methods := range map[string]string{
			"/rooms/a":          "POST, PUT, DELETE, OPTIONS",
			"/rooms/a/presence": "GET, HEAD, POST, OPTIONS",
			"/rooms/a,b/sse":    "GET, HEAD, OPTIONS",
			"/rooms/a/poll":     "GET, HEAD, OPTIONS",
		} {
			res, body := b.do("OPTIONS", path, "", "Origin: https://friend.example", "Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: cors", "Access-Control-Request-Method: POST", "Access-Control-Request-Headers: content-type,hx-request,traceparent")
			h := res.Header
			if res.StatusCode != 204 || body != "" || h.Get("Allow") != methods || h.Get("Access-Control-Allow-Methods") != methods || h.Get("Access-Control-Allow-Origin") != "https://friend.example" || h.Get("Access-Control-Allow-Credentials") != "true" || h.Get("Access-Control-Max-Age") == "" {
				t.Errorf("%s: %s %v", path, res.Status, h)
			}
			for _, name := range []string{"Content-Type", "Idempotency-Key", "Last-Event-ID", "Authorization", "hx-request", "traceparent"} {
				if !slices.Contains(strings.FieldsFunc(h.Get("Access-Control-Allow-Headers"), func(r rune) bool { return r == ',' || r == ' ' }), name) {
					t.Errorf("%s: %s is not allowed: %v", path, name, h)
				}
			}
			for _, headers := range [][]string{
				{"Origin: https://stranger.example", "Sec-Fetch-Site: cross-site", "Access-Control-Request-Method: POST"},
				{"Origin: null", "Access-Control-Request-Method: POST"},
				{},
			} {
				res, _ := b.do("OPTIONS", path, "", headers...)
				if res.StatusCode != 204 || res.Header.Get("Allow") != methods {
					t.Errorf("%s %q: %s", path, headers, res.Status)
				}
				for name := range res.Header {
					if strings.HasPrefix(name, "Access-Control-") {
						t.Errorf("%s %q: %s is answered", path, headers, name)
					}
				}
			}
		}
	})
}

// A balancer may look with OPTIONS whether the relay is there, as HAProxy does
// unless it is told otherwise.
func TestOptionsOfAPage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t, pipe)
		for _, path := range []string{"/", "/healthz", "/comet.js"} {
			if res, body := b.do("OPTIONS", path, ""); res.StatusCode != 204 || body != "" || res.Header.Get("Allow") != "GET, HEAD, OPTIONS" {
				t.Errorf("%s: %s %v", path, res.Status, res.Header)
			}
		}
	})
}

// A listed page sees what is wrong with its request, whatever that is.
func TestErrorsAcrossOrigins(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t, pipe, func(c *config) { c.origins = "https://friend.example" })
		for _, test := range []struct {
			method, path string
			status       int
		}{
			{"GET", "/rooms/a/poll?after=x", 400},
			{"POST", "/rooms/a?type=bye", 400},
			{"POST", "/rooms/_a", 403},
			{"GET", "/rooms/a%20b/poll", 400},
			{"GET", "/rooms/a/nothing", 404},
			{"GET", "/rooms/a", 405},
		} {
			res, body := b.do(test.method, test.path, "", "Origin: https://friend.example", "Sec-Fetch-Site: cross-site")
			if res.StatusCode != test.status || !isError(body) {
				t.Errorf("%s %s: %s %s, want %d", test.method, test.path, res.Status, body, test.status)
			}
			if res.Header.Get("Access-Control-Allow-Origin") != "https://friend.example" {
				t.Errorf("%s %s: the page can't see the answer", test.method, test.path)
			}
		}
	})
}

// A forever frame tells only the page around it that may know.
func TestFrameTarget(t *testing.T) {
	for list, tests := range map[string][]struct{ referer, site, target, ancestors string }{
		"": {
			{"", "", "location.origin", "'self'"},
			{"http://cometes.test/", "same-origin", "location.origin", "'self'"},
		},
		"https://friend.example": {
			{"https://friend.example/page", "cross-site", `"https://friend.example"`, "'self' https://friend.example"},
			{"http://cometes.test/", "same-origin", "location.origin", "'self' https://friend.example"},
		},
		"*": {
			{"https://stranger.example/page", "cross-site", `"https://stranger.example"`, "*"},
			{"", "cross-site", `"*"`, "*"},
			{"http://cometes.test/", "same-origin", "location.origin", "*"},
			{`https://a"</script><script>alert(1)</script>/`, "cross-site", ``, "*"},
		},
	} {
		t.Run(list, bubble(func(t *testing.T) {
			b := newBed(t, pipe, func(c *config) { c.origins = list })
			for _, test := range tests {
				headers := []string{"Sec-Fetch-Mode: navigate", "Sec-Fetch-Dest: iframe"}
				if test.site != "" {
					headers = append(headers, "Sec-Fetch-Site: "+test.site)
				}
				if test.referer != "" {
					headers = append(headers, "Referer: "+test.referer)
				}
				e := b.listen(kindOf("iframe"), "a", headers...)
				head, err := e.body.Peek(200)
				if err != nil {
					t.Fatal(err)
				}
				if want := "parent.postMessage(event, " + test.target + ")</script>"; test.target != "" && !strings.Contains(string(head), want) {
					t.Errorf("%s: %s, want %s", test.referer, head, want)
				}
				if strings.Contains(string(head), "<script>") {
					t.Errorf("%s: %s", test.referer, head)
				}
				if policy := e.res.Header.Get("Content-Security-Policy"); !strings.HasSuffix(policy, "frame-ancestors "+test.ancestors) {
					t.Errorf("%s: %s, want frame-ancestors %s", test.referer, policy, test.ancestors)
				}
				e.close()
			}
		}))
	}
}

// Presence by HTTP: declared by text, JSON or a form, read as JSON.
func TestPresenceByHTTP(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t, pipe)
		_, body := b.do("GET", "/rooms/a/presence", "")
		if body != `{"room":"a","count":0,"users":{}}`+"\n" {
			t.Errorf("nobody: %s", body)
		}
		for _, test := range []struct{ query, kind, body, want string }{
			{"?user=ada", textKind, "online", `{"ada":"online"}`},
			{"?user=ada", "Content-Type: text/plain;charset=UTF-8", "away", `{"ada":"away"}`}, // as sendBeacon does
			{"?user=ada", jsonKind, `{"state":"typing"}`, `{"ada":"typing"}`},
			{"?user=ada", textKind, `{"state":"online"}`, `{"ada":"online"}`},
			{"?user=ada", formKind, "state=away", `{"ada":"away"}`},
			{"", formKind, "user=bob&state=online", `{"ada":"away","bob":"online"}`},
			{"?user=%3Cb%3E", textKind, "typing\n", `{"\u003cb\u003e":"typing","ada":"away","bob":"online"}`},
			{"?user=%3Cb%3E", textKind, "offline", `{"ada":"away","bob":"online"}`},
			{"?user=bob", textKind, "offline", `{"ada":"away"}`},
			{"?user=nobody", textKind, "offline", `{"ada":"away"}`},
		} {
			if res, body := b.do("POST", "/rooms/a/presence"+test.query, test.body, test.kind); res.StatusCode != 200 || !json.Valid([]byte(body)) {
				t.Errorf("%s %s: %s %s", test.query, test.body, res.Status, body)
			}
			_, body := b.do("GET", "/rooms/a/presence", "")
			if want := fmt.Sprintf(`{"room":"a","count":%d,"users":%s}`+"\n", strings.Count(test.want, `":"`), test.want); body != want {
				t.Errorf("%s %s: %s, want %s", test.query, test.body, body, want)
			}
		}
		// Who polls is here for a minute.
		b.do("GET", "/rooms/p/poll?user=eve", "")
		time.Sleep(time.Minute - time.Millisecond)
		if _, body := b.do("GET", "/rooms/p/presence", ""); !strings.Contains(body, `"eve":"online"`) {
			t.Errorf("after 59.999 s: %s", body)
		}
		time.Sleep(time.Millisecond)
		if _, body := b.do("GET", "/rooms/p/presence", ""); !strings.Contains(body, `"count":0`) {
			t.Errorf("after a minute: %s", body)
		}
		// And who streams while that lasts, and 10 s more.
		ctx, leave := context.WithCancel(t.Context())
		e, err := b.tryListen(ctx, b.client, kindOf("sse"), "s", "user=eve")
		if err != nil {
			t.Fatal(err)
		}
		go io.Copy(io.Discard, e.body)
		time.Sleep(time.Hour)
		leave()
		synctest.Wait()
		time.Sleep(10*time.Second - time.Millisecond)
		if _, body := b.do("GET", "/rooms/s/presence", ""); !strings.Contains(body, `"eve":"online"`) {
			t.Errorf("9.999 s after leaving: %s", body)
		}
		time.Sleep(time.Millisecond)
		if _, body := b.do("GET", "/rooms/s/presence", ""); !strings.Contains(body, `"count":0`) {
			t.Errorf("10 s after leaving: %s", body)
		}
	})
}
