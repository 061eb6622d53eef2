"""Parquet files and folders of `datasets`, against the values that were written."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from pydantic import ValidationError

import pal.audio
from pal.audio.table_cells import TableFile
from pal.data.manifest import Turn
from pal.data.tabular import TableRecords, TableSource
from pal.errors import AudioError, ConfigError, ManifestError
from pal.train.recipe import Recipe
from pal.train.sources import StageData, open_sources
from tests.train.tiny import MODEL

RATE = 16_000
MAPPING = {"columns": {"question": "q", "answer": "a"}}


def sound(seed: int) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.random.default_rng(seed).uniform(-0.5, 0.5, 400 + 100 * seed), RATE, format="FLAC")
    return file.getvalue()


def table(first: int, count: int, **more: Any) -> pa.Table:
    rows = range(first, first + count)
    audio = [{"bytes": sound(i), "path": f"{i}.flac"} for i in rows]
    return pa.table({"q": [f"q{i}" for i in rows], "a": [f"a{i}" for i in rows], "audio": audio} | more)


def of(path: Path, **fields: Any) -> TableRecords:
    return TableRecords(TableSource(**(MAPPING | {"path": path} | fields)))


def assert_all(records: TableRecords, count: int) -> None:
    assert len(records) == count
    for i in np.random.default_rng(0).permutation(count).tolist():
        record = records[i]
        assert record.turns == (Turn(f"q{i}", f"a{i}"),)
        (clip,) = record.clips
        assert pal.audio.clip_bytes(clip) == sound(i) and pal.audio.clip_exists(clip)
        assert pal.audio.seconds(clip) == (400 + 100 * i) / RATE
        assert len(pal.audio.load(clip, RATE).samples_N) == 400 + 100 * i
    assert len({record.id for record in records}) == count


def test_parquet_files_row_group_by_row_group(tmp_path: Path) -> None:
    for i in range(2):
        pq.write_table(table(7 * i, 7), tmp_path / f"train-{i:05d}-of-00002.parquet", row_group_size=2)
    pq.write_table(table(0, 1), tmp_path / "test-00000-of-00001.parquet")
    for source in (
        TableSource(path=tmp_path / "train-*.parquet", **MAPPING),
        TableSource(path=tmp_path, split="train", **MAPPING),
    ):
        assert_all(TableRecords(source), 14)
    assert len(of(tmp_path)) == 15 and len(of(tmp_path / "test-00000-of-00001.parquet")) == 1


def test_only_the_row_groups_that_are_asked_for_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(table(0, 12), tmp_path / "t.parquet", row_group_size=3)
    read = []
    whole = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile,
        "read_row_group",
        lambda self, group, columns: read.append((group, *columns)) or whole(self, group, columns=columns),
    )
    file = TableFile(str(tmp_path / "t.parquet"))
    assert [file.cell("a", row) for row in (4, 3, 11, 5)] == ["a4", "a3", "a11", "a5"]
    assert read == [(1, "a"), (3, "a")]


@pytest.mark.parametrize("split", [None, "train"])
def test_folders_that_datasets_saved(tmp_path: Path, split: str | None) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "q": datasets.Value("string"),
            "a": datasets.Value("string"),
            "audio": datasets.Audio(decode=False),
            "kind": datasets.ClassLabel(names=["cat", "dog"]),
        }
    )
    rows = [{"q": f"q{i}", "a": f"a{i}", "audio": {"bytes": sound(i), "path": None}, "kind": i % 2} for i in range(9)]
    # not from_list, which encodes audio with torchcodec
    info = datasets.DatasetInfo(features=features)
    saved = datasets.Dataset(pa.Table.from_pylist(rows, features.arrow_schema), info=info)
    if split is not None:
        saved = datasets.DatasetDict({"train": saved, "test": saved.select([3])})
    saved.save_to_disk(tmp_path / "saved", **({"num_shards": 2} if split is None else {}))
    assert_all(of(tmp_path / "saved", split=split), 9)
    kinds = of(tmp_path / "saved", split=split, columns={"question": "q", "answer": "kind", "dataset": "kind"})
    assert [record.turns[0].answer for record in kinds[:3]] == ["cat", "dog", "cat"]
    assert kinds.columns.datasets == ("cat", "dog") and kinds.columns.dataset_R.tolist() == [i % 2 for i in range(9)]
    if split is not None:
        with pytest.raises(ConfigError, match="has the splits train, test"):
            of(tmp_path / "saved")


def test_other_forms_of_audio(tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "0.flac").write_bytes(sound(0))
    columns = {
        "plain": pa.array([sound(0), None], pa.binary()),
        "named": ["clips/0.flac", "clips/1.flac"],
        "both": [{"bytes": None, "path": "clips/0.flac"}, {"bytes": None, "path": None}],
        "number": [1, 2],
    }
    pq.write_table(table(0, 2, **columns), tmp_path / "t.parquet")
    for column in ("plain", "named", "both"):
        records = of(tmp_path / "t.parquet", columns={"question": "q", "answer": "a", "audio": column})
        assert pal.audio.clip_sha256(records[0].clips[0]) == pal.audio.clip_sha256(tmp_path / "clips" / "0.flac")
        assert pal.audio.clip_size(records[0].clips[0]) == len(sound(0))
    text = of(tmp_path / "t.parquet", columns={"question": "q", "answer": "a", "audio": None})
    assert text[1].clips == ()
    for cell, words in {
        "plain/1": "its cell is empty",
        "named/1": "no such file",
        "number/1": "holds int, not the bytes",
        "plain/2": "there are 2 rows",
        "odd/1": "no column 'odd'; known: q, a, audio",
        "plain": "named FILE/COLUMN/ROW",
    }.items():
        clip = f"{tmp_path}/t.parquet/{cell}"
        with pytest.raises(AudioError, match=words) as caught:
            pal.audio.load(clip, RATE)
        assert str(caught.value).startswith(clip)


def test_faults_of_rows_and_files(tmp_path: Path) -> None:
    bad = {"q": ["q0", " ", "<audio><audio>", "q3"], "a": ["a0", "a1", "a2", "<audio>"], "audio": [b"", b"", b"", b""]}
    pq.write_table(pa.table(bad), tmp_path / "t.parquet")
    records = of(tmp_path / "t.parquet")
    assert records.where(2) == "row 2 of t.parquet"
    for row, words in {1: "question is empty", 2: "2 '<audio>' in the question but 1 clips", 3: "answer holds"}.items():
        with pytest.raises(ManifestError, match=rf"t\.parquet, row {row}: .*{words}"):
            records[row]
    with pytest.raises(ConfigError, match="no column 'x' for 'answer'; known: q, a, audio"):
        of(tmp_path / "t.parquet", columns={"question": "q", "answer": "x"})
    with pytest.raises(ConfigError, match="no such table"):
        of(tmp_path / "none-*.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ManifestError, match=r"bad\.parquet.* cannot be read"):
        of(tmp_path / "bad.parquet")
    for wrong, words in (
        ({"columns": {"question": "q"}}, "'answer' is neither"),
        ({"split": "train"}, "'split' chooses in a folder"),
        ({"constants": {"answer": "x"}}, "both a column and a constant"),
        ({"constants": {"id": "x"}}, "no constant 'id'; known: question"),
        ({"columns": {"question": "q", "answer": "a", "sound": "s"}}, "sound"),
    ):
        with pytest.raises(ValidationError, match=words):
            of(tmp_path / "t.parquet", **wrong)


def test_copies_in_other_processes_and_digests(tmp_path: Path) -> None:
    pq.write_table(table(0, 3), tmp_path / "t.parquet")
    records = of(tmp_path / "t.parquet")
    sent = pickle.dumps(records)
    assert list(pickle.loads(sent)) == list(records)
    assert of(tmp_path / "t.parquet", constants={"task": "x"}).digest != records.digest
    pq.write_table(table(1, 3), tmp_path / "t.parquet")
    assert of(tmp_path / "t.parquet").digest != records.digest
    with pytest.raises(ManifestError, match="changed since"):
        pickle.loads(sent)


def test_a_source_of_a_recipe(tmp_path: Path) -> None:
    pq.write_table(table(0, 6, kind=["x", "y"] * 3), tmp_path / "t.parquet", row_group_size=2)
    source = {"path": tmp_path / "t.parquet", "columns": {"question": "q", "answer": "a", "task": "kind"}}
    made = Recipe(
        model=MODEL,
        data={"mine": {"table": source, "tasks": ["y"]}, "none": {"table": MAPPING | {"path": "no"}, "optional": True}},
        stages=[{"train": {"projectors": True}, "lr": 1.0, "epochs": 1, "batch": {"clips": 2}}],
    )
    data = StageData(made, 0, open_sources(made, tmp_path))
    assert data.names == ["mine"] and data.steps == 2
    rows = [row for step in range(data.steps) for group in data.sampler[step] for row in group.rows]
    assert sorted(rows) == [1, 3, 5]
    with pytest.raises(ValidationError, match="'root' is for manifests"):
        Recipe(model=MODEL, data={"x": {"table": source, "root": tmp_path}}, stages=made.stages)
    with pytest.raises(ValidationError, match="give one of 'manifest', 'table'"):
        Recipe(model=MODEL, data={"x": {"table": source, "manifest": tmp_path}}, stages=made.stages)
