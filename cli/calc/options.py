"""The options of `lora calc`. Values are checked by the calculator, so that each mistake is one message."""

from typing import Annotated

from typer import Option

Model = Annotated[str, Option("--model", help="Built-in name, folder, config.json, .safetensors, .gguf or hub id.")]

# what is trained
Kind = Annotated[str, Option("--method", help="Method: full, freeze, lora, qlora, prefix or prompt.")]
Rank = Annotated[int, Option("--rank", "--r", help="LoRA rank.")]
Alpha = Annotated[float | None, Option("--alpha", help="LoRA alpha; default: the rank.")]
Targets = Annotated[
    str, Option("--targets", help="attention, feed_forward, all-linear, or module names: q_proj,v_proj.")
]
Patterns = Annotated[
    list[str] | None,
    Option("--rank-pattern", metavar="PATTERN=RANK", help="Rank for modules that match PATTERN, as in PEFT."),
]
RsLora = Annotated[bool, Option("--rslora", help="Scale by alpha / √rank.")]
Dora = Annotated[bool, Option("--dora", help="DoRA: train magnitudes too.")]
Embeddings = Annotated[str, Option("--embeddings", help="Train embedding and head with LoRA: none, all or new_rows.")]
NewRows = Annotated[int, Option("--new-rows", help="Number of embedding rows to train; sets --embeddings new_rows.")]
LastBlocks = Annotated[int, Option("--last-blocks", help="Number of last blocks to train (freeze).")]
Ends = Annotated[bool, Option("--train-embeddings/--freeze-embeddings", help="Train embedding and head too (freeze).")]
VirtualTokens = Annotated[int, Option("--virtual-tokens", help="Number of virtual tokens (prefix, prompt).")]

# how it is trained
Batch = Annotated[int, Option("--batch", help="Batch size, in sequences.")]
Sequence = Annotated[
    int | None, Option("--sequence", "--seq", help="Sequence length, in tokens; default: 2,048 or the model's maximum.")
]
Weights = Annotated[
    str | None,
    Option("--precision", help="Precision of the base: fp32, bf16, int8, nf4, nf4-dq, gptq-g64 ...; default: bf16."),
]
AdapterPrecision = Annotated[str, Option("--adapter-precision", help="Precision of the adapter: fp32 or bf16.")]
Optimizer = Annotated[
    str,
    Option(
        "--optimizer", help="Optimizer: adamw, adamw-fp32, adamw-8bit, paged-adamw, adam-flat (this trainer's), sgd ..."
    ),
]
Checkpointing = Annotated[
    str | None,
    Option(
        "--checkpointing", help="Gradient checkpointing: none, selective (every second block) or full; default: full."
    ),
]
Attention = Annotated[str, Option("--attention", help="Attention: sdpa (flash and similar) or eager.")]
Loss = Annotated[str, Option("--loss", help="Logits in memory at once: full, labels or chunked.")]
LabelShare = Annotated[float, Option("--label-share", help="Fraction of tokens with a label (labels, chunked).")]
Chunk = Annotated[int, Option("--chunk", help="Labels per chunk (chunked).")]
Casts = Annotated[
    str, Option("--casts", help="What an fp32 adapter on a 16-bit base casts: weights (ours) or inputs (PEFT).")
]
Context = Annotated[int | None, Option("--context", help="CUDA context outside the allocator, in MiB; default: 512.")]

# what to show
Fit = Annotated[
    float | None, Option("--fit", metavar="GIB", help="Show what fits into this memory, and what to change.")
]
GpuName = Annotated[str | None, Option("--gpu", help="The same for a GPU: rtx4090, a100-80, h100 ...")]
Sweep = Annotated[str | None, Option("--sweep", metavar="KEY=A,B", help="Table over rank, sequence, precision ...")]
Trace = Annotated[bool, Option("--trace", help="Run the real step under fake tensors and compare the peaks.")]
Document = Annotated[bool, Option("--document", help="Show the document's numbers beside the exact ones.")]
List = Annotated[bool, Option("--list", help="List the built-in models.")]
Explain = Annotated[bool, Option("--explain", help="Show each number's formula with its values.")]
Csv = Annotated[bool, Option("--csv", help="Print CSV to stdout.")]
