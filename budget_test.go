package main

import (
	"runtime/debug"
	"testing"
	"testing/fstest"
	"testing/synctest"
	"time"
)

func TestDefaultsComeFromTheMemoryThereIs(t *testing.T) {
	for _, tc := range []struct {
		memory            int64
		args              []string
		streams, logBytes int
	}{
		{128 << 20, nil, 10_000, 6_248_844},
		{256 << 20, nil, 10_000, 32 << 20},
		{1 << 30, nil, 40_000, 128 << 20},
		{1 << 49, nil, 20_971_520_000, 1 << 46},
		{1 << 20, nil, 2_500, 2 << 20},
		{128 << 20, []string{"-streams", "7", "-all-bytes", "2000000"}, 7, 2_000_000},
	} {
		c, err := parseFlags(tc.args, testEnv(), tc.memory)
		if err != nil || c.streams != tc.streams || c.maxBytes != tc.logBytes {
			t.Errorf("with %d MiB and %q there are %d streams and %d bytes of messages, want %d and %d; %v", tc.memory>>20, tc.args, c.streams, c.maxBytes, tc.streams, tc.logBytes, err)
		}
	}
}

// The bounds' sum is documented at their type.
func TestAllThatIsHeldAtTheLimitsFits(t *testing.T) {
	for _, memory := range []int64{96 << 20, 128 << 20, 192 << 20, 256 << 20, 1 << 30} {
		b := boundsFor(memory)
		sum := int64(b.streams)*7_000 + int64(b.logBytes) + b.unsent + b.receipts + b.served*(30_000+3_000+12_000) + 10<<20
		if sum > memory*9/10 {
			t.Errorf("of %d MiB the bounds allow %d", memory>>20, sum>>20)
		}
	}
}

func TestTheMemoryOfTheContainerIsFound(t *testing.T) {
	const none = "9223372036854771712\n"
	for _, tc := range []struct {
		name   string
		files  map[string]string
		memory int64
		source string
	}{
		{"nothing", nil, 256 << 20, "default"},
		{"v2, its own namespace", map[string]string{"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "134217728\n"}, 128 << 20, "cgroup"},
		{"v2, no limit", map[string]string{"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n"}, 256 << 20, "default"},
		{"v2, nested", map[string]string{"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/memory.max": "536870912\n"}, 512 << 20, "cgroup"},
		{"v2, a group around it has less", map[string]string{"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/memory.max": "max\n", "sys/fs/cgroup/a/memory.max": "134217728\n"}, 128 << 20, "cgroup"},
		{"v1", map[string]string{"proc/self/cgroup": "9:cpu:/x\n4:memory:/a\n0::/\n", "sys/fs/cgroup/memory/a/memory.limit_in_bytes": "1073741824\n"}, 1 << 30, "cgroup"},
		{"v1, mounted as the root", map[string]string{"proc/self/cgroup": "4:memory,hugetlb:/docker/0123\n", "sys/fs/cgroup/memory/memory.limit_in_bytes": "134217728\n"}, 128 << 20, "cgroup"},
		{"v1, no limit", map[string]string{"proc/self/cgroup": "4:memory:/\n", "sys/fs/cgroup/memory/memory.limit_in_bytes": none}, 256 << 20, "default"},
	} {
		root := fstest.MapFS{}
		for name, text := range tc.files {
			root[name] = &fstest.MapFile{Data: []byte(text)}
		}
		if memory, source := availableMemory(root); memory != tc.memory || source != tc.source {
			t.Errorf("%s: %d from %s, want %d from %s", tc.name, memory, source, tc.memory, tc.source)
		}
	}
	defer debug.SetMemoryLimit(debug.SetMemoryLimit(100 << 20))
	if memory, source := availableMemory(fstest.MapFS{}); memory != 100<<20 || source != "GOMEMLIMIT" {
		t.Errorf("with GOMEMLIMIT: %d from %s", memory, source)
	}
}

func TestABudgetGivesNoMoreThanItHas(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBudget(100_000)
		cut := map[string]int{}
		open := func(name string) *allotment { return b.open(func() { cut[name]++ }) }
		check := func(what string, err, want error, used int64) {
			t.Helper()
			if synctest.Wait(); err != want || b.inUse() != used {
				t.Errorf("%s: %v and %d in use, want %v and %d", what, err, b.inUse(), want, used)
			}
		}
		first, second, small := open("first"), open("second"), open("small")
		check("a part", first.grow(60_000), nil, 60_000)
		check("one too many", first.grow(20_000), errTooMuch, 60_000)
		check("what is left for the big", first.grow(15_000), nil, 75_000)
		check("one that is big", second.grow(smallPart+1), errTooMuch, 75_000)
		check("one that is small", small.grow(25_000), nil, 100_000)
		check("nothing left", second.grow(1), errTooMuch, 100_000)
		small.free()
		small.free()
		check("given back twice", nil, nil, 75_000)
		check("after its end", small.grow(1), errTooMuch, 75_000)

		time.Sleep(stillTime + 75_000*time.Second/slowRate) // the first is at its time, not beyond it
		check("before the first is late", second.grow(50_000), errTooMuch, 75_000)
		time.Sleep(cutEvery)
		check("when the first is late", second.grow(50_000), nil, 50_000)
		check("to the first", first.grow(1), errTooMuch, 50_000)
		first.free()
		check("what was taken from it is not given back", nil, nil, 50_000)
		if cut["first"] != 1 || len(cut) != 1 {
			t.Errorf("cut off were %v", cut)
		}
	})
}

func TestTheMostLateIsCutFirstAndNoMoreThanMust(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBudget(3)
		cuts := make(chan int, 3)
		for i := range 3 {
			s := b.open(func() { cuts <- i })
			s.wait()
			if i > 0 { // the first does not stand still
				s.due.Store(time.Now().Add(time.Duration(10-i) * time.Second).UnixNano())
			}
		}
		came := make(chan time.Time, 2)
		start := time.Now()
		for range 2 {
			go func() {
				b.open(nil).wait()
				came <- time.Now()
			}()
		}
		for _, want := range []time.Duration{8 * time.Second, 9 * time.Second} {
			if d := (<-came).Sub(start); d < want || d > want+cutEvery {
				t.Errorf("let in after %v, want %v", d, want)
			}
		}
		synctest.Wait()
		if first, second := <-cuts, <-cuts; first != 2 || second != 1 || len(cuts) > 0 || b.inUse() != 3 {
			t.Errorf("cut off were %d, %d and %d more, and %d are in use", first, second, len(cuts), b.inUse())
		}
	})
}
