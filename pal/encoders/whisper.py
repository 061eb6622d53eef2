"""`whisper`: the Whisper encoder of transformers, any size; the padding of a clip gives no tokens."""

from collections.abc import Sequence
from typing import Any

from pydantic import Field
from torch import Tensor, nn

from pal.encoders.log_mel import WhisperLogMel
from pal.encoders.pretrained import PretrainedEncoder, PretrainedOptions
from pal.errors import ConfigError
from pal.registry import register
from pal.types import AudioFeatures


@register("encoder", "whisper")
class Whisper(PretrainedEncoder):
    """Tokens of 20 ms, equal to those of transformers' WhisperModel for the same 30 s window.

    The network always sees 30 s, as in training: shorter clips are padded with silence, whose tokens are left out.
    `encode` splits longer clips into windows of 30 s. With `window_seconds`, windows are shorter and cost less.
    """

    class Config(PretrainedOptions):
        """Options of the encoder `whisper`."""

        window_seconds: float | None = Field(default=None, ge=0.04, multiple_of=0.02)
        """Length of a window, where it is shorter than that of the checkpoint, which then uses its first position
        embeddings only. A window of 10 s costs about a quarter of one of 30 s. Tokens differ from those of Whisper's
        own window, so connectors must be trained with the same value. None: that of the checkpoint, 30 s."""

        def toy(self) -> "Whisper.Config":
            """Toy size, with windows of four seconds."""
            sizes = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}
            return self.model_copy(update={"window_seconds": None}).with_architecture(**sizes, max_source_positions=200)

    name = "whisper"
    example = "openai/whisper-small"
    config_keys = {"whisper": None}
    submodule = "encoder"

    @classmethod
    def classes(cls) -> tuple[Any, Any]:
        """`WhisperConfig` and `WhisperEncoder`."""
        from transformers import WhisperConfig
        from transformers.models.whisper.modeling_whisper import WhisperEncoder

        return WhisperConfig, WhisperEncoder

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if config.window_seconds is not None:
            self._shorten(config.window_seconds)
        whisper = self.network.config
        self._log_mel = WhisperLogMel(whisper.num_mel_bins, frames=2 * whisper.max_source_positions)
        self.width = whisper.d_model
        self.sampling_rate = self._log_mel.sampling_rate
        self.seconds_per_token = 2 * self._log_mel.hop / self.sampling_rate
        self.window_seconds = self._log_mel.window_seconds

    def _shorten(self, seconds: float) -> None:
        """Keep the first position embeddings only. Raises ConfigError if the window is no shorter."""
        network = self.network
        tokens, most = round(seconds / 0.02), network.config.max_source_positions
        if tokens > most:
            raise ConfigError(
                f"encoder 'whisper': window_seconds is {seconds:g}, but the checkpoint's window has {most * 0.02:g} s; "
                "give less, or leave it out"
            )
        positions = nn.Embedding(tokens, network.config.d_model)
        positions.weight = nn.Parameter(network.embed_positions.weight.detach()[:tokens].clone(), requires_grad=False)
        network.embed_positions = positions
        network.max_source_positions = network.config.max_source_positions = tokens

    def frontend(self, samples_N: Tensor) -> Tensor:
        """Samples at 16 kHz [N] -> log-mel frames of 10 ms [F, M], the real ones and a few more."""
        return self._log_mel([samples_N])[0]

    def frontends(self, windows: Sequence[Tensor]) -> list[Tensor]:
        """`frontend` of several windows; those of similar length share a call of the extractor."""
        return self._log_mel(windows)

    def forward(self, frames_WFM: Tensor, lengths: Sequence[int]) -> AudioFeatures:
        """Zero-padded frames from `frontend` and their number in each window -> tokens [W, A, E]."""
        windows_WFM = self._log_mel.fill(frames_WFM, lengths)
        x_WAE = self.network(windows_WFM.transpose(1, 2)).last_hidden_state

        tokens = tuple((real - 1) // 2 + 1 for real in self._log_mel.real(lengths))
        return AudioFeatures(x_WAE[:, : max(tokens)], tokens, self.seconds_per_token)
