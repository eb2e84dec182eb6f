// The chat in real browsers: two users, every technique, and what can go wrong in between. After each, the page's log
// must be the same as the relay's: no message is lost or shown twice, and the order is right.

import assert from 'node:assert/strict'
import { mkdirSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, afterEach, before, describe, test } from 'node:test'
import { missing, startRelay, network, proxy } from './harm.mjs'
import { browse, open, sleep, until } from './relay.mjs'

const files = { chromium: '/usr/bin/chromium', firefox: '/usr/bin/firefox-esr' }
const techniques = { ws: 'WebSocket', sse: 'server-sent events', stream: 'streaming', longpoll: 'long polling', poll: 'polling', jsonp: 'JSONP', iframe: 'the forever frame', multipart: 'server push' }
const limit = { timeout: 120e3 }
const slow = 45e3 // ms; more than anything needs, since test machines are busy

// What a browser logs when a connection breaks.
const networkErrors = /net::ERR_|WebSocket connection to|can.t establish a connection|was interrupted while|Cross-Origin Request Blocked|NetworkError|Failed to load resource/
const unexpected = page => page.errors.filter(line => !networkErrors.test(line))

const text = (page, selector) => page.evaluate(selector => document.querySelector(selector)?.textContent, selector)
const press = (page, selector) => page.evaluate(selector => document.querySelector(selector).click(), selector)
const state = page => page.evaluate(() => document.body.dataset.status)
const gapLines = page => page.evaluate(() => [...document.querySelectorAll('#log .gap')].map(gap => gap.textContent))
const logLines = page => page.evaluate(() => [...document.querySelectorAll('#log .message')].map(p => `${p.dataset.id} ${p.querySelector('.text').textContent}`))
const people = page => page.evaluate(() => Object.fromEntries([...document.querySelectorAll('#here li')].map(li => [li.querySelector('bdi').textContent, li.dataset.state])))
const connected = page => until('connected', async () => await state(page) === 'open', slow)
const connectedBy = (page, via) => until('connected by ' + via, async () => await text(page, '#words') === 'connected by ' + techniques[via], slow)

/** Opens the chat, and joins under a name. */
async function openChat(browser, url, room, name, size) {
  const page = await open(browser, `${url}/?room=${room}`, size)
  await until('the chat is there', () => page.evaluate(() => document.querySelector('#app')?.hidden === false))
  await connected(page) // a page without a name connects too; Firefox logs an error if the socket is closed before it is open
  await page.evaluate(name => {
    if (document.querySelector('#naming').hidden) return
    document.querySelector('#name').value = name
    document.querySelector('#naming').requestSubmit()
  }, name)
  await connected(page)
  return page
}

const say = (page, message) => page.evaluate(message => {
  document.querySelector('#text').value = message
  document.querySelector('#say').requestSubmit()
}, message)

/** Waits until the page shows the relay's newest message, and checks that its log is the same as the relay's. */
async function expectSameLog(page, relay, room, before = []) {
  await until('the outbox is empty', () => page.evaluate(() => document.querySelector('#outbox').hidden), slow)
  const expected = [...before, ...await relay.messages(room)]
  const newest = expected.at(-1)
  let is = []
  await until('the newest is there', async () => (is = await logLines(page)).includes(newest), slow)
    .catch(error => { throw new Error(`${error.message}: ${newest}, but ${is.at(-1)}`) })
  await until('the outbox is empty', () => page.evaluate(() => document.querySelector('#outbox').hidden), slow)
  is = await logLines(page)
  const lost = expected.filter(line => !is.includes(line)), extra = is.filter((line, i) => is.indexOf(line) < i || !expected.includes(line))
  assert.deepEqual({ lost, extra }, { lost: [], extra: [] })
  assert.deepEqual(is, expected)
}

/** Somebody else publishes all the time, until stopped. */
function talk(t, relay, room, every = 40) {
  let on = true, n = 0
  const end = (async () => {
    for (; on; await sleep(every)) await relay.publish(room, `no. ${++n}`)
  })()
  const stop = () => { on = false; return end }
  t.after(() => stop().catch(() => { }))
  return { stop, get said() { return n } }
}

describe('two users', { skip: missing(...Object.values(files)) }, () => {
  let relay, chromium, firefox
  before(async () => [relay, chromium, firefox] = await Promise.all([startRelay(), browse('chromium'), browse('firefox')]))
  after(() => Promise.all([chromium?.close(), firefox?.close(), relay?.kill()]))

  const typing = (page, said) => until(`it says "${said}"`, async () => await text(page, '#typing') === said)
  const seen = (page, name, is) => until(`${name} is ${is}`, async () => (await people(page))[name] === is)
  async function type(page, words) {
    await page.bringToFront()
    await page.focus('#text')
    await page.keyboard.type(words, { delay: 20 })
  }

  test('chat, and see who is typing, joins and leaves', limit, async t => {
    const ada = await openChat(chromium, relay.url, 'pair', 'ada'), bob = await openChat(firefox, relay.url, 'pair', 'bob')
    await Promise.all([seen(ada, 'bob', 'online'), seen(bob, 'ada', 'online'), seen(ada, 'ada', 'online')])
    const moves = page => page.evaluate(() => [...document.querySelectorAll('#log .move')].map(line => line.textContent))
    assert.deepEqual([await moves(ada), await moves(bob)], [['bob joined'], []], 'who was here already is no news')
    assert.equal(await text(ada, '#count'), '2 here')

    for (const [one, other, name] of [[ada, bob, 'ada'], [bob, ada, 'bob']]) {
      await type(one, 'I am ' + name)
      await typing(other, name + ' is typing…')
      await seen(other, name, 'typing')
      await one.keyboard.press('Enter')
      await until('the other sees it', async () => (await logLines(other)).some(line => line.endsWith(' I am ' + name)))
      await typing(other, '')
      await expectSameLog(one, relay, 'pair')
      await expectSameLog(other, relay, 'pair')
    }
    assert.deepEqual((await logLines(ada)).map(line => line.replace(/^\d+ /, '')), ['I am ada', 'I am bob'])

    await type(bob, 'I start, and stop')
    await typing(ada, 'bob is typing…')
    await typing(ada, '') // after a timeout
    await seen(ada, 'bob', 'online')

    await bob.close() // the page tells the relay
    await seen(ada, 'bob', 'offline')
    assert.deepEqual(await moves(ada), ['bob joined', 'bob left'])
    assert.deepEqual(await relay.presence('pair'), { ada: 'online' })
    await until('bob is no longer shown', async () => !('bob' in await people(ada)))
    assert.equal(await text(ada, '#count'), '1 here')

    const again = await openChat(firefox, relay.url, 'pair', 'bob')
    await seen(ada, 'bob', 'online')
    await expectSameLog(again, relay, 'pair') // the history
    assert.deepEqual([ada.errors, bob.errors, again.errors], [[], [], []])
    firefox.process().kill('SIGKILL') // nothing tells the relay
    await seen(ada, 'bob', 'offline')
    assert.deepEqual(ada.errors, [])
    await ada.close()
  })
})

describe('the chat', { concurrency: 2 }, () => Object.keys(files).forEach(name => describe('in ' + name, { concurrency: 1, skip: missing(files[name]) }, () => {
  let relay, browser
  before(async () => [relay, browser] = await Promise.all([startRelay(), browse(name)]))
  after(() => Promise.all([browser?.close(), relay?.kill()]))
  afterEach(async () => { // a failed test leaves pages open
    for (const page of (await browser.pages()).slice(1)) await page.close().catch(() => { })
  })

  test('changing the technique loses nothing and shows nothing twice, for every technique', limit, async t => {
    const page = await openChat(browser, relay.url, 'ways', 'ada')
    await connectedBy(page, 'ws')
    const others = talk(t, relay, 'ways')
    for (const via of [...Object.keys(techniques).slice(1), 'ws', 'poll', 'sse']) {
      await press(page, `#menu [value=${via}]`)
      await connectedBy(page, via)
      await say(page, 'mine by ' + via)
      const had = (await logLines(page)).length
      await until('more by ' + via, async () => (await logLines(page)).length > had + 10, slow)
    }
    await others.stop()
    await expectSameLog(page, relay, 'ways')
    assert.deepEqual(await gapLines(page), [])
    const tally = await text(page, '#totals')
    for (const via of Object.values(techniques)) assert.match(tally, new RegExp(`\\d+ by ${via}`))
    assert.deepEqual(page.errors, [])
    await page.close()
  })

  test('the relay is killed and restarted: the page shows a gap, and what was written meanwhile is published once', limit, async t => {
    const page = await openChat(browser, relay.url, 'killed', 'ada')
    for (const round of [1, 2]) {
      await say(page, `before ${round}`)
      await relay.publish('killed', `also before ${round}`)
    }
    await expectSameLog(page, relay, 'killed')
    const before = await logLines(page)
    await relay.kill()
    await until('the page notices', async () => await state(page) === 'reconnecting')
    await say(page, 'meanwhile')
    await say(page, 'and this')
    await until('it waits', async () => /waiting for the connection/.test(await text(page, '#outbox')))
    await relay.restart()
    await connected(page)
    await until('a gap is shown', async () => (await gapLines(page)).length)
    await until('both are published', async () => (await relay.messages('killed')).length >= 2, slow)
    await relay.publish('killed', 'after')
    await expectSameLog(page, relay, 'killed', before)
    assert.deepEqual((await relay.messages('killed')).map(line => line.replace(/^\d+ /, '')), ['meanwhile', 'and this', 'after'])
    const [gap, ...more] = await gapLines(page)
    assert.match(gap, /restarted/)
    assert.deepEqual(more, [])
    assert.deepEqual(unexpected(page), [])
    await page.close()
  })

  test('the network is cut, and comes back; stalls, and comes back: nothing is missing', limit, async t => {
    const net = await network(relay.port)
    t.after(() => net.stop())
    const page = await openChat(browser, net.url, 'cut', 'ada')
    const others = talk(t, relay, 'cut', 100)
    for (const how of ['cut', 'stall', 'cut']) {
      await say(page, `before ${how}`)
      net.set(how)
      await say(page, `during ${how}`)
      await until(`${how} is noticed`, async () => await state(page) !== 'open', slow)
      const said = others.said
      await until('others continue', () => others.said > said + 5)
      net.set('pass')
      await connected(page)
    }
    await others.stop()
    await expectSameLog(page, relay, 'cut')
    assert.equal((await logLines(page)).filter(line => /during/.test(line)).length, 3)
    assert.deepEqual(await gapLines(page), [])
    assert.deepEqual(unexpected(page), [])
    await page.close()
  })

  test('a proxy buffers responses: the chat continues with long polling, and returns to a better technique when it can', limit, async t => {
    const between = await proxy(relay.port)
    t.after(() => between.stop())
    const page = await openChat(browser, between.url, 'held', 'ada')
    await connectedBy(page, 'sse') // the proxy supports no WebSocket
    const others = talk(t, relay, 'held', 100)
    between.buffers = true
    between.cut()
    await connectedBy(page, 'longpoll')
    await say(page, 'while it buffers')
    const had = (await logLines(page)).length
    await until('more comes', async () => (await logLines(page)).length > had + 10, slow)
    between.buffers = false
    await connectedBy(page, 'sse')
    await say(page, 'when it does not')
    await others.stop()
    await expectSameLog(page, relay, 'held')
    assert.deepEqual(await gapLines(page), [])
    assert.deepEqual(unexpected(page), [])

    between.buffers = true // from the beginning
    const second = await openChat(browser, between.url, 'held-second', 'ada')
    await connectedBy(second, 'longpoll')
    await say(second, 'hi')
    await relay.publish('held-second', 'hi ada')
    await expectSameLog(second, relay, 'held-second')
    assert.deepEqual(unexpected(second), [])
    await Promise.all([page.close(), second.close()])
  })

  test('ten tabs share one connection; when the leader closes, another tab continues from the same cursor', limit, async t => {
    const url = relay.url
    await until('no connection is left of earlier tests', async () => await relay.connections() === 0)
    let tabs = [await openChat(browser, url, 'tabs', 'ada')]
    while (tabs.length < 10) tabs.push(await openChat(browser, url, 'tabs', 'ada'))
    const leaders = async () => (await Promise.all(tabs.map(async page => await state(page) === 'open' && await text(page, '#more') === '' && page))).filter(Boolean)
    const others = talk(t, relay, 'tabs', 50)
    await until('one connection', async () => await relay.connections() === 1)
    await say(tabs[3], 'from the fourth tab')
    await until('there are messages', () => others.said > 20)
    assert.equal(await relay.connections(), 1)
    assert.equal((await leaders()).length, 1)
    for (const still of [9, 8]) {
      const [leader] = await leaders(), { said } = others
      assert.deepEqual(leader.errors, [])
      tabs = tabs.filter(page => page !== leader)
      await leader.close()
      await until('another leads', async () => (await leaders()).length === 1)
      await until('there are more messages', () => others.said > said + 20)
      assert.equal(tabs.length, still)
    }
    await others.stop()
    for (const page of tabs) {
      await expectSameLog(page, relay, 'tabs')
      assert.deepEqual(await gapLines(page), [])
      assert.deepEqual(page.errors, [])
      assert.deepEqual(await people(page), { ada: 'online' })
    }
    await until('one connection', async () => await relay.connections() === 1)
    await Promise.all(tabs.map(page => page.close()))
    await until('the last tab reports that ada has left', async () => !Object.keys(await relay.presence('tabs')).length)
  })

  /** Publishes any JSON. */
  async function publish(room, data, query = {}) {
    const answer = await fetch(`${relay.url}/rooms/${room}?${new URLSearchParams(query)}`, { method: 'POST', headers: { 'Content-Type': 'application/json' }, body: JSON.stringify(data) })
    assert.equal(answer.status, 201, await answer.clone().text())
    return (await answer.json()).id
  }
  const shown = (page, id) => until(`event ${id} is shown`, () => page.evaluate(id => document.querySelector(`#log .message[data-id="${id}"] .text`)?.textContent ?? null, id).then(text => text !== null && { text }))
  async function enter(page, room) {
    await page.evaluate(room => { location.hash = room }, room)
    await until('in ' + room, async () => await page.evaluate(() => document.querySelector('#room').value) === room && await state(page) === 'open')
  }

  const shapes = { 'text without a name': ['hi'], 'text with a name': ['hi', { user: 'bob' }], empty: [''], number: [5], null: [null], object: [{ a: [1, 'b'] }], list: [[]], false: [false],
    'another type': [{ choice: 2 }, { type: 'vote', user: 'bob' }], 'a type as properties are called': ['x', { type: 'constructor' }], long: ['long '.repeat(12e3)] }

  test('the first event of a room is shown, whatever it is: published before or after the page enters, with any technique, below any line', limit, async () => {
    const page = await openChat(browser, relay.url, 'first', 'ada')
    let n = 0
    for (const when of ['after', 'before']) for (const [name, [data, query]] of Object.entries(shapes)) {
      const room = 'first-' + ++n, text = typeof data === 'string' ? data : JSON.stringify(data)
      if (when === 'after') await enter(page, room)
      const id = await publish(room, data, query)
      if (when === 'before') await enter(page, room)
      assert.equal((await shown(page, id)).text, text, name)
      assert.equal(await page.evaluate(() => document.querySelector('#log .type')?.textContent), query?.type, name)
      await shown(page, await publish(room, 'next'))
      assert.equal((await logLines(page)).length, 2)
    }
    await enter(page, 'first-lines')
    await shown(page, await publish('first-lines', 'behind a date'))
    for (const via of ['sse', 'poll']) {
      await press(page, `#menu [value=${via}]`)
      await connectedBy(page, via)
      await until('a line says so', async () => (await text(page, '#log .way:last-child'))?.endsWith(techniques[via]))
      await shown(page, await publish('first-lines', 'behind a line, ' + via))
    }
    await expectSameLog(page, relay, 'first-lines')
    assert.deepEqual(page.errors, [])
    await page.close()
  })

  test('an event that cannot be rendered is shown as JSON; the rest of its batch, presence and scrolling still work', limit, async () => {
    const page = await openChat(browser, relay.url, 'broken', 'ada')
    await page.evaluate(async () => {
      const { techniques } = await import('./comet.js')
      techniques.multipart = link => {
        const message = (id, more) => link.on({ id, room: 'broken', type: 'message', time: 1.8e12, ...more })
        queueMicrotask(() => {
          const first = 9e15 - 100
          link.on({ type: 'hello', id: first, data: { beat: 15 } })
          link.on({ id: first + 1, room: 'broken', type: 'gap', data: { reason: 'history' } })
          message(first + 2, { data: 'behind a gap, nobody' })
          message(first + 3, { data: 'no time', time: 'never', from: 'eve' })
          link.on({ id: first + 4, room: 'broken', type: 'presence', data: null })
          link.on({ type: 'presence', room: 'broken', data: { count: 1, users: { grace: 'online' } } })
          for (let i = 0; i < 60; i++) message(first + 10 + i, { data: 'line ' + i })
          message(first + 80, {})
          message(first + 90, { data: 'last', from: 'eve' })
        })
        return () => { }
      }
      document.querySelector('#menu [value=multipart]').click()
    })
    await until('the last is shown', async () => (await logLines(page)).at(-1)?.endsWith(' last'))
    const texts = (await logLines(page)).map(line => line.replace(/^\S+ /, ''))
    assert.equal(texts[0], 'behind a gap, nobody')
    assert.match(texts[1], /^\{"id":\d+,"room":"broken","type":"message","time":"never".*"data":"no time"/)
    assert.match(texts[2], /"type":"presence".*"data":null/)
    assert.equal(texts[3], 'line 0')
    assert.equal(texts.length, 3 + 60 + 2)
    await until('only grace is online', async () => Object.entries(await people(page)).filter(([, is]) => is !== 'offline').join() === 'grace,online')
    assert.ok(await page.evaluate(() => { const s = document.querySelector('#scroller'); return s.scrollHeight > s.clientHeight && s.scrollHeight - s.scrollTop - s.clientHeight < 40 }), 'it is at the bottom')
    assert.equal(page.errors.filter(line => /chat\.js$/.test(line)).length, 2, page.errors.join('\n'))
    await page.close()
  })

  test('an operator erases the history: the page removes it too, and says so', limit, async () => {
    const page = await openChat(browser, relay.url, 'erased', 'ada')
    await publish('erased', 'a secret')
    await say(page, 'mine')
    await expectSameLog(page, relay, 'erased')
    const answer = await fetch(relay.url + '/rooms/erased', { method: 'DELETE' })
    assert.equal(answer.status, 204)
    await until('it says so', async () => (await gapLines(page)).some(gap => /erased/.test(gap)))
    assert.deepEqual(await logLines(page), [])
    await publish('erased', 'after')
    await expectSameLog(page, relay, 'erased')
    assert.equal((await logLines(page)).length, 1)
    assert.deepEqual(page.errors, [])
    await page.close()
  })

  test('two tabs of one browser are two users; each keeps its name, and a new tab suggests the last name', limit, async t => {
    const fresh = await browser.createBrowserContext()
    t.after(() => fresh.close())
    const name = page => text(page, '#me').then(text => text.replace('as ', ''))
    const ada = await openChat(fresh, relay.url, 'two', 'ada')
    const bob = await open(fresh, relay.url + '/?room=two')
    await connected(bob)
    await until('ada is proposed', () => bob.evaluate(() => { const { value, selectionEnd, form } = document.querySelector('#name'); return !form.hidden && value === 'ada' && selectionEnd === 3 }))
    await until('it says that ada is here', async () => /^Somebody here is already called ada\. You will/.test(await text(bob, '#taken')))
    await bob.bringToFront()
    await bob.focus('#name')
    await bob.keyboard.down('Control')
    await bob.keyboard.press('a')
    await bob.keyboard.up('Control')
    await bob.keyboard.type('bob')
    await until('nobody is called bob', async () => await text(bob, '#taken') === '')
    await bob.keyboard.press('Enter')
    await until('bob is here', async () => (await people(ada)).bob === 'online')
    await bob.keyboard.type('hm', { delay: 20 })
    await until('ada sees bob typing', async () => await text(ada, '#typing') === 'bob is typing…')
    await bob.keyboard.press('Enter')
    await until('it is published', async () => (await relay.messages('two')).length === 1)
    await expectSameLog(ada, relay, 'two')
    await ada.bringToFront()
    await ada.focus('#text')
    await ada.keyboard.type('yes', { delay: 20 })
    await until('bob sees ada typing', async () => await text(bob, '#typing') === 'ada is typing…')
    assert.deepEqual(await relay.presence('two').then(Object.keys).then(all => all.sort()), ['ada', 'bob'])

    for (const [page, is] of [[ada, 'ada'], [bob, 'bob']]) {
      await page.reload()
      await connected(page)
      assert.equal(await name(page), is)
    }
    const third = await open(fresh, relay.url + '/?room=two')
    await connected(third)
    assert.equal(await third.evaluate(() => document.querySelector('#name').value), 'bob')
    const grace = await open(fresh, relay.url + '/?room=two&user=grace')
    await until('grace is here', async () => (await people(ada)).grace === 'online')
    await press(grace, '#me')
    await grace.evaluate(() => {
      document.querySelector('#name').value = 'grace h.'
      document.querySelector('#naming').requestSubmit()
    })
    await until('grace is called otherwise', async () => await name(grace) === 'grace h.')
    await until('nobody is called grace', async () => (await people(ada)).grace !== 'online', 5e3)
    await grace.reload()
    await connected(grace)
    assert.equal(await name(grace), 'grace h.')
    assert.deepEqual([ada, bob, third, grace].flatMap(unexpected), [])
  })

  test('right-to-left names and texts do not affect what is around them', limit, async () => {
    const page = await openChat(browser, relay.url, 'bidi', 'ada'), other = 'אבג (1)'
    for (const user of [other, 'דה']) await fetch(`${relay.url}/rooms/bidi/presence?${new URLSearchParams({ user })}`, { method: 'POST', body: 'typing' })
    await shown(page, await publish('bidi', 'שלום', { user: other }))
    await until('they type', async () => / are typing…$/.test(await text(page, '#typing')))
    const isolated = selector => page.evaluate(selector => [...document.querySelectorAll(selector)].map(el => el.textContent), selector)
    assert.deepEqual((await isolated('#typing bdi')).sort(), [other, 'דה'].sort())
    assert.deepEqual(await isolated('#me bdi'), ['ada'])
    assert.deepEqual(await isolated('#log .head bdi'), [other])
    assert.deepEqual(await isolated('#log .text[dir=auto]'), ['שלום'])
    assert.deepEqual((await isolated('#here bdi')).sort(), ['ada', other, 'דה'].sort())
    assert.deepEqual(page.errors, [])
    await page.close()
  })

  test('punctuation and brackets around a URL are not part of the link', limit, async () => {
    const page = await openChat(browser, relay.url, 'links', 'ada')
    const links = { '(see https://x.org/a_(b))': 'https://x.org/a_(b)', '(https://x.org/)': 'https://x.org/', 'https://x.org/a_(b).': 'https://x.org/a_(b)', '[a](https://x.org/[b]), and': 'https://x.org/[b]',
      '“https://x.org/?a=(1)&b=[2]”!': 'https://x.org/?a=(1)&b=[2]', 'https://x.org/a, https': 'https://x.org/a', 'http://[::1]:8080/)': 'http://[::1]:8080/', ['https://x.org/' + '('.repeat(3e4)]: 'https://x.org/' + '('.repeat(3e4) }
    for (const line of Object.keys(links)) await publish('links', line)
    await expectSameLog(page, relay, 'links')
    assert.deepEqual(await page.evaluate(() => [...document.querySelectorAll('#log .text a')].map(a => a.textContent)), Object.values(links))
    assert.deepEqual(page.errors, [])
    await page.close()
  })

  test('scrolling up shows the older history, in its place', limit, async () => {
    for (let i = 0; i < 180; i++) await relay.publish('older', 'line ' + i, 'bob')
    const page = await openChat(browser, relay.url, 'older', 'ada')
    await until('the newest hundred', async () => (await logLines(page)).length === 100)
    await until('it is at the end', () => page.evaluate(() => { const s = document.querySelector('#scroller'); return s.scrollHeight - s.scrollTop - s.clientHeight < 40 }))
    await sleep(500) // the page has settled
    const at = await page.evaluate(() => {
      document.querySelector('#scroller').scrollTop = 150
      return document.querySelector('#log .message').getBoundingClientRect().top
    })
    await until('all that the relay keeps', async () => (await logLines(page)).length === 180)
    const now = await page.evaluate(() => [...document.querySelectorAll('#log .text')].find(text => text.textContent === 'line 80').closest('.message').getBoundingClientRect().top)
    assert.ok(Math.abs(now - at) < 60, `what was seen stays where it was: ${at}, ${now}`)
    assert.match(await text(page, '#log > :first-child'), /keeps no older messages/)
    assert.equal(await page.evaluate(() => document.querySelectorAll('#log .day').length), 1)
    await publish('older', 'one more')
    await expectSameLog(page, relay, 'older')
    assert.deepEqual(page.errors, [])
    await page.close()
  })

  test('/nick, mentions, code, a message that is too long, a room that is none, an invitation, and who joins and leaves', limit, async t => {
    const fresh = await browser.createBrowserContext() // without a stored name
    t.after(() => fresh.close())
    const page = await openChat(fresh, relay.url, 'people', 'ada')
    const texts = () => page.evaluate(() => [...document.querySelectorAll('#log .text')].map(text => text.textContent))
    await say(page, '/nick ada l.')
    await until('ada has another name', async () => await text(page, '#me') === 'as ada l.')
    await connected(page)
    await say(page, '/nick')
    assert.ok(await page.evaluate(() => !document.querySelector('#naming').hidden && document.querySelector('#name').value === 'ada l.'))
    await page.evaluate(() => document.querySelector('#naming').requestSubmit())

    for (const line of ['hey @Ada L., look', '@ada l.x is somebody else', 'run `go test` or ```\nmake\n  all\n```!']) await publish('people', line, { user: 'bob' })
    await until('they are there', async () => (await texts()).length === 3)
    assert.deepEqual(await page.evaluate(() => [...document.querySelectorAll('#log .mention .text')].map(text => text.textContent)), ['hey @Ada L., look'])
    assert.deepEqual(await page.evaluate(() => [...document.querySelectorAll('#log .text code')].map(code => [code.textContent, code.className])), [['go test', ''], ['make\n  all', 'block']])

    await say(page, '€'.repeat(30e3))
    await until('it is refused', async () => /Not sent: It is too long for this relay\. Make it shorter\. Edit Discard$/.test(await text(page, '#outbox')))
    await press(page, '#outbox .note button')
    assert.equal(await page.evaluate(() => { const { value } = document.querySelector('#text'); document.querySelector('#text').value = ''; return value.length }), 30e3)
    assert.ok(await page.evaluate(() => document.querySelector('#outbox').hidden))

    await page.evaluate(() => {
      document.querySelector('#room').value = 'my room'
      document.querySelector('#go').requestSubmit()
    })
    assert.match(await text(page, '#noroom'), /^A room cannot be called my room: 1 to 64 letters/)
    assert.equal((await texts()).length, 3, 'still in the old room')
    await page.evaluate(() => { location.hash = 'café' })
    await until('in caf-', () => page.evaluate(() => document.querySelector('#room').value === 'caf-'))
    assert.match(await text(page, '#noroom'), /called caf/)
    await enter(page, 'people')
    assert.equal(await text(page, '#noroom'), '')

    const copied = await page.evaluate(async () => {
      const all = []
      Object.defineProperty(navigator, 'clipboard', { value: { writeText: async text => all.push(text) }, configurable: true })
      for (const button of ['#invite', '#curl + .copy']) document.querySelector(button).click()
      await new Promise(done => setTimeout(done, 50))
      return all
    })
    assert.deepEqual(copied, [relay.url + '/?room=people', `curl -d hi ${relay.url.slice(7)}/rooms/people`])

    await sleep(1200) // what comes within a second is taken for history
    const is = (user, state) => fetch(`${relay.url}/rooms/people/presence?user=${user}`, { method: 'POST', body: state })
    const move = () => page.evaluate(() => document.querySelector('#log > .move:last-child')?.textContent)
    for (const user of ['b1', 'b2', 'b3']) await is(user, 'online')
    await until('three joined', async () => await move() === 'b1, b2 and b3 joined')
    for (const user of ['b4', 'b5', 'b6']) await is(user, 'online')
    await until('six are folded', async () => await move() === 'b4, b5, b6 and 3 others joined')
    await is('b1', 'offline')
    await until('one left', async () => await move() === 'b4, b5, b6 and 2 others joined; b1 left')
    await publish('people', 'between')
    await is('b2', 'offline')
    await until('another left', async () => await move() === 'b2 left')
    assert.deepEqual(unexpected(page), [])
    await page.close()
  })

  test('the bell: a service worker where a page may not notify, as on Android; over plain HTTP it says why it cannot', limit, async t => {
    const context = await browser.createBrowserContext()
    t.after(() => context.close())
    if (name === 'chromium') await context.overridePermissions(relay.url, ['notifications'])
    const page = await openChat(context, relay.url, 'bell', 'ada')
    await page.evaluate(() => {
      window.Notification = Object.assign(function () { throw new TypeError('Illegal constructor') }, { permission: 'granted' })
      document.querySelector('#bell').click()
    })
    await until('it is on', () => page.evaluate(() => document.querySelector('#bell').ariaPressed === 'true'))
    await until('the worker is there', () => page.evaluate(async () => !!(await navigator.serviceWorker.getRegistration())?.active))
    await page.evaluate(() => {
      Object.defineProperty(document, 'hidden', { value: true, configurable: true })
      document.hasFocus = () => false
      window.tones = 0
      window.AudioContext = class {
        currentTime = 0
        createGain() { return { gain: {}, connect() { } } }
        createOscillator() { return { frequency: {}, connect() { }, start() { window.tones++ }, stop() { } } }
        close() { }
      }
      document.dispatchEvent(new Event('visibilitychange', { bubbles: true }))
    })
    await sleep(1000)
    await publish('bell', 'is ada there?', { user: 'bob' })
    await until('the title counts it', () => page.evaluate(() => document.title === '(1) bell · Cometes'))
    assert.equal(await page.evaluate(() => window.tones), 0)
    await publish('bell', 'are you there, @ada?', { user: 'bob' })
    await until('a mention rings', () => page.evaluate(() => window.tones === 2))
    if (name === 'chromium') assert.deepEqual(await until('a notification', () => page.evaluate(async () => { // headless Firefox shows none
      const all = await (await navigator.serviceWorker.getRegistration()).getNotifications()
      return all[0]?.body.startsWith('are') && all.map(({ title, body }) => [title, body]) // it replaced the one before
    })), [['bob in #bell', 'are you there, @ada?']])
    await page.evaluateOnNewDocument(() => Object.defineProperty(window, 'isSecureContext', { value: false }))
    await page.reload()
    await connected(page)
    assert.deepEqual(await page.evaluate(() => [document.querySelector('#bell').disabled, document.querySelector('#silent').textContent]), [true, 'Browsers notify only over HTTPS, or at localhost.'])
    assert.deepEqual(unexpected(page), [])
  })

  test('the button for new messages is above the input, however many lines it has', limit, async () => {
    const page = await openChat(browser, relay.url, 'pill', 'ada')
    for (let i = 0; i < 60; i++) await publish('pill', 'line ' + i)
    await expectSameLog(page, relay, 'pill')
    await until('it no longer follows', () => page.evaluate(() => { // the last line may still be scrolled to
      const scroller = document.querySelector('#scroller'), was = scroller.scrollTop
      scroller.scrollTop = 0
      return was === 0
    }))
    await sleep(200) // for the scroll event
    await publish('pill', 'news')
    await until('the pill is there', async () => await text(page, '#pill') === '1 new message ↓')
    assert.deepEqual(await page.evaluate(() => [document.querySelector('#pill').closest('[role=status]') !== null, document.querySelector('#typing').ariaLive ?? document.querySelector('#typing').getAttribute('aria-live')]), [true, 'polite'], 'told to screen readers')
    for (const lines of [1, 3, 8, 30]) {
      const { pill, box } = await page.evaluate(lines => {
        const box = document.querySelector('#text'), at = id => document.getElementById(id).getBoundingClientRect().toJSON()
        box.value = 'line\n'.repeat(lines).trim()
        box.dispatchEvent(new Event('input'))
        return { pill: at('pill'), box: at('text') }
      }, lines)
      assert.ok(pill.width && pill.bottom < box.top && pill.top > 0, `${lines} lines: ${pill.bottom} ${box.top}`)
    }
    assert.deepEqual(page.errors, [])
    await page.close()
  })

  test('names have colours that are distinct and readable', limit, async () => {
    const page = await openChat(browser, relay.url, 'colours', 'ada')
    const names = ['adb', 'ada1', 'ada2', 'Ada', 'adá', 'bob', 'bobby', 'rob', 'user1', 'user2', 'user3', 'user4', 'anna', 'anne', 'annie']
    for (const user of names) await publish('colours', 'hi', { user })
    await expectSameLog(page, relay, 'colours')
    for (const scheme of ['light', 'dark']) {
      if (name === 'chromium') await page.emulateMediaFeatures([{ name: 'prefers-color-scheme', value: scheme }])
      else if (scheme === 'dark') continue
      const colours = await page.evaluate(() => {
        const paper = document.createElement('canvas').getContext('2d', { willReadFrequently: true })
        const rgb = colour => {
          paper.fillStyle = colour
          paper.fillRect(0, 0, 1, 1)
          return [...paper.getImageData(0, 0, 1, 1).data].slice(0, 3)
        }
        const body = document.body, ground = colour => { // a variable as a colour
          body.style.background = colour
          return rgb(getComputedStyle(body).backgroundColor)
        }
        const all = []
        const el = document.querySelector('#log .group').cloneNode(true)
        document.querySelector('#log').append(el)
        for (const second of [false, true]) for (let hue = 15; hue < 360; hue += 30) {
          el.className = second ? 'group second' : 'group'
          el.style.setProperty('--hue', hue)
          all.push({ name: rgb(getComputedStyle(el.querySelector('.head')).color), tail: rgb(getComputedStyle(el, '::before').backgroundColor) })
        }
        el.remove()
        return { sky: ground('var(--sky)'), card: ground('var(--card)'), all, used: [...document.querySelectorAll('#log .group')].map(el => [el.querySelector('bdi').textContent, el.style.getPropertyValue('--hue') + el.className]) }
      })
      const light = rgb => rgb.map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4).reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0)
      const contrast = (a, b) => { const [x, y] = [light(a), light(b)].sort((a, b) => b - a); return (x + 0.05) / (y + 0.05) }
      for (const { name, tail } of colours.all) for (const ground of [colours.sky, colours.card]) {
        assert.ok(contrast(name, ground) >= 4.5, `${scheme} ${name} on ${ground}: ${contrast(name, ground)}`)
        assert.ok(contrast(tail, ground) >= 2.5, `${scheme} dot ${tail} on ${ground}: ${contrast(tail, ground)}`)
      }
      const distance = (a, b) => Math.hypot(...a.map((v, i) => v - b[i]))
      for (const [i, a] of colours.all.entries()) for (const b of colours.all.slice(0, i)) assert.ok(distance(a.tail, b.tail) > 20, `${scheme}: ${a.tail} and ${b.tail}`)
      const ofAda = await page.evaluate(() => ['#here li', '#outbox .head'].map(selector => getComputedStyle(document.querySelector(selector)).color))
      assert.equal(ofAda[0], ofAda[1], 'the same in the list and in the log')
      assert.equal(new Set(colours.used.map(([, colour]) => colour)).size, names.length, 'each name has a colour of its own')
    }
    assert.deepEqual(page.errors, [])
    await page.close()
  })

  test('after changes of technique, a user who closes the tab or changes the name is gone from presence', limit, async t => {
    const fresh = await browser.createBrowserContext()
    t.after(() => fresh.close())
    const watch = await openChat(fresh, relay.url, 'ghost', 'watcher')
    const leave = page => { page.goto('about:blank').catch(() => { }) } // when WebDriver closes the page, Firefox sometimes drops the last request
    for (const vias of [['sse'], ['longpoll'], ['jsonp'], ['poll'], ['sse', 'ws'], ['stream', 'longpoll', 'iframe']]) {
      const user = vias.join('-')
      const page = await open(fresh, `${relay.url}/?room=ghost&user=${user}`)
      await connectedBy(page, 'ws')
      for (const via of vias) {
        await press(page, `#menu [value=${via}]`)
        await connectedBy(page, via)
      }
      await until(user + ' is seen', async () => (await people(watch))[user] === 'online')
      if (vias[1]) {
        await page.evaluate(() => {
          document.querySelector('#name').value = 'other'
          document.querySelector('#naming').requestSubmit()
        })
      } else await leave(page)
      await until(user + ' is gone', async () => !(await relay.presence('ghost'))[user], 3e3)
      if (vias[1]) {
        await until('the other is here', async () => (await relay.presence('ghost')).other)
        await leave(page)
      }
      await until('the other is gone', async () => !(await relay.presence('ghost')).other, 3e3)
    }
    assert.deepEqual(watch.errors, [])
    await watch.close()
  })

  test('a page in the back/forward cache has no connection, and continues when it is shown again', limit, async () => {
    await until('no connection is left of earlier tests', async () => await relay.connections() === 0)
    const page = await openChat(browser, relay.url, 'left', 'ada')
    for (const via of ['ws', 'sse', 'stream', 'multipart', 'iframe', 'longpoll', 'jsonp']) {
      await press(page, `#menu [value=${via}]`)
      await connectedBy(page, via)
      await until('it is held', async () => await relay.connections() === 1)
      page.goto(relay.url + '/comet.d.ts').catch(() => { })
      await until('it is left', () => page.evaluate(() => location.pathname === '/comet.d.ts').catch(() => false))
      await until(`nothing is held by ${via}`, async () => await relay.connections() === 0, 5e3)
      await publish('left', 'while away from ' + via)
      page.goBack().catch(() => { })
      await until('it is back', () => page.evaluate(() => document.body.dataset.status === 'open').catch(() => false))
      await expectSameLog(page, relay, 'left')
      await until('one is held', async () => await relay.connections() === 1)
    }
    await press(page, '#menu [value=multipart]') // with the events of the back/forward cache
    for (const via of ['multipart', 'iframe', 'jsonp', 'sse']) {
      await press(page, `#menu [value=${via}]`)
      await connectedBy(page, via)
      await page.evaluate(() => dispatchEvent(new PageTransitionEvent('pagehide', { persisted: true })))
      await until(`nothing is held by ${via}`, async () => await relay.connections() === 0, 5e3)
      await publish('left', 'while frozen by ' + via)
      await page.evaluate(() => dispatchEvent(new PageTransitionEvent('pageshow', { persisted: true })))
      await connected(page)
      await expectSameLog(page, relay, 'left')
    }
    assert.deepEqual(await gapLines(page), [])
    assert.deepEqual(unexpected(page), [])
    await page.close()
  })

  test('the browser goes offline: the chat says so at once; but if the relay is still reachable, nothing changes', limit, async t => {
    const net = await network(relay.port)
    t.after(() => net.stop())
    const page = await openChat(browser, net.url, 'offline', 'ada')
    const line = online => page.evaluate(online => {
      Object.defineProperty(navigator, 'onLine', { value: online, configurable: true })
      dispatchEvent(new Event(online ? 'online' : 'offline'))
    }, online)
    await line(false)
    await sleep(5e3) // longer than the check takes
    assert.equal(await text(page, '#words'), 'connected by WebSocket')
    net.set('stall')
    await line(false)
    await until('it says so', async () => await state(page) === 'offline', 6e3)
    assert.match(await text(page, '#state'), /^offline: what you write is kept for later/)
    await say(page, 'meanwhile')
    net.set('pass')
    await line(true)
    await connected(page)
    await expectSameLog(page, relay, 'offline')
    assert.deepEqual(unexpected(page), [])
    await page.close()
  })

  test('hostile names and messages are text on every page', limit, async t => {
    const names = ['<img src=x onerror="document.title=1">', '"><b class=owned>', '__proto__']
    const messages = ['<script>document.title=1</script>', '</p></script><b class=owned>', '<img src=x onerror=document.title=1>',
      'javascript:document.title=1', 'https://example.com/"onclick="document.title=1', '\u202Eright to left', '&lt;b&gt; &amp;', 'a\u2028b']
    const fresh = await browser.createBrowserContext() // without a stored name
    t.after(() => fresh.close())
    const page = await openChat(fresh, relay.url, 'hostile', names[0])
    for (const user of names) for (const message of messages) await relay.publish('hostile', message, user)
    await fetch(`${relay.url}/rooms/hostile/presence?${new URLSearchParams({ user: names[1] })}`, { method: 'POST', body: 'typing' })
    await expectSameLog(page, relay, 'hostile')
    assert.equal((await logLines(page)).length, names.length * messages.length)
    await until('both are seen', async () => Object.keys(await people(page)).length >= 2)
    assert.deepEqual(Object.keys(await people(page)).filter(one => names.includes(one)).sort(), names.slice(0, 2).sort())
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

  test('without JavaScript the chat works, with presence', limit, async t => {
    const plain = name === 'firefox' ? await browse(name, { extraPrefsFirefox: { 'javascript.enabled': false } }) : browser
    const page = await plain.newPage()
    try {
      if (plain === browser) await page.setJavaScriptEnabled(false)
      const go = path => { page.goto(relay.url + path).catch(() => { }) }
      const ask = (what, ...args) => page.evaluate(what, ...args).catch(() => false) // there may be no page while it changes
      const has = (what, words) => until(`${what} says ${words}`, () => ask((what, words) => [...document.querySelectorAll(what)].some(el => el.textContent.includes(words)), what, words), slow)
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
      assert.equal(await ask(() => !document.querySelector('#app')), true, 'no script ran')
      await until('the name is written', async () => { // Firefox may not have focused the field yet
        await click('input[name=user]')
        await page.keyboard.type('eve')
        return ask(() => { const { value } = document.querySelector('input[name=user]'); return value.endsWith('eve') && value.length === 3 })
      })
      await page.keyboard.press('Enter')
      await has('.note', 'Connected.')
      await has('.note', 'eve is here')
      await until('the relay knows', async () => (await relay.presence('lobby')).eve === 'online')

      await fetch(relay.url + '/rooms/lobby/presence?user=bob', { method: 'POST', body: 'online' })
      await has('.note', 'bob is online')
      await relay.publish('lobby', 'hi eve', 'bob')
      await has('.message', 'bob hi eve')
      await fetch(relay.url + '/rooms/lobby/presence?user=bob', { method: 'POST', body: 'offline' })
      await has('.note', 'bob is offline')

      await click('input[name=data]', 'iframe.form')
      for (const message of ['hi, I have no scripts', 'and write again']) { // the field has the focus again
        await page.keyboard.type(message)
        await page.keyboard.press('Enter')
        await has('.message', 'eve ' + message) // in the same page, which continues
        await until('the field is empty', () => ask(() => document.querySelector('iframe.form').contentDocument?.querySelector('input[name=data]:focus')?.value === ''))
      }
      await relay.publish('lobby', 'still there?', 'bob')
      await has('.message', 'bob still there?')
      const shown = await ask(() => [...document.querySelectorAll('.message span')].map(span => span.textContent))
      assert.deepEqual(shown, ['hi eve', 'hi, I have no scripts', 'and write again', 'still there?'])

      go('/rooms/lobby/refresh?user=eve&wait=2')
      await has('header', 'refreshes itself every 2 seconds')
      await has('.message', 'still there?')
      await relay.publish('lobby', 'news', 'bob')
      await has('.message', 'bob news')
      go('/rooms/lobby/refresh?user=eve')
      await has('header', 'refreshes itself every 10 seconds')
      go('/rooms/lobby/refresh?user=eve&wait=55') // a refresh would lose what is typed
      await has('header', 'refreshes itself every 55 seconds')
      await click('input[name=data]')
      await page.keyboard.type('from the page that refreshes itself')
      await page.keyboard.press('Enter')
      await has('.message', 'eve from the page that refreshes itself')
      await until('the message has the focus', () => ask(() => document.activeElement.name === 'data'))
      assert.match(await ask(() => document.querySelector('.message time').textContent), /^\d\d:\d\d UTC$/)
      assert.equal(await ask(() => document.querySelector('nav a').href), relay.url + '/?room=lobby&user=eve')
      const texts = (await relay.messages('lobby')).map(line => line.replace(/^\d+ /, ''))
      assert.deepEqual(texts, ['hi eve', 'hi, I have no scripts', 'and write again', 'still there?', 'news', 'from the page that refreshes itself'])
    } finally {
      await page.close().catch(() => { })
      if (plain !== browser) await plain.close()
    }
    await until('eve is gone', async () => !(await relay.presence('lobby')).eve)
  })

  if (name === 'chromium') test('screenshots', limit, async t => {
    const shots = join(tmpdir(), 'cometes-shots')
    mkdirSync(shots, { recursive: true })
    const page = await openChat(browser, relay.url, 'pictures', 'ada')
    const lines = [['bob', 'Good morning! Did the relay survive the night?'], ['bob', 'I read https://en.wikipedia.org/wiki/Comet_(programming), it is all there.'],
      ['grace', 'שלום לכולם, זה עובד מימין לשמאל'], ['grace', '🎉🎉'], ['bob', 'One long word: ' + 'wwwwwwwwww'.repeat(15)], ['linus', 'A message of several lines:\n  1. first\n  2. second'],
      ['bob', 'Lorem ipsum dolor sit amet, consectetur adipiscing elit. '.repeat(40)]]
    for (const [from, data] of lines) await relay.publish('pictures', data, from)
    for (const [user, is] of [['bob', 'typing'], ['grace', 'away'], ['linus', 'online']]) await fetch(`${relay.url}/rooms/pictures/presence?user=${user}`, { method: 'POST', body: is })
    await say(page, 'All fine here. Long live the long poll!')
    await expectSameLog(page, relay, 'pictures')
    const shot = async (name, scheme, viewport) => {
      await page.setViewport(viewport)
      await page.emulateMediaFeatures([{ name: 'prefers-color-scheme', value: scheme }])
      await until('ada is there', async () => await state(page) === 'open' && (await people(page)).ada === 'online') // emulating a phone reloads the page
      await sleep(200)
      await page.screenshot({ path: join(shots, name + '.png') })
      assert.ok(await page.evaluate(() => document.documentElement.scrollWidth <= innerWidth), name + ': no horizontal scrolling')
    }
    const desktop = { width: 1100, height: 800 }, phone = { width: 390, height: 780, deviceScaleFactor: 2, isMobile: true, hasTouch: true }
    await shot('light', 'light', desktop)
    await shot('dark', 'dark', desktop)
    await press(page, '#how')
    await shot('menu', 'light', desktop)
    await press(page, '#how')
    await shot('phone', 'light', phone)
    await shot('phone-dark', 'dark', phone)
    await press(page, '#who')
    await shot('phone-people', 'light', phone)
    assert.deepEqual(page.errors, [])
    await page.close()
  })
})))
