"""Parts that are cut or damaged give what was written, or nothing."""

from hypothesis import given, settings
from hypothesis import strategies as st

from pal.batch.parts import AnswerParts, PartWriter, stamp

OUTCOMES = {
    f"key {i}": {"answers": [f"ä {i}", "\udcff"], "audio_seconds": i / 3, "failed": None, "notes": [], "files": []}
    for i in range(4)
}


def written(out):
    """The parts of a run that was killed, and the path of its one part."""
    parts = AnswerParts(out)
    parts.folder.mkdir(parents=True)
    writer = PartWriter(parts.folder, "the model")
    for key, outcome in OUTCOMES.items():
        writer.begin(key)
        writer.add(key, outcome)
    writer.close()
    (path,) = parts.folder.glob("part.*")
    return parts, path


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_part_that_is_cut_or_damaged_anywhere_keeps_what_is_whole(tmp_path_factory, data):
    parts, path = written(tmp_path_factory.mktemp("parts") / "answers.jsonl")
    content = bytearray(path.read_bytes())
    head = content.index(b"\n")
    at = data.draw(st.integers(0, len(content) - 1))
    cut = data.draw(st.booleans())
    if cut:
        content[at:] = b""
    else:
        content[at] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    with parts.open({}, {key: [] for key in OUTCOMES}):
        outcomes = {key: parts.outcome(key) for key in parts.kept}
    assert all(outcomes[key] == {"key": key, **OUTCOMES[key]} for key in outcomes)
    # a line is lost, or two where a line feed is; all before a cut stay; without its first line a part is nobody's
    whole = bytes(content).count(b'"answers"') - 1 if cut else 2
    assert len(outcomes) >= whole or at <= head


def test_what_is_kept_is_in_one_part_with_its_model(tmp_path):
    parts, first = written(tmp_path / "answers.jsonl")
    with parts.open({}, {"key 1": [], "key 3": []}):
        assert set(parts.kept) == {"key 1", "key 3"} and parts.model == "the model" and not parts.damaged
    (path,) = parts.folder.glob("part.*")
    assert path != first


def test_files_that_are_gone_have_no_stamp(tmp_path):
    (tmp_path / "a").write_text("abc")
    assert stamp([str(tmp_path / "a"), str(tmp_path / "b"), "\0"])[1:] == [None, None]
    assert stamp([str(tmp_path / "a")])[0][0] == 3
