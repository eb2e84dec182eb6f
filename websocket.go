// WebSockets that the writer pool serves (RFC 6455). The core has a library for them, which
// keeps 5 KB for each connection, and reads a message without asking whether there is room
// for it. Here a goroutine waits for a frame with a buffer of 128 bytes, reserves memory
// before it reads a message, and handles it. What answers the client is queued for the
// writers, which send it before the events that are due.

package main

import (
	"bufio"
	"crypto/sha1"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode/utf8"

	"github.com/coder/websocket"
)

const (
	// Bytes of replies that the client of a WebSocket may leave unread, beside what its
	// socket holds.
	maxQueuedReplies = 16 << 10

	// The size of a message, in bytes, that is on no budget.
	maxFreeMessage = 1 << 10

	// Every so many heartbeats a WebSocket is sent a ping, whose pong costs more than the
	// heartbeat. Where the kernel asks already, and no proxy is in between, there are few.
	pingEvery  = 3
	pingRarely = 12
)

// A webSocket is what a session keeps of a WebSocket.
type webSocket struct {
	proxied      bool // there is, or may be, a proxy in between
	heartbeats   int
	awaitingPong atomic.Bool
	handling     atomic.Bool // a message is being answered

	mu      sync.Mutex // guards what follows
	replies []byte     // frames that are to be sent
	ending  error      // how the session ends behind them, if it does: net.ErrClosed at once, io.EOF as after a bye
}

// beginWebSocket begins a stream over a WebSocket: the pool writes, and a goroutine reads.
func (ses *session) beginWebSocket(h http.Header, r *http.Request, q *request) {
	accept := sha1.Sum([]byte(strings.TrimSpace(r.Header.Get("Sec-WebSocket-Key")) + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"))
	h.Set("Upgrade", "websocket")
	h.Set("Connection", "Upgrade")
	h.Set("Sec-WebSocket-Accept", base64.StdEncoding.EncodeToString(accept[:]))
	if protocol := acceptOptions(r).Subprotocols[0]; protocol != "" {
		h.Set("Sec-WebSocket-Protocol", protocol)
	}
	ses.before = []byte(answerHead("101 Switching Protocols", h) + "\r\n")
	ses.headroom, ses.send = maxFrameHead, ses.sendMessage
	ses.ws = &webSocket{proxied: ses.pool.trustProxy || r.Header["X-Forwarded-For"] != nil || r.Header["Via"] != nil || r.Header["Forwarded"] != nil}
	author := ses.author(q)
	ses.pool.add(ses)
	go ses.readAll(bufio.NewReaderSize(ses.conn, 128), author)
}

// Reading.

// The opcodes of frames (5.2).
const (
	opContinuation = 0
	opClose        = 8
	opPing         = 9
	opPong         = 10
)

// A message is what has arrived of it.
type message struct {
	kind    websocket.MessageType // 0 before its first frame
	data    []byte
	whole   bool
	began   time.Time
	receipt *allotment // for the data of a message that is longer than maxFreeMessage, or nil
}

// Why a WebSocket is closed.
var (
	errFrame        = websocket.CloseError{Code: websocket.StatusProtocolError, Reason: "no such frame may come here"}
	errLongMessage  = websocket.CloseError{Code: websocket.StatusMessageTooBig, Reason: "the message is too big"}
	errLateMessage  = websocket.CloseError{Code: websocket.StatusPolicyViolation, Reason: "the message did not arrive in time"}
	errNoReceipt    = websocket.CloseError{Code: websocket.StatusTryAgainLater, Reason: "the relay receives as much at once as it may; try again"}
	errClientCloses = errors.New("the client closes")
)

// readAll takes what the client sends, until it closes, leaves or is refused.
func (ses *session) readAll(in *bufio.Reader, a *author) {
	err := ses.readMessages(in, a)
	if refusal, ok := err.(websocket.CloseError); ok {
		ses.refuse(refusal)
		ses.conn.SetReadDeadline(time.Time{})
		io.Copy(io.Discard, in) // until release closes: the client may still send, and is to read why it was refused
	} else if err != errClientCloses {
		ses.abort()
	}
}

// readMessages handles messages, and returns why there will be no more.
func (ses *session) readMessages(in *bufio.Reader, a *author) (err error) {
	var m message
	defer func() {
		if p := recover(); p != nil { // as net/http does for a request
			slog.Error("a WebSocket failed", "panic", p, "stack", string(debug.Stack()))
			err = errors.New("panic")
		}
		m.receipt.free()
	}()
	for {
		_, err := in.Peek(2) // here most of them are
		if err == nil {
			err = ses.readFrame(in, &m)
		}
		if errors.Is(err, os.ErrDeadlineExceeded) && !ses.gone.Load() {
			return errLateMessage
		}
		if err != nil {
			return err
		}
		if m.whole {
			ses.take(a, m.kind, m.data)
		}
		if m.whole || m.kind == 0 { // the message, or a control frame between two
			m.receipt.free()
			m = message{}
			ses.conn.SetReadDeadline(time.Time{})
			runtime.Gosched() // a client that sends without a pause would hold a processor for 10 ms at a time
		}
	}
}

// take handles a message.
func (ses *session) take(a *author, kind websocket.MessageType, data []byte) {
	ses.pool.received(ses.technique, 0, len(data)+6) // with the shortest head and a mask
	ses.ws.handling.Store(true)                      // what is published is answered, even if the relay stops meanwhile
	if reply := ses.server.handleMessage(a, kind, data); reply != nil {
		ses.enqueueFrames(textFrame(append(make([]byte, maxFrameHead), reply.event().json...)), nil)
	}
	if ses.ws.handling.Store(false); ses.server.relay.isStopping() {
		ses.wake()
	}
}

// readFrame reads a frame (5.2) whose first two bytes are there.
func (ses *session) readFrame(in *bufio.Reader, m *message) error {
	if m.began.IsZero() {
		m.began = time.Now()
		ses.conn.SetReadDeadline(m.began.Add(requestTimeout))
	}
	head, _ := in.Peek(2)
	opcode, last, masked := head[0]&15, head[0]&0x80 != 0, head[1]&0x80 != 0
	size, n := uint64(head[1]&127), 2
	switch {
	case head[0]&0x70 != 0, !masked:
		return errFrame
	case opcode >= opClose && (opcode > opPong || !last || size > 125):
		return errFrame
	case opcode < opClose && (opcode > byte(websocket.MessageBinary) || (opcode == opContinuation) == (m.kind == 0)):
		return errFrame
	case size == 126:
		n = 4
	case size == 127:
		n = 10
	}
	head, err := in.Peek(n + 4)
	if err != nil {
		return err
	}
	switch n {
	case 4:
		size = uint64(binary.BigEndian.Uint16(head[2:]))
	case 10:
		size = binary.BigEndian.Uint64(head[2:])
	}
	mask := [4]byte(head[n:])
	in.Discard(n + 4)
	if opcode >= opClose {
		payload := make([]byte, size)
		if err := readMasked(in, payload, mask); err != nil {
			return err
		}
		return ses.control(opcode, payload)
	}
	if size >= 1<<63 {
		return errFrame
	}
	if size > uint64(ses.server.maxBody)-uint64(len(m.data)) {
		return errLongMessage
	}
	if err := ses.reserve(m, int(size)); err != nil {
		return err
	}
	from := len(m.data)
	m.data = slices.Grow(m.data, int(size))[:from+int(size)]
	if m.whole = last; m.kind == 0 {
		m.kind = websocket.MessageType(opcode)
	}
	return readMasked(in, m.data[from:], mask)
}

func readMasked(in io.Reader, b []byte, mask [4]byte) error {
	_, err := io.ReadFull(in, b)
	for i := range b {
		b[i] ^= mask[i&3]
	}
	return err
}

// reserve reserves memory for so many more bytes of a message: twice, since it grows by
// copying, and is then parsed.
func (ses *session) reserve(m *message, size int) error {
	if len(m.data)+size <= maxFreeMessage {
		return nil
	}
	if m.receipt == nil {
		m.receipt = ses.pool.receipts.open(func() { ses.refuse(errNoReceipt) })
		size += len(m.data)
	}
	if m.receipt.grow(int64(2*size)) != nil {
		ses.server.refused("memory")
		return errNoReceipt
	}
	return nil
}

// control answers a control frame (5.5).
func (ses *session) control(opcode byte, payload []byte) error {
	switch opcode {
	case opPing:
		ses.enqueueFrames(controlFrame(opPong, payload), nil)
	case opPong:
		ses.ws.awaitingPong.Store(false)
	case opClose:
		if !validClose(payload) {
			return errFrame
		}
		ses.enqueueFrames(controlFrame(opClose, payload), net.ErrClosed)
		return errClientCloses
	}
	return nil
}

// validClose reports whether a close frame says why, as it may (7.4), or nothing.
func validClose(payload []byte) bool {
	if len(payload) < 2 {
		return len(payload) == 0
	}
	code := binary.BigEndian.Uint16(payload)
	return utf8.Valid(payload[2:]) && (code >= 1000 && code <= 1003 || code >= 1007 && code <= 1014 || code >= 3000 && code <= 4999)
}

// Writing.

// maxFrameHead is the size of the head of a frame of eight bytes of length.
const maxFrameHead = 10

// textFrame writes the head of a text frame (RFC 6455, 5.2) into the last of the
// maxFrameHead free bytes at the front of b, and returns the frame: the length in one
// byte, or after 126 in two, or after 127 in eight.
func textFrame(b []byte) []byte {
	switch size := len(b) - maxFrameHead; {
	case size < 126:
		b = b[maxFrameHead-2:]
		b[1] = byte(size)
	case size < 1<<16:
		b = b[maxFrameHead-4:]
		b[1] = 126
		binary.BigEndian.PutUint16(b[2:], uint16(size))
	default:
		b[1] = 127
		binary.BigEndian.PutUint64(b[2:], uint64(size))
	}
	b[0] = 0x80 | byte(websocket.MessageText)
	return b
}

// controlFrame returns a control frame (5.5).
func controlFrame(opcode byte, payload []byte) []byte {
	return append([]byte{0x80 | opcode, byte(len(payload))}, payload...)
}

// closeFrame returns a close frame (5.5.1).
func closeFrame(code websocket.StatusCode, reason string) []byte {
	return controlFrame(opClose, append(binary.BigEndian.AppendUint16(nil, uint16(code)), reason...))
}

// sendMessage writes b, whose first maxFrameHead bytes are free, as a message.
func (ses *session) sendMessage(sc *scratch, b []byte, events []*event) error {
	size := len(b) - maxFrameHead
	if size > 0 || !ses.closed {
		b = textFrame(b)
	} else {
		b = b[:0] // a bye that this client does not see
	}
	sc.count(ses.technique, nil, len(b)-size+len(ses.before), 0)
	if ses.closed {
		b = append(b, closeFrame(ses.closeCode())...)
	}
	return ses.write(b, events)
}

// refuse ends the session with a close frame that says why.
func (ses *session) refuse(why websocket.CloseError) {
	ses.enqueueFrames(closeFrame(why.Code, why.Reason), io.EOF)
}

// enqueueFrames has whole frames written by the pool, and then perhaps the session ended. A
// client that leaves too many unread is dropped.
func (ses *session) enqueueFrames(frames []byte, ending error) {
	ws := ses.ws
	ws.mu.Lock()
	full := len(ws.replies)+len(frames) > maxQueuedReplies
	if !full && ws.ending == nil {
		ws.replies = append(ws.replies, frames...)
		ws.ending = ending
	}
	ws.mu.Unlock()
	if full {
		ses.abort()
		return
	}
	ses.wake()
}

// writeReplies writes the frames that answer what the client has sent. A client may send at
// once, but hello is first.
func (ses *session) writeReplies(sc *scratch, now int64) error {
	if err := ses.begin(sc, now); err != nil {
		return err
	}
	if ses.before != nil { // there is no hello for this client
		if err := ses.write(nil, nil); err != nil {
			return err
		}
	}
	ws := ses.ws
	ws.mu.Lock()
	replies, ending := ws.replies, ws.ending
	ws.replies = nil
	ws.mu.Unlock()
	if len(replies) > 0 && !ses.closed { // after a second close frame Chromium reports that the connection failed
		if err := ses.write(replies, nil); err != nil {
			return err
		}
	}
	return ending
}

// ping asks the client of a WebSocket now and then whether it is still there. A client that
// has not answered the last ping is gone.
func (ses *session) ping() error {
	ses.ws.heartbeats++
	due := ses.ws.heartbeats%pingEvery == 1
	if ses.kernelTimeout && !ses.ws.proxied {
		due = ses.ws.heartbeats%pingRarely == 0
	}
	if !due {
		return nil
	}
	if ses.ws.awaitingPong.Swap(true) {
		return os.ErrDeadlineExceeded
	}
	ses.before = controlFrame(opPing, nil) // the heartbeat, in one write
	if ses.enc.heartbeat == "" {
		return ses.write(nil, nil)
	}
	return nil
}
