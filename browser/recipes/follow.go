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
		if err := read(url, &cursor, each); err != nil {
			log.Print(err)
		}
	}
}

func read(url string, cursor *int64, each func(event)) error {
	url += "/stream"
	if *cursor != 0 {
		url += fmt.Sprint("?after=", *cursor)
	}
	answer, err := http.Get(url)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	if answer.StatusCode != http.StatusOK {
		return fmt.Errorf("the relay answered %s", answer.Status)
	}
	silence := time.AfterFunc(40*time.Second, func() { answer.Body.Close() }) // heartbeats come every 15 s
	defer silence.Stop()
	lines := bufio.NewReader(answer.Body)
	for {
		line, err := lines.ReadBytes('\n')
		if err != nil {
			return err // a line that was cut off comes again
		}
		silence.Reset(40 * time.Second)
		if len(line) == 1 {
			continue
		}
		var e event
		if err := json.Unmarshal(line, &e); err != nil {
			return err
		}
		each(e)
		if e.ID != 0 {
			*cursor = e.ID
		}
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
