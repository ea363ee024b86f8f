"""`lora-tui --demo`: a finished project, packed into the program by `make demo` (docs/demo).

It is unpacked once into the user's cache folder. Its stages were run by another version of the code
perhaps, on another machine: so that they count as up to date here, the manifests' code digests and
library versions are set to today's, and `TRAINED` in each manifest says what they were.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import version
from lzma import LZMAError
from pathlib import Path
from typing import Any

from pipeline.errors import UserError, explain
from pipeline.files import artifact
from pipeline.files.base_model import IMPORTED
from pipeline.files.digest_cache import cache_home, signature
from pipeline.files.home import from_home
from pipeline.files.locks import Lock
from pipeline.project import provenance
from pipeline.project.runner import input_facts
from pipeline.project.stage_graph import Project, Stage
from pipeline.stages.registry import open_project
from tui.services.pipeline_process import Runner
from tui.services.projects import packed_tokenizer

# by name, the first is the one that opens if none is named
ARCHIVES: Mapping[str, Path] = {
    "chat": Path(__file__).with_name("demo.tar.xz"),
    "minigpt": Path(__file__).with_name("minigpt.tar.xz"),
}
CHAT, MINIGPT = ARCHIVES
PARAMS = "params.yaml"
# in the unpacked project: which archive it is from, its files, the code that it was stamped for
STAMP = ".demo.json"
TRAINED = "trained"  # in a manifest of the demo: with what it was really made
TOKENIZER = "tokenizer.json"


def open_demo(name: str = CHAT) -> Path:
    """The params file of a demo, which is unpacked if it is not there whole. Raises UserError."""
    archive = ARCHIVES[name]
    number = version("lora-workbench")
    suffix = number if name == CHAT else f"{name}-{number}"
    folder = cache_home() / "lora-workbench" / f"demo-{suffix}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with Lock(folder.with_name(f".{folder.name}.lock")) as lock:  # two may start at once
            lock.acquire()
            packed = archive.read_bytes()
            if not Runner(folder).groups() and not _is_whole(folder, packed):
                _unpack(packed, folder)
            _stamp(folder)
    except OSError as error:
        raise UserError(
            f"The demo cannot be unpacked: {explain(error)} Set XDG_CACHE_HOME to a folder with "
            "room."
        ) from None
    except (tarfile.TarError, EOFError, LZMAError) as error:
        raise UserError(f"The demo cannot be unpacked: {archive} is damaged ({error}).") from None
    return folder / PARAMS


def greet(folder: Path) -> str:
    """What a user should know of it."""
    where = from_home(folder)
    told = f"This is a demo, a project that was trained earlier. It lies in {where}."
    if not artifact.not_shipped(folder / IMPORTED):
        return f"{told} R runs it anew."
    return (
        f"{told} It has no weights: its models' answers were recorded, and are replayed. "
        "README.md there says to which prompts, and how to get the weights."
    )


def _is_whole(folder: Path, packed: bytes) -> bool:
    """Whether the folder is from this archive, lacks none of its files, and no artifact of it was
    changed.
    """
    try:
        stamp = json.loads((folder / STAMP).read_text(encoding="utf-8"))
        is_same = stamp["archive"] == hashlib.sha256(packed).hexdigest()
        if not is_same or not all((folder / name).is_file() for name in stamp["files"]):
            return False
        for manifest in folder.glob(f"artifacts/*/{artifact.MANIFEST}"):
            if TRAINED in artifact.read_manifest(manifest.parent):  # else the user made it anew
                artifact.verify(manifest.parent)
    except (OSError, ValueError, KeyError, TypeError, UserError):
        return False
    return True


def _unpack(packed: bytes, folder: Path) -> None:
    """The archive's files as `folder`, whole or not at all."""
    with (
        artifact.writing(folder) as out,
        tarfile.open(fileobj=io.BytesIO(packed), mode="r:xz") as archive,
    ):
        names = []
        for member in archive:
            path = Path(member.name)
            # Regular files inside of the folder only, whatever the archive holds.
            if not member.isfile() or path.is_absolute() or ".." in path.parts:
                raise tarfile.TarError(f"{member.name} has no place in it")
            (out / path).parent.mkdir(parents=True, exist_ok=True)
            file = archive.extractfile(member)
            content = file.read() if file else b""
            if path.name == TOKENIZER:
                content = packed_tokenizer.unpack(content.decode()).encode()
            (out / path).write_bytes(content)
            names.append(member.name)
        stamp = {"archive": hashlib.sha256(packed).hexdigest(), "files": names}
        artifact.write_json(out / STAMP, stamp)


def _stamp(folder: Path) -> None:
    """Set code and versions in the manifests of the demo to today's, unless that is done."""
    stamp = artifact.read_json(folder / STAMP, "Remove the folder")
    code = hashlib.sha256(json.dumps(signature(provenance.ROOT / "pipeline")).encode()).hexdigest()
    now = {"code": code, "versions": dict(provenance.versions())}
    if {key: stamp.get(key) for key in now} == now:
        return
    project = open_project(folder / PARAMS)
    for stage in project.stages.values():
        path = project.artifact(stage.name)
        with suppress(UserError):  # made anew just now, or not yet
            manifest = artifact.read_manifest(path)
            if TRAINED in manifest:
                today = _today(manifest, project, stage)
                artifact.write_json(path / artifact.MANIFEST, {**manifest, **today})
    artifact.write_json(folder / STAMP, {**stamp, **now})


def _today(manifest: Mapping[str, Any], project: Project, stage: Stage) -> Mapping[str, Any]:
    """The facts that differ without a cause in the project: code, libraries, and params that did
    not exist yet.
    """
    facts = input_facts(project, stage)
    params = {key: manifest["params"].get(key, value) for key, value in facts["params"].items()}
    return {"code": facts["code"], "versions": dict(facts["versions"]), "params": params}
