"""The run log: `loss.csv` and `samples.jsonl`, and `telemetry.csv`, which differs between runs.

A sweep has one of each per adapter, and `sweep.json`: how each ended.
"""

import json
import math
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from pipeline.files.artifact import write_file

LOSS, TELEMETRY, SAMPLES = "loss.csv", "telemetry.csv", "samples.jsonl"
TABLE = "sweep.json"  # adapter → outcome; in the run folder only those that ended so far
DONE, STOPPED, DIVERGED = "done", "stopped early", "diverged"


@dataclass(frozen=True)
class Step:
    """One optimizer step: mean loss in nats per token, gradient norm, labelled tokens so far."""

    step: int
    epoch: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    eval_loss: float | None = None  # on held-out examples, if an evaluation followed the step
    divergence: float | None = None  # from the base on retain texts, in nats per token
    reward_chosen: float | None = None  # of preference training, means over the step's pairs
    reward_rejected: float | None = None
    reward_margin: float | None = None
    reward_accuracy: float | None = None
    eval_accuracy: float | None = None  # reward_accuracy of the held-out pairs
    # share of held-out answers that are as expected; of long texts their ROUGE-L
    eval_answers: float | None = None


REWARDS = ("reward_chosen", "reward_rejected", "reward_margin", "reward_accuracy")
# columns that only some runs have
OPTIONAL = ("eval_loss", "divergence", *REWARDS, "eval_accuracy", "eval_answers")
COLUMNS = tuple(f.name for f in fields(Step) if f.name not in OPTIONAL)
TELEMETRY_COLUMNS = (
    "step",
    "seconds",
    "tokens_per_second",
    "peak_memory_bytes",
    "device",
    "predicted_tensor_bytes",
    "measured_tensor_bytes",
)


@dataclass(frozen=True)
class Peak:
    """Bytes of tensors at the peak of a step."""

    predicted: int = 0  # by the calculator
    measured: int = 0  # 0: not yet


class Sample(NamedTuple):
    """A prompt and its greedy answer after a step."""

    step: int
    prompt: str
    answer: str | None  # None if the model's outputs were not finite
    expected: str | None = None  # the answer in the data, of a held-out example


def parse_sample(line: str) -> Sample:
    """A line of samples.jsonl. Raises ValueError."""
    try:
        row = json.loads(line)
        texts = (None if row.get(key) is None else str(row[key]) for key in ("answer", "expected"))
        return Sample(int(row["step"]), str(row["prompt"]), *texts)
    except (TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(str(error)) from None


class Telemetry(NamedTuple):
    """A line of telemetry.csv; sizes are in bytes, 0 where they were not measured."""

    step: int
    seconds: float  # that the run has trained
    tokens_per_second: float
    resident: int
    predicted: int
    measured: int


def parse_telemetry(line: str) -> Telemetry:
    """A line of telemetry.csv. Raises ValueError."""
    cells = line.split(",")[: len(TELEMETRY_COLUMNS)]
    step, seconds, speed, resident, _, predicted, measured = cells
    return Telemetry(
        int(step), float(seconds), float(speed), int(resident), int(predicted), int(measured)
    )


def last_telemetry(run: Path) -> Telemetry | None:
    """The last line of a run folder's telemetry; None if it has none."""
    try:
        *_, last = (run / TELEMETRY).read_text(encoding="utf-8").splitlines()
        return parse_telemetry(last)
    except (OSError, ValueError):
        return None


# a line of loss.csv: the fields of Step; the optional ones only if the log has any of them
Row = tuple[Any, ...]


def step_parser(header: str) -> Callable[[str], Row]:
    """The parser of the lines below a loss.csv's `header`; it raises ValueError for other lines."""
    columns = header.strip().split(",")
    indices = [columns.index(name) if name in columns else len(columns) for name in OPTIONAL]
    has_optional = min(indices) < len(columns)

    def parse(line: str) -> Row:
        cells = line.split(",")
        step, epoch, loss, rate, norm, tokens = cells[: len(COLUMNS)]
        row = int(step), int(epoch), float(loss), float(rate), float(norm), int(tokens)
        # as in most logs; it saves a third of the curves screen's time to read one
        if not has_optional:
            return row
        optional = (cells[i] if i < len(cells) else "" for i in indices)
        return *row, *(float(cell) if cell else None for cell in optional)

    return parse


def read_steps(path: Path) -> list[Step]:
    """The steps of a run log that may still grow: reading stops at an invalid line."""
    parse, lines = _read_lines(path)
    steps: list[Step] = []
    with suppress(ValueError):
        for line in lines:
            steps.append(Step(*parse(line)))
    return steps


def _read_lines(path: Path) -> tuple[Callable[[str], Row], list[str]]:
    """The parser and the lines of a run log, without a half-written last line."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        text = ""
    header, *lines = text[: text.rfind("\n") + 1].splitlines() or [""]
    return step_parser(header), lines


def count_lines(path: Path) -> int:
    """The whole lines of a file: 0 if it cannot be read."""
    try:
        return path.read_bytes().count(b"\n")
    except OSError:
        return 0


class RunLog:
    """Appends to the logs of a run folder. Lines after `at_step` are dropped when it is opened.

    Seconds in the telemetry go on from those of the line before; tokens per second are those since
    the opening.
    """

    # Two files, as the same training must write the same bytes: loss.csv becomes part of the
    # artifact, whose digest says whether later stages are up to date. What differs from run to run
    # (time, memory) stays in the run folder.

    def __init__(
        self,
        folder: Path,
        at_step: int,
        at_tokens: int,
        evaluated: bool = False,
        retained: bool = False,
        rewarded: bool = False,
        sampled: bool = False,
        answered: bool = False,
    ) -> None:
        wanted = {
            "eval_loss": evaluated,
            "divergence": retained,
            **dict.fromkeys(REWARDS, rewarded),
            "eval_accuracy": evaluated and rewarded,
            "eval_answers": answered,
        }
        self._columns = (*COLUMNS, *(name for name in OPTIONAL if wanted[name]))
        self._loss = _open_at(folder / LOSS, ",".join(self._columns) + "\n", at_step)
        self._telemetry = _open_at(folder / TELEMETRY, ",".join(TELEMETRY_COLUMNS) + "\n", at_step)
        self._files = [self._loss, self._telemetry]
        self._samples: TextIO | None = None
        if sampled or answered:
            self._samples = _open_at(folder / SAMPLES, "", at_step)
            self._files.append(self._samples)
        else:  # those of an earlier run with other settings
            (folder / SAMPLES).unlink(missing_ok=True)
        before = last_telemetry(folder)
        self._before = before.seconds if before else 0.0
        self._start = time.perf_counter()
        self._tokens = at_tokens

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            file.close()

    # Peak is immutable
    def append(self, step: Step, peak: Peak = Peak(), device: str = "cpu") -> None:
        cells = [_cell(getattr(step, name)) for name in self._columns]
        self._loss.write(",".join(cells) + "\n")
        self._loss.flush()  # for those who watch
        since = time.perf_counter() - self._start
        seconds = self._before + since
        speed = (step.tokens - self._tokens) / since  # labelled tokens
        self._telemetry.write(
            f"{step.step},{seconds:.6f},{speed:.1f},{peak_memory()},{device},"
            f"{peak.predicted},{peak.measured}\n"
        )

    def append_samples(self, samples: Sequence[Sample]) -> None:
        if self._samples is None or not samples:
            return
        for sample in samples:
            row = sample._asdict()
            if sample.expected is None:
                del row["expected"]
            self._samples.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._samples.flush()

    def sync(self) -> None:
        """Flush the logs to disk. Called before writing a checkpoint that relies on them."""
        # A resumed run drops the lines after its checkpoint's step and writes them again. Lines
        # before it are nowhere else: a checkpoint that survives a power cut without them would
        # leave a gap in the curve.
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())


def _cell(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.7g}" if isinstance(value, float) else str(value)


def peak_memory() -> int:
    """Peak resident bytes of this process."""
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts kibibytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _open_at(path: Path, header: str, at_step: int) -> TextIO:
    """Open `path` for appending, without the lines of steps after `at_step`.

    It is truncated in place, so that a kill at any moment keeps the lines before.
    """
    if not at_step or not path.exists():
        path.write_text(header, encoding="utf-8")
        return path.open("a", encoding="utf-8")
    keep = 0
    with path.open("rb+") as file:
        for line in file:
            number = line.split(b",", 1)[0].removeprefix(b'{"step": ')
            if not line.endswith(b"\n") or (number.isdigit() and int(number) > at_step):
                break
            keep += len(line)
        file.truncate(keep)
    return path.open("a", encoding="utf-8")


def flat_from(steps: Sequence[Step]) -> int | None:
    """`flat_epoch` of a run."""
    return flat_epoch(epoch_means(steps))


def flat_epoch(means: Sequence[float]) -> int | None:
    """The first epoch (from 1) from which the mean loss stays near that of the last epoch.

    Near is within 5% of the difference between the first and the last mean. None if only the last
    epoch is near: the curve has not flattened.
    """
    if len(means) < 2 or not all(map(math.isfinite, means)):
        return None
    margin = 0.05 * abs(means[0] - means[-1])
    flat = len(means)
    while flat > 0 and abs(means[flat - 1] - means[-1]) <= margin:
        flat -= 1
    return flat + 1 if flat + 1 < len(means) else None


def final_loss(steps: Sequence[Step]) -> float | None:
    """The mean loss of the last epoch; a single batch's loss would depend on its sentences."""
    return epoch_means(steps)[-1] if steps else None


def final_accuracy(steps: Sequence[Step]) -> float | None:
    """The share of pairs whose chosen answer has the higher reward, over the last epoch's steps."""
    last = [step for step in steps if step.epoch == steps[-1].epoch]
    shares = [step.reward_accuracy for step in last if step.reward_accuracy is not None]
    return sum(shares) / len(shares) if shares else None


def best_step(steps: Iterable[Step], metric: str) -> Step | None:
    """The first step with the lowest held-out loss, or by `eval_answers` with the most answers as
    expected and among these the lowest loss; None if none was evaluated.
    """

    def order(step: Step) -> tuple[float, float]:
        answers = step.eval_answers or 0.0
        return (-answers if metric == "eval_answers" else 0.0), step.eval_loss or 0.0

    evaluated = []
    for step in steps:
        if step.eval_loss is not None and not math.isnan(step.eval_loss):
            evaluated.append(step)
    return min(evaluated, key=order, default=None)


def final_answers(steps: Sequence[Step], takes_best: bool, metric: str) -> float | None:
    """The share of right answers of the weights that training returned: the best or the last."""
    asked = [step for step in steps if step.eval_answers is not None]
    best = best_step(asked, metric) if takes_best else None
    last = best or (asked[-1] if asked else None)
    return last.eval_answers if last else None


def read_final_loss(path: Path) -> float | None:
    """`final_loss` of a run log; only its last epoch is parsed. Raises OSError."""
    parse, lines = _read_lines(path)
    steps: list[Step] = []
    try:
        for line in reversed(lines):
            step = Step(*parse(line))
            if steps and step.epoch != steps[-1].epoch:
                break
            steps.append(step)
    except ValueError:  # an invalid line
        return final_loss(read_steps(path))
    return final_loss(steps[::-1])


def epoch_means(steps: Sequence[Step]) -> list[float]:
    """Mean loss of each epoch, in order."""
    epochs: dict[int, list[float]] = {}
    for step in steps:
        epochs.setdefault(step.epoch, []).append(step.loss)
    return [sum(losses) / len(losses) for losses in epochs.values()]


def remove_other_logs(run: Path, names: Container[str]) -> None:
    """Remove the logs of adapters that are no longer in a sweep; `names`: those that are."""
    for log in run.glob(f"*/{LOSS}"):
        if log.parent.name not in names:
            shutil.rmtree(log.parent)


def read_run_outcomes(folder: Path) -> dict[str, str]:
    """Name → outcome of each adapter that has ended, in an artifact or a run folder."""
    try:
        rows = json.loads((folder / TABLE).read_text(encoding="utf-8"))
        return {name: str(row["state"]) for name, row in rows.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def write_run_outcomes(folder: Path, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the outcomes of adapters that ended early. If that fails, training continues."""
    with suppress(OSError):
        write_file(folder / TABLE, json.dumps(rows, indent=2, ensure_ascii=False) + "\n")
