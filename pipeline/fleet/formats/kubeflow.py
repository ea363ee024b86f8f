"""Kubeflow Trainer: a TrainJob for each unit."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.fleet.engines import bytes_of
from pipeline.fleet.formats import CACHE, Batch, Format, quoted, require, yaml_text

CHECKED = "Checked against the models of kubeflow-trainer-api 2.3.0, never run."
NODE = "node"  # the job and the container of the runtime that train
# the variables are the runtime's
MEET = '"--rdzv-endpoint=$PET_MASTER_ADDR:$PET_MASTER_PORT" "--node-rank=$PET_NODE_RANK"'
OPTIONS = {
    CACHE: "folder of results, as the pods see it",
    "image": "image in which lora is installed",
    "claim": "PersistentVolumeClaim that holds the project",
    "mount": "where the pods see the claim, by default the project's folder",
    "runtime": "ClusterTrainingRuntime, by default torch-distributed",
    "namespace": "of the jobs",
}


def _files(batch: Batch) -> Mapping[str, str]:
    return {f"unit-{n}.yaml": _job(batch, n) for n in range(1, len(batch.units) + 1)}


def _job(batch: Batch, number: int) -> str:
    unit, options = batch.units[number - 1], batch.options
    metadata: dict[str, Any] = {"name": batch.unit_name(number)}
    if "namespace" in options:
        metadata["namespace"] = options["namespace"]
    trainer: dict[str, Any] = {
        "image": require(batch, "kubeflow", "image", "registry/lora-workbench"),
        "numNodes": unit.nodes,
        "command": ["bash", "-c", batch.script(number, MEET)],
    }
    if resources := _resources(batch):
        trainer["resourcesPerNode"] = {"requests": resources, "limits": resources}
    spec: dict[str, Any] = {
        "runtimeRef": {"name": options.get("runtime", "torch-distributed")},
        "trainer": trainer,
    }
    if claim := options.get("claim"):
        spec["runtimePatches"] = [_volume(claim, options.get("mount", unit.root))]
    document = {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": metadata,
        "spec": spec,
    }
    return batch.head(number, CHECKED) + yaml_text(document)


def _resources(batch: Batch) -> dict[str, str]:
    cluster, resources = batch.cluster, dict[str, str]()
    if cluster.cpus:
        resources["cpu"] = str(cluster.cpus)
    if cluster.memory:
        resources["memory"] = str(bytes_of(cluster.memory))
    if cluster.gpus:
        resources["nvidia.com/gpu"] = str(cluster.gpus)
    return resources


def _volume(claim: str, mount: str) -> dict[str, Any]:
    """The patch of the runtime that mounts a claim."""
    pod = {
        "volumes": [{"name": "lora", "persistentVolumeClaim": {"claimName": claim}}],
        "containers": [
            {"name": NODE, "volumeMounts": [{"name": "lora", "mountPath": mount}]},
        ],
    }
    job = {"name": NODE, "template": {"spec": {"template": {"spec": pod}}}}
    template = {"spec": {"replicatedJobs": [job]}}
    return {"manager": "lora-workbench/emit", "trainingRuntimeSpec": {"template": template}}


def _next_step(_batch: Batch, folder: Path) -> str:
    return f"kubectl apply -f {quoted([str(folder)])}"


FORMAT = Format(_files, _next_step, OPTIONS)
