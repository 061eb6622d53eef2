"""One update of the weights, by hand; what is random in it; and that layers are kept or made again as a stage says."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers.models.llama import modeling_llama

from pal.backbone.llm import Backbone
from pal.train import run
from pal.train.distributed import HostReduce
from pal.train.engines import TrainingEngine
from pal.train.master_weights import MasterWeights
from pal.train.objectives import LossOutput
from pal.train.seeding import seed_everything
from pal.train.step import StepResult, Update
from tests.train.tiny import recipe

# The arithmetic, with a plain gradient descent of rate 1 in AdamW's place


class Line(nn.Module):
    """Loss of a micro-batch: the sum of its numbers times the one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([10.0]))

    def forward(self, micro_batch: Any) -> LossOutput:
        return LossOutput(self.weight[0] * sum(micro_batch.numbers), len(micro_batch.numbers), (1, 2))


class Processes:
    """As an engine, and as `HostReduce`: this process among several that all do the same."""

    device = torch.device("cpu")
    no_sync = staticmethod(lambda module: nullcontext())

    def __init__(self, number: int = 1) -> None:
        self.num_processes = number

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    clip_grad_norm_ = staticmethod(nn.utils.clip_grad_norm_)
    finish_gradients = TrainingEngine.finish_gradients
    step = TrainingEngine.step

    def reduce(self, told: Tensor, reduction: str) -> Tensor:
        assert reduction == "sum"
        return told * self.num_processes

    def sum(self, *numbers: float) -> list[float]:
        return [number * self.num_processes for number in numbers]


class Step(NamedTuple):
    """What a step says of itself."""

    loss: float
    items: int
    gradient_norm: float
    hits: float
    tries: float


def piece(*numbers: float, counts: bool = True) -> Any:
    return SimpleNamespace(numbers=numbers, counts=counts)


def stepped(micro_batches: list[Any], clip_grad: float | None = None, processes: int = 1) -> tuple[float, Step]:
    """How far the weight moved, and what the step says of itself."""
    line = Line()
    optimizer = torch.optim.SGD(line.parameters(), lr=1.0, fused=True)
    told = updating(line, optimizer, clip_grad, processes)(micro_batches)
    assert line.weight.grad is None
    loss, norm, hits, tries = told.numbers_4.tolist()
    return 10.0 - line.weight.item(), Step(loss / told.items, told.items, norm, hits, tries)


def updating(
    line: nn.Module, optimizer: torch.optim.Optimizer, clip_grad: float | None = None, processes: int = 1
) -> Update:
    stage: Any = SimpleNamespace(clip_grad=clip_grad, precision="fp32")
    fake: Any = Processes(processes)
    masters = MasterWeights({"llm": dict(line.named_parameters())}, on=False)
    return Update(line, optimizer, masters, stage, fake, fake)


def test_the_gradient_is_that_of_the_mean_over_all_items() -> None:
    moved, step = stepped([piece(1.0, 2.0, 6.0)])
    assert moved == pytest.approx(3.0)
    assert step.loss == pytest.approx(30.0) and step.gradient_norm == pytest.approx(3.0)
    assert (step.items, step.hits, step.tries) == (3, 1, 2)


def test_parts_of_a_batch_are_one_batch() -> None:
    # a mean of the parts' means would be 2.75
    moved, step = stepped([piece(1.0, 2.0, 6.0), piece(2.5)])
    assert moved == pytest.approx(11.5 / 4) and step.loss == pytest.approx(10 * 11.5 / 4)
    assert (step.items, step.hits, step.tries) == (4, 2, 4)


def test_a_repeated_part_counts_nothing() -> None:
    moved, step = stepped([piece(1.0, 3.0), piece(50.0, counts=False)])
    assert moved == pytest.approx(2.0) and step.loss == pytest.approx(20.0)
    assert (step.items, step.hits, step.tries) == (2, 1, 2)


@pytest.mark.parametrize("processes", [2, 5])
def test_several_processes_do_what_one_does(processes: int) -> None:
    # DDP takes the mean of the processes' gradients; all are the same here
    moved, step = stepped([piece(1.0, 2.0, 6.0)], processes=processes)
    assert moved == pytest.approx(3.0)
    assert step.loss == pytest.approx(30.0) and step.items == 3 * processes


class Synced(Processes):
    """One of two processes, whose mean gradient is twice this one's; taken where it is not held back."""

    def __init__(self, line: nn.Module) -> None:
        super().__init__(2)
        self.line, self.held = line, False
        self.synced: list[bool] = []

    @contextmanager
    def no_sync(self, module: nn.Module) -> Iterator[None]:  # type: ignore[override]
        assert module is self.line
        self.held = True
        yield
        self.held = False

    def backward(self, loss: Tensor) -> None:
        loss.backward()
        self.synced.append(not self.held)
        if not self.held:
            for parameter in self.line.parameters():
                assert parameter.grad is not None
                parameter.grad *= 2


@pytest.mark.parametrize("copies", [False, True])
def test_processes_sync_once_a_step_what_all_parts_gave(copies: bool) -> None:
    line = Line().to(torch.bfloat16 if copies else torch.float32)
    masters = MasterWeights({"llm": dict(line.named_parameters())}, on=copies)
    fake: Any = Synced(line)
    stage: Any = SimpleNamespace(clip_grad=None, precision="fp32")
    held = list(masters.parts["llm"].values())
    update = Update(line, torch.optim.SGD(held, lr=1.0, fused=True), masters, stage, fake, fake)
    update([piece(1.0, 2.0), piece(5.0), piece(4.0)])
    assert fake.synced == [False, False, True]
    assert line.weight.item() == 10.0 - 2 * 12.0 / 4


def test_weights_of_two_types_train_alike() -> None:
    class Lines(Line):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Parameter(torch.tensor([10.0], dtype=torch.bfloat16))

        def forward(self, micro_batch: Any) -> LossOutput:
            outcome = super().forward(micro_batch)
            return outcome._replace(sum=outcome.sum + self.other[0].float() * sum(micro_batch.numbers))

    lines = Lines()
    updating(lines, torch.optim.SGD(lines.parameters(), lr=1.0, fused=True))([piece(1.0, 2.0, 6.0)])
    assert lines.weight.item() == lines.other.item() == 7.0


def test_what_one_process_is_asked_all_know() -> None:
    class Asked(Processes):
        def sum(self, *numbers: float) -> list[float]:
            items, stop, late = super().sum(*numbers)
            return [items, stop + 1, late]  # another process was asked to stop

    line, fake = Line(), Asked(2)
    update = updating(line, torch.optim.SGD(line.parameters(), lr=1.0, fused=True))
    update.host_reduce = fake  # type: ignore[assignment]
    assert update([piece(1.0)], False, False).flags == [True, False]
    assert update([piece(1.0)], False, True).flags == [True, True]


def test_one_process_tells_itself() -> None:
    assert HostReduce(1).sum(3, False, True) == [3.0, 0.0, 1.0]


@pytest.mark.parametrize(("most", "moves"), [(0.5, 0.5), (2.0, 2.0), (100.0, 3.0), (None, 3.0)])
def test_the_gradients_norm_is_clipped(most: float | None, moves: float) -> None:
    moved, step = stepped([piece(1.0, 2.0, 6.0)], clip_grad=most)
    assert moved == pytest.approx(moves, rel=1e-4)
    assert step.gradient_norm == pytest.approx(3.0)  # before it was clipped


def test_a_fake_of_an_engine_has_its_names() -> None:
    for name in ("no_sync", "backward", "reduce"):
        assert callable(getattr(TrainingEngine, name))


# A whole run


STAGE = {
    "train": {"connector": True, "projectors": True},
    "lr": 1e-2,
    "steps": 2,
    "batch": {"clips": 2, "rows_per_clip": 1},
}


TOLD = StepResult(torch.ones(4, dtype=torch.float64), 1, [False, False])


def ran(manifest: Path, out: Path, **fields: Any) -> None:
    stages = [STAGE | fields]
    run(recipe(manifest, stages, data={"scenes": {"manifest": str(manifest)}}), out)


@pytest.fixture
def drawn(manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Random numbers at each step of a run of two stages that trains nothing, as one of its processes."""

    def draws(process: int) -> list[tuple[float, float]]:
        seen = []

        def update(self: Update, *args: object) -> StepResult:
            seen.append((torch.rand(1).item(), float(np.random.rand())))
            return TOLD

        monkeypatch.setattr(Update, "__call__", update)
        monkeypatch.setattr(Accelerator, "process_index", property(lambda self: process))
        stages = [STAGE | {"steps": 3, "name": name} for name in ("one", "two")]
        made = recipe(manifest, stages, data={"scenes": {"manifest": str(manifest)}})
        run(made, tmp_path / f"run {process}")
        return seen

    return draws


def test_dropout_is_drawn_anew_for_each_step_stage_and_process(drawn: Any) -> None:
    first, second = drawn(0), drawn(1)
    assert len(first) == len(second) == 6
    assert len({torch_s for torch_s, _ in (*first, *second)}) == 12
    assert len({numpys for _, numpys in (*first, *second)}) == 12


def test_seeds_come_from_the_whole_key() -> None:
    def drew(*key: object) -> float:
        seed_everything(*key)
        return float(torch.rand(1))

    keys = [(1, 0, 0, 0), (2, 0, 0, 0), (1, 1, 0, 0), (1, 0, 1, 0), (1, 0, 0, 1)]
    assert len({drew(*key) for key in keys}) == len(keys)
    assert drew(1, 0, 0, 0) == drew(1, 0, 0, 0)


@pytest.mark.parametrize("on", [False, True])
def test_checkpointed_layers_run_again_in_the_backward_pass(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on: bool
) -> None:
    """Two layers, two steps: four runs of a layer's feed-forward network, and as many again where nothing is kept."""
    runs = 0
    forward = modeling_llama.LlamaMLP.forward

    def counted(self: Any, x: Tensor) -> Tensor:
        nonlocal runs
        runs += 1
        return forward(self, x)

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", counted)
    ran(manifest, tmp_path, gradient_checkpointing=on)
    assert runs == (8 if on else 4)


@pytest.mark.parametrize("again", [False, True])
def test_audio_is_made_again_in_the_backward_pass_where_a_stage_says_so(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    told = []
    checkpoint = Backbone.checkpoint_gradients

    def noted(self: Backbone, on: bool, recompute_audio: bool = True) -> None:
        checkpoint(self, on, recompute_audio)
        told.append(self.recomputes_audio)

    monkeypatch.setattr(Backbone, "checkpoint_gradients", noted)
    ran(manifest, tmp_path, recompute_audio=again, steps=1)
    assert told[0] is again


@pytest.mark.parametrize(("schedule", "rates"), [("cosine", [0.005, 0.01, 0.005]), ("constant", [0.005, 0.01, 0.01])])
def test_a_runs_rates_are_its_stages(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schedule: str, rates: list[float]
) -> None:
    seen = []

    def update(self: Update, *args: object) -> StepResult:
        seen.append(self.optimizer.param_groups[0]["lr"])
        return TOLD

    monkeypatch.setattr(Update, "__call__", update)
    ran(manifest, tmp_path, steps=3, warmup=1, schedule=schedule)
    assert seen == pytest.approx(rates)
