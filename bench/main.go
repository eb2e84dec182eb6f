// Bench measures the relay against the floor (the least a Go server can do), against nchan in
// nginx where it is installed, and counts that nothing is lost or doubled.
//
//	go run ./bench [flags] shape...      shapes: see the list in main, or "all" (about 20 minutes)
//	go run ./bench -check                counts only, under a minute, for CI
//	go run ./bench techniques            what each technique costs
//
// Reading order: main.go (what is run, and the tables), run.go (one server, its clients, one
// window of time), client.go (parsing and counting), net_linux.go (how bytes are read), floor.go
// and nchan.conf (what we compare with), server.go and proc.go (processes, and what the kernel
// knows of them).
package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"math"
	"net/http"
	"os"
	"os/signal"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
	"unicode/utf8"
)

// A bench is what the command line asked for.
type bench struct {
	addr, bin, args    string
	pid, n, rounds     int
	duration           time.Duration
	cgroupMax          int64
	techniques, server string
	cheap              bool
	after              time.Duration
	only               string
	redisURL           string
	tmp                string
}

func main() {
	if len(os.Args) == 3 {
		switch os.Args[1] {
		case "floor":
			fail(floor(os.Args[2]))
		case "handler":
			fail(handler(os.Args[2]))
		}
	}
	var b bench
	flag.StringVar(&b.addr, "addr", "", "measure the relay that runs at this address, with -pid")
	flag.IntVar(&b.pid, "pid", 0, "process of the relay at -addr")
	flag.StringVar(&b.bin, "bin", "", "the relay's binary; built if empty")
	flag.StringVar(&b.args, "args", "", "more flags for the relay")
	flag.IntVar(&b.n, "n", 0, "clients, instead of the shape's own number")
	flag.DurationVar(&b.duration, "d", 20*time.Second, "how long a row publishes")
	flag.IntVar(&b.rounds, "rounds", 0, "rounds of each row (1; burst: 5)")
	flag.Int64Var(&b.cgroupMax, "cgroup", 0, "run the relay in a memory cgroup of so many bytes")
	flag.StringVar(&b.techniques, "technique", "", "only these techniques, comma separated")
	flag.StringVar(&b.server, "server", "", "only these servers of relay, relay1 (on one processor), floor, nchan, handler; comma separated")
	flag.BoolVar(&b.cheap, "cheap", false, "of hostile, only three rows, for CI")
	flag.DurationVar(&b.after, "after", time.Minute, "of hostile, how long after an attack memory is measured")
	flag.StringVar(&b.only, "only", "", "of hostile, only rows whose names contain one of these, comma separated")
	check := flag.Bool("check", false, "1,000 clients of every technique; fail if anything is lost, doubled or out of order")
	timeout := flag.Duration("timeout", 45*time.Minute, "end everything after this")
	flag.Parse()

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, *timeout)
	defer cancel()
	if err := b.run(ctx, *check, flag.Args()); err != nil {
		cancel()
		fail(err)
	}
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, "bench:", err)
	os.Exit(1)
}

func (b *bench) run(ctx context.Context, check bool, shapes []string) (err error) {
	if b.tmp, err = os.MkdirTemp("", "cometes-bench"); err != nil {
		return err
	}
	defer os.RemoveAll(b.tmp)
	if err := raiseFiles(); err != nil {
		return err
	}
	list := []struct {
		name string
		run  func(context.Context) error
	}{
		{"start", b.startup},
		{"publish", b.publish},
		{"fanout", b.fanout},
		{"rooms", b.rooms},
		{"burst", b.burst},
		{"idle", b.idle},
		{"pictures", b.pictures},
		{"longpoll", b.longpoll},
		{"presence", b.presence},
		{"stalled", b.stalled},
		{"techniques", b.costs},
		{"hostile", b.hostile},
		{"redis", b.redis},
	}
	var names []string
	for _, s := range list {
		names = append(names, s.name)
	}
	for _, s := range shapes {
		if !slices.Contains(names, s) && s != "all" {
			return fmt.Errorf("no shape %q; there are %s, all", s, strings.Join(names, ", "))
		}
	}
	if len(shapes) == 0 && !check {
		return fmt.Errorf("which shape? There are %s, all; or -check", strings.Join(names, ", "))
	}
	fmt.Printf("Measured on %s.\n", machine())
	if check {
		return b.check(ctx)
	}
	for _, s := range list {
		if slices.Contains(shapes, s.name) || slices.Contains(shapes, "all") {
			fmt.Printf("\n### %s\n", s.name)
			if e := s.run(ctx); e != nil {
				err = errors.Join(err, fmt.Errorf("%s: %w", s.name, e))
			}
			if ctx.Err() != nil {
				break
			}
		}
	}
	return err
}

// pick is the flag's comma separated list, or else the shape's own.
func pick(flag string, own ...string) []string {
	if flag == "" {
		return own
	}
	return strings.Split(flag, ",")
}

func or(n, own int) int {
	if n == 0 {
		return own
	}
	return n
}

// compare runs one spec on the floor, on nchan and on the relay's techniques. Where there are
// several rounds they alternate, since a machine's speed drifts, and the one of median CPU is shown.
func (b *bench) compare(ctx context.Context, sp spec, techniques ...string) (rows []result, err error) {
	var all []spec
	for _, sp.server = range pick(b.server, "floor", "nchan", "relay") {
		list := map[string][]string{"floor": {"sse"}, "nchan": {"sse", "ws"}}[sp.server]
		if list == nil {
			list = pick(b.techniques, techniques...)
		}
		for _, sp.technique = range list {
			all = append(all, sp)
		}
	}
	rounds := make([][]result, len(all))
	for range or(b.rounds, max(sp.rounds, 1)) {
		for i, sp := range all {
			r, e := b.row(ctx, sp)
			if ctx.Err() != nil {
				return rows, ctx.Err()
			} else if errors.Is(e, errAbsent) {
				fmt.Fprintln(os.Stderr, e)
			} else if e != nil {
				err = errors.Join(err, fmt.Errorf("%s %s: %w", sp.server, sp.technique, e))
			} else {
				rounds[i] = append(rounds[i], r)
			}
		}
	}
	for _, rs := range rounds {
		if len(rs) == 0 {
			continue
		}
		slices.SortFunc(rs, func(a, b result) int { return cmp.Compare(perEvent(a), perEvent(b)) })
		r := rs[len(rs)/2]
		r.lost, r.doubled, r.disorder, r.total.gaps, r.remarks = 0, 0, 0, 0, "" // of these, those of all rounds
		for _, o := range rs {
			r.lost, r.doubled, r.disorder, r.total.gaps, r.remarks = r.lost+o.lost, r.doubled+o.doubled, r.disorder+o.disorder, r.total.gaps+o.total.gaps, r.remarks+o.remarks
		}
		r.least, r.most = perEvent(rs[0]), perEvent(rs[len(rs)-1])
		rows = append(rows, r)
	}
	return rows, err
}

var streams = []string{"sse", "stream", "multipart", "iframe", "html", "ws"}

func (b *bench) fanout(ctx context.Context) error {
	sp := spec{n: or(b.n, 10000), rooms: 1, pubs: 1, rate: 1, messages: int(b.duration.Seconds()), settle: 3 * time.Second}
	fmt.Printf("\nOne room, %d clients, a message of %d bytes a second for %v.\n\n", sp.n, payload, b.duration)
	rows, err := b.compare(ctx, sp, streams...)
	show(rows, cServer, cTechnique, cConnected, cConnect, cLost, cDoubled, cP50, cP99, cMax, cP99x, cCPU, cCPUx, cIdle, cAfter, cPeak, cBytes)
	return err
}

func (b *bench) rooms(ctx context.Context) error {
	sp := spec{n: or(b.n, 10000), pubs: 4, settle: 3 * time.Second}
	sp.rooms = max(1, sp.n/10)
	sp.rate, sp.messages = float64(sp.rooms), sp.rooms*int(b.duration.Seconds())
	fmt.Printf("\n%d rooms with 10 clients each, a message a second in each, for %v.\n\n", sp.rooms, b.duration)
	rows, err := b.compare(ctx, sp, "sse", "ws")
	show(rows, cServer, cTechnique, cConnected, cLost, cDoubled, cP50, cP99, cMax, cP99x, cCPU, cCPUx, cIdle, cAfter, cPeak, cBytes)
	return err
}

// burst is measured several times: where a write finds its reader awake it costs half of one that
// must wake it, and which of the two a run settles into is the scheduler's luck.
func (b *bench) burst(ctx context.Context) error {
	sp := spec{n: or(b.n, 1000), rooms: 1, pubs: 8, messages: 1000, settle: time.Second, keep: 2000, rounds: 5}
	fmt.Printf("\nOne room, %d clients, %d messages as fast as %d publishers can; relay and nchan keep %d. Median of %d rounds, lost and doubled of all.\n\n", sp.n, sp.messages, sp.pubs, sp.keep, or(b.rounds, sp.rounds))
	rows, err := b.compare(ctx, sp, "sse", "stream", "ws")
	show(rows, cServer, cTechnique, cConnected, cLost, cDoubled, cP50, cP99, cMax, cRate, cCPU, cSpread, cCPUx, cPeak, cBytes)
	return err
}

func (b *bench) idle(ctx context.Context) error {
	sp := spec{n: or(b.n, 10000), rooms: 1, settle: 3 * time.Second, idle: time.Minute}
	fmt.Printf("\n%d clients in one room, nothing published for %v; heartbeats go on.\n\n", sp.n, sp.idle)
	rows, err := b.compare(ctx, sp, "sse", "stream", "ws")
	show(rows, cServer, cTechnique, cConnected, cConnect, cIdle,
		column{"KB/client after", cAfter.show},
		cPeak,
		column{"CPU, % of a core", func(r, _ result) string { return num(100*r.cpu.Seconds()/r.window.Seconds(), 2) }},
		column{"bytes/client/min", func(r, _ result) string { return num(float64(r.down)/float64(r.n)/r.window.Minutes(), 0) }})
	return err
}

// longpoll: each message answers all, and all ask again, so requests are deliveries. The bare
// handler is net/http without a relay.
func (b *bench) longpoll(ctx context.Context) (err error) {
	sp := spec{technique: "longpoll", n: or(b.n, 10000), rooms: 1, pubs: 1, rate: 1, messages: int(b.duration.Seconds()), settle: 3 * time.Second}
	fmt.Printf("\nOne room, %d clients that wait by long-poll and ask again, a message a second for %v.\n\n", sp.n, b.duration)
	var rows []result
	for range or(b.rounds, 1) {
		for _, sp.server = range pick(b.server, "handler", "nchan", "relay") {
			r, err := b.row(ctx, sp)
			if errors.Is(err, errAbsent) {
				fmt.Fprintln(os.Stderr, err)
				continue
			}
			if err != nil {
				return err
			}
			rows = append(rows, r)
		}
	}
	show(rows, cServer, cConnected, cLost, cDoubled, cP50, cP99, cMax, cIdle, cAfter, cPeak,
		column{"requests", func(r, _ result) string { return fmt.Sprint(r.requests) }},
		column{"CPU µs/request", func(r, _ result) string { return num(r.cpu.Seconds()*1e6/float64(r.requests), 1) }},
		column{"requests/s per core", func(r, _ result) string { return num(float64(r.requests)/r.cpu.Seconds(), 0) }})
	return nil
}

// stalled compares a room of readers with the same readers beside as many who stop reading. First
// more than a socket's buffers hold is sent to each, so that the kernel's buffers of those who stopped are full.
// pictures is a camera: one publishes ten frames a second, and many watch.
func (b *bench) pictures(ctx context.Context) error {
	sp := spec{server: "relay", technique: "multipart?as=image", n: or(b.n, 1000), rooms: 1, pubs: 1, rate: 10, messages: 10 * int(b.duration.Seconds()), picture: 16 << 10, settle: time.Second}
	fmt.Printf("\nOne room, %d viewers of ten pictures a second, each of %d KB, for %v. A viewer that is slow is sent the newest: the others count as lost.\n\n", sp.n, sp.picture>>10, b.duration)
	r, err := b.row(ctx, sp)
	show([]result{r}, cTechnique, cConnected, cLost, cDoubled, cP50, cP99, cMax, cCPU, cAfter, cPeak, cBytes)
	return err
}

func (b *bench) stalled(ctx context.Context) error {
	n := or(b.n, 2000) / 2
	sp := spec{server: "relay", rooms: 1, pubs: 1, rate: 10, messages: 10 * int(b.duration.Seconds()), fill: 100, settle: 2 * time.Second}
	fmt.Printf("\nOne room; %d messages of 8 KB to fill the buffers of those who stopped reading, then 10 messages of %d bytes a second for %v.\n\n", sp.fill, payload, b.duration)
	for _, sp.technique = range pick(b.techniques, "sse", "ws") {
		var rows []result
		for _, size := range [][2]int{{n, 0}, {2 * n, 0}, {2 * n, n}} {
			sp.n, sp.stall = size[0], size[1]
			r, err := b.row(ctx, sp)
			if err != nil {
				return err
			}
			rows = append(rows, r)
		}
		show(rows, cTechnique,
			column{"reading", func(r, _ result) string { return fmt.Sprint(r.n - r.stall) }},
			column{"stopped", func(r, _ result) string { return fmt.Sprint(r.stall) }},
			cLost, cDoubled, cP50, cP99, cMax,
			column{"p99 × the first row", func(r, _ result) string { return num(r.p99/rows[0].p99, 2) }},
			cCPU, cAfterMB, cPeak,
			column{"peak × the second row", func(r, _ result) string { return num(r.peak/rows[1].peak, 2) }},
			column{"held at the end", func(r, _ result) string { return fmt.Sprint(r.files) }})
		fmt.Println()
	}
	return nil
}

// check asserts counts and nothing else: it means the same on a slow machine as on a fast one.
func (b *bench) check(ctx context.Context) error {
	n := or(b.n, 1000)
	var specs []spec
	for _, t := range pick(b.techniques, append(streams, "longpoll", "poll", "jsonp")...) {
		specs = append(specs, spec{technique: t, n: n, rooms: 1, pubs: 1, rate: 10, messages: 10})
	}
	specs = append(specs,
		spec{technique: "sse", n: n, rooms: max(1, n/10), pubs: 4, rate: float64(n / 4), messages: n / 2},
		spec{technique: "sse", n: n, rooms: 1, pubs: 8, messages: 500, keep: 1000},
		spec{technique: "ws", n: n, rooms: 1, pubs: 8, messages: 500, keep: 1000})
	var rows []result
	var bad []string
	for _, sp := range specs {
		sp.server, sp.settle = "relay", 300*time.Millisecond
		r, err := b.row(ctx, sp)
		if err != nil {
			return fmt.Errorf("%s: %w", sp.technique, err)
		}
		rows = append(rows, r)
		if r.lost != 0 || r.doubled != 0 || r.disorder != 0 || r.total.connected != sp.n || r.total.closed != 0 || r.remarks != "" {
			bad = append(bad, sp.technique)
		}
	}
	fmt.Println()
	show(rows, cTechnique, column{"rooms", func(r, _ result) string { return fmt.Sprint(r.spec.rooms) }},
		column{"messages", func(r, _ result) string { return fmt.Sprint(r.messages) }}, cConnected, cDelivered, cLost, cDoubled, cDisorder)
	if bad != nil {
		return fmt.Errorf("not every event came once and in order: %s", strings.Join(bad, ", "))
	}
	return nil
}

// publish compares a POST to a room without readers with one to a handler that reads the body and answers:
// by one caller, who waits for each answer, and by as many as keep the server busy. The two take
// turns of a quarter second, since the machine's speed drifts; × is the median of their ratios.
func (b *bench) publish(ctx context.Context) error {
	const turn = 250 * time.Millisecond
	turns := max(1, int(b.duration/turn))
	names := pick(b.server, "handler", "relay")
	fmt.Printf("\nPOST of %d bytes without subscribers; medians of %d turns of %v.\n\n", payload, turns, turn)
	lines := [][]string{{"callers", "server", "requests/s", "×", "CPU µs/request", "×"}}
	for _, callers := range []int{1, 8} {
		var posters []*poster
		for _, name := range names {
			p, err := b.poster(ctx, name, callers)
			if err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
			defer p.srv.stop()
			posters = append(posters, p)
		}
		for range turns {
			for _, p := range posters {
				if err := p.post(turn); err != nil {
					return fmt.Errorf("%s: %w", p.srv.name, err)
				}
			}
		}
		for _, p := range posters {
			lines = append(lines, []string{fmt.Sprint(callers), p.srv.name, num(median(p.rates), 0), num(ratio(p.rates, posters[0].rates), 2), num(median(p.cpus), 1), num(ratio(p.cpus, posters[0].cpus), 2)})
		}
	}
	table(lines)
	return nil
}

// A poster is a server and who posts to it, with what each of its turns showed: requests a second,
// and microseconds of CPU for each.
type poster struct {
	srv         *server
	callers     []*caller
	rates, cpus []float64
}

func (b *bench) poster(ctx context.Context, name string, callers int) (*poster, error) {
	srv, err := b.start(ctx, name, 0)
	if err != nil {
		return nil, err
	}
	p := &poster{srv: srv, callers: make([]*caller, callers)}
	for i := range p.callers {
		if p.callers[i], err = dial(ctx, srv.addr); err != nil {
			srv.stop()
			return nil, err
		}
	}
	return p, nil
}

// post takes a turn.
func (p *poster) post(d time.Duration) error {
	var done sync.WaitGroup
	counts, errs := make([]int, len(p.callers)), make([]error, len(p.callers))
	start, before := time.Now(), cpuTime(p.srv.pids)
	for i, c := range p.callers {
		done.Go(func() {
			for errs[i] == nil && time.Since(start) < d {
				_, errs[i] = c.do("POST", "/rooms/quiet", "text/plain", []byte(strings.Repeat("x", payload)))
				counts[i]++
			}
		})
	}
	done.Wait()
	sum := 0.0
	for _, n := range counts {
		sum += float64(n)
	}
	p.rates = append(p.rates, sum/time.Since(start).Seconds())
	p.cpus = append(p.cpus, (cpuTime(p.srv.pids)-before).Seconds()*1e6/sum)
	return errors.Join(errs...)
}

func median(f []float64) float64 {
	f = slices.Sorted(slices.Values(f))
	return f[len(f)/2]
}

// ratio is the median of the ratios of the two, turn by turn.
func ratio(f, to []float64) float64 {
	var r []float64
	for i := range f {
		r = append(r, f[i]/to[i])
	}
	return median(r)
}

// startup measures the stripped binary: its size, and the time from exec to the first answer.
func (b *bench) startup(ctx context.Context) error {
	bin, err := b.build(ctx)
	if err != nil {
		return err
	}
	info, err := os.Stat(bin)
	if err != nil {
		return err
	}
	if b.addr != "" {
		return nil
	}
	var times []time.Duration
	for range 10 {
		start := time.Now()
		srv, err := b.start(ctx, "relay", 0)
		if err != nil {
			return err
		}
		resp, err := http.Get("http://" + srv.addr + "/healthz")
		times = append(times, time.Since(start))
		srv.stop()
		if err != nil {
			return err
		}
		resp.Body.Close()
	}
	slices.Sort(times)
	fmt.Printf("\nBinary of %.1f MB (stripped, unless -bin gave another); from start to first answer %.1f ms (median of %d).\n", float64(info.Size())/1e6, times[len(times)/2].Seconds()*1000, len(times))
	return nil
}

// presence has all clients join one room, each as a user of its own, counts the bytes that this
// sends them, asks how many users there are, and has all leave.
func (b *bench) presence(ctx context.Context) error {
	sp := spec{server: "relay", n: or(b.n, 10000), rooms: 1, users: true}
	fmt.Printf("\n%d clients join one room, each as a user of its own, and leave; 10 s of watching after each.\n\n", sp.n)
	lines := [][]string{{"technique", "joined, s", "users counted", "CPU of joining, s", "KB sent to each", "KB/client", "peak MB", "CPU of leaving, s", "users after"}}
	for _, sp.technique = range pick(b.techniques, "sse", "ws") {
		x, err := b.open(ctx, sp)
		if err != nil {
			return err
		}
		count := func() string {
			resp, err := http.Get("http://" + x.srv.addr + "/rooms/r0/presence")
			if err != nil {
				return err.Error()
			}
			defer resp.Body.Close()
			var who struct{ Count int }
			if err := json.NewDecoder(resp.Body).Decode(&who); err != nil {
				return err.Error()
			}
			return fmt.Sprint(who.Count)
		}
		pause(ctx, 10*time.Second)
		joined := cpuTime(x.srv.pids) - x.cpu
		rss, peak := memory(x.srv.pids)
		here := count()
		received := float64(x.swarm.now().down) / float64(sp.n) / 1000
		cpu := cpuTime(x.srv.pids)
		x.swarm.stop()
		err = pause(ctx, 22*time.Second) // 10 s of grace, a tick, and 10 s
		left := cpuTime(x.srv.pids) - cpu
		lines = append(lines, []string{sp.technique, num(x.took.Seconds(), 2), here, num(joined.Seconds(), 2), num(received, 1),
			num((rss-x.base)/float64(sp.n)/1024, 1), num(peak/1e6, 0), num(left.Seconds(), 2), count()})
		x.close()
		if err != nil {
			return err
		}
	}
	table(lines)
	return nil
}

// costs is the table of the techniques: what an event costs each of them, when events are many and when
// they are few. Requests and bytes are those of a browser. A stream's one opening request is not
// counted, since it lasts; connections stand when the window begins. The window of "one a minute"
// is the minute after one event, whole: heartbeats, repeated long-polls and polls in vain are in
// it, nothing is scaled. "nobody" is a relay without clients to which the same events are published, divided
// by as many: what of the CPU is the process's own. All techniques run at the same time, each on a relay process of its own,
// so that this takes three minutes and the CPU of each is still known; together they load the machine little.
func (b *bench) costs(ctx context.Context) error {
	list := pick(b.techniques, "poll", "longpoll", "jsonp", "stream", "multipart", "iframe", "html", "refresh", "sse", "ws", "nobody")
	n := or(b.n, 100)
	fmt.Printf("\n%d clients of each technique; poll asks once a second, refresh as often as the page says. Bytes are of HTTP: heads, framing and bodies.\n", n)
	windows := []struct {
		title string
		n     int // events, a second apart
		d     time.Duration
	}{{"One event a second", int(b.duration.Seconds()), b.duration}, {"One event a minute", 1, time.Minute}}
	rows := make([][2]result, len(list))
	work := func(i int) error {
		if err := pause(ctx, time.Duration(i)*100*time.Millisecond); err != nil { // not all at the same moment
			return err
		}
		sp := spec{server: "relay", technique: list[i], n: n, rooms: 1, browser: true}
		if list[i] == "nobody" {
			sp.n = 0
		}
		x, err := b.open(ctx, sp)
		if err != nil {
			return err
		}
		defer x.close()
		for w, win := range windows {
			lead := 2*x.swarm.every() + time.Second/2 // until those who poll are spread, and what was before has arrived
			if w == 1 {
				err = pause(ctx, lead)
				lead = 0
			}
			published := make(chan error, 1)
			go func() { published <- x.publish(ctx, win.n+int(math.Ceil(lead.Seconds())), 1, 1, payload) }()
			err = errors.Join(err, pause(ctx, lead))
			r, err2 := x.measure(ctx, func() (time.Time, error) { return time.Now().Add(win.d), pause(ctx, win.d) })
			err = errors.Join(err, err2, <-published, pause(ctx, x.swarm.every()))
			if err != nil {
				return err
			}
			r.lost = x.swarm.expected(x.published) - x.swarm.now().delivered
			rows[i][w] = r
		}
		return nil
	}
	if _, err := b.build(ctx); err != nil && b.addr == "" {
		return err
	}
	errs := make([]error, len(list))
	var g sync.WaitGroup
	for i := range list {
		g.Go(func() { errs[i] = work(i) })
		if b.addr != "" { // one relay serves one technique at a time, or the CPU of each could not be known
			g.Wait()
		}
	}
	g.Wait()
	for w, win := range windows {
		fmt.Printf("\n%s:\n\n", win.title)
		lines := [][]string{{"technique", "requests/event", "bytes up/event", "bytes down/event", "median latency, ms", "CPU ms/client/hour", "lost", "doubled"}}
		for i, t := range list {
			r := rows[i][w]
			per := 1 / float64(r.n*win.n)
			lines = append(lines, []string{t, num(float64(r.requests)*per, 2), num(float64(r.up)*per, 0), num(float64(r.down)*per, 0), num(r.p50, 1),
				num(r.cpu.Seconds()*1000/float64(n)*3600/win.d.Seconds(), 1), fmt.Sprint(r.lost), fmt.Sprint(r.doubled)})
		}
		table(lines)
	}
	return errors.Join(errs...)
}

// A column shows one figure of a row; show's second argument is the floor's row.
type column struct {
	name string
	show func(r, floor result) string
}

var (
	cServer    = column{"server", func(r, _ result) string { return r.server }}
	cTechnique = column{"technique", func(r, _ result) string { return r.technique }}
	cConnected = column{"connected", func(r, _ result) string { return fmt.Sprint(r.total.connected) }}
	cConnect   = column{"connect all, s", func(r, _ result) string { return num(r.took.Seconds(), 2) }}
	cDelivered = column{"delivered", func(r, _ result) string { return fmt.Sprint(r.delivered) }}
	cLost      = column{"lost", func(r, _ result) string { return fmt.Sprint(r.lost) }}
	cDoubled   = column{"doubled", func(r, _ result) string { return fmt.Sprint(r.doubled) }}
	cDisorder  = column{"out of order", func(r, _ result) string { return fmt.Sprint(r.disorder) }}
	cP50       = column{"p50 ms", func(r, _ result) string { return num(r.p50, 1) }}
	cP99       = column{"p99 ms", func(r, _ result) string { return num(r.p99, 1) }}
	cMax       = column{"max ms", func(r, _ result) string { return num(r.max, 1) }}
	cP99x      = column{"p99 × floor", func(r, f result) string { return num(r.p99/f.p99, 2) }}
	cRate      = column{"events/s", func(r, _ result) string { return num(float64(r.delivered)/r.window.Seconds(), 0) }}
	cCPU       = column{"CPU µs/event", func(r, _ result) string { return num(perEvent(r), 1) }}
	cCPUx      = column{"CPU × floor", func(r, f result) string { return num(perEvent(r)/perEvent(f), 2) }}
	cSpread    = column{"least–most", func(r, _ result) string { return num(r.least, 1) + "–" + num(r.most, 1) }}
	cIdle      = column{"KB/client idle", func(r, _ result) string { return num((r.rss-r.base)/float64(r.n)/1024, 1) }}
	cAfter     = column{"KB/client after", func(r, _ result) string { return num((r.after-r.base)/float64(r.n)/1024, 1) }}
	cAfterMB   = column{"MB after", func(r, _ result) string { return num(r.after/1e6, 1) }}
	cPeak      = column{"peak MB", func(r, _ result) string { return num(r.peak/1e6, 1) }}
	cBytes     = column{"bytes/event", func(r, _ result) string { return num(float64(r.down)/float64(r.delivered), 0) }}
)

func perEvent(r result) float64 { return r.cpu.Seconds() * 1e6 / float64(r.delivered) }

// num shows a figure, or a dash for what could not be measured.
func num(f float64, digits int) string {
	if math.IsNaN(f) || math.IsInf(f, 0) {
		return "–"
	}
	return fmt.Sprintf("%.*f", digits, f)
}

// show prints the rows and, below them, what is no figure.
func show(rows []result, columns ...column) {
	floor := result{p99: math.NaN()}
	lines := [][]string{nil}
	for _, c := range columns {
		lines[0] = append(lines[0], c.name)
	}
	for _, r := range rows {
		if r.server == "floor" {
			floor = r
		}
	}
	for _, r := range rows {
		var line []string
		for _, c := range columns {
			line = append(line, c.show(r, floor))
		}
		lines = append(lines, line)
	}
	table(lines)
	for _, r := range rows {
		remarks := r.remarks
		if r.total.closed > 0 {
			remarks += fmt.Sprintf(" %d connections ended by the server.", r.total.closed)
		}
		if r.total.gaps > 0 {
			remarks += fmt.Sprintf(" %d gaps sent.", r.total.gaps)
		}
		if r.disorder > 0 && (r.server != "nchan" || r.pubs < 2) { // nchan's order is not in the events
			remarks += fmt.Sprintf(" %d events out of order.", r.disorder)
		}
		if remarks != "" {
			fmt.Printf("\n%s %s: %s\n", r.server, r.technique, strings.TrimSpace(remarks))
		}
	}
}

// table prints aligned markdown. Columns of figures are set to the right.
func table(lines [][]string) {
	width := make([]int, len(lines[0]))
	for _, line := range lines {
		for i, cell := range line {
			width[i] = max(width[i], utf8.RuneCountInString(cell), 3)
		}
	}
	for n, line := range lines {
		fmt.Print("|")
		for i, cell := range line {
			fill := strings.Repeat(" ", width[i]-utf8.RuneCountInString(cell))
			if words(lines, i) {
				fmt.Printf(" %s%s |", cell, fill)
			} else {
				fmt.Printf(" %s%s |", fill, cell)
			}
		}
		if n == 0 {
			fmt.Print("\n|")
			for i, w := range width {
				if words(lines, i) {
					fmt.Print(strings.Repeat("-", w+2), "|")
				} else {
					fmt.Print(strings.Repeat("-", w+1), ":|")
				}
			}
		}
		fmt.Println()
	}
}

func words(lines [][]string, column int) bool {
	return lines[0][column] == "connections" || lines[0][column] == "server" || lines[0][column] == "technique"
}
