"""Conversion of transformers' tensors to conversations and clips, and back.

`input_ids` [B, T] contain `AUDIO` as the placeholder of a clip. `input_values` [U, N] and `audio_lengths` [U] are the U
clips of the batch, in the order of their placeholders, conversation by conversation. The columns of `input_ids` are not
the rows of the LLM's sequence: there a clip takes no row, one, or many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pal.errors import PromptError
from pal.types import AUDIO, IGNORE, LLMInputs, Tokens


@dataclass(frozen=True)
class PromptColumns:
    """Conversations and clips as `PalModel` takes them, with the `input_ids` that they come from."""

    ids_BT: Tensor
    real_BT: Tensor
    """False for padding."""
    conversations: list[Tokens]
    clips: list[Tensor]

    def with_columns(self, predicts_after_BT: Tensor) -> list[Tokens]:
        """The conversations with `Tokens.columns`, the index of each id in its conversation.

        Args:
            predicts_after_BT: [B, T], True for columns whose next id is predicted. For the column of a clip, this takes
                a row that attends to the whole clip.
        """
        predicts_after_BT = predicts_after_BT & (self.ids_BT == AUDIO)
        return [
            replace(
                one, columns=list(range(len(one.ids))), predicts_after=frozenset(flags[real].nonzero()[:, 0].tolist())
            )
            for one, flags, real in zip(self.conversations, predicts_after_BT, self.real_BT, strict=True)
        ]

    def predicting_rows(self, inputs: LLMInputs) -> tuple[Tensor, Tensor]:
        """Row of the LLM's sequence that predicts the id after each column [B, T], and whether there is one [B, T].

        Args:
            inputs: the LLM's inputs for `with_columns`, padded on the right.
        """
        assert inputs.columns_BT is not None
        ends = inputs.attention_mask_BT.sum(1).tolist()
        rows_BT = torch.zeros(self.ids_BT.shape, dtype=torch.long)
        has_row_BT = torch.zeros(self.ids_BT.shape, dtype=torch.bool)
        for b, (conversation, numbers) in enumerate(zip(self.conversations, inputs.columns_BT.tolist(), strict=True)):
            row_of = {number: row for row, number in enumerate(numbers) if number != IGNORE}
            columns = self.real_BT[b].nonzero()[:, 0].tolist()
            following = ends[b]
            for number in reversed(range(len(conversation.ids))):
                # the id after a clip is predicted by the row before it: the clip's last row, the repeated row, or
                # else the text's last
                row = row_of.get(number, following - 1)
                rows_BT[b, columns[number]] = max(row, 0)
                has_row_BT[b, columns[number]] = row >= 0
                following = row_of.get(number, following)
        return rows_BT, has_row_BT


def read_prompts(
    ids_BT: Tensor, mask_BT: Tensor | None, values_UN: Tensor | None, lengths_U: Tensor | None, pad: int | None
) -> PromptColumns:
    """Conversations and clips from transformers' tensors.

    Args:
        ids_BT: token ids, with `AUDIO` as the placeholder of each clip.
        mask_BT: 0 for padding; None: no padding.
        values_UN: waveforms.
        lengths_U: samples of each waveform; None: N for all.
        pad: id of padding; ids that are padded without a mask are an error.

    Raises:
        PromptError: tensors that do not fit together.
    """
    ids_BT = ids_BT.cpu()
    if ids_BT.dim() != 2:
        raise PromptError(f"input_ids have shape {list(ids_BT.shape)}, not [batch, length]; use PalProcessor")
    if mask_BT is None and len(ids_BT) > 1 and pad is not None and bool((ids_BT[:, [0, -1]] == pad).any()):
        raise PromptError("input_ids are padded, but there is no attention_mask; pass all that the processor gives")
    real_BT = torch.ones_like(ids_BT, dtype=torch.bool) if mask_BT is None else mask_BT.cpu() != 0
    if real_BT.shape != ids_BT.shape:
        raise PromptError(f"attention_mask has shape {list(real_BT.shape)}, input_ids {list(ids_BT.shape)}")
    clips = _clips(values_UN, lengths_U)
    conversations = []
    placed = 0
    for ids, real in zip(ids_BT, real_BT, strict=True):
        kept = ids[real].tolist()
        count = kept.count(AUDIO)
        conversations.append(Tokens(kept, list(range(placed, placed + count))))
        placed += count
    if placed != len(clips):
        raise PromptError(
            f"{len(clips)} clips but {placed} placeholders in input_ids; pass the input_ids and input_values "
            "of one call of the processor"
        )
    return PromptColumns(ids_BT, real_BT, conversations, clips)


def before_answers(ids_BT: Tensor, mask_BT: Tensor | None, labels_BT: Tensor) -> Tensor:
    """Attention mask [B, T] of what comes before the last labelled answer of each conversation.

    Raises:
        PromptError: labels of another shape.
    """
    if labels_BT.shape != ids_BT.shape:
        raise PromptError(f"labels have shape {list(labels_BT.shape)}, input_ids {list(ids_BT.shape)}")
    labelled_BT = (labels_BT.cpu() != IGNORE) & (ids_BT.cpu() != AUDIO)
    begins_BT = labelled_BT.clone()
    begins_BT[:, 1:] &= ~labelled_BT[:, :-1]
    columns_T = torch.arange(ids_BT.shape[1])
    ends_B = torch.where(begins_BT.any(1), (begins_BT * columns_T).max(1).values, ids_BT.shape[1])
    kept_BT = torch.ones(ids_BT.shape, dtype=torch.long) if mask_BT is None else mask_BT.cpu()
    return kept_BT * (columns_T < ends_B[:, None])


def stack_prompts(conversations: Sequence[Tokens], pad: int, side: str, width: int = 0) -> tuple[Tensor, Tensor]:
    """Ids [B, T] and mask [B, T] of conversations, padded on one side to the longest, or to `width`."""
    longest = max([width, *(len(one.ids) for one in conversations)])
    ids_BT = torch.full((len(conversations), longest), pad, dtype=torch.long)
    mask_BT = torch.zeros(len(conversations), longest, dtype=torch.long)
    for b, conversation in enumerate(conversations):
        length = len(conversation.ids)
        place = slice(longest - length, longest) if side == "left" else slice(0, length)
        ids_BT[b, place] = torch.tensor(conversation.ids, dtype=torch.long)
        mask_BT[b, place] = 1
    return ids_BT, mask_BT


def _clips(values_UN: Tensor | None, lengths_U: Tensor | None) -> list[Tensor]:
    if values_UN is None:
        return []
    if values_UN.dim() != 2:
        raise PromptError(f"input_values have shape {list(values_UN.shape)}, not [clips, samples]; use PalProcessor")
    lengths = [values_UN.shape[1]] * len(values_UN) if lengths_U is None else lengths_U.tolist()
    if len(lengths) != len(values_UN) or any(not 0 < n <= values_UN.shape[1] for n in lengths):
        raise PromptError(
            f"audio_lengths {lengths} do not fit input_values of shape {list(values_UN.shape)}; "
            "pass all that the processor gives"
        )
    return [samples_N[:n].float() for samples_N, n in zip(values_UN, lengths, strict=True)]
