"""Shared functions of encoders that split a spectrogram into patches of time and frequency.

Axes in addition to the legend in `pal/types.py`: S time steps, P patches of a step, from low to high frequency.
"""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from pal.transfer import length_mask
from pal.types import AudioFeatures

Frequency = Literal["tokens", "mean"]
"""`tokens`: each patch is a token; those of a step follow one another, low frequencies first. `mean`: one token a step,
the mean over its patches, as in LTU (Gong et al. 2024) and GAMA (Ghosh et al. 2024)."""


def tokens_per_step(patches: int, frequency: Frequency) -> int:
    """Number of tokens of a step that has `patches` patches."""
    return patches if frequency == "tokens" else 1


def pad_windows(frames_WFM: Tensor, lengths: Sequence[int], frames: int, value: float) -> Tensor:
    """Pad windows [W, F, M] to `frames` frames; all frames after the first `lengths` of a window become `value`."""
    frames_WFM = F.pad(frames_WFM, (0, 0, 0, frames - frames_WFM.shape[1]))
    if min(lengths) >= frames:
        return frames_WFM
    return frames_WFM.masked_fill(~length_mask(lengths, frames, frames_WFM.device)[:, :, None], value)


def to_features(x_WSPE: Tensor, steps: Sequence[int], frequency: Frequency, seconds_per_step: float) -> AudioFeatures:
    """Patches [W, S, P, E] and the number of real steps of each window -> tokens in order of time."""
    x_WSPE = x_WSPE[:, : max(steps)]
    each = tokens_per_step(x_WSPE.shape[2], frequency)
    x_WAE = x_WSPE.flatten(1, 2) if frequency == "tokens" else x_WSPE.mean(2)
    return AudioFeatures(x_WAE, tuple(each * n for n in steps), seconds_per_step / each)
