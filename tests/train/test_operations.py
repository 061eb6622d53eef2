"""Operations of a step by the cost model against those counted while it happens, and what the log makes of them."""

import logging
import platform
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pal.backbone.llm import Backbone
from pal.bench.flops import flop_counter
from pal.errors import ConfigError
from pal.model import PalModel
from pal.train import meter, operations, run, stages, trainer
from pal.train.curves import read_log
from pal.train.objectives import MicroBatch
from pal.train.operations import Operations, product_rate
from pal.train.recipe import Recipe, Stage
from pal.train.step import StepResult
from pal.types import AUDIO, IGNORE, Batch, EncodedClip, Tokens
from tests import test_plan
from tests.train.tiny import HEAR, recipe

STAGE = {**test_plan.STAGES["all"], "recompute_audio": False}


def ragged(model: PalModel) -> Batch:
    """Two clips, three conversations of other lengths about them, one without a clip."""
    generator = torch.Generator().manual_seed(0)
    waves = [0.1 * torch.randn(round(s * model.sampling_rate), generator=generator) for s in (2.0, 4.0)]
    rows = []
    for text, before, answer, clips in ((90, 0, 20, [1]), (30, 9, 5, [0]), (64, 3, 30, [1]), (40, 0, 8, [])):
        ids = torch.randint(5, 280, (text,), generator=generator).tolist()
        labels = [IGNORE] * (text - answer) + ids[-answer:]
        if clips:
            ids.insert(before, AUDIO)
            labels.insert(before, IGNORE)
        rows.append(Tokens(ids, clips, labels))
    return Batch(waves, rows)


def counted(model: PalModel, batch: Batch) -> float:
    counter = flop_counter()
    with counter:
        model.loss(batch).sum.backward()
    return float(counter.get_total_flops())


@pytest.mark.parametrize("integration", ["lal", "plits", "pal", {"name": "lal", "layers": "first_third"}])
def test_a_ragged_batch(integration: Any) -> None:
    """Padding is computed on a CPU but is no operation of the model: each conversation is counted by itself."""
    made = test_plan.recipe(integration, STAGE)
    model, _ = test_plan.prepared(made)
    operations = Operations(made, made.stages[0], model)
    batch = ragged(model)
    # the encoder and what makes K/V run once a clip, whoever asks about it
    alone = sum(
        counted(model, Batch([batch.waveforms[i] for i in row.clips], [replace(row, clips=[0] * len(row.clips))]))
        for row in batch.conversations[:2]
    )
    ours = operations([MicroBatch(replace(batch, conversations=batch.conversations[:2]), [], 0)])
    assert ours == pytest.approx(alone, rel=0.03)
    shared = operations([MicroBatch(batch, [], 0)])
    single = [operations([MicroBatch(replace(batch, waveforms=[batch.waveforms[1]], conversations=[about]), [], 0)])
              for about in (replace(batch.conversations[0], clips=[0]), replace(batch.conversations[2], clips=[0]))]  # fmt: skip
    assert (
        ours
        < shared
        < ours + single[1] + operations([MicroBatch(replace(batch, conversations=[batch.conversations[3]]), [], 0)])
    )


@pytest.mark.parametrize("integration", ["plits", "lal", "pal"])
def test_conversations_that_begin_alike_share_their_beginning(integration: str) -> None:
    made = test_plan.recipe(integration, {**test_plan.STAGES["projectors"], "recompute_audio": False})
    model, _ = test_plan.prepared(made)
    batch = test_plan.about_shared_clips(model, before=8)
    rows = [*batch.conversations, replace(batch.conversations[0], labels=batch.conversations[0].labels)]
    batch = replace(batch, conversations=rows)  # the last is no neighbour of those that begin as it does
    found = Operations(made, made.stages[0], model)([MicroBatch(batch, [], 0)])
    assert found == pytest.approx(counted(model, batch), rel=0.03)
    model.llm.shares_prefixes = False
    apart = Operations(made, made.stages[0], model)([MicroBatch(batch, [], 0)])
    assert apart == pytest.approx(counted(model, batch), rel=0.03)
    assert apart > (1.3 if integration == "plits" else 1.0) * found


def test_text_before_a_clip_does_not_hear_it() -> None:
    made = test_plan.recipe("lal", test_plan.STAGES["projectors"])
    model, batch = test_plan.prepared(made)
    operations = Operations(made, made.stages[0], model)
    first, last = (
        batch.conversations[:1],
        [Tokens([*batch.conversations[0].ids[1:], AUDIO], [0], batch.conversations[0].labels)],
    )
    behind, before = (operations([MicroBatch(replace(batch, conversations=rows), [], 0)]) for rows in (first, last))
    attention = 4 * test_plan.TEXT * 100 * 6 * 24 * 4  # two products with 100 keys of 6 heads of 24, in 4 layers
    assert behind - before == pytest.approx(attention * (1 + 2.5), rel=0.05)


@pytest.mark.parametrize("stage", ["projectors", "lora", "llm"])
def test_what_a_stage_trains_counts(stage: str) -> None:
    made = test_plan.recipe("lal", {**test_plan.STAGES[stage], "recompute_audio": False})
    model, batch = test_plan.prepared(made)
    ours = Operations(made, made.stages[0], model)([MicroBatch(batch, [], 0)])
    assert ours == pytest.approx(sum(test_plan.counted(made)), rel=0.01)


def test_what_is_made_again_to_save_memory_is_no_operation_of_the_model() -> None:
    one, again = (test_plan.recipe("lal", {**STAGE, "gradient_checkpointing": on}) for on in (False, True))
    found = []
    for made in (one, again):
        model, batch = test_plan.prepared(made)
        found.append(Operations(made, made.stages[0], model)([MicroBatch(batch, [], 0)]))
    assert found[0] == found[1]


def test_clips_that_were_heard_before_cost_no_encoder() -> None:
    made = test_plan.recipe("lal", test_plan.STAGES["projectors"])
    model, batch = test_plan.prepared(made)
    operations = Operations(made, made.stages[0], model)
    heard = replace(batch, waveforms=[], encoded=[EncodedClip((torch.zeros(1, 1),), test_plan.SECONDS)] * 2)
    spared = operations([MicroBatch(batch, [], 0)]) - operations([MicroBatch(heard, [], 0)])
    assert spared == pytest.approx(test_plan.planned(made).costs["encoder"].forward, rel=0.01)


def test_tags_are_the_encoder_alone() -> None:
    made = test_plan.recipe("lal", {**STAGE, "train": {"encoder": True}, "objective": "tags"})
    model, batch = test_plan.prepared(made)
    plan = test_plan.planned(made)
    ours = Operations(made, made.stages[0], model)([MicroBatch(batch, [], 0)])
    assert ours == pytest.approx(plan.forward + plan.backward, rel=0.01)


def test_parts_of_a_step_add_up() -> None:
    made = test_plan.recipe("lal", STAGE)
    model, batch = test_plan.prepared(made)
    operations = Operations(made, made.stages[0], model)
    assert operations([MicroBatch(batch, [], 0)] * 3) == pytest.approx(3 * operations([MicroBatch(batch, [], 0)]))


# The log


def test_lines_and_totals_of_steps_by_a_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps that are read together, then one."""
    now = 100.0
    monkeypatch.setattr(meter, "time", SimpleNamespace(monotonic=lambda: now))
    total = meter.new_totals()
    counts = meter.Meter("tokens", total, peak=100.0)

    def step(wait: float, busy: float, loss: float, items: int, norm: float) -> None:
        nonlocal now
        ready, began, now = now, now + wait, now + wait + busy
        numbers_4 = torch.tensor([loss * items, norm, 1.0, 2.0], dtype=torch.float64)
        counts.add(
            StepResult(numbers_4, items, []), meter.StepInputs(3, {"steps": 1, "rows": 2}, [], 8.0), began, ready
        )

    step(1.0, 2.0, loss=1.0, items=30, norm=7.0)
    step(3.0, 2.0, loss=5.0, items=10, norm=4.0)
    assert counts.read() == []
    assert (total["seconds"], total["steps"], total["rows"]) == (8.0, 2, 4)
    assert counts.line() == {
        "loss": 2.0, "gradient_norm": 7.0, "tokens": 40, "tokens_per_second": 5.0, "rows_per_second": 0.8,
        "step_seconds": 2.0, "wait_seconds": 2.0, "wait_share": 0.5, "mfu": 0.02, "accuracy": 0.5,
    }  # fmt: skip
    step(0.0, 5.0, loss=3.0, items=20, norm=1.0)
    assert counts.read() == []
    assert (total["seconds"], total["steps"], total["rows"]) == (13.0, 3, 6)
    assert counts.line() == {
        "loss": 3.0, "gradient_norm": 1.0, "tokens": 20, "tokens_per_second": 4.0, "rows_per_second": 0.6,
        "step_seconds": 5.0, "wait_seconds": 0.0, "wait_share": 0.0, "mfu": 0.016, "accuracy": 0.5,
    }  # fmt: skip


def test_repeated_rows_are_no_part_of_the_totals() -> None:
    batch = Batch([torch.ones(8_000)], [Tokens([5, AUDIO, 6], [0], [IGNORE, IGNORE, 6])], records=["one"])
    found = meter.step_inputs([MicroBatch(batch, [], 0), MicroBatch(batch, [], 0, counts=False)], 16_000, "tokens")
    assert found.totals == {"steps": 1, "rows": 1, "left_out": 0, "clips": 1, "audio_seconds": 0.5, "tokens": 1}
    assert found.rows == 2


def ran(manifest: Path, out: Path, **fields: Any) -> list[dict[str, Any]]:
    stage = {"train": {"projectors": True}, "lr": 1e-2, "steps": 2, "batch": {"clips": 2, "rows_per_clip": 1}}
    made: Recipe = recipe(manifest, [stage | fields], data={"scenes": {"manifest": str(manifest)}})
    run(made, out)
    return read_log(out / "log.jsonl")


def test_on_a_cpu_there_is_no_peak(manifest: Path, tmp_path: Path) -> None:
    assert product_rate(torch.device("cpu")) is None
    lines = ran(manifest, tmp_path)
    assert all("mfu" not in line and 0 <= line["wait_share"] < 1 for line in lines)


def test_the_log_has_the_share_of_a_cards_peak(manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "product_rate", lambda device: 1e6)
    monkeypatch.setattr(Operations, "__call__", lambda self, micro_batches: 5e3)
    for line in ran(manifest, tmp_path):
        assert line["mfu"] == pytest.approx(5e3 / 1e6 / (line["step_seconds"] + line["wait_seconds"]), rel=0.02)
        assert line["wait_share"] == pytest.approx(
            line["wait_seconds"] / (line["step_seconds"] + line["wait_seconds"]), rel=0.02, abs=1e-3
        )


def test_an_integration_that_does_not_say_what_it_costs_trains_without(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def silent(*given: Any) -> Any:
        raise ConfigError("it does not say what it costs")

    monkeypatch.setattr(trainer, "product_rate", lambda device: 1e6)
    monkeypatch.setattr(operations, "route_cost", silent)
    with caplog.at_level(logging.INFO):
        lines = ran(manifest, tmp_path)
    assert all("mfu" not in line for line in lines)
    assert "no 'mfu' in the log: it does not say what it costs" in caplog.text


def test_whether_layers_are_compiled(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(Backbone, "compile", lambda self: calls.append("compile"))
    monkeypatch.setattr(Backbone, "uncompile", lambda self: calls.append("uncompile"))
    cases: list[tuple[dict[str, Any], bool]] = [
        ({}, False),
        ({"compile": True}, True),
        ({**HEAR, "compile": True}, False),
    ]
    with caplog.at_level(logging.INFO):
        for number, (options, compiles) in enumerate(cases):
            ran(manifest, tmp_path / str(number), **{"steps": 1, **options})
            assert calls == (["compile", "uncompile"] if compiles else [])
            calls.clear()
    assert caplog.text.count("its first step compiles the LLM's layers") == 1


@pytest.mark.parametrize(
    ("processor", "capability", "precision", "warns"),
    [
        ("x86_64", "AVX2", "bf16", True),
        ("AMD64", "DEFAULT", "bf16", True),
        ("x86_64", "AVX2", "fp32", False),
        ("x86_64", "AVX512", "bf16", False),
        ("aarch64", "DEFAULT", "bf16", False),
    ],
)
def test_a_processor_that_only_emulates_bfloat16_is_named(
    manifest: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    processor: str,
    capability: str,
    precision: str,
    warns: bool,
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: processor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    ran(manifest, tmp_path, steps=1, precision=precision)
    assert ("--set stages.0.precision=fp32" in caplog.text) is warns


@pytest.mark.parametrize(
    ("kind", "chosen", "compiles"), [("cuda", "auto", True), ("cpu", "auto", False), ("cuda", False, False)]
)
def test_auto_compiles_on_cuda(kind: str, chosen: Any, compiles: bool) -> None:
    stage = Stage(train={"llm": "full"}, lr=1.0, steps=1, batch={"rows": 1}, compile=chosen)  # type: ignore[arg-type]
    assert stages.compiles(stage, torch.device(kind)) is compiles


def test_compiled_layers_train_alike(manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced and run as they are, without a C++ compiler."""
    plain = ran(manifest, tmp_path / "plain")
    compile_, seen = Backbone.compile, []

    def traced(self: Backbone) -> None:
        seen.append(self)
        compile_(self, backend="eager")
        assert all("forward" in vars(layer) for layer in self.layers)

    monkeypatch.setattr(Backbone, "compile", traced)
    compiled = ran(manifest, tmp_path / "compiled", compile=True)
    assert [line["loss"] for line in compiled] == pytest.approx([line["loss"] for line in plain], rel=1e-6)
    (llm,) = seen
    assert not any("forward" in vars(layer) for layer in llm.layers)
