// Long-polls that wait without net/http, where each would cost 25 KB and more: two buffers,
// two goroutines, the request. Its connection is taken over like that of a stream, and a
// writer of the pool sends the answer. One goroutine waits to read. That shows whether the
// client is still there; and what it reads after the answer is the next request.
//
// Clients that long-poll ask again in the same words, with another cursor. If net/http has
// read such a head before, there is nothing to parse, and nothing to check again but the
// token's expiry and the limits: the request is held at once. Otherwise the connection
// goes back to the http.Server, with what was read.
//
// HTTP/2 and HTTP/1.0 are served by (*stream).serveOnce, and so is a request with a body.

package main

import (
	"bytes"
	"cmp"
	"errors"
	"net"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
)

const (
	// The head of a request is kept for the comparison up to this size, in bytes.
	maxKeptHead = 2 << 10

	// A cursor of more digits is left to net/http.
	maxCursorDigits = 18

	// What is read of a request whose head may be known from another connection, in bytes.
	firstRead = 1 << 10

	// So many heads are known. When there are more, all are learned once more.
	maxQuestions = 1 << 10
)

// errAnswered says that a long-poll has its whole answer.
var errAnswered = errors.New("answered")

// A question is what a long-poll asks, without the cursor. It is shared by all who ask it
// in the same words, and does not change.
type question struct {
	before, after string // the head of the request, around the digits of the cursor; "" if it is not known
	technique     *technique
	enc           encoder
	subscribe     subscribeRequest
	wait          time.Duration
	expiresAt     int64  // when its token expires, Unix nanoseconds
	lastRequest   bool   // the client asks for the end of the connection
	answerHead    string // without Content-Length and Date
}

// A heldPoll is what a session keeps of a long-poll.
type heldPoll struct {
	*question
	end        time.Time     // when the wait is over
	due        atomic.Bool   // it is, or the client left: the answer is due without an event, too
	ends       bool          // the connection ends with the answer
	answered   chan struct{} // receives a token with each answer; then the session is the reader's
	answeredAt time.Time
	deadline   time.Time // to read, that the connection has; zero for none
}

// takeOverPoll answers a long-poll if something is due, and otherwise has it wait in
// the pool.
func (p *writerPool) takeOverPoll(w http.ResponseWriter, r *http.Request, st *stream, q *request) (taken bool, err error) {
	if r.ProtoMajor != 1 || r.ProtoMinor != 1 || r.ContentLength != 0 {
		return false, nil
	}
	ses := &session{stream: st, pool: p}
	q.sub.driver, q.sub.maxBatchBytes = ses, maxAnswer
	if err := p.server.subscribe(&st.sub, q.sub); err != nil {
		p.server.release(st.quota, st.technique)
		return true, err
	}
	if events := st.sub.next(nil); len(events) > 0 || q.wait <= 0 {
		defer st.close()
		return true, st.answer(w, events)
	}
	conn, head, err := hijack(w)
	if err != nil {
		st.close()
		return true, err
	}
	ses.conn = conn
	ses.poll = &heldPoll{question: p.questionOf(st, r, q, w.Header(), head), answered: make(chan struct{}, 1)}
	ses.poll.end = ses.poll.endOf(time.Now())
	w.Header().Set("Date", "") // for stats.go: what is written is counted here
	p.add(ses)
	go ses.readRequests()
	return true, nil
}

// questionOf returns what a request asks. It copies what it keeps of the request, so
// nothing keeps the request itself.
func (p *writerPool) questionOf(st *stream, r *http.Request, q *request, header http.Header, head []byte) *question {
	n := &question{technique: st.technique, enc: st.enc, subscribe: q.sub, wait: q.wait, expiresAt: q.permit.expiresAt, lastRequest: r.Close}
	n.subscribe.driver = nil
	n.subscribe.rooms = strings.Split(strings.Clone(strings.Join(q.rooms, ",")), ",")
	n.answerHead = answerHead("200 OK", header)

	// What is asked must depend on nothing that could differ the next time, so the cursor
	// must be the parameter after. The relay's own rooms are left out: that somebody asks
	// for them must be seen each time.
	before, after, _ := cutCursor(head)
	if before == nil || len(head) > maxKeptHead || len(q.values["lastEventId"])+len(q.values["Last-Event-ID"]) > 0 ||
		slices.ContainsFunc(q.rooms, func(room string) bool { return room[0] == '_' }) {
		return n
	}
	n.before, n.after = string(before), string(after)
	p.mu.Lock()
	defer p.mu.Unlock()
	if known := p.questions[n.before+n.after]; known != nil {
		return known
	}
	if len(p.questions) >= maxQuestions || p.questions == nil {
		p.questions = map[string]*question{}
	}
	p.questions[n.before+n.after] = n
	return n
}

// endOf returns when a wait is over that begins now.
func (n *question) endOf(now time.Time) time.Time {
	return now.Add(min(n.wait, time.Unix(0, n.expiresAt).Sub(now)))
}

// cutCursor returns the head of a request around the digits of its first parameter after,
// and the cursor that they are. Without a cursor it returns nil. The request was found to
// be good, or will be compared with one that was.
func cutCursor(head []byte) (before, after []byte, cursor int64) {
	line, _, _ := bytes.Cut(head, []byte("\n"))
	_, query, found := bytes.Cut(line, []byte("?"))
	for found && !bytes.HasPrefix(query, []byte("after=")) {
		_, query, found = bytes.Cut(query, []byte("&"))
	}
	if !found {
		return nil, nil, 0
	}
	from := len(line) - len(query) + len("after=")
	to := from
	for ; to < len(line) && '0' <= line[to] && line[to] <= '9'; to++ {
		cursor = 10*cursor + int64(line[to]-'0')
	}
	digits := to - from
	if digits == 0 || digits > maxCursorDigits || to == len(line) || line[to] != '&' && line[to] != ' ' {
		return nil, nil, 0
	}
	return head[:from], head[to:], cursor
}

// known returns the question that a request repeats, or nil: the last on its connection,
// or what somebody else has asked in these words. Not so behind a proxy: the limits of a
// client would depend on what the proxy says of it.
func (p *writerPool) known(last *question, head []byte) (n *question, cursor int64) {
	before, after, cursor := cutCursor(head)
	switch {
	case before == nil:
		return nil, 0
	case string(before) == last.before && string(after) == last.after:
		return last, cursor
	case p.trustProxy:
		return nil, 0
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.questions[string(before)+string(after)], cursor
}

// readRequests reads what the client of a long-poll sends: the next request, or nothing
// until it leaves.
func (ses *session) readRequests() {
	p := ses.poll
	var buf []byte
	for {
		size := firstRead
		if p.before != "" {
			size = len(p.before) + maxCursorDigits + len(p.after)
		}
		if size != len(buf) {
			buf = make([]byte, size)
		}
		b, err := ses.read(buf, p.end)
		if ses.awaitAnswer(err); errors.Is(err, os.ErrDeadlineExceeded) {
			b, err = ses.read(buf, p.answeredAt.Add(idleTimeout))
		}
		if ses.state.Load() == stateClosed {
			return // the answer was the last, or failed
		}
		left := err != nil || ses.gone.Load()
		if !left {
			if n, cursor := ses.pool.known(p.question, b); n != nil && ses.ask(n, cursor) {
				ses.pool.received(n.technique, 1, len(b))
				continue
			}
		}
		ses.state.Store(stateClosed)
		ses.pool.remove(ses)
		ses.sub.unsubscribe()
		if left {
			ses.conn.Close()
		} else {
			ses.conn.putBack(b)
			ses.pool.resume(ses.conn)
		}
		return
	}
}

// read reads what comes until the time end. A deadline that is earlier is left as it is: to
// move it for each request costs more than to see now and then that it came too early.
func (ses *session) read(buf []byte, end time.Time) ([]byte, error) {
	p := ses.poll
	for {
		if p.deadline.IsZero() || p.deadline.After(end) {
			p.deadline = end
			ses.conn.SetReadDeadline(end)
		}
		if ses.gone.Load() { // and that deadline was set in vain
			return nil, net.ErrClosed
		}
		n, err := ses.conn.Read(buf)
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			return buf[:n], err
		}
		early := p.deadline.Before(end)
		p.deadline = time.Time{}
		if !early {
			return nil, err
		}
	}
}

// awaitAnswer waits for the answer. It is due at once if to read has failed, and else at
// the end of the wait.
func (ses *session) awaitAnswer(err error) {
	select {
	case <-ses.poll.answered:
		return
	default:
	}
	if err == nil { // the client sends before it has its answer
		select {
		case <-ses.poll.answered:
			return
		case <-time.After(time.Until(ses.poll.end)):
		}
	}
	if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		ses.gone.Store(true)
	}
	ses.poll.due.Store(true)
	ses.wake()
	<-ses.poll.answered
}

// ask holds a request that repeats the one before, and reports whether it did. If not,
// net/http finds the same, and says why. A client that repeats its request is still
// subscribed. Otherwise a writer subscribes: its stack is large enough, and ten thousand
// goroutines like this one keep theirs small.
func (ses *session) ask(n *question, cursor int64) bool {
	p, s, now := ses.poll, ses.server, time.Now()
	if now.UnixNano() >= n.expiresAt || cursor > s.relay.lastID.Load() || s.hold(ses.quota, n.technique) != nil {
		return false
	}
	if p.question != n {
		ses.sub.unsubscribe()
	}
	ses.technique, ses.enc = n.technique, n.enc
	p.question, p.end = n, n.endOf(now)
	p.due.Store(false)
	if len(ses.sub.subscriptions) > 0 {
		ses.sub.setCursor(cursor, 0)
		ses.state.Store(stateWriting) // from here on it is woken
		if s.relay.lastID.Load() == cursor && !s.relay.isStopping() && ses.state.CompareAndSwap(stateWriting, stateIdle) {
			return true
		}
	} else {
		ses.sub.cursor = cursor
	}
	ses.enqueue()
	return true
}

// answerPoll writes the answer if it is due, and returns errAnswered when it is sent.
func (ses *session) answerPoll(sc *scratch, now int64) error {
	p := ses.poll
	if len(ses.sub.subscriptions) == 0 {
		q := p.subscribe
		q.cursor, q.driver = ses.sub.cursor, ses
		if err := ses.server.subscribe(&ses.sub, q); err != nil {
			return err // the connection closes; a client asks again on another, and is told why
		}
	}
	stopping := ses.server.relay.isStopping() // asked before reading: what was published before is in the answer
	sc.events = ses.sub.next(sc.events[:0])
	defer clear(sc.events)
	if len(sc.events) == 0 && !stopping && !p.due.Load() {
		return nil
	}
	if p.before == "" || p.subscribe.user != "" { // it cannot be repeated, or the user was present for the wait
		ses.sub.unsubscribe()
	}
	p.ends = p.lastRequest || stopping || ses.gone.Load()

	b := ses.enc.encode(append(sc.buf[:0], ses.enc.preamble...), &ses.sub, sc.events...)
	size := len(b)
	sc.count(ses.technique, sc.events, size, now/1e6)
	b = append(b, p.answerHead...)
	b = strconv.AppendInt(append(b, "Content-Length: "...), int64(size), 10)
	b = time.Unix(0, now).UTC().AppendFormat(append(b, "\r\nDate: "...), http.TimeFormat)
	if p.ends {
		b = append(b, "\r\nConnection: close"...)
	}
	b = append(b, "\r\n\r\n"...)
	sc.count(ses.technique, nil, len(b)-size, 0)
	b = append(b, b[:size]...) // the body again, behind the head that says how long it is
	sc.buf = b
	return cmp.Or(ses.write(b[size:], sc.events), errAnswered)
}

// finishAnswer gives the session to the goroutine that reads.
func (ses *session) finishAnswer() {
	p := ses.poll
	if p.ends || ses.gone.Load() {
		ses.release(true)
		return
	}
	p.answeredAt = time.Now()
	ses.state.Store(stateOut)
	ses.server.release(ses.quota, ses.technique)
	p.answered <- struct{}{}
}
