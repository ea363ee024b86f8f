"""What the calculator says of the run that is about to start."""

from pipeline.calc.families import architecture
from pipeline.calc.memory import predict
from pipeline.calc.settings import Method, Run
from pipeline.models.minigpt import MiniGPTConfig
from pipeline.training.batches import Batches


def forecast(config: MiniGPTConfig, method: Method, batches: Batches) -> int:
    """Bytes of tensors at the peak of a step on a full batch."""
    run = Run(batch=batches.size, sequence=batches.length, precision="fp32", checkpointing="none")
    return predict(architecture(config.to_opt(), "the model"), method, run).peak
