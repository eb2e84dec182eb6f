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
// may be behind; there, a cursor beyond the log makes it ask Redis how far the log is, and
// wait until it has read as far. While Redis is away nobody knows, and such a cursor is
// taken for good.
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
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"
)

const (
	idStep         = 16                      // as in the script; above 60,000 events a second ids run ahead of the clock
	publishTimeout = 1900 * time.Millisecond // for a publish, with all its tries
	readTimeout    = 2 * time.Second         // for an instance to read what Redis has
	startTimeout   = 10 * time.Second        // to find Redis at the start: it may be starting, too
	beatEvery      = 3 * time.Second         // an instance says that it lives
	silentAfter    = 20 * time.Second        // an instance that did not is dead
	unhealthyAfter = 10 * time.Second        // without a beat
	settleTime     = 10 * time.Second        // after Redis has lost its data, for all to share their users again
	readCount      = 128                     // entries of a stream that are read at once
	awayLookahead  = int64(3600e6)           // while Redis is away a cursor may be an hour ahead
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
	keys     []string // of every script
	events   int
	stopping context.Context
	stop     context.CancelFunc
	ended    chan struct{} // closed when the instance has said that it leaves

	// Used by one goroutine at a time, which reads.
	read     [2]string // the position in each stream
	last     [2]int64  // the newest of our entries that was read of each; -1 before the first
	floor    int64     // the floor of all rooms at the start
	users    int       // in all rooms, of all instances
	warnedAt time.Time // of an entry that is not ours

	mu          sync.Mutex // guards what follows; may be locked under relay.mu
	pipeline    *pipeline  // nil while Redis is away
	back        chan bool  // closed when it is back
	awaySince   time.Time
	beatAt      time.Time           // the last
	born        string              // where Redis' data begin; another value after they were lost
	applied     int64               // everything up to this id is in the log
	waiting     map[chan bool]int64 // for an id to be applied; closed then
	shared      map[share]string    // states that are still to be sent
	flushes     []chan bool         // closed when they are sent and applied
	work        chan bool           // holds a token when there is something to send
	reconcileAt time.Time           // when to compare the users, or the zero time
	settledAt   time.Time           // before, Redis may not have all users
	instances   []instanceStatus
}

// A share is whose state it is. There is a client only for a goodbye.
type share struct{ room, user, client string }

// An instanceStatus describes an instance to an operator.
type instanceStatus struct {
	Instance    string `json:"instance"`
	Silent      int64  `json:"silent"` // seconds since its last beat
	Connections int64  `json:"connections"`
	Rooms       int    `json:"rooms"`
	Users       int    `json:"users"`
}

// newRedis has the server share its log by the Redis at the URL. Without a URL it returns nil.
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
	target.maxBulk = int(4*s.maxBody) + 64<<10
	r := s.relay
	d := &redis{relay: r, server: s, target: target, events: events, ended: make(chan struct{}), read: [2]string{"0-0", "0-0"}, last: [2]int64{-1, -1},
		back: make(chan bool), waiting: map[chan bool]int64{}, shared: map[share]string{}, work: make(chan bool, 1)}
	for _, name := range []string{"state", "messages", "signals", "keys", "order", "rooms", "users", "instances"} {
		d.keys = append(d.keys, "{"+prefix+"}:"+name) // braces keep them together in a cluster
	}
	d.stopping, d.stop = context.WithCancel(context.Background())
	r.lastID.Store(0)
	r.lookahead = awayLookahead
	r.countLease = func(*room, *lease, bool) bool { return false } // counted when all know it
	r.announceState = func(rm *room, user, state string, _ time.Time) { d.share(rm.name, user, "", cmp.Or(state, "count")) }
	s.publish, s.erase, s.catchUp, s.setState, s.subscribe = d.publish, d.erase, d.catchUp, d.setPresence, d.subscribe
	for start, pause := time.Now(), 50*time.Millisecond; ; pause *= 2 {
		p, reader, err := d.connect()
		if err == nil {
			go d.run(p, reader)
			return d, nil
		}
		refusal, isFinal := err.(redisError)
		isFinal = isFinal && !strings.HasPrefix(string(refusal), "LOADING") || errors.Is(err, errProtocol)
		if _, isUnsafe := errors.AsType[*tls.CertificateVerificationError](err); isUnsafe || isFinal || time.Since(start) > startTimeout {
			return nil, fmt.Errorf("-redis %s: %w", target.addr, err)
		}
		time.Sleep(pause)
	}
}

// Connecting.

// connect makes the two connections, one for commands and one for reading, and reads all
// that the streams have.
func (d *redis) connect() (p *pipeline, reader *redisConn, err error) {
	conn, err := d.target.dial()
	if err != nil {
		return nil, nil, err
	}
	p = newPipeline(conn)
	if err = d.beat(p, 0); err == nil {
		reader, err = d.target.dial()
	}
	if err == nil && d.floor == 0 {
		err = d.begin(reader)
	}
	for n := 1; err == nil && n > 0; {
		n, err = d.readStreams(reader, 0)
	}
	if err == nil {
		d.found(p)
		err = d.reconcile(p)
	}
	if err != nil {
		d.disconnect(p, reader, err)
	}
	return p, reader, err
}

func (d *redis) disconnect(p *pipeline, reader *redisConn, err error) {
	p.fail(err)
	if reader != nil {
		reader.Close()
	}
	d.lost(p)
}

// begin sets the relay's counter, and the floor of all rooms, to where Redis' messages begin.
func (d *redis) begin(reader *redisConn) error {
	reply, err := reader.do("XRANGE", d.keys[1], "-", "+", "COUNT", 1)
	if err != nil {
		return err
	}
	r := d.relay
	r.epoch = asNumber(d.born)
	d.floor = r.epoch
	if first := asList(reply); len(first) == 1 {
		d.floor = max(d.floor, parseEntry(0, first[0]).previous)
	}
	r.trimmedElsewhere = d.floor
	r.lastID.Store(d.floor)
	return nil
}

// found takes note that Redis is there.
func (d *redis) found(p *pipeline) {
	d.relay.mu.Lock()
	defer d.relay.mu.Unlock()
	d.mu.Lock()
	defer d.mu.Unlock()
	d.relay.lookahead = idStep - 1 // what another instance has beyond the last id is its own
	d.pipeline, d.awaySince = p, time.Time{}
	close(d.back)
}

// lost takes note that Redis is away, if it was there by this pipeline.
func (d *redis) lost(p *pipeline) {
	d.relay.mu.Lock()
	defer d.relay.mu.Unlock()
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.pipeline == p {
		d.relay.lookahead = awayLookahead
		d.pipeline, d.awaySince, d.back = nil, time.Now(), make(chan bool)
		clear(d.shared)
	}
}

// run reads what all instances publish, and reconnects when it must.
func (d *redis) run(p *pipeline, reader *redisConn) {
	defer close(d.ended)
	for {
		slog.Info("connected to Redis", "addr", d.target.addr)
		err := d.follow(p, reader)
		if d.stopping.Err() != nil {
			d.beat(p, silentAfter-leaveGrace) // so others end our leases after leaveGrace
			p.fail(err)
			return
		}
		d.disconnect(p, reader, err)
		slog.Warn("Redis is away", "addr", d.target.addr, "error", err)
		for pause := 50 * time.Millisecond; err != nil; pause = min(2*pause, 3*time.Second) {
			select {
			case <-time.After(pause/2 + rand.N(pause)):
			case <-d.stopping.Done():
				return
			}
			p, reader, err = d.connect()
		}
	}
}

// follow reads until a connection fails.
func (d *redis) follow(p *pipeline, reader *redisConn) error {
	defer context.AfterFunc(d.stopping, func() { reader.Close() })()
	go func() {
		<-p.failed
		reader.Close()
	}()
	go d.keepBeating(p)
	go d.sendShared(p)
	for {
		if _, err := d.readStreams(reader, beatEvery); err != nil {
			return err
		}
		d.mu.Lock()
		due := !d.reconcileAt.IsZero() && time.Now().After(d.reconcileAt)
		d.mu.Unlock()
		if due {
			if err := d.reconcile(p); err != nil {
				return err
			}
		}
	}
}

func (d *redis) keepBeating(p *pipeline) {
	ticker := time.NewTicker(beatEvery)
	defer ticker.Stop()
	for {
		select {
		case <-p.failed:
			return
		case <-d.stopping.Done():
			return
		case <-ticker.C:
		}
		if err := d.beat(p, 0); err != nil {
			p.fail(err)
		}
	}
}

// beat says that this instance lives, or did so long ago, and ends others that do not.
func (d *redis) beat(p *pipeline, age time.Duration) error {
	d.relay.mu.Lock()
	status, _ := json.Marshal(instanceStatus{Connections: d.server.active(), Rooms: d.relay.lru.Len(), Users: d.relay.leases})
	d.relay.mu.Unlock()
	reply, err := d.eval(p, replyTimeout, "beat", d.server.instance, int(age.Seconds()), status)
	if err != nil {
		return err
	}
	answer := asList(reply)
	if len(answer) != 4 {
		return errProtocol
	}
	born, isKnown, now := asString(answer[0]), answer[1] == int64(1), asNumber(asString(answer[2]))
	var all []instanceStatus
	for instance, beat := range asHash(answer[3]) {
		at, status, _ := strings.Cut(beat, " ")
		var s instanceStatus
		json.Unmarshal([]byte(status), &s)
		s.Instance, s.Silent = instance, max(0, now-asNumber(at))
		all = append(all, s)
	}
	slices.SortFunc(all, func(a, b instanceStatus) int { return cmp.Compare(a.Instance, b.Instance) })
	d.mu.Lock()
	d.beatAt = time.Now()
	if d.born != "" && (d.born != born || !isKnown) { // Redis has lost its data, or others took us for dead
		d.reconcileAt = d.beatAt
	}
	if d.born != "" && d.born != born {
		d.settledAt = d.beatAt.Add(settleTime)
	}
	d.born, d.instances = born, all
	d.mu.Unlock()
	for _, s := range all {
		for cursor, silent := "0", int64(silentAfter/time.Second); s.Silent > silent; {
			reply, err := d.eval(p, replyTimeout, "end", s.Instance, silent, cursor)
			if cursor = asString(reply); err != nil || cursor == "0" {
				break
			}
		}
	}
	return nil
}

// eval runs the script.
func (d *redis) eval(p *pipeline, timeout time.Duration, what string, args ...any) (any, error) {
	command := make([]any, 0, 6+len(d.keys)+len(args))
	command = append(command, "EVALSHA", redisScriptSum, len(d.keys))
	for _, key := range d.keys {
		command = append(command, key)
	}
	command = append(append(command, d.relay.lastID.Load(), d.events, what), args...)
	reply, err := p.do(timeout, command...)
	if e, ok := err.(redisError); ok && strings.HasPrefix(string(e), "NOSCRIPT") {
		command[0], command[1] = "EVAL", redisScript
		reply, err = p.do(timeout, command...)
	}
	return reply, err
}

// Reading.

// A redisEntry is an entry of a stream.
type redisEntry struct {
	stream               int
	at                   string // its id as Redis writes it
	id                   int64
	isOurs               bool  // else there is only the above
	previous             int64 // the one before it
	time                 time.Time
	ttl                  time.Duration
	instance, kind, room string
	user                 string
	data                 []byte
}

// parseEntry reads an entry. Others may write to Redis, so all is checked as if it came from
// a client.
func parseEntry(stream int, reply any) (e redisEntry) {
	values := asList(reply)
	if len(values) != 2 {
		return e
	}
	e.stream, e.at = stream, asString(values[0])
	id, sequence, _ := strings.Cut(e.at, "-")
	e.id = asNumber(id)
	fields := asList(values[1])
	if len(fields) != 6 || sequence != "0" || e.id >= 1<<53 {
		return e
	}
	head := strings.Split(asString(fields[1]), " ")
	if len(head) != 6 {
		return e
	}
	e.previous, e.time, e.ttl = asNumber(head[0]), time.UnixMilli(asNumber(head[1])), time.Duration(asNumber(head[2]))*time.Millisecond
	e.instance, e.kind, e.room, e.user = head[3], head[4], head[5], asString(fields[3])
	e.data, _ = fields[5].([]byte)
	if e.previous < 0 || e.previous >= e.id || e.ttl < 0 || e.ttl > maxTTL*time.Second || !validName(e.room) || e.room[0] == '_' || !validUser(e.user) {
		return e
	}
	switch e.kind {
	case "beat", "gap", "goodbye":
		e.isOurs = true
	case "presence":
		e.isOurs = e.user == "" || slices.Contains(presenceStates, e.state())
	default:
		e.isOurs = validName(e.kind) && !slices.Contains(reservedTypes, e.kind) && json.Valid(e.data) && !bytes.ContainsAny(e.data, "\r\n")
	}
	return e
}

func (e *redisEntry) state() string { return strings.Trim(string(e.data), `"`) }

// readStreams reads what is new in both streams, and waits if there is nothing. It returns
// how many entries it read.
func (d *redis) readStreams(reader *redisConn, wait time.Duration) (int, error) {
	command := []any{"XREAD", "COUNT", readCount}
	if wait > 0 {
		command = append(command, "BLOCK", wait.Milliseconds())
	}
	reader.SetDeadline(time.Now().Add(wait + 5*time.Second))
	reply, err := reader.do(append(command, "STREAMS", d.keys[1], d.keys[2], d.read[0], d.read[1])...)
	if err != nil {
		return 0, err
	}
	var entries []redisEntry
	var upTo *redisEntry // what comes after it in one stream may come after what was not read of the other
	for _, v := range asList(reply) {
		pair := asList(v)
		if len(pair) != 2 {
			return 0, errProtocol
		}
		stream := slices.Index(d.keys[1:3], asString(pair[0]))
		for _, v := range asList(pair[1]) {
			entries = append(entries, parseEntry(max(stream, 0), v))
			if entries[len(entries)-1].at == "" || stream < 0 {
				return 0, errProtocol
			}
		}
		if last := entries[len(entries)-1]; len(asList(pair[1])) == readCount && (upTo == nil || last.id < upTo.id) {
			upTo = &last
		}
	}
	slices.SortStableFunc(entries, func(a, b redisEntry) int { return cmp.Compare(a.id, b.id) })
	if upTo != nil {
		entries = entries[:1+slices.IndexFunc(entries, func(e redisEntry) bool { return e.at == upTo.at && e.stream == upTo.stream })]
	}
	d.apply(entries)
	return len(entries), nil
}

// apply does what the entries say.
func (d *redis) apply(entries []redisEntry) {
	r := d.relay
	applied, isMissing := int64(0), false
	r.mu.Lock()
	for i := range entries {
		e := &entries[i]
		d.read[e.stream] = e.at
		if !e.isOurs {
			if time.Since(d.warnedAt) > time.Minute {
				d.warnedAt = time.Now()
				slog.Warn("an entry in Redis is not of a relay, and is skipped", "stream", d.keys[1+e.stream], "entry", e.at)
			}
			continue
		}
		last := d.last[e.stream]
		d.last[e.stream], applied = e.id, e.id
		missing := last >= 0 && e.previous != last
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
	d.mu.Lock()
	defer d.mu.Unlock()
	if isMissing {
		slog.Warn("events are missing in Redis; subscribers are sent a gap")
		d.reconcileAt, d.settledAt = time.Now(), time.Now().Add(settleTime)
	}
	d.applied = max(d.applied, applied)
	for ch, id := range d.waiting {
		if id <= d.applied {
			close(ch)
			delete(d.waiting, ch)
		}
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
		if rm != nil && rm.leases[e.user] != nil && e.instance != d.server.instance {
			rm.leases[e.user].goodbye(string(e.data), now)
			r.announceChange(rm, e.user, rm.leases[e.user], now)
		}
	default:
		if e.ttl > 0 && now.After(e.time.Add(e.ttl)) {
			return
		}
		if r.isFull(rm) {
			r.dropHistory(r.lru.Back().Value.(*room))
		}
		r.add(publishRequest{room: e.room, kind: e.kind, from: e.user, ttl: e.ttl, data: e.data}, e.time)
	}
}

// raiseFloors says that events up to an id are lost, of any room: messages, or only signals.
func (r *relay) raiseFloors(id int64, messages bool) {
	if messages {
		r.trimmedElsewhere = id
		clear(r.forgotten)
	}
	for name, rm := range r.rooms {
		if name[0] == '_' {
			continue
		}
		r.dropSignals(rm, id)
		if messages {
			h := *rm.history.Load()
			h.trimmed = id
			rm.history.Store(&h)
		}
	}
}

// dropSignals forgets the signals of a room. Streams are sent the roster.
func (r *relay) dropSignals(rm *room, id int64) {
	h := *rm.history.Load()
	h.signals, h.trimmedSignal = nil, id
	rm.history.Store(&h)
	r.bytes -= rm.signalBytes
	rm.signalBytes = 0
	r.changed = append(r.changed, rm)
}

// await waits until everything up to an id is in the log, and reports whether it is.
func (d *redis) await(ctx context.Context, id int64) bool {
	d.mu.Lock()
	if d.applied >= id {
		d.mu.Unlock()
		return true
	}
	ch := make(chan bool)
	d.waiting[ch] = id
	d.mu.Unlock()
	timer := time.NewTimer(readTimeout)
	defer timer.Stop()
	select {
	case <-ch:
		return true
	case <-timer.C:
	case <-ctx.Done():
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.waiting, ch)
	return d.applied >= id
}

// catchUp waits for a cursor beyond the log, if Redis says that it will come.
func (d *redis) catchUp(ctx context.Context, cursor int64) {
	p := d.connected(0)
	if p == nil {
		return
	}
	newest, err := p.do(replyTimeout, "HGET", d.keys[0], "id")
	if err != nil {
		d.lost(p) // before anybody looks at the cursor
	} else if !d.await(ctx, min(cursor, asNumber(asString(newest)))) { // we are far behind
		d.relay.mu.Lock()
		d.relay.lookahead = awayLookahead
		d.relay.mu.Unlock()
	}
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
	var onlyIf any = ""
	if p.onlyIf != nil {
		onlyIf = *p.onlyIf
	}
	answer, err := d.ask(p.key != "", "publish", p.room, p.kind, p.from, p.ttl.Milliseconds(), p.key, onlyIf, p.data)
	if err != nil {
		return 0, false, err
	}
	if id = asNumber(strings.Trim(answer, "nki")); strings.HasPrefix(answer, "i") {
		return 0, false, conflict(id)
	}
	d.await(context.Background(), id)
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
	d.await(context.Background(), asNumber(id))
	for stream := range 2 {
		for from := "-"; from != "" && err == nil; {
			from, err = d.ask(true, "delete", stream+1, room, from, "("+id+"-0")
		}
	}
	return err
}

// ask runs the script, which answers with a string, and again if its answer was lost and it may.
func (d *redis) ask(again bool, what string, args ...any) (string, error) {
	failure := errRedisAway
	for deadline := time.Now().Add(publishTimeout); ; {
		left := time.Until(deadline)
		p := d.connected(left)
		if p == nil || left <= 0 {
			return "", failure
		}
		reply, err := d.eval(p, min(left, replyTimeout), what, args...)
		if _, ok := reply.([]byte); err == nil && !ok {
			err = errProtocol
		}
		if refusal, ok := err.(redisError); ok {
			slog.Error("Redis refused a publish", "error", refusal)
			return "", errRedisRefused
		}
		switch {
		case err == nil:
			return asString(reply), nil
		case err != errNotSent:
			failure = errRedisSilent
		}
		if d.lost(p); failure == errRedisSilent && !again {
			return "", failure
		}
	}
}

// connected returns the pipeline, or nil. If Redis went away just now it waits.
func (d *redis) connected(atMost time.Duration) *pipeline {
	d.mu.Lock()
	p, back, since := d.pipeline, d.back, d.awaySince
	d.mu.Unlock()
	if p != nil || atMost <= 0 || time.Since(since) > publishTimeout {
		return p
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

// subscribe is relay.subscribe; a user's coming is read before the subscriber's cursor.
func (d *redis) subscribe(sub *subscriber, q subscribeRequest) error {
	if err := d.relay.subscribe(sub, q); err != nil || q.user == "" {
		return err
	}
	d.awaitShared()
	d.relay.mu.Lock()
	defer d.relay.mu.Unlock()
	sub.setCursor(q.cursor, q.last)
	return nil
}

// share has the state of a user, as this instance knows it, sent to all. It is called under
// relay.mu. While Redis is away nothing is kept, since both sides are compared later.
func (d *redis) share(room, user, client, state string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.pipeline != nil {
		d.shared[share{room, user, client}] = state
		d.wakeSender()
	}
}

func (d *redis) wakeSender() {
	select {
	case d.work <- true:
	default:
	}
}

// awaitShared waits until what was shared so far has been read here.
func (d *redis) awaitShared() {
	d.mu.Lock()
	if len(d.shared) == 0 || d.pipeline == nil {
		d.mu.Unlock()
		return
	}
	ch := make(chan bool)
	d.flushes = append(d.flushes, ch)
	d.wakeSender()
	d.mu.Unlock()
	select {
	case <-ch:
	case <-time.After(readTimeout):
	}
}

// sendShared sends what is shared, all that is due at once.
func (d *redis) sendShared(p *pipeline) {
	for {
		select {
		case <-d.work:
		case <-p.failed:
			return
		}
		d.mu.Lock()
		due, flushes := maps.Clone(d.shared), d.flushes
		d.flushes = nil
		d.mu.Unlock()
		newest := "0"
		for some := range slices.Chunk(slices.Collect(maps.Keys(due)), 100) {
			args := []any{d.server.instance}
			for _, s := range some {
				args = append(args, s.room, s.user, s.client, due[s])
			}
			reply, err := d.eval(p, replyTimeout, "share", args...)
			if err != nil {
				p.fail(err)
				return
			}
			newest = asString(reply)
		}
		d.await(d.stopping, asNumber(newest))
		d.mu.Lock()
		for s, state := range due {
			if d.shared[s] == state {
				delete(d.shared, s)
			}
		}
		d.mu.Unlock()
		for _, ch := range flushes {
			close(ch)
		}
	}
}

// applyPresence takes what all instances now know of a user, and announces it if it is new
// to the room.
func (d *redis) applyPresence(e *redisEntry) {
	r := d.relay
	rm := r.openRoom(e.room)
	defer r.closeIfUnused(rm)
	if e.user == "" {
		if rm.isCrowded() {
			r.announceCount(rm, e.time)
		}
		return
	}
	if rm.elsewhere == nil {
		rm.elsewhere = map[string]string{}
	}
	state, before := e.state(), cmp.Or(rm.elsewhere[e.user], "offline")
	d.users -= len(rm.elsewhere)
	if state == "offline" {
		delete(rm.elsewhere, e.user)
	} else if before != "offline" || d.users < 4*r.maxUsers {
		rm.elsewhere[e.user] = state
	}
	rm.online = len(rm.elsewhere)
	d.users += rm.online
	if before != state && time.Now().Before(e.time.Add(e.ttl)) {
		if rm.isCrowded() {
			r.announceCount(rm, e.time)
		} else {
			r.announce(rm, e.user, e.data, e.time)
		}
	}
	if l := rm.leases[e.user]; l != nil && l.announced != "offline" {
		now := time.Now()
		if l.announced = state; e.instance != d.server.instance && state != "offline" {
			l.setState(state, now)
		}
		r.announceChange(rm, e.user, l, now)
	}
}

// reconcile compares the users that Redis has with those here. It is called by who reads
// the streams: what changes after Redis has answered is still to be read.
func (d *redis) reconcile(p *pipeline) error {
	reply, err := p.do(5*time.Second, "HGETALL", d.keys[6])
	if err != nil {
		return err
	}
	users := map[string]map[string]string{} // by room
	held := map[share]string{}              // by this instance, as Redis has it
	for field, value := range asHash(reply) {
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
			held[share{room, user, ""}] = state
		}
	}
	d.mu.Lock()
	d.reconcileAt = time.Time{}
	isSettled := time.Now().After(d.settledAt)
	if !isSettled {
		d.reconcileAt = d.settledAt
	}
	d.mu.Unlock()

	r, now := d.relay, time.Now()
	r.mu.Lock()
	defer r.unlock()
	if isSettled {
		d.replaceUsers(users)
	}
	for name, rm := range r.rooms {
		for user, l := range rm.leases {
			s := share{name, user, ""}
			if state := l.stateAt(now); state != "offline" && held[s] != state {
				d.share(name, user, "", state)
			} else if state == "offline" {
				continue
			}
			delete(held, s)
		}
	}
	for s := range held {
		d.share(s.room, s.user, "", "offline")
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
	if d.pipeline == nil {
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
