"""The options of `lora calc`: one line each, checked by the calculator, so that each mistake is one message."""

from typing import Annotated

from typer import Option

Model = Annotated[str, Option("--model", help="A built-in name, folder, config.json, .safetensors, .gguf, or hub id.")]

# what trains
Kind = Annotated[str, Option("--method", help="full, freeze, lora, qlora, prefix or prompt.")]
Rank = Annotated[int, Option("--rank", "--r", help="LoRA's rank.")]
Alpha = Annotated[float | None, Option("--alpha", help="LoRA's alpha; default: the rank.")]
Targets = Annotated[str, Option("--targets", help="attention, feed_forward, all-linear, or names: q_proj,v_proj.")]
Patterns = Annotated[
    list[str] | None,
    Option("--rank-pattern", metavar="PATTERN=RANK", help="Another rank for some modules, as in PEFT."),
]
RsLora = Annotated[bool, Option("--rslora", help="Scale by alpha / √rank.")]
Dora = Annotated[bool, Option("--dora", help="DoRA: magnitudes train too.")]
Embeddings = Annotated[str, Option("--embeddings", help="Embedding and head with LoRA: none, all or new_rows.")]
NewRows = Annotated[int, Option("--new-rows", help="Rows that train; sets --embeddings new_rows.")]
LastBlocks = Annotated[int, Option("--last-blocks", help="Blocks that train with freeze.")]
Ends = Annotated[bool, Option("--train-embeddings/--freeze-embeddings", help="Embedding and head with freeze.")]
VirtualTokens = Annotated[int, Option("--virtual-tokens", help="Of prefix and prompt tuning.")]

# how it runs
Batch = Annotated[int, Option("--batch", help="Sequences a step.")]
Sequence = Annotated[int | None, Option("--sequence", "--seq", help="Tokens a sequence; default: 2,048 or all it can.")]
Weights = Annotated[
    str | None, Option("--precision", help="Of the base: fp32, bf16, int8, nf4, nf4-dq, gptq-g64 ...; default: bf16.")
]
AdapterPrecision = Annotated[str, Option("--adapter-precision", help="fp32 or bf16.")]
Optimizer = Annotated[
    str, Option("--optimizer", help="adamw, adamw-fp32, adamw-8bit, paged-adamw, adam-flat (this trainer's), sgd ...")
]
Checkpointing = Annotated[
    str | None, Option("--checkpointing", help="none, selective (every second block) or full; default: full.")
]
Attention = Annotated[str, Option("--attention", help="sdpa (flash and its like) or eager.")]
Loss = Annotated[str, Option("--loss", help="Which logits are alive at once: full, labels or chunked.")]
LabelShare = Annotated[float, Option("--label-share", help="Share of the tokens with a label (labels, chunked).")]
Chunk = Annotated[int, Option("--chunk", help="Labels a chunk.")]
Casts = Annotated[
    str, Option("--casts", help="An fp32 adapter on a 16-bit base casts weights (ours) or inputs (PEFT).")
]
Context = Annotated[int | None, Option("--context", help="MiB of CUDA context, outside the allocator; default: 512.")]

# what is asked
Fit = Annotated[float | None, Option("--fit", metavar="GIB", help="The most that fits, and what to change.")]
GpuName = Annotated[str | None, Option("--gpu", help="The same for a GPU: rtx4090, a100-80, h100 ...")]
Sweep = Annotated[str | None, Option("--sweep", metavar="KEY=A,B", help="A table over rank, sequence, precision ...")]
Trace = Annotated[bool, Option("--trace", help="Run the real step under fake tensors; peak beside the formula's.")]
Document = Annotated[bool, Option("--document", help="The document's numbers beside the exact ones.")]
List = Annotated[bool, Option("--list", help="The built-in models.")]
Explain = Annotated[bool, Option("--explain", help="Each number's formula, with the values put in.")]
Csv = Annotated[bool, Option("--csv", help="Comma-separated rows on stdout.")]
