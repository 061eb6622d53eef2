"""Plans of published LLMs and of the recipes of the repository."""

import math
from pathlib import Path

import pytest

from pal.hub_configs import config_of
from pal.plan import plan
from pal.train.recipe import Recipe, load_recipe
from tests.counts import full_only
from tests.test_plan import ROOT, recipe

RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))

# What is published: the numbers of parameters on the models' pages, and of Whisper's encoder by hand from its paper.
PARAMETERS = {
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
    "meta-llama/Llama-3.2-3B-Instruct": 3_212_749_824,
    "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen/Qwen2.5-3B-Instruct": 3_085_938_688,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
}


@pytest.mark.parametrize(("path", "count"), PARAMETERS.items())
def test_published_llms(path: str, count: int) -> None:
    one = recipe("lal").model_dump(mode="json")
    one["model"]["llm"] = path
    one["model"]["encoders"] = ["openai/whisper-small"]
    parameters = plan(Recipe(**one), seconds=1).parameters
    fields = config_of(path)
    D, L, E = fields["hidden_size"], fields["num_hidden_layers"], 768
    assert parameters == {
        "encoder": 88_154_112,
        "connector": 2 * E + 2 * (E * E + E),
        "projectors": L * (E * D + D + D * D + D),
        "llm": count,
    }


OTHER_LLMS = {"llama-3.2-3b", "qwen2.5-1.5b"}
"""Folders of recipes that differ from those of another in the LLM alone."""
COMPARED = {"base", "flamingo", "lal-first-third", "lal-plain", "pal", "plits"}
"""Recipes in `real` that differ from `real/lal.yaml` in the integration alone."""
ALIKE = [path for path in RECIPES if path.parent.name in OTHER_LLMS and path.stem != "pal"]
ALIKE += [path for path in RECIPES if path.parent.name == "real" and path.stem in COMPARED]
ALIKE += [path for path in RECIPES if path.stem in ("lal_qformer", "pal_qformer", "tiny-causal")]
ALIKE += [path for path in RECIPES if path.parent.name == "llama-3.2-3b" and path.stem == "pal"]
"""Recipes that only `make torture` plans, since one like them is planned in any case."""


@pytest.mark.torture
@pytest.mark.parametrize(
    "path",
    [
        pytest.param(
            path,
            marks=[full_only] if path in ALIKE else [],
            id=str(path.relative_to(ROOT / "recipes")),
        )
        for path in RECIPES
    ],
)
def test_recipes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    one = load_recipe(path)
    assert one.model is not None
    made = plan(one)
    llm = PARAMETERS.get(one.model.llm.path or "")
    assert llm is None or made.parameters["llm"] == llm
    assert [stage.name for stage in made.stages] == [stage.name for stage in one.stages]
    for stage in made.stages:
        assert 0 < stage.trained_share < 1
        assert stage.forward > 0 and stage.backward > 0 and math.isfinite(stage.seconds)
    assert made.fits
