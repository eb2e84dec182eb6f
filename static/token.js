/**
 * token.js: what all pages do if the relay requires a token. The relay keeps the token in a cookie that no script can
 * read. So a page asks the relay what its token allows, and a form submits a new token in the URL, `?token=…`.
 */

const tokenInURL = () => new URLSearchParams(location.search).get('token')

/**
 * Returns what this browser may do in a room: { required, user, exp, read, write }. Without a room it only tells whether
 * the token is valid. Without a valid token `refused` is true, and `error` says what is wrong.
 * @param {string} [room]
 */
export async function access(room) {
  const query = new URLSearchParams(Object.entries({ room, token: tokenInURL() }).filter(([, value]) => value))
  const response = await fetch('token?' + query, { cache: 'no-store' }).catch(() => undefined)
  const body = await response?.json().catch(() => undefined)
  if (response?.ok && body) return body
  if (response?.status === 401) return { required: true, refused: true, read: false, write: false, error: body?.error }
  return { required: false, read: true, write: true } // unknown: the next request shows it
}

/**
 * Fills an element with a form for a token.
 * @param {HTMLElement} element
 * @param {string} [error] what is wrong with the present token
 * @param {string} [rights] what the new token should allow
 */
export function askForToken(element, error, rights = '-read lobby -write lobby') {
  const make = (tag, text, more) => Object.assign(document.createElement(tag), { textContent: text, ...more })
  const form = make('form', '', { className: 'token' })
  const label = make('label', 'Token ')
  const input = make('input', '', { name: 'token', required: true, autocomplete: 'off', autocapitalize: 'none', spellcheck: false, maxLength: 4096 })
  label.append(input)
  const command = `token -sub NAME ${rights}`
  form.append(
    make('h2', 'This relay asks for a token'),
    error && !/asks for a token/.test(error) ? make('p', `Your token was not accepted: ${error}.`, { className: 'wrong', role: 'alert' }) :
      make('p', 'It contains who you are, and which rooms you may read and write.'),
    label, make('button', 'Continue'),
    make('p', 'The operator of the relay makes one with the relay’s secret:'),
    make('pre', `COMETES_SECRET=… cometes ${command}`),
    make('p', 'On Fly.io, where the secret is already set:'),
    make('pre', `fly ssh console -C "/cometes ${command}"`),
    make('p', 'For Cloud Run, run the first command on your own machine.'),
  )
  form.onsubmit = e => {
    e.preventDefault()
    const url = new URL(location)
    url.searchParams.set('token', input.value.trim())
    location.replace(url) // the relay moves the token into a cookie, and redirects to this URL without it
  }
  element.replaceChildren(form)
  element.hidden = false
  if (matchMedia('(hover: hover)').matches) input.focus()
}
