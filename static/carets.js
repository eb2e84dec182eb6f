/**
 * carets.js: who is at the pad, and where in the text. A textarea does not tell where on the screen a character is, so the
 * same text is in an element behind it, the mirror, whose characters a Range can find.
 */
import { $, make } from './page.js'
import { applyColour, people, summarize } from './people.js'
import { move } from './rebase.js'

export const CARET_TTL = 60 // seconds that a caret is shown
const MOST = 100 // carets

const input = $('#text'), mirror = $('#mirror'), paper = $('#paper'), scroller = $('#scroller')
const peers = new Map // by client: { name, from, to, el, caret, button, timer }

/** Shows where somebody is, or what they have selected. */
export function showCaret(client, name = 'somebody', from, to = from) {
  if (!Number.isInteger(from) || !Number.isInteger(to) || from < 0 || from > to || to > input.value.length || !peers.has(client) && peers.size === MOST) return
  const peer = peers.get(client) ?? { el: $('#carets').appendChild(make('div', 'peer')), button: make('button', { type: 'button' }) }
  clearTimeout(peer.timer)
  Object.assign(peer, { name, from, to, caret: make('div', 'caret', make('bdi', '', name)), timer: setTimeout(remove, CARET_TTL * 1e3, client) })
  peer.button.onclick = () => goTo(peer)
  peers.set(client, peer)
  applyColour(peer.el, name)
  draw()
}

function remove(client) {
  const { timer, el, button } = peers.get(client)
  clearTimeout(timer)
  el.remove()
  button.remove()
  peers.delete(client)
  draw()
}

export function forget(user) {
  for (const [client, { name }] of peers) if (name === user) remove(client)
}

export function moveCarets(change) {
  for (const peer of peers.values()) Object.assign(peer, { from: move(peer.from, change), to: move(peer.to, change) })
}

// Drawing.

const range = document.createRange()

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
    for (const { name, el, caret, button, from, to } of peers.values()) {
      const [at] = rectangles(to, to + 1)
      caret.classList.toggle('atend', at?.left > sheet.left + sheet.width / 2)
      el.replaceChildren(...from < to ? rectangles(from, to).slice(0, 200).map(rect => put(make('div', 'chosen'), rect)) : [])
      if (at) el.append(put(caret, { left: at.left, top: at.top, width: 2, height: at.height }))
      const line = 'line ' + input.value.slice(0, to).split('\n').length, li = people.get(name)
      Object.assign(button, { textContent: line, ariaLabel: `Go to ${name}, ${line}` })
      if (button.parentNode !== li) li?.append(button)
    }
    summarize()
  })
}
new ResizeObserver(() => draw()).observe(paper)

function goTo({ to }) {
  if ($('#people').matches(':popover-open')) $('#people').hidePopover()
  input.focus({ preventScroll: true })
  input.setSelectionRange(to, to)
  scroller.scrollTop += ownTop() - scroller.getBoundingClientRect().top - 80
}
