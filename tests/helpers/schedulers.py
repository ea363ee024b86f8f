"""SkyPilot, torchx and Kubeflow's models in an environment of their own: they need other versions
of what this one has.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from pipeline.files.digest_cache import cache_home

VERSIONS = "skypilot==0.14.1", "torchx==0.7.0", "kubeflow-trainer-api==2.3.0"

SKY = """
import json, sys
import sky
for path in sys.argv[1:]:
    task = sky.Task.from_yaml(path)
    print(json.dumps({"name": task.name, "run": task.run, "nodes": task.num_nodes, 
                      "resources": [r.to_yaml_config() for r in task.resources],
                      "mounts": sorted(task.storage_mounts)}))
"""

# A model's `from_dict` passes over what it does not know: nothing may be missing afterwards.
KUBEFLOW = """
import json, sys
import yaml
from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob as TrainJob
for path in sys.argv[1:]:
    with open(path) as file:
        document = yaml.safe_load(file)
    job = TrainJob.from_dict(document)
    assert json.loads(job.to_json()) == document, (job.to_json(), document)
    print(json.dumps(document))
"""

TORCHX = """
import json, sys
from torchx.specs import macros
from torchx.specs.builders import materialize_appdef
from torchx.specs.file_linter import validate
from torchx.specs.finder import get_component
path, *numbers = sys.argv[1:]
errors = validate(path, "unit")
assert not errors, errors
for number in numbers:
    app = materialize_appdef(get_component(f"{path}:unit").fn, ["--number", number])
    (role,) = app.roles
    values = macros.Values(img_root="/i", app_id="a", replica_id="1", rank0_env="FIRST")
    role = values.apply(role)
    print(json.dumps({"name": app.name, "args": role.args, "nodes": role.num_replicas,
                      "resource": [role.resource.cpu, role.resource.gpu, role.resource.memMB]}))
"""


def python_with_schedulers() -> Path:
    """The environment's Python. Skips the test where it cannot be installed."""
    place = cache_home() / "lora-workbench" / "-".join(["schedulers", *VERSIONS])
    place.parent.mkdir(parents=True, exist_ok=True)
    python, uv = place / "bin" / "python", Path(sys.executable).with_name("uv")
    with FileLock(f"{place}.lock"):
        if not (place / "installed").exists():
            commands: list[list[str | Path]] = [
                [uv, "venv", "--quiet", "--clear", "--python", sys.executable, place],
                [uv, "pip", "install", "--quiet", "--python", python, *VERSIONS],
            ]
            for command in commands:
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    pytest.skip(f"the schedulers are not installed: {done.stderr[-500:]}")
            (place / "installed").touch()
    return python


def checked(program: str, *arguments: object) -> list[Any]:
    """What a program of those above prints, for each file or number."""
    done = subprocess.run(
        [python_with_schedulers(), "-c", program, *map(str, arguments)],
        env=os.environ | {"SKYPILOT_DISABLE_USAGE_COLLECTION": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
