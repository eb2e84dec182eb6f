// Many instances on one Redis. Each is a process of its own, and so is Redis: what is
// tested here is what happens when one of them is killed, stopped, cut off or emptied.

//go:build linux

package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	crand "crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"math/big"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// A redisServer is a Redis of the test's own.
type redisServer struct {
	t    testing.TB
	addr string
	args []string
	cmd  *exec.Cmd
}

func startRedis(t testing.TB, args ...string) *redisServer {
	t.Helper()
	if _, err := exec.LookPath("redis-server"); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal("redis-server is not installed, and CI has to have it: apt-get install redis-server")
		}
		t.Skip("redis-server is not installed: apt-get install redis-server")
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	listen := []string{"--port", port}
	if slices.Contains(args, "--tls-cert-file") {
		listen = []string{"--port", "0", "--tls-port", port}
	}
	r := &redisServer{t: t, addr: l.Addr().String(), args: append([]string{"--bind", "127.0.0.1", "--dir", t.TempDir(), "--save", "", "--enable-debug-command", "yes"}, append(listen, args...)...)}
	r.start()
	t.Cleanup(r.kill)
	return r
}

// start starts Redis, again on the same port with the same directory.
func (r *redisServer) start() {
	r.t.Helper()
	r.cmd = exec.Command("redis-server", r.args...)
	if err := r.cmd.Start(); err != nil {
		r.t.Fatal(err)
	}
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		conn, err := net.Dial("tcp", r.addr)
		if err == nil {
			conn.Close()
			return
		}
		if time.Now().After(end) {
			r.t.Fatal("redis-server does not listen: ", err)
		}
	}
}

func (r *redisServer) kill() {
	r.cmd.Process.Kill()
	r.cmd.Wait()
}

func (r *redisServer) url() string { return "redis://" + r.addr }

// do sends a command.
func (r *redisServer) do(args ...any) reply {
	r.t.Helper()
	conn, err := (&redisTarget{addr: r.addr, maxText: 1 << 20}).dial()
	if err != nil {
		r.t.Fatal(err)
	}
	defer conn.Close()
	var command []string
	for _, arg := range args {
		command = append(command, fmt.Sprint(arg))
	}
	reply, err := conn.do(command...)
	if err != nil {
		r.t.Fatal(command, ": ", err)
	}
	return reply
}

// An instance is a relay in a process of its own: the test's binary, see socket_linux_test.go.
type instance struct {
	t    testing.TB
	cmd  *exec.Cmd
	addr string
	log  bytes.Buffer  // complete when the process has ended
	done chan struct{} // closed then
}

func (r *redisServer) relay(args ...string) *instance {
	r.t.Helper()
	return startInstance(r.t, "127.0.0.1:0", r.url(), args...)
}

// startInstance starts a relay without limits that a test would reach.
func startInstance(t testing.TB, addr, redis string, args ...string) *instance {
	t.Helper()
	i, err := tryInstance(t, addr, redis, args...)
	if err != nil {
		t.Fatal(err)
	}
	return i
}

// tryInstance returns what the relay says if it does not start.
func tryInstance(t testing.TB, addr, redis string, args ...string) (*instance, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	i := &instance{t: t, done: make(chan struct{})}
	i.cmd = exec.Command(self, append([]string{"-addr", addr, "-rate", "1e6", "-room-rate", "1e6", "-per-addr", "5000",
		"-events", "30000", "-room-bytes", "60000000", "-all-bytes", "100000000"}, args...)...)
	i.cmd.Env = append(os.Environ(), "COMETES_TEST_RELAY=1", "REDIS_URL="+redis)
	r, w := io.Pipe()
	i.cmd.Stderr = io.MultiWriter(&i.log, w)
	if err := i.cmd.Start(); err != nil {
		return nil, err
	}
	t.Cleanup(i.terminate)
	go func() {
		i.cmd.Wait()
		w.Close()
		close(i.done)
	}()
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		var line struct{ Message, Addr string }
		if json.Unmarshal(lines.Bytes(), &line) == nil && line.Message == "listening" {
			i.addr = line.Addr
			go io.Copy(io.Discard, r)
			return i, nil
		}
	}
	return nil, errors.New(i.log.String())
}

// terminate ends the relay with SIGTERM.
func (i *instance) terminate() { i.end(syscall.SIGTERM) }

func (i *instance) end(by syscall.Signal) {
	i.cmd.Process.Signal(by)
	select {
	case <-i.done:
	case <-time.After(10 * time.Second):
		i.cmd.Process.Kill()
		i.t.Error("the relay did not end")
		<-i.done
	}
	if log := i.log.String(); strings.Contains(log, "DATA RACE") || strings.Contains(log, "panic:") {
		i.t.Errorf("the relay's log:\n%s", log)
	}
}

// relays starts instances, and returns clients of them.
func (r *redisServer) relays(n int, args ...string) (all []*testbed) {
	r.t.Helper()
	for range n {
		all = append(all, r.relay(args...).testbed())
	}
	return all
}

// testbed is a client of the instance.
func (i *instance) testbed() *testbed {
	b := newRemoteTestbed(i.t, "http://"+i.addr)
	b.dial = func(ctx context.Context) (net.Conn, error) { return new(net.Dialer).DialContext(ctx, "tcp", i.addr) }
	return b
}

func TestRedisConformance(t *testing.T) {
	r := startRedis(t)
	r.relay() // it is not alone
	testConformance(t, startInstance(t, "127.0.0.1:0", r.url(), "-events", "256").testbed().url)
}

// Clients hop between three instances and all techniques, over connections that break, and
// receive each event once and in order. With COMETES_FAULTS they receive 200,000.
func TestRedisHops(t *testing.T) {
	const publishers, readers = 4, 20
	each := 1000
	switch {
	case testing.Short():
		each = 250
	case os.Getenv("COMETES_FAULTS") != "":
		each = 4300
	}
	beds := startRedis(t).relays(3, "-redis-events", "100000")
	rooms := []string{"a", "b", "c"}
	start := beds[0].post("a", "start")
	ctx, done := context.WithCancel(t.Context()) // done when everything is published

	var publishing, reading sync.WaitGroup
	for p := range publishers {
		rng := rand.New(rand.NewPCG(1, uint64(p)))
		publishing.Go(func() {
			for i := range each {
				room, text := rooms[rng.IntN(3)], fmt.Sprintf("%d %d", p, i)
				for tries := 0; !beds[rng.IntN(3)].tryPublish(rng, false, room, fmt.Sprintf("%d.%d", p, i), text); tries++ {
					if tries > 1000 {
						t.Errorf("publisher %d: %d could not be published", p, i)
						return
					}
				}
			}
		})
	}
	segments := make([][]segment, readers)
	for n := range readers {
		rng := rand.New(rand.NewPCG(2, uint64(n)))
		reading.Go(func() {
			cursor := start
			for ctx.Err() == nil {
				s := beds[rng.IntN(3)].readSome(ctx, t, rng, false, rooms, cursor)
				cursor = s.to
				segments[n] = append(segments[n], s)
			}
			for end := false; !end && !t.Failed(); { // the rest, over connections that do not break
				e, err := beds[rng.IntN(3)].trySubscribe(t.Context(), beds[0].client, variantOf("poll"), "a,b,c", fmt.Sprint("after=", cursor))
				if err != nil {
					t.Error(err)
				}
				s := segment{"poll", rooms, cursor, cursor, nil}
				s.receive(t, e, 200)
				end = len(s.got) == 0
				cursor = s.to
				segments[n] = append(segments[n], s)
			}
		})
	}
	publishing.Wait()
	done()
	reading.Wait()

	var logs [3][]received
	for i, b := range beds {
		e := b.subscribe(variantOf("poll"), "a,b,c", fmt.Sprint("after=", start))
		for h := e.next(); h.kind != "beat"; h = e.next() {
			logs[i] = append(logs[i], h)
		}
		if !slices.Equal(logs[0], logs[i]) {
			t.Errorf("the log of instance %d is another", i)
		}
	}
	if len(logs[0]) != publishers*each {
		t.Errorf("%d events in the log, want %d", len(logs[0]), publishers*each)
	}
	hops, deliveries := 0, 0
	for n := range segments {
		last := start
		for _, s := range segments[n] {
			if s.from != last {
				t.Fatalf("client %d went on from %d, not %d", n, s.from, last)
			}
			last = s.to
			var want []received
			for _, h := range logs[0] {
				if slices.Contains(s.rooms, h.room) && s.from < h.id && h.id <= s.to {
					want = append(want, h)
				}
			}
			if !slices.Equal(s.got, want) {
				t.Fatalf("client %d, by %s in %v from %d to %d: received %d events, want %d", n, s.by, s.rooms, s.from, s.to, len(s.got), len(want))
			}
			hops, deliveries = hops+1, deliveries+len(s.got)
		}
	}
	t.Logf("%d deliveries over %d connections", deliveries, hops)
}

// A presenceScript is what users do at instances, and what everybody is told of it.
type presenceScript struct {
	t       *testing.T
	beds    []*testbed
	room    string
	open    map[string]*eventReader
	watched []*eventReader // one at each instance
}

func newPresenceScript(t *testing.T, beds []*testbed, room string) *presenceScript {
	p := &presenceScript{t, beds, room, map[string]*eventReader{}, nil}
	for _, b := range beds {
		b = newRemoteTestbed(t, b.url)
		e := b.subscribe(variantOf("stream"), room, "presence=1").begin()
		e.expect(`presence {"count":0,"users":{}}`)
		p.watched = append(p.watched, e)
	}
	return p
}

// do does "at 0 ada opens one", "… closes …", "… is typing …", "… is offline …", "… polls …"
// or "wait 2s".
func (p *presenceScript) do(line string) {
	p.t.Helper()
	if wait, ok := strings.CutPrefix(line, "wait "); ok {
		d, _ := time.ParseDuration(wait)
		time.Sleep(d)
		return
	}
	words := strings.Fields(line)
	b, user, client := p.beds[words[1][0]-'0'], words[2], words[len(words)-1]
	who := "user=" + user + "&client=" + client
	switch words[3] {
	case "opens":
		p.open[client] = newRemoteTestbed(p.t, b.url).subscribe(variantOf("stream"), p.room, "user="+user, "client="+client).begin()
	case "closes":
		p.open[client].close()
	case "polls":
		b.do("GET", "/rooms/"+p.room+"/poll?"+who, "")
	case "is":
		if res, body := b.do("POST", "/rooms/"+p.room+"/presence?"+who, words[4]); res.StatusCode != 200 {
			p.t.Fatal(line, ": ", res.Status, body)
		}
	}
}

// told fails unless exactly this is told at every instance, with the same ids, and
// nothing more before a message that is published then.
func (p *presenceScript) told(want ...string) {
	p.t.Helper()
	var ids []int64
	for i, e := range p.watched {
		for n, w := range append(slices.Clone(want), "the end") {
			if w == "the end" && i == 0 {
				p.beds[0].post(p.room, w)
			}
			h := e.next()
			for h.kind == "beat" {
				h = e.next()
			}
			if got := strings.TrimSpace(h.from + " " + h.text); got != w {
				p.t.Fatalf("instance %d: told %q, want %q", i, got, w)
			}
			if i == 0 {
				ids = append(ids, h.id)
			} else if ids[n] != h.id {
				p.t.Errorf("instance %d: %s has the id %d, and %d at instance 0", i, w, h.id, ids[n])
			}
		}
	}
}

// Presence is one, whichever instances a user's tabs and requests go to.
func TestRedisPresence(t *testing.T) {
	t.Parallel()
	beds := startRedis(t).relays(3, "-present", "3s")
	var scripts sync.WaitGroup
	defer scripts.Wait()
	for _, tc := range []struct {
		sentence string
		script   string // with what is told after =>
	}{
		{"two tabs at two instances are one user", `
			at 0 ada opens one => ada online
			at 1 ada opens two =>
			at 0 ada is offline one =>
			at 0 ada closes one =>
			at 1 ada is offline two => ada offline`},
		{"a goodbye may go to another instance", `
			at 0 ada opens one => ada online
			at 1 ada is offline one => ada offline
			at 0 ada closes one =>
			wait 1s
			at 2 ada opens three => ada online`},
		{"typing is seen everywhere, and ends", `
			at 0 ada opens one => ada online
			at 1 ada is typing one => ada typing
			wait 5s => ada online`},
		{"who is away comes back by another instance", `
			at 0 ada opens one => ada online
			at 1 ada is away one => ada away
			wait 1s
			at 2 ada is online one => ada online`},
		{"another tab of who is away changes nothing", `
			at 0 ada opens one => ada online
			at 0 ada is away one => ada away
			at 1 ada opens two =>`},
		{"a closed connection leaves some time to come back, to any instance", `
			at 0 ada opens one => ada online
			at 0 ada closes one
			wait 5s
			at 1 ada opens one
			wait 7s =>
			at 1 ada is offline one => ada offline`},
		{"polls go anywhere", `
			at 0 ada polls one => ada online
			wait 2s
			at 1 ada polls one =>
			wait 2s
			at 2 ada polls one =>
			wait 2500ms =>
			wait 1500ms => ada offline`},
		{"a state set elsewhere does not keep a user", `
			at 0 ada opens one => ada online
			at 1 ada is away one => ada away
			at 0 ada closes one
			wait 9s =>
			wait 2s => ada offline`},
	} {
		run := func(t *testing.T) {
			if strings.Contains(tc.script, "wait") && testing.Short() {
				t.Skip("takes seconds")
			}
			p := newPresenceScript(t, beds, strings.ReplaceAll(tc.sentence[:15], " ", "-"))
			for line := range strings.SplitSeq(strings.TrimSpace(tc.script), "\n") {
				action, want, tells := strings.Cut(strings.TrimSpace(line), "=>")
				p.do(strings.TrimSpace(action))
				if want = strings.TrimSpace(want); want != "" {
					p.told(want)
				} else if tells {
					p.told()
				}
			}
		}
		scripts.Go(func() { t.Run(tc.sentence, run) }) // not t.Parallel: they only wait, on however few cores
	}
}

// A faultTest is five publishers and twenty readers who hop over three instances, while
// somebody breaks things.
type faultTest struct {
	t     *testing.T
	redis *redisServer
	addrs [3]string

	mu        sync.Mutex
	instances [3]*instance
	published map[int64]string // what was answered
	flushed   int              // how often Redis lost everything
}

func (f *faultTest) url() string { return "http://" + f.addrs[rand.IntN(3)] }

// restart ends an instance, and starts another in its place.
func (f *faultTest) restart(n int, by syscall.Signal) {
	f.instances[n].end(by)
	if next, err := tryInstance(f.t, f.addrs[n], f.redis.url(), "-beat", "1s", "-present", "3s"); err != nil {
		f.t.Errorf("instance %d does not start: %v", n, err)
	} else {
		f.instances[n] = next
	}
}

// publish publishes texts one after the other, each until it is answered.
func (f *faultTest) publish(ctx context.Context, name string) {
	client := &http.Client{Timeout: 5 * time.Second}
	for i := 0; ctx.Err() == nil; i++ {
		text := fmt.Sprintf("%s %d", name, i)
		for {
			res, err := client.Post(f.url()+"/rooms/"+string("abc"[i%3])+"?key="+strings.ReplaceAll(text, " ", "."), "text/plain", strings.NewReader(text))
			if err == nil {
				var answer struct{ ID int64 }
				err = json.NewDecoder(res.Body).Decode(&answer)
				res.Body.Close()
				if err == nil && answer.ID != 0 {
					f.mu.Lock()
					f.published[answer.ID] = text
					f.mu.Unlock()
					break
				}
				if res.StatusCode != 503 {
					f.t.Errorf("%s is answered %s", text, res.Status)
					return
				}
			}
			time.Sleep(20 * time.Millisecond)
		}
		time.Sleep(time.Duration(rand.IntN(20)) * time.Millisecond)
	}
}

// A faultReader is one client, and all that it received.
type faultReader struct {
	cursor int64
	got    []received // gaps, too
	hops   int
}

// read receives until ctx is done, and then until it has the last event.
func (f *faultTest) read(ctx context.Context, name string, r *faultReader, last func() int64) {
	var ways []variant
	for _, v := range variants {
		if !v.forPeople {
			ways = append(ways, v)
		}
	}
	end := time.Time{}
	for {
		if ctx.Err() != nil {
			if r.cursor >= last() {
				return
			}
			if end.IsZero() {
				end = time.Now().Add(15 * time.Second)
			} else if time.Now().After(end) {
				f.t.Errorf("%s is stuck at %d", name, r.cursor)
				return
			}
		}
		b := newRemoteTestbed(f.t, f.url())
		hop, cancel := context.WithTimeout(context.Background(), time.Duration(200+rand.IntN(1500))*time.Millisecond)
		e, err := b.trySubscribe(hop, b.client, ways[rand.IntN(len(ways))], "a,b,c", fmt.Sprint("after=", r.cursor), "user="+name, "wait=1")
		r.hops++
		for err == nil {
			var h received
			if h, err = e.receive(); err != nil {
				break
			}
			if h.kind == "message" || h.kind == "gap" {
				r.got = append(r.got, h)
				r.cursor = h.id
			}
			if len(e.pending) == 0 && e.after >= 0 {
				r.cursor = e.after
			}
			if ctx.Err() != nil && r.cursor >= last() {
				break
			}
		}
		if _, bad := err.(malformed); bad && hop.Err() == nil && !strings.Contains(err.Error(), "503") {
			f.t.Error(name, ": ", err)
		}
		if e != nil {
			e.close()
		}
		b.client.CloseIdleConnections()
		cancel()
		time.Sleep(10 * time.Millisecond)
	}
}

// check fails if a reader was not sent something, and no gap; or something twice.
func (f *faultTest) check(name string, r *faultReader) (gaps int) {
	seen := map[string]int64{}
	byID := map[int64]bool{}
	last := int64(0)
	var covered int64 // up to here a gap says that something is lost
	for _, h := range r.got {
		if h.kind == "gap" {
			gaps++
			covered = max(covered, h.id)
			if strings.Contains(h.json, `"future"`) {
				f.t.Errorf("%s received %s after %d", name, h.json, last)
			}
			continue
		}
		if before, ok := seen[h.text]; ok {
			f.t.Fatalf("%s received %q twice, with the ids %d and %d", name, h.text, before, h.id)
		}
		if h.id <= last {
			f.t.Errorf("%s received %d after %d", name, h.id, last)
		}
		seen[h.text], byID[h.id], last = h.id, true, h.id
	}
	for id, text := range f.published {
		if !byID[id] && id > covered && id <= r.cursor {
			f.t.Errorf("%s never received %q with the id %d, and no gap", name, text, id)
		}
	}
	return gaps
}

// Whatever happens to instances and to Redis, nothing that was answered is lost without a
// gap, nothing comes twice, no reader is stuck, and presence comes right.
// COMETES_FAULTS=10m has it last longer.
func TestRedisFaults(t *testing.T) {
	if testing.Short() {
		t.Skip("takes 30 s")
	}
	t.Parallel()
	f := &faultTest{t: t, redis: startRedis(t, "--appendonly", "yes"), published: map[int64]string{}}
	for n := range f.instances {
		f.instances[n] = startInstance(t, "127.0.0.1:0", f.redis.url(), "-beat", "1s", "-present", "3s")
		f.addrs[n] = f.instances[n].addr
	}
	faults := []struct {
		name string
		do   func()
	}{
		{"kill -9 of an instance", func() { f.restart(rand.IntN(3), syscall.SIGKILL) }},
		{"SIGTERM to an instance", func() { f.restart(rand.IntN(3), syscall.SIGTERM) }},
		{"Redis killed and restarted", func() { f.redis.kill(); time.Sleep(500 * time.Millisecond); f.redis.start() }},
		{"Redis stopped", func() {
			f.redis.cmd.Process.Signal(syscall.SIGSTOP)
			time.Sleep(faultTime(3*time.Second, 10*time.Second))
			f.redis.cmd.Process.Signal(syscall.SIGCONT)
		}},
		{"connections cut", func() { f.redis.do("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes") }},
		{"DEBUG SLEEP", func() {
			go exec.Command("redis-cli", "-u", f.redis.url(), "DEBUG", "SLEEP", "2").Run()
			time.Sleep(2 * time.Second)
		}},
		{"FLUSHALL", func() { f.redis.do("FLUSHALL"); f.flushed++ }},
	}
	ctx, done := context.WithCancel(t.Context())
	var publishing, reading sync.WaitGroup
	for n := range 5 {
		publishing.Go(func() { f.publish(ctx, fmt.Sprint("p", n)) })
	}
	start := newRemoteTestbed(t, f.url()).cursor()
	end, finished := context.WithCancel(t.Context())
	var last atomic.Int64
	readers := make([]faultReader, 20)
	for n := range readers {
		readers[n].cursor = start
		reading.Go(func() { f.read(end, fmt.Sprint("r", n), &readers[n], last.Load) })
	}
	count := map[string]int{}
	for until := time.Now().Add(faultTime(12*time.Second, 0)); ; {
		for _, fault := range faults {
			time.Sleep(faultTime(500*time.Millisecond, time.Second))
			t.Log(fault.name)
			fault.do()
			count[fault.name]++
		}
		if time.Now().After(until) {
			break
		}
	}
	time.Sleep(3 * time.Second)
	done()
	publishing.Wait()
	for id := range f.published {
		last.Store(max(last.Load(), id))
	}
	finished()
	reading.Wait()
	received, gaps, hops := 0, 0, 0
	for n := range readers {
		gaps += f.check(fmt.Sprint("r", n), &readers[n])
		received, hops = received+len(readers[n].got), hops+readers[n].hops
	}
	t.Logf("%d published, %d received over %d connections, %d gaps; %v", len(f.published), received, hops, gaps, count)
	if gaps > len(readers)*3*3*f.flushed {
		t.Errorf("%d gaps, want those of %d flushes alone", gaps, f.flushed)
	}

	// All readers have left; who comes now is there, everywhere.
	newRemoteTestbed(t, f.url()).subscribe(variantOf("stream"), "a", "user=ada")
	for _, addr := range f.addrs {
		body := ""
		for limit := time.Now().Add(30 * time.Second); !strings.Contains(body, `"users":{"ada":"online"}`); time.Sleep(100 * time.Millisecond) {
			if time.Now().After(limit) {
				t.Fatalf("after 30 s %s says %s", addr, body)
			}
			_, body = newRemoteTestbed(t, "http://"+addr).do("GET", "/rooms/a/presence", "")
		}
	}
}

// faultTime returns how long something lasts: short, or long if COMETES_FAULTS is set, or as it says.
func faultTime(short, long time.Duration) time.Duration {
	d, err := time.ParseDuration(os.Getenv("COMETES_FAULTS"))
	switch {
	case err != nil:
		return short
	case long == 0:
		return d
	}
	return long
}

func (b *testbed) tryPost(path, text string) (status int, header http.Header, body string) {
	res, err := b.client.Post(b.url+"/rooms/"+path, "text/plain", strings.NewReader(text))
	if err != nil {
		return 0, nil, err.Error()
	}
	defer res.Body.Close()
	answer, _ := io.ReadAll(res.Body)
	return res.StatusCode, res.Header, string(answer)
}

// A client that was answered by one instance finds the event at any other at once.
func TestRedisReadYourWrites(t *testing.T) {
	beds := startRedis(t).relays(3)
	for i := range 200 {
		text := fmt.Sprint("message ", i)
		id := beds[i%3].post("a", text)
		beds[(i+1)%3].subscribe(variantOf("poll"), "a", fmt.Sprint("after=", id-1)).expect("message " + text)
		beds[(i+2)%3].subscribe(variantOf("sse"), "a", fmt.Sprint("Last-Event-ID: ", id-1)).begin().expect("message " + text)
		beds[i%3].subscribe(variantOf("poll"), "a", "last=1").expect("message " + text) // without a cursor at the same one
	}
	gap := beds[1].subscribe(variantOf("sse"), "a", fmt.Sprint("Last-Event-ID: ", beds[0].cursor()+60e6)).begin().expect("gap")[0]
	if !strings.Contains(gap.json, `"future"`) {
		t.Errorf("a cursor that nobody gave: %s", gap.json)
	}
}

// A key, and if, hold over all instances.
func TestRedisKeyAndIf(t *testing.T) {
	beds := startRedis(t).relays(2)
	both := func(path func(i int) string) (all [2]string) {
		var wg sync.WaitGroup
		for i, b := range beds {
			wg.Go(func() {
				status, _, body := b.tryPost(path(i), fmt.Sprint("from ", i))
				all[i] = fmt.Sprint(status, " ", body)
			})
		}
		wg.Wait()
		slices.Sort(all[:])
		return all
	}
	newest := int64(0)
	for i := range 100 {
		all := both(func(int) string { return fmt.Sprint("keys?key=", i) })
		if id, ok := strings.CutPrefix(all[0], "200 "); !ok || all[1] != "201 "+id {
			t.Fatalf("the same key at the same moment: %q", all)
		}
		all = both(func(int) string { return fmt.Sprint("if?if=", newest) })
		var won, lost struct{ ID int64 }
		json.Unmarshal([]byte(all[0][4:]), &won)
		json.Unmarshal([]byte(all[1][4:]), &lost)
		if !strings.HasPrefix(all[0], "201") || !strings.HasPrefix(all[1], "412") || won.ID != lost.ID {
			t.Fatalf("the same if at the same moment: %q", all)
		}
		newest = won.ID
	}
}

// Publishes at the same moment share calls of the script, and each has its own answer.
func TestRedisBatches(t *testing.T) {
	const n = 200
	r := startRedis(t)
	b := r.relays(1)[0]
	first := b.post("a", "first")
	r.do("SET", "{cometes}:keys", "something else") // so a publish with a key is refused
	r.do("SCRIPT", "FLUSH")
	r.do("CONFIG", "RESETSTAT")
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			path, want := []string{"a", "a?ttl=60", "a?if=1", "a?key=k"}[i%4], []int{201, 201, 412, 503}[i%4]
			if status, _, body := b.tryPost(path, fmt.Sprint(i)); status != want {
				t.Errorf("%s: %d %s, want %d", path, status, body, want)
			}
		})
	}
	wg.Wait()
	calls := 0
	_, stats, _ := strings.Cut(r.do("INFO", "commandstats").text, "cmdstat_evalsha:calls=")
	fmt.Sscan(strings.ReplaceAll(stats, ",", " "), &calls)
	if calls == 0 || calls >= n {
		t.Errorf("%d calls of the script for %d publishes", calls, n)
	}
	got := map[string]bool{}
	e := b.subscribe(variantOf("poll"), "a", fmt.Sprint("after=", first))
	for h := e.next(); h.kind != "beat"; h = e.next() {
		got[h.text] = true
	}
	for i := range n {
		if got[fmt.Sprint(i)] != (i%4 < 2) {
			t.Errorf("event %d is there: %v", i, got[fmt.Sprint(i)])
		}
	}
}

// What a batch does sees what it has done: a newer message, a key, an erased room.
func TestRedisScript(t *testing.T) {
	command := []any{"EVAL", redisScript, 8}
	for _, key := range []string{"state", "messages", "signals", "keys", "order", "rooms", "users", "instances"} {
		command = append(command, key)
	}
	command = append(command, 0, 100)
	publish := func(key, onlyIf string) {
		command = append(command, "publish", 7, "a", "message", "ada", 0, key, onlyIf, `"hi"`)
	}
	publish("", "0")
	publish("k", "")
	publish("k", "0")
	publish("", "0")
	command = append(command, "erase", 1, "a")
	publish("", "0")
	replies := startRedis(t).do(command...).list
	if len(replies) != 6 {
		t.Fatal(replies)
	}
	first, second, erased, last := replies[0].text, replies[1].text, replies[4].text, replies[5].text
	for i, want := range []string{first, second, "k" + second[1:], "i" + second[1:], erased, last} {
		if replies[i].text != want {
			t.Errorf("reply %d is %q, want %q", i, replies[i].text, want)
		}
	}
	if !slices.IsSorted([]string{first, second, "n" + erased, last}) || first[0] != 'n' || last[0] != 'n' {
		t.Errorf("the events are %q, %q, %q and %q", first, second, erased, last)
	}
}

// An erased room is gone everywhere, and in Redis.
func TestRedisErase(t *testing.T) {
	r := startRedis(t)
	beds := r.relays(2)
	start := beds[0].post("b", "first")
	for i := range 300 {
		beds[0].post([]string{"a", "b"}[i%2], "secret")
		beds[0].post("a?ttl=60", "secret")
	}
	reader := beds[1].subscribe(variantOf("stream"), "a", fmt.Sprint("after=", beds[0].post("a", "secret"))).begin()
	if res, body := beds[0].do("DELETE", "/rooms/a", ""); res.StatusCode != 204 {
		t.Fatal(res.Status, body)
	}
	if gap := reader.expect("gap")[0]; !strings.Contains(gap.json, `"erased"`) {
		t.Error(gap.json)
	}
	for _, b := range append(beds, r.relays(1)...) {
		b.subscribe(variantOf("poll"), "a", "last=10").expect("beat")
		if _, body := b.do("GET", fmt.Sprint("/rooms/b/poll?after=", start), ""); !strings.Contains(body, "secret") || strings.Contains(body, `"gap"`) {
			t.Errorf("of the other room is read %.500s", body)
		}
	}
	beds[1].post("a?if=0", "later")
	reader.expect("message later")
	for key, want := range map[string]int{"messages": 153, "signals": 0} {
		n := 0
		for _, v := range r.do("XRANGE", "{cometes}:"+key, "-", "+").list {
			if e := parseEntry(0, v); e.room != "-" {
				n++
			}
		}
		if n != want {
			t.Errorf("Redis has %d %s, want %d: those of the other room", n, key, want)
		}
	}
}

// An instance that starts has the history, and clients with cursors lose nothing.
func TestRedisHistory(t *testing.T) {
	r := startRedis(t)
	first := r.relays(1)[0]
	ids := []int64{first.post("a", "0")}
	for i := range 1000 {
		ids = append(ids, first.post("a", fmt.Sprint(i+1)))
		first.post("b?type=sign&ttl=60", "al")
	}
	second := r.relays(1)[0]
	e := second.subscribe(variantOf("poll"), "a", fmt.Sprint("after=", ids[0]))
	for i := range 1000 {
		e.expect(fmt.Sprint("message ", i+1))
	}
	second.subscribe(variantOf("poll"), "b", fmt.Sprint("after=", ids[999])).expect("sign al", "sign al")
}

// Redis keeps so many events, and a client that asks for more is told.
func TestRedisTrims(t *testing.T) {
	r := startRedis(t)
	first := r.relays(1, "-redis-events", "100")[0]
	ids := []int64{first.post("quiet", "quiet")}
	for i := range 500 {
		ids = append(ids, first.post("a", fmt.Sprint(i)))
	}
	second := r.relays(1, "-redis-events", "100")[0]
	second.subscribe(variantOf("stream"), "quiet", fmt.Sprint("after=", ids[0]-1)).begin().expect("gap")
	second.subscribe(variantOf("stream"), "other", fmt.Sprint("after=", ids[450])).begin()
	second.subscribe(variantOf("poll"), "other", fmt.Sprint("after=", ids[450])).expect("beat")
}

// While Redis does not answer, publishes are refused in time, streams beat, and reading goes
// on; then everything goes on where it was.
func TestRedisAway(t *testing.T) {
	t.Parallel()
	for _, way := range []string{"stopped", "killed"} {
		t.Run(way, func(t *testing.T) {
			if testing.Short() && way == "stopped" {
				t.Skip("takes 14 s")
			}
			t.Parallel()
			r := startRedis(t, "--appendonly", "yes", "--appendfsync", "always") // everysec may lose what was answered
			beds := r.relays(2, "-beat", "1s")
			stream := beds[0].subscribe(variantOf("stream"), "a", "user=ada").begin()
			first := beds[1].post("a", "before")
			for h := stream.next(); h.text != "before"; h = stream.next() {
			}
			if way == "stopped" {
				r.cmd.Process.Signal(syscall.SIGSTOP)
			} else {
				r.kill()
			}
			start := time.Now()
			status, h, body := beds[0].tryPost("a", "lost or not")
			took := time.Since(start)
			if status != 503 || h.Get("Retry-After") == "" || took > 2500*time.Millisecond || way == "stopped" && !strings.Contains(body, "may have been published") {
				t.Errorf("a publish: %d %v %s, after %v", status, h, body, took)
			}
			if status, h, _ := beds[0].tryPost("a?key=k", "lost or not"); status != 503 || h.Get("Retry-After") == "" {
				t.Errorf("a publish with a key: %d", status)
			}
			beds[0].subscribe(variantOf("poll"), "a", fmt.Sprint("after=", first-1)).expect("message before")
			beds[1].subscribe(variantOf("poll"), "a", fmt.Sprint("after=", first)).expect("beat")
			stream.expect("beat", "beat", "beat")
			if way == "stopped" {
				for end := time.Now().Add(12 * time.Second); ; time.Sleep(50 * time.Millisecond) {
					if res, _ := beds[0].do("GET", "/healthz", ""); res.StatusCode == 503 {
						break
					}
					if time.Now().After(end) {
						t.Fatal("/healthz does not say that Redis is away")
					}
				}
				r.cmd.Process.Signal(syscall.SIGCONT)
			} else {
				r.start()
			}
			for end := time.Now().Add(10 * time.Second); ; time.Sleep(50 * time.Millisecond) {
				if status, _, _ := beds[1].tryPost("a?key=after", "after"); status == 201 {
					break
				}
				if time.Now().After(end) {
					t.Fatal("Redis is back, and publishes are not")
				}
			}
			for h := stream.next(); h.text != "after"; h = stream.next() {
				if h.kind == "gap" || h.kind == "message" && h.text != "lost or not" {
					t.Errorf("received %s", h.json)
				}
			}
			for _, b := range beds {
				for end := time.Now().Add(10 * time.Second); ; time.Sleep(50 * time.Millisecond) {
					if res, _ := b.do("GET", "/healthz", ""); res.StatusCode == 200 {
						break
					}
					if time.Now().After(end) {
						t.Fatal("Redis is back, and /healthz does not say so")
					}
				}
			}
			if _, body := beds[1].do("GET", "/rooms/a/presence", ""); !strings.Contains(body, `"ada":"online"`) {
				t.Errorf("present are %s", body)
			}
		})
	}
}

// A publish whose answer is lost is done once with a key; without one nobody knows.
func TestRedisLostAnswer(t *testing.T) {
	r := startRedis(t)
	proxy, cut := cuttingProxy(t, r.addr)
	b := startInstance(t, "127.0.0.1:0", "redis://"+proxy).testbed()
	b.post("a", "first") // now Redis knows the script
	watch := r.relays(1)[0].subscribe(variantOf("stream"), "a").begin()
	cut.Store(true)
	if status, _, body := b.tryPost("a?key=k", "with a key"); status != 200 {
		t.Errorf("with a key: %d %s, want 200: it was published before", status, body)
	}
	cut.Store(true)
	if status, _, body := b.tryPost("a", "without"); status != 503 || !strings.Contains(body, "may have been published") {
		t.Errorf("without a key: %d %s", status, body)
	}
	r.relays(1)[0].post("a", "the end")
	watch.expect("message with a key", "message without", "message the end")
}

// cuttingProxy leads to Redis. When cut is set, it loses the answer to the next publish, and
// the connection with it.
func cuttingProxy(t *testing.T, addr string) (string, *atomic.Bool) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	cut := &atomic.Bool{}
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			to, err := net.Dial("tcp", addr)
			if err != nil {
				conn.Close()
				return
			}
			var mute atomic.Bool
			go func() {
				defer to.Close()
				b := make([]byte, 64<<10)
				for {
					n, err := conn.Read(b)
					if err != nil {
						return
					}
					if bytes.Contains(b[:n], []byte("\r\npublish\r\n")) && cut.Swap(false) {
						mute.Store(true)
					}
					to.Write(b[:n])
				}
			}()
			go func() {
				defer conn.Close()
				b := make([]byte, 64<<10)
				for {
					n, err := to.Read(b)
					if err != nil || mute.Load() {
						return
					}
					conn.Write(b[:n])
				}
			}()
		}
	}()
	return l.Addr().String(), cut
}

// Redis that lost everything, or was set back: readers are sent a gap, and new events flow.
func TestRedisLosesItsData(t *testing.T) {
	r := startRedis(t)
	beds := r.relays(2, "-beat", "1s")
	last := beds[0].post("a", "before")
	for end := time.Now().Add(10 * time.Second); beds[1].cursor() < last && time.Now().Before(end); time.Sleep(time.Millisecond) {
	}
	for _, how := range []func(){
		func() { r.do("FLUSHALL") },
		func() { r.kill(); r.start() },                                            // without its data
		func() { r.do("DEL", "{cometes}:state") },                                 // evicted
		func() { r.do("HSET", "{cometes}:state", "id", "5", "1", "3", "2", "4") }, // another's
		func() { r.do("XTRIM", "{cometes}:messages", "MAXLEN", "0"); r.do("HSET", "{cometes}:state", "1", "7") },
	} {
		after := fmt.Sprint("after=", last)
		streams := []*eventReader{beds[0].subscribe(variantOf("stream"), "a", after).begin(), beds[1].subscribe(variantOf("sse"), "a", after).begin()}
		how()
		id := int64(0)
		for end := time.Now().Add(10 * time.Second); id == 0 && time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
			_, _, body := beds[0].tryPost("a?key="+fmt.Sprint(last), "after")
			var answer struct{ ID int64 }
			json.Unmarshal([]byte(body), &answer)
			id = answer.ID
		}
		if id <= last {
			t.Errorf("the id %d came after %d", id, last)
		}
		for _, e := range streams {
			var got []string
			for h := e.next(); h.text != "after"; h = e.next() {
				if h.kind != "beat" {
					got = append(got, h.kind)
				}
			}
			if !slices.Equal(got, []string{"gap"}) {
				t.Errorf("before the new event came %q, want a gap", got)
			}
			e.close()
		}
		last = id
	}
}

// The users of an instance that is killed are offline everywhere within 30 s, told once; and
// its clients go on elsewhere without a gap.
func TestRedisKilledInstance(t *testing.T) {
	if testing.Short() {
		t.Skip("takes 25 s")
	}
	t.Parallel()
	r := startRedis(t)
	dies := r.relay()
	client := dies.testbed().subscribe(variantOf("stream"), "a", "user=ada", "client=one").begin()
	beds := r.relays(2)
	p := newPresenceScript(t, beds, "b")
	newRemoteTestbed(t, dies.testbed().url).subscribe(variantOf("stream"), "b", "user=ada", "client=two").begin()
	p.told("ada online")
	id := beds[0].post("a", "one")
	for h := client.next(); h.text != "one"; h = client.next() {
	}
	dies.end(syscall.SIGKILL)
	beds[1].post("a", "two")
	beds[0].subscribe(variantOf("sse"), "a", fmt.Sprint("Last-Event-ID: ", id)).begin().expect("message two")
	start := time.Now()
	for body := "ada"; strings.Contains(body, "ada"); time.Sleep(100 * time.Millisecond) {
		if _, body = beds[0].do("GET", "/rooms/b/presence", ""); time.Since(start) > 30*time.Second {
			t.Fatal("after 30 s she is still there")
		}
	}
	p.told("ada offline")
}

// What cannot be Redis, or not ours, is a clear error at the start, without the password.
func TestRedisThatCannotBeUsed(t *testing.T) {
	r := startRedis(t, "--requirepass", "pass wörd")
	replica := startRedis(t, "--replicaof", "127.0.0.1 1")
	typed := startRedis(t)
	for _, key := range []string{"messages", "signals", "users"} {
		typed.do("SET", "{"+key+"}:"+key, "something else")
	}
	page, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go http.Serve(page, http.NotFoundHandler())
	t.Cleanup(func() { page.Close() })
	tlsServer := httptest.NewUnstartedServer(http.NotFoundHandler())
	tlsServer.Config.ErrorLog = log.New(io.Discard, "", 0)
	tlsServer.StartTLS()
	t.Cleanup(tlsServer.Close)
	old := fakeRedis(t, "+OK\r\n", "-ERR unknown command 'EVALSHA'\r\n")
	endless := fakeRedis(t, "+OK\r\n", "*1000000000\r\n")
	for _, tc := range []struct{ url, want string }{
		{"localhost:6379", "redis://user:password@host:port/db"},
		{"redis://:hunter2@[::1", "redis://user:password@host:port/db"},
		{"redis://:hunter2%zz@localhost", "as %40"},
		{"http://:hunter2@localhost", "it begins otherwise"},
		{"redis://:hunter2@", "it names no host"},
		{"redis://:hunter2@localhost/x", "number of a database"},
		{"redis://hunter2@localhost", "user without a password"},
		{"redis://:hunter2@localhost?db=1", "it has a ?"},
		{r.url(), "wants a password"},
		{"redis://:hunter2@" + r.addr, "user or the password in the URL is wrong"},
		{"redis://ada:hunter2@" + r.addr, "user or the password in the URL is wrong"},
		{"redis://:pass%20w%C3%B6rd@" + r.addr + "/99", "out of range"},
		{replica.url(), "is a replica"},
		{typed.url() + " -redis-prefix messages", "a key holds something else"},
		{typed.url() + " -redis-prefix signals", "a key holds something else"},
		{typed.url() + " -redis-prefix users", "a key holds something else"},
		{"redis://:hunter2@" + page.Addr().String(), "not Redis: it says \"HTTP/1.1"},
		{"rediss://:hunter2@" + tlsServer.Listener.Addr().String(), "certificate"},
		{old, "too old"},
		{endless, "not Redis"},
	} {
		t.Run(tc.url, func(t *testing.T) {
			t.Parallel()
			url, flags, _ := strings.Cut(tc.url, " ")
			_, err := tryInstance(t, "127.0.0.1:0", url, strings.Fields(flags)...)
			if err == nil || !strings.Contains(err.Error(), tc.want) || strings.Contains(err.Error(), "hunter2") {
				t.Errorf("%q, want %q", err, tc.want)
			}
		})
	}
	for _, url := range []string{"redis://:pass%20w%C3%B6rd@" + r.addr + "/3", "redis://default:pass%20w%C3%B6rd@" + r.addr} {
		i := startInstance(t, "127.0.0.1:0", url)
		i.testbed().post("a", "hi")
		i.terminate()
		if strings.Contains(i.log.String(), "rd@") || strings.Contains(i.log.String(), "rd\\") {
			t.Errorf("the log has the password:\n%s", &i.log)
		}
	}
}

// By rediss:// everything is encrypted, and the certificate is verified: who has signed it, and
// for which host.
func TestRedisTLS(t *testing.T) {
	out, err := exec.Command("redis-server", "--port", "0", "--tls-port", "-1").CombinedOutput() // either way an error
	if errors.Is(err, exec.ErrNotFound) || strings.Contains(string(out), "Bad directive") {
		if os.Getenv("CI") == "true" {
			t.Fatal("there is no redis-server with TLS, and CI has to have it: apt-get install redis-server")
		}
		t.Skip("there is no redis-server with TLS: apt-get install redis-server")
	}
	dir := t.TempDir()
	authority := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	key := certify(t, dir+"/trusted", authority, authority, nil)
	certify(t, dir+"/another", authority, authority, nil)
	certify(t, dir+"/server", &x509.Certificate{SerialNumber: big.NewInt(2), NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{{127, 0, 0, 1}}, DNSNames: []string{"redis.example"}}, authority, key)
	r := startRedis(t, "--tls-cert-file", dir+"/server.pem", "--tls-key-file", dir+"/server.key", "--tls-ca-cert-file", dir+"/trusted.pem", "--tls-auth-clients", "no", "--requirepass", "secret")
	_, port, _ := net.SplitHostPort(r.addr)
	for _, tc := range []struct{ url, trusted, want string }{
		{"rediss://:secret@127.0.0.1:" + port, "another", "certificate signed by unknown authority"},
		{"rediss://:secret@localhost:" + port, "trusted", "certificate is valid for redis.example, not localhost"},
		{"rediss://:wrong@127.0.0.1:" + port, "trusted", "the password in the URL is wrong"},
		{"rediss://:secret@127.0.0.1:" + port, "trusted", ""},
	} {
		t.Setenv("SSL_CERT_FILE", dir+"/"+tc.trusted+".pem") // for the instances
		t.Setenv("SSL_CERT_DIR", dir+"/none")
		if tc.want == "" {
			a, b := startInstance(t, "127.0.0.1:0", tc.url).testbed(), startInstance(t, "127.0.0.1:0", tc.url).testbed()
			stream := b.subscribe(variantOf("stream"), "a").begin()
			a.post("a", strings.Repeat("x", 50_000))
			stream.expect("message " + strings.Repeat("x", 50_000))
		} else if _, err := tryInstance(t, "127.0.0.1:0", tc.url); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s trusting %s: %v, want %q", tc.url, tc.trusted, err, tc.want)
		}
	}
}

// certify writes a certificate and its key to files, signed by another's key, or its own if
// that is nil.
func certify(t *testing.T, file string, c, by *x509.Certificate, byKey *ecdsa.PrivateKey) *ecdsa.PrivateKey {
	key, err := ecdsa.GenerateKey(elliptic.P256(), crand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.CreateCertificate(crand.Reader, c, by, &key.PublicKey, cmp.Or(byKey, key))
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	os.WriteFile(file+".pem", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert}), 0o600)
	os.WriteFile(file+".key", pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: private}), 0o600)
	return key
}

// fakeRedis answers the first command with one thing, and all others with another.
func fakeRedis(t *testing.T, first, others string) (url string) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				b := make([]byte, 64<<10)
				for answer := first; ; answer = others {
					if _, err := conn.Read(b); err != nil {
						return
					}
					io.WriteString(conn, answer)
				}
			}()
		}
	}()
	return "redis://" + l.Addr().String()
}

// Whatever somebody else writes to our keys is skipped, and said once.
func TestRedisForeignEntries(t *testing.T) {
	r := startRedis(t)
	i := r.relay()
	b := i.testbed()
	before := b.post("a", "before")
	stream := b.subscribe(variantOf("stream"), "a").begin()
	big := strings.Repeat("x", 2<<20)
	good := fmt.Sprintf("%d 1795000000000 0 - message a\n\n", before)
	for n, fields := range [][]any{
		{"a", "b"},
		{"event", ""},
		{"event", "\n\n"},
		{"event", strings.TrimSpace(good)},
		{"event", good + "{"},
		{"event", good + "1\n2"},
		{"event", good + "1", "another", "field"},
		{"event", strings.Replace(good, "\n\n", "\n\x00\n", 1) + "1"},
		{"event", good + big},
		{"event", good + strconv.Quote(big)},
		{"event", fmt.Sprintf("%d 1 0 - message _stats\n\n1", before)},
		{"event", fmt.Sprintf("%d 1 0 - hello a\n\n1", before)},
		{"event", fmt.Sprintf("%d 1 -5 - x a\n\n1", before)},
		{"event", "9999999999999999999 1 0 - message a\n\n1"},
		{"event", fmt.Sprintf("%d 1 60000 x presence a\nada\ndancing", before)},
	} {
		r.do(append([]any{"XADD", "{cometes}:messages", fmt.Sprint(before, "-", n+1)}, fields...)...)
		r.do(append([]any{"XADD", "{cometes}:signals", "*"}, fields...)...)
	}
	r.do("HSET", "{cometes}:users", "a ada", "dancing x ", "nonsense", "", "_a b", "online x ", "b "+big, "online x ")
	b.post("a", "after")
	stream.expect("message after")
	next := r.relays(1)[0]
	next.subscribe(variantOf("poll"), "a", fmt.Sprint("after=", before-1)).expect("message before", "message after")
	next.post("a", "and on")
	stream.expect("message and on")
	i.terminate()
	if n := strings.Count(i.log.String(), "is not of a relay"); n != 1 || strings.Contains(i.log.String(), "panic") {
		t.Errorf("it was said %d times, want once:\n%s", n, &i.log)
	}
}

// Behind a load balancer without stickiness each poll goes to another instance, and each
// event comes once; every technique works.
func TestRedisBehindNginx(t *testing.T) {
	nginx, err := exec.LookPath("nginx")
	if err != nil {
		if nginx = "/usr/sbin/nginx"; exec.Command(nginx, "-v").Run() != nil {
			if os.Getenv("CI") == "true" {
				t.Fatal("nginx is not installed, and CI has to have it")
			}
			t.Skip("nginx is not installed: apt-get install nginx")
		}
	}
	conf, err := os.ReadFile("deploy/nginx-many.conf")
	if err != nil {
		t.Fatal(err)
	}
	servers := ""
	for _, b := range startRedis(t).relays(3, "-trust-proxy") {
		servers += "server " + strings.TrimPrefix(b.url, "http://") + ";\n"
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	dir, addr := t.TempDir(), l.Addr().String()
	text := strings.NewReplacer("server relay:8080;", servers, "listen 8080;", "listen "+addr+";", "http {", "pid nginx.pid;\nhttp {\nclient_body_temp_path body;\nproxy_temp_path proxy;\nfastcgi_temp_path fastcgi;\nuwsgi_temp_path uwsgi;\nscgi_temp_path scgi;").Replace(string(conf))
	os.WriteFile(dir+"/nginx.conf", []byte(text), 0o644)
	cmd := exec.Command(nginx, "-p", dir, "-c", dir+"/nginx.conf", "-g", "daemon off;")
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Signal(syscall.SIGTERM); cmd.Wait() })
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if conn, err := net.Dial("tcp", addr); err == nil {
			conn.Close()
			break
		} else if time.Now().After(end) {
			t.Fatal(err)
		}
	}
	b := newRemoteTestbed(t, "http://"+addr)
	start := b.post("a", "start")
	var readers []*eventReader
	instances := map[string]bool{}
	for _, v := range variants {
		if !v.forPeople {
			e := b.subscribe(v, "a", fmt.Sprint("after=", start))
			if v.streams() {
				var hello struct{ Instance string }
				json.Unmarshal([]byte(e.next().data), &hello)
				instances[hello.Instance] = true
			}
			readers = append(readers, e)
		}
	}
	if len(instances) != 3 {
		t.Errorf("the streams are at %d instances, want all 3", len(instances))
	}
	for i := range 100 {
		b.post("a", fmt.Sprint(i))
		for _, e := range readers {
			h := e.next()
			for h.kind == "beat" { // an instance that has not read it yet
				h = e.next()
			}
			if h.text != fmt.Sprint(i) {
				t.Fatalf("%s received %s, want %d", e.name, h.json, i)
			}
		}
	}
}
