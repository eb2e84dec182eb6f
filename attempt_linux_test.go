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
	b.raw("/rooms/a/ws", "X-Forwarded-For: 192.0.2.1")
	b.pump.mu.Lock()
	defer b.pump.mu.Unlock()
	if len(b.pump.streams) != 3 {
		t.Fatalf("%d streams", len(b.pump.streams))
	}
	for i, st := range b.pump.streams {
		ms, err := syscall.GetsockoptInt(st.fd, syscall.IPPROTO_TCP, 18)
		if d := time.Duration(ms) * time.Millisecond; err != nil || d != 2*b.beat {
			t.Errorf("%v, %v; want %v", d, err, 2*b.beat)
		}
		if !st.patient || st.proxied != (i == 2) {
			t.Errorf("stream %d: patient %v, proxied %v", i, st.patient, st.proxied)
		}
	}
}
