import { Comet } from 'http://localhost:8080/comet.js'

const comet = new Comet('http://localhost:8080/rooms/counter', { last: 1 })
let id = 0, count = 0 // the newest
comet.addEventListener('message', e => ({ id, data: count } = e.detail))

/** Adds 1. If somebody else did so meanwhile, it is refused, and added to theirs when that is here. */
async function increment() {
  for (;;) try {
    return await comet.send(count + 1, { if: id })
  } catch (error) {
    if (error.status !== 412) throw error
    while (id < error.id) await new Promise(heard => comet.addEventListener('message', heard, { once: true }))
  }
}
