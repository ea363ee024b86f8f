"""Seconds of an epoch of LoRA by TRL's SFTTrainer, on transformers' model or Unsloth's.

It runs as a program: Unsloth replaces parts of transformers and TRL, so it must be imported first,
and not where others are measured.
"""

import json
import sys
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any


def main(library: str, file: Path) -> None:
    """Print how it trains, and the seconds of the second epoch of the case in `file`."""
    given = json.loads(file.read_text(encoding="utf-8"))
    made = _of_unsloth(given, file.parent) if library == "unsloth" else _of_transformers(given)
    how, seconds = _train(given, *made, file.parent)
    print(json.dumps([how, seconds]))


def _of_unsloth(given: Mapping[str, Any], folder: Path) -> tuple[Any, Any]:
    unsloth: Any = import_module("unsloth")
    base = folder / "base"
    model, _ = _of_transformers(given)
    model.save_pretrained(base)
    _tokenizer().save_pretrained(base)
    model, _ = unsloth.FastLanguageModel.from_pretrained(
        str(base), max_seq_length=given["longest"], dtype=None, load_in_4bit=False
    )
    model = unsloth.FastLanguageModel.get_peft_model(
        model,
        r=given["rank"],
        lora_alpha=2 * given["rank"],
        target_modules=given["targets"],
        use_gradient_checkpointing=False,
    )
    return model, None


def _of_transformers(given: Mapping[str, Any]) -> tuple[Any, Any]:
    import torch
    from peft import LoraConfig
    from transformers import AutoConfig, AutoModelForCausalLM

    attention = "flash_attention_2" if _has_flash() else "sdpa"
    config = AutoConfig.for_model(**given["config"])
    with torch.device(given["device"]):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation=attention
        )
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=given["rank"],
        lora_alpha=2 * given["rank"],
        target_modules=given["targets"],
    )
    return model, lora


def _has_flash() -> bool:
    return find_spec("flash_attn") is not None


def _tokenizer() -> Any:
    """A tokenizer, which the trainer demands; the examples are ids."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "<end>": 1}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", eos_token="<end>", pad_token="<end>"
    )


def _train(given: Mapping[str, Any], model: Any, lora: Any, folder: Path) -> tuple[str, float]:
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    on_gpu, liger = given["device"] != "cpu", find_spec("liger_kernel") is not None
    packs = _has_flash()  # without it TRL's packed sequences see each other
    ends = list[float]()

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_epoch_end(self, *_: object, **__: object) -> None:
            if on_gpu:
                torch.cuda.synchronize()
            ends.append(perf_counter())

    config = SFTConfig(
        output_dir=str(folder / "unused"),
        num_train_epochs=2,
        # rows of `longest`
        per_device_train_batch_size=max(1, given["batch"] // 4) if packs else given["batch"],
        max_length=given["longest"],
        packing=packs,
        gradient_checkpointing=False,
        bf16=on_gpu,
        use_cpu=not on_gpu,
        use_liger_kernel=on_gpu and liger and lora is not None,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    rows = [{"input_ids": ids, "labels": labels} for ids, labels in given["examples"]]
    more = {"processing_class": _tokenizer(), "callbacks": [Clock()], "peft_config": lora}
    SFTTrainer(model, config, train_dataset=Dataset.from_list(rows), **more).train()
    how = "packed, with flash attention" if packs else "padded, as flash-attn is not installed"
    return how, ends[1] - ends[0]


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
