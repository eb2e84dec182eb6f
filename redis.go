// Many instances, one log. Redis (https://redis.io, or what speaks its protocol and has
// streams and scripts) orders the events; each instance reads all of them and has the
// whole log in memory, as if it were alone. Techniques and subscribers know nothing of it.
//
// Ids. A script gives an event its id: Redis' clock in microseconds, at least idStep
// above the last one, and above the newest id that the caller knows. So ids do not go
// back while one instance lives, whatever happens to Redis. The numbers between two ids
// are for events of one instance alone, those of its room _stats: nobody else sees them,
// but clients may have them as cursors. To append an event with an id, the relay's
// counter is set to just below it.
//
// Loss. Messages and signals are two streams, so that typing never pushes out a message.
// An entry names the one before it in its stream. If that is not the last one read,
// something is missing: Redis was flushed, restarted without its data, failed over to a
// replica that was behind, or dropped entries faster than we read. Then the floor of all
// rooms rises to there, and subscribers are sent a gap. What Redis dropped before an
// instance started is below the floor that it starts with.
//
// Read your writes. A publish is answered when this instance has read the event. Another
// may not have: there a cursor beyond the log is one that is still to come, so a
// request with it asks Redis how far the log is, and waits until this instance is there. While
// Redis is away nobody can know, and the cursor is taken as it is.
//
// Answers that are lost. An event may have been published although the connection broke before
// the answer. With a key the publish is sent again, and Redis knows the key. Without one
// the client is told that nobody knows.
//
// Presence. Each instance shares what it knows of its own users. A script keeps who holds
// which user, and makes an event of each change that all together see: the first
// instance to hold a user, the last to let go, another state. So joins and leaves are told once. An
// instance that is silent for silentAfter is ended by another, user by user; who
// does it twice changes nothing. After an interruption an instance compares
// what it knows with what Redis has (reconcile).

package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/sha1"
	"crypto/tls"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

const (
	idStep         = 16                      // 60,000 events a second before ids run ahead of the clock
	replyTimeout   = 1500 * time.Millisecond // a connection without an answer for so long is given up
	publishTimeout = 1900 * time.Millisecond // in all, with a second try
	startTimeout   = 10 * time.Second        // to find Redis at the start: it may be starting, too
	beatEvery      = 3 * time.Second         // an instance says that it lives
	silentAfter    = 20 * time.Second        // an instance that says nothing is dead
	unhealthyAfter = 10 * time.Second        // without an answer of Redis
	settleTime     = 10 * time.Second        // after Redis lost its memory, until all instances have shared their users again
	awayLookahead  = int64(time.Hour / time.Microsecond)
	keysPerEvent   = 10  // keys and rooms that Redis remembers, for each event it keeps
	readCount      = 128 // entries of a stream that are read at once
)

// The scripts. All have the same keys, and two arguments in common: the newest id that
// the caller knows, and how many entries a stream keeps.

const scriptHead = `
local STATE, STREAMS, KNOWN, ORDER, ROOMS, USERS, INSTANCES = KEYS[1], {KEYS[2], KEYS[3]}, KEYS[4], KEYS[5], KEYS[6], KEYS[7], KEYS[8]
local MESSAGES, SIGNALS = 1, 2
local HEAD, EVENTS = tonumber(ARGV[1]), tonumber(ARGV[2])

local function lastOf(stream)
	if redis.call('EXISTS', stream) == 0 then return 0 end
	local info, last = redis.call('XINFO', 'STREAM', stream), 0
	for i = 1, #info, 2 do
		if info[i] == 'last-generated-id' then last = tonumber(string.match(info[i + 1], '%d+')) end
	end
	return last
end

local function add(stream, ttl, instance, kind, room, user, data)
	local state = redis.call('HMGET', STATE, 'id', stream)
	local last = tonumber(state[1]) or math.max(lastOf(STREAMS[1]), lastOf(STREAMS[2]))
	local t = redis.call('TIME')
	local id = string.format('%.0f', math.max(t[1] * 1000000 + t[2], last + 16, HEAD + 1))
	if not state[1] then redis.call('HSET', STATE, 'born', id) end
	local ms = string.format('%.0f', t[1] * 1000 + math.floor(t[2] / 1000))
	local head = table.concat({state[2] or '0', ms, ttl, instance, kind, room}, ' ')
	redis.call('XADD', STREAMS[stream], 'MAXLEN', '~', EVENTS, id .. '-0', 'h', head, 'u', user, 'd', data)
	redis.call('HSET', STATE, 'id', id, stream, id)
	return id
end

local function lease(instance, room, user, state)
	local field = room .. ' ' .. user
	local old, holders = 'offline', ''
	local value = redis.call('HGET', USERS, field)
	if value then old, holders = string.match(value, '^(%a+) (.*)$') end
	local i = string.find(holders, instance .. ' ', 1, true)
	if state == 'offline' then
		if not i then return '0' end
		holders = string.sub(holders, 1, i - 1) .. string.sub(holders, i + #instance + 1)
		if holders ~= '' then state = old == 'typing' and 'online' or old end
	elseif not i then
		holders = holders .. instance .. ' '
	end
	if holders == '' then redis.call('HDEL', USERS, field) else redis.call('HSET', USERS, field, state .. ' ' .. holders) end
	if state == old then return '0' end
	return add(SIGNALS, '60000', instance, 'presence', room, user, '"' .. state .. '"')
end
`

type script struct{ text, sha string }

func newScript(body string) *script {
	sum := sha1.Sum([]byte(scriptHead + body))
	return &script{scriptHead + body, hex.EncodeToString(sum[:])}
}

var (
	// The answer begins with n for a new event, k for a known key, i if it is not the newest.
	orderScript = newScript(`
local room, kind, user, ttl, key, only, data = unpack(ARGV, 3)
local field = room .. ' ' .. key
if key ~= '' then
	local id = redis.call('HGET', KNOWN, field)
	if id then return 'k' .. id end
end
if only ~= '' then
	local newest = redis.call('ZSCORE', ROOMS, room) or '0'
	if tonumber(newest) ~= tonumber(only) then return 'i' .. string.format('%.0f', newest) end
end
local id = add(ttl == '0' and MESSAGES or SIGNALS, ttl, '-', kind, room, user, data)
if ttl == '0' then
	redis.call('ZADD', ROOMS, id, room)
	if redis.call('ZCARD', ROOMS) > 10 * EVENTS then redis.call('ZPOPMIN', ROOMS) end
end
if key ~= '' then
	redis.call('HSET', KNOWN, field, id)
	if redis.call('RPUSH', ORDER, field) > 10 * EVENTS then redis.call('HDEL', KNOWN, redis.call('LPOP', ORDER)) end
end
return 'n' .. id`)

	shareScript = newScript(`
local instance, room, user, client, state = unpack(ARGV, 3)
if state == 'goodbye' then return add(SIGNALS, '1', instance, 'goodbye', room, user, client) end
if state == 'count' then return add(SIGNALS, '60000', instance, 'presence', room, '', '') end
return lease(instance, room, user, state)`)

	beatScript = newScript(`
local instance, age, info = unpack(ARGV, 3)
local now = redis.call('TIME')[1]
local known = redis.call('HEXISTS', INSTANCES, instance)
redis.call('HSET', INSTANCES, instance, string.format('%.0f', now - age) .. ' ' .. info)
add(SIGNALS, '1', instance, 'tick', '-', '', '')
return {redis.call('HGET', STATE, 'born') or '0', known, now, redis.call('HGETALL', INSTANCES)}`)

	// Ends the leases of a silent instance, a part at a time.
	endScript = newScript(`
local instance, silent, cursor = unpack(ARGV, 3)
local beat = redis.call('HGET', INSTANCES, instance)
if not beat or redis.call('TIME')[1] - string.match(beat, '%d+') <= tonumber(silent) then return '0' end
local found = redis.call('HSCAN', USERS, cursor, 'COUNT', 200)
for i = 1, #found[2], 2 do
	local room, user = string.match(found[2][i], '^(%S+) (.*)$')
	if room then lease(instance, room, user, 'offline') end
end
if found[1] == '0' then redis.call('HDEL', INSTANCES, instance) end
return found[1]`)

	eraseScript = newScript(`
redis.call('ZREM', ROOMS, ARGV[3])
return add(MESSAGES, '0', '-', 'gap', ARGV[3], '', '')`)

	// Deletes what an erased room has in a stream, a part at a time.
	deleteScript = newScript(`
local stream, room, from, to = STREAMS[tonumber(ARGV[3])], ARGV[4], ARGV[5], ARGV[6]
local entries = redis.call('XRANGE', stream, from, to, 'COUNT', 200)
for _, entry in ipairs(entries) do
	if string.match(entry[2][2] or '', ' (%S+)$') == room then redis.call('XDEL', stream, entry[1]) end
end
return #entries == 200 and entries[200][1] or ''`)
)

var (
	errRedisAway    = limitError(503, "the relay cannot reach Redis, so nothing was published; try again", "redis", 2)
	errRedisSilent  = limitError(503, "Redis did not answer; the event may have been published. With a key it is safe to try again", "redis", 2)
	errRedisRefused = limitError(503, "Redis refused this; the log of the relay says why", "redis", 10)
)

// A redis is the log that instances share.
type redis struct {
	relay    *relay
	server   *server
	target   *redisTarget
	keys     []string // of every script
	events   int
	instance string
	stopping context.Context
	stop     context.CancelFunc
	ended    chan struct{} // closed when the instance has said that it leaves

	// Used by one goroutine, which reads.
	read  [2]string // the position in each stream
	last  [2]int64  // the newest id that was read of each; -1 before the first
	users int       // in all rooms, as all instances know them

	warnedAt time.Time // of an entry that is not ours

	mu          sync.Mutex          // guards what follows; may be locked under relay.mu
	pipeline    *pipeline           // nil while Redis is away
	back        chan struct{}       // closed when it is back
	awaySince   time.Time           // when it went
	contact     time.Time           // when it last answered
	born        string              // when Redis' memory begins
	applied     int64               // everything up to this id is in the log
	waiting     map[chan bool]int64 // for ids
	shared      map[share]string    // states that are still to be shared
	flushes     []chan bool         // wait until they are
	work        chan bool           // holds a token when there is something to share
	reconcileAt time.Time           // when to compare what instances know, or the zero time
	settleAt    time.Time           // until then others have not shared their users again
	instances   []instanceStatus
}

// A share is whose state it is. Client is only there for a goodbye.
type share struct{ room, user, client string }

// An instanceStatus describes an instance to an operator.
type instanceStatus struct {
	Instance    string `json:"instance"`
	Silent      int64  `json:"silent"` // seconds
	Connections int64  `json:"connections"`
	Rooms       int    `json:"rooms"`
	Users       int    `json:"users"`
}

// newRedis makes the server one of many on the Redis at the URL. Without a URL it returns nil.
func newRedis(s *server, rawURL, prefix string, events int) (*redis, error) {
	if rawURL == "" {
		return nil, nil
	}
	target, err := parseRedisURL(rawURL)
	if err != nil {
		return nil, err
	}
	if !validName(prefix) {
		return nil, errors.New("-redis-prefix is 1 to 64 of A-Z a-z 0-9 _ . : -")
	}
	target.maxBulk = int(4*s.maxBody) + 64<<10
	d := &redis{relay: s.relay, server: s, target: target, events: events, instance: s.instance, ended: make(chan struct{}),
		read: [2]string{"0-0", "0-0"}, last: [2]int64{-1, -1}, back: make(chan struct{}), awaySince: time.Now(), contact: time.Now(),
		waiting: map[chan bool]int64{}, shared: map[share]string{}, work: make(chan bool, 1)}
	for _, name := range []string{"state", "messages", "signals", "keys", "order", "rooms", "users", "instances"} {
		d.keys = append(d.keys, "{"+prefix+"}:"+name) // the braces keep them together in a cluster
	}
	d.stopping, d.stop = context.WithCancel(context.Background())
	r := s.relay
	r.lastID.Store(0) // ids are Redis' from now on
	r.share, r.awaitShared, r.lookahead = d.share, d.awaitShared, awayLookahead
	s.publish, s.erase, s.catchUp = d.publish, d.erase, d.catchUp

	var l *redisLink
	for start, pause := time.Now(), 100*time.Millisecond; ; pause *= 2 {
		if l, err = d.connect(); err == nil {
			break
		}
		if answer, ok := err.(redisError); (ok && !answer.isTemporary()) || errors.Is(err, errProtocol) || time.Since(start) > startTimeout {
			d.stop()
			return nil, fmt.Errorf("Redis at %s: %w", target.addr, err)
		}
		time.Sleep(pause)
	}
	go d.run(l)
	return d, nil
}

// Connecting.

// A redisLink is what an instance has to Redis while all goes well. The failure of either
// connection ends both.
type redisLink struct {
	*pipeline            // for commands
	reader    *redisConn // for reading the streams
}

// connect returns a link, after it has read all that the streams have.
func (d *redis) connect() (*redisLink, error) {
	conn, err := d.target.dial()
	if err != nil {
		return nil, err
	}
	l := &redisLink{pipeline: newPipeline(conn)}
	if err = d.beat(l.pipeline, 0); err == nil {
		l.reader, err = d.target.dial()
	}
	if err == nil && d.last[0] < 0 {
		err = d.begin(l.reader)
	}
	for n := 1; err == nil && n > 0; {
		n, err = d.readStreams(l.reader, 0)
	}
	if err == nil {
		d.found(l.pipeline)
		err = d.reconcile(l.pipeline)
	}
	if err != nil {
		d.drop(l, err)
		return nil, err
	}
	return l, nil
}

func (d *redis) drop(l *redisLink, err error) {
	l.fail(err)
	if l.reader != nil {
		l.reader.Close()
	}
	d.lost(l.pipeline)
}

// found takes note that Redis is there.
func (d *redis) found(p *pipeline) {
	d.relay.mu.Lock()
	defer d.relay.mu.Unlock()
	d.mu.Lock()
	defer d.mu.Unlock()
	d.relay.lookahead = idStep - 1
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
		d.pipeline, d.awaySince, d.back = nil, time.Now(), make(chan struct{})
		clear(d.shared)
	}
}

// begin sets the relay's counter and floor to where the streams begin.
func (d *redis) begin(conn *redisConn) error {
	reply, err := conn.do("XRANGE", d.keys[1], "-", "+", "COUNT", 1)
	if err != nil {
		return err
	}
	floor, _ := strconv.ParseInt(d.born, 10, 64)
	r := d.relay
	r.epoch = floor
	if entries, ok := reply.([]any); ok && len(entries) == 1 {
		if e := parseEntry(0, entries[0]); e.ok {
			floor = max(floor, e.previous)
		}
	}
	r.trimmedElsewhere = floor
	r.lastID.Store(floor)
	return nil
}

// run reads what other instances and this one have published, and reconnects when it has to.
func (d *redis) run(l *redisLink) {
	defer close(d.ended)
	for pause := time.Duration(0); ; {
		var err error
		if l == nil {
			l, err = d.connect()
		}
		if l != nil {
			pause = 0
			err = d.follow(l)
			if d.stopping.Err() != nil {
				d.beat(l.pipeline, silentAfter-leaveGrace) // others end our leases after leaveGrace
			}
			d.drop(l, err)
			l = nil
		}
		if d.stopping.Err() != nil {
			return
		}
		if pause == 0 {
			slog.Warn("Redis is away", "addr", d.target.addr, "error", err)
		}
		pause = min(max(2*pause, 50*time.Millisecond), 3*time.Second)
		select {
		case <-time.After(pause/2 + rand.N(pause)):
		case <-d.stopping.Done():
		}
	}
}

// follow uses the link until it fails.
func (d *redis) follow(l *redisLink) error {
	defer context.AfterFunc(d.stopping, func() { l.reader.Close() })()
	slog.Info("connected to Redis", "addr", d.target.addr)
	go func() {
		<-l.failed
		l.reader.Close()
	}()
	go d.beatForEver(l.pipeline)
	go d.sendShared(l.pipeline)
	for {
		if _, err := d.readStreams(l.reader, beatEvery); err != nil {
			return cmp.Or(l.error(), err)
		}
		d.mu.Lock()
		due := !d.reconcileAt.IsZero() && time.Now().After(d.reconcileAt)
		d.mu.Unlock()
		if due {
			if err := d.reconcile(l.pipeline); err != nil {
				return err
			}
		}
	}
}

func (d *redis) beatForEver(p *pipeline) {
	for range time.Tick(beatEvery) {
		select {
		case <-p.failed:
			return
		default:
		}
		if d.stopping.Err() != nil {
			return
		}
		if err := d.beat(p, 0); err != nil {
			p.fail(err)
			return
		}
	}
}

// beat says that this instance lives, or lived so long ago, and ends those that do not.
func (d *redis) beat(p *pipeline, age time.Duration) error {
	d.relay.mu.Lock()
	status := instanceStatus{Connections: d.server.active(), Rooms: d.relay.lru.Len(), Users: d.relay.leases}
	d.relay.mu.Unlock()
	info, _ := json.Marshal(status)
	reply, err := d.eval(p, replyTimeout, beatScript, d.instance, int(age.Seconds()), info)
	if err != nil {
		return err
	}
	values, _ := reply.([]any)
	if len(values) != 4 {
		return errProtocol
	}
	born, known, now := asString(values[0]), values[1] == int64(1), parseInt(asString(values[2]))
	var all []instanceStatus
	var silent []string
	for instance, beat := range pairs(values[3]) {
		at, info, _ := strings.Cut(beat, " ")
		status := instanceStatus{Instance: instance}
		json.Unmarshal([]byte(info), &status)
		status.Instance, status.Silent = instance, now-parseInt(at)
		if all = append(all, status); status.Silent > int64(silentAfter/time.Second) && instance != d.instance {
			silent = append(silent, instance)
		}
	}
	slices.SortFunc(all, func(a, b instanceStatus) int { return cmp.Compare(a.Instance, b.Instance) })
	d.mu.Lock()
	if d.contact = time.Now(); d.born != born && d.born != "" {
		d.settleAt = d.contact.Add(settleTime)
	}
	if d.born != born || !known {
		d.reconcileAt = d.contact
	}
	d.born, d.instances = born, all
	d.mu.Unlock()
	for _, instance := range silent {
		for cursor := "0"; ; {
			reply, err := d.eval(p, replyTimeout, endScript, instance, int(silentAfter/time.Second), cursor)
			if err != nil {
				return err
			}
			if cursor = asString(reply); cursor == "0" {
				break
			}
		}
	}
	return nil
}

// Reading.

// A redisEntry is an entry of a stream.
type redisEntry struct {
	stream       int
	at           string // its id in Redis
	major, minor uint64 // the two halves of that
	ok           bool   // it is one of ours; else it has only the above
	id, previous int64
	time         time.Time
	ttl          time.Duration
	instance     string // that caused it
	kind, room   string
	user         string
	data         []byte
}

// parseEntry reads an entry. Anybody may write to Redis, so all is checked as if it came
// from a client.
func parseEntry(stream int, reply any) (e redisEntry) {
	e.stream = stream
	values, _ := reply.([]any)
	if len(values) != 2 {
		return e
	}
	e.at = asString(values[0])
	major, minor, _ := strings.Cut(e.at, "-")
	e.major, _ = strconv.ParseUint(major, 10, 64)
	e.minor, _ = strconv.ParseUint(minor, 10, 64)
	fields, _ := values[1].([]any)
	if e.major > 1<<53 || e.minor != 0 || len(fields) != 6 {
		return e
	}
	e.id = int64(e.major)
	head := strings.Split(asString(fields[1]), " ")
	e.user = asString(fields[3])
	e.data, _ = fields[5].([]byte)
	if len(head) != 6 || !validUser(e.user) {
		return e
	}
	e.previous, e.time, e.ttl = parseInt(head[0]), time.UnixMilli(parseInt(head[1])), time.Duration(parseInt(head[2]))*time.Millisecond
	e.instance, e.kind, e.room = head[3], head[4], head[5]
	if e.previous < 0 || e.previous >= e.id || e.ttl < 0 || e.ttl > maxTTL*time.Second || !validName(e.kind) || !validName(e.room) || e.room[0] == '_' {
		return e
	}
	switch e.kind {
	case "tick", "gap", "goodbye":
		e.ok = true
	case "presence":
		e.ok = e.user == "" || slices.Contains(presenceStates, e.state())
	default:
		e.ok = json.Valid(e.data) && !bytes.ContainsAny(e.data, "\n\r") && !slices.Contains(reservedTypes, e.kind)
	}
	return e
}

func (e *redisEntry) state() string { return strings.Trim(string(e.data), `"`) }

// readStreams reads what is new in both streams, and waits for it if there is nothing. It
// returns how many entries it read.
func (d *redis) readStreams(conn *redisConn, wait time.Duration) (int, error) {
	args := []any{"XREAD", "COUNT", readCount}
	if wait > 0 {
		args = append(args, "BLOCK", int(wait/time.Millisecond))
	}
	conn.SetDeadline(time.Now().Add(wait + 5*time.Second))
	reply, err := conn.do(append(args, "STREAMS", d.keys[1], d.keys[2], d.read[0], d.read[1])...)
	if err != nil || reply == nil {
		return 0, err
	}
	streams, ok := reply.([]any)
	if !ok {
		return 0, errProtocol
	}
	var entries []redisEntry
	var upTo *redisEntry // what lies after it may come before something that was not read yet
	for _, v := range streams {
		pair, _ := v.([]any)
		if len(pair) != 2 {
			return 0, errProtocol
		}
		list, _ := pair[1].([]any)
		stream := slices.Index(d.keys[1:3], asString(pair[0]))
		if stream < 0 {
			return 0, errProtocol
		}
		for _, v := range list {
			e := parseEntry(stream, v)
			if e.at == "" {
				return 0, errProtocol
			}
			entries = append(entries, e)
		}
		if len(list) == readCount {
			if e := entries[len(entries)-1]; upTo == nil || e.compare(*upTo) < 0 {
				upTo = &e
			}
		}
	}
	slices.SortStableFunc(entries, redisEntry.compare)
	if upTo != nil {
		n, _ := slices.BinarySearchFunc(entries, *upTo, redisEntry.compare)
		entries = entries[:n+1]
	}
	d.apply(entries)
	return len(entries), nil
}

func (e redisEntry) compare(f redisEntry) int {
	return cmp.Or(cmp.Compare(e.major, f.major), cmp.Compare(e.minor, f.minor))
}

// apply does what the entries say, and lets those go on who wait for it.
func (d *redis) apply(entries []redisEntry) {
	r := d.relay
	lost := false
	applied := int64(0)
	r.mu.Lock()
	for i := range entries {
		e := &entries[i]
		d.read[e.stream] = e.at
		if !e.ok {
			if time.Since(d.warnedAt) > time.Minute {
				d.warnedAt = time.Now()
				slog.Warn("an entry in Redis is not of a relay, and is skipped", "stream", d.keys[1+e.stream], "entry", e.at)
			}
			continue
		}
		last := d.last[e.stream]
		d.last[e.stream], applied = e.id, e.id
		missing := last >= 0 && e.previous != last
		if e.id <= r.lastID.Load() {
			if last < 0 { // below the floor that we began with
				continue
			}
			// Redis was set back, and nobody had told it yet how far we are.
			missing = true
			e.id, e.kind = r.lastID.Load()+1, "tick"
		}
		if missing {
			lost = true
			r.raiseFloors(e.id-1, e.stream == 0)
		}
		d.applyEntry(e)
	}
	r.unlock()
	d.mu.Lock()
	defer d.mu.Unlock()
	if lost {
		slog.Warn("events are missing in Redis; subscribers are sent a gap")
		d.reconcileAt = time.Now()
		d.settleAt = time.Now().Add(settleTime)
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
	r := d.relay
	r.lastID.Store(e.id - 1)
	switch e.kind {
	case "tick":
	case "gap":
		r.eraseLocked(e.room)
	case "presence":
		d.applyPresence(e)
	case "goodbye":
		if rm := r.rooms[e.room]; rm != nil && rm.leases[e.user] != nil && e.instance != d.instance {
			now := time.Now()
			rm.leases[e.user].goodbye(string(e.data), now)
			r.announceChange(rm, e.user, rm.leases[e.user], now)
		}
	default:
		if e.ttl > 0 && e.time.Add(e.ttl).Before(time.Now()) {
			break // read too late
		}
		if r.isFull(r.rooms[e.room]) {
			r.dropHistory(r.lru.Back().Value.(*room))
		}
		r.add(publishRequest{room: e.room, kind: e.kind, from: e.user, ttl: e.ttl, data: e.data}, e.time)
	}
	r.lastID.Store(e.id)
}

// raiseFloors says that events up to an id are lost, in any room: messages, or only signals.
func (r *relay) raiseFloors(id int64, messages bool) {
	if messages {
		r.trimmedElsewhere = id
		clear(r.forgotten)
	}
	for name, rm := range r.rooms {
		if name[0] == '_' {
			continue
		}
		if messages {
			h := *rm.history.Load()
			h.trimmed = id
			rm.history.Store(&h)
		}
		r.dropSignals(rm, id)
	}
}

// dropSignals forgets the signals of a room, and has subscribers sent the roster.
func (r *relay) dropSignals(rm *room, id int64) {
	h := *rm.history.Load()
	h.signals, h.trimmedSignal = nil, id
	rm.history.Store(&h)
	r.bytes -= rm.signalBytes
	rm.signalBytes = 0
	r.changed = append(r.changed, rm)
}

// await waits until everything up to an id is in the log. It returns false if it is not in time.
func (d *redis) await(ctx context.Context, id int64, atMost time.Duration) bool {
	d.mu.Lock()
	if d.applied >= id {
		d.mu.Unlock()
		return true
	}
	ch := make(chan bool)
	d.waiting[ch] = id
	d.mu.Unlock()
	timer := time.NewTimer(atMost)
	defer timer.Stop()
	select {
	case <-ch:
		return true
	case <-timer.C:
	case <-ctx.Done():
	}
	d.mu.Lock()
	delete(d.waiting, ch)
	d.mu.Unlock()
	return ctx.Err() != nil
}

// catchUp waits for a cursor beyond the log, if Redis says that it will come.
func (d *redis) catchUp(ctx context.Context, cursor int64) {
	d.mu.Lock()
	p := d.pipeline
	d.mu.Unlock()
	if p == nil {
		return
	}
	newest, err := p.do(replyTimeout, "HGET", d.keys[0], "id")
	if err != nil {
		d.lost(p) // before the cursor is looked at
		return
	}
	if !d.await(ctx, min(cursor, parseInt(asString(newest))), 2*time.Second) { // this instance is far behind
		d.relay.mu.Lock()
		d.relay.lookahead = awayLookahead
		d.relay.mu.Unlock()
	}
}

// Publishing.

func (d *redis) publish(p publishRequest) (id int64, isNew bool, err error) {
	r := d.relay
	if p.room[0] == '_' {
		return r.publish(p) // ours alone
	}
	r.mu.Lock()
	full := r.isFull(r.rooms[p.room])
	r.mu.Unlock()
	switch {
	case r.isStopping():
		return 0, false, errStopping
	case full:
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
	reply, err := d.ask(p.key != "", orderScript, p.room, p.kind, p.from, p.ttl.Milliseconds(), p.key, onlyIf, p.data)
	if err != nil {
		return 0, false, err
	}
	answer := asString(reply)
	if answer == "" {
		return 0, false, errRedisRefused
	}
	id = parseInt(answer[1:])
	if answer[0] == 'i' {
		return 0, false, conflict(id)
	}
	d.await(context.Background(), id, 2*time.Second)
	return id, answer[0] == 'n', nil
}

// ask runs a script that publishes, and again after its answer was lost if it may.
func (d *redis) ask(again bool, s *script, args ...any) (any, error) {
	unknown := errRedisAway
	for deadline := time.Now().Add(publishTimeout); ; {
		left := time.Until(deadline)
		p := d.connected(left)
		if p == nil || left <= 0 {
			return nil, unknown
		}
		reply, err := d.eval(p, min(left, replyTimeout), s, args...)
		_, refused := err.(redisError)
		switch {
		case err == nil:
			return reply, nil
		case refused:
			slog.Error("Redis refused a publish", "error", err)
			return nil, errRedisRefused
		case err == errNotSent: // it has just failed
			d.lost(p)
		case !again:
			return nil, errRedisSilent
		default:
			unknown = errRedisSilent
		}
	}
}

// connected returns the pipeline. If Redis went away just now it waits for it.
func (d *redis) connected(atMost time.Duration) *pipeline {
	d.mu.Lock()
	p, back := d.pipeline, d.back
	if p == nil && time.Since(d.awaySince) > publishTimeout {
		atMost = 0
	}
	d.mu.Unlock()
	if p != nil || atMost <= 0 {
		return p
	}
	select {
	case <-back:
		return d.connected(0)
	case <-time.After(atMost):
		return nil
	}
}

// erase forgets a room everywhere, and then has Redis delete what it has of it.
func (d *redis) erase(name string) error {
	if d.relay.isStopping() {
		return errStopping
	}
	reply, err := d.ask(true, eraseScript, name)
	if err != nil {
		return err
	}
	id := asString(reply)
	d.await(context.Background(), parseInt(id), 2*time.Second)
	for stream := range 2 {
		for from := "-"; from != ""; {
			reply, err := d.ask(true, deleteScript, stream+1, name, from, id)
			if err != nil {
				return err
			}
			if from = asString(reply); from != "" {
				from = "(" + from
			}
		}
	}
	return nil
}

// eval runs a script. Redis knows it by its sum once it has seen it.
func (d *redis) eval(p *pipeline, timeout time.Duration, s *script, args ...any) (any, error) {
	all := append([]any{"EVALSHA", s.sha, len(d.keys)}, make([]any, 0, len(d.keys)+len(args)+2)...)
	for _, key := range d.keys {
		all = append(all, key)
	}
	all = append(append(all, d.relay.lastID.Load(), d.events), args...)
	reply, err := p.do(timeout, all...)
	if e, ok := err.(redisError); ok && strings.HasPrefix(string(e), "NOSCRIPT") {
		all[0], all[1] = "EVAL", s.text
		reply, err = p.do(timeout, all...)
	}
	return reply, err
}

// Presence.

// share has the state of a user, as this instance knows it, told to all. It is called
// under relay.mu. While Redis is away nothing is kept: later both sides are compared.
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

// awaitShared waits until what was shared so far has been applied here.
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
	case <-time.After(time.Second):
	}
}

// sendShared sends what is shared to Redis, all that is due at once.
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
		var wg sync.WaitGroup
		var newest int64
		var mu sync.Mutex
		limit := make(chan bool, 100)
		for key, state := range due {
			limit <- true
			wg.Go(func() {
				defer func() { <-limit }()
				reply, err := d.eval(p, replyTimeout, shareScript, d.instance, key.room, key.user, key.client, state)
				if err != nil {
					p.fail(err)
					return
				}
				mu.Lock()
				newest = max(newest, parseInt(asString(reply)))
				mu.Unlock()
				d.mu.Lock()
				if d.shared[key] == state {
					delete(d.shared, key)
				}
				d.mu.Unlock()
			})
		}
		wg.Wait()
		d.await(d.stopping, newest, time.Second)
		for _, ch := range flushes {
			close(ch)
		}
	}
}

// applyPresence takes what all instances now know of a user, and has the room told.
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
	state := e.state()
	before := cmp.Or(rm.elsewhere[e.user], "offline")
	d.users -= len(rm.elsewhere)
	if state == "offline" {
		delete(rm.elsewhere, e.user)
	} else if before != "offline" || d.users+len(rm.elsewhere) < 4*r.maxUsers {
		if rm.elsewhere == nil {
			rm.elsewhere = map[string]string{}
		}
		rm.elsewhere[e.user] = state
	}
	rm.online = len(rm.elsewhere)
	d.users += rm.online
	if before != state && e.time.Add(e.ttl).After(time.Now()) {
		if rm.isCrowded() {
			r.announceCount(rm, e.time)
		} else {
			r.announce(rm, e.user, e.data, e.time)
		}
	}
	if l := rm.leases[e.user]; l != nil && l.announced != "offline" {
		now := time.Now()
		if l.announced = state; e.instance != d.instance && state != "offline" {
			l.state, l.typingUntil = state, time.Time{}
			if state == "typing" {
				l.state, l.typingUntil = "online", now.Add(typingTTL)
			}
		}
		r.announceChange(rm, e.user, l, now)
	}
}

// reconcile compares the users that Redis has with those here. It is called by who reads
// the streams: whatever changes after Redis has answered is still to be read.
func (d *redis) reconcile(p *pipeline) error {
	reply, err := p.do(5*time.Second, "HGETALL", d.keys[6])
	if err != nil {
		return err
	}
	users := map[string]map[string]string{} // by room
	ours := map[share]string{}              // that this instance holds, as Redis has it
	for field, value := range pairs(reply) {
		room, user, _ := strings.Cut(field, " ")
		state, holders, _ := strings.Cut(value, " ")
		if !validName(room) || room[0] == '_' || user == "" || !validUser(user) || !slices.Contains(presenceStates, state) {
			continue
		}
		if users[room] == nil {
			users[room] = map[string]string{}
		}
		users[room][user] = state
		if strings.Contains(holders, d.instance) {
			ours[share{room, user, ""}] = state
		}
	}
	d.mu.Lock()
	d.reconcileAt = time.Time{}
	settled := !time.Now().Before(d.settleAt)
	if !settled {
		d.reconcileAt = d.settleAt
	}
	d.mu.Unlock()

	r := d.relay
	r.mu.Lock()
	defer r.unlock()
	if settled {
		d.replaceUsers(users)
	}
	now := time.Now()
	for _, rm := range r.rooms {
		for user, l := range rm.leases {
			state := l.stateAt(now)
			if key := (share{rm.name, user, ""}); state != "offline" {
				if ours[key] != state {
					d.share(rm.name, user, "", state)
				}
				delete(ours, key)
			}
		}
	}
	for key := range ours {
		d.share(key.room, key.user, "", "offline")
	}
	return nil
}

// replaceUsers takes the users that Redis has. Rooms where they differ are sent the roster.
func (d *redis) replaceUsers(users map[string]map[string]string) {
	r := d.relay
	id := r.lastID.Load() + 1
	for name := range users {
		r.openRoom(name)
	}
	d.users = 0
	for name, rm := range r.rooms {
		if d.users += len(users[name]); !maps.Equal(rm.elsewhere, users[name]) {
			rm.elsewhere, rm.online = users[name], len(users[name])
			r.dropSignals(rm, id)
			r.closeIfUnused(rm)
		}
	}
	r.lastID.Store(id)
}

// Operators.

// wrap returns a handler that says at /healthz when Redis is away.
func (d *redis) wrap(next http.Handler) http.Handler {
	if d == nil {
		return next
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		d.mu.Lock()
		silent := time.Since(d.contact)
		d.mu.Unlock()
		if r.URL.Path == "/healthz" && silent > unhealthyAfter && r.Method != http.MethodOptions {
			d.server.answer(w, r, func(http.ResponseWriter, *http.Request) error { return errUnhealthy })
			return
		}
		next.ServeHTTP(w, r)
	})
}

var errUnhealthy = limitError(503, "the relay cannot reach Redis", "redis", 2)

// status describes the instances, and says for how many seconds Redis has been away.
func (d *redis) status() any {
	d.mu.Lock()
	defer d.mu.Unlock()
	away := int64(0)
	if !d.awaySince.IsZero() {
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

// The protocol, RESP (https://redis.io/docs/latest/develop/reference/protocol-spec/): a command is
// an array of strings; a reply begins with a letter that says what it is.

// A redisError is Redis' word for what is wrong.
type redisError string

func (e redisError) Error() string {
	switch kind, _, _ := strings.Cut(string(e), " "); kind {
	case "READONLY":
		return "this Redis is a replica, which cannot be written to: " + string(e)
	case "WRONGTYPE":
		return "a key of this name holds something else; -redis-prefix chooses others: " + string(e)
	case "WRONGPASS", "NOAUTH":
		return "the password of the URL is wrong, or missing: " + string(e)
	}
	if strings.Contains(string(e), "nknown command") || strings.Contains(string(e), "Unknown Redis command") {
		return "this Redis is too old; it takes streams and scripts, so version 5 or later: " + string(e)
	}
	return string(e)
}

// isTemporary reports whether Redis will be there in a moment.
func (e redisError) isTemporary() bool {
	return strings.HasPrefix(string(e), "LOADING") || strings.HasPrefix(string(e), "BUSY") || strings.HasPrefix(string(e), "MASTERDOWN")
}

var (
	errProtocol = errors.New("what answers is not Redis")
	errNotSent  = errors.New("the connection has ended")
	errNoReply  = errors.New("no answer in time")
)

// A redisTarget is what a URL says.
type redisTarget struct {
	addr           string
	user, password string
	db             string
	tls            *tls.Config
	maxBulk        int
}

// parseRedisURL reads redis://user:password@host:port/db, or rediss:// for TLS. No error
// says what the URL is, since it may hold a password.
func parseRedisURL(raw string) (*redisTarget, error) {
	bad := func(what string) error {
		return errors.New("the Redis URL is redis://user:password@host:port/db, or rediss:// for TLS; " + what)
	}
	u, err := url.Parse(raw)
	switch {
	case err != nil:
		return nil, bad("this is not a URL; write special characters of the password as %40")
	case u.Scheme != "redis" && u.Scheme != "rediss":
		return nil, bad("it begins with redis:// or rediss://")
	case u.Hostname() == "":
		return nil, bad("it names a host")
	case u.RawQuery != "" || u.Fragment != "":
		return nil, bad("it has no ? and no #")
	}
	t := &redisTarget{addr: net.JoinHostPort(u.Hostname(), cmp.Or(u.Port(), "6379")), user: u.User.Username(), db: strings.Trim(u.Path, "/")}
	if t.password, _ = u.User.Password(); t.password == "" && t.user != "" {
		return nil, bad("it has a user and no password; redis://:password@host is a password alone")
	}
	if _, err := strconv.ParseUint(cmp.Or(t.db, "0"), 10, 16); err != nil {
		return nil, bad("its path is the number of a database")
	}
	if u.Scheme == "rediss" {
		t.tls = &tls.Config{ServerName: u.Hostname()}
	}
	return t, nil
}

// A redisConn is one connection.
type redisConn struct {
	net.Conn
	r       *bufio.Reader
	maxBulk int
}

// dial connects, and says who we are.
func (t *redisTarget) dial() (*redisConn, error) {
	dialer := &net.Dialer{Timeout: replyTimeout}
	var conn net.Conn
	var err error
	if t.tls != nil {
		conn, err = tls.DialWithDialer(dialer, "tcp", t.addr, t.tls)
	} else {
		conn, err = dialer.Dial("tcp", t.addr)
	}
	if err != nil {
		return nil, err
	}
	c := &redisConn{conn, bufio.NewReaderSize(conn, 32<<10), t.maxBulk}
	c.SetDeadline(time.Now().Add(replyTimeout))
	var commands [][]any
	switch {
	case t.user != "":
		commands = append(commands, []any{"AUTH", t.user, t.password})
	case t.password != "":
		commands = append(commands, []any{"AUTH", t.password})
	}
	if t.db != "" {
		commands = append(commands, []any{"SELECT", t.db})
	}
	for _, command := range append(commands, []any{"PING"}) {
		if _, err := c.do(command...); err != nil {
			c.Close()
			return nil, err
		}
	}
	c.SetDeadline(time.Time{})
	return c, nil
}

// do sends a command, and returns its reply.
func (c *redisConn) do(args ...any) (any, error) {
	if _, err := c.Write(appendCommand(nil, args...)); err != nil {
		return nil, err
	}
	reply, err := c.readReply(0)
	if e, ok := reply.(redisError); ok {
		return nil, e
	}
	return reply, err
}

func appendCommand(b []byte, args ...any) []byte {
	b = append(strconv.AppendInt(append(b, '*'), int64(len(args)), 10), "\r\n"...)
	var array [20]byte
	for _, arg := range args {
		var s []byte
		switch v := arg.(type) {
		case string:
			b = append(strconv.AppendInt(append(b, '$'), int64(len(v)), 10), "\r\n"...)
			b = append(append(b, v...), "\r\n"...)
			continue
		case []byte:
			s = v
		case int:
			s = strconv.AppendInt(array[:0], int64(v), 10)
		case int64:
			s = strconv.AppendInt(array[:0], v, 10)
		}
		b = append(strconv.AppendInt(append(b, '$'), int64(len(s)), 10), "\r\n"...)
		b = append(append(b, s...), "\r\n"...)
	}
	return b
}

const (
	maxReplyDepth = 8
	maxReplyItems = 1 << 20
)

// readReply reads a reply: nil, a redisError, int64, []byte or []any. A string that is
// longer than ours can be is read as nil.
func (c *redisConn) readReply(depth int) (any, error) {
	line, err := c.r.ReadSlice('\n')
	if err == bufio.ErrBufferFull {
		err = errProtocol
	}
	if err != nil {
		return nil, err
	}
	text, ok := strings.CutSuffix(string(line), "\r\n")
	if !ok || text == "" {
		return nil, fmt.Errorf("%w: it says %.60q", errProtocol, line)
	}
	kind, text := text[0], text[1:]
	n, err := strconv.ParseInt(text, 10, 64)
	switch {
	case kind == '+':
		return []byte(text), nil
	case kind == '-':
		return redisError(text), nil
	case err == nil && kind == ':':
		return n, nil
	case err == nil && n == -1 && (kind == '$' || kind == '*'):
		return nil, nil
	case err == nil && kind == '$' && n > int64(c.maxBulk) && n <= 512<<20:
		_, err := io.CopyN(io.Discard, c.r, n+2)
		return nil, err
	case err == nil && kind == '$' && n >= 0 && n <= int64(c.maxBulk):
		b := make([]byte, n+2)
		if _, err := io.ReadFull(c.r, b); err != nil {
			return nil, err
		}
		if !bytes.HasSuffix(b, []byte("\r\n")) {
			return nil, errProtocol
		}
		return b[:n], nil
	case err == nil && kind == '*' && n >= 0 && n <= maxReplyItems && depth < maxReplyDepth:
		values := []any{} // grows as values come, not as the number says
		for range n {
			v, err := c.readReply(depth + 1)
			if err != nil {
				return nil, err
			}
			values = append(values, v)
		}
		return values, nil
	}
	return nil, fmt.Errorf("%w: it says %.60q", errProtocol, line)
}

func asString(reply any) string {
	b, _ := reply.([]byte)
	return string(b)
}

// parseInt returns a number that is written as text, or 0.
func parseInt(s string) int64 {
	n, _ := strconv.ParseInt(s, 10, 64)
	return n
}

// pairs iterates over the fields and values of a hash.
func pairs(reply any) func(func(string, string) bool) {
	values, _ := reply.([]any)
	return func(yield func(string, string) bool) {
		for pair := range slices.Chunk(values, 2) {
			if len(pair) == 2 && !yield(asString(pair[0]), asString(pair[1])) {
				return
			}
		}
	}
}

// A pipeline is a connection that many use at once: what they send goes out together, and
// replies come in the same order.
type pipeline struct {
	conn   *redisConn
	failed chan struct{} // closed when it has ended
	work   chan bool     // holds a token when there is something to write

	mu     sync.Mutex // guards what follows
	unsent []byte
	calls  []*redisCall // without a reply yet, the oldest first
	err    error
}

type redisCall struct {
	reply any
	err   error
	done  chan struct{}
}

func newPipeline(conn *redisConn) *pipeline {
	p := &pipeline{conn: conn, failed: make(chan struct{}), work: make(chan bool, 1)}
	go p.write()
	go p.read()
	return p
}

func (p *pipeline) write() {
	var b []byte
	for {
		select {
		case <-p.work:
		case <-p.failed:
			return
		}
		p.mu.Lock()
		b, p.unsent = p.unsent, b[:0]
		p.mu.Unlock()
		p.conn.SetWriteDeadline(time.Now().Add(replyTimeout))
		if _, err := p.conn.Write(b); err != nil {
			p.fail(err)
			return
		}
		if cap(b) > 1<<20 {
			b = nil
		}
	}
}

func (p *pipeline) read() {
	for {
		reply, err := p.conn.readReply(0)
		if err != nil {
			p.fail(err)
			return
		}
		p.mu.Lock()
		if len(p.calls) == 0 {
			p.mu.Unlock()
			p.fail(errProtocol)
			return
		}
		c := p.calls[0]
		p.calls[0] = nil
		p.calls = p.calls[1:]
		p.mu.Unlock()
		if e, ok := reply.(redisError); ok {
			c.err = e
		}
		c.reply = reply
		close(c.done)
	}
}

// fail ends the connection, and all calls that wait.
func (p *pipeline) fail(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.err != nil {
		return
	}
	p.err = cmp.Or(err, errNotSent)
	p.conn.Close()
	for _, c := range p.calls {
		c.err = errNoReply
		close(c.done)
	}
	p.calls = nil
	close(p.failed)
}

func (p *pipeline) error() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.err
}

// do sends a command, and waits for its reply. It returns errNotSent if it was not sent.
func (p *pipeline) do(timeout time.Duration, args ...any) (any, error) {
	c := &redisCall{done: make(chan struct{})}
	p.mu.Lock()
	if p.err != nil {
		p.mu.Unlock()
		return nil, errNotSent
	}
	p.unsent = appendCommand(p.unsent, args...)
	p.calls = append(p.calls, c)
	p.mu.Unlock()
	select {
	case p.work <- true:
	default:
	}
	timer := time.NewTimer(timeout)
	defer timer.Stop()
	select {
	case <-c.done:
		return c.reply, c.err
	case <-timer.C:
		if timeout >= replyTimeout {
			p.fail(errNoReply)
		}
		return nil, errNoReply
	}
}
