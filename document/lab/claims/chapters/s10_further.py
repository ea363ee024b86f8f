"""10. Further Concepts."""

from math import log2

from lab.claims import Chapter, Result, about, at_least, at_most, less_than, more_than
from lab.claims.sources import GB, B, GiB, Sources, calc, find, model, n, percent
from pipeline.calc.settings import precision

chapter = Chapter()


with chapter.section("10.1") as claim:
    VARIANTS = {  # what a row of the document's table can mean, if more than one precision
        "nf4": {"NF4": "nf4", "with double quantization": "nf4-dq"},
        **{
            k: {"groups of 128": k, "groups of 64, as in the study": f"{k}-g64"}
            for k in ("gptq", "awq", "3bit")
        },
    }
    SCALES = {  # {}: the bytes of scales and zero points, of each variant
        **dict.fromkeys(("fp32", "fp8"), "nothing beside"),
        "int8": "scales and zero points take {} a weight in rows of 4,096, as of Qwen3-8B",
        "nf4": "the scales of blocks take {}, or {} where they are quantized in turn",
        **dict.fromkeys(("gptq", "awq", "3bit"), "scales and zero points take {} or {} a weight"),
        "2bit": "scales and zero points take {} a weight",
        "1.58bit": "packed five to a byte",
    }

    def bytes_per_parameter(title: str, name: str, size: str) -> None:
        quote, id = (
            f"{title}: {size} byte{'s' * (size != '1')} per param",
            f"bytes-{name.replace('.', '-')}",
        )

        @claim(quote, about(f"{size} B", "5%"), id=id)
        def measure() -> Result:
            kinds = {
                condition: precision(variant)
                for condition, variant in VARIANTS.get(name, {"": name}).items()
            }
            scales = SCALES[name].format(*(B(kind.scales) for kind in kinds.values()))
            measured = {condition: kind.bytes for condition, kind in kinds.items()}
            return measured.get("", measured), f"{n(precision(name).bits)} bits of code; {scales}"

    def memory_of_qwen(title: str, name: str, gb: str) -> None:
        quote, id = f"{title}: Qwen3-8B memory ≈ {gb} GB", f"qwen-{name.replace('.', '-')}"

        @claim(quote, about(f"{gb} GB", "5%"), id=id)
        def measure() -> Result:
            weights, qwen = calc(precision=name).memory.weights, model("qwen3-8b")
            if not precision(name).quantized:
                return weights, f"all {n(qwen.total)} parameters alike"
            parts = qwen.components()
            rest = qwen.total - parts["attention"] - parts["feed-forward"]
            why = f"{n(rest)} parameters, embeddings and head among them, stay at 16 bits; "
            if name == "nf4":
                double = calc(precision="nf4-dq").memory.weights
                return {
                    "NF4": weights,
                    "with double quantization": double,
                }, f"{why}with double quantization {GiB(double)}"
            return weights, f"{why}{percent(1 - rest / qwen.total)} of all are quantized"

    for title, name, size, gb in (  # the document's table: bytes per parameter, GB of Qwen3-8B
        ("FP32", "fp32", "4", "32"),
        ("TF32", "tf32", "", "32"),
        ("FP16", "fp16", "", "16"),
        ("BF16", "bf16", "", "16"),
        ("FP8 (E4M3)", "fp8", "1", "8"),
        ("INT8", "int8", "1", "8"),
        ("NF4", "nf4", "0.5", "4"),
        ("INT4 (GPTQ)", "gptq", "0.5", "4"),
        ("INT4 (AWQ)", "awq", "0.5", "4"),
        ("3-bit", "3bit", "0.375", "3"),
        ("2-bit", "2bit", "0.25", "2"),
        ("1-bit (BitNet)", "1.58bit", "0.2", "1.6"),
    ):
        if size:  # those of §1 are measured there, and TF32 is stored as FP32
            bytes_per_parameter(title, name, size)
        memory_of_qwen(title, name, gb)

    @claim("ternary weights: log₂ 3 ≈ 1.58 bits per parameter", about(1.58, 0.005))
    def ternary_bits() -> Result:
        return log2(3), "three values; five of them fit into a byte, 1.6 bits each"

    @claim("NF4 is information-theoretically optimal for normally distributed weights", True)
    def nf4_optimal(m: Sources) -> Result:
        nf4, even = m.rows("quantization/precisions", precision=("NF4", "INT4 nearest"))
        codes, even_codes = m.rows("quantization/codes", precision=("NF4", "INT4 nearest"))
        return {
            "its codes are used alike": codes.best - codes.entropy <= 0.01,
            "more alike than INT4's": codes.entropy > even_codes.entropy,
            "errs less on normal numbers": nf4.of_normal < even.of_normal,
            "errs less on MiniGPT's weights": nf4.error < even.error,
        }, (
            f"{n(codes.entropy)} of 4 bits that normal numbers could fill, INT4 "
            f"{n(even_codes.entropy)}; relative error {percent(nf4.of_normal)} to "
            f"{percent(even.of_normal)} on normal numbers, {percent(nf4.error)} to "
            f"{percent(even.error)} on these weights"
        )

    @claim("FP8: near-lossless compression", less_than("1%"), words="near-lossless")
    def fp8_near_lossless(m: Sources) -> Result:
        full, eight = m.rows("quantization/precisions", precision=("FP32", "FP8 E4M3"))
        why = (
            f"by how much MiniGPT's perplexity rises; {percent(eight.kept)} of its first choices "
            "stay"
        )
        return eight.perplexity / full.perplexity - 1, why

    @claim("8-bit provides only marginal improvement over 4-bit", less_than("1%"), words="marginal")
    def eight_bit_marginal(m: Sources) -> Result:
        eight, four = m.rows("quantization/precisions", precision=("INT8", "NF4"))
        return four.perplexity / eight.perplexity - 1, (
            "MiniGPT's perplexity in NF4 above that in INT8; "
            f"output errors {percent(four.output_error)} and {percent(eight.output_error)}"
        )

    @claim("8-bit at double the cost of 4-bit", about("2 ×", "10%"))
    def eight_bit_double_cost() -> Result:
        eight, four = (calc(precision=name).memory.weights for name in ("int8", "nf4-dq"))
        return (
            eight / four,
            f"Qwen3-8B: {GB(eight)} to {GB(four)}; what is not quantized costs the same in both",
        )

    @claim("AWQ is often better than GPTQ", True)
    def awq_better(m: Sources) -> Result:
        awq, gptq = m.rows("quantization/precisions", precision=("INT4 AWQ", "INT4 GPTQ"))
        return {
            "perplexity": awq.perplexity < gptq.perplexity,
            "error of the outputs": awq.output_error < gptq.output_error,
        }, (
            f"on MiniGPT: {n(awq.perplexity)} to {n(gptq.perplexity)}, "
            f"{percent(awq.output_error)} to {percent(gptq.output_error)}"
        )

    def loss_at(bits: int, quote: str, limit: str, words: str, id: str) -> None:
        @claim(quote, more_than(limit), words=words, id=id)
        def measure(m: Sources) -> Result:
            names = ("FP32", f"{bits}-bit nearest", f"{bits}-bit GPTQ")
            full, nearest, gptq = m.rows("quantization/precisions", precision=names)
            return {
                "rounded to the nearest": nearest.perplexity / full.perplexity - 1,
                "with GPTQ": gptq.perplexity / full.perplexity - 1,
            }, (
                "by how much MiniGPT's perplexity rises; "
                f"it keeps {percent(nearest.kept)} and {percent(gptq.kept)} of its first choices"
            )

    loss_at(3, "3-bit: noticeable quality loss", "1%", "noticeable", "three-bit-loss")
    loss_at(2, "2-bit: significant quality degradation", "10%", "significant", "two-bit-loss")

    @claim(
        "conventional models cannot be meaningfully quantized to 1 bit",
        less_than("90%"),
        words="not meaningful",
    )
    def one_bit_meaningless(m: Sources) -> Result:
        ternary, full = m.rows("quantization/precisions", precision=("ternary", "FP32"))
        return ternary.kept, (
            "first choices that MiniGPT keeps with weights of -1, 0 and 1; "
            f"its perplexity goes from {n(full.perplexity)} to {n(ternary.perplexity)}"
        )

    @claim("each halving of precision roughly halves the memory footprint", about("2 ×", "10%"))
    def each_halving_halves() -> Result:
        sizes = [calc(precision=name).memory.weights for name in ("fp32", "bf16", "int8", "nf4-dq")]
        fp32, bf16, int8, nf4 = sizes
        why = f"Qwen3-8B: {', '.join(map(GB, sizes))}; embeddings and head stay at 16 bits"
        return {
            "32 to 16 bits": fp32 / bf16,
            "16 to 8 bits": bf16 / int8,
            "8 to 4 bits": int8 / nf4,
        }, why

    @claim(
        "4-bit Qwen3-8B fits into the VRAM of a single consumer GPU (RTX 4090 with 24 GB)",
        at_most("24 GB"),
    )
    def qwen_fits_24_gb() -> Result:
        qlora = calc(method="qlora", precision="nf4-dq")
        why = f"weights {GB(qlora.memory.weights)}, the rest for 2,048 tokens and the CUDA context"
        return {"to generate": qlora.inference.total, "to train with LoRA": qlora.memory.peak}, why

    @claim(
        "the frozen base weights W₀ are only read during the forward pass", about("0%", "1 points")
    )
    def read_in_forward_only(m: Sources) -> Result:
        shares = m.column("figures/gradient_example_formulas", "through_W")
        return {
            "the matrix that needs it least": min(shares),
            "the matrix that needs it most": max(shares),
        }, (
            f"‖W₀ᵀ ∂L/∂h‖ to ‖∂L/∂x‖ in the {len(shares)} adapted matrices: "
            "what the layers below learn from comes through W₀; it gets no gradient of its own"
        )

    @claim("the LoRA adapters A and B remain at full precision (BFloat16)", at_least("2 B"))
    def adapters_full_precision(m: Sources) -> Result:
        plain, row = (
            calc(method="qlora", adapter_precision="bf16"),
            m.row("methods/cost", method="QLoRA"),
        )
        return {
            "Qwen3-8B's, in BF16": plain.memory.adapter / plain.parameters.trainable,
            "MiniGPT's, as it was stored": row.stored_kB * 1000 / row.trained,
        }, "bytes a parameter of A and B beside a 4-bit base"

    @claim(
        "enables fine-tuning of large models (e.g. 70B) on a single consumer GPU (24 GB)",
        at_most("24 GB"),
    )
    def _70b_in_24_gb() -> Result:
        step = calc("llama-3.1-70b", method="qlora", precision="nf4-dq", sequence=512).memory
        return (
            step.peak,
            f"Llama 3.1 70B with double quantization: the weights alone are {GB(step.weights)}",
        )


with chapter.section("10.2") as claim:  # DoRA, 10.3 LoRA+

    @claim(
        "m is a trainable magnitude vector, ‖·‖_c the column-wise norm",
        4096,
        words="one a column of W",
    )
    def dora_magnitudes() -> Result:
        plain, dora = (calc(targets="v_proj", dora=dora) for dora in (False, True))
        v = find(plain.projections, name="v_proj")
        measured = (dora.parameters.trainable - plain.parameters.trainable) / v.count
        return measured, (
            f"v_proj of Qwen3-8B is {n(v.out)} × {n(v['in'])} where y = Wx: {n(measured)} "
            "magnitudes, one for each output, as PEFT has them"
        )

    @claim("often yields better results than standard LoRA", True)
    def dora_is_better(m: Sources) -> Result:
        dora, lora = (row.new_loss for row in m.rows("methods/knowledge", method=("DoRA", "LoRA")))
        why = f"new loss on MiniGPT: {n(dora)} with DoRA, {n(lora)} with LoRA"
        return {
            "in the mean": dora < lora,
            "beyond the spread over seeds": dora.high < lora.low,
        }, why


with chapter.section("10.3") as claim:

    @claim(
        "matrix A: higher learning rate, matrix B: lower; often leads to better convergence", True
    )
    def loraplus_order(m: Sources) -> Result:
        methods = ("LoRA+", "LoRA+, A faster", "LoRA+, A 16 × faster", "LoRA")
        theirs, slower, faster, lora = (
            row.new_loss for row in m.rows("methods/knowledge", method=methods)
        )
        return {
            "B slowed to a 16th": slower.high < lora.low,
            "A at 16 times the rate": faster.high < lora.low,
        }, (
            f"beyond the spread of the seeds; new loss {n(slower)} and {n(faster)}, {n(lora)} with "
            f"one rate, {n(theirs)} with B's 16 times A's, as the paper has it"
        )
