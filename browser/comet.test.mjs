// comet.js without a browser. The world is small and all in this process: a relay, a network that refuses, holds
// back and breaks, tabs with their locks and channels, and a clock that we turn. Run it with `npm test`.

import assert from 'node:assert/strict'
import { setMaxListeners } from 'node:events'
import { readFileSync } from 'node:fs'
import { afterEach, beforeEach, mock, test } from 'node:test'
import { gzipSync } from 'node:zlib'
import { Comet, CometError, backoff, lines, techniques } from '../static/comet.js'

setMaxListeners(0) // many questions, one signal
const text = new TextEncoder()
const soon = fn => setImmediate(fn)
const aborted = () => new DOMException('aborted', 'AbortError')
const random = n => Math.floor(Math.random() * n)
const roomsOf = path => /\/rooms\/([^/]+)/.exec(path)[1].split(',')
const upTo = (n, from = 1) => Array.from({ length: n - from + 1 }, (_, i) => from + i)

// The relay: one log, one order; the contract in small.

class Relay {
  mark = 1000
  floor = 0
  log = []
  keys = new Map
  readers = new Set
  batch = 100
  beat = 15
  users = { ada: 'online' }

  newest(room) { return this.log.findLast(e => e.room === room)?.id ?? 0 }

  publish(data, { room = 'lobby', type = 'message', key } = {}) {
    if (key && this.keys.has(key)) return this.keys.get(key)
    this.log.push({ id: ++this.mark, room, type, data })
    if (key) this.keys.set(key, this.mark)
    for (const wake of [...this.readers]) wake()
    return this.mark
  }

  reader(url) {
    const { searchParams: query, pathname } = new URL(url)
    const rooms = roomsOf(pathname)
    const mine = this.log.filter(e => rooms.includes(e.room))
    const last = +query.get('last')
    const gap = (id, reason) => [{ type: 'gap', room: rooms[0], id, data: { reason } }]
    const begin = query.has('after') ? +query.get('after') : last && mine.length ? mine.at(-Math.min(last, mine.length)).id - 1 : this.mark
    let gaps = begin > this.mark ? gap(1000, 'future') : begin < this.floor ? gap(this.floor, 'history') : []
    let after = gaps[0]?.id ?? begin
    return {
      begin,
      next: () => {
        const due = this.log.filter(e => rooms.includes(e.room) && e.id > after)
        const events = due.slice(0, this.batch)
        after = due.length > events.length ? events.at(-1).id : this.mark
        const all = [...gaps, ...events]
        gaps = []
        return { cursor: after, events: all }
      },
    }
  }

  /** A stream. Returns what ends it. */
  follow(url, write) {
    const reader = this.reader(url)
    write({ type: 'hello', id: reader.begin, time: 0, data: { rooms: [], beat: this.beat, instance: 'test' } })
    const wake = () => { for (let due; (due = reader.next().events).length;) due.forEach(write) }
    this.readers.add(wake)
    wake()
    return () => this.readers.delete(wake)
  }
}

// The network. `open` are the connections: { via, cut(), say(event), silent, … }.

class Net {
  down = false
  blocked = new Set
  held = new Set
  open = new Set
  asked = [] // 'GET ws ?after=…'
  sockets = 0 // WebSockets and EventSources that nobody closed
  answers = [] // of the next POSTs: { status, error, headers }, or 'lose': it was published, but nobody says so

  state(via) { return this.down || this.blocked.has(via) ? 'refused' : this.held.has(via) ? 'held' : 'ok' }
  cut() { for (const c of [...this.open]) c.cut() }
  get only() { assert.equal(this.open.size, 1); return [...this.open][0] }
  count(kind) { return this.asked.filter(a => a.startsWith(kind)).length }
}

let relay, net, locks, channels, beacons, goodbyes, store, tabs

const clientOf = url => /[?&]client=([^&]+)/.exec(url)[1]
const kindOf = url => /\/rooms\/[^/]+\/?(.*)/.exec(new URL(url).pathname)[1]

class FakeWebSocket {
  constructor(url) {
    assert.match(url, /^ws:/)
    net.asked.push('GET ws ' + new URL(url).search)
    net.sockets++
    const c = this.c = { via: 'ws', said: [], cut: () => this.end(), say: e => c.silent || this.over || this.onmessage({ data: JSON.stringify(e) }) }
    soon(() => {
      if (this.over) return
      if (net.state('ws') === 'refused') return this.end()
      if (net.state('ws') === 'held') return
      net.open.add(c)
      c.leave = relay.follow(url, c.say)
    })
  }
  send(frame) {
    const { c } = this
    c.said.push(frame)
    if (c.deaf || this.over) return
    const { type, room, key, data, if: since } = JSON.parse(frame)
    if (type === 'presence') return
    const stale = since !== undefined && since !== relay.newest('lobby') && !relay.keys.has(key)
    const reply = stale ? { type: 'error', key, id: relay.newest('lobby'), data: 'there is a newer message' } : c.refuses ? { type: 'error', key, data: 'no' } : { type: 'ack', key, id: relay.publish(data, { type, room, key }) }
    soon(() => c.mute || c.say(reply))
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
    net.asked.push('GET sse ' + new URL(url).search)
    net.sockets++
    const tell = (type, data) => this.dispatchEvent(Object.assign(new Event(type), { data }))
    const c = this.c = { via: 'sse', cut: () => { this.close(); this.onerror() }, say: e => c.silent || this.over || tell('message', JSON.stringify(e)) }
    soon(() => {
      if (this.over) return
      if (net.state('sse') === 'refused') return c.cut()
      if (net.state('sse') === 'held') return
      net.open.add(c)
      c.leave = relay.follow(url, c.say)
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

const answer = (body, status = 200, headers = {}) => new Response(JSON.stringify(body), { status, headers })

async function fakeFetch(url, { method = 'GET', body, signal } = {}) {
  const kind = kindOf(url), { searchParams: query, pathname, search } = new URL(url)
  net.asked.push(`${method} ${kind} ${search}`)
  const gone = new Promise((_, fail) => signal?.addEventListener('abort', () => fail(aborted())))
  gone.catch(() => { })
  await Promise.race([new Promise(soon), gone])
  const state = net.state(method === 'GET' ? kind : 'post')
  if (state === 'refused') throw new TypeError('fetch failed')
  if (state === 'held') await gone
  if (kind === 'presence') return answer({ room: 'lobby', count: Object.keys(relay.users).length, users: relay.users })
  if (method === 'POST') {
    const next = net.answers.shift(), rooms = roomsOf(pathname)
    if (rooms[1]) return answer({ error: 'this reads several rooms; name the one that is meant' }, 400)
    if (next?.status) return answer({ error: next.error }, next.status, next.headers)
    const since = query.get('if'), newest = relay.newest(rooms[0])
    if (since !== null && +since !== newest && !relay.keys.has(query.get('key'))) return answer({ error: 'there is a newer message', id: newest }, 412)
    const id = relay.publish(JSON.parse(body), { room: rooms[0], type: query.get('type') ?? undefined, key: query.get('key') })
    if (next === 'lose') throw new TypeError('connection reset')
    return answer({ id }, 201)
  }
  if (net.refusal) return answer({ error: net.refusal.error }, net.refusal.status, net.refusal.headers)
  if (kind === 'poll') return answer(relay.reader(url).next())
  return kind === 'longpoll' ? answer(await held(url, gone)) : new Response(streamed(url, kind, gone))
}

/** A long-poll. */
async function held(url, gone) {
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
      relay.readers.add(wake)
      gone.catch(fail)
    })
    return reader.next()
  } finally {
    net.open.delete(c)
    relay.readers.delete(wake)
  }
}

/** stream or multipart, in pieces of any size. */
function streamed(url, kind, gone) {
  const part = kind === 'multipart' ? '\r\n--cut\r\nContent-Type: application/json\r\n\r\n' : '\n'
  return new ReadableStream({
    start(feed) {
      const write = line => {
        const bytes = text.encode(line)
        for (let from = 0, to; from < bytes.length; from = to) feed.enqueue(bytes.subarray(from, to = from + 1 + random(9)))
      }
      const c = { via: kind, say: e => c.silent || write(JSON.stringify(e) + part), cut: () => end(() => feed.error(new TypeError('connection reset'))) }
      const end = how => { if (net.open.delete(c)) { leave(); how() } }
      net.open.add(c)
      if (kind === 'multipart') write(part.slice(2))
      const leave = relay.follow(url, c.say)
      gone.catch(() => end(() => feed.error(aborted())))
    },
  })
}

// Tabs. A lock has one holder, whatever happens: grant() checks it.

class FakeLocks {
  held = new Map
  waiting = []

  request(name, options, callback = options) {
    const { steal, ifAvailable, signal } = options
    return new Promise((resolve, reject) => {
      const ask = { name, callback, resolve, reject }
      if (steal) {
        this.held.get(name)?.reject(new DOMException('stolen', 'AbortError'))
        this.held.delete(name)
      }
      if (steal || ifAvailable && !this.held.has(name)) return this.grant(ask)
      if (ifAvailable) return soon(() => resolve(callback(null)))
      this.waiting.push(ask)
      signal?.addEventListener('abort', () => {
        const at = this.waiting.indexOf(ask)
        if (at >= 0) this.waiting.splice(at, 1)
        reject(aborted())
      })
      soon(() => this.next(name))
    })
  }
  next(name) {
    const at = this.waiting.findIndex(ask => ask.name === name)
    if (at >= 0 && !this.held.has(name)) this.grant(...this.waiting.splice(at, 1))
  }
  grant(ask) {
    assert(!this.held.has(ask.name))
    this.held.set(ask.name, ask)
    soon(async () => {
      ask.resolve(await ask.callback({ name: ask.name }))
      if (this.held.get(ask.name) !== ask) return
      this.held.delete(ask.name)
      soon(() => this.next(ask.name))
    })
  }
}

class FakeChannel {
  constructor(name) {
    this.name = name
    channels.add(this)
  }
  postMessage(data) {
    assert(!this.closed, 'a closed channel speaks')
    if (this.frozen) return
    for (const c of channels) {
      if (c === this || c.name !== this.name) continue
      const copy = structuredClone(data)
      soon(() => c.closed || c.frozen || c.onmessage({ data: copy }))
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
  goodbyes = []
  store = new Map
  tabs = []
  for (const [name, value] of Object.entries({
    WebSocket: FakeWebSocket, EventSource: FakeEventSource, fetch: fakeFetch, BroadcastChannel: FakeChannel,
    location: { href: 'http://relay.test/chat', origin: 'http://relay.test' }, document: { hidden: false },
    navigator: { onLine: true, locks, sendBeacon: (url, body) => beacons.push(`${new URL(url).pathname} ${body}`) && goodbyes.push(clientOf(url)) },
    localStorage: { getItem: k => store.get(k) ?? null, setItem: (k, v) => store.set(k, v) },
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

/** Lets happen what is due now. */
async function settle(turns = 40) {
  while (turns--) await new Promise(done => setImmediate(done))
}

/** Lets time pass. */
async function pass(ms, step = 250) {
  await settle()
  for (; ms > 0; ms -= step) {
    mock.timers.tick(Math.min(step, ms))
    await settle(15)
  }
}

/** A tab with a Comet, which notes what it is told. */
function open(options, url = '/rooms/lobby') {
  const page = new EventTarget
  globalThis.addEventListener = page.addEventListener.bind(page)
  globalThis.removeEventListener = page.removeEventListener.bind(page)
  const before = new Set(channels)
  const comet = new Comet(url, options)
  const tab = {
    comet, got: [], events: [], statuses: [], undelivered: [],
    hear: (type, more) => page.dispatchEvent(Object.assign(new Event(type), more)),
    get channel() { return [...channels].find(c => !before.has(c)) },
  }
  comet.addEventListener('message', e => tab.got.push(e.detail.data))
  comet.addEventListener('event', e => tab.events.push(e.detail))
  comet.addEventListener('status', e => tab.statuses.push(e.detail))
  comet.addEventListener('undelivered', e => tab.undelivered.push(e.detail))
  tabs.push(tab)
  return tab
}

const alone = (options, url) => open({ shared: false, ...options }, url)

async function opened(options, url) {
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

test('lines are the same wherever the network cuts them', () => {
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

test('backoff doubles, is capped, and is spread over all of the time', () => {
  for (const [r, tries, ms] of [[1, 0, 1e3], [1, 1, 2e3], [1, 4, 16e3], [1, 5, 30e3], [1, 5000, 30e3], [0.5, 2, 2e3], [0, 9, 0]]) {
    mock.method(Math, 'random', () => r)
    assert.equal(backoff(tries), ms)
    Math.random.mock.restore()
  }
})

test('the URL says all that was asked for, and none is asked twice', async () => {
  alone({ via: ['poll'], user: 'ada & co', token: 't', presence: false, last: 5, every: 1 }, 'http://other.test/base/rooms/a,b/?x=1#hash')
  await pass(3e3)
  const urls = net.asked.filter(a => a.startsWith('GET poll'))
  const query = new URLSearchParams(urls[0].split(' ')[2])
  query.delete('_')
  assert.match(query.get('client'), /^[A-Za-z0-9_.:-]{1,64}$/)
  query.delete('client')
  assert.deepEqual(Object.fromEntries(query), { x: '1', user: 'ada & co', token: 't', presence: '0', last: '5' })
  assert(urls.length >= 3)
  assert.equal(new Set(urls).size, urls.length)
})

test('all that a Comet asks for and says names it: streams, presence and the goodbye', async () => {
  const { comet, hear } = alone({ via: ['ws', 'sse', 'poll'], user: 'ada' })
  const { comet: other } = alone({ via: ['stream'], user: 'ada' })
  await settle()
  comet.use('sse')
  await settle()
  comet.presence('away')
  comet.use('poll')
  await settle()
  comet.close()
  await settle()
  const [mine, theirs] = ['sse', 'stream'].map(via => clientOf(net.asked.find(a => a.startsWith('GET ' + via))))
  assert.notEqual(mine, theirs)
  assert.deepEqual(['GET ws', 'POST presence', 'GET poll'].map(kind => clientOf(net.asked.find(a => a.startsWith(kind)))), [mine, mine, mine])
  assert.deepEqual(goodbyes, [mine])
  other.close()
  assert.deepEqual(goodbyes, [mine, theirs])
})

test('a page of another origin that gets no answer is told of -origins; a page of the relay is not, nor who was connected before', async () => {
  net.down = true
  for (const via of [['ws'], ['stream'], ['ws', 'sse', 'poll']]) {
    const { statuses } = alone({ via }, 'http://other.test/rooms/lobby')
    await settle()
    assert.match(statuses.at(-1).error.message, /likely its -origins does not list http:\/\/relay\.test$/, via.join())
  }
  const { statuses } = alone({ via: ['stream'] })
  await settle()
  assert.match(statuses.at(-1).error.message, /^the relay could not be reached: fetch failed$/)
  net.down = false
  const foreign = alone({ via: ['stream'] }, 'http://other.test/rooms/lobby')
  await settle()
  net.down = true
  net.cut()
  await pass(5e3)
  assert.equal(foreign.comet.status, 'reconnecting')
  assert.doesNotMatch(foreign.statuses.at(-1).error.message, /origins/)
})

test('what can not be meant is said at once', () => {
  assert.throws(() => new Comet('/rooms/lobby', { via: ['carrier pigeon'] }), /carrier pigeon is none of ws,sse/)
  assert.throws(() => new Comet('http://'), TypeError)
  const { comet } = alone()
  assert.throws(() => comet.use('toString'), CometError)
})

// Techniques.

for (const name of ['ws', 'sse', 'stream', 'multipart', 'longpoll', 'poll']) {
  test(`${name} gets the history that was asked for, and then what happens`, async () => {
    for (const i of upTo(10)) relay.publish(i)
    const { comet, got } = alone({ via: [name], last: 3 })
    await settle()
    assert.deepEqual(got, [8, 9, 10])
    assert.equal(comet.status, 'open')
    assert.equal(comet.via, name)
    relay.publish('naïve ☄')
    await pass(6e3)
    assert.deepEqual(got, [8, 9, 10, 'naïve ☄'])
    assert.equal(comet.cursor, relay.mark)
  })

  test(`${name} goes on by the cursor after cuts and while the relay is away`, async () => {
    const { comet, got } = alone({ via: [name], after: relay.mark })
    for (const i of upTo(60)) {
      relay.publish(i)
      if (i % 5 === 0) net.cut()
      if (i === 30) {
        net.down = true
        net.cut()
        await pass(5e3)
        net.down = false
      }
      await pass(random(7) * 100, 100)
    }
    await pass(60e3, 1e3)
    assert.deepEqual(got, upTo(60))
    assert.equal(comet.status, 'open')
  })
}

test('a long history comes whole, in as many answers as it takes', async () => {
  relay.batch = 7
  for (const i of upTo(50)) relay.publish(i)
  const { got } = alone({ via: ['poll'], last: 50 })
  await settle(200)
  assert.deepEqual(got, upTo(50))
})

test('jsonp calls the page; a script that does not call, or does not come, is a failure', async () => {
  const scripts = [], frames = []
  const page = { createElement: () => ({ remove() { this.gone = true } }), head: { append: s => scripts.push(s) } }
  globalThis.document = {
    createElement: () => ({ contentWindow: {}, contentDocument: page, remove() { this.gone = true } }),
    body: { append: f => frames.push(f) && soon(() => f.onload()) },
  }
  const { comet, got, statuses } = alone({ via: ['jsonp'], after: relay.mark })
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
  assert(!frames[0].gone, 'one frame for all')
  scripts[2].onload()
  await settle()
  assert.match(statuses.at(-1).error.message, /did not call/)
  assert(frames[0].gone, 'and with it what it loads')
  await pass(2e3)
  scripts[3].onerror()
  await settle()
  assert.equal(statuses.at(-1).status, 'reconnecting')
})

test('iframe listens to its own frame only', async () => {
  const frames = []
  globalThis.document = {
    createElement: () => ({ contentWindow: {}, remove() { this.gone = true } }),
    body: { append: f => frames.push(f) },
  }
  const { comet, got, hear } = alone({ via: ['iframe'] })
  await settle()
  const say = (data, source = frames.at(-1).contentWindow) => hear('message', { data, source })
  say({ type: 'hello', id: 5, data: { beat: 15 } }, {})
  assert.equal(comet.status, 'connecting')
  say({ type: 'hello', id: 5, data: { beat: 15 } })
  assert.equal(comet.status, 'open')
  say({ type: 'beat' })
  say({ type: 'message', id: 6, data: 'hi' })
  say({ type: 'message', id: 7, data: 'forged' }, {})
  say(null)
  say('text')
  assert.deepEqual(got, ['hi'])
  frames[0].onload()
  assert.equal(comet.status, 'reconnecting')
  assert(frames[0].gone)
  say({ type: 'message', id: 8, data: 'late' }, frames[0].contentWindow)
  assert.deepEqual(got, ['hi'])
})

test('a page in place of a stream, from a hotel say, is no stream', async () => {
  const real = globalThis.fetch
  globalThis.fetch = async (url, options) => kindOf(url) === 'stream' ? new Response('<html>\nPlease pay\n'.repeat(5)) : real(url, options)
  const { comet } = alone({ via: ['stream', 'poll'] })
  await settle()
  assert.equal(comet.via, 'poll')
})

test('a technique may be added; when it is closed it is not heard any more', async () => {
  let link
  techniques.own = l => { link = l; return () => { link.closed = true } }
  const { comet, got, statuses } = alone({ via: ['own'] })
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

// Falling through, and up again.

test('the next technique is tried when one is refused, and when one is held back', async () => {
  net.blocked.add('ws')
  net.held.add('sse')
  const { comet, statuses } = alone()
  await pass(2900, 100)
  assert.equal(comet.status, 'connecting')
  await pass(200, 100)
  assert.equal(comet.via, 'stream')
  assert.deepEqual(statuses.map(s => [s.status, s.via]), [['connecting', 'ws'], ['connecting', 'sse'], ['connecting', 'stream'], ['open', 'stream']])
  assert.match(statuses[1].error.message, /WebSocket closed \(1006\)/)
  assert.match(statuses[2].error.message, /no hello by sse/)
  assert(statuses[2].error instanceof CometError)
})

test('a technique that the browser has not got is one that fails', async () => {
  delete globalThis.WebSocket
  globalThis.EventSource = undefined
  const { comet, statuses } = alone()
  await settle()
  assert.equal(comet.via, 'stream')
  assert.equal(statuses.at(-1).status, 'open')
})

test('what worked is tried first the next time, and what is better a little later, with nothing lost', async () => {
  net.blocked.add('ws').add('sse')
  const first = alone()
  await settle()
  assert.equal(first.comet.via, 'stream')
  first.comet.close()
  net.asked = []
  const second = alone()
  await settle()
  assert.equal(net.asked.length, 1)
  assert.match(net.asked[0], /GET stream/)
  await pass(4500)
  assert.equal(net.asked.length, 1)
  net.blocked.clear()
  relay.publish('before')
  await pass(1e3)
  relay.publish('after')
  await settle()
  assert.equal(second.comet.via, 'ws')
  assert.deepEqual(second.got, ['before', 'after'])
  assert.deepEqual(second.statuses.map(s => s.status), ['connecting', 'open', 'open'])
  assert.equal(net.only.via, 'ws')
})

test('what is better is looked for ever more rarely, and while the page is hidden not at all', async () => {
  net.blocked.add('ws')
  const { hear } = alone()
  await settle()
  const looks = async ms => {
    net.asked = []
    for (; ms > 0; ms -= 10e3) {
      net.only.say({ type: 'beat' })
      await pass(Math.min(ms, 10e3), 1e3)
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
  hear('visibilitychange')
  await settle()
  assert.equal(net.count('GET ws'), 1)
})

test('a refusal by all techniques is final and says why; use() tries again', async () => {
  net.blocked.add('ws').add('sse')
  net.refusal = { status: 401, error: 'this room needs a token' }
  const { comet, statuses, hear } = alone()
  await settle()
  assert.equal(comet.status, 'closed')
  const { error } = statuses.at(-1)
  assert.equal(error.message, 'this room needs a token')
  assert.equal(error.status, 401)
  net.asked = []
  await pass(120e3, 5e3)
  hear('visibilitychange')
  await settle()
  assert.equal(net.asked.length, 0)
  net.refusal = undefined
  comet.token = 'secret'
  comet.use()
  await settle()
  assert.equal(comet.status, 'open')
  assert.match(net.asked.at(-1), /token=secret/)
})

test('Retry-After ends the round, and is waited for', async () => {
  net.blocked.add('ws').add('sse')
  net.refusal = { status: 503, error: 'full', headers: { 'Retry-After': '20' } }
  const { comet, statuses } = alone()
  await settle()
  assert.deepEqual(net.asked.map(a => a.split(' ')[1]), ['ws', 'sse', 'stream'])
  assert.equal(statuses.at(-1).retryIn, 20_000)
  net.refusal = undefined
  net.blocked.clear()
  await pass(19e3, 1e3)
  assert.notEqual(comet.status, 'open')
  await pass(2e3)
  assert.equal(comet.status, 'open')
})

test('while the relay is away it is asked ever more rarely; when it is back the best technique is first', async () => {
  const { comet, statuses } = alone()
  await settle()
  net.down = true
  net.cut()
  await pass(300e3, 500)
  const waits = statuses.filter(s => s.retryIn !== undefined).map(s => s.retryIn)
  assert(waits.length > 8 && waits.length < 60, `${waits.length} rounds`)
  assert(Math.max(...waits) > 5e3 && Math.max(...waits) <= 30e3, String(waits))
  assert.equal(comet.status, 'reconnecting')
  net.down = false
  await pass(31e3, 500)
  assert.equal(comet.via, 'ws')
})

test('a relay that says hello and goes is not asked without end', async () => {
  const { comet } = alone({ via: ['ws'] })
  comet.addEventListener('status', e => e.detail.status === 'open' && soon(() => net.cut()))
  await pass(120e3, 500)
  assert(net.asked.length < 40, `${net.asked.length} connections in two minutes`)
})

test('on a slow network patience grows', async () => {
  net.held.add('ws').add('poll')
  mock.method(Math, 'random', () => 0)
  alone({ via: ['ws', 'poll'] })
  await pass(120e3, 500)
  assert(net.asked.length > 6 && net.asked.length < 12, `${net.asked.length} attempts`)
})

test('after bye it comes back when told to, by the same technique', async () => {
  store.set('comet http://relay.test', 'sse')
  const { comet, statuses } = alone({ via: ['stream', 'sse', 'poll'] })
  await settle()
  assert.equal(comet.via, 'sse')
  net.asked = []
  net.only.say({ type: 'bye', data: { retry: 7000 } })
  assert.equal(statuses.at(-1).retryIn, 7000)
  assert.equal(net.open.size, 0)
  await pass(6900, 100)
  assert.equal(net.asked.length, 0)
  await pass(200, 100)
  assert.equal(comet.via, 'sse')
  assert.equal(net.asked.length, 1)
})

// Changing in mid-stream.

test('use() changes the technique, and nothing is lost or told twice', async () => {
  const { comet, got, statuses } = alone()
  await settle()
  let n = 0
  for (const name of ['sse', 'stream', 'poll', 'multipart', 'longpoll', 'ws', 'auto', 'poll', null]) {
    relay.publish(++n)
    comet.use(name)
    relay.publish(++n)
    await settle()
    relay.publish(++n)
    await pass(6e3)
    assert.equal(comet.via, !name || name === 'auto' ? 'ws' : name)
    assert(net.open.size <= 1)
  }
  assert.deepEqual(got, upTo(n))
  assert(statuses.slice(1).every(s => s.status === 'open'), 'it was never without a connection')
})

test('use() of what is not to be had keeps what there is, says so, and goes on trying', async () => {
  net.blocked.add('sse')
  const { comet, statuses } = alone()
  await settle()
  comet.use('sse')
  await settle()
  assert.equal(comet.via, 'ws')
  assert.equal(statuses.at(-1).status, 'open')
  assert.match(statuses.at(-1).error.message, /EventSource/)
  net.blocked.clear()
  await pass(6e3, 500)
  assert.equal(comet.via, 'sse')
  assert.equal(store.get('comet http://relay.test'), 'ws', 'what was told is not what proved best')
})

test('use() during backoff, during a trial, and twice at once', async () => {
  const { comet, got } = alone()
  await settle()
  net.down = true
  net.cut()
  await pass(20e3, 500)
  net.down = false
  relay.publish(1)
  comet.use('sse')
  comet.use('stream')
  await settle()
  assert.equal(net.only.via, 'stream')
  net.held.add('ws')
  comet.use('ws')
  await pass(1e3)
  comet.use('poll')
  relay.publish(2)
  await settle()
  assert.equal(comet.via, 'poll')
  assert.equal(net.open.size, 0)
  assert.deepEqual(got, [1, 2])
})

test('close() while connecting, while reconnecting and in a listener leaves nothing behind', async () => {
  for (const when of ['at once', 'connecting', 'listener', 'message', 'backoff']) {
    const { comet, statuses, got } = alone({ via: ['stream', 'poll'] })
    if (when === 'at once') comet.close()
    if (when === 'listener') comet.addEventListener('status', () => comet.close())
    if (when === 'connecting') soon(() => comet.close())
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
    net.asked = []
    await pass(10e3)
    const timers = mock.method(globalThis, 'setTimeout')
    await pass(60e3, 5e3)
    assert.equal(timers.mock.callCount(), 0, when)
    assert.equal(net.asked.length, 0, when)
    timers.mock.restore()
    comet.close()
    comet.use('poll')
    await assert.rejects(comet.send('x'), /closed/)
  }
})

test('use() in a listener of status is heard', async () => {
  const { comet } = alone({ via: ['ws', 'sse'] })
  comet.addEventListener('status', () => comet.use('stream'), { once: true })
  await settle()
  assert.equal(comet.via, 'stream')
  assert.equal(net.only.via, 'stream')
})

// Taking events.

test('what was told already is not told again', async () => {
  const { comet, got } = alone()
  await settle()
  relay.publish(1)
  net.only.say({ ...relay.log[0] })
  net.only.say({ type: 'message', id: 3, data: 'old' })
  assert.deepEqual(got, [1])
  assert.equal(comet.cursor, relay.mark)
})

test('hello gives a cursor to who has none, and takes none from who has one', async () => {
  const { comet } = alone()
  await settle()
  assert.equal(comet.cursor, 1000)
  net.only.say({ type: 'hello', id: 5000, data: { beat: 15 } })
  assert.equal(comet.cursor, 1000)
  net.cut()
  await pass(2e3)
  assert.match(net.asked.at(-1), /after=1000/)
})

test('a gap is told and is where to go on; when the ids of the relay went back, so do we', async () => {
  const { comet, got, events } = alone({ after: 500 })
  relay.floor = 900
  await settle()
  assert.deepEqual(events, [{ type: 'gap', room: 'lobby', id: 900, data: { reason: 'history' } }])
  assert.equal(comet.cursor, 900)
  net.only.say({ type: 'gap', room: 'other', id: 900, data: { reason: 'restart' } })
  assert.equal(events.length, 2, 'a gap of another room at the same place')
  relay.mark = 8000
  relay.publish('before')
  assert.equal(comet.cursor, 8001)
  relay = new Relay
  relay.publish('after')
  net.cut()
  await pass(2e3)
  assert.equal(events.at(-2).data.reason, 'future')
  assert.deepEqual(got, ['before', 'after'])
  assert.equal(comet.cursor, 1001)
})

test('a gap that we are past is none', async () => {
  const { comet, events } = alone({ after: 900 })
  relay.publish(1)
  await settle()
  net.only.say({ type: 'gap', room: 'lobby', id: 950, data: { reason: 'history' } })
  assert.equal(comet.cursor, 1001)
  assert.equal(events.length, 1)
})

test('nobody can speak for us: status, undelivered and event are published as event only', async () => {
  const { events, statuses, undelivered } = alone()
  await settle()
  const before = statuses.length
  for (const type of ['status', 'undelivered', 'event', 'vote']) relay.publish('forged', { type })
  await settle()
  assert.deepEqual(events.map(e => e.type), ['status', 'undelivered', 'event', 'vote'])
  assert.equal(statuses.length, before)
  assert.equal(undelivered.length, 0)
})

test('every event comes under its type, and as event; hello, beat, ack and bye do not', async () => {
  const { comet, events } = alone({ user: 'ada' })
  const types = []
  for (const type of ['vote', 'presence', 'hello', 'beat', 'ack']) comet.addEventListener(type, e => types.push(e.type))
  await settle()
  relay.publish('yes', { type: 'vote' })
  net.only.say({ type: 'presence', room: 'lobby', data: { count: 0, users: {} } })
  net.only.say({ type: 'beat' })
  await comet.send('x')
  assert.deepEqual(types, ['vote', 'presence'])
  assert.deepEqual(events.map(e => e.type), ['vote', 'presence', 'message'])
})

test('who polls is told who is here; who streams is not asked to ask', async () => {
  const polls = alone({ via: ['poll'], user: 'bob' })
  await settle()
  assert.deepEqual(polls.events, [{ type: 'presence', room: 'lobby', data: { count: 1, users: { ada: 'online' } } }])
  alone({ via: ['poll'] })
  alone({ via: ['ws'], user: 'bob' })
  await settle()
  assert.equal(net.count('GET presence'), 1)
})

// Sending.

test('send goes by the WebSocket if that is open, and by POST if not', async () => {
  const { comet, got } = alone({ via: ['ws', 'sse'], after: relay.mark })
  const early = comet.send('early')
  await settle()
  assert.equal(await early, relay.log[0].id)
  assert.equal(await comet.send({ a: [1] }, { type: 'vote', ttl: 5, key: 'k' }), relay.mark)
  assert.deepEqual(JSON.parse(net.only.said[0]), { type: 'vote', ttl: 5, key: 'k', data: { a: [1] } })
  assert.equal(net.count('POST'), 1)
  comet.use('sse')
  await settle()
  const sent = comet.send('c', { room: 'lobby' })
  await settle()
  assert.equal(await sent, relay.mark)
  assert.equal(net.count('POST'), 2)
  assert.deepEqual(got, ['early', 'c'])
})

for (const by of ['ws', 'sse']) {
  test(`messages by ${by} arrive once and in order, whatever fails`, async () => {
    const { comet, got } = alone({ via: [by], after: relay.mark })
    await settle()
    const ids = []
    for (const i of upTo(80)) {
      comet.send(i).then(id => ids.push(id))
      const luck = random(8)
      if (luck === 0) net.cut()
      if (luck === 1) net.answers.push('lose', { status: 503, error: 'busy' })
      if (luck === 2) for (const c of net.open) c.mute = true
      if (luck === 3) for (const c of net.open) c.deaf = true
      if (luck === 4) { net.down = true; net.cut() }
      if (luck === 5) for (const c of net.open) c.refuses = true
      if (luck > 5) net.down = false
      await pass(random(4) * 300, 300)
    }
    net.down = false
    await pass(400e3, 1e3)
    assert.deepEqual(relay.log.map(e => e.data), upTo(80))
    assert.deepEqual(got, upTo(80))
    assert.deepEqual(ids, relay.log.map(e => e.id))
  })
}

test('a lost answer does not make two messages of one', async () => {
  const { comet } = alone({ via: ['sse'] })
  await settle()
  net.answers.push('lose', 'lose', { status: 502 })
  const sent = comet.send('once')
  await pass(10e3)
  assert.equal(await sent, 1001)
  assert.equal(relay.log.length, 1)
  assert.equal(net.count('POST'), 4)
  assert.equal(new Set(net.asked.filter(a => a.startsWith('POST')).map(a => /key=([^&]+)/.exec(a)[1])).size, 1)
})

test('what the WebSocket refuses is posted, and so the reason is known', async () => {
  const { comet, undelivered } = alone()
  await settle()
  net.only.refuses = true
  net.answers.push({ status: 413, error: 'the body is too big; the limit is 65536 bytes' })
  const sent = comet.send('long', { key: 'k' })
  await settle()
  await assert.rejects(sent, { name: 'CometError', status: 413, message: /too big/ })
  assert.equal(undelivered.length, 1)
  assert.equal(undelivered[0].data, 'long')
  assert.equal(undelivered[0].key, 'k')
  assert.equal(undelivered[0].error.status, 413)
})

for (const status of [400, 401, 403, 404, 413, 415]) {
  test(`${status} is final, and the next message goes on`, async () => {
    const { comet, got, undelivered } = alone({ via: ['sse'] })
    await settle()
    net.answers.push({ status, error: 'no' })
    const sent = [comet.send('a'), comet.send('b')]
    await settle()
    await assert.rejects(sent[0], { status, final: true, message: 'no' })
    await sent[1]
    assert.deepEqual(got, ['b'])
    assert.equal(undelivered.length, 1)
  })
}

test('429 is tried again when it says; a message behind it waits', async () => {
  const { comet, got } = alone({ via: ['sse'] })
  await settle()
  net.answers.push({ status: 429, error: 'slowly', headers: { 'Retry-After': '3' } })
  comet.send('a')
  comet.send('b')
  await pass(2900, 100)
  assert.deepEqual(got, [])
  await pass(200, 100)
  assert.deepEqual(got, ['a', 'b'])
})

test('offline, messages wait in order, a hundred of them; signals do not outlive their time', async () => {
  const { comet, got, undelivered } = alone()
  await settle()
  net.down = true
  net.cut()
  const sent = upTo(100).map(i => comet.send(i, i === 50 ? { ttl: 5 } : {}))
  await assert.rejects(comet.send(101), /100 messages are waiting/)
  await pass(20e3, 500)
  net.down = false
  await pass(60e3, 1e3)
  await assert.rejects(sent[49], /its time was over/)
  assert.deepEqual(got, upTo(100).filter(i => i !== 50))
  assert.deepEqual(undelivered.map(u => u.data), [101, 50])
})

test('messages go at once when the connection is back', async () => {
  const { comet, got, hear } = alone()
  await settle()
  net.down = true
  net.cut()
  comet.send('hi')
  await pass(60e3, 1e3)
  net.down = false
  hear('online')
  await settle()
  assert.deepEqual(got, ['hi'])
})

test('send takes what JSON can say, when it is said', async () => {
  const { comet, got } = alone({ via: ['sse'] })
  await settle()
  for (const data of [undefined, () => 1]) await assert.rejects(comet.send(data), /JSON/)
  await assert.rejects(comet.send(1n), TypeError)
  const data = { text: 'before' }
  comet.send(data)
  data.text = 'after'
  for (const data of ['', 0, null, false]) comet.send(data)
  await settle()
  assert.deepEqual(got, [{ text: 'before' }, '', 0, null, false])
  const { comet: two } = alone({ via: ['sse'] }, '/rooms/a,b')
  const which = two.send('x')
  await settle()
  await assert.rejects(which, /several rooms/)
  const sent = two.send('x', { room: 'b' })
  await settle()
  assert.equal(await sent, relay.mark)
  assert.equal(relay.log.at(-1).room, 'b')
})

test('close() gives back what was not sent', async () => {
  const { comet, undelivered } = alone()
  net.down = true
  const sent = [comet.send('a'), comet.send('b')]
  await pass(5e3)
  comet.close()
  for (const s of sent) await assert.rejects(s, /closed/)
  assert.deepEqual(undelivered.map(u => u.data), ['a', 'b'])
})

test('what was in flight when it was closed is given back once', async () => {
  const { comet, undelivered } = alone({ via: ['sse'] })
  await settle()
  net.answers.push({ status: 400, error: 'no' })
  const sent = comet.send('a')
  comet.close()
  await assert.rejects(sent, /closed/)
  await settle()
  assert.equal(undelivered.length, 1)
})

test('a message that waited goes as soon as the connection is back', async () => {
  const { comet, got } = alone({ via: ['sse'], after: relay.mark })
  await settle()
  net.down = true
  net.cut()
  mock.method(Math, 'random', () => 0.999)
  await pass(40e3, 1e3)
  comet.send('hi')
  await pass(40e3, 1e3)
  net.down = false
  while (comet.status !== 'open') await pass(100, 100)
  await settle()
  assert.deepEqual(got, ['hi'])
  Math.random.mock.restore()
})

test('a message in flight by a WebSocket that is replaced is not lost and not doubled', async () => {
  const { comet, got } = alone()
  await settle()
  net.only.mute = true
  const sent = comet.send('hi')
  comet.use('sse')
  await settle()
  assert.equal(await sent, relay.mark)
  assert.deepEqual(got, ['hi'])
})

for (const via of ['ws', 'sse']) {
  test(`send with if, by ${via}: rejects with the newest id when there is a newer message, and is not tried again`, async () => {
    const { comet, got } = alone({ via: [via], after: relay.mark })
    await settle()
    const first = comet.send(1, { if: 0 })
    await settle()
    const id = await first
    const stale = comet.send('stale', { if: 0 }), next = comet.send('next')
    await settle()
    await assert.rejects(stale, { name: 'CometError', status: 412, id, final: true, message: 'there is a newer message' })
    await next
    assert.deepEqual(got, [1, 'next'])
    assert.equal(await comet.send(2, { if: relay.mark, key: 'k' }), relay.mark)
    assert.equal(await comet.send(2, { if: id, key: 'k' }), relay.mark, 'it was published already')
    await settle()
    assert.deepEqual(got, [1, 'next', 2])
  })

  test(`a counter that two increment by ${via} counts every time`, async () => {
    const increment = async ({ comet, state }) => {
      for (; ;) try { return await comet.send(state.n + 1, { if: state.id }) } catch (error) {
        if (error.status !== 412) throw error
        while (state.id < error.id) await settle(5)
      }
    }
    const both = [0, 0].map(() => {
      const { comet } = alone({ via: [via], after: relay.mark }), state = { id: 0, n: 0 }
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

test('typing is told once in a while; a state is told again after reconnecting', async () => {
  const { comet } = alone({ user: 'ada' })
  comet.presence('away')
  await settle()
  const said = net.only.said
  const states = () => said.map(f => JSON.parse(f)).filter(f => f.type === 'presence').map(f => f.data)
  assert.deepEqual(states(), ['away'])
  for (const _ of upTo(60)) { comet.typing(); await pass(100, 100) }
  assert.deepEqual(states(), ['away', 'typing', 'typing', 'typing'])
  await comet.send('x')
  comet.typing()
  assert.equal(states().length, 5)
  net.cut()
  comet.typing()
  await pass(2e3)
  assert.deepEqual(net.only.said, ['{"type":"presence","room":"lobby","data":"away"}'])
  comet.use('sse')
  await settle()
  comet.presence('online')
  await settle()
  assert.equal(net.count('POST presence'), 1)
})

// The page's life.

test('a connection that says nothing for twice the beat is dead', async () => {
  for (const [name, beat, before, after] of [['ws', 15, 34e3, 8e3], ['sse', 2, 8e3, 8e3], ['stream', 15, 34e3, 8e3]]) {
    relay.beat = beat
    const { comet, statuses } = alone({ via: [name] })
    await settle()
    net.only.silent = true
    await pass(before, 500)
    assert.equal(statuses.length, 2)
    await pass(after, 500)
    assert.match(statuses[2].error.message, /nothing came/)
    assert.equal(comet.status, 'open')
    comet.close()
    await settle()
  }
})

test('a heartbeat is a sign of life', async () => {
  const { statuses } = alone()
  await settle()
  for (const _ of upTo(20)) {
    net.only.say({ type: 'beat' })
    await pass(14e3, 1e3)
  }
  assert.equal(statuses.length, 2)
})

test('a hidden page has no timers, and looks when it is seen again', async () => {
  const { comet, got, hear } = alone()
  await settle()
  document.hidden = true
  hear('visibilitychange')
  await pass(6e3)
  const timers = mock.method(globalThis, 'setTimeout')
  net.only.silent = true
  relay.publish('unheard')
  await pass(600e3, 10e3)
  assert.equal(timers.mock.callCount(), 0)
  timers.mock.restore()
  document.hidden = false
  hear('visibilitychange')
  await settle()
  assert.equal(comet.status, 'open')
  assert.deepEqual(got, ['unheard'])
})

test('it wakes at once: the network is back, the page is seen, the machine slept', async () => {
  const { comet, hear, statuses } = alone()
  await settle()
  const asleep = async () => {
    net.down = true
    net.cut()
    await pass(60e3, 1e3)
    net.down = false
    assert.equal(comet.status, 'reconnecting')
  }
  await asleep()
  hear('online')
  await settle()
  assert.equal(comet.status, 'open')
  await asleep()
  hear('visibilitychange')
  await settle()
  assert.equal(comet.status, 'open')
  const luck = mock.method(Math, 'random', () => 0.999) // it has just begun to wait for half a minute
  net.down = true
  net.cut()
  while (!(statuses.at(-1).retryIn > 29e3)) await pass(100, 100)
  net.down = false
  const { now } = Date
  const clock = mock.method(Date, 'now', () => now() + 3600e3)
  await pass(5e3)
  assert.equal(comet.status, 'open')
  clock.mock.restore()
  luck.mock.restore()
  navigator.onLine = false
  net.down = true
  net.cut()
  await pass(2e3)
  assert.equal(statuses.at(-1).status, 'offline')
})

test('when the browser says that the network is gone, and it is, that is said at once', async () => {
  for (const via of ['ws', 'sse', 'stream', 'longpoll']) for (const how of ['refused', 'silent']) {
    const { comet, statuses, hear } = alone({ via: [via] })
    await settle()
    if (how === 'refused') net.down = true
    else net.held.add('poll')
    navigator.onLine = false
    hear('offline')
    await pass(how === 'refused' ? 0 : 4e3)
    assert.equal(statuses.at(-1).status, 'offline', via + how)
    assert.match(statuses.at(-1).error.message, /network is gone/)
    net.down = false
    net.held.clear()
    navigator.onLine = true
    hear('online')
    await settle()
    assert.equal(comet.status, 'open')
    comet.close()
    await settle()
  }
})

test('when the browser is wrong about that, as with a relay on the same machine, the connection stays', async () => {
  for (const refusal of [undefined, { status: 429, error: 'slowly' }]) {
    const { comet, statuses, hear } = alone({ via: ['ws'] })
    await settle()
    const { only } = net
    navigator.onLine = false
    net.refusal = refusal
    hear('offline')
    await pass(10e3, 500)
    assert.equal(net.only, only)
    assert.equal(comet.status, 'open')
    assert.deepEqual(statuses.map(s => s.status), ['connecting', 'open'])
    net.refusal = undefined
    navigator.onLine = true
    comet.close()
    await settle()
  }
  const { hear } = alone() // that is not connected yet
  hear('offline')
  await settle()
})

test('when the network comes back the connection is replaced before it is missed', async () => {
  const { hear, got, statuses } = alone()
  await settle()
  const old = net.only
  old.silent = true
  relay.publish('unheard')
  hear('online')
  await settle()
  assert.notEqual(net.only, old)
  assert.deepEqual(got, ['unheard'])
  assert(statuses.slice(1).every(s => s.status === 'open'))
})

test('the page goes: connection closed, goodbye said; from the back/forward cache it goes on by the cursor', async () => {
  const { comet, got, hear } = open({ user: 'ada' }, '/rooms/a,b')
  await settle()
  relay.publish(1, { room: 'a' })
  await settle()
  hear('pagehide', { persisted: true })
  await settle()
  assert.equal(net.open.size + locks.held.size + channels.size, 0)
  assert.deepEqual(beacons, ['/rooms/a/presence offline', '/rooms/b/presence offline'])
  relay.publish(2, { room: 'b' })
  await pass(60e3, 10e3)
  hear('pageshow', { persisted: true })
  relay.publish(3, { room: 'a' })
  await settle()
  assert.equal(comet.status, 'open')
  assert.deepEqual(got, [1, 2, 3])
})

test('who polls asks at once when seen', async () => {
  const { got, hear } = alone({ via: ['poll'] })
  await settle()
  document.hidden = true
  await pass(6e3)
  relay.publish('hi')
  await pass(10e3)
  assert.deepEqual(got, [])
  document.hidden = false
  hear('visibilitychange')
  await settle()
  assert.deepEqual(got, ['hi'])
})

test('waking while a technique is tried tries it once; a page that is shown first starts nothing', async () => {
  net.held.add('ws')
  const { hear } = alone({ via: ['ws', 'sse'] })
  await settle()
  for (const type of ['online', 'visibilitychange', 'pageshow', 'online']) hear(type)
  await settle()
  assert.equal(net.sockets, 1)
  assert.equal(net.asked.length, 1)
})

test('who has no name says no goodbye', async () => {
  const { hear } = alone()
  await settle()
  hear('pagehide')
  assert.deepEqual(beacons, [])
})

// Sharing.

test('ten tabs are one connection, and are all told', async () => {
  for (const _ of upTo(10)) await opened()
  assert.equal(net.only.via, 'ws')
  assert.equal(tabs.filter(t => t.comet.leader).length, 1)
  relay.publish('hi')
  await settle()
  for (const { comet, got, statuses } of tabs) {
    assert.deepEqual(got, ['hi'])
    assert.equal(comet.status, 'open')
    assert.equal(comet.via, 'ws')
    assert.equal(comet.cursor, relay.mark)
    assert.equal(statuses.at(-1).leader, comet.leader)
  }
  const sent = tabs[7].comet.send('from a follower')
  await settle()
  assert.equal(await sent, relay.mark)
  assert.deepEqual(tabs[3].got, ['hi', 'from a follower'])
})

test('ten tabs that open at once are one connection', async () => {
  for (const _ of upTo(10)) open()
  await settle(100)
  assert.equal(net.open.size, 1)
  assert(tabs.every(t => t.comet.status === 'open'))
})

test('a tab may be closed at any moment', async () => {
  await opened({ user: 'ada' })
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
  await opened({ user: 'ada' })
  await opened({ user: 'bob' })
  await opened({ token: 't' })
  await opened({}, '/rooms/b')
  assert.equal(net.open.size, 4)
})

test('a tab that comes late gets the history it asked for, and who is here, and then what the leader tells', async () => {
  relay.batch = 4
  for (const i of upTo(30)) relay.publish(i)
  await opened({ user: 'ada' })
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

test('a tab that comes late hears the leader only when it has caught up', async () => {
  for (const i of upTo(30)) relay.publish(i)
  await opened({ user: 'ada' })
  net.blocked.add('poll')
  const late = open({ user: 'ada', last: 10 })
  await settle()
  for (const i of upTo(35, 31)) relay.publish(i)
  await settle()
  assert.deepEqual(late.got, [])
  net.blocked.clear()
  await pass(10e3)
  assert.deepEqual(late.got, upTo(35, 26))
  const asked = net.asked.filter(a => a.startsWith('GET poll'))
  assert(asked.every(a => !/user=/.test(a) && /presence=1/.test(a)), 'it looks, but is not seen')
})

test('what happens between the answer and its arrival is not lost; in a busy room it is not asked without end', async () => {
  await opened()
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
  assert(net.count('GET poll') <= 2, `${net.count('GET poll')} questions`)
})

test('a follower that is closed by what it hears hears no more', async () => {
  for (const i of upTo(9)) relay.publish(i)
  await opened({ user: 'ada' })
  const late = open({ user: 'ada', last: 9 })
  late.comet.addEventListener('message', () => late.comet.close())
  await settle(100)
  assert.deepEqual(late.got, [1])
  assert.equal(late.events.length, 1)
})

test('when the leader closes another leads from its own cursor: nothing lost, nothing twice', async () => {
  for (const _ of upTo(4)) open({ after: relay.mark })
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
  await opened()
  const tab = await opened()
  tab.comet.use('sse')
  await settle()
  assert.equal(net.only.via, 'sse')
  assert.deepEqual(tabs.map(t => t.comet.via), ['sse', 'sse'])
  tabs[0].comet.close()
  await settle(100)
  assert.equal(net.only.via, 'sse', 'also when another leads')
})

test('goodbye is said by the last tab only', async () => {
  for (const _ of upTo(3)) await opened({ user: 'ada' })
  tabs[2].hear('pagehide')
  await settle(100)
  tabs[0].hear('pagehide')
  await settle(100)
  assert.deepEqual(beacons, [])
  assert(tabs[1].comet.leader)
  tabs[1].hear('pagehide')
  assert.deepEqual(beacons, ['/rooms/lobby/presence offline'])
})

test('tabs that share a connection are one client, whichever leads and says goodbye', async () => {
  const one = await opened({ user: 'ada' }), two = await opened({ user: 'ada' }), three = await opened({ user: 'ada' })
  const client = clientOf(net.asked.find(a => a.startsWith('GET ws')))
  one.comet.close()
  await settle()
  assert.equal(clientOf(net.asked.findLast(a => a.startsWith('GET ws'))), client)
  two.comet.close()
  await settle()
  three.comet.close()
  assert.deepEqual(goodbyes, [client])
})

test('a new leader knows who else is here', async () => {
  for (const _ of upTo(3)) await opened({ user: 'ada' })
  for (const t of tabs) {
    assert.deepEqual(beacons, [])
    t.hear('pagehide')
    await settle(100)
  }
  assert.equal(beacons.length, 1)
})

test('a leader in the back/forward cache does not lead; it returns as a follower that missed nothing', async () => {
  await opened()
  await opened()
  tabs[0].hear('pagehide', { persisted: true })
  await settle(100)
  assert(tabs[1].comet.leader)
  for (const i of upTo(5)) relay.publish(i)
  tabs[0].hear('pageshow', { persisted: true })
  await settle(100)
  relay.publish(6)
  await settle(100)
  assert(!tabs[0].comet.leader)
  assert.deepEqual(tabs[0].got, upTo(6))
  assert.deepEqual(tabs[1].got, upTo(6))
})

test('a frozen leader is asked, and then its lock is taken; thawed, it follows', async () => {
  const old = await opened()
  const tab = await opened()
  const { channel } = old
  channel.frozen = true
  net.only.silent = true
  relay.publish(1)
  await pass(35e3, 1e3)
  assert(!tab.comet.leader)
  await pass(15e3, 1e3)
  assert(tab.comet.leader)
  assert.deepEqual(tab.got, [1])
  await settle(100)
  relay.publish(2)
  await settle(100)
  assert(!old.comet.leader)
  assert.deepEqual(old.got, [1, 2])
  assert.equal(net.open.size, 1)
})

test('a hidden leader does not look whether its connection is dead, so who is seen asks', async () => {
  const leader = await opened()
  const tab = await opened()
  document.hidden = true
  await pass(6e3)
  document.hidden = false
  tab.hear('visibilitychange') // the other tab stays hidden, and has no timer
  net.only.silent = true
  relay.publish(1)
  await pass(80e3, 1e3)
  assert.deepEqual(tab.got, [1])
  assert(leader.comet.leader)
  net.only.silent = true
  relay.publish(2)
  document.hidden = true
  await pass(60e3, 1e3)
  document.hidden = false
  tab.hear('visibilitychange')
  await pass(2e3)
  assert.deepEqual(tab.got, [1, 2], 'at once when it is seen')
})

test('the network coming back wakes hidden pages too', async () => {
  const { comet, hear } = alone()
  await settle()
  document.hidden = true
  net.down = true
  net.cut()
  await pass(60e3, 1e3)
  net.down = false
  hear('online')
  await settle()
  assert.equal(comet.status, 'open')
})

test('a leader that is only quiet keeps its lock', async () => {
  await opened()
  await opened()
  for (const _ of upTo(30)) {
    net.only.say({ type: 'beat' })
    await pass(10e3, 1e3)
  }
  assert(tabs[0].comet.leader)
  assert.equal(tabs[1].statuses.filter(s => s.status === 'open').length, 1, 'and what all know is not said again')
})

test('a follower that did not hear asks for what it missed', async () => {
  await opened()
  const tab = await opened()
  tab.channel.frozen = true
  for (const i of upTo(5)) relay.publish(i)
  await settle()
  tab.channel.frozen = false
  assert.deepEqual(tab.got, [])
  relay.publish(6)
  await settle()
  assert.deepEqual(tab.got, upTo(6))
})

test('a follower whose question fails asks again, and tells all in order', async () => {
  await opened()
  net.blocked.add('poll')
  const tab = open({ after: relay.mark })
  for (const i of upTo(5)) { relay.publish(i); await settle() }
  assert.deepEqual(tab.got, [])
  net.blocked.clear()
  await pass(10e3)
  relay.publish(6)
  await settle()
  assert.deepEqual(tab.got, upTo(6))
})

test('when the ids of the relay went back followers go with the leader', async () => {
  relay.mark = 8000
  await opened()
  await opened()
  relay.publish('before')
  await settle()
  relay = new Relay
  relay.publish('after')
  net.cut()
  await pass(3e3)
  for (const t of tabs) {
    assert.deepEqual(t.got, ['before', 'after'])
    assert.equal(t.comet.cursor, 1001)
  }
})

test('without locks, or where they do not work, each tab has its own connection', async () => {
  navigator.locks = undefined
  await opened()
  navigator.locks = { request: async () => { throw new DOMException('not here', 'SecurityError') } }
  await opened()
  globalThis.BroadcastChannel = undefined
  navigator.locks = locks
  await opened()
  assert.equal(net.open.size, 3)
  assert(tabs.every(t => t.comet.leader && t.comet.status === 'open'))
})

// All at once.

for (const round of upTo(5)) {
  test(`nothing is lost, doubled or out of order, whatever happens (${round})`, async () => {
    const all = ['ws', 'sse', 'stream', 'longpoll', 'poll', 'multipart']
    const start = () => Object.assign(open({ after: relay.mark, every: 2 }), { from: n + 1 })
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
      if (luck === 8) net.held.size ? net.held.clear() : net.held.add(all[random(6)])
      if (luck === 9) tab.hear(['online', 'visibilitychange'][random(2)])
      if (luck === 10) { tab.hear('pagehide', { persisted: true }); await settle(random(9)); tab.hear('pageshow', { persisted: true }) }
      for (let k = random(3); k--;) relay.publish(++n)
      await settle(random(12))
      if (random(3) === 0) await pass(random(5) * 500, 500)
      const open = tabs.filter(t => t.comet.leader).length
      assert(open <= 1, `${open} leaders`)
    }
    net.down = false
    net.blocked.clear()
    net.held.clear()
    await pass(90e3, 1e3)
    relay.publish(++n)
    await pass(30e3, 1e3)
    for (const t of tabs) {
      if (t.closed) assert.deepEqual(t.got, upTo(t.from + t.got.length - 1, t.from))
      else assert.deepEqual(t.got, upTo(n, t.from))
    }
  })
}
