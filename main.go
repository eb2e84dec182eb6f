// Cometes is an event relay: what is published to a room reaches everybody who
// reads it, by whichever comet technique they can. One process, in memory.
//
// This file is the program around it: settings, listening, and stopping. Read on
// in relay.go.

package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	err := run(ctx, os.Args[1:], os.Getenv)
	switch {
	case errors.Is(err, flag.ErrHelp):
	case err != nil:
		fmt.Fprintln(os.Stderr, "cometes:", err)
		os.Exit(1)
	}
}

// settings are what somebody in production decides.
type settings struct {
	addr    string
	origins string
	beat    time.Duration
	limits
}

// parse reads the flags, and for each that is not given its environment
// variable: COMETES_ and the name in capitals, COMETES_ROOM_BYTES for
// -room-bytes.
func parse(args []string, getenv func(string) string) (settings, error) {
	var c settings
	fs := flag.NewFlagSet("cometes", flag.ContinueOnError)
	fs.StringVar(&c.addr, "addr", ":"+cmp.Or(getenv("PORT"), "8080"), "`address` to listen on; PORT, as the platforms set it, is another way to say the port")
	fs.StringVar(&c.origins, "origins", "", "whose pages may read and publish, beside the relay's own: a `list` such as https://a.example,https://b.example, or * for all")
	fs.DurationVar(&c.beat, "beat", 15*time.Second, "a silent stream is sent a heartbeat in this time; less than the proxies in between wait")
	fs.IntVar(&c.events, "events", 256, "messages that a room keeps")
	fs.IntVar(&c.roomBytes, "room-bytes", 1<<20, "`bytes` of messages that a room keeps")
	fs.IntVar(&c.allBytes, "all-bytes", 32<<20, "`bytes` of messages that all rooms keep together; the rooms idle longest lose theirs first")
	fs.IntVar(&c.rooms, "rooms", 10_000, "rooms there may be")
	fs.DurationVar(&c.idle, "idle", 10*time.Minute, "a room that nobody reads or publishes to for so long is forgotten")
	fs.DurationVar(&c.present, "present", time.Minute, "who polls is present for so long after they asked")

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
	if err != nil {
		return c, err
	}
	if err := fs.Parse(args); err != nil {
		return c, err
	}
	if fs.NArg() > 0 {
		return c, fmt.Errorf("%q is not a flag; -help lists them", fs.Arg(0))
	}
	for name, ok := range map[string]bool{
		"-beat is 1s or more":                    c.beat >= time.Second,
		"-events is 1 or more":                   c.events >= 1,
		"-room-bytes is 65536 or more":           c.roomBytes >= maxBody,
		"-all-bytes is no less than -room-bytes": c.allBytes >= c.roomBytes,
		"-rooms is 1 or more":                    c.rooms >= 1,
		"-idle and -present are 1s or more":      c.idle >= time.Second && c.present >= time.Second,
	} {
		if !ok {
			return c, errors.New(name)
		}
	}
	return c, nil
}

const (
	headerTimeout = 10 * time.Second // to send a request's head
	idleTimeout   = 2 * time.Minute  // between two requests of a connection
	answerTimeout = time.Minute      // for what sets no deadline of its own
	maxHeader     = 16 << 10         // bytes; net/http adds 4 KiB
	stopTimeout   = 4 * time.Second  // for everybody to be told and gone; platforms kill after 5 or 10
)

// run serves until ctx is done, and then ends every stream with a bye before it returns.
func run(ctx context.Context, args []string, getenv func(string) string) error {
	c, err := parse(args, getenv)
	if err != nil {
		return err
	}
	s, err := newServer(c)
	if err != nil {
		return err
	}
	listener, err := net.Listen("tcp", c.addr)
	if err != nil {
		return err
	}
	srv := &http.Server{
		Handler:           s,
		ReadHeaderTimeout: headerTimeout,
		IdleTimeout:       idleTimeout,
		WriteTimeout:      answerTimeout, // a stream sets a deadline for each write, and so lasts
		MaxHeaderBytes:    maxHeader,
		ErrorLog:          slog.NewLogLogger(slog.Default().Handler(), slog.LevelDebug),
	}
	slog.Info("listening", "addr", listener.Addr().String(), "instance", s.instance)
	return serve(ctx, s, srv, listener)
}

// newServer makes a server that does not listen yet.
func newServer(c settings) (*server, error) {
	origins, err := newOrigins(c.origins)
	if err != nil {
		return nil, err
	}
	s := &server{
		relay:    newRelay(c.limits),
		origins:  origins,
		beat:     c.beat,
		instance: rand.Text()[:8],
		drawings: map[pictureOf]*drawing{},
	}
	s.stats.started, s.stats.tallies = time.Now(), newTallies()
	return s, nil
}

// serve answers on the listener until ctx is done.
func serve(ctx context.Context, s *server, srv *http.Server, listener net.Listener) error {
	failed := make(chan error, 1)
	go func() { failed <- srv.Serve(listener) }()
	sweep := time.NewTicker(s.relay.idle / 10)
	defer sweep.Stop()
	for ctx.Err() == nil {
		select {
		case now := <-sweep.C:
			s.relay.sweep(now)
		case err := <-failed:
			return err
		case <-ctx.Done():
		}
	}

	slog.Info("stopping", "streams", s.streams.Load())
	// The listener is closed first, so that who is sent away doesn't come back
	// to us; then the streams end, and with them their requests.
	srv.RegisterOnShutdown(s.stop)
	within, cancel := context.WithTimeout(context.Background(), stopTimeout)
	defer cancel()
	err := srv.Shutdown(within)
	// WebSockets are no requests any more; Shutdown does not wait for them.
	for s.streams.Load() > 0 && within.Err() == nil {
		time.Sleep(10 * time.Millisecond)
	}
	if err != nil {
		err = srv.Close()
	}
	slog.Info("stopped", "streams", s.streams.Load())
	return err
}

// stop ends every stream.
func (s *server) stop() {
	s.relay.stop()
	s.pump.wakeAll()
}
