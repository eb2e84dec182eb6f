// The techniques of the lab, each by the browser's own means. This is the part to read: an entry of the table opens
// its connection, tells its line (see lab.js) what it sees, and returns what closes it.

export const asked = new URLSearchParams(location.search)
const token = asked.get('token')
export const run = Math.random().toString(36).slice(2, 6).padEnd(4, '0') // names this page in the events it publishes
export const room = asked.get('room') || 'lab-' + run
export const pattern = /^(\w{4}) #(\d+) (\d+\.\d) / // of an event: whose, its number, when it was sent

export const sleep = ms => new Promise(done => setTimeout(done, ms))
export const unique = () => Math.random().toString(36).slice(2)
export const size = text => new TextEncoder().encode(text).length
export const every = () => Math.min(55, Math.max(1, Math.round(document.querySelector('#every').valueAsNumber) || 2))

/** Every address is relative to the page's own: a proxy may have put the relay below a path. */
export const here = path => new URL(path, document.baseURI)

export function address(technique, query) {
  const url = here(`rooms/${encodeURIComponent(room)}${technique && '/' + technique}`)
  for (const [name, value] of Object.entries({ token, ...query })) if (value != null) url.searchParams.set(name, value)
  return url.pathname + url.search
}

// Requests without cookies have connections of their own in some browsers: see findPlaces in lab.js. That is for fetch;
// everything else asks with them.
export const cookies = { mode: 'omit' }
export const ask = (url, options) => fetch(url, { credentials: cookies.mode, cache: 'no-store', ...options })

export const http = /^h[23]/.test(performance.getEntriesByType('navigation')[0]?.nextHopProtocol) ? 'HTTP/2' : 'HTTP/1.1'
export const headOf = answer => `${http} ${answer.status} ${answer.statusText}\n` + [...answer.headers].map(h => h.join(': ') + '\n').join('')
const refused = answer => Object.assign(new Error(`the relay answered ${answer.status}`), { retry: answer.headers.get('Retry-After') * 1e3 })

// The techniques, in the order of their age.
//
//     line.asks(url, more)   a request goes out; more is what is known of its head
//     line.opens(head)       its answer begins
//     line.gets(bytes)       some of its body came, as text
//     line.hears(event)      and that was an event
//     line.reads(texts)      the lines that a page shows now
//     line.lives()           something came, if only a heartbeat
//     line.rests()           the answer is whole
//     line.ends(error)       it broke, or is over when it should not be

export const techniques = [
  {
    name: 'refresh', title: 'Client pull', year: '1995', cookies: true, page: true, short: true,
    says: 'The page’s head tells the browser to fetch it anew, every few seconds, for ever.',
    how: 'The page as the browser understood it, for its bytes it shows to nobody; the head is that of a HEAD request.',
    open(line) {
      const url = line.url({ wait: every(), form: 0 })
      const frame = line.frame(url)
      let late
      frame.onload = () => {
        const page = frame.contentDocument?.querySelector('main')
        if (!page) return line.ends(new Error('no page came'))
        clearTimeout(late)
        const { timeOrigin } = frame.contentWindow.performance, [entry] = frame.contentWindow.performance.getEntriesByType('navigation')
        line.asks(url, '', entry && timeOrigin + entry.requestStart)
        line.opens()
        line.gets(page.ownerDocument.documentElement.outerHTML, entry?.encodedBodySize)
        line.reads([...page.querySelectorAll('.message span')].map(said => said.textContent).reverse())
        line.rests()
        late = setTimeout(() => line.ends(new Error('the page did not come anew')), every() * 1e3 + 30e3)
      }
      return () => { clearTimeout(late); frame.remove() }
    },
  },
  {
    name: 'multipart', title: 'Server push', year: '1995', picture: true,
    says: 'One answer of many parts, each of which replaces the one before: a picture that moves, or a page.',
    how: 'As fetch read them, which tells the parts apart by their boundary.',
    open: line => readByFetch(line, line.url({ as: 'json' })),
  },
  {
    name: 'html', title: 'Endless page', year: 'about 1995', cookies: true, page: true,
    says: 'A page that never ends: the browser shows what has come of it, so the server just goes on.',
    how: 'The newest line as the browser understood it, for its bytes it shows to nobody; the head is that of a HEAD request.',
    open(line) {
      const url = line.url({ last: 0, form: 0 })
      line.asks(url)
      const frame = line.frame(url)
      const watch = new MutationObserver(() => {
        line.lives()
        for (let p; (p = frame.contentDocument?.querySelector('main > .message:not([data-read])'));) {
          const said = p.querySelector('span')
          if (!p.nextElementSibling && !pattern.test(said?.textContent)) return // not all of it is there
          p.dataset.read = ''
          line.gets(p.outerHTML + '\n')
          line.reads([said.textContent])
          const old = p.parentNode.children
          if (old.length > 100) old[0].remove() // it never ends, but the memory does
        }
      })
      const leave = watchFrame(line, frame, page => {
        line.opens()
        line.gets(page.documentElement.outerHTML)
        watch.observe(page, { childList: true, subtree: true, characterData: true })
      })
      return () => { watch.disconnect(); leave(); frame.remove() }
    },
  },
  {
    name: 'poll', title: 'Polling', year: 'as old as scripts', short: true,
    says: 'A script asks again and again, and mostly hears that there is nothing.',
    how: 'As fetch tells it.',
    open: line => askAgain(line, {}, () => sleep(every() * 1e3)),
  },
  {
    name: 'iframe', title: 'Forever frame', year: 'about 2000', cookies: true,
    says: 'A hidden page that never ends; each event in it is a script, which hands it to the page around.',
    how: 'Put together from the event that the frame handed over; the head is that of a HEAD request.',
    open(line) {
      const url = line.url()
      line.asks(url)
      const frame = line.frame(url, true)
      const leave = watchFrame(line, frame)
      const hear = e => {
        if (e.source !== frame.contentWindow) return
        if (e.data.type === 'hello') line.opens()
        line.gets(`<script nonce="…">tell(${JSON.stringify(e.data)})</script>\n`)
        line.hears(e.data)
        frame.contentDocument?.querySelectorAll('script:not(:last-of-type)').forEach(old => old.remove())
      }
      addEventListener('message', hear)
      return () => { removeEventListener('message', hear); leave(); frame.remove() }
    },
  },
  {
    name: 'longpoll', title: 'Long polling', year: 'about 2000', waits: 25e3,
    says: 'The same question with a patient answer: it is held until there is something to say.',
    how: 'As fetch tells it.',
    open: line => askAgain(line, { wait: 25 }),
  },
  {
    name: 'stream', title: 'Streamed answer', year: 'about 2004', ways: { xhr: 'XMLHttpRequest, as in 2004', fetch: 'fetch, of 2015' },
    says: 'An answer that never ends, a line an event, read while it is still coming.',
    how: 'As the script read them.',
    open(line) {
      if (line.way === 'fetch') return readByFetch(line, line.url())
      const xhr = new XMLHttpRequest(), url = line.url(), hear = lines(line)
      let read = 0
      xhr.onreadystatechange = () => {
        if (xhr.readyState === 2) line.opens(`${http} ${xhr.status} ${xhr.statusText}\n` + xhr.getAllResponseHeaders().replaceAll('\r', ''))
        if (xhr.readyState < 3) return
        const text = xhr.responseText.slice(read)
        read += text.length
        if (text) hear(text)
        if (xhr.readyState === 4) line.ends(new Error('the answer ended'))
        else if (read > 1e6) line.ends(new Error('XMLHttpRequest keeps all it has read, so after a megabyte it begins anew'))
      }
      line.asks(url)
      xhr.open('GET', url)
      xhr.send()
      return () => xhr.abort()
    },
  },
  {
    name: 'jsonp', title: 'JSONP', year: '2005', cookies: true, waits: 25e3,
    says: 'A long poll through a script tag, which once was the only way to ask another site.',
    how: 'Put together from what the script handed over; the head is that of a HEAD request.',
    open(line) {
      const callback = 'lab_' + unique()
      let script, heard
      const next = () => {
        script = document.createElement('script')
        script.src = line.url({ wait: heard === undefined ? 0 : 25, callback })
        heard = false
        script.onerror = () => line.ends(new Error('the script failed'))
        script.onload = () => { script.remove(); heard ? next() : line.ends(new Error('the script did not call')) }
        line.asks(script.getAttribute('src'))
        document.head.append(script)
      }
      window[callback] = answer => {
        heard = true
        line.opens()
        line.gets(`/**/${callback}(${JSON.stringify(answer)});\n`)
        line.takes(answer)
        line.rests()
      }
      next()
      return () => { script.onload = script.onerror = null; script.remove(); window[callback] = () => delete window[callback] }
    },
  },
  {
    name: 'sse', title: 'Server-sent events', year: '2006', cookies: true,
    says: 'The streamed answer as a standard: the browser reads it, reconnects by itself, and says where it was.',
    how: 'Put together from the event that the EventSource handed over; the head is that of a HEAD request.',
    open(line) {
      const url = line.url(), source = new EventSource(url)
      const more = () => `Accept: text/event-stream\nCache-Control: no-cache\n${line.state === 'asks again' ? `Last-Event-ID: ${line.cursor}\n` : ''}`
      line.asks(url, more())
      source.onopen = () => line.opens()
      for (const type of ['message', 'hello', 'gap', 'bye', 'beat']) source.addEventListener(type, e => {
        const id = type === 'beat' ? '' : `id: ${e.lastEventId}\n`
        line.gets(`${id}${type === 'message' ? '' : `event: ${type}\n`}data: ${e.data}\n\n`)
        line.hears(JSON.parse(e.data))
      })
      source.onerror = () => {
        if (source.readyState === EventSource.CLOSED) return line.ends(new Error('the EventSource gave up'))
        line.breaks('asks again') // by itself
        line.asks(url, more())
      }
      return () => source.close()
    },
  },
  {
    name: 'ws', title: 'WebSocket', year: '2011', socket: true,
    says: 'Not HTTP any more once it is open: frames, both ways, over one connection.',
    how: 'The frame by RFC 6455, put together from its text. Of the handshake the browser shows nothing.',
    open(line) {
      const url = line.url(), socket = new WebSocket(new URL(url, location.href.replace(/^http/, 'ws')))
      line.asks(url, 'Connection: Upgrade\nUpgrade: websocket\nSec-WebSocket-Version: 13\nSec-WebSocket-Key: (16 bytes, Base64)\n')
      socket.onopen = () => line.opens('HTTP/1.1 101 Switching Protocols\nConnection: Upgrade\nUpgrade: websocket\nSec-WebSocket-Accept: (20 bytes, Base64)\n')
      socket.onmessage = e => {
        const n = size(e.data)
        const head = n < 126 ? [n] : n < 65536 ? [126, n >> 8, n & 255] : [127, 0, 0, 0, 0, n >> 24, n >> 16 & 255, n >> 8 & 255, n & 255]
        line.gets(`[81 ${head.map(b => b.toString(16).padStart(2, '0')).join(' ')}] ${e.data}\n`, n + 1 + head.length)
        for (const event of e.data.split('\n')) line.hears(JSON.parse(event))
      }
      socket.onclose = e => line.ends(new Error(`the WebSocket closed (${e.code})`))
      return () => socket.close()
    },
  },
]

/** Reads an answer that never ends. */
function readByFetch(line, url) {
  const abort = new AbortController(), hear = lines(line), utf8 = new TextDecoder()
  const go = async () => {
    line.asks(url)
    const answer = await ask(url, { signal: abort.signal })
    if (!answer.ok) throw refused(answer)
    line.opens(headOf(answer))
    const reader = answer.body.getReader()
    for (let part; !(part = await reader.read()).done;) hear(utf8.decode(part.value, { stream: true }))
    throw new Error('the answer ended')
  }
  go().catch(line.ends)
  return () => abort.abort()
}

/** Asks for what there is, and again when that came. */
function askAgain(line, query, pause) {
  const abort = new AbortController()
  const go = async () => {
    for (let wait = 0; !abort.signal.aborted; wait = query.wait) { // the first answer comes at once, to see that one does
      const url = line.url({ wait })
      line.asks(url)
      const answer = await ask(url, { signal: abort.signal })
      if (!answer.ok) throw refused(answer)
      line.opens(headOf(answer))
      const text = await answer.text()
      line.gets(text)
      line.takes(JSON.parse(text))
      line.rests()
      await pause?.()
    }
  }
  go().catch(line.ends)
  return () => abort.abort()
}

/** A frame does not say when its page begins, nor that it breaks off; some browsers let one see it, else silence must tell. */
function watchFrame(line, frame, begins) {
  let begun
  const timer = setInterval(() => {
    const page = frame.contentDocument
    if (!page || begun && page.readyState !== 'loading') return line.ends(new Error('the page broke off'))
    if (begun || !page.querySelector('main, script')) return
    begun = true
    begins?.(page)
  }, 50)
  frame.onload = () => line.ends(new Error('the page ended'))
  return () => clearInterval(timer)
}

/** Cuts text into lines, wherever the network cut it; those that begin with { are events. */
function lines(line) {
  let rest = ''
  return text => {
    line.gets(text)
    const all = (rest + text).split('\n')
    rest = all.pop()
    for (const one of all) if (one[0] === '{') line.hears(JSON.parse(one))
  }
}
