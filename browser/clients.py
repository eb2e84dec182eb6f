"""Python's clients from Debian: prints the data of every message as JSON, a line each. python3 clients.py NAME URL-OF-THE-ROOM"""
import asyncio, importlib, json, sys

module = importlib.import_module(sys.argv[1])
url = sys.argv[2]
after = None


def at(technique):
    return f'{url}/{technique}' + ('' if after is None else f'?after={after}')


def take(line):
    global after
    event = json.loads(line)
    after = event.get('id', after)
    if event['type'] == 'message':
        print(json.dumps(event['data']), flush=True)


async def with_websockets():
    while True:
        try:
            async with module.connect(at('ws').replace('http', 'ws', 1)) as socket:
                async for frame in socket:
                    for line in frame.split('\n'):
                        take(line)
        except (OSError, module.WebSocketException):
            pass
        await asyncio.sleep(1)


async def with_aiohttp():
    timeout = module.ClientTimeout(total=None, sock_read=40)
    async with module.ClientSession(timeout=timeout) as session:
        while True:
            try:
                async with session.get(at('stream')) as answer:
                    async for line in answer.content:
                        if line.endswith(b'}\n'):
                            take(line)
            except (OSError, module.ClientError, asyncio.TimeoutError):
                pass
            await asyncio.sleep(1)


asyncio.run({'websockets': with_websockets, 'aiohttp': with_aiohttp}[sys.argv[1]]())
