//go:build linux

// The relay as a process of its own, for the tests that take long: floods, the soak, and
// real proxies in front of it.

package main

import (
	"bufio"
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

var relayDir string // for the relay's binary

func TestMain(m *testing.M) {
	relayDir, _ = os.MkdirTemp("", "cometes")
	defer os.RemoveAll(relayDir)
	m.Run()
}

// buildRelay builds the relay, once: its test binary, which is a relay if the environment
// says so (see socket_linux_test.go).
var buildRelay = sync.OnceValues(func() (string, error) {
	path := filepath.Join(relayDir, "relay")
	if out, err := exec.Command("go", "test", "-c", "-o", path, "cometes").CombinedOutput(); err != nil {
		return "", fmt.Errorf("go test -c cometes: %w\n%s", err, out)
	}
	return path, nil
})

// A technique is one of the relay's, with how long it holds a request.
type technique struct{ name, mode string }

var techniques = []technique{
	{"refresh", "immediate"}, {"multipart", "streaming"}, {"html", "streaming"}, {"poll", "immediate"}, {"iframe", "streaming"},
	{"longpoll", "longPoll"}, {"stream", "streaming"}, {"jsonp", "longPoll"}, {"sse", "streaming"}, {"ws", "streaming"},
}

// A child is a relay in a process of its own.
type child struct {
	t    testing.TB
	cmd  *exec.Cmd
	addr string
	log  *syncedLog
	http *http.Client // a client with one connection, independent of floods
}

// startRelay starts a relay with the given flags, on a free port.
func startRelay(t testing.TB, env []string, args ...string) *child {
	t.Helper()
	binary, err := buildRelay()
	if err != nil {
		t.Fatal(err)
	}
	c := &child{t: t, log: &syncedLog{}, http: &http.Client{Transport: &http.Transport{}, Timeout: 10 * time.Second}}
	c.cmd = exec.Command(binary, append([]string{"-addr", "127.0.0.1:0"}, args...)...)
	c.cmd.Env = append(append(os.Environ(), "COMETES_TEST_RELAY=1"), env...)
	r, w := io.Pipe()
	c.cmd.Stderr = io.MultiWriter(c.log, w)
	if err := c.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.stop() })
	defer time.AfterFunc(20*time.Second, func() { r.CloseWithError(io.ErrUnexpectedEOF) }).Stop()
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

// stop ends the relay with SIGTERM, and returns its error.
func (c *child) stop() error {
	if c.cmd.ProcessState != nil {
		return nil
	}
	c.cmd.Process.Signal(syscall.SIGTERM)
	kill := time.AfterFunc(10*time.Second, func() { c.cmd.Process.Kill() })
	defer kill.Stop()
	return c.cmd.Wait()
}

// get makes a request on the client's own connection.
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

// descriptors returns how many the process has open.
func (c *child) descriptors() int {
	c.t.Helper()
	all, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", c.cmd.Process.Pid))
	if err != nil {
		c.t.Skip("this system does not show a process's descriptors: ", err)
	}
	return len(all)
}

// cpu returns the processor time it has used.
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

const webSocketHead = "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"

// unsent returns how many bytes the kernel holds that the relay has written and no
// client has read.
func (c *child) unsent() (n int64) {
	b, err := os.ReadFile("/proc/net/tcp")
	_, port, _ := strings.Cut(c.addr, ":")
	number, _ := strconv.Atoi(port)
	if err != nil {
		c.t.Skip("this system does not show its connections: ", err)
	}
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) > 4 && strings.HasSuffix(f[1], fmt.Sprintf(":%04X", number)) {
			queue, _, _ := strings.Cut(f[4], ":")
			q, _ := strconv.ParseInt(queue, 16, 64)
			n += q
		}
	}
	return n
}

// eventually waits for a condition in real time.
func eventually(t testing.TB, within time.Duration, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(within); !is(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Errorf("not within %v: %s", within, what)
			return
		}
	}
}

func metricOf(t testing.TB, text, name string) (value float64) {
	t.Helper()
	_, rest, ok := strings.Cut(text, "\ncometes_"+name+" ")
	if _, err := fmt.Sscan(rest, &value); !ok || err != nil {
		t.Fatalf("there is no metric %s", name)
	}
	return value
}

// A syncedLog is a log that several goroutines may write to.
type syncedLog struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *syncedLog) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(b)
}

func (l *syncedLog) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// maskedFrame returns a client's frame.
func maskedFrame(opcode byte, text string) []byte {
	b := []byte{0x80 | opcode, 0x80 | byte(len(text))}
	if len(text) > 125 {
		b = binary.BigEndian.AppendUint16([]byte{0x80 | opcode, 0x80 | 126}, uint16(len(text)))
	}
	return append(append(b, 0, 0, 0, 0), text...)
}

// secret is what the tokens of these tests are signed with.
const secret = "one secret that is thirty-two bytes"

// signToken makes a token.
func signToken(claims string) string {
	b64 := base64.RawURLEncoding.EncodeToString
	signed := b64([]byte(`{"alg":"HS256","typ":"JWT"}`)) + "." + b64([]byte(claims))
	h := hmac.New(sha256.New, []byte(secret))
	h.Write([]byte(signed))
	return signed + "." + b64(h.Sum(nil))
}
