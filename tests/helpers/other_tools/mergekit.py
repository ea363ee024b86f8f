# /// script
# dependencies = ["mergekit==0.1.5"]
# ///
"""Merges a checkpoint with a changed copy of it by TIES, as mergekit-yaml: `mergekit.py BASE FOLDER`."""

import sys
import tempfile

import torch
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge
from transformers import AutoModelForCausalLM, AutoTokenizer

base, folder = sys.argv[1:]
with tempfile.TemporaryDirectory() as tuned:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 20)
    model.save_pretrained(tuned)
    AutoTokenizer.from_pretrained(base).save_pretrained(tuned)
    recipe = {
        "merge_method": "ties",
        "base_model": base,
        "models": [{"model": tuned, "parameters": {"weight": 1.0, "density": 0.5}}],
        "dtype": "float32",
    }
    run_merge(MergeConfiguration(**recipe), folder, MergeOptions(copy_tokenizer=True))
