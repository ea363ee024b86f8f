"""`lora adapters import` of the folder `theirs`, on `base`, as `mine`."""

from pathlib import Path

from tests.conftest import Lora
from tests.helpers.projects import folder_bytes, refusal

COMMAND = ("adapters", "import", "theirs", "--base", "base", "--out", "mine")


def imported(cli: Lora, root: Path, *more: str) -> str:
    """Import it; returns what was said."""
    code, said, errors = cli(*COMMAND, *more, cwd=root)
    assert code == 0, errors
    return said + errors


def refused(cli: Lora, root: Path) -> str:
    """The one message of an import that changed nothing."""
    before = folder_bytes(root)
    said = refusal(cli(*COMMAND, cwd=root))
    assert folder_bytes(root) == before and not (root / "mine").exists()
    return said
