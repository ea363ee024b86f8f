"""What `import lora_workbench` gives. Paths may be texts; `on_event` gets notes and progress.

A relative path is relative to the current folder, also where a project lies elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lora_workbench.calculator import Calculation, calc
from pipeline.errors import UserError
from pipeline.project.runner import Event, Note, Progress

if TYPE_CHECKING:
    from pipeline.export.into import Kind, Rounding
    from pipeline.inference.engine import LoadedModel
    from pipeline.project.logs.run_log import Step
    from pipeline.project.logs.runs import Run
    from pipeline.views.runs import Comparison

__all__ = ["Calculation", "Event", "Note", "Progress", "Project", "Result", "UserError", "calc"]

T = TypeVar("T")
OnEvent = Callable[[Event], None]
Values = Mapping[str, Any] | Sequence[str]  # section.key → value, or texts section.key=value


def ignore(_event: Event) -> None:
    """Show nothing."""


def show(event: Event) -> None:
    """Print what is out of the ordinary: a function for `on_event`."""
    if isinstance(event, Note) and not event.routine:
        print(event.text)


def play(events: Generator[Event, None, T], on_event: OnEvent) -> T:
    """What a generator returns, after `on_event` got each of its events."""
    while True:
        try:
            event = next(events)
        except StopIteration as stop:
            result: T = stop.value
            return result
        on_event(event)


def _path(name: str | Path | None) -> Path | None:
    return None if name is None else Path(name)


@dataclass(frozen=True)
class Result:
    """What a stage made, in its folder.

    `manifest`: of what it was made, and with which settings ("params"); {} in a process that does
    not write it.
    """

    folder: Path
    manifest: Mapping[str, Any]

    @property
    def steps(self) -> list[Step]:
        """The log of a training, a record per step."""
        from pipeline.project.logs.run_log import LOSS, read_steps

        return read_steps(self.folder / LOSS)


class Project:
    """A folder with a `params.yaml`: its settings, what its stages make, and its runs.

    `new` and `train` make one. A change of `params.yaml` is read by opening it again.
    """

    def __init__(self, folder: str | Path = ".", set: Values = ()) -> None:
        """Open a project by its folder or params file. Raises UserError if there is none.

        `set`: values that win over the file's, as `--set` does: {"finetune_lora.rank": 8}. The file
        stays as it is.
        """
        from pipeline.project.params.edit import dump_inline
        from pipeline.stages.registry import open_project

        path = Path(folder)
        if isinstance(set, Mapping):
            set = [f"{key}={dump_inline(value)}" for key, value in set.items()]
        self.pipeline = open_project(path / "params.yaml" if path.is_dir() else path, set)

    @property
    def folder(self) -> Path:
        """The folder of its `params.yaml`."""
        return self.pipeline.root

    @property
    def stages(self) -> tuple[str, ...]:
        """The names of its stages, in the order in which they run."""
        return tuple(self.pipeline.stages)

    def settings(self, section: str) -> Any:
        """A section of the settings, checked, with its defaults: `settings("finetune_lora").rank`."""
        return self.pipeline.params.section(section)

    def artifact(self, stage: str) -> Path:
        """The folder of what a stage makes, whether or not it is there."""
        return self.pipeline.artifact(stage)

    def run(
        self,
        stage: str = "finetune_lora",
        *,
        name: str | None = None,
        force: bool = False,
        checkpoint_every: int | None = None,
        shard: bool | None = None,
        on_event: OnEvent = ignore,
    ) -> Result:
        """Run a stage, or take its result from the cache; what it needs must have run before.

        `name` keeps it under a name, as `keep` does; the result's folder is then the one it is kept
        in. `force` ignores the cache. `checkpoint_every`: steps between two states to resume from.
        `shard`: the base over the processes of torchrun, by default if it does not fit. Raises
        UserError, and Interrupted after a signal, once a checkpoint is written: the same call
        resumes.
        """
        from lora_workbench.running import run_stage

        if name is not None:
            self.refuse_name(name, stage)
        events = run_stage(self.pipeline, stage, force, checkpoint_every, shard)
        manifest = play(events, on_event)
        if name is not None and manifest:
            return Result(self.keep(stage, name, on_event), manifest)
        return Result(self.artifact(stage), manifest)

    def refuse_name(self, name: str, stage: str) -> None:
        """Raises UserError if a run of the stage with these settings cannot have the name."""
        from pipeline.files.artifact import read_manifest
        from pipeline.project.cache import NAME, NAMED, SHORT_KEY, Cache, cache_key
        from pipeline.project.runner import changed_params, input_facts

        project, made = self.pipeline, self.pipeline.stage(stage)
        is_key = len(name) == SHORT_KEY and {*name} <= {*"0123456789abcdef"}
        if not NAME.fullmatch(name) or is_key or name in project.graph.stages:
            raise UserError(
                "--name must be at most 64 letters, digits, dots, dashes and underscores, and no "
                f"stage or key, got {name[:80]!r}. Choose another."
            )
        link = Cache(project.cache).root / NAMED / name / made.output
        if not link.is_dir():
            return
        facts, there = input_facts(project, made), read_manifest(link)
        if cache_key(facts) != cache_key(there):
            changed = changed_params(there["params"], facts["params"])
            how = ", ".join(changed) or "its data, base or code differ"
            raise UserError(
                f"{name} is a run already, with other settings: {how}. Choose another name, or "
                f"remove it: `lora runs remove {name}`."
            )

    def keep(self, stage: str, name: str, on_event: OnEvent = ignore) -> Path:
        """Keep the stage's result under a name, and evaluate it if the project evaluates.

        Returns its folder, for `load` and others; the evaluation is in the folder beside it. Raises
        UserError if the cache does not have the result.
        """
        from pipeline.project.cache import Cache
        from pipeline.project.runner import artifact_settings

        made = artifact_settings(self.artifact(stage))
        folder = Cache(self.pipeline.cache).name(
            name, stage, made.key if made else "", self.pipeline.stage(stage).output
        )
        if "evaluate" in self.pipeline.readable:
            evaluate(self, [folder], out=folder.parent / "evaluation", on_event=on_event)
        return folder

    def runs(self, name: str | None = None) -> list[Run]:
        """Its trainings: all, or those of a name, a key or a stage.

        Raises UserError if none has the name.
        """
        from pipeline.views.runs import choose, discover_runs

        found = discover_runs(self.folder, self.pipeline)
        return found if name is None else choose(found, name)

    def compare(self, *names: str) -> Comparison:
        """What sets runs apart: settings, the end of training, evaluations.

        Each name stands for one run; a value's tuple is in the order of the names. Raises UserError.
        """
        from pipeline.views.runs import compare

        found = []
        for name in names:
            runs = self.runs(name)
            if len(runs) > 1:
                keys = ", ".join(f"{run.key[:8]} ({run.stage})" for run in runs)
                raise UserError(f"{name} has several runs. Name one by its key: {keys}.")
            found += runs
        return compare(self.pipeline, found)


def train(
    base: str | Path,
    data: str | Path | Sequence[str | Path],
    out: str | Path = "run",
    *,
    eval_data: str | Path | None = None,
    methods: Sequence[str] = (),
    columns: Mapping[str, str] | None = None,
    set: Mapping[str, Any] | None = None,
    name: str | None = None,
    on_event: OnEvent = ignore,
) -> Project:
    """Fine-tune a base on data: a project in `out`, its settings chosen for both, run and evaluated.

    `base`: a folder, a .gguf file or a hub id; `data`: files, folders or ids of the hub's data sets.
    `eval_data`: examples to evaluate on; by default a share of `data` is held out. `methods`: by
    default ["lora"]. `columns`: a format's key → the file's, {"prompt": "question"}. `set`: settings
    in place of those that are chosen: {"finetune_lora.rank": 16}.

    After a stop the same call goes on. With a `name`, the trained runs are kept under it, and `set`
    may differ from a project that is there. Raises UserError, also for a project in `out` of another
    base or data.
    """
    from pipeline.inference.catalog import BASES
    from pipeline.stages.quickstart import Request, begin
    from pipeline.stages.registry import GRAPH

    files = [data] if isinstance(data, str | Path) else data
    request = Request(
        Path(out),
        str(base),
        [*map(str, files)],
        str(eval_data or ""),
        methods,
        columns or {},
        set or {},
    )
    begun = play(begin(request, GRAPH, experiment=name is not None), on_event)
    project, experiment = Project(out), Project(out, begun.overrides)
    for stage, made in project.pipeline.stages.items():
        if stage.startswith("finetune_"):
            experiment.run(stage, name=name, on_event=on_event)
        elif begun.started or name is None or made.method in BASES:
            project.run(stage, on_event=on_event)
    return project


def new(
    folder: str | Path,
    *,
    base: str | None = None,
    methods: Sequence[str] | None = None,
    params: str | Path | None = None,
    on_event: OnEvent = ignore,
) -> list[str]:
    """Make `folder` a project of MiniGPT, or of a params file; a project there gets what it lacks.

    `methods` to train, such as ["lora"], in place of the file's. `base`: a model to write into it.
    Returns the names of the files that it wrote. None is overwritten: a note names those that would
    differ. Raises UserError. `train` chooses settings for a base and data.
    """
    from pipeline.project.new_project import create
    from pipeline.stages.registry import GRAPH

    added, notes = create(Path(folder), GRAPH, _path(params), base, methods)
    for note in notes:
        on_event(Note(note))
    return added


def load(
    adapter: str | Path | None = None,
    base: str | Path | None = None,
    *,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """A base, with an adapter on it if one is named, ready to generate on the best device.

    Without a base, the one that the adapter names. `trust_remote_code` runs the code that a base
    brings. The result has `model`, a torch module in which the adapter's layers have `lora_A` (R, I)
    and `lora_B` (O, R), and `tokenizer`. Raises UserError for an adapter that does not belong to the
    base, or was changed: it never loads as nothing.
    """
    from pipeline.adapters.folder import base_of
    from pipeline.inference import engine

    path = _path(adapter)
    return engine.load(_path(base) or base_of(path), path, trust_remote_code=trust_remote_code)


def generate(
    model: LoadedModel,
    prompt: str,
    *,
    chat: bool = False,
    max_tokens: int = 20,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> str:
    """The text that follows a prompt; with `chat`, the answer to it as a user's turn.

    It ends at an end token, or after `max_tokens`. Greedy at temperature 0; above, `seed` determines
    what is drawn, and `top_k` 0 and `top_p` 1 sample from all tokens. Raises UserError.
    """
    from pipeline.data.tokenizers.chat_template import render
    from pipeline.inference.engine import continued
    from pipeline.models.generate import Sampling

    text = render(model.base, prompt) if chat else prompt
    return continued(model, text, max_tokens, Sampling(temperature, top_k, top_p, seed))


def evaluate(
    project: Project | str | Path = ".",
    adapters: Iterable[str | Path] = (),
    *,
    base: str | Path | None = None,
    out: str | Path | None = None,
    on_event: OnEvent = ignore,
) -> dict[str, Any]:
    """Metrics by model: what each learned, and what it forgot. Losses are in nats per token.

    Of the models that the project's `evaluate` compares, or of these adapters, measured in the same
    way → artifacts/measured, or `out`. With `evaluate.limits`, "gate" says whether they are kept.
    Raises UserError.
    """
    from pipeline.evaluation.measuring import measuring
    from pipeline.files.artifact import read_json

    opened = project if isinstance(project, Project) else Project(project)
    paths = list(map(Path, adapters))
    if not paths:
        result = opened.run("evaluate", on_event=on_event)
        return read_json(result.folder / "metrics.json", "Run `lora evaluate`")
    from pipeline.stages.evaluate import measure

    if missing := [path for path in paths if not path.is_dir()]:
        raise UserError(f"{missing[0]} is not a folder. Name an adapter's folder.")
    job = measuring(opened.pipeline)
    if out is not None:
        job = replace(job, out=Path(out))
    metrics, problems = play(
        measure(job, [path.absolute() for path in paths], _path(base)), on_event
    )
    for problem in problems:
        on_event(Note(problem))
    return metrics


def merge(
    adapter: str | Path,
    out: str | Path,
    *,
    base: str | Path | None = None,
    precision: str | None = None,
    prompts: str | Path | None = None,
    into: Kind | None = None,
    rounding: Rounding = "nearest",
    data: str | Path | None = None,
    trust_remote_code: bool = False,
    on_event: OnEvent = ignore,
) -> dict[str, Any]:
    """Merge an adapter into its base's files → a plain checkpoint in `out`; returns its certificate.

    The certificate says for each matrix how much of the update W + s·BA the rounding left.
    `precision` of the merged weights: fp32, bf16 or fp16; by default the base's. On the prompts of a
    file the merged model is compared with base + adapter.

    `into`: nf4 (a checkpoint of bitsandbytes), q4_k_m or q8_0 (a GGUF file), `rounding` to the
    nearest code or by gptq. Certificate "into": what that costs of the update, on prompts, and of
    what was learned on the examples of `data`. Raises UserError.
    """
    from pipeline.export.formats import Export, note_on_verdict
    from pipeline.export.formats.merged import merging_of
    from pipeline.weights.merge import merge_to

    for note in note_on_verdict(Path(adapter)):
        on_event(note)
    export = Export(
        Path(adapter),
        _path(base),
        precision=precision,
        prompts=_path(prompts),
        trust_remote_code=trust_remote_code,
    )
    if into is not None:
        from pipeline.export.into import Into, write

        return play(write(export, Into(into, rounding, _path(data)), Path(out)), on_event)
    return play(merge_to(Path(out), *merging_of(export)), on_event)


def export(
    adapter: str | Path,
    out: str | Path,
    format: str = "peft",
    *,
    base: str | Path | None = None,
    base_name: str | None = None,
    precision: str | None = None,
    prompts: str | Path | None = None,
    quantize: str | None = None,
    trust_remote_code: bool = False,
    on_event: OnEvent = ignore,
) -> list[str]:
    """Write an adapter for another program to `out`: peft, gguf, gguf-adapter, mlx, merged.

    Returns what was written and proved, a sentence each. Raises UserError.
    """
    from pipeline.export.formats import Export, write

    exported = Export(
        Path(adapter),
        _path(base),
        base_name,
        precision,
        _path(prompts),
        trust_remote_code,
        quantize,
    )
    return play(write(format, exported, Path(out)), on_event)


def sweep(
    project: Project | str | Path,
    grid: Mapping[str, Sequence[Any]],
    *,
    set: Mapping[str, Any] | None = None,
    on_event: OnEvent = ignore,
) -> dict[str, Any]:
    """Train an adapter for each combination of a grid, such as {"rank": [4, 8]}, all in one pass.

    `set`: further settings, {"finetune_lora.epochs": 2}. Returns "adapters", name → its values and
    losses, and "best", the name of the one with the lowest loss. Each is a folder of its name in
    `artifact("finetune_sweep")`. Raises UserError.
    """
    from pipeline.evaluation.selection import choose
    from pipeline.files.artifact import read_json
    from pipeline.project.logs.run_log import TABLE

    path = project.pipeline.params_path if isinstance(project, Project) else project
    opened = Project(path, {"finetune_sweep.grid": dict(grid), **(set or {})})
    result = opened.run("finetune_sweep", on_event=on_event)
    rows = read_json(result.folder / TABLE, "Run `lora finetune sweep`")
    return {"adapters": rows, "best": choose(rows)}
