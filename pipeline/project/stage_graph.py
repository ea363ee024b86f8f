"""A stage and the graph of those that a project may have, and `Project`: its stages and the
parent's that it reads.

`pipeline/stages/registry.py` says which stages there are. dvc.yaml contains the same graph for DVC;
a test compares them.
"""

import os
from collections import ChainMap
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from msgspec import Struct
from msgspec.structs import asdict

from pipeline.errors import UserError
from pipeline.extensions import Registry
from pipeline.files.artifact import MANIFEST
from pipeline.project.params.load import Params, inherit, parse, read_text
from pipeline.project.params.schema import Section
from pipeline.project.process import WORK

ARTIFACTS, RUNS, CACHE = "artifacts", "runs", ".lora-cache"
# below a project: where `dvc exp run --queue` and `--temp` run copies of it
EXPERIMENTS = (".dvc", "tmp", "exps")


def cache_folder(root: Path) -> Path:
    """The cache's folder: in the project, or LORA_CACHE, which several projects can share.

    A copy that DVC made for an experiment uses the cache of its project: its own would be removed
    with it.
    """
    if shared := os.environ.get("LORA_CACHE"):
        return Path(shared)
    copies = next((folder for folder in root.parents if folder.parts[-3:] == EXPERIMENTS), None)
    return (copies.parents[2] if copies else root) / CACHE


def work_folder(root: Path) -> Path:
    """Where stages write artifacts and runs: in the project, or LORA_WORK, a unit's of a fleet.

    What a unit reads and has not made itself is the project's.
    """
    return Path(os.environ.get(WORK) or root)


class Look(NamedTuple):
    """A curve's color and sign in every chart; in print also its `dash`, as matplotlib takes it,
    and its bar's `hatch`.

    The colors are Okabe and Ito's, which color-blind readers can distinguish.
    """

    color: str
    sign: str
    dash: Any = "-"
    hatch: str = ""


class Stage(Struct, frozen=True, eq=False):
    """One node. Its name is its DVC stage and its section of params.yaml.

    Its module, or that of `work`, has `run(job)`: it yields events and returns its part of the
    artifact's manifest.
    """

    name: str
    module: str
    output: str  # a folder below artifacts/
    # checkpoint, adapter, adapters (a folder of them), evaluation, or what an extension makes
    kind: str
    method: str
    settings: type[Section]  # its section's class
    needs: tuple[str, ...] = ()  # stages whose outputs it reads
    # keys of its settings that name files, or section.key of other sections
    data: tuple[str, ...] = ()
    settings_from: str = ""  # the section with its training settings, if that is another stage's
    extra_sections: tuple[str, ...] = ()  # further sections that affect its output
    # params → why a project does not have it in spite of its section; empty if it has it
    skipped: Callable[[Params], str] | None = None
    data_folder: str = ""  # where the files lie that its settings name by default
    quantizes: bool = False  # whether it quantizes a base, whatever its settings
    compares: bool = False  # whether it reads only those of `needs` that the project has
    work: str = ""  # the module that has `run(job)`, if it is another
    # modules of the methods whose adapters it loads, which no import shows
    loads: tuple[str, ...] = ()
    summary: str = ""  # what it does, for `lora --help`
    title: str = ""  # its name in reports and charts
    variant: str = ""  # its model's name in comparisons; empty: it is not compared
    look: Look | None = None  # its curve's
    peft_type: str = ""  # PEFT's name of its adapter, if only its module can load it
    order: float = 0  # among the fine-tuning methods, or an extension's stages, in every list
    typed: str = ""  # its command, where that has another name
    # raises UserError for settings that cannot run
    check: Callable[["Project"], object] | None = None

    @property
    def code(self) -> tuple[str, ...]:
        """The modules whose code makes its artifact: its own, and where it loads adapters of
        several methods theirs.
        """
        return (self.module, *filter(None, (self.work,)), *self.loads)

    @property
    def section(self) -> str:
        """The section of params.yaml with its training settings."""
        return self.settings_from or self.name

    @property
    def is_measurement(self) -> bool:
        """Whether it measures what other stages made: an extension's, that makes no model."""
        return self.kind not in ("checkpoint", "adapter", "adapters", "evaluation")

    @property
    def group(self) -> str:
        """The folder that its output shares with others, such as `studies`; empty: none."""
        return self.output.rpartition("/")[0]

    @property
    def trains(self) -> bool:
        """Whether it writes a run log: a method, or MiniGPT's pretraining."""
        return bool(self.look) or self.name == "pretrain"

    @property
    def path(self) -> str:
        """Its output relative to the project, such as artifacts/base."""
        return f"{ARTIFACTS}/{self.output}"

    @property
    def command(self) -> str:
        """What makes its artifact: `lora finetune lora` for finetune_lora, `lora expand-vocab` for
        expand_vocab.
        """
        typed = self.typed or self.name.replace("finetune_", "finetune ").replace("_", "-")
        return f"lora {typed}"

    def run(self, job: Any) -> Generator[Any, None, dict[str, Any]]:
        """Its work. Only now is its module imported, and with it torch."""
        work: Generator[Any, None, dict[str, Any]] = import_module(self.work or self.module).run(
            job
        )
        return work


class StageGraph:
    """The stages that a project may have: the program's, then those of extensions.

    `product`: the program's, by name in the DAG's order. An extension's module is imported when its
    stage or section is asked for, or all are.
    """

    def __init__(self, product: Mapping[str, Stage]) -> None:
        self.product = product
        self._stages = Registry[Stage](
            "stage", order=_place, taken=product.keys(), check=_wrong_name
        )
        self._sections = Registry[type[Section]]("section", taken=product.keys())
        # looked up from the left, listed from the right
        self.stages: Mapping[str, Stage] = ChainMap(self._stages, product)  # type: ignore[arg-type]
        self.sections: Mapping[str, type[Section]] = _Sections(self.stages, self._sections)

    def among(self, names: Set[str]) -> dict[str, Stage]:
        """The stages with one of these names, in the DAG's order."""
        ours = {name: stage for name, stage in self.product.items() if name in names}
        more = [self._stages[name] for name in names if name in self._stages]
        more.sort(key=_place)
        return ours | {stage.name: stage for stage in more}


def _place(stage: Stage) -> tuple[float, str]:
    return stage.order, stage.name


def _wrong_name(name: str, stage: Stage) -> str:
    return "" if stage.name == name else f"its stage has another name, {stage.name}."


class _Sections(Mapping[str, type[Section]]):
    """Name → class of every section that a params file may have: a stage's, or an extension's."""

    def __init__(self, stages: Mapping[str, Stage], more: Registry[type[Section]]) -> None:
        self._stages, self._more = stages, more

    def __getitem__(self, name: str) -> type[Section]:
        return self._stages[name].settings if name in self._stages else self._more[name]

    def __iter__(self) -> Iterator[str]:
        yield from self._stages
        yield from self._more

    def __len__(self) -> int:
        return len(self._stages) + len(self._more)

    def __contains__(self, name: object) -> bool:
        return name in self._stages or name in self._more


@dataclass(frozen=True)
class Project:
    """A params file and its folder; all paths in it are relative to that folder.

    `parent`: the project that the params file names under `project`. Stages and sections that a
    project does not have itself are read from its parent.
    """

    root: Path
    params: Params
    graph: StageGraph
    parent: "Project | None" = None

    @classmethod
    def load(cls, path: Path, graph: StageGraph, overrides: Sequence[str] = ()) -> "Project":
        """The project of a params file, and its parent. Raises UserError."""
        return cls.of(path, parse(read_text(path), path, graph.sections, overrides), graph)

    @classmethod
    def of(cls, path: Path, params: Params, graph: StageGraph) -> "Project":
        """The project whose params file at `path` holds `params`. Raises UserError if its parent
        cannot be read.
        """
        root = path.resolve().parent
        if not params.project:
            return cls(root, params, graph)
        source = root / params.project
        try:
            parent_params = parse(read_text(source), source, graph.sections)
        except UserError as error:
            raise UserError(f"{path}: project: {error}") from None
        if parent_params.project:
            raise UserError(
                f"{path}: project {params.project} itself builds on {parent_params.project}. Name "
                "that one here."
            )
        parent = cls(source.resolve().parent, parent_params, graph)
        files: dict[str, set[str]] = {}  # section → its keys that name data files
        for stage in graph.among(parent_params.written).values():
            for key in stage.data:
                section, _, name = key.rpartition(".")
                files.setdefault(section or stage.section, set()).add(name)
        return cls(
            root,
            inherit(params, parent_params, files, os.path.relpath(parent.root, root)),
            graph,
            parent,
        )

    def section(self, stage: Stage) -> Any:
        """The section with the stage's name."""
        return self.params.section(stage.name)

    def stage_params(self, stage: Stage) -> dict[str, Any]:
        """All params that affect the stage's output. The keys of a sweep's grid replace those of
        its settings.
        """
        values = asdict(self.section(stage))
        settings = asdict(self.params.section(stage.section))
        params = {
            key: value for key, value in settings.items() if key not in values.get("grid", ())
        } | values
        for name in stage.extra_sections:
            params |= {
                f"{name}.{key}": value for key, value in asdict(self.params.section(name)).items()
            }
        return params

    def setting(self, stage: Stage, key: str) -> Any:
        """The value of a key of the stage's settings, or of section.key."""
        section, _, name = key.rpartition(".")
        return getattr(self.params.section(section or stage.section), name)

    @cached_property
    def stages(self) -> dict[str, Stage]:
        """Its own stages by name, in the DAG's order: those with a section in its params file,
        except those that do not apply to its settings.
        """
        others = {"pretrain" if self.params.origin.imports else "import"}
        wanted = self.graph.among(self.params.written - others)
        return {name: stage for name, stage in wanted.items() if not self._why_skipped(stage)}

    def _why_skipped(self, stage: Stage) -> str:
        return stage.skipped(self.params) if stage.skipped else ""

    @cached_property
    def readable(self) -> dict[str, Stage]:
        """Its own and its parent's stages, whose artifacts it can read, by name, in the DAG's
        order.
        """
        inherited = self.parent.stages if self.parent else {}
        return self.graph.among({*self.stages, *inherited})

    def unlisted(self) -> dict[str, Stage]:
        """The methods that ran here and have no section in the params file, as by `--set`, by name.

        The folders are looked at each time: a run may begin while the project is open.
        """
        taken = {stage.output for stage in self.readable.values()}
        methods = (
            stage
            for stage in self.graph.product.values()
            if stage.look and stage.output not in taken
        )
        return {stage.name: stage for stage in methods if self._ran(stage)}

    def _ran(self, stage: Stage) -> bool:
        return (self.root / stage.path / MANIFEST).is_file() or (
            self.root / RUNS / stage.name
        ).is_dir()

    @property
    def shown(self) -> dict[str, Stage]:
        """The stages that have something to show: those that it can read, then the unlisted."""
        return self.readable | self.unlisted()

    def stage(self, name: str) -> Stage:
        """One of its own stages. Raises UserError if it does not have it."""
        if name in self.stages:
            return self.stages[name]
        if self.parent and name in self.parent.stages:
            raise UserError(
                f"{name} is a stage of {self.params.project}. Run it in {self.parent.root}."
            )
        file, base = self.params.file, self.params.origin.base
        if name == ("pretrain" if self.params.origin.imports else "import"):
            other = "pretrain" if name == "import" else "import"
            raise UserError(
                f"base is {base} in {file}: run `lora {other}` instead of `lora {name}`."
                f"{' For `dvc repro`, remove dvc.yaml and run `lora new .`.' * self.has_dvc}"
            )
        if name not in self.params.written:
            raise UserError(
                f"{name} is not a stage of this project: {file} has no such section. "
                f"Add `{name}: {{}}` to "
                f"it{'; for `dvc repro`, remove dvc.yaml and run `lora new .`' * self.has_dvc}."
            )
        raise UserError(self._why_skipped(self.graph.stages[name]))

    @property
    def variants(self) -> dict[str, tuple[str, str | None]]:
        """What `compare` and `evaluate` compare: name → (stage that made the model, stage that made
        its adapter).
        """
        return {
            stage.variant: (self.standing_for("expand_vocab"), name)
            if stage.kind == "adapter"
            else (name, None)
            for name, stage in self.readable.items()
            if stage.variant
        }

    def standing_for(self, name: str) -> str:
        """The stage whose output is read as `name`'s: an imported base stands for the pretrained
        one, and either of them for the expanded one in a project that adds no tokens."""
        is_base = name == "pretrain" or (name == "expand_vocab" and name not in self.readable)
        if not is_base:
            return name
        return "import" if self.params.origin.imports else "pretrain"

    def home(self, name: str) -> "Project":
        """The project that has a stage: itself, or its parent."""
        is_parents = self.parent and name not in self.stages and name in self.parent.stages
        return self.parent if self.parent and is_parents else self

    def artifact(self, stage: str) -> Path:
        place, made = self._place(stage), self.output(stage)
        return made if made != place and made.exists() else place

    def output(self, stage: str) -> Path:
        """Where a stage writes its artifact: where it is read, unless LORA_WORK says otherwise."""
        stage = self.standing_for(stage)
        return work_folder(self.home(stage).root) / self.graph.stages[stage].path

    def _place(self, stage: str) -> Path:
        stage = self.standing_for(stage)
        return self.home(stage).root / self.graph.stages[stage].path

    @property
    def has_dvc(self) -> bool:
        """Whether `dvc repro` can make its artifacts."""
        return (self.root / "dvc.yaml").is_file()

    def command(self, stage: str) -> str:
        """How the artifact of a stage is made: `lora import`, or `dvc repro` for all."""
        stage = self.standing_for(stage)
        home, command = self.home(stage), self.graph.stages[stage].command
        where = "" if home is self else f" in {home.root}"
        return f"`{command}`{where}{', or `dvc repro` for all' * home.has_dvc}"

    def artifact_name(self, stage: str) -> str:
        """The artifact's path relative to the project's folder: artifacts/base, or
        ../artifacts/base.
        """
        return Path(os.path.relpath(self._place(stage), self.root)).as_posix()

    def run_folder(self, stage: str) -> Path:
        return work_folder(self.home(stage).root) / RUNS / stage

    @property
    def params_path(self) -> Path:
        return self.root / self.params.file

    @property
    def cache(self) -> Path:
        """The cache's folder, shared with the parent."""
        return cache_folder(self.parent.root if self.parent else self.root)

    def file_keys(self, stage: Stage) -> dict[str, str]:
        """Key of the stage's settings, such as data[0] or data[0].path, or section.key → name of
        each data file that it reads.

        Each file once, under its first key.
        """
        files: dict[str, str] = {}
        for key in stage.data:
            value = self.setting(stage, key)
            if isinstance(value, str):
                names = {key: value}
            else:
                names = {}
                for i, part in enumerate(value):
                    is_path = isinstance(part, str)
                    place = f"{key}[{i}]" if is_path else f"{key}[{i}].path"
                    names[place] = part if is_path else part["path"]
            files |= {k: name for k, name in names.items() if name and name not in files.values()}
        return files

    def data_files(self, stage: Stage) -> list[str]:
        """The data files that a stage reads, as named in params.yaml."""
        return list(self.file_keys(stage).values())

    def needs(self, stage: Stage) -> list[str]:
        """The stages whose outputs it reads; for a stage that compares, only those that the project
        has.
        """
        if stage.compares:
            return [need for need in stage.needs if need in self.readable]
        return [self.standing_for(need) for need in stage.needs]

    def inputs(self, stage: Stage) -> dict[str, Path]:
        """Name → path of everything that a stage reads: other stages' outputs, then data files."""
        outputs = {self.artifact_name(need): self.artifact(need) for need in self.needs(stage)}
        return outputs | {name: self.root / name for name in self.data_files(stage)}
