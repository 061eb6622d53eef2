"""`pal probe layers`: rows are found whatever the integration, and labels are read where they were put."""

from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch

from pal.backbone.observers import residual_stream
from pal.data.manifest import Record, Turn, write_manifest
from pal.data.prompts import encode, user_turn
from pal.errors import ManifestError
from pal.probe.layers import LayerStates, collect, first_above, labels_of, probe_layers, reading, score_states
from pal.probe.linear import ProbeLabels, ProbeScore
from pal.types import TagSpan
from tests.models import noise, tiny_model, tone

KINDS = ("lal", "plits", "pal", {"name": "flamingo", "every": 2}, "lal_audio_query")


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Five clips of different length."""
    folder = tmp_path_factory.mktemp("clips")
    paths = []
    for i in range(5):
        path = folder / f"{i}.wav"
        soundfile.write(path, (noise if i % 2 else lambda s, hz: tone(s, 300.0 * (hz + 1)))(0.4 + 0.13 * i, i), 16_000)
        paths.append(str(path))
    return paths


@pytest.mark.parametrize("integration", KINDS)
@torch.no_grad()
def test_rows_are_those_of_transformers_one_clip_at_a_time(clips, integration):
    model = tiny_model(integration)
    rows = collect(model, clips, "What sound is this?", batch=3)
    tokens = encode(model.tokenizer, [user_turn("What sound is this?", 1)], [0])
    before, behind = tokens.ids.index(-1), len(tokens.ids) - 1 - tokens.ids.index(-1)
    for i, path in enumerate(clips):
        wave = torch.as_tensor(soundfile.read(path, dtype="float32")[0])
        hidden = model.llm(model.inputs([wave], [tokens]), output_hidden_states=True).hidden_states
        assert len(rows.by_layer["last"]) == len(hidden) == model.llm.n_layers + 1
        for layer, states in enumerate(hidden):
            if layer == model.llm.n_layers:
                norm = model.llm.lm.model.norm  # transformers' last is behind the final norm
                last = norm(torch.as_tensor(rows.by_layer["last"][layer][i]))
                torch.testing.assert_close(last, states[0, -1], atol=2e-4, rtol=1e-4)
                continue
            close = {"atol": 2e-4, "rtol": 1e-4}
            for name, known in (
                ("last", states[0, -1]),
                ("after", states[0, -behind:].mean(0)),
                ("before", states[0, before - 1]),
            ):
                torch.testing.assert_close(torch.as_tensor(rows.by_layer[name][layer][i]), known, **close)


def rms(x):
    return np.sqrt(np.mean(x.astype(float) ** 2))


@pytest.mark.parametrize("integration", KINDS)
def test_only_rows_behind_the_audio_differ_between_clips(clips, integration):
    model = tiny_model(integration)
    with torch.no_grad():
        for name, gate in model.integration.named_parameters():
            if "gate" in name:  # Flamingo's are shut before training
                gate.fill_(0.5)
    rows = collect(model, clips, "What sound is this?", batch=3)
    for name in ("before", "no audio"):
        for layer in rows.by_layer[name]:
            assert np.ptp(layer, axis=0).max() < 1e-5 * rms(layer)
    for name in ("last", "after"):
        assert np.ptp(rows.by_layer[name][0], axis=0).max() == 0
        assert np.ptp(rows.by_layer[name][-1], axis=0).max() > 1e-3 * rms(rows.by_layer[name][-1])


@torch.no_grad()
def test_references_are_means_over_real_tokens(clips):
    model = tiny_model()
    rows = collect(model, clips, "What sound is this?", batch=5)
    heard = model.ears.encode([torch.as_tensor(soundfile.read(clips[0], dtype="float32")[0])])
    torch.testing.assert_close(
        torch.as_tensor(rows.reference["encoder"][0]), heard[0].x_BAE[0].mean(0), atol=1e-4, rtol=1e-4
    )
    connected = model.ears.connect(heard)[0].x_BAE[0].mean(0)
    torch.testing.assert_close(torch.as_tensor(rows.reference["connector"][0]), connected, atol=1e-4, rtol=1e-4)


def test_hooks_are_gone_after_an_error(clips):
    model = tiny_model()
    tokens = [encode(model.tokenizer, [user_turn("yes", 0)], [])]
    inputs = model.integration(None, tokens, model.llm, "left")
    blocks = model.llm.lm.model.layers
    with pytest.raises(ZeroDivisionError):
        residual_stream(model.llm, inputs, lambda x: x if x is inputs.inputs_embeds_BTD else 1 / 0)
    assert not any(block._forward_hooks for block in blocks)


def planted(layer, of, n=48, width=4):
    """Rows that say the label from `layer` on."""
    rng = np.random.default_rng(1)
    truth = rng.random((n, 1)) < 0.5
    told = truth @ rng.standard_normal((1, width))
    features = [rng.standard_normal((n, width)) + 4 * told * (i >= layer) for i in range(of)]
    return LayerStates({"last": features, "before": [np.ones((n, width))] * of}), ProbeLabels("t", ("x",), truth, False)


@pytest.mark.parametrize("layer", [1, 2])
def test_the_layer_where_a_label_was_put_is_found(layer):
    rows, labels = planted(layer, of=3)
    found = score_states(rows, labels, [str(i) for i in range(48)])
    assert first_above(found.by_layer["last"], found.control["last"]) == layer
    assert first_above(found.by_layer["before"], found.control["before"]) is None
    said = list(reading(found, 2))
    assert f"labels first appear after layer {layer} of 2" in said[0]
    assert "the row before the audio is at chance in every layer" in said[-1]
    assert found.differing == 0


def test_a_leak_is_said():
    rows, labels = planted(0, of=1)
    found = score_states(LayerStates({"before": rows.by_layer["last"]}), labels, [str(i) for i in range(48)])
    (x,) = rows.by_layer["last"]
    assert found.differing == pytest.approx(np.abs(x - x[0]).max() / rms(x))
    assert any(
        "rows 'before' must be at chance, but are not in layers [0]" in sentence for sentence in reading(found, 0)
    )


def test_first_above_needs_intervals_apart():
    real = [ProbeScore(0.6, (0.4, 0.8), ()), ProbeScore(0.9, (0.7, 1.0), ())]
    assert first_above(real, [ProbeScore(0.5, (0.3, 0.6), ())] * 2) == 1
    assert first_above(real, [ProbeScore(0.5, (0.3, 0.75), ())] * 2) is None


def record(i, tags=None, answer="yes", choices=None):
    spans = None if tags is None else tuple(TagSpan(tag) for tag in tags)
    return Record(str(i), (f"{i}.wav",), (Turn("?", answer),), "t", "d", choices, spans)


def test_labels_are_tags_or_else_answers():
    some = [record(i, ["dog", "loud"] if i % 2 else ["loud"]) for i in range(20)]
    labels = labels_of("d", some)
    assert (labels.names, labels.exclusive) == (("dog",), False)  # what every clip has is no label
    answers = [record(i, answer="ab"[i % 2], choices=("a", "b")) for i in range(20)]
    labels = labels_of("d", answers)
    assert (labels.names, labels.exclusive, labels.chance) == (("a", "b"), True, 0.5)
    with pytest.raises(ManifestError, match="give more clips"):
        labels_of("d", answers[:10])


def test_clips_without_labels_are_said(clips, tmp_path):
    manifest = tmp_path / "manifest.jsonl"
    write_manifest(manifest, [replace(record(0), clips=(clips[0],))])
    with pytest.raises(ManifestError, match="no clip has labels"):
        probe_layers(tiny_model(), [manifest])
