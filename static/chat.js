/**
 * chat.js: the chat, and an example of how to use comet.js.
 *
 * Only events from the relay are added to the log, in the relay's order. A message that the user sends waits below the
 * log, in the outbox, until its own event arrives. So it is visible at once, all users see the same order, and nothing
 * is shown twice. Text of a user is never inserted as HTML.
 */
import { $, addCopyButton, curl, here, make, names, plural, quoteForShell, setText } from './page.js'
import { applyColour, browserStorage, cleanName, comet, connect, enterRoom, me, open, people } from './people.js'
import { rename, rights, Room, room, showPresence, summarize, tabStorage } from './people.js'

const MAX_MESSAGES = 1000 // in the page; older ones are removed
const GROUP_TIME = 5 * 60e3 // ms; within it a user's messages are shown under one name
const AWAY_AFTER = 60e3 // ms that the page is hidden before the user is away
const HISTORY_TIME = 1e3 // ms after connecting; a message that arrives later is new

const GAPS = {
  history: 'the relay keeps only the newest',
  restart: 'the relay was restarted',
  future: 'the relay was restarted',
}

const log = $('#log'), scroller = $('#scroller'), input = $('#text')
const clock = new Intl.DateTimeFormat([], { timeStyle: 'short' })
const calendar = new Intl.DateTimeFormat([], { weekday: 'long', day: 'numeric', month: 'long' })
const asText = data => typeof data === 'string' ? data : String(JSON.stringify(data))

const button = (label, onclick) => make('button', { type: 'button', onclick }, label)

// The room, and the connection to it.

let unread // messages since the page was hidden
let newBelow // new messages below the visible part of the log
let gapCount, countByVia // gaps; messages by technique

function enter(name) {
  input.value = draft() // messages for the old room that were not sent: the user decides
  outbox.forEach(discard)
  log.replaceChildren()
  log.ariaBusy = true // a screen reader does not read the history out
  log.day = lastVia = undefined
  hasAll = false
  unread = newBelow = gapCount = 0
  countByVia = {}
  pending = []
  following = true
  return enterRoom(name)
}

function onRights() {
  const { required, refused, read, write } = rights, { href } = here('rooms/' + room), query = me && '?' + new URLSearchParams({ user: me })
  input.disabled = $('#send').disabled = !write
  input.placeholder = write ? 'Write to #' + room : 'Your token does not allow you to write here'
  $('#curl').textContent = curl(required, `-d hi ${quoteForShell(href.replace('http://', ''))}`)
  $('#endless').href = `rooms/${room}/html${query}`
  $('#refresh-page').href = `rooms/${room}/refresh${query}`
  updateTitle()
  if (!refused && !read) addLine('gap', 'Your token does not allow you to read this room.')
}

function onConnect() {
  $('#outbox bdi').textContent = me
  applyColour($('#outbox'), me)
  updateVisibility()
  render()
}

function onStatus({ status, via }) {
  for (const mine of outbox) if (mine.state === 'pending') setState(mine, 'pending')
  if (status !== 'open') return
  if (log.ariaBusy === 'true') setTimeout(() => log.ariaBusy = false, HISTORY_TIME)
  if (lastVia && lastVia !== via) enqueue(() => addLine('way', 'from here on by ' + names[via]))
  lastVia = via
}

// The log. Events that arrive within 20 ms are rendered together, with one layout.

let pending, renderTimer // [function, event] to render
let lastVia // the technique of the last message
let lastMoves // who joined and left, in the line at the log's end
let target = log // where messages are added, with a property day, the last date there: the log, or what will be above it
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
      for (const mine of outbox) if (mine.id < event?.id) showMessage({ ...mine, from: me }) // its own event was lost
      show(event)
    } catch (error) { // show the event as it is
      console.error(error)
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
    log.day = undefined
    newBelow = 0
    hasAll = true
    return addLine('gap', 'An operator erased the messages that were here.')
  }
  gapCount++
  addLine('gap', `Some messages may be missing here: ${GAPS[data?.reason] ?? 'the relay lost them'}.`)
}

/** Adds a line across the log. It replaces a line of the same kind that is directly above. */
function addLine(kind, ...content) {
  if (target.lastElementChild?.className === kind) target.lastElementChild.replaceChildren(...content)
  else target.append(make('p', kind, ...content))
}

/** Names as a list; of many only the last three. */
function listed(names) {
  const shown = names.length > 4 ? [...names.slice(-3), `${names.length - 3} others`] : names
  return new Intl.ListFormat('en-GB').formatToParts(shown).map(({ type, value }) => type === 'element' ? make('bdi', '', value) : value)
}

function showMove(name, joined) {
  if (log.lastElementChild?.className !== 'move') lastMoves = new Map
  lastMoves.delete(name)
  lastMoves.set(name, joined ? ' joined' : ' left')
  const all = Object.groupBy(lastMoves.keys(), name => lastMoves.get(name))
  addLine('move', ...Object.entries(all).flatMap(([verb, names], i) => [i ? '; ' : '', make('span', '', ...listed(names), verb)]))
}

/** Shows any published event. The type is shown unless it is message. */
function showMessage({ id, type = 'message', from, time, data }) {
  const mine = findInOutbox({ id, from, data })
  if (mine) discard(mine)
  const at = new Date(time), minute = clock.format(at), day = calendar.format(at)
  if (target.day !== day) addLine('day', target.day = day)
  let group = target.lastElementChild
  if (!group?.matches('.group') || group.from !== from || time - group.time > GROUP_TIME) {
    group = make('section', { className: from && from === me ? 'group mine' : 'group', from, time, minute })
    group.append(make('p', 'head', make('bdi', '', from ?? 'somebody'), timeElement(at, minute)))
    applyColour(group, from ?? '')
    target.append(group)
  }
  const p = make('div', mentionsMe({ from, data }) ? 'message mention' : 'message', contentOf({ type, from, data }))
  p.dataset.id = id
  if (type !== 'message' && !isPicture({ type, data })) p.prepend(make('code', 'type', type))
  if (minute !== group.minute) p.append(timeElement(at, group.minute = minute))
  group.append(p)
  if (target !== log) return
  countByVia[comet.via] = (countByVia[comet.via] ?? 0) + 1
  if (!following && !mine) newBelow++
}

const timeElement = (at, minute) => make('time', { dateTime: at.toISOString(), title: at.toLocaleString() }, minute)

/** Whether a message of somebody else has @ and this user's name in it. */
const mentionsMe = ({ from, data }) => me && from !== me &&
  asText(data).toLowerCase().split('@' + me.toLowerCase()).slice(1).some(rest => !/^[\p{L}\p{N}_]/u.test(rest))

// Code between backticks, and URLs, which end before a bracket that was opened before them.
const MARKS = /```\n?([^]+?)\n?```|`([^`\n]+)`|\bhttps?:\/\/(?:\([^\s()]*\)|\[[^\s[\]]*\]|\{[^\s{}]*\}|[^\s<>"\])}])+/gi

/** A message's text, with links and code. Long text is folded, and emoji alone are big. */
function textElement(data) {
  const text = asText(data), el = make('div', { className: 'text', dir: 'auto' })
  let at = 0
  for (const { 0: match, 1: block, 2: code, index } of text.matchAll(MARKS)) {
    let end = match.length, mark = make('code', block ? 'block' : '', block ?? code)
    if (!block && !code) {
      while ('.,:;!?\'…’”»'.includes(match[end - 1])) end-- // the sentence's
      const href = match.slice(0, end)
      if (!URL.canParse(href)) continue
      mark = make('a', { href, target: '_blank', rel: 'noopener noreferrer' }, href)
    }
    el.append(text.slice(at, index), mark)
    at = index + end
  }
  el.append(text.slice(at))
  if (/^(?:\p{Extended_Pictographic}[\p{Emoji_Modifier}\uFE0F\u200D]*\s?){1,9}$/u.test(text)) el.classList.add('emoji')
  if (text.length < 1500 && text.split('\n', 21).length < 21) return el
  el.classList.add('folded')
  return make('div', 'long', el, button('Show all', ({ target: more }) => {
    more.textContent = el.classList.toggle('folded') ? 'Show all' : 'Show less'
    following = atBottom()
  }))
}

/** The text or the picture of a message. The height of a picture is known only when it is decoded. */
const contentOf = ({ type, from = 'somebody', data }) => !isPicture({ type, data }) ? textElement(data) :
  make('div', 'text', make('img', { className: 'picture', src: data, alt: 'a picture by ' + from, onload: keepAtEnd }))

const atBottom = () => scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 40

/** Scrolls to the end if the user has not scrolled up; otherwise shows the number of new messages below. */
function keepAtEnd() {
  if (following) {
    scroller.scrollTop = scroller.scrollHeight
    newBelow = 0
  }
  $('#pill').hidden = !newBelow
  setText($('#pill'), plural(newBelow, 'new message') + ' ↓')
}
scroller.onscroll = () => {
  following = atBottom()
  if (following) keepAtEnd()
  else if (scroller.scrollTop < 200) showOlder()
}

/** Shows the history before the log, which began with the newest hundred. */
async function showOlder() {
  const [first] = log.getElementsByClassName('message'), where = room
  if (hasAll || !first || !rights.read) return
  hasAll = true
  let older
  try {
    older = (await new Room(where).read('last=' + MAX_MESSAGES)).filter(({ type, id }) => type !== 'presence' && type !== 'gap' && id < first.dataset.id)
  } catch { return hasAll = false } // scrolling tries again
  if (where !== room || !first.isConnected) return
  target = make('div')
  addLine('way', older.length ? 'the relay keeps no older messages' : 'this is all that the relay keeps')
  for (const event of older) showMessage(event)
  const { scrollHeight, scrollTop } = scroller, [line] = log.children
  if (line.className === 'day' && line.textContent === target.day) line.remove()
  log.prepend(...target.children)
  target = log
  scroller.scrollTop = scrollTop + scroller.scrollHeight - scrollHeight
}
$('#pill').onclick = () => {
  following = true
  keepAtEnd()
  input.focus()
}
new ResizeObserver(keepAtEnd).observe(scroller) // the phone's keyboard appears, or the input grows

// Messages of this user.

const outbox = new Set // of { data, type, time, key, el, note, state }; and id, once the relay has answered

function submit(data, type) {
  const time = Date.now(), key = time.toString(36) + Math.random().toString(36), note = make('div', 'note')
  const mine = { data, type, time, key, note, el: make('div', '', contentOf({ type, from: me, data }), note) }
  outbox.add(mine)
  $('#outbox').append(mine.el)
  $('#outbox').hidden = false
  $('#outbox').classList.toggle('more', log.lastElementChild?.from === me)
  send(mine)
  comet.presence('online') // no longer typing
  following = true
  keepAtEnd()
}

/** Sends a message. A retry has the same key, so it is not published twice. */
async function send(mine) {
  setState(mine, 'pending')
  try {
    mine.id = await comet.send(mine.data, { key: mine.key, type: mine.type })
    render()
    if (log.querySelector(`[data-id="${mine.id}"]`)) discard(mine) // its event has arrived already: only the first answer was lost
    else setState(mine, 'sent')
  } catch (error) {
    setState(mine, 'failed', error)
  }
  keepAtEnd()
}

/** The message in the outbox that an event belongs to. If it arrives before the answer to POST, the text is compared. */
function findInOutbox({ id, from, data }) {
  const all = [...outbox]
  return all.find(mine => mine.id === id) ?? all.find(mine => mine.state === 'pending' && mine.data === data && me === from)
}

function setState(mine, state, error) {
  mine.state = state
  mine.el.className = 'message ' + state
  mine.note.role = error ? 'alert' : null
  if (!error) return setText(mine.note, state === 'sent' ? 'sent' : comet.status === 'open' ? 'sending…' : 'waiting for the connection…')
  const again = !error.final ? button('Try again', () => send(mine)) : mine.type ? '' : button('Edit', () => edit(mine))
  const why = error.status === 413 ? 'It is too long for this relay. Make it shorter' : error.message
  mine.note.replaceChildren(`Not sent: ${why}. `, again, ' ', button('Discard', () => discard(mine)))
}

function edit(mine) {
  discard(mine)
  input.value = [input.value, mine.data].filter(Boolean).join('\n')
  fitHeight()
  input.focus()
}

function discard(mine) {
  outbox.delete(mine)
  mine.el.remove()
  $('#outbox').hidden = !outbox.size
}

const draft = () => [...[...outbox].filter(mine => !mine.id && !mine.type).map(mine => mine.data), input.value].join('\n').trim()
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
  $('#say').requestSubmit()
}
$('#say').onsubmit = e => {
  e.preventDefault()
  const text = input.value.trim()
  input.value = ''
  fitHeight()
  const nick = /^\/nick(\s+(.*))?$/.exec(text)
  if (nick) changeName(cleanName(nick[2] ?? ''))
  else if (text) submit(text)
}

// Pictures that people paste or drop, made small enough for one event.

const MAX_PICTURE = 60e3 // characters of a data: URL
const isPicture = ({ type, data }) => type === 'image' && /^data:image\/(png|jpeg|gif|webp);base64,[A-Za-z0-9+/=]+$/.test(data)

/** Returns a file as a data: URL. A small one stays as it is, and may move, but not SVG, which may hold scripts. */
async function toDataURL(file) {
  if (/png|jpeg|gif|webp/.test(file.type) && file.size < MAX_PICTURE * 0.74) {
    const bytes = new Uint8Array(await file.arrayBuffer())
    return `data:${file.type};base64,${btoa(String.fromCharCode(...bytes))}`
  }
  const bitmap = await createImageBitmap(file), canvas = make('canvas'), pen = canvas.getContext('2d')
  let scale = Math.min(1, 1280 / Math.max(bitmap.width, bitmap.height)), quality = 0.8, url
  do {
    canvas.width = Math.max(1, bitmap.width * scale)
    canvas.height = Math.max(1, bitmap.height * scale)
    pen.fillStyle = '#fff' // JPEG has no transparency
    pen.fillRect(0, 0, canvas.width, canvas.height)
    pen.drawImage(bitmap, 0, 0, canvas.width, canvas.height)
    url = canvas.toDataURL('image/jpeg', quality)
    quality > 0.5 ? quality -= 0.1 : scale *= 0.8
  } while (url.length > MAX_PICTURE)
  return url
}

async function sendImages(e) {
  const files = [...(e.clipboardData ?? e.dataTransfer).files].filter(({ type }) => type.startsWith('image/'))
  if (!files.length) return
  e.preventDefault()
  for (const file of files) try {
    submit(await toDataURL(file), 'image')
  } catch {
    addLine('way', `this browser cannot read the picture ${file.name}`)
  }
}
input.onpaste = sendImages
$('#app').ondragover = e => { if (e.dataTransfer.types.includes('Files')) e.preventDefault() }
$('#app').ondrop = e => { if (!input.disabled) sendImages(e) }

/** /nick NAME changes the name; /nick alone asks for it. */
function changeName(name) {
  if (rights.user) addLine('way', 'your token says who you are')
  else if (!name) $('#me').click()
  else if (name !== me) rename(name)
}

function updateSummary() {
  const typing = [...people].filter(([name, li]) => li.dataset.state === 'typing' && name !== me).map(([name]) => name)
  setText($('#typing'), ...listed(typing), !typing[0] ? '' : typing[1] ? ' are typing…' : ' is typing…')
  const by = Object.entries(countByVia).map(([via, n]) => `${n} by ${names[via]}`)
  $('#totals').textContent = `Messages so far: ${by.join(', ') || 'none'}. ${gapCount ? plural(gapCount, 'gap') : 'No gap'}.`
  summarize()
}

// Whether the user looks at the page.

let awayTimer, releaseLock
const lockName = () => `cometes ${room} ${me}`

/** A visible page holds a lock. So a hidden page knows that the user looks at another page, and is not away. */
function updateVisibility() {
  const { promise, resolve } = Promise.withResolvers()
  releaseLock?.()
  releaseLock = resolve
  clearTimeout(awayTimer)
  if (document.hidden) awayTimer = setTimeout(async () => await visibleElsewhere() || comet?.presence('away'), AWAY_AFTER)
  else navigator.locks?.request(lockName(), { mode: 'shared' }, () => promise)
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
  notify(event).catch(() => { })
}

const bellIsOn = () => !!browserStorage.get('bell') && window.Notification?.permission === 'granted'

/** Notifies by the service worker, since a page on a phone may not. */
async function notify({ type, from, data }) {
  if (!bellIsOn() || await visibleElsewhere()) return
  const body = type === 'image' ? 'a picture' : asText(data).slice(0, 200), worker = await navigator.serviceWorker?.getRegistration()
  await worker?.showNotification(`${from ?? 'Somebody'} in #${room}`, { body, tag: 'cometes ' + room, icon: 'icon.svg', data: location.href })
}

/** Rings with two short tones, if the bell is on and the user looks at something else. */
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
  $('#bell').hidden = !permission && isSecureContext
  $('#bell').disabled = !!why
  $('#silent').textContent = why
  $('#bell').ariaPressed = !why && bellIsOn()
}
$('#bell').onclick = async () => {
  browserStorage.set('bell', $('#bell').ariaPressed === 'true' ? '' : 'on')
  if (Notification.permission === 'default') await Notification.requestPermission()
  updateBell()
  if (bellIsOn()) navigator.serviceWorker?.register('bell.js').catch(() => { })
}

addCopyButton($('#curl'))
input.value = tabStorage.get('draft')
updateBell()
fitHeight()
await open({ lobby: 'lobby', last: 100, enter, onRights, connect, onConnect, onStatus, onEvent, onMove: showMove })
