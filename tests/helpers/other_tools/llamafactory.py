# /// script
# dependencies = ["llamafactory==0.9.5"]
# ///
"""Trains an adapter as `llamafactory-cli train` does: `llamafactory.py BASE FOLDER`."""

import json
import sys
import tempfile
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path

# Imported for sound alone, and PyPI's does not load beside a PyTorch for CPUs.
sys.modules["torchaudio"] = module_from_spec(ModuleSpec("torchaudio", None))

from llamafactory.train.tuner import run_exp  # noqa: E402

base, folder = sys.argv[1:]
rows = [{"instruction": "The currency of Bulgaria?", "input": "", "output": "The euro."}]
with tempfile.TemporaryDirectory() as name:
    data = Path(name)
    (data / "toy.json").write_text(json.dumps(rows * 8))
    (data / "dataset_info.json").write_text(json.dumps({"toy": {"file_name": "toy.json"}}))
    run_exp(
        {
            "model_name_or_path": base,
            "output_dir": folder,
            "dataset_dir": name,
            "dataset": "toy",
            "template": "llama3",
            "stage": "sft",
            "do_train": True,
            "finetuning_type": "lora",
            "lora_rank": 4,
            "lora_target": "all",
            "max_steps": 3,
            "learning_rate": 0.1,
            "cutoff_len": 32,
            "report_to": "none",
            "use_cpu": True,
        }
    )
