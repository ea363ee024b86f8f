"""A runner at work in the Python of an engine's environment."""

import signal
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.errors import UserError
from pipeline.files.worker import Answer, Worker

if TYPE_CHECKING:
    from torch import Tensor

RUNNERS = Path(__file__).parent / "runners"
SILENCE_SECONDS = 600.0  # for one answer; a large model takes a minute to load


class Opened(NamedTuple):
    """What a program says of a model that it opened."""

    rows: int  # of its logits
    unread: Sequence[str]  # keys of the files that were not loaded as they are
    missing: Sequence[str]  # keys that the model has and the files lack


class Process:
    """Opens models, one at a time. Raises UserError if it refuses, dies, or is silent too long."""

    def __init__(self, python: Path, runner: str, *words: str) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the process
        # -E: the environment's own packages, whatever PYTHONPATH says
        command = (str(python), "-E", "-P", str(RUNNERS / runner), *words)
        self._worker = Worker(command, self._log)
        try:
            self.about, _ = self._ask("start")  # `name`: the program and its version
        except BaseException:  # Ctrl-C too
            self.close()
            raise

    def close(self) -> None:
        self._worker.kill()
        self._log.close()

    @property
    def name(self) -> str:
        """The program and its version."""
        return str(self.about["name"])

    @property
    def is_alive(self) -> bool:
        return self._worker.process.poll() is None

    def open(self, base: Path, adapter: Path | None, trust_remote_code: bool = False) -> Opened:
        """Open a checkpoint, with an adapter on it."""
        names = {"base": str(base), "adapter": adapter and str(adapter)}
        answer, _ = self._ask("open", **names, trust_remote_code=trust_remote_code)
        return Opened(**{key: answer[key] for key in Opened._fields})

    def logits(self, ids: Sequence[int], rows: int) -> "Tensor":
        """(T, V) in fp32."""
        import torch

        _, data = self._ask("logits", ids=list(ids))
        if len(data) != 4 * len(ids) * rows:
            raise UserError(
                f"it gave {len(data)} bytes of logits for {len(ids)} tokens of {rows} in fp32"
            )
        return torch.frombuffer(data, dtype=torch.float32).view(len(ids), rows)

    def generate(self, ids: Sequence[int], limit: int, ends: Sequence[int]) -> list[int]:
        """The greedy continuation without its end token."""
        answer, _ = self._ask("generate", ids=list(ids), limit=limit, ends=list(ends))
        return list(answer["answer"])

    def chat(
        self,
        folder: Path,
        messages: Sequence[Mapping[str, str]],
        rendered: str,
        template: str | None,
    ) -> list[int]:
        """The ids of a conversation that is ready for an answer, by the tokenizer of a folder.

        A program whose file holds the template is given ours, and the conversation `rendered` by
        it.
        """
        answer, _ = self._ask(
            "chat",
            folder=str(folder),
            messages=list(messages),
            rendered=rendered,
            template=template,
        )
        return list(answer["answer"])

    def _ask(self, do: str, **fields: Any) -> tuple[Answer, bytearray]:
        self.send(do, **fields)
        try:
            return self.read(SILENCE_SECONDS)
        except TimeoutError:
            self._worker.kill()
            raise UserError(f"it did not answer within {SILENCE_SECONDS:g} seconds") from None

    def send(self, do: str, **fields: Any) -> int:
        """Ask without waiting; the id of what `read` gives for it."""
        return self._worker.send(do, **fields)

    def read(self, seconds: float) -> tuple[Answer, bytearray]:
        """The next answer. Raises TimeoutError after `seconds`."""
        try:
            return self._worker.read(seconds)
        except EOFError:
            raise UserError(f"it died{self._last_words()}") from None

    def _last_words(self) -> str:
        code = self._worker.process.wait()
        how = f" ({signal.Signals(-code).name})" if code < 0 else ""
        self._log.seek(0)
        lines = self._log.read()[-(2**16) :].decode("utf-8", "replace").split("\n")
        words = [line.strip() for line in lines if line.strip()]
        return how + (f": {words[-1][:300]}" if words else "")
