"""`sslam`: SSLAM (Alex et al., ICLR 2025), which is EAT's ViT-B/16 (Chen et al. 2024) with other weights.

Written from the published description and configuration (github.com/ta012/SSLAM), without access to SSLAM's weights.
Tests compare it with an independent implementation in plain matrix products, with the published number of parameters,
and with the names of weights in both published layouts.
"""

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from pal.config import StrictConfig, parse
from pal.encoders import weights
from pal.encoders.base import Encoder
from pal.encoders.fbank import HOP, RATE, fbanks, hops
from pal.encoders.patches import Frequency, pad_windows, to_features, tokens_per_step
from pal.errors import ConfigError
from pal.registry import register
from pal.types import AudioFeatures

PREFIX = "model."
"""Prefix of the names of weights on the Hub."""

_POSITIONS = "fixed_positional_encoder.positions"
_MEAN = -4.268
_STD = 4.569


class SslamArchitecture(StrictConfig):
    """Sizes of the network, named as in the `config.json` on the Hub. The defaults are SSLAM's: 85.25M parameters."""

    embed_dim: int = Field(default=768, ge=4)
    """E, width of a token."""
    depth: int = Field(default=12, ge=0, le=1_000)
    """Number of blocks."""
    num_heads: int = Field(default=12, ge=1)
    """H, attention heads."""
    mlp_ratio: float = Field(default=4.0, gt=0)
    """Width of the feed-forward network, divided by E."""
    patch_size: int = Field(default=16, ge=1)
    """Frames and mel bins of a patch."""
    img_size: tuple[int, int] = (1024, 128)
    """Frames and mel bins of a window."""
    norm_eps: float = 1e-6
    """Epsilon of all layer norms."""

    @model_validator(mode="after")
    def _fits(self) -> "SslamArchitecture":
        if self.embed_dim % self.num_heads or self.embed_dim % 4:
            raise ValueError(f"embed_dim {self.embed_dim} is no multiple of 4 and of num_heads {self.num_heads}")
        if any(size < self.patch_size or size % self.patch_size for size in self.img_size):
            raise ValueError(f"img_size {self.img_size} is no multiple of patch_size {self.patch_size}")
        return self


class SslamNetwork(nn.Module):
    """Network of SSLAM; modules have the names of the Hub's layout, without the prefix."""

    def __init__(self, sizes: SslamArchitecture) -> None:
        super().__init__()
        self.local_encoder = _LocalEncoder(sizes)
        self.extra_tokens = nn.Parameter(0.02 * torch.randn(1, 1, sizes.embed_dim))
        self.fixed_positional_encoder = _Positions(sizes)
        self.pre_norm = nn.LayerNorm(sizes.embed_dim, eps=sizes.norm_eps)
        self.blocks = nn.ModuleList(_SslamBlock(sizes) for _ in range(sizes.depth))

    def forward(self, frames_WFM: Tensor) -> Tensor:
        """Normalised frames of whole windows -> [W, 1 + A, E]: the class token, then A = step * P + patch."""
        x_WAE = self.local_encoder.proj(frames_WFM[:, None]).flatten(2).mT
        x_WAE = x_WAE + self.fixed_positional_encoder.positions
        x_WAE = self.pre_norm(torch.cat([self.extra_tokens.expand(len(x_WAE), -1, -1), x_WAE], 1))
        for block in self.blocks:
            x_WAE = block(x_WAE)
        return x_WAE


@register("encoder", "sslam")
class Sslam(Encoder):
    """Patches of 16 mel bins by 160 ms: 8 a step, 50 a second, in order of time and from low to high frequency.

    The network always sees a window of 1024 frames, 10.24 s, as in training. Shorter clips are padded as in training;
    the patches of padding are left out.
    """

    class Config(StrictConfig):
        """Options of the encoder `sslam`: `path`, or `architecture`, or both."""

        path: str | None = None
        """Hub id, such as `ta012/SSLAM_pretrain`, or a folder that `pal convert` wrote."""
        revision: str | None = None
        """Branch, tag or commit on the Hub."""
        architecture: SslamArchitecture | None = None
        """Sizes of the network; `{}` has those of SSLAM. If given, `path` is not read: the network is built with random
        weights, for callers that load weights afterwards."""
        frequency: Frequency = "tokens"
        """`tokens`: each patch is a token, 50 a second. `mean`: one token a step of 160 ms, the mean over its 8
        patches, as in LTU and GAMA."""

        def toy(self) -> "Sslam.Config":
            """Toy size, with one block and windows of 2.56 s."""
            sizes = SslamArchitecture(embed_dim=16, depth=1, num_heads=2, img_size=(256, 128))
            return self.model_copy(update={"path": None, "revision": None, "architecture": sizes})

    hub_ids = ("ta012/SSLAM",)
    sampling_rate = RATE

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        sizes, tensors = (config.architecture, None) if config.architecture is not None else _read(config)
        self._sizes = sizes
        self._patches = sizes.img_size[1] // sizes.patch_size
        self._step_seconds = sizes.patch_size * HOP / RATE
        self.width = sizes.embed_dim
        self.seconds_per_token = self._step_seconds / tokens_per_step(self._patches, config.frequency)
        self.window_seconds = sizes.img_size[0] * HOP / RATE
        self._padding = _normalise(0.0)
        self.network = SslamNetwork(sizes)
        if tensors is not None:
            self.network.load_state_dict(weights.check(self.network, tensors, f"encoder 'sslam': {config.path}"))

    def standalone_config(self) -> Config:
        """Options that build the same network without reading `path`, for bundles that contain all weights."""
        return self.config.model_copy(update={"architecture": self._sizes})

    def frontend(self, samples_N: Tensor) -> Tensor:
        """Samples at 16 kHz [N] -> normalised log-mel frames of 10 ms [ceil(N / 160), M].

        The window's mean is subtracted first; the filter bank is Kaldi's, with a hanning window. The last 10 ms steps,
        where no further frame fits, have the padding value.
        """
        return self.frontends([samples_N])[0]

    def frontends(self, windows: Sequence[Tensor]) -> list[Tensor]:
        """`frontend` of several windows, in one FFT."""
        made = fbanks([samples_N - samples_N.mean() for samples_N in windows], mels=self._sizes.img_size[1])
        return [
            F.pad(_normalise(frames_FM), (0, 0, 0, hops(len(samples_N)) - len(frames_FM)), value=self._padding)
            for samples_N, frames_FM in zip(windows, made, strict=True)
        ]

    def forward(self, frames_WFM: Tensor, lengths: Sequence[int]) -> AudioFeatures:
        """Zero-padded frames from `frontend` and their number in each window -> tokens [W, A, E]."""
        padded_WFM = pad_windows(frames_WFM, lengths, self._sizes.img_size[0], self._padding)
        x_WSPE = self.network(padded_WFM)[:, 1:].unflatten(1, (-1, self._patches))
        steps = [-(-n // self._sizes.patch_size) for n in lengths]
        return to_features(x_WSPE, steps, self.config.frequency, self._step_seconds)


class _LocalEncoder(nn.Module):
    def __init__(self, sizes: SslamArchitecture) -> None:
        super().__init__()
        self.proj = nn.Conv2d(1, sizes.embed_dim, sizes.patch_size, stride=sizes.patch_size)


class _Positions(nn.Module):
    """Fixed sinusoidal positions: the first half of the width encodes a patch's frequency, the second half its step."""

    positions: Tensor

    def __init__(self, sizes: SslamArchitecture) -> None:
        super().__init__()
        steps, patches = (size // sizes.patch_size for size in sizes.img_size)
        step_A = torch.arange(steps).repeat_interleave(patches)
        patch_A = torch.arange(patches).repeat(steps)
        x_AE = torch.cat([_waves(at_A, sizes.embed_dim // 2) for at_A in (patch_A, step_A)], 1)
        self.register_buffer("positions", x_AE[None])


def _waves(at_A: Tensor, width: int) -> Tensor:
    """Indices [A] -> sines, then cosines, of wavelengths from 2 pi to nearly 20,000 pi [A, width]."""
    rate_C = 10_000 ** -(torch.arange(width // 2, dtype=torch.float64) / (width // 2))
    angle_AC = at_A[:, None] * rate_C
    return torch.cat([angle_AC.sin(), angle_AC.cos()], 1).float()


class _SslamBlock(nn.Module):
    """Self-attention and a feed-forward network, post-norm."""

    def __init__(self, sizes: SslamArchitecture) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(sizes.embed_dim, eps=sizes.norm_eps)
        self.attn = _SslamAttention(sizes)
        self.norm2 = nn.LayerNorm(sizes.embed_dim, eps=sizes.norm_eps)
        self.mlp = _MLP(sizes)

    def forward(self, x_WAE: Tensor) -> Tensor:
        x_WAE = self.norm1(x_WAE + self.attn(x_WAE))
        return self.norm2(x_WAE + self.mlp(x_WAE))


class _SslamAttention(nn.Module):
    def __init__(self, sizes: SslamArchitecture) -> None:
        super().__init__()
        self.heads = sizes.num_heads
        self.qkv = nn.Linear(sizes.embed_dim, 3 * sizes.embed_dim)
        self.proj = nn.Linear(sizes.embed_dim, sizes.embed_dim)

    def forward(self, x_WAE: Tensor) -> Tensor:
        q_WHAC, k_WHAC, v_WHAC = self.qkv(x_WAE).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed_WHAC = F.scaled_dot_product_attention(q_WHAC, k_WHAC, v_WHAC)
        return self.proj(mixed_WHAC.transpose(1, 2).flatten(2))


class _MLP(nn.Module):
    def __init__(self, sizes: SslamArchitecture) -> None:
        super().__init__()
        inner = round(sizes.embed_dim * sizes.mlp_ratio)
        self.fc1 = nn.Linear(sizes.embed_dim, inner)
        self.fc2 = nn.Linear(inner, sizes.embed_dim)

    def forward(self, x_WAE: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x_WAE)))


def _normalise(frames: Any) -> Any:
    return (frames - _MEAN) / (2 * _STD)


def _read(config: Sslam.Config) -> tuple[SslamArchitecture, dict[str, Tensor]]:
    """Read sizes and tensors from a folder or the Hub; `ConfigError` if there are none."""
    if config.path is None:
        raise ConfigError("encoder 'sslam': missing key 'path'; give a Hub id such as ta012/SSLAM_pretrain")
    where = f"encoder 'sslam': {config.path}"
    fields, stored = weights.read(config.path, config.revision, where)
    sizes = _sizes(fields, where)
    return sizes, own_layout({name.removeprefix(PREFIX): tensor for name, tensor in stored.items()}, sizes)


def own_layout(tensors: dict[str, Tensor], sizes: SslamArchitecture) -> dict[str, Tensor]:
    """Tensors with the names of `SslamNetwork`, and with the positions of one window.

    The published table of positions is for two minutes. Without a table, the positions are computed.
    """
    own = _Positions(sizes).positions
    table = tensors.get(_POSITIONS, own)
    return tensors | {_POSITIONS: table[:, : own.shape[1]]}


def _sizes(fields: dict[str, Any], where: str) -> SslamArchitecture:
    known = {name: value for name, value in fields.items() if name in SslamArchitecture.model_fields}
    if fields.get("layer_norm_first"):
        raise ConfigError(f"{where} is pre-norm; this encoder is post-norm, as SSLAM")
    if fields.get("stride", known.get("patch_size", 16)) != known.get("patch_size", 16):
        raise ConfigError(f"{where} has overlapping patches; those of this encoder do not overlap, as in SSLAM")
    return parse(SslamArchitecture, known, f"{where}: {weights.CONFIG}")
