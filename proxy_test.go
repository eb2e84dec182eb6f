//go:build linux

// Real proxies in front of a real relay: nginx, HAProxy and Caddy with the
// configurations in proxies/, each in three ways, all techniques by each. What
// does not come through is named here, with what comet.js takes instead.

package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
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

// A way is one address of a proxy.
type way struct {
	name  string
	lost  map[string]string // techniques that don't come through, and why
	hides bool              // the relay is not told the Host that was asked for
}

var (
	noUpgrade = map[string]string{"ws": "HTTP/2 to the relay has no Upgrade"}
	heldBack  = map[string]string{"multipart": old, "html": old, "iframe": old, "stream": old, "sse": old}
)

const old = "Caddy 2.6 does not flush what it compresses"

var proxies = []struct {
	name, config string
	args         func(dir, config string) []string
	ways         []way // at 127.0.0.1:8081 and so on
}{
	{"nginx", "nginx.conf",
		func(dir, config string) []string { return []string{"-p", dir, "-c", config, "-g", "daemon off;"} },
		[]way{{name: "plain"}, {name: "gzip"}, {name: "one line", hides: true, lost: map[string]string{"ws": "nginx drops Upgrade unless told"}}}},
	{"haproxy", "haproxy.cfg",
		func(_, config string) []string { return []string{"-db", "-f", config} },
		[]way{{name: "plain"}, {name: "gzip"}, {name: "h2", lost: noUpgrade}}},
	{"caddy", "Caddyfile",
		func(_, config string) []string {
			return []string{"run", "--adapter", "caddyfile", "--config", config}
		},
		[]way{{name: "plain"}, {name: "gzip"}, {name: "gzip all", lost: heldBack}, {name: "h2c", lost: noUpgrade}}},
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

// startProxy starts a proxy with its file of proxies/ in front of the relay,
// as a user without privileges, and returns the addresses of its ways.
func startProxy(t *testing.T, program, file, relay string, n int, args func(dir, config string) []string) []string {
	t.Helper()
	path, err := exec.LookPath(program)
	if err != nil {
		path, err = exec.LookPath("/usr/sbin/" + program) // of which not everybody's PATH knows
	}
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatalf("%s is not installed, and CI has to have it: apt-get install nginx haproxy caddy", program)
		}
		t.Skipf("%s is not installed: apt-get install nginx haproxy caddy", program)
	}
	dir, err := os.MkdirTemp("", "cometes-proxy")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	b, err := os.ReadFile(filepath.Join("proxies", file))
	if err != nil {
		t.Fatal(err)
	}
	config := strings.ReplaceAll(string(b), "127.0.0.1:8080", relay)
	ways := freePorts(t, n)
	for i, addr := range ways {
		port := fmt.Sprintf("127.0.0.1:%d", 8081+i)
		if !strings.Contains(config, port) {
			t.Fatalf("%s does not listen on %s", file, port)
		}
		config = strings.ReplaceAll(config, port, addr)
	}
	if !strings.Contains(config, "60s") {
		t.Fatalf("%s has no 60s to make %v of", file, proxyIdle)
	}
	file = filepath.Join(dir, file)
	if err := os.WriteFile(file, []byte(strings.ReplaceAll(config, "60s", proxyIdle.String())), 0o644); err != nil {
		t.Fatal(err)
	}

	cmd := exec.Command(path, args(dir, file)...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "HOME="+dir, "XDG_CONFIG_HOME="+dir, "XDG_DATA_HOME="+dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{}
	if os.Getuid() == 0 {
		const nobody = 65534
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: nobody, Gid: nobody}
		for _, name := range []string{dir, file} {
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
		kill := time.AfterFunc(3*time.Second, func() { cmd.Process.Kill() })
		defer kill.Stop()
		cmd.Wait()
		if t.Failed() {
			t.Logf("%s said:\n%.4000s", program, log)
		}
	})
	for _, addr := range ways {
		eventually(t, 5*time.Second, program+" answers at "+addr, func() bool {
			resp, err := http.Get("http://" + addr + "/healthz")
			if err != nil {
				return false
			}
			resp.Body.Close()
			return resp.StatusCode == 200
		})
	}
	return ways
}

func TestEveryTechniqueComesThroughRealProxies(t *testing.T) {
	if testing.Short() {
		t.Skip("takes 20 s")
	}
	var all together
	defer all.Wait()
	for _, p := range proxies {
		all.run(t, p.name, func(t *testing.T) {
			c := startRelay(t, []string{"FLY_APP_NAME=cometes"}, "-h2c", "-trust-proxy", "-rate", "1", "-beat", proxyBeat.String())
			for i, addr := range startProxy(t, p.name, p.config, c.addr, len(p.ways), p.args) {
				w := p.ways[i]
				client := &http.Client{Transport: &http.Transport{}} // asks for gzip
				t.Run(w.name, func(t *testing.T) { walk(t, c, w, "http://"+addr, client) })
			}
		})
	}
	all.run(t, "h2c", func(t *testing.T) {
		c := startRelay(t, nil, "-h2c", "-beat", proxyBeat.String())
		tr := &http.Transport{Protocols: new(http.Protocols)}
		tr.Protocols.SetUnencryptedHTTP2(true)
		walk(t, c, way{name: "h2c", lost: noUpgrade}, "http://"+c.addr, &http.Client{Transport: tr})
	})
}

// together runs tests at the same time, however few processors there are: they
// mostly wait.
type together struct{ sync.WaitGroup }

func (all *together) run(t *testing.T, name string, do func(t *testing.T)) {
	all.Go(func() { t.Run(name, do) })
}

// walk goes a way by all techniques at the same time.
func walk(t *testing.T, c *child, w way, base string, client *http.Client) {
	var all together
	for _, tech := range techniques {
		all.run(t, tech.name, func(t *testing.T) {
			g := &goer{t: t, c: c, base: base, client: client, tech: tech, room: strings.ReplaceAll(w.name, " ", "-") + "." + tech.name}
			switch {
			case w.lost[tech.name] != "":
				g.isLost()
			case tech.mode == streaming:
				g.follows()
			case tech.mode == longPoll:
				g.waits()
			default:
				g.asks()
			}
		})
	}
	all.Wait()

	// What is lost is not missed: comet.js goes on to one that came through.
	js, err := os.ReadFile("static/comet.js")
	if err != nil {
		t.Fatal(err)
	}
	order := regexp.MustCompile(`\bvia = \[([^\]]*)\]`).FindSubmatch(js)
	if order == nil {
		t.Fatal("comet.js does not say in which order it tries")
	}
	list := regexp.MustCompile(`\w+`).FindAllString(string(order[1]), -1)
	i := slices.IndexFunc(list, func(name string) bool { return w.lost[name] == "" })
	if i < 0 {
		t.Fatalf("comet.js tries %q, and all of them are lost", list)
	}
	t.Logf("comet.js tries %q, and has %s", list, list[i])

	// Pages of the relay's own may publish; and nobody says for themselves who they are.
	publish := func(header, value string) int {
		r, _ := http.NewRequest("POST", base+"/rooms/all", strings.NewReader("hi"))
		r.Header.Set(header, value)
		resp, err := client.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		return resp.StatusCode
	}
	if w.hides {
		if got := publish("Origin", base); got != 403 {
			t.Errorf("a publish of a page, without the Host: %d; can it be told now whose page it is?", got)
		}
		return
	}
	if got := publish("Origin", base); got != 201 {
		t.Errorf("a publish of an own page: %d", got)
	}
	for range 4 { // more than -rate, for any but the machine itself
		for _, header := range []string{"Fly-Client-IP", "X-Forwarded-For"} {
			if got := publish(header, "203.0.113.9"); got != 201 {
				t.Errorf("a publish that says in %s where it is from: %d", header, got)
			}
		}
	}
}

// A goer goes a way by one technique.
type goer struct {
	t          *testing.T
	c          *child
	base, room string
	client     *http.Client
	tech       *technique
}

func (g *goer) url(query string) string {
	return g.base + "/rooms/" + g.room + "/" + g.tech.name + query
}

func (g *goer) publish(text string) {
	g.t.Helper()
	resp, err := g.client.Post(g.base+"/rooms/"+g.room, "text/plain", strings.NewReader(text))
	if err != nil {
		g.t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != 201 {
		g.t.Fatalf("publishing: %s", resp.Status)
	}
}

// open returns what comes, as it comes, and how to leave; nothing of it is said
// to be over before it is.
func (g *goer) open(query string) (said *syncedLog, over chan error, leave func()) {
	g.t.Helper()
	ctx, cancel := context.WithCancel(g.t.Context())
	said, over = &syncedLog{}, make(chan error, 1)
	if g.tech.name == "ws" {
		conn, _, err := websocket.Dial(ctx, strings.Replace(g.url(query), "http", "ws", 1), &websocket.DialOptions{HTTPClient: g.client})
		if err != nil {
			cancel()
			g.t.Fatal(err)
		}
		go func() {
			for {
				_, b, err := conn.Read(context.Background())
				if err != nil {
					over <- err
					return
				}
				said.Write(append(b, '\n'))
			}
		}()
		return said, over, func() { conn.CloseNow(); cancel() }
	}
	r, _ := http.NewRequestWithContext(ctx, "GET", g.url(query), nil)
	go func() {
		resp, err := g.client.Do(r)
		if err != nil {
			over <- err
			return
		}
		defer resp.Body.Close()
		if resp.StatusCode != 200 {
			over <- fmt.Errorf("answered %s", resp.Status)
			return
		}
		if resp.Uncompressed {
			fmt.Fprintln(said, "(compressed)")
		}
		_, err = io.Copy(said, resp.Body)
		if err == nil {
			err = io.EOF
		}
		over <- err
	}()
	return said, over, cancel
}

// hears waits until want was said.
func (g *goer) hears(said *syncedLog, over chan error, want string) {
	g.t.Helper()
	start := time.Now()
	for !strings.Contains(said.String(), want) {
		select {
		case err := <-over:
			if strings.Contains(said.String(), want) {
				over <- err
				return
			}
			g.t.Fatalf("it ended with %v before it said %q:\n%s", err, want, said)
		case <-time.After(5 * time.Millisecond):
		}
		if time.Since(start) > promptly {
			g.t.Fatalf("it does not say %q at once, but\n%s", want, said)
		}
	}
}

// gauge waits until so many are open by this technique.
func (g *goer) gauge(want float64, within time.Duration) {
	g.t.Helper()
	start := time.Now()
	eventually(g.t, within, fmt.Sprintf("%v of %s are open", want, g.tech.name), func() bool {
		return g.c.metric(fmt.Sprintf("connections{technique=%q}", g.tech.name)) == want
	})
	if want == 0 {
		g.t.Logf("the relay knows within %v", time.Since(start).Round(10*time.Millisecond))
	}
}

func (g *goer) follows() {
	said, over, leave := g.open("")
	defer leave()
	hello := `"type":"hello"`
	if g.tech.name == "html" {
		hello = "Connected."
	}
	g.hears(said, over, hello)
	g.publish("one")
	g.hears(said, over, "one")
	time.Sleep(proxyIdle + proxyIdle/2)
	g.publish("two")
	g.hears(said, over, "two") // nothing but heartbeats came for longer than the proxy waits
	if n := strings.Count(said.String(), hello); n != 1 {
		g.t.Errorf("%d hellos", n)
	}
	if strings.Contains(said.String(), "(compressed)") {
		g.t.Log("it was compressed")
	}
	g.gauge(1, promptly)
	leave()
	g.gauge(0, promptly)
}

func (g *goer) waits() {
	query := "?callback=f&wait="
	start := time.Now()
	said, over, leave := g.open(query + "2")
	err := <-over
	leave()
	if d := time.Since(start); err != io.EOF || !strings.Contains(said.String(), `"events":[]`) || d < 2*time.Second || d > 2*time.Second+promptly {
		g.t.Errorf("after %v %v %s; want an empty answer after 2 s", d, err, said)
	}
	cursor := regexp.MustCompile(`"cursor":\d+`).FindString(said.String())
	said, over, leave = g.open(query + "2&after=" + strings.TrimPrefix(cursor, `"cursor":`))
	g.gauge(1, promptly)
	g.publish("one")
	g.hears(said, over, `"data":"one"`)
	leave()
	_, _, leave = g.open(query + "25")
	g.gauge(1, promptly)
	leave()
	g.gauge(0, promptly)
}

func (g *goer) asks() {
	g.publish("one")
	said, over, leave := g.open("?last=1")
	defer leave()
	g.hears(said, over, "one")
	if err := <-over; err != io.EOF {
		g.t.Errorf("it ended with %v", err)
	}
}

// isLost sees that what is said not to come through does not, and, where it
// can be told, that it is: comet.js waits three seconds.
func (g *goer) isLost() {
	start := time.Now()
	ctx, cancel := context.WithTimeout(g.t.Context(), 3*time.Second)
	defer cancel()
	if g.tech.name != "ws" {
		r, _ := http.NewRequestWithContext(ctx, "GET", g.url(""), nil)
		resp, err := g.client.Do(r)
		if err == nil {
			b := make([]byte, 10)
			_, err = io.ReadFull(resp.Body, b)
			resp.Body.Close()
		}
		if err == nil {
			g.t.Log("it comes through, with a proxy newer than the one this was written for")
		}
		return
	}
	_, resp, err := websocket.Dial(ctx, strings.Replace(g.url(""), "http", "ws", 1), &websocket.DialOptions{HTTPClient: g.client})
	if err == nil {
		g.t.Fatal("it comes through, and is said not to")
	}
	status := "no answer"
	if resp != nil {
		status = resp.Status
	}
	if d := time.Since(start); d > time.Second {
		g.t.Errorf("that it does not come through is told after %v", d)
	}
	g.t.Logf("%s: %.100v", status, err)
}

func TestWithoutHeartbeatsAProxyCutsAStreamButALeavingIsStillNoticed(t *testing.T) {
	if testing.Short() {
		t.Skip("takes 5 s")
	}
	var all together
	defer all.Wait()
	for _, p := range proxies {
		all.run(t, p.name, func(t *testing.T) {
			c := startRelay(t, nil, "-h2c", "-beat", "1m")
			ways := startProxy(t, p.name, p.config, c.addr, len(p.ways), p.args)
			open := func(name, query string) (*goer, *syncedLog, chan error, func()) {
				i := slices.IndexFunc(techniques, func(t *technique) bool { return t.name == name })
				g := &goer{t: t, c: c, base: "http://" + ways[0], client: &http.Client{Transport: &http.Transport{}}, tech: techniques[i], room: "a"}
				said, over, leave := g.open(query)
				return g, said, over, leave
			}
			for _, name := range []string{"ws", "sse", "multipart", "longpoll"} {
				g, _, _, leave := open(name, "")
				g.gauge(1, promptly)
				leave()
				g.gauge(0, promptly)
			}
			start := time.Now()
			g, said, over, leave := open("stream", "")
			defer leave()
			g.hears(said, over, "hello")
			select {
			case <-over:
			case <-time.After(2*proxyIdle + time.Second):
			}
			if d := time.Since(start); d < proxyIdle-time.Second/2 || d > 2*proxyIdle {
				t.Errorf("without heartbeats it ended after %v; the proxy waits %v, so what is tested with them is not tested", d, proxyIdle)
			}
		})
	}
}
