"""A model that answers from a table: what it is asked, in which batches, and what becomes of errors."""

import copy
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

from pal.backbone.tokenizer import train_tokenizer
from pal.data.manifest import Manifest
from pal.data.prompts import PromptStyle
from pal.errors import ConfigError, ManifestError, PalError
from pal.evaluate import evaluate, from_records
from pal.evaluate.answerer import best_choice
from pal.evaluate.clip_cache import EncodedClipCache
from pal.types import AUDIO, IGNORE, EncodedClip

QUESTION = "What is this?"


class Fake:
    """Names a clip by its length in tenths of a second; without audio it says "dog"."""

    sampling_rate = 1000
    digest = "d" * 64
    source = "a table"
    training = True
    llm = SimpleNamespace(dtype=torch.float32)

    def __init__(self):
        self.tokenizer = train_tokenizer(["what is this dog cat yes no is it first?"] * 3, 300)
        self.config = SimpleNamespace(style=PromptStyle(), system=None, after_clip="")
        self.calls = []

    def eval(self):
        self.training = False

    def train(self, mode):
        self.training = mode

    def encode_clip(self, samples_N):
        return EncodedClip((samples_N[:, None],), len(samples_N) / self.sampling_rate)

    def generate(self, clips, rows, **options):
        assert not self.training
        self.calls.append((len(clips), len(rows)))
        return [self.answer(clips, row) for row in rows]

    def answer(self, clips, row):
        heard = [len(clips[clip].x_AE[0]) for clip in row.clips]
        if 500 in heard:
            raise RuntimeError("this clip breaks the model")
        return {0: "dog", 100: " Dog. ", 200: "cat", 300: "a bell"}[sum(heard)]

    def answer_scores(self, clips, rows):
        self.calls.append((len(clips), len(rows)))
        scores = []
        for row in rows:
            said = self.tokenizer.decode([label for label in row.labels if label != IGNORE], skip_special_tokens=True)
            wanted = self.answer(clips, row).strip(" .").lower()
            scores.append(-1.0 if said.strip() == wanted else -5.0)
        return torch.tensor(scores)


@pytest.fixture
def folder(tmp_path):
    for name, samples in (("dog", 100), ("cat", 200), ("bell", 300), ("broken", 500)):
        soundfile.write(tmp_path / f"{name}.wav", np.full(samples, 0.1), 1000 * 8)
    return tmp_path


@pytest.fixture(autouse=True)
def no_resampling(monkeypatch):
    def load(path, rate):
        samples, _ = soundfile.read(path, dtype="float32")
        return SimpleNamespace(samples_N=torch.from_numpy(samples))

    monkeypatch.setattr("pal.evaluate.clip_cache.read_waveform", load)


def manifest(folder, records):
    path = folder / "made.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return Manifest(path)


def ranked(folder, records):
    return from_records(manifest(folder, records), rule={"name": "rank"})


def record(clip, answer, question=QUESTION, task="what", **more):
    return {
        "instruction": question,
        "input": "",
        "audio_id": clip,
        "dataset": "d",
        "task": task,
        "output": answer,
        **more,
    }


def test_scores_by_hand(folder):
    records = [
        record("dog.wav", "dog", id="a"),
        record("cat.wav", "cat", id="b"),
        record("bell.wav", "cat", id="c"),
        record("dog.wav", "yes", "Is it a dog?", "presence", id="d"),
    ]
    model = Fake()
    made = manifest(folder, records)
    score = evaluate(model, made, progress=False)
    found = score.to_dict()
    assert (found["benchmark"], found["n"], found["metric"]) == ("made", 4, "exact_match")
    assert found["score"] == 0.5
    assert found["no_audio_score"] == 0.25
    assert {task: (one["n"], one["score"]) for task, one in found["categories"]["task"].items()} == {
        "presence": (1, 0.0),
        "what": (3, 2 / 3),
    }
    assert [item["output"] for item in found["items"]] == [" Dog. ", "cat", "a bell", " Dog. "]
    assert [item["correct"] for item in found["items"]] == [True, True, False, False]
    assert [item["id"] for item in found["items"]] == ["a", "b", "c", "d"]
    assert [item["no_audio_output"] for item in found["items"]] == ["dog"] * 4
    settings = found["settings"]
    assert {"prompt", "decoding", "rule", "model_digest", "versions"} <= set(settings)
    assert settings["data_digest"] == from_records(made).digest
    assert settings["prompt"] == f"<user><audio>{QUESTION}<assistant>"
    assert model.training  # put back


def test_questions_about_a_clip_share_it_and_the_deaf_ones_are_asked_once(folder):
    records = [record(f"{name}.wav", "x", f"Is it {q}?") for q in ("a", "b", "c") for name in ("dog", "cat")]
    model = Fake()
    evaluate(model, manifest(folder, records), batch=3, progress=False)
    # two batches of three questions about one clip each, then three different questions without any
    assert model.calls == [(1, 3), (1, 3), (0, 3)]


def test_batches_do_not_change_answers(folder):
    records = [record(f"{name}.wav", name) for name in ("dog", "cat", "bell")]
    made = manifest(folder, records)
    scores = [evaluate(Fake(), made, batch=batch, progress=False) for batch in (1, 2, 64)]
    assert len({json.dumps([item.output for item in score.items]) for score in scores}) == 1


def recording_model():
    """A model whose answer says how long the clip is, and the lengths of the clips of each call."""
    model, calls = Fake(), []

    def generate(clips, rows, **options):
        lengths = [len(clip.x_AE[0]) for clip in clips]
        calls.append(lengths)
        return [str(lengths[row.clips[0]]) if row.clips else "-" for row in rows]

    model.generate = generate
    return model, calls


def test_clips_of_like_length_are_asked_together(tmp_path):
    lengths = [int(length) for length in np.geomspace(100, 6000, 60)]
    for length in lengths:
        soundfile.write(tmp_path / f"{length}.wav", np.full(length, 0.1), 1000 * 8)
    shuffled = [lengths[i] for i in np.random.default_rng(0).permutation(60)]
    made = manifest(tmp_path, [record(f"{length}.wav", str(length)) for length in shuffled])
    model, calls = recording_model()
    score = evaluate(model, made, batch=8, no_audio=False, progress=False)
    # in the manifest's order, each with its own answer
    assert [int(item.output) for item in score.items] == shuffled
    assert score.score == 1.0
    assert sorted(length for call in calls for length in call) == lengths
    padded = sum(len(call) * max(call) for call in calls)
    unsorted = sum(len(part) * max(part) for part in (shuffled[i : i + 8] for i in range(0, 60, 8)))
    assert 1 - sum(lengths) / unsorted > 0.5
    assert 1 - sum(lengths) / padded < 0.25


def test_one_long_recording_does_not_pad_the_short_ones(tmp_path):
    for name, length in (("long", 8000), ("a", 100), ("b", 90), ("c", 70)):
        soundfile.write(tmp_path / f"{name}.wav", np.full(length, 0.1), 1000 * 8)
    (tmp_path / "none.wav").write_text("no audio")
    records = [record(f"{name}.wav", "x") for name in ("a", "none", "b", "long", "c")]
    model, calls = recording_model()
    score = evaluate(model, manifest(tmp_path, records), no_audio=False, progress=False)
    assert calls == [[8000], [100, 90, 70]]
    assert [item.error is None for item in score.items] == [True, False, True, True, True]


def test_an_item_that_raises_is_wrong_and_reported(folder):
    (folder / "not.wav").write_text("no audio at all")
    records = [record("dog.wav", "dog"), record("broken.wav", "dog"), record("cat.wav", "cat")]
    score = evaluate(Fake(), manifest(folder, records), progress=False)
    assert [item.correct for item in score.items] == [True, False, True]
    assert score.score == 2 / 3
    (error,) = score.errors
    assert error["error"] == "RuntimeError: this clip breaks the model"
    assert score.items[1].no_audio_correct is True


def test_every_item_raising_is_an_error(folder):
    with pytest.raises(PalError, match=r"none of 1 questions could be answered; .*breaks the model"):
        evaluate(Fake(), manifest(folder, [record("broken.wav", "dog")]), progress=False)


def test_rank_takes_the_likeliest_choice(folder):
    choices = {"choices": ["cat", "dog"]}
    records = [
        record("dog.wav", "dog", **choices),
        record("cat.wav", "cat", **choices),
        record("cat.wav", "dog", "What?", **choices),
        record("cat.wav", "free text"),
    ]
    model = Fake()
    score = evaluate(model, ranked(folder, records), batch=4, progress=False)
    assert [item.output for item in score.items] == ["dog", "cat", "cat"]
    assert score.n == 3
    assert score.score == 2 / 3
    assert score.metric == "rank_accuracy"
    assert model.calls[0] == (1, 4)


def test_rank_needs_choices(folder):
    with pytest.raises(ConfigError, match="use scoring 'exact'"):
        ranked(folder, [record("dog.wav", "bell")])


def test_each_turn_is_asked_after_the_reference_answers_before_it(folder):
    turns = [{"question": "What is this?", "answer": "cat"}, {"question": "Is it a dog?", "answer": "dog"}]
    fields = {"audio_id": "dog.wav", "input": "", "dataset": "d", "task": "what", "id": "r", "turns": turns}
    model = Fake()
    rows = []
    model.generate = lambda clips, more, **options: rows.extend(more) or ["dog"] * len(more)
    score = evaluate(model, manifest(folder, [fields]), no_audio=False, progress=False)
    assert [(item.id, item.correct) for item in score.items] == [("r#0", False), ("r#1", True)]
    texts = sorted(model.tokenizer.decode([i for i in row.ids if i != AUDIO]) for row in rows)
    assert texts[1] == "<user>What is this?<assistant> cat<eos><user>Is it a dog?<assistant>"
    assert score.overall.no_audio_score is None


def test_limit_and_empty(folder):
    records = [record("dog.wav", "dog"), record("cat.wav", "cat")]
    assert evaluate(Fake(), manifest(folder, records), limit=1, progress=False).n == 1
    with pytest.raises(ManifestError, match="no questions"):
        evaluate(Fake(), [], progress=False)


def test_free_answers_are_left_out_where_others_have_choices(folder):
    closed = record("dog.wav", "dog", choices=["cat", "dog"])
    free = record("cat.wav", "a cat that meows")
    score = evaluate(Fake(), manifest(folder, [closed, free, free]), progress=False)
    assert (score.n, score.score, score.settings["left_out"]) == (1, 1.0, 2)
    score = evaluate(Fake(), manifest(folder, [free, free]), progress=False)
    assert (score.n, score.score, score.settings["left_out"]) == (2, 0.0, 0)


def test_each_clip_is_heard_once_however_its_questions_are_cut(folder):
    records = [record(f"{name}.wav", "x", f"Is it {q}?") for q in "abcdefg" for name in ("dog", "cat", "bell")]
    made = manifest(folder, records)
    for batch in (1, 2, 5, 64):
        model = Fake()
        heard = []
        model.encode_clip = lambda samples_N, heard=heard: (
            heard.append(len(samples_N)) or Fake.encode_clip(Fake, samples_N)
        )
        evaluate(model, made, batch=batch, progress=False)
        assert sorted(heard) == [100, 200, 300]


def test_clips_are_kept_until_they_are_too_many_bytes(folder):
    model = Fake()
    heard = []
    model.encode_clip = lambda samples_N: heard.append(len(samples_N)) or Fake.encode_clip(Fake, samples_N)
    hearing = EncodedClipCache(model, max_bytes=4 * 400)
    for name in ("dog", "bell", "dog", "cat", "dog", "bell"):
        hearing(str(folder / f"{name}.wav"))
    # cat's 200 samples put out bell's 300, since dog's 100 were asked for later
    assert heard == [100, 300, 200, 300]


class Rounding(Fake):
    """Among others it says "cat", by less than round-off or by far, as the clip's length says; alone it says "dog"."""

    apart = {200: 1e-5, 300: 1.0, 250: float("nan")}

    def generate(self, clips, rows, logits_processor=(), **options):
        self.calls.append(len(rows))
        for watch in logits_processor:
            margins = [self.apart[len(clips[row.clips[0]].x_AE[0])] for row in rows]
            logits_BV = torch.stack([torch.tensor([1.0, 1.0 + margin, 0.0]) for margin in margins])
            assert watch(torch.zeros(len(rows), 0, dtype=torch.long), logits_BV) is logits_BV
            ended_B1 = torch.full((len(rows), 1), self.tokenizer.eos_token_id)
            watch(ended_B1, torch.zeros(len(rows), 3))  # what stands after an answer's end does not count
        return ["cat" if len(rows) > 1 else "dog"] * len(rows)

    def answer_scores(self, clips, rows):
        self.calls.append(len(rows))
        alone = len({row.clips[0] for row in rows}) == 1
        scores = []
        for row in rows:
            said = self.tokenizer.decode([label for label in row.labels if label != IGNORE], skip_special_tokens=True)
            apart = self.apart[len(clips[row.clips[0]].x_AE[0])]
            scores.append((-apart if alone else apart) if said.strip() == "cat" else 0.0)
        return torch.tensor(scores)


@pytest.mark.parametrize(("scoring", "calls"), [("exact", [3, 1, 1]), ("rank", [6, 2, 2])])
def test_what_round_off_could_decide_is_asked_again_alone(folder, scoring, calls):
    soundfile.write(folder / "none.wav", np.full(250, 0.1), 1000 * 8)
    records = [record(f"{name}.wav", "dog", choices=["dog", "cat"]) for name in ("cat", "bell", "none")]
    model = Rounding()
    asked = from_records(manifest(folder, records), rule={"name": scoring})
    score = evaluate(model, asked, no_audio=False, batch=64, progress=False)
    assert [item.output for item in score.items] == ["dog", "cat", "dog"]
    assert model.calls == calls


class Unread(Fake):
    """While it writes, values of tensors cannot be looked at."""

    def generate(self, clips, rows, logits_processor=(), **options):
        for watch in logits_processor:
            assert watch.read_only
            with FakeTensorMode() as mode, FakeCopyMode(mode):
                unread = copy.deepcopy(watch)
            with mode:
                for said in range(3):
                    unread(torch.zeros(len(rows), said, dtype=torch.long), torch.zeros(len(rows), 9))
            assert unread.close_B.shape == (len(rows),)
        return ["dog"] * len(rows)


def test_margins_are_read_once_a_batch(folder):
    records = [record(f"{name}.wav", "dog") for name in ("cat", "bell", "dog")]
    score = evaluate(Unread(), manifest(folder, records), no_audio=False, progress=False)
    assert [item.error for item in score.items] == [None] * 3


def test_what_raised_is_wrong_even_where_the_right_answer_is_nothing(folder):
    records = [record("broken.wav", ""), record("dog.wav", "dog")]
    score = evaluate(Fake(), manifest(folder, records), progress=False)
    assert [item.correct for item in score.items] == [False, True]
    assert score.items[0].error is not None


def test_best_choice_takes_the_highest_and_never_nan():
    assert best_choice([-3.0, -1.0, -2.0], ["a", "b", "c"]) == "b"
    assert best_choice([-1.0, -1.0], ["a", "b"]) == "a"
    assert best_choice([math.nan, -9.0], ["a", "b"]) == "b"


def test_records_of_several_manifests_may_share_their_ids(folder):
    records = [one for name in ("dog", "cat") for one in manifest(folder, [record(f"{name}.wav", name)])]
    assert len({one.id for one in records}) == 1
    result = evaluate(Fake(), records, progress=False)
    assert [(one.output, one.correct) for one in result.items] == [(" Dog. ", True), ("cat", True)]
    with pytest.raises(ManifestError, match="two questions have the id"):
        evaluate(Fake(), records, folder / "run", progress=False)
