"""The documented Python calls say their types; `tests/typed_api.py` has what a type checker makes of them."""

import inspect
from pathlib import Path
from typing import get_overloads

import pytest

import pal
import pal.train
from pal.model import PalModel

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    "function",
    [pal.load, pal.attach, pal.train.run, PalModel.index, PalModel.ask_detailed, *get_overloads(PalModel.ask)],
    ids=lambda function: function.__qualname__,
)
def test_no_argument_or_result_may_be_anything(function):
    signature = inspect.signature(function)
    said = {name: parameter.annotation for name, parameter in signature.parameters.items() if name != "self"}
    said["return"] = signature.return_annotation
    assert not [name for name, hint in said.items() if hint is inspect.Signature.empty or "Any" in str(hint)]


def test_ask_has_overloads():
    assert {str(inspect.signature(one).return_annotation) for one in get_overloads(PalModel.ask)} == {
        "str",
        "list[str]",
        "str | list[str]",
        "Iterator[str]",
    }


def test_type_checkers_find_the_types(monkeypatch):
    """PEP 561: without `py.typed` in the wheel, checkers take an installed package for untyped."""
    build = pytest.importorskip("setuptools").Distribution
    monkeypatch.chdir(ROOT)
    made = build({"script_name": "setup.py"})
    made.parse_config_files()
    files = made.get_command_obj("build_py")
    files.ensure_finalized()
    assert "py.typed" in {name for package, _, _, names in files.data_files for name in names if package == "pal"}
