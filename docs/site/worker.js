"use strict";
// Search in pages that were opened from files: browsers start no worker there, so its script runs in a hidden frame.
if (location.protocol === "file:") {
  window.IFrameWorker = window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      this.waiting = [];
      document.body.append(this.frame);
      const inside = this.frame.contentDocument, script = document.createElement("script");
      this.frame.contentWindow.postMessage = ((send) => (message) => send(message))((message) => {
        this.dispatchEvent(new MessageEvent("message", { data: message }));
      });
      script.src = url;
      script.onload = () => { this.waiting.splice(0).forEach((message) => this.deliver(message)); this.waiting = null; };
      inside.body.append(script);
    }
    deliver(message) { this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data: message })); }
    postMessage(message) { this.waiting ? this.waiting.push(message) : this.deliver(message); }
  };
}
