"""Shapes of models that are not loaded: known ones by name, those of folders and bundles from their files."""

import json
from pathlib import Path

import pytest

import pal
from pal.errors import ConfigError, PalError
from pal.hub_configs import CONFIGS, config_of
from pal.plan import plan
from pal.train.recipe import Recipe
from tests.test_plan import LLM

PUBLISHED = {
    "meta-llama/Llama-3.1-8B": 8.03e9,
    "meta-llama/Llama-3.1-70B": 70.55e9,
    "Qwen/Qwen2.5-14B": 14.77e9,
    "meta-llama/Llama-3.2-1B": 1.2358e9,
}
"""Parameters of LLMs by the headers of their published weights."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_the_published_ones(name: str) -> None:
    model = {"llm": name, "encoders": ["tiny"], "integration": "plits"}
    stage = {"train": {"projectors": True}, "lr": 1, "steps": 1, "batch": {"rows": 1}}
    made = plan(Recipe(model=model, data={"x": {"manifest": "x"}}, stages=[stage]), seconds=1)
    assert made.parameters["llm"] == pytest.approx(PUBLISHED[name], rel=1e-3)


def test_a_folder_and_a_bundle_say_their_shape(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLM | {"num_hidden_layers": 2}))
    assert config_of(str(tmp_path))["num_hidden_layers"] == 2
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        config_of(str(tmp_path))
    assert config_of("openai/whisper-small")["encoder_layers"] == 12
    assert all(config_of(name) for name in CONFIGS)
    stage = {"train": {"projectors": True}, "lr": 1, "steps": 1, "batch": {"rows": 1}}
    on = Recipe(bundle=pal.SHIPPED, data={"x": {"manifest": "x"}}, stages=[stage])
    parts = {part: sum(p.numel() for p in module.parameters()) for part, module in pal.load("tiny").parts().items()}
    assert plan(on, seconds=1).parameters == parts
    with pytest.raises(PalError, match="no such folder"):
        plan(on.model_copy(update={"bundle": tmp_path / "none"}))
