//go:build linux

// Abuse. A real relay in a process of its own, on loopback, and beside every
// flood honest clients who must not notice.

package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// The relay as a process. The test's own binary is one, if the environment says so.

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

// A child is a relay in a process of its own.
type child struct {
	t    testing.TB
	cmd  *exec.Cmd
	addr string
	log  *syncedLog
	http *http.Client // what speaks to it beside the flood, on one connection
}

// startRelay starts one with the flags args, on a free port.
func startRelay(t testing.TB, env []string, args ...string) *child {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	c := &child{t: t, log: &syncedLog{}, http: &http.Client{Transport: &http.Transport{}, Timeout: 10 * time.Second}}
	c.cmd = exec.Command(self, append([]string{"-addr", "127.0.0.1:0"}, args...)...)
	c.cmd.Env = append(append(os.Environ(), "COMETES_TEST_RELAY=1"), env...)
	r, w := io.Pipe()
	c.cmd.Stderr = io.MultiWriter(c.log, w)
	if err := c.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.stop() })
	time.AfterFunc(20*time.Second, func() { r.CloseWithError(io.ErrUnexpectedEOF) })
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		var line struct{ Message, Addr string }
		if json.Unmarshal(lines.Bytes(), &line) == nil && line.Message == "listening" {
			c.addr = line.Addr
			break
		}
	}
	go io.Copy(io.Discard, r)
	if c.addr == "" {
		t.Fatalf("the relay did not start:\n%s", c.log)
	}
	return c
}

// stop ends the relay as a platform does, and returns how.
func (c *child) stop() error {
	if c.cmd.ProcessState != nil {
		return nil
	}
	c.cmd.Process.Signal(syscall.SIGTERM)
	kill := time.AfterFunc(10*time.Second, func() { c.cmd.Process.Kill() })
	defer kill.Stop()
	return c.cmd.Wait()
}

// get asks on the honest connection.
func (c *child) get(path string) (int, string, error) {
	resp, err := c.http.Get("http://" + c.addr + path)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(b), err
}

func (c *child) metric(name string) float64 {
	c.t.Helper()
	_, text, err := c.get("/metrics")
	if err != nil {
		c.t.Fatal(err)
	}
	return metricOf(c.t, text, name)
}

func (c *child) refusals(reason string) int {
	c.t.Helper()
	return int(c.metric(fmt.Sprintf("refused_total{reason=%q}", reason)))
}

// descriptors is how many the process has open.
func (c *child) descriptors() int {
	c.t.Helper()
	all, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", c.cmd.Process.Pid))
	if err != nil {
		c.t.Skip("this system does not show a process's descriptors: ", err)
	}
	return len(all)
}

// cpu is how much processor time it has used.
func (c *child) cpu() time.Duration {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", c.cmd.Process.Pid))
	_, rest, _ := strings.Cut(string(b), ") ")
	f := strings.Fields(rest)
	if len(f) < 13 {
		return 0
	}
	user, _ := strconv.Atoi(f[11])
	system, _ := strconv.Atoi(f[12])
	return time.Duration(user+system) * 10 * time.Millisecond
}

// eventually waits for something to become so.
func eventually(t testing.TB, within time.Duration, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(within); !is(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Errorf("not within %v: %s", within, what)
			return
		}
	}
}

func TestOutOfDescriptorsItRefusesWithAnAnswerAndDoesNotSpin(t *testing.T) {
	c := startRelay(t, []string{"COMETES_TEST_NOFILE=48"})
	before := c.descriptors()
	var mu sync.Mutex
	var conns []net.Conn
	answers := map[string]int{}
	ask := func() {
		conn, err := net.Dial("tcp", c.addr)
		if err != nil {
			t.Error(err)
			return
		}
		io.WriteString(conn, "GET /rooms/a/stream HTTP/1.1\r\nHost: x\r\n\r\n")
		conn.SetReadDeadline(time.Now().Add(5 * time.Second))
		b := make([]byte, 1024)
		n, err := conn.Read(b)
		first, rest, _ := strings.Cut(string(b[:n]), "\r\n")
		if strings.Contains(first, "503") && !strings.Contains(rest, "Retry-After: ") {
			t.Errorf("refused without Retry-After: %s", b[:n])
		}
		if n == 0 {
			first = err.Error()
			if strings.Contains(first, "reset") { // it was closed with our request unread
				first = "reset"
			}
		}
		mu.Lock()
		defer mu.Unlock()
		answers[first]++
		conns = append(conns, conn)
	}
	for range 200 {
		ask()
	}
	t.Log(answers)
	if n := answers["HTTP/1.1 200 OK"]; n < 20 || n > 48 {
		t.Errorf("%d streams with 48 descriptors: %v", n, answers)
	}
	// The refusal goes out before the connection is closed, but the kernel takes it back from
	// a client that has sent what was not read. Most have not by then.
	if n := answers["HTTP/1.1 503 Service Unavailable"]; n < 100 {
		t.Errorf("%d of 200 had an answer: %v", n, answers)
	}
	if n := answers["HTTP/1.1 200 OK"] + answers["HTTP/1.1 503 Service Unavailable"] + answers["reset"]; n != 200 {
		t.Errorf("some had no end: %v", answers)
	}

	// Many who wait to be let in at once, while there is no descriptor.
	start := c.cpu()
	var wg sync.WaitGroup
	for range 300 {
		wg.Go(ask)
	}
	wg.Wait()
	time.Sleep(500 * time.Millisecond)
	if d := c.cpu() - start; d > 400*time.Millisecond {
		t.Errorf("it used %v of processor time to refuse 300", d)
	}
	for _, conn := range conns {
		conn.Close()
	}
	eventually(t, 3*time.Second, "recovered", func() bool { status, _, _ := c.get("/healthz"); return status == 200 })
	if n := c.refusals("descriptors"); n < 400 || n > 500 {
		t.Errorf("%d refusals are counted under descriptors, want all but those let in of 500", n)
	}
	eventually(t, 3*time.Second, "the descriptors are given back", func() bool { return c.descriptors() <= before+3 })
	if err := c.stop(); err != nil {
		t.Errorf("it ended with %v:\n%s", err, c.log)
	}
}
