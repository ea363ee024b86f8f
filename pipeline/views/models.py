"""Describes the models and adapters in a folder by their files, without loading them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pipeline.adapters.config import CONFIG
from pipeline.adapters.folder import Contents, Fingerprint, refuse_foreign
from pipeline.errors import UserError
from pipeline.files import artifact
from pipeline.files.base_model import base_fingerprint
from pipeline.files.digest_cache import Signature, signature
from pipeline.files.safetensors_file import read_header
from pipeline.inference.catalog import (
    BASES,
    VERDICT,
    Measurements,
    find_base,
    measured,
    model_folders,
)
from pipeline.project.gate import Verdict
from pipeline.project.logs.run_log import LOSS, read_final_loss, read_steps
from pipeline.project.stage_graph import ARTIFACTS, Project
from pipeline.stages.registry import open_project

WEIGHTS = ".safetensors"
UNSEALED = "no manifest: base unknown"
NOT_CHECKED = "It has no manifest, so only names and shapes can be checked, when it is loaded."
VERIFIED, UNBOUND, REFUSED = "verified", "no manifest", "refused"
WITHOUT_WEIGHTS = "without weights"  # a model of a demo, whose answers are replayed


@dataclass(frozen=True)
class Adapter:
    """An adapter folder. `problem`: why it would be rejected; None in other fields means unknown.

    `rank` is that of the saved files; a PiSSA adapter is saved with twice its `trained_rank`.
    `gate`: "passed", or how many of evaluate.limits it breaks.
    """

    path: Path
    method: str
    rank: int | None
    trained_rank: int | None
    targets: tuple[str, ...]
    base: str | None
    size: int
    final_loss: float | None
    forgetting: float | None
    gate: str | None
    problem: str | None
    weights_of: str = ""  # see Model


@dataclass(frozen=True)
class Model:
    """A folder with a base, checkpoint, merged model or adapter; None means unknown.

    `size` is in bytes of weights, `when` in seconds since the epoch; `parameters` of an adapter
    exclude its base; `scales`: whether it is an adapter whose strength can be scaled, which virtual
    tokens and recorded answers cannot.
    """

    path: Path
    kind: str  # base, checkpoint, merged or adapter
    method: str
    rank: int | None
    targets: tuple[str, ...]
    base: str | None
    parameters: int | None
    size: int
    final_loss: float | None
    when: float | None
    scales: bool
    # the step of its weights, where a run kept those of several steps, or took the best
    weights_of: str = ""


@dataclass(frozen=True)
class VerificationResult:
    """`state` is VERIFIED, UNBOUND (no manifest to compare with), WITHOUT_WEIGHTS or REFUSED, with
    the reason.
    """

    state: str
    reason: str | None = None
    forgetting: float | None = None  # increase of the loss on the old sentences, in nats per token
    gate: str | None = None  # "passed", or how many of evaluate.limits it breaks
    broken: tuple[str, ...] = ()  # these limits, each with what was measured
    kept: float | None = None  # share of the answers to old sentences that are still the base's
    answered: float | None = None  # share of its answers to new prompts that are as expected
    similar: float | None = None  # ROUGE-L of those that are long texts
    learned: float | None = None  # share of the new sentences that it completes
    preferred: float | None = None  # share of the pairs in which it prefers the chosen answer
    new_loss: float | None = None  # on the new sentences, in nats per token
    digest: str = ""  # of its files, by which evaluations name it; "" if that is not known


def adapters(
    root: Path,
    fingerprint: Fingerprint = base_fingerprint,
    contents: Contents = artifact.contents,
    results: Sequence[Path] = (),
) -> list[Adapter]:
    """Every adapter below `root`, by path, and those of named runs among `results`."""
    runs = dict.fromkeys(result.parent for result in results)
    measurements, described = measured([root, *runs]), list[Adapter]()
    for folder in chain.from_iterable(map(model_folders, [root, *results])):
        if not (folder / CONFIG).exists():
            continue
        model = describe(folder)
        digest = artifact.contents_digest(contents(folder))
        result = scored(VerificationResult(VERIFIED, digest=digest), measurements)
        params = _read_json_or_empty(folder / artifact.MANIFEST).get("params")
        trained_rank = params.get("rank") if isinstance(params, dict) else None
        described.append(
            Adapter(
                path=folder,
                method=model.method,
                rank=model.rank,
                trained_rank=trained_rank if isinstance(trained_rank, int) else None,
                targets=model.targets,
                base=model.base,
                size=model.size,
                final_loss=model.final_loss,
                forgetting=result.forgetting,
                gate=result.gate,
                problem=_find_problem(model, root, fingerprint, contents),
                weights_of=model.weights_of,
            )
        )
    return described


def _find_problem(
    model: Model, root: Path, fingerprint: Fingerprint, contents: Contents
) -> str | None:
    """Why an adapter would be rejected. A missing base is no reason: --base may name it."""
    try:
        artifact.read_json(model.path / CONFIG, "Make the adapter again")
        if not (model.path / artifact.MANIFEST).exists():
            return UNSEALED
        try:
            find_base(model.path, root)
        except UserError:
            artifact.verify(model.path, contents)
            return None
    except UserError as error:
        return str(error)
    return check(model, root, fingerprint=fingerprint, contents=contents).reason


def describe(folder: Path) -> Model:
    """A model as its files describe it.

    Missing or damaged files leave fields unknown; `check` gives the reason.

    The kind of an adapter comes from its config, so that a new kind needs no line here. The method
    that trained a LoRA, such as DPO, comes from its manifest.
    """
    config = _read_json_or_empty(folder / CONFIG)
    manifest = _read_json_or_empty(folder / artifact.MANIFEST)
    trained = manifest.get("method")
    files = signature(folder)
    rank, base = config.get("r"), config.get("base_model_name_or_path")
    targets: tuple[str, ...] = ()
    virtual = "num_virtual_tokens" in config
    left_out = artifact.not_shipped(folder)
    if (folder / CONFIG).exists():
        kind, peft_type = "adapter", config.get("peft_type")
        method = "dora" if config.get("use_dora") else peft_type
        is_other_lora = trained != "lora" and manifest.get("stage") == f"finetune_{trained}"
        if peft_type == "LORA" and is_other_lora:
            method = trained
        targets = _targets(config)
    else:
        kind = "base" if trained in (None, *BASES) else "checkpoint"
        kind = "merged" if trained == "merge" else kind
        method = trained or _read_json_or_empty(folder / "config.json").get("model_type")
    # without the checkpoints below it
    sizes = {file.name: file.size for file in files if "/" not in file.name} | left_out
    try:
        last_loss = read_final_loss(folder / LOSS)
    except OSError:
        last_loss = None
    return Model(
        path=folder,
        kind=kind,
        method=str(method or "?").lower(),
        rank=rank if isinstance(rank, int) else None,
        targets=targets,
        base=base if isinstance(base, str) else None,
        parameters=_count_parameters(folder, kind, manifest),
        size=sum(size for name, size in sizes.items() if name.endswith(WEIGHTS)),
        final_loss=last_loss,
        when=_modified_at(files),
        scales=kind == "adapter" and not virtual and not left_out,
        weights_of=_weights_of(folder, manifest),
    )


def _weights_of(folder: Path, manifest: Mapping[str, Any]) -> str:
    """The step of a model's weights in words; empty for those of the last step."""
    step, best = manifest.get("best_step"), "the best evaluation"
    if isinstance(checkpoint := manifest.get("checkpoint"), dict):
        step = checkpoint.get("step")
        others = _read_json_or_empty(folder.parent / artifact.MANIFEST)
        best = "the best checkpoint" if others.get("best_checkpoint") == step else ""
    if not isinstance(step, int):
        return ""
    parts = [f"step {step:,}"]
    for row in read_steps(folder / LOSS):
        if row.step == step and row.eval_loss is not None:
            parts.append(f"held-out loss {row.eval_loss:.3f}")
        if row.step == step and row.eval_answers is not None:
            parts.append(f"{row.eval_answers:.0%} of held-out answers")
    return ", ".join([*parts, *[best] * bool(best)])


def _targets(config: Mapping[str, Any]) -> tuple[str, ...]:
    """What an adapter changes: modules, stacked experts, or virtual tokens."""
    if "num_virtual_tokens" in config:
        return (f"{config['num_virtual_tokens']} virtual tokens",)
    names, stacked = config.get("target_modules"), config.get("target_parameters")
    targets = names if isinstance(names, list) else [names]
    if isinstance(stacked, list):
        targets = targets + [str(name).removeprefix("mlp.") for name in stacked]
    return tuple(map(str, targets))


def _read_json_or_empty(path: Path) -> dict[str, Any]:
    try:
        return artifact.read_json(path, "")
    except UserError:
        return {}


def _count_parameters(folder: Path, kind: str, manifest: Mapping[str, Any]) -> int | None:
    """The manifest's count, or else the number of elements in the weights.

    Of an adapter the weights': its manifest counts the base too, and what trains without its
    weights.
    """
    counted = "total" if kind != "adapter" else "trainable"
    try:
        if kind != "adapter" or artifact.not_shipped(folder):
            return int(manifest["parameters"][counted])
    except (KeyError, OverflowError, TypeError, ValueError):
        pass
    try:
        headers = [read_header(path) for path in folder.glob("*.safetensors")]
    except UserError:
        return None
    return (
        sum(prod(info.shape) for header in headers for info in header.values()) if headers else None
    )


def _modified_at(files: Signature) -> float | None:
    times = {file.name: file.modified / 1e9 for file in files}
    return times.get(artifact.MANIFEST, max(times.values(), default=None))


def newest_model(project: Project, merged: bool = True) -> tuple[Path, Path | None]:
    """Folders of base and adapter of the pipeline model that was trained last in a project.

    If none is trained yet, the expanded base, or else the base. `merged`: whether it may be the
    merged model. Raises UserError if there is none.
    """
    existing = {}
    for name, stages in project.variants.items():
        folders = [project.artifact(stage) for stage in stages if stage]
        if all(map(Path.is_dir, folders)) and (merged or stages[0] != "merge"):
            existing[name] = folders
    if not existing:
        command = project.command(project.variants["base"][0])
        raise UserError(f"There is no model yet. Run {command}, or name one with --base.")
    models = [pair for name, pair in existing.items() if name not in ("base", "expanded")]
    if not models:
        models = [existing.get("expanded") or existing["base"]]
    base, *adapter = max(
        reversed(models),  # of two with the same time, the later in the pipeline
        key=lambda pair: _modified_at(signature(pair[-1])) or 0.0,
    )
    return base, adapter[0] if adapter else None


def trusts_remote_code(params: Path, base: Path) -> bool:
    """Whether a base may run its own code: if params.yaml trusts it, and only for the project's own
    models.
    """
    try:
        project = open_project(params)
        folders = [owner.root / ARTIFACTS for owner in (project, project.parent) if owner]
        is_own = any(base.resolve().is_relative_to(folder.resolve()) for folder in folders)
        return is_own and project.params.origin.trust_remote_code
    except UserError:  # the pipeline screen reports it
        return False


def check(
    model: Model,
    root: Path,
    measurements: Measurements = MappingProxyType({}),
    fingerprint: Fingerprint = base_fingerprint,
    contents: Contents = artifact.contents,
) -> VerificationResult:
    """Whether the model's files, and an adapter's base, match the manifest.

    Reads all of them, unless `fingerprint` and `contents` are cached. `measurements` come from
    `measured`.
    """
    is_adapter = model.kind == "adapter"
    try:
        if left_out := artifact.not_shipped(model.path):
            digest = artifact.sealed_digest(artifact.verify(model.path, contents))
            reason = f"It was shipped without {', '.join(left_out)}. Run its stage to make it."
            return scored(VerificationResult(WITHOUT_WEIGHTS, reason, digest=digest), measurements)
        if is_adapter:
            refuse_foreign(find_base(model.path, root), model.path, fingerprint, contents)
        if (model.path / artifact.MANIFEST).exists():
            read = (
                artifact.read_manifest
                if is_adapter
                else partial(artifact.verify, contents=contents)
            )
            digest = artifact.sealed_digest(read(model.path))
            return scored(VerificationResult(VERIFIED, digest=digest), measurements)
        read_header(next(model.path.glob("*.safetensors"), model.path / "model.safetensors"))
        # the files of an adapter are few; a base would be hashed for nothing, as only adapters
        # are measured alone
        digest = artifact.contents_digest(contents(model.path)) if is_adapter else ""
        return scored(VerificationResult(UNBOUND, NOT_CHECKED, digest=digest), measurements)
    except UserError as error:
        return VerificationResult(REFUSED, str(error))
    except OSError as error:
        return VerificationResult(REFUSED, f"{error.filename or model.path}: {error.strerror}.")
    except (AttributeError, KeyError, TypeError):  # a manifest whose sections have another type
        return VerificationResult(
            REFUSED, f"{model.path / artifact.MANIFEST} is not a manifest of this project."
        )


def scored(verdict: VerificationResult, measurements: Measurements) -> VerificationResult:
    """The result, with what an evaluation measured of these files."""
    metrics = measurements.get(verdict.digest, {})
    limits: Verdict | None = metrics.get(VERDICT)

    def number(read: Callable[[], Any]) -> float | None:
        try:
            return float(read())
        except (KeyError, TypeError, ValueError, ArithmeticError):  # another tool's metrics
            return None

    return replace(
        verdict,
        forgetting=number(lambda: metrics["forgetting"]["loss_rise"]),
        gate=limits.badge if limits else None,
        broken=tuple(limits.reasons) if limits else (),
        kept=number(lambda: metrics["forgetting"]["answers_kept"]),
        answered=number(lambda: metrics["answers"]["as_expected"] / metrics["answers"]["n"]),
        similar=number(lambda: metrics["answers"]["similar"]["rouge_l"]),
        learned=number(lambda: metrics["new_completed"] / metrics["new_sentences"]),
        preferred=number(lambda: metrics["preferences"]["after"]["accuracy"]),
        new_loss=number(lambda: metrics["new_loss"]),
    )
