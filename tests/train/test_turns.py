"""Questions of one clip as turns of one conversation."""

from pal.data.manifest import Record, Turn
from pal.train.sources import in_turns


def record(name: str, clip: str | None) -> Record:
    clips = () if clip is None else (clip,)
    return Record(name, clips, (Turn(f"{name}?", name),), "what", "d", choices=(name,))


def test_neighbours_about_the_same_clip_are_joined() -> None:
    records = [record("a", "x"), record("b", "x"), record("c", "x"), record("d", "y"), record("e", "x")]
    joined = in_turns(records, 2)
    assert [one.id for one in joined] == ["a+b", "c", "d", "e"]
    assert joined[0].turns == (Turn("a?", "a"), Turn("b?", "b"))
    assert joined[0].choices is None
    assert joined[1:] == records[2:]


def test_one_turn_each_changes_nothing() -> None:
    records = [record("a", "x"), record("b", "x")]
    assert in_turns(records, 1) == records


def test_text_alone_is_not_joined() -> None:
    records = [record("a", None), record("b", None)]
    assert in_turns(records, 3) == records
