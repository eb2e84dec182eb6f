// What the browser tests share: the relay on a free port, networks and proxies in between, and the two browsers.

import assert from 'node:assert/strict'
import { execFileSync, spawn } from 'node:child_process'
import { createHmac } from 'node:crypto'
import { mkdtempSync, readFileSync, rmSync } from 'node:fs'
import http from 'node:http'
import http2 from 'node:http2'
import net from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach } from 'node:test'
import { fileURLToPath } from 'node:url'
import puppeteer from 'puppeteer-core'

export const sleep = ms => new Promise(done => setTimeout(done, ms))
const listen = server => new Promise(done => server.listen(0, '127.0.0.1', () => done(server.address().port)))

/** Waits until `ask` returns something true, and returns that. */
export async function until(what, ask, ms = 30e3) {
  const end = Date.now() + ms
  for (let got; ;) {
    if (got = await ask()) return got
    if (Date.now() > end) throw new Error(`${what}: not within ${ms / 1e3} s`)
    await sleep(100)
  }
}

async function freePort() {
  const server = net.createServer()
  const port = await listen(server)
  await new Promise(done => server.close(done))
  return port
}

export let binary = process.env.COMETES // a relay that has been built already

/** Starts a relay, built from this repository. */
export async function start(...args) {
  const folder = mkdtempSync(join(tmpdir(), 'cometes-'))
  process.once('exit', () => rmSync(folder, { recursive: true, force: true }))
  if (!binary) {
    execFileSync('go', ['build', '-o', join(folder, 'cometes'), '.'], { cwd: fileURLToPath(new URL('..', import.meta.url)), stdio: 'inherit' })
    binary = join(folder, 'cometes')
  }
  const port = await freePort(), url = `http://127.0.0.1:${port}`
  const child = spawn(binary, ['-addr', `127.0.0.1:${port}`, ...args], { stdio: ['ignore', 'ignore', process.env.COMETES_LOG ? 'inherit' : 'ignore'] })
  await until('the relay answers', () => fetch(url + '/healthz').then(answer => answer.ok, () => false))
  return { url, port, stop: () => new Promise(done => { child.once('exit', done); child.kill() }) }
}

/** A network in between: cut() breaks every connection. */
export async function wire(to) {
  const sockets = new Set
  const server = net.createServer(client => {
    const relay = net.connect(to, '127.0.0.1')
    for (const socket of [client, relay]) {
      sockets.add(socket)
      socket.setNoDelay(true)
      socket.on('error', () => { })
      socket.on('close', () => { sockets.delete(socket); client.destroy(); relay.destroy() })
    }
    client.pipe(relay).pipe(client)
  })
  const port = await listen(server)
  const cut = () => sockets.forEach(socket => socket.writableEnded ? socket.destroy() : socket.resetAndDestroy()) // a socket that is just being ended must not be reset: Node would spin when it exits
  return { url: `http://127.0.0.1:${port}`, cut, stop: () => { cut(); server.close() } }
}

/**
 * Makes a server a proxy. With `interval` it passes the parts of a response on only that often (in ms). The relay is under
 * a prefix, which the proxy removes.
 */
async function proxy(server, to, interval, prefix = '/') {
  const path = url => url.startsWith(prefix) ? '/' + url.slice(prefix.length) : undefined
  server.on('request', (request, response) => {
    if (!path(request.url)) return response.writeHead(404).end('not the relay')
    const headers = Object.fromEntries(Object.entries(request.headers).filter(([name]) => name[0] !== ':' && name !== 'connection'))
    headers.host ??= request.authority
    const ask = http.request({ port: to, host: '127.0.0.1', method: request.method, path: path(request.url), headers, agent: false }, answer => {
      for (const name of ['connection', 'keep-alive', 'transfer-encoding']) delete answer.headers[name]
      response.writeHead(answer.statusCode, answer.headers)
      if (!interval) return answer.pipe(response)
      let buffered = []
      const pass = () => response.write(Buffer.concat(buffered.splice(0)))
      const timer = setInterval(pass, interval)
      answer.on('data', part => buffered.push(part))
      answer.on('end', () => { pass(); response.end() })
      answer.on('close', () => clearInterval(timer))
    })
    ask.on('error', () => response.destroy?.())
    response.on('close', () => ask.destroy())
    request.pipe(ask)
  })
  server.on('upgrade', (request, client) => {
    if (!path(request.url)) return client.end('HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n')
    const relay = net.connect(to, '127.0.0.1', () => {
      relay.write(`GET ${path(request.url)} HTTP/1.1\r\n` + request.rawHeaders.map((h, i) => i % 2 ? h + '\r\n' : h + ': ').join('') + '\r\n')
      client.pipe(relay).pipe(client)
    })
    for (const socket of [client, relay]) socket.on('error', () => { }).on('close', () => { client.destroy(); relay.destroy() })
  })
  const sockets = new Set
  server.on('connection', socket => { sockets.add(socket); socket.on('close', () => sockets.delete(socket)) })
  server.on('sessionError', () => { })
  return { port: await listen(server), stop: () => { server.close(); sockets.forEach(socket => socket.destroy()) } }
}

/** A proxy that buffers: it passes the parts of a stream on at intervals. */
export async function clumsy(to, interval) {
  const { port, stop } = await proxy(http.createServer(), to, interval)
  return { url: `http://127.0.0.1:${port}`, stop }
}

/** A proxy that serves the relay under a prefix, such as /relay/. */
export async function prefixed(to, prefix) {
  const { port, stop } = await proxy(http.createServer(), to, 0, prefix)
  return { url: `http://127.0.0.1:${port}${prefix.slice(0, -1)}`, stop }
}

/** Another site, with one page. */
export async function site(html) {
  const server = http.createServer((_, response) => response.setHeader('Content-Type', 'text/html; charset=utf-8').end(self.html))
  const self = { html, url: `http://127.0.0.1:${await listen(server)}`, stop: () => { server.close(); server.closeAllConnections() } }
  return self
}

/** A token, made as any backend makes one. */
export function token(secret, claims) {
  const part = value => Buffer.from(JSON.stringify(value)).toString('base64url')
  const signed = part({ alg: 'HS256', typ: 'JWT' }) + '.' + part(claims)
  return signed + '.' + createHmac('sha256', secret).update(signed).digest('base64url')
}

/** A proxy with HTTP/2, HTTP/1.1 for WebSockets, and a self-signed certificate. */
export async function secure(to) {
  const folder = mkdtempSync(join(tmpdir(), 'cometes-'))
  execFileSync('openssl', ['req', '-x509', '-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:prime256v1', '-nodes', '-days', '2', '-subj', '/CN=127.0.0.1', '-addext', 'subjectAltName=IP:127.0.0.1', '-keyout', 'key', '-out', 'cert'], { cwd: folder, stdio: 'ignore' })
  const read = name => readFileSync(join(folder, name))
  const options = { allowHTTP1: true, key: read('key'), cert: read('cert') }
  rmSync(folder, { recursive: true })
  const { port, stop } = await proxy(http2.createSecureServer(options), to)
  return { url: `https://127.0.0.1:${port}`, stop }
}

export const browsers = ['chromium', 'firefox']

/** Starts a browser. */
export const browse = (name, options) => puppeteer.launch(name === 'firefox' ? {
  browser: 'firefox', executablePath: '/usr/bin/firefox-esr', headless: true, acceptInsecureCerts: true, ...options,
} : {
  executablePath: '/usr/bin/chromium', headless: true, acceptInsecureCerts: true, ...options,
  args: ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync', ...options?.args ?? []],
})

// An exception that a page does not catch fails the test that opened the page. Firefox reports network errors in the same way.
const uncaught = [], networkErrors = /Cross-Origin Request Blocked|can.t establish a connection|was interrupted while|blocked due to MIME type/
afterEach(() => assert.deepEqual(uncaught.splice(0), [], 'uncaught in a page'))

/** Opens a page, and collects its console's errors in page.errors. A page that `redirects` is not awaited. */
export async function open(browser, url, { width = 1280, height = 1000, redirects = false } = {}) {
  const page = await browser.newPage()
  page.errors = []
  page.on('console', message => message.type() === 'error' && page.errors.push(`${message.text()} ${message.location()?.url ?? ''}`))
  page.on('pageerror', error => {
    page.errors.push(error.stack ?? String(error))
    if (!networkErrors.test(error)) uncaught.push(error.stack ?? String(error))
  })
  await page.setViewport({ width, height })
  page.goto(url).catch(() => { }) // a page with a frame that never ends is never loaded
  if (!redirects) await until('the page is there', () => page.evaluate(url => location.href === url && document.readyState !== 'loading', new URL(url).href).catch(() => false))
  return page
}
