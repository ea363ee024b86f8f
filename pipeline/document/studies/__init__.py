"""The document's studies. A study is one file here, found by its name: nothing else lists it.

The file holds its section of params.yaml, its declaration STUDY, and `measure(job, settings)`, which trains, and gives
tables, words and a picture. Nothing heavy is imported before `measure` runs: every command reads the declarations.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from pipeline.project.stage_graph import Stage

PREFIX = "study_"


@dataclass(frozen=True)
class Study:
    """`place`: the document's sections that it measures, such as "§7, §9.3". `about`: its line in `lora study`.

    `settings`: the class of its section. The others are as in `Stage`; most studies measure statements about MiniGPT.
    """

    title: str
    place: str
    about: str
    settings: type
    data: tuple[str, ...]
    needs: tuple[str, ...] = ("pretrain", "expand_vocab")
    extra_sections: tuple[str, ...] = ()
    minigpt_only: bool = True

    @property
    def order(self) -> list[int]:
        """For the document's order: the numbers of the first section."""
        return [int(number) for number in self.place.partition(",")[0].removeprefix("§").split(".")]


def names() -> list[str]:
    """Of every study, found without reading it."""
    return [module.name for module in iter_modules(__path__)]


def studies() -> Mapping[str, Study]:
    """Name → study, in the document's order."""
    found: dict[str, Study] = {name: import_module(f"{__name__}.{name}").STUDY for name in names()}
    return dict(sorted(found.items(), key=lambda item: item[1].order))


def stage_of(stage: str) -> Stage:
    """The node study_NAME in the stage graph. Its module is its own file, so it does not depend on other studies.

    Raises KeyError.
    """
    name = stage.removeprefix(PREFIX)
    if stage == name or name not in names():
        raise KeyError(stage)
    module, output = f"{__name__}.{name}", f"studies/{name}"
    study: Study = import_module(module).STUDY
    options: dict[str, Any] = {"extra_sections": study.extra_sections, "minigpt_only": study.minigpt_only}
    return Stage(stage, module, output, "study", name, study.needs, study.data, **options)
