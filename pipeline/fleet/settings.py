"""`fleet.yaml`: the clusters that work may be sent to.

It is personal, beside params.yaml or where LORA_FLEET says, and in no key of the cache.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from msgspec import field

from pipeline.errors import UserError
from pipeline.files import strict_yaml
from pipeline.fleet.engines import ENGINES
from pipeline.project.params.schema import (
    ALLOW_EMPTY,
    Count,
    File,
    Names,
    ReadBy,
    Section,
    Steps,
    ValueSource,
    check_value,
    hints,
    reject_unknown_keys,
)

FILE, VARIABLE = "fleet.yaml", "LORA_FLEET"
LOCAL = "local"  # the cluster that needs no entry: the devices of this machine
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def _read_duration(value: Any, _key: str, _origin: ValueSource) -> int | None:
    """Seconds of 90s, 30m, 4h or 2d."""
    match = re.fullmatch(r"(\d{1,6})([smhd])", str(value).strip())
    return int(match[1]) * SECONDS[match[2]] if match else None


def _read_engine(value: Any, _key: str, _origin: ValueSource) -> str | None:
    return value if isinstance(value, str) and value in ENGINES else None


def _read_memory(value: Any, _key: str, _origin: ValueSource) -> str | None:
    text = str(value).strip()
    return text if re.fullmatch(r"\d{1,6}[KMGT]", text) else None


def _read_address(value: Any, _key: str, _origin: ValueSource) -> str | None:
    text = str(value).strip()
    return text if re.fullmatch(r"[\w.:\[\]-]{1,255}:\d{1,5}", text) else None


Address = Annotated[
    str, ALLOW_EMPTY, ReadBy(_read_address, "HOST:PORT of a head of Ray, such as 10.0.0.5:6379")
]
Duration = Annotated[int, ReadBy(_read_duration, "a duration such as 90s, 30m, 4h or 2d")]
Memory = Annotated[str, ALLOW_EMPTY, ReadBy(_read_memory, "a size such as 500M or 32G")]
Engine = Annotated[str, ReadBy(_read_engine, f"one of {', '.join(ENGINES)}")]


class Cluster(Section, frozen=True, kw_only=True):
    """Where units run, and what each may take."""

    engine: Annotated[Engine, "what runs the units"] = LOCAL
    address: Annotated[Address, "the head of Ray's cluster; empty: one of this machine alone"] = ""
    gpus: Annotated[Steps, "GPUs of a unit on each machine"] = 0
    cpus: Annotated[Steps, "CPU cores of a unit on each machine; 0: as the engine decides"] = 0
    memory: Annotated[
        Memory, "main memory of a unit on each machine; empty: as the engine decides"
    ] = ""
    time: Annotated[Duration, "a unit's time limit, at which it goes on in another attempt"] = (
        14_400
    )
    warn: Annotated[Duration, "how long before the time limit a unit writes its checkpoint"] = 120
    at_once: Annotated[Count, "units that run at the same time, at most"] = 8
    options: Annotated[
        Mapping[str, str], ALLOW_EMPTY, "further options of the engine, such as {partition: gpu}"
    ] = field(default_factory=dict)
    store: Annotated[File, "DVC remote for machines that share no cache"] = ""
    setup: Annotated[Names, "shell lines before a unit, such as module load cuda"] = ()


def read_clusters(root: Path) -> dict[str, Cluster]:
    """Name → cluster of a project's fleet.yaml; local is always there. Raises UserError."""
    path = fleet_file(root)
    tree = strict_yaml.read(path, path.name) if path.is_file() else {}
    if not isinstance(tree, dict) or not all(isinstance(part, dict) for part in tree.values()):
        raise UserError(
            f"{path} must map names to clusters, such as `cluster: {{engine: slurm}}`. Edit it."
        )
    return {LOCAL: Cluster()} | {str(name): _read(str(name), tree[name], path) for name in tree}


def read_cluster(root: Path, name: str) -> Cluster:
    """A cluster of fleet.yaml by its name. Raises UserError."""
    clusters = read_clusters(root)
    if name not in clusters:
        raise UserError(
            f"--on {name}: {fleet_file(root)} has no such cluster. There is "
            f"{', '.join(clusters)}. Add `{name}: {{engine: slurm}}` to it, or name one of these."
        )
    return clusters[name]


def fleet_file(root: Path) -> Path:
    """The fleet.yaml of a project, whether or not it is there."""
    return Path(os.environ.get(VARIABLE) or root / FILE)


def _read(name: str, tree: Mapping[str, Any], path: Path) -> Cluster:
    known, origin = hints(Cluster), ValueSource(path.name)
    reject_unknown_keys(tree, list(known), f"{name}.", origin)
    values = {key: check_value(known[key], tree[key], f"{name}.{key}", origin) for key in tree}
    cluster = Cluster(**values)
    unread = [key for key in ENGINES[cluster.engine].unread if key in tree]
    if unread:
        raise UserError(
            f"{name}.{unread[0]} does nothing with engine: {cluster.engine}. Take it out of "
            f"{path.name}."
        )
    return cluster
