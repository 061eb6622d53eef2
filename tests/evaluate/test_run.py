"""Run folders: what they hold, how they go on after a kill, how they are scored again, joined and compared."""

import json
import math
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pal.data.manifest import Record, Turn
from pal.errors import BundleError, ConfigError, PalError
from pal.evaluate import evaluate
from pal.evaluate.benchmark import Benchmark, from_records, open_task
from pal.evaluate.compare import compare
from pal.evaluate.folder import Journal, RunFolder
from pal.evaluate.items import Item
from pal.evaluate.run import join, rescore, run
from pal.features import FeatureCache
from tests import published
from tests.models import tiny_model

CHOICES = ("yes", "no", "a loud siren")


@pytest.fixture(scope="module")
def model():
    return tiny_model("lal")


@pytest.fixture
def benchmark(tmp_path):
    return made(tmp_path)


def made(root, clips=5, questions=4, rule="exact"):
    items = []
    for number in range(clips):
        path = root / "audio" / f"{number}.wav"
        published.clip(path, 0.1 + 0.05 * number)
        items += [
            Item(f"{number}-{q}", (str(path),), f"Is it {q}?", ("yes",), CHOICES, {"asks": (str(q),)})
            for q in range(questions)
        ]
    return Benchmark("made", tuple(items), {"name": rule}, root)


class Scripted:
    """The model, but its answers come from a function of the prompt; counts what it was asked."""

    def __init__(self, model, say):
        self._model, self._say = model, say
        self.asked = 0

    def __getattr__(self, name):
        return getattr(self._model, name)

    def generate(self, clips, rows, **options):
        texts = [self._say(self._model.tokenizer.decode([i for i in r.ids if i >= 0]), bool(r.clips)) for r in rows]
        self.asked += len(rows)
        return texts


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_folder(model, benchmark, tmp_path):
    out = tmp_path / "run"
    say = Scripted(model, lambda prompt, heard: "Yes." if heard and "Is it 1" in prompt else "no")
    result = run(say, benchmark, out, progress=False)
    assert files(out) == ["items.jsonl", "score.json", "settings.json"]
    score = json.loads((out / "score.json").read_text())
    assert (score["n"], score["metric"], score["score"], score["no_audio_score"], score["gain"]) == (
        *(20, "exact_match"),
        *(0.25, 0.0, 0.25),
    )
    assert score == json.loads(json.dumps(result.to_dict()))
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
    assert settings["prompt"] == "<user><audio>\nIs it 0?<assistant>"
    assert settings["decoding"] == "greedy, at most 32 new tokens"
    assert {"torch", "transformers"} <= set(settings["versions"])


def test_a_finished_run_is_not_asked_again(model, benchmark, tmp_path):
    first = Scripted(model, lambda prompt, heard: "yes")
    run(first, benchmark, tmp_path / "run", progress=False)
    assert first.asked == 20 + 4  # without audio each different question once
    before = (tmp_path / "run/items.jsonl").read_bytes()
    again = Scripted(model, lambda prompt, heard: "no")
    run(again, benchmark, tmp_path / "run", progress=False)
    assert again.asked == 0
    assert (tmp_path / "run/items.jsonl").read_bytes() == before
    run(again, benchmark, tmp_path / "run", progress=False, overwrite=True)
    assert again.asked == 24


def test_what_raised_is_wrong_counted_and_asked_again(model, benchmark, tmp_path):
    broken = [True]

    def say(prompt, heard):
        if broken[0] and heard and "Is it 2" in prompt:
            raise RuntimeError("out of luck")
        return "yes"

    result = run(Scripted(model, say), benchmark, tmp_path / "run", progress=False, batch=3)
    assert result.overall.score == 0.75
    assert len(result.errors) == 5
    assert result.errors[0] == {"id": "0-2", "error": "RuntimeError: out of luck"}
    assert [one.correct for one in result.items[:4]] == [True, True, False, True]
    broken[0] = False
    mended = Scripted(model, say)
    result = run(mended, benchmark, tmp_path / "run", progress=False)
    assert (mended.asked, result.overall.score, result.errors) == (5, 1.0, [])


def test_every_question_raising_is_an_error(model, benchmark, tmp_path):
    def say(prompt, heard):
        raise RuntimeError("always")

    with pytest.raises(PalError, match="none of 20 questions could be answered; the first: RuntimeError: always"):
        run(Scripted(model, say), benchmark, tmp_path / "run", progress=False, no_audio=False)


def test_another_run_in_the_folder_is_refused(model, benchmark, tmp_path):
    run(model, benchmark, tmp_path / "run", progress=False, limit=1)
    with pytest.raises(ConfigError, match="another run: 'limit' differs"):
        run(model, benchmark, tmp_path / "run", progress=False, limit=2)
    with pytest.raises(ConfigError, match="'model_digest' differs"):
        run(tiny_model("lal", seed=1), benchmark, tmp_path / "run", progress=False, limit=1)
    published.clip(Path(benchmark.items[0].clips[0]), 0.7)
    with pytest.raises(ConfigError, match="'data_digest' differs"):
        run(model, benchmark, tmp_path / "run", progress=False, limit=1)
    run(model, benchmark, tmp_path / "run", progress=False, limit=1, overwrite=True)


class KilledError(BaseException):
    """No `except Exception` stops it."""


def test_killed_anywhere_it_ends_with_the_same_files(model, benchmark, tmp_path, monkeypatch):
    run(model, benchmark, tmp_path / "whole", progress=False, batch=3)
    chance = random.Random(0)
    add = Journal.add
    for number in range(20):
        left = [chance.randrange(24)]

        def dying(self, answers, left=left):
            if left[0] == 0:
                self._file.write('{"id": "half')
                self._file.flush()
                raise KilledError
            left[0] -= 1
            add(self, answers)

        folder = tmp_path / f"killed{number % 10}"  # half of them die twice
        monkeypatch.setattr(Journal, "add", dying)
        try:
            run(model, benchmark, folder, progress=False, batch=chance.randrange(1, 6))
        except KilledError:
            assert not (folder / "score.json").exists()
        monkeypatch.setattr(Journal, "add", add)
    for number in range(10):
        folder = tmp_path / f"killed{number}"
        asked = Scripted(model, None)
        asked.generate = lambda clips, rows, asked=asked, **options: counted(asked, model, clips, rows, options)
        done = len(RunFolder(folder).answers())
        run(asked, benchmark, folder, progress=False, batch=5)
        # 20 with audio; without it 4 different questions, of which each answer counts for 5 items
        assert asked.asked <= 40 - done
        for name in ("items.jsonl", "score.json"):
            assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


FORKED = """
import os, random, sys, time
import torch
from dataclasses import replace
from pathlib import Path
from tests.evaluate.test_run import made
from tests.models import tiny_model
from pal.evaluate.run import run
torch.set_num_threads(1)  # a pool of threads does not live on in a child
root = Path(sys.argv[1])
model, benchmark, folder = tiny_model("lal"), replace(made(root), max_new_tokens=8), root / "killed"
run(model, benchmark, root / "first", progress=False, limit=1)  # imports what is imported late
journal, chance, kills = folder / "answers.0.jsonl", random.Random(0), 0
for number in range(6):
    child = os.fork()
    if not child:
        run(model, benchmark, folder, progress=False, batch=chance.randrange(1, 4))
        os._exit(0)
    # the first when nothing is answered yet, the others on the way through the answers
    while not journal.is_file() or journal.stat().st_size < 250 * number:
        time.sleep(0.001)
    time.sleep(chance.uniform(0, 0.01))
    os.kill(child, 9)
    kills += os.WTERMSIG(os.waitpid(child, 0)[1]) == 9
print(kills, (folder / "score.json").exists())
"""


def test_killed_again_and_again_by_the_system(model, benchmark, tmp_path):
    """Processes of their own, forked from one that has imported everything, since that takes the longest."""
    benchmark = replace(benchmark, max_new_tokens=8)
    run(model, benchmark, tmp_path / "whole", progress=False)
    here = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", FORKED, str(tmp_path)], cwd=here, capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, ["6", "False"]), done.stderr[-2000:]
    run(model, benchmark, tmp_path / "killed", progress=False)
    for name in ("items.jsonl", "score.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


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
    model, benchmark = tiny_model(integration), replace(made(tmp_path, rule=rule), max_new_tokens=8)
    for batch in (4, 1, 7, 64):
        run(model, benchmark, tmp_path / f"{batch}", progress=False, batch=batch)
        for name in ("items.jsonl", "score.json", "settings.json"):
            assert (tmp_path / "4" / name).read_bytes() == (tmp_path / f"{batch}" / name).read_bytes()


def test_features_that_were_kept_change_nothing(model, benchmark, tmp_path, monkeypatch):
    run(model, benchmark, tmp_path / "without", progress=False)
    for number in range(2):
        kept = FeatureCache(tmp_path / "cache", model.ears)
        run(model, benchmark, tmp_path / f"{number}", progress=False, features=kept)
        for name in ("items.jsonl", "score.json"):
            assert (tmp_path / f"{number}" / name).read_bytes() == (tmp_path / "without" / name).read_bytes()
        monkeypatch.setattr(model.ears, "hear_with", None)  # the second time no encoder runs


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
    benchmark = from_records("turns", records, tmp_path, {"name": "exact"})
    result = run(model, benchmark, tmp_path / "run", progress=False)
    assert [one.id for one in result.items] == ["r#0", "r#1", "s#0", "s#1", "one"]
    assert [one.clips for one in result.items] == [["a.wav"], ["a.wav"], ["a.wav"], ["a.wav", "b.wav"], ["b.wav"]]
    assert [one.choices for one in result.items] == [None, ["yes", "no"], None, ["no"], ["yes"]]
    lines = [json.loads(line) for line in (tmp_path / "run/items.jsonl").read_text().splitlines()]
    assert lines[1]["before"] == [{"question": "What is it?", "answer": "a dog"}]
    assert "before" not in lines[0]
    in_memory = evaluate(model, records, progress=False)
    for one, other in zip(result.items, in_memory.items, strict=True):
        assert (one.id, one.output, one.correct) == (other.id, other.prediction, other.correct)
        assert (one.no_audio_output, one.prompt) == (other.no_audio_prediction, other.question)
    # against the conversation itself
    talk = [
        {"role": "user", "content": "<audio>\nYes?"},
        {"role": "assistant", "content": "no"},
        {"role": "user", "content": "<audio>\nAnd this?"},
    ]
    assert result.items[3].output == model.ask([first, second], talk, max_new_tokens=32)
    assert rescore(tmp_path / "run").to_dict() == result.to_dict()
    other = replace(records[0], turns=(Turn("What is it?", "a cat"), records[0].turns[1]))
    assert from_records("turns", [other, *records[1:]], tmp_path, {"name": "exact"}).digest != benchmark.digest
    ranked = from_records("turns", records, tmp_path, {"name": "rank"})
    assert [item.id for item in ranked.items] == ["r#1", "s#1", "one"]


def test_rank_takes_one_of_the_choices(model, tmp_path):
    result = run(model, made(tmp_path, rule="rank"), tmp_path / "run", progress=False)
    assert result.metric == "rank_accuracy"
    assert {one.output for one in result.items} <= set(CHOICES)
    with pytest.raises(ConfigError, match="made by 'rank'"):
        rescore(tmp_path / "run", {"name": "exact"})


def test_rescore_needs_no_model(model, tmp_path):
    root = published.mmau(tmp_path / "mmau")
    say = Scripted(model, lambda prompt, heard: "(B) a car horn" if "last sound" in prompt else "a man")
    result = run(say, open_task("mmau", root), tmp_path / "run", progress=False)
    before = {name: (tmp_path / "run" / name).read_bytes() for name in files(tmp_path / "run")}
    assert result.figures["accuracy"].score == 1.0  # no option has a lone 'b' here
    assert rescore(tmp_path / "run").to_dict() == result.to_dict()
    assert {name: (tmp_path / "run" / name).read_bytes() for name in files(tmp_path / "run")} == before
    other = rescore(tmp_path / "run", {"name": "exact"})
    assert (other.metric, other.overall.score) == ("exact_match", 0.5)
    settings = json.loads((tmp_path / "run/settings.json").read_text())
    assert settings["rule"] == {"name": "exact"}
    assert settings["model_digest"] == model.digest
    assert rescore(tmp_path / "run", {"name": "official"}).to_dict() == result.to_dict()
    with pytest.raises(BundleError, match="give a folder that pal eval wrote"):
        rescore(tmp_path / "mmau")


def test_join_makes_folds_one_score(model, tmp_path):
    root = published.esc50(tmp_path / "esc")
    rule = {"name": "exact"}
    for fold, answer in (("1", "dog"), ("2", "door wood knock"), ("3", "dog")):
        say = Scripted(model, lambda prompt, heard, answer=answer: answer)
        run(say, open_task("esc50", root, {"folds": fold}, rule), tmp_path / fold, progress=False)
    result = join([tmp_path / fold for fold in "123"], tmp_path / "all")
    assert result.n == 4
    assert result.overall.score == 0.75
    assert {fold: part["score"] for fold, part in result.categories["fold"].items()} == {"1": 0.5, "2": 1.0, "3": 1.0}
    assert files(tmp_path / "all") == ["items.jsonl", "score.json", "settings.json"]
    with pytest.raises(ConfigError, match="share questions"):
        join([tmp_path / "1", tmp_path / "1"], tmp_path / "twice")


def test_compare(model, benchmark, tmp_path):
    say = Scripted(model, lambda prompt, heard: "yes" if "Is it 1" in prompt else "no")
    run(say, benchmark, tmp_path / "a", progress=False)
    say = Scripted(model, lambda prompt, heard: "yes" if "Is it 0" not in prompt else "no")
    run(say, benchmark, tmp_path / "b", progress=False)
    found = compare([tmp_path / "a", tmp_path / "b", tmp_path / "a"])
    assert [row.score for row in found.rows] == [0.25, 0.75, 0.25]
    second, third = found.rows[1:]
    assert (second.difference, second.only_first, second.only_this) == (0.5, 0, 10)
    assert second.difference_ci95 == (0.5, 0.5)
    # ten that only the second has: the two tails of ten fair coins that all fall alike
    assert second.p_mcnemar == pytest.approx(2 / 2**10)
    assert second.p_bootstrap == 1 / 2000
    assert (third.difference, third.p_mcnemar, third.p_bootstrap) == (0.0, 1.0, 1.0)
    with pytest.raises(ConfigError, match="at least two"):
        compare([tmp_path / "a"])
    run(say, benchmark, tmp_path / "short", progress=False, limit=3)
    with pytest.raises(ConfigError, match="different questions"):
        compare([tmp_path / "a", tmp_path / "short"])
    rescore(tmp_path / "b", {"name": "token_sets"})
    with pytest.raises(ConfigError, match="the rule differs"):
        compare([tmp_path / "a", tmp_path / "b"])


def test_a_folder_as_a_score_for_model_cards(model, benchmark, tmp_path):
    result = run(model, benchmark, tmp_path / "run", progress=False)
    score = RunFolder(tmp_path / "run").as_score()
    assert (score.benchmark, score.metric, score.overall.n) == ("made", "exact_match", 20)
    assert score.overall.ci95 == result.overall.ci95
    assert score.overall.gain == result.overall.gain
    assert sorted(score.per_task) == [f"asks {number}" for number in range(4)]
    assert score.settings["model_digest"] == model.digest
    (tmp_path / "run/score.json").write_text("{}")
    with pytest.raises(BundleError, match="score it again with pal eval --rescore"):
        RunFolder(tmp_path / "run").as_score()
    (tmp_path / "run/score.json").unlink()
    with pytest.raises(BundleError, match="not complete"):
        RunFolder(tmp_path / "run").as_score()


def test_records_as_a_benchmark(tmp_path):
    from pal.data.prepare import read

    records = read("fsdd", digits(tmp_path))
    made_of = from_records("fsdd", records, tmp_path, {"name": "exact"})
    assert made_of.items[0].category == {"task": ("spoken digit",)}
    assert made_of.items[0].references == ("three",)
    with pytest.raises(PalError, match="no questions"):
        from_records("none", [], tmp_path, {"name": "exact"})
    with pytest.raises(PalError, match="two questions have the id"):
        from_records("twice", [*records, *records], tmp_path, {"name": "exact"})


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


@pytest.mark.parametrize("processes", [2])
def test_several_processes_give_the_same_files(model, benchmark, tmp_path, processes):
    run(model, benchmark, tmp_path / "one", progress=False)
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\nfrom pathlib import Path\nfrom tests.evaluate.test_run import made\n"
        "from tests.models import tiny_model\nfrom pal.evaluate.run import run\n"
        "root = Path(sys.argv[1])\nrun(tiny_model('lal'), made(root), root / 'two', progress=False)\n"
    )
    arguments = ["--cpu", "--num_processes", str(processes), "--num_machines", "1", "--mixed_precision", "no"]
    arguments += ["--dynamo_backend", "no", "--main_process_port", "0"]
    import os

    here = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *arguments, str(program), str(tmp_path)],
        cwd=here,
        env={**os.environ, "PYTHONPATH": here, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for name in ("items.jsonl", "score.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def test_compares_chance_has_two_sides(model, tmp_path):
    """Of six clips the first run knows one and the second the other five: draws that say otherwise, counted exactly."""
    items = []
    for number in range(6):
        path = tmp_path / "audio" / f"{number}.wav"
        published.clip(path, 0.1 + 0.05 * number)
        items.append(Item(str(number), (str(path),), f"Is it {number}?", ("yes",), CHOICES))
    benchmark = Benchmark("made", tuple(items), {"name": "exact"}, tmp_path)
    for name, knows in (("a", "0"), ("b", "12345")):
        say = Scripted(
            model, lambda prompt, heard, knows=knows: "yes" if prompt.split("Is it ")[1][0] in knows else "no"
        )
        run(say, benchmark, tmp_path / name, progress=False, no_audio=False)
    # a draw has the first clip k times: 6 - 2 k is not above 0 from three times on
    tail = sum(math.comb(6, k) * 5 ** (6 - k) for k in range(3, 7)) / 6**6
    for folders, by in (("ab", 4 / 6), ("ba", -4 / 6)):
        row = compare([tmp_path / name for name in folders]).rows[1]
        assert row.difference == pytest.approx(by)
        assert row.p_bootstrap == pytest.approx(2 * tail, abs=0.025)
        assert row.difference_ci95[0] <= by <= row.difference_ci95[1]
        assert row.p_mcnemar == pytest.approx(2 * (1 + 6) / 2**6)  # at most one of six fair coins


def test_runs_of_other_references_are_not_compared(model, benchmark, tmp_path):
    others = replace(benchmark, items=tuple(replace(item, references=("no",)) for item in benchmark.items))
    for name, asked in (("a", benchmark), ("b", others)):
        run(Scripted(model, lambda prompt, heard: "yes"), asked, tmp_path / name, progress=False, no_audio=False)
    with pytest.raises(ConfigError, match="the data differs"):
        compare([tmp_path / "a", tmp_path / "b"])
    with pytest.raises(ConfigError, match="'data_digest' differs"):
        run(Scripted(model, lambda prompt, heard: "yes"), others, tmp_path / "a", progress=False, no_audio=False)
