"""Durations as text."""


def duration(seconds: float) -> str:
    """4 s, 2 min 5 s, 3 h 20 min."""
    total = max(0, round(seconds))
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60} s"
    return f"{total // 3600} h {total % 3600 // 60} min"
