/**
 * carets.js: who is at the pad, and where in the text. A textarea does not tell where on the screen a character is, so the
 * same text is in an element behind it, the mirror, whose characters a Range can find.
 */
import { applyColour, make } from './people.js'
import { move } from './rebase.js'

export const CARET_TTL = 60 // seconds that a caret is shown
const MOST = 100 // carets

const $ = id => document.getElementById(id)
let input, mirror, paper, scroller // pad.js inserts them

const people = new Map // the state by name
let me // the user's name
let crowd = 0 // the number of users, if the roster has no names
const peers = new Map // by client: { name, from, to, el, caret, timer }

/** Forgets who is here, since the roster follows. */
export function enter(name) {
  [input, mirror, paper, scroller] = ['text', 'mirror', 'paper', 'scroller'].map($)
  resized.observe(paper)
  me = name
  people.clear()
  draw()
}

export function showPresence(from, data) {
  if (from && data !== 'offline') people.set(from, data)
  else if (from) people.delete(from)
  else if (data) {
    crowd = data.users ? 0 : data.count
    people.clear()
    for (const name in data.users) people.set(name, data.users[name])
  }
  for (const [client, { name }] of peers) if (name === from && data === 'offline') remove(client)
  draw()
}

/** Shows where somebody is, or what they have selected. */
export function showCaret(client, name = 'somebody', from, to = from) {
  if (!Number.isInteger(from) || !Number.isInteger(to) || from < 0 || from > to || to > input.value.length || !peers.has(client) && peers.size === MOST) return
  const peer = peers.get(client) ?? { el: $('carets').appendChild(make('div', 'peer')) }
  clearTimeout(peer.timer)
  Object.assign(peer, { name, from, to, caret: make('div', 'caret', make('bdi', '', name)), timer: setTimeout(remove, CARET_TTL * 1e3, client) })
  peers.set(client, peer)
  applyColour(peer.el, name)
  draw()
}

function remove(client) {
  const { timer, el } = peers.get(client)
  clearTimeout(timer)
  el.remove()
  peers.delete(client)
  draw()
}

/** Moves all carets over a change to the text. */
export function moveCarets(change) {
  for (const peer of peers.values()) Object.assign(peer, { from: move(peer.from, change), to: move(peer.to, change) })
}

// Drawing.

const range = document.createRange()

/** The rectangles on the screen of a part of the text. */
function rectangles(from, to) {
  const text = mirror.firstChild, { length } = text
  range.setStart(text, Math.min(from, length - 1))
  range.setEnd(text, Math.min(to, length))
  return [...range.getClientRects()]
}

/** The height at which the user's own caret is. */
export const ownTop = () => mirror.firstChild && rectangles(input.selectionEnd, input.selectionEnd + 1)[0]?.top

let drawing
/** Draws with the next frame. With the height at which the own caret was, it scrolls so that it is there again. */
export function draw(top) {
  drawing ??= requestAnimationFrame(() => {
    drawing = undefined
    mirror.textContent = input.value + '\u200B' // so that an empty last line has a height, too
    const now = ownTop(), window = scroller.getBoundingClientRect()
    if (top > window.top && top < window.bottom && now !== undefined) scroller.scrollTop += now - top
    const sheet = paper.getBoundingClientRect()
    const put = (el, { left, top, width, height }) => {
      Object.assign(el.style, { left: left - sheet.left + 'px', top: top - sheet.top + 'px', width: width + 'px', height: height + 'px' })
      return el
    }
    for (const { el, caret, from, to } of peers.values()) {
      const [at] = rectangles(to, to + 1)
      caret.classList.toggle('atend', at?.left > sheet.left + sheet.width / 2)
      el.replaceChildren(...from < to ? rectangles(from, to).slice(0, 200).map(rect => put(make('div', 'chosen'), rect)) : [])
      if (at) el.append(put(caret, { left: at.left, top: at.top, width: 2, height: at.height }))
    }
    list()
  })
}
const resized = new ResizeObserver(() => draw())

let listed
function list() {
  const places = new Map([...peers.values()].map(({ name, to }) => [name, to]))
  const names = [...people.keys()].sort((a, b) => (b === me) - (a === me) || a.localeCompare(b))
  const all = names.map(name => ({ name, line: places.has(name) && input.value.slice(0, places.get(name)).split('\n').length }))
  $('sum').textContent = $('who').textContent = `${crowd || names.length} here`
  $('crowd').hidden = !crowd
  const text = JSON.stringify([me, all])
  if (text === listed) return // else a button would lose the focus
  listed = text
  $('here').replaceChildren(...all.map(({ name, line }) => {
    const li = make('li', '', make('bdi', '', name), name === me ? ' (you)' : '')
    applyColour(li, name)
    if (line) li.append(Object.assign(make('button', '', `line ${line}`), { type: 'button', ariaLabel: `Go to ${name}, line ${line}`, onclick: () => goTo(name) }))
    return li
  }))
}

function goTo(name) {
  const { to } = [...peers.values()].find(peer => peer.name === name)
  if ($('people').matches(':popover-open')) $('people').hidePopover()
  input.focus({ preventScroll: true })
  input.setSelectionRange(to, to)
  scroller.scrollTop += ownTop() - scroller.getBoundingClientRect().top - 80
}
