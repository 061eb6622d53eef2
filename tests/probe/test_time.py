"""`pal probe time`: the design is balanced, time is what differs, and figures say what answers said."""

from dataclasses import replace
from zlib import crc32

import numpy as np
import pytest

from pal.data.synth.events import KINDS
from pal.data.synth.questions import candidates
from pal.data.synth.scene import sound
from pal.errors import ConfigError
from pal.probe import sweeps, time
from pal.probe.sweeps import LENGTH, SECONDS, SWEEPS, questions, trials, twins
from pal.probe.time import SweepAnswer, judge, probe_time, thresholds
from tests.models import tiny_model


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    return questions(13, 5, tmp_path_factory.mktemp("clips"), wordings=2)


def answered(asked, choose):
    texts = [choose(one) for one in asked]
    return [
        SweepAnswer(text, text == one.record.turns[0].answer, False) for one, text in zip(asked, texts, strict=True)
    ]


def of_kinds(one):
    """Anything but time: the question, and which sounds the clip has."""
    return crc32(repr((one.record.turns[0].question, sorted(e.kind for e in one.scene.events))).encode()) % 2


@pytest.mark.parametrize(
    "choose",
    [
        lambda one: one.record.choices[0],
        lambda one: one.record.choices[-1],
        lambda one: min(one.record.choices),
        lambda one: one.record.choices[of_kinds(one)],
    ],
    ids=["first", "last", "alphabet", "kinds"],
)
def test_what_ignores_time_scores_exactly_half_everywhere(asked, choose):
    for points in judge(asked, answered(asked, choose)).values():
        for point in points:
            assert (point.accuracy, point.swapped) == (0.5, 0.0)


def test_what_ignores_the_audio_names_exactly_half(asked):
    fond = {kind for number, kind in enumerate(KINDS) if number % 3}
    found = judge(asked, answered(asked, lambda one: "yes" if _kind(one) in fond else "no"))
    assert {point.named for name in ("gap", "length") for point in found[name]} == {0.5}
    assert {point.named for name in ("half", "third") for point in found[name]} == {None}


def _kind(one):
    return (
        next(kind for kind, say in KINDS.items() if one.record.turns[0].question.endswith(f" {say.some}?"))
        if (not one.timed)
        else None
    )


def test_the_right_answers_follow_from_the_scene(asked):
    """By another way than the design's: from where the events are."""
    for one in asked:
        turn, events = one.record.turns[0], one.scene.events
        if one.sweep in ("gap", "length") and one.timed:
            right = min(events, key=lambda event: event.start).kind
        elif one.sweep == "half":
            right = ("first half", "second half")[(events[0].start + events[0].end) / 2 > SECONDS / 2]
        elif one.sweep == "third":
            right = ("beginning", "middle", "end")[int(events[0].start // (SECONDS / 3))]
        else:
            right = "yes" if _kind(one) in {event.kind for event in events} else "no"
        assert turn.answer == right
        assert all(event.start >= 0 and event.end <= SECONDS + 1e-9 for event in events)
    found = judge(asked, answered(asked, lambda one: one.record.turns[0].answer))
    assert all((p.accuracy, p.swapped) == (1.0, 1.0) and p.named in (1.0, None) for ps in found.values() for p in ps)


def test_sweeps_are_what_they_say(asked):
    for one in asked:
        starts = sorted((event.start, event.end) for event in one.scene.events)
        if one.sweep == "gap":
            assert starts[1][0] - starts[0][1] == pytest.approx(one.point)
        if one.sweep == "length":
            assert [end - start for start, end in starts] == pytest.approx([one.point] * 2)
        if one.sweep == "third":
            assert min(abs(starts[0][0] - SECONDS * k / 3) for k in (1, 2)) == pytest.approx(one.point)


def test_twins_hold_the_same_waveforms():
    """Without overlap and background each sound of one clip is found in the other, sample for sample."""
    trial = replace(trials(2, 7)[0], kinds=("dog", "static"), notes=(None, None), place=0.0)
    trial = replace(trial, background="floor", background_db=-300.0)
    (one, _), (two, _) = twins("gap", 0.4, trial, seed=7)
    n, shift = round(LENGTH * 16_000), round((LENGTH + 0.4) * 16_000)
    a, b = sound(one), sound(two)
    np.testing.assert_allclose(a[:n], b[shift : shift + n], atol=1e-6)
    np.testing.assert_allclose(a[shift : shift + n], b[:n], atol=1e-6)
    assert np.abs(a[:n] - b[:n]).max() > 0.1


def test_pairs_use_kinds_evenly_and_absent_ones_are_absent():
    drawn = trials(20, 3)
    assert all(len({*trial.kinds, *trial.absent}) == 4 for trial in drawn)
    present = [kind for trial in drawn for kind in trial.kinds]
    assert sorted(present) == sorted(kind for trial in drawn for kind in trial.absent)
    assert max(map(present.count, KINDS)) <= 2
    assert trials(20, 3) == drawn != trials(20, 4)


def test_thresholds_find_where_a_listener_begins_to_hear(asked):
    """One that tells times apart from 0.3 s between onsets on, and guesses the first choice below."""

    def choose(one):
        starts = [event.start for event in one.scene.events]
        if one.sweep == "gap" and max(starts) - min(starts) > 0.25:
            return one.record.turns[0].answer
        return one.record.choices[0]

    found = thresholds(asked, answered(asked, choose))
    assert -0.6 < found["gap"].at < -0.5
    assert found["length"].at is found["half"].at is None
    assert "below 75%" in found["half"].says


def test_a_timing_question_is_asked_in_training_where_the_sweep_says():
    for name, sweep in SWEEPS.items():
        if name in ("half", "third"):
            for point in (*sweep.points, sweep.trained[0] + 1e-6):
                for trial in trials(2, 1):
                    (scene, asked), _ = twins(name, point, trial, 1)
                    forms = {(one.form, one.answer) for one in candidates(scene)}
                    inside = ((name, asked[0].answer)) in forms
                    assert inside == (point > sweep.trained[0])


@pytest.fixture
def small(monkeypatch):
    """Two points a sweep, one of them outside of training, and few resamples, so that a whole probe is quick."""
    monkeypatch.setattr("pal.probe.threshold.RESAMPLES", 50)
    few = {name: replace(sweep, points=(sweep.points[0], sweep.points[-2])) for name, sweep in SWEEPS.items()}
    for module in (sweeps, time):
        monkeypatch.setattr(module, "SWEEPS", few)


def test_a_model_probed_with_another_and_again_alone_is_the_same(small):
    models = [("one", tiny_model("lal")), ("two", tiny_model("plits"))]
    first, again = (probe_time(those, pairs=2, seed=1).to_dict() for those in (models, models[:1]))
    assert list(again["tables"]) == list(first["tables"]) and again["settings"] == first["settings"]
    for title, rows in again["tables"].items():
        assert rows == [row for row in first["tables"][title] if row["model"] == "one"]
    table = first["tables"]["Order against the gap"]
    assert [row["model"] for row in table] == ["one", "one", "two", "two"]
    assert {row["no_audio"] for title in list(first["tables"])[1:] for row in first["tables"][title]} == {0.5}
    assert set(first["model"]["models"]) == {"one", "two"}
    assert first["details"]["one"] == {"seconds_per_token": 0.04, "errors": 0}


@pytest.mark.parametrize("wrong", [{"pairs": 1}, {"wordings": 0}])
def test_wrong_use(wrong):
    with pytest.raises(ConfigError, match="give"):
        probe_time([], **wrong)


def test_seeds_of_a_folder_stand_side_by_side(small):
    models = [(f"lal/seed-{seed}", tiny_model("lal", seed=seed)) for seed in (0, 1)] + [("pal", tiny_model("pal"))]
    result = probe_time(models, pairs=2)
    (title,) = [title for title in result.tables if title.endswith("the models of a folder")]
    assert {row["models"] for row in result.tables[title]} == {"lal (2)"}
    assert {row["trained"] for row in result.tables[title]} == {"yes", "no"}
    for row in result.tables[title]:
        sweep = time.SWEEPS[row["sweep"]]
        inside = [
            at for at in sweep.points if (sweep.trained[0] <= at <= sweep.trained[1]) == (row["trained"] == "yes")
        ]
        means = [
            np.mean(
                [r["accuracy"] for r in result.tables[sweep.title] if r["model"] == label and r["seconds"] in inside]
            )
            for label in ("lal/seed-0", "lal/seed-1")
        ]
        assert [row["lowest"], row["highest"]] == pytest.approx(sorted(means))
        assert row["accuracy"] == pytest.approx(np.mean(means))
