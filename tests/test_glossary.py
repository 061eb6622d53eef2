"""docs/glossary.md has every public class of the package, each in one line, with the file that defines it."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
_LINE = re.compile(r"^\| `(\w+)` \| (.+) \| `(pal/[\w/]+\.py)` \|$", re.MULTILINE)


def public_classes() -> set[tuple[str, str]]:
    """(name, file) of each class at the top of a module."""
    return {
        (node.name, path.relative_to(ROOT).as_posix())
        for path in (ROOT / "pal").rglob("*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    }


def test_every_public_class_stands_in_the_glossary_once():
    lines = _LINE.findall((ROOT / "docs" / "glossary.md").read_text(encoding="utf-8"))
    entries = [(name, file) for name, _, file in lines]
    assert len(entries) == len(set(entries))
    assert set(entries) == public_classes()


def test_each_meaning_is_short():
    lines = _LINE.findall((ROOT / "docs" / "glossary.md").read_text(encoding="utf-8"))
    assert not [name for name, meaning, _ in lines if len(meaning) > 140]
