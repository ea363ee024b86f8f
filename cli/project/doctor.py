"""`lora doctor`: versions, devices, memory and disk of this machine."""

from cli.options import JsonOption, group

app = group()

LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "typer", "rich", "dvc", "matplotlib")
GGUF = ("gguf", "sentencepiece", "protobuf", "accelerate")  # needed to read a .gguf base
QLORA = "bitsandbytes"


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Show versions, devices, memory and disk."""
    import platform
    import shutil
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from cli.console import print_json, stdout, table

    def find_version(library: str, hint: str) -> str:
        try:
            return version(library)
        except PackageNotFoundError:
            return f"not installed: {hint}"

    facts = {
        "lora-workbench": version("lora-workbench"),
        "python": platform.python_version(),
        **{library: find_version(library, "run `make install`") for library in LIBRARIES},
        **{library: find_version(library, "only .gguf bases need it, `lora-workbench[gguf]`") for library in GGUF},
        QLORA: find_version(QLORA, "8-bit bases need it, 4-bit bases are faster with it, `lora-workbench[qlora]`"),
        "git": shutil.which("git") or "not found: manifests will have no commit",
        **_devices(),
        "cpu threads": str(torch.get_num_threads()),
        "memory": _memory(),
        "disk free": f"{shutil.disk_usage('.').free / 2**30:.1f} GiB",
    }
    if as_json:
        print_json(facts)
    else:
        stdout.print(table(("", ""), list(facts.items())))


def _devices() -> dict[str, str]:
    """Every accelerator with its memory, or a line that says there is none."""
    import torch

    devices = {
        f"cuda:{i}": f"{torch.cuda.get_device_name(i)}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
        for i in range(torch.cuda.device_count())
        for free, total in (torch.cuda.mem_get_info(i),)
    }
    if torch.backends.mps.is_available():
        devices["mps"] = "Apple GPU, unified memory"
    return devices or {"accelerator": "none: training and prompts run on the CPU"}


def _memory() -> str:
    import os

    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (ValueError, OSError):  # not available on macOS
        return f"{total / 2**30:.1f} GiB"
    return f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
