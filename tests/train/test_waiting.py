"""A training step waits for nothing: under fake tensors, which have no values, every look at one would raise."""

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode, unset_fake_temporarily

from pal.model import PalModel
from pal.train import meter, optim, stages
from pal.train.distributed import HostReduce
from pal.train.engines import TrainingEngine
from pal.train.master_weights import MasterWeights
from pal.train.objectives import AnswerLoss, LossOutput, MicroBatch, Objective, TagLoss
from pal.train.recipe import Stage
from pal.train.step import StepResult, Update
from pal.types import AUDIO, IGNORE, Batch, EncodedClip, Frames, PreparedClips, TagSpan, Tokens
from tests.counts import full_only
from tests.models import INTEGRATIONS, LLM, tiny_model

ALL = {"connector": True, "projectors": True, "llm": "full"}


def stage(**fields: Any) -> Stage:
    return Stage(**{"train": ALL, "lr": 1e-3, "steps": 9, "batch": {"rows": 3}} | fields)


@pytest.fixture
def nothing() -> Iterator[FakeTensorMode]:
    """While it lasts, tensors are made without values."""
    with FakeTensorMode() as mode:
        yield mode


def updating(objective: Objective, made: Stage, parts: Any) -> Update:
    """As the loop puts it together."""
    masters = MasterWeights(parts, made.master_weights)
    optimizer = optim.adamw(optim.parameter_groups(masters.parts, made), made)
    return Update(objective, optimizer, masters, made, TrainingEngine(Accelerator(cpu=True)), HostReduce(1))


def noted(update: Update, micro_batches: list[MicroBatch], times: int = 2) -> StepResult:
    """Steps of a run between two lines of its log: all but the reading."""
    counts = meter.Meter("tokens", meter.new_totals())
    for step in range(times):
        optim.set_lr(update.optimizer, 1 / (1 + step))
        told = update(micro_batches, False, True)
        counts.add(told, meter.step_inputs(micro_batches, 16_000, "tokens"), 1.0, 0.0)
    assert told.flags == [False, True] and isinstance(told.items, int)
    with pytest.raises(DataDependentOutputException):  # reading is what it must not do before
        counts.read()
    return told


class Counting(nn.Module):
    """A network behind batch statistics whose hits the device counts."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(4), nn.Linear(4, 2, dtype=dtype)

    def forward(self, micro_batch: Any) -> LossOutput:
        y_B2 = self.linear(self.norm(torch.ones(3, 4)).to(self.linear.weight.dtype))
        right = y_B2.argmax(1) == 0
        return LossOutput(y_B2.float().square().sum(), 3, (right.sum(), 3))


@pytest.mark.parametrize("on", [False, True])
def test_the_trainers_own_part(nothing: FakeTensorMode, on: bool) -> None:
    network: Any = Counting(torch.bfloat16 if on else torch.float32)
    micro_batches: Any = [SimpleNamespace(counts=counts, batch=Batch([], [])) for counts in (True, True, False)]
    update = updating(network, stage(master_weights=on), {"llm": dict(network.named_parameters())})
    assert bool(update.masters.copies) is on and len(update.statistics) == 3
    assert noted(update, micro_batches).items == 6


def test_a_look_at_a_value_would_be_noticed(nothing: FakeTensorMode) -> None:
    class Looking(Counting):
        def forward(self, micro_batch: Any) -> LossOutput:
            loss, items, _ = super().forward(micro_batch)
            return LossOutput(loss, items if loss > 0 else 0)

    network: Any = Looking(torch.float32)
    micro_batches: Any = [SimpleNamespace(counts=True, batch=Batch([], []))]
    update = updating(network, stage(), {"llm": dict(network.named_parameters())})
    with pytest.raises(DataDependentOutputException):
        update(micro_batches)


WAVES = [torch.ones(samples) for samples in (7000, 2500, 9990)]


def frames(mode: FakeTensorMode) -> Frames:
    """What the threads that load make of clips, which may look at values, and no value more."""
    with unset_fake_temporarily():
        made = tiny_model("lal", warm=False).ears.prepare_with(0, WAVES)
    return replace(made, blocks_WFM=tuple(mode.from_tensor(x_WFM) for x_WFM in made.blocks_WFM))


def ragged(model: PalModel) -> Batch:
    """Clips as frozen encoders heard them and conversations, all of other lengths."""
    width = model.ears.encoder(0).width
    heard = [EncodedClip((torch.ones(tokens, width),), tokens * 0.04) for tokens in (9, 4, 17)]
    rows = []
    for clip, (text, before, answer) in enumerate([(12, 3, 4), (7, 1, 2), (20, 5, 9)]):
        ids = [5 + i for i in range(text)]
        labels = [IGNORE] * (text - answer) + ids[-answer:]
        rows.append(Tokens([*ids[:before], AUDIO, *ids[before:]], [clip], [*labels[:before], IGNORE, *labels[before:]]))
    return Batch([], rows, encoded=heard)


RARE = (pytest.mark.torture, full_only)
"""Another integration in the same way."""

OPTIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "encoder": {"train": {"encoder": True, "connector": True, "projectors": True}},
    "frozen LLM": {"train": {"projectors": True}, "clip_grad": None, "recompute_audio": False},
    "bf16, checkpointed": {"precision": "bf16", "gradient_checkpointing": True, "train": {**ALL, "llm": "attention"}},
    "bf16 weights": {"master_weights": True, "precision": "bf16", "options": {"per": "answer"}},
}


@pytest.mark.parametrize(
    ("integration", "options"),
    [
        *((name, "full") for name in INTEGRATIONS),
        *(("lal", one) for one in ("encoder", "bf16 weights")),
        *(("pal", one) for one in ("frozen LLM", "bf16, checkpointed")),
        *(pytest.param("lal", one, marks=RARE) for one in ("frozen LLM", "bf16, checkpointed")),
        *(pytest.param("pal", one, marks=RARE) for one in ("encoder", "bf16 weights")),
    ],
)
def test_a_whole_step(nothing: FakeTensorMode, integration: str, options: str) -> None:
    """On the path of a GPU, whose kernels have plain ones of the same signature in their place."""
    made = stage(**OPTIONS[options])
    dtype = "bfloat16" if made.master_weights else "float32"
    model = tiny_model(integration, warm=False, llm={"fresh": LLM, "dtype": dtype})
    model.llm.packs = True
    parts = stages.freeze(model, made.train)
    objective = AnswerLoss(model, AnswerLoss.Config(**made.options))
    model.llm.checkpoint_gradients(made.gradient_checkpointing, recompute_audio=made.recompute_audio)
    objective.train()
    stages.set_modes(model, made)
    batch = ragged(model)
    if "encoder" in made.train.model_fields_set:
        batch = replace(batch, encoded=[], waveforms=WAVES, prepared=PreparedClips((frames(nothing),), len(WAVES)))
    micro_batches = [MicroBatch(batch, [], 0)]
    told = noted(updating(objective, made, parts), micro_batches, times=1)
    assert told.items == (3 if "per" in made.options else 15)
    assert all(p.grad is None for of in parts.values() for p in of.values())


def test_a_step_of_the_encoder_alone(nothing: FakeTensorMode) -> None:
    """Hits are counted on the device, too."""
    model, made = tiny_model("lal", warm=False), stage(train={"encoder": True}, objective="tags")
    spans = [[TagSpan("dog", 0.1, 0.2), TagSpan("bell")], None, [TagSpan("dog")]]
    batch = Batch(WAVES, [], [], spans)
    parts = stages.freeze(model, made.train)
    objective = TagLoss(model, TagLoss.Config(), {"a": {"dog", "bell"}})
    objective.train()
    stages.set_modes(model, made)
    micro_batch = MicroBatch(batch, ["a"] * 3, 0)
    micro_batch = replace(micro_batch, mixed=objective.mix(micro_batch)._replace(clips=frames(nothing)))
    assert (
        noted(updating(objective, made, parts | {"head": objective.head()}), [micro_batch, micro_batch], times=1).items
        == 6
    )
