"""`af_whisper`: the encoder of Audio Flamingo 3 in transformers; the padding of a clip gives no tokens."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pal.encoders.log_mel import WhisperLogMel
from pal.encoders.padding_mask import has_padding, use_padding_mask
from pal.encoders.pretrained import PretrainedEncoder, PretrainedOptions
from pal.registry import register
from pal.transfer import length_mask
from pal.types import AudioFeatures

_FRAMES_PER_TOKEN = 4
"""Two from the strided convolution, as in Whisper, times two from the average pooling after the last layer."""


@register("encoder", "af_whisper")
class AFWhisper(PretrainedEncoder):
    """Tokens of 40 ms, equal to those of transformers' AudioFlamingo3Encoder for the same 30 s window.

    Goel et al. 2025, "Audio Flamingo 3" (arXiv:2507.08128). The network always sees 30 s, as in training, but unlike
    Whisper does not attend to the padding, whose tokens are left out. If a clip ends in the first half of a token,
    transformers' processor drops this token, up to 20 ms of audio; here it is kept. `encode` splits longer clips into
    windows of 30 s.
    """

    class Config(PretrainedOptions):
        """Options of the encoder `af_whisper`; from a whole Audio Flamingo 3, only the `audio_tower` is read."""

        def toy(self) -> "AFWhisper.Config":
            """Toy size, with windows of four seconds."""
            sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
            return self.with_architecture(**sizes, max_source_positions=200)

    hub_ids = ("nvidia/audio-flamingo-3",)
    name = "af_whisper"
    example = "nvidia/audio-flamingo-3-hf"
    config_keys = {"audioflamingo3": "audio_config", "audioflamingo3_encoder": None}
    submodule = "audio_tower"

    @classmethod
    def classes(cls) -> tuple[Any, Any]:
        """`AudioFlamingo3EncoderConfig` and `AudioFlamingo3Encoder`."""
        from transformers import AudioFlamingo3Encoder, AudioFlamingo3EncoderConfig

        return AudioFlamingo3EncoderConfig, AudioFlamingo3Encoder

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        use_padding_mask(self.network)
        network = self.network.config
        self._log_mel = WhisperLogMel(network.num_mel_bins, frames=2 * network.max_source_positions)
        self.width = network.hidden_size
        self.sampling_rate = self._log_mel.sampling_rate
        self.seconds_per_token = _FRAMES_PER_TOKEN * self._log_mel.hop / self.sampling_rate
        self.window_seconds = self._log_mel.window_seconds

    def frontend(self, samples_N: Tensor) -> Tensor:
        """Samples at 16 kHz [N] -> log-mel frames of 10 ms [F, M], the real ones and a few more."""
        return self._log_mel([samples_N])[0]

    def frontends(self, windows: Sequence[Tensor]) -> list[Tensor]:
        """`frontend` of several windows; those of similar length share a call of the extractor."""
        return self._log_mel(windows)

    def forward(self, frames_WFM: Tensor, lengths: Sequence[int]) -> AudioFeatures:
        """Zero-padded frames from `frontend` and their number in each window -> tokens [W, A, E]."""
        windows_WFM = self._log_mel.fill(frames_WFM, lengths)
        real = self._log_mel.real(lengths)
        real_WF = length_mask(real, windows_WFM.shape[1], windows_WFM.device)
        with has_padding(min(real) < windows_WFM.shape[1]):
            x_WAE = self.network(windows_WFM.transpose(1, 2), input_features_mask=real_WF).last_hidden_state

        tokens = tuple((n - 1) // _FRAMES_PER_TOKEN + 1 for n in real)
        return AudioFeatures(x_WAE[:, : max(tokens)], tokens, self.seconds_per_token)
