"""Certify an adapter: open it in each program, and compare with the adapter's own library."""

import tempfile
from collections.abc import Generator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from pipeline.adapters.config import LORA, WEIGHTS, Unsupported, read_config
from pipeline.certify import chat
from pipeline.certify.compare import against, itself
from pipeline.certify.engines import ENGINES, Wanted
from pipeline.certify.measured import Answers, Checked, Question, ask
from pipeline.certify.process import Process
from pipeline.data.tokenizers.word import load_tokenizer
from pipeline.errors import UserError
from pipeline.files.base_model import tensor_locations
from pipeline.inference.score import builtin_prompts
from pipeline.models.device import best_device
from pipeline.models.load import skeleton
from pipeline.project.runner import Event, Progress
from pipeline.weights.merge_plan import attach_to_meta_model

PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"
REFERENCE = Wanted("peft", None)
MOST_TOKENS = 512  # of all prompts
SHORT = 2  # prompts on which groups are compared
GREEDY_TOKENS = 32
SPREAD = 32  # tokens of the prompt that has rows of the whole vocabulary


class Processes:
    """The engines' processes, each started once: a program takes seconds to be imported."""

    def __init__(self) -> None:
        self._device = str(best_device())
        self._stack = ExitStack()
        self._open = dict[Wanted, Process]()

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def of(self, wanted: Wanted) -> Process:
        """A running process. Raises UserError where the engine cannot be had."""
        process = self._open.get(wanted)
        if process is None or not process.is_alive:
            runner = ENGINES[wanted.name].runner
            process = Process(wanted.python(), runner, wanted.name, self._device)
            self._open[wanted] = self._stack.enter_context(closing(process))
        return process


def certify(
    checked: Checked, engines: Sequence[Wanted], processes: Processes
) -> Generator[Event, None, dict[str, Any]]:
    """The certificate: what is wrong with the adapter, and what each engine makes of it.

    Raises UserError where nothing can be compared: without a base, safetensors, or PEFT.
    """
    total = len(engines) + 1
    yield Progress(0, total, "the adapter's own library")
    _refuse_others(checked)
    question = _question(checked)
    problems, notes = _files(checked)
    processes.of(REFERENCE)  # without it nothing can be compared
    expected = None
    try:
        expected = _ask(checked, REFERENCE, processes, question)
        problems += itself(expected)
    except UserError as error:
        problems.append(f"its own library does not open it: {error}")
    entries = list[dict[str, Any]]()
    for number, wanted in enumerate(engines, start=1):
        yield Progress(number, total, wanted.label)
        entries.append(_entry(checked, wanted, processes, question, expected))
    verdicts = {entry["verdict"] for entry in entries}
    verdict = PASSED if PASSED in verdicts else NOT_RUN
    return {
        "verdict": FAILED if problems or FAILED in verdicts else verdict,
        "problems": problems,
        "notes": notes,
        "reference": None if expected is None else expected.name,
        "engines": entries,
    }


def _entry(
    checked: Checked,
    wanted: Wanted,
    processes: Processes,
    question: Question,
    expected: Answers | None,
) -> dict[str, Any]:
    """What one engine makes of the adapter."""
    entry: dict[str, Any] = {"engine": wanted.label}
    try:
        process = processes.of(wanted)
    except UserError as error:
        return {**entry, "verdict": NOT_RUN, "problems": [str(error)]}
    entry["name"] = process.name
    try:
        is_reference = wanted == REFERENCE and expected is not None
        found = expected if is_reference else _ask(checked, wanted, processes, question)
    except UserError as error:
        return {**entry, "verdict": FAILED, "problems": [f"it does not open it: {error}"]}
    if expected is None or found is None:
        return {**entry, "verdict": NOT_RUN, "problems": ["there is nothing to compare it with"]}
    measured, problems = against(expected, found)
    problems += chat.in_program(process, checked.adapter, checked.base)
    verdict = FAILED if problems else PASSED
    return {**entry, "verdict": verdict, "problems": problems, **measured}


def _ask(checked: Checked, wanted: Wanted, processes: Processes, question: Question) -> Answers:
    with tempfile.TemporaryDirectory() as room:
        return ask(processes.of(wanted), checked, question, Path(room))


def _refuse_others(checked: Checked) -> None:
    """Raises UserError for what has no safetensors: a program would open a pickle instead."""
    read_config(checked.adapter)
    if not (checked.adapter / WEIGHTS).is_file():
        raise UserError(
            f"{checked.adapter} has no {WEIGHTS}. Save the adapter with PEFT's save_pretrained, "
            "which writes safetensors."
        )
    tensor_locations(checked.base)


def _files(checked: Checked) -> tuple[list[str], list[str]]:
    """Why our own reader rejects the adapter: keys, shapes, settings, another base.

    And as notes, what it does not read.
    """
    base = checked.base
    problems, notes = list[str](), list[str]()
    config = read_config(checked.adapter)
    if config.get("peft_type") == LORA and "lora_alpha" not in config:
        problems.append("adapter_config.json has no lora_alpha: PEFT takes 8")
    try:
        model = skeleton(base, checked.trust_remote_code)
        attach_to_meta_model(model, base, tensor_locations(base), checked.adapter)
    except Unsupported as error:
        notes.append(str(error))
    except UserError as error:
        problems.append(str(error))
    return [*problems, *chat.of_files(checked.adapter, base)], notes


def _question(checked: Checked) -> Question:
    """Ids of everyday English, and of tokens from the whole vocabulary. Raises UserError."""
    tokenizer = load_tokenizer(checked.base)
    model = skeleton(checked.base, checked.trust_remote_code)
    rows = model.shape.rows
    most = min(model.max_length, MOST_TOKENS // 2)
    step = max(1, rows // SPREAD)
    spread = [*_trained_rows(checked.adapter, rows), *range(rows - 1, -1, -step)]
    prompts = [spread[:most]]
    left = MOST_TOKENS - len(prompts[0])
    for text in builtin_prompts():
        ids = list(tokenizer.encode(text))[: min(most, left)]
        if ids:
            prompts.append(ids)
        left -= len(ids)
    start = prompts[1][: max(1, model.max_length // 2)]
    limit = min(GREEDY_TOKENS, model.max_length - len(start))
    return Question(prompts, prompts[:SHORT], start, limit, sorted(tokenizer.end_ids))


def _trained_rows(adapter: Path, rows: int) -> list[int]:
    """Ids of tokens that the adapter trains: without them in a prompt nothing would move."""
    named: Any = read_config(adapter).get("trainable_token_indices") or []
    lists = named.values() if isinstance(named, dict) else [named]
    ids = [id_ for ids in lists if isinstance(ids, list) for id_ in ids]
    return [id_ for id_ in ids if isinstance(id_, int) and 0 <= id_ < rows][:SPREAD]
