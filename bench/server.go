package main

import (
	"bufio"
	"bytes"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

//go:embed nchan.conf
var nchanConf string

// A server is one process, fresh for every row of a table: the relay, the floor, nchan, or the
// bare net/http handler. All are asked at the same paths. relay1 is the relay on one processor,
// as in a small container; nchan has one worker, too.
type server struct {
	name, addr string
	cmd        *exec.Cmd // nil for a relay that somebody else has started
	pids       []int
	ended      chan error // has one value once cmd ended
	cgroup     *cgroup
	once       sync.Once
	remarks    string // about how it ended
}

var errAbsent = errors.New("nginx with nchan is not installed (apt-get install nginx libnginx-mod-nchan)")

// build makes the relay's binary as it is deployed, unless one was given.
func (b *bench) build(ctx context.Context) (path string, err error) {
	if b.bin == "" {
		b.bin = filepath.Join(b.tmp, "cometes")
		cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags=-s -w", "-o", b.bin, "cometes")
		cmd.Stderr = os.Stderr
		if err := cmd.Run(); err != nil {
			return "", fmt.Errorf("go build cometes: %w", err)
		}
	}
	return filepath.Abs(b.bin)
}

func (b *bench) start(ctx context.Context, name string, keep int) (*server, error) {
	if name == "relay" && b.addr != "" {
		return &server{name: name, addr: b.addr, pids: []int{b.pid}}, nil
	}
	s := &server{name: name, addr: freeAddr(), ended: make(chan error, 1)}
	var args []string
	switch name {
	case "relay", "relay1", "redis":
		bin, err := b.build(ctx)
		if err != nil {
			return nil, err
		}
		args = []string{bin, "-addr", s.addr}
		if name == "redis" {
			args = append(args, "-redis", b.redisURL)
		}
		if keep > 0 {
			args = append(args, "-events", strconv.Itoa(keep))
		}
		args = append(args, strings.Fields(b.args)...)
		if b.cgroupMax > 0 {
			if s.cgroup, err = newCgroup(b.cgroupMax); err != nil {
				return nil, err
			}
			args = s.cgroup.wrap(args)
		}
	case "nchan":
		module, _ := filepath.Glob("/usr/lib*/nginx/modules/ngx_nchan_module.so")
		nginx, err := exec.LookPath("nginx")
		if err != nil || len(module) == 0 {
			return nil, errAbsent
		}
		dir, err := os.MkdirTemp(b.tmp, "nchan")
		if err != nil {
			return nil, err
		}
		conf := strings.NewReplacer("DIR", dir, "PORT", strconv.Itoa(portOf(s.addr)), "MODULE", module[0]).Replace(nchanConf)
		file := filepath.Join(dir, "nchan.conf")
		if err := os.WriteFile(file, []byte(conf), 0o644); err != nil {
			return nil, err
		}
		args = []string{nginx, "-p", dir, "-e", dir + "/error.log", "-c", file}
	default: // this program is them too
		self, err := os.Executable()
		if err != nil {
			return nil, err
		}
		args = []string{self, name, s.addr}
	}
	log, err := os.Create(filepath.Join(b.tmp, name+".log"))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	s.cmd = exec.CommandContext(ctx, args[0], args[1:]...)
	s.cmd.Stdout, s.cmd.Stderr = log, log
	if name == "relay1" {
		s.cmd.Env = append(os.Environ(), "GOMAXPROCS=1")
	}
	s.cmd.Cancel = s.kill
	killWithParent(s.cmd)
	if err := s.cmd.Start(); err != nil {
		return nil, err
	}
	go func() { s.ended <- s.cmd.Wait() }()
	for {
		conn, err := net.Dial("tcp", s.addr)
		if err == nil {
			conn.Close()
			break
		}
		select {
		case err := <-s.ended:
			out, _ := os.ReadFile(log.Name())
			return nil, fmt.Errorf("%s ended: %v\n%.2000s", name, err, out)
		case <-time.After(500 * time.Microsecond):
		}
	}
	s.pids = []int{s.cmd.Process.Pid}
	if name == "nchan" {
		if err := pause(ctx, 300*time.Millisecond); err != nil { // for the worker
			s.stop()
			return nil, err
		}
		s.pids = append(s.pids, children(s.pids[0])...)
	}
	return s, nil
}

// kill is no gentle stop, except for nginx, whose master must end its workers.
func (s *server) kill() error {
	if s.name == "nchan" {
		return s.cmd.Process.Signal(syscall.SIGTERM)
	}
	return s.cmd.Process.Kill()
}

// stop ends the server. What it says is empty unless the server had ended before, or was limited.
func (s *server) stop() (remarks string) {
	s.once.Do(func() {
		if s.cmd == nil {
			return
		}
		select {
		case err := <-s.ended:
			s.remarks = fmt.Sprintf("the server ended by itself: %v. ", err)
		default:
			s.kill()
			<-s.ended
		}
		if s.cgroup != nil {
			s.remarks += s.cgroup.report()
			s.cgroup.remove()
		}
	})
	return s.remarks
}

func freeAddr() string {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		panic(err)
	}
	defer ln.Close()
	return ln.Addr().String()
}

func portOf(addr string) int {
	_, p, _ := net.SplitHostPort(addr)
	port, _ := strconv.Atoi(p)
	return port
}

// A caller makes requests one after the other on one kept connection. http.Client would take
// several times the CPU, from the cores that the server needs.
type caller struct {
	conn net.Conn
	r    *bufio.Reader
	buf  []byte
}

func dial(ctx context.Context, addr string) (*caller, error) {
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	if t, ok := ctx.Deadline(); ok {
		conn.SetDeadline(t)
	}
	context.AfterFunc(ctx, func() { conn.Close() })
	return &caller{conn: conn, r: bufio.NewReader(conn)}, nil
}

func (c *caller) do(method, path, contentType string, body []byte) (answer []byte, err error) {
	c.buf = fmt.Appendf(c.buf[:0], "%s %s HTTP/1.1\r\n%s", method, path, leanHead)
	if body != nil {
		c.buf = fmt.Appendf(c.buf, "Content-Type: %s\r\nContent-Length: %d\r\n", contentType, len(body))
	}
	c.buf = append(append(c.buf, "\r\n"...), body...)
	if _, err := c.conn.Write(c.buf); err != nil {
		return nil, err
	}
	status, length := "", 0
	for {
		line, err := c.r.ReadSlice('\n')
		if err != nil {
			return nil, err
		}
		line = bytes.TrimSpace(line)
		if status == "" {
			status = string(line)
		} else if len(line) == 0 {
			break
		} else if name, value, _ := bytes.Cut(line, []byte(": ")); bytes.EqualFold(name, []byte("content-length")) {
			length = int(number(value))
		}
	}
	answer = make([]byte, length)
	if _, err := io.ReadFull(c.r, answer); err != nil {
		return nil, err
	}
	if !strings.HasPrefix(status, "HTTP/1.1 2") {
		return answer, fmt.Errorf("%s %s: %s %.200s", method, path, status, answer)
	}
	return answer, nil
}
