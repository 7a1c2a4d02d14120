"""Numbers as people read them, the same in both languages."""

from __future__ import annotations

from typing import Any

Number = int | float


def number(value: Any) -> str:
    """12,345 for whole numbers; four significant digits for others; an en dash for nothing."""
    if value is None or isinstance(value, bool) or not isinstance(value, int | float):
        return "–"
    if value != value:
        return "NaN"
    if value in (float("inf"), float("-inf")):
        return "∞" if value > 0 else "−∞"
    if isinstance(value, int) or (float(value).is_integer() and abs(value) < 1e15):
        return f"{int(value):,}".replace("-", "−")
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}".replace("-", "−")
    if size < 1e-3:
        return f"{value:.1e}".replace("e-0", "e-").replace("-", "−")
    digits = 1 if size >= 100 else 2 if size >= 10 else 3
    return f"{value:.{digits}f}".replace("-", "−")


def compact(value: Number) -> str:
    """1.2M for places with little room."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= (size if unit != "k" else 10_000):
            scaled = value / size
            return f"{scaled:.0f}{unit}" if abs(scaled) >= 100 else f"{scaled:.1f}{unit}".replace(".0", "")
    return number(value)


def tick(value: Number) -> str:
    """The label of an axis: as short as the number allows."""
    if abs(value) >= 10_000:
        return compact(value)
    if value and abs(value) < 1e-3:
        return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-").replace("-", "−")
    return f"{value:.6g}".replace("-", "−")


def percent(part: Number, whole: Number) -> str:
    """Share with one decimal. Never rounds something to 0% or something missing to 100%."""
    if not whole:
        return "–"
    share = 100 * part / whole
    if 0 < share < 0.05:
        return "<0.1%"
    if 99.95 <= share < 100:
        return ">99.9%"
    return f"{share:.1f}%" if share not in (0, 100) else f"{share:.0f}%"


def change(value: Number, base: Number) -> str:
    """Relative change with its sign."""
    if not base:
        return "–"
    share = 100 * (value - base) / base
    if abs(share) < 0.05:
        return "±0%"
    text = f"{abs(share):,.0f}%" if abs(share) >= 100 else f"{abs(share):.1f}%"
    return ("+" if share > 0 else "−") + text


def duration(seconds: Any) -> str:
    """0.4s, 12s, 2m 13s, 3h 05m."""
    if not isinstance(seconds, int | float) or seconds != seconds:
        return "–"
    if 0 < seconds < 10:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02d}m"


def size(count: Any) -> str:
    """Bytes in binary units."""
    if not isinstance(count, int | float) or isinstance(count, bool):
        return "–"
    scaled = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if scaled < 1024:
            return f"{scaled:.0f} {unit}" if unit == "B" or scaled >= 100 else f"{scaled:.1f} {unit}"
        scaled /= 1024
    return f"{scaled:.1f} TiB"
