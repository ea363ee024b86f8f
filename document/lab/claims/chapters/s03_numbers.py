"""3. Example with Concrete Numbers."""

from lab.claims import Chapter, Result, about
from lab.claims.sources import GB, KB, MB, Record, billion, calc, find, model, n

chapter = Chapter()


with chapter.section("3") as claim:
    QWEN = {"W_Q": "q_proj", "W_K": "k_proj", "W_V": "v_proj", "W_O": "o_proj"}
    MINIGPT = {**QWEN, "W_O": "out_proj"}

    def projections(name: str, rank: int) -> dict[str, Record]:
        """W_Q, W_K, W_V and W_O of a model with LoRA: their sides `in` and `out`, and their A and
        B.
        """
        rows = calc(name, rank=rank).projections
        names = MINIGPT if name == "minigpt" else QWEN
        return {matrix: find(rows, name=module) for matrix, module in names.items()}

    @claim(
        "Adam stores two additional states per trainable parameter, so each one costs ≈ 3× its "
        "weight size in VRAM",
        "3 ×",
    )
    def adam_3_times_a_parameter() -> Result:
        step = calc(method="full", precision="fp32", optimizer="adamw").memory
        return (
            {
                "without its gradient": (step.weights + step.optimizer) / step.weights,
                "with its gradient": (step.weights + step.gradients + step.optimizer)
                / step.weights,
            },
            "weight and two averages are three numbers; the gradient is a fourth, and there while "
            "a step runs",
        )

    @claim("MiniGPT, W (one projection): 64 × 64 = 4,096 params", 4096)
    def minigpt_w() -> Result:
        q = projections("minigpt", 4)["W_Q"]
        return q["in"] * q.out, f"q_proj is {q['in']} → {q.out}"

    @claim("MiniGPT, A: 4 × 64 = 256 params", 256)
    def minigpt_a() -> Result:
        q = projections("minigpt", 4)["W_Q"]
        return q.A[0] * q.A[1], f"A is {q.rank} × {q['in']}"

    @claim("MiniGPT, B: 64 × 4 = 256 params", 256)
    def minigpt_b() -> Result:
        q = projections("minigpt", 4)["W_Q"]
        return q.B[0] * q.B[1], f"B is {q.out} × {q.rank}"

    @claim("MiniGPT, trainable per projection: 512", 512)
    def minigpt_projection() -> Result:
        return {
            name: row.parameters_each for name, row in projections("minigpt", 4).items()
        }, "A and B together"

    @claim("Qwen3-8B: d_model = 4,096", 4096)
    def qwen_width() -> Result:
        return model("qwen3-8b").hidden, "as its config has it"

    @claim(
        "Qwen3-8B, W (one projection): 4096 × 4096 = 16,777,216 params; here W_Q and W_O", 16777216
    )
    def qwen_w() -> Result:
        q, _, _, o = projections("qwen3-8b", 8).values()
        why = f"q_proj is {n(q['in'])} → {n(q.out)}, o_proj {n(o['in'])} → {n(o.out)}"
        return {"W_Q": q["in"] * q.out, "W_O": o["in"] * o.out}, why

    @claim("the same of Qwen3-8B's W_K and W_V: 4096 × 4096 = 16,777,216 params", 16777216)
    def qwen_w_kv() -> Result:
        (_, k, v, _), shapes = projections("qwen3-8b", 8).values(), model("qwen3-8b")
        return {"W_K": k["in"] * k.out, "W_V": v["in"] * v.out}, (
            f"k_proj is {n(k['in'])} → {n(k.out)}, v_proj {n(v['in'])} → {n(v.out)}: "
            f"{shapes.kv_heads} heads of keys and values to {shapes.heads} of queries"
        )

    @claim("Qwen3-8B, A: 8 × 4096 = 32,768 params", 32768)
    def qwen_a() -> Result:
        rows = projections("qwen3-8b", 8)
        q, o = rows["W_Q"], rows["W_O"]
        why = (
            f"A has as many columns as W reads numbers; of q_proj {n(q['in'])}, of o_proj "
            f"{n(o['in'])}"
        )
        return {name: row.A[0] * row.A[1] for name, row in rows.items()}, why

    @claim("Qwen3-8B, B: 4096 × 8 = 32,768 params", 32768)
    def qwen_b() -> Result:
        rows = projections("qwen3-8b", 8)
        why = (
            f"B has as many rows as W gives numbers; of q_proj {n(rows['W_Q'].out)}, of k_proj "
            f"{n(rows['W_K'].out)}"
        )
        return {name: row.B[0] * row.B[1] for name, row in rows.items()}, why

    @claim("Qwen3-8B, trainable per projection: 65,536", 65536)
    def qwen_projection() -> Result:
        rows = projections("qwen3-8b", 8)
        q, k = rows["W_Q"], rows["W_K"]
        why = (
            f"8 × (in + out); q_proj is {n(q['in'])} → {n(q.out)}, k_proj {n(k['in'])} → {n(k.out)}"
        )
        return {name: row.parameters_each for name, row in rows.items()}, why

    @claim("Layers: MiniGPT 2", 2)
    def minigpt_layers() -> Result:
        return len(model("minigpt").blocks), "as the Introduction has it"

    @claim("Layers: Qwen3-8B 36", 36)
    def qwen_layers() -> Result:
        return len(model("qwen3-8b").blocks), "as its config has it"

    @claim("Projections per layer: 4", 4)
    def projections_per_layer() -> Result:
        of_minigpt = (
            calc("minigpt", rank=4).parameters.trainable / 512 / len(model("minigpt").blocks)
        )
        why = "linears with LoRA in a block's attention"
        return {"MiniGPT": of_minigpt, "Qwen3-8B": len(calc(rank=8).projections)}, why

    @claim("MiniGPT, total (frozen): ≈ 109,000", about(109000, "1%"))
    def minigpt_total() -> Result:
        return calc("minigpt", rank=4).parameters.total, "embeddings, blocks and head together"

    @claim("Qwen3-8B, total (frozen): 8 × 10⁹", about("8 billion", "5%"))
    def qwen_total() -> Result:
        parts = model("qwen3-8b").components()
        why = (
            f"{billion(parts['embeddings'])} of them embeddings and {billion(parts['head'])} the "
            "head"
        )
        return model("qwen3-8b").total, why

    @claim("MiniGPT, LoRA (trainable): 4,096", 4096)
    def minigpt_lora() -> Result:
        why = (
            "512 for each of 4 projections in 2 blocks, as long as embeddings and head do not train"
        )
        return calc("minigpt", rank=4).parameters.trainable, why

    @claim("Qwen3-8B, LoRA (trainable): ≈ 9.4 × 10⁶", about("9.4 million", "2%"))
    def qwen_lora() -> Result:
        lora, k = calc(rank=8).parameters, projections("qwen3-8b", 8)["W_K"]
        return lora.trainable, (
            f"{n(lora.document)} if every projection were 4,096 × 4,096; "
            f"k_proj and v_proj are {n(k['in'])} → {n(k.out)}, {n(lora.trainable)} in all"
        )

    @claim("MiniGPT, adapter size (FP16): ≈ 8 KB", about("8 KB", "5%"))
    def minigpt_adapter_size() -> Result:
        return calc("minigpt", rank=4).adapter_bytes.fp16, "2 bytes for each of 4,096 parameters"

    @claim("Qwen3-8B, adapter size (FP16): ≈ 18 MB", about("18 MB", "5%"))
    def qwen_adapter_size() -> Result:
        lora = calc(rank=8).parameters
        why = (
            f"2 bytes for each of {n(lora.trainable)} parameters; the document counts "
            f"{n(lora.document)}"
        )
        return calc(rank=8).adapter_bytes.fp16, why

    @claim("MiniGPT, VRAM for optimizer (Adam, FP32): ≈ 48 KB", about("48 KB", "5%"))
    def minigpt_adam() -> Result:
        step = calc("minigpt", rank=4, trainer="torch-fp32").memory
        return (
            step.adapter + step.optimizer,
            f"A and B, {KB(step.adapter)}, and their two averages, {KB(step.optimizer)}",
        )

    @claim("Qwen3-8B, VRAM for optimizer (Adam, FP32): ≈ 112 MB", about("112 MB", "5%"))
    def qwen_adam() -> Result:
        step, lora = calc(rank=8, trainer="torch-fp32").memory, calc(rank=8).parameters
        return step.adapter + step.optimizer, (
            f"A and B, {MB(step.adapter)}, and their averages, {MB(step.optimizer)}, "
            f"of {n(lora.trainable)} parameters, not {n(lora.document)}"
        )

    @claim(
        "Full Fine-Tuning of Qwen3-8B consumes ≈ 48 GB VRAM for Adam alone", about("48 GB", "10%")
    )
    def full_adam_48_gb() -> Result:
        same, exact = (
            calc(method="full", trainer=trainer).memory for trainer in ("torch", "torch-fp32")
        )
        return {
            "averages in FP32": exact.optimizer,
            "averages in BF16": same.optimizer,
            "weights and averages in BF16": same.weights + same.optimizer,
        }, (
            f"two averages of {n(model('qwen3-8b').total)} parameters, 8 or 4 bytes a pair; "
            "for LoRA, one line above, the document counts A and B with their averages"
        )

    @claim("roughly 430× more than the LoRA variant", about("430 ×", "10%"))
    def full_against_lora_430() -> Result:
        full = calc(method="full", trainer="torch-fp32").memory.optimizer
        lora = calc(rank=8, trainer="torch-fp32").memory.optimizer
        return full / lora, (
            f"{GB(full)} to {MB(lora)}: with the same bytes a parameter it is the ratio of the "
            "parameters; 48 GB are 6 bytes a parameter, 112 MB are 12"
        )
