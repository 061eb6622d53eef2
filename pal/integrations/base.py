"""The one contract of integrations: audio features and conversations in, `LLMInputs` out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import nn

from pal.backbone.audio_kv import AudioKV
from pal.backbone.interfaces import PackedBlock
from pal.backbone.llm import Backbone
from pal.backbone.stream_kv import StreamKV
from pal.integrations.assembling import IntegrationOutput, assemble
from pal.types import AudioFeatures, LLMInputs, Tokens

__all__ = ["Integration", "IntegrationOutput", "Route"]


class Integration(nn.Module, ABC):
    """Says how audio enters the LLM; everything after it only sees `LLMInputs`.

    Text, rows, positions, padding, labels and clips shared by several conversations are placed here,
    once for all; its routes say what is placed. It must not keep the LLM as a submodule, whose weights
    belong to the model.
    """

    @abstractmethod
    def routes(self) -> Sequence[Route]:
        """How the tokens of each stream enter, in the streams' order."""

    def forward(
        self,
        features: AudioFeatures | Sequence[AudioFeatures] | AudioKV | Sequence[AudioKV] | None,
        conversations: Sequence[Tokens],
        llm: Backbone,
        padding_side: Literal["left", "right", "none"] = "right",
        with_spans: bool = False,
    ) -> LLMInputs:
        """Place clips among the text of conversations.

        Where there are several streams, a clip's tokens of the first come before those of the second, and so on.

        The row before a text predicts its first token. Behind a clip there may be none that hears all of the clip
        (LAL makes no rows). Where a conversation ends so, or a trained token follows, the last text row is asked
        again: one more row with the same embedding at the clip's last position, where PLITS' last audio row stands.
        It sees what the row it repeats saw, and the clip; no other row sees it, and later text stands where it would
        without it. So generation, scoring and training agree, and no other row's logits depend on what is trained.

        Args:
            audio: the batch's clips as features, one for each stream, or as indexed before; None when no
                row has a clip.
            conversations: token ids; their `clips` are indices into `audio`.
            llm: the backbone, for embeddings and K/V.
            padding_side: where shorter rows are filled up. "none": conversations lie one after the other, without
                padding, wherever their attention can be had so; else on the right. (A sliding window over positions
                that have no row or key cannot, and `with_spans` is never.)
            with_spans: also say whose audio each row and key is and when it sounds (`TokenSpans`), for what hides some
                of it or watches the attention to it. There is then a context wherever there is a clip.

        Raises:
            PromptError: a row that is empty, names a clip that is not there, or has a clip that makes no rows and
                no text to ask about it.
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
        """The clips, ready to be asked about many times.

        Args:
            features: of the clips, one for each stream.
            llm: the backbone.
            digest: of the model's weights.
            durations: seconds of each clip; without them, those of the first stream's tokens.
        """
        given = [features] if isinstance(features, AudioFeatures) else list(features)
        if durations is None:
            durations = [count * given[0].seconds_per_token for count in given[0].lengths]
        streams = [_stored(output, llm) for output in self._outputs_of(given, llm)]
        return AudioKV(streams=tuple(streams), durations=tuple(durations), digest=digest)


class Route(Integration):
    """How the tokens of one stream enter the LLM; alone it is the integration of a model with one stream.

    Constructed as `cls(config, in_width=E, llm=backbone)`.
    """

    @abstractmethod
    def inject(self, features: AudioFeatures, llm: Backbone) -> IntegrationOutput:
        """What goes into the LLM for each clip of `features` [U, A, E]."""

    def routes(self) -> Sequence[Route]:
        """Itself."""
        return (self,)

    def blocks(self) -> Mapping[int, PackedBlock] | None:
        """Networks of its own before some of the LLM's layers, which look at the keys in the layers' place."""
        return None

    def fold(self, llm: Backbone) -> int:
        """Put together for inference what can be done in one product; in how many layers that was.

        It is used as long as weights and modules are what they were; training never uses it.
        """
        return 0

    def stored(self, stream: StreamKV) -> IntegrationOutput:
        """What `inject` gave when the clips were indexed."""
        return IntegrationOutput(
            lengths=stream.lengths,
            layout=stream.layout,
            rows_USD=stream.rows_BSD if stream.layout.rows else None,
            keys=stream if stream.layers else None,
            layers=stream.layers,
            width_A=stream.k_LBGAC.shape[3],
            blocks=self.blocks(),
        )


def _stored(output: IntegrationOutput, llm: Backbone) -> StreamKV:
    """All K/V and rows, made now."""
    clips = len(output.lengths)
    empty = torch.zeros(0, clips, llm.kv_heads, output.width_A, llm.head_width, device=llm.device, dtype=llm.dtype)
    k_LBGAC = v_LBGAC = empty
    if output.keys is not None:
        made = [output.keys.keys_values(layer) for layer in output.layers]
        k_LBGAC, v_LBGAC = (torch.stack(tensors) for tensors in zip(*made, strict=True))
    rows_BSD = output.rows_USD
    if rows_BSD is None:
        rows_BSD = torch.zeros(clips, 0, llm.width, device=llm.device, dtype=llm.dtype)
    return StreamKV(
        k_LBGAC=k_LBGAC,
        v_LBGAC=v_LBGAC,
        rows_BSD=rows_BSD,
        lengths=tuple(output.lengths),
        layers=output.layers,
        layout=output.layout,
    )
