"""`tiny`: log-mel frames and a small convolutional network, trained from scratch, without any download.

Every operation is local in time, so that a clip of any length needs no windows, and the cost is linear in its length.
"""

from collections.abc import Sequence
from functools import cache
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pal.config import StrictConfig
from pal.encoders.base import Encoder
from pal.registry import register
from pal.transfer import length_mask
from pal.types import AudioFeatures

_RATE = 16_000
_HOP = 160
_FFT = 512
_WINDOW = 400
_BETWEEN = -(-(_FFT - _HOP) // _HOP)
"""Hops of silence between clips, so that the last frame of a clip ends before the next clip begins."""
_FLOOR = 1e-8
"""Lowest power of a mel bin, before the logarithm; about the noise of 16-bit samples."""
_SILENCE = -1.0
"""Scaled logarithm of `_FLOOR`."""


@register("encoder", "tiny")
class Tiny(Encoder):
    """About 25 tokens a second: 100 frames a second, halved twice in time and four times in frequency."""

    class Config(StrictConfig):
        """Options of the encoder `tiny`."""

        width: int = 192
        """E, the width of a token."""
        channels: tuple[int, int, int, int] = (32, 48, 96, 128)
        """Channels of the four strided convolutions over time and frequency."""
        blocks: int = 3
        """Residual blocks over time; each widens a token's receptive field by 0.28 s to either side."""
        kernel: int = 15
        """Tokens that a block's depthwise convolution spans."""
        mels: int = 64
        """M, mel bins from 40 Hz to 8 kHz."""
        dropout: float = 0.1
        """Dropout on the residual branches."""
        margin: int = 4
        """Tokens of silence that are added before and after a clip."""
        mask_bins: int = 8
        """Largest width, in mel bins, of the two random bands of each clip that are masked in training (SpecAugment,
        Park et al. 2019); the default masks at most a quarter of all bins. A masked tone keeps its label. 0: none."""

        causal: bool = False
        """Causal convolutions: a token does not depend on audio after it, so in a stream it is final at once."""

        def toy(self) -> "Tiny.Config":
            """Toy size, with a few thousand weights."""
            return self.model_copy(update={"width": 12, "channels": (2, 3, 4, 6), "blocks": 1})

    sampling_rate = _RATE
    seconds_per_token = 4 * _HOP / _RATE

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.width = config.width
        channels = (1, *config.channels)
        strides = [(2, 2), (2, 2), (1, 2), (1, 2)]
        # a stride of 2 ends with the pair of frames that it joins; the other convolutions look back in `forward`
        self.back = [2 * (config.causal and along == 1) for along, _ in strides]
        self.convs = nn.ModuleList(
            nn.Conv2d(channels[i], channels[i + 1], 3, stride=stride, padding=(0 if back else 1, 1), bias=False)
            for i, (stride, back) in enumerate(zip(strides, self.back, strict=True))
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(c) for c in config.channels)
        self.project = nn.Linear(config.channels[-1] * -(-config.mels // 16), config.width)
        self.blocks = nn.ModuleList(_TinyBlock(config) for _ in range(config.blocks))
        self.norm = nn.LayerNorm(config.width)
        # the spectra and the four convolutions reach over 13 frames, less than four tokens, if causal less than six
        if config.causal:
            self.reach_seconds = (6 + config.blocks * (config.kernel - 1)) * self.seconds_per_token
            self.ahead_seconds = 0.0
        else:
            self.reach_seconds = (4 + config.blocks * (config.kernel // 2)) * self.seconds_per_token

    def frontend(self, samples_N: Tensor) -> Tensor:
        """Samples [N] at 16 kHz -> log10 mel power [ceil(N / 160), M], scaled so that -40 dB is 0 and 0 dB is 1."""
        return self.frontends([samples_N])[0]

    def frontends(self, windows: Sequence[Tensor]) -> list[Tensor]:
        """`frontend` of several clips, in one STFT over all of them with silence between."""
        counts = [-(-len(samples_N) // _HOP) for samples_N in windows]
        # Frame f is centred on sample 160 f + 80, so that the last frame overlaps the clip, whatever its length; if
        # causal, its window ends before sample 160 (f + 1).
        before = _FFT // 2 + (_WINDOW // 2 - _HOP if self.config.causal else -_HOP // 2)
        padded = []
        for samples_N, count in zip(windows, counts, strict=True):
            padded.append(F.pad(samples_N, (before, (count + _BETWEEN) * _HOP - before - len(samples_N))))
        spectrum_XF = torch.stft(
            torch.cat(padded), _FFT, _HOP, _WINDOW, torch.hann_window(_WINDOW), center=False, return_complex=True
        )
        power_FX = spectrum_XF.abs().square().T / (_WINDOW * 0.375)
        mel_FM = power_FX @ _mel_filters(self.config.mels)
        frames_FM = (mel_FM.clamp_min(_FLOOR).log10() + 4) / 4
        starts = accumulate((count + _BETWEEN for count in counts), initial=0)
        return [frames_FM[first : first + count] for first, count in zip(starts, counts, strict=False)]

    def forward(self, frames_WFM: Tensor, lengths: Sequence[int]) -> AudioFeatures:
        """Frames [W, F, M] -> tokens [W, ceil(F / 4), E]."""
        if self.training and self.config.mask_bins:
            frames_WFM = hide_bands(frames_WFM, self.config.mask_bins)
        # Clips are padded with silence on both sides, whose tokens are dropped again. Zero padding of the convolutions
        # would be a noise of -40 dB at the borders of the clip.
        margin = 4 * self.config.margin
        mask_WF = _mask(lengths, frames_WFM)
        if mask_WF is not None:
            frames_WFM = frames_WFM.masked_fill(~mask_WF[..., None], _SILENCE)
        frames_WFM = F.pad(frames_WFM, (0, 0, margin, margin), value=_SILENCE)
        tokens = tuple(-(-n // 4) for n in lengths)
        lengths = [n + 2 * margin for n in lengths]
        mask_WF = _mask(lengths, frames_WFM)
        # Channels last: the memory order in which CPU convolutions are fastest, up to 10 times here.
        x_WCFM = frames_WFM[:, None].to(memory_format=torch.channels_last)
        # Padding is set to zero before every convolution, as is the convolution's own padding: so a clip has the same
        # tokens in a padded batch as alone.
        for conv, norm, back, halves in zip(self.convs, self.norms, self.back, (True, True, False, False), strict=True):
            if mask_WF is not None:
                x_WCFM = x_WCFM * mask_WF[:, None, :, None]
            if back:
                x_WCFM = F.pad(x_WCFM, (0, 0, back, 0))
            x_WCFM = F.gelu(norm(conv(x_WCFM)))
            if halves:
                lengths = [(n + 1) // 2 for n in lengths]
                mask_WF = _mask(lengths, x_WCFM[:, 0])
        x_WAE = self.project(x_WCFM.permute(0, 2, 1, 3).flatten(2))
        for block in self.blocks:
            x_WAE = block(x_WAE, mask_WF)
        x_WAE = self.norm(x_WAE)[:, self.config.margin :][:, : max(tokens)]
        mask_WA = _mask(tokens, x_WAE)
        if mask_WA is not None:
            x_WAE = x_WAE * mask_WA[..., None]
        return AudioFeatures(x_WAE, tokens, self.seconds_per_token)


class _TinyBlock(nn.Module):
    """ConvNeXt block: depthwise convolution over time, norm, feed-forward network, in one residual branch."""

    def __init__(self, config: Tiny.Config) -> None:
        super().__init__()
        width = config.width
        self.back = config.kernel - 1 if config.causal else 0
        padding = 0 if config.causal else config.kernel // 2
        self.conv = nn.Conv1d(width, width, config.kernel, padding=padding, groups=width)
        self.norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_WAE: Tensor, mask_WA: Tensor | None) -> Tensor:
        real_WAE = x_WAE if mask_WA is None else x_WAE * mask_WA[..., None]
        y_WAE = self.conv(F.pad(real_WAE.mT, (self.back, 0))).mT
        return x_WAE + self.dropout(self.contract(F.gelu(self.expand(self.norm(y_WAE)))))


def hide_bands(frames_WFM: Tensor, max_bins: int) -> Tensor:
    """Set two random bands of each clip, of up to `max_bins` mel bins, to -40 dB."""
    W, _, M = frames_WFM.shape
    size_W2 = torch.randint(0, max_bins + 1, (W, 2), device=frames_WFM.device)
    first_W2 = (torch.rand(W, 2, device=frames_WFM.device) * (M - size_W2 + 1)).long()
    bin_M = torch.arange(M, device=frames_WFM.device)
    hidden_W2M = (bin_M >= first_W2[..., None]) & (bin_M < (first_W2 + size_W2)[..., None])
    return frames_WFM.masked_fill(hidden_W2M.any(1)[:, None], 0.0)


def _mask(lengths: Sequence[int], x_WAE: Tensor) -> Tensor | None:
    """True for real tokens [W, A]; None if all are real."""
    size = x_WAE.shape[1]
    return length_mask(lengths, size, x_WAE.device) if min(lengths) < size else None


@cache
def _mel_filters(mels: int) -> Tensor:
    """[FFT bins, M] triangular filters on Slaney's mel scale."""
    # Imported here: transformers takes a second to import, which reading a configuration should not cost.
    from transformers.audio_utils import mel_filter_bank

    filters = mel_filter_bank(_FFT // 2 + 1, mels, 40.0, _RATE / 2, _RATE, norm=None, mel_scale="slaney")
    return torch.from_numpy(filters).float()
