"""`pal probe health`: checks for faults with which an audio LLM still answers, with a remedy for each.

They are the faults that readers of the paper list: attention that ignores audio, audio rows that reach the feed-forward
networks, summaries out of order, positions without the gap, and models that do not listen at all or answer whatever
they hear.
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
"""Least attention mass on audio relative to uniform attention; a layer below it ignores audio."""
UNMOVED = 0.01
"""Least total variation between the attention to one clip and to another; a layer below it attends without regard to
what sounds."""
EAGER = 0.5
"""Share of "yes" to "is there ...?" about silence from which on a model is over-eager."""
SURE = 0.9
"""Median probability of the best choice, about silence, from which on a model is over-eager."""
_LISTENED = 24
"""Clips whose attention is compared with that to another clip."""


def probe_health(model: PalModel, records: Sequence[Record], batch: int = 32, progress: bool = False) -> ProbeResult:
    """Every check on one model.

    Args:
        model: the model; an untrained one fails the checks of listening.
        records: closed questions about clips; two different clips at least.
        batch: rows in a forward pass.
        progress: show a bar with the time left.

    Raises:
        PalError: fewer than two clips.
    """
    started = time.perf_counter()
    asked = [one for one in records if one.clips]
    if len({one.clips for one in asked}) < 2:
        raise PalError("health compares a clip with another one; give questions about at least two")
    with evaluation_mode(model), tqdm(total=4, desc="health", disable=not progress, leave=False) as bar:
        checks = list(layout_checks(model, asked[0]))
        bar.update()
        layers = _listening(model, spread(asked, _LISTENED))
        checks.append(_ignoring(layers))
        bar.update()
        scores, items = _hearing(model, asked, batch)
        checks.append(_no_audio(scores))
        bar.update()
        checks.append(_eager(model, asked, items, batch))
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
        reading=reading or [f"All {sum(check.status == 'ok' for check in checks)} checks that apply are passed."],
        tables={
            "checks": [{"check": check.name, "status": check.status, "measured": check.measured} for check in checks],
            "listening, by layer": layers,
            "the same questions of other audio": scores,
        },
        details={"remedies": {check.name: check.remedy for check in checks}},
        pictures={
            "listening": Plot(
                "Does each layer listen?",
                "Left: attention on audio as a multiple of what even attention would give. Right: how much of it moves "
                "when another clip of the same length sounds (total variation). A layer near zero on either side "
                "ignores the audio.",
                lambda figure: _draw(figure, layers),
                size=(8.0, 3.4),
            )
        },
        seconds=time.perf_counter() - started,
    )


# Whether layers listen


def _listening(model: PalModel, records: Sequence[Record]) -> list[dict[str, Any]]:
    """By layer: attention mass on audio relative to uniform attention, and its change with another clip."""
    shares, moves = [], []
    for one, instead in zip(records, swapped(records), strict=True):
        clip_N, other_N = (audio_io.load(it.clips[0], model.sampling_rate).samples_N for it in (one, instead))
        row = about_first_clip(model, one)
        # of the same length, so that tokens can be compared one by one
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


def _ignoring(layers: Sequence[dict[str, Any]]) -> HealthCheck:
    heard = [row for row in layers if row["relative to uniform"] is not None]
    no_audio = [
        row["layer"] for row in heard if row["relative to uniform"] < IGNORED or row["moved by another clip"] < UNMOVED
    ]
    status: Status = "ok" if not no_audio else "fault" if len(no_audio) == len(heard) else "warning"
    return HealthCheck(
        "attention that ignores audio",
        status if heard else "does not apply",
        f"{len(heard) - len(no_audio)} of {len(heard)} layers with audio look at it, "
        f"and elsewhere when another clip sounds" + (f"; not layers {no_audio}" if no_audio else ""),
        "Check that projectors train (identity 9), that keys are visible (positions), and that the LLM had learnt to "
        "look at what stands in the audio's place before its attention was trained away from it.",
    )


# Whether answers come from the audio


@contextmanager
def _silences(records: Sequence[Record], rate: int) -> Iterator[list[Record]]:
    """The same questions with each clip replaced by silence of its length."""
    with TemporaryDirectory(prefix="pal-") as folder:
        made: dict[str, str] = {}
        for path in dict.fromkeys(path for one in records for path in one.clips):
            made[path] = str(Path(folder) / f"{len(made)}.wav")
            frames = max(1, round(audio_io.seconds(path) * rate))
            soundfile.write(made[path], np.zeros(frames, dtype=np.float32), rate, subtype="PCM_16")
        yield [replace(one, clips=tuple(made[path] for path in one.clips)) for one in records]


def swapped(records: Sequence[Record]) -> list[Record]:
    """Each question with another clip: the one half the list of clips further on."""
    clips = list(dict.fromkeys(one.clips for one in records))
    other = {own: clips[(i + max(1, len(clips) // 2)) % len(clips)] for i, own in enumerate(clips)}
    fits = {own: len(own) == len(to) for own, to in other.items()}
    return [replace(one, clips=other[one.clips]) if fits[one.clips] else one for one in records]


def _hearing(model: PalModel, records: Sequence[Record], batch: int) -> tuple[list[dict[str, Any]], Any]:
    """Scores with the right clip, another clip, silence and no clip."""
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
    heard = columns["the right clip"]
    table = []
    for name, values in columns.items():
        lost = [a - b for a, b in zip(heard, values, strict=True)]
        table.append(
            {
                "heard": name,
                "score": float(np.mean(values)),
                "score ci95": bootstrap_ci(values, groups),
                "lost": float(np.mean(lost)),
                "lost ci95": bootstrap_ci(lost, groups),
            }
        )
    return table, quiet


def _no_audio(scores: Sequence[dict[str, Any]]) -> HealthCheck:
    by_name = {row["heard"]: row for row in scores}
    lost = by_name["another clip"]
    low, high = lost["lost ci95"]
    no_audio = low <= 0
    return HealthCheck(
        "deaf",
        "fault" if no_audio else "ok",
        f"another clip instead of the right one costs {lost['lost']:.3f} ({low:.3f} to {high:.3f}); right "
        f"{by_name['the right clip']['score']:.3f}, none {by_name['no audio']['score']:.3f}",
        "Answers do not depend on the clip: look at the other checks first, then train longer, on questions that "
        "cannot be guessed, and see whether the loss falls below what the questions alone allow.",
    )


def _eager(model: PalModel, records: Sequence[Record], quiet: Any, batch: int) -> HealthCheck:
    """Share of "yes" about sounds that are not there, and certainty about silence."""
    name = "over-eager"
    remedy = "Train with silence and with questions about sounds that are not there; ask for 'nothing' as an answer."
    yes_no = [i for i, one in enumerate(records) if one.choices and {c.lower() for c in one.choices} == {"yes", "no"}]
    closed = [one for one in records if one.choices and len(one.choices) > 1]
    measured, eager = [], False
    presence = [quiet[i].output or "" for i in yes_no if records[i].task == "presence"]
    asserted = [answer.strip().lower().startswith("yes") for answer in presence]
    if asserted:
        rate = float(np.mean(asserted))
        eager |= rate >= EAGER
        measured.append(f"says yes to {rate:.0%} of {len(asserted)} questions whether silence holds a sound")
    if closed:
        with _silences(spread(closed, 64), model.sampling_rate) as silent:
            sure = float(np.median(_certainty(model, silent, batch)))
        certain = float(np.median(_certainty(model, spread(closed, 64), batch)))
        eager |= sure >= SURE
        measured.append(f"gives its best choice {sure:.2f} of the probability on silence, {certain:.2f} on the clip")
    if not measured:
        return HealthCheck(name, "does not apply", "no question has choices", remedy)
    return HealthCheck(name, "warning" if eager else "ok", "; ".join(measured), remedy)


def _certainty(model: PalModel, records: Sequence[Record], batch: int) -> list[float]:
    """Probability of the best choice among the choices, for each question."""
    found = []
    for one in records:
        waves = [audio_io.load(path, model.sampling_rate).samples_N for path in one.clips]
        talk = prompts.conversation_of(one, with_answers=False, system=model.config.system)
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
    heard = [row for row in layers if row["relative to uniform"] is not None]
    numbers = [row["layer"] for row in heard]
    left, right = figure.subplots(1, 2)
    for axes, key, label, bound in (
        (left, "relative to uniform", "attention on audio / even", IGNORED),
        (right, "moved by another clip", "moved by another clip", UNMOVED),
    ):
        axes.bar(numbers, [row[key] for row in heard], color=COLOURS[0])
        axes.axhline(bound, color=COLOURS[1], linestyle="--", linewidth=1)
        axes.set(xlabel="layer", ylabel=label, xticks=numbers)
