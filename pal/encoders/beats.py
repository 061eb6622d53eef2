"""`beats`: BEATs (Chen et al. 2022, arXiv 2212.09058), a transformer over patches with gated relative positions.

Written from the paper and the published description of the architecture; weights have the names of the official
checkpoints. Every step was checked against an independent implementation in plain matrix products, and the relative
positions against transformers' WavLM, from which BEATs has them (with one difference: the gate's input is the projected
query, in WavLM the layer's input). Nothing was compared with the original's own output, since the official weights were
not available.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from pal.config import StrictConfig, parse
from pal.encoders import weights
from pal.encoders.base import Encoder
from pal.encoders.fbank import HOP, RATE, fbanks
from pal.encoders.patches import Frequency, to_features, tokens_per_step
from pal.errors import ConfigError
from pal.registry import register
from pal.transfer import length_mask
from pal.types import AudioFeatures

_MELS = 128
_MEAN = 15.41663
_STD = 6.55582
_SCALE = 2.0**15
"""Factor to 16-bit integers, which Kaldi expects."""


class BeatsArchitecture(StrictConfig):
    """Sizes of the network, named as in the official `cfg`. The defaults are the published models'."""

    input_patch_size: int = Field(default=16, ge=1, le=_MELS)
    """Frames and mel bins of a patch."""
    embed_dim: int = Field(default=512, ge=1)
    """Width of a patch before the transformer."""
    conv_bias: bool = False
    """True if the patch embedding has a bias."""
    encoder_layers: int = Field(default=12, ge=1, le=1_000)
    """Number of layers."""
    encoder_embed_dim: int = Field(default=768, ge=1)
    """E, width of the transformer."""
    encoder_ffn_embed_dim: int = Field(default=3072, ge=1)
    """Width of the feed-forward network."""
    encoder_attention_heads: int = Field(default=12, ge=1)
    """H, attention heads."""
    deep_norm: bool = True
    """Scale residuals by (2 * layers) ** 0.25 (DeepNet, Wang et al. 2022)."""
    conv_pos: int = Field(default=128, ge=1)
    """Kernel of the positional convolution, in patches."""
    conv_pos_groups: int = Field(default=16, ge=1)
    """Groups of the positional convolution."""
    num_buckets: int = Field(default=320, ge=4)
    """Buckets of relative positions, half of them for either direction."""
    max_distance: int = Field(default=800, ge=1)
    """Distance in patches from which on all distances share a bucket."""

    @model_validator(mode="after")
    def _fits(self) -> "BeatsArchitecture":
        for name in ("encoder_attention_heads", "conv_pos_groups"):
            if self.encoder_embed_dim % getattr(self, name):
                raise ValueError(f"encoder_embed_dim {self.encoder_embed_dim} is no multiple of {name}")
        if _MELS % self.input_patch_size:
            raise ValueError(f"{_MELS} mel bins are no multiple of input_patch_size {self.input_patch_size}")
        if self.max_distance <= self.num_buckets // 4:
            raise ValueError(f"max_distance {self.max_distance} is not above num_buckets / 4 = {self.num_buckets // 4}")
        return self


class BeatsNetwork(nn.Module):
    """Network of BEATs; modules and their names are the official ones."""

    def __init__(self, sizes: BeatsArchitecture) -> None:
        super().__init__()
        patch, width = sizes.input_patch_size, sizes.encoder_embed_dim
        self.patch_embedding = nn.Conv2d(1, sizes.embed_dim, patch, stride=patch, bias=sizes.conv_bias)
        self.layer_norm = nn.LayerNorm(sizes.embed_dim)
        self.post_extract_proj = nn.Linear(sizes.embed_dim, width) if sizes.embed_dim != width else None
        self.encoder = _Transformer(sizes)

    def forward(self, frames_WFM: Tensor, mask_WA: Tensor | None) -> Tensor:
        """Normalised frames [W, F, M] of whole patches, mask of real patches -> [W, A, E], A = step * P + patch."""
        x_WAE = self.layer_norm(self.patch_embedding(frames_WFM[:, None]).flatten(2).mT)
        if self.post_extract_proj is not None:
            x_WAE = self.post_extract_proj(x_WAE)
        return self.encoder(x_WAE, mask_WA)


@register("encoder", "beats")
class Beats(Encoder):
    """Patches of 16 mel bins by 160 ms: 8 a step, 50 a second, in order of time and from low to high frequency.

    A window may have any length up to `window_seconds`; its last patches are padded with silence. There is no dropout,
    not even in training.
    """

    class Config(StrictConfig):
        """Options of the encoder `beats`: `path`, or `architecture`, or both."""

        path: str | None = None
        """Folder that `pal convert` wrote, or a Hub id with the same two files."""
        revision: str | None = None
        """Branch, tag or commit on the Hub."""
        architecture: BeatsArchitecture | None = None
        """Sizes of the network; `{}` has those of the published models. If given, `path` is not read: the network is
        built with random weights, for callers that load weights afterwards."""
        frequency: Frequency = "tokens"
        """`tokens`: each patch is a token, 50 a second. `mean`: one token a step of 160 ms, the mean over its 8
        patches."""
        window_seconds: float = 10.24
        """Longest window; a multiple of a patch's 0.16 s. BEATs was trained on clips of up to 10 s. The cost of
        attention grows with its square."""

        def toy(self) -> "Beats.Config":
            """Toy size, with one layer."""
            sizes = BeatsArchitecture(
                embed_dim=8,
                encoder_embed_dim=16,
                encoder_ffn_embed_dim=32,
                encoder_layers=1,
                encoder_attention_heads=2,
                conv_pos=16,
                conv_pos_groups=4,
            )
            return self.model_copy(update={"path": None, "revision": None, "architecture": sizes})

    sampling_rate = RATE

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        sizes, tensors = (config.architecture, None) if config.architecture is not None else _read(config)
        self._sizes = sizes
        self._patches = _MELS // sizes.input_patch_size
        self._step_seconds = sizes.input_patch_size * HOP / RATE
        steps = round(config.window_seconds / self._step_seconds)
        if steps < 1 or abs(steps * self._step_seconds - config.window_seconds) > 1e-6:
            raise ConfigError(
                f"encoder 'beats': window_seconds: {config.window_seconds:g} is no multiple of the "
                f"{self._step_seconds:g} s of a patch; give {max(1, steps) * self._step_seconds:g}"
            )
        self.width = sizes.encoder_embed_dim
        self.seconds_per_token = self._step_seconds / tokens_per_step(self._patches, config.frequency)
        self.window_seconds = config.window_seconds
        self.network = BeatsNetwork(sizes)
        if tensors is not None:
            self.network.load_state_dict(weights.check(self.network, tensors, f"encoder 'beats': {config.path}"))

    def standalone_config(self) -> Config:
        """Options that build the same network without reading `path`, for bundles that contain all weights."""
        return self.config.model_copy(update={"architecture": self._sizes})

    def frontend(self, samples_N: Tensor) -> Tensor:
        """Samples at 16 kHz [N] -> normalised log-mel frames of 10 ms [F, M], for a whole number of patches.

        The last patches are padded with silence, as the original does for the shorter clips of a batch.
        """
        return self.frontends([samples_N])[0]

    def frontends(self, windows: Sequence[Tensor]) -> list[Tensor]:
        """`frontend` of several windows, in one FFT."""
        size = self._sizes.input_patch_size
        frames = [size * -(-len(samples_N) // (size * HOP)) for samples_N in windows]
        made = fbanks(windows, mels=_MELS, window="povey", scale=_SCALE, frames=frames)
        return [(frames_FM - _MEAN) / (2 * _STD) for frames_FM in made]

    def forward(self, frames_WFM: Tensor, lengths: Sequence[int]) -> AudioFeatures:
        """Zero-padded frames from `frontend` and their number in each window -> tokens [W, A, E]."""
        steps = [n // self._sizes.input_patch_size for n in lengths]
        patches = frames_WFM.shape[1] // self._sizes.input_patch_size * self._patches
        real = [self._patches * n for n in steps]
        mask_WA = length_mask(real, patches, frames_WFM.device) if min(real) < patches else None
        x_WSPE = self.network(frames_WFM, mask_WA).unflatten(1, (-1, self._patches))
        return to_features(x_WSPE, steps, self.config.frequency, self._step_seconds)


class _Transformer(nn.Module):
    def __init__(self, sizes: BeatsArchitecture) -> None:
        super().__init__()
        self.pos_conv = nn.ModuleList([_PositionalConv(sizes)])
        self.layer_norm = nn.LayerNorm(sizes.encoder_embed_dim)
        # The first layer has the bias that all layers use.
        self.layers = nn.ModuleList(_Layer(sizes, has_bias=at == 0) for at in range(sizes.encoder_layers))

    def forward(self, x_WAE: Tensor, mask_WA: Tensor | None) -> Tensor:
        if mask_WA is not None:
            x_WAE = x_WAE * mask_WA[..., None]
        x_WAE = self.layer_norm(x_WAE + self.pos_conv[0](x_WAE))
        first: Any = self.layers[0]
        bias_HAK = first.self_attn.bias(x_WAE.shape[1])
        for layer in self.layers:
            x_WAE = layer(x_WAE, bias_HAK, mask_WA)
        return x_WAE


class _PositionalConv(nn.Module):
    """Convolution over the sequence of patches, with weight normalisation for each tap."""

    def __init__(self, sizes: BeatsArchitecture) -> None:
        super().__init__()
        width, kernel, self.groups = sizes.encoder_embed_dim, sizes.conv_pos, sizes.conv_pos_groups
        self.weight_v = nn.Parameter(torch.randn(width, width // self.groups, kernel) * (4 / (kernel * width)) ** 0.5)
        self.weight_g = nn.Parameter(self.weight_v.detach().norm(dim=(0, 1), keepdim=True))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x_WAE: Tensor) -> Tensor:
        kernel = self.weight_v.shape[2]
        weight_EXK = self.weight_v * (self.weight_g / self.weight_v.norm(dim=(0, 1), keepdim=True))
        x_WEA = F.conv1d(x_WAE.mT, weight_EXK, self.bias, padding=kernel // 2, groups=self.groups)
        return F.gelu(x_WEA[..., : x_WAE.shape[1]].mT)  # an even kernel gives one more


class _Layer(nn.Module):
    """Self-attention and a feed-forward network, each with the norm after its weighted sum."""

    def __init__(self, sizes: BeatsArchitecture, has_bias: bool) -> None:
        super().__init__()
        width = sizes.encoder_embed_dim
        self.self_attn = _BeatsAttention(sizes, has_bias)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, sizes.encoder_ffn_embed_dim)
        self.fc2 = nn.Linear(sizes.encoder_ffn_embed_dim, width)
        self.final_layer_norm = nn.LayerNorm(width)
        self.residual = (2 * sizes.encoder_layers) ** 0.25 if sizes.deep_norm else 1.0

    def forward(self, x_WAE: Tensor, bias_HAK: Tensor, mask_WA: Tensor | None) -> Tensor:
        x_WAE = self.self_attn_layer_norm(self.residual * x_WAE + self.self_attn(x_WAE, bias_HAK, mask_WA))
        return self.final_layer_norm(self.residual * x_WAE + self.fc2(F.gelu(self.fc1(x_WAE))))


class _BeatsAttention(nn.Module):
    """Attention with a bias for each relative position, scaled by a gate that each query computes."""

    def __init__(self, sizes: BeatsArchitecture, has_bias: bool) -> None:
        super().__init__()
        width, self.heads = sizes.encoder_embed_dim, sizes.encoder_attention_heads
        self.max_distance = sizes.max_distance
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)
        self.grep_linear = nn.Linear(width // self.heads, 8)
        self.grep_a = nn.Parameter(torch.ones(1, self.heads, 1, 1))
        if has_bias:
            self.relative_attention_bias = nn.Embedding(sizes.num_buckets, self.heads)

    def bias(self, patches: int) -> Tensor:
        """Relative position bias of query A and key K [H, A, K], before the gate."""
        at_A = torch.arange(patches, device=self.grep_a.device)
        table = self.relative_attention_bias
        bucket_AK = _bucket(at_A - at_A[:, None], table.num_embeddings // 2, self.max_distance)
        return table(bucket_AK).permute(2, 0, 1)

    def forward(self, x_WAE: Tensor, bias_HAK: Tensor, mask_WA: Tensor | None) -> Tensor:
        q_WHAC, k_WHAC, v_WHAC = (
            project(x_WAE).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        forget_WHA1, keep_WHA1 = self.grep_linear(q_WHAC).unflatten(3, (2, 4)).sum(4).sigmoid().split(1, 3)
        gate_WHA1 = forget_WHA1 * (keep_WHA1 * self.grep_a - 1) + 2
        scores_WHAK = gate_WHA1 * bias_HAK
        if mask_WA is not None:
            scores_WHAK = scores_WHAK.masked_fill(~mask_WA[:, None, None], -torch.inf)
        mixed_WHAC = F.scaled_dot_product_attention(q_WHAC, k_WHAC, v_WHAC, attn_mask=scores_WHAK)
        return self.out_proj(mixed_WHAC.transpose(1, 2).flatten(2))


def _bucket(distance_AK: Tensor, buckets: int, max_distance: int) -> Tensor:
    """Bucket of each signed distance, key minus query.

    Small distances have a bucket each; larger ones share buckets of logarithmic width. Positive distances use the
    second set of `buckets` buckets.
    """
    exact = buckets // 2
    # clamped, since log(0) cannot be converted to an integer
    growth_AK = torch.log(distance_AK.abs().clamp_min(exact).float() / exact) / math.log(max_distance / exact)
    far_AK = (exact + (growth_AK * (buckets - exact)).long()).clamp_max(buckets - 1)
    return torch.where(distance_AK.abs() < exact, distance_AK.abs(), far_AK) + buckets * (distance_AK > 0)


def own_layout(tensors: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """Official tensors with the names of `BeatsNetwork`, without the copies of the position bias in later layers.

    Raises:
        ConfigError: the copies differ.
    """
    bias = "self_attn.relative_attention_bias.weight"
    first = tensors.get(f"encoder.layers.0.{bias}")
    copies = [name for name in tensors if name.endswith(f".{bias}") and not name.startswith("encoder.layers.0.")]
    if first is not None and not all(torch.equal(first, tensors[name]) for name in copies):
        raise ConfigError(f"{where}: its layers have different relative position biases, and this encoder shares one")
    return {name: tensor for name, tensor in tensors.items() if name not in copies}


def check_kind(fields: dict[str, Any], where: str) -> None:
    """Raise `ConfigError` if the official `cfg` has an option that this network does not support."""
    needed = {"layer_norm_first": False, "relative_position_embedding": True, "gru_rel_pos": True}
    for name, value in (needed | {"activation_fn": "gelu"}).items():
        if fields.get(name, value) != value:
            raise ConfigError(f"{where}: '{name}' is {fields[name]}, and this encoder supports only {value}")


def _read(config: Beats.Config) -> tuple[BeatsArchitecture, dict[str, Tensor]]:
    """Read sizes and tensors from a folder or the Hub; `ConfigError` if there are none."""
    if config.path is None:
        raise ConfigError(
            "encoder 'beats': missing key 'path'; make a folder with: pal convert BEATs.pt FOLDER --layout beats"
        )
    where = f"encoder 'beats': {config.path}"
    fields, stored = weights.read(config.path, config.revision, where)
    check_kind(fields, where)
    known = {name: value for name, value in fields.items() if name in BeatsArchitecture.model_fields}
    return parse(BeatsArchitecture, known, f"{where}: {weights.CONFIG}"), own_layout(stored, where)
