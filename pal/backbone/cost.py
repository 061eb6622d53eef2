"""What a training step of an LLM with audio costs, in closed form.

Counted as torch's FlopCounterMode counts: matrix products only, a multiply-add as two operations, no norms,
activations or rotary embeddings. Attention among the rows counts the full square [T, T]; a causal kernel saves up to
half of it. Attention to audio is counted as computed separately from the text's, as on a CPU, or in 16 bits on a GPU;
one mask over all keys would cost more operations, and memory for the mask. Attention's backward pass counts five
products, as in fused kernels, which recompute the scores.

A product `y = x W` of n rows costs `2 n in out` operations forward, the same backward for the gradient of x where
something before it trains, and the same again for the gradient of W where W trains. So a frozen LLM still costs a
backward pass from the first layer that a gradient has to reach, and none before it.
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
    """Peak of additional bytes in the backward pass, while something is recomputed."""

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.forward + other.forward,
            self.backward + other.backward,
            self.saved + other.saved,
            max(self.again, other.again),
        )

    def times(self, factor: float) -> Cost:
        """The cost times a number."""
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
    """Part of the LLM that trains."""
    integration: bool = False
    """Whether the integration's own weights train."""
    features: bool = False
    """Whether the features need a gradient: connector or encoder train."""
    checkpointing: bool = False
    """Recompute layers in the backward pass."""
    recompute: bool = True
    """Recompute a layer's audio K/V in the backward pass; `checkpointing` does so in any case."""
    autocast: bool = False
    """Run matrix products in two-byte numbers, whatever the weights' type."""
    shares: bool = False
    """Conversations about one clip begin alike, and share the rows up to its end (`Backbone.shares_prefixes`)."""

    @property
    def repeats(self) -> int:
        """Conversations that share a beginning with an earlier one."""
        return max(0, self.rows - self.clips) if self.shares else 0

    def all_rows(self, audio: int) -> int:
        """Rows of all conversations, shared ones once; `audio`: audio rows of a clip."""
        return self.rows * (self.text + audio) - self.repeats * (self.before + audio)

    @property
    def rest(self) -> bool:
        """Whether norms, embeddings and head of the LLM train."""
        return self.llm in ("full", "no_ffn")

    @property
    def own_bytes(self) -> int:
        """Bytes of a number in the integration's matrix products; its weights have four."""
        return 2 if self.autocast else 4


@dataclass(frozen=True)
class AddedLayerCost:
    """What a route adds to one layer."""

    keys: int
    """K/V pairs of a clip."""
    grad: bool = False
    """Whether they need gradients."""
    pairs: float | None = None
    """Pairs of a row and an audio key in a conversation's attention; None: each row from the clip on sees all keys."""
    making: Cost = field(default_factory=Cost)
    """Cost of computing them in the layer; gradient checkpointing drops their activations and recomputes them."""
    last: float = 0.0
    """Operations of the last products, which are not recomputed, since backward does not need their output."""
    block: Callable[[bool, int], Cost] | None = None
    """Cost of a cross-attention block before the layer, which attends to the keys in the layer's place, as a function
    of: whether its input rows need gradients; rows of all conversations."""

    def recomputed(self) -> AddedLayerCost:
        """The same with activations of `making` dropped and recomputed in the backward pass."""
        again = (self.making.forward - self.last) * self.grad
        return replace(self, making=Cost(self.making.forward, self.making.backward + again))


@dataclass(frozen=True)
class AddedCost:
    """What a route adds to a step: rows, keys and values in some layers, and the cost of computing both."""

    rows: int = 0
    """Rows of a clip, in every layer."""
    rows_grad: bool = False
    """Whether they need gradients."""
    making: Cost = field(default_factory=Cost)
    """Cost of what is computed before the first layer."""
    layers: Mapping[int, AddedLayerCost] = field(default_factory=dict)


def linear(
    rows: int, inputs: int, outputs: int, x_grad: bool, trained: bool, size: int = 4, kept: bool = False
) -> Cost:
    """Cost of a product of `rows` rows with a matrix.

    Args:
        rows: n.
        inputs: width of x.
        outputs: width of y.
        x_grad: x needs a gradient.
        trained: the matrix needs one.
        size: bytes of a number.
        kept: x is saved for backward already, by something else.
    """
    once = 2.0 * rows * inputs * outputs
    saved = rows * inputs * size if trained and not kept else 0
    return Cost(once, once * (x_grad + trained), saved)


def attention(batch: int, heads: int, queries: int, keys: float, width: int, grad: bool) -> Cost:
    """Cost of scaled dot-product attention: two products forward, five backward. Saved tensors are the caller's."""
    product = 2.0 * batch * heads * queries * keys * width
    return Cost(2 * product, 5 * product * grad)


def kv_bytes(llm: Backbone, added: Iterable[AddedCost], size: int, text: int = 0) -> int:
    """Bytes that one clip takes in the KV cache, its audio K/V and those of its rows, and `text` rows of text."""
    pairs = sum(llm.n_layers * one.rows + sum(layer.keys for layer in one.layers.values()) for one in added)
    pairs += llm.n_layers * text
    return 2 * llm.kv_heads * llm.head_width * size * pairs


def project_kv(llm: Backbone, step: StepSize, tokens: int, making: Cost, u_grad: bool) -> AddedLayerCost:
    """Cost of `Backbone.project_kv` for clips of `tokens` tokens, added to the cost of `u` in the layer."""
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
    """Operations of the last product of k_proj or v_proj: its own matrix's, or the adapter's second matrix's."""
    adapted = llm.lora is not None and name in llm.lora.targets
    inputs = llm.lora.r if adapted and llm.lora is not None else llm.width
    return 2.0 * rows * inputs * _kv_width(llm)


def self_attend(llm: Backbone, step: StepSize, tokens: int, u_grad: bool) -> tuple[Cost, bool]:
    """Cost of `Backbone.self_attend` for clips of `tokens` tokens, and whether the result needs gradients."""
    rows = step.clips * tokens
    cost, out_grad = _attention_block(llm, step, rows, rows, rows * tokens, u_grad, keys_grad=False)
    return cost, u_grad or out_grad


def decoder(llm: Backbone, step: StepSize, added: Sequence[AddedCost]) -> Cost:
    """Cost of the LLM over the rows of a step, with everything that the routes add."""
    length = step.text + sum(one.rows for one in added)
    rows = step.all_rows(length - step.text)
    grad = step.rest or any(one.rows_grad for one in added)
    cost = total(one.making for one in added)
    largest = 0.0
    for layer in range(llm.n_layers):
        parts = [one.layers[layer] for one in added if layer in one.layers]
        for part in parts:
            if part.block is not None:
                cost = cost + part.block(grad, rows)
                grad = grad or part.grad or step.integration
        joined = [part for part in parts if part.block is None]
        if step.recompute and not step.checkpointing:
            largest = max(largest, sum(part.making.saved for part in joined))
            joined = [part.recomputed() for part in joined]
        own, grad = _layer(llm, step, length, joined, grad)
        if step.checkpointing and grad:
            # the last product of the layer is not recomputed: backward does not need its output
            again = own.forward - 2.0 * rows * llm.ffn_width * llm.width
            largest = max(largest, own.saved)
            own = Cost(own.forward, own.backward + again, rows * llm.width * llm.dtype.itemsize)
        cost = cost + own
    return cost + Cost(again=largest) + _norm(llm, step, rows, grad) + _head(llm, step, grad)


def _layer(
    llm: Backbone, step: StepSize, length: int, joined: Sequence[AddedLayerCost], x_grad: bool
) -> tuple[Cost, bool]:
    """Cost of one layer, with computing the audio keys that join its own; and whether its result needs gradients."""
    rows = step.all_rows(length - step.text)
    own = step.text - step.before
    keys = sum(part.keys for part in joined)
    pairs = sum((length - step.before) * part.keys if part.pairs is None else part.pairs for part in joined)
    # a conversation's own rows see all of it, the rows that it shares see one another
    attended_pairs = step.rows * (length * length + pairs)
    attended_pairs -= step.repeats * ((length - own) * length + pairs - own * keys)
    held = rows + (step.rows - step.repeats) * keys
    keys_grad = any(part.grad for part in joined)
    attended, needs_grad = _attention_block(llm, step, rows, held, attended_pairs, x_grad, keys_grad)
    middle = x_grad or needs_grad
    normed = middle or step.rest
    D, F = llm.width, llm.ffn_width
    gate, gate_grad = _matrix(llm, step, "gate_proj", rows, D, F, normed)
    up, up_grad = _matrix(llm, step, "up_proj", rows, D, F, normed, kept=True)
    inner = gate_grad or up_grad
    down, down_grad = _matrix(llm, step, "down_proj", rows, F, D, inner)
    # the input and the output of the gate's activation, and the factor that it is multiplied by
    kept = Cost(saved=3 * rows * F * _size(llm, step) * inner)
    parts = [attended, _norm(llm, step, rows, middle), gate, up, down, kept, *(part.making for part in joined)]
    return total(parts), middle or down_grad


def _attention_block(
    llm: Backbone, step: StepSize, rows: int, keys: int, pairs: float, x_grad: bool, keys_grad: bool
) -> tuple[Cost, bool]:
    """Cost of norm, projections and attention of all rows to all keys, and whether the result needs gradients.

    Args:
        llm: the backbone.
        step: size of the step.
        rows: of the batch.
        keys: of the batch; those of its rows, and audio keys.
        pairs: of a row and a key that it attends to, as a full square.
        x_grad: whether the rows need gradients.
        keys_grad: whether audio keys do.
    """
    D, inner, shared = llm.width, llm.heads * llm.head_width, _kv_width(llm)
    normed = x_grad or step.rest
    q, q_grad = _matrix(llm, step, "q_proj", rows, D, inner, normed)
    k, k_grad = _matrix(llm, step, "k_proj", rows, D, shared, normed, kept=True)
    v, v_grad = _matrix(llm, step, "v_proj", rows, D, shared, normed, kept=True)
    needs_grad = q_grad or k_grad or v_grad or keys_grad
    mixed = attention(1, llm.heads, 1, pairs, llm.head_width, needs_grad)
    # attention's output has the memory layout that the output projection takes
    out, out_grad = _matrix(llm, step, "o_proj", rows, inner, D, needs_grad, kept=True)
    size = _size(llm, step)
    kept = 2 * (rows * inner + keys * shared) * size + 4 * llm.heads * rows
    if llm.key_norm:
        kept += rows * (inner + shared) * 4 * (1 + step.rest)
    parts = [_norm(llm, step, rows, x_grad), q, k, v, mixed, out, Cost(saved=kept * needs_grad)]
    return total(parts), out_grad


def _head(llm: Backbone, step: StepSize, x_grad: bool) -> Cost:
    """Cost of the logits of rows that predict a trained token, and of their loss."""
    rows = step.rows * step.targets
    full = step.rest
    # log-softmax of the logits, and the logits themselves where they have another type
    size = _size(llm, step)
    logits = rows * llm.vocab * (4 + size * (size != 4))
    return linear(rows, llm.width, llm.vocab, x_grad or full, full, _size(llm, step)) + Cost(saved=logits)


def _matrix(
    llm: Backbone, step: StepSize, name: str, rows: int, inputs: int, outputs: int, x_grad: bool, kept: bool = False
) -> tuple[Cost, bool]:
    """Cost of one linear layer with its adapter, and whether its result needs gradients."""
    trained = step.llm == "full" or (step.llm in ("attention", "no_ffn") and name in _ATTENTION)
    size = _size(llm, step)
    # autocast copies x for each product, and the matrix once
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
    """Saved tensors of a norm: its input in float32, and the normalised input where its weight trains."""
    full = step.rest
    return Cost(saved=rows * llm.width * (4 * (x_grad or full) + llm.dtype.itemsize * full) * llm.norms_each)


def _size(llm: Backbone, step: StepSize) -> int:
    return min(llm.dtype.itemsize, 2 if step.autocast else 4)


def _kv_width(llm: Backbone) -> int:
    return llm.kv_heads * llm.head_width
