"""What can be certified, one file each: its tensors, and what our own reader says of it.

The first kind that recognizes a folder is its kind.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from pipeline.certify.groups import Stored
from pipeline.errors import UserError
from pipeline.extensions import Registry


@dataclass(frozen=True)
class Checked:
    """What is certified, the base that it was made from, and the adapter if that is known."""

    folder: Path  # or a GGUF file
    base: Path
    trust_remote_code: bool = False
    source: Path | None = None  # the adapter in PEFT's format that `folder` was made from

    @cached_property
    def kind(self) -> "Kind":
        """Raises UserError for what is no kind."""
        return KINDS[self.kind_name]

    @cached_property
    def kind_name(self) -> str:
        """Raises UserError for what is no kind."""
        return kind_of(self.folder)

    @cached_property
    def tensors(self) -> Mapping[str, Stored]:
        """Those that a program must read, and that are not the base's. Raises UserError."""
        return self.kind.tensors(self)


class Found(NamedTuple):
    """What our own reader finds."""

    problems: list[str]
    notes: list[str]  # what it does not read


class Kind(NamedTuple):
    """A kind of folder, or of file."""

    order: int
    about: str
    library: str  # the engine whose answers are the reference
    recognizes: Callable[[Path], bool]
    files: Callable[[Path], list[Path]]  # that make it what it is
    tensors: Callable[[Checked], Mapping[str, Stored]]
    # raises UserError where nothing can be compared
    inspect: Callable[[Checked], Found]
    rounding: Callable[[Path], str | None]  # of its numbers: bf16, q4_k_m; None: none that counts
    is_adapter: Callable[[Path], bool]  # whether it is opened on a base


def kind_of(path: Path) -> str:
    """The name of the kind of a folder or file. Raises UserError for what is none."""
    if not path.exists():
        raise UserError(f"there is no {path}. Name a folder or a GGUF file.")
    for name, kind in KINDS.items():
        if kind.recognizes(path):
            return name
    kinds = ", ".join(kind.about for kind in KINDS.values())
    raise UserError(f"{path} cannot be certified. It should be one of: {kinds}.")


KINDS = Registry[Kind]("certify_kind", order=lambda kind: kind.order)
