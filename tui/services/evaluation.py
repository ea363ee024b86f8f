"""Evaluates adapters with `lora evaluate --adapter`, whose numbers appear in artifacts/measured."""

from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import UserError
from pipeline.project.gate import LIMITS
from tui.services.lora_command import COMMAND, LoraCommand


class Evaluation:
    """One at a time. What it has measured when it is stopped is kept."""

    def __init__(self, params: Path, command: Sequence[str] = COMMAND) -> None:
        self._params, self._lora = params, LoraCommand(params.parent, command)
        self.adapters: Sequence[Path] = ()  # that are being evaluated

    async def run(self, adapters: Sequence[Path]) -> str:
        """Evaluate adapters; returns what was wrong with some of them, or which of evaluate.limits
        they break, or "".

        Raises UserError if it failed.
        """
        if self.adapters:
            raise UserError(
                f"{len(self.adapters)} adapters are being evaluated. Wait until they are."
            )
        self.adapters = tuple(adapters)
        options = [word for adapter in adapters for word in ("--adapter", str(adapter))]
        try:
            _, errors = await self._lora.run("evaluate", "--params", str(self._params), *options)
        except UserError as error:
            # they were evaluated: it ends with 1 for their verdict
            if str(error).startswith(f"{LIMITS}: "):
                return str(error)
            raise UserError(f"Not evaluated: {error} Adapters that it had done are kept.") from None
        finally:
            self.adapters = ()
        return errors

    def stop(self) -> None:
        """End it, if it runs."""
        self._lora.stop()
