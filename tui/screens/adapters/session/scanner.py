"""Finds and checks models in a daemon thread, which blocks neither the screen nor the exit."""

import threading
from collections.abc import Callable, Sequence

from tui.screens.adapters.session.catalog import Entry, Library


class Scanner:
    """Calls `found` with all models, then `checked` with each once it is verified. Both run in the thread."""

    def __init__(
        self, library: Library, found: Callable[[Sequence[Entry]], object], checked: Callable[[Entry], object]
    ) -> None:
        self._library, self._found, self._checked = library, found, checked
        self._stop = threading.Event()

    def start(self) -> None:
        """Start a new scan; a running one stops and reports nothing more."""
        self.stop()
        self._stop = threading.Event()
        # a daemon, so that quitting does not wait until gigabytes are hashed
        threading.Thread(target=self._scan, args=(self._stop,), daemon=True).start()

    def stop(self) -> None:
        self._stop.set()

    def _scan(self, stop: threading.Event) -> None:
        entries: list[Entry] = []
        for entry in self._library.scan():
            if stop.is_set():
                return
            entries.append(entry)
        if not stop.is_set():
            self._found(entries)
        for checked in self._library.check_all(entries):
            if stop.is_set():
                return
            self._checked(checked)
