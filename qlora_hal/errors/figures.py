"""Numbers as people read them. Pure functions from a number to a short text."""

from __future__ import annotations

import math


def duration(seconds: float | None) -> str:
    """`41 s`, `2 min 31 s`, `3 h 05 min`, `2 d 4 h`; `?` when unknown."""
    if seconds is None or not math.isfinite(seconds):
        return "?"
    whole = round(seconds)
    if seconds < 10:
        return f"{seconds:.1f} s"
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def size(byte_count: float | None) -> str:
    """`512 MiB`, `7.43 GiB`; `?` when unknown."""
    if byte_count is None:
        return "?"
    value, units = float(byte_count), ("B", "KiB", "MiB", "GiB", "TiB")
    unit = 0
    while abs(value) >= 1024 and unit < len(units) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.0f} {units[unit]}" if unit < 2 or value >= 100 else f"{value:.3g} {units[unit]}"


def count(number: float | None) -> str:
    """`812`, `12.3k`, `4.06M`, `1.2B`."""
    if number is None or not math.isfinite(number):
        return "?"
    for limit, mark in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        # From half a unit of the third digit below on: 999.9M would be written 1e+03M.
        if abs(number) >= limit * (1 - 5e-4 if mark != "k" else 1):
            return f"{number / (1e3 if mark == 'k' else limit):.3g}{mark}"
    return f"{number:,.0f}"


def loss(value: float | None) -> str:
    """Four decimals, or the word for what is no number."""
    if value is None:
        return "-"
    return f"{value:.4f}" if math.isfinite(value) else str(value)


def rate(value: float) -> str:
    """A learning rate: `2e-04`, `1.5e-05`."""
    text = f"{value:.3e}"
    mantissa, exponent = text.split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{exponent}"
