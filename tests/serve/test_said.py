"""What clients are told of requests that cannot be used, and of a server that stops before they are answered."""

import threading
import time

import httpx
import openai
import pytest

from pal.serve.served import ServeOptions
from tests.models import tiny_model
from tests.serve.engines import CLIPS
from tests.serve.servers import KEY, part, says, serving, user, wav

OPTIONS = ServeOptions(api_key=KEY, max_body=400_000)
AUTHORIZED = {"Authorization": f"Bearer {KEY}"}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "What?"}], "max_tokens": 2}


@pytest.fixture(scope="module")
def running():
    with serving(tiny_model("pal"), OPTIONS, batch=4, queue=8) as made:
        yield made


def post(running, path="/v1/chat/completions", **request):
    headers = AUTHORIZED | request.pop("headers", {})
    return httpx.post(f"{running.url}{path}", headers=headers, **request)


def error_of(answer):
    assert set(answer.json()) == {"error"}
    return answer.status_code, answer.json()["error"]


@pytest.mark.parametrize(
    ("request_", "status", "said"),
    [
        ({"content": b'{"model": "tiny"}'}, 422, "send it with 'Content-Type: application/json'"),
        (
            {"content": b'{"model": "tiny"}', "headers": {"Content-Type": "text/plain"}},
            422,
            "send it with 'Content-Type: application/json'",
        ),
        ({"content": b"", "headers": {"Content-Type": "application/json"}}, 422, "has no body; send JSON"),
        ({"content": b'{"model": "\xe9"}', "headers": {"Content-Type": "application/json"}}, 400, "as UTF-8 and not"),
        ({"content": b"[" * 100_000, "headers": {"Content-Type": "application/json"}}, 400, "send valid JSON"),
        ({"json": ["tiny"]}, 422, "the request: Input should be"),
        ({"json": CHAT | {"user": "x" * 400_000}}, 413, "larger than 0.4 MB, the most that this server takes"),
    ],
    ids=["no type", "text", "empty", "latin", "deep", "list", "large"],
)
def test_bodies_that_are_not_understood(running, request_, status, said):
    found, error = error_of(post(running, **request_))
    assert found == status and said in error["message"]


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"max_completion_tokens": 3}, "max_completion_tokens"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
    ],
)
def test_fields_that_do_not_go_together_are_named(running, more, param):
    status, error = error_of(post(running, json=CHAT | more))
    assert status == 422 and error["param"] == param and param in error["message"]


def test_a_field_of_a_form_that_is_there_twice_is_refused(running):
    file = ("file", ("a.wav", wav(CLIPS[0])))
    for more, name in (
        ([file, file, ("model", (None, "tiny"))], "file"),
        ([file, ("model", (None, "tiny")), ("model", (None, "tiny"))], "model"),
    ):
        status, error = error_of(post(running, "/v1/audio/transcriptions", files=more))
        assert status == 422 and error["param"] == name and "is there 2 times" in error["message"]
    status, error = error_of(
        post(running, "/v1/audio/transcriptions", files=[file], data={"model": "tiny", "prompt": "<audio> What?"})
    )
    assert status == 400 and error["param"] == "prompt"
    status, error = error_of(post(running, "/v1/audio/transcriptions", data={"file": "text", "model": "tiny"}))
    assert "send the audio as a file of the form" in error["message"]
    broken = {"content": b"xx", "headers": {"Content-Type": "multipart/form-data"}}
    status, error = error_of(post(running, "/v1/audio/transcriptions", **broken))
    assert status == 400 and "let a client library write the request" in error["message"]


def test_no_path_redirects(running):
    answer = post(running, "/v1/chat/completions/", json=CHAT, headers={"Host": "elsewhere.example"})
    assert error_of(answer)[0] == 404 and "location" not in answer.headers


def test_health_can_be_asked_for_without_its_body(running):
    for path in ("/health", "/ready"):
        assert httpx.head(f"{running.url}{path}").status_code == 200


@pytest.mark.parametrize("how", ["time", "second signal"])
def test_what_is_not_answered_when_the_time_to_stop_is_over_is_told_so(how, caplog):
    with serving(tiny_model("pal"), ServeOptions(), batch=1) as running:
        step = running.engine.model.llm.lm.forward

        def slowly(*given, **more):
            time.sleep(0.05)
            return step(*given, **more)

        running.engine.model.llm.lm.forward = slowly
        running.server.grace = 0.5 if how == "time" else 60.0
        told = []

        def waits():
            with running.client() as other, pytest.raises(openai.InternalServerError) as refused:
                ask(other, False)
            told.append((refused.value.status_code, refused.value.code, refused.value.response.headers["retry-after"]))

        with running.client() as client:
            stream = ask(client, True)
            next(stream)
            waiting = threading.Thread(target=waits)
            waiting.start()
            while not running.engine.waiting:
                time.sleep(0.01)
            running.server.handle_exit(15, None)
            if how == "second signal":
                running.server.handle_exit(15, None)
            with pytest.raises(openai.APIError, match="the server stops before this is answered") as broken:
                list(stream)
            assert broken.value.body["code"] == "stopping"
        waiting.join(30)
    assert told == [(503, "stopping", "1")] and running.server.gave_up
    assert [record.message for record in caplog.records if record.levelname != "DEBUG"].count(
        "2 answers given up, since the time to stop is over"
    ) == 1


def ask(client, stream):
    messages = [user(part(CLIPS[0]), says("What is this?"))]
    return client.chat.completions.create(model="tiny", messages=messages, max_tokens=400, stream=stream)


@pytest.mark.parametrize(
    ("environment", "options", "said"),
    [
        ({"PAL_API_KEY": ""}, [], "the API key is empty; give --api-key or PAL_API_KEY a value"),
        ({"PAL_API_KEY": " "}, [], "the API key is empty"),
        ({}, ["--api-key", "schlüssel"], "other characters than printable ASCII"),
        ({}, ["--api-key", "k"], "cannot listen at 203.0.113.7, port 0: "),
    ],
    ids=["empty", "blank", "umlaut", "host"],
)
def test_a_server_that_cannot_start_as_asked_is_one_line(environment, options, said):
    from typer.testing import CliRunner

    from pal.app.cli import app

    # an address of no machine, so that nothing is served whatever is accepted before
    options = ["serve", "tiny", "--host", "203.0.113.7", "--port", "0", *options]
    made = CliRunner().invoke(app, options, env=environment)
    assert made.exit_code == 1 and len(made.output.splitlines()) == 1 and said in made.output
