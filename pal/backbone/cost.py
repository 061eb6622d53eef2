"""What a training step of an LLM with audio costs, in closed form.

Counted as torch's FlopCounterMode counts: matrix products only, a multiply-add as two operations, no norms,
activations or rotary embeddings. Attention of the rows to one another is a whole square: a causal kernel saves up to
half of it. Attention to audio is what is computed apart, as on a CPU, or in 16 bits on a GPU; one mask over all keys
computes more, and keeps the mask. Its backward pass is five products, as in fused kernels, which make the scores a
second time.

A product `y = x W` of n rows costs `2 n in out` forward, as much again backward if something before it trains, and
once more if W does. So a frozen LLM still costs a backward pass from the first layer on into which a gradient has to
reach, and none before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from pal.backbone.finetuning import LLMPart
from pal.backbone.llm import Backbone

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class Cost:
    """Operations, and bytes that the forward pass keeps for the backward pass."""

    forward: float = 0.0
    backward: float = 0.0
    saved: float = 0.0
    again: float = 0.0
    """Bytes on top of these at the fullest moment of the backward pass, while something is computed again."""

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.forward + other.forward,
            self.backward + other.backward,
            self.saved + other.saved,
            max(self.again, other.again),
        )

    def times(self, factor: float) -> Cost:
        """So many of them at once."""
        return Cost(self.forward * factor, self.backward * factor, self.saved * factor, self.again * factor)


def total(costs: Iterable[Cost]) -> Cost:
    """The sum."""
    done = Cost()
    for cost in costs:
        done = done + cost
    return done


@dataclass(frozen=True)
class StepSize:
    """Batch shape and training settings that a step's cost depends on."""

    clips: int
    """U, distinct clips."""
    rows: int
    """B, conversations, each about one clip."""
    text: int
    """Text tokens of a conversation."""
    targets: int
    """Tokens of a conversation that are trained."""
    before: int = 0
    """Text tokens that stand before the clip, and do not see its keys."""
    llm: LLMPart = "none"
    """What of the LLM trains."""
    integration: bool = False
    """Whether the integration's own weights train."""
    features: bool = False
    """Whether a gradient has to reach the features: connector or encoder train."""
    checkpointing: bool = False
    """Whether layers are computed again in the backward pass."""
    recompute: bool = True
    """Whether a layer's audio K/V are made again in the backward pass; `checkpointing` does so in any case."""
    autocast: bool = False
    """Whether matrix products run in two bytes whatever the weights are."""

    @property
    def rest(self) -> bool:
        """Whether norms, embeddings and head of the LLM train."""
        return self.llm in ("full", "no_ffn")

    @property
    def own_bytes(self) -> int:
        """Of a number in the integration's matrix products; its weights have four."""
        return 2 if self.autocast else 4


@dataclass(frozen=True)
class AddedLayerCost:
    """What a route adds to one layer."""

    keys: int
    """K/V pairs of a clip."""
    grad: bool = False
    """Whether they need gradients."""
    pairs: float | None = None
    """Of a row and a key that attention computes in a conversation; None where every row from the clip on sees all."""
    making: Cost = field(default_factory=Cost)
    """Of making them in the layer, where gradient checkpointing drops what is kept and makes it again."""
    last: float = 0.0
    """Operations of its last products, which need not be made again, since nothing is kept of what they give."""
    block: Callable[[bool, int], Cost] | None = None
    """Of a network before the layer that looks at the keys in the layer's place, given whether the rows that go into
    it need gradients, and T, the rows of a conversation."""

    def recomputed(self) -> AddedLayerCost:
        """The same where what making it keeps is dropped and made again in the backward pass."""
        again = (self.making.forward - self.last) * self.grad
        return replace(self, making=Cost(self.making.forward, self.making.backward + again))


@dataclass(frozen=True)
class AddedCost:
    """What a route adds to a step: rows of the sequence, keys and values in some layers, and the work to make both."""

    rows: int = 0
    """Rows of a clip, in every layer."""
    rows_grad: bool = False
    """Whether they need gradients."""
    making: Cost = field(default_factory=Cost)
    """Of what is made before the first layer."""
    layers: Mapping[int, AddedLayerCost] = field(default_factory=dict)


def linear(
    rows: int, inputs: int, outputs: int, x_grad: bool, trained: bool, size: int = 4, kept: bool = False
) -> Cost:
    """A product of `rows` rows with a matrix.

    Args:
        rows: n.
        inputs: width of x.
        outputs: width of y.
        x_grad: whether x needs a gradient.
        trained: whether the matrix does.
        size: bytes of a number.
        kept: whether something else keeps x already.
    """
    once = 2.0 * rows * inputs * outputs
    saved = rows * inputs * size if trained and not kept else 0
    return Cost(once, once * (x_grad + trained), saved)


def attention(batch: int, heads: int, queries: int, keys: float, width: int, grad: bool) -> Cost:
    """Scaled dot-product attention: two products forward, five backward. What it keeps is counted by the caller."""
    product = 2.0 * batch * heads * queries * keys * width
    return Cost(2 * product, 5 * product * grad)


def kv_bytes(llm: Backbone, added: Iterable[AddedCost], size: int) -> int:
    """Bytes of keys and values of one clip while an answer is made: its own and those of its rows."""
    pairs = sum(llm.n_layers * one.rows + sum(layer.keys for layer in one.layers.values()) for one in added)
    return 2 * llm.kv_heads * llm.head_width * size * pairs


def project_kv(llm: Backbone, step: StepSize, tokens: int, making: Cost, u_grad: bool) -> AddedLayerCost:
    """`Backbone.project_kv` of clips of so many tokens, on top of what `u` costs in the layer."""
    rows, shared = step.clips * tokens, _kv_width(llm)
    normed = u_grad or step.rest
    keys, keys_grad = _matrix(llm, step, "k_proj", rows, llm.width, shared, normed)
    values, values_grad = _matrix(llm, step, "v_proj", rows, llm.width, shared, normed, kept=True)
    kept = rows * shared * 4 * (normed + step.rest) if llm.key_norm else 0
    last = _last(llm, "v_proj", rows) if values_grad else values.forward
    if not values_grad and not llm.key_norm:
        last += _last(llm, "k_proj", rows)
    making = making + _norm(llm, step, rows, u_grad) + keys + values + Cost(saved=kept)
    return AddedLayerCost(keys=tokens, grad=keys_grad or values_grad, making=making, last=last)


def _last(llm: Backbone, name: str, rows: int) -> float:
    """Operations of the last product of k_proj or v_proj: its own, or that of the adapter's second matrix."""
    adapted = llm.lora is not None and name in llm.lora.targets
    inputs = llm.lora.r if adapted and llm.lora is not None else llm.width
    return 2.0 * rows * inputs * _kv_width(llm)


def self_attend(llm: Backbone, step: StepSize, tokens: int, u_grad: bool) -> tuple[Cost, bool]:
    """`Backbone.self_attend` of clips of so many tokens, and whether the result needs gradients."""
    rows = step.clips * tokens
    cost, out_grad = _attention_block(llm, step, step.clips, tokens, 0, rows, u_grad, keys_grad=False)
    return cost, u_grad or out_grad


def decoder(llm: Backbone, step: StepSize, added: Sequence[AddedCost]) -> Cost:
    """The LLM over the rows of a step, and all that the routes add to it."""
    length = step.text + sum(one.rows for one in added)
    grad = step.rest or any(one.rows_grad for one in added)
    cost = total(one.making for one in added)
    largest = 0.0
    for layer in range(llm.n_layers):
        parts = [one.layers[layer] for one in added if layer in one.layers]
        for part in parts:
            if part.block is not None:
                cost = cost + part.block(grad, length)
                grad = grad or part.grad or step.integration
        joined = [part for part in parts if part.block is None]
        if step.recompute and not step.checkpointing:
            largest = max(largest, sum(part.making.saved for part in joined))
            joined = [part.recomputed() for part in joined]
        own, grad = _layer(llm, step, length, joined, grad)
        if step.checkpointing and grad:
            # the last product of the layer need not be made again: nothing is kept of its result
            again = own.forward - 2.0 * step.rows * length * llm.ffn_width * llm.width
            largest = max(largest, own.saved)
            own = Cost(own.forward, own.backward + again, step.rows * length * llm.width * llm.dtype.itemsize)
        cost = cost + own
    return cost + Cost(again=largest) + _norm(llm, step, step.rows * length, grad) + _head(llm, step, grad)


def _layer(
    llm: Backbone, step: StepSize, length: int, joined: Sequence[AddedLayerCost], x_grad: bool
) -> tuple[Cost, bool]:
    """One layer, with the making of the keys that join its own; and whether its result needs gradients."""
    rows = step.rows * length
    keys = sum(part.keys for part in joined)
    pairs = sum((length - step.before) * part.keys if part.pairs is None else part.pairs for part in joined)
    keys_grad = any(part.grad for part in joined)
    attended, heard = _attention_block(llm, step, step.rows, length, keys, rows, x_grad, keys_grad, pairs)
    middle = x_grad or heard
    normed = middle or step.rest
    D, F = llm.width, llm.ffn_width
    gate, gate_grad = _matrix(llm, step, "gate_proj", rows, D, F, normed)
    up, up_grad = _matrix(llm, step, "up_proj", rows, D, F, normed, kept=True)
    inner = gate_grad or up_grad
    down, down_grad = _matrix(llm, step, "down_proj", rows, F, D, inner)
    # what the gate's activation takes, what it gives, and what it is multiplied with
    kept = Cost(saved=3 * rows * F * _size(llm, step) * inner)
    parts = [attended, _norm(llm, step, rows, middle), gate, up, down, kept, *(part.making for part in joined)]
    return total(parts), middle or down_grad


def _attention_block(
    llm: Backbone,
    step: StepSize,
    batch: int,
    length: int,
    keys: int,
    rows: int,
    x_grad: bool,
    keys_grad: bool,
    pairs: float = 0.0,
) -> tuple[Cost, bool]:
    """Norm, projections, attention of `length` rows to themselves and to more keys; whether the result needs grads."""
    D, inner, shared = llm.width, llm.heads * llm.head_width, _kv_width(llm)
    normed = x_grad or step.rest
    q, q_grad = _matrix(llm, step, "q_proj", rows, D, inner, normed)
    k, k_grad = _matrix(llm, step, "k_proj", rows, D, shared, normed, kept=True)
    v, v_grad = _matrix(llm, step, "v_proj", rows, D, shared, normed, kept=True)
    heard = q_grad or k_grad or v_grad or keys_grad
    mixed = attention(batch, llm.heads, 1, length * length + pairs, llm.head_width, heard)
    # its result is laid out as the output projection takes it
    out, out_grad = _matrix(llm, step, "o_proj", rows, inner, D, heard, kept=True)
    size = _size(llm, step)
    kept = batch * (2 * length * inner + 2 * (length + keys) * shared) * size + 4 * batch * llm.heads * length
    if llm.key_norm:
        kept += rows * (inner + shared) * 4 * (1 + step.rest)
    parts = [_norm(llm, step, rows, x_grad), q, k, v, mixed, out, Cost(saved=kept * heard)]
    return total(parts), out_grad


def _head(llm: Backbone, step: StepSize, x_grad: bool) -> Cost:
    """Logits of the rows that predict a trained token, and their loss."""
    rows = step.rows * step.targets
    full = step.rest
    # the logarithms of their softmax, and the logits where those are of another type
    size = _size(llm, step)
    logits = rows * llm.vocab * (4 + size * (size != 4))
    return linear(rows, llm.width, llm.vocab, x_grad or full, full, _size(llm, step)) + Cost(saved=logits)


def _matrix(
    llm: Backbone, step: StepSize, name: str, rows: int, inputs: int, outputs: int, x_grad: bool, kept: bool = False
) -> tuple[Cost, bool]:
    """One of a layer's linear layers with its adapter, and whether its result needs gradients."""
    trained = step.llm == "full" or (step.llm in ("attention", "no_ffn") and name in _ATTENTION)
    size = _size(llm, step)
    # autocast makes a copy of x for each product, and one of the matrix
    copied = step.autocast and llm.dtype.itemsize > size
    cost = linear(rows, inputs, outputs, x_grad, trained, size, kept and not copied)
    if copied and (x_grad or trained):
        cost = cost + Cost(saved=inputs * outputs * size)
    if llm.lora is None or name not in llm.lora.targets:
        return cost, x_grad or trained
    adapts = trained or step.llm == "lora"
    rank = llm.lora.r
    narrow = linear(rows, inputs, rank, x_grad, adapts, step.own_bytes)
    wide = linear(rows, rank, outputs, x_grad or adapts, adapts, step.own_bytes)
    return cost + narrow + wide, x_grad or trained or adapts


def _norm(llm: Backbone, step: StepSize, rows: int, x_grad: bool) -> Cost:
    """What a norm keeps: its input in float32, and the normed one where its weight trains."""
    full = step.rest
    return Cost(saved=rows * llm.width * (4 * (x_grad or full) + llm.dtype.itemsize * full) * llm.norms_each)


def _size(llm: Backbone, step: StepSize) -> int:
    return min(llm.dtype.itemsize, 2 if step.autocast else 4)


def _kv_width(llm: Backbone) -> int:
    return llm.kv_heads * llm.head_width
