/**
 * pad.js: a text that many people write at once, and an example of how to build on the relay's order and on `if`.
 *
 * What is written here is an edit. It is published with `if`: only if the room's newest message is still the one that the
 * edit was made on. If somebody else was faster the relay says so; then their edit is taken first, ours is moved over it
 * (replica.js, rebase.js) and tried again. Every so many edits somebody publishes the whole text, for those who come later.
 * Text of others gets into the page only as the value of a textarea, or as text.
 */
import { CARET_TTL, draw, forget, moveCarets, ownTop, showCaret } from './carets.js'
import { backoff } from './comet.js'
import { $, copy, setText, sleep } from './page.js'
import { comet, connect, enterRoom, me, onStatus, open, rights, Room, room, showPresence } from './people.js'
import { apply, compose, diff, isEmpty, isText, move, transform } from './rebase.js'
import { endOf, History, MAX, Replica } from './replica.js'

const PACE = 150 // ms from one edit to the next, or more if many write; what is typed meanwhile is one edit
const SNAPSHOT_AFTER = 64, SNAPSHOT_LATEST = 128 // messages; a room keeps 256 of them
const SNAPSHOT_BYTES = 250e3 // or so many characters of JSON; a room keeps a megabyte
const SNAPSHOT_DELAY = 3e3 // ms in which somebody else may publish a snapshot, before we do

const input = $('#text')
const client = Math.random().toString(36).slice(2, 10) // the name of this page among all that write
let ourRoom
let replica = new Replica(client), history = new History
let newest = 0 // the newest message of the room
let messages = 0, bytes = 0 // since the last snapshot
let refused // why the relay does not take our edits

// What others do.

function onEvent({ id, type, from, data }) {
  if (type === 'presence') {
    showPresence({ from, data })
    return draw()
  }
  if (type === 'gap') return onGap(data?.reason)
  if (type === 'caret') return onCaret(id, from, Object(data))
  if (id <= newest) return // it was the answer to a request of our own
  newest = id
  resume()
  if (++messages === SNAPSHOT_LATEST) setTimeout(publishSoon, Math.random() * 2e3, 'snapshot') // who wrote has left: anybody may
  bytes += JSON.stringify(data).length
  const { head } = replica, change = replica.receive({ id, type, data })
  show(change)
  if (replica.head === head) return replica.lost && recover(true)
  const [writer] = type === 'edit' ? data.key.split('.') : []
  if (writer === hold.by) hold = {}
  if (type === 'snapshot') messages = bytes = wanted = 0
  else if (change) showCaret(writer, from, endOf(change)) // it is not our own
}

function onCaret(id, name, { client: writer, base, from, to, lost, turn }) {
  if (writer === client || !isText(writer) || writer.length > 32) return
  if (turn > 0) {
    if (!(id > ourTurn)) hold = { by: writer, until: performance.now() + Math.min(turn, 1e3) }
    pace = Math.min(1.3 * pace, 1e3)
  } else if (lost === true) setTimeout(publishSoon, Math.random() * 1e3, 'snapshot')
  else showCaret(writer, name, replica.track(from, base), replica.track(to, base))
}

function onGap(reason) {
  if (reason !== 'history') newest = 0
  if (reason === 'erased') {
    offer('An operator erased this text.', replica.view)
    show(diff(replica.view, ''))
    replica = new Replica(client)
    history = new History
  } else {
    replica.lost = true
    recover(reason === 'history')
  }
}

let recovering
/**
 * Our text may not be the room's: the relay was restarted, or has forgotten what we missed. A snapshot decides. If the room
 * has none, somebody else may publish one, or we do.
 */
async function recover(wait) {
  if (recovering) return
  recovering = true
  asked = false
  await sleep(Math.random() * 500 + 100)
  for (let tries = 0; replica.lost;) try {
    const before = newest, events = (await ourRoom.read('last=256')).filter(({ type }) => !['presence', 'gap', 'caret'].includes(type)), newer = new Replica
    if (!replica.lost || newest !== before) continue // events came meanwhile
    for (const event of events) newer.receive(event)
    newest = events.at(-1)?.id ?? 0
    show(replica.follow(newer))
    if (replica.lost && (wait || !me || !rights.write)) {
      publishSoon() // which asks for one
      await sleep(SNAPSHOT_DELAY)
      wait = false
    } else if (replica.lost) await publishSnapshot(newer)
  } catch (error) {
    if (error.status !== 412) await pause(error.retry || backoff(tries++))
  }
  recovering = false
  publishSoon()
}

// What we do: edits, snapshots and carets, one request after the other.

/** Publishes. Then nothing came in between, so we need not wait for the event. */
async function publish(type, data, query) {
  const { id, isNew } = await ourRoom.publish(type, data, { user: me, ...query })
  if (isNew) onEvent({ id, type, data, from: me })
  return id
}

async function publishSnapshot(newer) {
  let after
  for (const part of replica.snapshot(newer)) after = await publish('snapshot', { ...part, after }, { if: newest })
}

let publishing, more, caretMoved, asked, pace = PACE
let hold = {}, ourTurn // who was often too late asks the others to wait; who asked first is first
let wrote, wanted // who has just written publishes a snapshot if one is due; everybody, if somebody needs one

async function publishNext() {
  const { lost } = replica
  for (let n = 0; (replica.waiting || performance.now() < hold.until) && n < 50; n++) await sleep(20) // somebody needs several publishes, or was too late
  if (!lost && messages && (wanted || wrote && (messages >= SNAPSHOT_AFTER || bytes > SNAPSHOT_BYTES))) {
    await publishSnapshot()
    wrote = wanted = false
    return true
  }
  while (!lost && replica.full) {
    offer(`The text is full: it has at most ${MAX.toLocaleString('en')} characters. This did not fit:`, replica.pending[0].change.filter(isText).join(''))
    show(replica.drop())
  }
  const edit = lost ? undefined : replica.next()
  if (edit) {
    const id = await publish('edit', edit, { if: newest, key: edit.key })
    await arrival(id)
    wrote = true
    if (replica.pending[0]?.key === edit.key) show(replica.reject())
    return true
  }
  if (lost ? asked : !caretMoved) return false
  caretMoved = false
  asked = lost
  const [from, to] = caret = [input.selectionStart, input.selectionEnd]
  await publish('caret', { client, base: replica.head, from, to, lost }, { ttl: CARET_TTL })
  return true
}

async function publishSoon(what) {
  wanted ||= what === 'snapshot' && messages > 0
  more = true
  if (publishing || !rights?.write || !me) return
  publishing = true
  for (let tries = 0, conflicts = 0; more;) try {
    more = false
    if (!await publishNext()) continue
    more = true
    tries = conflicts = 0
    refused = ourTurn = undefined
    showState()
    await sleep(pace)
    pace = Math.max(0.95 * pace, PACE)
  } catch (error) {
    more = !error.final || error.status === 412
    if (error.status === 412) await afterConflict(error.id, ++conflicts).catch(() => { })
    else if (error.final) refused = error.message
    else await pause(error.retry || Math.min(backoff(tries++), 5e3))
  }
  publishing = false
  ourTurn = undefined
  showState()
}

/** Waits until an event has come by the connection, or else asks for it. */
async function arrival(id) {
  for (const end = performance.now() + 100; newest < id && performance.now() < end;) await pause(100)
  if (newest < id) (await ourRoom.read('after=' + newest)).forEach(onEvent)
}

/** Somebody was faster. Their edit is taken first. Who was too late three times asks the others to wait. */
async function afterConflict(id, conflicts) {
  const before = newest, { roundTrip } = ourRoom
  await arrival(id)
  if (id < before && newest === before) newest = id // what we took for the newest message was none, or is forgotten
  if (id < replica.head) onGap('restart')
  if (conflicts % 3) await sleep(Math.random() * 4 * roundTrip) // so that not all who were too late try again at the same time
  else ourTurn = await publish('caret', { client, turn: 3 * roundTrip }, { ttl: 1 })
}

/** Waits, but not longer than until something comes, or the connection is back. */
let resume = () => { }
const pause = ms => new Promise(done => {
  resume = done
  setTimeout(done, ms)
})

// The textarea. Others' changes wait while a word is being composed: to touch the value would end that.

let shown = '' // the textarea's value, as far as it is in the replica
let held = [] // what others have changed since
let composing, composeTimer, last = {} // input

function show(change) {
  if (!change || isEmpty(change)) return
  history.rebase(change)
  moveCarets(change)
  held = compose(held, change)
  if (!composing) release()
}

function release() {
  const { selectionStart: from, selectionEnd: to, selectionDirection } = input, change = held, top = ownTop()
  held = []
  shown = apply(shown, change)
  input.value = shown
  caret = caret.map(at => move(at, change))
  input.setSelectionRange(move(from, change, from < to), move(to, change), selectionDirection)
  draw(top)
}

function commit(joins) {
  const value = input.value.toWellFormed(), { selectionEnd } = input
  if (value !== input.value && !composing) {
    input.value = value
    input.setSelectionRange(selectionEnd, selectionEnd)
  }
  let change = diff(shown, value, selectionEnd)
  if (isEmpty(change)) return
  shown = value;
  [change, held] = transform(change, held)
  history.add(change, replica.view, joins)
  act(change)
}

function act(change) {
  replica.edit(change)
  moveCarets(change)
  caret = [input.selectionStart, input.selectionEnd]
  draw()
  showState()
  publishSoon()
}

input.oninput = ({ inputType, isComposing }) => {
  clearTimeout(composeTimer)
  if (isComposing || composing) composeTimer = setTimeout(commit, 1e3) // it may be composing for long
  else {
    const joins = inputType === last.type && performance.now() - last.time < 1e3 && /^(insertText|deleteContent)/.test(inputType)
    last = { type: inputType, time: performance.now() }
    commit(joins)
  }
  draw()
  showState()
}
input.addEventListener('compositionstart', () => composing = true)
input.addEventListener('compositionend', () => setTimeout(() => { // in some browsers its last input event comes after it
  composing = false
  commit()
  if (!isEmpty(held)) release()
}))

function takeBack(e, which) {
  if (!which) return
  e.preventDefault() // the browser's own would undo what others did
  const change = !composing && !input.readOnly && history[which](replica.view)
  if (!change) return
  input.value = shown = apply(shown, change)
  input.setSelectionRange(endOf(change), endOf(change))
  act(change)
}
input.onbeforeinput = e => takeBack(e, { historyUndo: 'undo', historyRedo: 'redo' }[e.inputType])
input.onkeydown = e => takeBack(e, (e.ctrlKey || e.metaKey) && !e.altKey && { z: e.shiftKey ? 'redo' : 'undo', y: 'redo' }[e.key.toLowerCase()])
for (const which of ['undo', 'redo']) $('#' + which).onclick = e => takeBack(e, which)

let caret = [0, 0] // where others see ours
document.onselectionchange = () => {
  const { selectionStart: from, selectionEnd: to } = input
  if (document.activeElement !== input || composing || from === caret[0] && to === caret[1]) return // an edit shows where it ends
  caretMoved = true
  setTimeout(publishSoon, PACE)
}

// Whether all is saved; and what is said about the connection.

const isSaved = () => !replica.pending.length && input.value === shown

function showState() {
  const { length } = input.value, most = `${MAX.toLocaleString('en')} characters`
  document.body.dataset.saved = isSaved() && !replica.lost ? 'yes' : 'no'
  setText($('#saved'), refused ? `Not saved: ${refused}` : replica.lost ? 'Reading the text again…' : isSaved() ? 'Saved' :
    comet?.status === 'open' ? 'Saving…' : 'Not saved: waiting for the connection')
  setText($('#full'), length < MAX ? '' : `The text is full: it has ${most}.`)
  $('#length').textContent = `${length.toLocaleString('en')} of ${most}`
  $('#length').classList.toggle('near', length > 0.95 * MAX)
  $('#undo').disabled = !history.canUndo || input.readOnly
  $('#redo').disabled = !history.canRedo || input.readOnly
}
addEventListener('beforeunload', e => isSaved() || e.preventDefault())

/** Shows text that is not in the pad, to be copied. */
function offer(why, text) {
  if (!text) return
  $('#lost').value = $('#notice').hidden ? text : $('#lost').value + text
  $('#notice').hidden = false
  $('#notice').firstElementChild.textContent = why
}
$('#notice').onclick = ({ target: { value } }) => {
  if (value === 'copy') copy($('#lost').value)
  if (value === 'close') $('#notice').hidden = true
}

/** Reads the text, and then goes on from there with a connection. */
async function begin() {
  for (let tries = 0, events; !events;) try {
    events = await ourRoom.read('last=256')
    events.forEach(onEvent)
    connect(events.cursor)
  } catch (error) {
    onStatus({ status: error.final ? 'closed' : 'reconnecting', error })
    if (error.final) break
    await pause(backoff(tries++))
  }
}

open({
  lobby: 'pad',
  enter(name) {
    if (room) return location.reload()
    ourRoom = new Room(name)
    document.title = `${name} · The pad · Cometes`
    return enterRoom(name)
  },
  onRights() {
    input.readOnly = !me || !rights.write
    input.placeholder = !rights.write ? 'Your token does not allow you to write here' : me ? 'Write here' : 'First give your name below'
  },
  connect: begin,
  onConnect() {
    draw()
    publishSoon()
  },
  onStatus({ status }) {
    if (status === 'open') resume()
    showState()
  },
  onEvent,
  onMove: (name, joined) => joined || forget(name),
})
