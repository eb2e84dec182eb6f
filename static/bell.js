// The service worker of the chat: phones show notifications only by one. It does nothing else, and keeps nothing.

addEventListener('notificationclick', e => {
  e.notification.close()
  e.waitUntil((async () => {
    const all = await clients.matchAll({ type: 'window', includeUncontrolled: true }), url = e.notification.data
    const page = all.find(page => page.url === url)
    return page ? page.focus() : clients.openWindow(url)
  })())
})
