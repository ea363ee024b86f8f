"""Write each stage's deps into dvc.yaml: its inputs and the modules it imports, which DVC cannot see. `make deps`."""

import re

from pipeline.dag import STAGES, Project
from pipeline.params import load
from pipeline.provenance import code_files
from tests.support import ROOT


def deps(name: str) -> list[str]:
    """What DVC must watch for a stage: the data files that params.yaml names, other stages' outputs, code."""
    stage, project = STAGES[name], Project(ROOT, load(ROOT / "params.yaml"))
    data = []
    for key in stage.data:
        value = getattr(project.section(stage), key)
        places = [key] if isinstance(value, str) else [f"{key}[{i}]" for i in range(len(value))]
        data += [f"${{{name}.{place}}}" for place in places]
    code = [path.relative_to(ROOT).as_posix() for path in code_files(stage.module)]
    return [*data, *(STAGES[need].path for need in stage.needs), *code]


def main() -> None:
    path = ROOT / "dvc.yaml"
    text = path.read_text(encoding="utf-8")
    for name in STAGES:
        block = "".join(f"      - {dep}\n" for dep in deps(name))
        text = re.sub(rf"(\n  {name}:\n(?:    .*\n)*?    deps:\n)(?:      - .*\n)*", rf"\g<1>{block}", text)
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
