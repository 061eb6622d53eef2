"""Checks of the layout of audio in the LLM: feed-forward rows, memory, order, positions, decoding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from pal import audio as audio_io
from pal.backbone.audio_keys import AudioKeys
from pal.backbone.audio_mask import TokenSpans
from pal.backbone.context import AudioContext
from pal.backbone.cost import StepSize, decoder
from pal.backbone.observers import count_ffn_rows
from pal.bench.measure import saved_bytes
from pal.clips import ClipFeatures
from pal.data import prompts
from pal.data.manifest import Record
from pal.integrations.cost import route_cost
from pal.types import AUDIO, AudioFeatures, LLMInputs, Tokens

if TYPE_CHECKING:
    from pal.model import PalModel

MEMORY = 0.15
"""Tolerated excess of saved bytes over the closed form, which leaves out masks and other small tensors; their share is
largest in small models."""

Status = Literal["ok", "warning", "fault", "does not apply"]


@dataclass(frozen=True)
class HealthCheck:
    """Result of one check."""

    name: str
    status: Status
    measured: str
    remedy: str
    """Remedy for the fault."""


def layout_checks(model: PalModel, one: Record) -> Iterator[HealthCheck]:
    """Run the checks on the first clip of one record."""
    clip_N = audio_io.load(one.clips[0], model.sampling_rate).samples_N
    row = about_first_clip(model, one)
    features = model.features([clip_N])
    with count_ffn_rows(model.llm) as counts, torch.no_grad():
        inputs = model.inputs([clip_N], [row], with_spans=True)
        model.llm.hidden(inputs)
    yield _feed_forward(model, row, features, counts)
    yield _memory(model, row, features)
    yield order(inputs)
    streams = model.integration.index(features, model.llm, "").streams
    yield gaps(inputs, max(stream.layout.per_position for stream in streams))
    yield _decoding(model, clip_N, row)


def about_first_clip(model: PalModel, one: Record) -> Tokens:
    """The last question and right answer of a record, about its first clip only."""
    turn = one.turns[-1]
    asked = prompts.user_turn(prompts.without_audio(turn.question), 1, model.config.after_clip)
    talk = [asked, {"role": "assistant", "content": turn.answer}]
    return prompts.encode(model.tokenizer, talk, [0], train=True)


def _step(model: PalModel, row: Tokens) -> StepSize:
    assert row.labels is not None
    return StepSize(
        clips=1,
        rows=1,
        text=len(row.ids) - 1,
        targets=sum(label >= 0 for label in row.labels),
        before=row.ids.index(AUDIO),
        integration=True,
    )


def _feed_forward(
    model: PalModel, row: Tokens, features: Sequence[AudioFeatures], counts: Sequence[int]
) -> HealthCheck:
    """Check that only text and the integration's own rows pass through the feed-forward networks."""
    lengths = [stream.lengths[0] for stream in features]
    routes = model.integration.routes()
    step = _step(model, row)
    expected = sum(route_cost(route, step, n, model.llm).rows for route, n in zip(routes, lengths, strict=True))
    text, tokens = len(row.ids) - 1, sum(lengths)
    audio = [count - text for count in counts]
    wrong = [layer for layer, count in enumerate(audio) if count != expected]
    measured = f"{expected} rows for {tokens} audio tokens pass through the feed-forward networks, as in its cost model"
    if wrong:
        measured = (
            f"{audio[wrong[0]]} audio rows reach the feed-forward network of layer {wrong[0]}; "
            f"its cost model has {expected}"
        )
    return HealthCheck(
        "audio in the feed-forward networks",
        "fault" if wrong else "ok",
        measured,
        "Return audio keys in IntegrationOutput.keys, not in rows_USD, and make cost() agree with inject().",
    )


def _memory(model: PalModel, row: Tokens, features: Sequence[AudioFeatures]) -> HealthCheck:
    """Compare the activations saved by a training step, without encoder and connector, with the closed form."""
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    fixed = [replace(stream, x_BAE=stream.x_BAE.detach()) for stream in features]
    step = _step(model, row)
    lengths = [stream.lengths[0] for stream in fixed]
    routes = model.integration.routes()
    added = [route_cost(route, step, n, model.llm) for route, n in zip(routes, lengths, strict=True)]
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
    return HealthCheck(
        "memory",
        "ok" if ratio <= 1 + MEMORY else "warning",
        f"a step saves {measured:,} bytes for the backward pass, {ratio:.2f} times the closed form",
        "Look for audio that enters as rows, and for activations missing in the cost model; pal bench shows where.",
    )


def order(inputs: LLMInputs) -> HealthCheck:
    """Check that a clip's rows and keys are in the order of their times."""
    name = "order of summary tokens and keys"
    remedy = "Place each summary token right after the last token it stands for: Layout.row_offsets and key_offsets."
    context = inputs.audio_context
    if not isinstance(context, AudioContext) or context.token_spans is None:
        return HealthCheck(name, "does not apply", "no audio", remedy)
    wrong = compared = 0
    for b in range(inputs.position_ids_BT.shape[0]):
        rows = _entities(context.token_spans, context.order_BT, b)
        for keys in context.keys:
            assert keys.token_spans is not None
            theirs = _entities(keys.token_spans, keys.order_BA, b)
            for stream, clip, end, place in rows:
                for other_stream, other_clip, other_end, other_place in theirs:
                    if (stream, clip) == (other_stream, other_clip) and keys.blocks is None:
                        compared += 1
                        # a row comes after the tokens it stands for, and before all later ones
                        wrong += (place > other_place) != (other_end <= end + 1e-6)
    if not compared:
        return HealthCheck(name, "does not apply", "audio enters as rows or keys, not both", remedy)
    status: Status = "fault" if wrong else "ok"
    return HealthCheck(name, status, f"{wrong} of {compared} pairs of a row and a key are out of order", remedy)


def _entities(spans: TokenSpans, order_BX: Tensor, b: int) -> list[tuple[int, int, float, int]]:
    """(stream, clip, end in seconds, place) of the audio tokens of one conversation."""
    is_audio = spans.stream_BX[b] >= 0
    columns = (spans.stream_BX, spans.clip_BX, spans.end_BX, order_BX)
    return list(zip(*(column[b][is_audio].tolist() for column in columns), strict=True))


def gaps(inputs: LLMInputs, per_position: int = 1) -> HealthCheck:
    """Check that text after a clip sees all of it, and that positions of text leave a gap for each clip.

    Where they leave none, the clips must lie before the text that follows them.

    Args:
        inputs: of a batch.
        per_position: audio tokens and rows that may share a position (`Layout`).
    """
    name = "gaps in the positions"
    remedy = (
        "Reserve a position id for every audio token and row (Layout.reserved), and pass position_ids and "
        "attention_mask to generate."
    )
    context = inputs.audio_context
    if not isinstance(context, AudioContext) or context.token_spans is None:
        return HealthCheck(name, "does not apply", "no audio", remedy)
    faults: list[str] = []
    reserved = 0
    for b in range(inputs.position_ids_BT.shape[0]):
        is_audio_T = context.token_spans.stream_BX[b] >= 0
        positions_T = inputs.position_ids_BT[b]
        is_text_T = inputs.attention_mask_BT[b].bool() & ~context.audio_rows_BT[b]
        text = positions_T[is_text_T]
        taken = [positions_T[is_audio_T]]
        late = 0
        for keys in context.keys:
            faults += _rope_faults(keys, b, per_position)
            late += int((keys.order_BA[b][keys.mask_BA[b]] > context.order_BT[b][is_text_T][-1]).sum())
            if keys.blocks is None:
                taken.append(keys.rope_positions_BA[b][keys.mask_BA[b]])
        if late:
            faults.append(f"{late} audio tokens lie after the last text token, which never sees them")
        if not late and len(text) == int(text[-1]) + 1:  # no gaps
            faults += _shared_faults(context, positions_T, is_text_T, b)
            continue
        places = torch.cat(taken)
        most = int(places.unique(return_counts=True)[1].max()) if len(places) else 0
        if most > per_position:
            faults.append(f"{most} audio tokens have the same position")
        free = set(range(int(text[-1]))) - set(text.tolist())
        reserved += len(free)
        outside = len(set(places.tolist()) - free)
        if outside:
            faults.append(f"{outside} audio tokens have positions that text does not leave free")
        # an incomplete last group of a clip may leave positions unused, but not the first or last one
        ends = {p for p in free if p - 1 not in free or p + 1 not in free}
        if ends - set(places.tolist()):
            faults.append(f"text leaves {len(free)} positions free for {len(places)} audio tokens")
    if faults:
        return HealthCheck(name, "fault", faults[0], remedy)
    return HealthCheck(
        name, "ok", f"{reserved} positions are reserved for audio, and text after each clip sees all of it", remedy
    )


def _shared_faults(context: AudioContext, positions_T: Tensor, is_text_T: Tensor, b: int) -> Iterator[str]:
    """Message if audio does not lie before the text that follows it."""
    assert context.token_spans is not None
    is_audio_T = context.token_spans.stream_BX[b] >= 0
    parts = [(context.order_BT[b][is_audio_T], positions_T[is_audio_T])]
    for keys in context.keys:
        if keys.blocks is None:
            real_A = keys.mask_BA[b]
            parts.append((keys.order_BA[b][real_A], keys.rope_positions_BA[b][real_A]))
    for order_X, positions_X in parts:
        following_X = torch.searchsorted(context.order_BT[b][is_text_T].contiguous(), order_X.contiguous())
        beyond = int((positions_X >= positions_T[is_text_T][following_X]).sum())
        if beyond:
            yield f"{beyond} audio tokens have positions of the text that follows them"


def _rope_faults(keys: AudioKeys, b: int, per_position: int) -> Iterator[str]:
    """Message if RoPE positions of a clip's keys do not rise with time, so that their order is lost."""
    assert keys.token_spans is not None
    for clip in set(keys.token_spans.clip_BX[b][keys.mask_BA[b]].tolist()):
        own = keys.mask_BA[b] & (keys.token_spans.clip_BX[b] == clip)
        positions_A = keys.rope_positions_BA[b][own]
        if (positions_A.diff() < 0).any() or (positions_A[per_position:] <= positions_A[:-per_position]).any():
            yield "RoPE positions of a clip's keys do not rise with time"


def _decoding(model: PalModel, clip_N: Tensor, row: Tokens, count: int = 8) -> HealthCheck:
    """Compare decoding token by token, with the KV cache, with one full forward pass."""
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
    return HealthCheck(
        "decoding",
        "ok" if same else "fault",
        f"{len(written)} tokens decoded one by one with the cache equal those of one full pass"
        if same
        else f"a token decoded with the cache has a logit {apart:.3g} below the best one of a full pass",
        "Let positions continue from the last one of the prompt, and pass audio K/V to every decoding step.",
    )
