"""How numbers and durations are written for people, in the live table and in the report."""

import math


def number(value: object) -> str:
    """A short, readable form of a metric: two or three significant digits, a true minus sign.

    None and non-finite numbers become an en dash; text is returned as it is.
    """
    if value is None or isinstance(value, str | bool):
        return "–" if value is None else str(value)
    if not math.isfinite(value):
        return "–"
    size = abs(value)
    if isinstance(value, int) or size >= 1000:
        text = f"{value:,.0f}"
    elif size >= 100:
        text = f"{value:.0f}"
    elif size >= 10:
        text = f"{value:.1f}"
    elif size >= 0.1:
        text = f"{value:.2f}"
    else:
        text = f"{value:.2g}"
    return text.replace("-", "−")


def points(value: float) -> str:
    """Rubric points, which are mostly whole: "7", "−2.5"."""
    return f"{value:g}".replace("-", "−")


def duration(seconds: float) -> str:
    """``seconds`` as "0.42 s", "38 s", "4 min 10 s" or "2 h 05 min"."""
    if seconds < 10:
        return f"{seconds:.2g} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
