// The pad's arithmetic, and its copies of a text, in Node: what several clients do at once, with a log in memory that is as
// the relay's. Each inserted character is unique, so one that is lost, doubled or cut in half is found.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { apply, boundary, compose, diff, invert, isEmpty, move, transform } from '../static/rebase.js'
import { History, MAX, Replica } from '../static/replica.js'

const RUNS = +process.env.RUNS || 10_000

/** Numbers that a seed decides. */
function random(seed) {
  const next = () => {
    seed = seed + 0x6d2b79f5 | 0
    let t = Math.imul(seed ^ seed >>> 15, 1 | seed)
    t = t + Math.imul(t ^ t >>> 7, 61 | t) ^ t
    return ((t ^ t >>> 14) >>> 0) / 2 ** 32
  }
  return n => Math.floor(next() * n)
}

/** A new character at each call: of one unit, of two, or one with an accent. */
function letters() {
  let n = 0
  return () => ++n % 3 ? String.fromCodePoint(0x4e00 + n) : String.fromCodePoint(0x20000 + n)
}

const ends = text => [0, ...[...text].map((at => c => at += c.length)(0))]

/** The text with something inserted or deleted, at the borders of characters. */
function changed(text, rand, letter) {
  const places = ends(text), i = rand(places.length), from = places[i], to = places[Math.min(i + rand(4), places.length - 1)]
  if (rand(3)) return text.slice(0, from) + Array.from({ length: 1 + rand(3) }, letter).join('') + text.slice(from)
  return text.slice(0, from) + text.slice(to)
}

test('changes: applied, inverted, composed and transformed, they agree', () => {
  for (let seed = 1; seed <= RUNS; seed++) {
    const rand = random(seed), letter = letters()
    const text = Array.from({ length: rand(12) }, letter).join('')
    const edit = from => {
      let all = [], now = from
      for (let n = rand(4); n--;) {
        const next = changed(now, rand, letter)
        all = compose(all, diff(now, next))
        now = next
      }
      assert.equal(apply(from, all), now, `seed ${seed}`)
      return all
    }
    const a = edit(text), b = edit(text), [a2, b2] = transform(a, b)
    assert.equal(apply(apply(text, a), invert(a, text)), text, `seed ${seed}`)
    assert.equal(apply(apply(text, b), a2), apply(apply(text, a), b2), `seed ${seed}: ${text} ${JSON.stringify([a, b])}`)
    assert.deepEqual(compose(a, []), compose([], a))
    for (const change of [a, b, a2, b2, compose(a, b2)]) for (const [i, step] of change.entries()) {
      assert.ok(step && (typeof step === 'number' || typeof change[i - 1] !== 'string') && !(typeof step === 'string' && change[i - 1] < 0), JSON.stringify(change))
    }
    for (const at of ends(text)) assert.ok(ends(apply(text, a)).includes(move(at, a)), `seed ${seed}`)
  }
})

test('text that looks like a number is text', () => {
  assert.equal(apply('ab', [1, '-5', -1]), 'a-5')
  assert.deepEqual(compose([1, '-5'], [1, '7', -1]), [1, '75'])
  assert.deepEqual(transform(['5'], ['-1', -2]), [[2, '5'], ['-1', 1, -2]])
  assert.equal(isEmpty([5]), true)
  assert.equal(isEmpty(['5']), false)
  assert.equal(move(2, [1, '55', -1]), 3)
})

test('at one place the earlier text is in front, and a caret stays before what others insert there', () => {
  assert.deepEqual(transform([2, 'mine'], [2, 'yours']), [[7, 'mine'], [2, 'yours', 4]])
  assert.equal(move(2, [2, 'yours']), 2)
  assert.equal(move(2, [1, 'yours']), 7)
  assert.equal(move(3, [1, -4]), 1)
})

test('a difference is where the caret is, and never inside of a character', () => {
  assert.deepEqual(diff('hello', 'helllo', 3), [2, 'l'])
  assert.deepEqual(diff('aaaa', 'aaa', 1), [1, -1])
  for (const [old, text, change] of [['😀', '😁', ['😁', -2]], ['a👩b', 'a👩‍🔬b', [1, '👩‍🔬', -2]], ['e', 'e\u0301', ['e\u0301', -1]], ['e\u0301', 'a\u0301', ['a\u0301', -2]],
    ['🇩🇪', '🇩🇰', ['🇩🇰', -4]], ['👍🏽', '👍🏿', ['👍🏿', -4]], ['한', '하', ['하', -1]], ['😀😀', '😀', [-2]]]) {
    assert.deepEqual(diff(old, text), change)
    assert.equal(apply(old, diff(old, text)), text)
  }
  assert.equal(boundary('a👩‍🔬b', 4), 1)
})

test('what is malformed, not on the newest edit, or a second time the same is ignored', () => {
  const replica = new Replica('me')
  const edit = (id, base, key, change) => replica.receive({ id, type: 'edit', data: { base, key, change } })
  edit(1, 0, 'a.1', ['hello'])
  edit(2, 1, 'a.1', ['hello'])
  assert.deepEqual([replica.text, replica.head], ['hello', 1])
  edit(3, 0, 'b.1', ['late'])
  assert.deepEqual([replica.text, replica.lost], ['hello', false])
  edit(3, 2, 'b.1', ['of another text'])
  assert.deepEqual([replica.text, replica.lost], ['hello', true])
  for (const bad of [[-6], [1.5], [6, 'x'], ['\ud83d'], ['\r'], ['x'.repeat(MAX)], 'x', null, [null], [[1]], [NaN]]) edit(4, 1, 'b.1', bad)
  for (const key of [null, 5, 'b', 'b.x', 'b.1.1', '.1', { toString: null }, 'x'.repeat(33) + '.1']) edit(5, 1, key, ['x'])
  assert.equal(replica.text, 'hello')
  edit(6, 1, 'b.1', [5, ' you'])
  assert.deepEqual([replica.text, replica.lost, replica.head], ['hello you', false, 6])
})

test('somebody who uses up our numbers does not make our edits vanish', () => {
  const one = new Replica('one')
  one.edit(['mine'])
  one.receive({ id: 1, type: 'edit', data: { base: 0, key: 'one.500', change: ['x'] } })
  let data = structuredClone(one.next())
  one.receive({ id: 2, type: 'edit', data })
  assert.equal(one.pending.length, 1)
  assert.equal(one.reject(), undefined)
  data = structuredClone(one.next())
  one.receive({ id: 3, type: 'edit', data })
  assert.deepEqual([one.text, one.pending, data.key], ['xmine', [], 'one.501'])
})

test('long edits and texts are published in parts, of whole characters; what comes in between makes a snapshot void', () => {
  const one = new Replica('one'), two = new Replica('two'), family = '👩‍👩‍👧‍👦'
  one.edit([family.repeat(2000)])
  assert.equal(one.view, family.repeat(2000))
  for (let id = 1, data; data = structuredClone(one.next()); id++) {
    assert.ok(JSON.stringify(data).length < 60e3)
    for (const step of data.change) if (typeof step === 'string') assert.equal(step.length % family.length, 0)
    one.receive({ id, type: 'edit', data })
  }
  assert.deepEqual([one.text, one.pending], [family.repeat(2000), []])
  one.receive({ id: 50, type: 'edit', data: { base: one.head, key: 'x.1', change: [-22000, '\u0001中'.repeat(MAX / 2)] } })
  const parts = one.snapshot()
  assert.ok(parts.length > 1)
  for (const part of parts) assert.ok(Buffer.byteLength(JSON.stringify(part)) < 65_536)
  const publish = (part, i) => two.receive({ id: 60 + i, type: 'snapshot', data: { ...part, after: i ? 59 + i : undefined } })
  publish(parts[0], 0)
  publish(parts[1], 2)
  assert.equal(two.text, '')
  parts.forEach(publish)
  assert.equal(two.text, one.text)
})

/**
 * A room: messages with ids in one order, `if`, keys, and a bound on what is kept; as the relay has them. A restart
 * forgets it all, and its ids begin higher.
 */
class Room {
  id = 1000; log = []; keys = new Map; floor = 0
  constructor(keeps) { this.keeps = keeps }
  get newest() { return this.log.at(-1)?.id ?? 0 }
  publish(type, data, { if: newest, key }) {
    if (this.keys.has(key)) return { status: 200, id: this.keys.get(key) }
    if (newest !== undefined && newest !== this.newest) return { status: 412, id: this.newest }
    const id = ++this.id
    this.log.push(structuredClone({ id, type, data }))
    if (key) this.keys.set(key, id)
    if (this.log.length > this.keeps) this.floor = this.log.shift().id
    for (const [key, id] of this.keys) if (id <= this.floor) this.keys.delete(key)
    return { status: 201, id }
  }
  after(cursor) {
    if (cursor < this.floor) return [{ id: this.floor, type: 'gap' }, ...this.log]
    return this.log.filter(({ id }) => id > cursor)
  }
  restart() {
    this.restarted = true
    this.id += 1e6
    this.floor = this.id
    this.log = []
    this.keys.clear()
  }
}

/** A client as pad.js is one, except that a test says when something happens. */
class Client {
  newest = 0; cursor = 0; lastSnapshot = 0; online = true
  constructor(room, name) {
    this.room = room
    this.name = name
    this.replica = new Replica(name)
    this.text = '' // what a textarea would show
    this.history = new History
  }
  show(change) {
    if (!change) return
    this.text = apply(this.text, change)
    this.caret &&= move(this.caret, change)
    this.history.rebase(change)
  }
  type(text) {
    const change = diff(this.text, text)
    if (isEmpty(change)) return
    this.history.add(change, this.text)
    this.replica.edit(change)
    this.text = text
  }
  undo(which = 'undo') {
    const change = this.history[which](this.text)
    if (!change) return
    this.replica.edit(change)
    this.text = apply(this.text, change)
  }
  take(event) {
    if (event.type === 'gap') {
      this.replica.lost = true
      this.newest = 0
    } else if (event.id > this.newest) {
      this.newest = event.id
      this.show(this.replica.receive(event))
      if (event.type === 'snapshot') this.lastSnapshot = event.id
    }
    assert.equal(this.text, this.replica.view)
  }
  /** Reads some of what is new. */
  read(most = Infinity) {
    if (this.online) for (const event of this.room.after(this.cursor).slice(0, most)) {
      this.cursor = event.id
      this.take(event)
    }
  }
  /** Publishes what is next. The answer may be lost. */
  publish(answered = true) {
    if (!this.online) return
    const { replica, room } = this
    if (replica.lost) return this.recover()
    const due = room.log.filter(({ id, type }) => id > this.lastSnapshot && type === 'edit').length >= 6
    if (due) for (const [i, part] of replica.snapshot().entries()) {
      const { status, id } = room.publish('snapshot', { ...part, after: i ? this.newest : undefined }, { if: this.newest })
      if (status !== 201) return
      this.take({ id, type: 'snapshot', data: { ...part, after: i ? this.newest : undefined } })
    }
    const data = structuredClone(replica.next())
    if (!data) return
    const { status, id } = room.publish('edit', data, { if: this.newest, key: data.key })
    if (answered && status === 201) this.take({ id, type: 'edit', data })
    if (answered && status === 412 && id < replica.head) replica.lost = true
    if (answered && status === 200 && id <= this.newest && replica.pending[0]?.key === data.key) this.show(replica.reject())
  }
  recover() {
    const { replica, room } = this
    this.read()
    if (!replica.lost) return
    const newer = new Replica
    for (const event of room.log) newer.receive(event)
    this.show(replica.follow(newer))
    if (replica.lost) for (const [i, part] of replica.snapshot(newer).entries()) {
      const { status, id } = room.publish('snapshot', part, { if: room.newest })
      assert.equal(status, 201)
      this.take({ id, type: 'snapshot', data: part })
    }
  }
}

test('what one person writes at one place stays together, wherever others write', () => {
  const room = new Room(1000), clients = ['one', 'two', 'three'].map(name => new Client(room, name)), rand = random(7)
  const words = { one: 'ONE IS HERE ', two: 'two is there ', three: '3333333333 ' }
  for (let n = 0; n < 400; n++) {
    const client = clients[rand(3)], { name } = client, written = client.written ?? 0
    if (rand(3) === 0 && written < words[name].length) {
      const at = client.caret ?? 0
      client.type(client.text.slice(0, at) + words[name][written] + client.text.slice(at))
      Object.assign(client, { written: written + 1, caret: at + 1 })
    } else rand(2) ? client.read(1) : client.publish()
  }
  for (const client of [...clients, ...clients, ...clients]) {
    client.read()
    client.publish()
  }
  for (const client of clients) client.read()
  for (const client of clients) for (const name in words) assert.ok(client.text.includes(words[name]), client.text)
})

test(`${RUNS} runs of two to six clients, with delays, cuts, lost answers, snapshots, undo and restarts: equal texts, every character once`, t => {
  const count = { restarts: 0, snapshots: 0 }
  for (let seed = 1; seed <= RUNS; seed++) {
    const rand = random(seed), letter = letters(), room = new Room(seed % 3 ? 40 : 14)
    const clients = Array.from({ length: 2 + rand(5) }, (_, i) => new Client(room, 'c' + i))
    const deleted = new Set, undone = seed % 4 === 0, restarting = seed % 5 === 0
    try {
      for (let n = 20 + rand(60); n--;) {
        const one = clients[rand(clients.length)], what = rand(20)
        if (what < 7) {
          const old = one.text
          one.type(changed(old, rand, letter))
          const now = new Set(one.text)
          for (const c of old) if (!now.has(c)) deleted.add(c)
        } else if (what < 11) one.read(1 + rand(4))
        else if (what < 17) one.publish(rand(8) > 0)
        else if (what < 18 && undone) one.undo(rand(3) ? 'undo' : 'redo')
        else if (what === 18) one.online = !one.online
        else if (what === 19 && restarting && !room.restarted && !rand(3)) room.restart()
      }
      for (const one of clients) one.online = true
      for (let n = 0; n < 400 && (n < 3 || clients.some(one => one.replica.pending.length || one.replica.lost)); n++) for (const one of clients) {
        one.read()
        one.publish()
      }
      for (const one of clients) one.read()
      for (const one of clients) assert.deepEqual([one.replica.pending, one.replica.lost], [[], false])
      for (const one of clients) assert.equal(one.text, clients[0].text)
      const { text } = clients[0], found = new Set(text)
      assert.ok(text.isWellFormed())
      count.restarts += !!room.restarted
      count.snapshots += room.log.filter(({ type }) => type === 'snapshot').length
      const late = new Replica // somebody who comes now
      for (const event of room.log) late.receive(event)
      assert.equal(late.text, text)
      if (!undone) assert.equal(found.size, [...text].length, 'none is doubled') // if two delete the same and both undo that, it is there twice
      const written = letter().codePointAt(0)
      if (!undone) for (let i = 1; i < (written & 0xffff) - (written < 0x20000 ? 0x4e00 : 0); i++) {
        const c = i % 3 ? String.fromCodePoint(0x4e00 + i) : String.fromCodePoint(0x20000 + i)
        assert.equal(found.has(c), !deleted.has(c), `character ${i}`)
      }
    } catch (error) {
      error.message = `seed ${seed}: ${error.message}`
      throw error
    }
  }
  t.diagnostic(JSON.stringify(count))
})
