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
	events    int           // messages a room keeps, and signals
	roomBytes int           // bytes of messages a room keeps, and of signals
	allBytes  int           // bytes all rooms keep together; the room idle longest loses its history first
	rooms     int           // rooms that were published to
	users     int           // leases in all rooms
	roomRate  float64       // publishes a second to a room
	idle      time.Duration // a room without reader and publish for so long is forgotten
	present   time.Duration // who polls is present for so long
}

// eventBytes is what an event costs beside its JSON: the struct, its place in
// the log, an entry in the map of keys.
const eventBytes = 256

// An event is immutable once it is published. Its JSON is encoded once and
// framed many times; json.Marshal escapes <, >, & and U+2028, so the same
// line is safe in SSE, NDJSON, JSONP and a <script>.
type event struct {
	id      int64
	kind    string // its type
	at      int64  // when it was published, Unix milliseconds; 0 for a notice
	expires int64  // Unix milliseconds; 0 is a message, anything else a signal
	key     string
	json    []byte // of a picture, its SVG

	once sync.Once // renders page
	page []byte    // for people, see (*event).html
}

func (e *event) size() int { return eventBytes + len(e.json) + len(e.key) }

// A view is what readers see of a room's log: immutable, swapped in whole.
type view struct {
	floor    int64    // the newest message lost; what is at or below it can't be read any more
	erased   int64    // the floor, when an operator erased the history; lower, if more was lost since
	messages []*event // oldest first
	signals  []*event // oldest first; kept apart, so that they never push a message out
	spilled  int64    // the newest signal dropped before its time, or presence event dropped
}

// A room is one named log.
type room struct {
	name string
	view atomic.Pointer[view]

	// Guarded by relay.mu.
	keys                      map[string]int64 // publish keys within the history, and their ids
	messageBytes, signalBytes int
	place                     *list.Element     // in relay.idlest; nil while nothing was published here
	used                      time.Time         // when it was last published to, or left by a reader
	rate                      bucket            // of publishes
	leases                    map[string]*lease // by user, see presence.go
	here                      int               // users who are not offline
	crowd                     crowd

	// Readers are changed under both relay.mu and mu, so either is enough to look. They are
	// nearly in the order they came: to wake them in the order of memory is faster by a tenth.
	mu      sync.Mutex
	readers []*seat
}

// A relay is all rooms, and the one order of their events.
type relay struct {
	limits
	start    int64         // the process's start in Unix microseconds: ids begin behind it
	mark     atomic.Int64  // readers may read up to here
	stopping chan struct{} // closed by stop, under mu: then nothing is published any more
	gaps     atomic.Int64  // told to readers

	mu        sync.Mutex // guards what follows, and with it the order of ids
	rooms     map[string]*room
	idlest    *list.List      // rooms published to, the one published to last in front
	bytes     int             // of all events kept
	leases    int             // in all rooms
	floors    map[string]lost // of rooms that are forgotten
	forgotten int64           // the floor of rooms whose own was forgotten too
}

var (
	errTooManyRooms = limit(503, "there are too many rooms; publish to one that exists, or try again when one was forgotten", "rooms", 60)
	errStopping     = limit(503, "the relay is stopping; try again", "", 2)
	errRoomTooFast  = limit(429, "this room is published to too fast", "room", 1)
)

// newRelay makes a relay without rooms. Its ids begin at the clock's
// microseconds, so that an id from before a restart is never mistaken for one
// of today's, and still fits a JavaScript integer (2^53, the year 2255).
func newRelay(l limits) *relay {
	r := &relay{
		limits:   l,
		start:    time.Now().UnixMicro(),
		stopping: make(chan struct{}),
		rooms:    map[string]*room{},
		idlest:   list.New(),
		floors:   map[string]lost{},
	}
	r.mark.Store(r.start)
	return r
}

// A post is what somebody asks to publish. All of it was checked where it
// entered: data is one line of JSON as json.Marshal writes it.
type post struct {
	room, kind, from, key string
	ttl                   time.Duration // 0 for a message
	onlyIf                *int64        // publish only if the room's newest message has this id, or is none for 0
	data                  []byte
	picture               []byte // instead of data, see picture.go
	unmetered             bool   // not bound by the room's rate: the relay's own, or of this machine
}

// publish appends p to its room and wakes the room's readers. It returns the
// event's id, and whether it is new: a key that the room's history holds
// already gives the first id, whatever p.onlyIf. A refused post changes nothing.
func (r *relay) publish(p post) (id int64, fresh bool, err error) {
	r.mu.Lock()
	rm, id, err := r.append(p)
	r.mu.Unlock()
	if rm == nil {
		return id, false, err
	}
	rm.wake()
	return id, true, nil
}

// append gives p an id, adds it to its room's log and moves the mark, all
// under r.mu: readers of several rooms must never pass an id that is still to
// come. It returns the room to wake, or nil if there is nothing new in it.
func (r *relay) append(p post) (*room, int64, error) {
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
			f := refuse(412, "another message was published to this room since; its id is the one to go on from")
			f.newest = newest
			return nil, 0, f
		}
	}
	now := time.Now()
	if rm != nil && !p.unmetered && !rm.rate.take(r.roomRate, now) {
		return nil, 0, errRoomTooFast
	}
	if rm == nil || rm.place == nil {
		if r.idlest.Len() >= r.limits.rooms {
			return nil, 0, errTooManyRooms
		}
		if rm == nil {
			rm = r.open(p.room)
			rm.rate.take(r.roomRate, now) // a new room has some
		}
		rm.place = r.idlest.PushFront(rm)
	}

	e := &event{
		id:   r.mark.Load() + 1,
		at:   now.UnixMilli(),
		kind: "message",
		key:  strings.Clone(p.key), // not to keep the request it is part of
		json: p.picture,
	}
	if p.kind != "message" {
		e.kind = strings.Clone(p.kind)
	}
	if p.ttl > 0 {
		e.expires = now.Add(p.ttl).UnixMilli()
	}
	if p.picture == nil {
		e.json = encode(e, rm.name, p.from, p.data)
	}

	rm.used = now
	r.idlest.MoveToFront(rm.place)
	r.keep(rm, e)
	r.mark.Store(e.id)
	return rm, e.id, nil
}

// newest is the id of the room's newest message, or 0 if it keeps none.
func (rm *room) newest() int64 {
	if rm != nil {
		if messages := rm.view.Load().messages; len(messages) > 0 {
			return messages[len(messages)-1].id
		}
	}
	return 0
}

// encode is the event as every transport sends it.
func encode(e *event, room, from string, data []byte) []byte {
	b := make([]byte, 0, 96+len(room)+len(e.kind)+len(from)+len(data))
	b = strconv.AppendInt(append(b, `{"id":`...), e.id, 10)
	b = append(append(b, `,"room":"`...), room...)
	b = append(append(b, `","type":"`...), e.kind...)
	b = append(b, '"')
	if from != "" {
		quoted, _ := json.Marshal(from)
		b = append(append(b, `,"from":`...), quoted...)
	}
	b = strconv.AppendInt(append(b, `,"time":`...), e.at, 10)
	b = append(append(b, `,"data":`...), data...)
	return append(b, '}')
}

// keep adds e to the room's log and drops what is beyond the bounds.
func (r *relay) keep(rm *room, e *event) {
	v := *rm.view.Load()
	most := r.events
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
	if e.expires == 0 {
		v.messages = push(v.messages, e)
		rm.messageBytes += e.size()
		for len(v.messages) > most || rm.messageBytes > r.roomBytes && len(v.messages) > 1 {
			v.floor = v.messages[0].id
			rm.messageBytes -= r.drop(rm, v.messages[0])
			v.messages = v.messages[1:]
		}
	} else {
		v.signals = push(v.signals, e)
		rm.signalBytes += e.size()
		for len(v.signals) > r.events || len(v.signals) > 1 && (rm.signalBytes > r.roomBytes || v.signals[0].expires <= e.at) {
			if old := v.signals[0]; old.expires > e.at || old.kind == "presence" {
				v.spilled = old.id
			}
			rm.signalBytes -= r.drop(rm, v.signals[0])
			v.signals = v.signals[1:]
		}
	}
	rm.view.Store(&v)

	for r.bytes > r.allBytes && r.idlest.Len() > 1 {
		r.forget(r.idlest.Back().Value.(*room))
	}
}

// push appends e to a log. Views share the array beneath, so what one of them
// shows is never overwritten; a full array is left to them, and the log moves
// to one a quarter larger, so that what was dropped is soon let go.
func push(log []*event, e *event) []*event {
	if len(log) == cap(log) {
		log = append(make([]*event, 0, len(log)+len(log)/4+4), log...)
	}
	return append(log, e)
}

// drop takes an event off the books and returns its size.
func (r *relay) drop(rm *room, e *event) int {
	if e.key != "" {
		delete(rm.keys, e.key)
	}
	r.bytes -= e.size()
	return e.size()
}

// open returns the room of that name, made if need be. A room that nobody
// published to lives as long as it has readers, and doesn't count.
func (r *relay) open(name string) *room {
	rm := r.rooms[name]
	if rm == nil {
		rm = &room{name: strings.Clone(name)}
		v := &view{floor: r.forgotten}
		if f, ok := r.floors[name]; ok {
			v.floor, v.erased = f.floor, f.erased
			delete(r.floors, name)
		}
		rm.view.Store(v)
		r.rooms[rm.name] = rm
	}
	return rm
}

// forget drops a room's history, and the room itself when nobody reads it,
// but not its floor.
func (r *relay) forget(rm *room) {
	r.empty(rm, max(rm.view.Load().floor, rm.newest()), false)
	r.close(rm)
}

// empty drops all that a room keeps. What is at or below floor is lost.
func (r *relay) empty(rm *room, floor int64, erased bool) {
	v := rm.view.Load()
	lost := &view{floor: floor, erased: v.erased, spilled: v.spilled}
	if erased {
		lost.erased = floor
	}
	if n := len(v.signals); n > 0 {
		lost.spilled = v.signals[n-1].id
	}
	r.bytes -= rm.messageBytes + rm.signalBytes
	rm.messageBytes, rm.signalBytes, rm.keys = 0, 0, nil
	rm.view.Store(lost)
	if rm.place != nil {
		r.idlest.Remove(rm.place)
		rm.place = nil
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
		id := r.mark.Load() + 1
		r.empty(rm, id, true)
		r.mark.Store(id)
		r.close(rm)
	}
	r.mu.Unlock()
	if rm != nil {
		rm.wake()
	}
	return nil
}

// close removes a room without history, readers and users from the map, and
// remembers its floor. As many floors are remembered as there may be rooms;
// beyond that the newest of them stands for all, which can tell a reader of a
// gap that was none, but never hide one.
func (r *relay) close(rm *room) {
	if len(rm.readers) > 0 || rm.place != nil || len(rm.leases) > 0 {
		return
	}
	delete(r.rooms, rm.name)
	v := rm.view.Load()
	if v.floor <= r.forgotten {
		return
	}
	if len(r.floors) >= r.limits.rooms {
		for _, f := range r.floors {
			r.forgotten = max(r.forgotten, f.floor)
		}
		clear(r.floors)
	}
	r.floors[rm.name] = lost{v.floor, v.erased}
}

// What is remembered of a room that is forgotten; see view.
type lost struct{ floor, erased int64 }

// sweep forgets the rooms that were neither published to nor read for a while.
func (r *relay) sweep(now time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for el := r.idlest.Back(); el != nil; {
		rm := el.Value.(*room)
		el = el.Prev()
		if len(rm.readers) == 0 && now.Sub(rm.used) >= r.idle {
			r.forget(rm)
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
	var h hand
	defer h.empty()
	for _, seat := range rm.readers {
		rd := seat.rd
		if rd.stream != nil {
			rd.stream.wakeBy(&h)
			continue
		}
		select {
		case rd.woken <- struct{}{}:
		default: // it has a token already, and one is enough to read everything
		}
	}
}

// A reader is one client's place in the log.
type reader struct {
	stream     *stream // woken in place of woken, if set
	relay      *relay
	after      int64 // the cursor: the reader has everything up to here
	seats      []seat
	one        [1]seat       // mostly there is one
	foreign    bool          // the cursor given is not of this log; told with a gap by room
	presence   bool          // sees presence events
	rosterDue  bool          // the roster is to be told, at first and when a presence event was missed
	cut        bool          // the last batch was cut short
	batchBytes int           // see want
	rostered   int64         // presence events up to here are in the roster
	woken      chan struct{} // holds one token while there may be something to read
	user       string        // whose leases leave gives up
	client     string        // and of which of their clients
}

// A seat is a reader's place in one room.
type seat struct {
	rd   *reader
	room *room
	at   int // in room.readers

	forgiven int64 // a floor up to here is no loss: the reader gave no cursor
}

// sit adds the seat to its room's.
func (s *seat) sit() {
	s.room.mu.Lock()
	defer s.room.mu.Unlock()
	s.at = len(s.room.readers)
	s.room.readers = append(s.room.readers, s)
}

// rise gives the seat up; the last takes its place.
func (s *seat) rise() {
	s.room.mu.Lock()
	defer s.room.mu.Unlock()
	end := len(s.room.readers) - 1
	last := s.room.readers[end]
	last.at = s.at
	s.room.readers[s.at], s.room.readers[end] = last, nil
	s.room.readers = s.room.readers[:end]
}

// A want is what a reader asks for. All of it was checked where it entered.
type want struct {
	rooms      []string
	after      int64   // the cursor, or -1 for none
	last       int     // without a cursor: begin with the newest so many messages
	user       string  // be seen as this user, unless empty
	client     string  // which of the user's clients this is
	presence   bool    // see presence
	holds      bool    // the connection is held open, so the user is here while it lasts
	batchBytes int     // a batch ends with the event that makes it so long; 1 or more
	stream     *stream // woken when there may be something to read; without it the reader can wait
}

// subscribe makes rd a reader. The caller calls leave when done with it, and does
// not copy it before: its rooms point to its seats.
func (r *relay) subscribe(rd *reader, w want) error {
	*rd = reader{relay: r, presence: w.presence, batchBytes: w.batchBytes, stream: w.stream}
	rd.seats = rd.one[:0]
	if n := len(w.rooms); n > 1 {
		rd.seats = make([]seat, 0, n)
	}
	if w.stream == nil {
		rd.woken = make(chan struct{}, 1)
	}
	r.mu.Lock()
	if err := r.admit(w); err != nil {
		r.mu.Unlock()
		return err
	}
	told := false
	for i, name := range w.rooms {
		rm := r.open(name)
		rd.seats = append(rd.seats, seat{rd: rd, room: rm})
		rd.seats[i].sit()
		if w.user != "" {
			told = r.enter(rm, w.user, w.client, w.holds) || told
		}
	}
	if w.holds {
		rd.user, rd.client = w.user, w.client
	}
	rd.after = w.after
	switch mark := r.mark.Load(); {
	case w.after < 0:
		rd.after = rd.newest(w.last)
		for i := range rd.seats {
			rd.seats[i].forgiven = rd.seats[i].room.view.Load().floor
		}
	case w.after > mark, w.after < r.start:
		rd.foreign = true
	}
	r.mu.Unlock()
	if told {
		rd.wake()
	}
	return nil
}

// onlyRead is how many rooms there may be that are read and were not published to.
const onlyRead = 10_000

// admit says whether there is room for who wants to read.
func (r *relay) admit(w want) error {
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
	case rooms > len(r.rooms) && rooms > r.limits.rooms+onlyRead:
		return errTooManyRooms
	case leases > r.leases && leases > r.limits.users:
		return errTooManyUsers
	}
	return nil
}

// wake wakes the readers of all the reader's rooms.
func (rd *reader) wake() {
	for i := range rd.seats {
		rd.seats[i].room.wake()
	}
}

// newest returns the cursor behind which lie the newest n messages.
func (rd *reader) newest(n int) int64 {
	var ids []int64
	for i := range rd.seats {
		m := rd.seats[i].room.view.Load().messages
		for _, e := range m[max(0, len(m)-n):] {
			ids = append(ids, e.id)
		}
	}
	if n == 0 || len(ids) == 0 {
		return rd.relay.mark.Load()
	}
	slices.Sort(ids)
	return ids[max(0, len(ids)-n)] - 1
}

// leave gives up the reader's place in its rooms.
func (rd *reader) leave() {
	r := rd.relay
	told := false
	r.mu.Lock()
	now := time.Now()
	for i := range rd.seats {
		rm := rd.seats[i].room
		rd.seats[i].rise()
		rm.used = now
		if rd.user != "" {
			told = r.exit(rm, rd.user, rd.client) || told
		}
		r.close(rm)
	}
	r.mu.Unlock()
	if told {
		rd.wake()
	}
}

// batchEvents is how many events are read at once, if they are not too many
// bytes before: those of one write, or one answer.
const batchEvents = 256

// next appends to batch the events behind the cursor, in the order they were
// published, and moves the cursor: behind the last of them if the batch was cut
// short, else to the mark. It takes no lock. The mark is loaded before the
// views, so each view holds all that was published to its room up to the
// mark, and nothing beyond the mark is taken.
func (rd *reader) next(batch []*event) []*event {
	mark := rd.relay.mark.Load()
	rd.cut = false
	if mark == rd.after && !rd.foreign {
		return batch
	}
	after := rd.after
	if rd.foreign {
		after = rd.relay.start
	}
	var few [4][]*event // mostly there is one
	heads := few[:0]
	for i := range rd.seats {
		v := rd.seats[i].room.view.Load()
		if gap := rd.gap(&rd.seats[i], v, mark, heads); gap != nil {
			heads = append(heads, []*event{gap})
		}
		if m := between(v.messages, after, mark); len(m) > 0 {
			heads = append(heads, m)
		}
		if m := between(v.signals, after, mark); len(m) > 0 {
			heads = append(heads, m)
		}
		rd.rosterDue = rd.rosterDue || rd.rostered != 0 && v.spilled > max(after, rd.rostered)
	}
	rd.foreign = false

	now := int64(0) // asked only if there is a signal to judge
	for bytes := 0; len(heads) > 0; {
		if len(batch) == batchEvents || bytes >= rd.batchBytes {
			rd.after, rd.cut = batch[len(batch)-1].id, true
			clear(heads) // not to keep what the log drops
			return batch
		}
		i := oldest(heads)
		e := heads[i][0]
		if heads[i] = heads[i][1:]; len(heads[i]) == 0 {
			heads = slices.Delete(heads, i, i+1)
		}
		if e.expires != 0 {
			if now == 0 {
				now = time.Now().UnixMilli()
			}
			if e.kind == "presence" && (!rd.presence || e.id <= rd.rostered) {
				continue
			}
			if e.expires <= now {
				rd.rosterDue = rd.rosterDue || e.kind == "presence" && rd.rostered != 0
				continue
			}
		}
		batch = append(batch, e)
		bytes += len(e.json)
	}
	rd.after = mark
	return batch
}

// gap returns the event that tells of what the reader may have lost in a
// room, or nil. Its id is the cursor to go on from, so it has its place among
// the events.
//
// Of several with one id the last alone has it: who was cut off before it, and
// comes back with the one before, is told again.
func (rd *reader) gap(s *seat, v *view, mark int64, others [][]*event) *event {
	floor := min(v.floor, mark) // one beyond was raised while we read, and is told when we read on
	reason := "history"
	switch {
	case rd.foreign && rd.after < rd.relay.start:
		reason = "restart"
	case rd.foreign:
		reason = "future"
	case floor <= rd.after || floor <= s.forgiven:
		return nil
	case v.floor == v.erased:
		reason = "erased"
	}
	rd.relay.gaps.Add(1)
	id := max(floor, rd.relay.start)
	if slices.ContainsFunc(others, func(o []*event) bool { return o[0].kind == "gap" && o[0].id == id }) {
		id--
	}
	return notice{Type: "gap", Room: s.room.name, ID: new(id), Data: map[string]string{"reason": reason}}.event()
}

// erases reports whether the event tells that all before it was erased.
func (e *event) erases() bool {
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

// oldest returns which of the logs begins with the smallest id. An event comes
// before a gap of the same id: who takes that for a cursor must have the event.
func oldest(heads [][]*event) int {
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
func (rd *reader) wait(ctx context.Context, clock <-chan time.Time) bool {
	select {
	case <-rd.woken:
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
