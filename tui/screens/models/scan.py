"""Finds and checks all models in a thread: names first, verdicts as they come."""

import threading
from collections.abc import Callable, Collection
from pathlib import Path
from time import monotonic

from pipeline.views.model_library import Entry, Library

# seconds for which verdicts are collected: those of small models come faster than a list is drawn
BATCH = 0.25


def start_scan(
    library: Library,
    found: Callable[[list[Entry]], object],
    seen: Callable[[], Collection[Path]],
) -> threading.Event:
    """Call `found` in the thread with all models, again and again as they are checked, until the
    event is set that this returns. `seen` names those that are checked first.
    """
    stop = threading.Event()

    def scan() -> None:
        entries = {entry.model.path: entry for entry in library.scan()}
        checked, since = library.check_all([*entries.values()], seen), 0.0
        while not stop.is_set():
            if monotonic() - since > BATCH:
                found([*entries.values()])
                since = monotonic()
            entry = next(checked, None)
            if entry is None:
                found([*entries.values()])
                return
            entries[entry.model.path] = entry

    # A daemon, not a worker of Textual's: quitting must not wait until gigabytes are hashed.
    threading.Thread(target=scan, daemon=True).start()
    return stop
