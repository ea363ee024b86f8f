"""certificate.json: what was found, of exactly which files."""

import hashlib
from pathlib import Path
from typing import Any

from pipeline.certify.kinds import Checked
from pipeline.errors import UserError
from pipeline.files import artifact
from pipeline.weights.merge import CERTIFICATE

FOLDER = Path("runs/certificates")  # of a project's own artifacts, whose folders are tracked
SHORT = 8  # characters of a digest


def digests(checked: Checked) -> dict[str, str]:
    """sha256 of the files that it is. Raises UserError."""
    found = {}
    for path in checked.kind.files(checked.folder):
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def write(checked: Checked, certificate: dict[str, Any], out: Path | None) -> Path:
    """Write the certificate to `out`; by default beside the files, but not into an artifact."""
    files = digests(checked)
    folder = checked.folder if checked.folder.is_dir() else checked.folder.parent
    if out is None and (folder / artifact.MANIFEST).exists():
        *_, last = files.values()
        out = FOLDER / f"{folder.resolve().name}-{last[:SHORT]}.json"
    path = out or folder / CERTIFICATE
    path.parent.mkdir(parents=True, exist_ok=True)
    artifact.write_json(path, {**_of_export(path), "files": files, **certificate})
    return path


def _of_export(path: Path) -> dict[str, Any]:
    """What an export's certificate says already; {} without one, or where it is none."""
    try:
        return artifact.read_json(path, "Certify again") if path.is_file() else {}
    except UserError:
        return {}
