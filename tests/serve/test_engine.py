"""Requests that share a batch get the answers that each gets alone."""

import random
import threading
import time

import pytest

from pal import memory
from pal.conversations import read_question
from pal.serve import engine as engine_module
from pal.serve import reading
from pal.serve.engine import Engine
from pal.serve.requests import ClosingError, EngineRequest, QueueFullError, TooLongError
from pal.serve.sampling import SamplingOptions
from tests.models import ENCODER, tiny_model
from tests.serve.engines import CLIPS, alone, ask

QUESTIONS = ["What sound is this?", "Which comes first?", "a loud siren", "Is it a dog or a bell? yes or no"]


@pytest.fixture(scope="module")
def model():
    return tiny_model("pal")


@pytest.fixture
def engine(model):
    made = Engine("tiny", model, batch=4)
    yield made
    made.close(30)


def conversation(draw):
    clips = [draw.choice(CLIPS) for _ in range(draw.choice([0, 1, 1, 1, 2]))]
    question = draw.choice(QUESTIONS)
    if len(clips) == 2:
        return [
            {"role": "user", "content": f"<audio>{question}"},
            {"role": "assistant", "content": "yes"},
            {"role": "user", "content": f"<audio>{draw.choice(QUESTIONS)}"},
        ], clips
    return question, clips


@pytest.mark.parametrize("name", ["plits", "lal", "pal", {"name": "flamingo", "every": 2}, "lal_audio_query"], ids=str)
def test_answers_are_those_of_ask(name, monkeypatch):
    monkeypatch.setattr(reading, "LONG_KEYS", 40)
    draw, model = random.Random(5), tiny_model(name)
    engine = Engine("tiny", model, batch=5)
    asked = []
    for _ in range(24):
        question, clips = conversation(draw)
        tokens = draw.randrange(1, 14)
        asked.append((question, clips, tokens, ask(engine, question, clips, max_tokens=tokens)))
        time.sleep(draw.choice([0, 0, 0.01]))
    for question, clips, tokens, one in asked:
        assert one.wait() == [alone(model, question, clips, tokens)]
    engine.close(30)
    assert engine.stats.answered == 24 and engine.stats.rows > engine.stats.steps
    assert engine.stats.clip_misses == len(CLIPS) and engine.stats.prefix_hits > 0


def test_a_seed_decides_samples_alone_or_in_a_batch(engine):
    options = {"temperature": 1.3, "top_p": 0.9, "seed": 7, "max_tokens": 12}
    single = ask(engine, QUESTIONS[0], CLIPS[:1], **options).wait()
    others = [ask(engine, one, CLIPS[1:2], temperature=2.0, seed=k) for k, one in enumerate(QUESTIONS[1:])]
    again = ask(engine, QUESTIONS[0], CLIPS[:1], **options)
    assert again.wait() == single
    assert ask(engine, QUESTIONS[0], CLIPS[:1], **{**options, "seed": 8}).wait() != single
    for one in others:
        one.wait()


def test_several_answers_share_their_prompt_and_are_those_of_their_seeds(engine):
    options = {"temperature": 1.0, "max_tokens": 8}
    three = ask(engine, QUESTIONS[0], CLIPS[:1], seed=3, n=3, **options)
    texts = three.wait()
    each = [ask(engine, QUESTIONS[0], CLIPS[:1], seed=3 + k, **options) for k in range(3)]
    assert texts == [one.wait()[0] for one in each]
    assert len(set(texts)) > 1
    assert three.end.usage.completion == sum(one.end.usage.completion for one in each)


def test_an_answer_that_ends_early_ends_no_other_of_its_request(engine):
    options = {"temperature": 1.0, "max_tokens": 12, "seed": 3, "n": 3}
    whole = ask(engine, QUESTIONS[0], CLIPS[:1], **options).wait()
    stop = next(one for one in whole[0].split() if not any(one in other for other in whole[1:]))
    asked = ask(engine, QUESTIONS[0], CLIPS[:1], stop=(stop,), **options)
    assert asked.wait() == [whole[0][: whole[0].index(stop)].rstrip(), *whole[1:]]
    assert set(asked.finish) == {0, 1, 2} and asked.finish[0] == "stop"
    assert engine.stats.answered == 2


def test_an_answer_ends_with_the_context(engine, model, monkeypatch):
    ids = len(read_question("yes", 0, model.tokenizer, model.config.style).tokens[0].ids)
    monkeypatch.setattr(Engine, "context", ids + 3)
    asked = ask(engine, "yes", max_tokens=9)
    assert asked.wait() == [alone(model, "yes", (), 3)]
    assert asked.finish == {0: "length"} and asked.end.usage.completion == 3


def test_what_precedes_a_clip_is_told_apart(engine, model):
    for system in ("yes", "dog", "bell", "yes"):
        talk = [{"role": "system", "content": system * 4}, {"role": "user", "content": f"<audio>{QUESTIONS[0]}"}]
        for _ in range(3):  # the third is read after the beginning of the second
            assert ask(engine, talk, CLIPS[:1], max_tokens=8).wait() == [alone(model, talk, CLIPS[:1], 8)]


def test_a_stop_string_ends_the_answer_before_it(engine, model):
    whole = alone(model, QUESTIONS[0], CLIPS[:1], 16)
    stop = whole[len(whole) // 2 : len(whole) // 2 + 2]
    asked = ask(engine, QUESTIONS[0], CLIPS[:1], max_tokens=16, stop=(stop,))
    (text,) = asked.wait()
    assert text == whole[: whole.index(stop)].rstrip() and asked.finish == {0: "stop"}
    asked = ask(engine, QUESTIONS[0], CLIPS[:1], max_tokens=5)
    asked.wait()
    assert asked.finish == {0: "length"} and asked.end.usage.completion == 5


def test_log_probabilities_are_those_of_the_tokens(engine):
    asked = ask(engine, QUESTIONS[0], CLIPS[:1], max_tokens=6, top_logprobs=3)
    asked.wait()
    tokens = [token for piece in asked.pieces for token in piece.tokens]
    assert len(tokens) == asked.end.usage.completion
    for one in tokens:
        assert (one.token, one.logprob) == one.top[0] and len(one.top) == 3  # greedy
        assert one.top[0][1] >= one.top[1][1] >= one.top[2][1]


def test_usage_counts_audio_tokens_and_those_from_the_cache(model):
    engine = Engine("tiny", model)
    first = ask(engine, QUESTIONS[0], CLIPS[:1], max_tokens=2)
    first.wait()
    second = ask(engine, QUESTIONS[0], CLIPS[:1], max_tokens=2)
    second.wait()
    audio = model.index((CLIPS[0], 16_000)).tokens
    assert first.end.usage.audio == second.end.usage.audio == second.end.usage.cached == audio
    assert first.end.usage.cached == 0 and first.end.usage.prompt > audio
    engine.close(30)


def test_a_full_queue_refuses_and_a_cancelled_request_frees_its_place(model):
    engine = Engine("tiny", model, batch=1, queue=1)
    first = ask(engine, QUESTIONS[0], CLIPS[:1], max_tokens=400)
    while not engine.running:
        time.sleep(0.001)
    second = ask(engine, QUESTIONS[1], CLIPS[:1], max_tokens=2)
    with pytest.raises(QueueFullError, match="1 requests are waiting"):
        ask(engine, QUESTIONS[2], CLIPS[:1], max_tokens=2)
    assert engine.retry_after() >= 1
    engine.cancel(first.request)
    assert second.wait()
    assert engine.running == 0 and engine.stats.cancelled == 1
    engine.close(30)


def test_closing_answers_what_is_there_and_refuses_what_comes(model):
    engine = Engine("tiny", model, batch=1)
    asked = [ask(engine, one, CLIPS[:1], max_tokens=20) for one in QUESTIONS]
    closing = threading.Thread(target=engine.close)
    closing.start()
    while engine.ready:
        time.sleep(0.001)
    with pytest.raises(ClosingError):
        ask(engine, QUESTIONS[0])
    assert [one.wait() for one in asked] == [[alone(model, one, CLIPS[:1], 20)] for one in QUESTIONS]
    closing.join(30)


def test_what_fails_fails_alone(engine, model, monkeypatch):
    monkeypatch.setattr(Engine, "context", 60)
    good = ask(engine, QUESTIONS[0], CLIPS[:1], max_tokens=4)
    bad = ask(engine, "yes " * 60, CLIPS[:1], max_tokens=4)
    with pytest.raises(TooLongError, match="positions and the model has 60"):
        bad.wait()
    assert good.wait() == [alone(model, QUESTIONS[0], CLIPS[:1], 4)]


def test_the_cache_is_bounded_and_what_was_dropped_is_made_again(model):
    size = model.index((CLIPS[2], 16_000)).nbytes
    engine = Engine("tiny", model, cache_bytes=size)
    for clip in (*CLIPS, *CLIPS):
        assert ask(engine, QUESTIONS[0], [clip], max_tokens=3).wait() == [alone(model, QUESTIONS[0], [clip], 3)]
        assert engine.cache.nbytes <= size
    assert engine.stats.clip_misses > len(CLIPS)
    engine.close(30)


def test_the_thread_survives_a_fault_of_its_own(engine, model, monkeypatch):
    running = ask(engine, QUESTIONS[1], CLIPS[:1], max_tokens=1900)
    while not engine.running:
        time.sleep(0.001)
    with monkeypatch.context() as patch:
        patch.setattr(engine_module, "is_the_llm_s", lambda *given: 1 / 0)
        failing = ask(engine, QUESTIONS[0], CLIPS[:1], max_tokens=4)
        for one in (failing, running):
            with pytest.raises(ZeroDivisionError):
                one.wait()
    assert ask(engine, QUESTIONS[0], CLIPS[:1], max_tokens=4).wait() == [alone(model, QUESTIONS[0], CLIPS[:1], 4)]


def test_a_temperature_of_almost_zero_is_greedy(engine, model):
    made = ask(engine, QUESTIONS[0], CLIPS[:1], max_tokens=6, temperature=1e-30).wait()
    assert made == [alone(model, QUESTIONS[0], CLIPS[:1], 6)]


def held(engine):
    """Let the engine's thread wait, until the event is set."""
    going, begun = threading.Event(), threading.Event()

    def wait(clips):
        begun.set()
        going.wait(60)

    engine.submit(EngineRequest(None, [], SamplingOptions(), lambda event: None, wait))
    assert begun.wait(60)
    return going


def reads(monkeypatch):
    """Numbers of requests that are read between two steps, as they come."""
    found, read = [], reading.PromptReader.read

    def counted(self, decoding, heard):
        found.append(len(heard))
        read(self, decoding, heard)

    monkeypatch.setattr(reading.PromptReader, "read", counted)
    return found


def test_each_answer_of_a_request_takes_a_place(engine):
    going = held(engine)
    asked = [ask(engine, one, CLIPS[:1], max_tokens=8, temperature=1.0, n=3) for one in QUESTIONS[:3]]
    going.set()
    for one in asked:
        one.wait()
    assert 0 < engine.stats.rows <= engine.batch * engine.stats.steps


@pytest.mark.parametrize(("seconds", "expected"), [(0.0, [2, 2, 2, 1]), (1e9, [7])])
def test_slow_prompts_are_read_in_small_groups(model, monkeypatch, seconds, expected):
    monkeypatch.setattr(engine_module, "READ_SECONDS", seconds)
    monkeypatch.setattr(engine_module, "READ_REQUESTS", 2)
    engine = Engine("tiny", model)
    ask(engine, QUESTIONS[0], CLIPS[:1], max_tokens=1).wait()
    going = held(engine)
    counts = reads(monkeypatch)
    asked = [ask(engine, QUESTIONS[k % 4], CLIPS[:1], max_tokens=2) for k in range(7)]
    going.set()
    assert [one.wait() for one in asked] == [[alone(model, QUESTIONS[k % 4], CLIPS[:1], 2)] for k in range(7)]
    engine.close(30)
    assert counts == expected


def test_requests_that_wait_share_forwards(model, monkeypatch):
    engine = Engine("tiny", model)
    going = held(engine)
    forwards, forward = [], type(model.llm.lm).forward

    def counted(self, *given, **named):
        forwards.append(1)
        return forward(self, *given, **named)

    monkeypatch.setattr(type(model.llm.lm), "forward", counted)
    asked = [
        (question, [clip], ask(engine, question, [clip], max_tokens=1)) for clip in CLIPS for question in QUESTIONS
    ]
    going.set()
    for _, _, one in asked:
        one.wait()
    assert len(forwards) == 2  # the first prompt about each clip; what follows the clips in the others
    ask(engine, QUESTIONS[0], CLIPS[:1], max_tokens=1).wait()
    engine.close(30)
    assert engine.stats.prefix_hits == 10 and engine.stats.clip_misses == 3
    for question, clips, one in asked:
        assert "".join(piece.text for piece in one.pieces) == alone(model, question, clips, 1)


def test_two_streams_and_clips_of_several_lengths_share_forwards():
    encoders = [ENCODER, {**ENCODER, "width": 8}]
    model = tiny_model("lal", encoders=encoders)
    engine = Engine("tiny", model)
    going = held(engine)
    asked = [
        (question, [clip], ask(engine, question, [clip], max_tokens=6)) for clip in CLIPS for question in QUESTIONS
    ]
    going.set()
    for question, clips, one in asked:
        assert one.wait() == [alone(model, question, clips, 6)]
    engine.close(30)


def test_a_beginning_that_cannot_be_copied_costs_nobody_an_answer(model, monkeypatch):
    engine = Engine("tiny", model)
    going = held(engine)
    monkeypatch.setattr(reading.PromptsRead, "beginning", lambda *given: 1 / 0)
    asked = [ask(engine, question, CLIPS[:1], max_tokens=2) for question in QUESTIONS]
    going.set()
    with pytest.raises(ZeroDivisionError):
        asked[0].wait()
    answers = [one.wait() for one in asked[1:]]
    assert answers == [[alone(model, question, CLIPS[:1], 2)] for question in QUESTIONS[1:]]
    engine.close(30)


def test_adapters_are_left_alone_where_all_ask_about_clips(engine, model, monkeypatch):
    monkeypatch.setattr(engine_module.adapters, "disabled", lambda root: 1 / 0)
    assert ask(engine, QUESTIONS[0], CLIPS[:1], max_tokens=4).wait() == [alone(model, QUESTIONS[0], CLIPS[:1], 4)]


def test_freed_memory_is_given_back_when_nothing_is_asked(model, monkeypatch):
    """Not before its time, and not while an answer is being generated."""
    given = threading.Event()
    running = []

    def give_back(collect):
        running.append(engine.running)
        given.set()

    monkeypatch.setattr(memory, "give_back_freed_memory", give_back)
    engine = Engine("tiny", model)
    try:
        ask(engine, QUESTIONS[0], CLIPS[:1], max_tokens=5).wait()
        assert not given.wait(0.2)
        monkeypatch.setattr(engine_module, "GIVE_BACK_SECONDS", 0.0)
        ask(engine, QUESTIONS[0], CLIPS[:1], max_tokens=5).wait()
        assert given.wait(10) and set(running) == {0}
    finally:
        engine.close(30)
