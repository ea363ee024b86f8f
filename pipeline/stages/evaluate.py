"""evaluate: compares learning and forgetting of the project's variants."""

import os
from collections.abc import Generator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from pipeline.adapters.config import CONFIG
from pipeline.data.answers.prompts import Prompt, read_prompts
from pipeline.data.examples import Example
from pipeline.data.formats import read_examples
from pipeline.errors import UserError
from pipeline.evaluation.answers import Answers
from pipeline.evaluation.comparison import cost, stages_by_variant, weight_bytes
from pipeline.evaluation.limits import verdict
from pipeline.evaluation.measured_entries import FIRST, MeasuredEntries
from pipeline.evaluation.measuring import MEASURED, measuring
from pipeline.evaluation.samples import count_answers, sample_answers
from pipeline.evaluation.tasks import Task, read_tasks
from pipeline.files import artifact
from pipeline.files.artifact import write_json
from pipeline.inference.catalog import BASES, find_base
from pipeline.inference.engine import LoadedModel, variant_folders
from pipeline.inference.model_pool import ModelPool
from pipeline.inference.score import (
    EvalScores,
    agreement,
    completes_correctly,
    score,
    score_answers,
)
from pipeline.project.cache import NAMED
from pipeline.project.entries import open_cache
from pipeline.project.logs.run_log import LOSS, final_loss, flat_from, read_steps
from pipeline.project.params.load import TRAINING
from pipeline.project.params.sections import Evaluate, Training
from pipeline.project.runner import Event, Facts, Job, Progress
from pipeline.project.stage_graph import Project
from pipeline.stages.report import draw_comparison, write_report
from pipeline.training.data import held_out_examples, training_examples
from pipeline.weights.merge import CERTIFICATE

METRICS, PREDICTIONS, SAMPLES = "metrics.json", "predictions.json", "samples.json"
REPORT, PICTURE = "report.md", "finetuning_comparison.png"
# numbers of `_cost` that a merged model does not share with its adapter
TRAINED = ("trainable", "trainable_percent", "preferences")
# nats per token, as reports have three digits. A merge that rounds to 16 bits may exceed it: it is
# then measured
ALIKE = 1e-3
SCORES = ("probability", "first", "corrected_probability", "corrected_first", "top_k")


def run(job: Job) -> Generator[Event, None, Facts]:
    """Evaluate all variants → metrics, predictions, samples, report.md and the picture.

    The manifest's `variants` maps each variant to the artifact that was measured; its `gate` says
    which limits they keep.
    """
    project = job.project
    for stage in project.needs(job.stage):
        job.artifact(stage)
    measured = _Measured(job)
    answers, predictions, samples = measured.answers, measured.predictions, measured.samples
    metrics: dict[str, Any] = {}
    same = _certified(project)
    folders = variant_folders(project)
    models = {name: folders[name] for name in folders if name not in same}
    total, trusted = len(project.variants) - len(same), project.params.origin.trust_remote_code
    for done, loaded in enumerate(ModelPool().in_turn(models, trusted)):
        yield Progress(done, total, loaded.name)
        metrics[loaded.name] = {**measured.add(loaded), **_cost(project, loaded.name)}
    yield Progress(total, total)

    for merged, adapter in same.items():
        shared = {key: value for key, value in metrics[adapter].items() if key not in TRAINED}
        metrics[merged] = {**shared, "measured_as": adapter, **_cost(project, merged)}
        predictions[merged], samples[merged] = predictions[adapter], samples[adapter]
        answers.copy(adapter, merged)
    for rows in answers.predictions().get("tasks", {}).values():
        for row in rows:
            row["answers"] = _in_order(project, row["answers"])
    metrics, predictions, samples = (
        _in_order(project, by_variant) for by_variant in (metrics, predictions, samples)
    )

    trained = [stage for stage in project.readable.values() if stage.variant and stage.look]
    curves = {stage.variant: read_steps(project.artifact(stage.name) / LOSS) for stage in trained}
    for variant, steps in curves.items():
        metrics[variant] |= {"final_loss": final_loss(steps), "flat_from_epoch": flat_from(steps)}
    limits, limited = project.params.evaluate.limits, measured.limited
    gate = {"gate": verdict(limits, metrics, limited)} if limited else {}

    write_json(job.out / METRICS, {**metrics, **gate})
    write_json(job.out / PREDICTIONS, {**predictions, **answers.predictions()})
    write_json(job.out / SAMPLES, samples)
    draw_comparison(job.out / PICTURE, project, curves, metrics)
    write_report(job.out / REPORT, project, {**metrics, **gate}, predictions, samples)
    artifacts = {
        name: project.artifact_name(adapter or base)
        for name, (base, adapter) in project.variants.items()
    }
    return {"variants": artifacts, "settings": measuring(project).key, **gate}


class _Measured:
    """Measures models one after the other, on the same sentences, prompts and tasks.

    Raises UserError for files that cannot be read, and for limits that could never count.
    """

    def __init__(self, job: Job) -> None:
        self._job, self._settings = job, job.project.params.evaluate
        name, tasks = self._settings.prompts, self._settings.task_files
        self._prompts = read_prompts(job.path(name), name) if name else []
        templated = trained_in_template(job.project)
        self.answers = Answers(read_tasks(job.project.root, tasks), templated)
        self.limited = _limited(job.project, self.answers.tasks, self._prompts)
        self._new, self._max_length = new_examples(job)
        # of the first model: forgetting counts from its scores
        self._before: EvalScores | None = None
        self.predictions: dict[str, Any] = {}
        self.samples: dict[str, Any] = {}

    def begin(self, loaded: LoadedModel, scores: Mapping[str, Any]) -> None:
        """Compare with a first model whose `scores` of tasks are known."""
        if self._settings.old_data:
            self._before = score(loaded, _old_examples(self._job, loaded))
        self.answers.base.update(scores)

    def add(self, loaded: LoadedModel, samples: bool = True) -> dict[str, Any]:
        """What a model kept and what it learned; `samples`: whether it answers questions too."""
        settings, name = self._settings, loaded.name
        numbers: dict[str, Any] = {}
        if settings.old_data:
            old = score(loaded, _old_examples(self._job, loaded), self._before)
            self._before = self._before or old
            numbers = _forgetting(old, self._before)
        numbers |= _score_new(loaded, self._new, settings, self._max_length)
        self.predictions[name] = _predictions(loaded, self._prompts, settings)
        numbers |= _count_prompts(self.predictions[name])
        if samples:
            self.samples[name] = sample_answers(loaded, self._new, settings.sample_answers)
            numbers |= count_answers(self.samples[name])
        return numbers | self.answers.add(loaded)


def _certified(project: Project) -> dict[str, str]:
    """Merged variant → the variant of its adapter, if the merge's certificate says they are alike.

    `Job.artifact` has checked that it was made from this adapter.
    """
    by_adapter = {adapter: name for name, (_, adapter) in project.variants.items() if adapter}
    same: dict[str, str] = {}
    for stage in project.readable.values():
        if stage.method != "merge":
            continue
        path = project.artifact(stage.name) / CERTIFICATE
        certificate = artifact.read_json(path, "Run `lora merge` again")
        merged = [by_adapter[need] for need in project.needs(stage) if need in by_adapter]
        if merged and _answers_alike(certificate):
            same[stage.variant] = merged[0]
    return same


def _answers_alike(certificate: Mapping[str, Any]) -> bool:
    """Whether a merge changed no first choice, and probabilities by less than reports show."""
    try:
        same = certificate["same_first_choices"] == certificate["prompts_checked"] > 0
        return bool(same and certificate["divergence"] <= ALIKE)
    except (KeyError, TypeError):
        return False


def _in_order(project: Project, by_variant: Mapping[str, Any]) -> dict[str, Any]:
    return {name: by_variant[name] for name in project.variants if name in by_variant}


def measure(
    job: Job, adapters: Sequence[Path], base: Path | None = None
) -> Generator[Event, None, tuple[dict[str, Any], list[str]]]:
    """Evaluate adapters that are no variants, such as a sweep's, in the same way → job.out.

    What an earlier call measured there with the same settings stays. Returns all metrics, with the
    verdict on these adapters, whatever evaluate.limits.variants says; and a sentence for each
    adapter that failed. Raises UserError if all did.
    """
    project, settings = job.project, job.project.params.evaluate
    trusted = project.params.origin.trust_remote_code
    reference = _Reference(job, *_first(project), trusted)
    facts = {"settings": job.key, "kind": "evaluation", "stage": MEASURED}
    earlier, inputs = _measured_before(job)
    metrics = {reference.name: reference.numbers(), **earlier}
    problems, named = list[str](), list[str]()
    for done, adapter in enumerate(adapters, 1):
        name = measured_name(project, adapter)
        try:
            # before it is loaded: the numbers are of these files
            digest = artifact.digest(adapter)
            metrics[name] = {
                **reference.measure(name, adapter, digest, base),
                **_cost_of_adapter(adapter),
            }
            inputs[name] = digest
            named.append(name)
        except UserError as error:
            problems.append(f"{name}: {error}")
        else:
            # after each adapter: many take long, and the user sees them arrive
            with artifact.writing(job.out) as out:
                gate = _gate(settings, metrics, [*inputs])
                write_json(out / METRICS, {**metrics, **gate})
                variants = {name: name for name in inputs}
                artifact.seal(out, {**facts, "variants": variants, "inputs": inputs, **gate})
        yield Progress(done, len(adapters), name)
    if problems and len(problems) == len(adapters):
        raise UserError(*problems)
    return {**metrics, **_gate(settings, metrics, named)}, problems


def _first(project: Project) -> tuple[str, tuple[Path, Path | None]]:
    """The variant from which forgetting counts, with its folders. Raises UserError."""
    for first in variant_folders(project).items():
        return first
    raise UserError(
        "The pipeline has made no base yet, from which forgetting counts. Run `lora pretrain`."
    )


def first_folder(project: Project) -> Path:
    """The folder of the model from which forgetting counts. Raises UserError."""
    return _first(project)[1][0]


def measured_name(project: Project, adapter: Path) -> str:
    """The name of an adapter in the metrics: of a named run its name, else its path."""
    named_runs = project.cache / NAMED
    root = named_runs if adapter.is_relative_to(named_runs) else project.root
    return Path(os.path.relpath(adapter, root)).as_posix()


class _Reference:
    """The project's first model, from which forgetting counts, and what is measured against it.

    What the cache has is not measured again; models are loaded when something is.
    """

    def __init__(
        self, job: Job, name: str, folders: tuple[Path, Path | None], trusted: bool
    ) -> None:
        self.name, self._folders, self._trusted, self._job = name, folders, trusted, job
        self._pool, digest = ModelPool(), artifact.digest(folders[0])
        self._entries = MeasuredEntries(open_cache(job.project), job.key, digest)
        self._measured: _Measured | None = None

    def numbers(self) -> dict[str, Any]:
        """The first model's own."""
        kept = self._entries.read(FIRST)
        if kept is None:
            measured = _Measured(self._job)
            loaded = self._pool.load_next(self.name, *self._folders, self._trusted)
            numbers = measured.add(loaded, samples=False)
            kept = {"numbers": numbers, "scores": measured.answers.base}
            self._entries.write(FIRST, kept)
            self._measured = measured
        return {**kept["numbers"], **_cost(self._job.project, self.name)}

    def measure(self, name: str, adapter: Path, digest: str, base: Path | None) -> dict[str, Any]:
        """A model's numbers. Raises UserError."""
        if kept := self._entries.read(digest):
            return dict(kept["numbers"])
        measured = self._begun()
        if (adapter / CONFIG).exists():
            on = base or find_base(adapter, self._job.project.root)
            loaded = self._pool.load_next(name, on, adapter, self._trusted)
        else:  # a whole model
            loaded = self._pool.load_next(name, adapter, None, self._trusted)
        numbers = measured.add(loaded)
        self._entries.write(digest, {"numbers": numbers})
        return numbers

    def _begun(self) -> "_Measured":
        """What measures, once it knows the first model's scores."""
        if self._measured is None:
            self._measured = _Measured(self._job)
            loaded = self._pool.load_next(self.name, *self._folders, self._trusted)
            kept = self._entries.read(FIRST) or {"scores": {}}
            self._measured.begin(loaded, kept["scores"])
        return self._measured


def _gate(settings: Evaluate, metrics: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The verdict on these models; empty without limits."""
    limited = settings.limits.keys() - {"variants"}
    return {"gate": verdict(settings.limits, metrics, names)} if limited else {}


def _measured_before(job: Job) -> tuple[dict[str, Any], dict[str, str]]:
    """The adapters' metrics and digests of an earlier `measure` with the same settings."""
    try:
        manifest = artifact.read_manifest(job.out)
        if manifest.get("settings") == job.key:
            metrics, inputs = artifact.read_json(job.out / METRICS, ""), dict(manifest["inputs"])
            return {name: metrics[name] for name in inputs}, inputs
    except (UserError, KeyError, TypeError, ValueError):
        pass  # there is none, or it is not ours: it is measured again
    return {}, {}


def _limited(project: Project, tasks: Sequence[Task], prompts: Sequence[Prompt]) -> list[str]:
    """The variants that must keep evaluate.limits; empty without limits.

    Raises UserError for a limit on what is not measured.
    """
    settings = project.params.evaluate
    limits = settings.limits
    trained = [
        name for name, stage in stages_by_variant(project).items() if stage.method not in BASES
    ]
    chosen = list(limits.get("variants", trained)) if limits.keys() - {"variants"} else []
    if unknown := [name for name in chosen if name not in trained]:
        raise UserError(
            f"evaluate.limits.variants: {unknown[0]} is not a trained variant of this project. It "
            f"has {', '.join(trained) or 'none'}."
        )
    names = [task.name for task in tasks]
    if unknown := [name for name in limits.get("tasks", ()) if name not in names]:
        raise UserError(
            f"evaluate.limits.tasks: there is no task {unknown[0]!r}. evaluate.tasks has "
            f"{', '.join(names)}."
        )
    if "must_keep" in limits and not any(prompt.rule == "must_keep" for prompt in prompts):
        raise UserError(
            f"evaluate.limits.must_keep is set, but {settings.prompts} has no must_keep prompts. "
            "Add some, or remove the limit."
        )
    return chosen


def _old_examples(job: Job, loaded: LoadedModel) -> list[Example]:
    """The sentences of evaluate.old_data. Raises UserError for a word that the model lacks."""
    name, templated = job.project.params.evaluate.old_data, trained_in_template(job.project)
    examples = read_examples(job.path(name), name, templated=templated)
    for example in examples:
        unknown = loaded.tokenizer.unknown_words(example.text)
        if unknown:
            raise UserError(
                f"{example.location}: {loaded.name} does not know {', '.join(unknown)}. "
                "evaluate.old_data measures forgetting: use only words of the pretraining data."
            )
    return examples


def new_examples(job: Job) -> tuple[list[Example], int]:
    """The new examples to measure on, and the max_length to which training cuts them.

    They are those of evaluate.new_data; without it those that training held out; without these its
    first ones. Raises UserError.
    """
    settings, project = job.project.params.evaluate, job.project
    templated = trained_in_template(project)  # raises if methods differ
    if name := settings.new_data:
        columns = settings.columns
        return read_examples(job.path(name), name, columns=columns, templated=templated), 0
    sections = _trained_sections(project)
    sections = [section for section in sections if not section.COMPARES] or sections
    splits = [(s.data_files, s.eval_data, s.eval_share, s.max_length) for s in sections]
    if not splits or any(split != splits[0] for split in splits):
        raise UserError(
            "evaluate.new_data is empty, so what training holds out is compared, but the methods "
            "of this project differ in data, eval_data, eval_share or max_length. Name a file in "
            "evaluate.new_data."
        )
    section = sections[0]
    held_out = section.eval_data or section.eval_share
    examples = held_out_examples(job, section) if held_out else training_examples(job, section)
    return list(islice(examples, settings.max_examples or None)), section.max_length


def _trained_sections(project: Project) -> list[Training]:
    sections = [
        project.params.section(stage.section) for stage in project.readable.values() if stage.look
    ]
    return [section for section in sections if isinstance(section, Training)]


def trained_in_template(project: Project) -> bool:
    """Whether plain prompts train in the base's chat template. Raises UserError if only some do."""
    ways = {section.templated for section in _trained_sections(project)}
    if len(ways) > 1:
        raise UserError(
            "the methods of this project differ in chat_template, and what is compared is read "
            f"alike by all. Set {TRAINING}.chat_template, and remove it from the methods' sections."
        )
    return ways != {False}


def _forgetting(old: EvalScores, before: EvalScores) -> dict[str, Any]:
    """Scores on old sentences; forgetting is relative to the pretrained base (`before`)."""
    return {
        "old_loss": old.loss,
        "old_perplexity": old.perplexity,
        "forgetting": {
            "loss_rise": old.loss - before.loss,
            "answers_kept": agreement(old.choices, before.choices),
            "divergence": old.divergence,
        },
    }


def _score_new(
    loaded: LoadedModel, examples: Sequence[Example], settings: Evaluate, max_length: int
) -> dict[str, Any]:
    """Scores on the new sentences; without new_data none counts as completed.

    Nobody can know held-out sentences word for word.
    """
    unknown = next((e for e in examples if loaded.tokenizer.unknown_words(e.text)), None)
    if unknown:
        if loaded.name != "base":
            raise UserError(
                f"{unknown.file} has words that {loaded.name} does not know. Add the file to "
                "expand_vocab.data."
            )
        return {}  # the base has no embeddings for the new words
    new = score(loaded, examples, max_length=max_length)
    scores = {"new_loss": new.loss, "new_perplexity": new.perplexity}
    if settings.new_data:
        scores["new_completed"] = sum(
            completes_correctly(loaded, example, settings.prompt_words) for example in examples
        )
    return {**scores, "new_sentences": len(examples)}


def _predictions(
    loaded: LoadedModel, prompts: Sequence[Prompt], settings: Evaluate
) -> list[dict[str, Any]]:
    """Each prompt with its scores and top-k, which are None if it has unknown words."""
    known = [not loaded.tokenizer.unknown_words(prompt.prompt) for prompt in prompts]
    pairs = []
    for prompt, is_known in zip(prompts, known, strict=True):
        if is_known:
            pairs += [(prompt.prompt, prompt.answer), (prompt.prompt, prompt.corrected)]
    scores = iter(score_answers(loaded, pairs, settings.top_k))

    rows = []
    for prompt, is_known in zip(prompts, known, strict=True):
        if not is_known:
            rows.append(vars(prompt) | dict.fromkeys(SCORES))
            continue
        answer, corrected = next(scores), next(scores)
        if answer.probability is None and prompt.rule != "must_learn":
            raise UserError(
                f"{settings.prompts}: {loaded.name} has no tokens for {prompt.answer!r}, the "
                f"answer to {prompt.prompt!r}. Use words of its training data, or the rule "
                "must_learn."
            )
        top = [vars(choice) for choice in answer.top]
        values = (answer.probability, answer.first, corrected.probability, corrected.first, top)
        rows.append(vars(prompt) | dict(zip(SCORES, values, strict=True)))
    return rows


def _count_prompts(predictions: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts of must_keep prompts with the old answer first, must_change with the corrected one."""
    if not predictions:
        return {}
    kept = [bool(p["first"]) for p in predictions if p["rule"] == "must_keep"]
    corrected = [bool(p["corrected_first"]) for p in predictions if p["rule"] == "must_change"]
    return {
        "old_prompts_kept": sum(kept),
        "old_prompts": len(kept),
        "prompts_corrected": sum(corrected),
        "prompts_to_correct": len(corrected),
    }


def _cost(project: Project, variant: str) -> dict[str, Any]:
    """What the variant costs to train and to store."""
    base, adapter = project.variants[variant]
    stage = project.readable[adapter or base]
    return cost(project.artifact(stage.name), bool(stage.look))


def _cost_of_adapter(adapter: Path) -> dict[str, Any]:
    """The same for an adapter from elsewhere; without a manifest of this project only its size."""
    with suppress(UserError, KeyError, TypeError, ZeroDivisionError):
        return cost(adapter, True)
    return {"bytes": weight_bytes(adapter)}
