// Search without a server. A page that is opened from the disk may start no worker; the search then runs in a hidden
// frame, to which this gives what a worker has. MkDocs Material would load such a script from the network.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.body.appendChild(document.createElement("iframe"))
      frame.hidden = true
      this.inside = frame.contentWindow
      this.inside.postMessage = data => this.dispatchEvent(new MessageEvent("message", {data}))
      this.inside.importScripts = () => Promise.reject(new Error("the search of this site is one script"))
      const script = frame.contentDocument.createElement("script")
      script.src = url
      this.loaded = new Promise((done, failed) => Object.assign(script, {onload: done, onerror: failed}))
      frame.contentDocument.body.append(script)
    }

    postMessage(data) {
      this.loaded.then(() => this.inside.dispatchEvent(new MessageEvent("message", {data})))
    }
  }
}
