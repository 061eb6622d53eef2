"""The benchmark of a growing conversation: what each turn reads, what is stored, and what its table says."""

import json

import pytest
from typer.testing import CliRunner

from pal.app.cli import app
from pal.backbone.session import Session
from pal.bench import stream
from pal.bench.stream import StreamMeasurement, StreamResult, preset_of

PRESET = preset_of("stream-small", turns=4, answer=3)


@pytest.mark.parametrize("window", [None, 2])
def test_turns_read_what_is_new_and_stored_is_what_was_read(window, monkeypatch):
    rows = []
    ours = Session.run

    def watched(self, x_1QD, *more):
        rows.append(x_1QD.shape[1])
        return ours(self, x_1QD, *more)

    monkeypatch.setattr(Session, "run", watched)
    result = stream.run(PRESET.model_copy(update={"window": window}))
    assert [row.variant for row in result.rows] == ["lal", "lal_third", "pal", "plits"]
    text = PRESET.question + PRESET.turns * (PRESET.question + PRESET.answer - 1)
    audio = {"lal": 0, "lal_third": 0, "pal": PRESET.turns * 4, "plits": PRESET.turns * 12}
    assert sum(rows) == 4 * text + sum(audio.values())
    kept = PRESET.turns if window is None else window
    keys = {"lal": 4 * 12, "lal_third": 12, "pal": 4 * 4 + 12, "plits": 4 * 12}  # by layer: 12 tokens, or 4 summaries
    for row in result.rows:
        assert row.planned_bytes == row.kv_bytes == 2 * 16 * 4 * (4 * text + kept * keys[row.variant])
        assert min(*row.append, *row.first, *row.token) > 0


def test_growth_is_the_last_turns_over_the_first():
    rows = [StreamMeasurement("lal", 512, (0.1, 0.1), (0.2, 0.21), (0.05, 0.06), 1_000_000, 2_000_000)]
    result = StreamResult(
        PRESET, {"device": "a CPU", "threads": 2, "torch": "", "transformers": "", "pal": "", "date": ""}, rows
    )
    assert stream.to_dict(result)["rows"][0]["growth"] == pytest.approx({"append": 1.0, "first": 1.05, "token": 1.2})
    assert "| lal | 100 | 100 | 200 | 210 | 50 | 60 | 1.05 | 1.20 | missed | 1 | 2 |" in stream.to_markdown(result)


def test_the_command(tmp_path):
    given = ["bench", "--preset", "stream-small", "--variants", "lal"]
    made = CliRunner().invoke(app, [*given, "--out", str(tmp_path), "--json", "-"])
    assert made.exit_code == 0, made.output
    assert [row["variant"] for row in json.loads(made.stdout)["rows"]] == ["lal"]
    assert json.loads((tmp_path / "stream.json").read_text()) == json.loads(made.stdout)
    assert "| lal |" in (tmp_path / "stream.md").read_text()
    refused = CliRunner().invoke(app, [*given, "--batch", "4"])
    assert refused.exit_code == 1 and "--batch is no option of the preset" in refused.stderr
