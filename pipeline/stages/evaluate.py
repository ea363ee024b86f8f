"""evaluate: the project's variants side by side: what was learned, what was forgotten (§9.3)."""

from collections.abc import Generator
from pathlib import Path
from typing import Any

from pipeline.data.examples import Example, Prompt, read_examples, read_prompts
from pipeline.errors import UserError
from pipeline.files.artifact import read_manifest, write_json
from pipeline.inference import engine
from pipeline.inference.engine import LoadedModel
from pipeline.inference.score import AnswerScore, EvalScores, completes_correctly, score, score_answers
from pipeline.project.logs.run_log import LOSS, final_loss, flat_from, read_steps
from pipeline.project.params.sections import Evaluate
from pipeline.project.runner import Event, Facts, Job, Progress
from pipeline.project.stage_graph import VARIANTS, Project
from pipeline.stages.report import draw_comparison, write_report

METRICS, PREDICTIONS, REPORT, PICTURE = "metrics.json", "predictions.json", "report.md", "finetuning_comparison.png"
TRAINED = (
    "train_from_scratch",
    "finetune_full",
    "finetune_freeze",
    "finetune_lora",
    "finetune_prefix",
    "finetune_prompt",
)


def evaluate(job: Job) -> Generator[Event, None, Facts]:
    """The project's variants on the same sentences and prompts → metrics, predictions, report.md and the picture.

    Its manifest has `variants`: which of its inputs each was measured on.
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
            **_knowledge(job, loaded, settings, old, before),
            **_kept(predictions[loaded.name]),
            **_cost(project, loaded.name),
        }
        yield Progress(done, len(project.variants), loaded.name)
    trained = [project.readable[stage] for stage in TRAINED if stage in project.readable]
    curves = {stage.method: read_steps(project.artifact(stage.name) / LOSS) for stage in trained}
    for method, steps in curves.items():
        metrics[method] |= {"final_loss": final_loss(steps), "flat_from_epoch": flat_from(steps)}
    write_json(job.out / METRICS, metrics)
    write_json(job.out / PREDICTIONS, predictions)
    draw_comparison(job.out / PICTURE, curves, metrics)
    write_report(job.out / REPORT, metrics, predictions, settings)
    return {"variants": {name: project.artifact_name(pair[1] or pair[0]) for name, pair in project.variants.items()}}


def _old_examples(job: Job, loaded: LoadedModel, settings: Evaluate) -> list[Example]:
    """The sentences that the base was trained on, or others of its words."""
    examples = read_examples(job.path(settings.old_data), settings.old_data)
    for example in examples:
        unknown = loaded.tokenizer.unknown_words(example.text)
        if unknown:
            raise UserError(
                f"{example.location}: {loaded.name} does not know {', '.join(unknown)}. evaluate.old_data must hold "
                "words of the pretraining data only: it measures what is forgotten of them."
            )
    return examples


def _knowledge(
    job: Job, loaded: LoadedModel, settings: Evaluate, old: EvalScores, before: EvalScores
) -> dict[str, Any]:
    """Old and new sentences; forgetting is measured against the pretrained base."""
    found: dict[str, Any] = {
        "old_loss": old.loss,
        "old_perplexity": old.perplexity,
        "forgetting": {
            "loss_rise": old.loss - before.loss,
            "answers_kept": float((old.choices == before.choices).double().mean()),
            "divergence": old.divergence,
        },
    }
    examples = read_examples(job.path(settings.new_data), settings.new_data)
    if any(loaded.tokenizer.unknown_words(example.text) for example in examples):
        if loaded.name != "base":
            raise UserError(
                f"{settings.new_data} has words that {loaded.name} does not know. Add it to expand_vocab.data."
            )
        return found  # the base has no rows for the new words: there is nothing to measure
    new = score(loaded, examples)
    completed = sum(completes_correctly(loaded, example, settings.prompt_words) for example in examples)
    return found | {
        "new_loss": new.loss,
        "new_perplexity": new.perplexity,
        "new_completed": completed,
        "new_sentences": len(examples),
    }


def _predictions(loaded: LoadedModel, prompts: list[Prompt], settings: Evaluate) -> list[dict[str, Any]]:
    """Each prompt's answers, in order; a prompt of which a word is unknown has none."""
    known = [p for p in prompts if not loaded.tokenizer.unknown_words(p.prompt)]
    pairs = [(p.prompt, words) for p in known for words in (p.answer, p.corrected)]
    answers = score_answers(loaded, pairs, settings.top_k)
    both = {id(p): pair for p, pair in zip(known, zip(answers[::2], answers[1::2], strict=True), strict=True)}
    return [_prediction(loaded, prompt, both.get(id(prompt)), settings) for prompt in prompts]


def _prediction(
    loaded: LoadedModel, prompt: Prompt, both: tuple[AnswerScore, AnswerScore] | None, settings: Evaluate
) -> dict[str, Any]:
    """What was expected, whether it comes first and how probable it is, and the top-k; None where a word is unknown."""
    asked: dict[str, Any] = vars(prompt)
    if both is None:
        unknown = ("probability", "first", "corrected_probability", "corrected_first", "top_k")
        return asked | dict.fromkeys(unknown)
    answer, corrected = both
    if answer.probability is None and prompt.rule != "must_learn":
        raise UserError(
            f"{settings.prompts}: {loaded.name} cannot say the answer {prompt.answer!r} to {prompt.prompt!r}: it has "
            "no tokens for it. Use words of its training data, or the rule must_learn."
        )
    return asked | {
        "probability": answer.probability,
        "first": answer.first,
        "corrected_probability": corrected.probability,
        "corrected_first": corrected.first,
        "top_k": [vars(choice) for choice in answer.top],
    }


def _kept(predictions: list[dict[str, Any]]) -> dict[str, Any]:
    """How many prompts that must keep their answer do, and how many that a correction must change have the new one."""
    keep, change = ([p for p in predictions if p["rule"] == rule] for rule in ("must_keep", "must_change"))
    return {
        "old_prompts_kept": sum(bool(p["first"]) for p in keep),
        "old_prompts": len(keep),
        "prompts_corrected": sum(bool(p["corrected_first"]) for p in change),
        "prompts_to_correct": len(change),
    }


def _cost(project: Project, variant: str) -> dict[str, Any]:
    """Parameters as the manifest of what was trained says, and bytes on disk of what must be kept for it."""
    stages = [stage for stage in VARIANTS[variant] if stage]
    folder = project.artifact(stages[-1])
    parameters = read_manifest(folder)["parameters"]
    trained = stages[-1] in TRAINED
    cost: dict[str, Any] = {"parameters": parameters["total"], "bytes": weight_bytes(folder)}
    if trained:
        cost |= {
            "trainable": parameters["trainable"],
            "trainable_percent": 100 * parameters["trainable"] / parameters["total"],
        }
    return cost


def weight_bytes(folder: Path) -> int:
    """Size of the weights in an artifact."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
