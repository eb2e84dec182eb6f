// Fuzz targets of all that parses input. Their seeds run with every go test;
// go test -fuzz FuzzPublish goes on from there.

package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"unicode"
	"unicode/utf8"

	"github.com/coder/websocket"
)

// fuzzBed is a server that does not listen.
func fuzzBed(t testing.TB) *app {
	c, err := parseFlags(nil, func(string) string { return "" })
	if err != nil {
		t.Fatal(err)
	}
	c.roomRate, c.rate = 1e12, 1e12
	s, err := newApp(c)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// Accepted rooms are 1 to 32 different names, and to name them again gives the same.
func FuzzRooms(f *testing.F) {
	for _, seed := range []string{"", "lobby", "a,b", "a,,b", "a,a", "a%2Cb", "a%2Fb", "%00", "%", "%zz", "_stats", "A-Z.a:z_09", strings.Repeat("x", 65), strings.Repeat("x,", 33), "é", "%C3%A9", "a b", "a+b"} {
		f.Add(seed)
	}
	name := regexp.MustCompile(`^[A-Za-z0-9_.:-]{1,64}$`)
	f.Fuzz(func(t *testing.T, path string) {
		rooms, err := parseRooms(path)
		if err != nil {
			if fault, ok := err.(httpError); !ok || fault.status != 400 || !utf8.ValidString(fault.message) || len(fault.message) > 1000 {
				t.Errorf("%q: %v, want a fault of 400", path, err)
			}
			return
		}
		if len(rooms) < 1 || len(rooms) > 32 || len(slices.Compact(slices.Sorted(slices.Values(rooms)))) != len(rooms) {
			t.Errorf("%q: %q", path, rooms)
		}
		for _, r := range rooms {
			if !name.MatchString(r) {
				t.Errorf("%q: the room %q", path, r)
			}
		}
		if again, err := parseRooms(strings.Join(rooms, ",")); err != nil || !slices.Equal(again, rooms) {
			t.Errorf("%q: %q, and again %q %v", path, rooms, again, err)
		}
	})
}

// A number is accepted in one spelling, within its bounds, and read as it says.
func FuzzNumber(f *testing.F) {
	for _, seed := range []string{"0", "1", "-1", "+1", "007", "1e3", "0x10", "1_000", " 1", "1 ", "9223372036854775807", "9223372036854775808", "-9223372036854775808", "NaN", "٣", "", "1795351418000042"} {
		f.Add(seed, int64(0), int64(1<<62))
	}
	f.Fuzz(func(t *testing.T, v string, low, high int64) {
		if v == "" {
			return // is none, see (*query).number
		}
		var q request
		n := q.parseInt("after", v, low, high, -1)
		if err := q.err; err != nil {
			if !strings.Contains(err.Error(), "after") {
				t.Errorf("%q: %v", v, err)
			}
			return
		}
		if n < low || n > high || !regexp.MustCompile(`^-?[0-9]+$`).MatchString(v) {
			t.Errorf("%q: %d, want %d to %d", v, n, low, high)
		}
		if s := strconv.FormatInt(n, 10); s != strings.TrimPrefix(v, "-") && s != v && strings.TrimLeft(strings.TrimPrefix(v, "-"), "0") != strings.TrimLeft(strings.TrimPrefix(s, "-"), "0") {
			t.Errorf("%q is read as %d", v, n)
		}
	})
}

// A request for any technique with any parameters is 200, or 4xx with a JSON error.
func FuzzQuery(f *testing.F) {
	for _, seed := range []string{"", "after=1&last=2&user=ada&presence=1", "after=-1", "after=1&after=1", "callback=a.b&wait=0", "callback=alert(1)//", "as=html", "as=svg&w=80&h=80", "wait=x", "%", "a;b", "user=%ff", "last=2147483648", "token=x"} {
		for n := range uint8(3) {
			f.Add(n, seed, "")
			f.Add(n, seed, "7")
		}
	}
	s := fuzzBed(f)
	s.checkAndPublish(newPermit(), publishRequest{room: "a", kind: "message", data: []byte(`"hi"`)})
	f.Fuzz(func(t *testing.T, n uint8, query, last string) {
		answers := []string{"refresh", "poll", "jsonp"}
		technique := answers[int(n)%len(answers)]
		if technique == "jsonp" {
			query += "&wait=0"
		}
		r := httptest.NewRequest("GET", "/rooms/a/"+technique, nil)
		r.URL.RawQuery = query
		if last != "" {
			r.Header.Set("Last-Event-ID", last)
		}
		w := newRecorder()
		s.ServeHTTP(w, r)
		kind := w.Header().Get("Content-Type")
		switch body := w.Body.String(); {
		case w.Code == 303 && technique == "refresh": // a token goes into a cookie
		case w.Code >= 400 && w.Code < 500:
			if !isError(body) {
				t.Errorf("%s?%s: %d %q", technique, query, w.Code, body)
			}
		case w.Code != 200:
			t.Errorf("%s?%s: %d %q", technique, query, w.Code, body)
		case technique == "poll":
			var answer struct {
				Cursor *int64
				Events []json.RawMessage
			}
			if json.Unmarshal([]byte(body), &answer) != nil || answer.Cursor == nil {
				t.Errorf("%s?%s: %q", technique, query, body)
			}
		case technique == "jsonp":
			if !regexp.MustCompile(`^/\*\*/[A-Za-z_$][\w$]*(\.[A-Za-z_$][\w$]*)*\(\{"cursor":\d+,"events":\[.*\]\}\);\n$`).MatchString(body) || !strings.HasPrefix(kind, "application/javascript") {
				t.Errorf("%s?%s: %q", technique, query, body)
			}
		case !strings.HasPrefix(kind, "text/html") || w.Header().Get("Refresh") == "0":
			t.Errorf("%s?%s: %s %v", technique, query, kind, w.Header())
		}
	})
}

// A callback that is accepted is a name in ASCII and can't be anything else in a script.
func FuzzCallback(f *testing.F) {
	for _, seed := range []string{"f", "a.b.c", "$", "_", "$1", "1a", "", ".", "a.", ".a", "a..b", "a b", "a(", "a[0]", "é", "a\u2028", "a\x00", "alert(1)//", "</script>", strings.Repeat("x", 64), strings.Repeat("x", 65)} {
		f.Add(seed)
	}
	safe := regexp.MustCompile(`^[A-Za-z_$][A-Za-z0-9_$]*(\.[A-Za-z_$][A-Za-z0-9_$]*)*$`)
	f.Fuzz(func(t *testing.T, name string) {
		if got, want := validCallback(name), safe.MatchString(name) && len(name) <= 64; got != want {
			t.Errorf("%q: %v, want %v", name, got, want)
		}
	})
}

// safeEvent fails unless the JSON is one line that is safe in any framing.
func safeEvent(t *testing.T, line string) {
	t.Helper()
	if !json.Valid([]byte(line)) || !utf8.ValidString(line) || strings.ContainsAny(line, "<>&\n\r\u2028\u2029\x00") {
		t.Errorf("an event that is not one safe line of JSON: %q", line)
	}
}

// newestEvent is what a poll says is the newest of a room.
func newestEvent(t *testing.T, s *app, after int64) string {
	t.Helper()
	w := newRecorder()
	s.ServeHTTP(w, httptest.NewRequest("GET", fmt.Sprint("/rooms/a,b/poll?after=", after), nil))
	var answer struct{ Events []json.RawMessage }
	if err := json.Unmarshal(w.Body.Bytes(), &answer); err != nil || len(answer.Events) != 1 {
		t.Fatalf("%v: %s, want one event", err, w.Body)
	}
	return string(answer.Events[0])
}

// What is published with any type of body is one event that reads back, or is
// refused and changes nothing.
func FuzzPublish(f *testing.F) {
	parts, partsKind := formParts("data", "hi", "user", "ada")
	for _, seed := range []struct{ kind, query, key, body string }{
		{"text/plain", "", "", "hi </script> \u2028 <&>"},
		{"", "user=ada&type=x&key=k&ttl=5", "k", "hi"},
		{"application/json", "", "", `{"a":[1,2,{"b":"<\u2028"}]}`},
		{"application/json", "", "", strings.Repeat("[", 65)},
		{"application/json; charset=utf-16", "", "", `1`},
		{"application/x-www-form-urlencoded", "", "", "data=a%26b&user=ada&type=t&key=k&then=form"},
		{"application/x-www-form-urlencoded", "", "", "hi"},
		{"application/x-www-form-urlencoded", "", "", "data=%ff&then=refresh"},
		{strings.TrimPrefix(partsKind, "Content-Type: "), "", "", parts},
		{"multipart/form-data; boundary=x", "", "", "--x\r\nContent-Disposition: form-data; name=\"data\"\r\n\r\nhi\r\n--x--\r\n"},
		{"multipart/form-data; boundary=x", "", "", "--x\r\nContent-Disposition: form-data; name=\"data\"\r\nContent-Transfer-Encoding: base64\r\n\r\n\xff\r\n--x--\r\n"},
		{"text/plain", "type=bye", "", ""},
		{"text/plain", "user=%ff", "\x7f", "\xff"},
	} {
		f.Add(seed.kind, seed.query, seed.key, []byte(seed.body))
	}
	s := fuzzBed(f)
	f.Fuzz(func(t *testing.T, kind, query, key string, body []byte) {
		r := httptest.NewRequest("POST", "/rooms/a", bytes.NewReader(body))
		r.URL.RawQuery = query
		r.Header.Set("Content-Type", kind)
		if key != "" {
			r.Header.Set("Idempotency-Key", key)
		}
		before := s.relay.lastID.Load()
		w := newRecorder()
		s.ServeHTTP(w, r)
		published := s.relay.lastID.Load() - before
		var answer struct{ ID int64 }
		json.Unmarshal(w.Body.Bytes(), &answer)
		switch w.Code {
		case 201:
			if published != 1 || answer.ID != before+1 {
				t.Errorf("201 %s, and %d were published behind %d", w.Body, published, before)
			}
		case 303:
			to, err := url.Parse(w.Header().Get("Location"))
			if err != nil || to.Host != "" || to.Scheme != "" || !slices.Contains([]string{"./a/form", "./a/refresh"}, to.Path) {
				t.Errorf("303 to %q", w.Header().Get("Location"))
			}
			if published > 1 {
				t.Errorf("303, and %d were published", published)
			}
		case 200:
			if published != 0 || answer.ID > before || answer.ID <= 0 {
				t.Errorf("200 %s, and %d were published behind %d", w.Body, published, before)
			}
		default:
			if w.Code < 400 || w.Code > 499 || !isError(w.Body.String()) || published != 0 {
				t.Errorf("%d %q, and %d were published", w.Code, w.Body, published)
			}
		}
		if published != 1 {
			return
		}
		line := newestEvent(t, s, before)
		safeEvent(t, line)
		var e struct {
			ID   int64
			Room string
			Data json.RawMessage
		}
		if err := json.Unmarshal([]byte(line), &e); err != nil || e.ID != before+1 || e.Room != "a" {
			t.Errorf("it reads back as %s", line)
		}
		var text string
		if kind == "text/plain" && (json.Unmarshal(e.Data, &text) != nil || text != string(body)) {
			t.Errorf("%q became %s", body, e.Data)
		}
		if kind == "application/json" {
			var sent, got any
			json.Unmarshal(body, &sent)
			json.Unmarshal(e.Data, &got)
			if fmt.Sprint(sent) != fmt.Sprint(got) {
				t.Errorf("%s became %s", body, e.Data)
			}
		}
	})
}

// A WebSocket frame publishes one safe event, or is answered with an error
// and changes nothing.
func FuzzFrame(f *testing.F) {
	for _, seed := range []string{
		"", "hi", "{", "{}", `{"data":1}`, `{"type":"message","room":"b","data":{"a":"</script>"},"key":"k","ttl":5}`, `{"type":"presence","data":"typing"}`,
		`{"type":"bye"}`, `{"ttl":-1}`, `{"ttl":1e3}`, `{"room":null,"key":null,"ttl":null,"data":null}`, `{"TYPE":"x","Type":"y"}`, `{"data":` + strings.Repeat("[", 70), "\xff", "{\"data\":\"\xff\"}", `{"key":"` + strings.Repeat("k", 129) + `"}`,
	} {
		f.Add(true, false, []byte(seed))
		f.Add(true, true, []byte(seed))
		f.Add(false, false, []byte(seed))
	}
	f.Fuzz(func(t *testing.T, text, two bool, frame []byte) {
		synctest.Test(t, func(t *testing.T) { // where no lease ends, and is told, between a count and the next
			checkFrame(t, text, two, frame)
		})
	})
}

// checkFrame is one case of FuzzFrame.
func checkFrame(t *testing.T, text, two bool, frame []byte) {
	s := fuzzBed(t)
	q := &author{room: "a", user: "ada", permit: newPermit()}
	if two {
		q.room = ""
	}
	kind := websocket.MessageText
	if !text {
		kind = websocket.MessageBinary
	}
	before := s.relay.lastID.Load()
	answer := s.handleMessage(q, kind, frame)
	published := s.relay.lastID.Load() - before
	if answer != nil {
		safeEvent(t, string(answer.event().json))
	}
	switch {
	case answer != nil && answer.Type == "error":
		if published != 0 {
			t.Errorf("%q: %s, and %d were published", frame, answer.event().json, published)
		}
		return
	case answer != nil && answer.Type == "ack" && answer.event().id != 0:
		if published > 1 || answer.event().id > before+1 || published == 1 && answer.event().id != before+1 {
			t.Errorf("%q: %s, and %d were published behind %d", frame, answer.event().json, published, before)
		}
	case answer != nil && answer.Type != "ack":
		t.Errorf("%q: %s", frame, answer.event().json)
	}
	if !text || !utf8.Valid(frame) {
		t.Errorf("%q was taken", frame)
	}
	if published == 0 {
		return
	}
	w := newRecorder()
	s.ServeHTTP(w, httptest.NewRequest("GET", fmt.Sprint("/rooms/a,b/poll?presence=1&after=", before), nil))
	var all struct {
		Events []json.RawMessage
	}
	json.Unmarshal(w.Body.Bytes(), &all)
	for _, e := range all.Events {
		safeEvent(t, string(e))
		if !bytes.HasPrefix(frame, []byte("{")) {
			var said struct{ Data string }
			if json.Unmarshal(e, &said) != nil || said.Data != string(frame) {
				t.Errorf("%q became %s", frame, e)
			}
		}
	}
}

// A state is declared, or refused; the roster is JSON with states that there are.
func FuzzPresence(f *testing.F) {
	for _, seed := range []struct{ kind, user, body string }{
		{"text/plain", "ada", "online"}, {"text/plain", "ada", " offline\n"}, {"application/json", "ada", `{"state":"typing"}`}, {"", "ada", `{"state":"away"}`},
		{"application/x-www-form-urlencoded", "", "state=typing&user=bob"}, {"application/x-www-form-urlencoded", "ada", "state=a&state=b"}, {"application/json", "", `{"state":null}`},
		{"text/plain", "\xff", "online"}, {"text/plain", "<b>", "online"}, {"application/json", "ada", "{"}, {"text/plain; charset=latin1", "ada", "online"},
	} {
		f.Add(seed.kind, seed.user, []byte(seed.body))
	}
	f.Fuzz(func(t *testing.T, kind, user string, body []byte) {
		s := fuzzBed(t)
		s.relay.presenceTTL = 1
		r := httptest.NewRequest("POST", "/rooms/a/presence?"+url.Values{"user": {user}}.Encode(), bytes.NewReader(body))
		r.Header.Set("Content-Type", kind)
		before := s.relay.lastID.Load()
		w := newRecorder()
		s.ServeHTTP(w, r)
		if w.Code != http.StatusOK {
			if w.Code < 400 || w.Code > 499 || !isError(w.Body.String()) || s.relay.lastID.Load() != before || len(s.relay.rooms) != 0 {
				t.Errorf("%d %q", w.Code, w.Body)
			}
			return
		}
		var said struct{ Room, User, State string }
		if err := json.Unmarshal(w.Body.Bytes(), &said); err != nil || !slices.Contains([]string{"online", "typing", "away", "offline"}, said.State) || said.Room != "a" {
			t.Errorf("%q", w.Body)
		}
		if !utf8.ValidString(said.User) || said.User == "" || utf8.RuneCountInString(said.User) > 64 || strings.ContainsFunc(said.User, unicode.IsControl) {
			t.Errorf("the user %q", said.User)
		}
		w = newRecorder()
		s.ServeHTTP(w, httptest.NewRequest("GET", "/rooms/a/presence", nil))
		var roster struct {
			Count int
			Users map[string]string
		}
		if err := json.Unmarshal(w.Body.Bytes(), &roster); err != nil || roster.Count != len(roster.Users) {
			t.Errorf("%q", w.Body)
		}
	})
}
