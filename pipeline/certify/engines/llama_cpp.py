"""llama.cpp, with files that our exports write: f16, or a quantized base."""

from pathlib import Path

from pipeline.certify.engines import Engine, Opens, has, pinned
from pipeline.certify.kinds import Checked
from pipeline.export.llama_cpp import KINDS

DEFAULT = "f16"
EXACT = ("f32", "f16", "bf16")  # whose merges are certified as checkpoints


def _requirements(version: str | None) -> tuple[str, ...]:
    return pinned("llama-cpp-py-sync", version), "numpy"


def _opens(checked: Checked, precision: str | None, room: Path) -> Opens:
    from pipeline.certify.gguf_files import GGUFFiles

    return GGUFFiles(checked, precision or DEFAULT, room)


def _if_merged(checked: Checked, precision: str | None, room: Path) -> dict[str, float]:
    if checked.kind_name != "adapter" or precision is None or precision in EXACT:
        return {}
    from pipeline.certify.gguf_files import GGUFFiles

    return GGUFFiles(checked, precision, room).if_merged()


ENGINE = Engine(
    5,
    _requirements,
    "llama_cpp_models.py",
    lambda _: has("llama_cpp_py_sync"),
    kinds=("adapter", "checkpoint", "gguf"),
    precisions=(DEFAULT, *(kind for kind in KINDS if kind != DEFAULT)),
    opens=_opens,
    if_merged=_if_merged,
)
