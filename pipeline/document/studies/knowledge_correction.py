"""study_knowledge_correction: the recipe of §6 for correcting a single fact, steps 1 to 5, on the project's own base.

Step 1 is the data, step 2 the target modules, step 3 the settings. Steps 4 (train and verify) and 5 (deploy) are
measured.
"""

import shutil
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from msgspec.structs import replace

from pipeline.adapters.attach import adaptable
from pipeline.calc.target_modules import matches_suffix
from pipeline.data.prompts import Prompt, read_prompts
from pipeline.data.read import read_examples
from pipeline.document.params import StudyKnowledgeCorrection
from pipeline.document.studies.shared.next_token import check_words
from pipeline.document.studies.shared.report import Figure, Findings, write_report
from pipeline.document.studies.shared.runner import PARTS, Run, adapters, delete_runs, drain, run_stage, sweep_run
from pipeline.document.tables import Cell, Row, Spread, Table, mean, shown
from pipeline.errors import UserError
from pipeline.inference import engine
from pipeline.inference.engine import LoadedModel
from pipeline.inference.score import AnswerScore, SameLogits, score, score_answers
from pipeline.models.base import CausalLM
from pipeline.project.runner import Event, Facts, Job
from pipeline.stages.evaluate import weight_bytes
from pipeline.stages.methods.lora import FinetuneLora
from pipeline.stages.registry import COLORS
from pipeline.weights.merge import Merging, merge_into

V_PROJ = ("v_proj",)
AS_WRITTEN = "v_proj, as written"
MAX_PROMPTS = 12  # in the picture
BAR_STYLES = {  # adapter → color and hatch
    **{"base": (COLORS["scratch"], ""), AS_WRITTEN: (COLORS["prompt"], "--")},
    **{"v_proj": (COLORS["freeze"], "//"), "v_proj, retain": (COLORS["full"], "..")},
    **{"all targets": (COLORS["prefix"], "xx"), "all targets, retain": (COLORS["lora"], "\\\\")},
}


@dataclass(frozen=True)
class Corrected:
    """An adapter, the name of its variant, and its answers in the order of the prompts."""

    folder: Path
    name: str
    answers: Sequence[AnswerScore]
    divergence: float  # from the base on other sentences, nats per token


def run(job: Job) -> Generator[Event, None, Facts]:
    """Train v_proj only, all targets, both with retain texts, and the recipe as written → two tables and a picture.

    Each variant is trained with all seeds. Raises UserError.
    """
    settings, trust = job.project.params.of(StudyKnowledgeCorrection), job.project.params.pretrain.trust_remote_code
    prompts = [p for p in read_prompts(job.path(settings.prompts), settings.prompts) if p.group in settings.groups]
    if not prompts:
        raise UserError(
            f"{settings.prompts} has none of the groups {', '.join(settings.groups)}. Change "
            "study_knowledge_correction.groups."
        )
    folder = job.artifact("expand_vocab")
    base = engine.load(folder, trust_remote_code=trust)
    check_words(base, [(prompt.prompt, prompt.corrected) for prompt in prompts], settings.prompts)
    runs = _runs(job, settings, base.model)
    folders = yield from run_stage(job, runs)
    old = score(base, examples := read_examples(job.path(settings.old_data), settings.old_data))
    originals = score_answers(base, [(p.prompt, p.answer) for p in prompts])
    before = _score_corrected(base, prompts)
    tuned = list[Corrected]()
    for adapter, name in (variant for run in runs for variant in _variants(run, folders[run.name])):
        loaded = engine.load(folder, adapter, trust_remote_code=trust)
        divergence = score(loaded, examples, old).divergence
        tuned.append(Corrected(adapter, name, _score_corrected(loaded, prompts), divergence))
    differences = _merge_differences(job, folder, tuned, prompts)
    tables = _summary(prompts, before, tuned, differences), _prompts(prompts, originals, before, tuned)
    stored = max(weight_bytes(adapter.folder) for adapter in tuned) / weight_bytes(folder)
    delete_runs(job)
    findings = Findings("Correcting a single fact", "§6", _text(tables[0], stored), tables)
    height = max(4.0, 1 + 0.6 * len(tables[1].rows[:MAX_PROMPTS]))
    labels = ["base", *_by_name(tuned)]
    return write_report(job, findings, lambda figure: _draw(figure, tables[1], labels), (9, height))


def _runs(job: Job, settings: StudyKnowledgeCorrection, model: CausalLM) -> list[Run]:
    """The runs: finetune_lora with the study's settings, alpha = rank and no embeddings in full (§6, step 3).

    A model without a separate V projection, such as GPT-2, has no variant with V only.
    """
    lora = job.project.params.finetune_lora
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
    has_v = any(matches_suffix(name, *V_PROJ) and adaptable(module) for name, module in model.named_modules())
    targets = list(dict.fromkeys((V_PROJ, lora.target_modules) if has_v else (lora.target_modules,)))
    weights = (0.0, settings.retention_weight) if settings.retention_data else (0.0,)
    runs = [sweep_run("correction", base, target_modules=targets, retention_weight=weights, seed=settings.seeds)]
    if has_v:
        written = replace(base, learning_rate=settings.recipe_rate, target_modules=V_PROJ, retention_weight=0.0)
        runs.insert(0, sweep_run(AS_WRITTEN, written, seed=settings.seeds))
    return runs


def _variants(run: Run, folder: Path) -> list[tuple[Path, str]]:
    """The folder and the variant's name of each adapter of a run."""
    return [
        (adapter, AS_WRITTEN if run.name == AS_WRITTEN else _variant_name(settings))
        for adapter, settings in adapters(run, folder)
    ]


def _variant_name(lora: FinetuneLora) -> str:
    return ("v_proj" if lora.target_modules == V_PROJ else "all targets") + (", retain" if lora.retains else "")


def _score_corrected(loaded: LoadedModel, prompts: Sequence[Prompt]) -> list[AnswerScore]:
    return score_answers(loaded, [(prompt.prompt, prompt.corrected) for prompt in prompts])


def _merge_differences(job: Job, base: Path, tuned: Sequence[Corrected], prompts: Sequence[Prompt]) -> dict[str, float]:
    """Merge each variant's first adapter (step 5). Returns the largest difference of its logits from base + adapter."""
    differences: dict[str, float] = {}
    texts, trust = [prompt.prompt for prompt in prompts], job.project.params.pretrain.trust_remote_code
    for adapter in tuned:
        if adapter.name not in differences:
            out = job.run / PARTS / "merged" / adapter.folder.name
            shutil.rmtree(out, ignore_errors=True)  # left over if the study was killed
            out.mkdir(parents=True)
            same = SameLogits(base, adapter.folder, texts, trust_remote_code=trust)
            certificate = drain(merge_into(out, Merging(base, adapter.folder, None, trust), same))
            differences[adapter.name] = certificate["max_logit_difference"]
    return differences


def _by_name(tuned: Sequence[Corrected]) -> dict[str, list[Corrected]]:
    groups: dict[str, list[Corrected]] = {}
    for adapter in tuned:
        groups.setdefault(adapter.name, []).append(adapter)
    return groups


def _summary(
    prompts: Sequence[Prompt],
    before: Sequence[AnswerScore],
    tuned: Sequence[Corrected],
    differences: Mapping[str, float],
) -> Table:
    """For each variant: corrected prompts, prompts kept, divergence from the base, and difference after merging."""
    rows: list[Row] = [{"adapter": "none", **_counts(prompts, [before]), "divergence": 0.0, "merge_differs_by": None}]
    for name, by_seed in _by_name(tuned).items():
        rows.append(
            {
                "adapter": name,
                **_counts(prompts, [adapter.answers for adapter in by_seed]),
                "divergence": Spread.of(adapter.divergence for adapter in by_seed),
                "merge_differs_by": differences[name],
            }
        )
    change, keep = (sum(p.rule == rule for p in prompts) for rule in ("must_change", "must_keep"))
    title = f"Of {_format_count(change)} to correct and {keep} to keep, those with the right first choice"
    formats = {"corrected": ".1f", "kept": ".1f", "divergence": ".3f", "merge_differs_by": ".0e"}
    return Table("summary", title, rows, formats)


def _format_count(number: int) -> str:
    return f"{number} prompt{'' if number == 1 else 's'}"


def _counts(prompts: Sequence[Prompt], answers: Sequence[Sequence[AnswerScore]]) -> dict[str, Cell]:
    def count(rule: str) -> Spread:
        return Spread.of(
            float(sum(s.first for p, s in zip(prompts, by_prompt, strict=True) if p.rule == rule))
            for by_prompt in answers
        )

    return {"corrected": count("must_change"), "kept": count("must_keep")}


def _prompts(
    prompts: Sequence[Prompt],
    originals: Sequence[AnswerScore],
    before: Sequence[AnswerScore],
    tuned: Sequence[Corrected],
) -> Table:
    """The probability of the expected word: the corrected answer for prompts that must change."""
    by_name = _by_name(tuned)
    rows: list[Row] = [
        {
            "prompt": prompt.prompt,
            "rule": prompt.rule.removeprefix("must_"),
            "word": prompt.corrected,
            "answer": prompt.answer,
            "answer_before": originals[number].probability,
            "base": before[number].probability,
            **{
                _column(n): Spread.of(a.answers[number].probability or 0.0 for a in by_seed)
                for n, by_seed in by_name.items()
            },
        }
        for number, prompt in enumerate(prompts)
    ]
    names = ("base", *map(_column, by_name))
    formats = dict.fromkeys((*names, "answer_before"), ".0%")
    return Table("prompts", "Probability of the expected word", rows, formats, ("answer", "answer_before"))


def _column(name: str) -> str:
    return name.replace(", ", "_").replace(" ", "_")


def _text(summary: Table, stored: float) -> str:
    results = "; ".join(
        f"{row['adapter']}: {shown(row['corrected'], '.1f')} corrected, {shown(row['kept'], '.1f')} kept, divergence "
        f"{shown(row['divergence'], '.3f')}"
        for row in summary.rows
    )
    return (
        f"{summary.title}: {results}. *Divergence* is the KL divergence from the base on other sentences, in nats per "
        f"token. An adapter takes {stored:.1%} of the base's bytes at most; after merging, its logits differ from base "
        f"+ adapter by {max(mean(row['merge_differs_by']) for row in summary.rows[1:]):.0e} at most."
    )


def _draw(figure: Figure, prompts: Table, labels: Sequence[str]) -> None:
    """One bar per prompt and adapter, in the order of the prompts."""
    axis = figure.subplots()
    rows, step = prompts.rows[:MAX_PROMPTS], 0.84 / len(labels)
    for number, label in enumerate(labels):
        color, hatch = BAR_STYLES[label]
        values = [mean(row[_column(label)]) for row in rows]
        positions = [row + step * (number - len(labels) / 2 + 0.5) for row in range(len(values))]
        axis.barh(positions, values, 0.88 * step, color=color, hatch=hatch, label=label)
    prompt_labels = [f"{row['prompt']} → {row['word']}" for row in rows]
    axis.set_yticks(range(len(prompt_labels)), prompt_labels, fontsize=8)
    axis.invert_yaxis()
    axis.set(xlabel="probability", xlim=(0, 1))
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
