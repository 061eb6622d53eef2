"""The plan of a curriculum: its language, its questions' truth and balance, what is held out. No program is needed."""

import re
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile

from pal.data.curriculum import digits, effects, grammar, music, plans, scenes, speech, voices
from pal.data.curriculum.digits import DigitClip
from pal.data.curriculum.midi import Note, midi, variable_length
from pal.data.curriculum.music import INSTRUMENTS, MusicClip
from pal.data.curriculum.questions import GROUP_TASKS, WORDINGS, Deck, Presence
from pal.data.curriculum.recordings import Recording
from pal.data.curriculum.scenes import SceneClip, ScenePart, Soundscape
from pal.data.curriculum.speech import SpeechClip
from pal.data.curriculum.splits import sentence_is_held_out
from pal.data.curriculum.words import plural
from pal.data.prepare import esc50, fsdd
from pal.data.synth.waves import RATE

LABELS = ("car horn", "dog", "rain", "sea waves", "siren")
NUMBERS = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6}
SPEAKERS = ("ann", "bob", "theo")


@pytest.fixture(scope="session")
def sources(tmp_path_factory) -> tuple[Path, Path]:
    """Folders of ESC-10 and of FSDD with recordings of noise: 5 labels in 5 folds, 3 speakers with 10 digits."""
    root, rng = tmp_path_factory.mktemp("sources"), np.random.default_rng(0)
    for folder in ("esc/audio", "fsdd/recordings"):
        (root / folder).mkdir(parents=True)
    rows = ["filename,fold,target,category,esc10,src_file,take"]
    for fold in range(1, 6):
        for at, label in enumerate((*LABELS, "cat")):
            name = f"{fold}-{at}-A-{at}.wav"
            rows.append(f"{name},{fold},{at},{label.replace(' ', '_')},{label != 'cat'},{at},A")
            soundfile.write(root / "esc/audio" / name, rng.uniform(-0.1, 0.1, RATE * 5 // 2), RATE // 2)
    (root / "esc/esc50.csv").write_text("\n".join(rows) + "\n")
    for digit in range(10):
        for speaker in SPEAKERS:
            samples = rng.uniform(-0.3, 0.3, 2400 + 300 * digit)
            soundfile.write(root / f"fsdd/recordings/{digit}_{speaker}_0.wav", samples, 8000)
    return root / "esc", root / "fsdd"


@pytest.fixture(scope="module")
def planned(sources) -> plans.Curriculum:
    return plans.plan(3, 700, *sources)


def training(planned: plans.Curriculum, kind: type) -> list:
    return [clip for clips in planned.training.values() for clip in clips if isinstance(clip, kind)]


def every_clip(planned: plans.Curriculum) -> list[plans.Clip]:
    return [clip for part in (planned.training, planned.held_out) for clips in part.values() for clip in clips]


# The language ------------------------------------------------------------------------------------------------


def test_grammar_is_large_and_its_sentences_are_of_2_to_12_known_words():
    rng = np.random.default_rng(0)
    drawn = [grammar.sentence(rng) for _ in range(30_000)]
    assert len({one.text for one in drawn}) >= 20_000
    known = set(grammar.vocabulary())
    assert len(known) >= 1000 and all(re.fullmatch("[a-z]+", word) for word in known)
    assert {word for one in drawn for word in one.words} <= known
    lengths = Counter(len(one.words) for one in drawn)
    assert min(lengths) == 2 and max(lengths) <= 12
    assert sum(lengths[n] for n in range(3, 9)) > 0.8 * len(drawn)


def test_requests_say_what_is_asked_for_and_vowels_have_an():
    rng = np.random.default_rng(1)
    request = grammar.fill("please bring me [a {colour} {thing}] now", "request", rng)
    assert request.text == f"please bring me {request.asked_for} now"
    assert request.asked_for.split()[0] in ("a", "an") and len(request.asked_for.split()) == 3
    assert grammar.fill("a elephant", "statement", rng).text == "an elephant"
    assert grammar.fill("a uniform", "statement", rng).text == "a uniform"
    assert grammar.fill("a cat", "statement", rng).asked_for is None


@pytest.mark.parametrize(
    ("one", "many"), [("cup", "cups"), ("box", "boxes"), ("city", "cities"), ("mouse", "mice"), ("key", "keys")]
)
def test_plurals(one, many):
    assert plural(one) == many


def test_a_word_that_sounds_like_a_spoken_one_is_not_asked_about_as_absent():
    for word in ("too", "two", "rain", "trains", "in"):
        assert speech.confusable(word, ["two", "train"])
    assert not speech.confusable("three", ["two", "train"])
    # "a" is a part of most words, and yet not confused with them
    assert not speech.confusable("banana", ["a"])


# Truth of the questions, derived again from what is played ------------------------------------------------------


def truth_of_scene(clip: SceneClip) -> dict[str, str]:
    names = [part.recording.path.name.split("-") for part in sorted(clip.content.parts, key=lambda part: part.start)]
    order = [LABELS[int(name[1])] for name in names]
    found = {"classification": order[0], "first sound": order[0], "last sound": order[-1]}
    found["sound count"] = next(word for word, number in NUMBERS.items() if number == len(set(order)))
    found["sounds at once"] = ", ".join(sorted(set(order)))
    found["sounds in order"] = ", ".join(label for at, label in enumerate(order) if label not in order[:at])
    return found


def truth_of_digits(clip: DigitClip) -> dict[str, str]:
    words = [fsdd.DIGITS[int(one.path.name[0])] for one in clip.content.recordings]
    count = next(word for word, number in NUMBERS.items() if number == len(words))
    return {
        "spoken digit": words[0],
        "digits": " ".join(words),
        "digit count": count,
        "first digit": words[0],
        "last digit": words[-1],
    }


def truth_of_speech(clip: SpeechClip) -> dict[str, str]:
    words = clip.content.sentence.text.split(" ")
    found = {"transcription": " ".join(words), "first word": words[0], "last word": words[-1]}
    if len(words) <= 6:
        found["word count"] = ["one", "two", "three", "four", "five", "six"][len(words) - 1]
    return found


def truth_of_music(clip: MusicClip) -> dict[str, str]:
    notes = sorted(clip.content.notes, key=lambda note: note.start)
    by_program = {program: name for name, one in INSTRUMENTS.items() for program in one.programs}
    names = list(dict.fromkeys(by_program[note.program] for note in notes))
    gaps = [two.start - one.start for one, two in pairwise(notes)]
    found = {"instruments in order": ", ".join(names), "instruments at once": ", ".join(sorted(names))}
    found |= {"instrument": names[0], "instrument family": INSTRUMENTS[names[0]].family}
    found["up or down"] = "up" if notes[-1].pitch > notes[0].pitch else "down"
    found["higher or lower"] = "higher" if notes[1].pitch > notes[0].pitch else "lower"
    found["tempo"] = "slow" if max(gaps) > 0.4 else "fast"
    if len(notes) <= 6:
        found["note count"] = ["one", "two", "three", "four", "five", "six"][len(notes) - 1]
    return found


TRUTH = {SceneClip: truth_of_scene, DigitClip: truth_of_digits, SpeechClip: truth_of_speech, MusicClip: truth_of_music}


def test_every_answer_is_true(planned):
    seen = set()
    for clip in every_clip(planned):
        truth = TRUTH[type(clip)](clip)
        present = " ".join(
            truth[key] for key in ("sounds at once", "digits", "transcription", "instruments at once") if key in truth
        )
        for question in clip.questions:
            seen.add(question.task)
            if question.about is not None:
                if question.task == "instrument present":  # an electric piano is no piano
                    there = question.about in present.split(", ")
                else:
                    there = re.search(rf"(^|, | ){question.about}($|,| )", present) is not None
                assert question.answer == ("yes" if there else "no"), (question, present)
            elif question.task == "request":
                assert question.answer in truth["transcription"] and clip.content.sentence.kind == "request"
            else:
                assert question.answer == truth[question.task], (question, clip.content)
            assert question.choices is None or question.answer in question.choices
    assert seen == set(WORDINGS) == {task for tasks in GROUP_TASKS.values() for task in tasks}


def test_music_is_as_its_answers_need_it(planned):
    for clip in training(planned, MusicClip):
        tasks, notes = {question.task for question in clip.questions}, clip.content.notes
        for note in notes:
            name = next(name for name, one in INSTRUMENTS.items() if note.program in one.programs)
            assert INSTRUMENTS[name].low <= note.pitch <= INSTRUMENTS[name].high
        if tasks & {"up or down", "higher or lower", "note count"}:
            steps = [two.pitch - one.pitch for one, two in pairwise(notes)]
            assert 0 not in steps
            assert "up or down" not in tasks or len({step > 0 for step in steps}) == 1
            assert "higher or lower" not in tasks or (len(notes) == 2 and abs(steps[0]) >= 3)
        assert "instruments at once" not in tasks or notes[0].start == min(
            n.start for n in notes if n.program != notes[0].program
        )


# Balance -----------------------------------------------------------------------------------------------------


def test_no_answer_of_a_closed_task_is_more_frequent_than_the_others(planned):
    answers, choices = defaultdict(Counter), {}
    for clips in planned.training.values():
        for question in (question for clip in clips for question in clip.questions):
            if question.choices is not None:
                answers[question.task][question.answer] += 1
                choices[question.task] = len(question.choices)
    assert len(answers) == 19
    for task, counted in answers.items():
        # at this small size, an answer may also be two clips ahead, each of which has at most three such questions
        even = counted.total() / choices[task]
        assert counted.most_common(1)[0][1] <= max(1.1 * even, even + 6), task


def test_what_is_asked_about_does_not_tell_whether_it_is_there(planned):
    for clips in planned.training.values():
        surplus = Counter()
        for question in (question for clip in clips for question in clip.questions if question.about):
            surplus[question.about] += 1 if question.answer == "yes" else -1
        assert surplus and abs(surplus.total()) <= 10
        assert sum(abs(one) for one in surplus.values()) <= max(2 * len(surplus), 10)


@pytest.mark.parametrize("task", ["sound count", "digit count", "word count", "note count"])
def test_length_of_a_clip_does_not_tell_how_many(planned, task):
    def seconds(clip: plans.Clip) -> float:
        if isinstance(clip, SceneClip):
            return max(part.start + part.seconds for part in clip.content.parts)
        if isinstance(clip, DigitClip):
            spoken = [soundfile.info(one.path).duration for one in clip.content.recordings]
            return sum(spoken) + sum(clip.content.silences)
        return clip.content.length if isinstance(clip, SpeechClip) else clip.content.seconds

    pairs = []
    for clip in (clip for clips in planned.training.values() for clip in clips):
        answers = {question.answer for question in clip.questions if question.task == task}
        pairs += [(seconds(clip), NUMBERS[answer]) for answer in answers]
    assert len(pairs) > 20
    assert abs(np.corrcoef(np.array(pairs).T)[0, 1]) < 0.35
    assert max(length for length, _ in pairs) <= 10


def test_every_wording_of_the_readers_is_in_training(planned):
    asked = {question.text for clips in planned.training.values() for clip in clips for question in clip.questions}
    assert {*esc50.QUESTIONS, *fsdd.QUESTIONS} <= asked
    texts = [text for wordings in WORDINGS.values() for text in wordings]
    # presence of a sound and of an instrument are asked alike
    assert len(texts) == len(set(texts)) + len(WORDINGS["sound present"])
    assert all(("{0}" in text) == task.endswith("present") for task, all_ in WORDINGS.items() for text in all_)


def test_transcription_is_the_most_frequent_task_of_speech(planned):
    tasks = Counter(question.task for clip in training(planned, SpeechClip) for question in clip.questions)
    assert tasks.most_common(1)[0][0] == "transcription"


def test_lists_are_made_of_the_words_that_sentences_lack():
    clips = speech.plan(np.random.default_rng(0), 2000)
    met = {word for clip in clips for word in clip.content.sentence.words}
    assert len(met) > 0.98 * len(grammar.vocabulary())


# Held out ----------------------------------------------------------------------------------------------------


def test_held_out_parts_share_nothing_with_training(planned):
    def files(clips):
        return {one.path for clip in clips for one in clip.content.recordings}

    def sounds(clips):
        return {part.recording.path for clip in clips for part in clip.content.parts}

    assert {path.name[0] for path in sounds(planned.training["scenes"])} == {"1", "2", "3"}
    assert {path.name[0] for path in sounds(planned.held_out["scenes"])} == {"4"}
    assert {path.name.split("_")[1] for path in files(planned.training["digits"])} == {"ann", "bob"}
    assert {path.name.split("_")[1] for path in files(planned.held_out["digits"])} == {"theo"}
    judged = [Path(record.clips[0]).name for records in planned.recordings.values() for record in records]
    assert len(judged) == len(LABELS) + 10 and all(name[0] == "4" or "theo" in name for name in judged)
    old, new = (
        {clip.content.sentence.text for clip in part["speech"] if not clip.content.is_list}
        for part in (planned.training, planned.held_out)
    )
    assert len(new) == len(planned.held_out["speech"]) and not old & new
    assert not any(sentence_is_held_out(text) for text in old) and all(sentence_is_held_out(text) for text in new)
    assert max(len(text.split()) for text in new) <= 8
    fonts = [{clip.content.font for clip in part["music"]} for part in (planned.training, planned.held_out)]
    assert [len(font) for font in fonts] == [1, 1] and fonts[0] != fonts[1]


def test_held_out_voices_share_neither_name_nor_variant_with_training(planned):
    old, new = (
        {
            (clip.content.voice.program, name)
            for clip in part["speech"]
            for name in (clip.content.voice.name, clip.content.voice.variant)
        }
        for part in (planned.training, planned.held_out)
    )
    assert len({clip.content.voice.name for clip in planned.held_out["speech"]}) == 3
    assert old & new == {("flite", "")}
    assert {voice.program for voice in voices.held_out_voices()} == {"flite", "espeak-ng"}
    assert not {"rms", "en-us-nyc", "en-gb-x-gbclan"} & {*voices.FLITE_VOICES, *voices.ESPEAK_ACCENTS}


def test_held_out_clips_are_unchanged_and_asked_in_the_plain_wording(planned):
    for clip in (clip for clips in planned.held_out.values() for clip in clips):
        done = clip.effects
        assert (done.reverb_s, done.eq_db, done.lowpass_hz, done.noise_db) == (None,) * 4
        for question in clip.questions:
            plain = re.escape(WORDINGS[question.task][0]).replace(r"\{0\}", ".+")
            assert re.fullmatch(plain, question.text)


def test_plan_depends_on_the_seed_alone(sources):
    first, again, other = (plans.plan(seed, 60, *sources, held_out=0.05) for seed in (1, 1, 2))
    assert plans.digest(first) == plans.digest(again) != plans.digest(other)
    alone = plans.plan(1, 60, None, None, held_out=0.05)
    assert set(alone.training) == {"speech", "music"} and not alone.recordings
    assert alone.training["speech"] == first.training["speech"]


def test_a_group_has_its_share_of_the_clips(planned):
    sizes = {group: len(clips) for group, clips in planned.training.items()}
    assert sizes == {"scenes": 140, "digits": 154, "speech": 280, "music": 126}


# Sound -------------------------------------------------------------------------------------------------------


def test_midi_file_is_as_written_by_hand():
    notes = [Note(56, 60, 0.0, 0.5, 100), Note(0, 64, 0.5, 1.0, 90)]
    # channel 0 has program 0, channel 1 has 56; 960 ticks a second; 480 is 0x83 0x60
    track = (
        b"\x00\xc0\x00" b"\x00\xc1\x38"
        b"\x00\x91\x3c\x64" b"\x83\x60\x81\x3c\x00" b"\x00\x90\x40\x5a" b"\x83\x60\x80\x40\x00"
        b"\x87\x40\xb0\x7b\x00" b"\x00\xb1\x7b\x00" b"\x00\xff\x2f\x00"
    )  # fmt: skip
    header = b"MThd\x00\x00\x00\x06\x00\x00\x00\x01\x01\xe0"
    assert midi(notes, 2.0) == header + b"MTrk" + len(track).to_bytes(4, "big") + track


@pytest.mark.parametrize(
    ("number", "written"), [(0, "00"), (0x7F, "7f"), (0x80, "8100"), (0x3FFF, "ff7f"), (0x4000, "818000")]
)
def test_numbers_of_variable_length_as_in_the_midi_standard(number, written):
    assert variable_length(number).hex() == written


def test_deck_deals_every_card_once_a_round():
    deck = Deck("abcd", np.random.default_rng(0))
    dealt = [deck.deal() for _ in range(12)]
    assert Counter(dealt) == Counter("abcd" * 3) and {*dealt[:4]} == {*"abcd"}
    assert deck.deal_other("a", "b", "c") == "d"
    assert Counter(deck.deal() for _ in range(3)) == Counter("abc")
    with pytest.raises(ValueError, match="taken"):
        deck.deal_other("a", "b", "c", "d")


def test_presence_evens_out_what_is_asked():
    presence = Presence(np.random.default_rng(0))
    asked = [presence.pick(["dog"], ["cat", "cow"]) for _ in range(40)]
    assert Counter(answer for _, answer in asked) == {"yes": 20, "no": 20}
    assert {thing for thing, answer in asked if answer == "yes"} == {"dog"}
    assert Counter(thing for thing, answer in asked if answer == "no") == {"cat": 10, "cow": 10}


def test_effects_keep_length_and_peak_and_set_the_level():
    x_N = np.random.default_rng(0).uniform(-0.5, 0.5, RATE).astype(np.float32)
    done = effects.Effects(1, -20.0, 0.3, 6.0, (3.0,) * 9, 4000.0, 20.0)
    one_N, two_N = effects.apply(x_N, done), effects.apply(x_N, done)
    assert np.array_equal(one_N, two_N) and len(one_N) == RATE
    assert 20 * np.log10(np.sqrt(np.mean(np.square(one_N)))) == pytest.approx(-20, abs=0.5)
    assert np.abs(effects.apply(x_N, effects.Effects(1, 3.0))).max() == pytest.approx(effects.PEAK, rel=1e-3)
    assert np.array_equal(effects.apply(x_N, effects.Effects(0, None)), x_N)


def test_reverberation_falls_by_60_db_in_its_time_behind_the_direct_sound():
    x_N = np.zeros(RATE, np.float32)
    x_N[0] = 1
    y_N = effects.reverberate(x_N, np.random.default_rng(0), 0.4, 10.0)
    assert y_N[0] == pytest.approx(1, abs=0.01)
    assert 10 * np.log10(np.sum(np.square(y_N[1:]))) == pytest.approx(-10, abs=0.3)
    early, late = (np.sqrt(np.mean(np.square(y_N[round(s * RATE) : round((s + 0.05) * RATE)]))) for s in (0.05, 0.25))
    assert 20 * np.log10(early / late) == pytest.approx(30, abs=3)
    assert np.abs(y_N[round(0.42 * RATE) :]).max() < 1e-4


def tone(path: Path, hz: float, seconds: float, quiet_until: float = 0.0) -> Recording:
    t_N = np.arange(round(seconds * RATE)) / RATE
    soundfile.write(path, 0.3 * np.sin(2 * np.pi * hz * t_N) * (t_N >= quiet_until), RATE)
    return Recording(path, path.stem, "ann")


def loudest_hz(x_N) -> float:
    return float(np.argmax(np.abs(np.fft.rfft(x_N))) * RATE / len(x_N))


def test_parts_of_a_scene_are_where_they_should_be_and_loud(tmp_path):
    low, high = tone(tmp_path / "low.wav", 500, 5, quiet_until=3.5), tone(tmp_path / "high.wav", 2000, 5)
    joined = Soundscape((ScenePart(low, 0.0, 1.0, 1), ScenePart(high, 1.2, 1.0, 2)), joined=True)
    x_N = scenes.render(joined)
    assert len(x_N) == round(2.2 * RATE)
    assert loudest_hz(x_N[:RATE]) == pytest.approx(500, abs=5) and not x_N[RATE : round(1.2 * RATE)].any()
    assert loudest_hz(x_N[round(1.2 * RATE) :]) == pytest.approx(2000, abs=5)
    # the piece with the sound was found
    assert np.mean(np.square(x_N[:RATE])) > 0.5 * np.mean(np.square(x_N[round(1.2 * RATE) :]))
    whole = Soundscape((ScenePart(high, 0.0, 5.0, 1),), joined=True)
    assert len(scenes.render(whole)) == 5 * RATE


def test_digits_follow_each_other_with_their_silences(tmp_path):
    one, two = tone(tmp_path / "one.wav", 400, 0.5), tone(tmp_path / "two.wav", 1000, 0.5)
    x_N = digits.render(digits.SpokenDigits((one, two), (0.1, 0.2, 0.3), 1.0))
    assert len(x_N) == round(1.6 * RATE)
    sounding = np.flatnonzero(np.abs(x_N) > 0.05) / RATE
    assert sounding.min() == pytest.approx(0.1, abs=0.02) and sounding.max() == pytest.approx(1.3, abs=0.02)
    assert loudest_hz(x_N[round(0.1 * RATE) : round(0.6 * RATE)]) == pytest.approx(400, abs=5)
    assert loudest_hz(x_N[round(0.8 * RATE) : round(1.3 * RATE)]) == pytest.approx(1000, abs=5)
    faster_N = digits.render(digits.SpokenDigits((one, two), (0.1, 0.2, 0.3), 1.25))
    assert len(faster_N) == pytest.approx(1.28 * RATE, abs=20)


def test_silence_around_speech_is_cut_away():
    x_N = np.zeros(RATE, np.float32)
    x_N[4800:8000] = 0.2
    assert len(voices.trimmed(x_N)) == 3200 + 2 * 320
    assert len(voices.trimmed(np.zeros(800, np.float32))) == 800


def test_melody_direction():
    def notes(*pitches):
        return tuple(Note(0, pitch, at, at + 0.5) for at, pitch in enumerate(pitches))

    assert [music.goes(notes(*pitches)) for pitches in ((60, 62, 65), (65, 62, 60), (60, 65, 62))] == [
        "up",
        "down",
        None,
    ]
