// The log. Each room keeps its newest events, and that bounded log is the queue
// of every subscriber: a subscriber owns a cursor and a wake-up, nothing else. To
// publish is to append to the log and to wake; to read is to take what lies after
// the cursor. A slow subscriber costs nothing: when its cursor falls off the end
// of the log, it is sent a gap and goes on.
//
// One counter numbers the events of all rooms. So one number is a position in any
// set of rooms, and a client can change rooms or technique in mid-stream.

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

// limits bound what the relay keeps. At a bound the oldest events are dropped, and
// a subscriber that asks for them is sent a gap. Only new rooms and new users are refused.
type limits struct {
	maxEvents    int           // messages that a room keeps, and as many signals
	maxRoomBytes int           // bytes of messages that a room keeps, and of signals
	maxBytes     int           // bytes that all rooms keep; the room idle longest loses its history first
	maxRooms     int           // rooms that were published to
	maxUsers     int           // leases in all rooms, see presence.go
	roomIdle     time.Duration // a room that nobody reads or publishes to is forgotten after this time
	presenceTTL  time.Duration // a user who polls is present for this time
}

var defaultLimits = limits{
	maxEvents:    256,
	maxRoomBytes: 1 << 20,
	maxBytes:     32 << 20,
	maxRooms:     10_000,
	maxUsers:     20_000,
	roomIdle:     10 * time.Minute,
	presenceTTL:  time.Minute,
}

const (
	eventOverhead = 256     // bytes of an event beside its JSON: the struct, its slot in the log, an entry in the map of keys
	largeEvent    = 1 << 10 // bytes; above, a dropped event is freed at once
)

// An event does not change after it was published. Its JSON is encoded once and
// framed many times. json.Marshal escapes <, >, & and U+2028, so the same line is
// safe in SSE, NDJSON, JSONP and a <script>.
type event struct {
	id          int64
	kind        string // the field type
	publishedAt int64  // Unix milliseconds; 0 for a notice
	expiresAt   int64  // Unix milliseconds; 0 for a message, else it is a signal
	key         string
	json        []byte
}

func (e *event) size() int { return eventOverhead + len(e.json) + len(e.key) }

// A history is an immutable view of what a room keeps. It is replaced as a whole.
type history struct {
	messages eventLog
	signals  eventLog // apart from the messages, so that they never push one out
	erased   int64    // the last erasure; if it is also the floor of the messages, the gap says so
}

// An eventLog is the newest events of a room.
type eventLog struct {
	events []*event // oldest first
	bytes  int      // of all of them
	floor  int64    // the newest event that was dropped; a signal that had expired counts only if it was presence
}

// newest returns the id of the newest event, or 0.
func (l *eventLog) newest() int64 {
	if len(l.events) == 0 {
		return 0
	}
	return l.events[len(l.events)-1].id
}

// A room is one named log.
type room struct {
	name    string
	history atomic.Pointer[history]

	// Guarded by relay.mu.
	keys      map[string]int64  // the keys in the history, and their ids
	lruElem   *list.Element     // in relay.lru; nil while the room keeps nothing
	lastUsed  time.Time         // when it was published to, or lost a subscriber
	leases    map[string]*lease // by user
	elsewhere map[string]string // the states of users as all relays know them; nil if this one is alone
	online    int               // users who are not offline
	summary   summary

	// Changed under both relay.mu and mu, so either is enough for reading. A slice and not a
	// map: it is nearly in the order of memory, and a large room is woken a tenth faster.
	mu            sync.Mutex
	subscriptions []*subscription
}

// A relay is all rooms, and the one order of their events.
type relay struct {
	limits
	epoch    int64         // the start of the process in Unix microseconds; ids are above it
	lastID   atomic.Int64  // subscribers may read up to here
	stopping chan struct{} // closed by stop, under mu; then nothing is published any more

	// wakeRoom wakes the subscribers of a room. A layer that drives many replaces it.
	wakeRoom func(*room)

	// For a layer that shares one log among many relays. announceState is called under mu, and
	// may not block; without such a layer it is publishState of presence.go. A cursor up to
	// lookahead above lastID is accepted, since another relay may have issued it.
	announceState func(rm *room, user string, l *lease, state string, now time.Time)
	lookahead     int64

	mu             sync.Mutex // guards what follows, and the order of ids; see unlock
	rooms          map[string]*room
	changed        []*room             // those with a new event since mu was locked
	lru            *list.List          // the rooms that keep something; the one published to last is in front
	bytes          int                 // of all events kept
	leases         int                 // in all rooms
	forgotten      map[string]*history // of forgotten rooms, for their floors
	floorElsewhere int64               // the floor of every room that is in neither map
}

var (
	errTooManyRooms = limitError(503, "there are too many rooms; publish to one that exists, or try again when one was forgotten", "rooms", 60)
	errStopping     = limitError(503, "the relay is stopping; try again", "", 2)
)

// newRelay returns a relay without rooms. Its ids begin at the clock's
// microseconds: an id from before a restart is never taken for one of today's, and
// ids fit a JavaScript integer (2^53 microseconds are the year 2255).
func newRelay(l limits) *relay {
	r := &relay{
		limits:    l,
		epoch:     time.Now().UnixMicro(),
		stopping:  make(chan struct{}),
		wakeRoom:  wakeEach,
		rooms:     map[string]*room{},
		lru:       list.New(),
		forgotten: map[string]*history{},
	}
	r.announceState = r.publishState
	r.lastID.Store(r.epoch)
	return r
}

// Publishing.

// A publishRequest asks for an event to be published. Its fields were checked
// where they entered: data is one line of JSON as json.Marshal writes it.
type publishRequest struct {
	room, kind, from, key string
	ttl                   time.Duration // 0 for a message
	onlyIf                *int64        // publish only if this is the id of the room's newest message; 0: it has none
	data                  []byte
	allow                 func() error // asked last, if not nil; called with relay.mu held, and may not block
}

// publish appends an event to its room and wakes the room's subscribers. It returns
// the event's id, and whether it is new: a key that is in the room's history returns
// the id of the first event, whatever onlyIf says. An error changes nothing.
func (r *relay) publish(p publishRequest) (id int64, isNew bool, err error) {
	r.mu.Lock()
	defer r.unlock()
	if r.isStopping() {
		return 0, false, errStopping
	}
	rm := r.rooms[p.room]
	if rm != nil && p.key != "" {
		if id, known := rm.keys[p.key]; known {
			return id, false, nil
		}
	}
	if p.onlyIf != nil {
		newest := int64(0)
		if rm != nil {
			newest = rm.history.Load().messages.newest()
		}
		if newest != *p.onlyIf {
			return 0, false, conflict(newest)
		}
	}
	if p.allow != nil {
		if err := p.allow(); err != nil {
			return 0, false, err
		}
	}
	if r.isFull(rm) {
		return 0, false, errTooManyRooms
	}
	return r.add(p, time.Now()), true, nil
}

// isFull reports whether there are too many rooms for one more, unless rm is one of them.
func (r *relay) isFull(rm *room) bool {
	return (rm == nil || rm.lruElem == nil) && r.lru.Len() >= r.maxRooms
}

// add makes an event with the next id, and appends it.
func (r *relay) add(p publishRequest, now time.Time) int64 {
	// What is kept is cloned here and below: a part of a string keeps all of it in memory, and
	// this would be the whole request.
	e := &event{kind: "message", publishedAt: now.UnixMilli(), key: strings.Clone(p.key)}
	if p.kind != "message" {
		e.kind = strings.Clone(p.kind)
	}
	if p.ttl > 0 {
		e.expiresAt = now.Add(p.ttl).UnixMilli()
	}
	e.id = r.lastID.Load() + 1
	e.json = marshalEvent(e, p.room, p.from, p.data)
	r.append(p.room, e)
	return e.id
}

// append adds an event with the next id to a room's log. Id, log and lastID change
// together under r.mu: a subscriber of several rooms must never pass an id that is
// still to come.
func (r *relay) append(name string, e *event) {
	rm := r.openRoom(name)
	if rm.lruElem == nil {
		rm.lruElem = r.lru.PushFront(rm)
	}
	rm.lastUsed = time.Now()
	r.lru.MoveToFront(rm.lruElem)
	r.addToHistory(rm, e)
	r.lastID.Store(e.id)
	for r.bytes > r.maxBytes && r.lru.Len() > 1 {
		r.dropHistory(r.lru.Back().Value.(*room))
	}
	r.changed = append(r.changed, rm)
}

// marshalEvent encodes an event as every technique sends it.
func marshalEvent(e *event, room, from string, data []byte) []byte {
	b := make([]byte, 0, 96+len(room)+len(e.kind)+len(from)+len(data))
	b = strconv.AppendInt(append(b, `{"id":`...), e.id, 10)
	b = append(append(b, `,"room":"`...), room...)
	b = append(append(b, `","type":"`...), e.kind...)
	b = append(b, '"')
	if from != "" {
		b = appendQuoted(append(b, `,"from":`...), []byte(from))
	}
	b = strconv.AppendInt(append(b, `,"time":`...), e.publishedAt, 10)
	b = append(append(b, `,"data":`...), data...)
	return append(b, '}')
}

// addToHistory adds an event to its room's history. It drops what is beyond the bounds, and
// signals that have expired.
func (r *relay) addToHistory(rm *room, e *event) {
	h := *rm.history.Load()
	log := &h.messages
	if e.expiresAt != 0 {
		log = &h.signals
	}
	if e.key != "" {
		if rm.keys == nil {
			rm.keys = map[string]int64{}
		}
		rm.keys[e.key] = e.id
	}
	if len(log.events) == cap(log.events) {
		log.move()
	}
	log.events = append(log.events, e)
	log.bytes += e.size()
	r.bytes += e.size()
	large := false
	for len(log.events) > 1 {
		old := log.events[0]
		expired := old.expiresAt != 0 && old.expiresAt <= e.publishedAt
		if len(log.events) <= r.maxEvents && log.bytes <= r.maxRoomBytes && !expired {
			break
		}
		if !expired || old.kind == "presence" {
			log.floor = max(log.floor, old.id)
		}
		if old.key != "" {
			delete(rm.keys, old.key)
		}
		log.bytes -= old.size()
		r.bytes -= old.size()
		log.events = log.events[1:]
		large = large || old.size() > largeEvent
	}
	if large { // the old array would keep it in memory, uncounted
		log.move()
	}
	rm.history.Store(&h)
}

// move copies the events into an array a quarter larger. The one before is left to the older
// histories that share it, so dropped events are soon collected.
func (l *eventLog) move() {
	l.events = append(make([]*event, 0, len(l.events)+len(l.events)/4+4), l.events...)
}

// unlock releases r.mu and then wakes the subscribers of the rooms that changed, so
// publishers do not wait for each other's subscribers.
func (r *relay) unlock() {
	var array [4]*room // most change one
	changed := append(array[:0], r.changed...)
	clear(r.changed)
	r.changed = r.changed[:0]
	r.mu.Unlock()
	for _, rm := range changed {
		r.wakeRoom(rm)
	}
}

func wakeEach(rm *room) {
	rm.mu.Lock()
	defer rm.mu.Unlock()
	for _, s := range rm.subscriptions {
		s.subscriber.wake()
	}
}

// Rooms.

// openRoom returns the room of that name, created if necessary. A room that keeps
// nothing lives as long as it has subscribers or users, and maxRooms does not count it.
func (r *relay) openRoom(name string) *room {
	rm := r.rooms[name]
	if rm == nil {
		rm = &room{name: strings.Clone(name)}
		h := r.forgotten[name]
		if h == nil {
			h = &history{messages: eventLog{floor: r.floorElsewhere}}
		}
		delete(r.forgotten, name)
		rm.history.Store(h)
		r.rooms[rm.name] = rm
	}
	return rm
}

// dropHistory forgets what a room keeps, and the room itself if it is unused.
func (r *relay) dropHistory(rm *room) {
	h := rm.history.Load()
	r.clearHistory(rm, max(h.messages.floor, h.messages.newest()), h.erased)
	r.closeIfUnused(rm)
}

// erase forgets what the named room keeps and sends its subscribers a gap. The gap
// takes an id of its own: every cursor there is lies before it, and stays good.
func (r *relay) erase(name string) error {
	r.mu.Lock()
	defer r.unlock()
	if r.isStopping() {
		return errStopping
	}
	r.eraseLocked(name)
	return nil
}

func (r *relay) eraseLocked(name string) {
	if rm := r.rooms[name]; rm != nil {
		id := r.lastID.Load() + 1
		r.clearHistory(rm, id, id)
		r.lastID.Store(id)
		r.closeIfUnused(rm)
		r.changed = append(r.changed, rm)
	}
}

func (r *relay) clearHistory(rm *room, floor, erased int64) {
	h := rm.history.Load()
	signals := eventLog{floor: max(h.signals.floor, h.signals.newest())}
	rm.history.Store(&history{messages: eventLog{floor: floor}, signals: signals, erased: erased})
	r.bytes -= h.messages.bytes + h.signals.bytes
	rm.keys = nil
	if rm.lruElem != nil {
		r.lru.Remove(rm.lruElem)
		rm.lruElem = nil
	}
}

// closeIfUnused removes a room without history, subscribers and users, and remembers
// its floor. As many floors are remembered as there may be rooms. Beyond that the
// newest of them becomes the floor of all: a subscriber may be sent a gap where nothing
// was lost, but never misses one.
func (r *relay) closeIfUnused(rm *room) {
	if len(rm.subscriptions) > 0 || rm.lruElem != nil || len(rm.leases)+len(rm.elsewhere) > 0 {
		return
	}
	delete(r.rooms, rm.name)
	h := rm.history.Load()
	if h.messages.floor <= r.floorElsewhere {
		return
	}
	if len(r.forgotten) >= r.maxRooms {
		for _, f := range r.forgotten {
			r.floorElsewhere = max(r.floorElsewhere, f.messages.floor)
		}
		clear(r.forgotten)
	}
	r.forgotten[rm.name] = h
}

// sweep forgets the rooms that nobody has read or published to for roomIdle.
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

// stop ends publishing. What was published before is still read.
func (r *relay) stop() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.isStopping() {
		close(r.stopping)
	}
}

func (r *relay) isStopping() bool {
	select {
	case <-r.stopping:
		return true
	default:
		return false
	}
}

// Subscribing.

// A subscriber is one client's position in the log. It is used by one goroutine at
// a time; wake may be called by any.
type subscriber struct {
	relay         *relay
	cursor        int64          // everything up to here was read
	lost          string         // why the client's cursor is not from this log, if so; then each room is due a gap
	subscriptions []subscription // one for each room
	more          bool           // the last batch was cut short
	maxBatchBytes int
	wakeup        chan struct{} // holds a token while there may be something to read; nil with a driver
	driver        any           // what reads for the subscriber in place of a goroutine, if anything; for wakeRoom

	// See presence.go.
	seesPresence bool
	user, client string // whose leases unsubscribe releases
	needsRoster  bool   // a roster is due: at first, and after a presence event was missed
	rosterAsOf   int64  // presence events up to here are in the roster
}

// A subscription is a subscriber's entry in one room.
type subscription struct {
	subscriber *subscriber
	room       *room
	index      int   // in room.subscriptions
	baseline   int64 // without a cursor: the floor at the start, which is no loss
}

// A subscribeRequest says what to read. Its fields were checked where they entered.
type subscribeRequest struct {
	rooms         []string
	cursor        int64 // or -1 for none
	last          int   // without a cursor: begin with so many of the newest messages
	maxBatchBytes int   // a batch ends with the event that reaches this size; 1 or more
	driver        any   // see subscriber
	user, client  string
	seesPresence  bool
	longLived     bool // the connection stays open, so the user is present while it lasts
}

// maxUnpublishedRooms is how many rooms may have subscribers and no history.
const maxUnpublishedRooms = 10_000

// subscribe initializes sub. The caller calls unsubscribe when done, and does not
// copy sub in between: its rooms point to it.
func (r *relay) subscribe(sub *subscriber, q subscribeRequest) error {
	*sub = subscriber{relay: r, seesPresence: q.seesPresence, maxBatchBytes: q.maxBatchBytes, driver: q.driver}
	if q.driver == nil {
		sub.wakeup = make(chan struct{}, 1)
	}
	r.mu.Lock()
	defer r.unlock()
	if err := r.checkLimits(q); err != nil {
		return err
	}
	sub.subscriptions = make([]subscription, len(q.rooms))
	for i, name := range q.rooms {
		rm := r.openRoom(name)
		sub.subscriptions[i] = subscription{subscriber: sub, room: rm}
		sub.subscriptions[i].attach()
		if q.user != "" {
			r.acquireLease(rm, q.user, q.client, q.longLived)
		}
	}
	if q.longLived {
		sub.user, sub.client = q.user, q.client
	}
	sub.setCursor(q.cursor, q.last)
	return nil
}

// setCursor puts the subscriber where its client was: next returns all that was published
// since, and a gap where the log does not reach back so far. A client without a cursor
// begins with the newest messages, and what the log dropped before is no loss to it.
func (sub *subscriber) setCursor(cursor int64, last int) {
	r := sub.relay
	sub.cursor, sub.lost = cursor, ""
	switch {
	case cursor < 0:
		sub.cursor = sub.cursorBeforeNewest(last)
		for i := range sub.subscriptions {
			sub.subscriptions[i].baseline = sub.subscriptions[i].room.history.Load().messages.floor
		}
	case cursor < r.epoch:
		sub.lost = "restart"
	case cursor > r.lastID.Load()+r.lookahead:
		sub.lost = "future"
	}
}

func (r *relay) checkLimits(q subscribeRequest) error {
	newRooms, newLeases := 0, 0
	for _, name := range q.rooms {
		if r.rooms[name] == nil {
			newRooms++
		}
		if q.user != "" && !r.hasLease(name, q.user) {
			newLeases++
		}
	}
	switch {
	case newRooms > 0 && len(r.rooms)+newRooms > r.maxRooms+maxUnpublishedRooms:
		return errTooManyRooms
	case newLeases > 0 && r.leases+newLeases > r.maxUsers:
		return errTooManyUsers
	}
	return nil
}

// cursorBeforeNewest returns the cursor after which lie the newest n messages.
func (sub *subscriber) cursorBeforeNewest(n int) int64 {
	var ids []int64
	for i := range sub.subscriptions {
		messages := sub.subscriptions[i].room.history.Load().messages.events
		for _, e := range messages[max(0, len(messages)-n):] {
			ids = append(ids, e.id)
		}
	}
	if n == 0 || len(ids) == 0 {
		return sub.relay.lastID.Load()
	}
	slices.Sort(ids)
	return ids[max(0, len(ids)-n)] - 1
}

// unsubscribe may be called again.
func (sub *subscriber) unsubscribe() {
	r := sub.relay
	r.mu.Lock()
	defer r.unlock()
	for i := range sub.subscriptions {
		rm := sub.subscriptions[i].room
		sub.subscriptions[i].detach()
		rm.lastUsed = time.Now()
		if sub.user != "" {
			r.releaseLease(rm, sub.user, sub.client)
		}
		r.closeIfUnused(rm)
	}
	sub.subscriptions = nil
}

func (s *subscription) attach() {
	s.room.mu.Lock()
	defer s.room.mu.Unlock()
	s.index = len(s.room.subscriptions)
	s.room.subscriptions = append(s.room.subscriptions, s)
}

func (s *subscription) detach() {
	s.room.mu.Lock()
	defer s.room.mu.Unlock()
	end := len(s.room.subscriptions) - 1
	last := s.room.subscriptions[end]
	last.index = s.index
	s.room.subscriptions[s.index], s.room.subscriptions[end] = last, nil
	s.room.subscriptions = s.room.subscriptions[:end]
	if end == 0 {
		s.room.subscriptions = nil // a crowd may have left a large array
	}
}

// Reading.

// wake tells the subscriber that there may be something to read. Wake-ups coalesce:
// one token is enough to read everything.
func (sub *subscriber) wake() {
	select {
	case sub.wakeup <- struct{}{}:
	default:
	}
}

// wait blocks until there may be something to read, and reports whether there may.
// It gives up when the clock ticks, the client is gone, or the relay stops.
func (sub *subscriber) wait(ctx context.Context, clock <-chan time.Time) bool {
	select {
	case <-sub.wakeup:
		return true
	case <-clock:
	case <-ctx.Done():
	case <-sub.relay.stopping:
	}
	return false
}

// maxBatchEvents is how many events are read at once: those of one write, or one answer.
const maxBatchEvents = 256

// next appends to batch the events after the cursor, in the order they were
// published, and moves the cursor: to the last of them if the batch was cut short,
// else to the newest id. It takes no lock. The newest id is loaded before the
// histories, so each history holds everything up to that id; nothing above it is taken.
func (sub *subscriber) next(batch []*event) []*event {
	lastID := sub.relay.lastID.Load()
	sub.more = false
	if lastID <= sub.cursor && sub.lost == "" {
		return batch
	}
	cursor := sub.cursor
	if sub.lost != "" {
		cursor = sub.relay.epoch
	}
	var array [4][]*event // most need no more
	logs := array[:0]
	for i := range sub.subscriptions {
		h := sub.subscriptions[i].room.history.Load()
		if gap := sub.gap(&sub.subscriptions[i], h, lastID, logs); gap != nil {
			logs = append(logs, []*event{gap})
		}
		for _, log := range [2][]*event{h.messages.events, h.signals.events} {
			if log = between(log, cursor, lastID); len(log) > 0 {
				logs = append(logs, log)
			}
		}
		sub.needsRoster = sub.needsRoster || sub.rosterAsOf != 0 && h.signals.floor > max(cursor, sub.rosterAsOf)
	}
	sub.lost = ""

	now := int64(0) // read only if there is a signal
	for bytes := 0; len(logs) > 0; {
		if len(batch) == maxBatchEvents || bytes >= sub.maxBatchBytes {
			sub.cursor, sub.more = batch[len(batch)-1].id, true
			clear(logs) // the array must not keep what the log drops
			return batch
		}
		i := earliest(logs)
		e := logs[i][0]
		if logs[i] = logs[i][1:]; len(logs[i]) == 0 {
			logs = slices.Delete(logs, i, i+1)
		}
		if e.expiresAt != 0 && now == 0 {
			now = time.Now().UnixMilli()
		}
		if e.expiresAt == 0 || sub.wantsSignal(e, now) {
			batch = append(batch, e)
			bytes += len(e.json)
		}
	}
	sub.cursor = lastID
	return batch
}

// gap returns the event that says that the subscriber may have lost events of a room, or
// nil. Its id is the cursor to go on from, and puts it in its place among the events. If
// several rooms have a gap with the same id, only the last one sent has it, and the others
// the id before: a client that is cut off between them is sent the rest when it returns.
func (sub *subscriber) gap(s *subscription, h *history, lastID int64, others [][]*event) *event {
	floor := min(h.messages.floor, lastID) // what was dropped meanwhile, beyond lastID, is for the next time
	reason := "history"
	switch {
	case sub.lost != "":
		reason = sub.lost
	case floor <= sub.cursor || floor <= s.baseline:
		return nil
	case h.messages.floor == h.erased:
		reason = "erased"
	}
	id := max(floor, sub.relay.epoch)
	if slices.ContainsFunc(others, func(log []*event) bool { return log[0].kind == "gap" && log[0].id == id }) {
		id--
	}
	return notice{Type: "gap", Room: s.room.name, ID: &id, Data: map[string]string{"reason": reason}}.event()
}

// between returns the events of a log with ids above low, up to high.
func between(log []*event, low, high int64) []*event {
	if len(log) == 0 || log[len(log)-1].id <= low {
		return nil
	}
	byID := func(e *event, id int64) int { return cmp.Compare(e.id, id) }
	from, _ := slices.BinarySearchFunc(log, low+1, byID)
	to, _ := slices.BinarySearchFunc(log, high+1, byID)
	return log[from:to]
}

// earliest returns the index of the log whose first event has the smallest id. An
// event comes before a gap with the same id: a client that takes that id for its
// cursor must have the event.
func earliest(logs [][]*event) int {
	first := 0
	for i := range logs {
		a, b := logs[i][0], logs[first][0]
		if a.id < b.id || a.id == b.id && b.kind == "gap" {
			first = i
		}
	}
	return first
}

// A notice is what the relay itself sends to one client.
type notice struct {
	Type string `json:"type"`
	Room string `json:"room,omitempty"`
	Key  string `json:"key,omitempty"`
	ID   *int64 `json:"id,omitempty"`
	Time int64  `json:"time,omitempty"`
	Data any    `json:"data,omitempty"`
}

// event returns the notice as an event that is in no log.
func (n notice) event() *event {
	b, _ := json.Marshal(n) // of strings, numbers and maps of them: it cannot fail
	e := &event{kind: n.Type, json: b}
	if n.ID != nil {
		e.id = *n.ID
	}
	return e
}
