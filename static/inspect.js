// The inspector: opens one connection to any rooms, shows what comes as it is, and publishes. The techniques are those of
// the lab; see techniques.js for what a link is.

import { $, access, addCopyButton, capitalized, curl, here, insertMarkup, make, names, offerToken, quoteForShell, setText, sleep } from './page.js'
import { address, cookies, pageQuery, request, techniques, unique } from './techniques.js'

insertMarkup()
const MAX_SHOWN = 500 // older events are removed
const MAX_LENGTH = 10e3 // characters that are shown of an event
cookies.mode = 'same-origin' // a token is in a cookie

const { elements: reads } = $('#read'), { elements: publishes } = $('#publish')
let rights = {} // whether a token is needed
let connection // { technique, rooms, query, cursor, counts, failures, state, end }, or undefined

const say = words => setText($('#state'), words)

// Reading.

function query() {
  const from = reads.from.value, user = reads.reader.value.trim()
  return { ...from !== 'now' && { [from]: reads.n.value || (from === 'last' ? 10 : 0) }, ...user && { user } }
}

function open() {
  close()
  const technique = techniques.find(({ name }) => name === reads.via.value)
  connection = { technique, rooms: reads.rooms.value, query: query(), counts: {}, failures: 0 }
  reads.close.disabled = false
  history.replaceState(null, '', '?' + new URLSearchParams({ room: connection.rooms, via: technique.name, ...connection.query }))
  connect(connection)
}

function close() {
  connection?.end()
  connection = undefined
  reads.close.disabled = true
  say('Nothing is open.')
}

function connect(it) {
  const { technique, rooms } = it, { name } = technique
  let ended, timer, stop
  it.end = () => {
    ended = true
    it.state = undefined
    clearTimeout(timer)
    stop?.()
    $('#frame').replaceChildren()
  }
  say('connecting…')
  const link = {
    api: 'fetch',
    get state() { return it.state },
    get cursor() { return it.cursor },
    url(more) {
      const { after, last = more?.last, ...rest } = it.query, from = it.cursor ? { after: it.cursor } : { after, last }
      const noNames = name === 'sse' && { names: 0 } // so that an EventSource shows every type
      return address(name, { ...more, ...rest, ...from, ...noNames, _: unique() }, rooms)
    },
    frame(src, hidden) {
      const frame = make('iframe', { src, hidden, title: capitalized(names[name]) })
      $('#frame').append(frame)
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
      const { id, type, room, data } = event
      if (id) it.cursor = id
      if (type === 'bye') return link.onError(Object.assign(new Error('the relay said bye'), { retry: data.retry }))
      if (type === 'beat') return
      if (room) it.counts[room] = (it.counts[room] ?? 0) + 1
      show(json, event)
      showState(it)
    },
    onBatch({ cursor, events }) {
      for (const event of events) link.onEvent(event)
      it.cursor = cursor
    },
    onTexts() { }, onActivity() { }, onComplete() { },
    onReconnect() { say(it.state = 'reconnecting') },
    onError({ message, retry }) {
      it.end()
      const wait = retry || Math.min(8000, 500 * 2 ** it.failures++)
      say(`${message}; again in ${Math.ceil(wait / 1e3)} s, from the cursor`)
      timer = setTimeout(connect, wait, it)
    },
  }
  for (const name in on) link[name] = (...args) => ended || on[name](...args)
  try { stop = technique.open(link) } catch (error) { link.onError(error) }
}

function showState({ technique, rooms, counts, cursor }) {
  const list = rooms.split(',')
  say(`${list[1] ? `${list.length} rooms` : 'One room'} on one connection, by ${names[technique.name]}${technique.short ? ': a request every 2 s' : ''}.`)
  $('#counts').textContent = [...technique.page ? [] : list.map(room => `${room} ${counts[room] ?? 0}`), cursor && `cursor ${cursor}`].filter(Boolean).join(' · ')
}

/** How many connections the relay holds for all its clients, if it lets this page know. */
const countTimer = setInterval(async () => {
  const response = connection && !document.hidden && await request(here('metrics')).catch(() => undefined)
  if (response && !response.ok) return clearInterval(countTimer)
  const counts = response ? [...(await response.text()).matchAll(/^cometes_connections\{.*\} (\d+)$/mg)] : []
  $('#held').textContent = response ? `The relay holds ${counts.reduce((sum, [, n]) => sum + +n, 0)} in all.` : ''
}, 2000)

function show(text, { type = 'message', room, id } = {}) {
  const whole = text.length > MAX_LENGTH ? text.slice(0, MAX_LENGTH) + `… (${text.length} characters)` : text
  $('#events').prepend(make('li', type === 'message' ? '' : 'own', make('time', '', new Date().toLocaleTimeString([], { hour12: false })), make('code', '', whole)))
  while ($('#events').childElementCount > MAX_SHOWN) $('#events').lastChild.remove()
  if (id && type === 'message' && room === publishes.to.value) publishes.if.placeholder = id
}

// Publishing.

function toPublish() {
  const query = {}
  for (const name of ['user', 'type', 'ttl', 'key', 'if']) if (publishes[name].value.trim()) query[name] = publishes[name].value.trim()
  return { room: publishes.to.value, query, body: publishes.data.value, type: publishes.json.checked ? 'application/json' : 'text/plain' }
}

async function publish({ room, query, body, type }) {
  try {
    const response = await request(address('', query, room), { method: 'POST', body, headers: { 'Content-Type': type } })
    $('#answer').textContent = `${response.status} ${(await response.text()).trim()}`
  } catch (error) {
    $('#answer').textContent = `the relay could not be reached: ${error.message}`
  }
}

// The page.

const whole = (path, query) => quoteForShell(here(path) + (Object.keys(query).length ? '?' + new URLSearchParams(query) : ''))

function showCommands() {
  const via = reads.via.value, url = whole(`rooms/${reads.rooms.value}/${via}`, { ...query(), ...via === 'jsonp' && { callback: 'tell' } })
  const read = curl(rights.required, via === 'ws' ? '-c ' + url.replace('http', 'ws') : url)
  $('#readcurl').textContent = via === 'ws' ? read.replace('curl', 'npx wscat') : read.replace('curl', 'curl -N')
  const { room, query: asked, body, type } = toPublish()
  const header = type === 'application/json' || /[=;]/.test(body) ? `-H 'Content-Type: ${type}' ` : ''
  $('#publishcurl').textContent = curl(rights.required, `${header}--data-raw ${quoteForShell(body)} ${whole('rooms/' + room, asked)}`)
  reads.n.parentElement.hidden = reads.from.value === 'now'
}

for (const { name } of techniques.toReversed()) reads.via.add(new Option(capitalized(names[name]), name))
for (const id of ['#readcurl', '#publishcurl']) addCopyButton($(id), 'Copy as curl')
$('#read').onsubmit = e => { e.preventDefault(); open() }
$('#publish').onsubmit = e => { e.preventDefault(); publish(toPublish()) }
$('#all').oninput = showCommands
reads.close.onclick = close
$('#clear').onclick = () => $('#events').replaceChildren()
reads.three.onclick = async () => {
  reads.rooms.value = 'a,b,c'
  reads.via.value = 'sse'
  reads.from.value = 'now'
  showCommands()
  open()
  for (let i = 0; i < 100 && connection?.state !== 'open'; i++) await sleep(50)
  for (const room of ['a', 'b', 'c', 'a', 'b', 'c']) await publish({ room, query: {}, body: 'hi from ' + room, type: 'text/plain' })
}
// A page in the back/forward cache has no connection.
addEventListener('pagehide', () => connection?.end())
addEventListener('pageshow', e => e.persisted && connection && connect(connection))

reads.rooms.value = pageQuery.get('room') || 'lobby'
publishes.to.value = reads.rooms.value.split(',')[0]
reads.via.value = names[pageQuery.get('via')] ? pageQuery.get('via') : 'sse'
for (const from of ['last', 'after']) if (pageQuery.get(from)) {
  reads.from.value = from
  reads.n.value = pageQuery.get(from)
}
reads.reader.value = pageQuery.get('user') ?? ''

rights = await access(publishes.to.value)
showCommands()
offerToken(rights, !rights.required, "-read '*' -write '*'")
if (!rights.refused && pageQuery.has('open')) open()
