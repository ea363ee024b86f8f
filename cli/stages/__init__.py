"""The pipeline's stages as commands; what a stage runs is imported if the cache misses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Option

from cli.options import (
    DEFAULT_PARAMS,
    UNDER_DVC,
    WIDEST,
    BaseOption,
    CheckpointOption,
    DetachOption,
    DeviceOption,
    ForceOption,
    JsonOption,
    OnOption,
    ParamsOption,
    PartsOption,
    PromptsOption,
    SetOption,
    TrustOption,
    WidthOption,
    adapter_folder,
    group,
    project_of,
)
from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.evaluation.harness import HarnessOptions
    from pipeline.inference.model_pool import Folders
    from pipeline.project.stage_graph import Project, Stage


app = group()


def _runs(name: str) -> Callable[..., None]:
    """The command of a stage that trains nothing."""

    def command(
        params: ParamsOption = DEFAULT_PARAMS,
        overrides: SetOption = None,
        force: ForceOption = False,
        _device: DeviceOption = None,
    ) -> None:
        run_stage(name, params, overrides, force)

    return command


def _trains(name: str) -> Callable[..., None]:
    """The command of a stage that trains in one process."""

    def command(
        params: ParamsOption = DEFAULT_PARAMS,
        overrides: SetOption = None,
        force: ForceOption = False,
        checkpoint_every: CheckpointOption = None,
        _device: DeviceOption = None,
    ) -> None:
        run_stage(name, params, overrides, force, checkpoint_every)

    return command


app.command("import", help="Import the base model → artifacts/base.")(_runs("import"))
app.command("pretrain", help="Train MiniGPT from scratch → artifacts/base.")(_trains("pretrain"))
app.command(
    "train-from-scratch",
    help="Train a model from random weights on old and new data.\n\n"
    "It has the base's shape; writes artifacts/from_scratch.",
)(_trains("train_from_scratch"))
app.command("expand-vocab", help="Add rows for new words → artifacts/expanded.")(
    _runs("expand_vocab")
)


@app.command()
def merge(
    params: ParamsOption = DEFAULT_PARAMS,
    overrides: SetOption = None,
    force: ForceOption = False,
    adapter: Annotated[
        Path | None,
        Option(
            metavar="PATH",
            parser=adapter_folder,
            help="Adapter to merge instead of the pipeline's, or the name of a run; needs --out.",
        ),
    ] = None,
    out: Annotated[Path | None, Option(help="Output folder for --adapter.")] = None,
    base: BaseOption = None,
    precision: WidthOption = None,
    prompts: PromptsOption = None,
    into: Annotated[
        Literal["nf4", "q4_k_m", "q8_0"] | None,
        Option(help="Quantize the merge, and measure what that costs; needs --adapter."),
    ] = None,
    rounding: Annotated[
        Literal["nearest", "gptq"] | None,
        Option(help="Of --into: codes by their distance (default), or by what the outputs lose."),
    ] = None,
    data: Annotated[
        Path | None,
        Option(help="Of --into: examples of what was learned; gptq is calibrated on every other."),
    ] = None,
    trust_remote_code: TrustOption = False,
    _device: DeviceOption = None,
) -> None:
    """Merge the adapter into its base.

    With a certificate: each matrix received its update once, and the answers are the same.

    With --adapter and --out: any adapter into its base's files, tensor by tensor, without loading
    the model. With --into: the merge in 4 or 8 bits, beside the base in as many and the adapter
    apart.
    """
    given = (adapter, out, base, precision, prompts, into, rounding, data)
    if trust_remote_code or any(option is not None for option in given):
        from cli.console import following, noting_replaced, print_line
        from lora_workbench import api
        from pipeline.weights.merge_check import describe

        if adapter is None or out is None:
            raise UserError(
                "To merge any adapter, name it with --adapter and the folder to write with --out."
            )
        if overrides or force or params != DEFAULT_PARAMS:
            raise UserError(
                "--params, --set and --force are of the pipeline's merge: leave out --adapter, or "
                "them."
            )
        if into is None and (rounding or data):
            raise UserError(
                "--rounding and --data are of a quantized merge. Add --into, such as --into q4_k_m."
            )
        with noting_replaced(out), following("merge") as show:
            certificate = api.merge(
                adapter,
                out,
                base=base,
                precision=precision,
                prompts=prompts,
                into=into,
                rounding=rounding or "nearest",
                data=data,
                trust_remote_code=trust_remote_code,
                on_event=show,
            )
            print_line("  ".join((str(out), *describe(certificate))))
            if into is not None:
                from pipeline.export.into import describe as describe_rounding

                for line in describe_rounding(certificate["into"]):
                    print_line(line)
        return
    run_stage("merge", params, overrides, force)


@app.command()
def evaluate(
    params: ParamsOption = DEFAULT_PARAMS,
    overrides: SetOption = None,
    force: ForceOption = False,
    harness: Annotated[
        list[str] | None,
        Option("--harness", metavar="TASK", help="Run a task of lm-evaluation-harness instead."),
    ] = None,
    include_path: Annotated[
        Path | None, Option(help="Folder of more tasks for --harness, as YAML files.")
    ] = None,
    limit: Annotated[
        int | None, Option(min=1, help="Only the first examples of each task of --harness.")
    ] = None,
    num_fewshot: Annotated[
        int | None, Option(min=0, help="Examples before each question of --harness.")
    ] = None,
    apply_chat_template: Annotated[
        bool,
        Option(
            "--apply-chat-template", help="Ask the questions of --harness in the chat template."
        ),
    ] = False,
    adapter: Annotated[
        list[Path] | None,
        Option(
            metavar="PATH",
            parser=adapter_folder,
            help="Adapter to evaluate instead of the project's models, or the name of a run.",
        ),
    ] = None,
    base: BaseOption = None,
    on: OnOption = None,
    parts: PartsOption = None,
    detach: DetachOption = False,
    is_part: Annotated[
        bool, Option("--part", hidden=True, help="For the cache alone, without a verdict.")
    ] = False,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
    _device: DeviceOption = None,
) -> None:
    """Compare all variants → artifacts/evaluation. Exits with 1 where a model does not keep
    evaluate.limits.

    With --adapter: the same numbers of these adapters, such as a sweep's → artifacts/measured. With
    --harness: scores of lm-evaluation-harness for every variant, or for --base and each --adapter.
    The tasks may be your own; a task may run Python code.
    """
    from cli.console import print_json
    from cli.project.report import refuse_broken, report
    from pipeline.files.artifact import read_json

    if harness:
        from pipeline.evaluation.harness import HarnessOptions, named

        options = HarnessOptions(harness, include_path, limit, num_fewshot, apply_chat_template)
        outside = named(base, adapter or ()) if base or adapter else None
        _run_harness(options, outside, params, overrides, trust_remote_code, as_json)
        return
    given = (option is not None for option in (include_path, limit, num_fewshot))
    if any((*given, base and not adapter, apply_chat_template, trust_remote_code)):
        raise UserError(
            "Without --harness TASK, evaluate takes --adapter, --base, --params, --set, --force "
            "and --json alone."
        )
    if is_part:
        _measure_part(adapter or (), base, params, overrides)
        return
    if on is not None or parts is not None or detach:
        if on is None or not adapter:
            raise UserError(
                "--on, --parts and --detach send each --adapter to a cluster. Name both."
            )
        _send(adapter, base, params, overrides or (), on, parts, detach)
    if adapter:
        _measure(adapter, base, params, overrides, as_json)
        return
    run_stage("evaluate", params, overrides, force, silent=as_json)
    project = project_of(params, overrides)
    if as_json:
        print_json(read_json(project.artifact("evaluate") / "metrics.json", "Run `lora evaluate`"))
    # among many stages' output under DVC the table would be lost: `lora report` shows it
    elif not UNDER_DVC:
        report(params)
    refuse_broken(project, shown=as_json or not UNDER_DVC)


def _measure_part(
    adapters: Sequence[Path], base: Path | None, params: Path, overrides: list[str] | None
) -> None:
    """Measure the base, and these adapters, for the cache."""
    from cli.console import follow, print_note
    from pipeline.evaluation.measuring import measuring
    from pipeline.stages.evaluate import measure

    job = measuring(project_of(params, overrides))
    _, problems = follow(measure(job, adapters, base), "evaluate")
    for problem in problems:
        print_note(problem)


def _send(
    adapters: Sequence[Path],
    base: Path | None,
    params: Path,
    overrides: Sequence[str],
    on: str,
    parts: int | None,
    detach: bool,
) -> None:
    """Measure adapters in units on a cluster, and wait for them."""
    from cli.stages.finetune import wait_for
    from pipeline.fleet.evaluations import FleetEvaluation

    project = project_of(params, [*overrides])
    wait_for(FleetEvaluation(project, overrides, adapters, base, on, parts), detach)


def _measure(
    adapters: Sequence[Path],
    base: Path | None,
    params: Path,
    overrides: list[str] | None,
    as_json: bool,
) -> None:
    """Evaluate adapters and print their metrics. Raises UserError if they break evaluate.limits."""
    from cli.console import following, print_json
    from cli.project.report import print_metrics, refuse_verdict
    from lora_workbench import api
    from pipeline.evaluation.measuring import MEASURED
    from pipeline.project.stage_graph import ARTIFACTS
    from pipeline.stages.evaluate import METRICS

    project = api.Project(params, overrides or ())
    with following("evaluate") as show:
        metrics = api.evaluate(project, adapters, base=base, on_event=show)
    if as_json:
        print_json(metrics)
    else:
        print_metrics(metrics, project.folder / ARTIFACTS / MEASURED / METRICS)
    refuse_verdict(metrics)


def name_run(name: str, stage: str, params: Path, overrides: Sequence[str]) -> None:
    """Keep the stage's finished run under a name, evaluate it, and say what takes the name."""
    from cli.console import following, print_note
    from cli.project.report import print_metrics, refuse_verdict
    from lora_workbench import api
    from pipeline.files.artifact import read_json
    from pipeline.stages.evaluate import METRICS

    with following("evaluate") as show:
        folder = api.Project(params, overrides).keep(stage, name, show)
    print_note(
        f"{name}: kept. `lora runs compare {name} OTHER`, `lora prompt TEXT --adapter {name}`, "
        f"`lora runs apply {name}` take it."
    )
    path = folder.parent / "evaluation" / METRICS
    if path.is_file():
        metrics = read_json(path, "Run `lora evaluate`")
        print_metrics(metrics, path)
        refuse_verdict(metrics)


def _run_harness(
    options: HarnessOptions,
    models: Folders | None,
    params: Path,
    overrides: list[str] | None,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Score `models`, or else the project's, and print the table, or JSON."""
    from cli.console import print_json, print_note, print_table
    from pipeline.evaluation.harness import run, table
    from pipeline.inference.engine import variant_folders

    if models is None:
        project = project_of(params, overrides)
        models, trust_remote_code = (
            variant_folders(project),
            project.params.origin.trust_remote_code,
        )
    if not models:
        raise UserError(
            "There is no model yet. Make one, as with `lora import`, or name one with --base or "
            "--adapter."
        )
    document = run(models, options, trust_remote_code, print_note)
    if as_json:
        print_json(document)
        return
    columns, rows = table(document)
    print_table(columns, rows, right=columns[2:])


def of_stage(overrides: Sequence[str] | None, stage: Stage) -> list[str]:
    """Overrides in which a key alone is one of the stage's: finetune_lora.rank=8 for rank=8."""
    from pipeline.project.params.aliases import KEYS
    from pipeline.project.params.load import TOP_LEVEL, read_override
    from pipeline.project.params.schema import hints

    named = []
    for override in overrides or ():
        path, _ = read_override(override)
        ours = KEYS.get(path, path)
        if "." not in path and ours not in TOP_LEVEL:
            section = stage.name if ours in hints(stage.settings) else stage.section
            override = f"{section}.{override.strip()}"
        named.append(override)
    return named


def run_stage(
    name: str,
    params: Path,
    overrides: Sequence[str] | None,
    force: bool,
    checkpoint_every: int | None = None,
    shard: bool | None = None,
    silent: bool = False,
    apply: bool = False,
) -> None:
    """Run a stage, show how it goes, and print a line about its artifact.

    `silent`: without that line; `apply`: then write the overrides into the params file.
    """
    from cli.console import following
    from lora_workbench import api
    from pipeline.stages.registry import GRAPH

    overrides = of_stage(overrides, GRAPH.stages[name])
    project = project_of(params, overrides)
    with following(name, quiet=UNDER_DVC) as show:
        result = api.Project(params, overrides or ()).run(
            name, force=force, checkpoint_every=checkpoint_every, shard=shard, on_event=show
        )
    manifest, stage = result.manifest, project.stage(name)
    if not manifest:  # not the process that writes
        return
    if silent:
        return
    _print_artifact(project, stage, manifest)
    if apply:
        from cli.runs import write_values

        write_values(project, project.params.overrides)
    elif overrides and stage.trains and not UNDER_DVC:
        _note_overrides(project, stage)


def _print_artifact(project: Project, stage: Stage, manifest: Mapping[str, Any]) -> None:
    """One line: where the artifact is, its parameters, and its loss or accuracy."""
    from cli.console import print_line, print_note
    from pipeline.project.logs.run_log import (
        LOSS,
        final_accuracy,
        final_answers,
        final_loss,
        read_steps,
    )

    name, folder = stage.name, project.artifact(stage.name)
    parts = [project.artifact_name(name)]
    if parameters := manifest.get("parameters"):
        parts.append(f"{parameters['total']:,} parameters")
        if parameters["trainable"]:
            parts.append(f"{parameters['trainable']:,} trained")
        # PiSSA's adapter subtracts its initial A and B, which doubles its rank
        if "stored" in parameters:
            parts.append(f"{parameters['stored']:,} in the adapter's file")
    if isinstance(manifest.get("adapters"), dict):
        parts.append(f"{len(list(folder.glob(f'*/{LOSS}')))} adapters")
    preferences = manifest.get("preferences")
    if preferences:
        before, after = (preferences[when]["accuracy"] for when in ("before", "after"))
        parts.append(f"accuracy {before:.0%} → {after:.0%} on held-out pairs")
    steps = read_steps(folder / LOSS)
    if not preferences and (accuracy := final_accuracy(steps)) is not None:
        parts.append(f"accuracy {accuracy:.0%} on the pairs of the last epoch, none held out")
    if steps:
        parts.append(f"loss {final_loss(steps):.3f} after {steps[-1].step:,} steps")
        settings = project.params.section(stage.section)
        answered = final_answers(steps, settings.takes_best, settings.metric_for_best_model)
        if answered is not None:
            parts.append(f"held-out answers {answered:.0%} as expected (long ones: ROUGE-L)")
    label = f"{name:{WIDEST}}  " if UNDER_DVC else ""
    print_line(label + "  ".join(parts))
    if preferences and after < before:
        print_note(f"{name}: the accuracy fell. Lower {name}.learning_rate, or train fewer epochs.")


def _note_overrides(project: Project, stage: Stage) -> None:
    """Print what --set made differ from the params file, and which command replaces the result."""
    from cli.console import print_note
    from pipeline.project.runner import changed_params, settings_of

    file = project.params.file
    try:
        plain = project_of(project.params_path)
    except UserError:  # the file is valid with these values only
        return
    has_dvc = (project.root / "dvc.yaml").is_file()
    again = "`dvc repro`" if has_dvc else f"`{stage.command}` without --set"
    can_apply = stage.name.startswith("finetune_") and stage.kind != "adapters"
    keep = " --apply writes what was --set into it." * can_apply
    if stage.name not in plain.readable:
        print_note(
            f"{file} has no section "
            f"{stage.name}{', so `dvc repro` does not make it' * has_dvc}.{keep}"
        )
    elif changed := changed_params(settings_of(project, stage), settings_of(plain, stage)):
        print_note(
            f"{file} says otherwise: {', '.join(changed)}. {again} replaces this result.{keep}"
        )
