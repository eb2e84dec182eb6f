// Tests of access: tokens, and pages of other origins. They run a whole relay with all
// its layers in virtual time, with clients at any address.

package main

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coder/websocket"
)

// Tokens.

const (
	firstSecret  = "one secret that is thirty-two bytes"
	secondSecret = "the secret that comes after the first"
)

// makeToken makes a token by hand, without the code under test.
func makeToken(head, claims, secret string) string {
	b64 := base64.RawURLEncoding.EncodeToString
	signed := b64([]byte(head)) + "." + b64([]byte(claims))
	h := hmac.New(sha256.New, []byte(secret))
	h.Write([]byte(signed))
	return signed + "." + b64(h.Sum(nil))
}

// signedToken returns a token with the usual header.
func signedToken(claims string) string {
	return makeToken(`{"alg":"HS256","typ":"JWT"}`, claims, firstSecret)
}

// unixIn returns a time from now as in a claim.
func unixIn(d time.Duration) string { return fmt.Sprint(time.Now().Add(d).Unix()) }

func TestATokenIsGoodOnlyIfItIsSignedWellFormedAndOfNow(t *testing.T) {
	const now = 946684800 // the start of a bubble's clock
	hs := `{"alg":"HS256","typ":"JWT"}`
	good := makeToken(hs, `{"sub":"ada"}`, firstSecret)
	parts := strings.Split(good, ".")
	head, body, sum := parts[0], parts[1], parts[2]
	b64 := base64.RawURLEncoding.EncodeToString
	long := strings.Repeat("x", maxToken)
	for _, tc := range []struct{ name, token, want string }{
		{"good", good, ""},
		{"valid for a second more", makeToken(hs, `{"exp":946684801}`, firstSecret), ""},
		{"valid for a fraction of a second more", makeToken(hs, `{"exp":946684800.001}`, firstSecret), ""},
		{"valid from now on", makeToken(hs, `{"nbf":946684800}`, firstSecret), ""},
		{"valid for ever", makeToken(hs, `{"exp":1e300}`, firstSecret), ""},
		{"with claims that are ignored", makeToken(hs, `{"iss":"x","aud":["y"],"jti":"1","iat":0}`, firstSecret), ""},
		{"with more in its header", makeToken(`{"kid":"1","alg":"HS256"}`, `{}`, firstSecret), ""},
		{"signed with the other secret", makeToken(hs, `{}`, secondSecret), ""},

		{"expired", makeToken(hs, `{"exp":946684799}`, firstSecret), "expired"},
		{"expired at this moment", makeToken(hs, `{"exp":946684800}`, firstSecret), "expired"},
		{"expired in 1970", makeToken(hs, `{"exp":0}`, firstSecret), "expired"},
		{"expired before 1970", makeToken(hs, `{"exp":-1e300}`, firstSecret), "expired"},
		{"not valid yet", makeToken(hs, `{"nbf":946684801}`, firstSecret), "not good yet"},
		{"with an exp in quotes", makeToken(hs, `{"exp":"946689999"}`, firstSecret), "claims"},
		{"with an exp too big for a number", makeToken(hs, `{"exp":1e999}`, firstSecret), "claims"},
		{"with a read that is not a list", makeToken(hs, `{"read":"*"}`, firstSecret), "claims"},
		{"with a sub that is not a string", makeToken(hs, `{"sub":7}`, firstSecret), "claims"},
		{"with a sub that is not a valid name", makeToken(hs, `{"sub":"a\nb"}`, firstSecret), "sub"},
		{"with a sub of 65 characters", makeToken(hs, `{"sub":"`+long[:65]+`"}`, firstSecret), "sub"},

		{"signed with an earlier secret", makeToken(hs, `{}`, "the secret that was before the first"), "signed"},
		{"signed with an empty secret", makeToken(hs, `{}`, ""), "signed"},
		{"signed with a prefix of the secret", makeToken(hs, `{}`, firstSecret[:31]), "signed"},
		{"with another body", head + "." + b64([]byte(`{"sub":"bob"}`)) + "." + sum, "signed"},
		{"with another header", b64([]byte(`{"alg":"HS256"}`)) + "." + body + "." + sum, "signed"},
		{"with the body of one token and the header of another", body + "." + head + "." + sum, "HS256"},
		{"with its signature cut short", head + "." + body + "." + sum[:len(sum)-3], "signed"},
		{"without its signature", head + "." + body + ".", "signed"},
		{"signed with a signature", good + "." + sum, "no JWT"},

		{"unsigned, alg none", b64([]byte(`{"alg":"none"}`)) + "." + body + ".", "HS256"},
		{"alg None and a signature", makeToken(`{"alg":"None"}`, `{}`, firstSecret), "HS256"},
		{"alg RS256", makeToken(`{"alg":"RS256"}`, `{}`, firstSecret), "HS256"},
		{"alg HS512", makeToken(`{"alg":"HS512"}`, `{}`, firstSecret), "HS256"},
		{"alg hs256", makeToken(`{"alg":"hs256"}`, `{}`, firstSecret), "HS256"},
		{"alg HS256 with a space", makeToken(`{"alg":"HS256 "}`, `{}`, firstSecret), "HS256"},
		{"alg a list", makeToken(`{"alg":["HS256"]}`, `{}`, firstSecret), "HS256"},
		{"no alg", makeToken(`{"typ":"JWT"}`, `{}`, firstSecret), "HS256"},
		{"with a crit extension", makeToken(`{"alg":"HS256","crit":["b64"],"b64":false}`, `{}`, firstSecret), "HS256"},
		{"with an empty crit", makeToken(`{"alg":"HS256","crit":[]}`, `{}`, firstSecret), "HS256"},

		{"with ALG in place of alg", makeToken(`{"ALG":"HS256"}`, `{}`, firstSecret), "HS256"},
		{"with alg twice", makeToken(`{"alg":"none","alg":"HS256"}`, `{}`, firstSecret), "HS256"},
		{"expired, with another exp in capitals", makeToken(hs, `{"exp":946684799,"EXP":946689999}`, firstSecret), "expired"},
		{"expired, with a second exp", makeToken(hs, `{"exp":946684799,"exp":946689999}`, firstSecret), "claims"},
		{"with an EXP in the past, which is not exp", makeToken(hs, `{"EXP":1}`, firstSecret), ""},
		{"with a bidirectional control in its sub", makeToken(hs, `{"sub":"\u202eada"}`, firstSecret), "sub"},

		{"empty", "", "no JWT"},
		{"a word", "token", "no JWT"},
		{"two dots", "..", "HS256"},
		{"a thousand dots", strings.Repeat(".", 1000), "no JWT"},
		{"two parts", head + "." + body, "no JWT"},
		{"encrypted, with five parts", good + ".x.y", "no JWT"},
		{"with padding", good + "=", "HS256"},
		{"in base64 that is not the URL alphabet", head + "." + body + "." + strings.NewReplacer("-", "+", "_", "/").Replace(sum), "HS256"},
		{"with a line end in it", head + ".\n" + body + "." + sum, "signed"},
		{"with stray bits at the end", head + "." + body + "." + respell(sum), "HS256"},
		{"with a character outside base64", head + "." + body + "." + "é" + sum[2:], "HS256"},
		{"with a header that is not JSON", makeToken(`alg=HS256`, `{}`, firstSecret), "HS256"},
		{"with a body that is not JSON", makeToken(hs, `sub=ada`, firstSecret), "claims"},
		{"with two bodies", makeToken(hs, `{}{}`, firstSecret), "claims"},
		{"oversized", makeToken(hs, `{"x":"`+long+`"}`, firstSecret), "no JWT"},
	} {
		c, err := verifyToken(tc.token, [][]byte{[]byte(firstSecret), []byte(secondSecret)}, time.Unix(now, 0))
		switch {
		case tc.want == "" && (err != nil || c == nil):
			t.Errorf("a token %s: %v, want it valid", tc.name, err)
		case tc.want != "" && (err == nil || c != nil || !strings.Contains(err.Error(), tc.want)):
			t.Errorf("a token %s: %v, want an error about %q", tc.name, err, tc.want)
		}
	}

	fits := makeToken(hs, `{"x":"`+long[:3003]+`"}`, firstSecret)
	if _, err := verifyToken(fits, [][]byte{[]byte(firstSecret)}, time.Unix(now, 0)); len(fits) > maxToken || len(fits) < maxToken-2 || err != nil {
		t.Errorf("a token of %d bytes, and %d are allowed: %v", len(fits), maxToken, err)
	}
	if _, err := verifyToken(good, nil, time.Unix(now, 0)); err == nil {
		t.Error("without a secret a token is valid")
	}
}

// respell returns the same base64 with other unused bits: a token must have one
// spelling.
func respell(sum string) string {
	const letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
	i := strings.IndexByte(letters, sum[len(sum)-1])
	return sum[:len(sum)-1] + letters[i^1:i^1+1]
}

func TestATokenOfAnotherLibraryIsGood(t *testing.T) {
	rfc, _ := base64.RawURLEncoding.DecodeString("AyM1SysPpbyDfgZld3umj1qzKObwVMkoqQ-EstJQLr_T-1qS0gZH75aKtMN3Yj0iPS4hcgUuTwjAzZr1Z9CAow")
	for _, tc := range []struct {
		name, token, secret string
		at                  int64
		want                claims
	}{
		{"RFC 7515, A.1", "eyJ0eXAiOiJKV1QiLA0KICJhbGciOiJIUzI1NiJ9" +
			".eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ" +
			".dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk", string(rfc), 1300819379, claims{}},
		{"Node's crypto", "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9" +
			".eyJzdWIiOiJhZGEiLCJyZWFkIjpbInRlYW0tKiJdLCJ3cml0ZSI6WyJsb2JieSJdLCJpYXQiOjk0NjY4NDAwMCwiZXhwIjo5NDY2ODg0MDB9" +
			".-vfW1zD20MKEjGnTeMdraboDEmcuprS0G1RZe0NAmm0", firstSecret, 946684800,
			claims{Sub: "ada", Read: []string{"team-*"}, Write: []string{"lobby"}}},
		{"Python's hmac", "eyJ0eXAiOiAiSldUIiwgImFsZyI6ICJIUzI1NiIsICJraWQiOiAiMiJ9" +
			".eyJzdWIiOiAiWm9cdTAwZWIiLCAibmJmIjogOTQ2Njg0Nzk5LjUsICJleHAiOiA5NDY2ODg0MDAuMjUsICJyZWFkIjogWyIqIl0sICJhdWQiOiBbIngiXX0" +
			".FCNvxM3dVdfAnMVqjFUdwlSc_6wsoUEOLme94IQxg_k", "another secret, ünïcode and all", 946684800,
			claims{Sub: "Zoë", Nbf: 946684799.5, Read: []string{"*"}}},
		{"openssl dgst in a shell", "eyJhbGciOiJIUzI1NiJ9.eyJ3cml0ZSI6WyJhLmI6Yy0qIl19" +
			".aFPZqmyNcUBOTb_YL6XTDOiCOgdFeiB41194QcLAYEA", "made with openssl, a shell and tr..", 946684800,
			claims{Write: []string{"a.b:c-*"}}},
	} {
		c, err := verifyToken(tc.token, [][]byte{[]byte(tc.secret)}, time.Unix(tc.at, 0))
		if err != nil {
			t.Errorf("%s: %v", tc.name, err)
			continue
		}
		c.Exp = nil
		if got, want := fmt.Sprintf("%+v", *c), fmt.Sprintf("%+v", tc.want); got != want {
			t.Errorf("%s has %s, want %s", tc.name, got, want)
		}
	}
	if _, err := verifyToken("eyJ0eXAiOiJKV1QiLA0KICJhbGciOiJIUzI1NiJ9.eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ.dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk",
		[][]byte{rfc}, time.Unix(1300819380, 0)); err == nil {
		t.Error("the token of RFC 7515 is valid after it expired")
	}
}

// runTokenCommand returns what tokenCommand prints.
func runTokenCommand(t *testing.T, env map[string]string, args ...string) (string, error) {
	t.Helper()
	stdout, stderr := os.Stdout, os.Stderr
	defer func() { os.Stdout, os.Stderr = stdout, stderr }()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	os.Stdout, os.Stderr = w, w
	err = tokenCommand(args, func(name string) string { return env[name] })
	w.Close()
	b, _ := io.ReadAll(r)
	return string(b), err
}

func TestTheTokenThatCometesTokenPrintsIsGood(t *testing.T) {
	env := map[string]string{"COMETES_SECRET": secondSecret + ", " + firstSecret}
	out, err := runTokenCommand(t, env, "-sub", "ada", "-read", "team-*, lobby", "-write", "lobby", "-ttl", "90s")
	if err != nil {
		t.Fatal(err)
	}
	c, err := verifyToken(strings.TrimSpace(out), parseSecrets(secondSecret), time.Now())
	if err != nil {
		t.Fatalf("%s: %v; of two secrets it is signed with the first", out, err)
	}
	if c.Sub != "ada" || fmt.Sprint(c.Read, c.Write) != "[team-* lobby] [lobby]" || math.Abs(*c.Exp-float64(time.Now().Unix()+90)) > 2 {
		t.Errorf("the claims are %+v", *c)
	}
	if out, err := runTokenCommand(t, env, "-secret", firstSecret); err != nil {
		t.Error(err)
	} else if _, err := verifyToken(strings.TrimSpace(out), parseSecrets(firstSecret), time.Now()); err != nil {
		t.Errorf("with -secret: %v", err)
	}
	for _, args := range [][]string{{"-ttl", "0s"}, {"-sub", "a\nb"}, {"ada"}, {"-ttl", "soon"}} {
		if out, err := runTokenCommand(t, env, args...); err == nil {
			t.Errorf("%q prints %q, want an error", args, out)
		}
	}
	if _, err := runTokenCommand(t, nil); err == nil || !strings.Contains(err.Error(), "COMETES_SECRET") {
		t.Errorf("without a secret: %v, want an error that names the flag", err)
	}
}

func TestTheSecretIsNotInTheHelp(t *testing.T) {
	env := map[string]string{"COMETES_SECRET": firstSecret}
	for _, args := range [][]string{{"-help"}, {"-nonsense"}, {"-ttl", "soon"}} {
		if out, err := runTokenCommand(t, env, args...); err == nil || strings.Contains(out+err.Error(), firstSecret) {
			t.Errorf("cometes token %s returns %v and shows the secret:\n%s", args, err, out)
		}
	}
}

func TestPatternsOfRooms(t *testing.T) {
	for _, tc := range []struct {
		patterns, room string
		want           bool
	}{
		{"lobby", "lobby", true},
		{"lobby", "lobby2", false},
		{"lobby", "lobb", false},
		{"lobby", "LOBBY", false},
		{"team-*", "team-", true},
		{"team-*", "team-a.b", true},
		{"team-*", "team", false},
		{"team-*", "my-team-a", false},
		{"*", "lobby", true},
		{"*", "_stats", false},
		{"_*", "_stats", true},
		{"_stats", "_stats", true},
		{"_s*", "_stats", true},
		{"te*m", "team", false},
		{"te*m*", "te*m-a", true}, // no room can have this name
		{"**", "lobby", false},
		{"", "lobby", false},
		{" ", "lobby", false},
		{"a b lobby", "lobby", true},
		{"a b", "lobby", false},
	} {
		if got := matchesRoom(strings.Split(tc.patterns, " "), tc.room); got != tc.want {
			t.Errorf("%q covers %s: %v, want %v", tc.patterns, tc.room, got, tc.want)
		}
	}
	if matchesRoom(nil, "lobby") {
		t.Error("a token without a list allows a room")
	}
}

// allRequests returns every request for a room: all techniques, publish, presence.
func allRequests(room string) (all []string) {
	for _, tech := range techniques {
		q := ""
		switch tech.name {
		case "jsonp":
			q = "?callback=f&wait=0"
		case "longpoll":
			q = "?wait=0"
		}
		all = append(all, "GET /rooms/"+room+"/"+tech.name+q)
	}
	return append(all, "GET /rooms/"+room+"/form", "GET /rooms/"+room+"/multipart?as=svg", "GET /rooms/"+room+"/multipart?as=image", "GET /rooms/"+room+"/multipart?as=html",
		"GET /rooms/"+room+"/presence", "POST /rooms/"+room+"/presence?user=ada", "POST /rooms/"+room+"?user=ada")
}

// addParam adds a parameter to a request's query.
func addParam(what, parameter string) string {
	if strings.Contains(what, "?") {
		return what + "&" + parameter
	}
	return what + "?" + parameter
}

// bodyFor returns a valid body for a request.
func bodyFor(what string) string {
	if strings.Contains(what, "/presence") {
		return "online"
	}
	return "hi"
}

func TestEveryRequestNeedsAToken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newLimitedTestbed(t, "-secret", firstSecret+","+secondSecret)
		all := signedToken(`{"read":["lobby"],"write":["lobby"]}`)
		second := makeToken(`{"alg":"HS256"}`, `{"read":["lobby"],"write":["lobby"]}`, secondSecret)
		n := 0
		for _, what := range allRequests("lobby") {
			reads := signedToken(`{"read":["lobby","a*"],"write":["b*"]}`)
			if strings.HasPrefix(what, "POST /rooms/lobby?") {
				reads = signedToken(`{"read":["b*"],"write":["lobby","a*"]}`)
			}
			for _, tc := range []struct {
				name, what string
				headers    []string
				want       int
			}{
				{"none", what, nil, 401},
				{"as a bearer", what, []string{"Authorization: Bearer " + all}, 200},
				{"as a bearer in lower case", what, []string{"Authorization: bearer " + all}, 200},
				{"in the query", addParam(what, "token="+all), nil, 200},
				{"in a cookie", what, []string{"Cookie: a=b; token=" + all}, 200},
				{"in the query beside another scheme", addParam(what, "token="+all), []string{"Authorization: Basic YTpi"}, 200},
				{"signed with the second secret", what, []string{"Authorization: Bearer " + second}, 200},
				{"invalid as a bearer, valid in a cookie", what, []string{"Authorization: Bearer x.y.z", "Cookie: token=" + all}, 401},
				{"invalid in the query, valid in a cookie", addParam(what, "token=x"), []string{"Cookie: token=" + all}, 401},
				{"twice in the query", addParam(what, "token="+all+"&token="+all), nil, 400},
				{"expired", addParam(what, "token="+signedToken(`{"read":["*"],"write":["*"],"exp":`+unixIn(0)+`}`)), nil, 401},
				{"not valid yet", addParam(what, "token="+signedToken(`{"read":["*"],"write":["*"],"nbf":`+unixIn(time.Second)+`}`)), nil, 401},
				{"for nothing", addParam(what, "token="+signedToken(`{"sub":"ada"}`)), nil, 403},
				{"for another room", addParam(what, "token="+signedToken(`{"read":["lobby2","lob"],"write":["lobby2","lob"]}`)), nil, 403},
				{"for exactly this", addParam(what, "token="+reads), nil, 200},
				{"for exactly the other", addParam(what, "token="+signedToken(`{"read":["b*"],"write":["b*"]}`)), nil, 403},
				{"of another user", addParam(what, "user=ada&token="+signedToken(`{"sub":"bob","read":["*"],"write":["*"]}`)), nil, 403},
			} {
				if strings.Contains(what, "user=ada") { // it has the parameter already
					tc.what = strings.Replace(tc.what, "&user=ada", "", 1)
				} else if tc.name == "of another user" && strings.HasSuffix(what, "/presence") {
					continue // to read presence names no user
				}
				if got := b.status("192.0.2.1", tc.what, tc.headers...); got != tc.want {
					t.Errorf("%s with a token %s: %d, want %d", what, tc.name, got, tc.want)
				}
				if tc.want == 401 || tc.want == 403 {
					n++
				}
			}
		}
		if got := b.refusals("token"); got != n {
			t.Errorf("%d refusals are counted, want %d", got, n)
		}
		r, body := b.ask("192.0.2.1", "GET /rooms/lobby/poll", "")
		if r.Header.Get("WWW-Authenticate") != "Bearer" || !strings.Contains(body, `{"error":"this relay asks for a token`) {
			t.Errorf("without a token: %v %s", r.Header, body)
		}
		r, body = b.ask("192.0.2.1", "GET /rooms/lobby,other/poll", "", "Authorization: Bearer "+all)
		if r.StatusCode != 403 || !strings.Contains(body, `\"other\"`) || r.Header.Get("WWW-Authenticate") != "" {
			t.Errorf("with a token for one room of two: %d %s", r.StatusCode, body)
		}
	})
}

func TestWhatNeedsNoToken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newLimitedTestbed(t, "-secret", firstSecret)
		for _, what := range []string{"GET /", "GET /comet.js", "GET /healthz", "HEAD /healthz"} {
			if got := b.status("192.0.2.1", what); got != 200 {
				t.Errorf("%s: %d, want 200", what, got)
			}
		}
		for _, tc := range []struct {
			name, token string
			want        int
		}{
			{"without a token", "", 401},
			{"with a token for all rooms", signedToken(`{"read":["*"]}`), 403},
			{"with a token to write to _stats", signedToken(`{"write":["_stats"]}`), 403},
			{"with a token for _stats", signedToken(`{"read":["_stats"]}`), 200},
		} {
			for _, what := range []string{"GET /metrics", "GET /rooms/_stats/poll", "GET /rooms/_stats/sse", "GET /rooms/_stats/presence"} {
				if got := b.status("192.0.2.1", what, "Authorization: Bearer "+tc.token); got != tc.want {
					t.Errorf("%s %s: %d, want %d", what, tc.name, got, tc.want)
				}
			}
		}
		if got := b.status("192.0.2.1", "POST /rooms/_stats", "Authorization: Bearer "+signedToken(`{"write":["_stats","_*","*"]}`)); got != 403 {
			t.Errorf("POST /rooms/_stats with a token for it: %d, want 403", got)
		}
	})
}

func TestWithoutASecretATokenIsOfNoUse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newLimitedTestbed(t)
		for _, what := range append(allRequests("lobby"), "GET /metrics") {
			for _, token := range []string{"", "x", signedToken(`{"sub":"bob","exp":1}`)} {
				if got := b.status("192.0.2.1", what, "Authorization: Bearer "+token, "Cookie: token="+token); got != 200 {
					t.Errorf("%s with the token %q: %d, want 200", what, token, got)
				}
			}
		}
		r, _ := b.ask("192.0.2.1", "GET /rooms/lobby/refresh?token=x", "", "Accept: text/html")
		if r.StatusCode != 200 || len(r.Cookies()) > 0 {
			t.Errorf("a page with a token in its URL: %d, cookies %v; want nothing kept", r.StatusCode, r.Cookies())
		}
	})
}

func TestTheSubOfATokenIsTheUserOfEventsAndPresence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newLimitedTestbed(t, "-secret", firstSecret)
		ada := "Authorization: Bearer " + signedToken(`{"sub":"ada","read":["*"],"write":["lobby"]}`)
		any := "Authorization: Bearer " + signedToken(`{"read":["*"],"write":["*"]}`)
		const from = "192.0.2.1"
		author := func() string {
			_, body := b.ask(from, "GET /rooms/lobby/poll?last=1&presence=0", "", any)
			_, who, _ := strings.Cut(body, `"from":`)
			who, _, _ = strings.Cut(who, ",")
			return strings.Trim(who, `"`)
		}
		for _, tc := range []struct {
			what, body, auth string
			want             string // the user of the event, or a status
		}{
			{"POST /rooms/lobby", "hi", ada, "ada"},
			{"POST /rooms/lobby?user=ada", "hi", ada, "ada"},
			{"POST /rooms/lobby?user=bob", "hi", ada, "403"},
			{"POST /rooms/lobby?user=Ada", "hi", ada, "403"},
			{"POST /rooms/lobby?user=ada+", "hi", ada, "400"},
			{"POST /rooms/lobby", "user=ada&data=hi", ada, "ada"},
			{"POST /rooms/lobby", "data=hi", ada, "ada"},
			{"POST /rooms/lobby", "user=bob&data=hi", ada, "403"},
			{"POST /rooms/lobby?user=ada", "user=bob&data=hi", ada, "400"},
			{"POST /rooms/lobby?user=bob", "hi", any, "bob"},
			{"POST /rooms/lobby", "hi", any, ""},
		} {
			kind := "Content-Type: text/plain"
			if strings.Contains(tc.body, "data=") {
				kind = "Content-Type: application/x-www-form-urlencoded"
			}
			r, _ := b.ask(from, tc.what, tc.body, tc.auth, kind)
			got := fmt.Sprint(r.StatusCode)
			if r.StatusCode == 201 {
				got = author()
			}
			if got != tc.want {
				t.Errorf("%s with %q: %q, want %q", tc.what, tc.body, got, tc.want)
			}
		}

		present := func(room string) string {
			_, body := b.ask(from, "GET /rooms/"+room+"/presence", "", any)
			var ros roster
			json.Unmarshal([]byte(body), &ros)
			return strings.Trim(strings.TrimPrefix(fmt.Sprint(ros.Users), "map"), "[]")
		}
		for _, tc := range []struct{ what, body, want string }{
			{"POST /rooms/a/presence", "away", "ada:away"},
			{"POST /rooms/a/presence?user=ada", "online", "ada:online"},
			{"POST /rooms/a/presence?user=bob", "away", "ada:online"},
			{"POST /rooms/a/presence", `{"state":"away","user":"bob"}`, "ada:away"},
			{"POST /rooms/a/presence?user=bob", "offline", "ada:away"},
		} {
			b.ask(from, tc.what, tc.body, ada)
			if got := present("a"); got != tc.want {
				t.Errorf("after %s %s with ada's token there is %q, want %q", tc.what, tc.body, got, tc.want)
			}
		}

		// The WebSocket speaks as ada, in every room.
		c, status := b.webSocketFrom(from, "/rooms/lobby,b/ws?user=ada", ada)
		if status != 101 {
			t.Fatalf("ada's socket: %d", status)
		}
		defer c.CloseNow()
		readWebSocketUntil(t, c, "hello")
		for _, tc := range []struct{ frame, want string }{
			{`{"type":"message","room":"lobby","data":"hi","key":"1"}`, `"ack"`},
			{`{"type":"message","room":"b","data":"hi","key":"2"}`, "the token is not good for the room \\\"b\\\""},
			{`{"type":"message","room":"c","data":"hi","key":"3"}`, "the token is not good for the room \\\"c\\\""},
			{`{"type":"presence","room":"b","data":"away","key":"4"}`, `"ack"`},
			{`{"type":"presence","room":"_stats","data":"away","key":"5"}`, "not good"},
			{`{"type":"message","room":"lobby","from":"bob","user":"bob","data":"hi","key":"6"}`, `"ack"`},
		} {
			if got := exchange(t, c, tc.frame); !strings.Contains(got, tc.want) {
				t.Errorf("%s is answered %s, want %s", tc.frame, got, tc.want)
			}
		}
		if got := author(); got != "ada" {
			t.Errorf("the WebSocket published as %q, want ada", got)
		}
		if got := present("b"); got != "ada:away" {
			t.Errorf("in b there is %q, want ada:away", got)
		}
	})
}

func TestAPageKeepsItsTokenInACookieAndNotInItsURL(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newLimitedTestbed(t, "-secret", firstSecret)
		const from = "192.0.2.1"
		tok := signedToken(`{"sub":"ada","read":["lobby"],"write":["lobby"],"exp":` + unixIn(time.Hour) + `}`)
		for _, path := range []string{"/rooms/lobby/html", "/rooms/lobby/refresh", "/rooms/lobby/form"} {
			r, body := b.ask(from, "GET "+path+"?user=ada&token="+tok+"&last=3", "", "Accept: text/html,*/*", "X-Forwarded-Proto: https")
			where := r.Header.Get("Location")
			if r.StatusCode != 303 || where != "."+path[strings.LastIndex(path, "/"):]+"?last=3&user=ada" {
				t.Fatalf("%s with a token is answered %d, to %q", path, r.StatusCode, where)
			}
			if s := fmt.Sprint(where, body); strings.Contains(s, tok) || strings.Contains(s, "token") {
				t.Errorf("%s: the token is in what is shown: %s", path, s)
			}
			if p := r.Header.Get("Referrer-Policy"); p != "no-referrer" && p != "same-origin" || r.Header.Get("Cache-Control") != "no-store" {
				t.Errorf("%s: the redirect may be cached or sent as a Referer: %v", path, r.Header)
			}
			cookies := r.Cookies()
			if len(cookies) != 1 {
				t.Fatalf("%s: the cookies are %v", path, cookies)
			}
			c := cookies[0]
			if c.Name != "token" || c.Value != tok || !c.HttpOnly || !c.Secure || c.SameSite == http.SameSiteNoneMode || c.SameSite == http.SameSiteDefaultMode || c.SameSite == 0 || c.Path != "/" || c.Domain != "" {
				t.Errorf("%s: the cookie is %+v", path, *c)
			}
			if want := time.Now().Add(time.Hour); !c.Expires.Equal(want) {
				t.Errorf("%s: the cookie expires %v, the token %v", path, c.Expires, want)
			}
			next := b.open(from, "GET "+path+strings.TrimPrefix(where, "."+path[strings.LastIndex(path, "/"):]), "", "Accept: text/html", "Cookie: token="+c.Value)
			if next.StatusCode != 200 {
				t.Errorf("%s with the cookie: %d", where, next.StatusCode)
			}
			next.stop()
		}

		page := "GET /rooms/lobby/refresh?token="
		if r, _ := b.ask(from, page+tok, "", "Accept: text/html"); r.Cookies()[0].Secure {
			t.Error("over plain HTTP the cookie is Secure, and browsers would not send it")
		}
		if r, _ := b.ask(from, page+signedToken(`{"read":["lobby"]}`), "", "Accept: text/html"); !r.Cookies()[0].Expires.IsZero() {
			t.Error("the cookie of a token without exp expires")
		}
		for _, bad := range []string{"x", signedToken(`{"exp":1,"read":["*"]}`), signedToken(`{}`)} {
			if r, _ := b.ask(from, page+bad, "", "Accept: text/html"); r.StatusCode < 400 || len(r.Cookies()) > 0 {
				t.Errorf("a bad token is answered %d and cookies %v", r.StatusCode, r.Cookies())
			}
		}
		if r := b.open(from, page+tok, "", "Accept: */*"); r.StatusCode != 200 {
			t.Errorf("a program that takes anything is sent elsewhere: %d", r.StatusCode)
		} else {
			r.stop()
		}
		for _, what := range allRequests("lobby") { // what is not a page sets no cookie
			if strings.HasSuffix(what, "/html") || strings.HasSuffix(what, "/refresh") || strings.HasSuffix(what, "/form") || strings.HasSuffix(what, "/ws") {
				continue
			}
			r := b.open(from, addParam(what, "token="+tok), bodyFor(what), "Accept: text/html")
			if r.StatusCode >= 300 || len(r.Cookies()) > 0 {
				t.Errorf("%s: %d, cookies %v", what, r.StatusCode, r.Cookies())
			}
			r.stop()
		}
	})
}

func TestAFormWithTheCookiePublishesAndStaysOnItsPage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newLimitedTestbed(t, "-secret", firstSecret)
		cookie := "Cookie: token=" + signedToken(`{"sub":"ada","read":["lobby"],"write":["lobby"]}`)
		_, page := b.ask("192.0.2.1", "GET /rooms/lobby/form", "", cookie)
		if !strings.Contains(page, `name="user" value="ada"`) {
			t.Errorf("the form for ada's token does not show ada:\n%s", page)
		}
		r, _ := b.ask("192.0.2.1", "POST /rooms/lobby", "user=ada&data=hi&then=form", cookie,
			"Content-Type: application/x-www-form-urlencoded", "Origin: http://"+limitedHost, "Sec-Fetch-Site: same-origin")
		if where := r.Header.Get("Location"); r.StatusCode != 303 || where != "./lobby/form?user=ada#data" {
			t.Errorf("the form is answered %d, to %q", r.StatusCode, where)
		}
		r, _ = b.ask("192.0.2.1", "POST /rooms/lobby", "user=ada&data=hi&then=form", cookie,
			"Content-Type: application/x-www-form-urlencoded", "Origin: https://evil.example", "Sec-Fetch-Site: cross-site")
		if r.StatusCode != 403 {
			t.Errorf("the same form on a foreign page, with the cookie: %d, want 403", r.StatusCode)
		}
	})
}

// Another site of the same domain, or on another port of the machine, may have set a
// cookie of that name.
func TestAGoodCookieAmongOthersIsFound(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newLimitedTestbed(t, "-secret", firstSecret)
		good := "token=" + signedToken(`{"sub":"ada","read":["lobby"]}`)
		for cookies, status := range map[string]int{
			"token=another; " + good:           200,
			good + "; token=another":           200,
			"token=; " + good:                  200,
			"token=another; token=yet":         401,
			"token=another; other=" + good[6:]: 401,
		} {
			if r, body := b.ask("192.0.2.1", "GET /rooms/lobby/poll", "", "Cookie: "+cookies); r.StatusCode != status {
				t.Errorf("%s: %d %s, want %d", cookies, r.StatusCode, body, status)
			}
		}
	})
}

func TestAStreamEndsWhenItsTokenExpires(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newLimitedTestbed(t, "-secret", firstSecret)
		const good = 40 * time.Second
		start := time.Now()
		auth := "Authorization: Bearer " + signedToken(`{"read":["*"],"exp":`+unixIn(good)+`}`)
		late := func() string {
			d := time.Since(start) - good
			if d < 0 || d > b.heartbeat/15 {
				return fmt.Sprintf("it ended %v after its token", d)
			}
			return ""
		}
		var wg sync.WaitGroup
		for _, tech := range techniques {
			if tech.mode != streaming || tech.name == "ws" {
				continue
			}
			wg.Go(func() {
				r := b.open("192.0.2.1", "GET /rooms/lobby/"+tech.name, "", auth)
				defer r.stop()
				body := r.readAll() // and the answer ends properly
				bye := `"type":"bye","data":{"retry":`
				if tech.name == "html" {
					bye = "this page comes back by itself"
				}
				if wrong := late(); wrong != "" || strings.Count(body, bye) != 1 {
					t.Errorf("%s: %s, and sent\n%s", tech.name, wrong, body)
				}
			})
		}
		wg.Go(func() {
			c, _ := b.webSocketFrom("192.0.2.1", "/rooms/lobby/ws", auth)
			defer c.CloseNow()
			readWebSocketUntil(t, c, `"type":"bye","data":{"retry":`)
			_, _, err := c.Read(context.Background())
			if wrong := late(); wrong != "" || websocket.CloseStatus(err) != websocket.StatusPolicyViolation {
				t.Errorf("ws: %s, with %v, want the code 1008", wrong, err)
			}
		})
		for _, what := range []string{"longpoll?wait=55", "jsonp?wait=55&callback=f"} {
			wg.Go(func() {
				r, body := b.ask("192.0.2.1", "GET /rooms/lobby/"+what, "", auth)
				if d := time.Since(start); r.StatusCode != 200 || d != good || !strings.Contains(body, `"events":[]`) {
					t.Errorf("%s: after %v %d %s; want an empty answer as the token expires", what, d, r.StatusCode, body)
				}
			})
		}
		wg.Wait()
		time.Sleep(time.Second)
		if n := b.active(); n != 0 {
			t.Errorf("%d streams are held", n)
		}
		if got := b.status("192.0.2.1", "GET /rooms/lobby/sse", auth); got != 401 {
			t.Errorf("coming back with it: %d, want 401", got)
		}
	})
}

func TestOverHTTP2AStreamEndsWhenItsTokenExpires(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newLimitedTestbed(t, "-secret", firstSecret, "-h2c")
		start := time.Now()
		get := http2Client(b)
		resp := get("/rooms/lobby/sse?token=" + signedToken(`{"read":["*"],"exp":`+unixIn(40*time.Second)+`}`))
		data, err := io.ReadAll(resp.Body)
		if d := time.Since(start); err != nil || d != 40*time.Second || !strings.Contains(string(data), "event: bye") {
			t.Errorf("after %v %v, and sent\n%s", d, err, data)
		}
	})
}

func TestNoTokenOrSecretIsInALogOrAnAnswer(t *testing.T) {
	var log syncedLog
	before := slog.Default()
	defer slog.SetDefault(before)
	slog.SetDefault(slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug})))
	synctest.Test(t, func(t *testing.T) {
		b := newLimitedTestbed(t, "-secret", "a2b4,"+firstSecret, "-streams", "2")
		var marks []string // none of these may be visible
		mint := func(claims string) string {
			tok := signedToken(claims)
			marks = append(marks, tok, tok[strings.LastIndexByte(tok, '.')+1:])
			return tok
		}
		marks = append(marks, "a2b4", firstSecret)
		good := mint(`{"sub":"ada","read":["*"],"write":["*"],"exp":` + unixIn(time.Hour) + `}`)
		tokens := []string{
			good, mint(`{"exp":1}`), mint(`{"nbf":` + unixIn(time.Hour) + `}`), mint(`{"sub":"bob"}`), mint(`{"sub":7}`),
			makeToken(`{"alg":"none"}`, `{"sub":"none-none"}`, ""), "not-a-token-at-all", good + ".extra.parts",
		}
		marks = append(marks, tokens[5], "not-a-token-at-all", "extra.parts")
		clean := func(where, text string) {
			for _, m := range marks {
				if m != "" && strings.Contains(text, m) {
					t.Errorf("%s: %q is in\n%.2000s", where, m, text)
				}
			}
		}
		for _, tok := range tokens {
			for _, what := range append(allRequests("lobby"), "GET /metrics", "GET /nothing", "PUT /rooms/lobby", "GET /rooms/l%zzy/sse",
				"GET /rooms/lobby/nothing", "GET /rooms/lobby/sse?after=x", "POST /rooms/lobby?type=hello", "GET /rooms/lobby/poll?a=%zz") {
				for _, headers := range [][]string{{"Authorization: Bearer " + tok}, {"Cookie: token=" + tok}, {"Authorization: " + tok}} {
					if strings.Contains(what, "/ws") {
						b.status("192.0.2.1", what, headers...)
						continue
					}
					if strings.Contains(what, "%zzy") { // net/http does not send this
						continue
					}
					r := b.open("192.0.2.1", addParam(what, "token="+tok), bodyFor(what), append(headers, "Accept: text/html")...)
					if !strings.HasPrefix(r.Header.Get("Set-Cookie"), "token=") {
						clean(what, fmt.Sprint(r.Header))
					}
					if r.StatusCode != 200 {
						clean(what, r.readAll())
					}
					r.stop()
				}
			}
			for _, raw := range []string{
				"GET /rooms/lobby/sse?token=" + tok + " HTTP/1.1\r\n\r\n",
				"GET /rooms/lobby/sse?token=" + tok + " HTTP/9\r\nHost: x\r\n\r\n",
				"GET /rooms/l%zzy/sse?token=" + tok + " HTTP/1.1\r\nHost: x\r\n\r\n",
				"GET / HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer\x00" + tok + "\r\n\r\n",
				"GET / HTTP/1.1\r\nHost: x\r\nAuthorization Bearer " + tok + "\r\n\r\n",
			} {
				c, err := b.dialFrom("192.0.2.1")
				if err != nil {
					t.Fatal(err)
				}
				go io.WriteString(c, raw)
				c.SetReadDeadline(time.Now().Add(time.Second))
				data, _ := io.ReadAll(c)
				clean(raw, string(data))
				c.Close()
			}
		}
		b.close()
		clean("the log", log.String())
	})
	if !strings.Contains(log.String(), "msg=stopped") {
		t.Errorf("this is not the log:\n%s", log.String())
	}
}

// Origins.

func TestWhichOriginsMayRead(t *testing.T) {
	const (
		own, ownTLS  = "http://" + limitedHost, "https://" + limitedHost
		listed, evil = "https://ok.example", "https://evil.example"
	)
	synctest.Test(t, func(t *testing.T) {
		for _, secret := range []string{"", firstSecret} {
			b := newLimitedTestbed(t, "-origins", listed, "-secret", secret)
			cookies := []string{""}
			if secret != "" {
				cookies = append(cookies, signedToken(`{"read":["*"],"write":["*"]}`))
			}
			n, refused := 0, 0
			for _, what := range allRequests("lobby") {
				for _, origin := range []string{"", own, ownTLS, listed, evil, "null", "http://ok.example", listed + ".evil.example"} {
					for _, site := range []string{"", "none", "same-origin", "same-site", "cross-site"} {
						for _, referer := range []string{"", listed + "/page", evil + "/page"} {
							if origin != "" && referer != "" {
								continue // is ignored then
							}
							for _, cookie := range cookies {
								// The rule: the browser's own Sec-Fetch-Site decides
								// first; without it the Origin. A page of another
								// origin must be listed, by its Origin, or, for reads
								// of browsers that send none, by its Referer.
								reads := strings.HasPrefix(what, "GET ")
								isListed := origin == listed || origin == "" && reads && referer != "" && strings.HasPrefix(referer, listed)
								may := isListed
								switch site {
								case "":
									may = origin == "" && (referer == "" || !reads) || origin == own || origin == ownTLS || isListed
								case "none", "same-origin":
									may = true
								}
								want := 200
								if !may {
									want = 403
									refused++
								} else if secret != "" && cookie == "" {
									want = 401
								}
								var headers []string
								for name, value := range map[string]string{"Origin": origin, "Sec-Fetch-Site": site, "Referer": referer, "Cookie": cookie} {
									if name == "Cookie" {
										value = "token=" + value
									}
									if value != "" {
										headers = append(headers, name+": "+value)
									}
								}
								n++
								if strings.Contains(what, "/ws") {
									if got := b.status("192.0.2.1", what, headers...); got != want {
										t.Errorf("%s %q: %d, want %d", what, headers, got, want)
									}
									continue
								}
								r := b.open("192.0.2.1", what, bodyFor(what), headers...)
								r.stop()
								got := r.StatusCode
								if got == 201 {
									got = 200
								}
								if got != want {
									t.Errorf("%s %q: %d, want %d", what, headers, got, want)
								}
								allowed, credentials := r.Header.Get("Access-Control-Allow-Origin"), r.Header.Get("Access-Control-Allow-Credentials")
								if origin == listed && (allowed != listed || credentials != "true") || origin != listed && allowed+credentials != "" {
									t.Errorf("%s %q: pages of %q may see the answer, credentials %q", what, headers, allowed, credentials)
								}
								byOrigin := origin != "" || !strings.HasPrefix(what, "POST")
								if v := r.Header.Get("Vary"); byOrigin && (!strings.Contains(v, "Origin") || !strings.Contains(v, "Sec-Fetch-Site")) {
									t.Errorf("%s %q: Vary is %q", what, headers, v)
								}
							}
						}
					}
				}
			}
			if got := b.refusals("origin"); got != refused {
				t.Errorf("%d refusals are counted, want %d", got, refused)
			}
			t.Logf("%d requests, %d of them refused for their origin", n, refused)
			b.close()
		}
	})
}

func TestAWebSocketIsCheckedLikeAnyRequest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newLimitedTestbed(t)
		// A proxy that changes the Host (nginx does, unless told otherwise); the
		// browser says it is the same origin.
		headers := []string{"Host: 10.0.0.1:8080", "Origin: https://" + limitedHost, "Sec-Fetch-Site: same-origin"}
		for _, what := range allRequests("lobby") {
			if got := b.status("192.0.2.1", what, headers...); got != 200 {
				t.Errorf("%s behind a proxy that sets the Host: %d, want 200", what, got)
			}
		}
	})
}

func TestAPageMayBeLinkedButNotFramed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newLimitedTestbed(t)
		for _, tc := range []struct {
			mode, dest string
			want       int
		}{
			{"navigate", "document", 200},
			{"navigate", "iframe", 403},
			{"navigate", "frame", 403},
			{"navigate", "embed", 403},
			{"no-cors", "image", 403},
			{"no-cors", "script", 403},
			{"cors", "empty", 403},
			{"websocket", "websocket", 403},
		} {
			for _, what := range allRequests("lobby") {
				want := tc.want
				if !strings.HasPrefix(what, "GET ") || strings.HasSuffix(what, "/ws") {
					want = 403 // nobody navigates to these
				}
				if strings.HasSuffix(what, "/ws") && tc.dest == "document" {
					continue
				}
				if tc.dest == "document" && want == 200 { // over plain HTTP, where only what is loaded tells
					if got := b.status("192.0.2.1", what, "Accept: text/html,*/*;q=0.8", "Referer: https://evil.example/"); got != want {
						t.Errorf("%s, a link on a foreign page: %d, want %d", what, got, want)
					}
				}
				got := b.status("192.0.2.1", what, "Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: "+tc.mode, "Sec-Fetch-Dest: "+tc.dest, "Referer: https://evil.example/")
				if got != want {
					t.Errorf("%s from a foreign page, as %s %s: %d, want %d", what, tc.mode, tc.dest, got, want)
				}
			}
		}
	})
}

func TestWithAStarAllOriginsMayAskButWithoutCookies(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newLimitedTestbed(t, "-origins", "*")
		for _, what := range allRequests("lobby") {
			for _, origin := range []string{"https://evil.example", "null"} {
				headers := []string{"Origin: " + origin, "Sec-Fetch-Site: cross-site"}
				if got := b.status("192.0.2.1", what, headers...); got != 200 {
					t.Errorf("%s of %s: %d, want 200", what, origin, got)
				}
				if strings.Contains(what, "/ws") {
					continue
				}
				r := b.open("192.0.2.1", what, bodyFor(what), headers...)
				r.stop()
				if a, c := r.Header.Get("Access-Control-Allow-Origin"), r.Header.Get("Access-Control-Allow-Credentials"); a != origin || c != "" {
					t.Errorf("%s of %s: allowed are %q, credentials %q", what, origin, a, c)
				}
			}
		}
	})
}

func TestAPreflightIsAnsweredForListedOrigins(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newLimitedTestbed(t, "-origins", "https://ok.example", "-secret", firstSecret)
		for _, what := range []string{"/rooms/lobby", "/rooms/lobby/sse", "/rooms/lobby/presence", "/rooms/lobby/poll"} {
			for origin, ok := range map[string]bool{"https://ok.example": true, "https://evil.example": false, "null": false} {
				r, body := b.ask("192.0.2.1", "OPTIONS "+what, "", "Origin: "+origin, "Sec-Fetch-Site: cross-site",
					"Access-Control-Request-Method: POST", "Access-Control-Request-Headers: authorization")
				allowed := r.Header.Get("Access-Control-Allow-Origin") == origin && strings.Contains(r.Header.Get("Access-Control-Allow-Headers"), "Authorization")
				if r.StatusCode != 204 || body != "" || allowed != ok || !ok && r.Header.Get("Access-Control-Allow-Headers") != "" {
					t.Errorf("OPTIONS %s of %s: %d %v, want it allowed: %v", what, origin, r.StatusCode, r.Header, ok)
				}
			}
		}
	})
}

func TestOnlyListedOriginsMayFrameAPage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for origins, want := range map[string]string{"": "'self'", "https://a.example, https://b.example": "'self' https://a.example https://b.example", "*": "*"} {
			b := newLimitedTestbed(t, "-origins", origins)
			for _, page := range []string{"html", "refresh", "form", "iframe"} {
				r := b.open("192.0.2.1", "GET /rooms/lobby/"+page, "")
				r.stop()
				policy := r.Header.Get("Content-Security-Policy")
				_, got, _ := strings.Cut(policy, "frame-ancestors ")
				if got, _, _ = strings.Cut(got, ";"); got != want {
					t.Errorf("with -origins %q the frame-ancestors of %s are %q, want %q", origins, page, got, want)
				}
			}
			b.close()
		}
	})
}

func TestTheForeverFramePostsOnlyToTheOriginThatMayRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newLimitedTestbed(t, "-origins", "https://ok.example")
		for referer, want := range map[string]string{"": "location.origin", "https://ok.example/x": `"https://ok.example"`} {
			site := "same-origin"
			if referer != "" {
				site = "cross-site"
			}
			r := b.open("192.0.2.1", "GET /rooms/lobby/iframe", "", "Referer: "+referer, "Sec-Fetch-Site: "+site, "Sec-Fetch-Mode: navigate", "Sec-Fetch-Dest: iframe")
			if line := r.readUntil("postMessage"); !strings.Contains(line, "postMessage(event, "+want+")") {
				t.Errorf("asked for by %q it is %s", referer, line)
			}
			r.stop()
		}
	})
}

// Names of claims are case-sensitive.
func TestAClaimInCapitalsIsIgnored(t *testing.T) {
	c, err := verifyToken(signedToken(`{"SUB":"ada","READ":["*"],"Write":["lobby"]}`), [][]byte{[]byte(firstSecret)}, time.Now())
	if err != nil || c.Sub != "" || matchesRoom(c.Read, "lobby") || matchesRoom(c.Write, "lobby") {
		t.Errorf("%v %+v, want a token without rights", err, c)
	}
}

// An operator's token names _stats. Without tokens, operators are local clients.
func TestOperators(t *testing.T) {
	for _, tc := range []struct {
		secret, from string
		headers      []string
		list, erase  int
	}{
		{"", "127.0.0.1", nil, 200, 204},
		{"", "::1", nil, 200, 204},
		{"", "192.0.2.1", nil, 403, 403},
		{"", "127.0.0.1", []string{"X-Forwarded-For: 127.0.0.1"}, 403, 403},
		{"", "127.0.0.1", []string{"Forwarded: for=127.0.0.1"}, 403, 403},
		{"", "127.0.0.1", []string{"Via: 1.1 proxy"}, 403, 403},
		{"", "127.0.0.1", []string{"X-Forwarded-Proto: https"}, 403, 403},
		{"", "127.0.0.1", []string{"Cf-Connecting-Ip: 192.0.2.1"}, 403, 403},
		{"", "127.0.0.1", []string{"Host: evil.example", "Origin: http://evil.example", "Sec-Fetch-Site: same-origin"}, 403, 403},
		{"", "127.0.0.1", []string{"Host: localhost:8080"}, 200, 204},
		{"", "::1", []string{"Host: [::1]:8080"}, 200, 204},
		{"", "127.0.0.1", []string{"X-Real-IP: 127.0.0.1"}, 403, 403},
		{"", "127.0.0.1", []string{"Origin: https://evil.example", "Sec-Fetch-Site: cross-site"}, 403, 403},
		{firstSecret, "127.0.0.1", nil, 401, 401},
		{firstSecret, "192.0.2.1", []string{"Authorization: Bearer " + signedToken(`{"read":["_stats"],"write":["lobby"]}`)}, 200, 204},
		{firstSecret, "192.0.2.1", []string{"Authorization: Bearer " + signedToken(`{"read":["_stats"],"write":["other"]}`)}, 200, 403},
		{firstSecret, "192.0.2.1", []string{"Authorization: Bearer " + signedToken(`{"read":["*"],"write":["*"]}`)}, 403, 403},
		{firstSecret, "192.0.2.1", []string{"Authorization: Bearer x"}, 401, 401},
	} {
		synctest.Test(t, func(t *testing.T) {
			b := newLimitedTestbed(t, "-secret", tc.secret)
			b.relay.publish(publishRequest{room: "lobby", kind: "message", data: []byte(`"hi"`)})
			headers := tc.headers
			if !slices.ContainsFunc(headers, func(line string) bool { return strings.HasPrefix(line, "Host: ") }) {
				headers = append([]string{"Host: localhost"}, headers...)
			}
			list, _ := b.ask(tc.from, "GET /rooms", "", headers...)
			erase, body := b.ask(tc.from, "DELETE /rooms/lobby", "", headers...)
			if list.StatusCode != tc.list || erase.StatusCode != tc.erase {
				t.Errorf("%q from %s: %d and %d %s, want %d and %d", tc.headers, tc.from, list.StatusCode, erase.StatusCode, body, tc.list, tc.erase)
			}
			if left := b.relay.rooms["lobby"] != nil; left != (tc.erase != 204) {
				t.Errorf("%q from %s: the room is there: %v", tc.headers, tc.from, left)
			}
		})
	}
}

// A page with a good token in its URL moves it to a cookie, like html does. It can ask
// what its token, which no script sees, allows.
func TestTheTokenOfAPage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newLimitedTestbed(t, "-secret", firstSecret)
		const from, html = "192.0.2.1", "Accept: text/html"
		exp := unixIn(time.Hour)
		tok := signedToken(`{"sub":"ada","read":["lobby"],"exp":` + exp + `}`)
		for path, want := range map[string]string{"/?token=" + tok: "./", "/?room=x&token=" + tok: "./?room=x", "/stats.html?token=" + tok: "./stats.html"} {
			r, _ := b.ask(from, "GET "+path, "", html)
			if where, cookie := r.Header.Get("Location"), r.Header.Get("Set-Cookie"); r.StatusCode != 303 || where != want || !strings.Contains(cookie, "token="+tok+"; Path=/;") || !strings.Contains(cookie, "HttpOnly") {
				t.Errorf("%s: %d %q %q, want 303 %q", path, r.StatusCode, where, cookie, want)
			}
		}
		for _, path := range []string{"/?token=x", "/?token=", "/?token=x&token=y"} {
			if r, _ := b.ask(from, "GET "+path, "", html); r.StatusCode != 200 || r.Header.Get("Set-Cookie") != "" {
				t.Errorf("%s: %d %q", path, r.StatusCode, r.Header.Get("Set-Cookie"))
			}
		}
		for _, tc := range []struct {
			query, auth string
			status      int
			want        string
		}{
			{"?room=lobby", "Cookie: token=" + tok, 200, `{"exp":` + exp + `,"read":true,"required":true,"user":"ada","write":false}`},
			{"?room=other&token=" + tok, "X: y", 200, `{"exp":` + exp + `,"read":false,"required":true,"user":"ada","write":false}`},
			{"", "Authorization: Bearer " + signedToken(`{"write":["*"]}`), 200, `{"required":true}`},
			{"?room=a%20b", "Cookie: token=" + tok, 400, ""},
			{"?room=a&room=b", "Cookie: token=" + tok, 400, ""},
			{"?room=lobby", "X: y", 401, ""},
			{"?room=lobby&token=x", "X: y", 401, ""},
		} {
			r, body := b.ask(from, "GET /token"+tc.query, "", tc.auth)
			if r.StatusCode != tc.status || tc.want != "" && body != tc.want+"\n" || !strings.Contains(r.Header.Get("Cache-Control"), "no-store") {
				t.Errorf("%s: %d %s, want %d %s", tc.query, r.StatusCode, body, tc.status, tc.want)
			}
		}
	})
	synctest.Test(t, func(t *testing.T) {
		b := newLimitedTestbed(t)
		if r, body := b.ask("192.0.2.1", "GET /token?room=lobby&token=x", ""); r.StatusCode != 200 || body != `{"read":true,"required":false,"write":true}`+"\n" {
			t.Errorf("of an open relay: %d %s", r.StatusCode, body)
		}
		if r, _ := b.ask("192.0.2.1", "GET /?token=x", "", "Accept: text/html"); r.StatusCode != 200 {
			t.Errorf("a token that is not needed: %d", r.StatusCode)
		}
	})
}

// Which origins may read.
func TestAccess(t *testing.T) {
	const friend, stranger = "https://friend.example", "https://stranger.example"
	type asking struct {
		name    string
		headers []string
		// Who may: own needs no list; "list" needs -origins with friend; "all" needs
		// *; "never" is refused except with *, or for publishing.
		read, publish string
	}
	all := []asking{
		{"a program", nil, "own", "own"},
		{"a page of the relay", []string{"Origin: http://cometes.test", "Sec-Fetch-Site: same-origin"}, "own", "own"},
		{"a page of the relay without an Origin", []string{"Sec-Fetch-Site: same-origin", "Referer: http://cometes.test/"}, "own", "own"},
		{"a page of the relay in an old browser", []string{"Origin: http://cometes.test"}, "own", "own"},
		{"an address typed in", []string{"Sec-Fetch-Site: none", "Sec-Fetch-Mode: navigate", "Sec-Fetch-Dest: document"}, "own", "own"},
		{"a friend's page", []string{"Origin: " + friend, "Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: cors"}, "list", "list"},
		{"a friend's page in an old browser", []string{"Origin: " + friend}, "list", "list"},
		{"a friend's page with a port", []string{"Origin: http://localhost:3000", "Sec-Fetch-Site: same-site"}, "list", "list"},
		{"a friend's script", []string{"Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: no-cors", "Sec-Fetch-Dest: script", "Referer: " + friend + "/page?x"}, "list", ""},
		{"a friend's frame", []string{"Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: navigate", "Sec-Fetch-Dest: iframe", "Referer: " + friend + "/"}, "list", ""},
		{"a friend's picture", []string{"Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: no-cors", "Sec-Fetch-Dest: image", "Referer: " + friend + "/"}, "list", ""},
		{"a stranger's page", []string{"Origin: " + stranger, "Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: cors"}, "all", "all"},
		{"a stranger's page in an old browser", []string{"Origin: " + stranger}, "all", "all"},
		{"a stranger on the same site", []string{"Origin: http://evil.cometes.test", "Sec-Fetch-Site: same-site"}, "all", "all"},
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
		{"a stranger's script without a Referer", []string{"Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: no-cors", "Sec-Fetch-Dest: script"}, "all", ""},
		{"a stranger's script that claims to be a friend's", []string{"Sec-Fetch-Site: cross-site", "Sec-Fetch-Dest: script", "Referer: https://friend.example@stranger.example/"}, "all", ""},
		{"a link from a stranger", []string{"Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: navigate", "Sec-Fetch-Dest: document", "Referer: " + stranger + "/"}, "own", ""},
		{"a stranger's form", []string{"Origin: " + stranger, "Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: navigate", "Sec-Fetch-Dest: document"}, "", "all"},
		{"a hidden form", []string{"Origin: null", "Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: navigate", "Sec-Fetch-Dest: iframe"}, "", "all"},
		{"an object", []string{"Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: navigate", "Sec-Fetch-Dest: object"}, "all", ""},
	}
	for open, list := range map[string]string{"own": "", "list": friend + ", http://localhost:3000", "all": "*"} {
		t.Run(open, inBubble(func(t *testing.T) {
			b := newTestbed(t, pipe, func(c *config) { c.origins = list })
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
					try("read presence", a.read, 200, "GET", "/rooms/a/presence")
					try("see a form", a.read, 200, "GET", "/rooms/a/form")
					try("ask for the head", a.read, 200, "HEAD", "/rooms/a/sse")
				}
				if a.publish != "" {
					try("publish", a.publish, 201, "POST", "/rooms/a")
					if origin != "" || len(a.headers) == 0 { // a browser's WebSocket sends its origin
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

// The preflight of a listed page is answered with the headers it needs.
func TestPreflight(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestbed(t, pipe, func(c *config) { c.origins = "https://friend.example" })
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

// A listed page can read the error of its request, whatever it is.
func TestErrorsAcrossOrigins(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestbed(t, pipe, func(c *config) { c.origins = "https://friend.example" })
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

// A forever frame posts only to the page around it, if that may read.
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
		t.Run(list, inBubble(func(t *testing.T) {
			b := newTestbed(t, pipe, func(c *config) { c.origins = list })
			for _, test := range tests {
				headers := []string{"Sec-Fetch-Mode: navigate", "Sec-Fetch-Dest: iframe"}
				if test.site != "" {
					headers = append(headers, "Sec-Fetch-Site: "+test.site)
				}
				if test.referer != "" {
					headers = append(headers, "Referer: "+test.referer)
				}
				e := b.subscribe(variantOf("iframe"), "a", headers...)
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

func FuzzToken(f *testing.F) {
	secrets := [][]byte{[]byte(firstSecret), []byte(secondSecret)}
	hs := `{"alg":"HS256","typ":"JWT"}`
	for _, seed := range []string{
		"", ".", "..", "...", makeToken(hs, `{}`, firstSecret), makeToken(hs, `{"sub":"ada","exp":946684801,"read":["*"],"write":["a*"]}`, secondSecret),
		makeToken(hs, `{"exp":1e400}`, firstSecret), makeToken(`{"alg":"none"}`, `{}`, firstSecret), makeToken(`{"Alg":"HS256"}`, `{"EXP":1}`, firstSecret),
		makeToken(hs, `null`, firstSecret), makeToken(`null`, `null`, firstSecret), makeToken(`[]`, `[]`, firstSecret), makeToken(hs, `{"sub":"\ud800"}`, firstSecret),
		"eyJhbGciOiJIUzI1NiJ9.eyJ3cml0ZSI6WyJhLmI6Yy0qIl19.aFPZqmyNcUBOTb_YL6XTDOiCOgdFeiB41194QcLAYEA",
	} {
		f.Add(seed, "")
	}
	f.Add(hs, `{"sub":"ada","read":["lobby"]}`)
	f.Add(`{"alg":"HS256","crit":["x"]}`, `{"exp":null,"nbf":-1}`)
	f.Fuzz(func(t *testing.T, head, claims string) {
		now := time.Unix(946684800, 0)
		// Either the input is a token, or the test signs it; otherwise no input would
		// ever be signed.
		tokens := []string{head, makeToken(head, claims, firstSecret)}
		for i, tok := range tokens {
			c, err := verifyToken(tok, secrets, now)
			if (c == nil) == (err == nil) {
				t.Fatalf("%q: %v, %v", tok, c, err)
			}
			if err != nil {
				if len(tok) > 20 && strings.Contains(err.Error(), tok[len(tok)-20:]) {
					t.Errorf("the error shows the token: %v", err)
				}
				continue
			}
			parts := strings.Split(tok, ".")
			if len(tok) > maxToken || len(parts) != 3 {
				t.Fatalf("%q is valid", tok)
			}
			signed := false
			for _, s := range secrets {
				h := hmac.New(sha256.New, s)
				h.Write([]byte(parts[0] + "." + parts[1]))
				signed = signed || base64.RawURLEncoding.EncodeToString(h.Sum(nil)) == parts[2]
			}
			alg, _ := base64.RawURLEncoding.DecodeString(parts[0])
			if !signed || !bytes.Contains(alg, []byte("256")) && !bytes.Contains(alg, []byte(`\u`)) {
				t.Fatalf("%q is valid, and not signed", tok)
			}
			if c.expires() <= now.UnixNano() || c.Nbf > 946684800 || !validUser(c.Sub) {
				t.Fatalf("%q is valid, with %+v", tok, *c)
			}
			if i == 0 { // any change makes it invalid
				for _, at := range []int{0, len(tok) / 2, len(tok) - 1} {
					b := []byte(tok)
					b[at] ^= 1
					if _, err := verifyToken(string(b), secrets, now); err == nil {
						t.Errorf("%q is valid too", b)
					}
				}
			}
			for _, room := range append(slices.Clone(c.Read), "lobby", "_stats") {
				if validName(room) && room[0] == '_' && matchesRoom([]string{"*"}, room) {
					t.Errorf("* covers %s", room)
				}
			}
		}
	})
}
