//go:build linux

// Real proxies in front of a real relay, with the configurations in deploy/, most
// of them in several routes, all techniques by each. What does not come through is
// named here, with what comet.js takes instead.

package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"html"
	"io"
	"net"
	"net/http"
	"net/http/cookiejar"
	"net/url"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/coder/websocket"
)

const (
	proxyIdle = 3 * time.Second // what the proxies wait for a word of the relay
	proxyBeat = time.Second     // and how often it speaks
	promptly  = time.Second     // what is held back is so for longer
)

// A route is one address of a proxy.
type route struct {
	name        string
	path        string            // below which the relay is
	lost        map[string]string // techniques that don't come through, and why
	hidesHost   bool              // the relay is not told the Host that was asked for
	lateNotice  bool              // that a client has left shows only when the proxy next writes to it
	unmarked    bool              // nothing tells the relay that it is not its own machine that asks
	direct      bool              // there is no proxy
	hidesClient bool              // the relay is not told the client's address, so it must not run with -trust-proxy
}

var (
	noUpgrade = map[string]string{"ws": "HTTP/2 to the relay has no Upgrade"}
	heldBack  = map[string]string{"multipart": old, "html": old, "iframe": old, "stream": old, "sse": old}

	unstreamed = map[string]string{"multipart": whole, "html": whole, "iframe": whole, "stream": whole, "sse": whole, "ws": "lighttpd drops Upgrade unless told"}
)

const (
	old   = "Caddy 2.6 does not flush what it compresses"
	whole = "lighttpd waits for the end of an answer unless told"
)

// A proxy is a program, and what there is of it in deploy/. What args and the
// configuration say of ports and of 60 seconds is replaced.
type proxy struct {
	program, debian, config string
	args                    func(dir, config string) []string
	routes                  []route // at 127.0.0.1:8081 and so on
}

var proxies = []proxy{
	{"nginx", "nginx", "nginx.conf",
		func(dir, config string) []string { return []string{"-p", dir, "-c", config, "-g", "daemon off;"} },
		[]route{{name: "plain"}, {name: "gzip"}, {name: "one line", hidesHost: true, unmarked: true, lost: map[string]string{"ws": "nginx drops Upgrade unless told"}}, {name: "below a path", path: "/my%20relay"}}},
	{"haproxy", "haproxy", "haproxy.cfg",
		func(_, config string) []string { return []string{"-db", "-f", config} },
		[]route{{name: "plain"}, {name: "gzip"}, {name: "h2", lost: noUpgrade}}},
	{"caddy", "caddy", "Caddyfile",
		func(_, config string) []string {
			return []string{"run", "--adapter", "caddyfile", "--config", config}
		},
		[]route{{name: "plain"}, {name: "gzip"}, {name: "gzip all", lost: heldBack}, {name: "h2c", lost: noUpgrade}}},
	{"apache2", "apache2", "apache.conf",
		func(dir, config string) []string { return []string{"-d", dir, "-f", config, "-D", "FOREGROUND"} },
		[]route{{name: "plain", lateNotice: true}, {name: "gzip", lateNotice: true}, {name: "one line", hidesHost: true, lateNotice: true, lost: map[string]string{"ws": "Apache drops Upgrade unless told"}}}},
	{"lighttpd", "lighttpd", "lighttpd.conf",
		func(_, config string) []string { return []string{"-D", "-f", config} },
		[]route{{name: "plain", lateNotice: true}, {name: "one line", lateNotice: true, lost: unstreamed}}},
	{"varnishd", "varnish", "varnish.vcl",
		func(dir, config string) []string {
			return []string{"-F", "-n", filepath.Join(dir, "varnish"), "-a", "127.0.0.1:8081", "-f", config, "-p", "pipe_timeout=60"}
		},
		[]route{{name: "plain"}}},
	{"squid", "squid", "squid.conf",
		func(_, config string) []string { return []string{"-N", "-d", "1", "-f", config} },
		[]route{{name: "plain"}}},
	{"tinyproxy", "tinyproxy", "tinyproxy.conf",
		func(_, config string) []string { return []string{"-d", "-c", config} },
		[]route{{name: "plain", hidesHost: true, lateNotice: true, hidesClient: true, lost: map[string]string{"ws": "tinyproxy drops Upgrade"}}}},
}

// freePorts finds addresses that nobody listens on.
func freePorts(t *testing.T, n int) (all []string) {
	for range n {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close() // not before all are found, or one could be found twice
		all = append(all, l.Addr().String())
	}
	return all
}

// startProxy starts a proxy with its file of deploy/ in front of the relay,
// as a user without privileges, and returns the URLs of its routes.
func startProxy(t *testing.T, p proxy, relay string) (urls []string) {
	t.Helper()
	path, err := exec.LookPath(p.program)
	if err != nil {
		path, err = exec.LookPath("/usr/sbin/" + p.program) // of which not everybody's PATH knows
	}
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatalf("%s is not installed, and CI has to have it: apt-get install %s", p.program, p.debian)
		}
		t.Skipf("%s is not installed: apt-get install %s", p.program, p.debian)
	}
	dir, err := os.MkdirTemp("", "cometes-proxy")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	b, err := os.ReadFile(filepath.Join("../deploy", p.config))
	if err != nil {
		t.Fatal(err)
	}
	written, config := string(b), filepath.Join(dir, p.config)
	command := p.args(dir, config)
	all := written + strings.Join(command, " ")
	_, port, _ := net.SplitHostPort(relay)
	instead := map[string]string{"8080": port, "60": strconv.Itoa(int(proxyIdle.Seconds())), "60s": proxyIdle.String()}
	for i, addr := range freePorts(t, len(p.routes)) {
		written := strconv.Itoa(8081 + i)
		if !strings.Contains(all, written) {
			t.Fatalf("%s does not listen on %s", p.config, written)
		}
		_, instead[written], _ = net.SplitHostPort(addr)
		urls = append(urls, "http://"+addr+p.routes[i].path)
	}
	if !strings.Contains(all, "60") {
		t.Fatalf("%s has no 60 to make %v of", p.config, proxyIdle)
	}
	replace := func(text string) string {
		return regexp.MustCompile(`\b(808\d|60s?)\b`).ReplaceAllStringFunc(text, func(s string) string { return cmp.Or(instead[s], s) })
	}
	for i, arg := range command {
		if !strings.HasPrefix(arg, dir) {
			command[i] = replace(arg)
		}
	}
	if err := os.WriteFile(config, []byte(replace(written)), 0o644); err != nil {
		t.Fatal(err)
	}

	cmd := exec.Command(path, command...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "HOME="+dir, "XDG_CONFIG_HOME="+dir, "XDG_DATA_HOME="+dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if os.Getuid() == 0 {
		const nobody = 65534
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: nobody, Gid: nobody}
		for _, name := range []string{dir, config} {
			if err := os.Chown(name, nobody, nobody); err != nil {
				t.Fatal(err)
			}
		}
	}
	log := &syncedLog{}
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Signal(syscall.SIGTERM)
		kill := time.AfterFunc(10*time.Second, func() {
			t.Errorf("%s does not stop when told to", p.program)
			syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) // and the processes it started
		})
		defer kill.Stop()
		cmd.Wait()
		if t.Failed() {
			t.Logf("%s said:\n%.4000s", p.program, log)
			if b, err := os.ReadFile(filepath.Join(dir, "error.log")); err == nil {
				t.Logf("and in its error.log:\n%.4000s", b)
			}
		}
	})
	for _, url := range urls {
		eventually(t, 10*time.Second, p.program+" answers at "+url, func() bool {
			resp, err := http.Get(url + "/healthz")
			if err != nil {
				return false
			}
			resp.Body.Close()
			return resp.StatusCode == 200
		})
	}
	return urls
}

func TestEveryTechniqueComesThroughRealProxies(t *testing.T) {
	if testing.Short() {
		t.Skip("takes 20 s")
	}
	var all parallel
	defer all.Wait()
	for _, p := range proxies {
		all.run(t, p.program, func(t *testing.T) {
			trust := fmt.Sprintf("-trust-proxy=%t", !p.routes[0].hidesClient)
			c := startRelay(t, []string{"FLY_APP_NAME=cometes"}, "-h2c", trust, "-rate", "1", "-beat", proxyBeat.String())
			for i, url := range startProxy(t, p, c.addr) {
				w := p.routes[i]
				client := &http.Client{Transport: &http.Transport{}} // asks for gzip
				t.Run(w.name, func(t *testing.T) { tryAll(t, c, w, url, client) })
			}
		})
	}
	all.run(t, "h2c", func(t *testing.T) {
		c := startRelay(t, nil, "-h2c", "-beat", proxyBeat.String())
		tr := &http.Transport{Protocols: new(http.Protocols)}
		tr.Protocols.SetUnencryptedHTTP2(true)
		tryAll(t, c, route{name: "h2c", direct: true, unmarked: true, lost: noUpgrade}, "http://"+c.addr, &http.Client{Transport: tr})
	})
}

// parallel runs tests at the same time, however few processors there are: they
// mostly wait.
type parallel struct{ sync.WaitGroup }

func (all *parallel) run(t *testing.T, name string, do func(t *testing.T)) {
	all.Go(func() { t.Run(name, do) })
}

// tryAll checks all techniques on one route, at the same time.
func tryAll(t *testing.T, c *child, way route, base string, client *http.Client) {
	var all parallel
	for _, tech := range techniques {
		all.run(t, tech.name, func(t *testing.T) {
			tt := &techniqueTest{t: t, c: c, base: base, client: client, tech: tech, lateNotice: way.lateNotice, room: strings.ReplaceAll(way.name, " ", "-") + "." + tech.name}
			switch {
			case way.lost[tech.name] != "":
				tt.checkLost()
			case tech.mode == "streaming":
				tt.checkStream()
			case tech.mode == "longPoll":
				tt.checkLongPoll()
			default:
				tt.checkPoll()
			}
		})
	}
	all.Wait()

	// What is lost is not missed: comet.js goes on to one that came through.
	js, err := os.ReadFile("../static/comet.js")
	if err != nil {
		t.Fatal(err)
	}
	order := regexp.MustCompile(`\bvia = \[([^\]]*)\]`).FindSubmatch(js)
	if order == nil {
		t.Fatal("comet.js does not say in which order it tries")
	}
	list := regexp.MustCompile(`\w+`).FindAllString(string(order[1]), -1)
	i := slices.IndexFunc(list, func(name string) bool { return way.lost[name] == "" })
	if i < 0 {
		t.Fatalf("comet.js tries %q, and all of them are lost", list)
	}
	t.Logf("comet.js tries %q, and has %s", list, list[i])

	// Who comes through a proxy is no operator.
	resp, err := client.Get(base + "/rooms")
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if lists := resp.StatusCode == 200; lists != way.direct {
		t.Errorf("asked for the rooms: %s", resp.Status)
	}

	// Pages of the relay's own may publish; and nobody says for themselves who they are.
	publish := func(header, value string) int {
		r, _ := http.NewRequest("POST", base+"/rooms/all", strings.NewReader("hi"))
		r.Header.Set("Idempotency-Key", rand.Text()) // see techniqueTest.publish
		r.Header.Set(header, value)
		resp, err := client.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		return resp.StatusCode
	}
	want := 201
	if way.hidesHost {
		want = 403
	}
	if got := publish("Origin", strings.TrimSuffix(base, way.path)); got != want {
		t.Errorf("a publish of an own page: %d, want %d", got, want)
	}
	if way.unmarked {
		return // what is said of the client comes from the client
	}
	for range 4 { // more than -rate, for any but the machine itself
		for _, header := range []string{"Fly-Client-IP", "X-Forwarded-For"} {
			if got := publish(header, "203.0.113.9"); got != 201 {
				t.Errorf("a publish that says in %s where it is from: %d", header, got)
			}
		}
	}
	refusedUpgrade(t, base)
}

// A techniqueTest checks one technique on one route.
type techniqueTest struct {
	t          *testing.T
	c          *child
	base, room string
	client     *http.Client
	tech       technique
	lateNotice bool
}

func (tt *techniqueTest) url(query string) string {
	return tt.base + "/rooms/" + tt.room + "/" + tt.tech.name + query
}

func (tt *techniqueTest) publish(text string) {
	tt.t.Helper()
	r, _ := http.NewRequest("POST", tt.base+"/rooms/"+tt.room, strings.NewReader(text))
	r.Header.Set("Idempotency-Key", rand.Text()) // with it net/http asks again if a proxy closes an idle connection unannounced
	resp, err := tt.client.Do(r)
	if err != nil {
		tt.t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != 201 {
		tt.t.Fatalf("publishing: %s", resp.Status)
	}
}

// open makes a request. It returns what was received so far, a channel that has a value
// when the answer has ended, and how to leave.
func (tt *techniqueTest) open(query string) (got *syncedLog, ended chan error, leave func()) {
	tt.t.Helper()
	ctx, cancel := context.WithCancel(tt.t.Context())
	got, ended = &syncedLog{}, make(chan error, 1)
	if tt.tech.name == "ws" {
		conn, _, err := websocket.Dial(ctx, strings.Replace(tt.url(query), "http", "ws", 1), &websocket.DialOptions{HTTPClient: tt.client})
		if err != nil {
			cancel()
			tt.t.Fatal(err)
		}
		go func() {
			for {
				_, b, err := conn.Read(context.Background())
				if err != nil {
					ended <- err
					return
				}
				got.Write(append(b, '\n'))
			}
		}()
		return got, ended, func() { conn.CloseNow(); cancel() }
	}
	r, _ := http.NewRequestWithContext(ctx, "GET", tt.url(query), nil)
	go func() {
		resp, err := tt.client.Do(r)
		if err != nil {
			ended <- err
			return
		}
		defer resp.Body.Close()
		if resp.StatusCode != 200 {
			ended <- fmt.Errorf("answered %s", resp.Status)
			return
		}
		if resp.Uncompressed {
			fmt.Fprintln(got, "(compressed)")
		}
		_, err = io.Copy(got, resp.Body)
		if err == nil {
			err = io.EOF
		}
		ended <- err
	}()
	return got, ended, cancel
}

// waitFor waits until want was received.
func (tt *techniqueTest) waitFor(got *syncedLog, ended chan error, want string) {
	tt.t.Helper()
	start := time.Now()
	for !strings.Contains(got.String(), want) {
		select {
		case err := <-ended:
			if strings.Contains(got.String(), want) {
				ended <- err
				return
			}
			tt.t.Fatalf("it ended with %v before it said %q:\n%s", err, want, got)
		case <-time.After(5 * time.Millisecond):
		}
		if time.Since(start) > promptly {
			tt.t.Fatalf("it does not say %q at once, but\n%s", want, got)
		}
	}
}

// waitForOpen waits until so many connections of this technique are open.
func (tt *techniqueTest) waitForOpen(want float64, within time.Duration) {
	tt.t.Helper()
	start := time.Now()
	eventually(tt.t, within, fmt.Sprintf("%v of %s are open", want, tt.tech.name), func() bool {
		return tt.c.metric(fmt.Sprintf("connections{technique=%q}", tt.tech.name)) == want
	})
	if want == 0 {
		tt.t.Logf("the relay knows within %v", time.Since(start).Round(10*time.Millisecond))
	}
}

func (tt *techniqueTest) checkStream() {
	got, ended, leave := tt.open("")
	defer leave()
	hello := `"type":"hello"`
	if tt.tech.name == "html" {
		hello = "Connected."
	}
	tt.waitFor(got, ended, hello)
	tt.publish("one")
	tt.waitFor(got, ended, "one")
	time.Sleep(proxyIdle + proxyIdle/2)
	tt.publish("two")
	tt.waitFor(got, ended, "two") // nothing but heartbeats came for longer than the proxy waits
	if n := strings.Count(got.String(), hello); n != 1 {
		tt.t.Errorf("%d hellos", n)
	}
	if strings.Contains(got.String(), "(compressed)") {
		tt.t.Log("it was compressed")
	}
	tt.waitForOpen(1, promptly)
	leave()
	if tt.lateNotice {
		tt.waitForOpen(0, 2*proxyBeat+promptly) // what is written after the first heartbeat fails
	} else {
		tt.waitForOpen(0, promptly)
	}
}

func (tt *techniqueTest) checkLongPoll() {
	query := "?callback=f&wait="
	start := time.Now()
	got, ended, leave := tt.open(query + "2")
	err := <-ended
	leave()
	if d := time.Since(start); err != io.EOF || !strings.Contains(got.String(), `"events":[]`) || d < 2*time.Second || d > 2*time.Second+promptly {
		tt.t.Errorf("after %v %v %s; want an empty answer after 2 s", d, err, got)
	}
	cursor := regexp.MustCompile(`"cursor":\d+`).FindString(got.String())
	got, ended, leave = tt.open(query + "2&after=" + strings.TrimPrefix(cursor, `"cursor":`))
	tt.waitForOpen(1, promptly)
	tt.publish("one")
	tt.waitFor(got, ended, `"data":"one"`)
	leave()
	_, _, leave = tt.open(query + "25")
	tt.waitForOpen(1, promptly)
	leave()
	if tt.lateNotice {
		tt.publish("two") // or after 25 seconds
	}
	tt.waitForOpen(0, promptly)
}

func (tt *techniqueTest) checkPoll() {
	tt.publish("one")
	got, ended, leave := tt.open("?last=1")
	defer leave()
	tt.waitFor(got, ended, "one")
	if err := <-ended; err != io.EOF {
		tt.t.Errorf("it ended with %v", err)
	}
}

// checkLost checks that what is listed as lost does not come through; for a WebSocket
// also that the client learns it at once. comet.js waits three seconds.
func (tt *techniqueTest) checkLost() {
	start := time.Now()
	ctx, cancel := context.WithTimeout(tt.t.Context(), 3*time.Second)
	defer cancel()
	if tt.tech.name != "ws" {
		r, _ := http.NewRequestWithContext(ctx, "GET", tt.url(""), nil)
		resp, err := tt.client.Do(r)
		if err == nil {
			b := make([]byte, 10)
			_, err = io.ReadFull(resp.Body, b)
			resp.Body.Close()
		}
		if err == nil {
			tt.t.Log("it comes through, with a proxy newer than the one this was written for")
		}
		return
	}
	_, resp, err := websocket.Dial(ctx, strings.Replace(tt.url(""), "http", "ws", 1), &websocket.DialOptions{HTTPClient: tt.client})
	if err == nil {
		tt.t.Fatal("it comes through, and is said not to")
	}
	status := "no answer"
	if resp != nil {
		status = resp.Status
	}
	if d := time.Since(start); d > time.Second {
		tt.t.Errorf("that it does not come through is told after %v", d)
	}
	tt.t.Logf("%s: %.100v", status, err)
}

func TestWithoutHeartbeatsAProxyCutsAStreamButALeavingIsStillNoticed(t *testing.T) {
	if testing.Short() {
		t.Skip("takes 5 s")
	}
	var all parallel
	defer all.Wait()
	for _, p := range proxies {
		all.run(t, p.program, func(t *testing.T) {
			c := startRelay(t, nil, "-h2c", "-beat", "1m")
			urls := startProxy(t, p, c.addr)
			open := func(name, query string) (*techniqueTest, *syncedLog, chan error, func()) {
				i := slices.IndexFunc(techniques, func(t technique) bool { return t.name == name })
				tt := &techniqueTest{t: t, c: c, base: urls[0], client: &http.Client{Transport: &http.Transport{}}, tech: techniques[i], room: "a"}
				got, ended, leave := tt.open(query)
				return tt, got, ended, leave
			}
			for _, name := range []string{"ws", "sse", "multipart", "longpoll"} {
				if p.routes[0].lost[name] != "" {
					continue
				}
				tt, _, _, leave := open(name, "")
				tt.waitForOpen(1, promptly)
				leave()
				if !p.routes[0].lateNotice {
					tt.waitForOpen(0, promptly)
				}
			}
			start := time.Now()
			tt, got, ended, leave := open("stream", "")
			defer leave()
			tt.waitFor(got, ended, "hello")
			select {
			case <-ended:
			case <-time.After(2*proxyIdle + time.Second):
			}
			if d := time.Since(start); d < proxyIdle-time.Second/2 || d > 2*proxyIdle {
				t.Errorf("without heartbeats it ended after %v; the proxy waits %v, so what is tested with them is not tested", d, proxyIdle)
			}
		})
	}
}

// A refused Upgrade does not open a way past the proxy, by which a client could
// say for itself who it is.
func refusedUpgrade(t *testing.T, base string) {
	t.Helper()
	at, err := url.Parse(base)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := net.Dial("tcp", at.Host)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(5 * time.Second))
	head := "Host: " + at.Host + "\r\nX-Forwarded-For: 203.0.113.10\r\n"
	fmt.Fprintf(conn, "GET %s/rooms/all/ws HTTP/1.1\r\n%sConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 12\r\n\r\n", at.EscapedPath(), head)
	for _, connection := range []string{"keep-alive", "keep-alive", "close"} {
		fmt.Fprintf(conn, "POST %s/rooms/all HTTP/1.1\r\n%sConnection: %s\r\nContent-Length: 2\r\n\r\nhi", at.EscapedPath(), head, connection)
	}
	got, err := io.ReadAll(conn)
	if err != nil && !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("after a refused upgrade: %v", err)
	}
	if !regexp.MustCompile(`^HTTP/1\.. [45]`).Match(got) || strings.Contains(string(got), "HTTP/1.1 429") {
		t.Errorf("after a refused upgrade a client says itself where it is from:\n%s", got)
	}
}

var (
	attribute   = regexp.MustCompile(`\b(href|src|action)="([^"]*)"`)
	imported    = regexp.MustCompile(`(?m)^import (?:.+ from )?'([^']+)'`)
	postForm    = regexp.MustCompile(`(?s)<form method="post" action="([^"]*)">(.*?)</form>`)
	hiddenInput = regexp.MustCompile(`<input type="hidden" name="([^"]*)" value="([^"]*)">`)
)

// A browser of pages below a path: what it is led to has to be there, and below that path.
type browser struct {
	t      *testing.T
	base   *url.URL // of the relay, as the client sees it; ends with a slash
	client *http.Client
	seen   map[string]bool
}

func newBrowser(t *testing.T, base string) *browser {
	at, err := url.Parse(base + "/")
	if err != nil {
		t.Fatal(err)
	}
	jar, _ := cookiejar.New(nil)
	stay := func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	return &browser{t, at, &http.Client{Jar: jar, CheckRedirect: stay, Transport: &http.Transport{}}, map[string]bool{}}
}

// do asks as a browser does, follows where it is sent, and returns what is there
// and how often it was sent on. Of what never ends it takes the beginning.
func (b *browser) do(method, address, body string) (at *url.URL, text string, sent int) {
	b.t.Helper()
	at, err := url.Parse(address)
	if err != nil {
		b.t.Errorf("%q: %v", address, err)
		return b.base, "", 0
	}
	for ; ; sent++ {
		ctx, cancel := context.WithTimeout(b.t.Context(), 5*time.Second)
		defer cancel()
		r, _ := http.NewRequestWithContext(ctx, method, at.String(), strings.NewReader(body))
		if path.Ext(at.Path) != ".js" && path.Ext(at.Path) != ".css" {
			r.Header.Set("Accept", "text/html,*/*;q=0.8")
		}
		if method == "POST" {
			r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		}
		resp, err := b.client.Do(r)
		if err != nil {
			b.t.Errorf("%s: %v", at, err)
			return at, "", sent
		}
		defer resp.Body.Close()
		if to := resp.Header.Get("Location"); to != "" && resp.StatusCode == 303 && sent < 5 {
			next := b.resolve(at, to)
			if next == nil {
				return at, "", sent
			}
			at, method, body = next, "GET", ""
			continue
		}
		if resp.StatusCode != 200 {
			b.t.Errorf("%s: %s", at, resp.Status)
		}
		all := &strings.Builder{}
		for part := make([]byte, 4096); ; {
			n, err := resp.Body.Read(part)
			all.Write(part[:n])
			endless := strings.HasSuffix(at.Path, "/html") && strings.Contains(all.String(), "Connected.") || strings.HasSuffix(at.Path, "/multipart")
			if err != nil || endless {
				if err != nil && err != io.EOF {
					b.t.Errorf("%s: %v", at, err)
				}
				return at, all.String(), sent
			}
		}
	}
}

// resolve returns where a link of a page leads, or nil if that is not to be followed.
func (b *browser) resolve(from *url.URL, link string) *url.URL {
	b.t.Helper()
	to, err := from.Parse(html.UnescapeString(link))
	if err != nil {
		b.t.Errorf("%s leads to %q: %v", from, link, err)
		return nil
	}
	if to.Host == b.base.Host && !strings.HasPrefix(to.EscapedPath(), b.base.EscapedPath()) {
		b.t.Errorf("%s leads out of %s: %q is %s", from, b.base, link, to)
		return nil
	}
	to.Fragment = ""
	return to
}

// visit fetches a page, and all that it leads to.
func (b *browser) visit(address string) {
	b.t.Helper()
	if b.seen[address] {
		return
	}
	b.seen[address] = true
	at, text, _ := b.do("GET", address, "")
	links := []string{}
	switch {
	case strings.HasSuffix(at.Path, ".js"):
		for _, m := range imported.FindAllStringSubmatch(text, -1) {
			links = append(links, m[1])
		}
	case strings.HasPrefix(text, "<!DOCTYPE html>"):
		for _, m := range attribute.FindAllStringSubmatch(postForm.ReplaceAllString(text, ""), -1) {
			links = append(links, m[2])
		}
		for _, m := range postForm.FindAllStringSubmatch(text, -1) {
			b.send(at, m[1], m[2])
		}
	}
	for _, link := range links {
		if to := b.resolve(at, link); to != nil && to.Host == b.base.Host {
			b.visit(to.String())
		}
	}
}

// send fills in a form that posts, and goes where that leads.
func (b *browser) send(from *url.URL, action, inputs string) {
	b.t.Helper()
	values := url.Values{"user": {"ada"}, "data": {"hi from " + from.Path}}
	for _, m := range hiddenInput.FindAllStringSubmatch(inputs, -1) {
		values.Set(m[1], html.UnescapeString(m[2]))
	}
	to := b.resolve(from, action)
	if to == nil {
		return
	}
	at, text, sent := b.do("POST", to.String(), values.Encode())
	if then := values.Get("then"); sent != 1 || !strings.HasSuffix(at.Path, "/"+then) {
		b.t.Errorf("the form of %s led to %s, %d redirects on; want its page %s", from, at, sent, then)
	}
	if values.Get("then") == "refresh" && !strings.Contains(text, values.Get("data")) {
		b.t.Errorf("what the form of %s sent is not in %s", from, at)
	}
}

func TestAllPagesWorkBelowAPath(t *testing.T) {
	if testing.Short() {
		t.Skip("runs nginx")
	}
	nginx := proxies[slices.IndexFunc(proxies, func(p proxy) bool { return p.program == "nginx" })]
	i := slices.IndexFunc(nginx.routes, func(way route) bool { return way.path != "" })
	paths := []string{"/relay", "/my%20relay", "/a:b"}
	pages := []string{"", "index.html", "lab.html", "stats.html", "rooms/x/html", "rooms/x/refresh", "rooms/x/form", "rooms/x/form?live=refresh"}

	// start returns the origin of nginx in front of a relay.
	start := func(t *testing.T, args ...string) string {
		return strings.TrimSuffix(startProxy(t, nginx, startRelay(t, nil, args...).addr)[i], nginx.routes[i].path)
	}
	t.Run("open", func(t *testing.T) {
		origin := start(t)
		for _, below := range paths {
			t.Run(below, func(t *testing.T) {
				b := newBrowser(t, origin+below)
				for _, page := range pages {
					b.visit(b.base.String() + page)
				}
				// What browsers are sent on to.
				for from, want := range map[string]string{"lab": "lab.html", "stats": "stats.html", "rooms": "stats.html", "rooms/x": "?room=x"} {
					at, _, sent := b.do("GET", b.base.String()+from, "")
					if at.Fragment = ""; sent != 1 || at.String() != b.base.String()+want {
						t.Errorf("/%s leads to %s, %d redirects on", from, at, sent)
					}
				}
				for _, asset := range []string{"comet.js", "chat.js", "lab.js", "stats.js", "style.css", "plain.css", "icon.svg"} {
					if !b.seen[b.base.String()+asset] {
						t.Errorf("no page led to %s", asset)
					}
				}
				t.Logf("%d addresses", len(b.seen))
			})
		}
	})
	t.Run("with a token", func(t *testing.T) {
		origin := start(t, "-secret", secret)
		token := url.Values{"token": {signToken(`{"sub":"ada","read":["*","_stats"],"write":["*"]}`)}}.Encode()
		for _, below := range paths {
			t.Run(below, func(t *testing.T) {
				for _, page := range pages {
					b := newBrowser(t, origin+below)
					want, join := b.base.String()+page, "?"
					if strings.Contains(page, "?") {
						join = "&"
					}
					at, _, sent := b.do("GET", want+join+token, "")
					if sent != 1 || at.String() != want {
						t.Errorf("%s with a token leads to %s, %d redirects on", want, at, sent)
					}
					b.visit(at.String())
				}
			})
		}
	})
}
