// What is asked about: a clip or a part of it, and what the server keeps of it for each model.

import { ApiError, postJson } from "./api.js";
import { inBytes } from "./dom.js";
import { toBase64, toWav } from "./sound.js";

const OTHER_BYTES = 2000; // of a request beside the sound

export class Excerpt {
  /** `limit`: most bytes of a request. */
  constructor(clip, from, to, whole, limit) {
    Object.assign(this, { clip, from, to, whole, limit });
    this.kept = new Map(); // model -> handle, tokens, bytes, milliseconds, number of questions
  }

  is(clip, from, to, whole) {
    return this.clip === clip && this.whole === whole && (whole || (this.from === from && this.to === to));
  }

  /** In words. */
  get label() {
    return this.whole ? this.clip.name : `${this.clip.name}, ${this.from.toFixed(2)} to ${this.to.toFixed(2)} s`;
  }

  get fileName() {
    if (this.whole) return this.clip.name;
    const stem = this.clip.name.replace(/\.[^.]*$/, "");
    return `${stem}-${this.from.toFixed(2)}-${this.to.toFixed(2)}.wav`;
  }

  get format() {
    return (/\.([a-z0-9]{1,8})$/i.exec(this.fileName)?.[1] ?? "").toLowerCase();
  }

  /** Bytes of a file: those of the original, or of a WAV with the part. */
  get file() {
    const { samples, rate, bytes } = this.clip;
    return this.whole ? bytes : toWav(samples.subarray(Math.round(this.from * rate), Math.round(this.to * rate)), rate);
  }

  /** Let the server keep the audio keys and values of a model, once. */
  async index(model, signal) {
    const known = this.kept.get(model);
    if (known) return known;
    try {
      const bytes = this.file;
      if ((4 * bytes.byteLength) / 3 + OTHER_BYTES > this.limit) {
        const most = inBytes((3 * (this.limit - OTHER_BYTES)) / 4);
        throw new ApiError(`the sound has ${inBytes(bytes.byteLength)}, and this server takes ${most}; choose a part of it`, 413);
      }
      const input_audio = { data: await toBase64(bytes), format: this.format };
      const began = performance.now();
      const made = await postJson("/v1/audio/index", { model, input_audio }, signal);
      const ms = performance.now() - began;
      const kept = { id: made.id, tokens: made.audio_tokens, bytes: made.bytes, ms, asked: 0 };
      this.kept.set(model, kept);
      return kept;
    } catch (error) {
      error.aboutSound = error.status !== 401 && error.status < 500 && error.status !== 429 && error.status > 0;
      throw error;
    }
  }

  forget(model) {
    this.kept.delete(model);
  }

  /** Do something with the handle; where the server has dropped it, index again, say so, and do it again. */
  async withHandle(model, signal, work, again) {
    try {
      return await work(await this.index(model, signal));
    } catch (error) {
      if (error.code !== "audio_not_found") throw error;
    }
    this.forget(model);
    const kept = await this.index(model, signal);
    again(kept);
    return work(kept);
  }
}
