"""What encoders share that cut a spectrogram into patches of time and frequency.

Axes beside the legend in `pal/types.py`: S steps of time, P patches of one step, from low to high
frequency.
"""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from pal.transfer import real_ones
from pal.types import AudioFeatures

Frequency = Literal["tokens", "mean"]
"""`tokens`: every patch is a token, those of one step side by side, low frequencies first. `mean`: one
token a step, the mean over its frequencies, as LTU (Gong et al. 2024) and GAMA (Ghosh et al. 2024) do."""


def tokens_per_step(patches: int, frequency: Frequency) -> int:
    """Tokens that a step of so many patches becomes."""
    return patches if frequency == "tokens" else 1


def pad_windows(frames_WFM: Tensor, lengths: Sequence[int], frames: int, value: float) -> Tensor:
    """Make windows [W, F, M] so many `frames` long; behind each one's own `lengths` comes `value`."""
    frames_WFM = F.pad(frames_WFM, (0, 0, 0, frames - frames_WFM.shape[1]))
    if min(lengths) >= frames:
        return frames_WFM
    return frames_WFM.masked_fill(~real_ones(lengths, frames, frames_WFM.device)[:, :, None], value)


def to_features(x_WSPE: Tensor, steps: Sequence[int], frequency: Frequency, seconds_per_step: float) -> AudioFeatures:
    """Patches and how many steps of each window are real -> tokens in order of time."""
    x_WSPE = x_WSPE[:, : max(steps)]
    each = tokens_per_step(x_WSPE.shape[2], frequency)
    x_WAE = x_WSPE.flatten(1, 2) if frequency == "tokens" else x_WSPE.mean(2)
    return AudioFeatures(x_WAE, tuple(each * n for n in steps), seconds_per_step / each)
