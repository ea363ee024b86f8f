"""evaluate: compares learning and forgetting of the project's variants (§9.3)."""

import hashlib
import json
import os
from collections.abc import Generator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from pipeline.data.answers.prompts import Prompt, read_prompts
from pipeline.data.examples import Example
from pipeline.data.formats import read_examples
from pipeline.errors import UserError
from pipeline.evaluation.answers import Answers
from pipeline.evaluation.comparison import cost, stages_by_variant, weight_bytes
from pipeline.evaluation.limits import verdict
from pipeline.evaluation.samples import count_answers, sample_answers
from pipeline.evaluation.tasks import Task, read_tasks
from pipeline.files import artifact
from pipeline.files.artifact import write_json
from pipeline.inference import engine
from pipeline.inference.catalog import BASES, find_base
from pipeline.inference.engine import LoadedModel
from pipeline.inference.score import (
    AnswerScore,
    EvalScores,
    agreement,
    completes_correctly,
    score,
    score_answers,
)
from pipeline.project.logs.run_log import LOSS, final_loss, flat_from, read_steps
from pipeline.project.params.load import TRAINING
from pipeline.project.params.sections import Evaluate, Training
from pipeline.project.provenance import code_digest
from pipeline.project.runner import Event, Facts, Job, Progress
from pipeline.project.stage_graph import ARTIFACTS, Project
from pipeline.stages.report import draw_comparison, write_report
from pipeline.training.data import held_out_examples, training_examples
from pipeline.weights.merge import CERTIFICATE

MEASURED = "measured"  # the folder below artifacts/ of what `measure` writes
METRICS, PREDICTIONS, SAMPLES = "metrics.json", "predictions.json", "samples.json"
# of `_cost`: what training an adapter took and gave
TRAINED = ("trainable", "trainable_percent", "preferences")
# nats per token: reports have three digits. Rounding to 16 bits may exceed it, which is measured
ALIKE = 1e-3
REPORT, PICTURE = "report.md", "finetuning_comparison.png"


def run(job: Job) -> Generator[Event, None, Facts]:
    """Evaluate all variants on the same sentences, prompts and tasks → metrics, predictions,
    samples, report.md and the picture.

    The manifest's `variants` maps each variant to the artifact that was measured; its `gate` says
    which limits they keep.
    """
    settings, project = job.project.params.evaluate, job.project
    for stage in project.needs(job.stage):
        job.artifact(stage)
    prompts = read_prompts(job.path(settings.prompts), settings.prompts) if settings.prompts else []
    answers = Answers(read_tasks(project.root, settings.task_files), trained_in_template(project))
    limited = _limited(project, settings, answers.tasks, prompts)
    new, max_length = new_examples(job)
    metrics: dict[str, Any] = {}
    predictions: dict[str, Any] = {}
    samples: dict[str, Any] = {}
    before: EvalScores | None = None
    same = _certified(project)
    total = len(project.variants) - len(same)
    for done, loaded in enumerate(engine.variants(project, without=same)):
        yield Progress(done, total, loaded.name)
        numbers, before = _scores(job, loaded, before, new, max_length)
        predictions[loaded.name] = _predictions(loaded, prompts, settings)
        samples[loaded.name] = sample_answers(loaded, new, settings.sample_answers)
        numbers |= {
            **_count_prompts(predictions[loaded.name]),
            **count_answers(samples[loaded.name]),
        }
        numbers |= {**answers.add(loaded), **_cost(project, loaded.name)}
        metrics[loaded.name] = numbers
    yield Progress(total, total)
    for merged, adapter in same.items():
        metrics[merged] = {
            **_comparable(metrics[adapter]),
            "measured_as": adapter,
            **_cost(project, merged),
        }
        predictions[merged], samples[merged] = predictions[adapter], samples[adapter]
        answers.copy(adapter, merged)
    for rows in answers.predictions().get("tasks", {}).values():
        for row in rows:
            row["answers"] = _in_order(project, row["answers"])
    metrics, predictions, samples = (
        _in_order(project, each) for each in (metrics, predictions, samples)
    )
    trained = [stage for stage in project.readable.values() if stage.variant and stage.look]
    curves = {stage.variant: read_steps(project.artifact(stage.name) / LOSS) for stage in trained}
    for variant, steps in curves.items():
        metrics[variant] |= {"final_loss": final_loss(steps), "flat_from_epoch": flat_from(steps)}
    gate = {"gate": verdict(settings.limits, metrics, limited)} if limited else {}
    write_json(job.out / METRICS, {**metrics, **gate})
    write_json(job.out / PREDICTIONS, {**predictions, **answers.predictions()})
    write_json(job.out / SAMPLES, samples)
    draw_comparison(job.out / PICTURE, project, curves, metrics)
    write_report(job.out / REPORT, project, {**metrics, **gate}, predictions, samples)
    measured = {
        name: project.artifact_name(pair[1] or pair[0]) for name, pair in project.variants.items()
    }
    return {"variants": measured, **gate}


def _certified(project: Project) -> dict[str, str]:
    """Merged variant → the variant of its adapter, where the merge's certificate says that both
    answer alike.

    That it was made from this adapter, `Job.artifact` has checked.
    """
    by_adapter = {adapter: name for name, (_, adapter) in project.variants.items() if adapter}
    same: dict[str, str] = {}
    for stage in (stage for stage in project.readable.values() if stage.method == "merge"):
        certificate = artifact.read_json(
            project.artifact(stage.name) / CERTIFICATE, "Run `lora merge` again"
        )
        adapter = next(
            (by_adapter[need] for need in project.needs(stage) if need in by_adapter), None
        )
        if adapter and _answers_alike(certificate):
            same[stage.variant] = adapter
    return same


def _answers_alike(certificate: Mapping[str, Any]) -> bool:
    """Whether a merge changed no first choice on its prompts, and probabilities by less than its
    numbers show.
    """
    try:
        same = certificate["same_first_choices"] == certificate["prompts_checked"] > 0
        return bool(same and certificate["divergence"] <= ALIKE)
    except (KeyError, TypeError):
        return False


def _comparable(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of an adapter without those of its training, which a merged model has not."""
    return {key: value for key, value in numbers.items() if key not in TRAINED}


def _in_order(project: Project, by_variant: Mapping[str, Any]) -> dict[str, Any]:
    return {name: by_variant[name] for name in project.variants if name in by_variant}


def measure(
    job: Job, adapters: Sequence[Path], base: Path | None = None
) -> Generator[Event, None, tuple[dict[str, Any], list[str]]]:
    """Evaluate adapters that the pipeline does not, such as a sweep's, as it evaluates its variants
    → job.out, which then also has what an earlier call measured there with the same settings.

    Returns the metrics that are there now, with the verdict on these adapters, whatever
    evaluate.limits.variants says; and what was wrong, a sentence each. Raises UserError if no
    adapter could be evaluated.
    """
    project, settings = job.project, job.project.params.evaluate
    prompts = read_prompts(job.path(settings.prompts), settings.prompts) if settings.prompts else []
    answers = Answers(read_tasks(project.root, settings.task_files), trained_in_template(project))
    # a limit that could never count is an error here too
    _limited(project, settings, answers.tasks, prompts)
    new, max_length = new_examples(job)
    reference = next(engine.variants(project), None)  # forgetting counts from it
    if reference is None:
        raise UserError(
            "The pipeline has made no base yet, from which forgetting counts. Run `lora pretrain`."
        )
    numbers, before = _scores(job, reference, None, new, max_length)
    facts = {"settings": job.key, "kind": "evaluation", "stage": MEASURED}
    counts = _count_prompts(_predictions(reference, prompts, settings))
    numbers |= {**counts, **answers.add(reference), **_cost(project, reference.name)}
    engine.free(reference)
    earlier, inputs = _measured_before(job)
    metrics = {reference.name: numbers, **earlier}
    problems: list[str] = []
    named: list[str] = []
    for done, adapter in enumerate(adapters, 1):
        name = Path(os.path.relpath(adapter, project.root)).as_posix()
        try:
            # before it is loaded: measured is what these files are
            digest = artifact.digest(adapter)
            trusted = project.params.origin.trust_remote_code
            loaded = engine.load(base or find_base(adapter, project.root), adapter, name, trusted)
            numbers, _ = _scores(job, loaded, before, new, max_length)
            counts = _count_prompts(_predictions(loaded, prompts, settings))
            counts |= count_answers(sample_answers(loaded, new, settings.sample_answers))
            metrics[name] = {
                **numbers,
                **counts,
                **answers.add(loaded),
                **_cost_of_adapter(adapter),
            }
            engine.free(loaded)
            inputs[name] = digest
            named.append(name)
        except UserError as error:
            problems.append(f"{name}: {error}")
        else:
            # after each: many take long, and one who watches sees them arrive
            with artifact.writing(job.out) as out:
                gate = _gate(settings, metrics, [*inputs])
                write_json(out / METRICS, {**metrics, **gate})
                artifact.seal(
                    out,
                    {
                        **facts,
                        "variants": {name: name for name in inputs},
                        "inputs": inputs,
                        **gate,
                    },
                )
        yield Progress(done, len(adapters), name)
    if len(problems) == len(adapters):
        raise UserError(*problems)
    return {**metrics, **_gate(settings, metrics, named)}, problems


def _gate(settings: Evaluate, metrics: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The verdict on these models; empty without limits."""
    limited = settings.limits.keys() - {"variants"}
    return {"gate": verdict(settings.limits, metrics, names)} if limited else {}


def measuring(project: Project) -> Job:
    """The job of `measure`: its key changes with everything but the adapters that the numbers
    depend on.
    """
    stage = project.stage("evaluate")
    files = {name: artifact.digest(project.root / name) for name in project.data_files(stage)}
    params = {key: value for key, value in project.stage_params(stage).items() if key != "limits"}
    settings = {"params": params, "files": files, "code": code_digest(*stage.code)}
    key = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
    return Job(
        project,
        stage,
        project.root / ARTIFACTS / MEASURED,
        project.run_folder(stage.name),
        key,
        None,
    )


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


def _scores(
    job: Job,
    loaded: LoadedModel,
    before: EvalScores | None,
    new: Sequence[Example],
    max_length: int,
) -> tuple[dict[str, Any], EvalScores | None]:
    """What it kept and what it learned; and the scores from which forgetting counts: `before`, or
    else its own.
    """
    settings, numbers = job.project.params.evaluate, dict[str, Any]()
    if settings.old_data:
        old = score(loaded, _old_examples(job, loaded, settings), before)
        before = before or old
        numbers |= _forgetting(old, before)
    return numbers | _score_new(loaded, new, settings, max_length), before


def _limited(
    project: Project, settings: Evaluate, tasks: Sequence[Task], prompts: Sequence[Prompt]
) -> list[str]:
    """The variants that must keep evaluate.limits; none without limits. Raises UserError for what
    is not measured.
    """
    limits = settings.limits
    trained = [
        name for name, stage in stages_by_variant(project).items() if stage.method not in BASES
    ]
    chosen = list(limits.get("variants", trained)) if limits.keys() - {"variants"} else []
    if unknown := [name for name in chosen if name not in trained]:
        raise UserError(
            f"evaluate.limits.variants: {unknown[0]} is not a trained variant of this project. It "
            f"has {', '.join(trained)}."
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


def _old_examples(job: Job, loaded: LoadedModel, settings: Evaluate) -> list[Example]:
    """The sentences of evaluate.old_data. Raises UserError if one has a word that the model does
    not know.
    """
    templated = trained_in_template(job.project)
    examples = read_examples(job.path(settings.old_data), settings.old_data, templated=templated)
    for example in examples:
        unknown = loaded.tokenizer.unknown_words(example.text)
        if unknown:
            raise UserError(
                f"{example.location}: {loaded.name} does not know {', '.join(unknown)}. "
                "evaluate.old_data measures forgetting: use only words of the pretraining data."
            )
    return examples


def new_examples(job: Job) -> tuple[list[Example], int]:
    """The examples of evaluate.new_data, or without it those that training held out, or without
    these its first ones; and the max_length to which training cuts them. Raises UserError.
    """
    settings, project = job.project.params.evaluate, job.project
    if settings.new_data:
        path, templated = job.path(settings.new_data), trained_in_template(project)
        return read_examples(
            path, settings.new_data, columns=settings.columns, templated=templated
        ), 0
    own = _trained_sections(project)
    trained_in_template(project)  # refuses methods that differ
    own = [section for section in own if not section.COMPARES] or own
    splits = [(one.data_files, one.eval_data, one.eval_share, one.max_length) for one in own]
    if not splits or any(split != splits[0] for split in splits):
        raise UserError(
            "evaluate.new_data is empty, so what training holds out is compared, but the methods "
            "of this project "
            "differ in data, eval_data, eval_share or max_length. Name a file in evaluate.new_data."
        )
    held_out = own[0].eval_data or own[0].eval_share
    examples = held_out_examples(job, own[0]) if held_out else training_examples(job, own[0])
    return list(islice(examples, settings.max_examples or None)), own[0].max_length


def _trained_sections(project: Project) -> list[Training]:
    sections = [
        project.params.section(stage.section) for stage in project.readable.values() if stage.look
    ]
    return [section for section in sections if isinstance(section, Training)]


def trained_in_template(project: Project) -> bool:
    """Whether the methods train plain prompts in the base's chat template. Raises UserError if they
    differ in that.
    """
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
    """Scores on the new sentences. Those that were held out cannot be known word for word, so this
    is not counted.
    """
    if any(loaded.tokenizer.unknown_words(example.text) for example in examples):
        if loaded.name != "base":
            raise UserError(
                f"{examples[0].file} has words that {loaded.name} does not know. Add the file to "
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
    loaded: LoadedModel, prompts: list[Prompt], settings: Evaluate
) -> list[dict[str, Any]]:
    """The prediction for each prompt, in order; its scores are None if the prompt has an unknown
    word.
    """
    askable = [p for p in prompts if not loaded.tokenizer.unknown_words(p.prompt)]
    pairs = [(p.prompt, words) for p in askable for words in (p.answer, p.corrected)]
    answers = score_answers(loaded, pairs, settings.top_k)
    both = {
        id(p): pair
        for p, pair in zip(askable, zip(answers[::2], answers[1::2], strict=True), strict=True)
    }
    return [_prediction(loaded, prompt, both.get(id(prompt)), settings) for prompt in prompts]


def _prediction(
    loaded: LoadedModel,
    prompt: Prompt,
    both: tuple[AnswerScore, AnswerScore] | None,
    settings: Evaluate,
) -> dict[str, Any]:
    """The prompt's fields, the scores of its two answers, and the top-k; scores are None if `both`
    is None.
    """
    fields: dict[str, Any] = vars(prompt)
    if both is None:
        missing = ("probability", "first", "corrected_probability", "corrected_first", "top_k")
        return fields | dict.fromkeys(missing)
    answer, corrected = both
    if answer.probability is None and prompt.rule != "must_learn":
        raise UserError(
            f"{settings.prompts}: {loaded.name} has no tokens for {prompt.answer!r}, the answer to "
            f"{prompt.prompt!r}. Use words of its training data, or the rule must_learn."
        )
    return fields | {
        "probability": answer.probability,
        "first": answer.first,
        "corrected_probability": corrected.probability,
        "corrected_first": corrected.first,
        "top_k": [vars(choice) for choice in answer.top],
    }


def _count_prompts(predictions: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts over prompts: must_keep with the old answer first, and must_change with the corrected
    one first.
    """
    if not predictions:
        return {}
    keep, change = (
        [p for p in predictions if p["rule"] == rule] for rule in ("must_keep", "must_change")
    )
    return {
        "old_prompts_kept": sum(bool(p["first"]) for p in keep),
        "old_prompts": len(keep),
        "prompts_corrected": sum(bool(p["corrected_first"]) for p in change),
        "prompts_to_correct": len(change),
    }


def _cost(project: Project, variant: str) -> dict[str, Any]:
    """What the variant costs to train and to store."""
    base, adapter = project.variants[variant]
    stage = project.readable[adapter or base]
    return cost(project.artifact(stage.name), bool(stage.look))


def _cost_of_adapter(adapter: Path) -> dict[str, Any]:
    """The same of an adapter that the pipeline does not make; its size alone if it has no manifest
    of this project.
    """
    with suppress(UserError, KeyError, TypeError, ZeroDivisionError):
        return cost(adapter, True)
    return {"bytes": weight_bytes(adapter)}
