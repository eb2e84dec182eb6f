// Who may use the relay: pages by their origin, and with a secret, clients by their
// token. Without this file anybody may do anything.
//
// A page of the relay's own origin may always ask; pages of other origins only if they
// are listed. Programs send neither Origin nor Sec-Fetch-Site and are not concerned:
// the rule protects people whose browser a foreign page would use, not the relay.
//
// With a secret, a client that reads or publishes brings a token that says who it is,
// until when, and which rooms it may read and write: a JSON Web Token (RFC 7519)
// signed with HMAC and SHA-256 (HS256), which any backend can make with the library
// it has.

package main

import (
	"cmp"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"math"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"time"
)

// access gives each request a permit.
type access struct {
	anyOrigin  bool
	origins    []string // whose pages may read and publish, beside the relay's own
	ancestors  string   // whose pages may frame the relay's, as in a Content-Security-Policy
	secrets    [][]byte // that tokens are signed with; none if all may read and publish
	trustProxy bool     // there is a proxy
}

// newAccess reads -origins, a comma separated list of origins, https://example.com or
// http://localhost:3000, or * for all; and -secret.
func newAccess(c config) (*access, error) {
	a := &access{secrets: parseSecrets(c.secret), trustProxy: c.trustProxy}
	if c.secret != "" && a.secrets == nil {
		return nil, errors.New("-secret is blank")
	}
	for _, origin := range splitList(c.origins) {
		switch {
		case origin == "*":
			a.anyOrigin = true
		case new(http.CrossOriginProtection).AddTrustedOrigin(origin) != nil: // it knows what an origin is
			return nil, fmt.Errorf("-origins: %q is no origin such as https://example.com", origin)
		default:
			a.origins = append(a.origins, origin)
		}
	}
	a.ancestors = strings.Join(append([]string{"'self'"}, a.origins...), " ")
	if a.anyOrigin {
		a.ancestors = "*"
	}
	return a, nil
}

// wrap returns a handler that gives requests their permit, and answers those about tokens.
func (a *access) wrap(s *server, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r, p := withPermit(r)
		rights := &accessRights{a: a, claims: noClaims}
		if a.secrets != nil {
			rights.claims, rights.tokenErr = a.verify(r)
		}
		p.rights, p.ancestors = rights, a.ancestors
		p.user, p.expiresAt = rights.claims.Sub, rights.claims.expires()
		var err error
		if strings.HasPrefix(r.URL.Path, "/rooms") {
			w = a.cors(w, r)
			p.origin, err = a.check(r)
		}
		switch {
		case err != nil:
			s.answer(w, r, func(http.ResponseWriter, *http.Request) error { return err })
		case rights.inURL(r):
			s.answer(w, r, rights.moveToCookie)
		case r.URL.Path == "/token":
			s.answer(w, r, rights.describe)
		default:
			next.ServeHTTP(w, r)
		}
	})
}

// accessRights are the rights of one request.
type accessRights struct {
	a        *access
	claims   *claims // empty without a good token
	tokenErr error
}

func (ar *accessRights) read(room string) error  { return ar.check(ar.claims.Read, room) }
func (ar *accessRights) write(room string) error { return ar.check(ar.claims.Write, room) }

func (ar *accessRights) check(list []string, room string) error {
	if ar.a.secrets == nil || ar.tokenErr != nil {
		return ar.tokenErr
	}
	if !matchesRoom(list, room) {
		return tokenError(http.StatusForbidden, fmt.Sprintf("the token is not good for the room %q", room))
	}
	return nil
}

// statsRoom is the room that only operators read.
const statsRoom = "_stats"

// operate allows an operator: a client whose token names the room _stats; or, without a
// secret, one on this machine.
func (ar *accessRights) operate(r *http.Request) error {
	if ar.a.secrets != nil {
		return ar.read(statsRoom)
	}
	if ar.a.isLocal(r) {
		return nil
	}
	return newError(http.StatusForbidden, "this is for operators: ask from the machine itself, or give the relay a -secret and bring a token that may read "+statsRoom)
}

// proxyHeaders are set by proxies.
var proxyHeaders = []string{"X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto", "X-Real-Ip", "Forwarded", "Via", "Fly-Client-Ip", "Cf-Connecting-Ip", "True-Client-Ip"}

// isLocal reports whether a request is from this machine and came through no proxy, as far
// as one can know: nginx speaks HTTP/1.0 by default, and a page that the name of another
// site leads here (DNS rebinding) asks for that name.
func (a *access) isLocal(r *http.Request) bool {
	from, _ := netip.ParseAddrPort(r.RemoteAddr)
	if !from.Addr().Unmap().IsLoopback() || a.trustProxy || !r.ProtoAtLeast(1, 1) {
		return false
	}
	name := (&url.URL{Host: r.Host}).Hostname()
	ip, err := netip.ParseAddr(name)
	return (name == "localhost" || err == nil && ip.IsLoopback()) &&
		!slices.ContainsFunc(proxyHeaders, func(name string) bool { return r.Header[name] != nil })
}

// Origins.

// cors writes the headers (https://fetch.spec.whatwg.org/#http-cors-protocol) that let a
// page of a listed origin see the answer, even if it is an error, and send what it likes: a
// header of its own tools, for tracing or of htmx, does no harm.
func (a *access) cors(w http.ResponseWriter, r *http.Request) http.ResponseWriter {
	h, origin := w.Header(), r.Header.Get("Origin")
	if origin == "" && r.Method == http.MethodPost {
		return w // no page sees the answer, and no cache keeps it
	}
	h.Set("Vary", "Origin, Sec-Fetch-Site")
	if origin == "" || !a.anyOrigin && !slices.Contains(a.origins, origin) {
		return w
	}
	h.Set("Access-Control-Allow-Origin", origin)
	h.Set("Access-Control-Expose-Headers", "Retry-After")
	if !a.anyOrigin {
		h.Set("Access-Control-Allow-Credentials", "true")
	}
	if r.Method != http.MethodOptions {
		return w
	}
	headers := "Authorization, Content-Type, Idempotency-Key, Last-Event-ID"
	if asked := r.Header.Get("Access-Control-Request-Headers"); asked != "" {
		headers += ", " + asked
	}
	h.Set("Access-Control-Allow-Headers", headers)
	h.Set("Access-Control-Max-Age", "7200") // Chromium keeps it no longer
	return preflightWriter{w}
}

// A preflightWriter answers OPTIONS with the methods that CORS allows: those that there are.
type preflightWriter struct{ http.ResponseWriter }

func (w preflightWriter) WriteHeader(status int) {
	if methods := w.Header().Get("Allow"); methods != "" {
		w.Header().Set("Access-Control-Allow-Methods", methods)
	}
	w.ResponseWriter.WriteHeader(status)
}

// check says whether the page behind a request may make it, by the rule of
// http.CrossOriginProtection, which is for writes alone: a browser's Sec-Fetch-Site decides,
// and where it sends none, the origin. A read by <script>, <img> or <iframe> names no
// Origin, so the Referer counts; so it does where browsers send no Sec-Fetch-Site (to
// http:// on another machine), unless a page is asked for. It returns the foreign origin,
// "*" if that is unknown, or "" if the page is the relay's own or there is none.
//
// A link from anywhere to a page of the relay may be followed: the site it is on sees
// nothing of that page.
func (a *access) check(r *http.Request) (foreign string, err error) {
	origin, site := r.Header.Get("Origin"), r.Header.Get("Sec-Fetch-Site")
	reads := r.Method == http.MethodGet || r.Method == http.MethodHead
	byReferer := site == "cross-site" || site == "same-site" || site == "" && !wantsHTML(r)
	if origin == "" && reads && byReferer {
		if from, err := url.Parse(r.Referer()); err == nil && from.Host != "" {
			origin = from.Scheme + "://" + from.Host
		}
	}
	if origin != "" && site != "same-origin" {
		if from, err := url.Parse(origin); err != nil || from.Host != r.Host {
			foreign = origin
		}
	}
	isOwn := site == "same-origin" || site == "none" || site == "" && foreign == ""
	isLink := reads && r.Header.Get("Sec-Fetch-Mode") == "navigate" && r.Header.Get("Sec-Fetch-Dest") == "document"
	switch {
	case a.anyOrigin && foreign == "" && site == "cross-site":
		return "*", nil
	case a.anyOrigin:
		return foreign, nil
	case isLink:
		return "", nil
	case isOwn || slices.Contains(a.origins, foreign) || r.Method == http.MethodOptions:
		return foreign, nil
	}
	return "", limitError(http.StatusForbidden, "pages of this origin may not use this relay; it can be allowed with -origins", "origin", 0)
}

// Tokens.

// maxToken is the size of a token in bytes; a cookie holds no more.
const maxToken = 4096

// claims are what a token says.
type claims struct {
	Sub   string   `json:"sub,omitempty"`   // the user: the client cannot speak or be seen as anybody else
	Exp   *float64 `json:"exp,omitempty"`   // Unix seconds; the token is good until then
	Nbf   float64  `json:"nbf,omitempty"`   // and from then on
	Read  []string `json:"read,omitempty"`  // rooms, or the beginnings of their names followed by *
	Write []string `json:"write,omitempty"` // the same
}

// noClaims are those of a client without a good token. A WebSocket keeps its own, so all share one.
var noClaims = new(claims)

var base64url = base64.RawURLEncoding

// signToken returns a token: its head, its body and its signature, with dots between them.
func signToken(c claims, secret []byte) string {
	body, _ := json.Marshal(c)
	signed := base64url.EncodeToString([]byte(`{"alg":"HS256","typ":"JWT"}`)) + "." + base64url.EncodeToString(body)
	return signed + "." + signature(signed, secret)
}

func signature(signed string, secret []byte) string {
	h := hmac.New(sha256.New, secret)
	h.Write([]byte(signed))
	return base64url.EncodeToString(h.Sum(nil))
}

func tokenError(status int, message string) error { return limitError(status, message, "token", 0) }

// verifyToken returns what a token says if it is signed with one of the secrets (several
// are good while they are changed) and good at the time now.
func verifyToken(token string, secrets [][]byte, now time.Time) (*claims, error) {
	unauthorized := func(message string) (*claims, error) { return nil, tokenError(http.StatusUnauthorized, message) }
	parts := strings.Split(token, ".")
	if len(token) > maxToken || len(parts) != 3 {
		return unauthorized("the token is no JWT")
	}
	var alg string
	var crit any
	if decodePart(parts[0], map[string]any{"alg": &alg, "crit": &crit}) != nil || alg != "HS256" || crit != nil {
		return unauthorized("the token is no JWT of the algorithm HS256")
	}
	isSignedWith := func(secret []byte) bool {
		return hmac.Equal([]byte(parts[2]), []byte(signature(parts[0]+"."+parts[1], secret)))
	}
	if !slices.ContainsFunc(secrets, isSignedWith) {
		return unauthorized("the token is not signed with this relay's secret by HS256")
	}
	var c claims
	if decodePart(parts[1], map[string]any{"sub": &c.Sub, "exp": &c.Exp, "nbf": &c.Nbf, "read": &c.Read, "write": &c.Write}) != nil {
		return unauthorized("the token's claims can't be read")
	}
	at := float64(now.UnixMilli()) / 1000
	switch {
	case c.Exp != nil && at >= *c.Exp:
		return unauthorized("the token has expired")
	case at < c.Nbf:
		return unauthorized("the token is not good yet")
	case !validUser(c.Sub):
		return unauthorized("the token's sub is no name for a user")
	}
	return &c, nil
}

func decodePart(part string, fields map[string]any) error {
	b, err := base64url.Strict().DecodeString(part)
	if err != nil {
		return err
	}
	return parseObject(b, maxDepth, fields)
}

// expires returns when the token expires, in Unix nanoseconds.
func (c *claims) expires() int64 {
	if c.Exp == nil || *c.Exp > 9e9 {
		return math.MaxInt64
	}
	return int64(*c.Exp * 1e9)
}

// matchesRoom reports whether a room is in the list. A room of the relay's own must be
// named with its _; a * alone does not cover it.
func matchesRoom(list []string, room string) bool {
	for _, pattern := range list {
		prefix, wildcard := strings.CutSuffix(pattern, "*")
		if pattern == room || wildcard && strings.HasPrefix(room, prefix) && (room[0] != '_' || prefix != "") {
			return true
		}
	}
	return false
}

// verify returns what the token of a request says: a bearer token, for programs; the
// parameter token, for EventSource and WebSocket, which cannot set a header; or a cookie,
// for pages. Another site of the same domain may have set a cookie too: a good one counts.
func (a *access) verify(r *http.Request) (*claims, error) {
	scheme, bearer, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	tokens := r.URL.Query()["token"]
	switch {
	case strings.EqualFold(scheme, "Bearer"):
		tokens = []string{strings.TrimSpace(bearer)}
	case len(tokens) > 1:
		return noClaims, badRequest("token is given twice")
	case len(tokens) == 0 || tokens[0] == "":
		tokens = nil
		for _, cookie := range r.CookiesNamed("token") {
			tokens = append(tokens, cookie.Value)
		}
	}
	err := tokenError(http.StatusUnauthorized, "this relay asks for a token: Authorization: Bearer, the query token, or a cookie token")
	for _, token := range tokens {
		c, wrong := verifyToken(token, a.secrets, time.Now())
		if wrong == nil {
			return c, nil
		}
		err = wrong
	}
	return noClaims, err
}

// inURL reports whether a good token is in the URL of a page.
func (ar *accessRights) inURL(r *http.Request) bool {
	if ar.a.secrets == nil || ar.tokenErr != nil || !wantsHTML(r) || !isPage(r.URL.Path) || r.URL.Query().Get("token") == "" {
		return false
	}
	path, isRoom := strings.CutPrefix(r.URL.EscapedPath(), "/rooms/")
	if !isRoom {
		return true
	}
	names, _, _ := strings.Cut(path, "/")
	rooms, err := parseRooms(names)
	return err == nil && !slices.ContainsFunc(rooms, func(room string) bool { return ar.read(room) != nil })
}

// moveToCookie moves the token from the URL of a page into a cookie, and sends the
// browser to the URL without it: what is in the address bar gets into histories,
// screenshots and links.
func (ar *accessRights) moveToCookie(w http.ResponseWriter, r *http.Request) error {
	query := r.URL.Query()
	c := &http.Cookie{
		Name: "token", Value: query.Get("token"), Path: "/", HttpOnly: true, SameSite: http.SameSiteLaxMode,
		Secure: r.TLS != nil || r.Header.Get("X-Forwarded-Proto") == "https",
	}
	if ar.claims.Exp != nil {
		c.Expires = time.Unix(int64(*ar.claims.Exp), 0)
	}
	http.SetCookie(w, c)
	query.Del("token")
	redirect(w, "./"+r.URL.Path[strings.LastIndexByte(r.URL.Path, '/')+1:], query)
	return nil
}

// describe is GET /token: what the token of a page is good for, since a script cannot see
// its cookie. The parameter room says for which room.
func (ar *accessRights) describe(w http.ResponseWriter, r *http.Request) error {
	q := &request{values: r.URL.Query()}
	room := q.param("room")
	switch {
	case ar.tokenErr != nil:
		return ar.tokenErr
	case q.err != nil:
		return q.err
	case room != "" && !validName(room):
		return badRoom(room)
	}
	answer := map[string]any{"required": ar.a.secrets != nil}
	if room != "" {
		answer["read"], answer["write"] = ar.read(room) == nil, ar.write(room) == nil
	}
	if ar.claims.Sub != "" {
		answer["user"] = ar.claims.Sub
	}
	if ar.claims.Exp != nil {
		answer["exp"] = *ar.claims.Exp
	}
	writeJSON(w, http.StatusOK, answer)
	return nil
}

// tokenCommand is cometes token: it prints one.
func tokenCommand(args []string, getenv func(string) string) error {
	fs := flag.NewFlagSet("cometes token", flag.ContinueOnError)
	secret := fs.String("secret", "", "the relay's secret; of several the first (COMETES_SECRET)")
	sub := fs.String("sub", "", "the user")
	read := fs.String("read", "", "rooms to read: a `list`, such as lobby,team-*")
	write := fs.String("write", "", "rooms to publish to")
	ttl := fs.Duration("ttl", time.Hour, "how long the token is good")
	if err := fs.Parse(args); err != nil {
		return err
	}
	secrets := parseSecrets(cmp.Or(*secret, getenv("COMETES_SECRET"))) // a default would be shown in the help
	switch {
	case secrets == nil:
		return errors.New("a token needs the relay's secret, in -secret or COMETES_SECRET")
	case fs.NArg() > 0:
		return fmt.Errorf("%q is not a flag; -help lists them", fs.Arg(0))
	case !validUser(*sub):
		return errors.New("-sub is no name for a user")
	case *ttl <= 0:
		return errors.New("-ttl must be more than 0")
	}
	exp := float64(time.Now().Add(*ttl).Unix())
	fmt.Println(signToken(claims{Sub: *sub, Exp: &exp, Read: splitList(*read), Write: splitList(*write)}, secrets[0]))
	return nil
}

// parseSecrets reads the list of -secret.
func parseSecrets(list string) (secrets [][]byte) {
	for _, s := range splitList(list) {
		if len(s) < sha256.Size {
			// RFC 7518, 3.2: a key at least as long as the hash.
			slog.Warn("a secret is short, and can be guessed; openssl rand -hex 32 makes a good one", "characters", len(s))
		}
		secrets = append(secrets, []byte(s))
	}
	return secrets
}

// splitList reads a comma separated list.
func splitList(list string) (items []string) {
	for item := range strings.SplitSeq(list, ",") {
		if item = strings.TrimSpace(item); item != "" {
			items = append(items, item)
		}
	}
	return items
}
