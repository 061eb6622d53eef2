"""Continuations of prompts that share one copy of the prompt's keys and values, as several questions about a clip do.

What the questions have in common, up to the end of their last clip, is a prompt that is read once into a `JointCache`.
Each question is a continuation of it, with a cache for its own rows. A row's attention to the prompt and to the rows of
its own continuation are two calls, merged by the log-sum-exps of the scores. In the first call the queries of all
continuations of a prompt lie one after the other, so it reads the prompt's keys once. The rows see of the prompt what
rows generated after it would see, so masks, biases and hidden rows are those of decoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from pal.backbone import kernels
from pal.backbone.cache import JointCache
from pal.backbone.interfaces import LaterRows
from pal.backbone.merged import UNSEEN, merge


@dataclass(frozen=True)
class Continuations:
    """Token ids that follow prompts; continuations of one prompt are neighbours."""

    counts: tuple[int, ...]
    """Number of continuations of each prompt."""
    ids: tuple[list[int], ...]
    """Token ids of each continuation, in the order of the prompts."""

    def repeated(self, times: int) -> Continuations:
        """Each continuation several times in a row."""
        ids = tuple(one for one in self.ids for _ in range(times))
        return Continuations(tuple(count * times for count in self.counts), ids)

    @property
    def prompts(self) -> list[int]:
        """Number of the prompt of each continuation."""
        return [prompt for prompt, count in enumerate(self.counts) for _ in range(count)]

    @property
    def padding(self) -> list[int]:
        """Rows by which each continuation is shorter than the longest."""
        longest = max(map(len, self.ids))
        return [longest - len(one) for one in self.ids]

    def rows(self, last_U: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids and position ids [R, T], zero in the padding on the left, from positions of prompts' last rows."""
        ids = [[0] * padding + one for padding, one in zip(self.padding, self.ids, strict=True)]
        ids_RT, padding_R, prompts_R = (
            torch.tensor(x, device=last_U.device) for x in (ids, self.padding, self.prompts)
        )
        at_RT = torch.arange(ids_RT.shape[1], device=last_U.device) - padding_R[:, None]
        return ids_RT, torch.where(at_RT >= 0, last_U[prompts_R, None] + 1 + at_RT, 0)


class SharedPrefixCache(Cache):
    """KV cache of continuations: those of the prompts, shared, and those of each continuation's own rows.

    The first forward reads the continuations' given rows, padded on the left; each later one decodes a row of each.

    Args:
        prompts: cache of the prompts, which have been read; or a cache for each prompt.
        continuations: of the prompts.
        room: rows to generate until the storage grows.
    """

    def __init__(self, prompts: JointCache | Sequence[JointCache], continuations: Continuations, room: int) -> None:
        self.counts = continuations.counts
        alone = isinstance(prompts, JointCache)
        caches = [prompts] * len(self.counts) if isinstance(prompts, JointCache) else list(prompts)
        self.sources = [(cache, number if alone else 0) for number, cache in enumerate(caches)]
        """Of each prompt, its cache and its number there."""
        self.stores = [_OwnRows(room) for _ in caches[0].stores]
        super().__init__(layers=list(self.stores))
        device = caches[0].decode_mask.device
        padding_R = torch.tensor(continuations.padding, device=device)
        self.first_R1 = padding_R[:, None] if any(continuations.padding) else None
        """First real row of each continuation; None where none has padding."""
        self._shown: dict[tuple[int, int], tuple[int, Tensor | None]] = {}

    @property
    def answers(self) -> int:
        """Number of rows of a decoding step."""
        return sum(self.counts)

    @property
    def fixed_room(self) -> None:
        """None: the storage grows."""

    @property
    def no_mask(self) -> Tensor:
        """Placeholder mask: given a 4-dimensional mask, transformers makes none."""
        return self.sources[0][0].no_mask

    @property
    def groups(self) -> list[tuple[int, int]]:
        """First row of each prompt's continuations, and one past the last."""
        ends = torch.tensor(self.counts).cumsum(0).tolist()
        return [(end - count, end) for end, count in zip(ends, self.counts, strict=True)]

    def shown(self, cache: JointCache, layer: int) -> tuple[int, Tensor | None]:
        """Number of the prompts' keys in a layer of a cache, and their mask; see `DecodeMask.of_prompts`."""
        about = (id(cache), layer)
        if about not in self._shown:
            self._shown[about] = cache.decode_mask.of_prompts(layer)
        return self._shown[about]


class _OwnRows(CacheLayerMixin):
    """Keys and values of the continuations' own rows in one layer, [R, G, T + generated, C]."""

    is_sliding = False
    supports_early_init = False
    keys: Any
    values: Any

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self.rows = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate storage for the given rows and those to generate."""
        self.keys, self.values = (F.pad(x, (0, 0, 0, self.room)) for x in (key_states, value_states))
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store rows; returns those of all rows so far."""
        end = self.rows + key_states.shape[2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        elif end > self.keys.shape[2]:
            self.keys, self.values = (F.pad(x, (0, 0, 0, end)) for x in (self.keys, self.values))
        self.keys[:, :, self.rows : end], self.values[:, :, self.rows : end] = key_states, value_states
        self.rows = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of a mask over own rows."""
        return self.rows + query_length, 0

    def get_seq_length(self) -> int:
        """Number of own rows."""
        return self.rows

    def get_max_length(self) -> int:
        """None."""
        return -1


@dataclass(frozen=True, eq=False)
class ContinuedRows(LaterRows):
    """Attention metadata of the continuations' rows in one forward."""

    cache: SharedPrefixCache
    _masks: dict[tuple[int, int, torch.dtype], Tensor | None] = field(default_factory=dict)

    def crosses(self, layer: int) -> bool:
        """True if cross-attention blocks come before the layer."""
        return any(cache.crossing(layer) for cache, _ in self.cache.sources)

    def cross(self, layer: int, x_RQD: Tensor) -> Tensor:
        """The layer's input rows after the cross-attention blocks before it."""
        parts = []
        for (cache, prompt), (first, last) in zip(self.cache.sources, self.cache.groups, strict=True):
            x_XQD, one = x_RQD[first:last], slice(prompt, prompt + 1)
            for block, seen_U11A, k_UGAC, v_UGAC in cache.crossing(layer):
                x_1XD = x_XQD.flatten(0, 1)[None]
                seen = None if seen_U11A is None else seen_U11A[one].expand(-1, -1, x_1XD.shape[1], -1)
                x_XQD = block(x_1XD, k_UGAC[one], v_UGAC[one], seen).reshape(x_XQD.shape)
            parts.append(x_XQD)
        return torch.cat(parts)

    def _own_mask(self, queries: int, keys: int, dtype: torch.dtype) -> Tensor | None:
        """Additive mask [R, 1, Q, K] of own rows, made once for all layers; None where none has padding."""
        first_R1, about = self.cache.first_R1, (queries, keys, dtype)
        if first_R1 is not None and about not in self._masks:
            at_K = torch.arange(keys, device=first_R1.device)
            seen_RQK = (at_K >= first_R1)[:, None] & (at_K <= at_K[-queries:, None])
            mask_RQK = torch.zeros(seen_RQK.shape, dtype=dtype, device=seen_RQK.device)
            self._masks[about] = mask_RQK.masked_fill_(~seen_RQK, UNSEEN)[:, None]
        return self._masks.get(about)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """Queries [R, H, Q, C], keys and values of own rows so far [R, G, K, C] -> [R, Q, H, C]."""
        device = query.device.type
        # under autocast, rotary embeddings return float32, and autocast does not cast for these kernels
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype
        q_RHQC, k_RGKC, v_RGKC = (x.to(dtype) for x in (query, key, value))
        Q, K = q_RHQC.shape[2], k_RGKC.shape[2]
        mask = self._own_mask(Q, K, dtype)
        out_RHQC, lse_RHQ = kernels.attend(q_RHQC, k_RGKC, v_RGKC, mask is None and Q == K > 1, mask, scale)
        # laid out as the output projection takes it
        out_RHQC = out_RHQC.transpose(1, 2).contiguous().transpose(1, 2)
        for (cache, prompt), (first, last) in zip(self.cache.sources, self.cache.groups, strict=True):
            width, shared = self.cache.shown(cache, layer)
            if not width:  # no audio keys in this layer, and no text before the clip
                continue
            one, rows, store = slice(prompt, prompt + 1), slice(first, last), cache.stores[layer]
            k_UGKC, v_UGKC = (x[one, :, :width].to(dtype) for x in (store.keys, store.values))
            of_prompt = shared if shared is None or len(shared) == 1 else shared[one]
            found = attend_together(q_RHQC[rows], k_UGKC, v_UGKC, of_prompt, scale)
            merge(out_RHQC[rows], lse_RHQ[rows], *found)
        return out_RHQC.transpose(1, 2)


def attend_together(
    q_RHQC: Tensor, k_1GKC: Tensor, v_1GKC: Tensor, mask_1H1K: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Attention of all rows to one copy of keys, in one call -> [R, H, Q, C], and the log-sum-exps [R, H, Q]."""
    R, H, Q, C = q_RHQC.shape
    G = k_1GKC.shape[1]
    q_1GXC = q_RHQC.unflatten(1, (G, -1)).permute(1, 2, 0, 3, 4).reshape(1, G, -1, C)
    mask = None
    if mask_1H1K is not None:
        K, mask_1H1K = mask_1H1K.shape[-1], mask_1H1K.to(q_RHQC.dtype)
        if mask_1H1K.shape[1] == 1:
            mask = mask_1H1K.expand(1, 1, q_1GXC.shape[2], K)
        else:  # a bias for each head
            mask = mask_1H1K.reshape(1, G, -1, 1, K).expand(-1, -1, -1, R * Q, -1).reshape(1, G, -1, K)
    out_1GXC, lse_1GX = kernels.attend(q_1GXC, k_1GKC, v_1GKC, False, mask, scale)
    out_RHQC = out_1GXC.reshape(G, H // G, R, Q, C).permute(2, 0, 1, 3, 4).flatten(1, 2)
    lse_RHQ = lse_1GX.reshape(G, H // G, R, Q).permute(2, 0, 1, 3).flatten(1, 2)
    return out_RHQC, lse_RHQ
