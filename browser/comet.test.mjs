// comet.js without a browser. Everything around it is faked in this process: a relay, a network that refuses, stalls and
// breaks, tabs with locks and channels, and the clock. Run it with `npm test`.

import assert from 'node:assert/strict'
import { setMaxListeners } from 'node:events'
import { readFileSync } from 'node:fs'
import { afterEach, beforeEach, mock, test } from 'node:test'
import { gzipSync } from 'node:zlib'
import { Comet, CometError, backoff, lines, techniques } from '../static/comet.js'

setMaxListeners(0) // many requests share one signal
const text = new TextEncoder()
const nextTurn = fn => setImmediate(fn)
const aborted = () => new DOMException('aborted', 'AbortError')
const random = n => Math.floor(Math.random() * n)
const roomsOf = path => /\/rooms\/([^/]+)/.exec(path)[1].split(',')
const upTo = (n, from = 1) => Array.from({ length: n - from + 1 }, (_, i) => from + i)

// The relay: one log with one order.

class Relay {
  head = 1000
  floor = 0
  log = []
  keys = new Map
  subscribers = new Set
  batch = 100
  beat = 15
  users = { ada: 'online' }

  newest(room) { return this.log.findLast(e => e.room === room)?.id ?? 0 }

  publish(data, { room = 'lobby', type = 'message', key } = {}) {
    if (key && this.keys.has(key)) return this.keys.get(key)
    this.log.push({ id: ++this.head, room, type, data })
    if (key) this.keys.set(key, this.head)
    for (const wake of [...this.subscribers]) wake()
    return this.head
  }

  reader(url) {
    const { searchParams: query, pathname } = new URL(url)
    const rooms = roomsOf(pathname)
    const mine = this.log.filter(e => rooms.includes(e.room))
    const last = +query.get('last')
    const gap = (id, reason) => [{ type: 'gap', room: rooms[0], id, data: { reason } }]
    const begin = query.has('after') ? +query.get('after') : last && mine.length ? mine.at(-Math.min(last, mine.length)).id - 1 : this.head
    let gaps = begin > this.head ? gap(1000, 'future') : begin < this.floor ? gap(this.floor, 'history') : []
    let after = gaps[0]?.id ?? begin
    return {
      begin,
      next: () => {
        const due = this.log.filter(e => rooms.includes(e.room) && e.id > after)
        const events = due.slice(0, this.batch)
        after = due.length > events.length ? events.at(-1).id : this.head
        const all = [...gaps, ...events]
        gaps = []
        return { cursor: after, events: all }
      },
    }
  }

  /** Streams events to write. Returns a function that ends it. */
  subscribe(url, write) {
    const reader = this.reader(url)
    write({ type: 'hello', id: reader.begin, time: 0, data: { rooms: [], beat: this.beat, instance: 'test' } })
    const wake = () => { for (let due; (due = reader.next().events).length;) due.forEach(write) }
    this.subscribers.add(wake)
    wake()
    return () => this.subscribers.delete(wake)
  }
}

// The network. `open` are the connections: { via, cut(), emit(event), silent, … }.

class Net {
  down = false
  blocked = new Set // techniques that are refused
  stalled = new Set // techniques whose answers a proxy holds back
  open = new Set
  requests = [] // such as 'GET ws ?after=…'
  sockets = 0 // WebSockets and EventSources that are not closed
  postAnswers = [] // to the next POSTs: { status, error, headers }, or 'lose': the event is published, but the answer is lost

  state(via) { return this.down || this.blocked.has(via) ? 'refused' : this.stalled.has(via) ? 'stalled' : 'ok' }
  cut() { for (const c of [...this.open]) c.cut() }
  get only() { assert.equal(this.open.size, 1); return [...this.open][0] }
  count(kind) { return this.requests.filter(a => a.startsWith(kind)).length }
}

let relay, net, locks, channels, beacons, beaconClients, stored, tabs

const clientOf = url => /[?&]client=([^&]+)/.exec(url)[1]
const kindOf = url => /\/rooms\/[^/]+\/?(.*)/.exec(new URL(url).pathname)[1]

class FakeWebSocket {
  constructor(url) {
    assert.match(url, /^ws:/)
    net.requests.push('GET ws ' + new URL(url).search)
    net.sockets++
    const c = this.c = { via: 'ws', frames: [], cut: () => this.end(), emit: e => c.silent || this.over || this.onmessage({ data: JSON.stringify(e) }) }
    nextTurn(() => {
      if (this.over) return
      if (net.state('ws') === 'refused') return this.end()
      if (net.state('ws') === 'stalled') return
      net.open.add(c)
      c.leave = relay.subscribe(url, c.emit)
    })
  }
  send(frame) {
    const { c } = this
    c.frames.push(frame)
    if (c.ignoresFrames || this.over) return
    const { type, room, key, data, if: since } = JSON.parse(frame)
    if (type === 'presence') return
    const stale = since !== undefined && since !== relay.newest('lobby') && !relay.keys.has(key)
    const reply = stale ? { type: 'error', key, id: relay.newest('lobby'), data: 'there is a newer message' } : c.refuses ? { type: 'error', key, data: 'no' } : { type: 'ack', key, id: relay.publish(data, { type, room, key }) }
    nextTurn(() => c.dropsReplies || c.emit(reply))
  }
  end() {
    if (this.over) return
    this.close()
    this.onclose({ code: 1006, reason: '' })
  }
  close() {
    if (!this.over) net.sockets--
    this.over = true
    net.open.delete(this.c)
    this.c.leave?.()
  }
}

class FakeEventSource extends EventTarget {
  constructor(url) {
    super()
    net.requests.push('GET sse ' + new URL(url).search)
    net.sockets++
    const tell = (type, data) => this.dispatchEvent(Object.assign(new Event(type), { data }))
    const c = this.c = { via: 'sse', cut: () => { this.close(); this.onerror() }, emit: e => c.silent || this.over || tell('message', JSON.stringify(e)) }
    nextTurn(() => {
      if (this.over) return
      if (net.state('sse') === 'refused') return c.cut()
      if (net.state('sse') === 'stalled') return
      net.open.add(c)
      c.leave = relay.subscribe(url, c.emit)
      tell('beat', '{"type":"beat"}')
    })
  }
  close() {
    if (!this.over) net.sockets--
    this.over = true
    net.open.delete(this.c)
    this.c.leave?.()
  }
}

const jsonResponse = (body, status = 200, headers = {}) => new Response(JSON.stringify(body), { status, headers })

async function fakeFetch(url, { method = 'GET', body, signal } = {}) {
  const kind = kindOf(url), { searchParams: query, pathname, search } = new URL(url)
  net.requests.push(`${method} ${kind} ${search}`)
  const gone = new Promise((_, fail) => signal?.addEventListener('abort', () => fail(aborted())))
  gone.catch(() => { })
  await Promise.race([new Promise(nextTurn), gone])
  const state = net.state(method === 'GET' ? kind : 'post')
  if (state === 'refused') throw new TypeError('fetch failed')
  if (state === 'stalled') await gone
  if (kind === 'presence') return jsonResponse({ room: 'lobby', count: Object.keys(relay.users).length, users: relay.users })
  if (method === 'POST') {
    const next = net.postAnswers.shift(), rooms = roomsOf(pathname)
    if (rooms[1]) return jsonResponse({ error: 'this reads several rooms; name the one that is meant' }, 400)
    if (next?.status) return jsonResponse({ error: next.error }, next.status, next.headers)
    const since = query.get('if'), newest = relay.newest(rooms[0])
    if (since !== null && +since !== newest && !relay.keys.has(query.get('key'))) return jsonResponse({ error: 'there is a newer message', id: newest }, 412)
    const id = relay.publish(JSON.parse(body), { room: rooms[0], type: query.get('type') ?? undefined, key: query.get('key') })
    if (next === 'lose') throw new TypeError('connection reset')
    return jsonResponse({ id }, 201)
  }
  if (net.refusal) return jsonResponse({ error: net.refusal.error }, net.refusal.status, net.refusal.headers)
  if (kind === 'poll') return jsonResponse(relay.reader(url).next())
  return kind === 'longpoll' ? jsonResponse(await longPollResponse(url, gone)) : new Response(streamResponse(url, kind, gone))
}

async function longPollResponse(url, gone) {
  const reader = relay.reader(url), wait = new URL(url).searchParams.get('wait') * 1e3
  let got = reader.next()
  if (got.events.length || !wait) return got
  const c = { via: 'longpoll' }
  let wake
  net.open.add(c)
  try {
    await new Promise((done, fail) => {
      const timer = setTimeout(done, wait)
      wake = () => { clearTimeout(timer); done() }
      c.cut = () => fail(new TypeError('connection reset'))
      relay.subscribers.add(wake)
      gone.catch(fail)
    })
    return reader.next()
  } finally {
    net.open.delete(c)
    relay.subscribers.delete(wake)
  }
}

/** A stream or multipart response, in pieces of random size. */
function streamResponse(url, kind, gone) {
  const part = kind === 'multipart' ? '\r\n--cut\r\nContent-Type: application/json\r\n\r\n' : '\n'
  return new ReadableStream({
    start(feed) {
      const write = line => {
        const bytes = text.encode(line)
        for (let from = 0, to; from < bytes.length; from = to) feed.enqueue(bytes.subarray(from, to = from + 1 + random(9)))
      }
      const c = { via: kind, emit: e => c.silent || write(JSON.stringify(e) + part), cut: () => end(() => feed.error(new TypeError('connection reset'))) }
      const end = how => { if (net.open.delete(c)) { leave(); how() } }
      net.open.add(c)
      if (kind === 'multipart') write(part.slice(2))
      const leave = relay.subscribe(url, c.emit)
      gone.catch(() => end(() => feed.error(aborted())))
    },
  })
}

// Tabs. grant() checks that a lock has never more than one holder.

class FakeLocks {
  held = new Map
  waiting = []

  request(name, options, callback = options) {
    const { steal, ifAvailable, signal } = options
    return new Promise((resolve, reject) => {
      const request = { name, callback, resolve, reject }
      if (steal) {
        this.held.get(name)?.reject(new DOMException('stolen', 'AbortError'))
        this.held.delete(name)
      }
      if (steal || ifAvailable && !this.held.has(name)) return this.grant(request)
      if (ifAvailable) return nextTurn(() => resolve(callback(null)))
      this.waiting.push(request)
      signal?.addEventListener('abort', () => {
        const at = this.waiting.indexOf(request)
        if (at >= 0) this.waiting.splice(at, 1)
        reject(aborted())
      })
      nextTurn(() => this.next(name))
    })
  }
  next(name) {
    const at = this.waiting.findIndex(request => request.name === name)
    if (at >= 0 && !this.held.has(name)) this.grant(...this.waiting.splice(at, 1))
  }
  grant(request) {
    assert(!this.held.has(request.name))
    this.held.set(request.name, request)
    nextTurn(async () => {
      request.resolve(await request.callback({ name: request.name }))
      if (this.held.get(request.name) !== request) return
      this.held.delete(request.name)
      nextTurn(() => this.next(request.name))
    })
  }
}

class FakeChannel {
  constructor(name) {
    this.name = name
    channels.add(this)
  }
  postMessage(data) {
    assert(!this.closed, 'a message on a closed channel')
    if (this.frozen) return
    for (const c of channels) {
      if (c === this || c.name !== this.name) continue
      const copy = structuredClone(data)
      nextTurn(() => c.closed || c.frozen || c.onmessage({ data: copy }))
    }
  }
  close() {
    this.closed = true
    channels.delete(this)
  }
}

const saved = {}

beforeEach(() => {
  mock.timers.enable({ apis: ['setTimeout', 'Date'], now: 1_795_351_418_000 })
  mock.method(AbortSignal, 'timeout', ms => {
    const abort = new AbortController()
    setTimeout(() => abort.abort(), ms)
    return abort.signal
  })
  relay = new Relay
  net = new Net
  locks = new FakeLocks
  channels = new Set
  beacons = []
  beaconClients = []
  stored = new Map
  tabs = []
  for (const [name, value] of Object.entries({
    WebSocket: FakeWebSocket, EventSource: FakeEventSource, fetch: fakeFetch, BroadcastChannel: FakeChannel,
    location: { href: 'http://relay.test/chat', origin: 'http://relay.test' }, document: { hidden: false },
    navigator: { onLine: true, locks, sendBeacon: (url, body) => beacons.push(`${new URL(url).pathname} ${body}`) && beaconClients.push(clientOf(url)) },
    localStorage: { getItem: k => stored.get(k) ?? null, setItem: (k, v) => stored.set(k, v) },
  })) {
    if (!(name in saved)) saved[name] = Object.getOwnPropertyDescriptor(globalThis, name)
    Object.defineProperty(globalThis, name, { value, configurable: true, writable: true })
  }
})

afterEach(async () => {
  for (const tab of tabs) tab.comet.close()
  await settle()
  assert.equal(net.open.size + net.sockets, 0, 'a closed Comet leaves a connection')
  assert.equal(channels.size, 0, 'a closed Comet leaves a channel')
  assert.equal(locks.held.size + locks.waiting.length, 0, 'a closed Comet leaves a lock')
  mock.timers.reset()
  mock.restoreAll()
  for (const name in saved) {
    if (saved[name]) Object.defineProperty(globalThis, name, saved[name])
    else delete globalThis[name]
  }
})

/** Runs everything that is due now. */
async function settle(turns = 40) {
  while (turns--) await new Promise(done => setImmediate(done))
}

/** Advances the clock. */
async function advance(ms, step = 250) {
  await settle()
  for (; ms > 0; ms -= step) {
    mock.timers.tick(Math.min(step, ms))
    await settle(15)
  }
}

/** A tab with a Comet, which records its events. */
function open(options, url = '/rooms/lobby') {
  const page = new EventTarget
  globalThis.addEventListener = page.addEventListener.bind(page)
  globalThis.removeEventListener = page.removeEventListener.bind(page)
  const before = new Set(channels)
  const comet = new Comet(url, options)
  const tab = {
    comet, got: [], events: [], statuses: [], undelivered: [],
    fire: (type, more) => page.dispatchEvent(Object.assign(new Event(type), more)),
    get channel() { return [...channels].find(c => !before.has(c)) },
  }
  comet.addEventListener('message', e => tab.got.push(e.detail.data))
  comet.addEventListener('event', e => tab.events.push(e.detail))
  comet.addEventListener('status', e => tab.statuses.push(e.detail))
  comet.addEventListener('undelivered', e => tab.undelivered.push(e.detail))
  tabs.push(tab)
  return tab
}

const openUnshared = (options, url) => open({ shared: false, ...options }, url)

async function openSettled(options, url) {
  const tab = open(options, url)
  await settle()
  return tab
}

// Small parts.

test('comet.js is less than 8 KB, gzipped', () => {
  const size = gzipSync(readFileSync(new URL('../static/comet.js', import.meta.url)), { level: 9 }).length
  console.log(`comet.js: ${size} bytes gzipped`)
  assert(size < 8192, `${size} bytes`)
})

test('lines() gives the same lines wherever the network cuts them', () => {
  const sent = ['{"data":"naïve ☄ 彗星 👩‍🚀"}', '', '{"data":"\\n"}', '--cut\r', '{"last":1}']
  const bytes = text.encode(sent.join('\n') + '\n{"unfinished":')
  for (let i = 0; i <= bytes.length; i++) {
    for (let j = i; j <= bytes.length; j++) {
      const got = [], cut = lines(line => got.push(line))
      for (const piece of [bytes.subarray(0, i), bytes.subarray(i, j), bytes.subarray(j)]) cut(piece)
      assert.deepEqual(got, sent)
    }
  }
  const got = [], cut = lines(line => got.push(line))
  for (const byte of bytes) cut(Uint8Array.of(byte))
  assert.deepEqual(got, sent)
})

test('backoff doubles, is capped, and is random between 0 and its limit', () => {
  for (const [r, tries, ms] of [[1, 0, 1e3], [1, 1, 2e3], [1, 4, 16e3], [1, 5, 30e3], [1, 5000, 30e3], [0.5, 2, 2e3], [0, 9, 0]]) {
    mock.method(Math, 'random', () => r)
    assert.equal(backoff(tries), ms)
    Math.random.mock.restore()
  }
})

test('the URL contains all options, and no URL is requested twice', async () => {
  openUnshared({ via: ['poll'], user: 'ada & co', token: 't', presence: false, last: 5, every: 1 }, 'http://other.test/base/rooms/a,b/?x=1#hash')
  await advance(3e3)
  const urls = net.requests.filter(a => a.startsWith('GET poll'))
  const query = new URLSearchParams(urls[0].split(' ')[2])
  query.delete('_')
  assert.match(query.get('client'), /^[A-Za-z0-9_.:-]{1,64}$/)
  query.delete('client')
  assert.deepEqual(Object.fromEntries(query), { x: '1', user: 'ada & co', token: 't', presence: '0', last: '5' })
  assert(urls.length >= 3)
  assert.equal(new Set(urls).size, urls.length)
})

test('every request of a Comet names its client: streams, presence and the beacon', async () => {
  const { comet, fire } = openUnshared({ via: ['ws', 'sse', 'poll'], user: 'ada' })
  const { comet: other } = openUnshared({ via: ['stream'], user: 'ada' })
  await settle()
  comet.use('sse')
  await settle()
  comet.presence('away')
  comet.use('poll')
  await settle()
  comet.close()
  await settle()
  const [mine, theirs] = ['sse', 'stream'].map(via => clientOf(net.requests.find(a => a.startsWith('GET ' + via))))
  assert.notEqual(mine, theirs)
  assert.deepEqual(['GET ws', 'POST presence', 'GET poll'].map(kind => clientOf(net.requests.find(a => a.startsWith(kind)))), [mine, mine, mine])
  assert.deepEqual(beaconClients, [mine])
  other.close()
  assert.deepEqual(beaconClients, [mine, theirs])
})

test('without an answer, a page of another origin gets an error about -origins; a page of the same origin or one that was connected does not', async () => {
  net.down = true
  for (const via of [['ws'], ['stream'], ['ws', 'sse', 'poll']]) {
    const { statuses } = openUnshared({ via }, 'http://other.test/rooms/lobby')
    await settle()
    assert.match(statuses.at(-1).error.message, /likely its -origins does not list http:\/\/relay\.test$/, via.join())
  }
  const { statuses } = openUnshared({ via: ['stream'] })
  await settle()
  assert.match(statuses.at(-1).error.message, /^the relay could not be reached: fetch failed$/)
  net.down = false
  const foreign = openUnshared({ via: ['stream'] }, 'http://other.test/rooms/lobby')
  await settle()
  net.down = true
  net.cut()
  await advance(5e3)
  assert.equal(foreign.comet.status, 'reconnecting')
  assert.doesNotMatch(foreign.statuses.at(-1).error.message, /origins/)
})

test('invalid arguments throw', () => {
  assert.throws(() => new Comet('/rooms/lobby', { via: ['carrier pigeon'] }), /carrier pigeon is none of ws,sse/)
  assert.throws(() => new Comet('http://'), TypeError)
  const { comet } = openUnshared()
  assert.throws(() => comet.use('toString'), CometError)
})

// Techniques.

for (const name of ['ws', 'sse', 'stream', 'multipart', 'longpoll', 'poll']) {
  test(`${name} delivers the requested history, then new events`, async () => {
    for (const i of upTo(10)) relay.publish(i)
    const { comet, got } = openUnshared({ via: [name], last: 3 })
    await settle()
    assert.deepEqual(got, [8, 9, 10])
    assert.equal(comet.status, 'open')
    assert.equal(comet.via, name)
    relay.publish('naïve ☄')
    await advance(6e3)
    assert.deepEqual(got, [8, 9, 10, 'naïve ☄'])
    assert.equal(comet.cursor, relay.head)
  })

  test(`${name} continues from the cursor after cuts, and after the relay was down`, async () => {
    const { comet, got } = openUnshared({ via: [name], after: relay.head })
    for (const i of upTo(60)) {
      relay.publish(i)
      if (i % 5 === 0) net.cut()
      if (i === 30) {
        net.down = true
        net.cut()
        await advance(5e3)
        net.down = false
      }
      await advance(random(7) * 100, 100)
    }
    for (const _ of upTo(6)) {
      await advance(10e3, 1e3)
      for (const c of net.open) c.emit?.({ type: 'beat' }) // without it the connection is dead after 35 s
    }
    assert.deepEqual(got, upTo(60))
    assert.equal(comet.status, 'open')
  })
}

test('a long history is complete, in several answers', async () => {
  relay.batch = 7
  for (const i of upTo(50)) relay.publish(i)
  const { got } = openUnshared({ via: ['poll'], last: 50 })
  await settle(200)
  assert.deepEqual(got, upTo(50))
})

test('jsonp calls the page; a script that does not call, or does not load, is an error', async () => {
  const scripts = [], frames = []
  const page = { createElement: () => ({ remove() { this.gone = true } }), head: { append: s => scripts.push(s) } }
  globalThis.document = {
    createElement: () => ({ contentWindow: {}, contentDocument: page, remove() { this.gone = true } }),
    body: { append: f => frames.push(f) && nextTurn(() => f.onload()) },
  }
  const { comet, got, statuses } = openUnshared({ via: ['jsonp'], after: relay.head })
  await settle()
  const serve = script => {
    const url = new URL(script.src)
    assert.equal(kindOf(url), 'jsonp')
    frames.at(-1).contentWindow[url.searchParams.get('callback')](relay.reader(url).next())
    script.onload()
    return url
  }
  assert.equal(serve(scripts[0]).searchParams.get('wait'), '0')
  await settle()
  assert.equal(comet.status, 'open')
  relay.publish('hi')
  const url = serve(scripts[1])
  assert.equal(url.searchParams.get('wait'), '25')
  await settle()
  assert.deepEqual(got, ['hi'])
  assert(scripts[0].gone && scripts[1].gone)
  assert(!(url.searchParams.get('callback') in globalThis))
  assert(!frames[0].gone, 'one frame for all requests')
  scripts[2].onload()
  await settle()
  assert.match(statuses.at(-1).error.message, /did not call/)
  assert(frames[0].gone, 'and its requests with it')
  await advance(2e3)
  scripts[3].onerror()
  await settle()
  assert.equal(statuses.at(-1).status, 'reconnecting')
})

test('iframe accepts messages from its own frame only', async () => {
  const frames = []
  globalThis.document = {
    createElement: () => ({ contentWindow: {}, remove() { this.gone = true } }),
    body: { append: f => frames.push(f) },
  }
  const { comet, got, fire } = openUnshared({ via: ['iframe'] })
  await settle()
  const post = (data, source = frames.at(-1).contentWindow) => fire('message', { data, source })
  post({ type: 'hello', id: 5, data: { beat: 15 } }, {})
  assert.equal(comet.status, 'connecting')
  post({ type: 'hello', id: 5, data: { beat: 15 } })
  assert.equal(comet.status, 'open')
  post({ type: 'beat' })
  post({ type: 'message', id: 6, data: 'hi' })
  post({ type: 'message', id: 7, data: 'forged' }, {})
  post(null)
  post('text')
  assert.deepEqual(got, ['hi'])
  frames[0].onload()
  assert.equal(comet.status, 'reconnecting')
  assert(frames[0].gone)
  post({ type: 'message', id: 8, data: 'late' }, frames[0].contentWindow)
  assert.deepEqual(got, ['hi'])
})

test('an HTML page instead of a stream, such as a login page of a Wi-Fi network, does not count as a stream', async () => {
  const real = globalThis.fetch
  globalThis.fetch = async (url, options) => kindOf(url) === 'stream' ? new Response('<html>\nPlease pay\n'.repeat(5)) : real(url, options)
  const { comet } = openUnshared({ via: ['stream', 'poll'] })
  await settle()
  assert.equal(comet.via, 'poll')
})

test('a technique can be added; after closing, its events are ignored', async () => {
  let link
  techniques.own = l => { link = l; return () => { link.closed = true } }
  const { comet, got, statuses } = openUnshared({ via: ['own'] })
  await settle()
  link.on({ type: 'hello', id: 1, data: { beat: 15 } })
  link.on({ type: 'message', id: 2, data: 'a' })
  link.at(7)
  assert.equal(comet.cursor, 7)
  comet.close()
  assert(link.closed)
  link.on({ type: 'message', id: 8, data: 'b' })
  link.line('{"type":"message","id":9,"data":"c"}')
  link.at(10)
  link.done(new Error('late'))
  assert.deepEqual(got, ['a'])
  assert.equal(comet.cursor, 7)
  assert.equal(statuses.at(-1).status, 'closed')
  assert.equal(statuses.length, 3)
  delete techniques.own
})

// Falling back, and upgrading.

test('the next technique is tried when one is refused, and when one stalls', async () => {
  net.blocked.add('ws')
  net.stalled.add('sse')
  const { comet, statuses } = openUnshared()
  await advance(2900, 100)
  assert.equal(comet.status, 'connecting')
  await advance(200, 100)
  assert.equal(comet.via, 'stream')
  assert.deepEqual(statuses.map(s => [s.status, s.via]), [['connecting', 'ws'], ['connecting', 'sse'], ['connecting', 'stream'], ['open', 'stream']])
  assert.match(statuses[1].error.message, /WebSocket closed \(1006\)/)
  assert.match(statuses[2].error.message, /no hello by sse/)
  assert(statuses[2].error instanceof CometError)
})

test('a technique that the browser does not support fails', async () => {
  delete globalThis.WebSocket
  globalThis.EventSource = undefined
  const { comet, statuses } = openUnshared()
  await settle()
  assert.equal(comet.via, 'stream')
  assert.equal(statuses.at(-1).status, 'open')
})

test('the technique that worked is tried first the next time, and a better one later, with nothing lost', async () => {
  net.blocked.add('ws').add('sse')
  const first = openUnshared()
  await settle()
  assert.equal(first.comet.via, 'stream')
  first.comet.close()
  net.requests = []
  const second = openUnshared()
  await settle()
  assert.equal(net.requests.length, 1)
  assert.match(net.requests[0], /GET stream/)
  await advance(4500)
  assert.equal(net.requests.length, 1)
  net.blocked.clear()
  relay.publish('before')
  await advance(1e3)
  relay.publish('after')
  await settle()
  assert.equal(second.comet.via, 'ws')
  assert.deepEqual(second.got, ['before', 'after'])
  assert.deepEqual(second.statuses.map(s => s.status), ['connecting', 'open', 'open'])
  assert.equal(net.only.via, 'ws')
})

test('better techniques are tried at growing intervals, and not while the page is hidden', async () => {
  net.blocked.add('ws')
  const { fire } = openUnshared()
  await settle()
  const looks = async ms => {
    net.requests = []
    for (; ms > 0; ms -= 10e3) {
      net.only.emit({ type: 'beat' })
      await advance(Math.min(ms, 10e3), 1e3)
    }
    return net.count('GET ws')
  }
  assert.equal(await looks(4e3), 0)
  assert.equal(await looks(2e3), 1)
  assert.equal(await looks(8e3), 0)
  assert.equal(await looks(2e3), 1)
  assert.equal(await looks(3600e3), 4 + 11)
  document.hidden = true
  assert.equal(await looks(3600e3), 0)
  document.hidden = false
  fire('visibilitychange')
  await settle()
  assert.equal(net.count('GET ws'), 1)
})

test('a refusal with every technique is final and has the reason; use() tries again', async () => {
  net.blocked.add('ws').add('sse')
  net.refusal = { status: 401, error: 'this room needs a token' }
  const { comet, statuses, fire } = openUnshared()
  await settle()
  assert.equal(comet.status, 'closed')
  const { error } = statuses.at(-1)
  assert.equal(error.message, 'this room needs a token')
  assert.equal(error.status, 401)
  net.requests = []
  await advance(120e3, 5e3)
  fire('visibilitychange')
  await settle()
  assert.equal(net.requests.length, 0)
  net.refusal = undefined
  comet.token = 'secret'
  comet.use()
  await settle()
  assert.equal(comet.status, 'open')
  assert.match(net.requests.at(-1), /token=secret/)
})

test('Retry-After ends the round, and is respected', async () => {
  net.blocked.add('ws').add('sse')
  net.refusal = { status: 503, error: 'full', headers: { 'Retry-After': '20' } }
  const { comet, statuses } = openUnshared()
  await settle()
  assert.deepEqual(net.requests.map(a => a.split(' ')[1]), ['ws', 'sse', 'stream'])
  assert.equal(statuses.at(-1).retryIn, 20_000)
  net.refusal = undefined
  net.blocked.clear()
  await advance(19e3, 1e3)
  assert.notEqual(comet.status, 'open')
  await advance(2e3)
  assert.equal(comet.status, 'open')
})

test('while the relay is down the intervals grow; when it is back the best technique is used', async () => {
  const { comet, statuses } = openUnshared()
  await settle()
  net.down = true
  net.cut()
  await advance(300e3, 500)
  const waits = statuses.filter(s => s.retryIn !== undefined).map(s => s.retryIn)
  assert(waits.length > 8 && waits.length < 60, `${waits.length} rounds`)
  assert(Math.max(...waits) > 5e3 && Math.max(...waits) <= 30e3, String(waits))
  assert.equal(comet.status, 'reconnecting')
  net.down = false
  await advance(31e3, 500)
  assert.equal(comet.via, 'ws')
})

test('a relay that disconnects after each hello is not flooded', async () => {
  const { comet } = openUnshared({ via: ['ws'] })
  comet.addEventListener('status', e => e.detail.status === 'open' && nextTurn(() => net.cut()))
  await advance(120e3, 500)
  assert(net.requests.length < 40, `${net.requests.length} connections in two minutes`)
})

test('on a slow network the timeout for hello grows', async () => {
  net.stalled.add('ws').add('poll')
  mock.method(Math, 'random', () => 0)
  openUnshared({ via: ['ws', 'poll'] })
  await advance(120e3, 500)
  assert(net.requests.length > 6 && net.requests.length < 12, `${net.requests.length} attempts`)
})

test('after bye it reconnects when bye says, with the same technique', async () => {
  stored.set('comet http://relay.test', 'sse')
  const { comet, statuses } = openUnshared({ via: ['stream', 'sse', 'poll'] })
  await settle()
  assert.equal(comet.via, 'sse')
  net.requests = []
  net.only.emit({ type: 'bye', data: { retry: 7000 } })
  assert.equal(statuses.at(-1).retryIn, 7000)
  assert.equal(net.open.size, 0)
  await advance(6900, 100)
  assert.equal(net.requests.length, 0)
  await advance(200, 100)
  assert.equal(comet.via, 'sse')
  assert.equal(net.requests.length, 1)
})

// Changing the technique.

test('use() changes the technique, and nothing is lost or delivered twice', async () => {
  const { comet, got, statuses } = openUnshared()
  await settle()
  let n = 0
  for (const name of ['sse', 'stream', 'poll', 'multipart', 'longpoll', 'ws', 'auto', 'poll', null]) {
    relay.publish(++n)
    comet.use(name)
    relay.publish(++n)
    await settle()
    relay.publish(++n)
    await advance(6e3)
    assert.equal(comet.via, !name || name === 'auto' ? 'ws' : name)
    assert(net.open.size <= 1)
  }
  assert.deepEqual(got, upTo(n))
  assert(statuses.slice(1).every(s => s.status === 'open'), 'it was never without a connection')
})

test('use() of a technique that fails keeps the connection, reports the error, and keeps trying', async () => {
  net.blocked.add('sse')
  const { comet, statuses } = openUnshared()
  await settle()
  comet.use('sse')
  await settle()
  assert.equal(comet.via, 'ws')
  assert.equal(statuses.at(-1).status, 'open')
  assert.match(statuses.at(-1).error.message, /EventSource/)
  net.blocked.clear()
  await advance(6e3, 500)
  assert.equal(comet.via, 'sse')
  assert.equal(stored.get('comet http://relay.test'), 'ws', 'use() does not change what is remembered')
})

test('use() during backoff, during a trial, and twice at once', async () => {
  const { comet, got } = openUnshared()
  await settle()
  net.down = true
  net.cut()
  await advance(20e3, 500)
  net.down = false
  relay.publish(1)
  comet.use('sse')
  comet.use('stream')
  await settle()
  assert.equal(net.only.via, 'stream')
  net.stalled.add('ws')
  comet.use('ws')
  await advance(1e3)
  comet.use('poll')
  relay.publish(2)
  await settle()
  assert.equal(comet.via, 'poll')
  assert.equal(net.open.size, 0)
  assert.deepEqual(got, [1, 2])
})

test('close() while connecting, while reconnecting and in a listener leaves nothing behind', async () => {
  for (const when of ['at once', 'connecting', 'listener', 'message', 'backoff']) {
    const { comet, statuses, got } = openUnshared({ via: ['stream', 'poll'] })
    if (when === 'at once') comet.close()
    if (when === 'listener') comet.addEventListener('status', () => comet.close())
    if (when === 'connecting') nextTurn(() => comet.close())
    await settle()
    if (when === 'message') {
      comet.addEventListener('message', () => comet.close())
      relay.publish(1)
      relay.publish(2)
      await settle()
      assert.deepEqual(got, [1])
    }
    if (when === 'backoff') {
      net.down = true
      net.cut()
      await settle()
      comet.close()
      net.down = false
    }
    await settle()
    assert.equal(comet.status, 'closed', when)
    assert.equal(statuses.at(-1).status, 'closed')
    assert.equal(statuses.filter(s => s.status === 'closed').length, 1)
    assert.equal(net.open.size, 0, when)
    net.requests = []
    await advance(10e3)
    const timers = mock.method(globalThis, 'setTimeout')
    await advance(60e3, 5e3)
    assert.equal(timers.mock.callCount(), 0, when)
    assert.equal(net.requests.length, 0, when)
    timers.mock.restore()
    comet.close()
    comet.use('poll')
    await assert.rejects(comet.send('x'), /closed/)
  }
})

test('use() works in a listener for status', async () => {
  const { comet } = openUnshared({ via: ['ws', 'sse'] })
  comet.addEventListener('status', () => comet.use('stream'), { once: true })
  await settle()
  assert.equal(comet.via, 'stream')
  assert.equal(net.only.via, 'stream')
})

// Receiving.

test('an event is not delivered twice', async () => {
  const { comet, got } = openUnshared()
  await settle()
  relay.publish(1)
  net.only.emit({ ...relay.log[0] })
  net.only.emit({ type: 'message', id: 3, data: 'old' })
  assert.deepEqual(got, [1])
  assert.equal(comet.cursor, relay.head)
})

test('hello sets the cursor if there is none, and does not change one', async () => {
  const { comet } = openUnshared()
  await settle()
  assert.equal(comet.cursor, 1000)
  net.only.emit({ type: 'hello', id: 5000, data: { beat: 15 } })
  assert.equal(comet.cursor, 1000)
  net.cut()
  await advance(2e3)
  assert.match(net.requests.at(-1), /after=1000/)
})

test("a gap is delivered and sets the cursor, also when the relay's ids went back", async () => {
  const { comet, got, events } = openUnshared({ after: 500 })
  relay.floor = 900
  await settle()
  assert.deepEqual(events, [{ type: 'gap', room: 'lobby', id: 900, data: { reason: 'history' } }])
  assert.equal(comet.cursor, 900)
  net.only.emit({ type: 'gap', room: 'other', id: 900, data: { reason: 'restart' } })
  assert.equal(events.length, 2, 'a gap of another room with the same id')
  relay.head = 8000
  relay.publish('before')
  assert.equal(comet.cursor, 8001)
  relay = new Relay
  relay.publish('after')
  net.cut()
  await advance(2e3)
  assert.equal(events.at(-2).data.reason, 'future')
  assert.deepEqual(got, ['before', 'after'])
  assert.equal(comet.cursor, 1001)
})

test('a gap before the cursor is ignored', async () => {
  const { comet, events } = openUnshared({ after: 900 })
  relay.publish(1)
  await settle()
  net.only.emit({ type: 'gap', room: 'lobby', id: 950, data: { reason: 'history' } })
  assert.equal(comet.cursor, 1001)
  assert.equal(events.length, 1)
})

test('published events cannot imitate comet.js: types status, undelivered and event are dispatched as event only', async () => {
  const { events, statuses, undelivered } = openUnshared()
  await settle()
  const before = statuses.length
  for (const type of ['status', 'undelivered', 'event', 'vote']) relay.publish('forged', { type })
  await settle()
  assert.deepEqual(events.map(e => e.type), ['status', 'undelivered', 'event', 'vote'])
  assert.equal(statuses.length, before)
  assert.equal(undelivered.length, 0)
})

test('every event is dispatched under its type, and as event; hello, beat, ack and bye are not', async () => {
  const { comet, events } = openUnshared({ user: 'ada' })
  const types = []
  for (const type of ['vote', 'presence', 'hello', 'beat', 'ack']) comet.addEventListener(type, e => types.push(e.type))
  await settle()
  relay.publish('yes', { type: 'vote' })
  net.only.emit({ type: 'presence', room: 'lobby', data: { count: 0, users: {} } })
  net.only.emit({ type: 'beat' })
  await comet.send('x')
  assert.deepEqual(types, ['vote', 'presence'])
  assert.deepEqual(events.map(e => e.type), ['vote', 'presence', 'message'])
})

test('a technique that polls fetches rosters; one that streams does not', async () => {
  const polls = openUnshared({ via: ['poll'], user: 'bob' })
  await settle()
  assert.deepEqual(polls.events, [{ type: 'presence', room: 'lobby', data: { count: 1, users: { ada: 'online' } } }])
  openUnshared({ via: ['poll'] })
  openUnshared({ via: ['ws'], user: 'bob' })
  await settle()
  assert.equal(net.count('GET presence'), 1)
})

// Sending.

test('send uses the WebSocket if it is open, and POST if not', async () => {
  const { comet, got } = openUnshared({ via: ['ws', 'sse'], after: relay.head })
  const early = comet.send('early')
  await settle()
  assert.equal(await early, relay.log[0].id)
  assert.equal(await comet.send({ a: [1] }, { type: 'vote', ttl: 5, key: 'k' }), relay.head)
  assert.deepEqual(JSON.parse(net.only.frames[0]), { type: 'vote', ttl: 5, key: 'k', data: { a: [1] } })
  assert.equal(net.count('POST'), 1)
  comet.use('sse')
  await settle()
  const sent = comet.send('c', { room: 'lobby' })
  await settle()
  assert.equal(await sent, relay.head)
  assert.equal(net.count('POST'), 2)
  assert.deepEqual(got, ['early', 'c'])
})

for (const by of ['ws', 'sse']) {
  test(`messages by ${by} arrive once and in order, whatever fails`, async () => {
    const { comet, got } = openUnshared({ via: [by], after: relay.head })
    await settle()
    const ids = []
    for (const i of upTo(80)) {
      comet.send(i).then(id => ids.push(id))
      const luck = random(8)
      if (luck === 0) net.cut()
      if (luck === 1) net.postAnswers.push('lose', { status: 503, error: 'busy' })
      if (luck === 2) for (const c of net.open) c.dropsReplies = true
      if (luck === 3) for (const c of net.open) c.ignoresFrames = true
      if (luck === 4) { net.down = true; net.cut() }
      if (luck === 5) for (const c of net.open) c.refuses = true
      if (luck > 5) net.down = false
      await advance(random(4) * 300, 300)
    }
    net.down = false
    await advance(400e3, 1e3)
    assert.deepEqual(relay.log.map(e => e.data), upTo(80))
    assert.deepEqual(got, upTo(80))
    assert.deepEqual(ids, relay.log.map(e => e.id))
  })
}

test('a lost answer does not duplicate the message', async () => {
  const { comet } = openUnshared({ via: ['sse'] })
  await settle()
  net.postAnswers.push('lose', 'lose', { status: 502 })
  const sent = comet.send('once')
  await advance(10e3)
  assert.equal(await sent, 1001)
  assert.equal(relay.log.length, 1)
  assert.equal(net.count('POST'), 4)
  assert.equal(new Set(net.requests.filter(a => a.startsWith('POST')).map(a => /key=([^&]+)/.exec(a)[1])).size, 1)
})

test('a message that the WebSocket refuses is posted, to get the reason', async () => {
  const { comet, undelivered } = openUnshared()
  await settle()
  net.only.refuses = true
  net.postAnswers.push({ status: 413, error: 'the body is too big; the limit is 65536 bytes' })
  const sent = comet.send('long', { key: 'k' })
  await settle()
  await assert.rejects(sent, { name: 'CometError', status: 413, message: /too big/ })
  assert.equal(undelivered.length, 1)
  assert.equal(undelivered[0].data, 'long')
  assert.equal(undelivered[0].key, 'k')
  assert.equal(undelivered[0].error.status, 413)
})

for (const status of [400, 401, 403, 404, 413, 415]) {
  test(`${status} is final, and the next message is sent`, async () => {
    const { comet, got, undelivered } = openUnshared({ via: ['sse'] })
    await settle()
    net.postAnswers.push({ status, error: 'no' })
    const sent = [comet.send('a'), comet.send('b')]
    await settle()
    await assert.rejects(sent[0], { status, final: true, message: 'no' })
    await sent[1]
    assert.deepEqual(got, ['b'])
    assert.equal(undelivered.length, 1)
  })
}

test('429 is retried when it says; the next message waits', async () => {
  const { comet, got } = openUnshared({ via: ['sse'] })
  await settle()
  net.postAnswers.push({ status: 429, error: 'slowly', headers: { 'Retry-After': '3' } })
  comet.send('a')
  comet.send('b')
  await advance(2900, 100)
  assert.deepEqual(got, [])
  await advance(200, 100)
  assert.deepEqual(got, ['a', 'b'])
})

test('offline, up to a hundred messages wait in order; signals expire', async () => {
  const { comet, got, undelivered } = openUnshared()
  await settle()
  net.down = true
  net.cut()
  const sent = upTo(100).map(i => comet.send(i, i === 50 ? { ttl: 5 } : {}))
  await assert.rejects(comet.send(101), /100 messages are waiting/)
  await advance(20e3, 500)
  net.down = false
  await advance(60e3, 1e3)
  await assert.rejects(sent[49], /its time was over/)
  assert.deepEqual(got, upTo(100).filter(i => i !== 50))
  assert.deepEqual(undelivered.map(u => u.data), [101, 50])
})

test('waiting messages are sent as soon as the network is back', async () => {
  const { comet, got, fire } = openUnshared()
  await settle()
  net.down = true
  net.cut()
  comet.send('hi')
  await advance(60e3, 1e3)
  net.down = false
  fire('online')
  await settle()
  assert.deepEqual(got, ['hi'])
})

test('send takes any JSON, as it is at the time of the call', async () => {
  const { comet, got } = openUnshared({ via: ['sse'] })
  await settle()
  for (const data of [undefined, () => 1]) await assert.rejects(comet.send(data), /JSON/)
  await assert.rejects(comet.send(1n), TypeError)
  const data = { text: 'before' }
  comet.send(data)
  data.text = 'after'
  for (const data of ['', 0, null, false]) comet.send(data)
  await settle()
  assert.deepEqual(got, [{ text: 'before' }, '', 0, null, false])
  const { comet: two } = openUnshared({ via: ['sse'] }, '/rooms/a,b')
  const which = two.send('x')
  await settle()
  await assert.rejects(which, /several rooms/)
  const sent = two.send('x', { room: 'b' })
  await settle()
  assert.equal(await sent, relay.head)
  assert.equal(relay.log.at(-1).room, 'b')
})

test('close() rejects what was not sent', async () => {
  const { comet, undelivered } = openUnshared()
  net.down = true
  const sent = [comet.send('a'), comet.send('b')]
  await advance(5e3)
  comet.close()
  for (const s of sent) await assert.rejects(s, /closed/)
  assert.deepEqual(undelivered.map(u => u.data), ['a', 'b'])
})

test('a message in flight when it was closed is rejected once', async () => {
  const { comet, undelivered } = openUnshared({ via: ['sse'] })
  await settle()
  net.postAnswers.push({ status: 400, error: 'no' })
  const sent = comet.send('a')
  comet.close()
  await assert.rejects(sent, /closed/)
  await settle()
  assert.equal(undelivered.length, 1)
})

test('a waiting message is sent as soon as the connection is back', async () => {
  const { comet, got } = openUnshared({ via: ['sse'], after: relay.head })
  await settle()
  net.down = true
  net.cut()
  mock.method(Math, 'random', () => 0.999)
  await advance(40e3, 1e3)
  comet.send('hi')
  await advance(40e3, 1e3)
  net.down = false
  while (comet.status !== 'open') await advance(100, 100)
  await settle()
  assert.deepEqual(got, ['hi'])
  Math.random.mock.restore()
})

test('a message in flight by a WebSocket that is replaced is not lost or duplicated', async () => {
  const { comet, got } = openUnshared()
  await settle()
  net.only.dropsReplies = true
  const sent = comet.send('hi')
  comet.use('sse')
  await settle()
  assert.equal(await sent, relay.head)
  assert.deepEqual(got, ['hi'])
})

for (const via of ['ws', 'sse']) {
  test(`send with if, by ${via}: rejects with the newest id when there is a newer message, and is not tried again`, async () => {
    const { comet, got } = openUnshared({ via: [via], after: relay.head })
    await settle()
    const first = comet.send(1, { if: 0 })
    await settle()
    const id = await first
    const stale = comet.send('stale', { if: 0 }), next = comet.send('next')
    await settle()
    await assert.rejects(stale, { name: 'CometError', status: 412, id, final: true, message: 'there is a newer message' })
    await next
    assert.deepEqual(got, [1, 'next'])
    assert.equal(await comet.send(2, { if: relay.head, key: 'k' }), relay.head)
    assert.equal(await comet.send(2, { if: id, key: 'k' }), relay.head, 'it was published already')
    await settle()
    assert.deepEqual(got, [1, 'next', 2])
  })

  test(`two clients that increment a counter by ${via} lose no increment`, async () => {
    const increment = async ({ comet, state }) => {
      for (; ;) try { return await comet.send(state.n + 1, { if: state.id }) } catch (error) {
        if (error.status !== 412) throw error
        while (state.id < error.id) await settle(5)
      }
    }
    const both = [0, 0].map(() => {
      const { comet } = openUnshared({ via: [via], after: relay.head }), state = { id: 0, n: 0 }
      comet.addEventListener('message', ({ detail: { id, data } }) => Object.assign(state, { id, n: data }))
      return { comet, state }
    })
    await settle()
    await Promise.all(both.map(async one => { for (const _ of upTo(20)) await increment(one) }))
    await settle()
    assert.deepEqual(relay.log.map(e => e.data), upTo(40))
    assert.deepEqual(both.map(({ state }) => state.n), [40, 40])
  })
}

// Presence.

test('typing is sent every 2.5 s at most; a state is sent again after reconnecting', async () => {
  const { comet } = openUnshared({ user: 'ada' })
  comet.presence('away')
  await settle()
  const { frames } = net.only
  const states = () => frames.map(f => JSON.parse(f)).filter(f => f.type === 'presence').map(f => f.data)
  assert.deepEqual(states(), ['away'])
  for (const _ of upTo(60)) { comet.typing(); await advance(100, 100) }
  assert.deepEqual(states(), ['away', 'typing', 'typing', 'typing'])
  await comet.send('x')
  comet.typing()
  assert.equal(states().length, 5)
  net.cut()
  comet.typing()
  await advance(2e3)
  assert.deepEqual(net.only.frames, ['{"type":"presence","room":"lobby","data":"away"}'])
  comet.use('sse')
  await settle()
  comet.presence('online')
  await settle()
  assert.equal(net.count('POST presence'), 1)
})

// The page: hidden, closed, offline, asleep.

test('a connection that is silent for twice the heartbeat is dead', async () => {
  for (const [name, beat, before, after] of [['ws', 15, 34e3, 8e3], ['sse', 2, 8e3, 8e3], ['stream', 15, 34e3, 8e3]]) {
    relay.beat = beat
    const { comet, statuses } = openUnshared({ via: [name] })
    await settle()
    net.only.silent = true
    await advance(before, 500)
    assert.equal(statuses.length, 2)
    await advance(after, 500)
    assert.match(statuses[2].error.message, /nothing came/)
    assert.equal(comet.status, 'open')
    comet.close()
    await settle()
  }
})

test('a heartbeat keeps the connection', async () => {
  const { statuses } = openUnshared()
  await settle()
  for (const _ of upTo(20)) {
    net.only.emit({ type: 'beat' })
    await advance(14e3, 1e3)
  }
  assert.equal(statuses.length, 2)
})

test('a hidden page has no timers, and checks the connection when it is visible again', async () => {
  const { comet, got, fire } = openUnshared()
  await settle()
  document.hidden = true
  fire('visibilitychange')
  await advance(6e3)
  const timers = mock.method(globalThis, 'setTimeout')
  net.only.silent = true
  relay.publish('missed')
  await advance(600e3, 10e3)
  assert.equal(timers.mock.callCount(), 0)
  timers.mock.restore()
  document.hidden = false
  fire('visibilitychange')
  await settle()
  assert.equal(comet.status, 'open')
  assert.deepEqual(got, ['missed'])
})

test('it reconnects at once when the network is back, the page is visible, or the machine has slept', async () => {
  const { comet, fire, statuses } = openUnshared()
  await settle()
  const asleep = async () => {
    net.down = true
    net.cut()
    await advance(60e3, 1e3)
    net.down = false
    assert.equal(comet.status, 'reconnecting')
  }
  await asleep()
  fire('online')
  await settle()
  assert.equal(comet.status, 'open')
  await asleep()
  fire('visibilitychange')
  await settle()
  assert.equal(comet.status, 'open')
  const luck = mock.method(Math, 'random', () => 0.999) // it has just begun to wait for 30 s
  net.down = true
  net.cut()
  while (!(statuses.at(-1).retryIn > 29e3)) await advance(100, 100)
  net.down = false
  const { now } = Date
  const clock = mock.method(Date, 'now', () => now() + 3600e3)
  await advance(5e3)
  assert.equal(comet.status, 'open')
  clock.mock.restore()
  luck.mock.restore()
  navigator.onLine = false
  net.down = true
  net.cut()
  await advance(2e3)
  assert.equal(statuses.at(-1).status, 'offline')
})

test('when the browser goes offline, and the relay is unreachable, the status is offline at once', async () => {
  for (const via of ['ws', 'sse', 'stream', 'longpoll']) for (const how of ['refused', 'silent']) {
    const { comet, statuses, fire } = openUnshared({ via: [via] })
    await settle()
    if (how === 'refused') net.down = true
    else net.stalled.add('poll')
    navigator.onLine = false
    fire('offline')
    await advance(how === 'refused' ? 0 : 4e3)
    assert.equal(statuses.at(-1).status, 'offline', via + how)
    assert.match(statuses.at(-1).error.message, /network is gone/)
    net.down = false
    net.stalled.clear()
    navigator.onLine = true
    fire('online')
    await settle()
    assert.equal(comet.status, 'open')
    comet.close()
    await settle()
  }
})

test('when the browser goes offline, and the relay is still reachable, the connection stays', async () => {
  for (const refusal of [undefined, { status: 429, error: 'slowly' }]) {
    const { comet, statuses, fire } = openUnshared({ via: ['ws'] })
    await settle()
    const { only } = net
    navigator.onLine = false
    net.refusal = refusal
    fire('offline')
    await advance(10e3, 500)
    assert.equal(net.only, only)
    assert.equal(comet.status, 'open')
    assert.deepEqual(statuses.map(s => s.status), ['connecting', 'open'])
    net.refusal = undefined
    navigator.onLine = true
    comet.close()
    await settle()
  }
  const { fire } = openUnshared() // not connected yet
  fire('offline')
  await settle()
})

test('when the network comes back the connection is replaced at once', async () => {
  const { fire, got, statuses } = openUnshared()
  await settle()
  const old = net.only
  old.silent = true
  relay.publish('missed')
  fire('online')
  await settle()
  assert.notEqual(net.only, old)
  assert.deepEqual(got, ['missed'])
  assert(statuses.slice(1).every(s => s.status === 'open'))
})

test('pagehide closes the connection and sends a beacon; from the back/forward cache it continues from the cursor', async () => {
  const { comet, got, fire } = open({ user: 'ada' }, '/rooms/a,b')
  await settle()
  relay.publish(1, { room: 'a' })
  await settle()
  fire('pagehide', { persisted: true })
  await settle()
  assert.equal(net.open.size + locks.held.size + channels.size, 0)
  assert.deepEqual(beacons, ['/rooms/a/presence offline', '/rooms/b/presence offline'])
  relay.publish(2, { room: 'b' })
  await advance(60e3, 10e3)
  fire('pageshow', { persisted: true })
  relay.publish(3, { room: 'a' })
  await settle()
  assert.equal(comet.status, 'open')
  assert.deepEqual(got, [1, 2, 3])
})

test('polling asks at once when the page becomes visible', async () => {
  const { got, fire } = openUnshared({ via: ['poll'] })
  await settle()
  document.hidden = true
  await advance(6e3)
  relay.publish('hi')
  await advance(10e3)
  assert.deepEqual(got, [])
  document.hidden = false
  fire('visibilitychange')
  await settle()
  assert.deepEqual(got, ['hi'])
})

test('page events during a trial do not repeat it; the first pageshow starts nothing', async () => {
  net.stalled.add('ws')
  const { fire } = openUnshared({ via: ['ws', 'sse'] })
  await settle()
  for (const type of ['online', 'visibilitychange', 'pageshow', 'online']) fire(type)
  await settle()
  assert.equal(net.sockets, 1)
  assert.equal(net.requests.length, 1)
})

test('without a user no beacon is sent', async () => {
  const { fire } = openUnshared()
  await settle()
  fire('pagehide')
  assert.deepEqual(beacons, [])
})

// Sharing.

test('ten tabs share one connection, and all receive its events', async () => {
  for (const _ of upTo(10)) await openSettled()
  assert.equal(net.only.via, 'ws')
  assert.equal(tabs.filter(t => t.comet.leader).length, 1)
  relay.publish('hi')
  await settle()
  for (const { comet, got, statuses } of tabs) {
    assert.deepEqual(got, ['hi'])
    assert.equal(comet.status, 'open')
    assert.equal(comet.via, 'ws')
    assert.equal(comet.cursor, relay.head)
    assert.equal(statuses.at(-1).leader, comet.leader)
  }
  const sent = tabs[7].comet.send('from a follower')
  await settle()
  assert.equal(await sent, relay.head)
  assert.deepEqual(tabs[3].got, ['hi', 'from a follower'])
})

test('ten tabs that open at once share one connection', async () => {
  for (const _ of upTo(10)) open()
  await settle(100)
  assert.equal(net.open.size, 1)
  assert(tabs.every(t => t.comet.status === 'open'))
})

test('a tab can be closed at any moment', async () => {
  await openSettled({ user: 'ada' })
  for (let turns = 0; turns < 25; turns++) {
    const { comet } = open({ user: 'ada', last: 5 })
    await settle(turns)
    comet.close()
  }
  tabs[0].comet.close()
  for (let turns = 0; turns < 25; turns++) {
    const { comet } = open({ user: 'ada', last: 5 })
    await settle(turns)
    comet.close()
    await settle(turns % 3)
  }
})

test('another user, another room, another token: another connection', async () => {
  await openSettled({ user: 'ada' })
  await openSettled({ user: 'bob' })
  await openSettled({ token: 't' })
  await openSettled({}, '/rooms/b')
  assert.equal(net.open.size, 4)
})

test("a late tab gets the history it asked for, the roster, and then the leader's events", async () => {
  relay.batch = 4
  for (const i of upTo(30)) relay.publish(i)
  await openSettled({ user: 'ada' })
  const late = open({ user: 'ada', last: 10 })
  const cursor = open({ user: 'ada', after: 1005 })
  for (const i of upTo(40, 31)) { relay.publish(i); await settle(3) }
  await settle(200)
  assert(late.got[0] <= 31 && late.got.length >= 10)
  assert.deepEqual(late.got, upTo(40, late.got[0]))
  assert.deepEqual(cursor.got, upTo(40, 6))
  assert.equal(late.events.filter(e => e.type === 'presence' && e.data.users.ada).length, 1)
  assert.equal(net.open.size, 1)
})

test("a late tab delivers the leader's events only after it has caught up", async () => {
  for (const i of upTo(30)) relay.publish(i)
  await openSettled({ user: 'ada' })
  net.blocked.add('poll')
  const late = open({ user: 'ada', last: 10 })
  await settle()
  for (const i of upTo(35, 31)) relay.publish(i)
  await settle()
  assert.deepEqual(late.got, [])
  net.blocked.clear()
  await advance(10e3)
  assert.deepEqual(late.got, upTo(35, 26))
  const asked = net.requests.filter(a => a.startsWith('GET poll'))
  assert(asked.every(a => !/user=/.test(a) && /presence=1/.test(a)), 'it is not present by asking')
})

test('events between an answer and its arrival are not lost; in a busy room catching up ends', async () => {
  await openSettled()
  const real = globalThis.fetch
  let n = 0
  globalThis.fetch = async (...args) => {
    const answer = await real(...args)
    if (n < 50) for (const _ of upTo(3)) relay.publish(++n)
    await settle()
    return answer
  }
  for (const _ of upTo(3)) relay.publish(++n)
  const late = open({ after: 1000 })
  await settle(400)
  assert.deepEqual(late.got, upTo(n))
  assert(net.count('GET poll') <= 2, `${net.count('GET poll')} requests`)
})

test('a follower that is closed by a listener delivers no more events', async () => {
  for (const i of upTo(9)) relay.publish(i)
  await openSettled({ user: 'ada' })
  const late = open({ user: 'ada', last: 9 })
  late.comet.addEventListener('message', () => late.comet.close())
  await settle(100)
  assert.deepEqual(late.got, [1])
  assert.equal(late.events.length, 1)
})

test('when the leader closes, another tab leads from its own cursor: nothing is lost or delivered twice', async () => {
  for (const _ of upTo(4)) open({ after: relay.head })
  await settle(100)
  let n = 0
  for (const _ of upTo(3)) {
    relay.publish(++n)
    const leader = tabs.find(t => t.comet.leader)
    leader.comet.close()
    leader.closed = true
    relay.publish(++n)
    await settle(5)
    relay.publish(++n)
    await settle(100)
    for (const t of tabs) if (!t.closed) assert.deepEqual(t.got, upTo(n))
    assert.equal(net.open.size, 1)
  }
})

test('use() in any tab changes the connection of all', async () => {
  await openSettled()
  const tab = await openSettled()
  tab.comet.use('sse')
  await settle()
  assert.equal(net.only.via, 'sse')
  assert.deepEqual(tabs.map(t => t.comet.via), ['sse', 'sse'])
  tabs[0].comet.close()
  await settle(100)
  assert.equal(net.only.via, 'sse', 'also when another leads')
})

test('only the last tab sends a beacon', async () => {
  for (const _ of upTo(3)) await openSettled({ user: 'ada' })
  tabs[2].fire('pagehide')
  await settle(100)
  tabs[0].fire('pagehide')
  await settle(100)
  assert.deepEqual(beacons, [])
  assert(tabs[1].comet.leader)
  tabs[1].fire('pagehide')
  assert.deepEqual(beacons, ['/rooms/lobby/presence offline'])
})

test('tabs that share a connection are one client, whichever leads and sends the beacon', async () => {
  const one = await openSettled({ user: 'ada' }), two = await openSettled({ user: 'ada' }), three = await openSettled({ user: 'ada' })
  const client = clientOf(net.requests.find(a => a.startsWith('GET ws')))
  one.comet.close()
  await settle()
  assert.equal(clientOf(net.requests.findLast(a => a.startsWith('GET ws'))), client)
  two.comet.close()
  await settle()
  three.comet.close()
  assert.deepEqual(beaconClients, [client])
})

test('a new leader knows the other tabs', async () => {
  for (const _ of upTo(3)) await openSettled({ user: 'ada' })
  for (const t of tabs) {
    assert.deepEqual(beacons, [])
    t.fire('pagehide')
    await settle(100)
  }
  assert.equal(beacons.length, 1)
})

test('a leader in the back/forward cache does not lead; it returns as a follower that missed nothing', async () => {
  await openSettled()
  await openSettled()
  tabs[0].fire('pagehide', { persisted: true })
  await settle(100)
  assert(tabs[1].comet.leader)
  for (const i of upTo(5)) relay.publish(i)
  tabs[0].fire('pageshow', { persisted: true })
  await settle(100)
  relay.publish(6)
  await settle(100)
  assert(!tabs[0].comet.leader)
  assert.deepEqual(tabs[0].got, upTo(6))
  assert.deepEqual(tabs[1].got, upTo(6))
})

test('a frozen leader is pinged, then its lock is stolen; when it thaws it follows', async () => {
  const old = await openSettled()
  const tab = await openSettled()
  const { channel } = old
  channel.frozen = true
  net.only.silent = true
  relay.publish(1)
  await advance(35e3, 1e3)
  assert(!tab.comet.leader)
  await advance(15e3, 1e3)
  assert(tab.comet.leader)
  assert.deepEqual(tab.got, [1])
  await settle(100)
  relay.publish(2)
  await settle(100)
  assert(!old.comet.leader)
  assert.deepEqual(old.got, [1, 2])
  assert.equal(net.open.size, 1)
})

test('a hidden leader does not check its connection, so a visible follower pings it', async () => {
  const leader = await openSettled()
  const tab = await openSettled()
  document.hidden = true
  await advance(6e3)
  document.hidden = false
  tab.fire('visibilitychange') // the leader's tab is still hidden, and has no timer
  net.only.silent = true
  relay.publish(1)
  await advance(80e3, 1e3)
  assert.deepEqual(tab.got, [1])
  assert(leader.comet.leader)
  net.only.silent = true
  relay.publish(2)
  document.hidden = true
  await advance(60e3, 1e3)
  document.hidden = false
  tab.fire('visibilitychange')
  await advance(2e3)
  assert.deepEqual(tab.got, [1, 2], 'at once when it is visible')
})

test('the network coming back wakes hidden pages too', async () => {
  const { comet, fire } = openUnshared()
  await settle()
  document.hidden = true
  net.down = true
  net.cut()
  await advance(60e3, 1e3)
  net.down = false
  fire('online')
  await settle()
  assert.equal(comet.status, 'open')
})

test('a leader without events keeps its lock', async () => {
  await openSettled()
  await openSettled()
  for (const _ of upTo(30)) {
    net.only.emit({ type: 'beat' })
    await advance(10e3, 1e3)
  }
  assert(tabs[0].comet.leader)
  assert.equal(tabs[1].statuses.filter(s => s.status === 'open').length, 1, 'and a known status is not dispatched again')
})

test('a follower that missed messages of the leader asks the relay', async () => {
  await openSettled()
  const tab = await openSettled()
  tab.channel.frozen = true
  for (const i of upTo(5)) relay.publish(i)
  await settle()
  tab.channel.frozen = false
  assert.deepEqual(tab.got, [])
  relay.publish(6)
  await settle()
  assert.deepEqual(tab.got, upTo(6))
})

test('a follower whose request fails asks again, and delivers all in order', async () => {
  await openSettled()
  net.blocked.add('poll')
  const tab = open({ after: relay.head })
  for (const i of upTo(5)) { relay.publish(i); await settle() }
  assert.deepEqual(tab.got, [])
  net.blocked.clear()
  await advance(10e3)
  relay.publish(6)
  await settle()
  assert.deepEqual(tab.got, upTo(6))
})

test("when the relay's ids went back, followers accept the leader's cursor", async () => {
  relay.head = 8000
  await openSettled()
  await openSettled()
  relay.publish('before')
  await settle()
  relay = new Relay
  relay.publish('after')
  net.cut()
  await advance(3e3)
  for (const t of tabs) {
    assert.deepEqual(t.got, ['before', 'after'])
    assert.equal(t.comet.cursor, 1001)
  }
})

test('without locks, or where they do not work, each tab has its own connection', async () => {
  navigator.locks = undefined
  await openSettled()
  navigator.locks = { request: async () => { throw new DOMException('not here', 'SecurityError') } }
  await openSettled()
  globalThis.BroadcastChannel = undefined
  navigator.locks = locks
  await openSettled()
  assert.equal(net.open.size, 3)
  assert(tabs.every(t => t.comet.leader && t.comet.status === 'open'))
})

// All at once.

for (const round of upTo(5)) {
  test(`nothing is lost, duplicated or out of order, whatever happens (${round})`, async () => {
    const all = ['ws', 'sse', 'stream', 'longpoll', 'poll', 'multipart']
    const start = () => Object.assign(open({ after: relay.head, every: 2 }), { from: n + 1 })
    let n = 0
    start()
    for (const _ of upTo(250)) {
      const alive = tabs.filter(t => !t.closed), tab = alive[random(alive.length)]
      const luck = random(16)
      if (luck === 0) net.cut()
      if (luck === 1) tab.comet.use(all[random(6)])
      if (luck === 2) tab.comet.use()
      if (luck === 3 && alive.length < 5) start()
      if (luck === 4 && alive.length > 1) { tab.comet.close(); tab.closed = true; tab.to = n }
      if (luck === 5) { net.down = true; if (random(2)) net.cut() }
      if (luck === 6) net.down = false
      if (luck === 7) net.blocked.has('ws') ? net.blocked.clear() : net.blocked.add(all[random(6)]).add('ws')
      if (luck === 8) net.stalled.size ? net.stalled.clear() : net.stalled.add(all[random(6)])
      if (luck === 9) tab.fire(['online', 'visibilitychange'][random(2)])
      if (luck === 10) { tab.fire('pagehide', { persisted: true }); await settle(random(9)); tab.fire('pageshow', { persisted: true }) }
      for (let k = random(3); k--;) relay.publish(++n)
      await settle(random(12))
      if (random(3) === 0) await advance(random(5) * 500, 500)
      const open = tabs.filter(t => t.comet.leader).length
      assert(open <= 1, `${open} leaders`)
    }
    net.down = false
    net.blocked.clear()
    net.stalled.clear()
    await advance(90e3, 1e3)
    relay.publish(++n)
    await advance(30e3, 1e3)
    for (const t of tabs) {
      if (t.closed) assert.deepEqual(t.got, upTo(t.from + t.got.length - 1, t.from))
      else assert.deepEqual(t.got, upTo(n, t.from))
    }
  })
}
