// Live pictures. Server push was made for images, and an <img> still shows
// them in every browser, without a script: GET /rooms/{room}/multipart?as=svg
// is the room as a picture, a graph where it carries numbers, its last lines
// where it carries talk.
//
// Pictures are events. Whoever looks reads a room of pictures, one for each room
// and size; while somebody does, one goroutine reads the room itself and
// publishes a picture of it when it has changed, at most ten times a second.
// So a picture is drawn once, however many look at it.

package main

import (
	"context"
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
	drawMessages = 120 // at most, in a picture
	maxPictures  = 100 // rooms and sizes that are looked at; each has a goroutine

	sniffed = 1024 // bytes of an image of another origin that Chromium waits for before it shows it

	minSide, maxSide            = 80, 2000 // pixels
	pictureWidth, pictureHeight = 480, 240
)

// A pictureOf is a room and a size.
type pictureOf struct {
	room string
	w, h int
}

// name is that of the room of pictures: one that nobody can ask for, since
// a room's name has no space in it.
func (p pictureOf) name() string { return fmt.Sprintf(" %s %d %d", p.room, p.w, p.h) }

// look begins to draw p, unless that goes on already. The caller calls the
// function returned when it looks no more.
func (s *server) look(p pictureOf) (away func(), err error) {
	s.drawingMu.Lock()
	defer s.drawingMu.Unlock()
	c := s.drawings[p]
	if c == nil {
		if len(s.drawings) >= maxPictures {
			return nil, limit(http.StatusServiceUnavailable, "too many pictures are looked at; try again later", "pictures", 10)
		}
		c = &canvas{pictureOf: p, s: s}
		if err := s.relay.subscribe(&c.rd, want{rooms: []string{p.room}, after: -1, last: drawMessages, batchBytes: 1 << 20}); err != nil {
			return nil, err
		}
		var ctx context.Context
		ctx, c.stop = context.WithCancel(context.Background())
		s.drawings[p] = c
		c.draw() // the first is there before anybody looks
		go c.run(ctx)
	}
	c.viewers++
	return func() {
		s.drawingMu.Lock()
		defer s.drawingMu.Unlock()
		if c.viewers--; c.viewers == 0 {
			c.stop()
			delete(s.drawings, p)
		}
	}, nil
}

// drawAll has every picture drawn as things are, before the relay stops.
func (s *server) drawAll() {
	s.drawingMu.Lock()
	defer s.drawingMu.Unlock()
	for _, c := range s.drawings {
		c.draw()
	}
}

// A canvas draws one room while it is looked at.
type canvas struct {
	pictureOf
	s       *server
	rd      reader
	viewers int // guarded by s.drawingMu
	stop    context.CancelFunc

	mu     sync.Mutex // guards what follows, and rd
	events []*event
	said   []remark
}

// A remark is one message.
type remark struct {
	from, text string
	number     float64
	isNumber   bool
}

// run draws the room whenever it has changed, until ctx is done.
func (c *canvas) run(ctx context.Context) {
	defer c.rd.leave()
	for c.rd.wait(ctx, nil) {
		c.draw()
		select {
		case <-time.After(drawEvery):
		case <-ctx.Done():
		}
	}
}

// draw publishes a picture of the room as it is now.
func (c *canvas) draw() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for more := true; more; more = c.rd.cut {
		c.events = c.rd.next(c.events[:0])
		for _, e := range c.events {
			switch {
			case e.kind == "message":
				c.add(e)
			case e.erases():
				c.said = nil
			}
		}
	}
	clear(c.events)
	c.s.relay.publish(post{room: c.name(), kind: "picture", picture: c.svg(), unmetered: true})
}

// add takes note of a message.
func (c *canvas) add(e *event) {
	said := e.content()
	m := remark{from: said.From, text: asText(said.Data)}
	n, err := strconv.ParseFloat(strings.TrimSpace(m.text), 64)
	m.number, m.isNumber = n, err == nil && math.Abs(n) < 1e15 // beyond, a difference of two may overflow
	if !m.isNumber && len(c.numbers()) > 0 {
		c.s.stats.skipped.Add(1)
	}
	if len(c.said) == drawMessages {
		c.said = slices.Delete(c.said, 0, 1)
	}
	c.said = append(c.said, m)
}

// numbers are those of the room, or none if it is one that talks.
func (c *canvas) numbers() (numbers []float64) {
	for _, m := range c.said {
		if m.isNumber {
			numbers = append(numbers, m.number)
		}
	}
	if 2*len(numbers) < len(c.said) {
		return nil
	}
	return numbers
}

const lineHeight, margin = 20, 12

// svg is the picture: a graph of numbers, or talk.
func (c *canvas) svg() []byte {
	b := fmt.Appendf(nil, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %[1]d %[2]d" role="img">`+
		`<title>%s</title><style>svg{font:13px system-ui,sans-serif}rect{fill:#fbfaf7}text{fill:#3a3733}.faint{fill:#6b665d}`+
		`path{fill:none;stroke:#b4530a;stroke-width:2;stroke-linejoin:round}circle{fill:#b4530a}line{stroke:#ddd8cd}`+
		`@media(prefers-color-scheme:dark){rect{fill:#16171b}text{fill:#dcd9d2}.faint{fill:#a19b90}path{stroke:#f2a65a}circle{fill:#f2a65a}line{stroke:#2e3036}}</style>`+
		`<rect width="100%%" height="100%%" rx="6"/>`, c.w, c.h, html.EscapeString(c.room))
	if numbers := c.numbers(); len(numbers) > 0 {
		b = c.graph(b, numbers)
	} else {
		b = c.talk(b)
	}
	b = append(b, "</svg>\n"...)
	if n := sniffed - len(b); n > 0 {
		b = append(b, strings.Repeat("\n", n)...)
	}
	return b
}

// graph draws the numbers as a line, the newest at the right.
func (c *canvas) graph(b []byte, numbers []float64) []byte {
	low, high := slices.Min(numbers), slices.Max(numbers)
	span := high - low
	if span == 0 {
		span = 1
	}
	left, right, top, bottom := float64(margin), float64(c.w-margin-60), float64(margin+6), float64(c.h-margin)
	y := func(n float64) float64 { return bottom - (n-low)/span*(bottom-top) }
	for _, n := range []float64{low, high} {
		b = fmt.Appendf(b, `<line x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f"/><text class="faint" x="%.1f" y="%.1f">%s</text>`,
			left, y(n), right, y(n), right+8, y(n)+4, short(n))
	}
	b = append(b, `<path d="`...)
	x := right
	for i, n := range numbers {
		x = right
		if len(numbers) > 1 {
			x = left + (right-left)*float64(i)/float64(len(numbers)-1)
		}
		b = fmt.Appendf(b, "%c%.1f %.1f", "ML"[min(i, 1)], x, y(n))
	}
	last := numbers[len(numbers)-1]
	return fmt.Appendf(b, `"/><circle cx="%.1f" cy="%.1f" r="3.5"/><text x="%.1f" y="%.1f" font-weight="600">%s</text>`,
		x, y(last), right+8, min(max(y(last)+4, top+18), bottom-12), short(last))
}

// short is a number in few digits.
func short(n float64) string { return strconv.FormatFloat(n, 'g', 5, 64) }

// talk writes the last lines that have room, the newest at the bottom.
func (c *canvas) talk(b []byte) []byte {
	fit := (c.h - margin) / lineHeight
	wide := (c.w - 2*margin) / 7 // characters of 13 pixels are about 7 wide
	said := c.said[max(0, len(c.said)-fit):]
	for i, m := range said {
		from := cutText(m.from, wide/3)
		text := cutText(strings.Join(strings.Fields(m.text), " "), wide-len([]rune(from))-1)
		b = fmt.Appendf(b, `<text x="%d" y="%d"><tspan font-weight="600">%s</tspan> %s</text>`,
			margin, margin+lineHeight*(i+1)-6, html.EscapeString(from), html.EscapeString(text))
	}
	if len(said) == 0 {
		b = fmt.Appendf(b, `<text class="faint" x="%d" y="%d">Nothing was said yet.</text>`, margin, margin+lineHeight-6)
	}
	return b
}

// cutText is at most n characters of s, without those that XML has no place for,
// and those that would turn around what is next to it.
func cutText(s string, n int) string {
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
