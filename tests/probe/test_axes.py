"""Each axis' values against the recipe they must become; what does not fit is refused before anything is done."""

from pathlib import Path

import pytest
import yaml

from pal.errors import ConfigError
from pal.plan.skeleton import skeleton
from pal.probe.axes import AXES, grid
from pal.train.recipe import load_recipe

LLM = {
    "model_type": "llama",
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 32,
    "vocab_size": 280,
}
RECIPE = {
    "model": {
        "llm": {"fresh": LLM},
        "encoders": [{"name": "tiny", "width": 8, "channels": [2, 2, 4, 4], "blocks": 1}],
        "integration": {"name": "lal", "layers": "first_third", "projector": "low_rank", "rank": 4},
    },
    "data": {"scenes": {"synth": {"scenes": 4, "seconds": 1.5}}},
    "stages": [
        {"name": "align", "train": {"projectors": True}, "lr": 1e-2, "steps": 1, "batch": {"clips": 2}},
        {"name": "joint", "train": {"projectors": True, "llm": "full"}, "lr": 1e-2, "steps": 1, "batch": {"clips": 2}},
    ],
}
COMPARE = Path(__file__).parents[2] / "recipes" / "compare.yaml"


@pytest.fixture
def path(tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    return tmp_path / "recipe.yaml"


LOW_RANK = {"projector": "low_rank", "rank": 4}


@pytest.mark.parametrize(
    ("axis", "settings", "expected"),
    [
        ("integration=plits, lal", [], {"integration-plits": {"name": "plits"}, "integration-lal": {"name": "lal"}}),
        (
            "integration=[{name: flamingo, every: 1}, {name: lal, layers: all, rank: 64}, {name: lal, rank: 64}]",
            [],
            {
                "integration-flamingo": {"name": "flamingo", "every": 1},
                "integration-lal-layers-all": {"name": "lal", "layers": "all", "rank": 64},
                "integration-lal": {"name": "lal", "rank": 64},
            },
        ),
        (
            "depth",
            [],
            {
                "depth-1of4": {"name": "lal", **LOW_RANK, "layers": {"first": 0.25}},
                "depth-1of3": {"name": "lal", **LOW_RANK, "layers": {"first": 1 / 3}},
                "depth-1of2": {"name": "lal", **LOW_RANK, "layers": {"first": 0.5}},
                "depth-all": {"name": "lal", **LOW_RANK, "layers": "all"},
            },
        ),
        ("stride=2,4", ["model.integration=pal"], {f"stride-{r}": {"name": "pal", "stride": r} for r in (2, 4)}),
        (
            "width",
            ["model.integration=plits"],
            {
                f"width-{name}": {"name": "plits", "projector": "mlp", "hidden": hidden}
                for name, hidden in {"1of4": 4, "1of2": 8, "1of1": 16, "2of1": 32}.items()
            },
        ),
        (
            "width=6, linear, {rank: 2}, {projector: mlp, depth: 3}",
            [],
            {
                "width-6": {"name": "lal", "layers": "first_third", "projector": "mlp", "hidden": 6},
                "width-linear": {"name": "lal", "layers": "first_third", "projector": "linear"},
                "width-rank-2": {"name": "lal", "layers": "first_third", "projector": "low_rank", "rank": 2},
                "width-projector-mlp-depth-3": {
                    "name": "lal",
                    "layers": "first_third",
                    "projector": "mlp",
                    "depth": 3,
                },
            },
        ),
        (
            "queries",
            [],
            {
                "queries-without": RECIPE["model"]["integration"],
                "queries-with": {**RECIPE["model"]["integration"], "name": "lal_audio_query"},
            },
        ),
    ],
)
def test_axes_of_the_integration(path, axis, settings, expected):
    cells = grid(path, [axis], settings)
    assert {cell.name: cell.recipe(1).model.integration for cell in cells} == expected
    for cell in cells:
        cell.check()


def test_depth_as_the_option_layers(path):
    cells = grid(path, ["depth={range: [1, 3]}, {last: 0.5}, [0, 2], first_third"])
    layers = [skeleton(cell.recipe(1)).integration.layers for cell in cells]
    assert layers == [(1, 2), (1, 2), (0, 2), (0,)]
    assert [cell.label for cell in cells] == ["depth range-1-3", "depth last-0.5", "depth 0-2", "depth first_third"]


def test_connector(path):
    cells = grid(path, ["connector=[mlp, {name: strided_conv, stride: 2}]"])
    found = {cell.name: cell.recipe(1).model.connector for cell in cells}
    assert found == {"connector-mlp": {"name": "mlp"}, "connector-strided_conv": {"name": "strided_conv", "stride": 2}}


def test_frozen_ffn_in_every_stage_that_trains_the_llm(path):
    trained, frozen = grid(path, ["ffn"])
    assert [stage.train.llm for stage in trained.recipe(1).stages] == ["none", "full"]
    assert [stage.train.llm for stage in frozen.recipe(1).stages] == ["none", "no_ffn"]
    assert (trained.name, frozen.name) == ("ffn-trained", "ffn-frozen")
    assert trained.recipe(2).digest == load_recipe(path, ["seed=2"]).digest


def test_a_product_finds_the_cells_of_a_smaller_grid(path):
    cells = grid(path, ["ffn", "integration=lal,plits"], ["stages.1.steps=7"])
    assert [cell.name for cell in cells] == [
        "integration-lal",
        "integration-plits",
        "integration-lal_ffn-frozen",
        "integration-plits_ffn-frozen",
    ]
    assert [cell.label for cell in cells][:2] == ["ffn trained with lal", "ffn trained with plits"]
    alone = grid(path, ["integration=plits"], ["stages.1.steps=7"])[0]
    assert alone.name == cells[1].name
    assert alone.recipe(3).digest == cells[1].recipe(3).digest
    assert cells[3].recipe(3).stages[1].train.llm == "no_ffn"
    assert {cell.recipe(1).stages[1].steps for cell in cells} == {7}


def test_the_grid_of_compare_yaml():
    """The runs behind the table of docs/experiments.md, as the overrides they were made with say them."""
    variants = [
        '{"name": "plits"}',
        '{"name": "lal", "layers": "all"}',
        '{"name": "lal", "layers": "first_third"}',
        '{"name": "pal"}',
    ]
    cells = grid(COMPARE, ["integration=[plits, {name: lal, layers: all}, {name: lal, layers: first_third}, pal]"])
    audio = Path("../shared/audio")
    for cell, variant in zip(cells, variants, strict=True):
        overrides = [
            "seed=2",
            f"model.integration={variant}",
            f"data.esc10.prepare.root={audio / 'esc10'}",
            f"data.fsdd.prepare.root={audio / 'fsdd'}",
        ]
        assert cell.recipe(2).digest == load_recipe(COMPARE, overrides).digest


@pytest.mark.parametrize(
    ("axes", "settings", "says"),
    [
        ([], [], "nothing to vary; give --axis NAME; known: integration, queries"),
        (["colour"], [], "unknown axis 'colour'; known: integration, queries, connector, depth, stride, width, ffn"),
        (["ffn=half"], [], "axis 'ffn': unknown value 'half'; known: trained, frozen"),
        (["queries=maybe"], [], "axis 'queries': unknown value 'maybe'; known: without, with"),
        (["integration=nope"], [], "unknown integration 'nope'; known: flamingo, lal"),
        (["connector=5"], [], "unknown connector '5'; known: conv_transformer"),
        (["depth=deep"], [], "axis 'depth': unknown value 'deep'; it takes shares"),
        (["depth=3"], [], "axis 'depth': unknown value '3'"),
        (["width=wide"], [], "axis 'width': unknown value 'wide'"),
        (["stride"], [], "integration 'lal' has no option 'stride'; integrations with it: pal"),
        (
            ["depth"],
            ["model.integration=plits"],
            "integration 'plits' has no option 'layers'; integrations with it: lal",
        ),
        (["width"], ["model.integration=flamingo"], "integration 'flamingo' has no option 'projector'"),
        (["ffn"], ["stages.1.train.llm=none"], "no stage of the recipe trains the LLM in full"),
        (["ffn", "ffn=frozen"], [], "axis 'ffn' is given twice"),
        (["ffn=frozen,frozen"], [], "'frozen' is given twice"),
        (["integration", "queries"], [], "give one of them"),
        (["integration=[lal"], [], "is not a YAML list"),
        (["integration="], [], "has an empty value"),
        (["ffn"], ["seed=3"], "--seeds"),
        # found when the cell is built
        (["stride=0"], ["model.integration=pal"], "stride 0: integration 'pal': stride"),
        (["integration=flamingo"], [], "flamingo: integration 'flamingo': every 4 exceeds the LLM's 3 layers"),
        (["integration={name: lal, depht: 3}"], [], "unknown key 'depht'"),
        (["connector=lfst"], [], "takes 2 encoders, not 1"),
    ],
)
def test_what_does_not_fit(path, axes, settings, says):
    with pytest.raises(ConfigError) as caught:
        for cell in grid(path, axes, settings):
            cell.check()
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_parts_of_a_bundle_cannot_be_varied(path, tmp_path):
    recipe = {**RECIPE, "bundle": "somewhere"}
    del recipe["model"]
    (tmp_path / "on.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(ConfigError, match="trains a bundle further"):
        grid(tmp_path / "on.yaml", ["integration"])
    assert len(grid(tmp_path / "on.yaml", ["ffn"])) == 2


def test_every_axis_says_what_it_takes():
    assert all(axis.values and axis.accepts for axis in AXES.values())
