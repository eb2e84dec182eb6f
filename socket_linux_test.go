// Tests of what the relay sets on its sockets, and the relay as a process for bench/.

package main

import (
	"os"
	"os/signal"
	"runtime/debug"
	"slices"
	"strconv"
	"syscall"
	"testing"
	"time"
)

// The test's own binary is a relay if the environment says so. The tests in bench/ start
// it: beside what a relay does it collects garbage when it is asked to, and takes a
// bound on its descriptors.
func init() {
	if os.Getenv("COMETES_TEST_RELAY") == "" {
		return
	}
	if n, _ := strconv.ParseUint(os.Getenv("COMETES_TEST_NOFILE"), 10, 64); n > 0 {
		if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &syscall.Rlimit{Cur: n, Max: n}); err != nil {
			panic(err)
		}
	}
	collect := make(chan os.Signal, 1)
	signal.Notify(collect, syscall.SIGUSR1)
	go func() {
		for range collect {
			debug.FreeOSMemory()
		}
	}()
	main()
	os.Exit(0)
}

// The kernel ends a connection that acknowledges nothing for two heartbeats, for
// streams and WebSockets, idle or not. If the socket is only full, the relay's own
// deadline comes first.
func TestTheKernelEndsAConnectionThatAcknowledgesNothing(t *testing.T) {
	for beat, want := range map[time.Duration]time.Duration{15 * time.Second: 30 * time.Second, time.Second: 20 * time.Second} {
		b := newTestbed(t, tcp, func(c *config) { c.beat = beat })
		b.subscribe(variantOf("sse"), "a").begin()
		b.subscribe(variantOf("ws"), "a").begin()
		_, r := b.rawWebSocket("/rooms/a/ws", "X-Forwarded-For: 192.0.2.1")
		r.Peek(1) // the hello
		b.pool.mu.Lock()
		streams := slices.Clone(b.pool.sessions)
		b.pool.mu.Unlock()
		if len(streams) != 3 {
			t.Fatalf("%d streams", len(streams))
		}
		for i, st := range streams {
			ms, err := syscall.GetsockoptInt(st.fd, syscall.IPPROTO_TCP, 18)
			if got := time.Duration(ms) * time.Millisecond; err != nil || got != want {
				t.Errorf("with a heartbeat of %v: %v, %v; want %v", beat, got, err, want)
			}
			proxied := st.ws != nil && st.ws.proxied
			if !st.kernelTimeout || proxied != (i == 2) {
				t.Errorf("stream %d: kernel timeout %v, proxied %v", i, st.kernelTimeout, proxied)
			}
		}
	}
}
