"""Adapters in mlx-lm's format, written as our export writes them."""

from pathlib import Path

from pipeline.certify.kinds import Checked
from pipeline.export.formats.mlx import write_files


class MLXFiles:
    """A base, and adapters beside it: `engines.Opens`."""

    def __init__(self, checked: Checked, room: Path) -> None:
        self._checked, self._room = checked, room
        self._number = 0

    def __call__(self, path: Path | None) -> tuple[Path, Path | None]:
        """Raises UserError for what mlx-lm cannot hold."""
        checked = self._checked
        if path is None:
            return checked.base, None
        self._number += 1
        folder = self._room / f"adapter{self._number}"
        folder.mkdir()
        write_files(folder, checked.base, path, str(checked.base), checked.trust_remote_code)
        return checked.base, folder
