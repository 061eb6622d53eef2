"""A shipped model of a few thousand weights, made by the real trainer, in place of the one in the package."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

import pal
from pal.files import atomic_folder

NOTICE = "This is a toy for tests: it knows nothing."
LLM = {
    "model_type": "llama",
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 32,
    "tie_word_embeddings": True,
}
ENCODER = {"name": "tiny", "width": 8, "channels": [2, 2, 4, 4], "blocks": 1}
STAGE = {
    "name": "joint",
    "train": {"connector": True, "projectors": True, "llm": "full"},
    "lr": 1e-2,
    "steps": 2,
    "batch": {"clips": 2, "rows_per_clip": 2},
}


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """The manifest of four scenes of 1.5 seconds, three questions each."""
    from pal.data.synth import synthesise

    return synthesise(tmp_path_factory.mktemp("scenes"), 4, 5, seconds=1.5, questions_per_scene=3, workers=1)


@pytest.fixture(scope="session")
def assets(tmp_path_factory, scenes):
    """`tiny`, `tiny-lm` and `demo.yaml`, as the package has them."""
    from pal import train
    from pal.train.recipe import Recipe

    folder = tmp_path_factory.mktemp("assets")
    model = {"llm": {"fresh": LLM, "vocabulary": 280}, "encoders": [ENCODER], "integration": "pal", "notice": NOTICE}
    data = {"scenes": {"manifest": str(scenes)}}
    recipe = Recipe(model=model, data=data, stages=[STAGE])
    trained = train.run(recipe, folder / "run")
    trained.save_pretrained(folder / "tiny")
    demo = {
        "model": {"llm": {"path": "replaced"}, "encoders": ["tiny"], "connector": "mlp"},
        "data": {"scenes": {"synth": {"scenes": 4, "seed": 1, "seconds": 1.5, "questions_per_scene": 3}}},
        "stages": [STAGE],
        "keep": {"log_every": 1},
    }
    (folder / "demo.yaml").write_text(yaml.safe_dump(demo))
    with atomic_folder(folder / "tiny-lm") as temporary:
        trained.llm.save(temporary)
        trained.tokenizer.save_pretrained(temporary)
    return SimpleNamespace(
        folder=folder, bundle=folder / "tiny", llm=folder / "tiny-lm", demo=folder / "demo.yaml", scenes=Path(scenes)
    )


@pytest.fixture
def shipped(assets, monkeypatch):
    """The commands take the small model for the shipped one."""
    monkeypatch.setattr("pal.SHIPPED", assets.bundle)
    monkeypatch.setitem(pal.shipped.FOLDERS, "tiny", assets.bundle)
    monkeypatch.setattr("pal.shipped.default", lambda: "tiny")
    return assets
