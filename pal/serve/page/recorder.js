// Runs in the audio thread: collects mono samples and sends them in blocks.

const BLOCK = 4096;

registerProcessor(
  "recorder",
  class extends AudioWorkletProcessor {
    constructor() {
      super();
      this.block = new Float32Array(BLOCK);
      this.used = 0;
      this.going = true;
      this.port.onmessage = () => {
        this.send();
        this.port.postMessage(null);
        this.going = false;
      };
    }

    send() {
      this.port.postMessage(this.block.slice(0, this.used));
      this.used = 0;
    }

    process([channels]) {
      const length = channels.length ? channels[0].length : 0;
      for (let i = 0; i < length && this.going; i++) {
        let sum = 0;
        for (const channel of channels) sum += channel[i];
        this.block[this.used++] = sum / channels.length;
        if (this.used === BLOCK) this.send();
      }
      return this.going;
    }
  },
);
