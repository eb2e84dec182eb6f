// Presence's tests: who does what at which time, and what the room is told
// when. The clock is virtual, so both are exact.

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// A house is a relay whose room a is watched.
type house struct {
	*testing.T
	*relay
	start time.Time
	stop  func()

	mu   sync.Mutex
	told []string // what the watcher was told, and when
}

// newHouse opens a house, whose watcher sees presence and is not seen.
func newHouse(t *testing.T, l limits) *house {
	h := &house{T: t, relay: testRelay(l), start: time.Now()}
	rd := openReader(t, h.relay, "a", -1, want{presence: true, holds: true})
	rd.expectRoster()
	ctx, cancel := context.WithCancel(context.Background())
	watching := make(chan struct{})
	go func() {
		defer close(watching)
		defer rd.leave()
		for {
			for _, e := range readAll(rd) {
				h.mu.Lock()
				h.told = append(h.told, fmt.Sprint(time.Since(h.start), " ", testWords(h.relay, []*event{e})))
				h.mu.Unlock()
			}
			if !rd.wait(ctx, nil) {
				return
			}
		}
	}()
	h.stop = sync.OnceFunc(func() { cancel(); <-watching })
	t.Cleanup(h.stop)
	synctest.Wait()
	return h
}

// stream opens a stream that names the user; who calls leave closes it.
func (h *house) stream(user string) *reader {
	h.Helper()
	return openReader(h.T, h.relay, "a", -1, want{user: user, presence: true, holds: true})
}

func (h *house) poll(user string) {
	h.Helper()
	openReader(h.T, h.relay, "a", -1, want{user: user, presence: true}).leave()
}

// client opens a stream of one of the user's clients.
func (h *house) client(user, client string) *reader {
	h.Helper()
	return openReader(h.T, h.relay, "a", -1, want{user: user, client: client, presence: true, holds: true})
}

// goodbye says that one of the user's clients leaves.
func (h *house) goodbye(user, client string) {
	h.Helper()
	if err := h.declare("a", user, client, "offline"); err != nil {
		h.Error(err)
	}
}

// says posts a state.
func (h *house) says(user, state string) {
	h.Helper()
	if err := h.declare("a", user, "", state); err != nil {
		h.Error(err)
	}
}

// at sleeps until so long after the beginning.
func (h *house) at(s string) {
	d, err := time.ParseDuration(s)
	if err != nil {
		h.Fatal(err)
	}
	time.Sleep(d - time.Since(h.start))
	synctest.Wait()
}

// wantTold checks all that was told so far.
func (h *house) wantTold(want ...string) {
	h.Helper()
	synctest.Wait()
	h.mu.Lock()
	defer h.mu.Unlock()
	if !slices.Equal(h.told, want) {
		h.Errorf("the room was told\n\t%s\nwant\n\t%s", strings.Join(h.told, "\n\t"), strings.Join(want, "\n\t"))
	}
}

// wantHere checks who asks is told.
func (h *house) wantHere(want string) {
	h.Helper()
	ros := h.whoIsIn("a")
	if got := testNames(ros.Users); got != want || ros.Count != len(ros.Users) {
		h.Errorf("after %v %d are here: %s; want %s", time.Since(h.start), ros.Count, got, want)
	}
}

// wantGone checks that in time nothing is left of presence.
func (h *house) wantGone() {
	h.Helper()
	h.stop()
	for range 2 {
		time.Sleep(time.Hour)
		synctest.Wait()
		h.sweep(time.Now())
	}
	checkBooks(h.T, h.relay)
	if h.leases != 0 || len(h.rooms) != 0 {
		h.Errorf("%d leases and %d rooms are left of an empty house", h.leases, len(h.rooms))
	}
	mark := h.mark.Load()
	time.Sleep(time.Hour)
	synctest.Wait()
	if h.mark.Load() != mark {
		h.Error("a timer is left of an empty house, and told something")
	}
}

func TestPresence(t *testing.T) {
	for _, tc := range []struct {
		what string
		do   func(h *house)
		want []string
	}{
		{"a stream holds its user while it lasts, and 10 s more", func(h *house) {
			ada := h.stream("ada")
			h.at("5m")
			ada.leave()
			h.at("5m9.999999999s")
			h.wantHere("ada:online")
			h.at("5m10s")
			h.wantHere("")
		}, []string{"0s ada:online", "5m10s ada:offline"}},
		{"a reload tells nothing", func(h *house) {
			ada := h.stream("ada")
			h.at("1m")
			ada.leave()
			h.at("1m9.999s")
			ada = h.stream("ada")
			h.at("2m")
			ada.leave()
		}, []string{"0s ada:online", "2m10s ada:offline"}},
		{"nor does one whose new stream comes before the old is gone", func(h *house) {
			old := h.stream("ada")
			h.at("1m")
			ada := h.stream("ada")
			h.at("1m5s")
			old.leave()
			h.at("2m")
			ada.leave()
		}, []string{"0s ada:online", "2m10s ada:offline"}},
		{"a client's goodbye is for the stream it has, though another of it has just been replaced", func(h *house) {
			old := h.client("ada", "tab1")
			h.at("1m")
			ada := h.client("ada", "tab1")
			old.leave()
			h.at("1m1s")
			h.goodbye("ada", "tab1")
			h.wantHere("")
			h.at("1m2s")
			ada.leave()
		}, []string{"0s ada:online", "1m1s ada:offline"}},
		{"and so it is when the stream is gone before the goodbye comes", func(h *house) {
			old := h.client("ada", "tab1")
			h.at("1m")
			ada := h.client("ada", "tab1")
			old.leave()
			ada.leave()
			h.at("1m1s")
			h.goodbye("ada", "tab1")
		}, []string{"0s ada:online", "1m1s ada:offline"}},
		{"and when it long-polls", func(h *house) {
			for range 3 {
				ada := h.client("ada", "tab1")
				time.Sleep(time.Second)
				ada.leave()
			}
			ada := h.client("ada", "tab1")
			h.goodbye("ada", "tab1")
			ada.leave()
		}, []string{"0s ada:online", "3s ada:offline"}},
		{"and when it polls", func(h *house) {
			openReader(h.T, h.relay, "a", -1, want{user: "ada", client: "tab1", presence: true}).leave()
			h.at("2s")
			h.goodbye("ada", "tab1")
		}, []string{"0s ada:online", "2s ada:offline"}},
		{"a client's goodbye leaves the user's others alone", func(h *house) {
			one, two := h.client("ada", "tab1"), h.client("ada", "tab2")
			nameless := h.stream("ada")
			h.at("1m")
			h.goodbye("ada", "tab1")
			h.goodbye("ada", "tab1")
			one.leave()
			h.goodbye("ada", "tab1")
			h.goodbye("ada", "tab3")
			h.at("2m")
			two.leave()
			h.goodbye("ada", "tab2")
			h.at("3m")
			nameless.leave()
		}, []string{"0s ada:online", "3m10s ada:offline"}},
		{"a request that a client made just before its goodbye, and that comes just after, gets no grace", func(h *house) {
			ada := h.client("ada", "tab1")
			h.at("1m")
			h.goodbye("ada", "tab1")
			ada.leave()
			h.at("1m0.1s")
			h.client("ada", "tab1").leave()
			h.wantHere("")
		}, []string{"0s ada:online", "1m0s ada:offline", "1m0.1s ada:online", "1m0.1s ada:offline"}},
		{"a client that says goodbye and comes back is here", func(h *house) {
			h.client("ada", "tab1").leave()
			h.goodbye("ada", "tab1")
			h.at("2s")
			ada := h.client("ada", "tab1")
			h.at("1m")
			ada.leave()
		}, []string{"0s ada:online", "0s ada:offline", "2s ada:online", "1m10s ada:offline"}},
		{"a goodbye that names no client is the user's, whatever their clients are called", func(h *house) {
			ada := h.client("ada", "tab1")
			h.at("1m")
			h.says("ada", "offline")
			ada.leave()
		}, []string{"0s ada:online", "1m0s ada:offline"}},
		{"of more clients than are kept apart, those without a connection are here together", func(h *house) {
			for i := range 3 * maxClients {
				h.client("ada", fmt.Sprint("tab", i)).leave()
			}
			if n := len(h.rooms["a"].leases["ada"].clients); n > maxClients+1 {
				h.Errorf("%d clients are kept", n)
			}
			h.goodbye("ada", "tab1")
		}, []string{"0s ada:online", "10s ada:offline"}},
		{"who returns too late has been offline", func(h *house) {
			h.stream("ada").leave()
			h.at("12s")
			h.stream("ada").leave()
		}, []string{"0s ada:online", "10s ada:offline", "12s ada:online", "22s ada:offline"}},
		{"who returns just too late, as at a reload, is told at once", func(h *house) {
			h.stream("ada").leave()
			h.at("10.5s")
			ada := h.stream("ada")
			h.wantHere("ada:online")
			h.at("20s")
			ada.leave()
		}, []string{"0s ada:online", "10s ada:offline", "10.5s ada:online", "30s ada:offline"}},
		{"several streams are one user", func(h *house) {
			one, two := h.stream("ada"), h.stream("ada")
			h.at("1m")
			one.leave()
			h.at("2m")
			three := h.stream("ada")
			two.leave()
			h.at("3m")
			three.leave()
		}, []string{"0s ada:online", "3m10s ada:offline"}},
		{"who polls is here for a minute after", func(h *house) {
			h.poll("ada")
			h.at("59s")
			h.poll("ada")
			h.at("1m58.999s")
			h.wantHere("ada:online")
		}, []string{"0s ada:online", "1m59s ada:offline"}},
		{"the longer of poll and grace counts", func(h *house) {
			h.poll("ada")
			h.at("1s")
			h.stream("ada").leave()
			h.poll("bob")
			h.at("55s")
			h.stream("bob").leave()
		}, []string{"0s ada:online", "1s bob:online", "1m0s ada:offline", "1m5s bob:offline"}},
		{"long-polls with pauses between them tell nothing", func(h *house) {
			for range 10 {
				ada := h.stream("ada")
				time.Sleep(25 * time.Second)
				ada.leave()
				time.Sleep(9 * time.Second)
			}
		}, []string{"0s ada:online", "5m41s ada:offline"}},
		{"typing falls back after 5 s", func(h *house) {
			h.poll("ada")
			h.at("2s")
			h.says("ada", "typing")
			h.at("6.999s")
			h.wantHere("ada:typing")
			h.at("7s")
			h.wantHere("ada:online")
		}, []string{"0s ada:online", "2s ada:typing", "7s ada:online", "1m2s ada:offline"}},
		{"typing lasts while it goes on", func(h *house) {
			ada := h.stream("ada")
			for range 10 {
				time.Sleep(3 * time.Second)
				h.says("ada", "typing")
			}
			h.at("1m")
			ada.leave()
		}, []string{"0s ada:online", "3s ada:typing", "35s ada:online", "1m10s ada:offline"}},
		{"typing ends when its user says so", func(h *house) {
			ada := h.stream("ada")
			h.at("2s")
			h.says("ada", "typing")
			h.at("4s")
			h.says("ada", "online")
			h.at("1m")
			ada.leave()
		}, []string{"0s ada:online", "2s ada:typing", "4s ada:online", "1m10s ada:offline"}},
		{"typing may follow on coming at once", func(h *house) {
			ada := h.stream("ada")
			h.says("ada", "typing")
			h.at("1m")
			ada.leave()
		}, []string{"0s ada:online", "0s ada:typing", "5s ada:online", "1m10s ada:offline"}},
		{"away lasts, until something else is said", func(h *house) {
			ada := h.stream("ada")
			h.at("2s")
			h.says("ada", "away")
			h.at("1h")
			h.wantHere("ada:away")
			h.says("ada", "online")
			h.at("1h2s")
			h.says("ada", "away")
			h.at("1h4s")
			h.says("ada", "typing")
			h.at("2h")
			ada.leave()
		}, []string{"0s ada:online", "2s ada:away", "1h0m0s ada:online", "1h0m2s ada:away", "1h0m4s ada:typing", "1h0m9s ada:online", "2h0m10s ada:offline"}},
		{"away outlasts a reload, and not a stay", func(h *house) {
			ada := h.stream("ada")
			h.at("2s")
			h.says("ada", "away")
			ada.leave()
			h.at("5s")
			h.stream("ada").leave()
			h.at("20s")
			h.stream("ada").leave()
		}, []string{"0s ada:online", "2s ada:away", "15s ada:offline", "20s ada:online", "30s ada:offline"}},
		{"offline is at once", func(h *house) {
			ada := h.stream("ada")
			h.at("1m")
			h.says("ada", "offline")
			h.wantHere("")
			h.at("1m1s")
			ada.leave()
		}, []string{"0s ada:online", "1m0s ada:offline"}},
		{"offline is at once, in the middle of typing too", func(h *house) {
			ada := h.stream("ada")
			h.at("1m")
			h.says("ada", "typing")
			h.at("1m0.1s")
			h.says("ada", "offline")
			ada.leave()
		}, []string{"0s ada:online", "1m0s ada:typing", "1m0.1s ada:offline"}},
		{"offline is at once for who polls", func(h *house) {
			h.poll("ada")
			h.at("3s")
			h.says("ada", "offline")
		}, []string{"0s ada:online", "3s ada:offline"}},
		{"a tab that says offline leaves the other", func(h *house) {
			one, two := h.stream("ada"), h.stream("ada")
			h.at("1m")
			h.says("ada", "offline")
			one.leave()
			h.wantHere("ada:online")
			h.at("2m")
			two.leave()
		}, []string{"0s ada:online", "2m10s ada:offline"}},
		{"the last tab's offline is at once", func(h *house) {
			one, two := h.stream("ada"), h.stream("ada")
			h.at("1m")
			h.says("ada", "offline")
			one.leave()
			h.at("2m")
			h.says("ada", "offline")
			two.leave()
		}, []string{"0s ada:online", "2m0s ada:offline"}},
		{"a tab's offline that comes when the tab has gone is not the other's", func(h *house) {
			one, two := h.stream("ada"), h.stream("ada")
			h.at("1m")
			one.leave()
			h.says("ada", "offline")
			h.at("2m")
			h.wantHere("ada:online")
			h.says("ada", "offline")
			two.leave()
		}, []string{"0s ada:online", "2m0s ada:offline"}},
		{"offline from a tab while another polls is the poller's, who asks again", func(h *house) {
			ada := h.stream("ada")
			h.poll("ada")
			h.says("ada", "offline")
			h.at("2s")
			h.wantHere("ada:online")
			ada.leave()
		}, []string{"0s ada:online", "12s ada:offline"}},
		{"who said offline and polls is back, though their stream closes later", func(h *house) {
			ada := h.stream("ada")
			h.at("1m")
			h.says("ada", "offline")
			h.at("1m2s")
			h.poll("ada")
			ada.leave()
		}, []string{"0s ada:online", "1m0s ada:offline", "1m2s ada:online", "2m2s ada:offline"}},
		{"a reload that says offline is a moment's", func(h *house) {
			old := h.stream("ada")
			h.at("1m")
			h.says("ada", "offline")
			h.at("1m2s")
			ada := h.stream("ada")
			h.at("1m3s")
			old.leave()
			h.at("2m")
			ada.leave()
		}, []string{"0s ada:online", "1m0s ada:offline", "1m2s ada:online", "2m10s ada:offline"}},
		{"who said offline and comes again is back", func(h *house) {
			ada := h.stream("ada")
			h.at("1m")
			h.says("ada", "offline")
			ada.leave()
			h.at("2m")
			h.poll("ada")
			h.says("ada", "offline")
			h.at("3m")
			h.says("ada", "online")
			h.says("ada", "offline")
		}, []string{"0s ada:online", "1m0s ada:offline", "2m0s ada:online", "2m0s ada:offline", "3m0s ada:online", "3m0s ada:offline"}},
		{"a state without a stream is a visit of a minute", func(h *house) {
			h.says("ada", "online")
			h.says("bob", "away")
			h.says("cyd", "typing")
			h.wantHere("ada:online bob:away cyd:typing")
		}, []string{"0s ada:online", "0s bob:away", "0s cyd:typing", "5s cyd:online"}}, // and offline, in any order
		{"offline from who is not here says nothing", func(h *house) {
			h.says("ada", "offline")
			h.wantHere("")
		}, nil},
		{"two users", func(h *house) {
			ada := h.stream("ada")
			h.at("1s")
			bob := h.stream("bob")
			h.at("2s")
			ada.leave()
			h.at("3s")
			h.says("bob", "typing")
			h.at("1m")
			bob.leave()
		}, []string{"0s ada:online", "1s bob:online", "3s bob:typing", "8s bob:online", "12s ada:offline", "1m10s bob:offline"}},
	} {
		t.Run(tc.what, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h := newHouse(t, limits{})
				tc.do(h)
				time.Sleep(5 * time.Minute)
				synctest.Wait()
				if strings.HasPrefix(tc.what, "a state without") {
					last := h.told[len(h.told)-3:]
					slices.Sort(last)
					tc.want = append(tc.want, "1m0s ada:offline", "1m0s bob:offline", "1m0s cyd:offline")
				}
				h.wantTold(append([]string{"0s {}"}, tc.want...)...)
				h.wantGone()
			})
		})
	}
}

func TestAUserIsSeenInEachRoomOfTheirStream(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := testRelay(limits{})
		watcher := openReader(t, r, "a,b,c", -1, want{presence: true})
		watcher.expectRoster()
		wantRead(t, watcher, "{} {} {}")
		ada := openReader(t, r, "a,b", -1, want{user: "ada", presence: true, holds: true})
		wantRead(t, watcher, "ada:online ada:online")
		if a, c := r.whoIsIn("a").Count, r.whoIsIn("c").Count; a != 1 || c != 0 {
			t.Errorf("%d in a and %d in c, want 1 and 0", a, c)
		}
		r.declare("b", "ada", "", "offline")
		ada.leave()
		wantRead(t, watcher, "ada:offline")
		time.Sleep(10 * time.Second)
		synctest.Wait()
		wantRead(t, watcher, "ada:offline")
	})
}

// Who sees presence, and how: a stream by the roster and what follows, a poller
// by what was told since the cursor, and some not at all.
func TestWhoSeesPresence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHouse(t, limits{})
		mark := h.mark.Load() - h.relay.start
		h.stream("ada")
		publishText(t, h.relay, "a", "hi")

		blind := openReader(t, h.relay, "a", mark, want{holds: true})
		wantRead(t, blind, "2:a:hi")
		poller := openReader(t, h.relay, "a", mark, want{user: "pol", presence: true})
		wantRead(t, poller, "ada:online 2:a:hi pol:online")
		unseen := openReader(t, h.relay, "a", mark, want{presence: true, holds: true})
		unseen.expectRoster()
		wantRead(t, unseen, "2:a:hi {ada:online pol:online}")
		eve := openReader(t, h.relay, "a", mark, want{user: "eve", presence: true, holds: true})
		eve.expectRoster()
		wantRead(t, eve, "2:a:hi {ada:online eve:online pol:online}")

		h.says("ada", "away")
		wantRead(t, blind, "")
		wantRead(t, poller, "eve:online ada:away")
		wantRead(t, unseen, "eve:online ada:away")
		wantRead(t, eve, "ada:away")
		h.wantHere("ada:away eve:online pol:online")
	})
}

// With a backlog that takes several batches, the roster comes behind it, and
// presence that happened before is not told.
func TestTheRosterComesBehindTheBacklog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHouse(t, limits{})
		const n = batchEvents + 10
		for range n {
			publishText(t, h.relay, "a", "x")
		}
		h.stream("ada")
		rd := openReader(t, h.relay, "a", 0, want{presence: true, holds: true})
		rd.expectRoster()
		batch := rd.next(nil)
		h.stream("bob")
		rest := testWords(h.relay, readAll(rd))
		if len(batch) != batchEvents || !strings.HasSuffix(rest, fmt.Sprintf("%d:a:x {ada:online bob:online}", n)) || strings.Contains(rest, " ada:") {
			t.Errorf("behind %d events came %s", len(batch), rest)
		}
		h.stream("cyd")
		wantRead(t, rd, "cyd:online")
	})
}

// Who comes between a stream's last read and its roster is in the roster, and
// not told again; a message of that time is not lost.
func TestNoneIsTwiceBetweenRosterAndEvents(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHouse(t, limits{})
		rd := openReader(t, h.relay, "a", -1, wantPresence)
		rd.expectRoster()
		rd.next(nil)
		h.stream("ada")
		publishText(t, h.relay, "a", "hi")
		if opening := testWords(h.relay, rd.rosters(nil)); opening != "{ada:online}" {
			t.Errorf("the roster is %s", opening)
		}
		h.stream("bob")
		wantRead(t, rd, "2:a:hi bob:online")
	})
}

// Timers only announce what the clock has decided. Here they are stopped, as
// Cloud Run does with a whole machine.
func TestTheClockDecidesThoughTimersAreLate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHouse(t, limits{})
		h.poll("ada")
		bob := h.stream("bob")
		h.says("bob", "typing")
		h.relay.mu.Lock()
		for _, l := range h.rooms["a"].leases {
			l.timer.Stop()
		}
		h.relay.mu.Unlock()

		h.at("4.999s")
		h.wantHere("ada:online bob:typing")
		h.at("5s")
		h.wantHere("ada:online bob:online")
		h.at("59.999s")
		h.wantHere("ada:online bob:online")
		h.at("1m")
		h.wantHere("bob:online")
		rd := openReader(t, h.relay, "a", -1, want{presence: true})
		rd.expectRoster()
		wantRead(t, rd, "{bob:online}")
		h.wantTold("0s {}", "0s ada:online", "0s bob:online", "0s bob:typing")

		h.at("2m")
		h.relay.mu.Lock()
		h.rooms["a"].leases["ada"].timer.Reset(0)
		h.relay.mu.Unlock()
		h.wantTold("0s {}", "0s ada:online", "0s bob:online", "0s bob:typing", "2m0s ada:offline")
		bob.leave()
		rd.leave()
		h.wantGone()
	})
}

// A lease that is over by the clock is over, though no timer has said so: who
// comes then is online, whatever they were.
func TestAnOldStateDoesNotOutliveItsLease(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHouse(t, limits{})
		h.poll("ada")
		h.says("ada", "away")
		h.rooms["a"].leases["ada"].timer.Stop()
		h.at("2m")
		h.poll("ada")
		h.wantHere("ada:online")
		h.wantTold("0s {}", "0s ada:online", "0s ada:away", "2m0s ada:online")
		h.wantGone()
	})
}

// mostInASecond counts what the room was told in a second of the clock.
func (h *house) mostInASecond() (most int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	count := map[time.Duration]int{}
	for _, line := range h.told {
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
		// Leaving is told at once, so it is not held to that.
		{[]string{"typing", "offline"}, 2, "offline"},
		{[]string{"online", "typing", "offline"}, 3, "online"},
	} {
		t.Run(strings.Join(tc.states, " "), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h := newHouse(t, limits{})
				h.at("1s")
				for i := range 2000 {
					h.says("ada", tc.states[i%len(tc.states)])
					time.Sleep(10 * time.Millisecond)
				}
				synctest.Wait()
				if n, most := len(h.told), h.mostInASecond(); n > 2+20*tc.rate || most > tc.rate+1 {
					t.Errorf("20 s of flood were %d events, up to %d in a second", n, most)
				}
				h.at("25.99s")
				if last := h.told[len(h.told)-1]; !strings.HasSuffix(last, " ada:"+tc.last) {
					t.Errorf("the room was last told %s, want %s", last, tc.last)
				}
				h.wantGone()
			})
		})
	}
}

func TestACrowdIsOnlyCounted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHouse(t, limits{})
		var streams []*reader
		var want []string
		told := func(format string, args ...any) { want = append(want, fmt.Sprintf(format, args...)) }
		told("0s {}")
		for i := range 150 { // one every 10 ms
			if i < crowdAbove {
				told("%v u%03d:online", time.Since(h.start), i)
			}
			streams = append(streams, h.stream(fmt.Sprintf("u%03d", i)))
			time.Sleep(10 * time.Millisecond)
			synctest.Wait()
		}
		told("1s {101}")
		told("2s {150}")
		h.at("3s")
		h.wantTold(want...)

		// Nobody's typing is told, but who asks for everyone is told of it.
		h.says("u007", "typing")
		if ros := h.whoIsIn("a"); ros.Count != 150 || ros.Users["u007"] != "typing" {
			t.Errorf("%d are here, u007 is %s", ros.Count, ros.Users["u007"])
		}
		rd := openReader(t, h.relay, "a", -1, wantPresence)
		rd.expectRoster()
		wantRead(t, rd, "{150}")
		rd.leave()
		h.at("9s")
		h.wantTold(want...)

		// 49 leave, and it still is a crowd; then one more, and it is told who is left.
		for _, rd := range streams[:49] {
			rd.leave()
		}
		told("19s {149}")
		told("20s {101}")
		h.at("30s")
		h.wantTold(want...)
		streams[49].leave()
		var left []string
		for i := 50; i < 150; i++ {
			left = append(left, fmt.Sprintf("u%03d:online", i))
		}
		told("40s {%s}", strings.Join(left, " "))
		h.at("50s")
		h.wantTold(want...)
		rd = openReader(t, h.relay, "a", -1, wantPresence)
		rd.expectRoster()
		wantRead(t, rd, "{"+strings.Join(left, " ")+"}")
		rd.leave()

		// From there on, singly.
		streams[50].leave()
		h.says("u149", "away")
		told("50s u149:away")
		told("1m0s u050:offline")
		h.at("2m")
		h.wantTold(want...)
		for _, rd := range streams[51:] {
			rd.leave()
		}
		h.wantGone()
	})
}

var wantPresence = want{presence: true, holds: true}

// Everybody comes, and goes, and the room is told of it a few hundred times.
func TestTenThousandComeAndGo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const n = 10_000
		r := testRelay(limits{})
		var streams []*reader
		for i := range n { // over 20 s
			streams = append(streams, openReader(t, r, "a", -1, want{user: fmt.Sprint("user", i), presence: true, holds: true}))
			time.Sleep(2 * time.Millisecond)
		}
		time.Sleep(time.Second)
		synctest.Wait()
		if told := r.mark.Load() - r.start; told > crowdAbove+22 {
			t.Errorf("%d joins in 21 s were %d events", n, told)
		}
		if c := r.whoIsIn("a").Count; c != n {
			t.Errorf("%d of %d are here", c, n)
		}
		checkBooks(t, r)
		before := r.mark.Load()
		for _, rd := range streams {
			rd.leave()
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		if told := r.mark.Load() - before; told > 5 {
			t.Errorf("%d left at once, which was %d events", n, told)
		}
		r.sweep(time.Now().Add(time.Hour))
		if r.leases != 0 || len(r.rooms) != 0 || r.bytes != 0 {
			t.Errorf("%d leases, %d rooms and %d bytes are left", r.leases, len(r.rooms), r.bytes)
		}
	})
}

func TestTooManyUsers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := testRelay(limits{users: 1000})
		for i := range r.limits.users {
			if err := r.declare("a", fmt.Sprint("user", i), "", "online"); err != nil {
				t.Fatal(i, err)
			}
		}
		mark, rooms := r.mark.Load(), len(r.rooms)
		if err := r.declare("b", "one more", "", "online"); err != errTooManyUsers {
			t.Errorf("a user too many: %v", err)
		}
		if _, err := tryReader(r, want{rooms: []string{"a", "b"}, user: "one more", holds: true}); err != errTooManyUsers {
			t.Errorf("a reader too many: %v", err)
		}
		if len(r.rooms) != rooms || r.mark.Load() != mark || len(r.rooms["a"].readers) != 0 {
			t.Error("a refused user has changed something")
		}
		if err := r.declare("a", "user7", "", "away"); err != nil {
			t.Errorf("one who is here: %v", err)
		}
		openReader(t, r, "a", 0, want{presence: true}).leave() // who is not seen may read
		checkBooks(t, r)
		time.Sleep(time.Minute + time.Second)
		synctest.Wait()
		if err := r.declare("b", "one more", "", "online"); err != nil {
			t.Errorf("when the others are gone: %v", err)
		}
		if r.leases != 1 {
			t.Errorf("%d users are left, want 1", r.leases)
		}
	})
}

// A stream that could not read a presence event in time, for its room had many
// signals, is sent the roster.
func TestWhoMissedPresenceIsSentTheRoster(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHouse(t, limits{events: 2})
		rd := openReader(t, h.relay, "a", -1, wantPresence)
		rd.expectRoster()
		wantRead(t, rd, "{}")
		for _, user := range []string{"ada", "bob"} {
			h.stream(user)
		}
		wantRead(t, rd, "ada:online bob:online")
		for _, user := range []string{"cyd", "dan", "eve"} {
			h.stream(user)
		}
		wantRead(t, rd, "dan:online eve:online {ada:online bob:online cyd:online dan:online eve:online}")
		h.stream("flo")
		wantRead(t, rd, "flo:online")

		// Or for the room's history was forgotten.
		h.stream("gus")
		h.relay.mu.Lock()
		h.forget(h.rooms["a"])
		h.relay.mu.Unlock()
		wantRead(t, rd, "{ada:online bob:online cyd:online dan:online eve:online flo:online gus:online}")
	})
}

// The same when it read so late that the event had expired, as one does whose
// client takes a piece now and then.
func TestWhoReadsPresenceLateIsSentTheRoster(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHouse(t, limits{})
		rd := openReader(t, h.relay, "a", -1, wantPresence)
		rd.expectRoster()
		wantRead(t, rd, "{}")
		h.stream("ada")
		time.Sleep(presenceFor)
		wantRead(t, rd, "{ada:online}")

		h.stream("bob")
		time.Sleep(presenceFor)
		h.stream("cyd") // lets bob's event go
		wantRead(t, rd, "cyd:online {ada:online bob:online cyd:online}")
	})
}

// Who returned within a second of being told offline is told when the second
// is over; a stream that opens in between has them in its roster already.
func TestAJoinHeldBackIsNotToldTwice(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHouse(t, limits{})
		h.says("ada", "online")
		h.says("ada", "offline")
		h.stream("ada")
		rd := openReader(t, h.relay, "a", -1, wantPresence)
		rd.expectRoster()
		opening := testWords(h.relay, readAll(rd))
		h.at("2s")
		after := testWords(h.relay, readAll(rd))
		if strings.Count(opening+after, "ada:online") != 1 {
			t.Errorf("told %s and then %s", opening, after)
		}
	})
}

// A room may be forgotten while its crowd's next count is due. That is not the
// count of the room that then has its name.
func TestACountIsNotOfAForgottenRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := testRelay(limits{allBytes: 64 << 10, idle: time.Minute})
		var streams []*reader
		for i := range crowdAbove + 2 {
			streams = append(streams, openReader(t, r, "a", -1, want{user: fmt.Sprint("user", i), holds: true}))
		}
		for i, rd := range streams {
			r.declare("a", fmt.Sprint("user", i), "", "offline")
			rd.leave()
		}
		publishText(t, r, "b", strings.Repeat("x", 64<<10))
		if r.rooms["a"] != nil {
			t.Fatal("room a was not forgotten")
		}
		openReader(t, r, "a", -1, want{user: "ada", holds: true})
		rd := openReader(t, r, "a", -1, wantPresence)
		rd.expectRoster()
		wantRead(t, rd, "{ada:online}")
		time.Sleep(time.Minute)
		synctest.Wait()
		wantRead(t, rd, "")
	})
}

// A guest reads a room's presence as a page does: by the roster, and what
// follows.
type guest struct {
	*testing.T
	rd     *reader
	users  map[string]string
	count  int
	crowd  bool
	opened int64 // when it had its last roster, in milliseconds
	misses bool  // it may miss events, and so be told what it knows
}

func (g *guest) read() {
	g.Helper()
	for _, e := range readAll(g.rd) {
		var c struct {
			From string
			Time int64
			Data json.RawMessage
		}
		json.Unmarshal(e.json, &c)
		if c.From == "" {
			var ros roster
			json.Unmarshal(c.Data, &ros)
			g.users, g.count, g.crowd = ros.Users, ros.Count, ros.Users == nil
			g.opened = time.Now().UnixMilli()
			if c.Time != 0 {
				g.opened = c.Time
			}
			if !g.crowd && ros.Count != len(ros.Users) {
				g.Errorf("a roster of %d has %d names", ros.Count, len(ros.Users))
			}
			continue
		}
		if g.crowd {
			g.Errorf("in a crowd of %d it was told %s", g.count, e.json)
			continue
		}
		var state string
		json.Unmarshal(c.Data, &state)
		known, here := g.users[c.From]
		if !here {
			known = "offline"
		}
		// What is held back for its rate is in the roster before it is told.
		if !g.misses && known == state && c.Time-g.opened >= tellEvery.Milliseconds() {
			g.Errorf("%s was %s already", c.From, state)
		}
		if g.users[c.From] = state; state == "offline" {
			delete(g.users, c.From)
		}
		g.count = len(g.users)
	}
}

// Users come, go and change as they like, while guests open and read at their
// own pace. In the end each guest knows who is here, and none was told
// anything twice.
func TestRostersAndWhatFollowsAgree(t *testing.T) {
	for _, tc := range []struct {
		what         string
		users, guest int
		stay         int // users in the end
		limits       limits
	}{
		{"a few", 12, 12, 5, limits{}},
		{"nobody in the end", 12, 6, 0, limits{}},
		{"so many signals that some are missed", 30, 12, 15, limits{events: 4}},
		{"a room that is forgotten time and again", 12, 6, 5, limits{allBytes: 1500}},
		{"a crowd at times", 130, 12, 90, limits{}},
		{"a crowd in the end", 130, 12, 105, limits{}},
		{"a crowd, with signals missed", 130, 12, 99, limits{events: 4}},
	} {
		t.Run(tc.what, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := testRelay(tc.limits)
				var done atomic.Bool
				var acting, reading sync.WaitGroup
				pause := func(rnd *rand.Rand, most time.Duration) { time.Sleep(time.Duration(rnd.Int64N(int64(most)))) }

				for i := range tc.users {
					user := fmt.Sprint("user", i)
					acting.Go(func() {
						rnd := rand.New(rand.NewPCG(uint64(i), 4))
						var streams []*reader
						w := want{user: user, presence: true}
						for range 40 {
							pause(rnd, 4*time.Second)
							switch n := rnd.IntN(8); {
							case n < 2 && len(streams) < 3:
								w.holds = true
								streams = append(streams, openReader(t, r, "a", -1, w))
							case n < 5 && len(streams) > 0:
								streams[0].leave()
								streams = streams[1:]
							case n == 5:
								w.holds = false
								openReader(t, r, "a", -1, w).leave()
							default:
								r.declare("a", user, "", []string{"online", "typing", "away", "offline"}[rnd.IntN(4)])
							}
							if i == 0 {
								publishText(t, r, "b", strings.Repeat("x", 500))
							}
						}
						if i < tc.stay {
							w.holds = true
							openReader(t, r, "a", -1, w)
						}
						for _, rd := range streams {
							rd.leave()
						}
					})
				}
				guests := make([]*guest, tc.guest)
				for i := range guests {
					reading.Go(func() {
						rnd := rand.New(rand.NewPCG(uint64(i), 5))
						for !done.Load() {
							pause(rnd, 20*time.Second)
							g := &guest{T: t, rd: openReader(t, r, "a", -1, wantPresence), misses: tc.limits != limits{}}
							g.rd.expectRoster()
							for turns := 50 + rnd.IntN(200); turns > 0 && !done.Load(); turns-- {
								g.read()
								if i%2 == 0 { // the others come when it suits them
									g.rd.wait(t.Context(), time.After(time.Second))
								} else {
									pause(rnd, 2*time.Second)
								}
							}
							if old := guests[i]; old != nil {
								old.rd.leave()
							}
							guests[i] = g
						}
					})
				}
				acting.Wait()
				time.Sleep(2 * time.Minute) // leases end
				done.Store(true)
				reading.Wait()
				checkBooks(t, r)

				truth := r.whoIsIn("a")
				if truth.Count != tc.stay {
					t.Errorf("%d are here, want %d", truth.Count, tc.stay)
				}
				for i := range tc.stay {
					if truth.Users[fmt.Sprint("user", i)] == "" {
						t.Errorf("user%d stays, and is not here", i)
					}
				}
				for i, g := range guests {
					g.read()
					if g.count != truth.Count || g.crowd != (truth.Count > crowdAbove) {
						t.Errorf("guest %d counts %d, a crowd %v; there are %d", i, g.count, g.crowd, truth.Count)
					}
					if !g.crowd && fmt.Sprint(g.users) != fmt.Sprint(truth.Users) {
						t.Errorf("guest %d knows  %v\nhere are %v", i, g.users, truth.Users)
					}
				}
			})
		})
	}
}
