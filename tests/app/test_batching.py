"""`pal batch`: what it prints, and its exit status."""

import json

import pytest

import pal
from tests.app.test_bad_input import fail, wav
from tests.app.test_cli import run

QUESTION = "Is there a dog?"


@pytest.fixture
def folder(tmp_path):
    clips = tmp_path / "clips"
    clips.mkdir()
    (clips / "a.wav").write_bytes(wav())
    (clips / "b.wav").write_bytes(wav(rate=22_050))
    return clips


def test_a_folder_is_asked_as_by_pal_ask(shipped, folder, tmp_path):
    questions = tmp_path / "questions.txt"
    questions.write_text(f"{QUESTION}\n\nWhat is it?\n")
    out = tmp_path / "answers.jsonl"
    arguments = ("batch", folder, "--ask", "What sound?", "--questions", questions, "--out", out, "--max-new-tokens", 4)
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert (facts["clips"], facts["answers"], facts["failed"]) == (2, 6, {})
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["question"] for row in rows] == ["What sound?", QUESTION, "What is it?"] * 2
    model = pal.load(str(shipped.bundle))
    for clip, some in (("a.wav", rows[:3]), ("b.wav", rows[3:])):
        asked = [row["question"] for row in some]
        assert [row["answer"] for row in some] == model.ask(str(folder / clip), asked, max_new_tokens=4)
    fail(*arguments, says=["is there already", "--overwrite"])


def test_a_bad_clip_is_listed_and_the_status_is_1(shipped, folder, tmp_path):
    (folder / "c.wav").write_bytes(b"no audio")
    out = tmp_path / "answers.jsonl"
    result = run("batch", folder, "--ask", QUESTION, "--out", out, "--max-new-tokens", 2)
    assert result.exit_code == 1
    assert "2 answers about 2 clips" in result.stdout and "failed: c.wav: " in result.stderr
    assert "answers.jsonl.failed.jsonl" in result.stderr
    assert json.loads((tmp_path / "answers.jsonl.failed.jsonl").read_text())["clip"] == "c.wav"


def test_a_model_that_cannot_be_loaded_is_one_line(folder, tmp_path):
    out = tmp_path / "answers.jsonl"
    fail("batch", folder, "--ask", QUESTION, "--out", out, "--model", tmp_path / "none", says=["not a bundle"])
    assert not out.exists()


def test_wrong_use_is_refused(folder, tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    out = tmp_path / "answers.jsonl"
    assert run("batch", folder, "--questions", tmp_path / "empty.txt", "--out", out).exit_code == 2
    fail("batch", folder, "--out", out, says=["give questions", "--ask"])
    fail("batch", folder, "--ask", QUESTION, "--out", tmp_path / "answers.txt", says=[".jsonl or .parquet"])
