"""What `pal eval` can be given: a manifest, or a data set's name and folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pal.data import prepare as data_sets
from pal.data.manifest import Manifest
from pal.errors import ConfigError, ManifestError


def options_of(settings: Sequence[str], **named: str | None) -> dict[str, Any]:
    """A data set's options from `KEY=VALUE` texts and from named ones that are given.

    Raises:
        ConfigError: a text without '='.
    """
    options: dict[str, Any] = {key: value for key, value in named.items() if value is not None}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise ConfigError(f"--set {setting}: write KEY=VALUE, such as paraphrase=true")
        options[key.strip()] = value.strip()
    return options


@contextmanager
def open_benchmark(benchmark: str, data: Path | None, options: dict[str, Any]) -> Iterator[Manifest]:
    """The records of a benchmark, while the block lasts.

    Args:
        benchmark: a manifest file, or the name of a data set that `pal data prepare` knows.
        data: the root of the manifest's audio paths, or the data set's folder.
        options: the data set's own.

    Raises:
        ConfigError: options for a manifest, or a data set without its folder.
        ManifestError: no such manifest or data set.
    """
    if benchmark not in data_sets.names():
        if not Path(benchmark).is_file():
            known = ", ".join(data_sets.names())
            raise ManifestError(f"{benchmark}: no such manifest; give a .jsonl or .json file, or one of: {known}")
        if options:
            raise ConfigError(f"a manifest has no option '{next(iter(options))}'; leave it out")
        yield Manifest(benchmark, root=data)
        return
    if data is None:
        raise ConfigError(f"benchmark '{benchmark}' needs its folder: --data DIR")
    with TemporaryDirectory(prefix="pal-") as folder:
        path = Path(folder) / f"{benchmark}.jsonl"
        data_sets.prepare(benchmark, data, path, **options)
        yield Manifest(path)
