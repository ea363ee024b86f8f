"""study_fact_correction: §6's tables (V only against all projections), and the effect of training embeddings and head.

The document gives rank and epochs but not learning rate, alpha and window. So a small grid of those is trained, and the
tables show the setting that comes nearest to the document's numbers.
"""

from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from msgspec.structs import replace

from pipeline.data.prompts import Prompt
from pipeline.document.params import StudyFactCorrection
from pipeline.document.studies import fact_tables, fact_words
from pipeline.document.studies.fact_tables import TARGETS, DocumentCell, Tuned, Words
from pipeline.document.studies.shared.next_token import ask, check_words, document, prompts_of
from pipeline.document.studies.shared.report import Findings, write_report
from pipeline.document.studies.shared.runner import (
    DOCUMENT,
    Run,
    adapters,
    delete_runs,
    describe_window,
    run_stage,
    sweep_run,
)
from pipeline.errors import UserError
from pipeline.inference import engine
from pipeline.project.runner import Event, Facts, Job
from pipeline.stages.methods.lora import FinetuneLora

GROUP = "fact_correction"


def run(job: Job) -> Generator[Event, None, Facts]:
    """Train the grid and the variants of embeddings with all seeds → five tables and a picture. Raises UserError."""
    settings = job.project.params.of(StudyFactCorrection)
    prompts = prompts_of(job, settings.prompts, GROUP)
    words = Words(prompts, list(_document_cells(job, settings, prompts)))
    texts = [prompt.prompt for prompt in prompts]
    base = job.artifact("expand_vocab")
    before = ask(engine.load(base), texts)
    check_words(before.loaded, words.expected, settings.prompts)
    check_words(before.loaded, [(cell.prompt, cell.word) for cell in words.claimed], settings.document)
    grid, others = _grid(settings), _embedding_variants(settings)
    folders = yield from run_stage(job, [*grid, *others])

    def tuned(runs: Sequence[Run]) -> list[Tuned]:
        pairs: list[tuple[Path, FinetuneLora]] = [pair for run in runs for pair in adapters(run, folders[run.name])]
        return [Tuned(folder, used, ask(engine.load(base, folder), texts)) for folder, used in pairs]

    search = fact_tables.GridSearch(before, tuned(grid), words.claimed)
    tables = (
        search.rows(),
        search.settings(),
        fact_tables.embeddings(words, before, tuned(others)),
        fact_tables.parts(words, before, search.of_nearest),
        search.top(settings.top_k),
    )
    delete_runs(job)
    findings = Findings("Fact correction", "§6", fact_words.describe(words, *tables[:4]), tables)
    return write_report(job, findings, lambda figure: fact_words.draw(figure, tables[0]), (10, 4.4))


def _lora(settings: StudyFactCorrection) -> FinetuneLora:
    return replace(DOCUMENT, data=settings.data, epochs=settings.epochs, rank=settings.rank)


def _grid(settings: StudyFactCorrection) -> list[Run]:
    """The settings that the document leaves open, with embeddings and head in full as in §9.2."""
    values: dict[str, Sequence[Any]] = {
        **{"target_modules": list(TARGETS.values()), "learning_rate": settings.learning_rates},
        **{"alpha": settings.alphas, "seed": settings.seeds},
    }
    return [
        sweep_run(describe_window(window), replace(_lora(settings), window=window), **values)
        for window in settings.windows
    ]


def _embedding_variants(settings: StudyFactCorrection) -> list[Run]:
    """Embeddings and head trained in full, in their new rows, or not at all; with and without retain texts."""
    base = replace(_lora(settings), alpha=float(settings.rank), retention_data=settings.retention_data)
    values: dict[str, Sequence[Any]] = {
        **{"target_modules": list(TARGETS.values()), "retention_weight": (0.0, settings.retention_weight)},
        **{"seed": settings.seeds},
    }
    kinds: tuple[Literal["all", "new_rows", "none"], ...] = ("all", "new_rows", "none")
    return [sweep_run(f"embeddings {kind}", replace(base, train_embeddings=kind), **values) for kind in kinds]


def _document_cells(job: Job, settings: StudyFactCorrection, prompts: Sequence[Prompt]) -> Iterator[DocumentCell]:
    """The cells of the document's tables. Raises UserError if a prompt of the document is not in the prompts file."""
    by_text = {prompt.prompt: prompt for prompt in prompts}
    rows = document(job.path(settings.document), settings.document, GROUP)
    for row in rows:
        prompt = by_text.get(row["prompt"])
        if prompt is None:
            raise UserError(f"{settings.document}: {row['prompt']!r} is not in {settings.prompts}. Add it there.")
        for model in ("original", *TARGETS):
            ((word, probability),) = row[model].items()
            yield DocumentCell(prompt.prompt, prompt.rule == "must_change", model, word, probability)
