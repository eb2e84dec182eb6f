// The chat in real browsers, both at once: two users, every technique, and all that can go wrong on the way. After each
// of these the page's log must be the relay's: no message lost, none twice, in order.

import assert from 'node:assert/strict'
import { mkdirSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, afterEach, before, describe, test } from 'node:test'
import { missing, mortal, network, proxy } from './harm.mjs'
import { browse, open, sleep, until } from './relay.mjs'

const files = { chromium: '/usr/bin/chromium', firefox: '/usr/bin/firefox-esr' }
const ways = { ws: 'WebSocket', sse: 'server-sent events', stream: 'streaming', longpoll: 'long polling', poll: 'polling', jsonp: 'JSONP', iframe: 'the forever frame', multipart: 'multipart' }
const limit = { timeout: 120e3 }
const far = 45e3 // nothing needs so long, but machines are busy

// The lines with which a browser itself reports what was cut.
const ofTheNetwork = /net::ERR_|WebSocket connection to|can.t establish a connection|was interrupted while|Cross-Origin Request Blocked|NetworkError|Failed to load resource/
const wrong = page => page.errors.filter(line => !ofTheNetwork.test(line))

const text = (page, selector) => page.evaluate(selector => document.querySelector(selector)?.textContent, selector)
const press = (page, selector) => page.evaluate(selector => document.querySelector(selector).click(), selector)
const state = page => page.evaluate(() => document.body.dataset.status)
const gaps = page => page.evaluate(() => [...document.querySelectorAll('#log .gap')].map(gap => gap.textContent))
const log = page => page.evaluate(() => [...document.querySelectorAll('#log .message')].map(p => `${p.dataset.id} ${p.querySelector('.text').textContent}`))
const who = page => page.evaluate(() => Object.fromEntries([...document.querySelectorAll('#here li')].map(li => [li.querySelector('bdi').textContent, li.dataset.state])))
const opened = page => until('connected', async () => await state(page) === 'open', far)
const by = (page, via) => until('connected by ' + via, async () => await text(page, '#words') === 'connected by ' + ways[via], far)

/** Opens the chat and comes in under a name. */
async function chat(browser, url, room, name, size) {
  const page = await open(browser, `${url}/?room=${room}`, size)
  await until('the chat is there', () => page.evaluate(() => document.querySelector('#app')?.hidden === false))
  await opened(page) // who is asked for a name is listening already; Firefox complains of a socket closed before that
  await page.evaluate(name => {
    if (document.querySelector('#naming').hidden) return
    document.querySelector('#name').value = name
    document.querySelector('#naming').requestSubmit()
  }, name)
  await opened(page)
  return page
}

const say = (page, message) => page.evaluate(message => {
  document.querySelector('#text').value = message
  document.querySelector('#say').requestSubmit()
}, message)

/** Waits until the page has what the relay has, and checks that it has no more, and nothing on the way. */
async function same(page, relay, room, before = []) {
  await until('nothing is on the way', () => page.evaluate(() => document.querySelector('#outbox').hidden), far)
  const should = [...before, ...await relay.truth(room)]
  const newest = should.at(-1)
  let is = []
  await until('the newest is there', async () => (is = await log(page)).includes(newest), far)
    .catch(error => { throw new Error(`${error.message}: ${newest}, but ${is.at(-1)}`) })
  await until('nothing is on the way', () => page.evaluate(() => document.querySelector('#outbox').hidden), far)
  is = await log(page)
  const lost = should.filter(line => !is.includes(line)), odd = is.filter((line, i) => is.indexOf(line) < i || !should.includes(line))
  assert.deepEqual({ lost, odd }, { lost: [], odd: [] })
  assert.deepEqual(is, should)
}

/** Somebody else talks all the time, until stopped. */
function talk(t, relay, room, every = 40) {
  let on = true, n = 0
  const end = (async () => {
    for (; on; await sleep(every)) await relay.say(room, `no. ${++n}`)
  })()
  const stop = () => { on = false; return end }
  t.after(() => stop().catch(() => { }))
  return { stop, get said() { return n } }
}

describe('two users', { skip: missing(...Object.values(files)) }, () => {
  let relay, chromium, firefox
  before(async () => [relay, chromium, firefox] = await Promise.all([mortal(), browse('chromium'), browse('firefox')]))
  after(() => Promise.all([chromium?.close(), firefox?.close(), relay?.kill()]))

  const typing = (page, said) => until(`it says "${said}"`, async () => await text(page, '#typing') === said)
  const seen = (page, name, is) => until(`${name} is ${is}`, async () => (await who(page))[name] === is)
  async function type(page, words) {
    await page.bringToFront()
    await page.focus('#text')
    await page.keyboard.type(words, { delay: 20 })
  }

  test('chat, and see who types, comes and goes', limit, async t => {
    const ada = await chat(chromium, relay.url, 'pair', 'ada'), bob = await chat(firefox, relay.url, 'pair', 'bob')
    await Promise.all([seen(ada, 'bob', 'online'), seen(bob, 'ada', 'online'), seen(ada, 'ada', 'online')])
    assert.equal(await text(ada, '#count'), '2 here')

    for (const [one, other, name] of [[ada, bob, 'ada'], [bob, ada, 'bob']]) {
      await type(one, 'I am ' + name)
      await typing(other, name + ' is typing…')
      await seen(other, name, 'typing')
      await one.keyboard.press('Enter')
      await until('it is said', async () => (await log(other)).some(line => line.endsWith(' I am ' + name)))
      await typing(other, '')
      await same(one, relay, 'pair')
      await same(other, relay, 'pair')
    }
    assert.deepEqual((await log(ada)).map(line => line.replace(/^\d+ /, '')), ['I am ada', 'I am bob'])

    await type(bob, 'I begin, and do not')
    await typing(ada, 'bob is typing…')
    await typing(ada, '') // by itself
    await seen(ada, 'bob', 'online')

    await bob.close() // says so
    await seen(ada, 'bob', 'offline')
    assert.deepEqual(await relay.presence('pair'), { ada: 'online' })
    await until('bob is no longer shown', async () => !('bob' in await who(ada)))
    assert.equal(await text(ada, '#count'), '1 here')

    const again = await chat(firefox, relay.url, 'pair', 'bob')
    await seen(ada, 'bob', 'online')
    await same(again, relay, 'pair') // the history
    assert.deepEqual([ada.errors, bob.errors, again.errors], [[], [], []])
    firefox.process().kill('SIGKILL') // says nothing
    await seen(ada, 'bob', 'offline')
    assert.deepEqual(ada.errors, [])
    await ada.close()
  })
})

describe('the chat', { concurrency: 2 }, () => Object.keys(files).forEach(name => describe('in ' + name, { concurrency: 1, skip: missing(files[name]) }, () => {
  let relay, browser
  before(async () => [relay, browser] = await Promise.all([mortal(), browse(name)]))
  after(() => Promise.all([browser?.close(), relay?.kill()]))
  afterEach(async () => { // a test that failed leaves pages
    for (const page of (await browser.pages()).slice(1)) await page.close().catch(() => { })
  })

  test('every technique, changed in mid-stream, loses nothing and says nothing twice', limit, async t => {
    const page = await chat(browser, relay.url, 'ways', 'ada')
    await by(page, 'ws')
    const others = talk(t, relay, 'ways')
    for (const via of [...Object.keys(ways).slice(1), 'ws', 'poll', 'sse']) {
      await press(page, `#menu [value=${via}]`)
      await by(page, via)
      await say(page, 'mine by ' + via)
      const had = (await log(page)).length
      await until('more by ' + via, async () => (await log(page)).length > had + 10, far)
    }
    await others.stop()
    await same(page, relay, 'ways')
    assert.deepEqual(await gaps(page), [])
    const tally = await text(page, '#tally')
    for (const via of Object.values(ways)) assert.match(tally, new RegExp(`\\d+ by ${via}`))
    assert.deepEqual(page.errors, [])
    await page.close()
  })

  test('the relay is killed and started again: a gap is said, what was written meanwhile is said once', limit, async t => {
    const page = await chat(browser, relay.url, 'killed', 'ada')
    for (const round of [1, 2]) {
      await say(page, `before ${round}`)
      await relay.say('killed', `also before ${round}`)
    }
    await same(page, relay, 'killed')
    const before = await log(page)
    await relay.kill()
    await until('it is noticed', async () => await state(page) === 'reconnecting')
    await say(page, 'meanwhile')
    await say(page, 'and this')
    await until('it waits', async () => /waiting for the connection/.test(await text(page, '#outbox')))
    await relay.begin()
    await opened(page)
    await until('a gap is said', async () => (await gaps(page)).length)
    await until('both are said', async () => (await relay.truth('killed')).length >= 2, far)
    await relay.say('killed', 'after')
    await same(page, relay, 'killed', before)
    assert.deepEqual((await relay.truth('killed')).map(line => line.replace(/^\d+ /, '')), ['meanwhile', 'and this', 'after'])
    const [gap, ...more] = await gaps(page)
    assert.match(gap, /started anew/)
    assert.deepEqual(more, [])
    assert.deepEqual(wrong(page), [])
    await page.close()
  })

  test('the network is cut, and comes back; falls silent, and comes back: nothing is missing', limit, async t => {
    const net = await network(relay.port)
    t.after(() => net.stop())
    const page = await chat(browser, net.url, 'cut', 'ada')
    const others = talk(t, relay, 'cut', 100)
    for (const how of ['cut', 'silence', 'cut']) {
      await say(page, `before ${how}`)
      net.is(how)
      await say(page, `during ${how}`)
      await until(`${how} is noticed`, async () => await state(page) !== 'open', far)
      const said = others.said
      await until('others go on', () => others.said > said + 5)
      net.is('pass')
      await opened(page)
    }
    await others.stop()
    await same(page, relay, 'cut')
    assert.equal((await log(page)).filter(line => /during/.test(line)).length, 3)
    assert.deepEqual(await gaps(page), [])
    assert.deepEqual(wrong(page), [])
    await page.close()
  })

  test('a proxy holds answers back: the chat falls to long polling and goes on, and returns when it can', limit, async t => {
    const between = await proxy(relay.port)
    t.after(() => between.stop())
    const page = await chat(browser, between.url, 'held', 'ada')
    await by(page, 'sse') // it knows no WebSocket
    const others = talk(t, relay, 'held', 100)
    between.holds = true
    between.cut()
    await by(page, 'longpoll')
    await say(page, 'while it holds')
    const had = (await log(page)).length
    await until('more comes', async () => (await log(page)).length > had + 10, far)
    between.holds = false
    await by(page, 'sse')
    await say(page, 'when it does not')
    await others.stop()
    await same(page, relay, 'held')
    assert.deepEqual(await gaps(page), [])
    assert.deepEqual(wrong(page), [])

    between.holds = true // from the beginning
    const anew = await chat(browser, between.url, 'held-anew', 'ada')
    await by(anew, 'longpoll')
    await say(anew, 'hi')
    await relay.say('held-anew', 'hi ada')
    await same(anew, relay, 'held-anew')
    assert.deepEqual(wrong(anew), [])
    await Promise.all([page.close(), anew.close()])
  })

  test('ten tabs hold one connection; when the leading tab closes another goes on from the same cursor', limit, async t => {
    const url = relay.url
    await until('nobody is left of before', async () => await relay.connections() === 0)
    let tabs = [await chat(browser, url, 'tabs', 'ada')]
    while (tabs.length < 10) tabs.push(await chat(browser, url, 'tabs', 'ada'))
    const leaders = async () => (await Promise.all(tabs.map(async page => await state(page) === 'open' && await text(page, '#more') === '' && page))).filter(Boolean)
    const others = talk(t, relay, 'tabs', 50)
    await until('one connection', async () => await relay.connections() === 1)
    await say(tabs[3], 'from the fourth tab')
    await until('some is said', () => others.said > 20)
    assert.equal(await relay.connections(), 1)
    assert.equal((await leaders()).length, 1)
    for (const still of [9, 8]) {
      const [leader] = await leaders(), { said } = others
      assert.deepEqual(leader.errors, [])
      tabs = tabs.filter(page => page !== leader)
      await leader.close()
      await until('another leads', async () => (await leaders()).length === 1)
      await until('more is said', () => others.said > said + 20)
      assert.equal(tabs.length, still)
    }
    await others.stop()
    for (const page of tabs) {
      await same(page, relay, 'tabs')
      assert.deepEqual(await gaps(page), [])
      assert.deepEqual(page.errors, [])
      assert.deepEqual(await who(page), { ada: 'online' })
    }
    await until('one connection', async () => await relay.connections() === 1)
    await Promise.all(tabs.map(page => page.close()))
    await until('the last tab says that ada is gone', async () => !Object.keys(await relay.presence('tabs')).length)
  })

  test('hostile names and messages are text, on every page', limit, async t => {
    const names = ['<img src=x onerror="document.title=1">', '"><b class=owned>', '__proto__']
    const messages = ['<script>document.title=1</script>', '</p></script><b class=owned>', '<img src=x onerror=document.title=1>',
      'javascript:document.title=1', 'https://example.com/"onclick="document.title=1', '\u202Eright to left', '&lt;b&gt; &amp;', 'a\u2028b']
    const fresh = await browser.createBrowserContext() // where no name is kept
    t.after(() => fresh.close())
    const page = await chat(fresh, relay.url, 'hostile', names[0])
    for (const user of names) for (const message of messages) await relay.say('hostile', message, user)
    await fetch(`${relay.url}/rooms/hostile/presence?${new URLSearchParams({ user: names[1] })}`, { method: 'POST', body: 'typing' })
    await same(page, relay, 'hostile')
    assert.equal((await log(page)).length, names.length * messages.length)
    await until('both are seen', async () => Object.keys(await who(page)).length >= 2)
    assert.deepEqual(Object.keys(await who(page)).filter(one => names.includes(one)).sort(), names.slice(0, 2).sort())
    for (const from of names) assert.ok(await page.evaluate(from => [...document.querySelectorAll('.head bdi')].some(bdi => bdi.textContent === from), from))
    const harmless = page => page.evaluate(() => ({
      title: document.title, owned: document.querySelectorAll('.owned, img, script:not([src]), [onclick]').length,
      links: [...document.querySelectorAll('.log a, #log a')].filter(a => a.protocol !== 'https:').length,
    }))
    assert.deepEqual(await harmless(page), { title: 'hostile · Cometes', owned: 0, links: 0 })
    assert.deepEqual(page.errors, [])
    await page.close()

    for (const kind of ['html', 'refresh']) {
      const plain = await browser.newPage()
      plain.goto(`${relay.url}/rooms/hostile/${kind}?${new URLSearchParams({ user: names[1] })}`).catch(() => { })
      await until('all is shown', () => plain.evaluate(n => document.querySelectorAll('.message').length === n, names.length * messages.length).catch(() => false))
      assert.deepEqual(await harmless(plain), { title: 'hostile · Cometes', owned: 0, links: 0 }, kind)
      const shown = await plain.evaluate(() => [...document.querySelectorAll('.message')].map(p => [p.querySelector('b').textContent, p.querySelector('span').textContent]))
      const should = names.flatMap(from => messages.map(message => [from, message]))
      assert.deepEqual(shown, kind === 'refresh' ? should.reverse() : should, kind)
      await plain.close()
    }
  })

  test('without JavaScript: the page leads to a whole chat, presence included', limit, async t => {
    const plain = name === 'firefox' ? await browse(name, { extraPrefsFirefox: { 'javascript.enabled': false } }) : browser
    const page = await plain.newPage()
    try {
      if (plain === browser) await page.setJavaScriptEnabled(false)
      const go = path => { page.goto(relay.url + path).catch(() => { }) }
      const ask = (what, ...args) => page.evaluate(what, ...args).catch(() => false) // while pages change there may be none
      const has = (what, words) => until(`${what} says ${words}`, () => ask((what, words) => [...document.querySelectorAll(what)].some(el => el.textContent.includes(words)), what, words), far)
      /** Clicks the middle of an element, which may be in the form's frame. */
      async function click(selector, frame) {
        const at = await until(selector, () => ask((selector, frame) => {
          const outer = frame && document.querySelector(frame), el = (frame ? outer.contentDocument : document)?.querySelector(selector)
          const box = el?.getBoundingClientRect(), { x = 0, y = 0 } = outer?.getBoundingClientRect() ?? {}
          return box?.width && { x: x + box.x + box.width / 2, y: y + box.y + box.height / 2 }
        }, selector, frame ?? null))
        await page.mouse.click(at.x, at.y)
      }

      go('/')
      await until('the plain page', () => ask(() => !!document.querySelector('main.plain h1')?.getBoundingClientRect().height))
      assert.equal(await ask(() => document.querySelector('#app').hidden), true, 'no script ran')
      await click('input[name=user]')
      await page.keyboard.type('eve')
      await page.keyboard.press('Enter')
      await has('.note', 'Connected.')
      await has('.note', 'eve is here')
      await until('the relay knows', async () => (await relay.presence('lobby')).eve === 'online')

      await fetch(relay.url + '/rooms/lobby/presence?user=bob', { method: 'POST', body: 'online' })
      await has('.note', 'bob is online')
      await relay.say('lobby', 'hi eve', 'bob')
      await has('.message', 'bob hi eve')
      await fetch(relay.url + '/rooms/lobby/presence?user=bob', { method: 'POST', body: 'offline' })
      await has('.note', 'bob is offline')

      for (const message of ['hi, I have no scripts', 'and write again']) {
        await click('input[name=data]', 'iframe.form')
        await page.keyboard.type(message)
        await page.keyboard.press('Enter')
        await has('.message', 'eve ' + message) // in the same page, that goes on
        await until('the field is empty', () => ask(() => document.querySelector('iframe.form').contentDocument?.querySelector('input[name=data]')?.value === ''))
      }
      await relay.say('lobby', 'still there?', 'bob')
      await has('.message', 'bob still there?')
      const shown = await ask(() => [...document.querySelectorAll('.message span')].map(span => span.textContent))
      assert.deepEqual(shown, ['hi eve', 'hi, I have no scripts', 'and write again', 'still there?'])

      go('/rooms/lobby/refresh?user=eve&wait=2')
      await has('header', 'comes anew every 2 seconds')
      await has('.message', 'still there?')
      await relay.say('lobby', 'news', 'bob')
      await has('.message', 'bob news')
      go('/rooms/lobby/refresh?user=eve')
      await has('header', 'comes anew every 10 seconds')
      go('/rooms/lobby/refresh?user=eve&wait=55') // lest it comes anew while we write, and what is written is lost
      await has('header', 'comes anew every 55 seconds')
      await click('input[name=data]')
      await page.keyboard.type('from the page that comes anew')
      await page.keyboard.press('Enter')
      await has('.message', 'eve from the page that comes anew')
      const texts = (await relay.truth('lobby')).map(line => line.replace(/^\d+ /, ''))
      assert.deepEqual(texts, ['hi eve', 'hi, I have no scripts', 'and write again', 'still there?', 'news', 'from the page that comes anew'])
    } finally {
      await page.close().catch(() => { })
      if (plain !== browser) await plain.close()
    }
    await until('eve is gone', async () => !(await relay.presence('lobby')).eve)
  })

  if (name === 'chromium') test('pictures of it, for people to look at', limit, async t => {
    const shots = join(tmpdir(), 'cometes-shots')
    mkdirSync(shots, { recursive: true })
    const page = await chat(browser, relay.url, 'pictures', 'ada')
    const lines = [['bob', 'Good morning! Did the relay survive the night?'], ['bob', 'I read https://en.wikipedia.org/wiki/Comet_(programming), it is all there.'],
      ['grace', 'שלום לכולם, זה עובד מימין לשמאל'], ['grace', '🎉🎉'], ['bob', 'One long word: ' + 'wwwwwwwwww'.repeat(15)], ['linus', 'A message of several lines:\n  1. first\n  2. second'],
      ['bob', 'Lorem ipsum dolor sit amet, consectetur adipiscing elit. '.repeat(40)]]
    for (const [from, data] of lines) await relay.say('pictures', data, from)
    for (const [user, is] of [['bob', 'typing'], ['grace', 'away'], ['linus', 'online']]) await fetch(`${relay.url}/rooms/pictures/presence?user=${user}`, { method: 'POST', body: is })
    await say(page, 'All fine here. Long live the long poll!')
    await same(page, relay, 'pictures')
    const shot = async (name, scheme, viewport) => {
      await page.setViewport(viewport)
      await page.emulateMediaFeatures([{ name: 'prefers-color-scheme', value: scheme }])
      await until('ada is there', async () => await state(page) === 'open' && (await who(page)).ada === 'online') // to become a phone it loads anew
      await sleep(200)
      await page.screenshot({ path: join(shots, name + '.png') })
      assert.ok(await page.evaluate(() => document.documentElement.scrollWidth <= innerWidth), name + ': nothing sticks out to the side')
    }
    const desk = { width: 1100, height: 800 }, phone = { width: 390, height: 780, deviceScaleFactor: 2, isMobile: true, hasTouch: true }
    await shot('light', 'light', desk)
    await shot('dark', 'dark', desk)
    await press(page, '#how')
    await shot('menu', 'light', desk)
    await press(page, '#how')
    await shot('phone', 'light', phone)
    await shot('phone-dark', 'dark', phone)
    await press(page, '#who')
    await shot('phone-people', 'light', phone)
    assert.deepEqual(page.errors, [])
    await page.close()
  })
})))
