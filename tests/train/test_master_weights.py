"""bfloat16 weights with float32 copies: what float32 training gives, rounded; nothing too small is lost; resumed exactly."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pal.errors import ConfigError
from pal.plan import plan
from pal.plan.skeleton import skeleton
from pal.train import optim, run, stages
from pal.train.master_weights import MasterWeights
from pal.train.objectives import LossOutput
from pal.train.recipe import Stage
from pal.train.step import Update
from tests.train.test_step import Processes
from tests.train.tiny import LLM, MODEL, failing_after, recipe

BF16 = {**MODEL, "llm": {"fresh": LLM, "vocabulary": 280, "dtype": "bfloat16"}}
STAGE = {
    "train": {"connector": True, "projectors": True, "llm": "full"},
    "lr": 1e-3,
    "steps": 4,
    "batch": {"clips": 2, "rows_per_clip": 1, "accumulate": 2},
    "master_weights": True,
}


class Linear(nn.Module):
    """Squares of the products of a weight with rows."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        # what bfloat16 can hold, so that both start from the same numbers
        self.weight = nn.Parameter(torch.randn(4, 3).bfloat16().to(dtype))

    def forward(self, micro_batch: Any) -> LossOutput:
        return LossOutput(
            (micro_batch.x_B3.to(self.weight) @ self.weight.T).float().square().sum(), len(micro_batch.x_B3)
        )


class Piece:
    counts = True

    def __init__(self, seed: int) -> None:
        self.x_B3 = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed)).bfloat16()


def stage(lr: float) -> Stage:
    return Stage(train={"llm": "full"}, lr=lr, steps=10, batch={"rows": 1}, weight_decay=0.01, clip_grad=None)  # type: ignore[arg-type]


def made(dtype: torch.dtype, on: bool, lr: float) -> tuple[Linear, MasterWeights, Update]:
    network, fake = Linear(dtype), Processes()
    masters = MasterWeights({"llm": {"weight": network.weight}}, on)
    optimizer = optim.adamw(optim.parameter_groups(masters.parts, stage(lr)), stage(lr))
    return network, masters, Update(network, optimizer, masters, stage(lr), fake, fake)  # type: ignore[arg-type]


def test_a_step_is_that_of_float32_rounded() -> None:
    """AdamW by hand on the copy, given the bfloat16 network's own gradients."""
    network, masters, update = made(torch.bfloat16, True, lr=3e-3)
    w = network.weight.detach().float()
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for t in range(1, 6):
        probe = Linear(torch.bfloat16)
        probe.weight.data.copy_(w)
        probe(Piece(t)).sum.backward()
        assert probe.weight.grad is not None
        g = probe.weight.grad.float() / 5
        m, v = 0.9 * m + 0.1 * g, 0.98 * v + 0.02 * g**2
        w = w * (1 - 3e-3 * 0.01) - 3e-3 * (m / (1 - 0.9**t)) / ((v / (1 - 0.98**t)).sqrt() + 1e-8)
        update([Piece(t)])  # type: ignore[list-item]
        torch.testing.assert_close(masters.copies[0], w, rtol=1e-5, atol=1e-6)
        assert torch.equal(network.weight, masters.copies[0].bfloat16())


def test_training_stays_by_that_of_float32() -> None:
    """With copies each weight is within a few roundings of the float32 network's; without them updates are lost."""
    far = {}
    for name, dtype, on in (
        ("exact", torch.float32, False),
        ("copies", torch.bfloat16, True),
        ("none", torch.bfloat16, False),
    ):
        network, _, update = made(dtype, on, lr=2e-4)
        for t in range(60):
            update([Piece(t % 7)])  # type: ignore[list-item]
        far[name] = network.weight.detach().float()
    moved = (far["exact"] - Linear(torch.float32).weight.detach()).abs()
    assert moved.max() > 5e-3
    rounding = 2**-8 * far["exact"].abs() + 1e-3
    assert ((far["copies"] - far["exact"]).abs() < rounding).all()
    assert (far["none"] - far["exact"]).abs().max() > (far["copies"] - far["exact"]).abs().max()


def test_updates_below_a_weights_resolution_add_up() -> None:
    """A weight of 1 has steps of 1/128; 40 updates of 1/2000 are 2.5 of them."""
    weight = nn.Parameter(torch.ones(1, 2, dtype=torch.bfloat16))
    masters = MasterWeights({"llm": {"weight": weight}}, on=True)
    made = optim.adamw(optim.parameter_groups(masters.parts, stage(5e-4)), stage(5e-4))
    for _ in range(40):
        weight.grad = torch.ones_like(weight)
        masters.take_gradients()
        assert weight.grad is None
        made.step()
        made.zero_grad()
        masters.give_weights()
    torch.testing.assert_close(masters.copies[0], torch.full((1, 2), 0.98), atol=5e-4, rtol=0)
    assert weight[0, 0].item() == pytest.approx(0.98, abs=1 / 256)


def test_gradients_of_a_batchs_parts_are_summed_in_float32() -> None:
    weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    masters = MasterWeights({"llm": {"weight": weight}}, on=True)
    for gradient in (1.0, 2**-9, 2**-9):
        weight.grad = torch.full((1,), gradient, dtype=torch.bfloat16)
        masters.take_gradients()
    assert masters.copies[0].grad is not None and masters.copies[0].grad.item() == 1 + 2**-8


def test_what_is_stored_in_float32_stands_for_itself() -> None:
    parts = {"llm": {"a": nn.Parameter(torch.ones(2)), "b": nn.Parameter(torch.ones(2, dtype=torch.bfloat16))}}
    masters = MasterWeights(parts, on=True)
    assert masters.parts["llm"]["a"] is parts["llm"]["a"] and masters.parts["llm"]["b"] is masters.copies[0]
    off = MasterWeights(parts, on=False)
    assert off.parts["llm"]["b"] is parts["llm"]["b"] and not off.copies


# A whole run


def settings(manifest: Path, **fields: Any) -> Any:
    data = {"scenes": {"manifest": str(manifest)}}
    return recipe(manifest, [STAGE | fields], model=BF16, data=data, keep={"checkpoint_every": 2, "log_every": 1})


def test_a_run_goes_on_from_its_copies(manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def weights(model: Any) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}

    whole = weights(run(settings(manifest), tmp_path / "whole"))
    assert whole["llm.lm.model.layers.0.mlp.up_proj.weight"].dtype == torch.bfloat16
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Update, "__call__", failing_after(3))
        run(settings(manifest), tmp_path / "cut")
    saved = load_file(tmp_path / "cut" / "checkpoints" / "step0000002" / "optimizer.safetensors")
    name = "llm.lm.model.layers.0.mlp.up_proj.weight"
    assert {saved[f"{name}/{entry}"].dtype for entry in ("master", "exp_avg", "exp_avg_sq")} == {torch.float32}
    masters = saved[f"{name}/master"]
    assert not torch.equal(masters, masters.bfloat16().float())  # they hold more than the weights do
    gone_on = weights(run(settings(manifest), tmp_path / "cut", resume=True))
    assert [name for name in whole if not torch.equal(whole[name], gone_on[name])] == []


@pytest.mark.parametrize("on", [True, False])
def test_a_plan_knows_their_memory(manifest: Path, on: bool) -> None:
    llm = {"fresh": {**LLM, "vocab_size": 280}, "dtype": "bfloat16"}
    made = recipe(manifest, [STAGE | {"master_weights": on}], model={**MODEL, "llm": llm})
    model = skeleton(made)
    parts = stages.freeze(model, made.stages[0].train)
    held = MasterWeights(parts, on)
    weights = [p for of in held.parts.values() for p in of.values()]
    moments = sum(2 * p.numel() * p.itemsize for p in weights)
    assert plan(made).stages[0].memory.optimizer == moments + sum(4 * copy.numel() for copy in held.copies)


def test_there_must_be_something_to_keep_copies_of(manifest: Path, tmp_path: Path) -> None:
    fields = {"train": {"projectors": True}}
    with pytest.raises(ConfigError, match=r"master_weights.*set the model's 'llm.dtype' to bfloat16") as caught:
        run(settings(manifest, **fields), tmp_path)
    assert len(str(caught.value)) <= 300


def test_runs_without_the_new_keys_go_on() -> None:
    fields: dict[str, Any] = {"stages": [STAGE | {"master_weights": False, "compile": "auto"}]}
    made = recipe(Path("x"), **fields)
    (stage,) = made.settings()["stages"]
    assert "master_weights" not in stage and "compile" not in stage
    other = recipe(Path("x"), [STAGE | {"compile": False}])
    assert other.settings()["stages"][0] | {} == json.loads(json.dumps(stage)) | {
        "master_weights": True,
        "compile": False,
    }
    assert other.digest != made.digest


@pytest.mark.parametrize(("dtype", "copies"), [(torch.float16, 1), (torch.bfloat16, 1), (torch.float32, 0)])
def test_weights_with_fewer_bits_have_copies(dtype: torch.dtype, copies: int) -> None:
    weight = nn.Parameter(torch.ones(2, dtype=dtype))
    assert len(MasterWeights({"llm": {"weight": weight}}, on=True).copies) == copies
