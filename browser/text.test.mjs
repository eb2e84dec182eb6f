// The chat in lynx and w3m, which show a page when it is whole: they read and write on the page that comes anew.

import assert from 'node:assert/strict'
import { execFile, spawn } from 'node:child_process'
import { after, before, describe, test } from 'node:test'
import { promisify } from 'node:util'
import { missing, mortal } from './harm.mjs'
import { until } from './relay.mjs'

const run = promisify(execFile)
const limit = { timeout: 60e3 }

const browsers = {
  lynx: { file: '/usr/bin/lynx', dump: url => ['-dump', '-width=120', url], visit: url => `lynx -nopause -accept_all_cookies '${url}'`, field: '\x1b[B\x1b[B', write: text => text, send: '\t\r', quit: 'qy' },
  w3m: { file: '/usr/bin/w3m', dump: url => ['-dump', '-cols', '120', url], visit: url => `w3m -o confirm_qq=0 '${url}'`, field: '\t\t\t', write: text => '\r' + text + '\r', send: '\t\r', quit: 'q' },
}

for (const [name, { file, dump, visit, field, write, send, quit }] of Object.entries(browsers)) describe(name, { skip: missing(file) }, () => {
  let relay
  before(async () => relay = await mortal())
  after(() => relay?.kill())
  const read = async path => (await run(file, dump(relay.url + path), { timeout: 20e3, env: { ...process.env, LANG: 'C.UTF-8' } })).stdout

  test('reads what is said and who is here, and shows markup as text', limit, async () => {
    await relay.say('lobby', 'first', 'ada')
    await relay.say('lobby', '<b>bold</b> & <script>no</script>', '<i>bob</i>')
    await fetch(relay.url + '/rooms/lobby/presence?user=ada', { method: 'POST', body: 'typing' })
    const page = await read('/rooms/lobby/refresh?user=eve')
    assert.match(page, /ada \(typing\), eve are here/)
    assert.match(page, /<i>bob<\/i> <b>bold<\/b> & <script>no<\/script>[^]*ada first/, 'the newest is on top')
    assert.match(page, /Name[^]*eve[^]*Message[^]*Send/)
    const front = await read('/')
    assert.match(front, /This is a chat\.[^]*Your name[^]*Join[^]*the page that reloads/)
    assert.doesNotMatch(front, /<|Write to|connecting|Who is here|WebSocket|Send|If nothing appears/, 'the page with scripts')
    assert.deepEqual(Object.keys(await relay.presence('lobby')).sort(), ['ada', 'eve'])
  })

  test('writes by the form, and is shown the page with it', limit, async t => {
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
        await new Promise(done => setTimeout(done, 60)) // as fingers do
      }
    }
    await shows(/comes anew/)
    await shows(/Send/)
    await keys(field + write(`hi from ${name}`))
    await shows(new RegExp('hi from ' + name))
    await keys(send)
    await until('it is said', async () => (await relay.truth('write')).length)
    assert.deepEqual((await relay.truth('write')).map(line => line.replace(/^\d+ /, '')), [`hi from ${name}`])
    await shows(/eve hi from/)
    assert.equal((await relay.presence('write')).eve, 'online')
    await keys(quit)
  })
})
