"""Asking with parts of the audio hidden: what is hidden, and what the drops say."""

import pytest
import torch

from pal.backbone.audio_mask import AudioMask
from pal.errors import ConfigError
from pal.evaluate import evaluate
from pal.evaluate.clip_cache import EncodedClipCache
from pal.probe.masked_eval import (
    NO_AUDIO,
    WHOLE,
    Condition,
    Example,
    MaskedAnswers,
    ProbedItem,
    ask,
    pathways,
    remarks,
    seen,
)
from pal.registry import names
from pal.types import AUDIO, EncodedClip, Tokens
from tests.models import ENCODER, noise, tiny_model
from tests.probe.listeners import listener, questions

ROW = Tokens([5, 6, AUDIO, 7, 8, 9], [0])


def heard(model, samples_N):
    features = model.ears.encode([samples_N])
    return EncodedClip(tuple(one.x_BAE[one.mask_BA] for one in features), len(samples_N) / model.sampling_rate)


def example(model, seconds=1.0):
    with torch.no_grad():
        return Example((heard(model, noise(seconds)),), ROW)


def asked(*clips, **correct):
    items = [ProbedItem(str(i), "task", "sound" if clip < 2 else "speech", clip) for i, clip in enumerate(clips)]
    return MaskedAnswers(items, [False] * len(items), {"nothing": [True] * len(items), **correct}, {}, {})


def test_drops_are_paired_and_drawn_by_clip():
    # one question right only without hiding, one only with it, one lost, one kept
    found = MaskedAnswers(
        items=[ProbedItem(str(i), "t", "sound", i // 2) for i in range(4)],
        no_audio=[False] * 4,
        correct={"nothing": [True, False, True, True], "x": [False, True, False, True]},
        same_as={},
        hidden={},
    ).drop("x")
    assert (found.n, found.whole, found.score, found.drop, found.relative) == (4, 0.75, 0.5, 0.25, 0.25 / 0.75)
    assert (found.lost, found.gained) == (2, 1)
    # the clips' mean differences are 0 and 1/2, so every draw of two clips gives 0, 1/4 or 1/2
    assert found.ci95 == (0.0, 0.5)
    assert not found.significant
    assert found.points() == "25 points (0 to 50)"


def test_what_all_clips_lose_alike_has_no_width():
    found = asked(0, 0, 1, 2, x=[False, True] + [False] * 2)
    assert found.drop("x", [2, 3]).ci95 == (1.0, 1.0)
    assert found.drop("x", [2, 3]).significant
    assert found.drop("x", found.among(domain="speech")).points() == "100 points (100 to 100)"
    assert found.drop("nothing").drop == 0.0


def test_a_condition_that_hides_the_same_has_the_others_answers():
    found = asked(0, 1, x=[False, True])
    found.same_as.update(y="x", z="nothing")
    assert found.right("y") == [False, True]
    assert found.drop("y") == found.drop("x")
    said = " ".join(remarks(found))
    assert "without effect on this model: z" in said
    assert "'y' as 'x'" in said


@pytest.mark.parametrize("name", names("integration"))
@torch.no_grad()
def test_ways_in_are_found_in_the_inputs(name):
    model = listener(name)
    found = pathways(example(model).seen(model, WHOLE))
    inputs = model.inputs([noise(1.0)], [ROW])
    rows = inputs.inputs_embeds_BTD.shape[1] > len(ROW.ids) - 1
    keys = inputs.audio_context is not None and bool(inputs.audio_context.keys)
    assert found == ["keys"] * keys + ["rows"] * rows
    assert found


@pytest.mark.parametrize("name", names("integration"))
@torch.no_grad()
def test_with_everything_hidden_clips_of_one_length_are_all_the_same(name):
    model = listener(name)
    clips = [noise(1.0, 1), noise(1.0, 2)]

    def logits(clip):
        return model.llm(model.inputs([clip], [ROW])).logits[:, -3:]

    assert not torch.allclose(logits(clips[0]), logits(clips[1]), atol=1e-3)
    with model.hiding(*NO_AUDIO.masks):
        assert torch.equal(logits(clips[0]), logits(clips[1]))
    assert not example(model).seen(model, NO_AUDIO)


@pytest.mark.parametrize("name", names("integration"))
@torch.no_grad()
def test_hiding_in_no_layer_changes_nothing(name):
    model = listener(name)

    def logits():
        return model.llm(model.inputs([noise(1.0)], [ROW])).logits

    whole = logits()
    with model.hiding(with_spans=True):
        assert torch.allclose(logits(), whole, atol=1e-5)


def test_each_stream_by_itself():
    model = tiny_model("pal_routed", encoders=[ENCODER, ENCODER])
    shown = example(model)
    whole = shown.seen(model, WHOLE)
    assert {stream for _, _, stream in whole} == {0, 1}
    left = shown.seen(model, Condition("second", (AudioMask(stream=1),)))
    assert left == {place: tokens for place, tokens in whole.items() if place[2] == 0}


@pytest.mark.parametrize("name", ["lal", "plits", "pal"])
def test_shares_of_the_time_are_those_of_each_clip(name):
    model = listener(name)
    for seconds in (0.6, 1.3):
        shown = example(model, seconds)
        whole = shown.seen(model, WHOLE)
        span = shown.clips[0].x_AE[0].shape[0]  # in tokens
        for place, tokens in whole.items():
            group = 3 if name == "pal" and place[1] == "rows" else 1
            first = min(tokens)
            for quarter in range(4):
                edges = quarter / 4 * span, (quarter + 1) / 4 * span
                hide = AudioMask(share=(quarter / 4, (quarter + 1) / 4))
                left = shown.seen(model, Condition("quarter", (hide,)))[place]
                expected = [
                    token
                    for token in tokens
                    for start in [(token - first) * group]
                    if min(start + group, span) <= edges[0] + 1e-6 or start >= edges[1] - 1e-6
                ]
                assert list(left) == expected
                assert len(left) < len(tokens)


def test_a_batch_hides_the_share_of_every_clip():
    model = listener("lal")
    clips = [noise(0.6), noise(1.2)]
    rows = [ROW, Tokens(ROW.ids, [1])]
    with torch.no_grad(), model.hiding(AudioMask(share=(0.5, 1.0))):
        (keys,) = model.inputs(clips, rows).audio_context.keys
    whole = [len(example(model, seconds).clips[0].x_AE[0]) for seconds in (0.6, 1.2)]
    assert keys.mask_BA.sum(1).tolist() == [count // 2 for count in whole]


def test_answers_are_those_of_an_evaluation(tmp_path):
    model = listener("pal")
    records = questions(tmp_path, model)
    hear = EncodedClipCache(model)
    shown = Example.of(model, records, hear)
    assert shown.clips[0].seconds == pytest.approx(0.9)  # the longest
    late = Condition("late", (AudioMask(seconds=(2.0, 3.0)),))
    keys = Condition("keys", (AudioMask(pathway="keys"),))
    layer = Condition("layer 0", (AudioMask(pathway="keys", layers=(0,)),))
    found = ask(model, records, [late, keys, layer, NO_AUDIO], shown, hear)
    assert found.correct["nothing"] == [True] * 8
    assert found.same_as == {"late": "nothing", "layer 0": "keys"}
    assert list(found.correct) == ["nothing", "keys", "everything"]
    for condition in (keys, NO_AUDIO):
        with model.hiding(*condition.masks):
            score = evaluate(model, records, no_audio=False, progress=False)
        assert found.correct[condition.name] == [item.correct for item in score.items]
    assert not all(found.right("everything"))
    assert found.hidden["nothing"] == found.hidden["late"] == 0.0
    assert found.hidden["everything"] == 1.0
    assert [item.id for item in found.items] == [record.id for record in records]
    assert [item.clip for item in found.items] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [item.domain for item in found.items] == ["sound", "speech"] * 4


def test_what_raises_counts_as_wrong_and_is_said(tmp_path):
    model = listener("lal")
    records = questions(tmp_path, model, clips=2)
    hear = EncodedClipCache(model)
    shown = Example.of(model, records, hear)
    (tmp_path / "0.wav").write_bytes(b"no sound")
    found = ask(model, records, [], shown, hear)
    assert found.right("nothing") == [False] * 2 + [True] * 2
    assert len(found.raised) == 2
    assert "2 answers raised" in remarks(found)[-1]


def test_seen_leaves_out_padding():
    model = listener("plits")
    with torch.no_grad(), model.hiding(with_spans=True):
        context = model.inputs([noise(0.5), noise(1.0)], [ROW, Tokens(ROW.ids, [1])]).audio_context
    count = len(example(model, 0.5).clips[0].x_AE[0])
    assert set(seen(context).values()) == {tuple(range(2, 2 + count))}


@pytest.mark.parametrize(
    "hide", [AudioMask(seconds=(2.0, 1.0)), AudioMask(share=(0.5, 0.5)), AudioMask(seconds=(-1.0, 1.0))]
)
def test_times_that_are_none_are_refused(hide):
    with pytest.raises(ConfigError, match="the end must lie after the start"), listener("lal").hiding(hide):
        pass
