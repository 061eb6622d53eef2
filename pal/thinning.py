"""Scores for `AudioKV.thin`: which keys of an indexed clip may be left out."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pal.backbone.audio_kv import AudioKV
from pal.backbone.context import AudioContext
from pal.backbone.observers import AttentionWeights
from pal.conversations import read_question
from pal.errors import PalError

if TYPE_CHECKING:
    from pal.model import PalModel


class _KeyMass:
    """Observer that sums the attention on each audio key, over heads and over the rows it watches."""

    def __init__(self, rows_BN: Tensor) -> None:
        self.rows_BN = rows_BN
        self.mass_A: dict[tuple[int, int], Tensor] = {}
        """By the number of the key set, and the layer."""

    def attended(self, layer: int, weights: AttentionWeights) -> None:
        """Attention of a layer."""
        for which, weights_BHNA in weights.keys_BHNA.items():
            self.crossed(layer, which, weights_BHNA)

    def crossed(self, layer: int, which: int, weights_BHNA: Tensor) -> None:
        """Attention of a cross-attention block before a layer."""
        self.mass_A[which, layer] = weights_BHNA.sum((0, 1, 2))


def norm_scores(clip: AudioKV, smallest: bool = True) -> list[Tensor | None]:
    """Scores by the norm of each key, mean over heads: those of the smallest stay, or of the largest.

    Small keys stay in the KV cache compression of Devoto et al. (2024), for text. For audio both lose more than even
    spacing (docs/audio_once.md).

    Returns:
        [L, B, A] for each stream; None for a stream without keys.
    """
    found: list[Tensor | None] = []
    for stream in clip.streams:
        norm_LBGA = stream.k_LBGAC.float().norm(dim=-1)
        if stream.k_scale_LBGA is not None:
            norm_LBGA = norm_LBGA * stream.k_scale_LBGA
        found.append((-1 if smallest else 1) * norm_LBGA.mean(2) if stream.layers else None)
    return found


@torch.inference_mode()
def attention_scores(model: PalModel, clip: AudioKV, question: str) -> list[Tensor | None]:
    """Scores for `AudioKV.thin`: the attention on each key by the text after the clip, summed over heads.

    Args:
        model: that indexed the clip.
        clip: one clip, not thinned.
        question: that the rows after the clip ask.

    Returns:
        [L, 1, A] for each stream; None for a stream without keys.

    Raises:
        PalError: several clips, or a thinned one.
    """
    if len(clip) != 1 or any(stream.kept_LBA is not None for stream in clip.streams):
        raise PalError("attention scores are of one whole clip; take one of the batch, before it is thinned")
    (asked,) = read_question(question, 1, model.tokenizer, model.config.style).tokens
    inputs = model.inputs([clip], [asked], with_spans=True)
    context = inputs.audio_context
    assert isinstance(context, AudioContext)
    after = len(asked.ids) - 1 - asked.ids.index(-1)
    rows = inputs.position_ids_BT.shape[1]
    watch = _KeyMass(torch.arange(rows - after, rows, device=model.device)[None])
    model.llm.hidden(replace(inputs, audio_context=replace(context, observer=watch)))
    found: list[Tensor | None] = []
    sets = iter(range(len(context.keys)))
    for stream in clip.streams:
        if not stream.layers:
            found.append(None)
            continue
        which = next(sets)
        found.append(torch.stack([watch.mass_A[which, layer] for layer in stream.layers])[:, None])
    return found
