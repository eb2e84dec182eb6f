// The source code of a technique, for the lab: found by name in the files that the relay serves.

// Functions that hold an essential part of a technique, and are shown below its own.
const goHelpers = { refresh: ['appendPage'], multipart: ['multipartOf'], poll: ['pollBody'], longpoll: ['pollBody'], jsonp: ['pollBody'] }
const jsHelpers = { multipart: ['readLines'], iframe: ['addFrame'], longpoll: ['pollLoop'], stream: ['readLines'], jsonp: ['addFrame', 'pollLoop'], poll: ['pollLoop'] }

/** Returns the technique's row in the table of transports.go, its encoder, and the encoder's helpers. */
export function goCode(source, technique) {
  const [row, encoder] = find(source, `\\{name: "${technique}",.* encoder: (\\w+).*\\},`)
  return [row, ...[encoder, ...goHelpers[technique] ?? []].map(name => declaration(source, '', `func (\\(.+?\\) )?${name}\\(`))].join('\n\n')
}

/** Returns the technique's function in comet.js and its helpers, or undefined if it needs no script. */
export function jsCode(source, technique) {
  if (technique === 'refresh' || technique === 'html') return
  const entry = declaration(source, '  ', `${technique}(\\(|: )`).replace(/^ {2}/gm, '')
  return [entry, ...(jsHelpers[technique] ?? []).map(name => declaration(source, '', `(export )?(async )?(const|function) ${name}\\b`))].join('\n\n')
}

/** Returns a line with the comment above it and, if it ends with an opening bracket, all to the closing one below. */
const declaration = (source, indent, start) => find(source, `(^ *(//|/?\\*).*\n)*^${indent}${start}(.*[({[]\n[^]*?\n${indent}[)}\\]].*|.*)`)[0]

function find(source, pattern) {
  const found = new RegExp(pattern, 'm').exec(source)
  if (!found) throw new Error(`not found in the source: ${pattern}`)
  return found
}

const loads = {}

/** Loads a file beside this one as text, once; after a failure the next call tries again. */
export const load = file => loads[file] ??= fetch(new URL(file, import.meta.url)).then(response => {
  if (!response.ok) throw new Error(`the relay answered ${response.status}`)
  return response.text()
}).catch(error => {
  delete loads[file]
  throw error
})
