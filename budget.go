// Budgets. A budget bounds what is in memory for a while, and its bounds come from the
// memory that there is. While a budget is used up, slow clients give way: thousands
// that stand still cannot keep out those that do not.
//
// This file knows nothing of HTTP. limits.go has a budget for bytes, connections.go one
// for the connections that net/http serves.

package main

import (
	"cmp"
	"io/fs"
	"math"
	"path"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// defaultMemory is how much memory the relay takes itself to have where nothing limits it.
const defaultMemory = 256 << 20

// The bounds for a container of 256 MiB. All at once they leave some 40 MiB to the kernel,
// and to garbage. In a larger container they are in proportion. In a smaller one streams
// come first, since to hold many is what the relay is for: 10,000 down to 128 MiB. What
// they leave is shared by the others, but for connections that are served: fewer would
// keep newcomers waiting while a crowd stands still.
//
//	streams          10,000 of 7 KB (long-polls) or less   68 MiB
//	the log          1/8 of the memory                     32
//	receipts         1/8: bodies, messages, poll answers   32
//	unsent           1/16: what streams have not taken     16
//	served           1,024 connections, of 30 KB           30
//	waiting, ending  1,100 connections of 3 KB, and as
//	                 many as are served, of 12 KB          15
//	rooms and users  10,000 and 20,000, of 0.5 KB          15
//	the process                                            10
type bounds struct {
	streams  int   // streams and waiting long-polls
	logBytes int   // see limits.maxBytes
	unsent   int64 // see limiter.maxUnsent
	receipts int64 // see limiter.receipts
	served   int64 // see limiter.served
}

func boundsFor(memory int64) bounds {
	memory = max(memory, 32<<20) // less would not do for the process itself
	mib := memory >> 20
	streams := max(min(mib*10_000/128, 10_000), mib*10_000/256)
	share := min(memory, max((memory-streams*7000-34<<20)*7/4, 16<<20))
	return bounds{
		streams:  int(streams),
		logBytes: int(share / 8),
		unsent:   share / 16,
		receipts: share / 8,
		served:   mib * 4,
	}
}

// availableMemory returns how much memory the container has, and what says so: its memory
// cgroup (v2 or v1), or a group around it, or GOMEMLIMIT if that is less. Without a limit
// it returns defaultMemory.
func availableMemory(root fs.FS) (memory int64, source string) {
	memory, source = math.MaxInt64, "default"
	found := func(n int64, from string) {
		if n > 0 && n < memory && n < 1<<50 { // v1 has a huge number for none
			memory, source = n, from
		}
	}
	groups, _ := fs.ReadFile(root, "proc/self/cgroup")
	for line := range strings.Lines(string(groups)) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3) // cgroups(7): number, controllers, path
		if len(f) < 3 {
			continue
		}
		base, file := "sys/fs/cgroup", "memory.max"
		if f[1] != "" {
			base, file = "sys/fs/cgroup/memory", "memory.limit_in_bytes"
			if !slices.Contains(strings.Split(f[1], ","), "memory") {
				continue
			}
		}
		for dir := path.Clean("/" + f[2]); ; dir = path.Dir(dir) { // a container may see its own group as the root
			b, _ := fs.ReadFile(root, path.Join(base, dir, file))
			n, _ := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64) // without a file, or of "max", it is 0
			found(n, "cgroup")
			if dir == "/" {
				break
			}
		}
	}
	found(debug.SetMemoryLimit(-1), "GOMEMLIMIT")
	if source == "default" {
		memory = defaultMemory
	}
	return memory, source
}

const (
	// How long a client may stand still while a budget is used up, beside the time that
	// its bytes take at slowRate: short enough for ten thousand that stand still to make
	// way, a thousand at a time, for one that waits, within seconds.
	stillTime = 300 * time.Millisecond

	slowRate = 64 << 10 // bytes a second: a client's, in either direction

	// A quarter of a budget is for those who have so much at most, in bytes: who sends a
	// little is not kept out by those who send a lot.
	smallPart = 32 << 10

	// How often those who wait look for others that stand still.
	cutEvery = 25 * time.Millisecond
)

// allowance is how long a client may take for so many bytes, in nanoseconds.
func allowance(bytes int64) int64 {
	return int64(stillTime) + bytes*int64(time.Second)/slowRate
}

// dueAt is when a client's time is up that has sent so many bytes since it began: when
// it has not sent another for stillTime, or fell behind slowRate by as much.
func dueAt(began, received int64) int64 {
	return min(time.Now().UnixNano()+int64(stillTime), began+allowance(received))
}

// A budget bounds what is taken from it. Who takes something has an allotment. When it does
// not suffice, those whose time is up are cut off, the one that is most late first, and
// what they had is taken from them at once.
type budget struct {
	max int64

	mu         sync.Mutex // guards what follows
	used       int64
	allotments map[*allotment]struct{} // that have something
	waiting    []*allotment
	cutAt      int64 // when all that were late had been cut off, Unix nanoseconds
}

func newBudget(max int64) *budget { return &budget{max: max, allotments: map[*allotment]struct{}{}} }

// An allotment is what one client has of a budget.
type allotment struct {
	budget *budget
	cut    func()       // ends the client; called once
	due    atomic.Int64 // when its time is up, Unix nanoseconds; 0: it does not stand still

	// Guarded by budget.mu.
	size  int64
	ended bool          // it was cut off, or has left
	ready chan struct{} // closed when it waited, and has its part
}

// open returns an allotment without anything.
func (b *budget) open(cut func()) *allotment { return &allotment{budget: b, cut: cut} }

// setDue says when the client's time is up; 0: it does not stand still.
func (a *allotment) setDue(at int64) {
	if a != nil {
		a.due.Store(at)
	}
}

// inUse is how much is taken.
func (b *budget) inUse() int64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.used
}

// grow takes n for what is to come, and gives its client the time that so many bytes
// take; or it returns errTooMuch, and takes nothing.
func (a *allotment) grow(n int64) error {
	b, now := a.budget, time.Now().UnixNano()
	b.mu.Lock()
	defer b.mu.Unlock()
	bound := b.max
	if a.size+n > smallPart {
		bound -= b.max / 4
	}
	if over := b.used + n - bound; over > 0 && !a.ended {
		b.cutLate(now, over)
	}
	if a.ended || b.used+n > bound {
		return errTooMuch
	}
	a.due.Store(now + allowance(a.size+n))
	b.add(a, n)
	return nil
}

// wait takes 1, and waits until it can.
func (a *allotment) wait() {
	b := a.budget
	b.mu.Lock()
	a.ready = make(chan struct{})
	b.waiting = append(b.waiting, a)
	if b.admit(); len(b.waiting) == 1 {
		b.tick()
	}
	b.mu.Unlock()
	<-a.ready
	a.ready = nil // the allotment is kept as long as the connection
}

// take takes n, beyond the bound if it must, unless the allotment has ended; give gives all
// back, and free does that for good.
func (a *allotment) take(n int64) {
	a.budget.mu.Lock()
	defer a.budget.mu.Unlock()
	if !a.ended {
		a.budget.add(a, n)
	}
}

func (a *allotment) give() {
	a.budget.mu.Lock()
	defer a.budget.mu.Unlock()
	a.budget.drop(a)
	a.budget.admit()
}

func (a *allotment) free() {
	if a == nil {
		return
	}
	a.budget.mu.Lock()
	defer a.budget.mu.Unlock()
	a.ended = true
	a.budget.drop(a)
	a.budget.admit()
}

// The caller of what follows holds b.mu.

func (b *budget) add(a *allotment, n int64) {
	a.size += n
	b.used += n
	b.allotments[a] = struct{}{}
}

func (b *budget) drop(a *allotment) {
	b.used -= a.size
	a.size = 0
	delete(b.allotments, a)
}

// admit lets in those who wait, in their order.
func (b *budget) admit() {
	for len(b.waiting) > 0 && b.used < b.max {
		a := b.waiting[0]
		b.waiting[0] = nil
		b.waiting = b.waiting[1:]
		b.add(a, 1)
		close(a.ready)
	}
}

// cutLate cuts off those whose time is up, until so much is free. In a flood it does not
// look each time.
func (b *budget) cutLate(now, want int64) {
	if now-b.cutAt < int64(cutEvery) {
		return
	}
	var late []*allotment
	for a := range b.allotments {
		if due := a.due.Load(); due != 0 && due < now {
			late = append(late, a)
		}
	}
	slices.SortFunc(late, func(a, o *allotment) int { return cmp.Compare(a.due.Load(), o.due.Load()) })
	for _, a := range late {
		if want <= 0 {
			return
		}
		want -= a.size
		a.ended = true
		b.drop(a)
		go a.cut()
	}
	if want > 0 {
		b.cutAt = now
	}
}

// tick makes way for those who wait, as long as there are any.
func (b *budget) tick() {
	time.AfterFunc(cutEvery, func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.cutLate(time.Now().UnixNano(), int64(len(b.waiting)))
		b.admit()
		if len(b.waiting) > 0 {
			b.tick()
		}
	})
}
