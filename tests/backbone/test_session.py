"""Growing conversations: the logits and answers of whole conversations, whatever the order in which parts arrive."""

import itertools
from dataclasses import replace

import pytest
import torch

from pal.backbone import session as session_module
from pal.backbone.audio_mask import AudioMask
from pal.backbone.session import Session
from pal.backbone.stream_kv import Layout
from pal.errors import PalError
from pal.types import AUDIO, Tokens
from tests.backbone.generating import GREEDY, Watch
from tests.identities.models import FAMILIES, features, make_backbone, make_integration, shared

NAMES = ["plits", "lal", "lal_first", "lal_some", "pal", "pal_slow", "flamingo"]
SAME = {"rtol": 1e-5, "atol": 2e-5}


def session_of(llm, integration):
    (route,) = integration.routes()
    return route.session(llm, route.stream_kv(features(3), llm).layout)


def chunks_of(llm, integration, audio, clip, *cuts):
    """The keys, values and rows of a clip in chunks of whole groups."""
    whole = integration.index(audio, llm, "").streams[0][clip]
    borders = [0, *cuts, whole.lengths[0]]
    seconds = whole.layout.seconds_per_token
    return [whole.slice(a * seconds, b * seconds) for a, b in itertools.pairwise(borders)]


def logits_of(llm, integration, audio, row):
    return llm(integration(audio, [row], llm)).logits[:, -1]


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("mistral", "gemma3")])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_clip_in_chunks_then_a_question(family, name):
    llm, integration = shared(family, name)
    audio = features(13)
    session = session_of(llm, integration)
    session.read([5, 9])
    for chunk in chunks_of(llm, integration, audio, 0, 3, 9):
        session.hear(chunk)
    logits = session.read([6, 7, 8])
    row = Tokens([5, 9, AUDIO, 6, 7, 8], [0])
    torch.testing.assert_close(logits, logits_of(llm, integration, audio, row), **SAME)
    watch = Watch(read_only=True)
    made = session.generate(logits, max_new_tokens=7, logits_processor=[watch], **GREEDY)
    assert torch.equal(made, llm.generate(integration(audio, [row], llm, "left"), max_new_tokens=7, **GREEDY))
    assert len(watch.seen) == 7


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_turns_of_text_and_audio_alternate(name):
    """What was read before new audio came stays valid."""
    llm, integration = shared("llama", name)
    audio = features(7, 11, 6)
    session = session_of(llm, integration)
    ids, clips = [], []
    for clip, text in ((0, [5, 6]), (1, [7, 8, 9]), (2, [3])):
        session.read(text)
        ids += text
        for chunk in chunks_of(llm, integration, audio, clip, 3):
            session.hear(chunk)
        ids.append(AUDIO)
        clips.append(clip)
        logits = session.read([11, 12])
        ids += [11, 12]
        torch.testing.assert_close(logits, logits_of(llm, integration, audio, Tokens(ids, clips)), **SAME)


@pytest.mark.parametrize("name", ["lal", "pal", "plits", "flamingo"])
@torch.no_grad()
def test_going_back_forgets_a_question_and_an_unfinished_end(name):
    llm, integration = shared("qwen3", name)
    audio = features(13)
    first, middle, end = chunks_of(llm, integration, audio, 0, 3, 9)
    session = session_of(llm, integration)
    session.read([5])
    session.hear(first)
    mark = session.mark()
    session.hear(end)  # what might still change
    session.read([6, 7, 8, 9, 10])
    session.back_to(mark)
    session.hear(middle)
    session.hear(end)
    logits = session.read([6, 7])
    torch.testing.assert_close(logits, logits_of(llm, integration, audio, Tokens([5, AUDIO, 6, 7], [0])), **SAME)


@pytest.mark.parametrize("options", [{"gate": -1.5, "gate_by": "head"}, {"gate": -1.0, "gate_by": "layer"}], ids=str)
@pytest.mark.parametrize("name", ["lal", "pal"])
@torch.no_grad()
def test_gates(name, options):
    llm = make_backbone("llama")
    integration = make_integration(name, llm, **options)
    audio = features(13)
    session = session_of(llm, integration)
    session.read([5, 9])
    mark = session.mark()
    for chunk in chunks_of(llm, integration, audio, 0, 6):
        session.hear(chunk)
    logits = session.read([6, 7, 8])
    torch.testing.assert_close(logits, logits_of(llm, integration, audio, Tokens([5, 9, AUDIO, 6, 7, 8], [0])), **SAME)
    session.back_to(mark)
    session.hear_stored(integration.index(audio, llm, "").streams[0])
    torch.testing.assert_close(session.read([6, 7, 8]), logits, **SAME)
    with pytest.raises(PalError, match="attended whole"):
        session.forget(3)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("mistral", "gemma3")])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_stored_clip_is_attended_in_blocks(family, name, monkeypatch):
    monkeypatch.setattr(session_module, "BLOCK", 4)
    llm, integration = shared(family, name)
    audio = features(13)
    (clip,) = chunks_of(llm, integration, audio, 0)
    session = session_of(llm, integration)
    session.read([5, 9])
    mark = session.mark()
    session.hear_stored(clip)
    assert name in ("plits", "flamingo") or len(session.stored) == (5 if name.startswith("pal") else 4)
    assert not any(map(len, session.stores["keys"]))
    row = Tokens([5, 9, AUDIO, 6, 7, 8], [0])
    expected = logits_of(llm, integration, audio, row)
    torch.testing.assert_close(session.read([6, 7, 8]), expected, **SAME)
    session.back_to(mark)
    session.hear(clip)
    torch.testing.assert_close(session.read([6, 7, 8]), expected, **SAME)
    session.back_to(mark)
    session.hear_stored(clip)
    made = session.answer([6, 7, 8], max_new_tokens=5, **GREEDY)
    assert torch.equal(made, llm.generate(integration(audio, [row], llm, "left"), max_new_tokens=5, **GREEDY))
    assert torch.equal(session.answer([6, 7, 8], max_new_tokens=5, **GREEDY), made)  # the first was forgotten


@pytest.mark.parametrize("name", ["lal", "lal_first", "flamingo"])
@torch.no_grad()
def test_forgotten_audio_is_audio_that_is_hidden(name):
    """Positions stay: the logits are those of the whole conversation with an audio mask."""
    llm, integration = shared("llama", name)
    audio = features(13)
    session = session_of(llm, integration)
    session.read([5, 9])
    for chunk in chunks_of(llm, integration, audio, 0, 6):
        session.hear(chunk)
    session.forget(4)
    logits = session.read([6, 7, 8])
    inputs = integration(audio, [Tokens([5, 9, AUDIO, 6, 7, 8], [0])], llm, with_spans=True)
    hidden = inputs.audio_context.without(AudioMask(seconds=(0.0, 4 * audio.seconds_per_token - 1e-6)))
    torch.testing.assert_close(logits, llm(replace(inputs, audio_context=hidden)).logits[:, -1], **SAME)


@torch.no_grad()
def test_the_hybrid_forgets_keys_and_rows_of_whole_groups():
    llm, integration = shared("llama", "pal")
    session = session_of(llm, integration)
    session.read([5, 9])
    session.hear(*chunks_of(llm, integration, features(13), 0))
    session.forget(7)  # two groups of three tokens and one row; 13 tokens are five groups
    assert (len(session.stores["keys"][0]), len(session.stores["rows"][0])) == (7, 3)


@torch.no_grad()
def test_an_answer_stays_in_the_conversation():
    llm, integration = shared("llama", "lal")
    audio = features(7)
    session = session_of(llm, integration)
    session.read([5])
    (chunk,) = chunks_of(llm, integration, audio, 0)
    session.hear(chunk)
    said = session.generate(session.read([6, 7]), max_new_tokens=3, **GREEDY)[0].tolist()
    logits = session.read([said[-1], 8, 9])  # the last token's row was not needed before
    row = Tokens([5, AUDIO, 6, 7, *said, 8, 9], [0])
    torch.testing.assert_close(logits, logits_of(llm, integration, audio, row), **SAME)


def test_what_a_session_cannot_be():
    llm, integration = shared("llama", "lal_gated")  # shared positions
    with pytest.raises(PalError, match="do not depend on what comes later"):
        session_of(llm, integration)
    with pytest.raises(PalError, match="without sliding windows"):
        Session(shared("mistral", "lal")[0], Layout(0.04))
    with pytest.raises(PalError, match="do not depend on what comes later"):
        session_of(*shared("llama", "lal_audio_query"))
    llm, integration = shared("llama", "pal")
    session = session_of(llm, integration)
    session.read([5])
    chunk = integration.index(features(4), llm, "").streams[0]
    session.hear(chunk)
    with pytest.raises(PalError, match="ended within a group"):
        session.hear(chunk)
    with pytest.raises(PalError, match="greedy search or one sample"):
        session.generate(session.read([6]), max_new_tokens=2, num_beams=2)
