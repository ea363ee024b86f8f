"""What a step takes of this machine, tried on a small model for `lora doctor`."""

from collections.abc import Sequence

import torch

from pipeline.models.device import fast_precision
from pipeline.models.kernels import uses_cpu_kernels
from pipeline.models.load import DTYPES
from pipeline.models.transformers_model import from_config
from pipeline.project.probes import Finding, held, record

LLAMA = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
}


def try_kernels(device: torch.device) -> Sequence[Finding]:
    """What was tried on `device` and did not work."""
    with held() as findings:
        try:
            # before Ampere Triton compiles no bf16, and nothing of ours uses it
            dtype = DTYPES["fp16" if fast_precision(device) == "fp16" else "bf16"]
            model = from_config(LLAMA, dtype).eval()
            if uses_cpu_kernels(device):
                model.prepare_cpu_training()
            else:
                from pipeline.models.kernels.accelerator.loss import fuses_head
                from pipeline.models.kernels.accelerator.products import adds_in_fp32
                from pipeline.models.kernels.accelerator.weights import dequantizes_nf4

                model.prepare_for_accelerator(device)
                fuses_head(model.to(device))
                adds_in_fp32(device, dtype)
                dequantizes_nf4(device, dtype)
            _ = model.supports_packing  # reading it tries packed sequences
        except Exception as error:  # of a driver, or of a card without memory
            record(f"a small model on {device}", error, "nothing is computed there")
    return findings
