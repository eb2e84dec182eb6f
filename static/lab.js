// The lab: all techniques subscribe to one room. Each event is checked on arrival, and its cost is measured. A Subscriber is
// one technique at work: its cursor, its counters and its card. Its connections are opened by techniques.js.

import { goCode, jsCode, load } from './code.js'
import { Comet } from './comet.js'
import { $, access, addCopyButton, capitalized, curl, descriptions, here, insertMarkup, make, names, offerToken, onVisibility, quoteForShell, setText, sleep, years } from './page.js'
import { address, cookies, headOf, http, interval, pageQuery, pattern, request, room, runId, size, techniques, unique } from './techniques.js'

insertMarkup()
const now = () => performance.timeOrigin + performance.now()
const number = (n, digits = 0) => n.toLocaleString('en', { maximumFractionDigits: digits, minimumFractionDigits: digits })
const duration = ms => ms < 9.95 ? `${number(Math.max(0, ms), 1)} ms` : ms < 1e3 ? `${number(ms)} ms` : `${number(ms / 1e3, 1)} s`
const counts = list => list.map(([n, what]) => `${n} ${what}`).join(', ')

function append(list, item, most) {
  list.push(item)
  if (list.length > most) list.shift()
}

let subscribers = []
let rights // what the token allows here
let heartbeat = 15e3 // ms; a stream is never silent for longer
const ids = new Map // of the last events that this page published, by number
const remembered = 5000 // events, among which a duplicate is recognized
let erasedTo = -1 // the room was erased up to this id
const canArrive = n => !(ids.get(n) <= erasedTo)
const suspendedState = 'suspended until this page is visible'

const columns = [['Delivered'], ['Check'], ['Requests', 'per event'], ['Bytes', 'per event'], ['Median', 'delay'], ['95th', 'percentile']]

class Subscriber {
  constructor(technique, cursor) {
    Object.assign(this, technique, { cursor, title: capitalized(names[technique.name]), state: 'not started', generation: 0, failures: 0 })
    Object.assign(this, { requestSpans: [], arrivals: [], log: [], lastExchange: {}, api: technique.apis && 'xhr' })
    this.build()
    this.reset()
  }

  reset() {
    Object.assign(this, { requests: 0, up: 0, down: 0, delivered: 0, doubled: 0, disorder: 0, gaps: 0, base: published, highest: published, seen: new Set, missing: new Set, delays: [], firstByte: undefined })
  }

  get lost() { return [...this.missing].filter(canArrive).length }
  get pending() { return [...ids.keys()].filter(n => n > this.highest && canArrive(n)).length }
  get isRead() { return !this.cookies && !this.socket } // by a script, byte by byte
  get rawNote() {
    const body = this.isRead ? 'As the script reads it.' : this.page ? 'As the browser parsed it.' : 'Reconstructed from the event.'
    return body + (this.cookies ? ' The head is from a HEAD request.' : '')
  }

  get needsSlot() { return !this.short && !this.socket && (this.cookies || this.api === 'xhr' || cookies.mode !== 'omit') }

  // Connecting.

  start() {
    this.wanted = true
    this.connect()
  }

  stop(state = 'paused') {
    clearTimeout(this.timer)
    this.generation++
    this.close?.()
    this.close = undefined
    this.picture?.close()
    this.disconnected(state)
    releaseSlot(this)
  }

  pause() {
    this.wanted = false
    this.stop()
  }

  cut() {
    if (!this.wanted) return
    this.stop('cut')
    this.timer = setTimeout(() => this.connect(), 1500)
  }

  connect() {
    if (suspended) return this.state = suspendedState
    if (!this.needsSlot) return this.begin()
    this.state = 'waits its turn'
    requestSlot(this)
  }

  begin() {
    const generation = ++this.generation
    const link = new Proxy(this, { // ignores what an old connection still calls
      get: (_, name) => typeof this[name] !== 'function' ? this[name] : (...args) => generation === this.generation && this[name](...args),
    })
    this.state = 'connecting'
    this.requestAt = now()
    this.picture?.open()
    try { this.close = this.open(link) } catch (error) { this.onError(error) }
  }

  disconnected(state) {
    this.onComplete()
    this.state = state
    this.caughtUpAt = this.shown = undefined
  }

  /** Some connections fail silently. */
  checkHeartbeat() {
    if (this.state === 'open' && !this.short && now() - this.activeAt > Math.max(heartbeat, this.wait || 0) * 1.2 + 2000) this.onError(new Error('no heartbeat'))
  }

  // What a technique calls: see techniques.js.

  /** A page shows texts without ids; their ids are known from publishing. */
  url(query) {
    this.cursor = Math.max(this.cursor, this.page && ids.get(this.last) || 0)
    return address(this.name, { after: this.cursor, ...query, _: unique() })
  }

  frame(src, hidden) {
    const frame = make('iframe', { title: this.title, src, hidden })
    ;(hidden ? document.body : $('.shown', this.card)).append(frame)
    return frame
  }

  onRequest(url, more = '', at = now()) {
    this.requests++
    this.requestAt = at
    this.onComplete()
    append(this.requestSpans, { from: at }, 100)
    const head = `GET ${url} HTTP/1.1\nHost: ${location.host}\nUser-Agent: ${navigator.userAgent}\n${more}`
    this.up += size(head) + head.split('\n').length // a line ends in two bytes
    this.requestHead = head
    if (this.caughtUpAt === undefined) this.note(`request with the cursor …${String(this.cursor).slice(-6)}`)
  }

  onOpen(head = this.head) {
    const at = this.activeAt = now()
    this.firstByte ??= at - this.requestAt
    this.caughtUpAt ??= at
    this.state = 'open'
    this.failures = 0
    this.lastExchange = { request: this.requestHead, head, body: '' }
    this.down += size(head) + head.split('\n').length
  }

  onBody(body, bytes = size(body)) {
    this.onActivity()
    this.lastExchange.body = body
    this.down += bytes
  }

  onActivity() { this.activeAt = now() }

  onBatch({ cursor, events }) {
    for (const event of events) this.onEvent(event)
    this.cursor = cursor
  }

  onEvent({ type, id, data }) {
    if (type === 'hello') heartbeat = data.beat * 1e3
    if (type === 'bye') return this.onError(Object.assign(new Error('the relay said bye'), { retry: data.retry }))
    if (id) this.cursor = id
    if (type === 'message') this.check(String(data))
    if (type !== 'gap') return
    if (data.reason === 'erased') erasedTo = Math.max(erasedTo, id)
    else this.gaps++
    this.note(data.reason === 'erased' ? 'gap: the room was erased' : 'gap: some events are no longer in the history')
  }

  onTexts(texts) {
    const shown = this.short && this.shown // a page that refreshes itself repeats what it showed before
    this.shown = new Set(texts)
    for (const text of texts) if (!shown?.has(text)) this.check(text)
  }

  onComplete() {
    const last = this.requestSpans.at(-1)
    if (last) last.to ??= now()
  }

  onReconnect() { this.disconnected('reconnecting') }

  onError(error) {
    this.stop('disconnected')
    this.note(error.message)
    this.timer = setTimeout(() => this.connect(), error.retry || Math.min(8000, 500 * 2 ** this.failures++) * (0.5 + Math.random()))
  }

  /** Checks whether an event is new, a duplicate, or out of order, and which were skipped. */
  check(text) {
    const [, from, digits, sentAt] = pattern.exec(text) || [], n = +digits, at = now()
    if (from !== runId) { // published by somebody else, who gave it no number
      append(this.arrivals, at, 500)
      return this.note(text.slice(0, 80))
    }
    this.last = n
    if (n <= this.base) return
    if (this.seen.has(n) || n <= this.highest - remembered) return void this.doubled++
    if (n < this.highest) this.disorder++
    for (let skipped = Math.max(this.highest, n - remembered) + 1; skipped < n; skipped++) this.missing.add(skipped)
    this.missing.delete(n)
    this.seen.add(n)
    this.seen.delete(n - remembered)
    this.highest = Math.max(this.highest, n)
    this.delivered++
    append(this.arrivals, at, 500)
    const live = sentAt >= this.caughtUpAt, delay = at - sentAt
    if (live) append(this.delays, delay, 1000)
    this.note(`#${n}`, (live ? '' : 'caught up, ') + duration(delay))
  }

  note(text, more = '') {
    this.log = [[text, more], ...this.log].slice(0, 5)
    this.noted = true
  }

  // Display.

  build() {
    const card = this.card = $('#card').content.cloneNode(true).firstElementChild
    card.id = this.name
    const texts = { h3: this.title, '.year': years[this.name], '.description': capitalized(descriptions[this.name]) + '.', '.rawnote': this.rawNote }
    for (const selector in texts) $(selector, card).textContent = texts[selector]
    $('.code', card).ontoggle = () => this.showCode()
    $('.cut', card).onclick = () => this.cut()
    $('.halt', card).onclick = () => { this.wanted ? this.pause() : this.start(); show() }
    if (this.apis) {
      this.select = make('select', { onchange: () => { this.api = this.select.value; this.reconnect() } })
      for (const api in this.apis) this.select.add(new Option(this.apis[api], api))
      $('.description', card).after(make('label', '', 'with ', this.select))
    }
    if (this.picture) this.picture = new Picture(card)
    $('#cards').append(card)

    const cells = columns.map(([title, more = '']) => {
      const cell = make('td')
      cell.dataset.label = `${title} ${more}`
      return cell
    })
    this.row = make('tr', '', make('th', '', make('a', { href: '#' + this.name }, this.title)), make('td', 'timeline', make('canvas', { ariaHidden: true })), ...cells)
    this.row.dataset.technique = this.name
    $('#board tbody').append(this.row)
  }

  reconnect() {
    if (!this.wanted) return
    this.stop()
    this.connect()
  }

  showCode() {
    const details = $('.code', this.card)
    if (!details.open) return
    details.scrollIntoView({ block: 'nearest' }) // an open card takes a row of its own
    for (const [i, [file, extract]] of [['transports.go', goCode], ['source/comet.js', jsCode]].entries()) {
      const part = details.querySelectorAll('section')[i], pre = $('pre', part), why = $('.why', part)
      if (pre.textContent) continue
      why.textContent = 'Loading …'
      load(file).then(source => {
        const code = extract(source, this.name)
        why.textContent = code ? '' : 'No function: the browser loads this page without a script.'
        pre.hidden = !code
        pre.ariaLabel = `${this.title} in ${file}`
        pre.firstChild.textContent = code
      }).catch(error => why.textContent = `It could not be shown: ${error.message}.`)
    }
  }

  show() {
    const { name, card, row, state, wanted, delivered, lost, doubled, disorder, pending, gaps } = this
    const waits = state === 'connecting' ? now() - this.requestAt : 0
    card.dataset.state = row.dataset.state = state
    setText($('.lamp', card), waits > 1000 ? `waits for a connection, ${duration(waits)}` : state === 'open' && this.short ? `a request every ${interval()} s` : state)
    setText($('.halt', card), wanted ? 'Pause' : 'Start')
    $('.cut', card).disabled = !wanted

    const checks = [[lost, 'lost'], [doubled, 'doubled'], [disorder, 'out of order']], wrong = checks.filter(([n]) => n)
    card.dataset.wrong = row.dataset.wrong = wrong.length > 0
    Object.assign(card.dataset, { delivered, lost, doubled, disorder })
    const more = [[pending, 'still to come'], [gaps, 'gaps reported']].filter(([n]) => n)
    setText($('.check', card), counts([[published - this.base, 'published'], [delivered, 'delivered'], ...checks, ...more]))

    // The costs as the page sees them, and as the relay counts them.
    const relay = counters?.[name], before = baseCounters?.[name]
    const counted = name => relay?.[name] - before?.[name]
    const perEvent = (n, digits) => delivered && n >= 0 ? number(n / delivered, digits) : '–'
    const down = counted('sent_bytes_total'), up = counted('received_bytes_total')
    const costs = {
      requests: [perEvent(this.requests, 2), perEvent(counted('requests_total'), 2)],
      down: [(this.isRead ? '' : '≈ ') + perEvent(this.down), perEvent(down)],
      up: ['≥ ' + perEvent(this.up), perEvent(up)],
      held: [this.requestSpans.length && !this.requestSpans.at(-1).to ? 1 : 0, relay?.connections ?? '–'],
    }
    for (const cost in costs) costs[cost].forEach((text, i) => setText($(`[data-cost=${cost}]`, card).cells[i + 1], String(text)))

    const delays = this.delays.toSorted((a, b) => a - b)
    const quantile = share => delays.length ? duration(delays[Math.ceil(share * delays.length) - 1]) : '–'
    const cells = [
      String(delivered),
      counts(wrong) || (pending ? `${pending} to come` : delivered ? 'all, once, in order' : '–'),
      costs.requests[down >= 0 ? 1 : 0],
      (down >= 0 ? perEvent(down + up) : '≥ ' + perEvent(this.up + this.down)) + (this.picture ? ' *' : ''),
      quantile(0.5),
      quantile(0.95),
    ]
    cells.forEach((text, i) => setText(row.cells[i + 2], text))

    if (this.noted) $('.events', card).replaceChildren(...this.log.map(([text, more]) => make('li', '', text, make('small', '', more))))
    this.noted = false
    if (!$('.bytes', card).open) return
    const { request = this.requestHead ?? '', head = '', body = '' } = this.lastExchange
    setText($('.out', card), request + '(and what the browser adds: Accept, cookies …)')
    setText($('.in', card), `${head}\n${body.slice(0, 4000)}`)
  }
}

/** Server push as it was meant: a page whose parts replace each other or, in browsers without that, a picture. */
class Picture {
  constructor(card) {
    this.card = card
  }

  open() { requestSlot(this) }

  close() {
    if (this.frame) this.frame.src = '' // the browser goes on loading an image that is only removed
    this.frame?.remove()
    this.frame = undefined
    releaseSlot(this)
  }

  stop() {
    this.close()
    this.open()
  }

  /** Shows a frame, and returns it after a moment, if it is still shown. */
  async show(tag, properties, query, ms) {
    const frame = this.frame = make(tag, { ...properties, src: address('multipart', { ...query, _: unique() }) })
    $('.shown', this.card).replaceChildren(frame)
    await sleep(ms)
    return this.frame === frame && frame
  }

  async begin() {
    const caption = $('.shownas', this.card)
    if (Picture.pages !== false) {
      setText(caption, 'Testing whether this browser shows it …')
      const frame = await this.show('iframe', { title: 'The room, pushed as a page' }, { as: 'html', last: 6, form: 0 }, 2000)
      if (!frame) return
      Picture.pages = !!frame.contentDocument?.querySelector('main')
      if (Picture.pages) return caption.textContent = 'This browser shows it for whole pages.'
    }
    const image = await this.show('img', { alt: 'The room, pushed as a picture', width: 480, height: 150 }, { as: 'svg', w: 480, h: 150 }, 1500)
    if (image) caption.textContent = image.naturalWidth ? 'This browser shows it for pictures, but not for pages.' : 'This browser shows it neither for pages nor for pictures, or they wait for a connection.'
  }
}

// Connection slots. Over HTTP/1.1 a browser opens about six connections to a host, for all its tabs; further requests wait.
// So the lab finds the limit, leaves one for short requests, and lets techniques take turns where the rest is too few.
// Who gave up a slot resumes from the cursor, so nothing is lost.

const slotTime = 6000 // ms
const slots = { limit: 1, users: new Map, queue: [], trial: undefined }

function requestSlot(user) {
  releaseSlot(user)
  slots.queue.push(user)
  assignSlots()
}

function releaseSlot(user) {
  slots.users.delete(user)
  slots.queue = slots.queue.filter(other => other !== user)
}

function assignSlots() {
  const { users } = slots
  while (slots.queue.length && users.size < slots.limit) {
    const user = slots.queue.shift()
    users.set(user, now())
    user.begin()
  }
  const [oldest, since] = users.entries().next().value ?? []
  if (!slots.queue.length || !(now() - since > slotTime)) return
  oldest.stop('waits its turn')
  if (oldest instanceof Subscriber) oldest.connect() // to the end of the queue
}

/** Sends eight requests that take a second. Those answered after one second were sent at once; the rest had to wait. */
async function findConnectionLimit() {
  const tries = 8, begun = now(), { signal } = slots.trial = new AbortController
  let answered = 0, separate = false
  const all = Array.from({ length: tries }, () => request(address('longpoll', { wait: 1, _: unique() }), { credentials: 'same-origin', signal }).then(() => answered++, () => sleep(3000)))
  await sleep(30)
  request(address('poll', { _: unique() }), { signal }).then(response => separate = !rights.required && response.ok && now() - begun < 700, () => { })
  await Promise.race(all)
  await sleep(500) // for late answers on a busy machine; requests that waited are answered a second later
  slots.trial.abort()
  const waited = tries - answered
  cookies.mode = separate ? 'omit' : 'same-origin'
  slots.limit = waited ? Math.max(1, answered - (separate ? 1 : 2)) : Infinity
  for (const subscriber of subscribers) if (subscriber.apis) subscriber.api = subscriber.select.value = waited && separate ? 'fetch' : 'xhr'
  $('#limit').textContent = `${http}: of ${tries} requests at once ` + (!waited ? 'none had to wait.' : `${waited} had to wait.` +
    (separate ? ' Requests without cookies have connections of their own, so fetch omits cookies, and streaming uses fetch.' : '') +
    ` The lab holds at most ${slots.limit}, so that short requests find one free; if that is too few, techniques take turns.`)
}

// Publishing, one event after the other, so that the numbers are in the relay's order.

let published = 0, due = 0, publishing
const sendTimes = []

async function publish(count) {
  due = Math.min(due + count, 5000)
  publishing ??= (async () => {
    for (; due > 0; due--) await publishNext()
    publishing = undefined
  })()
  return publishing
}

async function publishNext() {
  await resetting
  const n = published + 1
  for (let tries = 0; ; tries++) {
    const at = now(), body = `${runId} #${n} ${at.toFixed(1)} `.padEnd($('#bytes').valueAsNumber || 0, 'comet ')
    let wait = Math.min(5000, 250 * 2 ** tries), problem = 'the relay could not be reached'
    try {
      const response = await request(address('', { key: `${runId}-${n}` }), { method: 'POST', body, signal: AbortSignal.timeout(10e3) })
      const { id, error } = await response.json()
      if (response.ok) {
        published = n
        ids.set(n, id)
        ids.delete(n - remembered)
        append(sendTimes, at, 500)
        return $('#refused').textContent = ''
      }
      problem = error
      wait = response.headers.get('Retry-After') * 1e3 || wait
    } catch { }
    $('#refused').textContent = `${problem}; trying again`
    await sleep(wait)
  }
}

// The relay's own counters, by technique and by their names in /metrics.

let counters, baseCounters, countersRefused

async function measure() {
  if (countersRefused) return
  const response = await request(here('metrics')).catch(() => undefined)
  counters = response?.ok ? {} : undefined
  if (response?.ok) for (const [, name, technique, value] of (await response.text()).matchAll(/^cometes_(\w+)\{technique="(\w+)"\} (\d+)$/gm)) (counters[technique] ??= {})[name] = +value
  else if (response) { // the next request would be refused too
    countersRefused = true
    $('#uncounted').textContent = `The relay does not show its own counts to this page (${response.status}).`
  }
}

let resetting

function reset() {
  resetting = measure().then(() => {
    baseCounters = counters
    for (const subscriber of subscribers) subscriber.reset()
  })
  return resetting
}

/** Events sent at even intervals arrive at even intervals, unless something on the way buffers them. */
async function testBuffering() {
  const count = 10, apart = 200 // ms
  for (let i = 0; i < 40 && subscribers.some(s => s.wanted && s.state !== 'open' && (s.state === 'connecting' || !s.delivered)); i++) await sleep(100)
  const streams = subscribers.filter(s => s.wanted && !s.short && !s.wait)
  const open = streams.filter(s => s.state === 'open'), silent = streams.filter(s => s.state === 'connecting')
  const begun = now()
  for (let i = 0; i < count; i++) {
    await publish(1)
    await sleep(apart)
    if (suspended) return
  }
  await sleep(1000)
  const arrivals = s => s.arrivals.filter(at => at > begun)
  const gaps = s => arrivals(s).slice(1).map((at, i) => at - arrivals(s)[i])
  const buffered = open.filter(s => arrivals(s).length < count || gaps(s).filter(gap => gap < apart / 4).length > count / 3)
  const even = open.filter(s => !buffered.includes(s))
  const names = list => list.map(s => s.title).join(', ')
  const result = []
  if (buffered.length) result.push(`Yes: of ${count} events sent ${apart} ms apart, some arrived late or together with ${names(buffered)}.`)
  if (even.length) result.push(buffered.length ? `Not with ${names(even)}:` : even.length === streams.length ? 'No. With all techniques that stream,' : `No. With ${names(even)},`,
    `${count} events sent ${apart} ms apart arrived one by one, at most ${duration(Math.max(...even.flatMap(gaps)))} apart.`)
  if (silent.length) result.push(`No response at all with ${names(silent)}: buffered, or waiting for a connection.`)
  $('#held').dataset.held = !!buffered.length
  $('#held').textContent = result.join(' ') || 'No technique that streams is connected.'
  $('#first').textContent = subscribers.filter(s => s.firstByte >= 0).map(s => `${s.title} ${duration(s.firstByte)}`).join(' · ') || 'no response yet'
}

async function testComet() {
  const comet = new Comet(here(address('')).href, { shared: false })
  const via = await Promise.race([new Promise(open => comet.addEventListener('status', ({ detail }) => detail.status === 'open' && open(detail.via))), sleep(8000)])
  comet.close()
  $('#choice').textContent = via ? `${capitalized(names[via])}, the first in its order that connects.` : 'none: nothing connected in time.'
}

// Six more connections, to show the browser's limit.

let extra = [], extraBegun

function openExtra() {
  extraBegun = now()
  extra = Array.from({ length: 6 }, () => {
    const one = { lamp: make('span', 'lamp'), source: new EventSource(address('sse', { _: unique() })) }
    one.source.onopen = () => one.delay ??= now() - extraBegun
    return one
  })
  $('#extra').replaceChildren('Six more EventSources. Over HTTP/1.1 some wait for a connection, and so do short requests; over HTTP/2 none. ', ...extra.map(one => one.lamp))
}

function showExtra() {
  for (const [i, { lamp, delay }] of extra.entries()) {
    lamp.dataset.state = delay ? 'open' : 'connecting'
    setText(lamp, `${i + 1} ${delay ? `open after ${duration(delay)}` : `waits, ${duration(now() - extraBegun)}`}`)
  }
}

function closeExtra(reason = '') {
  for (const one of extra) one.source.close()
  if (extra.length || !reason) $('#extra').textContent = reason
  extra = []
  $('#more').ariaPressed = false
}

// Experiments: a label, what to look at (*column* is one of the board's), and what happens.

function set(values) {
  for (const id in values) $('#' + id).value = values[id]
  for (const id in values) $('#' + id).onchange?.()
}

const experiments = [
  ['Cut all in the middle of a burst', 'All connections break while 40 events are published; each technique comes back with its cursor. *Check*: nothing is lost, doubled or out of order.', async () => {
    publish(40)
    for (const begun = published; published < begun + 20 && !suspended;) await sleep(50)
    for (const s of subscribers) s.cut()
  }],
  ['Open six more: who waits?', 'Over HTTP/1.1 a browser opens six connections to a host; WebSockets do not count. Below the buttons see which of the six wait; in *Arrivals*, that polling, client pull and JSONP wait, too. “Open six more” closes them.', async () => {
    if (!extra.length) $('#more').click()
    await publish(20)
  }],
  ['Publish one a minute', 'What does waiting cost? *Requests* after a minute: for one event polling asked 30 times, long polling two or three times, a stream not once. “Publish steadily” stops it.', async () => {
    set({ every: 2, rate: 0.0167 })
    await publish(1)
    steadily(true)
  }],
  ['Ask only every ten seconds', 'Events come every second; polling and client pull ask every ten. *Median delay*: theirs is five seconds, long polling is as fast as a stream.', () => {
    set({ every: 10, rate: 1 })
    steadily(true)
  }],
  ['Stay away longer than the history', 'WebSocket and server-sent events pause while 400 events are published; the relay keeps 256. On their cards: the rest is lost, and a gap says so. Client pull loses some, too: its page shows 50.', async () => {
    const away = subscribers.filter(s => s.name === 'ws' || s.name === 'sse')
    for (const s of away) s.pause()
    await publish(400)
    for (const s of away) s.start()
  }],
]

function showExperiments() {
  $('#experiments ol').append(...experiments.map(([label, look, run]) => {
    const state = make('small', { role: 'status' })
    const button = make('button', { type: 'button', disabled: !rights.write }, label)
    button.onclick = async () => {
      button.disabled = true
      state.textContent = ' running…'
      steadily(false)
      set({ bytes: 64 })
      await reset()
      await run()
      state.textContent = ' done: look at the table'
      button.disabled = false
    }
    return make('li', '', button, state, make('p', '', ...look.split('*').map((part, i) => i % 2 ? make('b', '', part) : part)))
  }))
}

// From another origin: the relay's other name, which a browser takes for another site. A way that works returns what to say.

const otherName = { localhost: '127.0.0.1', '127.0.0.1': 'localhost' }[location.hostname]

const ways = [
  ['CORS', 'fetch, and the header Access-Control-Allow-Origin', async url => {
    const response = await fetch(url('poll', { last: 1 }), { cache: 'no-store' })
    return `the answer can be read: ${(await response.text()).slice(0, 60)}…`
  }],
  ['JSONP', 'a script of the other site calls a function of this page', url => new Promise((done, fail) => {
    const callback = 'cross_' + unique(), script = make('script', { src: url('jsonp', { wait: 0, callback }), onerror: fail, onload: fail })
    window[callback] = answer => done(`it was called with the cursor ${answer.cursor}`)
    document.head.append(script)
  })],
  ['<img>', 'a picture that the other site pushes', (url, li) => new Promise((done, fail) => {
    const img = make('img', { alt: 'The room, pushed as a picture', width: 320, height: 100, onload: () => done('the picture is here'), onerror: () => { img.remove(); fail() } })
    img.src = url('multipart', { as: 'svg', w: 320, h: 100 })
    li.append(img)
  })],
]

/** A picture that is only removed is still loaded. */
function closePictures() {
  for (const img of $('#crossed').querySelectorAll('img')) {
    img.src = ''
    img.remove()
  }
}

async function askAsOtherSite() {
  const other = location.origin.replace(location.hostname, otherName)
  const url = (technique, query) => other + address(technique, { ...query, _: unique() })
  closePictures()
  $('#asked').textContent = `asking ${other} …`
  const items = ways.map(([name, what]) => make('li', '', make('b', '', name), ': ' + what, make('p')))
  $('#crossed').replaceChildren(...items)
  const works = await Promise.all(ways.map(([, , ask], i) => ask(url, items[i]).then(text => 'Works: ' + text, () => '').then(works => {
    $('p', items[i]).textContent = works || 'Refused: this page is shown nothing of the answer.'
    return works
  })))
  $('#asked').textContent = works.every(Boolean) ? `${other} lets pages of ${location.origin} read.` :
    rights.required ? `${other} asks for a token; the cookie with it is not sent to another site.` : `${other} does not let pages of ${location.origin} read. Start the relay with -origins ${location.origin}, and it will.`
}

$('#ask').onclick = askAsOtherSite
$('#ask').disabled = !otherName
if (!otherName) $('#asked').textContent = 'To try this, open the page at localhost or 127.0.0.1.'

// A page that is not visible holds no connection, since all tabs share the few that the browser opens.

let suspended = document.hidden
let suspensions = 0

onVisibility(visible => {
  if (suspended !== visible) return
  suspended = !visible
  dispatchEvent(new Event('suspend'))
  const wanted = subscribers.filter(s => s.wanted)
  if (visible) return wanted.forEach(s => s.connect())
  suspensions++
  slots.trial?.abort()
  for (const s of wanted) s.stop(suspendedState)
  closePictures()
  window.stop() // the request of a script goes on when its element is removed
  closeExtra('The six were closed when this page was hidden, so that other tabs can load.')
})

/** Runs a test while the page is visible, again if it was hidden meanwhile. */
async function whileVisible(test) {
  for (let before; before !== suspensions;) {
    while (suspended) await new Promise(done => addEventListener('suspend', done, { once: true }))
    before = suspensions
    await test()
  }
}

// Drawing.

function show() {
  for (const subscriber of subscribers) subscriber.show()
  showExtra()
  $('#published').textContent = published - subscribers[0].base
  $('#halt').textContent = subscribers.some(s => s.wanted) ? 'Pause all' : 'Start all'
}

const timelineLength = 15e3 // ms

function draw(canvas, spans, dots) {
  const { clientWidth: w, clientHeight: h } = canvas, scale = devicePixelRatio, width = Math.round(w * scale)
  if (!w) return
  if (canvas.width !== width) Object.assign(canvas, { width, height: Math.round(h * scale) })
  const pen = canvas.getContext('2d'), end = now(), begin = end - timelineLength, x = at => Math.max(0, w - 4 - (end - at) / timelineLength * w)
  const { color, outlineColor } = getComputedStyle(canvas)
  pen.setTransform(scale, 0, 0, scale, 0, 0)
  pen.clearRect(0, 0, w, h)
  pen.fillStyle = outlineColor
  for (const { from, to = end } of spans) if (to > begin) pen.fillRect(x(from), h / 2 - 1, Math.max(1.5, x(to) - x(from)), 2)
  pen.fillStyle = color
  for (const at of dots) if (at > begin) {
    pen.beginPath()
    pen.arc(x(at), h / 2, 2.75, 0, 7)
    pen.fill()
  }
}

const reducedMotion = matchMedia('(prefers-reduced-motion: reduce)')

function drawAll() {
  draw($('#sent canvas'), [], sendTimes)
  for (const { row, requestSpans, arrivals } of subscribers) draw($('canvas', row), requestSpans, arrivals)
  setTimeout(() => requestAnimationFrame(drawAll), reducedMotion.matches ? 1000 : 40)
}

// The page.

let steadyTimer

/** Publishes at the rate that the form says. */
function steadily(on) {
  clearInterval(steadyTimer)
  $('#steady').ariaPressed = on
  if (on) steadyTimer = setInterval(() => due < 5 && !suspended && publish(1), 1000 / Math.min(50, Math.max(0.01, $('#rate').valueAsNumber || 1)))
}

const isSteady = () => $('#steady').ariaPressed === 'true'
$('#steady').onclick = () => steadily(!isSteady())
$('#rate').onchange = () => steadily(isSteady())
$('#controls').onsubmit = e => { e.preventDefault(); publish(1) }
$('#burst').onclick = () => publish($('#many').valueAsNumber || 1)
$('#cut').onclick = () => subscribers.forEach(s => s.cut())
$('#halt').onclick = () => {
  const stop = subscribers.some(s => s.wanted)
  for (const s of subscribers) stop ? s.pause() : s.start()
  show()
}
$('#more').onclick = e => {
  e.target.ariaPressed = !extra.length
  extra.length ? closeExtra() : openExtra()
}
$('#reset').onclick = reset
$('#every').onchange = () => subscribers.filter(s => s.short).forEach(s => s.reconnect())
$('#again').onclick = async e => {
  e.target.disabled = true
  await whileVisible(testBuffering)
  e.target.disabled = false
}

$('#board thead tr').append(...columns.map(([title, more = '']) => make('th', '', title, make('small', '', more))))

/** Says why the lab can not run, in place of the lab. */
function refuse(reason) {
  $('#trouble').textContent = reason
  $('#all').hidden = true
  for (const dd of document.querySelectorAll('#verdict dd')) dd.textContent = 'not known'
}

async function begin() {
  const rooms = pageQuery.get('room') ?? "'lab-*'"
  const flags = /^[\w.:*'-]+$/.test(rooms) ? `-read ${rooms} -write ${rooms}` : undefined
  rights = await access(room)
  offerToken(rights, rights.read && rights.write, flags)
  if (rights.refused) return refuse('')
  if (!rights.read) return refuse(`Your token does not let this page read the room ${room}. Open the lab with ?room=NAME for another room.`)
  if (rights.required) cookies.mode = 'same-origin' // the token is in a cookie
  const { cursor, error } = await (await request(address('poll'), { credentials: 'same-origin' })).json()
  if (error) return refuse(`The relay does not let this page read the room ${room}: ${error}.`)
  if (!rights.write) {
    $('#trouble').textContent = `Your token lets this page read the room ${room}, but not publish to it.`
    for (const input of document.querySelectorAll('#controls :is(button, input), #again')) input.disabled = true
  }
  subscribers = techniques.map(technique => new Subscriber(technique, cursor))
  // On a phone the board is not laid out as a table, but it is still one.
  for (const [selector, role] of [['thead, tbody', 'rowgroup'], ['tr', 'row'], ['thead th', 'columnheader'], ['tbody th', 'rowheader'], ['td', 'cell']]) {
    for (const element of $('#board').querySelectorAll(selector)) element.role = role
  }
  $('#room').textContent = curl(rights.required, '-d hi ' + quoteForShell(here('rooms/' + encodeURIComponent(room)).href))
  addCopyButton($('#room'))
  showExperiments()
  setInterval(show, 250)
  setInterval(() => { assignSlots(); subscribers.forEach(s => s.checkHeartbeat()) }, 1000)
  drawAll()
  show()
  await Promise.all(subscribers.filter(s => s.cookies).map(async s => { // no script can read the heads of their responses
    s.head = headOf(await request(address(s.name, { callback: 'x', wait: interval() }), { method: 'HEAD', credentials: 'same-origin' }))
  }))
  await whileVisible(findConnectionLimit)
  await whileVisible(testComet)
  await reset()
  setInterval(() => suspended || measure(), 1000)
  for (const s of subscribers) s.start()
  if (rights.write) await whileVisible(testBuffering)
  else for (const id of ['#held', '#first']) $(id).textContent = 'not known: your token does not let this page publish'
  document.body.dataset.ready = ''
}

whileVisible(() => { }).then(begin).catch(error => refuse(`The lab could not start: ${error.message}.`))
