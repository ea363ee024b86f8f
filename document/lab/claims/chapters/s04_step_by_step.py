"""4. Step by Step: What Happens Mathematically?"""

from lab.claims import Chapter, Result, about
from lab.claims.sources import Sources, calc, n

chapter = Chapter()
# of a loss in fp32: with an adapter a block is computed in one call, which adds in another order
ROUNDING = 2**-22


with chapter.section("4") as claim:

    @claim("B = 0: the model therefore behaves identically to the original at first", True)
    def starts_identical(m: Sources) -> Result:
        lora, full = (
            m.steps("lora_adapter/loss.csv")[0].loss,
            m.steps("full_finetuned/loss.csv")[0].loss,
        )
        why = (
            f"loss of the same first batch before any step, {n(lora)} nats with the adapter and "
            f"{n(full)} without"
        )
        return abs(lora - full) <= ROUNDING * full, why

    @claim("only A and B receive gradient updates", 4096)
    def only_a_and_b(m: Sources) -> Result:
        shipped = m.artifact("lora_adapter/manifest.json").parameters.trainable
        without_ends = calc("minigpt", rank=4, embeddings="none").parameters.trainable
        why = f"§9.2 trains embeddings and head as well, which makes {n(shipped)} parameters"
        return {"as §4 has it": without_ends, "as §9.2 trains": shipped}, why

    @claim("∂L/∂B = (α/r) · ∂L/∂h · (Ax)ᵀ, ∂L/∂A = (α/r) · Bᵀ · ∂L/∂h · xᵀ", about(0, 0.00001))
    def gradient_formulas(m: Sources) -> Result:
        of_a, of_b = (
            m.column("figures/gradient_example_formulas", name) for name in ("error_A", "error_B")
        )
        return {"∂L/∂B": max(of_b), "∂L/∂A": max(of_a)}, (
            f"relative distance from autograd's gradient, the worst of the {len(of_a)} adapted "
            "matrices of the trained adapter"
        )

    @claim(
        "W' = W₀ + (α/r) BA: the LoRA weights can be merged into the original weight matrix",
        about("1 ×", 0.001),
    )
    def merge_identity(m: Sources) -> Result:
        proof = m.artifact("lora_merged/certificate.json")
        ratios = list(proof.delta_ratios.values())
        return {
            "the matrix that got least": min(ratios),
            "the matrix that got most": max(ratios),
        }, (
            f"how often W' − W₀ holds its (α/r) BA, by the two files, the {len(ratios)} adapted "
            f"matrices each; logits after {n(proof.prompts_checked)} prompts differ by "
            f"{n(proof.max_logit_difference)} at most"
        )

    @claim("afterward, the model is a completely normal model without LoRA overhead", True)
    def merged_is_normal(m: Sources) -> Result:
        merged, base = m.size("lora_merged/model.safetensors"), m.size("expanded/model.safetensors")
        return merged == base, f"the merged weights take {n(merged)} bytes, the base's {n(base)}"
