"""Finds models and adapters in folders, and what was measured of them, without loading them."""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

from pipeline.adapters.config import CONFIG
from pipeline.adapters.folder import base_of
from pipeline.errors import UserError
from pipeline.files import artifact
from pipeline.files.text import natural_sort_key
from pipeline.project.gate import read_verdict
from pipeline.project.stage_graph import ARTIFACTS

BASES = ("import", "pretrain", "expand_vocab")  # methods that produce a base for others
VERDICT = "verdict"  # the key of an evaluation's verdict on a model among its metrics
# sha256 of an artifact → its metrics in an evaluation
Measurements = Mapping[str, Mapping[str, Any]]


def model_folders(root: Path) -> Iterator[Path]:
    """`root` and the folders below it, except hidden ones, that hold an adapter or a checkpoint."""
    for path, folders, files in os.walk(root):
        # in place: os.walk goes into what is left, in this order
        folders[:] = sorted(
            (name for name in folders if not name.startswith(".")), key=natural_sort_key
        )
        weights = any(name.endswith(".safetensors") for name in files)
        if CONFIG in files or ("config.json" in files and (weights or artifact.MANIFEST in files)):
            yield Path(path)


def find_base(adapter: Path, root: Path) -> Path:
    """The base that an adapter names: searched next to it, then in `root`. Raises UserError."""
    return base_of(adapter, adapter.parent, root)


def measured(roots: Iterable[Path], settings: str = "") -> Measurements:
    """Metrics by sha256 of the artifact; of two evaluations in `roots` the first wins.

    `settings`: only of evaluations with these, the key of `evaluation.measuring`.
    """
    measurements: dict[str, dict[str, Any]] = {}
    for path in chain.from_iterable(sorted(root.glob("*/metrics.json")) for root in roots):
        # a folder without manifest is no evaluation, and other tools write a metrics.json too
        with suppress(UserError, KeyError, TypeError, AttributeError):
            manifest = artifact.read_manifest(path.parent)
            if settings and manifest.get("settings") != settings:
                continue
            metrics = artifact.read_json(path, "Run `lora evaluate`")
            for variant, name in manifest["variants"].items():
                verdict = read_verdict(manifest, variant)
                without_verdict = {**metrics[variant], VERDICT: None}
                numbers = measurements.setdefault(manifest["inputs"][name], without_verdict)
                # of the first evaluation that had limits
                numbers[VERDICT] = numbers[VERDICT] or verdict
    return measurements


def measured_of(adapter: Path) -> Mapping[str, Any]:
    """What evaluations of its project, or of the project here, measured of an adapter."""
    folder = adapter.resolve()
    # a sweep's lie one folder deeper
    measurements = measured((folder.parent, folder.parent.parent, Path(ARTIFACTS)))
    if not measurements or not (folder / CONFIG).is_file():
        return {}
    # an export says what is wrong with them
    with suppress(UserError, OSError, KeyError, TypeError):
        if (folder / artifact.MANIFEST).exists():
            digest = artifact.sealed_digest(artifact.read_manifest(folder))
        else:
            digest = artifact.digest(folder)
        return measurements.get(digest, {})
    return {}
