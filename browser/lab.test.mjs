// The lab and the live graphs, in both browsers: every technique gets every event, once and in order, through cuts; what
// is counted is what happened; graphs and pictures move; and no console says anything.

import assert from 'node:assert/strict'
import { after, afterEach, before, describe, test } from 'node:test'
import { browse, browsers, clumsy, open, secure, sleep, start, until, wire } from './relay.mjs'

const ten = ['refresh', 'multipart', 'html', 'poll', 'iframe', 'longpoll', 'stream', 'jsonp', 'sse', 'ws']
const once = ten.filter(name => name !== 'refresh' && name !== 'multipart') // a page that comes anew says again what it said; server push has its picture beside it

let relay
before(async () => relay = await start('-beat', '2s'))
after(() => relay?.stop())

const cards = page => page.evaluate(() => Object.fromEntries([...document.querySelectorAll('.card')].map(card => [card.id, { ...card.dataset }])))
const say = (page, selector) => page.evaluate(selector => document.querySelector(selector).textContent, selector)
const press = (page, selector) => page.evaluate(selector => document.querySelector(selector).click(), selector)
const set = (page, selector, value) => page.evaluate((selector, value) => {
  const input = document.querySelector(selector)
  input.value = value
  input.dispatchEvent(new Event('change'))
}, selector, value)

async function lab(browser, url) {
  const page = await open(browser, url + '/lab.html')
  await until('the lab is ready', () => page.evaluate(() => 'ready' in document.body.dataset), 60e3)
  return page
}

/** Waits until every technique has so many, and checks that it has each once. */
async function all(page, count, names = ten) {
  let last
  await until(`${count} events by every technique`, async () => {
    last = await cards(page)
    return names.every(name => +last[name].delivered >= count)
  }, 60e3).catch(error => { throw new Error(`${error.message}: ${names.map(name => `${name} ${last?.[name].delivered} (${last?.[name].state})`).join(', ')}`) })
  for (const name of names) {
    const { delivered, lost, doubled, disorder } = last[name]
    assert.deepEqual({ delivered, lost, doubled, disorder }, { delivered: String(count), lost: '0', doubled: '0', disorder: '0' }, name)
  }
}

async function metrics() {
  const text = await (await fetch(relay.url + '/metrics')).text()
  const one = (name, technique) => +new RegExp(`^cometes_${name}${technique ? `\\{technique="${technique}"\\}` : ''} (\\S+)$`, 'm').exec(text)[1]
  return { published: one('published_total'), delivered: name => one('delivered_total', name), requests: name => one('requests_total', name) }
}

/** Begins to count anew, and waits until that shows: what is on the page may be older. */
async function reset(page) {
  await press(page, '#reset')
  await until('nothing is counted', async () => Object.values(await cards(page)).every(card => card.delivered === '0'))
}

async function burst(page, count) {
  await set(page, '#many', count)
  await press(page, '#burst')
}

for (const name of browsers) describe(name, () => {
  let browser
  before(async () => browser = await browse(name))
  afterEach(async () => { for (const page of await browser.pages()) if (page.url() !== 'about:blank') await page.close() })
  after(() => browser?.close())

  test('the lab: 200 events by every technique, none lost, none twice, in order, through cuts', async () => {
    const net = await wire(relay.port)
    const page = await lab(browser, net.url)
    assert.match(await say(page, '#held'), /^No\. By all that streams/)
    assert.match(await say(page, '#choice'), /^ws,/)
    assert.match(await say(page, '#limit'), /2 had to wait/)
    const open = Object.entries(await cards(page)).filter(([, card]) => card.state !== 'open')
    assert.deepEqual(open, [], 'all ten at once')
    await set(page, '#every', 1)
    await all(page, 10) // the ticks of the verdict

    await press(page, '#reset')
    await sleep(1500)
    const from = await metrics()
    await burst(page, 40)
    await all(page, 40)
    const to = await metrics()
    assert.equal(to.published - from.published, 40)
    for (const name of once) assert.equal(to.delivered(name) - from.delivered(name), 40, `the relay's count of ${name}`)
    assert.deepEqual(page.errors, [])

    await burst(page, 30)
    await press(page, '#cut')
    await burst(page, 10)
    await all(page, 80)
    const said = await page.evaluate(() => document.querySelector('#sse .events').textContent)
    assert.match(said, /caught up|#80/)
    for (let i = 0; i < 4; i++) {
      await burst(page, 30)
      await sleep(i * 100)
      net.cut() // for real: nobody said goodbye
      await all(page, 80 + 30 * (i + 1))
    }
    net.stop()
  })

  test('the lab: more streams than connections take turns, and lose nothing', async () => {
    const page = await lab(browser, relay.url)
    await set(page, '#every', 1)
    await all(page, 10) // the ticks of the verdict
    await reset(page)
    await page.evaluate(() => {
      const select = document.querySelector('#stream select')
      select.value = 'xhr'
      select.dispatchEvent(new Event('change'))
    })
    await until('one waits for its turn', async () => Object.values(await cards(page)).some(card => card.state === 'waits its turn'))
    await burst(page, 20)
    await sleep(8000)
    await burst(page, 20)
    await all(page, 40)
    assert.deepEqual(page.errors, [])
  })

  test('the lab: six more wait, with all that is short, and go on', async () => {
    const page = await lab(browser, relay.url)
    await set(page, '#every', 1)
    await all(page, 10) // the ticks of the verdict
    await reset(page)
    await press(page, '#more')
    await until('some wait', async () => /waits, [2-9]\.\d s/.test(await say(page, '#extra')))
    await burst(page, 20)
    await all(page, 20, ['sse', 'ws', 'stream', 'longpoll', 'poll', 'iframe', 'html', 'multipart'])
    await press(page, '#more')
    await all(page, 20)
    assert.deepEqual(page.errors, [])
  })

  test('the lab: each can be cut, stopped and begun, and the bytes are shown', async () => {
    const page = await lab(browser, relay.url)
    await set(page, '#every', 1)
    await all(page, 10) // the ticks of the verdict
    await reset(page)
    await page.evaluate(() => document.querySelectorAll('details').forEach(one => one.open = true))
    await press(page, '#ws .halt')
    await press(page, '#sse .cut')
    assert.equal((await cards(page)).ws.state, 'paused')
    await burst(page, 10)
    await all(page, 10, ten.filter(name => name !== 'ws'))
    assert.equal((await cards(page)).ws.delivered, '0')
    await press(page, '#ws .halt')
    await all(page, 10)
    await sleep(500)
    const bytes = Object.fromEntries(await Promise.all(ten.map(async name => [name, await say(page, `#${name} .out`) + '\n' + await say(page, `#${name} .in`)])))
    for (const name of ten) {
      assert.match(bytes[name], new RegExp(`^GET /rooms/lab-\\w{4}/${name}\\?\\S+ HTTP/1.1\nHost: `), name)
      assert.match(bytes[name], /\nHTTP\/1.1 (200 OK|101 Switching Protocols)\n/, name)
    }
    assert.match(bytes.ws, /\[81 7e 0\d [0-9a-f]{2}\] \{"id":/)
    assert.match(bytes.sse, /\nid: \d+\ndata: \{"id":/)
    assert.match(bytes.jsonp, /\n\/\*\*\/lab_\w+\(\{"cursor":/)
    assert.match(bytes.multipart, /content-type: multipart\/x-mixed-replace; boundary=/)
    assert.match(await say(page, '#multipart .shownas'), name === 'firefox' ? /whole pages/ : /pictures so, but not pages/)
    assert.deepEqual(page.errors, [])
  })

  test('the lab: a proxy that holds back is found out', async () => {
    const net = await clumsy(relay.port, 1100)
    const page = await lab(browser, net.url)
    assert.match(await say(page, '#held'), /^Yes: .*Streamed answer, Server-sent events\. .*Not by WebSocket/)
    assert.deepEqual(page.errors, [])
    net.stop()
  })

  test('the lab over HTTP/2: nobody waits', async () => {
    const net = await secure(relay.port)
    const page = await lab(browser, net.url)
    assert.match(await say(page, '#limit'), /^HTTP\/2: .* none had to wait/)
    await set(page, '#every', 1)
    await press(page, '#reset')
    await press(page, '#more')
    await until('all six are open', async () => !/waits, /.test(await say(page, '#extra')))
    await burst(page, 20)
    await all(page, 20)
    const states = Object.values(await cards(page)).map(card => card.state)
    assert.deepEqual(states, ten.map(() => 'open'))
    assert.deepEqual(page.errors, [])
    net.stop()
  })

  test('the graphs move, and tell their values', async () => {
    const page = await open(browser, relay.url + '/stats.html?room=heat-' + name)
    const feed = data => fetch(`${relay.url}/rooms/heat-${name}`, { method: 'POST', body: data })
    const curve = () => page.evaluate(() => document.querySelectorAll('#relay .graph')[1]?.querySelector('.curve')?.getAttribute('d'))
    const first = await until('a curve', curve)
    for (let i = 0; i < 20; i++) await feed(String(i * i))
    await feed('warm')
    await feed('{}')
    await until('it has moved', async () => await curve() !== first)
    await until('20 numbers', async () => await say(page, '#numbers b') === '361')
    assert.match(await say(page, '#skipped'), /^2 messages were no numbers/)
    await until('a second in which 20 were published', () => page.evaluate(() => {
      const graph = document.querySelectorAll('#relay .graph')[1].querySelector('svg')
      graph.focus()
      for (let i = 0; i < 20; i++) {
        graph.dispatchEvent(new KeyboardEvent('keydown', { key: 'ArrowLeft' }))
        if (/published (1\d|2\d)/.test(graph.ariaValueText ?? graph.getAttribute('aria-valuetext'))) return true
      }
      graph.dispatchEvent(new KeyboardEvent('keydown', { key: 'Escape' }))
    }))
    await page.evaluate(() => document.querySelector('#relay svg').dispatchEvent(new KeyboardEvent('keydown', { key: 'Escape' })))
    await press(page, '#pause')
    const still = await curve()
    await sleep(2500)
    assert.equal(await curve(), still)
    await press(page, '#pause')
    await until('it goes on', async () => await curve() !== still)
    assert.match(await say(page, '#relay .legend'), /ws [1-9]/)
    assert.deepEqual(page.errors, [])
  })

  test('the picture changes, without a script', async () => {
    const room = 'look-' + name
    const page = await open(browser, `${relay.url}/stats.html?room=${room}`)
    const shot = async () => Buffer.from(await (await page.$('#live')).screenshot()).toString('base64')
    await page.evaluate(() => document.querySelector('#live').scrollIntoView())
    await until('the picture is there', () => page.evaluate(() => document.querySelector('#live').naturalWidth === 640))
    await sleep(1000)
    const empty = await shot()
    await fetch(`${relay.url}/rooms/${room}`, { method: 'POST', body: '1' })
    await fetch(`${relay.url}/rooms/${room}`, { method: 'POST', body: '2' })
    const two = await until('it changed', async () => { const now = await shot(); return now !== empty && now })
    await sleep(500)
    await fetch(`${relay.url}/rooms/${room}`, { method: 'POST', body: '-3' })
    await until('it changed again', async () => await shot() !== two)
    assert.deepEqual(page.errors, [])
  })
})
