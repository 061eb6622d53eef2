"""The public API as a type checker sees it: `make lint` checks this file, nothing runs it.

A call that must be refused carries `type: ignore`; mypy reports those that are not needed.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import assert_type

import numpy as np

import pal
from pal.backbone.audio_kv import AudioKV
from pal.hf import PalForConditionalGeneration
from pal.model import PalModel
from pal.train import run
from pal.train.recipe import load_recipe


def use(samples_N: np.ndarray, paths: list[str]) -> None:
    """What README and docs show."""
    model = pal.load()
    assert_type(model, PalModel)
    assert_type(model.ask("a.wav", "what?"), str)
    assert_type(model.ask(Path("a.wav"), "what?", max_new_tokens=5, do_sample=True), str)
    assert_type(model.ask((samples_N, 16_000), "what?"), str)
    assert_type(model.ask({"array": samples_N, "sampling_rate": 16_000}, "what?"), str)
    assert_type(model.ask("a.wav", ["a", "b"]), list[str])
    assert_type(model.ask(paths, ["a"]), list[str])
    assert_type(model.ask(paths, "what?"), str | list[str])
    assert_type(model.ask(paths, [{"role": "user", "content": "<audio>?"}]), str)
    assert_type(model.ask("a.wav", "what?", stream=True), Iterator[str])
    clip = model.index("a.wav")
    assert_type(clip, AudioKV)
    assert_type(model.ask(clip, "what?"), str)
    assert_type(model.ask([clip, "a.wav"], ["a", "b"]), list[str])
    assert_type(model.ask_detailed("a.wav", "what?")[0].text, str)
    assert_type(pal.attach(llm="a/b", encoders=["tiny"], connector={"name": "qformer", "queries": 5}), PalModel)
    assert_type(model.train(), PalModel)
    assert_type(run(load_recipe(Path("recipe.yaml")), "runs/x"), PalModel)
    assert_type(PalForConditionalGeneration.from_pretrained(pal.SHIPPED), PalForConditionalGeneration)

    model.ask(5, "what?")  # type: ignore[call-overload]
    model.ask("a.wav", 5)  # type: ignore[call-overload]
    model.index(5)  # type: ignore[arg-type]
    pal.load(5)  # type: ignore[arg-type]
    pal.attach(llm=5, encoders=["tiny"])  # type: ignore[arg-type]
    run("recipe.yaml", "runs/x")  # type: ignore[arg-type]
