"""The document's numbers of §1, §2.4, §3, §8 and §10.1, each beside the exact one, and why the two differ."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from pipeline.calc.memory import weight_bytes
from pipeline.calc.parameters import document_count, projections, trainable
from pipeline.calc.precision import precision
from pipeline.calc.settings import FULL, LORA
from pipeline.calc.shapes import Architecture
from pipeline.calc.sources import built_in

GB, MB, KB, MIB, KIB = 1e9, 1e6, 1e3, 2**20, 2**10
TOLERANCE = 0.05  # of a rounded number


@dataclass(frozen=True)
class Claim:
    """One number of the document and what it is exactly, both as `shown`; `why` where they differ."""

    section: str
    what: str
    document: str
    exact: str
    agrees: bool
    why: str = ""


def claims() -> list[Claim]:
    """Every number, in the document's order."""
    qwen, gpt3 = built_in("qwen3-8b").shapes, built_in("gpt-3-175b").shapes
    mini = built_in("minigpt").shapes
    return [
        *_section_1(qwen),
        *_section_2(mini, qwen, gpt3),
        *_section_3(mini, qwen),
        *_section_8(qwen),
        *_section_10(qwen),
    ]


def _about(section: str, what: str, said: float, exact: float, unit: float, name: str, why: str = "") -> Claim:
    """A rounded number: it agrees within 5%. The document writes MB and KB where it means 2²⁰ and 2¹⁰ bytes too."""
    agrees = abs(exact - said) <= TOLERANCE * said
    theirs = {"MiB": "MB", "KiB": "KB"}.get(name, name)
    return Claim(section, what, _number(said / unit, theirs), _number(exact / unit, name), agrees, why)


def _number(value: float, unit: str) -> str:
    return (f"{value:,.0f} {unit}" if value >= 1000 else f"{value:.4g} {unit}").strip()


def _same(section: str, what: str, said: int, exact: int, why: str = "") -> Claim:
    return Claim(section, what, f"{said:,}", f"{exact:,}", said == exact, why)


def _section_1(qwen: Architecture) -> Iterator[Claim]:
    two = "8.19 billion parameters, not 8"
    yield _about("1", "Qwen3-8B, parameters", 8e9, qwen.total, GB, "billion", two)
    yield _about("1", "weights in half precision", 16 * GB, weight_bytes(qwen, "bf16"), GB, "GB", two)
    yield _about("1", "weights and gradients", 32 * GB, 2 * weight_bytes(qwen, "bf16"), GB, "GB", two)
    yield _about(
        "1",
        "weights, gradients and Adam's two averages",
        48 * GB,
        4 * weight_bytes(qwen, "bf16"),
        GB,
        "GB",
        "weight, gradient and two averages are 4 × 16 GB at half precision, not 3 ×; 6 × with averages in fp32",
    )


def _section_2(mini: Architecture, qwen: Architecture, gpt3: Architecture) -> Iterator[Claim]:
    for name, model, rank, said, digits in (
        ("MiniGPT", mini, 4, 6.25, 2),
        ("Qwen3-8B", qwen, 8, 0.2, 1),
        ("GPT-3 175B", gpt3, 8, 0.065, 3),
    ):
        width = {"MiniGPT": 64, "Qwen3-8B": 4096, "GPT-3 175B": 12288}[name]
        yield _same("2.4", f"{name}, d_model", width, model.hidden)
        exact = 100 * rank / model.hidden
        yield Claim("2.4", f"{name}, {rank} / d_model", f"{said:g}%", f"{exact:.4g}%", round(exact, digits) == said)


def _section_3(mini: Architecture, qwen: Architecture) -> Iterator[Claim]:
    yield from _single(mini, "MiniGPT", 4, 4_096, 256, 512)
    yield from _single(qwen, "Qwen3-8B", 8, 16_777_216, 32_768, 65_536)
    yield _same("3", "MiniGPT, layers", 2, len(mini.blocks))
    yield _same("3", "Qwen3-8B, layers", 36, len(qwen.blocks))
    yield _about("3", "MiniGPT, parameters", 109_000, mini.total, 1, "")
    yield _same("3", "MiniGPT, LoRA parameters", 4_096, trainable(mini, replace(LORA, rank=4)))
    narrow = "k and v are 4,096 → 1,024 (8 key/value heads to 32 of q): 40,960 each, not 65,536"
    exact = trainable(qwen, LORA)
    yield _about("3", "Qwen3-8B, LoRA parameters", 9.4e6, exact, 1e6, "million", narrow)
    simplified = document_count(qwen, LORA)
    assert simplified is not None
    yield _same("3", "the same, every projection 4,096 × 4,096", 9_437_184, simplified)
    yield _about("3", "MiniGPT, adapter in FP16", 8 * KIB, 2 * 4_096, KIB, "KiB")
    yield _about("3", "Qwen3-8B, adapter in FP16", 18 * MIB, 2 * exact, MIB, "MiB", narrow)
    three = "the document counts weight and two averages, 12 bytes a parameter"
    yield _about("3", "MiniGPT, Adam in FP32", 48 * KIB, 12 * 4_096, KIB, "KiB")
    yield _about("3", "Qwen3-8B, Adam in FP32", 112 * MB, 12 * exact, MB, "MB", f"{narrow}; {three}")
    yield _about(
        "3",
        "Qwen3-8B in full, Adam alone",
        48 * GB,
        8 * trainable(qwen, FULL),
        GB,
        "GB",
        "two fp32 averages are 8 bytes a parameter, 65.5 GB; 48 GB counts 6 bytes (§1's 3 × 16 GB)",
    )
    yield Claim(
        "3",
        "full against LoRA, Adam's memory",
        "430 ×",
        f"{trainable(qwen, FULL) / exact:,.0f} ×",
        False,
        "the same bytes a parameter on both sides give the ratio of the parameters",
    )


def _single(model: Architecture, name: str, rank: int, weight: int, half: int, both: int) -> Iterator[Claim]:
    """§3's first table: one projection, q, which is square in both models."""
    q = next(p for p in projections(model, replace(LORA, rank=rank)) if p.name == "q_proj")
    yield _same("3", f"{name}, W of one projection", weight, q.inputs * q.outputs)
    yield _same("3", f"{name}, A", half, q.rank * q.inputs)
    yield _same("3", f"{name}, B", half, q.outputs * q.rank)
    yield _same("3", f"{name}, trainable in one projection", both, q.parameters_each)


def _section_8(qwen: Architecture) -> Iterator[Claim]:
    yield _about("8", "base model", 16 * GB, weight_bytes(qwen, "bf16"), GB, "GB", "8.19 billion parameters, not 8")
    yield _about(
        "8",
        "an adapter",
        35 * MB,
        2 * trainable(qwen, LORA),
        MB,
        "MB",
        "at §3's rank 8 in FP16 it is 15.3 MB; 35 MB would be rank 18 in FP16, or rank 9 in FP32",
    )


def _section_10(qwen: Architecture) -> Iterator[Claim]:
    rest = "embeddings and head (1.24 billion) stay at 16 bit"
    scales = f"{rest}, and each block of weights has a scale"
    for name, key, said, each, why in (
        ("FP32", "fp32", 32, 4, ""),
        ("TF32", "tf32", 32, 4, ""),
        ("FP16", "fp16", 16, 2, ""),
        ("BF16", "bf16", 16, 2, ""),
        ("FP8", "fp8", 8, 1, rest),
        ("INT8", "int8", 8, 1, rest),
        ("NF4", "nf4", 4, 0.5, scales),
        ("NF4, double quantization", "nf4-dq", 4, 0.5, scales),
        ("INT4 (GPTQ)", "gptq", 4, 0.5, scales),
        ("INT4 (AWQ)", "awq", 4, 0.5, scales),
        ("3-bit", "3bit", 3, 0.375, scales),
        ("2-bit", "2bit", 2, 0.25, scales),
        ("1-bit (BitNet)", "1.58bit", 1.6, 0.2, rest),
    ):
        kind = precision(key)
        yield _about("10.1", f"{name}, bytes a weight", each, kind.bytes, 1, "B", kind.what)
        yield _about("10.1", f"Qwen3-8B in {name}", said * GB, weight_bytes(qwen, key), GB, "GB", why)
    needed = weight_bytes(built_in("llama-3.1-70b").shapes, "nf4-dq")
    yield Claim(
        "10.1",
        "a 70B model's QLoRA on one GPU",
        "24 GB",
        f"{needed / GB:.1f} GB",
        False,
        "Llama 3.1 70B in NF4 with double quantization: the weights alone; 48 GB is the size that holds it",
    )
