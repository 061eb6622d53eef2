"""Names and strict configuration."""

import pytest

from pal.config import StrictConfig, parse
from pal.errors import ConfigError
from pal.registry import build, check, lookup, names


class Inner(StrictConfig):
    r: int = 8


class Outer(StrictConfig):
    width: int
    inner: Inner = Inner()
    many: list[Inner] = []


def test_known_names():
    assert {"tiny", "whisper"} <= set(names("encoder"))
    assert {"mlp", "qformer", "strided_conv"} <= set(names("connector"))
    assert {"plits", "lal", "pal"} <= set(names("integration"))


@pytest.mark.parametrize("kind", ["encoder", "connector", "integration"])
def test_unknown_name_lists_the_known(kind):
    with pytest.raises(ConfigError, match=f"unknown {kind} 'wisper'; known: .*{names(kind)[0]}"):
        lookup(kind, "wisper")


def test_build_checks_options():
    assert build("connector", {"name": "mlp", "width": 5}, in_width=3).width == 5
    with pytest.raises(ConfigError, match=r"connector 'mlp': unknown key 'widht'; known: .*width"):
        build("connector", {"name": "mlp", "widht": 5}, in_width=3)
    with pytest.raises(ConfigError, match=r"connector 'mlp': unknown key 'widht'; known: .*width"):
        check("connector", {"name": "mlp", "widht": 5})
    check("connector", "mlp")
    with pytest.raises(ConfigError, match="needs a 'name'"):
        build("connector", {"width": 5}, in_width=3)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"width": 1, "depth": 2}, "here: unknown key 'depth'; known: inner, many, width"),
        ({"width": 1, "inner": {"rank": 2}}, "here: unknown key 'inner.rank'; known: r"),
        ({"width": 1, "many": [{"r": 1}, {"rank": 2}]}, "here: unknown key 'many.1.rank'; known: r"),
        ({}, "here: missing key 'width'"),
        ({"width": "x"}, "here: width: Input should be a valid integer.*"),
    ],
)
def test_strict_configuration(data, message):
    with pytest.raises(ConfigError, match=f"^{message}$"):
        parse(Outer, data, where="here")


def test_values_arrive():
    assert parse(Outer, {"width": 3, "inner": {"r": 4}}, where="here") == Outer(width=3, inner=Inner(r=4))
