"""transformers' Auto classes, processor, generation and pipeline, beside the same model asked directly."""

import json
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import soundfile
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMultimodalLM,
    AutoProcessor,
    GenerationConfig,
    TextIteratorStreamer,
    pipeline,
)

from pal import bundle
from pal.backbone.llm import LoRA
from pal.data.prompts import encode, user_turn
from pal.errors import AudioError, BundleError, ConfigError, PalError, PromptError
from pal.files import verify
from pal.hf import PalConfig, PalForConditionalGeneration, PalProcessor
from pal.registry import toy
from pal.types import AUDIO, IGNORE, Batch, Tokens
from tests.models import ENCODER, INTEGRATIONS, LLM, WORDS, noise, pal, tiny_model

QUESTION = "What sound is this?"
KINDS: dict[str, dict] = {
    **{name: {"integration": name} for name in (*INTEGRATIONS, "lal_audio_query")},
    "flamingo": {"integration": {"name": "flamingo", "every": 2}},
    "pal_routed": {"integration": "pal_routed", "encoders": [toy("encoder", "whisper"), ENCODER]},
    "of its own each": {
        "integration": "lal",
        "encoders": [ENCODER, toy("encoder", "whisper")],
        "connector": [toy("connector", "qformer"), "mlp"],
    },
}


def model_of(kind):
    """A model whose gates are open."""
    model = tiny_model(**KINDS[kind])
    with torch.no_grad():
        for parameter in model.integration.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def say(*parts, role="user"):
    return {"role": role, "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}


def heard(clip):
    return {"type": "audio", "audio": clip}


def chat(seconds, seed=0, question=QUESTION):
    return [say(heard((noise(seconds, seed).numpy(), 16_000)), question)]


def tensors(processor, *chats, **options):
    return processor.apply_chat_template(
        list(chats), tokenize=True, return_dict=True, add_generation_prompt=True, **options
    )


def new_ids(model, inputs, **options):
    return model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """A model, and the same from its folder by way of the Auto classes."""
    model = model_of(request.param)
    folder = tmp_path_factory.mktemp("hf") / "m"
    model.save_pretrained(folder)
    return model, AutoModelForMultimodalLM.from_pretrained(folder), AutoProcessor.from_pretrained(folder)


one_kind = pytest.mark.parametrize("pair", ["pal"], indirect=True)
"""For what does not depend on the integration."""


@pytest.fixture(scope="module")
def processor():
    return PalProcessor.of(tiny_model())


# The Auto classes


@pytest.mark.parametrize(
    ("first", "then", "autos"),
    [
        ("import pal", "", "AutoModelForMultimodalLM, AutoConfig, AutoProcessor, AutoModel"),
        (
            "import transformers.models.auto.modeling_auto, transformers.models.auto.processing_auto",
            "import pal",
            "AutoProcessor, AutoConfig, AutoModelForMultimodalLM",
        ),
    ],
)
def test_auto_classes_know_a_bundle_after_import_pal_alone(first, then, autos):
    """Whichever is imported first, and without importing transformers before it is asked for."""
    program = """
import sys
{first}
assert not {{"torch", "transformers"}} & set(sys.modules) or "{first}" != "import pal", "import pal is heavy"
from transformers import AutoConfig, AutoProcessor, AutoModel, AutoModelForMultimodalLM
{then}
for auto in ({autos}):
    print(type(auto.from_pretrained(pal.SHIPPED)).__name__)
# and the modules look as if nobody had watched them
module = sys.modules["transformers.models.auto.configuration_auto"]
assert type(module.__loader__).__name__ == type(module.__spec__.loader).__name__ == "SourceFileLoader"
"""
    text = program.format(first=first, then=then, autos=autos)
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = {"AutoProcessor": "PalProcessor", "AutoConfig": "PalConfig"}
    assert done.stdout.split() == [names.get(auto, "PalForConditionalGeneration") for auto in autos.split(", ")]


def test_both_ways_of_loading_give_one_model(pair):
    model, auto, processor = pair
    assert isinstance(auto, PalForConditionalGeneration)
    assert isinstance(processor, PalProcessor)
    assert auto.pal.digest == model.digest
    assert isinstance(auto.config, PalConfig)
    assert auto.config.get_text_config().hidden_size == LLM["hidden_size"]
    assert not auto.training
    assert type(AutoModel.from_pretrained(auto.config.name_or_path)) is PalForConditionalGeneration


def test_the_shipped_model_loads_both_ways():
    auto = AutoModelForMultimodalLM.from_pretrained(pal.SHIPPED)
    processor = AutoProcessor.from_pretrained(pal.SHIPPED)
    model = pal.load()
    assert auto.pal.digest == model.digest
    inputs = tensors(processor, chat(2.0), chat(1.0, 1))
    answers = processor.batch_decode(new_ids(auto, inputs), skip_special_tokens=True)
    assert [answer.strip() for answer in answers] == model.ask(
        [(noise(2.0).numpy(), 16_000), (noise(1.0, 1).numpy(), 16_000)], QUESTION
    )


def test_a_folder_of_an_earlier_version_is_upgraded(tmp_path):
    from pal.files import amend

    tiny_model(system="Be brief.").save_pretrained(tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    old = json.loads(path.read_text())
    for name in ("model_type", "architectures", "dtype"):
        del old[name]
    amend(tmp_path / "m", {"config.json": json.dumps(old).encode(), "processor_config.json": b"{}"})
    weights = (tmp_path / "m" / "model.safetensors").read_bytes()
    assert pal.load(tmp_path / "m").digest == tiny_model().digest
    with pytest.raises(ValueError):
        AutoConfig.from_pretrained(tmp_path / "m")
    bundle.upgrade(tmp_path / "m")
    verify(tmp_path / "m")
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == weights
    assert AutoModel.from_pretrained(tmp_path / "m").pal.digest == tiny_model().digest
    assert AutoProcessor.from_pretrained(tmp_path / "m").system == "Be brief."


@one_kind
def test_a_model_from_its_configuration_alone_is_untrained(pair):
    _, auto, _ = pair
    fresh = AutoModelForMultimodalLM.from_config(AutoConfig.from_pretrained(auto.config.name_or_path))
    assert [n for n, _ in fresh.named_parameters()] == [n for n, _ in auto.named_parameters()]
    assert fresh.pal.digest != auto.pal.digest
    with pytest.raises(ConfigError, match="from_pretrained"):
        PalForConditionalGeneration(PalConfig())


def test_all_read_from_the_hub_by_its_id(tmp_path, monkeypatch):
    """From a cache as huggingface_hub keeps it, since the tests reach no Hub."""
    commit = "a" * 40
    cached = tmp_path / "models--me--model"
    tiny_model(system="Be brief.").save_pretrained(cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for options in ({}, {"revision": commit}):
        auto = AutoModelForMultimodalLM.from_pretrained("me/model", cache_dir=tmp_path, **options)
        assert auto.pal.digest == tiny_model().digest
        assert AutoProcessor.from_pretrained("me/model", cache_dir=tmp_path, **options).system == "Be brief."
    with pytest.raises(BundleError, match="the Hub did not give it"):
        PalForConditionalGeneration.from_pretrained("me/model", cache_dir=tmp_path, revision="gone")


# The processor


@one_kind
def test_a_chat_gives_the_ids_that_ask_gives(pair):
    model, _, processor = pair
    inputs = tensors(processor, chat(0.5))
    row = encode(model.tokenizer, [user_turn(QUESTION, 1)], [0])
    assert inputs["input_ids"].tolist() == [row.ids]
    assert inputs["input_ids"].tolist()[0].count(AUDIO) == 1
    torch.testing.assert_close(inputs["input_values"][0], noise(0.5))
    assert inputs["audio_lengths"].tolist() == [8000]


def test_all_forms_of_a_clip_are_the_same(processor, tmp_path):
    path = tmp_path / "a.wav"
    soundfile.write(path, noise(0.4).numpy(), 16_000, subtype="FLOAT")
    parts = [
        {"type": "audio", "path": str(path)},
        {"type": "audio", "audio": str(path)},
        {"type": "audio", "audio": path.read_bytes()},
        {"type": "audio", "audio": noise(0.4).numpy()},
        {"type": "audio", "audio": noise(0.4)},
        {"type": "audio", "audio": {"array": noise(0.4).numpy(), "sampling_rate": 16_000}},
        {"type": "audio", "url": str(path)},
    ]
    expected = tensors(processor, chat(0.4))
    for part in parts:
        found = tensors(processor, [say(part, QUESTION)])
        assert set(found) == set(expected)
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor)
    # a place without a clip, and the clip by keyword
    for messages in ([say({"type": "audio"}, QUESTION)], [{"role": "user", "content": f"<audio>\n{QUESTION}"}]):
        found = tensors(processor, messages, audio=[[str(path)]])
        assert found["input_ids"].equal(expected["input_ids"])
        torch.testing.assert_close(found["input_values"], expected["input_values"])


def test_text_and_audio_by_keyword(processor):
    text = processor.apply_chat_template(chat(0.4), add_generation_prompt=True)
    assert text == f"<user><audio>\n{QUESTION}<assistant>"
    found = processor(text=text, audio=noise(0.4))
    expected = tensors(processor, chat(0.4))
    assert found["input_ids"].equal(expected["input_ids"])
    assert found["input_values"].equal(expected["input_values"])
    halved = processor(text="<audio>", audio=noise(0.4)[::2], sampling_rate=8_000)
    assert halved["audio_lengths"].tolist() == [6400]
    assert processor(text=[text, "yes"], audio=[[noise(0.4)], []])["input_ids"].shape[0] == 2


def test_padding_is_on_the_left(processor):
    inputs = tensors(processor, chat(0.3), chat(0.5, question=" ".join(WORDS)))
    mask = inputs["attention_mask"]
    assert mask[1].all() and not mask[0].all()
    assert mask[0].tolist() == sorted(mask[0].tolist())
    assert (inputs["input_ids"][0][mask[0] == 0] == LLM["pad_token_id"]).all()
    assert inputs["input_values"].shape == (2, 8000)
    assert inputs["audio_lengths"].tolist() == [4800, 8000]
    right = tensors(
        processor, chat(0.3), chat(0.5, question=" ".join(WORDS)), processor_kwargs={"padding_side": "right"}
    )
    assert right["attention_mask"][0].tolist() == mask[0].tolist()[::-1]


def test_half_precision_inputs_keep_exact_waveforms(processor):
    inputs = tensors(processor, chat(0.3)).to(dtype=torch.bfloat16)
    torch.testing.assert_close(inputs["input_values"][0], noise(0.3))
    as_numpy = tensors(processor, chat(0.3), return_tensors="np")
    assert all(isinstance(array, np.ndarray) for array in as_numpy.values())


def test_a_saved_max_length_shortens_neither_text_nor_audio(tmp_path):
    """Trap: a tokenizer's truncation leaks into the audio through processors."""
    model = tiny_model()
    question = " ".join(WORDS * 5)
    expected = tensors(PalProcessor.of(model), chat(3.0, question=question))
    assert expected["input_ids"].shape[1] > 40
    model.tokenizer.model_max_length = 16
    model.tokenizer.init_kwargs |= {"model_max_length": 16, "max_length": 16, "truncation": True}
    model.tokenizer.backend_tokenizer.enable_truncation(max_length=16)
    model.save_pretrained(tmp_path / "m")
    assert json.loads((tmp_path / "m" / "tokenizer.json").read_text())["truncation"]["max_length"] == 16
    found = tensors(AutoProcessor.from_pretrained(tmp_path / "m"), chat(3.0, question=question))
    for name, tensor in expected.items():
        assert found[name].equal(tensor), name
    assert found["audio_lengths"].tolist() == [48_000]
    for options in ({"truncation": True}, {"padding": "max_length", "max_length": 16}):
        with pytest.raises(PromptError, match="nothing is cut"):
            tensors(PalProcessor.of(model), chat(3.0, question=question), **options)


@pytest.mark.parametrize(
    ("messages", "options"),
    [
        ([say({"type": "audio"}, QUESTION)], {}),
        ([say({"type": "audio"}, QUESTION)], {"audio": [noise(0.2), noise(0.2)]}),
        ([say(QUESTION)], {"audio": [noise(0.2)]}),
        ([say(heard(noise(0.2)), {"type": "audio"}, QUESTION)], {}),
        ([say(heard(noise(0.2)), QUESTION)], {"audio": [noise(0.2)]}),
        ([say(heard(noise(0.2)), "<audio>?")], {}),
    ],
)
def test_clips_and_places_must_match(processor, messages, options):
    with pytest.raises(PromptError) as caught:
        tensors(processor, messages, **options)
    assert "\n" not in str(caught.value)
    assert ";" in str(caught.value), "no remedy"


@pytest.mark.parametrize(
    ("text", "audio"), [("<audio>?", None), ("?", [noise(0.2)]), (["<audio>?", "<audio>?"], [noise(0.2)])]
)
def test_clips_and_places_of_a_text_must_match(processor, text, audio):
    with pytest.raises(PromptError, match=r"^\d clips but \d '<audio>' placeholders; [^\n]+$"):
        processor(text=text, audio=audio)


@pytest.mark.parametrize(
    ("messages", "options", "says"),
    [
        ([say({"type": "image", "url": "x.png"})], {}, "known: audio, text"),
        ([{"role": "user"}], {}, "'role' and 'content'"),
        ([], {}, "list of messages"),
        ([say(QUESTION)], {"nonsense": 1}, "does not know 'nonsense'"),
        ([say(QUESTION)], {"images": ["x.png"]}, "does not know 'images'"),
        ([say(QUESTION)], {"return_tensors": "tf"}, "give pt or np"),
        ([say(QUESTION)], {"continue_final_message": True}, "not supported"),
        ([say(QUESTION)], {"tools": [{}]}, "not supported"),
    ],
)
def test_chats_that_cannot_be_used(processor, messages, options, says):
    with pytest.raises(PromptError, match=says):
        processor.apply_chat_template(messages, tokenize=True, return_dict=True, **options)


def test_clips_that_cannot_be_used(processor, tmp_path):
    bad = tmp_path / "bad.wav"
    bad.write_text("no sound")
    for part, says in (
        ({"type": "audio", "path": str(bad)}, r"bad\.wav"),
        ({"type": "audio", "path": str(bad), "audio": "x"}, "audio and path"),
        ({"type": "audio", "audio": {"array": [0.0]}}, "sampling_rate"),
        ({"type": "audio", "audio": [0.0, 0.1]}, "source of audio"),
    ):
        with pytest.raises(AudioError, match=says) as caught:
            tensors(processor, [say(part, QUESTION)])
        assert "\n" not in str(caught.value)


@pytest.fixture
def address(tmp_path):
    soundfile.write(tmp_path / "a.wav", noise(0.4).numpy(), 16_000, subtype="FLOAT")
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    handler.log_message = lambda *arguments: None
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_addresses_are_fetched_only_when_allowed(processor, address, tmp_path):
    messages = [say({"type": "audio", "url": f"{address}/a.wav"}, QUESTION)]
    with pytest.raises(AudioError, match=r"a\.wav: addresses are not fetched; pass allow_urls=True"):
        tensors(processor, messages)
    found = tensors(processor, messages, allow_urls=True)
    torch.testing.assert_close(found["input_values"][0], noise(0.4))
    with pytest.raises(AudioError, match=r"gone\.wav: it cannot be fetched \(.*File not found"):
        tensors(processor, [say({"type": "audio", "url": f"{address}/gone.wav"}, QUESTION)], allow_urls=True)
    with pytest.raises(AudioError, match="only http and https"):
        tensors(processor, [say({"type": "audio", "url": f"ftp://{tmp_path}/a.wav"}, QUESTION)], allow_urls=True)


def test_a_folder_cannot_allow_addresses(tmp_path):
    tiny_model().save_pretrained(tmp_path / "m")
    allowing = PalProcessor.from_pretrained(tmp_path / "m", allow_urls=True)
    assert allowing.allow_urls
    allowing.save_pretrained(tmp_path / "p")
    saved = tmp_path / "p" / "processor_config.json"
    assert "allow_urls" not in saved.read_text() + (tmp_path / "p" / "tokenizer_config.json").read_text()
    saved.write_text(json.dumps(json.loads(saved.read_text()) | {"allow_urls": True}))
    assert not AutoProcessor.from_pretrained(tmp_path / "p").allow_urls


def test_typed_marks_stay_text(processor):
    """What somebody types into a chat ends no turn."""
    plain = tensors(processor, [say("a <eos> b")])["input_ids"][0].tolist()
    assert processor.tokenizer.eos_token_id not in plain
    assert processor.decode(plain, skip_special_tokens=True) == "a <eos> b"


def test_decoding_skips_clips(processor):
    ids = tensors(processor, chat(0.3), chat(0.3, question="yes"))["input_ids"]
    assert processor.batch_decode(ids, skip_special_tokens=True) == [f"\n{QUESTION}", "\nyes"]
    assert processor.decode(ids[1], skip_special_tokens=True) == "\nyes"


def test_a_processor_saved_into_a_bundle_keeps_it_whole(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "m")
    PalProcessor.of(model).save_pretrained(tmp_path / "m")
    assert pal.load(tmp_path / "m").digest == model.digest
    AutoProcessor.from_pretrained(tmp_path / "m")
    path = tmp_path / "m" / "processor_config.json"
    path.write_text(path.read_text().replace("16000", "16001"))
    with pytest.raises(BundleError, match="SHA-256"):
        AutoProcessor.from_pretrained(tmp_path / "m")


# Forward


def turns(seconds, seed, answer, *before):
    return [*before, *chat(seconds, seed), say(answer, role="assistant")]


@pytest.mark.parametrize("kind", KINDS)
def test_loss_equals_the_models_own(kind):
    model = model_of(kind)
    processor = PalProcessor.of(model)
    chats = [turns(0.5, 0, "yes"), turns(0.9, 1, "a loud siren", say("yes"), say("no", role="assistant"))]
    inputs = processor.apply_chat_template(chats, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    labels = inputs["input_ids"].masked_fill(inputs.pop("assistant_masks") == 0, IGNORE)
    loss = PalForConditionalGeneration.wrap(model)(**inputs, labels=labels).loss
    as_turns = [
        [user_turn(QUESTION, 1), {"role": "assistant", "content": "yes"}],
        [
            {"role": "user", "content": "yes"},
            {"role": "assistant", "content": "no"},
            user_turn(QUESTION, 1),
            {"role": "assistant", "content": "a loud siren"},
        ],
    ]
    rows = [encode(model.tokenizer, talk, [i], train=True) for i, talk in enumerate(as_turns)]
    assert [int(n) for n in (labels != IGNORE).sum(1)] == [sum(x != IGNORE for x in row.labels) for row in rows]
    total, tokens = model.loss(Batch([noise(0.5), noise(0.9, 1)], rows))
    torch.testing.assert_close(loss, total / tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_stand_in_the_columns_of_the_ids(kind):
    """Each column predicts the next id, whatever rows a clip has: the same as asking for that id's likelihood."""
    model = model_of(kind)
    processor = PalProcessor.of(model)
    wrapped = PalForConditionalGeneration.wrap(model)
    talk = [say("yes", heard(noise(0.4).numpy()), "no", heard(noise(0.6, 1).numpy()), QUESTION)]
    inputs = tensors(processor, talk, chat(0.3))
    logits = wrapped(**inputs).logits
    ids = inputs["input_ids"]
    assert logits.shape == (*ids.shape, model.llm.vocab)
    log_p = logits.log_softmax(-1)
    clips = [noise(0.4), noise(0.6, 1)]
    found = ids[0][inputs["attention_mask"][0] != 0].tolist()
    for at in range(1, len(found)):
        if found[at] == AUDIO:
            continue
        labels = [found[at] if i == at else IGNORE for i in range(len(found))]
        expected = model.answer_scores(clips, [Tokens(found, [0, 1], labels)])[0]
        torch.testing.assert_close(log_p[0, at - 1, found[at]], expected, atol=1e-4, rtol=0)
    # padding has none, and a batch equals its rows alone
    assert not logits[1][inputs["attention_mask"][1] == 0].any()
    alone = tensors(processor, chat(0.3))
    torch.testing.assert_close(
        logits[1][inputs["attention_mask"][1] != 0], wrapped(**alone).logits[0], atol=1e-4, rtol=0
    )
    torch.testing.assert_close(wrapped(**inputs, logits_to_keep=2).logits, logits[:, -2:])
    assert wrapped(**inputs, return_dict=False)[0].equal(logits)


@pytest.mark.parametrize("pair", ["plits", "lal", "flamingo"], indirect=True)
def test_a_clip_before_everything(pair):
    """Nothing stands before it, so LAL has no row that predicts what follows."""
    model, auto, processor = pair
    inputs = processor(text="<audio>a loud siren", audio=noise(0.4))
    assert torch.isfinite(auto(**inputs).logits).all()
    ids = inputs["input_ids"][0].tolist()
    total, tokens = model.loss(Batch([noise(0.4)], [Tokens(ids, [0], [IGNORE, *ids[1:]])]))
    assert tokens > 1
    torch.testing.assert_close(auto(**inputs, labels=inputs["input_ids"]).loss, total / tokens)


@one_kind
def test_tensors_that_do_not_fit(pair):
    _, auto, processor = pair
    inputs = dict(tensors(processor, chat(0.3), chat(0.5, question=" ".join(WORDS))))
    for changed, says in (
        ({"input_values": inputs["input_values"][:1], "audio_lengths": inputs["audio_lengths"][:1]}, "1 clips but 2"),
        ({"input_values": None, "audio_lengths": None}, "0 clips but 2"),
        ({"attention_mask": None}, "no attention_mask"),
        ({"attention_mask": inputs["attention_mask"][:, 1:]}, "attention_mask has shape"),
        ({"audio_lengths": inputs["audio_lengths"] + 9000}, "do not fit"),
        ({"input_values": inputs["input_values"][0]}, "have shape"),
        ({"input_ids": inputs["input_ids"][0]}, "have shape"),
    ):
        for run in (auto, auto.generate):
            with pytest.raises(PromptError, match=says) as caught:
                run(**inputs | changed)
            assert "\n" not in str(caught.value)
    with pytest.raises(PalError, match="input_ids"):
        auto()
    with pytest.raises(PalError, match="past_key_values"):
        auto(**inputs, past_key_values=object())


def test_another_attention_is_refused():
    """Trap: it would be deaf."""
    wrapped = PalForConditionalGeneration.wrap(tiny_model("lal"))
    wrapped.pal.llm.lm.set_attn_implementation("eager")
    inputs = tensors(PalProcessor.of(wrapped.pal), chat(0.3))
    with pytest.raises(PalError, match="cannot hear"):
        wrapped(**inputs)
    with pytest.raises(PalError, match="cannot hear"):
        wrapped.generate(**inputs)


# Generation


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_new_tokens": 9},
        {"num_beams": 3, "max_new_tokens": 9},
        {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 5},
        {"do_sample": True, "temperature": 1.3, "top_k": 20, "max_new_tokens": 9},
    ],
)
def test_generation_equals_the_models_own(pair, options):
    model, auto, processor = pair
    rows = [encode(model.tokenizer, [user_turn(q, 1)], [i]) for i, q in enumerate([QUESTION, " ".join(WORDS)])]
    torch.manual_seed(3)
    expected = model.generate([noise(0.4), noise(0.9, 1)], rows, **options)
    inputs = tensors(processor, chat(0.4), chat(0.9, 1, " ".join(WORDS)))
    torch.manual_seed(3)
    made = auto.generate(**inputs, **options)
    count = options.get("num_return_sequences", 1)
    assert made[:, : inputs["input_ids"].shape[1]].equal(inputs["input_ids"].repeat_interleave(count, 0))
    texts = processor.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert [text.strip() for text in texts] == expected
    assert len(set(expected)) > 1, "both rows say the same, so this shows little"


def check_answers(model, auto, processor):
    """A padded batch answers as its rows alone do, and as `ask` does."""
    questions = [" ".join(WORDS[: i + 1]) for i in range(3)]
    chats = [chat(0.2 + 0.3 * i, i, question) for i, question in enumerate(questions)]
    together = new_ids(auto, tensors(processor, *chats), max_new_tokens=8)
    answers = []
    for i, (ids, messages) in enumerate(zip(together, chats, strict=True)):
        alone = new_ids(auto, tensors(processor, messages), max_new_tokens=8)[0]
        assert ids[: len(alone)].equal(alone)
        answers.append(model.ask((noise(0.2 + 0.3 * i, i).numpy(), 16_000), questions[i], max_new_tokens=8))
    assert [text.strip() for text in processor.batch_decode(together, skip_special_tokens=True)] == answers
    assert len(set(answers)) > 1, "all say the same, so this shows little"


def test_answers_are_those_of_ask(pair):
    check_answers(*pair)


def test_answers_of_fused_encoders_at_another_rate(tmp_path):
    encoders = [toy("encoder", "clap"), toy("encoder", "sslam")]
    model = tiny_model("pal", encoders=encoders, connector=toy("connector", "lfst"))
    model.save_pretrained(tmp_path / "m")
    processor = AutoProcessor.from_pretrained(tmp_path / "m")
    assert processor.sampling_rate == 48_000
    check_answers(model, AutoModelForMultimodalLM.from_pretrained(tmp_path / "m"), processor)


@one_kind
def test_lengths_count_a_clip_as_one_id(pair):
    _, auto, processor = pair
    inputs = tensors(processor, chat(1.5))
    width = inputs["input_ids"].shape[1]
    made = auto.generate(**inputs, max_length=width + 3, min_length=width + 3)
    assert made.shape == (1, width + 3)
    assert auto.generate(**inputs, generation_config=GenerationConfig(max_new_tokens=2)).shape[1] <= width + 2
    with pytest.raises(PalError, match="leaves no room"):
        auto.generate(**inputs, max_length=width)


@one_kind
def test_scores_and_streams(pair):
    _, auto, processor = pair
    inputs = tensors(processor, chat(0.7))
    plain = auto.generate(**inputs, max_new_tokens=6)
    full = auto.generate(**inputs, max_new_tokens=6, return_dict_in_generate=True, output_scores=True)
    assert full.sequences.equal(plain)
    assert len(full.scores) == plain.shape[1] - inputs["input_ids"].shape[1]
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    auto.generate(**inputs, max_new_tokens=6, streamer=streamer)
    new = plain[:, inputs["input_ids"].shape[1] :]
    assert "".join(streamer) == processor.batch_decode(new, skip_special_tokens=True)[0]


def test_the_models_own_options_are_kept(tmp_path):
    wrapped = PalForConditionalGeneration.wrap(tiny_model())
    wrapped.save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain" / "generation_config.json").exists()
    wrapped.generation_config.max_new_tokens = 3
    wrapped.save_pretrained(tmp_path / "m")
    loaded = AutoModelForMultimodalLM.from_pretrained(tmp_path / "m")
    inputs = tensors(PalProcessor.of(wrapped.pal), chat(0.7))
    assert loaded.generation_config.max_new_tokens == 3
    assert new_ids(loaded, inputs).equal(new_ids(wrapped, inputs))
    assert new_ids(loaded, inputs, min_new_tokens=3).shape[1] == 3


@one_kind
def test_pipeline(pair, tmp_path):
    model, auto, _ = pair
    pipe = pipeline("any-to-any", model=auto.config.name_or_path, device="cpu")
    soundfile.write(tmp_path / "a.wav", noise(0.8).numpy(), 16_000, subtype="FLOAT")
    messages = [say({"type": "audio", "path": str(tmp_path / "a.wav")}, QUESTION)]
    expected = model.ask(tmp_path / "a.wav", QUESTION, max_new_tokens=8)
    (found,) = pipe(text=messages, max_new_tokens=8, return_full_text=False)
    assert found["generated_text"].strip() == expected
    (whole,) = pipe(text=messages, max_new_tokens=8)
    assert whole["generated_text"][-1]["role"] == "assistant"
    assert whole["generated_text"][-1]["content"].strip() == expected
    several = pipe(text=[messages, messages], max_new_tokens=8, return_full_text=False)
    assert [one[0]["generated_text"].strip() for one in several] == [expected] * 2
    (plain,) = pipe(
        {"text": f"<user><audio>\n{QUESTION}<assistant>", "audio": str(tmp_path / "a.wav")}, max_new_tokens=8
    )
    assert plain["generated_text"].split("<assistant>")[-1].strip() == expected


# Saving and loading


def test_one_format(tmp_path):
    """What the one way reads and writes is what the other does, file by file the same."""
    model = tiny_model(system="Be brief.")
    model.save_pretrained(tmp_path / "m")
    pal.load(tmp_path / "m").save_pretrained(tmp_path / "a")
    AutoModelForMultimodalLM.from_pretrained(tmp_path / "m").save_pretrained(tmp_path / "b")
    assert verify(tmp_path / "a") == verify(tmp_path / "b")
    assert pal.load(tmp_path / "b").digest == model.digest
    inputs = tensors(AutoProcessor.from_pretrained(tmp_path / "b"), chat(0.3))
    assert "Be brief." in AutoProcessor.from_pretrained(tmp_path / "b").batch_decode(inputs["input_ids"])[0]


def test_a_flipped_byte_is_noticed_by_the_auto_classes(tmp_path):
    tiny_model().save_pretrained(tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match="SHA-256"):
        AutoModelForMultimodalLM.from_pretrained(tmp_path / "m")


@pytest.mark.parametrize("way", ["pal", "auto"])
def test_sharded(tmp_path, way):
    model = tiny_model()
    saved = model if way == "pal" else PalForConditionalGeneration.wrap(model)
    saved.save_pretrained(tmp_path / "m", max_shard_size="20KB")
    shards = sorted(path.name for path in (tmp_path / "m").glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    largest = max(4 * tensor.numel() for tensor in model.state_dict().values())
    assert max((tmp_path / "m" / name).stat().st_size for name in shards) < max(20_000, largest) + 8_000
    assert AutoModelForMultimodalLM.from_pretrained(tmp_path / "m").pal.digest == model.digest
    assert pal.load(tmp_path / "m").digest == model.digest
    (tmp_path / "m" / shards[1]).unlink()
    with pytest.raises(BundleError, match=shards[1]):
        pal.load(tmp_path / "m")


def test_an_index_cannot_name_files_outside(tmp_path):
    from pal.files import amend

    model = tiny_model()
    model.save_pretrained(tmp_path / "m", max_shard_size="20KB")
    model.save_pretrained(tmp_path / "other")
    index = json.dumps({"weight_map": {"x": "../other/model.safetensors"}}).encode()
    amend(tmp_path / "m", {"model.safetensors.index.json": index})
    with pytest.raises(BundleError, match=r"\.\./other"):
        pal.load(tmp_path / "m")


@pytest.mark.parametrize("size", ["many", "0", -3, "5 bananas"])
def test_a_size_that_is_none(tmp_path, size):
    with pytest.raises(BundleError, match="5GB"):
        tiny_model().save_pretrained(tmp_path / "m", max_shard_size=size)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_dtype(tmp_path, kind, name):
    dtype = getattr(torch, name)
    model_of(kind).save_pretrained(tmp_path / "m")
    loaded = AutoModelForMultimodalLM.from_pretrained(tmp_path / "m", dtype=dtype)
    assert {p.dtype for p in loaded.parameters()} == {dtype} == {loaded.dtype}
    rotary = loaded.pal.llm.lm.model.rotary_emb
    assert rotary.inv_freq.dtype == torch.float32, "positions would be rounded"
    inputs = tensors(PalProcessor.of(loaded.pal), chat(0.4), chat(0.7, 1))
    exact = AutoModelForMultimodalLM.from_pretrained(tmp_path / "m")
    assert exact.dtype == torch.float32
    near = loaded(**inputs).logits.float() - exact(**inputs).logits
    assert near.abs().mean() < 0.2 * exact(**inputs).logits.abs().mean()
    assert new_ids(loaded, inputs, max_new_tokens=3).shape[0] == 2
    loaded.save_pretrained(tmp_path / "half")
    again = AutoModelForMultimodalLM.from_pretrained(tmp_path / "half")
    assert again.dtype == dtype
    assert again.pal.digest == loaded.pal.digest == pal.load(tmp_path / "half").digest


def test_dtype_of_a_bundle_with_a_foreign_llm(tmp_path):
    """Trap: its digests are those of the weights as they were, not as they are cast."""
    donor = tiny_model()
    donor.llm.lm.save_pretrained(tmp_path / "llm")
    donor.tokenizer.save_pretrained(tmp_path / "llm")
    tiny_model(llm=str(tmp_path / "llm")).save_pretrained(tmp_path / "m")
    assert json.loads((tmp_path / "m" / "config.json").read_text())["left_out"]
    half = AutoModelForMultimodalLM.from_pretrained(tmp_path / "m", dtype="bfloat16")
    half.save_pretrained(tmp_path / "half")
    assert json.loads((tmp_path / "half" / "config.json").read_text())["left_out"]
    assert pal.load(tmp_path / "half").digest == half.pal.digest


def test_device_map(tmp_path):
    tiny_model().save_pretrained(tmp_path / "m")
    for device_map in ("cpu", "auto", {"": "cpu"}, torch.device("cpu")):
        loaded = AutoModelForMultimodalLM.from_pretrained(tmp_path / "m", device_map=device_map)
        assert loaded.device.type in ("cpu", "cuda", "mps", "xpu")
        assert set(loaded.hf_device_map) == {""}
    for device_map, says in (({"llm": 0, "ears": "cpu"}, "2 devices"), ("nonsense", "nonsense")):
        with pytest.raises(PalError, match=says) as caught:
            AutoModelForMultimodalLM.from_pretrained(tmp_path / "m", device_map=device_map)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options", [{"attn_implementation": "sdpa"}, {"dtype": "float7"}, {"load_in_8bit": True}, {"dtype": torch.float64}]
)
def test_options_that_cannot_be_followed(tmp_path, options):
    tiny_model().save_pretrained(tmp_path / "m")
    with pytest.raises(PalError) as caught:
        PalForConditionalGeneration.from_pretrained(tmp_path / "m", **options)
    assert "\n" not in str(caught.value)


@pytest.fixture
def foreign(tmp_path):
    """A bundle whose LLM lies elsewhere."""
    donor = tiny_model()
    donor.llm.lm.save_pretrained(tmp_path / "llm")
    donor.tokenizer.save_pretrained(tmp_path / "llm")
    tiny_model(llm=str(tmp_path / "llm")).save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def left_out(folder):
    return set(json.loads((folder / "config.json").read_text())["left_out"])


def test_trained_parts_or_everything(foreign, tmp_path):
    loaded = AutoModelForMultimodalLM.from_pretrained(foreign)
    loaded.save_pretrained(tmp_path / "part")
    loaded.save_pretrained(tmp_path / "all", full=True)
    assert left_out(tmp_path / "part") == left_out(foreign) != set()
    assert left_out(tmp_path / "all") == set()
    # what an optimiser changes is written, though nobody said that it would be trained
    with torch.no_grad():
        loaded.pal.llm.lm.model.norm.weight.add_(0.5)
    loaded.save_pretrained(tmp_path / "trained")
    assert left_out(tmp_path / "part") - left_out(tmp_path / "trained") == {"llm.lm.model.norm.weight"}
    for name in ("all", "trained"):
        again = AutoModelForMultimodalLM.from_pretrained(tmp_path / name)
        assert again.pal.digest == (loaded.pal.digest if name == "trained" else pal.load(foreign).digest)
    wrapped = PalForConditionalGeneration.wrap(pal.load(foreign))
    wrapped.save_pretrained(tmp_path / "wrapped")
    assert left_out(tmp_path / "wrapped") == left_out(foreign)


def test_saving_keeps_others_files(tmp_path):
    wrapped = PalForConditionalGeneration.wrap(tiny_model())
    folder = tmp_path / "out"
    (folder / "checkpoint-5").mkdir(parents=True)
    (folder / "checkpoint-5" / "state.json").write_text("{}")
    wrapped.save_pretrained(folder, max_shard_size="20KB")
    wrapped.save_pretrained(folder)
    assert (folder / "checkpoint-5" / "state.json").exists()
    assert [path.name for path in folder.glob("*.safetensors")] == ["model.safetensors"]
    assert AutoModel.from_pretrained(folder).pal.digest == wrapped.pal.digest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_adapters_of_a_bundle_load_and_merge(foreign, tmp_path):
    model = pal.load(foreign)
    model.llm.add_lora(LoRA(rank=2))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.llm.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    model.save_pretrained(tmp_path / "lora")
    loaded = AutoModelForMultimodalLM.from_pretrained(tmp_path / "lora")
    assert loaded.pal.digest == model.digest
    inputs = tensors(PalProcessor.of(model), chat(0.5))
    before = loaded(**inputs).logits
    plain = AutoModelForMultimodalLM.from_pretrained(foreign)(**inputs).logits
    assert (before - plain).abs().max() > 1e-2
    loaded.merge_adapters()
    torch.testing.assert_close(loaded(**inputs).logits, before, atol=1e-4, rtol=1e-4)
    assert not any("lora" in name for name in loaded.state_dict())
    loaded.save_pretrained(tmp_path / "merged")
    merged = pal.load(tmp_path / "merged")
    assert merged.digest == loaded.pal.digest
    weights = {f"llm.lm.model.layers.{i}.self_attn.{p}_proj.weight" for i in range(3) for p in "qv"}
    assert left_out(foreign) - left_out(tmp_path / "merged") == weights


def test_peft_adapters_load_and_merge(foreign, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    base = AutoModelForMultimodalLM.from_pretrained(foreign)
    inputs = tensors(PalProcessor.of(base.pal), chat(0.5))
    plain = base(**inputs).logits
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=r".*llm\.lm.*\.(q|v)_proj", init_lora_weights=False))
    before = adapted(**inputs).logits
    assert (before - plain).abs().max() > 1e-2
    adapted.save_pretrained(tmp_path / "adapter")

    # by PEFT, by transformers from the adapter's folder, and into a loaded model
    fresh = AutoModelForMultimodalLM.from_pretrained(foreign)
    by_peft = PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    torch.testing.assert_close(by_peft(**inputs).logits, before)
    by_auto = AutoModelForMultimodalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(by_auto(**inputs).logits, before)
    with pytest.raises(BundleError, match="merge_adapters"):
        by_auto.save_pretrained(tmp_path / "no")

    by_auto.merge_adapters()
    merged = by_peft.merge_and_unload()
    for number, one in enumerate((by_auto, merged)):
        torch.testing.assert_close(one(**inputs).logits, before, atol=1e-4, rtol=1e-4)
        one.save_pretrained(tmp_path / f"merged{number}")
        again = pal.load(tmp_path / f"merged{number}")
        assert again.digest == one.pal.digest
        assert left_out(tmp_path / f"merged{number}")


def test_gradient_checkpointing_changes_no_gradient():
    wrapped = PalForConditionalGeneration.wrap(tiny_model()).train()
    inputs = PalProcessor.of(wrapped.pal).apply_chat_template(
        turns(0.4, 0, "yes"), tokenize=True, return_dict=True, return_tensors="pt"
    )
    grads = []
    for on in (False, True):
        wrapped.zero_grad()
        torch.manual_seed(0)
        (wrapped.gradient_checkpointing_enable if on else wrapped.gradient_checkpointing_disable)()
        wrapped.pal.ears.encoders.eval()
        wrapped(**inputs, labels=inputs["input_ids"]).loss.backward()
        grads.append({name: p.grad.clone() for name, p in wrapped.named_parameters() if p.grad is not None})
    assert any("integration" in name for name in grads[0])
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad)
    with pytest.raises(PalError, match="use_reentrant"):
        wrapped.gradient_checkpointing_enable({"use_reentrant": True})


def test_trainer(tmp_path):
    """transformers' Trainer takes the model as it is, and the loss falls."""
    from transformers import Trainer, TrainingArguments

    wrapped = PalForConditionalGeneration.wrap(tiny_model())
    processor = PalProcessor.of(wrapped.pal)
    items = [turns(0.3, i, word) for i, word in enumerate(["yes", "no", "a loud siren", "yes"])]

    def collate(chats):
        made = processor.apply_chat_template(chats, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        mask = made.pop("assistant_masks")
        return {**made, "labels": made["input_ids"].masked_fill(mask == 0, IGNORE)}

    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=8,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        use_cpu=True,
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    trainer = Trainer(model=wrapped, args=arguments, train_dataset=items, data_collator=collate)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]
    trainer.save_model(tmp_path / "saved")
    assert pal.load(tmp_path / "saved").digest == wrapped.pal.digest
