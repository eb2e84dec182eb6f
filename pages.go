// Pages: the files of static/, which are part of the binary, and what people without
// JavaScript see around the events. Without this file the relay serves rooms alone, its
// pages without JavaScript are bare, and multipart has neither as=text nor as=html.
//
// No user's text gets into a page but through html.EscapeString (see fill and fullHTML), and
// no page may run a script that is not one of our files.

package main

import (
	"bytes"
	"cmp"
	"compress/gzip"
	"crypto/rand"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"html"
	"io"
	"io/fs"
	"math"
	"net/http"
	"net/url"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
)

//go:embed static transports.go
var embedded embed.FS

// fileTypes replaces the system's table, which takes .ts for video.
var fileTypes = map[string]string{
	".html": "text/html; charset=utf-8",
	".css":  "text/css; charset=utf-8",
	".js":   "text/javascript; charset=utf-8",
	".ts":   "text/plain; charset=utf-8",
	".svg":  "image/svg+xml",
	".go":   "text/plain; charset=utf-8",
	".txt":  "text/plain; charset=utf-8",
}

// A file is one of static/, or transports.go, whose encoders the lab shows.
type file struct {
	contentType string
	etag        string // of the plain content; that of the other ends with -gzip
	plain, gzip string
}

var files = readFiles()

// readFiles compresses the files once, at the start. A style begins with the colours. Scripts
// and styles lose their comments and indentation; with them they are text in /source/.
func readFiles() map[string]file {
	files := map[string]file{}
	colours, _ := embedded.ReadFile("static/colours.css")
	add := func(name, extension, content string) {
		var packed bytes.Buffer
		zw, _ := gzip.NewWriterLevel(&packed, gzip.BestCompression)
		io.WriteString(zw, content)
		zw.Close()
		sum := sha256.Sum256([]byte(content))
		files["/"+name] = file{fileTypes[extension], hex.EncodeToString(sum[:8]), content, packed.String()}
	}
	fs.WalkDir(embedded, ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || name == "static/colours.css" {
			return err
		}
		b, err := embedded.ReadFile(name)
		name, content, extension := strings.TrimPrefix(name, "static/"), string(b), path.Ext(name)
		if extension == ".css" {
			content = string(colours) + content
		}
		if extension == ".js" || extension == ".css" {
			add("source/"+name, ".txt", content)
			content = withoutComments(content)
		}
		add(name, extension, content)
		return err
	})
	files["/"] = files["/index.html"]
	return files
}

// What no browser needs of a script or a style: at the beginning of a line white space and
// comments, and a comment at its end, unless a quote in it may mean that it is within a string.
var (
	lineStart = regexp.MustCompile(`(?m)^\s*(?:(?://.*|/\*(?s:.*?)\*/)\s*)*`)
	lineEnd   = regexp.MustCompile("(?m)[ \t]+(?:// (?:[^'\"`\n]|\\w'\\w)*|/\\* (?:[^'\"`\n]|\\w'\\w)*? \\*/)$")
)

func withoutComments(source string) string {
	return lineEnd.ReplaceAllString(lineStart.ReplaceAllString(source, ""), "")
}

// shortcuts are addresses that people type for pages.
var shortcuts = map[string]string{"/camera": "./camera.html", "/lab": "./lab.html", "/pad": "./pad.html", "/stats": "./stats.html", "/inspect": "./inspect.html", "/rooms": "./stats.html#rooms", "/rooms/": "../stats.html#rooms"}

// isPage reports whether a path is that of a page, static or not.
func isPage(p string) bool {
	verb := path.Base(p)
	return strings.HasPrefix(files[p].contentType, "text/html") || strings.HasPrefix(p, "/rooms/") && (verb == "html" || verb == "refresh" || verb == "form")
}

// wrapPages returns a handler that answers for pages, and adds to the server what pages need.
func wrapPages(s *server, next http.Handler) http.Handler {
	s.pageHead, s.eventHTML = s.fullHead, cached(64, 16<<10, fullHTML)
	push := s.technique("multipart")
	push.as["text"], push.as["html"] = multipartText, multipartHTML
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		path, isRoom := strings.CutPrefix(r.URL.EscapedPath(), "/rooms/")
		name, verb, _ := strings.Cut(path, "/")
		switch {
		case wantsHTML(r) && shortcuts[r.URL.Path] != "":
			redirect(w, shortcuts[r.URL.Path], r.URL.Query())
		case isRoom && (verb == "form" || verb == "" && wantsHTML(r)):
			s.answer(w, r, func(w http.ResponseWriter, r *http.Request) error {
				rooms, err := parseRooms(name)
				if err != nil {
					return err
				}
				if verb == "" { // a person who typed the address
					query := r.URL.Query()
					query.Set("room", rooms[0])
					redirect(w, strings.Repeat("../", strings.Count(path, "/")+1), query)
					return nil
				}
				_, p := withPermit(r)
				return s.handle(w, r, &request{rooms: rooms, permit: p}, readMethods, p.rights.read, s.handleForm)
			})
		case r.URL.Path == "/healthz" || files[r.URL.Path].contentType != "":
			s.answer(w, r, s.handlePage)
		default:
			next.ServeHTTP(w, r)
		}
	})
}

// wantsHTML reports whether a person's browser asks for a page.
func wantsHTML(r *http.Request) bool {
	return (r.Method == http.MethodGet || r.Method == http.MethodHead) && strings.Contains(r.Header.Get("Accept"), "text/html")
}

// redirect sends a browser to another page. The address is relative, since a proxy may
// serve the relay under a prefix.
func redirect(w http.ResponseWriter, path string, query url.Values) {
	path, fragment, _ := strings.Cut(path, "#")
	to := url.URL{Path: path, RawQuery: query.Encode(), Fragment: fragment}
	w.Header().Set("Location", to.String())
	w.WriteHeader(http.StatusSeeOther)
}

// otherName is the other name of the reader's own machine. A browser takes the two for
// two sites, so the lab can show what a page of another site may do.
var otherName = map[string]string{"localhost": "127.0.0.1", "127.0.0.1": "localhost"}

// handlePage is GET of a static file, and of /healthz.
func (s *server) handlePage(w http.ResponseWriter, r *http.Request) error {
	if r.Method != http.MethodGet && r.Method != http.MethodHead { // HAProxy asks with OPTIONS whether the relay is there
		return s.handle(w, r, nil, readMethods, nil, nil)
	}
	if r.URL.Path == "/healthz" {
		if s.relay.isStopping() {
			return errStopping
		}
		writeJSON(w, http.StatusOK, map[string]string{"status": "ok"})
		return nil
	}
	f, h := files[r.URL.Path], w.Header()
	content := f.plain
	if acceptsGzip(r.Header) {
		content = f.gzip
		f.etag += "-gzip" // an ETag names bytes, so each encoding has its own
		h.Set("Content-Encoding", "gzip")
		h.Set("Content-Length", strconv.Itoa(len(content))) // ServeContent leaves it out of encoded answers
	}
	h.Add("Vary", "Accept-Encoding")
	h.Set("Content-Type", f.contentType)
	h.Set("ETag", strconv.Quote(f.etag))
	h.Set("Access-Control-Allow-Origin", "*") // a module is always loaded with CORS, and there is nothing to hide here
	h.Set("Cache-Control", "no-cache")        // keep it, but ask whether it is still the same
	from := "'self'"
	if host, port, _ := strings.Cut(r.Host, ":"); otherName[host] != "" && strings.HasPrefix(r.URL.Path, "/lab") {
		from += " http://" + otherName[host] + ":" + cmp.Or(port, "80")
	}
	h.Set("Content-Security-Policy", "default-src "+from+"; img-src "+from+" data:; base-uri 'none'; form-action 'self'; frame-ancestors 'self'")
	http.ServeContent(w, r, "", time.Time{}, strings.NewReader(content))
	return nil
}

// acceptsGzip reports whether a client takes gzip, and not rather the bytes as they are
// (RFC 9110, section 12.5.3).
func acceptsGzip(h http.Header) bool {
	quality := map[string]float64{}
	for item := range strings.SplitSeq(strings.Join(h["Accept-Encoding"], ","), ",") {
		coding, weight, weighted := strings.Cut(strings.ReplaceAll(strings.ToLower(item), " ", ""), ";q=")
		quality[coding] = 1
		if weighted {
			quality[coding], _ = strconv.ParseFloat(weight, 64)
		}
	}
	q, named := quality["gzip"]
	if !named {
		q = quality["*"]
	}
	return q > 0 && q >= quality["identity"]
}

// Pages without JavaScript.

// The pieces of pages. See fill for what stands in braces.
const (
	pageStart = `<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title} · Cometes</title>
<link rel="icon" href="../../icon.svg">
<link rel="stylesheet" href="../../plain.css">
`
	bareBody = `<body class="bare">
`
	pageHeader = `<header>
<nav><a href="../../?{chat}">Back to the chat</a></nav>
<h1>{rooms}</h1>
`
	refreshNote = `<p>This page refreshes itself every {wait} seconds.
<a href="form?live=refresh&amp;{query}">Write in a form that stays</a></p>
`
	endlessNote = `<p>This page never ends: new messages appear on top.
<a href="refresh?{query}">A page that refreshes itself instead</a></p>
`
	liveNote = `<p>The messages below refresh themselves every few seconds; what you write stays.</p>
`
	form = `<form method="post" action="../{room}" aria-label="Write a message">
<label>Name <input name="user" value="{user}" pattern="\S(.*\S)?" title="a name, without spaces around it" maxlength="64" size="10" autocomplete="nickname"></label>
<label class="wide">Message <input id="data" name="data" required maxlength="4000" autocomplete="off" autofocus></label>
<input type="hidden" name="key" value="{key}">
<input type="hidden" name="then" value="{then}">
<button>Send</button>
</form>
`
	formFrame = `<section aria-label="Write"><iframe class="form" title="Write a message" src="form?{query}"></iframe></section>
`
	liveFrame = `<main><iframe class="live" title="Messages" src="refresh?form=0&amp;{query}"></iframe></main>
`
)

// fill returns HTML with what the request says, escaped, in place of the names in braces;
// the caller gives more. The key makes a double click on a form one message.
func (q *request) fill(page string, more ...string) string {
	user := url.Values{"user": {q.user}}
	chat := url.Values{"room": {q.rooms[0]}}
	if q.user != "" {
		chat.Set("user", q.user)
	}
	values := append(more, "{rooms}", q.title(), "{room}", q.rooms[0], "{user}", q.user,
		"{query}", user.Encode(), "{chat}", chat.Encode(), "{key}", rand.Text())
	for i := 1; i < len(values); i += 2 {
		values[i] = html.EscapeString(values[i])
	}
	return strings.NewReplacer(values...).Replace(page)
}

func (q *request) title() string { return strings.Join(q.rooms, ", ") }

// fullHead begins a page, with a form: in a page that refreshes itself as part of it,
// else in a frame of its own.
func (s *server) fullHead(q *request, refresh string) string {
	head, write, here := pageHeader+endlessNote, formFrame, ""
	if refresh != "" {
		head, write = pageHeader+refreshNote, form
		if q.sub.seesPresence {
			here = "<p>" + s.relay.roster(q.rooms[0]).sentence() + ".</p>\n"
		}
	}
	if q.param("form") == "0" { // it is in a frame of another page
		head, write = bareBody+"<header>\n", ""
	}
	return q.fill(pageStart+head, "{title}", q.title(), "{wait}", refresh) + here + "</header>\n" + q.fill(write, "{then}", "refresh")
}

// handleForm is GET /rooms/{room}/form: the form alone, for a frame in a page that never
// ends, or with live above a frame with that page.
func (s *server) handleForm(w http.ResponseWriter, r *http.Request, q *request) error {
	q.user = q.userParam()
	page := pageStart + bareBody + form
	switch q.param("live") {
	case "":
	case "refresh":
		page = pageStart + bareBody + pageHeader + liveNote + "</header>\n" + form + liveFrame
	default:
		q.fail(badRequest("live is refresh"))
	}
	if q.err != nil {
		return q.err
	}
	h := w.Header()
	h.Set("Content-Type", "text/html; charset=utf-8")
	h.Set("Content-Security-Policy", q.pagePolicy())
	io.WriteString(w, q.fill(page, "{title}", "Write to "+q.title(), "{then}", "form"))
	return nil
}

// pictureURL is how an image begins that a page shows.
var pictureURL = regexp.MustCompile(`^data:image/(png|jpeg|gif|webp);base64,`)

// fullHTML returns an event as a line of a page.
func fullHTML(e *event) []byte {
	f := e.decode()
	at := time.UnixMilli(f.Time).UTC()
	clock := `<time datetime="` + at.Format(time.RFC3339) + `">` + at.Format("15:04 UTC") + `</time> `
	name := html.EscapeString(cmp.Or(f.From, "somebody"))
	from := "<b><bdi>" + name + "</bdi></b> "
	text := html.EscapeString(asText(f.Data))
	said := `<span dir="auto">` + text + "</span>"
	class, line := "note", clock+"<i>"+e.kind+"</i> "+from+said
	switch e.kind {
	case "message":
		class, line = "message", clock+from+said
	case "image":
		if pictureURL.MatchString(text) {
			said = `<img src="` + text + `" alt="a picture by ` + name + `">`
		}
		class, line = "message", clock+from+said
	case "hello":
		line = "Connected."
	case "bye":
		var bye struct{ Retry int }
		json.Unmarshal(f.Data, &bye)
		line = fmt.Sprintf(`The relay is going away for a moment; this page comes back by itself.<meta http-equiv="refresh" content="%d">`, 1+bye.Retry/1000)
	case "gap":
		class, line = "gap", "Some messages may be missing here."
		if bytes.Contains(f.Data, []byte(`"erased"`)) { // the reason
			line = "The messages before this were erased."
		}
	case "presence":
		line = clock + from + "is " + text
		if f.From == "" {
			var ros roster
			json.Unmarshal(f.Data, &ros)
			line = ros.sentence()
		}
	}
	return []byte(`<p class="` + class + `">` + line + "</p>\n")
}

// sentence returns the roster in words, as HTML.
func (ros roster) sentence() string {
	names := make([]string, 0, len(ros.Users))
	for user, state := range ros.Users {
		user = "<bdi>" + html.EscapeString(user) + "</bdi>"
		if state != "online" {
			user += " (" + state + ")"
		}
		names = append(names, user)
	}
	slices.Sort(names)
	switch {
	case len(names) == 0 || len(names) > maxRosterUsers:
		return strconv.Itoa(ros.Count) + " here"
	case len(names) == 1:
		return names[0] + " is here"
	}
	return strings.Join(names, ", ") + " are here"
}

// Server push for windows and frames, in Firefox.

// multipartText is multipart with as=text: each part is one event.
func multipartText(*request) encoder {
	enc, next := multipartOf("text/plain; charset=utf-8")
	enc.event = func(b []byte, e *event) []byte { return append(append(b, e.text()...), next...) }
	return enc
}

// text returns the event as a line of plain text.
func (e *event) text() string {
	f := e.decode()
	switch {
	case e.kind == "hello":
		return "Connected.\n"
	case e.kind != "message":
		return e.kind + " " + f.From + " " + asText(f.Data) + "\n"
	case f.From != "":
		return f.From + ": " + asText(f.Data) + "\n"
	}
	return asText(f.Data) + "\n"
}

// multipartHTML is multipart with as=html: each part is a whole page. It is read from the
// log again, so that nothing is kept of what the log drops.
func multipartHTML(q *request) encoder {
	s := q.server
	enc, next := multipartOf("text/html; charset=utf-8")
	enc.last = pageMessages
	q.sub.maxBatchBytes = math.MaxInt // a page shows them all
	head := s.pageHead(q, "")
	var from int64 // what lies after it is shown
	var gaps []*event
	enc.batch = func(b []byte, sub *subscriber, events []*event) []byte {
		for _, e := range events {
			if e.kind == "gap" {
				gaps = []*event{e} // the newest
			}
		}
		var shown []*event
		switch e := events[len(events)-1]; {
		case e.kind == "hello": // nothing was read yet
			if sub.lost == "" {
				from = sub.cursor
			}
		case e.kind == "bye":
			shown = append(sub.newest(from, gaps), e)
		case sub.seesPresence:
			shown = sub.appendRosters(sub.newest(from, gaps))
		default:
			shown = sub.newest(from, gaps)
		}
		return append(s.appendPage(append(b, head...), shown), next...)
	}
	return enc
}

// kept returns what the log holds of the subscriber's rooms, with ids above low, up to high.
func (sub *subscriber) kept(low, high int64) (events []*event) {
	for i := range sub.subscriptions {
		h := sub.subscriptions[i].room.history.Load()
		events = append(events, between(h.messages.events, low, high)...)
		events = append(events, between(h.signals.events, low, high)...)
	}
	return events
}

// newest returns what the subscriber has read after a cursor and the log still holds, but
// for presence: what is newest of it, since a page has a size, and the gaps.
func (sub *subscriber) newest(after int64, gaps []*event) []*event {
	now := time.Now().UnixMilli()
	events := slices.DeleteFunc(sub.kept(after, sub.cursor), func(e *event) bool {
		return e.kind == "presence" || e.expiresAt != 0 && e.expiresAt <= now
	})
	byID := func(a, b *event) int { return cmp.Compare(a.id, b.id) }
	slices.SortFunc(events, byID)
	bytes := 0
	for i, e := range slices.Backward(events) {
		if bytes += len(e.json); bytes > maxAnswer {
			events = events[min(i+1, len(events)-1):]
			break
		}
	}
	events = append(events, gaps...)
	slices.SortStableFunc(events, byID) // an event comes before a gap with the same id
	return events
}

// cached returns a function that does what render does, and keeps what it returns for the
// newest events, since most subscribers are sent the same at the same time. There are so
// many slots, and each keeps one value of at most maxBytes.
func cached(slots, maxBytes int, render func(*event) []byte) func(*event) []byte {
	type value struct {
		id   int64 // of the event
		data []byte
	}
	kept := make([]atomic.Pointer[value], slots)
	return func(e *event) []byte {
		if e.publishedAt == 0 { // a notice may have the id of an event
			return render(e)
		}
		slot := &kept[e.id%int64(slots)]
		if v := slot.Load(); v != nil && v.id == e.id {
			return v.data
		}
		data := render(e)
		if len(data) <= maxBytes {
			slot.Store(&value{e.id, data})
		}
		return data
	}
}
