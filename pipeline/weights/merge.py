"""What a merge of base + adapter writes: a plain checkpoint, and a check of it.

`merge_to` writes a folder as a whole: the base's weight files with each changed tensor edited, the
other files as they are, config.json and the index where they change, and certificate.json.
`merge_plan.py` says which edit a tensor gets, `edits.py` what it does, and `merge_check.py`
measures the written files. Memory does not grow with the model: tensors pass through it a block of
rows at a time.
"""

import shutil
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import UserError
from pipeline.files import artifact
from pipeline.files.artifact import MANIFEST, read_json, write_json
from pipeline.files.base_model import INDEX
from pipeline.files.safetensors_file import Bytes, NewTensor, in_file_order, rewrite
from pipeline.files.text import in_units
from pipeline.project.runner import Event, Progress
from pipeline.weights.blocks import DTYPES, map_in_threads
from pipeline.weights.merge_check import check_merge, written_matrices
from pipeline.weights.merge_plan import MergePlan, plan_merge

CONFIG, CERTIFICATE = "config.json", "certificate.json"
STORED = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}  # safetensors' names
# Not copied: weights in other formats, which would stay unmerged, and records of how the base was
# made.
WEIGHTS = (
    "*.safetensors",
    "*.bin",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.gguf",
    "*.onnx",
    "*.msgpack",
    "*.h5",
)
RECORDS = (MANIFEST, "audit.json", "loss.csv", CERTIFICATE)


@dataclass(frozen=True)
class Merging:
    """The base and adapter to merge."""

    base: Path
    adapter: Path
    precision: str | None = None  # fp32, bf16 or fp16; None: the base's dtype
    trust_remote_code: bool = False


# merged checkpoint → further entries for its certificate.json; raises UserError
Verify = Callable[[Path], dict[str, Any]]
# adds files to the checkpoint, given the entries
Finish = Callable[[Path, dict[str, Any]], None]


def merge_to(
    out: Path, merging: Merging, verify: Verify | None = None, finish: Finish | None = None
) -> Generator[Event, None, dict[str, Any]]:
    """`merge_into` a folder that is written atomically.

    Raises UserError if `out` holds anything but an earlier merge.
    """
    # a stage's result has a manifest too, and is not replaced
    replaceable = (out / CERTIFICATE).exists() and not (out / MANIFEST).exists()
    artifact.refuse_other(out, replaceable, (merging.base, merging.adapter))
    # A killed merge leaves the earlier result as it was; the next one removes what it left and
    # begins again. Resuming is not worth it: a merge takes less than twice as long as a copy of its
    # files, which `make bench` measures.
    with artifact.writing(out) as folder:
        check = yield from merge_into(folder, merging, verify)
        if finish:
            finish(folder, check)
    return check


def merge_into(
    out: Path, merging: Merging, verify: Verify | None = None
) -> Generator[Event, None, dict[str, Any]]:
    """Write the merged checkpoint and its check to `out`; returns the entries of the check.

    Raises UserError if a matrix did not receive its update exactly once, or if `verify` does.
    """
    dtype = STORED[merging.precision] if merging.precision else None
    plan = plan_merge(merging.base, merging.adapter, merging.trust_remote_code, dtype)
    files = weight_files(plan)
    for number, name in enumerate(write(plan, out), start=1):
        yield Progress(number, len(files), name)
    check: dict[str, Any] = yield from check_merge(plan, written_matrices(out), "--precision fp32")
    if verify:
        check |= verify(out)
    write_json(out / CERTIFICATE, check)
    return check


def weight_files(plan: MergePlan) -> list[Path]:
    return sorted({location.file for location in plan.locations.values()})


def write(plan: MergePlan, out: Path) -> Iterator[str]:
    """Write the complete checkpoint to `out`; yields each weight file's name when it is done.

    Raises UserError if there is not enough disk space.
    """
    size = sum(_new_tensor(plan, name).size for name in (*plan.locations, *plan.added))
    refuse_full_disk(out, size)
    jobs = []
    for file in weight_files(plan):
        # its own tensors in their order, so that they are read and written sequentially, then
        # added ones
        added = [name for name in plan.added if plan.source(name).file == file]
        tensors = [_new_tensor(plan, name) for name in (*in_file_order(file), *added)]
        jobs.append([(file.name, fill) for fill in rewrite(file, out / file.name, tensors)])
    # round robin over the files: a file takes one writer at a time
    in_turn = [*filter(None, chain.from_iterable(zip_longest(*jobs)))]
    remaining = Counter(name for name, _ in in_turn)
    filled = map_in_threads(lambda job: job[1](), in_turn)
    for (name, _), _none in zip(in_turn, filled, strict=True):
        remaining[name] -= 1
        if not remaining[name]:
            yield name
    copy_other_files(plan.base, out)

    # config.json and the index are left alone, byte for byte, if nothing in them changes
    config = read_json(out / CONFIG, "Copy the base again")
    changes: dict[str, Any] = {"tie_word_embeddings": False} if plan.unties else {}
    if plan.dtype:
        key = "torch_dtype" if "torch_dtype" in config else "dtype"  # the older name
        changes[key] = str(DTYPES[plan.dtype]).removeprefix("torch.")
    if changes:
        write_json(out / CONFIG, {**config, **changes})
    if (out / INDEX).exists() and (plan.added or plan.dtype):
        index = read_json(out / INDEX, "Copy the base again")
        index["weight_map"] |= {name: plan.source(name).file.name for name in plan.added}
        metadata = index.get("metadata")
        if isinstance(metadata, dict) and "total_size" in metadata:
            metadata["total_size"] = size
        write_json(out / INDEX, index)


def _new_tensor(plan: MergePlan, name: str) -> NewTensor:
    info = plan.source(name).info
    dtype = plan.dtype if plan.dtype and info.dtype in DTYPES else info.dtype
    if plan.changes(name) or dtype != info.dtype:
        return NewTensor(name, dtype, info.shape, lambda: _content(plan, name, dtype))
    return NewTensor(name, dtype, info.shape, None)


def _content(plan: MergePlan, name: str, dtype: str) -> Iterator[Bytes]:
    """The new bytes of a tensor: edited in the wider of the two dtypes and rounded once.

    In the narrower one, part of the update would be lost before it is added.
    """
    target = DTYPES.get(dtype)
    for new in plan.merged_blocks(name, target):
        written = new if target is None else new.to(target)
        if target == torch.float16 and not written.isfinite().all():
            raise UserError(
                f"{name} has the value {float(new.abs().max()):.3g}, which overflows fp16. "
                "Use --precision bf16."
            )
        yield written.contiguous().flatten().view(torch.uint8).numpy().data


def refuse_full_disk(out: Path, size: int) -> None:
    """Raises UserError unless the disk of the folder `out` has `size` bytes free."""
    free = shutil.disk_usage(out).free
    if free < size:
        raise UserError(
            f"{out.parent}: the merged model needs {in_units(size)}, but only {in_units(free)} "
            "are free. Free some space, or name a folder elsewhere with --out."
        )


def copy_other_files(base: Path, out: Path) -> None:
    """Copy all files but weights, hidden files and RECORDS, those of subfolders too.

    They are the tokenizer, templates, code, licence and index.
    """
    for path in sorted(base.rglob("*")):
        name = path.relative_to(base)
        weights = any(path.match(pattern) for pattern in WEIGHTS)
        hidden = any(part.startswith(".") for part in name.parts)
        if path.is_file() and not weights and not hidden and str(name) not in RECORDS:
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, out / name)
