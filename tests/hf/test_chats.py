"""Chats as clients of OpenAI, Qwen, vLLM and transformers write them: the same clips at the same places."""

import base64
import io

import numpy as np
import pytest
import soundfile
import torch

from pal.data.prompts import PromptStyle
from pal.errors import AudioError, PalError, PromptError
from pal.hf.chats import read_chat
from tests.hf.chats import QUESTION, heard, say, tensors
from tests.models import noise

ASK = {"type": "text", "text": QUESTION}


def wav(seconds=0.2, seed=0) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, noise(seconds, seed).numpy(), 16_000, format="WAV", subtype="FLOAT")
    return file.getvalue()


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def parts(path) -> list[dict]:
    data = wav()
    text, array = b64(data), noise(0.2).numpy()
    address = f"data:audio/wav;base64,{text}"
    return [
        *({"type": "audio", key: str(path)} for key in ("audio", "path", "url", "audio_url")),
        *({"audio": str(path)}, {"audio_url": {"url": str(path)}}, {"type": "audio_url", "audio_url": str(path)}),
        *({"type": "audio_url", "audio_url": {"url": address}}, {"type": "audio", "url": address}),
        *({"type": "audio", "audio": address}, {"type": "audio", "audio": {"url": address}}),
        *({"type": "audio", key: value} for key in ("data", "base64") for value in (text, data, address)),
        {"type": "audio", "audio": {"data": text, "format": "wav"}},
        {"type": "input_audio", "input_audio": {"data": text, "format": "wav"}},
        {"type": "input_audio", "input_audio": {"data": address}},
        {"type": "input_audio", "input_audio": text},
        {"input_audio": {"data": text, "format": "wav"}},
        {"type": "audio", "data": text, "mimeType": "audio/wav", "cache_control": None, "text": None},
        {"type": "audio", "bytes": data, "path": "gone.wav"},
        {"type": "audio", "array": array, "sampling_rate": 16_000},
        {"type": "audio", "audio": {"array": array.tolist(), "sampling_rate": 16_000}},
        {"type": "audio", "audio": array.tolist(), "sampling_rate": 16_000},
        {"type": "audio", "audio": torch.from_numpy(array)[None], "sampling_rate": 16_000},
        *({"type": "audio", "audio": {"bytes": b, "path": p}} for b, p in ((data, None), (None, str(path)))),
    ]


def test_every_part_is_the_same_clip(processor, tmp_path):
    path = tmp_path / "a.wav"
    path.write_bytes(wav())
    expected = tensors(processor, [say(heard((noise(0.2).numpy(), 16_000)), QUESTION)])
    for part in parts(path):
        found = tensors(processor, [{"role": "user", "content": [part, ASK]}])
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, msg=f"{name} of {str(part)[:100]}")


def test_a_rate_beside_an_array_holds_for_it(processor):
    half = noise(0.2).numpy()[::2]
    part = {"type": "audio", "audio": half, "sampling_rate": 8_000}
    assert tensors(processor, [say(part, QUESTION)])["audio_lengths"].tolist() == [3200]
    part = {"type": "audio", "audio": (half, 16_000), "sampling_rate": 8_000}
    assert tensors(processor, [say(part, QUESTION)])["audio_lengths"].tolist() == [1600]


def test_several_parts_of_several_kinds_in_one_message(processor):
    clips = [noise(0.1 + 0.1 * i, seed=i) for i in range(3)]
    message = {
        "role": "user",
        "content": [
            {"type": "input_audio", "input_audio": {"data": b64(wav(0.1, 0)), "format": "wav"}},
            "and",
            {"type": "audio_url", "audio_url": {"url": f"data:audio/wav;base64,{b64(wav(0.2, 1))}"}},
            {"type": "input_text", "text": "or"},
            heard((16_000, clips[2].numpy())),
            ASK,
        ],
    }
    found = tensors(processor, [message])
    assert found["audio_lengths"].tolist() == [len(clip) for clip in clips]
    for row, clip in zip(found["input_values"], clips, strict=True):
        torch.testing.assert_close(row[: len(clip)], clip)
    talk, _ = read_chat([message], PromptStyle(after_clip="\n"))
    assert talk[0]["content"] == f"<audio>\nand<audio>\nor<audio>\n{QUESTION}"


def test_system_and_assistant_may_be_lists_of_parts(processor):
    clip = heard((noise(0.1).numpy(), 16_000))
    answer = {"role": "assistant", "content": [{"type": "output_text", "text": "a dog"}]}
    lists = [say("Listen.", role="system"), say(clip, QUESTION), answer, say("Sure?")]
    plain = [
        {"role": "system", "content": "Listen."},
        say(clip, QUESTION),
        {"role": "assistant", "content": "a dog"},
        {"role": "user", "content": "Sure?"},
    ]
    for name, tensor in tensors(processor, plain).items():
        assert tensors(processor, lists)[name].equal(tensor)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "the content of a message of role 'user' is None"),
        (5, "content must be a string or a list of parts, not 5"),
        ({"type": "text", "text": "x"}, "content must be a string or a list of parts"),
        (b"bytes", "content must be a string or a list of parts"),
        ([None], "a part of type 'NoneType' is unknown"),
        ([5], "a part of type 'int' is unknown"),
        ([{}], "a part of type 'None' is unknown"),
        ([{"type": "image_url", "image_url": {"url": "x"}}], "a part of type 'image_url' is unknown; known: audio"),
        ([{"type": "tool_use", "id": "1"}], "a part of type 'tool_use' is unknown"),
        ([{"type": ["audio"]}], r"a part of type '\['audio'\]' is unknown"),
        ([{"type": "text"}], "a part of type 'text' needs 'text', not None"),
        ([{"type": "text", "text": 5}], "a part of type 'text' needs 'text', not 5"),
    ],
)
def test_contents_that_cannot_be_used(processor, content, says):
    with pytest.raises(PromptError, match=says):
        tensors(processor, [{"role": "user", "content": content}])


@pytest.mark.parametrize(
    "messages",
    [
        "What?",
        [5],
        [{"role": "user"}],
        [{"content": "x"}],
        [{"role": None, "content": "x"}],
        [{("a", 1): object(), "role": "user"}],
        [{"role": "tool", "content": "x", "tool_call_id": "1"}],
        [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}, {"role": "user", "content": "x"}],
        [{"role": "wizard", "content": "x"}],
        [
            {"role": "user", "content": "x" * 10},
            {"role": "assistant", "content": "<audio>"},
            {"role": "user", "content": "y"},
        ],
    ],
)
def test_messages_that_cannot_be_used(processor, messages):
    with pytest.raises(PromptError) as caught:
        processor.apply_chat_template(messages, tokenize=True, return_dict=True, add_generation_prompt=True)
    assert len(str(caught.value)) <= 300 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ({"type": "audio", "path": "x", "url": "y"}, "an audio part has url and path; give one of"),
        ({"type": "audio", "audio": "x", "audio_start": 1.0}, "has 'audio_start', and clips are used whole"),
        ({"type": "audio", "audio": "x", "duration": 1.0}, "has 'duration', and clips are used whole"),
        ({"type": "input_audio", "input_audio": {"format": "wav"}}, "needs 'data' or 'url'"),
        ({"type": "input_audio", "input_audio": {"data": "@@@"}}, "its base64 is cut or holds other characters"),
        ({"type": "audio_url", "audio_url": {"uri": "x"}}, "needs 'data' or 'url'"),
        ({"type": "audio", "base64": "AAAAA"}, "its base64 is cut"),
        ({"type": "audio_url", "audio_url": {"url": "https://x.org/a.wav"}}, "URLs are not fetched"),
        ({"type": "input_audio", "input_audio": {"data": "https://x.org/a.wav"}}, "URLs are not fetched"),
        ({"type": "audio", "audio": b64(bytes(90_000))}, "no file has so long a name; pass a path; base64 goes as"),
        ({"type": "audio", "audio": {"array": noise(1.0).numpy()}}, "needs 'array' and 'sampling_rate'"),
        ({"type": "audio", "audio": {"data": noise(1.0).numpy(), "sampling_rate": 8000}}, "needs 'array'"),
    ],
)
def test_parts_that_cannot_be_used(processor, part, says):
    with pytest.raises(AudioError, match=says) as caught:
        tensors(processor, [say(part, QUESTION)])
    assert len(str(caught.value)) <= 300 and "\n" not in str(caught.value)


def test_file_addresses_are_behind_the_switch_of_all(processor, tmp_path):
    path = tmp_path / "a clip.wav"
    path.write_bytes(wav())
    messages = [say({"type": "audio_url", "audio_url": {"url": path.as_uri()}}, QUESTION)]
    with pytest.raises(AudioError, match="URLs are not fetched; pass allow_urls=True"):
        tensors(processor, messages)
    found = tensors(processor, messages, allow_urls=True)
    torch.testing.assert_close(found["input_values"][0], noise(0.2))


def test_clips_by_keyword_may_be_a_column_of_a_data_set(processor):
    class Column(list):
        """datasets' Column is a sequence of clips."""

    clips = Column([{"bytes": wav(0.1, 0), "path": None}, {"bytes": wav(0.2, 1), "path": None}])
    found = processor(text=["<audio>?", "<audio>!"], audio=clips)
    assert found["audio_lengths"].tolist() == [1600, 3200]


def test_numbers_are_no_clips(processor):
    with pytest.raises(PalError, match="a list of numbers is no clip"):
        processor(text="<audio>?", audio=[np.float32(0.1), np.float32(0.2)])


def test_base64_and_paths_may_be_bytes(processor, tmp_path):
    path = tmp_path / "a clip.wav"
    path.write_bytes(wav())
    encoded = b64(wav()).encode()
    for part in (
        {"type": "audio", "base64": encoded},
        {"type": "audio", "data": encoded},
        {"type": "input_audio", "input_audio": {"data": encoded}},
        {"type": "audio", "data": wav()},
        {"type": "audio", "path": str(path).encode()},
        {"type": "audio", "audio": {"path": str(path).encode()}},
    ):
        found = tensors(processor, [say(part, QUESTION)])
        torch.testing.assert_close(found["input_values"][0], noise(0.2))
    with pytest.raises(AudioError, match="bytes: it is no WAV"):
        tensors(processor, [say({"type": "audio", "base64": b"no base64!"}, QUESTION)])


def test_chats_that_are_none_are_one_line(processor):
    with pytest.raises(PromptError, match="not a dict; give that list"):
        processor.apply_chat_template({"messages": [{"role": "user", "content": "a"}]}, tokenize=True)
