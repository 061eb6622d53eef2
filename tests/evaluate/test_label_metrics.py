"""Means over labels against scikit-learn, and their intervals: what an evaluation of labels says."""

import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sklearn_metrics

from pal.evaluate.bootstrap import Groups, draw
from pal.evaluate.label_metrics import MacroF1, MeanAveragePrecision, average_precision, mean_over_labels
from pal.evaluate.result import ItemResult
from pal.evaluate.rules.labels import NearestLabel
from pal.evaluate.rules.word_errors import WordErrors
from pal.evaluate.scoring import score
from pal.registry import build
from tests.evaluate.rules.test_text import Letters

LABELS = ("a", "b", "c", "d", "e")


def data_set(seed, n=12, labels=5):
    """Truth, what is said and scores with ties, of labels some of which nobody has."""
    rng = np.random.default_rng(seed)
    truth_NL = rng.random((n, labels)) < rng.choice([0.0, 0.1, 0.5], labels)
    said_NL = rng.random((n, labels)) < rng.choice([0.0, 0.3], labels)
    return truth_NL, said_NL, np.round(rng.random((n, labels)) + 0.3 * truth_NL, 1)


def sklearn_map(truth_NL, scores_NL):
    there = [label for label in range(truth_NL.shape[1]) if truth_NL[:, label].any()]
    each = [sklearn_metrics.average_precision_score(truth_NL[:, label], scores_NL[:, label]) for label in there]
    return float(np.mean(each)) if each else math.nan


def sklearn_f1(truth_NL, said_NL):
    with warnings.catch_warnings():  # of an empty mean, where there is no label at all
        warnings.simplefilter("ignore")
        return float(sklearn_metrics.f1_score(truth_NL, said_NL, average="macro", zero_division=np.nan))


@pytest.mark.parametrize("seed", range(8))
def test_whole_parts_and_redrawn_data_sets_are_scikit_learns(seed):
    truth_NL, said_NL, scores_NL = data_set(seed)
    keys = [f"clip {n // 2}" for n in range(len(truth_NL))]  # two questions a clip
    for metric, known in (
        (MeanAveragePrecision(truth_NL, scores_NL), lambda rows: sklearn_map(truth_NL[rows], scores_NL[rows])),
        (MacroF1(truth_NL, said_NL), lambda rows: sklearn_f1(truth_NL[rows], said_NL[rows])),
    ):
        some = np.asarray([0, 3, 4, 7, 9])
        assert metric.value() == pytest.approx(known(np.arange(len(truth_NL))), nan_ok=True)
        assert metric.value(some) == pytest.approx(known(some), nan_ok=True)
        assert metric.subset(some).value() == pytest.approx(known(some), nan_ok=True)
        twice = np.asarray([0, 0, 3, 3, 3])
        assert metric.value(twice) == pytest.approx(known(twice), nan_ok=True)
        groups = Groups(keys)
        drawn_RG = np.random.default_rng(seed).integers(len(groups), size=(6, len(groups)))
        for found, drawn_G in zip(metric.resampled(groups, drawn_RG), drawn_RG, strict=True):
            rows = np.concatenate([[2 * g, 2 * g + 1] for g in drawn_G])
            assert found == pytest.approx(known(rows), nan_ok=True)


def test_redrawing_in_pieces_changes_nothing(monkeypatch):
    truth_NL, _, scores_NL = data_set(1)
    metric, groups = MeanAveragePrecision(truth_NL, scores_NL), Groups(range(12))
    drawn_RG = np.random.default_rng(0).integers(12, size=(20, 12))
    whole_R = metric.resampled(groups, drawn_RG)
    monkeypatch.setattr("pal.evaluate.label_metrics._CHUNK", 40)
    np.testing.assert_array_equal(metric.resampled(groups, drawn_RG), whole_R)


def test_weighted_average_precision_is_scikit_learns():
    rng = np.random.default_rng(0)
    scores_N, truth_N = np.round(rng.random(40), 1), rng.random(40) < 0.3
    times_RN = rng.integers(0, 3, (10, 40)).astype(float)
    for found, times_N in zip(average_precision(scores_N, truth_N, times_RN), times_RN, strict=True):
        assert found == pytest.approx(sklearn_metrics.average_precision_score(truth_N, scores_N, sample_weight=times_N))
    assert np.isnan(average_precision(scores_N, np.zeros(40, bool), times_RN)).all()


def test_a_mean_without_any_label_is_none():
    assert mean_over_labels(np.asarray([[1.0, np.nan], [np.nan, np.nan]])).tolist()[0] == 1.0
    assert math.isnan(mean_over_labels(np.asarray([[np.nan]]))[0])


# An evaluation


def answered(wanted, outputs, deaf=None):
    """Items whose first letter of the reference is their category; letters as labels."""
    return [
        ItemResult(
            str(n),
            [f"{n}.wav"],
            {"first": [refs[0]]},
            1.0 + 3 * (n % 2),
            "?",
            list(refs),
            None,
            out,
            no_audio_output=no,
        )
        for n, (refs, out, no) in enumerate(zip(wanted, outputs, deaf or outputs, strict=True))
    ]


def scored(items, rule, labels=None):
    return score(items, rule, {"benchmark": "x", "labels": labels, "seed": 0, "no_audio": True})


def judged(metric, items):
    rule = NearestLabel(NearestLabel.Config(answer="{}", label="{}", metric=metric), Letters())
    return scored(items, rule, LABELS)


@pytest.mark.parametrize("metric", ["map", "f1", "accuracy"])
def test_a_perfect_model_has_one_in_its_interval(metric):
    wanted = [("a",), ("b",), ("c",), ("d",), ("e",), *[("a",), ("b",)] * 10]
    result = judged(metric, answered(wanted, [refs[0] for refs in wanted], ["a"] * len(wanted)))
    for name, metric in result.metrics.items():
        assert metric.score == 1.0, name
        assert metric.ci95[0] < 1.0 and metric.ci95[1] == 1.0, name  # not certain either
        assert metric.no_audio_ci95[0] <= metric.no_audio_score <= metric.no_audio_ci95[1]
        assert metric.gain_ci95[0] <= metric.gain <= metric.gain_ci95[1]
    # of a category with one label there is no other label to be wrong about
    for part in [*result.categories["first"].values(), *result.durations.values()]:
        assert part.score == 1.0
        assert part.ci95[0] < 1.0 and part.ci95[1] == 1.0


def test_categories_and_durations_are_means_of_the_labels_there():
    wanted = [("a", "c"), ("a",), ("b",), ("b", "d"), ("b",), ("a",)]
    outputs = ["a", "b", "b", "d", "a", "a"]
    items = answered(wanted, outputs)
    truth = np.asarray([[label in refs for label in LABELS] for refs in wanted])
    said = np.asarray([[label == out for label in LABELS] for out in outputs])
    found = judged("f1", items)
    assert found.metrics["macro_f1"].score == pytest.approx(sklearn_f1(truth, said))
    ranked = judged("map", items)
    parts = {"a": [0, 1, 5], "b": [2, 3, 4]}
    for name, rows in parts.items():
        assert ranked.categories["first"][name].score == pytest.approx(sklearn_map(truth[rows], said[rows] * 1.0))
    lengths = {"0 to 2 s": [0, 2, 4], "2 to 5 s": [1, 3, 5]}
    for name, rows in lengths.items():
        assert ranked.durations[name].score == pytest.approx(sklearn_map(truth[rows], said[rows] * 1.0))


def test_a_label_that_is_only_said_counts_in_f1_and_not_in_map():
    items = answered([("a",), ("b",)], ["a", "e"])
    # a: 1, b and e: 0; c and d are nowhere
    assert judged("f1", items).metrics["macro_f1"].score == pytest.approx(1 / 3)
    assert judged("map", items).overall.score == pytest.approx((1 + 1 / 2) / 2)


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_every_interval_holds_its_own_score(data):
    """Whatever is answered: one clip, all right, all wrong, nothing, labels that are only said."""
    n = data.draw(st.integers(1, 8))
    wanted = data.draw(st.lists(st.sets(st.sampled_from(LABELS), min_size=1), min_size=n, max_size=n))
    said = st.lists(st.one_of(st.none(), st.sampled_from(LABELS)), min_size=n, max_size=n)
    outputs, deaf = data.draw(said), data.draw(said)
    items = answered([tuple(sorted(some)) for some in wanted], outputs, deaf)
    for one in items:
        one.clips = [f"{data.draw(st.integers(0, 3))}.wav"]
    for metric in ("map", "f1", "accuracy"):
        result = judged(metric, items)
        for part in map(vars, [result.overall, *result.categories["first"].values(), *result.durations.values()]):
            for key, ends in (("score", "ci95"), ("no_audio_score", "no_audio_ci95"), ("gain", "gain_ci95")):
                assert part[ends][0] <= part[key] <= part[ends][1]
                if key != "gain":
                    assert part[ends][0] >= 0 and part[ends][1] <= 1


def test_captions_and_word_errors_hold_their_score_too(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)  # Java takes long to start
    wanted = [("a dog barks",), ("rain falls",), ("a car passes by",)]
    outputs = ["a dog barks", "rain", None]
    for rule in (build("rule", "captions"), build("rule", "word_errors")):
        result = scored(answered(wanted, outputs), rule)
        for metric in result.metrics.values():
            assert metric.ci95[0] <= metric.score <= metric.ci95[1]
    assert isinstance(rule, WordErrors)
    # an error rate is no share: it may be above 1, and none is not certain to be one of few clips
    assert result.overall.score > 0


def test_a_paired_difference_of_label_means_holds_itself_and_its_chance_fits():
    truth_NL, _, scores_NL = data_set(3, n=60)
    rng = np.random.default_rng(0)
    good, bad = scores_NL + 3.0 * truth_NL, rng.random(scores_NL.shape)
    groups = Groups(range(60))
    first, same, worse = draw([MeanAveragePrecision(truth_NL, x) for x in (good, good, bad)], groups)
    none, apart = first - same, first - worse
    assert none.value == 0 and none.interval() == (0.0, 0.0) and none.chance() == 1.0
    low, high = apart.interval()
    assert 0 < low <= apart.value <= high and apart.chance() < 0.05
    assert (worse - first).interval() == pytest.approx((-high, -low))
    assert (worse - first).chance() == pytest.approx(apart.chance())


def test_the_evidence_of_a_mean_over_labels():
    # by hand: labels of 1, 2 and 4 clips, each clip twice; one label nobody has
    truth_NL = np.zeros((14, 4), bool)
    truth_NL[:2, 0] = truth_NL[2:6, 1] = truth_NL[6:14, 2] = True
    support = MeanAveragePrecision(truth_NL, np.zeros((14, 4))).support(Groups([n // 2 for n in range(14)]))
    assert support.clips == pytest.approx(9 / (1 + 1 / 2 + 1 / 4))
    assert support.widened == pytest.approx((1 + 1 / 2 + 1 / 4) / (0 + 1 / 4 + 3 / 16))
    alone = MeanAveragePrecision(np.eye(3, dtype=bool), np.eye(3)).support(Groups(range(3)))
    assert alone.widened == 4.0  # none of them shows any spread of its own
