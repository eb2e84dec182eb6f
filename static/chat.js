/**
 * chat.js: the chat at /, and an example of what comet.js is for.
 *
 * One rule keeps it true: only events of the relay get into the log, in the relay's order. What we write waits below
 * it, in the outbox, until its own event comes round: so it is seen at once, yet all see the same order, and nothing
 * twice. Another keeps it safe: nobody's text is ever taken for HTML.
 */
import { Comet } from './comet.js'

const KEEP = 1000 // messages in the page; then the oldest go
const TOGETHER = 5 * 60e3 // ms within which what somebody says stands under one name
const AWAY = 60e3 // ms hidden, and we are away
const FADE = 8e3 // ms for which who left is still shown; style.css knows it too
const HISTORY = 1e3 // ms after connecting; what comes later is news

const GAPS = {
  history: 'more was said than the relay keeps',
  restart: 'the relay was started anew, and what it kept is gone',
  future: 'the relay was started anew, and knows less than this page',
}
const STATES = { online: '', typing: 'typing…', away: 'away', offline: 'left' }

const $ = id => document.getElementById(id)
const log = $('log'), scroller = $('scroller'), box = $('text')
const clock = new Intl.DateTimeFormat([], { timeStyle: 'short' })
const calendar = new Intl.DateTimeFormat([], { weekday: 'long', day: 'numeric', month: 'long' })
const order = new Intl.Collator().compare
const count = (n, one) => `${n} ${one}${n === 1 ? '' : 's'}`
const hue = name => [...name].reduce((sum, c) => (sum * 31 + c.codePointAt(0)) % 360, 200)
const called = via => $('menu').querySelector(`[value="${via}"] + b`)?.textContent
const asText = data => typeof data === 'string' ? data : JSON.stringify(data)

const make = (tag, className, ...content) => {
  const el = document.createElement(tag)
  if (className) el.className = className
  el.append(...content)
  return el
}
const button = (label, press) => {
  const el = make('button', '', label)
  return Object.assign(el, { type: 'button', onclick: () => press(el) })
}

/** What the browser keeps for us, if it may. */
const kept = {
  get(key, store = 'localStorage') { try { return window[store].getItem('cometes ' + key) || '' } catch { return '' } },
  set(key, value, store = 'localStorage') { try { window[store].setItem('cometes ' + key, value) } catch { } },
}

// Rooms and names.

let comet, listening // the client, and what ends our listening to it
let room, me = kept.get('name')
let unread, below, gaps, tally // messages since the page was hidden; below what is seen; gaps; messages by technique

/** The room in the address, /?room=lobby or #lobby. */
function address() {
  const { hash, searchParams } = new URL(location)
  const name = hash.slice(1) || searchParams.get('room') || ''
  return name.trim().replace(/[^A-Za-z0-9_.:-]+/g, '-').slice(0, 64) || 'lobby'
}

function enter(name) {
  box.value = draft() // what was not sent was meant for the other room: let us see it
  outbox.forEach(drop)
  room = $('room').value = name
  $('room').size = Math.max(5, name.length)
  box.placeholder = 'Write to #' + name
  $('curl').textContent = `curl -d hi ${location.origin.replace('http://', '')}/rooms/${name}`
  log.replaceChildren()
  log.ariaBusy = true // nobody wants the history read out
  group = day = way = undefined
  unread = below = gaps = 0
  tally = {}
  due = []
  following = true
  connect()
}

/** Connects us under our name; anew when room or name change. With a cursor, what is on the page goes on. */
function connect(after) {
  listening?.abort()
  comet?.close()
  nobody()
  comet = new Comet('/rooms/' + room, { user: me || undefined, presence: true, last: 100, after })
  const { signal } = listening = new AbortController()
  for (const [type, hear] of Object.entries({ status: told, presence: later, gap: later, message: heard })) {
    comet.addEventListener(type, e => hear(e.detail), { signal })
  }
  const { value } = $('menu').elements.way
  if (value !== 'auto') comet.use(value)
  named(!!me)
  $('me').textContent = 'as ' + me
  $('outbox').querySelector('bdi').textContent = me
  $('outbox').style.setProperty('--hue', hue(me))
  const query = me && '?' + new URLSearchParams({ user: me })
  $('endless').href = `/rooms/${room}/html${query}`
  $('anew').href = `/rooms/${room}/refresh${query}`
  title()
  look()
  show()
}

function named(is) {
  $('naming').hidden = is
  $('say').hidden = $('me').hidden = !is
}

$('go').onsubmit = e => {
  e.preventDefault()
  const name = $('room').value
  if (name === room) return
  history.pushState(null, '', '/?room=' + name)
  enter(name)
  $(me ? 'text' : 'name').focus()
}
$('room').onblur = () => { $('room').value = room } // only Enter goes there
onpopstate = onhashchange = () => address() === room || enter(address())

$('me').onclick = () => {
  named(false)
  $('name').value = me
  $('name').select()
}
$('name').onkeydown = e => {
  if (e.key !== 'Escape' || !me) return
  named(true)
  box.focus()
}
$('naming').onsubmit = e => {
  e.preventDefault()
  const name = $('name').value.replace(/\p{Cc}/gu, '').trim()
  if (!name) return
  if (name === me) named(true)
  else {
    kept.set('name', me = name)
    connect(comet.cursor)
  }
  box.focus()
}

// The connection.

let ticking
function told({ status, via, retryIn, error, leader }) {
  const words = { connecting: 'connecting', open: 'connected by ' + called(via), closed: 'not connected' }[status] ?? status
  if ($('words').textContent !== words) $('words').textContent = words // the same again would be read out again
  document.body.dataset.status = status
  const at = Date.now() + retryIn
  const more = () => $('more').textContent =
    status === 'open' ? leader ? '' : ', through another tab' :
    status === 'offline' ? ': what you write is kept for later' :
    status === 'closed' ? `: ${error.message}` :
    retryIn ? ` in ${Math.max(1, Math.ceil((at - Date.now()) / 1e3))} s` : '…'
  clearInterval(ticking)
  if (status === 'reconnecting' && retryIn) ticking = setInterval(more, 1e3)
  more()
  $('trouble').textContent = !error ? '' : `${status === 'open' ? 'That is not to be had' : 'Trouble'}: ${error.message}.`
  for (const mine of outbox) if (mine.state === 'pending') mark(mine, 'pending')
  if (status !== 'open') return
  if (log.ariaBusy === 'true') setTimeout(() => log.ariaBusy = false, HISTORY)
  if (way && way !== via) later({ type: 'way', via })
  way = via
}

$('menu').onchange = e => comet.use(e.target.value === 'auto' ? null : e.target.value)
$('menu').onsubmit = e => e.preventDefault()

// The log. A burst is written at once, and costs one layout.

let due, timer // what is to be written, and when
let group, day, way // the last of each: the messages under one name, the date, the technique
let following // stay at the bottom

function later(event) {
  due.push(event)
  timer ??= setTimeout(show, 20)
}

function show() {
  clearTimeout(timer)
  timer = undefined
  for (const event of due.splice(0)) {
    for (const mine of outbox) if (mine.id < event.id) message({ ...mine, data: mine.text, from: me }) // its own event is lost
    write[event.type](event)
  }
  while (log.getElementsByClassName('message').length > KEEP) oldest().remove()
  standing()
  follow()
}

/** A message, or a line, or a name with its last message; but not the day above what stays. */
function oldest() {
  const [first, second] = log.children
  const el = first.className === 'day' && second.className !== 'day' ? second : first
  return el.childElementCount > 2 ? el.children[1] : el
}

const write = {
  message,
  presence,
  gap({ data }) {
    gaps++
    line('gap', `Some messages may be missing here: ${GAPS[data?.reason] ?? 'the relay lost the thread'}.`)
  },
  way: ({ via }) => line('way', 'from here on by ' + called(via)),
}

/** A line across the log. Of two of a kind with nothing between them, the newer counts. */
function line(kind, text) {
  group = undefined
  if (log.lastElementChild?.className === kind) log.lastElementChild.textContent = text
  else log.append(make('p', kind, text))
}

function message({ id, from, time, data }) {
  const mine = ours({ id, from, data })
  if (mine) drop(mine)
  const at = new Date(time), minute = clock.format(at)
  if (day !== at.toDateString()) line('day', calendar.format(at))
  day = at.toDateString()
  if (group?.from !== from || time - group.time > TOGETHER) {
    group = { from, time, minute, el: make('section', from && from === me ? 'group mine' : 'group') }
    group.el.append(make('p', 'head', make('bdi', '', from ?? 'somebody'), stamp(at, minute)))
    group.el.style.setProperty('--hue', hue(from ?? ''))
    log.append(group.el)
  }
  const p = make('div', 'message', words(data))
  p.dataset.id = id
  if (minute !== group.minute) p.append(stamp(at, group.minute = minute))
  group.el.append(p)
  tally[comet.via] = (tally[comet.via] ?? 0) + 1
  if (!following && !mine) below++
}

const stamp = (at, minute) => Object.assign(make('time', '', minute), { dateTime: at.toISOString(), title: at.toLocaleString() })

/** A message's text: links are links, what is long is folded, emoji alone are big. */
function words(data) {
  const text = asText(data)
  const el = Object.assign(make('div', 'text'), { dir: 'auto' })
  let at = 0
  for (const { 0: match, index } of text.matchAll(/\bhttps?:\/\/[^\s<>"]+/gi)) {
    let end = match.length // a full stop or bracket behind a link is not part of it
    for (const marks = match.includes('(') ? '.,:;!?\'' : '.,:;!?\')'; marks.includes(match[end - 1]);) end--
    const href = match.slice(0, end)
    if (!URL.canParse(href)) continue
    const link = Object.assign(make('a', '', href), { href, target: '_blank', rel: 'noopener noreferrer' })
    el.append(text.slice(at, index), link)
    at = index + end
  }
  el.append(text.slice(at))
  if (/^(?:\p{Extended_Pictographic}[\p{Emoji_Modifier}\uFE0F\u200D]*\s?){1,9}$/u.test(text)) el.classList.add('emoji')
  if (text.length < 1500 && text.split('\n', 21).length < 21) return el
  el.classList.add('folded')
  return make('div', 'long', el, button('Show all', more => {
    more.textContent = el.classList.toggle('folded') ? 'Show all' : 'Show less'
    following = atBottom()
  }))
}

const atBottom = () => scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 40

function follow() {
  if (following) scroller.scrollTop = scroller.scrollHeight
  if (following) below = 0
  $('pill').hidden = !below
  $('pill').textContent = count(below, 'new message') + ' ↓'
}
scroller.onscroll = () => {
  following = atBottom()
  if (following) follow()
}
$('pill').onclick = () => {
  following = true
  follow()
  box.focus()
}
new ResizeObserver(follow).observe(scroller) // a keyboard came in, or what is written takes another line

// What we write.

const outbox = new Set // of { text, key, time, el, note, state }, and id as soon as the relay has it

function say(text) {
  const note = make('div', 'note'), time = Date.now()
  const mine = { text, time, note, el: make('div', '', words(text), note), key: time.toString(36) + Math.random().toString(36) }
  outbox.add(mine)
  $('outbox').append(mine.el)
  $('outbox').hidden = false
  $('outbox').classList.toggle('more', group?.from === me)
  deliver(mine)
  comet.presence('online') // that is, not typing any more
  following = true
  follow()
}

/** Sends it; a second time with the same key, so that it can't be said twice. */
async function deliver(mine) {
  mark(mine, 'pending')
  try {
    mine.id = await comet.send(mine.text, { key: mine.key })
    show()
    if (log.querySelector(`[data-id="${mine.id}"]`)) drop(mine) // it came already: only the first answer was lost
    else mark(mine, 'sent')
  } catch (error) {
    mark(mine, 'failed', error)
  }
  follow()
}

/** What an event is of ours. It may come before the relay's answer does: then it is known by its text. */
function ours({ id, from, data }) {
  const all = [...outbox]
  return all.find(mine => mine.id === id) ?? all.find(mine => mine.state === 'pending' && mine.text === data && me === from)
}

function mark(mine, state, error) {
  mine.state = state
  mine.el.className = 'message ' + state
  mine.note.role = error ? 'alert' : null
  mine.note.replaceChildren(...error ?
    [`Not sent: ${error.message}. `, button('Try again', () => deliver(mine)), ' ', button('Discard', () => drop(mine))] :
    [state === 'sent' ? 'sent' : comet.status === 'open' ? 'sending…' : 'waiting for the connection…'])
}

function drop(mine) {
  outbox.delete(mine)
  mine.el.remove()
  $('outbox').hidden = !outbox.size
}

/** What is in the box, and before it what was not sent. */
const draft = () => [...[...outbox].filter(mine => !mine.id).map(mine => mine.text), box.value].join('\n').trim()
addEventListener('pagehide', () => kept.set('draft', draft(), 'sessionStorage'))

function fit() {
  box.style.height = 'auto'
  box.style.height = box.scrollHeight + 2 + 'px'
}
box.oninput = () => {
  fit()
  if (box.value) comet.typing()
}
box.onkeydown = e => {
  if (e.key !== 'Enter' || e.shiftKey || e.isComposing) return
  e.preventDefault()
  $('say').requestSubmit()
}
$('say').onsubmit = e => {
  e.preventDefault()
  const text = box.value.trim()
  box.value = ''
  fit()
  if (text) say(text)
}

// Who is here.

const people = new Map // by name: their line in the list
let crowd // how many, where names are not told

function presence({ from, data }) {
  if (from) return person(from, data)
  const { users = {} } = data
  crowd = data.users ? 0 : data.count
  if (crowd) nobody()
  for (const name of people.keys()) if (!Object.hasOwn(users, name)) person(name, 'offline')
  for (const name in users) person(name, users[name])
}

function person(name, state) {
  let li = people.get(name)
  if (!li && state === 'offline') return
  if (!li) {
    li = Object.assign(make('li', '', make('bdi', '', name), name === me ? ' (you)' : '', make('small')), { person: name })
    li.style.setProperty('--hue', hue(name))
    const behind = ({ person }) => person !== me && (name === me || order(person, name) > 0)
    $('here').insertBefore(li, [...$('here').children].find(behind) ?? null)
    people.set(name, li)
  }
  li.dataset.state = state
  li.lastChild.textContent = STATES[state]
  clearTimeout(li.gone)
  if (state === 'offline') li.gone = setTimeout(() => people.delete(name) && li.remove(), FADE)
}

function nobody() {
  for (const li of people.values()) clearTimeout(li.gone)
  people.clear()
  $('here').replaceChildren()
}

/** What stands around the log and follows from it. */
function standing() {
  const those = state => [...people.values()].filter(li => li.dataset.state === state).map(li => li.person)
  $('count').textContent = $('who').textContent = `${crowd || people.size - those('offline').length} here`
  $('crowd').hidden = !crowd
  const typing = those('typing').filter(name => name !== me)
  const who = typing.length > 3 ? [`${typing.length} people`] : typing
  $('typing').textContent = who[0] ? `${new Intl.ListFormat('en').format(who)} ${typing[1] ? 'are' : 'is'} typing…` : ''
  const by = Object.entries(tally).map(([via, n]) => `${n} by ${called(via)}`)
  $('tally').textContent = `Messages so far: ${by.join(', ') || 'none'}. ${gaps ? count(gaps, 'gap') : 'No gap'}.`
}

// Whether we are here.

let leaving, unlock, looks = 0
const lock = () => `cometes ${room} ${me}`

/** A page that is seen holds a lock, so that a hidden one can tell that we are only looking at another. */
function look() {
  const now = ++looks
  unlock?.()
  clearTimeout(leaving)
  if (document.hidden) leaving = setTimeout(async () => await elsewhere() || comet.presence('away'), AWAY)
  else navigator.locks?.request(lock(), { mode: 'shared' }, () => now === looks && new Promise(free => unlock = free))
}
const elsewhere = async () => (await navigator.locks?.query())?.held.some(({ name }) => name === lock())

function title() {
  document.title = `${unread ? `(${unread}) ` : ''}${room} · Cometes`
}

addEventListener('visibilitychange', () => {
  look()
  if (document.hidden) return
  comet.presence('online')
  unread = 0
  title()
})

function heard(event) {
  later(event)
  if (!document.hidden || log.ariaBusy === 'true' || event.from === me) return
  unread++
  title()
  notify(event)
}

async function notify({ from, data }) {
  if (!kept.get('bell') || window.Notification?.permission !== 'granted' || await elsewhere()) return
  try { // phones throw: they want a service worker for it
    const options = { body: asText(data).slice(0, 200), tag: 'cometes ' + room, icon: '/icon.svg' }
    new Notification(`${from ?? 'Somebody'} in #${room}`, options).onclick = () => focus()
  } catch { }
}

function bell() {
  const { permission } = window.Notification ?? {}
  $('bell').hidden = !permission
  $('bell').disabled = permission === 'denied'
  $('bell').ariaPressed = permission === 'granted' && !!kept.get('bell')
  $('bell').textContent = permission === 'denied' ? 'Notifications are blocked' : 'Notify me while I am away'
}
$('bell').onclick = async () => {
  kept.set('bell', $('bell').ariaPressed === 'true' ? '' : 'on')
  if (Notification.permission === 'default') await Notification.requestPermission()
  bell()
}

$('app').hidden = false
box.value = kept.get('draft', 'sessionStorage')
bell()
enter(address())
fit()
if (matchMedia('(hover: hover)').matches) $(me ? 'text' : 'name').focus() // on a phone it would bring up the keyboard
