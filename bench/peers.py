"""PEFT's training without padding, which is its best on a CPU: by transformers' Trainer, and by
TRL's SFTTrainer.

SDPA tells the sequences of a row apart by their positions, and the loss is that of one by one. With
SmolLM2-135M on a CPU all else took longer or did not run (docs/benchmarks.md has the figures):
batches grouped by length, SFTTrainer's packing, a worker for data, eager attention; FlexAttention
has no backward on a CPU, Liger's kernels need a GPU.
"""

from collections.abc import Callable, Sequence
from typing import Any

from typing_extensions import override

from bench.real_sides import ARGUMENTS, BATCH, Example, Theirs


class PaddingFree(Theirs):
    """PEFT and Trainer with transformers' collator that lays a batch's sequences end to end."""

    @override
    def collator(self) -> Callable[..., Any]:
        from transformers import DataCollatorWithFlattening

        collate: Callable[..., Any] = DataCollatorWithFlattening()
        return collate


class TrlPaddingFree(Theirs):
    """SFTTrainer, whose head computes the logits of every position on a CPU."""

    @override
    def add_adapter(self, model: Any) -> Any:
        model = super().add_adapter(model)
        options = {**ARGUMENTS, "per_device_train_batch_size": BATCH}
        self.sft = sft_trainer(model, self.train, options)
        return model

    @override
    def trainer(self) -> Any:
        return self.sft


def sft_trainer(model: Any, examples: Sequence[Example], options: dict[str, Any]) -> Any:
    """TRL's SFTTrainer on batches of examples laid end to end. `options` are of its SFTConfig."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(
        **{"gradient_checkpointing": False, "padding_free": True, "max_length": None, **options}
    )
    rows = [{"input_ids": ids, "labels": labels} for ids, labels in examples]
    data, tokenizer = Dataset.from_list(rows), unused_tokenizer()
    return SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer)


def unused_tokenizer() -> Any:
    """TRL's trainers ask for one, also for examples that are tokens already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel())
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="0")
