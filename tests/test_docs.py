"""What the documentation says holds: its programs run, its files and commands are there, its import table is true."""

import ast
import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from pal.app.cli import app

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
SHELL = ("", "sh", "bash", "console", "shell")

_FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```\s*$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)[^)]*\)")
_FILE = re.compile(r"(?:[\w.-]+/)*[\w.-]+\.(?:py|yaml|md)")
_COMMAND = re.compile(r"^(?:\$ |\S*bin/)?pal ([a-z-][^|#;>]*)")


def blocks(page: str) -> list[tuple[str, str]]:
    """(info string, text) of each fenced block."""
    return [(info.strip(), text) for info, text in _FENCE.findall(page)]


def programs(page: str) -> str:
    """The blocks marked as runnable, in order: one program."""
    return "\n\n".join(text for info, text in blocks(page) if info.split() == ["python", "runnable"])


def spans(page: str) -> list[str]:
    """The pieces of inline code."""
    return _CODE.findall(_FENCE.sub("", page))


def shell_lines(page: str) -> list[str]:
    return [line.strip() for info, text in blocks(page) if info in SHELL for line in text.splitlines()]


def commands(page: str) -> list[str]:
    """What follows `pal` in inline code and in shell blocks."""
    found = (_COMMAND.match(text) for text in [*spans(page), *shell_lines(page)])
    return [match[1].strip() for match in found if match]


def files(page: str) -> list[str]:
    """Paths of files of the repository: links, inline code that is one, and arguments below its folders."""
    named = [span for span in spans(page) if _FILE.fullmatch(span)]
    words = [word for line in [*spans(page), *shell_lines(page)] for word in line.split()]
    named += [word for word in words if _FILE.fullmatch(word) and word.split("/")[0] in ("pal", "recipes", "tests")]
    return named + [target for target in _LINK.findall(_FENCE.sub("", page)) if "://" not in target]


get_command = functools.cache(typer.main.get_command)
"""Commands and options of a typer app; half a second each time for ours."""


def fault_of(command: str) -> str | None:
    """Why a command line would not be understood: no such command or option."""
    at = get_command(app)
    words = re.findall(r"--?[A-Za-z][\w-]*|[^\s\[\]]+", command)
    while words and hasattr(at, "commands") and not words[0].startswith("-"):
        if words[0] not in at.commands:
            return f"no command '{words[0]}'"
        at = at.commands[words.pop(0)]
    known = {name for parameter in at.params for name in (*parameter.opts, *parameter.secondary_opts)}
    unknown = [word for word in words if re.fullmatch(r"--?[A-Za-z][\w-]*", word) and word not in {*known, "--help"}]
    return f"no option '{unknown[0]}'" if unknown else None


@functools.cache
def imports() -> dict[str, set[str]]:
    """Folder or file of `pal` -> the others that it imports, for types and inside functions too."""
    found: dict[str, set[str]] = {}
    for path in (ROOT / "pal").rglob("*.py"):
        own = path.relative_to(ROOT / "pal").parts
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module == "pal":
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module.removeprefix("pal.")] if (node.module or "").startswith("pal.") else []
            elif isinstance(node, ast.Import):
                modules = [alias.name.removeprefix("pal.") for alias in node.names if alias.name.startswith("pal.")]
            else:
                continue
            parts = {module.split(".")[0] for module in modules}
            found.setdefault(own[0].removesuffix(".py"), set()).update(part for part in parts if part.islower())
    return {part: others - {part} for part, others in found.items() if not part.startswith("__")}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def called(call: ast.Call) -> str:
    """The last name of what is called: `setattr` of `monkeypatch.setattr`."""
    return getattr(call.func, "attr", getattr(call.func, "id", ""))


def private_names(text: str) -> list[str]:
    """Private names of other files of `pal` that a program imports, or looks up in a module or class from there."""
    found, ours = [], set()
    nodes = list(ast.walk(ast.parse(text)))
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "pal":
            found += [f"{node.module}.{alias.name}" for alias in node.names if is_private(alias.name)]
            ours |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            ours |= {alias.asname or alias.name for alias in node.names if alias.name.split(".")[0] == "pal"}
    for node in nodes if ours else ():
        if isinstance(node, ast.Attribute) and is_private(node.attr) and ast.unparse(node.value) in ours:
            found.append(ast.unparse(node))
        elif isinstance(node, ast.Call) and called(node).endswith("setattr") and len(node.args) > 1:
            # in a test, by its name as a string
            where, name = node.args[0], node.args[1]
            if ast.unparse(where) in ours and isinstance(name, ast.Constant) and is_private(str(name.value)):
                found.append(f"{ast.unparse(where)}.{name.value}")
    return sorted(set(found))


def test_programs_run(tmp_path):
    pages = {page.stem: programs(page.read_text(encoding="utf-8")) for page in PAGES}
    pages = {name: text for name, text in pages.items() if text}
    assert {"adding_an_integration", "adding_an_encoder", "adding_a_dataset", "architecture"} <= set(pages)
    for name, text in pages.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.py").write_text(text, encoding="utf-8")
    # in a process of their own, since they register parts; in one, since importing torch takes longest
    runner = "import os, runpy, sys\nfor p in sys.argv[1:]: os.chdir(os.path.dirname(p)); runpy.run_path(p)"
    done = subprocess.run(
        [sys.executable, "-c", runner, *(str(tmp_path / name / f"{name}.py") for name in pages)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_files_exist(page):
    missing = [
        name
        for name in files(page.read_text(encoding="utf-8"))
        if not any((folder / name).exists() for folder in (ROOT, page.parent, ROOT / "pal"))
    ]
    assert not missing


def tree_names(text: str) -> list[str]:
    """Paths that a page's tree of the package names: of `pal/` indented, others not."""
    tree = text.split("## The tree", 1)[1].split("```")[1]
    found = []
    for line in tree.splitlines():
        names = re.match(r"( *)((?:[\w.]+/?(?:, )?)+)", line)
        if names:
            found += [("pal/" if names[1] else "") + name for name in names[2].split(", ") if name]
    return found


def test_the_tree_of_the_readme_names_files_that_exist():
    names = tree_names((ROOT / "README.md").read_text(encoding="utf-8"))
    assert not [name for name in names if not (ROOT / name).exists()]
    parts = {f"{path.name}/" if path.is_dir() else path.name for path in (ROOT / "pal").iterdir()}
    listed = {name.removeprefix("pal/") for name in names}
    assert not {part for part in parts - listed if not part.startswith("_") and part.endswith((".py", "/"))}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_commands_exist(page):
    faults = {line: fault_of(line) for line in commands(page.read_text(encoding="utf-8"))}
    assert not {line: fault for line, fault in faults.items() if fault}


def test_import_table_is_true():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = page.split("## Who may import whom")[1].split("\n## ")[0]
    rows = [line.split("|")[1:3] for line in table.splitlines() if line.startswith("| `")]
    allowed = {part: set(_CODE.findall(others)) for cell, others in rows for part in _CODE.findall(cell)}
    found = imports()
    assert set(found) <= set(allowed)
    # every part may use the errors and the configuration
    assert {part: others - allowed[part] - {"errors", "config"} for part, others in found.items()} == {
        part: set() for part in found
    }


def test_nothing_depends_on_the_laboratory():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    (said,) = re.findall(r"^(.*) are a laboratory", page.split("## Who may import whom")[1], re.MULTILINE)
    laboratory = set(_CODE.findall(said)) - {"pal/__main__.py", "app"}
    assert laboratory == {"lab", "bench", "probe", "report"}
    users = {part for part, others in imports().items() if others & laboratory}
    assert users - laboratory == {"app"}


def test_no_file_needs_a_private_name_of_another():
    files = [path for root in ("pal", "tests", "examples", "recipes") for path in (ROOT / root).rglob("*.py")]
    found = {str(path.relative_to(ROOT)): private_names(path.read_text(encoding="utf-8")) for path in files}
    assert {name: names for name, names in found.items() if names} == {}


def test_the_checks_can_fail():
    assert tree_names("## The tree\n```\npal/\n  ears.py   x\n  a.py, b.py  y\ndocs/ z\n```") == [
        *("pal/", "pal/ears.py", "pal/a.py", "pal/b.py", "docs/")
    ]
    assert private_names(
        "import pal.model\nfrom pal.train import optim as o, step\nfrom pal.train.meter import _SHOWN, Meter\n"
        "from torch import _C\no._f(step.Told)\nMeter._start\npal.model._warn\nself._x\n__name__\n"
        "monkeypatch.setattr(step, '_number', 1)\nmonkeypatch.setattr(step, 'Told', 1)\n"
    ) == ["Meter._start", "o._f", "pal.model._warn", "pal.train.meter._SHOWN", "step._number"]
    page = (
        "Use `pal/nowhere.py` and [this](docs/none.md).\n\n```sh\npal fly --high\n$ pal ask x.wav 'why?' --jsn\n```\n"
    )
    assert [name for name in files(page) if not (ROOT / name).exists()] == [
        "pal/nowhere.py",
        "pal/nowhere.py",
        "docs/none.md",
    ]
    assert [fault_of(line) for line in commands(page)] == ["no command 'fly'", "no option '--jsn'"]
    assert fault_of("data synth --out scenes --seed 3") is None
    assert fault_of("data sing") == "no command 'sing'"
    assert imports()["registry"] == {"config", "errors"}
