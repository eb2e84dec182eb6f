// Pictures that are pushed: published images in an <img>, and the page that publishes a camera. In both browsers.

import assert from 'node:assert/strict'
import { after, before, describe, test } from 'node:test'
import { missing } from './harm.mjs'
import { browse, browsers, open, prefixed, site, sleep, start, token, until, wire } from './relay.mjs'

const limit = { timeout: 120e3 }
const text = (page, selector) => page.evaluate(selector => document.querySelector(selector)?.textContent, selector)
const says = (page, selector, what) => until(`${selector} says ${what}`, async () => what.test(await text(page, selector).catch(() => '')))
const press = (page, selector) => page.evaluate(selector => document.querySelector(selector).click(), selector)
const ready = page => until('the page is ready', () => page.evaluate(() => !!document.querySelector('#sent[data-ready]')))
const frames = (page, id) => page.evaluate(id => +document.getElementById(id).textContent || 0, id)

const files = { chromium: '/usr/bin/chromium', firefox: '/usr/bin/firefox-esr' }
const fake = {
  chromium: { args: ['--use-fake-device-for-media-stream', '--use-fake-ui-for-media-stream'] },
  firefox: { extraPrefsFirefox: { 'media.navigator.streams.fake': true, 'media.navigator.permission.disabled': true } },
}
for (const name of browsers) describe(name, { skip: missing(files[name]) }, () => {
  let relay, browser, pixels
  before(async () => {
    [relay, browser] = await Promise.all([start('-beat', '1s', '-origins', '*'), browse(name, fake[name])])
    pixels = await browser.newPage() // a page in which a script may look at a screenshot
  })
  after(() => Promise.all([browser?.close(), relay?.stop()]))

  /** What is in the middle of an element, as people see it: red, lime or blue. */
  async function colour(page, selector) {
    const { x, y, width, height } = await page.evaluate(selector => { const { x, y, width, height } = document.querySelector(selector).getBoundingClientRect(); return { x, y, width, height } }, selector)
    const shot = await page.screenshot({ encoding: 'base64', clip: { x: x + width / 2 - 4, y: y + height / 2 - 4, width: 8, height: 8 } })
    return pixels.evaluate(async shot => {
      const image = Object.assign(new Image, { src: 'data:image/png;base64,' + shot })
      await image.decode()
      const pen = document.createElement('canvas').getContext('2d')
      pen.drawImage(image, 0, 0)
      const [r, g, b] = pen.getImageData(4, 4, 1, 1).data
      return r > 200 && g < 90 && b < 90 ? 'red' : g > 200 && r < 90 && b < 90 ? 'lime' : b > 200 && r < 90 && g < 90 ? 'blue' : `${r} ${g} ${b}`
    }, shot)
  }

  /** An image of one colour, made by the browser. */
  async function picture(colour, type = 'image/jpeg', size = 64) {
    const url = await pixels.evaluate((colour, type, size) => {
      const canvas = Object.assign(document.createElement('canvas'), { width: size, height: size }), pen = canvas.getContext('2d')
      pen.fillStyle = colour
      pen.fillRect(0, 0, size, size)
      return canvas.toDataURL(type)
    }, colour, type, size)
    assert.ok(url.startsWith(`data:${type};`))
    return Buffer.from(url.split(',')[1], 'base64')
  }

  const publish = async (room, body, type = 'image/jpeg') => {
    const answer = await fetch(`${relay.url}/rooms/${room}`, { method: 'PUT', body, headers: { 'Content-Type': type } })
    assert.equal(answer.status, 201, await answer.text())
  }

  test('an <img> shows what is published, at once, in a page of the relay and of another site', limit, async t => {
    const foreign = await site('')
    t.after(() => foreign.stop())
    for (const [room, url] of [['own', relay.url + '/rooms/own/form'], ['foreign', foreign.url + '/']]) {
      await publish(room, await picture('red', 'image/png'), 'image/png')
      const page = await open(browser, url)
      await page.evaluate(src => {
        document.body.replaceChildren(Object.assign(new Image, { id: 'img', src, width: 200, height: 200 }))
      }, url.startsWith(relay.url) ? 'multipart?as=image' : `${relay.url}/rooms/${room}/multipart?as=image`)
      const shows = want => until(`${room} is ${want}`, async () => await colour(page, '#img') === want, 3000)
      await shows('red')
      for (const [next, type] of [['lime', 'image/png'], ['blue', 'image/jpeg'], ['red', 'image/jpeg'], ['lime', 'image/png'], ['blue', 'image/jpeg']]) {
        await publish(room, await picture(next, type), type)
        await shows(next)
      }
      await sleep(4000) // four heartbeats
      await shows('blue')
      await fetch(`${relay.url}/rooms/${room}?type=image`, { method: 'POST', body: JSON.stringify('data:image/png;base64,' + (await picture('lime', 'image/png')).toString('base64')), headers: { 'Content-Type': 'application/json' } })
      await shows('lime')
      await fetch(`${relay.url}/rooms/${room}?type=image`, { method: 'POST', body: 'no image' })
      await sleep(1500)
      await shows('lime')
      await page.close()
    }
  })

  test('the chat shows pictures that are pasted or dropped, made small enough; so do pages without JavaScript', limit, async () => {
    const ada = await open(browser, relay.url + '/?room=pictures&user=ada'), bob = await open(browser, relay.url + '/?room=pictures&user=bob')
    for (const page of [ada, bob]) await until('connected', () => page.evaluate(() => document.body.dataset.status === 'open'))
    const drop = (type, width) => ada.evaluate(async (type, width) => {
      const canvas = Object.assign(document.createElement('canvas'), { width, height: width / 2 }), pen = canvas.getContext('2d')
      const noise = pen.createImageData(width, width / 2)
      for (let i = 0; i < noise.data.length; i++) noise.data[i] = i % 4 < 3 ? Math.random() * 256 : 255
      pen.putImageData(noise, 0, 0)
      const file = new File([await new Promise(done => canvas.toBlob(done, type))], 'a', { type }), data = new DataTransfer
      data.items.add(file)
      document.querySelector('#text').dispatchEvent(new DragEvent('drop', { dataTransfer: data, bubbles: true, cancelable: true }))
      return file.size
    }, type, width)
    const shown = (page, n) => until(n + ' pictures', () => page.evaluate(n => {
      const all = [...document.querySelectorAll('#log img.picture')]
      return all.length === n && all.every(img => img.complete && img.naturalWidth) && all.map(img => `${img.alt} ${img.src.length}`)
    }, n))
    assert.ok(await drop('image/png', 60) < 45e3)
    await shown(ada, 1)
    assert.ok(await drop('image/png', 1600) > 1e6)
    for (const page of [ada, bob]) {
      const [small, big] = await shown(page, 2)
      assert.match(small, /^a picture by ada /)
      assert.ok(+big.split(' ').at(-1) < 61e3, big)
      assert.deepEqual(page.errors, [])
      assert.equal(await page.evaluate(() => document.querySelector('#outbox').hidden), true)
    }
    const plain = await open(browser, relay.url + '/rooms/pictures/refresh')
    await until('in a page without JavaScript', () => plain.evaluate(() => [...document.querySelectorAll('.message img')].filter(img => img.naturalWidth && img.alt === 'a picture by ada').length === 2))
    assert.deepEqual(plain.errors, [])
    for (const page of [ada, bob, plain]) await page.close()
  })

  test('an <img> that is there before any picture', limit, async () => {
    const page = await open(browser, relay.url + '/rooms/early/form')
    await page.evaluate(() => document.body.replaceChildren(Object.assign(new Image, { id: 'img', src: 'multipart?as=image', width: 200, height: 200 })))
    await sleep(3000)
    await publish('early', await picture('lime'))
    await until('it is shown', async () => await colour(page, '#img') === 'lime', 3000)
    await page.close()
  })

  test('a camera: nothing is sent before Start and after Stop; what comes back is measured', limit, async t => {
    const proxy = await prefixed(relay.port, '/some/where/')
    t.after(() => proxy.stop())
    const page = await open(browser, proxy.url + '/camera.html', { redirects: true })
    await says(page, '#state', /^Nothing is sent yet/)
    const room = new URL(page.url()).hash.slice(1)
    assert.match(room, /^cam-[a-z0-9]{8}$/)
    assert.match(await text(page, '#privacy'), new RegExp(`Your camera goes to everybody who reads the room ${room}`))
    const count = async () => (await (await fetch(`${relay.url}/rooms/${room}/poll?after=0`)).json()).events.filter(e => e.type === 'image').length
    await sleep(1000)
    assert.equal(await count(), 0)
    await press(page, '#start')
    await until('frames come back', async () => await frames(page, 'returned') > 2.5)
    await says(page, '#state', /^Live\.$/)
    assert.match(await text(page, '#median'), /^\d+ ms$/)
    assert.match(await text(page, '#size'), /^640 × 480, [\d.]+ KB$/)
    assert.match(await page.title(), /^● /)
    const watcher = await open(browser, relay.url + '/camera.html#' + room)
    const frame = () => watcher.evaluate(async () => {
      const canvas = document.createElement('canvas'), image = await createImageBitmap(document.querySelector('#shown'))
      canvas.getContext('2d').drawImage(image, 0, 0)
      return canvas.toDataURL()
    }).catch(() => '')
    const first = await until('a watcher sees it', frame)
    await until('it moves', async () => await frame() !== first)
    await press(page, '#start')
    await says(page, '#state', /^Stopped/)
    await sleep(500)
    const sent = await count()
    await sleep(1500)
    assert.ok(await count() <= sent)
    assert.deepEqual([...page.errors, ...watcher.errors].filter(line => !/favicon/.test(line)), [])
    await watcher.close()
    await page.close()
  })

  test('frames become small enough, and fewer when the relay says that they are too many', limit, async t => {
    const small = await start('-body', '5000')
    t.after(() => small.stop())
    const page = await open(browser, small.url + '/camera.html#small')
    await ready(page)
    await page.select('#source', 'clock')
    await press(page, '#start')
    await until('frames come back', async () => await frames(page, 'returned') > 2)
    assert.ok(parseFloat((await text(page, '#size')).split(', ')[1]) <= 5)
    await page.evaluate(() => {
      const before = fetch
      let n = 0
      window.fetch = (...args) => ++n < 4 ? Promise.resolve(Response.json({ error: 'this address publishes too fast' }, { status: 429, headers: { 'Retry-After': 1 } })) : before(...args)
    })
    await says(page, '#state', /^Waiting: this address publishes too fast\.$/)
    await says(page, '#state', /^Live, with fewer frames: /)
    await page.close()
  })

  test('without a camera there is a clock', limit, async t => {
    const without = await browse(name, name === 'firefox' ? { extraPrefsFirefox: { 'media.navigator.permission.disabled': true } } : { args: ['--deny-permission-prompts'] })
    t.after(() => without.close())
    const page = await open(without, relay.url + '/camera.html#none')
    await ready(page)
    await press(page, '#start')
    await until('frames come back', async () => await frames(page, 'returned') > 2)
    assert.match(await text(page, '#state'), /^Live\. There is no camera \(.*\), so this is a clock\.$/)
  })

  test('a token is asked for, and respected; the stream begins again after a cut', limit, async t => {
    const guarded = await start('-secret', 'secret', '-beat', '1s'), line = await wire(guarded.port)
    t.after(() => { line.stop(); return guarded.stop() })
    const page = await open(browser, line.url + '/camera.html#cam')
    await says(page, '#enter', /This relay asks for a token/)
    const give = claims => page.evaluate(token => {
      document.querySelector('#enter input[name=token]').value = token
      document.querySelector('#enter form').requestSubmit()
    }, token('secret', { sub: 'ada', exp: Math.floor(Date.now() / 1e3) + 600, ...claims })).catch(() => { })
    await give({ read: ['cam'], write: ['cam'] })
    await says(page, '#state', /^Nothing is sent yet/)
    await page.select('#source', 'clock')
    await press(page, '#start')
    await until('frames come back', async () => await frames(page, 'returned') > 2)
    line.cut()
    await sleep(5000) // what was counted before is forgotten then
    await until('frames come back again', async () => await frames(page, 'returned') > 2)
    await page.goto(line.url + '/camera.html#other').catch(() => { })
    await says(page, '#state', /does not let you publish to the room other/)
    await page.close()
  })
})
