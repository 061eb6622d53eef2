"""`AudioContext`: the audio of a batch of rows, as keys and values at positions."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pal.backbone.attention_masks import RowKind
from pal.backbone.attention_metadata import AudioView
from pal.backbone.audio_keys import AudioKeys
from pal.backbone.audio_mask import Hide, Places
from pal.backbone.interfaces import Geometry
from pal.backbone.observers import Watch


@dataclass(frozen=True)
class AudioContext:
    """The audio of a batch of rows, as keys and values at positions, and the rows' own positions."""

    llm: Geometry
    keys: tuple[AudioKeys, ...]
    rows_BT: Tensor
    """Position ids of the prompt, which windows need when the cache holds only keys."""
    audio_rows_BT: Tensor
    """True where a row of the sequence is none of the text's: audio (summary tokens), or one that asks again."""
    hidden_rows: tuple[tuple[frozenset[int], Tensor], ...] = ()
    """Layers, and rows [B, T] that no other row sees there."""
    places: Places | None = None
    """What each row stands for, where that was asked for."""
    watch: Watch | None = None
    """Who is shown the attention of a forward without a cache."""
    asks_BT: Tensor | None = None
    """True where a row repeats the last text row behind clips, to say what follows them; None where none does."""

    def asking(self, asks_BT: Tensor) -> AudioContext:
        """The same context where some rows repeat the last text row before them, behind the clips between.

        Such a row sees all that the row it repeats does, itself in that one's place, and the clips. No other row sees
        it.
        """
        everywhere = frozenset(range(len(self.llm.windows)))
        return replace(self, asks_BT=asks_BT, hidden_rows=(*self.hidden_rows, (everywhere, asks_BT)))

    def joined(self, layer: int) -> tuple[int, ...]:
        """Which of `keys` join the layer's own."""
        return tuple(i for i, keys in enumerate(self.keys) if keys.blocks is None and layer in keys.layers)

    def crossing(self, layer: int) -> tuple[int, ...]:
        """Which of `keys` a block before the layer looks at."""
        return tuple(i for i, keys in enumerate(self.keys) if keys.blocks is not None and layer in keys.layers)

    @torch.no_grad()
    def prebuilt(self) -> AudioContext:
        """The same context with every layer's K/V made now, once; without gradients."""
        return replace(self, keys=tuple(keys.prebuilt(self.llm) for keys in self.keys))

    def without(self, what: Hide) -> AudioContext:
        """The same context with some of the audio hidden.

        Raises:
            ConfigError: a span of time, where the tokens have none.
        """
        keys, rows = self.keys, self.hidden_rows
        if what.pathway != "rows":
            keys = tuple(part for one in keys for part in one.without(what))
        if what.pathway != "keys" and bool(self.audio_rows_BT.any()):
            hidden_BT = self.audio_rows_BT
            if what.placed:
                assert self.places is not None, "made without `located`"
                hidden_BT = self.places.chosen(what)
            everywhere = range(len(self.llm.windows))
            rows = (*rows, (frozenset(everywhere if what.layers is None else what.layers), hidden_BT))
        return replace(self, keys=keys, hidden_rows=rows)

    def rows_kind(self, layer: int, window: int | None) -> RowKind:
        """What decides which rows a layer's queries see: a sliding window, and which of `hidden_rows` hold there."""
        return window, tuple(i for i, (layers, _) in enumerate(self.hidden_rows) if layer in layers)

    def reordered(self, order_BT: Tensor) -> AudioContext:
        """The context after the rows of the sequence were put in another order ([B, T] of indices)."""
        return replace(
            self,
            rows_BT=self.rows_BT.gather(1, order_BT),
            audio_rows_BT=self.audio_rows_BT.gather(1, order_BT),
            hidden_rows=tuple((layers, hidden_BT.gather(1, order_BT)) for layers, hidden_BT in self.hidden_rows),
            places=None if self.places is None else self.places.ordered(order_BT),
            asks_BT=None if self.asks_BT is None else self.asks_BT.gather(1, order_BT),
        )

    def view(self, attention_mask: Tensor | None, position_ids: Tensor | None) -> AudioView:
        """What the query rows of one forward see; see `AudioView.of`."""
        return AudioView.of(self, attention_mask, position_ids)
