"""5. Hyperparameters."""

from lab.claims import Chapter, Result, at_least, at_most, between, more_than
from lab.claims.sources import Sources, calc, n

chapter = Chapter()


with chapter.section("5.1") as claim:

    @claim("rank 1: very limited expressiveness", True)
    def rank_1_limited(m: Sources) -> Result:
        one, full = m.row("rank/ranks", rank=1, alpha="r"), m.row("rank/ranks", alpha="full")
        return {
            "its loss is 0.05 nats above that of full fine-tuning": one.new_loss
            > full.new_loss + 0.05,
            "it learns fewer of the 8 sentences": one.new_done < full.new_done,
        }, (
            f"new loss {n(one.new_loss)} to {n(full.new_loss)}; "
            f"{n(one.new_done)} and {n(full.new_done)} sentences completed word for word"
        )

    @claim(
        "rule of thumb: start with r = 8, increase only if performance is insufficient",
        at_most(0.05),
        words="sufficient",
    )
    def start_with_8(m: Sources) -> Result:
        eight, best = (
            m.row("rank/ranks", rank=8, alpha="r"),
            m.row_of_least("rank/ranks", "new_loss", alpha="r"),
        )
        why = (
            f"new loss {n(eight.new_loss)} at r = 8, {n(best.new_loss)} at r = {best.rank}, the "
            "best that was tried"
        )
        return eight.new_loss - best.new_loss, why

    @claim("rank 64: almost like Full FT", True)
    def rank_64_like_full(m: Sources) -> Result:
        most, full = m.row("rank/ranks", rank=64, alpha="r"), m.row("rank/ranks", alpha="full")
        return {
            "what it learns, within 0.05 nats": abs(most.new_loss - full.new_loss) <= 0.05,
            "what it forgets, within 0.05 nats": abs(most.old_rise - full.old_rise) <= 0.05,
        }, (
            f"new loss {n(most.new_loss)} to {n(full.new_loss)}; "
            f"the old loss rises by {n(most.old_rise)} to {n(full.old_rise)}"
        )


with chapter.section("5.2") as claim:

    @claim("α = r: scaling s = 1.0 (default)", 1.0)
    def alpha_equals_rank() -> Result:
        return calc(rank=8).scale, "the scale of an adapter whose alpha is left out"

    @claim("α > r: LoRA contribution is amplified; α < r: dampened", True)
    def alpha_amplifies(m: Sources) -> Result:
        damped, plain, amplified = (row.old_rise for row in m.rows("rank/alphas", alpha=(1, 4, 16)))
        why = (
            f"r = 4: the old loss rises by {n(damped)} with α = 1, {n(plain)} with α = 4, "
            f"{n(amplified)} with α = 16"
        )
        return {"amplified": amplified > plain, "dampened": damped < plain}, why

    @claim("rule of thumb: set α = r or α = 2r", True)
    def alpha_rule_of_thumb(m: Sources) -> Result:
        best = m.row_of_least("rank/alphas", "new_loss")
        same, double = (row.new_loss for row in m.rows("rank/alphas", alpha=(4, 8)))
        return {
            "within 0.05 nats of the best": max(same, double) - best.new_loss <= 0.05,
            "one of them is the best": best.alpha in (4, 8),
        }, (
            f"r = 4: new loss {n(same)} with α = r, {n(double)} with 2r, "
            f"{n(best.new_loss)} with α = {n(best.alpha)}, the best that was tried"
        )


with chapter.section("5.3") as claim:

    @claim(
        "10⁻⁵ to 5 × 10⁻⁵ in full, 10⁻⁴ to 3 × 10⁻⁴ with LoRA: often 5-10× higher",
        between("5 ×", "10 ×"),
    )
    def rates_5_to_10(m: Sources) -> Result:
        lora, full = (
            m.artifact(f"{folder}/manifest.json").params.learning_rate
            for folder in ("lora_adapter", "full_finetuned")
        )
        return {
            "lower ends": 1e-4 / 1e-5,
            "upper ends": 3e-4 / 5e-5,
            "the document's own runs (§9.2)": lora / full,
        }, f"the document's rates, divided; its own runs have {n(lora)} and {n(full)}"

    @claim(
        "LoRA, typical learning rate: 10⁻⁴ to 3 × 10⁻⁴", at_least(8), words="all sentences learned"
    )
    def lora_typical_rate(m: Sources) -> Result:
        row = m.row("rank/rates", learning_rate=3e-4, method="lora")
        best = m.row_of_least("rank/rates", "new_loss", method="lora")
        return row.new_done, (
            "of MiniGPT's 8 new sentences, in 50 epochs at 3 × 10⁻⁴; the new loss stays at "
            f"{n(row.new_loss)}, at {n(best.learning_rate)} it comes to {n(best.new_loss)}"
        )

    @claim("LoRA tolerates higher learning rates than Full Fine-Tuning", True)
    def lora_tolerates_rates(m: Sources) -> Result:
        lora, full = m.rows("rank/rates", learning_rate=0.01, method=("lora", "full"))
        most_lora, most_full = m.rows("rank/rates", learning_rate=0.03, method=("lora", "full"))
        return {
            "disturbs less at 0.01": lora.old_rise < full.old_rise,
            "learns as much at 0.03": most_lora.new_done >= most_full.new_done,
            "is no further from its best at 0.03": most_lora.new_loss <= most_full.new_loss,
        }, (
            f"at 0.01 the old loss rises by {n(lora.old_rise)}, in full by {n(full.old_rise)}; at "
            f"0.03 {n(most_lora.new_done)} sentences are learned, in full {n(most_full.new_done)}, "
            f"with losses of {n(most_lora.new_loss)} and {n(most_full.new_loss)}"
        )

    @claim("the learning rate of LoRA: often 5-10× higher", between("5 ×", "10 ×"))
    def best_rate_5_to_10(m: Sources) -> Result:
        lora, full = (
            m.row_of_least("rank/rates", "new_loss", method=name).learning_rate
            for name in ("lora", "full")
        )
        return lora / full, (
            f"best of the rates tried, a factor of 3 apart: {n(lora)} with LoRA and {n(full)} in "
            "full, on MiniGPT's new sentences"
        )

    @claim(
        "even an aggressive update to the small adapter matrices cannot destabilize the model as "
        "a whole",
        more_than("50%"),
        words="not destabilized",
        each_seed=True,
    )
    def aggressive_update(m: Sources) -> Result:
        high, wild = m.rows("rank/rates", learning_rate=(0.01, 0.03), method="lora")
        return {"at 0.01": high.old_kept, "at 0.03": wild.old_kept}, (
            "first choices on old sentences that are still the base's, with every seed; "
            f"at 0.03 the old loss rises by {n(wild.old_rise)} nats"
        )
