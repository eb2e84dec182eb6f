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
	"slices"
	"strconv"
	"strings"
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
	maxText int // see redisConn
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
	out     []byte // what was sent last, for its memory
	maxText int    // bytes of one string of a reply
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
	conn = newSocket(conn)
	conn.SetDeadline(time.Now().Add(replyTimeout))
	if t.tls != nil {
		conn = tls.Client(conn, t.tls)
	}
	c := &redisConn{Conn: conn, r: bufio.NewReaderSize(conn, 32<<10), maxText: t.maxText}
	var commands [][]string
	switch {
	case t.user != "":
		commands = append(commands, []string{"AUTH", t.user, t.password})
	case t.password != "":
		commands = append(commands, []string{"AUTH", t.password})
	}
	for _, command := range append(commands, []string{"SELECT", cmp.Or(t.db, "0")}) {
		if _, err := c.do(command...); err != nil {
			c.Close()
			return nil, err
		}
	}
	c.SetDeadline(time.Time{})
	return c, nil
}

// do sends a command, and returns its reply.
func (c *redisConn) do(args ...string) (reply, error) {
	return c.send(appendCommand(c.out[:0], args...))
}

// send sends commands that are encoded, and returns the first reply.
func (c *redisConn) send(commands []byte) (reply, error) {
	c.out = commands
	if _, err := c.Write(commands); err != nil {
		return reply{}, err
	}
	return c.receive()
}

// receive returns the next reply. The error is a redisError if that is a refusal.
func (c *redisConn) receive() (reply, error) {
	r, err := c.readReply(0)
	return r, cmp.Or(err, r.refusal)
}

func appendCommand(b []byte, args ...string) []byte {
	b = append(strconv.AppendInt(append(b, '*'), int64(len(args)), 10), "\r\n"...)
	for _, arg := range args {
		b = append(strconv.AppendInt(append(b, '$'), int64(len(arg)), 10), "\r\n"...)
		b = append(append(b, arg...), "\r\n"...)
	}
	return b
}

// A reply is a text, a list of replies, or a refusal. A number is a text, too.
type reply struct {
	text    string
	list    []reply
	refusal error // a redisError
}

// readReply reads a reply. A text that is too long to be ours is read as none. The bounds are
// those of what we ask for.
func (c *redisConn) readReply(depth int) (r reply, err error) {
	const maxDepth, maxItems, maxText = 8, 1 << 20, 512 << 20
	line, err := c.r.ReadSlice('\n')
	if err != nil && err != bufio.ErrBufferFull {
		return r, err
	}
	text, ok := bytes.CutSuffix(line, []byte("\r\n"))
	if !ok || len(text) == 0 {
		return r, fmt.Errorf("%w: it says %.60q", errProtocol, line)
	}
	kind, text := text[0], text[1:]
	n, noNumber := strconv.Atoi(string(text))
	switch {
	case kind == '+', kind == ':' && noNumber == nil:
		r.text = string(text)
		return r, nil
	case kind == '-':
		r.refusal = redisError(text)
		return r, nil
	case noNumber != nil:
	case n == -1 && (kind == '$' || kind == '*'):
		return r, nil
	case kind == '$' && n > c.maxText && n <= maxText:
		_, err := io.CopyN(io.Discard, c.r, int64(n+2))
		return r, err
	case kind == '$' && n >= 0 && n <= c.maxText:
		r.text, err = c.readText(n)
		return r, err
	case kind == '*' && n >= 0 && n <= maxItems && depth < maxDepth:
		r.list = make([]reply, 0, min(n, 64)) // grows as they come, not as the number says
		for range n {
			item, err := c.readReply(depth + 1)
			if err != nil {
				return r, err
			}
			r.list = append(r.list, item)
		}
		return r, nil
	}
	return r, fmt.Errorf("%w: it says %.60q", errProtocol, line)
}

// readText reads a text of n bytes, and the end of its line.
func (c *redisConn) readText(n int) (string, error) {
	var text strings.Builder
	for text.Grow(n); text.Len() < n; {
		part, err := c.r.Peek(min(n-text.Len(), c.r.Size()))
		if err != nil {
			return "", err
		}
		text.Write(part)
		c.r.Discard(len(part))
	}
	end, err := c.r.ReadSlice('\n')
	if err == nil && string(end) != "\r\n" {
		err = errProtocol
	}
	return text.String(), err
}

// asNumber returns the number in a string, or 0.
func asNumber(s string) int64 {
	n, _ := strconv.ParseInt(s, 10, 64)
	return n
}

// hash returns the fields of a hash.
func (r reply) hash() map[string]string {
	fields := map[string]string{}
	for pair := range slices.Chunk(r.list, 2) {
		fields[pair[0].text] = pair[len(pair)-1].text
	}
	return fields
}
