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
	leaveGrace       = 10 * time.Second // from a closed connection to offline: a reload, or the pause between two long-polls
	typingTTL        = 5 * time.Second  // then typing falls back to online
	announceInterval = time.Second      // at most one event in this time by user, and one count by room
	maxRosterUsers   = 100              // users; above, comings and goings would grow with the square, so only counts are told

	// A presence event is kept so long for whoever polls. Readers of streams
	// that missed one are sent the roster.
	presenceEventTTL = time.Minute
)

var errTooManyUsers = limitError(503, "there are too many users; try again when some have left", "users", 60)

// A lease is a user's stay in a room. It is guarded by relay.mu.
type lease struct {
	clients     []presenceClient
	state       string    // online, away or offline
	typingUntil time.Time // typing until then

	counted     bool      // counted in room.here
	announced   string    // what the room was last told
	announcedAt time.Time // and when, unless it was that they came
	joinedAt    time.Time // when it was last told that they are here
	timer       *time.Timer
}

// A stay is what one client, a page or program of the user, adds to a lease.
type presenceClient struct {
	client      string    // as it calls itself; "" stands for all that do not say
	connections int       // streams and long-polls
	goodbyes    int       // of those, how many have said goodbye: no grace for them
	expiresAt   time.Time // without them, here until then
}

// maxClients is how many clients of a user are kept apart when their connections
// are closed. Of more, the one without a name is here for them.
const maxClients = 16

// client returns the client's stay, made if need be. The pointer is good until the next call.
func (l *lease) client(client string) *presenceClient {
	i := slices.IndexFunc(l.clients, func(c presenceClient) bool { return c.client == client })
	if i < 0 {
		i = len(l.clients)
		l.clients = append(l.clients, presenceClient{client: strings.Clone(client)}) // not to keep the request it is part of
	}
	return &l.clients[i]
}

// connections is how many streams and long-polls name the user, and until when the
// user is here without them.
func (l *lease) connections() (held int, until time.Time) {
	for _, c := range l.clients {
		held += c.connections
		if until.Before(c.expiresAt) {
			until = c.expiresAt
		}
	}
	return held, until
}

// prune forgets the clients that are gone.
func (l *lease) prune(now time.Time) {
	many := len(l.clients) > maxClients
	_, until := l.connections()
	l.clients = slices.DeleteFunc(l.clients, func(c presenceClient) bool {
		return c.connections == 0 && (many || !now.Before(c.expiresAt))
	})
	if many {
		l.client("").expiresAt = until
	}
}

// A crowd is a room's state above crowdAbove users.
type summary struct {
	active      bool // only counts are told
	announced   int  // the count last told
	announcedAt time.Time
	timer       *time.Timer
}

// stateAt is the user's state at the time t.
func (l *lease) stateAt(t time.Time) string {
	switch held, until := l.connections(); {
	case held == 0 && !t.Before(until), l.state == "offline":
		return "offline"
	case t.Before(l.typingUntil):
		return "typing"
	}
	return l.state
}

// nextChange is when the state next changes by itself, or the zero time.
func (l *lease) nextChange(t time.Time) time.Time {
	held, due := l.connections()
	if held > 0 {
		due = time.Time{}
	}
	if t.Before(l.typingUntil) && (due.IsZero() || l.typingUntil.Before(due)) {
		due = l.typingUntil
	}
	return due
}

// acquireLease takes a lease for the user: for as long as the connection is held, or until
// they should have asked again. It reports whether the room was told of it.
// The caller holds r.mu.
func (r *relay) acquireLease(rm *room, user, client string, holds bool) bool {
	now := time.Now()
	l := r.leaseFor(rm, user)
	if l.stateAt(now) == "offline" {
		l.state = "online"
	}
	if holds {
		l.client(client).connections++
	} else {
		l.client(client).expiresAt = now.Add(r.presenceTTL)
	}
	return r.announceChange(rm, user, l, now)
}

// releaseLease ends one of the user's streams or long-polls. The caller holds r.mu.
func (r *relay) releaseLease(rm *room, user, client string) bool {
	now := time.Now()
	l := rm.leases[user]
	c := l.client(client)
	c.connections--
	if c.goodbyes > 0 {
		c.goodbyes--
	} else if end := now.Add(leaveGrace); c.expiresAt.Before(end) {
		c.expiresAt = end
	}
	return r.announceChange(rm, user, l, now)
}

// setPresence sets the user's state: online, typing, away or offline. Offline is the
// goodbye of one client, which may come before its streams have ended or after.
// If it does not say which, it is that of a stream that has just ended, or else of one
// of several, or the user's.
func (r *relay) setPresence(name, user, client, state string) error {
	r.mu.Lock()
	rm, err := r.setPresenceLocked(name, user, client, state)
	r.mu.Unlock()
	if rm != nil {
		rm.wake()
	}
	return err
}

// setPresenceLocked is declare under r.mu. It returns the room to wake, or nil if it was
// told nothing.
func (r *relay) setPresenceLocked(name, user, client, state string) (*room, error) {
	if r.isStopping() {
		return nil, errStopping
	}
	rm := r.rooms[name]
	known := rm != nil && rm.leases[user] != nil
	if state == "offline" && !known {
		return nil, nil
	}
	if !known && r.leases >= r.limits.maxUsers {
		return nil, errTooManyUsers
	}
	rm = r.openRoom(name)
	now := time.Now()
	l := r.leaseFor(rm, user)
	held, until := l.connections()
	switch {
	case state != "offline":
		c := l.client(client)
		c.goodbyes = 0
		if held == 0 {
			c.expiresAt = now.Add(r.presenceTTL)
		}
		l.typingUntil = time.Time{}
		if l.state = state; state == "typing" {
			l.state, l.typingUntil = "online", now.Add(typingTTL)
		}
	case client != "":
		c := l.client(client)
		c.goodbyes, c.expiresAt = c.connections, now
		others := slices.ContainsFunc(l.clients, func(c presenceClient) bool { return c.connections > c.goodbyes || now.Before(c.expiresAt) })
		if !others {
			l.state, l.typingUntil = state, time.Time{}
		}
	case held > 0 && now.Before(until): // of one that has just gone: no grace for it
		for i := range l.clients {
			l.clients[i].expiresAt = now
		}
	case held > 1:
		c := l.client("")
		c.goodbyes = min(c.goodbyes+1, c.connections)
	default:
		for i := range l.clients {
			l.clients[i].goodbyes, l.clients[i].expiresAt = l.clients[i].connections, now
		}
		l.state, l.typingUntil = state, time.Time{}
	}
	if !r.announceChange(rm, user, l, now) {
		return nil, nil
	}
	return rm, nil
}

// leaseFor returns the user's lease, made if need be.
func (r *relay) leaseFor(rm *room, user string) *lease {
	l := rm.leases[user]
	if l == nil {
		if rm.leases == nil {
			rm.leases = map[string]*lease{}
		}
		l = &lease{state: "offline", announced: "offline"}
		rm.leases[strings.Clone(user)] = l
		r.leases++
	}
	return l
}

// announceChange tells the room what has changed of a lease, sees to it that what will
// change is told in time, and drops a lease that is over. Leaving is told at once,
// coming and any other change at most once a second. It reports whether anything
// was told.
func (r *relay) announceChange(rm *room, user string, l *lease, now time.Time) (told bool) {
	l.prune(now)
	state, next := l.stateAt(now), l.nextChange(now)
	if here := state != "offline"; here != l.counted {
		l.counted = here
		if here {
			rm.online++
		} else {
			rm.online--
		}
	}
	rest := l.announcedAt.Add(announceInterval)
	switch {
	case state == l.announced:
	case rm.summary.active || rm.online > maxRosterUsers:
		l.announced = state
		told = r.announceCount(rm, now)
	case state == "offline" || !now.Before(rest) || l.announced == "offline" && !now.Before(l.joinedAt.Add(announceInterval)):
		if l.announced == "offline" {
			l.joinedAt = now
		}
		if l.announced != "offline" || state == "offline" { // typing may follow on coming online at once
			l.announcedAt = now
			rest = now.Add(announceInterval)
		}
		l.announced = state
		told = r.announce(rm, user, strconv.AppendQuote(nil, state))
	default:
		if next.IsZero() || rest.Before(next) {
			next = rest
		}
	}
	if held, _ := l.connections(); state == "offline" && held == 0 {
		if !now.Before(rest) {
			if l.timer != nil {
				l.timer.Stop()
			}
			delete(rm.leases, user)
			r.leases--
			r.closeIfUnused(rm)
			return told
		}
		next = rest // remembered so long, or leaving and returning would go round the limit
	}
	if !next.IsZero() {
		if l.timer == nil {
			user := strings.Clone(user) // not to keep the request it is part of
			l.timer = time.AfterFunc(next.Sub(now), func() {
				r.onTimer(rm, func(now time.Time) bool { return rm.leases[user] == l && r.announceChange(rm, user, l, now) })
			})
		} else {
			l.timer.Reset(next.Sub(now))
		}
	}
	return told
}

// announceCount tells a crowded room how many are here, at most once a second;
// and when they are few again, who.
func (r *relay) announceCount(rm *room, now time.Time) bool {
	c := &rm.summary
	c.active = true
	if rest := c.announcedAt.Add(announceInterval); now.Before(rest) {
		if c.timer == nil {
			c.timer = time.AfterFunc(rest.Sub(now), func() {
				r.onTimer(rm, func(now time.Time) bool { c.timer = nil; return r.announceCount(rm, now) })
			})
		}
		return false
	}
	if rm.online == c.announced {
		return false
	}
	c.announced, c.announcedAt = rm.online, now
	if rm.online <= maxRosterUsers {
		if c.timer != nil {
			c.timer.Stop()
		}
		*c = summary{}
		for _, l := range rm.leases {
			l.announced = l.stateAt(now)
		}
	}
	data, _ := json.Marshal(rm.roster(now))
	return r.announce(rm, "", data)
}

// onTimer is what a timer calls: do, under r.mu, and wake the room if it told anything.
func (r *relay) onTimer(rm *room, do func(now time.Time) bool) {
	r.mu.Lock()
	told := r.rooms[rm.name] == rm && do(time.Now()) // it may be forgotten
	r.mu.Unlock()
	if told {
		rm.wake()
	}
}

// announce appends a presence event to the room. It can fail, when the relay stops
// or has no place for another room; presence is then only told to who asks.
func (r *relay) announce(rm *room, user string, data []byte) bool {
	_, _, err := r.appendLocked(publishRequest{room: rm.name, kind: "presence", from: user, ttl: presenceEventTTL, data: data, unlimited: true})
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
	if rm.summary.active {
		return roster{Count: rm.online}
	}
	return newRoster(rm.leases, now, true)
}

// newRoster is who is here by the clock; of them those the room was told of, or all.
func newRoster(leases map[string]*lease, now time.Time, told bool) roster {
	ros := roster{Users: map[string]string{}}
	for user, l := range leases {
		if state := l.stateAt(now); state != "offline" && !(told && l.announced == "offline") {
			ros.Users[user] = state
		}
	}
	ros.Count = len(ros.Users)
	return ros
}

// roster returns who is in the named room now, crowd or not. Asking doesn't create it.
func (r *relay) roster(name string) roster {
	r.mu.Lock()
	defer r.mu.Unlock()
	var leases map[string]*lease
	if rm := r.rooms[name]; rm != nil {
		leases = rm.leases
	}
	return newRoster(leases, time.Now(), false)
}

// wantRoster has a stream's next full batch end with the roster; presence
// events before it would only repeat it.
func (rd *subscriber) wantRoster() {
	if rd.presence {
		rd.needsRoster, rd.rosterAsOf = true, math.MaxInt64
	}
}

// appendRosters returns the roster of each of the reader's rooms, and lets next pass
// over the presence events that are in it: none is lost or told twice between
// the roster and what follows, for both are of one moment under r.mu.
func (rd *subscriber) appendRosters(batch []*event) []*event {
	r := rd.relay
	r.mu.Lock()
	defer r.mu.Unlock()
	rd.rosterAsOf, rd.needsRoster = r.lastID.Load(), false
	now := time.Now()
	for i := range rd.subscriptions {
		batch = append(batch, notice{Type: "presence", Room: rd.subscriptions[i].room.name, Data: rd.subscriptions[i].room.roster(now)}.event())
	}
	return batch
}
