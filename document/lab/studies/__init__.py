"""The document's studies. A study is one file here, and one line of `document/pyproject.toml`.

The file holds its PLACE in the document, such as "§7, §9.3", its section of params.yaml, its STAGE,
and `measure(job, settings)`, which trains, and gives tables, words and a picture. Nothing heavy is
imported before it runs: `lora study` reads the declarations.
"""

from pathlib import Path

from pipeline.project.params.load import Params
from pipeline.project.params.schema import Section
from pipeline.project.stage_graph import Stage
from pipeline.stages.registry import STAGES

DATA = str(Path(__file__).parents[2])  # the folder of `data/`
LAST = 100.0  # in the order of stages: behind all studies


def study_stage(
    module: str,
    place: str,
    title: str,
    about: str,
    settings: type[Section],
    data: tuple[str, ...],
    needs: tuple[str, ...] = ("pretrain", "expand_vocab"),
    extra_sections: tuple[str, ...] = (),
    minigpt_only: bool = True,
    quantizes: bool = False,
) -> Stage:
    """The node study_NAME in the stage graph: NAME is that of the study's file, `module`.

    `about`: its line in `lora study`. Most studies measure statements about MiniGPT. A study
    without a data file is left out of its project.
    """
    name = module.rpartition(".")[2]

    def skipped(params: Params) -> str:
        if not getattr(params.section(f"study_{name}"), "data", True):
            return f"study_{name}.data names no file. Name one in {params.file}."
        return off_minigpt(f"study_{name}", params) if minigpt_only else ""

    return Stage(
        f"study_{name}",
        module,  # its own file, so a study's digest does not depend on other studies
        f"studies/{name}",
        "study",
        name,
        settings,
        needs=needs,
        data=data,
        extra_sections=extra_sections,
        quantizes=quantizes,
        skipped=skipped,
        data_folder=DATA,
        work="lab.runner",
        # The stages that it runs: their modules are found by name, so no import shows them.
        loads=(
            "pipeline.stages.pretrain",
            *(STAGES[name].module for name in extra_sections if name in STAGES),
        ),
        summary=about,
        title=title,
        order=section_number(place),
        typed=f"study {name}",
    )


def section_number(place: str) -> float:
    """2.04 for "§2.4, §5": sorts by the document's first section."""
    chapter, _, section = place.partition(",")[0].removeprefix("§").partition(".")
    return int(chapter) + int(section or 0) / 100


def off_minigpt(stage: str, params: Params) -> str:
    """Why a stage that measures statements about MiniGPT has no place in a project; empty: it has."""
    if not params.origin.imports:
        return ""
    return f"{stage} measures what the document says of MiniGPT; base is {params.origin.base}."
