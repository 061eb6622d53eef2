"""`pal probe depth`: restrictions, and what they cost by other means than counting."""

from types import SimpleNamespace

import pytest
import torch

from pal.probe.depth import AnswerCost, Restriction, cost, depths, probe_depth, windows
from pal.probe.masked_eval import NO_AUDIO, WHOLE, Example
from pal.probe.probe_result import read
from pal.registry import names
from pal.types import AUDIO, Tokens
from tests.models import noise
from tests.probe.listeners import answered, listener, questions
from tests.probe.test_masked_eval import example, heard

WORDS = 5


def first_in_line(model):
    """A clip, then all the words: every query sees all of the audio."""
    with torch.no_grad():
        return Example((heard(model, noise(1.0)),), Tokens([AUDIO, *range(4, 4 + WORDS)], [0]))


def layer_flops(llm, rows, keys=0):
    """Of one layer's products: rows through all projections and the feed-forward network, and their attention."""
    D, H, G, C, F = llm.width, llm.heads, llm.kv_heads, llm.head_width, llm.ffn_width
    return 2 * rows * (2 * D * H * C + 2 * D * G * C + 3 * D * F) + 4 * H * C * rows * (rows + keys)


@pytest.mark.parametrize(
    "total, expected",
    [
        (3, {"1/4, 1/3": 1, "1/2": 2, "all": 3}),
        (4, {"1/4, 1/3": 1, "1/2": 2, "all": 4}),
        (16, {"1/4": 4, "1/3": 5, "1/2": 8, "all": 16}),
        (1, {"1/4, 1/3, 1/2, all": 1}),
    ],
)
def test_depths_are_rounded_as_layers_are_and_equal_ones_are_one(total, expected):
    found = depths(SimpleNamespace(n_layers=total))
    assert {name: one.layers for name, one in found.items()} == {name: tuple(range(n)) for name, n in expected.items()}


def test_windows_slide_by_a_layer():
    assert [one.layers for one in windows(SimpleNamespace(n_layers=4))] == [(0,), (1,), (2,), (3,)]
    found = windows(SimpleNamespace(n_layers=8), "rows")
    assert [one.layers for one in found] == [(i, i + 1) for i in range(7)]
    assert found[3].name == "rows in layers 3 to 4"


def test_a_restriction_hides_all_other_layers():
    (mask,) = Restriction((1, 2), "keys").condition(4).masks
    assert (mask.pathway, mask.layers) == ("keys", (0, 3))
    assert Restriction((0, 1)).condition(2).masks == ()


@pytest.mark.parametrize("name", names("integration"))
@torch.no_grad()
def test_restricted_to_the_layers_it_has_a_model_is_itself(name):
    model = listener(name)
    shown = example(model)
    layers = sorted({layer for layer, _, _ in shown.seen(model, WHOLE)})

    def logits():
        return model.llm(model.inputs([noise(1.0)], [shown.row])).logits

    whole = logits()
    with model.hiding(*Restriction(tuple(layers)).condition(3).masks):
        assert torch.allclose(logits(), whole, atol=1e-5)
    assert shown.seen(model, Restriction(tuple(layers)).condition(3)) == shown.seen(model, WHOLE)


def test_keys_that_no_layer_sees_are_neither_made_nor_kept():
    model = listener("lal")
    shown, llm = first_in_line(model), model.llm
    A, E = shown.clips[0].x_AE[0].shape
    one, three = (cost(model, shown, Restriction(tuple(range(n))).condition(3)) for n in (1, 3))
    # P_l is two linear layers; then k and v of every token, and every word's attention to all of them
    making = 2 * A * (E * llm.width + llm.width**2 + 2 * llm.width * llm.kv_heads * llm.head_width)
    attention = 4 * llm.heads * llm.head_width * WORDS * A
    assert three.flops - one.flops == 2 * (making + attention)
    each = A * 2 * llm.kv_heads * llm.head_width * 4
    assert (one.bytes, three.bytes) == (each, 3 * each)
    assert (one.flops_least, one.bytes_least) == (one.flops, one.bytes)  # there are no rows
    nothing = cost(model, shown, NO_AUDIO)
    assert (nothing.bytes, one.flops - nothing.flops) == (0, making + attention)


def test_rows_run_on_where_nothing_sees_them():
    model = listener("plits")
    shown, llm = first_in_line(model), model.llm
    A = len(shown.clips[0].x_AE[0])
    whole, one, middle = (cost(model, shown, Restriction(layers).condition(3)) for layers in ((0, 1, 2), (0,), (1,)))
    assert whole.flops == one.flops == middle.flops == whole.flops_least
    saved = layer_flops(llm, A + WORDS) - layer_flops(llm, WORDS)
    assert one.flops - one.flops_least == 2 * saved
    assert middle.flops - middle.flops_least == saved  # layer 1 takes what layer 0 made of the rows
    each = A * 2 * llm.kv_heads * llm.head_width * 4
    assert (whole.bytes, one.bytes, one.bytes_least, middle.bytes_least) == (3 * each, 3 * each, each, each)


def test_both_ways_in_have_their_cost():
    model = listener("pal")
    shown, llm = first_in_line(model), model.llm
    A = len(shown.clips[0].x_AE[0])
    S = -(-A // 3)
    each = 2 * llm.kv_heads * llm.head_width * 4
    keys_in = {layer for layer, pathway, _ in shown.seen(model, WHOLE) if pathway == "keys"}
    assert keys_in == {0}
    found = cost(model, shown, Restriction((1, 2)).condition(3))
    assert (found.bytes, found.bytes_least) == (3 * S * each, 2 * S * each)
    found = cost(model, shown, Restriction((0,)).condition(3))
    assert (found.bytes, found.bytes_least) == ((3 * S + A) * each, (S + A) * each)
    assert isinstance(found, AnswerCost)
    assert found.flops - found.flops_least == 2 * (layer_flops(llm, S + WORDS) - layer_flops(llm, WORDS))


def needs_layer_0(record, hidden):
    return not any(hide.layers is None or 0 in hide.layers for hide in hidden) or record.id == "0-speech"


def test_a_result(tmp_path, monkeypatch):
    model = listener("pal")
    answered(monkeypatch, needs_layer_0)
    found = probe_depth(model, questions(tmp_path), alone=True)
    found.save(tmp_path / "out")
    written = read(tmp_path / "out")
    assert {picture["file"] for picture in written["pictures"]} == {
        *("depth.png", "depth-keys.png", "depth-rows.png", "window.png", "window-keys.png", "window-rows.png"),
        "cost.png",
    }
    same_as = written["details"]["same_as"]
    assert same_as["audio in layers 0 to 2"] == "nothing"
    assert same_as["keys in layer 0"] == "nothing"  # they are nowhere else
    assert same_as["keys in layer 2"] == "keys in layer 1"
    firsts = written["tables"]["Audio in the first layers"]
    assert [row["depth"] for row in firsts] == ["none", "1/4, 1/3", "1/2", "all"]
    assert [row["score"] for row in firsts] == [1 / 8, 1.0, 1.0, 1.0]
    assert (firsts[-1]["drop"], firsts[-1]["drop ci95"]) == (0.0, [0.0, 0.0])
    assert firsts[0]["drop"] == 7 / 8
    sliding = written["tables"]["Audio in a window of layers"]
    assert [row["visible_in"] for row in sliding] == [f"audio in layer {i}" for i in range(3)]
    assert [row["score"] for row in sliding] == [1.0, 1 / 8, 1 / 8]
    by_domain = {(row["visible_in"], row["domain"]): row["score"] for row in written["tables"]["By domain"]}
    assert (by_domain["audio in layer 1", "sound"], by_domain["audio in layer 1", "speech"]) == (0.0, 0.25)
    costs = written["details"]["costs"]
    assert costs["audio in layers 0 to 2"] == costs["nothing"]
    assert firsts[1]["gflops_least"] == costs["audio in layer 0"]["flops_least"] / 1e9
    assert any("pal ablate RECIPE --axis depth" in sentence for sentence in found.reading)
    assert [title for title in written["tables"] if "alone" in title]


def test_where_audio_comes_in_one_way_there_is_nothing_to_restrict_alone(tmp_path, monkeypatch):
    answered(monkeypatch, needs_layer_0)
    found = probe_depth(listener("lal"), questions(tmp_path, clips=1), alone=True)
    assert not [title for title in found.tables if "alone" in title]
