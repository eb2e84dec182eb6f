// How lab and inspector open a connection for each technique, with nothing but what the browser offers: open(link) tells the
// link what it sees, and returns a function that closes the connection.

import { here, make, sleep } from './page.js'

export const pageQuery = new URLSearchParams(location.search)
const token = pageQuery.get('token')
export const runId = Math.random().toString(36).slice(2, 6).padEnd(4, '0') // in the events that this page publishes
export const room = pageQuery.get('room') || 'lab-' + runId
export const pattern = /^(\w{4}) #(\d+) (\d+\.\d) / // of an event's text: run, number, time of sending

export const unique = () => Math.random().toString(36).slice(2)
export const size = text => new TextEncoder().encode(text).length
export const interval = () => Math.min(55, Math.max(1, Math.round(document.querySelector('#every')?.valueAsNumber) || 2))

export function address(technique, query, rooms = room) {
  const url = here(`rooms/${encodeURIComponent(rooms).replaceAll('%2C', ',')}${technique && '/' + technique}`)
  for (const [name, value] of Object.entries({ token, ...query })) if (value != null) url.searchParams.set(name, value)
  return url.pathname + url.search
}

// In some browsers, requests without cookies have connections of their own. Only fetch can omit them.
export const cookies = { mode: 'omit' }
export const request = (url, options) => fetch(url, { credentials: cookies.mode, cache: 'no-store', ...options })

export const http = /^h[23]/.test(performance.getEntriesByType('navigation')[0]?.nextHopProtocol) ? 'HTTP/2' : 'HTTP/1.1'
export const headOf = ({ status, statusText, headers }) => `${http} ${status} ${statusText}\n` + [...headers].map(h => h.join(': ') + '\n').join('')

// The techniques, oldest first. Those with cookies are loaded by the browser itself: no script reads their heads. A link has
//
//     onRequest(url, more)   a request was sent; more is what is known of its head
//     onOpen(head)           its response began
//     onBody(text)           a part of the body arrived
//     onEvent(event, json)   an event arrived; json is its text, where that is known
//     onBatch(answer)        the events of one answer, and the cursor for the next request
//     onTexts(texts)         the messages that a page shows now
//     onActivity()           something arrived, perhaps only a heartbeat
//     onComplete()           the response is complete
//     onReconnect()          the browser opens a lost connection again
//     onError(error)         the connection failed, or ended when it should not

export const techniques = [
  {
    name: 'refresh', cookies: true, page: true, short: true,
    open(link) {
      const url = link.url({ wait: interval(), form: 0 }), frame = link.frame(url)
      let timeout
      frame.onload = () => {
        const page = frame.contentDocument?.querySelector('main')
        if (!page) return link.onError(new Error('the page did not load'))
        clearTimeout(timeout)
        const { timeOrigin } = frame.contentWindow.performance, [entry] = frame.contentWindow.performance.getEntriesByType('navigation')
        link.onRequest(url, '', entry && timeOrigin + entry.requestStart)
        link.onOpen()
        link.onBody(page.ownerDocument.documentElement.outerHTML, entry?.encodedBodySize)
        link.onTexts([...page.querySelectorAll('.message span')].map(text => text.textContent).reverse())
        link.onComplete()
        timeout = setTimeout(() => link.onError(new Error('the page did not refresh itself')), interval() * 1e3 + 30e3)
      }
      return () => { clearTimeout(timeout); frame.remove() }
    },
  },
  {
    name: 'multipart', picture: true,
    open: link => readStream(link, link.url({ as: 'json' })),
  },
  {
    name: 'html', cookies: true, page: true,
    open(link) {
      const frame = openFrame(link, { last: 0, form: 0 })
      const observer = new MutationObserver(() => {
        link.onActivity()
        for (let p; (p = frame.contentDocument?.querySelector('main > .message:not([data-read])'));) {
          const text = p.querySelector('span')
          if (!p.nextElementSibling && !pattern.test(text?.textContent)) return // a part is missing
          p.dataset.read = ''
          link.onBody(p.outerHTML + '\n')
          link.onTexts([text.textContent])
          const old = p.parentNode.children
          if (old.length > 100) old[0].remove() // the page never ends, but memory does
        }
      })
      const unwatch = watchFrame(link, frame, page => {
        link.onOpen()
        link.onBody(page.documentElement.outerHTML)
        observer.observe(page, { childList: true, subtree: true, characterData: true })
      })
      return () => { observer.disconnect(); unwatch(); frame.remove() }
    },
  },
  {
    name: 'poll', short: true,
    open: link => repeat(link, {}, () => sleep(interval() * 1e3)),
  },
  {
    name: 'iframe', cookies: true,
    open(link) {
      const frame = openFrame(link, {}, true)
      const unwatch = watchFrame(link, frame)
      const onMessage = e => {
        if (e.source !== frame.contentWindow) return
        if (e.data.type === 'hello') link.onOpen()
        link.onBody(`<script nonce="…">tell(${JSON.stringify(e.data)})</script>\n`)
        link.onEvent(e.data)
        frame.contentDocument?.querySelectorAll('script:not(:last-of-type)').forEach(old => old.remove())
      }
      addEventListener('message', onMessage)
      return () => { removeEventListener('message', onMessage); unwatch(); frame.remove() }
    },
  },
  {
    name: 'longpoll', wait: 25e3,
    open: link => repeat(link, { wait: 25 }),
  },
  {
    name: 'stream', apis: { xhr: 'XMLHttpRequest, as in 2004', fetch: 'fetch, since 2015' },
    open(link) {
      if (link.api === 'fetch') return readStream(link, link.url())
      const xhr = new XMLHttpRequest(), url = link.url(), onText = lines(link)
      let read = 0
      xhr.onreadystatechange = () => {
        if (xhr.readyState === 2) link.onOpen(`${http} ${xhr.status} ${xhr.statusText}\n` + xhr.getAllResponseHeaders().replaceAll('\r', ''))
        if (xhr.readyState < 3) return
        const text = xhr.responseText.slice(read)
        read += text.length
        if (text) onText(text)
        if (xhr.readyState === 4) link.onError(new Error('the response ended'))
        else if (read > 1e6) link.onError(new Error('XMLHttpRequest keeps all in memory, so it ends after a megabyte'))
      }
      link.onRequest(url)
      xhr.open('GET', url)
      xhr.send()
      return () => xhr.abort()
    },
  },
  {
    name: 'jsonp', cookies: true, wait: 25e3,
    open(link) {
      const callback = 'lab_' + unique()
      let script, called
      const next = () => {
        const src = link.url({ wait: called === undefined ? 0 : 25, callback })
        called = false
        script = make('script', {
          src,
          onerror: () => link.onError(new Error('the script did not load')),
          onload: () => { script.remove(); called ? next() : link.onError(new Error('the script did not call the callback')) },
        })
        link.onRequest(src)
        document.head.append(script)
      }
      window[callback] = answer => {
        called = true
        link.onOpen()
        link.onBody(`/**/${callback}(${JSON.stringify(answer)});\n`)
        link.onBatch(answer)
        link.onComplete()
      }
      next()
      return () => { script.onload = script.onerror = null; script.remove(); window[callback] = () => delete window[callback] }
    },
  },
  {
    name: 'sse', cookies: true,
    open(link) {
      const url = link.url(), source = new EventSource(url)
      const head = () => `Accept: text/event-stream\nCache-Control: no-cache\n${link.state === 'reconnecting' ? `Last-Event-ID: ${link.cursor}\n` : ''}`
      link.onRequest(url, head())
      source.onopen = () => link.onOpen()
      for (const type of ['message', 'hello', 'gap', 'bye', 'beat']) source.addEventListener(type, e => {
        const id = type === 'beat' ? '' : `id: ${e.lastEventId}\n`
        link.onBody(`${type === 'message' ? '' : `event: ${type}\n`}data: ${e.data}\n${id}\n`)
        link.onEvent(JSON.parse(e.data), e.data)
      })
      source.onerror = () => {
        if (source.readyState === EventSource.CLOSED) return link.onError(new Error('the EventSource gave up'))
        link.onReconnect()
        link.onRequest(url, head())
      }
      return () => source.close()
    },
  },
  {
    name: 'ws', socket: true,
    open(link) {
      const url = link.url(), socket = new WebSocket(new URL(url, location.href.replace(/^http/, 'ws')))
      link.onRequest(url, 'Connection: Upgrade\nUpgrade: websocket\nSec-WebSocket-Version: 13\nSec-WebSocket-Key: (16 bytes, Base64)\n')
      socket.onopen = () => link.onOpen('HTTP/1.1 101 Switching Protocols\nConnection: Upgrade\nUpgrade: websocket\nSec-WebSocket-Accept: (20 bytes, Base64)\n')
      socket.onmessage = e => {
        const n = size(e.data)
        const head = n < 126 ? [n] : n < 65536 ? [126, n >> 8, n & 255] : [127, 0, 0, 0, 0, n >> 24, n >> 16 & 255, n >> 8 & 255, n & 255]
        link.onBody(`[81 ${head.map(b => b.toString(16).padStart(2, '0')).join(' ')}] ${e.data}\n`, n + 1 + head.length)
        for (const json of e.data.split('\n')) link.onEvent(JSON.parse(json), json)
      }
      socket.onclose = e => link.onError(new Error(`the WebSocket closed (${e.code})`))
      return () => socket.close()
    },
  },
]

/** Runs what ends when the connection is closed. */
function run(link, task) {
  const abort = new AbortController()
  task(abort.signal).catch(link.onError)
  return () => abort.abort()
}

async function get(link, url, signal) {
  link.onRequest(url)
  const response = await request(url, { signal })
  if (!response.ok) throw Object.assign(new Error(`the relay answered ${response.status}`), { retry: response.headers.get('Retry-After') * 1e3 })
  link.onOpen(headOf(response))
  return response
}

/** Reads a response that never ends. */
const readStream = (link, url) => run(link, async signal => {
  const reader = (await get(link, url, signal)).body.getReader(), onText = lines(link), utf8 = new TextDecoder()
  for (let part; !(part = await reader.read()).done;) onText(utf8.decode(part.value, { stream: true }))
  throw new Error('the response ended')
})

/** Sends one request after the other. */
const repeat = (link, query, pause) => run(link, async signal => {
  for (let wait = 0; !signal.aborted; wait = query.wait) { // the first does not wait, to show that it works
    const text = await (await get(link, link.url({ wait }), signal)).text()
    link.onBody(text)
    link.onBatch(JSON.parse(text))
    link.onComplete()
    await pause?.()
  }
})

function openFrame(link, query, hidden) {
  const url = link.url(query)
  link.onRequest(url)
  return link.frame(url, hidden)
}

/** A frame has no event for the beginning of its page, nor for a lost connection, which some browsers show in its state. */
function watchFrame(link, frame, onBegin) {
  let begun
  const timer = setInterval(() => {
    const page = frame.contentDocument
    if (!page || begun && page.readyState !== 'loading') return link.onError(new Error('the connection was lost'))
    if (begun || !page.querySelector('main, script')) return
    begun = true
    onBegin?.(page)
  }, 50)
  frame.onload = () => link.onError(new Error('the page ended'))
  return () => clearInterval(timer)
}

/** Splits text into lines, wherever the network split it. */
function lines(link) {
  let rest = ''
  return text => {
    link.onBody(text)
    const all = (rest + text).split('\n')
    rest = all.pop()
    for (const line of all) if (line[0] === '{') link.onEvent(JSON.parse(line), line)
  }
}
