"""Scenes: reproducible, true to their plan, and with questions that cannot be answered without listening."""

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable
from itertools import pairwise

import numpy as np
import pytest
import soundfile

from pal.data.manifest import Manifest
from pal.data.synth import synthesise
from pal.data.synth.events import KINDS, active_rms, render
from pal.data.synth.questions import (
    LOUDER_DB,
    SEMITONES,
    TASKS,
    Chooser,
    SceneQuestion,
    candidates,
    caption,
    question_rng,
)
from pal.data.synth.scene import OVERLAP, REGISTERS, Event, Scene, plan, sound
from pal.data.synth.waves import RATE
from pal.errors import ConfigError

SECONDS = 4.0


def questions_of(seed: int, scenes: int, number: int = 6, seconds: float = SECONDS) -> list[SceneQuestion]:
    chooser = Chooser()
    plans = [plan(seed, index, seconds) for index in range(scenes)]
    return [question for scene in plans for question in chooser.choose(scene, number, question_rng(scene))]


@pytest.fixture(scope="module")
def train() -> list[SceneQuestion]:
    return questions_of(1, 1500)


@pytest.fixture(scope="module")
def held_out() -> list[SceneQuestion]:
    return questions_of(2, 800)


# Files -------------------------------------------------------------------------------------------------------


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_same_seed_same_bytes_whatever_the_workers(tmp_path, monkeypatch):
    monkeypatch.setattr("pal.data.synth._ALONE", 0)
    alone = synthesise(tmp_path / "a", 40, seed=7, workers=1)
    synthesise(tmp_path / "b", 40, seed=7, workers=2)
    assert alone == tmp_path / "a" / "manifest.jsonl"
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert len(contents(tmp_path / "a")) == 41


def test_more_scenes_begin_with_the_fewer(tmp_path):
    few = synthesise(tmp_path / "few", 3, seed=7, workers=1)
    more = synthesise(tmp_path / "more", 5, seed=7, workers=1)
    assert more.read_bytes().startswith(few.read_bytes())
    assert contents(tmp_path / "few" / "audio").items() <= contents(tmp_path / "more" / "audio").items()


def test_other_seeds_share_no_scene():
    seen = [sound(plan(seed, index, 2.0)).tobytes() for seed in (0, 1, 2**32 - 1) for index in range(6)]
    assert len(set(seen)) == len(seen)


def test_manifest_is_valid_and_tags_lie_in_the_clip(tmp_path):
    manifest = Manifest(synthesise(tmp_path, 8, seed=3, workers=1))
    manifest.validate(files=True)
    assert len(manifest) == 48
    for record in manifest:
        info = soundfile.info(record.clips[0])
        assert (info.samplerate, info.channels, info.frames, info.subtype) == (RATE, 1, SECONDS * RATE, "PCM_16")
        assert record.choices is None or record.turns[0].answer in record.choices
        assert all(0 <= tag.start < tag.end <= SECONDS for tag in record.tags)
        labels = Counter(tag.label for tag in record.tags)
        events = sum(labels[kind] for kind in KINDS)
        assert labels["loud"] + labels["quiet"] == events
        notes = sum(labels[kind] for kind in KINDS if KINDS[kind].musical)
        assert sum(labels[f"pitch {register}"] for register in REGISTERS) == notes


@pytest.mark.parametrize(
    "wrong", [{"scenes": 0}, {"seed": -1}, {"seconds": 0.5}, {"questions_per_scene": 0}, {"workers": 0}]
)
def test_values_outside_their_range_are_named(tmp_path, wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        synthesise(tmp_path, **{"scenes": 1, "seed": 0, **wrong})


# Sound -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_no_two_instances_are_alike(name):
    kind = KINDS[name]
    hz = 330.0 if kind.musical else 0.0
    one_N, two_N = (render(name, np.random.default_rng(seed), kind.shortest, -20.0, hz) for seed in (0, 1))
    assert len(one_N) == len(two_N) == round(kind.shortest * RATE)
    assert np.isfinite(one_N).all() and np.isfinite(two_N).all()
    assert active_rms(one_N) == pytest.approx(0.1, rel=1e-6)
    likeness = abs(np.dot(one_N, two_N)) / np.sqrt(np.dot(one_N, one_N) * np.dot(two_N, two_N))
    assert likeness < 0.98
    # it sounds to the end of its tag, and from its beginning
    assert active_rms(one_N[: RATE // 5]) > 0.01 and active_rms(one_N[len(one_N) // 2 :]) > 0.003


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.musical])
@pytest.mark.parametrize("hz", [110.0, 330.0, 880.0])
def test_notes_have_their_pitch(name, hz):
    x_N = render(name, np.random.default_rng(5), 1.0, -20.0, hz)
    spectrum = np.abs(np.fft.rfft(x_N * np.hanning(len(x_N)), 4 * RATE))
    at = np.fft.rfftfreq(4 * RATE, 1 / RATE)
    near = spectrum[np.abs(at - hz) < 0.03 * hz].max()
    assert near > 0.1 * spectrum.max()
    assert near > 30 * spectrum[np.abs(at - 0.72 * hz) < 0.1 * hz].min()


def test_kinds_differ_in_timbre():
    """A nearest-centroid guess from nothing but a coarse spectrum and its change in time is right for most kinds."""

    def features(name: str, seed: int) -> np.ndarray:
        rng = np.random.default_rng((seed, list(KINDS).index(name)))
        hz = 330.0 * 2 ** rng.uniform(-0.3, 0.3) if KINDS[name].musical else 0.0
        x_N = render(name, rng, 0.9, -20.0, hz)[: RATE // 2 + 6000]
        frames = np.abs(np.fft.rfft(x_N[: len(x_N) // 256 * 256].reshape(-1, 256) * np.hanning(256), axis=1)) ** 2
        bands = np.log(np.stack([part.mean(1) for part in np.array_split(frames, 24, axis=1)], 1) + 1e-6)
        return np.concatenate([bands.mean(0), bands.std(0), np.abs(np.diff(bands, axis=0)).mean(0)])

    taught = {name: np.stack([features(name, seed) for seed in range(12)]) for name in KINDS}
    scale = np.concatenate(list(taught.values())).std(0)
    right = Counter()
    for name in KINDS:
        for seed in range(100, 106):
            x = features(name, seed)
            guess = min(KINDS, key=lambda kind: np.abs((taught[kind] - x) / scale).mean(1).min())
            right[name] += guess == name
    assert sum(right.values()) >= 0.9 * 6 * len(KINDS), right


def test_sound_follows_the_plan():
    """Levels of events that sound alone are what the plan says, and outside of events there is only background."""
    checked = 0
    for index in range(40):
        scene = plan(11, index, SECONDS)
        x_N = sound(scene).astype(np.float64)
        assert np.abs(x_N).max() <= 1 and len(x_N) == SECONDS * RATE
        quiet_N = x_N.copy()
        for i, event in enumerate(scene.events):
            part = slice(round(event.start * RATE), round(event.end * RATE))
            quiet_N[part] = np.nan
            neighbours = scene.events[max(0, i - 1) : i] + scene.events[i + 1 : i + 2]
            if all(other.end <= event.start or other.start >= event.end for other in neighbours):
                level = 20 * np.log10(active_rms(x_N[part]))
                assert level == pytest.approx(event.level_db, abs=2.5), event
                checked += 1
        rest_N = quiet_N[~np.isnan(quiet_N)]
        if len(rest_N) > RATE:
            assert 20 * np.log10(np.sqrt(np.mean(rest_N**2))) == pytest.approx(scene.background_db, abs=3.0)
    assert checked > 40


def test_plans_keep_their_promises():
    counts = Counter()
    for index in range(400):
        scene = plan(5, index, SECONDS)
        events = scene.events
        counts[len(events)] += 1
        assert len({event.kind for event in events}) == len(events)
        assert all(0 <= event.start < event.end <= SECONDS for event in events)
        for one, two in pairwise(events):
            assert two.start - one.start >= 0.299
            shorter = min(one.end - one.start, two.end - two.start)
            assert one.end - two.start <= OVERLAP * shorter + 0.01
        for event in events:
            assert event.level_db > -17 if event.loud else event.level_db < -25
            assert (event.note is not None) == KINDS[event.kind].musical
    assert counts == {1: 100, 2: 100, 3: 100, 4: 100}
    plans = [plan(5, index, SECONDS).events for index in range(50)]
    assert any(one.end > two.start + 0.1 for events in plans for one, two in pairwise(events))


# Questions ---------------------------------------------------------------------------------------------------


def scene_of(*events: Event) -> Scene:
    return Scene(0, 0, SECONDS, events, "floor", -75.0)


def asked(scene: Scene) -> dict[tuple[str, str, str], str]:
    return {(c.form, c.first, c.second): c.answer for c in candidates(scene)}


def test_answers_are_right():
    found = asked(
        scene_of(
            Event("siren", 0.2, 1.2, loud=False, level_db=-28.0),
            Event("piano", 1.6, 2.4, loud=True, level_db=-14.0, note=60),
            Event("flute", 3.0, 3.8, loud=True, level_db=-15.0, note=80),
        )
    )
    assert found["first", "", ""] == "siren" and found["last", "", ""] == "flute"
    assert found["next", "siren", ""] == "piano" and found["next", "piano", ""] == "flute"
    assert ("next", "flute", "") not in found and ("only", "", "") not in found
    assert found["count", "", ""] == "three"
    assert found["earlier", "piano", "siren"] == "siren" == found["earlier", "siren", "flute"]
    assert found["presence", "siren", ""] == "yes" and found["presence", "dog", ""] == "no"
    assert [found["third", kind, ""] for kind in ("siren", "piano", "flute")] == ["beginning", "middle", "end"]
    assert found["half", "siren", ""] == "first half" and found["half", "flute", ""] == "second half"
    assert ("half", "piano", "") not in found
    assert found["register", "piano", ""] == "middle" and found["register", "flute", ""] == "high"
    assert found["higher", "piano", "flute"] == "flute" == found["higher", "flute", "piano"]
    assert found["louder", "siren", "piano"] == "piano" and ("louder", "piano", "flute") not in found
    assert found["level", "siren", ""] == "quiet" and found["level", "flute", ""] == "loud"
    assert found["caption", "", ""] == "a quiet siren, then a middle piano note, then a high flute note"


def test_unclear_questions_are_not_asked():
    near = asked(
        scene_of(
            Event("piano", 1.3, 1.9, loud=True, level_db=-14.0, note=60),
            Event("organ", 2.1, 2.9, loud=False, level_db=-14.0 - LOUDER_DB + 0.1, note=60 + SEMITONES - 1),
        )
    )
    assert ("third", "piano", "") not in near and ("half", "piano", "") not in near
    assert ("half", "organ", "") not in near and ("third", "organ", "") in near
    assert ("higher", "piano", "organ") not in near and ("louder", "piano", "organ") not in near


def test_captions_of_what_cannot_be_counted():
    assert caption(scene_of(Event("rain", 0, 1, True, -14.0))) == "loud rain"


def test_questions_of_a_scene_differ_and_are_worded_well():
    chooser = Chooser()
    for index in range(200):
        scene = plan(4, index, SECONDS)
        questions = chooser.choose(scene, 6, question_rng(scene))
        assert len({question.text for question in questions}) == 6
        for question in questions:
            assert question.text[0].isupper() and question.text[-1] in "?." and "{" not in question.text
            assert "footsteps" not in question.text or not {"does", "is"} & set(question.text.lower().split()) - (
                {"is"} if question.form in ("presence", "next", "louder") else set()
            )
            assert question.answer == question.answer.lower()
            assert question.task == "caption" or len(question.answer.split()) <= 3


def test_tasks_are_equally_frequent(train):
    counts = Counter(question.task for question in train)
    assert set(counts) == set(TASKS)
    assert max(counts.values()) <= 1.05 * min(counts.values())


def test_answers_of_a_form_are_equally_frequent(train):
    forms: dict[str, Counter[str]] = defaultdict(Counter)
    for question in train:
        if question.choices:
            fixed = question.form not in ("earlier", "higher", "louder")
            answer = question.answer if fixed else str(question.choices.index(question.answer))
            forms[question.form][answer] += 1
    for form, counts in forms.items():
        even = sum(counts.values()) / len(counts)
        if len(counts) <= 4:
            assert max(counts.values()) <= 1.12 * even and min(counts.values()) >= 0.85 * even, (form, counts)
        else:
            assert len(counts) == len(KINDS) and max(counts.values()) <= 2.2 * even, (form, counts)


def by_form(question: SceneQuestion) -> Hashable:
    """What a listener to the template knows: the way of asking, with the kinds struck out."""
    return question.form


def by_text(question: SceneQuestion) -> Hashable:
    """The exact words."""
    return question.text


def by_mention(question: SceneQuestion) -> Hashable:
    """The form and the last kind that is named, whatever the paraphrase."""
    words = question.text.lower().rstrip("?.").split()
    return question.form, next((word for word in reversed(words) if word in KINDS), "")


def guess(
    train: list[SceneQuestion], held_out: list[SceneQuestion], key: Callable[[SceneQuestion], Hashable], place: bool
):
    """Accuracy per task of the majority answer (or the majority place among the choices), with chance."""

    def answer_of(question: SceneQuestion) -> object:
        assert question.choices is not None
        return question.choices.index(question.answer) if place else question.answer

    votes: dict[Hashable, Counter[object]] = defaultdict(Counter)
    for question in train:
        if question.choices:
            votes[key(question)][answer_of(question)] += 1
    right, chance, asked = Counter(), Counter(), Counter()
    for question in held_out:
        if question.choices:
            vote = votes[key(question)].most_common(1)
            right[question.task] += bool(vote) and vote[0][0] == answer_of(question)
            chance[question.task] += 1 / len(question.choices)
            asked[question.task] += 1
    return {task: (right[task] / n, chance[task] / n) for task, n in asked.items()}


@pytest.mark.parametrize("place", [False, True], ids=["answer", "place"])
@pytest.mark.parametrize("key", [by_form, by_text, by_mention])
def test_guessing_without_the_audio_stays_near_chance(train, held_out, key, place):
    for task, (accuracy, chance) in guess(train, held_out, key, place).items():
        assert accuracy <= chance + 0.08, (task, accuracy, chance)


def test_a_leaky_wording_would_be_noticed(train, held_out):
    """The guesser is able to win: told the answer in the question, it does."""
    accuracy = guess(train, held_out, lambda question: (question.form, question.answer), place=False)
    assert all(right > 0.95 for right, _ in accuracy.values())


@pytest.mark.parametrize("seconds", [1.5, 2.0, 10.0])
def test_other_lengths(seconds):
    questions = questions_of(6, 80, seconds=seconds)
    assert len(questions) >= 4 * 80
    scene = plan(6, 1, seconds)
    assert len(sound(scene)) == round(seconds * RATE)
    counts = Counter(question.answer for question in questions if question.form == "count")
    assert not counts or max(counts.values()) - min(counts.values()) <= 8
