// Counting: what each technique costs, for /metrics, for the room _stats, and
// for whoever wants to compare. Bytes are those of requests and answers with
// their heads, as far as net/http lets one know them; of connections taken
// over every byte is known.

package main

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"runtime"
	"runtime/metrics"
	"slices"
	"strings"
	"sync/atomic"
	"time"
)

// A tally is what one technique did since the start.
type tally struct {
	requests    atomic.Int64
	connections atomic.Int64 // open now
	events      atomic.Int64 // delivered
	in, out     atomic.Int64 // bytes
	delays      [len(delayBounds) + 1]atomic.Int64
	delaySum    atomic.Int64 // milliseconds
}

// delayBounds are the upper ends of the histogram of delivery delay, in
// milliseconds from publishing to writing; an event waits that long at most
// in its batch.
var delayBounds = [...]int64{1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 5000}

// stats are all that is counted.
type stats struct {
	started   time.Time
	published atomic.Int64
	in        atomic.Int64 // bytes of publishes
	dropped   atomic.Int64 // clients that took nothing for writeTimeout, or had too much waiting for them
	skipped   atomic.Int64 // messages that a graph of numbers could not show
	ticking   atomic.Bool  // the room _stats is published to
	asked     atomic.Int64 // when it was last asked for, Unix nanoseconds
	tallies   map[string]*tally
	refused   map[string]*atomic.Int64 // by reason
}

// reasons are what a request or connection is refused for.
var reasons = []string{"address", "body", "connections", "descriptors", "origin", "pictures", "rate", "room", "rooms", "streams", "token", "users"}

// refused counts a refusal.
func (s *server) refused(reason string) {
	if n := s.stats.refused[reason]; n != nil { // there is none for what is no limit, such as a name that is not well formed
		n.Add(1)
	}
}

// start sets all to nothing.
func (st *stats) start() {
	st.started = time.Now()
	st.tallies = map[string]*tally{}
	for _, t := range techniques {
		st.tallies[t.name] = &tally{}
	}
	st.refused = map[string]*atomic.Int64{}
	for _, reason := range reasons {
		st.refused[reason] = &atomic.Int64{}
	}
}

// A count is what a writer adds up before it tells the tally: two writers that
// add to one number for each event wait for each other's cache.
type count struct {
	t           *tally
	events, out int64
	delays      [len(delayBounds) + 1]int64
	delaySum    int64
}

// delivered counts events of a technique that were written at the time now, in
// Unix milliseconds, in so many bytes.
func (c *count) delivered(t *tally, events []*event, bytes int, now int64) {
	if c.t != t {
		c.flush()
		c.t = t
	}
	c.out += int64(bytes)
	for _, e := range events {
		if e.at == 0 {
			continue // a notice
		}
		c.events++
		delay := now - e.at
		i := 0
		for i < len(delayBounds) && delay > delayBounds[i] {
			i++
		}
		c.delays[i]++
		c.delaySum += delay
	}
}

// flush tells the tally.
func (c *count) flush() {
	if c.t == nil {
		return
	}
	c.t.events.Add(c.events)
	c.t.out.Add(c.out)
	c.t.delaySum.Add(c.delaySum)
	for i, n := range c.delays {
		if n > 0 {
			c.t.delays[i].Add(n)
		}
	}
	*c = count{}
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
	return r.idlest.Len(), r.leases, r.bytes
}

// maxListed is how many rooms a list has.
const maxListed = 1000

// A roomInfo is what an operator is told of a room.
type roomInfo struct {
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
func (r *relay) list(prefix string, most int) (rooms []roomInfo, more bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	rooms = []roomInfo{}
	add := func(rm *room) {
		if !strings.HasPrefix(rm.name, prefix) || !validName(rm.name) { // a room of pictures is nobody's
			return
		}
		if more = len(rooms) == most; more {
			return
		}
		v := rm.view.Load()
		info := roomInfo{rm.name, len(rm.readers), rm.here, len(v.messages), rm.messageBytes + rm.signalBytes, rm.newest(), 0}
		for _, log := range [][]*event{v.messages, v.signals} {
			if len(log) > 0 {
				info.Time = max(info.Time, log[len(log)-1].at)
			}
		}
		rooms = append(rooms, info)
	}
	for el := r.idlest.Front(); el != nil && !more; el = el.Next() {
		add(el.Value.(*room))
	}
	for _, name := range slices.Sorted(maps.Keys(r.rooms)) {
		if rm := r.rooms[name]; rm.place == nil && !more {
			add(rm)
		}
	}
	return rooms, more
}

// metrics is GET /metrics, in Prometheus' text format
// (https://prometheus.io/docs/instrumenting/exposition_formats/).
func (s *server) metrics(w http.ResponseWriter) {
	var b strings.Builder
	one := func(name, kind, help string, value any) {
		fmt.Fprintf(&b, "# HELP cometes_%s %s\n# TYPE cometes_%[1]s %[3]s\ncometes_%[1]s %[4]v\n", name, help, kind, value)
	}
	each := func(name, kind, help string, value func(*tally) int64) {
		fmt.Fprintf(&b, "# HELP cometes_%s %s\n# TYPE cometes_%[1]s %[3]s\n", name, help, kind)
		for _, t := range techniques {
			fmt.Fprintf(&b, "cometes_%s{technique=%q} %d\n", name, t.name, value(s.stats.tallies[t.name]))
		}
	}
	rooms, users, bytes := s.relay.size()
	one("start_time_seconds", "gauge", "When the relay started, Unix time.", s.stats.started.Unix())
	one("published_total", "counter", "Events published.", s.stats.published.Load())
	one("published_bytes_total", "counter", "Bytes of requests to publish, heads included.", s.stats.in.Load())
	one("gaps_total", "counter", "Gaps told to readers.", s.relay.gaps.Load())
	one("dropped_total", "counter", "Clients dropped because they took nothing for too long or, with all others, had too much waiting for them.", s.stats.dropped.Load())
	one("skipped_total", "counter", "Messages that a graph of numbers could not show.", s.stats.skipped.Load())
	one("rooms", "gauge", "Rooms with a history.", rooms)
	one("users", "gauge", "Users present, counted by room.", users)
	one("history_bytes", "gauge", "Bytes of events kept.", bytes)
	one("memory_bytes", "gauge", "Memory the runtime has from the system.", memory())
	one("goroutines", "gauge", "Goroutines.", runtime.NumGoroutine())
	fmt.Fprintf(&b, "# HELP cometes_refused_total Requests and connections refused.\n# TYPE cometes_refused_total counter\n")
	for _, reason := range reasons {
		fmt.Fprintf(&b, "cometes_refused_total{reason=%q} %d\n", reason, s.stats.refused[reason].Load())
	}
	each("requests_total", "counter", "Requests.", func(t *tally) int64 { return t.requests.Load() })
	each("connections", "gauge", "Requests and streams that are held open.", func(t *tally) int64 { return t.connections.Load() })
	each("delivered_total", "counter", "Events written to clients.", func(t *tally) int64 { return t.events.Load() })
	each("received_bytes_total", "counter", "Bytes of requests, heads included.", func(t *tally) int64 { return t.in.Load() })
	each("sent_bytes_total", "counter", "Bytes of answers, heads included.", func(t *tally) int64 { return t.out.Load() })

	const delay = "cometes_delivery_delay_seconds"
	fmt.Fprintf(&b, "# HELP %s From publishing to writing.\n# TYPE %[1]s histogram\n", delay)
	for _, technique := range techniques {
		t := s.stats.tallies[technique.name]
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

// statsRoom is where the relay publishes what it counts, once a second, while
// somebody reads it.
const (
	statsRoom  = "_stats"
	statsEvery = time.Second
)

// startStats begins to publish to the room _stats, unless that goes on already.
func (s *server) startStats() {
	s.stats.asked.Store(time.Now().UnixNano())
	if s.stats.ticking.CompareAndSwap(false, true) {
		time.AfterFunc(0, s.publishStats)
	}
}

// publishStats publishes what was counted, and again after statsEvery, for as
// long as the room is read.
func (s *server) publishStats() {
	rooms, users, bytes := s.relay.size()
	type total struct {
		Connections int64 `json:"connections"`
		Requests    int64 `json:"requests"`
		Delivered   int64 `json:"delivered"`
		In          int64 `json:"in"`
		Out         int64 `json:"out"`
	}
	techniques := map[string]total{}
	for name, t := range s.stats.tallies {
		techniques[name] = total{t.connections.Load(), t.requests.Load(), t.events.Load(), t.in.Load(), t.out.Load()}
	}
	data, _ := json.Marshal(map[string]any{
		"techniques": techniques,
		"published":  s.stats.published.Load(),
		"in":         s.stats.in.Load(),
		"gaps":       s.relay.gaps.Load(),
		"dropped":    s.stats.dropped.Load(),
		"skipped":    s.stats.skipped.Load(),
		"rooms":      rooms,
		"users":      users,
		"history":    bytes,
		"memory":     memory(),
		"goroutines": runtime.NumGoroutine(),
		"uptime":     int64(time.Since(s.stats.started).Seconds()),
	})
	_, _, err := s.relay.publish(post{room: statsRoom, kind: "stats", data: data, unmetered: true})
	if err == nil && s.statsWanted() {
		time.AfterFunc(statsEvery, s.publishStats)
		return
	}
	s.stats.ticking.Store(false)
	if err == nil && s.statsWanted() { // by who came in between
		s.startStats()
	}
}

// statsWanted reports whether somebody reads the room _stats, or asked for it
// lately: who polls, and who has not its place in the room yet.
func (s *server) statsWanted() bool {
	return s.relay.isRead(statsRoom) || time.Since(time.Unix(0, s.stats.asked.Load())) < 5*statsEvery
}

// isRead reports whether the room has readers.
func (r *relay) isRead(name string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	rm := r.rooms[name]
	return rm != nil && len(rm.readers) > 0
}
