"""The demo `minigpt`: a small finished project whose pipeline runs in a minute."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from docs.demo.archive import finish, made, run_stages
from pipeline.files import artifact
from pipeline.project.new_project import create
from pipeline.project.params import edit
from pipeline.project.stage_graph import Project
from pipeline.stages.registry import GRAPH, open_project
from tui.services.projects.demo import TRAINED

METHODS = ("full", "freeze", "lora", "prefix", "prompt", "sweep")
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
README = """\
# The MiniGPT demo of the LoRA workbench

A language model of {parameters:,} parameters that knows 22 German sentences, and what several methods make of 8 new
ones. Everything here was computed by the stages of dvc.yaml, with version {version} of the program on {date}.

`lora-tui --demo minigpt` opens it. R runs the pipeline again, which takes about a minute; edit params.yaml before, if
you like. The evaluation has a limit (evaluate.limits) that LoRA keeps and full fine-tuning breaks: so its gate says
"failed".

In each manifest.json "{trained}" says with which code and library versions the artifact was made. "code" and "versions"
were set to those of the program that unpacked the demo, so that its stages count as up to date. A demo that lacks a
file, or in which one of these artifacts was changed, is unpacked again; what you made anew stays until then.
"""


def build(root: Path) -> Project:
    """The project in `root`, with all of its stages run."""
    create(root, GRAPH, methods=METHODS)
    edit.save(root / "params.yaml", VALUES, GRAPH.sections)
    (root / "dvc.yaml").unlink()
    create(root, GRAPH)  # renders dvc.yaml for these values
    project = open_project(root / "params.yaml")
    run_stages(project)
    finish(project)
    total = artifact.read_manifest(project.artifact("finetune_full"))["parameters"]["total"]
    text = README.format(parameters=total, trained=TRAINED, **made())
    (root / "README.md").write_text(text, encoding="utf-8")
    return project
