"""CLAP's audio encoder (HTSAT) from transformers, fused or not, on the real part of a clip only."""

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
"""Power that counts as silence: -100 dB."""
_WINDOW = 10 * _RATE
"""Samples that the network was trained on."""
_FRAMES = _WINDOW // _HOP + 1


@register("encoder", "clap")
class Clap(PretrainedEncoder):
    """Tokens of the last feature map of transformers' ClapAudioModel, in order of time.

    Wu et al. 2023, "Large-scale contrastive language-audio pretraining with feature fusion and
    keyword-to-caption augmentation" (arXiv:2211.06687); Chen et al. 2022, "HTS-AT" (arXiv:2202.00874).

    The network's input is always 10 s long: a shorter clip is repeated as often as it fits whole and padded
    with silence ("repeatpad"), as in training. The tokens of the repetitions are left out of the
    result: their times are beyond the clip's end, and a single bark of a dog would appear
    several times. Longer clips are taken in windows of 10 s by `encode`. So no window is "longer", and
    a fused model's fusion of crops, for which transformers' extractor picks crops and clips at
    random, is never used; its weights get no gradient.
    """

    class Config(PretrainedOptions):
        """Options of the encoder `clap`; `path` may be a ClapModel, with or without its text, or a ClapAudioModel."""

        frequency: Literal["tokens", "concat"] = "tokens"
        """What becomes of the feature map's two halves of the spectrum, low and high. `tokens`: each is
        a token, the low one first, 64 of 0.156 s for 10 s; the LLM can tell them apart and the width
        stays that of the network. `concat`: one token twice as wide, 32 of 0.3125 s, half the cost."""

        def toy(self) -> "Clap.Config":
            """One layer at each scale."""
            sizes = {"depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 2], "patch_embeds_hidden_size": 8}
            return self.with_architecture(**sizes, hidden_size=64, enable_fusion=True)

    hub_ids = ("laion/clap", "laion/larger_clap")
    sampling_rate = _RATE
    window_seconds = _WINDOW / _RATE
    name = "clap"
    example = "laion/clap-htsat-fused"
    places = {"clap": "audio_config", "clap_audio_model": None}
    part = "audio_model"
    computed = ("relative_position_index", "num_batches_tracked")

    @classmethod
    def classes(cls) -> tuple[Any, Any]:
        """Those of transformers."""
        from transformers import ClapAudioConfig, ClapAudioModel

        return ClapAudioConfig, ClapAudioModel

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        htsat = self.network.audio_encoder
        self._filters_XM = _mel_filters(self.network.config.num_mel_bins, fused=bool(htsat.enable_fusion))
        # no window is longer, which a fused network would otherwise ask the device at every batch
        htsat.enable_fusion = htsat.patch_embed.enable_fusion = False
        # The spectrogram is cut in time into pieces that are stacked along frequency to make a square.
        side = htsat.spec_size >> (htsat.num_layers - 1)
        bands = side // htsat.patch_stride[0] // htsat.freq_ratio
        self._steps = side // htsat.patch_stride[1] * htsat.freq_ratio
        self._tokens_per_step = bands if config.frequency == "tokens" else 1
        self.width = htsat.num_features if config.frequency == "tokens" else bands * htsat.num_features
        self.seconds_per_token = self.window_seconds / self._steps / self._tokens_per_step

    def frontend(self, samples_N: Tensor) -> Tensor:
        """Samples at 48 kHz [N] -> mel power in dB, every 10 ms [1001 + steps, M].

        The first 1001 frames are those of transformers' extractor: the clip repeated to 10 s. As many
        rows of zeros follow as steps of the feature map (0.3125 s) hold some of the clip itself, so
        that the number of rows says how much is real.
        """
        return self.frontends([samples_N])[0]

    def frontends(self, windows: Sequence[Tensor]) -> list[Tensor]:
        """The same of several windows in one transform."""
        repeated = [samples_N.cpu().double().repeat(_WINDOW // len(samples_N)) for samples_N in windows]
        filled_WN = torch.stack([F.pad(samples_N, (0, _WINDOW - len(samples_N))) for samples_N in repeated])
        hann = torch.hann_window(_FFT, dtype=torch.double)
        spectrum_WXF = torch.stft(filled_WN, _FFT, _HOP, window=hann, pad_mode="reflect", return_complex=True)
        power_WFM = spectrum_WXF.abs().square().mT @ self._filters_XM
        decibel_WFM = (10 * power_WFM.clamp_min(_FLOOR).log10()).float()
        steps = [-(-len(samples_N) * self._steps // _WINDOW) for samples_N in windows]
        return [F.pad(decibel_FM, (0, 0, 0, n)) for decibel_FM, n in zip(decibel_WFM, steps, strict=True)]

    def forward(self, frames_WFM: Tensor, lengths: Sequence[int]) -> AudioFeatures:
        """Frames as `frontend` makes them, zero-padded, and how many of each -> tokens [W, A, E]."""
        # X: halves of the spectrum, low to high
        map_WEXA = self.network(frames_WFM[:, None, :_FRAMES]).last_hidden_state
        map_WAXE = map_WEXA.permute(0, 3, 2, 1)
        x_WAE = map_WAXE.flatten(1, 2) if self.config.frequency == "tokens" else map_WAXE.flatten(2)

        tokens = tuple((n - _FRAMES) * self._tokens_per_step for n in lengths)
        return AudioFeatures(x_WAE[:, : max(tokens)], tokens, self.seconds_per_token)


def _mel_filters(mels: int, fused: bool) -> Tensor:
    """Weights [513, M]: HTK's, as torchaudio makes them, for fused models, Slaney's for the others, as in training."""
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
