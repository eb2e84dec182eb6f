package main

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"
)

// The floor is the least that a server can do in Go: accept, answer a fixed head, and write an
// event's bytes to all with one loop of conn.Write. It keeps no history, no cursor, no heartbeat,
// notices nobody leaving, and one client that does not read stops it for all. Its bytes are the
// relay's SSE.
func floor(addr string) error {
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	var (
		mu    sync.Mutex
		rooms = map[string][]net.Conn{}
		id    = time.Now().UnixMicro()
	)
	publish := func(room string, data []byte) {
		mu.Lock()
		defer mu.Unlock()
		id++
		event := fmt.Appendf(nil, "data: {\"id\":%d,\"room\":%q,\"type\":\"message\",\"time\":%d,\"data\":%q}\nid: %d\n\n",
			id, room, time.Now().UnixMilli(), data, id)
		for _, c := range rooms[room] {
			c.Write(event)
		}
	}
	serve := func(c net.Conn) {
		var first [1024]byte
		n, _ := c.Read(first[:])
		_, path, _ := strings.Cut(string(first[:n]), "/rooms/")
		if first[0] == 'G' {
			room, _, _ := strings.Cut(path, "/")
			c.Write([]byte("HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nCache-Control: no-store\r\n\r\n"))
			mu.Lock()
			rooms[strings.Clone(room)] = append(rooms[room], c)
			mu.Unlock()
			return // nothing is left of it but the connection
		}
		defer c.Close()
		r := bufio.NewReader(io.MultiReader(bytes.NewReader(first[:n]), c))
		for {
			req, err := http.ReadRequest(r)
			if err != nil {
				return
			}
			data, err := io.ReadAll(req.Body)
			if err != nil {
				return
			}
			publish(strings.TrimPrefix(req.URL.Path, "/rooms/"), data)
			c.Write([]byte("HTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n"))
		}
	}
	for {
		c, err := ln.Accept()
		if err != nil {
			return err
		}
		go serve(c)
	}
}

// handler is the least that net/http can do, with the timeouts that a server on the internet
// needs, and the relay has: a POST whose body is read and answered, and a
// long-poll that waits on a channel for the next message. It remembers one message, so it can
// lose when two come at once; at one a second it does not.
func handler(addr string) error {
	var (
		mu    sync.Mutex
		id    = time.Now().UnixMicro()
		event []byte
		next  = make(chan struct{})
	)
	mux := http.NewServeMux()
	mux.HandleFunc("POST /rooms/{room}", func(w http.ResponseWriter, r *http.Request) {
		data, err := io.ReadAll(r.Body)
		if err != nil {
			return
		}
		if r.PathValue("room") == "r0" && len(data) > 0 && data[0] == '@' { // not of the publish shape
			mu.Lock()
			id++
			event = fmt.Appendf(nil, "{\"cursor\":%d,\"events\":[{\"id\":%d,\"room\":\"r0\",\"type\":\"message\",\"time\":%d,\"data\":%q}]}\n",
				id, id, time.Now().UnixMilli(), data)
			close(next)
			next = make(chan struct{})
			mu.Unlock()
		}
		w.WriteHeader(http.StatusCreated)
	})
	mux.HandleFunc("GET /rooms/{room}/poll", func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		fmt.Fprintf(w, "{\"cursor\":%d,\"events\":[]}\n", id)
	})
	mux.HandleFunc("GET /rooms/{room}/longpoll", func(w http.ResponseWriter, r *http.Request) {
		after, _ := strconv.ParseInt(r.URL.Query().Get("after"), 10, 64)
		mu.Lock()
		late, wait := id > after, next
		mu.Unlock()
		if !late {
			select {
			case <-wait:
			case <-r.Context().Done():
				return
			}
		}
		mu.Lock()
		answer := event
		mu.Unlock()
		w.Header().Set("Content-Type", "application/json")
		w.Write(answer)
	})
	srv := &http.Server{Addr: addr, Handler: mux, ReadTimeout: 10 * time.Second, IdleTimeout: 2 * time.Minute, WriteTimeout: time.Minute}
	return srv.ListenAndServe()
}
