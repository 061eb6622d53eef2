"""`pal probe attention`: attention mass on audio, by layer, head, pathway, word and second (paper, figure 5).

Each conversation is answered, and then run again in one forward pass that includes the answer. Attention weights are
held for one layer at a time (`pal.probe.attention_stats`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from pal import audio as audio_io
from pal.data import prompts
from pal.data.manifest import Record
from pal.errors import PalError
from pal.evaluate.answerer import evaluation_mode
from pal.evaluate.bootstrap import bootstrap_ci
from pal.evaluate.text import exact_match
from pal.plots import COLOURS, TIME, escape_label, printable
from pal.probe.attention_stats import PATHWAYS, AnswerAttention, record_attention
from pal.probe.probe_result import Plot, ProbeResult, about
from pal.types import IGNORE, Tokens, waveform_seconds

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from pal.model import PalModel

NAMES = {"keys": "audio K/V (LAL)", "rows": "audio rows (PLITS, summaries)", "text": "text", "cross": "cross-attention"}
_COLOURS = {"keys": COLOURS[0], "rows": COLOURS[1], "text": "#777777", "cross": COLOURS[2]}
BINS = 40
"""Number of time bins of a clip."""


@dataclass(frozen=True)
class ObservedAnswer:
    """Question with the model's answer, and the attention of the rows after the clip."""

    record: Record
    answer: str
    attention: AnswerAttention
    samples_N: Tensor
    """Samples of the first clip."""
    seconds: float
    """Length of the first clip."""


def probe_attention(
    model: PalModel,
    records: Sequence[Record],
    examples: int = 3,
    batch: int = 16,
    max_new_tokens: int = 32,
    progress: bool = False,
    settings: dict[str, Any] | None = None,
) -> ProbeResult:
    """Measure the attention of the rows that predict answers.

    Args:
        model: any model.
        records: questions about clips; the last turn of each is asked, others are ignored.
        examples: number of clips shown as heat-maps over the spectrogram, from the first on.
        batch: conversations of a forward pass.
        max_new_tokens: maximum length of an answer.
        progress: show a progress bar.
        settings: origin of the records, for `probe.json`.

    Raises:
        PalError: no record has a clip.
    """
    started = time.perf_counter()
    asked = [one for one in records if one.clips]
    if not asked:
        raise PalError("no question has a clip; give a manifest of questions about clips")
    with evaluation_mode(model):
        read = _read(model, asked, batch, max_new_tokens, progress)
    clips = [one.record.clips for one in read]
    paths = [p for p in range(len(PATHWAYS)) if any(one.attention.visible_LNP[..., p].any() for one in read)]
    by_layer = [_layer_row(read, clips, layer, paths) for layer in range(model.llm.n_layers)]
    roles = [_role_row(read, clips, layer) for layer in range(model.llm.n_layers)]
    pointing = [row for layer in range(model.llm.n_layers) if (row := _pointing_row(read, layer)) is not None]
    shown = _examples(read, examples)
    pictures = {
        "by-layer": Plot(
            "Attention mass on audio by layer",
            "Share of the attention of the rows that predict the answer, mean over heads. Bands: 95 % intervals over "
            "clips. Dashed: uniform attention over all visible keys.",
            lambda figure: _draw_layers(figure, by_layer, paths),
        ),
        "by-head": Plot(
            "Attention mass on audio by layer and head",
            "Sum over the audio pathways. Bright cells are heads that attend to audio.",
            lambda figure: _draw_heads(figure, _heads(read)),
        ),
    }
    sounds = {}
    for number, one in enumerate(shown, 1):
        name = f"example-{number}"
        sounds[name] = one.samples_N, model.sampling_rate
        pictures[name] = _example_picture(model, one, name)
    tables: dict[str, Any] = {
        "attention of the answer's rows by layer": by_layer,
        "attention to audio by kind of row": roles,
    }
    if pointing:
        tables["attention to the sound that the answer names"] = pointing
    return ProbeResult(
        probe="attention",
        model=about(model),
        settings={"questions": len(read), "batch": batch, "bins": BINS, **(settings or {})},
        reading=_reading(by_layer, roles, pointing, paths),
        tables=tables,
        details={
            "pathways": [PATHWAYS[p] for p in paths],
            "by_layer_and_head": _heads(read).tolist(),
            "examples": [_example_details(model, one) for one in shown],
            "items": [
                {"id": one.record.id, "answer": one.answer, "audio_by_layer": _audio(one).mean(1).tolist()}
                for one in read
            ],
        },
        pictures=pictures,
        clips=sounds,
        seconds=time.perf_counter() - started,
    )


def _read(
    model: PalModel, records: Sequence[Record], batch: int, max_new_tokens: int, progress: bool
) -> list[ObservedAnswer]:
    """Answer every record and record its attention; clips of similar length share a batch."""
    style, tokenizer = model.config.style, model.tokenizer
    order = sorted(range(len(records)), key=lambda i: sum(audio_io.seconds(path) for path in records[i].clips))
    read: list[ObservedAnswer | None] = [None] * len(records)
    with tqdm(total=len(records), desc="attention", unit="question", disable=not progress, leave=False) as bar:
        for first in range(0, len(order), batch):
            part = order[first : first + batch]
            paths = list(dict.fromkeys(path for i in part for path in records[i].clips))
            waves = [audio_io.load(path, model.sampling_rate).samples_N for path in paths]
            spans = [[paths.index(path) for path in records[i].clips] for i in part]
            talks = [prompts.conversation_of(records[i], with_answers=False, style=style) for i in part]
            rows = [prompts.encode(tokenizer, talk, span) for talk, span in zip(talks, spans, strict=True)]
            answers = model.generate(waves, rows, max_new_tokens=max_new_tokens)
            whole = [
                prompts.encode(tokenizer, [*talk, {"role": "assistant", "content": answer}], span, train=True)
                for talk, span, answer in zip(talks, spans, answers, strict=True)
            ]
            with torch.inference_mode():
                found = record_attention(model, waves, [_last_answer(row) for row in whole], BINS)
            for i, answer, span, attention in zip(part, answers, spans, found, strict=True):
                samples_N = waves[span[0]]
                seconds = waveform_seconds(samples_N, model.sampling_rate)
                read[i] = ObservedAnswer(records[i], answer, attention, samples_N, seconds)
            bar.update(len(part))
    return [one for one in read if one is not None]


def _last_answer(row: Tokens) -> Tokens:
    """The conversation with labels on its last answer only, since earlier answers are part of the question."""
    labels = list(row.labels or ())
    end = max(i for i, label in enumerate(labels) if label != IGNORE)
    start = end
    while start and labels[start - 1] != IGNORE:
        start -= 1
    return replace(row, labels=[IGNORE] * start + labels[start:])


def _audio(one: ObservedAnswer) -> NDArray[np.float64]:
    """Attention mass on audio of the rows that predict the answer [L, H], including cross-attention before a layer."""
    mass_LHNP = one.attention.mass_LHNP[:, :, one.attention.answer].double().numpy()
    text = PATHWAYS.index("text")
    shares = {p: mass_LHNP[..., p] for p in range(len(PATHWAYS)) if p != text}
    return np.sum(list(shares.values()), axis=0).mean(-1)


def _heads(read: Sequence[ObservedAnswer]) -> NDArray[np.float64]:
    return np.mean([_audio(one) for one in read], axis=0)


def _layer_row(
    read: Sequence[ObservedAnswer], clips: Sequence[tuple[str, ...]], layer: int, paths: Sequence[int]
) -> dict[str, Any]:
    row: dict[str, Any] = {"layer": layer}
    for p in paths:
        values = [one.attention.mass_LHNP[layer][:, one.attention.answer, p].mean().item() for one in read]
        row[PATHWAYS[p]] = float(np.mean(values))
        row[f"{PATHWAYS[p]} ci95"] = bootstrap_ci(values, clips)
        row[f"{PATHWAYS[p]} if uniform"] = float(np.mean([_uniform_mass(one, layer, p) for one in read]))
    return row


def _uniform_mass(one: ObservedAnswer, layer: int, pathway: int) -> float:
    """Attention mass of a pathway if attention were uniform over all visible keys."""
    visible_NP = one.attention.visible_LNP[layer, one.attention.answer].double()
    cross = PATHWAYS.index("cross")
    if pathway == cross:
        return float((visible_NP[:, cross] > 0).double().mean())
    inside_N = visible_NP.sum(-1) - visible_NP[:, cross]
    return float((visible_NP[:, pathway] / inside_N).mean())


def _role_row(read: Sequence[ObservedAnswer], clips: Sequence[tuple[str, ...]], layer: int) -> dict[str, Any]:
    """Attention to audio of rows of the question after the clip, and of rows that predict the answer."""
    text = PATHWAYS.index("text")
    row: dict[str, Any] = {"layer": layer}
    for role in ("question", "answer"):
        values = []
        for one in read:
            first = one.attention.answer[0]
            rows = one.attention.answer if role == "answer" else list(range(first))
            if rows:
                mass_HNP = one.attention.mass_LHNP[layer][:, rows]
                values.append((mass_HNP.sum(-1) - mass_HNP[..., text]).mean().item())
            else:
                values.append(float("nan"))
        kept = [(value, clip) for value, clip in zip(values, clips, strict=True) if not np.isnan(value)]
        row[role] = float(np.mean([value for value, _ in kept])) if kept else None
        row[f"{role} ci95"] = bootstrap_ci([value for value, _ in kept], [clip for _, clip in kept]) if kept else None
    return row


def _pointing_row(read: Sequence[ObservedAnswer], layer: int) -> dict[str, Any] | None:
    """Attention to the time of the sound that the right answer names, relative to uniform attention over the clip."""
    lifts, clips = [], []
    for one in read:
        spans = _named_spans(one)
        if one.attention.time_LNX is None or not spans:
            continue
        time_X = one.attention.time_LNX[layer, one.attention.answer].mean(0).numpy()
        if time_X.sum() <= 0:
            continue
        middle_X = (np.arange(len(time_X)) + 0.5) * one.seconds / len(time_X)
        inside_X = np.any([(middle_X >= start) & (middle_X < end) for start, end in spans], axis=0)
        if inside_X.any() and not inside_X.all():
            lifts.append(float(time_X[inside_X].sum() / time_X.sum() / inside_X.mean()))
            clips.append(one.record.clips)
    if not lifts:
        return None
    return {
        "layer": layer,
        "questions": len(lifts),
        "relative to uniform": float(np.mean(lifts)),
        "ci95": bootstrap_ci(lifts, clips),
    }


def _named_spans(one: ObservedAnswer) -> list[tuple[float, float]]:
    """Onset and offset of the sound that is the right answer, from the record's tags."""
    answer = one.record.turns[-1].answer
    tags = one.record.tags or ()
    return [
        (tag.start, tag.end)
        for tag in tags
        if tag.start is not None and tag.end is not None and exact_match(tag.label, answer)
    ]


def _reading(
    by_layer: Sequence[dict[str, Any]],
    roles: Sequence[dict[str, Any]],
    pointing: Sequence[dict[str, Any]],
    paths: Sequence[int],
) -> list[str]:
    sentences = []
    for p in paths:
        name = PATHWAYS[p]
        if name == "text":
            continue
        layers = [row for row in by_layer if row[f"{name} if uniform"] > 0]
        if name == "cross":
            sentences.append(
                f"Cross-attention blocks (audio only) lie before layers {[row['layer'] for row in layers]}."
            )
            continue
        top = max(layers, key=lambda row: row[name])
        low, high = top[f"{name} ci95"]
        sentences.append(
            f"{NAMES[name]}: highest in layer {top['layer']}, {top[name]:.1%} of the attention "
            f"({low:.1%} to {high:.1%}); uniform attention would give {top[f'{name} if uniform']:.1%}; by layer "
            + ", ".join(f"{row[name]:.1%}" for row in by_layer)
            + "."
        )
    if pointing:
        best = max(pointing, key=lambda row: row["relative to uniform"])
        low, high = best["ci95"]
        verdict = "more than uniform" if low > 1 else "not significantly more than uniform"
        sentences.append(
            f"In layer {best['layer']}, where it is highest, the sound that the right answer names gets "
            f"{best['relative to uniform']:.2f} times the attention of its share of the clip "
            f"({low:.2f} to {high:.2f}): {verdict}."
        )
    if any(PATHWAYS[p] in ("keys", "rows") for p in paths):
        questions, answers = (
            np.mean([row[role] for row in roles if row[role] is not None]) for role in ("question", "answer")
        )
        sentences.append(
            f"Rows of the question give {questions:.1%} of their attention to audio, rows that predict the answer "
            f"{answers:.1%}, mean over layers."
        )
    return sentences


# Examples


def _examples(read: Sequence[ObservedAnswer], count: int) -> list[ObservedAnswer]:
    """The first question about each of the first `count` clips."""
    seen: dict[tuple[str, ...], ObservedAnswer] = {}
    for one in read:
        if one.attention.time_LNX is not None:
            seen.setdefault(one.record.clips, one)
    return list(seen.values())[:count]


def words(model: PalModel, attention: AnswerAttention) -> list[tuple[str, list[int]]]:
    """Words of the answer, each with the rows that predict its tokens; without the token that ends the answer."""
    tokenizer = model.tokenizer
    ids = [attention.tokens[n + 1] for n in attention.answer]
    special = set(tokenizer.all_special_ids) | set(prompts.end_of_answer(tokenizer))
    found: list[tuple[str, list[int]]] = []
    text = ""
    for at, (token, row) in enumerate(zip(ids, attention.answer, strict=True)):
        if token in special:
            continue
        longer = str(tokenizer.decode([i for i in ids[: at + 1] if i not in special]))
        piece, text = longer[len(text) :], longer
        if found and not piece[:1].isspace():
            found[-1] = found[-1][0] + piece, [*found[-1][1], row]
        else:
            found.append((piece, [row]))
    return [(printable(word.strip()), rows) for word, rows in found]


def _word_times(model: PalModel, one: ObservedAnswer) -> tuple[list[str], NDArray[np.float64]]:
    """Words of the answer, and their attention over time [words, X], mean over heads and layers."""
    assert one.attention.time_LNX is not None
    time_NX = one.attention.time_LNX.mean(0).double().numpy()
    spoken = words(model, one.attention) or [("(nothing)", one.attention.answer)]
    return [word for word, _ in spoken], np.stack([time_NX[rows].mean(0) for _, rows in spoken])


def _example_details(model: PalModel, one: ObservedAnswer) -> dict[str, Any]:
    answer_words, word_times = _word_times(model, one)
    time_LNX = one.attention.time_LNX
    assert time_LNX is not None
    return {
        "id": one.record.id,
        "question": one.record.turns[-1].question,
        "answer": one.answer,
        "reference": one.record.turns[-1].answer,
        "seconds": one.seconds,
        "words": answer_words,
        "word_by_time": word_times.tolist(),
        "layer_by_time": time_LNX[:, one.attention.answer].mean(1).tolist(),
        "audio_tokens": [
            {"pathway": pathway, "stream": stream, "start": start, "end": end, "by_layer": shares}
            for (pathway, stream, start, end), shares in zip(
                one.attention.tokens_audio, one.attention.token_LA.T.tolist(), strict=True
            )
        ],
    }


def _example_picture(model: PalModel, one: ObservedAnswer, name: str) -> Plot:
    answer_words, word_times = _word_times(model, one)
    assert one.attention.time_LNX is not None
    layers = one.attention.time_LNX[:, one.attention.answer].mean(1).double().numpy()
    question = one.record.turns[-1].question.replace(prompts.PLACEHOLDER, "").strip()
    return Plot(
        printable(f"“{question}” – “{one.answer}”"),
        f"{_truth(one)}Upper panels: attention of the rows that predict each word of the answer, over the "
        "spectrogram; mean over layers and heads, yellow is highest. Bottom panel: attention by layer.",
        lambda figure: _draw_example(figure, one, answer_words, word_times, layers, model.sampling_rate),
        size=(8.0, 1.6 * min(len(answer_words), _WORDS) + 1.8),
        clip=name,
    )


def _truth(one: ObservedAnswer) -> str:
    truth = one.record.turns[-1].answer
    return f"The right answer is “{truth}”. " if truth else ""


# Pictures

_WORDS = 6
"""Maximum number of words of an answer in a plot; the JSON has all."""


def _draw_layers(figure: Figure, by_layer: Sequence[dict[str, Any]], paths: Sequence[int]) -> None:
    axes = figure.subplots()
    layers = [row["layer"] for row in by_layer]
    for p in paths:
        name = PATHWAYS[p]
        ends = np.array([row[f"{name} ci95"] for row in by_layer])
        axes.plot(layers, [row[name] for row in by_layer], marker="o", color=_COLOURS[name], label=NAMES[name])
        axes.fill_between(layers, ends[:, 0], ends[:, 1], color=_COLOURS[name], alpha=0.2)
        axes.plot(layers, [row[f"{name} if uniform"] for row in by_layer], "--", color=_COLOURS[name], linewidth=0.9)
    axes.set(xlabel="layer", ylabel="share of attention", ylim=(0, 1.02), xticks=layers)
    axes.grid(alpha=0.25)
    axes.legend()


def _draw_heads(figure: Figure, heads_LH: NDArray[np.float64]) -> None:
    axes = figure.subplots()
    image = axes.imshow(heads_LH, aspect="auto", cmap="viridis", vmin=0, vmax=max(1e-9, float(heads_LH.max())))
    axes.set(xlabel="head", ylabel="layer", xticks=range(heads_LH.shape[1]), yticks=range(heads_LH.shape[0]))
    figure.colorbar(image, label="share of attention on audio")


def _draw_example(
    figure: Figure,
    one: ObservedAnswer,
    answer_words: Sequence[str],
    word_times: NDArray[np.float64],
    layer_times: NDArray[np.float64],
    rate: int,
) -> None:
    shown = min(len(answer_words), _WORDS)
    panels = figure.subplots(shown + 1, 1, sharex=True, squeeze=False)[:, 0]
    most = max(1e-9, float(word_times.max()))
    for axes, word, time_X in zip(panels, answer_words, word_times, strict=False):
        with np.errstate(divide="ignore"):  # digital silence has no level, and is drawn black
            axes.specgram(one.samples_N.numpy(), NFFT=512, Fs=rate, noverlap=384, cmap="gray", vmin=-140)
        axes.imshow(
            time_X[None] / most,
            extent=(0, one.seconds, 0, rate / 2),
            aspect="auto",
            cmap="plasma",
            alpha=0.55,
            vmin=0,
            vmax=1,
            interpolation="nearest",
        )
        axes.set_ylabel(escape_label(word), rotation=0, ha="right", va="center")
        axes.set(ylim=(0, rate / 2), yticks=[])
    for axes in panels:
        axes.set_gid(TIME)
    panels[-1].imshow(layer_times, extent=(0, one.seconds, len(layer_times) - 0.5, -0.5), aspect="auto", cmap="plasma")
    panels[-1].set(xlabel="seconds", ylabel="layer", yticks=range(len(layer_times)))
    panels[-1].set_xlim(0, one.seconds)
