"""evaluate: compares learning and forgetting of the project's variants (§9.3)."""

from collections.abc import Generator
from pathlib import Path
from typing import Any

from pipeline.data.examples import Example
from pipeline.data.formats import read_examples
from pipeline.data.prompts import Prompt, read_prompts
from pipeline.errors import UserError
from pipeline.files.artifact import read_manifest, write_json
from pipeline.inference import engine
from pipeline.inference.engine import LoadedModel
from pipeline.inference.score import AnswerScore, EvalScores, agreement, completes_correctly, score, score_answers
from pipeline.project.logs.run_log import LOSS, final_loss, flat_from, read_steps
from pipeline.project.params.sections import Evaluate
from pipeline.project.runner import Event, Facts, Job, Progress
from pipeline.project.stage_graph import Project
from pipeline.stages.report import draw_comparison, write_report

METRICS, PREDICTIONS, REPORT, PICTURE = "metrics.json", "predictions.json", "report.md", "finetuning_comparison.png"


def run(job: Job) -> Generator[Event, None, Facts]:
    """Evaluate all variants on the same sentences and prompts → metrics, predictions, report.md and the picture.

    The manifest's `variants` maps each variant to the artifact that was measured.
    """
    settings, project = job.project.params.evaluate, job.project
    for stage in project.needs(job.stage):
        job.artifact(stage)
    prompts = read_prompts(job.path(settings.prompts), settings.prompts)
    metrics: dict[str, Any] = {}
    predictions: dict[str, Any] = {}
    before: EvalScores | None = None
    for done, loaded in enumerate(engine.variants(project), 1):
        old = score(loaded, _old_examples(job, loaded, settings), before)
        before = before or old
        predictions[loaded.name] = _predictions(loaded, prompts, settings)
        metrics[loaded.name] = {
            **_score_sentences(job, loaded, settings, old, before),
            **_count_prompts(predictions[loaded.name]),
            **_cost(project, loaded.name),
        }
        yield Progress(done, len(project.variants), loaded.name)
    trained = [stage for stage in project.readable.values() if stage.variant and stage.look]
    curves = {stage.variant: read_steps(project.artifact(stage.name) / LOSS) for stage in trained}
    for variant, steps in curves.items():
        metrics[variant] |= {"final_loss": final_loss(steps), "flat_from_epoch": flat_from(steps)}
    write_json(job.out / METRICS, metrics)
    write_json(job.out / PREDICTIONS, predictions)
    draw_comparison(job.out / PICTURE, project, curves, metrics)
    write_report(job.out / REPORT, project, metrics, predictions)
    return {"variants": {name: project.artifact_name(pair[1] or pair[0]) for name, pair in project.variants.items()}}


def _old_examples(job: Job, loaded: LoadedModel, settings: Evaluate) -> list[Example]:
    """The sentences of evaluate.old_data. Raises UserError if one has a word that the model does not know."""
    examples = read_examples(job.path(settings.old_data), settings.old_data)
    for example in examples:
        unknown = loaded.tokenizer.unknown_words(example.text)
        if unknown:
            raise UserError(
                f"{example.location}: {loaded.name} does not know {', '.join(unknown)}. evaluate.old_data measures "
                "forgetting: use only words of the pretraining data."
            )
    return examples


def _score_sentences(
    job: Job, loaded: LoadedModel, settings: Evaluate, old: EvalScores, before: EvalScores
) -> dict[str, Any]:
    """Scores on old and new sentences; forgetting is relative to the pretrained base (`before`)."""
    scores: dict[str, Any] = {
        "old_loss": old.loss,
        "old_perplexity": old.perplexity,
        "forgetting": {
            "loss_rise": old.loss - before.loss,
            "answers_kept": agreement(old.choices, before.choices),
            "divergence": old.divergence,
        },
    }
    examples = read_examples(job.path(settings.new_data), settings.new_data, columns=settings.columns)
    if any(loaded.tokenizer.unknown_words(example.text) for example in examples):
        if loaded.name != "base":
            raise UserError(
                f"{settings.new_data} has words that {loaded.name} does not know. Add the file to expand_vocab.data."
            )
        return scores  # the base has no embeddings for the new words
    new = score(loaded, examples)
    completed = sum(completes_correctly(loaded, example, settings.prompt_words) for example in examples)
    return scores | {
        "new_loss": new.loss,
        "new_perplexity": new.perplexity,
        "new_completed": completed,
        "new_sentences": len(examples),
    }


def _predictions(loaded: LoadedModel, prompts: list[Prompt], settings: Evaluate) -> list[dict[str, Any]]:
    """The prediction for each prompt, in order; its scores are None if the prompt has an unknown word."""
    askable = [p for p in prompts if not loaded.tokenizer.unknown_words(p.prompt)]
    pairs = [(p.prompt, words) for p in askable for words in (p.answer, p.corrected)]
    answers = score_answers(loaded, pairs, settings.top_k)
    both = {id(p): pair for p, pair in zip(askable, zip(answers[::2], answers[1::2], strict=True), strict=True)}
    return [_prediction(loaded, prompt, both.get(id(prompt)), settings) for prompt in prompts]


def _prediction(
    loaded: LoadedModel, prompt: Prompt, both: tuple[AnswerScore, AnswerScore] | None, settings: Evaluate
) -> dict[str, Any]:
    """The prompt's fields, the scores of its two answers, and the top-k; scores are None if `both` is None."""
    fields: dict[str, Any] = vars(prompt)
    if both is None:
        missing = ("probability", "first", "corrected_probability", "corrected_first", "top_k")
        return fields | dict.fromkeys(missing)
    answer, corrected = both
    if answer.probability is None and prompt.rule != "must_learn":
        raise UserError(
            f"{settings.prompts}: {loaded.name} has no tokens for {prompt.answer!r}, the answer to {prompt.prompt!r}. "
            "Use words of its training data, or the rule must_learn."
        )
    return fields | {
        "probability": answer.probability,
        "first": answer.first,
        "corrected_probability": corrected.probability,
        "corrected_first": corrected.first,
        "top_k": [vars(choice) for choice in answer.top],
    }


def _count_prompts(predictions: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts over prompts: must_keep with the old answer first, and must_change with the corrected one first."""
    keep, change = ([p for p in predictions if p["rule"] == rule] for rule in ("must_keep", "must_change"))
    return {
        "old_prompts_kept": sum(bool(p["first"]) for p in keep),
        "old_prompts": len(keep),
        "prompts_corrected": sum(bool(p["corrected_first"]) for p in change),
        "prompts_to_correct": len(change),
    }


def _cost(project: Project, variant: str) -> dict[str, Any]:
    """Parameter counts from the variant's manifest, and the size of its weights on disk."""
    base, adapter = project.variants[variant]
    stage = project.readable[adapter or base]
    folder = project.artifact(stage.name)
    parameters = read_manifest(folder)["parameters"]
    cost: dict[str, Any] = {"parameters": parameters["total"], "bytes": weight_bytes(folder)}
    if stage.look:  # a method's, which trains
        cost |= {
            "trainable": parameters["trainable"],
            "trainable_percent": 100 * parameters["trainable"] / parameters["total"],
        }
    return cost


def weight_bytes(folder: Path) -> int:
    """The size in bytes of an artifact's weights."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
