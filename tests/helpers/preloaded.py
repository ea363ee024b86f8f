"""What the fork server of `tests.helpers.process` has done before it forks, so that no child does
it again.
"""

import gc
from importlib import import_module

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from pipeline.project import provenance
from pipeline.stages.registry import GRAPH

for name in (
    "cli.main",
    "cli.console",
    "cli.stages",
    "matplotlib.figure",
    "rich.progress",
    "pipeline.stages.pretrain",
    "pipeline.stages.finetune",
    "pipeline.stages.methods.sweep",
    "pipeline.calc.sources.open_model",
    "pipeline.data.browse_server",
    "pipeline.data.check",
    "pipeline.data.tokenizers.subword",
    "pipeline.data.turns",
    "pipeline.inference.server",
    "pipeline.models.transformers_model",
    "pipeline.training.retention",
    # What a child would else import when it opens a base of transformers: three seconds each time.
    "accelerate",
    "torch.distributed.fsdp",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
):
    import_module(name)

# `_imports` is cached by content: half of what a short run takes
for stage in GRAPH.stages.values():
    provenance.code_files(*stage.code)
get_checkpoint_conversion_mapping("llama")  # a thousand regular expressions
gc.collect()
gc.freeze()  # children neither look through what was imported nor copy its pages
