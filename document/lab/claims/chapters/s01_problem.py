"""Introduction; 1. The Problem."""

from typing import Any

from lab.claims import Chapter, Result, about, at_least, less_than, more_than
from lab.claims.sources import GB, MB, Sources, calc, model, n, percent, times
from pipeline.calc.settings import precision

chapter = Chapter()


with chapter.section("Introduction") as claim:

    @claim("d_model = 64", 64)
    def width(m: Sources) -> Result:
        measured = m.artifact("base/config.json").hidden_size
        return measured, f"the config of the trained base has {n(measured)} columns"

    @claim("2 layers", 2)
    def layers(m: Sources) -> Result:
        measured = m.artifact("base/config.json").num_hidden_layers
        return measured, f"the config of the trained base has {n(measured)} blocks"

    @claim("4 attention heads", 4)
    def heads(m: Sources) -> Result:
        measured = m.artifact("base/config.json").num_attention_heads
        return measured, f"the config of the trained base has {n(measured)} heads"

    @claim("its architecture is structurally identical to production-scale models", True)
    def same_architecture(m: Sources) -> Result:
        kind, qwen = m.artifact("base/config.json").model_type, model("qwen3-8b")
        return {"GPT-3's kind": kind == "opt", "Qwen3-8B": qwen.kv_heads == qwen.heads}, (
            f"MiniGPT is saved as {kind}, weight for weight; Qwen3-8B has {qwen.kv_heads} heads of "
            f"keys and values to {qwen.heads} of queries, and RMSNorm, rotary positions and a "
            "gated feed-forward besides"
        )


with chapter.section("1") as claim:

    @claim("Qwen3-8B with 8 billion parameters", about("8 billion", "5%"))
    def qwen_parameters() -> Result:
        return model(
            "qwen3-8b"
        ).total, f"the shapes of its config give {n(model('qwen3-8b').total)}"

    @claim(
        "Full Fine-Tuning is orders of magnitude cheaper than training from scratch",
        at_least("100 ×"),
        words="orders",
    )
    def cheaper_than_scratch(m: Sources) -> Result:
        scratch, full = (
            len(m.steps("from_scratch/loss.csv")),
            len(m.steps("full_finetuned/loss.csv")),
        )
        return scratch / full, (
            f"{n(scratch)} steps to learn MiniGPT's old and new sentences from random weights, "
            f"{n(full)} to add the new ones, on 22 and 8 sentences"
        )

    @claim("in half-precision, each parameter occupies 2 bytes", "2 B")
    def half_precision_bytes() -> Result:
        return {
            "FP16": precision("fp16").bytes,
            "BF16": precision("bf16").bytes,
        }, "16 bits are 2 bytes"

    @claim("it halves the memory footprint compared to FP32", "2 ×")
    def half_of_fp32() -> Result:
        fp32, bf16 = (calc(precision=name).memory.weights for name in ("fp32", "bf16"))
        return fp32 / bf16, "the weights of Qwen3-8B in FP32, to those in BF16"

    @claim("with negligible quality loss", less_than("1%"), words="negligible")
    def half_precision_quality(m: Sources) -> Result:
        full, fp16, bf16 = m.rows("quantization/precisions", precision=("FP32", "FP16", "BF16"))
        why = (
            f"by how much MiniGPT's perplexity rises; {percent(bf16.kept)} of its first choices "
            "stay in BF16"
        )
        return {
            name: row.perplexity / full.perplexity - 1
            for name, row in (("FP16", fp16), ("BF16", bf16))
        }, why

    @claim("loading Qwen3-8B alone requires 16 GB", about("16 GB", "5%"))
    def weights_16_gb() -> Result:
        return calc(
            precision="bf16"
        ).memory.weights, f"{n(model('qwen3-8b').total)} parameters of 2 bytes"

    @claim(">16 GB GPU RAM just to hold the model", more_than("16 GB"))
    def more_than_16_gb() -> Result:
        run = calc(precision="bf16", sequence=2048).inference
        why = (
            f"weights, {MB(run.kv_cache)} of keys and values for 2,048 tokens, {MB(run.overhead)} "
            "of CUDA context"
        )
        return run.total, why

    @claim(
        "one gradient per parameter doubles the memory footprint to ~32 GB", about("32 GB", "5%")
    )
    def gradients_32_gb() -> Result:
        step = calc(method="full", precision="bf16").memory
        return step.weights + step.gradients, "weights and their gradients, both of 2 bytes"

    @claim("Adam maintains two additional running averages per parameter", 2)
    def adam_two_averages() -> Result:
        step = calc(method="full", precision="fp32", optimizer="adamw").memory
        return (
            step.optimizer / step.weights,
            "the optimizer's state in FP32, to the weights in FP32",
        )

    def full_step(trainer: str, optimizer: str = "adamw") -> tuple[Any, int]:
        """The memory of a step of full fine-tuning in BF16, and what weights, gradients and
        averages take together.
        """
        step = calc(method="full", precision="bf16", trainer=trainer, optimizer=optimizer).memory
        return step, step.weights + step.gradients + step.optimizer

    @claim(
        "together with the weights and gradients, this amounts to roughly 3× the model size",
        about("3 ×", "10%"),
    )
    def adam_3_times() -> Result:
        bf16, fp32, eight = (
            held / step.weights
            for step, held in (
                full_step("torch"),
                full_step("torch-fp32"),
                full_step("torch", "adamw-8bit"),
            )
        )
        return {"averages in BF16": bf16, "averages in FP32": fp32}, (
            "weight, gradient and two averages are four numbers a parameter; with averages in 8 "
            f"bits, of which the document does not speak, it would be {times(eight)}"
        )

    @claim("3 × 16 GB ≈ 48 GB", about("48 GB", "10%"))
    def adam_48_gb() -> Result:
        (step, bf16), (exact, fp32) = full_step("torch"), full_step("torch-fp32")
        return {"averages in BF16": bf16, "averages in FP32": fp32}, (
            f"weights {GB(step.weights)}, gradients {GB(step.gradients)}, averages "
            f"{GB(step.optimizer)}, in FP32 {GB(exact.optimizer)}"
        )
