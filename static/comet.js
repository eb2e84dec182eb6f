/**
 * The client. Techniques differ only in how an event travels: each is one short function. The rest is what they share.
 * Example, types, options: comet.d.ts.
 */

/**
 * A technique connects to link.url(query), which contains the cursor, and returns what disconnects. It calls
 *
 *     link.line(text)   for each line: an event, or only a sign of life
 *     link.on(event)    for each event
 *     link.at(cursor)   when all events up to there have arrived
 *     link.done(error)  when the connection has ended
 */
export const techniques = {
  // WebSocket, 2011. Both directions. A frame is one event or several, one per line.
  ws(link) {
    const socket = new WebSocket(link.url().replace(/^http/, 'ws'))
    socket.onmessage = e => e.data.split('\n').forEach(link.line)
    socket.onclose = e => link.done(new CometError(`the WebSocket closed (${e.code})`))
    link.send = text => socket.send(text)
    return () => socket.close()
  },

  // Server-sent events, 2006. EventSource does not reconnect after every error, so we do. A named event needs a listener
  // for its name, so we ask for events without names.
  sse({ url, line, done }) {
    const source = new EventSource(url({ names: 0 }))
    for (const name of ['message', 'beat']) source.addEventListener(name, e => line(e.data))
    source.onerror = () => done(new CometError('the EventSource ended'))
    return () => source.close()
  },

  // Streaming, about 2004. A response that never ends, one event per line.
  stream: link => readLines(link, link.url()),

  // Server push, 1995. The same, with headers between the events; only an event begins with a {.
  multipart: link => readLines(link, link.url({ as: 'json' })),

  // The forever frame, about 2000. A hidden page that never ends; its scripts post the events to us.
  iframe({ url, on, done }) {
    const onMessage = e => e.source === frame.contentWindow && on(e.data)
    addEventListener('message', onMessage)
    const frame = addFrame({ src: url() }, () => done(new CometError('the frame ended')))
    return () => {
      removeEventListener('message', onMessage)
      frame.remove()
    }
  },

  // Long polling, about 2000. The response waits for an event; then we ask again.
  longpoll: link => pollLoop(link, (wait, signal) => getJSON(link.url({ wait }), { signal })),

  // JSONP, 2005. The same with a <script> that calls us. It is in a frame, because removing that ends the request.
  jsonp(link) {
    let stop
    const frame = addFrame({ srcdoc: '<p>' }, () => {
      const { contentDocument: page, contentWindow: view } = frame
      stop = pollLoop(link, wait => new Promise((resolve, reject) => {
        const script = page.createElement('script')
        view.comet = data => resolve(structuredClone(data))
        script.onload = script.onerror = () => {
          reject(new CometError('the script did not call')) // no effect if it did
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

  // Polling. Ask every few seconds.
  poll: link => pollLoop(link, (_, signal) => getJSON(link.url(), { signal }), () => link.sleep(hidden() ? 25e3 : link.every * 1e3)),
}

const readLines = (link, url) => run(link, async signal => {
  const reader = (await get(url, { signal })).body.getReader()
  for (let part, split = lines(link.line); !(part = await reader.read()).done;) split(part.value)
  throw new CometError('the stream ended')
})

/** The first request does not wait: it shows whether the technique works. */
const pollLoop = (link, request, pause) => run(link, async signal => {
  link.asks = true
  for (let wait = 0; !signal.aborted; wait = 25) {
    const { cursor, events } = await request(wait, signal)
    events.forEach(link.on)
    link.at(cursor)
    if (!events.length) await pause?.() // after events there may be more
  }
})

function addFrame(attributes, onload) {
  const frame = Object.assign(document.createElement('iframe'), { hidden: true, onload, ...attributes })
  document.body.append(frame)
  return frame
}

function run({ done }, task) {
  const abort = new AbortController()
  task(abort.signal).catch(done)
  return () => abort.abort()
}

/** Splits bytes into lines, wherever the network cut them. */
export function lines(line) {
  const utf8 = new TextDecoder()
  let rest = ''
  return bytes => {
    const all = (rest + utf8.decode(bytes, { stream: true })).split('\n')
    rest = all.pop()
    all.forEach(line)
  }
}

/** Full jitter: clients that were cut off together return one by one. */
export const backoff = tries => Math.random() * Math.min(30e3, 1e3 * 2 ** tries)

export class CometError extends Error {
  name = 'CometError'
  constructor(message, more) {
    super(message)
    Object.assign(this, more)
  }
}

/** fetch, but throws HTTP errors. */
export async function get(url, options) {
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

const getJSON = async (url, { signal = AbortSignal.timeout(15e3), ...options } = {}) => (await get(url, { signal, ...options })).json()
const toCometError = error => error instanceof CometError ? error : new CometError(`the relay could not be reached: ${error?.message}`)
const scriptFolder = /^http[^?#]*\/(?=comet\.js([?#]|$))/.exec(import.meta.url)?.[0] // not in a bundle
const unique = () => Date.now().toString(36) + Math.random().toString(36).slice(2)
const hidden = () => globalThis.document?.hidden

/** The technique that worked the last time. */
function remembered({ origin }, via) {
  const key = 'comet ' + origin
  try { return via ? localStorage.setItem(key, via) : localStorage.getItem(key) } catch { } // there may be no storage
}

function checked(list) {
  for (const via of list) if (!Object.hasOwn(techniques, via)) throw new CometError(`${via} is none of ${Object.keys(techniques)}`)
  return list
}

export class Comet extends EventTarget {
  cursor // all events up to here were dispatched
  status = 'connecting'
  via // the technique in use
  leader = false // this tab has the connection

  #base; #options; #closed; #lastStatus
  #techniques; #untried // to use, best first; left in this round
  #link; #trial // the connection; what may replace it
  #failedRounds = 0; #upgradeTries = 0; #retryTimer
  #deadline; #pinged; #checkTimer; #checkedAt; #sleepers = new Set
  #queue = []; #sending; #onReply; #ownState; #typedAt = 0
  #tabId = unique(); #clientId = this.#tabId; #session; #channel; #otherTabs = new Set; #catchingUp; #buffered = []

  constructor(url, { via = ['ws', 'sse', 'stream', 'longpoll', 'poll'], user, presence = !!user, shared = true, every = 5, ...options } = {}) {
    super()
    const base = this.#base = new URL(scriptFolder ? url.replace(/^\/(?!\/)/, '') : url, scriptFolder ?? globalThis.location?.href)
    const path = base.pathname.replace(/\/$/, '').split('/')
    this.rooms = decodeURIComponent(path.pop()).split(',')
    base.pathname = path.join('/')
    this.#options = { via, presence, shared, every, ...options }
    this.#techniques = checked(via)
    this.user = user
    this.token = options.token
    this.cursor = options.after
    this.#listenToPage('add')
    queueMicrotask(() => this.#closed || this.#start()) // the page adds its listeners first
  }

  /** Messages are sent one after the other, in order. Each has a key, so a retry does not publish it twice. */
  send(data, { type, ttl, room, if: newest, key = unique() } = {}) {
    const promise = new Promise((resolve, reject) => {
      const body = JSON.stringify(data)
      const item = { data, body, room, query: { type, ttl, if: newest, key }, until: Date.now() + ttl * 1e3, resolve, reject }
      const problem = this.#closed ? 'this Comet is closed' : !body ? 'JSON cannot express this' :
        this.#queue.length >= 100 && '100 messages are waiting already'
      if (problem) return this.#fail(item, new CometError(problem))
      this.#queue.push(item)
      this.#typedAt = 0
      this.#sendQueue()
    })
    promise.catch(() => { }) // there is an event, too
    return promise
  }

  typing(room) {
    if (Date.now() - this.#typedAt < 2500) return
    this.#typedAt = Date.now()
    this.presence('typing', room)
  }

  presence(state, room) {
    if (state !== 'typing') this.#ownState = state
    if (!this.user || this.status !== 'open') return
    for (const r of room ? [room] : this.rooms) {
      if (this.#link?.send) this.#link.send(JSON.stringify({ type: 'presence', room: r, data: state }))
      else fetch(this.#url('/presence', { client: this.#clientId }, r), { method: 'POST', body: state }).catch(() => { })
    }
  }

  use(via) {
    this.#setTechniques(via)
    this.#broadcast({ use: via || 'auto' })
  }

  close() {
    if (this.#closed) return
    this.#closed = true
    this.#listenToPage('remove')
    this.#leave()
    for (const item of this.#queue.splice(0)) this.#fail(item, new CometError('closed before it was sent'))
    this.#setStatus('closed')
  }

  #url(tail, query, rooms = this.rooms.join()) {
    const url = new URL(this.#base)
    url.pathname += '/' + rooms + tail
    const all = { user: this.user, token: this.token, ...query }
    for (const name in all) if (all[name] !== undefined) url.searchParams.set(name, all[name])
    return url.href
  }

  /** A URL to read from. Each is different: a browser loads equal URLs one after the other. */
  #source(via, query) {
    const { presence, last } = this.#options
    return this.#url('/' + via, {
      after: this.cursor, last, client: this.#clientId, _: unique(),
      presence: presence && this.user ? undefined : +presence, // the relay implies it for a user
      ...query,
    })
  }

  /** Reads new events, without being present. */
  #poll(signal) {
    return getJSON(this.#source('poll', { user: undefined, presence: +this.#options.presence }), { signal })
  }

  // Connecting. A round tries one technique after the other. Each is a trial until its first event arrives; only then it
  // replaces the connection.

  #setTechniques(via) {
    this.#techniques = via && via !== 'auto' ? checked([via].flat()) : this.#options.via
    this.#upgradeTries = 0
    this.#trial?.close()
    this.#trial = undefined
    this.#connect()
  }

  /** Begins a round. If connected it tries only better techniques; `reconnect` includes the same. */
  #connect(reconnect = false) {
    clearTimeout(this.#retryTimer)
    if (!this.leader || this.#trial) return
    const list = [...this.#techniques], current = list.indexOf(this.#link?.via), worked = remembered(this.#base)
    if (!this.#link) list.sort((a, b) => (b === worked) - (a === worked)) // what worked before is first
    else if (current >= 0) list.length = reconnect ? current + 1 : current
    this.#untried = list
    this.#tryNext()
  }

  /** If the relay said when to retry, this ends the round. */
  #tryNext(error) {
    const via = error?.retry ? undefined : this.#untried.shift()
    if (!via) return this.#scheduleRetry(error)
    const link = this.#attempt(via)
    if (link === this.#trial && !this.#link) this.#setStatus(this.#unconnected, { via, error })
  }

  #scheduleRetry(error) {
    const link = this.#link
    if (link?.via === this.#techniques[0]) return // there is nothing better
    if (!link && error.final) return this.#setStatus('closed', { error })
    const retryIn = link ? Math.min(5e3 * 2 ** this.#upgradeTries++, 300e3) : error.retry || backoff(this.#failedRounds++)
    this.#retryTimer = setTimeout(() => this.#link && hidden() || this.#connect(), retryIn) // no upgrade while hidden
    if (!link) this.#setStatus(this.#unconnected, { error, retryIn })
    else if (error && this.#techniques !== this.#options.via) this.#setStatus('open', { error }) // what use() asked for failed
  }

  #attempt(via) {
    const { every } = this.#options
    let ended, disconnect
    const link = this.#trial = {
      via, every, beat: Math.max(15, every), sleep: this.#sleep,
      url: query => this.#source(via, query),
      line: text => {
        if (text[0] !== '{') return link.alive()
        try { text = JSON.parse(text) } catch (error) { return link.done(error) }
        link.on(text)
      },
      on: event => this.#onEvent(link, event),
      at: cursor => this.#promote(link) && this.#deliver({ id: cursor }),
      alive: () => { if (link === this.#link) this.#deadline = Date.now() + link.beat * 2e3 + 5e3 },
      close: () => {
        ended = true
        link.abortSend?.()
        disconnect?.()
      },
      done: error => {
        if (ended) return
        link.close()
        const { origin } = globalThis.location ?? this.#base
        error = toCometError(error)
        if (this.status === 'connecting' && !error.status && origin !== this.#base.origin) error.message += `; likely its -origins does not list ${origin}`
        this.#onEnd(link, error)
      },
    }
    // A proxy may hold events back. If every technique fails the network may be slow, so wait longer.
    link.timer = setTimeout(() => link.done(new CometError(`no hello by ${via}`)), 3e3 * 2 ** Math.min(this.#failedRounds, 3))
    try { disconnect = techniques[via](link) } catch (error) { link.done(error) }
    return link
  }

  /** Something arrived, so a trial becomes the connection. */
  #promote(link) {
    if (link === this.#trial) {
      clearTimeout(link.timer)
      this.#link?.close()
      this.#link = link
      this.#trial = undefined
      link.since = Date.now()
      if (this.#techniques === this.#options.via) remembered(this.#base, link.via)
      if (link.asks) this.#fetchRosters().catch(() => { })
      this.#scheduleRetry()
      this.#setStatus('open')
    }
    link.alive()
    return link === this.#link
  }

  #onEnd(link, error) {
    if (link === this.#trial) {
      this.#trial = undefined
      return this.#tryNext(error)
    }
    this.#link = undefined
    this.#upgradeTries = 0
    clearTimeout(this.#retryTimer)
    if (Date.now() - link.since > 10e3) this.#failedRounds = 0
    this.#trial ? this.#setStatus(this.#unconnected, { error }) : this.#scheduleRetry(error)
  }

  get #unconnected() {
    return globalThis.navigator?.onLine === false ? 'offline' : this.status === 'connecting' ? this.status : 'reconnecting'
  }

  #setStatus(status, more) {
    const opens = status === 'open' && this.status !== status
    this.status = status
    const detail = this.#lastStatus = { status, via: this.#link?.via, leader: this.leader, ...more }
    this.via = status === 'open' ? detail.via : undefined
    if (this.leader) this.#broadcast({ detail })
    if (opens) this.#wakeUp()
    if (opens && this.#ownState) this.presence(this.#ownState) // the relay may have forgotten it
    this.#dispatch('status', detail)
  }

  // Receiving. Every source is in order and begins at our cursor or before: what is after the cursor is new.

  #onEvent(link, event) {
    const { type, id, data } = event || {}
    if (!type || type === 'beat') return link.alive()
    if (type === 'ack' || type === 'error') return this.#onReply?.(event)
    if (type === 'bye') return link.done(new CometError('the relay said bye', { retry: data?.retry || 1e3 }))
    if (type === 'hello') link.beat = data?.beat ?? link.beat
    if (!this.#promote(link)) return
    if (type !== 'hello') this.#deliver(event)
    else if (this.cursor === undefined) this.#deliver({ id })
  }

  #deliver(event) {
    const { id, type, data } = event
    const prev = this.cursor ?? -1
    if (this.#closed) return
    if (id !== undefined) { // a roster has none
      // A gap's id is the new cursor, even if the relay's ids went back.
      if (type === 'gap' ? id < prev && data?.reason !== 'future' : id <= prev) return
      this.cursor = id
    }
    if (this.leader) this.#broadcast({ prev, event })
    if (!type) return // only the cursor moves
    if (!['status', 'undelivered', 'event'].includes(type)) this.#dispatch(type, event)
    this.#dispatch('event', event)
  }

  #dispatch(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }))
  }

  /** Only streams receive rosters. */
  async #fetchRosters() {
    if (this.#options.presence) for (const room of this.rooms) {
      const { count, users } = await getJSON(this.#url('/presence', { _: unique() }, room))
      this.#deliver({ type: 'presence', room, data: { count, users } })
    }
  }

  // Sending.

  async #sendQueue() {
    if (this.#sending) return
    this.#sending = true
    for (let item, tries = 0; (item = this.#queue[0]);) {
      let id, error
      try { id = await this.#sendOne(item) } catch (e) { error = toCometError(e) }
      if (item !== this.#queue[0]) continue // closed meanwhile
      if (error && !error.final) {
        await this.#sleep(error.retry || backoff(tries++))
        continue
      }
      tries = 0
      this.#queue.shift()
      error ? this.#fail(item, error) : item.resolve(id)
    }
    this.#sending = false
  }

  /** What the WebSocket does not acknowledge is posted. The key makes that safe; the answer has the reason. */
  async #sendOne({ body, room, query, until }) {
    if (Date.now() > until) throw new CometError('its time was over before it was sent', { final: true })
    const link = this.#link
    let timer
    if (link?.send) try {
      return await new Promise((resolve, reject) => {
        timer = setTimeout(reject, 10e3)
        link.abortSend = reject
        this.#onReply = ({ type, key, id }) => key === query.key && (type === 'ack' ? resolve(id) : reject())
        link.send(`${JSON.stringify({ room, ...query }).slice(0, -1)},"data":${body}}`)
      })
    } catch { } finally { clearTimeout(timer) }
    const { id } = await getJSON(this.#url('', query, room), {
      method: 'POST', body, headers: { 'Content-Type': 'application/json' },
      keepalive: body.length < 1e4, // even if the page is closed
    })
    return id
  }

  #fail({ data, room, query, reject }, error) {
    this.#dispatch('undelivered', { data, room, ...query, error })
    reject(error)
  }

  // Sharing. The tab that holds a lock is the leader. It has the connection, and broadcasts each event with the cursor
  // before it. If a follower's cursor is lower it has missed something, and asks the relay.

  #start(how = { ifAvailable: true }) {
    this.#stop()
    const { signal } = this.#session = new AbortController()
    const { locks } = globalThis.navigator || {}
    this.#checkedAt = Date.now()
    this.#deadline = Infinity
    this.#check()
    if (!this.#options.shared || !locks || !globalThis.BroadcastChannel) return this.#lead()
    const name = 'comet ' + this.#url('', { presence: this.#options.presence })
    this.#channel = new BroadcastChannel(name)
    this.#channel.onmessage = e => this.#onChannelMessage(e.data)
    const ended = new Promise(resolve => { signal.onabort = resolve })
    const lead = () => signal.aborted || this.#lead() || ended
    locks.request(name, how, lock => {
      locks.request(this.#tabId, () => ended) // while we hold it, we exist for the other tabs
      if (lock) return lead()
      this.#deadline = this.#checkedAt + 10e3
      this.#broadcast({ here: true })
      this.#catchUp()
      return locks.request(name, { signal }, lead)
    }).catch(error => {
      if (signal.aborted) return
      this.#options.shared = error.name === 'AbortError' // another tab stole our lock; else locks do not work
      this.#start()
    })
  }

  #stop() {
    this.#session?.abort()
    clearTimeout(this.#checkTimer)
    this.#trial?.close()
    this.#link?.close()
    this.#channel?.close()
    this.#trial = this.#link = this.#channel = undefined
    this.leader = false
    this.#buffered = []
    this.#wakeUp()
  }

  #lead() {
    this.leader = true
    this.#connect()
  }

  #broadcast(message) {
    this.#channel?.postMessage({ from: this.#tabId, client: this.#clientId, ...message })
  }

  #onChannelMessage(message) {
    const { from, client, use, here, detail, prev, event } = message
    if (!this.#otherTabs.has(from)) navigator.locks.request(from, { signal: this.#session.signal }, () => this.#otherTabs.delete(from)).catch(() => { })
    this.#otherTabs.add(from)
    if (use) this.#setTechniques(use)
    if (here && this.leader) {
      this.#checkAlive() // a hidden tab has no timer for it
      this.#broadcast({ detail: this.#lastStatus, prev: this.cursor, event: { id: this.cursor } })
    }
    if (use || here || this.leader) return
    this.#clientId = client // to the relay, tabs that share a connection are one client
    this.#deadline = Date.now() + 35e3
    this.#pinged = false
    if (detail && (detail.status !== 'open' || detail.via !== this.via || detail.error)) this.#setStatus(detail.status, { ...detail, leader: false })
    if (!event) return
    if (this.#catchingUp === this.#session || prev > this.cursor) {
      if (this.#buffered.push(message) > 1e3) this.#buffered.shift()
      return this.#catchUp()
    }
    this.#deliver(event)
  }

  /** Asks the relay for missed events, then goes on with what the leader sent meanwhile. */
  async #catchUp() {
    const session = this.#session
    const over = () => session.signal.aborted || this.leader
    if (this.#catchingUp === session) return
    this.#catchingUp = session
    for (let tries = 0; !over();) {
      try {
        const { cursor, events } = await this.#poll()
        if (over()) return
        events.forEach(event => this.#deliver(event))
        this.#deliver({ id: cursor })
        const [next] = this.#buffered, behind = next ? next.prev > this.cursor : events.length
        if (!behind) {
          await this.#fetchRosters()
          this.#catchingUp = undefined
          return this.#buffered.splice(0).forEach(message => this.#onChannelMessage(message))
        }
        if (events.length) continue
      } catch { }
      await this.#sleep(backoff(tries++))
    }
  }

  // The page: hidden, closed, offline, asleep.

  #listenToPage(how) {
    for (const type of ['online', 'offline', 'visibilitychange', 'pagehide', 'pageshow']) globalThis[how + 'EventListener']?.(type, this.#onPageEvent)
  }

  #onPageEvent = ({ type, persisted }) => {
    if (type === 'pagehide') this.#leave()
    else if (type === 'pageshow') persisted && this.#start()
    else if (type === 'offline') this.#checkNetwork()
    else if (type === 'online' || !hidden()) this.#resume(type === 'online')
  }

  /** Stops. The last tab tells the relay. */
  #leave() {
    if (!this.#otherTabs.size && this.user) for (const room of this.rooms) globalThis.navigator?.sendBeacon?.(this.#url('/presence', { client: this.#clientId }, room), 'offline')
    this.#stop()
  }

  /** The page is visible, the network is back, or the machine has slept. */
  #resume(reconnect) {
    this.#checkedAt = Date.now()
    this.#failedRounds = 0
    this.#check()
    this.#wakeUp()
    if (!this.leader) this.#broadcast({ here: true })
    if (this.status !== 'closed') this.#connect(reconnect)
  }

  /** Runs every 5 s while the page is visible. If the clock jumps, the machine has slept. */
  #check() {
    clearTimeout(this.#checkTimer)
    this.#checkAlive()
    if (hidden()) return
    if (Math.abs(Date.now() - this.#checkedAt) > 15e3) return this.#resume(true)
    this.#checkedAt = Date.now()
    this.#checkTimer = setTimeout(() => this.#check(), 5e3)
  }

  /** Ends a silent connection. A silent leader is asked once; then its lock is stolen, for it may be frozen. */
  #checkAlive() {
    if (Date.now() < this.#deadline) return
    if (this.#link) this.#link.done(new CometError('nothing came for too long'))
    else if (!this.#channel || this.leader) return
    else if (this.#pinged) this.#start({ steal: true })
    else {
      this.#pinged = true
      this.#deadline = Date.now() + 4e3
      this.#broadcast({ here: true })
    }
  }

  /** The browser is offline; but a relay on this machine is still reachable. */
  #checkNetwork() {
    const link = this.#link
    if (link) this.#poll(AbortSignal.timeout(4e3)).catch(error => error.status || link.done(new CometError('the network is gone')))
  }

  #sleep = ms => new Promise(resolve => {
    const wake = () => {
      clearTimeout(timer)
      this.#sleepers.delete(wake)
      resolve()
    }
    const timer = setTimeout(wake, ms)
    this.#sleepers.add(wake)
  })

  #wakeUp() {
    this.#sleepers.forEach(wake => wake())
  }
}
