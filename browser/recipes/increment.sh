#!/bin/sh
# Adds 1 to a counter. Others do so too: what is published is the newest number and 1, if it still is the newest.
#     sh increment.sh http://localhost:8080/rooms/counter
while
  newest=$(curl -sSf "$1/poll?last=1") || exit
  id=$(printf %s "$newest" | jq '.events[-1].id // 0')
  count=$(($(printf %s "$newest" | jq '.events[-1].data // 0') + 1))
  status=$(curl -sS -o /dev/null -w '%{http_code}' -H 'Content-Type: application/json' -d "$count" "$1?if=$id")
  [ "$status" = 412 ]
do :; done
[ "$status" = 201 ] && echo "$count"
