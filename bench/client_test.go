package main

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"strings"
	"testing"
)

// The ruler is tested too: whatever the pieces that bytes come in, the same events are counted.

func event(id, room, seq int) string {
	return fmt.Sprintf(`{"id":%d,"room":"r%d","type":"message","data":"`+stampForm+`%s"}`, id, room, 1, room, seq, strings.Repeat("x", 32))
}

func chunk(s string) string { return fmt.Sprintf("%x\r\n%s\r\n", len(s), s) }

func wsFrame(first byte, payload string) string {
	b := []byte{first}
	switch n := len(payload); {
	case n > 0xffff:
		b = binary.BigEndian.AppendUint64(append(b, 127), uint64(n))
	case n > 125:
		b = binary.BigEndian.AppendUint16(append(b, 126), uint16(n))
	default:
		b = append(b, byte(n))
	}
	return string(b) + payload
}

func TestEventsAreCountedWhateverThePieces(t *testing.T) {
	const ok = "HTTP/1.1 200 OK\r\n"
	long := "data: " + event(8, 0, 3) + "\n\n: " + strings.Repeat("y", 70000) + "\n\n"
	for _, c := range []struct {
		name, technique, bytes       string
		delivered, doubled, disorder int
		asked, gaps                  int
	}{
		{"until close", "sse", ok + "\r\n: hi\n\ndata: " + event(5, 0, 0) + "\n\nevent: beat\ndata:\n\ndata: " + event(6, 0, 1) + "\n\n", 2, 0, 0, 0, 0},
		{"chunks that cut events", "stream", ok + "Transfer-Encoding: chunked\r\n\r\n" + chunk(event(5, 0, 0)[:40]) + chunk(event(5, 0, 0)[40:]+"\n"+event(6, 0, 1)+"\n"), 2, 0, 0, 0, 0},
		{"doubled", "sse", ok + "\r\ndata: " + event(5, 0, 0) + "\n\ndata: " + event(5, 0, 0) + "\n\n", 1, 1, 0, 0, 0},
		{"of another room", "sse", ok + "\r\ndata: " + event(5, 1, 0) + "\n\n", 0, 1, 0, 0, 0},
		{"out of order", "sse", ok + "\r\ndata: " + event(6, 0, 1) + "\n\ndata: " + event(5, 0, 0) + "\n\n", 2, 0, 1, 0, 0},
		{"a gap", "stream", ok + "\r\n{\"type\":\"gap\",\"room\":\"r0\"}\n" + event(6, 0, 1) + "\n", 1, 0, 0, 0, 1},
		{"long-polls", "longpoll", ok + "Content-Length: 24\r\n\r\n" + `{"cursor":4,"events":[]}` + ok + "Transfer-Encoding: chunked\r\n\r\n" +
			chunk(`{"cursor":6,"events":[`+event(5, 0, 0)+","+event(6, 0, 1)+"]}") + "0\r\n\r\n", 2, 0, 0, 2, 0},
		{"frames", "ws", "HTTP/1.1 101 Switching Protocols\r\nSec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n" +
			wsFrame(0x81, `{"type":"hello"}`) + wsFrame(0x89, "ping") + wsFrame(0x81, event(5, 0, 0)+"\n"+event(6, 0, 1)) +
			wsFrame(0x01, event(7, 0, 2)[:70]) + wsFrame(0x80, event(7, 0, 2)[70:]) + wsFrame(0x81, long) + wsFrame(0x81, event(9, 0, 4)), 5, 0, 0, 0, 0},
	} {
		for _, size := range []int{1, 2, 7, 64, 1 << 20} {
			if size < 7 && len(c.bytes) > 70000 {
				continue // the square of it
			}
			s := newSwarm(spec{technique: c.technique, n: 1, rooms: 1}, "")
			asked, pongs := 0, []byte(nil)
			for b := []byte(c.bytes); len(b) > 0; {
				n := min(size, len(b))
				// A client that asks again only then gets the next answer.
				if i := bytes.Index(b[1:], []byte(ok)); i >= 0 {
					n = min(n, i+1)
				}
				reply, ask, _, err := s.clients[0].feed(b[:n], 2000)
				if err != nil {
					t.Fatalf("%s by %d: %v", c.name, size, err)
				}
				if ask {
					asked++
				}
				pongs = append(pongs, reply...)
				b = b[n:]
			}
			got := s.now()
			if got.delivered != c.delivered || got.doubled != c.doubled || got.disorder != c.disorder || got.gaps != c.gaps || asked != c.asked {
				t.Errorf("%s by %d: %+v, asked %d", c.name, size, got, asked)
			}
			if c.technique == "ws" && string(pongs) != "\x8a\x84\x00\x00\x00\x00ping" {
				t.Errorf("%s by %d: pong %q", c.name, size, pongs)
			}
			if c.technique == "longpoll" && s.clients[0].cursor != 6 {
				t.Errorf("cursor %d", s.clients[0].cursor)
			}
		}
	}
}
