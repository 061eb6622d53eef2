"""What is hidden from queries, and what a watch is shown, against the reference in plain matmuls."""

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

import pal
from pal.backbone.audio_mask import AudioMask
from pal.errors import ConfigError
from pal.types import AUDIO, AudioFeatures, Batch, Tokens
from tests.identities.models import (
    INTEGRATIONS,
    PLACEMENTS,
    STRIDE,
    conversation,
    expected_logits,
    features,
    make_backbone,
    make_integration,
    opened,
    shared,
)
from tests.identities.reference import Decoder
from tests.models import noise, tiny_model, tone

LENGTHS = (7, 11)
"""Tokens of the clips, 0.04 s each."""

every_family = pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma3"])
every_integration = pytest.mark.parametrize("name", INTEGRATIONS)

HIDES = {
    "keys": AudioMask(pathway="keys"),
    "rows": AudioMask(pathway="rows"),
    "a layer": AudioMask(layers=(1,)),
    "later layers": AudioMask(layers=range(1, 3)),
    "a span": AudioMask(seconds=(0.1, 0.22)),
    "a span of keys in a layer": AudioMask(pathway="keys", layers=(0,), seconds=(0.0, 0.1)),
    "another stream": AudioMask(stream=1),
}


class Watching:
    """Keeps everything it is shown."""

    def __init__(self, rows_BN):
        self.rows_BN = rows_BN
        self.seen = {}
        self.cross = {}

    def attended(self, layer, weights):
        self.seen[layer] = weights

    def crossed(self, layer, which, weights_BHNA):
        self.cross[layer] = weights_BHNA


def hidden_entities(what, clips, layer, group):
    """Whether each audio entity of a conversation, a group of so many tokens each, is hidden in a layer."""
    out = []
    for clip in clips:
        for i in range(math.ceil(LENGTHS[clip] / group)):
            start, end = i * group * 0.04, min((i + 1) * group, LENGTHS[clip]) * 0.04
            timely = what.seconds is None or (start < what.seconds[1] - 1e-6 and end > what.seconds[0] + 1e-6)
            out.append(timely and what.stream in (None, 0) and (what.layers is None or layer in what.layers))
    return out


def hiding(what, name, row):
    """The reference's `hidden` for one conversation."""

    def hidden(layer, which):
        if (which == "rows") == (what.pathway == "keys") and what.pathway is not None:
            return torch.zeros(0, dtype=torch.bool)
        if which != "rows":
            return torch.tensor(hidden_entities(what, row.clips, layer, 1))
        group = {"plits": 1, **dict.fromkeys(("pal", "pal_slow", "pal_gated", "pal_together"), STRIDE)}.get(name)
        clips = iter(row.clips)
        flags = []
        for token in row.ids:
            if token != AUDIO:
                flags.append(False)
            elif group:
                flags += hidden_entities(what, [next(clips)], layer, group)
        return torch.tensor(flags)

    return hidden


TURNING = ["llama", "mistral", "qwen3", "gemma3"]
HIDDEN = [
    (TURNING[(i + j + more) % 4], name, which)
    for i, name in enumerate(INTEGRATIONS)
    for j, which in enumerate(HIDES)
    for more in (0, 1)
]
"""What is hidden and every integration, with a family that has windows and one that has none, in turn."""


@pytest.mark.covering(2)
@pytest.mark.parametrize(("family", "name", "which"), HIDDEN)
@torch.no_grad()
def test_what_is_hidden_is_not_seen(family, name, which):
    llm, integration = shared(family, name)
    what, audio = HIDES[which], features(*LENGTHS)
    rows = [conversation(PLACEMENTS[place]) for place in ("two", "middle", "none")]
    inputs = integration(audio, rows, llm, "left", with_spans=True)
    full = llm(inputs).logits
    logits = llm(replace(inputs, audio_context=inputs.audio_context.without(what))).logits
    changed = False
    for at, row in enumerate(rows):
        decoder = Decoder(llm.lm.config, llm.lm.state_dict())
        decoder.hidden = hiding(what, name, row)
        text = inputs.attention_mask_BT[at].bool() & ~inputs.audio_context.audio_rows_BT[at]
        expected = expected_logits(llm, integration, row, audio, decoder=decoder)
        torch.testing.assert_close(logits[at][text].double(), expected, atol=2e-4, rtol=2e-4)
        changed |= bool((logits[at][text] - full[at][text]).abs().max() > 1e-3)
    touched = [layer for layer in range(3) for part in ("rows", "keys") if _touches(what, name, layer, part)]
    assert changed == bool(touched)


def _touches(what, name, layer, part):
    """Whether the integration has such audio in the layer for the hide to take away."""
    name = name.removesuffix("_gated").removesuffix("_together")
    has = {"plits": ("rows",), "pal": ("rows", "keys"), "pal_slow": ("rows", "keys")}.get(name, ("keys",))
    layers = {"lal_first": (0,), "pal": (0,), "pal_slow": (0,), "lal_some": (0, 2), "flamingo": (1,)}.get(
        name, (0, 1, 2)
    )
    here = part in has and (part == "rows" or layer in layers)
    return here and what.stream is None and what.pathway in (None, part) and layer in (what.layers or range(3))


@pytest.mark.covering(1)
@every_integration
@every_family
@torch.no_grad()
def test_a_watch_sees_the_softmax_of_every_layer(family, name):
    llm, integration = shared(family, name)
    audio = features(*LENGTHS)
    rows = [conversation(PLACEMENTS[place]) for place in ("two", "turns", "middle")]
    inputs = integration(audio, rows, llm, "left", with_spans=True)
    T = inputs.position_ids_BT.shape[1]
    observer = Watching(torch.arange(T).expand(len(rows), T))
    shown = llm(replace(inputs, audio_context=replace(inputs.audio_context, observer=observer))).logits
    assert torch.equal(shown, llm(inputs).logits)
    for at, row in enumerate(rows):
        decoder = Decoder(llm.lm.config, llm.lm.state_dict())
        expected_logits(llm, integration, row, audio, decoder=decoder)
        real = inputs.attention_mask_BT[at].bool()
        for layer in range(3):
            weights = observer.seen[layer]
            parts = [weights.rows_BHNK[at][:, real][..., real]]
            for i, keys_BHNA in weights.keys_BHNA.items():
                parts.append(keys_BHNA[at][:, real][..., inputs.audio_context.keys[i].mask_BA[at]])
            ours = torch.cat(parts, -1).double()
            torch.testing.assert_close(ours, decoder.weights[layer], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(ours.sum(-1), torch.ones_like(ours[..., 0]), atol=1e-5, rtol=0)
        for layer, cross_BHNA in observer.cross.items():
            ours = cross_BHNA[at][:, real][..., inputs.audio_context.keys[0].mask_BA[at]]
            torch.testing.assert_close(ours.double(), decoder.weights["crossed", layer], atol=1e-5, rtol=1e-4)
    assert bool(observer.cross) == (name == "flamingo")


@torch.no_grad()
def test_a_watch_is_shown_the_rows_it_asks_for():
    llm, integration = shared("llama", "pal")
    inputs = integration(features(*LENGTHS), [conversation(PLACEMENTS["two"])], llm, with_spans=True)
    T = inputs.position_ids_BT.shape[1]
    every, some = Watching(torch.arange(T)[None]), Watching(torch.tensor([[T - 1, 3]]))
    for observer in (every, some):
        llm(replace(inputs, audio_context=replace(inputs.audio_context, observer=observer)))
    for layer in range(3):
        torch.testing.assert_close(some.seen[layer].rows_BHNK, every.seen[layer].rows_BHNK[:, :, [T - 1, 3]])


@every_integration
def test_places_name_clip_stream_and_time(name):
    llm, integration = shared("llama", name)
    inputs = integration(features(*LENGTHS), [conversation(PLACEMENTS["two"])], llm, "left", with_spans=True)
    group = {"plits": 1, **dict.fromkeys(("pal", "pal_slow", "pal_gated", "pal_together"), STRIDE)}.get(name)
    if group:
        places, audio_T = inputs.audio_context.token_spans, inputs.audio_context.audio_rows_BT[0]
        expected = [
            (clip, i * group * 0.04, min((i + 1) * group, n) * 0.04)
            for clip, n in enumerate(LENGTHS)
            for i in range(-(-n // group))
        ]
        found = zip(
            places.clip_BX[0][audio_T].tolist(),
            places.start_BX[0][audio_T].tolist(),
            places.end_BX[0][audio_T].tolist(),
            strict=True,
        )
        assert [pytest.approx(one) for one in expected] == list(found)
        assert (places.stream_BX[0][~audio_T] == -1).all() and places.start_BX[0][~audio_T].isnan().all()
    for keys in inputs.audio_context.keys:
        expected = [j * 0.04 for n in LENGTHS for j in range(n)]
        assert keys.token_spans.start_BX[0].tolist() == pytest.approx(expected)
        assert keys.token_spans.clip_BX[0].tolist() == [0] * 7 + [1] * 11
    assert bool(inputs.audio_context.keys) == (name != "plits")


@torch.no_grad()
def test_one_stream_of_two_is_hidden():
    llm = make_backbone("llama")
    first, second = (make_integration("lal", llm, seed=seed) for seed in (1, 5))
    from pal.integrations.routed import Routed, Stream

    routed = Routed(Routed.Config(routes={}, default="lal"), [Stream(10, ("a",)), Stream(10, ("b",))], llm)
    routed.streams = torch.nn.ModuleList([first, second])
    one, two, other = features(7, seed=2), features(5, seed=3), features(5, seed=4)
    row = [Tokens([5, AUDIO, 6, 7], [0])]

    def logits(stream, b):
        inputs = routed([one, b], row, llm, with_spans=True)
        audio = inputs.audio_context if stream is None else inputs.audio_context.without(AudioMask(stream=stream))
        return llm(replace(inputs, audio_context=audio)).logits

    assert torch.equal(logits(1, two), logits(1, other))
    assert not torch.allclose(logits(0, two), logits(0, other))
    assert not torch.allclose(logits(None, two), logits(1, two))


def test_generation_under_a_hide_is_that_of_one_full_pass():
    # cached decoding grows the rows, which the hidden ones are padded for
    model = tiny_model("pal")
    clip, ids = tone(1.0, 400.0), [20, AUDIO, 30, 40]
    with model.hiding(AudioMask(pathway="rows", seconds=(0.2, 0.6)), AudioMask(pathway="keys", layers=(0,))):
        inputs = model.inputs([clip], [Tokens(ids, [0])], padding_side="left")
        made = model.llm.generate(inputs, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)[0]
        inputs = model.inputs([clip], [Tokens(ids + made.tolist(), [0])])
        with torch.no_grad():
            again = model.llm(inputs).logits[0, -6:-1].argmax(-1)
    assert made.tolist() == again.tolist()


def test_hiding_ends_with_its_block_and_names_what_is_not_there():
    model = tiny_model("lal")
    clip, row = tone(0.5, 300.0), Tokens([20, AUDIO, 25, 30], [0], [-100, -100, -100, 30])
    before = model.answer_scores([clip], [row])
    with model.hiding(AudioMask()):
        hidden = model.answer_scores([clip], [row])
        with model.hiding(AudioMask(layers=(2,))):
            assert torch.equal(model.answer_scores([tone(0.5, 900.0)], [row]), hidden)
    assert torch.equal(model.answer_scores([clip], [row]), before) and not torch.equal(before, hidden)
    with pytest.raises(ConfigError, match=r"layer 3 .* 0 to 2"), model.hiding(AudioMask(layers=(3,))):
        pass
    with pytest.raises(ConfigError, match=r"stream 1 .* 0 to 0"), model.hiding(AudioMask(stream=1)):
        pass


QUESTION = "What sound is this?"


def scored(model, clip):
    row = Tokens([20, AUDIO, 25, 30], [0], [-100, -100, -100, 30])
    return model.answer_scores([clip], [row]).tolist()


def trained(model, clip):
    row = Tokens([20, AUDIO, 25, 30], [0], [-100, -100, -100, 30])
    return model(Batch([clip], [row])).sum.item()


def told(model, clip):
    row = Tokens([20, AUDIO, 25], [0])
    return model.generate([clip], [row], max_new_tokens=6), "".join(model.stream([clip], row, max_new_tokens=6))


def read_later(model, clip):
    """Pieces that are read when the block is over."""
    return model.ask((clip.numpy(), 16_000), QUESTION, stream=True, max_new_tokens=6)


def through_transformers(model, clip):
    from pal.hf.model import PalForConditionalGeneration

    wrapped = PalForConditionalGeneration.wrap(model)
    given = {"input_ids": torch.tensor([[20, AUDIO, 25, 30]]), "input_values": clip[None]}
    with torch.no_grad():
        logits = wrapped(**given).logits[:, 2:]
        loss = wrapped(**given, labels=torch.tensor([[-100, -100, -100, 30]])).loss
    made = wrapped.generate(**given, max_new_tokens=6, output_logits=True, return_dict_in_generate=True)
    return logits.tolist(), loss.item(), made.sequences.tolist(), torch.stack(made.logits).tolist()


ENTRIES = {
    "ask": lambda model, clip: model.ask((clip.numpy(), 16_000), QUESTION, max_new_tokens=6),
    "ask of an index": lambda model, clip: model.ask(model.index((clip.numpy(), 16_000)), QUESTION, max_new_tokens=6),
    "ask in pieces": read_later,
    "ask in detail": lambda model, clip: [
        answer.text for answer in model.ask_detailed((clip.numpy(), 16_000), QUESTION, max_new_tokens=6)
    ],
    "generate and stream": told,
    "answer_scores": scored,
    "forward": trained,
    "transformers": through_transformers,
}


@cache
def listener(name):
    model = tiny_model({"name": name, "every": 2} if name == "flamingo" else name)
    opened(model.integration)
    return model


@pytest.mark.covering(1)
@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("name", ["plits", "lal", "pal", "flamingo", "lal_audio_query"])
def test_all_ways_of_asking_hide(name, entry):
    """With all hidden any clip of a length gives the same; without, the clip tells."""
    model = listener(name)
    clips = [tone(0.5, 300.0), noise(0.5, 3)]
    with model.hiding(AudioMask()):
        deaf = [ENTRIES[entry](model, clip) for clip in clips]
    deaf = [_whole(answer) for answer in deaf]
    assert deaf[0] == deaf[1]
    heard = [_whole(ENTRIES[entry](model, clip)) for clip in clips]
    assert heard != deaf


def _whole(answer):
    return "".join(answer) if isinstance(answer, Iterator) else answer


def test_the_integration_is_called_in_one_place():
    """A second call would be one that forgets what is hidden, or whatever else comes between."""
    package = Path(pal.__file__).parent
    calls = [
        path.relative_to(package).as_posix()
        for path in sorted(package.rglob("*.py"))
        for line in path.read_text().splitlines()
        if re.search(r"\.integration\(", line)
    ]
    # benchmarks measure integrations without a PalModel
    assert calls == ["bench/models.py", *["bench/reuse.py"] * 4, "model.py"]


def test_tokens_without_time_have_no_span_to_hide():
    llm, integration = shared("llama", "lal")
    timeless = AudioFeatures(torch.randn(1, 4, 10), (4,), 0.0)
    inputs = integration(timeless, [Tokens([5, AUDIO, 6], [0])], llm, with_spans=True)
    with pytest.raises(ConfigError, match="no time of their own"):
        inputs.audio_context.without(AudioMask(seconds=(0.0, 1.0)))
    inputs.audio_context.without(AudioMask(layers=(1,)))
