"""Known-bad clips: a list leaves their records out, and an error at another one says how to go on."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from pal.data.check import check
from pal.data.clean import write_bad
from pal.data.manifest import Manifest
from pal.data.synth import synthesise
from pal.errors import ConfigError
from pal.train import run
from pal.train.recipe import Recipe
from pal.train.skips import digests, rows_to_skip
from pal.train.sources import StageData, open_sources
from tests.train.tiny import MODEL

STAGE = {"train": {"projectors": True}, "lr": 1e-2, "steps": 2, "batch": {"rows": 4}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six records about four clips, of which `1.wav` is none."""
    for number in range(4):
        soundfile.write(tmp_path / f"{number}.wav", np.full(4000, 0.01 * number), 16_000)
    (tmp_path / "1.wav").write_text("no sound")
    clips: list[Any] = ["0.wav", "1.wav", "2.wav", ["3.wav", "1.wav"], "1.wav", "3.wav"]
    records = [{"audio_id": clip, "instruction": f"q{i}", "output": "a", "task": "t"} for i, clip in enumerate(clips)]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    write_bad(check(tmp_path / "m.jsonl"), tmp_path / "bad.txt")
    return tmp_path


def recipe(folder: Path, stage: dict[str, Any] | None = None, **source: Any) -> Recipe:
    data = {"mine": {"manifest": str(folder / "m.jsonl"), **source}}
    return Recipe(model=MODEL, data=data, stages=[STAGE | (stage or {})], keep={"log_every": 1})


def drawn(made: Recipe, folder: Path) -> list[str]:
    data = StageData(made, 0, open_sources(made, folder / "data"))
    return sorted(record.turns[0].question for record in data.records())


@pytest.mark.parametrize(
    "batch", [{"rows": 2}, {"clips": 2, "rows_per_clip": 2}, {"rows": 2, "bucket": 2}, {"seconds": 1.0}]
)
def test_records_about_listed_clips_are_left_out(folder: Path, batch: dict[str, Any], caplog: Any) -> None:
    made = recipe(folder, {"batch": batch}, skip_clips=str(folder / "bad.txt"))
    with caplog.at_level(logging.INFO, "pal"):
        assert drawn(made, folder) == ["q0", "q2", "q5"]
    assert caplog.messages == [
        f"data 'mine': 3 of 6 records are skipped, since their clips are listed in {folder / 'bad.txt'}",
    ]


def test_relative_paths_are_those_of_the_manifest(folder: Path, tmp_path: Path) -> None:
    (folder / "bad.txt").write_text("1.wav\n./0.wav\n")
    assert drawn(recipe(folder, skip_clips=str(folder / "bad.txt")), folder) == ["q2", "q5"]
    moved = Manifest(folder / "m.jsonl", root=folder)
    (folder / "bad.txt").write_text("/elsewhere/corpus/1.wav\n")
    source = recipe(folder, skip_clips=str(folder / "bad.txt")).data["mine"]
    assert rows_to_skip("mine", source, moved) == {1, 3, 4}


def test_a_run_is_trained_without_them(folder: Path) -> None:
    run(recipe(folder, {"steps": 2}, skip_clips=str(folder / "bad.txt")), folder / "goes")
    assert (folder / "goes" / "train.json").exists()
    assert not (folder / "goes" / "quarantine.jsonl").exists()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "0.wav\n# these are bad\n",
            r"line 2: the list cannot have comments, .*# these are bad'; remove the line",
        ),
        ("0.wav\n\n2 wav\n", r"skip_clips: .*bad\.txt, line 3: no record has the clip '.*2 wav'; write a new list"),
        ('"0.wav\n', r"data 'mine', skip_clips: .*bad\.txt, line 1: .* JSON string"),
        ("0.wav\n1.wav\n2.wav\n3.wav\n", "'tasks', 'datasets' and 'skip_clips' leave no record"),
    ],
)
def test_lists_that_do_not_fit(folder: Path, text: str, says: str) -> None:
    (folder / "bad.txt").write_text(text)
    with pytest.raises(ConfigError, match=says):
        drawn(recipe(folder, skip_clips=str(folder / "bad.txt")), folder)


def test_a_list_that_is_missing_is_an_error_even_of_an_optional_source(folder: Path) -> None:
    made = recipe(folder, skip_clips=str(folder / "none.txt"), optional=True)
    with pytest.raises(ConfigError, match=r"data 'mine': no list '.*none\.txt'; correct 'skip_clips'"):
        open_sources(made, folder / "data")


def test_the_list_is_part_of_what_a_run_is_made_of(folder: Path) -> None:
    plain, listed = recipe(folder), recipe(folder, skip_clips=str(folder / "bad.txt"))
    assert plain.digest != listed.digest
    assert "skip_clips" not in plain.settings()["data"]["mine"]
    assert Recipe(**listed.settings()) == listed.model_copy(update={"keep": Recipe(**listed.settings()).keep})
    manifests = open_sources(plain, folder / "data")
    assert digests(plain, manifests) == {"mine": manifests["mine"].digest}
    before = digests(listed, manifests)
    (folder / "bad.txt").write_text("0.wav\n")
    assert digests(listed, manifests) != before != digests(plain, manifests)


def test_a_run_cannot_go_on_with_another_list(folder: Path) -> None:
    made = recipe(folder, skip_clips=str(folder / "bad.txt"))
    run(made, folder / "run")
    (folder / "run" / "train.json").unlink()
    (folder / "bad.txt").write_text("0.wav\n1.wav\n")
    with pytest.raises(ConfigError, match="data 'mine' changed since the run was started"):
        run(made, folder / "run", resume=True)


def test_a_source_that_is_made_may_have_a_list(tmp_path: Path) -> None:
    clip = Manifest(synthesise(tmp_path / "s", 2, 0, seconds=1.5, questions_per_scene=2, workers=1))[0].clips[0]
    (tmp_path / "bad.txt").write_text(f"audio/{Path(clip).name}\n")
    data = {
        "made": {"synth": {"scenes": 2, "seconds": 1.5, "questions_per_scene": 2}, "skip_clips": tmp_path / "bad.txt"}
    }
    made = Recipe(model=MODEL, data=data, stages=[STAGE])
    assert len(list(StageData(made, 0, open_sources(made, tmp_path / "data")).records())) == 2
