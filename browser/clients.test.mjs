// Clients that others wrote, as npm and Debian have them, and the README's recipes: each reads through a network that
// is cut, and in the end has every message once. Run it with `npm test`.

import assert from 'node:assert/strict'
import { execFile, spawn } from 'node:child_process'
import { createReadStream, existsSync, mkdtempSync, readFileSync, readdirSync, rmSync, writeFileSync } from 'node:fs'
import http from 'node:http'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, before, describe, test } from 'node:test'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'
import { EventSource as NodeEventSource } from 'eventsource'
import NodeWebSocket from 'ws'
import { missing, network } from './harm.mjs'
import { browse, open, start, until } from './relay.mjs'

const here = fileURLToPath(new URL('.', import.meta.url))
const recipe = name => join(here, 'recipes', name)
const run = promisify(execFile)
const limit = { timeout: 50e3 }
const together = { concurrency: true } // most of the time they wait to connect again
const python = '/usr/bin/python3'

let relay, pages, rooms = 0
before(async () => {
  pages = await site()
  relay = await start('-beat', '1s', '-rate', '10000', '-events', '4000', '-origins', pages.url)
})
after(() => Promise.all([relay?.stop(), pages?.stop()]))

/**
 * Serves pages, the libraries as they were installed, and, as a proxy in front of all would, the relay behind a network.
 * Where that is cut, the proxy answers 502, or breaks the connection.
 */
async function site() {
  const html = new Map, types = { js: 'text/javascript', mjs: 'text/javascript', html: 'text/html; charset=utf-8' }
  const server = http.createServer((request, response) => {
    const { pathname } = new URL(request.url, 'http://site')
    const [, broken, port, path] = /^\/(reset|502)\/(\d+)(\/.*)/.exec(request.url) ?? []
    if (path) {
      const ask = http.request({ port, host: '127.0.0.1', path, method: request.method, headers: request.headers, agent: false }, answer => {
        response.writeHead(answer.statusCode, answer.headers)
        answer.pipe(response)
        answer.on('error', () => response.destroy())
      })
      ask.on('error', () => broken === 'reset' || response.headersSent ? request.socket.destroy() : response.writeHead(502).end())
      response.on('close', () => ask.destroy())
      return request.pipe(ask)
    }
    const page = html.get(pathname)
    if (page) return response.setHeader('Content-Type', types.html).end(page)
    const file = ['', '.js'].map(end => join(here, 'node_modules', pathname + end)).find(file => /\.m?js$/.test(file) && existsSync(file))
    if (!file) return response.writeHead(404).end()
    response.setHeader('Content-Type', types[file.split('.').pop()])
    createReadStream(file).pipe(response)
  })
  await new Promise(done => server.listen(0, '127.0.0.1', done))
  const url = `http://127.0.0.1:${server.address().port}`
  return {
    url,
    /** A page, and its address. It tells what went wrong in it. */
    add(body) {
      const path = '/page/' + html.size
      html.set(path, `<!DOCTYPE html><title>page</title><link rel="icon" href="data:,">
<script>
const seen = [], wrong = []
addEventListener('error', e => wrong.push(e.message ?? 'a script is missing'), true)
addEventListener('unhandledrejection', e => wrong.push(String(e.reason?.stack ?? e.reason)))
</script>
${body}`)
      return url + path
    },
    stop: () => { server.close(); server.closeAllConnections() },
  }
}

const ask = async (url, options) => {
  const answer = await fetch(url, options)
  if (!answer.ok) throw new Error(`${url}: ${await answer.text()}`)
  return answer.json()
}
const publish = (room, body, query = '') => ask(`${relay.url}/rooms/${room}?${query}`, { method: 'POST', body })
const history = async room => (await ask(`${relay.url}/rooms/${room}/poll?last=1000`)).events

/** Waits until somebody reads the room. */
const read = room => until(`${room} is read`, async () => {
  const { rooms } = await ask(`${relay.url}/rooms?prefix=${room}`)
  return rooms.some(r => r.room === room && r.readers)
})

/** A room, and a network in between. */
async function way(t) {
  const wire = await network(relay.port)
  t.after(() => wire.stop())
  const room = `room-${++rooms}`
  return { wire, room, url: `${wire.url}/rooms/${room}`, proxied: `${pages.url}/reset/${wire.port}/rooms/${room}`, refused: `${pages.url}/502/${wire.port}/rooms/${room}` }
}

/**
 * Publishes while the network is there, and while it is not: cut until the client has tried in vain, and cut in mid-stream.
 * `seen` gives what the client has, `say` how a text is published.
 */
async function survives({ wire, room }, seen, say = text => publish(room, text)) {
  const should = []
  const more = async count => {
    for (; count; count--) {
      should.push(`no. ${should.length + 1} ✓\n  in two lines`)
      await say(should.at(-1))
    }
  }
  const all = () => until('all is there', async () => (await seen()).length >= should.length, 15e3)
    .catch(async error => { assert.equal((await seen()).join('\n'), should.join('\n'), error.message) })
  await read(room)
  await more(3)
  await all()

  const { tries } = wire
  wire.set('cut')
  await more(3)
  await until('the client tries again', () => wire.tries > tries)
  await more(3)
  wire.set('pass')
  await all()

  await more(30)
  wire.set('cut')
  wire.set('pass')
  await more(30)
  await all()

  await more(1) // what is doubled has come by then
  await all()
  assert.equal((await seen()).join('\n'), should.join('\n'))
}

/** Opens a page in which a client reads; gives what `seen` and `wrong` are in it. */
async function client(t, browser, body) {
  const page = await open(browser, pages.add(body))
  t.after(() => page.close().catch(() => { }))
  page.seen = () => page.evaluate(() => document.querySelector('#log') ? [...document.querySelectorAll('#log > p')].map(p => p.textContent) : seen)
  page.wrong = () => page.evaluate(() => wrong)
  return page
}

const module = script => `<script type="module">${script}</script>`

/** Readers of a page, by the room's address: of another origin, or of its own. */
const readers = {
  // Firefox's gives up for good when it is refused by another origin.
  'EventSource': ({ proxied }) => module(`
    new EventSource('${proxied}/sse').onmessage = e => seen.push(JSON.parse(e.data).data)`),

  'event-source-polyfill': ({ url }) => '<script src="/event-source-polyfill/src/eventsource.js"></script>' + module(`
    new EventSourcePolyfill('${url}/sse').onmessage = e => seen.push(JSON.parse(e.data).data)`),

  // A handler that takes everything for JSON: it throws if a block has none.
  '@microsoft/fetch-event-source': ({ url }) => module(`
    import { fetchEventSource } from '/@microsoft/fetch-event-source/lib/esm/index.js'
    fetchEventSource('${url}/sse', {
      openWhenHidden: true,
      onmessage(e) {
        const event = JSON.parse(e.data)
        if (event.type === 'message') seen.push(event.data)
      },
      onclose() { throw new Error('again') },
    })`),

  'sse.js': ({ url }) => module(`
    import { SSE } from '/sse.js/lib/sse.js'
    new SSE('${url}/sse', { autoReconnect: true }).onmessage = e => seen.push(JSON.parse(e.data).data)`),

  // It knows the cursor only from events that are listened for by addEventListener.
  'reconnecting-eventsource': ({ url }) => module(`
    import ReconnectingEventSource from '/reconnecting-eventsource/build/esm/reconnecting-eventsource.js'
    new ReconnectingEventSource('${url}/sse').addEventListener('message', e => seen.push(JSON.parse(e.data).data))`),

  'reconnecting-websocket': ({ url }) => module(`
    import ReconnectingWebSocket from '/reconnecting-websocket/dist/reconnecting-websocket-mjs.js'
    let after = ''
    const socket = new ReconnectingWebSocket(() => '${url.replace('http', 'ws')}/ws' + after)
    socket.onmessage = e => {
      for (const line of e.data.split('\\n')) {
        const event = JSON.parse(line)
        if (event.id) after = '?after=' + event.id
        if (event.type === 'message') seen.push(event.data)
      }
    }`),
}

// The same, where a proxy answers 502 while the network is cut: that ends a browser's EventSource for good, and those
// of these that are made of one begin another.
const refused = ['@microsoft/fetch-event-source', 'sse.js', 'reconnecting-eventsource']

// Those that put what they are told into the page.

const p = text => `<p>${text}</p>`
const prefixed = (prefix, text) => text.split('\n').map(line => prefix + line).join('\n')
const stream = text => `<turbo-stream action="append" target="log"><template>${p(text)}</template></turbo-stream>`
const htmx = '<script src="/htmx.org/dist/htmx.js"></script>'

const swappers = {
  'htmx sse': {
    page: ({ url }) => `${htmx}<script src="/htmx-ext-sse/dist/sse.js"></script>
      <main id="log" hx-ext="sse" sse-connect="${url}/sse?as=data" sse-swap="message" hx-swap="beforeend"></main>`,
    data: p,
  },
  '@hotwired/turbo': {
    page: ({ url }) => `<script type="module" src="/@hotwired/turbo/dist/turbo.es2017-esm.js"></script>
      <turbo-stream-source src="${url}/sse?as=data"></turbo-stream-source><main id="log"></main>`,
    data: stream,
  },
  // What both have of their own loses its cursor when a proxy answers 502; this does not.
  'htmx sse with reconnecting-eventsource': {
    page: ({ refused }) => `${htmx}<script src="/htmx-ext-sse/dist/sse.js"></script>` + module(`
      import ReconnectingEventSource from '/reconnecting-eventsource/build/esm/reconnecting-eventsource.js'
      htmx.createEventSource = url => new ReconnectingEventSource(url)`) + `
      <main id="log" hx-ext="sse" sse-connect="${refused}/sse?as=data" sse-swap="message" hx-swap="beforeend"></main>`,
    data: p,
  },
  '@hotwired/turbo with reconnecting-eventsource': {
    page: ({ refused }) => module(`
      import { connectStreamSource } from '/@hotwired/turbo/dist/turbo.es2017-esm.js'
      import ReconnectingEventSource from '/reconnecting-eventsource/build/esm/reconnecting-eventsource.js'
      connectStreamSource(new ReconnectingEventSource('${refused}/sse?as=data'))`) + '<main id="log"></main>',
    data: stream,
  },
  // What npm has is older than the names that Datastar has now: datastar-patch-elements, mode and elements.
  '@starfederation/datastar': {
    page: ({ url }) => `<script type="module" src="/@starfederation/datastar/dist/datastar.js"></script>
      <main id="log" data-on-load="@get('${url}/sse?as=data', {openWhenHidden: true, retryMaxCount: 1000})"></main>`,
    type: 'datastar-merge-fragments',
    data: text => `selector #log\nmergeMode append\n${prefixed('fragments ', p(text))}`,
  },
}

const executables = { chromium: '/usr/bin/chromium', firefox: '/usr/bin/firefox-esr' }

// Programs.

/** Starts a program that follows a room; gives a function that gives what it has said, and can end it. */
function program(t, command, args, parse) {
  const child = spawn(command, args, { detached: true, stdio: ['ignore', 'pipe', process.env.COMETES_LOG ? 'inherit' : 'ignore'] })
  const ended = new Promise(done => child.once('close', done))
  const end = () => {
    try { process.kill(-child.pid) } catch { }
    return ended
  }
  t.after(end)
  let out = ''
  child.stdout.setEncoding('utf8').on('data', part => out += part)
  return Object.assign(() => out.split(/\n(?=no\.|["{])|\n$/).filter(Boolean).map(parse), { end })
}

const temporary = t => {
  const folder = mkdtempSync(join(tmpdir(), 'clients-'))
  t.after(() => rmSync(folder, { recursive: true, force: true }))
  return folder
}

/** Says what is missing, if something is; in CI that is a failure. */
const without = (...tools) => missing(...tools.map(tool => `/usr/bin/${tool}`))
const withoutPython = name => without('python3') || missing(`/usr/lib/python3/dist-packages/${name}`)

describe('clients of others', together, () => {
  describe('in a browser', { ...together, skip: missing(...Object.values(executables)) }, () => {
    const browsers = {}
    before(() => Promise.all(Object.keys(executables).map(async name => browsers[name] = await browse(name))))
    after(() => Promise.all(Object.values(browsers).map(browser => browser.close())))

    for (const name in executables) {
      for (const reader in readers) test(`${name}: ${reader}`, limit, async t => {
        const between = await way(t)
        const page = await client(t, browsers[name], readers[reader](between))
        await survives(between, page.seen)
        assert.deepEqual(await page.wrong(), [])
      })

      test(`${name}: new WebSocket with a list of subprotocols`, limit, async t => {
        const { room, url } = await way(t)
        const page = await client(t, browsers[name], module(`
          const socket = new WebSocket('${url.replace('http', 'ws')}/ws', ['chat', 'superchat'])
          socket.onopen = () => seen.push(socket.protocol)
          socket.onerror = () => seen.push('it failed')
          socket.onmessage = e => seen.push(JSON.parse(e.data).type)`))
        await until('it says something', async () => (await page.seen()).length > 1)
        assert.deepEqual((await page.seen()).slice(0, 2), ['chat', 'hello'])
      })
    }

    for (const reader of refused) test(`${reader}, answered 502`, limit, async t => {
      const between = await way(t)
      const page = await client(t, browsers.chromium, readers[reader]({ ...between, url: between.refused }))
      await survives(between, page.seen)
      assert.deepEqual(await page.wrong(), [])
    })

    for (const name in swappers) test(name, limit, async t => {
      const between = await way(t), { page, data, type = 'message' } = swappers[name]
      const shown = await client(t, browsers.chromium, page(between))
      await survives(between, shown.seen, text => publish(between.room, data(text), 'type=' + type))
      assert.deepEqual(await shown.wrong(), [])
    })

    // It connects again, but to the same address: what it can have is the newest.
    test('htmx ws', limit, async t => {
      const { room, url, wire } = await way(t)
      const say = text => publish(room, `<main id="log">${p(text)}</main>`)
      const page = await client(t, browsers.chromium, `${htmx}<script src="/htmx-ext-ws/dist/ws.js"></script>
        <div hx-ext="ws" ws-connect="${url.replace('http', 'ws')}/ws?as=data&last=1">
          <main id="log"></main>
          <form ws-send><input name="data" value="&lt;main id=log>&lt;p>from the page"><button></button></form>
        </div>`)
      const shows = text => until(`it shows ${text}`, async () => (await page.seen()).join() === text)
      await read(room)
      await say('one')
      await shows('one')
      await Promise.all(Array.from({ length: 20 }, (_, i) => say('many ' + i)))
      await say('two')
      await shows('two')
      const { tries } = wire
      wire.set('cut')
      await say('three')
      await until('it tries again', () => wire.tries > tries)
      wire.set('pass')
      await shows('three')
      await page.evaluate(() => document.querySelector('form').requestSubmit())
      await shows('from the page')
      assert.deepEqual(await page.wrong(), [])
    })

    // It connects again after some close codes only.
    test('htmx ws, sent away by the relay', limit, async t => {
      const young = await start('-age', '300ms', '-origins', pages.url)
      t.after(young.stop)
      const wire = await network(young.port)
      t.after(() => wire.stop())
      await client(t, browsers.chromium, `${htmx}<script src="/htmx-ext-ws/dist/ws.js"></script>
        <div hx-ext="ws" ws-connect="${wire.url.replace('http', 'ws')}/rooms/lobby/ws?as=data"></div>`)
      await until('it comes back twice', () => wire.tries > 2)
    })

    test('the recipe for a counter: two pages increment it', limit, async t => {
      const { room } = await way(t)
      const script = readFileSync(recipe('increment.js'), 'utf8').replaceAll('http://localhost:8080', relay.url).replace('rooms/counter', 'rooms/' + room)
      const counters = await Promise.all(['chromium', 'firefox'].map(name => client(t, browsers[name], module(`${script}
        for (let i = 0; i < 20; i++) seen.push(await increment())`))))
      for (const page of counters) await until('it has counted', async () => {
        assert.deepEqual(await page.wrong(), [])
        return (await page.seen()).length === 20
      })
      assert.deepEqual((await history(room)).map(({ data }) => data), Array.from({ length: 40 }, (_, i) => i + 1))
    })
  })

  describe('programs', together, () => {
    test('eventsource', limit, async t => {
      const between = await way(t), seen = []
      const source = new NodeEventSource(between.url + '/sse')
      t.after(() => source.close())
      source.onmessage = e => seen.push(JSON.parse(e.data).data)
      await survives(between, () => seen)
    })

    test('ws, which offers subprotocols', limit, async t => {
      const between = await way(t), seen = [], protocols = new Set
      let after = '', socket, timer
      const connect = () => {
        socket = new NodeWebSocket(`${between.url.replace('http', 'ws')}/ws${after}`, ['chat', 'superchat'])
        socket.on('open', () => protocols.add(socket.protocol))
        socket.on('message', frame => String(frame).split('\n').map(JSON.parse).forEach(event => {
          if (event.id) after = '?after=' + event.id
          if (event.type === 'message') seen.push(event.data)
        }))
        socket.on('error', () => { })
        socket.on('close', () => timer = setTimeout(connect, 1000))
      }
      connect()
      t.after(() => { socket.removeAllListeners('close'); socket.terminate(); clearTimeout(timer) })
      await survives(between, () => seen)
      assert.deepEqual([...protocols], ['chat'])
    })

    for (const name of ['websockets', 'aiohttp']) test(`Python: ${name}`, { ...limit, skip: withoutPython(name) }, async t => {
      const between = await way(t)
      await survives(between, program(t, python, [join(here, 'clients.py'), name, between.url], JSON.parse))
    })

    test('the recipe for Python', { ...limit, skip: without('python3') }, async t => {
      const between = await way(t)
      await survives(between, program(t, python, [recipe('follow.py'), between.url], text => text))
    })

    test('the recipe for Go', limit, async t => {
      const between = await way(t), binary = join(temporary(t), 'follow')
      await run('go', ['build', '-o', binary, recipe('follow.go')])
      await survives(between, program(t, binary, [between.url], JSON.parse))
    })

    test('the recipe for a shell that follows; it goes on where it was when it was ended', { ...limit, skip: without('curl', 'jq') }, async t => {
      const between = await way(t), file = join(temporary(t), 'cursor')
      const seen = program(t, 'sh', [recipe('follow.sh'), between.url, file], line => JSON.parse(line).data)
      await survives(between, seen)
      const [newest] = (await history(between.room)).slice(-1)
      await until('the cursor is written', () => readFileSync(file, 'utf8') === newest.id + '\n')
      await seen.end()
      await publish(between.room, 'no. 1000')
      const again = program(t, 'sh', [recipe('follow.sh'), between.url, file], line => JSON.parse(line).data)
      await until('it has it', () => again().length)
      assert.deepEqual(again(), ['no. 1000'])
    })

    test('the recipe for a shell that publishes: once, though the answer is lost twice', { ...limit, skip: without('curl') }, async t => {
      let tries = 0
      const server = http.createServer(async (request, response) => {
        const parts = []
        for await (const part of request) parts.push(part)
        const { 'idempotency-key': key, 'content-type': type } = request.headers
        const answer = await fetch(relay.url + request.url, { method: 'POST', headers: { 'Idempotency-Key': key, 'Content-Type': type }, body: Buffer.concat(parts) })
        if (++tries < 3) return request.socket.destroy()
        response.writeHead(answer.status)
        response.end(await answer.text())
      })
      await new Promise(done => server.listen(0, '127.0.0.1', done))
      t.after(() => server.close())
      const { room } = await way(t)
      const publishing = run('sh', [recipe('publish.sh'), `http://127.0.0.1:${server.address().port}/rooms/${room}`])
      publishing.child.stdin.end('a=1&data=2\nand more')
      await publishing
      assert.equal(tries, 3)
      assert.deepEqual((await history(room)).map(({ data }) => data), ['a=1&data=2\nand more'])
    })

    test('the recipe for a shell that counts: two at once', { ...limit, skip: without('curl', 'jq') }, async t => {
      const { room } = await way(t)
      const count = async () => { for (let i = 0; i < 5; i++) await run('sh', [recipe('increment.sh'), `${relay.url}/rooms/${room}`]) }
      await Promise.all([count(), count()])
      assert.deepEqual((await history(room)).map(({ data }) => data), [1, 2, 3, 4, 5, 6, 7, 8, 9, 10])
    })

    test('the README has the recipes as they are tried here, or says where they are', () => {
      const readme = readFileSync(join(here, '../README.md'), 'utf8')
      for (const name of readdirSync(recipe(''))) {
        const lines = readFileSync(recipe(name), 'utf8').trimEnd().split('\n').map(line => line && '    ' + line)
        const shown = lines.some(line => line.length > 70 && readme.includes(line))
        assert(readme.includes(shown ? lines.join('\n') : `browser/recipes/${name}`), name)
      }
    })

    test('curl, as people call it', { ...limit, skip: without('curl') }, async t => {
      const { room } = await way(t), url = `${relay.url}/rooms/${room}`
      const file = join(temporary(t), 'notes.txt')
      writeFileSync(file, 'notes\n')
      const curl = async (...args) => JSON.parse((await run('curl', ['-sS', ...args])).stdout).id
      const ids = [
        await curl('-d', 'hi', url),
        await curl('-T', file, url),
        JSON.parse((await run('sh', ['-c', `echo now | curl -sS -T- ${url}`])).stdout).id,
        await curl('-H', 'Content-Type: application/cloudevents+json', '-d', '{"specversion":"1.0","data":1}', url),
        await curl('-H', 'Content-Type: text/json', '-d', '[1]', url),
        await curl('--json', '{"a":1}', url),
        await curl('-F', 'data=form', url),
      ]
      const events = await history(room)
      assert.deepEqual(events.map(({ id }) => id), ids)
      assert.deepEqual(events.map(({ data }) => data), ['hi', 'notes\n', 'now\n', { specversion: '1.0', data: 1 }, [1], { a: 1 }, 'form'])
    })
  })
})
