// The microphone.

const REFUSED = {
  NotAllowedError: "the microphone was not allowed; allow it for this page in the browser, or choose a file",
  NotFoundError: "no microphone was found; connect one, or choose a file",
  NotReadableError: "the microphone cannot be used; perhaps another program has it",
};

/** Begin to record; throws an error in words. */
export async function startRecording() {
  if (!navigator.mediaDevices?.getUserMedia) {
    throw new Error("browsers give the microphone only to pages at https or at localhost; choose a file instead");
  }
  // as it is: what is meant to make calls clear removes other sounds
  const audio = { echoCancellation: false, noiseSuppression: false, autoGainControl: false };
  let stream;
  try {
    stream = await navigator.mediaDevices.getUserMedia({ audio });
  } catch (error) {
    throw new Error(REFUSED[error.name] ?? `the microphone cannot be used (${error.name}); choose a file`);
  }
  const context = new AudioContext();
  try {
    await context.audioWorklet.addModule("/page/recorder.js");
    return new Recording(stream, context);
  } catch {
    stream.getTracks().forEach((track) => track.stop());
    await context.close();
    throw new Error("this browser cannot record here; choose a file instead");
  }
}

class Recording {
  constructor(stream, context) {
    this.stream = stream;
    this.context = context;
    this.rate = context.sampleRate;
    this.blocks = [];
    this.length = 0;
    this.node = new AudioWorkletNode(context, "recorder");
    this.ended = new Promise((resolve) => {
      this.node.port.onmessage = ({ data }) => {
        if (data === null) return resolve();
        this.blocks.push(data);
        this.length += data.length;
      };
    });
    context.createMediaStreamSource(stream).connect(this.node).connect(context.destination); // silence comes out
    context.resume();
  }

  get seconds() {
    return this.length / this.rate;
  }

  /** End, and give the samples. */
  async stop() {
    this.node.port.postMessage("end");
    await this.ended;
    this.stream.getTracks().forEach((track) => track.stop());
    await this.context.close();
    const samples = new Float32Array(this.length);
    let at = 0;
    for (const block of this.blocks) {
      samples.set(block, at);
      at += block.length;
    }
    return samples;
  }
}
