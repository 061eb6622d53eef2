"""The checker on a manifest with known faults."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

import pal.audio
from pal.data.check import UnusableItem, check, marked
from pal.data.manifest import Record, Turn, write_manifest
from pal.errors import ManifestError
from pal.types import AUDIO, IGNORE, TagSpan, Tokens


def clip(path: Path, seconds: float) -> str:
    soundfile.write(path, np.full(round(seconds * 8_000), 0.1, np.float32), 8_000)
    return str(path)


def asked(number: int, path: str, answer: str, task: str = "what") -> Record:
    return Record(str(number), (path,), (Turn("what sound", answer),), task, "d", tags=(TagSpan(answer),))


@pytest.fixture
def good(tmp_path) -> Path:
    a, b, c = (clip(tmp_path / f"{name}.wav", seconds) for name, seconds in (("a", 0.5), ("b", 1.0), ("c", 3.0)))
    records = [asked(0, a, "dog"), asked(1, b, "dog"), asked(2, c, "cat"), asked(3, c, "2", "how many")]
    write_manifest(tmp_path / "m.jsonl", records)
    return tmp_path / "m.jsonl"


def test_a_tag_counts_once_for_a_clip(tmp_path, chatml):
    path = clip(tmp_path / "a.wav", 0.5)
    write_manifest(tmp_path / "m.jsonl", [asked(number, path, "dog") for number in range(3)])
    assert check(tmp_path / "m.jsonl", chatml).tags == {"dog": 1}


def test_counts_and_durations(good, chatml):
    report = check(good, chatml)
    assert report.ok
    assert (report.records, report.clips, report.clips_read, report.bad) == (4, 3, 3, [])
    assert report.seconds is not None
    times = report.seconds
    assert (times.min, times.median, times.max, times.total) == (0.5, 1.0, 3.0, 4.5)
    assert report.answers == {"what": {"dog": 2, "cat": 1}, "how many": {"2": 1}}
    assert report.tags == {"dog": 2, "cat": 1, "2": 1}
    assert report.datasets == {"d": 4}
    assert report.example == ("<|im_start|>user\n<audio>what sound<|im_end|>\n<|im_start|>assistant\n⟦dog<|im_end|>⟧\n")
    assert check(good).example is None


def test_report_as_text_and_json(good, chatml):
    report = check(good, chatml)
    text = report.to_text()
    assert "4 records, 3 clips, 0 bad" in text
    assert "seconds: min 0.50, median 1.00, max 3.00, total 4" in text
    assert "answers of 'what': dog 2, cat 1" in text
    assert "⟦dog<|im_end|>⟧" in text
    assert text.endswith("\nok")
    data = json.loads(report.to_json())
    assert data["ok"] is True
    assert data["seconds"]["median"] == 1.0
    assert data["digest"] == report.digest


def test_every_fault_is_listed_with_its_reason(tmp_path, good, chatml):
    text = tmp_path / "text.wav"
    text.write_text("not audio")
    half = tmp_path / "half.wav"
    half.write_bytes((tmp_path / "c.wav").read_bytes()[:9_000])
    lines = good.read_text().splitlines()
    for name in ("text.wav", "half.wav", "gone.wav"):
        lines.append(json.dumps({"audio_id": name, "instruction": "q", "output": "a", "task": "t"}))
    lines += ["{broken", json.dumps({"audio_id": [], "instruction": "<audio>", "output": "a"}), lines[0], ""]
    good.write_text("\n".join(lines))
    report = check(good, chatml)
    assert not report.ok
    assert report.records == 10
    found = {fault.where: fault.reason for fault in report.bad}
    assert set(found) == {"line 8", "line 9", "line 10"} | {
        str(tmp_path / f"{n}.wav") for n in ("text", "half", "gone")
    }
    assert found["line 8"].startswith("not valid JSON")
    assert found["line 9"].startswith("1 '<audio>' in the questions but 0 clips")
    assert found["line 10"] == "id '0' is taken by line 1"
    assert all(reason and "\n" not in reason and not reason.startswith(str(tmp_path)) for reason in found.values())
    assert report.clips == 6
    assert report.to_text().count("\nbad: ") == 6


def test_records_that_cannot_be_tokenised_are_bad(good, make_tokenizer):
    refuses = make_tokenizer(["</s>"], "{{ raise_exception('no: never') }}", eos_token="</s>")
    report = check(good, refuses)
    assert report.bad == [
        UnusableItem(f"line {at}", "the chat template refuses this conversation: no: never") for at in (1, 2, 3, 4)
    ]


def test_interruption_keeps_what_is_known(good, monkeypatch):
    load = pal.audio.load

    def interrupted(source, rate, **options):
        if Path(source).name == "b.wav":
            raise KeyboardInterrupt
        return load(source, rate, **options)

    monkeypatch.setattr(pal.audio, "load", interrupted)
    report = check(good)
    assert not report.ok
    assert not report.complete
    assert report.clips_read == 1
    assert "interrupted after 1 clips" in report.to_text()


def test_no_records_is_not_ok_and_no_file_is_an_error(tmp_path):
    (tmp_path / "m.json").write_text("[]")
    report = check(tmp_path / "m.json")
    assert not report.ok
    assert report.seconds is None
    assert "no records" in report.to_text()
    with pytest.raises(ManifestError, match="cannot be read"):
        check(tmp_path / "none.jsonl")


def test_marked(chatml):
    ids = chatml("dog").input_ids
    labels = [IGNORE, *[IGNORE] * len(ids), *ids]
    assert marked(chatml, Tokens([AUDIO, *ids, *ids], [0], labels)) == "<audio>dog⟦dog⟧"
    assert marked(chatml, Tokens([AUDIO, AUDIO], [0, 0])) == "<audio><audio>"
