"""`lora` in children of one process that has imported its libraries: a tenth of what a start takes else."""

import multiprocessing
import os
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import mkstemp

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["cli.main", "pipeline.stages.pretrain", "pipeline.stages.finetune"])


class Forked:
    """A running `lora …` with these variables beside its own, its stderr in a file."""

    def __init__(self, command: list[str], cwd: Path, **variables: str) -> None:
        handle, self._errors = mkstemp()
        os.close(handle)
        self.process: BaseProcess = _SERVER.Process(
            target=_run, args=(command, str(cwd), self._errors, variables), daemon=True
        )
        self.process.start()

    def end(self) -> tuple[int, str]:
        """Exit code, or a negative signal's number, and stderr, once it has ended."""
        self.process.join()
        errors = Path(self._errors).read_text(encoding="utf-8")
        Path(self._errors).unlink()
        assert self.process.exitcode is not None
        return self.process.exitcode, errors


def _run(command: list[str], cwd: str, errors: str, variables: dict[str, str]) -> None:
    os.environ |= variables
    from cli.main import main

    for stream, path in ((1, os.devnull), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY), stream)
    os.chdir(cwd)
    sys.argv = command
    main()
