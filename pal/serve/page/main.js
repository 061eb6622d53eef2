// The page: what is chosen, and what happens when it is asked.

import { ApiError, getBytes, getJson, setKey } from "./api.js";
import { placeFor } from "./answers.js";
import { byId, element, fault, inBytes, inMilliseconds, inParameters } from "./dom.js";
import { Excerpt } from "./excerpt.js";
import { startRecording } from "./recording.js";
import { curlOf, pythonOf } from "./snippets.js";
import { decode, toWav } from "./sound.js";
import { ClipView } from "./view.js";

let facts = null;
let keyNeeded = false;
let excerpt = null;
let opening = 0;
let recording = null;
let recordings = 0;
let stopping = null;
let suggested = ""; // the question of the last example
const view = new ClipView(chosen);

// The server

async function begin() {
  try {
    keyNeeded = (await getJson("/page/access")).key;
  } catch (error) {
    return fault("page-error", error.message);
  }
  if (keyNeeded) {
    byId("key-section").hidden = false;
    return byId("key").focus();
  }
  return loadFacts();
}

async function loadFacts() {
  try {
    facts = await getJson("/page/api/facts");
  } catch (error) {
    return error.status === 401 ? needKey(error) : fault("page-error", error.message);
  }
  fault("page-error", null);
  const choices = facts.models.map((model) => {
    const box = element("input", { type: "checkbox", name: "model", value: model.id, checked: true });
    box.addEventListener("change", () => {
      fault("models-error", null);
      showCode();
    });
    const about = `integration ${model.integration}, encoder ${model.encoders.join(" and ")}, ${inParameters(model.parameters)} parameters`;
    const notice = model.notice ? [element("br"), element("span", { className: "small" }, `Note: ${model.notice}.`)] : [];
    return element("label", {}, box, element("span", {}, model.id, " ", element("span", { className: "small" }, about), ...notice));
  });
  byId("models").replaceChildren(byId("models").querySelector("legend"), ...choices);
  const buttons = facts.examples.map((example) => {
    const button = element("button", { type: "button" }, `Example: ${example.title}`);
    button.addEventListener("click", () => openExample(example));
    return button;
  });
  byId("examples").replaceChildren(...buttons);
  byId("most").value = Math.min(64, facts.max_tokens);
  return showCode();
}

function needKey(error) {
  byId("key-section").hidden = false;
  fault("key-error", error.message, byId("key"));
  byId("key").focus();
}

byId("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  fault("key-error", null, byId("key"));
  try {
    setKey(byId("key").value);
  } catch (error) {
    return needKey(error);
  }
  await loadFacts();
  if (facts !== null && byId("key-error").hidden) byId("key-section").hidden = true;
});

// The sound

async function open(bytes, name, type, about = null) {
  const mine = ++opening;
  fault("sound-error", null, byId("file"));
  byId("sound-status").textContent = "";
  if (facts === null) return fault("sound-error", "give the API key first");
  if (bytes.byteLength === 0) return fault("sound-error", `${name} is empty; choose another file`, byId("file"));
  const samples = await decode(bytes, facts.rate).catch(() => null);
  if (mine !== opening) return;
  const known = samples !== null && samples.length > 0;
  const clip = { name, bytes, type, about, samples: known ? samples : null, rate: facts.rate, spectrum: null };
  clip.seconds = known ? samples.length / facts.rate : null;
  if (!known) {
    byId("sound-status").textContent =
      `This browser cannot decode ${name}, so there is no picture of it and no part can be chosen. It can be asked about all the same.`;
  }
  await view.show(clip);
}

async function openExample(example) {
  fault("sound-error", null, byId("file"));
  const question = byId("question");
  try {
    const bytes = await getBytes(`/page/api/examples/${example.name}`);
    await open(bytes, example.name, example.name.endsWith(".wav") ? "audio/wav" : "audio/ogg", example.about);
  } catch (error) {
    return error.status === 401 ? needKey(error) : fault("sound-error", error.message);
  }
  if (["", suggested].includes(question.value.trim())) question.value = suggested = example.question;
  return showCode();
}

async function openFiles(files) {
  if (files.length === 0) return;
  await open(await files[0].arrayBuffer(), files[0].name, files[0].type);
  if (files.length > 1) byId("sound-status").textContent = `One clip at a time: ${files[0].name} was taken.`;
}

byId("file").addEventListener("change", (event) => openFiles(event.target.files));
for (const kind of ["dragover", "dragleave", "drop"]) {
  // anywhere, since a browser would leave the page for a file that is dropped beside the field
  window.addEventListener(kind, (event) => {
    event.preventDefault();
    byId("drop").classList.toggle("over", kind === "dragover");
    if (kind === "drop") openFiles(event.dataTransfer.files);
  });
}

byId("record").addEventListener("click", async () => {
  const button = byId("record");
  if (recording !== null) return endRecording();
  fault("sound-error", null, byId("file"));
  button.disabled = true;
  try {
    recording = await startRecording();
  } catch (error) {
    return fault("sound-error", error.message);
  } finally {
    button.disabled = false;
  }
  button.setAttribute("aria-pressed", "true");
  const timer = setInterval(() => {
    if (recording === null) return clearInterval(timer);
    button.textContent = `Stop recording (${recording.seconds.toFixed(1)} s)`;
    return recording.seconds >= (facts?.max_seconds ?? 60) - 0.5 ? endRecording() : undefined;
  }, 100);
  return undefined;
});

async function endRecording() {
  const [mine, button] = [recording, byId("record")];
  recording = null;
  const samples = await mine.stop();
  button.setAttribute("aria-pressed", "false");
  button.textContent = "Record from the microphone";
  if (samples.length === 0) return fault("sound-error", "nothing was recorded; record a little longer");
  return open(toWav(samples, mine.rate), `recording-${++recordings}.wav`, "audio/wav");
}

/** Another clip or part is chosen. */
function chosen() {
  const { clip, from, to, whole } = view;
  if (excerpt === null || !excerpt.is(clip, from, to, whole)) {
    excerpt = new Excerpt(clip, from, to, whole, facts.max_body);
    fault("sound-error", null, byId("file"));
  }
  byId("save").hidden = whole;
  showKept();
  showCode();
}

byId("save").addEventListener("click", () => {
  const url = URL.createObjectURL(new Blob([excerpt.file], { type: "audio/wav" }));
  Object.assign(byId("save"), { href: url, download: excerpt.fileName });
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
});

/** What the server keeps of what is chosen. */
function showKept() {
  const lines = [...excerpt.kept].map(([model, kept]) => {
    const asked = kept.asked === 1 ? "1 question" : `${kept.asked} questions`;
    const said = `${kept.tokens} audio tokens, ${inBytes(kept.bytes)}, ${inMilliseconds(kept.ms)}; used for ${asked}`;
    return element("li", {}, element("strong", {}, model), `: indexed once: ${said}`);
  });
  byId("indexed").replaceChildren(...(lines.length ? [element("ul", { className: "plain" }, ...lines)] : []));
}

// The question

const chosenModels = () => {
  const boxes = [...document.querySelectorAll("input[name=model]:checked")];
  return facts?.models.filter((model) => boxes.some((box) => box.value === model.id)) ?? [];
};

/** What is to be asked; null where something is missing, which is then said beside it. */
function request() {
  const [field, most] = [byId("question"), byId("most")];
  const models = chosenModels();
  const question = field.value.trim();
  fault("question-error", null, field);
  fault("most-error", null, most);
  fault("models-error", null);
  let missing = null;
  const miss = (id, message, place) => {
    fault(id, message, place);
    missing ??= place;
  };
  if (view.clip === null) miss("sound-error", "choose a sound first: a file, an example, or the microphone", byId("file"));
  else if (!view.valid) missing = byId("from");
  if (models.length === 0) miss("models-error", "choose at least one model", document.querySelector("input[name=model]"));
  if (question === "") miss("question-error", "write a question", field);
  if (!(Number.isInteger(most.valueAsNumber) && most.valueAsNumber > 0)) miss("most-error", "give a whole number from 1 on", most);
  missing?.focus();
  return missing === null ? { models, question, most: most.valueAsNumber } : null;
}

byId("ask-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (stopping !== null || facts === null) return;
  const asked = request();
  if (asked === null) return;
  const about = excerpt;
  fault("sound-error", null, byId("file"));
  stopping = new AbortController();
  const { signal } = stopping;
  byId("ask").disabled = true;
  byId("stop").disabled = false;
  const noted = () => {
    if (about === excerpt) showKept();
    showCode();
  };
  try {
    for (const card of placeFor(asked.question, about, asked.models)) {
      if (signal.aborted) card.say("not asked");
      else await card.ask({ ...asked, excerpt: about, signal, noted, attention: facts.attention }).catch((error) => place(error, card));
    }
  } finally {
    stopping = null;
    byId("ask").disabled = false;
    byId("stop").disabled = true;
  }
});

byId("stop").addEventListener("click", () => stopping?.abort());
byId("question").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  byId("ask-form").requestSubmit();
});

/** Show an error beside what caused it. */
function place(error, card) {
  card.say("");
  if (error.name === "AbortError") return card.say("stopped");
  if (!(error instanceof ApiError)) {
    card.fail("the page failed on this answer; load it again");
    throw error;
  }
  if (error.status === 401) {
    needKey(error);
  } else if (error.aboutSound) {
    fault("sound-error", error.message, byId("file"));
  } else if (error.param === "max_tokens") {
    fault("most-error", error.message, byId("most"));
  } else if (error.param?.startsWith("messages")) {
    fault("question-error", error.message, byId("question"));
  } else {
    return card.fail(error.message);
  }
  return card.say("no answer; the error is said where it arose");
}

// The same by program

function showCode() {
  const [model] = chosenModels();
  const given = {
    origin: location.origin,
    model: model?.id ?? "MODEL",
    question: byId("question").value.trim() || "What sound is this?",
    most: byId("most").valueAsNumber || 64,
    handle: (model && excerpt?.kept.get(model.id)?.id) ?? null,
    fileName: excerpt?.fileName ?? "clip.wav",
    format: excerpt?.format ?? "wav",
    key: keyNeeded,
  };
  byId("curl").textContent = curlOf(given);
  byId("python").textContent = pythonOf(given);
}

byId("question").addEventListener("input", showCode);
byId("most").addEventListener("input", showCode);
for (const button of document.querySelectorAll(".copy")) {
  button.addEventListener("click", async () => {
    const source = byId(button.dataset.of);
    try {
      await navigator.clipboard.writeText(source.textContent);
      byId("copied").textContent = "Copied.";
    } catch {
      getSelection().selectAllChildren(source); // pages at http may not copy
      byId("copied").textContent = "Selected; copy it with Ctrl and C.";
    }
  });
}

begin();
