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
	relay            *relay
	origins          *origins
	beat             time.Duration
	instance         string        // names this process in hello
	secrets          [][]byte      // that tokens are signed with; none if all may read and publish
	addrs            addrLimiter   // by the address of the client
	maxStreams       int64         // streams and requests held, in all
	maxBody          int64         // bytes of a publish
	maxAge           time.Duration // of a stream, when it is sent away; 0 for never
	metricsElsewhere bool          // they are on an address of their own
	pool             writerPool
	active           atomic.Int64 // streams, and requests that wait
	activeAtStop     atomic.Int64 // of those, how many there were when the relay stopped
	unsentBytes      atomic.Int64 // bytes that full sockets did not take, or that are being written; no more than the log may have
	stats            stats

	picturesMu sync.Mutex // guards drawings
	pictures   map[pictureKey]*renderer
}

// A fault is an error that is the client's business.
type httpError struct {
	status     int
	message    string
	reason     string // counted under, if it is a limit or a matter of access
	retryAfter int    // seconds after which it may be otherwise
	newest     int64  // of 412: the room's newest message
}

func (f httpError) Error() string { return f.message }

func newError(status int, text string) httpError { return httpError{status: status, message: text} }

func badRequest(format string, args ...any) error {
	return newError(http.StatusBadRequest, fmt.Sprintf(format, args...))
}

// limitError is a refusal that is counted under a reason, and may be otherwise after
// retry seconds.
func limitError(status int, text, reason string, retry int) httpError {
	return httpError{status: status, message: text, reason: reason, retryAfter: retry}
}

var (
	errClientGone     = errors.New("the client left, or takes nothing")
	errReserved       = newError(http.StatusForbidden, "rooms whose names begin with _ belong to the relay; publish to another")
	errTooBig         = limitError(http.StatusRequestEntityTooLarge, "the body is too big; -body of the relay is its limit", "body", 0)
	errSlow           = limitError(http.StatusRequestTimeout, fmt.Sprintf("the body did not arrive within %v", requestTimeout), "body", 0)
	errTooFast        = limitError(http.StatusTooManyRequests, "this address publishes too fast", "rate", 1)
	errTooManyPerAddr = limitError(http.StatusTooManyRequests, "this address holds too many connections", "address", 10)
	errExpired        = limitError(http.StatusUnauthorized, "the token has expired", "token", 0)
	errWrongRoom      = limitError(http.StatusForbidden, "the token is not good for this room", "token", 0)
	errTooManyStreams = limitError(http.StatusServiceUnavailable, "the relay holds as many connections as it may; try again later", "streams", 10)
	errState          = badRequest("the state is one of online, typing, away, offline")
	errUser           = badRequest("user is 1 to %d characters of UTF-8: none of them a control character, a line separator or a bidirectional control; not blank, and no space at either end", maxName)
	errClient         = badRequest("client is 1 to %d of A-Z a-z 0-9 _ . : -", maxName)
	errTTL            = badRequest("ttl is 1 to %d seconds", maxTTL)
	errIf             = badRequest("if is the id of a message, or 0")
	errUTF8           = badRequest("this is not UTF-8")
)

// Values of headers that most answers have, made once.
var (
	nosniff    = []string{"nosniff"}
	sameOrigin = []string{"same-origin"}
	noStore    = []string{"no-store"}
	jsonUTF8   = []string{"application/json; charset=utf-8"}
	varyOrigin = []string{"Origin, Sec-Fetch-Site"}
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
	f, ok := err.(httpError)
	if !ok {
		if r.Context().Err() != nil || errors.Is(err, errClientGone) {
			return // no error of ours
		}
		id := rand.Text()[:8]
		f = newError(http.StatusInternalServerError, "the relay failed; its log says more under "+id)
		slog.Error("request failed", "id", id, "method", r.Method, "path", r.URL.Path, "error", err)
	}
	s.countRefusal(f.reason)
	if f.retryAfter > 0 {
		h.Set("Retry-After", strconv.Itoa(f.retryAfter))
	}
	if f.status == http.StatusUnauthorized {
		h.Set("WWW-Authenticate", "Bearer")
	}
	answer := map[string]any{"error": f.message}
	if f.status == http.StatusPreconditionFailed {
		answer["id"] = f.newest
	}
	writeJSON(w, f.status, answer)
}

// writeJSON answers with v as JSON.
func writeJSON(w http.ResponseWriter, status int, v any) {
	b, _ := json.Marshal(v)
	writeJSONBytes(w, status, b)
}

// writeJSONBytes answers with JSON.
func writeJSONBytes(w http.ResponseWriter, status int, b []byte) {
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
	if !ok && !list || (list || path == "") && wantsHTML(r) {
		return s.handlePage(w, r)
	}
	s.origins.cors(w, r)
	if list {
		return s.withAccess(w, r, &request{}, readMethods, s.listRooms)
	}
	name, verb, _ := strings.Cut(path, "/")
	rooms, err := parseRooms(name)
	if err != nil {
		return err
	}
	q := &request{rooms: rooms, publishes: verb == ""}
	switch verb {
	case "":
		if wantsHTML(r) { // a person who typed the address
			redirect(w, strings.Repeat("../", strings.Count(path, "/")+1), url.Values{"room": rooms[:1]}, r.URL.Query())
			return nil
		}
		return s.withAccess(w, r, q, roomMethods, s.publishOrErase)
	case "presence":
		return s.withAccess(w, r, q, presenceMethods, s.handlePresence)
	case "form":
		return s.withAccess(w, r, q, readMethods, s.handleForm)
	}
	for _, t := range techniques {
		if t.name == verb {
			return s.withAccess(w, r, q, readMethods, func(w http.ResponseWriter, r *http.Request, q *request) error {
				if err := q.parseSubscribe(r, t); err != nil {
					return err
				}
				if (t.name == "html" || t.name == "refresh") && s.moveTokenToCookie(w, r, q) {
					return nil
				}
				h := w.Header()
				h.Set("Cache-Control", "no-store, no-transform")
				h.Set("X-Accel-Buffering", "no") // nginx
				c := s.stats.techniques[t.name]
				c.requests.Add(1)
				c.in.Add(requestSize(r))
				return s.serveTechnique(w, r, t, q)
			})
		}
	}
	return newError(http.StatusNotFound, "there is no such technique; there are "+techniqueNames())
}

// wantsHTML reports whether a person's browser asks for a page.
func wantsHTML(r *http.Request) bool {
	return (r.Method == http.MethodGet || r.Method == http.MethodHead) && strings.Contains(r.Header.Get("Accept"), "text/html")
}

// redirect sends a browser on. The address is relative, for a proxy may serve the
// relay under a path of its own.
func redirect(w http.ResponseWriter, path string, query ...url.Values) {
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

// withAccess has do answer if the method is one of methods, and the page and the token
// behind the request are good for it. OPTIONS it answers itself.
func (s *server) withAccess(w http.ResponseWriter, r *http.Request, q *request, methods []string, do func(http.ResponseWriter, *http.Request, *request) error) error {
	if !slices.Contains(methods, r.Method) {
		methods := strings.Join(methods, ", ")
		w.Header().Set("Allow", methods)
		text := r.Method + " is not for this path; " + methods + " are"
		if q.publishes {
			text += ". Events are read from /rooms/{room}/{technique}: " + techniqueNames()
		}
		return newError(http.StatusMethodNotAllowed, text)
	}
	foreign, err := s.origins.check(r)
	if err != nil {
		return err
	}
	if r.Method == http.MethodOptions {
		s.origins.preflight(w, r, strings.Join(methods, ", "))
		return nil
	}
	q.foreignOrigin, q.frameAncestors, q.addr = foreign, s.origins.ancestors, s.addrs.clientAddr(r)
	if r.URL.RawQuery != "" {
		if q.values, err = url.ParseQuery(r.URL.RawQuery); err != nil {
			return badRequest("the query is not well formed: %v", err)
		}
	}
	if err := s.authorize(r, q); err != nil {
		return err
	}
	return do(w, r, q)
}

// A query is a request, checked.
type request struct {
	rooms          []string
	values         url.Values
	foreignOrigin  string     // the foreign origin that asks; "*" if it does not say which, "" if none does
	addr           netip.Addr // the client's
	frameAncestors string     // whose pages may frame this one
	claims         *claims    // of the token, if the relay asks for one
	err            error      // the first that is wrong with it
	publishes      bool       // asks to publish

	visible       bool   // is seen
	seesPresence  bool   // sees who is
	unnamedEvents bool   // without the names of events
	refreshes     bool   // a page that comes anew
	withoutForm   bool   // without its form
	user          string // speaks as
	client        string // names the page or program that asks, so that its goodbye is known for its own
	cursor        int64  // -1 for none
	last          int
	wait          time.Duration
	callback      string
	as            string
	picture       pictureKey
	rosterText    string // who is here, in words, as HTML
}

// subscribeRequest is the query as the relay takes it.
func (q *request) subscribeRequest(h mode) subscribeRequest {
	user := ""
	if q.visible {
		user = q.user
	}
	batch := 256 << 10
	if h == streaming {
		batch = 16 << 10 // a client whose socket is full is kept so much at most
	}
	if q.as == "svg" {
		return subscribeRequest{rooms: []string{q.picture.name()}, cursor: -1, last: 1, longLived: true, maxBatchBytes: batch}
	}
	return subscribeRequest{rooms: q.rooms, cursor: q.cursor, last: q.last, user: user, client: q.client, presence: q.seesPresence, longLived: h != immediate, maxBatchBytes: batch}
}

// param is the parameter's value, or "". Given twice, none of them is meant.
func (q *request) param(name string) string { return q.single(name, q.values[name]) }

// single is the value of what may be given once, or "".
func (q *request) single(name string, v []string) string {
	if len(v) == 0 {
		return ""
	}
	if len(v) > 1 {
		q.setError(badRequest("%s is given twice", name))
	}
	return v[0]
}

// setError keeps the first that is wrong, so that a request can be read to its end
// before somebody looks.
func (q *request) setError(err error) { q.err = cmp.Or(q.err, err) }

// paramOrForm is a parameter of the query or the form; both may say the same.
func (q *request) paramOrForm(form url.Values, name string) string {
	v := q.param(name)
	f, ok := form[name]
	if !ok {
		return v
	}
	if len(f) > 1 || v != "" && v != f[0] {
		q.setError(badRequest("%s is given twice", name))
	}
	return f[0]
}

// intParam is the parameter as an integer from low to high, or absent.
func (q *request) intParam(name string, low, high, absent int64) int64 {
	return q.parseInt(name, q.param(name), low, high, absent)
}

// parseInt is number of the value v.
func (q *request) parseInt(name, v string, low, high, absent int64) int64 {
	if v == "" {
		return absent
	}
	n, err := strconv.ParseInt(v, 10, 64)
	if err != nil || n < low || n > high || v[0] == '+' {
		q.setError(badRequest("%s is an integer from %d to %d", name, low, high))
	}
	return n
}

// parseSubscribe reads what all techniques take, and what only some do.
func (q *request) parseSubscribe(r *http.Request, t technique) error {
	q.user = q.userParam()
	const maxCursor = 1<<63 - 1
	q.cursor = q.intParam("after", 0, maxCursor, -1)
	const header = "Last-Event-ID"
	q.cursor = q.parseInt("lastEventId", q.lastEventID(), 0, maxCursor, q.cursor)
	q.cursor = q.parseInt(header, q.single(header, r.Header.Values(header)), 0, maxCursor, q.cursor)
	q.refreshes = t.name == "refresh"
	people := q.refreshes || t.name == "html"
	switch q.as = q.param("as"); {
	case slices.Contains(t.as, q.as):
		people = people || q.as == "html"
		if q.as == "svg" {
			q.parsePictureSize()
		}
	case q.as == "data" && t.as == nil: // others are passed over, but this one would be missed
		q.setError(badRequest("%s has no as=data; sse and ws have", t.name))
	case q.as != "" && (q.as == "data" || t.name == "multipart"):
		q.setError(badRequest("as is one of %s", strings.Join(t.as, ", ")))
	case t.as != nil:
		q.as = t.as[0]
	default:
		q.as = ""
	}
	least, wait, last := int64(0), int64(25), int64(0)
	if people {
		wait, last = 10, pageMessages
	}
	if q.refreshes {
		least = 1 // with 0 a browser asks thirty times a second
	}
	q.last = int(q.intParam("last", 0, 1<<31-1, last))
	q.withoutForm = q.param("form") == "0"
	q.wait = time.Duration(q.intParam("wait", least, maxWait, wait)) * time.Second
	q.wait = min(q.wait, time.Until(time.Unix(0, q.claims.expires())))
	switch see := q.param("presence"); see {
	case "":
		q.visible = q.user != ""
		q.seesPresence = q.visible
	case "0", "1":
		q.seesPresence = see == "1"
	default:
		q.setError(badRequest("presence is 1, to see it, or 0"))
	}
	q.user = q.effectiveUser(q.user)
	q.client = q.clientName()
	q.unnamedEvents = q.intParam("names", 0, 1, 1) == 0
	if t.name == "jsonp" {
		if q.callback = q.param("callback"); !validCallback(q.callback) {
			q.setError(badRequest("callback is the name of a function: a JavaScript name, or several with dots between, of at most %d characters", maxName))
		}
	}
	return q.err
}

// parsePictureSize reads the size of a picture.
func (q *request) parsePictureSize() {
	w := q.intParam("w", minSide, maxSide, pictureWidth)
	h := q.intParam("h", minSide, maxSide, pictureHeight)
	if len(q.rooms) > 1 {
		q.setError(badRequest("a picture is of one room"))
	}
	q.picture = pictureKey{q.rooms[0], int(w), int(h)}
}

func badRoom(name string) error {
	return badRequest("%.80q is no name for a room: that is 1 to %d of A-Z a-z 0-9 _ . : -", name, maxName)
}

// userParam is the parameter user, or "".
func (q *request) userParam() string {
	user := q.param("user")
	if !validUser(user) {
		q.setError(errUser)
	}
	return user
}

// clientName is the parameter client, or "".
func (q *request) clientName() string {
	client := q.param("client")
	if client != "" && !validName(client) {
		q.setError(errClient)
	}
	return client
}

// lastEventID is the parameter by which those say where they were who can't set
// the header: EventSource polyfills, Mercure's clients. Each spells it in its own
// way: lastEventId, lastEventID, Last-Event-ID.
func (q *request) lastEventID() string {
	var ids []string
	for name, v := range q.values {
		if strings.EqualFold(strings.NewReplacer("-", "", "_", "").Replace(name), "lastEventId") {
			ids = append(ids, v...)
		}
	}
	slices.Sort(ids)
	return q.single("lastEventId", slices.Compact(ids))
}

func parseRooms(escaped string) ([]string, error) {
	list, err := url.PathUnescape(escaped)
	if err != nil {
		return nil, badRequest("the path is not well formed: %v", err)
	}
	rooms := strings.Split(list, ",")
	if len(rooms) > maxRooms {
		return nil, badRequest("these are %d rooms; one request names at most %d", len(rooms), maxRooms)
	}
	for i, room := range rooms {
		if !validName(room) {
			return nil, badRoom(room)
		}
		if slices.Contains(rooms[:i], room) {
			return nil, badRequest("the room %q is named twice", room)
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
var reservedTypes = []string{"hello", "presence", "gap", "beat", "ack", "error", "bye"}

// publishChecked publishes what was not checked yet, but for its data.
func (s *server) publishChecked(p publishRequest) (id int64, fresh bool, err error) {
	switch {
	case p.room == "":
		return 0, false, badRequest("this reads several rooms; name the one that is meant")
	case !validName(p.room):
		return 0, false, badRoom(p.room)
	case p.room[0] == '_':
		return 0, false, errReserved
	case !validName(p.kind):
		return 0, false, badRequest("%.80q is no type: that is 1 to %d of A-Z a-z 0-9 _ . : -", p.kind, maxName)
	case slices.Contains(reservedTypes, p.kind):
		return 0, false, badRequest("the type %s is the relay's own; publish another", p.kind)
	case len(p.key) > maxKey || !utf8.ValidString(p.key) || strings.ContainsFunc(p.key, unicode.IsControl):
		return 0, false, badRequest("a key is at most %d bytes of UTF-8, none of them a control character", maxKey)
	}
	if id, fresh, err = s.relay.publish(p); fresh {
		s.stats.published.Add(1)
		s.throttle()
	}
	return id, fresh, err
}

// setPresence sets the state of a user in a room, none of it checked yet.
func (s *server) setPresence(room, user, client, state string) error {
	switch {
	case !validName(room):
		return badRequest("presence is in one room; name it")
	case room[0] == '_':
		return errReserved
	case user == "":
		return badRequest("presence is a user's; name one")
	case !validUser(user):
		return errUser
	case !slices.Contains([]string{"online", "typing", "away", "offline"}, state):
		return errState
	}
	return s.relay.setPresence(room, user, client, state)
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
		return badRequest("this is not JSON; text goes as text/plain")
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
			if hasLoneSurrogate(quoted) {
				return badRequest("this JSON has half of a surrogate pair: %.80s", quoted)
			}
			if !bytes.HasPrefix(bytes.TrimLeft(b[end+1:], " \t\r\n"), []byte(":")) {
				continue // a value
			}
			var name string
			json.Unmarshal(quoted, &name)
			if names := around[len(around)-1]; names[name] {
				return badRequest("this JSON has the name %.80s twice in one object", quoted)
			} else {
				names[name] = true
			}
		case '-', '0', '1', '2', '3', '4', '5', '6', '7', '8', '9':
			end := i + 1
			for end < len(b) && strings.IndexByte("+-.0123456789Ee", b[end]) >= 0 {
				end++
			}
			if _, err := strconv.ParseFloat(string(b[i:end]), 64); err != nil {
				return badRequest("this JSON has a number beyond what a double holds: %.80s", b[i:end])
			}
			i = end - 1
		}
		if len(around) > most {
			return badRequest("this JSON is nested deeper than %d", most)
		}
	}
	return nil
}

// hasLoneSurrogate reports whether a JSON string escapes half of a surrogate pair
// without the other (RFC 8259, 8.2).
func hasLoneSurrogate(quoted []byte) bool {
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
		return badRequest("a field of this JSON is of the wrong type")
	}
	return nil
}

// publishOrErase is POST, PUT and DELETE /rooms/{room}.
func (s *server) publishOrErase(w http.ResponseWriter, r *http.Request, q *request) error {
	if len(q.rooms) > 1 {
		return badRequest("publish to one room at a time, and erase one")
	}
	if r.Method == http.MethodDelete {
		return s.erase(w, r, q)
	}
	return s.handlePublish(w, r, q)
}

func (s *server) handlePublish(w http.ResponseWriter, r *http.Request, q *request) error {
	s.stats.in.Add(requestSize(r))
	if !s.addrs.allow(q.addr) {
		return errTooFast
	}
	p, then, err := s.parsePost(w, r, q)
	if err != nil {
		return err
	}
	id, fresh, err := s.publishChecked(p)
	if err != nil {
		return err
	}
	if then != "" { // a person's form: back to the page it is on
		redirect(w, "./"+q.rooms[0]+"/"+then, url.Values{"user": {p.from}})
		return nil
	}
	status := http.StatusOK
	if fresh {
		status = http.StatusCreated
	}
	writeJSONBytes(w, status, append(strconv.AppendInt([]byte(`{"id":`), id, 10), '}'))
	return nil
}

// parsePost reads a publish from a request's query, headers and body. With a
// form of ours comes the page to go to then.
func (s *server) parsePost(w http.ResponseWriter, r *http.Request, q *request) (p publishRequest, then string, err error) {
	b, kind, form, err := s.readBody(w, r, "data")
	s.stats.in.Add(int64(len(b)))
	if err != nil {
		return p, "", err
	}
	p.room = q.rooms[0]
	p.kind = cmp.Or(q.paramOrForm(form, "type"), "message")
	p.from = q.paramOrForm(form, "user")
	p.key = q.paramOrForm(form, "key")
	p.unlimited = q.addr.IsLoopback()
	const header = "Idempotency-Key"
	if key := q.single(header, r.Header.Values(header)); key != "" {
		if p.key != "" && p.key != key {
			q.setError(badRequest("key and Idempotency-Key differ"))
		}
		p.key = key
	}
	if !validUser(p.from) {
		q.setError(errUser)
	}
	p.from = q.effectiveUser(p.from)
	p.ttl = time.Duration(q.parseInt("ttl", q.paramOrForm(form, "ttl"), 1, maxTTL, 0)) * time.Second
	if q.values.Has("if") || form.Has("if") {
		newest, err := strconv.ParseUint(q.paramOrForm(form, "if"), 10, 63)
		if err != nil {
			q.setError(errIf)
		}
		p.onlyIf = new(int64(newest))
	}
	if q.err != nil {
		return p, "", q.err
	}

	switch {
	case len(form["data"]) > 1:
		err = badRequest("data is given twice")
	case !utf8.ValidString(form.Get("data")):
		err = errUTF8
	case form != nil:
		p.data = quoteJSON([]byte(form.Get("data")))
		if then = form.Get("then"); then != "form" && then != "refresh" {
			then = ""
		}
	case isJSON(kind):
		if err = checkJSON(b, maxDepth); err == nil {
			p.data = compactJSON(b)
		}
	case !utf8.Valid(b):
		err = badRequest("the body is not UTF-8; the relay carries text and JSON")
	default:
		p.data = quoteJSON(b)
	}
	return p, then, err
}

// quoteJSON is text as a JSON string. Most needs nothing but the quotes.
func quoteJSON(text []byte) []byte {
	for _, c := range text {
		if c < ' ' || c > '~' || c == '"' || c == '\\' || c == '<' || c == '>' || c == '&' {
			b, _ := json.Marshal(string(text))
			return b
		}
	}
	return slices.Concat([]byte(`"`), text, []byte(`"`))
}

// compactJSON is valid JSON as json.Marshal writes it: on one line, and escaped.
func compactJSON(data []byte) []byte {
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
		return newError(http.StatusUnsupportedMediaType, what+" is not taken; send UTF-8, not encoded")
	}
	if e := r.Header.Get("Content-Encoding"); e != "" && e != "identity" {
		return nil, "", nil, unsupported("Content-Encoding " + strconv.Quote(e))
	}
	switch c := params["charset"]; strings.ToLower(c) {
	case "", "utf-8", "utf8", "us-ascii":
	default:
		return nil, "", nil, unsupported("charset " + strconv.Quote(c))
	}
	if r.ContentLength > s.maxBody {
		return nil, "", nil, errTooBig // before a client that expects 100 is told to go on
	}
	b, err = io.ReadAll(http.MaxBytesReader(w, r.Body, s.maxBody))
	switch _, tooBig := errors.AsType[*http.MaxBytesError](err); {
	case tooBig:
		return nil, "", nil, errTooBig
	case errors.Is(err, os.ErrDeadlineExceeded):
		w.Header().Set("Connection", "close")
		return nil, "", nil, errSlow
	case err != nil:
		return nil, "", nil, badRequest("the body did not arrive whole")
	}
	switch kind {
	case "application/x-www-form-urlencoded":
		if form, err := url.ParseQuery(string(b)); err == nil && form.Has(field) && bytes.Contains(b, []byte(field+"=")) {
			return b, kind, form, nil
		}
	case "multipart/form-data":
		r.Body = io.NopCloser(bytes.NewReader(b))
		if err := r.ParseMultipartForm(s.maxBody); err != nil || !url.Values(r.MultipartForm.Value).Has(field) {
			return nil, "", nil, badRequest("this is no form with a field %s", field)
		}
		return b, kind, r.MultipartForm.Value, nil
	}
	return b, kind, nil, nil
}

// handlePresence is GET and POST /rooms/{room}/presence.
func (s *server) handlePresence(w http.ResponseWriter, r *http.Request, q *request) error {
	if len(q.rooms) > 1 {
		return badRequest("presence is in one room; name it")
	}
	room := q.rooms[0]
	if r.Method != http.MethodPost {
		writeJSON(w, http.StatusOK, struct {
			Room string `json:"room"`
			roster
		}{room, s.relay.roster(room)})
		return nil
	}
	user, client := q.userParam(), q.clientName()
	if q.err != nil {
		return q.err
	}
	if !s.addrs.allow(q.addr) {
		return errTooFast
	}
	b, kind, form, err := s.readBody(w, r, "state")
	if err != nil {
		return err
	}
	state := strings.TrimSpace(string(b))
	if form != nil {
		state, user = q.paramOrForm(form, "state"), q.paramOrForm(form, "user")
	} else if isJSON(kind) || strings.HasPrefix(state, "{") {
		state = ""
		if err := parseObject(b, maxDepth, map[string]any{"state": &state}); err != nil {
			return err
		}
	}
	if user = q.effectiveUser(user); q.err != nil {
		return q.err
	}
	if err := s.setPresence(room, user, client, state); err != nil {
		return err
	}
	writeJSON(w, http.StatusOK, map[string]string{"room": room, "user": user, "state": state})
	return nil
}
