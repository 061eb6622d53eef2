"""Whisper's encoder from transformers, any size, on the real part of a clip only."""

from typing import Any

import torch
from torch import Tensor

from pal.config import StrictConfig
from pal.encoders.base import Encoder
from pal.errors import ConfigError
from pal.registry import register
from pal.types import AudioFeatures

_AFTER = 3
"""Frames that follow the real ones: two that the 25 ms window of the transform still reaches with
its front half, and one of silence, whose value all padding up to 30 s has."""


@register("encoder", "whisper")
class Whisper(Encoder):
    """Tokens of 20 ms, equal to those transformers' WhisperModel gives for the same 30 s window.

    The network always sees 30 s, as it was trained to; what comes after the clip is its own silence
    and is left out of the result. Longer clips are taken in windows of 30 s by `encode`.
    """

    class Config(StrictConfig):
        """Options of the encoder `whisper`: `path`, or `architecture`, or both."""

        path: str | None = None
        """Hub id or local folder, such as `openai/whisper-small`."""
        revision: str | None = None
        """Branch, tag or commit on the Hub."""
        architecture: dict[str, Any] | None = None
        """Fields of transformers' WhisperConfig. Where given, nothing is read from `path`: the
        network is built with random weights, for a caller that then loads its own."""

        def toy(self) -> "Whisper.Config":
            """Windows of four seconds."""
            sizes = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}
            return self.model_copy(
                update={"path": None, "revision": None, "architecture": {**sizes, "max_source_positions": 200}}
            )

    def __init__(self, config: Config) -> None:
        super().__init__()
        from transformers import WhisperFeatureExtractor

        self.config = config
        self.network = _build(config.architecture) if config.architecture is not None else _load(config)
        whisper = self.network.config
        # Built from the number of mel bins alone: a saved one may carry lengths that cut the audio.
        self._extractor = WhisperFeatureExtractor(feature_size=whisper.num_mel_bins)
        self.sampling_rate = self._extractor.sampling_rate
        self._hop = self._extractor.hop_length
        self._frames = 2 * whisper.max_source_positions
        self.width = whisper.d_model
        self.seconds_per_token = 2 * self._hop / self.sampling_rate
        self.window_seconds = self._frames * self._hop / self.sampling_rate

    def standalone_config(self) -> Config:
        """A config that builds the same network without reading `path`, for bundles with all weights."""
        fields = self.network.config.to_diff_dict()
        return self.config.model_copy(update={"architecture": fields})

    def frontend(self, samples_N: Tensor) -> Tensor:
        """Samples at 16 kHz [N] -> log-mel frames of 10 ms [F, M]: ceil(N / 160) real ones and `_AFTER` more.

        They equal those of transformers' extractor on the clip padded to 30 s.
        """
        frames = -(-len(samples_N) // self._hop) + _AFTER
        features = self._extractor(
            samples_N.cpu().float().numpy(),
            sampling_rate=self.sampling_rate,
            padding="max_length",
            # its default is 30 s, most of it silence; at 30 s it mirrors the end, so no further
            max_length=min(frames, self._frames) * self._hop,
            return_tensors="pt",
        )
        frames_FM = features.input_features[0].T
        return torch.cat([frames_FM, frames_FM[-1:].expand(frames - len(frames_FM), -1)])

    def forward(self, frames_WFM: Tensor, lengths_W: Tensor) -> AudioFeatures:
        """Frames as `frontend` makes them, zero-padded, and how many of each -> tokens [W, A, E] and mask."""
        # continue each window with its own last frame, which is silence, as far as the network wants
        index_WF = torch.arange(self._frames, device=lengths_W.device).minimum(lengths_W[:, None] - 1)
        padded_WFM = frames_WFM.gather(1, index_WF[:, :, None].expand(-1, -1, frames_WFM.shape[2]))
        x_WAE = self.network(padded_WFM.transpose(1, 2)).last_hidden_state

        real_W = (lengths_W - _AFTER).clamp(max=self._frames)
        tokens_W = (real_W - 1) // 2 + 1
        x_WAE = x_WAE[:, : int(tokens_W.max())]
        mask_WA = torch.arange(x_WAE.shape[1], device=lengths_W.device) < tokens_W[:, None]
        return AudioFeatures(x_WAE, mask_WA, self.seconds_per_token)


def _build(architecture: dict[str, Any]) -> Any:
    """A network with random weights."""
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    return WhisperEncoder(WhisperConfig(**architecture))


def _load(config: Whisper.Config) -> Any:
    """The network of a Hub id or folder, in float32. Raises ConfigError where there is none."""
    if config.path is None:
        raise ConfigError("encoder 'whisper': missing key 'path'; give a Hub id such as openai/whisper-small")
    from transformers import WhisperConfig, WhisperModel

    loader: Any = WhisperModel  # transformers' own annotations leave out the loading report

    where = f"encoder 'whisper': {config.path}"
    try:
        fields, _ = WhisperConfig.get_config_dict(config.path, revision=config.revision)
        if fields.get("model_type") != "whisper":
            found = fields.get("model_type", "none")
            raise ConfigError(f"{where} holds no model of type 'whisper' (found: {found}); give a Hub id or a folder")
        model, report = loader.from_pretrained(
            config.path, revision=config.revision, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
    except OSError as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{where} cannot be loaded ({reason}); give a Hub id or a folder") from None
    missing = sorted(key for key in report["missing_keys"] if key.startswith("encoder."))
    if missing:
        raise ConfigError(f"{where} lacks {len(missing)} weights of the encoder, such as {missing[0]}; fetch it again")
    return model.get_encoder()
