"""`pal probe health`: checks for faults that do not keep an audio LLM from answering, with a remedy for each.

The faults: attention that ignores audio, audio rows in the feed-forward networks, summary tokens out of order, missing
gaps in the positions, answers that do not depend on the audio, and overconfident answers about silence.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import soundfile
import torch
from tqdm import tqdm

from pal import audio as audio_io
from pal.data import prompts
from pal.data.manifest import Record
from pal.errors import PalError
from pal.evaluate import evaluate
from pal.evaluate.answerer import evaluation_mode
from pal.evaluate.bootstrap import bootstrap_ci
from pal.lab.records import spread
from pal.plots import COLOURS
from pal.probe.attention_stats import PATHWAYS, record_attention
from pal.probe.layout_checks import MEMORY, HealthCheck, Status, about_first_clip, layout_checks
from pal.probe.probe_result import Plot, ProbeResult, about

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from pal.model import PalModel

IGNORED = 0.05
"""Minimum attention mass on audio relative to uniform attention; a layer below it ignores audio."""
UNMOVED = 0.01
"""Minimum total variation distance between attention to one clip and to another; in a layer below it attention does not
depend on the sound."""
EAGER = 0.5
"""Share of "yes" to "is there ...?" about silence that makes a model over-eager."""
SURE = 0.9
"""Median probability of the best choice about silence that makes a model over-eager."""
_COMPARED_CLIPS = 24
"""Number of clips whose attention is compared with that to another clip."""


def probe_health(model: PalModel, records: Sequence[Record], batch: int = 32, progress: bool = False) -> ProbeResult:
    """Run all checks on one model.

    Args:
        model: the model; an untrained one fails the checks of attention and answers.
        records: questions with choices, about at least two different clips.
        batch: rows of a forward pass.
        progress: show a progress bar.

    Raises:
        PalError: fewer than two clips.
    """
    started = time.perf_counter()
    asked = [one for one in records if one.clips]
    if len({one.clips for one in asked}) < 2:
        raise PalError("health compares clips; give questions about at least two different clips")
    with evaluation_mode(model), tqdm(total=4, desc="health", disable=not progress, leave=False) as bar:
        checks = list(layout_checks(model, asked[0]))
        bar.update()
        layers = _attention_by_layer(model, spread(asked, _COMPARED_CLIPS))
        checks.append(_attention_check(layers))
        bar.update()
        scores, items = _scores_by_audio(model, asked, batch)
        checks.append(_answer_check(scores))
        bar.update()
        checks.append(_silence_check(model, asked, items, batch))
        bar.update()
    bad = [check for check in checks if check.status in ("fault", "warning")]
    reading = [f"{check.name}: {check.measured}. {check.remedy}" for check in bad]
    return ProbeResult(
        probe="health",
        model=about(model),
        settings={
            "questions": len(asked),
            "clips": len({one.clips for one in asked}),
            "thresholds": {"ignored": IGNORED, "unmoved": UNMOVED, "memory": MEMORY, "eager": EAGER, "sure": SURE},
        },
        reading=reading or [f"All {sum(check.status == 'ok' for check in checks)} applicable checks passed."],
        tables={
            "checks": [{"check": check.name, "status": check.status, "measured": check.measured} for check in checks],
            "attention to audio by layer": layers,
            "the same questions with other audio": scores,
        },
        details={"remedies": {check.name: check.remedy for check in checks}},
        pictures={
            "attention": Plot(
                "Attention to audio by layer",
                "Left: attention mass on audio relative to uniform attention. Right: change of this attention with "
                "another clip of the same length (total variation distance). A layer near zero on either side ignores "
                "the audio.",
                lambda figure: _draw(figure, layers),
                size=(8.0, 3.4),
            )
        },
        seconds=time.perf_counter() - started,
    )


# Attention to audio


def _attention_by_layer(model: PalModel, records: Sequence[Record]) -> list[dict[str, Any]]:
    """By layer: attention mass on audio relative to uniform attention, and its change with another clip."""
    shares, moves = [], []
    for one, instead in zip(records, swapped(records), strict=True):
        clip_N, other_N = (audio_io.load(it.clips[0], model.sampling_rate).samples_N for it in (one, instead))
        row = about_first_clip(model, one)
        # repeated or cut to equal length, so that tokens can be compared one by one
        both = [clip_N, other_N.repeat(-(-len(clip_N) // len(other_N)))[: len(clip_N)]]
        right, wrong = record_attention(model, both, [row, replace(row, clips=[1])])
        audio = [p for p, name in enumerate(PATHWAYS) if name != "text"]
        rows = right.answer
        mass_L = right.mass_LHNP[:, :, rows][..., audio].sum(-1).mean((1, 2))
        visible_LNP = right.visible_LNP[:, rows].double()
        even_L = (visible_LNP[..., audio].sum(-1) / visible_LNP.sum(-1)).mean(-1)
        shares.append((mass_L.double() / even_L).numpy())
        a_LA, b_LA = (x.token_LA / x.token_LA.sum(-1, keepdim=True) for x in (right, wrong))
        moves.append(((a_LA - b_LA).abs().sum(-1) / 2).double().numpy())
    found: list[dict[str, Any]] = []
    for layer in range(model.llm.n_layers):
        share = [float(x[layer]) for x in shares]
        if not np.isfinite(share).all():
            found.append({"layer": layer, "relative to uniform": None, "moved by another clip": None})
            continue
        moved = [float(x[layer]) for x in moves]
        found.append(
            {
                "layer": layer,
                "relative to uniform": float(np.mean(share)),
                "relative to uniform ci95": bootstrap_ci(share),
                "moved by another clip": float(np.mean(moved)),
                "moved by another clip ci95": bootstrap_ci(moved),
            }
        )
    return found


def _attention_check(layers: Sequence[dict[str, Any]]) -> HealthCheck:
    with_audio = [row for row in layers if row["relative to uniform"] is not None]
    ignoring = [
        row["layer"]
        for row in with_audio
        if row["relative to uniform"] < IGNORED or row["moved by another clip"] < UNMOVED
    ]
    status: Status = "ok" if not ignoring else "fault" if len(ignoring) == len(with_audio) else "warning"
    return HealthCheck(
        "attention ignores audio",
        status if with_audio else "does not apply",
        f"{len(with_audio) - len(ignoring)} of {len(with_audio)} layers with audio attend to it, "
        f"and differently to another clip" + (f"; not layers {ignoring}" if ignoring else ""),
        "Check that projectors get gradients and that audio keys are visible (positions). Train a small LLM with the "
        "objective 'transcript' first, so that it learns to attend to the positions of audio.",
    )


# Dependence of answers on the audio


@contextmanager
def _silences(records: Sequence[Record], rate: int) -> Iterator[list[Record]]:
    """The same questions about silence of the same lengths."""
    with TemporaryDirectory(prefix="pal-") as folder:
        made: dict[str, str] = {}
        for path in dict.fromkeys(path for one in records for path in one.clips):
            made[path] = str(Path(folder) / f"{len(made)}.wav")
            frames = max(1, round(audio_io.seconds(path) * rate))
            soundfile.write(made[path], np.zeros(frames, dtype=np.float32), rate, subtype="PCM_16")
        yield [replace(one, clips=tuple(made[path] for path in one.clips)) for one in records]


def swapped(records: Sequence[Record]) -> list[Record]:
    """The same questions about other clips: those half the list of clips further on."""
    clips = list(dict.fromkeys(one.clips for one in records))
    other = {own: clips[(i + max(1, len(clips) // 2)) % len(clips)] for i, own in enumerate(clips)}
    fits = {own: len(own) == len(to) for own, to in other.items()}
    return [replace(one, clips=other[one.clips]) if fits[one.clips] else one for one in records]


def _scores_by_audio(model: PalModel, records: Sequence[Record], batch: int) -> tuple[list[dict[str, Any]], Any]:
    """Scores with the right clip, another clip, silence, and without audio."""
    right = evaluate(model, records, no_audio=True, batch=batch, progress=False).items
    other = evaluate(model, swapped(records), no_audio=False, batch=batch, progress=False).items
    with _silences(records, model.sampling_rate) as silent:
        quiet = evaluate(model, silent, no_audio=False, batch=batch, progress=False).items
    groups = [item.group for item in right]
    columns = {
        "the right clip": [float(bool(item.correct)) for item in right],
        "another clip": [float(bool(item.correct)) for item in other],
        "silence": [float(bool(item.correct)) for item in quiet],
        "no audio": [float(bool(item.no_audio_correct)) for item in right],
    }
    right_scores = columns["the right clip"]
    table = []
    for name, values in columns.items():
        lost = [a - b for a, b in zip(right_scores, values, strict=True)]
        table.append(
            {
                "audio": name,
                "score": float(np.mean(values)),
                "score ci95": bootstrap_ci(values, groups),
                "lost": float(np.mean(lost)),
                "lost ci95": bootstrap_ci(lost, groups),
            }
        )
    return table, quiet


def _answer_check(scores: Sequence[dict[str, Any]]) -> HealthCheck:
    by_name = {row["audio"]: row for row in scores}
    lost = by_name["another clip"]
    low, high = lost["lost ci95"]
    ignored = low <= 0
    return HealthCheck(
        "answers ignore audio",
        "fault" if ignored else "ok",
        f"another clip costs {lost['lost']:.3f} of the score ({low:.3f} to {high:.3f}); right clip "
        f"{by_name['the right clip']['score']:.3f}, no audio {by_name['no audio']['score']:.3f}",
        "Answers do not depend on the clip: fix the faults of the other checks first, then train longer, on questions "
        "that cannot be guessed without audio.",
    )


def _silence_check(model: PalModel, records: Sequence[Record], quiet: Any, batch: int) -> HealthCheck:
    """Check the share of "yes" to questions whether silence holds a sound, and confidence about silence."""
    name = "over-eager"
    remedy = "Train with silent clips and questions about absent sounds, and with 'nothing' as an answer."
    yes_no = [i for i, one in enumerate(records) if one.choices and {c.lower() for c in one.choices} == {"yes", "no"}]
    closed = [one for one in records if one.choices and len(one.choices) > 1]
    measured, eager = [], False
    presence = [quiet[i].output or "" for i in yes_no if records[i].task == "presence"]
    asserted = [answer.strip().lower().startswith("yes") for answer in presence]
    if asserted:
        rate = float(np.mean(asserted))
        eager |= rate >= EAGER
        measured.append(f"answers yes to {rate:.0%} of {len(asserted)} questions whether silence holds a sound")
    if closed:
        with _silences(spread(closed, 64), model.sampling_rate) as silent:
            sure = float(np.median(_confidence(model, silent, batch)))
        certain = float(np.median(_confidence(model, spread(closed, 64), batch)))
        eager |= sure >= SURE
        measured.append(f"median probability of the best choice: {sure:.2f} on silence, {certain:.2f} on the clip")
    if not measured:
        return HealthCheck(name, "does not apply", "no question has choices", remedy)
    return HealthCheck(name, "warning" if eager else "ok", "; ".join(measured), remedy)


def _confidence(model: PalModel, records: Sequence[Record], batch: int) -> list[float]:
    """Probability of the best choice of each question, relative to all its choices."""
    found = []
    for one in records:
        waves = [audio_io.load(path, model.sampling_rate).samples_N for path in one.clips]
        talk = prompts.conversation_of(one, with_answers=False, style=model.config.style)
        choices = one.choices or ()
        rows = [
            prompts.encode(
                model.tokenizer, [*talk, {"role": "assistant", "content": choice}], range(len(waves)), train=True
            )
            for choice in choices
        ]
        scores = torch.cat([model.answer_scores(waves, rows[i : i + batch]) for i in range(0, len(rows), batch)])
        found.append(float(scores.softmax(0).max()))
    return found


def _draw(figure: Figure, layers: Sequence[dict[str, Any]]) -> None:
    with_audio = [row for row in layers if row["relative to uniform"] is not None]
    numbers = [row["layer"] for row in with_audio]
    left, right = figure.subplots(1, 2)
    for axes, key, label, bound in (
        (left, "relative to uniform", "attention on audio / uniform", IGNORED),
        (right, "moved by another clip", "moved by another clip", UNMOVED),
    ):
        axes.bar(numbers, [row[key] for row in with_audio], color=COLOURS[0])
        axes.axhline(bound, color=COLOURS[1], linestyle="--", linewidth=1)
        axes.set(xlabel="layer", ylabel=label, xticks=numbers)
