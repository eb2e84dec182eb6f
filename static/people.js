/**
 * people.js: what the chat and the pad share: the frame of the page, the room and the user's name, who is here, and the
 * connection, with what is said about it.
 */
import { Comet, get, techniques } from './comet.js'
import { $, access, askForToken, capitalized, copies, descriptions, here, insertMarkup, make, names, setText, sleep, years } from './page.js'

const FADE_TIME = 8e3 // ms for which a user who left is still listed; also in style.css
const STATES = { online: '', typing: 'typing…', away: 'away', offline: 'left' }
const way = (value, name, text, year = '') =>
  `<label><input type="radio" name="way" value="${value}"> <b>${name}</b> <small>${text}</small> <small>${year}</small></label>`

const insert = (selector, where, html) => $(selector).insertAdjacentHTML(where, html)
$('#plain').remove()
insertMarkup()
insert('#about', 'beforebegin', `<form id="go">
<label for="room"><span class="unseen">Room</span><span aria-hidden="true">#</span></label>
<input id="room" aria-describedby="noroom" autocomplete="off" autocapitalize="none" spellcheck="false" enterkeyhint="go">
</form>
<p id="noroom" role="alert"></p>`)
insert('#about', 'afterend', `<p id="state"><span id="words" role="status">connecting…</span><span id="more" aria-hidden="true"></span></p>
<button id="how" type="button" popovertarget="menu" aria-label="Change the technique">Change</button>
<button id="who" type="button" popovertarget="people">Who is here</button>`)
insert('main', 'beforebegin', `<form id="menu" popover autocomplete="off" aria-label="How this page receives events">
<fieldset id="ways">
<legend>How this page receives events</legend>
<p>Change it at any time: nothing is lost or comes twice.</p>
${way('auto', 'Automatic', 'the best that works')}${Object.keys(techniques).map(via => way(via, capitalized(names[via]), descriptions[via], years[via])).join('')}
</fieldset>
<p id="trouble" role="status"></p>
<p id="totals"></p>
</form>`)
insert('#foot', 'beforeend', '<button id="me" type="button"></button>')
insert('#foot', 'afterend', `<form id="naming" hidden>
<label for="name">Your name</label>
<input id="name" maxlength="64" required dir="auto" autocomplete="nickname" spellcheck="false" enterkeyhint="done" aria-describedby="taken">
<button>Join</button>
<p id="taken" role="status"></p>
</form>`)
insert('main', 'beforeend', '<div id="token" hidden></div>')
insert('#people', 'afterbegin', `<h2 id="count">Who is here</h2>
<ul id="here"></ul>
<p id="crowd" hidden>With more than a hundred users, names are not listed.</p>
<button id="invite" type="button">Copy an invitation</button>
<button id="another" type="button" hidden>Use another token</button>`)
const { way: ways } = $('#menu').elements
ways.value = 'auto'

/** Values stored for this tab, such as the user's name (a duplicated tab is the same user), or for the whole browser. */
const storage = area => ({
  get(key) { try { return window[area].getItem('cometes ' + key) || '' } catch { return '' } },
  set(key, value) { try { window[area].setItem('cometes ' + key, value) } catch { } },
})
export const tabStorage = storage('sessionStorage'), browserStorage = storage('localStorage')

// Rooms.

export let comet, room
export let rights // what the token allows in the room
let page // what the page does itself: { lobby, last, enter, connect, onRights, onConnect, onStatus, onEvent, onMove }

/** Begins. `lobby` is the room if the URL names none: ?room=lobby or #lobby. */
export function open(own) {
  page = own
  tabStorage.set('name', me)
  $('#app').hidden = false
  return page.enter(roomInURL())
}

function roomInURL() {
  const { hash, searchParams } = new URL(location)
  const name = (new URLSearchParams('r=' + hash.slice(1).replaceAll('+', '%2B')).get('r') || searchParams.get('room') || '').trim()
  const room = name.replace(/[^A-Za-z0-9_.:-]+/g, '-').slice(0, 64) || page.lobby
  showNoRoom(name === room ? '' : name)
  return room
}

/** Says why a name is none, below it. */
function showNoRoom(name) {
  const bdi = make('bdi', '', name.length > 64 ? name.slice(0, 64) + '…' : name)
  setText($('#noroom'), ...name ? ['A room cannot be called ', bdi, ': 1 to 64 letters without accents, digits, or _ . : -'] : [])
}

export async function enterRoom(name) {
  room = $('#room').value = name
  $('#room').size = Math.max(5, name.length)
  colourOf.clear()
  if (!comet || rights.required) {
    disconnect()
    $('main').inert = true
    rights = await access(name)
    if (name !== room) return
    $('main').inert = false
  }
  const { required, refused, user, read, write, error } = rights
  me = user || me
  $('#me').disabled = !!user
  $('#token').hidden = !refused
  $('#another').hidden = !required || refused
  page.onRights()
  if (refused) showTokenForm(error)
  if (read || write) await page.connect()
  else onStatus({ status: 'closed', error: new Error(refused ? 'this relay asks for a token' : 'your token is for other rooms') })
  if (!matchMedia('(hover: hover)').matches || !$('#token').hidden) return // on a phone the keyboard would appear
  if (me) $('#text').focus()
  else $('#name').select()
}

$('#go').onsubmit = e => {
  e.preventDefault()
  const name = $('#room').value.trim()
  if (name === room || !/^[\w.:-]{1,64}$/.test(name)) return showNoRoom(name === room ? '' : name)
  history.pushState(null, '', '?room=' + name)
  onpopstate()
}
$('#room').onblur = () => { // only Enter changes the room
  $('#room').value = room
  showNoRoom('')
}
onpopstate = onhashchange = () => roomInURL() === room || page.enter(roomInURL())

const showTokenForm = error => askForToken($('#token'), error, `-read ${room} -write ${room}`)
$('#another').onclick = () => {
  if ($('#people').matches(':popover-open')) $('#people').hidePopover()
  if ($('#token').hidden) showTokenForm()
  else $('#token').hidden = true
}
copies($('#invite'), () => here('?room=' + room).href, 'Copied: send it to somebody')

// The user's name.

/** A name that the relay accepts: at most 64 characters, none that control the terminal or the direction of text. */
export function cleanName(name) {
  const plain = name.replace(/[\p{Cc}\u061C\u200E\u200F\u2028-\u202E\u2066-\u2069]/gu, '').trim()
  return [...plain].slice(0, 64).join('').trim()
}

export let me = cleanName(new URLSearchParams(location.search).get('user') ?? '') || tabStorage.get('name')

export function showNaming(show) {
  if (show && $('#naming').hidden) $('#name').value = me || browserStorage.get('name')
  $('#naming').hidden = !show
  warnIfTaken()
}

$('#me').onclick = () => {
  showNaming(true)
  $('#name').select()
}
$('#name').onkeydown = e => {
  if (e.key !== 'Escape' || !me) return
  showNaming(false)
  $('#text').focus()
}
$('#naming').onsubmit = e => {
  e.preventDefault()
  const name = cleanName($('#name').value)
  if (!name) return
  if (name === me) showNaming(false)
  else rename(name)
  $('#text').focus()
}

export function rename(name) {
  const url = new URL(location)
  me = name
  for (const storage of [tabStorage, browserStorage]) storage.set('name', me)
  url.searchParams.delete('user')
  history.replaceState(null, '', url)
  page.onRights()
  connect(comet.cursor)
}

/** Names are not reserved: two people with one name are one user. */
function warnIfTaken() {
  const name = cleanName($('#name').value), taken = name !== me && isHere(name)
  setText($('#taken'), ...taken ? ['Somebody here is already called ', make('bdi', '', name), '. You will be taken for the same person.'] : [])
}
$('#name').oninput = warnIfTaken

const COLOURS = 24 // 12 hues, light and dark
const colourOf = new Map // by name

/** A name has the same colour in every browser, unless another name in the page has that colour already. */
export function applyColour(el, name) {
  const taken = [...colourOf.values()]
  let n = colourOf.get(name) ?? [...name].reduce((hash, c) => (31 * hash + c.codePointAt(0)) % 65521, 7) % COLOURS
  if (!colourOf.has(name) && taken.length < COLOURS) {
    while (taken.includes(n)) n = (n + 7) % COLOURS
    colourOf.set(name, n)
  }
  el.style.setProperty('--hue', n % 12 * 30 + 15)
  el.classList.toggle('second', n >= 12)
}

// The connection.

let listeners // an AbortController for those of comet

function disconnect() {
  listeners?.abort()
  comet?.close()
  clearPeople()
}

/** Connects under the user's name; again when room or name change. With a cursor, the page continues. */
export function connect(after) {
  disconnect()
  comet = new Comet('/rooms/' + room, { user: me || undefined, presence: true, last: page.last, after })
  const { signal } = listeners = new AbortController()
  comet.addEventListener('status', e => onStatus(e.detail), { signal })
  comet.addEventListener('event', e => page.onEvent(e.detail), { signal })
  if (ways.value !== 'auto') comet.use(ways.value)
  showNaming(!me)
  setText($('#me'), 'as ', make('bdi', '', me))
  page.onConnect()
}

$('#menu').onchange = () => comet?.use(ways.value)
$('#menu').onsubmit = e => e.preventDefault()

let countdown
export function onStatus(detail) {
  const { status, via, retryIn, error, leader } = detail, needsToken = error?.status === 401
  setText($('#words'), { connecting: 'connecting', open: 'connected by ' + names[via], closed: 'not connected' }[status] ?? status)
  document.body.dataset.status = status
  const at = Date.now() + retryIn
  const showMore = () => $('#more').textContent =
    status === 'open' ? leader ? '' : ', through another tab' :
    status === 'offline' ? ': what you write is kept for later' :
    status === 'closed' ? `: ${needsToken ? 'this relay asks for a token' : error?.message}` :
    retryIn ? ` in ${Math.max(1, Math.ceil((at - Date.now()) / 1e3))} s` : '…'
  clearInterval(countdown)
  if (status === 'reconnecting' && retryIn) countdown = setInterval(showMore, 1e3)
  showMore()
  $('#trouble').textContent = !error ? '' : `${status === 'open' ? 'That technique failed' : 'Trouble'}: ${error.message}.`
  if (status === 'closed' && needsToken) showTokenForm(rights.exp * 1e3 < Date.now() ? 'it has expired' : error.message)
  page.onStatus(detail)
}

// Who is here.

export const people = new Map // name → list item
let hasRoster // what comes after it is news
let crowdCount // the number of users, if the roster has no names
const { compare } = new Intl.Collator
const isHere = name => (people.get(name)?.dataset.state ?? 'offline') !== 'offline'

/** Takes an event: what somebody does, or the roster of all. */
export function showPresence({ from, data }) {
  if (from) {
    const before = isHere(from)
    showPerson(from, data)
    if (before !== isHere(from) && from !== me && hasRoster) page.onMove(from, !before)
    return
  }
  const { users = {} } = data
  hasRoster = true
  crowdCount = data.users ? 0 : data.count
  if (crowdCount) clearPeople()
  for (const name of people.keys()) if (!Object.hasOwn(users, name)) showPerson(name, 'offline')
  for (const name in users) showPerson(name, users[name])
}

function showPerson(name, state) {
  let li = people.get(name)
  if (!li && state === 'offline') return
  if (!li) {
    li = make('li', { person: name }, make('bdi', '', name), name === me ? ' (you)' : '', make('small'))
    applyColour(li, name)
    const comesAfter = ({ person }) => person !== me && (name === me || compare(person, name) > 0)
    $('#here').insertBefore(li, [...$('#here').children].find(comesAfter) ?? null)
    people.set(name, li)
  }
  li.dataset.state = state
  $('small', li).textContent = STATES[state]
  clearTimeout(li.removeTimer)
  if (state === 'offline') li.removeTimer = setTimeout(() => people.delete(name) && li.remove(), FADE_TIME)
}

function clearPeople() {
  hasRoster = false
  for (const li of people.values()) clearTimeout(li.removeTimer)
  people.clear()
  $('#here').replaceChildren()
}

export function summarize() {
  $('#count').textContent = $('#who').textContent = `${crowdCount || [...people.keys()].filter(isHere).length} here`
  $('#crowd').hidden = !crowdCount
  warnIfTaken()
}

// Requests.

const RATE = 8 // requests in any second, at most

/**
 * Requests to one room. comet.js sends what is to arrive some time; this is for what is to be published now or not at all,
 * since it depends on what is the newest.
 */
export class Room {
  #path
  #times = [] // of the last requests
  roundTrip = 50 // ms that the last request took

  constructor(name) {
    this.#path = 'rooms/' + name
  }

  /** Publishes once. Returns the id, and whether it is new: with a known key it is that of the first. */
  publish(type, data, query) {
    const headers = { 'Content-Type': 'application/json' }
    return this.#request('?' + new URLSearchParams({ type, ...query }), { method: 'POST', headers, body: JSON.stringify(data) })
  }

  /** Reads all events that there are; `query` says from where. The list has the cursor to go on with. */
  async read(query) {
    for (const all = []; ;) {
      const { events, cursor } = await this.#request('/poll?presence=0&' + query, { cache: 'no-store' })
      if (!events.length) return Object.assign(all, { cursor })
      all.push(...events)
      query = 'after=' + cursor
    }
  }

  async #request(path, options) {
    const wait = (this.#times.at(-RATE) ?? -Infinity) + 1000 - performance.now()
    if (wait > 0) await sleep(wait)
    if (this.#times.push(performance.now()) > RATE) this.#times.shift()
    try {
      const response = await get(this.#path + path, { signal: AbortSignal.timeout(15e3), ...options })
      return { ...await response.json(), isNew: response.status === 201 }
    } finally {
      this.roundTrip = performance.now() - this.#times.at(-1)
    }
  }
}
