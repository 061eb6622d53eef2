"""What is asked: which input is refused, and tasks as text."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pal.batch import ClipQuestion, ClipTask, read_input
from pal.errors import PalError


@settings(deadline=None)
@given(
    st.builds(
        ClipTask,
        st.lists(st.text(), max_size=2).map(tuple),
        st.lists(
            st.builds(
                ClipQuestion,
                st.text(),
                st.lists(st.tuples(st.text(), st.text()), max_size=2).map(tuple),
                st.none() | st.text(),
                st.none() | st.text(),
            ),
            max_size=3,
        ).map(tuple),
        st.none() | st.text(),
    )
)
def test_a_task_is_the_same_after_its_way_to_a_worker(task):
    assert ClipTask.read(task.line()) == task and ClipTask.read(task.line()).key == task.key


def manifest(folder, *records):
    path = folder / "asked.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_clips_of_a_manifest_are_asked_other_questions_once_each(tmp_path):
    record = {"audio_id": "a.wav", "instruction": "What?", "output": "x"}
    path = manifest(tmp_path, record, {**record, "instruction": "Which?"}, {**record, "audio_id": "b.wav"})
    found = read_input(path, ["Is it loud?"])
    assert [task.clips for task in found.tasks] == [(str(tmp_path / "a.wav"),), (str(tmp_path / "b.wav"),)]
    assert [[q.text for q in task.questions] for task in found.tasks] == [["Is it loud?"]] * 2
    assert found.columns() == ["clip", "question", "answer", "audio_seconds", "error"]


@pytest.mark.parametrize(
    ("questions", "what"),
    [
        ([], "is a folder, so give questions"),
        ([" "], "a question is empty"),
        (["a", "b", "a"], "'a' is given twice"),
        (["<audio> or <audio>?"], "has 2 <audio>, and is about 1 clips"),
        (["\udcff"], "is not UTF-8"),
    ],
)
def test_questions_that_cannot_be_asked_are_refused(clips, questions, what):
    with pytest.raises(PalError, match=what):
        read_input(clips, questions)


def test_input_that_holds_nothing_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "list.json").write_text("[]")
    for path, what in (
        (tmp_path / "none", "no such file or folder"),
        (tmp_path / "empty", "holds no audio file"),
        (tmp_path / "list.json", "holds no record"),
    ):
        with pytest.raises(PalError, match=what):
            read_input(path, ["What?"])
