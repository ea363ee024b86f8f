"""8. Practice: Saving and Loading LoRA Adapters."""

from lab.claims import Chapter, Result, about
from lab.claims.sources import calc, n

chapter = Chapter()


with chapter.section("8") as claim:

    @claim("base model (downloaded once): 16 GB", about("16 GB", "5%"))
    def base_16_gb() -> Result:
        return calc(precision="bf16").memory.weights, "Qwen3-8B in 16 bits"

    @claim("a LoRA adapter: 35 MB", about("35 MB", "10%"))
    def adapter_35_mb() -> Result:
        lora, rank = calc(rank=8), 35e6 / 2 / calc(rank=1).parameters.trainable
        return {
            "r=8 in FP16": lora.adapter_bytes.fp16,
            "r=8 in FP32": lora.adapter_bytes.fp32,
            "r=16 in FP16": calc(rank=16).adapter_bytes.fp16,
        }, (
            f"Qwen3-8B, {n(lora.parameters.trainable)} parameters at the rank of §3, where the "
            f"same adapter has 18 MB; in FP16 35 MB would be a rank of {n(rank)}"
        )
