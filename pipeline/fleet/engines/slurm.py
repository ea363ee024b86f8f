"""Slurm, by plain sbatch: an array with a task for each unit, requeued until it has ended."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any

from pipeline.errors import AGAIN, UserError
from pipeline.fleet.engines import Place, Queued, Submission, place_of
from pipeline.fleet.unit import CORES, read_unit
from pipeline.project.process import WORK

SCRIPT, NEXT = "sbatch.sh", "next.sh"
FIRST_PORT, PORTS = 20_000, 10_000  # at which machines of a job meet
WAITS = (
    "PENDING",
    "CONFIGURING",
    "REQUEUED",
    "REQUEUE_HOLD",
    "REQUEUE_FED",
    "SUSPENDED",
    "RESV_DEL_HOLD",
)
RUNS = ("RUNNING", "COMPLETING", "SIGNALING", "STAGE_OUT", "STOPPED")
# what a job may find in the environment of the shell that submits it, and must not
FOREIGN = re.compile(rf"SLURM_(?!CONF)|{WORK}|{CORES}|DVC_")
UNKNOWN_JOB = "Invalid job id"  # squeue's words for jobs that ended a while ago


class Slurm:
    """Submits units with the cluster's settings."""

    has_gangs = has_queue = True
    unread = ("address",)

    def __init__(self, _name: str, cluster: Any) -> None:
        self._cluster = cluster

    def check(self) -> None:
        if shutil.which("sbatch") is None:
            raise UserError(
                "sbatch is not on this machine. Run this on a login node of the cluster, or choose "
                "another with --on."
            )

    def place(self) -> Place:
        return place_of(self._cluster, self._cluster.at_once, "what Slurm gives")

    def submit(self, run: Submission, numbers: Collection[int]) -> str:
        self.check()
        script = run.folder / SCRIPT
        script.write_text(batch_script(run, self._cluster.setup), encoding="utf-8")
        array = f"{','.join(map(str, sorted(numbers)))}%{self._cluster.at_once}"
        options = self._options(run)
        nodes = read_unit(run.unit_folder(min(numbers))).nodes
        if nodes > 1:
            options += [f"--nodes={nodes}", "--ntasks-per-node=1"]
        return _sbatch(run.cluster, [f"--array={array}", *options, str(script)])

    def states(self, run: Submission, numbers: Collection[int]) -> Mapping[int, Queued]:
        rows, found = dict[str, tuple[str, str, str]](), dict[int, Queued]()
        if run.jobs:
            told = _query([job for job, _ in run.jobs])
            # an answer that did not come says nothing of the units
            if told.returncode and UNKNOWN_JOB not in told.stderr:
                return dict.fromkeys(numbers, Queued("queued", "", told.stderr.strip()))
            rows = _parse(told.stdout)
        for number in numbers:
            # the last job that has the unit
            job = next((job for job, of in reversed(run.jobs) if number in of), "")
            state, node, reason = rows.get(f"{job}_{number}", ("", "", ""))
            if state in RUNS:
                found[number] = Queued("running", node)
            elif state in WAITS:
                found[number] = Queued("queued", "", reason)
            elif state == "CANCELLED":
                found[number] = Queued("stopped", node, reason)
            elif state == "OUT_OF_MEMORY":
                found[number] = Queued("no memory", node, "out of memory, says Slurm")
        return found

    def cancel(self, run: Submission, numbers: Collection[int]) -> None:
        tasks = [f"{job}_{n}" for job, of in run.jobs for n in of if n in numbers]
        if not tasks:  # scancel would take all jobs of the user
            return
        # the signal to the batch shell too: it passes it on, and a checkpoint is written; with a
        # task that does not run scancel would try for 95 s
        signal = ["scancel", "--full", "--signal=TERM", "--state=RUNNING"]
        subprocess.run([*signal, *tasks], capture_output=True, check=False)
        subprocess.run(["scancel", *tasks], capture_output=True, check=False)

    def follow(self, run: Submission, script: str) -> None:
        path, cluster = run.folder / NEXT, self._cluster
        path.write_text("\n".join(["#!/bin/bash", *cluster.setup, script, ""]), encoding="utf-8")
        options = {
            "job-name": f"lora-{run.name}-next",
            "output": run.folder / "next.log",
            "open-mode": "append",
            "dependency": f"afterany:{':'.join(job for job, _ in run.jobs)}",
        } | cluster.options
        _sbatch(run.cluster, [*(f"--{key}={value}" for key, value in options.items()), str(path)])

    def _options(self, run: Submission) -> list[str]:
        options = {
            "job-name": f"lora-{run.name}",
            "output": run.folder / "slurm-%a.log",
            "open-mode": "append",
            "chdir": run.root,
            **job_options(self._cluster),
            **self._cluster.options,
        }
        return ["--requeue", *(f"--{key}={value}" for key, value in options.items())]


def job_options(cluster: Any) -> dict[str, Any]:
    """sbatch's options for what a cluster of fleet.yaml gives a unit."""
    options: dict[str, Any] = {
        "time": max(1, cluster.time // 60),
        "signal": f"B:USR1@{cluster.warn}",
    }
    if cluster.cpus:
        options["cpus-per-task"] = cluster.cpus
    if cluster.memory:
        options["mem"] = cluster.memory
    if cluster.gpus:
        options["gpus-per-node"] = cluster.gpus
    return options


def _sbatch(cluster: str, arguments: Sequence[str]) -> str:
    """Submit a script; returns its job's number. Raises UserError."""
    environment = {k: v for k, v in os.environ.items() if not FOREIGN.match(k)}
    told = subprocess.run(
        ["sbatch", "--parsable", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    if told.returncode:
        raise UserError(_refusal(cluster, told.stderr))
    return told.stdout.strip().partition(";")[0]


def batch_script(run: Submission, setup: Sequence[str]) -> str:
    """The script of a task: an attempt at its unit; if it is to go on, the job is requeued."""
    units = run.folder.resolve() / "units"
    lora = shlex.join([sys.executable, "-P", "-m", "lora_workbench", "fleet", "unit"])
    return "\n".join(
        [
            "#!/bin/bash",
            *setup,
            f'exec {lora} --requeue {shlex.quote(str(units))}/"$SLURM_ARRAY_TASK_ID"',
            "",
        ]
    )


class SlurmJob:
    """The job in which this process runs. Raises UserError if it runs in none."""

    def __init__(self) -> None:
        self._number = os.environ.get("SLURM_JOB_ID", "")
        if not self._number:
            raise UserError(
                "--requeue: SLURM_JOB_ID is not set, so this is no job of Slurm. Leave it out."
            )

    def requeue(self) -> None:
        """Put it back into the queue; Slurm ends it."""
        subprocess.run(["scontrol", "requeue", self._number], check=False)

    def together(self, command: Sequence[str], nodes: int) -> list[str]:
        """If the command fails on one machine, it ends on all.

        They meet on the first, at a port that is this job's.
        """
        hosts = subprocess.run(
            ["scontrol", "show", "hostnames"], capture_output=True, text=True, check=True
        ).stdout.split()
        endpoint = f"{hosts[0]}:{FIRST_PORT + int(self._number) % PORTS}"
        meet = [f"--nnodes={nodes}", f"--rdzv-endpoint={endpoint}"]
        return ["srun", "--kill-on-bad-exit=1", f"--nodes={nodes}", *command, *meet]

    def has_lost(self, printed: str) -> bool:
        """By srun's words: its exit code is 1 whatever that of the others was."""
        return "srun: error: Node failure" in printed or f"exit code {AGAIN}\n" in printed


def _query(jobs: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """What squeue still knows of jobs: a line for each task."""
    command = ["squeue", "--noheader", "--array", "--states=all", f"--jobs={','.join(jobs)}"]
    return subprocess.run(
        [*command, "--format=%i|%T|%N|%r"], capture_output=True, text=True, check=False
    )


def _parse(lines: str) -> dict[str, tuple[str, str, str]]:
    """JOB_TASK → state, node and reason."""
    rows = dict[str, tuple[str, str, str]]()
    for line in lines.splitlines():
        with suppress(ValueError):
            name, state, node, reason = line.strip().split("|")
            rows[name] = state, node, reason
    return rows


def _refusal(cluster: str, errors: str) -> str:
    """What sbatch says, with the key that it is about."""
    said = [re.sub(r"^sbatch: (error: )?", "", line.strip()) for line in errors.splitlines()]
    text = " ".join(dict.fromkeys(filter(None, said))) or "it does not say why"
    for key in ("partition", "account", "qos", "constraint", "reservation"):
        if key in text.lower():
            return (
                f"{cluster}.options.{key}: Slurm refuses it: {text}. See `sinfo`; edit fleet.yaml."
            )
    return f"{cluster}: Slurm refuses the job: {text}. Edit fleet.yaml."


ENGINE = Slurm
