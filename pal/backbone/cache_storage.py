"""Storage of a cache, layer by layer: K/V of the audio, then of the prompt's text, then of generated rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from pal.backbone.context import AudioContext
from pal.backbone.score_bias import Bias

if TYPE_CHECKING:
    from pal.backbone.packed import PackedContext

ROOM = 64
"""Initial room for generated rows; when full, the storage grows by as much again."""
STEP = 64
"""Sizes of a fixed storage are multiples of this, so that prompts of similar length can reuse it."""
Kind = tuple[int | None, tuple[int, ...], tuple[int, ...]]
"""Kind of layer: its window, and the numbers of the prompts' `hidden` and `keys` that apply to it."""


@dataclass(frozen=True, eq=False)
class AudioKeyLayout:
    """Audio keys of prompts, padded on the right."""

    layers: tuple[int, ...]
    """Layers that they join, or, if `crossed`, layers that cross-attention blocks come before."""
    crossed: bool
    mask_BA: Tensor
    positions_BA: Tensor
    bias: Bias | None = None
    """Bias on their scores."""

    @property
    def width(self) -> int:
        """A."""
        return self.mask_BA.shape[1]


@dataclass(frozen=True, eq=False)
class CachedPrompts:
    """Layout of prompts, padded on the left, and what generated rows see of them; on any device."""

    valid_BT: Tensor
    """True for real rows."""
    positions_BT: Tensor
    keys: tuple[AudioKeyLayout, ...] = ()
    hidden: tuple[tuple[frozenset[int], Tensor], ...] = ()
    """Layers, and rows [B, T] that generated rows do not see in these layers."""
    row_biases: tuple[tuple[Bias, Tensor], ...] = ()
    """Biases on the scores of audio rows, and the rows [B, T] that each is for."""

    @classmethod
    def padded(cls, context: AudioContext | None, valid_BT: Tensor, positions_BT: Tensor) -> CachedPrompts:
        """Layout of rows that are padded on the left."""
        if context is None:
            return cls(valid_BT.bool(), positions_BT)
        keys = tuple(
            AudioKeyLayout(one.layers, one.blocks is not None, one.mask_BA, one.positions_BA, one.bias)
            for one in context.keys
        )
        return cls(valid_BT.bool(), positions_BT, keys, context.hidden_rows, context.row_biases)

    @classmethod
    def packed(cls, context: PackedContext) -> CachedPrompts:
        """Layout of packed rows; on the host."""
        positions_BT, valid_BT = filled([one.positions_T for one in context.conversations], left=True)
        repeats_BT, _ = filled([one.repeats_T for one in context.conversations], left=True)
        keys = []
        for one in context.keys:
            positions_BA, mask_BA = filled([talk.keys[one.stream] for talk in context.conversations], left=False)
            keys.append(AudioKeyLayout(one.layers, one.blocks is not None, mask_BA, positions_BA, one.bias))
        hidden = ((frozenset(range(len(context.windows))), repeats_BT),) if bool(repeats_BT.any()) else ()
        sources_BT, _ = filled([one.sources_T + 1 for one in context.conversations], left=True)
        row_biases = tuple((one.bias, sources_BT == one.stream + 1) for one in context.row_biases)
        return cls(valid_BT, positions_BT, tuple(keys), hidden, row_biases)

    @property
    def shape(self) -> tuple[int, int]:
        """B and T."""
        return self.valid_BT.shape[0], self.valid_BT.shape[1]

    def beginning(self, which: int, rest: int) -> CachedPrompts:
        """Layout of one of the prompts without its last `rest` rows and without padding."""
        one = slice(which, which + 1)
        rows = slice(self.shape[1] - int(self.valid_BT[which].sum()), self.shape[1] - rest)
        keys = []
        for part in self.keys:
            count = int(part.mask_BA[which].sum())  # they are padded on the right
            mask_1A, positions_1A = part.mask_BA[one, :count], part.positions_BA[one, :count]
            keys.append(replace(part, mask_BA=mask_1A, positions_BA=positions_1A))
        return CachedPrompts(
            self.valid_BT[one, rows],
            self.positions_BT[one, rows],
            tuple(keys),
            tuple((layers, rows_BT[one, rows]) for layers, rows_BT in self.hidden),
            tuple((bias, rows_BT[one, rows]) for bias, rows_BT in self.row_biases),
        )

    def kinds(self, windows: Sequence[int | None]) -> tuple[list[Kind], list[int]]:
        """The kinds of layers, and the index of each layer's kind."""
        each: list[Kind] = [
            (
                window,
                tuple(i for i, (layers, _) in enumerate(self.hidden) if layer in layers),
                tuple(i for i, one in enumerate(self.keys) if not one.crossed and layer in one.layers),
            )
            for layer, window in enumerate(windows)
        ]
        kinds = list(dict.fromkeys(each))
        return kinds, [kinds.index(kind) for kind in each]

    def heads_of_bias(self, kind: Kind, layer: int) -> int:
        """Most numbers in a bias on the scores of a layer's audio: H or 1; 0 without a bias."""
        biases = [*(self.keys[i].bias for i in kind[2]), *(bias for bias, _ in self.row_biases)]
        return max((len(bias[layer]) for bias in biases if bias is not None and layer in bias), default=0)


def filled(rows: Sequence[Any], left: bool) -> tuple[Tensor, Tensor]:
    """Sequences of different lengths as one zero-padded matrix, and its mask: True where an entry is real."""
    longest = max(len(row) for row in rows)
    # an empty range has no dtype
    kind = next((np.asarray(row).dtype for row in rows if len(row)), np.dtype(np.int64))
    matrix = np.zeros((len(rows), longest), kind)
    mask = np.zeros((len(rows), longest), bool)
    for b, row in enumerate(rows):
        place = slice(longest - len(row), longest) if left else slice(0, len(row))
        matrix[b, place] = row
        mask[b, place] = True
    return torch.from_numpy(matrix), torch.from_numpy(mask)


@dataclass(frozen=True)
class CachePlan:
    """Sizes of a storage. A fixed storage can be reused for an equal plan."""

    rows: int
    """B, prompts."""
    beams: int
    """Beams (or samples) per prompt."""
    text: int
    """T, rows of a prompt."""
    room: int
    """Generated rows per beam before the storage must grow."""
    fixed: bool
    """The storage never grows and is written by index, as CUDA graphs need it."""
    kinds: tuple[tuple[int | None, int], ...]
    """Window and number of audio keys A of each kind of layer."""
    layers: tuple[int, ...]
    """Index in `kinds` of each layer."""
    crossed: tuple[tuple[int, tuple[int, ...]], ...]
    """For each key set of cross-attention blocks: A, and the layers that the blocks come before."""
    biases: tuple[int, ...]
    """For each layer, numbers in the bias on the scores of its audio: H or 1; 0 without a bias."""

    @property
    def slots(self) -> int:
        """Room for generated rows of all beams of a prompt."""
        return self.room * self.beams

    @classmethod
    def of(
        cls,
        windows: Sequence[int | None],
        prompts: CachedPrompts,
        *,
        beams: int = 1,
        room: int = ROOM,
        fixed: bool = False,
    ) -> CachePlan:
        """Plan for prompts.

        Args:
            windows: of the LLM's layers.
            prompts: to store.
            beams: per prompt.
            room: number of rows to generate, if known.
            fixed: no more than `room` rows will be generated.
        """

        def wide(width: int) -> int:
            return -(-width // STEP) * STEP if fixed else width

        kinds, layers = prompts.kinds(windows)
        keys = prompts.keys
        return cls(
            rows=prompts.shape[0],
            beams=beams,
            text=wide(prompts.shape[1]),
            room=wide(room),
            fixed=fixed,
            kinds=tuple((window, wide(sum(keys[i].width for i in joined))) for window, _, joined in kinds),
            layers=tuple(layers),
            crossed=tuple((wide(one.width), one.layers) for one in keys if one.crossed),
            biases=tuple(prompts.heads_of_bias(kinds[kind], layer) for layer, kind in enumerate(layers)),
        )


class CacheLayer(CacheLayerMixin):
    """One layer's keys and values [B, G, A + T + generated, C].

    They are written in place; a full storage grows by as much room again.
    """

    is_sliding = False
    supports_early_init = False
    keys: Any
    values: Any

    def __init__(self, plan: CachePlan, kind: int) -> None:
        super().__init__()
        self.audio_keys = plan.kinds[kind][1]
        self.prompt = self.audio_keys + plan.text
        self.beams = plan.beams
        self.room = plan.room
        self.rows = 0
        """Rows of the sequence so far, audio keys not counted."""
        self.steps = 0
        self.slots_X: Tensor | None = None
        """Next index to write in a fixed storage, for each beam."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate storage for keys and values of this shape and dtype."""
        self.use(*(self._zeros(x) for x in (key_states, value_states)))

    def use(self, keys_BGKC: Tensor, values_BGKC: Tensor) -> None:
        """Use these tensors as storage."""
        self.keys, self.values = keys_BGKC, values_BGKC
        self.dtype, self.device = keys_BGKC.dtype, keys_BGKC.device
        self.is_initialized = True

    def _zeros(self, x_BGTC: Tensor) -> Tensor:
        """Storage for entries of this shape and dtype, [..., B, G, K, C]."""
        width = self.prompt + self.room * self.beams
        # other calls may reuse the storage, so its tensors must not be inference tensors
        with torch.inference_mode(False):
            return torch.zeros(*x_BGTC.shape[:-2], width, x_BGTC.shape[-1], dtype=x_BGTC.dtype, device=x_BGTC.device)

    def begin(self) -> None:
        """Clear the storage."""
        self.rows = self.steps = 0
        if self.is_initialized:  # masked entries must still be finite
            self.keys.zero_()
            self.values.zero_()

    def hold(self, first: int, k_BGAC: Tensor, v_BGAC: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values from index `first` on; returns them as views of the storage."""
        if not self.is_initialized:
            self.lazy_initialization(k_BGAC, v_BGAC)
        places = slice(first, first + k_BGAC.shape[2])
        self.keys[:, :, places], self.values[:, :, places] = k_BGAC, v_BGAC
        return self.keys[:, :, places], self.values[:, :, places]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store rows of text. Returns these K/V in prefill, all K/V in a decoding step, the audio's first."""
        if not self.rows:
            self.hold_prompt(key_states, value_states)
            return key_states, value_states
        k_BGXC, v_BGXC = self._beside(key_states), self._beside(value_states)
        assert k_BGXC.shape[2] == self.beams, "one row a step"
        if self.slots_X is not None:
            self.keys.index_copy_(2, self.slots_X, k_BGXC.to(self.keys.dtype))
            self.values.index_copy_(2, self.slots_X, v_BGXC.to(self.values.dtype))
            return self.keys, self.values
        first = self.prompt + self.steps * self.beams
        end = first + self.beams
        if end > self.keys.shape[2]:
            more = self.room * self.beams
            self.keys, self.values = (F.pad(x, (0, 0, 0, more)) for x in (self.keys, self.values))
            self.room *= 2
        self.keys[:, :, first:end], self.values[:, :, first:end] = k_BGXC, v_BGXC
        self.steps += 1
        self.rows += 1
        return self.keys[:, :, :end], self.values[:, :, :end]

    def hold_prompt(self, k_BGTC: Tensor, v_BGTC: Tensor) -> None:
        """Store the prompts' rows, padded on the left."""
        self.rows = k_BGTC.shape[2]
        self.hold(self.prompt - self.rows, k_BGTC, v_BGTC)

    def _beside(self, x_RG1C: Tensor) -> Tensor:
        """Rows of all beams, grouped by prompt: [B, G, beams, C]."""
        if self.beams == 1:
            return x_RG1C
        return x_RG1C.squeeze(2).unflatten(0, (-1, self.beams)).transpose(1, 2)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the mask over the text's rows."""
        return self.rows + query_length, 0

    def get_seq_length(self) -> int:
        """Number of the text's rows."""
        return self.rows

    def get_max_length(self) -> int:
        """None."""
        return -1


def allocate_together(stores: Sequence[CacheLayer], x_XBGTC: Tensor) -> Tensor:
    """One tensor [X, B, G, K, C] as the storage of several layers of one size, keys and values in turns.

    Args:
        stores: the layers; X is twice their number.
        x_XBGTC: entries whose shape and dtype the storage is for.
    """
    storage_XBGKC = stores[0]._zeros(x_XBGTC)
    for number, store in enumerate(stores):
        store.use(storage_XBGKC[2 * number], storage_XBGKC[2 * number + 1])
    return storage_XBGKC


def kept(x: Tensor) -> Tensor:
    """A copy that later calls may write to, also if this call is in inference mode."""
    with torch.inference_mode(False):
        copy = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return copy.copy_(x)
