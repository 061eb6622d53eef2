"""Tagging targets of a clip, overall and for each token."""

import torch
from torch import Tensor

from pal.types import TagSpan


def tag_targets(
    spans: list[TagSpan], index: dict[str, int], tokens: int, seconds_per_token: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Targets of the clip [J], targets of each token [A, J], and mask of the labels with known times [J]."""
    clip_J = torch.zeros(len(index))
    frames_AJ = torch.zeros(tokens, len(index))
    timed_J = torch.ones(len(index), dtype=torch.bool)
    starts_A = torch.arange(tokens) * seconds_per_token
    has_times = any(span.start is not None for span in spans)
    for span in spans:
        if span.label not in index:
            continue
        label = index[span.label]
        clip_J[label] = 1
        if span.start is None or span.end is None:
            timed_J[label] = False
        else:
            inside_A = (starts_A + seconds_per_token > span.start) & (starts_A < span.end)
            frames_AJ[:, label] = torch.maximum(frames_AJ[:, label], inside_A.float())
    return clip_J, frames_AJ, timed_J if has_times else torch.zeros_like(timed_J)
