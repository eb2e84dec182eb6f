// What the pages share.

/** The techniques, oldest first, with the name and the year that all pages and the README give them. */
export const names = {
  refresh: 'client pull',
  multipart: 'server push',
  html: 'the page that never ends',
  poll: 'polling',
  iframe: 'the forever frame',
  longpoll: 'long polling',
  stream: 'streaming',
  jsonp: 'JSONP',
  sse: 'server-sent events',
  ws: 'WebSocket',
}
export const years = {
  refresh: '1995', multipart: '1995', html: 'about 1995', poll: '', iframe: 'about 2000',
  longpoll: 'about 2000', stream: 'about 2004', jsonp: '2005', sse: '2006', ws: '2011',
}
export const capitalized = text => text[0].toUpperCase() + text.slice(1)

export const $ = (selector, within = document) => within.querySelector(selector)

/** Makes an element with properties, and what is in it. */
export function make(tag, properties, ...content) {
  const element = Object.assign(document.createElement(tag), properties)
  element.append(...content)
  return element
}

/** Sets a text only if it is another, or a screen reader would read it out again. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text
}

/** Calls back when the page is shown or hidden. A page that was left may stay in memory, and be shown again. */
export function onVisibility(change) {
  let left = false
  for (const type of ['pagehide', 'pageshow', 'visibilitychange']) addEventListener(type, () => {
    if (type !== 'visibilitychange') left = type === 'pagehide'
    change(!left && !document.hidden)
  })
}

/** Inserts the part of a page that needs scripts. Until then it is text, so that nobody sees it where no script runs. */
export function insertMarkup() {
  const markup = $('#markup')
  markup.insertAdjacentHTML('afterend', markup.textContent)
  markup.remove()
}

/** Every address is relative to the page's own, since a proxy may serve the relay under a prefix. */
export const here = path => new URL(path, document.baseURI)

/** Makes text one word of a shell's command. */
export const quoteForShell = text => /^[\w.:/%,+-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`

/** A command for a shell; with the token, if the relay requires one. */
export const curl = (required, rest) => `curl ${required ? '-H "Authorization: Bearer $TOKEN" ' : ''}${rest}`

/** Copies text. Without HTTPS, browsers offer only the old way. */
export async function copy(text) {
  try { return await navigator.clipboard.writeText(text) } catch { }
  const field = make('textarea', { value: text, className: 'unseen' })
  const { activeElement } = document
  document.body.append(field)
  field.select()
  document.execCommand('copy')
  field.remove()
  activeElement?.focus()
}

/** A button that copies what `text` returns, and says so. */
export function copyButton(text, label = 'Copy') {
  const button = make('button', { type: 'button', className: 'copy' }, label)
  button.onclick = async () => {
    await copy(text())
    button.textContent = 'Copied'
    setTimeout(() => button.textContent = label, 2000)
  }
  return button
}
