// Follows a room, through cuts and restarts, with the standard library.
//
//	go run follow.go http://localhost:8080/rooms/lobby
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"log"
	"net/http"
	"os"
	"time"
)

type event struct {
	ID   int64
	Type string
	From string
	Data json.RawMessage
}

// follow calls each with every event behind the cursor; 0 is from now on.
func follow(url string, cursor int64, each func(event)) {
	for ; ; time.Sleep(time.Second) {
		from := url + "/stream"
		if cursor != 0 {
			from += fmt.Sprint("?after=", cursor)
		}
		answer, err := http.Get(from)
		if err != nil {
			log.Print(err)
			continue
		}
		const timeout = 40 * time.Second // heartbeats come every 15
		silence := time.AfterFunc(timeout, func() { answer.Body.Close() })
		lines := bufio.NewScanner(answer.Body)
		lines.Buffer(nil, 1<<20)
		for lines.Scan() {
			silence.Reset(timeout)
			var e event
			if json.Unmarshal(lines.Bytes(), &e) != nil {
				continue // a heartbeat, or a line that was cut off: it comes again
			}
			each(e)
			if e.ID != 0 {
				cursor = e.ID
			}
		}
		log.Print(answer.Status, ": ended: ", lines.Err())
		silence.Stop()
		answer.Body.Close()
	}
}

func main() {
	follow(os.Args[1], 0, func(e event) {
		switch e.Type {
		case "message":
			fmt.Printf("%s\n", e.Data)
		case "gap":
			log.Printf("events may be lost: %s", e.Data)
		}
	})
}
