/**
 *     const comet = new Comet('/rooms/lobby', { user: 'ada' })
 *     comet.addEventListener('message', e => console.log(e.detail.from, e.detail.data))
 *     await comet.send('hi')
 *
 * The ways in which a server can push differ only in how an event travels: each is one short function, see
 * `techniques`. The rest is what all of them need. Types, options and events: comet.d.ts.
 */

/**
 * A technique opens link.url(query), the cursor is in it, and returns a function that closes it. It calls
 *
 *     link.line(text)   when a line came: an event, or just a sign of life
 *     link.on(event)    when an event came
 *     link.at(cursor)   when all up to there has come
 *     link.done(error)  when it is over
 */
export const techniques = {
  // 2011. Both ways. A frame is an event, or several, a line each.
  ws(link) {
    const socket = new WebSocket(link.url().replace(/^http/, 'ws'))
    socket.onmessage = e => e.data.split('\n').forEach(link.line)
    socket.onclose = e => link.done(new CometError(`the WebSocket closed (${e.code})`))
    link.speak = text => socket.send(text)
    return () => socket.close()
  },

  // 2006. It does not reconnect after every error, and a named event reaches only who knows the name: so we
  // reconnect, and ask for events without names.
  sse({ url, line, done }) {
    const source = new EventSource(url({ names: 0 }))
    for (const name of ['message', 'beat']) source.addEventListener(name, e => line(e.data))
    source.onerror = () => done(new CometError('the EventSource ended'))
    return () => source.close()
  },

  // ~2004. An answer that never ends, an event a line.
  stream: link => read(link, link.url()),

  // 1995. The same, with a boundary and headers before each event; only the event begins with a {.
  multipart: link => read(link, link.url({ as: 'json' })),

  // ~2000. A hidden page that never ends; its scripts post the events to us.
  iframe({ url, on, done }) {
    const hear = e => e.source === frame.contentWindow && on(e.data)
    addEventListener('message', hear)
    const frame = embed({ src: url() }, () => done(new CometError('the frame ended')))
    return () => {
      removeEventListener('message', hear)
      frame.remove()
    }
  },

  // ~2000. An answer that waits for news; then ask again.
  longpoll: link => ask(link, (wait, signal) => json(link.url({ wait }), { signal })),

  // 2005. The same by a <script> that calls us. It's in a frame, for a script that is only removed is still loaded.
  jsonp(link) {
    let stop
    const frame = embed({ srcdoc: '<p>' }, () => {
      const { contentDocument: page, contentWindow: view } = frame
      stop = ask(link, wait => new Promise((answer, fail) => {
        const script = page.createElement('script')
        view.comet = data => answer(structuredClone(data))
        script.onload = script.onerror = () => {
          fail(new CometError('the script did not call')) // no effect if it did
          script.remove()
        }
        script.src = link.url({ wait, callback: 'comet' })
        page.head.append(script)
      }))
    })
    return () => {
      stop?.()
      frame.remove()
    }
  },

  // Always.
  poll: link => ask(link, (_, signal) => json(link.url(), { signal }), () => link.nap(hidden() ? 25e3 : link.every * 1e3)),
}

/** Reads an answer that never ends. */
const read = (link, url) => run(link, async signal => {
  const reader = (await get(url, { signal })).body.getReader()
  for (let part, cut = lines(link.line); !(part = await reader.read()).done;) cut(part.value)
  throw new CometError('the stream ended')
})

/** Asks again and again; first without waiting, to see whether it works. After news there may be more. */
const ask = (link, question, pause) => run(link, async signal => {
  link.asks = true
  for (let wait = 0; !signal.aborted; wait = 25) {
    const { cursor, events } = await question(wait, signal)
    events.forEach(link.on)
    link.at(cursor)
    if (!events.length) await pause?.()
  }
})

function embed(what, onload) {
  const frame = Object.assign(document.createElement('iframe'), { hidden: true, onload, ...what })
  document.body.append(frame)
  return frame
}

function run({ done }, go) {
  const abort = new AbortController()
  go(abort.signal).catch(done)
  return () => abort.abort()
}

/** Cuts bytes into lines, wherever the network cut them. */
export function lines(line) {
  const utf8 = new TextDecoder()
  let rest = ''
  return bytes => {
    const all = (rest + utf8.decode(bytes, { stream: true })).split('\n')
    rest = all.pop()
    all.forEach(line)
  }
}

/** Full jitter: clients that were cut off together don't return together. */
export const backoff = tries => Math.random() * Math.min(30e3, 1e3 * 2 ** tries)

export class CometError extends Error {
  name = 'CometError'
  constructor(message, more) {
    super(message)
    Object.assign(this, more)
  }
}

/** fetch, but a refusal is an error, in the relay's words. */
async function get(url, options) {
  const response = await fetch(url, options)
  const { ok, status, headers } = response
  if (ok) return response
  const { error, id } = await response.json().catch(() => ({}))
  throw new CometError(error || `the relay answered ${status}`, {
    status, id,
    retry: headers.get('Retry-After') * 1e3 || undefined,
    final: /^4(?!08|25|29)/.test(status),
  })
}

const json = async (url, options) => (await get(url, options)).json()
const plain = error => error instanceof CometError ? error : new CometError(`the relay could not be reached: ${error?.message}`)
const home = /^http[^?#]*\/(?=comet\.js([?#]|$))/.exec(import.meta.url)?.[0] // undefined in a bundle
const unique = () => Date.now().toString(36) + Math.random().toString(36).slice(2)
const hidden = () => globalThis.document?.hidden
const patient = () => AbortSignal.timeout(15e3)

/** The technique that worked for a relay; or stores it. */
function memory({ origin }, via) {
  try {
    return via ? localStorage.setItem('comet ' + origin, via) : localStorage.getItem('comet ' + origin)
  } catch { } // there may be no storage
}

function known(list) {
  for (const via of list) if (!Object.hasOwn(techniques, via)) throw new CometError(`${via} is none of ${Object.keys(techniques)}`)
  return list
}

export class Comet extends EventTarget {
  cursor // all up to here was dispatched
  status = 'connecting'
  via // the technique in use
  leader = false // this tab has the connection

  #base; #options; #list // the techniques to use
  #link; #trial; #round // the connection; what may replace it; what to try next
  #fails = 0; #waits = 0 // rounds that found nothing; that found nothing better
  #timer; #pulse; #ticked; #due; #asked; #naps = new Set
  #queue = []; #sending; #ack; #state; #typed = 0
  #id = unique(); #client = this.#id; #session; #channel; #others = new Set; #behind; #missed = []
  #detail; #closed

  constructor(url, { via = ['ws', 'sse', 'stream', 'longpoll', 'poll'], user, presence = !!user, shared = true, every = 5, ...options } = {}) {
    super()
    const base = this.#base = new URL(home ? url.replace(/^\/(?!\/)/, '') : url, home ?? globalThis.location?.href)
    const path = base.pathname.replace(/\/$/, '').split('/')
    this.rooms = decodeURIComponent(path.pop()).split(',')
    base.pathname = path.join('/')
    this.#options = { via, presence, shared, every, ...options }
    this.#list = known(via)
    this.user = user
    this.token = options.token
    this.cursor = options.after
    this.#listen('add')
    queueMicrotask(() => this.#closed || this.#start()) // the page adds its listeners first
  }

  /**
   * One message goes after the other, so their order is kept; each has a key, so it may be sent twice and is
   * published once.
   */
  send(data, { type, ttl, room, if: newest, key = unique() } = {}) {
    const promise = new Promise((resolve, reject) => {
      const body = JSON.stringify(data)
      const item = { data, body, room, query: { type, ttl, if: newest, key }, until: Date.now() + ttl * 1e3, resolve, reject }
      const wrong = this.#closed ? 'this Comet is closed' : !body ? 'JSON can not say this' :
        this.#queue.length >= 100 && '100 messages are waiting already'
      if (wrong) return this.#undelivered(item, new CometError(wrong))
      this.#queue.push(item)
      this.#typed = 0
      this.#pump()
    })
    promise.catch(() => { }) // an event tells it too
    return promise
  }

  typing(room) {
    if (Date.now() - this.#typed < 2500) return
    this.#typed = Date.now()
    this.presence('typing', room)
  }

  presence(state, room) {
    if (state !== 'typing') this.#state = state
    if (!this.user || this.status !== 'open') return
    for (const r of room ? [room] : this.rooms) {
      if (this.#link?.speak) this.#link.speak(JSON.stringify({ type: 'presence', room: r, data: state }))
      else fetch(this.#url('/presence', { client: this.#client }, r), { method: 'POST', body: state }).catch(() => { })
    }
  }

  use(via) {
    this.#choose(via)
    this.#post({ use: via || 'auto' })
  }

  close() {
    if (this.#closed) return
    this.#closed = true
    this.#listen('remove')
    this.#leave()
    for (const item of this.#queue.splice(0)) this.#undelivered(item, new CometError('closed before it was sent'))
    this.#say({}, 'closed')
  }

  #url(tail, query, rooms = this.rooms.join()) {
    const url = new URL(this.#base)
    url.pathname += '/' + rooms + tail
    const all = { user: this.user, token: this.token, ...query }
    for (const name in all) if (all[name] !== undefined) url.searchParams.set(name, all[name])
    return url.href
  }

  /** Where to read. A browser asks for equal URLs one after the other, so none are. */
  #source(via, { unseen, ...query } = {}) {
    const { presence, last } = this.#options
    const seen = presence && this.user && !unseen // and who is seen sees
    return this.#url('/' + via, { after: this.cursor, last, presence: seen ? undefined : +presence, client: this.#client, _: unique(), ...query })
  }

  // Connecting. A round tries one technique after the other. Each is a trial until it shows that it works; only then
  // it replaces the connection we have.

  #choose(via) {
    this.#list = via && via !== 'auto' ? known([via].flat()) : this.#options.via
    this.#waits = 0
    this.#trial?.close()
    this.#trial = undefined
    this.#seek()
  }

  /** Begins a round: of all techniques, or those better than what we have; `again` includes that. */
  #seek(again = 0) {
    clearTimeout(this.#timer)
    if (!this.leader || this.#trial) return
    const list = this.#list, at = list.indexOf(this.#link?.via), first = memory(this.#base)
    this.#round = this.#link ? list.slice(0, at < 0 ? list.length : at + again) :
      [...list].sort((a, b) => (b === first) - (a === first))
    this.#next()
  }

  /** Goes on with the round, unless the relay said when to come back. */
  #next(error) {
    const via = error?.retry ? undefined : this.#round.shift()
    if (!via) return this.#rest(error)
    const link = this.#try(via)
    if (link === this.#trial && !this.#link) this.#say({ via, error })
  }

  #rest(error) {
    const link = this.#link
    if (link?.via === this.#list[0]) return
    if (!link && error.final) return this.#say({ error }, 'closed')
    const retryIn = link ? Math.min(5e3 * 2 ** this.#waits++, 300e3) : error.retry || backoff(this.#fails++)
    this.#timer = setTimeout(() => this.#link && hidden() || this.#seek(), retryIn) // what is better can wait until we are seen
    if (!link) this.#say({ error, retryIn })
    else if (error && this.#list !== this.#options.via) this.#say({ error }, 'open') // asked for, and not to be had
  }

  #try(via) {
    const { every } = this.#options
    let over, close
    const link = this.#trial = {
      via, every, beat: Math.max(15, every), nap: this.#nap,
      url: query => this.#source(via, query),
      line: text => {
        if (text[0] !== '{') return link.seen()
        try { text = JSON.parse(text) } catch (error) { return link.done(error) }
        link.on(text)
      },
      on: event => this.#on(link, event),
      at: cursor => this.#open(link) && this.#take({ id: cursor }),
      seen: () => { if (link === this.#link) this.#due = Date.now() + link.beat * 2e3 + 5e3 },
      close: () => {
        over = true
        link.cut?.()
        close?.()
      },
      done: error => {
        if (over) return
        link.close()
        const { origin } = globalThis.location ?? this.#base
        error = plain(error)
        if (this.status === 'connecting' && !error.status && origin !== this.#base.origin) error.message += `; likely its -origins does not list ${origin}`
        this.#lost(link, error)
      },
    }
    // What does not work by then is held back; if nothing works, the network may be slow.
    link.patience = setTimeout(() => link.done(new CometError(`no hello by ${via}`)), 3e3 * 2 ** Math.min(this.#fails, 3))
    try { close = techniques[via](link) } catch (error) { link.done(error) }
    return link
  }

  /** There was a sign of life: a trial becomes the connection. */
  #open(link) {
    if (link === this.#trial) {
      clearTimeout(link.patience)
      this.#link?.close()
      this.#link = link
      this.#trial = undefined
      link.since = Date.now()
      if (this.#list === this.#options.via) memory(this.#base, link.via)
      if (link.asks) this.#rosters().catch(() => { })
      this.#rest()
      this.#say({}, 'open')
    }
    link.seen()
    return link === this.#link
  }

  #lost(link, error) {
    if (link === this.#trial) {
      this.#trial = undefined
      return this.#next(error)
    }
    this.#link = undefined
    this.#waits = 0
    clearTimeout(this.#timer)
    if (Date.now() - link.since > 10e3) this.#fails = 0
    this.#trial ? this.#say({ error }) : this.#rest(error)
  }

  #say(more, status = globalThis.navigator?.onLine === false ? 'offline' : this.status === 'connecting' ? this.status : 'reconnecting') {
    const opens = status === 'open' && this.status !== status
    this.status = status
    const detail = this.#detail = { status, via: this.#link?.via, leader: this.leader, ...more }
    this.via = status === 'open' ? detail.via : undefined
    if (this.leader) this.#post({ detail })
    if (opens) this.#stir()
    if (opens && this.#state) this.presence(this.#state) // the relay may have forgotten
    this.#fire('status', detail)
  }

  // Taking events. Every source is in order and begins at our cursor or below: what is newer than the cursor is
  // taken, the rest was taken before.

  #on(link, event) {
    const { type, id, data } = event || {}
    if (!type || type === 'beat') return link.seen()
    if (type === 'ack' || type === 'error') return this.#ack?.(event)
    if (type === 'bye') return link.done(new CometError('the relay said bye', { retry: data?.retry || 1e3 }))
    if (type === 'hello') link.beat = data?.beat ?? link.beat
    if (!this.#open(link)) return
    if (type !== 'hello') this.#take(event)
    else if (this.cursor === undefined) this.#take({ id })
  }

  #take(event) {
    const { id, type, data } = event
    const prev = this.cursor ?? -1
    if (this.#closed) return
    if (id !== undefined) { // a roster has none
      // A gap's id is where to go on. When the relay's ids went back, so do we.
      if (type === 'gap' ? id < prev && data?.reason !== 'future' : id <= prev) return
      this.cursor = id
    }
    if (this.leader) this.#post({ prev, event })
    if (!type) return // only the cursor moves
    if (!['status', 'undelivered', 'event'].includes(type)) this.#fire(type, event)
    this.#fire('event', event)
  }

  #fire(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }))
  }

  /** Who is here, when no stream tells. */
  async #rosters() {
    if (this.#options.presence) for (const room of this.rooms) {
      const { count, users } = await json(this.#url('/presence', { _: unique() }, room), { signal: patient() })
      this.#take({ type: 'presence', room, data: { count, users } })
    }
  }

  // Sending.

  async #pump() {
    if (this.#sending) return
    this.#sending = true
    for (let item, tries = 0; (item = this.#queue[0]);) {
      let id, error
      try { id = await this.#deliver(item) } catch (e) { error = plain(e) }
      if (item !== this.#queue[0]) continue // closed meanwhile
      if (error && !error.final) {
        await this.#nap(error.retry || backoff(tries++))
        continue
      }
      tries = 0
      this.#queue.shift()
      error ? this.#undelivered(item, error) : item.resolve(id)
    }
    this.#sending = false
  }

  /** What the WebSocket doesn't acknowledge is posted: with its key that is safe, and the answer says why. */
  async #deliver({ body, room, query, until }) {
    if (Date.now() > until) throw new CometError('its time was over before it was sent', { final: true })
    const link = this.#link
    let timer
    if (link?.speak) try {
      return await new Promise((heard, unheard) => {
        timer = setTimeout(unheard, 10e3)
        link.cut = unheard
        this.#ack = ({ type, key, id }) => key === query.key && (type === 'ack' ? heard(id) : unheard())
        link.speak(`${JSON.stringify({ room, ...query }).slice(0, -1)},"data":${body}}`)
      })
    } catch { } finally { clearTimeout(timer) }
    const { id } = await json(this.#url('', query, room), {
      method: 'POST', body, headers: { 'Content-Type': 'application/json' }, signal: patient(),
      keepalive: body.length < 1e4, // it arrives even if the page goes
    })
    return id
  }

  #undelivered({ data, room, query, reject }, error) {
    this.#fire('undelivered', { data, room, ...query, error })
    reject(error)
  }

  // Sharing. The tab that holds a lock leads: it has the connection, and tells the others what it takes, and what its
  // cursor was before. If theirs is lower they have missed something, and ask the relay.

  #start(how = { ifAvailable: true }) {
    this.#stop()
    const { signal } = this.#session = new AbortController()
    const { locks } = globalThis.navigator || {}
    this.#ticked = Date.now()
    this.#due = Infinity
    this.#tick()
    if (!this.#options.shared || !locks || !globalThis.BroadcastChannel) return this.#lead()
    const name = 'comet ' + this.#url('', { presence: this.#options.presence })
    this.#channel = new BroadcastChannel(name)
    this.#channel.onmessage = e => this.#heard(e.data)
    const end = new Promise(end => { signal.onabort = end })
    const lead = () => signal.aborted || this.#lead() || end
    locks.request(name, how, lock => {
      locks.request(this.#id, () => end) // as long as we have it we are here
      if (lock) return lead()
      this.#due = this.#ticked + 10e3
      this.#post({ here: true })
      this.#catchUp()
      return locks.request(name, { signal }, lead)
    }).catch(error => {
      if (signal.aborted) return
      this.#options.shared = error.name === 'AbortError' // another tab took us for dead; else there are no locks here
      this.#start()
    })
  }

  #stop() {
    this.#session?.abort()
    clearTimeout(this.#pulse)
    this.#trial?.close()
    this.#link?.close()
    this.#channel?.close()
    this.#trial = this.#link = this.#channel = undefined
    this.leader = false
    this.#missed = []
    this.#stir()
  }

  #lead() {
    this.leader = true
    this.#seek()
  }

  #post(news) {
    this.#channel?.postMessage({ from: this.#id, client: this.#client, ...news })
  }

  #heard(news) {
    const { from, client, use, here, detail, prev, event } = news
    if (!this.#others.has(from)) navigator.locks.request(from, { signal: this.#session.signal }, () => this.#others.delete(from)).catch(() => { })
    this.#others.add(from)
    if (use) this.#choose(use)
    if (here && this.leader) {
      this.#look() // hidden, we would not
      this.#post({ detail: this.#detail, prev: this.cursor, event: { id: this.cursor } })
    }
    if (use || here || this.leader) return
    this.#client = client // to the relay, tabs that share a connection are one
    this.#due = Date.now() + 35e3
    this.#asked = false
    if (detail && (detail.status !== 'open' || detail.via !== this.via || detail.error)) this.#say({ ...detail, leader: false }, detail.status)
    if (!event) return
    if (this.#behind === this.#session || prev > this.cursor) {
      if (this.#missed.push(news) > 1e3) this.#missed.shift()
      return this.#catchUp()
    }
    this.#take(event)
  }

  /** Asks the relay for what was missed, and goes on with what was heard meanwhile. */
  async #catchUp() {
    const session = this.#session
    const past = () => session.signal.aborted || this.leader
    if (this.#behind === session) return
    this.#behind = session
    for (let tries = 0, more; ; more || await this.#nap(backoff(tries++))) {
      if (past()) return
      try {
        const { cursor, events } = await json(this.#source('poll', { user: undefined, unseen: 1 }), { signal: patient() })
        if (past()) return
        events.forEach(event => this.#take(event))
        this.#take({ id: cursor })
        more = events.length
        if (this.#missed[0] ? this.#missed[0].prev > this.cursor : more) continue
        await this.#rosters()
        break
      } catch { more = 0 }
    }
    this.#behind = undefined
    this.#missed.splice(0).forEach(news => this.#heard(news))
  }

  // The page's life.

  #listen(how) {
    for (const type of ['online', 'offline', 'visibilitychange', 'pagehide', 'pageshow']) globalThis[how + 'EventListener']?.(type, this.#page)
  }

  #page = ({ type, persisted }) => {
    if (type === 'pagehide') this.#leave()
    else if (type === 'pageshow') persisted && this.#start()
    else if (type === 'offline') this.#probe()
    else if (type === 'online' || !hidden()) this.#wake(type === 'online')
  }

  /** Goes, and says so if no other tab stays. */
  #leave() {
    const last = !this.#others.size
    this.#stop()
    if (last && this.user) for (const room of this.rooms) globalThis.navigator?.sendBeacon?.(this.#url('/presence', { client: this.#client }, room), 'offline')
  }

  /** The page is seen again, the network is back, the machine has slept. */
  #wake(again) {
    this.#ticked = Date.now()
    this.#fails = 0
    this.#tick()
    this.#stir()
    if (!this.leader) this.#post({ here: true })
    if (this.status !== 'closed') this.#seek(+again)
  }

  /** Looks; and goes on looking while the page is seen, also whether the clock jumped. */
  #tick() {
    clearTimeout(this.#pulse)
    this.#look()
    if (hidden()) return
    if (Math.abs(Date.now() - this.#ticked) > 15e3) return this.#wake(true)
    this.#ticked = Date.now()
    this.#pulse = setTimeout(() => this.#tick(), 5e3)
  }

  /** Is the connection dead? Or the leader? If it doesn't answer its lock is taken: it may be frozen. */
  #look() {
    if (Date.now() < this.#due) return
    if (this.#link) this.#link.done(new CometError('nothing came for too long'))
    else if (!this.#channel || this.leader) return
    else if (this.#asked) this.#start({ steal: true })
    else {
      this.#asked = true
      this.#due = Date.now() + 4e3
      this.#post({ here: true })
    }
  }

  /** The browser says that the network is gone; a relay on this machine may be heard all the same. */
  #probe() {
    const link = this.#link
    if (link) json(this.#source('poll', { user: undefined, unseen: 1 }), { signal: AbortSignal.timeout(4e3) })
      .catch(error => error.status || link.done(new CometError('the network is gone')))
  }

  #nap = ms => new Promise(done => {
    const wake = () => {
      clearTimeout(timer)
      this.#naps.delete(wake)
      done()
    }
    const timer = setTimeout(wake, ms)
    this.#naps.add(wake)
  })

  #stir() {
    this.#naps.forEach(wake => wake())
  }
}
