// What happens to a chat on its way: a relay that can be killed and started again on its port, a network that can be
// cut or fall silent, and a proxy that holds answers back until they end.

import { execFileSync, spawn } from 'node:child_process'
import { existsSync, mkdtempSync, rmSync } from 'node:fs'
import http from 'node:http'
import net from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { until } from './relay.mjs'

const listen = (server, port = 0) => new Promise((done, fail) => server.once('error', fail).listen(port, '127.0.0.1', () => done(server.address().port)))
const ended = new Set // what to kill if we go before we are done
process.once('exit', () => ended.forEach(end => end()))

/** Says why a test can't be run here, if so; in CI what is missing is a failure. */
export const missing = (...files) => !process.env.CI && files.filter(file => !existsSync(file)).map(file => `${file} is not installed here`).join(', ') || false

let binary
function build() {
  if (binary) return binary
  const folder = mkdtempSync(join(tmpdir(), 'chat-test-'))
  ended.add(() => rmSync(folder, { recursive: true, force: true }))
  execFileSync('go', ['build', '-o', join(folder, 'relay'), '.'], { cwd: fileURLToPath(new URL('..', import.meta.url)), stdio: 'inherit' })
  return binary = join(folder, 'relay')
}

/** A relay with short heartbeats, that soon misses who polled, and lets us publish as fast as we like. */
export async function mortal() {
  const free = net.createServer(), port = await listen(free), url = `http://127.0.0.1:${port}`
  await new Promise(done => free.close(done))
  let child
  const relay = {
    url, port,
    async begin() {
      child = spawn(process.env.COMETES || build(), ['-addr', `127.0.0.1:${port}`, '-beat', '1s', '-rate', '10000', '-events', '4000', '-present', '12s'],
        { stdio: ['ignore', 'ignore', process.env.COMETES_LOG ? 'inherit' : 'ignore'] })
      const mine = child
      mine.once('exit', (code, signal) => mine.meant || console.error(`the relay ended by itself: ${signal ?? code}`))
      await until('the relay answers', () => fetch(url + '/healthz').then(answer => answer.ok, () => false))
    },
    /** It says goodbye to nobody. */
    kill: () => new Promise(done => {
      if (child.exitCode !== null || child.signalCode) return done()
      child.meant = true
      child.once('exit', done)
      child.kill('SIGKILL')
    }),
    /** What POST answers. */
    async say(room, data, user = 'relay') {
      const answer = await fetch(`${url}/rooms/${room}?${new URLSearchParams({ user })}`, { method: 'POST', body: data })
      if (!answer.ok) throw new Error(await answer.text())
    },
    /** The messages that the relay keeps: what every page must have, no more, no less, in this order. */
    async truth(room) {
      const all = []
      for (let from = 'last=4000', answer; !answer || answer.events.length; from = 'after=' + answer.cursor) {
        answer = await (await fetch(`${url}/rooms/${room}/poll?presence=0&${from}`)).json()
        all.push(...answer.events)
      }
      return all.filter(({ type }) => type === 'message').map(({ id, data }) => `${id} ${data}`)
    },
    async presence(room) {
      return (await (await fetch(`${url}/rooms/${room}/presence`)).json()).users
    },
    async connections() {
      const text = await (await fetch(url + '/metrics')).text()
      return [...text.matchAll(/^cometes_connections\{.*\} (\d+)$/mg)].reduce((sum, [, n]) => sum + +n, 0)
    },
  }
  ended.add(() => child?.kill('SIGKILL'))
  await relay.begin()
  return relay
}

/** A network in between. It passes; or is cut: what is open breaks, and nothing opens; or is silent: nothing moves. */
export async function network(to) {
  const pairs = new Set
  let mode = 'pass', tries = 0
  // Node can't reset a socket that is just being ended: it would spin for ever when the process exits.
  const cut = socket => socket.writableEnded ? socket.destroy() : socket.resetAndDestroy()
  const apply = pair => pair.forEach(socket => mode === 'cut' ? cut(socket) : mode === 'silence' ? socket.pause() : socket.resume())
  const server = net.createServer(client => {
    const relay = net.connect(to, '127.0.0.1'), pair = [client, relay]
    tries++
    pairs.add(pair)
    for (const [from, other] of [pair, [relay, client]]) {
      from.setNoDelay(true)
      from.on('data', part => other.write(part))
      from.on('end', () => other.end())
      from.on('error', () => { })
      from.on('close', () => { other.destroy(); pairs.delete(pair) })
    }
    apply(pair)
  })
  const port = await listen(server)
  return {
    url: `http://127.0.0.1:${port}`, port,
    /** So many connections were asked for. */
    get tries() { return tries },
    is(now) { mode = now; pairs.forEach(apply) },
    stop() { this.is('cut'); server.close() },
  }
}

/** A proxy that knows no WebSocket, and, while it holds, gives no answer before its end. */
export async function proxy(to) {
  const open = new Set
  const server = http.createServer((request, response) => {
    const headers = { ...request.headers }
    delete headers.upgrade
    headers.connection = 'close'
    const ask = http.request({ port: to, host: '127.0.0.1', method: request.method, path: request.url, headers, agent: false }, async answer => {
      const hold = self.holds
      try {
        const parts = []
        if (hold) for await (const part of answer) parts.push(part)
        for (const name of ['connection', 'keep-alive', 'transfer-encoding']) delete answer.headers[name]
        response.writeHead(answer.statusCode, answer.headers)
        hold ? response.end(Buffer.concat(parts)) : answer.pipe(response)
        answer.on('error', () => response.destroy())
      } catch { response.destroy() }
    })
    open.add(response)
    ask.on('error', () => response.destroy())
    response.on('close', () => { open.delete(response); ask.destroy() })
    request.pipe(ask)
  })
  server.on('upgrade', (request, socket) => socket.end('HTTP/1.1 501 Not Implemented\r\nConnection: close\r\nContent-Length: 0\r\n\r\n'))
  const self = {
    holds: false,
    url: `http://127.0.0.1:${await listen(server)}`,
    cut: () => open.forEach(response => response.destroy()),
    stop: () => { server.close(); server.closeAllConnections() },
  }
  return self
}
