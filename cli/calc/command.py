"""`lora calc`: what a fine-tuning run trains, needs and fits on, before anything is downloaded."""

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from cli.calc import options as o
from cli.options import JsonOption, group
from pipeline.errors import UserError
from pipeline.files.patterns import end_pattern, problem

if TYPE_CHECKING:
    from cli.calc.output import Output, Question

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
    """Exact parameters, training memory, what fits your GPU.

    Computed from shapes alone: nothing is downloaded, no GPU is needed.
    """
    from cli.calc.output import Output, Question
    from pipeline.calc.memory import refuse_impossible
    from pipeline.calc.settings import parse_method, parse_training_config, validate
    from pipeline.calc.sources.open_model import open_model

    out = Output(as_json, as_csv)
    questions = {
        "--list": list_,
        "--document": document,
        "--sweep": sweep is not None,
        "--fit": fit is not None,
        "--gpu": gpu is not None,
        "--trace": trace,
        "--explain": explain,
    }
    question = _only(name for name, is_given in questions.items() if is_given)
    if question in ("--list", "--document"):
        from cli.calc import render

        (render.models if list_ else render.document)(out)
        return
    loaded = open_model(model)
    parsed_method = parse_method(
        method,
        rank,
        alpha,
        targets,
        rank_pattern=tuple(map(_parse_rank_pattern, rank_pattern or [])),
        rslora=rslora,
        dora=dora,
        embeddings=embeddings,
        new_rows=new_rows,
        last_blocks=last_blocks,
        train_embeddings=train_embeddings,
        virtual_tokens=virtual_tokens,
    )
    run = parse_training_config(
        loaded.shapes,
        method,
        batch=batch,
        sequence=sequence,
        precision=precision,
        adapter_precision=adapter_precision,
        optimizer=optimizer,
        checkpointing=checkpointing,
        attention=attention,
        loss=loss,
        label_share=label_share,
        chunk=chunk,
        casts=casts,
        context=None if context is None else context * 2**20,
        virtual_tokens=virtual_tokens,
    )
    validate(parsed_method, run)
    refuse_impossible(loaded.shapes, parsed_method, run)
    _render(out, Question(loaded, parsed_method, run), question, sweep or "", fit, gpu)


def _only(given: Iterable[str]) -> str:
    """The only option in `given`, or "". Raises UserError for more than one."""
    names = list(given)
    if len(names) > 1:
        raise UserError(f"{' and '.join(names)} exclude each other. Use one of them.")
    return names[0] if names else ""


def _render(
    out: "Output", configuration: "Question", question: str, sweep: str, fit: float | None, gpu: str | None
) -> None:
    if not question:
        from cli.calc.overview import overview

        overview(out, configuration)
        return
    from cli.calc import render

    if question == "--sweep":
        render.sweep(out, configuration, *_parse_sweep(sweep))
    elif question == "--trace":
        render.trace(out, configuration)
    elif question == "--explain":
        render.explain(out, configuration)
    else:
        render.fit(out, configuration, fit, gpu)


def _parse_rank_pattern(text: str) -> tuple[str, int]:
    pattern, _, rank = text.rpartition("=")
    if not pattern or not re.fullmatch(r"[0-9]{1,9}", rank) or not int(rank):
        raise UserError(f"rank-pattern takes PATTERN=RANK, such as q_proj=16, got {text[:60]!r}.")
    if reason := problem(end_pattern(pattern)):
        raise UserError(f"rank-pattern {pattern[:60]!r} is not a valid regular expression: {reason}.")
    return pattern, int(rank)


def _parse_sweep(text: str) -> tuple[str, list[str]]:
    key, _, values = text.partition("=")
    choices = [value.strip() for value in values.split(",") if value.strip()]
    if not choices:
        raise UserError(f"sweep takes KEY=A,B,..., such as rank=1,2,4,8, got {text!r}.")
    return key.strip(), choices
