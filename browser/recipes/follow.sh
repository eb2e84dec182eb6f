#!/bin/sh
# Follows a room: a message a line, through cuts and restarts. The cursor is kept in a file.
#     sh follow.sh http://localhost:8080/rooms/lobby lobby.cursor | jq -r .data
url=$1 file=${2:-cursor}
while :; do
  after=$(cat "$file" 2>/dev/null)
  curl -sSfN --keepalive-time 15 "$url/stream${after:+?after=$after}" |
    jq -Rr --unbuffered 'fromjson? | "\(.id // "-") \(.type) \(tojson)"' |
    while read -r id type event; do
      case $type in
        message) printf '%s\n' "$event" ;;
        gap) printf 'events may be lost: %s\n' "$event" >&2 ;;
      esac
      [ "$id" = - ] || echo "$id" >"$file"
    done
  sleep 1
done
