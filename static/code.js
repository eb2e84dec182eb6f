// The source code of a technique, for the lab: its encoder in transports.go and its function in comet.js. Both are found
// by name in the files that the relay serves.

// Functions that hold an essential part of a technique, and are shown below its own.
const goHelpers = { refresh: ['appendPage'], multipart: ['multipartOf'], poll: ['pollBody'], longpoll: ['pollBody'], jsonp: ['pollBody'] }
const jsHelpers = { multipart: ['readLines'], iframe: ['addFrame'], longpoll: ['pollLoop'], stream: ['readLines'], jsonp: ['addFrame', 'pollLoop'], poll: ['pollLoop'] }

/** Returns the technique's row in the table of transports.go, its encoder, and the encoder's helpers. */
export function goCode(source, technique) {
  const [row, encoder] = new RegExp(`\\{name: "${technique}",.* encoder: (\\w+).*\\},`).exec(source) ?? fail(`the technique ${technique}`)
  const functions = [encoder, ...goHelpers[technique] ?? []].map(name => declaration(source, `func (\\(.+?\\) )?${name}\\(`))
  return [row, ...functions].join('\n\n')
}

/** Returns the technique's function in comet.js and its helpers, or undefined if it needs no script. */
export function jsCode(source, technique) {
  if (technique === 'refresh' || technique === 'html') return
  const entry = declaration(source, `  ${technique}(\\(|: )`).replace(/^ {2}/gm, '')
  const helpers = (jsHelpers[technique] ?? []).map(name => declaration(source, `(export )?(async )?(const|function) ${name}\\b`))
  return [entry, ...helpers].join('\n\n')
}

/**
 * Returns the declaration whose first line matches start, with the comment above it. If that line ends with an opening
 * bracket, the declaration reaches to the closing one below; else as far as lines are indented.
 */
function declaration(source, start) {
  const lines = source.split('\n')
  let first = lines.findIndex(line => new RegExp('^' + start).test(line))
  if (first < 0) fail(start)
  let end = first + 1
  const indent = /^ */.exec(lines[first])[0]
  const last = new RegExp(`^${indent}[)}\\]]`), inside = new RegExp(`^${indent}\\s|^$`)
  if (/[({[]$/.test(lines[first])) end = lines.findIndex((line, i) => i > first && last.test(line)) + 1
  else while (end < lines.length && inside.test(lines[end])) end++
  while (/^ *(\/\/|\/\*\*| \*)/.test(lines[first - 1])) first--
  return lines.slice(first, end).join('\n').trimEnd()
}

function fail(what) {
  throw new Error(`not found in the source: ${what}`)
}

const loads = new Map

/** Loads a file beside this one as text, once; after a failure the next call tries again. */
export function load(file) {
  if (!loads.has(file)) loads.set(file, fetchText(file).catch(error => { loads.delete(file); throw error }))
  return loads.get(file)
}

async function fetchText(file) {
  const response = await fetch(new URL(file, import.meta.url))
  if (!response.ok) throw new Error(`the relay answered ${response.status}`)
  return response.text()
}
