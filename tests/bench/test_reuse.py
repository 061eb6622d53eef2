"""The benchmark of several questions on one clip: what is counted, and what its tables say."""

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from pal.app.cli import app
from pal.bench import reuse
from pal.bench.reuse import ReuseMeasurement, ReuseResult, preset_of
from pal.bench.reuse_report import goals, to_dict, to_markdown, write
from pal.errors import ConfigError

SMALL = {"audio_tokens": 120, "question": 16, "answer": 2}
PRESET = preset_of("reuse-small", questions=[1, 4], variants=["text", "plits", "lal", "pal"], **SMALL)


@pytest.fixture(scope="module")
def result():
    return reuse.run(PRESET)


def row(result, variant, shared, phase, questions):
    (found,) = [
        one
        for one in result.rows
        if (one.variant, one.shared, one.phase, one.questions) == (variant, shared, phase, questions)
    ]
    return found


@pytest.mark.parametrize("variant", ["plits", "lal", "pal"])
def test_shared_keys_and_values_are_there_once(result, variant):
    one, four = (row(result, variant, True, "answers", count).kv_bytes for count in (1, 4))
    layers, heads, width, size = 4, 1, 16, 4
    assert four - one == 3 * 2 * layers * PRESET.question * heads * width * size
    assert row(result, variant, False, "answers", 4).kv_bytes > 2 * one


def test_without_sharing_each_question_has_its_own_clip(result):
    """LAL projects four clips, or one."""
    one, four, apart = (
        row(result, "lal", shared, "answers", count).flops for shared, count in ((False, 1), (True, 4), (False, 4))
    )
    text = row(result, "text", False, "answers", 1).flops
    assert apart == pytest.approx(4 * one, rel=0.02) and apart - four > 0.5 * 3 * (one - text)


@pytest.mark.parametrize("variant", ["plits", "pal"])
@pytest.mark.parametrize("phase", ["answers", "train"])
def test_shared_rows_run_once(result, variant, phase):
    """Four questions' own rows, and the clip's once, against four times."""
    one, four, apart = (
        row(result, variant, shared, phase, count).flops for shared, count in ((False, 1), (True, 4), (False, 4))
    )
    text = row(result, "text", False, phase, 4).flops
    assert apart == pytest.approx(4 * one, rel=0.1)
    assert four < 0.7 * apart and four < one + 1.6 * text


def test_a_further_question_runs_its_own_rows_alone(result):
    """16 rows of 32; the clip's keys are only attended to."""
    text, plits = (row(result, variant, True, "again", 1).flops for variant in ("text", "plits"))
    whole = row(result, "plits", False, "answers", 1).flops
    assert text < plits < whole / 4
    assert {one.shared for one in result.rows if one.phase == "again"} == {True}


def test_memory_of_shared_prompts(result):
    for variant in ("plits", "lal", "pal"):
        assert (
            row(result, variant, True, "answers", 4).peak_bytes < row(result, variant, False, "answers", 4).peak_bytes
        )
        assert row(result, variant, True, "train", 4).peak_bytes < row(result, variant, False, "train", 4).peak_bytes


def test_what_is_too_large_is_left_out_and_listed():
    found = reuse.run(preset_of("reuse-small", questions=[4], variants=["plits"], phases=["train"], most_rows=400))
    assert [(one.shared, one.questions) for one in found.rows] == [(True, 4)]
    assert found.left_out[0]["shared"] is False and found.left_out[0]["questions"] == 4
    # 4 times 150 audio rows, 16 text rows before them, 32 of a question and 8 of an answer
    assert "- plits, not shared, train, 4 questions: 824 rows of the sequences, above 400" in to_markdown(found)


def measured(variant, shared, phase, questions, seconds):
    return ReuseMeasurement(variant, shared, phase, questions, seconds, 0.0, 1, 1, 1)


def test_goals_are_ratios_of_seconds():
    rows = [
        measured("text", True, "again", 1, 1.0),
        measured("lal", True, "again", 1, 1.1),
        measured("lal", True, "answers", 64, 1.0),
        measured("lal", False, "answers", 64, 3.9),
        measured("plits", True, "answers", 64, 2.5),
        measured("lal", True, "train", 16, 2.0),
        measured("plits", True, "train", 16, 3.2),
    ]
    result = ReuseResult(preset_of("reuse"), {}, rows)
    assert [(round(goal.ratio, 2), goal.bound, goal.ok) for goal in goals(result)] == [
        (1.1, 1.2, True),
        (3.9, 4.0, False),
        (2.5, 2.0, True),
        (1.6, 1.5, True),
    ]
    assert not goals(replace(result, rows=rows[:1]))


def test_the_command(tmp_path, monkeypatch):
    given = ["bench", "--preset", "reuse-small", "--variants", "lal", "--batch", "2", "--phases", "answers,again"]
    made = CliRunner().invoke(app, [*given, "--repeats", "1", "--out", str(tmp_path), "--json", "-"])
    assert made.exit_code == 0
    numbers = json.loads(made.stdout)
    assert [(one["variant"], one["shared"], one["phase"]) for one in numbers["rows"]] == [
        ("lal", True, "answers"),
        ("lal", False, "answers"),
        ("lal", True, "again"),
    ]
    assert all(one["seconds"] > 0 for one in numbers["rows"]) and numbers["sizes"]["audio_tokens"] == 150
    assert json.loads((tmp_path / "reuse.json").read_text()) == numbers
    assert "| 2 | lal | yes |" in (tmp_path / "reuse.md").read_text()
    refused = CliRunner().invoke(app, [*given, "--tokens", "64"])
    assert refused.exit_code == 1 and "--tokens is no option of the preset" in refused.stderr
    with pytest.raises(ConfigError, match="count from 1"):
        preset_of("reuse", questions=[0])


def test_the_tables_name_every_row(result, tmp_path):
    text = to_markdown(result)
    assert text.count("| pal | yes |") == 2 * 3 and text.count("| text | no |") == 2 * 2
    assert len(to_dict(result)["rows"]) == len(result.rows)
    assert [path.name for path in write(result, tmp_path)] == ["reuse.json", "reuse.md"]
