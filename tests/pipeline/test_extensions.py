"""What installed packages add: found without importing them, and whatever is wrong with one of them
leaves the program as it is without it.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from pipeline import extensions
from pipeline.extensions import OFF, ExtensionError, Registry
from pipeline.project.stage_graph import Stage
from pipeline.stages.searches import SEARCHES
from tests.helpers.extension import environment, install, load
from tests.helpers.projects import lora, new_project

METHOD = """
from pipeline.project.params.sections import Training
from pipeline.stages.methods import method

class Settings(Training, frozen=True, kw_only=True):
    '''Nothing of its own.'''

STAGE = method("{name}", __name__, Settings, output="{name}", kind="checkpoint", title="{name}",
               summary="{name}", order={order})
"""
APP = """
import typer
app = typer.Typer()

@app.command()
def other() -> None: ...
"""
OTHER = "does not define what it has to"
NO_IMPORT = "raise AssertionError('imported')\n"


def spoilt(name: str, text: str, point: str, said: str) -> object:
    """An extension that cannot be used: the text of its module, its entry point, and why."""
    return pytest.param(text, point, said, id=name)


SPOILT = (
    spoilt("raises", "raise ValueError('no\\nluck')", "method.a", "ValueError: no"),
    spoilt("exits", "raise SystemExit(3)", "data_format.a", "SystemExit: 3"),
    spoilt("needs what is missing", "import no_such_library", "export_format.a", "ModuleNotFound"),
    spoilt("is no Python", "def", "tracker.a", "SyntaxError"),
    spoilt("defines nothing", "", "method.a", "defines no STAGE"),
    spoilt("an unknown kind", NO_IMPORT, "mehtod.a", "the kind must be one of method, stage"),
    spoilt("no kind", NO_IMPORT, "a", "the kind must be one of method, stage"),
    spoilt("a taken method", NO_IMPORT, "method.lora", "the program has this name"),
    spoilt("a taken format", NO_IMPORT, "data_format.text", "the program has this name"),
    spoilt("a taken stage", NO_IMPORT, "stage.pretrain", "the program has this name"),
    spoilt("a taken command", NO_IMPORT, "command.train", "the program has this name"),
    spoilt("a number for a method", "STAGE = 3", "method.a", OTHER),
    spoilt("a number for a stage", "STAGE = 3", "stage.a", OTHER),
    spoilt("a number for a format", "FORMAT = 3", "data_format.a", OTHER),
    spoilt(
        "an order that is no number",
        "from types import SimpleNamespace\nFORMAT = SimpleNamespace(order='first')",
        "data_format.a",
        OTHER,
    ),
    spoilt("a number for a command", "app = 3", "command.a", OTHER),
    spoilt("another name", METHOD.format(name="b", order=1), "method.a", "b"),
    spoilt("a taken name inside", METHOD.format(name="lora", order=1), "method.a", "lora"),
    spoilt("a command of another name", APP, "command.a", "its app has no command a"),
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "installed"


def python(code: str, *folders: Path, cwd: Path, **more: str) -> str:
    """What Python prints where the extensions in `folders` are installed."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, **environment(*folders), **more},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


# Finding


def test_the_names_are_known_in_their_order_before_anything_is_imported(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = {"search.zebra": "unimported", "search.ant": "unimported", "export_format.x": "other"}
    load(monkeypatch, install(folder, points, {"unimported.py": NO_IMPORT}))
    searches = Registry[object]("search")
    assert [*searches] == [*SEARCHES, "ant", "zebra"]
    assert "zebra" in searches and "x" not in searches
    assert "unimported" not in sys.modules


def test_what_has_an_order_is_sorted_by_it_among_the_programs_own(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {f"{name}.py": METHOD.format(name=name, order=n) for name, n in (("x", 99), ("y", 0))}
    load(monkeypatch, install(folder, {"method.x": "x", "method.y": "y"}, files))
    methods = Registry[Stage]("method", order=lambda stage: (stage.order, stage.name))
    names = [*methods]
    assert (names[0], names[-1]) == ("y", "x")
    assert [stage.method for stage in methods.usable()] == names


def test_a_module_is_imported_once_and_its_attribute_is_the_entry(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"counted.py": "SEARCH = []\nimport builtins\nbuiltins.count = count() if 0 else 1\n"}
    load(monkeypatch, install(folder, {"search.mine": "counted"}, files))
    registry = Registry[object]("search")
    assert registry["mine"] is registry["mine"] is sys.modules["counted"].SEARCH


def test_an_entry_point_of_another_group_is_another_programs(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = install(folder, {}) / "other-2.0.dist-info/entry_points.txt"
    path.parent.mkdir()
    text = "[console_scripts]\nmethod.a = a:main\n\n[ lora_workbench ]\nsearch.b=b\n\n[x]\nmethod.c = c"
    path.write_text(text, encoding="utf-8")
    load(monkeypatch, folder)
    assert extensions.entry_points() == (("search", "b", "b", "other-2.0"),)


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe[",
        b"[lora_workbench",
        b"method.x\n=\n[]\n",
        b"[lora_workbench]\n# method.x = a comment\n",
    ],
)
def test_a_damaged_entry_points_file_or_a_comment_in_it_adds_nothing(
    content: bytes, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(folder, {})
    (folder / "fake-1.0.dist-info/entry_points.txt").write_bytes(content)
    load(monkeypatch, folder)
    assert extensions.entry_points() == () and extensions.problems() == []


def test_of_two_extensions_with_one_name_the_one_that_is_used_is_not_the_one_that_doctor_names(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (1, 2):
        files = {f"search{number}.py": f"SEARCH = {number}"}
        install(folder, {"search.mine": f"search{number}"}, files, f"fake{number}-1.0")
    load(monkeypatch, folder)
    used = Registry[object]("search")["mine"]
    (problem,) = extensions.problems()
    other = 3 - int(str(used))
    assert problem == f"search.mine of fake{other}-1.0: fake{used}-1.0 has this name."


# What is wrong


@pytest.mark.parametrize(("text", "point", "said"), SPOILT)
def test_each_fault_is_one_line_that_names_the_package(
    text: str, point: str, said: str, folder: Path, tmp_path: Path
) -> None:
    """In a process that has made the registries of the program."""
    install(folder, {point: "spoilt"}, {"spoilt.py": text})
    code = """
import json
import cli.main, pipeline.stages.registry
from pipeline import extensions
print(json.dumps(extensions.problems()))
"""
    problems = json.loads(python(code, folder, cwd=tmp_path))
    (problem,) = (line for line in problems if "of fake-1.0: " in line)
    assert said in problem and "\n" not in problem


@pytest.fixture(scope="module")
def all_spoilt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every faulty extension at once, and one that is fine."""
    folder = tmp_path_factory.mktemp("spoilt")
    for number, parameters in enumerate(SPOILT):
        text, point, _ = parameters.values  # type: ignore[attr-defined]
        point = (
            point
            if point.endswith((".lora", ".text", ".pretrain", ".train"))
            else f"{point}{number}"
        )
        install(folder, {point: f"spoilt{number}"}, {f"spoilt{number}.py": text}, f"bad{number}-1")
    fine = METHOD.format(name="fine", order=50)
    return install(folder, {"method.fine": "fine_method"}, {"fine_method.py": fine}, "fine-1")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "shown"),
    [
        pytest.param(("--help",), "Fine-tune a base on your data, in one command.", id="help"),
        pytest.param(("finetune", "--help"), "fine", id="finetune"),
        pytest.param(("params", "show"), "finetune_lora", id="params"),
        pytest.param(("runs",), "", id="runs"),
        pytest.param(("data", "check", "data/finetune.de.txt"), "rows", id="data"),
    ],
)
def test_no_fault_of_an_extension_breaks_a_command(
    command: tuple[str, ...], shown: str, all_spoilt: Path, tmp_path: Path
) -> None:
    root = new_project(tmp_path / "project")
    without = lora(*command, cwd=root)
    done = lora(*command, cwd=root, **environment(all_spoilt))
    assert done.returncode == without.returncode == 0, done.stderr
    assert shown in done.stdout
    assert done.stderr == without.stderr
    if "--help" not in command:
        assert done.stdout == without.stdout


@pytest.mark.slow
def test_doctor_has_a_line_for_each_fault(all_spoilt: Path, tmp_path: Path) -> None:
    done = lora("doctor", "--json", cwd=tmp_path, **environment(all_spoilt))
    assert done.returncode == 0, done.stderr
    named = [
        line.partition(" of ")[2].partition(":")[0]
        for line in json.loads(done.stdout)["extensions"]
    ]
    assert sorted(named) == sorted(f"bad{number}-1" for number in range(len(SPOILT)))
    done = lora("doctor", cwd=tmp_path, **environment(all_spoilt))
    assert "Extensions that add nothing:" in done.stdout
    assert done.stdout.count("-1: ") == len(SPOILT)


def test_a_command_has_the_name_and_the_help_that_typer_gives_it(
    folder: Path, tmp_path: Path
) -> None:
    """Of a function with an underscore, and of a group that names itself."""
    text = """
import typer
app, below = typer.Typer(), typer.Typer(name="a-group", help="A group of two.")
app.add_typer(below)

@app.command(help="A tool.")
def a_tool() -> None: ...

below.command("one")(a_tool)
below.command("two")(a_tool)
"""
    install(folder, {"command.a-tool": "a", "command.a-group": "a"}, {"a.py": text})
    said = lora("--help", cwd=tmp_path, **environment(folder)).stdout
    assert re.search(r"a-tool +A tool\.\n", said) and re.search(
        r"a-group +A group of two\.\n", said
    )
    for command in (["a-tool"], ["a-group", "two"]):
        done = lora(*command, cwd=tmp_path, **environment(folder))
        assert (done.returncode, done.stderr) == (0, "")


def test_what_cannot_be_imported_is_refused_by_its_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(monkeypatch, install(folder, {"search.mine": "spoilt"}, {"spoilt.py": "1 / 0"}))
    registry = Registry[object]("search")
    with pytest.raises(ExtensionError, match=r"search\.mine of fake-1\.0: .* ZeroDivisionError"):
        registry["mine"]
    assert len([*registry.usable()]) == len([*registry]) - 1
    with pytest.raises(KeyError):
        registry["another"]


@pytest.mark.slow
def test_a_section_of_an_extension_that_is_gone_is_an_unknown_key(tmp_path: Path) -> None:
    root = new_project(tmp_path / "project")
    with (root / "params.yaml").open("a", encoding="utf-8") as file:
        file.write("\nprobe_norm: {}\n")
    done = lora("params", "show", cwd=root)
    assert done.returncode == 1 and "unknown key probe_norm" in done.stderr


# What is not loaded

TRAP = "from pathlib import Path\nPath(__file__).with_name('sprung').touch()\n"
TRAPS: Mapping[str, str] = {f"{kind}.trap": "trap" for kind in extensions.KINDS}


@pytest.mark.slow
@pytest.mark.parametrize("how", [["lora"], ["-m", "cli.main"]], ids=" ".join)
def test_nothing_in_the_current_folder_is_an_extension(how: list[str], tmp_path: Path) -> None:
    """A project's files are data, also of a project that somebody else has made."""
    root = install(new_project(tmp_path / "project"), TRAPS, {"trap.py": TRAP})
    start = (
        [str(Path(sys.executable).with_name("lora"))] if how == ["lora"] else [sys.executable, *how]
    )
    variables = {**os.environ, OFF: "", "PYTHONPATH": ""}
    for command in (["--help"], ["params", "show"], ["data", "check", "data/finetune.de.txt"]):
        done = subprocess.run(
            [*start, *command], cwd=root, env=variables, capture_output=True, text=True, check=True
        )
        assert "trap" not in done.stdout + done.stderr
    assert not (root / "sprung").exists()


def test_a_variable_switches_extensions_off(folder: Path, tmp_path: Path) -> None:
    install(folder, {"search.mine": "mine"}, {"mine.py": "SEARCH = 1"})
    code = "from pipeline.extensions import entry_points; print(len(entry_points()))"
    here = "lora_workbench_document"  # may be installed beside the program
    counted = code.replace(
        "entry_points())", f"[p for p in entry_points() if '{here}' not in p[3]])"
    )
    assert python(counted, folder, cwd=tmp_path) == "1\n"
    assert python(code, folder, cwd=tmp_path, **{OFF: "1"}) == "0\n"
