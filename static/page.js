// What all pages share: the techniques' names, small helpers for the document, copying, and tokens.

/** The techniques, oldest first: the name and the year that all pages and the README give them, and how each works. */
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
export const descriptions = {
  refresh: 'a header makes the browser load the page again every few seconds',
  multipart: 'one response of many parts, each in place of the one before',
  html: 'a page that is shown while it loads, and never finished',
  poll: 'a request every few seconds; most responses are empty',
  iframe: 'a hidden page that never ends, with a script for each event',
  longpoll: 'the response waits for an event',
  stream: 'a response that never ends, with a line for each event',
  jsonp: 'long polling with script elements, from any origin',
  sse: 'a stream that the browser itself reads, and opens again',
  ws: 'one connection, both directions',
}
export const capitalized = text => text[0].toUpperCase() + text.slice(1)

export const plural = (n, one) => `${n} ${one}${n === 1 ? '' : 's'}`
export const sleep = ms => new Promise(done => setTimeout(done, ms))

export const $ = (selector, within = document) => within.querySelector(selector)

/** Makes an element; `props` is its class, or an object of properties. */
export function make(tag, props, ...content) {
  const el = Object.assign(document.createElement(tag), typeof props === 'string' ? { className: props } : props)
  el.append(...content)
  return el
}

/** Sets what an element says, but only if that is new: a screen reader would read it out again. */
export function setText(el, ...content) {
  const { textContent, childNodes } = make('p', '', ...content)
  if (el.textContent !== textContent) el.replaceChildren(...childNodes)
}

/** Calls back when the page is shown or hidden. A page that was left may stay in memory, and be shown again. */
export function onVisibility(change) {
  let left = false
  for (const type of ['pagehide', 'pageshow', 'visibilitychange']) addEventListener(type, () => {
    if (type !== 'visibilitychange') left = type === 'pagehide'
    change(!left && !document.hidden)
  })
}

/** Inserts the part of a page that needs scripts. Until then it is text: where no script runs or one fails, nobody sees it. */
export function insertMarkup() {
  const markup = $('#markup')
  markup.outerHTML = markup.textContent
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
  const { activeElement } = document, field = make('textarea', 'unseen', text)
  document.body.append(field)
  field.select()
  document.execCommand('copy')
  field.remove()
  activeElement?.focus()
}

/** Makes a button copy what `text` returns, and say so for a moment. */
export function copies(button, text, done = 'Copied') {
  const { textContent } = button
  button.onclick = async () => {
    await copy(text())
    button.textContent = done
    setTimeout(() => button.textContent = textContent, 2000)
  }
  return button
}

/** Puts a button after an element that copies its text. */
export const addCopyButton = (el, label = 'Copy') => el.after(' ', copies(make('button', { type: 'button', className: 'copy' }, label), () => el.textContent))

/**
 * Returns what this browser may do in a room: { required, user, exp, read, write }. Without a valid token `refused` is true,
 * and `error` says why. The relay keeps the token in a cookie that no script can read.
 */
export async function access(room = '') {
  const token = new URLSearchParams(location.search).get('token') ?? ''
  try {
    const response = await fetch('token?' + new URLSearchParams({ room, token }), { cache: 'no-store' }), { status } = response, answer = await response.json()
    if (status === 200) return answer
    if (status === 401) return { required: true, refused: true, read: false, write: false, error: answer.error }
  } catch { }
  return { required: false, read: true, write: true } // unknown: the next request shows it
}

/** Fills an element with a form for a token. `rights` is what it should allow, as options of the command that makes one. */
export function askForToken(element, error, rights = '-read lobby -write lobby') {
  element.innerHTML = `<form class="token">
<h2>This relay asks for a token</h2>
<p>It says who you are, and which rooms you may read and write.</p>
<label>Token <input name="token" required autocomplete="off" autocapitalize="none" spellcheck="false" maxlength="4096"></label>
<button>Continue</button>
<p>The operator makes one with the relay’s secret:</p>
<pre></pre>
<p>On Fly.io, where the secret is set:</p>
<pre></pre>
<p>For Cloud Run: the first, on your own machine.</p>
</form>`
  const form = element.firstChild, [own, fly] = form.querySelectorAll('pre'), command = `token -sub NAME ${rights}`
  own.textContent = `COMETES_SECRET=… cometes ${command}`
  fly.textContent = `fly ssh console -C "/cometes ${command}"`
  if (error && !/asks for a token/.test(error)) $('p', form).replaceWith(make('p', { className: 'wrong', role: 'alert' }, `Your token was not accepted: ${error}.`))
  form.onsubmit = e => { // the relay moves the token into a cookie, and redirects to the URL without it
    e.preventDefault()
    const url = new URL(location)
    url.searchParams.set('token', form.token.value.trim())
    location.replace(url)
  }
  element.hidden = false
  if (matchMedia('(hover: hover)').matches) form.token.focus()
}

/** Shows a form for a token: in place of #all if the relay refuses, or else one to open, if the token allows too little. */
export function offerToken({ refused, error }, enough, rights) {
  const form = make('div', { id: 'enter' }), all = $('#all')
  if (refused) {
    all.hidden = true
    all.before(form)
    askForToken(form, error, rights)
  } else if (!enough) {
    all.before(make('details', { id: 'another', ontoggle: () => askForToken(form, undefined, rights) }, make('summary', '', 'Use another token'), form))
  }
}
