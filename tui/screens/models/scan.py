"""Finds and checks all models in a thread: names first, verdicts as they come."""

import threading
from collections.abc import Callable, Collection
from pathlib import Path
from time import monotonic

from pipeline.views.model_library import Entry, Library

# seconds for which verdicts are collected: those of small models come faster than a list is drawn
BATCH = 0.25


class Scan:
    """One at a time: a scan that still runs when another starts reports nothing more.

    `found` is called in the thread with all models, again and again as they are checked; `seen`
    names those that are checked first.
    """

    def __init__(
        self,
        library: Library,
        found: Callable[[list[Entry]], object],
        seen: Callable[[], Collection[Path]],
    ) -> None:
        self._library, self._found, self._seen = library, found, seen
        self._stop = threading.Event()

    def start(self) -> None:
        """Begin anew."""
        self.stop()
        self._stop = threading.Event()
        # A daemon, not a worker of Textual's: quitting must not wait until gigabytes are hashed.
        threading.Thread(target=self._run, args=(self._stop,), daemon=True).start()

    def stop(self) -> None:
        self._stop.set()

    def _run(self, stop: threading.Event) -> None:
        entries: dict[Path, Entry] = {}
        for entry in self._library.scan():
            if stop.is_set():
                return
            entries[entry.model.path] = entry
        self._found([*entries.values()])
        since = monotonic()
        for entry in self._library.check_all([*entries.values()], self._seen):
            if stop.is_set():
                return
            entries[entry.model.path] = entry
            if monotonic() - since > BATCH:
                self._found([*entries.values()])
                since = monotonic()
        self._found([*entries.values()])
