// Counting: what each technique costs, for /metrics, for the room _stats, and for
// operators, who can list the rooms. Without this file nothing is counted.
//
// Bytes are those of requests and answers with their heads, as far as net/http lets one
// know them.

package main

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"runtime"
	"runtime/metrics"
	"slices"
	"strings"
	"sync/atomic"
	"time"
)

// stats are all counters.
type stats struct {
	server         *server
	started        time.Time
	published      atomic.Int64
	publishedBytes atomic.Int64 // of requests to publish
	gaps           atomic.Int64 // sent to subscribers
	dropped        atomic.Int64 // clients that took nothing for writeTimeout, or had too much waiting for them
	skipped        atomic.Int64 // messages that a graph of numbers could not show
	ticking        atomic.Bool  // the room _stats is published to
	readAt         atomic.Int64 // when _stats was last asked for, Unix nanoseconds
	techniques     map[*technique]*techniqueStats
	refused        map[string]*atomic.Int64 // by reason
	shared         func() any               // describes the relays that share a log, if there are more; nil without
	elsewhere      bool                     // /metrics has an address of its own
	gauges         []gauge
}

// A gauge is a number of another layer.
type gauge struct {
	name, help string
	value      func() int64
}

// techniqueStats are what one technique did since the start.
type techniqueStats struct {
	requests atomic.Int64
	events   atomic.Int64 // delivered
	in, out  atomic.Int64 // bytes
	delays   [len(delayBounds) + 1]atomic.Int64
	delaySum atomic.Int64 // milliseconds
}

// delayBounds are the upper ends of the histogram of delivery delay, in
// milliseconds from publishing to writing; an event waits that long at most
// in its batch.
var delayBounds = [...]int64{1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 5000}

// reasons are what a request or connection is refused for.
var reasons = []string{"address", "body", "connections", "descriptors", "memory", "origin", "pictures", "rate", "redis", "room", "rooms", "streams", "token", "users"}

// newStats counts what the server does.
func newStats(s *server) *stats {
	st := &stats{server: s, started: time.Now(), techniques: map[*technique]*techniqueStats{}, refused: map[string]*atomic.Int64{}}
	for _, t := range s.techniques {
		st.techniques[t] = &techniqueStats{}
	}
	for _, reason := range reasons {
		st.refused[reason] = &atomic.Int64{}
	}
	s.count = func() counter { return (&statsBatch{all: st}).add }
	s.refused = st.countRefusal
	s.dropped = func() { st.dropped.Add(1) }
	publish := s.publish
	s.publish = func(p publishRequest) (int64, bool, error) {
		id, isNew, err := publish(p)
		if isNew {
			st.published.Add(1)
		}
		return id, isNew, err
	}
	return st
}

// countRefusal counts a refusal. A reason that is no limit, such as a bad name, is not counted.
func (st *stats) countRefusal(reason string) {
	if n := st.refused[reason]; n != nil {
		n.Add(1)
	}
}

// A statsBatch is what one writer counts before it adds to the techniqueStats: two
// writers that add to one number for each event would wait for each other's cache.
type statsBatch struct {
	all         *stats
	of          *techniqueStats
	t           *technique
	events, out int64
	gaps        int64
	delays      [len(delayBounds) + 1]int64
	delaySum    int64
}

// add counts events of a technique that were written in so many bytes at the time now,
// in Unix milliseconds. Without a technique it ends the batch.
func (b *statsBatch) add(t *technique, events []*event, bytes int, now int64) {
	if b.t != t {
		b.flush()
		b.t, b.of = t, b.all.techniques[t]
	}
	b.out += int64(bytes)
	for _, e := range events {
		if e.publishedAt == 0 {
			if e.kind == "gap" {
				b.gaps++
			}
			continue
		}
		b.events++
		delay := now - e.publishedAt
		i := 0
		for i < len(delayBounds) && delay > delayBounds[i] {
			i++
		}
		b.delays[i]++
		b.delaySum += delay
	}
}

func (b *statsBatch) flush() {
	if b.of == nil {
		return
	}
	b.of.events.Add(b.events)
	b.of.out.Add(b.out)
	b.of.delaySum.Add(b.delaySum)
	b.all.gaps.Add(b.gaps)
	for i, n := range b.delays {
		if n > 0 {
			b.of.delays[i].Add(n)
		}
	}
	*b = statsBatch{all: b.all}
}

// requested counts a request that net/http did not see.
func (st *stats) requested(t *technique, bytes int) {
	st.techniques[t].requests.Add(1)
	st.received(t, bytes)
}

// received counts bytes that a WebSocket's client sent.
func (st *stats) received(t *technique, bytes int) { st.techniques[t].in.Add(int64(bytes)) }

// wrap returns a handler that counts requests, and answers /metrics and GET /rooms.
func (st *stats) wrap(next http.Handler) http.Handler {
	s := st.server
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/metrics" && !st.elsewhere {
			s.answer(w, r, st.handleMetrics)
			return
		}
		path, isRoom := strings.CutPrefix(r.URL.EscapedPath(), "/rooms")
		if isRoom && path == "" {
			s.answer(w, r, func(w http.ResponseWriter, r *http.Request) error {
				_, p := withPermit(r)
				return s.handle(w, r, &request{permit: p}, readMethods, p.rights.read, st.listRooms)
			})
			return
		}
		if !isRoom {
			next.ServeHTTP(w, r)
			return
		}
		verb := path[strings.LastIndexByte(path, '/')+1:]
		if r.Method == http.MethodPost || r.Method == http.MethodPut {
			if strings.Count(path, "/") == 1 {
				st.publishedBytes.Add(requestSize(r))
				r.Body = &countedBody{r.Body, &st.publishedBytes}
			}
		} else if t := s.technique(verb); t != nil && r.Method != http.MethodOptions {
			c := st.techniques[t]
			c.requests.Add(1)
			c.in.Add(requestSize(r))
			if strings.Contains(path, statsRoom) {
				st.start(r)
			}
			defer func() {
				if w.Header()["Date"] == nil && t.name != "ws" { // else the connection was taken over
					c.out.Add(headSize(len("HTTP/1.1 200 OK"), w.Header()))
				}
			}()
		}
		next.ServeHTTP(w, r)
	})
}

// A countedBody counts the bytes that were read of a body.
type countedBody struct {
	io.ReadCloser
	n *atomic.Int64
}

func (b *countedBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	b.n.Add(int64(n))
	return n, err
}

// headSize is how many bytes a head has on the wire, with a first line of so many.
func headSize(first int, h http.Header) int64 {
	n := first + len("\r\n\r\n")
	for name, values := range h {
		for _, v := range values {
			n += len(name) + len(": \r\n") + len(v)
		}
	}
	return int64(n)
}

// requestSize is how many bytes a request's head had on the wire.
func requestSize(r *http.Request) int64 {
	return headSize(len(r.Method)+len(r.RequestURI)+len("  HTTP/1.1"), r.Header) + int64(len("Host: \r\n")+len(r.Host))
}

// memory is how many bytes the Go runtime has from the system.
func memory() uint64 {
	s := []metrics.Sample{{Name: "/memory/classes/total:bytes"}, {Name: "/memory/classes/heap/released:bytes"}}
	metrics.Read(s)
	return s[0].Value.Uint64() - s[1].Value.Uint64()
}

// size is how much the relay holds.
func (r *relay) size() (rooms, users, bytes int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.lru.Len(), r.leases, r.bytes
}

// maxListed is how many rooms a list has.
const maxListed = 1000

// A roomStatus describes a room to an operator.
type roomStatus struct {
	Room     string `json:"room"`
	Readers  int    `json:"readers"`
	Users    int    `json:"users"`
	Messages int    `json:"messages"`
	Bytes    int    `json:"bytes"`  // of messages and signals
	Newest   int64  `json:"newest"` // message, or 0
	Time     int64  `json:"time"`   // of the newest event, Unix milliseconds, or 0
}

// list returns the rooms whose names begin with prefix, the one published to last
// first, then those that are only read; so many at most, and whether there are more.
func (r *relay) list(prefix string, most int) (rooms []roomStatus, more bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	rooms = []roomStatus{}
	add := func(rm *room) {
		if !strings.HasPrefix(rm.name, prefix) {
			return
		}
		if more = len(rooms) == most; more {
			return
		}
		v := rm.history.Load()
		info := roomStatus{rm.name, len(rm.subscriptions), rm.online, len(v.messages), rm.messageBytes + rm.signalBytes, v.newest(), 0}
		for _, log := range [][]*event{v.messages, v.signals} {
			if len(log) > 0 {
				info.Time = max(info.Time, log[len(log)-1].publishedAt)
			}
		}
		rooms = append(rooms, info)
	}
	for el := r.lru.Front(); el != nil && !more; el = el.Next() {
		add(el.Value.(*room))
	}
	for _, name := range slices.Sorted(maps.Keys(r.rooms)) {
		if rm := r.rooms[name]; rm.lruElem == nil && !more {
			add(rm)
		}
	}
	return rooms, more
}

// listRooms is GET /rooms, for operators.
func (st *stats) listRooms(w http.ResponseWriter, r *http.Request, q *request) error {
	if err := q.permit.rights.operate(); err != nil {
		return err
	}
	prefix := q.param("prefix")
	if q.err != nil {
		return q.err
	}
	if err := q.permit.quota.reserve(maxListed * 500); err != nil { // bytes, while it is made
		return err
	}
	rooms, more := st.server.relay.list(prefix, maxListed)
	writeJSON(w, http.StatusOK, map[string]any{"rooms": rooms, "more": more})
	return nil
}

// handleMetrics is GET /metrics, for those who may read _stats.
func (st *stats) handleMetrics(w http.ResponseWriter, r *http.Request) error {
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		w.Header().Set("Allow", "GET, HEAD")
		return newError(http.StatusMethodNotAllowed, r.Method+" is not for this path; GET, HEAD are")
	}
	_, p := withPermit(r)
	if err := p.rights.read(statsRoom); err != nil {
		return err
	}
	st.metrics(w)
	return nil
}

// listen serves /metrics on an address of its own, if there is one, and no longer
// beside the rest.
func (st *stats) listen(addr string) (stop func() error, err error) {
	if addr == "" {
		return func() error { return nil }, nil
	}
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, err
	}
	st.elsewhere = true
	mux := http.NewServeMux()
	mux.HandleFunc("GET /metrics", func(w http.ResponseWriter, r *http.Request) { st.metrics(w) })
	srv := &http.Server{Handler: mux, ReadTimeout: requestTimeout, WriteTimeout: answerTimeout}
	go srv.Serve(l)
	return srv.Close, nil
}

// metrics writes all counters in Prometheus' text format
// (https://prometheus.io/docs/instrumenting/exposition_formats/).
func (st *stats) metrics(w http.ResponseWriter) {
	var b strings.Builder
	one := func(name, kind, help string, value any) {
		fmt.Fprintf(&b, "# HELP cometes_%s %s\n# TYPE cometes_%[1]s %[3]s\ncometes_%[1]s %[4]v\n", name, help, kind, value)
	}
	each := func(name, kind, help string, value func(*technique, *techniqueStats) int64) {
		fmt.Fprintf(&b, "# HELP cometes_%s %s\n# TYPE cometes_%[1]s %[3]s\n", name, help, kind)
		for _, t := range st.server.techniques {
			fmt.Fprintf(&b, "cometes_%s{technique=%q} %d\n", name, t.name, value(t, st.techniques[t]))
		}
	}
	rooms, users, bytes := st.server.relay.size()
	one("start_time_seconds", "gauge", "When the relay started, Unix time.", st.started.Unix())
	one("published_total", "counter", "Events published.", st.published.Load())
	one("published_bytes_total", "counter", "Bytes of requests to publish, heads included.", st.publishedBytes.Load())
	one("gaps_total", "counter", "Gaps sent to subscribers.", st.gaps.Load())
	one("dropped_total", "counter", "Clients dropped because they took nothing for too long or, with all others, had too much waiting for them.", st.dropped.Load())
	one("skipped_total", "counter", "Messages that a graph of numbers could not show.", st.skipped.Load())
	one("rooms", "gauge", "Rooms with a history.", rooms)
	one("users", "gauge", "Users present, counted by room.", users)
	one("history_bytes", "gauge", "Bytes of events kept.", bytes)
	one("memory_bytes", "gauge", "Memory the runtime has from the system.", memory())
	one("unsent_bytes", "gauge", "Bytes that streams have not taken yet.", st.server.unsentBytes.Load())
	for _, g := range st.gauges {
		one(g.name, "gauge", g.help, g.value())
	}
	one("goroutines", "gauge", "Goroutines.", runtime.NumGoroutine())
	fmt.Fprintf(&b, "# HELP cometes_refused_total Requests and connections refused.\n# TYPE cometes_refused_total counter\n")
	for _, reason := range reasons {
		fmt.Fprintf(&b, "cometes_refused_total{reason=%q} %d\n", reason, st.refused[reason].Load())
	}
	each("requests_total", "counter", "Requests.", func(_ *technique, c *techniqueStats) int64 { return c.requests.Load() })
	each("connections", "gauge", "Requests and streams that are held open.", func(t *technique, _ *techniqueStats) int64 { return t.open.Load() })
	each("delivered_total", "counter", "Events written to clients.", func(_ *technique, c *techniqueStats) int64 { return c.events.Load() })
	each("received_bytes_total", "counter", "Bytes of requests, heads included.", func(_ *technique, c *techniqueStats) int64 { return c.in.Load() })
	each("sent_bytes_total", "counter", "Bytes of answers, heads included.", func(_ *technique, c *techniqueStats) int64 { return c.out.Load() })

	const delay = "cometes_delivery_delay_seconds"
	fmt.Fprintf(&b, "# HELP %s From publishing to writing.\n# TYPE %[1]s histogram\n", delay)
	for _, technique := range st.server.techniques {
		t := st.techniques[technique]
		n := int64(0)
		for i, bound := range delayBounds {
			n += t.delays[i].Load()
			fmt.Fprintf(&b, "%s_bucket{technique=%q,le=\"%v\"} %d\n", delay, technique.name, float64(bound)/1000, n)
		}
		n += t.delays[len(delayBounds)].Load()
		fmt.Fprintf(&b, "%s_bucket{technique=%q,le=\"+Inf\"} %d\n", delay, technique.name, n)
		fmt.Fprintf(&b, "%s_sum{technique=%q} %v\n%[1]s_count{technique=%[2]q} %[4]d\n", delay, technique.name, float64(t.delaySum.Load())/1000, n)
	}
	h := w.Header()
	h.Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
	h.Set("Cache-Control", "no-store")
	w.Write([]byte(b.String()))
}

// statsEvery is how often the relay publishes to the room _stats, while somebody reads it.
const statsEvery = time.Second

// start begins to publish to the room _stats, unless that goes on already, if the
// request may read it.
func (st *stats) start(r *http.Request) {
	if _, p := withPermit(r); p.rights.read(statsRoom) != nil {
		return
	}
	st.readAt.Store(time.Now().UnixNano())
	if st.ticking.CompareAndSwap(false, true) {
		time.AfterFunc(0, st.publish)
	}
}

// publish publishes the counters, and again after statsEvery while the room is read.
func (st *stats) publish() {
	r := st.server.relay
	rooms, users, bytes := r.size()
	type total struct {
		Connections int64 `json:"connections"`
		Requests    int64 `json:"requests"`
		Delivered   int64 `json:"delivered"`
		In          int64 `json:"in"`
		Out         int64 `json:"out"`
	}
	techniques := map[string]total{}
	for t, c := range st.techniques {
		techniques[t.name] = total{t.open.Load(), c.requests.Load(), c.events.Load(), c.in.Load(), c.out.Load()}
	}
	var shared any
	if st.shared != nil {
		shared = st.shared()
	}
	data, _ := json.Marshal(map[string]any{
		"instance":   st.server.instance,
		"redis":      shared,
		"techniques": techniques,
		"published":  st.published.Load(),
		"in":         st.publishedBytes.Load(),
		"gaps":       st.gaps.Load(),
		"dropped":    st.dropped.Load(),
		"skipped":    st.skipped.Load(),
		"rooms":      rooms,
		"users":      users,
		"history":    bytes,
		"memory":     memory(),
		"goroutines": runtime.NumGoroutine(),
		"uptime":     int64(time.Since(st.started).Seconds()),
	})
	_, _, err := r.publish(publishRequest{room: statsRoom, kind: "stats", data: data})
	if err == nil && st.wanted() {
		time.AfterFunc(statsEvery, st.publish)
		return
	}
	st.ticking.Store(false)
	if err == nil && st.wanted() && st.ticking.CompareAndSwap(false, true) { // by somebody who came in between
		time.AfterFunc(0, st.publish)
	}
}

// wanted reports whether somebody reads the room _stats, or asked for it lately.
func (st *stats) wanted() bool {
	return st.server.relay.isRead(statsRoom) || time.Since(time.Unix(0, st.readAt.Load())) < 5*statsEvery
}

// isRead reports whether the room has subscribers.
func (r *relay) isRead(name string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	rm := r.rooms[name]
	return rm != nil && len(rm.subscriptions) > 0
}
