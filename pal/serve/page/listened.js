// Where in the clip each word of an answer attended: an overlay on the spectrogram.

import { postJson } from "./api.js";
import { element } from "./dom.js";

const WIDTH = 640;
const HEIGHT = 160;

/** A button that asks for the attention of a card's answer and shows it in the card. */
export function listenedButton(card, excerpt, kept, question) {
  const button = element("button", { type: "button" }, "Show where it listened");
  button.addEventListener("click", async () => {
    button.disabled = true;
    card.error.hidden = true;
    const { id } = card.model;
    const ask = (handle) =>
      postJson("/page/api/attention", { model: id, input_audio: { id: handle.id }, question, answer: card.answer.textContent });
    try {
      const found = await excerpt.withHandle(id, undefined, ask, () => card.say("The sound was indexed again."));
      card.listened.replaceChildren(...overlay(found, excerpt));
      card.listened.querySelector("button").focus();
    } catch (error) {
      card.fail(error.message);
      button.disabled = false;
    }
  });
  return button;
}

function overlay({ words, mass, seconds }, excerpt) {
  const canvas = element("canvas", { width: WIDTH, height: HEIGHT, role: "img" });
  const said = element("p", { className: "small", role: "status" });
  const most = Math.max(...mass.flat());
  const buttons = words.map((word) => element("button", { type: "button", ariaPressed: "false" }, word || "·"));
  const show = (chosen) => {
    buttons.forEach((button, i) => (button.ariaPressed = String(i === chosen)));
    draw(canvas, excerpt, mass[chosen], most, seconds);
    const [from, to, share] = peak(mass[chosen], seconds, excerpt.from);
    const text = `“${words[chosen]}” attended most from ${from.toFixed(2)} to ${to.toFixed(2)} s: ${share} % of what it gave to the sound.`;
    said.textContent = text;
    canvas.ariaLabel = `Attention over the spectrogram. ${text}`;
  };
  buttons.forEach((button, i) => button.addEventListener("click", () => show(i)));
  const group = element("div", { className: "row words", role: "group", ariaLabel: "Words of the answer" }, ...buttons);
  const note = "Bright where the chosen word attended, mean over layers and heads; the line is the same. It shows where the model looked, and proves nothing.";
  const sums = mass.map((row) => row.reduce((a, b) => a + b));
  show(sums.indexOf(Math.max(...sums)));
  return [group, canvas, said, element("p", { className: "small" }, note)];
}

/** The tenth of the clip with the most attention: its ends in seconds, and its share in percent. */
function peak(mass, seconds, offset) {
  const width = Math.max(1, Math.round(mass.length / 10));
  const sums = mass.slice(0, mass.length - width + 1).map((_, i) => mass.slice(i, i + width).reduce((a, b) => a + b));
  const best = sums.indexOf(Math.max(...sums));
  const all = mass.reduce((a, b) => a + b);
  const at = (bin) => offset + (bin * seconds) / mass.length;
  return [at(best), at(best + width), Math.round((100 * sums[best]) / (all || 1))];
}

function draw(canvas, excerpt, mass, most, seconds) {
  const context = canvas.getContext("2d");
  context.fillStyle = "#222";
  context.fillRect(0, 0, WIDTH, HEIGHT);
  const { clip, from } = excerpt;
  if (clip.spectrum) {
    // the last audio token may outlast the clip: there the picture stays empty
    const picture = clip.spectrum.canvas;
    const scale = picture.width / clip.seconds;
    const length = Math.min(seconds, clip.seconds - from);
    const width = (WIDTH * length) / seconds;
    context.drawImage(picture, from * scale, 0, length * scale, picture.height, 0, 0, width, HEIGHT);
  }
  const step = WIDTH / mass.length;
  context.strokeStyle = "#fff";
  context.lineWidth = 2;
  context.beginPath();
  mass.forEach((value, bin) => {
    const share = most ? value / most : 0;
    context.fillStyle = `rgba(0, 0, 0, ${0.8 * (1 - share)})`;
    context.fillRect(bin * step, 0, Math.ceil(step), HEIGHT);
    const y = HEIGHT - 3 - share * (HEIGHT - 6);
    context.lineTo(bin * step, y);
    context.lineTo((bin + 1) * step, y);
  });
  context.stroke();
}
