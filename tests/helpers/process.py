"""`lora` in children of one process that has imported its libraries: a tenth of what a start takes else."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Mapping
from itertools import count
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from pkgutil import resolve_name
from tempfile import mkstemp
from typing import Any

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        "cli.main",
        "cli.console",
        "rich.progress",
        "pipeline.stages.pretrain",
        "pipeline.stages.finetune",
        "pipeline.stages.methods.sweep",
        # What a child would else import when it opens a base of transformers: three seconds each time.
        "accelerate",
        "torch.distributed.fsdp",
        "transformers.models.auto.modeling_auto",
        "transformers.models.auto.tokenization_auto",
        "transformers.models.llama.modeling_llama",
    ]
)

# A start looks at all children: of two threads that read one exit code, the second would find 255.
_READING = threading.Lock()


class Forked:
    """A running `lora …`, its stderr in a file.

    `dies`: at which call of which function it is killed, if at any; `variables` stand beside its environment.
    """

    def __init__(
        self, command: list[str], cwd: Path, dies: tuple[str, int] | None = None, variables: Mapping[str, str] = {}
    ) -> None:
        handle, self._errors = mkstemp()
        os.close(handle)
        arguments = command, str(cwd), self._errors, dies, variables
        self.process: BaseProcess = SERVER.Process(target=_run, args=arguments, daemon=True)
        with _READING:
            self.process.start()

    def ended(self, seconds: float | None = None) -> bool:
        """Whether it has ended, at the latest after so many seconds."""
        wait([self.process.sentinel], seconds)
        with _READING:
            return self.process.exitcode is not None

    def end(self) -> tuple[int, str]:
        """Exit code, or a negative signal's number, and stderr, once it has ended."""
        self.ended()
        errors = Path(self._errors).read_text(encoding="utf-8")
        Path(self._errors).unlink()
        assert self.process.exitcode is not None
        return self.process.exitcode, errors


def _run(command: list[str], cwd: str, errors: str, dies: tuple[str, int] | None, variables: Mapping[str, str]) -> None:
    os.environ |= variables
    import huggingface_hub.constants

    from cli.main import main

    # It reads the variable when it is imported, which the server did.
    huggingface_hub.constants.HF_HUB_OFFLINE = os.environ.get("HF_HUB_OFFLINE") == "1"

    if dies:
        _die_at(*dies)
    for stream, path in ((1, os.devnull), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY), stream)
    os.chdir(cwd)
    sys.argv = command
    main()


def _die_at(function: str, call: int) -> None:
    """SIGKILL this process when `function`, such as `pipeline.files.artifact.seal`, is called for the nth time."""
    place, _, name = function.rpartition(".")
    owner, calls = resolve_name(place), count(1)
    real = getattr(owner, name)

    def dying(*arguments: Any, **named: Any) -> Any:
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **named)

    setattr(owner, name, dying)
