// Graphs of the relay's own numbers, and of those that anybody publishes: two rooms, read with comet.js. A Graph is an SVG,
// and its values as text. Below, operators see a list of the rooms.

import { Comet, get } from './comet.js'
import { $, access, addCopyButton, curl, here, insertMarkup, make, names, offerToken, onVisibility, plural, quoteForShell, setText } from './page.js'

insertMarkup()
const query = new URLSearchParams(location.search)
const room = query.get('room') || 'temp'
const token = query.get('token') || undefined

const spans = [60e3, 120e3, 300e3, 600e3] // ms that a graph may show
const maxRows = 3000
const maxGap = 5e3 // ms; rows farther apart are not joined
const left = 46, right = 6, below = 16 // pixels around the curves

const timeText = time => new Date(time).toLocaleTimeString()
const formatNumber = n => n.toLocaleString('en', { maximumFractionDigits: n < 10 ? 1 : 0 })
const formatExact = n => n.toLocaleString('en', { maximumSignificantDigits: 6 })
function formatBytes(n) {
  const power = n < 1000 ? 0 : Math.min(3, Math.floor(Math.log10(n) / 3))
  return `${formatNumber(n / 1000 ** power)} ${['B', 'kB', 'MB', 'GB'][power]}`
}

/** Rounds up to 1, 2, 5, 10, 20 … */
function roundUp(n) {
  const ten = 10 ** Math.floor(Math.log10(n))
  return ten * [1, 2, 5, 10].find(step => step * ten >= n * 0.9999)
}

let markedTime // whose values are shown; undefined: now
let pausedAt // when the user paused the graphs
let chosenSpan // ms; 0: what is unbroken
let clockOffset = 0 // ms that the relay's clock is ahead of ours
const rightEdge = () => pausedAt ?? Date.now() + clockOffset

const graphs = []
const drawAll = () => graphs.forEach(graph => graph.draw())
function mark(time) {
  markedTime = time
  drawAll()
}

class Graph {
  /**
   * @param rows [{ time, [series]: number }], oldest first
   * @param whole all rows are joined, and the scale need not begin at 0
   */
  constructor(parent, rows, title, unit, series, { format = formatNumber, stacked, whole } = {}) {
    this.values = series.map(() => make('b'))
    const legend = series.map((name, i) => make('li', '', name + ' ', this.values[i]))
    legend.forEach((li, i) => li.dataset.n = i)
    const svg = document.createElementNS('http://www.w3.org/2000/svg', 'svg'), time = make('span', 'time')
    Object.assign(this, { rows, series, format, stacked, whole, svg, time })
    Object.assign(svg, { tabIndex: 0, role: 'slider', ariaLabel: `${title}, ${unit}` })
    svg.setAttribute('aria-describedby', 'keys')
    parent.append(make('figure', 'graph',
      make('figcaption', '', make('strong', '', title), make('span', '', unit), time, make('ul', 'legend', ...legend)), svg))
    svg.onpointermove = svg.onpointerdown = e => mark(this.timeAt(e))
    svg.onpointerleave = e => e.pointerType === 'mouse' && mark()
    svg.onkeydown = e => this.onKey(e)
    svg.onfocus = () => this.describe()
    new ResizeObserver(() => this.draw()).observe(svg)
    graphs.push(this)
    this.describe()
  }

  /** The ms that are shown: those chosen, or what holds the unbroken run until now. */
  get span() {
    const edge = rightEdge()
    let oldest
    for (const { time } of this.rows.toReversed()) {
      if (time > edge) continue
      if (time < edge - spans.at(-1) || !this.whole && oldest - time > maxGap) break
      oldest = time
    }
    return chosenSpan || (spans.find(span => !(oldest <= edge - span)) ?? spans.at(-1))
  }

  get shown() {
    const edge = rightEdge(), begin = edge - this.span
    return this.rows.filter(({ time }) => time > begin && time <= edge)
  }

  timeAt({ clientX }) {
    const box = this.svg.getBoundingClientRect()
    return rightEdge() - this.span * (box.right - right - clientX) / (box.width - left - right)
  }

  /** The row nearest to the marked time, or the last. */
  at(shown) {
    const distance = ({ time }) => Math.abs(time - (markedTime ?? rightEdge()))
    return shown.reduce((best, row) => distance(row) <= distance(best) ? row : best, shown[0])
  }

  onKey(e) {
    const { shown } = this, i = shown.indexOf(this.at(shown))
    const to = { ArrowLeft: i - 1, ArrowDown: i - 1, ArrowRight: i + 1, ArrowUp: i + 1, PageDown: i - 10, PageUp: i + 10, Home: 0, End: Infinity }[e.key]
    if (e.key === 'Escape') mark()
    else if (to === undefined || !shown.length) return
    else mark(shown[Math.min(shown.length - 1, Math.max(0, to))].time)
    e.preventDefault()
    this.describe()
  }

  /** Sets what a screen reader reads: on focus and on keys, not every second. */
  describe() {
    const { shown, series, svg } = this, row = this.at(shown)
    const words = row && series.filter(name => name in row).map(name => `${name} ${this.format(row[name])}`).join(', ')
    Object.assign(svg, { ariaValueMin: 0, ariaValueMax: Math.max(0, shown.length - 1), ariaValueNow: Math.max(0, shown.indexOf(row)) })
    svg.ariaValueText = row ? `${timeText(row.time)}: ${words}` : 'nothing yet'
  }

  draw() {
    const { svg, series, stacked, whole, shown, span } = this
    const w = svg.clientWidth, h = svg.clientHeight, bottom = h - below, edge = rightEdge()
    if (!w) return
    const marked = markedTime !== undefined, row = this.at(shown)
    series.forEach((name, i) => this.values[i].textContent = row && name in row ? this.format(row[name]) : '–')
    this.time.textContent = !row ? '' : marked || pausedAt ? timeText(row.time) : 'now'

    const valuesOf = row => series.filter(name => name in row).map(name => row[name])
    const values = shown.flatMap(row => stacked ? valuesOf(row).reduce((sum, n) => sum + n, 0) : valuesOf(row))
    const ends = whole && values.length ? values : [0, ...values]
    let low = Math.min(...ends), high = Math.max(...ends)
    const step = roundUp((high - low) / 3 || Math.abs(high) || 1)
    low = Math.floor(low / step) * step
    high = Math.max(Math.ceil(high / step) * step, low + step)
    const x = time => (w - right - (w - left - right) * (edge - time) / span).toFixed(1)
    const y = n => (bottom - (n - low) / (high - low) * (bottom - 8)).toFixed(1)

    const text = (x, y, anchor, words, kind = '') => `<text x="${x}" y="${y}" text-anchor="${anchor}" class="${kind}">${words}</text>`
    let drawn = ''
    for (let n = low; n < high + step / 2; n += step) {
      drawn += `<path class="scale" d="M${left} ${y(n)}H${w}"/>` + text(left - 6, +y(n) + 4, 'end', this.format(Math.abs(n) < step / 1e3 ? 0 : n))
    }
    const minutes = span / 60e3, parts = w < 420 ? 2 : minutes % 5 ? 4 : 5
    for (let i = 0; i <= parts; i++) {
      const back = minutes * i / parts
      const words = back >= 1 ? `−${formatNumber(back)} min` : back ? `−${formatNumber(back * 60)} s` : pausedAt ? timeText(pausedAt) : 'now'
      drawn += text(x(edge - back * 60e3), h - 1, i === parts ? 'start' : i ? 'middle' : 'end', words)
    }
    const floors = new Map // of a stack, by row
    series.forEach((name, i) => {
      const runs = [] // of rows that are joined: [upper points, lower points]
      let last
      for (const row of shown) if (name in row) {
        const floor = stacked ? floors.get(row) ?? 0 : 0, top = floor + row[name]
        floors.set(row, top)
        if (!(row.time - last < (whole ? Infinity : maxGap))) runs.push([[], []])
        last = row.time
        runs.at(-1)[0].push(`${x(row.time)} ${y(top)}`)
        runs.at(-1)[1].unshift(`${x(row.time)} ${y(floor)}`)
      }
      const path = runs.map(([upper, lower]) => stacked ? `M${[...upper, ...lower].join('L')}Z` : `M${upper.join('L')}`)
      if (path.length) drawn += `<path class="${stacked ? 'area' : 'curve'}" d="${path.join('')}" data-n="${i}"/>`
    })
    if (row && marked) drawn += `<path class="cursor" d="M${x(row.time)} 4V${bottom}"/>`
    if (row && !stacked) series.forEach((name, i) => {
      if (name in row) drawn += `<circle class="spot" cx="${x(row.time)}" cy="${y(row[name])}" r="3.5" data-n="${i}"/>`
    })
    if (!values.length) drawn += text((left + w) / 2, h / 2, 'middle', this.rows.length ? 'Nothing in this time' : 'Nothing yet', 'nothing')
    svg.innerHTML = drawn // none of it is a user's text
  }
}

function addRow(rows, row) {
  rows.push(row)
  if (rows.length > maxRows) rows.shift()
}

const onErased = (rows, then) => ({ detail: { data } }) => {
  if (data?.reason !== 'erased') return
  rows.length = 0
  drawAll()
  then?.()
}

// The relay counts from its start; the graphs show the difference per second.

const relayRows = []
let previous, statsComet

const relayGraph = (...args) => new Graph($('#relay'), relayRows, ...args)
relayGraph('Connections', 'held, by technique', Object.values(names).reverse(), { stacked: true })
relayGraph('Events', 'per second', ['published', 'delivered'])
relayGraph('Traffic', 'bytes per second, headers included', ['in', 'out'], { format: formatBytes })
relayGraph('Rooms and users', 'how many', ['rooms', 'users'])
relayGraph('Memory', 'in bytes', ['process', 'history'], { format: formatBytes })
relayGraph('Goroutines', 'how many', ['goroutines'])
relayGraph('Drops and gaps', 'readers per second', ['dropped', 'sent a gap'])

function onCounts({ time, data }) {
  const { rooms, users, memory: process, history, goroutines, uptime, techniques } = data
  const sum = what => Object.values(techniques).reduce((sum, one) => sum + one[what], 0)
  const totals = { published: data.published, delivered: sum('delivered'), in: data.in + sum('in'), out: sum('out'), dropped: data.dropped, 'sent a gap': data.gaps }
  const row = { time, rooms, users, process, history, goroutines }
  for (const name in techniques) row[names[name]] = techniques[name].connections
  const ms = time - previous?.time
  if (ms > 0 && ms < maxGap && uptime >= previous.uptime) for (const name in totals) row[name] = (totals[name] - previous.totals[name]) / ms * 1e3
  previous = { time, uptime, totals }
  addRow(relayRows, row)
}

function followStats() {
  let offset = -Infinity
  statsComet = new Comet(here('rooms/_stats').href, { token, last: spans.at(-1) / 1e3 })
  statsComet.addEventListener('stats', ({ detail }) => {
    onCounts(detail)
    showInstances(detail.data)
    clockOffset = offset = Math.max(offset, detail.time - Date.now()) // the history is older, so take the largest
  })
  statsComet.addEventListener('gap', onErased(relayRows))
  statsComet.addEventListener('status', showState)
}

/** Shows the relays that share a Redis, if this is one of them. */
function showInstances({ redis, instance }) {
  $('#instances').hidden = !redis
  if (!redis) return
  const { away, instances } = redis
  setText($('#redis'), away ? 'Redis is away. Until it is back nothing can be published.' :
    instances.length === 1 ? 'This relay is alone on its Redis.' : `${instances.length} relays share one log by their Redis.`)
  $('#instances tbody').replaceChildren(...instances.map(one => tableRow(one.instance + (one.instance === instance ? ' (this one)' : ''),
    formatNumber(one.connections), formatNumber(one.rooms), formatNumber(one.users), one.silent > 10 ? `silent for ${one.silent} s` : 'now')))
}

const tableRow = (head, ...cells) => make('tr', '', make('th', { scope: 'row' }, head), ...cells.map(cell => make('td', '', cell)))

function showState() {
  if (!statsComet) return
  const { status, via } = statsComet
  document.body.dataset.status = status
  $('#news').textContent = pausedAt ? `paused at ${timeText(pausedAt)}; new numbers are kept` :
    status === 'open' ? `live, by ${names[via]}` : status === 'connecting' ? 'connecting…' : status
}

$('#pause').onclick = ({ target }) => {
  pausedAt = pausedAt ? undefined : rightEdge()
  target.ariaPressed = !!pausedAt
  target.textContent = pausedAt ? 'Resume' : 'Pause'
  showState()
  drawAll()
}

$('#span').onchange = e => {
  chosenSpan = e.target.value * 1e3
  drawAll()
}

// Any numbers.

const numberRows = []
let skipped = 0
const showSkipped = words => $('#skipped').textContent = words

/** A number, or text that is one: `curl -d 42` publishes text. */
const asNumber = data => typeof data === 'number' ? data : typeof data === 'string' && data.trim() ? Number(data) : NaN

const roomPath = 'rooms/' + encodeURIComponent(room), roomURL = here(roomPath).href
const pictureURL = roomURL + '/multipart?as=svg&w=640&h=200'
$('#which').value = room
$('#img').textContent = `<img src="${pictureURL}">`
$('#live').alt = `The room ${room} as a live graph`

function followNumbers() {
  new Graph($('#numbers'), numberRows, room, 'as published', ['value'], { format: formatExact, whole: true })
  try {
    const comet = new Comet(roomURL, { token, last: maxRows, presence: false })
    comet.addEventListener('message', ({ detail: { time, data } }) => {
      const value = asNumber(data)
      if (Number.isFinite(value)) addRow(numberRows, { time, value })
      else skipped++
      showSkipped(skipped ? `${skipped} ${skipped === 1 ? 'message was no number' : 'messages were no numbers'}` : '')
    })
    comet.addEventListener('gap', onErased(numberRows, () => {
      skipped = 0
      showSkipped('the room was erased')
    }))
    comet.addEventListener('status', ({ detail: { status, error } }) => status === 'closed' && error && showSkipped(`the room cannot be read: ${error.message}`))
  } catch (error) {
    showSkipped(error.message)
  }
}

// Something to look at: a number that wanders, once a second.

let feedTimer, fed = 50

function feed() {
  fed = Math.round(Math.min(100, Math.max(0, fed + (Math.random() - 0.5) * 30)))
  send(roomPath, { method: 'POST', body: String(fed) }).catch(error => showSkipped(error.message))
}

const feedButtons = [1, 2].map(() => make('button', { type: 'button', className: 'feedit', ariaPressed: false, onclick: toggleFeed }, 'Feed it'))
$('#skipped').before(feedButtons[0], ' ')
$('#live').before(make('p', 'row', feedButtons[1]))

function toggleFeed({ target }) {
  clearInterval(feedTimer)
  const on = target.ariaPressed !== 'true'
  if (on) {
    feed()
    feedTimer = setInterval(feed, 1000)
  }
  for (const button of feedButtons) Object.assign(button, { ariaPressed: on, textContent: on ? 'Stop feeding it' : 'Feed it' })
}

// The rooms, for operators.

const columns = {
  room: ['Room'],
  readers: ['Readers', formatNumber],
  users: ['Users', formatNumber],
  messages: ['Messages', formatNumber],
  bytes: ['Size', formatBytes],
  time: ['Last published', agoText],
}
const maxRooms = 100 // in the list; the others are found by prefix
const ago = new Intl.RelativeTimeFormat('en', { numeric: 'always', style: 'narrow' })
let rowOf = new Map // room → table row
let sortBy = 'time', first = true, listTimer, newestRequest

function agoText(time) {
  if (!time) return '–'
  const seconds = Math.max(0, (Date.now() + clockOffset - time) / 1e3)
  for (const [unit, size] of [['day', 86400], ['hour', 3600], ['minute', 60]]) if (seconds >= size) return ago.format(-Math.round(seconds / size), unit)
  return seconds < 5 ? 'just now' : ago.format(-Math.round(seconds), 'second')
}

async function send(path, options) {
  const url = here(path)
  if (token) url.searchParams.set('token', token)
  const answer = await get(url, { cache: 'no-store', signal: AbortSignal.timeout(15e3), ...options })
  return answer.status === 204 || answer.json()
}

/** Lists the rooms, every 4 s. */
async function listRooms() {
  clearTimeout(listTimer)
  const mine = newestRequest = {}, prefix = $('#prefix').value.trim()
  let list, error
  try { list = await send('rooms?' + new URLSearchParams({ prefix })) } catch (e) { error = e }
  if (mine !== newestRequest) return // there is a newer one, or the page is hidden
  if (location.hash === '#rooms' && first) setTimeout(() => $('#rooms').scrollIntoView()) // the content above has grown since the page loaded
  first = false
  if ([401, 403].includes(error?.status)) return showNoOperator()
  listTimer = setTimeout(listRooms, 4000)
  if (error) return setText($('#count'), `The rooms could not be listed: ${error.message}.`)
  $('#listing').hidden = false
  showRooms(list, prefix)
}

const flags = "-read '_stats,*' -write '*'"
const noStats = 'Your token does not name the room _stats in its read right'

const showNoOperator = () => setText($('#count'), allowed.required ? `${noStats}. One that does: cometes token -sub NAME ${flags}` :
  'The relay lists its rooms to operators only. Without a secret that is who opens this page on the relay’s own machine, not through a proxy.')

function showRooms({ rooms, more }, prefix) {
  rooms.sort((a, b) => sortBy === 'room' ? (a.room < b.room ? -1 : 1) : b[sortBy] - a[sortBy])
  const body = $('#list tbody'), shown = rooms.slice(0, maxRooms), hidden = more || rooms.length > maxRooms
  setText($('#count'), !rooms.length ? prefix ? `No room starts with ${prefix}.` : 'There are no rooms yet.' :
    hidden ? `${shown.length} of ${more ? 'more than ' : ''}${formatNumber(rooms.length)} rooms. Type the start of a name to find others.` :
      rooms.length === 1 ? 'One room.' : `${rooms.length} rooms.`)
  $('#list').hidden = !shown.length
  const rows = shown.map(updateRow)
  rowOf = new Map(rows.map((row, i) => [shown[i].room, row]))
  if (!body.matches(':hover, :focus-within')) return body.replaceChildren(...rows)
  for (const row of [...body.rows]) if (!rows.includes(row)) row.remove()
  body.append(...rows.filter(row => !row.isConnected)) // the others stay where they are under the pointer
}

function updateRow(room) {
  const row = rowOf.get(room.room) ?? makeRow(room.room)
  Object.entries(columns).forEach(([name, [, format]], i) => i && setText(row.cells[i], format(room[name])))
  row.cells[5].title = room.time ? new Date(room.time).toLocaleString() : ''
  row.messages = room.messages
  return row
}

function makeRow(room) {
  const erase = make('button', { type: 'button', ariaLabel: `Erase ${room}`, onclick: () => askToErase(room, row.messages) }, 'Erase')
  const row = tableRow(make('a', { href: './?' + new URLSearchParams({ room }) }, make('bdi', '', room)), '', '', '', '', '', erase)
  return row
}

function askToErase(room, messages) {
  const dialog = $('#erase')
  $('#what').replaceChildren('Erase the room ', make('bdi', '', room), '?')
  $('#warning').textContent = `Its ${plural(messages, 'message')} will be deleted for everybody. This cannot be undone.`
  dialog.returnValue = ''
  dialog.onclose = () => dialog.returnValue === 'erase' && eraseRoom(room)
  dialog.showModal()
}

async function eraseRoom(room) {
  const words = await send('rooms/' + encodeURIComponent(room), { method: 'DELETE' }).then(() => ' is erased.', error => ` could not be erased: ${error.message}.`)
  $('#answer').replaceChildren('The room ', make('bdi', '', room), words)
  await listRooms()
  if (document.activeElement === document.body) $('#rooms h2').focus() // its button was removed with its row
}

$('#filter').onsubmit = e => e.preventDefault()
$('#prefix').oninput = () => {
  clearTimeout(listTimer)
  newestRequest = undefined
  listTimer = setTimeout(listRooms, 250)
}

const heads = Object.entries(columns).map(([name, [title]]) => {
  const head = make('th', { scope: 'col', ariaSort: name === sortBy ? 'descending' : null }, make('button', { type: 'button', onclick: sort }, title))
  function sort() {
    sortBy = name
    for (const other of heads) other.ariaSort = other !== head ? null : name === 'room' ? 'ascending' : 'descending'
    listRooms()
  }
  return head
})
$('#list thead tr').append(...heads, make('th', { scope: 'col' }, make('span', 'unseen', 'Erase')))

// While the page is hidden it loads neither the list nor the picture, which holds one of the browser's few connections.

let allowed = {}

function update(visible) {
  if (!visible || !allowed.read) $('#live').removeAttribute('src')
  else $('#live').src ||= `${pictureURL}&${new URLSearchParams({ ...token && { token }, _: Math.random() })}` // a browser would load an equal URL after the other
  clearTimeout(listTimer)
  newestRequest = undefined
  if (visible && allowed.operates) listRooms()
}

onVisibility(update)
addEventListener('pointerdown', e => e.target.closest('.graph svg') || mark())
setInterval(() => pausedAt || drawAll(), 1000)

const [ours, theirs] = await Promise.all([access('_stats'), access(room)])
const { required, refused } = ours
allowed = { required, read: theirs.read, operates: ours.read }
if (!ours.read) document.body.dataset.status = 'closed'
offerToken(ours, ours.read && theirs.read, flags)
if (!refused) {
  $('#feed').textContent = `while sleep 1; do ${curl(required, `-s -d $((RANDOM % 100)) ${quoteForShell(roomURL)}`)}; done`
  addCopyButton($('#feed'))
  if (ours.read) followStats()
  else {
    $('#relay').hidden = $('#pause').hidden = $('#keys').hidden = true
    $('#news').textContent = `${noStats}, so the relay does not show you its numbers.`
    showNoOperator()
  }
  for (const button of feedButtons) button.disabled = !theirs.write
  if (theirs.read) followNumbers()
  else showSkipped(`your token does not let this page read the room ${room}`)
  $('#live').hidden = !theirs.read
  update(!document.hidden)
}
