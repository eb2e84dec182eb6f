// The types of comet.js, written by hand. How it works is explained there.
//
//     const comet = new Comet('/rooms/lobby', { user: 'ada' })
//     comet.addEventListener('message', e => console.log(e.detail.from, e.detail.data))
//     await comet.send('hi')

/** An event. It is the same with every technique. */
export interface RelayEvent<Data = any> {
  /** Its position among all events of the relay, which is the cursor. A roster has none. */
  id?: number
  room?: string
  type: string
  /** Who published it, if known. */
  from?: string
  /** Milliseconds since 1970. */
  time?: number
  data: Data
}

export type State = 'online' | 'typing' | 'away' | 'offline'

/** The state of one user, who is `from`; or, without `from`, a room's roster. A roster of more than a hundred users has no names. */
export type Presence = RelayEvent<State | { count: number, users?: Record<string, State> }>

/**
 * Events between the cursor and `id` may be lost. The reason is one of: the history no longer has them (`history`); the
 * relay was restarted (`restart`), or its newest id is lower than the cursor (`future`); an operator erased the room's
 * history (`erased`), so nothing before `id` exists any more.
 */
export type Gap = RelayEvent<{ reason: 'history' | 'restart' | 'future' | 'erased' }> & { id: number }

/**
 * - connecting: for the first time.
 * - open: events arrive.
 * - reconnecting: there is no connection; another attempt follows.
 * - offline: the same, and the browser reports that there is no network.
 * - closed: by close(), or because the relay refuses for good (see the error). use() tries again after a refusal.
 */
export type Status = 'connecting' | 'open' | 'reconnecting' | 'offline' | 'closed'

export interface StatusDetail {
  status: Status
  /** The technique in use, or being tried. */
  via?: string
  /** Milliseconds until the next attempt. */
  retryIn?: number
  /**
   * Why the status is not open, or why the technique tried before failed. While open: why the technique that use() asked for failed.
   * A page of another origin cannot see that the relay refuses it; the error then names the relay's flag `-origins` as the likely reason.
   */
  error?: CometError
  /** Whether this tab has the connection, and passes events to the other tabs. */
  leader: boolean
}

/** A message that send() could not deliver. Sent again with the same `key`, it is not published twice. */
export interface Undelivered extends How {
  data: any
  key: string
  error: CometError
}

export interface How {
  /** The default is `message`. */
  type?: string
  /** Makes it a signal: it expires after so many seconds, and is kept out of the history. */
  ttl?: number
  /** Required if the Comet has several rooms. */
  room?: string
  /** The same key in the same room is published once. The default is a random one. */
  key?: string
  /**
   * Publish only if the newest message in the room's history has this id; 0: if there is none. Otherwise nothing is published, and
   * send() rejects with an error whose `status` is 412 and whose `id` is the newest: read the new messages, and try again with that id.
   */
  if?: number
}

export interface Options {
  /** Techniques, the best first. The default is ws, sse, stream, longpoll, poll; jsonp, iframe and multipart work too. */
  via?: string[]
  /** The cursor to continue from. */
  after?: number
  /** Without a cursor: begin with this many of the newest messages. The default is 0: only new ones. */
  last?: number
  /** Be present under this name, and receive presence. */
  user?: string
  /** Receive presence without being present (true), or neither (false). */
  presence?: boolean
  token?: string
  /** One connection for all tabs with the same url, user and token. The default is true. It needs navigator.locks, so https or localhost. */
  shared?: boolean
  /** Seconds between two polls. The default is 5. */
  every?: number
}

export interface CometEvents {
  /** Every event of the relay, also those whose type is one of comet.js's own: status, undelivered, event. */
  event: CustomEvent<RelayEvent>
  message: CustomEvent<RelayEvent & { id: number, room: string, time: number }>
  presence: CustomEvent<Presence>
  gap: CustomEvent<Gap>
  status: CustomEvent<StatusDetail>
  undelivered: CustomEvent<Undelivered>
}

export class Comet extends EventTarget {
  /**
   * @param url of one room or several: '/rooms/lobby', 'https://relay.example/rooms/a,b'. A path is relative to the folder that comet.js
   * was loaded from, so it works in pages of other origins and behind a proxy's prefix. If comet.js is in a bundle, or has another name, a
   * path is relative to the page.
   */
  constructor(url: string, options?: Options)

  /** All events up to this id were dispatched. */
  readonly cursor: number | undefined
  readonly status: Status
  /** The technique in use. */
  readonly via: string | undefined
  /** Whether this tab has the connection. */
  readonly leader: boolean
  readonly rooms: string[]
  readonly user: string | undefined
  /** May be replaced; the next request uses it. */
  token: string | undefined

  /**
   * Publishes, and resolves with the id. Messages are sent one after the other, in the order of the calls, and retried until they are
   * published. Rejects, and dispatches `undelivered`, if the relay refuses for good, there is a newer message than `if`, a hundred messages
   * are waiting already, the ttl is over, or the Comet is closed.
   */
  send(data: any, how?: How): Promise<number>
  /** Reports that the user is typing. May be called on every key: it is sent at most every 2.5 s. */
  typing(room?: string): void
  /** Sets the user's state. It is sent again after reconnecting. */
  presence(state: State, room?: string): void
  /** Changes the technique in all tabs; no event is lost. null or 'auto' goes back to the list in the options. */
  use(via?: string | string[] | null): void
  /** Closes the connection for good. Messages that were not sent are dispatched as `undelivered`. */
  close(): void

  addEventListener<K extends keyof CometEvents>(type: K, listener: ((event: CometEvents[K]) => void) | EventListenerObject | null, options?: boolean | AddEventListenerOptions): void
  addEventListener(type: string, listener: ((event: CustomEvent<RelayEvent>) => void) | EventListenerObject | null, options?: boolean | AddEventListenerOptions): void
  removeEventListener<K extends keyof CometEvents>(type: K, listener: ((event: CometEvents[K]) => void) | EventListenerObject | null, options?: boolean | EventListenerOptions): void
  removeEventListener(type: string, listener: ((event: CustomEvent<RelayEvent>) => void) | EventListenerObject | null, options?: boolean | EventListenerOptions): void
}

/** An error whose message is written for people. */
export class CometError extends Error {
  constructor(message: string, more?: Partial<Pick<CometError, 'status' | 'id' | 'retry' | 'final'>>)
  /** The HTTP status, if there was one. */
  status?: number
  /** With status 412: the id of the newest message, 0 if there is none. */
  id?: number
  /** Milliseconds to wait before trying again, if the relay asked for it. */
  retry?: number
  /** Whether trying again is useless. */
  final?: boolean
}

/** What a technique is given: the URL to read, and what to call. */
export interface Link {
  /** The URL, with the cursor and all other parameters. */
  url(query?: Record<string, string | number>): string
  /** A line arrived: an event as JSON, or anything else, which only shows that the connection is alive. */
  line(text: string): void
  /** An event arrived. */
  on(event: RelayEvent): void
  /** All events up to this cursor have arrived. */
  at(cursor: number): void
  /** The connection has ended. */
  done(error: Error): void
  /** Sleeps; ends early when the page is visible again or the network is back. */
  sleep(ms: number): Promise<void>
  /** Seconds between two polls. */
  every: number
  /** Seconds between two heartbeats at most; hello sets it. */
  beat: number
  /** Set by a technique that polls. The relay does not send it rosters, so comet.js asks for them. */
  asks?: boolean
  /** Set by a technique that can send, too. */
  send?(text: string): void
}

/** A technique connects, calls the link for what arrives, and returns a function that disconnects. More may be added. */
export const techniques: Record<string, (link: Link) => () => void>

/** Splits bytes into lines, and calls `line` with each. */
export function lines(line: (text: string) => void): (bytes: Uint8Array) => void

/** Returns a random number of milliseconds to wait after this many tries. */
export function backoff(tries: number): number

/** fetch, but throws a CometError if the relay answers with an error. */
export function get(url: string, options?: RequestInit): Promise<Response>
