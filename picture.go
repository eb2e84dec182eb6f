// Live pictures. Server push was made for images, and an <img> still shows them in every
// browser, without a script. There are two kinds. Without this file the relay takes no
// images, and multipart has neither as=image nor as=svg.
//
// Images that somebody publishes, such as the frames of a camera: each is an event of the
// type image, whose data is a data: URL. GET /rooms/{room}/multipart?as=image pushes them.
//
// Pictures that the relay draws: GET /rooms/{room}/multipart?as=svg is the room as a
// picture. It is a graph where the room carries numbers, else its last lines. They are
// events in a log of their own, with a room for each room and size that somebody watches.
// One goroutine waits for the room itself and publishes a picture when it has changed, at
// most ten times a second. So a picture is drawn once for all viewers, and only from what
// the room keeps.

package main

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"fmt"
	"html"
	"math"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode"
)

const (
	drawEvery    = 100 * time.Millisecond
	drawMessages = 120     // at most, in a picture
	maxPictures  = 100     // rooms and sizes that are watched; each has a goroutine
	maxDrawn     = 4 << 20 // bytes that all of them keep

	minImageBytes = 1024 // bytes of an image of another origin that Chromium waits for before it shows it

	minSide, maxSide            = 80, 2000 // pixels
	pictureWidth, pictureHeight = 480, 240
)

// pictures draws rooms while somebody watches.
type pictures struct {
	server  *server
	log     *relay              // of pictures
	skipped func(int)           // counts messages that a graph of numbers cannot show
	decoded func(*event) []byte // returns a published image

	mu        sync.Mutex // guards what follows
	renderers map[string]*renderer
	bytes     int // of all renderers, at most
}

// newPictures has the server take images, and adds the representations image and svg to
// the technique multipart.
func newPictures(s *server) *pictures {
	p := &pictures{server: s, skipped: func(int) {}, renderers: map[string]*renderer{}, decoded: cached(16, 64<<10, decodeImage)}
	p.log = newRelay(limits{maxEvents: 1, maxRoomBytes: 1 << 20, maxBytes: maxDrawn, maxRooms: maxPictures})
	p.log.wakeRoom = s.relay.wakeRoom
	s.image = encodeImage
	push := s.technique("multipart")
	push.as["image"], push.as["svg"] = p.pushImages, p.svg
	return p
}

// Published images.

// imageTypes are those that browsers show and that hold no script, as SVG may.
var imageTypes = []string{"image/png", "image/jpeg", "image/gif", "image/webp"}

// checkImage refuses what is not an image of one of these types.
func checkImage(contentType string, b []byte) error {
	switch {
	case !slices.Contains(imageTypes, contentType):
		return newError(http.StatusUnsupportedMediaType, "images are taken as "+strings.Join(imageTypes, ", "))
	case http.DetectContentType(b) != contentType:
		return newError(http.StatusUnsupportedMediaType, "this does not begin as "+contentType+" does")
	}
	return nil
}

// encodeImage returns an image as a data: URL (RFC 2397), in JSON.
func encodeImage(contentType string, b []byte) ([]byte, error) {
	if err := checkImage(contentType, b); err != nil {
		return nil, err
	}
	data := base64.StdEncoding.AppendEncode([]byte(`"data:`+contentType+`;base64,`), b)
	return append(data, '"'), nil
}

// decodeImage returns the image of an event, or nil if it has none.
func decodeImage(e *event) []byte {
	url, _ := strings.CutPrefix(asText(e.decode().Data), "data:")
	contentType, encoded, _ := strings.Cut(url, ";base64,")
	b, err := base64.StdEncoding.DecodeString(encoded)
	if err != nil || checkImage(contentType, b) != nil {
		return nil
	}
	return b
}

// pushImages is multipart with as=image. A viewer is sent the newest image of its rooms,
// and not those that came while the one before was on its way.
//
// The head of a part goes out with the part before it (see multipart), and says the same
// type. If that was wrong, the image is sent again under its own. A part without bytes
// would crash a tab of Chromium, and anything before an image would spoil it. So the
// heartbeat is the image once more; and before there is one, a line of its head.
func (p *pictures) pushImages(q *request) encoder {
	boundary := rand.Text()
	opened := ""      // type of the part that has begun
	shown := int64(0) // the event that was sent last
	write := func(b []byte, e *event) []byte {
		image := p.decoded(e)
		contentType := http.DetectContentType(image)
		head := "Content-Type: " + contentType + "\r\n\r\n"
		next := "\r\n--" + boundary + "\r\n" + head
		if opened == "" {
			b = append(b, head...)
		} else if opened != contentType {
			b = append(append(b, image...), next...)
		}
		opened, shown = contentType, e.id
		return append(append(b, image...), next...)
	}
	q.sub.maxBatchBytes = math.MaxInt // one image is written of a batch
	return encoder{
		contentType: "multipart/x-mixed-replace; boundary=" + boundary,
		preamble:    "--" + boundary + "\r\nX-Padding: " + strings.Repeat("x", minImageBytes) + "\r\n",
		last:        math.MaxInt32, // the newest image, whatever was published since
		choose: func(events []*event) []*event {
			for i, e := range slices.Backward(events) {
				if e.kind == "image" && p.decoded(e) != nil {
					return events[i : i+1]
				}
			}
			return nil
		},
		event: write,
		beat: func(sub *subscriber) string {
			if shown == 0 {
				return "X-Beat: 1\r\n"
			}
			if found := sub.kept(shown-1, shown); len(found) > 0 {
				return string(write(nil, found[0]))
			}
			return "" // the log has dropped it
		},
	}
}

// Rooms as pictures.

// svg is multipart with as=svg.
func (p *pictures) svg(q *request) encoder {
	c := &renderer{p: p, room: q.rooms[0]}
	c.w = int(q.intParam("w", minSide, maxSide, pictureWidth))
	c.h = int(q.intParam("h", minSide, maxSide, pictureHeight))
	if len(q.rooms) > 1 {
		q.fail(badRequest("a picture is of one room"))
	}
	enc, next := multipartOf("image/svg+xml")
	enc.choose = func(events []*event) []*event {
		return slices.DeleteFunc(events, func(e *event) bool { return e.kind != "picture" })
	}
	enc.event = func(b []byte, e *event) []byte { return append(append(b, e.json...), next...) }
	enc.subscribe = func(sub *subscriber, req subscribeRequest) (func(), error) { return p.watch(c, sub, req) }
	return enc
}

// watch subscribes to a picture, and has it drawn meanwhile: by c, if nobody draws it. The
// caller calls unwatch after it has unsubscribed.
func (p *pictures) watch(c *renderer, sub *subscriber, req subscribeRequest) (unwatch func(), err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	name := c.name()
	if p.renderers[name] == nil {
		if len(p.renderers) >= maxPictures || p.bytes+c.size() > maxDrawn {
			return nil, limitError(http.StatusServiceUnavailable, "too many pictures are watched; try again later", "pictures", 10)
		}
		if err := p.server.relay.subscribe(&c.sub, subscribeRequest{rooms: []string{c.room}, cursor: -1}); err != nil {
			return nil, err
		}
		var ctx context.Context
		ctx, c.stop = context.WithCancel(context.Background())
		p.renderers[name] = c
		p.bytes += c.size()
		c.draw() // the first is there before anybody watches
		go c.run(ctx)
	}
	c = p.renderers[name]
	c.viewers++
	req.rooms, req.cursor, req.last, req.user, req.seesPresence = []string{name}, -1, 1, "", false
	return func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		if c.viewers--; c.viewers == 0 {
			c.stop()
			delete(p.renderers, name)
			p.bytes -= c.size()
			p.log.erase(name)
		}
	}, p.log.subscribe(sub, req) // which succeeds: there are fewer pictures than there may be rooms
}

// drawAll draws every picture as things are, before the relay stops, and stops their log.
func (p *pictures) drawAll() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range p.renderers {
		c.draw()
	}
	p.log.stop()
}

// A renderer draws one room while it is watched.
type renderer struct {
	p       *pictures
	room    string
	w, h    int // pixels
	viewers int // guarded by p.mu
	stop    context.CancelFunc

	sub   subscriber
	mu    sync.Mutex // held while it draws
	drawn int64      // messages up to here are in a picture
}

// name is the room of the pictures' log that is for this room and size.
func (c *renderer) name() string { return fmt.Sprintf("%s %d %d", c.room, c.w, c.h) }

// run draws the room whenever it has changed, until ctx is done.
func (c *renderer) run(ctx context.Context) {
	defer c.sub.unsubscribe()
	for c.sub.wait(ctx, nil) {
		c.draw()
		select {
		case <-time.After(drawEvery):
		case <-ctx.Done():
		}
	}
}

// draw publishes a picture of the room as it is now: a graph if at least half of its newest
// messages are numbers, else lines of text.
func (c *renderer) draw() {
	c.mu.Lock()
	defer c.mu.Unlock()
	messages := slices.Clone(c.sub.subscriptions[0].room.history.Load().messages.events)
	messages = slices.DeleteFunc(messages, func(e *event) bool { return e.kind != "message" })
	messages = messages[max(0, len(messages)-drawMessages):]
	var numbers []float64
	others := 0 // that are no numbers, and in no picture yet
	for _, e := range messages {
		n, err := strconv.ParseFloat(strings.TrimSpace(asText(e.decode().Data)), 64)
		if err == nil && math.Abs(n) < 1e15 { // beyond, a difference of two may overflow
			numbers = append(numbers, n)
		} else if e.id > c.drawn {
			others++
		}
	}
	content := c.text(messages)
	if len(numbers) > 0 && 2*len(numbers) >= len(messages) {
		content = c.graph(numbers)
		c.p.skipped(others)
	}
	if n := len(messages); n > 0 {
		c.drawn = messages[n-1].id
	}
	log := c.p.log
	log.mu.Lock()
	defer log.unlock()
	if !log.isStopping() {
		log.append(c.name(), &event{id: log.lastID.Load() + 1, kind: "picture", publishedAt: time.Now().UnixMilli(), json: c.svg(content)})
	}
}

// columns is how many characters of a line fit: those of 13 pixels are about 7 wide.
func (c *renderer) columns() int { return (c.w - 2*margin) / 7 }

// rows is how many lines fit.
func (c *renderer) rows() int { return (c.h - margin) / lineHeight }

// size is what a picture takes, at most, in bytes: a character takes 6 in SVG; then the
// numbers, and the rest.
func (c *renderer) size() int { return c.rows()*c.columns()*6 + 16<<10 }

const lineHeight, margin = 20, 12

// svg returns the picture with this content.
func (c *renderer) svg(content []byte) []byte {
	b := fmt.Appendf(nil, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %[1]d %[2]d" role="img">`+
		`<title>%s</title><style>svg{font:13px system-ui,sans-serif}rect{fill:#fbfaf7}text{fill:#3a3733}.faint{fill:#6b665d}`+
		`path{fill:none;stroke:#b4530a;stroke-width:2;stroke-linejoin:round}circle{fill:#b4530a}line{stroke:#ddd8cd}`+
		`@media(prefers-color-scheme:dark){rect{fill:#16171b}text{fill:#dcd9d2}.faint{fill:#a19b90}path{stroke:#f2a65a}circle{fill:#f2a65a}line{stroke:#2e3036}}</style>`+
		`<rect width="100%%" height="100%%" rx="6"/>%s</svg>`, c.w, c.h, html.EscapeString(c.room), content)
	return append(b, strings.Repeat("\n", max(1, minImageBytes-len(b)))...)
}

// graph draws numbers as a line, the newest at the right.
func (c *renderer) graph(numbers []float64) (b []byte) {
	low, high := slices.Min(numbers), slices.Max(numbers)
	span := high - low
	if span == 0 {
		span = 1
	}
	left, right, top, bottom := float64(margin), float64(c.w-margin-60), float64(margin+6), float64(c.h-margin)
	y := func(n float64) float64 { return bottom - (n-low)/span*(bottom-top) }
	for _, n := range []float64{low, high} {
		b = fmt.Appendf(b, `<line x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f"/><text class="faint" x="%.1f" y="%.1f">%.5g</text>`,
			left, y(n), right, y(n), right+8, y(n)+4, n)
	}
	b = append(b, `<path d="`...)
	step := (right - left) / float64(max(1, len(numbers)-1))
	for i, n := range numbers {
		x := right - step*float64(len(numbers)-1-i)
		b = fmt.Appendf(b, "%c%.1f %.1f", "ML"[min(i, 1)], x, y(n))
	}
	last := numbers[len(numbers)-1]
	return fmt.Appendf(b, `"/><circle cx="%.1f" cy="%.1f" r="3.5"/><text x="%.1f" y="%.1f" font-weight="600">%.5g</text>`,
		right, y(last), right+8, min(max(y(last)+4, top+18), bottom-12), last)
}

// text writes the last lines that fit, the newest at the bottom.
func (c *renderer) text(messages []*event) (b []byte) {
	messages = messages[max(0, len(messages)-c.rows()):]
	for i, e := range messages {
		f := e.decode()
		from := truncate(f.From, c.columns()/3)
		said := truncate(strings.Join(strings.Fields(asText(f.Data)), " "), c.columns()-len([]rune(from))-1)
		b = fmt.Appendf(b, `<text x="%d" y="%d"><tspan font-weight="600">%s</tspan> %s</text>`,
			margin, margin+lineHeight*(i+1)-6, html.EscapeString(from), html.EscapeString(said))
	}
	if len(messages) == 0 {
		b = fmt.Appendf(b, `<text class="faint" x="%d" y="%d">Nothing was said yet.</text>`, margin, margin+lineHeight-6)
	}
	return b
}

// truncate returns at most n characters of s, without those that XML does not allow,
// and those that would reverse what is next to it.
func truncate(s string, n int) string {
	runes := []rune(strings.Map(func(r rune) rune {
		if r < ' ' || r == 0xfffe || r == 0xffff || unicode.Is(unicode.Bidi_Control, r) {
			return -1
		}
		return r
	}, s))
	if len(runes) > n {
		runes = append(runes[:max(0, n-1)], '…')
	}
	return string(runes)
}
