// Cometes is an event relay: what is published to a room reaches everybody who reads the
// room, by whichever comet technique they can. It is one process and keeps everything in
// memory; several are one relay if they share a Redis.
//
// This file is the program around the relay: flags, listening, stopping, and the one
// place where the layers are put together (newApp). To learn how it works, begin with
// relay.go.

package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"math"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/signal"
	"runtime/debug"
	"strings"
	"syscall"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	slog.SetDefault(newLogger(os.Stderr))
	var err error
	if args := os.Args[1:]; len(args) > 0 && args[0] == "token" {
		err = tokenCommand(args[1:], os.Getenv)
	} else {
		err = run(ctx, args, os.Getenv)
	}
	if err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "cometes:", err)
		os.Exit(1)
	}
}

// newLogger logs text at a terminal, and elsewhere JSON with the names that Google Cloud
// reads (https://cloud.google.com/logging/docs/structured-logging).
func newLogger(f *os.File) *slog.Logger {
	if isTerminal(f) {
		return slog.New(slog.NewTextHandler(f, nil))
	}
	return slog.New(slog.NewJSONHandler(f, &slog.HandlerOptions{ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		switch a.Key {
		case slog.LevelKey:
			if a.Key = "severity"; a.Value.String() == "WARN" {
				a.Value = slog.StringValue("WARNING")
			}
		case slog.MessageKey:
			a.Key = "message"
		}
		return a
	}}))
}

func isTerminal(f *os.File) bool {
	info, err := f.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0
}

// greeting says what somebody who starts the relay at a terminal needs to know: an
// address to open, and who may use it.
func greeting(addr string, tokens bool) string {
	host, port, _ := net.SplitHostPort(addr)
	ip, _ := netip.ParseAddr(host)
	who := "anybody who can reach this machine; -secret asks for tokens"
	if ip.IsLoopback() {
		who = "anybody on this machine; -secret asks for tokens"
	}
	if ip.IsLoopback() || ip.IsUnspecified() {
		host = "localhost"
	}
	if tokens {
		who = "those with a token; `cometes token` makes one"
	}
	return fmt.Sprintf("Cometes is at http://%s\nOpen to %s.", net.JoinHostPort(host, port), who)
}

// A config is the values of the flags, which parseFlags describes.
type config struct {
	addr, metricsAddr, origins, secret string
	trustProxy, h2c, healthcheck       bool
	fly                                bool // it runs on Fly.io
	beat, age                          time.Duration
	streams, perAddr                   int
	rate, roomRate                     float64
	body                               int64
	memory                             int64  // bytes; see availableMemory
	redis, redisPrefix                 string // layer: redis.go
	redisEvents                        int    // layer: redis.go
	limits
}

// parseFlags reads the flags. A flag that is not given has an environment variable:
// COMETES_ROOM_BYTES for -room-bytes. Some defaults come from the memory there is.
func parseFlags(args []string, getenv func(string) string, memory int64) (config, error) {
	c := config{memory: memory}
	bounds := boundsFor(memory)
	fs := flag.NewFlagSet("cometes", flag.ContinueOnError)
	fs.StringVar(&c.addr, "addr", ":"+cmp.Or(getenv("PORT"), "8080"), "`address` to listen on; PORT, as the platforms set it, is another way to say the port")
	fs.StringVar(&c.origins, "origins", "", "whose pages may read and publish, beside the relay's own: a `list` such as https://a.example,https://b.example, or * for all")
	fs.DurationVar(&c.beat, "beat", 15*time.Second, "a silent stream is sent a heartbeat within this time; it must be shorter than the timeouts of proxies")
	fs.DurationVar(&c.age, "age", 0, "a stream this old is ended, and its client comes back: for platforms that cut requests; 0 for never")
	fs.StringVar(&c.secret, "secret", "", "what tokens are signed with; then only clients with a token may read or publish; several, comma separated, while it is changed")
	fs.BoolVar(&c.trustProxy, "trust-proxy", false, "take the client's address from Fly-Client-IP or X-Forwarded-For, as a proxy in front sets it")
	fs.BoolVar(&c.h2c, "h2c", false, "speak HTTP/2 without TLS too, to a proxy; WebSockets need HTTP/1.1")
	fs.BoolVar(&c.healthcheck, "healthcheck", false, "ask the relay at -addr for its health, and exit")
	fs.StringVar(&c.metricsAddr, "metrics-addr", "", "`address` to serve /metrics on, and no longer at -addr")
	fs.IntVar(&c.streams, "streams", bounds.streams, "most streams and waiting long-polls; 10,000 for 256 MiB of memory")
	fs.IntVar(&c.perAddr, "per-addr", 256, "most connections, and most streams and waiting long-polls, of one client address")
	fs.Float64Var(&c.rate, "rate", 50, "most publishes a second of one client address")
	fs.Float64Var(&c.roomRate, "room-rate", 1000, "most publishes a second to one room")
	fs.Int64Var(&c.body, "body", 64<<10, "most `bytes` of a publish")
	fs.IntVar(&c.maxUsers, "users", defaultLimits.maxUsers, "most users present, counted by room")
	fs.IntVar(&c.maxEvents, "events", defaultLimits.maxEvents, "messages that a room keeps")
	fs.IntVar(&c.maxRoomBytes, "room-bytes", defaultLimits.maxRoomBytes, "`bytes` of messages that a room keeps")
	fs.IntVar(&c.maxBytes, "all-bytes", bounds.logBytes, "`bytes` of messages that all rooms keep together, an eighth of the memory; the rooms idle longest lose theirs first")
	fs.IntVar(&c.maxRooms, "rooms", defaultLimits.maxRooms, "most rooms")
	fs.DurationVar(&c.roomIdle, "idle", defaultLimits.roomIdle, "a room that nobody reads or publishes to is forgotten after this time")
	fs.DurationVar(&c.presenceTTL, "present", defaultLimits.presenceTTL, "a user who polls is present for this time")

	fs.StringVar(&c.redis, "redis", "", "`URL` of a Redis that many relays share as one, redis://user:password@host:port/db or rediss:// for TLS; REDIS_URL is another way to say it") // layer: redis.go
	fs.StringVar(&c.redisPrefix, "redis-prefix", "cometes", "what the keys in Redis begin with: a `name` for each set of relays")                                                      // layer: redis.go
	fs.IntVar(&c.redisEvents, "redis-events", 10_000, "messages that Redis keeps, of all rooms, and as many signals")                                                                  // layer: redis.go

	c.fly = getenv("FLY_APP_NAME") != "" // https://fly.io/docs/machines/runtime-environment/

	var err error
	fs.VisitAll(func(f *flag.Flag) {
		name := "COMETES_" + strings.ToUpper(strings.ReplaceAll(f.Name, "-", "_"))
		f.Usage += " (" + name + ")"
		if v := getenv(name); v != "" {
			if e := fs.Set(f.Name, v); e != nil {
				err = cmp.Or(err, fmt.Errorf("%s=%q: %w", name, v, e))
			}
		}
	})
	if err == nil {
		err = fs.Parse(args)
	}
	c.redis = cmp.Or(c.redis, getenv("REDIS_URL")) // layer: redis.go (no default of the flag, since -help shows those)
	if err == nil && fs.NArg() > 0 {
		err = fmt.Errorf("%q is not a flag; -help lists them", fs.Arg(0))
	}
	return c, cmp.Or(err, c.check())
}

// check says which value is not possible.
func (c *config) check() error {
	switch {
	case c.beat < time.Second || c.roomIdle < time.Second || c.presenceTTL < time.Second:
		return errors.New("-beat, -idle and -present must be 1s or more")
	case c.age < 0:
		return errors.New("-age must not be negative")
	case c.maxEvents < 1 || c.maxRooms < 1 || c.maxUsers < 1 || c.streams < 1 || c.perAddr < 1 || c.body < 1:
		return errors.New("-events, -rooms, -users, -streams, -per-addr and -body must be 1 or more")
	case !(c.rate > 0) || !(c.roomRate > 0):
		return errors.New("-rate and -room-rate must be more than 0")
	case c.maxRoomBytes < 1 || c.maxBytes < c.maxRoomBytes:
		return errors.New("-room-bytes must be 1 or more, and -all-bytes not less than it")
	}
	return nil
}

const (
	headTimeout    = 10 * time.Second // to send a request's head
	requestTimeout = 20 * time.Second // to send all of it; the first of a connection counts from its start
	idleTimeout    = 2 * time.Minute  // between two requests of a connection
	answerTimeout  = time.Minute      // for answers that set no deadline of their own
	maxHeader      = 16 << 10         // bytes; net/http adds 4 KiB
	stopTimeout    = 3 * time.Second  // to end all streams; platforms kill after 5 or 10
)

// past is a deadline that ends what a connection is waiting for.
var past = time.Unix(1, 0)

// run serves until ctx is done, and then ends every stream with a bye before it returns.
func run(ctx context.Context, args []string, getenv func(string) string) error {
	memory, source := availableMemory(os.DirFS("/"))
	c, err := parseFlags(args, getenv, memory)
	if err != nil {
		return err
	}
	if c.healthcheck {
		return healthcheck(c.addr)
	}
	if source == "cgroup" && getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(memory/10*9 - 8<<20) // the rest is the kernel's, for sockets, and the program's own
	}
	a, err := newApp(c)
	if err != nil {
		return err
	}
	listener, err := net.Listen("tcp", c.addr)
	if err != nil {
		return err
	}
	err = a.stats.listen(c.metricsAddr) // layer: stats.go
	if err != nil {
		return err
	}
	if isTerminal(os.Stderr) {
		fmt.Fprintln(os.Stderr, greeting(listener.Addr().String(), c.secret != ""))
	} else {
		slog.Info("listening", "addr", listener.Addr().String(), "version", version(), "instance", a.instance,
			"memory", memory, "memory-from", source, "streams", c.streams, "all-bytes", c.maxBytes, "origins", c.origins, "trust-proxy", c.trustProxy, "tokens", c.secret != "")
		if c.secret == "" {
			slog.Warn("the relay is open: anybody may read and publish; -secret closes it")
		}
	}
	return serve(ctx, a, a.http(c.h2c), a.listen(listener))
}

// http returns the HTTP server.
func (a *app) http(h2c bool) *http.Server {
	srv := &http.Server{
		Handler:           a,
		ReadHeaderTimeout: headTimeout,
		ReadTimeout:       requestTimeout, // net/http lifts it when there is no more to read
		IdleTimeout:       idleTimeout,
		WriteTimeout:      answerTimeout, // a stream sets a deadline for each write, and so lasts
		MaxHeaderBytes:    maxHeader,
		ErrorLog:          slog.NewLogLogger(slog.Default().Handler(), slog.LevelDebug),
		Protocols:         new(http.Protocols),
	}
	srv.Protocols.SetHTTP1(true)
	srv.Protocols.SetUnencryptedHTTP2(h2c)
	srv.HTTP2 = &http.HTTP2Config{MaxReadFrameSize: 16 << 10, MaxReceiveBufferPerConnection: 64 << 10, MaxReceiveBufferPerStream: 64 << 10} // the least there is
	a.limiter.attach(srv)
	return srv
}

// listen returns the listener for http, around l. Beside what is held there are requests
// that come and go; a tenth of the connections is for them, and 100 at least.
func (a *app) listen(l net.Listener) *limitListener {
	most, perAddr := a.limiter.flags.streams, a.limiter.flags.perAddr
	if a.limiter.flags.trustProxy {
		perAddr = math.MaxInt // all come from the proxy
	}
	return newLimitListener(l, a.limiter, most+max(most/10, 100), perAddr, a.refused)
}

// healthcheck asks the relay at addr for its health.
func healthcheck(addr string) error {
	c := http.Client{Timeout: 3 * time.Second, Transport: &http.Transport{}} // without a proxy
	resp, err := c.Get("http://" + addr + "/healthz")                        // one without a host is this machine
	if err != nil {
		return err
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("the relay answers %s", resp.Status)
	}
	return nil
}

// release is set by the linker, for builds that cannot see the repository.
var release string

// version returns the release, or what the go command has found out.
func version() string {
	if info, ok := debug.ReadBuildInfo(); ok {
		return cmp.Or(release, info.Main.Version)
	}
	return release
}

// An app is the relay with all layers.
type app struct {
	*server
	handler  http.Handler
	limiter  *limiter
	pool     *writerPool // layer: async.go
	pictures *pictures   // layer: picture.go
	stats    *stats      // layer: stats.go
	redis    *redis      // layer: redis.go
}

func (a *app) ServeHTTP(w http.ResponseWriter, r *http.Request) { a.handler.ServeHTTP(w, r) }

// newApp puts the layers together. To remove one of those that lines here name in a comment,
// delete its file and these lines.
func newApp(c config) (*app, error) {
	access, err := newAccess(c)
	if err != nil {
		return nil, err
	}
	s := newServer(newRelay(c.limits))
	s.heartbeat, s.maxAge, s.maxBody = c.beat, c.age, c.body
	a := &app{server: s, handler: s, limiter: newLimiter(c)}
	if a.redis, err = newRedis(s, c.redis, c.redisPrefix, c.redisEvents); err != nil { // layer: redis.go
		return nil, err // layer: redis.go
	} // layer: redis.go
	a.pool = newWriterPool(s, c.trustProxy, a.limiter.receipts)        // layer: async.go
	a.pictures = newPictures(s)                                        // layer: picture.go
	a.stats = newStats(s, a.limiter)                                   // layer: stats.go
	a.stats.shared = a.redis.status                                    // layer: stats.go redis.go
	a.pictures.skipped = func(n int) { a.stats.skipped.Add(int64(n)) } // layer: stats.go picture.go
	a.pool.received = a.stats.received                                 // layer: stats.go async.go
	a.pool.newCounter = a.stats.newCounter                             // layer: stats.go async.go
	a.pool.dropped = a.limiter.dropped                                 // layer: async.go

	// From the inside out: what is added last sees a request first.
	a.handler = a.stats.wrap(a.handler) // layer: stats.go
	a.handler = wrapPages(s, a.handler)
	a.handler = a.redis.wrap(a.handler) // layer: redis.go
	a.handler = a.limiter.wrap(s, a.handler)
	a.handler = access.wrap(s, a.handler)
	return a, nil
}

// serve answers on the listener until ctx is done.
func serve(ctx context.Context, a *app, srv *http.Server, listener *limitListener) error {
	defer a.redis.close() // layer: redis.go
	failed := make(chan error, 1)
	a.pool.resume = listener.admit // layer: async.go
	go a.redis.run()               // layer: redis.go
	go func() { failed <- srv.Serve(listener) }()
	sweep := time.NewTicker(a.relay.roomIdle / 10)
	defer sweep.Stop()
	for ctx.Err() == nil {
		select {
		case now := <-sweep.C:
			a.relay.sweep(now)
		case err := <-failed:
			return err
		case <-ctx.Done():
		}
	}

	slog.Info("stopping", "held", a.active())
	// The listener is closed first, so that who is sent away doesn't come back
	// to us; then the streams end, and the requests that wait.
	srv.RegisterOnShutdown(a.stop)
	within, cancel := context.WithTimeout(context.Background(), stopTimeout)
	defer cancel()
	err := srv.Shutdown(within)
	// A stream that was taken over is no request any more; Shutdown does not wait for it.
	for a.active() > 0 && within.Err() == nil {
		time.Sleep(10 * time.Millisecond)
	}
	if err != nil {
		err = srv.Close()
	}
	slog.Info("stopped", "held", a.active())
	return err
}

// stop ends every stream.
func (a *app) stop() {
	a.pictures.drawAll() // layer: picture.go
	a.server.stop()
	a.pool.wakeAll() // layer: async.go
}
