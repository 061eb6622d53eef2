"""Opening of what `pal eval` evaluates on: a manifest, or a benchmark or data set by its name and folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pal.data import prepare as data_sets
from pal.data.manifest import Manifest
from pal.errors import ConfigError, ManifestError
from pal.evaluate.benchmark import Benchmark, changed_rule, from_records, open_task
from pal.registry import names as registered

_RULE = "rule."


def names() -> list[str]:
    """Names of all benchmarks, sorted."""
    return registered("task")


def rule_of(options: dict[str, Any], scoring: str | None) -> dict[str, Any]:
    """Scoring rule from the command line: `scoring` as its name, and the `rule.KEY` entries as its options.

    Removes these entries from `options`; the others are options of the benchmark. No name means the official rule.
    """
    rule = {key.removeprefix(_RULE): options.pop(key) for key in list(options) if key.startswith(_RULE)}
    return rule if scoring in (None, "official") else {"name": scoring, **rule}


def options_of(settings: Sequence[str], **named: str | None) -> dict[str, Any]:
    """Options of a data set, from `KEY=VALUE` strings and from the named options that are not None.

    Raises:
        ConfigError: a string without '='.
    """
    options: dict[str, Any] = {key: value for key, value in named.items() if value is not None}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise ConfigError(f"--set {setting}: write KEY=VALUE, such as paraphrase=true")
        options[key.strip()] = value.strip()
    return options


@contextmanager
def open_benchmark(
    benchmark: str, data: Path | None, options: dict[str, Any], rule: Mapping[str, Any]
) -> Iterator[Benchmark]:
    """Open a benchmark; its clips exist as long as the block lasts.

    Args:
        benchmark: a manifest file, or the name of a benchmark or of another data set.
        data: the folder of the benchmark or data set, or the base folder of the manifest's audio paths.
        options: options of the benchmark or data set.
        rule: from `rule_of`; the default for manifests and data sets is exact match.

    Raises:
        ConfigError: unknown rule or option, options for a manifest, or no folder for a benchmark.
        ManifestError: no such manifest or data set, or a folder that is not laid out as expected.
    """
    if benchmark not in {*names(), *data_sets.names()}:
        if not Path(benchmark).is_file():
            known = ", ".join(sorted({*data_sets.names(), *names()}))
            raise ManifestError(f"{benchmark}: no such manifest; give a .jsonl or .json file, or one of: {known}")
        if options:
            raise ConfigError(f"a manifest has no option '{next(iter(options))}'; leave it out")
        root = data or Path(benchmark).parent.absolute()
        yield _of_manifest(Manifest(benchmark, root=data), benchmark, root, options, rule)
        return
    if data is None:
        raise ConfigError(f"benchmark '{benchmark}' needs its folder: --data DIR")
    if benchmark in names():
        yield open_task(benchmark, data, options, rule)
        return
    with TemporaryDirectory(prefix="pal-") as folder:
        path = Path(folder) / f"{benchmark}.jsonl"
        data_sets.prepare(benchmark, data, path, **options)
        yield _of_manifest(Manifest(path), benchmark, data, options, rule)


def _of_manifest(
    manifest: Manifest, benchmark: str, root: Path, options: dict[str, Any], rule: Mapping[str, Any]
) -> Benchmark:
    chosen = changed_rule({"name": "exact"}, rule)
    return from_records(manifest, Path(benchmark).stem, rule=chosen, root=root, options=options)
