"""Several models in one server, models with adapters for audio alone, and ensembles."""

import random
import re
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
import torch

from pal.backbone.finetuning import LoRA
from pal.registry import toy
from pal.serve.engine import Engine
from pal.serve.served import ServeOptions
from tests.models import ENCODER, tiny_model
from tests.serve.engines import CLIPS, alone, ask
from tests.serve.servers import KEY, part, says, serving_all, user

ASK = "What sound is this?"
QUESTIONS = [ASK, "Which comes first?", "a loud siren", "yes or no"]


@pytest.fixture(scope="module")
def models():
    return {"small": tiny_model("pal"), "large": tiny_model("plits", seed=1)}


@pytest.fixture(scope="module")
def running(models):
    engines = {name: Engine(name, model, batch=4, cache_bytes=1 << 20) for name, model in models.items()}
    with serving_all(engines, ServeOptions(api_key=KEY)) as made:
        made.engines = engines
        yield made


@pytest.fixture(scope="module")
def client(running):
    with running.client() as made:
        yield made


def create(client, model, *parts):
    made = client.chat.completions.create(model=model, messages=[user(*parts)], max_tokens=8)
    assert made.model == model
    return made.choices[0].message.content


def test_each_model_answers_by_its_name_at_the_same_time(client, models):
    asked = [(name, question, clip) for name in models for question in QUESTIONS[:2] for clip in CLIPS]
    random.Random(0).shuffle(asked)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda one: create(client, one[0], part(one[2]), says(one[1])), asked))
    assert answers == [alone(models[name], question, [clip], 8) for name, question, clip in asked]
    assert alone(models["small"], ASK, CLIPS[:1], 8) != alone(models["large"], ASK, CLIPS[:1], 8)


def test_models_are_listed_and_an_unknown_one_names_them(client):
    assert [one.id for one in client.models.list()] == ["small", "large"]
    assert client.models.retrieve("large").id == "large"
    for call in (
        lambda: create(client, "medium", says(ASK)),
        lambda: client.models.retrieve("medium"),
        lambda: client.audio.transcriptions.create(model="medium", file=("a.wav", b"RIFF")),
    ):
        with pytest.raises(openai.NotFoundError) as caught:
            call()
        assert caught.value.code == "model_not_found" and caught.value.param == "model"
        assert "no model 'medium'; served: small, large" in str(caught.value)


def test_caches_are_apart(running, client, models):
    handles = {}
    for name, model in models.items():
        body = {"model": name, "input_audio": part(CLIPS[1])["input_audio"]}
        made = client.post("/audio/index", body=body, cast_to=object)
        assert made["audio_tokens"] == model.index((CLIPS[1], 16_000)).tokens
        handles[name] = {"type": "input_audio", "input_audio": {"id": made["id"]}}
    for name, other in (("small", "large"), ("large", "small")):
        assert create(client, name, handles[name], says(ASK)) == alone(models[name], ASK, CLIPS[1:2], 8)
        with pytest.raises(openai.NotFoundError) as caught:
            create(client, name, handles[other], says(ASK))
        assert caught.value.code == "audio_not_found"
    text = httpx.get(f"{running.url}/metrics", headers={"Authorization": f"Bearer {KEY}"}).text
    shown = dict(re.findall(r'pal_cache_bytes\{model="(\w+)"\} ([\d.e+]+)', text))
    assert {name: float(value) for name, value in shown.items()} == {
        name: engine.cache.nbytes for name, engine in running.engines.items()
    }
    kept = running.engines["small"].cache.nbytes
    misses = running.engines["large"].stats.clip_misses
    create(client, "large", part(CLIPS[0].flip(0)), says(ASK))
    assert running.engines["large"].stats.clip_misses == misses + 1
    assert running.engines["small"].cache.nbytes == kept


@pytest.fixture(scope="module")
def adapted():
    """A model whose adapters are on for audio alone, the same with them always on, and without any."""
    found = []
    for adapters, scale in (("with_audio", 0.3), ("always", 0.3), ("always", 0.0)):
        model = tiny_model("pal", adapters=adapters)
        model.llm.add_lora(LoRA(r=4, targets=("q_proj", "v_proj", "up_proj")))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in model.llm.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
        found.append(model.eval().requires_grad_(False))
    return found


def test_text_is_answered_without_the_adapters_beside_audio_with_them(adapted):
    model, full, bare = adapted
    draw = random.Random(2)
    engine = Engine("tiny", model, batch=6)
    asked = []
    for number in range(16):
        question, clips = draw.choice(QUESTIONS), [draw.choice(CLIPS)] if number % 2 else []
        asked.append((question, clips, ask(engine, question, clips, max_tokens=12)))
    for question, clips, one in asked:
        assert one.wait() == [alone(full if clips else bare, question, clips, 12)]
    assert engine.stats.rows > engine.stats.steps  # there was a batch
    engine.close(30)
    for question in QUESTIONS:  # so that the adapters do something
        assert alone(full, question, (), 12) != alone(bare, question, (), 12)
        assert alone(full, question, CLIPS[:1], 12) != alone(bare, question, CLIPS[:1], 12)


def test_the_adapters_follow_the_clips_of_a_conversation_not_its_last_turn(adapted):
    model, full, bare = adapted
    engine = Engine("tiny", model, batch=4)
    heard = [
        {"role": "user", "content": f"<audio>{ASK}"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "a loud siren"},
    ]
    text = [{**turn, "content": turn["content"].replace("<audio>", "")} for turn in heard]
    made = [ask(engine, talk, clips, max_tokens=10) for talk, clips in ((heard, CLIPS[:1]), (text, [])) * 2]
    assert [one.wait()[0] for one in made] == [alone(full, heard, CLIPS[:1], 10), alone(bare, text, (), 10)] * 2
    engine.close(30)


ENSEMBLES = {
    "rows then keys": {"integration": "pal_routed", "encoders": [toy("encoder", "whisper"), ENCODER]},
    "hybrid and crossed": {
        "integration": {
            "name": "pal_routed",
            "routes": {"whisper": "pal"},
            "default": {"name": "flamingo", "every": 2},
        },
        "encoders": [toy("encoder", "whisper"), ENCODER],
    },
    "of its own each": {
        "integration": "lal",
        "encoders": [ENCODER, toy("encoder", "whisper")],
        "connector": [toy("connector", "qformer"), "mlp"],
    },
}


@pytest.mark.parametrize("kind", ENSEMBLES)
def test_ensembles_answer_as_alone(kind):
    model = tiny_model(**ENSEMBLES[kind])
    with torch.no_grad():
        for parameter in model.integration.parameters():
            parameter.add_(0.1)  # gates open
    draw, engine = random.Random(4), Engine("tiny", model, batch=4)
    asked = []
    for _ in range(10):
        question, clips = draw.choice(QUESTIONS), [draw.choice(CLIPS[:2])]
        asked.append((question, clips, ask(engine, question, clips, max_tokens=6)))
    for question, clips, one in asked:
        assert one.wait() == [alone(model, question, clips, 6)]
    assert engine.stats.clip_misses <= 2 and engine.stats.prefix_hits + engine.stats.clip_hits > 0
    engine.close(30)
