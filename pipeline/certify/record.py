"""certificate.json: what was found, of exactly which files."""

import hashlib
from pathlib import Path
from typing import Any

from pipeline.adapters.config import CONFIG, WEIGHTS
from pipeline.files import artifact
from pipeline.weights.merge import CERTIFICATE

FOLDER = Path("runs/certificates")  # of a project's own artifacts, whose folders are tracked
SHORT = 8  # characters of a digest


def digests(adapter: Path) -> dict[str, str]:
    """sha256 of the files that an adapter is."""
    found = {}
    for name in (CONFIG, WEIGHTS):
        with (adapter / name).open("rb") as file:
            found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def write(adapter: Path, certificate: dict[str, Any], out: Path | None) -> Path:
    """Write the certificate to `out`; by default beside the adapter, but not into an artifact."""
    files = digests(adapter)
    if out is None and (adapter / artifact.MANIFEST).exists():
        out = FOLDER / f"{adapter.resolve().name}-{files[WEIGHTS][:SHORT]}.json"
    path = out or adapter / CERTIFICATE
    path.parent.mkdir(parents=True, exist_ok=True)
    artifact.write_json(path, {"files": files, **certificate})
    return path
