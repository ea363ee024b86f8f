"""Unsloth's side of bench/gpu.py, a program of its own: importing Unsloth changes transformers,
PEFT and TRL, so it comes before them.

Written from Unsloth's documentation, and never run with it; a test runs it with a stand-in.
"""

import sys
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.stages.gpu_checks.lora_run import Case


class Unsloth:
    """LoRA by its FastLanguageModel and TRL's SFTTrainer, which Unsloth replaces."""

    def __init__(self, library: Any, case: "Case", folder: Path) -> None:
        import torch

        from bench.gpu import training_options
        from bench.peers import sft_trainer
        from pipeline.stages.gpu_checks.lora_run import RANK, TARGETS

        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model, _ = library.FastLanguageModel.from_pretrained(
            model_name=str(folder),
            max_seq_length=case.longest,
            dtype=torch.bfloat16,
            load_in_4bit=case.quantization != "none",
        )
        model = library.FastLanguageModel.get_peft_model(
            model,
            r=RANK,
            lora_alpha=2 * RANK,
            target_modules=list(TARGETS),
            lora_dropout=0,
            bias="none",
            use_gradient_checkpointing="unsloth" if case.checkpointing else False,
        )
        options = training_options(case, self.device) | {"use_liger_kernel": False}
        self.trainer = sft_trainer(model, case.examples(), options)

    def epoch(self) -> float:
        from bench.real_sides import seconds_of
        from pipeline.stages.gpu_checks.lora_run import synchronize

        return seconds_of(self.trainer, lambda: synchronize(self.device))

    def peak(self) -> int:
        import torch

        torch.cuda.reset_peak_memory_stats(self.device)
        self.epoch()
        return torch.cuda.max_memory_allocated(self.device)


def main(descriptor: str, folder: str) -> None:
    library = import_module("unsloth")
    from functools import partial

    import torch

    from bench.real_sides import serve

    pipe = Connection(int(descriptor))
    case = pipe.recv()
    serve(pipe, partial(Unsloth, library, case), Path(folder), torch.get_num_threads())


if __name__ == "__main__":
    main(*sys.argv[1:])
