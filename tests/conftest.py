"""For all tests: a small heap for the garbage collector, and CPU seconds of each folder at the end."""

from __future__ import annotations

import gc
import resource
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.counts import FULL, reduced
from tests.processes import fresh

CPU = "cpu_seconds"
_BEGUN = pytest.StashKey[float]()
_totals: dict[str, float] = defaultdict(float)


gc.disable()  # until all tests are imported: nothing of that is garbage, and rewriting asserts makes millions of objects


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave cases out as marks say, but none that was asked for by its name."""
    if FULL or any("[" in argument for argument in config.args):
        return
    kept = reduced(items)
    left_out = set(items).difference(kept)
    config.hook.pytest_deselected(items=[item for item in items if item in left_out])
    items[:] = kept


def pytest_collection_finish() -> None:
    """Leave what the imports made out of later collections; `accelerate` asks for one after each training."""
    _freeze()
    gc.enable()


def _freeze() -> None:
    """Free what is garbage and leave the rest out of later collections, which otherwise take longer and longer."""
    gc.collect()
    gc.freeze()


def _cpu_seconds() -> float:
    """User and system time of this process and of those it has waited for."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    item.stash[_BEGUN] = _cpu_seconds()
    result = yield
    if nextitem is not None and nextitem.path != item.path:
        _freeze()  # what a file leaves: modules imported on the way, caches of compilers
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[pytest.TestReport]:
    report: pytest.TestReport = yield
    now = _cpu_seconds()
    # a report's own properties: those of the item are repeated in each of its three reports
    report.user_properties = [*report.user_properties, (CPU, now - item.stash[_BEGUN])]
    item.stash[_BEGUN] = now
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Add a report up; with several workers they all come to the process that was started."""
    folder = Path(report.nodeid.partition("::")[0]).parent
    _totals[str(folder)] += sum(value for name, value in report.user_properties if name == CPU)


@pytest.fixture(scope="session", autouse=True)
def fork_server() -> None:
    """The server that starts processes has their imports, whichever test is the first to need it."""
    fresh()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    folders = sorted(_totals.items(), key=lambda entry: -entry[1])
    terminalreporter.section("CPU seconds by folder")
    for folder, seconds in folders:
        terminalreporter.write_line(f"{seconds:7.1f}  {folder}")
    terminalreporter.write_line(f"{sum(_totals.values()):7.1f}  all tests; collection comes on top in each worker")
