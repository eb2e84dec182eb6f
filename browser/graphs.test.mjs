// The lab and the stats page: under a proxy's prefix, with tokens, for operators; and that a hidden page closes its
// connections.

import assert from 'node:assert/strict'
import { after, afterEach, before, describe, test } from 'node:test'
import { browse, browsers, open, prefixed, start, token, until } from './relay.mjs'

const secret = 'a-secret-for-tests-of-thirty-two-bytes'
let relay, guarded
before(async () => {
  relay = await start('-beat', '2s', '-rate', '1000')
  guarded = await start('-beat', '2s', '-secret', secret)
})
after(async () => {
  await relay?.stop()
  await guarded?.stop()
})

const bearer = claims => token(secret, { exp: Math.floor(Date.now() / 1e3) + 600, ...claims })
const say = (page, selector) => page.evaluate(selector => document.querySelector(selector).textContent, selector)
const shown = (page, selector) => page.evaluate(selector => !!document.querySelector(selector)?.checkVisibility(), selector)
const press = (page, selector) => page.evaluate(selector => document.querySelector(selector).click(), selector)
const publish = (room, data) => fetch(`${relay.url}/rooms/${room}`, { method: 'POST', body: data }).then(answer => assert.ok(answer.ok, answer.status))
const ready = page => until('the lab is ready', () => page.evaluate(() => 'ready' in document.body.dataset).catch(() => false), 60e3)
const rows = page => page.evaluate(() => [...document.querySelectorAll('#list tbody tr')].map(row => row.cells[0].textContent))

/** The relay's open connections, by technique. */
async function held() {
  const text = await (await fetch(relay.url + '/metrics')).text()
  return Object.fromEntries([...text.matchAll(/^cometes_connections\{technique="(\w+)"\} ([1-9]\d*)$/gm)].map(([, name, count]) => [name, +count]))
}
const holds = (what, names) => until(what, async () => JSON.stringify(await held()) === JSON.stringify(names), 30e3)
  .catch(async error => { throw new Error(`${error.message}: ${JSON.stringify(await held())} instead of ${JSON.stringify(names)}`) })

/** Errors other than the line that a browser logs for each response with an error status. */
const unexpected = page => page.errors.filter(error => !/^Failed to load resource/.test(error))

for (const name of browsers) describe(name, () => {
  let browser
  before(async () => browser = await browse(name))
  afterEach(async () => { for (const page of await browser.pages()) if (page.url() !== 'about:blank') await page.close() })
  after(() => browser?.close())

  const go = async (page, url, is) => {
    page.goto(url).catch(() => { })
    await until(url, () => page.evaluate((url, is) => location.href === url && !!document.querySelector(is)?.checkVisibility(), url, is).catch(() => false))
  }

  test('sixteen visits in one tab: only the last page holds connections', async () => {
    const page = await open(browser, relay.url + '/')
    const pages = [['/stats.html', '#numbers .graph'], ['/lab.html', '#multipart iframe, #multipart img'], ['/', '#log']]
    for (let i = 0; i < 16; i++) {
      const [path, is] = pages[i % 3]
      await go(page, relay.url + path, is)
      if (path === '/stats.html') await until('its picture', () => page.evaluate(() => {
        document.querySelector('#live').scrollIntoView()
        return document.querySelector('#live').naturalWidth > 0
      }))
    }
    if (name === 'chromium') return holds('stats alone', { multipart: 1, ws: 2 })
    let last // Firefox closes a pushed picture's request only when it collects garbage
    await until('stats, and few pictures', async () => (last = await held()).multipart <= 3 && last.ws === 2 && Object.keys(last).length === 2)
      .catch(error => { throw new Error(`${error.message}: ${JSON.stringify(last)}`) })
  })

  test('back to a page in the back/forward cache: it continues', async () => {
    const page = await open(browser, relay.url + '/stats.html?room=kept-' + name)
    await until('it counts', () => page.evaluate(() => !!document.querySelectorAll('#relay .graph')[1]?.querySelector('.curve')))
    await go(page, relay.url + '/plain.css', 'body')
    if (name === 'chromium') await holds('nothing', {})
    page.goBack().catch(() => { })
    await until('it is back', () => page.evaluate(() => document.body.dataset.status === 'open').catch(() => false))
    await publish('kept-' + name, '17')
    await until('a number', async () => await say(page, '#numbers b') === '17')
    await until('its picture', () => page.evaluate(() => {
      document.querySelector('#live').scrollIntoView()
      return document.querySelector('#live').naturalWidth > 0
    }))
  })

  test('a hidden lab holds no connection, and another tab loads', async () => {
    const page = await open(browser, relay.url + '/lab.html')
    await ready(page)
    await press(page, '#more')
    await until('some wait', async () => /waits, /.test(await say(page, '#extra')))
    const begun = Date.now()
    const other = await open(browser, relay.url + '/')
    await until('the chat is connected', () => other.evaluate(() => document.body.dataset.status === 'open').catch(() => false), 5e3)
    assert.ok(Date.now() - begun < 5e3, `${Date.now() - begun} ms`)
    assert.equal(await page.evaluate(() => document.visibilityState), 'hidden')
    await holds('the chat alone', { ws: 1 })
    assert.match(await say(page, '#extra'), /^The six were closed when this page was hidden/)
    assert.equal(await page.evaluate(() => document.querySelector('#more').ariaPressed), 'false')
    await other.close()
    await page.bringToFront()
    await until('all ten are back', () => page.evaluate(() => [...document.querySelectorAll('.card')].every(card => card.dataset.state === 'open' || card.dataset.state === 'waits its turn')))
    const from = await page.evaluate(() => Object.fromEntries([...document.querySelectorAll('.card')].map(card => [card.id, +card.dataset.delivered])))
    await press(page, '#burst')
    await until('40 more by each', () => page.evaluate(from => [...document.querySelectorAll('.card')].every(card => +card.dataset.delivered >= from[card.id] + 40), from), 60e3)
    assert.deepEqual(await page.evaluate(() => [...document.querySelectorAll('.card')].filter(card => card.dataset.lost !== '0').map(card => card.id)), [])
  })

  test('under a prefix of a proxy: every link, script, stream and command to copy works', async () => {
    for (const prefix of ['/relay/', '/my%20relay/', '/a:b/', '/it\'s/']) {
      const proxy = await prefixed(relay.port, prefix)
      const page = await open(browser, proxy.url + '/stats.html')
      await until('it counts', () => page.evaluate(() => !!document.querySelectorAll('#relay .graph')[1]?.querySelector('.curve')))
      const feed = await say(page, '#feed'), address = `${proxy.url}/rooms/temp`
      assert.ok(feed.includes(prefix.includes("'") ? `'${address.replace("'", "'\\''")}'` : ` ${address};`), feed)
      assert.ok((await say(page, '#img')).includes(`"${proxy.url}/rooms/temp/multipart?`))
      const links = await page.evaluate(() => [...document.querySelectorAll('a[href]')].map(a => a.href))
      assert.deepEqual(links.filter(link => !link.startsWith(proxy.url + '/')), [])
      await go(page, proxy.url + '/lab.html', '#board tbody tr:nth-child(11)')
      assert.ok((await say(page, '#room')).includes(proxy.url.replace("'", "'\\''") + '/rooms/lab-'))
      await until('each technique delivers', () => page.evaluate(() => [...document.querySelectorAll('.card')].every(card => +card.dataset.delivered)), 60e3)
      await until('the verdict', async () => !/finding out/.test(await say(page, '#verdict')))
      assert.match(await say(page, '#choice'), /^WebSocket,/)
      assert.deepEqual(page.errors, [], prefix)
      await page.close()
      proxy.stop()
    }
  })

  test('without a token, lab and stats ask for one; with one they work, and the URL no longer contains it', async () => {
    for (const [path, rights, is] of [['/lab.html', { read: ['lab-*', '_stats'], write: ['lab-*'] }, '#board'], ['/stats.html', { read: ['_stats', 'temp'] }, '#relay .curve']]) {
      const context = await browser.createBrowserContext(), page = await open(context, guarded.url + path)
      await until('it asks', () => shown(page, '#enter input'))
      assert.ok(!await shown(page, '#all'))
      await page.evaluate(() => document.querySelector('#enter input').value = 'nonsense')
      await press(page, '#enter button')
      await until('it was refused', () => shown(page, '#enter .wrong').catch(() => false))
      await page.evaluate(token => document.querySelector('#enter input').value = token, bearer({ sub: 'ada', ...rights }))
      await press(page, '#enter button')
      await until('it works', () => shown(page, is).catch(() => false))
      assert.equal(await page.evaluate(() => location.search), '')
      if (path === '/lab.html') {
        await until('each technique delivers', () => page.evaluate(() => [...document.querySelectorAll('.card')].every(card => +card.dataset.delivered)), 60e3)
        await until('the verdict', async () => !/finding out/.test(await say(page, '#verdict')))
        await until('the relay shows its counts', async () => +await page.evaluate(() => document.querySelector('#ws [data-cost=held]').cells[2].textContent) > 0)
      }
      assert.deepEqual(unexpected(page), [])
      await context.close()
    }
  })

  test('a token with too few rights: lab and stats say so', async () => {
    const enter = async (path, claims) => {
      const page = await open(browser, 'about:blank')
      page.goto(`${guarded.url}${path}?token=${bearer({ sub: 'ada', ...claims })}${path === '/lab.html' ? '&room=lobby' : ''}`).catch(() => { })
      await until('it is there', () => page.evaluate(path => location.pathname === path && document.readyState !== 'loading', path).catch(() => false))
      return page
    }
    let page = await enter('/lab.html', { read: ['other'] })
    await until('no right to read', async () => /does not let this page read the room lobby/.test(await say(page, '#trouble')))
    assert.ok(!await shown(page, '#all'))
    assert.doesNotMatch(await say(page, 'body'), /finding out/)
    await press(page, '#another summary')
    await until('another can be given', () => shown(page, '#another input'))
    await page.close()
    page = await enter('/lab.html', { read: ['lobby'] })
    await ready(page)
    assert.match(await say(page, '#trouble'), /not publish/)
    assert.doesNotMatch(await say(page, '#verdict'), /finding out/)
    assert.match(await say(page, '#uncounted'), /does not show its own counts/)
    assert.ok(await page.evaluate(() => document.querySelector('#one').disabled))
    assert.deepEqual(unexpected(page), [])
    await page.close()
    page = await enter('/stats.html', { read: ['temp'] })
    await until('no numbers', async () => /does not name the room _stats/.test(await say(page, '#news').catch(() => '')))
    assert.match(await say(page, '#count'), /^Your token does not name the room _stats .* cometes token/)
    assert.ok(!await shown(page, '#relay'))
    await until('the room', () => shown(page, '#numbers svg'))
    assert.deepEqual(page.errors, [])
    await page.close()
    page = await enter('/stats.html', { read: ['_stats'] })
    await until('numbers', () => shown(page, '#relay .curve'))
    assert.match(await say(page, '#skipped'), /does not let this page read the room temp/)
    await until('rooms', () => shown(page, '#list'))
    assert.deepEqual(page.errors, [])
  })

  test('an operator sees the rooms, finds one, and erases it after a confirmation', async () => {
    const room = `busy-${name}`
    for (let i = 0; i < 5; i++) await publish(room, String(i))
    await publish(`idle-${name}`, 'hi')
    const page = await open(browser, `${relay.url}/stats.html?room=${room}#rooms`)
    await until('it is listed', async () => (await rows(page)).includes(room))
    await until('its numbers', async () => await say(page, '#numbers b') === '4')
    const cells = await page.evaluate(room => [...document.querySelectorAll('#list tbody tr')].find(row => row.cells[0].textContent === room).innerText.split('\t').map(text => text.trim()), room)
    assert.equal(cells[3], '5')
    assert.match(cells[5], /^just now$|^\d+s ago$/)
    await publish(room, '5')
    await until('it is refreshed', () => page.evaluate(room => [...document.querySelectorAll('#list tbody tr')].find(row => row.cells[0].textContent === room).cells[3].textContent === '6', room))
    assert.equal(await page.evaluate(room => [...document.querySelectorAll('#list a')].find(a => a.textContent === room).href, room), `${relay.url}/?room=${room}`)

    await page.evaluate(prefix => {
      document.querySelector('#prefix').value = prefix
      document.querySelector('#prefix').dispatchEvent(new Event('input'))
    }, room)
    await until('it is alone', async () => JSON.stringify(await rows(page)) === JSON.stringify([room]))

    const erase = '#list tbody td button'
    await page.evaluate(erase => { document.querySelector(erase).focus(); document.querySelector(erase).click() }, erase)
    assert.equal(await say(page, '#what'), `Erase the room ${room}?`)
    assert.equal(await page.evaluate(() => document.activeElement.value), 'keep')
    await page.keyboard.press('Escape')
    await until('it is kept', () => page.evaluate(() => !document.querySelector('#erase').open))
    assert.equal(await page.evaluate(() => document.activeElement.ariaLabel), `Erase ${room}`)

    await page.keyboard.press('Enter')
    await until('it asks', () => page.evaluate(() => document.querySelector('#erase').open))
    await page.keyboard.press('Tab')
    await page.keyboard.press('Enter')
    await until('the answer', async () => await say(page, '#answer') === `The room ${room} is erased.`)
    await until('its numbers are forgotten', async () => await say(page, '#numbers b') === '–' && await say(page, '#skipped') === 'the room was erased')
    assert.ok(await page.evaluate(() => document.activeElement !== document.body))
    const { events } = await (await fetch(`${relay.url}/rooms/${room}/poll?last=10`)).json()
    assert.deepEqual(events.filter(({ type }) => type === 'message'), [])
    await publish(room, '7')
    await until('it goes on', async () => await say(page, '#numbers b') === '7' && await say(page, '#skipped') === '')
    assert.deepEqual(page.errors, [])
  })

  test('the page says why somebody is not an operator', async () => {
    const proxy = await prefixed(relay.port, '/') // this proxy adds no header about the client
    const page = await open(browser, 'about:blank')
    await page.setExtraHTTPHeaders({ 'X-Forwarded-For': '192.0.2.7' })
    page.goto(proxy.url + '/stats.html').catch(() => { })
    await until('it says so', async () => /^The relay lists its rooms to operators only\./.test(await say(page, '#count').catch(() => '')))
    assert.ok(!await shown(page, '#list'))
    await until('the graphs', () => shown(page, '#relay .curve'))
    assert.deepEqual(unexpected(page), [])
    assert.ok(page.errors.length <= 1, 'asked once')
    await page.setExtraHTTPHeaders({})
    proxy.stop()
  })

  test('the lab: erased messages do not count as lost', async () => {
    const room = 'wiped-' + name
    const page = await open(browser, `${relay.url}/lab.html?room=${room}`)
    await ready(page)
    await press(page, '#poll .halt')
    await press(page, '#longpoll .halt')
    await press(page, '#burst')
    await until('all but the paused have it', () => page.evaluate(() => +document.querySelector('#published').textContent >= 50 && [...document.querySelectorAll('.card')].every(card => /poll/.test(card.id) || +card.dataset.delivered >= 50)), 60e3)
    const before = await page.evaluate(() => +document.querySelector('#poll').dataset.delivered)
    assert.equal((await fetch(`${relay.url}/rooms/${room}`, { method: 'DELETE' })).status, 204)
    await until('it is noted', () => page.evaluate(() => /the room was erased/.test(document.querySelector('#sse .events').textContent)))
    await until('nothing is to come', () => page.evaluate(() => !/to come/.test(document.querySelector('#poll .check').textContent)))
    await press(page, '#poll .halt')
    await press(page, '#longpoll .halt')
    await press(page, '#one')
    await until('one more', () => page.evaluate(before => +document.querySelector('#poll').dataset.delivered === before + 1, before))
    const wrong = await page.evaluate(() => [...document.querySelectorAll('.card')].filter(card => card.dataset.wrong === 'true').map(card => `${card.id}: ${card.querySelector('.check').textContent}`))
    assert.deepEqual(wrong, [])
    assert.deepEqual(page.errors, [])
  })
})
