"""certificate.json: what was found, of exactly which files; no torch is imported to read it."""

import hashlib
import json
from pathlib import Path
from typing import Any

from pipeline.files import artifact

FILE = "certificate.json"
FOLDER = Path("runs/certificates")  # of a project's own artifacts, whose folders are tracked


def place_of(adapter: Path) -> Path:
    """Where an adapter's certificate lies: in its folder, unless that is an artifact."""
    if (adapter / artifact.MANIFEST).exists():
        return FOLDER / f"{adapter.resolve().name}.json"
    return adapter / FILE


def digests(adapter: Path) -> dict[str, str]:
    """sha256 of the files that an adapter is."""
    found = {}
    for path in sorted(adapter.glob("adapter*")):
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def write(path: Path, adapter: Path, certificate: dict[str, Any]) -> None:
    """Write a certificate atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    artifact.write_json(path, {"files": digests(adapter), **certificate})


def read(adapter: Path) -> dict[str, Any] | None:
    """The certificate of exactly these files; None if there is none, or of other files."""
    try:
        certificate = json.loads(place_of(adapter).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    is_current = isinstance(certificate, dict) and certificate.get("files") == digests(adapter)
    return certificate if is_current else None
