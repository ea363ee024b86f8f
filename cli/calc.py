"""`lora calc`: what a fine-tuning run trains, needs and fits on, before anything is downloaded."""

import re

from cli import calc_options as o
from cli.options import JsonOption, group
from pipeline.errors import UserError

app = group()


@app.command()
def calc(
    model: o.Model = "qwen3-8b",
    method: o.Kind = "lora",
    rank: o.Rank = 8,
    alpha: o.Alpha = None,
    targets: o.Targets = "attention",
    rank_pattern: o.Patterns = None,
    rslora: o.RsLora = False,
    dora: o.Dora = False,
    embeddings: o.Embeddings = "none",
    new_rows: o.NewRows = 0,
    last_blocks: o.LastBlocks = 1,
    train_embeddings: o.Ends = True,
    virtual_tokens: o.VirtualTokens = 20,
    batch: o.Batch = 1,
    sequence: o.Sequence = None,
    precision: o.Weights = None,
    adapter_precision: o.AdapterPrecision = "fp32",
    optimizer: o.Optimizer = "adamw",
    checkpointing: o.Checkpointing = None,
    attention: o.Attention = "sdpa",
    loss: o.Loss = "full",
    label_share: o.LabelShare = 1.0,
    chunk: o.Chunk = 1024,
    casts: o.Casts = "weights",
    context: o.Context = None,
    fit: o.Fit = None,
    gpu: o.GpuName = None,
    sweep: o.Sweep = None,
    trace: o.Trace = False,
    document: o.Document = False,
    list_: o.List = False,
    explain: o.Explain = False,
    as_json: JsonOption = False,
    as_csv: o.Csv = False,
) -> None:
    """Parameters, memory and what fits, exact, from shapes alone: nothing is downloaded, no GPU is needed."""
    from cli import calc_screens as screens
    from pipeline.calc.memory import refuse_impossible
    from pipeline.calc.settings import Method, Run, checked
    from pipeline.calc.sources import open_model

    out = screens.Output(as_json, as_csv)
    if list_ or document:
        (screens.models if list_ else screens.document)(out)
        return
    opened = open_model(model)
    if method == "qlora":  # LoRA on a quantized base
        method, precision = "lora", precision or "nf4-dq"
    ours = opened.shapes.style.ours  # MiniGPT trains in fp32, keeps every tensor, and runs on the CPU
    asked = Method(
        method,
        rank,
        float(rank) if alpha is None else alpha,
        tuple(name.strip() for name in targets.split(",")),
        tuple(map(_pattern, rank_pattern or [])),
        rslora,
        dora,
        "new_rows" if new_rows and embeddings == "none" else embeddings,
        new_rows,
        last_blocks,
        train_embeddings,
        virtual_tokens,
    )
    run = Run(
        batch,
        min(2048, opened.shapes.context) if sequence is None else sequence,
        precision or ("fp32" if ours else "bf16"),
        adapter_precision,
        optimizer,
        checkpointing or ("none" if ours else "full"),
        attention,
        loss,
        label_share,
        chunk,
        casts,
        (0 if ours else 512 * 2**20) if context is None else context * 2**20,
    )
    checked(asked, run)
    refuse_impossible(opened.shapes, asked, run)
    question = screens.Question(opened, asked, run)
    if sweep:
        screens.sweep(out, question, *_sweep(sweep))
    elif fit is not None or gpu:
        screens.fit(out, question, fit, gpu)
    elif trace:
        screens.trace(out, question)
    elif explain:
        screens.explain(out, question)
    else:
        screens.overview(out, question)


def _pattern(text: str) -> tuple[str, int]:
    pattern, _, rank = text.rpartition("=")
    if not pattern or not rank.isdigit() or not int(rank):
        raise UserError(f"rank-pattern takes PATTERN=RANK, such as q_proj=16, got {text!r}.")
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(f"rank-pattern {pattern!r} is no regular expression: {error}.") from None
    return pattern, int(rank)


def _sweep(text: str) -> tuple[str, list[str]]:
    key, _, values = text.partition("=")
    found = [value.strip() for value in values.split(",") if value.strip()]
    if not found:
        raise UserError(f"sweep takes KEY=A,B,..., such as rank=1,2,4,8, got {text!r}.")
    return key.strip(), found
