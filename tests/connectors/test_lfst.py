"""LFST against plain matrix products, its regions in time, and its masks."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from pal.connectors.lfst import LFST
from pal.errors import ConfigError
from pal.registry import build
from pal.types import AudioFeatures

FINE, ALIGNED = 0.02, 0.15
"""Seconds of a token: the encoders differ in rate as SSLAM and CLAP do."""
WIDTHS = (7, 5)


def make(**options: Any) -> LFST:
    torch.manual_seed(0)
    fields = {"name": "lfst", "width": 12, "heads": 3, "fine_seconds": 0.3, "aligned_seconds": 2.0} | options
    connector = build("connector", fields, in_widths=WIDTHS).eval()
    for parameter in connector.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return connector


def tokens(seconds: list[float], each: float, width: int, seed: int = 0) -> AudioFeatures:
    """Clips of so many seconds; the padding is noise, louder than the clips."""
    lengths = [max(1, math.ceil(s / each - 1e-9)) for s in seconds]
    generator = torch.Generator().manual_seed(seed)
    x_BAE = torch.randn(len(lengths), max(lengths) + 2, width, generator=generator)
    x_BAE[torch.arange(max(lengths) + 2) >= torch.tensor(lengths)[:, None]] *= 100
    return AudioFeatures(x_BAE, tuple(lengths), each)


def clips(*seconds: float) -> tuple[AudioFeatures, AudioFeatures]:
    return tokens(list(seconds), FINE, WIDTHS[0], 1), tokens(list(seconds), ALIGNED, WIDTHS[1], 2)


def one(features: AudioFeatures, row: int) -> AudioFeatures:
    real = features.lengths[row]
    return AudioFeatures(features.x_BAE[row : row + 1, :real], (real,), features.seconds_per_token)


def plain(connector: LFST, fine: Tensor, aligned: Tensor) -> Tensor:
    """One clip, latent by latent and head by head, in float64; `fine` [A, E], `aligned` [A', E']."""
    w = {name: value.double() for name, value in connector.state_dict().items()}
    c = connector.config
    D, H = c.width, c.heads or 1

    def norm(name: str, x: Tensor) -> Tensor:
        y = (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-5)
        return y * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def waves(times: Tensor) -> Tensor:
        half = D // 2
        rates = torch.tensor([10_000.0 ** (-i / (half - 1)) for i in range(half)], dtype=torch.float64)
        angles = times[:, None] / c.seconds_per_latent * rates
        return torch.cat([angles.sin(), angles.cos()], 1)

    keys, times, reach = [], [], []
    for i, (x, each, region) in enumerate(((fine, FINE, c.fine_seconds), (aligned, ALIGNED, c.aligned_seconds))):
        at = (torch.arange(len(x)).double() + 0.5) * each
        keys.append(linear(f"enter.{i}.1", norm(f"enter.{i}.0", x.double())) + waves(at))
        times.append(at)
        reach.append(torch.full_like(at, max(region / 2, each / 2)))
    k_KD, at_K, reach_K = torch.cat(keys), torch.cat(times), torch.cat(reach)
    count = math.ceil(max(len(fine) * FINE, len(aligned) * ALIGNED) / c.seconds_per_latent - 1e-6)
    out = []
    for s in range(count):
        t = (s + 0.5) * c.seconds_per_latent
        x = w["latent_E"] + waves(torch.tensor([t], dtype=torch.float64))[0]
        near = (at_K - t).abs() <= reach_K + 1e-9
        for layer in range(c.layers):
            p = f"layers.{layer}."
            q = linear(p + "attention.q", norm(p + "norm", x)).view(H, -1)
            k = linear(p + "attention.k", norm(p + "key_norm", k_KD[near])).view(-1, H, D // H)
            v = linear(p + "attention.v", norm(p + "key_norm", k_KD[near])).view(-1, H, D // H)
            heads = [torch.softmax(k[:, h] @ q[h] / math.sqrt(D // H), 0) @ v[:, h] for h in range(H)]
            x = x + linear(p + "attention.out", torch.cat(heads))
            f = linear(p + "ffn.1", norm(p + "ffn.0", x))
            x = x + linear(p + "ffn.3", 0.5 * f * (1 + torch.erf(f / math.sqrt(2))))
        out.append(norm("norm", x))
    return torch.stack(out)


@pytest.mark.parametrize("seconds", [0.01, 0.32, 1.0, 3.7, 45.0])
def test_it_equals_plain_matrix_products(seconds: float) -> None:
    connector = make()
    fine, aligned = clips(seconds)
    with torch.no_grad():
        ours = connector(fine, aligned)
        theirs = plain(connector, one(fine, 0).x_BAE[0], one(aligned, 0).x_BAE[0])
    assert ours.lengths == (len(theirs),)
    assert_close(ours.x_BAE[0][ours.mask_BA[0]].double(), theirs, atol=2e-5, rtol=2e-5)


def test_a_padded_batch_equals_its_items() -> None:
    connector = make()
    fine, aligned = clips(2.0, 0.03, 31.0, 0.7)
    together = connector(fine, aligned)
    assert together.seconds_per_token == 0.32
    for row in range(4):
        alone = connector(one(fine, row), one(aligned, row))
        assert alone.mask_BA.all() and together.lengths[row] == alone.x_BAE.shape[1]
        assert_close(together.x_BAE[row][together.mask_BA[row]], alone.x_BAE[0], atol=1e-5, rtol=1e-5)


def test_a_latent_hears_its_own_region_of_the_fine_tokens() -> None:
    connector = make()
    fine, aligned = clips(6.0)
    before = connector(fine, aligned).x_BAE[0]
    moved = fine.x_BAE.clone()
    moved[0, 150] = torch.randn(WIDTHS[0])  # 3.01 s
    after = connector(AudioFeatures(moved, fine.lengths, FINE), aligned).x_BAE[0]
    changed = (before - after).abs().amax(1) > 1e-6
    centres = (torch.arange(len(changed)).double() + 0.5) * 0.32
    assert changed.tolist() == ((centres - 3.01).abs() <= 0.15 + 1e-9).tolist() and changed.any()


def test_a_change_late_in_the_clip_changes_late_latents_only() -> None:
    connector = make()
    fine, aligned = clips(40.0)
    before = connector(fine, aligned).x_BAE[0]
    moved = aligned.x_BAE.clone()
    moved[0, 250] = torch.randn(WIDTHS[1])  # 37.6 s
    changed = (before - connector(fine, AudioFeatures(moved, aligned.lengths, ALIGNED)).x_BAE[0]).abs().amax(1) > 1e-6
    assert changed.any() and changed.nonzero()[0] * 0.32 > 36


def test_gradients_reach_every_weight_and_both_encoders() -> None:
    connector = make().train()
    fine, aligned = clips(1.0)
    inputs = [AudioFeatures(f.x_BAE.requires_grad_(), f.lengths, f.seconds_per_token) for f in (fine, aligned)]
    connector(*inputs).x_BAE.square().sum().backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0
        for name, p in connector.named_parameters()
        if "k.bias" not in name
    )
    for features in inputs:
        gradient = features.x_BAE.grad
        assert gradient is not None and gradient[features.mask_BA].abs().sum() > 0
        assert gradient[~features.mask_BA].abs().sum() == 0


def test_an_encoder_without_time_is_refused() -> None:
    fine, aligned = clips(1.0)
    with pytest.raises(ConfigError, match="time"):
        make()(fine, AudioFeatures(aligned.x_BAE, aligned.lengths, 0.0))


def test_unfit_heads_are_refused() -> None:
    with pytest.raises(ConfigError, match="divisible"):
        make(heads=5)
