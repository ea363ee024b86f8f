"""study_knowledge_correction: the recipe of §6 for correcting a single fact, steps 1 to 5, on the
project's own base.

Step 1 is the data, step 2 the target modules, step 3 the settings. Steps 4 (train and verify) and 5
(deploy) are measured.
"""

import shutil
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

from msgspec.structs import replace

from lab.measures import check_words
from lab.report import COLORS, Figure, Findings, legend_beside
from lab.runner import PARTS, Run, Trained, by, drain, sweep_run, train
from lab.studies import study_stage
from lab.tables import Row, Spread, Table, shown
from pipeline.data.answers.prompts import Prompt, read_prompts
from pipeline.data.formats import read_examples
from pipeline.errors import UserError
from pipeline.project.params.schema import Count, File, Rate, Section, Seed
from pipeline.project.runner import Event, Job
from pipeline.stages.methods.lora import FinetuneLora

if TYPE_CHECKING:
    from pipeline.inference.score import AnswerScore
    from pipeline.models.base import CausalLM

PLACE = "§6"
V_PROJ = ("v_proj",)
AS_WRITTEN = "v_proj, as written"
MAX_PROMPTS = 12  # in the picture
BAR_STYLES = {  # adapter → color and hatch
    "base": (COLORS["scratch"], ""),
    AS_WRITTEN: (COLORS["prompt"], "--"),
    "v_proj": (COLORS["freeze"], "//"),
    "v_proj, retain": (COLORS["full"], ".."),
    "all targets": (COLORS["prefix"], "xx"),
    "all targets, retain": (COLORS["lora"], "\\\\"),
}


class StudyKnowledgeCorrection(Section, frozen=True, kw_only=True):
    """§6, steps 1 to 5, on the project's own base. Trains as finetune_lora, except for these
    settings.
    """

    data: Annotated[
        File, "sentences that state the fact; empty: the project does not have this study"
    ] = ""
    retention_data: Annotated[File, "texts on which answers must stay the base's"] = (
        "data/retain.de.txt"
    )
    prompts: Annotated[str, "prompts with the answers they must keep, change or learn"] = (
        "data/prompts.yaml"
    )
    groups: Annotated[tuple[str, ...], "groups of prompts"] = ("knowledge_correction",)
    old_data: Annotated[str, "where the divergence from the base is measured"] = (
        "data/pretrain.de.txt"
    )
    seeds: Annotated[tuple[Seed, ...], "each is a run of its own"] = (0, 1, 2)
    epochs: Annotated[Count, "times that every example is seen"] = 80
    rank: Annotated[Count, "LoRA's rank"] = 4
    learning_rate: Annotated[Rate, "learning rate"] = 2e-3
    recipe_rate: Annotated[
        Rate, "learning rate of the document's recipe, on v_proj only (§6, step 3)"
    ] = 2e-4
    retention_weight: Annotated[Rate, "weight of the divergence from the base"] = 5.0


STAGE = study_stage(
    __name__,
    PLACE,
    title="Correcting a single fact",
    about="the recipe for a single fact, step by step, on any base",
    settings=StudyKnowledgeCorrection,
    data=("data", "retention_data", "prompts", "old_data"),
    extra_sections=("finetune_lora",),
    minigpt_only=False,
)


class Corrected(NamedTuple):
    """An adapter, the name of its variant, and its answers in the order of the prompts."""

    made: Trained
    name: str
    answers: "Sequence[AnswerScore]"
    divergence: float  # from the base on other sentences, nats per token


def measure(job: Job, settings: StudyKnowledgeCorrection) -> Generator[Event, None, Findings]:
    """Train v_proj only, all targets, both with retain texts, and the recipe as written → two
    tables.
    """
    from pipeline.evaluation.comparison import weight_bytes
    from pipeline.inference import engine
    from pipeline.inference.score import score, score_answers

    trust = job.project.params.origin.trust_remote_code
    prompts = [
        p
        for p in read_prompts(job.path(settings.prompts), settings.prompts)
        if p.group in settings.groups
    ]
    if not prompts:
        raise UserError(
            f"{settings.prompts} has none of the groups {', '.join(settings.groups)}. Change "
            "study_knowledge_correction.groups."
        )
    expected = [(prompt.prompt, prompt.corrected) for prompt in prompts]
    folder = job.artifact("expand_vocab")
    base = engine.load(folder, trust_remote_code=trust)
    check_words(base, expected, settings.prompts)
    made = yield from train(job, runs_of(settings, job.project.params.finetune_lora, base.model))
    old = score(base, examples := read_examples(job.path(settings.old_data), settings.old_data))
    originals = score_answers(base, [(prompt.prompt, prompt.answer) for prompt in prompts])
    before = score_answers(base, expected)
    tuned = list[Corrected]()
    for one in made:
        loaded = one.load(folder, trust)
        name = "v_proj" if one.settings.target_modules == V_PROJ else "all targets"
        if one.run == AS_WRITTEN:
            name = AS_WRITTEN
        elif one.settings.retains:
            name = f"{name}, retain"
        tuned.append(
            Corrected(
                one, name, score_answers(loaded, expected), score(loaded, examples, old).divergence
            )
        )
    variants = by(lambda one: one.name, tuned)
    merged = {
        name: _merge_difference(job, folder, by_seed[0], prompts)
        for name, by_seed in variants.items()
    }

    def right(rule: str, answers: "Sequence[Sequence[AnswerScore]]") -> Spread:
        """The number of prompts of a rule whose first choice is the expected word."""
        at = [number for number, prompt in enumerate(prompts) if prompt.rule == rule]
        return Spread.of(
            float(sum(by_prompt[number].first for number in at)) for by_prompt in answers
        )

    summary = list[Row]()
    for name, by_seed in {"none": list[Corrected](), **variants}.items():
        answers = [one.answers for one in by_seed] or [before]
        summary.append(
            {
                "adapter": name,
                "corrected": right("must_change", answers),
                "kept": right("must_keep", answers),
                "divergence": Spread.of(one.divergence for one in by_seed) if by_seed else 0.0,
                "merge_differs_by": merged.get(name),
            }
        )
    by_prompt: list[Row] = [  # of the corrected answer for prompts that must change
        {
            "prompt": prompt.prompt,
            "rule": prompt.rule.removeprefix("must_"),
            "word": prompt.corrected,
            "answer": prompt.answer,
            "answer_before": originals[n].probability,
            "base": before[n].probability,
            **{
                _column(name): Spread.of(one.answers[n].probability or 0.0 for one in by_seed)
                for name, by_seed in variants.items()
            },
        }
        for n, prompt in enumerate(prompts)
    ]
    change, keep = (
        sum(prompt.rule == rule for prompt in prompts) for rule in ("must_change", "must_keep")
    )
    corrections = f"{change} prompt{'' if change == 1 else 's'} to correct"
    title = f"Of {corrections} and {keep} to keep, those with the right first choice"
    formats = {"corrected": ".1f", "kept": ".1f", "divergence": ".3f", "merge_differs_by": ".0e"}
    percents = dict.fromkeys(("base", *map(_column, variants), "answer_before"), ".0%")
    tables = (
        Table("summary", title, summary, formats),
        Table(
            "prompts",
            "Probability of the expected word",
            by_prompt,
            percents,
            ("answer", "answer_before"),
        ),
    )
    stored = max(weight_bytes(one.made.folder) for one in tuned) / weight_bytes(folder)
    height = max(4.0, 1 + 0.6 * min(len(prompts), MAX_PROMPTS))
    labels = ["base", *variants]
    return Findings(
        _text(tables[0], stored),
        tables,
        lambda figure: _draw(figure, by_prompt, labels),
        (9, height),
    )


def runs_of(settings: StudyKnowledgeCorrection, lora: FinetuneLora, model: "CausalLM") -> list[Run]:
    """finetune_lora with the study's settings, alpha = rank and no embeddings in full (§6, step 3).

    A model without a separate V projection, such as GPT-2, has no variant with V only.
    """
    from pipeline.adapters.attach import adaptable
    from pipeline.calc.target_modules import matches_suffix

    base = replace(
        lora,
        data=settings.data,
        epochs=settings.epochs,
        rank=settings.rank,
        alpha=float(settings.rank),
        rank_pattern={},
        alpha_pattern={},
        learning_rate=settings.learning_rate,
        train_embeddings="none" if lora.train_embeddings == "none" else "new_rows",
        retention_data=settings.retention_data,
    )
    has_v = any(
        matches_suffix(name, *V_PROJ) and adaptable(module)
        for name, module in model.named_modules()
    )
    targets = list(
        dict.fromkeys((V_PROJ, lora.target_modules) if has_v else (lora.target_modules,))
    )
    weights = (0.0, settings.retention_weight) if settings.retention_data else (0.0,)
    grid = {"target_modules": targets, "retention_weight": weights, "seed": settings.seeds}
    runs = [sweep_run("correction", base, grid)]
    if has_v:
        written = replace(
            base, learning_rate=settings.recipe_rate, target_modules=V_PROJ, retention_weight=0.0
        )
        runs.insert(0, sweep_run(AS_WRITTEN, written, {"seed": settings.seeds}))
    return runs


def _column(name: str) -> str:
    return name.replace(", ", "_").replace(" ", "_")


def _merge_difference(job: Job, base: Path, tuned: Corrected, prompts: Sequence[Prompt]) -> float:
    """Merge an adapter (step 5). Returns the largest difference of the merged logits from base +
    adapter's.
    """
    from pipeline.inference.score import SameLogits
    from pipeline.weights.merge import Merging, merge_into

    trust, adapter = job.project.params.origin.trust_remote_code, tuned.made.folder
    out = job.run / PARTS / "merged" / adapter.name
    shutil.rmtree(out, ignore_errors=True)  # left over if the study was killed
    out.mkdir(parents=True)
    same = SameLogits(base, adapter, [prompt.prompt for prompt in prompts], trust_remote_code=trust)
    certificate = drain(merge_into(out, Merging(base, adapter, None, trust), same))
    return float(certificate["max_logit_difference"])


def _text(summary: Table, stored: float) -> str:
    results = "; ".join(
        f"{row['adapter']}: {shown(row['corrected'], '.1f')} corrected, "
        f"{shown(row['kept'], '.1f')} kept, divergence {shown(row['divergence'], '.3f')}"
        for row in summary.rows
    )
    return (
        f"{summary.title}: {results}. *Divergence* is the KL divergence from the base on other "
        f"sentences, in nats per token. An adapter takes {stored:.1%} of the base's bytes at most; "
        "after merging, its logits differ from base + adapter by "
        f"{max(row['merge_differs_by'] for row in summary.rows[1:]):.0e} at most."
    )


def _draw(figure: Figure, prompts: Sequence[Row], labels: Sequence[str]) -> None:
    """One bar per prompt and adapter, in the order of the prompts."""
    axis = figure.subplots()
    rows, step = prompts[:MAX_PROMPTS], 0.84 / len(labels)
    for number, label in enumerate(labels):
        color, hatch = BAR_STYLES[label]
        positions = [row + step * (number - len(labels) / 2 + 0.5) for row in range(len(rows))]
        values = [row[_column(label)] for row in rows]
        axis.barh(positions, values, 0.88 * step, color=color, hatch=hatch, label=label)
    axis.set_yticks(
        range(len(rows)), [f"{row['prompt']} → {row['word']}" for row in rows], fontsize=8
    )
    axis.invert_yaxis()
    axis.set(xlabel="probability", xlim=(0, 1))
    legend_beside(axis)
