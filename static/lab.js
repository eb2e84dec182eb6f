// The lab: all techniques subscribe to one room. Each event is checked on arrival, and its cost is measured.
//
// techniques.js opens the connections. A Subscriber, below, is one technique at work: its cursor, its counters and its
// card. After it come the connection slots (a browser opens few connections), publishing, the test of the network, and
// drawing.

import { goCode, jsCode, load } from './code.js'
import { access, askForToken, capitalized, copyButton, here, insertMarkup, names, quoteForShell, years } from './page.js'
import { address, cookies, headOf, http, interval, pageQuery, pattern, request, room, run, size, sleep, techniques, unique } from './techniques.js'

const $ = (selector, within = document) => within.querySelector(selector)
insertMarkup()
const now = () => performance.timeOrigin + performance.now()

// One technique at work.

let subscribers = []
let heartbeat = 15e3 // ms; a stream is never silent for longer
const ids = new Map // of the events that this page published, by number
const remembered = 5000 // events; a duplicate is recognized among the last of them
let erasedTo = -1 // the room was erased up to this id: older events will not arrive any more
const erased = n => ids.get(n) <= erasedTo
const suspendedState = 'suspended until this page is visible'
const callbacks = ['onRequest', 'onOpen', 'onBody', 'onEvent', 'onBatch', 'onTexts', 'onActivity', 'onComplete', 'onReconnect', 'onError']

class Subscriber {
  constructor(technique, cursor) {
    Object.assign(this, technique, { title: capitalized(names[technique.name]), cursor, generation: 0, failures: 0, requestSpans: [], arrivals: [], log: [], lastExchange: {} })
    this.state = 'not started'
    this.api = technique.apis && 'xhr'
    this.build()
    this.reset()
  }

  reset() {
    Object.assign(this, { requests: 0, up: 0, down: 0, delivered: 0, doubled: 0, disorder: 0, gaps: 0, base: published, highest: published, seen: new Set, missing: new Set, delays: [], firstByte: undefined })
  }

  get lost() { return [...this.missing].filter(n => !erased(n)).length }
  get pending() {
    let count = 0
    for (let n = this.highest + 1; n <= published; n++) if (!erased(n)) count++
    return count
  }
  get needsSlot() { return !this.short && !this.socket && (this.cookies || this.api === 'xhr' || cookies.mode !== 'omit') }

  // Connecting.

  start() {
    this.wanted = true
    this.connect()
  }

  stop(state = 'paused') {
    clearTimeout(this.timer)
    this.generation++ // callbacks of the old connection are ignored
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

  /** Drops the connection, and reconnects after a moment. */
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
    const generation = ++this.generation, subscriber = this
    const link = { api: this.api, url: query => this.url(query), frame: (url, hide) => this.frame(url, hide), get state() { return subscriber.state }, get cursor() { return subscriber.cursor } }
    for (const name of callbacks) link[name] = (...args) => generation === this.generation && this[name](...args)
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

  /** Some connections fail silently. A stream without a heartbeat has failed. */
  checkHeartbeat() {
    if (this.state === 'open' && !this.short && now() - this.activeAt > Math.max(heartbeat, this.wait || 0) * 1.2 + 2000) this.onError(new Error('no heartbeat'))
  }

  // What a technique uses: see techniques.js.

  /** A page shows texts without ids; their ids are known from publishing. No two URLs are equal, since a browser would send such requests one after the other. */
  url(query) {
    this.cursor = Math.max(this.cursor, this.page && ids.get(this.last) || 0)
    return address(this.name, { after: this.cursor, ...query, _: unique() })
  }

  frame(url, hide) {
    const frame = Object.assign(document.createElement('iframe'), { title: this.title, src: url, hidden: hide })
    if (hide) document.body.append(frame)
    else showIn(this.card, frame)
    return frame
  }

  onRequest(url, more = '', at = now()) {
    this.requests++
    this.requestAt = at
    this.onComplete()
    this.requestSpans.push({ from: at })
    if (this.requestSpans.length > 100) this.requestSpans.shift()
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
    events.forEach(event => this.onEvent(event))
    this.cursor = cursor
  }

  onEvent({ type, id, data }) {
    if (type === 'hello') heartbeat = data.beat * 1e3
    if (type === 'bye') return this.onError(Object.assign(new Error('the relay ended the connection (bye)'), { retry: data.retry }))
    if (id) this.cursor = id
    if (type === 'gap' && data.reason === 'erased') {
      erasedTo = Math.max(erasedTo, id)
      this.note('gap: the room was erased')
    } else if (type === 'gap') {
      this.gaps++
      this.note('gap: some events are no longer in the history')
    }
    if (type === 'message') this.check(String(data))
  }

  onTexts(texts) {
    const shown = this.short ? this.shown || new Set : new Set // a page that refreshes itself repeats what it showed before
    this.shown = new Set(texts)
    for (const text of texts) if (!shown.has(text)) this.check(text)
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
    const [, from, number, sentAt] = pattern.exec(text) || []
    const n = +number, at = now()
    if (from !== run) { // published by somebody else, who gave it no number
      this.arrived(at)
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
    const delay = at - sentAt
    if (sentAt >= this.caughtUpAt) this.delays.push(delay)
    if (this.delays.length > 1000) this.delays.shift()
    this.arrived(at)
    onArrival?.(this, n, at)
    this.note(`#${n}`, sentAt >= this.caughtUpAt ? duration(delay) : `caught up, ${duration(delay)}`)
  }

  /** Puts a dot on the timeline. */
  arrived(at) {
    this.arrivals.push(at)
    if (this.arrivals.length > 500) this.arrivals.shift()
  }

  // Display.

  build() {
    this.card = $('#card').content.cloneNode(true).firstElementChild
    const { card } = this
    Object.assign(card.dataset, { technique: this.name })
    card.id = this.name
    $('h3', card).textContent = this.title
    $('.year', card).textContent = years[this.name]
    $('.description', card).textContent = this.description
    $('.rawnote', card).textContent = this.rawNote
    $('.code', card).ontoggle = () => this.showCode()
    $('.cut', card).onclick = () => this.cut()
    $('.halt', card).onclick = () => { this.wanted ? this.pause() : this.start(); show() }
    if (this.apis) {
      const select = document.createElement('select')
      for (const api in this.apis) select.add(new Option(this.apis[api], api))
      select.onchange = () => { this.api = select.value; if (this.wanted) { this.stop(); this.connect() } }
      const label = document.createElement('label')
      label.append('with ', select)
      $('.choose', card).append(label)
      $('.choose', card).hidden = false
      this.select = select
    }
    if (this.picture) this.picture = new Picture(this)
    $('#cards').append(card)

    this.row = $('#row').content.cloneNode(true).firstElementChild
    this.row.dataset.technique = this.name
    Object.assign($('a', this.row), { href: '#' + this.name, textContent: this.title })
    $('#board tbody').append(this.row)
  }

  /** Shows the source code of this technique when its part of the card is opened. */
  showCode() {
    const details = $('.code', this.card)
    if (!details.open) return
    details.scrollIntoView({ block: 'nearest' }) // an open card takes a row of its own
    for (const [file, extract] of [['transports.go', goCode], ['comet.js', jsCode]]) {
      const part = $(`[data-file="${file}"]`, details), pre = $('pre', part), why = $('.why', part)
      if (pre.textContent) continue
      why.textContent = 'Loading …'
      load(file).then(source => {
        const code = extract(source, this.name)
        why.textContent = code ? '' : 'No function: the browser loads and shows this page by itself, without a script.'
        pre.hidden = !code
        pre.ariaLabel = `${this.title} in ${file}`
        $('code', pre).textContent = code
      }).catch(error => why.textContent = `The source code could not be shown: ${error.message}. Close and open this part to try again.`)
    }
  }

  note(text, more = '') {
    this.log.unshift([text, more])
    this.log.length = Math.min(this.log.length, 5)
    this.noted = true
  }

  show(relay) {
    const { card, row, delivered } = this
    const perEvent = (n, digits) => delivered && n >= 0 ? number(n / delivered, digits) : '–'
    const held = this.requestSpans.length && !this.requestSpans.at(-1).to ? 1 : 0
    const put = (element, text) => { if (element.textContent !== text) element.textContent = text }
    const waits = this.state === 'connecting' ? now() - this.requestAt : 0
    const state = waits > 1000 ? `waits for a connection, ${duration(waits)}` : this.state
    card.dataset.state = row.dataset.state = this.state
    put($('.lamp', card), state === 'open' && this.short ? `a request every ${interval()} s` : state)
    put($('.halt', card), this.wanted ? 'Pause' : 'Start')
    $('.cut', card).disabled = !this.wanted

    const wrong = [[this.lost, 'lost'], [this.doubled, 'doubled'], [this.disorder, 'out of order']]
    card.dataset.wrong = row.dataset.wrong = wrong.some(([n]) => n)
    Object.assign(card.dataset, { delivered, lost: this.lost, doubled: this.doubled, disorder: this.disorder })
    put($('.check', card), `${published - this.base} published, ${delivered} delivered, ${wrong.map(w => w.join(' ')).join(', ')}${this.pending > 0 ? `, ${this.pending} still to come` : ''}${this.gaps ? `, ${this.gaps} gaps reported` : ''}`)

    const delays = this.delays.toSorted((a, b) => a - b)
    const quantile = share => delays.length ? duration(delays[Math.ceil(share * delays.length) - 1]) : '–'
    const costs = {
      requests: [perEvent(this.requests, 2), relay && perEvent(relay.requests, 2)],
      down: [`${/As (fetch|the script|read)/.test(this.rawNote) ? '' : '≈ '}${perEvent(this.down)}`, relay && perEvent(relay.out)],
      up: [`≥ ${perEvent(this.up)}`, relay && perEvent(relay.in)],
      held: [String(held), relay && String(relay.connections)],
      median: [quantile(0.5), ' '],
      most: [quantile(0.95), ' '],
    }
    for (const cost in costs) costs[cost].forEach((text, i) => put($(`[data-cost=${cost}]`, card).cells[i + 1], text || '–'))

    const found = wrong.filter(([n]) => n).map(w => w.join(' ')).join(', ')
    const bytes = (relay ? perEvent(relay.in + relay.out) : `≥ ${perEvent(this.up + this.down)}`) + (this.picture ? ' *' : '')
    const cells = [String(delivered), found || (this.pending > 0 ? `${this.pending} to come` : delivered ? 'all, once, in order' : '–'), costs.requests[relay ? 1 : 0], bytes, quantile(0.5), quantile(0.95)]
    cells.forEach((text, i) => put(row.cells[i + 2], text))

    if (this.noted) $('.events', card).replaceChildren(...this.log.map(([text, more]) => {
      const li = document.createElement('li')
      li.append(text, Object.assign(document.createElement('small'), { textContent: more }))
      return li
    }))
    this.noted = false
    if ($('.bytes', card).open) {
      put($('.out', card), `${this.lastExchange.request || this.requestHead || ''}(and what the browser adds: Accept, cookies …)`)
      put($('.in', card), `${this.lastExchange.head || ''}\n${(this.lastExchange.body || '').slice(0, 4000)}`)
    }
  }
}

function showIn(card, ...elements) {
  $('.shown', card).append(...elements)
  $('.shown', card).hidden = false
}

/** Server push as it was meant: a page whose parts replace each other or, where the browser does not show that, a picture. */
class Picture {
  constructor(subscriber) { this.subscriber = subscriber }

  open() { requestSlot(this) }
  stop() { this.close(); this.open() }

  close() {
    clearTimeout(this.timer)
    if (this.frame) this.frame.src = '' // the browser goes on loading an image that is only removed
    this.frame?.remove()
    releaseSlot(this)
  }

  begin() {
    const { card } = this.subscriber
    const caption = $('.shownas', card) || Object.assign(document.createElement('p'), { className: 'shownas' })
    const put = (tag, as, more) => {
      this.frame = Object.assign(document.createElement(tag), more)
      this.frame.src = address('multipart', { as, last: as === 'html' ? 6 : undefined, form: as === 'html' ? 0 : undefined, w: as === 'svg' ? 480 : undefined, h: as === 'svg' ? 150 : undefined, _: unique() })
      showIn(card, this.frame, caption)
    }
    const picture = () => {
      put('img', 'svg', { alt: 'The room as a picture that the relay pushes', width: 480, height: 150 })
      this.timer = setTimeout(() => {
        caption.textContent = this.frame.naturalWidth ? 'This browser supports server push for pictures, but not for pages.' : 'This browser supports server push neither for pages nor for pictures; or they wait for a connection.'
      }, 1500)
    }
    if (Picture.pages === false) return picture()
    put('iframe', 'html', { title: 'The room as a page that the relay pushes' })
    caption.textContent = 'Testing whether this browser supports it …'
    this.timer = setTimeout(() => {
      Picture.pages = !!this.frame.contentDocument?.querySelector('main')
      caption.textContent = 'This browser supports server push for whole pages.'
      if (Picture.pages) return
      this.frame.remove()
      picture()
    }, 2000)
  }
}

// Connection slots. Over HTTP/1.1 a browser opens about six connections to a host, for all its tabs together; further
// requests wait. So the lab finds the limit, leaves one connection for short requests, and lets techniques take turns
// where the rest is too few. A technique that gave up its slot resumes from its cursor, so nothing is lost.

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
  const [oldest, since] = [...users].reduce((a, b) => b[1] < a[1] ? b : a, [undefined, Infinity])
  if (!slots.queue.length || now() - since < slotTime) return
  oldest.stop('waits its turn')
  if (oldest instanceof Subscriber) oldest.connect() // to the end of the queue
}

/** Sends eight requests that take a second each. Those answered after one second were sent at once; the rest had to wait. */
async function findConnectionLimit() {
  const tries = 8, abort = slots.trial = new AbortController, begun = now()
  const longPoll = () => request(address('longpoll', { wait: 1, _: unique() }), { credentials: 'same-origin', signal: abort.signal })
  let answered = 0, separate = false
  const all = [...Array(tries)].map(() => longPoll().then(() => answered++).catch(() => sleep(3000)))
  await sleep(30)
  request(address('poll', { _: unique() }), { signal: abort.signal }).then(response => separate = !rights.required && response.ok && now() - begun < 700, () => { })
  await Promise.race(all)
  await sleep(500) // for late answers on a busy machine; requests that waited are answered a second later
  abort.abort()
  const limited = answered < tries
  cookies.mode = separate ? 'omit' : 'same-origin'
  slots.limit = limited ? Math.max(1, answered - (separate ? 1 : 2)) : Infinity
  for (const subscriber of subscribers) {
    subscriber.api &&= limited && separate ? 'fetch' : 'xhr'
    if (subscriber.api) subscriber.select.value = subscriber.api
  }
  $('#limit').textContent = !limited ? `${http}: ${tries} requests were sent at once, and none had to wait for another.` :
    `${http}: ${tries} requests were sent at once, and ${tries - answered} had to wait for the others.` +
    (separate ? ' This browser uses separate connections for requests without cookies, so fetch omits cookies, and streaming uses fetch.' : '') +
    ` The lab holds at most ${slots.limit} other connections, so that short requests find one free; where that is too few, techniques take turns.`
}

// Publishing, one event after the other, so that the numbers are in the relay's order.

let published = 0, due = 0, publishing
const sendTimes = [] // of the last events

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
    const at = now(), text = `${run} #${n} ${at.toFixed(1)} `
    const body = text.padEnd($('#bytes').valueAsNumber || 0, 'comet ')
    let wait = Math.min(5000, 250 * 2 ** tries), problem = 'the relay could not be reached'
    try {
      const response = await request(address('', { key: `${run}-${n}` }), { method: 'POST', body, signal: AbortSignal.timeout(10e3) })
      const { id, error } = await response.json()
      if (response.ok) {
        published = n
        ids.set(n, id)
        ids.delete(n - remembered)
        sendTimes.push(at)
        if (sendTimes.length > 500) sendTimes.shift()
        $('#refused').textContent = ''
        return
      }
      problem = error
      wait = response.headers.get('Retry-After') * 1e3 || wait
    } catch { }
    $('#refused').textContent = `${problem}; trying again`
    await sleep(wait)
  }
}

// The relay's own counters.

let counters, baseCounters, countersRefused

async function measure() {
  if (countersRefused) return
  const read = {}
  const names = { requests_total: 'requests', connections: 'connections', delivered_total: 'delivered', received_bytes_total: 'in', sent_bytes_total: 'out' }
  try {
    const response = await request(here('metrics'))
    if (!response.ok) {
      countersRefused = true // the next request would be refused too
      counters = undefined
      $('#uncounted').textContent = `The relay does not show its own counts to this page (${response.status}); numbers marked ≥ are what the page saw itself.`
      return
    }
    for (const [, name, technique, value] of (await response.text()).matchAll(/^cometes_(\w+)\{technique="(\w+)"\} (\d+)$/gm)) {
      if (names[name]) (read[technique] ??= {})[names[name]] = +value
    }
    counters = read
  } catch { counters = undefined }
}

/** What the relay counted since the reset; the connections are those held now. */
function sinceReset(name) {
  const is = counters?.[name], was = baseCounters?.[name]
  if (!is || !was) return
  return { connections: is.connections, requests: is.requests - was.requests, delivered: is.delivered - was.delivered, in: is.in - was.in, out: is.out - was.out }
}

let resetting

function reset() {
  resetting = measure().then(() => {
    baseCounters = counters
    for (const subscriber of subscribers) subscriber.reset()
  })
  return resetting
}

// The test of the network: events sent at even intervals arrive at even intervals, unless something buffers them.

let onArrival

async function testBuffering() {
  const count = 10, apart = 200
  for (let i = 0; i < 40 && subscribers.some(s => s.wanted && s.state !== 'open' && (s.state === 'connecting' || !s.delivered)); i++) await sleep(100)
  const streams = subscribers.filter(s => s.wanted && ['multipart', 'html', 'iframe', 'stream', 'sse', 'ws'].includes(s.name))
  const open = streams.filter(s => s.state === 'open')
  const silent = streams.filter(s => s.state === 'connecting')
  const arrivals = new Map(open.map(s => [s, []])), begun = published
  onArrival = (s, n, at) => n > begun && arrivals.get(s)?.push(at)
  for (let i = 0; i < count; i++) {
    await publish(1)
    await sleep(apart)
    if (suspended) return onArrival = undefined
  }
  await sleep(1000)
  onArrival = undefined
  const gaps = s => arrivals.get(s).slice(1).map((at, i) => at - arrivals.get(s)[i])
  const buffered = open.filter(s => arrivals.get(s).length < count || gaps(s).filter(gap => gap < apart / 4).length > count / 3)
  const even = open.filter(s => !buffered.includes(s))
  const names = list => list.map(s => s.title).join(', ')
  const result = []
  if (buffered.length) result.push(`Yes: ${count} events were sent ${apart} ms apart. Some arrived late or several at once with ${names(buffered)}. Something on the way buffers responses.`)
  const which = buffered.length ? `Not with ${names(even)}:` : even.length === streams.length ? 'No. With all techniques that stream,' : `No. With ${names(even)},`
  if (even.length) result.push(`${which} ${count} events sent ${apart} ms apart arrived one by one, at most ${duration(Math.max(...even.flatMap(gaps)))} apart.`)
  if (silent.length) result.push(`No response at all with ${names(silent)}: buffered, or waiting for a connection.`)
  $('#held').dataset.held = !!buffered.length
  $('#held').textContent = result.join(' ') || 'No technique that streams is connected. Start some, and test again.'
  $('#first').textContent = subscribers.filter(s => s.firstByte >= 0).map(s => `${s.title} ${duration(s.firstByte)}`).join(' · ') || 'no response yet'
}

async function testComet() {
  try {
    const { Comet } = await import('./comet.js')
    const comet = new Comet(here(address('')).href, { shared: false })
    const via = await Promise.race([new Promise(open => comet.addEventListener('status', e => e.detail.status === 'open' && open(e.detail.via))), sleep(8000)])
    comet.close()
    $('#choice').textContent = via ? `${capitalized(names[via])}, on this network: it tries techniques in its order of preference, and uses the first that connects.` : 'none: no technique connected in time.'
  } catch (error) {
    $('#choice').textContent = `(not known: ${error.message})`
  }
}

// Six more connections, to show the browser's limit.

let extra = []

function openExtra() {
  const begun = now()
  extra = [...Array(6)].map((_, i) => {
    const one = { lamp: Object.assign(document.createElement('span'), { className: 'lamp' }), source: new EventSource(address('sse', { _: unique() })) }
    one.source.onopen = () => one.delay ??= now() - begun
    one.show = () => {
      one.lamp.dataset.state = one.delay ? 'open' : 'connecting'
      one.lamp.textContent = `${i + 1} ${one.delay ? `open after ${duration(one.delay)}` : `waits, ${duration(now() - begun)}`}`
    }
    return one
  })
  $('#extra').replaceChildren('Six more EventSources. Over HTTP/1.1, those that find no free connection wait, and so do short requests: see client pull and JSONP. Over HTTP/2 none waits. ', ...extra.map(one => one.lamp))
}

function closeExtra(reason = '') {
  for (const one of extra) one.source.close()
  if (extra.length || !reason) $('#extra').textContent = reason
  extra = []
  press($('#more'), false)
}

// Experiments. Each sets the lab up, does something, and says what to look at; *column* is a column's name.

const settings = (values) => {
  for (const id in values) $('#' + id).value = values[id]
  for (const id in values) $('#' + id).onchange?.({ type: 'change' })
}
const steadily = on => $('#steady').ariaPressed === String(on) || $('#steady').click()
const reached = async count => { for (const begun = published; published < begun + count && !suspended;) await sleep(50) }

const experiments = [
  ['Cut all in the middle of a burst', 'Every connection breaks while 40 events are published. Each technique comes back with its cursor. *Check*: nothing is lost, doubled or out of order.', async () => {
    publish(40)
    await reached(20)
    for (const s of subscribers) s.cut()
  }],
  ['Open six more: who waits?', 'Over HTTP/1.1 a browser opens six connections to a host, for all its tabs. See below the buttons which of the six wait; and in *Arrivals* that polling, client pull and JSONP wait with them. WebSockets do not count. Press “Open six more” again to close them.', async () => {
    if (!extra.length) $('#more').click()
    await publish(20)
  }],
  ['Publish one a minute', 'What does it cost to wait? See *Requests* after a minute: polling asked 30 times for one event, long polling two or three times, a stream not once. Then press “Publish steadily” to stop it.', async () => {
    settings({ every: 2, rate: 0.0167 })
    await publish(1)
    steadily(true)
  }],
  ['Ask only every ten seconds', 'One event a second, but polling and client pull ask every ten. *Median delay*: they wait half of that, five seconds; long polling is as fast as a stream.', async () => {
    settings({ every: 10, rate: 1 })
    steadily(true)
  }],
  ['Stay away longer than the history', 'WebSocket and server-sent events pause while 400 events are published; the relay keeps the newest 256 of a room. On their cards: the rest is lost, and a gap says so. Client pull loses some as well: its page shows the newest 50.', async () => {
    const away = subscribers.filter(s => s.name === 'ws' || s.name === 'sse')
    for (const s of away) s.pause()
    await publish(400)
    for (const s of away) s.start()
  }],
]

function showExperiments() {
  $('#experiments ol').append(...experiments.map(([label, look, run]) => {
    const li = document.createElement('li'), button = Object.assign(document.createElement('button'), { type: 'button', textContent: label, disabled: !rights.write })
    const p = document.createElement('p'), state = document.createElement('small')
    p.append(...look.split('*').map((part, i) => i % 2 ? Object.assign(document.createElement('b'), { textContent: part }) : part))
    state.role = 'status'
    button.onclick = async () => {
      button.disabled = true
      state.textContent = ' running…'
      steadily(false)
      settings({ bytes: 64 })
      await reset()
      await run()
      state.textContent = ' done: look at the table'
      button.disabled = false
    }
    li.append(button, state, p)
    return li
  }))
}

// From another origin: the relay's other name, which a browser takes for another site.

const otherName = { localhost: '127.0.0.1', '127.0.0.1': 'localhost' }[location.hostname]

const ways = {
  'CORS': ['fetch, and the header Access-Control-Allow-Origin', async url => {
    const response = await fetch(url('poll', { last: 1 }), { cache: 'no-store' })
    return response.headers.get('Content-Type') && `the answer can be read: ${(await response.text()).slice(0, 60)}…`
  }],
  'JSONP': ['a script of the other site, which calls a function of this page', url => new Promise((done, fail) => {
    const callback = 'cross_' + unique(), script = document.createElement('script')
    window[callback] = answer => done(`the script called the function with the cursor ${answer.cursor}`)
    Object.assign(script, { src: url('jsonp', { wait: 0, callback }), onerror: fail, onload: () => { script.remove(); fail() } })
    document.head.append(script)
  })],
  '<img>': ['a picture that the other site pushes', (url, li) => new Promise((done, fail) => {
    const img = Object.assign(new Image(320, 100), { alt: 'The room as a picture, from the other site' })
    Object.assign(img, { onload: () => done('the picture is here'), onerror: () => { img.remove(); fail() }, src: url('multipart', { as: 'svg', w: 320, h: 100 }) })
    li.append(img)
    addEventListener('suspend', () => { img.src = ''; img.remove() }, { once: true })
  })],
}

async function askAsOtherSite() {
  const origin = location.origin.replace(location.hostname, otherName)
  const url = (technique, query) => origin + address(technique, { ...query, _: unique() })
  $('#crossed').querySelectorAll('img').forEach(img => img.src = '')
  $('#asked').textContent = `asking ${origin} …`
  const refused = await Promise.all(Object.entries(ways).map(([name, [what, ask]], i) => {
    const li = $('#crossed').children[i] ?? $('#crossed').appendChild(document.createElement('li')), p = document.createElement('p')
    li.replaceChildren(Object.assign(document.createElement('b'), { textContent: name }), ': ' + what, p)
    return ask(url, li).then(text => { p.textContent = 'Works: ' + text }, () => { p.textContent = 'Refused: the browser shows this page nothing of the answer.'; return true })
  }))
  $('#asked').textContent = !refused.some(Boolean) ? `${origin} lets pages of ${location.origin} read.` :
    rights.required ? `${origin} asks for a token, and a cookie of this site is not sent to another.` : `${origin} does not let pages of ${location.origin} read. Start the relay with -origins ${location.origin}, and it will.`
}

$('#ask').onclick = askAsOtherSite
$('#ask').disabled = !otherName
if (!otherName) $('#asked').textContent = `This page is open at ${location.host}, whose other name it does not know. Open it at localhost or 127.0.0.1 to try.`

// A page that is not visible holds no connection, since all tabs share the few that the browser opens. A page that was
// left may stay in memory with its connections, and be shown again.

let left = false
let suspended = document.hidden
let suspensions = 0

function updateSuspended() {
  const now = left || document.hidden
  if (now === suspended) return
  suspended = now
  dispatchEvent(new Event('suspend'))
  if (!now) return subscribers.filter(s => s.wanted).forEach(s => s.connect())
  suspensions++
  slots.trial?.abort()
  subscribers.filter(s => s.wanted).forEach(s => s.stop(suspendedState))
  window.stop() // the request of a script goes on when its element is removed
  closeExtra('The six were closed when this page was hidden, so that other tabs of this site can load. They stay closed until you open them again.')
}

addEventListener('pagehide', () => { left = true; updateSuspended() })
addEventListener('pageshow', () => { left = false; updateSuspended() })
document.addEventListener('visibilitychange', updateSuspended)

/** Runs a test while the page is visible; repeats it if the page was suspended meanwhile. */
async function whileVisible(test) {
  for (let before; before !== suspensions;) {
    while (suspended) await new Promise(done => addEventListener('suspend', done, { once: true }))
    before = suspensions
    await test()
  }
}

// Drawing.

const number = (n, digits = 0) => n.toLocaleString('en', { maximumFractionDigits: digits, minimumFractionDigits: digits })
const duration = ms => ms < 9.95 ? `${number(Math.max(0, ms), 1)} ms` : ms < 1e3 ? `${number(ms)} ms` : `${number(ms / 1e3, 1)} s`

function show() {
  for (const subscriber of subscribers) subscriber.show(sinceReset(subscriber.name))
  for (const one of extra) one.show()
  $('#published').textContent = published - subscribers[0].base
  $('#halt').textContent = subscribers.some(s => s.wanted) ? 'Pause all' : 'Start all'
}

const timelineLength = 15e3 // ms

function draw(canvas, spans, dots) {
  const { clientWidth: w, clientHeight: h } = canvas, scale = devicePixelRatio
  if (!w) return
  if (canvas.width !== Math.round(w * scale)) Object.assign(canvas, { width: Math.round(w * scale), height: Math.round(h * scale) })
  const pen = canvas.getContext('2d'), end = now(), x = at => w - 4 - (end - at) / timelineLength * w
  pen.setTransform(scale, 0, 0, scale, 0, 0)
  pen.clearRect(0, 0, w, h)
  pen.fillStyle = colours.line
  for (const { from, to } of spans) if (!(to < end - timelineLength)) pen.fillRect(Math.max(0, x(from)), h / 2 - 1, Math.max(1.5, x(to ?? end) - Math.max(0, x(from))), 2)
  pen.fillStyle = colours.dot
  for (const at of dots) if (at > end - timelineLength) {
    pen.beginPath()
    pen.arc(x(at), h / 2, 2.75, 0, 7)
    pen.fill()
  }
}

let colours
const reducedMotion = matchMedia('(prefers-reduced-motion: reduce)')
const dark = matchMedia('(prefers-color-scheme: dark)')

function updateColours() {
  const style = getComputedStyle(document.body)
  colours = { line: style.getPropertyValue('--soft'), dot: style.getPropertyValue('--coma') }
}

function drawAll() {
  draw($('#sent canvas'), [], sendTimes)
  for (const subscriber of subscribers) draw($('canvas', subscriber.row), subscriber.requestSpans, subscriber.arrivals)
  setTimeout(() => requestAnimationFrame(drawAll), reducedMotion.matches ? 1000 : 40)
}

// The page.

let rights // what the token allows here
let steady
const press = (button, on) => { button.ariaPressed = on; return on }
$('#controls').onsubmit = e => { e.preventDefault(); publish(1) }
$('#burst').onclick = () => publish($('#many').valueAsNumber || 1)
$('#steady').onclick = $('#rate').onchange = ({ type }) => {
  clearInterval(steady)
  const on = type === 'click' ? $('#steady').ariaPressed !== 'true' : $('#steady').ariaPressed === 'true'
  if (press($('#steady'), on)) steady = setInterval(() => due < 5 && !suspended && publish(1), 1000 / Math.min(50, Math.max(0.01, $('#rate').valueAsNumber || 1)))
}
$('#cut').onclick = () => subscribers.forEach(s => s.cut())
$('#halt').onclick = () => {
  const stop = subscribers.some(s => s.wanted)
  for (const s of subscribers) stop ? s.pause() : s.wanted || s.start()
  show()
}
$('#more').onclick = e => press(e.target, !extra.length) ? openExtra() : closeExtra()
$('#reset').onclick = reset
$('#every').onchange = () => subscribers.filter(s => s.short && s.wanted).forEach(s => { s.stop(); s.connect() })
$('#again').onclick = async e => {
  e.target.disabled = true
  await whileVisible(testBuffering)
  e.target.disabled = false
}

/** Shows why the lab can not run, in place of the lab. */
function refuse(reason) {
  $('#trouble').textContent = reason
  $('#all').hidden = true
  for (const dd of document.querySelectorAll('#verdict dd')) dd.textContent = 'not known'
}

async function begin() {
  const rooms = pageQuery.get('room') ?? "'lab-*'"
  const flags = /^[\w.:*'-]+$/.test(rooms) ? `-read ${rooms} -write ${rooms}` : undefined
  rights = await access(room)
  if (rights.refused) {
    refuse('')
    return askForToken($('#enter'), rights.error, flags)
  }
  $('#another').ontoggle = () => askForToken($('#another div'), undefined, flags)
  $('#another').hidden = rights.read && rights.write
  if (!rights.read) return refuse(`Your token does not let this page read the room ${room}. Open the lab with ?room=NAME in the address for a room that the token names, or use a token that may read and write ${room}.`)
  if (rights.required) cookies.mode = 'same-origin' // the token is in a cookie
  const { cursor, error } = await (await request(address('poll'), { credentials: 'same-origin' })).json()
  if (error) return refuse(`The relay does not let this page read the room ${room}: ${error}.`)
  if (!rights.write) {
    $('#trouble').textContent = `Your token lets this page read the room ${room}, but not publish to it. So nothing is measured here; events of other publishers are shown.`
    for (const input of $('#controls div').querySelectorAll('button, input')) input.disabled = true
    $('#again').disabled = true
  }
  subscribers = techniques.map(technique => new Subscriber(technique, cursor))
  $('#room').textContent = `curl ${rights.required ? '-H "Authorization: Bearer $TOKEN" ' : ''}-d hi ${quoteForShell(here('rooms/' + encodeURIComponent(room)).href)}`
  $('#copy').replaceChildren(copyButton(() => $('#room').textContent))
  showExperiments()
  updateColours()
  dark.addEventListener('change', updateColours)
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
  else for (const id of ['#held', '#first']) $(id).textContent = 'not known: the test needs the right to publish here'
  document.body.dataset.ready = ''
}

whileVisible(() => { }).then(begin).catch(error => refuse(`The lab could not start: ${error.message}. Reload this page to try again.`))
