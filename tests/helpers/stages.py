"""The stages of the project of the tests, with an extension's that measure."""

from pipeline.project.params.schema import Section
from pipeline.project.stage_graph import Stage
from tests.helpers.projects import PIPELINE, STAGES

PROBES = {  # two of a group, and one that reads both
    f"probe_{name}": Stage(
        f"probe_{name}", "", f"probes/{name}", "probe", name, Section, needs=("expand_vocab",)
    )
    for name in ("norm", "size")
}
READER = Stage(
    "overview",
    "",
    "overview",
    "overview",
    "overview",
    Section,
    needs=("finetune_sweep", "evaluate", *PROBES),
)
SHOWN = {name: STAGES[name] for name in PIPELINE} | PROBES | {"overview": READER}
NEEDS = {name: [need for need in stage.needs if need in SHOWN] for name, stage in SHOWN.items()}
