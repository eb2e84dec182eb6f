// The camera: frames of a camera, or of a drawn clock, published to a room one by one; and what comes back, in an <img>.

import { $, access, addCopyButton, askForToken, here, insertMarkup, make, quoteForShell, setText, sleep } from './page.js'

insertMarkup()

// The room is in the address. Without one it gets a name that nobody guesses: everybody who knows it can watch.
if (location.hash.length < 2) {
  const name = Array.from(crypto.getRandomValues(new Uint8Array(8)), n => (n % 36).toString(36)).join('')
  history.replaceState(null, '', '#cam-' + name)
}
const room = decodeURIComponent(location.hash.slice(1)), path = 'rooms/' + encodeURIComponent(room)
onhashchange = () => location.reload()

// What this page sends.

const canvas = $('#sent'), pen = canvas.getContext('2d'), video = make('video', { muted: true, playsInline: true })
const sentAt = new Map // by number, of the last frames
const maxSide = 640, minSide = 160
let live // the run that is publishing, or undefined
let number = crypto.getRandomValues(new Uint16Array(1))[0] // of the last frame: another publisher's are not taken for ours
let limit = 60e3 // bytes of a frame; less if the relay says so
let side = maxSide // the longer one, in pixels
let slower = 1 // after 429: so many times the chosen interval
let why = '' // there is a clock and no camera

/** The number is 12 bits and a checksum of 4, as squares along the lower edge. */
const bits = 16, stripe = 8
const withChecksum = n => (n &= 4095) << 4 | ((n >> 8 ^ n >> 4 ^ n ^ 5) & 15)

function drawFrame() {
  const { videoWidth, videoHeight } = video, isVideo = video.srcObject && videoWidth
  const ratio = isVideo ? videoHeight / videoWidth : 3 / 4
  const width = Math.round(ratio > 1 ? side / ratio : side), height = Math.round(width * ratio)
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height })
  isVideo ? pen.drawImage(video, 0, 0, width, height) : drawClock(width, height)
  const code = withChecksum(++number)
  for (let i = 0; i < bits; i++) {
    pen.fillStyle = code >> i & 1 ? '#fff' : '#000'
    pen.fillRect(Math.round(i * width / bits), height - stripe, Math.ceil(width / bits), stripe)
  }
  sentAt.set(number & 4095, performance.now())
  sentAt.delete(number - 200 & 4095)
}

function drawClock(width, height) {
  const now = new Date, tenths = Math.floor(now.getMilliseconds() / 100)
  pen.fillStyle = `hsl(${now.getSeconds() * 6} 45% 22%)`
  pen.fillRect(0, 0, width, height)
  Object.assign(pen, { fillStyle: '#fff', font: `600 ${width / 8}px ui-monospace, monospace`, textAlign: 'center' })
  pen.fillText(`${now.toTimeString().slice(0, 8)}.${tenths}`, width / 2, height / 2)
}

/** Encodes the canvas. If that does not fit, or is small, the next frame has another size. */
async function encode() {
  const blob = await new Promise(done => canvas.toBlob(done, 'image/jpeg', 0.7))
  const fits = blob.size <= limit
  if (!fits) side = Math.max(minSide, side * 0.8)
  else if (blob.size < limit / 3) side = Math.min(maxSide, side * 1.1)
  return fits && blob
}

/** Publishes frames until another run begins, or none. A frame lives ten seconds, and pushes no message out of the history. */
async function publish(run) {
  for (let failures = 0; live === run;) {
    const started = performance.now()
    let pause = 0
    drawFrame()
    const frame = await encode()
    if (frame) {
      const sending = performance.now()
      const response = await fetch(path + '?ttl=10', { method: 'POST', body: frame, headers: { 'Content-Type': 'image/jpeg' } }).catch(() => undefined)
      const { error = 'the relay cannot be reached' } = await response?.json().catch(() => undefined) ?? {}
      if (response?.ok) {
        failures = 0
        slower = Math.max(1, slower * 0.98)
        sent.add(performance.now() - sending)
        $('#size').textContent = `${canvas.width} × ${canvas.height}, ${(frame.size / 1e3).toFixed(1)} KB`
        if (live === run) say(slower > 1.1 ? 'Live, with fewer frames: the relay said that they were too many.' : 'Live.')
      } else if (response?.status === 413 && limit > 2e3) limit = frame.size * 0.8
      else if ([401, 403, 415].includes(response?.status)) stop(error, true)
      else {
        if (response?.status === 429) slower = Math.min(20, slower * 1.5)
        pause = response?.headers.get('Retry-After') * 1e3 || Math.min(8000, 500 * 2 ** failures++)
        if (live === run) say(`Waiting: ${error}.`, true)
      }
    }
    await sleep(Math.max(pause, started + slower * 1e3 / $('#rate').value - performance.now(), 0))
  }
}

async function start() {
  const run = live = {}, facingMode = $('#source').value
  show()
  why = ''
  if (facingMode !== 'clock') try {
    say('Asking for the camera …')
    if (!navigator.mediaDevices) throw new Error('browsers give it only to pages from https: or this machine')
    const stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode, width: { ideal: maxSide } } }), tracks = stream.getTracks()
    if (live !== run) return tracks.forEach(track => track.stop())
    video.srcObject = stream
    tracks[0].onended = () => stop('The camera has ended.', true)
    await video.play()
  } catch (error) {
    why = ` There is no camera (${error.message.replace(/\.$/, '')}), so this is a clock.`
    video.srcObject = null
  }
  publish(run)
}

function stop(words = 'Stopped. Nothing is sent.', wrong) {
  live = undefined
  video.srcObject?.getTracks().forEach(track => track.stop())
  video.srcObject = null
  say(words, wrong)
  show()
}

function say(words, wrong = false) {
  setText($('#state'), words + (live ? why : ''))
  $('#state').classList.toggle('wrong', wrong)
}

function show() {
  $('#start').textContent = live ? 'Stop' : 'Start'
  $('#start').dataset.live = !!live
  $('#source').disabled = !!live
  document.title = `${live ? '● ' : ''}Camera · Cometes`
}

// What comes back.

const image = $('#shown')
const squares = make('canvas', { width: bits, height: 1 }).getContext('2d', { willReadFrequently: true })
let changedAt, last

/** The browser goes on loading by itself, but does not begin again when the stream has ended. */
function watch() {
  changedAt = performance.now()
  image.src = `${path}/multipart?as=image&_=${Math.random()}`
}
image.onerror = () => setTimeout(watch, 2000)
document.onvisibilitychange = () => document.hidden || watch()

/** Reads the number of the frame that is shown, from a bitmap: an <img> drawn on a canvas again may be the old frame. */
async function look() {
  try {
    const bitmap = await createImageBitmap(image), { width, height } = bitmap
    squares.drawImage(bitmap, 0, height - stripe * 0.75, width, stripe / 2, 0, 0, bits, 1)
    bitmap.close()
    const { data } = squares.getImageData(0, 0, bits, 1), key = data.join()
    let code = 0
    for (let i = 0; i < bits; i++) code |= (data[4 * i + 1] > 127) << i
    if (key !== last) {
      const n = code >> 4
      last = key
      changedAt = performance.now()
      if (withChecksum(n) === code && sentAt.has(n)) returned.add(changedAt - sentAt.get(n))
      sentAt.delete(n)
    }
  } catch { } // there is no frame yet
  if (performance.now() - changedAt > (live && sent.recent() ? 5e3 : 30e3)) watch() // the stream may have ended
  setTimeout(() => requestAnimationFrame(look), live ? 0 : 200)
}

// Measuring.

const short = n => n.toLocaleString('en', { maximumSignificantDigits: 2 })
const duration = ms => ms === undefined ? '–' : ms < 1000 ? `${Math.round(ms)} ms` : `${short(ms / 1e3)} s`

/** The last values of something, and how many came in the last seconds. */
class Series {
  #all = []
  add(value) {
    this.#all = [...this.#all.slice(-99), { value, at: performance.now() }]
  }
  recent() { return this.#all.filter(({ at }) => at > performance.now() - 4000).length / 4 }
  quantile(share) {
    const sorted = this.#all.map(({ value }) => value).sort((a, b) => a - b)
    return sorted[Math.ceil(share * sorted.length) - 1]
  }
}
const sent = new Series, returned = new Series

setInterval(() => {
  $('#fps').textContent = short(sent.recent())
  $('#returned').textContent = short(returned.recent())
  $('#publishing').textContent = duration(sent.quantile(0.5))
  $('#median').textContent = duration(returned.quantile(0.5))
  $('#most').textContent = duration(returned.quantile(0.95))
}, 1000)

$('.room').textContent = room
for (const [where, text] of [
  ['This page', location.href],
  ['In your own page', `<img src="${here(path + '/multipart?as=image')}" alt="a camera, live">`],
  ['From a shell', `curl -H 'Content-Type: image/jpeg' -T frame.jpg ${quoteForShell(here(path).href)}`],
]) {
  const code = make('code', '', text)
  $('.share').append(make('li', '', where + ': ', code))
  addCopyButton(code)
}
$('#controls').onsubmit = event => {
  event.preventDefault()
  live ? stop() : start()
}
addEventListener('pagehide', () => live && stop())

const rights = await access(room)
if (rights.refused) askForToken($('#enter'), rights.error, `-read '${room}' -write '${room}'`)
else if (rights.write) say('Nothing is sent yet.')
else {
  $('#start').disabled = true
  say(`Your token does not let you publish to the room ${room}. To use another room, put its name behind the # in the address.`, true)
}
if (rights.read) {
  watch()
  look()
}
canvas.dataset.ready = true
