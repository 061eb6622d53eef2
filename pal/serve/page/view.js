// The clip's waveform and spectrogram, with the part that is asked about.

import { byId, element, fault } from "./dom.js";
import { spectrogram } from "./spectrogram.js";

const SHORTEST = 0.05; // seconds of a part
const two = (seconds) => (Math.round(seconds * 100) / 100).toFixed(2);

export class ClipView {
  /** `changed` is called when another part is chosen. */
  constructor(changed) {
    this.changed = changed;
    this.clip = null;
    this.from = this.to = 0;
    this.player = byId("player");
    byId("from").addEventListener("change", () => this.readFields());
    byId("to").addEventListener("change", () => this.readFields());
    byId("whole").addEventListener("click", () => this.choose(0, this.clip.seconds));
    byId("play").addEventListener("click", () => this.play());
    this.player.addEventListener("play", () => this.follow());
    const stage = byId("stage");
    stage.addEventListener("pointerdown", (event) => this.drag(event));
    new ResizeObserver(() => this.drawWave()).observe(stage);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.drawWave());
  }

  /** Show a clip, whole. */
  async show(clip) {
    this.clip = clip;
    byId("clip").hidden = false;
    byId("clip-name").textContent = clip.name;
    byId("clip-facts").textContent = clip.seconds === null ? "" : `${two(clip.seconds)} s`;
    byId("clip-about").textContent = clip.about ?? "";
    byId("clip-about").hidden = !clip.about;
    byId("drawing").hidden = clip.samples === null;
    this.player.pause();
    if (this.url) URL.revokeObjectURL(this.url);
    this.url = null;
    this.choose(0, clip.seconds ?? 0);
    if (clip.samples === null) return;
    this.url = URL.createObjectURL(new Blob([clip.bytes], { type: clip.type }));
    this.player.src = this.url;
    const marks = [0, 0.25, 0.5, 0.75, 1].map((share) => element("span", {}, `${two(share * clip.seconds)} s`));
    byId("axis").replaceChildren(...marks);
    this.drawWave();
    await this.drawSpectrum();
  }

  /** Ask about the seconds between two places. */
  choose(from, to) {
    this.from = from;
    this.to = to;
    fault("region-error", null, byId("from"));
    fault("region-error", null, byId("to"));
    this.showRegion();
    this.changed();
  }

  get whole() {
    const { clip } = this;
    return clip.samples === null || (this.from <= 0 && this.to >= clip.seconds);
  }

  showRegion() {
    byId("from").value = two(this.from);
    byId("to").value = two(this.to);
    const region = byId("region");
    region.hidden = this.whole;
    region.style.left = `${(100 * this.from) / this.clip.seconds}%`;
    region.style.width = `${(100 * (this.to - this.from)) / this.clip.seconds}%`;
  }

  readFields() {
    const [from, to] = [byId("from"), byId("to")];
    const start = from.valueAsNumber;
    const longest = this.clip.seconds;
    // the fields show hundredths: the last one is the end of the clip, so that nothing is left out
    const end = to.valueAsNumber === Number(two(longest)) ? longest : to.valueAsNumber;
    const limit = `give seconds from 0 to ${two(longest)}`;
    const wrong = (value) => !(value >= 0 && value <= longest);
    fault("region-error", null, from);
    fault("region-error", null, to);
    if (wrong(start)) return fault("region-error", `The beginning is outside of the clip: ${limit}.`, from);
    if (wrong(end)) return fault("region-error", `The end is outside of the clip: ${limit}.`, to);
    if (end - start < SHORTEST) {
      return fault("region-error", `The part ends ${end < start ? "before it begins" : "too soon"}: choose a later end.`, to);
    }
    return this.choose(start, end);
  }

  get valid() {
    return byId("region-error").hidden;
  }

  drag(event) {
    if (event.button !== 0 || this.clip.samples === null) return;
    const stage = byId("stage");
    const box = stage.getBoundingClientRect();
    const at = (x) => Math.max(0, Math.min(1, (x - box.left) / box.width)) * this.clip.seconds;
    const first = at(event.clientX);
    stage.setPointerCapture(event.pointerId);
    const move = ({ clientX }) => {
      [this.from, this.to] = [first, at(clientX)].sort((a, b) => a - b);
      this.showRegion();
    };
    const end = () => {
      stage.removeEventListener("pointermove", move);
      stage.removeEventListener("pointerup", end);
      stage.removeEventListener("pointercancel", end);
      // a click without a drag takes the part away
      if (this.to - this.from < SHORTEST || this.to > this.clip.seconds) this.choose(0, this.clip.seconds);
      else this.choose(this.from, this.to);
    };
    move(event);
    stage.addEventListener("pointermove", move);
    stage.addEventListener("pointerup", end);
    stage.addEventListener("pointercancel", end);
  }

  async play() {
    this.player.currentTime = this.from;
    this.until = this.whole ? null : this.to;
    await this.player.play().catch(() => {});
  }

  /** Move the cursor while the clip plays. */
  follow() {
    const cursor = byId("cursor");
    const step = () => {
      const { currentTime, paused, ended } = this.player;
      if (this.until !== null && currentTime >= this.until) {
        this.player.pause();
        this.until = null;
      }
      cursor.hidden = paused || ended;
      cursor.style.left = `${(100 * currentTime) / this.clip.seconds}%`;
      if (!cursor.hidden) requestAnimationFrame(step);
      else this.until = null;
    };
    requestAnimationFrame(step);
  }

  drawWave() {
    const canvas = byId("wave");
    if (!this.clip?.samples || canvas.clientWidth === 0) return;
    const { samples, seconds, name } = this.clip;
    const scale = window.devicePixelRatio || 1;
    canvas.width = Math.round(canvas.clientWidth * scale);
    canvas.height = Math.round(canvas.clientHeight * scale);
    const context = canvas.getContext("2d");
    context.fillStyle = getComputedStyle(document.documentElement).getPropertyValue("--wave");
    const step = samples.length / canvas.width;
    let loudest = [0, 0];
    for (let x = 0; x < canvas.width; x++) {
      const first = Math.floor(x * step);
      const last = Math.min(samples.length, Math.max(first + 1, Math.floor((x + 1) * step)));
      let [low, high] = [0, 0];
      for (let i = first; i < last; i++) {
        low = Math.min(low, samples[i]);
        high = Math.max(high, samples[i]);
      }
      if (high - low > loudest[0]) loudest = [high - low, (first / samples.length) * seconds];
      const top = ((1 - high) / 2) * canvas.height;
      context.fillRect(x, top, 1, Math.max(scale, ((high - low) / 2) * canvas.height));
    }
    const said = `Waveform of ${name}, ${two(seconds)} seconds; loudest near ${loudest[1].toFixed(1)} seconds.`;
    canvas.setAttribute("aria-label", said);
  }

  async drawSpectrum() {
    const { clip } = this;
    const canvas = byId("spectrum");
    canvas.width = canvas.height = 1;
    clip.spectrum ??= await spectrogram(clip.samples, clip.rate, () => this.clip === clip);
    if (clip.spectrum === null || this.clip !== clip) return;
    const { canvas: made, strongest } = clip.spectrum;
    canvas.width = made.width;
    canvas.height = made.height;
    canvas.getContext("2d").drawImage(made, 0, 0);
    const said = `Spectrogram of ${clip.name}, 0 to ${clip.rate / 2000} kilohertz; most energy near ${Math.round(strongest)} hertz.`;
    canvas.setAttribute("aria-label", said);
  }
}
