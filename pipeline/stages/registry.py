"""The product's stages. Those of fine-tuning methods are found: each file of `pipeline/stages/methods/` has `STAGE`.

From a stage come the command, its DVC stage, its section of params.yaml and the form for it, its model's name among the
compared ones, its row and color in reports.

Reading the registry imports no torch: `lora --help`, the calculator and the terminal UI read it at start, and to import
torch alone takes ten times as long.
"""

import pkgutil
from collections.abc import Mapping
from importlib import import_module

from pipeline.adapters.config import OTHER_KINDS
from pipeline.calc.method import FinetuningMethod
from pipeline.project.params.sections import Evaluate, ExpandVocab, Import, Merge, Pretrain
from pipeline.project.stage_graph import Stage, StageGraph
from pipeline.stages import methods

# Found, so that a new method is one file; and not by import statements, which digests follow: whatever imports this
# module would depend on the code of every method. A stage's own digest starts at its method's file (`Stage.code`).
_FILES = sorted(
    (import_module(f"{methods.__name__}.{module.name}") for module in pkgutil.iter_modules(methods.__path__)),
    key=lambda file: float(file.STAGE.order),
)
METHODS: Mapping[str, Stage] = {file.STAGE.method: file.STAGE for file in _FILES}
COUNTED: Mapping[str, FinetuningMethod] = {  # as the calculator counts them, with default options
    file.STAGE.method: file.COUNTED for file in _FILES if hasattr(file, "COUNTED")
}
# the adapters' package lies below and cannot import a method: it is told which module loads a kind of adapter
OTHER_KINDS.update({stage.peft_type: stage.module for stage in METHODS.values() if stage.peft_type})
MERGE = Stage(
    "merge",
    "pipeline.stages.merge",
    output="lora_merged",
    kind="checkpoint",
    method="merge",
    settings=Merge,
    needs=("expand_vocab", "finetune_lora"),
    data=("prompts",),
    summary="Merge the adapter into its base",
    title="LoRA, merged",
    variant="merged",
    order=METHODS["lora"].order + 0.5,
)
MODELS = (
    Stage(
        "import",
        "pipeline.stages.import_base",
        output="base",
        kind="checkpoint",
        method="import",
        settings=Import,
        summary="Import the base model",
        title="Base",
        variant="base",
    ),
    Stage(
        "pretrain",
        "pipeline.stages.pretrain",
        output="base",
        kind="checkpoint",
        method="pretrain",
        settings=Pretrain,
        data=("data", "eval_data"),
        summary="Train MiniGPT from scratch",
        title="Base",
        variant="base",
    ),
    Stage(
        "expand_vocab",
        "pipeline.stages.expand_vocab",
        output="expanded",
        kind="checkpoint",
        method="expand_vocab",
        settings=ExpandVocab,
        needs=("pretrain",),
        data=("data", "audit_data"),
        summary="Add rows for new words",
        title="Expanded base",
        variant="expanded",
    ),
    *sorted((*METHODS.values(), MERGE), key=lambda stage: stage.order),
)
EVALUATE = Stage(
    "evaluate",
    "pipeline.stages.evaluate",
    output="evaluation",
    kind="evaluation",
    method="evaluate",
    settings=Evaluate,
    needs=tuple(stage.name for stage in MODELS if stage.variant),
    data=("old_data", "new_data", "prompts", "tasks"),
    compares=True,
    loads=tuple(stage.module for stage in METHODS.values() if stage.kind == "adapter"),
    summary="Compare all variants",
)
COLORS: Mapping[str, str] = {name: stage.look.color for name, stage in METHODS.items() if stage.look}
STAGES: Mapping[str, Stage] = {stage.name: stage for stage in (*MODELS, EVALUATE)}
GRAPH = StageGraph(STAGES)
