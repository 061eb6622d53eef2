"""A step that is not finite, noticed on the device alone and read later: nothing moves, and the right step is named."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pal.errors import TrainingError
from pal.model import PalModel
from pal.train import optim, run, trainer
from pal.train.curves import read_log
from pal.train.master_weights import MasterWeights
from pal.train.objectives import LossOutput
from pal.train.step import StepResult, Update
from tests.train.test_step import Processes
from tests.train.tiny import failing_after, recipe

STAGE = {
    "train": {"encoder": True, "connector": True, "projectors": True, "llm": "full"},
    "lr": 1e-2,
    "steps": 6,
    "batch": {"clips": 2, "rows_per_clip": 1},
}


class Normed(nn.Module):
    """A weight behind batch statistics."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.BatchNorm1d(3)
        self.linear = nn.Linear(3, 1)

    def forward(self, micro_batch: Any) -> LossOutput:
        x_B3 = micro_batch.x_B3
        loss = self.linear(self.norm(x_B3)).square().sum()
        return LossOutput(steepened(loss) if micro_batch.steep else loss, len(x_B3))


def steepened(loss: Tensor) -> Tensor:
    """The same loss with a gradient that is not finite, as the root of 0 has."""
    return loss + (loss * 0.0).sqrt()


def piece(seed: int, scale: float = 1.0, steep: bool = False) -> Any:
    generator = torch.Generator().manual_seed(seed)
    x_B3 = scale * torch.randn(5, 3, generator=generator)
    return SimpleNamespace(x_B3=x_B3, steep=steep, counts=True)


def made() -> tuple[Normed, Update]:
    network, fake = Normed(), Processes()
    stage: Any = SimpleNamespace(clip_grad=1.0, precision="fp32", betas=(0.9, 0.98), weight_decay=0.1, lr=0.1)
    masters = MasterWeights({"llm": dict(network.named_parameters())}, on=False)
    optimizer = optim.adamw(optim.parameter_groups(masters.parts, stage), stage)
    return network, Update(network, optimizer, masters, stage, fake, fake)  # type: ignore[arg-type]


def state(network: Normed, update: Update) -> dict[str, Tensor]:
    names = {id(p): name for name, p in network.named_parameters()}
    tensors = network.state_dict() | optim.optimizer_tensors(update.optimizer, names)
    return {name: tensor.clone() for name, tensor in tensors.items()}


@pytest.mark.parametrize("bad", [piece(1, scale=math.nan), piece(1, scale=math.inf), piece(1, steep=True)])
def test_a_step_that_is_not_finite_changes_nothing_and_none_after_it_does(bad: Any) -> None:
    network, update = made()
    update([piece(0)])
    before = state(network, update)
    found = [update([micro_batch]).numbers_4[:2].isfinite().all().item() for micro_batch in (bad, piece(2), piece(3))]
    assert found[0] is False and found[2] is True
    after = state(network, update)
    assert after.keys() == before.keys() and "linear.weight/exp_avg" in after and "norm.running_mean" in after
    assert [name for name, tensor in before.items() if not torch.equal(after[name], tensor)] == []


def test_finite_steps_move_everything() -> None:
    network, update = made()
    update([piece(0)])
    before = state(network, update)
    update([piece(1)])
    after = state(network, update)
    assert [name for name, tensor in before.items() if torch.equal(after[name], tensor)] == []


def test_a_fault_in_one_part_of_a_batch_is_one_of_the_step() -> None:
    network, update = made()
    update([piece(0)])
    before = state(network, update)
    update([piece(1), piece(2, scale=math.nan), piece(3)])
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(network, update).items())


# A whole run that looks at the device every few steps


def poison(monkeypatch: pytest.MonkeyPatch, at: int, spoil: Callable[[Tensor], Tensor]) -> None:
    loss, calls = PalModel.loss, iter(range(1000))

    def poisoned(self: PalModel, *given: Any) -> Any:
        total, tokens = loss(self, *given)
        return (spoil(total) if next(calls) == at else total), tokens

    monkeypatch.setattr(PalModel, "loss", poisoned)


def settings(manifest: Path, **keep: int) -> Any:
    data = {"scenes": {"manifest": str(manifest)}}
    return recipe(
        manifest, [STAGE], data=data, keep={"checkpoint_every": 100, "log_every": 1, "max_nonfinite": 0, **keep}
    )


def weights(model: PalModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="module")
def whole(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    run(settings(manifest, log_every=100), out)
    return out


@pytest.mark.parametrize(
    ("every", "at", "what"), [(1, 3, "gradient"), (4, 1, "loss"), (4, 4, "gradient"), (100, 0, "loss")]
)
def test_the_step_is_named_and_the_state_before_it_kept_whenever_it_is_read(
    manifest: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int, at: int, what: str
) -> None:
    spoil = {"loss": lambda total: total * math.nan, "gradient": steepened}[what]
    made = settings(manifest, log_every=100)
    drawn: list[list[str]] = []
    update = Update.__call__

    def noted(self: Update, micro_batches: Any, *flags: bool) -> StepResult:
        drawn.append([record for micro_batch in micro_batches for record in micro_batch.batch.records])
        return update(self, micro_batches, *flags)

    with monkeypatch.context() as patch:
        poison(patch, at, spoil)
        patch.setattr(Update, "__call__", noted)
        with pytest.raises(TrainingError) as caught:
            trainer.run(made, tmp_path, read_every=every)
    assert f"step {at}: the {what} is not finite; records: {', '.join(drawn[at])}. The" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [f"step{at:07d}"]
    gone_on = weights(trainer.run(made, tmp_path, resume=True, read_every=every))
    right = PalModel.from_pretrained(whole / "model").state_dict()
    assert [name for name in right if not torch.equal(gone_on[name], right[name])] == []
    assert read_totals(tmp_path) == read_totals(whole)


def read_totals(out: Path) -> dict[str, float]:
    (stage,) = json.loads((out / "train.json").read_text())["stages"]
    return {name: stage[name] for name in ("steps", "rows", "clips", "audio_seconds", "tokens")}


def test_how_often_the_device_is_read_changes_neither_weights_nor_log(manifest: Path, tmp_path: Path) -> None:
    def numbers(out: Path) -> list[dict[str, Any]]:
        return [{k: v for k, v in line.items() if "second" not in k and k != "wait_share"} for line in read_log(out)]

    made = settings(manifest, log_every=3)
    models = [weights(trainer.run(made, tmp_path / str(every), read_every=every)) for every in (1, 100)]
    assert [name for name in models[0] if not torch.equal(models[0][name], models[1][name])] == []
    logs = [numbers(tmp_path / name / "log.jsonl") for name in ("1", "100")]
    assert logs[0] == logs[1] and [line["step"] for line in logs[0]] == [3, 6]


def test_a_checkpoint_counts_the_steps_before_it(manifest: Path, tmp_path: Path) -> None:
    made = settings(manifest, log_every=100, checkpoint_every=4)
    trainer.run(made, tmp_path, read_every=100)
    saved = json.loads((tmp_path / "checkpoints" / "step0000004" / "state.json").read_text())["state"]
    assert saved["step"] == 4 and saved["totals"][0]["steps"] == 4 and saved["totals"][0]["rows"] == 8


# Beyond the limit the run ends; up to it, the step is left out


def reference(pieces: list[Any]) -> dict[str, Tensor]:
    """State after these steps, none of which is faulty."""
    network, update = made()
    for one in pieces:
        update([one])
    return state(network, update)


def test_up_to_the_limit_a_step_is_left_out_as_if_it_had_not_been() -> None:
    network, update = made()
    update.max_nonfinite = 2
    for one in (piece(0), piece(1, scale=math.nan), piece(2), piece(3, steep=True), piece(4)):
        update([one])
    wanted, found = reference([piece(0), piece(2), piece(4)]), state(network, update)
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []
    update([piece(5, scale=math.inf)])  # the third, and one too many
    update([piece(6)])
    assert [name for name, tensor in found.items() if not torch.equal(state(network, update)[name], tensor)] == []


def test_faults_before_a_resume_count() -> None:
    network, update = made()
    resumed = Update(
        network, update.optimizer, update.masters, update.stage, update.accelerator, update.host_reduce, 2, nonfinite=2
    )
    resumed([piece(0)])
    before = state(network, resumed)
    resumed([piece(1, scale=math.nan)])
    resumed([piece(2)])
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(network, resumed).items())


def poison_record(monkeypatch: pytest.MonkeyPatch, *records: str) -> None:
    """The loss of every batch with one of these records is NaN."""
    loss = PalModel.loss

    def poisoned(self: PalModel, batch: Any, *given: Any) -> Any:
        total, tokens = loss(self, batch, *given)
        return (total * math.nan if set(records) & set(batch.records) else total), tokens

    monkeypatch.setattr(PalModel, "loss", poisoned)


def listed(out: Path) -> list[dict[str, Any]]:
    return read_log(out / "skipped_steps.jsonl")


def drawn_records(manifest: Path, out: Path) -> list[list[str]]:
    """Records of each step."""
    steps: list[list[str]] = []
    update = Update.__call__

    def noted(self: Update, micro_batches: Any, *flags: bool) -> StepResult:
        steps.append([record for micro_batch in micro_batches for record in micro_batch.batch.records])
        return update(self, micro_batches, *flags)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Update, "__call__", noted)
        run(settings(manifest), out)
    return steps


def test_a_run_skips_names_and_counts_the_steps_however_it_is_read_or_cut(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = drawn_records(manifest, tmp_path / "plain")
    bad = [steps[1][0], steps[4][1]]
    wrong = [number for number, records in enumerate(steps, start=1) if set(bad) & set(records)]
    assert 2 <= len(wrong) < 5
    poison_record(monkeypatch, *bad)
    outs = []
    for every in (1, 100):
        outs.append(tmp_path / str(every))
        trainer.run(settings(manifest, log_every=100, max_nonfinite=4), outs[-1], read_every=every)
    outs.append(tmp_path / "cut")
    made = settings(manifest, log_every=2, checkpoint_every=2, max_nonfinite=4)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Update, "__call__", failing_after(wrong[-1]))
        trainer.run(made, outs[-1])
    trainer.run(made, outs[-1], resume=True)
    wanted = PalModel.from_pretrained(outs[0] / "model").state_dict()
    assert all(tensor.isfinite().all() for tensor in wanted.values())
    for out in outs:
        found = PalModel.from_pretrained(out / "model").state_dict()
        assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []
        told = [{"step": n, "stage": "stage", "what": "the loss", "records": steps[n - 1]} for n in wrong]
        assert listed(out) == told
        report = json.loads((out / "train.json").read_text())
        assert report["skipped_steps"] == report["stages"][0]["skipped_steps"] == len(wrong)
        assert report["stages"][0]["steps"] == 6 and math.isfinite(report["stages"][0]["loss"])
    with pytest.raises(TrainingError, match=rf"step {wrong[1] - 1}: the loss is not finite; records: "):
        trainer.run(settings(manifest, max_nonfinite=1), tmp_path / "ends")
    assert [line["step"] for line in listed(tmp_path / "ends")] == wrong[:1]
    trainer.run(settings(manifest, max_nonfinite=4), tmp_path / "ends", resume=True)
    found = PalModel.from_pretrained(tmp_path / "ends" / "model").state_dict()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


def test_a_lower_limit_than_the_faults_so_far_is_an_error(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, 1, lambda total: total * math.nan)
    made = settings(manifest, max_nonfinite=1, checkpoint_every=3)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Update, "__call__", failing_after(4))
        run(made, tmp_path)
    with pytest.raises(TrainingError, match=r"1 steps were skipped, more than keep\.max_nonfinite \(0\)"):
        run(settings(manifest, max_nonfinite=0), tmp_path, resume=True)


def test_steps_that_were_skipped_are_no_part_of_the_logs_means(manifest: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        poison(patch, 2, steepened)
        run(settings(manifest, max_nonfinite=1, log_every=1), tmp_path)
    lines = read_log(tmp_path / "log.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 4, 5, 6]
    assert all(math.isfinite(line["loss"]) and math.isfinite(line["gradient_norm"]) for line in lines)
