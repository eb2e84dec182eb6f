// The relay's own numbers, and numbers that anybody publishes, as graphs. A Graph is an SVG of the last ten minutes, with
// the values as text for screen readers. The numbers come from two rooms, each read with comet.js. Below the graphs,
// operators see a list of the rooms.

import { Comet } from './comet.js'
import { access, askForToken, copyButton, insertMarkup, names, quoteForShell } from './page.js'

insertMarkup()
const query = new URLSearchParams(location.search)
const room = query.get('room') || 'temp'
const token = query.get('token') || undefined

const spans = [60e3, 120e3, 300e3, 600e3] // ms that a graph may show: the first that holds what is unbroken, unless one is chosen
const MAX_ROWS = 3000 // older rows are removed
const scaleWidth = 46 // pixels, left of the graph
const maxGap = 5e3 // ms; rows farther apart are not joined, since nothing was counted between them

const absolute = path => new URL(path, document.baseURI).href // a proxy may serve the relay under a prefix
const $ = selector => document.querySelector(selector)
const timeText = time => new Date(time).toLocaleTimeString()
const formatNumber = n => n.toLocaleString('en', { maximumFractionDigits: n < 10 ? 1 : 0 })
const formatExact = n => n.toLocaleString('en', { maximumSignificantDigits: 6 })
const formatBytes = n => {
  const units = ['B', 'kB', 'MB', 'GB']
  let i = 0
  for (; n >= 1000 && i < 3; i++) n /= 1000
  return `${formatNumber(n)} ${units[i]}`
}

function make(tag, attributes = {}, ...inside) {
  const svg = ['svg', 'path', 'line', 'text', 'circle', 'g'].includes(tag)
  const element = svg ? document.createElementNS('http://www.w3.org/2000/svg', tag) : document.createElement(tag)
  for (const name in attributes) element.setAttribute(name, attributes[name])
  element.append(...inside)
  return element
}

/** Rounds up to 1, 2, 5, 10, 20 … */
function roundUp(n) {
  const ten = 10 ** Math.floor(Math.log10(n))
  return ten * [1, 2, 5, 10].find(step => step * ten >= n * 0.9999)
}

let markedTime // the time whose values are shown; undefined: now
let pausedAt // the time at which the user paused the graphs
let chosenSpan // ms
let clockOffset // ms that the relay's clock is ahead of ours
const graphs = []
const rightEdge = () => pausedAt ?? Date.now() + (clockOffset ?? 0)

class Graph {
  /** @param series name → label; @param rows [{ time, [name]: number }], oldest first */
  constructor(parent, title, unit, rows, series, { format = formatNumber, stacked, wide, whole } = {}) {
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
    this.svg.onfocus = () => this.describe()
    new ResizeObserver(() => this.draw()).observe(this.svg)
    graphs.push(this)
    this.describe()
  }

  get span() {
    if (chosenSpan) return chosenSpan
    const edge = rightEdge()
    let oldest
    for (const { time } of this.rows.toReversed()) {
      if (time > edge) continue
      if (time < edge - spans.at(-1) || !this.whole && oldest - time > maxGap) break
      oldest = time
    }
    return spans.find(span => !oldest || oldest > edge - span) || spans.at(-1)
  }

  get shown() { return this.rows.filter(row => row.time > rightEdge() - this.span && row.time <= rightEdge()) }

  x(time) { return scaleWidth + (this.svg.clientWidth - scaleWidth - 6) * (1 - (rightEdge() - time) / this.span) }
  timeAt(x) { return rightEdge() - this.span * (1 - (x - scaleWidth) / (this.svg.clientWidth - scaleWidth - 6)) }

  /** The row nearest to the marked time. */
  at(shown) {
    if (markedTime === undefined) return shown.at(-1)
    return shown.reduce((best, row) => !best || Math.abs(row.time - markedTime) < Math.abs(best.time - markedTime) ? row : best, undefined)
  }

  key(e) {
    const { shown } = this, now = shown.indexOf(this.at(shown))
    const to = { ArrowLeft: now - 1, ArrowDown: now - 1, ArrowRight: now + 1, ArrowUp: now + 1, PageDown: now - 10, PageUp: now + 10, Home: 0, End: shown.length - 1 }[e.key]
    if (e.key === 'Escape') mark(undefined)
    else if (to === undefined || !shown.length) return
    else mark(shown[Math.min(shown.length - 1, Math.max(0, to))].time)
    e.preventDefault()
    this.describe()
  }

  /** Sets the values that a screen reader reads: on focus and on keys, not every second. */
  describe() {
    const { shown } = this, row = this.at(shown)
    const words = row ? `${timeText(row.time)}: ${this.names.filter(name => row[name] !== undefined).map(name => `${this.series[name]} ${this.format(row[name])}`).join(', ')}` : 'nothing yet'
    for (const [name, value] of Object.entries({ valuemin: 0, valuemax: Math.max(0, shown.length - 1), valuenow: Math.max(0, shown.indexOf(row)), valuetext: words })) this.svg.setAttribute('aria-' + name, value)
  }

  draw() {
    const { svg, names, stacked, shown } = this, w = svg.clientWidth, h = svg.clientHeight, bottom = h - 16
    if (!w) return
    const row = this.at(shown)
    names.forEach((name, i) => this.values[i].textContent = row?.[name] === undefined ? '–' : this.format(row[name]))
    this.time.textContent = row ? (markedTime === undefined && !pausedAt ? 'now' : timeText(row.time)) : ''

    const all = shown.flatMap(row => stacked ? names.reduce((sum, name) => sum + (row[name] || 0), 0) : names.map(name => row[name]).filter(n => n !== undefined))
    let low = Math.min(0, ...all), high = Math.max(0, ...all)
    if (this.whole && all.length) [low, high] = [Math.min(...all), Math.max(...all)] // any numbers need not begin at 0
    const step = roundUp((high - low) / 3 || Math.abs(high) || 1)
    low = Math.floor(low / step) * step
    high = Math.max(Math.ceil(high / step) * step, low + step)
    const end = rightEdge(), x = time => this.x(time), y = n => bottom - (n - low) / (high - low) * (bottom - 8)
    const marks = []
    for (let n = low; n < high + step / 2; n += step) {
      marks.push(make('line', { class: 'grid', x1: scaleWidth, x2: w, y1: y(n), y2: y(n) }), make('text', { x: scaleWidth - 6, y: y(n) + 4, 'text-anchor': 'end' }, this.format(Math.abs(n) < step / 1e3 ? 0 : n)))
    }
    const minutes = this.span / 60e3, parts = w < 420 ? 2 : minutes % 5 ? 4 : 5
    for (let i = 0; i <= parts; i++) {
      const back = minutes * (parts - i) / parts
      const words = back >= 1 ? `−${formatNumber(back)} min` : back ? `−${formatNumber(back * 60)} s` : pausedAt ? timeText(pausedAt) : 'now'
      marks.push(make('text', { x: x(end - back * 60e3), y: h - 1, 'text-anchor': i ? back ? 'middle' : 'end' : 'start' }, words))
    }
    const floor = shown.map(() => 0)
    names.forEach((name, i) => {
      let path = '', under = [], last
      const close = () => { if (stacked && under.length) path += under.reverse().join('') + 'Z'; under = [] }
      shown.forEach((row, j) => {
        if (row[name] === undefined) return
        const to = `${x(row.time).toFixed(1)} ${y(row[name] + floor[j]).toFixed(1)}`
        const joined = row.time - last < (this.whole ? Infinity : maxGap)
        if (!joined) close()
        path += (joined ? 'L' : 'M') + to
        last = row.time
        under.push(`L${x(row.time).toFixed(1)} ${y(floor[j]).toFixed(1)}`)
        if (stacked) floor[j] += row[name]
      })
      close()
      if (path) marks.push(make('path', { class: stacked ? 'area' : 'curve', d: path, 'data-n': i }))
    })
    if (row && (markedTime !== undefined || !stacked)) {
      if (markedTime !== undefined) marks.push(make('line', { class: 'cursor', x1: x(row.time), x2: x(row.time), y1: 4, y2: bottom }))
      if (!stacked) names.forEach((name, i) => row[name] !== undefined && marks.push(make('circle', { class: 'spot', cx: x(row.time), cy: y(row[name]), r: 3.5, 'data-n': i })))
    }
    if (!all.length) marks.push(make('text', { class: 'nothing', x: (scaleWidth + w) / 2, y: h / 2, 'text-anchor': 'middle' }, this.rows.length ? 'Nothing in this time' : 'Nothing yet'))
    svg.setAttribute('viewBox', `0 0 ${w} ${h}`)
    svg.replaceChildren(...marks)
  }
}

function mark(time) {
  markedTime = time
  drawAll()
}

const drawAll = () => graphs.forEach(graph => graph.draw())

function addRow(rows, row) {
  rows.push(row)
  if (rows.length > MAX_ROWS) rows.shift()
}

// The relay's numbers. It counts from its start; the graphs show the difference per second.

const techniques = Object.fromEntries(Object.entries(names).reverse()) // the newest first
const relayRows = []
let previous

function onCounts({ time, data }) {
  const ways = Object.entries(data.techniques)
  const sum = what => ways.reduce((sum, [, one]) => sum + one[what], 0)
  const totals = { published: data.published, delivered: sum('delivered'), in: data.in + sum('in'), out: sum('out'), dropped: data.dropped, gaps: data.gaps }
  const row = { time, rooms: data.rooms, users: data.users, memory: data.memory, kept: data.history, goroutines: data.goroutines }
  for (const [name, one] of ways) row[name] = one.connections
  const seconds = (time - previous?.time) / 1e3
  if (seconds > 0 && seconds < maxGap / 1e3 && data.uptime >= previous.uptime) for (const name in totals) row[name + '/s'] = (totals[name] - previous[name]) / seconds
  previous = { time, uptime: data.uptime, ...totals }
  addRow(relayRows, row)
}

const relayGraphs = $('#relay')
new Graph(relayGraphs, 'Connections', 'held, by technique', relayRows, techniques, { stacked: true, wide: true })
new Graph(relayGraphs, 'Events', 'per second', relayRows, { 'published/s': 'published', 'delivered/s': 'delivered' })
new Graph(relayGraphs, 'Traffic', 'bytes per second, headers included', relayRows, { 'in/s': 'in', 'out/s': 'out' }, { format: formatBytes })
new Graph(relayGraphs, 'Rooms and users', 'how many', relayRows, { rooms: 'rooms', users: 'users' })
new Graph(relayGraphs, 'Memory', 'in bytes', relayRows, { memory: 'process', kept: 'history' }, { format: formatBytes })
new Graph(relayGraphs, 'Goroutines', 'how many', relayRows, { goroutines: 'goroutines' })
new Graph(relayGraphs, 'Drops and gaps', 'readers per second', relayRows, { 'dropped/s': 'dropped', 'gaps/s': 'sent a gap' })

let statsComet

function followStats() {
  statsComet = new Comet(absolute('rooms/_stats'), { token, last: spans.at(-1) / 1e3 })
  statsComet.addEventListener('stats', ({ detail }) => {
    onCounts(detail)
    showInstances(detail.data.redis, detail.data.instance)
    clockOffset = Math.max(clockOffset ?? -Infinity, detail.time - Date.now()) // the history is older, so take the largest
  })
  statsComet.addEventListener('gap', onErased(relayRows))
  statsComet.addEventListener('status', ({ detail }) => {
    document.body.dataset.status = detail.status
    showState()
  })
}

/** Shows the relays that share a Redis, if this is one of them. */
function showInstances(redis, ours) {
  $('#instances').hidden = !redis
  if (!redis) return
  const { away, instances } = redis
  const words = away ? `Redis is away. Nothing can be published until it is back; what is in memory is still read.` : instances.length === 1 ? 'This relay is alone on its Redis.' : `${instances.length} relays share one log by their Redis.`
  if ($('#redis').textContent !== words) $('#redis').textContent = words
  $('#instances tbody').replaceChildren(...instances.map(i => make('tr', {}, make('th', { scope: 'row' }, i.instance + (i.instance === ours ? ' (this one)' : '')),
    ...[formatNumber(i.connections), formatNumber(i.rooms), formatNumber(i.users), i.silent > 10 ? `silent for ${i.silent} s` : 'now'].map(text => make('td', {}, text)))))
}

/** If a room was erased, its numbers are removed here too. */
const onErased = (rows, then) => ({ detail: { data } }) => {
  if (data?.reason !== 'erased') return
  rows.length = 0
  drawAll()
  then?.()
}

function showState() {
  if (!statsComet) return
  const words = { open: `live, by ${names[statsComet.via]}`, closed: 'closed', connecting: 'connecting…' }[statsComet.status] || statsComet.status
  $('#news').textContent = pausedAt ? `paused at ${timeText(pausedAt)}; new numbers are kept` : words
}

$('#pause').onclick = e => {
  pausedAt = pausedAt ? undefined : rightEdge()
  e.target.ariaPressed = !!pausedAt
  e.target.textContent = pausedAt ? 'Resume' : 'Pause'
  showState()
  drawAll()
}

$('#span').onchange = e => {
  chosenSpan = e.target.value * 1e3
  drawAll()
}

// Any numbers.

const numberRows = []
let skippedCount = 0

/** A number, or text that is one: `curl -d 42` publishes text. */
const asNumber = data => typeof data === 'number' ? data : typeof data === 'string' && data.trim() ? Number(data) : NaN

$('#which').value = room
const roomURL = tail => absolute(`rooms/${encodeURIComponent(room)}${tail}`)
const pictureURL = roomURL('/multipart?') + new URLSearchParams({ as: 'svg', w: 640, h: 200 })
$('#img').textContent = `<img src="${pictureURL}">`
$('#live').alt = `The room ${room} as a live graph`

function showSkipped(words) {
  $('#skipped').textContent = words ?? (skippedCount ? `${skippedCount} ${skippedCount === 1 ? 'message was no number and is' : 'messages were no numbers and are'} left out` : '')
}

function followNumbers() {
  new Graph($('#numbers'), room, 'as published', numberRows, { n: 'value' }, { format: formatExact, whole: true, wide: true })
  try {
    const any = new Comet(roomURL(''), { token, last: MAX_ROWS, presence: false })
    any.addEventListener('message', ({ detail: { time, data } }) => {
      const n = asNumber(data)
      if (Number.isFinite(n)) addRow(numberRows, { time, n })
      else skippedCount++
      showSkipped()
    })
    any.addEventListener('gap', onErased(numberRows, () => {
      skippedCount = 0
      showSkipped('the room was erased')
    }))
    any.addEventListener('status', ({ detail: { status, error } }) => status === 'closed' && error && showSkipped(`the room cannot be read: ${error.message}`))
  } catch (error) {
    showSkipped(error.message)
  }
}

// Something to look at: while it is pressed, a number that wanders is published once a second.

let feedTimer, fed = 50

function feed() {
  fed = Math.round(Math.min(100, Math.max(0, fed + (Math.random() - 0.5) * 30)))
  fetch(`${roomURL('')}?${new URLSearchParams({ ...token && { token } })}`, { method: 'POST', body: String(fed) })
    .then(async answer => answer.ok || showSkipped((await answer.json()).error), () => showSkipped('the relay could not be reached'))
}

$('#live').before(make('p', { class: 'row' }, make('button', { type: 'button', class: 'feedit', 'aria-pressed': false }, 'Feed it')))
const feedButtons = document.querySelectorAll('.feedit')
for (const button of feedButtons) button.onclick = () => {
  clearInterval(feedTimer)
  const on = button.ariaPressed !== 'true'
  if (on) {
    feed()
    feedTimer = setInterval(feed, 1000)
  }
  for (const one of feedButtons) Object.assign(one, { ariaPressed: on, textContent: on ? 'Stop feeding it' : 'Feed it' })
}

// The picture. It holds a connection, of which a browser has few per site, so a hidden page gives it up.

function showPicture(visible) {
  if (!visible) $('#live').removeAttribute('src')
  else if (!$('#live').src) $('#live').src = `${pictureURL}&${new URLSearchParams({ ...token && { token }, _: Math.random() })}` // a browser would load an equal URL after the other
}

// The rooms, for operators.

const columns = { room: 'Room', readers: 'Readers', users: 'Users', messages: 'Messages', bytes: 'Size', time: 'Last published' }
const MAX_ROOMS = 100 // rooms in the list; the others are found by prefix
const rowOf = new Map // room → table row
let sortBy = 'time', first = true, listTimer, currentRequest

const relativeTime = new Intl.RelativeTimeFormat('en', { numeric: 'always', style: 'narrow' })
function agoText(time) {
  const seconds = Math.min(0, (time - Date.now() - (clockOffset ?? 0)) / 1e3)
  for (const [unit, size] of [['day', 86400], ['hour', 3600], ['minute', 60]]) if (-seconds >= size) return relativeTime.format(Math.round(seconds / size), unit)
  return -seconds < 5 ? 'just now' : relativeTime.format(Math.round(seconds), 'second')
}

/** Sends a request that only operators may send. */
async function requestAsOperator(path, options) {
  const url = new URL(absolute(path))
  if (token) url.searchParams.set('token', token)
  const answer = await fetch(url, { cache: 'no-store', signal: AbortSignal.timeout(15e3), ...options })
  if (answer.ok) return answer.status === 204 ? {} : answer.json()
  const { error } = await answer.json().catch(() => ({}))
  throw Object.assign(new Error(error || `the relay answered ${answer.status}`), { status: answer.status })
}

/** Lists the rooms, and again every 4 s. */
async function listRooms() {
  clearTimeout(listTimer)
  const mine = currentRequest = {}, prefix = $('#prefix').value.trim()
  let list, error
  try { list = await requestAsOperator('rooms?' + new URLSearchParams({ prefix })) } catch (e) { error = e }
  if (mine !== currentRequest) return // there is a newer request, or the page is hidden
  if (location.hash === '#rooms' && first) setTimeout(() => $('#rooms').scrollIntoView()) // the content above has grown since the page loaded
  first = false
  if ([401, 403].includes(error?.status)) return showNoOperator()
  listTimer = setTimeout(listRooms, 4000)
  if (error) return showRoomCount(`The rooms could not be listed: ${error.message}.`)
  $('#listing').hidden = false
  showRooms(list, prefix)
}

function showNoOperator() {
  showRoomCount(allowed.required ? 'Your token does not name the room _stats in its read right, so the relay does not list its rooms to you. You need a token that does: cometes token -sub NAME -read \'_stats,*\' -write \'*\'.'
    : 'The relay lists its rooms to operators only. Without a secret, an operator is anybody who opens this page on the relay’s own machine, and not through a proxy. With a secret (-secret), an operator needs a token that names the room _stats in its read right.')
}

const showRoomCount = words => { if ($('#count').textContent !== words) $('#count').textContent = words }

function showRooms({ rooms, more }, prefix) {
  rooms.sort((a, b) => sortBy === 'room' ? (a.room < b.room ? -1 : 1) : b[sortBy] - a[sortBy])
  showRoomCount(!rooms.length ? prefix ? `No room starts with ${prefix}.` : 'There are no rooms yet.'
    : rooms.length > MAX_ROOMS || more ? `${Math.min(rooms.length, MAX_ROOMS)} of ${more ? 'more than ' : ''}${formatNumber(rooms.length)} rooms. Type the start of a name to find the others.`
      : rooms.length === 1 ? 'One room.' : `${rooms.length} rooms.`)
  const shown = rooms.slice(0, MAX_ROOMS), body = $('#list tbody')
  $('#list').hidden = !shown.length
  const pointedAt = body.matches(':hover, :focus-within') // a row does not move under the pointer
  for (const [name, row] of rowOf) if (!shown.some(({ room }) => room === name)) {
    row.remove()
    rowOf.delete(name)
  }
  shown.forEach((room, i) => {
    const row = rowOf.get(room.room) ?? makeRow(room.room)
    Object.keys(columns).slice(1).forEach((name, j) => {
      const text = name === 'time' ? room.time ? agoText(room.time) : '–' : name === 'bytes' ? formatBytes(room.bytes) : formatNumber(room[name])
      if (row.cells[j + 1].textContent !== text) row.cells[j + 1].textContent = text
    })
    row.cells[5].title = room.time ? new Date(room.time).toLocaleString() : ''
    row.messages = room.messages
    if (!row.isConnected) body.append(row)
    if (!pointedAt && body.rows[i] !== row) body.insertBefore(row, body.rows[i])
  })
}

function makeRow(room) {
  const row = document.createElement('tr')
  const erase = make('button', { type: 'button', 'aria-label': `Erase ${room}` }, 'Erase')
  erase.onclick = () => askToErase(room, row.messages)
  row.append(make('th', { scope: 'row' }, make('a', { href: './?' + new URLSearchParams({ room }) }, make('bdi', {}, room))), ...Array.from({ length: 5 }, () => make('td')), make('td', {}, erase))
  rowOf.set(room, row)
  return row
}

function askToErase(room, messages) {
  const dialog = $('#erase')
  $('#what').replaceChildren('Erase the room ', make('bdi', {}, room), '?')
  $('#warning').textContent = `${messages === 1 ? 'Its one message is' : `Its ${formatNumber(messages)} messages are`} deleted for everybody. This cannot be undone.`
  dialog.returnValue = ''
  dialog.onclose = () => dialog.returnValue === 'erase' && eraseRoom(room)
  dialog.showModal()
}

async function eraseRoom(room) {
  let words
  try {
    await requestAsOperator('rooms/' + encodeURIComponent(room), { method: 'DELETE' })
    words = ' is erased.'
  } catch (error) {
    words = ` could not be erased: ${error.message}.`
  }
  $('#answer').replaceChildren('The room ', make('bdi', {}, room), words)
  await listRooms()
  if (document.activeElement === document.body) $('#rooms h2').focus() // its button was removed with its row
}

$('#filter').onsubmit = e => e.preventDefault()
$('#prefix').oninput = () => {
  clearTimeout(listTimer)
  currentRequest = undefined
  listTimer = setTimeout(listRooms, 250)
}
for (const name in columns) {
  const button = make('button', { type: 'button' }, columns[name]), head = make('th', { scope: 'col', 'data-by': name }, button)
  if (name === sortBy) head.ariaSort = 'descending'
  button.onclick = () => {
    sortBy = name
    for (const other of $('#list thead').querySelectorAll('th')) other.ariaSort = other === head ? name === 'room' ? 'ascending' : 'descending' : null
    listRooms()
  }
  $('#list thead tr').append(head)
}
$('#list thead tr').append(make('th', { scope: 'col' }, make('span', { class: 'unseen' }, 'Erase')))

// The page. While it is hidden it loads neither the picture nor the list of rooms; comet.js keeps its connections.

let allowed = {}, pageLeft = false

function update() {
  const visible = !pageLeft && !document.hidden
  showPicture(visible && allowed.read)
  clearTimeout(listTimer)
  currentRequest = undefined
  if (visible && allowed.operates) listRooms()
}
addEventListener('pagehide', () => { pageLeft = true; update() })
addEventListener('pageshow', () => { pageLeft = false; update() })
document.addEventListener('visibilitychange', update)

addEventListener('pointerdown', e => e.target.closest('.graph svg') || mark(undefined))
setInterval(() => pausedAt || drawAll(), 1000)

async function start() {
  const [ours, theirs] = await Promise.all([access('_stats'), access(room)])
  const { required, refused, error } = ours, rights = "-read '_stats,*' -write '*'"
  if (refused) {
    document.body.dataset.status = 'closed'
    $('#all').hidden = true
    return askForToken($('#enter'), error, rights)
  }
  $('#another').ontoggle = () => askForToken($('#another div'), undefined, rights)
  $('#another').hidden = ours.read && theirs.read
  allowed = { required, read: theirs.read, operates: ours.read }
  $('#feed').textContent = `while sleep 1; do curl -s ${required ? '-H "Authorization: Bearer $TOKEN" ' : ''}-d $((RANDOM % 100)) ${quoteForShell(roomURL(''))}; done`
  if (ours.read) followStats()
  else {
    document.body.dataset.status = 'closed'
    $('#relay').hidden = $('#pause').hidden = $('#keys').hidden = true
    $('#news').textContent = 'Your token does not name the room _stats in its read right, so the relay does not show you its numbers.'
    showNoOperator()
  }
  $('#feed').after(copyButton(() => $('#feed').textContent))
  for (const button of feedButtons) button.disabled = !theirs.write
  if (theirs.read) followNumbers()
  else showSkipped(`your token does not let this page read the room ${room}`)
  $('#live').hidden = !theirs.read
  update()
}

start()
