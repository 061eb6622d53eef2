"""Numbers in words, for tables and sentences."""

from __future__ import annotations

from collections.abc import Sequence


def size(count: float) -> str:
    """Bytes."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:.0f} B"


def milliseconds(seconds: float) -> str:
    """A time as milliseconds."""
    return f"{seconds * 1000:,.0f} ms"


def times(value: float, reference: float) -> str:
    """How many times the reference."""
    return f"×{value / reference:.2f}" if reference else "–"


def shown(value: object) -> str:
    """Three decimals of a fraction, an interval of two of them, anything else as it is, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, list | tuple):
        return " to ".join(shown(part) for part in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return three_digits(value) if abs(value) >= 100 else f"{value:.3f}"
    return str(value)


def three_digits(value: float | None, scale: float = 1.0) -> str:
    """Three digits that count."""
    if value is None:
        return ""
    scaled = value * scale
    return f"{scaled:,.0f}" if abs(scaled) >= 100 else f"{scaled:.3g}"


def p_value(p: float | None) -> str:
    """Two digits that count."""
    return "" if p is None else f"{p:.2g}"


def joined(names: Sequence[str]) -> str:
    """A list in words."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
