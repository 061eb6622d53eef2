"""Whisper's encoder from transformers, any size, on the real part of a clip only."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pal.encoders.log_mel import WhisperLogMel
from pal.encoders.pretrained import PretrainedEncoder, PretrainedOptions
from pal.registry import register
from pal.types import AudioFeatures


@register("encoder", "whisper")
class Whisper(PretrainedEncoder):
    """Tokens of 20 ms, equal to those transformers' WhisperModel gives for the same 30 s window.

    The network always sees 30 s, as it was trained to; what comes after the clip is its own silence
    and is left out of the result. Longer clips are taken in windows of 30 s by `encode`.
    """

    class Config(PretrainedOptions):
        """Options of the encoder `whisper`."""

        def toy(self) -> "Whisper.Config":
            """Windows of four seconds."""
            sizes = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}
            return self.with_architecture(**sizes, max_source_positions=200)

    name = "whisper"
    example = "openai/whisper-small"
    places = {"whisper": None}
    part = "encoder"

    @classmethod
    def classes(cls) -> tuple[Any, Any]:
        """Those of transformers."""
        from transformers import WhisperConfig
        from transformers.models.whisper.modeling_whisper import WhisperEncoder

        return WhisperConfig, WhisperEncoder

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        whisper = self.network.config
        self._log_mel = WhisperLogMel(whisper.num_mel_bins, frames=2 * whisper.max_source_positions)
        self.width = whisper.d_model
        self.sampling_rate = self._log_mel.sampling_rate
        self.seconds_per_token = 2 * self._log_mel.hop / self.sampling_rate
        self.window_seconds = self._log_mel.window_seconds

    def frontend(self, samples_N: Tensor) -> Tensor:
        """Samples at 16 kHz [N] -> log-mel frames of 10 ms [F, M], a few more than the real ones."""
        return self._log_mel([samples_N])[0]

    def frontends(self, windows: Sequence[Tensor]) -> list[Tensor]:
        """The same of several windows, those of like length in one transform."""
        return self._log_mel(windows)

    def forward(self, frames_WFM: Tensor, lengths: Sequence[int]) -> AudioFeatures:
        """Frames as `frontend` makes them, zero-padded, and how many of each -> tokens [W, A, E]."""
        windows_WFM = self._log_mel.fill(frames_WFM, lengths)
        x_WAE = self.network(windows_WFM.transpose(1, 2)).last_hidden_state

        tokens = tuple((real - 1) // 2 + 1 for real in self._log_mel.real(lengths))
        return AudioFeatures(x_WAE[:, : max(tokens)], tokens, self.seconds_per_token)
