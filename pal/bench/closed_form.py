"""Closed-form cost of a variant's phase: `pal/backbone/cost.py`, `pal/integrations/cost.py`, and the peers'.

Prefill is the forward pass of a step that trains nothing. Decoding a token is the forward pass of one row that attends
to all earlier keys and values, of text and of audio, which are in the cache.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace

from pal.backbone.cost import AddedCost, AddedLayerCost, Cost, StepSize, attention, decoder, kv_bytes, linear, total
from pal.backbone.llm import Backbone
from pal.bench.models import AttachedModel, BenchModel
from pal.bench.peers import Mllama, PlainLLM, Qwen2Audio, cross_layers
from pal.bench.presets import Phase, Preset
from pal.bench.scene import BenchScene
from pal.integrations.cost import route_cost


@dataclass(frozen=True)
class ClosedForm:
    """Closed-form numbers to compare with measured ones."""

    flops: float
    saved_bytes: float
    kv_bytes: float
    """Bytes of keys and values kept while decoding; 0 in a training step."""
    rows: int = 0
    """Rows that clips add to the LLM's sequence; 0 where audio enters as keys and values alone."""


def closed_form(subject: BenchModel, scene: BenchScene, preset: Preset, phase: Phase) -> ClosedForm:
    """Closed form of one phase of a variant. A ragged scene's is the sum over its rows, without padding."""
    if scene.ragged is not None:
        rows = [closed_form(subject, row, preset, phase) for row in scene.alone()]
        return ClosedForm(*(sum(numbers) for numbers in zip(*map(astuple, rows), strict=True)))
    trains = phase == "train"
    llm, size = subject.llm, subject.llm.dtype.itemsize
    step = StepSize(
        clips=scene.batch,
        rows=scene.batch,
        text=scene.text_tokens,
        before=scene.before,
        targets=scene.answer if trains else 1,
        llm="full" if trains and preset.train == "joint" else "none",
        integration=trains,
        # in two bytes as with autocast, where the weights have two
        autocast=size == 2,
    )
    extra = Cost()
    if isinstance(subject, Qwen2Audio) and scene.frames is not None and not phase.startswith("decode"):
        # its own forward pass makes logits of every row, and projects windows in full before it drops what is empty
        step = replace(step, targets=scene.text_tokens + scene.audio_tokens)
        window = preset.encoder["max_source_positions"] // 2
        empty = len(scene.frames.lengths) * window - scene.batch * scene.audio_tokens
        extra = linear(empty, preset.width, llm.width, False, step.integration, step.own_bytes)
    added = _added(subject, step, scene.audio_tokens, preset.width)
    encoding = _encoder_flops(scene, preset) if added else 0.0
    text_kv = 2 * llm.kv_heads * llm.head_width * size * llm.n_layers * scene.text_tokens
    kept = scene.batch * (text_kv + kv_bytes(llm, added, size))
    added_rows = scene.batch * sum(one.rows for one in added)
    if phase.startswith("decode"):
        return ClosedForm(_token(subject, scene, preset.width), 0.0, kept, added_rows)
    cost = decoder(llm, step, added) + extra
    if trains:
        return ClosedForm(encoding + cost.forward + cost.backward, cost.saved, 0.0, added_rows)
    return ClosedForm(encoding + cost.forward, 0.0, kept, added_rows)


def _token(subject: BenchModel, scene: BenchScene, width: int) -> float:
    """FLOPs of decoding one row of each conversation, with the clips' keys and values in the cache."""
    llm = subject.llm
    step = StepSize(clips=0, rows=scene.batch, text=1, targets=1)
    added = _added(subject, step, scene.audio_tokens, width)
    earlier = scene.text_tokens + sum(one.rows for one in added)
    rows = attention(scene.batch, llm.heads, 1, earlier, llm.head_width, grad=False).times(llm.n_layers)
    return (decoder(llm, step, [_with_keys_made(one) for one in added]) + rows).forward


def _with_keys_made(one: AddedCost) -> AddedCost:
    """Cost left for later rows: the keys are made, and each is attended to."""
    layers = {layer: replace(part, pairs=None) for layer, part in one.layers.items()}
    return replace(one, rows=0, making=Cost(), layers=layers)


def _added(subject: BenchModel, step: StepSize, tokens: int, width: int) -> list[AddedCost]:
    """Cost added by clips of so many tokens of that width; nothing for text alone."""
    llm = subject.llm
    if isinstance(subject, AttachedModel):
        return [route_cost(route, step, tokens, llm) for route in subject.routes()]
    if isinstance(subject, Qwen2Audio):
        return [AddedCost(rows=tokens, rows_grad=step.integration, making=_projected(step, tokens, width, llm))]
    if isinstance(subject, Mllama):
        return [_mllama(step, tokens, width, llm)]
    assert isinstance(subject, PlainLLM)
    # the rows and the projector are those of PLITS
    return [] if subject.route is None else [route_cost(subject.route, step, tokens, llm)]


def _projected(step: StepSize, tokens: int, width: int, llm: Backbone) -> Cost:
    """Projector of transformers' models: one linear layer."""
    return linear(step.clips * tokens, width, llm.width, step.features, step.integration, step.own_bytes)


def _mllama(step: StepSize, tokens: int, width: int, llm: Backbone) -> AddedCost:
    """A layer of cross-attention before the last of each group of the LLM's layers."""
    audio = step.clips * tokens
    D, F, inner, shared = llm.width, llm.ffn_width, llm.heads * llm.head_width, llm.kv_heads * llm.head_width
    own, size = step.integration, step.own_bytes

    def block(x_grad: bool, rows: int) -> Cost:
        mixed = x_grad or own
        return total(
            [
                linear(audio, D, shared, own, own, size),
                linear(audio, D, shared, own, own, size, kept=True),
                linear(rows, D, inner, mixed, own, size),
                attention(1, llm.heads, rows, tokens, llm.head_width, mixed),
                linear(rows, inner, D, mixed, own, size, kept=True),
                linear(rows, D, F, mixed, own, size),
                linear(rows, D, F, mixed, own, size, kept=True),
                linear(rows, F, D, mixed, own, size),
                # queries and what attention gives, keys and values repeated for every head, the mask; what the
                # activation takes, gives, and is multiplied with; the inputs of both gates; both norms, and those of
                # queries and keys
                Cost(saved=(2 * rows * inner + 2 * audio * inner + rows * tokens) * size * mixed),
                Cost(saved=(3 * rows * F + 2 * rows * D) * size * mixed),
                Cost(saved=(2 * rows * D + rows * inner + audio * shared) * (4 + size * own) * mixed),
            ]
        )

    places = [layer - number for number, layer in enumerate(cross_layers(llm.n_layers))]
    # before the LLM's layer of that number; with fewer layers than a group has, after the last, which costs the same
    return AddedCost(
        making=_projected(step, tokens, width, llm),
        layers={min(place, llm.n_layers - 1): AddedLayerCost(keys=tokens, grad=own, block=block) for place in places},
    )


def _encoder_flops(scene: BenchScene, preset: Preset) -> float:
    """FLOPs of the frozen encoder over full windows: two convolutions, then layers."""
    if scene.frames is None:
        return 0.0
    shape = preset.encoder
    D, F, M = shape["hidden_size"], shape["intermediate_size"], shape["num_mel_bins"]
    T = shape["max_source_positions"]
    convolved = 2 * T * M * 3 * D + T * D * 3 * D
    layer = T * (4 * D * D + 2 * D * F) + 2 * T * T * D
    return 2.0 * len(scene.frames.lengths) * (convolved + shape["num_hidden_layers"] * layer)
