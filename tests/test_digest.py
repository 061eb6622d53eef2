"""A model's digest is computed once, and again as soon as a weight may be another."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from pal import digest
from pal.digest import CachedModelDigest, model_digest
from pal.model import PalModel
from tests.models import tiny_model


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A line for each time that all weights are hashed."""
    calls: list[str] = []

    def counting(state: dict[str, Tensor]) -> str:
        calls.append("hashed")
        return model_digest(state)

    monkeypatch.setattr(digest, "model_digest", counting)
    return calls


def by_hand(state: dict[str, Tensor]) -> str:
    content = hashlib.sha256()
    for name in sorted(state):
        x = state[name]
        content.update(f"{name} {tuple(x.shape)} {x.dtype}".encode())
        content.update(bytes(x.detach().reshape(-1).view(torch.uint8).tolist()))
    return content.hexdigest()


def test_the_digest_is_that_of_names_shapes_types_and_bytes() -> None:
    state = {"b": torch.randn(3, 2), "a": torch.arange(5), "c": torch.randn(4).bfloat16()}
    assert model_digest(state) == CachedModelDigest().of(state) == by_hand(state)


def test_two_questions_to_an_indexed_clip_hash_once(hashed: list[str]) -> None:
    model: PalModel = tiny_model("lal")
    clip = model.index((torch.randn(8000).numpy(), 16_000))
    for question in ("What?", ["Where?", "When?"], "What?"):
        model.ask(clip, question, max_new_tokens=1)
    assert hashed == ["hashed"]


class Network(nn.Module):
    """Weights of several types and sizes, one of more than a run of checksums; batch statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(128, 64)
        self.narrow = nn.Linear(3, 3, dtype=torch.bfloat16)
        self.norm = nn.BatchNorm1d(3)


def optimized(network: Network, fused: bool = False) -> None:
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, fused=fused)
    for p in network.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.zero_grad()


def optimized_by_a_fused_kernel(network: Network) -> None:
    optimized(network, fused=True)


def under_no_grad(network: Network) -> None:
    with torch.no_grad():
        network.linear.weight[5, 7] += 1


def in_inference_mode(network: Network) -> None:
    with torch.inference_mode():
        network.linear.weight[5, 7] += 1


def one_number_through_data(network: Network) -> None:
    network.linear.weight.data[63, 127] += 1e-3


def a_tail_through_data(network: Network) -> None:
    network.narrow.bias.data[2] += 1


def through_numpy(network: Network) -> None:
    network.linear.bias.detach().numpy()[3] = 7


def reassigned_data(network: Network) -> None:
    network.linear.weight.data = network.linear.weight.data * 2


def another_parameter(network: Network) -> None:
    network.linear.weight = nn.Parameter(torch.randn(64, 128))


def another_dtype(network: Network) -> None:
    network.narrow.float()


def a_buffer(network: Network) -> None:
    network.norm.train()(torch.randn(4, 3))


def rows_that_change_places(network: Network) -> None:
    with torch.no_grad():
        network.linear.weight.copy_(network.linear.weight.flip(0))


def another_state_dict(network: Network) -> None:
    network.load_state_dict(Network().state_dict())


def a_safetensors_file(network: Network, path: Path = Path("weights.safetensors")) -> None:
    save_model(Network(), str(path))
    load_model(network, path)


CHANGES: list[Callable[[Network], None]] = [
    optimized,
    optimized_by_a_fused_kernel,
    under_no_grad,
    in_inference_mode,
    one_number_through_data,
    a_tail_through_data,
    through_numpy,
    reassigned_data,
    another_parameter,
    another_dtype,
    a_buffer,
    rows_that_change_places,
    another_state_dict,
    a_safetensors_file,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_each_way_to_change_a_weight_is_noticed(
    change: Callable[[Network], None], hashed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    network, cached = Network(), CachedModelDigest()
    first = cached.of(network.state_dict())
    assert cached.of(network.state_dict()) == first
    assert len(hashed) == 1
    change(network)
    assert cached.of(network.state_dict()) == by_hand(network.state_dict()) != first
    assert len(hashed) == 2
    cached.of(network.state_dict())
    assert len(hashed) == 2


def test_rows_of_one_run_that_change_places(hashed: list[str]) -> None:
    """Their sum stays, their version does not."""
    network, cached = Network(), CachedModelDigest()
    first = cached.of(network.state_dict())
    with torch.no_grad():
        network.narrow.bias.copy_(torch.tensor([1.0, 2, 3]))
        second = cached.of(network.state_dict())
        network.narrow.bias.copy_(torch.tensor([3.0, 2, 1]))
    third = cached.of(network.state_dict())
    assert len({first, second, third}) == len(hashed) == 3


def test_weights_made_in_inference_mode_have_no_versions(hashed: list[str]) -> None:
    with torch.inference_mode():
        state, cached = {"x": torch.ones(5000)}, CachedModelDigest()
        first = cached.of(state)
        assert cached.of(state) == first and len(hashed) == 1
        state["x"][4999] = 2
        assert cached.of(state) != first


def test_merged_adapters_are_noticed(hashed: list[str]) -> None:
    """PEFT adds them to the weights through `.data`; the names stay."""
    network, cached = Network(), CachedModelDigest()
    inject_adapter_in_model(LoraConfig(target_modules=["linear"], init_lora_weights=False), network)
    before = cached.of(network.state_dict())
    adapted = network.linear
    version = adapted.base_layer.weight._version  # type: ignore[union-attr]
    adapted.merge()  # type: ignore[operator]
    assert adapted.base_layer.weight._version == version  # type: ignore[union-attr]
    assert cached.of(network.state_dict()) != before
    adapted.unmerge()  # type: ignore[operator]
    after = cached.of(network.state_dict())
    adapted.enable_adapters(False)  # type: ignore[operator]
    assert cached.of(network.state_dict()) == after  # all weights are there, whether they are used or not


def test_a_copy_of_a_model_has_a_digest_of_its_own() -> None:
    model = tiny_model("plits")
    first, other = model.digest, copy.deepcopy(model)
    assert other.digest == first
    with torch.no_grad():
        next(other.parameters()).add_(1)
    assert model.digest == first != other.digest


def test_a_slice_of_a_larger_storage() -> None:
    """Views need not begin at a whole word."""
    whole_N = torch.arange(100, dtype=torch.uint8)
    cached = CachedModelDigest()
    assert cached.of({"x": whole_N[3:90]}) == by_hand({"x": whole_N[3:90].clone()})
    whole_N.data[89] = 0
    assert cached.of({"x": whole_N[3:90]}) == by_hand({"x": whole_N[3:90].clone()})
