"""Peers compute what they are said to: the same function as ours where it is the same, with the same weights."""

from typing import Any

import pytest
import torch

from pal.backbone.llm import Backbone
from pal.bench.models import BenchModel, attached
from pal.bench.peers import Mllama, PlainLLM, Qwen2Audio, cross_layers, plain_lm
from pal.bench.presets import Preset, preset_of
from pal.bench.scene import BenchScene, make_scene
from pal.encoders.base import Encoder
from pal.integrations.plits import PLITS
from pal.registry import build

A = 21


@pytest.fixture(scope="module")
def preset() -> Preset:
    # windows of 8 s: 200 tokens
    small = preset_of("cpu-small")
    return small.model_copy(update={"text_tokens": 32, "encoder": {**small.encoder, "max_source_positions": 400}})


RAGGED = ((5, 16), (20, 24), (33, 48))


@pytest.fixture(scope="module")
def llm(preset: Preset) -> Backbone:
    torch.manual_seed(0)
    return Backbone.load(preset.llm).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def plain(llm: Backbone) -> Any:
    return plain_lm(llm)


def written(subject: BenchModel, scene: BenchScene, tokens: int = 4) -> list[torch.Tensor]:
    """Logits after the prompt and after each of some tokens."""
    with torch.inference_mode():
        reading = subject.read(scene)
        logits = [reading.logits_BV]
        for _ in range(tokens):
            subject.write(reading, 1)
            logits.append(reading.logits_BV)
    return logits


def same(ours: BenchModel, theirs: BenchModel, scene: BenchScene, other: BenchScene | None = None) -> None:
    torch.testing.assert_close(written(ours, scene), written(theirs, other or scene), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(ours.loss(scene), theirs.loss(other or scene), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 3])
def test_plits_is_the_plain_llm_on_the_same_rows(preset: Preset, llm: Backbone, plain: Any, batch: int) -> None:
    scene = make_scene(preset, batch, A, llm.vocab, None)
    ours = attached("plits", llm, preset)
    assert isinstance(ours.integration, PLITS)
    same(ours, PlainLLM("plain", llm, plain, ours.integration), scene)


def test_text_is_the_plain_llm(preset: Preset, llm: Backbone, plain: Any) -> None:
    scene = make_scene(preset, 2, A, llm.vocab, None)
    same(attached("text", llm, preset), PlainLLM("plain_text", llm, plain, None), scene)


def test_mllama_with_closed_gates_is_the_plain_llm_and_with_open_ones_hears(
    preset: Preset, llm: Backbone, plain: Any
) -> None:
    scene, other = (make_scene(preset, 2, tokens, llm.vocab, None) for tokens in (A, A + 1))
    peer = Mllama(llm, plain, preset)
    same(attached("text", llm, preset), peer, scene)
    (layer,) = (peer.lm.model.layers[i] for i in cross_layers(llm.n_layers))
    torch.nn.init.ones_(layer.cross_attn_attn_gate)
    first, second = written(peer, scene, 0)[0], written(peer, other, 0)[0]
    assert (first - second).abs().max() > 1e-3


@pytest.mark.parametrize("tokens", [A, 200, 450])
def test_qwen2audio_from_frames_is_qwen2audio_on_the_features(
    preset: Preset, llm: Backbone, plain: Any, tokens: int
) -> None:
    torch.manual_seed(0)
    encoder = build("encoder", {"name": "af_whisper", "architecture": preset.encoder})
    assert isinstance(encoder, Encoder)
    scene = make_scene(preset, 2, tokens, llm.vocab, encoder.eval().requires_grad_(False))
    with torch.no_grad():
        heard = scene.features()
    assert heard.x_BAE.shape == (2, tokens, preset.width)
    given = BenchScene(scene.text_BT, scene.before, scene.answer, tokens, heard, None)
    whole, parts = Qwen2Audio(llm, plain, preset, encoder), Qwen2Audio(llm, plain, preset, None)
    assert whole.own is not None and parts.own is not None
    parts.own.load_state_dict(whole.own.state_dict())
    same(whole, parts, scene, given)


@pytest.mark.parametrize("packs", [False, True])
def test_a_ragged_batch_is_its_rows_one_by_one(
    preset: Preset, llm: Backbone, plain: Any, packs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padding changes nothing, neither the peers' nor ours; and the answers' tokens count alike."""
    monkeypatch.setattr(llm, "_packs", packs)
    ragged = preset.model_copy(update={"ragged": RAGGED})
    scene = make_scene(ragged, 3, "ragged", llm.vocab, None)
    assert (scene.length, scene.audio_tokens, scene.text_tokens) == ("ragged", 33, 48)
    rows = scene.alone()
    assert [(row.audio_tokens, row.text_tokens, row.before, row.answer) for row in rows] == [
        (5, 16, 2, 4),
        (20, 24, 3, 6),
        (33, 48, 6, 12),
    ]
    plits = attached("plits", llm, preset)
    assert isinstance(plits.integration, PLITS)
    subjects: list[BenchModel] = [plits, *(attached(name, llm, preset) for name in ("text", "lal", "pal", "flamingo"))]
    if not packs:
        subjects += [PlainLLM("plain", llm, plain, plits.integration), PlainLLM("plain_text", llm, plain, None)]
        subjects += [Qwen2Audio(llm, plain, preset, None), opened(Mllama(llm, plain, preset))]
    for subject in subjects:
        together = written(subject, scene, 2)
        apart = [torch.cat(parts) for parts in zip(*(written(subject, row, 2) for row in rows), strict=True)]
        # Mllama's own masks are for its prompt alone: later rows look at padded keys, too
        steps = 1 if subject.name == "mllama" else 3
        torch.testing.assert_close(together[:steps], apart[:steps], rtol=1e-4, atol=1e-5, msg=subject.name)
        with torch.no_grad():
            losses = sum(subject.loss(row) * row.answer for row in rows) / sum(row.answer for row in rows)
            torch.testing.assert_close(subject.loss(scene), losses, rtol=1e-5, atol=1e-5, msg=subject.name)


def opened(peer: Mllama) -> Mllama:
    """With gates that let audio through."""
    for i in cross_layers(peer.llm.n_layers):
        torch.nn.init.ones_(peer.lm.model.layers[i].cross_attn_attn_gate)
    return peer


def test_peers_share_the_weights_of_the_llm(preset: Preset, llm: Backbone, plain: Any) -> None:
    shared = {id(p) for p in llm.parameters()}
    assert {id(p) for p in plain.parameters()} == shared
    mllama = Mllama(llm, plain, preset)
    theirs = {id(p) for p in mllama.lm.parameters()}
    assert shared <= theirs
    assert {id(p) for p in mllama.weights()} >= theirs
    assert {id(p) for p in Qwen2Audio(llm, plain, preset, None).weights()} >= shared


def test_cross_layers_are_those_of_llama_vision() -> None:
    assert cross_layers(32) == (3, 8, 13, 18, 23, 28, 33, 38)
    assert cross_layers(4) == (3,)
    assert cross_layers(2) == (3,)
