"""`pal probe health`: the faults that an audio LLM can have and still answer, each looked for, each with a remedy.

They are those that readers of the paper list: attention that ignores audio, audio rows that reach the feed-forward
networks, summaries out of order, positions without the gap, and models that do not listen at all or answer whatever
they hear.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import soundfile
import torch
from torch import Tensor
from tqdm import tqdm

from pal import audio as audio_io
from pal.backbone.audio_keys import AudioKeys
from pal.backbone.audio_mask import Places
from pal.backbone.context import AudioContext
from pal.backbone.cost import Step, decoder
from pal.backbone.observers import count_ffn_rows
from pal.bench.measure import saved_bytes
from pal.clips import ClipFeatures
from pal.data import prompts
from pal.data.manifest import Record
from pal.errors import PalError
from pal.evaluate import evaluate
from pal.evaluate.runner import evaluation_mode
from pal.evaluate.scorers import bootstrap_ci
from pal.probe.finding import Finding, Plot, about
from pal.probe.material import spread
from pal.probe.record import PATHWAYS, record
from pal.types import AUDIO, AudioFeatures, LLMInputs, Tokens

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from pal.model import PalModel

Status = Literal["ok", "warning", "fault", "does not apply"]

IGNORED = 0.05
"""Of what even attention would give: a layer that gives audio less ignores it."""
UNMOVED = 0.01
"""Total variation between the attention to a clip and to another one below which a layer looks wherever it looks
whatever sounds."""
MEMORY = 0.15
"""Saved bytes beyond the closed form, as a share of it, that are put down to masks and other small things that it does
not count; they weigh most in small models."""
EAGER = 0.5
"""Share of yes to "is there ...?" asked of silence from which on a model is over-eager."""
SURE = 0.9
"""Median probability of the best choice, asked of silence, from which on a model is over-eager."""
_LISTENED = 24
"""Clips whose attention is compared with that to another clip."""


@dataclass(frozen=True)
class Check:
    """One thing that can be wrong."""

    name: str
    status: Status
    measured: str
    remedy: str
    """What to do where it is wrong."""


def probe_health(model: PalModel, records: Sequence[Record], batch: int = 32, progress: bool = False) -> Finding:
    """Every check on one model.

    Args:
        model: trained, or not: an untrained one is deaf.
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
        checks = list(_structure(model, asked[0]))
        bar.update()
        layers = _listening(model, spread(asked, _LISTENED))
        checks.append(_ignoring(layers))
        bar.update()
        scores, items = _hearing(model, asked, batch)
        checks.append(_deaf(scores))
        bar.update()
        checks.append(_eager(model, asked, items, batch))
        bar.update()
    bad = [check for check in checks if check.status in ("fault", "warning")]
    reading = [f"{check.name}: {check.measured}. {check.remedy}" for check in bad]
    return Finding(
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


# How the audio is laid out


def _structure(model: PalModel, one: Record) -> Iterator[Check]:
    clip_N = audio_io.load(one.clips[0], model.sampling_rate).samples_N
    row = _about_one_clip(model, one)
    features = model.features([clip_N])
    with count_ffn_rows(model.llm) as counts, torch.no_grad():
        inputs = model.inputs([clip_N], [row], located=True)
        model.llm.hidden(inputs)
    yield _feed_forward(model, row, features, counts)
    yield _memory(model, row, features)
    yield order(inputs)
    yield gaps(inputs)
    yield _decoding(model, clip_N, row)


def _about_one_clip(model: PalModel, one: Record) -> Tokens:
    """A record's last question and right answer, about its first clip."""
    turn = one.turns[-1]
    talk = [prompts.user_turn(prompts.without_audio(turn.question), 1), {"role": "assistant", "content": turn.answer}]
    return prompts.encode(model.tokenizer, talk, [0], train=True)


def _step(model: PalModel, row: Tokens) -> Step:
    assert row.labels is not None
    return Step(
        clips=1,
        rows=1,
        text=len(row.ids) - 1,
        targets=sum(label >= 0 for label in row.labels),
        before=row.ids.index(AUDIO),
        integration=True,
    )


def _feed_forward(model: PalModel, row: Tokens, features: Sequence[AudioFeatures], counts: Sequence[int]) -> Check:
    """Rows counted in the networks, against the text and the rows that the integration says it adds."""
    lengths = [stream.lengths[0] for stream in features]
    routes = model.integration.routes()
    step = _step(model, row)
    said = sum(route.cost(step, n, model.llm).rows for route, n in zip(routes, lengths, strict=True))
    text, tokens = len(row.ids) - 1, sum(lengths)
    audio = [count - text for count in counts]
    wrong = [layer for layer, count in enumerate(audio) if count != said]
    measured = f"{said} rows for {tokens} audio tokens go through the feed-forward networks, as the integration says"
    if wrong:
        measured = (
            f"{audio[wrong[0]]} audio rows reach the feed-forward network of layer {wrong[0]}; "
            f"the integration says {said}"
        )
    return Check(
        "audio in the feed-forward networks",
        "fault" if wrong else "ok",
        measured,
        "Audio that is meant as keys must be ClipSpans.keys, not rows_USD; make Route.cost say what spans() does.",
    )


def _memory(model: PalModel, row: Tokens, features: Sequence[AudioFeatures]) -> Check:
    """Bytes that a step on the LLM keeps, encoder and connector aside, against the closed form."""
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    fixed = [replace(stream, x_BAE=stream.x_BAE.detach()) for stream in features]
    step = _step(model, row)
    lengths = [stream.lengths[0] for stream in fixed]
    routes = model.integration.routes()
    added = [route.cost(step, n, model.llm) for route, n in zip(routes, lengths, strict=True)]
    try:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith("integration."))
        with torch.enable_grad():
            measured = saved_bytes(
                lambda: model.llm.loss(model.inputs(ClipFeatures(fixed), [row]))[0],
                [*model.parameters(), *model.buffers()],
            )
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained[name])
    expected = decoder(model.llm, step, added).saved
    ratio = measured / expected
    return Check(
        "memory",
        "ok" if ratio <= 1 + MEMORY else "warning",
        f"a step keeps {measured:,} bytes for the backward pass, {ratio:.2f} times the closed form",
        "Look for audio that is kept as rows, or for activations that Route.cost does not name; pal bench shows where.",
    )


def order(inputs: LLMInputs) -> Check:
    """Whether rows of a clip and its keys follow one another by position as they do in time."""
    name = "order of summaries and tokens"
    remedy = "Put each summary right after the last token it sums up: Layout.row_offsets and key_offsets."
    context = inputs.audio
    if not isinstance(context, AudioContext) or context.places is None:
        return Check(name, "does not apply", "no audio", remedy)
    wrong = compared = 0
    for b in range(inputs.position_ids_BT.shape[0]):
        rows = _entities(context.places, inputs.position_ids_BT, b)
        for keys in context.keys:
            assert keys.places is not None
            theirs = _entities(keys.places, keys.positions_BA, b)
            for stream, clip, end, position in rows:
                for other_stream, other_clip, other_end, other_position in theirs:
                    if (stream, clip) == (other_stream, other_clip) and keys.blocks is None:
                        compared += 1
                        # a row comes after the tokens it sums up, and before all later ones
                        wrong += (position > other_position) != (other_end <= end + 1e-6)
    if not compared:
        return Check(name, "does not apply", "audio enters as rows or as keys, not as both", remedy)
    status: Status = "fault" if wrong else "ok"
    return Check(name, status, f"{wrong} of {compared} pairs of a row and a key are out of order", remedy)


def _entities(places: Places, positions_BX: Tensor, b: int) -> list[tuple[int, int, float, int]]:
    """(stream, clip, end in seconds, position) of the audio of one conversation."""
    is_audio = places.stream_BX[b] >= 0
    columns = (places.stream_BX, places.clip_BX, places.end_BX, positions_BX)
    return list(zip(*(column[b][is_audio].tolist() for column in columns), strict=True))


def gaps(inputs: LLMInputs) -> Check:
    """Whether text after a clip stands where it would after as many ordinary tokens, and sees all of the clip."""
    name = "gaps in the positions"
    remedy = (
        "Reserve a position id for every audio token and row (Layout.span), give generate the position ids, and never "
        "let attention_mask be None."
    )
    context = inputs.audio
    if not isinstance(context, AudioContext) or context.places is None:
        return Check(name, "does not apply", "no audio", remedy)
    faults: list[str] = []
    reserved = 0
    for b in range(inputs.position_ids_BT.shape[0]):
        is_audio_T = context.places.stream_BX[b] >= 0
        positions_T = inputs.position_ids_BT[b]
        text = positions_T[inputs.attention_mask_BT[b].bool() & ~is_audio_T]
        taken = [positions_T[is_audio_T]]
        for keys in context.keys:
            own = keys.positions_BA[b][keys.mask_BA[b]]
            faults += _turns(keys, b)
            late = int((own > text[-1]).sum())
            if late:
                faults.append(f"{late} audio tokens lie after the last text, which never sees them")
            if keys.blocks is None:
                taken.append(own)
        places = torch.cat(taken)
        if len(places.unique()) != len(places):
            faults.append("two audio tokens have the same position")
        free = set(range(int(text[-1]))) - set(text.tolist())
        reserved += len(free)
        outside = len(set(places.tolist()) - free)
        if outside:
            faults.append(f"{outside} audio tokens have positions that text does not leave free for them")
        # within a clip a last, incomplete group may leave some unused, but not at its ends
        ends = {p for p in free if p - 1 not in free or p + 1 not in free}
        if ends - set(places.tolist()):
            faults.append(f"text leaves {len(free)} positions free for {len(places)} audio tokens")
    if faults:
        return Check(name, "fault", faults[0], remedy)
    return Check(
        name, "ok", f"{reserved} positions are reserved for audio, and text after a clip sees all of it", remedy
    )


def _turns(keys: AudioKeys, b: int) -> Iterator[str]:
    """Keys of a clip must be turned by different positions that rise with time, or their order is lost."""
    assert keys.places is not None
    for clip in set(keys.places.clip_BX[b][keys.mask_BA[b]].tolist()):
        own = keys.mask_BA[b] & (keys.places.clip_BX[b] == clip)
        if (keys.turns_BA[b][own].diff() <= 0).any():
            yield "keys of a clip are turned by positions that do not rise with time"


def _decoding(model: PalModel, clip_N: Tensor, row: Tokens, count: int = 8) -> Check:
    """Token by token with the cache, against one full pass."""
    assert row.labels is not None
    prompt = row.ids[: next(i for i, label in enumerate(row.labels) if label >= 0)]
    inputs = model.inputs([clip_N], [Tokens(prompt, [0])], padding_side="left")
    made = model.llm.generate(inputs, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0)
    written = made[0].tolist()
    with torch.no_grad():
        whole = model.inputs([clip_N], [Tokens(prompt + written, [0])])
        logits_NV = model.llm(whole).logits[0, -len(written) - 1 : -1]
    best = logits_NV.max(-1).values
    chosen = logits_NV[torch.arange(len(written)), torch.tensor(written)]
    apart = float((best - chosen).max())
    same = apart <= 1e-3
    return Check(
        "decoding",
        "ok" if same else "fault",
        f"{len(written)} tokens written one by one with the cache are those of one full pass"
        if same
        else f"a token written with the cache has a logit {apart:.3g} below the best one of a full pass",
        "Positions must go on from the prompt's last one, and audio K/V must reach every decoding step.",
    )


# Whether layers listen


def _listening(model: PalModel, records: Sequence[Record]) -> list[dict[str, Any]]:
    """By layer: attention on audio by what even attention would give, and how far it moves with another clip."""
    shares, moves = [], []
    for one, instead in zip(records, swapped(records), strict=True):
        clip_N, other_N = (audio_io.load(it.clips[0], model.sampling_rate).samples_N for it in (one, instead))
        row = _about_one_clip(model, one)
        # of the same length, so that tokens can be compared one by one
        both = [clip_N, other_N.repeat(-(-len(clip_N) // len(other_N)))[: len(clip_N)]]
        right, wrong = record(model, both, [row, replace(row, clips=[1])])
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
            found.append({"layer": layer, "times even": None, "moved by another clip": None})
            continue
        moved = [float(x[layer]) for x in moves]
        found.append(
            {
                "layer": layer,
                "times even": float(np.mean(share)),
                "times even ci95": bootstrap_ci(share),
                "moved by another clip": float(np.mean(moved)),
                "moved by another clip ci95": bootstrap_ci(moved),
            }
        )
    return found


def _ignoring(layers: Sequence[dict[str, Any]]) -> Check:
    heard = [row for row in layers if row["times even"] is not None]
    deaf = [row["layer"] for row in heard if row["times even"] < IGNORED or row["moved by another clip"] < UNMOVED]
    status: Status = "ok" if not deaf else "fault" if len(deaf) == len(heard) else "warning"
    return Check(
        "attention that ignores audio",
        status if heard else "does not apply",
        f"{len(heard) - len(deaf)} of {len(heard)} layers with audio look at it, and elsewhere when another clip sounds"
        + (f"; not layers {deaf}" if deaf else ""),
        "Check that projectors train (identity 9), that keys are visible (positions), and that the LLM had learnt to "
        "look at what stands in the audio's place before its attention was trained away from it.",
    )


# Whether answers come from the audio


@contextmanager
def _silences(records: Sequence[Record], rate: int) -> Iterator[list[Record]]:
    """The same questions about silence as long as their clips."""
    with TemporaryDirectory(prefix="pal-") as folder:
        made: dict[str, str] = {}
        for path in dict.fromkeys(path for one in records for path in one.clips):
            made[path] = str(Path(folder) / f"{len(made)}.wav")
            frames = max(1, round(audio_io.seconds(path) * rate))
            soundfile.write(made[path], np.zeros(frames, dtype=np.float32), rate, subtype="PCM_16")
        yield [replace(one, clips=tuple(made[path] for path in one.clips)) for one in records]


def swapped(records: Sequence[Record]) -> list[Record]:
    """Each question about the clips of another one: those half the list of clips further on."""
    clips = list(dict.fromkeys(one.clips for one in records))
    other = {own: clips[(i + max(1, len(clips) // 2)) % len(clips)] for i, own in enumerate(clips)}
    fits = {own: len(own) == len(to) for own, to in other.items()}
    return [replace(one, clips=other[one.clips]) if fits[one.clips] else one for one in records]


def _hearing(model: PalModel, records: Sequence[Record], batch: int) -> tuple[list[dict[str, Any]], Any]:
    """Scores with the right clip, another one, silence and none."""
    right = evaluate(model, records, no_audio=True, batch=batch, progress=False).items
    other = evaluate(model, swapped(records), no_audio=False, batch=batch, progress=False).items
    with _silences(records, model.sampling_rate) as silent:
        quiet = evaluate(model, silent, no_audio=False, batch=batch, progress=False).items
    groups = [item.group for item in right]
    columns = {
        "the right clip": [float(item.correct) for item in right],
        "another clip": [float(item.correct) for item in other],
        "silence": [float(item.correct) for item in quiet],
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


def _deaf(scores: Sequence[dict[str, Any]]) -> Check:
    by_name = {row["heard"]: row for row in scores}
    lost = by_name["another clip"]
    low, high = lost["lost ci95"]
    deaf = low <= 0
    return Check(
        "deaf",
        "fault" if deaf else "ok",
        f"another clip instead of the right one costs {lost['lost']:.3f} ({low:.3f} to {high:.3f}); right "
        f"{by_name['the right clip']['score']:.3f}, none {by_name['no audio']['score']:.3f}",
        "Answers do not depend on the clip: look at the other checks first, then train longer, on questions that "
        "cannot be guessed, and see whether the loss falls below what the questions alone allow.",
    )


def _eager(model: PalModel, records: Sequence[Record], quiet: Any, batch: int) -> Check:
    """Yes to what is not there, and certainty about silence."""
    name = "over-eager"
    remedy = "Train with silence and with questions about sounds that are not there; ask for 'nothing' as an answer."
    yes_no = [i for i, one in enumerate(records) if one.choices and {c.lower() for c in one.choices} == {"yes", "no"}]
    closed = [one for one in records if one.choices and len(one.choices) > 1]
    measured, eager = [], False
    asserted = [quiet[i].prediction.strip().lower().startswith("yes") for i in yes_no if records[i].task == "presence"]
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
        return Check(name, "does not apply", "no question has choices", remedy)
    return Check(name, "warning" if eager else "ok", "; ".join(measured), remedy)


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
    heard = [row for row in layers if row["times even"] is not None]
    numbers = [row["layer"] for row in heard]
    left, right = figure.subplots(1, 2)
    for axes, key, label, bound in (
        (left, "times even", "attention on audio / even", IGNORED),
        (right, "moved by another clip", "moved by another clip", UNMOVED),
    ):
        axes.bar(numbers, [row[key] for row in heard], color="#0b6e99")
        axes.axhline(bound, color="#a11212", linestyle="--", linewidth=1)
        axes.set(xlabel="layer", ylabel=label, xticks=numbers)
