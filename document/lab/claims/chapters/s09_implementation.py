"""9. Our Implementation: MiniGPT Fine-Tuning."""

from lab.claims import Chapter, Result, at_least, between, less_than
from lab.claims.sources import KB, Sources, calc, find, n, percent

chapter = Chapter()


with chapter.section("9.1") as claim:

    @claim("the base model is pretrained on 20 German sentences", 20)
    def data_20_sentences(m: Sources) -> Result:
        measured = len(m.lines("pretrain.data"))
        return measured, f"the pretraining data has {measured} sentences; §2.3 says 22"

    @claim("for fine-tuning, 8 new sentences", 8)
    def data_8_sentences(m: Sources) -> Result:
        return len(m.lines("finetune_lora.data")), "sentences of the data file"

    @claim(
        "new vocabulary: 7 words of weather and 9 of cooking, absent from the base vocabulary", 16
    )
    def new_words(m: Sources) -> Result:
        base, tuned = (
            set(" ".join(lines).split())
            for lines in (m.lines("pretrain.data"), m.lines("finetune_lora.data"))
        )
        return len(tuned - base), (
            "words of the new sentences that the old ones lack; "
            f"kocht, which the document lists as new, is among the old: {n('kocht' in base)}"
        )

    @claim(
        "new embeddings are initialized from the mean of existing embeddings plus small Gaussian "
        "noise",
        True,
    )
    def new_rows_start(m: Sources) -> Result:
        table, starts = "fact_correction/new_rows", ("mean_noise", "zeros", "copy")
        before = [m.over_seeds(table, "new_loss_before", start=start) for start in starts]
        after = [m.over_seeds(table, "new_loss_after", start=start) for start in starts]
        return {
            "better than zeros, before training": before[0] < before[1],
            "better than copies, before training": before[0] < before[2],
            "better than zeros, after training": after[0] < after[1],
            "better than copies, after training": after[0] < after[2],
        }, (
            f"loss on the new sentences with mean and noise, zeros and copies: {n(before[0])}, "
            f"{n(before[1])} and "
            f"{n(before[2])} before training, {n(after[0])}, {n(after[1])} and {n(after[2])} after"
        )


with chapter.section("9.2") as claim:  # LoRA Configuration

    def sides_of_v(m: Sources, matrix: str) -> list[int]:
        """The shape of A or B of v_proj in the adapter's file."""
        return m.tensor_shape(
            "lora_adapter/adapter_model.safetensors",
            f"layers.0.self_attn.v_proj.lora_{matrix}.weight",
        )

    @claim("Rank r = 4", 4)
    def config_rank(m: Sources) -> Result:
        return m.artifact(
            "lora_adapter/adapter_config.json"
        ).r, "as the trained adapter's config has it"

    @claim("a 4/64 = 6.25% subspace", "6.25%")
    def config_subspace(m: Sources) -> Result:
        rows, columns = sides_of_v(m, "A")
        return rows / columns, "A of v_proj in the adapter's file, its rows by its columns"

    @claim("LoRA overhead at 512 params per projection", 512)
    def config_512(m: Sources) -> Result:
        a, b = sides_of_v(m, "A"), sides_of_v(m, "B")
        return a[0] * a[1] + b[0] * b[1], "A and B of v_proj in the adapter's file"

    @claim("α = 1.0 yields a scaling factor s = α / r = 0.25", 0.25)
    def config_scale(m: Sources) -> Result:
        config = m.artifact("lora_adapter/adapter_config.json")
        why = f"{n(config.lora_alpha)} by {n(config.r)}, as the trained adapter's config has them"
        return config.lora_alpha / config.r, why

    @claim(
        "this conservative scaling prevents the small dataset from destabilizing the pretrained "
        "representations",
        True,
    )
    def scale_is_conservative(m: Sources) -> Result:
        low, even = m.rows("rank/alphas", alpha=(1, 4))
        return low.old_rise < even.old_rise, (
            f"the old loss rises by {n(low.old_rise)} nats at α = 1 and {n(even.old_rise)} at α = "
            f"r; the new one is {n(low.new_loss)} and {n(even.new_loss)}"
        )

    @claim("higher ranks would offer diminishing returns given the small weight matrices", True)
    def higher_ranks_diminish(m: Sources) -> Result:
        one, four, most = (row.new_loss for row in m.rows("rank/ranks", rank=(1, 4, 64), alpha="r"))
        return one - four > four - most, (
            f"new loss {n(one)} at r = 1, {n(four)} at 4, {n(most)} at 64: "
            f"the first step gains {n(one - four)}, all others {n(four - most)}"
        )

    @claim("target modules: W_Q, W_K, W_V, W_O", 4)
    def config_targets(m: Sources) -> Result:
        modules = m.artifact("lora_adapter/adapter_config.json").target_modules
        return len(modules), "kinds of modules in the trained adapter's config"

    @claim("2× higher than the Full FT baseline (10⁻³)", "2 ×")
    def config_twice_the_rate(m: Sources) -> Result:
        lora = m.artifact("lora_adapter/manifest.json").params.learning_rate
        full = m.artifact("full_finetuned/manifest.json").params.learning_rate
        return lora / full, f"rates {n(lora)} and {n(full)}, as the runs' manifests have them"

    @claim("50 epochs", 50)
    def config_epochs(m: Sources) -> Result:
        return len(
            {step.epoch for step in m.steps("lora_adapter/loss.csv")}
        ), "epochs in the run's log"

    @claim("batch size 4", 4)
    def config_batch(m: Sources) -> Result:
        return m.artifact(
            "lora_adapter/manifest.json"
        ).params.batch_size, "as the run's manifest has it"

    @claim("sequence length 4", 4)
    def config_window(m: Sources) -> Result:
        window = m.artifact("lora_adapter/manifest.json").params.window
        return window, "tokens of a training window, as the run's manifest has it"

    @claim("our training sentences are short (5–7 tokens)", between(5, 7))
    def sentence_lengths(m: Sources) -> Result:
        lengths = [len(line.split()) for line in m.lines("finetune_lora.data")]
        why = "words of the 8 new sentences, each of which is a token"
        return {"the shortest": min(lengths), "the longest": max(lengths)}, why

    @claim("only LoRA parameters, embeddings, and the LM head receive gradients", True)
    def what_trains(m: Sources) -> Result:
        trainable = m.artifact("lora_adapter/manifest.json").parameters.trainable
        ends = m.tensor_shape("expanded/model.safetensors", "lm_head.weight")
        matrices = calc("minigpt", rank=4).parameters.trainable
        why = f"{n(trainable)} train: {n(matrices)} of A and B, and two tables of {n(ends)}"
        return trainable == matrices + 2 * ends[0] * ends[1], why

    @claim("A ∈ ℝ^(r × d) and B ∈ ℝ^(d × r)", True)
    def forms_of_a_and_b(m: Sources) -> Result:
        a, b = sides_of_v(m, "A"), sides_of_v(m, "B")
        why = f"sides of A {n(a)}, of B {n(b)} in the adapter's file, r = 4, d = 64"
        return (a, b) == ([4, 64], [64, 4]), why


with chapter.section("9.3") as claim:  # Comparison of the Three Approaches

    @claim("Full Fine-Tuning: 100% trainable", "100%")
    def compared_full(m: Sources) -> Result:
        return m.artifact(
            "evaluation/metrics.json"
        ).full.trainable_percent / 100, "as the comparison counts it"

    @claim("Layer Freezing: ~30-50% (last block + embeddings)", between("30%", "50%"))
    def compared_freeze(m: Sources) -> Result:
        made = m.artifact("layer_frozen/manifest.json").parameters
        why = (
            f"{n(made.trainable)} of {n(made.total)} parameters: one of two blocks, embeddings "
            "and head"
        )
        return made.trainable / made.total, why

    @claim("LoRA: <5% (LoRA matrices + embeddings)", less_than("5%"))
    def compared_lora(m: Sources) -> Result:
        made, matrices = (
            m.artifact("lora_adapter/manifest.json").parameters,
            calc("minigpt", rank=4).parameters,
        )
        return made.trainable / made.total, (
            f"{n(made.trainable)} of {n(made.total)} parameters, {n(matrices.trainable)} of them A "
            "and B, the rest embeddings and head"
        )

    @claim("Layer Freezing: learning rate 10⁻³", 0.001)
    def compared_freeze_rate(m: Sources) -> Result:
        return m.artifact(
            "layer_frozen/manifest.json"
        ).params.learning_rate, "as the run's manifest has it"

    @claim("catastrophic forgetting: Full Fine-Tuning high, Layer Freezing medium, LoRA low", True)
    def forgetting_order(m: Sources) -> Result:
        methods = ("full fine-tuning", "layer freezing", "LoRA")
        full, freeze, lora = (row.old_rise for row in m.rows("methods/knowledge", method=methods))
        full_there, freeze_there, lora_there = (
            row.rise_there for row in m.rows("forgetting/trade", method=methods)
        )
        return {
            "after 50 epochs": full > freeze > lora,
            "once the new sentences are learned": full_there > freeze_there > lora_there,
        }, (
            f"the old loss rises by {n(full)}, {n(freeze)} and {n(lora)} nats; by {n(full_there)}, "
            f"{n(freeze_there)} and {n(lora_there)} where the new one reaches 0.5"
        )

    @claim(
        "testing old prompts (die katze, der hund) against the Full FT model, showing measurable "
        "degradation",
        True,
    )
    def old_prompts_degrade(m: Sources) -> Result:
        answers = m.artifact("evaluation/predictions.json")
        cats = [find(rows, prompt="die katze").probability for rows in (answers.base, answers.full)]
        dogs = [find(rows, prompt="der hund").probability for rows in (answers.base, answers.full)]
        why = (
            f"sitzt from {percent(cats[0])} to {percent(cats[1])}, läuft from {percent(dogs[0])} "
            f"to {percent(dogs[1])}"
        )
        return {"die katze": cats[1] < cats[0], "der hund": dogs[1] < dogs[0]}, why

    @claim("the LoRA model retains the original predictions because W₀ is never modified", "100%")
    def predictions_retained(m: Sources) -> Result:
        lora = m.artifact("evaluation/metrics.json").lora
        alone = m.row("methods/knowledge", method="LoRA, matrices alone")
        return {
            "embeddings and head train too": lora.forgetting.answers_kept,
            "A and B alone train": alone.old_kept,
        }, (
            "first choices on the old sentences that are still the base's; embeddings and head "
            f"train as well, {n(lora.trainable)} parameters; without them what W₀x is added to "
            f"changes all the same, and {n(alone.new_done)} of 8 new sentences are learned"
        )

    @claim("the same after the two prompts that it tests, die katze and der hund", True)
    def two_prompts_retained(m: Sources) -> Result:
        answers = m.artifact("evaluation/predictions.json")
        old_cat, cat, full_cat = (
            find(rows, prompt="die katze") for rows in (answers.base, answers.lora, answers.full)
        )
        old_dog, dog, full_dog = (
            find(rows, prompt="der hund") for rows in (answers.base, answers.lora, answers.full)
        )
        return {"die katze": cat.first == old_cat.first, "der hund": dog.first == old_dog.first}, (
            f"sitzt at {percent(cat.probability)} and läuft at {percent(dog.probability)}; still "
            f"first after Full Fine-Tuning, at {percent(full_cat.probability)} and "
            f"{percent(full_dog.probability)}: {n(full_cat.first)} and {n(full_dog.first)}"
        )


with chapter.section("9.4") as claim:  # Artifacts

    @claim(
        "the pipeline saves four model variants: three complete models, and lora_adapter with "
        "only the small matrices",
        True,
    )
    def four_variants(m: Sources) -> Result:
        whole = [
            m.size(f"{folder}/model.safetensors")
            for folder in ("full_finetuned", "layer_frozen", "lora_merged")
        ]
        adapter = m.size("lora_adapter/adapter_model.safetensors")
        full, frozen, merged = whole
        why = f"{KB(full)} in full, {KB(frozen)} frozen, {KB(adapter)} adapter, {KB(merged)} merged"
        return adapter < min(whole) / 2 and max(whole) < 1.01 * min(whole), why

    @claim(
        "the lora_adapter/ variant is orders of magnitude smaller than the full model",
        at_least("100 ×"),
        words="orders",
    )
    def adapter_magnitudes_smaller(m: Sources) -> Result:
        adapter, full = (
            m.size("lora_adapter/adapter_model.safetensors"),
            m.size("full_finetuned/model.safetensors"),
        )
        qwen = calc(rank=8, precision="fp16")
        why = (
            f"two orders are 100 ×; MiniGPT's adapter, {KB(adapter)} with embeddings and head, "
            f"beside {KB(full)}"
        )
        return {
            "MiniGPT": full / adapter,
            "Qwen3-8B, r=8": qwen.memory.weights / qwen.adapter_bytes.fp16,
        }, why
