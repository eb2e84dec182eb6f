/**
 * token.js: what all pages do when the relay asks for a token. The relay keeps it in a cookie that no script can read,
 * so a page asks the relay what its token is good for, and a form hands over a new one in the address, `?token=…`.
 */

const given = () => new URLSearchParams(location.search).get('token')

/**
 * What this browser may do in a room, or whether its token is good at all if none is named: { required, user, exp, read,
 * write }. Without a token, or with one that is not good, it may do nothing and is `refused`; `error` says what is wrong.
 * @param {string} [room]
 */
export async function access(room) {
  const query = new URLSearchParams(Object.entries({ room, token: given() }).filter(([, value]) => value))
  const answer = await fetch('token?' + query, { cache: 'no-store' }).catch(() => undefined)
  const said = await answer?.json().catch(() => undefined)
  if (answer?.ok && said) return said
  if (answer?.status === 401) return { required: true, refused: true, read: false, write: false, error: said?.error }
  return { required: false, read: true, write: true } // it does not say: what we try next will tell
}

/**
 * Fills an element with the form that asks for a token.
 * @param {HTMLElement} element  @param {string} [error] what is wrong with the one we have  @param {string} [rights] what it is to be good for
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
      make('p', 'It says who you are, and which rooms you may read and write.'),
    label, make('button', 'Continue'),
    make('p', 'Whoever runs the relay makes one, with the secret that the relay has:'),
    make('pre', `COMETES_SECRET=… cometes ${command}`),
    make('p', 'On Fly.io, where the secret is set already:'),
    make('pre', `fly ssh console -C "/cometes ${command}"`),
    make('p', 'For Cloud Run, run the first line on your own machine.'),
  )
  form.onsubmit = e => {
    e.preventDefault()
    const url = new URL(location)
    url.searchParams.set('token', input.value.trim())
    location.replace(url) // the relay moves it into a cookie, and comes back here without it
  }
  element.replaceChildren(form)
  element.hidden = false
  if (matchMedia('(hover: hover)').matches) input.focus()
}
