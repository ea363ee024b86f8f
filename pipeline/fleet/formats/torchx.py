"""torchx: a file with a component, which makes the AppDef of a unit."""

from collections.abc import Mapping
from pathlib import Path
from pprint import pformat

from pipeline.fleet.engines import bytes_of
from pipeline.fleet.formats import CACHE, PORT, Batch, Format, quoted

NAME = "units.py"
CHECKED = "Run by torchx 0.7.0's scheduler local_cwd, by no other."
# torchx puts the name of the variable in place of ${rank0_env}; the first machine may lack it
MEET = f'"--rdzv-endpoint=$${{${{rank0_env}}:=localhost}}:{PORT}" "--node-rank=${{replica_id}}"'
OPTIONS = {
    CACHE: "folder of results, as the machines see it",
    "image": "image in which lora is installed; by default the project's folder, for local_cwd",
}
TEMPLATE = '''\
from typing import List, Optional

import torchx.specs as specs

UNITS = {units}


def unit(
    number: int,
    image: str = {image},
    mounts: Optional[List[str]] = None,
    max_retries: int = 3,
) -> specs.AppDef:
    """One unit.

    Args:
        number: which, from 1
        image: in which lora is installed
        mounts: such as type=bind,src=/host,dst=/job
        max_retries: after preemptions and errors
    """
    name, script = UNITS[number]
    role = specs.Role(
        name="lora",
        image=image,
        entrypoint="bash",
        args=["-c", script],
        num_replicas={nodes},
        max_retries=max_retries,
        retry_policy=specs.RetryPolicy.APPLICATION,
        resource=specs.Resource(cpu={cpus}, gpu={gpus}, memMB={memory}),
        port_map={{"rendezvous": {port}}},
        mounts=specs.parse_mounts(mounts) if mounts else [],
    )
    return specs.AppDef(name=name, roles=[role])
'''


def _files(batch: Batch) -> Mapping[str, str]:
    cluster, units = batch.cluster, dict[int, tuple[str, str]]()
    for number in range(1, len(batch.units) + 1):
        units[number] = batch.unit_name(number), batch.script(number, MEET)
    text = TEMPLATE.format(
        units=pformat(units, width=100),
        image=repr(batch.options.get("image", batch.units[0].root)),
        nodes=batch.nodes,
        # -1: as the scheduler decides
        cpus=cluster.cpus or -1,
        gpus=cluster.gpus,
        memory=bytes_of(cluster.memory) // 2**20 if cluster.memory else -1,
        port=PORT,
    )
    return {NAME: batch.head(None, CHECKED) + text}


def _next_step(batch: Batch, folder: Path) -> str:
    command = f"torchx run {quoted([str(folder / NAME)])}:unit --number"
    return f'for number in $(seq {len(batch.units)}); do {command} "$number"; done'


FORMAT = Format(_files, _next_step, OPTIONS)
