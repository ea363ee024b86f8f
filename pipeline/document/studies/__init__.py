"""The document's studies. A study is one file here, found by `document/stages.py`: nothing else
lists it.

The file holds its PLACE in the document, such as "§7, §9.3", its section of params.yaml, its STAGE,
and `measure(job, settings)`, which trains, and gives tables, words and a picture. Nothing heavy is
imported before it runs: every command reads the declarations.
"""

from pipeline.project.params.schema import Section
from pipeline.project.stage_graph import Stage
from pipeline.stages.registry import STAGES


def study_stage(
    module: str,
    title: str,
    about: str,
    settings: type[Section],
    data: tuple[str, ...],
    needs: tuple[str, ...] = ("pretrain", "expand_vocab"),
    extra_sections: tuple[str, ...] = (),
    minigpt_only: bool = True,
) -> Stage:
    """The node study_NAME in the stage graph: NAME is that of the study's file, `module`. `about`:
    its line in `lora study`. Most studies measure statements about MiniGPT.
    """
    name = module.rpartition(".")[2]
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
        minigpt_only=minigpt_only,
        work="pipeline.document.runner",
        # The stages that it runs: their modules are found by name, so no import shows them.
        loads=(
            "pipeline.stages.pretrain",
            *(STAGES[name].module for name in extra_sections if name in STAGES),
        ),
        summary=about,
        title=title,
    )
