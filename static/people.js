/**
 * people.js: what the chat and the pad share: names and their colours, what the browser remembers, and what is said about
 * the connection.
 */
import { capitalized, names, years } from './page.js'

const $ = id => document.getElementById(id)

export const make = (tag, className, ...content) => {
  const el = document.createElement(tag)
  if (className) el.className = className
  el.append(...content)
  return el
}

/** Values stored for this tab, such as the user's name (a duplicated tab is the same user), or for the whole browser. */
const storage = area => ({
  get(key) { try { return window[area].getItem('cometes ' + key) || '' } catch { return '' } },
  set(key, value) { try { window[area].setItem('cometes ' + key, value) } catch { } },
})
export const tabStorage = storage('sessionStorage'), browserStorage = storage('localStorage')

/** A name that the relay accepts: at most 64 characters, none that control the terminal or the direction of text. */
export function cleanName(name) {
  const plain = name.replace(/[\p{Cc}\u061C\u200E\u200F\u2028-\u202E\u2066-\u2069]/gu, '').trim()
  return [...plain].slice(0, 64).join('').trim()
}

const COLOURS = 24 // 12 hues, light and dark
export const colourOf = new Map // by name

/** A name has the same colour in every browser, unless another name in the page has that colour already. */
function colourIndex(name) {
  if (colourOf.has(name)) return colourOf.get(name)
  let hash = 0
  for (const c of name) hash = Math.imul(hash ^ c.codePointAt(0), 0x5bd1e995) ^ hash >>> 15
  let n = (hash >>> 0) % COLOURS
  if (colourOf.size === COLOURS) return n
  for (const taken = [...colourOf.values()]; taken.includes(n);) n = (n + 7) % COLOURS
  colourOf.set(name, n)
  return n
}

export function applyColour(el, name) {
  const n = colourIndex(name)
  el.style.setProperty('--hue', n % 12 * 30 + 15)
  el.classList.toggle('second', n >= 12)
}

/** Writes the names of the techniques into the menu. */
export function nameTechniques() {
  for (const way of $('menu').elements.way) if (names[way.value]) {
    way.nextElementSibling.textContent = capitalized(names[way.value])
    way.parentElement.append(make('small', '', years[way.value]))
  }
}

let countdown
/** Shows a status of comet.js. */
export function showStatus({ status, via, retryIn, error, leader }) {
  const words = { connecting: 'connecting', open: 'connected by ' + names[via], closed: 'not connected' }[status] ?? status
  if ($('words').textContent !== words) $('words').textContent = words // or a screen reader reads it out again
  document.body.dataset.status = status
  const at = Date.now() + retryIn
  const more = () => $('more').textContent =
    status === 'open' ? leader ? '' : ', through another tab' :
    status === 'offline' ? ': what you write is kept for later' :
    status === 'closed' ? `: ${error?.status === 401 ? 'this relay asks for a token' : error?.message}` :
    retryIn ? ` in ${Math.max(1, Math.ceil((at - Date.now()) / 1e3))} s` : '…'
  clearInterval(countdown)
  if (status === 'reconnecting' && retryIn) countdown = setInterval(more, 1e3)
  more()
  $('trouble').textContent = !error ? '' : `${status === 'open' ? 'That technique failed' : 'Trouble'}: ${error.message}.`
}
