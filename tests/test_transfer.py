"""Lengths and masks, as the host knows them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pal.integrations.keys import zeroed
from pal.transfer import length_mask, move, to_device
from pal.types import AudioFeatures


def features(*lengths: int, size: int = 4) -> AudioFeatures:
    return AudioFeatures(torch.randn(len(lengths), size, 3), lengths, 0.1)


def test_ones_are_the_first_of_each_row() -> None:
    mask_BA = length_mask((3, 0, 4), 4, "cpu")
    assert mask_BA.tolist() == [[True, True, True, False], [False] * 4, [True] * 4]
    assert length_mask([9], 2, "cpu").tolist() == [[True, True]]
    assert length_mask([1, 2], 3, "meta").shape == (2, 3)
    assert length_mask([], 3, "cpu").shape == (0, 3)


def test_a_tensor_moves_as_it_is() -> None:
    x = torch.randn(3)
    assert to_device(x, "cpu") is x
    assert to_device(x, "meta").is_meta


def test_to_a_gpu_it_is_copied_from_pinned_memory_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def pinned(x: Tensor) -> Tensor:
        calls.append("pinned")
        return x

    def copied(x: Tensor, device: torch.device, non_blocking: bool = False) -> Tensor:
        calls.append(f"{device} {non_blocking}")
        return x

    monkeypatch.setattr(Tensor, "pin_memory", pinned)
    monkeypatch.setattr(Tensor, "to", copied)
    move([np.arange(5)], "cuda")
    to_device(torch.ones(2), "cuda")
    assert calls == ["pinned", "cuda True"] * 2


def test_arrays_move_together() -> None:
    arrays = [np.arange(5), np.array([[7, 8], [9, 10]]), np.zeros(0, np.int64), np.array([2**31 - 1])]
    for array, tensor in zip(arrays, move(arrays, "cpu"), strict=True):
        assert tensor.dtype == torch.int32 and tensor.shape == array.shape and tensor.tolist() == array.tolist()


def test_features_know_their_lengths_and_make_the_mask_when_asked() -> None:
    some = features(4, 1)
    assert some.padded and some.mask_BA.tolist() == [[True] * 4, [True, False, False, False]]
    assert some.mask_BA is some.mask_BA  # made once
    assert not features(4, 4).padded and features(4, 4).mask_BA.all()
    assert features(3, 3).padded  # a common length, but not that of the tensor
    assert replace(some, lengths=(2, 2)).mask_BA.sum(1).tolist() == [2, 2]


@pytest.mark.parametrize("lengths", [(4,), (4, 5), (4, -1), (4, torch.tensor(2)), (4, True)])
def test_other_lengths_are_no_lengths(lengths: tuple[int, ...]) -> None:
    with pytest.raises(AssertionError):
        AudioFeatures(torch.randn(2, 4, 3), lengths, 0.1)


def test_a_mask_made_under_inference_is_fit_for_training() -> None:
    some = AudioFeatures(torch.randn(2, 4, 3, requires_grad=True), (4, 2), 0.1)
    with torch.inference_mode():
        assert some.mask_BA.any()
    torch.where(some.mask_BA[..., None], some.x_BAE, 0.0).square().sum().backward()  # keeps the mask itself
    assert some.x_BAE.grad is not None and not some.x_BAE.grad[1, 2:].any()


class Operations(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_padding_is_zeroed_and_nothing_is_done_where_there_is_none() -> None:
    some = features(4, 1)
    assert torch.equal(zeroed(some)[0], some.x_BAE[0]) and torch.equal(zeroed(some)[1, :1], some.x_BAE[1, :1])
    assert not zeroed(some)[1, 1:].any()
    whole = features(4, 4)
    with Operations() as operations:
        assert zeroed(whole) is whole.x_BAE
    assert operations.count == 0
