"""Finds and checks models in a thread of its own, which never holds up the screen nor the end of the program."""

import threading
from collections.abc import Callable, Sequence

from tui.screens.adapters.session.catalog import Entry, Library


class Scanner:
    """Tells `found` all models at once, then `checked` each as its bytes were read. Both are called in the thread."""

    def __init__(
        self, library: Library, found: Callable[[Sequence[Entry]], object], checked: Callable[[Entry], object]
    ) -> None:
        self._library, self._found, self._checked = library, found, checked
        self._stop = threading.Event()

    def start(self) -> None:
        """Scan from the start; a scan that is under way tells nothing more."""
        self.stop()
        self._stop = threading.Event()
        # a daemon: gigabytes may be hashed, and quitting does not wait for that
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
