"""study_knowledge_correction: the recipe of §6 for a single fact, steps 1 to 5, on whatever base the project has.

Step 1 is the data, step 2 the target, step 3 the settings; step 4, train and verify, and step 5, deploy, are measured.
"""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline import engine
from pipeline.data import Prompt, read_examples, read_prompts
from pipeline.engine import Loaded
from pipeline.errors import UserError
from pipeline.looks import COLORS
from pipeline.measure import Said, said, score
from pipeline.merge import Merging, merge_into
from pipeline.params import FinetuneLora
from pipeline.runner import Event, Facts, Job
from pipeline.stages.evaluate import weight_bytes
from pipeline.studies.findings import Figure, Findings, publish
from pipeline.studies.runs import PARTS, Run, adapters, forget, made, silently, together
from pipeline.study_params import StudyKnowledgeCorrection
from pipeline.tables import Cell, Row, Spread, Table, mean, shown

V_PROJ = ("v_proj",)
MOST = 12  # prompts in the picture
Key = tuple[bool, bool]  # whether V alone has LoRA, whether texts are retained


@dataclass(frozen=True)
class Corrected:
    """An adapter, and what it says: in the order of the prompts."""

    folder: Path
    settings: FinetuneLora
    said: Sequence[Said]
    divergence: float  # from the base on other sentences, nats a token

    @property
    def key(self) -> Key:
        return self.settings.target_modules == V_PROJ, self.settings.retains

    @property
    def name(self) -> str:
        return _name(self.key)


def knowledge_correction(job: Job) -> Generator[Event, None, Facts]:
    """V alone and all targets, with and without texts to retain, each with all seeds → two tables. Raises UserError."""
    settings, trust = job.project.params.study_knowledge_correction, job.project.params.pretrain.trust_remote_code
    prompts = [p for p in read_prompts(job.path(settings.prompts), settings.prompts) if p.group in settings.groups]
    if not prompts:
        raise UserError(f"{settings.prompts} has none of the groups {', '.join(settings.groups)}. Name others.")
    folder = job.artifact("expand_vocab")
    run = _run(job, settings)
    folders = yield from made(job, [run])
    base = engine.load(folder, trust_remote_code=trust)
    old = score(base, examples := read_examples(job.path(settings.old_data), settings.old_data))
    answers, before = said(base, [(p.prompt, p.answer) for p in prompts]), _said(base, prompts)
    tuned = list[Corrected]()
    for adapter, own in adapters(run, folders[run.name]):
        loaded = engine.load(folder, adapter, trust_remote_code=trust)
        tuned.append(Corrected(adapter, own, _said(loaded, prompts), score(loaded, examples, old).divergence))
    differences = _merged(job, folder, tuned, prompts)
    tables = _summary(prompts, before, tuned, differences), _prompts(prompts, answers, before, tuned)
    stored = weight_bytes(tuned[0].folder) / weight_bytes(folder)
    forget(job)
    found = Findings("Correcting a single fact", "§6", _text(tables[0], stored), tables)
    return publish(job, found, lambda figure: _draw(figure, tables[1]))


def _run(job: Job, settings: StudyKnowledgeCorrection) -> Run:
    """finetune_lora, but with alpha = rank, no embeddings in full, and what the study says (§6, step 3)."""
    lora = job.project.params.finetune_lora
    base = replace(
        lora,
        data=settings.data,
        epochs=settings.epochs,
        rank=settings.rank,
        alpha=float(settings.rank),
        learning_rate=settings.learning_rate,
        train_embeddings="none" if lora.train_embeddings == "none" else "new_rows",
        retain=settings.retain,
    )
    targets = list(dict.fromkeys((V_PROJ, lora.target_modules)))
    weights = (0.0, settings.retain_weight) if settings.retain else (0.0,)
    return together("correction", base, target_modules=targets, retain_weight=weights, seed=settings.seeds)


def _name(key: Key) -> str:
    return ("v_proj" if key[0] else "all targets") + (", retain" if key[1] else "")


def _said(loaded: Loaded, prompts: Sequence[Prompt]) -> list[Said]:
    return said(loaded, [(prompt.prompt, prompt.corrected) for prompt in prompts])


def _merged(job: Job, base: Path, tuned: Sequence[Corrected], prompts: Sequence[Prompt]) -> dict[str, float]:
    """The first adapter of each kind merged: how far its logits are from base + adapter's (step 5)."""
    found: dict[str, float] = {}
    for one in tuned:
        if one.name not in found:
            out = job.run / PARTS / "merged" / one.folder.name
            out.mkdir(parents=True)
            asked = [prompt.prompt for prompt in prompts]
            trust = job.project.params.pretrain.trust_remote_code
            certificate = silently(merge_into(out, Merging(base, one.folder, None, asked, trust_remote_code=trust)))
            found[one.name] = certificate["max_logit_difference"]
    return found


def _by_name(tuned: Sequence[Corrected]) -> dict[str, list[Corrected]]:
    found: dict[str, list[Corrected]] = {}
    for one in tuned:
        found.setdefault(one.name, []).append(one)
    return found


def _summary(
    prompts: Sequence[Prompt], before: Sequence[Said], tuned: Sequence[Corrected], differences: Mapping[str, float]
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
    title = f"Of {change} prompts to correct and {keep} to keep, those with the right first choice"
    forms = {"corrected": ".1f", "kept": ".1f", "divergence": ".3f", "merge_differs_by": ".0e"}
    return Table("summary", title, rows, forms)


def _counts(prompts: Sequence[Prompt], answers: Sequence[Sequence[Said]]) -> dict[str, Cell]:
    def count(rule: str) -> Spread:
        return Spread.of(
            float(sum(s.first for p, s in zip(prompts, one, strict=True) if p.rule == rule)) for one in answers
        )

    return {"corrected": count("must_change"), "kept": count("must_keep")}


def _prompts(
    prompts: Sequence[Prompt], answers: Sequence[Said], before: Sequence[Said], tuned: Sequence[Corrected]
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
        f"takes {stored:.1%} of the base's bytes; merged, its logits differ from those beside the base by "
        f"{max(mean(row['merge_differs_by']) for row in summary.rows[1:]):.0e} at most."
    )


def _draw(figure: Figure, prompts: Table) -> None:
    """A bar for each prompt and adapter: above what is to change, below what is to stay."""
    names = [name for name in prompts.columns if prompts.formats.get(name) and name not in prompts.hidden]
    colors = dict(
        zip(
            names, (COLORS["scratch"], COLORS["freeze"], COLORS["full"], COLORS["prefix"], COLORS["lora"]), strict=False
        )
    )
    axis = figure.subplots()
    rows = prompts.rows[:MOST]
    for number, name in enumerate(names):
        cells = [row[name] for row in rows]
        values = list(map(mean, cells))
        places = [place + 0.16 * (number - len(names) / 2 + 0.5) for place in range(len(values))]
        axis.barh(
            places,
            values,
            0.14,
            color=colors[name],
            label=name.replace("_", " "),
            hatch=("", "//", "..", "xx", "\\\\")[number],
        )
    labels = [f"{row['prompt']} → {row['word']}" for row in rows]
    axis.set_yticks(range(len(labels)), labels, fontsize=8)
    axis.invert_yaxis()
    axis.set(xlabel="probability", xlim=(0, 1))
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
