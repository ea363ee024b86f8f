"""Certify an adapter or a model: open it in each program, and compare with its own library."""

import tempfile
from collections.abc import Generator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from pipeline.adapters.config import CONFIG, read_config
from pipeline.certify import chat
from pipeline.certify.compare import against, compared, itself
from pipeline.certify.engines import Wanted
from pipeline.certify.kinds import Checked
from pipeline.certify.measured import Answers, Question, ask
from pipeline.certify.process import Process
from pipeline.data.tokenizers.word import load_tokenizer
from pipeline.errors import UserError
from pipeline.inference.score import builtin_prompts
from pipeline.models.device import best_device
from pipeline.models.load import skeleton
from pipeline.project.runner import Event, Progress

PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"
ADAPTERS = Wanted("peft")  # the library of adapters
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

    def of(self, wanted: Wanted, kind: str) -> Process:
        """A running process for a kind of `KINDS`. Raises UserError where it cannot be had."""
        key = wanted._replace(precision=None)
        process = self._open.get(key)
        if process is None or not process.is_alive:
            process = Process(wanted.python(kind), wanted.engine.runner, wanted.name, self._device)
            self._open[key] = self._stack.enter_context(closing(process))
        return process


def certify(
    checked: Checked, engines: Sequence[Wanted], processes: Processes
) -> Generator[Event, None, dict[str, Any]]:
    """The certificate: what is wrong with it, and what each engine makes of it.

    Raises UserError where nothing can be compared: without a base, readable files, or the library
    of its format.
    """
    total = len(engines) + 1
    yield Progress(0, total, "its own library")
    problems, notes = checked.kind.inspect(checked)
    problems += chat.of_files(checked.folder, checked.base)
    reference = Wanted(checked.kind.library)
    processes.of(reference, checked.kind_name)  # without it nothing can be compared
    question = _question(checked)
    expected = None
    try:
        expected = _ask(checked, reference, processes, question)
        problems += itself(expected)
    except UserError as error:
        problems.append(f"its own library does not open it: {error}")
    source = checked.source and _ask_source(checked, processes, question)
    if source and expected:
        rounding = checked.kind.rounding(checked.folder)
        problems += [f"beside its adapter: {p}" for p in against(source, expected, rounding)[1]]
    entries = list[dict[str, Any]]()
    for number, wanted in enumerate(engines, start=1):
        yield Progress(number, total, wanted.label)
        entry, found = _entry(checked, wanted, processes, question, expected)
        if source and found:
            entry |= compared(source, found)
        entries.append(entry)
    verdicts = {entry["verdict"] for entry in entries}
    verdict = PASSED if PASSED in verdicts else NOT_RUN
    return {
        "verdict": FAILED if problems or FAILED in verdicts else verdict,
        "kind": checked.kind_name,
        "problems": problems,
        "notes": notes,
        "reference": None if expected is None else expected.name,
        "source": None if source is None else source.name,
        "engines": entries,
    }


def _ask_source(checked: Checked, processes: Processes, question: Question) -> Answers:
    """Base + the adapter that it was made from. Raises UserError where PEFT does not open it."""
    assert checked.source is not None
    adapter = Checked(checked.source, checked.base, checked.trust_remote_code)
    try:
        return _ask(adapter, ADAPTERS, processes, question, by_group=False)
    except UserError as error:
        raise UserError(f"--adapter {checked.source}: PEFT does not open it: {error}") from None


def _entry(
    checked: Checked,
    wanted: Wanted,
    processes: Processes,
    question: Question,
    expected: Answers | None,
) -> tuple[dict[str, Any], Answers | None]:
    """What one engine makes of it, and what it answered."""
    entry: dict[str, Any] = {"engine": wanted.label}

    def ended(verdict: str, *problems: str) -> tuple[dict[str, Any], None]:
        return {**entry, "verdict": verdict, "problems": [*problems]}, None

    if checked.kind_name not in wanted.engine.kinds:
        return ended(NOT_RUN, f"it does not read {checked.kind.about}")
    try:
        process = processes.of(wanted, checked.kind_name)
    except UserError as error:
        return ended(NOT_RUN, str(error))
    entry["name"] = process.name
    is_reference = wanted == Wanted(checked.kind.library) and expected is not None
    try:
        found = expected if is_reference else _ask(checked, wanted, processes, question)
    except UserError as error:
        return ended(FAILED, f"it does not open it: {error}")
    if expected is None or found is None:
        return ended(NOT_RUN, "there is nothing to compare it with")
    measured, problems = against(expected, found, wanted.engine.rounding(wanted.precision))
    problems += chat.in_program(process, checked.folder, checked.base)
    verdict = FAILED if problems else PASSED
    measured |= _if_merged(checked, wanted)
    return {**entry, "verdict": verdict, "problems": problems, **measured}, found


def _if_merged(checked: Checked, wanted: Wanted) -> dict[str, Any]:
    """What would be left of an adapter in a merge of this precision, where it can be merged."""
    measure = wanted.engine.if_merged
    if measure is None:
        return {}
    try:
        with tempfile.TemporaryDirectory() as name:
            found = measure(checked, wanted.precision, Path(name))
    except UserError:
        return {}
    return {"if_merged": found} if found else {}


def _ask(
    checked: Checked,
    wanted: Wanted,
    processes: Processes,
    question: Question,
    by_group: bool = True,
) -> Answers:
    process = processes.of(wanted, checked.kind_name)
    with tempfile.TemporaryDirectory() as name:
        room = Path(name)
        opens = wanted.engine.opens(checked, wanted.precision, room)
        return ask(process, opens, checked, question, room, by_group)


def _question(checked: Checked) -> Question:
    """Ids of everyday English, and of tokens from the whole vocabulary. Raises UserError."""
    tokenizer = load_tokenizer(checked.base)
    model = skeleton(checked.base, checked.trust_remote_code)
    rows = model.shape.rows
    most = min(model.max_length, MOST_TOKENS // 2)
    step = max(1, rows // SPREAD)
    spread = [*_trained_rows(checked.folder, rows), *range(rows - 1, -1, -step)]
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
    config = read_config(adapter) if (adapter / CONFIG).is_file() else {}
    named: Any = config.get("trainable_token_indices") or []
    lists = named.values() if isinstance(named, dict) else [named]
    ids = [id_ for ids in lists if isinstance(ids, list) for id_ in ids]
    return [id_ for id_ in ids if isinstance(id_, int) and 0 <= id_ < rows][:SPREAD]
