// The relay's own numbers, and any others, as graphs. A Graph is an SVG of the last ten minutes and, for those who
// don't see it, the same in words; two rooms feed them, each read with comet.js. Below them, for operators, the rooms.

import { Comet } from './comet.js'
import { access, askForToken } from './token.js'

const asked = new URLSearchParams(location.search)
const room = asked.get('room') || 'temp'
const token = asked.get('token') || undefined

const spans = [60e3, 120e3, 300e3, 600e3] // milliseconds shown, as many as there are numbers for
const most = 3000 // rows kept
const left = 46 // pixels, for the scale
const torn = 5e3 // rows farther apart are not joined: nobody counted meanwhile

const here = path => new URL(path, document.baseURI).href // a proxy may have put the relay below a path
const $ = selector => document.querySelector(selector)
const clock = time => new Date(time).toLocaleTimeString()
const count = n => n.toLocaleString('en', { maximumFractionDigits: n < 10 ? 1 : 0 })
const plain = n => n.toLocaleString('en', { maximumSignificantDigits: 6 })
const bytes = n => {
  const units = ['B', 'kB', 'MB', 'GB']
  let i = 0
  for (; n >= 1000 && i < 3; i++) n /= 1000
  return `${count(n)} ${units[i]}`
}

function make(tag, attributes = {}, ...inside) {
  const svg = ['svg', 'path', 'line', 'text', 'circle', 'g'].includes(tag)
  const element = svg ? document.createElementNS('http://www.w3.org/2000/svg', tag) : document.createElement(tag)
  for (const name in attributes) element.setAttribute(name, attributes[name])
  element.append(...inside)
  return element
}

/** The next of 1, 2, 5, 10 … */
function nice(n) {
  const ten = 10 ** Math.floor(Math.log10(n))
  return ten * [1, 2, 5, 10].find(step => step * ten >= n * 0.9999)
}

let marked // the time whose values are shown; undefined is now
let paused // the time at which the graphs stand still
let ahead // the relay's clock before ours
const graphs = []
const edge = () => paused ?? Date.now() + (ahead ?? 0)

class Graph {
  /** @param series name → what it is called; @param rows [{ time, [name]: number }], oldest first */
  constructor(parent, title, unit, rows, series, { format = count, stacked, wide, whole } = {}) {
    Object.assign(this, { title, unit, rows, series, names: Object.keys(series), format, stacked, whole })
    this.time = make('span', { class: 'unit time' })
    this.values = this.names.map(() => make('b', {}, '–'))
    const legend = make('ul', { class: 'legend' }, ...this.names.map((name, i) => make('li', { 'data-n': i }, series[name] + ' ', this.values[i])))
    this.svg = make('svg', { tabindex: 0, role: 'slider', 'aria-label': `${title}, ${unit}`, 'aria-describedby': 'keys', 'aria-orientation': 'horizontal' })
    this.figure = make('figure', { class: wide ? 'graph wide' : 'graph' },
      make('figcaption', {}, make('strong', {}, title), make('span', { class: 'unit' }, unit), this.time, legend), this.svg)
    parent.append(this.figure)
    this.svg.onpointermove = this.svg.onpointerdown = e => mark(this.timeAt(e.clientX - this.svg.getBoundingClientRect().left))
    this.svg.onpointerleave = e => e.pointerType === 'mouse' && mark(undefined)
    this.svg.onkeydown = e => this.key(e)
    this.svg.onfocus = () => this.say()
    new ResizeObserver(() => this.draw()).observe(this.svg)
    graphs.push(this)
    this.say()
  }

  get span() {
    const oldest = this.rows.find(row => row.time > edge() - spans.at(-1))
    return spans.find(span => !oldest || oldest.time > edge() - span) || spans.at(-1)
  }

  get shown() { return this.rows.filter(row => row.time > edge() - this.span && row.time <= edge()) }

  x(time) { return left + (this.svg.clientWidth - left - 6) * (1 - (edge() - time) / this.span) }
  timeAt(x) { return edge() - this.span * (1 - (x - left) / (this.svg.clientWidth - left - 6)) }

  /** The row at the time that is marked. */
  at(shown) {
    if (marked === undefined) return shown.at(-1)
    return shown.reduce((best, row) => !best || Math.abs(row.time - marked) < Math.abs(best.time - marked) ? row : best, undefined)
  }

  key(e) {
    const { shown } = this, now = shown.indexOf(this.at(shown))
    const to = { ArrowLeft: now - 1, ArrowDown: now - 1, ArrowRight: now + 1, ArrowUp: now + 1, PageDown: now - 10, PageUp: now + 10, Home: 0, End: shown.length - 1 }[e.key]
    if (e.key === 'Escape') mark(undefined)
    else if (to === undefined || !shown.length) return
    else mark(shown[Math.min(shown.length - 1, Math.max(0, to))].time)
    e.preventDefault()
    this.say()
  }

  /** Tells the values to who does not see them: on focus and on keys, not every second. */
  say() {
    const { shown } = this, row = this.at(shown)
    const words = row ? `${clock(row.time)}: ${this.names.filter(name => row[name] !== undefined).map(name => `${this.series[name]} ${this.format(row[name])}`).join(', ')}` : 'nothing yet'
    for (const [name, value] of Object.entries({ valuemin: 0, valuemax: Math.max(0, shown.length - 1), valuenow: Math.max(0, shown.indexOf(row)), valuetext: words })) this.svg.setAttribute('aria-' + name, value)
  }

  draw() {
    const { svg, names, stacked, shown } = this, w = svg.clientWidth, h = svg.clientHeight, bottom = h - 16
    if (!w) return
    const row = this.at(shown)
    names.forEach((name, i) => this.values[i].textContent = row?.[name] === undefined ? '–' : this.format(row[name]))
    this.time.textContent = row ? (marked === undefined && !paused ? 'now' : clock(row.time)) : ''

    const all = shown.flatMap(row => stacked ? names.reduce((sum, name) => sum + (row[name] || 0), 0) : names.map(name => row[name]).filter(n => n !== undefined))
    let low = Math.min(0, ...all), high = Math.max(0, ...all)
    if (this.whole && all.length) [low, high] = [Math.min(...all), Math.max(...all)] // any numbers: not all begin at 0
    const step = nice((high - low) / 3 || Math.abs(high) || 1)
    low = Math.floor(low / step) * step
    high = Math.max(Math.ceil(high / step) * step, low + step)
    const end = edge(), x = time => this.x(time), y = n => bottom - (n - low) / (high - low) * (bottom - 8)
    const marks = []
    for (let n = low; n < high + step / 2; n += step) {
      marks.push(make('line', { class: 'grid', x1: left, x2: w, y1: y(n), y2: y(n) }), make('text', { x: left - 6, y: y(n) + 4, 'text-anchor': 'end' }, this.format(Math.abs(n) < step / 1e3 ? 0 : n)))
    }
    const minutes = this.span / 60e3, parts = w < 420 ? 2 : minutes % 5 ? 4 : 5
    for (let i = 0; i <= parts; i++) {
      const back = minutes * (parts - i) / parts
      const words = back >= 1 ? `−${count(back)} min` : back ? `−${count(back * 60)} s` : paused ? clock(paused) : 'now'
      marks.push(make('text', { x: x(end - back * 60e3), y: h - 1, 'text-anchor': i ? back ? 'middle' : 'end' : 'start' }, words))
    }
    const floor = shown.map(() => 0)
    names.forEach((name, i) => {
      let path = '', under = [], last
      const close = () => { if (stacked && under.length) path += under.reverse().join('') + 'Z'; under = [] }
      shown.forEach((row, j) => {
        if (row[name] === undefined) return
        const to = `${x(row.time).toFixed(1)} ${y(row[name] + floor[j]).toFixed(1)}`
        const joined = row.time - last < (this.whole ? Infinity : torn)
        if (!joined) close()
        path += (joined ? 'L' : 'M') + to
        last = row.time
        under.push(`L${x(row.time).toFixed(1)} ${y(floor[j]).toFixed(1)}`)
        if (stacked) floor[j] += row[name]
      })
      close()
      if (path) marks.push(make('path', { class: stacked ? 'area' : 'curve', d: path, 'data-n': i }))
    })
    if (row && (marked !== undefined || !stacked)) {
      if (marked !== undefined) marks.push(make('line', { class: 'cursor', x1: x(row.time), x2: x(row.time), y1: 4, y2: bottom }))
      if (!stacked) names.forEach((name, i) => row[name] !== undefined && marks.push(make('circle', { class: 'spot', cx: x(row.time), cy: y(row[name]), r: 3.5, 'data-n': i })))
    }
    svg.setAttribute('viewBox', `0 0 ${w} ${h}`)
    svg.replaceChildren(...marks)
  }
}

function mark(time) {
  marked = time
  drawAll()
}

const drawAll = () => graphs.forEach(graph => graph.draw())

function keep(rows, row) {
  rows.push(row)
  if (rows.length > most) rows.shift()
}

// The relay. It counts from its start; what is shown is the difference, over the time that it took.

const techniques = { ws: 'ws', sse: 'sse', stream: 'stream', longpoll: 'longpoll', jsonp: 'jsonp', iframe: 'iframe', html: 'html', multipart: 'multipart', poll: 'poll', refresh: 'refresh' }
const relay = []
let before

function counted({ time, data }) {
  const ways = Object.entries(data.techniques)
  const sum = what => ways.reduce((sum, [, one]) => sum + one[what], 0)
  const totals = { published: data.published, delivered: sum('delivered'), in: data.in + sum('in'), out: sum('out'), dropped: data.dropped, gaps: data.gaps }
  const row = { time, rooms: data.rooms, users: data.users, memory: data.memory, kept: data.history, goroutines: data.goroutines }
  for (const [name, one] of ways) row[name] = one.connections
  const seconds = (time - before?.time) / 1e3
  if (seconds > 0 && seconds < torn / 1e3 && data.uptime >= before.uptime) for (const name in totals) row[name + '/s'] = (totals[name] - before[name]) / seconds
  before = { time, uptime: data.uptime, ...totals }
  keep(relay, row)
}

const place = $('#relay')
new Graph(place, 'Connections', 'held, by technique', relay, techniques, { stacked: true, wide: true })
new Graph(place, 'Events', 'per second', relay, { 'published/s': 'published', 'delivered/s': 'delivered' })
new Graph(place, 'Traffic', 'bytes per second, heads included', relay, { 'in/s': 'in', 'out/s': 'out' }, { format: bytes })
new Graph(place, 'Rooms and users', 'how many', relay, { rooms: 'rooms', users: 'users' })
new Graph(place, 'Memory', 'in bytes', relay, { memory: 'process', kept: 'kept events' }, { format: bytes })
new Graph(place, 'Goroutines', 'how many', relay, { goroutines: 'goroutines' })
new Graph(place, 'Readers in trouble', 'per second', relay, { 'dropped/s': 'dropped', 'gaps/s': 'told of a gap' })

let stats

function readStats() {
  stats = new Comet(here('rooms/_stats'), { token, last: spans.at(-1) / 1e3 })
  stats.addEventListener('stats', ({ detail }) => {
    counted(detail)
    ahead = Math.max(ahead ?? -Infinity, detail.time - Date.now()) // the history comes late
  })
  stats.addEventListener('gap', forget(relay))
  stats.addEventListener('status', ({ detail }) => {
    document.body.dataset.status = detail.status
    news()
  })
}

/** An erased room's numbers are erased here too. */
const forget = (rows, then) => ({ detail: { data } }) => {
  if (data?.reason !== 'erased') return
  rows.length = 0
  drawAll()
  then?.()
}

function news() {
  if (!stats) return
  const words = { open: `live, by ${stats.via}`, closed: 'closed', connecting: 'connecting…' }[stats.status] || stats.status
  $('#news').textContent = paused ? `stands still at ${clock(paused)}; the numbers are kept meanwhile` : words
}

$('#pause').onclick = e => {
  paused = paused ? undefined : edge()
  e.target.ariaPressed = !!paused
  e.target.textContent = paused ? 'Go on' : 'Pause'
  news()
  drawAll()
}

// Any numbers.

const numbers = []
let skipped = 0

/** What is meant as a number: 42, "42", and what `curl -d 42` says. */
const asNumber = data => typeof data === 'number' ? data : typeof data === 'string' && data.trim() ? Number(data) : NaN

$('#which').value = room
const address = tail => here(`rooms/${encodeURIComponent(room)}${tail}`)
const shell = url => /^[\w.:/%~-]+$/.test(url) ? url : `'${url.replaceAll("'", '%27')}'` // what a person may paste there
const picture = address('/multipart?') + new URLSearchParams({ as: 'svg', w: 640, h: 200 })
$('#img').textContent = `<img src="${picture}">`
$('#live').alt = `The room ${room} as a live graph`

function skip(words) {
  $('#skipped').textContent = words ?? (skipped ? `${skipped} ${skipped === 1 ? 'message was no number, and is' : 'messages were no numbers, and are'} left out` : '')
}

function readNumbers() {
  new Graph($('#numbers'), room, 'as published', numbers, { n: 'value' }, { format: plain, whole: true, wide: true })
  try {
    const any = new Comet(address(''), { token, last: most, presence: false })
    any.addEventListener('message', ({ detail: { time, data } }) => {
      const n = asNumber(data)
      if (Number.isFinite(n)) keep(numbers, { time, n })
      else skipped++
      skip()
    })
    any.addEventListener('gap', forget(numbers, () => {
      skipped = 0
      skip('the room was erased')
    }))
    any.addEventListener('status', ({ detail: { status, error } }) => status === 'closed' && error && skip(`not to be read: ${error.message}`))
  } catch (error) {
    skip(error.message)
  }
}

// The picture. It is one of the few connections that all tabs share, and a page that was left would go on receiving it.

function look(seen) {
  if (!seen) $('#live').removeAttribute('src')
  else if (!$('#live').src) $('#live').src = `${picture}&${new URLSearchParams({ ...token && { token }, _: Math.random() })}` // one that is still held would make an equal one wait
}

// The rooms, for operators.

const columns = { room: 'Room', readers: 'Readers', users: 'Users', messages: 'Messages', bytes: 'Size', time: 'Last published' }
const shownMost = 100 // rooms; a prefix finds the others
const rows = new Map // room → its row
let order = 'time', first = true, timer, asking

const ago = new Intl.RelativeTimeFormat('en', { numeric: 'always', style: 'narrow' })
function since(time) {
  const seconds = Math.min(0, (time - Date.now() - (ahead ?? 0)) / 1e3)
  for (const [unit, size] of [['day', 86400], ['hour', 3600], ['minute', 60]]) if (-seconds >= size) return ago.format(Math.round(seconds / size), unit)
  return -seconds < 5 ? 'just now' : ago.format(Math.round(seconds), 'second')
}

/** Asks the relay, as an operator. */
async function operate(path, options) {
  const url = new URL(here(path))
  if (token) url.searchParams.set('token', token)
  const answer = await fetch(url, { cache: 'no-store', signal: AbortSignal.timeout(15e3), ...options })
  if (answer.ok) return answer.status === 204 ? {} : answer.json()
  const { error } = await answer.json().catch(() => ({}))
  throw Object.assign(new Error(error || `the relay answered ${answer.status}`), { status: answer.status })
}

/** Lists them, and again in a while. */
async function listRooms() {
  clearTimeout(timer)
  const mine = asking = {}, prefix = $('#prefix').value.trim()
  let list, error
  try { list = await operate('rooms?' + new URLSearchParams({ prefix })) } catch (e) { error = e }
  if (mine !== asking) return // asked again meanwhile, or nobody looks any more
  if (location.hash === '#rooms' && first) setTimeout(() => $('#rooms').scrollIntoView()) // what is above has grown since the page came
  first = false
  if ([401, 403].includes(error?.status)) return noOperator()
  timer = setTimeout(listRooms, 4000)
  if (error) return say(`The rooms could not be listed: ${error.message}.`)
  $('#listing').hidden = false
  showRooms(list, prefix)
}

function noOperator() {
  say(may.required ? 'Your token does not name the room _stats in its read right, so the relay does not list its rooms to you. A token that does would be right: cometes token -sub NAME -read \'_stats,*\' -write \'*\'.'
    : 'The relay lists its rooms to operators only. Without a secret, that is whoever opens this page on the machine that the relay runs on, through no proxy. With one (-secret), it is a token that names the room _stats in its read right.')
}

const say = words => { if ($('#count').textContent !== words) $('#count').textContent = words }

function showRooms({ rooms, more }, prefix) {
  rooms.sort((a, b) => order === 'room' ? (a.room < b.room ? -1 : 1) : b[order] - a[order])
  say(!rooms.length ? prefix ? `No room begins with ${prefix}.` : 'There is no room yet.'
    : rooms.length > shownMost || more ? `${Math.min(rooms.length, shownMost)} of ${more ? 'more than ' : ''}${count(rooms.length)} rooms. The beginning of a name finds the others.`
      : rooms.length === 1 ? 'One room.' : `${rooms.length} rooms.`)
  const shown = rooms.slice(0, shownMost), body = $('#list tbody')
  $('#list').hidden = !shown.length
  const still = body.matches(':hover, :focus-within') // what somebody points at does not move
  for (const [name, row] of rows) if (!shown.some(({ room }) => room === name)) {
    row.remove()
    rows.delete(name)
  }
  shown.forEach((room, i) => {
    const row = rows.get(room.room) ?? makeRow(room.room)
    Object.keys(columns).slice(1).forEach((name, j) => {
      const text = name === 'time' ? room.time ? since(room.time) : '–' : name === 'bytes' ? bytes(room.bytes) : count(room[name])
      if (row.cells[j + 1].textContent !== text) row.cells[j + 1].textContent = text
    })
    row.cells[5].title = room.time ? new Date(room.time).toLocaleString() : ''
    row.messages = room.messages
    if (!row.isConnected) body.append(row)
    if (!still && body.rows[i] !== row) body.insertBefore(row, body.rows[i])
  })
}

function makeRow(room) {
  const row = document.createElement('tr')
  const erase = make('button', { type: 'button', 'aria-label': `Erase ${room}` }, 'Erase')
  erase.onclick = () => askToErase(room, row.messages)
  row.append(make('th', { scope: 'row' }, make('a', { href: './?' + new URLSearchParams({ room }) }, make('bdi', {}, room))), ...Array.from({ length: 5 }, () => make('td')), make('td', {}, erase))
  rows.set(room, row)
  return row
}

function askToErase(room, messages) {
  const dialog = $('#erase')
  $('#what').replaceChildren('Erase the room ', make('bdi', {}, room), '?')
  $('#warning').textContent = `${messages === 1 ? 'Its one message is' : `Its ${count(messages)} messages are`} forgotten, for everyone. This cannot be undone.`
  dialog.returnValue = ''
  dialog.onclose = () => dialog.returnValue === 'erase' && eraseRoom(room)
  dialog.showModal()
}

async function eraseRoom(room) {
  let words
  try {
    await operate('rooms/' + encodeURIComponent(room), { method: 'DELETE' })
    words = ' is erased.'
  } catch (error) {
    words = ` could not be erased: ${error.message}.`
  }
  $('#answer').replaceChildren('The room ', make('bdi', {}, room), words)
  await listRooms()
  if (document.activeElement === document.body) $('#rooms h2').focus() // its button went with its row
}

$('#filter').onsubmit = e => e.preventDefault()
$('#prefix').oninput = () => {
  clearTimeout(timer)
  asking = undefined
  timer = setTimeout(listRooms, 250)
}
for (const name in columns) {
  const button = make('button', { type: 'button' }, columns[name]), head = make('th', { scope: 'col', 'data-by': name }, button)
  if (name === order) head.ariaSort = 'descending'
  button.onclick = () => {
    order = name
    for (const other of $('#list thead').querySelectorAll('th')) other.ariaSort = other === head ? name === 'room' ? 'ascending' : 'descending' : null
    listRooms()
  }
  $('#list thead tr').append(head)
}
$('#list thead tr').append(make('th', { scope: 'col' }, make('span', { class: 'unseen' }, 'Erase')))

// The page. Who does not see it needs neither its picture nor its list; the rest is small, and comet.js's to hold.

let may = {}, away = false

function update() {
  const seen = !away && !document.hidden
  look(seen && may.read)
  clearTimeout(timer)
  asking = undefined
  if (seen && may.operates) listRooms()
}
addEventListener('pagehide', () => { away = true; update() })
addEventListener('pageshow', () => { away = false; update() })
document.addEventListener('visibilitychange', update)

addEventListener('pointerdown', e => e.target.closest('.graph svg') || mark(undefined))
setInterval(() => paused || drawAll(), 1000)

async function begin() {
  const [ours, theirs] = await Promise.all([access('_stats'), access(room)])
  const { required, refused, error } = ours, rights = "-read '_stats,*' -write '*'"
  if (refused) {
    document.body.dataset.status = 'closed'
    $('#all').hidden = true
    return askForToken($('#enter'), error, rights)
  }
  $('#another').ontoggle = () => askForToken($('#another div'), undefined, rights)
  $('#another').hidden = ours.read && theirs.read
  may = { required, read: theirs.read, operates: ours.read }
  $('#feed').textContent = `while sleep 1; do curl -s ${required ? '-H "Authorization: Bearer $TOKEN" ' : ''}-d $((RANDOM % 100)) ${shell(address(''))}; done`
  if (ours.read) readStats()
  else {
    document.body.dataset.status = 'closed'
    $('#relay').hidden = $('#pause').hidden = $('#keys').hidden = true
    $('#news').textContent = 'Your token does not name the room _stats in its read right, so the relay does not show you its numbers.'
    noOperator()
  }
  if (theirs.read) readNumbers()
  else skip(`your token does not let this page read the room ${room}`)
  $('#live').hidden = !theirs.read
  update()
}

begin()
