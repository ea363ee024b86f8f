"""`make demo`: the small finished project that `lora-tui --demo` opens, computed and packed into
the program.

Seeds are fixed: a new demo of the same code differs in times alone.
"""

import io
import lzma
import tarfile
import tempfile
from collections.abc import Mapping
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline.files import artifact
from pipeline.project.new_project import create
from pipeline.project.params import edit
from pipeline.project.runner import run
from pipeline.project.stage_graph import Project
from pipeline.stages.registry import GRAPH, open_project
from tui.services.projects.demo import ARCHIVE, TRAINED

METHODS = ("full", "freeze", "lora", "prefix", "prompt", "scratch", "sweep")
OLD, NEW = ["die katze sitzt auf dem", "der hund"], ["der wind", "die suppe kocht auf dem"]
SAMPLES = {"prompts": [*OLD, *NEW], "every": 50, "max_tokens": 8}
VALUES: Mapping[str, Any] = {
    "training.samples": SAMPLES,
    "pretrain.samples": {**SAMPLES, "prompts": OLD},  # it does not know the new words
    # less to download; it learns the same sentences, and at 24 LoRA learns one fewer
    "pretrain.d_model": 32,
    "pretrain.feed_forward": 128,
    "finetune_lora.train_embeddings": "new_rows",
    "finetune_sweep.grid": {"rank": [1, 2, 4, 8], "learning_rate": [1e-3, 4e-3]},
    "finetune_sweep.old_data": "data/pretrain.de.txt",
    # LoRA keeps it, full fine-tuning does not
    "evaluate.limits": {"answers_kept": 0.7, "variants": ["full", "lora"]},
}
# caches, locks, the tokens as a run reads them
LEFT_OUT = {".lora-cache", "tmp", "cache", "lock", "tokens"}
README = """\
# The demo of the LoRA workbench

A language model of {parameters:,} parameters that knows 22 German sentences, and what several methods make of 8 new
ones. Everything here was computed by the stages of dvc.yaml, with version {version} of the program on {date}.

`lora-tui --demo` opens it. R runs the pipeline again, which takes about a minute; edit params.yaml before, if you like.
The evaluation has a limit (evaluate.limits) that LoRA keeps and full fine-tuning breaks: so its gate says "failed".

In each manifest.json "{trained}" says with which code and library versions the artifact was made. "code" and "versions"
were set to those of the program that unpacked the demo, so that its stages count as up to date. A demo that lacks a
file, or in which one of these artifacts was changed, is unpacked again; what you made anew stays until then.
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        project = build(Path(folder) / "demo")
        ARCHIVE.write_bytes(pack(project))
    print(f"{ARCHIVE}: {ARCHIVE.stat().st_size:,} bytes")


def build(root: Path) -> Project:
    """The project in `root`, with all of its stages run."""
    create(root, GRAPH, methods=METHODS)
    edit.save(root / "params.yaml", VALUES, GRAPH.sections)
    (root / "dvc.yaml").unlink()
    create(root, GRAPH)  # renders dvc.yaml for these values
    project = open_project(root / "params.yaml")
    for stage in project.stages.values():
        for _ in run(project, stage):
            pass
        print(f"{stage.name}: done", flush=True)
    made = {"version": version("lora-workbench"), "date": date.today().isoformat()}
    for stage in project.stages.values():
        folder = project.artifact(stage.name)
        manifest = artifact.read_manifest(folder)
        earlier = {key: manifest[key] for key in ("code", "versions")}
        artifact.write_json(folder / artifact.MANIFEST, {**manifest, TRAINED: {**made, **earlier}})
    total = artifact.read_manifest(project.artifact("finetune_full"))["parameters"]["total"]
    text = README.format(parameters=total, trained=TRAINED, **made)
    (root / "README.md").write_text(text, encoding="utf-8")
    return project


def pack(project: Project) -> bytes:
    """The project's files without caches, as a .tar.xz; the same bytes for the same files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for path in sorted(project.root.rglob("*")):
            name = path.relative_to(project.root)
            if path.is_file() and not LEFT_OUT & {*name.parts}:
                member = tarfile.TarInfo(name.as_posix())
                member.size = path.stat().st_size
                archive.addfile(member, io.BytesIO(path.read_bytes()))
    return lzma.compress(buffer.getvalue(), preset=9 | lzma.PRESET_EXTREME)


if __name__ == "__main__":
    main()
