// Pages: the files of static/, which are part of the binary, and those that the
// relay writes for people without JavaScript. No user's text gets into a
// page but through html.EscapeString, and no page may run a script that is
// not one of our files.

package main

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"encoding/json"
	"html"
	"io"
	"io/fs"
	"net/http"
	"net/url"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"
)

//go:embed static
var embedded embed.FS

// fileTypes is ours, since the system's table takes .ts for video.
var fileTypes = map[string]string{
	".html": "text/html; charset=utf-8",
	".css":  "text/css; charset=utf-8",
	".js":   "text/javascript; charset=utf-8",
	".ts":   "text/plain; charset=utf-8",
	".svg":  "image/svg+xml",
}

// A file is one of static/.
type file struct {
	kind, etag string
	data       string
}

var files = readFiles()

func readFiles() map[string]file {
	files := map[string]file{}
	fs.WalkDir(embedded, "static", func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := embedded.ReadFile(name)
		sum := sha256.Sum256(b)
		files[strings.TrimPrefix(name, "static")] = file{
			kind: fileTypes[path.Ext(name)],
			etag: `"` + hex.EncodeToString(sum[:8]) + `"`,
			data: string(b),
		}
		return err
	})
	files["/"] = files["/index.html"]
	return files
}

// shortcuts are addresses that people type for pages.
var shortcuts = map[string]string{"/lab": "./lab.html", "/stats": "./stats.html", "/rooms": "./stats.html", "/rooms/": "../stats.html"}

// page answers everything outside of /rooms/.
func (s *server) page(w http.ResponseWriter, r *http.Request) error {
	f, ok := files[r.URL.Path]
	if to := shortcuts[r.URL.Path]; to != "" && browses(r) {
		goTo(w, to, r.URL.Query())
		return nil
	}
	if !ok && r.URL.Path != "/healthz" && r.URL.Path != "/token" && (r.URL.Path != "/metrics" || s.noMetrics) {
		return refuse(http.StatusNotFound, "there is nothing here; rooms are at /rooms/{room}")
	}
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		w.Header().Set("Allow", "GET, HEAD")
		return refuse(http.StatusMethodNotAllowed, r.Method+" is not for this path; GET, HEAD are")
	}
	switch r.URL.Path {
	case "/metrics":
		if err := s.authorize(r, &query{rooms: []string{statsRoom}, values: r.URL.Query()}); err != nil {
			return err
		}
		s.metrics(w)
		return nil
	case "/token":
		return s.tokenInfo(w, r)
	case "/healthz":
		if s.relay.isStopping() {
			return errStopping
		}
		reply(w, http.StatusOK, map[string]string{"status": "ok"})
		return nil
	}
	if q := (&query{values: r.URL.Query()}); q.values.Has("token") && browses(r) && s.authorize(r, q) == nil && s.keepToken(w, r, q) {
		return nil
	}
	h := w.Header()
	h.Set("Content-Type", f.kind)
	h.Set("ETag", f.etag)
	h.Set("Access-Control-Allow-Origin", "*") // a module is always asked for with CORS, and there is nothing here to hide
	h.Set("Cache-Control", "no-cache")        // keep it, but ask whether it is still the same
	h.Set("Content-Security-Policy", "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'self'")
	http.ServeContent(w, r, "", time.Time{}, strings.NewReader(f.data))
	return nil
}

// What an event says to people.

// content is what its JSON holds.
func (e *event) content() (c struct {
	Room, Type, From string
	Time             int64
	Data             json.RawMessage
}) {
	json.Unmarshal(e.json, &c) // it is our own
	return c
}

// asText is data for people: a string is itself, anything else its JSON.
func asText(data json.RawMessage) string {
	var text string
	if !bytes.HasPrefix(data, []byte(`"`)) || json.Unmarshal(data, &text) != nil {
		return string(data)
	}
	return text
}

// text is the event as a line of plain text.
func (e *event) text() string {
	c := e.content()
	switch e.kind {
	case "hello":
		return "Connected.\n"
	case "message":
		if c.From == "" {
			return asText(c.Data) + "\n"
		}
		return c.From + ": " + asText(c.Data) + "\n"
	}
	return e.kind + " " + c.From + " " + asText(c.Data) + "\n"
}

// html is the event as a line of a page. It is made once, however many read it.
func (e *event) html() []byte {
	e.once.Do(func() {
		c := e.content()
		at := time.UnixMilli(c.Time).UTC()
		clock := `<time datetime="` + at.Format(time.RFC3339) + `">` + at.Format("15:04") + `</time> `
		from := "<bdi>" + html.EscapeString(c.From) + "</bdi>"
		text := html.EscapeString(asText(c.Data))
		line := func(class, s string) { e.page = []byte(`<p class="` + class + `">` + s + "</p>\n") }
		switch e.kind {
		case "hello":
			line("note", "Connected.")
		case "message":
			if c.From == "" {
				from = "<bdi>somebody</bdi>"
			}
			line("message", clock+"<b>"+from+`</b> <span dir="auto">`+text+"</span>")
		case "gap":
			if e.erases() {
				line("gap", "The messages before this were erased.")
			} else {
				line("gap", "Some messages may be missing here.")
			}
		case "bye":
			var bye struct{ Retry int }
			json.Unmarshal(c.Data, &bye)
			line("note", `The relay is going away for a moment; this page will come again by itself.`+
				`<meta http-equiv="refresh" content="`+strconv.Itoa(1+bye.Retry/1000)+`">`)
		case "presence":
			var ros roster
			if c.From != "" {
				line("note", clock+"<b>"+from+"</b> is "+text)
			} else if json.Unmarshal(c.Data, &ros) == nil {
				line("note", ros.sentence())
			}
		default:
			line("note", clock+"<i>"+e.kind+"</i> <b>"+from+`</b> <span dir="auto">`+text+"</span>")
		}
	})
	return e.page
}

// sentence is the roster in words, as HTML.
func (ros roster) sentence() string {
	names := make([]string, 0, len(ros.Users))
	for user, state := range ros.Users {
		user = "<bdi>" + html.EscapeString(user) + "</bdi>"
		if state != "online" {
			user += " (" + state + ")"
		}
		names = append(names, user)
	}
	if len(names) == 0 || len(names) > crowdAbove {
		return strconv.Itoa(ros.Count) + " here"
	}
	slices.Sort(names)
	if len(names) == 1 {
		return names[0] + " is here"
	}
	return strings.Join(names, ", ") + " are here"
}

// Pages without a script.

// pageMessages is how many of the last messages such a page shows.
const pageMessages = 50

// pagePolicy is their Content-Security-Policy.
func (q *query) pagePolicy() string {
	return "default-src 'none'; style-src 'self'; frame-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors " + q.ancestors
}

func (q *query) title() string { return html.EscapeString(strings.Join(q.rooms, ", ")) }

// pageStart is how a page begins.
func pageStart(title string) string {
	return `<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>` + title + ` · Cometes</title>
<link rel="stylesheet" href="../../plain.css">
`
}

// pageHead is a page's beginning, with the form to write with: of its own in a
// frame, or, in a page that comes anew as a whole, as part of it.
func pageHead(q *query) string {
	user := url.Values{"user": {q.user}}.Encode()
	head, form := "<header>\n<h1>"+q.title()+"</h1>\n", ""
	switch {
	case q.bare:
		head = "<body class=\"bare\">\n<header>\n"
	case q.pull:
		head += `<p>This page comes anew every ` + strconv.Itoa(int(q.wait/time.Second)) + ` seconds.
<a href="form?live=refresh&amp;` + user + `">Write at leisure</a></p>
`
		form = formFor(q.rooms[0], q.user, "refresh")
	default:
		head += `<p>This page never ends: what is said appears on top.
<a href="refresh?` + user + `">A page that comes anew instead</a></p>
`
		form = `<iframe class="form" title="Write a message" src="form?` + user + `"></iframe>
`
	}
	if q.here != "" {
		head += `<p>` + q.here + ".</p>\n"
	}
	return pageStart(q.title()) + head + "</header>\n" + form
}

// page appends a whole page, the newest message first.
func page(b []byte, q *query, events []*event) []byte {
	b = append(append(b, pageHead(q)...), "<main class=\"log\">\n"...)
	for _, e := range slices.Backward(events[max(0, len(events)-pageMessages):]) {
		if e.kind != "hello" {
			b = append(b, e.html()...)
		}
	}
	return append(b, "</main>\n"...)
}

// formFor is the form that posts to a room and then shows the page named. Its
// key makes a double click one message.
func formFor(room, user, then string) string {
	return `<form method="post" action="../` + room + `">
<label>Name <input name="user" value="` + html.EscapeString(user) + `" pattern="\S(.*\S)?" title="a name, without spaces around it" maxlength="64" size="10" autocomplete="nickname"></label>
<label class="wide">Message <input name="data" required maxlength="4000" autocomplete="off"></label>
<input type="hidden" name="key" value="` + rand.Text() + `">
<input type="hidden" name="then" value="` + then + `">
<button>Send</button>
</form>
`
}

// form is GET /rooms/{room}/form: the form alone, for a frame in a page that
// never ends, or, with live, above a frame with that page.
func (s *server) form(w http.ResponseWriter, r *http.Request, q *query) error {
	user := q.userName()
	if q.err != nil {
		return q.err
	}
	if s.keepToken(w, r, q) {
		return nil
	}
	user = q.speaksAs(user)
	live := q.get("live")
	if live != "" && live != "refresh" {
		q.fail(bad("live is refresh"))
	}
	if q.err != nil {
		return q.err
	}
	h := w.Header()
	h.Set("Content-Type", "text/html; charset=utf-8")
	h.Set("Content-Security-Policy", q.pagePolicy())
	form := formFor(q.rooms[0], user, "form")
	if live != "" {
		form = `<header>
<h1>` + q.title() + `</h1>
<p>What is said comes anew every few seconds; what you write stays.</p>
</header>
` + form + `<iframe class="live" title="Messages" src="refresh?form=0&amp;` + url.Values{"user": {user}}.Encode() + `"></iframe>
`
	}
	io.WriteString(w, pageStart("Write to "+q.title())+"<body class=\"bare\">\n"+form)
	return nil
}
