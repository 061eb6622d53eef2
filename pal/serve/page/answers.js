// Questions with the answers of the models, side by side.

import { events } from "./api.js";
import { byId, element, inBytes, inMilliseconds } from "./dom.js";
import { listenedButton } from "./listened.js";

/** A place for one question: a card for each model. */
export function placeFor(question, excerpt, models) {
  const cards = models.map((model) => new Card(model));
  const place = element(
    "article",
    { className: "asked" },
    element("h3", {}, question),
    element("p", { className: "small" }, excerpt.label),
    element("div", { className: "cards" }, ...cards.map((card) => card.root)),
  );
  byId("no-answers").hidden = true;
  byId("answers").prepend(place);
  return cards;
}

class Card {
  constructor(model) {
    this.model = model;
    this.answer = element("p", { className: "answer", ariaLive: "polite", ariaBusy: "true" });
    this.status = element("p", { className: "small", role: "status" }, "waits for its turn");
    this.numbers = element("dl");
    this.error = element("p", { className: "error", role: "alert", hidden: true });
    this.listened = element("div", { className: "listened" });
    this.root = element(
      "div",
      { className: "card", role: "group", ariaLabel: `Answer of ${model.id}` },
      element("h4", {}, model.id),
      element("p", { className: "small" }, `integration ${model.integration}`),
      this.answer,
      this.error,
      this.status,
      this.numbers,
      this.listened,
    );
  }

  say(text) {
    this.status.textContent = text;
  }

  fail(text) {
    this.error.textContent = text;
    this.error.hidden = false;
  }

  add(text) {
    this.answer.append(text);
  }

  number(name, value) {
    this.numbers.append(element("div", {}, element("dt", {}, name), element("dd", {}, value)));
  }

  /** Ask; `noted` is called when what the server keeps has changed. Throws what went wrong. */
  async ask({ excerpt, question, most, signal, noted, attention }) {
    const { id } = this.model;
    const before = excerpt.kept.get(id);
    this.say(before ? "the sound is there already; reading the question" : "indexing the sound");
    const said = [];
    const again = (kept) => said.push(`The sound had left the server's cache; it was indexed again in ${inMilliseconds(kept.ms)}.`);
    try {
      const kept = await excerpt.withHandle(
        id,
        signal,
        async (handle) => {
          noted();
          const known = handle === before ? "earlier, in" : "now, in";
          this.numbers.replaceChildren();
          this.number("audio", `${handle.tokens} tokens, ${inBytes(handle.bytes)}`);
          this.number("indexed", `${known} ${inMilliseconds(handle.ms)}`);
          said.push(...(await this.stream(handle, question, most, signal)));
          handle.asked += 1;
          return handle;
        },
        again,
      );
      this.say(said.join(" "));
      noted();
      if (attention && this.answer.textContent) this.listened.append(listenedButton(this, excerpt, kept, question));
      if (!this.answer.textContent) this.say([...said, "The answer is empty."].join(" "));
    } finally {
      this.answer.ariaBusy = "false";
    }
  }

  async stream(kept, question, most, signal) {
    const audio = { type: "input_audio", input_audio: { id: kept.id } };
    const messages = [{ role: "user", content: [audio, { type: "text", text: question }] }];
    const options = { max_tokens: most, stream: true, stream_options: { include_usage: true } };
    const began = performance.now();
    let [first, usage, finish] = [null, null, null];
    this.say("reading the question");
    for await (const event of events("/v1/chat/completions", { model: this.model.id, messages, ...options }, signal)) {
      const choice = event.choices[0];
      if (choice?.delta.content) {
        if (first === null) {
          first = performance.now();
          this.say("answering");
        }
        this.add(choice.delta.content);
      }
      finish = choice?.finish_reason ?? finish;
      usage = event.usage ?? usage;
    }
    const tokens = usage.completion_tokens;
    const ms = performance.now() - began;
    this.number("first token", first === null ? "–" : inMilliseconds(first - began));
    this.number("answer", `${tokens} ${tokens === 1 ? "token" : "tokens"} in ${inMilliseconds(ms)}`);
    // of the whole time, since pieces of a short answer arrive together
    this.number("speed", `${((tokens * 1000) / ms).toFixed(1)} tokens/s`);
    this.number("prompt", `${usage.prompt_tokens} tokens, ${usage.prompt_tokens_details.cached_tokens} of them kept`);
    return finish === "length" ? [`Cut off at ${tokens} tokens.`] : [];
  }
}
