"""`lora params`, `report`, `cache` and `doctor`: a project as a whole, and the machine that it runs
on.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Context, Option

from cli.options import (
    DEFAULT_PARAMS,
    DeviceOption,
    JsonOption,
    ParamsOption,
    SetOption,
    finite,
    group,
    project_of,
    size_of,
)

if TYPE_CHECKING:
    from pipeline.project.cache import Cache
    from pipeline.project.probes import Finding
    from pipeline.project.stage_graph import Project, Stage

app = group()
# samples.json: model → its answers, to the same questions
Samples = Mapping[str, Sequence[Mapping[str, Any]]]
UNKNOWN_WORDS = "not asked: it does not know all of these words"
MOST_CHARACTERS = 300  # of a text; report.md has all of it
cache = group(help="Show or prune the cache of finished stages.", invoke_without_command=True)
app.add_typer(cache, name="cache")
settings = group(help="Show every setting, its source and its meaning.", no_args_is_help=True)
app.add_typer(settings, name="params")

MOST = 3  # commands that are named one by one
MUCH = 500_000_000  # bytes of a cache that are worth a hint
SOURCE = 42  # the column of a value's source, where the value leaves room
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


@settings.command("show")
def show_params(
    section: Annotated[str | None, Argument(metavar="SECTION", help="Only this section.")] = None,
    path: ParamsOption = DEFAULT_PARAMS,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print all settings as a params file, with their sources.

    That is a stage's defaults, the training block, the stage's section, --set: the last one counts.
    """
    from cli.console import print_json, print_line
    from pipeline.errors import UserError
    from pipeline.project.params.edit import dump_inline
    from pipeline.project.params.load import TOP_LEVEL, key_path
    from pipeline.project.params.schema import hints

    params = project_of(path, overrides).params
    names = [
        name
        for name in params.kinds
        if name in params.sections and (name != "import" or params.origin.imports)
    ]
    if section is not None and section not in names:
        raise UserError(f"{section} is not a section of this project. It has {', '.join(names)}.")
    names = names if section is None else [section]
    above = {
        "base": params.origin.base,
        "report_to": params.report_to,
        "device": params.running.device,
    }
    above = above if section is None else {}
    rows = {key: (value, params.source(TOP_LEVEL[key], key)) for key, value in above.items()}
    rows |= {
        key_path(name, key): (getattr(params.section(name), key), params.source(name, key))
        for name in names
        for key in hints(params.kinds[name])
    }
    if as_json:
        print_json(
            [
                {"key": key, "value": value, "source": source}
                for key, (value, source) in rows.items()
            ]
        )
        return
    for name in ("", *names):  # "" has what stands above the sections
        if name:
            print_line(f"{name}:")
        for path_of_key, (value, source) in rows.items():
            own, _, key = path_of_key.rpartition(".")
            if own == name:
                print_line(
                    f"{'  ' * bool(name) + key + ': ' + dump_inline(value):<{SOURCE}}  # {source}"
                )


@settings.command()
def explain(
    key: Annotated[
        str, Argument(metavar="KEY", help="A key, such as finetune_lora.rank, or a section.")
    ],
    as_json: JsonOption = False,
) -> None:
    """Say what a key means, which values it may have, and its default."""
    from cli.console import print_json, stdout
    from pipeline.errors import UserError
    from pipeline.project.params.aliases import KEYS, suggest
    from pipeline.project.params.edit import dump_inline
    from pipeline.project.params.load import RUNNING, TOP_LEVEL, TRAINING, key_path
    from pipeline.project.params.schema import Pretrained, Section, hints, meaning, rule
    from pipeline.project.params.sections import Running, Training
    from pipeline.stages.registry import GRAPH

    kinds: dict[str, type[Section]] = {TRAINING: Training, **GRAPH.sections, RUNNING: Running}
    section, _, name = (f"{TOP_LEVEL[key]}.{key}" if key in TOP_LEVEL else key).partition(".")
    if section not in kinds:
        meant = suggest(section, kinds, KEYS)
        raise UserError(
            f"There is no section {section}. "
            "" + (f"Did you mean {meant}?" if meant else f"Known: {', '.join(kinds)}.")
        )
    kind = kinds[section]
    if name and name not in hints(kind):
        meant = suggest(name, list(hints(kind)), KEYS, section)
        known = f"Did you mean {section}.{meant}?" if meant else f"Known: {', '.join(hints(kind))}."
        raise UserError(f"There is no key {key}. {known}")
    facts: list[dict[str, Any]] = [
        {
            "key": key_path(section, each),
            "meaning": meaning(kind, each),
            "rule": rule(kind, each),
            "default": dump_inline(getattr(kind(), each)),
            "pretrained": dump_inline(getattr(kind.defaults(Pretrained()), each)),
        }
        for each in ([name] if name else hints(kind))
    ]
    if as_json:
        print_json(facts)
        return
    if not name:
        stdout.print(f"{section}: {' '.join((kind.__doc__ or '').split())}\n", markup=False)
    for fact in facts:
        stdout.print(fact["key"], style="bold", markup=False)
        default = f"default {fact['default']}"
        if fact["pretrained"] != fact["default"]:
            default += f", for a pretrained base {fact['pretrained']}"
        stdout.print(f"  {fact['meaning']}\n  {fact['rule']}; {default}", markup=False)


@app.command()
def report(params: ParamsOption = DEFAULT_PARAMS) -> None:
    """Show the last comparison, and where the report is."""
    from cli.console import print_line
    from pipeline.evaluation.comparison import beside
    from pipeline.files.artifact import read_json
    from pipeline.project.status import outdated

    project = project_of(params)
    folder = project.artifact("evaluate")
    path = folder / "metrics.json"
    # without an evaluation, what training itself measured is there, such as the accuracy of
    # preferences
    has_others = not path.exists() and beside(project, {})
    metrics = {} if has_others else read_json(path, f"Run {project.command('evaluate')}")
    others = beside(project, metrics)
    print_metrics(metrics, path, {stage.variant: numbers for stage, numbers in others.items()})
    for stage, numbers in others.items():
        _note_on(project, stage, numbers)
    if metrics:
        there = (folder / "report.md").exists()
        yours = f"These came with the project; {project.command('evaluate')} makes yours."
        made = f"report: {folder / 'report.md'}"
        print_line(made if there else yours)
    measured = [s for s in project.stages.values() if s.is_measurement and not s.group]
    reports = {stage.name: project.root / stage.path / "report.md" for stage in measured}
    reports = {name: path for name, path in reports.items() if path.exists()}
    for name, path in reports.items():
        print_line(f"{project.stages[name].title or name}: {path}")
    for name in ("evaluate", *reports):
        old = outdated(project, [name])
        if name in old:
            warn_outdated(project, f"{project.artifact_name(name)} is", old[name], old)


def _print_answers(folder: Path, metrics: Mapping[str, Any]) -> None:
    """The sample answers, and how many are as expected; nothing where the data has no prompts."""
    from cli.console import print_line
    from pipeline.errors import UserError
    from pipeline.files.artifact import read_json

    lines = [
        f"{name}: {line}"
        for name in metrics
        for line in count_lines(metrics, name, "the data's prompts")
    ]
    if not lines:
        return
    for line in lines:
        print_line(line)
    if not (folder / "samples.json").exists():  # a measured adapter's answers are counted alone
        return
    try:
        print_answers(read_json(folder / "samples.json", "Run `lora evaluate`"), [*metrics])
    except (KeyError, TypeError, AttributeError):
        raise UserError(
            f"{folder / 'samples.json'} holds no answers. Run `lora evaluate` again."
        ) from None
    print_line("")


def _note_on(project: "Project", stage: "Stage", numbers: Mapping[str, Any]) -> None:
    """What else there is to say of a model that the project's evaluation lacks: how it is
    evaluated, or its verdict.
    """
    from cli.console import print_note
    from pipeline.inference.catalog import VERDICT

    own = stage.name in project.readable
    command = (
        "lora evaluate" if own else f"lora evaluate --adapter {project.artifact_name(stage.name)}"
    )
    if VERDICT not in numbers:
        print_note(f"{stage.variant} is not evaluated yet. Run `{command}`.")
    elif numbers[VERDICT] and numbers[VERDICT].broken:
        print_note(numbers[VERDICT].warning(stage.variant))


def print_metrics(
    metrics: Mapping[str, Any], path: Path, others: Mapping[str, Any] | None = None
) -> None:
    """The comparison, the tasks and the verdict of an evaluation, whose metrics are those of
    `path`.

    `others`: what is known of models that it lacks. Raises UserError.
    """
    from cli.console import print_line, print_table
    from pipeline.errors import UserError
    from pipeline.evaluation.comparison import (
        TASKS,
        by_variant,
        certified,
        comparison,
        legend,
        task_scores,
    )

    try:
        models = {**by_variant(metrics), **(others or {})}
        columns, rows = comparison(models)
        task_columns, task_rows = task_scores(models)
    except (KeyError, TypeError, AttributeError, ValueError):
        raise UserError(f"{path} holds other metrics. Run `lora evaluate` again.") from None
    print_table(columns, rows, right=columns[1:])
    print_line("\n".join(["", legend(columns), *certified(models), ""]))
    if task_rows:
        print_table(task_columns, task_rows, right=task_columns[2:])
        print_line(f"\n{TASKS}\n")
    _print_answers(path.parent, models)
    print_gate(metrics)


def print_gate(metrics: Mapping[str, Any]) -> None:
    """Whether the models keep evaluate.limits, and a table of what was broken."""
    from cli.console import print_line, print_table
    from pipeline.project.gate import read_verdict

    verdict = read_verdict(metrics)
    if verdict is None:
        return
    if not verdict.broken:
        print_line(f"limits: kept by {', '.join(verdict.models)}\n")
        return
    columns, rows = verdict.table()
    print_line("limits broken:")
    print_table(columns, rows, right=("measured",))
    print_line("")


def refuse_broken(project: "Project", shown: bool = False) -> None:
    """Raises UserError if the last evaluation broke evaluate.limits, so that the command ends with
    1.

    `shown`: the table of what was broken was printed already.
    """
    from pipeline.files.artifact import read_json

    metrics = read_json(project.artifact("evaluate") / "metrics.json", "Run `lora evaluate`")
    if not shown:
        print_gate(metrics)
    refuse_verdict(metrics)


def refuse_verdict(metrics: Mapping[str, Any]) -> None:
    """Raises UserError, with the next step, if the models of these metrics break
    evaluate.limits.
    """
    from pipeline.errors import UserError
    from pipeline.project.gate import read_verdict

    verdict = read_verdict(metrics)
    if verdict and verdict.broken:
        raise UserError(verdict.error)


def warn_outdated(
    project: "Project", subject: str, reasons: Sequence[str], stages: Mapping[str, object]
) -> None:
    """One line on stderr: what is out of date, why, and how it is made again from the first of
    `stages` on.
    """
    from cli.console import print_note

    commands = [f"`{project.graph.stages[name].command}`" for name in stages]
    again = "`dvc repro`" if len(commands) > MOST and project.has_dvc else ", then ".join(commands)
    print_note(f"{subject} out of date: {', '.join(reasons)}. Run {again}.")


@cache.callback()
def show_cache(
    context: Context, params: ParamsOption = DEFAULT_PARAMS, as_json: JsonOption = False
) -> None:
    """Show what is kept: stage, key, size, last use."""
    if context.invoked_subcommand:
        return
    from cli.console import print_json, print_line, print_table
    from pipeline.files.text import in_units

    entries = _cache_of(params).entries()
    if as_json:
        print_json(
            [
                {
                    "stage": e.stage,
                    "key": e.key,
                    "bytes": e.size,
                    "shared": e.shared,
                    "used": e.used,
                }
                for e in entries
            ]
        )
        return
    rows = [
        (
            e.stage,
            e.key[:12],
            in_units(e.size),
            datetime.fromtimestamp(e.used).strftime("%Y-%m-%d %H:%M"),
        )
        for e in entries
    ]
    print_table(("stage", "key", "size", "last used"), rows, right=("size",))
    size, shared = sum(e.size for e in entries), sum(e.shared for e in entries)
    links = f", of which artifacts share {in_units(shared)} by hard links" * bool(shared)
    print_line(f"{len(entries)} kept, {in_units(size)}{links}")
    if size > MUCH:
        print_line("`lora cache prune --max-size 1GB` keeps what was used last.")


@cache.command()
def prune(
    params: ParamsOption = DEFAULT_PARAMS,
    keep: Annotated[
        int, Option(min=0, help="Number of entries to keep per stage, most recently used first.")
    ] = 0,
    older_than: Annotated[
        float,
        Option(
            min=0,
            callback=finite,
            metavar="DAYS",
            help="Only entries unused for at least DAYS days.",
        ),
    ] = 0.0,
    max_size: Annotated[
        int | None,
        Option(
            parser=size_of, metavar="SIZE", help="Keep what was used last, up to SIZE: 5GB, 500MB."
        ),
    ] = None,
) -> None:
    """Remove cached results; artifacts stay."""
    from cli.console import print_line
    from pipeline.files.text import in_units

    removed = _cache_of(params).prune(keep, older_than, max_size or 0)
    print_line(f"{len(removed)} removed, {in_units(sum(e.size for e in removed))}")


def _cache_of(params: Path) -> "Cache":
    """The cache of the project; of its folder, where there is no params.yaml any more."""
    from pipeline.errors import UserError
    from pipeline.project.cache import Cache
    from pipeline.project.stage_graph import cache_folder

    if params.is_file():
        return Cache(project_of(params).cache)
    if params != DEFAULT_PARAMS:
        raise UserError(f"{params} does not exist. Name the project's params file with --params.")
    return Cache(cache_folder(params.resolve().parent))


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
    import os
    import platform
    import shutil

    import torch

    from cli.console import print_json, print_line, print_table
    from pipeline.errors import OPTIONAL, UserError, install_command, missing_libraries
    from pipeline.export import llama_cpp
    from pipeline.extensions import problems as extension_problems
    from pipeline.models.device import available_memory, best_device, explain_choice
    from pipeline.models.trial import try_kernels
    from pipeline.project.provenance import version_of

    def gib(size: float) -> str:
        return f"{size / 2**30:.1f}"

    try:
        found = llama_cpp.find()
        runner = (
            f"{found.name}, {found.path}".removeprefix("llama.cpp ") if found else "not installed"
        )
    except UserError as error:
        runner = str(error)
    slower: Sequence[Finding] = ()
    try:
        device = explain_choice()
        slower = try_kernels(best_device())
    except UserError as error:
        device = str(error)
    devices = {
        f"cuda:{i}": f"{torch.cuda.get_device_name(i)}, {gib(free)} of {gib(total)} GiB free"
        for i in range(torch.cuda.device_count())
        for free, total in (torch.cuda.mem_get_info(i),)
    }
    if torch.backends.mps.is_available():
        devices["mps"] = "Apple GPU, unified memory"
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    memory = f"{gib(available_memory(torch.device('cpu')))} of {gib(whole)} GiB available"
    facts = {
        "lora-workbench": version_of("lora-workbench"),
        "python": platform.python_version(),
        **{library: version_of(library) for library in LIBRARIES},
        "llama.cpp": runner,
        "git": shutil.which("git") or "not found: manifests will have no commit",
        **devices,
        "device": device,
        "cpu threads": str(torch.get_num_threads()),
        "memory": memory,
        "disk free": f"{gib(shutil.disk_usage('.').free)} GiB",
    }
    missing = {user: missing_libraries(user) for user in OPTIONAL}
    if as_json:
        optional = [
            {
                "for": user,
                "extra": needs.extra,
                "libraries": {
                    library: None if library in missing[user] else version_of(library)
                    for library in needs.libraries
                },
                "missing": missing[user],
                "without": needs.without or "an error",
                "install": install_command(needs.extra),
            }
            for user, needs in OPTIONAL.items()
        ]
        tried = [each._asdict() for each in slower]
        unusable = extension_problems()
        print_json({**facts, "optional": optional, "slower": tried, "extensions": unusable})
        return
    print_table(("", ""), list(facts.items()))
    print_line("")
    rows = [
        (
            user,
            needs.extra,
            f"missing: {', '.join(lacks)}" if (lacks := missing[user]) else "installed",
            needs.without,
        )
        for user, needs in OPTIONAL.items()
    ]
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


def _check_gpu(out: Path, as_json: bool) -> None:
    """Run the checks on the GPU and write the report; without one, print what they are. Raises
    UserError.
    """
    from cli.console import print_json, print_line, print_note, print_table
    from pipeline.errors import UserError
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
    running = (
        report.run(device) if is_gpu else (report.Result(check, []) for check in CHECKS.values())
    )
    for number, check in enumerate(CHECKS.values(), 1):
        if is_gpu:
            print_note(f"{number} of {len(CHECKS)}: {check.name}, at most {check.limit} s")
        results.append(next(running))
        if is_gpu:  # what was seen so far is there if this is interrupted
            report.write(out, device, results)
    if as_json:
        print_json(report.document(device, results))
    for result in () if as_json else results:
        print_line(f"\n{result.check.name}", style="bold")
        rows = [("expected", result.check.expected)]
        lines = result.lines()
        rows += [
            (line["verdict"], f"{line['what']}: {line['seen']}".removeprefix(": "))
            for line in lines
        ]
        rows += [
            ("to do", remedy) for remedy in dict.fromkeys(line["to do"] for line in lines) if remedy
        ]
        print_table(("", ""), rows)
    if not is_gpu:
        return
    failures = [result.check.name for result in results if not result.as_expected]
    if failures:
        raise UserError(f"not as expected: {', '.join(failures)}. Attach {out} to an issue.")
    print_note(f"all as expected; the report is {out}")


def count_lines(metrics: Mapping[str, Any], name: str, where: str) -> list[str]:
    """How many answers of the model `name` are as expected, beside the base's, and where the others
    differ.
    """
    from pipeline.data.answers.match import describe

    counts, before = (metrics.get(model, {}).get("answers", {}) for model in (name, "base"))
    if not (found := describe(counts)):
        return []
    base = f"; the base: {describe(before)}" if name != "base" and describe(before) else ""
    lines = [f"answers to {where}: {found}{base}"]
    if fields := counts.get("differs"):
        numbers = ", ".join(f"{field or 'no JSON'} {number}" for field, number in fields.items())
        lines.append(f"differ in: {numbers}")
    return lines


def print_answers(samples: Samples, names: Sequence[str], most: int | None = None) -> None:
    """Each question with the expected answer and those of the models `names`.

    `most`: questions at most, with wrong answers of the last model first; None: all.
    """
    from cli.console import print_line
    from pipeline.evaluation.samples import match_of

    models = [name for name in names if samples.get(name)]
    if not models:
        return
    last = samples[models[-1]]
    numbers = sorted(range(len(last)), key=lambda number: match_of(last[number]).as_expected)
    width = max(len(name) for name in (*models, "expected"))
    for number in sorted(numbers[:most]):
        print_line(f"\n> {_shorten(last[number]['question'])}")
        print_line(f"  {'expected':{width}}  {_shorten(last[number]['reference'])}")
        for name in models:
            # by its prompt: a model is not asked what has words that it does not know
            same = [row for row in samples[name] if row["prompt"] == last[number]["prompt"]]
            sign, answer = (
                (match_of(same[0]).sign, same[0]["answer"]) if same else (" ", UNKNOWN_WORDS)
            )
            print_line(f"{sign} {name:{width}}  {_shorten(answer)}")


def _shorten(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= MOST_CHARACTERS else f"{line[:MOST_CHARACTERS]}…"
