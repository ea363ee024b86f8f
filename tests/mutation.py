"""How many small errors in the code do the tests notice? `python -m tests.mutation --package losses
--sample 100`.

A mutant is a file with one change that an operator of mutmut makes: another number, `<=` for `<`,
None for an argument. It is killed if a test fails with it. Of mutmut only the operators are used:
it would keep all mutants of a file in one module and call them through wrappers, which hides
signatures and sources from code that reads them, as ours does. Here each mutant has a process of
its own, forked from one that has loaded torch and transformers (a third of a second of CPU time,
not seven). It imports the mutated module in place of the real one, and runs the tests that cover
the changed lines, the quickest first, until one fails. pyproject.toml has the packages, their files
and tests, in [tool.mutants].

Not mutated, as in mutmut: annotations, decorators, docstrings, statements outside functions, `len`
and `isinstance`. Nor are `raise` statements, whose texts tests should not repeat, nor `strict=`,
which checks code and not its input.
"""

import argparse
import contextlib
import gc
import hashlib
import importlib
import importlib.machinery
import importlib.util
import json
import math
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from difflib import unified_diff
from pathlib import Path
from typing import Any, NamedTuple

import coverage
import libcst
import pytest
from libcst.metadata import MetadataWrapper, PositionProvider
from mutmut.mutation.mutators import mutation_operators

ROOT = Path(__file__).parents[1]
OURS = (
    "lora_workbench",
    "pipeline",
    "cli",
    "tui",
    "tests",
    "docs",
    "bench",
)  # imported anew in each process
ALIVE = ("survived", "uncovered")
MEMORY = 12 << 30  # bytes; an allocation above it fails, and with it the test


@dataclass(frozen=True)
class Package:
    """Files that are mutated together, and the tests that have to notice."""

    name: str
    files: list[str]
    tests: list[str]

    def digests(self) -> dict[str, str]:
        """Of each test file with the mutated files: what decides which of its tests runs which
        line.
        """
        sources = b"\0".join((ROOT / each).read_bytes() for each in self.files)
        paths = [
            path
            for each in self.tests
            for path in (sorted((ROOT / each).rglob("test_*.py")) or [ROOT / each])
        ]
        return {
            str(path.relative_to(ROOT)): hashlib.sha256(
                path.read_bytes() + b"\0" + sources
            ).hexdigest()
            for path in paths
        }


@dataclass(frozen=True)
class Mutant:
    file: str
    function: str
    line: int
    change: str  # the lines that differ, as in a diff
    source: str = field(repr=False)  # the whole mutated file
    lines: range = field(repr=False)  # a test that runs none of these cannot notice it


@dataclass
class Result:
    file: str
    function: str
    line: int
    change: str
    status: str  # killed, timeout, survived, uncovered
    test: str = ""  # that failed
    tests: int = 0  # that were chosen
    seconds: float = 0.0


@dataclass(frozen=True)
class Coverage:
    """What the unmutated code told: which tests pass, their seconds, and the lines that each
    runs.
    """

    digests: dict[str, str]  # of test files
    seconds: dict[str, float]
    modules: list[str]  # of other libraries, loaded once for all mutants
    lines: dict[str, dict[str, list[str]]]  # file → line → tests

    def of(self, files: set[str]) -> "Coverage":
        """That of some test files alone."""

        def wanted(test: str) -> bool:
            return test.split("::")[0] in files

        lines = {
            file: {line: [*filter(wanted, tests)] for line, tests in by_line.items()}
            for file, by_line in self.lines.items()
        }
        seconds = {test: seconds for test, seconds in self.seconds.items() if wanted(test)}
        return Coverage({file: self.digests[file] for file in files}, seconds, self.modules, lines)

    def plus(self, other: "Coverage") -> "Coverage":
        """Both, of different test files."""
        lines = {
            file: {
                line: self.lines.get(file, {}).get(line, [])
                + other.lines.get(file, {}).get(line, [])
                for line in self.lines.get(file, {}).keys() | other.lines.get(file, {})
            }
            for file in self.lines.keys() | other.lines
        }
        modules = sorted({*self.modules, *other.modules})
        return Coverage(self.digests | other.digests, self.seconds | other.seconds, modules, lines)

    def tests(self, mutant: Mutant, limit: float) -> list[str]:
        """The tests that run the mutant's lines, the quickest first: at least one, as many as take
        `limit` seconds.
        """
        covered = self.lines.get(mutant.file, {})
        names = {
            test
            for line in mutant.lines
            for test in covered.get(str(line), ())
            if test in self.seconds
        }
        chosen: list[str] = []
        total = 0.0
        for test in sorted(names, key=lambda each: (self.seconds[each], each)):
            total += self.seconds[test]
            if chosen and total > limit:
                break
            chosen.append(test)
        return chosen


class _Mutants(libcst.CSTVisitor):
    """Every node that an operator changes, what it becomes, its function, its line, and the lines
    that show it ran.
    """

    METADATA_DEPENDENCIES = (PositionProvider,)

    def __init__(self) -> None:
        super().__init__()
        self.changes: list[tuple[libcst.CSTNode, libcst.CSTNode, str, int, range]] = []
        self._names: list[str] = []
        self._functions: list[range] = []
        self._statements: list[range] = []

    def on_visit(self, node: libcst.CSTNode) -> bool:
        if isinstance(node, (libcst.Annotation, libcst.Decorator, libcst.Raise)) or _is_docstring(
            node
        ):
            return False
        if isinstance(node, libcst.Arg) and node.keyword and node.keyword.value == "strict":
            return False
        called = (
            node.func.value
            if isinstance(node, libcst.Call) and isinstance(node.func, libcst.Name)
            else None
        )
        if called in ("len", "isinstance"):
            return False
        if isinstance(node, (libcst.FunctionDef, libcst.ClassDef)):
            self._names.append(node.name.value)
        if isinstance(node, libcst.FunctionDef):
            self._functions.append(self._lines(node.body))
        if isinstance(node, libcst.SimpleStatementLine):
            self._statements.append(self._lines(node))
        # a default is computed once, when no test runs: what shows it is the body
        if isinstance(node, libcst.Param):
            self._statements.append(self._functions[-1] if self._functions else range(0))
        if self._functions:
            self._apply(node)
        return True

    def on_leave(self, original_node: libcst.CSTNode) -> None:
        if isinstance(original_node, (libcst.FunctionDef, libcst.ClassDef)):
            self._names.pop()
        if isinstance(original_node, libcst.FunctionDef):
            self._functions.pop()
        if isinstance(original_node, (libcst.SimpleStatementLine, libcst.Param)):
            self._statements.pop()

    def _apply(self, node: libcst.CSTNode) -> None:
        for kind, operator in mutation_operators:
            if isinstance(node, kind):
                for mutated in operator(node):
                    if not _keeps_strict(node, mutated):
                        continue
                    lines = self._lines(node)
                    shown = self._statements[-1] if self._statements else lines
                    self.changes.append((node, mutated, ".".join(self._names), lines.start, shown))

    def _lines(self, node: libcst.CSTNode) -> range:
        position = self.get_metadata(PositionProvider, node, None)
        return range(position.start.line, position.end.line + 1) if position else range(0)


def _keeps_strict(node: libcst.CSTNode, mutated: libcst.CSTNode) -> bool:
    """Whether a call's `strict=`, if it has one, is left as it is."""
    strict = {
        id(arg)
        for arg in getattr(node, "args", ())
        if arg.keyword and arg.keyword.value == "strict"
    }
    return strict <= {id(arg) for arg in getattr(mutated, "args", ())} or not isinstance(
        node, libcst.Call
    )


def _is_docstring(node: libcst.CSTNode) -> bool:
    return isinstance(node, libcst.Expr) and isinstance(
        node.value, (libcst.SimpleString, libcst.ConcatenatedString)
    )


class Maker(NamedTuple):
    """A mutant that is made when it is wanted: a whole file for one change takes long."""

    file: str
    module: libcst.Module
    node: libcst.CSTNode
    mutated: libcst.CSTNode
    function: str
    line: int
    lines: range

    def make(self) -> Mutant | None:
        """None if the result is no Python."""
        tree = self.module.deep_replace(self.node, self.mutated)
        assert isinstance(tree, libcst.Module)
        try:
            compile(tree.code, self.file, "exec")
        except SyntaxError:
            return None
        difference = unified_diff(
            self.module.code.splitlines(), tree.code.splitlines(), n=0, lineterm=""
        )
        change = "\n".join(
            f"{each[0]} {each[1:]}" for each in list(difference)[3:] if each[0] in "-+"
        )
        return Mutant(self.file, self.function, self.line, change, tree.code, self.lines)


def mutants(file: str) -> list[Maker]:
    """All mutants of a file, in its order."""
    wrapper = MetadataWrapper(libcst.parse_module((ROOT / file).read_text("utf-8")))
    visitor = _Mutants()
    wrapper.visit(visitor)
    return [Maker(file, wrapper.module, *change) for change in visitor.changes]


class _Loader(importlib.machinery.SourceFileLoader):
    """Imports a module from other source than its file's, and leaves no compiled file behind."""

    def __init__(self, name: str, path: str, source: str) -> None:
        super().__init__(name, path)
        self._source = source

    def get_code(self, fullname: str) -> Any:
        return compile(self._source, self.get_filename(fullname), "exec")


class _Finder:
    """Finds the mutated module before the real one is found."""

    def __init__(self, mutant: Mutant) -> None:
        self._path = ROOT / mutant.file
        parts = Path(mutant.file).with_suffix("").parts
        self._name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        self._source = mutant.source

    def find_spec(self, name: str, *_: object) -> importlib.machinery.ModuleSpec | None:
        if name != self._name:
            return None
        loader = _Loader(name, str(self._path), self._source)
        folder = [str(self._path.parent)] if self._path.name == "__init__.py" else None
        return importlib.util.spec_from_file_location(
            name, self._path, loader=loader, submodule_search_locations=folder
        )


class _Measure:
    """A pytest plugin: the lines that each test runs, its seconds with its fixtures', and whether
    it passes.
    """

    def __init__(self, files: list[str]) -> None:
        self._coverage = coverage.Coverage(
            data_file=None, include=[str(ROOT / each) for each in files]
        )
        self._files = files
        self._fixtures: dict[str, float] = {}
        self._own: dict[str, float] = {}
        self._names: dict[str, list[str]] = {}
        self._bad: set[str] = set()

    def pytest_sessionstart(self) -> None:
        self._coverage.start()

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Iterator[None]:
        start = time.perf_counter()
        result = yield
        seconds = time.perf_counter() - start
        self._fixtures[fixturedef.argname] = max(
            seconds, self._fixtures.get(fixturedef.argname, 0.0)
        )
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self._coverage.switch_context(item.nodeid)
        self._names[item.nodeid] = list(getattr(item, "fixturenames", ()))
        return (yield)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            self._own[report.nodeid] = report.duration
        if not report.passed:
            self._bad.add(report.nodeid)

    def result(self, digests: dict[str, str]) -> Coverage:
        self._coverage.stop()
        data, lines = self._coverage.get_data(), {}
        for file in self._files:
            contexts = data.contexts_by_lineno(str(ROOT / file))
            lines[file] = {
                str(line): sorted(filter(None, names)) for line, names in contexts.items()
            }
        seconds = {
            test: own + sum(self._fixtures.get(name, 0.0) for name in self._names[test])
            for test, own in self._own.items()
            if test not in self._bad
        }
        others = sorted(
            each
            for each, module in sys.modules.items()
            if module and each.split(".")[0] not in OURS
        )
        return Coverage(digests, seconds, others, lines)


class _FirstFailure:
    """A pytest plugin: tells which test failed, through a pipe."""

    def __init__(self, pipe: int) -> None:
        self._pipe = pipe

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            os.write(self._pipe, report.nodeid.encode()[:2000])


def measure(package: Package, store: Path) -> Coverage:
    """Run the package's tests on the code as it is; read from `store` what has not changed
    since.
    """
    path, digests = store / f"{package.name}.coverage.json", package.digests()
    known = Coverage(**json.loads(path.read_text())) if path.exists() else Coverage({}, {}, [], {})
    known = known.of(
        {file for file, digest in known.digests.items() if digests.get(file) == digest}
    )
    missing = {file: digest for file, digest in digests.items() if file not in known.digests}
    if not missing:
        return known

    def run() -> int:
        plugin = _Measure(package.files)
        code = pytest.main([*_options(), "-m", "not slow or sampled", *missing], plugins=[plugin])
        path.write_text(json.dumps(asdict(known.plus(plugin.result(missing)))))
        return int(code)

    path.unlink(missing_ok=True)
    code, _, _ = _fork(run, 3600.0)
    if not path.exists():
        sys.exit(f"{package.name}: the tests did not run to their end (exit code {code}).")
    return Coverage(**json.loads(path.read_text()))


def judge(mutant: Mutant, tests: Sequence[str], seconds: float) -> Result:
    """Run `tests` on the mutant in a process of its own, until one fails."""
    result = Result(
        mutant.file, mutant.function, mutant.line, mutant.change, "uncovered", tests=len(tests)
    )
    if not tests:
        return result

    def run(pipe: int) -> int:
        sys.meta_path.insert(0, _Finder(mutant))
        return int(pytest.main([*_options(), "-x", *tests], plugins=[_FirstFailure(pipe)]))

    start = time.perf_counter()
    read, write = os.pipe()
    code, status, _ = _fork(lambda: run(write), 20 + 4 * seconds)
    os.close(write)
    os.set_blocking(read, False)  # what a test left running may hold the other end
    with contextlib.suppress(BlockingIOError):
        result.test = os.read(read, 4000).decode(errors="replace")
    os.close(read)
    none_ran = (
        code in (pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.NO_TESTS_COLLECTED)
        and not result.test
    )
    # The mutant may break what is computed while tests are collected; without it they must be
    # there.
    if (
        none_ran
        and _fork(lambda: int(pytest.main([*_options(), "--collect-only", *tests])), 600.0)[0]
    ):
        sys.exit(
            f"pytest ran no test for {mutant.file}:{mutant.line} ({len(tests)} were asked for)."
        )
    result.status = "timeout" if status == "timeout" else "survived" if code == 0 else "killed"
    result.seconds = round(time.perf_counter() - start, 1)
    return result


def _options() -> list[str]:
    return ["-q", "-p", "no:cacheprovider", "-p", "no:randomly", "--hypothesis-profile=mutants"]


def _fork(run: Callable[[], int], seconds: float) -> tuple[int, str, float]:
    """Exit code, "timeout" or "", and seconds of `run` in a child with a temporary folder of its
    own.

    `seconds` are of its CPU; it is stopped as well when it has waited for ten times as long.
    """
    scratch = tempfile.mkdtemp(prefix="mutant-")
    start = time.monotonic()
    child = os.fork()
    if not child:
        _run_in_child(run, seconds, scratch)
    status: int | None = None
    try:
        while status is None and time.monotonic() - start < 60 + 10 * seconds:
            done, code = os.waitpid(child, os.WNOHANG)
            status = code if done else None
            if not done:
                time.sleep(0.02)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # and what it started
    if status is None:
        _, status = os.waitpid(child, 0)
    shutil.rmtree(scratch, ignore_errors=True)
    if os.WIFSIGNALED(status):
        ended_by = os.WTERMSIG(status)
        return -ended_by, "timeout" if ended_by in (signal.SIGXCPU, signal.SIGKILL) else "", 0.0
    return os.WEXITSTATUS(status), "", time.monotonic() - start


def _run_in_child(run: Callable[[], int], seconds: float, scratch: str) -> None:
    code = 70
    try:
        os.setsid()
        used = math.ceil(time.process_time())
        resource.setrlimit(
            resource.RLIMIT_CPU, (used + math.ceil(seconds), used + math.ceil(seconds) + 5)
        )
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        os.environ["TMPDIR"] = tempfile.tempdir = scratch
        output = os.open(
            Path(scratch).parent / "mutants.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        )
        for stream in (1, 2):
            os.dup2(output, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        code = run()
    finally:
        sys.stdout.flush()
        os._exit(code)


def preload(modules: Iterable[str]) -> None:
    """Import other libraries' modules once, so that no child has to."""
    for name in modules:
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    import torch

    torch.set_num_threads(1)  # a child has none of its parent's threads
    gc.collect()
    gc.freeze()  # a child that looked through all this for garbage would copy it


def interval(killed: int, of: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share."""
    z, share = 1.959964, killed / of
    middle, half = (
        share + z * z / (2 * of),
        z * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of)),
    )
    return (middle - half) / (1 + z * z / of), (middle + half) / (1 + z * z / of)


def packages() -> dict[str, Package]:
    """Those of pyproject.toml."""
    tables = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mutants"]
    found = {}
    for name, table in tables.items():
        files = [
            str(path.relative_to(ROOT))
            for each in table["files"]
            for path in sorted(ROOT.glob(each))
        ]
        found[name] = Package(name, files, table["tests"])
    return found


def _draw(makers: list[Maker], sample: int, seed: int) -> list[Mutant]:
    """A sample without replacement, in the order of the files; 0 draws all."""
    order = list(range(len(makers)))
    random.Random(seed).shuffle(order)
    drawn: dict[int, Mutant] = {}
    for n in order:
        if sample and len(drawn) == sample:
            break
        if mutant := makers[n].make():
            drawn[n] = mutant
    return [drawn[n] for n in sorted(drawn)]


def _find(makers: list[Maker], results: list[Result]) -> list[Mutant]:
    """The mutants of an earlier run, wherever their lines are now; without those whose code is
    gone.
    """
    wanted = {(each.file, each.function, each.change) for each in results}
    functions = {(each.file, each.function) for each in results}
    found = {}
    for maker in makers:
        if (maker.file, maker.function) in functions and (mutant := maker.make()):
            found[mutant.file, mutant.function, mutant.change] = mutant
    return [mutant for key, mutant in found.items() if key in wanted]


def main() -> None:
    """Print a line per package; write what became of each mutant to a file."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=main.__doc__)
    parser.add_argument("--package", choices=[*packages(), "all"], default="all")
    parser.add_argument(
        "--sample", type=int, default=100, help="mutants per package; 0: all (hours)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="of tests per mutant; more tests are not run"
    )
    parser.add_argument("--again", type=Path, help="a file of an earlier run: its survivors alone")
    parser.add_argument(
        "--store", type=Path, default=ROOT / ".mutants", help="folder for results and coverage"
    )
    options = parser.parse_args()
    options.store.mkdir(exist_ok=True, parents=True)
    from hypothesis import Phase, settings

    # a failure is enough: no example has to be made small
    phases = (Phase.explicit, Phase.generate)
    settings.register_profile(
        "mutants", deadline=None, max_examples=60, derandomize=True, phases=phases
    )
    for package in packages().values():
        if options.package in (package.name, "all"):
            _run(package, options)


def _run(package: Package, options: argparse.Namespace) -> None:
    known = measure(package, options.store)
    makers = [maker for file in package.files for maker in mutants(file)]
    results: list[Result] = []
    if options.again:
        before = [Result(**each) for each in json.loads(options.again.read_text())["results"]]
        results = [each for each in before if each.status not in ALIVE]
        drawn = _find(makers, [each for each in before if each.status in ALIVE])
    else:
        drawn = _draw(makers, options.sample, options.seed)
    preload(known.modules)
    path = options.store / f"{package.name}.{'again' if options.again else options.seed}.json"
    for n, mutant in enumerate(drawn, 1):
        tests = known.tests(mutant, options.seconds)
        result = judge(mutant, tests, sum(known.seconds[each] for each in tests))
        results.append(result)
        print(
            f"{n}/{len(drawn)} {result.status} {mutant.file}:{mutant.line} {result.seconds} s",
            file=sys.stderr,
        )
        if result.status in ALIVE:
            print(f"{mutant.function}\n{mutant.change}", file=sys.stderr)
        facts = {"package": package.name, "seed": options.seed, "mutants": len(makers)}
        path.write_text(
            json.dumps({**facts, "results": [asdict(each) for each in results]}, indent=1)
        )
    counts = Counter(each.status for each in results)
    killed = len(results) - sum(counts[each] for each in ALIVE)
    low, high = interval(killed, len(results))
    print(
        f"{package.name}: {killed} of {len(results)} killed ({killed / len(results):.0%}, 95% "
        f"interval {low:.0%} to {high:.0%}), drawn from {len(makers)}; {counts['timeout']} by "
        f"timeout, {counts['uncovered']} run by no test"
    )


if __name__ == "__main__":
    main()
