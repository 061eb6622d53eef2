"""The Audio Spectrogram Transformer (Gong et al. 2021) from transformers, on the real part of a clip only."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from pal.encoders.fbank import HOP, RATE, begun_frames, fbanks
from pal.encoders.patches import Frequency, pad_windows, to_features, tokens_per_step
from pal.encoders.pretrained import PretrainedEncoder, PretrainedOptions
from pal.errors import ConfigError
from pal.registry import register
from pal.types import AudioFeatures


@register("encoder", "ast")
class AST(PretrainedEncoder):
    """Patches of 16 mel bins by 160 ms, one every 10 bins and 100 ms: 12 a step, in order of time.

    They equal those that transformers' ASTModel gives for the same window, without its two class
    tokens and put from frequency-major into time-major order. The network always sees 1024 frames, as
    it was trained to, of which 101 steps can be made; they stand for 10.1 s, so that is the window.
    What comes after a clip is the extractor's own padding and is left out of the result.
    """

    class Config(PretrainedOptions):
        """Options of the encoder `ast`."""

        frequency: Frequency = "tokens"
        """`tokens`: every patch is a token. `mean`: one token a step, the mean over its 12 frequencies."""
        mean: float = -4.2677393
        """Of the log-mel frames; AudioSet's, which the models trained on AudioSet take."""
        std: float = 4.5689974
        """Of the log-mel frames; they are divided by twice this."""

        def toy(self) -> "AST.Config":
            """Windows of a second."""
            sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
            return self.with_architecture(**sizes, max_length=128)

    hub_ids = ("MIT/ast",)
    sampling_rate = RATE
    name = "ast"
    example = "MIT/ast-finetuned-audioset-10-10-0.4593"
    places = {"audio-spectrogram-transformer": None}
    part = "audio_spectrogram_transformer"

    @classmethod
    def classes(cls) -> tuple[Any, Any]:
        """Those of transformers."""
        from transformers import ASTConfig, ASTModel

        return ASTConfig, ASTModel

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        ast = self.network.config
        if not isinstance(ast.patch_size, int) or ast.time_stride > ast.patch_size:
            raise ConfigError("encoder 'ast': needs square patches without gaps between them; give another model")
        self.width = ast.hidden_size
        self._patches = (ast.num_mel_bins - ast.patch_size) // ast.frequency_stride + 1
        self._steps = (ast.max_length - ast.patch_size) // ast.time_stride + 1
        self._step_seconds = ast.time_stride * HOP / RATE
        self.seconds_per_token = self._step_seconds / tokens_per_step(self._patches, config.frequency)
        self.window_seconds = self._steps * self._step_seconds
        self._padding = self._normalise(0.0)

    def frontend(self, samples_N: Tensor) -> Tensor:
        """Samples at 16 kHz [N] -> normalised log-mel frames of 10 ms [ceil(N / 160), M].

        They equal those of transformers' ASTFeatureExtractor on the clip with up to 159 zeros behind
        it, which fill the last frame. The steps of 10 ms in which no frame begins have its padding.
        """
        return self.frontends([samples_N])[0]

    def frontends(self, windows: Sequence[Tensor]) -> list[Tensor]:
        """The same of several windows in one transform."""
        made = fbanks(windows, mels=self.network.config.num_mel_bins)
        return [
            F.pad(
                self._normalise(frames_FM),
                (0, 0, 0, begun_frames(len(samples_N)) - len(frames_FM)),
                value=self._padding,
            )
            for samples_N, frames_FM in zip(windows, made, strict=True)
        ]

    def forward(self, frames_WFM: Tensor, lengths: Sequence[int]) -> AudioFeatures:
        """Frames as `frontend` makes them, zero-padded, and how many of each -> tokens [W, A, E]."""
        ast = self.network.config
        padded_WFM = pad_windows(frames_WFM, lengths, ast.max_length, self._padding)
        x_WAE = self.network(padded_WFM).last_hidden_state[:, 2:]  # after the class and distillation tokens
        x_WSPE = x_WAE.unflatten(1, (self._patches, self._steps)).transpose(1, 2)
        steps = [-(-n // ast.time_stride) for n in lengths]
        return to_features(x_WSPE, steps, self.config.frequency, self._step_seconds)

    def _normalise(self, frames: Any) -> Any:
        return (frames - self.config.mean) / (2 * self.config.std)
