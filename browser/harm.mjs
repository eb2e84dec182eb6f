// What can go wrong between a page and the relay: a relay that can be killed and restarted on its port, a network that
// can be cut or stall, and a proxy that buffers responses until they end.

import { execFileSync, spawn } from 'node:child_process'
import { existsSync, mkdtempSync, rmSync } from 'node:fs'
import http from 'node:http'
import net from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { until } from './relay.mjs'

const listen = (server, port = 0) => new Promise((done, fail) => server.once('error', fail).listen(port, '127.0.0.1', () => done(server.address().port)))
const cleanups = new Set // for when the process exits
process.once('exit', () => cleanups.forEach(clean => clean()))

/** Returns why a test has to be skipped here, or false. In CI a missing browser is a failure. */
export const missing = (...files) => !process.env.CI && files.filter(file => !existsSync(file)).map(file => `${file} is not installed here`).join(', ') || false

let binary
function build() {
  if (binary) return binary
  const folder = mkdtempSync(join(tmpdir(), 'chat-test-'))
  cleanups.add(() => rmSync(folder, { recursive: true, force: true }))
  execFileSync('go', ['build', '-o', join(folder, 'relay'), '.'], { cwd: fileURLToPath(new URL('..', import.meta.url)), stdio: 'inherit' })
  return binary = join(folder, 'relay')
}

/** Starts a relay with short heartbeats and leases, and without a limit on publishing. */
export async function startRelay() {
  const free = net.createServer(), port = await listen(free), url = `http://127.0.0.1:${port}`
  await new Promise(done => free.close(done))
  let child
  const relay = {
    url, port,
    async restart() {
      child = spawn(process.env.COMETES || build(), ['-addr', `127.0.0.1:${port}`, '-beat', '1s', '-rate', '10000', '-events', '4000', '-present', '12s'],
        { stdio: ['ignore', 'ignore', process.env.COMETES_LOG ? 'inherit' : 'ignore'] })
      const started = child
      started.once('exit', (code, signal) => started.expected || console.error(`the relay ended by itself: ${signal ?? code}`))
      await until('the relay answers', () => fetch(url + '/healthz').then(answer => answer.ok, () => false))
    },
    /** Without a shutdown: no client receives a bye. */
    kill: () => new Promise(done => {
      if (child.exitCode !== null || child.signalCode) return done()
      child.expected = true
      child.once('exit', done)
      child.kill('SIGKILL')
    }),
    async publish(room, data, user = 'relay') {
      const answer = await fetch(`${url}/rooms/${room}?${new URLSearchParams({ user })}`, { method: 'POST', body: data })
      if (!answer.ok) throw new Error(await answer.text())
    },
    /** The messages in the history. Every page must show exactly these, in this order. */
    async messages(room) {
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
  cleanups.add(() => child?.kill('SIGKILL'))
  await relay.restart()
  return relay
}

/**
 * A network in between, with a mode: `pass`; `cut`, which breaks all connections and allows no new ones; `stall`, in which
 * no byte moves.
 */
export async function network(to) {
  const pairs = new Set
  let mode = 'pass', tries = 0
  // Node spins when it exits if a socket is reset that is just being ended.
  const cut = socket => socket.writableEnded ? socket.destroy() : socket.resetAndDestroy()
  const apply = pair => pair.forEach(socket => mode === 'cut' ? cut(socket) : mode === 'stall' ? socket.pause() : socket.resume())
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
    /** The number of connections that clients opened. */
    get tries() { return tries },
    set(now) { mode = now; pairs.forEach(apply) },
    stop() { this.set('cut'); server.close() },
  }
}

/** A proxy without WebSocket. While it buffers, it passes no response on before its end. */
export async function proxy(to) {
  const open = new Set
  const server = http.createServer((request, response) => {
    const headers = { ...request.headers }
    delete headers.upgrade
    headers.connection = 'close'
    const ask = http.request({ port: to, host: '127.0.0.1', method: request.method, path: request.url, headers, agent: false }, async answer => {
      const buffers = self.buffers
      try {
        const parts = []
        if (buffers) for await (const part of answer) parts.push(part)
        for (const name of ['connection', 'keep-alive', 'transfer-encoding']) delete answer.headers[name]
        response.writeHead(answer.statusCode, answer.headers)
        buffers ? response.end(Buffer.concat(parts)) : answer.pipe(response)
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
    buffers: false,
    url: `http://127.0.0.1:${await listen(server)}`,
    cut: () => open.forEach(response => response.destroy()),
    stop: () => { server.close(); server.closeAllConnections() },
  }
  return self
}
