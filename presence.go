// Presence. Who is in a room is a set of leases with a time to live. A stream
// or long-poll that names a user holds their lease while it lasts; whoever polls
// renews it each time. What a lease is worth is decided by the clock at the moment of
// reading; timers only announce it, since a platform may stop them (Cloud Run
// does between requests).

package main

import (
	"encoding/json"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"
)

const (
	grace      = 10 * time.Second // from a closed connection to offline: a reload, or the pause between two long-polls
	typingFor  = 5 * time.Second  // then typing falls back to online
	tellEvery  = time.Second      // at most one event in this time by user, and one count by room
	crowdAbove = 100              // users; above, comings and goings would grow with the square, so only counts are told

	// A presence event is kept so long for whoever polls. Readers of streams
	// that missed one are sent the roster.
	presenceFor = time.Minute
)

var errTooManyUsers = limit(503, "there are too many users; try again when some have left", "users", 60)

// A lease is a user's stay in a room. It is guarded by relay.mu.
type lease struct {
	clients []stay
	state   string    // online, away or offline
	typing  time.Time // typing until then

	here   bool      // counted in room.here
	told   string    // what the room was last told
	toldAt time.Time // and when, unless it was that they came
	joined time.Time // when it was last told that they are here
	timer  *time.Timer
}

// A stay is what one client, a page or program of the user, adds to a lease.
type stay struct {
	client  string    // as it calls itself; "" stands for all that do not say
	held    int       // streams and long-polls
	leaving int       // of those, how many have said goodbye: no grace for them
	until   time.Time // without them, here until then
	leftAt  time.Time // when it said goodbye by name
}

// maxClients is how many clients of a user are kept apart when their connections
// are closed. Of more, the one without a name is here for them.
const maxClients = 16

// stay returns the client's stay, made if need be. The pointer is good until the next call.
func (l *lease) stay(client string) *stay {
	i := slices.IndexFunc(l.clients, func(c stay) bool { return c.client == client })
	if i < 0 {
		i = len(l.clients)
		l.clients = append(l.clients, stay{client: strings.Clone(client)}) // not to keep the request it is part of
	}
	return &l.clients[i]
}

// held is how many streams and long-polls name the user, and until when the
// user is here without them.
func (l *lease) held() (held int, until time.Time) {
	for _, c := range l.clients {
		held += c.held
		if until.Before(c.until) {
			until = c.until
		}
	}
	return held, until
}

// justLeft reports whether the client said goodbye a moment ago. A request that it
// made just before may come just after, and gets no grace.
func (c *stay) justLeft(now time.Time) bool { return now.Before(c.leftAt.Add(tellEvery)) }

// drop forgets the clients that are gone.
func (l *lease) drop(now time.Time) {
	many := len(l.clients) > maxClients
	_, until := l.held()
	l.clients = slices.DeleteFunc(l.clients, func(c stay) bool {
		return c.held == 0 && (many || !now.Before(c.until) && !c.justLeft(now))
	})
	if many {
		l.stay("").until = until
	}
}

// A crowd is a room's state above crowdAbove users.
type crowd struct {
	counted bool // only counts are told
	told    int  // the count last told
	toldAt  time.Time
	timer   *time.Timer
}

// now is the user's state at the time t.
func (l *lease) now(t time.Time) string {
	switch held, until := l.held(); {
	case held == 0 && !t.Before(until), l.state == "offline":
		return "offline"
	case t.Before(l.typing):
		return "typing"
	}
	return l.state
}

// due is when the state next changes by itself, or the zero time.
func (l *lease) due(t time.Time) time.Time {
	held, due := l.held()
	if held > 0 {
		due = time.Time{}
	}
	if t.Before(l.typing) && (due.IsZero() || l.typing.Before(due)) {
		due = l.typing
	}
	return due
}

// enter takes a lease for the user: for as long as the connection is held, or until
// they should have asked again. It reports whether the room was told of it.
// The caller holds r.mu.
func (r *relay) enter(rm *room, user, client string, holds bool) bool {
	now := time.Now()
	l := r.lease(rm, user)
	if l.now(now) == "offline" {
		l.state = "online"
	}
	if holds {
		l.stay(client).held++
	} else {
		l.stay(client).until = now.Add(r.present)
	}
	return r.settle(rm, user, l, now)
}

// exit ends one of the user's streams or long-polls. The caller holds r.mu.
func (r *relay) exit(rm *room, user, client string) bool {
	now := time.Now()
	l := rm.leases[user]
	c := l.stay(client)
	c.held--
	if c.leaving > 0 {
		c.leaving--
	} else if end := now.Add(grace); c.until.Before(end) && !c.justLeft(now) {
		c.until = end
	}
	return r.settle(rm, user, l, now)
}

// declare sets the user's state: online, typing, away or offline. Offline is the
// goodbye of one client, which may come before its streams have ended or after.
// If it does not say which, it is that of a stream that has just ended, or else of one
// of several, or the user's.
func (r *relay) declare(name, user, client, state string) error {
	r.mu.Lock()
	rm, err := r.setState(name, user, client, state)
	r.mu.Unlock()
	if rm != nil {
		rm.wake()
	}
	return err
}

// setState is declare under r.mu. It returns the room to wake, or nil if it was
// told nothing.
func (r *relay) setState(name, user, client, state string) (*room, error) {
	if r.isStopping() {
		return nil, errStopping
	}
	rm := r.rooms[name]
	known := rm != nil && rm.leases[user] != nil
	if state == "offline" && !known {
		return nil, nil
	}
	if !known && r.leases >= r.limits.users {
		return nil, errTooManyUsers
	}
	rm = r.open(name)
	now := time.Now()
	l := r.lease(rm, user)
	held, until := l.held()
	switch {
	case state != "offline":
		c := l.stay(client)
		c.leaving = 0
		if held == 0 {
			c.until = now.Add(r.present)
		}
		l.typing = time.Time{}
		if l.state = state; state == "typing" {
			l.state, l.typing = "online", now.Add(typingFor)
		}
	case client != "":
		c := l.stay(client)
		c.leaving, c.until, c.leftAt = c.held, now, now
		others := slices.ContainsFunc(l.clients, func(c stay) bool { return c.held > c.leaving || now.Before(c.until) })
		if !others {
			l.state, l.typing = state, time.Time{}
		}
	case held > 0 && now.Before(until): // of one that has just gone: no grace for it
		for i := range l.clients {
			l.clients[i].until = now
		}
	case held > 1:
		c := l.stay("")
		c.leaving = min(c.leaving+1, c.held)
	default:
		for i := range l.clients {
			l.clients[i].leaving, l.clients[i].until = l.clients[i].held, now
		}
		l.state, l.typing = state, time.Time{}
	}
	if !r.settle(rm, user, l, now) {
		return nil, nil
	}
	return rm, nil
}

// lease returns the user's lease, made if need be.
func (r *relay) lease(rm *room, user string) *lease {
	l := rm.leases[user]
	if l == nil {
		if rm.leases == nil {
			rm.leases = map[string]*lease{}
		}
		l = &lease{state: "offline", told: "offline"}
		rm.leases[strings.Clone(user)] = l
		r.leases++
	}
	return l
}

// settle tells the room what has changed of a lease, sees to it that what will
// change is told in time, and drops a lease that is over. Leaving is told at once,
// coming and any other change at most once a second. It reports whether anything
// was told.
func (r *relay) settle(rm *room, user string, l *lease, now time.Time) (told bool) {
	l.drop(now)
	state, next := l.now(now), l.due(now)
	if here := state != "offline"; here != l.here {
		l.here = here
		if here {
			rm.here++
		} else {
			rm.here--
		}
	}
	rest := l.toldAt.Add(tellEvery)
	switch {
	case state == l.told:
	case rm.crowd.counted || rm.here > crowdAbove:
		l.told = state
		told = r.tellCount(rm, now)
	case state == "offline" || !now.Before(rest) || l.told == "offline" && !now.Before(l.joined.Add(tellEvery)):
		if l.told == "offline" {
			l.joined = now
		}
		if l.told != "offline" || state == "offline" { // typing may follow on coming online at once
			l.toldAt = now
			rest = now.Add(tellEvery)
		}
		l.told = state
		told = r.tell(rm, user, strconv.AppendQuote(nil, state))
	default:
		if next.IsZero() || rest.Before(next) {
			next = rest
		}
	}
	if held, _ := l.held(); state == "offline" && held == 0 {
		if !now.Before(rest) {
			if l.timer != nil {
				l.timer.Stop()
			}
			delete(rm.leases, user)
			r.leases--
			r.close(rm)
			return told
		}
		next = rest // remembered so long, or leaving and returning would go round the limit
	}
	if !next.IsZero() {
		if l.timer == nil {
			user := strings.Clone(user) // not to keep the request it is part of
			l.timer = time.AfterFunc(next.Sub(now), func() {
				r.later(rm, func(now time.Time) bool { return rm.leases[user] == l && r.settle(rm, user, l, now) })
			})
		} else {
			l.timer.Reset(next.Sub(now))
		}
	}
	return told
}

// tellCount tells a crowded room how many are here, at most once a second;
// and when they are few again, who.
func (r *relay) tellCount(rm *room, now time.Time) bool {
	c := &rm.crowd
	c.counted = true
	if rest := c.toldAt.Add(tellEvery); now.Before(rest) {
		if c.timer == nil {
			c.timer = time.AfterFunc(rest.Sub(now), func() {
				r.later(rm, func(now time.Time) bool { c.timer = nil; return r.tellCount(rm, now) })
			})
		}
		return false
	}
	if rm.here == c.told {
		return false
	}
	c.told, c.toldAt = rm.here, now
	if rm.here <= crowdAbove {
		if c.timer != nil {
			c.timer.Stop()
		}
		*c = crowd{}
		for _, l := range rm.leases {
			l.told = l.now(now)
		}
	}
	data, _ := json.Marshal(rm.roster(now))
	return r.tell(rm, "", data)
}

// later is what a timer calls: do, under r.mu, and wake the room if it told anything.
func (r *relay) later(rm *room, do func(now time.Time) bool) {
	r.mu.Lock()
	told := r.rooms[rm.name] == rm && do(time.Now()) // it may be forgotten
	r.mu.Unlock()
	if told {
		rm.wake()
	}
}

// tell appends a presence event to the room. It can fail, when the relay stops
// or has no place for another room; presence is then only told to who asks.
func (r *relay) tell(rm *room, user string, data []byte) bool {
	_, _, err := r.append(post{room: rm.name, kind: "presence", from: user, ttl: presenceFor, data: data, unmetered: true})
	return err == nil
}

// A roster is who is in a room, and how many. In a crowd it has no names.
type roster struct {
	Count int               `json:"count"`
	Users map[string]string `json:"users,omitzero"`
}

// roster is what a room is told of who is in it at the time now. A join that is
// held back for its rate is left out: it will be told, and not twice. The caller
// holds relay.mu.
func (rm *room) roster(now time.Time) roster {
	if rm.crowd.counted {
		return roster{Count: rm.here}
	}
	return rosterOf(rm.leases, now, true)
}

// rosterOf is who is here by the clock; of them those the room was told of, or all.
func rosterOf(leases map[string]*lease, now time.Time, told bool) roster {
	ros := roster{Users: map[string]string{}}
	for user, l := range leases {
		if state := l.now(now); state != "offline" && !(told && l.told == "offline") {
			ros.Users[user] = state
		}
	}
	ros.Count = len(ros.Users)
	return ros
}

// whoIsIn returns who is in the named room now, crowd or not. Asking doesn't create it.
func (r *relay) whoIsIn(name string) roster {
	r.mu.Lock()
	defer r.mu.Unlock()
	var leases map[string]*lease
	if rm := r.rooms[name]; rm != nil {
		leases = rm.leases
	}
	return rosterOf(leases, time.Now(), false)
}

// expectRoster has a stream's next full batch end with the roster; presence
// events before it would only repeat it.
func (rd *reader) expectRoster() {
	if rd.presence {
		rd.rosterDue, rd.rostered = true, math.MaxInt64
	}
}

// rosters returns the roster of each of the reader's rooms, and lets next pass
// over the presence events that are in it: none is lost or told twice between
// the roster and what follows, for both are of one moment under r.mu.
func (rd *reader) rosters(batch []*event) []*event {
	r := rd.relay
	r.mu.Lock()
	defer r.mu.Unlock()
	rd.rostered, rd.rosterDue = r.mark.Load(), false
	now := time.Now()
	for i := range rd.seats {
		batch = append(batch, notice{Type: "presence", Room: rd.seats[i].room.name, Data: rd.seats[i].room.roster(now)}.event())
	}
	return batch
}
