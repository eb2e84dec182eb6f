// Who may ask. A page of the relay's own origin always may; pages of other
// origins only if they are listed. Programs that are no browser send neither
// Origin nor Sec-Fetch-Site, and are not held up: the rule protects
// people whose browser a foreign page would use, not the relay.

package main

import (
	"fmt"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
)

// origins is the list of those whose pages may read and publish.
type origins struct {
	all       bool
	list      []string
	check     http.CrossOriginProtection
	ancestors string // whose pages may frame the relay's, as Content-Security-Policy has it
}

// newOrigins reads a comma separated list of origins, https://example.com or
// http://localhost:3000, or * for all.
func newOrigins(list string) (*origins, error) {
	o := &origins{}
	for origin := range strings.SplitSeq(list, ",") {
		switch origin = strings.TrimSpace(origin); {
		case origin == "":
		case origin == "*":
			o.all = true
		case o.check.AddTrustedOrigin(origin) != nil:
			return nil, fmt.Errorf("-origins: %q is no origin such as https://example.com", origin)
		default:
			o.list = append(o.list, origin)
		}
	}
	o.ancestors = "*"
	if !o.all {
		o.ancestors = strings.Join(append([]string{"'self'"}, o.list...), " ")
	}
	return o, nil
}

// listed reports whether the origin is on the list.
func (o *origins) listed(origin string) bool {
	return o.all || slices.Contains(o.list, origin)
}

// cors writes the headers (https://fetch.spec.whatwg.org/#http-cors-protocol)
// that let a page of a listed origin see the answer, be it an error.
func (o *origins) cors(w http.ResponseWriter, r *http.Request) {
	h, origin := w.Header(), r.Header.Get("Origin")
	if origin == "" && r.Method == http.MethodPost {
		return // no page is to see it, and no cache keeps it
	}
	h["Vary"] = byOrigin
	if origin == "" || !o.listed(origin) {
		return
	}
	h.Set("Access-Control-Allow-Origin", origin)
	h.Set("Access-Control-Expose-Headers", "Retry-After")
	if !o.all {
		h.Set("Access-Control-Allow-Credentials", "true")
	}
}

// allow says whether the page behind a request may make it. For a read through
// <script>, <img> or <iframe>, which name no Origin, it goes by the Referer; so it
// does where browsers send no Sec-Fetch-Site, to http:// elsewhere than on their
// own machine, unless it is a page that they ask for. It returns the foreign
// origin, "*" if it does not say which it is, or "" if the page is the relay's own
// or there is none.
//
// A link from anywhere to a page of the relay may be followed: the site it is
// on sees nothing of it.
func (o *origins) allow(r *http.Request) (string, error) {
	origin, site := r.Header.Get("Origin"), r.Header.Get("Sec-Fetch-Site")
	reads := r.Method == http.MethodGet || r.Method == http.MethodHead
	byReferer := site == "cross-site" || site == "same-site" || site == "" && !strings.Contains(r.Header.Get("Accept"), "text/html")
	if origin == "" && reads && byReferer {
		if from, err := url.Parse(r.Referer()); err == nil && from.Host != "" {
			origin = from.Scheme + "://" + from.Host
		}
	}
	if origin == "" && site == "" {
		return "", nil // no page is behind it, or one that hides
	}
	foreign := ""
	if origin != "" && site != "same-origin" && !sameHost(origin, r.Host) {
		foreign = origin
	}
	if o.all {
		if foreign == "" && site == "cross-site" {
			foreign = "*"
		}
		return foreign, nil
	}
	if reads && r.Header.Get("Sec-Fetch-Mode") == "navigate" && r.Header.Get("Sec-Fetch-Dest") == "document" {
		return "", nil
	}
	// CrossOriginProtection judges what changes something. What reads is
	// judged by the same rule.
	asked := r
	if reads {
		asked = &http.Request{Method: http.MethodPost, Host: r.Host, URL: r.URL, Header: http.Header{"Origin": {origin}, "Sec-Fetch-Site": {site}}}
	}
	if err := o.check.Check(asked); err != nil {
		return "", limit(http.StatusForbidden, "pages of this origin may not use this relay; it can be allowed with -origins", "origin", 0)
	}
	return foreign, nil
}

func sameHost(origin, host string) bool {
	u, err := url.Parse(origin)
	return err == nil && strings.EqualFold(u.Host, host)
}

// preflight answers OPTIONS: what may be asked for here, and for CORS with
// which headers. Chromium keeps the answer for two hours at most.
func (o *origins) preflight(w http.ResponseWriter, r *http.Request, methods string) {
	h := w.Header()
	h.Set("Allow", methods)
	if origin := r.Header.Get("Origin"); origin != "" && o.listed(origin) {
		h.Set("Access-Control-Allow-Methods", methods)
		// Beside the headers that the relay reads a page may send those of its own
		// tools, for tracing or of htmx: they mean nothing here, and do no harm.
		headers := "Authorization, Content-Type, Idempotency-Key, Last-Event-ID"
		if asked := r.Header.Get("Access-Control-Request-Headers"); asked != "" {
			headers += ", " + asked
		}
		h.Set("Access-Control-Allow-Headers", headers)
		h.Set("Access-Control-Max-Age", "7200")
	}
	w.WriteHeader(http.StatusNoContent)
}

// proxyHeaders are those by which proxies say that they are in between.
var proxyHeaders = []string{"X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto", "X-Real-Ip", "Forwarded", "Via", "Fly-Client-Ip", "Cf-Connecting-Ip", "True-Client-Ip"}

// isLocal reports whether a Host is a name of the machine itself for itself.
func isLocal(host string) bool {
	name := (&url.URL{Host: host}).Hostname()
	ip, err := netip.ParseAddr(name)
	return name == "localhost" || err == nil && ip.IsLoopback()
}

// operator returns an error unless the request is an operator's: one whose token
// names the room _stats; or, where there are no tokens, one from the machine
// itself that came through no proxy, as far as one can know: nginx speaks HTTP/1.0
// unless told otherwise, and a page that a name of another site leads here
// (DNS rebinding) asks for that name.
func (s *server) operator(r *http.Request, q *query) error {
	if s.secrets != nil {
		if q.claims.may(statsRoom, false) {
			return nil
		}
		return denied(http.StatusForbidden, "this is for operators, whose token may read "+statsRoom)
	}
	proxied := s.gate.trustProxy || !r.ProtoAtLeast(1, 1) || slices.ContainsFunc(proxyHeaders, func(name string) bool { return r.Header[name] != nil })
	if q.addr.IsLoopback() && !proxied && isLocal(r.Host) {
		return nil
	}
	return refuse(http.StatusForbidden, "this is for operators: ask from the machine itself, or give the relay a -secret and bring a token that may read "+statsRoom)
}

// listRooms is GET /rooms.
func (s *server) listRooms(w http.ResponseWriter, r *http.Request, q *query) error {
	if err := s.operator(r, q); err != nil {
		return err
	}
	prefix := q.get("prefix")
	if q.err != nil {
		return q.err
	}
	rooms, more := s.relay.list(prefix, maxListed)
	reply(w, http.StatusOK, map[string]any{"rooms": rooms, "more": more})
	return nil
}

// erase is DELETE /rooms/{room}.
func (s *server) erase(w http.ResponseWriter, r *http.Request, q *query) error {
	if q.rooms[0][0] == '_' {
		return errReserved
	}
	if err := s.operator(r, q); err != nil {
		return err
	}
	if err := s.relay.erase(q.rooms[0]); err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}
