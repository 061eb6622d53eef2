"""`Session`: a conversation that grows, in which text and audio may alternate; each part is read once.

Whatever comes later sees all that came before. So a layer's keys and values are appended to its storage as they arrive,
text and audio alike, and nothing is moved, masked or read again. A question costs its own rows and one look at the
storage; audio costs its own keys and, where the integration has any, its own rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pal.backbone.attention import without_cudnn
from pal.backbone.audio_keys import rotate
from pal.backbone.decoding import DecodingState, options_of, resolved
from pal.backbone.growing import GrowingKeys
from pal.backbone.interfaces import Block, LaterRows
from pal.backbone.merged import AttentionTile, TiledKeys, attention_in_turn, prefixes
from pal.backbone.options import check_generation
from pal.backbone.score_bias import Bias, KeyScale
from pal.backbone.stream_kv import Layout, StreamKV
from pal.errors import PalError

if TYPE_CHECKING:
    from pal.backbone.llm import Backbone

KINDS = ("text", "rows", "keys", "crossed")
"""What a layer stores: keys and values of text rows, of audio rows, of audio keys that join its own, and of those that
a cross-attention block before it attends to."""


BLOCK = 4096
"""Tokens of a stored clip that are attended to at once."""


@dataclass(frozen=True)
class SessionMark:
    """A moment of a session, to return to."""

    counts: tuple[int, ...]
    stored: int
    position: int
    clip: int
    tokens: int


class Session:
    """Conversation that grows.

    Args:
        llm: in evaluation mode, without sliding windows.
        layout: of the audio. Its position ids must not depend on what comes later (`Layout.before`).
        blocks: cross-attention blocks by layer; None where the layers themselves attend to the audio's keys.
        bias: on the scores of audio keys. row_bias: on those of audio rows. scale: factor on audio keys.

    Raises:
        PalError: an LLM or a layout for which earlier parts would have to be read again.
    """

    def __init__(
        self,
        llm: Backbone,
        layout: Layout,
        blocks: Any = None,
        bias: Bias | None = None,
        row_bias: Bias | None = None,
        scale: KeyScale | None = None,
    ) -> None:
        if not self.suits(llm, layout):
            raise PalError(
                "a growing conversation needs an LLM without sliding windows, and audio whose positions and tokens "
                "do not depend on what comes later; ask about an AudioKV instead"
            )
        self.llm, self.layout, self.blocks = llm, layout, blocks
        self.bias, self.row_bias, self.scale = bias or {}, row_bias or {}, scale or {}
        self.position = 0
        """Position id of what comes next."""
        self.clip = 0
        """Position id at which the clip began."""
        self.tokens = 0
        """Audio tokens of the clip so far."""
        self.stores = {kind: [GrowingKeys() for _ in range(llm.n_layers)] for kind in KINDS}
        self.stored: list[StoredKeys] = []
        """Audio that is attended where it is stored."""

    @staticmethod
    def suits(llm: Backbone, layout: Layout) -> bool:
        """Whether a session with this LLM and audio is possible."""
        return not (any(llm.windows) or layout.before or layout.joint) and llm.attends_to_audio

    @staticmethod
    def answers_with(llm: Backbone, options: Mapping[str, Any]) -> bool:
        """Whether `generate` supports transformers' options: greedy search, or one sample."""
        known = options_of(resolved(llm, options), options)
        return known is not None and known.copies == 1 and known.streamer is None and llm.attends_to_audio

    def mark(self) -> SessionMark:
        """This moment."""
        counts = tuple(len(store) for stores in self.stores.values() for store in stores)
        return SessionMark(counts, len(self.stored), self.position, self.clip, self.tokens)

    def back_to(self, mark: SessionMark) -> None:
        """Forget all that came after a moment."""
        stores = [store for stores in self.stores.values() for store in stores]
        for store, count in zip(stores, mark.counts, strict=True):
            store.keep(count)
        del self.stored[mark.stored :]
        self.position, self.clip, self.tokens = mark.position, mark.clip, mark.tokens

    def begin_clip(self) -> None:
        """What is heard next is another clip; text in between says so, too."""
        self.clip, self.tokens = self.position, 0

    def forget(self, tokens: int) -> None:
        """Hide the oldest audio tokens, in whole groups, from all that comes later; earlier marks are void.

        Positions stay, so what is kept is as far from what comes later as before.

        Raises:
            PalError: audio that is attended where it is stored.
        """
        if self.stored:
            raise PalError("stored audio is attended whole; to forget a part of it, hear it chunk by chunk")
        groups = tokens // self.layout.tokens
        for kind, each in (("rows", self.layout.rows), ("keys", self.layout.tokens), ("crossed", self.layout.tokens)):
            for store in self.stores[kind]:
                store.drop(min(groups * each, len(store)))

    @torch.no_grad()
    def hear_stored(self, clip: StreamKV) -> None:
        """Append a clip whose keys and values stay where they are, on any device or in a mapped file.

        Attention reads them in blocks, each time anew. Those of cross-attention blocks are copied, as by `hear`.
        """
        for block in clip.blocks(BLOCK):
            self.hear(block, in_place=self.blocks is None)

    @torch.no_grad()
    def hear(self, chunk: StreamKV, in_place: bool = False) -> None:
        """Append audio: the next whole groups of the clip, or its end.

        Args:
            chunk: of the clip.
            in_place: do not copy its keys and values; see `hear_stored`.

        Raises:
            PalError: the clip already ended within a group.
        """
        layout, tokens = self.layout, chunk.lengths[0]
        if chunk.kept_LBA is not None:
            raise PalError("a growing conversation takes whole clips, not thinned ones; ask about the AudioKV instead")
        if self.tokens % layout.tokens:
            raise PalError("this clip ended within a group of tokens; go back to a mark before its end")
        stored = StoredKeys(chunk, layout.key_rope_positions(tokens, self.clip, self.tokens), self)
        keys: dict[int, tuple[Tensor, Tensor]] = {}
        if layout.keys and (layout.rows or not in_place):
            keys = {layer: stored.keys_values(layer) for layer in chunk.layers}
        if layout.rows:
            order_S = layout.row_offsets(tokens)
            counts_S = np.searchsorted(layout.key_offsets(tokens), order_S, side="right")
            positions_S = torch.from_numpy(layout.row_positions(tokens, self.clip, self.tokens))
            rows_1SD = chunk.rows_BSD.to(self.llm.device)
            self.run(rows_1SD, positions_S, "rows", keys, counts_S.tolist())
        if layout.keys and in_place:
            self.stored.append(stored)
        else:
            kind = "keys" if self.blocks is None else "crossed"
            for layer, pair in keys.items():
                self.stores[kind][layer].append(*pair)
        self.tokens += tokens
        self.position = self.clip + layout.reserved(self.tokens)

    @torch.no_grad()
    def read(self, ids: Sequence[int]) -> Tensor:
        """Append text; logits [1, V] of the token after it."""
        ids_1T = torch.tensor([list(ids)], device=self.llm.device)
        positions_T = torch.arange(self.position, self.position + len(ids))
        self.position += len(ids)
        self.begin_clip()
        hidden_1TD = self.run(self.llm.embed(ids_1T), positions_T, "text")
        logits: Tensor = self.llm.lm.lm_head(hidden_1TD[:, -1])
        return logits

    @torch.no_grad()
    def generate(self, logits_1V: Tensor, **kwargs: Any) -> Tensor:
        """New token ids [1, N] after a text, whose rows are appended, too, the last one excepted.

        Args:
            logits_1V: of the first token, from `read`.
            kwargs: transformers' options; greedy search and sampling.

        Raises:
            PalError: an option that only transformers' own loop has.
        """
        check_generation(kwargs)
        options = options_of(resolved(self.llm, kwargs), kwargs)
        if options is None or options.copies > 1 or options.streamer is not None:
            raise PalError("a growing conversation is answered by greedy search or one sample; ask about an AudioKV")
        state = DecodingState(_OneAnswer(), options, self.llm.device)
        state.begin(torch.full((1, 1), self.position - 1, device=self.llm.device))
        for count in range(options.tokens):
            if count:
                logits_1V = self.read([int(state.next_R1)])
            state.choose(logits_1V)
            for watcher in options.read_only_processors:
                assert state.logits_RV is not None
                watcher(state.said_RN[:, :count], state.logits_RV)
            if options.ends and bool(state.ended_R.all()):
                break
        return state.said_RN[:, : int(state.lengths_R.max())].clone()

    def answer(self, ids: Sequence[int], **options: Any) -> Tensor:
        """New token ids [1, N] after a text; the session then forgets the text and the answer."""
        mark = self.mark()
        made_1N = self.generate(self.read(ids), **options)
        self.back_to(mark)
        return made_1N

    def run(
        self,
        x_1QD: Tensor,
        positions_Q: Tensor,
        kind: str,
        new: dict[int, tuple[Tensor, Tensor]] | None = None,
        counts_Q: list[int] | None = None,
    ) -> Tensor:
        """Run rows through the LLM and store their keys and values; hidden states [1, Q, D]."""
        metadata = SessionRows(self, kind, new or {}, counts_Q or [0] * x_1QD.shape[1])
        with without_cudnn():
            out = self.llm.lm.model(
                inputs_embeds=x_1QD.to(self.llm.dtype),
                position_ids=positions_Q.to(self.llm.device)[None],
                attention_mask=x_1QD.new_zeros(1, 1, 1, 1),  # given a 4-dimensional mask, transformers makes none
                use_cache=False,
                attention_metadata=metadata,
            )
        hidden: Tensor = out.last_hidden_state
        return hidden


@dataclass(frozen=True, eq=False)
class StoredKeys:
    """Audio keys and values that stay where they are stored; attention asks for those of a layer when it needs them."""

    chunk: StreamKV
    positions_A: NDArray[np.int64]
    """Positions that RoPE rotates the keys by."""
    session: Session

    def keys_values(self, layer: int) -> tuple[Tensor, Tensor]:
        """K after RoPE and V of a layer on the LLM's device, each [1, G, A, C]."""
        llm, tokens, scale = self.session.llm, self.chunk.lengths[0], self.session.scale
        k_1GAC, v_1GAC = (x_1GAC[:, :, :tokens].to(llm.device, llm.dtype) for x_1GAC in self.chunk.keys_values(layer))
        rope = llm.rope(torch.from_numpy(self.positions_A).to(llm.device)[None])
        k_1GAC = rotate(k_1GAC, *rope[llm.layer_types[layer]])
        if layer in scale:
            k_1GAC = k_1GAC * scale[layer].to(k_1GAC.dtype)[:, None, None]
        return k_1GAC, v_1GAC


class _OneAnswer:
    """What `DecodingState` asks of a cache."""

    answers = 1
    fixed_room = None


@dataclass(frozen=True, eq=False)
class SessionRows(LaterRows):
    """Attention metadata of a session's new rows."""

    session: Session
    kind: str
    new: dict[int, tuple[Tensor, Tensor]]
    """Audio keys and values, by layer, that come with the rows."""
    counts_Q: list[int]
    """How many of these each row sees."""

    def crosses(self, layer: int) -> bool:
        """Whether a cross-attention block comes before the layer, and there is audio for it."""
        return self.session.blocks is not None and len(self.session.stores["crossed"][layer]) > 0

    def cross(self, layer: int, x_1QD: Tensor) -> Tensor:
        """The layer's input rows after the block before it."""
        block: Block = self.session.blocks[layer]
        return block(x_1QD, *self.session.stores["crossed"][layer].view(), None)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """Queries [1, H, Q, C], keys and values of the new rows [1, G, Q, C], which are stored -> [1, Q, H, C]."""
        session, Q = self.session, query.shape[2]
        biases = {"rows": session.row_bias.get(layer), "keys": session.bias.get(layer)}

        def keys_of(pair: tuple[Tensor, Tensor], kind: str, tiles: tuple[AttentionTile, ...]) -> TiledKeys:
            bias = biases.get(kind)
            return TiledKeys(*pair, tiles, () if bias is None else ((bias[:, None], None),))

        def sets() -> Iterator[TiledKeys]:
            own = AttentionTile((0, 1), (0, Q), (0, Q), causal=True)
            yield keys_of((key, value), self.kind, (own,))
            if layer in self.new and session.blocks is None and any(self.counts_Q):
                yield keys_of(self.new[layer], "keys", prefixes([self.counts_Q], query.device))
            for kind in ("text", "rows", "keys"):
                store = session.stores[kind][layer]
                if len(store):
                    yield keys_of(store.view(), kind, (AttentionTile((0, 1), (0, Q), (0, len(store))),))
            for one in session.stored:
                if layer in one.chunk.layers:
                    whole = AttentionTile((0, 1), (0, Q), (0, len(one.positions_A)))
                    yield keys_of(one.keys_values(layer), "keys", (whole,))

        out = attention_in_turn(query, sets(), scale)
        session.stores[self.kind][layer].append(key, value)
        return out.contiguous()
