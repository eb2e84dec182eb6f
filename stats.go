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
	"sync"
	"sync/atomic"
	"time"
)

// stats are all counters.
type stats struct {
	server         *server
	limiter        *limiter
	started        time.Time
	shared         func() any // describes the relays that share a log, if there are more; nil without
	elsewhere      bool       // /metrics has an address of its own
	published      atomic.Int64
	publishedBytes atomic.Int64 // of requests to publish
	gaps           atomic.Int64 // sent to subscribers
	dropped        atomic.Int64 // clients that took nothing for writeTimeout, or had too much waiting for them
	skipped        atomic.Int64 // messages that a graph of numbers could not show

	mu      sync.Mutex // guards what follows
	traffic map[*technique]*traffic
	refused map[string]int64 // by reason
	ticking bool             // the room _stats is published to
	readAt  time.Time        // when _stats was last asked for
}

// A number is a counter or a gauge of the whole relay.
type number struct {
	name  string // in /metrics, where that of a counter ends with _total
	key   string // in the room _stats, if it is there
	help  string
	value int64
}

// traffic is what one technique did since the start, as it is in the room _stats.
type traffic struct {
	Connections int64 `json:"connections"` // requests and streams that are held now
	Requests    int64 `json:"requests"`
	Delivered   int64 `json:"delivered"` // events
	In          int64 `json:"in"`        // bytes
	Out         int64 `json:"out"`
	delays      [len(delayBounds) + 1]int64
	delaySum    int64 // milliseconds
}

// delayBounds are the upper ends of the histogram of delivery delay, in
// milliseconds from publishing to writing; an event waits that long at most
// in its batch.
var delayBounds = [...]int64{1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 5000}

// reasons are the limits, and the rules of access, that a request or connection is refused for.
var reasons = []string{"address", "body", "connections", "descriptors", "memory", "origin", "pictures", "rate", "redis", "room", "rooms", "streams", "token", "users"}

// newStats counts what the server does.
func newStats(s *server, l *limiter) *stats {
	st := &stats{server: s, limiter: l, started: time.Now(), traffic: map[*technique]*traffic{}, refused: map[string]int64{}}
	for _, t := range s.techniques {
		st.traffic[t] = &traffic{}
	}
	s.count = st.count
	l.dropped = func() { st.dropped.Add(1) }
	s.refused = func(reason string) { // that for a bad name, for example, has no reason, and is not shown
		st.mu.Lock()
		defer st.mu.Unlock()
		st.refused[reason]++
	}
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

// add counts what a technique did.
func (st *stats) add(t *technique, n traffic) {
	st.mu.Lock()
	defer st.mu.Unlock()
	sum := st.traffic[t]
	sum.Requests += n.Requests
	sum.Delivered += n.Delivered
	sum.In += n.In
	sum.Out += n.Out
	sum.delaySum += n.delaySum
	for i, events := range n.delays {
		sum.delays[i] += events
	}
}

// totals returns what each technique did, by its name.
func (st *stats) totals() map[string]traffic {
	st.mu.Lock()
	defer st.mu.Unlock()
	totals := map[string]traffic{}
	for t, n := range st.traffic {
		n.Connections = t.open.Load()
		totals[t.name] = *n
	}
	return totals
}

// newCounter returns a counter for one that writes. It adds up what is written by one
// technique, until it is called for another, or for none: writers that took the lock for
// each event would wait for each other.
func (st *stats) newCounter() counter {
	var of *technique
	var n traffic
	return func(t *technique, events []*event, bytes int, now int64) {
		if t != of {
			if of != nil {
				st.add(of, n)
			}
			of, n = t, traffic{}
		}
		n.Out += int64(bytes)
		for _, e := range events {
			if e.kind == "gap" {
				st.gaps.Add(1)
			}
			if e.publishedAt == 0 { // a notice
				continue
			}
			n.Delivered++
			delay := now - e.publishedAt
			i, _ := slices.BinarySearch(delayBounds[:], delay)
			n.delays[i]++
			n.delaySum += delay
		}
	}
}

// count counts what is written at once.
func (st *stats) count(t *technique, events []*event, bytes int, now int64) {
	add := st.newCounter()
	add(t, events, bytes, now)
	add(nil, nil, 0, 0)
}

// received counts what net/http did not see.
func (st *stats) received(t *technique, requests, bytes int) {
	st.add(t, traffic{Requests: int64(requests), In: int64(bytes)})
}

// wrap returns a handler that counts requests, and answers /metrics and GET /rooms.
func (st *stats) wrap(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		path, isRoom := strings.CutPrefix(r.URL.EscapedPath(), "/rooms")
		_, verb, _ := strings.Cut(strings.TrimPrefix(path, "/"), "/")
		t := st.server.technique(verb)
		isPost := r.Method == http.MethodPost || r.Method == http.MethodPut
		switch {
		case r.URL.Path == "/metrics" && !st.elsewhere:
			st.answer(w, r, []string{statsRoom}, st.handleMetrics)
			return
		case isRoom && path == "":
			st.answer(w, r, nil, st.listRooms)
			return
		case !isRoom || r.Method == http.MethodOptions:
		case isPost && verb == "":
			st.publishedBytes.Add(requestSize(r))
			r.Body = &countedBody{r.Body, &st.publishedBytes}
		case !isPost && t != nil:
			st.add(t, traffic{Requests: 1, In: requestSize(r)})
			if strings.Contains(path, statsRoom) {
				st.start(r)
			}
			defer func() {
				if w.Header()["Date"] == nil && t.name != "ws" { // else the connection was taken over
					st.add(t, traffic{Out: headSize(len("HTTP/1.1 200 OK"), w.Header())})
				}
			}()
		}
		next.ServeHTTP(w, r)
	})
}

// answer calls do for a GET, if the client may read the rooms.
func (st *stats) answer(w http.ResponseWriter, r *http.Request, rooms []string, do handler) {
	st.server.answer(w, r, func(w http.ResponseWriter, r *http.Request) error {
		_, p := withPermit(r)
		return st.server.handle(w, r, &request{rooms: rooms, permit: p}, readMethods, p.rights.read, do)
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

// The list of rooms.

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

// status describes the room. The caller holds relay.mu.
func (rm *room) status() roomStatus {
	h := rm.history.Load()
	status := roomStatus{rm.name, len(rm.subscriptions), rm.online, len(h.messages.events), h.messages.bytes + h.signals.bytes, h.messages.newest(), 0}
	for _, log := range [][]*event{h.messages.events, h.signals.events} {
		if n := len(log); n > 0 {
			status.Time = max(status.Time, log[n-1].publishedAt)
		}
	}
	return status
}

// list returns the rooms whose names begin with prefix, the one published to last
// first, then those that are only read; so many at most, and whether there are more.
func (r *relay) list(prefix string, most int) (list []roomStatus, more bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	var rooms []*room
	for el := r.lru.Front(); el != nil; el = el.Next() {
		rooms = append(rooms, el.Value.(*room))
	}
	for _, name := range slices.Sorted(maps.Keys(r.rooms)) {
		if rm := r.rooms[name]; rm.lruElem == nil {
			rooms = append(rooms, rm)
		}
	}
	rooms = slices.DeleteFunc(rooms, func(rm *room) bool { return !strings.HasPrefix(rm.name, prefix) })
	list = []roomStatus{}
	for _, rm := range rooms[:min(len(rooms), most)] {
		list = append(list, rm.status())
	}
	return list, len(rooms) > most
}

// listRooms is GET /rooms, for operators.
func (st *stats) listRooms(w http.ResponseWriter, r *http.Request, q *request) error {
	if err := q.permit.rights.operate(r); err != nil {
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

// Metrics.

// numbers returns the numbers of the whole relay.
func (st *stats) numbers() []number {
	r := st.server.relay
	r.mu.Lock()
	rooms, users, bytes := r.lru.Len(), r.leases, r.bytes
	r.mu.Unlock()
	memory := []metrics.Sample{{Name: "/memory/classes/total:bytes"}, {Name: "/memory/classes/heap/released:bytes"}}
	metrics.Read(memory)
	return []number{
		{"start_time_seconds", "", "When the relay started, Unix time.", st.started.Unix()},
		{"published_total", "published", "Events published.", st.published.Load()},
		{"published_bytes_total", "in", "Bytes of requests to publish, heads included.", st.publishedBytes.Load()},
		{"gaps_total", "gaps", "Gaps sent to subscribers.", st.gaps.Load()},
		{"dropped_total", "dropped", "Clients dropped because they took nothing for too long or, with all others, had too much waiting for them.", st.dropped.Load()},
		{"skipped_total", "skipped", "Messages that a graph of numbers could not show.", st.skipped.Load()},
		{"rooms", "rooms", "Rooms with a history.", int64(rooms)},
		{"users", "users", "Users present, counted by room.", int64(users)},
		{"history_bytes", "history", "Bytes of events kept.", int64(bytes)},
		{"memory_bytes", "memory", "Memory the runtime has from the system.", int64(memory[0].Value.Uint64() - memory[1].Value.Uint64())},
		{"unsent_bytes", "", "Bytes that streams have not taken yet.", st.limiter.unsentBytes.Load()},
		{"reserved_bytes", "", "Bytes reserved for bodies that arrive, and for answers that clients take.", st.limiter.receipts.inUse()},
		{"open_connections", "", "Connections.", st.limiter.open.Load()},
		{"served_connections", "", "Connections with a request, or between two.", st.limiter.served.inUse()},
		{"goroutines", "goroutines", "Goroutines.", int64(runtime.NumGoroutine())},
	}
}

// listen serves /metrics on an address of its own, if there is one, and no longer
// beside the rest.
func (st *stats) listen(addr string) error {
	if addr == "" {
		return nil
	}
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	st.elsewhere = true
	mux := http.NewServeMux()
	mux.HandleFunc("GET /metrics", func(w http.ResponseWriter, r *http.Request) { st.handleMetrics(w, r, nil) })
	srv := &http.Server{Handler: mux, ReadTimeout: requestTimeout, WriteTimeout: answerTimeout}
	go srv.Serve(l)
	return nil
}

// handleMetrics is GET /metrics, for those who may read _stats.
func (st *stats) handleMetrics(w http.ResponseWriter, _ *http.Request, _ *request) error {
	h := w.Header()
	h.Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
	h.Set("Cache-Control", "no-store")
	io.WriteString(w, st.metrics())
	return nil
}

// metrics returns all counters in Prometheus' text format
// (https://prometheus.io/docs/instrumenting/exposition_formats/).
func (st *stats) metrics() string {
	var b strings.Builder
	head := func(name, kind, help string) {
		if strings.HasSuffix(name, "_total") {
			kind = "counter"
		}
		fmt.Fprintf(&b, "# HELP cometes_%s %s\n# TYPE cometes_%[1]s %[3]s\n", name, help, kind)
	}
	for _, n := range st.numbers() {
		head(n.name, "gauge", n.help)
		fmt.Fprintf(&b, "cometes_%s %d\n", n.name, n.value)
	}
	head("refused_total", "", "Requests and connections refused.")
	st.mu.Lock()
	for _, reason := range reasons {
		fmt.Fprintf(&b, "cometes_refused_total{reason=%q} %d\n", reason, st.refused[reason])
	}
	st.mu.Unlock()
	totals := st.totals()
	each := func(name, help string, value func(traffic) int64) {
		head(name, "gauge", help)
		for _, t := range st.server.techniques {
			fmt.Fprintf(&b, "cometes_%s{technique=%q} %d\n", name, t.name, value(totals[t.name]))
		}
	}
	each("requests_total", "Requests.", func(n traffic) int64 { return n.Requests })
	each("connections", "Requests and streams that are held open.", func(n traffic) int64 { return n.Connections })
	each("delivered_total", "Events written to clients.", func(n traffic) int64 { return n.Delivered })
	each("received_bytes_total", "Bytes of requests, heads included.", func(n traffic) int64 { return n.In })
	each("sent_bytes_total", "Bytes of answers, heads included.", func(n traffic) int64 { return n.Out })
	head("delivery_delay_seconds", "histogram", "From publishing to writing.")
	for _, t := range st.server.techniques {
		n, below := totals[t.name], int64(0)
		for i, bound := range delayBounds {
			below += n.delays[i]
			fmt.Fprintf(&b, "cometes_delivery_delay_seconds_bucket{technique=%q,le=\"%v\"} %d\n", t.name, float64(bound)/1000, below)
		}
		fmt.Fprintf(&b, "cometes_delivery_delay_seconds_bucket{technique=%q,le=\"+Inf\"} %d\n", t.name, n.Delivered)
		fmt.Fprintf(&b, "cometes_delivery_delay_seconds_sum{technique=%q} %v\n", t.name, float64(n.delaySum)/1000)
		fmt.Fprintf(&b, "cometes_delivery_delay_seconds_count{technique=%q} %d\n", t.name, n.Delivered)
	}
	return b.String()
}

// The room _stats.

// statsEvery is how often the relay publishes to the room _stats, while somebody reads it.
const statsEvery = time.Second

// start begins to publish to the room _stats, unless that goes on already, if the
// request may read it.
func (st *stats) start(r *http.Request) {
	if _, p := withPermit(r); p.rights.read(statsRoom) != nil {
		return
	}
	st.mu.Lock()
	defer st.mu.Unlock()
	st.readAt = time.Now()
	if !st.ticking {
		st.ticking = true
		time.AfterFunc(0, st.publish)
	}
}

// publish publishes the counters, and again after statsEvery while somebody reads the
// room, or asked for it lately.
func (st *stats) publish() {
	data, _ := json.Marshal(st.snapshot())
	_, _, err := st.server.relay.publish(publishRequest{room: statsRoom, kind: "stats", data: data})
	isRead := st.server.relay.isRead(statsRoom)
	st.mu.Lock()
	defer st.mu.Unlock()
	st.ticking = err == nil && (isRead || time.Since(st.readAt) < 5*statsEvery)
	if st.ticking {
		time.AfterFunc(statsEvery, st.publish)
	}
}

// snapshot returns the counters as they are published.
func (st *stats) snapshot() map[string]any {
	data := map[string]any{
		"instance":   st.server.instance,
		"uptime":     int64(time.Since(st.started).Seconds()),
		"techniques": st.totals(),
		"redis":      nil,
	}
	if st.shared != nil {
		data["redis"] = st.shared()
	}
	for _, n := range st.numbers() {
		if n.key != "" {
			data[n.key] = n.value
		}
	}
	return data
}

// isRead reports whether the room has subscribers.
func (r *relay) isRead(name string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	rm := r.rooms[name]
	return rm != nil && len(rm.subscriptions) > 0
}
