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
    asked_for = {
        "--list": list_,
        "--document": document,
        "--sweep": sweep is not None,
        "--fit": fit is not None,
        "--gpu": gpu is not None,
        "--trace": trace,
        "--explain": explain,
    }
    question = _the_one(name for name, given in asked_for.items() if given)
    if question in ("--list", "--document"):
        from cli.calc import render

        (render.models if list_ else render.document)(out)
        return
    opened = open_model(model)
    asked = parse_method(
        method,
        rank,
        alpha,
        targets,
        rank_pattern=tuple(map(_pattern, rank_pattern or [])),
        rslora=rslora,
        dora=dora,
        embeddings=embeddings,
        new_rows=new_rows,
        last_blocks=last_blocks,
        train_embeddings=train_embeddings,
        virtual_tokens=virtual_tokens,
    )
    run = parse_training_config(
        opened.shapes,
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
    validate(asked, run)
    refuse_impossible(opened.shapes, asked, run)
    _answer(out, Question(opened, asked, run), question, sweep or "", fit, gpu)


def _the_one(given: Iterable[str]) -> str:
    """The question among the options, or none. Raises UserError for more than one."""
    names = list(given)
    if len(names) > 1:
        raise UserError(f"one question at a time: {' and '.join(names)} were asked together.")
    return names[0] if names else ""


def _answer(out: "Output", asked: "Question", question: str, sweep: str, fit: float | None, gpu: str | None) -> None:
    if not question:
        from cli.calc.overview import overview

        overview(out, asked)
        return
    from cli.calc import render

    if question == "--sweep":
        render.sweep(out, asked, *_sweep(sweep))
    elif question == "--trace":
        render.trace(out, asked)
    elif question == "--explain":
        render.explain(out, asked)
    else:
        render.fit(out, asked, fit, gpu)


def _pattern(text: str) -> tuple[str, int]:
    pattern, _, rank = text.rpartition("=")
    if not pattern or not re.fullmatch(r"[0-9]{1,9}", rank) or not int(rank):
        raise UserError(f"rank-pattern takes PATTERN=RANK, such as q_proj=16, got {text[:60]!r}.")
    if why := problem(end_pattern(pattern)):
        raise UserError(f"rank-pattern {pattern[:60]!r} is no regular expression: {why}.")
    return pattern, int(rank)


def _sweep(text: str) -> tuple[str, list[str]]:
    key, _, values = text.partition("=")
    found = [value.strip() for value in values.split(",") if value.strip()]
    if not found:
        raise UserError(f"sweep takes KEY=A,B,..., such as rank=1,2,4,8, got {text!r}.")
    return key.strip(), found
