package main

import (
	"syscall"
	"testing"
	"time"
)

// The kernel ends a connection that acknowledges nothing for two beats, be it
// silent or not: a stream's and a WebSocket's.
func TestPatience(t *testing.T) {
	b := newBed(t, tcp)
	b.listen(kindOf("sse"), "a").begin()
	b.listen(kindOf("ws"), "a").begin()
	b.pump.mu.Lock()
	defer b.pump.mu.Unlock()
	if len(b.pump.streams) != 2 {
		t.Fatalf("%d streams", len(b.pump.streams))
	}
	for _, st := range b.pump.streams {
		ms, err := syscall.GetsockoptInt(st.fd, syscall.IPPROTO_TCP, 18)
		if d := time.Duration(ms) * time.Millisecond; err != nil || d != 2*b.beat {
			t.Errorf("%v, %v; want %v", d, err, 2*b.beat)
		}
	}
}
