/**
 * replica.js: one client's copy of a shared text. It knows nothing of the network: events go in, in the room's order, and
 * what is to be published comes out.
 *
 *     edit      { base, key, change }                 a change to the text as the edit or snapshot `base` left it
 *     snapshot  { text, done, part, parts, after }    the whole text; if it is long, in parts, each after the one before
 *
 * Both are published with `if`, so nothing comes in between. An edit whose base is not the newest edit or snapshot is not
 * part of the text: everybody ignores it, as everybody ignores what is malformed. A key is the client's name and a number
 * that grows. The highest number of each client (`done`) makes an edit count once, however often it was published.
 */
import { add, apply, boundary, compose, diff, invert, isEmpty, isText, move, transform } from './rebase.js'

export const MAX = 40_000 // characters in a text, as UTF-16 counts them
const PIECE = 8_000 // characters in an edit: as JSON at most 48 KB, and the relay takes 64
const VERSIONS = 512 // edits that are remembered, more than a room keeps
const CLIENTS = 100 // of which a snapshot says what is done
const STEPS = 200 // that can be undone
const APART = 2_000 // characters in which two texts are compared one by one; it takes their square in memory

const size = change => change.reduce((sum, step) => sum + (isText(step) ? step.length : 0), 0)
const isGood = text => text.length <= MAX && text.isWellFormed() && !text.includes('\r') // a textarea makes \n of \r
const isId = Number.isSafeInteger

/** Whether everybody can apply a change to a text. */
function fits(change, text) {
  if (!Array.isArray(change) || !change.every(step => isText(step) || isId(step))) return false
  return change.reduce((sum, step) => sum + (isText(step) ? 0 : Math.abs(step)), 0) <= text.length && isGood(apply(text, change))
}

/** Splits a change into successive ones that can be published. It deletes first, so that the text never becomes too long. */
function split(change) {
  if (size(change) <= PIECE) return [change]
  const pieces = [change.filter(step => !isText(step)).reduce(add, [])]
  let at = 0
  for (const step of change) {
    if (!isText(step)) at += Math.max(step, 0)
    else for (let i = 0, end; i < step.length; at += end - i, i = end) {
      end = step.length - i <= PIECE ? step.length : boundary(step, i + PIECE)
      pieces.push([at, step.slice(i, end)].reduce(add, []))
    }
  }
  return pieces.filter(piece => !isEmpty(piece))
}

/** Splits a text into parts that are at most 60,000 bytes of JSON each. */
function parts(text) {
  if (new TextEncoder().encode(JSON.stringify(text)).length <= 60_000) return [text]
  let half = text.length >> 1
  if (!text.slice(0, half).isWellFormed()) half++
  return [...parts(text.slice(0, half)), ...parts(text.slice(half))]
}

/**
 * The shortest change between two texts of which nothing more is known, by the algorithm of Myers (1986): furthest[k] is how
 * far into the old text one comes with d insertions and deletions, where k is the place in the old text less that in the
 * new. If too much is different it is one replacement.
 */
function compare(old, text) {
  const a = [...old], b = [...text], furthest = new Int32Array(2 * APART + 3), middle = APART + 1, trace = []
  const comesDown = (furthest, middle, k, d) => k === -d || k < d && furthest[middle + k - 1] < furthest[middle + k + 1]
  for (let d = 0; d <= APART; d++) {
    trace.push(furthest.slice(middle - d - 1, middle + d + 2))
    for (let k = -d; k <= d; k += 2) {
      let x = comesDown(furthest, middle, k, d) ? furthest[middle + k + 1] : furthest[middle + k - 1] + 1
      while (x < a.length && x - k < b.length && a[x] === b[x - k]) x++
      furthest[middle + k] = x
      if (x >= a.length && x - k >= b.length) return walkBack(d)
    }
  }
  return diff(old, text)

  function walkBack(d) {
    const steps = []
    for (let x = a.length, y = b.length; d >= 0; d--) {
      const down = comesDown(trace[d], d + 1, x - y, d), k = x - y + (down ? 1 : -1), from = trace[d][d + 1 + k]
      for (; x > (d && from) && y > (d && from - k); x--, y--) steps.push(a[x - 1].length)
      if (d) steps.push(down ? b[--y] : -a[--x].length)
    }
    return steps.reverse().reduce(add, [])
  }
}

/** Removes one of successive edits, the first of which is to `text`. Returns what that changes in the text after the last. */
function remove(edits, i, text) {
  const [{ change }] = edits.splice(i, 1)
  return rebase(edits.slice(i), invert(change, edits.slice(0, i).reduce((text, { change }) => apply(text, change), text)))
}

function removeAll(edits, isDone, text) {
  for (let i; (i = edits.findIndex(isDone)) >= 0;) remove(edits, i, text)
}

/** Says of an edit whether it is done, by what a snapshot says; old clients are those of which a full list says nothing. */
const isDoneIn = done => ({ key = '' }) => {
  const [client, n] = key.split('.')
  return n <= (done.get(client) ?? (done.size < CLIENTS ? 0 : Infinity))
}

/** Where a change ends, and so the caret of who made it. */
export function endOf(change) {
  let at = 0, end = 0
  for (const step of change) {
    if (isText(step) || step > 0) at += step.length ?? step
    if (isText(step) || step < 0) end = at
  }
  return end
}

/**
 * Moves successive edits over a change to the text before them. Returns what that is after them. Each goes on where the one
 * before ended, if it can: so what one person writes stays together, even if another writes at the same place.
 */
function rebase(edits, over, word) {
  for (const edit of edits) {
    [edit.change, over] = transform(edit.change, over, word)
    word = edit.end
    edit.end = move(edit.end, over)
  }
  return over
}

export class Replica {
  text = '' // everybody's
  head = 0 // the edit or snapshot that made it
  pending = [] // own edits that are not in it: { key, change, sent }, and the end of what was written last
  lost = false // the text may not be what the room's events say; a snapshot decides

  #client; #count = 0; #snapshots = 0
  #versions = [{ id: 0 }] // the last edits: { id, key, change, undo }
  #done = new Map
  #word // the end of the last edit of one's own that is in the text
  #parts // of a snapshot that is not complete: { texts, id }

  constructor(client) {
    this.#client = client
  }

  /** The text with the pending edits. */
  get view() { return this.pending.reduce((text, { change }) => apply(text, change), this.text) }

  /** Whether somebody is in the middle of publishing a snapshot. */
  get waiting() { return !!this.#parts }

  /** Adds an edit of one's own to the view. It joins the one before, if that was not sent yet. */
  edit(change) {
    const last = this.pending.at(-1), both = last && !last.sent && compose(last.change, change)
    if (both && size(both) <= PIECE) Object.assign(last, { change: both, end: endOf(change) })
    else for (const piece of split(change)) this.pending.push({ key: `${this.#client}.${++this.#count}`, change: piece, end: endOf(piece) })
  }

  /** The next edit to publish, if there is one. */
  next() {
    while (this.pending[0] && isEmpty(this.pending[0].change)) this.pending.shift() // somebody else deleted the same
    const [edit] = this.pending
    if (edit) edit.sent = true
    return edit && { base: this.head, key: edit.key, change: edit.change }
  }

  /** Whether the next edit would make the text too long. */
  get full() { return !isGood(apply(this.text, this.pending[0]?.change ?? [])) }

  /** Gives up the next edit. Returns what that changes in the view. */
  drop() {
    return remove(this.pending, 0, this.text)
  }

  /** The next edit was published and ignored, since its number was used. If it is our own it gets another. Returns as `drop`. */
  reject() {
    if (!this.pending[0].key.startsWith(this.#client + '.')) return this.drop()
    this.#count = Math.max(this.#count, this.#done.get(this.#client) ?? 0) + 1
    this.pending[0].key = `${this.#client}.${this.#count}`
  }

  /** The text as events, each to be published after the one before. What a newer replica has is put behind it. */
  snapshot(newer = new Replica) {
    const isDone = isDoneIn(newer.#done), { edits, base } = this.#since(this.#versions.findIndex(isDone))
    removeAll(edits, isDone, base) // the newer text has them
    const both = edits.reduce((text, { change }) => apply(text, change), base) + (newer.text && '\n' + newer.text)
    const fits = isGood(both), done = new Map([...this.#done, ...fits ? newer.#done : []]), all = parts(fits ? both : this.text)
    for (const [client, n] of this.#done) done.set(client, Math.max(n, done.get(client)))
    return all.map((text, part) => ({ text, done: [...done].slice(-CLIENTS), part, parts: all.length }))
  }

  #remember(version) {
    if (this.#versions.push(version) > VERSIONS) this.#versions.shift()
  }

  /** The edits from a version on, and the text that they were made to. */
  #since(first) {
    const last = first < 0 ? [] : this.#versions.slice(first).filter(({ change }) => change)
    return { edits: last.map(({ key, change }) => ({ key, change, sent: true })), base: last.reduceRight((text, { undo }) => apply(text, undo), this.text) }
  }

  /**
   * Goes on from the replica of somebody who has just read the room, and so is not lost; unless the room has no snapshot, and
   * nothing of this text. Returns what that changes in the view.
   */
  follow(newer) {
    const continues = newer.#snapshots || newer.#versions.some(({ id }) => id === this.head)
    if (continues) return this.#adopt(newer.head, newer.text, newer.#done)
  }

  /** Where a place in the text as the event `base` left it is in the view, if that is known. */
  track(at, base) {
    const i = this.#versions.findIndex(({ id }) => id === base)
    if (i >= 0) return [...this.#versions.slice(i + 1), ...this.pending].reduce((at, { change = [] }) => move(at, change), at)
  }

  /** Takes an event. Returns what it changes in the view, if anything. */
  receive({ id, type, data }) {
    if (type === 'edit' && data) return this.#receiveEdit(id, data)
    if (type === 'snapshot' && data) return this.#receiveSnapshot(id, data)
  }

  #receiveEdit(id, { base, key, change }) {
    const [, client, n] = isText(key) && /^([\w-]{1,32})\.(\d{1,8})$/.exec(key) || []
    if (!client || n <= (this.#done.get(client) ?? 0)) return
    if (base !== this.head && !this.#versions.some(({ id }) => id === base)) this.lost = true // or else its author was only late
    if (base !== this.head || !fits(change, this.text)) return
    change = change.reduce(add, [])
    const own = this.pending[0]?.key === key, same = own && JSON.stringify(this.pending[0].change) === JSON.stringify(change)
    const first = own && !same ? remove(this.pending, 0, this.text) : []
    const word = same ? this.pending.shift().end : this.#word
    this.#remember({ id, key, change, undo: invert(change, this.text) })
    this.#done.delete(client) // so that those who were active last are at the end
    this.#done.set(client, +n)
    this.text = apply(this.text, change)
    this.head = id
    this.lost = false
    this.#parts = undefined
    this.#word = same ? word : move(word, change)
    return same ? undefined : compose(first, rebase(this.pending, change, word))
  }

  #receiveSnapshot(id, { done, text, part, parts, after }) {
    const isDone = one => Array.isArray(one) && isText(one[0]) && one[0].length <= 32 && isId(one[1]) && one[1] < 1e8
    if (!isText(text) || !isId(part) || !Array.isArray(done) || done.length > CLIENTS || !done.every(isDone)) return
    if (part === 0) this.#parts = { texts: [] }
    if (this.#parts?.texts.length !== part || part && this.#parts.id !== after) return
    this.#parts.texts.push(text)
    this.#parts.id = id
    if (part + 1 < parts && part < 9) return
    text = this.#parts.texts.join('')
    this.#parts = undefined
    if (isGood(text)) return this.#adopt(id, text, new Map(done))
  }

  /**
   * Goes on from a snapshot. Usually it is the text we have. After a restart of the relay it may be an older one: edits that
   * it lacks become pending again, whoever made them; their keys make them count once, even if others publish them, too.
   */
  #adopt(id, text, done) {
    const { view } = this, isDone = isDoneIn(done), first = this.#versions.findIndex(version => version.change && !isDone(version))
    let { edits, base } = this.#since(first)
    edits.push(...this.pending)
    const same = base === text // so what we know of the versions before still holds
    while (edits[0] && isDone(edits[0])) base = apply(base, edits.shift().change)
    removeAll(edits, isDone, base)
    if (base !== text) rebase(edits, compare(base, text))
    if (!same) this.#versions = []
    else if (first >= 0) this.#versions.splice(first)
    this.#remember({ id })
    Object.assign(this, { text, head: id, pending: edits, lost: false })
    this.#done = done
    this.#snapshots++
    if (!same) this.#word = undefined
    return view === this.view ? undefined : compare(view, this.view)
  }
}

/** What one user did, to be undone and redone while others go on. */
export class History {
  #undo = []; #redo = [] // changes to the view, each after those behind it in the list

  /** Adds a change that was made to a text. It joins the one before if both are one act, such as typing a word. */
  add(change, text, joins) {
    const undo = invert(change, text)
    if (joins && this.#undo.length) this.#undo.push(compose(undo, this.#undo.pop()))
    else if (this.#undo.push(undo) > STEPS) this.#undo.shift()
    this.#redo = []
  }

  /** Moves all over a change by somebody else. */
  rebase(change) {
    for (const list of [this.#undo, this.#redo]) {
      let over = change
      for (let i = list.length; i--;) [list[i], over] = transform(list[i], over)
    }
  }

  get canUndo() { return this.#undo.length > 0 }
  get canRedo() { return this.#redo.length > 0 }

  /** The change that takes back what was done last, or what was undone last; made to this text. */
  undo(text) { return this.#take(this.#undo, this.#redo, text) }
  redo(text) { return this.#take(this.#redo, this.#undo, text) }

  #take(from, to, text) {
    let change
    do change = from.pop(); while (change && isEmpty(change))
    if (change) to.push(invert(change, text))
    return change
  }
}
