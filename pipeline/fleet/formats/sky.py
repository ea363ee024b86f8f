"""SkyPilot: the YAML of a managed job for each unit."""

from collections.abc import Mapping
from math import ceil
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.fleet.engines import bytes_of
from pipeline.fleet.formats import CACHE, PORT, Batch, Format, each_file, require, yaml_text

CHECKED = "Checked by SkyPilot 0.14.1's own reader of tasks, never run."
MOUNT = "/lora"  # the bucket's folder on its machines
FIRST = "\"--rdzv-endpoint=${SKYPILOT_NODE_IPS%%$'\\n'*}:" + f'{PORT}"'
OPTIONS = {
    CACHE: "folder of results that all machines see",
    "bucket": "bucket of results instead, such as s3://NAME",
    "gpu": "kind of GPU, such as H100",
    "image": "Docker image in which lora is installed",
    "infra": "cloud or cluster, such as aws or k8s",
}


def _files(batch: Batch) -> Mapping[str, str]:
    return {f"unit-{n}.yaml": _task(batch, n) for n in range(1, len(batch.units) + 1)}


def _task(batch: Batch, number: int) -> str:
    unit, options = batch.units[number - 1], batch.options
    if ("bucket" in options) == (CACHE in options):
        raise UserError(
            "sky needs a folder of results that outlives its machines. Add --option "
            "bucket=s3://NAME, or --option cache=DIR where all machines see the folder."
        )
    document: dict[str, Any] = {"name": batch.unit_name(number)}
    # the project's folder is copied there, and is the current folder
    document["workdir"] = unit.root
    if unit.nodes > 1:
        document["num_nodes"] = unit.nodes
    if resources := _resources(batch):
        document["resources"] = resources
    cache = ""
    if bucket := options.get("bucket"):
        cache = f"{MOUNT}/cache"
        # MOUNT has no rename, by which a result comes to be in the cache
        document["file_mounts"] = {MOUNT: {"source": bucket, "mode": "MOUNT_CACHED"}}
    # and not `setup`: what that sets is gone in `run`
    meet = f'{FIRST} "--node-rank=$SKYPILOT_NODE_RANK"'
    document["run"] = batch.script(number, meet, cache, is_there=True)
    return batch.head(number, CHECKED) + yaml_text(document)


def _resources(batch: Batch) -> dict[str, Any]:
    cluster, resources = batch.cluster, dict[str, Any]()
    if "infra" in batch.options:
        resources["infra"] = batch.options["infra"]
    if cluster.gpus or "gpu" in batch.options:
        kind = require(batch, "sky", "gpu", "H100")
        resources["accelerators"] = f"{kind}:{max(1, cluster.gpus)}"
    if cluster.cpus:
        resources["cpus"] = f"{cluster.cpus}+"
    if cluster.memory:
        resources["memory"] = f"{ceil(bytes_of(cluster.memory) / 2**30)}+"  # GiB
    if "image" in batch.options:
        resources["image_id"] = f"docker:{batch.options['image']}"
    return resources


def _next_step(_batch: Batch, folder: Path) -> str:
    return each_file(folder, ".yaml", "sky jobs launch --yes --detach-run")


FORMAT = Format(_files, _next_step, OPTIONS)
