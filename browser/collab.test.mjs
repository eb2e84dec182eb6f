// The pad's events are not only for the pad: an editor on CodeMirror's collab extension writes into the same room. The relay
// is its authority, and our Replica the other side. Both rebase in their own way, and must have the same text.

import assert from 'node:assert/strict'
import { after, before, test } from 'node:test'
import { collab, getSyncedVersion, receiveUpdates, sendableUpdates } from '@codemirror/collab'
import { ChangeSet, EditorState } from '@codemirror/state'
import { Replica } from '../static/replica.js'
import { startRelay } from './harm.mjs'

let relay
before(async () => relay = await startRelay())
after(() => relay?.kill())

const publish = async (room, type, data, query) => {
  const answer = await fetch(`${relay.url}/rooms/${room}?${new URLSearchParams({ type, ...query })}`, { method: 'POST', headers: { 'Content-Type': 'application/json' }, body: JSON.stringify(data) })
  return { status: answer.status, ...await answer.json() }
}
const read = async (room, after) => (await (await fetch(`${relay.url}/rooms/${room}/poll?presence=0&${after ? 'after=' + after : 'last=256'}`)).json()).events

/** One of ours. */
class Ours {
  newest = 0
  constructor(room, name) {
    this.room = room
    this.replica = new Replica(name)
  }
  get text() { return this.replica.view }
  get isDone() { return !this.replica.pending.length }
  insert(at, text) { this.replica.edit([at, text].filter(Boolean)) }
  remove(from, to) { this.replica.edit([from, from - to].filter(Boolean)) }
  take(event) {
    if (event.id <= this.newest) return
    this.newest = event.id
    this.replica.receive(event)
  }
  async read() { (await read(this.room, this.newest)).forEach(event => this.take(event)) }
  async publish() {
    const data = this.replica.next()
    if (data) await publish(this.room, 'edit', data, { if: this.newest, key: data.key })
  }
}

/** One with CodeMirror. Its version is the number of edits; the room's ids are beside it. */
class Theirs {
  newest = 0; head = 0; count = 0
  constructor(room, name) {
    this.room = room
    this.name = name
    this.state = EditorState.create({ extensions: [collab({ clientID: name })] })
  }
  get text() { return this.state.doc.toString() }
  get isDone() { return !sendableUpdates(this.state).length }
  change(changes) { this.state = this.state.update({ changes }).state }
  insert(from, insert) { this.change({ from, insert }) }
  remove(from, to) { this.change({ from, to }) }
  take({ id, type, data: { base, key, change } }) {
    if (id <= this.newest) return
    this.newest = id
    if (type !== 'edit' || base !== this.head) return
    this.head = id
    const changes = []
    let at = 0
    for (const step of change) {
      if (typeof step === 'string') changes.push({ from: at, insert: step })
      else if (step > 0) at += step
      else changes.push({ from: at, to: at -= step })
    }
    let { length } = this.state.doc // of the text without what is not confirmed
    for (const { changes } of [...sendableUpdates(this.state)].reverse()) length = changes.length
    this.state = this.state.update(receiveUpdates(this.state, [{ clientID: key.split('.')[0], changes: ChangeSet.of(changes, length) }])).state
  }
  async read() { (await read(this.room, this.newest)).forEach(event => this.take(event)) }
  async publish() {
    const [update] = sendableUpdates(this.state)
    if (!update) return
    const change = []
    let at = 0
    update.changes.iterChanges((from, to, _from, _to, inserted) => {
      change.push(from - at, inserted.toString(), from - to)
      at = to
    })
    const key = `${this.name}.${this.count + 1}`
    const { status, id } = await publish(this.room, 'edit', { base: this.head, key, change: change.filter(Boolean) }, { if: this.newest, key })
    if (status !== 201) return
    this.count++
    this.take({ id, type: 'edit', data: { base: this.head, key, change: change.filter(Boolean) } })
  }
}

test('editors with @codemirror/collab and with rebase.js have the same text, and all that was written', { timeout: 120e3 }, async () => {
  let seed = 1
  const rand = n => (seed = seed * 48271 % 0x7fffffff) % n
  for (let run = 0; run < 12; run++) {
    const room = 'collab' + run, all = [new Ours(room, 'a'), new Theirs(room, 'b'), new Ours(room, 'c'), new Theirs(room, 'd')]
    const written = new Set, removed = new Set
    let letter = 0x4e00
    for (let n = 0; n < 120; n++) {
      const one = all[rand(4)], what = rand(10), { length } = one.text
      if (what < 4) {
        const words = Array.from({ length: 1 + rand(4) }, () => String.fromCharCode(letter++)).join('')
        for (const c of words) written.add(c)
        one.insert(rand(length + 1), words)
      } else if (what === 4 && length) {
        const from = rand(length), to = Math.min(length, from + 1 + rand(5))
        for (const c of one.text.slice(from, to)) removed.add(c)
        one.remove(from, to)
      } else if (what < 7) await one.read()
      else await one.publish()
    }
    for (let n = 0; n < 300 && !all.every(one => one.isDone); n++) for (const one of all) {
      await one.read()
      await one.publish()
    }
    for (const one of all) await one.read()
    for (const one of all) assert.equal(one.text, all[0].text, `run ${run}`)
    assert.equal(getSyncedVersion(all[1].state), getSyncedVersion(all[3].state))
    assert.deepEqual(new Set(all[0].text), written.difference?.(removed) ?? new Set([...written].filter(c => !removed.has(c))))
    assert.equal(new Set(all[0].text).size, all[0].text.length)
  }
})
