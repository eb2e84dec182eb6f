package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"time"
)

// startRedis starts a Redis for the relays that are named redis.
func (b *bench) startRedis(ctx context.Context) (stop func(), err error) {
	addr := freeAddr()
	cmd := exec.CommandContext(ctx, "redis-server", "--port", strconv.Itoa(portOf(addr)), "--bind", "127.0.0.1", "--save", "", "--dir", b.tmp)
	killWithParent(cmd)
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("redis-server (apt-get install redis-server): %w", err)
	}
	b.redisURL = "redis://" + addr
	stop = func() {
		cmd.Process.Kill()
		cmd.Wait()
	}
	for {
		conn, err := net.Dial("tcp", addr)
		if err == nil {
			conn.Close()
			return stop, nil
		}
		if err := pause(ctx, 5*time.Millisecond); err != nil {
			stop()
			return nil, err
		}
	}
}

// redis measures relays that share a Redis against one that is alone.
func (b *bench) redis(ctx context.Context) error {
	stop, err := b.startRedis(ctx)
	if err != nil {
		return err
	}
	defer stop()
	b.server = "relay,redis"
	if err := b.publish(ctx); err != nil {
		return err
	}
	if err := b.redisStart(ctx); err != nil {
		return err
	}
	if err := b.redisFanout(ctx, spec{server: "redis", technique: "sse", n: 1, rate: 20, messages: 200}); err != nil {
		return err
	}
	return b.redisFanout(ctx, spec{server: "redis", technique: "sse", n: or(b.n, 10_000) / 2, rate: 1, messages: int(b.duration.Seconds()), settle: 2 * time.Second})
}

// redisStart measures from start to the first answer of an instance that finds a full Redis.
func (b *bench) redisStart(ctx context.Context) error {
	const events, rooms = 10_000, 100
	filler, err := b.poster(ctx, "redis", 8)
	if err != nil {
		return err
	}
	defer filler.srv.stop()
	for i := range events {
		if _, err := filler.callers[0].do("POST", fmt.Sprintf("/rooms/deep%d", i%rooms), "text/plain", make([]byte, payload)); err != nil {
			return err
		}
	}
	var times []time.Duration
	for range 5 {
		start := time.Now()
		srv, err := b.start(ctx, "redis", 0)
		if err != nil {
			return err
		}
		c, err := dial(ctx, srv.addr)
		if err != nil {
			return err
		}
		answer, err := c.do("GET", "/rooms/deep0/poll?last=1", "", nil)
		times = append(times, time.Since(start))
		srv.stop()
		if err != nil || len(answer) < 50 {
			return fmt.Errorf("the history is not there: %s %w", answer, err)
		}
	}
	slices.Sort(times)
	fmt.Printf("\nFrom start to the first answer, with %d events in Redis: %.0f ms (median of %d).\n", events, times[len(times)/2].Seconds()*1000, len(times))
	return nil
}

// redisFanout publishes to one instance, and has as many clients at another.
func (b *bench) redisFanout(ctx context.Context, sp spec) error {
	fmt.Printf("\nOne room, %d clients at each of two instances, %v messages a second to the first.\n\n", sp.n, sp.rate)
	sp.pubs = 1
	var both [2]*session
	for i := range both {
		var err error
		if both[i], err = b.open(ctx, sp); err != nil {
			return err
		}
		defer both[i].close()
	}
	if err := pause(ctx, sp.settle); err != nil {
		return err
	}
	var near result
	far, err := both[1].measure(ctx, func() (time.Time, error) {
		var err error
		near, err = both[0].measure(ctx, func() (time.Time, error) {
			if err := both[0].publish(ctx, sp.messages, sp.rate, sp.pubs, payload); err != nil {
				return time.Now(), err
			}
			return both[0].drain(ctx)
		})
		if err != nil {
			return time.Now(), err
		}
		both[1].published = both[0].published
		return both[1].drain(ctx)
	})
	if err != nil {
		return err
	}
	fmt.Fprintln(os.Stderr, both[0].close(), both[1].close())
	show([]result{near, far}, cServer, cTechnique, cConnected, cLost, cDoubled, cP50, cP99, cMax, cCPU, cIdle)
	return nil
}
