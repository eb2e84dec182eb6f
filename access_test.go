// Who may ask: tokens, and the pages of other origins. The tests run a whole
// relay, with its http.Server and its doorman, on a network of pipes, in
// virtual time: a hall, to which one can come from any address.

package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coder/websocket"
)

// The hall.

type hall struct {
	*server
	t     testing.TB
	conns chan net.Conn
	shut  chan struct{}
	close func()

	mu      sync.Mutex // guards clients
	clients map[string]*http.Transport
}

const hallHost = "relay.example"

// openHall runs a relay with the flags args, set up as run does it. It is for
// use in a synctest bubble.
func openHall(t testing.TB, args ...string) *hall {
	t.Helper()
	c, err := parse(args, func(string) string { return "" })
	if err != nil {
		t.Fatal(err)
	}
	s, err := newServer(c)
	if err != nil {
		t.Fatal(err)
	}
	h := &hall{server: s, t: t, conns: make(chan net.Conn), shut: make(chan struct{}), clients: map[string]*http.Transport{}}
	srv := s.http(c.h2c)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		serve(ctx, s, srv, s.doorman(hallDoor{h}))
	}()
	h.close = sync.OnceFunc(func() {
		cancel()
		for _, c := range h.clients {
			c.CloseIdleConnections()
		}
		<-done
		time.Sleep(2 * lingerFor)
		synctest.Wait()
	})
	t.Cleanup(h.close)
	return h
}

// A hallDoor is the hall's net.Listener.
type hallDoor struct{ h *hall }

func (d hallDoor) Accept() (net.Conn, error) {
	select {
	case c := <-d.h.conns:
		return c, nil
	case <-d.h.shut:
		return nil, net.ErrClosed
	}
}

func (d hallDoor) Close() error   { close(d.h.shut); return nil }
func (d hallDoor) Addr() net.Addr { return &net.TCPAddr{IP: net.IPv6loopback, Port: 80} }

// A hallPipe is the relay's end of a connection from some address.
type hallPipe struct {
	net.Conn
	from net.Addr
}

func (p hallPipe) RemoteAddr() net.Addr { return p.from }

// dial connects from an address.
func (h *hall) dial(from string) (net.Conn, error) {
	ours, theirs := net.Pipe()
	addr := net.TCPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(from), uint16(1024+rand.IntN(60000))))
	select {
	case h.conns <- hallPipe{theirs, addr}:
		return ours, nil
	case <-h.shut:
		return nil, errors.New("connection refused")
	}
}

// client is what speaks HTTP from an address.
func (h *hall) client(from string) *http.Client {
	h.mu.Lock()
	defer h.mu.Unlock()
	c := h.clients[from]
	if c == nil {
		c = &http.Transport{DialContext: func(context.Context, string, string) (net.Conn, error) { return h.dial(from) }}
		h.clients[from] = c
	}
	return &http.Client{Transport: c, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
}

// A hallReply is an answer whose body may still be coming.
type hallReply struct {
	*http.Response
	t    testing.TB
	r    *bufio.Reader
	stop context.CancelFunc
}

// open asks from an address: "GET /rooms/a/sse", with headers such as
// "Origin: https://a.example", and reads no more than the head of the answer.
func (h *hall) open(from, what, body string, headers ...string) *hallReply {
	h.t.Helper()
	method, path, _ := strings.Cut(what, " ")
	ctx, cancel := context.WithTimeout(context.Background(), 24*time.Hour)
	var in io.Reader
	if method != "GET" && method != "HEAD" {
		in = strings.NewReader(body)
	}
	r, err := http.NewRequestWithContext(ctx, method, "http://"+hallHost+path, in)
	if err != nil {
		h.t.Fatal(err)
	}
	for _, line := range headers {
		name, value, _ := strings.Cut(line, ": ")
		if name == "Host" {
			r.Host = value
			continue
		}
		r.Header.Add(name, value)
	}
	resp, err := h.client(from).Do(r)
	if err != nil {
		h.t.Fatalf("%s from %s: %v", what, from, err)
	}
	return &hallReply{resp, h.t, bufio.NewReader(resp.Body), func() { cancel(); resp.Body.Close() }}
}

// ask reads the whole answer.
func (h *hall) ask(from, what, body string, headers ...string) (*hallReply, string) {
	h.t.Helper()
	r := h.open(from, what, body, headers...)
	defer r.stop()
	return r, r.rest()
}

// rest is the body from here to its end.
func (r *hallReply) rest() string {
	r.t.Helper()
	b, err := io.ReadAll(r.r)
	if err != nil {
		r.t.Fatalf("the answer broke off: %v", err)
	}
	return string(b)
}

// until reads to the line that contains want, and returns it.
func (r *hallReply) until(want string) string {
	r.t.Helper()
	for {
		line, err := r.r.ReadString('\n')
		if strings.Contains(line, want) {
			return line
		}
		if err != nil {
			r.t.Fatalf("the answer ended before it said %s: %v", want, err)
		}
	}
}

// socket opens a WebSocket, or returns the status it was refused with.
func (h *hall) socket(from, path string, headers ...string) (*websocket.Conn, int) {
	h.t.Helper()
	o := &websocket.DialOptions{HTTPClient: h.client(from), HTTPHeader: http.Header{}}
	for _, line := range headers {
		name, value, _ := strings.Cut(line, ": ")
		if name == "Host" {
			o.Host = value
			continue
		}
		o.HTTPHeader.Add(name, value)
	}
	c, resp, err := websocket.Dial(context.Background(), "ws://"+hallHost+path, o)
	if resp == nil {
		h.t.Fatalf("%s from %s: %v", path, from, err)
	}
	if err != nil {
		resp.Body.Close()
	}
	return c, resp.StatusCode
}

// hearSocket reads a WebSocket until a frame contains want, and returns that.
func hearSocket(t testing.TB, c *websocket.Conn, want string) string {
	t.Helper()
	for {
		_, b, err := c.Read(context.Background())
		if err != nil {
			t.Fatalf("the socket closed before it said %s: %v", want, err)
		}
		if strings.Contains(string(b), want) {
			return string(b)
		}
	}
}

// tellSocket writes to a WebSocket and returns the answer to it.
func tellSocket(t testing.TB, c *websocket.Conn, frame string) string {
	t.Helper()
	if err := c.Write(context.Background(), websocket.MessageText, []byte(frame)); err != nil {
		t.Fatal(err)
	}
	for {
		b := hearSocket(t, c, "")
		if strings.Contains(b, `"type":"ack"`) || strings.Contains(b, `"type":"error"`) {
			return b
		}
	}
}

// metric is a line's value in /metrics.
func (h *hall) metric(name string) float64 {
	h.t.Helper()
	w := httptest.NewRecorder()
	h.metrics(w)
	return metricOf(h.t, w.Body.String(), name)
}

func metricOf(t testing.TB, text, name string) (value float64) {
	t.Helper()
	_, rest, ok := strings.Cut(text, "\ncometes_"+name+" ")
	if _, err := fmt.Sscan(rest, &value); !ok || err != nil {
		t.Fatalf("there is no metric %s", name)
	}
	return value
}

// refusals is how often there was a refusal for the reason.
func (h *hall) refusals(reason string) int {
	return int(h.metric(fmt.Sprintf("refused_total{reason=%q}", reason)))
}

// Tokens.

const (
	firstSecret  = "one secret that is thirty-two bytes"
	secondSecret = "the secret that comes after the first"
)

// minted is a token made by hand, with nothing of what is tested.
func minted(head, claims, secret string) string {
	b64 := base64.RawURLEncoding.EncodeToString
	said := b64([]byte(head)) + "." + b64([]byte(claims))
	h := hmac.New(sha256.New, []byte(secret))
	h.Write([]byte(said))
	return said + "." + b64(h.Sum(nil))
}

// signedToken is one with the head that all use.
func signedToken(claims string) string {
	return minted(`{"alg":"HS256","typ":"JWT"}`, claims, firstSecret)
}

// unixIn is a moment from now as a token says it.
func unixIn(d time.Duration) string { return fmt.Sprint(time.Now().Add(d).Unix()) }

func TestATokenIsGoodOnlyIfItIsSignedWellFormedAndOfNow(t *testing.T) {
	const now = 946684800 // as in a bubble
	hs := `{"alg":"HS256","typ":"JWT"}`
	good := minted(hs, `{"sub":"ada"}`, firstSecret)
	parts := strings.Split(good, ".")
	head, body, sum := parts[0], parts[1], parts[2]
	b64 := base64.RawURLEncoding.EncodeToString
	long := strings.Repeat("x", maxToken)
	for _, tc := range []struct{ name, token, want string }{
		{"good", good, ""},
		{"good for a second more", minted(hs, `{"exp":946684801}`, firstSecret), ""},
		{"good for a fraction of a second more", minted(hs, `{"exp":946684800.001}`, firstSecret), ""},
		{"good from now on", minted(hs, `{"nbf":946684800}`, firstSecret), ""},
		{"good for ever", minted(hs, `{"exp":1e300}`, firstSecret), ""},
		{"with claims that mean nothing here", minted(hs, `{"iss":"x","aud":["y"],"jti":"1","iat":0}`, firstSecret), ""},
		{"with a head that has more", minted(`{"kid":"1","alg":"HS256"}`, `{}`, firstSecret), ""},
		{"of the other secret", minted(hs, `{}`, secondSecret), ""},

		{"expired", minted(hs, `{"exp":946684799}`, firstSecret), "expired"},
		{"expired this very moment", minted(hs, `{"exp":946684800}`, firstSecret), "expired"},
		{"expired at the beginning of time", minted(hs, `{"exp":0}`, firstSecret), "expired"},
		{"expired before it", minted(hs, `{"exp":-1e300}`, firstSecret), "expired"},
		{"not good yet", minted(hs, `{"nbf":946684801}`, firstSecret), "not good yet"},
		{"with an exp in quotes", minted(hs, `{"exp":"946689999"}`, firstSecret), "claims"},
		{"with an exp too big for a number", minted(hs, `{"exp":1e999}`, firstSecret), "claims"},
		{"with a read that is no list", minted(hs, `{"read":"*"}`, firstSecret), "claims"},
		{"with a sub that is no string", minted(hs, `{"sub":7}`, firstSecret), "claims"},
		{"with a sub that is no name", minted(hs, `{"sub":"a\nb"}`, firstSecret), "sub"},
		{"with a sub of 65 characters", minted(hs, `{"sub":"`+long[:65]+`"}`, firstSecret), "sub"},

		{"of a secret of before", minted(hs, `{}`, "the secret that was before the first"), "signed"},
		{"of no secret", minted(hs, `{}`, ""), "signed"},
		{"of a secret that begins as ours", minted(hs, `{}`, firstSecret[:31]), "signed"},
		{"with another body", head + "." + b64([]byte(`{"sub":"bob"}`)) + "." + sum, "signed"},
		{"with another head", b64([]byte(`{"alg":"HS256"}`)) + "." + body + "." + sum, "signed"},
		{"with the body of one and the head of another", body + "." + head + "." + sum, "HS256"},
		{"with its signature cut short", head + "." + body + "." + sum[:len(sum)-3], "signed"},
		{"without its signature", head + "." + body + ".", "signed"},
		{"signed with a signature", good + "." + sum, "no JWT"},

		{"unsigned, alg none", b64([]byte(`{"alg":"none"}`)) + "." + body + ".", "HS256"},
		{"alg None and a signature", minted(`{"alg":"None"}`, `{}`, firstSecret), "HS256"},
		{"alg RS256", minted(`{"alg":"RS256"}`, `{}`, firstSecret), "HS256"},
		{"alg HS512", minted(`{"alg":"HS512"}`, `{}`, firstSecret), "HS256"},
		{"alg hs256", minted(`{"alg":"hs256"}`, `{}`, firstSecret), "HS256"},
		{"alg HS256 with a space", minted(`{"alg":"HS256 "}`, `{}`, firstSecret), "HS256"},
		{"alg a list", minted(`{"alg":["HS256"]}`, `{}`, firstSecret), "HS256"},
		{"no alg", minted(`{"typ":"JWT"}`, `{}`, firstSecret), "HS256"},
		{"with what must be understood", minted(`{"alg":"HS256","crit":["b64"],"b64":false}`, `{}`, firstSecret), "HS256"},
		{"with an empty crit", minted(`{"alg":"HS256","crit":[]}`, `{}`, firstSecret), "HS256"},

		{"with ALG for alg", minted(`{"ALG":"HS256"}`, `{}`, firstSecret), "HS256"},
		{"with alg twice", minted(`{"alg":"none","alg":"HS256"}`, `{}`, firstSecret), "HS256"},
		{"expired, with another exp in capitals", minted(hs, `{"exp":946684799,"EXP":946689999}`, firstSecret), "expired"},
		{"expired, with a second exp", minted(hs, `{"exp":946684799,"exp":946689999}`, firstSecret), "claims"},
		{"with an EXP that is past, which is no exp", minted(hs, `{"EXP":1}`, firstSecret), ""},
		{"with a sub that turns what is around it", minted(hs, `{"sub":"\u202eada"}`, firstSecret), "sub"},

		{"empty", "", "no JWT"},
		{"a word", "token", "no JWT"},
		{"two dots", "..", "HS256"},
		{"a thousand dots", strings.Repeat(".", 1000), "no JWT"},
		{"two parts", head + "." + body, "no JWT"},
		{"an encrypted one, of five parts", good + ".x.y", "no JWT"},
		{"with padding", good + "=", "HS256"},
		{"in base64 that is not for URLs", head + "." + body + "." + strings.NewReplacer("-", "+", "_", "/").Replace(sum), "HS256"},
		{"with a line end in it", head + ".\n" + body + "." + sum, "signed"},
		{"with stray bits at the end", head + "." + body + "." + stray(sum), "HS256"},
		{"with a letter that is none of base64", head + "." + body + "." + "é" + sum[2:], "HS256"},
		{"with a head that is no JSON", minted(`alg=HS256`, `{}`, firstSecret), "HS256"},
		{"with a body that is no JSON", minted(hs, `sub=ada`, firstSecret), "claims"},
		{"with two bodies", minted(hs, `{}{}`, firstSecret), "claims"},
		{"oversized", minted(hs, `{"x":"`+long+`"}`, firstSecret), "no JWT"},
	} {
		c, err := verify(tc.token, [][]byte{[]byte(firstSecret), []byte(secondSecret)}, time.Unix(now, 0))
		switch {
		case tc.want == "" && (err != nil || c == nil):
			t.Errorf("a token %s: %v, want it good", tc.name, err)
		case tc.want != "" && (err == nil || c != nil || !strings.Contains(err.Error(), tc.want)):
			t.Errorf("a token %s: %v, want an error about %q", tc.name, err, tc.want)
		}
	}

	fits := minted(hs, `{"x":"`+long[:3003]+`"}`, firstSecret)
	if _, err := verify(fits, [][]byte{[]byte(firstSecret)}, time.Unix(now, 0)); len(fits) > maxToken || len(fits) < maxToken-2 || err != nil {
		t.Errorf("a token of %d bytes, and %d are allowed: %v", len(fits), maxToken, err)
	}
	if _, err := verify(good, nil, time.Unix(now, 0)); err == nil {
		t.Error("without a secret a token is good")
	}
}

// stray is the same base64 but for bits that mean nothing: one token has one spelling.
func stray(sum string) string {
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
		c, err := verify(tc.token, [][]byte{[]byte(tc.secret)}, time.Unix(tc.at, 0))
		if err != nil {
			t.Errorf("%s: %v", tc.name, err)
			continue
		}
		c.Exp = nil
		if got, want := fmt.Sprintf("%+v", *c), fmt.Sprintf("%+v", tc.want); got != want {
			t.Errorf("%s says %s, want %s", tc.name, got, want)
		}
	}
	if _, err := verify("eyJ0eXAiOiJKV1QiLA0KICJhbGciOiJIUzI1NiJ9.eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ.dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk",
		[][]byte{rfc}, time.Unix(1300819380, 0)); err == nil {
		t.Error("the token of RFC 7515 is good after it expired")
	}
}

// printed is what tokenCommand prints.
func printed(t *testing.T, env map[string]string, args ...string) (string, error) {
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
	out, err := printed(t, env, "-sub", "ada", "-read", "team-*, lobby", "-write", "lobby", "-ttl", "90s")
	if err != nil {
		t.Fatal(err)
	}
	c, err := verify(strings.TrimSpace(out), parseSecrets(secondSecret), time.Now())
	if err != nil {
		t.Fatalf("%s: %v; of two secrets it is signed with the first", out, err)
	}
	if c.Sub != "ada" || fmt.Sprint(c.Read, c.Write) != "[team-* lobby] [lobby]" || math.Abs(*c.Exp-float64(time.Now().Unix()+90)) > 2 {
		t.Errorf("it says %+v", *c)
	}
	if out, err := printed(t, env, "-secret", firstSecret); err != nil {
		t.Error(err)
	} else if _, err := verify(strings.TrimSpace(out), parseSecrets(firstSecret), time.Now()); err != nil {
		t.Errorf("with -secret: %v", err)
	}
	for _, args := range [][]string{{"-ttl", "0s"}, {"-sub", "a\nb"}, {"ada"}, {"-ttl", "soon"}} {
		if out, err := printed(t, env, args...); err == nil {
			t.Errorf("%q prints %q, want an error", args, out)
		}
	}
	if _, err := printed(t, nil); err == nil || !strings.Contains(err.Error(), "COMETES_SECRET") {
		t.Errorf("without a secret: %v, want to be told where to say it", err)
	}
}

func TestTheSecretIsNotInTheHelp(t *testing.T) {
	env := map[string]string{"COMETES_SECRET": firstSecret}
	for _, args := range [][]string{{"-help"}, {"-nonsense"}, {"-ttl", "soon"}} {
		if out, err := printed(t, env, args...); err == nil || strings.Contains(out+err.Error(), firstSecret) {
			t.Errorf("cometes token %s says %v and shows the secret:\n%s", args, err, out)
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
		{"te*m*", "te*m-a", true}, // no room has such a name
		{"**", "lobby", false},
		{"", "lobby", false},
		{" ", "lobby", false},
		{"a b lobby", "lobby", true},
		{"a b", "lobby", false},
	} {
		if got := matches(strings.Split(tc.patterns, " "), tc.room); got != tc.want {
			t.Errorf("%q covers %s: %v, want %v", tc.patterns, tc.room, got, tc.want)
		}
	}
	if matches(nil, "lobby") {
		t.Error("a token without a list is good for a room")
	}
}

// asks is every way to ask something of a room: the techniques, to publish,
// and presence.
func asks(room string) (all []string) {
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
	return append(all, "GET /rooms/"+room+"/form", "GET /rooms/"+room+"/multipart?as=svg", "GET /rooms/"+room+"/multipart?as=html",
		"GET /rooms/"+room+"/presence", "POST /rooms/"+room+"/presence?user=ada", "POST /rooms/"+room+"?user=ada")
}

// withParam adds a parameter to what is asked.
func withParam(what, parameter string) string {
	if strings.Contains(what, "?") {
		return what + "&" + parameter
	}
	return what + "?" + parameter
}

// bodyFor is a body that what is asked takes.
func bodyFor(what string) string {
	if strings.Contains(what, "/presence") {
		return "online"
	}
	return "hi"
}

// status asks, by a WebSocket if it is one, and returns the answer's status.
// It is 200 for all that is well.
func (h *hall) status(from, what string, headers ...string) int {
	h.t.Helper()
	code := 0
	if strings.Contains(what, "/ws") {
		c, status := h.socket(from, strings.TrimPrefix(what, "GET "), headers...)
		if c != nil {
			c.CloseNow()
		}
		code = status
	} else {
		r := h.open(from, what, bodyFor(what), headers...)
		r.stop()
		code = r.StatusCode
	}
	switch code {
	case http.StatusCreated, http.StatusSwitchingProtocols:
		return http.StatusOK
	}
	return code
}

func TestEveryWayToAskNeedsAToken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := openHall(t, "-secret", firstSecret+","+secondSecret)
		all := signedToken(`{"read":["lobby"],"write":["lobby"]}`)
		second := minted(`{"alg":"HS256"}`, `{"read":["lobby"],"write":["lobby"]}`, secondSecret)
		n := 0
		for _, what := range asks("lobby") {
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
				{"in the query", withParam(what, "token="+all), nil, 200},
				{"in a cookie", what, []string{"Cookie: a=b; token=" + all}, 200},
				{"in the query beside another scheme", withParam(what, "token="+all), []string{"Authorization: Basic YTpi"}, 200},
				{"of the second secret", what, []string{"Authorization: Bearer " + second}, 200},
				{"bad as a bearer, good in a cookie", what, []string{"Authorization: Bearer x.y.z", "Cookie: token=" + all}, 401},
				{"bad in the query, good in a cookie", withParam(what, "token=x"), []string{"Cookie: token=" + all}, 401},
				{"twice in the query", withParam(what, "token="+all+"&token="+all), nil, 400},
				{"expired", withParam(what, "token="+signedToken(`{"read":["*"],"write":["*"],"exp":`+unixIn(0)+`}`)), nil, 401},
				{"not good yet", withParam(what, "token="+signedToken(`{"read":["*"],"write":["*"],"nbf":`+unixIn(time.Second)+`}`)), nil, 401},
				{"for nothing", withParam(what, "token="+signedToken(`{"sub":"ada"}`)), nil, 403},
				{"for another room", withParam(what, "token="+signedToken(`{"read":["lobby2","lob"],"write":["lobby2","lob"]}`)), nil, 403},
				{"for just this", withParam(what, "token="+reads), nil, 200},
				{"for just the other", withParam(what, "token="+signedToken(`{"read":["b*"],"write":["b*"]}`)), nil, 403},
				{"of another user", withParam(what, "user=ada&token="+signedToken(`{"sub":"bob","read":["*"],"write":["*"]}`)), nil, 403},
			} {
				if strings.Contains(what, "user=ada") { // it says so already
					tc.what = strings.Replace(tc.what, "&user=ada", "", 1)
				} else if tc.name == "of another user" && strings.HasSuffix(what, "/presence") {
					continue // to ask who is there is nobody's in particular
				}
				if got := h.status("192.0.2.1", tc.what, tc.headers...); got != tc.want {
					t.Errorf("%s with a token %s: %d, want %d", what, tc.name, got, tc.want)
				}
				if tc.want == 401 || tc.want == 403 {
					n++
				}
			}
		}
		if got := h.refusals("token"); got != n {
			t.Errorf("%d refusals are counted, want %d", got, n)
		}
		r, body := h.ask("192.0.2.1", "GET /rooms/lobby/poll", "")
		if r.Header.Get("WWW-Authenticate") != "Bearer" || !strings.Contains(body, `{"error":"this relay asks for a token`) {
			t.Errorf("without a token: %v %s", r.Header, body)
		}
		r, body = h.ask("192.0.2.1", "GET /rooms/lobby,other/poll", "", "Authorization: Bearer "+all)
		if r.StatusCode != 403 || !strings.Contains(body, `\"other\"`) || r.Header.Get("WWW-Authenticate") != "" {
			t.Errorf("with a token for one room of two: %d %s", r.StatusCode, body)
		}
	})
}

func TestWhatNeedsNoToken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := openHall(t, "-secret", firstSecret)
		for _, what := range []string{"GET /", "GET /comet.js", "GET /healthz", "HEAD /healthz"} {
			if got := h.status("192.0.2.1", what); got != 200 {
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
				if got := h.status("192.0.2.1", what, "Authorization: Bearer "+tc.token); got != tc.want {
					t.Errorf("%s %s: %d, want %d", what, tc.name, got, tc.want)
				}
			}
		}
		if got := h.status("192.0.2.1", "POST /rooms/_stats", "Authorization: Bearer "+signedToken(`{"write":["_stats","_*","*"]}`)); got != 403 {
			t.Errorf("POST /rooms/_stats with a token for it: %d; nobody publishes there, want 403", got)
		}
	})
}

func TestWithoutASecretATokenIsOfNoUse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := openHall(t)
		for _, what := range append(asks("lobby"), "GET /metrics") {
			for _, token := range []string{"", "x", signedToken(`{"sub":"bob","exp":1}`)} {
				if got := h.status("192.0.2.1", what, "Authorization: Bearer "+token, "Cookie: token="+token); got != 200 {
					t.Errorf("%s with the token %q: %d, want 200", what, token, got)
				}
			}
		}
		r, _ := h.ask("192.0.2.1", "GET /rooms/lobby/refresh?token=x", "", "Accept: text/html")
		if r.StatusCode != 200 || len(r.Cookies()) > 0 {
			t.Errorf("a page with a token in its URL: %d, cookies %v; want nothing kept", r.StatusCode, r.Cookies())
		}
	})
}

func TestTheSubOfATokenIsWhoSpeaksAndIsSeen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := openHall(t, "-secret", firstSecret)
		ada := "Authorization: Bearer " + signedToken(`{"sub":"ada","read":["*"],"write":["lobby"]}`)
		any := "Authorization: Bearer " + signedToken(`{"read":["*"],"write":["*"]}`)
		const from = "192.0.2.1"
		said := func() string {
			_, body := h.ask(from, "GET /rooms/lobby/poll?last=1&presence=0", "", any)
			_, who, _ := strings.Cut(body, `"from":`)
			who, _, _ = strings.Cut(who, ",")
			return strings.Trim(who, `"`)
		}
		for _, tc := range []struct {
			what, body, auth string
			want             string // who spoke, or a status
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
			r, _ := h.ask(from, tc.what, tc.body, tc.auth, kind)
			got := fmt.Sprint(r.StatusCode)
			if r.StatusCode == 201 {
				got = said()
			}
			if got != tc.want {
				t.Errorf("%s with %q: %q, want %q", tc.what, tc.body, got, tc.want)
			}
		}

		here := func(room string) string {
			_, body := h.ask(from, "GET /rooms/"+room+"/presence", "", any)
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
			h.ask(from, tc.what, tc.body, ada)
			if got := here("a"); got != tc.want {
				t.Errorf("after %s %s with ada's token there is %q, want %q", tc.what, tc.body, got, tc.want)
			}
		}

		// The socket speaks as ada, wherever it may.
		c, status := h.socket(from, "/rooms/lobby,b/ws?user=ada", ada)
		if status != 101 {
			t.Fatalf("ada's socket: %d", status)
		}
		defer c.CloseNow()
		hearSocket(t, c, "hello")
		for _, tc := range []struct{ frame, want string }{
			{`{"type":"message","room":"lobby","data":"hi","key":"1"}`, `"ack"`},
			{`{"type":"message","room":"b","data":"hi","key":"2"}`, "the token is not good for this room"},
			{`{"type":"message","room":"c","data":"hi","key":"3"}`, "the token is not good for this room"},
			{`{"type":"presence","room":"b","data":"away","key":"4"}`, `"ack"`},
			{`{"type":"presence","room":"_stats","data":"away","key":"5"}`, "not good"},
			{`{"type":"message","room":"lobby","from":"bob","user":"bob","data":"hi","key":"6"}`, `"ack"`},
		} {
			if got := tellSocket(t, c, tc.frame); !strings.Contains(got, tc.want) {
				t.Errorf("%s is answered %s, want %s", tc.frame, got, tc.want)
			}
		}
		if got := said(); got != "ada" {
			t.Errorf("the socket spoke as %q, want ada", got)
		}
		if got := here("b"); got != "ada:away" {
			t.Errorf("in b there is %q, want ada:away", got)
		}
	})
}

func TestAPageKeepsItsTokenInACookieAndNotInItsURL(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := openHall(t, "-secret", firstSecret)
		const from = "192.0.2.1"
		tok := signedToken(`{"sub":"ada","read":["lobby"],"write":["lobby"],"exp":` + unixIn(time.Hour) + `}`)
		for _, path := range []string{"/rooms/lobby/html", "/rooms/lobby/refresh", "/rooms/lobby/form"} {
			r, body := h.ask(from, "GET "+path+"?user=ada&token="+tok+"&last=3", "", "Accept: text/html,*/*", "X-Forwarded-Proto: https")
			where := r.Header.Get("Location")
			if r.StatusCode != 303 || where != "."+path[strings.LastIndex(path, "/"):]+"?last=3&user=ada" {
				t.Fatalf("%s with a token is answered %d, to %q", path, r.StatusCode, where)
			}
			if s := fmt.Sprint(where, body); strings.Contains(s, tok) || strings.Contains(s, "token") {
				t.Errorf("%s: the token is in what is shown: %s", path, s)
			}
			if p := r.Header.Get("Referrer-Policy"); p != "no-referrer" && p != "same-origin" || r.Header.Get("Cache-Control") != "no-store" {
				t.Errorf("%s: the redirect may be kept or told: %v", path, r.Header)
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
			next := h.open(from, "GET "+path+strings.TrimPrefix(where, "."+path[strings.LastIndex(path, "/"):]), "", "Accept: text/html", "Cookie: token="+c.Value)
			if next.StatusCode != 200 {
				t.Errorf("%s with the cookie: %d", where, next.StatusCode)
			}
			next.stop()
		}

		page := "GET /rooms/lobby/refresh?token="
		if r, _ := h.ask(from, page+tok, "", "Accept: text/html"); r.Cookies()[0].Secure {
			t.Error("over plain HTTP the cookie is Secure, and would never come back")
		}
		if r, _ := h.ask(from, page+signedToken(`{"read":["lobby"]}`), "", "Accept: text/html"); !r.Cookies()[0].Expires.IsZero() {
			t.Error("the cookie of a token without end has an end")
		}
		for _, bad := range []string{"x", signedToken(`{"exp":1,"read":["*"]}`), signedToken(`{}`)} {
			if r, _ := h.ask(from, page+bad, "", "Accept: text/html"); r.StatusCode < 400 || len(r.Cookies()) > 0 {
				t.Errorf("a bad token is answered %d and cookies %v", r.StatusCode, r.Cookies())
			}
		}
		if r := h.open(from, page+tok, "", "Accept: */*"); r.StatusCode != 200 {
			t.Errorf("a program that takes anything is sent elsewhere: %d", r.StatusCode)
		} else {
			r.stop()
		}
		for _, what := range asks("lobby") { // and what is no page sets none
			if strings.HasSuffix(what, "/html") || strings.HasSuffix(what, "/refresh") || strings.HasSuffix(what, "/form") || strings.HasSuffix(what, "/ws") {
				continue
			}
			r := h.open(from, withParam(what, "token="+tok), bodyFor(what), "Accept: text/html")
			if r.StatusCode >= 300 || len(r.Cookies()) > 0 {
				t.Errorf("%s: %d, cookies %v", what, r.StatusCode, r.Cookies())
			}
			r.stop()
		}
	})
}

func TestAFormWithTheCookiePublishesAndStaysOnItsPage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := openHall(t, "-secret", firstSecret)
		cookie := "Cookie: token=" + signedToken(`{"sub":"ada","read":["lobby"],"write":["lobby"]}`)
		_, page := h.ask("192.0.2.1", "GET /rooms/lobby/form", "", cookie)
		if !strings.Contains(page, `name="user" value="ada"`) {
			t.Errorf("the form of ada's token does not say ada:\n%s", page)
		}
		r, _ := h.ask("192.0.2.1", "POST /rooms/lobby", "user=ada&data=hi&then=form", cookie,
			"Content-Type: application/x-www-form-urlencoded", "Origin: http://"+hallHost, "Sec-Fetch-Site: same-origin")
		if where := r.Header.Get("Location"); r.StatusCode != 303 || where != "./lobby/form?user=ada" {
			t.Errorf("the form is answered %d, to %q", r.StatusCode, where)
		}
		r, _ = h.ask("192.0.2.1", "POST /rooms/lobby", "user=ada&data=hi&then=form", cookie,
			"Content-Type: application/x-www-form-urlencoded", "Origin: https://evil.example", "Sec-Fetch-Site: cross-site")
		if r.StatusCode != 403 {
			t.Errorf("the same form on a foreign page, with the cookie: %d, want 403", r.StatusCode)
		}
	})
}

// Another site of the same domain, or on another port of the same machine, may
// have set a cookie of that name.
func TestOfSeveralCookiesTheGoodOneCounts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := openHall(t, "-secret", firstSecret)
		good := "token=" + signedToken(`{"sub":"ada","read":["lobby"]}`)
		for cookies, status := range map[string]int{
			"token=another; " + good:           200,
			good + "; token=another":           200,
			"token=; " + good:                  200,
			"token=another; token=yet":         401,
			"token=another; other=" + good[6:]: 401,
		} {
			if r, body := h.ask("192.0.2.1", "GET /rooms/lobby/poll", "", "Cookie: "+cookies); r.StatusCode != status {
				t.Errorf("%s: %d %s, want %d", cookies, r.StatusCode, body, status)
			}
		}
	})
}

func TestAStreamEndsWhenItsTokenExpires(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := openHall(t, "-secret", firstSecret)
		const good = 40 * time.Second
		start := time.Now()
		auth := "Authorization: Bearer " + signedToken(`{"read":["*"],"exp":`+unixIn(good)+`}`)
		late := func() string {
			d := time.Since(start) - good
			if d < 0 || d > h.beat/15 {
				return fmt.Sprintf("it ended %v after its token", d)
			}
			return ""
		}
		var wg sync.WaitGroup
		for _, tech := range techniques {
			if tech.hold != forever || tech.name == "ws" {
				continue
			}
			wg.Go(func() {
				r := h.open("192.0.2.1", "GET /rooms/lobby/"+tech.name, "", auth)
				defer r.stop()
				body := r.rest() // and it ends as an answer should
				bye := `"type":"bye","data":{"retry":`
				if tech.name == "html" {
					bye = "this page will come again"
				}
				if wrong := late(); wrong != "" || strings.Count(body, bye) != 1 {
					t.Errorf("%s: %s, and said\n%s", tech.name, wrong, body)
				}
			})
		}
		wg.Go(func() {
			c, _ := h.socket("192.0.2.1", "/rooms/lobby/ws", auth)
			defer c.CloseNow()
			hearSocket(t, c, `"type":"bye","data":{"retry":`)
			_, _, err := c.Read(context.Background())
			if wrong := late(); wrong != "" || websocket.CloseStatus(err) != websocket.StatusPolicyViolation {
				t.Errorf("ws: %s, with %v, want the code 1008", wrong, err)
			}
		})
		for _, what := range []string{"longpoll?wait=55", "jsonp?wait=55&callback=f"} {
			wg.Go(func() {
				r, body := h.ask("192.0.2.1", "GET /rooms/lobby/"+what, "", auth)
				if d := time.Since(start); r.StatusCode != 200 || d != good || !strings.Contains(body, `"events":[]`) {
					t.Errorf("%s: after %v %d %s; want an empty answer as the token expires", what, d, r.StatusCode, body)
				}
			})
		}
		wg.Wait()
		time.Sleep(time.Second)
		if n := h.held.Load(); n != 0 {
			t.Errorf("%d streams are held", n)
		}
		if got := h.status("192.0.2.1", "GET /rooms/lobby/sse", auth); got != 401 {
			t.Errorf("coming back with it: %d, want 401", got)
		}
	})
}

func TestOverHTTP2AStreamEndsWhenItsTokenExpires(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := openHall(t, "-secret", firstSecret, "-h2c")
		start := time.Now()
		get := hallH2(h)
		resp := get("/rooms/lobby/sse?token=" + signedToken(`{"read":["*"],"exp":`+unixIn(40*time.Second)+`}`))
		b, err := io.ReadAll(resp.Body)
		if d := time.Since(start); err != nil || d != 40*time.Second || !strings.Contains(string(b), "event: bye") {
			t.Errorf("after %v %v, and said\n%s", d, err, b)
		}
	})
}

// hallH2 asks by HTTP/2 without TLS.
func hallH2(h *hall) func(path string) *http.Response {
	tr := &http.Transport{DialContext: func(context.Context, string, string) (net.Conn, error) { return h.dial("192.0.2.1") }}
	tr.Protocols = new(http.Protocols)
	tr.Protocols.SetUnencryptedHTTP2(true)
	h.clients["h2"] = tr
	return func(path string) *http.Response {
		resp, err := tr.RoundTrip(httptest.NewRequest("GET", "http://"+hallHost+path, nil).WithContext(context.Background()))
		if err != nil {
			h.t.Fatal(err)
		}
		return resp
	}
}

// syncedLog is a log that may be written by many.
type syncedLog struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *syncedLog) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(b)
}

func (l *syncedLog) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func TestNoTokenAndNoSecretIsInALogOrAnAnswer(t *testing.T) {
	var log syncedLog
	before := slog.Default()
	defer slog.SetDefault(before)
	slog.SetDefault(slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug})))
	synctest.Test(t, func(t *testing.T) {
		h := openHall(t, "-secret", "a2b4,"+firstSecret, "-streams", "2")
		var marks []string // none of these may be seen
		mint := func(claims string) string {
			tok := signedToken(claims)
			marks = append(marks, tok, tok[strings.LastIndexByte(tok, '.')+1:])
			return tok
		}
		marks = append(marks, "a2b4", firstSecret)
		good := mint(`{"sub":"ada","read":["*"],"write":["*"],"exp":` + unixIn(time.Hour) + `}`)
		tokens := []string{
			good, mint(`{"exp":1}`), mint(`{"nbf":` + unixIn(time.Hour) + `}`), mint(`{"sub":"bob"}`), mint(`{"sub":7}`),
			minted(`{"alg":"none"}`, `{"sub":"none-none"}`, ""), "not-a-token-at-all", good + ".extra.parts",
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
			for _, what := range append(asks("lobby"), "GET /metrics", "GET /nothing", "PUT /rooms/lobby", "GET /rooms/l%zzy/sse",
				"GET /rooms/lobby/nothing", "GET /rooms/lobby/sse?after=x", "POST /rooms/lobby?type=hello", "GET /rooms/lobby/poll?a=%zz") {
				for _, headers := range [][]string{{"Authorization: Bearer " + tok}, {"Cookie: token=" + tok}, {"Authorization: " + tok}} {
					if strings.Contains(what, "/ws") {
						h.status("192.0.2.1", what, headers...)
						continue
					}
					if strings.Contains(what, "%zzy") { // net/http does not send it
						continue
					}
					r := h.open("192.0.2.1", withParam(what, "token="+tok), bodyFor(what), append(headers, "Accept: text/html")...)
					if !strings.HasPrefix(r.Header.Get("Set-Cookie"), "token=") {
						clean(what, fmt.Sprint(r.Header))
					}
					if r.StatusCode != 200 {
						clean(what, r.rest())
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
				c, err := h.dial("192.0.2.1")
				if err != nil {
					t.Fatal(err)
				}
				go io.WriteString(c, raw)
				c.SetReadDeadline(time.Now().Add(time.Second))
				b, _ := io.ReadAll(c)
				clean(raw, string(b))
				c.Close()
			}
		}
		h.close()
		clean("the log", log.String())
	})
	if !strings.Contains(log.String(), "msg=stopped") {
		t.Errorf("this is not the log:\n%s", log.String())
	}
}

// Origins.

func TestWhosePagesMayAsk(t *testing.T) {
	const (
		own, ownTLS  = "http://" + hallHost, "https://" + hallHost
		listed, evil = "https://ok.example", "https://evil.example"
	)
	synctest.Test(t, func(t *testing.T) {
		for _, secret := range []string{"", firstSecret} {
			h := openHall(t, "-origins", listed, "-secret", secret)
			cookies := []string{""}
			if secret != "" {
				cookies = append(cookies, signedToken(`{"read":["*"],"write":["*"]}`))
			}
			n, refused := 0, 0
			for _, what := range asks("lobby") {
				for _, origin := range []string{"", own, ownTLS, listed, evil, "null", "http://ok.example", listed + ".evil.example"} {
					for _, site := range []string{"", "none", "same-origin", "same-site", "cross-site"} {
						for _, referer := range []string{"", listed + "/page", evil + "/page"} {
							if origin != "" && referer != "" {
								continue // it does not count then
							}
							for _, cookie := range cookies {
								// The rule. The browser's own word counts first; without it the Origin.
								// A page of another origin has to be listed, by its Origin, or where a
								// browser sends none, on reading, by its Referer.
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
									if got := h.status("192.0.2.1", what, headers...); got != want {
										t.Errorf("%s %q: %d, want %d", what, headers, got, want)
									}
									continue
								}
								r := h.open("192.0.2.1", what, bodyFor(what), headers...)
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
			if got := h.refusals("origin"); got != refused {
				t.Errorf("%d refusals are counted, want %d", got, refused)
			}
			t.Logf("%d requests, %d of them refused for their origin", n, refused)
			h.close()
		}
	})
}

func TestASocketIsJudgedAsAllElse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := openHall(t)
		// A proxy that gives the relay another Host (nginx does, unless told); the browser says it is the same origin.
		headers := []string{"Host: 10.0.0.1:8080", "Origin: https://" + hallHost, "Sec-Fetch-Site: same-origin"}
		for _, what := range asks("lobby") {
			if got := h.status("192.0.2.1", what, headers...); got != 200 {
				t.Errorf("%s behind a proxy that sets the Host: %d, want 200", what, got)
			}
		}
	})
}

func TestALinkToAPageMayBeFollowedAndAFrameOfItNot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := openHall(t)
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
			for _, what := range asks("lobby") {
				want := tc.want
				if !strings.HasPrefix(what, "GET ") || strings.HasSuffix(what, "/ws") {
					want = 403 // nobody navigates to these
				}
				if strings.HasSuffix(what, "/ws") && tc.dest == "document" {
					continue
				}
				if tc.dest == "document" && want == 200 { // over plain HTTP, where nothing says so but what is taken
					if got := h.status("192.0.2.1", what, "Accept: text/html,*/*;q=0.8", "Referer: https://evil.example/"); got != want {
						t.Errorf("%s, a link on a foreign page: %d, want %d", what, got, want)
					}
				}
				got := h.status("192.0.2.1", what, "Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: "+tc.mode, "Sec-Fetch-Dest: "+tc.dest, "Referer: https://evil.example/")
				if got != want {
					t.Errorf("%s from a foreign page, as %s %s: %d, want %d", what, tc.mode, tc.dest, got, want)
				}
			}
		}
	})
}

func TestWithAStarAllPagesMayAskButBringNoCookies(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := openHall(t, "-origins", "*")
		for _, what := range asks("lobby") {
			for _, origin := range []string{"https://evil.example", "null"} {
				headers := []string{"Origin: " + origin, "Sec-Fetch-Site: cross-site"}
				if got := h.status("192.0.2.1", what, headers...); got != 200 {
					t.Errorf("%s of %s: %d, want 200", what, origin, got)
				}
				if strings.Contains(what, "/ws") {
					continue
				}
				r := h.open("192.0.2.1", what, bodyFor(what), headers...)
				r.stop()
				if a, c := r.Header.Get("Access-Control-Allow-Origin"), r.Header.Get("Access-Control-Allow-Credentials"); a != origin || c != "" {
					t.Errorf("%s of %s: allowed are %q, credentials %q", what, origin, a, c)
				}
			}
		}
	})
}

func TestAPreflightIsAnsweredForThoseListed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := openHall(t, "-origins", "https://ok.example", "-secret", firstSecret)
		for _, what := range []string{"/rooms/lobby", "/rooms/lobby/sse", "/rooms/lobby/presence", "/rooms/lobby/poll"} {
			for origin, ok := range map[string]bool{"https://ok.example": true, "https://evil.example": false, "null": false} {
				r, body := h.ask("192.0.2.1", "OPTIONS "+what, "", "Origin: "+origin, "Sec-Fetch-Site: cross-site",
					"Access-Control-Request-Method: POST", "Access-Control-Request-Headers: authorization")
				allowed := r.Header.Get("Access-Control-Allow-Origin") == origin && strings.Contains(r.Header.Get("Access-Control-Allow-Headers"), "Authorization")
				if r.StatusCode != 204 || body != "" || allowed != ok || !ok && r.Header.Get("Access-Control-Allow-Headers") != "" {
					t.Errorf("OPTIONS %s of %s: %d %v, want it allowed: %v", what, origin, r.StatusCode, r.Header, ok)
				}
			}
		}
	})
}

func TestEveryPageHasAPolicyWithoutUnsafeInline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		// A file of ours, or the markup of the chat, which no browser runs.
		ours := regexp.MustCompile(`^<script (type="module" src="[a-z]+\.js"|type="text/html" id="markup")>$`)
		h := openHall(t, "-origins", "https://ok.example")
		h.ask("192.0.2.1", "POST /rooms/lobby?user=%3Cscript%3E", `<script>alert(1)</script><img onerror=x>" onload="x`)
		inline := regexp.MustCompile(`(?i)<script(?:>| [^>]*>)|<style|\son[a-z]+\s*=\s*"|\sstyle\s*=\s*"|javascript:`)
		pages := []string{"/rooms/lobby/html?last=9", "/rooms/lobby/refresh?last=9", "/rooms/lobby/form", "/rooms/lobby/form?live=refresh",
			"/rooms/lobby/iframe?last=9", "/rooms/lobby/multipart?as=html&last=9"}
		for name := range files {
			if strings.HasSuffix(name, ".html") || name == "/" {
				pages = append(pages, name)
			}
		}
		for _, page := range pages {
			r := h.open("192.0.2.1", "GET "+page, "")
			b := make([]byte, 64<<10)
			time.Sleep(time.Second) // all that is due has come
			n, _ := io.ReadAtLeast(r.r, b, 200)
			text := string(b[:n])
			policy := r.Header.Get("Content-Security-Policy")
			r.stop()
			for _, wrong := range []string{"unsafe-", "script-src *", "data:", "https:"} {
				if strings.Contains(strings.ReplaceAll(policy, "https://ok.example", ""), wrong) {
					t.Errorf("%s: the policy allows %s: %s", page, wrong, policy)
				}
			}
			if !strings.HasPrefix(policy, "default-src 'none'") && !strings.HasPrefix(policy, "default-src 'self'") && !strings.Contains(page, "multipart") {
				t.Errorf("%s: the policy is %q", page, policy)
			}
			for _, directive := range []string{"base-uri 'none'", "frame-ancestors "} {
				if !strings.Contains(policy, directive) && !strings.Contains(page, "multipart") {
					t.Errorf("%s: the policy has no %s: %s", page, directive, policy)
				}
			}
			nonce := ""
			if _, rest, ok := strings.Cut(policy, "'nonce-"); ok {
				nonce, _, _ = strings.Cut(rest, "'")
			}
			for _, found := range inline.FindAllString(text, -1) {
				if !(nonce != "" && found == `<script nonce="`+nonce+`">`) && !ours.MatchString(found) {
					t.Errorf("%s: %q is in the page, and its policy is %s", page, found, policy)
				}
			}
		}
		one, two := h.open("192.0.2.1", "GET /rooms/lobby/iframe", ""), h.open("192.0.2.1", "GET /rooms/lobby/iframe", "")
		if one.Header.Get("Content-Security-Policy") == two.Header.Get("Content-Security-Policy") {
			t.Error("two frames have one nonce")
		}
		one.stop()
		two.stop()
	})
}

func TestOnlyThoseListedMayFrameAPage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for origins, want := range map[string]string{"": "'self'", "https://a.example, https://b.example": "'self' https://a.example https://b.example", "*": "*"} {
			h := openHall(t, "-origins", origins)
			for _, page := range []string{"html", "refresh", "form", "iframe"} {
				r := h.open("192.0.2.1", "GET /rooms/lobby/"+page, "")
				r.stop()
				policy := r.Header.Get("Content-Security-Policy")
				_, got, _ := strings.Cut(policy, "frame-ancestors ")
				if got, _, _ = strings.Cut(got, ";"); got != want {
					t.Errorf("with -origins %q who may frame %s is %q, want %q", origins, page, got, want)
				}
			}
			h.close()
		}
	})
}

func TestTheForeverFrameTellsOnlyThePageThatMayRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := openHall(t, "-origins", "https://ok.example")
		for referer, want := range map[string]string{"": "location.origin", "https://ok.example/x": `"https://ok.example"`} {
			site := "same-origin"
			if referer != "" {
				site = "cross-site"
			}
			r := h.open("192.0.2.1", "GET /rooms/lobby/iframe", "", "Referer: "+referer, "Sec-Fetch-Site: "+site, "Sec-Fetch-Mode: navigate", "Sec-Fetch-Dest: iframe")
			if line := r.until("postMessage"); !strings.Contains(line, "postMessage(event, "+want+")") {
				t.Errorf("asked for by %q it is %s", referer, line)
			}
			r.stop()
		}
	})
}

func FuzzAToken(f *testing.F) {
	secrets := [][]byte{[]byte(firstSecret), []byte(secondSecret)}
	hs := `{"alg":"HS256","typ":"JWT"}`
	for _, seed := range []string{
		"", ".", "..", "...", minted(hs, `{}`, firstSecret), minted(hs, `{"sub":"ada","exp":946684801,"read":["*"],"write":["a*"]}`, secondSecret),
		minted(hs, `{"exp":1e400}`, firstSecret), minted(`{"alg":"none"}`, `{}`, firstSecret), minted(`{"Alg":"HS256"}`, `{"EXP":1}`, firstSecret),
		minted(hs, `null`, firstSecret), minted(`null`, `null`, firstSecret), minted(`[]`, `[]`, firstSecret), minted(hs, `{"sub":"\ud800"}`, firstSecret),
		"eyJhbGciOiJIUzI1NiJ9.eyJ3cml0ZSI6WyJhLmI6Yy0qIl19.aFPZqmyNcUBOTb_YL6XTDOiCOgdFeiB41194QcLAYEA",
	} {
		f.Add(seed, "")
	}
	f.Add(hs, `{"sub":"ada","read":["lobby"]}`)
	f.Add(`{"alg":"HS256","crit":["x"]}`, `{"exp":null,"nbf":-1}`)
	f.Fuzz(func(t *testing.T, head, claims string) {
		now := time.Unix(946684800, 0)
		// Either what came is a token, or we sign it; else no luck would ever sign one.
		tokens := []string{head, minted(head, claims, firstSecret)}
		for i, tok := range tokens {
			c, err := verify(tok, secrets, now)
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
				t.Fatalf("%q is good", tok)
			}
			signed := false
			for _, s := range secrets {
				h := hmac.New(sha256.New, s)
				h.Write([]byte(parts[0] + "." + parts[1]))
				signed = signed || base64.RawURLEncoding.EncodeToString(h.Sum(nil)) == parts[2]
			}
			alg, _ := base64.RawURLEncoding.DecodeString(parts[0])
			if !signed || !bytes.Contains(alg, []byte("256")) && !bytes.Contains(alg, []byte(`\u`)) {
				t.Fatalf("%q is good, and is not signed", tok)
			}
			if c.until() <= now.UnixNano() || c.Nbf > 946684800 || !validUser(c.Sub) {
				t.Fatalf("%q is good, and says %+v", tok, *c)
			}
			if i == 0 { // whatever is changed in it, it is not good any more
				for _, at := range []int{0, len(tok) / 2, len(tok) - 1} {
					b := []byte(tok)
					b[at] ^= 1
					if _, err := verify(string(b), secrets, now); err == nil {
						t.Errorf("%q is good too", b)
					}
				}
			}
			for _, room := range append(slices.Clone(c.Read), "lobby", "_stats") {
				if validName(room) && room[0] == '_' && matches([]string{"*"}, room) {
					t.Errorf("* covers %s", room)
				}
			}
		}
	})
}

// Names in a token are what they are, not what they look like.
func TestAClaimInCapitalsIsNone(t *testing.T) {
	c, err := verify(signedToken(`{"SUB":"ada","READ":["*"],"Write":["lobby"]}`), [][]byte{[]byte(firstSecret)}, time.Now())
	if err != nil || c.Sub != "" || c.may("lobby", false) || c.may("lobby", true) {
		t.Errorf("%v %+v, want a token that is good for nothing", err, c)
	}
}

// An operator's token names _stats; without tokens an operator is at the machine itself.
func TestWhoIsAnOperator(t *testing.T) {
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
			h := openHall(t, "-secret", tc.secret)
			h.relay.publish(post{room: "lobby", kind: "message", data: []byte(`"hi"`)})
			headers := tc.headers
			if !slices.ContainsFunc(headers, func(line string) bool { return strings.HasPrefix(line, "Host: ") }) {
				headers = append([]string{"Host: localhost"}, headers...)
			}
			list, _ := h.ask(tc.from, "GET /rooms", "", headers...)
			erase, body := h.ask(tc.from, "DELETE /rooms/lobby", "", headers...)
			if list.StatusCode != tc.list || erase.StatusCode != tc.erase {
				t.Errorf("%q from %s: %d and %d %s, want %d and %d", tc.headers, tc.from, list.StatusCode, erase.StatusCode, body, tc.list, tc.erase)
			}
			if left := h.relay.rooms["lobby"] != nil; left != (tc.erase != 204) {
				t.Errorf("%q from %s: the room is there: %v", tc.headers, tc.from, left)
			}
		})
	}
}

// An operator sees which rooms there are, and can erase one.
func TestRoomsAreListedAndErased(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := openHall(t)
		const here, local = "127.0.0.1", "Host: 127.0.0.1:8080"
		list := func(query string) string {
			_, body := h.ask(here, "GET /rooms"+query, "", local)
			return body
		}
		if got := list(""); got != `{"more":false,"rooms":[]}`+"\n" {
			t.Errorf("of a relay without rooms: %s", got)
		}
		start := h.relay.start
		h.relay.publish(post{room: "a", kind: "message", data: []byte(`"one"`)})
		time.Sleep(time.Second)
		h.relay.publish(post{room: "b", kind: "message", data: []byte(`"two"`)})
		time.Sleep(time.Second)
		h.relay.publish(post{room: "a", kind: "typing", data: []byte(`true`), ttl: time.Minute})
		watcher := h.open(here, "GET /rooms/b,c/stream?user=ada", "")
		picture := h.open(here, "GET /rooms/a/multipart?as=svg", "")
		synctest.Wait()
		var got struct {
			Rooms []roomInfo
			More  bool
		}
		json.Unmarshal([]byte(list("")), &got)
		for i := range got.Rooms {
			if got.Rooms[i].Bytes < eventBytes {
				t.Errorf("%+v", got.Rooms[i])
			}
			got.Rooms[i].Bytes = 0
		}
		ms := start / 1000
		if want := []roomInfo{{"c", 1, 1, 0, 0, 0, ms + 2000}, {"b", 1, 1, 1, 0, start + 2, ms + 2000}, {"a", 1, 0, 1, 0, start + 1, ms + 2000}}; !slices.Equal(got.Rooms, want) {
			t.Errorf("%+v\nwant %+v", got.Rooms, want)
		}
		if got := list("?prefix=b"); !strings.Contains(got, `"b"`) || strings.Contains(got, `"a"`) {
			t.Errorf("those that begin with b: %s", got)
		}
		if r, body := h.ask(here, "GET /rooms?prefix=a&prefix=b", "", local); r.StatusCode != 400 {
			t.Errorf("%d %s", r.StatusCode, body)
		}
		for _, room := range []string{"b", "nobody", "b"} {
			if r, body := h.ask(here, "DELETE /rooms/"+room, "", local); r.StatusCode != 204 || body != "" {
				t.Errorf("%s is erased: %d %s", room, r.StatusCode, body)
			}
		}
		for path, status := range map[string]int{"/rooms/a,b": 400, "/rooms/_stats": 403, "/rooms/no%20name": 400, "/rooms/a/poll": 405} {
			if r, _ := h.ask(here, "DELETE "+path, "", local); r.StatusCode != status {
				t.Errorf("DELETE %s: %d, want %d", path, r.StatusCode, status)
			}
		}
		if got := list("?prefix=b"); !strings.Contains(got, `"messages":0`) || !strings.Contains(got, `"newest":0`) || !strings.Contains(got, `"users":1`) {
			t.Errorf("of an erased room: %s", got)
		}
		if r, _ := h.ask(here, "POST /rooms/b?if=0", "first again"); r.StatusCode != 201 {
			t.Errorf("publish to it as to a new one: %d", r.StatusCode)
		}
		watcher.stop()
		picture.stop()
		for i := range maxListed {
			h.relay.publish(post{room: fmt.Sprint("x", i), kind: "message", data: []byte(`1`)})
		}
		if got := list(""); strings.Count(got, `"room":`) != maxListed || !strings.HasPrefix(got, `{"more":true,"rooms":[{"room":"x999",`) {
			t.Errorf("of many: %d, %.60s", strings.Count(got, `"room":`), got)
		}
	})
}

// A page of ours with a good token in its URL keeps it as html does; and can
// ask what its token, which no script sees, is good for.
func TestAPagesTokenAndWhatItIsGoodFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := openHall(t, "-secret", firstSecret)
		const from, html = "192.0.2.1", "Accept: text/html"
		exp := unixIn(time.Hour)
		tok := signedToken(`{"sub":"ada","read":["lobby"],"exp":` + exp + `}`)
		for path, want := range map[string]string{"/?token=" + tok: "./", "/?room=x&token=" + tok: "./?room=x", "/stats.html?token=" + tok: "./stats.html"} {
			r, _ := h.ask(from, "GET "+path, "", html)
			if where, cookie := r.Header.Get("Location"), r.Header.Get("Set-Cookie"); r.StatusCode != 303 || where != want || !strings.Contains(cookie, "token="+tok+"; Path=/;") || !strings.Contains(cookie, "HttpOnly") {
				t.Errorf("%s: %d %q %q, want 303 %q", path, r.StatusCode, where, cookie, want)
			}
		}
		for _, path := range []string{"/?token=x", "/?token=", "/?token=x&token=y"} {
			if r, _ := h.ask(from, "GET "+path, "", html); r.StatusCode != 200 || r.Header.Get("Set-Cookie") != "" {
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
			r, body := h.ask(from, "GET /token"+tc.query, "", tc.auth)
			if r.StatusCode != tc.status || tc.want != "" && body != tc.want+"\n" || !strings.Contains(r.Header.Get("Cache-Control"), "no-store") {
				t.Errorf("%s: %d %s, want %d %s", tc.query, r.StatusCode, body, tc.status, tc.want)
			}
		}
	})
	synctest.Test(t, func(t *testing.T) {
		h := openHall(t)
		if r, body := h.ask("192.0.2.1", "GET /token?room=lobby&token=x", ""); r.StatusCode != 200 || body != `{"read":true,"required":false,"write":true}`+"\n" {
			t.Errorf("of an open relay: %d %s", r.StatusCode, body)
		}
		if r, _ := h.ask("192.0.2.1", "GET /?token=x", "", "Accept: text/html"); r.StatusCode != 200 {
			t.Errorf("a token that nobody asked for: %d", r.StatusCode)
		}
	})
}
