"""What `pal data check` writes: the manifest without what is bad, and the list of bad clips."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from pal.data.check import ManifestReport, check
from pal.data.clean import Cleaned, check_out, read_clips, write_bad, write_clean
from pal.data.manifest import Manifest
from pal.errors import ConfigError, ManifestError
from tests.app.test_cli import run

GOOD = {
    "audio_id": "audio/a.wav",
    "instruction": "q\u2028\u0085",
    "input": "",
    "output": "é",
    "task": "t",
    "dataset": "d",
}


def record(clip, **more):
    return GOOD | {"audio_id": clip} | more


RECORDS = [
    record("audio/a.wav", id="0"),
    record("audio/bad.wav", id="1"),
    {"instruction": "no clip"},
    record(["audio/a.wav", "audio/gone.wav"], id="2"),
    record("audio/b.wav", id="0"),  # an id that is taken
    record(["audio/b.wav", "audio/a.wav"], id="3"),
    record([], id="4"),
]
KEPT = [0, 5, 6]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "audio").mkdir()
    for name in ("a", "b"):
        soundfile.write(tmp_path / "audio" / f"{name}.wav", np.full(1600, 0.1), 16_000)
    (tmp_path / "audio" / "bad.wav").write_text("no sound")
    return tmp_path


def lines(path: Path, records: list[object], end: str = "\n") -> Path:
    path.write_bytes("".join(json.dumps(one, ensure_ascii=False) + end for one in records).encode())
    return path


def cleaned(manifest: Path, out: Path, root: Path | None = None) -> Cleaned:
    return write_clean(manifest, check(manifest, root=root), out, root)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n"])
def test_lines_stay_as_they_are_and_in_order(folder: Path, end: str) -> None:
    manifest = lines(folder / "m.jsonl", RECORDS, end)
    found = cleaned(manifest, folder / "clean.jsonl")
    assert found == Cleaned(str(folder / "clean.jsonl"), records=3, faulty=2, of_bad_clips=2)
    assert (folder / "clean.jsonl").read_bytes() == lines(folder / "e", [RECORDS[i] for i in KEPT]).read_bytes()
    assert found.to_text().endswith("clean.jsonl: 3 records, 4 left out (2 cannot be used, 2 have a bad clip)")
    assert check(folder / "clean.jsonl").ok


def test_a_list_stays_a_list(folder: Path) -> None:
    manifest = folder / "m.json"
    manifest.write_text(json.dumps(RECORDS, indent=1))
    cleaned(manifest, folder / "clean.json")
    assert json.loads((folder / "clean.json").read_text()) == [RECORDS[i] for i in KEPT]
    assert check(folder / "clean.json").ok


def test_nothing_bad_is_a_copy(folder: Path) -> None:
    manifest = lines(folder / "m.jsonl", [RECORDS[i] for i in KEPT])
    assert cleaned(manifest, folder / "clean.jsonl").to_text().endswith("clean.jsonl: 3 records, 0 left out")
    assert (folder / "clean.jsonl").read_bytes() == manifest.read_bytes()


def test_relative_paths_lead_to_the_same_clips_from_another_folder(folder: Path) -> None:
    manifest = lines(folder / "m.jsonl", RECORDS)
    for out in (folder / "new" / "deep" / "clean.jsonl", folder / "audio" / "clean.jsonl"):
        cleaned(manifest, out)
        assert [r.clips for r in Manifest(out)] == [Manifest(manifest)[i].clips for i in KEPT]
        kept = [json.loads(line) for line in out.read_bytes().splitlines()]
        assert [r | {"audio_id": 0} for r in kept] == [RECORDS[i] | {"audio_id": 0} for i in KEPT]
    assert [r["audio_id"] for r in kept] == ["a.wav", ["b.wav", "a.wav"], []]


def test_with_a_root_paths_stay(folder: Path) -> None:
    (folder / "lists").mkdir()
    moved = [RECORDS[i] | {"audio_id": "/elsewhere/audio/a.wav"} if i == 0 else RECORDS[i] for i in range(len(RECORDS))]
    manifest = lines(folder / "lists" / "m.jsonl", moved)
    out = folder / "clean.jsonl"
    cleaned(manifest, out, root=folder)
    assert [json.loads(line) for line in out.read_bytes().splitlines()] == [moved[i] for i in KEPT]
    assert check(out, root=folder).ok


def test_the_manifest_itself_is_never_written(folder: Path) -> None:
    manifest = lines(folder / "m.jsonl", RECORDS)
    before = manifest.read_bytes()
    (folder / "link.jsonl").symlink_to(manifest)
    os.link(manifest, folder / "hard.jsonl")
    for out in (manifest, folder / "audio" / ".." / "m.jsonl", folder / "link.jsonl", folder / "hard.jsonl"):
        with pytest.raises(ConfigError, match="give another file"):
            cleaned(manifest, out)
    with pytest.raises(ConfigError, match="is a folder"):
        check_out(folder / "audio", manifest)
    assert manifest.read_bytes() == before


def test_nothing_is_written_where_it_would_not_be_the_whole(folder: Path) -> None:
    out = folder / "clean.jsonl"
    out.write_text("old")
    manifest = lines(folder / "m.jsonl", RECORDS)
    report = check(manifest)
    report.complete = False
    with pytest.raises(ManifestError, match="the check was interrupted"):
        write_clean(manifest, report, out)
    report.complete = True
    lines(folder / "m.jsonl", RECORDS[:1])
    with pytest.raises(ManifestError, match="changed since"):
        write_clean(manifest, report, out)
    with pytest.raises(ManifestError, match="no record can be used"):
        cleaned(lines(folder / "m.jsonl", RECORDS[1:3]), out)
    assert out.read_text() == "old"
    assert not [path for path in folder.iterdir() if path.name.endswith(".tmp")]


NAMES = st.text(st.characters(exclude_characters="\0", exclude_categories=()), min_size=1)


@settings(max_examples=100, deadline=None)
@given(st.lists(NAMES, unique=True))
def test_any_path_comes_back_from_the_list(tmp_path_factory: pytest.TempPathFactory, paths: list[str]) -> None:
    out = tmp_path_factory.getbasetemp() / "bad.txt"
    assert write_bad(report(paths), out) == len(paths)
    assert [clip for _, clip in read_clips(out)] == paths


def report(clips: list[str]) -> ManifestReport:
    return ManifestReport("m", "", 1, 1, 1, True, None, {}, {}, {}, bad_clips=clips)


def test_lists_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes(b"\xef\xbb\xbfa b.wav\r\n\n# c.wav\n \td.wav \n")
    assert list(read_clips(path)) == [(1, "a b.wav"), (3, "# c.wav"), (4, "d.wav")]
    path.write_text('"a.wav\n')
    with pytest.raises(ManifestError, match=r"bad\.txt, line 1: .* must be a JSON string"):
        list(read_clips(path))
    path.write_bytes("a.wav".encode("utf-16"))
    with pytest.raises(ManifestError, match="UTF-16"):
        list(read_clips(path))
    with pytest.raises(ManifestError, match="No such file"):
        list(read_clips(tmp_path / "none.txt"))


def test_the_command(folder: Path) -> None:
    manifest, out, bad = lines(folder / "m.jsonl", RECORDS), folder / "clean.jsonl", folder / "bad.txt"
    result = run("data", "check", manifest, "--write-clean", out, "--write-bad", bad)
    assert result.exit_code == 1
    assert result.stdout.splitlines()[-2:] == [
        f"{bad}: 2 clips",
        f"{out}: 3 records, 4 left out (2 cannot be used, 2 have a bad clip)",
    ]
    assert [clip for _, clip in read_clips(bad)] == [str(folder / "audio" / name) for name in ("bad.wav", "gone.wav")]
    result = run("data", "check", out, "--write-clean", folder / "again.jsonl", "--json")
    assert result.exit_code == 0
    facts = json.loads(result.stdout)
    assert facts["bad_clips"] == [] and facts["clean"]["records"] == 3
    for options in (("--write-clean", manifest), ("--write-bad", manifest), ("--write-clean", bad, "--write-bad", bad)):
        result = run("data", "check", manifest, *options)
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr.startswith("error: ") and ("another" in result.stderr or "give two files" in result.stderr)
