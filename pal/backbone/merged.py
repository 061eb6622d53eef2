"""Attention to several sets of keys, computed for each set separately and merged by the log-sum-exps of the scores.

`softmax(q [k; k']^T) [v; v']` is the mean of the outputs of attention to each set, weighted by the sums of the
exponentials of its scores. So text stays causal and audio needs no mask: no mask covers both sets, keys are not
concatenated, and no head is repeated. In the backward pass, each set's gradients are those of attention to this set,
with the merged output and log-sum-exp in place of the set's own; no probabilities are saved.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from pal.backbone import kernels
from pal.backbone.score_bias import SetBias, with_bias

BLOCK = 128
"""Queries per block where each query sees a few keys more than the one before."""
UNSEEN = -30_000.0
"""Additive mask of an unseen key. Finite in every precision, since a query without any key would give NaN; the output
of such a query has weight 0 in the merge with the other sets."""
SMALL = 1 << 16
"""Queries times keys per batch row up to which one call with a mask costs less than a call for each batch row."""


@dataclass(frozen=True)
class AttentionTile:
    """Tile of the attention matrix that one call computes; each range is half-open."""

    rows: tuple[int, int]
    """Batch rows."""
    queries: tuple[int, int]
    keys: tuple[int, int]
    causal: bool = False
    """Query i of the tile sees keys up to i of the tile."""
    mask: Tensor | None = None
    """Additive mask, [1 or rows, 1, queries, keys]."""

    def of(self, x_BHXC: Tensor, place: tuple[int, int]) -> Tensor:
        """The tile's part of a tensor [B, H, X, ...]; X are queries or keys."""
        rows = x_BHXC if self.rows == (0, x_BHXC.shape[0]) else x_BHXC[slice(*self.rows)]
        return rows if place == (0, x_BHXC.shape[2]) else rows[:, :, slice(*place)]


@dataclass(frozen=True)
class TiledKeys:
    """Set of keys and values, with the tiles that say which queries see which keys."""

    k_BGKC: Tensor
    v_BGKC: Tensor
    tiles: tuple[AttentionTile, ...]
    biases: tuple[SetBias, ...] = ()
    """Biases [H or 1, 1] on the scores of all keys or, marked [B, 1, K], of some."""


def merged_attention(q_BHQC: Tensor, sets: Sequence[TiledKeys], scale: float | None) -> Tensor:
    """Attention of queries to all sets of keys together -> [B, Q, H, C].

    Every query must see a key of the first set.

    Args:
        q_BHQC: queries; H may be a multiple of the sets' G, as in grouped-query attention.
        sets: keys and values.
        scale: factor on the scores; None is 1 / sqrt(C).
    """
    device = q_BHQC.device.type
    # under autocast, rotary embeddings return float32 queries, and autocast does not cast for these kernels
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else q_BHQC.dtype
    width = q_BHQC.shape[-1]
    q_BHQC = q_BHQC.to(dtype)
    keys, values = (
        [x.to(dtype) for x in each] for each in zip(*((one.k_BGKC, one.v_BGKC) for one in sets), strict=True)
    )
    biases = [one.biases for one in sets]
    if any(biases):
        q_BHQC, keys, values, scale = with_bias(q_BHQC, keys, values, biases, scale)
    tiles = tuple(one.tiles for one in sets)
    tensors = [x for pair in zip(keys, values, strict=True) for x in pair]
    out_BHQC: Tensor = _Merged.apply(q_BHQC, scale, tiles, *tensors)
    return out_BHQC[..., :width].transpose(1, 2)


def attention_in_turn(q_BHQC: Tensor, sets: Iterable[TiledKeys], scale: float | None) -> Tensor:
    """`merged_attention` without gradients, one set of keys after the other: a set can be made when its turn comes.

    Biases must be on all keys of their set.
    """
    device = q_BHQC.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else q_BHQC.dtype
    q_BHQC = q_BHQC.to(dtype)
    # laid out as the output projection takes it
    out_BHQC = q_BHQC.new_zeros(q_BHQC.transpose(1, 2).shape).transpose(1, 2)
    lse_BHQ = torch.full(q_BHQC.shape[:3], -torch.inf, device=q_BHQC.device)
    for one in sets:
        for tile in one.tiles:
            k, v = (tile.of(x.to(dtype), tile.keys) for x in (one.k_BGKC, one.v_BGKC))
            out, lse = _attend(tile.of(q_BHQC, tile.queries), k, v, tile, scale)
            for bias_H1, marked in one.biases:
                assert marked is None
                lse = lse + bias_H1.to(lse.dtype)  # as on every score
            merge(tile.of(out_BHQC, tile.queries), tile.of(lse_BHQ, tile.queries), out, lse)
    return out_BHQC.transpose(1, 2)


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_BHQC: Tensor, scale: float | None, tiles: tuple[tuple[AttentionTile, ...], ...], *tensors: Tensor
    ) -> Tensor:
        out_BHQC = lse_BHQ = None
        for tile, k_BGKC, v_BGKC in _each(tiles, tensors):
            q, k, v = tile.of(q_BHQC, tile.queries), tile.of(k_BGKC, tile.keys), tile.of(v_BGKC, tile.keys)
            out, lse = _attend(q, k, v, tile, scale)
            if out_BHQC is None or lse_BHQ is None:
                if tile.rows == (0, q_BHQC.shape[0]) and tile.queries == (0, q_BHQC.shape[2]):
                    out_BHQC, lse_BHQ = out, lse
                    continue
                # laid out as the output projection takes it, so that what is kept for it is this, not a copy
                out_BHQC = q_BHQC.new_zeros(q_BHQC.transpose(1, 2).shape).transpose(1, 2)
                lse_BHQ = torch.full(q_BHQC.shape[:3], -torch.inf, device=q_BHQC.device)
            merge(tile.of(out_BHQC, tile.queries), tile.of(lse_BHQ, tile.queries), out, lse)
        assert out_BHQC is not None and lse_BHQ is not None
        ctx.save_for_backward(q_BHQC, out_BHQC, lse_BHQ, *tensors)
        ctx.scale, ctx.tiles = scale, tiles
        return out_BHQC

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_BHQC: Tensor) -> Any:
        q_BHQC, out_BHQC, lse_BHQ, *tensors = ctx.saved_tensors
        grads = [torch.zeros_like(x) for x in (q_BHQC, *tensors)]
        into = iter(zip(_each(ctx.tiles, tensors), _each(ctx.tiles, grads[1:]), strict=True))
        for (tile, k_BGKC, v_BGKC), (_, dk_BGKC, dv_BGKC) in into:
            k, v = tile.of(k_BGKC, tile.keys), tile.of(v_BGKC, tile.keys)
            q, grad, out, lse = (tile.of(x, tile.queries) for x in (q_BHQC, grad_BHQC, out_BHQC, lse_BHQ))
            dq, dk, dv = _attend_backward(grad, q, k, v, out, lse, tile, ctx.scale)
            tile.of(grads[0], tile.queries).add_(dq)
            tile.of(dk_BGKC, tile.keys).add_(dk)
            tile.of(dv_BGKC, tile.keys).add_(dv)
        return grads[0], None, None, *grads[1:]


def _each(
    tiles: Sequence[Sequence[AttentionTile]], tensors: Sequence[Tensor]
) -> Iterator[tuple[AttentionTile, Tensor, Tensor]]:
    """Each tile with the keys and values of its set."""
    for own, k_BGKC, v_BGKC in zip(tiles, tensors[::2], tensors[1::2], strict=True):
        for tile in own:
            yield tile, k_BGKC, v_BGKC


def merge(into_BHQC: Tensor, into_BHQ: Tensor, out_BHQC: Tensor, lse_BHQ: Tensor) -> None:
    """Merge the output over some keys into the output over other keys, in place."""
    together_BHQ = torch.logaddexp(into_BHQ, lse_BHQ)
    old_BHQ1, new_BHQ1 = ((x - together_BHQ).exp()[..., None] for x in (into_BHQ, lse_BHQ))
    into_BHQC.copy_(into_BHQC * old_BHQ1 + out_BHQC * new_BHQ1)
    into_BHQ.copy_(together_BHQ)


def _attend(
    q_BHQC: Tensor, k_BGKC: Tensor, v_BGKC: Tensor, tile: AttentionTile, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Attention of one tile -> [B, H, Q, C] and the log-sum-exp of its scores [B, H, Q]."""
    q = _folded(q_BHQC, k_BGKC, tile)
    mask = None if tile.mask is None else tile.mask.to(q.dtype)
    out, lse = kernels.attend(q, k_BGKC, v_BGKC, tile.causal, mask, scale)
    return out.reshape(q_BHQC.shape), lse.reshape(q_BHQC.shape[:3])


def _attend_backward(
    grad_BHQC: Tensor,
    q_BHQC: Tensor,
    k_BGKC: Tensor,
    v_BGKC: Tensor,
    out_BHQC: Tensor,
    lse_BHQ: Tensor,
    tile: AttentionTile,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from the merged output and its log-sum-exp."""
    grad, q, out = (_folded(x, k_BGKC, tile) for x in (grad_BHQC, q_BHQC, out_BHQC))
    mask = None if tile.mask is None else tile.mask.to(q.dtype)
    lse = lse_BHQ.reshape(q.shape[:3])
    dq, dk, dv = kernels.attend_backward(grad, q, k_BGKC, v_BGKC, out, lse, tile.causal, mask, scale)
    return dq.reshape(q_BHQC.shape), dk, dv


def _folded(x_BHQC: Tensor, k_BGKC: Tensor, tile: AttentionTile) -> Tensor:
    """Where all queries see the same keys, fold a group's heads into the query axis: fewer and larger products."""
    if tile.causal or tile.mask is not None:
        return x_BHQC
    return x_BHQC.unflatten(1, (k_BGKC.shape[1], -1)).flatten(2, 3)


def masked(seen_B1QK: Tensor) -> tuple[AttentionTile, ...]:
    """One tile under a dense mask, bool [B, 1, Q, K], True where a query sees a key."""
    mask = torch.zeros(seen_B1QK.shape, device=seen_B1QK.device).masked_fill_(~seen_B1QK, UNSEEN)
    return (AttentionTile((0, mask.shape[0]), (0, mask.shape[2]), (0, mask.shape[3]), mask=mask),)


def prefixes(counts_BQ: list[list[int]], device: torch.device) -> tuple[AttentionTile, ...]:
    """Tiles where each query sees a prefix of its row's keys, never shorter than the prefix of the query before it."""
    B, Q = len(counts_BQ), len(counts_BQ[0])
    if all(row == counts_BQ[0] for row in counts_BQ):
        return tuple(_staircase(counts_BQ[0], (0, B), device))
    most = max(row[-1] for row in counts_BQ)
    if Q * most <= SMALL:
        counts = torch.tensor(counts_BQ, device=device)
        return masked((torch.arange(most, device=device) < counts[..., None])[:, None])
    return tuple(tile for b, row in enumerate(counts_BQ) for tile in _staircase(row, (b, b + 1), device))


def pairs_of(counts_Q: list[int]) -> int:
    """Number of query-key pairs that the tiles of one batch row compute; see `prefixes`."""
    tiles = _staircase(counts_Q, (0, 1), torch.device("cpu"))
    return sum((p.queries[1] - p.queries[0]) * (p.keys[1] - p.keys[0]) for p in tiles)


def _staircase(counts_Q: list[int], rows: tuple[int, int], device: torch.device) -> Iterator[AttentionTile]:
    """Tiles without a mask for keys that all queries of a block see, and small masked ones for the other keys."""
    for first, last in _blocks(counts_Q):
        low, high = counts_Q[first], counts_Q[last - 1]
        if high > low and low < BLOCK:
            low = 0  # too few for a call of their own
        if low:
            yield AttentionTile(rows, (first, last), (0, low))
        if high > low:
            counts = torch.tensor(counts_Q[first:last], device=device) - low
            seen_QK = torch.arange(high - low, device=device) < counts[:, None]
            (tile,) = masked(seen_QK[None, None])
            yield AttentionTile(rows, (first, last), (low, high), mask=tile.mask)


def _blocks(counts_Q: list[int]) -> Iterator[tuple[int, int]]:
    """Runs of queries that see the same keys; those that differ by few keys are joined to about `BLOCK` queries."""
    few = BLOCK // 8
    start = end = known = 0
    was_long = False
    for count, run in groupby(counts_Q):
        length = len(list(run))
        if end > start and (was_long or length > few or count - known > few or end - start >= BLOCK):
            yield start, end
            start = end
        end += length
        known, was_long = count, length > few
    yield start, end
