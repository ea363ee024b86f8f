"""An sbatch script with an array, for clusters on which `lora` itself may not submit."""

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

from pipeline.errors import UserError
from pipeline.fleet.engines.slurm import FIRST_PORT, PORTS, job_options
from pipeline.fleet.formats import CACHE, Batch, Format, quoted

NAME = "units.sbatch"
CHECKED = "Run on Slurm 24.11 with nodes that are processes of one machine, never on a cluster."
FIRST = f"$(scontrol show hostnames | head -n 1):$(({FIRST_PORT} + SLURM_JOB_ID % {PORTS}))"

# USR1 comes before the time limit, to this shell alone. lora writes a checkpoint and ends with an
# error, as it does after a preemption, where Slurm itself puts the job back.
RUN = """\
mkdir -p "$LORA_WORK"
"$@" & child=$!
trap 'again=1; kill -TERM "$child"' USR1
trap 'kill -TERM "$child"' TERM
wait "$child"; code=$?
while kill -0 "$child" 2>/dev/null; do wait "$child"; code=$?; done
if [ "$again" ] && [ "$code" != 0 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
"""


def _files(batch: Batch) -> Mapping[str, str]:
    cluster = batch.cluster
    options = {
        "job-name": f"lora-{batch.name}",
        "array": f"1-{len(batch.units)}%{cluster.at_once}",
        "output": batch.folder / "slurm-%a.log",
        "open-mode": "append",
        **job_options(cluster),
        # they are those of its engine
        **(cluster.options if cluster.engine == "slurm" else {}),
        **{key: value for key, value in batch.options.items() if key != CACHE},
    }
    lines = ["requeue", *(f"{key}={_value(key, str(value))}" for key, value in options.items())]
    if batch.nodes > 1:
        lines += [f"nodes={batch.nodes}", "ntasks-per-node=1"]
    script = ["#!/bin/bash", batch.head(None, CHECKED).rstrip()]
    script += [f"#SBATCH --{line}" for line in lines]
    script += [*cluster.setup, 'case "$SLURM_ARRAY_TASK_ID" in']
    for number in range(1, len(batch.units) + 1):
        script += [f"{number})", *_unit(batch, number), ";;"]
    return {NAME: "\n".join([*script, "esac", RUN])}


def _unit(batch: Batch, number: int) -> list[str]:
    """Lines that set what runs, and where."""
    unit = batch.units[number - 1]
    command = quoted([sys.executable, "-P", "-m", "lora_workbench", *unit.command])
    if unit.nodes > 1:
        together = f"srun --kill-on-bad-exit=1 --nodes={unit.nodes}"
        command = f'{together} {command} --nnodes={unit.nodes} "--rdzv-endpoint={FIRST}"'
    return [
        f"cd {quoted([unit.root])} || exit",
        batch.exports(number),
        f"set -- {command}",
    ]


def _value(key: str, value: str) -> str:
    if not value.isprintable() or not key.replace("-", "").isalnum():
        raise UserError(f"slurm: {key}={value!r} is no option of one line. Correct it.")
    return shlex.quote(value)


def _next_step(_batch: Batch, folder: Path) -> str:
    return f"sbatch {quoted([str(folder / NAME)])}"


FORMAT = Format(_files, _next_step, {}, any_option=True)
