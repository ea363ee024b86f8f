"""Runs the checks, each in a process and for a limited time, and writes a report for an issue.

A process frees the card's memory when it ends, keeps a spoiled CUDA context to itself, and can be
killed.
"""

import getpass
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch

from pipeline.files.artifact import write_file
from pipeline.project import process
from pipeline.project.provenance import version_of
from pipeline.stages.gpu_checks.checks import CHECKS, NOT_ENDED, Check, Seen, end_tree

COMMAND = (sys.executable, "-P", "-m", "pipeline.stages.gpu_checks")  # of one check
VERDICTS = {True: "ok", False: "not ok", None: "not run"}
FENCE = "```json\n"  # what a program reads of the report begins after it


@dataclass(frozen=True)
class Result:
    """The lines of a check, and how long it took."""

    check: Check
    seen: Sequence[Seen]
    seconds: float = 0.0

    @property
    def as_expected(self) -> bool:
        return all(line.as_expected is not False for line in self.seen)

    def lines(self) -> list[dict[str, str]]:
        """The lines as they are shown, with what to do if one is not as expected, or not tried."""
        lines = []
        for seen in self.seen:
            to_do = ""
            if seen.as_expected is None:
                to_do = seen.remedy
            elif not seen.as_expected:
                to_do = seen.remedy or self.check.remedy
            verdict = VERDICTS[seen.as_expected]
            lines.append({"what": seen.what, "verdict": verdict, "seen": seen.text, "to do": to_do})
        return lines


def run(device: torch.device) -> Iterator[Result]:
    """The result of each check, as soon as it has run."""
    with TemporaryDirectory() as folder:
        for check in CHECKS.values():
            started = perf_counter()
            seen = list(map(_anonymous, _run(check, device, Path(folder))))
            yield Result(check, seen, perf_counter() - started)


def _run(check: Check, device: torch.device, folder: Path) -> list[Seen]:
    lines, errors = folder / "lines.jsonl", folder / "errors"
    lines.write_bytes(b"")
    variables = {**os.environ, process.VARIABLE: str(device)}
    with errors.open("wb") as file:
        running = subprocess.Popen(
            [*COMMAND, check.name, lines], env=variables, stdout=file, stderr=file
        )
        try:
            code = running.wait(check.limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if running.poll() is None:
                end_tree(running.pid)
                running.wait()
    written = lines.read_text(encoding="utf-8").splitlines()
    seen = [Seen(*json.loads(line)) for line in written if line.endswith("]")]
    if code is None:
        seen.append(Seen("", f"failed: not done after {check.limit} s", False, NOT_ENDED))
    elif code:
        *_, last = ["", *errors.read_text(encoding="utf-8", errors="replace").splitlines()]
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        ended = f"ended {how}"
        seen.append(Seen("", f"failed: {ended}: {last[:300]}", False, NOT_ENDED))
    return seen


def _anonymous(seen: Seen) -> Seen:
    """Without names of host, user and folders, as the report goes into an issue."""
    return seen._replace(
        what=_without_names(seen.what),
        text=_without_names(seen.text),
        remedy=_without_names(seen.remedy),
    )


def _without_names(text: str) -> str:
    folders = [Path.cwd(), Path(sys.prefix)]
    with suppress(RuntimeError):  # a container's user may have none
        folders.insert(0, Path.home())
    for path in folders:
        text = text.replace(f"{path}/", "…/")
    text = re.sub(r"(?<![\w.…/])/(?:[^\s/:'\"]+/)+", "…/", text)
    names = [socket.gethostname()]
    with suppress(OSError, KeyError):  # nor a name
        names.append(getpass.getuser())
    for name in filter(None, names):
        text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", "…", text)
    return text


def document(device: torch.device, results: Sequence[Result]) -> dict[str, Any]:
    """The report for programs."""
    checks = [
        {
            "name": result.check.name,
            "expected": result.check.expected,
            "seconds": round(result.seconds, 1),
            "lines": result.lines(),
        }
        for result in results
    ]
    version = version_of("lora-workbench")
    return {"lora-workbench": version, "device": str(device), "checks": checks}


def write(path: Path, device: torch.device, results: Sequence[Result]) -> None:
    """Write Markdown: a table to read, and the same as JSON after FENCE. Raises OSError."""
    rows = ["| check | expected | verdict | seen | to do |", "|---|---|---|---|---|"]
    for result in results:
        for line in result.lines():
            name = f"{result.check.name}: {line['what']}".removesuffix(": ")
            cells = (name, result.check.expected, line["verdict"], line["seen"], line["to do"])
            rows.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    seconds = sum(result.seconds for result in results)
    text = json.dumps(document(device, results), indent=1, ensure_ascii=False)
    parts = [
        "# lora doctor --gpu",
        f"{seconds:.0f} s on {device}.",
        "\n".join(rows),
        f"{FENCE}{text}\n```\n",
    ]
    write_file(path, "\n\n".join(parts))
