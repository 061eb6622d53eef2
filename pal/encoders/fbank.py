"""Kaldi's log-mel filter bank, the front-end that AST, SSLAM and BEATs were trained on.

Numbers as in Kaldi's `compute-fbank-feats` at 16 kHz, which is also what torchaudio's
`compliance.kaldi.fbank` and the numpy path of transformers' `ASTFeatureExtractor` compute: frames of
25 ms every 10 ms, the mean of each frame subtracted, pre-emphasis 0.97, an FFT of 512 points,
triangles from 20 Hz to 8 kHz on Kaldi's mel scale, natural logarithm, no dither, no energy.
"""

import warnings
from collections.abc import Sequence
from functools import cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

RATE = 16_000
"""Sampling rate in Hz."""
HOP = 160
"""Samples between the starts of frames: 10 ms."""

_LENGTH = 400
_FFT = 512
_PREEMPHASIS = 0.97
_FLOOR = torch.finfo(torch.float32).eps
"""Lowest energy of a mel bin, before the logarithm."""


def fbank(
    samples_N: Tensor,
    mels: int = 128,
    window: Literal["hanning", "povey"] = "hanning",
    scale: float = 1.0,
    frames: int | None = None,
) -> Tensor:
    """Samples at 16 kHz [N] -> log-mel energies, float32 [F, M], on the CPU.

    Args:
        samples_N: at least one sample, full scale 1.
        mels: M.
        window: `hanning`, or Kaldi's own `povey`, which is hanning to the power of 0.85.
        scale: factor on the samples; 2 ** 15 gives the 16-bit integers that Kaldi expects.
        frames: F; None: the smallest number that covers all samples.

    Kaldi drops up to 159 samples at the end, which do not fill a frame. Here the clip is padded with zeros, so that
    the last frame contains them; all other frames are Kaldi's.
    """
    return fbanks([samples_N], mels, window, scale, None if frames is None else [frames])[0]


def fbanks(
    clips: Sequence[Tensor],
    mels: int = 128,
    window: Literal["hanning", "povey"] = "hanning",
    scale: float = 1.0,
    frames: Sequence[int] | None = None,
) -> list[Tensor]:
    """`fbank` of several clips of any lengths, in one FFT."""
    if frames is None:
        frames = [whole_frames(len(samples_N)) for samples_N in clips]
    framed = []
    for samples_N, count in zip(clips, frames, strict=True):
        samples_N = samples_N.detach().cpu().double() * scale
        behind = (count - 1) * HOP + _LENGTH - len(samples_N)
        framed.append(F.pad(samples_N, (0, behind)).unfold(0, _LENGTH, HOP))
    framed_FN = torch.cat(framed)
    framed_FN = framed_FN - framed_FN.mean(1, keepdim=True)
    before_FN = torch.cat([framed_FN[:, :1], framed_FN[:, :-1]], 1)
    spectrum_FX = torch.fft.rfft((framed_FN - _PREEMPHASIS * before_FN) * _window(window), _FFT)
    energy_FM = (spectrum_FX.abs().square() @ _filters(mels)).clamp_min(_FLOOR).log().float()
    return list(energy_FM.split(list(frames)))


def whole_frames(samples: int) -> int:
    """Smallest number of frames that cover all samples."""
    return 1 + max(0, -(-(samples - _LENGTH) // HOP))


def hops(samples: int) -> int:
    """Number of 10 ms steps, rounded up; 0 to 2 more than `whole_frames`."""
    return -(-samples // HOP)


@cache
def _window(name: str) -> Tensor:
    window_N = torch.hann_window(_LENGTH, periodic=False, dtype=torch.float64)
    return window_N if name == "hanning" else window_N**0.85


@cache
def _filters(mels: int) -> Tensor:
    """[FFT bins, M]."""
    # Imported here: transformers takes a second to import, which reading a configuration should not cost.
    from transformers.audio_utils import mel_filter_bank

    with warnings.catch_warnings():
        # With 128 mel bins, one of the lowest lies between two FFT bins and is always silent, as in Kaldi.
        warnings.filterwarnings("ignore", message="At least one mel filter has all zero values")
        filters_XM = mel_filter_bank(
            num_frequency_bins=_FFT // 2 + 1,
            num_mel_filters=mels,
            min_frequency=20,
            max_frequency=RATE // 2,
            sampling_rate=RATE,
            norm=None,
            mel_scale="kaldi",
            triangularize_in_mel_space=True,
        )
    return torch.from_numpy(filters_XM).double()
