"""Evaluations into a folder: what it holds, how a run goes on after a kill, and that nothing changes an answer."""

import copy
import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from pal.data.manifest import Record, Turn
from pal.errors import ConfigError, PalError
from pal.evaluate import evaluate, from_records, load_result
from pal.evaluate.folder import Journal, RunFolder
from pal.evaluate.rescoring import rescore
from pal.features import FeatureCache
from tests import published
from tests.evaluate.scripted import CHOICES, Scripted, files, made
from tests.models import tiny_model


def test_the_folder(model, benchmark, tmp_path):
    out = tmp_path / "run"
    say = Scripted(model, lambda prompt, heard: "Yes." if heard and "Is it 1" in prompt else "no")
    result = evaluate(say, benchmark, out, progress=False)
    assert files(out) == ["items.jsonl", "score.json", "settings.json"]
    score = json.loads((out / "score.json").read_text())
    assert (score["n"], score["metric"], score["score"], score["no_audio_score"], score["gain"]) == (
        *(20, "exact_match"),
        *(0.25, 0.0, 0.25),
    )
    assert score == json.loads(json.dumps(result.summary()))
    assert score["ci95"] == [0.25, 0.25]  # each clip has one right answer of four
    assert {value: part["score"] for value, part in score["categories"]["asks"].items()} == {
        "0": 0.0,
        "1": 1.0,
        "2": 0.0,
        "3": 0.0,
    }
    assert {name: part["n"] for name, part in score["durations"].items()} == {"0 to 2 s": 20}
    assert score["errors"] == {"count": 0, "items": []}
    lines = [json.loads(line) for line in (out / "items.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [item.id for item in benchmark.items]
    assert lines[1] == {
        "id": "0-1",
        "clips": ["audio/0.wav"],
        "category": {"asks": ["1"]},
        "seconds": 0.1,
        "prompt": "Is it 1?",
        "references": ["yes"],
        "choices": None,
        "error": None,
        "no_audio_error": None,
        "output": "Yes.",
        "parsed": "yes",
        "correct": True,
        "value": 1.0,
        "no_audio_output": "no",
        "no_audio_parsed": "no",
        "no_audio_correct": False,
        "no_audio_value": 0.0,
    }
    settings = json.loads((out / "settings.json").read_text())
    assert settings["labels"] == list(CHOICES)
    assert settings["model_digest"] == model.digest
    assert settings["data_digest"] == benchmark.digest
    assert settings["prompt"] == "<user><audio>Is it 0?<assistant>"
    assert settings["decoding"] == "greedy, at most 32 new tokens"
    assert {"torch", "transformers"} <= set(settings["versions"])


def test_a_finished_run_is_not_asked_again(model, benchmark, tmp_path):
    first = Scripted(model, lambda prompt, heard: "yes")
    evaluate(first, benchmark, tmp_path / "run", progress=False)
    assert first.asked == 20 + 4  # without audio each different question once
    before = (tmp_path / "run/items.jsonl").read_bytes()
    again = Scripted(model, lambda prompt, heard: "no")
    evaluate(again, benchmark, tmp_path / "run", progress=False)
    assert again.asked == 0
    assert (tmp_path / "run/items.jsonl").read_bytes() == before
    evaluate(again, benchmark, tmp_path / "run", progress=False, overwrite=True)
    assert again.asked == 24


def test_what_raised_is_wrong_counted_and_asked_again(model, benchmark, tmp_path):
    broken = [True]

    def say(prompt, heard):
        if broken[0] and heard and "Is it 2" in prompt:
            raise RuntimeError("out of luck")
        return "yes"

    result = evaluate(Scripted(model, say), benchmark, tmp_path / "run", progress=False, batch=3)
    assert result.overall.score == 0.75
    assert len(result.errors) == 5
    assert result.errors[0] == {"id": "0-2", "error": "RuntimeError: out of luck"}
    assert [one.correct for one in result.items[:4]] == [True, True, False, True]
    broken[0] = False
    mended = Scripted(model, say)
    result = evaluate(mended, benchmark, tmp_path / "run", progress=False)
    assert (mended.asked, result.overall.score, result.errors) == (5, 1.0, [])


def test_every_question_raising_is_an_error(model, benchmark, tmp_path):
    def say(prompt, heard):
        raise RuntimeError("always")

    with pytest.raises(PalError, match="none of 20 questions could be answered; the first: RuntimeError: always"):
        evaluate(Scripted(model, say), benchmark, tmp_path / "run", progress=False, no_audio=False)


def test_another_run_in_the_folder_is_refused(model, benchmark, tmp_path):
    evaluate(model, benchmark, tmp_path / "run", progress=False, limit=1)
    with pytest.raises(ConfigError, match="another run: 'limit' differs"):
        evaluate(model, benchmark, tmp_path / "run", progress=False, limit=2)
    with pytest.raises(ConfigError, match="'model_digest' differs"):
        evaluate(tiny_model("lal", seed=1), benchmark, tmp_path / "run", progress=False, limit=1)
    published.clip(Path(benchmark.items[0].clips[0]), 0.7)
    with pytest.raises(ConfigError, match="'data_digest' differs"):
        evaluate(model, benchmark, tmp_path / "run", progress=False, limit=1)
    evaluate(model, benchmark, tmp_path / "run", progress=False, limit=1, overwrite=True)


def test_text_after_clips_belongs_to_a_run(model, benchmark, tmp_path):
    path = tmp_path / "run" / "settings.json"
    evaluate(model, benchmark, tmp_path / "run", progress=False, limit=1)
    settings = json.loads(path.read_text())
    assert settings["after_clip"] == model.config.after_clip == ""
    other = copy.copy(model)
    other.config = model.config.model_copy(update={"after_clip": "\n"})
    with pytest.raises(ConfigError, match="'after_clip' differs"):
        evaluate(other, benchmark, tmp_path / "run", progress=False, limit=1)
    del settings["after_clip"]  # as in runs of earlier versions, which had a line break
    path.write_text(json.dumps(settings))
    evaluate(other, benchmark, tmp_path / "run", progress=False, limit=1)


class KilledError(BaseException):
    """No `except Exception` stops it."""


def test_killed_anywhere_it_ends_with_the_same_files(model, benchmark, tmp_path, monkeypatch):
    benchmark = replace(benchmark, max_new_tokens=4)
    evaluate(model, benchmark, tmp_path / "whole", progress=False, batch=3)
    chance = random.Random(0)
    add = Journal.add
    for number in range(12):
        left = [chance.randrange(24)]

        def dying(self, answers, left=left):
            if left[0] == 0:
                self._file.write('{"id": "half')
                self._file.flush()
                raise KilledError
            left[0] -= 1
            add(self, answers)

        folder = tmp_path / f"killed{number % 6}"  # half of them die twice
        monkeypatch.setattr(Journal, "add", dying)
        try:
            evaluate(model, benchmark, folder, progress=False, batch=chance.randrange(1, 6))
        except KilledError:
            assert not (folder / "score.json").exists()
        monkeypatch.setattr(Journal, "add", add)
    for number in range(6):
        folder = tmp_path / f"killed{number}"
        asked = Scripted(model, None)
        asked.generate = lambda clips, rows, asked=asked, **options: counted(asked, model, clips, rows, options)
        done = len(RunFolder(folder).answers())
        evaluate(asked, benchmark, folder, progress=False, batch=5)
        # 20 with audio; without it 4 different questions, of which each answer counts for 5 items
        assert asked.asked <= 40 - done
        for name in ("items.jsonl", "score.json"):
            assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


FORKED = """
import os, random, socket, sys, time
import torch
from accelerate import PartialState
from dataclasses import replace
from pathlib import Path
from tests.evaluate.scripted import made
from tests.models import tiny_model
from pal.evaluate import evaluate
torch.set_num_threads(1)  # a pool of threads does not live on in a child
root = Path(sys.argv[1])
model, benchmark, folder = tiny_model("lal"), replace(made(root), max_new_tokens=4), root / "killed"
evaluate(model, benchmark, root / "first", progress=False, limit=1)  # imports what is imported late
journal, chance, kills = folder / "answers.0.jsonl", random.Random(0), 0
for number in range(4):
    child = os.fork()
    if not child:
        evaluate(model, benchmark, folder, progress=False, batch=chance.randrange(1, 4))
        os._exit(0)
    # the first when nothing is answered yet, the others on the way through the answers
    while not journal.is_file() or journal.stat().st_size < 250 * number:
        time.sleep(0.001)
    time.sleep(chance.uniform(0, 0.01))
    os.kill(child, 9)
    kills += os.WTERMSIG(os.waitpid(child, 0)[1]) == 9
print(kills, (folder / "score.json").exists())
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = str(free.getsockname()[1])
children = []
for rank in ("0", "1"):
    children.append(os.fork())
    if not children[-1]:
        # what `accelerate launch --cpu` and `torchrun` set
        os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        os.environ["ACCELERATE_USE_CPU"] = "true"
        PartialState._reset_state()
        evaluate(model, benchmark, root / "two", progress=False)
        assert (PartialState().num_processes, PartialState().process_index) == (2, int(rank))
        sys.stdout.flush()
        os._exit(0)
print([os.waitpid(child, 0)[1] for child in children])
"""


@pytest.fixture(scope="module")
def forked(model, tmp_path_factory):
    """Processes of their own, forked from one that has imported everything, since that takes the longest.

    The folder of their runs, that of a run in this process, the benchmark, and what was printed.
    """
    folder = tmp_path_factory.mktemp("forked")
    here = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", FORKED, str(folder)], cwd=here, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    benchmark = replace(made(folder), max_new_tokens=4)
    evaluate(model, benchmark, folder / "whole", progress=False)
    return SimpleNamespace(folder=folder, benchmark=benchmark, printed=done.stdout.splitlines(), errors=done.stderr)


def same_files(folder, name):
    return all(
        (folder / name / file).read_bytes() == (folder / "whole" / file).read_bytes()
        for file in ("items.jsonl", "score.json")
    )


def test_killed_again_and_again_by_the_system(model, forked):
    assert forked.printed[0] == "4 False"
    evaluate(model, forked.benchmark, forked.folder / "killed", progress=False)
    assert same_files(forked.folder, "killed")


def test_several_processes_give_the_same_files(forked):
    assert forked.printed[1] == "[0, 0]", forked.errors[-2000:]
    assert same_files(forked.folder, "two")


def counted(asked, model, clips, rows, options):
    asked.asked += len(rows)
    return model.generate(clips, rows, **options)


@pytest.mark.parametrize(
    ("integration", "rule"),
    [
        *(("plits", "exact"), ("lal", "exact"), ("pal", "exact"), ("pal", "rank"), ("lal_audio_query", "exact")),
        ({"name": "flamingo", "every": 1}, "exact"),
    ],
)
def test_neither_batch_nor_time_changes_a_byte(integration, rule, tmp_path):
    model, benchmark = tiny_model(integration), replace(made(tmp_path, rule=rule), max_new_tokens=4)
    for batch in (1, 7, 64):
        evaluate(model, benchmark, tmp_path / f"{batch}", progress=False, batch=batch)
        for name in ("items.jsonl", "score.json", "settings.json"):
            assert (tmp_path / "1" / name).read_bytes() == (tmp_path / f"{batch}" / name).read_bytes()


def test_features_that_were_kept_change_nothing(model, benchmark, tmp_path, monkeypatch):
    evaluate(model, benchmark, tmp_path / "without", progress=False)
    for number in range(2):
        kept = FeatureCache(tmp_path / "cache", model.ears)
        evaluate(model, benchmark, tmp_path / f"{number}", progress=False, features=kept)
        for name in ("items.jsonl", "score.json"):
            assert (tmp_path / f"{number}" / name).read_bytes() == (tmp_path / "without" / name).read_bytes()
        monkeypatch.setattr(model.ears, "encode_with", None)  # the second time no encoder runs


def test_each_turn_is_an_item_after_the_turns_before_it(model, tmp_path):
    for name in ("a", "b"):
        published.clip(tmp_path / f"{name}.wav")
    first, second = str(tmp_path / "a.wav"), str(tmp_path / "b.wav")
    records = [
        Record("r", (first,), (Turn("What is it?", "a dog"), Turn("Is it loud?", "no")), "", "d", ("yes", "no")),
        Record(
            "s", (first, second), (Turn("<audio>\nYes?", "no"), Turn("<audio>\nAnd this?", "yes")), "t", "d", ("no",)
        ),
        Record("one", (second,), (Turn("Yes?", "yes"),), "t", "d", ("yes",)),
    ]
    benchmark = from_records(records, "turns", root=tmp_path)
    result = evaluate(model, benchmark, tmp_path / "run", progress=False)
    assert [one.id for one in result.items] == ["r#0", "r#1", "s#0", "s#1", "one"]
    assert [one.clips for one in result.items] == [["a.wav"], ["a.wav"], ["a.wav"], ["a.wav", "b.wav"], ["b.wav"]]
    assert [one.choices for one in result.items] == [None, ["yes", "no"], None, ["no"], ["yes"]]
    lines = [json.loads(line) for line in (tmp_path / "run/items.jsonl").read_text().splitlines()]
    assert lines[1]["before"] == [{"question": "What is it?", "answer": "a dog"}]
    assert "before" not in lines[0]
    in_memory = evaluate(model, benchmark, progress=False)
    assert in_memory.to_dict() == result.to_dict() == load_result(tmp_path / "run").to_dict()
    # against the conversation itself
    talk = [
        {"role": "user", "content": "<audio>\nYes?"},
        {"role": "assistant", "content": "no"},
        {"role": "user", "content": "<audio>\nAnd this?"},
    ]
    assert result.items[3].output == model.ask([first, second], talk, max_new_tokens=32)
    other = replace(records[0], turns=(Turn("What is it?", "a cat"), records[0].turns[1]))
    assert from_records([other, *records[1:]], "turns", root=tmp_path).digest != benchmark.digest
    ranked = from_records(records, "turns", root=tmp_path, rule={"name": "rank"})
    assert [item.id for item in ranked.items] == ["r#1", "s#1", "one"]


def test_rank_takes_one_of_the_choices(model, tmp_path):
    result = evaluate(model, made(tmp_path, rule="rank"), tmp_path / "run", progress=False)
    assert result.metric == "rank_accuracy"
    assert {one.output for one in result.items} <= set(CHOICES)
    with pytest.raises(ConfigError, match="answers are from 'rank'"):
        rescore(tmp_path / "run", {"name": "exact"})


def test_records_as_a_benchmark(tmp_path):
    from pal.data.prepare import read

    records = read("fsdd", digits(tmp_path))
    made_of = from_records(records, "fsdd", root=tmp_path)
    assert made_of.items[0].category == {"task": ("spoken digit",)}
    assert made_of.items[0].references == ("three",)
    with pytest.raises(PalError, match="no questions"):
        from_records([])


def digits(root):
    for name in ("3_ann_0", "4_ann_0"):
        published.clip(root / f"{name}.wav")
    return root


def test_a_line_that_a_kill_cut_is_dropped(tmp_path):
    path = tmp_path / "answers.0.jsonl"
    path.write_text('{"id": "a", "heard": true, "text": "x\\u2028y", "error": null}\n{"id": "b", "he')
    with Journal(path) as journal:
        journal.add([])
    folder = RunFolder(tmp_path)
    assert folder.answers() == {("a", True): "x\u2028y"}
