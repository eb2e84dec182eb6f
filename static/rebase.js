/**
 * rebase.js: the arithmetic of a text that many people edit at once. Everybody applies the same edits in one order, the
 * room's, so everybody has the same text. Edits of one's own that are not in that order yet are moved over those that are.
 *
 * A change is a list of steps through a text: n keeps n UTF-16 units, -n deletes n, a string is inserted; what is left is
 * kept. apply('hallo', [1, 'e', -1]) is 'hello'.
 */
export const isText = step => typeof step === 'string'
export const isEmpty = change => !change.some(step => isText(step) || step < 0)

/** Appends a step. Each change has one form: no empty steps, equal ones joined, insertions before deletions. */
export function add(change, step) {
  const kind = step => isText(step) ? 'text' : Math.sign(step), last = step ? change.pop() : undefined
  if (last === undefined) change.push(...step ? [step] : [])
  else if (kind(step) === kind(last)) change.push(last + step)
  else if (isText(step) && last < 0) add(change, step).push(last)
  else change.push(last, step)
  return change
}

/** Takes a change apart, in pieces of any size. After its end it keeps. */
function reader(change) {
  let i = 0, rest = change[0] ?? Infinity
  return {
    get more() { return i < change.length },
    get inserts() { return isText(rest) },
    get deletes() { return !isText(rest) && rest < 0 },
    get size() { return isText(rest) ? rest.length : Math.abs(rest) },
    take(n = this.size) {
      const step = isText(rest) ? rest.slice(0, n) : Math.sign(rest) * n
      if (n < this.size) rest = isText(rest) ? rest.slice(n) : rest - step
      else rest = change[++i] ?? Infinity
      return step
    },
  }
}

export function apply(text, change) {
  let at = 0, result = ''
  for (const step of change) {
    if (isText(step)) result += step
    else if (step > 0) result += text.slice(at, at += step)
    else at -= step
  }
  return result + text.slice(at)
}

/** The change that takes back a change to a text. */
export function invert(change, text) {
  let at = 0
  return change.reduce((undo, step) => {
    if (!isText(step)) at += Math.abs(step)
    return add(undo, isText(step) ? -step.length : step > 0 ? step : text.slice(at + step, at))
  }, [])
}

/** Two successive changes as one. */
export function compose(first, second) {
  const a = reader(first), b = reader(second), both = []
  while (a.more || b.more) {
    if (b.inserts) add(both, b.take())
    else if (a.deletes) add(both, a.take())
    else {
      const n = Math.min(a.size, b.size), made = a.take(n)
      if (b.take(n) > 0) add(both, made)
      else if (!isText(made)) add(both, -n)
    }
  }
  return both
}

/**
 * Two changes to one text, made without knowing of each other: returns each as it is after the other, [later, earlier].
 * Where both insert, the text of the earlier one is in front, except at one place: there the later one goes on with a word.
 */
export function transform(later, earlier, word) {
  const a = reader(later), b = reader(earlier), results = [[], []]
  for (let at = 0; a.more || b.more;) {
    if (b.inserts && !(a.inserts && at === word)) add(results[0], b.size), add(results[1], b.take())
    else if (a.inserts) add(results[1], a.size), add(results[0], a.take())
    else {
      const n = Math.min(a.size, b.size), keeps = [a.take(n) > 0, b.take(n) > 0]
      at += n
      if (keeps[1]) add(results[0], keeps[0] ? n : -n)
      if (keeps[0]) add(results[1], keeps[1] ? n : -n)
    }
  }
  return results
}

/** Where a place in the text is after a change. It stays before what is inserted exactly there, or else goes behind it. */
export function move(at, change, behind = false) {
  let reached = 0
  for (const step of change) {
    if (behind ? reached > at : reached >= at) break
    if (isText(step)) at += step.length
    if (!isText(step) && step < 0) at -= Math.min(-step, at - reached)
    else reached += step.length ?? step
  }
  return at
}

/** The last place up to `at` that is not inside of what people see as one character: a letter with accents, an emoji. */
export function boundary(text, at) {
  const start = Math.max(0, at - 64), around = text.slice(start, at + 64)
  return start + (new Intl.Segmenter().segment(around).containing(at - start)?.index ?? at - start)
}

/** The change from one text to another, in whole characters. It ends where the caret is now, if that is possible. */
export function diff(old, text, caret = 0) {
  const shorter = Math.min(old.length, text.length), inside = (text, at) => boundary(text, at) < at
  let from = 0, end = 0 // units that are equal at the beginning, and at the end
  const extend = most => { while (end < most && old[old.length - 1 - end] === text[text.length - 1 - end]) end++ }
  extend(Math.min(shorter, text.length - caret))
  while (from < shorter - end && old[from] === text[from]) from++
  extend(shorter - from)
  while (inside(old, from) || inside(text, from)) from = Math.min(boundary(old, from), boundary(text, from))
  while (end && (inside(old, old.length - end) || inside(text, text.length - end))) end--
  return [from, text.slice(from, text.length - end), from + end - old.length].reduce(add, [])
}
