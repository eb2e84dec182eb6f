package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strconv"
	"sync"
	"time"
)

// A swarm is n clients of one technique on one server, read by one loop. The clients share the
// machine's cores with the server, so a client is a few words of state, a raw connection and the
// parsing that is needed to count: no goroutine, no client library, no JSON. How bytes are read
// is in net_linux.go (epoll) and net_other.go (a goroutine a client).
type swarm struct {
	spec
	addr    string
	clients []client
	engine

	mu       sync.Mutex // held while a client is fed; guards what follows
	count    counts
	lat      []int32       // µs from stamp to read, of each delivery since take
	interval time.Duration // between two polls
	failed   int           // connections refused, or ended before their head
	firstErr error
}

// counts grow from the start of the swarm; a window of time is the difference of two.
type counts struct {
	connected, closed                  int
	requests, up, down                 int // bytes as HTTP sees them: heads and framing, not TCP/IP
	delivered, doubled, disorder, gaps int
}

func (a counts) sub(b counts) counts {
	return counts{a.connected - b.connected, a.closed - b.closed, a.requests - b.requests, a.up - b.up, a.down - b.down,
		a.delivered - b.delivered, a.doubled - b.doubled, a.disorder - b.disorder, a.gaps - b.gaps}
}

// A client parses the bytes of one connection as they come, in whatever pieces.
type client struct {
	s      *swarm
	i      int
	room   int
	asks   bool // asks again with a cursor: poll, longpoll, jsonp
	stall  bool // stops reading once it is connected
	up     bool // its head came, with the right status
	state  int8 // what the next byte is
	fin    bool // the WebSocket frame being read ends its message
	fd     int
	left   int    // bytes to come of the body, the chunk or the frame
	pend   []byte // bytes of a head or a framing not yet whole
	tail   []byte // bytes of an event not yet whole
	cursor int64
	cond   []byte   // what nchan has in place of a cursor: headers of a conditional request
	last   int64    // order of the last event: the relay's id, or else the number in the room
	seen   []uint64 // a bit a message of the room
}

const (
	inHead    int8 = iota
	inLength       // a body of known length
	inClose        // a body that ends with the connection
	inSize         // the line before a chunk
	inChunk        // a chunk
	inCRLF         // the line end after a chunk
	inFrame        // the head of a WebSocket frame
	inPayload      // a WebSocket frame's payload
)

// The stamp that every message begins with: when it was sent (Unix nanoseconds), its room, its
// number in the room. '@' is escaped by no technique, and occurs in nothing else that is sent.
const (
	stampForm = "@%019d.%04d.%06d"
	stampLen  = 32
)

// What the clients send beside the request line. The lean head is for measuring the server; the
// browser's is what Chromium 156 sends with a fetch to the same origin, for the techniques' table.
const (
	leanHead    = "Host: 127.0.0.1\r\n"
	browserHead = "Host: localhost:8080\r\nConnection: keep-alive\r\nsec-ch-ua-platform: \"Linux\"\r\n" +
		"User-Agent: Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/156.0.0.0 Safari/537.36\r\n" +
		"sec-ch-ua: \"Chromium\";v=\"156\", \"Not.A/Brand\";v=\"99\"\r\nsec-ch-ua-mobile: ?0\r\nAccept: */*\r\n" +
		"Sec-Fetch-Site: same-origin\r\nSec-Fetch-Mode: cors\r\nSec-Fetch-Dest: empty\r\nReferer: http://localhost:8080/\r\n" +
		"Accept-Encoding: gzip, deflate, br, zstd\r\nAccept-Language: en-US,en;q=0.9\r\n"
	wsKey    = "dGhlIHNhbXBsZSBub25jZQ=="     // RFC 6455's example,
	wsAccept = "s3pplmbitxaq9kygzzhzrbk+xoo=" // and its answer, in lower case
)

func newSwarm(sp spec, addr string) *swarm {
	s := &swarm{spec: sp, addr: addr, interval: time.Second, clients: make([]client, sp.n)}
	asks := sp.technique == "poll" || sp.technique == "longpoll" || sp.technique == "jsonp"
	for i := range s.clients {
		s.clients[i] = client{s: s, i: i, room: i % sp.rooms, asks: asks, stall: i >= sp.n-sp.stall, last: -1}
	}
	s.lat = make([]int32, 0, min(sp.n*sp.messages/sp.rooms, 1<<21))
	return s
}

// connect opens all clients. It holds back while 256 have no answer yet: a full accept queue
// drops the SYN, and the client's next comes a second later.
func (s *swarm) connect(ctx context.Context) error {
	if err := s.start(); err != nil {
		return err
	}
	await := func(answers int) error {
		for {
			s.mu.Lock()
			n := s.count.connected
			done := n+s.failed >= answers
			s.mu.Unlock()
			if done {
				return nil
			}
			if err := pause(ctx, 200*time.Microsecond); err != nil {
				return fmt.Errorf("%d of %d connected: %w", n, s.n, err)
			}
		}
	}
	for i := range s.clients {
		if err := await(i - 256); err != nil {
			return err
		}
		if err := s.open(&s.clients[i]); err != nil {
			s.ended(&s.clients[i], err)
		}
	}
	if err := await(s.n); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.failed > 0 {
		return fmt.Errorf("%d of %d did not connect: %w", s.failed, s.n, s.firstErr)
	}
	return nil
}

func (s *swarm) now() counts {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.count
}

// take returns the latencies since the last take, sorted.
func (s *swarm) take() []int32 {
	s.mu.Lock()
	defer s.mu.Unlock()
	lat := slices.Clone(s.lat)
	s.lat = s.lat[:0]
	slices.Sort(lat)
	return lat
}

// expected is how many deliveries are due when the rooms have got so many messages in turn.
func (s *swarm) expected(messages int) (n int) {
	for i := range s.clients {
		if c := &s.clients[i]; c.up && !c.stall {
			n += (messages + s.rooms - 1 - c.room) / s.rooms
		}
	}
	return n
}

// every is the time between two polls.
func (s *swarm) every() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.interval
}

func (s *swarm) ended(c *client, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if c.up {
		s.count.closed++
	} else {
		s.failed++
	}
	if s.firstErr == nil {
		s.firstErr = err
	}
}

// request is what the client asks next. The techniques that ask again begin with a poll, which
// answers at once, so that from then on they hold a cursor and can lose nothing.
func (c *client) request() []byte {
	technique, q := c.s.technique, url.Values{}
	if c.s.server == "nchan" { // whose cursor is in headers
	} else if c.asks && c.cursor == 0 {
		technique = "poll"
	} else if c.asks {
		q.Set("after", strconv.FormatInt(c.cursor, 10))
		if technique == "jsonp" {
			q.Set("callback", "cb")
		}
	}
	if c.s.users {
		q.Set("user", fmt.Sprintf("u%05d", c.i))
	}
	b := fmt.Appendf(nil, "GET /rooms/r%d/%s", c.room, technique)
	if len(q) > 0 {
		b = append(append(b, '?'), q.Encode()...)
	}
	b = append(b, " HTTP/1.1\r\n"...)
	if c.s.browser {
		b = append(b, browserHead...)
	} else {
		b = append(b, leanHead...)
	}
	b = append(b, c.cond...)
	switch technique {
	case "sse":
		b = append(b, "Accept: text/event-stream\r\n"...) // without it nchan answers 403
	case "ws":
		b = append(b, "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: "+wsKey+"\r\n"...)
	}
	b = append(b, "\r\n"...)
	c.s.mu.Lock()
	c.s.count.requests++
	c.s.count.up += len(b)
	c.s.mu.Unlock()
	return b
}

var errEnd = errors.New("the server ended the connection")

// feed takes what was read at now (Unix nanoseconds). If ask is true the client makes its next
// request after wait; reply is to be sent at once.
func (c *client) feed(b []byte, now int64) (reply []byte, ask bool, wait time.Duration, err error) {
	s := c.s
	s.mu.Lock()
	defer s.mu.Unlock()
	s.count.down += len(b)
	if len(c.pend) > 0 {
		c.pend = append(c.pend, b...)
		b = c.pend
	}
parse:
	for len(b) > 0 {
		switch c.state {
		case inHead:
			n := bytes.Index(b, []byte("\r\n\r\n"))
			if n < 0 {
				break parse
			}
			if err := c.head(b[:n]); err != nil {
				return nil, false, 0, err
			}
			b = b[n+4:]
			if c.state == inLength && c.left == 0 {
				ask, wait = c.answered()
			}
		case inClose:
			c.scan(b, now)
			b = nil
		case inLength, inChunk, inPayload:
			n := min(c.left, len(b))
			c.scan(b[:n], now)
			b, c.left = b[n:], c.left-n
			if c.left > 0 {
				break
			}
			switch c.state {
			case inLength:
				ask, wait = c.answered()
			case inChunk:
				c.state = inCRLF
			case inPayload:
				c.state = inFrame
				if c.fin {
					c.tail = c.tail[:0]
				}
			}
		case inCRLF:
			if len(b) < 2 {
				break parse
			}
			b, c.state = b[2:], inSize
		case inSize:
			n := bytes.IndexByte(b, '\n')
			if n < 1 {
				break parse
			}
			size, err := strconv.ParseUint(string(b[:n-1]), 16, 31)
			if err != nil {
				return nil, false, 0, fmt.Errorf("chunk of size %q", b[:n])
			}
			if size > 0 {
				b, c.left, c.state = b[n+1:], int(size), inChunk
				break
			}
			if len(b) < n+3 { // the last chunk and the empty line after it
				break parse
			}
			b = b[n+3:]
			ask, wait = c.answered()
			if !ask {
				return nil, false, 0, errEnd
			}
		case inFrame:
			n, payload, ok := frame(b)
			if !ok || b[0]&8 != 0 && len(b) < n+payload { // a control frame is taken whole
				break parse
			}
			op := b[0] & 15
			if op == 8 {
				return nil, false, 0, fmt.Errorf("closed: %q", b[n:n+payload])
			}
			if op == 9 {
				reply = append(reply, pong(b[n:n+payload])...)
				s.count.up += len(reply)
			}
			c.fin = b[0]&0x80 != 0
			b = b[n:]
			if op < 8 && payload > 0 {
				c.left, c.state = payload, inPayload
			} else if op >= 8 {
				b = b[payload:]
			}
		}
	}
	c.pend = append(c.pend[:0], b...)
	return reply, ask, wait, nil
}

// head reads the status and the framing of what follows.
func (c *client) head(h []byte) error {
	low := bytes.ToLower(h)
	_, status, _ := bytes.Cut(low, []byte(" "))
	switch {
	case bytes.HasPrefix(status, []byte("101")) && bytes.Contains(low, []byte(wsAccept)):
		c.state = inFrame
	case !bytes.HasPrefix(status, []byte("200")) || c.s.technique == "ws":
		return fmt.Errorf("answer %.80q", h)
	case bytes.Contains(low, []byte("transfer-encoding: chunked")):
		c.state = inSize
	case field(low, "content-length") >= 0:
		c.state, c.left = inLength, field(low, "content-length")
	default:
		c.state = inClose
	}
	if c.asks && c.s.server == "nchan" {
		c.cond = c.cond[:0]
		for _, line := range bytes.Split(h, []byte("\r\n")) {
			if v, ok := bytes.CutPrefix(line, []byte("Last-Modified: ")); ok {
				c.cond = fmt.Appendf(c.cond, "If-Modified-Since: %s\r\n", v)
			} else if v, ok := bytes.CutPrefix(line, []byte("Etag: ")); ok {
				c.cond = fmt.Appendf(c.cond, "If-None-Match: %s\r\n", v)
			}
		}
	}
	if sec := field(low, "refresh"); sec > 0 {
		c.s.interval = time.Duration(sec) * time.Second
	}
	if !c.up {
		c.up = true
		c.s.count.connected++
	}
	return nil
}

// field is a header's number, or -1.
func field(low []byte, name string) int {
	_, v, ok := bytes.Cut(low, []byte("\r\n"+name+": "))
	if !ok {
		return -1
	}
	return int(number(v))
}

// number reads the digits that b begins with.
func number(b []byte) (n int64) {
	for _, d := range b {
		if d < '0' || d > '9' {
			break
		}
		n = n*10 + int64(d-'0')
	}
	return n
}

// answered is the end of an answer on a connection that is kept: when to ask again. Those who poll
// are spread over the interval, as independent clients would be.
func (c *client) answered() (ask bool, wait time.Duration) {
	c.state, c.tail = inHead, c.tail[:0]
	switch c.s.technique {
	case "longpoll", "jsonp":
		return true, 0
	case "poll", "refresh":
		if c.last == -1 {
			c.last = 0
			return true, c.s.interval * time.Duration(c.i) / time.Duration(c.s.n)
		}
		return true, c.s.interval
	}
	return false, 0
}

// frame reads a WebSocket frame's head: its length, and its payload's. A server does not mask.
func frame(b []byte) (head, payload int, ok bool) {
	if len(b) < 2 {
		return 0, 0, false
	}
	head, payload = 2, int(b[1]&127)
	if payload > 125 {
		head += 2
		if payload == 127 {
			head += 6
		}
		if len(b) < head {
			return 0, 0, false
		}
		payload = 0
		for _, d := range b[2:head] {
			payload = payload<<8 | int(d)
		}
	}
	return head, payload, true
}

// pong is masked, as a client's frames must be; with zeros, since this client hides nothing.
func pong(payload []byte) []byte {
	return append([]byte{0x80 | 10, 0x80 | byte(len(payload)), 0, 0, 0, 0}, payload...)
}

// scan looks for stamps in a piece of a body.
func (c *client) scan(p []byte, now int64) {
	if len(c.tail) > 0 {
		c.tail = append(c.tail, p...)
		p = c.tail
	}
	if c.asks {
		if i := bytes.Index(p, []byte(`"cursor":`)); i >= 0 {
			c.cursor = number(p[i+9:])
		}
	}
	start, from := 0, 0
	for {
		i := bytes.IndexByte(p[from:], '@')
		if i < 0 {
			break
		}
		i += from
		if len(p) < i+stampLen {
			break
		}
		from = i + stampLen
		order := int64(-1)
		if j := bytes.LastIndex(p[start:i], []byte(`"id":`)); j >= 0 {
			order = number(p[start+j+5:])
		}
		start = from
		c.event(order, number(p[i+1:]), int(number(p[i+21:])), int(number(p[i+26:])), now)
	}
	// A piece that ends a line has no event begun; of another, what may be the begin is kept.
	rest := p[start:]
	if len(rest) > 0 && rest[len(rest)-1] == '\n' {
		rest = nil
	}
	rest = rest[max(0, len(rest)-1024):]
	gap := []byte(`"type":"gap"`)
	c.s.count.gaps += bytes.Count(p, gap) - bytes.Count(rest, gap) // what is kept is looked at again
	c.tail = append(c.tail[:0], rest...)
}

func (c *client) event(order, sent int64, room, seq int, now int64) {
	n := &c.s.count
	for len(c.seen) <= seq>>6 {
		c.seen = append(c.seen, 0)
	}
	bit := uint64(1) << (seq & 63)
	switch {
	case room != c.room, c.seen[seq>>6]&bit != 0 && c.s.technique != "refresh": // a page shows the old again
		n.doubled++
		return
	case c.seen[seq>>6]&bit != 0:
		return
	}
	c.seen[seq>>6] |= bit
	n.delivered++
	if order < 0 {
		order = int64(seq) + 1
	}
	if order <= c.last {
		n.disorder++
	}
	c.last = order
	c.s.lat = append(c.s.lat, int32((now-sent)/1000))
}
