"""Files that are read by other programs: Dockerfile, constraints.txt, and the one place of the
version.
"""

import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.helpers.projects import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")


def copied() -> Iterator[str]:
    """The paths that the Dockerfile copies out of the build context."""
    for line in re.findall(r"^COPY (.+)$", DOCKERFILE, re.MULTILINE):
        if not line.startswith("--from="):
            yield from shlex.split(line)[:-1]


def test_every_path_that_the_dockerfile_copies_exists_and_is_not_ignored() -> None:
    ignored, *kept = [
        line
        for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
        if line and line[0] != "#"
    ]
    assert ignored == "*"
    paths = set(copied())
    assert {"pyproject.toml", "pipeline", "constraints.txt"} <= paths
    for path in paths:
        assert (ROOT / path).exists(), path
        assert any(
            fnmatch(path, line.removeprefix("!")) for line in kept if line.startswith("!")
        ), path


def test_the_dockerfile_copies_all_that_the_wheel_is_built_of() -> None:
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"][
        "build"
    ]["targets"]["wheel"]
    assert {
        *wheel["only-include"],
        *wheel["force-include"],
        PROJECT["readme"],
        *PROJECT["license-files"],
    } <= {*copied()}


def test_the_image_installs_extras_that_exist_and_does_not_run_as_root() -> None:
    (extras,) = re.findall(r"^ARG EXTRAS=(.+)$", DOCKERFILE, re.MULTILINE)
    assert set(extras.split(",")) <= PROJECT["optional-dependencies"].keys()
    (user,) = re.findall(r"^USER (\d+):\d+$", DOCKERFILE, re.MULTILINE)
    assert int(user) > 0 and f"--uid {user}" in DOCKERFILE


def test_the_constraints_name_one_version_of_every_dependency_that_its_range_allows() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned: dict[str, list[Requirement]] = {}
    for line in lines:
        pin = Requirement(line)
        # no address, no local build
        assert pin.url is None and re.fullmatch(r"==[\w.]+", str(pin.specifier)), line
        pinned.setdefault(canonicalize_name(pin.name), []).append(pin)
    optional = [
        one
        for name, given in PROJECT["optional-dependencies"].items()
        if name not in ("all", "dev", "docs")
        for one in given
    ]
    for needed in map(Requirement, [*PROJECT["dependencies"], *optional]):
        pins = pinned[canonicalize_name(needed.name)]
        for pin in pins:
            (version,) = (clause.version for clause in pin.specifier)
            assert needed.specifier.contains(version), f"{needed}: {pin}"
    for python in ("3.11", "3.12", "3.13"):
        machine = {
            "python_version": python,
            "python_full_version": f"{python}.0",
            "sys_platform": "linux",
        }
        for name, pins in pinned.items():
            assert sum(pin.marker is None or pin.marker.evaluate(machine) for pin in pins) <= 1, (
                name
            )


def test_the_version_is_written_in_one_place() -> None:
    version = re.escape(PROJECT["version"])
    pattern = rf"(lora-workbench|lora_workbench|lora|__version__|version)[ \"'=:]+{version}\b"
    found = subprocess.run(
        ("git", "grep", "--untracked", "-nE", pattern, "--", "*.py", "*.toml", "Dockerfile", "Makefile", ":!document"),
        cwd=ROOT, capture_output=True, text=True, check=False,
    ).stdout.splitlines()  # fmt: skip
    assert [line.partition(":")[0] for line in found] == ["pyproject.toml"], found
