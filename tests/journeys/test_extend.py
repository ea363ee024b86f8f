"""docs/how-to/extend.md: the package of the page is installed, adds what the page says, and is
removed.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from pipeline.extensions import OFF
from pipeline.project.logs.run_log import epoch_means, read_steps
from tests.helpers.json_files import read_json
from tests.helpers.projects import GIVEN, ROOT, save

PAGE = (ROOT / "docs/how-to/extend.md").read_text(encoding="utf-8")
FILE = re.compile(r"^```\w+ (\S+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^ {4}((?:lora|pip) .*)$", re.MULTILINE)
ROWS = [
    {"question": "der hund", "answer": "läuft im park"},
    {"question": "die katze sitzt auf dem", "answer": "sofa"},
]


class Environment:
    """A virtual environment that has the packages of this one, and takes more."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, symlinks=True)
        self.python = folder / "bin/python"
        packages = folder / f"lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
        ours = sysconfig.get_path("purelib")
        (packages / "ours.pth").write_text(f"import site; site.addsitedir({ours!r})\n", "utf-8")

    def pip(self, *words: str, cwd: Path) -> None:
        offline = ["--no-deps", "--no-build-isolation", "--no-index"] * (words[0] == "install")
        pip = [sys.executable, "-m", "pip", "--python", str(self.python), "--quiet"]
        self._run([*pip, "--disable-pip-version-check", *words, *offline], cwd).check_returncode()

    def lora(self, *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        code = "from cli.main import main; main()"
        return self._run([str(self.python), "-P", "-c", code, *words], cwd)

    def _run(self, command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
        variables = {**os.environ, OFF: "", "TERMINAL_WIDTH": "100", "COLUMNS": "100"}
        return subprocess.run(
            command, cwd=cwd, env=variables, capture_output=True, text=True, check=False
        )


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return Environment(tmp_path_factory.mktemp("environment") / "env")


@pytest.mark.slow
def test_the_package_of_the_page_adds_a_method_and_a_format_until_it_is_removed(
    environment: Environment, project: Path, tmp_path: Path
) -> None:
    save(project / "params.yaml", GIVEN)
    text = "".join(f"{json.dumps(row)}\n" for row in ROWS)
    (project / "questions.jsonl").write_text(text, encoding="utf-8")
    package = tmp_path / "my-extension"
    for name, content in FILE.findall(PAGE):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(content, encoding="utf-8")

    def lora(*words: str) -> str:
        done = environment.lora(*words, cwd=project)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def has_nothing_of_it() -> None:
        assert "bitfit" not in lora("finetune", "--help")
        done = environment.lora("data", "check", "questions.jsonl", cwd=project)
        assert done.returncode == 1 and "the keys must be" in done.stdout + done.stderr

    has_nothing_of_it()
    # comments begin with #
    commands = [shlex.split(line, comments=True) for line in COMMAND.findall(PAGE)]
    assert [words[:2] for words in commands] == [
        ["pip", "install"],
        ["lora", "finetune"],
        ["lora", "data"],
        ["lora", "finetune"],
        ["pip", "uninstall"],
    ]
    (_, *install), *used, (_, *uninstall) = commands
    environment.pip(*install, cwd=package)
    printed = [lora(*words) for _, *words in used]
    assert "bitfit" in printed[0] and "Train biases alone" in printed[0]
    assert "question_answer" in printed[1] and "2" in printed[1]
    first, *_, last = epoch_means(read_steps(project / "artifacts/bitfit/loss.csv"))
    assert last < first

    with (project / "params.yaml").open("a", encoding="utf-8") as params:
        params.write("\nfinetune_bitfit: {data: questions.jsonl}\n")
    assert "Biases train" in lora("params", "explain", "finetune_bitfit")
    lora("finetune", "bitfit")
    lora("evaluate")
    metrics = read_json(project / "artifacts/evaluation/metrics.json")
    assert 0 < metrics["bitfit"]["trainable"] < metrics["lora"]["trainable"]
    assert "finetune_bitfit" in lora("runs")
    problems = json.loads(lora("doctor", "--json"))["extensions"]
    assert not [line for line in problems if "my_extension" in line]

    environment.pip(*uninstall, "--yes", cwd=package)
    done = environment.lora("params", "show", cwd=project)
    assert done.returncode == 1 and "unknown key finetune_bitfit" in done.stderr
    params_text = (project / "params.yaml").read_text(encoding="utf-8")
    without = params_text.replace("\nfinetune_bitfit: {data: questions.jsonl}\n", "")
    (project / "params.yaml").write_text(without, encoding="utf-8")
    has_nothing_of_it()
