"""What a stage changes, what stops a run, and that cutting a batch up does not change the step."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pal.errors import ConfigError, TrainingError
from pal.model import PalModel
from pal.train import Trainer, run
from pal.train.curves import read_log
from tests.train.tiny import LLM, MODEL, recipe

ALL = {"encoder": True, "connector": True, "projectors": True, "llm": "full"}


def stage(**fields: Any) -> dict[str, Any]:
    return {"train": ALL, "lr": 1e-2, "steps": 2, "batch": {"clips": 4, "rows_per_clip": 2}} | fields


def part_of(name: str) -> str:
    return name.split(".")[0]


@pytest.fixture(scope="module")
def base(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle to start from."""
    out = tmp_path_factory.mktemp("base")
    run(recipe(manifest, [stage(steps=1, lr=0.0, weight_decay=0.0)]), out)
    return out / "model"


def trained(manifest: Path, out: Path, base: Path, **fields: Any) -> dict[str, Tensor]:
    data = {"scenes": {"manifest": str(manifest)}}
    keep = {"checkpoint_every": 2, "log_every": 1, "max_nonfinite": 0}
    model = run(recipe(manifest, [stage(**fields)], model=None, bundle=base, data=data, keep=keep), out)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    ("train", "moves"),
    [
        ({"encoder": True}, {"encoders"}),
        ({"connector": True, "projectors": True}, {"connectors", "integration"}),
        ({"llm": "attention"}, {"self_attn"}),
        (
            {"llm": "no_ffn"},
            {"self_attn", "input_layernorm", "post_attention_layernorm", "norm", "embed_tokens", "lm_head"},
        ),
        ({"llm": "lora"}, {"lora_B"}),
    ],
)
def test_only_what_is_trained_moves(
    manifest: Path, tmp_path: Path, base: Path, train: dict[str, Any], moves: set[str]
) -> None:
    before = PalModel.from_pretrained(base).state_dict()
    after = trained(manifest, tmp_path, base, train=train)
    changed = {
        name
        for name, tensor in after.items()
        if not torch.equal(tensor, before.get(name.replace(".base_layer", ""), torch.zeros_like(tensor)))
    }
    if "lora_B" in moves:
        assert {name for name in changed if "lora_" not in name} == set()
        assert any("lora_B" in name for name in changed)
    else:
        assert all(moves & set(name.split(".")) for name in changed)
        assert moves <= {piece for name in changed for piece in name.split(".")}
    saved = PalModel.from_pretrained(tmp_path / "model").state_dict()
    assert all(torch.equal(saved[name], tensor) for name, tensor in after.items())


@pytest.mark.parametrize("variant", [{"gradient_checkpointing": True}, {"accumulate": 2}, {"accumulate": 7}])
def test_the_same_step_in_another_way(manifest: Path, tmp_path: Path, base: Path, variant: dict[str, Any]) -> None:
    # The encoder is frozen: its batch statistics would be those of the parts.
    train = {"connector": True, "projectors": True, "llm": "full"}
    plain = trained(manifest, tmp_path / "a", base, train=train)
    batch = {"clips": 4, "rows_per_clip": 2, "accumulate": variant.pop("accumulate", 1)}
    other = trained(manifest, tmp_path / "b", base, train=train, batch=batch, **variant)
    for name, tensor in plain.items():
        torch.testing.assert_close(other[name], tensor, atol=2e-5, rtol=1e-4, msg=name)
    losses = [[line["loss"] for line in read_log(tmp_path / run / "log.jsonl")] for run in "ab"]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_parts_start_from_other_models(manifest: Path, tmp_path: Path, base: Path) -> None:
    fields = {**MODEL, "integration": "plits"}
    start = {"encoder": base, "llm": base}
    stages = [stage(train={"projectors": True}, steps=1)]
    model = run(recipe(manifest, stages, model=fields, start=start), tmp_path / "a")
    theirs = PalModel.from_pretrained(base)
    for part in ("encoder", "llm"):
        ours = model.parts()[part].state_dict()
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.parts()[part].state_dict().items())
    assert model.tokenizer.get_vocab() == theirs.tokenizer.get_vocab()
    wide = {**fields, "llm": {"fresh": {**LLM, "intermediate_size": 48}, "vocabulary": 280}}
    with pytest.raises(ConfigError, match=r"the llm of .* does not fit the recipe's"):
        run(recipe(manifest, stages, model=wide, start=start), tmp_path / "b")


def test_a_loss_that_is_no_number_stops_with_the_records(
    manifest: Path, tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = PalModel.loss
    steps = 0

    def poisoned(self: PalModel, *given: Any) -> Any:
        nonlocal steps
        steps += 1
        total, tokens = loss(self, *given)
        return total * (float("nan") if steps == 2 else 1.0), tokens

    monkeypatch.setattr(PalModel, "loss", poisoned)
    with pytest.raises(TrainingError, match=r"step 1: the loss is not finite; records: synth-5-0") as caught:
        trained(manifest, tmp_path, base, steps=3)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "checkpoints" / "step0000001").is_dir()
    monkeypatch.setattr(PalModel, "loss", loss)
    data = {"scenes": {"manifest": str(manifest)}}
    run(recipe(manifest, [stage(steps=3)], model=None, bundle=base, data=data), tmp_path, resume=True)
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl")] == [1, 2, 3]


def test_on_a_cpu_freed_memory_is_kept(
    manifest: Path, tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some machines make new pages so slowly that a step would wait for them longer than it computes."""
    calls: list[int] = []
    monkeypatch.setattr("pal.train.trainer.keep_freed_memory", lambda: calls.append(1))
    trained(manifest, tmp_path, base, steps=1)
    assert calls


def test_another_run_in_the_folder_is_not_touched(manifest: Path, tmp_path: Path, base: Path) -> None:
    trained(manifest, tmp_path, base, steps=1)
    with pytest.raises(ConfigError, match="holds a finished run; give --resume"):
        trained(manifest, tmp_path, base, steps=1)
    other = recipe(manifest, [stage(steps=2)], model=None, bundle=base, data={"scenes": {"manifest": str(manifest)}})
    with pytest.raises(ConfigError, match=r"differs in: stages\.0\.steps"):
        run(other, tmp_path, resume=True)
    run(other, tmp_path, overwrite=True)
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl")] == [1, 2]


def test_a_folder_has_one_run_at_a_time(
    manifest: Path, tmp_path: Path, base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "run"
    made = recipe(manifest, [stage(steps=2)], model=None, bundle=base, data={"scenes": {"manifest": str(manifest)}})
    steps = Trainer(made, out, resume=True).steps()
    assert f"{out} holds no run to resume; a new one begins" in caplog.text
    next(steps)
    for options in ({"resume": True}, {"overwrite": True}):
        with pytest.raises(ConfigError, match="another pal train is writing into it"):
            run(made, out, **options)
    assert list(steps) == [2]  # the first goes on, and nothing of it was removed
    assert [line["step"] for line in read_log(out / "log.jsonl")] == [1, 2]
    run(made, out, resume=True)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="is a file; give a folder as --out"):
        run(made, tmp_path / "file", overwrite=True)
    assert (tmp_path / "file").read_text() == "mine"


def test_data_that_changed_is_noticed(manifest: Path, tmp_path: Path, base: Path) -> None:
    copy = tmp_path / "copy.jsonl"
    copy.write_text(manifest.read_text())
    data = {"scenes": {"manifest": str(copy), "root": str(manifest.parent)}}
    made = recipe(manifest, [stage(steps=2)], model=None, bundle=base, data=data, keep={"checkpoint_every": 1})
    assert list(Trainer(made, tmp_path / "run").steps()) == [1, 2]
    copy.write_text("\n".join(manifest.read_text().splitlines()[:-1]))
    with pytest.raises(ConfigError, match="data 'scenes' changed since the run was started"):
        run(made, tmp_path / "run", resume=True)


def test_sources(manifest: Path, tmp_path: Path, base: Path, caplog: pytest.LogCaptureFixture) -> None:
    missing = {"manifest": str(tmp_path / "none.jsonl")}
    good = {"manifest": str(manifest)}
    fields: dict[str, Any] = {"model": None, "bundle": base}
    with pytest.raises(ConfigError, match=r"data 'gone': no '.*none\.jsonl'; .*optional"):
        run(recipe(manifest, [stage()], data={"gone": missing, "good": good}, **fields), tmp_path / "a")
    with pytest.raises(ConfigError, match="all data sources"):
        run(recipe(manifest, [stage()], data={"gone": {**missing, "optional": True}}, **fields), tmp_path / "b")
    with pytest.raises(ConfigError, match="leave no record"):
        run(recipe(manifest, [stage()], data={"good": {**good, "tasks": ["x"]}}, **fields), tmp_path / "c")
    with caplog.at_level("INFO"):
        data = {"gone": {**missing, "optional": True}, "made": {"synth": {"scenes": 3, "seconds": 1.5}}}
        run(recipe(manifest, [stage()], data=data, **fields), tmp_path / "d")
    assert "data 'gone' is left out" in caplog.text
    assert (tmp_path / "d" / "data" / "made" / "manifest.jsonl").exists()


@pytest.mark.parametrize("objective", ["tags", "answers"])
def test_bf16_computes_nearly_the_same(manifest: Path, tmp_path: Path, base: Path, objective: str) -> None:
    train = {"encoder": True} if objective == "tags" else ALL
    losses = []
    for precision in ("fp32", "bf16"):
        trained(manifest, tmp_path / precision, base, objective=objective, train=train, precision=precision, steps=1)
        losses.append(read_log(tmp_path / precision / "log.jsonl")[0]["loss"])
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)
    saved = load_file(tmp_path / "bf16" / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32, torch.int64}
