"""The lists of deliberate mistakes: one-line changes of the product, and the tests that must notice each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
LISTS = Path(__file__).parent


@dataclass(frozen=True)
class Mutant:
    """One deliberate mistake."""

    change: str
    """What is broken, in words."""
    file: str
    """Where, from the project's root."""
    old: str
    """The text that is replaced; it occurs once in the file."""
    new: str
    """What replaces it."""
    noticed_by: str
    """The test file, or one of its tests as pytest names it, that fails."""

    def apply(self, root: Path) -> str:
        """Make the mistake in a copy of the project; gives the file as it was before.

        Raises:
            ValueError: the text does not occur exactly once.
        """
        path = root / self.file
        before = path.read_text(encoding="utf-8")
        if before.count(self.old) != 1:
            raise ValueError(f"{self.file}: {before.count(self.old)} times, not once: {self.old!r}; mend the list")
        path.write_text(before.replace(self.old, self.new), encoding="utf-8")
        return before


def load(folder: Path = LISTS) -> list[Mutant]:
    """All mutants of the lists in a folder, in the order of the files' names."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's, ten times as fast
    lists = [yaml.load(path.read_text(), loader) for path in sorted(folder.glob("*.yaml"))]
    return [Mutant(**entry) for entries in lists for entry in entries]
