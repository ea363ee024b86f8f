"""`lora doctor`: what this machine has, and what only a GPU can show."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from cli.options import DeviceOption, JsonOption, group
from pipeline.errors import OPTIONAL, UserError, install_command, missing_libraries
from pipeline.extensions import problems as extension_problems

if TYPE_CHECKING:
    from pipeline.project.probes import Finding
    from pipeline.stages.gpu_checks.report import Result

app = group()
GPU_REPORT = Path("lora-gpu-report.md")  # of `lora doctor --gpu`
LIBRARIES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "typer",
    "rich",
    "dvc",
    "matplotlib",
)


@app.command()
def doctor(
    gpu: Annotated[
        bool, Option("--gpu", help="Check what only a GPU can show, in at most 15 minutes.")
    ] = False,
    out: Annotated[
        Path | None,
        Option(
            metavar="FILE",
            help=f"The report of --gpu, without names of user and host; default: {GPU_REPORT}.",
        ),
    ] = None,
    as_json: JsonOption = False,
    _device: DeviceOption = None,
) -> None:
    """Show versions, devices, memory, missing libraries."""
    if gpu or out:
        _check_gpu(out or GPU_REPORT, as_json)
        return
    import torch

    from cli.console import print_json, print_line, print_table
    from pipeline.models.device import best_device, explain_choice
    from pipeline.models.trial import try_kernels

    slower: Sequence[Finding] = ()
    try:
        device = explain_choice()
        slower = try_kernels(best_device())
    except UserError as error:
        device = str(error)
    facts = _facts(device)
    missing = {user: missing_libraries(user) for user in OPTIONAL}
    if as_json:
        tried = [finding._asdict() for finding in slower]
        optional, unusable = _optional_libraries(missing), extension_problems()
        print_json({**facts, "optional": optional, "slower": tried, "extensions": unusable})
        return
    print_table(("", ""), list(facts.items()))
    print_line("")
    rows = []
    for user, needs in OPTIONAL.items():
        state = f"missing: {', '.join(missing[user])}" if missing[user] else "installed"
        rows.append((user, needs.extra, state, needs.without))
    print_table(("command or setting", "extra", "libraries", "without them"), rows)
    if slower:
        print_line("")
        print_table(("tried here", "what it said", "so that"), slower)
    if extensions := extension_problems():
        print_line("\nExtensions that add nothing:")
        for line in extensions:
            print_line(line)
    if torch.cuda.is_available() and missing["quantization: nf4, nf4-dq"]:
        print_line(f"\nFor NF4 on this GPU: {install_command('qlora')}")
    if any(missing.values()):
        print_line(f"\nInstall an extra: {install_command('EXTRA')}")


def _facts(device: str) -> dict[str, str]:
    """Versions, devices, memory; `device`: the one that is computed on, and why."""
    import os
    import platform
    import shutil

    import torch

    from pipeline.export import llama_cpp
    from pipeline.models.device import available_memory
    from pipeline.project.provenance import version_of

    def gib(size: float) -> str:
        return f"{size / 2**30:.1f}"

    runner = "not installed"
    try:
        if program := llama_cpp.find():
            runner = f"{program.name}, {program.path}".removeprefix("llama.cpp ")
    except UserError as error:
        runner = str(error)
    devices = {}
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        devices[f"cuda:{index}"] = f"{name}, {gib(free)} of {gib(total)} GiB free"
    if torch.backends.mps.is_available():
        devices["mps"] = "Apple GPU, unified memory"
    available = available_memory(torch.device("cpu"))
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "lora-workbench": version_of("lora-workbench"),
        "python": platform.python_version(),
        **{library: version_of(library) for library in LIBRARIES},
        "llama.cpp": runner,
        "git": shutil.which("git") or "not found: manifests will have no commit",
        **devices,
        "device": device,
        "cpu threads": str(torch.get_num_threads()),
        "memory": f"{gib(available)} of {gib(installed)} GiB available",
        "disk free": f"{gib(shutil.disk_usage('.').free)} GiB",
    }


def _optional_libraries(missing: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """Each part of the program that needs optional libraries, and which of them are here."""
    from pipeline.project.provenance import version_of

    rows = []
    for user, needs in OPTIONAL.items():
        versions: dict[str, str | None] = {}
        for library in needs.libraries:
            versions[library] = None if library in missing[user] else version_of(library)
        rows.append(
            {
                "for": user,
                "extra": needs.extra,
                "libraries": versions,
                "missing": missing[user],
                "without": needs.without or "an error",
                "install": install_command(needs.extra),
            }
        )
    return rows


def _check_gpu(out: Path, as_json: bool) -> None:
    """Run the checks on the GPU and write the report; without a GPU print what they expect."""
    from cli.console import print_json, print_note
    from pipeline.models.device import best_device, explain_choice
    from pipeline.stages.gpu_checks import report
    from pipeline.stages.gpu_checks.checks import CHECKS

    device = best_device()
    is_gpu = device.type == "cuda"
    if is_gpu:
        # a place that takes no file is an error now, not in a quarter of an hour
        report.write(out, device, [])
    else:
        print_note(
            f"{explain_choice()}. On a CUDA GPU this would be checked; nothing was run or written."
        )
    results = []
    unmeasured = (report.Result(check, []) for check in CHECKS.values())
    running = report.run(device) if is_gpu else unmeasured
    for number, check in enumerate(CHECKS.values(), 1):
        if is_gpu:
            print_note(f"{number} of {len(CHECKS)}: {check.name}, at most {check.limit} s")
        results.append(next(running))
        if is_gpu:  # the results so far are in the file if this is interrupted
            report.write(out, device, results)
    if as_json:
        print_json(report.document(device, results))
    else:
        for result in results:
            _print_result(result)
    if not is_gpu:
        return
    failures = [result.check.name for result in results if not result.as_expected]
    if failures:
        raise UserError(f"not as expected: {', '.join(failures)}. Attach {out} to an issue.")
    print_note(f"all as expected; the report is {out}")


def _print_result(result: "Result") -> None:
    """What a check expected, what it saw, and what to do."""
    from cli.console import print_line, print_table

    print_line(f"\n{result.check.name}", style="bold")
    rows = [("expected", result.check.expected)]
    lines = result.lines()
    for line in lines:
        rows.append((line["verdict"], f"{line['what']}: {line['seen']}".removeprefix(": ")))
    remedies = dict.fromkeys(line["to do"] for line in lines)
    rows += [("to do", remedy) for remedy in remedies if remedy]
    print_table(("", ""), rows)
