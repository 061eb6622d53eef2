"""AdamW's groups, its step and the learning rate's schedule, against formulas and transformers' own."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from pal.train import optim, stages
from pal.train.recipe import Stage, Trained
from tests.models import tiny_model


def stage(**fields: Any) -> Stage:
    return Stage(**{"train": {"encoder": True}, "lr": 1.0, "steps": 10, "batch": {"rows": 1}} | fields)


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(2, 3), nn.LayerNorm(3)


def groups(stage: Stage, **parts: nn.Module) -> dict[tuple[str, tuple[int, ...]], dict[str, Any]]:
    """(part, shape of a parameter) -> the group that it is in."""
    named = {name: dict(part.named_parameters()) for name, part in parts.items()}
    made = optim.parameter_groups(named, stage)
    assert sum(len(group["params"]) for group in made) == sum(len(of) for of in named.values())
    return {(group["part"], tuple(p.shape)): group for group in made for p in group["params"]}


def test_norms_and_biases_do_not_decay() -> None:
    found = groups(stage(weight_decay=0.3), encoder=Part())
    assert {shape: group["weight_decay"] for (_, shape), group in found.items()} == {(3, 2): 0.3, (3,): 0.0}


def test_each_part_has_its_own_rate_and_the_head_the_highest() -> None:
    rates = {"encoder": 1e-3, "connector": 5e-2, "projectors": 2e-2}
    parts = {name: Part() for name in (*rates, "head")}
    found = groups(stage(lr=rates, train={"encoder": True, "connector": True, "projectors": True}), **parts)
    assert {part: group["lr"] for (part, _), group in found.items()} == {**rates, "head": 5e-2}
    given = groups(stage(lr=rates | {"head": 1e-4}), head=Part())
    assert {group["lr"] for group in given.values()} == {1e-4}
    assert {group["lr"] for group in groups(stage(lr=0.7), encoder=Part(), head=Part()).values()} == {0.7}


def test_a_step_is_adamws() -> None:
    """Loshchilov and Hutter 2019, algorithm 2, two steps by hand."""
    weight = nn.Parameter(torch.tensor([[2.0]]))
    wanted = stage(betas=(0.6, 0.7), weight_decay=0.1, lr=0.05)
    made = optim.adamw(optim.parameter_groups({"encoder": {"w": weight}}, wanted), wanted)
    w, m, v = 2.0, 0.0, 0.0
    for t, gradient in enumerate((0.5, -0.2), start=1):
        weight.grad = torch.tensor([[gradient]])
        made.step()
        m, v = 0.6 * m + 0.4 * gradient, 0.7 * v + 0.3 * gradient**2
        w = w - 0.05 * 0.1 * w - 0.05 * (m / (1 - 0.6**t)) / (math.sqrt(v / (1 - 0.7**t)) + 1e-8)
        assert weight.item() == pytest.approx(w, rel=1e-6)


@pytest.mark.parametrize("warmup", [0, 1, 5])
@pytest.mark.parametrize(
    ("schedule", "theirs"), [("cosine", get_cosine_schedule_with_warmup), ("linear", get_linear_schedule_with_warmup)]
)
def test_after_the_rise_the_schedule_is_transformers(schedule: str, theirs: Any, warmup: int) -> None:
    steps = 20
    made = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = theirs(made, warmup, steps)
    for step in range(steps):
        factor = optim.lr_factor(step, steps, warmup, schedule)
        if step < warmup:  # theirs begins at 0, where the first step would do nothing
            assert factor == pytest.approx((step + 1) / (warmup + 1))
        else:
            assert factor == pytest.approx(scheduler.get_last_lr()[0])
        made.step()
        scheduler.step()
    assert optim.lr_factor(warmup, steps, warmup, schedule) == 1.0


def test_a_constant_rate_stays() -> None:
    assert [optim.lr_factor(step, 4, 2, "constant") for step in range(4)] == pytest.approx([1 / 3, 2 / 3, 1, 1])


def test_the_factor_reaches_every_group() -> None:
    made = optim.adamw(optim.parameter_groups({"encoder": dict(Part().named_parameters())}, stage(lr=0.4)), stage())
    for factor in (0.5, 0.25):  # of the highest rate, not of the last one
        assert optim.set_lr(made, factor) == {"encoder": 0.4 * factor}
        assert [group["lr"] for group in made.param_groups] == [0.4 * factor] * 2


def test_the_optimizers_state_goes_on_as_it_was() -> None:
    def trained(steps: int, state: dict[str, torch.Tensor] | None = None, of: nn.Module | None = None) -> Any:
        torch.manual_seed(0)
        part = of or Part()
        named = dict(part.named_parameters())
        made = optim.adamw(optim.parameter_groups({"encoder": named}, stage(lr=0.1)), stage())
        if state is not None:
            optim.load_optimizer_tensors(made, named, state)
        for _ in range(steps):
            for p in named.values():
                p.grad = torch.linspace(0, 1, p.numel()).reshape(p.shape) + p.detach()
            made.step()
        return part, optim.optimizer_tensors(made, {id(p): name for name, p in named.items()})

    whole, _ = trained(4)
    half, state = trained(2)
    rest, _ = trained(2, {name: tensor.clone() for name, tensor in state.items()}, half)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(rest.state_dict()[name], tensor), name


# Adapters


def adapted(**lora: Any) -> Any:
    """The first query projection of a small model whose LLM a stage trains by adapters with weights."""
    model = tiny_model("lal")
    stages.freeze(model, Trained(llm="lora", lora=lora))
    layer = model.llm.lm.model.layers[0].self_attn.q_proj
    torch.manual_seed(1)
    for half in (layer.lora_A, layer.lora_B):
        nn.init.normal_(half["default"].weight)
    return model, layer


@pytest.mark.parametrize(("r", "alpha"), [(2, 1), (2, 32), (4, 16)])
def test_an_adapter_is_scaled_by_alpha_over_its_rank(r: int, alpha: int) -> None:
    model, layer = adapted(r=r, alpha=alpha, dropout=0.0)
    model.eval()
    x_NI = torch.randn(5, layer.in_features)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert a.shape[0] == r
    torch.testing.assert_close(layer(x_NI), layer.base_layer(x_NI) + alpha / r * x_NI @ a.T @ b.T)


def test_an_adapter_drops_what_it_is_given_in_training_alone() -> None:
    model, layer = adapted(r=4, alpha=4, dropout=0.5)
    x_NI = torch.ones(4000, layer.in_features)
    with torch.no_grad():
        layer.lora_A["default"].weight.fill_(0.0)[:, 0] = 1.0  # each row tells whether its first number was dropped
        layer.lora_B["default"].weight.fill_(1.0)
        model.llm.train()
        added_N = (layer(x_NI) - layer.base_layer(x_NI))[:, 0]
        assert (added_N.abs() < 1e-4).float().mean().item() == pytest.approx(0.5, abs=0.05)
        assert added_N.mean().item() == pytest.approx(4.0, rel=0.1)  # what stays is doubled
        model.eval()
        torch.testing.assert_close(layer(x_NI), layer.base_layer(x_NI) + 4.0)


def test_adapters_are_where_they_are_asked_for() -> None:
    model, _ = adapted(targets=("q_proj", "down_proj"))
    names = {name.split(".")[-1] for name, module in model.llm.named_modules() if hasattr(module, "lora_A")}
    assert names == {"q_proj", "down_proj"}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)


def test_the_rest_of_the_model_is_frozen_and_in_evaluation_mode() -> None:
    model = tiny_model("lal")
    found = stages.freeze(model, Trained(connector=True))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(found["connector"])
    stages.set_modes(model, SimpleNamespace(gradient_checkpointing=False))  # type: ignore[arg-type]
    assert model.ears.connectors.training and not model.llm.training and not model.ears.encoders[0].training
    stages.set_modes(model, SimpleNamespace(gradient_checkpointing=True))  # type: ignore[arg-type]
    assert model.llm.training and not model.ears.encoders[0].training
