"""Answers equal `model.ask`; a stopped run goes on to the same file and asks nothing twice."""

import json
import os
import shutil
from pathlib import Path

import pyarrow.parquet
import pytest
import soundfile

from pal.batch import read_input, run, worker
from pal.batch.parts import AnswerParts, PartWriter
from pal.errors import ConfigError
from tests.batch.conftest import QUESTIONS
from tests.models import noise, tiny_model

SHORT = 6
"""Tokens of an answer."""


def rows_of(out):
    return [json.loads(line) for line in out.read_text().splitlines()]


def ask(clips, out, model, questions=QUESTIONS, **options):
    return run(read_input(clips, questions), out, model, **{"max_new_tokens": SHORT, **options})


def stopping_after(tasks):
    """A progress bar that is interrupted after some tasks."""

    def progress(reports, done, total):
        for number, report in enumerate(reports, 1):
            yield report
            if number == tasks:
                raise KeyboardInterrupt

    return progress


def test_answers_equal_those_of_the_model_and_a_bad_clip_is_listed(clips, model, asked, tmp_path):
    out = tmp_path / "answers.jsonl"
    report = ask(clips, out, model)
    assert asked.encoded == 4  # once each, for two questions
    expected = []
    for name in ("a.wav", "b.wav", "bad.wav", "sub/c.flac", "sub/d.wav"):
        bad = name == "bad.wav"
        answers = [None, None] if bad else model.ask(str(clips / name), QUESTIONS, max_new_tokens=SHORT)
        seconds = None if bad else soundfile.info(clips / name).duration
        for question, answer in zip(QUESTIONS, answers, strict=True):
            expected.append({"clip": name, "question": question, "answer": answer, "audio_seconds": seconds})
    found = rows_of(out)
    errors = [row.pop("error") for row in found]
    assert found == expected
    assert len({row["answer"] for row in found}) > 3  # what is heard and asked changes what is said
    assert [i for i, error in enumerate(errors) if error] == [4, 5] and "bad.wav" in errors[4]
    assert rows_of(tmp_path / "answers.jsonl.failed.jsonl") == [{"clip": "bad.wav", "error": errors[4]}]
    assert report.failed == {"bad.wav": errors[4]} and report.failed_list == tmp_path / "answers.jsonl.failed.jsonl"
    assert (report.clips, report.asked, report.resumed, report.answers) == (5, 5, 0, 8)
    assert report.audio_seconds == pytest.approx(1.9)


def test_parquet_has_the_same_rows(clips, model, tmp_path):
    ask(clips, tmp_path / "a.jsonl", model)
    ask(clips, tmp_path / "a.parquet", model)
    table = pyarrow.parquet.read_table(tmp_path / "a.parquet")
    assert table.to_pylist() == rows_of(tmp_path / "a.jsonl")
    assert str(table.schema.field("audio_seconds").type) == "double"


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_a_stopped_run_goes_on_and_asks_nothing_twice(clips, model, asked, tmp_path, stop):
    whole, out = tmp_path / "whole.jsonl", tmp_path / "stopped.jsonl"
    ask(clips, whole, model)
    asked.questions.clear()
    with pytest.raises(KeyboardInterrupt):
        ask(clips, out, model, progress=stopping_after(stop))
    assert not out.exists()
    report = ask(clips, out, model)
    assert out.read_bytes() == whole.read_bytes()
    assert report.resumed == (stop if stop < 3 else stop - 1)  # the bad clip, the third, is tried again
    times = [number for (clip, _), number in asked.questions.items() if not clip.endswith("bad.wav")]
    assert times == [1] * 8


def test_a_damaged_line_is_said(clips, model, tmp_path):
    out = tmp_path / "answers.jsonl"
    with pytest.raises(KeyboardInterrupt):
        ask(clips, out, model, progress=stopping_after(2))
    (part,) = AnswerParts(out).folder.glob("part.*")
    part.write_text(part.read_text().replace('"audio_seconds": 0.5', '"audio_seconds": 9.5'))
    report = ask(clips, out, model)
    assert report.resumed == 1 and any("1 damaged line" in note for note in report.notes)
    assert rows_of(out)[0]["audio_seconds"] == 0.5


def test_a_mended_clip_is_asked_alone(clips, model, asked, tmp_path):
    out = tmp_path / "answers.jsonl"
    ask(clips, out, model)
    asked.questions.clear()
    soundfile.write(clips / "bad.wav", noise(0.5, 4).numpy(), 16_000)
    report = ask(clips, out, model)
    assert {clip for clip, _ in asked.questions} == {str(clips / "bad.wav")}
    assert report.resumed == 4 and not report.failed
    assert [row["error"] for row in rows_of(out)] == [None] * 10
    assert not (tmp_path / "answers.jsonl.failed.jsonl").exists() and not AnswerParts(out).folder.exists()


def test_no_file_of_another_is_written_over_or_removed(clips, model, tmp_path):
    manifest = tmp_path / "in.jsonl"
    line = json.dumps({"audio_id": "clips/a.wav", "instruction": "What?", "output": "a"}) + "\n"
    manifest.write_text(line)
    shutil.copy(clips / "a.wav", tmp_path / "a.wav")
    manifest.write_text(line.replace("clips/", ""))
    for out, overwrite in (("in.jsonl", True), ("in.jsonl", False)):
        with pytest.raises(ConfigError, match="is the input"):
            ask_manifest(manifest, tmp_path / out, model, overwrite)
    own = tmp_path / "out.jsonl.failed.jsonl"
    shutil.copy(manifest, own)
    with pytest.raises(ConfigError, match=r"failed\.jsonl: is the input"):
        ask_manifest(own, tmp_path / "out.jsonl", model, True)
    with pytest.raises(ConfigError, match="and is no list of bad clips"):
        ask_manifest(manifest, tmp_path / "out.jsonl", model, True)
    assert own.read_bytes() == manifest.read_bytes()
    own.write_text("notes\n")
    with pytest.raises(ConfigError, match="is no list of bad clips"):
        ask_manifest(manifest, tmp_path / "out.jsonl", model, True)
    own.unlink()
    (tmp_path / "out.jsonl.parts").mkdir()
    (tmp_path / "out.jsonl.parts" / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not of pal batch"):
        ask_manifest(manifest, tmp_path / "out.jsonl", model, True)
    assert (tmp_path / "out.jsonl.parts" / "mine.txt").read_text() == "mine"


def ask_manifest(manifest, out, model, overwrite):
    return run(read_input(manifest), out, model, max_new_tokens=3, overwrite=overwrite)


def test_a_clip_that_changed_is_asked_again(clips, model, tmp_path):
    out = tmp_path / "answers.jsonl"
    ask(clips, out, model)  # its parts stay, since a clip is bad
    before = rows_of(out)
    soundfile.write(clips / "a.wav", noise(0.9, 8).numpy(), 16_000)
    assert ask(clips, out, model).resumed == 3
    after = rows_of(out)
    assert after[2:] == before[2:] and after[0]["audio_seconds"] == 0.9


def test_clips_that_are_new_join_those_that_were_answered(clips, model, tmp_path):
    out = tmp_path / "answers.jsonl"
    ask(clips, out, model)
    soundfile.write(clips / "aa.wav", noise(0.6, 9).numpy(), 16_000)
    (clips / "b.wav").unlink()
    assert ask(clips, out, model).resumed == 3
    assert [row["clip"] for row in rows_of(out)][::2] == ["a.wav", "aa.wav", "bad.wav", "sub/c.flac", "sub/d.wav"]


def test_many_questions_share_one_encoding(clips, model, asked, tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "TOGETHER", 2)
    (clips / "bad.wav").unlink()
    questions = [f"{question} {i}" for i in range(3) for question in QUESTIONS[:1]]
    ask(clips, tmp_path / "answers.jsonl", model, questions)
    assert asked.encoded == 4
    answers = [row["answer"] for row in rows_of(tmp_path / "answers.jsonl")]
    assert answers == [
        model.ask(str(clips / name), question, max_new_tokens=SHORT)
        for name in ("a.wav", "b.wav", "sub/c.flac", "sub/d.wav")
        for question in questions
    ]


def test_the_manifest_s_own_questions_are_asked_with_what_is_expected(clips, model, asked, tmp_path):
    turns = [{"question": QUESTIONS[0], "answer": "a dog"}, {"question": QUESTIONS[1], "answer": "the bell"}]
    records = [
        {"id": "one", "audio_id": "clips/a.wav", "instruction": QUESTIONS[0], "output": "noise"},
        {"id": "two", "audio_id": "clips/b.wav", "turns": turns},
        {"id": "three", "audio_id": "clips/a.wav", "instruction": QUESTIONS[1], "output": "neither"},
    ]
    manifest = tmp_path / "asked.jsonl"
    manifest.write_text("".join(json.dumps(record) + "\n" for record in records))
    out = tmp_path / "answers.jsonl"
    report = run(read_input(manifest), out, model, max_new_tokens=SHORT)
    assert not report.failed and not AnswerParts(out).folder.exists()
    found = rows_of(out)
    assert [(row["id"], row["clip"], row["question"], row["expected"]) for row in found] == [
        ("one", "clips/a.wav", QUESTIONS[0], "noise"),
        ("three", "clips/a.wav", QUESTIONS[1], "neither"),
        ("two", "clips/b.wav", QUESTIONS[0], "a dog"),
        ("two", "clips/b.wav", QUESTIONS[1], "the bell"),
    ]
    assert asked.encoded == 2
    a, b = str(clips / "a.wav"), str(clips / "b.wav")
    after = model.config.style.after_clip
    chat = [
        {"role": "user", "content": f"<audio>{after}{QUESTIONS[0]}"},
        {"role": "assistant", "content": "a dog"},
        {"role": "user", "content": QUESTIONS[1]},
    ]
    assert [row["answer"] for row in found] == [
        *model.ask(a, QUESTIONS, max_new_tokens=SHORT),
        model.ask(b, QUESTIONS[0], max_new_tokens=SHORT),
        model.ask([b], chat, max_new_tokens=SHORT),
    ]


def test_records_of_several_clips_and_of_none(clips, model, tmp_path):
    two = f"<audio> or <audio>? {QUESTIONS[0]}"
    records = [
        {"audio_id": ["clips/a.wav", "clips/b.wav"], "instruction": two, "output": "b"},
        {"audio_id": [], "instruction": QUESTIONS[0], "output": "none"},
    ]
    manifest = tmp_path / "asked.jsonl"
    manifest.write_text("".join(json.dumps(record) + "\n" for record in records))
    for out in (tmp_path / "answers.jsonl", tmp_path / "answers.parquet"):
        run(read_input(manifest), out, model, max_new_tokens=SHORT)
    found = rows_of(tmp_path / "answers.jsonl")
    assert [row["clips"] for row in found] == [["clips/a.wav", "clips/b.wav"], []]
    both = [str(clips / "a.wav"), str(clips / "b.wav")]
    assert found[0]["answer"] == model.ask(both, two, max_new_tokens=SHORT)
    assert found[1]["answer"] == model.ask([], QUESTIONS[0], max_new_tokens=SHORT)
    assert pyarrow.parquet.read_table(tmp_path / "answers.parquet").to_pylist() == found


def test_runs_that_do_not_fit_are_refused(clips, model, tmp_path):
    out = tmp_path / "answers.jsonl"
    with pytest.raises(KeyboardInterrupt):
        ask(clips, out, model, progress=stopping_after(2))
    for options, what in (
        ({"questions": QUESTIONS[:1]}, "another 'questions'"),
        ({"max_new_tokens": SHORT + 1}, "another 'max_new_tokens'"),
        ({"read_to_end": True}, "another 'read_to_end'"),
        ({"model": tiny_model(seed=1)}, "another model"),
    ):
        with pytest.raises(ValueError, match=what):
            ask(clips, out, **{"model": model, **options})
    assert ask(clips, out, model).resumed == 2  # the refusals changed nothing
    (clips / "bad.wav").unlink()
    ask(clips, out, model)
    with pytest.raises(ConfigError, match="is there already"):
        ask(clips, out, model)
    before = out.read_bytes()
    assert ask(clips, out, model, overwrite=True).asked == 4
    assert out.read_bytes() == before
    with pytest.raises(ConfigError, match=r"\.jsonl or \.parquet"):
        ask(clips, tmp_path / "answers.csv", model)


def test_what_answered_nothing_binds_nobody_and_leaves_nothing(clips, model, tmp_path):
    out = tmp_path / "answers.jsonl"
    with pytest.raises(ValueError, match="not a bundle"):
        ask(clips, out, str(tmp_path / "none"))
    assert not AnswerParts(out).folder.exists()
    with pytest.raises(KeyboardInterrupt):  # the bad clip comes first
        (clips / "a.wav").rename(clips / "z.wav")
        (clips / "b.wav").rename(clips / "y.wav")
        ask(clips, out, tiny_model(seed=1), progress=stopping_after(1))
    assert ask(clips, out, model, QUESTIONS[:1]).resumed == 0


def test_one_process_writes_an_output(clips, model, tmp_path):
    out = tmp_path / "answers.jsonl"
    with AnswerParts(out).open({}, {}), pytest.raises(ConfigError, match="another pal batch is writing"):
        ask(clips, out, model)
    assert ask(clips, out, model, overwrite=True).asked == 5


def test_a_clip_that_ended_two_workers_is_bad_and_the_rest_goes_on(clips, model, tmp_path):
    # as a worker that Ray restarts sees what the ones before it left
    tasks = read_input(clips, QUESTIONS).tasks
    parts = AnswerParts(tmp_path / "answers.jsonl")
    with parts.open({}, {}):
        for _ in range(2):
            ended = PartWriter(parts.folder, model.digest)
            ended.begin(tasks[0].key)
            ended.close()
        again = worker.ClipWorker(worker.WorkerOptions("", parts.folder, max_new_tokens=SHORT), model)
        reports = [again(task) for task in tasks]
        again.close()
    assert "ended 2 workers" in reports[0].failed and reports[1].failed is None


def test_what_a_worker_answered_before_it_ended_is_not_asked_again(clips, model, asked, tmp_path):
    tasks = read_input(clips, QUESTIONS).tasks
    parts = AnswerParts(tmp_path / "answers.jsonl")
    options = worker.WorkerOptions("", parts.folder, max_new_tokens=SHORT)
    with parts.open({}, {}):
        worker.ClipWorker(options, model)(tasks[0])
        worker.ClipWorker(options, model)(tasks[0])
    assert set(asked.questions.values()) == {1}


def test_an_unexpected_error_is_the_clip_s_own_and_it_is_tried_again(clips, model, tmp_path, monkeypatch):
    def fails(self, clip, *rest, **options):
        raise RuntimeError("no memory. And more")

    with monkeypatch.context() as patch:
        patch.setattr(type(model), "ask_detailed", fails)
        report = ask(clips, tmp_path / "answers.jsonl", model)
    assert report.failed["a.wav"].endswith("a.wav: RuntimeError: no memory") and len(report.failed) == 5
    assert list(ask(clips, tmp_path / "answers.jsonl", model).failed) == ["bad.wav"]


def test_files_of_a_killed_run_s_workers_are_removed(clips, model, tmp_path):
    left, out = tmp_path / "left", tmp_path / "answers.jsonl"
    left.mkdir()
    parts = AnswerParts(out)
    parts.folder.mkdir()
    parts.temporary(left)
    ask(clips, out, model)
    assert not left.exists()


@pytest.mark.skipif(os.name != "posix", reason="names of bytes")
def test_names_that_are_not_utf_8_are_written(clips, model, tmp_path):
    name = os.fsdecode(b"\xff.wav")
    soundfile.write(clips / "x.wav", noise(0.4).numpy(), 16_000)
    (clips / "x.wav").rename(clips / name)
    for out in (tmp_path / "answers.jsonl", tmp_path / "answers.parquet"):
        report = ask(Path(clips), out, model)
        assert set(report.failed) == {"bad.wav"}
    assert rows_of(tmp_path / "answers.jsonl")[-1]["clip"] == r"\udcff.wav"
    assert pyarrow.parquet.read_table(out).to_pylist() == rows_of(tmp_path / "answers.jsonl")
