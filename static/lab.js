// The lab: every technique on one room, and what comes is checked and weighed.
//
// How each opens its connection is in techniques.js. A Line, here, is one technique at work: its cursor, its counts,
// its card. Below that: the places, for a browser gives few connections; publishing; the verdict; what is drawn.

import { address, ask, asked, cookies, every, headOf, here, http, pattern, room, run, size, sleep, techniques, unique } from './techniques.js'
import { access, askForToken } from './token.js'

const $ = (selector, within = document) => within.querySelector(selector)
const now = () => performance.timeOrigin + performance.now()

// One technique at work.

let all10 = []
let beat = 15e3 // in which a stream says something
const ids = new Map // of the events of this page, by number
const memory = 5000 // events within which one that comes twice is known for that
let erasedTo = -1 // the id up to which the room was erased: what has not been delivered by then never will be
const erased = n => ids.get(n) <= erasedTo
const restful = 'rests until this page is seen'
const calls = ['asks', 'opens', 'gets', 'hears', 'takes', 'reads', 'lives', 'rests', 'breaks', 'ends']

class Line {
  constructor(technique, start) {
    Object.assign(this, technique, { cursor: start, generation: 0, fails: 0, held: [], dots: [], log: [], lastly: {} })
    this.state = 'waits to begin'
    this.way = technique.ways && 'xhr'
    this.build()
    this.reset()
  }

  reset() {
    Object.assign(this, { requests: 0, up: 0, down: 0, delivered: 0, doubled: 0, disorder: 0, gaps: 0, base: published, high: published, seen: new Set, passed: new Set, delays: [], first: undefined })
  }

  get lost() { return [...this.passed].filter(n => !erased(n)).length }
  get toCome() {
    let count = 0
    for (let n = this.high + 1; n <= published; n++) if (!erased(n)) count++
    return count
  }
  get needsPlace() { return !this.short && !this.socket && (this.cookies || this.way === 'xhr' || cookies.mode !== 'omit') }

  // What a person does.

  start() {
    this.wanted = true
    this.seek()
  }

  stop(state = 'paused') {
    clearTimeout(this.timer)
    this.generation++ // what the old connection still says is not heard
    this.close?.()
    this.close = undefined
    this.picture?.close()
    this.rests()
    this.breaks(state)
    leavePlace(this)
  }

  pause() {
    this.wanted = false
    this.stop()
  }

  /** Drops the connection, and comes back. */
  cut() {
    if (!this.wanted) return
    this.stop('cut')
    this.timer = setTimeout(() => this.seek(), 1500)
  }

  seek() {
    if (resting) return this.state = restful
    if (!this.needsPlace) return this.begin()
    this.state = 'waits its turn'
    takePlace(this)
  }

  begin() {
    const generation = ++this.generation, line = this
    const link = { way: this.way, url: query => this.url(query), frame: (url, hide) => this.frame(url, hide), get state() { return line.state }, get cursor() { return line.cursor } }
    for (const call of calls) link[call] = (...args) => generation === this.generation && this[call](...args)
    this.state = 'asks'
    this.sent = now()
    this.picture?.open()
    try { this.close = this.open(link) } catch (error) { this.ends(error) }
  }

  // What its technique tells.

  /** Where to go on. Of a page we know what it showed, and from publishing that event's id. Equal URLs would be asked one after the other. */
  url(query) {
    this.cursor = Math.max(this.cursor, this.page && ids.get(this.last) || 0)
    return address(this.name, { after: this.cursor, ...query, _: unique() })
  }

  asks(url, more = '', at = now()) {
    this.requests++
    this.sent = at
    this.rests()
    this.held.push({ from: this.sent })
    if (this.held.length > 100) this.held.shift()
    const head = `GET ${url} HTTP/1.1\nHost: ${location.host}\nUser-Agent: ${navigator.userAgent}\n${more}`
    this.up += size(head) + head.split('\n').length // a line ends in two bytes
    this.asking = head
    if (this.caught === undefined) this.note(`asks for what came after …${String(this.cursor).slice(-6)}`)
  }

  lives() { this.sign = now() }

  opens(head = this.head) {
    const at = this.sign = now()
    this.first ??= at - this.sent
    this.caught ??= at
    this.state = 'open'
    this.fails = 0
    this.lastly = { out: this.asking, head, body: '' }
    this.down += size(head) + head.split('\n').length
  }

  gets(body, bytes = size(body)) {
    this.lives()
    this.lastly.body = body
    this.down += bytes
  }

  takes({ cursor, events }) {
    events.forEach(event => this.hears(event))
    this.cursor = cursor
  }

  hears({ type, id, data }) {
    if (type === 'hello') beat = data.beat * 1e3
    if (type === 'bye') return this.ends(Object.assign(new Error('the relay said bye'), { retry: data.retry }))
    if (id) this.cursor = id
    if (type === 'gap' && data.reason === 'erased') {
      erasedTo = Math.max(erasedTo, id)
      this.note('gap: the room was erased')
    } else if (type === 'gap') {
      this.gaps++
      this.note('gap: the relay no longer has all of it')
    }
    if (type === 'message') this.check(String(data))
  }

  reads(texts) {
    const shown = this.short ? this.shown || new Set : new Set // a page that comes anew says again what it said
    this.shown = new Set(texts)
    for (const text of texts) if (!shown.has(text)) this.check(text)
  }

  rests() {
    const last = this.held.at(-1)
    if (last) last.to ??= now()
  }

  breaks(state) {
    this.rests()
    this.state = state
    this.caught = this.shown = undefined
  }

  ends(error) {
    this.stop('broken off')
    this.note(error.message)
    this.timer = setTimeout(() => this.seek(), error.retry || Math.min(8000, 500 * 2 ** this.fails++) * (0.5 + Math.random()))
  }

  /** Not all say that they broke off. What should hear a heartbeat and does not has. */
  watch() {
    if (this.state === 'open' && !this.short && now() - this.sign > Math.max(beat, this.waits || 0) * 1.2 + 2000) this.ends(new Error('nothing came for too long'))
  }

  /** Is this one new, the next, or one too many? */
  check(text) {
    const [, whose, number, sent] = pattern.exec(text) || []
    const n = +number, at = now()
    if (whose !== run) return this.note(text.slice(0, 80))
    this.last = n
    if (n <= this.base) return
    if (this.seen.has(n) || n <= this.high - memory) return void this.doubled++
    if (n < this.high) this.disorder++
    for (let between = Math.max(this.high, n - memory) + 1; between < n; between++) this.passed.add(between)
    this.passed.delete(n)
    this.seen.add(n)
    this.seen.delete(n - memory)
    this.high = Math.max(this.high, n)
    this.delivered++
    const delay = at - sent
    if (sent >= this.caught) this.delays.push(delay)
    if (this.delays.length > 1000) this.delays.shift()
    this.dots.push(at)
    if (this.dots.length > 500) this.dots.shift()
    arrived?.(this, n, at, delay)
    this.note(`#${n}`, sent >= this.caught ? span(delay) : `caught up, ${span(delay)}`)
  }

  // What is seen of it.

  build() {
    this.card = $('#card').content.cloneNode(true).firstElementChild
    const { card } = this
    Object.assign(card.dataset, { technique: this.name })
    card.id = this.name
    $('h3', card).textContent = this.title
    $('.year', card).textContent = this.year
    $('.says', card).textContent = this.says
    $('.how', card).textContent = this.how
    $('.cut', card).onclick = () => this.cut()
    $('.halt', card).onclick = () => { this.wanted ? this.pause() : this.start(); show() }
    if (this.ways) {
      const select = document.createElement('select')
      for (const way in this.ways) select.add(new Option(this.ways[way], way))
      select.onchange = () => { this.way = select.value; if (this.wanted) { this.stop(); this.seek() } }
      const label = document.createElement('label')
      label.append('by ', select)
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

  frame(url, hide) {
    const frame = Object.assign(document.createElement('iframe'), { title: this.title, src: url, hidden: hide })
    if (hide) document.body.append(frame)
    else showIn(this.card, frame)
    return frame
  }

  note(text, more = '') {
    this.log.unshift([text, more])
    this.log.length = Math.min(this.log.length, 5)
    this.noted = true
  }

  show(relay) {
    const { card, row, delivered } = this
    const each = (n, digits) => delivered && n >= 0 ? number(n / delivered, digits) : '–'
    const holds = this.held.length && !this.held.at(-1).to ? 1 : 0
    const put = (where, text) => { if (where.textContent !== text) where.textContent = text }
    const waits = this.state === 'asks' ? now() - this.sent : 0
    const state = waits > 1000 ? `waits for a connection, ${span(waits)}` : this.state
    card.dataset.state = row.dataset.state = this.state
    put($('.lamp', card), state === 'open' && this.short ? `asks every ${every()} s` : state)
    put($('.halt', card), this.wanted ? 'Pause' : 'Start')
    $('.cut', card).disabled = !this.wanted

    const wrong = [[this.lost, 'lost'], [this.doubled, 'doubled'], [this.disorder, 'out of order']]
    card.dataset.wrong = row.dataset.wrong = wrong.some(([n]) => n)
    Object.assign(card.dataset, { delivered, lost: this.lost, doubled: this.doubled, disorder: this.disorder })
    put($('.check', card), `${published - this.base} published, ${delivered} delivered, ${wrong.map(w => w.join(' ')).join(', ')}${this.toCome > 0 ? `, ${this.toCome} still to come` : ''}${this.gaps ? `, ${this.gaps} gaps told` : ''}`)

    const delays = this.delays.toSorted((a, b) => a - b)
    const at = share => delays.length ? span(delays[Math.ceil(share * delays.length) - 1]) : '–'
    const costs = {
      requests: [each(this.requests, 2), relay && each(relay.requests, 2)],
      down: [`${/As (fetch|the script)/.test(this.how) ? '' : '≈ '}${each(this.down)}`, relay && each(relay.out)],
      up: [`≥ ${each(this.up)}`, relay && each(relay.in)],
      held: [String(holds), relay && String(relay.connections)],
      median: [at(0.5), ' '],
      most: [at(0.95), ' '],
    }
    for (const cost in costs) costs[cost].forEach((text, i) => put($(`[data-cost=${cost}]`, card).cells[i + 1], text || '–'))

    const found = wrong.filter(([n]) => n).map(w => w.join(' ')).join(', ')
    const bytes = (relay ? each(relay.in + relay.out) : `≥ ${each(this.up + this.down)}`) + (this.picture ? ' *' : '')
    const cells = [String(delivered), found || (this.toCome > 0 ? `${this.toCome} to come` : delivered ? 'all, once, in order' : '–'), costs.requests[relay ? 1 : 0], bytes, at(0.5), at(0.95)]
    cells.forEach((text, i) => put(row.cells[i + 2], text))

    if (this.noted) $('.events', card).replaceChildren(...this.log.map(([text, more]) => {
      const li = document.createElement('li')
      li.append(text, Object.assign(document.createElement('small'), { textContent: more }))
      return li
    }))
    this.noted = false
    if ($('details', card).open) {
      put($('.out', card), `${this.lastly.out || this.asking || ''}(and what the browser adds: Accept, cookies …)`)
      put($('.in', card), `${this.lastly.head || ''}\n${(this.lastly.body || '').slice(0, 4000)}`)
    }
  }
}

function showIn(card, ...what) {
  $('.shown', card).append(...what)
  $('.shown', card).hidden = false
}

/** Server push as itself: a page whose parts replace each other, or, where the browser shows none, a picture. */
class Picture {
  cookies = true
  needsPlace = true
  constructor(line) { this.line = line }

  open() { takePlace(this) }
  seek() { takePlace(this) }
  stop() { this.close(); this.open() }

  close() {
    clearTimeout(this.timer)
    if (this.frame) this.frame.src = '' // an image that is only removed is still received
    this.frame?.remove()
    leavePlace(this)
  }

  begin() {
    const { line } = this
    const words = $('.shownas', line.card) || Object.assign(document.createElement('p'), { className: 'shownas' })
    const put = (tag, as, more) => {
      this.frame = Object.assign(document.createElement(tag), more)
      this.frame.src = address('multipart', { as, last: as === 'html' ? 6 : undefined, form: as === 'html' ? 0 : undefined, w: as === 'svg' ? 480 : undefined, h: as === 'svg' ? 150 : undefined, _: unique() })
      showIn(line.card, this.frame, words)
    }
    const picture = () => {
      put('img', 'svg', { alt: 'The room as a picture that is pushed', width: 480, height: 150 })
      this.timer = setTimeout(() => {
        words.textContent = this.frame.naturalWidth ? 'Found out: this browser replaces pictures so, but not pages.' : 'Found out: this browser shows neither pages nor pictures that are pushed; or they wait for a connection.'
      }, 1500)
    }
    if (Picture.pages === false) return picture()
    put('iframe', 'html', { title: 'The room as a page that is pushed' })
    words.textContent = 'Can this browser show it? …'
    this.timer = setTimeout(() => {
      Picture.pages = !!this.frame.contentDocument?.querySelector('main')
      words.textContent = 'Found out: this browser replaces whole pages so.'
      if (Picture.pages) return
      this.frame.remove()
      picture()
    }, 2000)
  }
}

// Places. Over HTTP/1.1 a browser gives about six connections to a host, for all its tabs together; what is held by
// one is not to be had by another, and a seventh request waits. So we find out how many there are, leave one for what is
// short, and where they do not suffice take turns: who gives way goes on from its cursor, and nothing is lost.

const turn = 6000
const places = { most: 1, taken: new Map, queue: [], trial: undefined }

function takePlace(who) {
  leavePlace(who)
  places.queue.push(who)
  allot()
}

function leavePlace(who) {
  places.taken.delete(who)
  places.queue = places.queue.filter(other => other !== who)
}

function allot() {
  const { taken } = places
  while (places.queue.length && taken.size < places.most) {
    const who = places.queue.shift()
    taken.set(who, now())
    who.begin()
  }
  const [longest, since] = [...taken].reduce((a, b) => b[1] < a[1] ? b : a, [undefined, Infinity])
  if (!places.queue.length || now() - since < turn) return
  longest.stop('waits its turn')
  if (longest instanceof Line) longest.seek() // behind the others
}

/** Asks for eight answers that take a second: as many as come then were asked at once. */
async function findPlaces() {
  const tries = 8, end = places.trial = new AbortController, begun = now()
  const held = () => ask(address('longpoll', { wait: 1, _: unique() }), { credentials: 'same-origin', signal: end.signal })
  let came = 0, apart = false
  const all = [...Array(tries)].map(() => held().then(() => came++).catch(() => sleep(3000)))
  await sleep(30)
  ask(address('poll', { _: unique() }), { signal: end.signal }).then(answer => apart = !may.required && answer.ok && now() - begun < 700, () => { })
  await Promise.race(all)
  await sleep(500) // for those that were late, as on a busy machine; what waited comes a second behind the first
  end.abort()
  const few = came < tries
  cookies.mode = apart ? 'omit' : 'same-origin'
  places.most = few ? Math.max(1, came - (apart ? 1 : 2)) : Infinity
  for (const line of all10) {
    line.way &&= few && apart ? 'fetch' : 'xhr'
    if (line.way) line.select.value = line.way
  }
  $('#limit').textContent = !few ? `${http}: ${tries} requests were asked at once, and none had to wait for another.` :
    `${http}: ${tries} requests were asked at once, and ${tries - came} had to wait for the others.` +
    (apart ? ' Requests without cookies have connections of their own here, so fetch does without cookies, and the streamed answer comes by fetch.' : '') +
    ` ${places.most} of the rest are held at most, which leaves room for what is short; where that is too few, techniques take turns.`
}

// Publishing, one after the other, so that the numbers are in the relay's order.

let published = 0, due = 0, publishing
const sent = [] // when

async function publish(count) {
  due = Math.min(due + count, 5000)
  publishing ??= (async () => {
    for (; due > 0; due--) await post()
    publishing = undefined
  })()
  return publishing
}

async function post() {
  await resetting // which takes a moment
  const n = published + 1
  for (let tries = 0; ; tries++) {
    const at = now(), text = `${run} #${n} ${at.toFixed(1)} `
    const body = text.padEnd($('#bytes').valueAsNumber || 0, 'comet ')
    let wait = Math.min(5000, 250 * 2 ** tries), why = 'the relay could not be reached'
    try {
      const answer = await ask(address('', { key: `${run}-${n}` }), { method: 'POST', body, signal: AbortSignal.timeout(10e3) })
      const { id, error } = await answer.json()
      if (answer.ok) {
        published = n
        ids.set(n, id)
        ids.delete(n - memory)
        sent.push(at)
        if (sent.length > 500) sent.shift()
        $('#refused').textContent = ''
        return
      }
      why = error
      wait = answer.headers.get('Retry-After') * 1e3 || wait
    } catch { }
    $('#refused').textContent = `${why}; trying again`
    await sleep(wait)
  }
}

// The relay's own counts.

let relay, base, shut

async function measure() {
  if (shut) return
  const counts = {}
  const names = { requests_total: 'requests', connections: 'connections', delivered_total: 'delivered', received_bytes_total: 'in', sent_bytes_total: 'out' }
  try {
    const answer = await ask(here('metrics'))
    if (!answer.ok) {
      shut = true // it would not show them the next time either
      relay = undefined
      $('#uncounted').textContent = `The relay does not show its own counts to this page (${answer.status}); what is marked ≥ is what the page saw itself.`
      return
    }
    for (const [, name, technique, value] of (await answer.text()).matchAll(/^cometes_(\w+)\{technique="(\w+)"\} (\d+)$/gm)) {
      if (names[name]) (counts[technique] ??= {})[names[name]] = +value
    }
    relay = counts
  } catch { relay = undefined }
}

/** What it counted since the reset; of connections, those that are held now. */
function since(name) {
  const is = relay?.[name], was = base?.[name]
  if (!is || !was) return
  return { connections: is.connections, requests: is.requests - was.requests, delivered: is.delivered - was.delivered, in: is.in - was.in, out: is.out - was.out }
}

let resetting

function reset() {
  resetting = measure().then(() => {
    base = relay
    for (const line of all10) line.reset()
  })
  return resetting
}

// The verdict: ticks, evenly sent, come evenly, unless something in between collects them.

let arrived

async function verdict() {
  const ticks = 10, apart = 200
  for (let i = 0; i < 40 && all10.some(line => line.wanted && line.state !== 'open' && (line.state === 'asks' || !line.delivered)); i++) await sleep(100)
  const streams = all10.filter(line => line.wanted && ['multipart', 'html', 'iframe', 'stream', 'sse', 'ws'].includes(line.name))
  const open = streams.filter(line => line.state === 'open')
  const silent = streams.filter(line => line.state === 'asks')
  const heard = new Map(open.map(line => [line, []])), begun = published
  arrived = (line, n, at) => n > begun && heard.get(line)?.push(at)
  for (let i = 0; i < ticks; i++) {
    await publish(1)
    await sleep(apart)
    if (resting) return arrived = undefined
  }
  await sleep(1000)
  arrived = undefined
  const gaps = line => heard.get(line).slice(1).map((at, i) => at - heard.get(line)[i])
  const clumped = open.filter(line => heard.get(line).length < ticks || gaps(line).filter(gap => gap < apart / 4).length > ticks / 3)
  const even = open.filter(line => !clumped.includes(line))
  const names = lines => lines.map(line => line.title).join(', ')
  const said = []
  if (clumped.length) said.push(`Yes: of ${ticks} ticks, sent ${apart} ms apart, some came in clumps or late by ${names(clumped)}. Something collects what it should pass on.`)
  const who = clumped.length ? `Not by ${names(even)}:` : even.length === streams.length ? 'No. By all that streams,' : `No. By ${names(even)},`
  if (even.length) said.push(`${who} ${ticks} ticks, sent ${apart} ms apart, came one by one, at most ${span(Math.max(...even.flatMap(gaps)))} apart.`)
  if (silent.length) said.push(`Asked, but nothing came at all by ${names(silent)}: held back, or waiting for a connection.`)
  $('#held').dataset.held = !!clumped.length
  $('#held').textContent = said.join(' ') || 'Nothing that streams is open; start some, and test again.'
  $('#first').textContent = all10.filter(line => line.first >= 0).map(line => `${line.title} ${span(line.first)}`).join(' · ') || 'nothing has answered'
}

async function choice() {
  try {
    const { Comet } = await import('./comet.js')
    const comet = new Comet(here(address('')).href, { shared: false })
    const via = await Promise.race([new Promise(open => comet.addEventListener('status', e => e.detail.status === 'open' && open(e.detail.via))), sleep(8000)])
    comet.close()
    $('#choice').textContent = via ? `${via}, now, here: it tries what it prefers, and takes the first that says hello.` : 'nothing: none of its techniques said hello in time.'
  } catch (error) {
    $('#choice').textContent = `(it could not be asked: ${error.message})`
  }
}

// Six more, to see them wait.

let more = []

function openMore() {
  const begun = now()
  more = [...Array(6)].map((_, i) => {
    const one = { lamp: Object.assign(document.createElement('span'), { className: 'lamp' }), source: new EventSource(address('sse', { _: unique() })) }
    one.source.onopen = () => one.open ??= now() - begun
    one.show = () => {
      one.lamp.dataset.state = one.open ? 'open' : 'asks'
      one.lamp.textContent = `${i + 1} ${one.open ? `open after ${span(one.open)}` : `waits, ${span(now() - begun)}`}`
    }
    return one
  })
  $('#extra').replaceChildren('Six more EventSources. Over HTTP/1.1 those that find no connection wait, and all that is short waits with them: watch client pull and JSONP. Over HTTP/2 nobody waits. ', ...more.map(one => one.lamp))
}

function closeMore(why = '') {
  for (const one of more) one.source.close()
  if (more.length || !why) $('#extra').textContent = why
  more = []
  press($('#more'), false)
}

// What nobody looks at holds no connection: all tabs share the few there are, so what this page keeps, another tab waits
// for. A page that was left may stay in memory with all it holds, and come back.

let left = false
let resting = document.hidden
let rested = 0 // how often

function rest() {
  const now = left || document.hidden
  if (now === resting) return
  resting = now
  dispatchEvent(new Event('rest'))
  if (!now) return all10.filter(line => line.wanted).forEach(line => line.seek())
  rested++
  places.trial?.abort()
  all10.filter(line => line.wanted).forEach(line => line.stop(restful))
  window.stop() // a script that is asked for waits on, also when its element is gone
  closeMore('The six were closed when this page was hidden, so that other tabs of this site can load. They stay closed until you open them again.')
}

addEventListener('pagehide', () => { left = true; rest() })
addEventListener('pageshow', () => { left = false; rest() })
document.addEventListener('visibilitychange', rest)

/** Does what takes a while, and does it again if the page rested meanwhile. */
async function undisturbed(work) {
  for (let before; before !== rested;) {
    while (resting) await new Promise(done => addEventListener('rest', done, { once: true }))
    before = rested
    await work()
  }
}

// What is drawn.

const number = (n, digits = 0) => n.toLocaleString('en', { maximumFractionDigits: digits, minimumFractionDigits: digits })
const span = ms => ms < 9.95 ? `${number(Math.max(0, ms), 1)} ms` : ms < 1e3 ? `${number(ms)} ms` : `${number(ms / 1e3, 1)} s`

function show() {
  for (const line of all10) line.show(since(line.name))
  for (const one of more) one.show()
  $('#published').textContent = published - all10[0].base
  $('#halt').textContent = all10.some(line => line.wanted) ? 'Pause all' : 'Start all'
}

const tape = 15e3 // milliseconds that it shows

function draw(canvas, held, dots) {
  const { clientWidth: w, clientHeight: h } = canvas, scale = devicePixelRatio
  if (!w) return
  if (canvas.width !== Math.round(w * scale)) Object.assign(canvas, { width: Math.round(w * scale), height: Math.round(h * scale) })
  const pen = canvas.getContext('2d'), end = now(), x = at => w - 4 - (end - at) / tape * w
  pen.setTransform(scale, 0, 0, scale, 0, 0)
  pen.clearRect(0, 0, w, h)
  pen.fillStyle = colours.line
  for (const { from, to } of held) if (!(to < end - tape)) pen.fillRect(Math.max(0, x(from)), h / 2 - 1, Math.max(1.5, x(to ?? end) - Math.max(0, x(from))), 2)
  pen.fillStyle = colours.dot
  for (const at of dots) if (at > end - tape) {
    pen.beginPath()
    pen.arc(x(at), h / 2, 2.75, 0, 7)
    pen.fill()
  }
}

let colours
const calm = matchMedia('(prefers-reduced-motion: reduce)')
const dark = matchMedia('(prefers-color-scheme: dark)')

function recolour() {
  const style = getComputedStyle(document.body)
  colours = { line: style.getPropertyValue('--soft'), dot: style.getPropertyValue('--coma') }
}

function drawAll() {
  draw($('#sent canvas'), [], sent)
  for (const line of all10) draw($('canvas', line.row), line.held, line.dots)
  setTimeout(() => requestAnimationFrame(drawAll), calm.matches ? 1000 : 40)
}

// The page.

let may // what the token lets us do here
let steady
const press = (button, on) => { button.ariaPressed = on; return on }
const shell = url => /^[\w.:/%~-]+$/.test(url) ? url : `'${url.replaceAll("'", '%27')}'` // what a person may paste there
$('#controls').onsubmit = e => { e.preventDefault(); publish(1) }
$('#burst').onclick = () => publish($('#many').valueAsNumber || 1)
$('#steady').onclick = $('#rate').onchange = e => {
  clearInterval(steady)
  const on = e.type === 'click' ? $('#steady').ariaPressed !== 'true' : $('#steady').ariaPressed === 'true'
  if (press($('#steady'), on)) steady = setInterval(() => due < 5 && !resting && publish(1), 1000 / Math.min(50, Math.max(0.1, $('#rate').valueAsNumber || 1)))
}
$('#cut').onclick = () => all10.forEach(line => line.cut())
$('#halt').onclick = () => {
  const stop = all10.some(line => line.wanted)
  for (const line of all10) stop ? line.pause() : line.wanted || line.start()
  show()
}
$('#more').onclick = e => press(e.target, !more.length) ? openMore() : closeMore()
$('#reset').onclick = reset
$('#every').onchange = () => all10.filter(line => line.short && line.wanted).forEach(line => { line.stop(); line.seek() })
$('#again').onclick = async e => {
  e.target.disabled = true
  await undisturbed(verdict)
  e.target.disabled = false
}

/** Shows why there is nothing to see, in place of all that waits for it. */
function refuse(why) {
  $('#trouble').textContent = why
  $('#all').hidden = true
}

async function begin() {
  const rooms = asked.get('room') ?? "'lab-*'"
  const rights = /^[\w.:*'-]+$/.test(rooms) ? `-read ${rooms} -write ${rooms}` : undefined
  may = await access(room)
  if (may.refused) {
    refuse('')
    return askForToken($('#enter'), may.error, rights)
  }
  $('#another').ontoggle = () => askForToken($('#another div'), undefined, rights)
  $('#another').hidden = may.read && may.write
  if (!may.read) return refuse(`Your token does not let this page read the room ${room}. Open the lab in a room that the token names, by ?room=NAME in the address, or use a token that may read and write ${room}.`)
  if (may.required) cookies.mode = 'same-origin' // the token is in one
  const { cursor, error } = await (await ask(address('poll'), { credentials: 'same-origin' })).json()
  if (error) return refuse(`The relay does not let this page read the room ${room}: ${error}.`)
  if (!may.write) {
    $('#trouble').textContent = `Your token lets this page read the room ${room}, but not publish to it. So nothing is measured here; what others publish is shown.`
    for (const input of $('#controls div').querySelectorAll('button, input')) input.disabled = true
    $('#again').disabled = true
  }
  all10 = techniques.map(technique => new Line(technique, cursor))
  $('#room').textContent = `curl ${may.required ? '-H "Authorization: Bearer $TOKEN" ' : ''}-d hi ${shell(here('rooms/' + encodeURIComponent(room)).href)}`
  recolour()
  dark.addEventListener('change', recolour)
  setInterval(show, 250)
  setInterval(() => { allot(); all10.forEach(line => line.watch()) }, 1000)
  drawAll()
  show()
  await Promise.all(all10.filter(line => line.cookies).map(async line => { // whose answers no page sees the heads of
    line.head = headOf(await ask(address(line.name, { callback: 'x', wait: every() }), { method: 'HEAD', credentials: 'same-origin' }))
  }))
  await undisturbed(findPlaces)
  await undisturbed(choice)
  await reset()
  setInterval(() => resting || measure(), 1000)
  for (const line of all10) line.start()
  if (may.write) await undisturbed(verdict)
  else for (const id of ['#held', '#first']) $(id).textContent = 'not known: it takes the right to publish here to find out'
  document.body.dataset.ready = ''
}

undisturbed(() => { }).then(begin).catch(error => refuse(`The lab could not begin: ${error.message}. Load this page again to try again.`))
