"""`python -m docs.tour [PAGE …]`: the outputs in docs/tutorials, renewed by running the commands of
each page in order.

A test runs them too, and compares what they print with what the pages show. In a page, a block of
```console has commands, each in a line that begins with $, and what they print; a line with … alone
stands for lines left out. A block with a title is a file that the reader writes. A command that
ends in `# not tested: REASON` is not run.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

TUTORIALS = Path(__file__).with_name("tutorials")
# Where the commands of a page are typed: after those of another page, or in an empty folder.
AFTER: Mapping[str, str] = {
    "first-adapter": "",
    "ollama": "first-adapter",
    "correct-a-fact": "",
    "preferences": "",
}
BLOCK = re.compile(
    r"^```(?:console|\w+ title=\"(?P<file>[\w./-]+)\")\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
LEFT_OUT = "…"


class Typed(NamedTuple):
    """A command as it is typed, and what it prints."""

    command: str
    output: str


class Written(NamedTuple):
    """A file that the reader writes."""

    name: str
    text: str


def steps(page: str) -> Iterator[Typed | Written]:
    """All that the page asks for, in order."""
    for block in BLOCK.finditer(page):
        if block["file"]:
            yield Written(block["file"], block["text"])
            continue
        for part in re.split(r"^\$ ", block["text"], flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            yield Typed(command, output)


def typed(page: str) -> Iterator[Typed]:
    """Every command of the page, in order."""
    return (step for step in steps(page) if isinstance(step, Typed))


def untested(command: str) -> str:
    """Why a command is not run; empty for one that is."""
    return command.partition("# not tested: ")[2]


def run(
    command: str, folder: Path, given: str = "", environment: Mapping[str, str] | None = None
) -> str:
    """What a command prints in a terminal of 80 columns, notes and progress left out. Raises
    CalledProcessError.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    terminal = {
        "COLUMNS": "80",
        "TERMINAL_WIDTH": "80",
        "NO_COLOR": "1",
        "_TYPER_FORCE_DISABLE_TERMINAL": "1",
    }
    done = subprocess.run(
        ["bash", "-euc", command],
        cwd=folder,
        env={**os.environ, **terminal, **(environment or {}), "PATH": path},
        check=True,
        stdout=subprocess.PIPE,
        input=given,
        text=True,
    )
    return "".join(f"{line.rstrip()}\n" for line in done.stdout.splitlines())


class Shell:
    """Types the steps of a page, beginning in `folder`."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.folder, self.environment = folder, environment

    def write(self, step: Written) -> None:
        (self.folder / step.name).write_text(step.text, encoding="utf-8")

    def type(self, step: Typed) -> str:
        """What the command prints. Raises CalledProcessError if it fails, unless the page shows
        that it does.
        """
        if step.command.startswith("cd "):
            self.folder = (self.folder / step.command.removeprefix("cd ")).resolve(strict=True)
            return ""
        if step.command.partition(" ")[0] == "lora-tui":
            return self._look(step.command)
        said = [line for line in step.output.splitlines() if line.startswith("> ")]
        if not step.command.startswith("lora chat") or not said:
            return run(step.command, self.folder, environment=self.environment)
        given = "".join(f"{line.removeprefix('> ')}\n" for line in said)
        answers = run(step.command, self.folder, given, self.environment).splitlines()
        return "".join(f"{asked}\n{answer}\n" for asked, answer in zip(said, answers, strict=True))

    def _look(self, command: str) -> str:
        """The terminal UI is opened, and closed when it has drawn itself; the page shows no
        output.
        """
        from docs.terminal import Terminal

        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        with Terminal(
            command, self.folder, (120, 40), {**self.environment, "PATH": path}
        ) as terminal:
            terminal.see(lambda text: "Pipeline" in text and "quit" in text)
            terminal.press("q")
            if code := terminal.wait():
                raise subprocess.CalledProcessError(code, command, terminal.text())
        return ""


def shortened(shown: str, printed: str, same: Callable[[str, str], bool]) -> str | None:
    """The lines of `printed` that are `same` as those shown, with … for the others; None if one is
    missing.

    Nothing may be missing between lines that stand together, and at the ends only where … stands.
    """
    lines, at, kept = printed.splitlines(), 0, list[str]()
    groups = _groups(shown.splitlines())
    for number, group in enumerate(groups):
        ends = len(lines) - len(group)
        first = at if number == 0 else ends if number == len(groups) - 1 and group else at
        last = at if number == 0 else ends
        if len(groups) == 1 and first != ends:
            return None
        here = (
            n for n in range(first, last + 1) if all(map(same, lines[n : n + len(group)], group))
        )
        found = next(here, None)
        if found is None:
            return None
        kept += [LEFT_OUT] * (number > 0) + lines[found : found + len(group)]
        at = found + len(group)
    return "".join(f"{line}\n" for line in kept)


def _groups(lines: Sequence[str]) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    for line in lines:
        if line == LEFT_OUT:
            groups.append([])
        else:
            groups[-1].append(line)
    return groups


def _same_words(one: str, other: str) -> bool:
    """Alike but for numbers, times and bars."""
    aside = r"[-+]?\d[\d.,e-]*(?: (?:ms|s|min|h)\b)?|[█▏▎▍▌▋▊▉]+|\s+"
    ours, theirs = (re.sub(aside, "", line) for line in (one, other))
    return ours == theirs


def renewed(page: str, shell: Shell) -> str:
    """The page with what its commands print now, shortened where it is. Raises SystemExit for lines
    that are gone.
    """

    def output(step: Typed) -> str:
        if untested(step.command):
            return step.output
        printed = shell.type(step)
        if LEFT_OUT not in step.output.splitlines():
            return printed
        short = shortened(step.output, printed, _same_words)
        if short is None:
            raise SystemExit(
                f"$ {step.command}\n{printed}\nhas lines that the page shows no more. Edit the "
                "page."
            )
        return short

    def block(match: re.Match[str]) -> str:
        todo = list(steps(match[0]))
        if match["file"]:
            shell.write(Written(match["file"], match["text"]))
            return match[0]
        parts = [f"$ {step.command}\n{output(step)}" for step in todo if isinstance(step, Typed)]
        return f"```console\n{''.join(parts)}```"

    return BLOCK.sub(block, page)


def fresh(folder: Path) -> dict[str, str]:
    """What a page's commands see: a cache of their own in `folder`, and wheels that were fetched
    before.
    """
    return {
        "LORA_CACHE": str(folder / "cache"),
        "PIP_FIND_LINKS": str(Path.home() / ".cache/lora-workbench"),
    }


def main(names: Sequence[str]) -> None:
    """Renew these pages, and those after which they begin; all tutorials if none is named.

    A path is a page of an extension: FOLDER/docs/x.md, whose commands are typed in FOLDER.
    """
    ended: dict[str, Shell] = {}
    todo = [each for name in names or AFTER for each in (AFTER.get(name), name) if each]
    with tempfile.TemporaryDirectory() as top:
        for name in dict.fromkeys(todo):
            page = TUTORIALS / f"{name}.md" if name in AFTER else Path(name).resolve()
            start = Path(top) / name if name in AFTER else page.parents[1]
            start.mkdir(exist_ok=True)
            shell = Shell(start, fresh(Path(top)) if name in AFTER else {})
            shell = ended.get(AFTER.get(name, ""), shell)
            page.write_text(renewed(page.read_text(encoding="utf-8"), shell), encoding="utf-8")
            ended[name] = shell


if __name__ == "__main__":
    main(sys.argv[1:])
