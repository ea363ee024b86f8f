"""What was made from files that have changed since, and the commands that renew it."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.project.stage_graph import Project

MOST = 3  # commands that are named one by one


def outdated(project: "Project", names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """`status.outdated`, by digests that are kept: this is for people to look at."""
    from pipeline.files.digest_cache import DigestStore
    from pipeline.project import status

    store = DigestStore()
    found = status.outdated(project, names, store.digest)
    store.save()
    return found


def warn(subject: str, reasons: Sequence[str], stages: Mapping[str, object]) -> None:
    """One line on stderr: what is out of date, why, and how it is made again from the first of `stages` on."""
    from cli.console import stderr
    from pipeline.project.dvc_yaml import command
    from pipeline.project.stage_graph import STAGES

    commands = [f"`{command(STAGES[name])}`" for name in stages]
    again = ", then ".join(commands) if len(commands) <= MOST else "`dvc repro`"
    stderr.print(f"{subject} out of date: {', '.join(reasons)}. Run {again}.", markup=False, soft_wrap=True)
