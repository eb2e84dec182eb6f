/**
 * chat.js: the chat, and an example of how to use comet.js.
 *
 * Only events from the relay are added to the log, in the relay's order. A message that the user sends waits below the
 * log, in the outbox, until its own event arrives. So it is visible at once, all users see the same order, and nothing
 * is shown twice. Text of a user is never inserted as HTML.
 */
import { Comet } from './comet.js'
import { imagesOf, isPicture, toDataURL } from './images.js'
import { access, askForToken, copy, copyButton, insertMarkup, names, quoteForShell } from './page.js'
import { applyColour, browserStorage, cleanName, colourOf, make, nameTechniques, showStatus, tabStorage } from './people.js'

const MAX_MESSAGES = 1000 // in the page; older ones are removed
const GROUP_TIME = 5 * 60e3 // ms; within it a user's messages are shown under one name
const AWAY_AFTER = 60e3 // ms that the page is hidden before the user is away
const FADE_TIME = 8e3 // ms for which a user who left is still listed; also in style.css
const HISTORY_TIME = 1e3 // ms after connecting; a message that arrives later is new

const GAPS = {
  history: 'the relay keeps only the newest',
  restart: 'the relay was restarted, and its history is gone',
  future: 'the relay was restarted, and has fewer messages than this page',
}
const STATES = { online: '', typing: 'typing…', away: 'away', offline: 'left' }

const $ = id => document.getElementById(id)
$('plain').remove()
insertMarkup()

const log = $('log'), scroller = $('scroller'), input = $('text')
const clock = new Intl.DateTimeFormat([], { timeStyle: 'short' })
const calendar = new Intl.DateTimeFormat([], { weekday: 'long', day: 'numeric', month: 'long' })
const compare = new Intl.Collator().compare
const plural = (n, one) => `${n} ${one}${n === 1 ? '' : 's'}`
const asText = data => typeof data === 'string' ? data : String(JSON.stringify(data))

const button = (label, press) => {
  const el = make('button', '', label)
  return Object.assign(el, { type: 'button', onclick: () => press(el) })
}

// Rooms and names.

let comet
let listeners // an AbortController for our listeners
let room, rights // rights: what the token allows in the room
let unread // messages since the page was hidden
let newBelow // new messages below the visible part of the log
let gapCount, countByVia // gaps; messages by technique
let me = cleanName(new URLSearchParams(location.search).get('user') ?? '') || tabStorage.get('name')

/** The room in the URL: ?room=lobby or #lobby. */
function roomInURL() {
  const { hash, searchParams } = new URL(location)
  const name = (new URLSearchParams('r=' + hash.slice(1).replaceAll('+', '%2B')).get('r') || searchParams.get('room') || '').trim()
  const room = name.replace(/[^A-Za-z0-9_.:-]+/g, '-').slice(0, 64) || 'lobby'
  showNoRoom(name && name !== room && name)
  return room
}

/** Says why a name is none, below it. */
function showNoRoom(name) {
  $('noroom').replaceChildren(...!name ? [] : ['A room cannot be called ', make('bdi', '', name.length > 64 ? name.slice(0, 64) + '…' : name), ': 1 to 64 letters without accents, digits, or _ . : - and no spaces.'])
}

async function enterRoom(name) {
  input.value = draft() // messages for the old room that were not sent: the user decides
  outbox.forEach(discard)
  room = $('room').value = name
  $('room').size = Math.max(5, name.length)
  input.placeholder = 'Write to #' + name
  log.replaceChildren()
  log.ariaBusy = true // a screen reader does not read the history out
  lastGroup = lastDay = lastVia = lastMoves = undefined
  hasAll = false
  unread = newBelow = gapCount = 0
  countByVia = {}
  pending = []
  following = true
  colourOf.clear()
  if (!comet || rights.required) {
    listeners?.abort()
    comet?.close()
    clearPeople()
    $('say').inert = true
    rights = await access(name)
    if (name !== room) return
    $('say').inert = false
  }
  applyRights()
}

/** Enables what the token allows, if the relay requires one. */
function applyRights() {
  const { required, refused, user, read, write, error } = rights
  me = user || me
  $('me').disabled = !!user
  $('token').hidden = !refused
  $('another').hidden = !required || refused
  input.disabled = $('send').disabled = !write
  input.placeholder = write ? 'Write to #' + room : 'Your token does not allow you to write here'
  const url = String(new URL('rooms/' + room, location)).replace('http://', '')
  $('curl').textContent = `curl ${required ? '-H "Authorization: Bearer $TOKEN" ' : ''}-d hi ${quoteForShell(url)}`
  updateTitle()
  updateLinks()
  if (refused) showTokenForm(error)
  else if (!read) addLine('gap', 'Your token does not allow you to read this room.')
  if (read || write) connect()
  else onStatus({ status: 'closed', error: new Error(refused ? 'this relay asks for a token' : 'your token is for other rooms') })
}

function updateLinks() {
  const query = me && '?' + new URLSearchParams({ user: me })
  $('endless').href = `rooms/${room}/html${query}`
  $('anew').href = `rooms/${room}/refresh${query}`
}

const showTokenForm = error => askForToken($('token'), error, `-read ${room} -write ${room}`)
$('another').onclick = () => {
  if ($('people').matches(':popover-open')) $('people').hidePopover()
  if ($('token').hidden) showTokenForm()
  else $('token').hidden = true
}

/** Connects under the user's name; again when room or name change. With a cursor, the log continues. */
function connect(after) {
  listeners?.abort()
  comet?.close()
  clearPeople()
  comet = new Comet('/rooms/' + room, { user: me || undefined, presence: true, last: 100, after })
  const { signal } = listeners = new AbortController()
  comet.addEventListener('status', e => onStatus(e.detail), { signal })
  comet.addEventListener('event', e => onEvent(e.detail), { signal })
  const { value } = $('menu').elements.way
  if (value !== 'auto') comet.use(value)
  showNaming(!me)
  $('me').replaceChildren('as ', make('bdi', '', me))
  $('outbox').querySelector('bdi').textContent = me
  applyColour($('outbox'), me)
  updateVisibility()
  render()
}

/** Shows the form for the name, or the form for messages. */
function showNaming(show) {
  if (show && $('naming').hidden) $('name').value = me || browserStorage.get('name')
  $('naming').hidden = !show
  warnIfTaken()
  $('say').hidden = $('me').hidden = show
}

$('go').onsubmit = e => {
  e.preventDefault()
  const name = $('room').value.trim()
  if (name === room || !/^[\w.:-]{1,64}$/.test(name)) return showNoRoom(name !== room && name)
  showNoRoom()
  history.pushState(null, '', '?room=' + name)
  enterRoom(name)
  focusOn()
}
$('room').onblur = () => { // only Enter changes the room
  $('room').value = room
  showNoRoom()
}
onpopstate = onhashchange = () => roomInURL() === room || enterRoom(roomInURL())

$('me').onclick = () => {
  showNaming(true)
  $('name').select()
}
$('name').onkeydown = e => {
  if (e.key !== 'Escape' || !me) return
  showNaming(false)
  input.focus()
}
$('naming').onsubmit = e => {
  e.preventDefault()
  const name = cleanName($('name').value)
  if (!name) return
  if (name === me) showNaming(false)
  else rename(name)
  input.focus()
}

function rename(name) {
  const url = new URL(location)
  me = name
  tabStorage.set('name', me)
  browserStorage.set('name', me)
  url.searchParams.delete('user')
  history.replaceState(null, '', url)
  updateLinks()
  connect(comet.cursor)
}
$('name').oninput = warnIfTaken

/** Names are not reserved: two people with one name are one user. */
function warnIfTaken() {
  const name = cleanName($('name').value)
  const taken = name !== me && (people.get(name)?.dataset.state ?? 'offline') !== 'offline'
  if ($('taken').querySelector('bdi')?.textContent === (taken ? name : undefined)) return // or a screen reader reads it out again
  $('taken').replaceChildren(...taken ? ['Somebody here is already called ', make('bdi', '', name), '. You will be taken for the same person.'] : [])
}

function focusOn() {
  if (!matchMedia('(hover: hover)').matches || !$('token').hidden) return // on a phone the keyboard would appear
  if (me) input.focus()
  else $('name').select()
}

// The connection.

function onStatus(detail) {
  const { status, via, error } = detail
  showStatus(detail)
  for (const mine of outbox) if (mine.state === 'pending') setState(mine, 'pending')
  if (status === 'closed' && error?.status === 401) showTokenForm(rights.exp * 1e3 < Date.now() ? 'it has expired' : error.message)
  if (status !== 'open') return
  if (log.ariaBusy === 'true') setTimeout(() => log.ariaBusy = false, HISTORY_TIME)
  if (lastVia && lastVia !== via) enqueue(() => addLine('way', 'from here on by ' + names[via]))
  lastVia = via
}

$('menu').onchange = e => comet?.use(e.target.value === 'auto' ? null : e.target.value)
$('menu').onsubmit = e => e.preventDefault()

// The log. Events that arrive within 20 ms are rendered together, with one layout.

let pending, renderTimer // [function, event] to render
let lastGroup, lastDay, lastVia // at the log's end: the messages under one name, the date, the technique
let lastMoves // who joined and left, in the line at the log's end
let target = log // where messages are added: the log, or what will be above it
let hasAll // the log begins where the relay's history begins
let following // the log is scrolled to its end, and stays there

function enqueue(show, event) {
  pending.push([show, event])
  renderTimer ??= setTimeout(render, 20)
}

function render() {
  clearTimeout(renderTimer)
  renderTimer = undefined
  for (const [show, event] of pending.splice(0)) {
    try {
      for (const mine of outbox) if (mine.id < event?.id) showMessage({ ...mine, data: mine.text, from: me }) // its own event was lost
      show(event)
    } catch (error) { // show the event as it is
      console.error(error)
      lastGroup = undefined
      const raw = make('div', 'message raw', textElement(event))
      raw.dataset.id = event?.id
      log.append(raw)
    }
  }
  while (log.getElementsByClassName('message').length > MAX_MESSAGES) oldestElement().remove()
  updateSummary()
  keepAtEnd()
}

/** The oldest message or line, or a name with its last message; but not the date above the messages that remain. */
function oldestElement() {
  const [first, second] = log.children
  const el = first.className === 'day' && second.className !== 'day' ? second : first
  return el.classList.contains('group') && el.childElementCount > 2 ? el.children[1] : el
}

function showGap({ data }) {
  if (data?.reason === 'erased') {
    log.replaceChildren()
    lastDay = undefined
    newBelow = 0
    hasAll = true
    return addLine('gap', 'An operator erased the messages that were here.')
  }
  gapCount++
  addLine('gap', `Some messages may be missing here: ${GAPS[data?.reason] ?? 'the relay lost them'}.`)
}

/** Adds a line across the log. It replaces a line of the same kind that is directly above. */
function addLine(kind, ...content) {
  lastGroup = undefined
  if (target.lastElementChild?.className === kind) target.lastElementChild.replaceChildren(...content)
  else target.append(make('p', kind, ...content))
}

/** Says who joined and who left. Several in a row are one line, which names three of each. */
function showMove(name, joined) {
  if (log.lastElementChild?.className !== 'move') lastMoves = { joined: new Set, left: new Set }
  const { joined: came, left: went } = lastMoves
  ;(joined ? went : came).delete(name)
  ;(joined ? came : went).add(name)
  const list = (all, verb) => {
    const shown = [...all].slice(all.size > 4 ? -3 : 0).map(name => make('bdi', '', name))
    if (all.size > 4) shown.push(`${all.size - 3} others`)
    return !all.size ? [] : [make('span', '', ...shown.flatMap((el, i) => i ? [i < shown.length - 1 ? ', ' : ' and ', el] : el), verb)]
  }
  const parts = [...list(came, ' joined'), ...list(went, ' left')]
  addLine('move', ...parts[1] ? [parts[0], '; ', parts[1]] : parts)
}

/** Shows any published event. The type is shown unless it is message. */
function showMessage({ id, type = 'message', from, time, data }) {
  const mine = findInOutbox({ id, from, data })
  if (mine) discard(mine)
  const at = new Date(time), minute = clock.format(at)
  if (lastDay !== at.toDateString()) addLine('day', calendar.format(at))
  lastDay = at.toDateString()
  if (!lastGroup || lastGroup.from !== from || time - lastGroup.time > GROUP_TIME) {
    lastGroup = { from, time, minute, el: make('section', from && from === me ? 'group mine' : 'group') }
    lastGroup.el.append(make('p', 'head', make('bdi', '', from ?? 'somebody'), timeElement(at, minute)))
    applyColour(lastGroup.el, from ?? '')
    target.append(lastGroup.el)
  }
  const picture = isPicture({ type, data })
  const p = make('div', mentionsMe({ from, data }) ? 'message mention' : 'message', picture ? pictureElement(from, data) : textElement(data))
  p.dataset.id = id
  if (type !== 'message' && !picture) p.prepend(make('code', 'type', type))
  if (minute !== lastGroup.minute) p.append(timeElement(at, lastGroup.minute = minute))
  lastGroup.el.append(p)
  if (target !== log) return
  countByVia[comet.via] = (countByVia[comet.via] ?? 0) + 1
  if (!following && !mine) newBelow++
}

const timeElement = (at, minute) => Object.assign(make('time', '', minute), { dateTime: at.toISOString(), title: at.toLocaleString() })

/** Whether a message of somebody else has @ and this user's name in it. */
function mentionsMe({ from, data }) {
  const text = asText(data).toLowerCase(), name = '@' + me?.toLowerCase()
  if (!me || from === me) return false
  for (let at = -1; (at = text.indexOf(name, at + 1)) >= 0;) if (!/[\p{L}\p{N}_]/u.test(text.slice(at + name.length, at + name.length + 1))) return true
  return false
}

/** A message's text. URLs become links, what is between backticks is code, long text is folded, and emoji alone are big. */
function textElement(data) {
  const text = asText(data)
  const el = Object.assign(make('div', 'text'), { dir: 'auto' })
  let at = 0
  for (const { 0: match, 1: block, 2: code, index } of text.matchAll(/```\n?([^]+?)\n?```|`([^`\n]+)`|\bhttps?:\/\/[^\s<>"]+/gi)) {
    if (block ?? code) {
      el.append(text.slice(at, index), make('code', block ? 'block' : '', block ?? code))
      at = index + match.length
      continue
    }
    const href = trimLink(match), end = href.length
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

/** A picture. Its height is known only when it is decoded. */
const pictureElement = (from, src) => make('div', 'text', Object.assign(new Image, { className: 'picture', src, alt: `a picture by ${from ?? 'somebody'}`, onload: keepAtEnd }))

/** Removes what follows a URL in a sentence: a full stop, or a closing bracket that was opened before the URL. */
function trimLink(link) {
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

/** Scrolls to the end if the user has not scrolled up; otherwise shows the number of new messages below. */
function keepAtEnd() {
  if (following) scroller.scrollTop = scroller.scrollHeight
  if (following) newBelow = 0
  const words = plural(newBelow, 'new message') + ' ↓'
  $('pill').hidden = !newBelow
  if ($('pill').textContent !== words) $('pill').textContent = words // or a screen reader reads it out again
}
scroller.onscroll = () => {
  following = atBottom()
  if (following) keepAtEnd()
  else if (scroller.scrollTop < 200) showOlder()
}

/** Shows the history before the log, which began with the newest hundred. A poll's answer has a part of it. */
async function showOlder() {
  const [first] = log.getElementsByClassName('message'), where = room
  if (hasAll || !first || !rights.read) return
  hasAll = true
  const older = []
  try {
    for (let query = { last: MAX_MESSAGES }, before = +first.dataset.id; ;) {
      const url = `rooms/${where}/poll?` + new URLSearchParams({ ...query, presence: 0, _: Math.random() })
      const { events, cursor } = await (await fetch(url)).json()
      older.push(...events.filter(({ type, id }) => type !== 'presence' && type !== 'gap' && id < before))
      if (!events.length || cursor >= before) break
      query = { after: cursor }
    }
  } catch { return hasAll = false } // scrolling tries again
  if (where !== room || !first.isConnected) return
  const saved = [lastGroup, lastDay]
  target = make('div')
  lastGroup = lastDay = undefined
  addLine('way', older.length ? 'the relay keeps no older messages' : 'this is all that the relay keeps')
  for (const event of older) showMessage(event)
  const { scrollHeight, scrollTop } = scroller
  if (log.firstElementChild.className === 'day' && log.firstElementChild.textContent === [...target.querySelectorAll('.day')].at(-1)?.textContent) log.firstElementChild.remove()
  log.prepend(...target.children)
  target = log
  ;[lastGroup, lastDay] = saved
  scroller.scrollTop = scrollTop + scroller.scrollHeight - scrollHeight
}
$('pill').onclick = () => {
  following = true
  keepAtEnd()
  input.focus()
}
new ResizeObserver(keepAtEnd).observe(scroller) // the phone's keyboard appears, or the input grows

// Messages of this user.

const outbox = new Set // of { text, key, time, el, note, state }; and id, once the relay has answered

function submit(text, type) {
  showNoRoom()
  const note = make('div', 'note'), time = Date.now()
  const mine = { text, type, time, note, el: make('div', '', type ? pictureElement(me, text) : textElement(text), note), key: time.toString(36) + Math.random().toString(36) }
  outbox.add(mine)
  $('outbox').append(mine.el)
  $('outbox').hidden = false
  $('outbox').classList.toggle('more', lastGroup?.from === me)
  send(mine)
  comet.presence('online') // no longer typing
  following = true
  keepAtEnd()
}

/** Sends a message. A retry has the same key, so it is not published twice. */
async function send(mine) {
  setState(mine, 'pending')
  try {
    mine.id = await comet.send(mine.text, { key: mine.key, type: mine.type })
    render()
    if (log.querySelector(`[data-id="${mine.id}"]`)) discard(mine) // its event has arrived already: only the first answer was lost
    else setState(mine, 'sent')
  } catch (error) {
    setState(mine, 'failed', error)
  }
  keepAtEnd()
}

/** Finds the message in the outbox that an event belongs to. If the event arrives before the answer to POST, its text is compared. */
function findInOutbox({ id, from, data }) {
  const all = [...outbox]
  return all.find(mine => mine.id === id) ?? all.find(mine => mine.state === 'pending' && mine.text === data && me === from)
}

function setState(mine, state, error) {
  mine.state = state
  mine.el.className = 'message ' + state
  mine.note.role = error ? 'alert' : null
  const useless = error?.status >= 400 && error.status < 500 && error.status !== 429 // to try again
  const why = error?.status === 413 ? 'It is too long for this relay. Make it shorter' : error?.message
  mine.note.replaceChildren(...error ?
    [`Not sent: ${why}. `, useless && mine.type ? '' : useless ? button('Edit', () => edit(mine)) : button('Try again', () => send(mine)), ' ', button('Discard', () => discard(mine))] :
    [state === 'sent' ? 'sent' : comet.status === 'open' ? 'sending…' : 'waiting for the connection…'])
}

/** Takes a message back into the input. */
function edit(mine) {
  discard(mine)
  input.value = [input.value, mine.text].filter(Boolean).join('\n')
  fitHeight()
  input.focus()
}

function discard(mine) {
  outbox.delete(mine)
  mine.el.remove()
  $('outbox').hidden = !outbox.size
}

/** Messages that were not sent, and the text in the input. */
const draft = () => [...[...outbox].filter(mine => !mine.id && !mine.type).map(mine => mine.text), input.value].join('\n').trim()
addEventListener('pagehide', () => tabStorage.set('draft', draft()))

function fitHeight() {
  input.style.height = 'auto'
  input.style.height = input.scrollHeight + 2 + 'px'
}
input.oninput = () => {
  fitHeight()
  if (input.value) comet.typing()
}
input.onkeydown = e => {
  if (e.key !== 'Enter' || e.shiftKey || e.isComposing) return
  e.preventDefault()
  $('say').requestSubmit()
}
$('say').onsubmit = e => {
  e.preventDefault()
  const text = input.value.trim()
  input.value = ''
  fitHeight()
  const nick = /^\/nick(\s+(.*))?$/.exec(text)
  if (nick) changeNick(cleanName(nick[2] ?? ''))
  else if (text) submit(text)
}

/** Pictures that are pasted into the input, or dropped anywhere. */
async function sendImages(e) {
  const files = imagesOf(e.clipboardData ?? e.dataTransfer)
  if (!files.length) return
  e.preventDefault()
  for (const file of files) {
    try {
      submit(await toDataURL(file), 'image')
    } catch { addLine('way', `this browser cannot read the picture ${file.name}`) }
  }
}
input.onpaste = sendImages
$('app').ondragover = e => { if (e.dataTransfer.types.includes('Files')) e.preventDefault() }
$('app').ondrop = e => { if (!input.disabled) sendImages(e) }

/** /nick NAME changes the name; /nick alone asks for it. */
function changeNick(name) {
  if (rights.user) return addLine('way', 'your token says who you are')
  if (name && name !== me) return rename(name)
  if (name) return
  $('me').click()
}

// Who is here.

const people = new Map // name → list item
let hasRoster // what comes after it is news
let crowdCount // the number of users, if the roster has no names

function showPresence({ from, data }) {
  if (from) {
    const isHere = name => (people.get(name)?.dataset.state ?? 'offline') !== 'offline'
    const before = isHere(from)
    showPerson(from, data)
    if (before !== isHere(from) && from !== me && hasRoster) showMove(from, !before)
    return
  }
  hasRoster = true
  const { users = {} } = data
  crowdCount = data.users ? 0 : data.count
  if (crowdCount) clearPeople()
  for (const name of people.keys()) if (!Object.hasOwn(users, name)) showPerson(name, 'offline')
  for (const name in users) showPerson(name, users[name])
}

function showPerson(name, state) {
  let li = people.get(name)
  if (!li && state === 'offline') return
  if (!li) {
    li = Object.assign(make('li', '', make('bdi', '', name), name === me ? ' (you)' : '', make('small')), { person: name })
    applyColour(li, name)
    const comesAfter = ({ person }) => person !== me && (name === me || compare(person, name) > 0)
    $('here').insertBefore(li, [...$('here').children].find(comesAfter) ?? null)
    people.set(name, li)
  }
  li.dataset.state = state
  li.lastChild.textContent = STATES[state]
  clearTimeout(li.removeTimer)
  if (state === 'offline') li.removeTimer = setTimeout(() => people.delete(name) && li.remove(), FADE_TIME)
}

function clearPeople() {
  hasRoster = false
  for (const li of people.values()) clearTimeout(li.removeTimer)
  people.clear()
  $('here').replaceChildren()
}

/** Updates what is shown around the log: counts, who is typing, whether the name is taken. */
function updateSummary() {
  const withState = state => [...people.values()].filter(li => li.dataset.state === state).map(li => li.person)
  $('count').textContent = $('who').textContent = `${crowdCount || people.size - withState('offline').length} here`
  $('crowd').hidden = !crowdCount
  const typing = withState('typing').filter(name => name !== me)
  const who = typing.length > 3 ? [`${typing.length} people`] : typing
  const parts = new Intl.ListFormat('en').formatToParts(who).map(({ type, value }) => type === 'element' ? make('bdi', '', value) : value)
  const words = who[0] ? [...parts, typing[1] ? ' are typing…' : ' is typing…'] : []
  if ($('typing').textContent !== make('p', '', ...words).textContent) $('typing').replaceChildren(...words) // or a screen reader reads it out again
  const by = Object.entries(countByVia).map(([via, n]) => `${n} by ${names[via]}`)
  $('tally').textContent = `Messages so far: ${by.join(', ') || 'none'}. ${gapCount ? plural(gapCount, 'gap') : 'No gap'}.`
  warnIfTaken()
}

// Whether the user looks at the page.

let awayTimer, releaseLock, lockCount = 0
const lockName = () => `cometes ${room} ${me}`

/** A visible page holds a lock. So a hidden page knows that the user looks at another page, and is not away. */
function updateVisibility() {
  const count = ++lockCount
  releaseLock?.()
  clearTimeout(awayTimer)
  if (document.hidden) awayTimer = setTimeout(async () => await visibleElsewhere() || comet?.presence('away'), AWAY_AFTER)
  else navigator.locks?.request(lockName(), { mode: 'shared' }, () => count === lockCount && new Promise(resolve => releaseLock = resolve))
}
const visibleElsewhere = async () => (await navigator.locks?.query())?.held.some(({ name }) => name === lockName())

function updateTitle() {
  document.title = `${unread ? `(${unread}) ` : ''}${room} · Cometes`
}

addEventListener('visibilitychange', () => {
  updateVisibility()
  if (document.hidden) return
  comet?.presence('online')
  unread = 0
  updateTitle()
})

function onEvent(event) {
  const { type } = event
  enqueue(type === 'presence' ? showPresence : type === 'gap' ? showGap : showMessage, event)
  if (type !== 'message' && !isPicture(event) || log.ariaBusy === 'true' || event.from === me) return
  if (mentionsMe(event)) ring()
  if (!document.hidden) return
  unread++
  updateTitle()
  notify(event)
}

const bellIsOn = () => !!browserStorage.get('bell') && window.Notification?.permission === 'granted'

async function notify({ type, from, data }) {
  if (!bellIsOn() || await visibleElsewhere()) return
  const title = `${from ?? 'Somebody'} in #${room}`, options = { body: type === 'image' ? 'a picture' : asText(data).slice(0, 200), tag: 'cometes ' + room, icon: 'icon.svg', data: location.href }
  try { // throws on phones, which require a service worker
    new Notification(title, options).onclick = () => focus()
  } catch {
    const worker = await navigator.serviceWorker?.getRegistration().catch(() => { })
    worker?.showNotification(title, options).catch(() => { })
  }
}

/** A mention rings, if the bell is on and the user looks at something else: two short tones. */
function ring() {
  if (!bellIsOn() || document.hasFocus()) return
  const audio = new AudioContext, volume = audio.createGain()
  volume.gain.value = 0.1
  volume.connect(audio.destination)
  for (const [i, frequency] of [880, 1320].entries()) {
    const tone = audio.createOscillator()
    tone.frequency.value = frequency
    tone.connect(volume)
    tone.start(audio.currentTime + i * 0.15)
    tone.stop(audio.currentTime + i * 0.15 + 0.12)
  }
  setTimeout(() => audio.close(), 1000)
}

function updateBell() {
  const { permission } = window.Notification ?? {}
  const why = !isSecureContext ? 'Browsers notify only over HTTPS, or at localhost.' : permission === 'denied' ? 'Your browser blocks notifications of this site.' : ''
  $('bell').hidden = !permission && isSecureContext
  $('bell').disabled = !!why
  $('silent').textContent = why
  $('bell').ariaPressed = !why && bellIsOn()
}
$('bell').onclick = async () => {
  browserStorage.set('bell', $('bell').ariaPressed === 'true' ? '' : 'on')
  if (Notification.permission === 'default') await Notification.requestPermission()
  updateBell()
  if (bellIsOn()) navigator.serviceWorker?.register('bell.js').catch(() => { }) // phones notify by it
}

$('invite').onclick = async ({ target: button }) => {
  await copy(new URL('./?room=' + room, location).href)
  button.textContent = 'Copied: send it to somebody'
  setTimeout(() => button.textContent = 'Copy an invitation', 3000)
}
$('curl').after(copyButton(() => $('curl').textContent))
nameTechniques()

tabStorage.set('name', me)
input.value = tabStorage.get('draft')
updateBell()
$('app').hidden = false
fitHeight()
await enterRoom(roomInURL())
focusOn()
