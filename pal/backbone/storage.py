"""Where a cache keeps a layer's keys and values: the audio's, then the text's, then what is generated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from pal.backbone.context import AudioContext, AudioKeys

ROOM = 64
"""Generated rows that a storage has room for at first; each time it is full, it gets as much again."""
STEP = 64
"""Sizes of a fixed storage are multiples of this, so that prompts of like length can use one another's."""
Kind = tuple[int | None, tuple[int, ...], tuple[int, ...]]
"""Layers that see the same: their window, which of the context's `hidden_rows` hold, which of its `keys` join."""


def kinds_of(windows: Sequence[int | None], audio: AudioContext | None) -> tuple[list[Kind], list[int]]:
    """The kinds of layers there are, and each layer's number among them."""
    each: list[Kind] = [
        (window, (), ()) if audio is None else (*audio.rows_kind(layer, window), audio.joined(layer))
        for layer, window in enumerate(windows)
    ]
    kinds = list(dict.fromkeys(each))
    return kinds, [kinds.index(kind) for kind in each]


@dataclass(frozen=True)
class Plan:
    """What a storage must hold. Of equal plans a fixed one can be used again."""

    rows: int
    """B: prompts."""
    beams: int
    """Rows that continue each prompt."""
    text: int
    """T, the prompts' rows."""
    room: int
    """Rows that can be generated before the storage must grow."""
    fixed: bool
    """Whether it never grows and is written by index, as a CUDA graph needs it."""
    kinds: tuple[tuple[int | None, int], ...]
    """Of each kind of layer the window and A, the audio keys."""
    layers: tuple[int, ...]
    """The kind of each layer."""
    crossed: tuple[tuple[int, tuple[int, ...]], ...]
    """Of each set of keys that blocks look at: A, and the layers the blocks stand before."""

    @classmethod
    def of(
        cls,
        windows: Sequence[int | None],
        audio: AudioContext | None,
        rows: int,
        text: int,
        *,
        beams: int = 1,
        room: int = ROOM,
        fixed: bool = False,
    ) -> Plan:
        """What prompts need.

        Args:
            windows: of the LLM's layers.
            audio: of the prompts.
            rows: number of prompts, B.
            text: rows of each, T.
            beams: rows that continue each prompt.
            room: rows that will be generated, as far as known.
            fixed: whether no more than these will be.
        """

        def wide(width: int) -> int:
            return -(-width // STEP) * STEP if fixed else width

        kinds, layers = kinds_of(windows, audio)
        keys = () if audio is None else audio.keys
        return cls(
            rows=rows,
            beams=beams,
            text=wide(text),
            room=wide(room),
            fixed=fixed,
            kinds=tuple((window, wide(sum(_width(keys[i]) for i in joined))) for window, _, joined in kinds),
            layers=tuple(layers),
            crossed=tuple((wide(_width(one)), one.layers) for one in keys if one.blocks is not None),
        )


def _width(keys: AudioKeys) -> int:
    return keys.mask_BA.shape[1]


class Layer(CacheLayerMixin):
    """One layer's keys and values [B, G, A + T + generated, C].

    They are written in place; where there is no more room, the storage gets as much again.
    """

    is_sliding = False
    supports_early_init = False
    keys: Any
    values: Any

    def __init__(self, plan: Plan, kind: int) -> None:
        super().__init__()
        self.audio = plan.kinds[kind][1]
        self.prompt = self.audio + plan.text
        self.beams = plan.beams
        self.room = plan.room
        self.rows = 0
        """Of the sequence so far, the audio's not counted."""
        self.steps = 0
        self.slots_X: Tensor | None = None
        """Where a fixed storage is written to next; one place for each beam."""
        self.order_BT: Tensor | None = None
        """With packed prompts, which of their rows goes where."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Storage for keys and values such as these."""
        width = self.prompt + self.room * self.beams
        # a storage that is kept for other calls must not belong to this one's inference mode
        with torch.inference_mode(False):
            self.keys, self.values = (
                torch.zeros(x.shape[0], x.shape[1], width, x.shape[3], dtype=x.dtype, device=x.device)
                for x in (key_states, value_states)
            )
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def begin(self) -> None:
        """Forget what is stored."""
        self.rows = self.steps = 0
        self.order_BT = None
        if self.is_initialized:  # what is not seen must still be finite
            self.keys.zero_()
            self.values.zero_()

    def hold(self, first: int, k_BGAC: Tensor, v_BGAC: Tensor) -> tuple[Tensor, Tensor]:
        """Store audio keys and values from place `first` on; gives them back as parts of the storage."""
        if not self.is_initialized:
            self.lazy_initialization(k_BGAC, v_BGAC)
        places = slice(first, first + k_BGAC.shape[2])
        self.keys[:, :, places], self.values[:, :, places] = k_BGAC, v_BGAC
        return self.keys[:, :, places], self.values[:, :, places]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store rows of text. In a prompt these come back alone; in a step everything does, the audio first."""
        if not self.rows:
            self._prompt(key_states, value_states)
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

    def _prompt(self, k: Tensor, v: Tensor) -> None:
        if self.order_BT is not None:  # packed: one row after the other, [1, G, N, C]
            order = self.order_BT
            k, v = (x[0].index_select(1, order.flatten()).unflatten(1, order.shape).transpose(0, 1) for x in (k, v))
        if not self.is_initialized:
            self.lazy_initialization(k, v)
        self.rows = k.shape[2]
        places = slice(self.prompt - self.rows, self.prompt)
        self.keys[:, :, places], self.values[:, :, places] = k, v

    def _beside(self, x_RG1C: Tensor) -> Tensor:
        """The beams' rows of each prompt side by side: [B, G, beams, C]."""
        if self.beams == 1:
            return x_RG1C
        return x_RG1C.squeeze(2).unflatten(0, (-1, self.beams)).transpose(1, 2)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Of the text's rows, as transformers counts them."""
        return self.rows + query_length, 0

    def get_seq_length(self) -> int:
        """Of the text's rows."""
        return self.rows

    def get_max_length(self) -> int:
        """None."""
        return -1


def kept(x: Tensor) -> Tensor:
    """A copy that later calls may write to, whatever mode this one is in."""
    with torch.inference_mode(False):
        copy = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return copy.copy_(x)
