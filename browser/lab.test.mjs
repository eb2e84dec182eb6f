// The lab and the live graphs, in both browsers: every technique delivers every event, once and in order, through lost
// connections; the counts are right; the source code is shown; graphs and pictures change; and no console reports an error.

import assert from 'node:assert/strict'
import { readFileSync } from 'node:fs'
import { execFile } from 'node:child_process'
import { after, afterEach, before, describe, test } from 'node:test'
import { promisify } from 'node:util'
import { goCode, jsCode } from '../static/code.js'
import { names, years } from '../static/page.js'
import { browse, browsers, clumsy, open, prefixed, secure, sleep, start, until, wire } from './relay.mjs'

const run = promisify(execFile)
const ten = ['refresh', 'multipart', 'html', 'poll', 'iframe', 'longpoll', 'stream', 'jsonp', 'sse', 'ws']
const once = ten.filter(name => name !== 'refresh' && name !== 'multipart') // a page that refreshes itself repeats messages; server push also has a picture

// The functions that each card shows: in Go, and in JavaScript unless the technique needs none.
const functions = {
  refresh: [['refresh', 'appendPage']],
  multipart: [['multipart', 'multipartOf'], ['multipart', 'readLines']],
  html: [['endlessPage']],
  poll: [['poll', 'pollBody'], ['poll', 'pollLoop']],
  iframe: [['iframe'], ['iframe', 'addFrame']],
  longpoll: [['poll', 'pollBody'], ['longpoll', 'pollLoop']],
  stream: [['ndjson'], ['stream', 'readLines']],
  jsonp: [['jsonp', 'pollBody'], ['jsonp', 'addFrame', 'pollLoop']],
  sse: [['sse'], ['sse']],
  ws: [['frames'], ['ws']],
}
const declaredIn = code => [...code.matchAll(/^(?:func (?:\(.*?\) )?|(?:async )?function |const )?(\w+)(?:\(|: | = )/gm)].map(([, name]) => name)

test('the source code of each technique is found by name, whole and with its comment', () => {
  const source = path => readFileSync(new URL('../' + path, import.meta.url), 'utf8')
  const goSource = source('transports.go'), jsSource = source('static/comet.js')
  for (const name of ten) {
    const [go, js] = functions[name], goShown = goCode(goSource, name), jsShown = jsCode(jsSource, name)
    assert.deepEqual(declaredIn(goShown), go, name)
    assert.deepEqual(jsShown && declaredIn(jsShown), js, name)
    assert.match(goShown, new RegExp(`^\\{name: "${name}", .*\\},\n\n// ${go[0] === 'frames' ? 'ws' : '\\w+'}\\b[^]*\n\\}$`), name)
    assert.equal(goShown.split(/^\}$/m).length - 1, go.length, `${name}: each function has its end`)
    if (js) assert.match(jsShown, /^\/\/ [^]*[}),]$/, name)
    for (const part of goShown.split('\n\n')) assert.ok(goSource.includes(part), `${name}: ${part} is in the file`)
    assert.ok(goShown.split('\n').length < 70 && (jsShown ?? '').split('\n').length < 50, `${name}: short`)
  }
})

test('each technique has one name and one year, on the pages and in the README', () => {
  const readme = readFileSync(new URL('../README.md', import.meta.url), 'utf8')
  assert.deepEqual(Object.keys(names), ten)
  for (const name of ten) assert.ok(readme.includes(`\n**${name}**: ${names[name]}${years[name] && `, ${years[name]}`}.`), `${name}: ${names[name]}, ${years[name]}`)
})

test('source code that is not there is an error', () => {
  assert.throws(() => goCode('func other() {\n}\n', 'sse'), /not found in the source/)
  assert.throws(() => goCode('\t{name: "sse", mode: streaming, encoder: gone},\n', 'sse'), /not found in the source/)
  assert.throws(() => jsCode('const other = 1\n', 'sse'), /not found in the source/)
})

let relay
before(async () => relay = await start('-beat', '2s'))
after(() => relay?.stop())

const cards = page => page.evaluate(() => Object.fromEntries([...document.querySelectorAll('.card')].map(card => [card.id, { ...card.dataset }])))
const textOf = (page, selector) => page.evaluate(selector => document.querySelector(selector).textContent, selector)
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

/** Waits until every technique delivered so many events, each once and in order. */
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

/** The relay's counters. */
async function metrics() {
  const text = await (await fetch(relay.url + '/metrics')).text()
  const one = (name, technique) => +new RegExp(`^cometes_${name}${technique ? `\\{technique="${technique}"\\}` : ''} (\\S+)$`, 'm').exec(text)[1]
  return { published: one('published_total'), delivered: name => one('delivered_total', name), requests: name => one('requests_total', name) }
}

/** Resets the counts, and waits until the page shows it. */
async function reset(page) {
  await press(page, '#reset')
  await until('nothing is counted', async () => Object.values(await cards(page)).every(card => card.delivered === '0'))
}

async function burst(page, count) {
  await set(page, '#many', count)
  await press(page, '#burst')
}

/** Runs one of the five experiments. */
async function experiment(page, label) {
  const item = await page.evaluateHandle(label => [...document.querySelectorAll('#experiments li')].find(li => li.firstChild.textContent === label), label)
  const state = () => item.evaluate(li => li.querySelector('small').textContent)
  assert.equal(await item.evaluate(li => { li.querySelector('button').click(); return li.querySelector('small').textContent }), ' running…')
  await until(label, async () => /done/.test(await state()))
}

/** Every series is seen on its ground: at least 3:1, in this scheme. */
async function seriesContrast(page) {
  const colours = await page.evaluate(() => {
    const paper = document.createElement('canvas').getContext('2d', { willReadFrequently: true })
    const rgb = colour => {
      paper.fillStyle = colour
      paper.fillRect(0, 0, 1, 1)
      return [...paper.getImageData(0, 0, 1, 1).data].slice(0, 3)
    }
    const ground = rgb(getComputedStyle(document.querySelector('.graph')).backgroundColor)
    return { ground, series: [...document.querySelectorAll('#relay .graph:first-child .legend li')].map(li => rgb(getComputedStyle(li, '::before').backgroundColor)) }
  })
  const light = rgb => rgb.map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4).reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0)
  assert.equal(colours.series.length, 10)
  for (const series of colours.series) {
    const [x, y] = [light(series), light(colours.ground)].sort((a, b) => b - a)
    assert.ok((x + 0.05) / (y + 0.05) >= 3, `${series} on ${colours.ground}`)
  }
}

for (const name of browsers) describe(name, () => {
  let browser
  before(async () => browser = await browse(name))
  afterEach(async () => { for (const page of await browser.pages()) if (page.url() !== 'about:blank') await page.close() })
  after(() => browser?.close())

  test('the lab: 200 events by every technique, each once and in order, through lost connections', async t => {
    const net = await wire(relay.port)
    t.after(() => net.stop())
    const page = await lab(browser, net.url)
    assert.match(await textOf(page, '#held'), /^No\. With all techniques that stream/)
    assert.match(await textOf(page, '#choice'), /^WebSocket,/)
    assert.match(await textOf(page, '#limit'), /2 had to wait/)
    const open = Object.entries(await cards(page)).filter(([, card]) => card.state !== 'open')
    assert.deepEqual(open, [], 'all ten at once')
    await set(page, '#every', 1)
    await all(page, 10) // published by the test of the network

    await press(page, '#reset')
    await sleep(1500)
    const from = await metrics()
    await burst(page, 40)
    await all(page, 40)
    const to = await metrics()
    assert.equal(to.published - from.published, 40)
    for (const name of once) assert.equal(to.delivered(name) - from.delivered(name), 40, `the relay's count of ${name}`)
    assert.deepEqual(page.errors, [])

    // What somebody else publishes has no number, but a dot on the timeline.
    const dots = () => page.evaluate(() => { // pixels of the dots' colour, which are more than two high
      const canvas = document.querySelector('#board [data-technique=ws] canvas'), { width, height } = canvas
      const { data } = canvas.getContext('2d').getImageData(Math.floor(width * 0.8), Math.floor(height / 2) - 2, width * 0.2, 1) // the last three seconds
      return data.filter((v, i) => i % 4 === 3 && v > 0).length
    })
    await until('no dot for 3 s', async () => await dots() === 0, 10e3)
    await fetch(`${relay.url}/rooms/${await page.evaluate(() => /lab-\w+/.exec(document.querySelector('#room').textContent)[0])}`, { method: 'POST', body: 'hi' })
    await until('a dot', dots, 5e3)
    await page.setViewport({ width: 640, height: 900 })
    const cells = await page.evaluate(() => [...document.querySelector('#board [data-technique=sse]').cells].filter(cell => cell.checkVisibility() && cell.getBoundingClientRect().right <= innerWidth).length)
    assert.equal(cells, 8, 'all columns, on a narrow screen too')
    await page.setViewport({ width: 1280, height: 1000 })

    await burst(page, 30)
    await press(page, '#cut')
    await burst(page, 10)
    await all(page, 80)
    const events = await page.evaluate(() => document.querySelector('#sse .events').textContent)
    assert.match(events, /caught up|#80/)
    for (let i = 0; i < 3; i++) {
      await burst(page, 30)
      await sleep(i * 100)
      net.cut() // without any notice
      await all(page, 80 + 30 * (i + 1))
    }
    await experiment(page, 'Cut all in the middle of a burst')
    await all(page, 40)
  })

  test('the lab: more streams than connections take turns, and lose nothing', async () => {
    const page = await lab(browser, relay.url)
    await set(page, '#every', 1)
    await all(page, 10) // published by the test of the network
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

  test('the lab: six more connections wait, and short requests with them, and then go on', async () => {
    const page = await lab(browser, relay.url)
    await set(page, '#every', 1)
    await all(page, 10) // published by the test of the network
    await reset(page)
    await experiment(page, 'Open six more: who waits?') // publishes 20
    await until('some wait', async () => /waits, [2-9]\.\d s/.test(await textOf(page, '#extra')))
    await all(page, 20, ['sse', 'ws', 'stream', 'longpoll', 'poll', 'iframe', 'html', 'multipart'])
    await press(page, '#more')
    await all(page, 20)
    assert.deepEqual(page.errors, [])
  })

  test('the lab: each technique can be cut, paused and started, and its bytes are shown', async () => {
    const page = await lab(browser, relay.url)
    await set(page, '#every', 1)
    await all(page, 10) // published by the test of the network
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
    const bytes = Object.fromEntries(await Promise.all(ten.map(async name => [name, await textOf(page, `#${name} .out`) + '\n' + await textOf(page, `#${name} .in`)])))
    for (const name of ten) {
      assert.match(bytes[name], new RegExp(`^GET /rooms/lab-\\w{4}/${name}\\?\\S+ HTTP/1.1\nHost: `), name)
      assert.match(bytes[name], /\nHTTP\/1.1 (200 OK|101 Switching Protocols)\n/, name)
    }
    assert.match(bytes.ws, /\[81 7e 0\d [0-9a-f]{2}\] \{"id":/)
    assert.match(bytes.sse, /\ndata: \{"id":.*\nid: \d+\n\n/)
    assert.match(bytes.jsonp, /\n\/\*\*\/lab_\w+\(\{"cursor":/)
    assert.match(bytes.multipart, /content-type: multipart\/x-mixed-replace; boundary=/)
    assert.match(await textOf(page, '#multipart .shownas'), name === 'firefox' ? /for whole pages/ : /for pictures, but not for pages/)

    await experiment(page, 'Stay away longer than the history')
    await until('what is lost is told', async () => /1 gaps reported/.test(await textOf(page, '#ws .check')) && /1 gaps reported/.test(await textOf(page, '#sse .check')))
    await experiment(page, 'Ask only every ten seconds')
    assert.deepEqual(await page.evaluate(() => [document.querySelector('#every').value, document.querySelector('#rate').value, document.querySelector('#steady').ariaPressed]), ['10', '1', 'true'])
    await experiment(page, 'Publish one a minute')
    assert.deepEqual(await page.evaluate(() => [document.querySelector('#every').value, document.querySelector('#rate').value, document.querySelector('#steady').ariaPressed]), ['2', '0.0167', 'true'])
    assert.deepEqual(page.errors, [])
  })

  test('the lab: each card shows the source code of its technique', async t => {
    const file = await fetch(relay.url + '/transports.go')
    assert.equal(file.headers.get('Content-Type'), 'text/plain; charset=utf-8')
    assert.equal((await fetch(relay.url + '/transports.go', { headers: { 'If-None-Match': file.headers.get('ETag') } })).status, 304)
    const net = await prefixed(relay.port, '/a/b/')
    t.after(() => net.stop())
    const page = await open(browser, net.url + '/lab.html')
    await until('the cards are there', () => page.evaluate(() => document.querySelectorAll('.card').length === 10))
    const loaded = () => page.evaluate(() => performance.getEntriesByType('resource').map(({ name }) => name).filter(name => /\/transports\.go$/.test(name)))
    assert.deepEqual(await loaded(), [], 'not loaded yet')
    await page.focus('#sse .code summary')
    await page.keyboard.press('Enter')
    await until('the keyboard opens it', () => page.evaluate(() => document.querySelector('#sse .code').open))
    await page.evaluate(() => document.querySelectorAll('.code').forEach(details => details.open = true))
    for (const technique of ten) {
      const [go, js] = functions[technique]
      const shown = await until(`the code of ${technique}`, () => page.evaluate(technique => {
        const parts = [...document.querySelectorAll(`#${technique} .code section`)]
        const [go, js] = parts.map(part => part.innerText)
        return parts.every(part => part.querySelector('code').textContent || /without a script/.test(part.innerText)) && { go, js, links: parts.map(part => part.querySelector('a').href) }
      }, technique))
      assert.deepEqual(shown.links, [net.url + '/transports.go', net.url + '/source/comet.js'])
      for (const name of go) assert.match(shown.go, new RegExp(`^func (\\(.*\\) )?${name}\\(`, 'm'), technique)
      for (const name of js ?? []) assert.match(shown.js, new RegExp(`^(const |function )?${name}\\b`, 'm'), technique)
      if (!js) assert.match(shown.js, /No function: the browser loads/)
    }
    const elements = await page.evaluate(() => document.querySelectorAll('.code code *').length)
    assert.equal(elements, 0, 'plain text')
    assert.deepEqual(await loaded(), [net.url + '/transports.go'], 'loaded once')
    assert.deepEqual(page.errors, [])
  })

  test('the lab: a proxy that buffers is detected', async t => {
    const net = await clumsy(relay.port, 1100)
    t.after(() => net.stop())
    const page = await lab(browser, net.url)
    assert.match(await textOf(page, '#held'), /^Yes: .*Streaming, Server-sent events\. .*Not with WebSocket/)
    assert.deepEqual(page.errors, [])
  })

  test('the lab asks the relay as another site: refused, or answered if -origins lists it', async t => {
    const listed = await start('-origins', '*')
    t.after(() => listed.stop())
    for (const [{ url }, works] of [[relay, false], [listed, true]]) {
      const page = await open(browser, url + '/lab.html')
      await until('the cards are there', () => page.evaluate(() => document.querySelectorAll('.card').length === 10))
      await press(page, '#ask')
      const said = await until('all three are asked', () => page.evaluate(() => {
        const all = [...document.querySelectorAll('#crossed p')].map(p => p.textContent)
        return all.length === 3 && all.every(Boolean) && all
      }))
      for (const line of said) assert.match(line, works ? /^Works: / : /^Refused: /)
      const other = url.replace('127.0.0.1', 'localhost')
      assert.equal(await textOf(page, '#asked'), works ? `${other} lets pages of ${url} read.` : `${other} does not let pages of ${url} read. Start the relay with -origins ${url}, and it will.`)
      if (works) assert.equal(await page.evaluate(() => document.querySelector('#crossed img').naturalWidth), 320)
      await page.close()
    }
  })

  test('the inspector: any rooms, any technique, any cursor; publishes with type, ttl, key and if; each as curl', async () => {
    const a = `one-${name}`, b = `two-${name}`
    const publish = (room, data) => fetch(`${relay.url}/rooms/${room}`, { method: 'POST', body: data }).then(answer => answer.json())
    const { id } = await publish(a, 'before')
    await publish(b, 'both')
    const page = await open(browser, `${relay.url}/inspect.html?room=${a},${b}&last=5`)
    await until('it is ready', () => textOf(page, '#readcurl').catch(() => ''))
    const lines = () => page.evaluate(() => [...document.querySelectorAll('#events code')].map(code => code.textContent))
    const set = (selector, value) => page.evaluate((selector, value) => {
      document.querySelector(selector).value = value
      document.querySelector(selector).dispatchEvent(new Event('input', { bubbles: true }))
    }, selector, value)
    for (const via of ten) {
      await set('#via', via)
      await press(page, '#read .first')
      await until(`both by ${via}`, async () => { const all = (await lines()).join('\n'); return /before/.test(all) && /both/.test(all) })
      assert.match(await textOf(page, '#state'), /^2 rooms on one connection, by /)
      await press(page, '#clear')
    }
    assert.deepEqual(await page.evaluate(() => Object.fromEntries(new URLSearchParams(location.search))), { room: `${a},${b}`, via: 'ws', last: '5' })

    await set('#via', 'sse')
    await set('#from', 'after')
    await set('#n', String(id))
    await press(page, '#read .first')
    await until('what is after the cursor', async () => /"data":"both"/.test((await lines())[0]))
    assert.ok(!(await lines()).some(line => /before/.test(line)))
    const fields = { '#to': b, '#user': 'ada', '#type': 'note', '#ttl': '60', '#key': 'k1', '#data': '{"n": 1}' }
    for (const selector in fields) await set(selector, fields[selector])
    await page.evaluate(() => { document.querySelector('#json').click() })
    await press(page, '#publish .first')
    await until('published', async () => /^201 \{"id":\d+\}$/.test(await textOf(page, '#answer')))
    const event = await until('it comes, as it is', async () => (await lines()).find(line => /"type":"note"/.test(line)))
    assert.match(event, new RegExp(`^\\{"id":\\d+,"room":"${b}","type":"note","from":"ada","time":\\d+,"data":\\{"n":1\\}\\}$`))
    await set('#ttl', '')
    await set('#key', '')
    await set('#if', '7')
    await press(page, '#publish .first')
    await until('if was wrong', async () => /^412 .*"id":\d+/.test(await textOf(page, '#answer')))
    await set('#if', JSON.parse((await textOf(page, '#answer')).slice(4)).id)
    await set('#data', `{"it's": "$HOME"}`)
    await run('sh', ['-c', await textOf(page, '#publishcurl')])
    await until('what the command publishes', async () => (await lines()).some(line => line.endsWith(`"data":{"it's":"$HOME"}}`)))
    const { stdout } = await run('sh', ['-c', `${(await textOf(page, '#readcurl')).replace('curl', 'curl -s --max-time 1')} || true`])
    assert.match(stdout, /"data":"both"/)

    const held = async () => [...(await (await fetch(relay.url + '/metrics')).text()).matchAll(/^cometes_connections\{.*\} (\d+)$/mg)].reduce((sum, [, n]) => sum + +n, 0)
    await press(page, '#three')
    await until('three rooms', async () => /^a 2 · b 2 · c 2 · cursor \d+$/.test(await textOf(page, '#counts')))
    assert.equal(await textOf(page, '#state'), '3 rooms on one connection, by server-sent events.')
    assert.equal(await held(), 1)
    await until('the count is beside it', async () => await textOf(page, '#held') === 'The relay holds 1 in all.')
    await press(page, '#close')
    await until('none is held', async () => await held() === 0)
    assert.deepEqual(page.errors.filter(error => !/412/.test(error)), [])
  })

  test('the lab over HTTP/2: no request waits', async t => {
    const net = await secure(relay.port)
    t.after(() => net.stop())
    const page = await lab(browser, net.url)
    assert.match(await textOf(page, '#limit'), /^HTTP\/2: .* none had to wait/)
    await set(page, '#every', 1)
    await press(page, '#reset')
    await press(page, '#more')
    await until('all six are open', async () => !/waits, /.test(await textOf(page, '#extra')))
    await burst(page, 20)
    await all(page, 20)
    const states = Object.values(await cards(page)).map(card => card.state)
    assert.deepEqual(states, ten.map(() => 'open'))
    assert.deepEqual(page.errors, [])
  })

  test('the graphs move, and show their values', async () => {
    const page = await open(browser, relay.url + '/stats.html?room=heat-' + name)
    const feed = data => fetch(`${relay.url}/rooms/heat-${name}`, { method: 'POST', body: data })
    const curve = () => page.evaluate(() => document.querySelectorAll('#relay .graph')[1]?.querySelector('.curve')?.getAttribute('d'))
    const first = await until('a curve', curve)
    assert.equal(await textOf(page, '#numbers .nothing'), 'Nothing yet')
    for (const value of name === 'chromium' ? ['dark', 'light'] : ['light']) {
      if (name === 'chromium') await page.emulateMediaFeatures([{ name: 'prefers-color-scheme', value }])
      await seriesContrast(page)
    }
    for (let i = 0; i < 20; i++) await feed(String(i * i))
    await feed('warm')
    await feed('{}')
    await until('it has moved', async () => await curve() !== first)
    await until('20 numbers', async () => await textOf(page, '#numbers b') === '361')
    assert.match(await textOf(page, '#skipped'), /^2 messages were no numbers/)
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
    const spanShown = () => textOf(page, '#relay .graph svg text[text-anchor=start]')
    assert.match(await spanShown(), /^−[125] min$/)
    await set(page, '#span', '600')
    assert.equal(await spanShown(), '−10 min')
    assert.equal((await fetch(`${relay.url}/rooms/heat-${name}`, { method: 'DELETE' })).status, 204)
    await press(page, '#choose .feedit')
    assert.deepEqual(await page.evaluate(() => [...document.querySelectorAll('.feedit')].map(one => one.textContent)), ['Stop feeding it', 'Stop feeding it'])
    await until('it is fed', async () => (await (await fetch(`${relay.url}/rooms/heat-${name}/poll?last=9`)).json()).events.filter(({ type }) => type === 'message').length >= 2)
    await press(page, '#live ~ .feedit, p .feedit')
    await until('the numbers are shown', async () => /^\d+$/.test(await textOf(page, '#numbers b')))
    assert.match(await textOf(page, '#relay .legend'), /WebSocket [1-9]/)
    assert.deepEqual(page.errors, [])
  })

  test('after an absence the graphs show the unbroken run, not a sliver', async () => {
    const page = await browser.newPage()
    await page.evaluateOnNewDocument(() => { // a relay that was read until five minutes ago, and again for half a minute
      window.WebSocket = class extends EventTarget {
        constructor(url) {
          super()
          const now = Date.now(), lines = [{ type: 'hello', id: 1, data: { beat: 15 } }]
          const data = { techniques: { ws: { connections: 3, delivered: 0, in: 0, out: 0 } }, published: 0, in: 0, dropped: 0, gaps: 0, rooms: 1, users: 0, memory: 1, history: 1, goroutines: 1, uptime: 1 }
          for (let s = 500; s >= 0; s--) if (s > 300 || s < 30) lines.push({ id: lines.length + 1, room: '_stats', type: 'stats', time: now - s * 1e3, data: { ...data, uptime: 600 - s } })
          if (/_stats/.test(url)) setTimeout(() => this.onmessage({ data: lines.map(line => JSON.stringify(line)).join('\n') }))
        }
        close() { }
        send() { }
      }
    })
    page.goto(relay.url + '/stats.html').catch(() => { })
    const path = () => page.evaluate(() => document.querySelector('#relay .area')?.getAttribute('d') ?? '').catch(() => '')
    await until('a run', path)
    const left = async () => +/^M(\S+)/.exec(await path())[1], width = await page.evaluate(() => document.querySelector('#relay svg').clientWidth)
    assert.equal(await textOf(page, '#relay .graph svg text[text-anchor=start]'), '−1 min')
    assert.ok(await left() < width * 0.6, `half a minute of one is half of the graph: from ${await left()} of ${width}`)
    await set(page, '#span', '600')
    assert.equal((await path()).match(/M/g).length, 2, 'both runs, not joined')
  })

  test('the picture changes without JavaScript', async () => {
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
