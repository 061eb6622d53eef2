"""`AudioContext`: audio keys and values of a batch, with their positions and those of the rows."""

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
from pal.backbone.score_bias import Bias


@dataclass(frozen=True)
class AudioContext:
    """Audio keys and values of a batch with their positions, and the positions of the sequences' rows."""

    llm: AttentionGeometry
    keys: tuple[AudioKeys, ...]
    rows_BT: Tensor
    """Position ids of the prompt's rows; sliding windows need them in decoding, when the cache holds only keys."""
    order_BT: Tensor
    """Places of the prompt's rows, which decide what keys they see."""
    audio_rows_BT: Tensor
    """True where a row of the sequence is not text: an audio row (PLITS, summary tokens) or a repeated row."""
    row_biases: tuple[tuple[Bias, Tensor], ...] = ()
    """Biases on the scores of audio rows as keys, and the rows [B, T] that each is for."""
    hidden_rows: tuple[tuple[frozenset[int], Tensor], ...] = ()
    """Layers, and rows [B, T] that no other row sees there."""
    token_spans: TokenSpans | None = None
    """Stream, clip and time span of each row; only made `with_spans`."""
    observer: AttentionObserver | None = None
    """Observer of the attention weights of a forward without a cache."""
    repeats_BT: Tensor | None = None
    """True where a row repeats the last text row behind clips, to predict the token after them; None without any."""

    def with_repeats(self, repeats_BT: Tensor) -> AudioContext:
        """The same context with some rows marked as repeated: copies of the last text row, behind clips.

        A repeated row sees what the original sees, itself in the original's place, and the clips. No other row sees it.
        """
        everywhere = frozenset(range(len(self.llm.windows)))
        return replace(self, repeats_BT=repeats_BT, hidden_rows=(*self.hidden_rows, (everywhere, repeats_BT)))

    def joined(self, layer: int) -> tuple[int, ...]:
        """Numbers of the `keys` that join the layer's own keys."""
        return tuple(i for i, keys in enumerate(self.keys) if keys.blocks is None and layer in keys.layers)

    def crossing(self, layer: int) -> tuple[int, ...]:
        """Numbers of the `keys` that a cross-attention block before the layer attends to."""
        return tuple(i for i, keys in enumerate(self.keys) if keys.blocks is not None and layer in keys.layers)

    @torch.no_grad()
    def prebuilt(self) -> AudioContext:
        """The same context with every layer's K/V computed now, without gradients."""
        return replace(self, keys=tuple(keys.prebuilt(self.llm) for keys in self.keys))

    def without(self, what: AudioMask) -> AudioContext:
        """The same context with some of the audio hidden.

        Raises:
            ConfigError: a time span, where the tokens have no time.
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
        """Kind of a layer: its sliding window, and the numbers of the `hidden_rows` that apply to it."""
        return window, tuple(i for i, (layers, _) in enumerate(self.hidden_rows) if layer in layers)

    def reordered(self, order_BT: Tensor) -> AudioContext:
        """The context for reordered rows: `order_BT` [B, T] are indices of rows."""
        return replace(
            self,
            rows_BT=self.rows_BT.gather(1, order_BT),
            order_BT=self.order_BT.gather(1, order_BT),
            audio_rows_BT=self.audio_rows_BT.gather(1, order_BT),
            row_biases=tuple((bias, rows_BT.gather(1, order_BT)) for bias, rows_BT in self.row_biases),
            hidden_rows=tuple((layers, hidden_BT.gather(1, order_BT)) for layers, hidden_BT in self.hidden_rows),
            token_spans=None if self.token_spans is None else self.token_spans.ordered(order_BT),
            repeats_BT=None if self.repeats_BT is None else self.repeats_BT.gather(1, order_BT),
        )

    def attention_metadata(self, attention_mask: Tensor | None, position_ids: Tensor | None) -> AttentionMetadata:
        """Attention metadata of one forward; see `AttentionMetadata.of`."""
        return AttentionMetadata.of(self, attention_mask, position_ids)
