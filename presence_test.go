// Tests of presence: who does what at which time, and which events the room gets when.
// The clock is virtual, so all times are exact.

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
	"unicode"
	"unicode/utf8"
)

// A presenceTest is a relay whose room a is watched.
type presenceTest struct {
	*testing.T
	*relay
	start time.Time
	stop  func()

	mu     sync.Mutex
	events []string // the events of the room, each with its time
}

// newPresenceTest subscribes a watcher that sees presence and is not present itself.
func newPresenceTest(t *testing.T, l limits) *presenceTest {
	p := &presenceTest{T: t, relay: newTestRelay(l), start: time.Now()}
	sub := openSubscriber(t, p.relay, "a", -1, subscribeRequest{seesPresence: true, longLived: true})
	sub.wantRoster()
	ctx, cancel := context.WithCancel(context.Background())
	watching := make(chan struct{})
	go func() {
		defer close(watching)
		defer sub.unsubscribe()
		for {
			for _, e := range readAll(sub) {
				p.mu.Lock()
				p.events = append(p.events, fmt.Sprint(time.Since(p.start), " ", summarize(p.relay, []*event{e})))
				p.mu.Unlock()
			}
			if !sub.wait(ctx, nil) {
				return
			}
		}
	}()
	p.stop = sync.OnceFunc(func() { cancel(); <-watching })
	t.Cleanup(p.stop)
	synctest.Wait()
	return p
}

// stream opens a stream that names the user; unsubscribe closes it.
func (p *presenceTest) stream(user string) *subscriber {
	p.Helper()
	return openSubscriber(p.T, p.relay, "a", -1, subscribeRequest{user: user, seesPresence: true, longLived: true})
}

func (p *presenceTest) poll(user string) {
	p.Helper()
	openSubscriber(p.T, p.relay, "a", -1, subscribeRequest{user: user, seesPresence: true}).unsubscribe()
}

// client opens a stream of one of the user's clients.
func (p *presenceTest) client(user, client string) *subscriber {
	p.Helper()
	return openSubscriber(p.T, p.relay, "a", -1, subscribeRequest{user: user, client: client, seesPresence: true, longLived: true})
}

// goodbye sets one of the user's clients offline.
func (p *presenceTest) goodbye(user, client string) {
	p.Helper()
	if err := p.setPresence("a", user, client, "offline"); err != nil {
		p.Error(err)
	}
}

// setState sets a state, as POST does.
func (p *presenceTest) setState(user, state string) {
	p.Helper()
	if err := p.setPresence("a", user, "", state); err != nil {
		p.Error(err)
	}
}

// at sleeps until a time after the start.
func (p *presenceTest) at(s string) {
	d, err := time.ParseDuration(s)
	if err != nil {
		p.Fatal(err)
	}
	time.Sleep(d - time.Since(p.start))
	synctest.Wait()
}

// wantEvents checks all events so far.
func (p *presenceTest) wantEvents(want ...string) {
	p.Helper()
	synctest.Wait()
	p.mu.Lock()
	defer p.mu.Unlock()
	if !slices.Equal(p.events, want) {
		p.Errorf("the events are\n\t%s\nwant\n\t%s", strings.Join(p.events, "\n\t"), strings.Join(want, "\n\t"))
	}
}

// wantRoster checks the roster that a request returns.
func (p *presenceTest) wantRoster(want string) {
	p.Helper()
	ros := p.roster("a")
	if got := summarizeUsers(ros.Users); got != want || ros.Count != len(ros.Users) {
		p.Errorf("after %v %d are present: %s; want %s", time.Since(p.start), ros.Count, got, want)
	}
}

// wantNothingLeft checks that presence leaves nothing behind.
func (p *presenceTest) wantNothingLeft() {
	p.Helper()
	p.stop()
	for range 2 {
		time.Sleep(time.Hour)
		synctest.Wait()
		p.sweep(time.Now())
	}
	checkAccounting(p.T, p.relay)
	if p.leases != 0 || len(p.rooms) != 0 {
		p.Errorf("%d leases and %d rooms are left, want none", p.leases, len(p.rooms))
	}
	head := p.lastID.Load()
	time.Sleep(time.Hour)
	synctest.Wait()
	if p.lastID.Load() != head {
		p.Error("a timer is left, and published something")
	}
}

func TestPresence(t *testing.T) {
	for _, tc := range []struct {
		what string
		do   func(p *presenceTest)
		want []string
	}{
		{"a stream holds its user while it lasts, and 10 s more", func(p *presenceTest) {
			ada := p.stream("ada")
			p.at("5m")
			ada.unsubscribe()
			p.at("5m9.999999999s")
			p.wantRoster("ada:online")
			p.at("5m10s")
			p.wantRoster("")
		}, []string{"0s ada:online", "5m10s ada:offline"}},
		{"a reload is not announced", func(p *presenceTest) {
			ada := p.stream("ada")
			p.at("1m")
			ada.unsubscribe()
			p.at("1m9.999s")
			ada = p.stream("ada")
			p.at("2m")
			ada.unsubscribe()
		}, []string{"0s ada:online", "2m10s ada:offline"}},
		{"nor is one whose new stream opens before the old one closes", func(p *presenceTest) {
			old := p.stream("ada")
			p.at("1m")
			ada := p.stream("ada")
			p.at("1m5s")
			old.unsubscribe()
			p.at("2m")
			ada.unsubscribe()
		}, []string{"0s ada:online", "2m10s ada:offline"}},
		{"a client's goodbye is for the stream it has, though another of it was just replaced", func(p *presenceTest) {
			old := p.client("ada", "tab1")
			p.at("1m")
			ada := p.client("ada", "tab1")
			old.unsubscribe()
			p.at("1m1s")
			p.goodbye("ada", "tab1")
			p.wantRoster("")
			p.at("1m2s")
			ada.unsubscribe()
		}, []string{"0s ada:online", "1m1s ada:offline"}},
		{"the same when the stream closes before the goodbye comes", func(p *presenceTest) {
			old := p.client("ada", "tab1")
			p.at("1m")
			ada := p.client("ada", "tab1")
			old.unsubscribe()
			ada.unsubscribe()
			p.at("1m1s")
			p.goodbye("ada", "tab1")
		}, []string{"0s ada:online", "1m1s ada:offline"}},
		{"the same when the client long-polls", func(p *presenceTest) {
			for range 3 {
				ada := p.client("ada", "tab1")
				time.Sleep(time.Second)
				ada.unsubscribe()
			}
			ada := p.client("ada", "tab1")
			p.goodbye("ada", "tab1")
			ada.unsubscribe()
		}, []string{"0s ada:online", "3s ada:offline"}},
		{"the same when the client polls", func(p *presenceTest) {
			openSubscriber(p.T, p.relay, "a", -1, subscribeRequest{user: "ada", client: "tab1", seesPresence: true}).unsubscribe()
			p.at("2s")
			p.goodbye("ada", "tab1")
		}, []string{"0s ada:online", "2s ada:offline"}},
		{"a client's goodbye does not concern the user's other clients", func(p *presenceTest) {
			one, two := p.client("ada", "tab1"), p.client("ada", "tab2")
			nameless := p.stream("ada")
			p.at("1m")
			p.goodbye("ada", "tab1")
			p.goodbye("ada", "tab1")
			one.unsubscribe()
			p.goodbye("ada", "tab1")
			p.goodbye("ada", "tab3")
			p.at("2m")
			two.unsubscribe()
			p.goodbye("ada", "tab2")
			p.at("3m")
			nameless.unsubscribe()
		}, []string{"0s ada:online", "3m10s ada:offline"}},
		{"a request that a client made just before its goodbye, and that comes just after, gets no grace", func(p *presenceTest) {
			ada := p.client("ada", "tab1")
			p.at("1m")
			p.goodbye("ada", "tab1")
			ada.unsubscribe()
			p.at("1m0.1s")
			p.client("ada", "tab1").unsubscribe()
			p.wantRoster("")
		}, []string{"0s ada:online", "1m0s ada:offline", "1m0.1s ada:online", "1m0.1s ada:offline"}},
		{"a client that says goodbye and comes back is present", func(p *presenceTest) {
			p.client("ada", "tab1").unsubscribe()
			p.goodbye("ada", "tab1")
			p.at("2s")
			ada := p.client("ada", "tab1")
			p.at("1m")
			ada.unsubscribe()
		}, []string{"0s ada:online", "0s ada:offline", "2s ada:online", "1m10s ada:offline"}},
		{"a client that says goodbye and then sets a state is present while it is connected", func(p *presenceTest) {
			ada := p.client("ada", "tab1")
			p.at("1m")
			p.goodbye("ada", "tab1")
			p.at("1m2s")
			if err := p.setPresence("a", "ada", "tab1", "away"); err != nil {
				p.Error(err)
			}
			p.at("1h")
			p.wantRoster("ada:away")
			ada.unsubscribe()
		}, []string{"0s ada:online", "1m0s ada:offline", "1m2s ada:away", "1h0m10s ada:offline"}},
		{"a goodbye without a client is for the whole user", func(p *presenceTest) {
			ada := p.client("ada", "tab1")
			p.at("1m")
			p.setState("ada", "offline")
			ada.unsubscribe()
		}, []string{"0s ada:online", "1m0s ada:offline"}},
		{"above the bound of clients, those without a connection are kept as one", func(p *presenceTest) {
			for i := range 3 * maxClients {
				p.client("ada", fmt.Sprint("tab", i)).unsubscribe()
			}
			if n := len(p.rooms["a"].leases["ada"].clients); n > maxClients+1 {
				p.Errorf("%d clients are kept", n)
			}
			p.goodbye("ada", "tab1")
		}, []string{"0s ada:online", "10s ada:offline"}},
		{"a user who returns too late was offline", func(p *presenceTest) {
			p.stream("ada").unsubscribe()
			p.at("12s")
			p.stream("ada").unsubscribe()
		}, []string{"0s ada:online", "10s ada:offline", "12s ada:online", "22s ada:offline"}},
		{"a user who returns just too late is announced at once", func(p *presenceTest) {
			p.stream("ada").unsubscribe()
			p.at("10.5s")
			ada := p.stream("ada")
			p.wantRoster("ada:online")
			p.at("20s")
			ada.unsubscribe()
		}, []string{"0s ada:online", "10s ada:offline", "10.5s ada:online", "30s ada:offline"}},
		{"several streams are one user", func(p *presenceTest) {
			one, two := p.stream("ada"), p.stream("ada")
			p.at("1m")
			one.unsubscribe()
			p.at("2m")
			three := p.stream("ada")
			two.unsubscribe()
			p.at("3m")
			three.unsubscribe()
		}, []string{"0s ada:online", "3m10s ada:offline"}},
		{"a user who polls is present for a minute after", func(p *presenceTest) {
			p.poll("ada")
			p.at("59s")
			p.poll("ada")
			p.at("1m58.999s")
			p.wantRoster("ada:online")
		}, []string{"0s ada:online", "1m59s ada:offline"}},
		{"the longer of poll and grace counts", func(p *presenceTest) {
			p.poll("ada")
			p.at("1s")
			p.stream("ada").unsubscribe()
			p.poll("bob")
			p.at("55s")
			p.stream("bob").unsubscribe()
		}, []string{"0s ada:online", "1s bob:online", "1m0s ada:offline", "1m5s bob:offline"}},
		{"long-polls with pauses between them are not announced", func(p *presenceTest) {
			for range 10 {
				ada := p.stream("ada")
				time.Sleep(25 * time.Second)
				ada.unsubscribe()
				time.Sleep(9 * time.Second)
			}
		}, []string{"0s ada:online", "5m41s ada:offline"}},
		{"typing falls back after 5 s", func(p *presenceTest) {
			p.poll("ada")
			p.at("2s")
			p.setState("ada", "typing")
			p.at("6.999s")
			p.wantRoster("ada:typing")
			p.at("7s")
			p.wantRoster("ada:online")
		}, []string{"0s ada:online", "2s ada:typing", "7s ada:online", "1m2s ada:offline"}},
		{"typing lasts while it goes on", func(p *presenceTest) {
			ada := p.stream("ada")
			for range 10 {
				time.Sleep(3 * time.Second)
				p.setState("ada", "typing")
			}
			p.at("1m")
			ada.unsubscribe()
		}, []string{"0s ada:online", "3s ada:typing", "35s ada:online", "1m10s ada:offline"}},
		{"typing ends when the user sets another state", func(p *presenceTest) {
			ada := p.stream("ada")
			p.at("2s")
			p.setState("ada", "typing")
			p.at("4s")
			p.setState("ada", "online")
			p.at("1m")
			ada.unsubscribe()
		}, []string{"0s ada:online", "2s ada:typing", "4s ada:online", "1m10s ada:offline"}},
		{"typing may follow joining at once", func(p *presenceTest) {
			ada := p.stream("ada")
			p.setState("ada", "typing")
			p.at("1m")
			ada.unsubscribe()
		}, []string{"0s ada:online", "0s ada:typing", "5s ada:online", "1m10s ada:offline"}},
		{"away lasts until another state is set", func(p *presenceTest) {
			ada := p.stream("ada")
			p.at("2s")
			p.setState("ada", "away")
			p.at("1h")
			p.wantRoster("ada:away")
			p.setState("ada", "online")
			p.at("1h2s")
			p.setState("ada", "away")
			p.at("1h4s")
			p.setState("ada", "typing")
			p.at("2h")
			ada.unsubscribe()
		}, []string{"0s ada:online", "2s ada:away", "1h0m0s ada:online", "1h0m2s ada:away", "1h0m4s ada:typing", "1h0m9s ada:online", "2h0m10s ada:offline"}},
		{"away outlasts a reload, but not an absence", func(p *presenceTest) {
			ada := p.stream("ada")
			p.at("2s")
			p.setState("ada", "away")
			ada.unsubscribe()
			p.at("5s")
			p.stream("ada").unsubscribe()
			p.at("20s")
			p.stream("ada").unsubscribe()
		}, []string{"0s ada:online", "2s ada:away", "15s ada:offline", "20s ada:online", "30s ada:offline"}},
		{"offline is announced at once", func(p *presenceTest) {
			ada := p.stream("ada")
			p.at("1m")
			p.setState("ada", "offline")
			p.wantRoster("")
			p.at("1m1s")
			ada.unsubscribe()
		}, []string{"0s ada:online", "1m0s ada:offline"}},
		{"offline is announced at once, even while typing", func(p *presenceTest) {
			ada := p.stream("ada")
			p.at("1m")
			p.setState("ada", "typing")
			p.at("1m0.1s")
			p.setState("ada", "offline")
			ada.unsubscribe()
		}, []string{"0s ada:online", "1m0s ada:typing", "1m0.1s ada:offline"}},
		{"offline is announced at once for a user who polls", func(p *presenceTest) {
			p.poll("ada")
			p.at("3s")
			p.setState("ada", "offline")
		}, []string{"0s ada:online", "3s ada:offline"}},
		{"a tab that goes offline leaves the other", func(p *presenceTest) {
			one, two := p.stream("ada"), p.stream("ada")
			p.at("1m")
			p.setState("ada", "offline")
			one.unsubscribe()
			p.wantRoster("ada:online")
			p.at("2m")
			two.unsubscribe()
		}, []string{"0s ada:online", "2m10s ada:offline"}},
		{"the offline of the last tab is announced at once", func(p *presenceTest) {
			one, two := p.stream("ada"), p.stream("ada")
			p.at("1m")
			p.setState("ada", "offline")
			one.unsubscribe()
			p.at("2m")
			p.setState("ada", "offline")
			two.unsubscribe()
		}, []string{"0s ada:online", "2m0s ada:offline"}},
		{"an offline from a closed tab does not concern the other tab", func(p *presenceTest) {
			one, two := p.stream("ada"), p.stream("ada")
			p.at("1m")
			one.unsubscribe()
			p.setState("ada", "offline")
			p.at("2m")
			p.wantRoster("ada:online")
			p.setState("ada", "offline")
			two.unsubscribe()
		}, []string{"0s ada:online", "2m0s ada:offline"}},
		{"an offline while one tab streams and another polls concerns the one that polls", func(p *presenceTest) {
			ada := p.stream("ada")
			p.poll("ada")
			p.setState("ada", "offline")
			p.at("2s")
			p.wantRoster("ada:online")
			ada.unsubscribe()
		}, []string{"0s ada:online", "12s ada:offline"}},
		{"a user who went offline and polls is back, though the stream closes later", func(p *presenceTest) {
			ada := p.stream("ada")
			p.at("1m")
			p.setState("ada", "offline")
			p.at("1m2s")
			p.poll("ada")
			ada.unsubscribe()
		}, []string{"0s ada:online", "1m0s ada:offline", "1m2s ada:online", "2m2s ada:offline"}},
		{"a reload that goes offline is announced as offline and online", func(p *presenceTest) {
			old := p.stream("ada")
			p.at("1m")
			p.setState("ada", "offline")
			p.at("1m2s")
			ada := p.stream("ada")
			p.at("1m3s")
			old.unsubscribe()
			p.at("2m")
			ada.unsubscribe()
		}, []string{"0s ada:online", "1m0s ada:offline", "1m2s ada:online", "2m10s ada:offline"}},
		{"a user who went offline and returns is back", func(p *presenceTest) {
			ada := p.stream("ada")
			p.at("1m")
			p.setState("ada", "offline")
			ada.unsubscribe()
			p.at("2m")
			p.poll("ada")
			p.setState("ada", "offline")
			p.at("3m")
			p.setState("ada", "online")
			p.setState("ada", "offline")
		}, []string{"0s ada:online", "1m0s ada:offline", "2m0s ada:online", "2m0s ada:offline", "3m0s ada:online", "3m0s ada:offline"}},
		{"a state without a stream lasts a minute", func(p *presenceTest) {
			p.setState("ada", "online")
			p.setState("bob", "away")
			p.setState("cyd", "typing")
			p.wantRoster("ada:online bob:away cyd:typing")
		}, []string{"0s ada:online", "0s bob:away", "0s cyd:typing", "5s cyd:online"}}, // and offline, in any order
		{"offline for a user who is not present does nothing", func(p *presenceTest) {
			p.setState("ada", "offline")
			p.wantRoster("")
		}, nil},
		{"two users", func(p *presenceTest) {
			ada := p.stream("ada")
			p.at("1s")
			bob := p.stream("bob")
			p.at("2s")
			ada.unsubscribe()
			p.at("3s")
			p.setState("bob", "typing")
			p.at("1m")
			bob.unsubscribe()
		}, []string{"0s ada:online", "1s bob:online", "3s bob:typing", "8s bob:online", "12s ada:offline", "1m10s bob:offline"}},
	} {
		t.Run(tc.what, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := newPresenceTest(t, limits{})
				tc.do(p)
				time.Sleep(5 * time.Minute)
				synctest.Wait()
				if strings.HasPrefix(tc.what, "a state without") {
					last := p.events[len(p.events)-3:]
					slices.Sort(last)
					tc.want = append(tc.want, "1m0s ada:offline", "1m0s bob:offline", "1m0s cyd:offline")
				}
				p.wantEvents(append([]string{"0s {}"}, tc.want...)...)
				p.wantNothingLeft()
			})
		})
	}
}

func TestAUserIsPresentInEachRoomOfTheirStream(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newTestRelay(limits{})
		watcher := openSubscriber(t, r, "a,b,c", -1, subscribeRequest{seesPresence: true})
		watcher.wantRoster()
		wantRead(t, watcher, "{} {} {}")
		ada := openSubscriber(t, r, "a,b", -1, subscribeRequest{user: "ada", seesPresence: true, longLived: true})
		wantRead(t, watcher, "ada:online ada:online")
		if a, c := r.roster("a").Count, r.roster("c").Count; a != 1 || c != 0 {
			t.Errorf("%d in a and %d in c, want 1 and 0", a, c)
		}
		r.setPresence("b", "ada", "", "offline")
		ada.unsubscribe()
		wantRead(t, watcher, "ada:offline")
		time.Sleep(10 * time.Second)
		synctest.Wait()
		wantRead(t, watcher, "ada:offline")
	})
}

// Who sees presence, and how: a stream by the roster and the events after it, a poll
// by the events since its cursor, and some not at all.
func TestWhoSeesPresence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPresenceTest(t, limits{})
		head := p.lastID.Load() - p.relay.epoch
		p.stream("ada")
		publishText(t, p.relay, "a", "hi")

		blind := openSubscriber(t, p.relay, "a", head, subscribeRequest{longLived: true})
		wantRead(t, blind, "2:a:hi")
		poller := openSubscriber(t, p.relay, "a", head, subscribeRequest{user: "pol", seesPresence: true})
		wantRead(t, poller, "ada:online 2:a:hi pol:online")
		unseen := openSubscriber(t, p.relay, "a", head, subscribeRequest{seesPresence: true, longLived: true})
		unseen.wantRoster()
		wantRead(t, unseen, "2:a:hi {ada:online pol:online}")
		eve := openSubscriber(t, p.relay, "a", head, subscribeRequest{user: "eve", seesPresence: true, longLived: true})
		eve.wantRoster()
		wantRead(t, eve, "2:a:hi {ada:online eve:online pol:online}")

		p.setState("ada", "away")
		wantRead(t, blind, "")
		wantRead(t, poller, "eve:online ada:away")
		wantRead(t, unseen, "eve:online ada:away")
		wantRead(t, eve, "ada:away")
		p.wantRoster("ada:away eve:online pol:online")
	})
}

// With a backlog of several batches, the roster comes after it, and earlier presence
// events are left out.
func TestTheRosterComesAfterTheBacklog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPresenceTest(t, limits{})
		const n = maxBatchEvents + 10
		for range n {
			publishText(t, p.relay, "a", "x")
		}
		p.stream("ada")
		sub := openSubscriber(t, p.relay, "a", 0, subscribeRequest{seesPresence: true, longLived: true})
		sub.wantRoster()
		batch := sub.next(nil)
		p.stream("bob")
		rest := summarize(p.relay, readAll(sub))
		if len(batch) != maxBatchEvents || !strings.HasSuffix(rest, fmt.Sprintf("%d:a:x {ada:online bob:online}", n)) || strings.Contains(rest, " ada:") {
			t.Errorf("after %d events came %s", len(batch), rest)
		}
		p.stream("cyd")
		wantRead(t, sub, "cyd:online")
	})
}

// A user who joins between a stream's last read and its roster is in the roster, and
// not announced again. A message of that moment is not lost.
func TestNoPresenceEventRepeatsTheRoster(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPresenceTest(t, limits{})
		sub := openSubscriber(t, p.relay, "a", -1, wantPresence)
		sub.wantRoster()
		sub.next(nil)
		p.stream("ada")
		publishText(t, p.relay, "a", "hi")
		if opening := summarize(p.relay, sub.appendRosters(nil)); opening != "{ada:online}" {
			t.Errorf("the roster is %s", opening)
		}
		p.stream("bob")
		wantRead(t, sub, "2:a:hi bob:online")
	})
}

// Timers only announce what the clock has decided. Here they are late, as on a machine
// that Cloud Run pauses.
func TestTheClockDecidesThoughTimersAreLate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPresenceTest(t, limits{})
		p.poll("ada")
		bob := p.stream("bob")
		p.setState("bob", "typing")
		p.relay.mu.Lock()
		for _, l := range p.rooms["a"].leases {
			l.timer.Stop()
		}
		p.relay.mu.Unlock()

		p.at("4.999s")
		p.wantRoster("ada:online bob:typing")
		p.at("5s")
		p.wantRoster("ada:online bob:online")
		p.at("59.999s")
		p.wantRoster("ada:online bob:online")
		p.at("1m")
		p.wantRoster("bob:online")
		sub := openSubscriber(t, p.relay, "a", -1, subscribeRequest{seesPresence: true})
		sub.wantRoster()
		wantRead(t, sub, "{bob:online}")
		p.wantEvents("0s {}", "0s ada:online", "0s bob:online", "0s bob:typing")

		p.at("2m")
		p.relay.mu.Lock()
		p.rooms["a"].leases["ada"].timer.Reset(0)
		p.relay.mu.Unlock()
		p.wantEvents("0s {}", "0s ada:online", "0s bob:online", "0s bob:typing", "2m0s ada:offline")
		bob.unsubscribe()
		sub.unsubscribe()
		p.wantNothingLeft()
	})
}

// A lease that has expired is over, even if no timer has announced that. A user who
// then returns is online, whatever the state was before.
func TestAnOldStateDoesNotOutliveItsLease(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPresenceTest(t, limits{})
		p.poll("ada")
		p.setState("ada", "away")
		p.rooms["a"].leases["ada"].timer.Stop()
		p.at("2m")
		p.poll("ada")
		p.wantRoster("ada:online")
		p.wantEvents("0s {}", "0s ada:online", "0s ada:away", "2m0s ada:online")
		p.wantNothingLeft()
	})
}

// mostInASecond returns the highest number of events in one second of the clock.
func (p *presenceTest) mostInASecond() (most int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	count := map[time.Duration]int{}
	for _, line := range p.events {
		at, _, _ := strings.Cut(line, " ")
		d, _ := time.ParseDuration(at)
		count[d.Truncate(time.Second)]++
		most = max(most, count[d.Truncate(time.Second)])
	}
	return most
}

func TestAFloodOfTypingIsOneEventASecond(t *testing.T) {
	for _, tc := range []struct {
		states []string
		rate   int // events a second
		last   string
	}{
		{[]string{"typing"}, 1, "online"},
		{[]string{"typing", "online"}, 1, "online"},
		{[]string{"typing", "online", "away"}, 1, "online"},
		// Leaving is announced at once, so that limit does not apply.
		{[]string{"typing", "offline"}, 2, "offline"},
		{[]string{"online", "typing", "offline"}, 3, "online"},
	} {
		t.Run(strings.Join(tc.states, " "), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := newPresenceTest(t, limits{})
				p.at("1s")
				for i := range 2000 {
					p.setState("ada", tc.states[i%len(tc.states)])
					time.Sleep(10 * time.Millisecond)
				}
				synctest.Wait()
				if n, most := len(p.events), p.mostInASecond(); n > 2+20*tc.rate || most > tc.rate+1 {
					t.Errorf("20 s of flood were %d events, up to %d in a second", n, most)
				}
				p.at("25.99s")
				if last := p.events[len(p.events)-1]; !strings.HasSuffix(last, " ada:"+tc.last) {
					t.Errorf("the last event is %s, want %s", last, tc.last)
				}
				p.wantNothingLeft()
			})
		})
	}
}

func TestACrowdIsOnlyCounted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPresenceTest(t, limits{})
		var streams []*subscriber
		var want []string
		expect := func(format string, args ...any) { want = append(want, fmt.Sprintf(format, args...)) }
		expect("0s {}")
		for i := range 150 { // one every 10 ms
			if i < maxRosterUsers {
				expect("%v u%03d:online", time.Since(p.start), i)
			}
			streams = append(streams, p.stream(fmt.Sprintf("u%03d", i)))
			time.Sleep(10 * time.Millisecond)
			synctest.Wait()
		}
		expect("1s {101}")
		expect("2s {150}")
		p.at("3s")
		p.wantEvents(want...)

		// Typing is not announced in a crowd, but is in the full roster.
		p.setState("u007", "typing")
		if ros := p.roster("a"); ros.Count != 150 || ros.Users["u007"] != "typing" {
			t.Errorf("%d are present, u007 is %s", ros.Count, ros.Users["u007"])
		}
		sub := openSubscriber(t, p.relay, "a", -1, wantPresence)
		sub.wantRoster()
		wantRead(t, sub, "{150}")
		sub.unsubscribe()
		p.at("9s")
		p.wantEvents(want...)

		// 49 leave, and it is still a crowd; after one more the roster has names.
		for _, sub := range streams[:49] {
			sub.unsubscribe()
		}
		expect("19s {149}")
		expect("20s {101}")
		p.at("30s")
		p.wantEvents(want...)
		streams[49].unsubscribe()
		var left []string
		for i := 50; i < 150; i++ {
			left = append(left, fmt.Sprintf("u%03d:online", i))
		}
		expect("40s {%s}", strings.Join(left, " "))
		p.at("50s")
		p.wantEvents(want...)
		sub = openSubscriber(t, p.relay, "a", -1, wantPresence)
		sub.wantRoster()
		wantRead(t, sub, "{"+strings.Join(left, " ")+"}")
		sub.unsubscribe()

		// From there on, users are announced one by one.
		streams[50].unsubscribe()
		p.setState("u149", "away")
		expect("50s u149:away")
		expect("1m0s u050:offline")
		p.at("2m")
		p.wantEvents(want...)
		for _, sub := range streams[51:] {
			sub.unsubscribe()
		}
		p.wantNothingLeft()
	})
}

var wantPresence = subscribeRequest{seesPresence: true, longLived: true}

// Ten thousand join and leave, and the room gets a few hundred events.
func TestTenThousandUsersJoinAndLeave(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const n = 10_000
		r := newTestRelay(limits{})
		var streams []*subscriber
		for i := range n { // within 20 s
			streams = append(streams, openSubscriber(t, r, "a", -1, subscribeRequest{user: fmt.Sprint("user", i), seesPresence: true, longLived: true}))
			time.Sleep(2 * time.Millisecond)
		}
		time.Sleep(time.Second)
		synctest.Wait()
		if events := r.lastID.Load() - r.epoch; events > maxRosterUsers+22 {
			t.Errorf("%d joins in 21 s were %d events", n, events)
		}
		if c := r.roster("a").Count; c != n {
			t.Errorf("%d of %d are present", c, n)
		}
		checkAccounting(t, r)
		before := r.lastID.Load()
		for _, sub := range streams {
			sub.unsubscribe()
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		if events := r.lastID.Load() - before; events > 5 {
			t.Errorf("%d left at once, which was %d events", n, events)
		}
		r.sweep(time.Now().Add(time.Hour))
		if r.leases != 0 || len(r.rooms) != 0 || r.bytes != 0 {
			t.Errorf("%d leases, %d rooms and %d bytes are left", r.leases, len(r.rooms), r.bytes)
		}
	})
}

func TestTooManyUsers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newTestRelay(limits{maxUsers: 1000})
		for i := range r.limits.maxUsers {
			if err := r.setPresence("a", fmt.Sprint("user", i), "", "online"); err != nil {
				t.Fatal(i, err)
			}
		}
		head, rooms := r.lastID.Load(), len(r.rooms)
		if err := r.setPresence("b", "one more", "", "online"); err != errTooManyUsers {
			t.Errorf("a user too many: %v", err)
		}
		if _, err := trySubscriber(r, subscribeRequest{rooms: []string{"a", "b"}, user: "one more", longLived: true}); err != errTooManyUsers {
			t.Errorf("a reader too many: %v", err)
		}
		if len(r.rooms) != rooms || r.lastID.Load() != head || len(r.rooms["a"].subscriptions) != 0 {
			t.Error("a refused user has changed something")
		}
		if err := r.setPresence("a", "user7", "", "away"); err != nil {
			t.Errorf("a user who is present: %v", err)
		}
		openSubscriber(t, r, "a", 0, subscribeRequest{seesPresence: true}).unsubscribe() // a client without a user may still read
		checkAccounting(t, r)
		time.Sleep(time.Minute + time.Second)
		synctest.Wait()
		if err := r.setPresence("b", "one more", "", "online"); err != nil {
			t.Errorf("when the others are gone: %v", err)
		}
		if r.leases != 1 {
			t.Errorf("%d users are left, want 1", r.leases)
		}
	})
}

// A stream that missed a presence event, since its room had many signals, is sent the
// roster.
func TestASubscriberThatMissedPresenceIsSentTheRoster(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPresenceTest(t, limits{maxEvents: 2})
		sub := openSubscriber(t, p.relay, "a", -1, wantPresence)
		sub.wantRoster()
		wantRead(t, sub, "{}")
		for _, user := range []string{"ada", "bob"} {
			p.stream(user)
		}
		wantRead(t, sub, "ada:online bob:online")
		for _, user := range []string{"cyd", "dan", "eve"} {
			p.stream(user)
		}
		wantRead(t, sub, "dan:online eve:online {ada:online bob:online cyd:online dan:online eve:online}")
		p.stream("flo")
		wantRead(t, sub, "flo:online")

		// Likewise if the history of its room was dropped.
		p.stream("gus")
		p.relay.mu.Lock()
		p.dropHistory(p.rooms["a"])
		p.relay.mu.Unlock()
		wantRead(t, sub, "{ada:online bob:online cyd:online dan:online eve:online flo:online gus:online}")
	})
}

// Likewise if it read so late that the event had expired, like a stream whose client
// reads slowly.
func TestASubscriberThatReadsPresenceLateIsSentTheRoster(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPresenceTest(t, limits{})
		sub := openSubscriber(t, p.relay, "a", -1, wantPresence)
		sub.wantRoster()
		wantRead(t, sub, "{}")
		p.stream("ada")
		time.Sleep(presenceEventTTL)
		wantRead(t, sub, "{ada:online}")

		p.stream("bob")
		time.Sleep(presenceEventTTL)
		p.stream("cyd") // drops the event about bob
		wantRead(t, sub, "cyd:online {ada:online bob:online cyd:online}")
	})
}

// A user who returns within a second of being announced offline is announced after
// that second. A stream that opens in between has the user in its roster already.
func TestADelayedJoinIsNotSentTwice(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPresenceTest(t, limits{})
		p.setState("ada", "online")
		p.setState("ada", "offline")
		p.stream("ada")
		sub := openSubscriber(t, p.relay, "a", -1, wantPresence)
		sub.wantRoster()
		opening := summarize(p.relay, readAll(sub))
		p.at("2s")
		after := summarize(p.relay, readAll(sub))
		if strings.Count(opening+after, "ada:online") != 1 {
			t.Errorf("received %s and then %s", opening, after)
		}
	})
}

// A room may be forgotten while an announcement of its count is due. The announcement
// does not go to a new room of the same name.
func TestACountIsNotOfAForgottenRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newTestRelay(limits{maxBytes: 64 << 10, roomIdle: time.Minute})
		var streams []*subscriber
		for i := range maxRosterUsers + 2 {
			streams = append(streams, openSubscriber(t, r, "a", -1, subscribeRequest{user: fmt.Sprint("user", i), longLived: true}))
		}
		for i, sub := range streams {
			r.setPresence("a", fmt.Sprint("user", i), "", "offline")
			sub.unsubscribe()
		}
		time.Sleep(announceInterval) // a lease lasts so long after its last announcement, and so does the count's timer
		synctest.Wait()
		publishText(t, r, "b", strings.Repeat("x", 64<<10))
		if r.rooms["a"] != nil {
			t.Fatal("room a was not forgotten")
		}
		openSubscriber(t, r, "a", -1, subscribeRequest{user: "ada", longLived: true})
		sub := openSubscriber(t, r, "a", -1, wantPresence)
		sub.wantRoster()
		wantRead(t, sub, "{ada:online}")
		time.Sleep(time.Minute)
		synctest.Wait()
		wantRead(t, sub, "")
	})
}

// A watcher follows a room's presence like a page: by the roster and the events after
// it.
type watcher struct {
	*testing.T
	rd       *subscriber
	users    map[string]string
	count    int
	crowd    bool
	rosterAt int64 // time of the last roster, in milliseconds
	mayMiss  bool  // it may miss events, and then get a roster with nothing new
}

func (w *watcher) read() {
	w.Helper()
	for _, e := range readAll(w.rd) {
		var c struct {
			From string
			Time int64
			Data json.RawMessage
		}
		json.Unmarshal(e.json, &c)
		if c.From == "" {
			var ros roster
			json.Unmarshal(c.Data, &ros)
			w.users, w.count, w.crowd = ros.Users, ros.Count, ros.Users == nil
			w.rosterAt = time.Now().UnixMilli()
			if c.Time != 0 {
				w.rosterAt = c.Time
			}
			if !w.crowd && ros.Count != len(ros.Users) {
				w.Errorf("a roster of %d has %d names", ros.Count, len(ros.Users))
			}
			continue
		}
		if w.crowd {
			w.Errorf("in a crowd of %d it received %s", w.count, e.json)
			continue
		}
		var state string
		json.Unmarshal(c.Data, &state)
		known, present := w.users[c.From]
		if !present {
			known = "offline"
		}
		// A delayed announcement is in the roster before it is sent.
		if !w.mayMiss && known == state && c.Time-w.rosterAt >= announceInterval.Milliseconds() {
			w.Errorf("%s was %s already", c.From, state)
		}
		if w.users[c.From] = state; state == "offline" {
			delete(w.users, c.From)
		}
		w.count = len(w.users)
	}
}

// Users join, leave and change at random, while watchers subscribe and read at their
// own pace. In the end each watcher knows who is present, and none was sent anything
// twice.
func TestRostersAndWhatFollowsAgree(t *testing.T) {
	for _, tc := range []struct {
		what            string
		users, watchers int
		stay            int // users who stay
		limits          limits
	}{
		{"a few", 12, 12, 5, limits{}},
		{"no user in the end", 12, 6, 0, limits{}},
		{"so many signals that some are missed", 30, 12, 15, limits{maxEvents: 4}},
		{"a room that is forgotten repeatedly", 12, 6, 5, limits{maxBytes: 1500}},
		{"a crowd at times", 130, 12, 90, limits{}},
		{"a crowd in the end", 130, 12, 105, limits{}},
		{"a crowd, with signals missed", 130, 12, 99, limits{maxEvents: 4}},
	} {
		t.Run(tc.what, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newTestRelay(tc.limits)
				var done atomic.Bool
				var acting, reading sync.WaitGroup
				pause := func(rnd *rand.Rand, most time.Duration) { time.Sleep(time.Duration(rnd.Int64N(int64(most)))) }

				for i := range tc.users {
					user := fmt.Sprint("user", i)
					acting.Go(func() {
						rnd := rand.New(rand.NewPCG(uint64(i), 4))
						var streams []*subscriber
						req := subscribeRequest{user: user, seesPresence: true}
						for range 40 {
							pause(rnd, 4*time.Second)
							switch n := rnd.IntN(8); {
							case n < 2 && len(streams) < 3:
								req.longLived = true
								streams = append(streams, openSubscriber(t, r, "a", -1, req))
							case n < 5 && len(streams) > 0:
								streams[0].unsubscribe()
								streams = streams[1:]
							case n == 5:
								req.longLived = false
								openSubscriber(t, r, "a", -1, req).unsubscribe()
							default:
								r.setPresence("a", user, "", []string{"online", "typing", "away", "offline"}[rnd.IntN(4)])
							}
							if i == 0 {
								publishText(t, r, "b", strings.Repeat("x", 500))
							}
						}
						if i < tc.stay {
							req.longLived = true
							openSubscriber(t, r, "a", -1, req)
						}
						for _, sub := range streams {
							sub.unsubscribe()
						}
					})
				}
				watchers := make([]*watcher, tc.watchers)
				for i := range watchers {
					reading.Go(func() {
						rnd := rand.New(rand.NewPCG(uint64(i), 5))
						for !done.Load() {
							pause(rnd, 20*time.Second)
							g := &watcher{T: t, rd: openSubscriber(t, r, "a", -1, wantPresence), mayMiss: tc.limits != limits{}}
							g.rd.wantRoster()
							for turns := 50 + rnd.IntN(200); turns > 0 && !done.Load(); turns-- {
								g.read()
								if i%2 == 0 { // the others read now and then
									g.rd.wait(t.Context(), time.After(time.Second))
								} else {
									pause(rnd, 2*time.Second)
								}
							}
							if old := watchers[i]; old != nil {
								old.rd.unsubscribe()
							}
							watchers[i] = g
						}
					})
				}
				acting.Wait()
				time.Sleep(2 * time.Minute) // leases end
				done.Store(true)
				reading.Wait()
				checkAccounting(t, r)

				truth := r.roster("a")
				if truth.Count != tc.stay {
					t.Errorf("%d are present, want %d", truth.Count, tc.stay)
				}
				for i := range tc.stay {
					if truth.Users[fmt.Sprint("user", i)] == "" {
						t.Errorf("user%d stays, and is not present", i)
					}
				}
				for i, g := range watchers {
					g.read()
					if g.count != truth.Count || g.crowd != (truth.Count > maxRosterUsers) {
						t.Errorf("watcher %d counts %d, a crowd %v; there are %d", i, g.count, g.crowd, truth.Count)
					}
					if !g.crowd && fmt.Sprint(g.users) != fmt.Sprint(truth.Users) {
						t.Errorf("watcher %d has %v\nwant %v", i, g.users, truth.Users)
					}
				}
			})
		})
	}
}

// Presence by HTTP: set by text, JSON or a form, read as JSON.
func TestPresenceByHTTP(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestbed(t, pipe)
		_, body := b.do("GET", "/rooms/a/presence", "")
		if body != `{"room":"a","count":0,"users":{}}`+"\n" {
			t.Errorf("nobody: %s", body)
		}
		for _, test := range []struct{ query, kind, body, want string }{
			{"?user=ada", textType, "online", `{"ada":"online"}`},
			{"?user=ada", "Content-Type: text/plain;charset=UTF-8", "away", `{"ada":"away"}`}, // as sendBeacon does
			{"?user=ada", jsonType, `{"state":"typing"}`, `{"ada":"typing"}`},
			{"?user=ada", textType, `{"state":"online"}`, `{"ada":"online"}`},
			{"?user=ada", formType, "state=away", `{"ada":"away"}`},
			{"", formType, "user=bob&state=online", `{"ada":"away","bob":"online"}`},
			{"?user=%3Cb%3E", textType, "typing\n", `{"\u003cb\u003e":"typing","ada":"away","bob":"online"}`},
			{"?user=%3Cb%3E", textType, "offline", `{"ada":"away","bob":"online"}`},
			{"?user=bob", textType, "offline", `{"ada":"away"}`},
			{"?user=nobody", textType, "offline", `{"ada":"away"}`},
		} {
			if res, body := b.do("POST", "/rooms/a/presence"+test.query, test.body, test.kind); res.StatusCode != 200 || !json.Valid([]byte(body)) {
				t.Errorf("%s %s: %s %s", test.query, test.body, res.Status, body)
			}
			_, body := b.do("GET", "/rooms/a/presence", "")
			if want := fmt.Sprintf(`{"room":"a","count":%d,"users":%s}`+"\n", strings.Count(test.want, `":"`), test.want); body != want {
				t.Errorf("%s %s: %s, want %s", test.query, test.body, body, want)
			}
		}
		// A user who polls is present for a minute.
		b.do("GET", "/rooms/p/poll?user=eve", "")
		time.Sleep(time.Minute - time.Millisecond)
		if _, body := b.do("GET", "/rooms/p/presence", ""); !strings.Contains(body, `"eve":"online"`) {
			t.Errorf("after 59.999 s: %s", body)
		}
		time.Sleep(time.Millisecond)
		if _, body := b.do("GET", "/rooms/p/presence", ""); !strings.Contains(body, `"count":0`) {
			t.Errorf("after a minute: %s", body)
		}
		// A user with a stream is present while it is open, and 10 s more.
		ctx, leave := context.WithCancel(t.Context())
		e, err := b.trySubscribe(ctx, b.client, variantOf("sse"), "s", "user=eve")
		if err != nil {
			t.Fatal(err)
		}
		go io.Copy(io.Discard, e.body)
		time.Sleep(time.Hour)
		leave()
		synctest.Wait()
		time.Sleep(10*time.Second - time.Millisecond)
		if _, body := b.do("GET", "/rooms/s/presence", ""); !strings.Contains(body, `"eve":"online"`) {
			t.Errorf("9.999 s after leaving: %s", body)
		}
		time.Sleep(time.Millisecond)
		if _, body := b.do("GET", "/rooms/s/presence", ""); !strings.Contains(body, `"count":0`) {
			t.Errorf("10 s after leaving: %s", body)
		}
	})
}

// A state is set, or refused; the roster is JSON with valid states.
func FuzzPresence(f *testing.F) {
	for _, seed := range []struct{ kind, user, body string }{
		{"text/plain", "ada", "online"}, {"text/plain", "ada", " offline\n"}, {"application/json", "ada", `{"state":"typing"}`}, {"", "ada", `{"state":"away"}`},
		{"application/x-www-form-urlencoded", "", "state=typing&user=bob"}, {"application/x-www-form-urlencoded", "ada", "state=a&state=b"}, {"application/json", "", `{"state":null}`},
		{"text/plain", "\xff", "online"}, {"text/plain", "<b>", "online"}, {"application/json", "ada", "{"}, {"text/plain; charset=latin1", "ada", "online"},
	} {
		f.Add(seed.kind, seed.user, []byte(seed.body))
	}
	f.Fuzz(func(t *testing.T, kind, user string, body []byte) {
		s := newTestApp(t)
		s.relay.presenceTTL = 1
		r := httptest.NewRequest("POST", "/rooms/a/presence?"+url.Values{"user": {user}}.Encode(), bytes.NewReader(body))
		r.Header.Set("Content-Type", kind)
		before := s.relay.lastID.Load()
		w := newDeadlineRecorder()
		s.ServeHTTP(w, r)
		if w.Code != http.StatusOK {
			if w.Code < 400 || w.Code > 499 || !isError(w.Body.String()) || s.relay.lastID.Load() != before || len(s.relay.rooms) != 0 {
				t.Errorf("%d %q", w.Code, w.Body)
			}
			return
		}
		var answer struct{ Room, User, State string }
		if err := json.Unmarshal(w.Body.Bytes(), &answer); err != nil || !slices.Contains([]string{"online", "typing", "away", "offline"}, answer.State) || answer.Room != "a" {
			t.Errorf("%q", w.Body)
		}
		if !utf8.ValidString(answer.User) || answer.User == "" || utf8.RuneCountInString(answer.User) > 64 || strings.ContainsFunc(answer.User, unicode.IsControl) {
			t.Errorf("the user %q", answer.User)
		}
		w = newDeadlineRecorder()
		s.ServeHTTP(w, httptest.NewRequest("GET", "/rooms/a/presence", nil))
		var roster struct {
			Count int
			Users map[string]string
		}
		if err := json.Unmarshal(w.Body.Bytes(), &roster); err != nil || roster.Count != len(roster.Users) {
			t.Errorf("%q", w.Body)
		}
	})
}
