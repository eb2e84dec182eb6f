#!/bin/sh
# Publishes what comes in. It may be tried many times: the key makes it one message.
#     date | sh publish.sh http://localhost:8080/rooms/lobby
curl -sS --retry 20 --retry-all-errors -H "Idempotency-Key: $(date +%s%N)-$$" -H 'Content-Type: text/plain' --data-binary @- "$1"
