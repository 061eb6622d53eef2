"""`ast`: the Audio Spectrogram Transformer (Gong et al. 2021) of transformers; padding gives no tokens."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from pal.encoders.fbank import HOP, RATE, fbanks, hops
from pal.encoders.patches import Frequency, pad_windows, to_features, tokens_per_step
from pal.encoders.pretrained import PretrainedEncoder, PretrainedOptions
from pal.errors import ConfigError
from pal.registry import register
from pal.types import AudioFeatures


@register("encoder", "ast")
class AST(PretrainedEncoder):
    """Overlapping patches of 16 mel bins by 160 ms, every 10 bins and 100 ms: 12 patches a step, in order of time.

    They equal those of transformers' ASTModel for the same window, without its class and distillation tokens, and
    reordered from frequency-major to time-major. The network always sees 1024 frames, as in training. They make 101
    steps, so the window is 10.1 s. Shorter clips are padded as by transformers' extractor; the patches of padding are
    left out.
    """

    class Config(PretrainedOptions):
        """Options of the encoder `ast`."""

        frequency: Frequency = "tokens"
        """`tokens`: each patch is a token. `mean`: one token a step, the mean over its 12 patches."""
        mean: float = -4.2677393
        """Mean of the log-mel frames; the default is AudioSet's, for models trained on AudioSet."""
        std: float = 4.5689974
        """Standard deviation of the log-mel frames, which are divided by twice this."""

        def toy(self) -> "AST.Config":
            """Toy size, with windows of a second."""
            sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
            return self.with_architecture(**sizes, max_length=128)

    hub_ids = ("MIT/ast",)
    sampling_rate = RATE
    name = "ast"
    example = "MIT/ast-finetuned-audioset-10-10-0.4593"
    config_keys = {"audio-spectrogram-transformer": None}
    submodule = "audio_spectrogram_transformer"

    @classmethod
    def classes(cls) -> tuple[Any, Any]:
        """`ASTConfig` and `ASTModel`."""
        from transformers import ASTConfig, ASTModel

        return ASTConfig, ASTModel

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        ast = self.network.config
        if not isinstance(ast.patch_size, int) or ast.time_stride > ast.patch_size:
            raise ConfigError("encoder 'ast' needs square patches without gaps between them; give another model")
        self.width = ast.hidden_size
        self._patches = (ast.num_mel_bins - ast.patch_size) // ast.frequency_stride + 1
        self._steps = (ast.max_length - ast.patch_size) // ast.time_stride + 1
        self._step_seconds = ast.time_stride * HOP / RATE
        self.seconds_per_token = self._step_seconds / tokens_per_step(self._patches, config.frequency)
        self.window_seconds = self._steps * self._step_seconds
        self._padding = self._normalise(0.0)

    def frontend(self, samples_N: Tensor) -> Tensor:
        """Samples at 16 kHz [N] -> normalised log-mel frames of 10 ms [ceil(N / 160), M].

        They equal those of transformers' ASTFeatureExtractor on the clip with up to 159 zeros behind it, which complete
        the last frame. The last 10 ms steps, where no further frame fits, have the extractor's padding value.
        """
        return self.frontends([samples_N])[0]

    def frontends(self, windows: Sequence[Tensor]) -> list[Tensor]:
        """`frontend` of several windows, in one FFT."""
        made = fbanks(windows, mels=self.network.config.num_mel_bins)
        return [
            F.pad(
                self._normalise(frames_FM),
                (0, 0, 0, hops(len(samples_N)) - len(frames_FM)),
                value=self._padding,
            )
            for samples_N, frames_FM in zip(windows, made, strict=True)
        ]

    def forward(self, frames_WFM: Tensor, lengths: Sequence[int]) -> AudioFeatures:
        """Zero-padded frames from `frontend` and their number in each window -> tokens [W, A, E]."""
        ast = self.network.config
        padded_WFM = pad_windows(frames_WFM, lengths, ast.max_length, self._padding)
        x_WAE = self.network(padded_WFM).last_hidden_state[:, 2:]  # after the class and distillation tokens
        x_WSPE = x_WAE.unflatten(1, (self._patches, self._steps)).transpose(1, 2)
        steps = [-(-n // ast.time_stride) for n in lengths]
        return to_features(x_WSPE, steps, self.config.frequency, self._step_seconds)

    def _normalise(self, frames: Any) -> Any:
        return (frames - self.config.mean) / (2 * self.config.std)
