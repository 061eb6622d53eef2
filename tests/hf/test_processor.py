"""The processor beside the ids and waveforms that `ask` makes."""

import json
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import soundfile
import torch
from transformers import (
    AutoProcessor,
)

from pal.data.prompts import encode, user_turn
from pal.errors import AudioError, BundleError, PromptError
from pal.hf import PalProcessor
from pal.types import AUDIO
from tests.hf.chats import QUESTION, chat, heard, one_kind, say, tensors
from tests.models import LLM, WORDS, noise, pal, tiny_model


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
    for messages in ([say({"type": "audio"}, QUESTION)], [{"role": "user", "content": f"<audio>{QUESTION}"}]):
        found = tensors(processor, messages, audio=[[str(path)]])
        assert found["input_ids"].equal(expected["input_ids"])
        torch.testing.assert_close(found["input_values"], expected["input_values"])


def test_text_and_audio_by_keyword(processor):
    text = processor.apply_chat_template(chat(0.4), add_generation_prompt=True)
    assert text == f"<user><audio>{QUESTION}<assistant>"
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
        with pytest.raises(PromptError, match="trunca"):
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
    with pytest.raises(AudioError, match=r"a\.wav: URLs are not fetched; pass allow_urls=True"):
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
    assert processor.batch_decode(ids, skip_special_tokens=True) == [QUESTION, "yes"]
    assert processor.decode(ids[1], skip_special_tokens=True) == "yes"


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


def test_a_chat_that_begins_with_an_answer_is_one_line(processor):
    with pytest.raises(PromptError, match="a chat cannot begin with an answer"):
        processor.apply_chat_template([{"role": "assistant", "content": "a"}], tokenize=True, return_dict=True)
