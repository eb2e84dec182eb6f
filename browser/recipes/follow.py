# Follows a room, through cuts and restarts, with nothing but the standard library.
#     python3 follow.py http://localhost:8080/rooms/lobby
import http.client, json, sys, time, urllib.error, urllib.request

def follow(url, after=None):
    while True:
        try:
            query = '' if after is None else f'?after={after}'
            with urllib.request.urlopen(f'{url}/stream{query}', timeout=40) as lines:  # heartbeats come every 15 s
                for line in lines:
                    if line.startswith(b'{') and line.endswith(b'}\n'):  # not a heartbeat, and whole
                        event = json.loads(line)
                        after = event.get('id', after)
                        yield event
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code not in (408, 429):
                raise
        except (OSError, http.client.HTTPException):
            pass
        time.sleep(1)

if __name__ == '__main__':
    for event in follow(sys.argv[1]):
        if event['type'] == 'message':
            print(event['data'], flush=True)
        elif event['type'] == 'gap':
            print('events may be lost:', event, file=sys.stderr)
