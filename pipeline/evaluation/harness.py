"""Runs tasks of lm-evaluation-harness (Gao et al., `lm-eval`) on models, one after the other."""

import logging
import math
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.adapters.folder import base_of
from pipeline.errors import UserError, first_line, is_out_of_memory, require
from pipeline.inference.model_pool import Folders, ModelPool
from pipeline.project.params.aliases import suggest

# lm-eval's own seeds: of `random`, and of numpy and the choice of few-shot examples
SEEDS = 0, 1234


@dataclass(frozen=True)
class HarnessOptions:
    """What to run, and how the models are asked."""

    tasks: Sequence[str]  # names, or YAML files
    include_path: Path | None = None  # a folder of more tasks
    limit: int | None = None  # examples of each task; None: all
    num_fewshot: int | None = None  # None: as the task says
    apply_chat_template: bool = False  # ask in turns of the model's chat template


def named(base: Path | None, adapters: Sequence[Path]) -> dict[str, tuple[Path, Path | None]]:
    """The bases, each followed by its adapters. Raises UserError if a base is missing."""
    bases = {adapter: base or base_of(adapter) for adapter in adapters or (None,)}
    models: dict[str, tuple[Path, Path | None]] = {}
    for folder in dict.fromkeys(bases.values()):
        models[str(folder)] = folder, None
        models |= {
            str(adapter): (folder, adapter) for adapter in adapters if bases[adapter] == folder
        }
    return models


def run(
    models: Folders, options: HarnessOptions, trust_remote_code: bool, note: Callable[[str], None]
) -> dict[str, Any]:
    """The scores of all models, as the JSON that is printed; `note` tells the user what happens.

    Each base is loaded once for itself and its adapters. Raises UserError for everything
    that goes wrong inside lm-eval, a task's own code included.
    """
    require("lora evaluate --harness")
    from pipeline.evaluation.harness_model import HarnessModel, UnknownWords

    # warnings are for a task's author; an error that stops the task is raised
    for name in ("lm_eval", "datasets", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    pool = ModelPool()
    results, about = dict[str, Any](), dict[str, Any]()
    with redirect_stdout(sys.stderr):  # stdout is for the result
        tasks = _load_tasks(options)
        for loaded in pool.in_turn(models, trust_remote_code):
            name = loaded.name
            note(f"{name}: {', '.join(tasks['tasks'])}")
            model = HarnessModel(pool, name)
            try:
                with _explained(f"{name}: lm-eval failed"):
                    scored = _evaluate(model, tasks, options)
            # such as a base that is not expanded; the models after it may know the words
            except UnknownWords as error:
                note(f"{error} It is left out.")
                continue
            if model.truncated:
                note(
                    f"{name}: {model.truncated} contexts were cut from the left to its "
                    f"{model.max_length} tokens."
                )
            results[name] = {task: _metrics(scores) for task, scores in scored["results"].items()}
            about = {task: _describe(task, scored) for task in results[name]}
    if not results:
        raise UserError("No model knows the words of these tasks. Use those of the training data.")
    return {
        "lm_eval": version("lm-eval"),
        "limit": options.limit,
        "apply_chat_template": options.apply_chat_template,
        "tasks": about,
        "results": {name: results[name] for name in models if name in results},
    }


def _load_tasks(options: HarnessOptions) -> dict[str, dict[str, Any]]:
    """lm-eval's tasks and groups by name. Raises UserError for what is unknown or not loadable."""
    from datasets import disable_progress_bars
    from lm_eval.tasks import TaskManager

    disable_progress_bars()
    folder = options.include_path
    if folder is not None and not folder.is_dir():
        raise UserError(
            f"--include-path: {folder} is not a folder. Name the folder with the tasks' YAML files."
        )
    names = list(dict.fromkeys(options.tasks))
    paths = {name for name in names if name.endswith((".yaml", ".yml")) and Path(name).is_file()}
    # The index of lm-eval's own 15,000 tasks takes four seconds.
    manager = TaskManager(include_path=folder, include_defaults=False)
    if not {*names} <= paths | {*manager.all_subtasks}:
        manager = TaskManager(include_path=folder)
    if unknown := [name for name in names if name not in paths and name not in manager.task_index]:
        near = [suggest(name, manager.all_tasks, {}) for name in unknown]
        meant = ", ".join(filter(None, near))
        hint = f"Did you mean {meant}? " if meant else ""
        raise UserError(
            f"unknown task {', '.join(unknown)}. {hint}--harness takes a task of lm-eval or of "
            "--include-path, or a YAML file."
        )
    loaded: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in names:
        with _explained(f"task {name} cannot be loaded"):
            for kind, entries in manager.load([name]).items():
                loaded[kind] |= entries
    for task in loaded["tasks"].values():
        number = task.get_config("num_fewshot")
        if options.num_fewshot is not None and number != 0:  # 0: the task rules examples out
            task.set_config(key="num_fewshot", value=options.num_fewshot)
        elif number is None:
            task.set_config(key="num_fewshot", value=0)
    return loaded


def _evaluate(model: Any, tasks: Any, options: HarnessOptions) -> Any:
    """lm-eval's results, from the same seeds for each model."""
    from lm_eval.evaluator import evaluate

    # simple_evaluate would do the same, and then describe the machine, up to 15 s per model
    random.seed(SEEDS[0])
    np.random.seed(SEEDS[1])
    for task in tasks["tasks"].values():
        task.set_fewshot_seed(seed=SEEDS[1])
    chat = options.apply_chat_template
    return evaluate(
        lm=model,
        task_dict=tasks,
        limit=options.limit,
        log_samples=False,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
    )


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turns whatever lm-eval, its libraries or a task's code raises into a UserError."""
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        if is_out_of_memory(error):
            raise
        hint = "Check the YAML file of the task, and the code that it names."
        if isinstance(error, OSError):
            hint = (
                "Data of the hub needs the network; local files are named by `dataset_path: json` "
                "and `data_files`."
            )
        raise UserError(
            f"{what}: {type(error).__name__}: {first_line(error).rstrip('.')}. {hint}"
        ) from None


def _metrics(scores: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """lm-eval's `metric,filter` → value and standard error; None where lm-eval has none."""

    def finite(value: Any) -> float | None:
        is_number = isinstance(value, int | float | np.number) and math.isfinite(value)
        return float(value) if is_number else None

    metrics = {}
    for key, value in scores.items():
        metric, comma, used = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            error = scores.get(f"{metric}_stderr,{used}")
            metrics[key] = {"value": finite(value), "stderr": finite(error)}
    return metrics


def _describe(task: str, scored: Mapping[str, Any]) -> dict[str, Any]:
    """The task's version, its number of examples, and how many of them precede each prompt."""
    return {
        "version": scored["versions"].get(task),
        "num_fewshot": scored["n-shot"].get(task),
        "examples": (scored["n-samples"].get(task) or {}).get("effective"),
        "higher_is_better": scored["higher_is_better"].get(task, {}),
    }


def table(document: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns and rows of the results: a row for each task and metric, a column for each model."""
    results, rows = document["results"], []
    for task, about in document["tasks"].items():
        for key in next(iter(results.values()))[task]:
            metric, _, used = key.partition(",")
            arrow = {True: " ↑", False: " ↓"}.get(about["higher_is_better"].get(metric), "")
            by = "" if used == "none" else f" ({used})"
            cells = [_cell(**scores[task][key]) for scores in results.values()]
            rows.append((task, f"{metric}{by}{arrow}", *cells))
    return ("task", "metric", *results), rows


def _cell(value: float | None, stderr: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.4f}" if stderr is None else f"{value:.4f} ± {stderr:.4f}"
