// The chat in lynx and w3m, which show a page only when it is complete: they use the page that refreshes itself.

import assert from 'node:assert/strict'
import { execFile, spawn } from 'node:child_process'
import { after, before, describe, test } from 'node:test'
import { promisify } from 'node:util'
import { missing, startRelay } from './harm.mjs'
import { until } from './relay.mjs'

const run = promisify(execFile)
const limit = { timeout: 60e3 }

const browsers = {
  lynx: { file: '/usr/bin/lynx', dump: url => ['-dump', '-width=120', url], visit: url => `lynx -nopause -accept_all_cookies '${url}'`, field: '\x1b[B\x1b[B\x1b[B', write: text => text, send: '\t\r', quit: 'qy' },
  w3m: { file: '/usr/bin/w3m', dump: url => ['-dump', '-cols', '120', url], visit: url => `w3m -o confirm_qq=0 '${url}'`, field: '\t\t\t', write: text => '\r' + text + '\r', send: '\t\r', quit: 'q' },
}

for (const [name, { file, dump, visit, field, write, send, quit }] of Object.entries(browsers)) describe(name, { skip: missing(file) }, () => {
  let relay
  before(async () => relay = await startRelay())
  after(() => relay?.kill())
  const read = async path => (await run(file, dump(relay.url + path), { timeout: 20e3, env: { ...process.env, LANG: 'C.UTF-8' } })).stdout

  test('it shows messages and presence, with markup as text', limit, async () => {
    await relay.publish('lobby', 'first', 'ada')
    await relay.publish('lobby', '<b>bold</b> & <script>no</script>', '<i>bob</i>')
    await fetch(relay.url + '/rooms/lobby/presence?user=ada', { method: 'POST', body: 'typing' })
    const page = await read('/rooms/lobby/refresh?user=eve')
    assert.match(page, /ada \(typing\), eve are here/)
    assert.match(page, /<i>bob<\/i> <b>bold<\/b> & <script>no<\/script>[^]*ada first/, 'the newest is on top')
    assert.match(page, /Name[^]*eve[^]*Message[^]*Send/)
    const front = await read('/')
    assert.match(front, /A chat that works without JavaScript[^]*Your name[^]*Join[^]*the page that refreshes\s+itself/)
    assert.doesNotMatch(front, /<|Write to|connecting|Who is here|WebSocket|Send|If nothing appears/, 'nothing of the page for JavaScript')
    assert.deepEqual(Object.keys(await relay.presence('lobby')).sort(), ['ada', 'eve'])
    for (const [path, what] of [['/lab.html', /Without it work.*the page that never ends/], ['/stats.html', /\/metrics and the picture below do\s+not/], ['/inspect.html', /shows the same/]]) {
      const page = await read(path)
      assert.match(page, what)
      assert.doesNotMatch(page, /Publish one|Pause|Feed it|Show|Open|BUTTON/, `${path}: no button, since no script runs`)
    }
  })

  test('it sends a message with the form, and then shows the page with that message', limit, async t => {
    const url = relay.url + '/rooms/write/refresh?user=eve'
    const child = spawn('script', ['-qfc', 'stty rows 40 cols 120; ' + visit(url), '/dev/null'], { detached: true, env: { ...process.env, TERM: 'vt100', LANG: 'C.UTF-8' } })
    t.after(() => { try { process.kill(-child.pid, 'SIGKILL') } catch { } })
    let screen = ''
    child.stdout.on('data', part => screen += part)
    const words = () => screen.replace(/\x1b\[\d*C/g, ' ').replace(/\x1b\[[\d;]*[A-Za-z]|[\0\x0e\x0f]/g, '')
    child.stdin.on('error', () => { })
    const shows = what => until(`${name} shows ${what}`, () => what.test(words()), 10e3).catch(error => { throw new Error(`${error.message}: ${JSON.stringify(words().slice(-1500))}`) })
    const keys = async keys => {
      for (const key of keys.match(/\x1b\[.|[^]/g)) {
        child.stdin.write(key)
        await new Promise(done => setTimeout(done, 60)) // as fast as a person types
      }
    }
    await shows(/refreshes itself/)
    await shows(/Send/)
    await keys(field + write(`hi from ${name}`))
    await shows(new RegExp('hi from ' + name))
    await keys(send)
    await until('it is published', async () => (await relay.messages('write')).length)
    assert.deepEqual((await relay.messages('write')).map(line => line.replace(/^\d+ /, '')), [`hi from ${name}`])
    await shows(/eve hi from/)
    assert.equal((await relay.presence('write')).eve, 'online')
    await keys(quit)
  })
})
