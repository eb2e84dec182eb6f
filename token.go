// Tokens. With a secret, whoever reads or publishes brings a token that says
// who they are, until when, and which rooms they may read and write: a JSON
// Web Token (RFC 7519), signed with HMAC and SHA-256 (HS256), which any backend
// can make with the library it has.

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
	"strings"
	"time"
)

// maxToken is the size of a token in bytes; a cookie holds no more.
const maxToken = 4096

// Claims are what a token says.
type claims struct {
	Sub   string   `json:"sub,omitempty"`   // the user: nobody else can be spoken or seen as
	Exp   *float64 `json:"exp,omitempty"`   // Unix seconds; the token is good until then
	Nbf   float64  `json:"nbf,omitempty"`   // and from then on
	Read  []string `json:"read,omitempty"`  // rooms, or the beginnings of their names with a * behind
	Write []string `json:"write,omitempty"` // the same
}

const tokenHead = `{"alg":"HS256","typ":"JWT"}`

var encoding = base64.RawURLEncoding

// sign makes a token.
func sign(c claims, secret []byte) string {
	body, _ := json.Marshal(c)
	said := encoding.EncodeToString([]byte(tokenHead)) + "." + encoding.EncodeToString(body)
	return said + "." + encoding.EncodeToString(mac(said, secret))
}

func mac(said string, secret []byte) []byte {
	h := hmac.New(sha256.New, secret)
	h.Write([]byte(said))
	return h.Sum(nil)
}

// verify returns what a token says if it is signed with one of the secrets
// (several are good while they are changed) and good now.
func verify(token string, secrets [][]byte, now time.Time) (*claims, error) {
	parts := strings.Split(token, ".")
	if len(token) > maxToken || len(parts) != 3 {
		return nil, errors.New("the token is no JWT")
	}
	var alg string
	var crit any
	sum, err := encoding.Strict().DecodeString(parts[2])
	if err != nil || decode(parts[0], map[string]any{"alg": &alg, "crit": &crit}) != nil || alg != "HS256" || crit != nil {
		return nil, errors.New("the token is no JWT of the algorithm HS256")
	}
	signed := false
	for _, secret := range secrets {
		signed = hmac.Equal(sum, mac(parts[0]+"."+parts[1], secret)) || signed
	}
	if !signed {
		return nil, errors.New("the token is not signed with this relay's secret")
	}
	var c claims
	if decode(parts[1], map[string]any{"sub": &c.Sub, "exp": &c.Exp, "nbf": &c.Nbf, "read": &c.Read, "write": &c.Write}) != nil {
		return nil, errors.New("the token's claims can't be read")
	}
	at := float64(now.UnixMilli()) / 1000
	switch {
	case c.Exp != nil && at >= *c.Exp:
		return nil, errors.New("the token has expired")
	case at < c.Nbf:
		return nil, errors.New("the token is not good yet")
	case !validUser(c.Sub):
		return nil, errors.New("the token's sub is no name for a user")
	}
	return &c, nil
}

// decode reads the fields of one part of a token.
func decode(part string, fields map[string]any) error {
	b, err := encoding.Strict().DecodeString(part)
	if err != nil {
		return err
	}
	return parseObject(b, maxDepth, fields)
}

// until is when the token expires, in Unix nanoseconds.
func (c *claims) until() int64 {
	if c == nil || c.Exp == nil || *c.Exp > 9e9 {
		return math.MaxInt64
	}
	return int64(*c.Exp * 1e9)
}

// matches reports whether a room is in the list. A room of the relay's own has
// to be named with its _; a * alone does not cover it.
func matches(list []string, room string) bool {
	for _, p := range list {
		start, any := strings.CutSuffix(p, "*")
		if p == room || any && strings.HasPrefix(room, start) && (room[0] != '_' || start != "") {
			return true
		}
	}
	return false
}

// tokenOf is the token that came with a request: as a bearer, for programs; in
// the query, for EventSource and WebSocket, which can't set a header; or in a
// cookie, for pages without a script.
func (q *query) tokenOf(r *http.Request) string {
	if scheme, token, _ := strings.Cut(r.Header.Get("Authorization"), " "); strings.EqualFold(scheme, "Bearer") {
		return strings.TrimSpace(token)
	}
	if token := q.get("token"); token != "" {
		return token
	}
	if c, err := r.Cookie("token"); err == nil {
		return c.Value
	}
	return ""
}

func denied(status int, text string) error { return limit(status, text, "token", 0) }

// authorize checks the request's token, if the relay asks for one, and whether
// it is good for the rooms.
func (s *server) authorize(r *http.Request, q *query) error {
	if s.secrets == nil {
		return nil
	}
	token := q.tokenOf(r)
	if q.err != nil {
		return q.err
	}
	if token == "" {
		return denied(http.StatusUnauthorized, "this relay asks for a token: Authorization: Bearer, the query token, or a cookie token")
	}
	claims, err := verify(token, s.secrets, time.Now())
	if err != nil {
		return denied(http.StatusUnauthorized, err.Error())
	}
	q.claims = claims
	for _, room := range q.rooms {
		if !q.claims.may(room, q.writes) {
			return denied(http.StatusForbidden, fmt.Sprintf("the token is not good for the room %q", room))
		}
	}
	return nil
}

// may reports whether the token is good for the room. No token is, for then the
// relay asks for none.
func (c *claims) may(room string, writes bool) bool {
	switch {
	case c == nil:
		return true
	case writes:
		return matches(c.Write, room)
	}
	return matches(c.Read, room)
}

// speaksAs is the user a request speaks for: who it says, if the token does not say another.
func (q *query) speaksAs(user string) string {
	if q.claims == nil || q.claims.Sub == "" {
		return user
	}
	if user != "" && user != q.claims.Sub {
		q.fail(denied(http.StatusForbidden, fmt.Sprintf("the token is %q's; nobody else can be spoken as with it", q.claims.Sub)))
	}
	return q.claims.Sub
}

// tokenInfo is GET /token: what the token of a page is good for, since a script
// can't see its cookie. The parameter room says for which room.
func (s *server) tokenInfo(w http.ResponseWriter, r *http.Request) error {
	q := &query{values: r.URL.Query()}
	if err := s.authorize(r, q); err != nil {
		return err
	}
	answer := map[string]any{"required": s.secrets != nil}
	if room := q.get("room"); room != "" {
		if !validName(room) {
			return badRoom(room)
		}
		answer["read"], answer["write"] = q.claims.may(room, false), q.claims.may(room, true)
	}
	if q.claims != nil && q.claims.Sub != "" {
		answer["user"] = q.claims.Sub
	}
	if q.claims != nil && q.claims.Exp != nil {
		answer["exp"] = *q.claims.Exp
	}
	if q.err != nil {
		return q.err
	}
	reply(w, http.StatusOK, answer)
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
		return errors.New("-ttl is more than nothing")
	}
	list := func(s string) []string {
		return strings.FieldsFunc(s, func(r rune) bool { return r == ',' || r == ' ' })
	}
	exp := float64(time.Now().Add(*ttl).Unix())
	c := claims{Sub: *sub, Exp: &exp, Read: list(*read), Write: list(*write)}
	fmt.Println(sign(c, secrets[0]))
	return nil
}

// parseSecrets reads the list of -secret.
func parseSecrets(list string) (secrets [][]byte) {
	for s := range strings.SplitSeq(list, ",") {
		s = strings.TrimSpace(s)
		if s == "" {
			continue
		}
		if len(s) < sha256.Size {
			// RFC 7518, 3.2: a key of the size of the hash at least.
			slog.Warn("a secret is short, and so can be guessed; openssl rand -hex 32 makes a good one", "characters", len(s))
		}
		secrets = append(secrets, []byte(s))
	}
	return secrets
}

// keepToken puts a token that came in the URL of a page into a cookie, and
// sends the browser to the URL without it: what is in the address bar gets
// into histories, screenshots and links. It reports whether it did.
func (s *server) keepToken(w http.ResponseWriter, r *http.Request, q *query) bool {
	token := q.values.Get("token")
	if q.claims == nil || token == "" || !strings.Contains(r.Header.Get("Accept"), "text/html") {
		return false
	}
	c := &http.Cookie{
		Name: "token", Value: token, Path: "/", HttpOnly: true, SameSite: http.SameSiteLaxMode,
		Secure: r.TLS != nil || r.Header.Get("X-Forwarded-Proto") == "https",
	}
	if q.claims.Exp != nil {
		c.Expires = time.Unix(int64(*q.claims.Exp), 0)
	}
	http.SetCookie(w, c)
	q.values.Del("token")
	goTo(w, "./"+r.URL.Path[strings.LastIndexByte(r.URL.Path, '/')+1:], q.values)
	return true
}
