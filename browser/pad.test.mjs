// The pad in real browsers: two people who write at once, and what can go wrong in between. After each the pages have the
// same text, it is what the room's events say, and what each has written is all there.

import assert from 'node:assert/strict'
import { mkdirSync, readFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, afterEach, before, describe, test } from 'node:test'
import { MAX, Replica } from '../static/replica.js'
import { missing, network, startRelay } from './harm.mjs'
import { browse, open, sleep, until } from './relay.mjs'

const files = { chromium: '/usr/bin/chromium', firefox: '/usr/bin/firefox-esr' }
const techniques = { ws: 'WebSocket', sse: 'server-sent events', stream: 'streaming', longpoll: 'long polling', poll: 'polling', jsonp: 'JSONP', iframe: 'the forever frame', multipart: 'server push' }
const limit = { timeout: 240e3 }
const slow = 45e3 // ms; more than anything needs, since test machines are busy
const networkErrors = /net::ERR_|WebSocket connection to|can.t establish a connection|was interrupted while|NetworkError|Failed to load resource/
const unexpected = page => page.errors.filter(line => !networkErrors.test(line))
const clean = (...pages) => assert.deepEqual(pages.map(page => page.errors.filter(line => !/status of 412/.test(line))), pages.map(() => [])) // a 412 is how an edit learns that it was late

const value = page => page.evaluate(() => document.querySelector('#text').value)
const content = (page, selector) => page.evaluate(selector => document.querySelector(selector)?.textContent, selector)
const press = (page, selector) => page.evaluate(selector => document.querySelector(selector).click(), selector)
const saved = page => page.evaluate(() => document.body.dataset.saved === 'yes')
const connected = page => until('connected', () => page.evaluate(() => document.body.dataset.status === 'open' && !document.querySelector('#text').readOnly), slow)
const connectedBy = (page, via) => until('connected by ' + via, async () => await content(page, '#words') === 'connected by ' + techniques[via], slow)

async function openPad(browser, url, room, name, size) {
  const page = await open(browser, `${url}/pad.html?user=${name}#${room}`, size)
  await connected(page)
  return page
}

/** Writes as a person does, who may be in a page that is not in front. `at` is a place, or some text to write behind. */
const write = (page, words, at, pause = 20) => page.evaluate(async (words, at, pause) => {
  const input = document.querySelector('#text')
  const place = typeof at === 'string' ? input.value.indexOf(at) + at.length : at ?? input.value.length
  input.setSelectionRange(place, place)
  for (const c of words) {
    input.setRangeText(c, input.selectionStart, input.selectionEnd, 'end')
    input.dispatchEvent(new InputEvent('input', { inputType: 'insertText' }))
    if (pause) await new Promise(done => setTimeout(done, pause))
  }
}, words, at, pause)

/** Replaces a part of the text, as pasting or cutting does. */
const replace = (page, part, by) => page.evaluate((part, by) => {
  const input = document.querySelector('#text'), at = input.value.indexOf(part)
  input.setRangeText(by, at, at + part.length, 'end')
  input.dispatchEvent(new InputEvent('input', { inputType: by ? 'insertFromPaste' : 'deleteByCut' }))
}, part, by)

/** The text that the room's events say. */
async function inRoom(relay, room) {
  const replica = new Replica
  for (let query = 'last=256', answer; !answer || answer.events.length; query = 'after=' + answer.cursor) {
    answer = await (await fetch(`${relay.url}/rooms/${room}/poll?presence=0&${query}`)).json()
    for (const event of answer.events) replica.receive(event)
  }
  return replica.text
}

/** Waits until all pages have saved what they have, and have the same text; returns it. */
async function settled(relay, room, ...pages) {
  let texts
  await until('all is saved, and the same', async () => {
    texts = await Promise.all([inRoom(relay, room), ...pages.map(value)])
    return (await Promise.all(pages.map(saved))).every(Boolean) && new Set(texts).size === 1
  }, slow).catch(error => { throw new Error(`${error.message}: ${JSON.stringify(texts?.map(text => text.slice(0, 500)))}`) })
  return texts[0]
}

const publish = (relay, room, type, data, query) => fetch(`${relay.url}/rooms/${room}?${new URLSearchParams({ type, user: 'eve', ...query })}`,
  { method: 'POST', headers: { 'Content-Type': 'application/json' }, body: JSON.stringify(data) }).then(answer => answer.json())

describe('two browsers', { skip: missing(...Object.values(files)) }, () => {
  let relay, chromium, firefox
  before(async () => [relay, chromium, firefox] = await Promise.all([startRelay(), browse('chromium'), browse('firefox')]))
  after(() => Promise.all([chromium?.close(), firefox?.close(), relay?.kill()]))

  test('people write on their keyboards at the same time, at one place and at several, and see where the other is', limit, async () => {
    const ada = await openPad(chromium, relay.url, 'keys', 'ada'), bob = await openPad(firefox, relay.url, 'keys', 'bob')
    for (const page of [ada, bob]) {
      await page.bringToFront()
      await page.focus('#text')
    }
    await Promise.all([ada.keyboard.type('ada was here first ', { delay: 30 }), bob.keyboard.type('bob came second ', { delay: 30 })])
    let text = await settled(relay, 'keys', ada, bob)
    for (const words of ['ada was here first ', 'bob came second ']) assert.ok(text.includes(words), text)
    for (const [page, name] of [[ada, 'bob'], [bob, 'ada']]) await until('the other is seen', async () => await content(page, '.peer .caret bdi') === name)

    await Promise.all([replace(ada, text, 'one\ntwo\nthree\n'), sleep(500)])
    await settled(relay, 'keys', ada, bob)
    await ada.keyboard.down('Control')
    await ada.keyboard.press('Home')
    await ada.keyboard.up('Control')
    await bob.keyboard.down('Control')
    await bob.keyboard.press('End')
    await bob.keyboard.up('Control')
    await Promise.all([ada.keyboard.type('at the beginning\n', { delay: 20 }), bob.keyboard.type('at the end', { delay: 20 })])
    assert.equal(await settled(relay, 'keys', ada, bob), 'at the beginning\none\ntwo\nthree\nat the end')
    await until('line 5', async () => await content(ada, '#here li:last-child button') === 'line 5')

    await bob.evaluate(() => document.querySelector('#text').setSelectionRange(0, 6, 'backward'))
    await until('the selection', async () => await ada.evaluate(() => document.querySelectorAll('.chosen').length) === 1)
    for (const page of [ada, bob]) { // the mirror is what the textarea shows, so carets are where they should be
      assert.deepEqual(await page.evaluate(() => { const [mirror, input] = ['mirror', 'text'].map(id => document.getElementById(id)); return [mirror.offsetWidth - input.offsetWidth, mirror.offsetHeight - input.offsetHeight, input.scrollHeight - input.clientHeight] }), [0, 0, 0])
    }
    await bob.keyboard.down('Control') // undo and redo, on the keyboard
    await bob.keyboard.press('z')
    await bob.keyboard.up('Control')
    assert.equal(await settled(relay, 'keys', ada, bob), 'at the beginning\none\ntwo\nthree\n')
    await bob.keyboard.down('Control')
    await bob.keyboard.press('y')
    await bob.keyboard.up('Control')
    assert.equal(await settled(relay, 'keys', ada, bob), 'at the beginning\none\ntwo\nthree\nat the end')
    clean(ada, bob)
    await Promise.all([ada.close(), bob.close()])
  })
})

describe('the pad', { concurrency: 2 }, () => Object.keys(files).forEach(name => describe('in ' + name, { concurrency: 1, skip: missing(files[name]) }, () => {
  let relay, browser, other
  before(async () => {
    [relay, browser] = await Promise.all([startRelay(), browse(name)])
    other = await browser.createBrowserContext()
  })
  after(() => Promise.all([browser?.close(), relay?.kill()]))
  afterEach(async () => { // a failed test leaves pages open
    for (const page of (await browser.pages()).slice(1)) await page.close({ runBeforeUnload: false }).catch(() => { })
  })
  const both = (room, url = relay.url) => Promise.all([openPad(browser, url, room, 'ada'), openPad(other, url, room, 'bob')])

  test('each deletes what the other writes in, while the technique changes: what was written meanwhile stays', limit, async () => {
    const [ada, bob] = await both('ways')
    await write(ada, 'The quick brown fox jumps over the lazy dog.', undefined, 0)
    await settled(relay, 'ways', ada, bob)
    let expected = []
    for (const [i, via] of [...Object.keys(techniques).slice(1), 'ws'].entries()) {
      const words = [`<a${i}-${via}>`, `<b${i}-${via}>`]
      expected.push(...words)
      const bobs = async () => {
        await write(bob, words[1], 'quick ')
        await replace(bob, 'brown', '')
        await write(bob, 'brown', 'fox', 0)
      }
      await Promise.all([write(ada, words[0], 'quick '), bobs(), press(ada, `#menu [value=${via}]`)])
      await connectedBy(ada, via)
    }
    const text = await settled(relay, 'ways', ada, bob)
    for (const word of expected) assert.ok(text.includes(word), `${word} in ${text}`)
    const letters = text => [...text].sort().join('')
    assert.equal(letters(text.replaceAll('brown', '')), letters('The quick  fox jumps over the lazy dog.' + expected.join('')), text)

    await replace(ada, text, 'keep [gone] keep')
    await settled(relay, 'ways', ada, bob)
    await Promise.all([write(ada, 'WORD', '[go', 5), sleep(30).then(() => replace(bob, '[gone]', ''))]) // the one deletes where the other writes
    const end = await settled(relay, 'ways', ada, bob)
    assert.ok(end.includes('WORD') && end.startsWith('keep ') && end.endsWith(' keep'), end)
    clean(ada, bob)
  })

  test('one is offline, both write on, and the relay is restarted: all arrives', limit, async t => {
    const net = await network(relay.port)
    t.after(() => net.stop())
    const [ada, bob] = [await openPad(browser, net.url, 'offline', 'ada'), await openPad(other, relay.url, 'offline', 'bob')]
    await write(ada, 'begin. ', undefined, 0)
    await settled(relay, 'offline', ada, bob)
    net.set('cut')
    await until('it is noticed', async () => await ada.evaluate(() => document.body.dataset.status !== 'open'), slow)
    await write(ada, 'ada offline. ')
    await write(bob, 'bob online. ')
    assert.match(await content(ada, '#saved'), /^Not saved: waiting/)
    assert.equal(await saved(ada), false)
    net.set('pass')
    await connected(ada)
    let text = await settled(relay, 'offline', ada, bob)
    for (const words of ['begin. ', 'ada offline. ', 'bob online. ']) assert.ok(text.includes(words), text)

    await relay.kill()
    await Promise.all([write(ada, 'ada while it is down. ', 0), write(bob, 'bob while it is down. ')])
    await relay.restart()
    text = await settled(relay, 'offline', ada, bob)
    for (const words of ['begin. ', 'ada offline. ', 'bob online. ', 'ada while it is down. ', 'bob while it is down. ']) assert.equal(text.split(words).length, 2, text)
    await Promise.all([write(ada, 'AAA'), relay.kill().then(() => relay.restart()), write(bob, 'BBB', 0)])
    text = await settled(relay, 'offline', ada, bob)
    assert.equal(text.split('AAA').length, 2, text)
    assert.equal(text.split('BBB').length, 2, text)
    assert.deepEqual([ada, bob].flatMap(unexpected), [])
  })

  test('undo and redo are of what one has done, and keep what others do in between', limit, async () => {
    const [ada, bob] = await both('undo')
    await write(ada, 'ada ', undefined, 0)
    await settled(relay, 'undo', ada, bob)
    await write(bob, 'bob ')
    await settled(relay, 'undo', ada, bob)
    await sleep(1100) // longer than what counts as one act
    await write(ada, 'one two', 0, 0)
    await settled(relay, 'undo', ada, bob)
    await write(bob, '-inside-', 'one', 0)
    assert.equal(await settled(relay, 'undo', ada, bob), 'one-inside- twoada bob ')
    await press(ada, '#undo')
    assert.equal(await settled(relay, 'undo', ada, bob), '-inside-ada bob ')
    await press(ada, '#undo')
    assert.equal(await settled(relay, 'undo', ada, bob), '-inside-bob ')
    assert.equal(await ada.evaluate(() => document.querySelector('#undo').disabled), true)
    await press(ada, '#redo')
    await press(ada, '#redo')
    const text = await settled(relay, 'undo', ada, bob)
    assert.equal([...text].sort().join(''), [...'one-inside- twoada bob '].sort().join(''))
    await press(bob, '#undo')
    assert.equal((await settled(relay, 'undo', ada, bob)).includes('-inside-'), false)
    clean(ada, bob)
  })

  test('20,000 characters are pasted, emoji and accents stay whole, the caret stays, and the text can be full', limit, async () => {
    const [ada, bob] = await both('long')
    const family = '👩‍👩‍👧‍👦é👍🏽', long = (family + 'x').repeat(1300).slice(0, 20_000).toWellFormed().replace(/\ufffd/g, 'y')
    await write(bob, 'before|after', undefined, 0)
    await settled(relay, 'long', ada, bob)
    await bob.evaluate(() => document.querySelector('#text').setSelectionRange(7, 9, 'backward'))
    await replace(ada, '|', `|${long}|`)
    assert.equal(await settled(relay, 'long', ada, bob), `before|${long}|after`)
    assert.deepEqual(await bob.evaluate(() => { const { selectionStart, selectionEnd, selectionDirection } = document.querySelector('#text'); return [selectionStart, selectionEnd, selectionDirection] }), [long.length + 8, long.length + 10, 'backward'])
    await Promise.all([replace(ada, '👍🏽x', '👍🏿x'), replace(bob, '👧‍👦', '👦')])
    assert.ok((await settled(relay, 'long', ada, bob)).isWellFormed())

    const chinese = '中'.repeat(MAX) // 120 KB: its snapshot is in parts
    await replace(ada, await value(ada), chinese)
    assert.equal(await settled(relay, 'long', ada, bob), chinese)
    assert.match(await content(ada, '#full'), /^The text is full/)
    await write(bob, 'too much', undefined, 0)
    await until('it is offered to be copied', () => bob.evaluate(() => !document.querySelector('#notice').hidden))
    assert.equal(await settled(relay, 'long', ada, bob), chinese)
    assert.equal(await bob.evaluate(() => document.querySelector('#notice textarea').value), 'too much')
    for (let n = 0; n < 70; n++) await publish(relay, 'long', 'message', 'chat ' + n)
    await replace(ada, '中', '国')
    await until('a snapshot', async () => (await (await fetch(`${relay.url}/rooms/long/poll?last=10`)).json()).events.filter(({ type }) => type === 'snapshot').length > 1, slow)
    const late = await openPad(browser, relay.url, 'long', 'late')
    assert.equal(await settled(relay, 'long', ada, bob, late), '国' + chinese.slice(1))
    clean(ada, bob, late)
  })

  test('who comes later has the text; other messages in the room, and malformed edits, change nothing', limit, async () => {
    const [ada, bob] = await both('hostile')
    await write(ada, 'unharmed <b>text</b>', undefined, 0)
    const text = await settled(relay, 'hostile', ada, bob)
    const head = (await (await fetch(`${relay.url}/rooms/hostile/poll?last=1`)).json()).events[0].id
    const edits = [null, 5, 'x', [], {}, { base: head }, { base: head, key: 'e.1', change: 'x' }, { base: head, key: 'e.2', change: [1e9, 'x'] }, { base: head, key: 'e.3', change: [-21] }, { base: head, key: 'e.4', change: [1.5, 'x'] },
      { base: head, key: 'e.5', change: ['a\rb'] }, { base: head, key: 'e.6', change: ['x'.repeat(MAX)] }, { base: head, key: 'e.7', change: [null] }, { base: head, key: { toString: 1 }, change: ['x'] },
      { base: head, key: '__proto__', change: ['x'] }, { base: 1, key: 'e.9', change: ['unchained'] }, { base: head, key: 'e.10', change: [{ length: 5 }] }]
    for (const edit of edits) await publish(relay, 'hostile', 'edit', edit)
    for (const snapshot of [null, 'x', { text: 5 }, { text: 'x', done: 5, part: 0, parts: 1 }, { text: 'x'.repeat(MAX + 1), done: [], part: 0, parts: 1 }, { text: 'x', done: [], part: 3, parts: 4 }, { text: 'y', done: [[1]], part: 0 }]) await publish(relay, 'hostile', 'snapshot', snapshot)
    for (const caret of [null, 1, {}, { client: 5 }, { client: 'e', from: -1, to: 1e9, base: head }, { client: 'e', from: 'x', to: {}, base: head }, { client: 'e', base: head, from: 2, to: 4 }]) await publish(relay, 'hostile', 'caret', caret, { ttl: 60 })
    for (const data of ['hi', { base: head, key: 'm.1', change: ['x'] }]) await publish(relay, 'hostile', 'message', data)
    await write(bob, ' and more')
    assert.equal(await settled(relay, 'hostile', ada, bob), text + ' and more')
    const late = await openPad(browser, relay.url, 'hostile', encodeURIComponent('<img src=x onerror="document.title=1">'))
    await write(late, ', and late', undefined, 0)
    assert.equal(await settled(relay, 'hostile', ada, bob, late), text + ' and more, and late')
    await ada.bringToFront() // a hidden page draws nothing
    await until('the caret of late', () => ada.evaluate(() => [...document.querySelectorAll('.peer bdi')].some(el => el.textContent.startsWith('<img'))))
    assert.equal(await ada.evaluate(() => document.querySelectorAll('img, b').length - document.querySelectorAll('#menu b').length), 0)

    for (let n = 0; n < 30; n++) { // many edits: there are snapshots, and who comes later needs no more than the room keeps
      await write(ada, `${n}a`, 0, 0)
      await write(bob, `${n}b`, undefined, 0)
      await sleep(200)
    }
    await publish(relay, 'hostile', 'edit', { base: head, key: 'e.20', change: ['fork'] })
    await settled(relay, 'hostile', ada, bob, late)
    for (let n = 0; n < 200; n++) await publish(relay, 'hostile', 'message', 'chat')
    const last = await openPad(browser, relay.url, 'hostile', 'last')
    const end = await settled(relay, 'hostile', ada, bob, late, last)
    for (let n = 0; n < 30; n++) for (const word of [`${n}a`, `${n}b`]) assert.ok(end.includes(word), word)
    clean(ada, bob, late, last)
  })

  test('an operator erases the room: the text is gone, and offered to be copied', limit, async () => {
    const [ada, bob] = await both('erased')
    await write(ada, 'a secret', undefined, 0)
    await settled(relay, 'erased', ada, bob)
    await fetch(relay.url + '/rooms/erased', { method: 'DELETE' })
    await until('it is offered', () => bob.evaluate(() => document.querySelector('#notice textarea').value === 'a secret'))
    await write(bob, 'anew', undefined, 0)
    assert.equal(await settled(relay, 'erased', ada, bob), 'anew')
    clean(ada, bob)
  })

  test('leaving with edits that are not saved warns', limit, async t => {
    const net = await network(relay.port)
    t.after(() => net.stop())
    const page = await openPad(browser, net.url, 'leave', 'ada')
    const warns = () => page.evaluate(() => !dispatchEvent(new Event('beforeunload', { cancelable: true })))
    await write(page, 'saved', undefined, 0)
    await settled(relay, 'leave', page)
    assert.equal(await warns(), false)
    net.set('cut')
    await write(page, ' not', undefined, 0)
    assert.equal(await warns(), true)
    net.set('pass')
    assert.equal(await settled(relay, 'leave', page), 'saved not')
    assert.equal(await warns(), false)
    assert.deepEqual(unexpected(page), [])
  })

  if (name === 'chromium') test('ten people write at once: none makes ten requests in any second, and all is there', { timeout: 180e3 }, async t => {
    const pages = await both('ten')
    const seen = pages[0].evaluate(async () => { // what the other page writes
      const seen = {}
      for (const end = Date.now() + 60e3; Date.now() < end && !seen['.']; await new Promise(done => setTimeout(done, 10))) {
        for (const c of document.querySelector('#text').value) if (c >= '\u4e00' || c === '.') seen[c] ??= Date.now()
      }
      return seen
    })
    const others = Array.from({ length: 8 }, (_, i) => ({ replica: new Replica('node' + i), newest: 0 })), stop = new AbortController()
    const take = (one, event) => {
      if (event.data?.turn) Object.assign(one, { holder: event.data.client + '.', holdUntil: Date.now() + event.data.turn })
      if (event.data?.key?.startsWith(one.holder)) one.holdUntil = 0
      if (event.id <= one.newest || !['edit', 'snapshot'].includes(event.type)) return
      one.newest = event.id
      one.replica.receive(event)
    }
    const listening = (async () => {
      let rest = ''
      for await (const part of (await fetch(relay.url + '/rooms/ten/stream?last=256', { signal: stop.signal })).body.pipeThrough(new TextDecoderStream())) {
        const lines = (rest + part).split('\n')
        rest = lines.pop()
        for (const line of lines) if (line) for (const one of others) take(one, JSON.parse(line))
      }
    })().catch(() => { })
    let conflicts = 0, published = 0
    const writing = others.map(async one => { // as pad.js does
      for (const end = Date.now() + 6e3; Date.now() < end || one.replica.pending.length;) {
        if (Date.now() < end) one.replica.edit([Math.floor(Math.random() * one.replica.view.length), 'ab'].filter(Boolean))
        const data = structuredClone(one.replica.next()), { id, error } = await publish(relay, 'ten', 'edit', data, { if: one.newest, key: data.key })
        if (error) for (conflicts++; one.newest < id;) await sleep(5)
        else {
          published++
          take(one, { id, type: 'edit', data })
        }
        await sleep(error ? Math.random() * 40 : 180)
        while (Date.now() < one.holdUntil) await sleep(5)
      }
    })
    const wrote = await pages[1].evaluate(async ms => {
      performance.setResourceTimingBufferSize(10e3)
      const input = document.querySelector('#text'), wrote = {}
      for (let n = 0, end = Date.now() + ms; Date.now() < end; n++) {
        const c = String.fromCharCode(0x4e00 + n)
        wrote[c] = Date.now()
        input.setRangeText(c, input.selectionStart, input.selectionEnd, 'end')
        input.dispatchEvent(new InputEvent('input', { inputType: 'insertText' }))
        await new Promise(done => setTimeout(done, 60 + Math.random() * 80))
      }
      return wrote
    }, 6e3)
    await Promise.all(writing)
    const text = await settled(relay, 'ten', ...pages)
    stop.abort()
    await listening
    for (const { replica } of others) assert.equal(replica.text, text)
    for (const c in wrote) assert.equal(text.split(c).length, 2)
    await write(pages[1], '.', 0, 0)
    const at = await seen, delays = Object.entries(wrote).map(([c, time]) => at[c] - time).sort((a, b) => a - b)
    const most = await pages[1].evaluate(() => {
      const times = performance.getEntriesByType('resource').filter(({ initiatorType, name }) => initiatorType === 'fetch' && /rooms/.test(name)).map(({ startTime }) => startTime)
      return Math.max(...times.map(time => times.filter(other => other >= time && other < time + 1000).length))
    })
    const percent = p => delays[Math.floor(delays.length * p / 100)]
    t.diagnostic(`${published} edits, ${conflicts} conflicts; requests in a second at most: ${most}; seen after ${percent(50)} ms (median), ${percent(95)} ms (95th percentile), ${delays.at(-1)} ms (all)`)
    assert.ok(most < 10, `${most} requests in a second`)
    clean(...pages)
  })

  if (name === 'chromium') test('a word is composed while others write: it is not disturbed, and all is there', limit, async () => {
    const [ada, bob] = await both('ime')
    await write(bob, 'before after', undefined, 0)
    await settled(relay, 'ime', ada, bob)
    await ada.bringToFront()
    await ada.focus('#text')
    await ada.evaluate(() => {
      const input = document.querySelector('#text')
      input.setSelectionRange(7, 7)
      window.ends = 0
      input.addEventListener('compositionend', () => window.ends++)
    })
    const cdp = await ada.createCDPSession()
    await cdp.send('Emulation.setFocusEmulationEnabled', { enabled: true })
    const compose = text => cdp.send('Input.imeSetComposition', { text, selectionStart: text.length, selectionEnd: text.length })
    for (const text of ['n', 'に', 'にh', 'にほ', 'にほn', 'にほん']) {
      await compose(text)
      await write(bob, text.length + '', 0, 0)
      await sleep(150)
    }
    await sleep(300)
    assert.equal(await ada.evaluate(() => window.ends), 0, 'it is still being composed')
    assert.equal(await value(ada), 'before にほんafter')
    await cdp.send('Input.insertText', { text: '日本' })
    const text = await settled(relay, 'ime', ada, bob)
    assert.equal(text.replace(/^\d+/, ''), 'before 日本after')
    assert.deepEqual(await ada.evaluate(() => [window.ends, document.querySelector('#text').selectionStart]), [1, text.indexOf('after')])
    await press(ada, '#undo')
    assert.equal((await settled(relay, 'ime', ada, bob)).replace(/^\d+/, ''), 'before after')
    clean(ada, bob)
  })

  if (name === 'chromium') test('axe finds nothing, in both schemes and on a phone; screenshots', limit, async () => {
    const axe = readFileSync(createRequire(import.meta.url).resolve('axe-core/axe.min.js'), 'utf8')
    const [ada, bob] = await both('pictures')
    const words = 'The pad\n\nEverybody who has the address of this page writes the same text. Who was faster is decided by the relay; whoever was slower moves their edit over the other one.\n\n  - a list\n  - with a second line, and \u{1F389}\n\nשלום לכולם\n\nThe end.'
    await write(ada, words, undefined, 0)
    await settled(relay, 'pictures', ada, bob)
    await write(bob, ' Bob', 'with a second', 0)
    await write(ada, ' Ada', 'over the other', 0)
    const carol = await openPad(await browser.createBrowserContext(), relay.url, 'pictures', 'carol')
    await carol.evaluate(() => {
      document.querySelector('#text').focus()
      document.querySelector('#text').setSelectionRange(20, 60)
    })
    await settled(relay, 'pictures', ada, bob, carol)
    await ada.bringToFront()
    await ada.evaluate(axe)
    await until('both carets', () => ada.evaluate(() => document.querySelectorAll('.peer .caret').length === 2 && !!document.querySelector('.chosen')))
    const shots = join(tmpdir(), 'cometes-shots')
    mkdirSync(shots, { recursive: true })
    const session = await ada.createCDPSession()
    for (const [name, scheme, size] of [['light', 'light', [1100, 800]], ['dark', 'dark', [1100, 800]], ['phone', 'light', [360, 740]], ['phone-dark', 'dark', [360, 740]]]) {
      await ada.setViewport({ width: size[0], height: size[1] })
      await session.send('Emulation.setEmulatedMedia', { features: [{ name: 'prefers-color-scheme', value: scheme }, { name: 'prefers-reduced-motion', value: 'reduce' }] })
      await sleep(300)
      await ada.screenshot({ path: join(shots, `pad-${name}.png`) })
      const { violations } = await ada.evaluate(() => window.axe.run())
      assert.deepEqual(violations.map(({ id, nodes }) => `${name}: ${id} ${nodes.map(({ target, any }) => target + ' ' + any[0]?.message)}`), [])
      assert.ok(await ada.evaluate(() => document.documentElement.scrollWidth <= innerWidth), name + ': no horizontal scrolling')
    }
    const at = await ada.evaluate(() => { // the caret is where the character is
      const { value } = document.querySelector('#text'), range = document.createRange(), node = document.querySelector('#mirror').firstChild
      range.setStart(node, value.indexOf(' Bob') + 4)
      range.setEnd(node, value.indexOf(' Bob') + 5)
      const caret = [...document.querySelectorAll('.peer .caret')].find(el => el.textContent === 'bob').getBoundingClientRect(), place = range.getBoundingClientRect()
      const [mirror, input] = ['mirror', 'text'].map(id => document.getElementById(id))
      return [Math.abs(caret.left - place.left) < 3 && Math.abs(caret.top - place.top) < 3, mirror.offsetWidth - input.offsetWidth, mirror.offsetHeight - input.offsetHeight, input.scrollHeight - input.clientHeight]
    })
    assert.deepEqual(at, [true, 0, 0, 0])
    clean(ada, bob, carol)
  })
})))
