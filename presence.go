// Presence: who is online, typing or away in a room. Each user has a lease with a
// time to live. A stream or long-poll that names a user holds the lease while it is
// open; a poll renews it. Whether a lease is still good is decided by the clock at the
// moment of reading. Timers only announce the end: a platform may stop them (Cloud Run
// does between requests).
//
// A lease is what this relay knows of a user. A layer that shares one log among many
// relays announces what all of them know: see relay.announceState.

package main

import (
	"encoding/json"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"
)

const (
	leaveGrace       = 10 * time.Second // from a closed connection to offline: a reload, or the pause between two long-polls
	typingTTL        = 5 * time.Second  // then typing becomes online again
	announceInterval = time.Second      // at most one event in this time for a user, and one count for a room
	maxRosterUsers   = 100              // above, a room is crowded: only the number of users is announced, since events for each would grow with its square
	presenceEventTTL = time.Minute      // for clients that poll; a stream that missed an event is sent the roster
	rosterCost       = 400              // bytes for each user while a roster is made
	maxClients       = 16               // of a user; above, those without a connection are no longer told apart
)

var (
	presenceStates  = []string{"online", "typing", "away", "offline"}
	errTooManyUsers = limitError(503, "there are too many users; try again when some have left", "users", 60)
)

// A lease is a user's presence in a room. It is guarded by relay.mu.
type lease struct {
	clients     []presenceClient
	state       string    // online or away, while the user is present
	typingUntil time.Time // typing until then

	counted     bool      // in room.online
	announced   string    // the state last announced
	announcedAt time.Time // when that was, unless the user joined: typing may follow at once
	joinedAt    time.Time // when it was last announced that the user joined
	timer       *time.Timer
}

// A presenceClient is one page or program of a user.
type presenceClient struct {
	name         string    // the parameter client; "" stands for all that give none
	connections  int       // streams and long-polls
	goodbyes     int       // how many of them have said offline, and get no grace when they close
	presentUntil time.Time // without a connection
	leftAt       time.Time // when it said offline
}

// A summary is what was announced of a crowded room.
type summary struct {
	announced   int // the number of users; 0 if the room is not crowded
	announcedAt time.Time
	timer       *time.Timer
}

// client returns the lease's client of that name, created if necessary. The pointer
// is good until the next call.
func (l *lease) client(name string) *presenceClient {
	i := slices.IndexFunc(l.clients, func(c presenceClient) bool { return c.name == name })
	if i < 0 {
		i = len(l.clients)
		l.clients = append(l.clients, presenceClient{name: strings.Clone(name)})
	}
	return &l.clients[i]
}

// connections returns how many connections the user has.
func (l *lease) connections() (n int) {
	for _, c := range l.clients {
		n += c.connections
	}
	return n
}

// forever is later than any time on a clock.
var forever = time.Unix(1<<40, 0)

// expiresAt returns until when the user is present: forever, while there is a connection
// that has not said goodbye.
func (l *lease) expiresAt() (end time.Time) {
	for _, c := range l.clients {
		if c.connections > c.goodbyes {
			return forever
		}
		end = later(end, c.presentUntil)
	}
	return end
}

// stateAt returns the user's state at the time t.
func (l *lease) stateAt(t time.Time) string {
	switch {
	case !t.Before(l.expiresAt()):
		return "offline"
	case t.Before(l.typingUntil):
		return "typing"
	}
	return l.state
}

// nextChange returns when the state changes by itself, if it does: a time after t.
func (l *lease) nextChange(t time.Time) time.Time {
	next := l.expiresAt()
	if t.Before(l.typingUntil) && l.typingUntil.Before(next) {
		next = l.typingUntil
	}
	return next
}

// setState sets the state of a user who is present.
func (l *lease) setState(state string, now time.Time) {
	l.state, l.typingUntil = state, time.Time{}
	if state == "typing" {
		l.state, l.typingUntil = "online", now.Add(typingTTL)
	}
}

// justLeft reports whether the client said offline a moment ago. A request that it made
// just before may arrive just after, and gets no grace.
func (c *presenceClient) justLeft(now time.Time) bool {
	return now.Before(c.leftAt.Add(announceInterval))
}

// prune removes the clients that are gone. Above maxClients, those without a
// connection are kept as one without a name.
func (l *lease) prune(now time.Time) {
	tooMany := len(l.clients) > maxClients
	var end time.Time
	l.clients = slices.DeleteFunc(l.clients, func(c presenceClient) bool {
		if c.connections > 0 || !tooMany && (now.Before(c.presentUntil) || c.justLeft(now)) {
			return false
		}
		end = later(end, c.presentUntil)
		return true
	})
	if tooMany {
		c := l.client("")
		c.presentUntil = later(end, c.presentUntil)
	}
}

// later returns the later of two times.
func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// hasLease reports whether the user has a lease in the named room. The caller holds r.mu.
func (r *relay) hasLease(room, user string) bool {
	rm := r.rooms[room]
	return rm != nil && rm.leases[user] != nil
}

// leaseFor returns the user's lease, created if necessary. The caller holds r.mu.
func (r *relay) leaseFor(rm *room, user string) *lease {
	l := rm.leases[user]
	if l == nil {
		if rm.leases == nil {
			rm.leases = map[string]*lease{}
		}
		l = &lease{announced: "offline"}
		rm.leases[strings.Clone(user)] = l
		r.leases++
	}
	return l
}

// acquireLease makes the user present: while the connection is open, or for
// presenceTTL. The caller holds r.mu.
func (r *relay) acquireLease(rm *room, user, client string, longLived bool) {
	now := time.Now()
	l := r.leaseFor(rm, user)
	if l.stateAt(now) == "offline" {
		l.setState("online", now)
		if rm.elsewhere[user] == "away" {
			l.setState("away", now)
		}
	}
	if longLived {
		l.client(client).connections++
	} else {
		l.client(client).presentUntil = now.Add(r.presenceTTL)
	}
	r.announceChange(rm, user, l, now)
}

// releaseLease ends one of the user's connections. The caller holds r.mu.
func (r *relay) releaseLease(rm *room, user, client string) {
	now := time.Now()
	l := rm.leases[user]
	c := l.client(client)
	c.connections--
	if c.goodbyes > 0 {
		c.goodbyes--
	} else if !c.justLeft(now) {
		c.presentUntil = later(c.presentUntil, now.Add(leaveGrace))
	}
	r.announceChange(rm, user, l, now)
}

// setPresence sets the user's state: online, typing, away or offline. Offline is the
// goodbye of one client. It may come before the client's connections close or after.
func (r *relay) setPresence(room, user, client, state string) error {
	r.mu.Lock()
	defer r.unlock()
	if r.isStopping() {
		return errStopping
	}
	if !r.hasLease(room, user) {
		if state == "offline" {
			return nil
		}
		if r.leases >= r.maxUsers {
			return errTooManyUsers
		}
	}
	rm := r.openRoom(room)
	now := time.Now()
	l := r.leaseFor(rm, user)
	if state == "offline" {
		l.goodbye(client, now)
	} else {
		c := l.client(client)
		c.goodbyes = 0
		if end := l.expiresAt(); end != forever {
			ttl := r.presenceTTL
			if rm.elsewhere[user] != "" && end.Before(now.Add(leaveGrace)) {
				ttl = leaveGrace // another relay has the user's connection
			}
			c.presentUntil = now.Add(ttl)
		}
		l.setState(state, now)
	}
	r.announceChange(rm, user, l, now)
	return nil
}

// goodbye ends the presence of one client. A client without a name cannot be told
// from others: its goodbye is for a connection that has just closed; or else for
// one of several; or else for the user.
func (l *lease) goodbye(client string, now time.Time) {
	justClosed := slices.ContainsFunc(l.clients, func(c presenceClient) bool { return now.Before(c.presentUntil) })
	switch {
	case client != "":
		c := l.client(client)
		c.goodbyes, c.presentUntil, c.leftAt = c.connections, now, now
	case justClosed:
		for i := range l.clients {
			l.clients[i].presentUntil = now
		}
	case l.connections() > 1:
		c := l.client("")
		c.goodbyes = min(c.goodbyes+1, c.connections)
	default:
		for i := range l.clients {
			l.clients[i].goodbyes = l.clients[i].connections
		}
	}
}

// announceChange announces what has changed of a lease, sets the timer for the next
// change, and removes a lease that is over. Leaving is announced at once, joining and
// any other change at most once a second. The caller holds r.mu.
func (r *relay) announceChange(rm *room, user string, l *lease, now time.Time) {
	l.prune(now)
	state, next := l.stateAt(now), l.nextChange(now)
	allowedAt := l.announcedAt.Add(announceInterval)
	joins := l.announced == "offline" && !now.Before(l.joinedAt.Add(announceInterval))
	switch {
	case state == l.announced:
	case state == "offline" || joins || !now.Before(allowedAt):
		if l.announced == "offline" {
			l.joinedAt = now
		} else {
			l.announcedAt, allowedAt = now, now.Add(announceInterval)
		}
		l.announced = state
		r.announceState(rm, user, l, state, now)
	case !next.After(now) || allowedAt.Before(next):
		next = allowedAt
	}
	if state == "offline" && l.connections() == 0 {
		if !now.Before(allowedAt) {
			if l.timer != nil {
				l.timer.Stop()
			}
			delete(rm.leases, user)
			r.leases--
			r.closeIfUnused(rm)
			return
		}
		next = allowedAt // if it was removed now, leaving and returning would avoid the limit
	}
	r.setTimer(rm, user, l, now, next)
}

// setTimer has announceChange called again at the time next, unless that is past or never comes.
func (r *relay) setTimer(rm *room, user string, l *lease, now, next time.Time) {
	switch {
	case !next.After(now) || next == forever:
	case l.timer != nil:
		l.timer.Reset(next.Sub(now))
	default:
		user := strings.Clone(user)
		l.timer = time.AfterFunc(next.Sub(now), func() {
			r.onTimer(rm, func(now time.Time) {
				if rm.leases[user] == l {
					r.announceChange(rm, user, l, now)
				}
			})
		})
	}
}

// publishState counts a user who comes or leaves, and publishes the new state. In a crowded
// room, or without a lease, it publishes how many users there are. It is the relay's
// announceState unless a layer replaces that.
func (r *relay) publishState(rm *room, user string, l *lease, state string, now time.Time) {
	if l != nil && l.counted != (state != "offline") {
		if l.counted = !l.counted; l.counted {
			rm.online++
		} else {
			rm.online--
		}
	}
	if l == nil || rm.isCrowded() {
		r.announceCount(rm, now)
	} else {
		r.announce(rm, user, strconv.AppendQuote(nil, state), now)
	}
}

func (rm *room) isCrowded() bool { return rm.summary.announced > 0 || rm.online > maxRosterUsers }

// announceCount publishes how many users a crowded room has, at most once a second.
// When they are few again, it publishes who they are.
func (r *relay) announceCount(rm *room, now time.Time) {
	s := &rm.summary
	if allowedAt := s.announcedAt.Add(announceInterval); now.Before(allowedAt) {
		if s.timer == nil {
			s.timer = time.AfterFunc(allowedAt.Sub(now), func() {
				r.onTimer(rm, func(now time.Time) {
					s.timer = nil
					r.announceState(rm, "", nil, "", now)
				})
			})
		}
		return
	}
	if rm.online == s.announced {
		return
	}
	s.announced, s.announcedAt = rm.online, now
	if rm.online <= maxRosterUsers {
		if s.timer != nil {
			s.timer.Stop()
		}
		*s = summary{}
	}
	data, _ := json.Marshal(r.newRoster(rm, now, true))
	r.announce(rm, "", data, now)
}

// onTimer calls do under r.mu, unless the room was forgotten meanwhile.
func (r *relay) onTimer(rm *room, do func(now time.Time)) {
	r.mu.Lock()
	defer r.unlock()
	if r.rooms[rm.name] == rm {
		do(time.Now())
	}
}

// announce publishes a presence event. While the relay stops, or when there are too many
// rooms, it does not; then only those who ask see who is present.
func (r *relay) announce(rm *room, user string, data []byte, now time.Time) {
	if !r.isStopping() && !r.isFull(rm) {
		r.add(publishRequest{room: rm.name, kind: "presence", from: user, ttl: presenceEventTTL, data: data}, now)
	}
}

// A roster is who is present in a room, and how many. That of a crowded room has no names.
type roster struct {
	Room  string            `json:"room,omitempty"` // only in an answer to a GET
	Count int               `json:"count"`
	Users map[string]string `json:"users,omitzero"`
}

// newRoster returns who is present now; or only those whose joining was announced, for a
// subscriber that will be sent the other announcements. The caller holds r.mu.
func (r *relay) newRoster(rm *room, now time.Time, onlyAnnounced bool) roster {
	if onlyAnnounced && rm.summary.announced > 0 {
		return roster{Count: rm.online}
	}
	users := map[string]string{}
	maps.Copy(users, rm.elsewhere)
	for user, l := range rm.leases {
		state := l.stateAt(now)
		if state != "offline" && (l.counted || !onlyAnnounced) {
			users[user] = state
		}
	}
	return roster{Count: len(users), Users: users}
}

// roster returns everybody who is present in the named room. It does not create the room.
func (r *relay) roster(name string) roster {
	r.mu.Lock()
	defer r.mu.Unlock()
	rm := r.rooms[name]
	if rm == nil {
		rm = &room{}
	}
	return r.newRoster(rm, time.Now(), false)
}

// users returns how many users of the named room this relay has leases of.
func (r *relay) users(name string) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	if rm := r.rooms[name]; rm != nil {
		return len(rm.leases)
	}
	return 0
}

// wantsSignal reports whether a signal is to be delivered: unless it has expired. Presence
// events are for subscribers that asked for them, and if they are not in a roster already.
// When one has expired unread, the roster is due again.
func (sub *subscriber) wantsSignal(e *event, now int64) bool {
	presence := e.kind == "presence"
	if presence && (!sub.seesPresence || e.id <= sub.rosterAsOf) {
		return false
	}
	expired := e.expiresAt <= now
	sub.needsRoster = sub.needsRoster || expired && presence && sub.rosterAsOf != 0
	return !expired
}

// wantRoster makes the roster the end of a stream's first complete batch. Presence events
// before it are skipped, since it has them.
func (sub *subscriber) wantRoster() {
	if sub.seesPresence {
		sub.needsRoster, sub.rosterAsOf = true, math.MaxInt64
	}
}

// appendRosters appends the roster of each room, and lets next skip the presence
// events that are in it. Both are read under r.mu, so none is lost or sent twice.
func (sub *subscriber) appendRosters(batch []*event) []*event {
	r := sub.relay
	r.mu.Lock()
	defer r.mu.Unlock()
	sub.rosterAsOf, sub.needsRoster = r.lastID.Load(), false
	now := time.Now()
	for i := range sub.subscriptions {
		rm := sub.subscriptions[i].room
		batch = append(batch, notice{Type: "presence", Room: rm.name, Data: r.newRoster(rm, now, true)}.event())
	}
	return batch
}
