"""`pal probe mask`: its conditions and what it says."""

from dataclasses import replace

import pytest

from pal.backbone.audio_mask import AudioMask
from pal.errors import ConfigError
from pal.evaluate.clip_cache import EncodedClipCache
from pal.probe.mask import chosen_condition, default_conditions, layer_groups, probe_mask
from pal.probe.masked_eval import WHOLE, Example
from pal.probe.probe_result import read
from pal.registry import names
from tests.models import ENCODER, tiny_model
from tests.probe.listeners import answered, listener, questions
from tests.probe.test_masked_eval import example


@pytest.mark.parametrize("name", names("integration"))
def test_default_conditions_cover_the_model(name):
    model = listener(name)
    shown = example(model)
    kinds = default_conditions(model, shown)
    whole = shown.seen(model, WHOLE)
    cells = {(*place, token) for place, tokens in whole.items() for token in tokens}
    for kind in ("pathway", "layers", "time", "all"):
        hidden = []
        for condition in kinds[kind]:
            left = shown.seen(model, condition)
            hidden.append(cells - {(*place, token) for place, tokens in left.items() for token in tokens})
        assert set().union(*hidden) == cells, kind
        if kind in ("pathway", "layers"):
            assert sum(map(len, hidden)) == len(cells), kind  # each hides what no other does
    assert kinds["encoder"] == []
    assert [condition.name for condition in kinds["layers"]] == ["layer 0", "layer 1", "layer 2"]


def test_encoders_and_tokens_without_a_time():
    model = tiny_model("pal_routed", encoders=[ENCODER, ENCODER])
    assert [c.masks for c in default_conditions(model, example(model))["encoder"]] == [
        (AudioMask(stream=0),),
        (AudioMask(stream=1),),
    ]
    model = tiny_model("lal", connector={"name": "qformer", "width": 8, "heads": 2, "layers": 1, "queries": 4})
    shown = example(model)
    assert default_conditions(model, shown)["time"] == []
    with pytest.raises(ConfigError, match="no time of their own"):
        shown.seen(model, chosen_condition(seconds=["0-1"]))


def test_layers_in_groups():
    assert layer_groups(3) == [range(1), range(1, 2), range(2, 3)]
    assert len(layer_groups(8)) == 8
    assert layer_groups(16) == [range(4), range(4, 8), range(8, 12), range(12, 16)]
    assert sum(map(len, layer_groups(22))) == 22


def test_options_narrow_down_together_and_widen_each():
    assert chosen_condition() is None
    found = chosen_condition(["keys"], [1], ["0-2", "4"], ["0-0.5", "1-2"])
    assert found.masks == (
        AudioMask("keys", 1, [0, 1, 2, 4], (0.0, 0.5)),
        AudioMask("keys", 1, [0, 1, 2, 4], (1.0, 2.0)),
    )
    assert found.name == "the keys of encoder 1 in layers 0-2 and 4 at 0 to 0.5 and 1 to 2 s"
    assert chosen_condition(layers=["1"]).masks == (AudioMask(layers=[1]),)


@pytest.mark.parametrize(
    "options, match",
    [
        ({"pathways": ["values"]}, "keys or rows"),
        ({"layers": ["2-1"]}, "FROM-TO"),
        ({"layers": ["a"]}, "FROM-TO"),
        ({"layers": ["-1"]}, "FROM-TO"),
        ({"seconds": ["2-1"]}, "with FROM less than TO"),
        ({"seconds": ["1"]}, "FROM-TO"),
        ({"seconds": ["x-y"]}, "FROM-TO"),
        ({"seconds": ["nan-nan"]}, "FROM-TO"),
    ],
)
def test_spans_that_are_none(options, match):
    with pytest.raises(ConfigError, match=match):
        chosen_condition(**options)


def test_what_the_model_does_not_have_is_refused_before_anything_is_asked(tmp_path):
    model = listener("lal")
    records = questions(tmp_path, clips=2)
    with pytest.raises(ConfigError, match="layer 3 cannot be hidden"):
        probe_mask(model, records, chosen_condition(layers=["1-7"]))
    with pytest.raises(ConfigError, match="stream 3 cannot be hidden"):
        probe_mask(model, records, chosen_condition(encoders=[3]))


def loses(record, hidden):
    """A model that hears speech by the keys, and sounds by the rows in the second half of the time."""
    for hide in hidden:
        if hide.layers is not None and 0 not in hide.layers:
            continue
        if record.task == "speech" and hide.pathway != "rows" and hide.share is None:
            return False
        if record.task == "sound" and hide.pathway != "keys" and (hide.share is None or hide.share[0] >= 0.5):
            return False
    return record.id != "3-sound"


def test_a_result(tmp_path, monkeypatch):
    model = listener("pal")
    answered(monkeypatch, loses)
    found = probe_mask(model, questions(tmp_path), seed=3)
    found.save(tmp_path / "out")
    written = read(tmp_path / "out")
    assert {picture["file"] for picture in written["pictures"]} == {"drops.png", "layers.png", "time.png"}
    assert all((tmp_path / "out" / picture["file"]).stat().st_size for picture in written["pictures"])
    by_domain = {
        (row["condition"], row["domain"]): (row["score"], row["drop"], row["ci95"])
        for row in written["tables"]["Accuracy lost by masking, by domain"]
    }
    none, all_speech = [0.0, 0.0], [1.0, 1.0]
    assert by_domain["the keys", "speech"] == (0.0, 1.0, all_speech)
    assert by_domain["the keys", "sound"] == (0.75, 0.0, none)
    assert by_domain["the audio rows", "speech"] == (1.0, 0.0, none)
    # three of four clips lose an answer: of four drawn, none but the fourth has probability 1/256
    assert by_domain["the audio rows", "sound"] == (0.0, 0.75, [0.25, 1.0])
    assert by_domain["layer 1", "sound"][1] == by_domain["layer 2", "speech"][1] == 0.0
    assert by_domain["layer 0", "speech"] == (0.0, 1.0, all_speech)
    quarters = [f"the {n} quarter" for n in ("1st", "2nd", "3rd", "4th")]
    assert [by_domain[quarter, "sound"][1] for quarter in quarters] == [0.0, 0.0, 0.75, 0.75]
    overall = {row["condition"]: row for row in written["tables"]["Accuracy lost by masking"]}
    assert list(overall) == [
        *("nothing", "the keys", "the audio rows", "layer 0", "layer 1", "layer 2"),
        *(*quarters, "everything", "no audio in the prompt"),
    ]
    keys = overall["the keys"]
    assert (keys["score"], keys["drop"], keys["relative"]) == (3 / 8, 4 / 8, 4 / 7)
    assert (keys["lost"], keys["gained"]) == (4, 0)
    assert (overall["nothing"]["score"], overall["no audio in the prompt"]["score"]) == (7 / 8, 0.0)
    assert found.reading[0].startswith("88 % of 8 questions are right with the whole audio, 0 % with all audio masked")
    assert found.reading[1] == "Masking the keys costs sound 0 points (0 to 0) and speech 100 points (100 to 100)."
    assert "masking layer 0 costs most" in found.reading[3]
    details = written["details"]
    assert details["correct"]["the keys"] == [1, 0, 1, 0, 1, 0, 0, 0]
    assert [item["id"] for item in details["items"]][-2:] == ["3-sound", "3-speech"]
    assert len(details["drops"]) == 10 * (1 + 2 + 2)


def test_one_chosen_condition_that_hides_nothing_is_said(tmp_path, monkeypatch):
    model = listener("lal")
    answered(monkeypatch, loses)
    records = questions(tmp_path, clips=2)
    found = probe_mask(model, records, chosen_condition(["rows"]))
    assert "Masks without effect on this model: the audio rows." in found.reading
    assert list(found.details["correct"]) == ["nothing", "everything"]


def test_without_clips(tmp_path):
    model = listener("lal")
    records = [replace(record, clips=()) for record in questions(tmp_path, clips=1)]
    with pytest.raises(ConfigError, match="none of the questions has a clip to mask"):
        Example.of(model, records, EncodedClipCache(model))
