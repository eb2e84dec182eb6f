// The protocol of Redis, RESP (https://redis.io/docs/latest/develop/reference/protocol-spec/),
// as far as redis.go needs it. A command is an array of strings; a reply begins with a
// letter that says what it is. No reply takes more memory than its bound.

package main

import (
	"bufio"
	"bytes"
	"cmp"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"
)

// A redisError is what Redis says of a command that it refused.
type redisError string

func (e redisError) Error() string {
	for _, known := range [][2]string{
		{"READONLY", "this Redis is a replica, which cannot be written to"},
		{"WRONGTYPE", "a key holds something else; -redis-prefix chooses other keys"},
		{"WRONGPASS", "the user or the password in the URL is wrong"},
		{"NOAUTH", "this Redis wants a password, redis://:password@host"},
		{"nknown command", "this Redis is too old, or not whole: it takes streams and scripts, so version 5 or later"},
	} {
		if strings.Contains(string(e), known[0]) {
			return known[1] + ": " + string(e)
		}
	}
	return string(e)
}

var (
	errProtocol = errors.New("what answers is not Redis")
	errNotSent  = errors.New("the connection has ended")
	errNoReply  = errors.New("no answer")
)

// A redisTarget is what a URL says.
type redisTarget struct {
	addr, user, password, db string

	tls     *tls.Config
	maxBulk int // bytes of one string of a reply
}

// parseRedisURL reads redis://user:password@host:port/db, or rediss:// for TLS. Its errors do
// not quote the URL, since that may hold a password.
func parseRedisURL(raw string) (*redisTarget, error) {
	u, err := url.Parse(raw)
	if err != nil {
		u = &url.URL{}
	}
	t := &redisTarget{addr: net.JoinHostPort(u.Hostname(), cmp.Or(u.Port(), "6379")), user: u.User.Username(), db: strings.Trim(u.Path, "/")}
	t.password, _ = u.User.Password()
	_, noNumber := strconv.ParseUint(cmp.Or(t.db, "0"), 10, 16)
	wrong := ""
	switch {
	case err != nil:
		wrong = "this is none. A special character of the password is written as in any URL, @ as %40"
	case u.Scheme != "redis" && u.Scheme != "rediss":
		wrong = "it begins otherwise"
	case u.Hostname() == "":
		wrong = "it names no host"
	case u.RawQuery != "" || u.Fragment != "":
		wrong = "it has a ? or a #"
	case t.user != "" && t.password == "":
		wrong = "it has a user without a password; a password alone is redis://:password@host"
	case noNumber != nil:
		wrong = "its path is not the number of a database"
	}
	if wrong != "" {
		return nil, fmt.Errorf("the URL of Redis is redis://user:password@host:port/db, or rediss:// for TLS; %s", wrong)
	}
	if u.Scheme == "rediss" {
		t.tls = &tls.Config{ServerName: u.Hostname()}
	}
	return t, nil
}

// A redisConn is a connection for one command at a time.
type redisConn struct {
	net.Conn
	r       *bufio.Reader
	maxBulk int
}

// replyTimeout is how long a connection may be without an answer.
const replyTimeout = 1500 * time.Millisecond

// dial connects, and says who we are.
func (t *redisTarget) dial() (*redisConn, error) {
	dialer := &net.Dialer{Timeout: replyTimeout}
	conn, err := dialer.Dial("tcp", t.addr)
	if err != nil {
		return nil, err
	}
	conn.SetDeadline(time.Now().Add(replyTimeout))
	if t.tls != nil {
		conn = tls.Client(conn, t.tls)
	}
	c := &redisConn{conn, bufio.NewReaderSize(conn, 32<<10), t.maxBulk}
	var commands [][]any
	switch {
	case t.user != "":
		commands = append(commands, []any{"AUTH", t.user, t.password})
	case t.password != "":
		commands = append(commands, []any{"AUTH", t.password})
	}
	for _, command := range append(commands, []any{"SELECT", cmp.Or(t.db, "0")}) {
		if _, err := c.do(command...); err != nil {
			c.Close()
			return nil, err
		}
	}
	c.SetDeadline(time.Time{})
	return c, nil
}

// do sends a command, and returns its reply.
func (c *redisConn) do(args ...any) (any, error) {
	if _, err := c.Write(appendCommand(nil, args)); err != nil {
		return nil, err
	}
	reply, err := c.readReply(0)
	if e, ok := reply.(redisError); ok {
		return nil, e
	}
	return reply, err
}

// appendCommand appends a command of strings, bytes and numbers.
func appendCommand(b []byte, args []any) []byte {
	b = append(strconv.AppendInt(append(b, '*'), int64(len(args)), 10), "\r\n"...)
	for _, arg := range args {
		var s string
		switch v := arg.(type) {
		case string:
			s = v
		case []byte:
			b = append(strconv.AppendInt(append(b, '$'), int64(len(v)), 10), "\r\n"...)
			b = append(append(b, v...), "\r\n"...)
			continue
		default:
			s = fmt.Sprint(v)
		}
		b = append(strconv.AppendInt(append(b, '$'), int64(len(s)), 10), "\r\n"...)
		b = append(append(b, s...), "\r\n"...)
	}
	return b
}

// readReply reads a reply: nil, a redisError, int64, []byte or []any. A string that is too
// long to be ours is read as nil. The bounds are those of what we ask for.
func (c *redisConn) readReply(depth int) (any, error) {
	const maxDepth, maxItems, maxString = 8, 1 << 20, 512 << 20
	line, err := c.r.ReadSlice('\n')
	if err != nil && err != bufio.ErrBufferFull {
		return nil, err
	}
	text, ok := strings.CutSuffix(string(line), "\r\n")
	if !ok || text == "" {
		return nil, fmt.Errorf("%w: it says %.60q", errProtocol, line)
	}
	n, err := strconv.ParseInt(text[1:], 10, 64)
	switch kind := text[0]; {
	case kind == '+':
		return []byte(text[1:]), nil
	case kind == '-':
		return redisError(text[1:]), nil
	case err != nil:
	case kind == ':':
		return n, nil
	case n == -1 && (kind == '$' || kind == '*'):
		return nil, nil
	case kind == '$' && n > int64(c.maxBulk) && n <= maxString:
		_, err := io.CopyN(io.Discard, c.r, n+2)
		return nil, err
	case kind == '$' && n >= 0 && n <= int64(c.maxBulk):
		b := make([]byte, n+2)
		if _, err := io.ReadFull(c.r, b); err != nil || bytes.HasSuffix(b, []byte("\r\n")) {
			return b[:n], err
		}
	case kind == '*' && n >= 0 && n <= maxItems && depth < maxDepth:
		values := []any{} // grows as values come, not as the number says
		for range n {
			v, err := c.readReply(depth + 1)
			if err != nil {
				return nil, err
			}
			values = append(values, v)
		}
		return values, nil
	}
	return nil, fmt.Errorf("%w: it says %.60q", errProtocol, text)
}

// asList returns an array, and nil for anything else.
func asList(reply any) []any {
	values, _ := reply.([]any)
	return values
}

// asString returns a string, and "" for anything else.
func asString(reply any) string {
	b, _ := reply.([]byte)
	return string(b)
}

// asNumber returns the number in a string, or 0.
func asNumber(s string) int64 {
	n, _ := strconv.ParseInt(s, 10, 64)
	return n
}

// asHash returns the fields of a hash.
func asHash(reply any) map[string]string {
	values, fields := asList(reply), map[string]string{}
	for i := 0; i+1 < len(values); i += 2 {
		fields[asString(values[i])] = asString(values[i+1])
	}
	return fields
}

// A pipeline is a connection that many use at once. What they send while one of them
// writes goes out together; replies come in the same order.
type pipeline struct {
	conn   *redisConn
	failed chan struct{} // closed when it has ended

	mu      sync.Mutex // guards what follows
	unsent  []byte
	writing bool         // somebody writes, and will write what is unsent, too
	calls   []*redisCall // without a reply yet, the oldest first
	err     error        // why it has ended
}

// A redisCall is a command on its way.
type redisCall struct {
	reply any
	err   error
	done  chan struct{} // closed when it has its reply, or never will
}

func newPipeline(conn *redisConn) *pipeline {
	p := &pipeline{conn: conn, failed: make(chan struct{})}
	go p.read()
	return p
}

// do sends a command, and waits for its reply. The error is errNotSent if Redis cannot have
// got it. Who waits in vain for replyTimeout ends the connection.
func (p *pipeline) do(timeout time.Duration, args ...any) (any, error) {
	c := &redisCall{done: make(chan struct{})}
	p.mu.Lock()
	if p.err != nil {
		p.mu.Unlock()
		return nil, errNotSent
	}
	p.unsent = appendCommand(p.unsent, args)
	p.calls = append(p.calls, c)
	if !p.writing {
		p.writeLocked()
	}
	p.mu.Unlock()
	timer := time.NewTimer(timeout)
	defer timer.Stop()
	select {
	case <-c.done:
		return c.reply, c.err
	case <-timer.C:
		if timeout >= replyTimeout {
			p.fail(errNoReply)
		}
		return nil, errNoReply
	}
}

// writeLocked writes, also for those who come meanwhile. It unlocks p.mu while it does.
func (p *pipeline) writeLocked() {
	p.writing = true
	for len(p.unsent) > 0 && p.err == nil {
		b := p.unsent
		p.unsent = nil
		p.mu.Unlock()
		p.conn.SetWriteDeadline(time.Now().Add(replyTimeout))
		if _, err := p.conn.Write(b); err != nil {
			p.fail(err)
		}
		p.mu.Lock()
	}
	p.writing = false
}

func (p *pipeline) read() {
	for {
		reply, err := p.conn.readReply(0)
		p.mu.Lock()
		if err == nil && len(p.calls) == 0 {
			err = errProtocol
		}
		if err != nil {
			p.mu.Unlock()
			p.fail(err)
			return
		}
		c := p.calls[0]
		p.calls = p.calls[1:]
		p.mu.Unlock()
		if c.reply = reply; reply != nil {
			c.err, _ = reply.(error)
		}
		close(c.done)
	}
}

// fail ends the connection, and all calls that wait.
func (p *pipeline) fail(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.err != nil {
		return
	}
	p.err = err
	p.conn.Close()
	for _, c := range p.calls {
		c.err = fmt.Errorf("no answer: %w", err)
		close(c.done)
	}
	p.calls = nil
	close(p.failed)
}
