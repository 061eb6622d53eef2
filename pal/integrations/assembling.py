"""`LLMInputs` from the layout of conversations and the output of each route: padded, or packed without padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pal.backbone.audio_keys import AudioKeys, gather
from pal.backbone.audio_mask import TokenSpans
from pal.backbone.context import AudioContext
from pal.backbone.interfaces import KeySource, PackedBlock
from pal.backbone.llm import Backbone
from pal.backbone.packed import PackedContext, PackedRowBias, PackedSource, take_rows
from pal.backbone.packed_tiles import tiles_of
from pal.backbone.score_bias import Bias, KeyScale
from pal.backbone.segments import Segments, numbers_of, segments_of, where, widened
from pal.backbone.stream_kv import Layout
from pal.errors import PromptError
from pal.integrations.filling import filler, rounded, uniform
from pal.integrations.moving import MovedKeys, MovedTargets, Moves, device_segments, move_segments
from pal.integrations.sequence_layout import Ints, SequenceLayout, StreamLayout, lay_out, share_prefixes
from pal.transfer import move
from pal.types import AUDIO, IGNORE, LLMInputs, PaddingSide, Tokens


@dataclass(frozen=True)
class IntegrationOutput:
    """Output of a route for some clips: rows of the LLM's sequence, keys and values, or both."""

    lengths: Sequence[int]
    """Audio tokens of each clip."""
    layout: Layout
    """How keys and rows of a clip lie in the order of the conversation, and their position ids."""
    rows_USD: Tensor | None = None
    """Embeddings of audio rows, which run through all layers; None without any."""
    keys: KeySource | None = None
    """Source of the K/V of all clips, [U, G, A, C] each; None without any."""
    layers: tuple[int, ...] = ()
    """Layers that attend to the keys."""
    width_A: int = 0
    """A of `keys`, padding included."""
    kept: Mapping[int, Sequence[Ints]] | None = None
    """For each layer and clip, the tokens that have keys; None: all."""
    blocks: Mapping[int, PackedBlock] | None = None
    """Cross-attention blocks before layers: they attend to the keys, and the layers themselves do not."""
    bias: Bias | None = None
    """Bias on the scores of the keys; None without."""
    scale: KeyScale | None = None
    """Factor on the keys; None without."""
    row_bias: Bias | None = None
    """Bias on the scores of the rows as keys; None without."""

    @property
    def stream_layout(self) -> StreamLayout:
        """The part of this output that the layout depends on; on the host."""
        return StreamLayout(self.lengths, self.layout, self.rows_USD is not None, self.keys is not None)

    @property
    def firsts(self) -> Ints:
        """Index of each clip's first key among those that packed rows refer to, then the number of all."""
        if self.packs:
            return np.cumsum([0, *self.lengths])
        return np.arange(len(self.lengths) + 1) * self.width_A

    @property
    def by_layer(self) -> Sequence[IntegrationOutput]:
        """The same for each layer, if other layers may have keys of other tokens."""
        if self.kept is None:
            return (self,)
        return [replace(self, layers=(layer,)) for layer in self.layers]

    @property
    def packs(self) -> bool:
        """True if `keys` can compute K/V of packed tokens, without padding."""
        return isinstance(self.keys, PackedSource)


def assemble(
    streams: Sequence[IntegrationOutput],
    conversations: Sequence[Tokens],
    llm: Backbone,
    side: PaddingSide,
    with_spans: bool,
) -> LLMInputs:
    """`LLMInputs` of conversations; see `Integration.forward`."""
    if not conversations:
        raise PromptError("there is no conversation; give at least one")
    layouts = lay_out(conversations, [output.stream_layout for output in streams], with_spans)
    if side in ("none", "any") and not with_spans and all(output.kept is None for output in streams):
        shared = layouts
        if llm.shares_prefixes and any(one.labels is not None for one in conversations):
            shared = share_prefixes(layouts, conversations)
        tiled = side == "any" and not llm.packs
        if side == "none" or llm.packs or (any(one.shared for one in shared) and llm.tiles):
            inputs = _packed(shared, streams, conversations, llm, tiled)
            if inputs is not None:
                return inputs
    return _padded(layouts, streams, conversations, llm, "left" if side == "left" else "right", with_spans)


# Packed


def _packed(
    layouts: list[SequenceLayout],
    streams: Sequence[IntegrationOutput],
    conversations: Sequence[Tokens],
    llm: Backbone,
    tiled: bool,
) -> LLMInputs | None:
    """Packed inputs; None if attention in some layer does not fit into segments or, if `tiled`, tiles."""
    joining = [i for i, output in enumerate(streams) if output.keys is not None]
    labelled = any(one.labels is not None for one in conversations)
    shares = any(one.shared for one in layouts)
    n_real = len(layouts)
    more: tuple[int, ...] = (0,) * len(streams)
    # only what can become CUDA graphs: see `LossGraphs.total` and `PromptGraphs.read`
    if labelled:
        capturable = all(streams[i].packs for i in joining) and (shares or not uniform(layouts))
    else:
        capturable = all(streams[i].blocks is None for i in joining)
    fills = capturable and llm.captures(labelled)
    if fills:
        totals = [int(output.firsts[-1]) if output.packs else None for output in streams]
        clips, text = len(streams[0].lengths) if streams else 0, len(_text_ids(conversations))
        last, more = filler([one.own for one in layouts], clips, totals, text)
        layouts = [*layouts, last]
    packed_conversations = [one.conversation() for one in layouts]
    own_layouts = [one.own for one in layouts]
    lengths = tuple(len(one) for one in own_layouts)
    furthest = max(max(int(one.positions.max() - min(0, one.positions.min())), len(one) - 1) for one in layouts)
    windows = tuple(None if window is None or window > furthest else window for window in llm.windows)
    has_keys = any(len(positions_A) for one in packed_conversations for positions_A in one.keys)
    repeats = any(one.repeats.any() for one in layouts)
    biased = [(i, output.row_bias) for i, output in enumerate(streams) if output.row_bias is not None]
    equal = len(set(lengths)) == 1 and not (fills or has_keys or any(windows) or repeats or biased or shares)
    kinds = [(windows[layer], _joined(streams, layer) if has_keys else ()) for layer in range(llm.n_layers)]
    segments_of_kind: dict[tuple[int | None, tuple[int, ...]], Segments] = {}
    if tiled and (any(windows) or repeats):
        return None
    seen = [i for i in joining if streams[i].blocks is None] if has_keys else []
    for kind in () if equal or tiled else dict.fromkeys(kinds):
        segments = segments_of(packed_conversations, kind[1], kind[0])
        if segments is None:
            return None
        segments_of_kind[kind] = widened(segments, rounded) if fills else segments

    moves = Moves()
    text_ids = _text_ids(conversations, len(layouts[-1]) if fills else 0)
    index_N, back = _table_index(own_layouts, streams, len(text_ids))
    token_ids = moves.add(text_ids)
    positions = moves.add(np.concatenate([one.positions for one in own_layouts]))
    table = None if index_N is None else (moves.add(index_N), [moves.add(x) for x in back])
    sources = [moves.add(np.concatenate([one.sources == i for one in own_layouts])) for i, _ in biased]
    targets = MovedTargets(
        layouts[:n_real],
        [rows_T for rows_T, _ in numbers_of(packed_conversations[:n_real], ())],
        moves,
        lengths[n_real:],
    )
    size = rounded if fills else None
    on_device = {kind: move_segments(segments, moves, size) for kind, segments in segments_of_kind.items()}
    _ready(streams, more)
    keys = [
        MovedKeys(i, streams[i], more[i], own_layouts, packed_conversations, moves, size) for i in joining if has_keys
    ]
    moves.go(llm.device)

    shape = (len(layouts), lengths[0]) if equal else (1, sum(lengths))
    if table is None:
        embeds_BTD = llm.embed(moves[token_ids].view(shape))
    else:
        table_XD = _table(llm, moves[token_ids], streams)
        table_XD = take_rows(table_XD, moves[table[0]], tuple(moves[at] for at in table[1]))
        # no view: torch.compile would compile one graph for views and another for layers' outputs
        embeds_BTD = table_XD.view(*shape, -1).clone()
    order = {kind: number for number, kind in enumerate(segments_of_kind)}
    return LLMInputs(
        inputs_embeds_BTD=embeds_BTD,
        position_ids_BT=moves[positions].long().view(shape),
        attention_mask_BT=torch.ones(shape, dtype=torch.long, device=llm.device),
        audio_context=PackedContext(
            llm=llm,
            lengths=lengths[:n_real],
            segments=tuple(device_segments(moves, on_device[kind]) for kind in segments_of_kind),
            tiles=tiles_of(packed_conversations, seen, llm.device) if tiled else None,
            kinds=tuple(order[kind] for kind in kinds) if segments_of_kind else (),
            conversations=tuple(packed_conversations[:n_real]),
            windows=windows,
            keys=tuple(one.keys(moves, llm) for one in keys),
            row_biases=tuple(
                PackedRowBias(i, bias, moves[at].bool()) for (i, bias), at in zip(biased, sources, strict=True)
            ),
        ),
        labels_BT=targets.labels(moves, shape) if labelled else None,
        targets=targets.made(moves) if labelled else None,
    )


def _ready(streams: Sequence[IntegrationOutput], more: Sequence[int] | None) -> None:
    """Compute what all layers share. `more`: filling tokens of each stream, for packed rows; None: padded rows."""
    for number, output in enumerate(streams):
        if isinstance(output.keys, PackedSource):
            output.keys.ready(None if more is None else more[number])


def _joined(streams: Sequence[IntegrationOutput], layer: int) -> tuple[int, ...]:
    """Streams, by number, whose keys the layer attends to together with its own."""
    return tuple(
        i
        for i, output in enumerate(streams)
        if output.keys is not None and output.blocks is None and layer in output.layers
    )


# Padded


def _padded(
    layouts: list[SequenceLayout],
    streams: Sequence[IntegrationOutput],
    conversations: Sequence[Tokens],
    llm: Backbone,
    side: Literal["left", "right"],
    with_spans: bool,
) -> LLMInputs:
    """Inputs padded to the longest conversation."""
    device, left = llm.device, side == "left"
    labelled = any(one.labels is not None for one in conversations)
    longest = max(len(one) for one in layouts)
    text_ids = _text_ids(conversations)
    index_N, _ = _table_index(layouts, streams, len(text_ids), always=True)
    assert index_N is not None
    lengths = [len(one) for one in layouts]
    starts = np.cumsum([0, *lengths])
    table_BT, real_BT = _stack([index_N[a:b] for a, b in pairwise(starts)], left, 0)
    positions_BT, _ = _stack([one.positions for one in layouts], left, 0)
    order_BT, _ = _stack([one.order for one in layouts], left, 0)
    labels_BT, _ = _stack([one.labels for one in layouts], left, IGNORE)
    moves = Moves()
    token_ids = moves.add(text_ids)
    at_table, at_positions, at_order, at_real, at_labels = map(
        moves.add, (table_BT, positions_BT, order_BT, real_BT, labels_BT)
    )
    firsts = [b * longest + (longest - length if left else 0) for b, length in enumerate(lengths)]
    targets = MovedTargets(layouts, [np.arange(n) + first for n, first in zip(lengths, firsts, strict=True)], moves)
    moves.go(device)
    table_XD = _table(llm, moves[token_ids], streams)

    context = None
    _ready(streams, None)
    if any(output.keys is not None or output.row_bias is not None or with_spans for output in streams) and any(
        one.clips for one in conversations
    ):
        audio_rows_BT, _ = _stack([~one.is_text for one in layouts], left, False)
        repeats_BT, _ = _stack([one.repeats for one in layouts], left, False)
        context = AudioContext(
            llm=llm,
            keys=tuple(
                _audio_keys(part, part.keys, i, layouts, conversations, device)
                for i, output in enumerate(streams)
                for part in output.by_layer
                if part.keys is not None
            ),
            rows_BT=moves[at_positions].long(),
            order_BT=moves[at_order].long(),
            audio_rows_BT=torch.tensor(audio_rows_BT).to(device),
            row_biases=tuple(
                (
                    output.row_bias,
                    torch.tensor(_stack([one.sources == i for one in layouts], left, False)[0]).to(device),
                )
                for i, output in enumerate(streams)
                if output.row_bias is not None
            ),
            token_spans=_token_spans([one.spans for one in layouts], left, device) if with_spans else None,
        )
        if repeats_BT.any():
            context = context.with_repeats(torch.tensor(repeats_BT).to(device))
    return LLMInputs(
        inputs_embeds_BTD=gather(table_XD, moves[at_table].long()),
        position_ids_BT=moves[at_positions].long(),
        attention_mask_BT=moves[at_real].long(),
        audio_context=context,
        labels_BT=moves[at_labels].long() if labelled else None,
        targets=targets.made(moves) if labelled else None,
        columns_BT=_columns(layouts, conversations, left),
    )


def _columns(layouts: list[SequenceLayout], conversations: Sequence[Tokens], left: bool) -> Tensor | None:
    """`Tokens.columns` of each text row, `IGNORE` for other rows; None if a conversation has no columns."""
    made = []
    for one, conversation in zip(layouts, conversations, strict=True):
        if conversation.columns is None:
            return None
        columns_T = np.full(len(one), IGNORE)
        ids = zip(conversation.columns, conversation.ids, strict=True)
        columns_T[one.is_text] = [column for column, token in ids if token != AUDIO]
        made.append(columns_T)
    return torch.from_numpy(_stack(made, left, IGNORE)[0])


def _audio_keys(
    output: IntegrationOutput,
    source: KeySource,
    stream: int,
    layouts: list[SequenceLayout],
    conversations: Sequence[Tokens],
    device: torch.device,
) -> AudioKeys:
    keys = [one.keys[stream] for one in layouts]
    if output.kept is not None:
        keys = [one.of_tokens(output.kept[output.layers[0]]) for one in keys]
    tokens_BA, mask_BA = _stack([one.clips * output.width_A + one.tokens for one in keys], False, 0)
    order_BA, _ = _stack([one.order for one in keys], False, 0)
    positions_BA, _ = _stack([one.positions for one in keys], False, 0)
    rope_positions_BA, _ = _stack([one.rope_positions for one in keys], False, 0)
    tokens, order, positions, rope_positions = (
        x.long() for x in move([tokens_BA, order_BA, positions_BA, rope_positions_BA], device)
    )
    one_each = [one.clips for one in conversations] == [[clip] for clip in range(len(output.lengths))]
    spans = [one.spans for one in keys]
    return AudioKeys(
        source=source,
        layers=output.layers,
        tokens_BA=None if one_each else tokens,
        order_BA=order,
        positions_BA=positions,
        rope_positions_BA=rope_positions,
        mask_BA=torch.tensor(mask_BA).to(device),
        blocks=output.blocks,
        bias=output.bias,
        scale=output.scale,
        token_spans=None if spans[0] is None else _token_spans(spans, False, device),
    )


def _token_spans(spans: Sequence[NDArray[np.float64] | None], left: bool, device: torch.device) -> TokenSpans:
    columns = []
    for column, fill in enumerate((-1, -1, np.nan, np.nan)):
        given = [one[:, column] for one in spans if one is not None]
        columns.append(torch.tensor(_stack(given, left, fill)[0], dtype=torch.long if column < 2 else torch.float32))
    stream, clip, start, end = (x.to(device) for x in columns)
    return TokenSpans(stream, clip, start, end)


def _stack(
    arrays: Sequence[NDArray[np.generic]], left: bool, fill: float
) -> tuple[NDArray[np.generic], NDArray[np.bool_]]:
    """Arrays of different lengths padded to one matrix [B, longest], and its mask: True where an entry is real."""
    longest = max(len(one) for one in arrays)
    matrix = np.full((len(arrays), longest), fill, arrays[0].dtype)
    mask = np.zeros((len(arrays), longest), bool)
    for i, one in enumerate(arrays):
        place = slice(longest - len(one), longest) if left else slice(0, len(one))
        matrix[i, place] = one
        mask[i, place] = True
    return matrix, mask


# Both


def _text_ids(conversations: Sequence[Tokens], more: int = 0) -> Ints:
    """Token ids of the text of all conversations, and `more` zeros."""
    return np.array([token for one in conversations for token in one.ids if token != AUDIO] + [0] * more, np.int64)


def _table(llm: Backbone, ids_X: Tensor, streams: Sequence[IntegrationOutput]) -> Tensor:
    """Embeddings of the text of all conversations, then the audio rows of each stream: [X, D]."""
    table_XD = llm.embed(ids_X)
    audio_rows = [output.rows_USD.flatten(0, 1) for output in streams if output.rows_USD is not None]
    return torch.cat((table_XD, *(x_XD.to(table_XD.dtype) for x_XD in audio_rows))) if audio_rows else table_XD


def _table_index(
    layouts: list[SequenceLayout], streams: Sequence[IntegrationOutput], words: int, always: bool = False
) -> tuple[Ints | None, tuple[Ints, ...]]:
    """Index of each row in the table of embeddings, and of each table entry in the rows; None if both are the same.

    Table entries without a row are padding of shorter clips, or text of a shared prefix. `words`: number of text
    tokens.
    """
    firsts, widths, total = [], [], words
    for output in streams:
        firsts.append(total)
        widths.append(0 if output.rows_USD is None else output.rows_USD.shape[1])
        total += 0 if output.rows_USD is None else output.rows_USD[..., 0].numel()
    first_S, width_S = np.array([*firsts, 0]), np.array([*widths, 0])  # text is stream -1
    index_N = np.concatenate(
        [first_S[one.sources] + np.maximum(one.clips, 0) * width_S[one.sources] + one.numbers for one in layouts]
    )
    if not always and total == words and np.array_equal(index_N, np.arange(total)):
        return None, ()
    return index_N, () if always else where(index_N, total)
