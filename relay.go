// The log. Every room keeps its newest events, and that bounded log is every
// reader's queue: a reader owns a cursor and a wake-up, nothing else. To
// publish is to append and to wake; to read is to take what lies behind the
// cursor. A slow reader costs nothing: when its cursor falls off the end of
// the log it is told so, by a gap, and goes on.
//
// One counter gives the ids of all rooms, so one number is a place in any set
// of them, and a reader can change rooms or transport in mid-stream.

package main

import (
	"cmp"
	"container/list"
	"context"
	"encoding/json"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// limits bound what the relay keeps. At a bound the oldest goes first, and
// whoever asks for it is told by a gap; only new rooms, new users and what comes too
// fast are refused.
type limits struct {
	maxEvents    int           // messages a room keeps, and signals
	maxRoomBytes int           // bytes of messages a room keeps, and of signals
	maxBytes     int           // bytes all rooms keep together; the room idle longest loses its history first
	maxRooms     int           // rooms that were published to
	maxUsers     int           // leases in all rooms
	maxRoomRate  float64       // publishes a second to a room
	roomIdle     time.Duration // a room without reader and publish for so long is forgotten
	presenceTTL  time.Duration // who polls is present for so long
}

// eventBytes is what an event costs beside its JSON: the struct, its place in
// the log, an entry in the map of keys.
const eventOverhead = 256

// An event is immutable once it is published. Its JSON is encoded once and
// framed many times; json.Marshal escapes <, >, & and U+2028, so the same
// line is safe in SSE, NDJSON, JSONP and a <script>.
type event struct {
	id          int64
	kind        string // its type
	publishedAt int64  // when it was published, Unix milliseconds; 0 for a notice
	expiresAt   int64  // Unix milliseconds; 0 is a message, anything else a signal
	key         string
	json        []byte // of a picture, its SVG

	htmlOnce  sync.Once // renders page
	htmlCache []byte    // for people, see (*event).html
}

func (e *event) size() int { return eventOverhead + len(e.json) + len(e.key) }

// A view is what readers see of a room's log: immutable, swapped in whole.
type history struct {
	trimmed       int64    // the newest message lost; what is at or below it can't be read any more
	erased        int64    // the floor, when an operator erased the history; lower, if more was lost since
	messages      []*event // oldest first
	signals       []*event // oldest first; kept apart, so that they never push a message out
	trimmedSignal int64    // the newest signal dropped before its time, or presence event dropped
}

// A room is one named log.
type room struct {
	name    string
	history atomic.Pointer[history]

	// Guarded by relay.mu.
	keys                      map[string]int64 // publish keys within the history, and their ids
	messageBytes, signalBytes int
	lruElem                   *list.Element     // in relay.idlest; nil while nothing was published here
	lastUsed                  time.Time         // when it was last published to, or left by a reader
	rate                      tokenBucket       // of publishes
	leases                    map[string]*lease // by user, see presence.go
	online                    int               // users who are not offline
	summary                   summary

	// Readers are changed under both relay.mu and mu, so either is enough to look. They are
	// nearly in the order they came: to wake them in the order of memory is faster by a tenth.
	mu            sync.Mutex
	subscriptions []*subscription
}

// A relay is all rooms, and the one order of their events.
type relay struct {
	limits
	epoch    int64         // the process's start in Unix microseconds: ids begin behind it
	lastID   atomic.Int64  // readers may read up to here
	stopping chan struct{} // closed by stop, under mu: then nothing is published any more
	gaps     atomic.Int64  // told to readers

	mu               sync.Mutex // guards what follows, and with it the order of ids
	rooms            map[string]*room
	lru              *list.List             // rooms published to, the one published to last in front
	bytes            int                    // of all events kept
	leases           int                    // in all rooms
	trimmedByRoom    map[string]trimmedRoom // of rooms that are forgotten
	trimmedElsewhere int64                  // the floor of rooms whose own was forgotten too
}

var (
	errTooManyRooms = limitError(503, "there are too many rooms; publish to one that exists, or try again when one was forgotten", "rooms", 60)
	errStopping     = limitError(503, "the relay is stopping; try again", "", 2)
	errRoomTooFast  = limitError(429, "this room is published to too fast", "room", 1)
)

// newRelay makes a relay without rooms. Its ids begin at the clock's
// microseconds, so that an id from before a restart is never mistaken for one
// of today's, and still fits a JavaScript integer (2^53, the year 2255).
func newRelay(l limits) *relay {
	r := &relay{
		limits:        l,
		epoch:         time.Now().UnixMicro(),
		stopping:      make(chan struct{}),
		rooms:         map[string]*room{},
		lru:           list.New(),
		trimmedByRoom: map[string]trimmedRoom{},
	}
	r.lastID.Store(r.epoch)
	return r
}

// A post is what somebody asks to publish. All of it was checked where it
// entered: data is one line of JSON as json.Marshal writes it.
type publishRequest struct {
	room, kind, from, key string
	ttl                   time.Duration // 0 for a message
	onlyIf                *int64        // publish only if the room's newest message has this id, or is none for 0
	data                  []byte
	picture               []byte // instead of data, see picture.go
	unlimited             bool   // not bound by the room's rate: the relay's own, or of this machine
}

// publish appends p to its room and wakes the room's readers. It returns the
// event's id, and whether it is new: a key that the room's history holds
// already gives the first id, whatever p.onlyIf. A refused post changes nothing.
func (r *relay) publish(p publishRequest) (id int64, fresh bool, err error) {
	r.mu.Lock()
	rm, id, err := r.appendLocked(p)
	r.mu.Unlock()
	if rm == nil {
		return id, false, err
	}
	rm.wake()
	return id, true, nil
}

// appendLocked gives p an id, adds it to its room's log and moves the mark, all
// under r.mu: readers of several rooms must never pass an id that is still to
// come. It returns the room to wake, or nil if there is nothing new in it.
func (r *relay) appendLocked(p publishRequest) (*room, int64, error) {
	if r.isStopping() {
		return nil, 0, errStopping
	}
	rm := r.rooms[p.room]
	if rm != nil && p.key != "" {
		if id, known := rm.keys[p.key]; known {
			return nil, id, nil
		}
	}
	if p.onlyIf != nil {
		if newest := rm.newest(); newest != *p.onlyIf {
			f := newError(412, "another message was published to this room since; its id is the one to go on from")
			f.newest = newest
			return nil, 0, f
		}
	}
	now := time.Now()
	if rm != nil && !p.unlimited && !rm.rate.allow(r.maxRoomRate, now) {
		return nil, 0, errRoomTooFast
	}
	if rm == nil || rm.lruElem == nil {
		if r.lru.Len() >= r.limits.maxRooms {
			return nil, 0, errTooManyRooms
		}
		if rm == nil {
			rm = r.openRoom(p.room)
			rm.rate.allow(r.maxRoomRate, now) // a new room has some
		}
		rm.lruElem = r.lru.PushFront(rm)
	}

	e := &event{
		id:          r.lastID.Load() + 1,
		publishedAt: now.UnixMilli(),
		kind:        "message",
		key:         strings.Clone(p.key), // not to keep the request it is part of
		json:        p.picture,
	}
	if p.kind != "message" {
		e.kind = strings.Clone(p.kind)
	}
	if p.ttl > 0 {
		e.expiresAt = now.Add(p.ttl).UnixMilli()
	}
	if p.picture == nil {
		e.json = marshalEvent(e, rm.name, p.from, p.data)
	}

	rm.lastUsed = now
	r.lru.MoveToFront(rm.lruElem)
	r.addToHistory(rm, e)
	r.lastID.Store(e.id)
	return rm, e.id, nil
}

// newest is the id of the room's newest message, or 0 if it keeps none.
func (rm *room) newest() int64 {
	if rm != nil {
		if messages := rm.history.Load().messages; len(messages) > 0 {
			return messages[len(messages)-1].id
		}
	}
	return 0
}

// marshalEvent is the event as every transport sends it.
func marshalEvent(e *event, room, from string, data []byte) []byte {
	b := make([]byte, 0, 96+len(room)+len(e.kind)+len(from)+len(data))
	b = strconv.AppendInt(append(b, `{"id":`...), e.id, 10)
	b = append(append(b, `,"room":"`...), room...)
	b = append(append(b, `","type":"`...), e.kind...)
	b = append(b, '"')
	if from != "" {
		quoted, _ := json.Marshal(from)
		b = append(append(b, `,"from":`...), quoted...)
	}
	b = strconv.AppendInt(append(b, `,"time":`...), e.publishedAt, 10)
	b = append(append(b, `,"data":`...), data...)
	return append(b, '}')
}

// addToHistory adds e to the room's log and drops what is beyond the bounds.
func (r *relay) addToHistory(rm *room, e *event) {
	v := *rm.history.Load()
	most := r.maxEvents
	if rm.name[0] == ' ' { // of pictures, of which only the newest is of use
		most = 1
	}
	if e.key != "" {
		if rm.keys == nil {
			rm.keys = map[string]int64{}
		}
		rm.keys[e.key] = e.id
	}
	r.bytes += e.size()
	if e.expiresAt == 0 {
		v.messages = appendEvent(v.messages, e)
		rm.messageBytes += e.size()
		for len(v.messages) > most || rm.messageBytes > r.maxRoomBytes && len(v.messages) > 1 {
			v.trimmed = v.messages[0].id
			rm.messageBytes -= r.discount(rm, v.messages[0])
			v.messages = v.messages[1:]
		}
	} else {
		v.signals = appendEvent(v.signals, e)
		rm.signalBytes += e.size()
		for len(v.signals) > r.maxEvents || len(v.signals) > 1 && (rm.signalBytes > r.maxRoomBytes || v.signals[0].expiresAt <= e.publishedAt) {
			if old := v.signals[0]; old.expiresAt > e.publishedAt || old.kind == "presence" {
				v.trimmedSignal = old.id
			}
			rm.signalBytes -= r.discount(rm, v.signals[0])
			v.signals = v.signals[1:]
		}
	}
	rm.history.Store(&v)

	for r.bytes > r.maxBytes && r.lru.Len() > 1 {
		r.dropHistory(r.lru.Back().Value.(*room))
	}
}

// appendEvent appends e to a log. Views share the array beneath, so what one of them
// shows is never overwritten; a full array is left to them, and the log moves
// to one a quarter larger, so that what was dropped is soon let go.
func appendEvent(log []*event, e *event) []*event {
	if len(log) == cap(log) {
		log = append(make([]*event, 0, len(log)+len(log)/4+4), log...)
	}
	return append(log, e)
}

// discount takes an event off the books and returns its size.
func (r *relay) discount(rm *room, e *event) int {
	if e.key != "" {
		delete(rm.keys, e.key)
	}
	r.bytes -= e.size()
	return e.size()
}

// openRoom returns the room of that name, made if need be. A room that nobody
// published to lives as long as it has readers, and doesn't count.
func (r *relay) openRoom(name string) *room {
	rm := r.rooms[name]
	if rm == nil {
		rm = &room{name: strings.Clone(name)}
		v := &history{trimmed: r.trimmedElsewhere}
		if f, ok := r.trimmedByRoom[name]; ok {
			v.trimmed, v.erased = f.floor, f.erased
			delete(r.trimmedByRoom, name)
		}
		rm.history.Store(v)
		r.rooms[rm.name] = rm
	}
	return rm
}

// dropHistory drops a room's history, and the room itself when nobody reads it,
// but not its floor.
func (r *relay) dropHistory(rm *room) {
	r.empty(rm, max(rm.history.Load().trimmed, rm.newest()), false)
	r.closeIfUnused(rm)
}

// empty drops all that a room keeps. What is at or below floor is lost.
func (r *relay) empty(rm *room, floor int64, erased bool) {
	v := rm.history.Load()
	lost := &history{trimmed: floor, erased: v.erased, trimmedSignal: v.trimmedSignal}
	if erased {
		lost.erased = floor
	}
	if n := len(v.signals); n > 0 {
		lost.trimmedSignal = v.signals[n-1].id
	}
	r.bytes -= rm.messageBytes + rm.signalBytes
	rm.messageBytes, rm.signalBytes, rm.keys = 0, 0, nil
	rm.history.Store(lost)
	if rm.lruElem != nil {
		r.lru.Remove(rm.lruElem)
		rm.lruElem = nil
	}
}

// erase forgets what the named room keeps, and has its readers told. That takes
// an id: then every cursor there is lies before it, and goes on behind it.
func (r *relay) erase(name string) error {
	r.mu.Lock()
	if r.isStopping() {
		r.mu.Unlock()
		return errStopping
	}
	rm := r.rooms[name]
	if rm != nil {
		id := r.lastID.Load() + 1
		r.empty(rm, id, true)
		r.lastID.Store(id)
		r.closeIfUnused(rm)
	}
	r.mu.Unlock()
	if rm != nil {
		rm.wake()
	}
	return nil
}

// closeIfUnused removes a room without history, readers and users from the map, and
// remembers its floor. As many floors are remembered as there may be rooms;
// beyond that the newest of them stands for all, which can tell a reader of a
// gap that was none, but never hide one.
func (r *relay) closeIfUnused(rm *room) {
	if len(rm.subscriptions) > 0 || rm.lruElem != nil || len(rm.leases) > 0 {
		return
	}
	delete(r.rooms, rm.name)
	v := rm.history.Load()
	if v.trimmed <= r.trimmedElsewhere {
		return
	}
	if len(r.trimmedByRoom) >= r.limits.maxRooms {
		for _, f := range r.trimmedByRoom {
			r.trimmedElsewhere = max(r.trimmedElsewhere, f.floor)
		}
		clear(r.trimmedByRoom)
	}
	r.trimmedByRoom[rm.name] = trimmedRoom{v.trimmed, v.erased}
}

// What is remembered of a room that is forgotten; see view.
type trimmedRoom struct{ floor, erased int64 }

// sweep forgets the rooms that were neither published to nor read for a while.
func (r *relay) sweep(now time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for el := r.lru.Back(); el != nil; {
		rm := el.Value.(*room)
		el = el.Prev()
		if len(rm.subscriptions) == 0 && now.Sub(rm.lastUsed) >= r.roomIdle {
			r.dropHistory(rm)
		}
	}
}

// stop ends publishing and tells every reader. What was published before is
// still read: the order is the same for all.
func (r *relay) stop() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.isStopping() {
		close(r.stopping)
	}
}

// isStopping reports whether stop was called.
func (r *relay) isStopping() bool {
	select {
	case <-r.stopping:
		return true
	default:
		return false
	}
}

// wake tells the room's readers that there is something to read. It is called
// without r.mu: publishers must not wait for one another's readers.
func (rm *room) wake() {
	rm.mu.Lock()
	defer rm.mu.Unlock()
	var h wakeBatch
	defer h.flush()
	for _, seat := range rm.subscriptions {
		rd := seat.subscriber
		if rd.stream != nil {
			rd.stream.wakeIn(&h)
			continue
		}
		select {
		case rd.wakeup <- struct{}{}:
		default: // it has a token already, and one is enough to read everything
		}
	}
}

// A reader is one client's place in the log.
type subscriber struct {
	stream        *session // woken in place of woken, if set
	relay         *relay
	cursor        int64 // the cursor: the reader has everything up to here
	subscriptions []subscription
	inline        [1]subscription // mostly there is one
	unknownCursor bool            // the cursor given is not of this log; told with a gap by room
	presence      bool            // sees presence events
	needsRoster   bool            // the roster is to be told, at first and when a presence event was missed
	more          bool            // the last batch was cut short
	maxBatchBytes int             // see want
	rosterAsOf    int64           // presence events up to here are in the roster
	wakeup        chan struct{}   // holds one token while there may be something to read
	user          string          // whose leases leave gives up
	client        string          // and of which of their clients
}

// A seat is a reader's place in one room.
type subscription struct {
	subscriber *subscriber
	room       *room
	index      int // in room.readers

	baseline int64 // a floor up to here is no loss: the reader gave no cursor
}

// attach adds the seat to its room's.
func (s *subscription) attach() {
	s.room.mu.Lock()
	defer s.room.mu.Unlock()
	s.index = len(s.room.subscriptions)
	s.room.subscriptions = append(s.room.subscriptions, s)
}

// detach gives the seat up; the last takes its place.
func (s *subscription) detach() {
	s.room.mu.Lock()
	defer s.room.mu.Unlock()
	end := len(s.room.subscriptions) - 1
	last := s.room.subscriptions[end]
	last.index = s.index
	s.room.subscriptions[s.index], s.room.subscriptions[end] = last, nil
	s.room.subscriptions = s.room.subscriptions[:end]
}

// A want is what a reader asks for. All of it was checked where it entered.
type subscribeRequest struct {
	rooms         []string
	cursor        int64    // the cursor, or -1 for none
	last          int      // without a cursor: begin with the newest so many messages
	user          string   // be seen as this user, unless empty
	client        string   // which of the user's clients this is
	presence      bool     // see presence
	longLived     bool     // the connection is held open, so the user is here while it lasts
	maxBatchBytes int      // a batch ends with the event that makes it so long; 1 or more
	stream        *session // woken when there may be something to read; without it the reader can wait
}

// subscribe makes rd a reader. The caller calls leave when done with it, and does
// not copy it before: its rooms point to its seats.
func (r *relay) subscribe(rd *subscriber, w subscribeRequest) error {
	*rd = subscriber{relay: r, presence: w.presence, maxBatchBytes: w.maxBatchBytes, stream: w.stream}
	rd.subscriptions = rd.inline[:0]
	if n := len(w.rooms); n > 1 {
		rd.subscriptions = make([]subscription, 0, n)
	}
	if w.stream == nil {
		rd.wakeup = make(chan struct{}, 1)
	}
	r.mu.Lock()
	if err := r.checkLimits(w); err != nil {
		r.mu.Unlock()
		return err
	}
	told := false
	for i, name := range w.rooms {
		rm := r.openRoom(name)
		rd.subscriptions = append(rd.subscriptions, subscription{subscriber: rd, room: rm})
		rd.subscriptions[i].attach()
		if w.user != "" {
			told = r.acquireLease(rm, w.user, w.client, w.longLived) || told
		}
	}
	if w.longLived {
		rd.user, rd.client = w.user, w.client
	}
	rd.cursor = w.cursor
	switch mark := r.lastID.Load(); {
	case w.cursor < 0:
		rd.cursor = rd.cursorBeforeNewest(w.last)
		for i := range rd.subscriptions {
			rd.subscriptions[i].baseline = rd.subscriptions[i].room.history.Load().trimmed
		}
	case w.cursor > mark, w.cursor < r.epoch:
		rd.unknownCursor = true
	}
	r.mu.Unlock()
	if told {
		rd.wake()
	}
	return nil
}

// onlyRead is how many rooms there may be that are read and were not published to.
const maxUnpublishedRooms = 10_000

// checkLimits says whether there is room for who wants to read.
func (r *relay) checkLimits(w subscribeRequest) error {
	rooms, leases := len(r.rooms), r.leases
	for _, name := range w.rooms {
		rm := r.rooms[name]
		if rm == nil {
			rooms++
		}
		if w.user != "" && (rm == nil || rm.leases[w.user] == nil) {
			leases++
		}
	}
	switch {
	case rooms > len(r.rooms) && rooms > r.limits.maxRooms+maxUnpublishedRooms:
		return errTooManyRooms
	case leases > r.leases && leases > r.limits.maxUsers:
		return errTooManyUsers
	}
	return nil
}

// wake wakes the readers of all the reader's rooms.
func (rd *subscriber) wake() {
	for i := range rd.subscriptions {
		rd.subscriptions[i].room.wake()
	}
}

// cursorBeforeNewest returns the cursor behind which lie the newest n messages.
func (rd *subscriber) cursorBeforeNewest(n int) int64 {
	var ids []int64
	for i := range rd.subscriptions {
		m := rd.subscriptions[i].room.history.Load().messages
		for _, e := range m[max(0, len(m)-n):] {
			ids = append(ids, e.id)
		}
	}
	if n == 0 || len(ids) == 0 {
		return rd.relay.lastID.Load()
	}
	slices.Sort(ids)
	return ids[max(0, len(ids)-n)] - 1
}

// unsubscribe gives up the reader's place in its rooms.
func (rd *subscriber) unsubscribe() {
	r := rd.relay
	told := false
	r.mu.Lock()
	now := time.Now()
	for i := range rd.subscriptions {
		rm := rd.subscriptions[i].room
		rd.subscriptions[i].detach()
		rm.lastUsed = now
		if rd.user != "" {
			told = r.releaseLease(rm, rd.user, rd.client) || told
		}
		r.closeIfUnused(rm)
	}
	r.mu.Unlock()
	if told {
		rd.wake()
	}
}

// batchEvents is how many events are read at once, if they are not too many
// bytes before: those of one write, or one answer.
const maxBatchEvents = 256

// next appends to batch the events behind the cursor, in the order they were
// published, and moves the cursor: behind the last of them if the batch was cut
// short, else to the mark. It takes no lock. The mark is loaded before the
// views, so each view holds all that was published to its room up to the
// mark, and nothing beyond the mark is taken.
func (rd *subscriber) next(batch []*event) []*event {
	mark := rd.relay.lastID.Load()
	rd.more = false
	if mark == rd.cursor && !rd.unknownCursor {
		return batch
	}
	after := rd.cursor
	if rd.unknownCursor {
		after = rd.relay.epoch
	}
	var few [4][]*event // mostly there is one
	heads := few[:0]
	for i := range rd.subscriptions {
		v := rd.subscriptions[i].room.history.Load()
		if gap := rd.gap(&rd.subscriptions[i], v, mark, heads); gap != nil {
			heads = append(heads, []*event{gap})
		}
		if m := between(v.messages, after, mark); len(m) > 0 {
			heads = append(heads, m)
		}
		if m := between(v.signals, after, mark); len(m) > 0 {
			heads = append(heads, m)
		}
		rd.needsRoster = rd.needsRoster || rd.rosterAsOf != 0 && v.trimmedSignal > max(after, rd.rosterAsOf)
	}
	rd.unknownCursor = false

	now := int64(0) // asked only if there is a signal to judge
	for bytes := 0; len(heads) > 0; {
		if len(batch) == maxBatchEvents || bytes >= rd.maxBatchBytes {
			rd.cursor, rd.more = batch[len(batch)-1].id, true
			clear(heads) // not to keep what the log drops
			return batch
		}
		i := earliest(heads)
		e := heads[i][0]
		if heads[i] = heads[i][1:]; len(heads[i]) == 0 {
			heads = slices.Delete(heads, i, i+1)
		}
		if e.expiresAt != 0 {
			if now == 0 {
				now = time.Now().UnixMilli()
			}
			if e.kind == "presence" && (!rd.presence || e.id <= rd.rosterAsOf) {
				continue
			}
			if e.expiresAt <= now {
				rd.needsRoster = rd.needsRoster || e.kind == "presence" && rd.rosterAsOf != 0
				continue
			}
		}
		batch = append(batch, e)
		bytes += len(e.json)
	}
	rd.cursor = mark
	return batch
}

// gap returns the event that tells of what the reader may have lost in a
// room, or nil. Its id is the cursor to go on from, so it has its place among
// the events.
//
// Of several with one id the last alone has it: who was cut off before it, and
// comes back with the one before, is told again.
func (rd *subscriber) gap(s *subscription, v *history, mark int64, others [][]*event) *event {
	floor := min(v.trimmed, mark) // one beyond was raised while we read, and is told when we read on
	reason := "history"
	switch {
	case rd.unknownCursor && rd.cursor < rd.relay.epoch:
		reason = "restart"
	case rd.unknownCursor:
		reason = "future"
	case floor <= rd.cursor || floor <= s.baseline:
		return nil
	case v.trimmed == v.erased:
		reason = "erased"
	}
	rd.relay.gaps.Add(1)
	id := max(floor, rd.relay.epoch)
	if slices.ContainsFunc(others, func(o []*event) bool { return o[0].kind == "gap" && o[0].id == id }) {
		id--
	}
	return notice{Type: "gap", Room: s.room.name, ID: new(id), Data: map[string]string{"reason": reason}}.event()
}

// isErasure reports whether the event tells that all before it was erased.
func (e *event) isErasure() bool {
	return e.kind == "gap" && strings.HasSuffix(string(e.json), `{"reason":"erased"}}`)
}

// between returns the events of a log behind after, up to mark.
func between(log []*event, after, mark int64) []*event {
	byID := func(e *event, id int64) int { return cmp.Compare(e.id, id) }
	if len(log) == 0 || log[len(log)-1].id <= after {
		return nil
	}
	from, _ := slices.BinarySearchFunc(log, after+1, byID)
	to, _ := slices.BinarySearchFunc(log, mark+1, byID)
	return log[from:to]
}

// earliest returns which of the logs begins with the smallest id. An event comes
// before a gap of the same id: who takes that for a cursor must have the event.
func earliest(heads [][]*event) int {
	first := 0
	for i := range heads {
		a, b := heads[i][0], heads[first][0]
		if a.id < b.id || a.id == b.id && b.kind == "gap" {
			first = i
		}
	}
	return first
}

// wait blocks until there may be something to read, and reports whether there
// may. It gives up when the clock ticks, the client is gone, or the relay stops.
func (rd *subscriber) wait(ctx context.Context, clock <-chan time.Time) bool {
	select {
	case <-rd.wakeup:
		return true
	case <-clock:
	case <-ctx.Done():
	case <-rd.relay.stopping:
	}
	return false
}

// A notice is what the relay itself says to one client.
type notice struct {
	Type string `json:"type"`
	Room string `json:"room,omitempty"`
	Key  string `json:"key,omitempty"`
	ID   *int64 `json:"id,omitempty"`
	Data any    `json:"data,omitempty"`
}

// event returns the notice as an event that is in no log.
func (n notice) event() *event {
	b, _ := json.Marshal(n) // of strings, numbers and maps of them: it can't fail
	e := &event{kind: n.Type, json: b}
	if n.ID != nil {
		e.id = *n.ID
	}
	return e
}
