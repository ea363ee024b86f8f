"""study_fact_correction: §6's tables, V-only against all projections, and what else that trains does to them.

The document gives rank and epochs; learning rate, alpha and window it leaves open. So a small grid of them is trained,
and the rows are those of the setting that comes nearest to the document's own.
"""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pipeline.data.examples import Prompt
from pipeline.document.params import StudyFactCorrection
from pipeline.document.studies import fact_tables, fact_words
from pipeline.document.studies.fact_tables import TARGETS, Said, Tuned, Words
from pipeline.document.studies.shared.next_token import ask, document, prompts_of, refuse_unsayable
from pipeline.document.studies.shared.report import Findings, write_report
from pipeline.document.studies.shared.runner import DOCUMENT, Run, adapters, delete_runs, named, run_stage, together
from pipeline.errors import UserError
from pipeline.inference import engine
from pipeline.project.params.sections import FinetuneLora
from pipeline.project.runner import Event, Facts, Job

GROUP = "fact_correction"


def fact_correction(job: Job) -> Generator[Event, None, Facts]:
    """The grid and what else can train, each with all seeds → five tables and a picture. Raises UserError."""
    settings = job.project.params.of(StudyFactCorrection)
    prompts = prompts_of(job, settings.prompts, GROUP)
    words = Words(prompts, list(_claimed(job, settings, prompts)))
    asked = [prompt.prompt for prompt in prompts]
    base = job.artifact("expand_vocab")
    before = ask(engine.load(base), asked)
    refuse_unsayable(before.loaded, words.due, settings.prompts)
    refuse_unsayable(before.loaded, [(said.prompt, said.word) for said in words.claimed], settings.document)
    grid, others = _grid(settings), _others(settings)
    folders = yield from run_stage(job, [*grid, *others])

    def tuned(runs: Sequence[Run]) -> list[Tuned]:
        found: list[tuple[Path, FinetuneLora]] = [pair for run in runs for pair in adapters(run, folders[run.name])]
        return [Tuned(folder, own, ask(engine.load(base, folder), asked)) for folder, own in found]

    tried = fact_tables.Tried(before, tuned(grid), words.claimed)
    tables = (
        tried.rows(),
        tried.settings(),
        fact_tables.embeddings(words, before, tuned(others)),
        fact_tables.parts(words, before, tried.of_nearest),
        tried.top(settings.top_k),
    )
    delete_runs(job)
    found = Findings("Fact correction", "§6", fact_words.in_words(words, *tables[:4]), tables)
    return write_report(job, found, lambda figure: fact_words.draw(figure, tables[0]), (10, 4.4))


def _lora(settings: StudyFactCorrection) -> FinetuneLora:
    return replace(DOCUMENT, data=settings.data, epochs=settings.epochs, rank=settings.rank)


def _grid(settings: StudyFactCorrection) -> list[Run]:
    """What the document leaves open, with embeddings and head training as it has them (§9.2)."""
    values: dict[str, Sequence[Any]] = {
        **{"target_modules": list(TARGETS.values()), "learning_rate": settings.learning_rates},
        **{"alpha": settings.alphas, "seed": settings.seeds},
    }
    return [together(named(window), replace(_lora(settings), window=window), **values) for window in settings.windows]


def _others(settings: StudyFactCorrection) -> list[Run]:
    """Embeddings and head in full, in their new rows, or not at all; with and without texts to retain."""
    base = replace(_lora(settings), alpha=float(settings.rank), retention_data=settings.retention_data)
    values: dict[str, Sequence[Any]] = {
        **{"target_modules": list(TARGETS.values()), "retention_weight": (0.0, settings.retention_weight)},
        **{"seed": settings.seeds},
    }
    kinds: tuple[Literal["all", "new_rows", "none"], ...] = ("all", "new_rows", "none")
    return [together(f"embeddings {kind}", replace(base, train_embeddings=kind), **values) for kind in kinds]


def _claimed(job: Job, settings: StudyFactCorrection, prompts: Sequence[Prompt]) -> Iterator[Said]:
    """The document's rows, for the prompts that are asked. Raises UserError for one that is not."""
    known = {prompt.prompt: prompt for prompt in prompts}
    rows = document(job.path(settings.document), settings.document, GROUP)
    for row in rows:
        prompt = known.get(row["prompt"])
        if prompt is None:
            raise UserError(f"{settings.document}: {row['prompt']!r} is not asked in {settings.prompts}. Add it there.")
        for model in ("original", *TARGETS):
            ((word, probability),) = row[model].items()
            yield Said(prompt.prompt, prompt.rule == "must_change", model, word, probability)
