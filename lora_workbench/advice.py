"""What is known before a training, and what published experiments advise: notes before it."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.calc.architecture import Architecture
    from pipeline.data.tokenizers.word import Tokenizer
    from pipeline.project.advice import Advice, Facts
    from pipeline.project.runner import Note
    from pipeline.project.stage_graph import Project, Stage

# examples that are tokenized, and that are counted: more change no advice
ENCODED, COUNTED = 500, 20_000


def advice_on(project: "Project", facts: "Sequence[Facts]") -> "Iterator[Advice]":
    from pipeline.project.advice import advise

    return chain.from_iterable(advise(project, of_stage) for of_stage in facts)


def is_advised(stage: "Stage") -> bool:
    """Whether it trains one thing by its own section; a sweep replaces settings on purpose."""
    return stage.name.startswith("finetune_") and stage.kind != "adapters"


def advice_notes(project: "Project", stage: "Stage") -> "Iterator[Note]":
    """A note for each rule that disagrees with the settings of a stage that is about to train."""
    from pipeline.project.params.edit import dump_inline
    from pipeline.project.runner import Note

    try:
        facts = gather_facts(project, [stage] if is_advised(stage) else [])
    except UserError:  # of the data: training says it too, after its own notes
        return
    for rule in advice_on(project, facts):
        yield Note(
            f"{rule.key} is {dump_inline(rule.yours)}; advised: {rule.advised}. {rule.why} "
            f"({rule.source})",
            True,
        )


def gather_facts(project: "Project", stages: "Sequence[Stage]") -> "list[Facts]":
    """What is known before they train, from headers and a part of their data. Raises UserError."""
    from pipeline.project.advice import Facts

    bases = map(project.artifact, ("expand_vocab", "pretrain"))
    folder = next((base for base in bases if base.is_dir()), None)
    model, tokenizer = None, None
    if stages and folder:
        from pipeline.data.tokenizers.word import load_tokenizer

        tokenizer = load_tokenizer(folder)
    # not there yet, or a family that the calculator does not know
    with suppress(UserError, OSError):
        model = _shapes(project, str(folder or project.params.origin.base))
    in_bf16 = any(project.section(stage).precision == "bf16" for stage in stages)
    precision = _fast_precision(model) if in_bf16 and project.params.origin.imports else None
    return [
        Facts(
            stage.name,
            **_count_parameters(project, stage, model),
            **_count_data(project, stage, tokenizer),
            left=_leaves_alpha(project, stage.section),
            measured=_measured_keys(project, stage),
            precision=precision,
        )
        for stage in stages
    ]


def _fast_precision(model: "Architecture | None") -> str:
    from pipeline.models.device import LARGE, device_for_size, fast_precision  # imports torch

    return fast_precision(device_for_size(model.total if model else LARGE))


def _leaves_alpha(project: "Project", section: str) -> bool:
    """Whether --set changes the rank, and alpha is set by a file."""
    from pipeline.project.params.load import OVERRIDE, PRETRAINED

    params = project.params
    changed = (
        hasattr(params.section(section), "rank") and params.source(section, "rank") == OVERRIDE
    )
    return changed and params.source(section, "alpha") not in (OVERRIDE, PRETRAINED)


def _measured_keys(project: "Project", stage: "Stage") -> tuple[str, ...]:
    """Keys that the project's sweep varied, if these settings are its best, or on its front."""
    from pipeline.files.artifact import read_json
    from pipeline.project.logs.run_log import TABLE

    stages = project.graph.product.values()
    sweep = next((other for other in stages if other.kind == "adapters"), None)
    if sweep is None or sweep.section != stage.name:
        return ()
    settings = project.section(stage)
    # there is none, or it is not ours
    with suppress(UserError, KeyError, TypeError, AttributeError, ValueError):
        rows = read_json(project.artifact(sweep.name) / TABLE, "")
        from pipeline.evaluation.selection import choose, pareto  # few projects have a sweep

        for name in {choose(rows), *pareto(rows)}:
            values = rows[name]["values"]
            if all(_plain(getattr(settings, key)) == value for key, value in values.items()):
                return tuple(values)
    return ()


def _plain(value: Any) -> Any:
    """A setting as JSON has it."""
    return list(value) if isinstance(value, tuple) else value


def _shapes(project: "Project", base: str) -> "Architecture | None":
    """The base's shapes from headers, or built in; else None. Raises UserError."""
    from pipeline.calc.sources.open_model import built_in, from_path, hub_ids
    from pipeline.files.base_model import MINIGPT, parse_source

    source = parse_source(base, project.root)
    if source.is_local:
        return from_path(source.path).shapes
    names = {hub_id: name for name, hub_id in hub_ids().items()}
    name = MINIGPT if source.kind == MINIGPT else names.get(source.hub_id)
    return built_in(name).shapes if name else None


def _count_parameters(
    project: "Project", stage: "Stage", model: "Architecture | None"
) -> dict[str, Any]:
    """Parameters of the base and of what trains, and the share of weights that get LoRA."""
    from pipeline.calc.method import ranks, trainable
    from pipeline.stages.registry import COUNTED as METHODS

    if model is None or stage.method not in METHODS:
        return {}
    method = METHODS[stage.method].with_params(project.section(stage))
    try:
        names = ranks(model, method) if method.low_rank else {}
        numbers = {"base": model.total, "trained": trainable(model, method)}
    except UserError:  # a target that the model lacks: training says it
        return {"base": model.total}
    adapted = sum(linear.weights for name, linear in model.linears() if name in names)
    return {**numbers, "adapted": adapted / model.quantizable if names else None}


def _count_data(
    project: "Project", stage: "Stage", tokenizer: "Tokenizer | None"
) -> dict[str, Any]:
    """Examples; with a tokenizer, trained tokens and the truncated share of the first ENCODED."""
    from pipeline.data.formats import iter_examples

    settings = project.section(stage)
    files = ((project.root / file.path, file) for file in settings.data_files)
    examples = chain.from_iterable(
        iter_examples(path, file.path, columns=file.columns, templated=settings.templated)
        for path, file in files
    )
    first = list(islice(examples, ENCODED))
    count = len(first) + sum(1 for _ in islice(examples, COUNTED - ENCODED))
    known = {"examples": count, "more": next(examples, None) is not None}
    if tokenizer is None:
        return known
    from pipeline.data.masking import Encoder

    encoded = [tokens for _, tokens in Encoder(tokenizer, settings.max_length).each(first)]
    labels = sum(tokens.labels for tokens in encoded)
    truncated = sum(bool(tokens.cut) for tokens in encoded)
    return {
        **known,
        "tokens": round(labels * count / len(first)),
        "cut": truncated / len(first),
    }
