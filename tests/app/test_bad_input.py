"""Input that cannot be used: one line that says what to do, and a status that is not 0."""

import json
import shutil
import struct

import numpy as np
import pytest
import soundfile
import yaml

from tests.app.conftest import STAGE
from tests.app.test_cli import QUESTION, run

NOISE = np.random.default_rng(0).normal(size=8000) / 10


def wav(rate=16_000, channels=1, data=None, declared=None):
    """A PCM-16 WAV file as bytes, with a header that may lie."""
    data = (NOISE * 32767).astype("<i2").tobytes() if data is None else data
    size = len(data) if declared is None else declared
    form = struct.pack("<HHIIHH", 1, channels, rate, min(rate * channels * 2, 2**32 - 1), channels * 2, 16)
    chunks = b"fmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", size) + data
    return b"RIFF" + struct.pack("<I", min(2**32 - 1, 4 + len(chunks))) + b"WAVE" + chunks


def fail(*arguments, says):
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    # a notice and progress bars, which end in a carriage return, may come before it
    lines = [line for line in result.stderr.splitlines() if line and not line.startswith(("note: ", "Loading weights"))]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    for word in says:
        assert word in lines[0], lines[0]
    assert result.stdout == ""


def not_a_number():
    samples = np.full(8000, np.nan, dtype="<f4").tobytes()
    form = struct.pack("<HHIIHH", 3, 1, 16_000, 64_000, 4, 32)
    return (
        b"RIFF"
        + struct.pack("<I", 36 + len(samples))
        + b"WAVEfmt "
        + struct.pack("<I", 16)
        + form
        + (b"data" + struct.pack("<I", len(samples)) + samples)
    )


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"I am a text file, not audio.\n" * 20, []),
        (wav()[:8000], []),
        (wav(declared=1_000_000), []),
        (not_a_number(), []),
        (wav(data=b""), []),
        (b"", []),
        (wav(rate=1), ["1 Hz"]),
        (wav(rate=655_350), ["655"]),
        (wav(channels=9, data=b"\0" * 18_000), ["9"]),
    ],
    ids=["text", "half", "long-chunk", "nan", "zero-samples", "empty-file", "1-Hz", "655350-Hz", "9-channels"],
)
def test_audio(shipped, tmp_path, content, says):
    path = tmp_path / "bad.wav"
    path.write_bytes(content)
    fail("ask", path, QUESTION, says=["bad.wav", *says])
    fail("index", path, "--out", tmp_path / "x.safetensors", says=["bad.wav", *says])


def test_missing_audio(shipped, tmp_path):
    fail("ask", tmp_path / "gone.wav", QUESTION, says=["gone.wav"])
    fail("ask", tmp_path / "gone.safetensors", QUESTION, says=["gone.safetensors", "pal index"])


def test_question_without_clip_and_the_reverse(shipped, tmp_path):
    good = tmp_path / "good.wav"
    soundfile.write(good, NOISE, 16_000)
    fail("ask", f"<audio> {QUESTION}", says=["no clip for the question"])
    fail("ask", good, f"<audio> and <audio>: {QUESTION}", says=["2 '<audio>' placeholders but 1 clip"])
    fail("ask", good, good, f"<audio> {QUESTION}", says=["2 clips but 1 '<audio>' placeholder"])
    fail("ask", QUESTION, good, says=["is a file"])


def test_more_than_one_question_or_an_index_among_clips(shipped, tmp_path):
    (tmp_path / "a.wav").write_bytes(wav())
    (tmp_path / "folder").mkdir()
    (tmp_path / "x.palidx").mkdir()
    a, folder, index = (str(tmp_path / name) for name in ("a.wav", "folder", "x.palidx"))
    fail("ask", a, "Is there a dog?", "Does it rain?", says=["Is there a dog?", "all but the last argument"])
    fail("ask", index, "dog?", "cat?", says=[index, "is asked one question"])
    fail("ask", a, index, "dog?", says=[index, "without other clips"])
    fail("ask", folder, "dog?", says=[folder, "is a folder", f"pal index {folder}"])
    fail("index", str(tmp_path / "nosuch"), says=["nosuch", "there is no such file or folder"])
    fail("index", index, says=[index, "is an index"])


def test_manifest_with_a_missing_file(shipped, tmp_path):
    row = {"instruction": "What?", "input": "", "audio_id": "gone.wav", "dataset": "d", "task": "t", "output": "dog"}
    path = tmp_path / "m.jsonl"
    path.write_text(json.dumps(row) + "\n")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        yaml.safe_dump({"bundle": str(shipped.bundle), "data": {"m": {"manifest": str(path)}}, "stages": [STAGE]})
    )
    fail("eval", "tiny", path, says=["gone.wav"])
    result = run("train", recipe, "--out", tmp_path / "run")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert "gone.wav" in result.stderr.splitlines()[-1]


def test_manifest_that_is_none(shipped, tmp_path):
    fail("eval", "tiny", tmp_path / "none.jsonl", says=["none.jsonl", "esc50", "fsdd"])
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"instruction": \n')
    fail("eval", "tiny", broken, says=["broken.jsonl"])
    fail("data", "check", tmp_path / "none.jsonl", says=["none.jsonl"])
    fail("data", "prepare", "esc51", "--root", tmp_path, "--out", tmp_path / "o.jsonl", says=["esc51", "esc50"])


def test_recipes(shipped, tmp_path):
    recipe = tmp_path / "r.yaml"
    fields = {"bundle": str(shipped.bundle), "data": {"s": {"manifest": str(shipped.scenes)}}, "stages": [STAGE]}
    recipe.write_text(yaml.safe_dump(fields | {"sed": 3}))
    fail("train", recipe, says=["unknown key 'sed'", "seed"])
    recipe.write_text(yaml.safe_dump(fields | {"stages": [STAGE | {"learning_rate": 3}]}))
    fail("train", recipe, says=["unknown key 'stages.0.learning_rate'", "lr"])
    model = {"llm": "nowhere/at-all", "encoders": ["wisper"]}
    del fields["bundle"]
    recipe.write_text(yaml.safe_dump(fields | {"model": model}))
    fail("train", recipe, "--out", tmp_path / "run", says=["unknown encoder 'wisper'", "whisper"])
    fail("train", tmp_path / "none.yaml", says=["none.yaml"])
    recipe.write_text("a: [")
    fail("train", recipe, says=["r.yaml", "YAML"])


def test_bundle_with_a_flipped_byte(shipped, tmp_path):
    good = tmp_path / "good.wav"
    soundfile.write(good, NOISE, 16_000)
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        folder = tmp_path / name
        shutil.copytree(shipped.bundle, folder)
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data)
        fail("ask", good, QUESTION, "--model", folder, says=[name, "SHA-256"])
    fail("ask", good, QUESTION, "--model", tmp_path / "nowhere", says=["nowhere"])
    fail("eval", tmp_path / "nowhere", shipped.scenes, says=["nowhere"])


def test_index_of_another_model(shipped, tmp_path):
    good, file = tmp_path / "good.wav", tmp_path / "clip.safetensors"
    soundfile.write(good, NOISE, 16_000)
    assert run("index", good, "--out", file).exit_code == 0
    fail("ask", file, QUESTION, "--model", shipped.folder / "run" / "other", says=["other"])
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    fail("ask", file, QUESTION, says=["clip.safetensors", "damaged"])
    file.write_text("text")
    fail("ask", file, QUESTION, says=["clip.safetensors", "not an audio index"])
