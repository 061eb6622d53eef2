"""What probes, benchmarks and reports share."""

from pathlib import Path

import pytest

from pal.data.manifest import Record, Turn
from pal.errors import ManifestError
from pal.lab.names import distinct_names
from pal.lab.numbers import format_bytes, format_value, joined, three_digits
from pal.lab.records import domain_of, records_to_ask, spread
from pal.lab.tables import markdown_table


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["tiny"], ["tiny"]),
        (["runs/a-lal/seed-1/model"], ["model"]),
        (["runs/a-lal/seed-1/model", "runs/a-pal/seed-1/model"], ["a-lal", "a-pal"]),
        (["tiny", "runs/x/model"], ["tiny", "runs/x/model"]),
        (["runs/x/seed-1/model", "runs/x/seed-2/model"], ["seed-1", "seed-2"]),
        (["x", "x/y"], ["x", "x/y"]),
    ],
)
def test_names_are_what_tells_paths_apart(paths, names):
    assert distinct_names([Path(path) for path in paths]) == names


def test_numbers_in_words():
    assert [format_value(x) for x in (None, True, 1234, 0.12345, 123.4, (0.1, 2.0), "x")] == [
        *("", "yes", "1,234", "0.123", "123", "0.100 to 2.000", "x")
    ]
    assert [three_digits(x) for x in (None, 1234.5, 0.012345)] == ["", "1,234", "0.0123"]
    assert three_digits(0.5, 1e3) == "500"
    assert [format_bytes(x) for x in (12, 1.5e3, 2e6, 3.456e9)] == ["12 B", "1.5 kB", "2 MB", "3.46 GB"]
    assert [joined(x) for x in (["a"], ["a", "b", "c"])] == ["a", "a, b and c"]


def test_a_table_has_words_left_and_numbers_right():
    assert markdown_table(("name", "n"), [("a", "1")], left=1) == ["| name | n |", "| --- | --: |", "| a | 1 |"]


def test_records_are_taken_evenly():
    assert spread(range(10), 4) == [0, 2, 5, 7]
    assert spread(range(2), 4) == [0, 1]


def test_domains():
    def record(task, dataset):
        return Record("x", (), (Turn("?", "!"),), task, dataset)

    assert [domain_of(record(*one)) for one in (("speech", "any"), ("pitch", "synth"), ("order", "synth"))] == [
        *("speech", "music", "sound")
    ]
    assert domain_of(record("", "FSDD")) == "speech"
    assert domain_of(record("", "my own")) == "my own"
    assert domain_of(record("", "")) == "unknown"


def test_scenes_are_made_where_there_is_no_manifest(tmp_path):
    with records_to_ask([], limit=6, seed=1) as records:
        assert len(records) == 6 and all(one.choices and Path(one.clips[0]).is_file() for one in records)
    assert not Path(records[0].clips[0]).exists()
    with pytest.raises(ManifestError, match="no such manifest"), records_to_ask([tmp_path / "none.jsonl"], 6):
        pass
