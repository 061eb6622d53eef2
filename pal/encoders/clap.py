"""`clap`: CLAP's audio encoder (HTSAT) of transformers, fused or not; the padding of a clip gives no tokens."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from pal.encoders.pretrained import PretrainedEncoder, PretrainedOptions
from pal.registry import register
from pal.types import AudioFeatures

# The front-end's numbers are those of laion/clap-htsat-fused and laion/clap-htsat-unfused.
_RATE = 48_000
_HOP = 480
_FFT = 1024
_LOW_HZ = 50
_HIGH_HZ = 14_000
_FLOOR = 1e-10
"""Lowest power before the logarithm: -100 dB."""
_WINDOW = 10 * _RATE
"""Samples of the network's input: 10 s."""
_FRAMES = _WINDOW // _HOP + 1


@register("encoder", "clap")
class Clap(PretrainedEncoder):
    """Tokens of the last feature map of transformers' ClapAudioModel, in order of time.

    Wu et al. 2023, "Large-scale contrastive language-audio pretraining with feature fusion and
    keyword-to-caption augmentation" (arXiv:2211.06687); Chen et al. 2022, "HTS-AT" (arXiv:2202.00874).

    The network's input is always 10 s long: a shorter clip is repeated as often as it fits, then padded with silence
    ("repeatpad"), as in training. The tokens of the repetitions are left out: their times are beyond the clip's end,
    and a single bark of a dog would appear several times. `encode` splits longer clips into windows of 10 s. So a fused
    model's fusion of random crops, which is for clips longer than 10 s, is never used, and its weights get no gradient.
    """

    class Config(PretrainedOptions):
        """Options of the encoder `clap`; `path` is a ClapModel, with or without its text part, or a ClapAudioModel."""

        frequency: Literal["tokens", "concat"] = "tokens"
        """How the feature map's two frequency bands become tokens. `tokens`: each band is a token, the low one first:
        64 tokens of 0.156 s for 10 s, as wide as the network. `concat`: both bands are one token, twice as wide: 32
        tokens of 0.3125 s, at half the cost."""

        def toy(self) -> "Clap.Config":
            """Toy size, with one layer at each scale."""
            sizes = {"depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 2], "patch_embeds_hidden_size": 8}
            return self.with_architecture(**sizes, hidden_size=64, enable_fusion=True)

    hub_ids = ("laion/clap", "laion/larger_clap")
    sampling_rate = _RATE
    window_seconds = _WINDOW / _RATE
    name = "clap"
    example = "laion/clap-htsat-fused"
    config_keys = {"clap": "audio_config", "clap_audio_model": None}
    submodule = "audio_model"
    computed = ("relative_position_index", "num_batches_tracked")

    @classmethod
    def classes(cls) -> tuple[Any, Any]:
        """`ClapAudioConfig` and `ClapAudioModel`."""
        from transformers import ClapAudioConfig, ClapAudioModel

        return ClapAudioConfig, ClapAudioModel

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        htsat = self.network.audio_encoder
        self._filters_XM = _mel_filters(self.network.config.num_mel_bins, fused=bool(htsat.enable_fusion))
        # no window is longer than 10 s, which a fused network would otherwise check on the device in each batch
        htsat.enable_fusion = htsat.patch_embed.enable_fusion = False
        # The network splits the spectrogram in time and stacks the parts along frequency to make a square.
        side = htsat.spec_size >> (htsat.num_layers - 1)
        bands = side // htsat.patch_stride[0] // htsat.freq_ratio
        self._steps = side // htsat.patch_stride[1] * htsat.freq_ratio
        self._tokens_per_step = bands if config.frequency == "tokens" else 1
        self.width = htsat.num_features if config.frequency == "tokens" else bands * htsat.num_features
        self.seconds_per_token = self.window_seconds / self._steps / self._tokens_per_step

    def frontend(self, samples_N: Tensor) -> Tensor:
        """Samples at 48 kHz [N] -> mel power in dB, every 10 ms [1001 + steps, M].

        The first 1001 frames are those of transformers' extractor, for the clip repeated to 10 s. Then follows a frame
        of zeros for each step of the feature map (0.3125 s) that contains some of the clip itself: so `forward` knows
        from the number of frames how many tokens are real.
        """
        return self.frontends([samples_N])[0]

    def frontends(self, windows: Sequence[Tensor]) -> list[Tensor]:
        """`frontend` of several windows, in one STFT."""
        repeated = [samples_N.cpu().double().repeat(_WINDOW // len(samples_N)) for samples_N in windows]
        filled_WN = torch.stack([F.pad(samples_N, (0, _WINDOW - len(samples_N))) for samples_N in repeated])
        hann = torch.hann_window(_FFT, dtype=torch.double)
        spectrum_WXF = torch.stft(filled_WN, _FFT, _HOP, window=hann, pad_mode="reflect", return_complex=True)
        power_WFM = spectrum_WXF.abs().square().mT @ self._filters_XM
        decibel_WFM = (10 * power_WFM.clamp_min(_FLOOR).log10()).float()
        steps = [-(-len(samples_N) * self._steps // _WINDOW) for samples_N in windows]
        return [F.pad(decibel_FM, (0, 0, 0, n)) for decibel_FM, n in zip(decibel_WFM, steps, strict=True)]

    def forward(self, frames_WFM: Tensor, lengths: Sequence[int]) -> AudioFeatures:
        """Zero-padded frames from `frontend` and their number in each window -> tokens [W, A, E]."""
        # X: frequency bands, low to high
        map_WEXA = self.network(frames_WFM[:, None, :_FRAMES]).last_hidden_state
        map_WAXE = map_WEXA.permute(0, 3, 2, 1)
        x_WAE = map_WAXE.flatten(1, 2) if self.config.frequency == "tokens" else map_WAXE.flatten(2)

        tokens = tuple((n - _FRAMES) * self._tokens_per_step for n in lengths)
        return AudioFeatures(x_WAE[:, : max(tokens)], tokens, self.seconds_per_token)


def _mel_filters(mels: int, fused: bool) -> Tensor:
    """Mel filters [513, M] as in training: HTK's, as in torchaudio, for fused models, Slaney's for the others."""
    from transformers.audio_utils import mel_filter_bank

    filters = mel_filter_bank(
        num_frequency_bins=_FFT // 2 + 1,
        num_mel_filters=mels,
        min_frequency=_LOW_HZ,
        max_frequency=_HIGH_HZ,
        sampling_rate=_RATE,
        norm=None if fused else "slaney",
        mel_scale="htk" if fused else "slaney",
    )
    return torch.from_numpy(filters).double()
