"""Clips as users and other libraries give them: each form is the same waveform, or an error of one line."""

import base64
import gzip
import io
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from pal.audio import load
from pal.backbone.audio_mask import AudioMask
from pal.clips import ClipBatch, is_clip, is_clip_list, read_clip
from pal.errors import AudioError, AudioWarning, PalError
from pal.hf import PalProcessor
from pal.types import EncodedClip
from tests.models import noise, tiny_model

RATE = 16_000
SOUND_N = np.random.default_rng(0).uniform(-0.5, 0.5, 900).astype(np.float32)
STEREO_NC = np.stack([SOUND_N, 0.5 * SOUND_N], axis=1)


def wav(samples=SOUND_N, rate=RATE) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV", subtype="FLOAT")
    return file.getvalue()


class Decoder:
    """torchcodec's AudioDecoder, as far as its documentation goes."""

    def __init__(self, samples_CN=SOUND_N[None], rate=RATE):
        self.samples = SimpleNamespace(data=torch.tensor(np.asarray(samples_CN)), sample_rate=rate, pts_seconds=0.0)

    def get_all_samples(self):
        return self.samples


class Foreign:
    """An array of another library: numpy's protocol and a shape."""

    def __init__(self, array):
        self._array, self.shape = array, array.shape

    def __array__(self, dtype=None, copy=None):
        return self._array


def fault(clip, **options) -> str:
    with pytest.raises(AudioError) as caught:
        read_clip(clip, RATE, **options)
    text = str(caught.value)
    assert "\n" not in text and len(text) <= 300 and "; " in text, text
    return text


@pytest.fixture
def path(tmp_path) -> Path:
    path = tmp_path / "a clip.wav"
    path.write_bytes(wav())
    return path


def test_every_form_is_the_same_clip(path):
    data = wav()
    text = base64.b64encode(data).decode()
    tensor = torch.from_numpy(SOUND_N)
    forms = [
        *(path, str(path), data, bytearray(data), memoryview(data), io.BytesIO(data)),
        *(
            (SOUND_N, RATE),
            (RATE, SOUND_N),
            (tensor, RATE),
            (tensor[None], torch.tensor(RATE)),
            (tensor[:, None], RATE),
        ),
        *((SOUND_N.tolist(), float(RATE)), (SOUND_N, np.int32(RATE)), (Foreign(SOUND_N), RATE)),
        *(SOUND_N, tensor, tensor[None], SOUND_N[:, None], tensor.double().requires_grad_(), Foreign(SOUND_N[None])),
        *({"array": SOUND_N, "sampling_rate": RATE}, {"array": SOUND_N.tolist(), "sampling_rate": RATE, "path": None}),
        *({"raw": tensor, "sampling_rate": RATE}, {"waveform": tensor[None], "sample_rate": RATE}),
        *({"bytes": data, "path": None}, {"bytes": data, "path": "gone.wav"}, {"bytes": None, "path": str(path)}),
        *({"path": path}, {"array": SOUND_N, "sampling_rate": RATE, "path": "gone.wav", "bytes": b"none"}),
        *(Decoder(), Decoder().get_all_samples()),
        *(
            f"data:audio/wav;base64,{text}",
            f"DATA:;x=y;BASE64,{text}",
            f"data:audio/x-wav;a=b;base64, {text[:80]}\n{text[80:]}",
        ),
        f"data:audio/wav;base64,{text.replace('+', '-').replace('/', '_').rstrip('=')}",
        f"data:audio/wav;base64,{text.replace('+', '%2B').replace('/', '%2f').replace('=', '%3D')}",
        "data:audio/wav," + "".join(f"%{byte:02X}" for byte in data),
    ]
    for form in forms:
        assert is_clip(form)
        found = read_clip(form, RATE)
        assert_close(found.samples_N, tensor, msg=f"{type(form)} {str(form)[:80]}")
        assert found.seconds == 900 / RATE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tensors_of_any_float_type(dtype):
    samples_N = torch.from_numpy(SOUND_N).to(dtype)
    assert_close(read_clip((samples_N, RATE), RATE).samples_N, samples_N.float())


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.uint8])
def test_integers_have_their_full_scale(dtype):
    """A tensor of int16 is the same sound as an array of int16, not 32768 times as loud."""
    kind = np.iinfo(dtype)
    samples_N = np.linspace(kind.min, kind.max, 100).astype(dtype)
    expected = read_clip((samples_N, RATE), RATE).samples_N
    assert expected.abs().max() == 1.0
    for form in ((torch.from_numpy(samples_N), RATE), (torch.from_numpy(samples_N)[None], RATE), (RATE, samples_N)):
        assert_close(read_clip(form, RATE).samples_N, expected)


@given(st.integers(1, 12), st.integers(1, 60), st.booleans())
@settings(max_examples=150, deadline=None)
def test_which_axis_is_that_of_channels(first, last, as_tensor):
    """The one with at most 8 entries, where the other has more."""
    samples = np.random.default_rng(first).uniform(-1, 1, (first, last)).astype(np.float32)
    clip = (torch.from_numpy(samples) if as_tensor else samples, RATE)
    if (first <= 8) == (last <= 8):
        text = fault(clip)
        assert f"of the axes of shape [{first}, {last}] {'each' if first <= 8 else 'none'} could be" in text
    else:
        expected = samples.mean(0 if first <= 8 else 1, dtype=np.float32)
        assert_close(read_clip(clip, RATE).samples_N, torch.from_numpy(expected))


def test_channels_are_mixed_and_rates_kept():
    expected = torch.from_numpy(STEREO_NC.mean(1))
    for form in (STEREO_NC, STEREO_NC.T, torch.from_numpy(STEREO_NC.T), Decoder(STEREO_NC.T)):
        assert_close(read_clip(form, RATE).samples_N, expected)
    # a decoder's axes are known, however short its clip
    assert_close(read_clip(Decoder(STEREO_NC.T[:, :5]), RATE).samples_N, expected[:5])
    for form, options in (
        ((SOUND_N, 8_000), {}),
        (SOUND_N, {"source_rate": 8_000}),
        (Decoder(rate=8_000), {}),
        ({"array": SOUND_N, "sampling_rate": 8_000}, {"source_rate": 4_000}),
        (wav(rate=8_000), {"source_rate": 4_000}),
    ):
        found = read_clip(form, RATE, **options)
        assert (found.seconds, len(found.samples_N)) == (900 / 8_000, 1800)


class Closed(io.BytesIO):
    def read(self, *_):
        raise EOFError("Compressed file ended before the end-of-stream marker was reached")


class Failing:
    def get_all_samples(self):
        raise RuntimeError("Could not push packet to decoder:\nInvalid data")


@pytest.mark.parametrize(
    ("clip", "says"),
    [
        ((SOUND_N, RATE, 1), "not an array and its rate"),
        ((SOUND_N, "16000"), "not an array and its rate"),
        ((SOUND_N, True), "not an array and its rate"),
        ((RATE, RATE), "not an array and its rate"),
        (("a.wav", RATE), "not an array and its rate"),
        ((SOUND_N, float("nan")), "not an array and its rate"),
        ((SOUND_N, 16_000.5), "is not a whole number"),
        ((SOUND_N, 1), "its rate of 1 Hz"),
        ((SOUND_N[None, None], RATE), r"shape \[1, 1, 900\] is no clip"),
        ((np.zeros((1, 0)), RATE), "no samples"),
        (torch.zeros(0), "no samples"),
        (SOUND_N.astype(np.complex64), "complex64 are not supported"),
        (torch.ones(20, dtype=torch.bool), "bool are not supported"),
        (np.array(["a", "b"]), "are not supported"),
        (([0, 1000, -1000], RATE), "64 bits have no full scale"),
        (torch.arange(100), "64 bits have no full scale"),
        (([[0.1], [0.1, 0.2]], RATE), "no array of numbers"),
        (torch.zeros(900, device="meta"), "no array of numbers"),
        (torch.full((900,), float("nan")), "not finite"),
        ({"array": [0.0]}, "needs 'array' and 'sampling_rate'"),
        ({"array": SOUND_N, "sampling_rate": None}, "needs 'array' and 'sampling_rate'"),
        ({"array": SOUND_N, "raw": SOUND_N, "sampling_rate": 8000}, "needs 'array' and 'sampling_rate'"),
        ({}, "needs 'array' and 'sampling_rate'"),
        ({"bytes": None, "path": None}, "neither bytes nor a path"),
        ({"bytes": "text", "path": None}, "'bytes' are of type str"),
        ({"bytes": b"none", "path": "x.wav"}, r"^x\.wav: "),
        ({"path": 5}, "int is no source"),
        (None, "NoneType is no source"),
        (object(), "object is no source"),
        (Failing(), r"its decoder failed \(Could not push packet to decoder: Invalid data\)"),
        (SimpleNamespace(data=torch.zeros(900), sample_rate=RATE), r"samples of shape \[900\]"),
        (io.StringIO("text"), "gives no bytes"),
        (Closed(), "cannot be read .*end-of-stream"),
        (gzip.GzipFile(fileobj=io.BytesIO(gzip.compress(wav())[:900])), "cannot be read .*end-of-stream"),
        ("data:audio/wav;base64,AAA=A", "its base64 is cut or holds other characters"),
        ("data:audio/wav;base64,AAAAA", "its base64 is cut or holds other characters"),
        ("data:audio/wav;base64,\u00e9\u00e9\u00e9\u00e9", "its base64 is cut or holds other characters"),
        ("data:audio/wav;base64", "has a comma"),
        ("data:,", "it is empty"),
        ("data:text/plain,hello%20you", "it is no WAV"),
        ("https://x.org/a.wav", "URLs are not fetched; pass allow_urls=True"),
        ("file:///etc/a.wav", "URLs are not fetched; pass allow_urls=True or --allow-urls, or give its path"),
        ("/tmp/no\0file.wav", "no such file"),
        ("gone.wav", "no such file"),
    ],
)
def test_what_cannot_be_used_is_one_line(clip, says):
    import re

    assert re.search(says, fault(clip))


def test_a_closed_file_is_one_line(path):
    file = path.open("rb")
    file.close()
    assert "cannot be read (read of closed file)" in fault(file)


@pytest.mark.parametrize(
    "clip",
    [
        base64.b64encode(bytes(3_000_000)).decode(),
        "a" * 5_000_000 + ".wav",
        "https://x.org/" + "a" * 1_000_000,
        "data:" + "a" * 1_000_000,
        "data:audio/wav;base64," + "!" * 1_000_000,
        {"array": list(range(100_000))},
        {f"k{i}": i for i in range(100_000)},
        {"bytes": b"none", "path": "p" * 100_000},
        (np.zeros((100, 1000)), 16_000),
        [[0.0] * 100_000],
        ("x" * 1_000_000, 16_000),
    ],
    ids=range(11),
)
def test_no_line_is_long_whatever_is_given(clip):
    fault(clip)


def test_a_list_is_several_clips_and_a_pair_is_one():
    assert is_clip_list([]) and is_clip_list(["a.wav"]) and is_clip_list([SOUND_N])
    assert not any(map(is_clip_list, ("a.wav", b"RIFF", (SOUND_N, RATE), SOUND_N, torch.zeros(3), {"path": "x"}, None)))
    for numbers in ([0.1, 0.2], [1], [np.float32(1)]):
        with pytest.raises(AudioError, match="a list of numbers is no clip; give an array"):
            is_clip_list(numbers)
    assert not is_clip(object()) and not is_clip(5)


# Files by URL


@pytest.mark.parametrize("name", ["a b.wav", "é.wav", "100%.wav", "a#1?.wav", "\udce9.wav"])
def test_file_addresses(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(wav())
    for url in (
        path.as_uri(),
        path.as_uri().replace("file://", "file://localhost"),
        path.as_uri().replace("file://", "FILE:"),
        f"file://{path}",
        path.as_uri() + "#t=1",
    ):
        with pytest.raises(AudioError, match="URLs are not fetched"):
            read_clip(url, RATE)
        if name == "\udce9.wav" and "\udce9" in url:
            continue  # no URL
        assert_close(read_clip(url, RATE, allow_urls=True).samples_N, torch.from_numpy(SOUND_N))
        assert_close(read_clip({"path": url}, RATE, allow_urls=True).samples_N, torch.from_numpy(SOUND_N))


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("file://server/share/a.wav", "names a local file; write file:///folder/clip.wav"),
        ("file://a.wav", "names a local file"),
        ("file:a.wav", "names a local file"),
        ("file:///none/a%20b.wav", "there is no such file"),
        ("file:///none/%00.wav", "there is no such file"),
        ("file:///" + "a" * 10_000, "no file has so long a name"),
        (f"file://{Path(__file__).parent}", "it is a folder"),
    ],
)
def test_file_urls_that_lead_nowhere(url, says):
    assert says in fault(url, allow_urls=True)


def test_remedies_fit_what_was_given():
    assert fault("") == "audio: the path is empty; name a file"
    for scheme in ("s3", "gs", "hf"):
        says = fault(f"{scheme}://bucket/a.wav")
        assert "only http, https, file and data" in says and "allow_urls" not in says
    assert "pass allow_urls=True" in fault("http://127.0.0.1/a.wav")
    for rate in (0, -16_000, 10**9):
        says = fault((SOUND_N, rate))
        assert f"its rate of {rate} Hz is not in 4000..192000" in says and "ffmpeg" not in says


# Clips that the model has made something of


QUESTION = "What sound is this?"


@pytest.fixture(scope="module")
def model():
    return tiny_model("lal")


def test_a_waveform_knows_its_rate():
    wave = load((SOUND_N, RATE), RATE)
    assert read_clip(wave, RATE) is wave
    slower = read_clip(wave, 8_000)
    assert (len(slower.samples_N), slower.rate, slower.seconds, slower.name) == (450, 8_000, 900 / RATE, wave.name)


def test_what_was_made_of_a_clip_answers_as_the_clip_does(model):
    clips = [(noise(0.4, at).numpy(), RATE) for at in range(4)]
    expected = model.ask_detailed(clips, QUESTION, max_new_tokens=4)
    kinds = {
        "encoded": [model.encode_clip(clip) for clip in clips],
        "indexed": [model.index(clip) for clip in clips],
        "waveform and encoded": [*clips[:2], *(model.encode_clip(clip) for clip in clips[2:])],
        "all": [clips[0], load(clips[1], RATE), model.encode_clip(clips[2]), model.index(clips[3])],
    }
    for kind, of_kind in kinds.items():
        found = model.ask_detailed(of_kind, QUESTION, max_new_tokens=4)
        assert [one.text for one in found] == [one.text for one in expected], kind
        assert [one.audio_tokens for one in found] == [one.audio_tokens for one in expected], kind
        assert [(one.audio_seconds, one.audio_seconds_used) for one in found] == [(0.4, 0.4)] * 4, kind
        assert model.ask(of_kind, QUESTION, max_new_tokens=4) == [one.text for one in expected], kind


def test_an_index_of_an_encoded_clip_is_that_of_the_clip(model):
    clip = (noise(0.4).numpy(), RATE)
    ours, theirs = model.index(model.encode_clip(clip)), model.index(clip)
    assert ours.seconds == theirs.seconds == 0.4
    assert_close(ours.streams[0].k_LBGAC, theirs.streams[0].k_LBGAC)
    assert model.index(ours) is ours


def test_hiding_holds_for_every_kind_of_clip(model):
    for make in (lambda clip: clip, model.encode_clip, model.index):
        clips = [make((noise(0.2 + 0.3 * at, at).numpy(), RATE)) for at in range(4)]
        plain = [answer.text for answer in model.ask_detailed(clips, QUESTION, max_new_tokens=8)]
        with model.hiding(AudioMask()):
            hidden = [answer.text for answer in model.ask_detailed(clips, QUESTION, max_new_tokens=8)]
            assert model.ask(clips, QUESTION, max_new_tokens=8) == hidden
        assert hidden != plain


def test_notes_stay_with_clips_beside_an_index(model):
    """What could not be checked is said, in whatever company the clip comes."""
    streamed = bytearray(wav(noise(0.4).numpy()))
    size = streamed.index(b"data") + 4
    streamed[4:8] = streamed[size : size + 4] = b"\xff" * 4
    other = model.index((noise(0.4, 1).numpy(), RATE))
    with pytest.warns(AudioWarning):
        model.ask([bytes(streamed), other], QUESTION, read_to_end=True, max_new_tokens=2)
    for company in ([], [other]):
        answer = model.ask_detailed([bytes(streamed), *company], QUESTION, read_to_end=True, max_new_tokens=2)[0]
        assert len(answer.notes) == 1


def test_samples_are_asked_for_where_they_are_needed(model):
    for clip in (model.index((SOUND_N, RATE)), model.encode_clip((SOUND_N, RATE))):
        assert is_clip(clip)
        with pytest.raises(AudioError, match="holds no samples; give the audio itself"):
            PalProcessor.of(model)(text="<audio>", audio=clip)


def test_an_encoded_clip_of_other_encoders_is_refused(model):
    with pytest.raises(PalError, match=r"features of widths \[5\], not \[\d+\]; encode it anew"):
        model.ask(EncodedClip((torch.zeros(3, 5),), 0.1), QUESTION)


def test_a_batch_is_of_one_kind(model):
    with pytest.raises(AssertionError, match="of one kind"):
        ClipBatch.of([noise(0.1), model.encode_clip((SOUND_N, RATE))])
    assert ClipBatch.of([]) == ClipBatch()
