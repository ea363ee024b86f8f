"""The pipeline's stages as commands. What a stage runs is imported only once the cache has missed."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.export import PromptsOption, WidthOption
from cli.options import (
    DEFAULT_PARAMS,
    UNDER_DVC,
    WIDEST,
    BaseOption,
    CheckpointOption,
    ForceOption,
    ParamsOption,
    SetOption,
    TrustOption,
    group,
    project_of,
)

if TYPE_CHECKING:
    from collections.abc import Generator

    from pipeline.project.runner import Event, Facts, Job, Work

    Making = Generator[Event, None, Facts]

SWEEP_COLUMNS = ("trained", "steps", "loss", "held out")
app = group()
finetune = group(help="Fine-tune: full, freeze, lora, prefix, prompt, sweep.", no_args_is_help=True)
app.add_typer(finetune, name="finetune")


@app.command()
def pretrain(
    params: ParamsOption = DEFAULT_PARAMS,
    overrides: SetOption = None,
    force: ForceOption = False,
    checkpoint_every: CheckpointOption = 100,
) -> None:
    """Train MiniGPT from scratch → artifacts/base."""

    def work(job: "Job") -> "Making":
        from pipeline.stages.pretrain import pretrain

        return pretrain(job)

    run_stage("pretrain", work, params, overrides, force, checkpoint_every)


@app.command("expand-vocab")
def expand_vocab(
    params: ParamsOption = DEFAULT_PARAMS, overrides: SetOption = None, force: ForceOption = False
) -> None:
    """Add rows for new words → artifacts/expanded."""

    def work(job: "Job") -> "Making":
        from pipeline.stages.expand_vocab import expand_vocab

        return expand_vocab(job)

    run_stage("expand_vocab", work, params, overrides, force)


@app.command("train-from-scratch")
def train_from_scratch(
    params: ParamsOption = DEFAULT_PARAMS,
    overrides: SetOption = None,
    force: ForceOption = False,
    checkpoint_every: CheckpointOption = 100,
) -> None:
    """Train a model from random weights on old and new data.

    It has the base's shape; writes artifacts/from_scratch.
    """

    def work(job: "Job") -> "Making":
        from pipeline.stages.train_from_scratch import train_from_scratch

        return train_from_scratch(job)

    run_stage("train_from_scratch", work, params, overrides, force, checkpoint_every)


@finetune.command()
def full(
    params: ParamsOption = DEFAULT_PARAMS,
    overrides: SetOption = None,
    force: ForceOption = False,
    checkpoint_every: CheckpointOption = 100,
) -> None:
    """Train every parameter → artifacts/full_finetuned."""
    run_stage("finetune_full", _finetune, params, overrides, force, checkpoint_every)


@finetune.command()
def freeze(
    params: ParamsOption = DEFAULT_PARAMS,
    overrides: SetOption = None,
    force: ForceOption = False,
    checkpoint_every: CheckpointOption = 100,
) -> None:
    """Train the last blocks and embeddings → artifacts/layer_frozen."""
    run_stage("finetune_freeze", _finetune, params, overrides, force, checkpoint_every)


@finetune.command()
def lora(
    params: ParamsOption = DEFAULT_PARAMS,
    overrides: SetOption = None,
    force: ForceOption = False,
    checkpoint_every: CheckpointOption = 100,
    devices: Annotated[int, typer.Option(min=1, help="Number of processes, one per GPU.")] = 1,
    shard: Annotated[
        bool | None,
        typer.Option(help="Shard the base over the devices; default: if one cannot hold it."),
    ] = None,
) -> None:
    """Train low-rank updates → artifacts/lora_adapter, in PEFT's format.

    The same from torchrun: torchrun --nproc-per-node 2 -m cli.main finetune lora
    """
    from pipeline.errors import UserError
    from pipeline.project.process_rank import world

    if shard and devices == 1 and world().world_size == 1:
        raise UserError("--shard shares the base among several devices. Say how many with --devices.")
    if devices > 1 and world().world_size == 1:
        from pipeline.training.launch import launch

        project_of(params, overrides).stage("finetune_lora")  # what is wrong is said before anything starts
        given = ["--params", str(params), "--checkpoint-every", str(checkpoint_every), *["--force"] * force]
        given += [f"--set={override}" for override in overrides or ()]
        given += [] if shard is None else ["--shard" if shard else "--no-shard"]
        raise typer.Exit(launch(devices, ["finetune", "lora", *given]))

    def work(job: "Job") -> "Making":
        from pipeline.stages.finetune import finetune

        return finetune(job, shard)

    run_stage("finetune_lora", work, params, overrides, force, checkpoint_every)


@finetune.command()
def prefix(
    params: ParamsOption = DEFAULT_PARAMS,
    overrides: SetOption = None,
    force: ForceOption = False,
    checkpoint_every: CheckpointOption = 100,
) -> None:
    """Prefix tuning → artifacts/prefix, in PEFT's format.

    Trains keys and values of virtual tokens in every block.
    """
    run_stage("finetune_prefix", _finetune, params, overrides, force, checkpoint_every)


@finetune.command()
def prompt(
    params: ParamsOption = DEFAULT_PARAMS,
    overrides: SetOption = None,
    force: ForceOption = False,
    checkpoint_every: CheckpointOption = 100,
) -> None:
    """Prompt tuning → artifacts/prompt, in PEFT's format.

    Trains the embeddings of virtual tokens.
    """
    run_stage("finetune_prompt", _finetune, params, overrides, force, checkpoint_every)


@finetune.command()
def sweep(
    params: ParamsOption = DEFAULT_PARAMS,
    overrides: SetOption = None,
    force: ForceOption = False,
    checkpoint_every: CheckpointOption = 100,
) -> None:
    """Train one adapter per combination of a grid → artifacts/sweep.

    The grid is finetune_sweep.grid; all adapters train in one pass.
    """
    from pipeline.project.params.grid import variants

    project = project_of(params, overrides)
    project.stage("finetune_sweep")
    variants(project.params.finetune_lora, project.params.finetune_sweep)  # what is wrong is said first

    def work(job: "Job") -> "Making":
        from pipeline.stages.sweep import sweep

        return sweep(job)

    run_stage("finetune_sweep", work, params, overrides, force, checkpoint_every)
    if not UNDER_DVC:
        _show_sweep(project.artifact("finetune_sweep"))


def _finetune(job: "Job") -> "Making":
    from pipeline.stages.finetune import finetune

    return finetune(job)


@app.command()
def merge(
    params: ParamsOption = DEFAULT_PARAMS,
    overrides: SetOption = None,
    force: ForceOption = False,
    adapter: Annotated[
        Path | None, typer.Option(help="Adapter to merge instead of the pipeline's; needs --out.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Output folder for --adapter.")] = None,
    base: BaseOption = None,
    precision: WidthOption = None,
    prompts: PromptsOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Merge the adapter into its base.

    With a certificate: each matrix received its update once, and the answers are the same.

    With --adapter and --out: any adapter into its base's files, tensor by tensor, without loading the model.
    """
    if trust_remote_code or any(option is not None for option in (adapter, out, base, precision, prompts)):
        from cli.export import merge_files, merging_of
        from pipeline.errors import UserError

        if adapter is None or out is None:
            raise UserError("To merge any adapter, name it with --adapter and the folder to write with --out.")
        if overrides or force or params != DEFAULT_PARAMS:
            raise UserError("--params, --set and --force are of the pipeline's merge: leave out --adapter, or them.")
        merge_files(out, *merging_of(adapter, base, precision, prompts, trust_remote_code))
        return

    def work(job: "Job") -> "Making":
        from pipeline.stages.merge import merge

        return merge(job)

    run_stage("merge", work, params, overrides, force)


@app.command()
def evaluate(params: ParamsOption = DEFAULT_PARAMS, overrides: SetOption = None, force: ForceOption = False) -> None:
    """Compare all variants → artifacts/evaluation."""

    def work(job: "Job") -> "Making":
        from pipeline.stages.evaluate import evaluate

        return evaluate(job)

    from cli.project.report import report

    run_stage("evaluate", work, params, overrides, force)
    if not UNDER_DVC:  # of many stages' output the table would be lost in the middle: `lora report` shows it
        report(params)


def run_stage(
    name: str, work: "Work", params: Path, overrides: list[str] | None, force: bool, checkpoint_every: int = 100
) -> None:
    """Run a stage, show how it goes, and say in a line what came of it."""
    from cli.console import stdout
    from cli.progress import follow
    from pipeline.errors import UserError
    from pipeline.project.process_rank import world
    from pipeline.project.runner import run

    project = project_of(params, overrides)
    stage = project.stage(name)
    if world().world_size == 1:
        events = run(project, stage, work, force=force, checkpoint_every=checkpoint_every)
    else:
        if not name.startswith("finetune_") or name == "finetune_sweep":
            raise UserError(f"{name} runs in one process. Call it without torchrun.")
        from pipeline.training.distributed import run_distributed

        events = run_distributed(project, stage, work, force=force, checkpoint_every=checkpoint_every)
    manifest = follow(events, name, quiet=UNDER_DVC)
    if not manifest:  # not the process that writes
        return
    line = _summary(project.artifact_name(name), project.artifact(name), manifest)
    stdout.print(f"{name:{WIDEST}}  {line}" if UNDER_DVC else line, markup=False, soft_wrap=True)


def _show_sweep(folder: Path) -> None:
    """The table of a sweep's adapters."""
    from cli.console import stdout, table
    from pipeline.files.artifact import read_json
    from pipeline.project.params.grid import TABLE

    rows = []
    for name, end in read_json(folder / TABLE, "Run `lora finetune sweep`").items():
        losses = ("" if end[key] is None else f"{end[key]:.4f}" for key in ("final_loss", "eval_loss"))
        rows.append((name, f"{end['trainable']:,}", f"{end['steps']:,}", *losses, end["state"]))
    stdout.print(table(("adapter", *SWEEP_COLUMNS, "end"), rows, right=SWEEP_COLUMNS))


def _summary(path: str, folder: Path, manifest: dict[str, object]) -> str:
    """One line: where the artifact is and what can be said of it at once."""
    from pipeline.project.logs.run_log import LOSS, final_loss, read_steps

    parts = [path]
    parameters = manifest.get("parameters")
    if isinstance(parameters, dict):
        parts.append(f"{parameters['total']:,} parameters")
        if parameters["trainable"]:
            parts.append(f"{parameters['trainable']:,} trained")
        if "stored" in parameters:  # PiSSA's adapter takes its beginning away again, which needs twice its rank
            parts.append(f"{parameters['stored']:,} in the adapter's file")
    if isinstance(manifest.get("adapters"), dict):
        parts.append(f"{len(list(folder.glob(f'*/{LOSS}')))} adapters")
    steps = read_steps(folder / LOSS)
    if steps:
        parts.append(f"loss {final_loss(steps):.3f} after {steps[-1].step:,} steps")
    return "  ".join(parts)
