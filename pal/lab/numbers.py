"""Number formats for tables and sentences."""

from __future__ import annotations

from collections.abc import Sequence


def format_bytes(count: float) -> str:
    """Bytes in a readable unit, such as "1.5 kB"."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:.0f} B"


def format_milliseconds(seconds: float) -> str:
    """Seconds as milliseconds, such as "1,234 ms"."""
    return f"{seconds * 1000:,.0f} ms"


def format_ratio(value: float, reference: float) -> str:
    """Ratio of a value to a reference, such as "×1.25"; "–" if the reference is 0."""
    return f"×{value / reference:.2f}" if reference else "–"


def format_value(value: object) -> str:
    """Text of a value: fractions with three decimals, intervals as "0.100 to 0.200", None as ""."""
    if value is None:
        return ""
    if isinstance(value, list | tuple):
        return " to ".join(format_value(part) for part in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return three_digits(value) if abs(value) >= 100 else f"{value:.3f}"
    return str(value)


def three_digits(value: float | None, scale: float = 1.0) -> str:
    """A number times `scale` with three significant digits; "" for None."""
    if value is None:
        return ""
    scaled = value * scale
    return f"{scaled:,.0f}" if abs(scaled) >= 100 else f"{scaled:.3g}"


def p_value(p: float | None) -> str:
    """A p-value with two significant digits; "" for None."""
    return "" if p is None else f"{p:.2g}"


def joined(names: Sequence[str]) -> str:
    """A list in words, such as "a, b and c"."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
