"""The digest of what is asked: it covers all that decides a score but the model."""

from dataclasses import replace
from pathlib import Path

import pytest

from pal.data.manifest import Turn
from pal.evaluate.items import Item, digest

ITEM = Item("1", ("a.wav",), "What is it?", ("dog", "a dog"), ("dog", "cat"), {"kind": ("animal",)}, (Turn("q", "a"),))


def digested(root: Path, *items: Item) -> str:
    inside = [replace(item, clips=tuple(str(root / clip) for clip in item.clips)) for item in items]
    return digest(inside, root)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, size in (("a.wav", 10), ("same size.wav", 10), ("longer.wav", 11)):
        (tmp_path / name).write_bytes(bytes(size))
    return tmp_path


@pytest.mark.parametrize(
    "change",
    [
        {"id": "2"},
        {"clips": ("same size.wav",)},
        {"clips": ("a.wav", "a.wav")},
        {"clips": ()},
        {"prompt": "What is that?"},
        {"references": ("dog",)},
        {"references": ("a dog", "dog")},
        {"choices": ("cat", "dog")},
        {"choices": ("dog", "cat", "cow")},
        {"choices": None},
        {"category": {"kind": ("pet",)}},
        {"category": {}},
        {"before": ()},
        {"before": (Turn("q", "b"),)},
    ],
    ids=str,
)
def test_whatever_changes_changes_the_digest(root: Path, change: dict[str, object]) -> None:
    assert digested(root, replace(ITEM, **change)) != digested(root, ITEM)  # type: ignore[arg-type]


def test_so_do_a_clips_size_and_the_number_and_order_of_the_items(root: Path) -> None:
    other = replace(ITEM, id="2")
    known = {digested(root, ITEM), digested(root, ITEM, other), digested(root, other, ITEM), digested(root)}
    assert len(known) == 4
    before = digested(root, ITEM)
    (root / "a.wav").write_bytes(bytes(11))
    assert digested(root, ITEM) != before
    (root / "a.wav").unlink()
    assert digested(root, ITEM) not in (before, *known)


def test_the_folders_place_does_not(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "a.wav").write_bytes(bytes(10))
    assert digested(elsewhere, ITEM) == digested(root, ITEM)
