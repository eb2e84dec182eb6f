// Clients that others wrote, as npm and Debian have them, and the README's recipes: each reads through a network that
// is cut, and in the end has every message once. Run it with `npm test`.

import assert from 'node:assert/strict'
import { execFile, execFileSync, spawn } from 'node:child_process'
import { createReadStream, existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import http from 'node:http'
import net from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, before, describe, test } from 'node:test'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'
import { EventSource as NodeEventSource } from 'eventsource'
import NodeWebSocket from 'ws'
import { missing, network } from './harm.mjs'
import { browse, open, sleep, start, until } from './relay.mjs'

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

/** Serves pages, the libraries as they were installed, and, as a proxy in front of all would, the relay behind a network. */
async function site() {
  const html = new Map, types = { js: 'text/javascript', mjs: 'text/javascript', html: 'text/html; charset=utf-8' }
  const server = http.createServer((request, response) => {
    const { pathname } = new URL(request.url, 'http://site')
    const [, port, path] = /^\/via\/(\d+)(\/.*)/.exec(request.url) ?? []
    if (path) {
      const ask = http.request({ port, host: '127.0.0.1', path, method: request.method, headers: request.headers, agent: false }, answer => {
        response.writeHead(answer.statusCode, answer.headers)
        answer.pipe(response)
        answer.on('error', () => response.destroy())
      })
      ask.on('error', () => response.headersSent ? response.destroy() : response.writeHead(502).end())
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
  return { wire, room, url: `${wire.url}/rooms/${room}`, behind: `${pages.url}/via/${wire.port}/rooms/${room}` }
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
  wire.is('cut')
  await more(3)
  await until('the client tries again', () => wire.tries > tries)
  await more(3)
  wire.is('pass')
  await all()

  await more(30)
  wire.is('cut')
  wire.is('pass')
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

/** Readers of a page. Each gets the room's address: of another origin, or of the same behind a proxy that answers 502. */
const readers = {
  'EventSource': ({ url }) => module(`
    new EventSource('${url}/sse').onmessage = e => seen.push(JSON.parse(e.data).data)`),

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

  // A browser's EventSource ends for good when it is answered 502; this one begins another.
  'reconnecting-eventsource': ({ behind }) => module(`
    import ReconnectingEventSource from '/reconnecting-eventsource/build/esm/reconnecting-eventsource.js'
    new ReconnectingEventSource('${behind}/sse').addEventListener('message', e => seen.push(JSON.parse(e.data).data))`),

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

for (const name of ['chromium', 'firefox']) {
  describe(name, { ...together, skip: missing({ chromium: '/usr/bin/chromium', firefox: '/usr/bin/firefox-esr' }[name]) }, () => {
    let browser
    before(async () => browser = await browse(name))
    after(() => browser?.close())

    for (const reader in readers) test(reader, limit, async t => {
      const between = await way(t)
      const page = await client(t, browser, readers[reader](between))
      await survives(between, page.seen)
      assert.deepEqual(await page.wrong(), [])
    })

    test('new WebSocket with a list of subprotocols', limit, async t => {
      const { room, url } = await way(t)
      const page = await client(t, browser, module(`
        const socket = new WebSocket('${url.replace('http', 'ws')}/ws', ['chat', 'superchat'])
        socket.onopen = () => seen.push(socket.protocol)
        socket.onerror = () => seen.push('it failed')
        socket.onmessage = e => seen.push(JSON.parse(e.data).type)`))
      await read(room)
      await publish(room, 'hi')
      await until('it hears', async () => (await page.seen()).includes('message'))
      assert.deepEqual(await page.seen(), ['chat', 'hello', 'message'])
    })
  })
}

// Those that put what they are told into the page.

const p = text => `<p>${text}</p>`
const prefixed = (prefix, text) => text.split('\n').map(line => prefix + line).join('\n')

const swappers = {
  'htmx sse': {
    page: ({ url }) => `<script src="/htmx.org/dist/htmx.js"></script><script src="/htmx-ext-sse/dist/sse.js"></script>
      <main id="log" hx-ext="sse" sse-connect="${url}/sse?as=data" sse-swap="message" hx-swap="beforeend"></main>`,
    data: p,
  },
  '@hotwired/turbo sse': {
    page: ({ url }) => `<script type="module" src="/@hotwired/turbo/dist/turbo.es2017-esm.js"></script>
      <turbo-stream-source src="${url}/sse?as=data"></turbo-stream-source><main id="log"></main>`,
    data: text => `<turbo-stream action="append" target="log"><template>${p(text)}</template></turbo-stream>`,
  },
  // What npm has is older than the names that Datastar has now, datastar-patch-elements, mode and elements.
  '@starfederation/datastar': {
    page: ({ behind }) => `<script type="module" src="/@starfederation/datastar/dist/datastar.js"></script>
      <main id="log" data-on-load="@get('${behind}/sse?as=data', {openWhenHidden: true, retryMaxCount: 1000})"></main>`,
    type: 'datastar-merge-fragments',
    data: text => `selector #log\nmergeMode append\n${prefixed('fragments ', p(text))}`,
  },
}

describe('in the page', { ...together, skip: missing('/usr/bin/chromium') }, () => {
  let browser
  before(async () => browser = await browse('chromium'))
  after(() => browser?.close())

  for (const name in swappers) test(name, limit, async t => {
    const between = await way(t), { page, data, type = 'message' } = swappers[name]
    const shown = await client(t, browser, page(between))
    await survives(between, shown.seen, text => publish(between.room, data(text), 'type=' + type))
    assert.deepEqual(await shown.wrong(), [])
  })
})
