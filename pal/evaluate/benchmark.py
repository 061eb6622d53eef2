"""Loaded benchmark: questions, scoring rule and options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pal.data.manifest import Manifest, Record
from pal.errors import ConfigError, ManifestError
from pal.evaluate import items as contract
from pal.evaluate.items import Item
from pal.evaluate.rules.base import Rule
from pal.evaluate.tasks.base import Task
from pal.registry import build, lookup


@dataclass(frozen=True)
class Benchmark:
    """Evaluation questions with their scoring rule."""

    name: str
    items: tuple[Item, ...]
    rule: Mapping[str, Any]
    """Name and options of the rule, as `registry.build` takes them."""
    root: Path
    """Base folder of the relative clip names in the digest."""
    max_new_tokens: int = 32
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options with which it was loaded, for the settings of a run."""
    left_out: int = 0
    """Number of records without choices that are left out because others have some."""

    def __post_init__(self) -> None:
        if not self.items:
            raise ManifestError(f"{self.name} has no questions to evaluate")
        if self.ranked and any(not item.choices for item in self.items):
            raise ConfigError(f"{self.name} has questions without 'choices', which 'rank' needs; use scoring 'exact'")

    def check_ids(self) -> None:
        """Raise ManifestError if two items share an id, the key of answers in a run's folder."""
        seen: set[str] = set()
        for item in self.items:
            if item.id in seen:
                raise ManifestError(f"{self.name}: two questions have the id '{item.id}'; give each its own")
            seen.add(item.id)

    @property
    def ranked(self) -> bool:
        """True if the model ranks the choices instead of generating."""
        return self.rule["name"] == "rank"

    @property
    def digest(self) -> str:
        """SHA-256 of the questions, without model and rule; see `items.digest`."""
        return contract.digest(self.items, self.root)

    def build_rule(self) -> Rule:
        """The scoring rule. Raises ConfigError if a package is missing or an option does not fit."""
        rule: Rule = build("rule", self.rule)
        return rule


def open_task(
    name: str, root: str | Path, options: Mapping[str, Any] | None = None, rule: Mapping[str, Any] | None = None
) -> Benchmark:
    """Load a published benchmark.

    Args:
        name: one of `registry.names("task")`.
        root: folder of the unpacked data set.
        options: options of the task.
        rule: another rule by its `name`, or options that override those of the official rule.

    Raises:
        ConfigError: unknown benchmark, rule or option, with the known ones.
        ManifestError: the folder is not laid out as expected; names the file and the fault.
    """
    root = Path(root).expanduser()
    task: Task = build("task", {"name": name, **(options or {})})
    if not root.is_dir():
        raise ManifestError(f"{root}: no such folder; give the folder of {name} as it was unpacked")
    chosen = changed_rule(task.rule, rule or {})
    return Benchmark(name, tuple(task.items(root)), chosen, root, task.max_new_tokens, dict(options or {}))


def from_records(
    records: Manifest | Sequence[Record],
    name: str | None = None,
    *,
    rule: Mapping[str, Any] | None = None,
    root: Path | None = None,
    options: Mapping[str, Any] | None = None,
) -> Benchmark:
    """Benchmark from records: each turn is an item, with earlier turns and their reference answers as history.

    Records without choices, such as captions, are left out if others have choices, since free text has no single
    correct wording. A ranking rule uses only the last turn, to which the choices belong.

    Args:
        records: a manifest or any records.
        name: name of the benchmark; default: the manifest's file name without suffix.
        rule: scoring rule; default: exact match.
        root: base folder of the relative clip names in the digest; default: the manifest's audio folder.
        options: options with which the records were made, for the settings of a run.

    Raises:
        ManifestError: no questions.
        ConfigError: the rule ranks choices, and no record has any.
    """
    chosen = dict(rule or {"name": "exact"})
    if isinstance(records, Manifest):
        name, root = name or records.path.stem, root or records.root or records.folder
    everything = list(records)
    closed = any(record.choices for record in everything)
    kept = [record for record in everything if record.choices or not closed]
    items = [item for record in kept for item in contract.each_turn(record, last=chosen["name"] == "rank")]
    left_out = len(everything) - len(kept)
    return Benchmark(
        name or "records", tuple(items), chosen, root or Path(), options=dict(options or {}), left_out=left_out
    )


def changed_rule(official: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The official rule with options overridden by `wanted`, or another rule if `wanted` names one."""
    if "name" in wanted and wanted["name"] != official["name"]:
        lookup("rule", wanted["name"])
        return dict(wanted)
    return {**official, **wanted}
