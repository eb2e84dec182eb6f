//go:build ignore

// The smallest program around the relay: go run relay.go transports.go presence.go minimal.go

package main

import (
	"cmp"
	"log"
	"net/http"
	"os"
	"time"
)

func main() {
	r := newRelay(defaultLimits)
	go func() {
		for now := range time.Tick(time.Minute) {
			r.sweep(now)
		}
	}()
	log.Fatal(http.ListenAndServe(":"+cmp.Or(os.Getenv("PORT"), "8080"), newServer(r)))
}
