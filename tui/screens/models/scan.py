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
        entries = dict[Path, Entry]()
        for entry in library.scan():
            if stop.is_set():  # another scan began meanwhile: two take twice as long
                return
            entries[entry.model.path] = entry
        checked, since = library.check_all([*entries.values()], seen), 0.0
        while not stop.is_set():
            if monotonic() - since > BATCH:
                found([*entries.values()])
                since = monotonic()
            judged = next(checked, None)
            if judged is None:
                found([*entries.values()])
                return
            entries[judged.model.path] = judged

    # A daemon, not a worker of Textual's: quitting must not wait until gigabytes are hashed.
    threading.Thread(target=scan, daemon=True).start()
    return stop
