"""2. The Core Idea."""

from lab.claims import (
    Chapter,
    Result,
    about,
    at_least,
    at_most,
    between,
    more_than,
    probability,
)
from lab.claims.sources import (
    KB,
    Record,
    Sources,
    billion,
    calc,
    million,
    model,
    n,
    percent,
)

chapter = Chapter()


with chapter.section("2") as claim:

    @claim("only a small subset (red) changes significantly, most neurons (blue) barely move", True)
    def small_subset(m: Sources) -> Result:
        parts = ("neurons", "weights", "normal")
        neurons, weights, normal = m.rows("figures/finetuning_subspace_concentration", part=parts)
        return {
            "a tenth of the neurons has most of ‖ΔW‖²": neurons.top_10 > 0.5,
            "a tenth of the weights has 90% of it": weights.needed_for_90 <= 0.1,
        }, (
            f"a tenth of the neurons has {percent(neurons.top_10)}; 90% takes "
            f"{percent(weights.needed_for_90)} of the weights, {percent(normal.needed_for_90)} if "
            f"all changes were normally distributed; {percent(weights.moved)} move at all"
        )


with chapter.section("2.1") as claim:  # From Network Nodes to Attention Projections

    @claim("four parallel projections, W_Q, W_K, W_V, and W_O", 4)
    def four_projections() -> Result:
        parallel = calc("minigpt", rank=4, targets="q_proj,k_proj,v_proj").projections
        why = (
            "linears in a block's attention; W_O reads what the three others made, and is not "
            "beside them"
        )
        return {
            "all": len(calc("minigpt", rank=4).projections),
            "those that read the same input": len(parallel),
        }, why

    def attention_of_dem(m: Sources) -> tuple[Record, Record]:
        """The shares of the words in the head nearest to the document's row, and in the mean of all
        heads.
        """
        row = m.row("figures/attention_row", model="base, mean")
        return m.row_of_least("figures/attention_row", "distance", model="base"), row

    def dem_to(word: str, share: float) -> None:
        @claim(
            f"dem attends to {word} ({share:.2f})", probability(f"{share:.0%}"), id=f"dem-to-{word}"
        )
        def measure(m: Sources) -> Result:
            nearest, mean = attention_of_dem(m)
            head, elsewhere = (
                f"head {nearest.head} of layer {nearest.layer}",
                percent(nearest.distance),
            )
            return {
                "the nearest head": getattr(nearest, word),
                "the mean of all heads": getattr(mean, word),
            }, (
                f"of 8 heads the nearest to the document's row is {head}, counted from 0, with "
                f"{elsewhere} of its weight elsewhere"
                if word == "katze"
                else f"{head} is the nearest to the document's row, by all five shares"
            )

    for word, share in {
        "katze": 0.45,
        "sitzt": 0.30,
        "auf": 0.15,
        "die": 0.08,
        "dem": 0.02,
    }.items():
        dem_to(word, share)

    @claim("the attention pattern might look like katze before sitzt, auf, die and dem", "katze")
    def dem_most(m: Sources) -> Result:
        nearest, mean = attention_of_dem(m)
        firsts = m.column("figures/attention_row", "head", model="base", most="katze")
        return {"the nearest head": nearest.most, "the mean of all heads": mean.most}, (
            f"in the mean auf has {percent(mean.auf)}, sitzt {percent(mean.sitzt)}, dem "
            f"{percent(mean.dem)}, "
            f"katze {percent(mean.katze)}; katze is first in {len(firsts)} of 8 heads"
        )


with chapter.section("2.2") as claim:  # Low-Rank Structure of Weight Updates

    @claim(
        "only a handful of directions have large singular values, while the vast majority are "
        "near zero",
        at_least("90%"),
        words="a handful",
    )
    def handful_of_directions(m: Sources) -> Result:
        kinds = ("attention", "feed-forward", "head")
        attention, feed_forward, head = m.rows("spectrum/energy", change="full", matrices=kinds)
        random = m.row("spectrum/energy", change="random", matrices="attention")
        return {
            "attention": attention.rank_8,
            "feed-forward": feed_forward.rank_8,
            "head": head.rank_8,
        }, (
            f"of ‖ΔW‖² in 8 of 64 directions; of a random matrix {percent(random.rank_8)}; "
            f"in attention 90% takes {n(attention.rank_of_90)} directions"
        )

    @claim("RoBERTa-Large (355M parameters)", about("355 million", "1%"))
    def roberta_large() -> Result:
        measured = model("roberta-large").total
        return (
            measured,
            f"the shapes of its config give {million(measured)}, its output head's own weights "
            "included",
        )

    @claim(
        "the effective subspace needed for successful fine-tuning is surprisingly small",
        at_most("1%"),
        words="surprisingly small",
    )
    def intrinsic_dimension(m: Sources) -> Result:
        mini = m.row("intrinsic_dimension/least", model="MiniGPT")
        return mini.share, (
            f"MiniGPT reaches 90% of full fine-tuning in {n(mini.least)} of {n(mini.parameters)} "
            "dimensions; the paper's RoBERTa-Large has 200 to 800 of 355 million"
        )

    @claim("pretrained models: a low intrinsic dimensionality", True)
    def pretraining_lowers_it(m: Sources) -> Result:
        base, random = m.rows(
            "intrinsic_dimension/least", model=("MiniGPT", "MiniGPT, random weights")
        )
        begins = ("base", "random weights")
        share, share_random = m.rows(
            "intrinsic_dimension/dimensions", begins=begins, dimensions=128
        )
        return {
            "fewer dimensions than random weights take to 90%": base.least < random.least,
            "more of it in 128 dimensions": share.right > share_random.right,
        }, (
            f"{n(base.least)} and {n(random.least)} dimensions, of those tried; in 128 the base "
            f"learns {percent(share.right)}, random weights {percent(share_random.right)}"
        )

    @claim("GPT-3 175B", about("175 billion", "1%"))
    def gpt3_parameters() -> Result:
        return model(
            "gpt-3-175b"
        ).total, f"the shapes of its paper's table give {billion(model('gpt-3-175b').total)}"

    @claim("GPT-3 175B (d_model = 12,288)", 12288)
    def gpt3_width() -> Result:
        return model("gpt-3-175b").hidden, "the width that gives the published count"

    @claim(
        "the singular values of ΔW decay rapidly, the top singular values contain most of the "
        "energy",
        more_than("50%"),
        words="most",
    )
    def most_of_the_energy(m: Sources) -> Result:
        kinds = ("attention", "feed-forward", "embedding", "head")
        rows = m.rows("spectrum/energy", change="full", matrices=kinds)
        random = m.row("spectrum/energy", change="random", matrices="attention")
        why = f"of ‖ΔW‖² in the top 8 of 64 on MiniGPT; of a random matrix {percent(random.rank_8)}"
        return {kind: row.rank_8 for kind, row in zip(kinds, rows, strict=True)}, why


with chapter.section("2.3") as claim:  # The LoRA Formulation

    @claim("r is much smaller than d, typically by a factor of 100x or more", at_least("100 ×"))
    def rank_much_smaller() -> Result:
        return {
            "MiniGPT, r=4": model("minigpt").hidden / 4,
            "Qwen3-8B, r=8": model("qwen3-8b").hidden / 8,
            "GPT-3, r=8": model("gpt-3-175b").hidden / 8,
        }, "d_model by rank, at the ranks of §2.4"

    @claim("the product BA has rank at most r", about("100%", "0.0001 points"))
    def rank_of_the_product(m: Sources) -> Result:
        why = (
            "share of ‖BA‖² in its 8 largest singular values, of adapters with r = 8, the mean "
            "over matrices"
        )
        return m.row("spectrum/energy", change="LoRA, r = 8", matrices="attention").rank_8, why

    @claim("the original weights W remain untouched", True)
    def weights_untouched(m: Sources) -> Result:
        base, made = (
            m.artifact("lora_adapter/manifest.json").base,
            m.artifact("expanded/manifest.json").fingerprint,
        )
        why = "sha256 of the base's tensors as the trained adapter names it, and as the base has it"
        return base.tensors == made.tensors, why

    @claim("the original weights do not consume optimizer memory", at_most("5%"), words="none")
    def no_optimizer_memory(m: Sources) -> Result:
        row, full = m.rows("methods/cost", method=("LoRA, matrices alone", "full fine-tuning"))
        averages = 8 * (full.trained - row.trained)
        return abs(row.measured_kB - row.predicted_kB) * 1000 / averages, (
            "what a step of MiniGPT was measured to hold beyond what is predicted without averages "
            f"for W₀, as a share of these, {KB(averages)}"
        )

    def word_at(step: int, word: str, share: str) -> None:
        @claim(f"step {step}: {word} {share}", probability(share), id=f"step-{step}-{word}")
        def measure(m: Sources) -> Result:
            row = m.row("trajectory/steps", step=step, word=word)
            if step == 0:
                return row.window_0, "the pretrained model, before any training"
            why = (
                "the document gives neither the window nor the rate of these steps; here §9.2's "
                "batch and rate"
            )
            return {"windows of 4 tokens": row.window_4, "whole sentences": row.window_0}, why

    def bett_and_boden_at(step: int, bett: str, boden: str, both: str) -> None:
        @claim(
            f"step {step}: bett {bett}, boden {boden}",
            probability(both),
            id=f"step-{step}-bett-boden",
        )
        def measure(m: Sources) -> Result:
            tisch, sofa, bett, boden = m.rows(
                "trajectory/steps", step=step, word=("tisch", "sofa", "bett", "boden")
            )
            return {
                "windows of 4 tokens": bett.window_4 + boden.window_4,
                "whole sentences": bett.window_0 + boden.window_0,
            }, (
                f"both together; with whole sentences tisch has {percent(tisch.window_0)} then and "
                f"sofa {percent(sofa.window_0)}: what the one loses the other gains"
            )

    for step, tisch, sofa, *bett_and_boden in (
        (0, "98%", "0.3%", "0.5%", "0.2%", "0.7%"),
        (10, "61%", "24%", "8%", "4%", "12%"),
        (30, "15%", "72%", "7%", "3%", "10%"),
        (50, "2%", "96%", "1%", "0.5%", "1.5%"),
    ):
        word_at(step, "tisch", tisch)
        word_at(step, "sofa", sofa)
        bett_and_boden_at(step, *bett_and_boden)

    def steps_to_sofa(m: Sources) -> list[list[int]]:
        """Each seed's step from which sofa is the first choice: with windows of 4 tokens, with
        whole sentences.
        """
        return [
            m.column("trajectory/firsts", "from_step", window=window, first_choice="sofa")
            for window in (4, 0)
        ]

    @claim('by step 30, "sofa" overtakes "tisch" as the top prediction', True)
    def sofa_by_step_30(m: Sources) -> Result:
        (short, long), seeds = (
            steps_to_sofa(m),
            len(m.column("trajectory/firsts", "seed", window=0, from_step=0)),
        )
        return {
            "windows of 4 tokens": len(short) == seeds and max(short) <= 30,
            "whole sentences": len(long) == seeds and max(long) <= 30,
        }, (
            f"with every seed; the slowest has sofa first from step {max(short)} on with windows "
            f"of 4 tokens, {max(long)} with whole sentences"
        )

    @claim("Figure 3: gradient descent over 3 steps from tisch to sofa", at_most(3))
    def three_steps(m: Sources) -> Result:
        short, long = steps_to_sofa(m)
        why = (
            "the step from which sofa is the first choice, of the quickest seed, at §9.2's "
            "learning rate"
        )
        return {"windows of 4 tokens": min(short), "whole sentences": min(long)}, why

    @claim(
        "a negative slope means decrease θ to reduce loss, a positive slope means increase it", True
    )
    def sign_of_the_slope(m: Sources) -> Result:
        losses, thetas = (
            m.column("figures/gradient_example_landscape", name) for name in ("loss", "theta")
        )
        middle = round(len(losses) / 2 - 0.5)
        left, here, right = losses[middle - 1 : middle + 2]
        slope = (right - left) / (thetas[middle + 1] - thetas[middle - 1])
        return (slope < 0 and left < here) or (slope > 0 and right < here), (
            f"at the parameter of Figure 3 the slope is {n(slope)}, and the loss {n(here)}, "
            f"with {n(left)} a little to the left and {n(right)} to the right"
        )

    def flat_from(m: Sources) -> list[int]:
        """The epochs from which the losses of full fine-tuning, layer freezing and LoRA are
        flat.
        """
        metrics = m.artifact("evaluation/metrics.json")
        return [
            metrics.full.flat_from_epoch,
            metrics.freeze.flat_from_epoch,
            metrics.lora.flat_from_epoch,
        ]

    @claim("all three converge around epoch 25–35", between(25, 35))
    def flat_25_to_35(m: Sources) -> Result:
        full, freeze, lora = flat_from(m)
        why = "the epoch from which every later one's mean loss is within 5% of the whole drop"
        return {"Full Fine-Tuning": full, "Layer Freezing": freeze, "LoRA": lora}, why

    @claim("LoRA (blue) flattens earliest", True)
    def lora_flattens_earliest(m: Sources) -> Result:
        full, freeze, lora = flat_from(m)
        why = f"flat from epoch {lora} (LoRA), {freeze} (Layer Freezing), {full} (Full Fine-Tuning)"
        return lora < min(full, freeze), why

    @claim("in hindsight, 30 epochs would have been sufficient", at_most(30))
    def _30_epochs_suffice(m: Sources) -> Result:
        return max(
            flat_from(m)
        ), f"the last of the three curves is flat from epoch {max(flat_from(m))}"

    @claim("our MiniGPT (~109K parameters)", about(109000, "1%"))
    def minigpt_109k() -> Result:
        return model(
            "minigpt"
        ).total, f"{n(model('minigpt').total)}, with {n(model('minigpt').vocabulary)} words"

    @claim("22 training sentences", 22)
    def _22_sentences(m: Sources) -> Result:
        measured = len(m.lines("pretrain.data"))
        return measured, f"the pretraining data has {measured} sentences; §6 and §9.1 say 20"

    @claim(
        "Figure 3: in LoRA, only adapter matrices receive gradients, frozen weights are excluded "
        "entirely",
        True,
    )
    def who_gets_gradients(m: Sources) -> Result:
        groups = ("attention W, b", "embeddings", "head")
        frozen, embeddings, head = m.rows("figures/gradient_example_groups", group=groups)
        return {
            "frozen weights get none": frozen.with_grad == 0,
            "nothing but A and B gets any": embeddings.with_grad + head.with_grad == 0,
        }, (
            f"of {n(frozen.tensors)} frozen tensors of attention {n(frozen.with_grad)} have one; "
            "embeddings and head, which §9.2 trains, have them"
        )

    @claim(
        "Figure 4: even with the minimum possible rank (r = 1), the approximation closely matches "
        "the full fine-tuning result",
        at_least("90%"),
        words="closely",
    )
    def rank_1_matches(m: Sources) -> Result:
        example = m.row("figures/lora_intuition", case="example")
        best = m.row("figures/lora_intuition", case="measured", drawn=True)
        return {"an example in 2D": example.rank_1, "a matrix as it was fine-tuned": best.rank_1}, (
            "of ‖ΔW‖² in the best matrix of rank 1; it is the second singular value that tells, "
            f"{percent(example.ratio)} of the first in the example, {percent(best.ratio)} in "
            f"{best.module} of block {best.block}"
        )


with chapter.section("2.4") as claim:  # Choosing the Rank r

    def ratio(id: str, title: str, name: str, rank: int, share: str, margin: str) -> None:
        @claim(f"{title}: r / d_model = {share}", about(share, margin), id=id)
        def measure() -> Result:
            width = model(name).hidden
            return rank / width, f"{rank} of {n(width)}"

    ratio("ratio-minigpt", "our MiniGPT", "minigpt", 4, "6.25%", "0.005 points")
    ratio("ratio-qwen", "Qwen3-8B", "qwen3-8b", 8, "0.2%", "0.05 points")
    ratio("ratio-gpt3", "GPT-3 175B", "gpt-3-175b", 8, "0.065%", "0.0005 points")

    @claim("already at r = 4 to r = 8, LoRA matches or closely approaches full fine-tuning", True)
    def rank_4_to_8(m: Sources) -> Result:
        full = m.row("rank/ranks", alpha="full").new_loss
        four, eight = (row.new_loss for row in m.rows("rank/ranks", rank=(4, 8), alpha="r"))
        four_at_1, eight_at_1 = (row.new_loss for row in m.rows("rank/ranks", rank=(4, 8), alpha=1))
        return {
            "r = 4, α = r": four - full <= 0.05,
            "r = 8, α = r": eight - full <= 0.05,
            "r = 4, α = 1": four_at_1 - full <= 0.05,
            "r = 8, α = 1": eight_at_1 - full <= 0.05,
        }, (
            f"loss on MiniGPT's new sentences within 0.05 nats of full fine-tuning's {n(full)}: "
            f"{n(four)} and {n(eight)}, with α = 1 {n(four_at_1)} and {n(eight_at_1)}"
        )

    @claim("r = 64 yields virtually no additional gain", True)
    def rank_64_no_gain(m: Sources) -> Result:
        eight, most = m.rows("rank/ranks", rank=(8, 64), alpha="r")
        eight_at_1, most_at_1 = m.rows("rank/ranks", rank=(8, 64), alpha=1)
        return {
            "α = r": eight.new_loss - most.new_loss <= 0.05,
            "α = 1": eight_at_1.new_loss - most_at_1.new_loss <= 0.05,
        }, (
            f"new loss {n(eight.new_loss)} at r = 8, {n(most.new_loss)} at 64, less than 0.05 nats "
            f"being no gain; the old loss rises by {n(eight.old_rise)} and {n(most.old_rise)}"
        )

    @claim(
        "if ΔW only has a handful of significant singular values, then a small r is sufficient to "
        "capture them",
        True,
    )
    def small_r_captures(m: Sources) -> Result:
        ranks = ("tuned", 4, 8, 16)
        tuned, four, eight, sixteen = (
            row.new_loss for row in m.rows("spectrum/extracted", rank=ranks)
        )
        trained = m.row("rank/ranks", rank=4, alpha="r").new_loss
        return {
            "r = 4 of the full ΔW": four - tuned <= 0.05,
            "r = 8 of the full ΔW": eight - tuned <= 0.05,
            "r = 16 of the full ΔW": sixteen - tuned <= 0.05,
            "r = 4 trained as such": trained - tuned <= 0.05,
        }, (
            f"new loss within 0.05 nats of {n(tuned)}: cut out of what full fine-tuning changed "
            f"{n(four)}, {n(eight)} and {n(sixteen)}, trained at r = 4 {n(trained)}"
        )
