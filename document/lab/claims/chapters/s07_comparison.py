"""7. LoRA vs. Other Methods."""

from typing import Any

from lab.claims import Chapter, Result, between, less_than
from lab.claims.sources import GB, Sources, calc, million, n, percent

chapter = Chapter()


with chapter.section("7") as claim:

    def share(parameters: Any) -> float:
        return float(parameters.trainable / parameters.total)

    @claim("Training from Scratch: 100% trainable", "100%")
    def share_scratch(m: Sources) -> Result:
        made = m.artifact("from_scratch/manifest.json").parameters
        return share(made), f"{n(made.trainable)} of {n(made.total)} parameters"

    @claim("Full Fine-Tuning: 100% trainable", "100%")
    def share_full(m: Sources) -> Result:
        made = m.artifact("full_finetuned/manifest.json").parameters
        return share(made), f"{n(made.trainable)} of {n(made.total)} parameters"

    @claim("Layer Freezing: 30-50% trainable", between("30%", "50%"))
    def share_freeze() -> Result:
        qwen = calc(method="freeze").parameters
        ends = (qwen.trained.embeddings + qwen.trained.head) / qwen.total
        half = calc(method="freeze", last_blocks=18, train_embeddings=False).parameters
        return {
            "MiniGPT, 1 of 2 blocks": share(calc("minigpt", method="freeze").parameters),
            "Qwen3-8B, 1 of 36": share(qwen),
            "Qwen3-8B, 18 of 36 and no ends": share(half),
        }, (
            "how many blocks, and whether embeddings and head train (§9.3: the last block, and "
            f"they do), which have {percent(ends)} of Qwen3-8B; MiniGPT before its vocabulary grew"
        )

    @claim("LoRA: 0.1-5% trainable", between("0.1%", "5%"))
    def share_lora() -> Result:
        return {
            "MiniGPT, r=4, embeddings and head": share(
                calc("minigpt", rank=4, embeddings="all").parameters
            ),
            "MiniGPT, r=4": share(calc("minigpt", rank=4).parameters),
            "Qwen3-8B, r=8": share(calc(rank=8).parameters),
            "Qwen3-8B, r=64, all linears": share(calc(rank=64, targets="all-linear").parameters),
        }, (
            "it is the rank, the targets and what else trains; Qwen3-8B has "
            f"{million(calc(rank=1).parameters.trainable)} parameters a rank; MiniGPT before its "
            "vocabulary grew"
        )

    @claim("QLoRA: 0.1-5% trainable", between("0.1%", "5%"))
    def share_qlora() -> Result:
        eight, sixteen = (share(calc(method="qlora", rank=rank).parameters) for rank in (8, 16))
        return {
            "Qwen3-8B, r=8": eight,
            "Qwen3-8B, r=16": sixteen,
        }, "as many parameters as LoRA of the same rank"

    def share_of_virtual_tokens(title: str, method: str, limit: str, what: str) -> None:
        @claim(f"{title}: <{limit} trainable", less_than(limit), id=f"share-{method}")
        def measure(m: Sources) -> Result:
            mini = m.artifact(f"{method}/manifest.json").parameters
            qwen = calc(method=method, virtual_tokens=20).parameters
            why = (
                f"{n(mini.trainable)} parameters of MiniGPT, {n(qwen.trainable)} of Qwen3-8B: "
                f"{what}"
            )
            return {"MiniGPT": share(mini), "Qwen3-8B, 20 tokens": share(qwen)}, why

    share_of_virtual_tokens("Prefix Tuning", "prefix", "0.1%", "keys and values in every block")
    share_of_virtual_tokens("Prompt Tuning", "prompt", "0.01%", "a row for each virtual token")

    @claim(
        "memory: Full Fine-Tuning very high, Layer Freezing high, LoRA low, QLoRA very low", True
    )
    def memory_order(m: Sources) -> Result:
        peaks = [calc(method=method).memory.peak for method in ("full", "freeze", "lora", "qlora")]
        methods = ("full fine-tuning", "layer freezing", "LoRA", "QLoRA")
        measured = [row.measured_kB for row in m.rows("methods/cost", method=methods)]
        return {
            "Qwen3-8B": peaks[0] > peaks[1] > peaks[2] > peaks[3],
            "MiniGPT, measured": measured[0] > measured[1] > measured[2] > measured[3],
        }, (
            f"Qwen3-8B, a step of 2,048 tokens: {', '.join(map(GB, peaks))}; "
            f"tensors at the peak of MiniGPT's step: {', '.join(map(n, measured))} kB"
        )

    @claim("memory: Prefix and Prompt Tuning minimal, below QLoRA's very low", True)
    def memory_minimal(m: Sources) -> Result:
        prefix, prompt, qlora = (
            calc(method=method).memory.peak for method in ("prefix", "prompt", "qlora")
        )
        rows = m.rows("methods/cost", method=("prefix tuning", "prompt tuning", "QLoRA"))
        prefix_here, prompt_here, qlora_here = (row.measured_kB for row in rows)
        return {
            "Qwen3-8B, prefix": prefix < qlora,
            "Qwen3-8B, prompt": prompt < qlora,
            "MiniGPT, prefix": prefix_here < qlora_here,
            "MiniGPT, prompt": prompt_here < qlora_here,
        }, (
            f"Qwen3-8B, a step of 2,048 tokens: {GB(prefix)} and {GB(prompt)} on a BF16 base, "
            f"QLoRA {GB(qlora)}: the base decides; MiniGPT, measured: {n(prefix_here)}, "
            f"{n(prompt_here)} and {n(qlora_here)} kB"
        )

    @claim("memory: Training from Scratch extreme, above Full Fine-Tuning's very high", True)
    def scratch_extreme(m: Sources) -> Result:
        scratch, full = m.rows("methods/cost", method=("training from scratch", "full fine-tuning"))
        return scratch.measured_kB > 1.01 * full.measured_kB, (
            f"{n(scratch.measured_kB)} and {n(full.measured_kB)} kB at the peak of MiniGPT's step: "
            "the same weights, gradients and averages train in both"
        )

    @claim("original model unchanged: LoRA, Prefix and Prompt Tuning", True)
    def original_unchanged(m: Sources) -> Result:
        base = m.artifact("expanded/manifest.json").fingerprint.tensors
        adapters = {"LoRA": "lora_adapter", "Prefix Tuning": "prefix", "Prompt Tuning": "prompt"}
        named = {
            name: m.artifact(f"{folder}/manifest.json").base.tensors
            for name, folder in adapters.items()
        }
        why = "sha256 of the base's tensors as each adapter names it, and as the base has it"
        return {name: tensors == base for name, tensors in named.items()}, why

    @claim(
        "multiple tasks: no for Full Fine-Tuning and Layer Freezing, yes for LoRA, QLoRA, Prefix "
        "and Prompt Tuning",
        True,
    )
    def several_tasks(m: Sources) -> Result:
        whole = {"full fine-tuning", "layer freezing", "training from scratch"}
        swapped = {"LoRA", "QLoRA", "prefix tuning", "prompt tuning"}
        return {
            "none": whole <= set(m.column("methods/cost", "method", several_tasks=False)),
            "several": swapped <= set(m.column("methods/cost", "method", several_tasks=True)),
        }, "whether what is stored is an adapter that is put on one unchanged base"
