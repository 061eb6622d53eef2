"""`AudioContext`: the audio of a batch of rows, as keys and values at positions."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pal.backbone.attention_masks import RowKind
from pal.backbone.attention_metadata import AttentionMetadata
from pal.backbone.audio_keys import AudioKeys
from pal.backbone.audio_mask import AudioMask, TokenSpans
from pal.backbone.interfaces import AttentionGeometry
from pal.backbone.observers import AttentionObserver


@dataclass(frozen=True)
class AudioContext:
    """The audio of a batch of rows, as keys and values at positions, and the rows' own positions."""

    llm: AttentionGeometry
    keys: tuple[AudioKeys, ...]
    rows_BT: Tensor
    """Position ids of the prompt, which windows need when the cache holds only keys."""
    audio_rows_BT: Tensor
    """True where a row of the sequence is none of the text's: audio (summary tokens), or one that asks again."""
    hidden_rows: tuple[tuple[frozenset[int], Tensor], ...] = ()
    """Layers, and rows [B, T] that no other row sees there."""
    token_spans: TokenSpans | None = None
    """What each row stands for, where that was asked for."""
    observer: AttentionObserver | None = None
    """Who is shown the attention of a forward without a cache."""
    repeats_BT: Tensor | None = None
    """True where a row repeats the last text row behind clips, to say what follows them; None where none does."""

    def with_repeats(self, repeats_BT: Tensor) -> AudioContext:
        """The same context where some rows repeat the last text row before them, behind the clips between.

        Such a row sees all that the row it repeats does, itself in that one's place, and the clips. No other row sees
        it.
        """
        everywhere = frozenset(range(len(self.llm.windows)))
        return replace(self, repeats_BT=repeats_BT, hidden_rows=(*self.hidden_rows, (everywhere, repeats_BT)))

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

    def without(self, what: AudioMask) -> AudioContext:
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
                assert self.token_spans is not None, "made without `with_spans`"
                hidden_BT = self.token_spans.chosen(what)
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
            token_spans=None if self.token_spans is None else self.token_spans.ordered(order_BT),
            repeats_BT=None if self.repeats_BT is None else self.repeats_BT.gather(1, order_BT),
        )

    def attention_metadata(self, attention_mask: Tensor | None, position_ids: Tensor | None) -> AttentionMetadata:
        """What the query rows of one forward see; see `AttentionMetadata.of`."""
        return AttentionMetadata.of(self, attention_mask, position_ids)
