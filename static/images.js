/** images.js: pictures that people paste or drop into the chat, made small enough for one event. */

const TYPES = /^image\/(png|jpeg|gif|webp)$/ // which the relay takes too; SVG may hold scripts

/** Whether an event is a picture that can be shown. */
export const isPicture = ({ type, data }) => type === 'image' && /^data:image\/(png|jpeg|gif|webp);base64,[A-Za-z0-9+/=]+$/.test(data)

/** The image files of a paste or a drop. */
export const imagesOf = transfer => [...transfer?.files ?? []].filter(({ type }) => type.startsWith('image/'))

/** Returns a file as a data: URL, scaled down until it has at most so many bytes. A small file stays as it is, and may move. */
export async function toDataURL(file, limit = 45e3) {
  let blob = file
  if (!TYPES.test(file.type) || file.size > limit) {
    const bitmap = await createImageBitmap(file), canvas = document.createElement('canvas'), pen = canvas.getContext('2d')
    let scale = Math.min(1, 1280 / Math.max(bitmap.width, bitmap.height)), quality = 0.8
    do {
      canvas.width = Math.max(1, bitmap.width * scale)
      canvas.height = Math.max(1, bitmap.height * scale)
      pen.fillStyle = '#fff' // JPEG has no transparency
      pen.fillRect(0, 0, canvas.width, canvas.height)
      pen.drawImage(bitmap, 0, 0, canvas.width, canvas.height)
      blob = await new Promise(done => canvas.toBlob(done, 'image/jpeg', quality))
      quality > 0.5 ? quality -= 0.1 : scale *= 0.8
    } while (blob.size > limit)
    bitmap.close()
  }
  return new Promise((resolve, reject) => {
    const reader = Object.assign(new FileReader, { onload: () => resolve(reader.result), onerror: () => reject(reader.error) })
    reader.readAsDataURL(blob)
  })
}
