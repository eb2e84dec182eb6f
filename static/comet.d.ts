// Types of comet.js, by hand. What it is and how it works is told there.

/** An event, the same whatever the technique. */
export interface RelayEvent<Data = any> {
  /** Its place among all events of the relay: the cursor. A roster has none. */
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

/** One user's state (then the event is `from` them), or a room's roster. In a crowd a roster has no names. */
export type Presence = RelayEvent<State | { count: number, users?: Record<string, State> }>

/**
 * Events between our cursor and `id` may be lost: they fell out of the history, or were from before a restart, or the
 * relay's ids went back. Or an operator erased the history of the room: then nothing before it exists any more.
 */
export type Gap = RelayEvent<{ reason: 'history' | 'restart' | 'future' | 'erased' }> & { id: number }

/**
 * connecting: for the first time. open: events come. reconnecting: it was lost, or not to be had yet. offline: and the
 * browser says that there is no network. closed: by close(), or refused for good (see the error); use() tries again.
 */
export type Status = 'connecting' | 'open' | 'reconnecting' | 'offline' | 'closed'

export interface StatusDetail {
  status: Status
  /** The technique in use, or being tried. */
  via?: string
  /** Milliseconds until it is tried again. */
  retryIn?: number
  /**
   * Why it is not open, or what was tried before and failed. While open: what use() asked for is not to be had. A page of another
   * origin can't see that the relay refuses it: the error then names the relay's flag `-origins` as the likely reason.
   */
  error?: CometError
  /** Whether this tab has the connection; the others are told by it. */
  leader: boolean
}

/** A message that send() could not deliver. With its `key` it may be sent again, and will not be published twice. */
export interface Undelivered extends How {
  data: any
  key: string
  error: CometError
}

export interface How {
  /** `message`, if not given. */
  type?: string
  /** Seconds after which it is worth nothing: a signal, which is kept out of the history. */
  ttl?: number
  /** To be named if the Comet has several. */
  room?: string
  /** The same key in the same room is published once. One is made up if not given. */
  key?: string
  /**
   * Publish only if the newest message that the room keeps has this id; 0: if it keeps none. Otherwise nothing is published, and send()
   * rejects with an error whose `status` is 412 and whose `id` is the newest: read what is new, and try again with that.
   */
  if?: number
}

export interface Options {
  /** Techniques, the best first: ws, sse, stream, longpoll, poll if not given; jsonp, iframe and multipart work too. */
  via?: string[]
  /** A cursor to go on from. */
  after?: number
  /** Without a cursor, begin with the newest so many messages. 0, from now on, if not given. */
  last?: number
  /** Be seen under this name, and see presence. */
  user?: string
  /** See presence without being seen (true), or neither (false). */
  presence?: boolean
  token?: string
  /** One connection for all tabs with the same url, user and token. True if not given; needs navigator.locks, which need https or localhost. */
  shared?: boolean
  /** Seconds between two polls: 5 if not given. */
  every?: number
}

export interface CometEvents {
  /** Every event of the relay, also those whose type is one of our own names: status, undelivered, event. */
  event: CustomEvent<RelayEvent>
  message: CustomEvent<RelayEvent & { id: number, room: string, time: number }>
  presence: CustomEvent<Presence>
  gap: CustomEvent<Gap>
  status: CustomEvent<StatusDetail>
  undelivered: CustomEvent<Undelivered>
}

export class Comet extends EventTarget {
  /**
   * @param url of a room or several: '/rooms/lobby', 'https://relay.example/rooms/a,b'. A path is below the folder that comet.js came
   * from: of the relay, whatever page it is in, and behind whatever prefix. In a bundle, or under another name, it is the page's.
   */
  constructor(url: string, options?: Options)

  /** All events up to here were dispatched. */
  readonly cursor: number | undefined
  readonly status: Status
  /** The technique in use. */
  readonly via: string | undefined
  /** Whether this tab has the connection. */
  readonly leader: boolean
  readonly rooms: string[]
  readonly user: string | undefined
  /** May be replaced; it counts from the next request on. */
  token: string | undefined

  /**
   * Publishes, and resolves with the id. Messages go one after the other, in the order of the calls. Tried again until it works; rejects
   * if it can't: refused for good, a newer message than `if`, a hundred waiting already, its ttl over, or closed. `undelivered` tells the same.
   */
  send(data: any, how?: How): Promise<number>
  /** Says that the user is typing. May be called on every key: it is told every 2.5 s at most. */
  typing(room?: string): void
  /** Sets the user's state; away is told again after reconnecting. */
  presence(state: State, room?: string): void
  /** Changes the technique in mid-stream, in all tabs; null or 'auto' goes back to the list of the options. */
  use(via?: string | string[] | null): void
  /** Ends it. What was not sent is given back by `undelivered`. */
  close(): void

  addEventListener<K extends keyof CometEvents>(type: K, listener: ((event: CometEvents[K]) => void) | EventListenerObject | null, options?: boolean | AddEventListenerOptions): void
  addEventListener(type: string, listener: ((event: CustomEvent<RelayEvent>) => void) | EventListenerObject | null, options?: boolean | AddEventListenerOptions): void
  removeEventListener<K extends keyof CometEvents>(type: K, listener: ((event: CometEvents[K]) => void) | EventListenerObject | null, options?: boolean | EventListenerOptions): void
  removeEventListener(type: string, listener: ((event: CustomEvent<RelayEvent>) => void) | EventListenerObject | null, options?: boolean | EventListenerOptions): void
}

/** What went wrong, in words. */
export class CometError extends Error {
  constructor(message: string, more?: Partial<Pick<CometError, 'status' | 'id' | 'retry' | 'final'>>)
  /** The HTTP status, if there was one. */
  status?: number
  /** With status 412: the id of the newest message, 0 if the room keeps none. */
  id?: number
  /** Milliseconds after which to try again, if the relay said so. */
  retry?: number
  /** Whether trying again is of no use. */
  final?: boolean
}

/** What a technique is given: where to ask, and whom to tell. */
export interface Link {
  /** The address, with the cursor and all else in it. */
  url(query?: Record<string, string | number>): string
  /** A line came: an event as JSON, or anything else, which is only a sign of life. */
  line(text: string): void
  /** An event came. */
  on(event: RelayEvent): void
  /** All up to this cursor has come. */
  at(cursor: number): void
  /** It is over. */
  done(error: Error): void
  /** Sleep, or until the page wakes. */
  nap(ms: number): Promise<void>
  /** Seconds between two polls. */
  every: number
  /** In so many seconds there is a sign of life; hello sets it. */
  beat: number
  /** Set by a technique that is not told, but asks: it is not sent rosters. */
  asks?: boolean
  /** Set by a technique that speaks both ways. */
  speak?(text: string): void
}

/** A technique opens a connection, tells the link what comes, and returns what closes it. One may be added. */
export const techniques: Record<string, (link: Link) => () => void>

/** Cuts bytes into lines, and gives each to `line`. */
export function lines(line: (text: string) => void): (bytes: Uint8Array) => void

/** A random number of milliseconds to wait after so many tries. */
export function backoff(tries: number): number
