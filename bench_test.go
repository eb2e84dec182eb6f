// What publishing, reading and framing cost; and two of their costs that must
// not grow.

package main

import (
	"fmt"
	"net/url"
	"slices"
	"testing"
	"time"
)

// typical is a chat message.
var typical = publishRequest{room: "lobby", kind: "message", from: "ada", data: []byte(`"A comet's hair is long, and so is this connection."`)}

// benchRelay has the default limits, and a room whose history is full.
func benchRelay(tb testing.TB) *relay {
	r := newRelay(limits{maxEvents: 256, maxRoomBytes: 1 << 20, maxBytes: 32 << 20, maxRooms: 10_000, maxUsers: 20_000, roomIdle: time.Hour, presenceTTL: time.Minute})
	for range 2 * r.maxEvents {
		publishTypical(tb, r)
	}
	return r
}

func publishTypical(tb testing.TB, r *relay) {
	if _, _, err := r.publish(typical); err != nil {
		tb.Fatal(err)
	}
}

// BenchmarkPublish measures a publish to a full room and the waking of its
// readers. Each reader has taken its last token; that it takes this one too is
// part of what is measured. Neither reading nor the scheduler is: there are no
// goroutines.
func BenchmarkPublish(b *testing.B) {
	for _, n := range []int{0, 100, 10_000} {
		b.Run(fmt.Sprintf("readers=%d", n), func(b *testing.B) {
			r := benchRelay(b)
			readers := make([]*subscriber, n)
			for i := range readers {
				readers[i] = openReader(b, r, "lobby", -1, subscribeRequest{})
			}
			b.ReportAllocs()
			for b.Loop() {
				publishTypical(b, r)
				for _, rd := range readers {
					<-rd.wakeup
				}
			}
		})
	}
}

// BenchmarkRead measures a reader taking what lies behind its cursor.
func BenchmarkRead(b *testing.B) {
	for _, rooms := range []string{"lobby", "lobby,hall,attic,cellar"} {
		for _, n := range []int{1, 100} {
			b.Run(fmt.Sprintf("rooms=%s/events=%d", rooms, n), func(b *testing.B) {
				r := benchRelay(b)
				rd := openReader(b, r, rooms, -1, subscribeRequest{})
				batch := make([]*event, 0, maxBatchEvents)
				b.ReportAllocs()
				for b.Loop() {
					rd.cursor = r.lastID.Load() - int64(n)
					if got := rd.next(batch); len(got) != n {
						b.Fatalf("read %d events, want %d", len(got), n)
					}
				}
			})
		}
	}
}

// benchFraming is a technique's framing for a usual query.
func benchFraming(tb testing.TB, t *technique) encoder {
	q := &request{rooms: []string{"lobby"}, user: "ada", permit: newPermit(), values: url.Values{"callback": {"comet.told"}}}
	defer func() {
		if q.err != nil {
			tb.Fatal(q.err)
		}
	}()
	return t.encoder(newServer(newRelay(defaultLimits)), q)
}

// BenchmarkFrame measures the framing of one event into a buffer that has room.
func BenchmarkFrame(b *testing.B) {
	r := benchRelay(b)
	events := openReader(b, r, "lobby", r.lastID.Load()-r.epoch-1, subscribeRequest{}).next(nil)
	for _, t := range newTechniques() {
		b.Run(t.name, func(b *testing.B) {
			f := benchFraming(b, t)
			buf := make([]byte, 0, 64<<10)
			b.ReportAllocs()
			for b.Loop() {
				if len(f.encode(buf, 1, events...)) == 0 {
					b.Fatal("nothing was framed")
				}
			}
		})
	}
}

// The middle of many is what a publish usually costs: now and then a log moves
// to a larger array, and the race detector empties the pool in encoding/json.
func TestPublishingAllocatesLittle(t *testing.T) {
	r := benchRelay(t)
	var counts []float64
	for range 101 {
		counts = append(counts, testing.AllocsPerRun(1, func() { publishTypical(t, r) }))
	}
	slices.Sort(counts)
	if n := counts[50]; n > 5 {
		t.Errorf("a publish to a room without readers is %v allocations, want at most 5", n)
	}
}

func TestFramingAllocatesNothing(t *testing.T) {
	r := benchRelay(t)
	publishPost(t, r, publishRequest{room: "lobby", kind: "typing", from: "ada", ttl: time.Minute})
	events := openReader(t, r, "lobby", r.lastID.Load()-r.epoch-2, subscribeRequest{}).next(nil)
	if len(events) != 2 {
		t.Fatalf("read %d events, want a message and a signal", len(events))
	}
	buf := make([]byte, 0, 64<<10)
	for _, technique := range newTechniques() {
		if technique.mode != streaming {
			continue
		}
		f := benchFraming(t, technique)
		for _, due := range [][]*event{events[:1], events[1:], events} {
			if n := testing.AllocsPerRun(100, func() { f.encode(buf, 1, due...) }); n > 0 {
				t.Errorf("framing %d events as %s is %v allocations, want none", len(due), technique.name, n)
			}
		}
	}
}
