"""Write each stage's deps into dvc.yaml: its inputs and the modules it imports, which DVC cannot see. `make deps`."""

import re

from pipeline.dag import STAGES, Project
from pipeline.params import load
from pipeline.provenance import code_files
from tests.support import ROOT


def deps(name: str) -> list[str]:
    """What DVC must watch for a stage: data, other stages' outputs, code."""
    stage, project = STAGES[name], Project(ROOT, load(ROOT / "params.yaml"))
    paths = [*project.inputs(stage).values(), *code_files(stage.module)]
    return [path.relative_to(ROOT).as_posix() for path in paths]


def main() -> None:
    path = ROOT / "dvc.yaml"
    text = path.read_text(encoding="utf-8")
    for name in STAGES:
        block = "".join(f"      - {dep}\n" for dep in deps(name))
        text = re.sub(rf"(\n  {name}:\n(?:    .*\n)*?    deps:\n)(?:      - .*\n)*", rf"\g<1>{block}", text)
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
