// The chat under a proxy's prefix, comet.js in a page of another site, and a relay that requires a token. In both browsers.

import assert from 'node:assert/strict'
import { execFile } from 'node:child_process'
import { mkdirSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, before, describe, test } from 'node:test'
import { promisify } from 'node:util'
import { names } from '../static/page.js'
import { missing } from './harm.mjs'
import { binary, browse, browsers, open, prefixed, site, sleep, start, token, until } from './relay.mjs'

const run = promisify(execFile)
const limit = { timeout: 120e3 }
const text = (page, selector) => page.evaluate(selector => document.querySelector(selector)?.textContent, selector)
const opened = page => until('connected', () => page.evaluate(() => document.body.dataset.status === 'open'))
const says = (page, selector, what) => until(`${selector} says ${what}`, async () => what.test(await text(page, selector).catch(() => '')))
const unexpected = page => page.errors.filter(line => !/Failed to load resource|WebSocket connection to|can.t establish a connection/.test(line))
const press = (page, selector) => page.evaluate(selector => document.querySelector(selector).click(), selector)

/** Sends a message in the chat, and waits until it is in the log. */
async function say(page, words) {
  await page.evaluate(words => {
    document.querySelector('#text').value = words
    document.querySelector('#say').requestSubmit()
  }, words)
  await until(words, () => page.evaluate(words => [...document.querySelectorAll('#log .text')].some(el => el.textContent === words), words))
}

const files = { chromium: '/usr/bin/chromium', firefox: '/usr/bin/firefox-esr' }
for (const name of browsers) describe(name, { skip: missing(files[name]) }, () => {
  let browser
  before(async () => browser = await browse(name))
  after(() => browser?.close())

  /** A browser context without cookies and without a stored name. */
  async function fresh(t) {
    const context = await browser.createBrowserContext()
    t.after(() => context.close().catch(() => { }))
    return context
  }

  for (const prefix of ['/relay/', '/my%20relay/', '/a:b/', "/it's(odd);&$HOME/"]) test(`the chat works under the prefix ${prefix}`, limit, async t => {
    const relay = await start('-beat', '2s')
    t.after(() => relay.stop())
    const proxy = await prefixed(relay.port, prefix)
    t.after(() => proxy.stop())
    const page = await open(await fresh(t), proxy.url + '/?room=lobby&user=ada')
    await opened(page)
    for (const via of ['ws', 'sse', 'stream', 'multipart', 'iframe', 'longpoll', 'jsonp', 'poll', 'ws']) {
      await press(page, `#menu [value=${via}]`)
      await until('connected by ' + names[via], async () => await text(page, '#words') === 'connected by ' + names[via])
      await say(page, 'by ' + via)
    }
    const links = await page.evaluate(() => [...document.querySelectorAll('[href], [src], [action]')].map(el => el.href?.baseVal ?? el.href ?? el.src ?? el.action))
    assert.ok(links.length > 8)
    for (const link of links.filter(link => link.startsWith('http'))) {
      assert.ok(link.startsWith(proxy.url + '/'), link)
      const stop = new AbortController(), answer = await fetch(link, { signal: stop.signal })
      assert.equal(answer.status, 200, link)
      stop.abort()
    }
    const source = await (await fetch(proxy.url + '/')).text()
    assert.doesNotMatch(source, /(href|src|action)="\//)

    await page.evaluate(() => {
      document.querySelector('#room').value = 'a:b'
      document.querySelector('#go').requestSubmit()
    })
    await until('in another room', () => page.evaluate(() => document.querySelector('#text').placeholder === 'Write to #a:b'))
    await opened(page)
    assert.equal(page.url(), proxy.url + '/?room=a:b')
    await run('sh', ['-c', await text(page, '#curl')])
    await until('what the command from the page publishes is shown', () => page.evaluate(() => document.querySelector('#log .text')?.textContent === 'hi'))
    await page.reload()
    await opened(page)
    await until('the history', () => page.evaluate(() => document.querySelector('#log .text')?.textContent === 'hi'))
    assert.deepEqual(page.errors, [])
  })

  test('in a page of another site, a path is relative to comet.js; if -origins does not list the site, the error says so', limit, async t => {
    let from
    const foreign = await site('') // started first, since -origins must list its port
    t.after(() => foreign.stop())
    const relay = await start('-origins', foreign.url), strict = await start()
    t.after(() => Promise.all([relay.stop(), strict.stop()]))
    const proxy = await prefixed(relay.port, '/some/where/')
    t.after(() => proxy.stop())
    for (from of [relay.url, proxy.url, strict.url]) for (const via of [undefined, ['ws'], ['sse'], ['longpoll']]) {
      foreign.html = `<!DOCTYPE html><p id="said"></p><p id="error"></p><script type="module">
        import { Comet } from '${from}/comet.js'
        const comet = new Comet('/rooms/lobby', { last: 1, via: ${JSON.stringify(via)} })
        const show = (id, text) => { document.getElementById(id).textContent = text }
        comet.addEventListener('message', e => show('said', e.detail.data))
        comet.addEventListener('status', e => e.detail.error && show('error', e.detail.error.message))
        comet.send('${via} from ${from}')
      </script>`
      const page = await open(browser, foreign.url + '/')
      if (from === strict.url) await says(page, '#error', new RegExp(`likely its -origins does not list ${foreign.url}$`))
      else await until('it is published', async () => await text(page, '#said') === `${via} from ${from}`)
      await page.close()
    }
  })

  describe('behind a token', () => {
    let relay
    before(async () => relay = await start('-secret', 'secret', '-beat', '2s'))
    after(() => relay?.stop())
    const now = () => Math.floor(Date.now() / 1e3)
    const good = claims => token('secret', { exp: now() + 600, ...claims })

    test('the chat asks for a token, and says how to make one and what is wrong with it', limit, async t => {
      const page = await open(await fresh(t), relay.url + '/?room=team')
      await says(page, '#token', /This relay asks for a token/)
      assert.ok(await page.evaluate(() => document.activeElement.name === 'token' || !matchMedia('(hover: hover)').matches))
      assert.match(await text(page, '#token'), /COMETES_SECRET.*cometes token -sub NAME -read team -write team.*Fly\.io.*fly ssh console -C "\/cometes token .*Cloud Run/s)
      assert.doesNotMatch(await text(page, '#token'), /not accepted/)
      assert.ok(await page.evaluate(() => !['naming', 'say', 'scroller'].some(id => document.getElementById(id).getBoundingClientRect().height)), 'no input')
      const give = async token => {
        await until('there is a form', () => page.evaluate(() => !!document.querySelector('#token input')).catch(() => false))
        await page.evaluate(token => {
          const input = document.querySelector('#token input')
          input.value = ` ${token}\n`
          input.form.requestSubmit()
        }, token).catch(() => { }) // Firefox may have left the page already
      }
      for (const [bad, why] of [['nonsense', /Your token was not accepted: the token is no JWT/], [token('other', { sub: 'ada' }), /not signed with this relay's secret/], [good({ sub: 'ada', exp: now() - 5 }), /expired/]]) {
        await give(bad)
        await says(page, '#token', why)
      }
      const command = (await page.evaluate(() => document.querySelector('#token pre').textContent)).replace('COMETES_SECRET=… cometes', `COMETES_SECRET=secret ${binary}`).replace('NAME', "'ada b'")
      await give((await run('sh', ['-c', command])).stdout)
      await until('as ada', async () => await text(page, '#me').catch(() => '') === 'as ada b')
      await opened(page)
      assert.equal(await page.evaluate(() => location.search), '?room=team')
      assert.ok(await page.evaluate(() => document.querySelector('#naming').hidden && document.querySelector('#token').hidden && document.querySelector('#me').disabled))
      await say(page, 'hi')
      assert.equal(await text(page, '#log .head bdi'), 'ada b')
      assert.match(await text(page, '#curl'), /^curl -H "Authorization: Bearer \$TOKEN" -d hi /)

      await press(page, '#another') // opens the form, and closes it again
      await until('the form', () => page.evaluate(() => !document.querySelector('#token').hidden))
      await press(page, '#another')
      assert.ok(await page.evaluate(() => document.querySelector('#token').hidden))
      await page.evaluate(() => { location.hash = 'elsewhere' })
      await says(page, '#log', /Your token does not allow you to read this room\./)
      assert.ok(await page.evaluate(() => document.querySelector('#text').disabled))
      await page.evaluate(() => { location.hash = 'team' })
      await until('back', () => page.evaluate(() => [...document.querySelectorAll('#log .text')].some(el => el.textContent === 'hi')))
      assert.deepEqual(unexpected(page), [])
    })

    test('the chat disables what a token does not allow', limit, async t => {
      const reads = await open(await fresh(t), `${relay.url}/?room=lobby&token=${good({ sub: 'eve', read: ['lobby'] })}`, { redirects: true })
      await until('eve reads', async () => await text(reads, '#me').catch(() => '') === 'as eve')
      await opened(reads)
      assert.equal(await reads.evaluate(() => location.search), '?room=lobby')
      assert.deepEqual(await reads.evaluate(() => { const { disabled, placeholder } = document.querySelector('#text'); return [disabled, placeholder, document.querySelector('#send').disabled] }), [true, 'Your token does not allow you to write here', true])

      const anyone = await open(await fresh(t), `${relay.url}/?room=lobby&token=${good({ read: ['lobby'], write: ['lobby'] })}`, { redirects: true })
      await until('a name is asked for', () => anyone.evaluate(() => document.querySelector('#naming')?.hidden === false).catch(() => false))
      await anyone.evaluate(() => {
        document.querySelector('#name').value = 'bob'
        document.querySelector('#naming').requestSubmit()
      })
      await opened(anyone)
      await say(anyone, 'hi, eve')
      await until('eve reads it', () => reads.evaluate(() => document.querySelector('#log .text')?.textContent === 'hi, eve'))

      const writes = await open(await fresh(t), `${relay.url}/?room=lobby&token=${good({ sub: 'mallory', write: ['lobby'] })}`, { redirects: true })
      await says(writes, '#log', /does not allow you to read/)
      await writes.evaluate(() => {
        document.querySelector('#text').value = 'not shown to the sender'
        document.querySelector('#say').requestSubmit()
      })
      await until('it is published', () => reads.evaluate(() => [...document.querySelectorAll('#log .text')].at(-1)?.textContent === 'not shown to the sender'))
      assert.deepEqual([reads, anyone, writes].flatMap(unexpected), [])
    })

    test('when a token expires the chat asks for another, and keeps the input', limit, async t => {
      const page = await open(await fresh(t), `${relay.url}/?room=lobby&token=${good({ sub: 'ada', read: ['lobby'], write: ['lobby'], exp: now() + 6 })}`, { redirects: true })
      await until('as ada', async () => await text(page, '#me').catch(() => '') === 'as ada')
      await opened(page)
      await page.evaluate(() => { document.querySelector('#text').value = 'not yet sent' })
      await says(page, '#token', /not accepted: it has expired/)
      const next = good({ sub: 'ada', read: ['lobby'], write: ['lobby'] })
      await page.evaluate(token => {
        document.querySelector('#token input').value = token
        document.querySelector('#token form').requestSubmit()
      }, next).catch(() => { })
      await until('it is still there', () => page.evaluate(() => document.body.dataset.status === 'open' && document.querySelector('#text').value === 'not yet sent').catch(() => false))
      assert.deepEqual(unexpected(page), [])
    })

    if (name === 'chromium') test('screenshots', limit, async t => {
      const shots = join(tmpdir(), 'cometes-shots')
      mkdirSync(shots, { recursive: true })
      const page = await open(await fresh(t), relay.url + '/?room=team&token=bad')
      await says(page, '#token', /not accepted/)
      for (const [name, scheme, width] of [['token', 'light', 1100], ['token-dark', 'dark', 1100], ['token-phone', 'light', 360]]) {
        await page.setViewport({ width, height: 780 })
        await page.emulateMediaFeatures([{ name: 'prefers-color-scheme', value: scheme }])
        await sleep(200)
        await page.screenshot({ path: join(shots, name + '.png') })
        assert.ok(await page.evaluate(() => document.documentElement.scrollWidth <= innerWidth), name + ': no horizontal scrolling')
      }
    })
  })
})
