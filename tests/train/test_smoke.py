"""`pal train --smoke`: every recipe of the repository works at toy size, and each of its checks can fail."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from pal.app.cli import app
from pal.model import PalModel
from pal.plan.skeleton import skeleton
from pal.train import optim, stages
from pal.train.recipe import Recipe, load_recipe
from pal.train.smoke import SmokeError, smoke, toy_recipe
from tests.counts import full_only
from tests.train.tiny import HEAR, JOIN, READ

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
SMALLEST = RECIPES / "paper" / "llama-3.2-1b"
RUN = [
    *sorted(RECIPES.glob("*.yaml")),
    *sorted(SMALLEST.glob("*.yaml")),
    RECIPES / "paper" / "qwen2.5-1.5b" / "pal.yaml",
    *(RECIPES / "real" / f"{name}.yaml" for name in ("align", "lal", "smol")),
]
"""The recipes that are run; those of the other LLMs make the same toys, but for the LLM."""
SEEN_APART = [SMALLEST / f"{name}.yaml" for name in ("lal", "lal_qformer", "pal_qformer", "plits")]
SEEN_APART += [RECIPES / "tiny-causal.yaml", RECIPES / "real" / "align.yaml"]
"""Recipes whose encoder, connector, integration and kind of stages others of `RUN` have, but not together."""
REAL = sorted((RECIPES / "real").glob("*.yaml"))
COMPARED = [path for path in REAL if path.stem not in ("align", "smol")]
"""Recipes that differ in the integration alone."""
WHISPER = {"name": "whisper", "path": "openai/whisper-small"}


@pytest.mark.torture
@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=[full_only] if path in SEEN_APART else [], id=str(path.relative_to(RECIPES)))
        for path in RUN
    ],
)
def test_recipes(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    recipe = load_recipe(path)
    found = {check.name: check.found for check in smoke(recipe, tmp_path)}
    assert list(found) == [
        "trained",
        *(f"stage {stage.name}" for stage in recipe.stages),
        "saved and read back",
        "asked",
        "resumed",
    ]


def test_recipes_of_other_llms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    others = [path for path in sorted((RECIPES / "paper").rglob("*.yaml")) if path not in RUN]
    assert {*others, *RUN, *REAL} == {*RECIPES.rglob("*.yaml")}
    for path in others:
        small, same = toy_recipe(load_recipe(path)), toy_recipe(load_recipe(SMALLEST / path.name))
        assert small.model is not None and same.model is not None
        model = small.model.model_copy(update={"llm": same.model.llm})
        assert small.model_copy(update={"model": model}) == same, path


def test_recipes_on_real_components_differ_in_the_integration_alone() -> None:
    base = load_recipe(RECIPES / "real" / "base.yaml")
    assert base.model is not None
    for path in COMPARED:
        own = load_recipe(path)
        assert own.model is not None
        model = own.model.model_copy(update={"integration": base.model.integration})
        assert own.model_copy(update={"model": model}) == base, path
    assert len({str(load_recipe(path).model) for path in COMPARED}) == len(COMPARED)


def recipe(integration: Any = "lal", **fields: Any) -> Recipe:
    """A paper's model, of which nothing is on this machine."""
    model = {
        "llm": "Qwen/Qwen2.5-1.5B-Instruct",
        "encoders": [WHISPER],
        "connector": {"name": "mlp", "width": 768},
        "integration": integration,
    }
    stage = {"name": "join", "train": {"connector": True, "projectors": True}, "lr": 1e-3, "batch": {"rows": 256}}
    given = {"model": model, "data": {"all": {"manifest": "nowhere.json"}}, "stages": [{**stage, "epochs": 2}]}
    return Recipe(**given | fields)


INTEGRATIONS: dict[str, Any] = {
    "plits": "plits",
    "lal, range": {"name": "lal", "layers": {"range": [7, 28]}, "hidden": 512},
    "lal, low rank": {"name": "lal", "layers": [3, 20], "projector": "low_rank"},
    "pal": {"name": "pal", "layers": {"first": 0.25}},
    "routed": {"name": "pal_routed", "routes": {"whisper": {"name": "pal", "hidden": 99}}},
    "flamingo": {"name": "flamingo", "every": 7, "ffn": 4096},
    "audio queries": {"name": "lal_audio_query", "layers": {"last": 0.5}},
}


@pytest.mark.parametrize("name", INTEGRATIONS)
def test_options_of_integrations_fit_a_toy(name: str) -> None:
    small = skeleton(toy_recipe(recipe(INTEGRATIONS[name])))
    assert sum(p.numel() for p in small.integration.parameters()) < 100_000


@pytest.mark.parametrize("name", ["lal, low rank", "audio queries"])
def test_integrations_that_no_recipe_has(name: str, tmp_path: Path) -> None:
    assert len(list(smoke(recipe(INTEGRATIONS[name]), tmp_path))) == 5


def test_stages_keep_what_they_do() -> None:
    stage = {
        "name": "x",
        "objective": "answers",
        "options": {"per": "answer"},
        "train": {"encoder": [1], "connector": True, "llm": "lora", "lora": {"r": 3, "targets": ["k_proj"]}},
        "lr": {"encoder": 1e-5, "connector": 1e-3, "llm": 1e-4},
        "batch": {"rows": 256, "accumulate": 16, "rows_per_clip": 5, "turns": 3, "bucket": 50},
        "precision": "bf16",
        "gradient_checkpointing": True,
        "clip_grad": None,
        "warmup": 100,
        "epochs": 3,
        "data": {"b": 0.25},
    }
    model = {
        "llm": {"path": "meta-llama/Llama-3.2-3B", "dtype": "bfloat16"},
        "encoders": ["tiny", WHISPER],
        "connector": [{"name": "qformer", "width": 768, "encoders": [1]}, {"name": "mlp", "encoders": [0]}],
        "integration": {"name": "pal_routed", "routes": {"tiny": {"name": "lal", "layers": [20]}}},
        "system": "Listen.",
    }
    b = {"manifest": "b.json", "tasks": ["t"], "datasets": ["d"], "augment": {"speed": [0.9, 1.1]}, "repeat": 2}
    small = toy_recipe(Recipe(seed=4, model=model, data={"a": {"manifest": "a.json"}, "b": b}, stages=[stage]))
    assert small.stages[0].model_dump() == {
        **Recipe(model=model, data={"b": b}, stages=[stage]).stages[0].model_dump(),
        "steps": 2,
        "epochs": None,
        "warmup": 1,
        "compile": False,
        "cuda_graphs": False,
        "batch": {
            "rows": 4,
            "clips": None,
            "seconds": None,
            "rows_per_clip": 2,
            "turns": 2,
            "accumulate": 2,
            "bucket": 50,
        },
    }
    kept = {"train": {"connector": True}, "lr": 1e-3, "steps": 9, "batch": {"rows": 2}, "cache": "features"}
    kept_small = toy_recipe(Recipe(model=model, data={"a": {"manifest": "a.json"}}, stages=[kept]))
    # a folder of the real encoders' features is none for toy ones
    assert kept_small.stages[0].cache is None
    source = small.data["b"]
    assert source.synth is not None
    assert (source.manifest, source.tasks, source.datasets) == (None, None, None)
    assert (source.augment, source.repeat) == (b["augment"], 2)
    assert small.model is not None and small.model.llm.fresh is not None
    assert small.model.llm.fresh["model_type"] == "llama" and small.model.llm.fresh["hidden_size"] == 32
    assert small.model.llm.dtype == "bfloat16" and small.model.system == "Listen." and small.seed == 4
    tiny, whisper = small.model.encoders
    assert tiny["width"] == 12 and "path" not in whisper and whisper["architecture"]["d_model"] == 16
    assert small.model.connector == [
        {"name": "qformer", "width": 16, "queries": 4, "layers": 2, "encoders": [1]},
        {"name": "mlp", "encoders": [0]},
    ]
    assert small.model.integration == {
        "name": "pal_routed",
        "routes": {"tiny": {"name": "lal", "layers": {"last": 0.5}}},
        "default": {"name": "lal"},
    }


def test_a_bundle_to_go_on_from(tmp_path: Path) -> None:
    stage = {"name": "on", "train": {"projectors": True}, "lr": 1e-2, "steps": 90, "batch": {"clips": 9}}
    on = Recipe(bundle=ROOT / "pal" / "assets" / "tiny", data={"x": {"manifest": "x"}}, stages=[stage])
    assert len(list(smoke(on, tmp_path))) == 5


def test_all_objectives(tmp_path: Path) -> None:
    words = {**READ, "name": "words", "objective": "transcript"}
    found = [check.name for check in smoke(recipe(stages=[HEAR, READ, words, JOIN]), tmp_path)]
    assert found == [
        "trained",
        *(f"stage {name}" for name in ("hear", "read", "words", "join")),
        "saved and read back",
        "asked",
        "resumed",
    ]


def run(recipe: Recipe, out: Path) -> None:
    list(smoke(recipe, out))


def test_weights_that_stay_are_found(tmp_path: Path) -> None:
    still = {"name": "x", "train": {"connector": True}, "lr": 0.0, "weight_decay": 0, "steps": 1, "batch": {"rows": 1}}
    with pytest.raises(SmokeError, match="stage 'x' trains the connector, but none of its weights changed"):
        run(recipe(stages=[still]), tmp_path)


def test_frozen_weights_that_move_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_modes = stages.set_modes

    def thaw(model: PalModel, stage: Any) -> None:
        set_modes(model, stage)
        with torch.no_grad():
            next(iter(model.ears.encoders.parameters())).add_(1)

    monkeypatch.setattr(stages, "set_modes", thaw)
    with pytest.raises(SmokeError, match=r"stage 'join' changed 'ears.encoders.*', which it leaves frozen"):
        run(recipe(), tmp_path)


def test_a_resumed_run_that_differs_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "load_optimizer_tensors", lambda *args: None)
    with pytest.raises(SmokeError, match=r"'.*' differs between an uninterrupted run and one resumed after step 1"):
        run(recipe(), tmp_path)


def test_a_bundle_that_differs_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = PalModel.from_pretrained

    def wrong(path: Path) -> PalModel:
        model = read(path)
        with torch.no_grad():
            next(model.integration.parameters()).add_(1)
        return model

    monkeypatch.setattr(PalModel, "from_pretrained", wrong)
    with pytest.raises(SmokeError, match="digest changes on saving and loading"):
        run(recipe(), tmp_path)


def test_whatever_breaks_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("a shape\nthat does not fit")

    monkeypatch.setattr(PalModel, "inputs", broken)
    with pytest.raises(SmokeError, match=r"^training: RuntimeError: a shape$"):
        run(recipe(), tmp_path)


def test_the_command(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(json.dumps(recipe().model_dump(mode="json", exclude_defaults=True)))
    runner = CliRunner()
    done = runner.invoke(app, ["train", str(file), "--smoke", "--json", "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["ok"] and [check["name"] for check in report["checks"]][-1] == "resumed"
    again = runner.invoke(app, ["train", str(file), "--smoke", "--out", str(tmp_path / "out")])
    assert again.exit_code == 1 and "is not empty" in again.stderr and again.stderr.count("\n") == 1
    unknown = runner.invoke(app, ["train", str(file), "--smoke", "--set", "model.llm=nobody/nothing"])
    assert unknown.exit_code == 1
    assert "the shape of 'nobody/nothing' is not known here" in unknown.stderr.splitlines()[-1]
    assert runner.invoke(app, ["train", str(file), "--smoke", "--resume"]).exit_code == 2
