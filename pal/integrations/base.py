"""The contract of integrations: audio features and conversations in, `LLMInputs` out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from pal.backbone.audio_kv import AudioKV
from pal.backbone.interfaces import PackedBlock
from pal.backbone.llm import Backbone
from pal.backbone.score_bias import Bias, KeyScale
from pal.backbone.session import Session
from pal.backbone.stream_kv import Layout, StreamKV
from pal.integrations.assembling import IntegrationOutput, assemble
from pal.types import AudioFeatures, LLMInputs, PaddingSide, Tokens

BLOCK_TOKENS = 4096
"""Tokens of a clip whose keys and values are made at once."""

__all__ = ["Integration", "IntegrationOutput", "Route"]


class Integration(nn.Module, ABC):
    """Fusion method: turns audio features and conversations into `LLMInputs`, which is all that later parts see.

    This base class arranges text, audio rows, positions, padding and labels, for all integrations. The routes of a
    concrete class compute audio rows, keys and values. An integration must not have the LLM as a submodule: the LLM's
    weights belong to the model.
    """

    @abstractmethod
    def routes(self) -> Sequence[Route]:
        """Route of each stream, in the order of the streams."""

    def forward(
        self,
        features: AudioFeatures | Sequence[AudioFeatures] | AudioKV | Sequence[AudioKV] | None,
        conversations: Sequence[Tokens],
        llm: Backbone,
        padding_side: PaddingSide = "right",
        with_spans: bool = False,
    ) -> LLMInputs:
        """Compute the `LLMInputs` of conversations.

        With several streams, a clip's tokens of the first stream come before those of the second, and so on.

        A token is predicted by the row before it. A token right after a clip needs a row that sees the whole clip, and
        some integrations have none (LAL has no audio rows). If a conversation ends with a clip, or a trained token
        follows one, the last text row is therefore repeated: one more row with the same embedding, at the clip's last
        position, where PLITS has its last audio row. The repeated row sees what the original sees, and the clip. No
        other row sees it, and later positions do not change. So generation, scoring and training agree, and no other
        row's logits depend on which tokens are trained.

        Args:
            features: the batch's clips: `AudioFeatures` [B, A, E] of each stream, or indexed clips, one `AudioKV` for
                each or one for all; None without clips.
            conversations: token ids; their `clips` are indices into the clips of `features`.
            llm: the backbone, for embeddings and K/V.
            padding_side: side of the padding of shorter conversations. "none": packed, one after the other without
                padding. If attention does not fit into segments (a sliding window over positions that have no
                row or key, or several, or `with_spans`), conversations are padded on the right instead. "any": packed
                on a GPU and where labelled conversations share a prefix, else padded on the right. Neighbours that
                begin alike, up to the end of their last clip, share it: its rows and keys are in the batch once.
            with_spans: add stream, clip and time span of each row and key (`TokenSpans`), which audio masks and
                attention observers need. A batch with clips then always has an audio context.

        Raises:
            PromptError: a conversation that is empty, names an unknown clip, or has no text beside a clip without
                audio rows.
        """
        return assemble(self._outputs_of(features, llm), conversations, llm, padding_side, with_spans)

    def _outputs_of(
        self, features: AudioFeatures | Sequence[AudioFeatures] | AudioKV | Sequence[AudioKV] | None, llm: Backbone
    ) -> list[IntegrationOutput]:
        if features is None:
            return []
        given = [features] if isinstance(features, AudioFeatures | AudioKV) else list(features)
        stored = [clip for clip in given if isinstance(clip, AudioKV)]
        if stored:
            moved = AudioKV.concat(stored).to(llm.device, llm.dtype)
            return [route.stored(stream) for route, stream in zip(self.routes(), moved.streams, strict=True)]
        streams = [stream for stream in given if isinstance(stream, AudioFeatures)]
        return [route.inject(stream, llm) for route, stream in zip(self.routes(), streams, strict=True)]

    @torch.no_grad()
    def index(
        self,
        features: AudioFeatures | Sequence[AudioFeatures],
        llm: Backbone,
        digest: str,
        durations: Sequence[float] | None = None,
    ) -> AudioKV:
        """Compute the `AudioKV` of clips, which any number of questions can use.

        Args:
            features: features of the clips, for each stream.
            llm: the backbone.
            digest: digest of the model's weights.
            durations: seconds of each clip; None: the time that the tokens of the first stream cover.
        """
        given = [features] if isinstance(features, AudioFeatures) else list(features)
        if durations is None:
            durations = [count * given[0].seconds_per_token for count in given[0].lengths]
        streams = [route.stream_kv(stream, llm) for route, stream in zip(self.routes(), given, strict=True)]
        return AudioKV(streams=tuple(streams), durations=tuple(durations), digest=digest)


class Route(Integration):
    """Integration of one stream; a model with one stream uses it directly.

    Constructed as `cls(config, in_width=E, llm=backbone)`.
    """

    runs_layers = False
    """True if it runs the attention of the LLM's layers outside of their forward pass. Sharded training then does not
    shard them layer by layer."""

    @abstractmethod
    def inject(self, features: AudioFeatures, llm: Backbone) -> IntegrationOutput:
        """Rows, keys and values of the clips of `features` [U, A, E]."""

    def routes(self) -> Sequence[Route]:
        """The route itself."""
        return (self,)

    def blocks(self) -> Mapping[int, PackedBlock] | None:
        """Cross-attention blocks by the layer that they precede, which does not see the keys itself; None without."""
        return None

    def bias(self) -> Bias | None:
        """Bias on the attention scores of the keys; None without."""
        return None

    def scale(self) -> KeyScale | None:
        """Factor on the keys; None without."""
        return None

    def row_bias(self) -> Bias | None:
        """Bias on the attention scores of the rows, as keys; None without."""
        return None

    def fold(self, llm: Backbone) -> int:
        """Fuse linear layers for inference; returns the number of LLM layers in which that was possible.

        Fused layers are used until weights or modules change; training never uses them.
        """
        return 0

    @torch.no_grad()
    def stream_kv(self, features: AudioFeatures, llm: Backbone) -> StreamKV:
        """Keys, values and audio rows of clips, computed now."""
        return _stream_kv(self, features, llm)

    def session(self, llm: Backbone, layout: Layout) -> Session:
        """A conversation that grows, with audio of this route; raises PalError as `Session` does."""
        row_bias = self.row_bias() if layout.rows else None
        return Session(llm, layout, self.blocks(), self.bias(), row_bias, self.scale())

    def stored(self, stream: StreamKV) -> IntegrationOutput:
        """`IntegrationOutput` of indexed clips, in place of `inject`."""
        return IntegrationOutput(
            lengths=stream.lengths,
            layout=stream.layout,
            rows_USD=stream.rows_BSD if stream.layout.rows else None,
            keys=stream if stream.layers else None,
            layers=stream.layers,
            width_A=stream.k_LBGAC.shape[3],
            kept=stream.kept(),
            blocks=self.blocks(),
            bias=self.bias(),
            scale=self.scale(),
            row_bias=self.row_bias() if stream.layout.rows else None,
        )


def _stream_kv(route: Route, features: AudioFeatures, llm: Backbone) -> StreamKV:
    """Keys, values and audio rows of clips; of long ones in blocks of whole groups, for little memory.

    Nothing is joined afterwards: each block is written to its place.
    """
    one = route.inject(_block(features, 0, 1), llm)
    layout, clips, tokens = one.layout, len(features.lengths), features.x_BAE.shape[1]
    width = tokens if one.keys is not None else 0
    step = tokens if layout.joint else max(1, BLOCK_TOKENS // layout.tokens) * layout.tokens
    shape = (len(one.layers), clips, llm.kv_heads, width, llm.head_width)
    k_LBGAC, v_LBGAC = (torch.empty(shape, device=llm.device, dtype=llm.dtype) for _ in range(2))
    rows: list[Tensor] = []
    for first in range(0, tokens, step):
        made = route.inject(_block(features, first, step), llm)
        for place, layer in enumerate(one.layers if made.keys is not None else ()):
            assert made.keys is not None
            k, v = made.keys.keys_values(layer)
            k_LBGAC[place, :, :, first : first + k.shape[2]] = k
            v_LBGAC[place, :, :, first : first + k.shape[2]] = v
        if made.rows_USD is not None:
            rows.append(made.rows_USD)
    rows_BSD = torch.cat(rows, dim=1) if rows else k_LBGAC.new_zeros(clips, 0, llm.width)
    return StreamKV(
        k_LBGAC=k_LBGAC,
        v_LBGAC=v_LBGAC,
        rows_BSD=rows_BSD,
        lengths=tuple(features.lengths),
        layers=one.layers,
        layout=layout,
    )


def _block(features: AudioFeatures, first: int, count: int) -> AudioFeatures:
    """Some tokens of all clips."""
    x_BAE = features.x_BAE[:, first : first + count]
    lengths = tuple(min(max(0, n - first), x_BAE.shape[1]) for n in features.lengths)
    return AudioFeatures(x_BAE, lengths, features.seconds_per_token)
