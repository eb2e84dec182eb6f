/**
 * room.js: requests to one room, with fetch. comet.js sends what is to arrive some time; this is for what is to be published
 * now or not at all, since it depends on what is the newest.
 */
import { CometError } from './comet.js'

const RATE = 8 // requests in any second, at most

export class Room {
  #path
  #times = [] // of the last requests
  roundTrip = 50 // ms that the last request took

  constructor(name) {
    this.#path = 'rooms/' + name
  }

  /** Publishes once. Returns the id, and whether it is new: with a known key it is that of the first. */
  async publish(type, data, query) {
    const headers = { 'Content-Type': 'application/json' }
    return this.#request('?' + new URLSearchParams({ type, ...query }), { method: 'POST', headers, body: JSON.stringify(data) })
  }

  /** Reads all events that there are; `query` says from where. The list has the cursor to go on with. */
  async read(query) {
    for (const all = []; ;) {
      const { events, cursor } = await this.#request('/poll?presence=0&' + query, { cache: 'no-store' })
      if (!events.length) return Object.assign(all, { cursor })
      all.push(...events)
      query = 'after=' + cursor
    }
  }

  async #request(path, options) {
    const wait = (this.#times.at(-RATE) ?? -Infinity) + 1000 - performance.now()
    if (wait > 0) await new Promise(done => setTimeout(done, wait))
    if (this.#times.push(performance.now()) > RATE) this.#times.shift()
    const response = await fetch(this.#path + path, { signal: AbortSignal.timeout(15e3), ...options })
    this.roundTrip = performance.now() - this.#times.at(-1)
    const { ok, status, headers } = response, answer = await response.json().catch(() => ({}))
    if (ok) return { ...answer, isNew: status === 201 }
    const final = /^4(?!08|12|25|29)/.test(status) // it makes no sense to try again
    throw new CometError(answer.error || `the relay answered ${status}`, { status, id: answer.id, retry: headers.get('Retry-After') * 1e3, final })
  }
}
