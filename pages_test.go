// Tests of the pages and of the files that they load.

package main

import (
	"compress/gzip"
	"encoding/json"
	"fmt"
	"html"
	"io"
	"os"
	"path"
	"regexp"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestEveryPageHasAPolicyWithoutUnsafeInline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		// A file of ours, or the markup that a script inserts, which no browser runs.
		ours := regexp.MustCompile(`^<script (type="module" src="[a-z]+\.js"|type="text/html" id="markup")>$`)
		b := newLimitedTestbed(t, "-origins", "https://ok.example")
		b.ask("192.0.2.1", "POST /rooms/lobby?user=%3Cscript%3E", `<script>alert(1)</script><img onerror=x>" onload="x`)
		inline := regexp.MustCompile(`(?i)<script(?:>| [^>]*>)|<style|\son[a-z]+\s*=\s*"|\sstyle\s*=\s*"|javascript:`)
		pages := []string{"/rooms/lobby/html?last=9", "/rooms/lobby/refresh?last=9", "/rooms/lobby/form", "/rooms/lobby/form?live=refresh",
			"/rooms/lobby/iframe?last=9", "/rooms/lobby/multipart?as=html&last=9"}
		for name := range files {
			if strings.HasSuffix(name, ".html") || name == "/" {
				pages = append(pages, name)
			}
		}
		for _, page := range pages {
			r := b.open("192.0.2.1", "GET "+page, "")
			data := make([]byte, 64<<10)
			time.Sleep(time.Second) // everything that is due has come
			n, _ := io.ReadAtLeast(r.body, data, 200)
			text := string(data[:n])
			policy := r.Header.Get("Content-Security-Policy")
			r.stop()
			for _, wrong := range []string{"unsafe-", "script-src *", "data:", "https:"} {
				if strings.Contains(strings.NewReplacer("https://ok.example", "", "img-src 'self' data:;", "").Replace(policy), wrong) {
					t.Errorf("%s: the policy allows %s: %s", page, wrong, policy)
				}
			}
			if !strings.HasPrefix(policy, "default-src 'none'") && !strings.HasPrefix(policy, "default-src 'self'") && !strings.Contains(page, "multipart") {
				t.Errorf("%s: the policy is %q", page, policy)
			}
			for _, directive := range []string{"base-uri 'none'", "frame-ancestors "} {
				if !strings.Contains(policy, directive) && !strings.Contains(page, "multipart") {
					t.Errorf("%s: the policy has no %s: %s", page, directive, policy)
				}
			}
			nonce := ""
			if _, rest, ok := strings.Cut(policy, "'nonce-"); ok {
				nonce, _, _ = strings.Cut(rest, "'")
			}
			for _, found := range inline.FindAllString(text, -1) {
				if !(nonce != "" && found == `<script nonce="`+nonce+`">`) && !ours.MatchString(found) {
					t.Errorf("%s: %q is in the page, and its policy is %s", page, found, policy)
				}
			}
		}
		one, two := b.open("192.0.2.1", "GET /rooms/lobby/iframe", ""), b.open("192.0.2.1", "GET /rooms/lobby/iframe", "")
		if one.Header.Get("Content-Security-Policy") == two.Header.Get("Content-Security-Policy") {
			t.Error("two frames have one nonce")
		}
		one.stop()
		two.stop()
	})
}

// A person who types an address is redirected to a page; a program gets an error that
// lists what there is.
func TestShortcuts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestbed(t, pipe)
		for path, want := range map[string]string{
			"/rooms/lobby":          "../?room=lobby",
			"/rooms/lobby?token=x":  "../?room=lobby&token=x",
			"/rooms/a:b,c":          "../?room=a%3Ab",
			"/rooms/lobby/":         "../../?room=lobby",
			"/rooms/lobby?room=x":   "../?room=lobby",
			"/rooms":                "./stats.html#rooms",
			"/rooms/":               "../stats.html#rooms",
			"/lab":                  "./lab.html",
			"/pad":                  "./pad.html",
			"/stats?room=temp":      "./stats.html?room=temp",
			"/inspect?room=a,b":     "./inspect.html?room=a%2Cb",
			"/rooms/no%20name":      "",
			"/nothing":              "",
			"/rooms/lobby/presence": "",
		} {
			for _, method := range []string{"GET", "HEAD"} {
				res, body := b.do(method, path, "", "Accept: text/html,application/xhtml+xml,*/*;q=0.8")
				if got := res.Header.Get("Location"); got != want || (res.StatusCode == 303) != (want != "") {
					t.Errorf("%s %s by a browser: %s %q %s, want %q", method, path, res.Status, got, body, want)
				}
			}
			if res, _ := b.do("GET", path, "", "Accept: */*"); res.StatusCode == 303 {
				t.Errorf("%s by a program: %s to %s", path, res.Status, res.Header.Get("Location"))
			}
		}
		if res, body := b.do("GET", "/rooms/lobby", ""); res.StatusCode != 405 || !strings.Contains(body, b.techniqueNames()) {
			t.Errorf("GET of a room: %s %s, want 405 and the techniques", res.Status, body)
		}
	})
}

// A load balancer may check with OPTIONS whether the relay is there, as HAProxy does
// by default.
func TestOptionsOfAPage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestbed(t, pipe)
		for _, path := range []string{"/", "/healthz", "/comet.js"} {
			if res, body := b.do("OPTIONS", path, ""); res.StatusCode != 204 || body != "" || res.Header.Get("Allow") != "GET, HEAD, OPTIONS" {
				t.Errorf("%s: %s %v", path, res.Status, res.Header)
			}
		}
	})
}

// The files of static/ are served with their type and an ETag, and no others are.
func TestFiles(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestbed(t, pipe)
		names, _ := os.ReadDir("static")
		etags := map[string]string{}
		for _, name := range append([]string{"/"}, func() (paths []string) {
			for _, n := range names {
				if n.Name() != "colours.css" { // is in the others
					paths = append(paths, "/"+n.Name())
				}
			}
			return paths
		}()...) {
			file := "static" + name
			if name == "/" {
				file = "static/index.html"
			}
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if kind := path.Ext(file); kind == ".js" || kind == ".css" {
				if kind == ".css" {
					colours, err := os.ReadFile("static/colours.css")
					if err != nil {
						t.Fatal(err)
					}
					want = append(colours, want...)
				}
				if res, body := b.do("GET", "/source"+name, ""); res.Header.Get("Content-Type") != "text/plain; charset=utf-8" || body != string(want) {
					t.Errorf("/source%s: %s %v, %d bytes, want %d of text", name, res.Status, res.Header, len(body), len(want))
				}
				want = []byte(withoutComments(string(want)))
			}
			res, body := b.do("GET", name, "")
			h := res.Header
			if res.StatusCode != 200 || body != string(want) {
				t.Errorf("%s: %s, %d bytes, want %d", name, res.Status, len(body), len(want))
			}
			kind := map[string]string{".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".svg": "image/svg+xml"}[path.Ext(file)]
			if h.Get("Access-Control-Allow-Origin") != "*" {
				t.Errorf("%s: %v; a page of another origin could not import it", name, h)
			}
			if kind != "" && h.Get("Content-Type") != kind || h.Get("Content-Type") == "" || h.Get("X-Content-Type-Options") != "nosniff" {
				t.Errorf("%s: %v, want %s and nosniff", name, h, kind)
			}
			etag := h.Get("ETag")
			if other, ok := etags[etag]; ok && other != string(want) {
				t.Errorf("%s: the ETag %s is another file's", name, etag)
			}
			etags[etag] = string(want)
			if !regexp.MustCompile(`^"[0-9a-f]{16,}"$`).MatchString(etag) || h.Get("Cache-Control") == "" || h.Get("Content-Security-Policy") == "" {
				t.Errorf("%s: %v", name, h)
			}
			res, body = b.do("GET", name, "", "If-None-Match: "+etag)
			if res.StatusCode != 304 || body != "" || res.Header.Get("ETag") != etag {
				t.Errorf("%s again: %s, %d bytes, want 304", name, res.Status, len(body))
			}
			if res, _ = b.do("GET", name, "", `If-None-Match: "other"`); res.StatusCode != 200 {
				t.Errorf("%s, changed: %s", name, res.Status)
			}
			if res, body = b.do("HEAD", name, ""); res.StatusCode != 200 || body != "" || res.ContentLength != int64(len(want)) || res.Header.Get("ETag") != etag {
				t.Errorf("HEAD %s: %s", name, res.Status)
			}
			if res, _ = b.do("POST", name, "hi"); res.StatusCode != 405 || !strings.Contains(res.Header.Get("Allow"), "GET") {
				t.Errorf("POST %s: %s, Allow: %s", name, res.Status, res.Header.Get("Allow"))
			}
		}
		for _, name := range []string{"/..", "/../main.go", "/static/index.html", "/static/../main.go", "/%2e%2e/main.go", "/..%2fmain.go", "//index.html", "/index.html/", "/index.html%00", "/.", "/main.go", "/source/main.go", "/source/index.html", "/source/", "/\\index.html", "/static", "/favicon.ico2", "/.git/config"} {
			res, body := b.doRaw("GET", name, "")
			if res.StatusCode != 404 || !isError(body) {
				t.Errorf("%s: %s %.60s, want 404", name, res.Status, body)
			}
		}
		res, body := b.do("GET", "/healthz", "")
		if res.StatusCode != 200 || !json.Valid([]byte(body)) || res.Header.Get("Cache-Control") != "no-store" {
			t.Errorf("healthz: %s %s %v", res.Status, body, res.Header)
		}
	})
}

// What is served of a script or a style is the source, without comments and white space that
// mean nothing: all else is the same, byte for byte.
func TestServedWithoutComments(t *testing.T) {
	for name, f := range files {
		source, ok := strings.CutPrefix(name, "/source/")
		if !ok {
			continue
		}
		served := files["/"+source].plain
		want, got := tokens(f.plain), tokens(served)
		if len(want) < 10 || !slices.Equal(got, want) {
			i := 0
			for i < min(len(got), len(want)) && got[i] == want[i] {
				i++
			}
			t.Errorf("%s: served is %.60q, and written is %.60q", source, strings.Join(got[i:], ""), strings.Join(want[i:], ""))
		}
		if regexp.MustCompile(`(?m)^(\s|//|/\*)`).MatchString(served) {
			t.Errorf("%s: comments or white space are left:\n%.300s", source, served)
		}
	}
	for source, want := range map[string]string{
		"// a\n\n  b  // c\n\t/* d\n e */\n/** f */ g\n": "b\ng\n",
		"a('b') // c's\n":                              "a('b')\n",
		"a { b: c; } /* d: e */\n":                     "a { b: c; }\n",
		"a = 'http://b' // c 'd'\n":                    "a = 'http://b' // c 'd'\n",
		"a = ' // b'\nc = \" /* d */\"\ne = ` // f`\n": "a = ' // b'\nc = \" /* d */\"\ne = ` // f`\n",
		"a/b // c\n* d\n":                              "a/b\n* d\n",
	} {
		if got := withoutComments(source); got != want {
			t.Errorf("%q becomes %q, want %q", source, got, want)
		}
	}
}

// tokens splits a script or a style. A string, a regular expression and a template's text
// are one token each, with all that is in them; otherwise each character is one. White space
// and comments together are a space or, if a line ends there, a line's end.
func tokens(source string) []string {
	var all []string
	var braces []int // that are open in each of the templates' expressions around
	last := " "      // character that is not white space
	word := regexp.MustCompile(`\b(return|of|in|typeof)$`)
	for rest := source; rest != ""; {
		kind := oneCharacter
		inExpression := len(braces) > 0
		switch {
		case spaces.MatchString(rest):
			kind = spaces
		case rest[0] == '`':
			kind = template
		case inExpression && rest[0] == '}' && braces[len(braces)-1] == 0:
			kind, braces = template, braces[:len(braces)-1]
		case inExpression && rest[0] == '{':
			braces[len(braces)-1]++
		case inExpression && rest[0] == '}':
			braces[len(braces)-1]--
		case strings.ContainsAny(rest[:1], `'"`):
			kind = quoted
		case rest[0] == '/' && (strings.Contains(" (,=:[!&|?{};<>+-*%", last) || word.MatchString(strings.TrimSpace(source[:len(source)-len(rest)]))):
			kind = expression
		}
		token := kind.FindString(rest)
		if token == "" {
			return append(all, "not understood: "+rest)
		}
		rest = rest[len(token):]
		switch {
		case kind != spaces:
			last = token[len(token)-1:]
			if kind == template && strings.HasSuffix(token, "${") {
				braces = append(braces, 0)
			}
		case len(all) == 0 || rest == "":
			continue
		case strings.Contains(token, "\n"):
			token = "\n"
		default:
			token = " "
		}
		all = append(all, token)
	}
	return all
}

var (
	oneCharacter = regexp.MustCompile(`^(?s:.)`)
	spaces       = regexp.MustCompile(`^(?:\s|//.*|/\*(?s:.*?)\*/)+`)
	quoted       = regexp.MustCompile(`^(?:'(?:\\.|[^'\\\n])*'|"(?:\\.|[^"\\\n])*")`)
	expression   = regexp.MustCompile(`^/(?:\\.|\[(?:\\.|[^\]\\\n])*\]|[^/\n\\\[])+/`)
	template     = regexp.MustCompile("^[`}](?s:\\\\.|\\$[^{]|[^`\\\\$])*(?:`|\\${)")
)

// A first visit costs little, over a slow network, too. These are the bytes that are sent to
// a client that takes gzip.
func TestPagesAreSmall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestbed(t, pipe)
		ofPadAndCamera := regexp.MustCompile(`^/(pad|carets|rebase|replica|camera)\.`)
		pages, all := 0, 0
		for name := range files {
			kind := path.Ext(name)
			if kind != ".html" && kind != ".css" && kind != ".js" || strings.HasPrefix(name, "/source/") {
				continue
			}
			res, body := b.do("GET", name, "", "Accept-Encoding: gzip")
			if res.Header.Get("Content-Encoding") != "gzip" {
				t.Errorf("%s: %v", name, res.Header)
			}
			all += len(body)
			if !ofPadAndCamera.MatchString(name) {
				pages += len(body)
			}
		}
		if pages >= 59_500 || all >= 75_000 {
			t.Errorf("chat, lab, stats, inspector and what they load are %d bytes, want less than 59,500; with pad and camera %d, want less than 75,000", pages, all)
		}
		t.Logf("%d bytes, with pad and camera %d", pages, all)
	})
}

// A client that takes gzip is sent it, with an ETag of its own; the others are not.
func TestFilesCompressed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestbed(t, pipe)
		plain, text := b.do("GET", "/comet.js", "", "Accept-Encoding: identity")
		packed, body := b.do("GET", "/comet.js", "", "Accept-Encoding: gzip")
		zr, err := gzip.NewReader(strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(zr); err != nil || string(got) != text {
			t.Errorf("unpacked it is not the file: %d bytes, %v", len(got), err)
		}
		etag := packed.Header.Get("ETag")
		if etag == plain.Header.Get("ETag") {
			t.Errorf("both encodings have the ETag %s", etag)
		}
		for accept, want := range map[string]bool{
			"gzip, deflate, br": true, "GZIP": true, "br;q=1.0, gzip;q=0.8, *;q=0.1": true, "*": true, "identity;q=0, gzip;q=0.1": true,
			"gzip; q=0": false, "gzip;q=0, *": false, "gzip;q=0.000": false, "identity": false, "br": false, "": false, "*;q=0": false,
			"gzip;q=0.5, identity": false, "gzip;q=x": false, "gzipped": false,
		} {
			res, got := b.do("GET", "/comet.js", "", "Accept-Encoding: "+accept)
			h := res.Header
			if packed := h.Get("Content-Encoding") == "gzip"; packed != want || (got == text) == want || res.ContentLength != int64(len(got)) {
				t.Errorf("Accept-Encoding: %q: compressed is %t, want %t; %d bytes of %d", accept, packed, want, len(got), res.ContentLength)
			}
			if !strings.Contains(strings.Join(h["Vary"], ","), "Accept-Encoding") || h.Get("Content-Type") != "text/javascript; charset=utf-8" {
				t.Errorf("Accept-Encoding: %q: %v", accept, h)
			}
		}
		const take = "Accept-Encoding: gzip"
		if res, got := b.do("HEAD", "/comet.js", "", take); got != "" || res.ContentLength != int64(len(body)) || res.Header.Get("ETag") != etag || res.Header.Get("Content-Encoding") != "gzip" {
			t.Errorf("HEAD: %s, length %d, want %d", res.Status, res.ContentLength, len(body))
		}
		if res, got := b.do("GET", "/comet.js", "", take, "If-None-Match: "+etag); res.StatusCode != 304 || got != "" || res.Header.Get("ETag") != etag || res.Header.Get("Vary") == "" {
			t.Errorf("the same: %s %v", res.Status, res.Header)
		}
		if res, _ := b.do("GET", "/comet.js", "", "Accept-Encoding: identity", "If-None-Match: "+etag); res.StatusCode != 200 {
			t.Errorf("the same in another encoding: %s", res.Status)
		}
		if res, got := b.do("GET", "/comet.js", "", take, "Range: bytes=10-19", "If-Range: "+etag); res.StatusCode != 206 || got != body[10:20] {
			t.Errorf("ten bytes of the compressed: %s, %d bytes", res.Status, len(got))
		}
		if res, got := b.do("GET", "/comet.js", "", take, "Range: bytes=10-19", "If-Range: "+plain.Header.Get("ETag")); res.StatusCode != 200 || got != body {
			t.Errorf("ten bytes of the other encoding: %s, %d bytes, want all", res.Status, len(got))
		}
	})
}

// A client that loads a page that refreshes itself is present, and sees so.
func TestRefreshShowsWhoIsHere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestbed(t, pipe)
		for _, test := range []struct{ user, want string }{{"ada", "<bdi>ada</bdi> is here."}, {"bob", "<bdi>ada</bdi>, <bdi>bob</bdi> are here."}} {
			if _, page := b.do("GET", "/rooms/a/refresh?user="+test.user, ""); !strings.Contains(page, test.want) {
				t.Errorf("not on the page: %s\n%s", test.want, page)
			}
		}
	})
}

// Pages without JavaScript show a picture, with its sender's name in place of it where
// there are no pictures; what only says that it is one is text.
func TestPagesShowPictures(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestbed(t, pipe)
		url := dataURL("image/png", testImages["image/png"])
		b.do("POST", "/rooms/a?user=ad%22a", testImages["image/png"], "Content-Type: image/png")
		b.post("a?type=image", "data:image/svg+xml;base64,PHN2Zy8+")
		b.post("a?type=image", `data:image/png;base64,"><script>`)
		_, page := b.do("GET", "/rooms/a/refresh", "")
		for _, want := range []string{`<img src="` + html.EscapeString(url) + `" alt="a picture by ad&#34;a">`, `<span dir="auto">data:image/svg+xml;`, `base64,&#34;&gt;&lt;script&gt;`} {
			if !strings.Contains(page, want) {
				t.Errorf("the page lacks %s:\n%s", want, page)
			}
		}
	})
}

// A page as a part of multipart has a size, beyond which the oldest messages are left out. A
// gap is not.
func TestAPageOfLongMessagesShowsTheGap(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newLimitedTestbed(t)
		for i := range 12 {
			data, _ := json.Marshal(fmt.Sprint(strings.Repeat("x", 50_000), i))
			b.relay.publish(publishRequest{room: "a", kind: "message", data: data})
		}
		r := b.open("192.0.2.1", "GET /rooms/a/multipart?as=html&after=0", "")
		defer r.stop()
		r.readUntil("</main>") // before anything was read
		if line := r.readUntil(`class="message"`); !strings.Contains(line, "x11</span>") {
			t.Errorf("the newest message is not on top: %.100s", line)
		}
		for n := 1; ; n++ {
			line := r.readUntil(`<p class="`)
			if strings.Contains(line, "Some messages may be missing here") {
				if n != 5 {
					t.Errorf("before the gap there are %d messages of 50 KB", n)
				}
				return
			}
		}
	})
}
