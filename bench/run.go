package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// payload is the size of a message in bytes, stamp included.
const payload = 64

// A spec is one row of a table: a server, its clients, and what is published to them.
type spec struct {
	server, technique string
	rounds            int // 0: one
	n, rooms          int // clients, spread over the rooms in turn
	stall             int // of the n, so many stop reading once connected
	users, browser    bool
	picture           int           // bytes of what is published, as an image; 0: text
	settle            time.Duration // between connecting and measuring memory
	keep              int           // messages that a room of the relay keeps; 0: its own default
	fill              int           // messages of 8 KB before the window
	pubs, messages    int           // publishers, and messages for all rooms together
	rate              float64       // messages a second; 0: as fast as they are answered
	idle              time.Duration // a window in which nothing is published
}

// A session is a server with its clients connected.
type session struct {
	spec
	srv       *server
	swarm     *swarm
	base      float64       // resident bytes before the first client
	cpu       time.Duration // of the server before the first client
	took      time.Duration // to connect all
	published int           // messages so far: number k went to room k mod rooms
}

// A result is what one window of time showed; total is since the beginning.
type result struct {
	spec
	counts
	total         counts
	took          time.Duration
	window, cpu   time.Duration
	lost, files   int
	p50, p99, max float64 // milliseconds
	base, rss     float64 // resident bytes before clients, and with them idle
	after, peak   float64
	least, most   float64 // CPU µs per event, of several rounds
	remarks       string
}

func (b *bench) open(ctx context.Context, sp spec) (*session, error) {
	sp.rooms = max(1, sp.rooms)
	srv, err := b.start(ctx, sp.server, sp.keep)
	if err != nil {
		return nil, err
	}
	x := &session{spec: sp, srv: srv, swarm: newSwarm(sp, srv.addr)}
	// One message to a room without readers maps the code in, so that it does not count as the clients'.
	c, err := dial(ctx, srv.addr)
	if err == nil {
		_, err = c.do("POST", "/rooms/warm", "text/plain", []byte("up"))
		for i := 0; i < sp.rooms && err == nil && sp.server == "nchan" && sp.technique == "longpoll"; i++ {
			_, err = c.do("POST", fmt.Sprintf("/rooms/r%d", i), "text/plain", []byte("the first answer")) // has the cursor to ask with
		}
		c.conn.Close()
	}
	if err != nil {
		srv.stop()
		return nil, err
	}
	if err := pause(ctx, 200*time.Millisecond); err != nil {
		srv.stop()
		return nil, err
	}
	x.base, _ = memory(srv.pids)
	x.cpu = cpuTime(srv.pids)
	within, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	start := time.Now()
	if err := x.swarm.connect(within); err != nil {
		return nil, fmt.Errorf("%w %s", err, x.close())
	}
	x.took = time.Since(start)
	return x, nil
}

// close returns what is to be said about how the server ended. It may be called again.
func (x *session) close() string {
	x.swarm.stop()
	return x.srv.stop()
}

// publish says messages to the rooms in turn. A publisher sleeps until its message is due and does
// not wait for those before, so a server that lags shows in the latency, not in a lower rate.
func (x *session) publish(ctx context.Context, messages int, rate float64, pubs, size int) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var next atomic.Int64
	next.Store(int64(x.published))
	end := int64(x.published + messages)
	x.published += messages
	first, start := next.Load(), time.Now()
	var g sync.WaitGroup
	for range pubs {
		g.Go(func() {
			c, err := dial(ctx, x.srv.addr)
			if err != nil {
				cancel(err)
				return
			}
			defer func() { c.conn.Close() }()
			pad := strings.Repeat("x", size-stampLen)
			for ctx.Err() == nil {
				k := next.Add(1) - 1
				if k >= end {
					return
				}
				if rate > 0 {
					due := start.Add(time.Duration(float64(k-first) / rate * float64(time.Second)))
					if pause(ctx, time.Until(due)) != nil {
						return
					}
				}
				room, seq := int(k)%x.rooms, int(k)/x.rooms
				now := time.Now()
				body := fmt.Appendf(nil, stampForm+"%s", now.UnixNano(), room, seq, pad)
				if x.server == "nchan" { // it does not make events: it is given as many bytes as they have
					body = fmt.Appendf(nil, `{"ID":%d,"room":"r%d","type":"message","time":%d,"data":"%s"}`, now.UnixMicro(), room, now.UnixMilli(), body)
				}
				path, contentType := fmt.Sprintf("/rooms/r%d", room), "text/plain"
				if x.picture > 0 {
					body, contentType = append([]byte("GIF89a"), body...), "image/gif"
				}
				_, err := c.do("POST", path, contentType, body)
				if errors.Is(err, io.EOF) { // a server in need may close an idle connection
					c.conn.Close()
					if again, e := dial(ctx, x.srv.addr); e == nil {
						c = again
						_, err = c.do("POST", path, contentType, body)
					}
				}
				if err != nil {
					cancel(fmt.Errorf("publishing: %w", err))
					return
				}
			}
		})
	}
	g.Wait()
	return context.Cause(ctx)
}

// drain waits until all that is due has come, or nothing came for 3 s. It returns when the last came.
func (x *session) drain(ctx context.Context) (last time.Time, err error) {
	due, had := x.swarm.expected(x.published), -1
	for last = time.Now(); had < due && time.Since(last) < 3*time.Second; {
		if n := x.swarm.now().delivered; n > had {
			had, last = n, time.Now()
		}
		if err := pause(ctx, 2*time.Millisecond); err != nil {
			return last, err
		}
	}
	return last, nil
}

// measure is one window of time, which ends when f returns, or at the time that it returns.
func (x *session) measure(ctx context.Context, f func() (time.Time, error)) (result, error) {
	r := result{spec: x.spec, took: x.took, base: x.base}
	r.rss, _ = memory(x.srv.pids)
	x.swarm.take()
	before, start, cpu := x.swarm.now(), time.Now(), cpuTime(x.srv.pids)
	last, err := f()
	r.window, r.cpu = last.Sub(start), cpuTime(x.srv.pids)-cpu
	if err != nil && ctx.Err() != nil {
		return r, err
	}
	pause(ctx, 100*time.Millisecond) // for what might come twice
	r.total = x.swarm.now()
	r.counts = r.total.sub(before)
	r.lost = x.swarm.expected(x.published) - r.total.delivered
	if lat := x.swarm.take(); len(lat) > 0 {
		at := func(q float64) float64 { return float64(lat[int(q*float64(len(lat)-1))]) / 1000 }
		r.p50, r.p99, r.max = at(0.5), at(0.99), at(1)
	} else {
		r.p50, r.p99, r.max = math.NaN(), math.NaN(), math.NaN()
	}
	r.after, r.peak = memory(x.srv.pids)
	files, _ := os.ReadDir(fmt.Sprintf("/proc/%d/fd", x.srv.pids[0]))
	r.files = len(files)
	return r, err
}

// row runs a spec from the start of the server to its end. A server that ends or is killed under
// the load is a result, not an error.
func (b *bench) row(ctx context.Context, sp spec) (result, error) {
	x, err := b.open(ctx, sp)
	if err != nil {
		return result{}, err
	}
	defer x.close()
	if err := pause(ctx, sp.settle); err != nil {
		return result{}, err
	}
	if sp.fill > 0 {
		if err := x.publish(ctx, sp.fill, 20, 1, 8<<10); err != nil {
			return result{}, err
		}
		if _, err := x.drain(ctx); err != nil {
			return result{}, err
		}
	}
	r, err := x.measure(ctx, func() (time.Time, error) {
		if sp.idle > 0 {
			err := pause(ctx, sp.idle)
			return time.Now(), err
		}
		if err := x.publish(ctx, sp.messages, sp.rate, sp.pubs, or(sp.picture, payload)); err != nil {
			return time.Now(), err
		}
		return x.drain(ctx)
	})
	if ctx.Err() != nil {
		return result{}, ctx.Err()
	}
	fmt.Fprintf(os.Stderr, "%s %s: %d connected, %d delivered, %d lost, %d doubled in %v\n", sp.server, sp.technique, r.total.connected, r.delivered, r.lost, r.doubled, r.window.Round(time.Millisecond))
	r.remarks = x.close()
	if err != nil {
		r.remarks += " " + err.Error()
	}
	return r, nil
}
