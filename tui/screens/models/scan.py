"""Finds and checks all models in a thread: names first, verdicts as they come."""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from time import monotonic

from pipeline.views.model_library import Entry, Library

# seconds for which verdicts are collected: those of small models come faster than a list is drawn
BATCH = 0.25
Found = Callable[[list[Entry] | None, Sequence[Entry]], object]


class Scan:
    """One at a time: a scan that still runs when another starts reports nothing more.

    `found(all, checked)` is called in the thread: once with all models, then with those that were
    checked since. `seen`: the paths that are checked first.
    """

    def __init__(self, library: Library, found: Found) -> None:
        self._library, self._found = library, found
        self._stop = threading.Event()
        self.seen: Sequence[Path] = ()

    def start(self) -> None:
        """Begin anew."""
        self.stop()
        self._stop = threading.Event()
        # A daemon, not a worker of Textual's: quitting must not wait until gigabytes are hashed.
        threading.Thread(target=self._run, args=(self._stop,), daemon=True).start()

    def stop(self) -> None:
        self._stop.set()

    def _run(self, stop: threading.Event) -> None:
        entries: list[Entry] = []
        for entry in self._library.scan():
            if stop.is_set():
                return
            entries.append(entry)
        self._found(entries, ())
        checked, since = deque[Entry](), monotonic()
        for entry in self._library.check_all(entries, lambda: self.seen):
            if stop.is_set():
                return
            checked.append(entry)
            if monotonic() - since > BATCH:
                self._found(None, list(checked))
                checked.clear()
                since = monotonic()
        self._found(None, list(checked))
