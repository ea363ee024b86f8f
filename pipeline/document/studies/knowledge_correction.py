"""study_knowledge_correction: the recipe of §6 for a single fact, steps 1 to 5, on whatever base the project has.

Step 1 is the data, step 2 the target, step 3 the settings; step 4, train and verify, and step 5, deploy, are measured.
"""

import shutil
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.adapters.attach import adaptable
from pipeline.calc.target_modules import matches_suffix
from pipeline.data.examples import Prompt, read_examples, read_prompts
from pipeline.document.params import StudyKnowledgeCorrection
from pipeline.document.studies.shared.next_token import refuse_unsayable
from pipeline.document.studies.shared.report import Figure, Findings, write_report
from pipeline.document.studies.shared.runner import PARTS, Run, adapters, delete_runs, drain, run_stage, together
from pipeline.document.tables import Cell, Row, Spread, Table, mean, shown
from pipeline.errors import UserError
from pipeline.inference import engine
from pipeline.inference.agreement import SameLogits
from pipeline.inference.engine import LoadedModel
from pipeline.inference.score import AnswerScore, score, score_answers
from pipeline.models.base import CausalLM
from pipeline.project.palette import COLORS
from pipeline.project.params.sections import FinetuneLora
from pipeline.project.runner import Event, Facts, Job
from pipeline.stages.evaluate import weight_bytes
from pipeline.weights.merge import Merging, merge_into

V_PROJ = ("v_proj",)
AS_WRITTEN = "v_proj, as written"
MOST = 12  # prompts in the picture
LOOKS = {  # of the bars
    **{"base": (COLORS["scratch"], ""), AS_WRITTEN: (COLORS["prompt"], "--")},
    **{"v_proj": (COLORS["freeze"], "//"), "v_proj, retain": (COLORS["full"], "..")},
    **{"all targets": (COLORS["prefix"], "xx"), "all targets, retain": (COLORS["lora"], "\\\\")},
}


@dataclass(frozen=True)
class Corrected:
    """An adapter, the variant that it is of, and what it says: in the order of the prompts."""

    folder: Path
    name: str
    said: Sequence[AnswerScore]
    divergence: float  # from the base on other sentences, nats a token


def knowledge_correction(job: Job) -> Generator[Event, None, Facts]:
    """V alone and all targets, with and without texts to retain, and the recipe as it is written → two tables.

    Each with all seeds. Raises UserError.
    """
    settings, trust = job.project.params.of(StudyKnowledgeCorrection), job.project.params.pretrain.trust_remote_code
    prompts = [p for p in read_prompts(job.path(settings.prompts), settings.prompts) if p.group in settings.groups]
    if not prompts:
        raise UserError(f"{settings.prompts} has none of the groups {', '.join(settings.groups)}. Name others.")
    folder = job.artifact("expand_vocab")
    base = engine.load(folder, trust_remote_code=trust)
    refuse_unsayable(base, [(prompt.prompt, prompt.corrected) for prompt in prompts], settings.prompts)
    runs = _runs(job, settings, base.model)
    folders = yield from run_stage(job, runs)
    old = score(base, examples := read_examples(job.path(settings.old_data), settings.old_data))
    answers, before = score_answers(base, [(p.prompt, p.answer) for p in prompts]), _said(base, prompts)
    tuned = list[Corrected]()
    for adapter, name in (found for run in runs for found in _variants(run, folders[run.name])):
        loaded = engine.load(folder, adapter, trust_remote_code=trust)
        tuned.append(Corrected(adapter, name, _said(loaded, prompts), score(loaded, examples, old).divergence))
    differences = _merged(job, folder, tuned, prompts)
    tables = _summary(prompts, before, tuned, differences), _prompts(prompts, answers, before, tuned)
    stored = max(weight_bytes(one.folder) for one in tuned) / weight_bytes(folder)
    delete_runs(job)
    found = Findings("Correcting a single fact", "§6", _text(tables[0], stored), tables)
    height = max(4.0, 1 + 0.6 * len(tables[1].rows[:MOST]))
    labels = ["base", *_by_name(tuned)]
    return write_report(job, found, lambda figure: _draw(figure, tables[1], labels), (9, height))


def _runs(job: Job, settings: StudyKnowledgeCorrection, model: CausalLM) -> list[Run]:
    """finetune_lora, but with alpha = rank everywhere, no embeddings in full, and what the study says (§6, step 3).

    A model whose V has no linear of its own, such as GPT-2, has no variant with V alone.
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
    runs = [together("correction", base, target_modules=targets, retention_weight=weights, seed=settings.seeds)]
    if has_v:
        written = replace(base, learning_rate=settings.recipe_rate, target_modules=V_PROJ, retention_weight=0.0)
        runs.insert(0, together(AS_WRITTEN, written, seed=settings.seeds))
    return runs


def _variants(run: Run, folder: Path) -> list[tuple[Path, str]]:
    """Folder of each adapter that a run made, and what it is called."""
    return [(adapter, AS_WRITTEN if run.name == AS_WRITTEN else _name(own)) for adapter, own in adapters(run, folder)]


def _name(own: FinetuneLora) -> str:
    return ("v_proj" if own.target_modules == V_PROJ else "all targets") + (", retain" if own.retains else "")


def _said(loaded: LoadedModel, prompts: Sequence[Prompt]) -> list[AnswerScore]:
    return score_answers(loaded, [(prompt.prompt, prompt.corrected) for prompt in prompts])


def _merged(job: Job, base: Path, tuned: Sequence[Corrected], prompts: Sequence[Prompt]) -> dict[str, float]:
    """The first adapter of each kind merged: how far its logits are from base + adapter's (step 5)."""
    found: dict[str, float] = {}
    for one in tuned:
        if one.name not in found:
            out = job.run / PARTS / "merged" / one.folder.name
            shutil.rmtree(out, ignore_errors=True)  # of a study that was killed
            out.mkdir(parents=True)
            asked = [prompt.prompt for prompt in prompts]
            trust = job.project.params.pretrain.trust_remote_code
            same = SameLogits(base, one.folder, asked, trust_remote_code=trust)
            certificate = drain(merge_into(out, Merging(base, one.folder, None, trust), same))
            found[one.name] = certificate["max_logit_difference"]
    return found


def _by_name(tuned: Sequence[Corrected]) -> dict[str, list[Corrected]]:
    found: dict[str, list[Corrected]] = {}
    for one in tuned:
        found.setdefault(one.name, []).append(one)
    return found


def _summary(
    prompts: Sequence[Prompt],
    before: Sequence[AnswerScore],
    tuned: Sequence[Corrected],
    differences: Mapping[str, float],
) -> Table:
    """How many prompts have the corrected word first, how many that must keep theirs do, and how far the rest moved."""
    rows: list[Row] = [{"adapter": "none", **_counts(prompts, [before]), "divergence": 0.0, "merge_differs_by": None}]
    for name, of in _by_name(tuned).items():
        rows.append(
            {
                "adapter": name,
                **_counts(prompts, [one.said for one in of]),
                "divergence": Spread.of(one.divergence for one in of),
                "merge_differs_by": differences[name],
            }
        )
    change, keep = (sum(p.rule == rule for p in prompts) for rule in ("must_change", "must_keep"))
    title = f"Of {_counted(change)} to correct and {keep} to keep, those with the right first choice"
    forms = {"corrected": ".1f", "kept": ".1f", "divergence": ".3f", "merge_differs_by": ".0e"}
    return Table("summary", title, rows, forms)


def _counted(number: int) -> str:
    return f"{number} prompt{'' if number == 1 else 's'}"


def _counts(prompts: Sequence[Prompt], answers: Sequence[Sequence[AnswerScore]]) -> dict[str, Cell]:
    def count(rule: str) -> Spread:
        return Spread.of(
            float(sum(s.first for p, s in zip(prompts, one, strict=True) if p.rule == rule)) for one in answers
        )

    return {"corrected": count("must_change"), "kept": count("must_keep")}


def _prompts(
    prompts: Sequence[Prompt], answers: Sequence[AnswerScore], before: Sequence[AnswerScore], tuned: Sequence[Corrected]
) -> Table:
    """The probability of the word that should come, the corrected one where it is to change."""
    by_name = _by_name(tuned)
    rows: list[Row] = [
        {
            "prompt": prompt.prompt,
            "rule": prompt.rule.removeprefix("must_"),
            "word": prompt.corrected,
            "answer": prompt.answer,
            "answer_before": answers[number].probability,
            "base": before[number].probability,
            **{_column(n): Spread.of(one.said[number].probability or 0.0 for one in of) for n, of in by_name.items()},
        }
        for number, prompt in enumerate(prompts)
    ]
    names = ("base", *map(_column, by_name))
    forms = dict.fromkeys((*names, "answer_before"), ".0%")
    return Table("prompts", "Probability of the word that should come", rows, forms, ("answer", "answer_before"))


def _column(name: str) -> str:
    return name.replace(", ", "_").replace(" ", "_")


def _text(summary: Table, stored: float) -> str:
    told = "; ".join(
        f"{row['adapter']}: {shown(row['corrected'], '.1f')} corrected, {shown(row['kept'], '.1f')} kept, divergence "
        f"{shown(row['divergence'], '.3f')}"
        for row in summary.rows
    )
    return (
        f"{summary.title}: {told}. The divergence is from the base on other sentences, in nats a token. An adapter "
        f"takes {stored:.1%} of the base's bytes at most; merged, its logits differ from those beside the base by "
        f"{max(mean(row['merge_differs_by']) for row in summary.rows[1:]):.0e} at most."
    )


def _draw(figure: Figure, prompts: Table, labels: Sequence[str]) -> None:
    """A bar for each prompt and adapter: above what is to change, below what is to stay."""
    axis = figure.subplots()
    rows, step = prompts.rows[:MOST], 0.84 / len(labels)
    for number, label in enumerate(labels):
        color, hatch = LOOKS[label]
        values = [mean(row[_column(label)]) for row in rows]
        places = [place + step * (number - len(labels) / 2 + 0.5) for place in range(len(values))]
        axis.barh(places, values, 0.88 * step, color=color, hatch=hatch, label=label)
    asked = [f"{row['prompt']} → {row['word']}" for row in rows]
    axis.set_yticks(range(len(asked)), asked, fontsize=8)
    axis.invert_yaxis()
    axis.set(xlabel="probability", xlim=(0, 1))
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
