"""`lora fleet emit`: units as files for schedulers that `lora` does not call."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from pipeline.errors import UserError
from pipeline.files.artifact import write_file
from pipeline.fleet.formats import FORMATS, MARK, Batch, Format
from pipeline.fleet.plan import divided
from pipeline.fleet.settings import Cluster
from pipeline.fleet.stages import StageRun
from pipeline.fleet.sweeps import part
from pipeline.fleet.unit import Unit
from pipeline.project.cache import SHORT_KEY
from pipeline.project.runner import input_facts
from pipeline.stages.methods.sweep import WHOLE, Passes, entry_keys

HEAD = 200  # bytes of a file in which MARK is looked for


def find_format(name: str) -> Format:
    """The format of this name. Raises UserError."""
    if name not in FORMATS:
        raise UserError(f"{name} is not a format. There is {', '.join(FORMATS)}. Name one.")
    return FORMATS[name]


def read_options(name: str, given: Sequence[str]) -> dict[str, str]:
    """Those of --option KEY=VALUE. Raises UserError for one that the format does not have."""
    known, options = find_format(name), dict[str, str]()
    for text in given:
        key, equals, value = text.partition("=")
        if not key or not equals or not (known.any_option or key in known.options):
            listed = "; ".join(f"{key}: {text}" for key, text in known.options.items())
            listed = listed or "any option of the scheduler, such as partition=gpu"
            raise UserError(f"--option {text}: {name} takes KEY=VALUE. There is {listed}.")
        options[key] = value
    return options


def units_of(wanted: StageRun, most: int, parts: int | None, nodes: int) -> list[Unit]:
    """The units of a stage. `most`: of a pass of a sweep, without `parts`. Raises UserError."""
    project, stage = wanted.project, wanted.stage
    facts = input_facts(project, stage)  # what it needs is there
    if stage.kind != "adapters":
        return [wanted.unit(nodes)]
    if nodes > 1 or wanted.more:
        raise UserError("A sweep's unit runs on one device. Leave out --nnodes and --devices.")
    if stage.check:
        stage.check(project)
    passes = Passes(project)
    if passes.total > 1:  # a later pass depends on the one before
        if parts is not None and parts > 1:
            raise UserError(
                "finetune_sweep.search makes several passes, and files are made before the first "
                "has ended: they have one unit. Leave out --parts, or use --on."
            )
        return [wanted.unit(1)]
    adapters = passes.ask()
    if not entry_keys(project, facts, adapters):
        if parts is not None and parts > 1:
            raise UserError(WHOLE)
        return [wanted.unit(1)]
    names = list(adapters)
    pieces = divided(names, min(len(names), parts or most))
    return [part(project, wanted.overrides, piece) for piece in pieces]


def emit(
    name: str, units: Sequence[Unit], cluster: Cluster, options: Mapping[str, str], folder: Path
) -> tuple[list[Path], str]:
    """Write the files of a format into a folder, instead of those it wrote there before.

    Returns their paths and the shell's line that submits them. Raises UserError.
    """
    facts = json.dumps([asdict(unit) for unit in units], sort_keys=True)
    key = hashlib.sha256(facts.encode()).hexdigest()[:SHORT_KEY]
    used = find_format(name)
    batch = Batch(key, units, cluster, options, folder.absolute())
    files = used.files(batch)
    earlier = [path for path in folder.glob("*") if _is_ours(path)]
    for path in (folder / file for file in files):
        if path not in earlier and (path.exists() or path.is_symlink()):
            raise UserError(f"{path} was not made by `lora fleet emit`. Name another --out.")
    # one that stayed would be submitted too
    for path in earlier:
        path.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    for file, text in files.items():
        write_file(folder / file, text)
    return [folder / file for file in files], used.next_step(batch, folder)


def _is_ours(path: Path) -> bool:
    if path.is_symlink() or not path.is_file():
        return False
    with path.open("rb") as file:
        return MARK.encode() in file.read(HEAD)
