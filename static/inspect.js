// The inspector: opens one connection to any rooms, shows what comes as it is, and publishes. The techniques are those of
// the lab; see techniques.js for what a link is.

import { access, askForToken, capitalized, copyButton, here, insertMarkup, names, quoteForShell } from './page.js'
import { address, cookies, pageQuery, request, techniques, unique } from './techniques.js'

insertMarkup()
const $ = id => document.getElementById(id)
const MAX_SHOWN = 500 // older events are removed
const MAX_LENGTH = 10e3 // characters that are shown of an event
cookies.mode = 'same-origin' // a token is in a cookie

let rights = {} // whether a token is needed
let connection // { generation, technique, rooms, cursor, counts, state, close, timer }, or undefined

const say = words => { if ($('state').textContent !== words) $('state').textContent = words }

// Reading.

/** What the form says, as a query. */
function query() {
  const from = $('from').value, user = $('reader').value.trim()
  return { ...from !== 'now' && { [from]: $('n').value || (from === 'last' ? 10 : 0) }, ...user && { user } }
}

function open() {
  close()
  const technique = techniques.find(({ name }) => name === $('via').value)
  connection = { technique, rooms: $('rooms').value, query: query(), counts: {}, failures: 0 }
  $('close').disabled = false
  history.replaceState(null, '', '?' + new URLSearchParams({ room: connection.rooms, via: technique.name, ...connection.query }))
  connect(connection)
}

function connect(it) {
  const { technique, rooms } = it, generation = it.generation = {}
  say('connecting…')
  const url = more => {
    const { after, last, ...rest } = it.query
    const names = technique.name === 'sse' ? 0 : undefined // so that an EventSource shows every type
    return address(technique.name, { ...more, names, ...rest, ...it.cursor ? { after: it.cursor } : { after, last: last ?? more?.last }, _: unique() }, rooms)
  }
  const link = {
    api: 'fetch', url,
    get state() { return it.state },
    get cursor() { return it.cursor },
    frame(src, hide) {
      const frame = Object.assign(document.createElement('iframe'), { src, hidden: hide, title: capitalized(names[technique.name]) })
      $('frame').append(frame)
      return frame
    },
  }
  const on = {
    onRequest() { it.state === 'open' || say('connecting…') },
    onOpen() {
      it.failures = 0
      it.state = 'open'
      showState(it)
    },
    onBody(text) { if (technique.page) show(text) },
    onEvent(event, json = JSON.stringify(event)) {
      if (event.id) it.cursor = event.id
      if (event.type === 'bye') return link.onError(Object.assign(new Error('the relay said bye'), { retry: event.data.retry }))
      if (event.type === 'beat') return
      if (event.room) it.counts[event.room] = (it.counts[event.room] ?? 0) + 1
      show(json, event)
      showState(it)
    },
    onBatch({ cursor, events }) {
      events.forEach(event => link.onEvent(event))
      it.cursor = cursor
    },
    onTexts() { }, onActivity() { }, onComplete() { },
    onReconnect() { say(it.state = 'reconnecting') },
    onError(error) {
      disconnect(it)
      const wait = error.retry || Math.min(8000, 500 * 2 ** it.failures++)
      say(`${error.message}; again in ${Math.ceil(wait / 1e3)} s, from the cursor`)
      it.timer = setTimeout(() => connect(it), wait)
    },
  }
  for (const name in on) link[name] = (...args) => generation === it.generation && on[name](...args)
  try { it.close = technique.open(link) } catch (error) { link.onError(error) }
}

function disconnect(it) {
  it.generation = it.state = undefined
  clearTimeout(it.timer)
  it.close?.()
  it.close = undefined
  $('frame').replaceChildren()
}

function close() {
  if (connection) disconnect(connection)
  connection = undefined
  $('close').disabled = true
  say('Nothing is open.')
}

function showState({ technique, rooms, counts, cursor }) {
  const list = rooms.split(',')
  say(`${list.length === 1 ? 'One room' : `${list.length} rooms`} on one connection, by ${names[technique.name]}${technique.short ? ': a request every 2 s' : ''}.`)
  $('counts').textContent = [...technique.page ? [] : list.map(room => `${room} ${counts[room] ?? 0}`), cursor && `cursor ${cursor}`].filter(Boolean).join(' · ')
}

/** How many connections the relay holds for all its clients, if it lets this page know. */
async function countConnections() {
  const response = connection && !document.hidden && await request(here('metrics')).catch(() => undefined)
  if (response && !response.ok) return clearInterval(countTimer)
  const counts = response ? [...(await response.text()).matchAll(/^cometes_connections\{.*\} (\d+)$/mg)] : []
  $('held').textContent = response ? `The relay holds ${counts.reduce((sum, [, n]) => sum + +n, 0)} in all.` : ''
}
const countTimer = setInterval(countConnections, 2000)

function show(text, event) {
  const li = document.createElement('li'), time = document.createElement('time'), code = document.createElement('code')
  time.textContent = new Date().toLocaleTimeString([], { hour12: false })
  code.textContent = text.length > MAX_LENGTH ? text.slice(0, MAX_LENGTH) + `… (${text.length} characters)` : text
  if (event && event.type !== 'message') li.className = 'own'
  li.append(time, code)
  $('events').prepend(li)
  while ($('events').childElementCount > MAX_SHOWN) $('events').lastChild.remove()
  if (event?.type === 'message' && event.room === $('to').value) $('if').placeholder = event.id
}

// Publishing.

/** What the form publishes. */
function toPublish() {
  const query = {}
  for (const name of ['user', 'type', 'ttl', 'key', 'if']) if ($(name).value.trim()) query[name] = $(name).value.trim()
  return { room: $('to').value, query, body: $('data').value, type: $('json').checked ? 'application/json' : 'text/plain' }
}

async function publish({ room, query, body, type }) {
  try {
    const response = await request(address('', query, room), { method: 'POST', body, headers: { 'Content-Type': type } })
    $('answer').textContent = `${response.status} ${(await response.text()).trim()}`
  } catch (error) {
    $('answer').textContent = `the relay could not be reached: ${error.message}`
  }
}

// The commands.

const bearer = () => rights.required ? '-H "Authorization: Bearer $TOKEN" ' : ''
const whole = (path, query) => quoteForShell(here(path) + (Object.keys(query).length ? '?' + new URLSearchParams(query) : ''))

function showCommands() {
  const via = $('via').value, url = whole(`rooms/${$('rooms').value}/${via}`, { ...query(), ...via === 'jsonp' && { callback: 'tell' } })
  $('readcurl').textContent = via === 'ws' ? `npx wscat ${bearer()}-c ${url.replace('http', 'ws')}` : `curl -N ${bearer()}${url}`
  const { room, query: asked, body, type } = toPublish()
  const header = type === 'application/json' || /[=;]/.test(body) ? `-H 'Content-Type: ${type}' ` : ''
  $('publishcurl').textContent = `curl ${bearer()}${header}--data-raw ${quoteForShell(body)} ${whole('rooms/' + room, asked)}`
}

// The page.

for (const { name } of techniques.toReversed()) $('via').add(new Option(capitalized(names[name]), name))
for (const id of ['readcurl', 'publishcurl']) $(id).after(copyButton(() => $(id).textContent, 'Copy as curl'))
$('read').onsubmit = e => { e.preventDefault(); open() }
$('publish').onsubmit = e => { e.preventDefault(); publish(toPublish()) }
$('all').oninput = () => {
  $('n').parentElement.hidden = $('from').value === 'now'
  showCommands()
}
$('close').onclick = close
$('clear').onclick = () => $('events').replaceChildren()
$('three').onclick = async () => {
  Object.assign($('rooms'), { value: 'a,b,c' })
  $('via').value = 'sse'
  $('from').value = 'now'
  $('all').oninput()
  open()
  for (let i = 0; i < 100 && connection?.state !== 'open'; i++) await new Promise(done => setTimeout(done, 50))
  for (const room of ['a', 'b', 'c', 'a', 'b', 'c']) await publish({ room, query: {}, body: 'hi from ' + room, type: 'text/plain' })
}
// A page in the back/forward cache has no connection.
addEventListener('pagehide', () => connection && disconnect(connection))
addEventListener('pageshow', e => e.persisted && connection && connect(connection))

$('rooms').value = pageQuery.get('room') || 'lobby'
$('to').value = $('rooms').value.split(',')[0]
$('via').value = names[pageQuery.get('via')] ? pageQuery.get('via') : 'sse'
for (const from of ['last', 'after']) if (pageQuery.get(from)) {
  $('from').value = from
  $('n').value = pageQuery.get(from)
}
$('reader').value = pageQuery.get('user') ?? ''
$('all').oninput()

rights = await access($('to').value)
if (rights.refused) {
  $('all').hidden = true
  askForToken($('enter'), rights.error, '-read \'*\' -write \'*\'')
} else {
  showCommands()
  $('another').ontoggle = () => askForToken($('another').lastElementChild, undefined, '-read \'*\' -write \'*\'')
  $('another').hidden = !rights.required
  if (pageQuery.has('open')) open()
}
