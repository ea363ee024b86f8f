"""What tests of screens share."""

from collections.abc import Callable
from time import monotonic
from typing import Any

from textual.pilot import Pilot


async def until(pilot: Pilot[Any], holds: Callable[[], object], seconds: float = 15.0) -> None:
    """Let the app go on until `holds()`; fails if it does not in time."""
    end = monotonic() + seconds
    while not holds():
        assert monotonic() < end, "it did not come to hold in time"
        await pilot.pause(0.02)
