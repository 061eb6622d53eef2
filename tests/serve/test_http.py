"""The server, asked by the official client."""

import asyncio
import time

import httpx
import openai
import pytest

from pal.audio import Limits
from pal.serve.served import ServeOptions
from tests.models import tiny_model
from tests.serve.engines import CLIPS, alone
from tests.serve.servers import KEY, part, says, serving, user, wav

ASK = "What sound is this?"
OPTIONS = ServeOptions(api_key=KEY, max_body=400_000, limits=Limits(max_seconds=5, max_bytes=1_000_000), max_tokens=24)


@pytest.fixture(scope="module")
def model():
    return tiny_model("pal")


@pytest.fixture(scope="module")
def running(model):
    with serving(model, OPTIONS, batch=8, queue=32) as made:
        yield made


@pytest.fixture(scope="module")
def client(running):
    with running.client() as made:
        yield made


def create(client, *messages, **options):
    return client.chat.completions.create(model="tiny", messages=list(messages), **options)


def test_an_answer_is_that_of_ask(client, model):
    made = create(client, user(part(CLIPS[0]), says(ASK)), max_tokens=12)
    (choice,) = made.choices
    assert choice.message.content == alone(model, ASK, CLIPS[:1], 12)
    assert (choice.message.role, choice.finish_reason, made.model) == ("assistant", "length", "tiny")
    assert made.usage.completion_tokens == 12
    assert made.usage.total_tokens == made.usage.prompt_tokens + 12
    assert made.usage.prompt_tokens_details.audio_tokens == model.index((CLIPS[0], 16_000)).tokens


def test_a_stream_joins_to_the_same_answer_and_ends_with_its_usage(client, model):
    chunks = list(
        create(
            client,
            user(part(CLIPS[0]), says(ASK)),
            max_completion_tokens=12,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == alone(model, ASK, CLIPS[:1], 12)
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 12
    assert {chunk.id for chunk in chunks} == {chunks[0].id} and chunks[0].usage is None


def test_several_clips_and_turns(client, model):
    talk = [
        {"role": "system", "content": "yes"},
        user(part(CLIPS[0]), says("What is this?")),
        {"role": "assistant", "content": "no"},
        user(says("And this? "), part(CLIPS[1]), part(CLIPS[2]), says("or this?")),
    ]
    turns = [
        {"role": "system", "content": "yes"},
        {"role": "user", "content": "<audio>What is this?"},
        {"role": "assistant", "content": "no"},
        {"role": "user", "content": "And this? <audio><audio>or this?"},
    ]
    assert create(client, *talk, max_tokens=9).choices[0].message.content == alone(model, turns, CLIPS, 9)
    assert create(client, {"role": "user", "content": "yes"}, max_tokens=5).choices[0].message.content == alone(
        model, "yes", (), 5
    )


def test_samples_several_answers_stops_and_log_probabilities(client):
    asked = {"temperature": 1.0, "seed": 3, "max_tokens": 8, "n": 3, "logprobs": True, "top_logprobs": 2}
    first, again = (create(client, user(part(CLIPS[0]), says(ASK)), **asked) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in again.choices] and len(texts) == 3
    for choice in first.choices:
        assert 0 < len(choice.logprobs.content) <= 8
        assert all(len(one.top_logprobs) == 2 and one.logprob <= 0 for one in choice.logprobs.content)
    streamed = {}
    for chunk in create(client, user(part(CLIPS[0]), says(ASK)), stream=True, **asked):
        (choice,) = chunk.choices
        streamed[choice.index] = streamed.get(choice.index, "") + (choice.delta.content or "")
    assert [streamed[number] for number in sorted(streamed)] == texts
    whole = create(client, user(part(CLIPS[0]), says(ASK)), max_tokens=12).choices[0].message.content
    stop = whole[3:5]
    made = create(client, user(part(CLIPS[0]), says(ASK)), max_tokens=12, stop=[stop]).choices[0]
    assert made.message.content == whole[: whole.index(stop)].rstrip() and made.finish_reason == "stop"


def test_a_stream_has_the_log_probabilities_of_all_tokens(client):
    asked = {"max_tokens": 12, "logprobs": True, "top_logprobs": 2}
    whole = create(client, user(part(CLIPS[0]), says(ASK)), **asked).choices[0].message.content
    for stop in ([], [whole[3:5]], [whole[:1]]):  # nothing is said of the text of the last tokens
        made = create(client, user(part(CLIPS[0]), says(ASK)), stop=stop, **asked).choices[0].logprobs.content
        chunks = create(client, user(part(CLIPS[0]), says(ASK)), stop=stop, stream=True, **asked)
        found = [chunk.choices[0].logprobs for chunk in chunks]
        streamed = [token for one in found if one is not None for token in one.content]
        assert [one.bytes for one in streamed] == [one.bytes for one in made] and made
        assert [one.logprob for one in streamed] == pytest.approx([one.logprob for one in made], abs=1e-4)


def test_an_indexed_clip_is_named_by_its_handle(running, client, model):
    made = client.post(
        "/audio/index", body={"model": "tiny", "input_audio": part(CLIPS[2])["input_audio"]}, cast_to=object
    )
    assert made["seconds"] == pytest.approx(1.1) and made["audio_tokens"] == model.index((CLIPS[2], 16_000)).tokens
    encoded = running.engine.stats.clip_misses
    named = {"type": "input_audio", "input_audio": {"id": made["id"]}}
    for question in (ASK, "yes or no"):
        answer = create(client, user(named, says(question)), max_tokens=6)
        assert answer.choices[0].message.content == alone(model, question, CLIPS[2:], 6)
        assert answer.usage.prompt_tokens_details.cached_tokens == made["audio_tokens"]
    assert running.engine.stats.clip_misses == encoded
    with pytest.raises(openai.NotFoundError) as caught:
        create(client, user({"type": "input_audio", "input_audio": {"id": "audio-0"}}, says(ASK)))
    assert caught.value.code == "audio_not_found" and caught.value.param == "messages[0].content[0].input_audio.id"


def test_a_transcription_asks_for_the_words(client, model):
    made = client.audio.transcriptions.create(model="tiny", file=("dog.wav", wav(CLIPS[1])))
    assert made.text == alone(model, "Transcribe the speech.", CLIPS[1:2], 24)
    text = client.audio.transcriptions.create(
        model="tiny", file=("dog.flac", wav(CLIPS[1], "FLAC")), prompt=ASK, response_format="text"
    )
    assert str(text).strip() == alone(model, ASK, CLIPS[1:2], 24)


def test_a_transcription_has_its_temperature(running, monkeypatch):
    asked, submit = [], running.engine.submit
    monkeypatch.setattr(running.engine, "submit", lambda request: (asked.append(request.options), submit(request)))
    form = {"model": "tiny", "temperature": "0.5"}
    headers = {"Authorization": f"Bearer {KEY}"}
    made = httpx.post(
        f"{running.url}/v1/audio/transcriptions", data=form, files={"file": wav(CLIPS[1])}, headers=headers, timeout=60
    )
    assert made.status_code == 200
    assert (asked[0].temperature, asked[0].max_tokens) == (0.5, 24)


def test_each_metric_shows_its_number(running):
    stats = running.engine.stats
    with pytest.MonkeyPatch.context() as patch:
        names = ("steps", "rows", "prompt_tokens", "completion_tokens", "audio_seconds", "clip_hits", "clip_misses")
        names += ("prefix_hits", "answered", "failed", "cancelled")
        for number, name in enumerate(names):
            patch.setattr(stats, name, 100 + number)
        text = httpx.get(f"{running.url}/metrics", headers={"Authorization": f"Bearer {KEY}"}).text
    shown = ("steps", "step_rows", "prompt_tokens", "completion_tokens", "audio_seconds", "clip_cache_hits")
    shown += ("clip_cache_misses", "prefix_cache_hits", "requests_answered", "requests_failed", "requests_cancelled")
    for number, name in enumerate(shown):
        assert f'pal_{name}_total{{model="tiny"}} {100.0 + number}\n' in text


def test_models_health_metrics_and_documentation(running, client):
    assert [one.id for one in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").object == "model"
    assert httpx.get(f"{running.url}/health").json() == {"status": "ok"}
    assert httpx.get(f"{running.url}/ready").status_code == 200
    create(client, user(says("yes")), max_tokens=2)
    text = httpx.get(f"{running.url}/metrics", headers={"Authorization": f"Bearer {KEY}"}).text
    for name in ("pal_queue_requests", "pal_batch_answers", "pal_step_rows_total", "pal_audio_seconds_total"):
        assert f'{name}{{model="tiny"}}' in text
    assert 'pal_time_to_first_token_seconds_count{model="tiny"}' in text
    described = httpx.get(f"{running.url}/openapi.json").json()["paths"]
    assert {"/v1/chat/completions", "/v1/audio/transcriptions", "/v1/audio/index"} <= set(described)


AUDIO = {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}
FAULTS = {
    "no such model": ({"model": "other", "messages": [user(says("a"))]}, 404, "model", "model_not_found"),
    "no messages": ({"model": "tiny", "messages": []}, 422, "messages", "invalid_request"),
    "unknown field": ({"model": "tiny", "messages": [user(says("a"))], "top_k": 3}, 422, "top_k", "unknown_parameter"),
    "tools": ({"model": "tiny", "messages": [user(says("a"))], "tools": [{}]}, 422, "tools", "invalid_request"),
    "hot": ({"model": "tiny", "messages": [user(says("a"))], "temperature": 3}, 422, "temperature", "invalid_request"),
    "too many": ({"model": "tiny", "messages": [user(says("a"))], "n": 9}, 400, "n", "bad_request"),
    "an image": (
        {"model": "tiny", "messages": [user({"type": "image_url", "image_url": {"url": "http://a/b.png"}})]},
        422,
        "messages[0].content[0]",
        "invalid_request",
    ),
    "no audio": (
        {"model": "tiny", "messages": [user(AUDIO)]},
        400,
        "messages[0].content[0].input_audio",
        "invalid_audio",
    ),
    "a URL": (
        {"model": "tiny", "messages": [user({**AUDIO, "input_audio": {"data": "http://127.0.0.1/a.wav"}})]},
        400,
        "messages[0].content[0].input_audio.data",
        "url",
    ),
    "a path": (
        {"model": "tiny", "messages": [user({**AUDIO, "input_audio": {"data": "/etc/hostname"}})]},
        400,
        "messages[0].content[0].input_audio.data",
        "invalid_base64",
    ),
    "a placeholder": (
        {"model": "tiny", "messages": [user(says("<audio>a"))]},
        400,
        "messages[0].content",
        "bad_request",
    ),
    "a clip in an answer": (
        {"model": "tiny", "messages": [{"role": "assistant", "content": [AUDIO]}]},
        400,
        "messages[0].content[0]",
        "bad_request",
    ),
    "ends with an answer": (
        {"model": "tiny", "messages": [{"role": "assistant", "content": "a"}]},
        400,
        "messages",
        "bad_request",
    ),
    "too long": (
        {"model": "tiny", "messages": [user(part(CLIPS[0].repeat(11)), says(ASK))]},
        400,
        "messages[0].content[0].input_audio",
        "audio_too_long",
    ),
    "too large": ({"model": "tiny", "messages": [user(says("a" * 500_000))]}, 413, None, "request_too_large"),
}


def post(running, body, path="/v1/chat/completions", method="POST", **more):
    headers = {"Authorization": f"Bearer {KEY}"}
    return httpx.request(
        method, running.url + path, **({"json": body} if body is not None else {}), headers=headers, **more
    )


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_has_its_error(running, fault):
    body, status, param, code = FAULTS[fault]
    for more in ({}, {"stream": True}):
        made = post(running, {**body, **more})
        error = made.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and "\n" not in error["message"]
        assert (made.status_code, error["param"], error["code"]) == (status, param, code)


def test_other_errors_have_the_same_shape(running, monkeypatch):
    assert post(running, None, "/v1/nothing").json()["error"]["code"] == "not_found"
    made = post(running, None, method="GET")
    assert (made.status_code, made.json()["error"]["code"]) == (405, "method_not_allowed")
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    made = httpx.post(f"{running.url}/v1/chat/completions", content=b"{", headers=headers)
    assert (made.status_code, made.json()["error"]["code"]) == (400, "invalid_json")
    monkeypatch.setattr(running.engine, "submit", lambda request: 1 / 0)
    made = post(running, {"model": "tiny", "messages": [user(says("a"))]})
    assert made.status_code == 500 and made.json()["error"]["type"] == "server_error"
    assert "division" not in made.text and "Traceback" not in made.text


def test_a_body_of_undeclared_length_is_bounded(running):
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    made = httpx.post(f"{running.url}/v1/chat/completions", content=(b" " * 100_000 for _ in range(5)), headers=headers)
    assert (made.status_code, made.json()["error"]["code"]) == (413, "request_too_large")


def test_the_key_is_needed(running):
    for key in ("other", "", "the key "[:-2]):
        made = httpx.get(f"{running.url}/v1/models", headers={"Authorization": f"Bearer {key}"} if key else {})
        assert made.status_code == 401 and made.json()["error"]["code"] == "invalid_api_key"
    with pytest.raises(openai.AuthenticationError), running.client(key="other") as client:
        client.models.list()


def test_each_path_asks_for_the_key_or_never(running):
    for path in ("/v1/models", "/v1/nothing", "/metrics", "/page/api/facts"):
        assert httpx.get(running.url + path).status_code == 401
    for path in ("/health", "/ready", "/docs", "/openapi.json", "/", "/page/access"):
        assert httpx.get(running.url + path).status_code == 200


def test_a_stopping_server_says_when_to_come_again(running):
    state = running.server.config.app.state
    state.stopping = True
    try:
        made = post(running, {"model": "tiny", "messages": [user(says("a"))]})
        assert (made.status_code, made.json()["error"]["code"]) == (503, "stopping")
        assert int(made.headers["retry-after"]) >= 1
        assert httpx.get(f"{running.url}/ready").status_code == 503
    finally:
        state.stopping = False


def test_many_clients_get_the_answers_of_each_alone(running, model):
    asked = [(f"{ASK} {number % 5}", CLIPS[number % 3]) for number in range(20)]

    async def everybody():
        async with running.asynchronous() as client:
            calls = [
                client.chat.completions.create(model="tiny", messages=[user(part(clip), says(question))], max_tokens=8)
                for question, clip in asked
            ]
            return [made.choices[0].message.content for made in await asyncio.gather(*calls)]

    assert asyncio.run(everybody()) == [alone(model, question, [clip], 8) for question, clip in asked]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_place(running, stream):
    before = running.engine.stats.cancelled
    body = {"model": "tiny", "messages": [user(part(CLIPS[0]), says(ASK))], "max_tokens": 1900, "stream": stream}

    async def leave():
        headers = {"Authorization": f"Bearer {KEY}"}
        async with httpx.AsyncClient(headers=headers) as client:
            call = asyncio.create_task(client.post(f"{running.url}/v1/chat/completions", json=body))
            while not running.engine.running:
                await asyncio.sleep(0.005)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call

    asyncio.run(leave())
    until = time.monotonic() + 10
    while running.engine.running and time.monotonic() < until:
        time.sleep(0.01)
    assert running.engine.running == 0 and running.engine.stats.cancelled == before + 1


def test_beyond_the_queue_comes_429_and_a_stopping_server_answers_what_it_has(model):
    with serving(model, ServeOptions(), batch=1, queue=1) as running, running.client() as client:

        async def crowd():
            async with running.asynchronous() as many:
                calls = [
                    many.chat.completions.create(
                        model="tiny", messages=[user(part(CLIPS[0]), says(ASK))], max_tokens=60
                    )
                    for _ in range(6)
                ]
                return await asyncio.gather(*calls, return_exceptions=True)

        made = asyncio.run(crowd())
        refused = [one for one in made if isinstance(one, openai.RateLimitError)]
        assert refused and len(refused) < 6
        assert all(int(one.response.headers["retry-after"]) >= 1 and one.code == "queue_full" for one in refused)
        answers = {one.choices[0].message.content for one in made if not isinstance(one, Exception)}
        assert answers == {alone(model, ASK, CLIPS[:1], 60)}

        stream = create(client, user(part(CLIPS[0]), says(ASK)), max_tokens=60, stream=True)
        next(stream)
        running.server.handle_exit(15, None)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        assert text == alone(model, ASK, CLIPS[:1], 60)
