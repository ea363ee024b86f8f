"""Runs a GGUF file in llama.cpp, with an adapter's file beside it.

Run as a file, by the Python of an environment in which this package is not installed.
"""

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))


class Models:
    """A model, and an adapter on it."""

    def __init__(self) -> None:
        from pipeline.export.llama_cpp_process import Library

        self._library = Library()
        self.name = self._library.name
        self._session: Any = None
        self._facts: dict[str, Any] = {}

    def open(self, base: str, adapter: str | None, **_: object) -> dict[str, Any]:
        """Open a file, with an adapter's if given."""
        from pipeline.export.llama_cpp_process import Session

        self._library.errors = []
        self._session = None
        named = os.environ.get("OMP_NUM_THREADS", "")
        threads = int(named) if named.isdigit() else os.cpu_count()
        self._session = Session(self._library, base, adapter, 1.0, threads or 1)
        self._facts = self._session.facts()
        # llama.cpp refuses files with tensors that it does not know
        return {"rows": self._facts["rows"], "unread": [], "missing": []}

    def logits(self, ids: Sequence[int]) -> bytes:
        """fp32 (T, V)."""
        return b"".join(self._session.logits(ids))

    def generate(self, ids: Sequence[int], limit: int, ends: Sequence[int]) -> list[int]:
        """The greedy continuation without its end token."""
        new: list[int] = self._session.generate(ids, limit)["ids"]
        return new[: next((n for n, id_ in enumerate(new) if id_ in ends), len(new))]

    def chat(self, rendered: str, template: str, **_: Any) -> list[int]:
        """The ids of a rendered conversation, as llama-server reads it, if the template is alike.

        It renders by the file's template, and leaves BOS and EOS to the file.
        """
        from pipeline.errors import UserError

        facts = self._facts
        if facts["template"] != template:
            which = "no" if facts["template"] is None else "another"
            raise UserError(f"the file has {which} chat template")
        text = rendered.removeprefix(facts["bos"]) if facts["add_bos"] else rendered
        text = text.removesuffix(facts["eos"]) if facts["add_eos"] else text
        return list(self._session.tokenize(text))


if __name__ == "__main__":
    import_module("transformers_models").serve(Models)
