package main

import (
	"bytes"
	"context"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"
)

// What the kernel knows of a server. All of it comes from /proc, and is NaN where there is none.

// cpuTime is the CPU time of the processes so far, user and system. schedstat counts nanoseconds,
// a thread at a time; stat counts in ticks of 10 ms, which is too coarse for an idle minute. A
// thread that ended takes its schedstat along, but Go and nginx keep theirs.
func cpuTime(pids []int) time.Duration {
	var sum time.Duration
	for _, pid := range pids {
		tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", pid))
		for _, f := range tasks {
			b, _ := os.ReadFile(f)
			sum += time.Duration(number(b))
		}
		if len(tasks) == 0 {
			b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
			if f := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:])); len(f) > 12 { // proc_pid_stat(5): utime and stime
				user, _ := strconv.Atoi(f[11])
				system, _ := strconv.Atoi(f[12])
				sum += time.Duration(user+system) * 10 * time.Millisecond
			}
		}
	}
	return sum
}

// memory is the resident memory of the processes, and its peak, in bytes.
func memory(pids []int) (rss, peak float64) {
	if len(pids) > 1 {
		pids = pids[1:] // nginx's master only watches, and shares its pages with the worker
	}
	for _, pid := range pids {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		if err != nil {
			return math.NaN(), math.NaN()
		}
		// VmRSS lags by some pages a thread, smaps_rollup is exact.
		now := kilobytes(b, "VmRSS:")
		if b, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid)); err == nil && len(b) > 0 {
			now = kilobytes(b, "\nRss:")
		}
		rss += now
		peak += kilobytes(b, "VmHWM:")
	}
	return rss, peak
}

func kilobytes(b []byte, name string) float64 {
	_, v, _ := bytes.Cut(b, []byte(name))
	return float64(number(bytes.TrimLeft(v, " \t"))) * 1024
}

// children are the processes that pid has started.
func children(pid int) (pids []int) {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
	for _, f := range strings.Fields(string(b)) {
		child, _ := strconv.Atoi(f)
		pids = append(pids, child)
	}
	return pids
}

// machine names what the figures were measured on.
func machine() string {
	cpu := runtime.GOARCH
	if b, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		if _, v, ok := strings.Cut(string(b), "model name\t: "); ok {
			cpu, _, _ = strings.Cut(v, "\n")
		}
	}
	kernel := runtime.GOOS
	if b, err := os.ReadFile("/proc/sys/kernel/osrelease"); err == nil {
		kernel = "Linux " + strings.TrimSpace(string(b))
	}
	s := fmt.Sprintf("%d cores (%s), %s, %s; clients and servers share them over loopback", runtime.NumCPU(), cpu, kernel, runtime.Version())
	if b, err := os.ReadFile("/proc/loadavg"); err == nil {
		load, _, _ := strings.Cut(string(b), " ")
		s += "; load before the run " + load
	}
	return s
}

// A cgroup limits the memory of the server. Kernel memory of its sockets counts: all of it under
// v2, their structures but not their buffers under v1.
type cgroup struct {
	dir string
	v2  bool
}

// newCgroup makes a group below this process's own, or else below the root of the hierarchy.
func newCgroup(limit int64) (*cgroup, error) {
	var own1, own2 string
	b, _ := os.ReadFile("/proc/self/cgroup")
	for line := range strings.Lines(string(b)) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(f) == 3 && f[1] == "" {
			own2 = f[2]
		} else if len(f) == 3 && f[1] == "memory" {
			own1 = f[2]
		}
	}
	var last error
	for _, g := range []cgroup{{"/sys/fs/cgroup" + own2, true}, {"/sys/fs/cgroup", true}, {"/sys/fs/cgroup/memory" + own1, false}, {"/sys/fs/cgroup/memory", false}} {
		file := "memory.max"
		if !g.v2 {
			file = "memory.limit_in_bytes"
		} else if b, _ := os.ReadFile(g.dir + "/cgroup.controllers"); !bytes.Contains(b, []byte("memory")) {
			continue
		} else {
			os.WriteFile(g.dir+"/cgroup.subtree_control", []byte("+memory"), 0) // fails where processes live; then so does memory.max
		}
		g.dir = filepath.Join(g.dir, fmt.Sprintf("cometes-bench-%d-%d", os.Getpid(), time.Now().UnixNano()%1e9))
		if last = os.Mkdir(g.dir, 0o755); last != nil {
			continue
		}
		if last = os.WriteFile(filepath.Join(g.dir, file), fmt.Append(nil, limit), 0); last != nil {
			os.Remove(g.dir)
			continue
		}
		return &g, nil
	}
	return nil, fmt.Errorf("no memory cgroup that this process may write: %v", last)
}

// wrap is the command that enters the group and then becomes args.
func (g *cgroup) wrap(args []string) []string {
	return append([]string{"sh", "-c", `echo $$ > "$0"/cgroup.procs && exec "$@"`, g.dir}, args...)
}

func (g *cgroup) report() string {
	read := func(file, name string) int64 {
		b, _ := os.ReadFile(filepath.Join(g.dir, file))
		if name != "" {
			_, b, _ = bytes.Cut(append([]byte("\n"), b...), []byte("\n"+name+" "))
		}
		return number(b)
	}
	if g.v2 {
		return fmt.Sprintf("cgroup v2: limit %d MiB, peak %d MiB, limit reached %d times, OOM kills %d", read("memory.max", "")>>20,
			read("memory.peak", "")>>20, read("memory.events", "max"), read("memory.events", "oom_kill"))
	}
	return fmt.Sprintf("cgroup v1: limit %d MiB, peak %d MiB, limit reached %d times, OOM kills %d", read("memory.limit_in_bytes", "")>>20,
		read("memory.max_usage_in_bytes", "")>>20, read("memory.failcnt", ""), read("memory.oom_control", "oom_kill"))
}

func (g *cgroup) remove() {
	for range 50 { // the group is busy until its processes are reaped
		if os.Remove(g.dir) == nil {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}
