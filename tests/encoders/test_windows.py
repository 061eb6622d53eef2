"""The part of an encoder that all share: windows, batches, and how their tokens are joined."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from pal.encoders.base import Encoder
from pal.registry import build, names, toy
from pal.types import AudioFeatures


class Counting(Encoder):
    """One token for every two samples, whose first feature is their sum and second the window's length."""

    sampling_rate = 10
    width = 2
    seconds_per_token = 0.2

    def __init__(self, window_seconds: float | None) -> None:
        super().__init__()
        self.window_seconds = window_seconds
        self.one = nn.Parameter(torch.ones(()))

    def frontend(self, samples_N: Tensor) -> Tensor:
        assert self.window_seconds is None or len(samples_N) <= self.window_seconds * self.sampling_rate
        return samples_N[:, None]

    def forward(self, frames_WFM: Tensor, lengths: Sequence[int]) -> AudioFeatures:
        odd = frames_WFM.shape[1] % 2
        sums_WA = nn.functional.pad(frames_WFM[:, :, 0], (0, odd)).unflatten(1, (-1, 2)).sum(2) * self.one
        x_WAE = torch.stack([sums_WA, torch.tensor(lengths)[:, None].expand_as(sums_WA).float()], 2)
        return AudioFeatures(x_WAE, tuple((n + 1) // 2 for n in lengths), self.seconds_per_token)


def clip(length: int) -> Tensor:
    return torch.arange(1, length + 1).float()


@pytest.mark.parametrize("window_seconds", [None, 2.0, 0.3])
def test_tokens_are_in_order_and_none_is_lost(window_seconds: float | None) -> None:
    encoder = Counting(window_seconds)
    size = 10**9 if window_seconds is None else round(window_seconds * 10)
    lengths = [1, 19, 20, 21, 45, 3]
    features = encoder.encode([clip(length) for length in lengths])
    for row, length in enumerate(lengths):
        expected = []
        for start in range(0, length, size):
            window = list(range(start + 1, min(start + size, length) + 1))
            expected += [[float(sum(window[i : i + 2])), float(len(window))] for i in range(0, len(window), 2)]
        assert features.lengths[row] == len(expected)
        assert_close(features.x_BAE[row, : len(expected)], torch.tensor(expected))
        assert features.mask_BA[row, : len(expected)].all()


@pytest.mark.parametrize("window_seconds", [None, 2.0])
def test_a_batch_equals_its_clips_one_by_one(window_seconds: float | None) -> None:
    encoder = Counting(window_seconds)
    clips = [clip(length) for length in (61, 7, 20, 33)]
    together = encoder.encode(clips)
    for row, samples_N in enumerate(clips):
        alone = encoder.encode([samples_N])
        assert_close(together.x_BAE[row][together.mask_BA[row]], alone.x_BAE[0][alone.mask_BA[0]])


def test_windows_carry_gradients() -> None:
    encoder = Counting(1.0)
    features = encoder.encode([clip(25), clip(4)])
    features.x_BAE[..., 0][features.mask_BA].sum().backward()
    assert encoder.one.grad is not None
    assert_close(encoder.one.grad.item(), float(clip(25).sum() + clip(4).sum()))


@pytest.mark.parametrize("name", names("encoder"))
def test_front_ends_stay_exact_under_autocast(name: str) -> None:
    """Products of spectra and filters in bfloat16 would be off by a percent, and numpy cannot read them."""
    encoder = build("encoder", toy("encoder", name)).eval()
    seen = []
    encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    samples_N = torch.randn(encoder.sampling_rate // 2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = encoder.encode([samples_N])
        with torch.autocast("cpu", torch.bfloat16):
            rough = encoder.encode([samples_N])
    assert torch.equal(*seen)
    assert exact.lengths == rough.lengths and torch.isfinite(rough.x_BAE).all()
