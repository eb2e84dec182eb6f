// Tests of the log: the ones to read first. Most speak of an event by its number: its
// id is the start of the relay in microseconds, plus that number. Where time matters
// it is virtual (testing/synctest): it stands still unless a test sleeps.

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"math"
	"math/rand/v2"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
	"unsafe"
	"weak"
)

// newTestRelay returns a relay whose bounds are out of reach, except those that l
// sets.
func newTestRelay(l limits) *relay {
	set := func(v *int, absent int) {
		if *v == 0 {
			*v = absent
		}
	}
	set(&l.maxEvents, 1<<20)
	set(&l.maxRoomBytes, 1<<30)
	set(&l.maxBytes, 1<<40)
	set(&l.maxRooms, 1000)
	set(&l.maxUsers, 20_000)
	if l.roomIdle == 0 {
		l.roomIdle = 10 * time.Minute
	}
	if l.presenceTTL == 0 {
		l.presenceTTL = time.Minute
	}
	return newRelay(l)
}

// publishText publishes a message, and returns its number.
func publishText(t testing.TB, r *relay, room, text string) int64 {
	t.Helper()
	return publishEvent(t, r, publishRequest{room: room, kind: "message", data: []byte(text)})
}

// publishEvent publishes p with its data as a JSON string.
func publishEvent(t testing.TB, r *relay, p publishRequest) int64 {
	t.Helper()
	p.data, _ = json.Marshal(string(p.data))
	id, _, err := r.publish(p)
	if err != nil {
		t.Fatal(err)
	}
	return id - r.epoch
}

// publishScript publishes messages written as summarize writes them: a:hi b:ho.
func publishScript(t *testing.T, r *relay, script string) {
	t.Helper()
	for word := range strings.FieldsSeq(script) {
		room, text, _ := strings.Cut(word, ":")
		publishText(t, r, room, text)
	}
}

// openSubscriber subscribes; after is the number of an event, or -1.
func openSubscriber(t testing.TB, r *relay, rooms string, after int64, req subscribeRequest) *subscriber {
	t.Helper()
	req.rooms, req.cursor = strings.Split(rooms, ","), after
	if after >= 0 {
		req.cursor += r.epoch
	}
	sub, err := trySubscriber(r, req)
	if err != nil {
		t.Fatal(err)
	}
	return sub
}

// trySubscriber subscribes with batches of 64 KiB, unless req says otherwise.
func trySubscriber(r *relay, req subscribeRequest) (*subscriber, error) {
	if req.maxBatchBytes == 0 {
		req.maxBatchBytes = 64 << 10
	}
	sub := new(subscriber)
	return sub, r.subscribe(sub, req)
}

// readAll reads like a stream, with the rosters that are due.
func readAll(sub *subscriber) (all []*event) {
	for {
		events := sub.next(nil)
		if sub.needsRoster && !sub.more {
			events = sub.appendRosters(events)
		}
		if len(events) == 0 {
			return all
		}
		all = append(all, events...)
	}
}

// summarize returns events in short form: 3:a:hi is the third event, "hi" in room a; a
// gap is 3:a:gap(history). Presence has no number: ada:online, a roster is {ada:online
// bob:away}, or {150} in a crowd.
func summarize(r *relay, events []*event) string {
	var words []string
	for _, e := range events {
		var c struct {
			ID               int64
			Room, Type, From string
			Data             json.RawMessage
		}
		if err := json.Unmarshal(e.json, &c); err != nil {
			panic(fmt.Sprintf("%s: %v", e.json, err))
		}
		if c.ID != e.id || c.Type != e.kind {
			panic(fmt.Sprintf("%s is not the event %d %s", e.json, e.id, e.kind))
		}
		var text string
		switch {
		case c.Type == "gap":
			var data struct{ Reason string }
			json.Unmarshal(c.Data, &data)
			text = fmt.Sprintf("%d:%s:gap(%s)", c.ID-r.epoch, c.Room, data.Reason)
		case c.Type == "presence" && c.From == "":
			var ros roster
			json.Unmarshal(c.Data, &ros)
			text = fmt.Sprintf("{%d}", ros.Count)
			if ros.Users != nil {
				text = "{" + summarizeUsers(ros.Users) + "}"
			}
		default:
			json.Unmarshal(c.Data, &text)
			if c.Type == "presence" {
				text = c.From + ":" + text
			} else {
				text = fmt.Sprintf("%d:%s:%s", c.ID-r.epoch, c.Room, text)
			}
		}
		words = append(words, text)
	}
	return strings.Join(words, " ")
}

// summarizeUsers returns a roster in short form: ada:online bob:away.
func summarizeUsers(users map[string]string) string {
	return strings.TrimSuffix(strings.TrimPrefix(fmt.Sprint(users), "map["), "]")
}

// wantRead checks what lies after a subscriber's cursor.
func wantRead(t *testing.T, sub *subscriber, want string) {
	t.Helper()
	if got := summarize(sub.relay, readAll(sub)); got != want {
		t.Errorf("read %q, want %q", got, want)
	}
	if head := sub.relay.lastID.Load(); sub.cursor != head {
		t.Errorf("the cursor is %d after everything was read, want %d", sub.cursor-sub.relay.epoch, head-sub.relay.epoch)
	}
}

// checkAccounting counts what the relay keeps, and compares that with the relay's own
// counters and bounds.
func checkAccounting(t *testing.T, r *relay) {
	t.Helper()
	r.mu.Lock()
	defer r.mu.Unlock()
	bytes, users, placed := 0, 0, 0
	for name, rm := range r.rooms {
		v := rm.history.Load()
		keys := map[string]int64{}
		sum := func(log []*event) (n int) {
			for i, e := range log {
				n += e.size()
				if e.key != "" {
					keys[e.key] = e.id
				}
				if i > 0 && log[i-1].id >= e.id || e.id > r.lastID.Load() || e.expiresAt == 0 && e.id <= v.messages.floor {
					t.Errorf("%s: event %d is out of order", name, e.id-r.epoch)
				}
			}
			return n
		}
		messages, signals := sum(v.messages.events), sum(v.signals.events)
		bytes += messages + signals
		if messages != v.messages.bytes || signals != v.signals.bytes {
			t.Errorf("%s has %d and %d bytes, and counted %d and %d", name, messages, signals, v.messages.bytes, v.signals.bytes)
		}
		if len(v.messages.events) > r.maxEvents || len(v.signals.events) > r.maxEvents {
			t.Errorf("%s has %d messages and %d signals, the bound is %d", name, len(v.messages.events), len(v.signals.events), r.maxEvents)
		}
		if messages > r.maxRoomBytes && len(v.messages.events) > 1 || signals > r.maxRoomBytes && len(v.signals.events) > 1 {
			t.Errorf("%s has %d and %d bytes, the bound is %d", name, messages, signals, r.maxRoomBytes)
		}
		if len(keys)+len(rm.keys) > 0 && !reflect.DeepEqual(keys, rm.keys) {
			t.Errorf("%s has the keys %v, and remembers %v", name, keys, rm.keys)
		}
		here := 0
		for _, l := range rm.leases {
			if l.counted {
				here++
			}
		}
		if here != rm.online {
			t.Errorf("%s has %d users present, and counted %d", name, here, rm.online)
		}
		users += len(rm.leases)
		if rm.lruElem != nil {
			placed++
		} else if len(v.messages.events)+len(v.signals.events) > 0 {
			t.Errorf("%s has a history and no place", name)
		} else if len(rm.subscriptions)+len(rm.leases) == 0 {
			t.Errorf("%s is kept without a history, subscriber or user", name)
		}
	}
	if bytes != r.bytes || users != r.leases || placed != r.lru.Len() {
		t.Errorf("%d bytes, %d users and %d rooms were counted, there are %d, %d and %d", r.bytes, r.leases, r.lru.Len(), bytes, users, placed)
	}
	if bytes > r.maxBytes && placed > 1 {
		t.Errorf("%d bytes are kept, the bound is %d", bytes, r.maxBytes)
	}
	if placed > r.limits.maxRooms || len(r.forgotten) > r.limits.maxRooms {
		t.Errorf("%d rooms and %d floors are kept, the bound is %d", placed, len(r.forgotten), r.limits.maxRooms)
	}
}

func TestIDsBeginAtTheStartInMicroseconds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		// The clock of a bubble starts with the year 2000.
		const start = 946684800_000000
		r := newTestRelay(limits{})
		for i := range 5 {
			id, fresh, err := r.publish(publishRequest{room: fmt.Sprint("room", i%2), kind: "message", data: []byte("1")})
			if want := int64(start + 1 + i); id != want || !fresh || err != nil {
				t.Errorf("event %d of all rooms: %d, %v, %v, want the id %d", i, id, fresh, err, want)
			}
		}
		time.Sleep(time.Millisecond)
		if again := newTestRelay(limits{}); again.epoch != start+1000 {
			t.Errorf("a restart 1 ms later begins at %d, want %d", again.epoch, start+1000)
		}
	})
}

func TestAnEventsJSON(t *testing.T) {
	for _, tc := range []struct {
		post publishRequest
		want string
	}{
		{publishRequest{room: "lobby", kind: "message", from: "ada", data: []byte(`"hi"`)},
			`{"id":946684800000001,"room":"lobby","type":"message","from":"ada","time":946684800123,"data":"hi"}`},
		{publishRequest{room: "a.b:c_d-e", kind: "x.y", data: []byte(`{"n":[1,null]}`)},
			`{"id":946684800000001,"room":"a.b:c_d-e","type":"x.y","time":946684800123,"data":{"n":[1,null]}}`},
		{publishRequest{room: "lobby", kind: "typing", from: "</script>\u2028\"\n", ttl: time.Second, data: []byte(`true`)},
			`{"id":946684800000001,"room":"lobby","type":"typing","from":"\u003c/script\u003e\u2028\"\n","time":946684800123,"data":true}`},
	} {
		synctest.Test(t, func(t *testing.T) {
			r := newTestRelay(limits{})
			sub := openSubscriber(t, r, tc.post.room, -1, subscribeRequest{})
			time.Sleep(123 * time.Millisecond)
			if _, _, err := r.publish(tc.post); err != nil {
				t.Fatal(err)
			}
			if got := string(sub.next(nil)[0].json); got != tc.want {
				t.Errorf("got  %s\nwant %s", got, tc.want)
			}
		})
	}
}

func TestReading(t *testing.T) {
	for _, tc := range []struct {
		rooms string
		after int64
		last  int
		want  string
	}{
		{"a", 0, 0, "1:a:one 3:a:three"},
		{"a", 1, 0, "3:a:three"},
		{"a", 2, 0, "3:a:three"},
		{"a", 3, 0, ""},
		{"a", 6, 0, ""},
		{"b", 0, 0, "2:b:two 5:b:five 6:b:six"},
		{"a,b", 0, 0, "1:a:one 2:b:two 3:a:three 5:b:five 6:b:six"},
		{"b,a", 2, 0, "3:a:three 5:b:five 6:b:six"},
		{"a,b,c", 3, 0, "4:c:four 5:b:five 6:b:six"},
		{"a,nobody", 0, 0, "1:a:one 3:a:three"},
		{"nobody", 0, 0, ""},
		{"a,b,c", -1, 0, ""},
		{"a,b,c", -1, 1, "6:b:six"},
		{"a,b,c", -1, 3, "4:c:four 5:b:five 6:b:six"},
		{"a,c", -1, 2, "3:a:three 4:c:four"},
		{"a,b,c", -1, 1000, "1:a:one 2:b:two 3:a:three 4:c:four 5:b:five 6:b:six"},
		{"nobody", -1, 10, ""},
		{"a", 4, 10, ""}, // with a cursor, last is ignored
	} {
		t.Run(fmt.Sprintf("%s after %d last %d", tc.rooms, tc.after, tc.last), func(t *testing.T) {
			r := newTestRelay(limits{})
			publishScript(t, r, "a:one b:two a:three c:four b:five b:six")
			sub := openSubscriber(t, r, tc.rooms, tc.after, subscribeRequest{last: tc.last})
			defer sub.unsubscribe()
			wantRead(t, sub, tc.want)
			first, _, _ := strings.Cut(tc.rooms, ",")
			publishScript(t, r, "z:seven "+first+":eight")
			wantRead(t, sub, "8:"+first+":eight")
		})
	}
}

func TestGaps(t *testing.T) {
	// Rooms keep two messages: a has 3 and 5, having lost 1; b has 2 and 4; c has
	// 8 and 9, having lost 6 and 7.
	const script = "a:x b:x a:x b:x a:x c:x c:x c:x c:x"
	for _, tc := range []struct {
		what, rooms string
		after       int64 // a number; absolute if negative
		want        string
	}{
		{"nothing lost", "a", 1, "3:a:x 5:a:x"},
		{"lost in the room", "a", 0, "1:a:gap(history) 3:a:x 5:a:x"},
		{"lost in another room", "b", 0, "2:b:x 4:b:x"},
		{"lost in one of two rooms", "b,a", 0, "1:a:gap(history) 2:b:x 3:a:x 4:b:x 5:a:x"},
		{"lost in two of three rooms", "c,b,a", 0, "1:a:gap(history) 2:b:x 3:a:x 4:b:x 5:a:x 7:c:gap(history) 8:c:x 9:c:x"},
		{"lost in one, before the cursor in the other", "a,c", 4, "5:a:x 7:c:gap(history) 8:c:x 9:c:x"},
		{"everything read", "a,b,c", 9, ""},
		{"beyond the head", "a", 10, "1:a:gap(future) 3:a:x 5:a:x"},
		{"beyond the head, in a room that lost nothing", "b", 10, "0:b:gap(future) 2:b:x 4:b:x"},
		{"beyond the head, two rooms", "a,c", 10, "1:a:gap(future) 3:a:x 5:a:x 7:c:gap(future) 8:c:x 9:c:x"},
		{"beyond the head, an empty room", "nobody", 10, "0:nobody:gap(future)"},
		{"the largest integer", "b", math.MaxInt64, "0:b:gap(future) 2:b:x 4:b:x"},
		{"before the start", "b", -2, "0:b:gap(restart) 2:b:x 4:b:x"},
		{"before the start, two rooms", "b,c", -2, "0:b:gap(restart) 2:b:x 4:b:x 7:c:gap(restart) 8:c:x 9:c:x"},
		{"zero", "a", math.MinInt64, "1:a:gap(restart) 3:a:x 5:a:x"},
	} {
		t.Run(tc.what, func(t *testing.T) {
			r := newTestRelay(limits{maxEvents: 2})
			publishScript(t, r, script)
			after := r.epoch + tc.after
			switch tc.after {
			case math.MaxInt64:
				after = math.MaxInt64
			case math.MinInt64:
				after = 0
			}
			sub, err := trySubscriber(r, subscribeRequest{rooms: strings.Split(tc.rooms, ","), cursor: after})
			if err != nil {
				t.Fatal(err)
			}
			wantRead(t, sub, tc.want)
			wantRead(t, sub, "") // a gap is sent once
			first, _, _ := strings.Cut(tc.rooms, ",")
			publishText(t, r, first, "x")
			sub.next(nil)
			publishText(t, r, first, "x")
			wantRead(t, sub, "11:"+first+":x")
		})
	}
}

// erase forgets a history. Subscribers are sent a gap, and go on.
func TestErase(t *testing.T) {
	r := newTestRelay(limits{})
	publishScript(t, r, "a:one b:two a:three")
	sub := openSubscriber(t, r, "a,b", 0, subscribeRequest{})
	wantRead(t, sub, "1:a:one 2:b:two 3:a:three")
	if err := r.erase("a"); err != nil {
		t.Fatal(err)
	}
	wantRead(t, sub, "4:a:gap(erased)")
	wantRead(t, sub, "")
	publishScript(t, r, "a:five")
	wantRead(t, sub, "5:a:five")
	wantRead(t, openSubscriber(t, r, "a", -1, subscribeRequest{last: 10}), "5:a:five")
	for after, read := range map[int64]string{0: "4:a:gap(erased) 5:a:five", 3: "4:a:gap(erased) 5:a:five", 4: "5:a:five"} {
		wantRead(t, openSubscriber(t, r, "a", after, subscribeRequest{}), read)
	}
	wantRead(t, openSubscriber(t, r, "b", 0, subscribeRequest{}), "2:b:two")

	// What is dropped later is an ordinary loss.
	for range r.maxEvents {
		publishScript(t, r, "a:x")
	}
	late := openSubscriber(t, r, "a", 0, subscribeRequest{})
	if got := summarize(r, late.next(nil)[:1]); got != "5:a:gap(history)" {
		t.Errorf("got %s", got)
	}
	checkAccounting(t, r)

	// Rooms without subscribers are erased too; erasing a room that does not exist
	// does nothing.
	publishScript(t, r, "c:secret")
	n := r.lastID.Load() - r.epoch
	if r.erase("c") != nil || r.erase("nobody") != nil || r.rooms["c"] != nil || r.rooms["nobody"] != nil {
		t.Error("erase created a room, or kept one")
	}
	wantRead(t, openSubscriber(t, r, "c", n-1, subscribeRequest{}), fmt.Sprintf("%d:c:gap(erased)", n+1))
	checkAccounting(t, r)
	r.stop()
	if err := r.erase("a"); err != errStopping {
		t.Errorf("while stopping: %v", err)
	}
}

func TestAGapIsSentWhileReading(t *testing.T) {
	r := newTestRelay(limits{maxEvents: 2})
	sub := openSubscriber(t, r, "a,b", -1, subscribeRequest{})
	publishScript(t, r, "a:x a:x a:x b:x")
	wantRead(t, sub, "1:a:gap(history) 2:a:x 3:a:x 4:b:x")
	publishScript(t, r, "a:x b:x")
	wantRead(t, sub, "5:a:x 6:b:x")
	publishScript(t, r, "b:x b:x b:x a:x")
	wantRead(t, sub, "7:b:gap(history) 8:b:x 9:b:x 10:a:x")
}

// Losses before its time are no gap for a subscriber without a cursor.
func TestASubscriberWithoutACursorIsSentNoGap(t *testing.T) {
	for _, last := range []int{0, 1, 3, 1000} {
		r := newTestRelay(limits{maxEvents: 2})
		publishScript(t, r, "b:x a:x a:x a:x a:x")
		sub := openSubscriber(t, r, "a,b", -1, subscribeRequest{last: last})
		if got := summarize(r, readAll(sub)); strings.Contains(got, "gap") {
			t.Errorf("last %d: %s", last, got)
		}
		publishScript(t, r, "a:x a:x a:x")
		wantRead(t, sub, "6:a:gap(history) 7:a:x 8:a:x")
	}
}

// A publisher may drop events below the head while a subscriber is between loading the
// head and loading the histories. The test sets the head back to stand for one that
// was loaded early.
func TestAGapBeyondTheHeadIsSentAtTheHead(t *testing.T) {
	r := newTestRelay(limits{maxEvents: 2})
	sub := openSubscriber(t, r, "a", 0, subscribeRequest{})
	publishScript(t, r, "a:x a:x a:x a:x a:x a:x")
	r.lastID.Store(r.epoch + 3)
	wantRead(t, sub, "3:a:gap(history)")
	r.lastID.Store(r.epoch + 6)
	wantRead(t, sub, "4:a:gap(history) 5:a:x 6:a:x")
}

// Such a gap has the id of the head, which is also the id of an event. The event comes
// first: a client that disconnects between the two goes on from that id, and must have
// the event.
func TestAnEventComesBeforeAGapOfItsID(t *testing.T) {
	for _, rooms := range []string{"a,b", "b,a"} {
		r := newTestRelay(limits{maxEvents: 2})
		sub := openSubscriber(t, r, rooms, 0, subscribeRequest{})
		publishScript(t, r, "b:x a:x b:x b:x b:x")
		r.lastID.Store(r.epoch + 2)
		wantRead(t, sub, "2:a:x 2:b:gap(history)")
	}
}

// A client that then reads other rooms never makes the read that would send the gap.
func TestAGapBeyondTheHeadIsSentToAClientThatChangesRooms(t *testing.T) {
	r := newTestRelay(limits{maxEvents: 2})
	sub := openSubscriber(t, r, "a", 0, subscribeRequest{})
	publishScript(t, r, "a:x a:x a:x a:x a:x a:x")
	r.lastID.Store(r.epoch + 3)
	got := summarize(r, readAll(sub))
	r.lastID.Store(r.epoch + 6)
	sub = openSubscriber(t, r, "b", sub.cursor-r.epoch, subscribeRequest{})
	got += summarize(r, readAll(sub))
	sub = openSubscriber(t, r, "a", sub.cursor-r.epoch, subscribeRequest{})
	got += summarize(r, readAll(sub))
	if !strings.Contains(got, "gap") {
		t.Errorf("events 1 to 3 were requested and lost, and the subscriber received %q", got)
	}
}

// The newest messages, which last asks for, may be dropped before they are read: a
// busy room can do that while hello is written.
func TestTheLossOfTheNewestMessageIsAGap(t *testing.T) {
	r := newTestRelay(limits{maxEvents: 3})
	publishScript(t, r, "a:x a:x a:x a:x")
	sub := openSubscriber(t, r, "a", -1, subscribeRequest{last: 3})
	publishScript(t, r, "a:x a:x")
	wantRead(t, sub, "3:a:gap(history) 4:a:x 5:a:x 6:a:x")
}

func TestABatchCutShortMovesTheCursorToItsEnd(t *testing.T) {
	r := newTestRelay(limits{})
	sub := openSubscriber(t, r, "a,b", 0, subscribeRequest{})
	const n = 2*maxBatchEvents + 10
	for i := range n {
		publishText(t, r, "ab"[i%2:][:1], "x")
	}
	for _, step := range []struct{ first, last int64 }{{1, 256}, {257, 512}, {513, n}} {
		batch := sub.next(nil)
		if first, last := batch[0].id-r.epoch, batch[len(batch)-1].id-r.epoch; first != step.first || last != step.last {
			t.Errorf("read %d to %d, want %d to %d", first, last, step.first, step.last)
		}
		if sub.cursor != r.epoch+step.last || sub.more != (step.last < n) {
			t.Errorf("after %d the cursor is %d, cut short %v", step.last, sub.cursor-r.epoch, sub.more)
		}
	}

	big := strings.Repeat("x", sub.maxBatchBytes/2)
	publishText(t, r, "a", big)
	publishText(t, r, "b", big)
	publishText(t, r, "a", "small")
	if batch := sub.next(nil); len(batch) != 2 || !sub.more || sub.cursor != r.epoch+n+2 {
		t.Errorf("two events of half a batch: read %d, cut short %v", len(batch), sub.more)
	}
	// A client that goes on from a short batch in another way gets the rest.
	wantRead(t, openSubscriber(t, r, "a,b", sub.cursor-r.epoch, subscribeRequest{}), fmt.Sprintf("%d:a:small", n+3))
}

func TestAFloorOutlivesItsRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newTestRelay(limits{roomIdle: time.Minute})
		publishScript(t, r, "a:x a:x b:x")
		time.Sleep(time.Minute - 1)
		r.sweep(time.Now())
		if len(r.rooms) != 2 {
			t.Errorf("there are %d rooms before their time is over", len(r.rooms))
		}
		publishText(t, r, "b", "x")
		time.Sleep(time.Nanosecond)
		r.sweep(time.Now())
		if r.rooms["a"] != nil || r.rooms["b"] == nil {
			t.Errorf("after a minute without a publish, a is %v, and b, which had one, is %v", r.rooms["a"], r.rooms["b"])
		}
		checkAccounting(t, r)

		for range 2 { // subscribing opens the room, and unsubscribing closes it again
			sub := openSubscriber(t, r, "a", 1, subscribeRequest{})
			wantRead(t, sub, "2:a:gap(history)")
			sub.unsubscribe()
			sub = openSubscriber(t, r, "a", 2, subscribeRequest{})
			wantRead(t, sub, "")
			sub.unsubscribe()
			if len(r.rooms) != 1 {
				t.Error("reading made a room")
			}
		}
		publishText(t, r, "a", "again")
		wantRead(t, openSubscriber(t, r, "a", 0, subscribeRequest{}), "2:a:gap(history) 5:a:again")
		wantRead(t, openSubscriber(t, r, "a", 2, subscribeRequest{}), "5:a:again")
	})
}

func TestARoomThatIsReadIsNotIdle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newTestRelay(limits{roomIdle: time.Minute})
		publishScript(t, r, "a:x b:x")
		sub := openSubscriber(t, r, "a", 0, subscribeRequest{})
		time.Sleep(time.Hour)
		r.sweep(time.Now())
		wantRead(t, sub, "1:a:x")
		sub.unsubscribe()
		time.Sleep(time.Minute - 1)
		r.sweep(time.Now())
		if len(r.rooms) != 1 {
			t.Errorf("there are %d rooms, want one, its reader left less than a minute ago", len(r.rooms))
		}
		time.Sleep(time.Nanosecond)
		r.sweep(time.Now())
		if len(r.rooms) != 0 || r.bytes != 0 {
			t.Errorf("%d rooms and %d bytes are kept without a reader", len(r.rooms), r.bytes)
		}
	})
}

// With too many floors, one stands for all. It may cause a gap too many, but hides
// none.
func TestFloorsBeyondTheirBoundHideNoGap(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newTestRelay(limits{maxRooms: 3, roomIdle: time.Minute})
		for i := range 20 {
			publishText(t, r, fmt.Sprint("room", i), "x")
			time.Sleep(time.Minute)
			r.sweep(time.Now())
			checkAccounting(t, r)
		}
		for i := range 20 {
			name := fmt.Sprint("room", i)
			sub := openSubscriber(t, r, name, int64(i), subscribeRequest{})
			if got := summarize(r, readAll(sub)); !strings.HasSuffix(got, name+":gap(history)") {
				t.Errorf("%s lost event %d, and its subscriber received %q", name, i+1, got)
			}
			sub.unsubscribe()
			sub = openSubscriber(t, r, name, 20, subscribeRequest{})
			wantRead(t, sub, "")
			sub.unsubscribe()
		}
	})
}

func TestReadingCreatesNoRoom(t *testing.T) {
	r := newTestRelay(limits{maxRooms: 1})
	var readers []*subscriber
	for i := range 100 {
		sub := openSubscriber(t, r, fmt.Sprintf("room%d,room%d", i, i+1), int64(i%2)-1, subscribeRequest{seesPresence: true})
		sub.wantRoster()
		readAll(sub)
		readers = append(readers, sub)
	}
	r.roster("room")
	if err := r.setPresence("room", "ada", "", "offline"); err != nil {
		t.Error(err)
	}
	publishText(t, r, "one", "readers' rooms do not count")
	checkAccounting(t, r)
	for _, sub := range readers {
		sub.unsubscribe()
	}
	if len(r.rooms) != 1 || len(r.forgotten) != 0 || r.lru.Len() != 1 {
		t.Errorf("%d rooms and %d floors are left of reading", len(r.rooms)-1, len(r.forgotten))
	}
}

func TestBounds(t *testing.T) {
	measure := newTestRelay(limits{})
	publishScript(t, measure, "a:x")
	size := measure.bytes
	for _, tc := range []struct {
		what   string
		limits limits
		script string
		rooms  string
		want   string
	}{
		{"messages of a room", limits{maxEvents: 3}, "a:x a:x a:x b:x a:x", "a,b", "1:a:gap(history) 2:a:x 3:a:x 4:b:x 5:a:x"},
		{"bytes of a room", limits{maxRoomBytes: 3 * size}, "a:x a:x a:x b:x a:x", "a,b", "1:a:gap(history) 2:a:x 3:a:x 4:b:x 5:a:x"},
		{"bytes of a room, one too few", limits{maxRoomBytes: 3*size - 1}, "a:x a:x a:x", "a", "1:a:gap(history) 2:a:x 3:a:x"},
		{"an event that alone is too much", limits{maxRoomBytes: 1, maxBytes: 1}, "a:x a:x", "a", "1:a:gap(history) 2:a:x"},
		{"bytes of all rooms, just enough", limits{maxBytes: 4 * size}, "a:x b:x b:x c:x", "a,b,c", "1:a:x 2:b:x 3:b:x 4:c:x"},
		{"bytes of all rooms", limits{maxBytes: 4*size - 1}, "a:x b:x b:x c:x", "a,b,c", "1:a:gap(history) 2:b:x 3:b:x 4:c:x"},
		{"the room idle longest loses first", limits{maxBytes: 4 * size}, "a:x b:x a:x c:x c:x", "a,b,c", "1:a:x 2:b:gap(history) 3:a:x 4:c:x 5:c:x"},
		{"and then the next", limits{maxBytes: 2 * size}, "a:x b:x a:x c:x c:x", "a,b,c", "2:b:gap(history) 3:a:gap(history) 4:c:x 5:c:x"},
	} {
		t.Run(tc.what, func(t *testing.T) {
			r := newTestRelay(tc.limits)
			reading := openSubscriber(t, r, tc.rooms, 0, subscribeRequest{})
			publishScript(t, r, tc.script)
			checkAccounting(t, r)
			wantRead(t, reading, tc.want)
			wantRead(t, openSubscriber(t, r, tc.rooms, 0, subscribeRequest{}), tc.want)
		})
	}
}

func TestTooManyRooms(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newTestRelay(limits{maxRooms: 2, roomIdle: time.Minute})
		publishScript(t, r, "a:x b:x")
		sub := openSubscriber(t, r, "c", 0, subscribeRequest{})
		before := fmt.Sprint(len(r.rooms), r.bytes, r.lastID.Load())
		for _, room := range []string{"c", "d"} {
			if id, fresh, err := r.publish(publishRequest{room: room, kind: "message", key: "k", data: []byte("1")}); err != errTooManyRooms || id != 0 || fresh {
				t.Errorf("the third room: %d, %v, %v", id, fresh, err)
			}
		}
		if after := fmt.Sprint(len(r.rooms), r.bytes, r.lastID.Load()); after != before {
			t.Errorf("a refused publish made %s of %s", after, before)
		}
		checkAccounting(t, r)
		publishScript(t, r, "a:x b:x") // existing rooms still accept messages
		wantRead(t, sub, "")

		time.Sleep(time.Minute)
		r.sweep(time.Now())
		publishScript(t, r, "c:x d:x")
		wantRead(t, sub, "5:c:x")
	})
}

// The counters are right after every step of a random history.
func TestAccountingMatchesWhatIsKept(t *testing.T) {
	for seed := range uint64(4) {
		synctest.Test(t, func(t *testing.T) {
			rnd := rand.New(rand.NewPCG(seed, 1))
			r := newTestRelay(limits{maxEvents: 1 + rnd.IntN(20), maxRoomBytes: 5000, maxBytes: 20_000, maxRooms: 8, roomIdle: time.Minute})
			name := func() string { return fmt.Sprint("room", rnd.IntN(12)) }
			var readers []*subscriber
			for range 1500 {
				switch rnd.IntN(10) {
				default:
					p := publishRequest{room: name(), kind: "message", data: []byte(`"` + strings.Repeat("x", rnd.IntN(1000)) + `"`)}
					if rnd.IntN(2) == 0 {
						p.key = fmt.Sprint("key", rnd.IntN(30))
					}
					if rnd.IntN(3) == 0 {
						p.ttl = time.Duration(rnd.Int64N(int64(time.Minute)))
					}
					if _, _, err := r.publish(p); err != nil && err != errTooManyRooms {
						t.Fatal(err)
					}
				case 0:
					req := subscribeRequest{rooms: []string{name()}, cursor: r.lastID.Load() - rnd.Int64N(50), seesPresence: true}
					if other := name(); other != req.rooms[0] {
						req.rooms = append(req.rooms, other)
					}
					if rnd.IntN(2) == 0 {
						req.user, req.longLived = fmt.Sprint("user", rnd.IntN(5)), rnd.IntN(2) == 0
					}
					sub, err := trySubscriber(r, req)
					if err != nil {
						t.Fatal(err)
					}
					readers = append(readers, sub)
				case 1:
					if len(readers) > 0 {
						i := rnd.IntN(len(readers))
						readAll(readers[i])
						readers[i].unsubscribe()
						readers = slices.Delete(readers, i, i+1)
					}
				case 2:
					r.setPresence(name(), fmt.Sprint("user", rnd.IntN(5)), "", []string{"online", "typing", "away", "offline"}[rnd.IntN(4)])
				case 3:
					time.Sleep(time.Duration(rnd.Int64N(int64(30 * time.Second))))
					synctest.Wait()
					r.sweep(time.Now())
				}
				checkAccounting(t, r)
			}
			for _, sub := range readers {
				sub.unsubscribe()
			}
			for range 2 {
				time.Sleep(time.Hour)
				synctest.Wait()
				r.sweep(time.Now())
			}
			checkAccounting(t, r)
			if r.bytes != 0 || len(r.rooms) != 0 || r.leases != 0 {
				t.Errorf("%d bytes, %d rooms and %d users are left", r.bytes, len(r.rooms), r.leases)
			}
		})
	}
}

func TestSignals(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newTestRelay(limits{maxEvents: 3})
		publishText(t, r, "a", "x")
		for range 100 {
			publishEvent(t, r, publishRequest{room: "a", kind: "typing", ttl: 5 * time.Second})
		}
		publishText(t, r, "a", "x")
		checkAccounting(t, r)
		const all = "1:a:x 99:a: 100:a: 101:a: 102:a:x"
		wantRead(t, openSubscriber(t, r, "a", 0, subscribeRequest{}), all)
		time.Sleep(5*time.Second - time.Millisecond)
		wantRead(t, openSubscriber(t, r, "a", 0, subscribeRequest{}), all)
		time.Sleep(time.Millisecond)
		wantRead(t, openSubscriber(t, r, "a", 0, subscribeRequest{}), "1:a:x 102:a:x")
		wantRead(t, openSubscriber(t, r, "a", -1, subscribeRequest{last: 5}), "1:a:x 102:a:x")

		// An expired signal is dropped when the next one comes.
		publishEvent(t, r, publishRequest{room: "a", kind: "typing", ttl: time.Second})
		if v := r.rooms["a"].history.Load(); len(v.signals.events) != 1 || len(v.messages.events) != 2 {
			t.Errorf("%d signals and %d messages are kept, want 1 and 2", len(v.signals.events), len(v.messages.events))
		}
		checkAccounting(t, r)
	})
}

// The clock may jump, or the machine pause, for longer than a signal's ttl while the
// signal is being published.
func TestASignalMayExpireAtOnce(t *testing.T) {
	r := newTestRelay(limits{})
	publishEvent(t, r, publishRequest{room: "a", kind: "typing", ttl: 1})
	publishEvent(t, r, publishRequest{room: "a", kind: "typing", ttl: 1})
	publishText(t, r, "a", "x")
	checkAccounting(t, r)
}

func TestKeys(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newTestRelay(limits{maxEvents: 2, roomIdle: time.Minute})
		put := func(room, key string, ttl time.Duration) string {
			t.Helper()
			id, fresh, err := r.publish(publishRequest{room: room, kind: "message", key: key, ttl: ttl, data: []byte("1")})
			if err != nil {
				t.Fatal(err)
			}
			checkAccounting(t, r)
			if fresh {
				return fmt.Sprint("new ", id-r.epoch)
			}
			return fmt.Sprint("old ", id-r.epoch)
		}
		for i, step := range []struct {
			room, key string
			ttl       time.Duration
			want      string
		}{
			{"a", "k", 0, "new 1"},
			{"a", "k", 0, "old 1"},
			{"b", "k", 0, "new 2"}, // another room, another key
			{"a", "", 0, "new 3"},
			{"a", "k", 0, "old 1"},
			{"a", "", 0, "new 4"}, // pushes k out of the history
			{"a", "k", 0, "new 5"},
			{"a", "k", 0, "old 5"},
			{"a", "s", time.Second, "new 6"},
			{"a", "s", time.Second, "old 6"},
			{"a", "s", 0, "old 6"},
		} {
			if got := put(step.room, step.key, step.ttl); got != step.want {
				t.Errorf("step %d: %s, want %s", i, got, step.want)
			}
		}
		if published := r.lastID.Load() - r.epoch; published != 6 {
			t.Errorf("%d events were published, want 6", published)
		}
		sub := openSubscriber(t, r, "a", -1, subscribeRequest{})
		put("a", "k", 0)
		if len(sub.wakeup) != 0 {
			t.Error("a retry woke a reader")
		}
		sub.unsubscribe()
		time.Sleep(time.Minute)
		r.sweep(time.Now())
		if got := put("a", "k", 0); got != "new 7" {
			t.Errorf("after the room was forgotten: %s, want new 7", got)
		}
	})
}

func TestOneKeyAtOnceIsOneEvent(t *testing.T) {
	r := newTestRelay(limits{})
	for round := range int64(100) {
		var fresh atomic.Int64
		var wg sync.WaitGroup
		begin := make(chan struct{})
		for range 16 {
			wg.Go(func() {
				<-begin
				id, isNew, err := r.publish(publishRequest{room: "a", kind: "message", key: fmt.Sprint("k", round), data: []byte("1")})
				if err != nil || id != r.epoch+round+1 {
					t.Errorf("round %d: the id is %d, %v", round, id-r.epoch, err)
				}
				if isNew {
					fresh.Add(1)
				}
			})
		}
		close(begin)
		wg.Wait()
		if fresh.Load() != 1 {
			t.Fatalf("%d of 16 publishes with one key were new", fresh.Load())
		}
	}
}

func TestWaiting(t *testing.T) {
	for _, tc := range []struct {
		what   string
		do     func(r *relay, sub *subscriber, cancel func())
		may    bool
		within time.Duration
	}{
		{"nothing happens", func(*relay, *subscriber, func()) {}, false, 25 * time.Second},
		{"an event", func(r *relay, _ *subscriber, _ func()) { publishText(t, r, "a", "x") }, true, time.Second},
		{"an event elsewhere", func(r *relay, _ *subscriber, _ func()) { publishText(t, r, "b", "x") }, false, 25 * time.Second},
		{"the client leaves", func(_ *relay, _ *subscriber, cancel func()) { cancel() }, false, time.Second},
		{"the relay stops", func(r *relay, _ *subscriber, _ func()) { r.stop(); r.stop() }, false, time.Second},
	} {
		t.Run(tc.what, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newTestRelay(limits{})
				sub := openSubscriber(t, r, "a", -1, subscribeRequest{})
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				start := time.Now()
				time.AfterFunc(time.Second, func() { tc.do(r, sub, cancel) })
				if may := sub.wait(ctx, time.After(25*time.Second)); may != tc.may || time.Since(start) != tc.within {
					t.Errorf("wait returned %v after %v, want %v after %v", may, time.Since(start), tc.may, tc.within)
				}
			})
		})
	}
}

// A burst causes one wake-up, and its subscriber reads the whole burst.
func TestWakesCoalesce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newTestRelay(limits{})
		sub := openSubscriber(t, r, "a,b", -1, subscribeRequest{})
		for range 1000 {
			publishScript(t, r, "a:x b:x")
		}
		if !sub.wait(t.Context(), nil) {
			t.Fatal("the reader was not woken")
		}
		if n := len(readAll(sub)); n != 2000 {
			t.Errorf("read %d events, want 2000", n)
		}
		if sub.wait(t.Context(), time.After(time.Hour)) {
			t.Error("the reader was woken again, for nothing")
		}
		sub.unsubscribe()
		publishText(t, r, "a", "x")
		if len(sub.wakeup) != 0 {
			t.Error("a subscriber that left was woken")
		}
	})
}

// A subscriber without a cursor is sent a gap for what it lost of one room, even if
// another room had lost more before it came.
func TestARoomsFloorForgivesNoOther(t *testing.T) {
	r := newTestRelay(limits{maxEvents: 4})
	publishScript(t, r, "a:1 a:2 a:3 a:4 b:5 b:6 b:7 b:8 b:9 b:10")
	sub := openSubscriber(t, r, "a,b", -1, subscribeRequest{last: 8})
	publishScript(t, r, "a:11 a:12 a:13 a:14")
	wantRead(t, sub, "4:a:gap(history) 7:b:7 8:b:8 9:b:9 10:b:10 11:a:11 12:a:12 13:a:13 14:a:14")
}

func TestAStreamWithADriverIsWokenByIt(t *testing.T) {
	r := newTestRelay(limits{})
	st := new(session)
	st.state.Store(stateWriting)
	r.wakeRoom = new(writerPool).wakeRoom
	sub := openSubscriber(t, r, "a", -1, subscribeRequest{driver: st})
	publishScript(t, r, "b:x a:x")
	if turn := st.state.Load(); turn != stateDirty || len(sub.wakeup) != 0 {
		t.Errorf("the session has the state %d, and %d tokens; want %d and none", turn, len(sub.wakeup), stateDirty)
	}
}

func TestStopping(t *testing.T) {
	r := newTestRelay(limits{})
	sub := openSubscriber(t, r, "a", -1, subscribeRequest{})
	var last atomic.Int64
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 1_000_000 {
				id, _, err := r.publish(publishRequest{room: "a", kind: "message", data: []byte("1")})
				if err == errStopping {
					return
				}
				for old := last.Load(); old < id && !last.CompareAndSwap(old, id); old = last.Load() {
				}
			}
		})
	}
	for read := 0; read < 1000; read += len(sub.next(nil)) {
		runtime.Gosched()
	}
	r.stop()
	stopped := r.lastID.Load()
	if err := r.setPresence("a", "ada", "", "online"); err != errStopping {
		t.Errorf("presence while stopping: %v", err)
	}
	readAll(sub)
	wg.Wait()
	if !r.isStopping() || sub.cursor != stopped || last.Load() != stopped || r.lastID.Load() != stopped {
		t.Errorf("stopped at %d; the last publish was %d, and read is up to %d", stopped, last.Load(), sub.cursor)
	}
}

// countAlive returns how many of the events are still in memory.
func countAlive(events []weak.Pointer[event]) (n int) {
	runtime.GC()
	for _, e := range events {
		if e.Value() != nil {
			n++
		}
	}
	return n
}

// weakMessages returns a room's messages without keeping them in memory.
func weakMessages(r *relay, room string) (events []weak.Pointer[event]) {
	for _, e := range r.rooms[room].history.Load().messages.events {
		events = append(events, weak.Make(e))
	}
	return events
}

func TestASlowSubscriberKeepsNothing(t *testing.T) {
	const n = 2 * maxBatchEvents
	for _, tc := range []struct {
		what string
		read func(*subscriber)
	}{
		{"that never read", func(*subscriber) {}},
		{"that read everything", func(sub *subscriber) { readAll(sub) }},
		{"that is stuck writing a batch cut short", func(sub *subscriber) {
			sub.next(nil)
			if !sub.more {
				t.Error("the batch was not cut short")
			}
		}},
	} {
		t.Run(tc.what, func(t *testing.T) {
			r := newTestRelay(limits{maxEvents: n})
			sub := openSubscriber(t, r, "a", 0, subscribeRequest{})
			for range n {
				publishText(t, r, "a", "x")
			}
			events := weakMessages(r, "a")
			tc.read(sub)
			for range 2 * n {
				publishText(t, r, "a", "x")
			}
			if kept := countAlive(events); kept > 0 {
				t.Errorf("a reader %s keeps %d events that the log dropped", tc.what, kept)
			}
			runtime.KeepAlive(r)
			runtime.KeepAlive(sub)
		})
	}
}

// What the log drops is soon collected, even if an array of the log still refers to
// it; a large event at once.
func TestTheLogKeepsLittleOfWhatItDropped(t *testing.T) {
	const n = 256
	for text, more := range map[string]int{"x": n + n/4 + 8, strings.Repeat("x", largeEvent): n} {
		r := newTestRelay(limits{maxEvents: n})
		for range n {
			publishText(t, r, "a", text)
		}
		events := weakMessages(r, "a")
		for range more {
			publishText(t, r, "a", text)
		}
		if kept := countAlive(events); kept > 0 {
			t.Errorf("%d of %d dropped events of %d bytes are kept", kept, n, len(text))
		}
		runtime.KeepAlive(r)
	}
}

// A short string may be part of a long one, the request it came in, and then keeps all
// of that in memory.
func TestNoRequestIsKept(t *testing.T) {
	for _, tc := range []struct {
		what string
		do   func(r *relay, s string)
	}{
		{"room", func(r *relay, s string) { publishText(t, r, s, "x") }},
		{"room read", func(r *relay, s string) { openSubscriber(t, r, s, -1, subscribeRequest{}).next(nil) }},
		{"type", func(r *relay, s string) { publishEvent(t, r, publishRequest{room: "a", kind: s}) }},
		{"from", func(r *relay, s string) { publishEvent(t, r, publishRequest{room: "a", kind: "message", from: s}) }},
		{"key", func(r *relay, s string) { publishEvent(t, r, publishRequest{room: "a", kind: "message", key: s}) }},
		{"user who polls", func(r *relay, s string) { openSubscriber(t, r, "a", -1, subscribeRequest{user: s}).unsubscribe() }},
		{"user who posts presence", func(r *relay, s string) { r.setPresence("a", s, "", "typing") }},
	} {
		t.Run(tc.what, func(t *testing.T) {
			r := newTestRelay(limits{})
			kept := func() weak.Pointer[byte] {
				request := strings.Repeat("x", 16<<10)
				tc.do(r, request[100:105])
				return weak.Make(unsafe.StringData(request))
			}()
			runtime.GC()
			if kept.Value() != nil {
				t.Errorf("a %s of 5 bytes keeps the 16 KB that it is part of", tc.what)
			}
			runtime.KeepAlive(r)
		})
	}
}

// A roomTrace is what one reader received of one room.
type roomTrace struct {
	from, to []int64 // it read the room from each of these cursors to the matching one
	got      []int64
	gaps     []int64
}

// Several publish, and several read while they change rooms and subscribers at random;
// all they take along is the cursor. Nothing is lost, nothing comes twice, everything
// is in order. Where the history is short, every loss is covered by a gap. A lost
// wake-up would be a deadlock, which the bubble reports.
func TestNothingIsLostNorTwiceNorOutOfOrder(t *testing.T) {
	for _, tc := range []struct {
		what   string
		limits limits
		lossy  bool
	}{
		{"the whole history", limits{}, false},
		{"16 messages a room", limits{maxEvents: 16}, true},
		{"64 messages in all", limits{maxBytes: 64 * 350}, true},
	} {
		t.Run(tc.what, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				const rooms, publishers, readers, each = 6, 6, 8, 1000
				r := newTestRelay(tc.limits)
				name := func(i int) string { return string(rune('a' + i)) }

				var mu sync.Mutex
				published := map[string][]int64{}
				publish := func(room string) {
					p := publishRequest{room: room, kind: "message", data: []byte(`"x"`)}
					if !tc.lossy && rand.IntN(3) == 0 {
						p.ttl = time.Hour
					}
					id, _, err := r.publish(p)
					if err != nil {
						t.Error(err)
					}
					mu.Lock()
					published[room] = append(published[room], id)
					mu.Unlock()
				}
				var end atomic.Int64 // after it, every room has one more event, to wake its readers

				read := func(seed uint64) map[string]*roomTrace {
					rnd := rand.New(rand.NewPCG(seed, 2))
					traces := map[string]*roomTrace{}
					cursor := r.epoch
					set := rnd.Perm(rooms)
					for n := 1 + rnd.IntN(2); ; n++ {
						// The gap comes with the next read of the room, so in tests
						// with losses rooms are only added.
						if !tc.lossy {
							n = 1 + rnd.IntN(rooms)
							set = rnd.Perm(rooms)
						}
						var names []string
						for _, i := range set[:min(n, rooms)] {
							names = append(names, name(i))
						}
						sub, err := trySubscriber(r, subscribeRequest{rooms: names, cursor: cursor, maxBatchBytes: 1 + rnd.IntN(4000)})
						if err != nil {
							t.Error(err)
							return nil
						}
						last := cursor
						for turn := rnd.IntN(20); turn >= 0; turn-- {
							batch := sub.next(nil)
							for _, e := range batch {
								if e.id < last || e.id == last && e.kind != "gap" { // a gap may have the id of the event before it
									t.Errorf("%d comes after %d", e.id-r.epoch, last-r.epoch)
								}
								last = e.id
								var c struct{ Room string }
								json.Unmarshal(e.json, &c)
								trace := traces[c.Room]
								if trace == nil {
									trace = &roomTrace{}
									traces[c.Room] = trace
								}
								if e.kind == "gap" {
									trace.gaps = append(trace.gaps, e.id)
								} else {
									trace.got = append(trace.got, e.id)
								}
							}
							if end := end.Load(); sub.more || turn == 0 || end > 0 && sub.cursor > end {
								continue
							}
							sub.wait(t.Context(), nil)
						}
						for _, room := range names {
							if traces[room] == nil {
								traces[room] = &roomTrace{}
							}
							traces[room].from = append(traces[room].from, cursor)
							traces[room].to = append(traces[room].to, sub.cursor)
						}
						cursor = sub.cursor
						sub.unsubscribe()
						if end := end.Load(); end > 0 && cursor > end && !sub.more {
							return traces
						}
					}
				}

				var publishing, reading sync.WaitGroup
				all := make([]map[string]*roomTrace, readers)
				for i := range readers {
					reading.Go(func() { all[i] = read(uint64(i)) })
				}
				for i := range publishers {
					publishing.Go(func() {
						rnd := rand.New(rand.NewPCG(uint64(i), 3))
						for range each {
							publish(name(rnd.IntN(rooms)))
							if rnd.IntN(8) == 0 {
								runtime.Gosched()
							}
						}
					})
				}
				publishing.Wait()
				end.Store(r.lastID.Load())
				for i := range rooms {
					publish(name(i))
				}
				reading.Wait()
				checkAccounting(t, r)

				gaps := 0
				for i, traces := range all {
					for room, trace := range traces {
						checkTrace(t, fmt.Sprintf("reader %d in room %s", i, room), published[room], trace, tc.lossy)
						gaps += len(trace.gaps)
					}
				}
				if gaps == 0 && tc.lossy {
					t.Log("nothing was lost this time")
				}
			})
		})
	}
}

// The head is never ahead of the log, nor the log of the head: a subscriber that reads
// all the time receives every event, one after the other.
func TestTheHeadAndTheLogChangeTogether(t *testing.T) {
	const n = 50_000
	r := newTestRelay(limits{})
	var reading sync.WaitGroup
	for range 2 {
		sub := openSubscriber(t, r, "a,b", 0, subscribeRequest{})
		reading.Go(func() {
			defer sub.unsubscribe()
			last := r.epoch
			for batch := []*event(nil); last < r.epoch+n; {
				batch = sub.next(batch[:0])
				for _, e := range batch {
					if e.id != last+1 {
						t.Errorf("%d comes after %d", e.id-r.epoch, last-r.epoch)
						return
					}
					last = e.id
				}
				if last != sub.cursor {
					t.Errorf("the cursor is %d behind %d", sub.cursor-r.epoch, last-r.epoch)
					return
				}
			}
		})
	}
	for i := range n {
		publishText(t, r, "ab"[i%2:][:1], "x")
	}
	reading.Wait()
}

// checkTrace compares what a reader received of a room with what was published there.
func checkTrace(t *testing.T, who string, published []int64, trace *roomTrace, lossy bool) {
	t.Helper()
	got := map[int64]bool{}
	for _, id := range trace.got {
		if got[id] {
			t.Errorf("%s read %d twice", who, id)
		}
		got[id] = true
	}
	covered := int64(0) // losses up to here are covered by a gap
	for _, id := range trace.gaps {
		if got[id] {
			t.Errorf("%s was sent a gap for %d, and has it", who, id)
		}
		covered = max(covered, id)
	}
	if !lossy && covered > 0 {
		t.Errorf("%s was sent a gap", who)
	}
	expected := 0
	for _, id := range published {
		asked := false
		for i := range trace.from {
			asked = asked || trace.from[i] < id && id <= trace.to[i]
		}
		if asked {
			expected++
		}
		if asked && !got[id] && id > covered {
			t.Errorf("%s lost %d", who, id)
		}
		if !asked && got[id] {
			t.Errorf("%s read %d, which it had not requested", who, id)
		}
	}
	if len(got) > expected {
		t.Errorf("%s read %d events of %d", who, len(got), expected)
	}
}

// A client that reads several rooms and disconnects between their gaps is sent the
// other gaps again.
func TestAllGapsOfOneIDAreSent(t *testing.T) {
	r := newTestRelay(limits{})
	for range 3 {
		publishText(t, r, "a", "lost")
		publishText(t, r, "b", "lost")
	}
	old, err := trySubscriber(r, subscribeRequest{rooms: []string{"a", "b", "c"}, cursor: 1})
	if err != nil {
		t.Fatal(err)
	}
	events := readAll(old)
	var rooms []string
	for i, e := range events {
		if e.kind != "gap" {
			continue
		}
		rooms = append(rooms, string(e.json))
		rest := 0
		back, err := trySubscriber(r, subscribeRequest{rooms: []string{"a", "b", "c"}, cursor: e.id})
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range readAll(back) {
			if e.kind == "gap" {
				rest++
			}
		}
		left := 0
		for _, e := range events[i+1:] {
			if e.kind == "gap" {
				left++
			}
		}
		if rest < left {
			t.Errorf("after the gap %d there are %d more, and a client that returns with it is sent %d: %s", e.id, left, rest, e.json)
		}
	}
	if len(rooms) != 3 {
		t.Errorf("%d gaps of three rooms: %s", len(rooms), rooms)
	}
}

// typical is a chat message.
var typicalMessage = publishRequest{room: "lobby", kind: "message", from: "ada", data: []byte(`"A comet's hair is long, and so is this connection."`)}

// benchRelay returns a relay with the default limits, and a room whose history is
// full.
func benchRelay(tb testing.TB) *relay {
	r := newRelay(limits{maxEvents: 256, maxRoomBytes: 1 << 20, maxBytes: 32 << 20, maxRooms: 10_000, maxUsers: 20_000, roomIdle: time.Hour, presenceTTL: time.Minute})
	for range 2 * r.maxEvents {
		publishTypicalMessage(tb, r)
	}
	return r
}

func publishTypicalMessage(tb testing.TB, r *relay) {
	if _, _, err := r.publish(typicalMessage); err != nil {
		tb.Fatal(err)
	}
}

// BenchmarkPublish measures a publish to a full room and the waking of its
// subscribers. It includes that each subscriber takes its wake-up token. It does not
// include reading or the scheduler: there are no goroutines.
func BenchmarkPublish(b *testing.B) {
	for _, n := range []int{0, 100, 10_000} {
		b.Run(fmt.Sprintf("readers=%d", n), func(b *testing.B) {
			r := benchRelay(b)
			readers := make([]*subscriber, n)
			for i := range readers {
				readers[i] = openSubscriber(b, r, "lobby", -1, subscribeRequest{})
			}
			b.ReportAllocs()
			for b.Loop() {
				publishTypicalMessage(b, r)
				for _, sub := range readers {
					<-sub.wakeup
				}
			}
		})
	}
}

// BenchmarkRead measures reading what lies after a cursor.
func BenchmarkRead(b *testing.B) {
	for _, rooms := range []string{"lobby", "lobby,garden,attic,cellar"} {
		for _, n := range []int{1, 100} {
			b.Run(fmt.Sprintf("rooms=%s/events=%d", rooms, n), func(b *testing.B) {
				r := benchRelay(b)
				sub := openSubscriber(b, r, rooms, -1, subscribeRequest{})
				batch := make([]*event, 0, maxBatchEvents)
				b.ReportAllocs()
				for b.Loop() {
					sub.cursor = r.lastID.Load() - int64(n)
					if got := sub.next(batch); len(got) != n {
						b.Fatalf("read %d events, want %d", len(got), n)
					}
				}
			})
		}
	}
}

// The median of many is the usual cost of a publish: now and then a log moves to a
// larger array, and the race detector empties the pool in encoding/json.
func TestPublishingAllocatesLittle(t *testing.T) {
	r := benchRelay(t)
	var counts []float64
	for range 101 {
		counts = append(counts, testing.AllocsPerRun(1, func() { publishTypicalMessage(t, r) }))
	}
	slices.Sort(counts)
	if n := counts[50]; n > 5 {
		t.Errorf("a publish to a room without readers is %v allocations, want at most 5", n)
	}
}
