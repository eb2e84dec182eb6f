// Many instances, one log. Redis (https://redis.io, or what speaks its protocol and has
// streams and scripts) orders the events. Each instance reads all of them, and has the
// whole log in memory as if it were alone: techniques and subscribers know nothing of it.
//
// Ids. A script gives an event its id: Redis' clock in microseconds, but at least idStep
// above the last id and above the newest one that the caller has. So ids do not go back
// while one instance lives, whatever becomes of Redis. The numbers between two ids are for
// what one instance alone has, the room _stats. To append an event with an id, the relay's
// counter is set to just below it.
//
// Loss. Messages and signals are two streams, so that signals never push out a message. An
// entry says which was before it in its stream. If that is not the one that was read last,
// some are missing: Redis was flushed, restarted without its data, replaced by a replica
// that was behind, or dropped entries faster than they were read. Then the floor of all
// rooms rises to there, and subscribers are sent a gap.
//
// Read your writes. A publish is answered when this instance has read the event. Another
// may be behind; a cursor beyond its log makes it read all that Redis has first. While Redis
// is away nobody knows what it has, and such a cursor is taken for good.
//
// Batches. One call of the script is on its way at a time, and behind it the command that
// reads the streams. What is asked for meanwhile waits, and goes with the next. So the more
// is published at once, the less an event costs. While nothing is asked for, a second
// connection waits for news.
//
// Lost answers. A publish may have been done although its answer never came. With a key it
// is sent again, and Redis knows the key. Without one the client is told that nobody knows.
//
// Presence. An instance shares what it knows of its own users. A script keeps which
// instances hold a user, and makes an event of what changes for all: the first that
// holds, the last that lets go, another state. So each is told once. An instance
// that is silent for silentAfter is ended by another, user by user: to do it twice changes
// nothing. After any interruption both sides are compared (reconcile).

package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha1"
	"crypto/tls"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math"
	"math/rand/v2"
	"net/http"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

const (
	idStep         = 16                      // as in the script; above 60,000 events a second ids run ahead of the clock
	publishTimeout = 1900 * time.Millisecond // for a publish, with all its tries
	readTimeout    = 2 * time.Second         // for an instance to read what Redis has
	startTimeout   = 10 * time.Second        // to find Redis, which may be starting, too; and to read all that it has
	beatEvery      = 3 * time.Second         // an instance says that it lives
	silentAfter    = 20 * time.Second        // an instance that did not is dead
	unhealthyAfter = 10 * time.Second        // without a beat
	settleTime     = 10 * time.Second        // after Redis has lost its data, for all to share their users again
	readCount      = 128                     // entries of a stream that are read at once
	awayLookahead  = int64(3600e6)           // while Redis is away a cursor may be an hour ahead
	maxBatch       = 64                      // calls in a batch
	maxBatchBytes  = 256 << 10               // the last call may go beyond
)

//go:embed redis.lua
var redisScript string

// Redis knows a script by its sum once it has seen it.
var redisScriptSum = fmt.Sprintf("%x", sha1.Sum([]byte(redisScript)))

var (
	errRedisAway    = limitError(503, "the relay cannot reach Redis, so nothing was published; try again", "redis", 2)
	errRedisSilent  = limitError(503, "Redis did not answer, so the event may have been published; with a key it is safe to try again", "redis", 2)
	errRedisRefused = limitError(503, "Redis refused this; the log of the relay says why", "redis", 10)
	errUnhealthy    = limitError(503, "the relay cannot reach Redis", "redis", 2)
)

// A redis is the log that instances share.
type redis struct {
	relay    *relay
	server   *server
	target   *redisTarget
	keys     []string   // of every script
	first    *redisLink // as newRedis connected
	events   int
	stopping context.Context
	stop     context.CancelFunc
	ended    chan struct{} // closed when the instance has said that it leaves

	// Used by the goroutine that reads, see redisLink.run.
	last     [2]int64  // the newest of our entries that was read of each stream; -1 before the first
	floor    int64     // the floor of all rooms at the start
	started  bool      // the history was read; what is missing in it was erased
	users    int       // in all rooms, of all instances
	warnedAt time.Time // of an entry that is not ours

	mu          sync.Mutex // guards what follows; may be locked under relay.mu
	link        *redisLink // nil while Redis is away
	back        chan bool  // closed when it is back
	awaySince   time.Time
	beatAt      time.Time   // the last
	read        [2]string   // the position in each stream
	lastShare   *scriptCall // the last state that was shared
	reconcileAt time.Time   // when to compare the users, or the zero time
	settledAt   time.Time   // before, Redis may not have all users
	instances   []instanceStatus
}

// An instanceStatus describes an instance to an operator.
type instanceStatus struct {
	Instance    string `json:"instance"`
	Silent      int64  `json:"silent"` // seconds since its last beat
	Connections int64  `json:"connections"`
	Rooms       int    `json:"rooms"`
	Users       int    `json:"users"`
}

// newRedis has the server share its log by the Redis at the URL, and reads what is there; run
// goes on. Without a URL it returns nil.
func newRedis(s *server, url, prefix string, events int) (*redis, error) {
	if url == "" {
		return nil, nil
	}
	target, err := parseRedisURL(url)
	switch {
	case err != nil:
		return nil, err
	case !validName(prefix):
		return nil, fmt.Errorf("-redis-prefix is 1 to %d of A-Z a-z 0-9 _ . : -", maxName)
	case events < 1:
		return nil, errors.New("-redis-events must be 1 or more")
	}
	target.maxText = int(4*s.maxBody) + 64<<10
	r := s.relay
	d := &redis{relay: r, server: s, target: target, events: events, ended: make(chan struct{}), read: [2]string{"0-0", "0-0"}, last: [2]int64{-1, -1}, back: make(chan bool)}
	for _, name := range []string{"state", "messages", "signals", "keys", "order", "rooms", "users", "instances"} {
		d.keys = append(d.keys, "{"+prefix+"}:"+name) // braces keep them together in a cluster
	}
	d.stopping, d.stop = context.WithCancel(context.Background())
	r.lastID.Store(0)
	r.lookahead = awayLookahead
	r.announceState = func(rm *room, user string, _ *lease, state string, _ time.Time) {
		d.share(rm.name, user, "", cmp.Or(state, "count")) // counted when all know it
	}
	s.publish, s.erase, s.setState, s.subscribe = d.publish, d.erase, d.setPresence, d.subscribe
	for start, pause := time.Now(), 50*time.Millisecond; ; pause *= 2 {
		if d.first, err = d.connect(); err == nil {
			return d, nil
		}
		refusal, isRefusal := errors.AsType[redisError](err)
		isFinal := isRefusal && !strings.HasPrefix(string(refusal), "LOADING") || errors.Is(err, errProtocol)
		if _, isUnsafe := errors.AsType[*tls.CertificateVerificationError](err); isUnsafe || isFinal || time.Since(start) > startTimeout {
			return nil, fmt.Errorf("-redis %s: %w", target.addr, err)
		}
		time.Sleep(pause)
	}
}

// Connecting.

// connect makes the two connections, and reads all that the streams have.
func (d *redis) connect() (*redisLink, error) {
	l := &redisLink{redis: d}
	l.more.L = &l.mu
	var err error
	if l.conn, err = d.target.dial(); err == nil {
		l.news, err = d.target.dial()
	}
	if err == nil && d.floor == 0 {
		err = d.begin(l.conn)
	}
	if err == nil {
		go l.run()
		err = d.beat(l, 0)
	}
	if err == nil {
		d.started = true
		d.found(l)
		_, err = l.do(startTimeout, "nothing") // with it the users are compared
	}
	if err != nil {
		l.fail(err)
	}
	return l, err
}

// begin sets the relay's counter, and the floor of all rooms, to where Redis' messages begin.
// An empty Redis begins now.
func (d *redis) begin(conn *redisConn) error {
	commands := [][]string{{"TIME"}, {"HGET", d.keys[0], "born"}, {"XRANGE", d.keys[1], "-", "+", "COUNT", "1"}}
	var replies [3]reply
	for i, command := range commands {
		var err error
		if replies[i], err = conn.do(command...); err != nil {
			return err
		}
	}
	now, born, first := replies[0].list, replies[1].text, replies[2].list
	if len(now) != 2 {
		return errProtocol
	}
	r := d.relay
	r.epoch = cmp.Or(asNumber(born), asNumber(now[0].text)*1e6+asNumber(now[1].text))
	d.floor = r.epoch
	for _, entry := range first {
		d.floor = max(d.floor, parseEntry(0, entry).previous)
	}
	r.floorElsewhere = d.floor
	r.lastID.Store(d.floor)
	return nil
}

// found takes note that Redis is there.
func (d *redis) found(l *redisLink) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.link, d.reconcileAt = l, time.Now()
	close(d.back)
}

// lost takes note that Redis is away, if it was there by this link.
func (d *redis) lost(l *redisLink) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.link == l {
		d.link, d.awaySince, d.back = nil, time.Now(), make(chan bool)
	}
}

// run keeps the instance connected until it stops.
func (d *redis) run() {
	if d == nil {
		return
	}
	defer close(d.ended)
	for l := d.first; ; {
		slog.Info("connected to Redis", "addr", d.target.addr)
		err := l.watch()
		if d.stopping.Err() != nil {
			d.lost(l)
			d.beat(l, silentAfter-leaveGrace) // so others end our leases after leaveGrace
			l.fail(err)
			return
		}
		l.fail(err)
		slog.Warn("Redis is away", "addr", d.target.addr, "error", err)
		for pause := 50 * time.Millisecond; err != nil; pause = min(2*pause, 3*time.Second) {
			select {
			case <-time.After(pause/2 + rand.N(pause)):
			case <-d.stopping.Done():
				return
			}
			l, err = d.connect()
		}
	}
}

// beat says that this instance lives, or did so long ago, and ends others that do not.
func (d *redis) beat(l *redisLink, age time.Duration) error {
	d.relay.mu.Lock()
	status, _ := json.Marshal(instanceStatus{Connections: d.server.active(), Rooms: d.relay.lru.Len(), Users: d.relay.leases})
	d.relay.mu.Unlock()
	answer, err := l.do(startTimeout, "beat", d.server.instance, strconv.Itoa(int(age.Seconds())), string(status))
	if err != nil {
		return err
	}
	if len(answer.list) != 3 {
		return errProtocol
	}
	isKnown, now := answer.list[0].text == "1", asNumber(answer.list[1].text)
	var all []instanceStatus
	for instance, beat := range answer.list[2].hash() {
		at, status, _ := strings.Cut(beat, " ")
		var s instanceStatus
		json.Unmarshal([]byte(status), &s)
		s.Instance, s.Silent = instance, max(0, now-asNumber(at))
		all = append(all, s)
	}
	slices.SortFunc(all, func(a, b instanceStatus) int { return cmp.Compare(a.Instance, b.Instance) })
	d.mu.Lock()
	d.beatAt, d.instances = time.Now(), all
	if !isKnown { // Redis has lost its data, or others took us for dead
		d.reconcileAt = d.beatAt
	}
	d.mu.Unlock()
	for _, s := range all {
		for cursor, silent := "0", int64(silentAfter/time.Second); s.Silent > silent; {
			reply, err := l.do(replyTimeout, "end_silent", s.Instance, strconv.FormatInt(silent, 10), cursor)
			if cursor = reply.text; err != nil || cursor == "0" {
				break
			}
		}
	}
	return nil
}

// Calling the script.

// A redisLink is the two connections to Redis, from when they are made until one fails.
type redisLink struct {
	redis *redis
	conn  *redisConn   // calls the script and reads the streams
	news  *redisConn   // waits until there is something to read
	sent  atomic.Int64 // how many batches

	mu    sync.Mutex // guards what follows
	more  sync.Cond  // signalled when a call is queued, and at the end
	queue []*scriptCall
	err   error // why the link has ended
}

// A scriptCall is one thing that the script is to do.
type scriptCall struct {
	args  []string
	reply reply
	err   error
	done  chan struct{} // closed when there is a reply or an error
}

// do has the script do something, and returns its reply when this instance has read all that
// Redis had by then. With the error errNotSent it was not done, with another it may have been.
func (l *redisLink) do(timeout time.Duration, args ...string) (reply, error) {
	return l.start(args...).wait(timeout)
}

func (l *redisLink) start(args ...string) *scriptCall {
	c := &scriptCall{args: args, done: make(chan struct{})}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.err != nil {
		c.finish(reply{}, errNotSent)
		return c
	}
	l.queue = append(l.queue, c)
	l.more.Signal()
	return c
}

func (c *scriptCall) finish(r reply, err error) {
	c.reply, c.err = r, cmp.Or(err, r.refusal)
	close(c.done)
}

func (c *scriptCall) wait(timeout time.Duration) (reply, error) {
	timer := time.NewTimer(timeout)
	defer timer.Stop()
	select {
	case <-c.done:
		return c.reply, c.err
	case <-timer.C:
		return reply{}, errNoReply
	}
}

// run sends one batch after the other.
func (l *redisLink) run() {
	for {
		batch := l.nextBatch()
		if batch == nil {
			return
		}
		replies, err := l.call(batch)
		if _, isRefusal := err.(redisError); err != nil && !isRefusal {
			l.fail(err)
		}
		for i, c := range batch {
			if err != nil {
				c.finish(reply{}, err)
			} else {
				c.finish(replies[i], nil)
			}
		}
		runtime.Gosched() // who is about to call the script joins the next batch
	}
}

// nextBatch waits for calls, and returns nil when the link has ended.
func (l *redisLink) nextBatch() []*scriptCall {
	l.mu.Lock()
	defer l.mu.Unlock()
	for len(l.queue) == 0 && l.err == nil {
		l.more.Wait()
	}
	n := 0
	for size := 0; n < min(len(l.queue), maxBatch) && size < maxBatchBytes; n++ {
		for _, arg := range l.queue[n].args {
			size += len(arg)
		}
	}
	batch := l.queue[:n:n]
	l.queue = l.queue[n:]
	l.sent.Add(1)
	return batch
}

// call calls the script for a batch, and reads the streams.
func (l *redisLink) call(batch []*scriptCall) ([]reply, error) {
	answer, err := l.send("EVALSHA", redisScriptSum, batch)
	if refusal, _ := err.(redisError); strings.HasPrefix(string(refusal), "NOSCRIPT") {
		answer, err = l.send("EVAL", redisScript, batch)
	}
	if err == nil && len(answer.list) != len(batch) {
		err = errProtocol
	}
	if err == nil {
		err = l.redis.reconcile(l.conn)
	}
	return answer.list, err
}

// send sends the script's command, and the one that reads the streams, and receives the
// replies. The error is a redisError if the script was refused.
func (l *redisLink) send(command, script string, batch []*scriptCall) (reply, error) {
	d := l.redis
	args := make([]string, 0, 16+9*len(batch)) // a publish takes nine
	args = append(append(args, command, script, strconv.Itoa(len(d.keys))), d.keys...)
	args = append(args, strconv.FormatInt(d.relay.lastID.Load(), 10), strconv.Itoa(d.events))
	for _, c := range batch {
		args = append(args, c.args[0], strconv.Itoa(len(c.args)-1))
		args = append(args, c.args[1:]...)
	}
	l.conn.SetDeadline(time.Now().Add(replyTimeout))
	text := appendCommand(l.conn.out[:0], args...)
	answer, err := l.conn.send(appendCommand(text, d.readCommand("COUNT", strconv.Itoa(readCount))...))
	if _, isRefusal := err.(redisError); err == nil || isRefusal {
		if readErr := l.readStreams(); readErr != nil {
			err = fmt.Errorf("reading: %w", readErr)
		}
	}
	return answer, err
}

// readStreams receives the reply to the command that reads the streams, and sends it again as
// long as there is more.
func (l *redisLink) readStreams() error {
	news, err := l.conn.receive()
	for err == nil {
		var more bool
		if more, err = l.redis.readEntries(news); !more {
			break
		}
		l.conn.SetDeadline(time.Now().Add(replyTimeout))
		news, err = l.conn.do(l.redis.readCommand("COUNT", strconv.Itoa(readCount))...)
	}
	return err
}

// watch says that this instance lives, and has what others publish read, until a connection
// fails. While batches come one after the other, each reads. When for a millisecond there was
// none, watch waits for news.
func (l *redisLink) watch() error {
	d := l.redis
	defer context.AfterFunc(d.stopping, func() { l.news.Close() })()
	for beatAt, sent := time.Now(), int64(0); ; {
		left := time.Until(beatAt.Add(beatEvery))
		if left < time.Millisecond {
			beatAt = time.Now()
			if err := d.beat(l, 0); err != nil {
				return err
			}
			continue
		}
		if n := l.sent.Load(); n != sent {
			sent = n
			time.Sleep(time.Millisecond)
			continue
		}
		l.news.SetDeadline(time.Now().Add(left + replyTimeout))
		if _, err := l.news.do(d.readCommand("COUNT", "1", "BLOCK", strconv.FormatInt(left.Milliseconds(), 10))...); err != nil {
			return err
		}
		if _, err := l.do(startTimeout, "nothing"); err != nil {
			return err
		}
	}
}

// fail ends the connections, and all that waits for them.
func (l *redisLink) fail(err error) {
	l.redis.lost(l) // first, so that nobody tries this link again
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.err != nil {
		return
	}
	l.err = err
	for _, conn := range []*redisConn{l.conn, l.news} {
		if conn != nil {
			go conn.Close() // with TLS it may block
		}
	}
	for _, c := range l.queue {
		c.finish(reply{}, errNotSent)
	}
	l.queue = nil
	l.more.Signal()
}

// Reading.

// A redisEntry is an entry of a stream.
type redisEntry struct {
	stream         int
	at             string // its id as Redis writes it
	id             int64
	isOurs         bool  // else there is only the above
	previous       int64 // the one before it
	time           time.Time
	instance       string
	publishRequest // room, kind, from, ttl and data
}

// parseEntry reads an entry. Others may write to Redis, so all is checked as if it came from
// a client.
func parseEntry(stream int, r reply) (e redisEntry) {
	if len(r.list) != 2 {
		return e
	}
	e.stream, e.at = stream, r.list[0].text
	id, sequence, _ := strings.Cut(e.at, "-")
	e.id = asNumber(id)
	fields := r.list[1].list
	if len(fields) != 2 || sequence != "0" || e.id >= 1<<53 {
		return e
	}
	lines := strings.SplitN(fields[1].text, "\n", 3)
	head := strings.Split(lines[0], " ")
	if len(lines) != 3 || len(head) != 6 {
		return e
	}
	e.previous, e.time, e.ttl = asNumber(head[0]), time.UnixMilli(asNumber(head[1])), time.Duration(asNumber(head[2]))*time.Millisecond
	e.instance, e.kind, e.room, e.from, e.data = head[3], head[4], head[5], lines[1], []byte(lines[2])
	if e.previous < 0 || e.previous >= e.id || e.ttl < 0 || e.ttl > maxTTL*time.Second || !validName(e.room) || e.room[0] == '_' || !validUser(e.from) {
		return e
	}
	switch e.kind {
	case "beat", "gap", "goodbye":
		e.isOurs = true
	case "presence":
		e.isOurs = e.from == "" || slices.Contains(presenceStates, e.state())
	default:
		e.isOurs = validName(e.kind) && !slices.Contains(reservedTypes, e.kind) && json.Valid(e.data) && !bytes.ContainsAny(e.data, "\r\n")
	}
	return e
}

func (e *redisEntry) state() string { return strings.Trim(string(e.data), `"`) }

// readCommand returns the command that reads the streams.
func (d *redis) readCommand(options ...string) []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	command := append([]string{"XREAD"}, options...)
	return append(command, "STREAMS", d.keys[1], d.keys[2], d.read[0], d.read[1])
}

// readEntries does what the entries say that Redis replied. It reports whether there may be
// more.
func (d *redis) readEntries(news reply) (more bool, err error) {
	var entries []redisEntry
	upTo := int64(math.MaxInt64) // what is above in one stream may come after what was not read of the other
	for _, pair := range news.list {
		if len(pair.list) != 2 {
			return false, errProtocol
		}
		stream, some := slices.Index(d.keys[1:3], pair.list[0].text), pair.list[1].list
		if stream < 0 {
			return false, errProtocol
		}
		entries = slices.Grow(entries, len(some))
		for _, r := range some {
			e := parseEntry(stream, r)
			if e.at == "" {
				return false, errProtocol
			}
			entries = append(entries, e)
		}
		if len(some) == readCount {
			upTo, more = min(upTo, entries[len(entries)-1].id), true
		}
	}
	slices.SortStableFunc(entries, func(a, b redisEntry) int { return cmp.Compare(a.id, b.id) })
	for len(entries) > 0 && entries[len(entries)-1].id > upTo {
		entries = entries[:len(entries)-1]
	}
	d.mu.Lock()
	for i := range entries {
		d.read[entries[i].stream] = entries[i].at
	}
	d.mu.Unlock()
	d.apply(entries)
	return more, nil
}

// apply does what the entries say.
func (d *redis) apply(entries []redisEntry) {
	r := d.relay
	isMissing := false
	r.mu.Lock()
	for i := range entries {
		e := &entries[i]
		if !e.isOurs {
			if time.Since(d.warnedAt) > time.Minute {
				d.warnedAt = time.Now()
				slog.Warn("an entry in Redis is not of a relay, and is skipped", "stream", d.keys[1+e.stream], "entry", e.at)
			}
			continue
		}
		last := d.last[e.stream]
		d.last[e.stream] = e.id
		missing := d.started && last >= 0 && e.previous != last
		switch head := r.lastID.Load(); {
		case e.id <= d.floor: // an old signal
			continue
		case e.id <= head: // Redis was set back, and had not heard of our head yet
			missing, e.id, e.kind = true, head+1, "beat"
		}
		if missing {
			isMissing = true
			r.raiseFloors(e.id-1, e.stream == 0)
		}
		r.lastID.Store(e.id - 1)
		d.applyEntry(e)
		r.lastID.Store(e.id)
	}
	r.unlock()
	if isMissing {
		slog.Warn("events are missing in Redis; subscribers are sent a gap")
		d.mu.Lock()
		d.reconcileAt, d.settledAt = time.Now(), time.Now().Add(settleTime)
		d.mu.Unlock()
	}
}

// applyEntry does what an entry says. The relay's next id is the entry's.
func (d *redis) applyEntry(e *redisEntry) {
	r, now := d.relay, time.Now()
	rm := r.rooms[e.room]
	switch e.kind {
	case "beat":
	case "gap":
		r.eraseLocked(e.room)
	case "presence":
		d.applyPresence(e)
	case "goodbye":
		if rm != nil && rm.leases[e.from] != nil && e.instance != d.server.instance {
			rm.leases[e.from].goodbye(string(e.data), now)
			r.announceChange(rm, e.from, rm.leases[e.from], now)
		}
	default:
		if e.ttl > 0 && now.After(e.time.Add(e.ttl)) {
			return
		}
		if r.isFull(rm) {
			r.dropHistory(r.lru.Back().Value.(*room))
		}
		r.add(e.publishRequest, e.time)
	}
}

// raiseFloors says that events up to an id are lost, of any room: messages, or only signals.
func (r *relay) raiseFloors(id int64, messages bool) {
	if messages {
		r.floorElsewhere = id
		clear(r.forgotten)
	}
	for name, rm := range r.rooms {
		if name[0] == '_' {
			continue
		}
		r.dropSignals(rm, id)
		if messages {
			h := *rm.history.Load()
			h.messages.floor = id
			rm.history.Store(&h)
		}
	}
}

// dropSignals forgets the signals of a room. Streams are sent the roster.
func (r *relay) dropSignals(rm *room, id int64) {
	h := *rm.history.Load()
	r.bytes -= h.signals.bytes
	h.signals = eventLog{floor: id}
	rm.history.Store(&h)
	r.changed = append(r.changed, rm)
}

// mayCome reports whether the log has a cursor that is beyond it, or will have. It waits until
// all that Redis has is read. While Redis is away nobody knows.
func (d *redis) mayCome(cursor int64) bool {
	l := d.connected(0)
	if l == nil {
		return true
	}
	_, err := l.do(readTimeout, "nothing")
	return err != nil || cursor < d.relay.lastID.Load()+idStep // what another instance has beyond the last id is its own
}

// Publishing.

func (d *redis) publish(p publishRequest) (id int64, isNew bool, err error) {
	r := d.relay
	if p.room[0] == '_' {
		return r.publish(p)
	}
	r.mu.Lock()
	isFull := r.isFull(r.rooms[p.room])
	r.mu.Unlock()
	switch {
	case r.isStopping():
		return 0, false, errStopping
	case isFull:
		return 0, false, errTooManyRooms
	}
	if p.allow != nil {
		if err := p.allow(); err != nil {
			return 0, false, err
		}
	}
	onlyIf := ""
	if p.onlyIf != nil {
		onlyIf = strconv.FormatInt(*p.onlyIf, 10)
	}
	answer, err := d.ask(p.key != "", "publish", p.room, p.kind, p.from, strconv.FormatInt(p.ttl.Milliseconds(), 10), p.key, onlyIf, string(p.data))
	if err != nil {
		return 0, false, err
	}
	if id = asNumber(strings.Trim(answer, "nki")); strings.HasPrefix(answer, "i") {
		return 0, false, conflict(id)
	}
	return id, strings.HasPrefix(answer, "n"), nil
}

// erase has all instances forget a room, and Redis delete what it has of it.
func (d *redis) erase(room string) error {
	if d.relay.isStopping() {
		return errStopping
	}
	id, err := d.ask(true, "erase", room) // twice is not worse
	if err != nil {
		return err
	}
	for stream := range 2 {
		for from := "-"; from != "" && err == nil; {
			from, err = d.ask(true, "delete", strconv.Itoa(stream+1), room, from, "("+id+"-0")
		}
	}
	return err
}

// ask has the script do something that it answers with a string, and again if the answer was
// lost and that may be.
func (d *redis) ask(again bool, args ...string) (string, error) {
	failure := errRedisAway
	for deadline := time.Now().Add(publishTimeout); ; {
		left := time.Until(deadline)
		l := d.connected(left)
		if l == nil || left <= 0 {
			return "", failure
		}
		reply, err := l.do(left, args...)
		if refusal, ok := err.(redisError); ok {
			slog.Error("Redis refused a publish", "error", refusal)
			return "", errRedisRefused
		}
		switch {
		case err == nil:
			return reply.text, nil
		case err == errNotSent:
		case !again:
			return "", errRedisSilent
		default:
			failure = errRedisSilent
		}
	}
}

// connected returns the link, or nil. If Redis went away just now it waits.
func (d *redis) connected(atMost time.Duration) *redisLink {
	d.mu.Lock()
	l, back, since := d.link, d.back, d.awaySince
	d.mu.Unlock()
	if l != nil || atMost <= 0 || time.Since(since) > publishTimeout {
		return l
	}
	select {
	case <-back:
		return d.connected(0)
	case <-time.After(atMost):
		return nil
	}
}

// Presence.

// setPresence is relay.setPresence, and waits until it can be read. A goodbye goes to all
// instances: the client's connections may be another's.
func (d *redis) setPresence(room, user, client, state string) error {
	r := d.relay
	if state == "offline" && !r.isStopping() {
		r.mu.Lock()
		if client != "" || !r.hasLease(room, user) {
			d.share(room, user, client, "goodbye")
		}
		r.mu.Unlock()
	}
	if err := r.setPresence(room, user, client, state); err != nil {
		return err
	}
	d.awaitShared()
	return nil
}

// subscribe is relay.subscribe. A cursor beyond the log is waited for, and a user's coming
// is read before the subscriber's cursor.
func (d *redis) subscribe(sub *subscriber, q subscribeRequest) error {
	r := d.relay
	isFuture := q.cursor > r.lastID.Load() && !d.mayCome(q.cursor)
	if err := r.subscribe(sub, q); err != nil || q.user == "" && !isFuture {
		return err
	}
	if q.user != "" {
		d.awaitShared()
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	sub.setCursor(q.cursor, q.last)
	if isFuture {
		sub.lost = "future"
	}
	return nil
}

// share tells all instances the state of a user, as this one knows it; the client only of a
// goodbye. It is called under relay.mu. While Redis is away nothing is kept, since both sides
// are compared later.
func (d *redis) share(room, user, client, state string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.link != nil {
		d.lastShare = d.link.start("share", d.server.instance, room, user, client, state)
	}
}

// awaitShared waits until what was shared so far has been read here.
func (d *redis) awaitShared() {
	d.mu.Lock()
	last := d.lastShare
	d.mu.Unlock()
	if last != nil {
		last.wait(readTimeout)
	}
}

// applyPresence takes what all instances now know of a user, and announces it if it is new
// to the room.
func (d *redis) applyPresence(e *redisEntry) {
	r := d.relay
	rm := r.openRoom(e.room)
	defer r.closeIfUnused(rm)
	if e.from == "" {
		if rm.isCrowded() {
			r.announceCount(rm, e.time)
		}
		return
	}
	if rm.elsewhere == nil {
		rm.elsewhere = map[string]string{}
	}
	state, before := e.state(), cmp.Or(rm.elsewhere[e.from], "offline")
	d.users -= len(rm.elsewhere)
	if state == "offline" {
		delete(rm.elsewhere, e.from)
	} else if before != "offline" || d.users < 4*r.maxUsers {
		rm.elsewhere[e.from] = state
	}
	rm.online = len(rm.elsewhere)
	d.users += rm.online
	if before != state && time.Now().Before(e.time.Add(e.ttl)) {
		if rm.isCrowded() {
			r.announceCount(rm, e.time)
		} else {
			r.announce(rm, e.from, e.data, e.time)
		}
	}
	if l := rm.leases[e.from]; l != nil && l.announced != "offline" {
		now := time.Now()
		if l.announced = state; e.instance != d.server.instance && state != "offline" {
			l.setState(state, now)
		}
		r.announceChange(rm, e.from, l, now)
	}
}

// reconcile compares the users that Redis has with those here, if it is time to. All that the
// streams had was read before: what changes after Redis has answered is still to be read.
func (d *redis) reconcile(conn *redisConn) error {
	now := time.Now()
	d.mu.Lock()
	isDue, isSettled := !d.reconcileAt.IsZero() && now.After(d.reconcileAt), now.After(d.settledAt)
	switch {
	case isDue && isSettled:
		d.reconcileAt = time.Time{}
	case isDue:
		d.reconcileAt = d.settledAt
	}
	d.mu.Unlock()
	if !isDue {
		return nil
	}
	conn.SetDeadline(now.Add(5 * time.Second))
	reply, err := conn.do("HGETALL", d.keys[6])
	if err != nil {
		return fmt.Errorf("comparing users: %w", err)
	}
	users := map[string]map[string]string{} // by room
	type member struct{ room, user string }
	held := map[member]string{} // by this instance, as Redis has it
	for field, value := range reply.hash() {
		room, user, _ := strings.Cut(field, " ")
		state, holders, _ := strings.Cut(value, " ")
		if !validName(room) || room[0] == '_' || user == "" || !validUser(user) || !slices.Contains(presenceStates, state) {
			continue
		}
		if users[room] == nil {
			users[room] = map[string]string{}
		}
		users[room][user] = state
		if strings.Contains(holders, d.server.instance) {
			held[member{room, user}] = state
		}
	}
	r := d.relay
	r.mu.Lock()
	defer r.unlock()
	if isSettled {
		d.replaceUsers(users)
	}
	for name, rm := range r.rooms {
		for user, l := range rm.leases {
			m, state := member{name, user}, l.stateAt(now)
			if state == "offline" {
				continue
			}
			if held[m] != state {
				d.share(name, user, "", state)
			}
			delete(held, m)
		}
	}
	for m := range held {
		d.share(m.room, m.user, "", "offline")
	}
	return nil
}

// replaceUsers takes the users that Redis has. Where they are others, streams are sent the
// roster.
func (d *redis) replaceUsers(users map[string]map[string]string) {
	r := d.relay
	id := r.lastID.Load() + 1
	for name := range users {
		r.openRoom(name)
	}
	d.users = 0
	for name, rm := range r.rooms {
		d.users += len(users[name])
		if !maps.Equal(rm.elsewhere, users[name]) {
			rm.elsewhere, rm.online = users[name], len(users[name])
			r.dropSignals(rm, id)
			r.closeIfUnused(rm)
		}
	}
	r.lastID.Store(id)
}

// For operators.

// wrap returns a handler that says at /healthz when Redis is away.
func (d *redis) wrap(next http.Handler) http.Handler {
	if d == nil {
		return next
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/healthz" || r.Method == http.MethodOptions || d.isHealthy() {
			next.ServeHTTP(w, r)
			return
		}
		d.server.answer(w, r, func(http.ResponseWriter, *http.Request) error { return errUnhealthy })
	})
}

func (d *redis) isHealthy() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return time.Since(d.beatAt) < unhealthyAfter
}

// status says which instances there are, and for how many seconds Redis has been away.
func (d *redis) status() any {
	if d == nil {
		return nil
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	away := int64(0)
	if d.link == nil {
		away = 1 + int64(time.Since(d.awaySince).Seconds())
	}
	return map[string]any{"away": away, "instances": d.instances}
}

// close says that the instance leaves.
func (d *redis) close() {
	if d != nil {
		d.stop()
		<-d.ended
	}
}
