// Every page as people with other eyes, hands and screens find it: axe finds nothing in either scheme, at 360 px, at
// twice the size on a laptop, and in forced colours; and no page scrolls sideways. COMETES_SHOTS=folder keeps pictures.

import assert from 'node:assert/strict'
import { existsSync, readFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { join } from 'node:path'
import { after, before, describe, test } from 'node:test'
import { missing } from './harm.mjs'
import { browse, browsers, open, sleep, start, until } from './relay.mjs'

const axe = readFileSync(createRequire(import.meta.url).resolve('axe-core/axe.min.js'), 'utf8')
const shots = process.env.COMETES_SHOTS

const desktop = { width: 1280, height: 900 }, phone = { width: 360, height: 740 }, zoomed = { width: 640, height: 450, deviceScaleFactor: 2 }
const views = {
  light: [desktop],
  dark: [desktop, { 'prefers-color-scheme': 'dark' }],
  phone: [phone],
  'phone-dark': [phone, { 'prefers-color-scheme': 'dark' }],
  zoomed: [zoomed],
  forced: [desktop, { 'forced-colors': 'active' }],
}

// A page, and what is there when it is ready.
const pages = {
  chat: ['/?room=lobby&user=ada', '#log .message'],
  naming: ['/?room=empty', '#naming:not([hidden])'],
  lab: ['/lab.html', '[data-ready]'],
  stats: ['/stats.html', '#relay .curve'],
  inspect: ['/inspect.html?room=lobby,temp&via=sse&last=9&open=1', '#events li'],
  html: ['/rooms/lobby/html?user=eve', '.message'],
  refresh: ['/rooms/lobby/refresh?user=eve&wait=55', '.message'],
  form: ['/rooms/lobby/form?live=refresh&user=eve', 'form'],
  pad: ['/pad.html', 'main'],
  camera: ['/camera.html#cam', '#sent[data-ready]'],
}

const files = { chromium: '/usr/bin/chromium', firefox: '/usr/bin/firefox-esr' }
for (const browserName of browsers) describe('axe in ' + browserName, { skip: missing(files[browserName]) }, () => {
  const chromium = browserName === 'chromium' // only there a test can change what the media are; Firefox is dark
  let relay, guarded, browser
  before(async () => [relay, guarded, browser] = await Promise.all([start('-rate', '1000'), start('-secret', 'secret'), browse(browserName, chromium ? {} : { extraPrefsFirefox: { 'ui.systemUsesDarkTheme': 1 } })]))
  after(() => Promise.all([browser?.close(), relay?.stop(), guarded?.stop()]))

  /** What axe finds in the views of an open page. */
  async function check(page, name) {
    const found = [], session = chromium && await page.createCDPSession()
    for (const [view, [size, media = {}]] of Object.entries(views).filter(([view]) => chromium || view.endsWith('dark'))) {
      await page.setViewport(size)
      if (chromium) await session.send('Emulation.setEmulatedMedia', { features: ['prefers-color-scheme', 'forced-colors'].map(name => ({ name, value: media[name] ?? '' })) })
      await sleep(100)
      if (shots && chromium) await page.screenshot({ path: join(shots, `${name}-${view}.png`), fullPage: true })
      const { violations, wide } = await page.evaluate(async view => {
        const { violations } = await window.axe.run({ iframes: false, rules: view === 'forced' ? { 'color-contrast': { enabled: false } } : {} }) // the colours are not ours there
        return { violations: violations.map(({ id, nodes }) => `${id}: ${nodes.map(node => node.target.join(' ')).slice(0, 4).join(', ')} ${nodes[0].any[0]?.message ?? ''}`), wide: document.documentElement.scrollWidth > innerWidth }
      }, view)
      if (wide) violations.push('it scrolls sideways')
      found.push(...violations.map(what => `${view}: ${what}`))
    }
    assert.deepEqual(found, [], name)
  }

  for (const [name, [path, ready]] of Object.entries(pages)) {
    const file = /^\/(\w+\.html)/.exec(path)?.[1]
    test(name, { timeout: 120e3, skip: file && !existsSync(new URL('../static/' + file, import.meta.url)) }, async () => {
      for (const [user, text] of [['bob', 'good morning'], ['ada', 'it `works`'], ['grace', '42']]) await fetch(`${relay.url}/rooms/lobby?user=${user}`, { method: 'POST', body: text })
      for (let i = 0; i < 3; i++) await fetch(relay.url + '/rooms/temp', { method: 'POST', body: String(i * i) })
      const page = await open(browser, relay.url + path, { redirects: /html|inspect/.test(name) }) // one is never loaded, the other changes its address
      await until(ready, () => page.evaluate(ready => !!document.querySelector(ready), ready).catch(() => false), 60e3)
      await page.evaluate(axe)
      await check(page, name)
      await page.close()
    })
  }

  test('the pictures of the README', { timeout: 120e3, skip: !(chromium && process.env.COMETES_README) && 'only with COMETES_README=1' }, async () => {
    const folder = new URL('screenshots/', import.meta.url).pathname
    const shot = (page, name) => page.screenshot({ path: join(folder, name + '.webp'), type: 'webp', quality: 82 })
    const chat = await open(browser, relay.url + '/?room=comet&user=ada', { width: 1000, height: 590 })
    await until('it is there', () => chat.evaluate(() => document.body.dataset.status === 'open'))
    await sleep(1200)
    const said = async (user, text, way) => {
      if (user !== 'ada') await fetch(`${relay.url}/rooms/comet?user=${user}`, { method: 'POST', body: text })
      else await chat.evaluate((text, way) => {
        if (way) document.querySelector(`#menu [value=${way}]`).click()
        document.querySelector('#text').value = text
        document.querySelector('#say').requestSubmit()
      }, text, way)
      await sleep(700)
    }
    for (const user of ['bob', 'grace']) await fetch(`${relay.url}/rooms/comet/presence?user=${user}`, { method: 'POST', body: 'online' })
    await sleep(300)
    await said('bob', 'Good morning! Did the relay survive the night?')
    await said('ada', 'It did. I restarted my laptop, and nothing was missing.')
    await said('grace', 'From a shell, too: `curl -d hi localhost:8080/rooms/comet`')
    await said('ada', 'Now I read by long polling, as in 2000.', 'longpoll')
    await said('bob', '@ada and I cannot tell the difference.')
    await said('ada', 'Which was the idea. Back to the future.', 'ws')
    await fetch(relay.url + '/rooms/comet/presence?user=grace', { method: 'POST', body: 'typing' })
    await until('grace types', () => chat.evaluate(() => /grace is typing/.test(document.querySelector('#typing').textContent)))
    await shot(chat, 'chat')
    await chat.close()
    const lab = await open(browser, relay.url + '/lab.html', { width: 1000, height: 590 })
    await until('it is ready', () => lab.evaluate(() => 'ready' in document.body.dataset), 60e3)
    await lab.evaluate(() => { document.querySelector('#rate').value = 2; document.querySelector('#reset').click(); document.querySelector('#steady').click() })
    await sleep(9e3)
    await lab.evaluate(() => { document.querySelector('#cut').click() })
    await sleep(8e3)
    await lab.evaluate(() => scrollTo(0, document.querySelector('#controls').getBoundingClientRect().top + scrollY - 55))
    await sleep(200)
    await shot(lab, 'lab')
    await lab.close()
  })

  test('what asks for a token', { timeout: 60e3 }, async () => {
    for (const [path, form] of [['/', '#token form'], ['/stats.html', '#enter form']]) {
      const page = await open(browser, guarded.url + path)
      await until(form, () => page.evaluate(form => !!document.querySelector(form), form))
      await page.evaluate(axe)
      await check(page, 'token' + path.replace(/\W/g, '-'))
      await page.close()
    }
  })
})
