"""mlx-lm, with adapters in its own format."""

from pathlib import Path

from pipeline.certify.engines import Engine, Opens, as_stored, has, pinned
from pipeline.certify.kinds import Checked


def _requirements(version: str | None) -> tuple[str, ...]:
    return pinned("mlx-lm", version), "mlx[cpu] ; sys_platform == 'linux'"


def _opens(checked: Checked, precision: str | None, room: Path) -> Opens:
    if checked.kind_name != "adapter":
        return as_stored(checked, precision, room)
    from pipeline.certify.mlx_files import MLXFiles

    return MLXFiles(checked, room)


ENGINE = Engine(
    6,
    _requirements,
    "mlx_models.py",
    lambda _: has("mlx_lm"),
    kinds=("adapter", "checkpoint", "mlx"),
    opens=_opens,
)
