"""evaluate: base, expanded, full, freeze, LoRA and merged side by side: what was learned, what was forgotten (§9.3)."""

from collections.abc import Generator
from pathlib import Path
from typing import Any

from pipeline import engine
from pipeline.artifact import read_manifest, write_json
from pipeline.dag import STAGES, VARIANTS, Project
from pipeline.data import Example, Prompt, read_examples, read_prompts
from pipeline.engine import Loaded
from pipeline.errors import UserError
from pipeline.measure import Scored, completes, score
from pipeline.metrics import LOSS, final_loss, flat_from, read_steps
from pipeline.params import Evaluate
from pipeline.report import draw_comparison, write_report
from pipeline.runner import Event, Facts, Job, Progress

METRICS, PREDICTIONS, REPORT, PICTURE = "metrics.json", "predictions.json", "report.md", "finetuning_comparison.png"
TRAINED = ("finetune_full", "finetune_freeze", "finetune_lora")


def evaluate(job: Job) -> Generator[Event, None, Facts]:
    """All variants on the same sentences and prompts → metrics.json, predictions.json, report.md and the picture."""
    settings = job.project.params.evaluate
    for stage in job.stage.needs:
        job.artifact(stage)
    prompts = read_prompts(job.path(settings.prompts), settings.prompts)
    metrics: dict[str, Any] = {}
    predictions: dict[str, Any] = {}
    before: Scored | None = None
    for done, loaded in enumerate(engine.variants(job.project), 1):
        old = score(loaded, _old_examples(job, loaded, settings))
        before = before or old
        predictions[loaded.name] = _predictions(loaded, prompts, settings.top_k)
        metrics[loaded.name] = {
            **_knowledge(job, loaded, settings, old, before),
            **_kept(predictions[loaded.name]),
            **_cost(job.project, loaded.name),
        }
        yield Progress(done, len(VARIANTS), loaded.name)
    curves = {STAGES[stage].method: read_steps(job.project.artifact(stage) / LOSS) for stage in TRAINED}
    for method, steps in curves.items():
        metrics[method] |= {"final_loss": final_loss(steps), "flat_from_epoch": flat_from(steps)}
    write_json(job.out / METRICS, metrics)
    write_json(job.out / PREDICTIONS, predictions)
    draw_comparison(job.out / PICTURE, curves, metrics)
    write_report(job.out / REPORT, metrics, predictions, settings)
    return {}


def _old_examples(job: Job, loaded: Loaded, settings: Evaluate) -> list[Example]:
    """The sentences that the base was trained on, or others of its words."""
    examples = read_examples(job.path(settings.old_data), settings.old_data)
    for example in examples:
        unknown = loaded.tokenizer.unknown_words(example.text)
        if unknown:
            raise UserError(
                f"{example.place}: {loaded.name} does not know {', '.join(unknown)}. evaluate.old_data must hold "
                "words of the pretraining data only: it measures what is forgotten of them."
            )
    return examples


def _knowledge(job: Job, loaded: Loaded, settings: Evaluate, old: Scored, before: Scored) -> dict[str, Any]:
    """Old and new sentences; forgetting is measured against the pretrained base."""
    found: dict[str, Any] = {
        "old_loss": old.loss,
        "old_perplexity": old.perplexity,
        "forgetting": {
            "loss_rise": old.loss - before.loss,
            "answers_kept": float((old.choices == before.choices).double().mean()),
        },
    }
    examples = read_examples(job.path(settings.new_data), settings.new_data)
    if any(loaded.tokenizer.unknown_words(example.text) for example in examples):
        if loaded.name != "base":
            raise UserError(
                f"{settings.new_data} has words that {loaded.name} does not know. "
                f"Add it to expand_vocab.data in params.yaml."
            )
        return found  # the base has no rows for the new words: there is nothing to measure
    new = score(loaded, examples)
    completed = sum(completes(loaded, example, settings.prompt_words) for example in examples)
    return found | {
        "new_loss": new.loss,
        "new_perplexity": new.perplexity,
        "new_completed": completed,
        "new_sentences": len(examples),
    }


def _predictions(loaded: Loaded, prompts: list[Prompt], k: int) -> list[dict[str, Any]]:
    return [_prediction(loaded, prompt, k) for prompt in prompts]


def _prediction(loaded: Loaded, prompt: Prompt, k: int) -> dict[str, Any]:
    """What was expected, its probability, and the top-k; None where a word is unknown."""
    asked: dict[str, Any] = vars(prompt)
    if loaded.tokenizer.unknown_words(prompt.prompt):
        return asked | {"probability": None, "corrected_probability": None, "top_k": None}
    probabilities = engine.next_probabilities(loaded, prompt.prompt)
    answer, corrected = (loaded.tokenizer.id(word) for word in (prompt.answer, prompt.corrected))
    if answer is None and prompt.rule != "must_learn":
        raise UserError(
            f"prompts: the answer {prompt.answer!r} to {prompt.prompt!r} is not one word that {loaded.name} knows."
        )
    return asked | {
        "probability": None if answer is None else float(probabilities[answer]),
        "corrected_probability": None if corrected is None else float(probabilities[corrected]),
        "top_k": [vars(choice) for choice in engine.top_k(loaded, prompt.prompt, k)],
    }


def _kept(predictions: list[dict[str, Any]]) -> dict[str, Any]:
    """How many old prompts still have their answer first, of how many.

    Answers that a correction must change count among them: no correction was trained here.
    """
    old = [prediction for prediction in predictions if prediction["rule"] != "must_learn"]
    kept = [entry for entry in old if entry["top_k"] and entry["top_k"][0]["token"] == entry["answer"]]
    return {"old_prompts_kept": len(kept), "old_prompts": len(old)}


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
