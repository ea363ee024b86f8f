"""Python environments of other programs by version, made once with uv.

Each holds what the program requires but for PyTorch, which is linked from this Python: it is the
largest part by far, and so a difference between two programs is none of two PyTorches.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import distribution
from importlib.util import find_spec
from pathlib import Path
from shutil import which

from pipeline.errors import UserError, install_command
from pipeline.files.home import home_folder
from pipeline.files.locks import flock

FOLDER = "LORA_ENGINES"  # an environment variable: where environments lie
# Linked, not installed: PyTorch and what its wheel brings.
LINKED = ("torch", "torchgen", "functorch", "torch.libs", "triton", "nvidia")
# What PyTorch requires of others, since it is no package of the environment that would say so.
NEEDED_BY_TORCH = ("sympy", "networkx", "jinja2", "filelock", "fsspec", "typing-extensions")
# Built against one PyTorch each: another's would not load. Text needs none of them.
BESIDE_TORCH = ("torch", "torchvision", "torchaudio", "torchcodec")
# uv leaves out a package whose override holds nowhere.
WITHOUT_TORCH = "".join(f'{name} ; sys_platform == "never"\n' for name in BESIDE_TORCH)
SECONDS = 900.0  # for one environment: gigabytes may be downloaded


def environments_folder() -> Path:
    """The folder of all environments."""
    named = os.environ.get(FOLDER)
    return Path(named) if named else home_folder() / ".cache" / "lora-workbench" / "engines"


def python_with(requirements: Sequence[str], make: bool = True) -> Path:
    """The Python of an environment with `requirements`, which is made if there is none.

    Raises UserError with the reason where it cannot be had.
    """
    wanted = [*requirements, *NEEDED_BY_TORCH]
    site = _site_packages()
    facts = [*sorted(wanted), sys.version, distribution("torch").version, str(site)]
    digest = hashlib.sha256("\n".join(facts).encode()).hexdigest()[:12]
    folder = environments_folder() / digest
    python, ready = folder / "bin" / "python", folder / "ready"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("a") as lock:
        flock(lock)  # another command may be making it
        if not ready.exists():
            if not make:
                raise UserError(f"{requirements[0]} is not installed")
            _make(folder, python, wanted)
            _link_torch(python, site)
            ready.touch()
    return python


def _make(folder: Path, python: Path, wanted: Sequence[str]) -> None:
    """Make the environment in `folder`, in place of what an interrupted attempt left."""
    uv = _find_uv()
    with tempfile.TemporaryDirectory() as name:
        overrides = Path(name) / "overrides.txt"
        overrides.write_text(WITHOUT_TORCH, encoding="utf-8")
        _run([uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(folder)])
        install = [uv, "pip", "install", "--quiet", "--python", str(python)]
        _run([*install, "--overrides", str(overrides), *wanted])


def _find_uv() -> str:
    """The uv of this Python, or of the path. Raises UserError without one."""
    beside = Path(sys.executable).with_name("uv")
    found = str(beside) if beside.exists() else which("uv")
    if found is None:
        raise UserError(
            f"there is no uv here, which makes environments. Run `{install_command('certify')}`."
        )
    return found


def _site_packages() -> Path:
    """The folder in which this Python has PyTorch."""
    spec = find_spec("torch")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parents[1]


def _link_torch(python: Path, source: Path) -> None:
    """Link PyTorch in `source`, with the record of its version, into an environment."""
    (target,) = python.parents[1].glob("lib/python*/site-packages")
    records = sorted(source.glob("torch-*.dist-info"))
    for path in (*(source / name for name in LINKED), *records):
        link = target / path.name
        if path.exists() and not link.exists():
            link.symlink_to(path)


def _run(command: Sequence[str]) -> None:
    """Run uv. Raises UserError with its reason."""
    environment = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=SECONDS, env=environment
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"uv did not end within {SECONDS:g} seconds. Try again.") from None
    except OSError as error:
        raise UserError(f"uv does not start: {error.strerror}.") from None
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        reason = " ".join(lines[-3:]) or f"exit code {done.returncode}"
        raise UserError(f"uv could not make the environment: {reason}")
