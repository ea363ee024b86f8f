"""A finished project as an archive: smaller figures, no weights where they are too large, sealed
again, and packed.
"""

import io
import json
import lzma
import tarfile
from collections.abc import Mapping
from datetime import date
from importlib.metadata import version
from pathlib import Path

from PIL import Image

from pipeline.files import artifact
from pipeline.project.runner import artifact_settings, changed_params, run, settings_of
from pipeline.project.stage_graph import Project
from tui.services.projects import packed_tokenizer
from tui.services.projects.demo import TRAINED

# caches, locks, the tokens as a run reads them
LEFT_OUT = {".git", ".lora-cache", "tmp", "cache", "lock", "tokens", "exports"}
WEIGHTS = ("*.safetensors", "*.gguf")
COLORS = 64  # of a figure
TOKENIZER = "tokenizer.json"


def run_stages(project: Project) -> None:
    """Run the stages that were not run with these settings in an earlier call."""
    for stage in project.stages.values():
        done = artifact_settings(project.artifact(stage.name))
        if done and not changed_params(done.params, settings_of(project, stage)):
            continue
        for _ in run(project, stage):
            pass
        print(f"{stage.name}: done", flush=True)


def made() -> dict[str, str]:
    """What made a demo, for its manifests and its README."""
    return {"version": version("lora-workbench"), "date": date.today().isoformat()}


def finish(project: Project, weights: bool = True) -> None:
    """Make the artifacts as they are shipped, and seal them again.

    Each manifest keeps under `trained` what it said before. Without `weights` it also names the
    files that are left out.
    """
    base = project.root / project.params.origin.base
    digests: dict[str, str] = {}
    for stage in project.stages.values():
        folder = project.artifact(stage.name)
        for picture in folder.rglob("*.png"):
            _reduce_colors(picture)
        for inner in sorted(folder.glob(f"*/{artifact.MANIFEST}")):  # the adapters of a sweep
            _seal(inner.parent, digests, {} if weights else _remove_weights(inner.parent))
        left_out = {} if weights else _remove_weights(folder)
        if stage.name == "import" and not weights:
            left_out[base.name] = base.stat().st_size
        _seal(folder, digests, left_out)
        digests[project.artifact_name(stage.name)] = artifact.digest(folder)


def _remove_weights(folder: Path) -> dict[str, int]:
    """Name → bytes of what was removed; a tokenizer is written as it will be unpacked."""
    if (folder / TOKENIZER).exists():
        text = (folder / TOKENIZER).read_text(encoding="utf-8")
        whole = packed_tokenizer.unpack(pack_tokenizer(text))
        (folder / TOKENIZER).write_text(whole, encoding="utf-8")
    removed = {}
    for pattern in WEIGHTS:
        for path in sorted(folder.rglob(pattern)):
            removed[path.relative_to(folder).as_posix()] = path.stat().st_size
            path.unlink()
    return removed


def _seal(folder: Path, digests: Mapping[str, str], left_out: Mapping[str, int]) -> None:
    manifest = artifact.read_manifest(folder)
    earlier = {key: manifest[key] for key in ("code", "versions", "inputs", "files")}
    inputs = {name: digests.get(name, digest) for name, digest in manifest["inputs"].items()}
    shipped = {**manifest, "inputs": inputs, TRAINED: {**made(), **earlier}}
    if left_out:
        shipped[artifact.NOT_SHIPPED] = dict(left_out)
    artifact.seal(folder, shipped)


def _reduce_colors(picture: Path) -> None:
    """A third of the bytes: a chart needs few colors."""
    with Image.open(picture) as image:
        image.convert("RGB").quantize(COLORS).save(picture, optimize=True)


def pack_tokenizer(text: str) -> str:
    """A tokenizer.json that `packed_tokenizer.unpack` reads; the same text if it is none of this
    kind.
    """
    tree = json.loads(text)
    model = tree["model"]
    merges = model.get("merges")
    if not merges:
        return text
    first = len(model["vocab"]) - len(merges)
    vocabulary = {token: id_ for token, id_ in model["vocab"].items() if id_ < first}
    lines = "\n".join(" ".join(pair) for pair in merges)
    packed = json.dumps({**tree, "model": {**model, "vocab": vocabulary, "merges": lines}})
    if json.loads(packed_tokenizer.unpack(packed)) != tree:
        raise ValueError("The vocabulary is not in the order of the merges.")
    return packed


def pack(project: Project) -> bytes:
    """The project's files without caches, as a .tar.xz; the same bytes for the same files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        # by the end of the name: files of one kind compress better side by side
        for path in sorted(project.root.rglob("*"), key=lambda path: (path.suffix, path)):
            name = path.relative_to(project.root)
            if not path.is_file() or LEFT_OUT & {*name.parts} or path.suffix == ".gguf":
                continue
            content = path.read_bytes()
            if path.name == TOKENIZER:
                content = pack_tokenizer(content.decode()).encode()
            member = tarfile.TarInfo(name.as_posix())
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return lzma.compress(buffer.getvalue(), preset=9 | lzma.PRESET_EXTREME)
