"""What a container may use, by control groups written into a folder, and the free memory of a
device by it.
"""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from pipeline.files import memory
from pipeline.files.cgroup import cpu_quota, cpu_seconds
from pipeline.files.memory import Memory, read_memory
from pipeline.models import device

GIB = 2**30


HOST = Memory(64 * GIB, 4 * GIB, 60 * GIB, False)


@pytest.fixture(autouse=True)
def large_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_read_machine", lambda: HOST)


def tree(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="ascii")
    return root


VERSION_2 = {
    "own": "0::/pod/box\n",
    "pod/memory.max": f"{4 * GIB}\n",
    "pod/memory.current": f"{3 * GIB}\n",
    "pod/memory.stat": f"anon 1\ninactive_file {GIB}\n",
    "pod/cpu.max": "150000 100000\n",
    "pod/cpu.stat": "usage_usec 2500000\nuser_usec 1\n",
    "pod/box/memory.max": "max\n",
    "pod/box/cpu.max": "max 100000\n",
}
VERSION_1 = {
    "own": "3:cpu,cpuacct:/docker/1f\n2:memory:/docker/1f\n1:name=systemd:/docker/1f\n0::/system\n",
    "memory/docker/1f/memory.limit_in_bytes": f"{4 * GIB}\n",
    "memory/docker/1f/memory.usage_in_bytes": f"{3 * GIB}\n",
    "memory/docker/1f/memory.stat": f"inactive_file 7\ntotal_inactive_file {GIB}\n",
    "memory/memory.limit_in_bytes": "9223372036854771712\n",
    "cpu/docker/1f/cpu.cfs_quota_us": "150000\n",
    "cpu/docker/1f/cpu.cfs_period_us": "100000\n",
    "cpu/cpu.cfs_quota_us": "-1\n",
    "cpu/cpu.cfs_period_us": "100000\n",
    "cpuacct/docker/1f/cpuacct.usage": "2500000000\n",
}
# Inside a container of version 1 whose own group is the mount; the path is the host's.
INSIDE = {
    "own": "2:memory:/docker/1f\n",
    **{
        name.replace("memory/docker/1f/", "memory/"): text
        for name, text in VERSION_1.items()
        if "memory/docker" in name
    },
}


@pytest.mark.parametrize(
    ("files", "has_quota"),
    [(VERSION_2, True), (VERSION_1, True), (INSIDE, False)],
    ids=["v2", "v1", "inside"],
)
def test_a_containers_limit_is_the_total(
    tmp_path: Path, files: Mapping[str, str], has_quota: bool
) -> None:
    root = tree(tmp_path, files)
    assert read_memory(root, root / "own") == Memory(4 * GIB, 2 * GIB, 2 * GIB, True)
    quota = cpu_quota(root, root / "own")
    assert (quota is not None) == has_quota
    if quota:
        assert quota[0] == 1.5 and cpu_seconds(quota[1], root) == 2.5


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"own": "0::/\n"},
        {"own": "0::/pod\n", "pod/memory.max": "max\n", "pod/cpu.max": "max 100000\n"},
        {"own": "2:memory:/\n1:cpu:/\n", "memory/memory.limit_in_bytes": "9223372036854771712\n"},
        {"own": "0::/pod\n", "pod/memory.max": f"{128 * GIB}\n"},
    ],
    ids=["no-cgroups", "root", "v2-unlimited", "v1-unlimited", "above-the-host"],
)
def test_without_a_limit_the_host_is_the_total(tmp_path: Path, files: Mapping[str, str]) -> None:
    root = tree(tmp_path, files)
    assert read_memory(root, root / "own") == HOST and cpu_quota(root, root / "own") is None


SHARED = VERSION_2 | {  # the pod's other containers have taken most of its memory
    "pod/memory.max": f"{2 * GIB}\n",
    "pod/memory.current": f"{2 * GIB}\n",
    "pod/box/memory.max": f"{GIB}\n",
    "pod/box/memory.current": f"{GIB // 2}\n",
    "pod/box/memory.stat": f"anon 1\ninactive_file {GIB // 4}\n",
}


@pytest.mark.parametrize(
    ("files", "room"),
    [
        (VERSION_1, 2 * GIB),
        (VERSION_2, 2 * GIB),
        (INSIDE, 2 * GIB),
        (SHARED, GIB * 3 // 4),
        (SHARED | {"pod/memory.stat": "inactive_file 5\n"}, 5),
    ],
    ids=["v1", "v2", "inside", "own-group-is-fuller", "group-above-is-fuller"],
)
def test_the_memory_left_is_that_of_the_fullest_group_without_files_that_were_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: Mapping[str, str], room: int
) -> None:
    root = tree(tmp_path, files)
    reading = read_memory(root, root / "own")
    assert reading.available == room
    monkeypatch.setattr(memory, "read_memory", lambda: reading)
    assert device.available_memory(torch.device("cpu")) == room


def test_a_host_that_is_fuller_than_the_container_leaves_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tree(tmp_path, VERSION_2)
    monkeypatch.setattr(memory, "_read_machine", lambda: HOST._replace(available=GIB))
    assert read_memory(root, root / "own") == Memory(4 * GIB, 2 * GIB, GIB, True)


def test_a_limit_whose_use_cannot_be_read_is_passed_over(tmp_path: Path) -> None:
    root = tree(tmp_path, VERSION_2 | {"pod/memory.stat": "anon 1 2\n"})
    assert read_memory(root, root / "own") == HOST


def test_what_torch_keeps_for_the_next_tensors_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver counts it as used."""
    numbers = {
        "mem_get_info": (3 * GIB, 80 * GIB),
        "memory_reserved": 20 * GIB,
        "memory_allocated": 4 * GIB,
    }
    for name, number in numbers.items():
        monkeypatch.setattr(torch.cuda, name, {torch.device("cuda", 1): number}.__getitem__)
    assert device.available_memory(torch.device("cuda", 1)) == 19 * GIB
    sizes = {
        "recommended_max_memory": 24 * GIB,
        "driver_allocated_memory": 20 * GIB,
        "current_allocated_memory": GIB,
    }
    for name, number in sizes.items():
        monkeypatch.setattr(torch.mps, name, lambda number=number: number)
    assert device.available_memory(torch.device("mps")) == 23 * GIB
