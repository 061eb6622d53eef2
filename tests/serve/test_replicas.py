"""Servers that answer for one another: handles are good at each, and responses and metrics name the one that answered."""

import asyncio
import sys

import httpx
import openai
import pytest
import torch

from pal.app.replicas import application, reason, replica_config
from pal.backbone.audio_kv import AudioKV
from pal.config import parse
from pal.errors import BundleError, ConfigError
from pal.serve.replica import HEADER, Replica, packed, unpacked
from pal.serve.served import ServeOptions
from pal.serve.server_config import ReplicaConfig, ServerConfig
from tests.models import tiny_model
from tests.serve.engines import CLIPS, alone
from tests.serve.servers import KEY, part, says, serving, user

ASK = "What sound is this?"
OPTIONS = ServeOptions(api_key=KEY)


@pytest.fixture(scope="module")
def model():
    return tiny_model("pal")


def ask(client, handle):
    named = {"type": "input_audio", "input_audio": {"id": handle}}
    return client.chat.completions.create(model="tiny", messages=[user(named, says(ASK))], max_tokens=8)


def test_a_handle_is_good_at_every_replica(model):
    sought = []
    with serving(model, OPTIONS) as first:

        def elsewhere(name, digest):
            sought.append((name, digest))
            found = first.engine.stored(digest)
            return None if found is None else unpacked(packed(found), model.digest)

        with serving(model, OPTIONS, replica=Replica("b", elsewhere)) as second, first.client() as client:
            made = client.post(
                "/audio/index", body={"model": "tiny", "input_audio": part(CLIPS[0])["input_audio"]}, cast_to=object
            )
            with second.client() as other:
                for _ in range(2):
                    answer = ask(other, made["id"])
                    assert answer.choices[0].message.content == alone(model, ASK, CLIPS[:1], 8)
                    assert answer.usage.prompt_tokens_details.cached_tokens == made["audio_tokens"]
                assert sought == [("tiny", made["id"].removeprefix("audio-"))]  # then it was in the cache
                assert second.engine.stats.clip_misses == 0
                for unknown, asked in (("audio-" + "0" * 64, True), ("audio-" + "0" * 63, False), ("0" * 64, False)):
                    sought.clear()
                    with pytest.raises(openai.NotFoundError) as caught:
                        ask(other, unknown)
                    assert caught.value.code == "audio_not_found" and bool(sought) == asked
            assert httpx.get(f"{second.url}/health").headers[HEADER] == "b"
            assert httpx.get(f"{second.url}/v1/models").headers[HEADER] == "b"  # errors, too
            assert HEADER not in httpx.get(f"{first.url}/health").headers
            text = httpx.get(f"{second.url}/metrics", headers={"Authorization": f"Bearer {KEY}"}).text
            samples = [line for line in text.splitlines() if not line.startswith("#")]
            assert samples and all('replica="b"' in line for line in samples)
            assert 'pal_clip_cache_hits_total{model="tiny",replica="b"} 2.0' in samples


def test_keys_and_values_travel_whole_and_to_the_same_model_alone(model):
    audio = model.index((CLIPS[0], 16_000))
    again = unpacked(packed(audio), model.digest)
    (ours,), (theirs,) = audio.streams, again.streams
    for name, x in ours.tensors().items():
        assert torch.equal(x, theirs.tensors()[name])
    assert isinstance(again, AudioKV) and again.durations == audio.durations
    with pytest.raises(BundleError, match="another model"):
        unpacked(packed(audio), "0" * 64)
    data = bytearray(packed(audio))
    data[-1] ^= 1
    with pytest.raises(BundleError, match="damaged"):
        unpacked(bytes(data), model.digest)


@pytest.fixture
def replicas(model, tmp_path, monkeypatch):
    """Two of what Ray Serve makes, without Ray: `broadcast` asks both."""
    from ray import serve

    from pal.serve.replicas import ModelReplica

    model.save_pretrained(tmp_path / "bundle", full=True)
    config = ReplicaConfig(models={"tiny": str(tmp_path / "bundle")}, decoders=0)
    made, names = [], iter("ab")

    class Context:
        def __init__(self):
            self.replica_tag, self.deployment, self.app_name = next(names), "models", "pal"

    class Handle:
        def broadcast(self, method, *given):
            self.found = [asyncio.run(getattr(one, method)(*given)) for one in made]
            return self

        def results(self, timeout_s, return_exceptions):
            return [RuntimeError("a replica that has ended"), *self.found]

    monkeypatch.setattr(serve, "get_replica_context", Context)
    monkeypatch.setattr(serve, "get_deployment_handle", lambda deployment, app: Handle())
    made += [ModelReplica(config.model_dump()) for _ in "ab"]
    yield made
    for one in made:
        for engine in one.engines.values():
            engine.close(30)


def test_a_replica_asks_the_others_and_says_when_it_cannot_go_on(replicas, model):
    from fastapi.testclient import TestClient

    first, second = replicas
    audio = model.index((CLIPS[1], 16_000))
    digest = "1" * 64
    first.engines["tiny"].keep(digest, audio)
    assert asyncio.run(first.stored("tiny", digest, "a")) is None  # the one that asks
    with TestClient(second.__serve_build_asgi_app__()) as client:
        made = client.post(
            "/v1/chat/completions",
            json={
                "model": "tiny",
                "messages": [user({"type": "input_audio", "input_audio": {"id": f"audio-{digest}"}}, says(ASK))],
                "max_tokens": 8,
            },
        )
        assert made.json()["choices"][0]["message"]["content"] == alone(model, ASK, CLIPS[1:2], 8)
        assert made.headers[HEADER] == "b"
        assert asyncio.run(second.unanswered()) == 0
        asyncio.run(second.stop())
        assert client.get("/ready").status_code == 503
        second.check_health()
        asyncio.run(second.give_up())
        assert not second.engines["tiny"].ready
    # the application's end closes the engines
    with pytest.raises(RuntimeError, match="the engine of tiny has ended"):
        second.check_health()
    first.check_health()


def test_what_ray_serve_is_told():
    from pal.serve.replicas import DEPLOYMENT

    told = ReplicaConfig(models={"a": "x", "b": "y"}, batch=8, queue=4, replicas=2, grace=30, gpus=0.5).deployment()
    assert told["num_replicas"] == 2 and told["ray_actor_options"] == {"num_cpus": 1, "num_gpus": 0.5}
    assert told["max_ongoing_requests"] > 2 * (8 + 4) and told["graceful_shutdown_timeout_s"] == 30
    told = ReplicaConfig(models={"a": "x"}, batch=8, replicas=2, max_replicas=5).deployment()
    between = {"min_replicas": 2, "max_replicas": 5, "target_ongoing_requests": 4.0}
    assert told["autoscaling_config"] == between and "num_replicas" not in told
    made = application({"models": {"tiny": "tiny"}, "replicas": 1, "max_replicas": 3})  # Ray checks the options itself
    assert type(made).__name__ == "Application" and DEPLOYMENT == "models"


def test_options_that_cannot_be_used_are_one_line(monkeypatch, tmp_path):
    with pytest.raises(ConfigError, match=r"unknown key 'replica'; known: .*replicas"):
        application({"models": {"tiny": "tiny"}, "replica": 1})
    with pytest.raises(ConfigError, match="max_replicas is 1, below replicas, which is 2"):
        parse(ReplicaConfig, {"models": {"tiny": "tiny"}, "replicas": 2, "max_replicas": 1}, "test")
    with pytest.raises(ConfigError, match="the API key is empty"):
        parse(ReplicaConfig, {"models": {"tiny": "tiny"}, "api_key": " "}, "test")
    more = {"replicas": 2, "max_replicas": None, "gpus": None}
    with pytest.raises(BundleError, match=r"not a bundle"):
        replica_config(ServerConfig(), {"mine": str(tmp_path)}, more)
    made = replica_config(ServerConfig(batch=3), {"": None}, more)
    assert len(made.models) == 1 and made.batch == 3 and made.gpus == 0
    monkeypatch.setenv("RAY_ADDRESS", "ray://elsewhere:10001")
    with pytest.raises(ConfigError, match=r"RAY_ADDRESS is set to 'ray://elsewhere:10001'; deploy pal\.app\.replicas"):
        replica_config(ServerConfig(), {"": None}, more)
    monkeypatch.setitem(sys.modules, "ray.serve", None)
    with pytest.raises(ConfigError, match=r"replicas need Ray; pip install 'pal-audio\[ray\]'"):
        replica_config(ServerConfig(), {"": None}, more)


def test_why_a_replica_does_not_start_is_one_line():
    said = 'Replica failed:\nTraceback (most recent call last):\n  File "a.py", line 1\npal.errors.BundleError: x: damaged\n\n'
    assert reason(said) == "x: damaged"
    assert reason("The deployment has no room. See more.") == "The deployment has no room"
    assert reason("") == "no reason is known"
