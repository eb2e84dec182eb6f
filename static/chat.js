/**
 * chat.js: the chat, and an example of what comet.js is for.
 *
 * One rule keeps it correct: only events of the relay get into the log, in the relay's order. What we write waits below
 * it, in the outbox, until its own event arrives: so it is seen at once, yet all see the same order, and nothing
 * twice. Another keeps it safe: no text of a user is ever HTML.
 */
import { Comet } from './comet.js'
import { access, askForToken } from './token.js'

const KEEP = 1000 // messages in the page; then the oldest go
const TOGETHER = 5 * 60e3 // ms within which what somebody says stands under one name
const AWAY = 60e3 // ms hidden, and we are away
const FADE = 8e3 // ms for which who left is still shown; style.css knows it too
const HISTORY = 1e3 // ms after connecting; what comes later is news

const GAPS = {
  history: 'the relay keeps only the newest',
  restart: 'the relay was restarted, and what it kept is gone',
  future: 'the relay was restarted, and has less than this page',
}
const STATES = { online: '', typing: 'typing…', away: 'away', offline: 'left' }

const $ = id => document.getElementById(id)
$('plain').remove()
$('markup').insertAdjacentHTML('afterend', $('markup').textContent)
$('markup').remove()

const log = $('log'), scroller = $('scroller'), box = $('text')
const clock = new Intl.DateTimeFormat([], { timeStyle: 'short' })
const calendar = new Intl.DateTimeFormat([], { weekday: 'long', day: 'numeric', month: 'long' })
const order = new Intl.Collator().compare
const count = (n, one) => `${n} ${one}${n === 1 ? '' : 's'}`
const called = via => $('menu').querySelector(`[value="${via}"] + b`)?.textContent
const asText = data => typeof data === 'string' ? data : String(JSON.stringify(data))

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

/** What is stored: in this tab, which keeps its name so (a duplicate of it is the same person), or in the browser. */
const store = area => ({
  get(key) { try { return window[area].getItem('cometes ' + key) || '' } catch { return '' } },
  set(key, value) { try { window[area].setItem('cometes ' + key, value) } catch { } },
})
const tab = store('sessionStorage'), kept = store('localStorage')

// Colours.

const COLOURS = 24 // 12 hues, light and dark
const colours = new Map // by name

/** A name's colour: the same in every browser, unless another name on the page has it already. */
function colour(name) {
  if (colours.has(name)) return colours.get(name)
  let hash = 0
  for (const c of name) hash = Math.imul(hash ^ c.codePointAt(0), 0x5bd1e995) ^ hash >>> 15
  let n = (hash >>> 0) % COLOURS
  if (colours.size === COLOURS) return n
  for (const taken = [...colours.values()]; taken.includes(n);) n = (n + 7) % COLOURS
  colours.set(name, n)
  return n
}

function paint(el, name) {
  const n = colour(name)
  el.style.setProperty('--hue', n % 12 * 30 + 15)
  el.classList.toggle('second', n >= 12)
}

// Rooms and names.

let comet, listening // the client, and what ends our listening to it
let room, rights
let me = clean(new URLSearchParams(location.search).get('user') ?? '') || tab.get('name')

/** What the relay takes for a name: without control characters and those that change the direction of text. */
function clean(name) {
  const plain = name.replace(/[\p{Cc}\u061C\u200E\u200F\u2028-\u202E\u2066-\u2069]/gu, '').trim()
  return [...plain].slice(0, 64).join('').trim()
}
let unread, below, gaps, tally // messages since the page was hidden; below what is seen; gaps; messages by technique

/** The room in the address, /?room=lobby or #lobby. */
function address() {
  const { hash, searchParams } = new URL(location)
  const name = hash.slice(1) || searchParams.get('room') || ''
  return name.trim().replace(/[^A-Za-z0-9_.:-]+/g, '-').slice(0, 64) || 'lobby'
}

async function enter(name) {
  box.value = draft() // what was not sent was meant for the other room: let us see it
  outbox.forEach(drop)
  room = $('room').value = name
  $('room').size = Math.max(5, name.length)
  box.placeholder = 'Write to #' + name
  log.replaceChildren()
  log.ariaBusy = true // nobody wants the history read out
  group = day = way = undefined
  unread = below = gaps = 0
  tally = {}
  due = []
  following = true
  colours.clear()
  if (!comet || rights.required) {
    listening?.abort()
    comet?.close()
    nobody()
    $('say').inert = true
    rights = await access(name)
    if (name !== room) return
    $('say').inert = false
  }
  allowed()
}

/** Offers what the token allows, if the relay asks for one. */
function allowed() {
  const { required, refused, user, read, write, error } = rights
  me = user || me
  $('me').disabled = !!user
  $('token').hidden = !refused
  $('another').hidden = !required || refused
  box.disabled = $('send').disabled = !write
  box.placeholder = write ? 'Write to #' + room : 'Your token does not allow you to write here'
  const url = String(new URL('rooms/' + room, location)).replace('http://', '')
  $('curl').textContent = `curl ${required ? '-H "Authorization: Bearer $TOKEN" ' : ''}-d hi ${/^[\w.:/%~-]+$/.test(url) ? url : `'${url.replaceAll("'", "'\\''")}'`}`
  title()
  links()
  if (refused) ask(error)
  else if (!read) line('gap', 'Your token does not allow you to read this room.')
  if (read || write) connect()
  else told({ status: 'closed', error: new Error(refused ? 'this relay asks for a token' : 'your token is for other rooms') })
}

function links() {
  const query = me && '?' + new URLSearchParams({ user: me })
  $('endless').href = `rooms/${room}/html${query}`
  $('anew').href = `rooms/${room}/refresh${query}`
}

const ask = error => askForToken($('token'), error, `-read ${room} -write ${room}`)
$('another').onclick = () => {
  if ($('people').matches(':popover-open')) $('people').hidePopover()
  if ($('token').hidden) ask()
  else $('token').hidden = true
}

/** Connects under our name; again when room or name change. With a cursor, what is on the page goes on. */
function connect(after) {
  listening?.abort()
  comet?.close()
  nobody()
  comet = new Comet('/rooms/' + room, { user: me || undefined, presence: true, last: 100, after })
  const { signal } = listening = new AbortController()
  comet.addEventListener('status', e => told(e.detail), { signal })
  comet.addEventListener('event', e => heard(e.detail), { signal })
  const { value } = $('menu').elements.way
  if (value !== 'auto') comet.use(value)
  named(!!me)
  $('me').replaceChildren('as ', make('bdi', '', me))
  $('outbox').querySelector('bdi').textContent = me
  paint($('outbox'), me)
  look()
  show()
}

function named(is) {
  if (!is && $('naming').hidden) $('name').value = me || kept.get('name')
  $('naming').hidden = is
  taken()
  $('say').hidden = $('me').hidden = !is
}

$('go').onsubmit = e => {
  e.preventDefault()
  const name = $('room').value
  if (name === room) return
  history.pushState(null, '', '?room=' + name)
  enter(name)
  focusOn()
}
$('room').onblur = () => { $('room').value = room } // only Enter goes there
onpopstate = onhashchange = () => address() === room || enter(address())

$('me').onclick = () => {
  named(false)
  $('name').select()
}
$('name').onkeydown = e => {
  if (e.key !== 'Escape' || !me) return
  named(true)
  box.focus()
}
$('naming').onsubmit = e => {
  e.preventDefault()
  const name = clean($('name').value), url = new URL(location)
  if (!name) return
  if (name === me) named(true)
  else {
    me = name
    tab.set('name', me)
    kept.set('name', me)
    url.searchParams.delete('user')
    history.replaceState(null, '', url)
    links()
    connect(comet.cursor)
  }
  box.focus()
}
$('name').oninput = taken

/** A name is whoever uses it. */
function taken() {
  const name = clean($('name').value)
  const is = name !== me && (people.get(name)?.dataset.state ?? 'offline') !== 'offline'
  if ($('taken').querySelector('bdi')?.textContent === (is ? name : undefined)) return // it would be read out again
  $('taken').replaceChildren(...is ? ['Somebody here is already called ', make('bdi', '', name), '. You will be taken for the same person.'] : [])
}

function focusOn() {
  if (!matchMedia('(hover: hover)').matches || !$('token').hidden) return // on a phone it would bring up the keyboard
  if (me) box.focus()
  else $('name').select()
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
    status === 'closed' ? `: ${error?.status === 401 ? 'this relay asks for a token' : error?.message}` :
    retryIn ? ` in ${Math.max(1, Math.ceil((at - Date.now()) / 1e3))} s` : '…'
  clearInterval(ticking)
  if (status === 'reconnecting' && retryIn) ticking = setInterval(more, 1e3)
  more()
  $('trouble').textContent = !error ? '' : `${status === 'open' ? 'That is not to be had' : 'Trouble'}: ${error.message}.`
  for (const mine of outbox) if (mine.state === 'pending') mark(mine, 'pending')
  if (status === 'closed' && error?.status === 401) ask(rights.exp * 1e3 < Date.now() ? 'it has expired' : error.message)
  if (status !== 'open') return
  if (log.ariaBusy === 'true') setTimeout(() => log.ariaBusy = false, HISTORY)
  if (way && way !== via) later(way => line('way', 'from here on by ' + called(way)), via)
  way = via
}

$('menu').onchange = e => comet?.use(e.target.value === 'auto' ? null : e.target.value)
$('menu').onsubmit = e => e.preventDefault()

// The log. A burst is written at once, and costs one layout.

let due, timer // what is to be written, and when
let group, day, way // the last of each: the messages under one name, the date, the technique
let following // stay at the bottom

function later(write, event) {
  due.push([write, event])
  timer ??= setTimeout(show, 20)
}

function show() {
  clearTimeout(timer)
  timer = undefined
  for (const [write, event] of due.splice(0)) {
    try {
      for (const mine of outbox) if (mine.id < event.id) message({ ...mine, data: mine.text, from: me }) // its own event is lost
      write(event)
    } catch (error) { // of this event nothing but the event itself can be shown
      console.error(error)
      group = undefined
      const raw = make('div', 'message raw', words(event))
      raw.dataset.id = event?.id
      log.append(raw)
    }
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

function gap({ data }) {
  if (data?.reason === 'erased') {
    log.replaceChildren()
    day = undefined
    below = 0
    return line('gap', 'An operator erased what was here.')
  }
  gaps++
  line('gap', `Some messages may be missing here: ${GAPS[data?.reason] ?? 'the relay lost them'}.`)
}

/** A line across the log. Of two of a kind with nothing between them, the newer counts. */
function line(kind, text) {
  group = undefined
  if (log.lastElementChild?.className === kind) log.lastElementChild.textContent = text
  else log.append(make('p', kind, text))
}

/** Whatever was published. A message's type goes without saying. */
function message({ id, type = 'message', from, time, data }) {
  const mine = ours({ id, from, data })
  if (mine) drop(mine)
  const at = new Date(time), minute = clock.format(at)
  if (day !== at.toDateString()) line('day', calendar.format(at))
  day = at.toDateString()
  if (!group || group.from !== from || time - group.time > TOGETHER) {
    group = { from, time, minute, el: make('section', from && from === me ? 'group mine' : 'group') }
    group.el.append(make('p', 'head', make('bdi', '', from ?? 'somebody'), stamp(at, minute)))
    paint(group.el, from ?? '')
    log.append(group.el)
  }
  const p = make('div', 'message', words(data))
  p.dataset.id = id
  if (type !== 'message') p.prepend(make('code', 'type', type))
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
    const href = trimmed(match), end = href.length
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

/** A link without what stands behind it: a bracket that was opened before it, a full stop. */
function trimmed(link) {
  const open = [], pairs = { '(': ')', '[': ']', '{': '}' }
  let end = 0
  for (; end < link.length; end++) {
    if (pairs[link[end]]) open.push(pairs[link[end]])
    else if (')]}'.includes(link[end]) && open.pop() !== link[end]) break
  }
  while ('.,:;!?\'…’”»'.includes(link[end - 1])) end--
  return link.slice(0, end)
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
addEventListener('pagehide', () => tab.set('draft', draft()))

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
    paint(li, name)
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
  const parts = new Intl.ListFormat('en').formatToParts(who).map(({ type, value }) => type === 'element' ? make('bdi', '', value) : value)
  $('typing').replaceChildren(...who[0] ? [...parts, typing[1] ? ' are typing…' : ' is typing…'] : [])
  const by = Object.entries(tally).map(([via, n]) => `${n} by ${called(via)}`)
  taken()
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
  if (document.hidden) leaving = setTimeout(async () => await elsewhere() || comet?.presence('away'), AWAY)
  else navigator.locks?.request(lock(), { mode: 'shared' }, () => now === looks && new Promise(free => unlock = free))
}
const elsewhere = async () => (await navigator.locks?.query())?.held.some(({ name }) => name === lock())

function title() {
  document.title = `${unread ? `(${unread}) ` : ''}${room} · Cometes`
}

addEventListener('visibilitychange', () => {
  look()
  if (document.hidden) return
  comet?.presence('online')
  unread = 0
  title()
})

function heard(event) {
  const { type } = event
  later(type === 'presence' ? presence : type === 'gap' ? gap : message, event)
  if (type !== 'message' || !document.hidden || log.ariaBusy === 'true' || event.from === me) return
  unread++
  title()
  notify(event)
}

async function notify({ from, data }) {
  if (!kept.get('bell') || window.Notification?.permission !== 'granted' || await elsewhere()) return
  try { // phones throw: they want a service worker for it
    const options = { body: asText(data).slice(0, 200), tag: 'cometes ' + room, icon: 'icon.svg' }
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

tab.set('name', me)
box.value = tab.get('draft')
bell()
$('app').hidden = false
fit()
await enter(address())
focusOn()
