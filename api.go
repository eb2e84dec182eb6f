// The interface: which request means what, and what is wrong with the others.
// Every input is checked here, once; what lies behind relies on it.

package main

import (
	"bytes"
	"cmp"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"mime"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode"
	"unicode/utf16"
	"unicode/utf8"
)

const (
	maxBody  = 64 << 10  // bytes of a publish, and of a WebSocket frame, unless -body says otherwise
	maxName  = 64        // bytes of the name of a room or type, of a callback; characters of a user
	maxKey   = 128       // bytes of a publish key
	maxRooms = 32        // in one request
	maxDepth = 64        // of nested JSON: parsers of other languages give up soon after
	maxTTL   = 24 * 3600 // seconds of a signal
	maxWait  = 55        // seconds of a long-poll: many proxies cut at 60
)

// A server is the relay as seen by HTTP.
type server struct {
	relay     *relay
	origins   *origins
	beat      time.Duration
	instance  string        // names this process in hello
	secrets   [][]byte      // that tokens are signed with; none if all may read and publish
	gate      gate          // by the address of the client
	most      int64         // streams and requests held, in all
	body      int64         // bytes of a publish
	age       time.Duration // of a stream, when it is sent away; 0 for never
	noMetrics bool          // they are on an address of their own
	pump      pump
	held      atomic.Int64 // streams, and requests that wait
	leaving   atomic.Int64 // of those, how many there were when the relay stopped
	unsent    atomic.Int64 // bytes that full sockets did not take, or that are being written; no more than the log may have
	stats     stats

	drawingMu sync.Mutex // guards drawings
	drawings  map[pictureOf]*canvas
}

// A fault is an error that is the client's business.
type fault struct {
	status int
	text   string
	reason string // counted under, if it is a limit or a matter of access
	retry  int    // seconds after which it may be otherwise
	newest int64  // of 412: the room's newest message
}

func (f fault) Error() string { return f.text }

func refuse(status int, text string) fault { return fault{status: status, text: text} }

func bad(format string, args ...any) error {
	return refuse(http.StatusBadRequest, fmt.Sprintf(format, args...))
}

// limit is a refusal that is counted under a reason, and may be otherwise after
// retry seconds.
func limit(status int, text, reason string, retry int) fault {
	return fault{status: status, text: text, reason: reason, retry: retry}
}

var (
	errGone     = errors.New("the client left, or takes nothing")
	errReserved = refuse(http.StatusForbidden, "rooms whose names begin with _ belong to the relay; publish to another")
	errTooBig   = limit(http.StatusRequestEntityTooLarge, "the body is too big; -body of the relay is its limit", "body", 0)
	errSlow     = limit(http.StatusRequestTimeout, fmt.Sprintf("the body did not arrive within %v", requestTimeout), "body", 0)
	errTooFast  = limit(http.StatusTooManyRequests, "this address publishes too fast", "rate", 1)
	errTooMany  = limit(http.StatusTooManyRequests, "this address holds too many connections", "address", 10)
	errExpired  = limit(http.StatusUnauthorized, "the token has expired", "token", 0)
	errNotGood  = limit(http.StatusForbidden, "the token is not good for this room", "token", 0)
	errFullUp   = limit(http.StatusServiceUnavailable, "the relay holds as many connections as it may; try again later", "streams", 10)
	errState    = bad("the state is one of online, typing, away, offline")
	errUser     = bad("user is 1 to %d characters of UTF-8: none of them a control character, a line separator or a bidirectional control; not blank, and no space at either end", maxName)
	errClient   = bad("client is 1 to %d of A-Z a-z 0-9 _ . : -", maxName)
	errTTL      = bad("ttl is 1 to %d seconds", maxTTL)
	errIf       = bad("if is the id of a message, or 0")
	errUTF8     = bad("this is not UTF-8")
)

// Values of headers that most answers have, made once.
var (
	nosniff    = []string{"nosniff"}
	sameOrigin = []string{"same-origin"}
	noStore    = []string{"no-store"}
	jsonUTF8   = []string{"application/json; charset=utf-8"}
	byOrigin   = []string{"Origin, Sec-Fetch-Site"}
)

// ServeHTTP answers a request, and says what is wrong when it can't.
func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	h := w.Header()
	h["X-Content-Type-Options"] = nosniff
	if r.Method != http.MethodPost { // the answer to a post is kept by no cache, and links to nothing
		h["Cache-Control"] = noStore
		h["Referrer-Policy"] = sameOrigin // a URL may hold a token
	}
	err := s.route(w, r)
	if err == nil {
		return
	}
	f, ok := err.(fault)
	if !ok {
		if r.Context().Err() != nil || errors.Is(err, errGone) {
			return // no error of ours
		}
		id := rand.Text()[:8]
		f = refuse(http.StatusInternalServerError, "the relay failed; its log says more under "+id)
		slog.Error("request failed", "id", id, "method", r.Method, "path", r.URL.Path, "error", err)
	}
	s.refused(f.reason)
	if f.retry > 0 {
		h.Set("Retry-After", strconv.Itoa(f.retry))
	}
	if f.status == http.StatusUnauthorized {
		h.Set("WWW-Authenticate", "Bearer")
	}
	answer := map[string]any{"error": f.text}
	if f.status == http.StatusPreconditionFailed {
		answer["id"] = f.newest
	}
	reply(w, f.status, answer)
}

// reply answers with v as JSON.
func reply(w http.ResponseWriter, status int, v any) {
	b, _ := json.Marshal(v)
	send(w, status, b)
}

// send answers with JSON.
func send(w http.ResponseWriter, status int, b []byte) {
	h := w.Header()
	h["Content-Type"] = jsonUTF8
	w.WriteHeader(status)
	w.Write(append(b, '\n'))
}

var (
	roomMethods     = []string{"POST", "PUT", "DELETE", "OPTIONS"}
	presenceMethods = []string{"GET", "HEAD", "POST", "OPTIONS"}
	readMethods     = []string{"GET", "HEAD", "OPTIONS"}
)

// route finds what a path and method ask for. It goes by the escaped path, so
// a slash within a name is seen for what it is, and nothing is redirected.
func (s *server) route(w http.ResponseWriter, r *http.Request) error {
	whole := r.URL.EscapedPath()
	path, ok := strings.CutPrefix(whole, "/rooms/")
	list := whole == "/rooms"
	if !ok && !list || (list || path == "") && browses(r) {
		return s.page(w, r)
	}
	s.origins.cors(w, r)
	if list {
		return s.handle(w, r, &query{}, readMethods, s.listRooms)
	}
	name, verb, _ := strings.Cut(path, "/")
	rooms, err := parseRooms(name)
	if err != nil {
		return err
	}
	q := &query{rooms: rooms, writes: verb == ""}
	switch verb {
	case "":
		if browses(r) { // a person who typed the address
			goTo(w, strings.Repeat("../", strings.Count(path, "/")+1), url.Values{"room": rooms[:1]}, r.URL.Query())
			return nil
		}
		return s.handle(w, r, q, roomMethods, s.publishOrErase)
	case "presence":
		return s.handle(w, r, q, presenceMethods, s.presence)
	case "form":
		return s.handle(w, r, q, readMethods, s.form)
	}
	for _, t := range techniques {
		if t.name == verb {
			return s.handle(w, r, q, readMethods, func(w http.ResponseWriter, r *http.Request, q *query) error {
				if err := q.parse(r, t); err != nil {
					return err
				}
				if (t.name == "html" || t.name == "refresh") && s.keepToken(w, r, q) {
					return nil
				}
				h := w.Header()
				h.Set("Cache-Control", "no-store, no-transform")
				h.Set("X-Accel-Buffering", "no") // nginx
				c := s.stats.tallies[t.name]
				c.requests.Add(1)
				c.in.Add(requestSize(r))
				return s.serve(w, r, t, q)
			})
		}
	}
	return refuse(http.StatusNotFound, "there is no such technique; there are "+techniqueNames())
}

// browses reports whether a person's browser asks for a page.
func browses(r *http.Request) bool {
	return (r.Method == http.MethodGet || r.Method == http.MethodHead) && strings.Contains(r.Header.Get("Accept"), "text/html")
}

// goTo sends a browser on. The address is relative, for a proxy may serve the
// relay under a path of its own.
func goTo(w http.ResponseWriter, path string, query ...url.Values) {
	all := url.Values{}
	for _, values := range query {
		for name, v := range values {
			if !all.Has(name) {
				all[name] = v
			}
		}
	}
	to := url.URL{Path: path, RawQuery: all.Encode()}
	w.Header().Set("Location", to.String())
	w.WriteHeader(http.StatusSeeOther)
}

func techniqueNames() string {
	var names []string
	for _, t := range techniques {
		names = append(names, t.name)
	}
	return strings.Join(names, " ")
}

// handle has do answer if the method is one of methods, and the page and the token
// behind the request are good for it. OPTIONS it answers itself.
func (s *server) handle(w http.ResponseWriter, r *http.Request, q *query, methods []string, do func(http.ResponseWriter, *http.Request, *query) error) error {
	if !slices.Contains(methods, r.Method) {
		methods := strings.Join(methods, ", ")
		w.Header().Set("Allow", methods)
		text := r.Method + " is not for this path; " + methods + " are"
		if q.writes {
			text += ". Events are read from /rooms/{room}/{technique}: " + techniqueNames()
		}
		return refuse(http.StatusMethodNotAllowed, text)
	}
	foreign, err := s.origins.allow(r)
	if err != nil {
		return err
	}
	if r.Method == http.MethodOptions {
		s.origins.preflight(w, r, strings.Join(methods, ", "))
		return nil
	}
	q.origin, q.ancestors, q.addr = foreign, s.origins.ancestors, s.gate.addr(r)
	if r.URL.RawQuery != "" {
		if q.values, err = url.ParseQuery(r.URL.RawQuery); err != nil {
			return bad("the query is not well formed: %v", err)
		}
	}
	if err := s.authorize(r, q); err != nil {
		return err
	}
	return do(w, r, q)
}

// A query is a request, checked.
type query struct {
	rooms     []string
	values    url.Values
	origin    string     // the foreign origin that asks; "*" if it does not say which, "" if none does
	addr      netip.Addr // the client's
	ancestors string     // whose pages may frame this one
	claims    *claims    // of the token, if the relay asks for one
	err       error      // the first that is wrong with it
	writes    bool       // asks to publish

	seen     bool   // is seen
	presence bool   // sees who is
	nameless bool   // without the names of events
	pull     bool   // a page that comes anew
	bare     bool   // without its form
	user     string // speaks as
	client   string // names the page or program that asks, so that its goodbye is known for its own
	after    int64  // -1 for none
	last     int
	wait     time.Duration
	callback string
	as       string
	picture  pictureOf
	here     string // who is here, in words, as HTML
}

// want is the query as the relay takes it.
func (q *query) want(h hold) want {
	user := ""
	if q.seen {
		user = q.user
	}
	batch := 256 << 10
	if h == forever {
		batch = 16 << 10 // a client whose socket is full is kept so much at most
	}
	if q.as == "svg" {
		return want{rooms: []string{q.picture.name()}, after: -1, last: 1, holds: true, batchBytes: batch}
	}
	return want{rooms: q.rooms, after: q.after, last: q.last, user: user, client: q.client, presence: q.presence, holds: h != atOnce, batchBytes: batch}
}

// get is the parameter's value, or "". Given twice, none of them is meant.
func (q *query) get(name string) string { return q.one(name, q.values[name]) }

// one is the value of what may be given once, or "".
func (q *query) one(name string, v []string) string {
	if len(v) == 0 {
		return ""
	}
	if len(v) > 1 {
		q.fail(bad("%s is given twice", name))
	}
	return v[0]
}

// fail keeps the first that is wrong, so that a request can be read to its end
// before somebody looks.
func (q *query) fail(err error) { q.err = cmp.Or(q.err, err) }

// either is a parameter of the query or the form; both may say the same.
func (q *query) either(form url.Values, name string) string {
	v := q.get(name)
	f, ok := form[name]
	if !ok {
		return v
	}
	if len(f) > 1 || v != "" && v != f[0] {
		q.fail(bad("%s is given twice", name))
	}
	return f[0]
}

// number is the parameter as an integer from low to high, or absent.
func (q *query) number(name string, low, high, absent int64) int64 {
	return q.integer(name, q.get(name), low, high, absent)
}

// integer is number of the value v.
func (q *query) integer(name, v string, low, high, absent int64) int64 {
	if v == "" {
		return absent
	}
	n, err := strconv.ParseInt(v, 10, 64)
	if err != nil || n < low || n > high || v[0] == '+' {
		q.fail(bad("%s is an integer from %d to %d", name, low, high))
	}
	return n
}

// parse reads what all techniques take, and what only some do.
func (q *query) parse(r *http.Request, t technique) error {
	q.user = q.userName()
	const maxCursor = 1<<63 - 1
	q.after = q.number("after", 0, maxCursor, -1)
	const header = "Last-Event-ID"
	q.after = q.integer("lastEventId", q.lastEventID(), 0, maxCursor, q.after)
	q.after = q.integer(header, q.one(header, r.Header.Values(header)), 0, maxCursor, q.after)
	q.pull = t.name == "refresh"
	people := q.pull || t.name == "html"
	switch q.as = q.get("as"); {
	case slices.Contains(t.as, q.as):
		people = people || q.as == "html"
		if q.as == "svg" {
			q.parseSize()
		}
	case q.as == "data" && t.as == nil: // others are passed over, but this one would be missed
		q.fail(bad("%s has no as=data; sse and ws have", t.name))
	case q.as != "" && (q.as == "data" || t.name == "multipart"):
		q.fail(bad("as is one of %s", strings.Join(t.as, ", ")))
	case t.as != nil:
		q.as = t.as[0]
	default:
		q.as = ""
	}
	least, wait, last := int64(0), int64(25), int64(0)
	if people {
		wait, last = 10, pageMessages
	}
	if q.pull {
		least = 1 // with 0 a browser asks thirty times a second
	}
	q.last = int(q.number("last", 0, 1<<31-1, last))
	q.bare = q.get("form") == "0"
	q.wait = time.Duration(q.number("wait", least, maxWait, wait)) * time.Second
	q.wait = min(q.wait, time.Until(time.Unix(0, q.claims.until())))
	switch see := q.get("presence"); see {
	case "":
		q.seen = q.user != ""
		q.presence = q.seen
	case "0", "1":
		q.presence = see == "1"
	default:
		q.fail(bad("presence is 1, to see it, or 0"))
	}
	q.user = q.speaksAs(q.user)
	q.client = q.clientName()
	q.nameless = q.number("names", 0, 1, 1) == 0
	if t.name == "jsonp" {
		if q.callback = q.get("callback"); !validCallback(q.callback) {
			q.fail(bad("callback is the name of a function: a JavaScript name, or several with dots between, of at most %d characters", maxName))
		}
	}
	return q.err
}

// parseSize reads the size of a picture.
func (q *query) parseSize() {
	w := q.number("w", minSide, maxSide, pictureWidth)
	h := q.number("h", minSide, maxSide, pictureHeight)
	if len(q.rooms) > 1 {
		q.fail(bad("a picture is of one room"))
	}
	q.picture = pictureOf{q.rooms[0], int(w), int(h)}
}

func badRoom(name string) error {
	return bad("%.80q is no name for a room: that is 1 to %d of A-Z a-z 0-9 _ . : -", name, maxName)
}

// userName is the parameter user, or "".
func (q *query) userName() string {
	user := q.get("user")
	if !validUser(user) {
		q.fail(errUser)
	}
	return user
}

// clientName is the parameter client, or "".
func (q *query) clientName() string {
	client := q.get("client")
	if client != "" && !validName(client) {
		q.fail(errClient)
	}
	return client
}

// lastEventID is the parameter by which those say where they were who can't set
// the header: EventSource polyfills, Mercure's clients. Each spells it in its own
// way: lastEventId, lastEventID, Last-Event-ID.
func (q *query) lastEventID() string {
	var ids []string
	for name, v := range q.values {
		if strings.EqualFold(strings.NewReplacer("-", "", "_", "").Replace(name), "lastEventId") {
			ids = append(ids, v...)
		}
	}
	slices.Sort(ids)
	return q.one("lastEventId", slices.Compact(ids))
}

func parseRooms(escaped string) ([]string, error) {
	list, err := url.PathUnescape(escaped)
	if err != nil {
		return nil, bad("the path is not well formed: %v", err)
	}
	rooms := strings.Split(list, ",")
	if len(rooms) > maxRooms {
		return nil, bad("these are %d rooms; one request names at most %d", len(rooms), maxRooms)
	}
	for i, room := range rooms {
		if !validName(room) {
			return nil, badRoom(room)
		}
		if slices.Contains(rooms[:i], room) {
			return nil, bad("the room %q is named twice", room)
		}
	}
	return rooms, nil
}

// validName reports whether s can name a room or a type.
func validName(s string) bool {
	for i := range len(s) {
		switch c := s[i]; {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '_', c == '.', c == ':', c == '-':
		default:
			return false
		}
	}
	return 1 <= len(s) && len(s) <= maxName
}

// validUser reports whether s can name a user. None is "". A name is shown beside
// others, so it must be seen, and not turn around what is next to it.
func validUser(s string) bool {
	return utf8.ValidString(s) && utf8.RuneCountInString(s) <= maxName && strings.TrimSpace(s) == s &&
		(s == "" || strings.ContainsFunc(s, visible)) &&
		!strings.ContainsFunc(s, func(r rune) bool {
			return unicode.IsControl(r) || unicode.In(r, unicode.Bidi_Control, unicode.Zl, unicode.Zp)
		})
}

// visible reports whether r alone would be seen.
func visible(r rune) bool {
	const brailleBlank = 0x2800
	return unicode.IsGraphic(r) && !unicode.IsSpace(r) && !unicode.Is(unicode.Other_Default_Ignorable_Code_Point, r) && r != brailleBlank
}

// validCallback reports whether s is a JavaScript name, or several with dots
// between them, in ASCII.
func validCallback(s string) bool {
	if len(s) > maxName {
		return false
	}
	for part := range strings.SplitSeq(s, ".") {
		for i, c := range part {
			letter := 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || c == '_' || c == '$'
			if !letter && (i == 0 || c < '0' || c > '9') {
				return false
			}
		}
		if part == "" {
			return false
		}
	}
	return true
}

// ownTypes are those of the relay; nobody else publishes them.
var ownTypes = []string{"hello", "presence", "gap", "beat", "ack", "error", "bye"}

// post publishes what was not checked yet, but for its data.
func (s *server) post(p post) (id int64, fresh bool, err error) {
	switch {
	case p.room == "":
		return 0, false, bad("this reads several rooms; name the one that is meant")
	case !validName(p.room):
		return 0, false, badRoom(p.room)
	case p.room[0] == '_':
		return 0, false, errReserved
	case !validName(p.kind):
		return 0, false, bad("%.80q is no type: that is 1 to %d of A-Z a-z 0-9 _ . : -", p.kind, maxName)
	case slices.Contains(ownTypes, p.kind):
		return 0, false, bad("the type %s is the relay's own; publish another", p.kind)
	case len(p.key) > maxKey || !utf8.ValidString(p.key) || strings.ContainsFunc(p.key, unicode.IsControl):
		return 0, false, bad("a key is at most %d bytes of UTF-8, none of them a control character", maxKey)
	}
	if id, fresh, err = s.relay.publish(p); fresh {
		s.stats.published.Add(1)
		s.ease()
	}
	return id, fresh, err
}

// declare sets the state of a user in a room, none of it checked yet.
func (s *server) declare(room, user, client, state string) error {
	switch {
	case !validName(room):
		return bad("presence is in one room; name it")
	case room[0] == '_':
		return errReserved
	case user == "":
		return bad("presence is a user's; name one")
	case !validUser(user):
		return errUser
	case !slices.Contains([]string{"online", "typing", "away", "offline"}, state):
		return errState
	}
	return s.relay.declare(room, user, client, state)
}

// What JSON must be, to be given to others to parse.

func isJSON(kind string) bool {
	return kind == "application/json" || kind == "text/json" || strings.HasSuffix(kind, "+json") // RFC 6839
}

// checkJSON says what is wrong with JSON for any parser that is stricter than
// Go's (I-JSON, RFC 7493): nested deeper than most, half of a surrogate pair, a
// number beyond a double, a name twice in one object.
func checkJSON(b []byte, most int) error {
	if !utf8.Valid(b) {
		return errUTF8
	}
	if !json.Valid(b) {
		return bad("this is not JSON; text goes as text/plain")
	}
	var around []map[string]bool // the names so far of each object around; nil for an array
	for i := 0; i < len(b); i++ {
		switch c := b[i]; c {
		case '{':
			around = append(around, map[string]bool{})
		case '[':
			around = append(around, nil)
		case '}', ']':
			around = around[:len(around)-1]
		case '"':
			end := i + 1
			for ; b[end] != '"'; end++ {
				if b[end] == '\\' {
					end++
				}
			}
			quoted := b[i : end+1]
			i = end
			if halfSurrogate(quoted) {
				return bad("this JSON has half of a surrogate pair: %.80s", quoted)
			}
			if !bytes.HasPrefix(bytes.TrimLeft(b[end+1:], " \t\r\n"), []byte(":")) {
				continue // a value
			}
			var name string
			json.Unmarshal(quoted, &name)
			if names := around[len(around)-1]; names[name] {
				return bad("this JSON has the name %.80s twice in one object", quoted)
			} else {
				names[name] = true
			}
		case '-', '0', '1', '2', '3', '4', '5', '6', '7', '8', '9':
			end := i + 1
			for end < len(b) && strings.IndexByte("+-.0123456789Ee", b[end]) >= 0 {
				end++
			}
			if _, err := strconv.ParseFloat(string(b[i:end]), 64); err != nil {
				return bad("this JSON has a number beyond what a double holds: %.80s", b[i:end])
			}
			i = end - 1
		}
		if len(around) > most {
			return bad("this JSON is nested deeper than %d", most)
		}
	}
	return nil
}

// halfSurrogate reports whether a JSON string escapes half of a surrogate pair
// without the other (RFC 8259, 8.2).
func halfSurrogate(quoted []byte) bool {
	unit := func(b []byte) rune {
		if len(b) < 6 || b[0] != '\\' || b[1] != 'u' {
			return 0
		}
		n, _ := strconv.ParseUint(string(b[2:6]), 16, 16)
		return rune(n)
	}
	for i := 0; i < len(quoted); i++ {
		if quoted[i] != '\\' {
			continue
		}
		if high := unit(quoted[i:]); utf16.IsSurrogate(high) {
			if utf16.DecodeRune(high, unit(quoted[i+6:])) == unicode.ReplacementChar {
				return true
			}
			i += 10
		}
		i++
	}
	return false
}

// parseObject reads the fields of a JSON object by their exact names, which
// encoding/json would match in any case. Others are passed over.
func parseObject(b []byte, most int, fields map[string]any) error {
	if err := checkJSON(b, most); err != nil {
		return err
	}
	var raw map[string]json.RawMessage
	err := json.Unmarshal(b, &raw)
	for name, to := range fields {
		if v, ok := raw[name]; ok && err == nil {
			err = json.Unmarshal(v, to)
		}
	}
	if err != nil {
		return bad("a field of this JSON is of the wrong type")
	}
	return nil
}

// publishOrErase is POST, PUT and DELETE /rooms/{room}.
func (s *server) publishOrErase(w http.ResponseWriter, r *http.Request, q *query) error {
	if len(q.rooms) > 1 {
		return bad("publish to one room at a time, and erase one")
	}
	if r.Method == http.MethodDelete {
		return s.erase(w, r, q)
	}
	return s.publish(w, r, q)
}

func (s *server) publish(w http.ResponseWriter, r *http.Request, q *query) error {
	s.stats.in.Add(requestSize(r))
	if !s.gate.take(q.addr) {
		return errTooFast
	}
	p, then, err := s.parsePost(w, r, q)
	if err != nil {
		return err
	}
	id, fresh, err := s.post(p)
	if err != nil {
		return err
	}
	if then != "" { // a person's form: back to the page it is on
		goTo(w, "./"+q.rooms[0]+"/"+then, url.Values{"user": {p.from}})
		return nil
	}
	status := http.StatusOK
	if fresh {
		status = http.StatusCreated
	}
	send(w, status, append(strconv.AppendInt([]byte(`{"id":`), id, 10), '}'))
	return nil
}

// parsePost reads a publish from a request's query, headers and body. With a
// form of ours comes the page to go to then.
func (s *server) parsePost(w http.ResponseWriter, r *http.Request, q *query) (p post, then string, err error) {
	b, kind, form, err := s.readBody(w, r, "data")
	s.stats.in.Add(int64(len(b)))
	if err != nil {
		return p, "", err
	}
	p.room = q.rooms[0]
	p.kind = cmp.Or(q.either(form, "type"), "message")
	p.from = q.either(form, "user")
	p.key = q.either(form, "key")
	p.unmetered = q.addr.IsLoopback()
	const header = "Idempotency-Key"
	if key := q.one(header, r.Header.Values(header)); key != "" {
		if p.key != "" && p.key != key {
			q.fail(bad("key and Idempotency-Key differ"))
		}
		p.key = key
	}
	if !validUser(p.from) {
		q.fail(errUser)
	}
	p.from = q.speaksAs(p.from)
	p.ttl = time.Duration(q.integer("ttl", q.either(form, "ttl"), 1, maxTTL, 0)) * time.Second
	if q.values.Has("if") || form.Has("if") {
		newest, err := strconv.ParseUint(q.either(form, "if"), 10, 63)
		if err != nil {
			q.fail(errIf)
		}
		p.onlyIf = new(int64(newest))
	}
	if q.err != nil {
		return p, "", q.err
	}

	switch {
	case len(form["data"]) > 1:
		err = bad("data is given twice")
	case !utf8.ValidString(form.Get("data")):
		err = errUTF8
	case form != nil:
		p.data = quote([]byte(form.Get("data")))
		if then = form.Get("then"); then != "form" && then != "refresh" {
			then = ""
		}
	case isJSON(kind):
		if err = checkJSON(b, maxDepth); err == nil {
			p.data = oneLine(b)
		}
	case !utf8.Valid(b):
		err = bad("the body is not UTF-8; the relay carries text and JSON")
	default:
		p.data = quote(b)
	}
	return p, then, err
}

// quote is text as a JSON string. Most needs nothing but the quotes.
func quote(text []byte) []byte {
	for _, c := range text {
		if c < ' ' || c > '~' || c == '"' || c == '\\' || c == '<' || c == '>' || c == '&' {
			b, _ := json.Marshal(string(text))
			return b
		}
	}
	return slices.Concat([]byte(`"`), text, []byte(`"`))
}

// oneLine is valid JSON as json.Marshal writes it: on one line, and escaped.
func oneLine(data []byte) []byte {
	if data == nil {
		return []byte("null")
	}
	b, _ := json.Marshal(json.RawMessage(data))
	return b
}

// readBody reads a bounded body, its media type, and the form in it if it is one
// with the field. curl -d sends any text as a form; that is taken for what it is.
func (s *server) readBody(w http.ResponseWriter, r *http.Request, field string) (b []byte, kind string, form url.Values, err error) {
	kind, params, err := mime.ParseMediaType(r.Header.Get("Content-Type"))
	if err != nil {
		kind, params = "", nil
	}
	unsupported := func(what string) error {
		return refuse(http.StatusUnsupportedMediaType, what+" is not taken; send UTF-8, not encoded")
	}
	if e := r.Header.Get("Content-Encoding"); e != "" && e != "identity" {
		return nil, "", nil, unsupported("Content-Encoding " + strconv.Quote(e))
	}
	switch c := params["charset"]; strings.ToLower(c) {
	case "", "utf-8", "utf8", "us-ascii":
	default:
		return nil, "", nil, unsupported("charset " + strconv.Quote(c))
	}
	if r.ContentLength > s.body {
		return nil, "", nil, errTooBig // before a client that expects 100 is told to go on
	}
	b, err = io.ReadAll(http.MaxBytesReader(w, r.Body, s.body))
	switch _, tooBig := errors.AsType[*http.MaxBytesError](err); {
	case tooBig:
		return nil, "", nil, errTooBig
	case errors.Is(err, os.ErrDeadlineExceeded):
		w.Header().Set("Connection", "close")
		return nil, "", nil, errSlow
	case err != nil:
		return nil, "", nil, bad("the body did not arrive whole")
	}
	switch kind {
	case "application/x-www-form-urlencoded":
		if form, err := url.ParseQuery(string(b)); err == nil && form.Has(field) && bytes.Contains(b, []byte(field+"=")) {
			return b, kind, form, nil
		}
	case "multipart/form-data":
		r.Body = io.NopCloser(bytes.NewReader(b))
		if err := r.ParseMultipartForm(s.body); err != nil || !url.Values(r.MultipartForm.Value).Has(field) {
			return nil, "", nil, bad("this is no form with a field %s", field)
		}
		return b, kind, r.MultipartForm.Value, nil
	}
	return b, kind, nil, nil
}

// presence is GET and POST /rooms/{room}/presence.
func (s *server) presence(w http.ResponseWriter, r *http.Request, q *query) error {
	if len(q.rooms) > 1 {
		return bad("presence is in one room; name it")
	}
	room := q.rooms[0]
	if r.Method != http.MethodPost {
		reply(w, http.StatusOK, struct {
			Room string `json:"room"`
			roster
		}{room, s.relay.whoIsIn(room)})
		return nil
	}
	user, client := q.userName(), q.clientName()
	if q.err != nil {
		return q.err
	}
	if !s.gate.take(q.addr) {
		return errTooFast
	}
	b, kind, form, err := s.readBody(w, r, "state")
	if err != nil {
		return err
	}
	state := strings.TrimSpace(string(b))
	if form != nil {
		state, user = q.either(form, "state"), q.either(form, "user")
	} else if isJSON(kind) || strings.HasPrefix(state, "{") {
		state = ""
		if err := parseObject(b, maxDepth, map[string]any{"state": &state}); err != nil {
			return err
		}
	}
	if user = q.speaksAs(user); q.err != nil {
		return q.err
	}
	if err := s.declare(room, user, client, state); err != nil {
		return err
	}
	reply(w, http.StatusOK, map[string]string{"room": room, "user": user, "state": state})
	return nil
}
