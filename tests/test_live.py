"""Streams: audio in chunks has the keys and values, and the answers, of the same audio as a file."""

import math

import numpy as np
import pytest
import torch

from pal import audio_tower
from pal import clips as clips_module
from pal.backbone.audio_kv import AudioKV
from pal.backbone.session import Session
from pal.encoders.stream import EncoderStream
from pal.errors import AudioError, ConfigError
from pal.integrations import base
from tests.models import LLM, noise, pal, tiny_model  # noqa: F401

QUESTION = "What sound is this?"
SAME = {"rtol": 1e-5, "atol": 2e-5}
WHISPER = {
    "name": "whisper",
    "architecture": {
        "d_model": 16,
        "encoder_layers": 1,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "max_source_positions": 50,
    },
}
CAUSAL = {"name": "tiny", "width": 12, "channels": [2, 3, 4, 6], "blocks": 1, "causal": True}
CONNECTORS = {
    "mlp": {"name": "mlp"},
    "conv": {"name": "strided_conv", "stride": 3, "kernel": 6},
    "wide": {"name": "strided_conv", "stride": 2, "kernel": 7},
    "qformer": {"name": "qformer", "queries": 4},
    "transformer": {"name": "conv_transformer", "stride": 2, "layers": 1},
}


def chunks(samples, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    cuts = torch.randint(1, len(samples), (count - 1,), generator=generator).sort().values.tolist()
    return [samples[a:b] for a, b in zip([0, *cuts], [*cuts, len(samples)], strict=True)]


def same(found, expected):
    assert isinstance(found, AudioKV) and found.digest == expected.digest
    assert found.durations == pytest.approx(expected.durations)
    for mine, theirs in zip(found.streams, expected.streams, strict=True):
        assert (mine.lengths, mine.layers, mine.layout) == (theirs.lengths, theirs.layers, theirs.layout)
        for name, x in mine.tensors().items():
            torch.testing.assert_close(x, theirs.tensors()[name], **SAME, msg=lambda text, name=name: f"{name}: {text}")


def model_of(integration="lal", connector="mlp", encoders=None, **options):
    more = {} if encoders is None else {"encoders": encoders}
    warm = encoders is None
    return tiny_model(integration, warm=warm, connector=CONNECTORS[connector], **more, **options)


@pytest.mark.covering(1)
@pytest.mark.parametrize("count", [1, 7, 50])
@pytest.mark.parametrize(
    "integration", ["plits", "lal", "pal", "lal_audio_query", {"name": "flamingo", "every": 2}], ids=str
)
def test_chunks_are_the_file(integration, count):
    model = model_of(integration)
    samples = noise(5.3)
    with model.listen() as live:
        for chunk in chunks(samples, count, count):
            live.append(chunk)
        same(live.audio, model.index((samples.numpy(), 16_000)))
        asked = [QUESTION, "Is it loud?"]
        assert live.ask(asked, max_new_tokens=6) == model.ask((samples.numpy(), 16_000), asked, max_new_tokens=6)
        assert live.ask(QUESTION, max_new_tokens=6) == model.ask((samples.numpy(), 16_000), QUESTION, max_new_tokens=6)


@pytest.mark.covering(1)
@pytest.mark.parametrize("connector", CONNECTORS)
@pytest.mark.parametrize("encoders", [None, [CAUSAL], [WHISPER]], ids=["local", "causal", "windows"])
def test_every_moment_is_the_file_so_far(connector, encoders):
    """Windows of one second; connectors that reach over their borders, and such that see the whole clip."""
    model = model_of("pal", connector, encoders)
    samples = noise(4.4, 1)
    live, heard = model.listen(), 0
    for chunk in [*chunks(samples[:48_000], 9, 3), samples[48_000:64_000], samples[64_000:]]:
        live.append(chunk)
        heard += len(chunk)
        same(live.audio, model.index((samples[:heard].numpy(), 16_000)))
    assert live.seconds == pytest.approx(4.4)


def test_a_causal_encoder_leaves_only_a_token_that_is_not_whole():
    model = model_of("lal", encoders=[CAUSAL])
    samples = noise(2.0, 1)
    whole = model.ears.encode_one(samples).x_AE[0]
    stream, settled = EncoderStream(model.ears.encoder(0), 16_000), []
    for first in range(0, len(samples), 6_400):  # whole tokens
        new_AE, rest_AE = stream.append(samples[first : first + 6_400])
        assert (len(new_AE), len(rest_AE)) == (10, 0)
        settled.append(new_AE)
    torch.testing.assert_close(torch.cat(settled), whole, **SAME)
    new_AE, rest_AE = stream.append(samples[:700])
    assert (len(new_AE), len(rest_AE)) == (1, 1)


def test_several_encoders_with_routes_of_their_own():
    model = model_of(
        "pal_routed", encoders=[{"name": "tiny", "width": 12, "channels": [2, 3, 4, 6], "blocks": 1}, WHISPER]
    )
    samples = noise(3.7, 2)
    live = model.listen()
    for chunk in chunks(samples, 12, 5):
        live.append(chunk)
    same(live.audio, model.index((samples.numpy(), 16_000)))


@pytest.mark.parametrize("integration", ["lal", "pal", "plits"])
@pytest.mark.parametrize("encoders", [None, [WHISPER]], ids=["local", "windows"])
def test_a_window_keeps_the_last_seconds_as_they_were_heard(integration, encoders):
    model = model_of(integration, encoders=encoders)
    samples = noise(9.0, 4)
    live = model.listen(window=np.float32(2.0))
    for chunk in chunks(samples, 40, 6):
        live.append(chunk)
    whole = model.index((samples.numpy(), 16_000))
    same(live.audio, whole.slice(7.0, 9.0))
    assert live.seconds == 9.0 and live.audio.seconds == pytest.approx(2.0, abs=0.13)
    assert live.ask(QUESTION, max_new_tokens=5) == model.ask(whole.slice(7.0, 9.0), QUESTION, max_new_tokens=5)


def test_a_window_at_the_border_of_two_tokens_keeps_neither_more_nor_less():
    """Decimals are no multiples of one another in binary: 1.16 / 0.04 is less than 29."""
    live, samples = model_of("lal").listen(window=0.4), noise(2.0)
    for count in range(1, 51):
        live.append(samples[640 * (count - 1) : 640 * count])
        assert live.audio.tokens == min(count, 10)


def test_a_window_of_several_streams_begins_with_the_first_of_their_groups():
    model = model_of(
        "pal_routed", encoders=[{"name": "tiny", "width": 12, "channels": [2, 3, 4, 6], "blocks": 1}, WHISPER]
    )
    samples = noise(5.0, 4)
    whole = model.index((samples.numpy(), 16_000))
    assert len({stream.stretch(2.9, 5.0)[0] for stream in whole.streams}) == 2
    live = model.listen(window=2.1)
    for chunk in chunks(samples, 9, 6):
        live.append(chunk)
    same(live.audio, whole.slice(2.9, 5.0))


@pytest.mark.parametrize("window", [0.4, 2.0])
def test_a_window_is_cut_within_what_has_not_settled(window):
    """Windows of a second of the encoder, of which the last is not full."""
    model = model_of("pal", encoders=[WHISPER])
    samples = noise(8.7, 4)
    live = model.listen(window=window)
    for chunk in chunks(samples, 13, 6):
        live.append(chunk)
    same(live.audio, model.index((samples.numpy(), 16_000)).slice(8.7 - window, 8.7))


@pytest.mark.parametrize(("integration", "connector"), [("pal", "transformer"), ("lal_audio_query", "mlp")])
def test_where_nothing_settles_a_window_is_the_last_samples(integration, connector):
    model = model_of(integration, connector)
    samples = noise(5.0, 4)
    live = model.listen(window=1.5)
    assert not live.settles and model_of("pal").listen().settles
    for chunk in chunks(samples, 9, 2):
        live.append(chunk)
    same(live.audio, model.index((samples[-24_000:].numpy(), 16_000)))
    assert live.ask(QUESTION, max_new_tokens=5) == model.ask(
        (samples[-24_000:].numpy(), 16_000), QUESTION, max_new_tokens=5
    )
    assert len(live._recent_N) == 24_000


def test_an_append_encodes_what_is_new_and_what_may_change():
    model = model_of("pal", "conv")
    encoded, made = [], []
    encoder = model.ears.encoder(0)
    encoder.register_forward_pre_hook(lambda module, given: encoded.append(given[0].shape[1]))
    ours = type(model.integration).stream_kv
    try:
        type(model.integration).stream_kv = lambda self, x, llm: (made.append(x.lengths[0]), ours(self, x, llm))[1]
        live = model.listen()
        for _ in range(60):
            live.append(noise(1.0, 7))
    finally:
        type(model.integration).stream_kv = ours
    first, late = encoded[10], encoded[-1]
    # a second has 100 frames; a token depends on 11 tokens of 4 frames to either side
    assert first == late == 100 + 2 * 44
    assert max(made) <= 15


def test_with_windows_only_the_newest_is_encoded_again():
    model = model_of("lal", encoders=[WHISPER])
    encoded = []
    model.ears.encoder(0).register_forward_pre_hook(lambda module, given: encoded.append(len(given[1])))
    live = model.listen()
    for _ in range(12):
        live.append(noise(0.3, 8))
    # every append, and each window once more when it was full; at three seconds sharp nothing else is left
    assert sum(encoded) == 12 + 3 - 1 and max(encoded) == 1


@pytest.mark.parametrize("connector", ["mlp", "conv", "qformer"])
@pytest.mark.parametrize("encoders", [None, [WHISPER]], ids=["local", "windows"])
def test_long_clips_are_encoded_in_blocks_to_the_same(connector, encoders, monkeypatch):
    model = model_of("pal", connector, encoders)
    samples = noise(7.7, 3)
    whole = model.index((samples.numpy(), 16_000))
    answer = model.ask((samples.numpy(), 16_000), QUESTION, max_new_tokens=6)
    frames = []
    model.ears.encoder(0).register_forward_pre_hook(lambda module, given: frames.append(given[0].shape[:2].numel()))
    monkeypatch.setattr(audio_tower, "LONG_SECONDS", 4)
    monkeypatch.setattr(clips_module, "LONG_SECONDS", 4)
    monkeypatch.setattr(audio_tower, "BLOCK_SECONDS", 2)
    monkeypatch.setattr(base, "BLOCK_TOKENS", 20)
    same(model.index((samples.numpy(), 16_000)), whole)
    # blocks of two seconds with the tokens before them; windows of one second go together anyway
    assert len(frames) >= 4 and max(frames) <= 400 if encoders is None else len(frames) == 1
    assert model.ask((samples.numpy(), 16_000), QUESTION, max_new_tokens=6) == answer
    assert model.ask(whole, QUESTION, max_new_tokens=6) == answer
    two = [(samples.numpy(), 16_000), (noise(1.0).numpy(), 16_000)]
    assert model.ask(two, QUESTION, max_new_tokens=6) == [answer, model.ask(two[1], QUESTION, max_new_tokens=6)]


@pytest.mark.parametrize("integration", ["lal", "pal", "plits", "lal_audio_query"])
def test_keys_and_values_of_long_clips_are_made_in_blocks(integration, monkeypatch):
    model = model_of(integration)
    clips = [noise(3.1, 1), noise(1.9, 2)]
    features = model.features(clips)
    whole = model.integration.index(features, model.llm, "")
    made = []
    ours = type(model.llm).project_kv
    monkeypatch.setattr(
        type(model.llm), "project_kv", lambda self, layer, x: (made.append(x.shape[1]), ours(self, layer, x))[1]
    )
    monkeypatch.setattr(base, "BLOCK_TOKENS", 10)
    same(model.integration.index(features, model.llm, ""), whole)
    if integration in ("lal", "pal"):
        assert max(made) <= 10


@pytest.mark.parametrize("integration", ["plits", "lal", "pal", {"name": "flamingo", "every": 2}], ids=str)
def test_a_standing_question_reads_each_part_once(integration, monkeypatch):
    model = model_of(integration)
    parts = chunks(noise(6.0, 5), 6, 1)
    so_far = [torch.cat(parts[: n + 1]).numpy() for n in range(len(parts))]
    answers = [model.ask((samples, 16_000), QUESTION, max_new_tokens=4) for samples in so_far]
    rows = []
    ours = Session.run

    def watched(self, x_1QD, *more):
        rows.append(x_1QD.shape[1])
        return ours(self, x_1QD, *more)

    monkeypatch.setattr(Session, "run", watched)
    monkeypatch.setattr(type(model), "generate", None)  # a conversation read whole
    live = model.listen()
    for number, (chunk, answer) in enumerate(zip(parts, answers, strict=True)):
        live.append(chunk)
        rows.clear()
        assert live.ask(QUESTION, max_new_tokens=4) == answer
        # rows of audio that is new or may still change (11 tokens to either side), the question and the answer
        audio = {"plits": len(chunk) // 640 + 24, "pal": (len(chunk) // 640 + 24) // 3 + 1}.get(
            integration if isinstance(integration, str) else "", 0
        )
        assert sum(rows[-4:]) <= 40 and (number == 0 or sum(rows) <= 40 + audio)
    assert live.ask([QUESTION], max_new_tokens=4) == [answers[-1]]


def test_a_session_begins_anew_where_the_text_before_the_clip_differs():
    model = model_of("lal")
    samples = noise(3.0, 5)
    live = model.listen()
    live.append(samples)
    talk = [{"role": "user", "content": f"Listen: <audio> {QUESTION}"}]
    for question in (QUESTION, talk, QUESTION, [QUESTION, "Is it loud?"]):
        assert live.ask(question, max_new_tokens=4) == model.ask((samples.numpy(), 16_000), question, max_new_tokens=4)
    beams = {"max_new_tokens": 4, "num_beams": 2}
    assert live.ask(QUESTION, **beams) == model.ask((samples.numpy(), 16_000), QUESTION, **beams)


@pytest.mark.parametrize("integration", ["plits", "lal"])
def test_a_question_that_is_interrupted_leaves_the_stream_as_it_was(integration, monkeypatch):
    model = model_of(integration)
    samples = noise(4.1, 1)
    live = model.listen()
    live.append(samples[:48_500])
    first = live.ask(QUESTION, max_new_tokens=6)
    with monkeypatch.context() as patch:
        patch.setattr(Session, "generate", lambda self, *given, **more: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            live.ask(QUESTION, max_new_tokens=6)
    assert live.ask(QUESTION, max_new_tokens=6) == first
    live.append(samples[48_500:])
    assert live.ask(QUESTION, max_new_tokens=6) == model.ask((samples.numpy(), 16_000), QUESTION, max_new_tokens=6)


def test_storage_is_not_copied_at_each_append():
    model = model_of("lal")
    live = model.listen()
    places = set()
    for _ in range(64):
        live.append(noise(1.0, 9))
        kept = live._streams[0].kv
        if kept is not None:
            places.add(kept.view().k_LBGAC.untyped_storage().data_ptr())
    assert len(places) <= 8


def test_what_is_no_stream_of_samples():
    model = model_of("lal")
    live = model.listen()
    with pytest.raises(AudioError, match="nothing was heard yet"):
        live.ask(QUESTION)
    live.append([])
    with pytest.raises(AudioError, match="nothing was heard yet"):
        live.audio  # noqa: B018
    with pytest.raises(AudioError, match="mix the channels first"):
        live.append(torch.zeros(2, 100))
    with pytest.raises(AudioError, match="finite"):
        live.append([0.0, float("nan")])
    with pytest.raises(AudioError, match=r"floats of -1 to 1, not torch\.int16"):
        live.append(np.zeros(10, np.int16))
    live.append([0.1] * 800)
    with live:
        pass
    with pytest.raises(AudioError, match="closed"):
        live.append([0.1])
    with pytest.raises(AudioError, match="closed"):
        live.ask(QUESTION)
    for window in (-1.0, 0, math.nan, math.inf, "2"):
        with pytest.raises(ConfigError, match=f"above 0, not {window!r}"):
            model.listen(window=window)
    with pytest.raises(ConfigError, match="no time of their own"):
        model_of("lal", "qformer").listen(window=1.0)
