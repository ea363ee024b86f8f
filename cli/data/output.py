"""What `lora data` prints: a check's report, what was written or dropped, examples as tokens."""

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.text import Text

from cli.console import print_line, print_note, print_table, stdout

if TYPE_CHECKING:
    from pipeline.data.check import DataReport
    from pipeline.data.convert import Conversion
    from pipeline.data.examples import Example
    from pipeline.data.masking import Encoded
    from pipeline.data.quality.clean import Cleaned, Dropped
    from pipeline.data.tokenizers.word import Tokenizer
    from pipeline.files.problems import Group

TRAINED = "bold green"
MAX_WIDTH = 100  # columns; longer lines of tokens are hard to read
RENDERED = 2000  # characters of the example that `check` prints
SHOWN_TEXT = 60  # characters of a row that `clean` dropped
SYMBOLS = {" ": "·", "\n": "↵", "\r": "␍", "\t": "⇥"}


def print_report(report: "DataReport", max_length: int, limit: int) -> None:
    rows = [
        (
            "rows",
            f"{report.rows:,} "
            f"({', '.join(f'{n:,} {name}' for name, n in report.formats.items()) or 'none read'})",
        ),
        (
            "examples",
            f"{report.examples:,}"
            + f", {report.evaluation:,} for evaluation" * bool(report.evaluation),
        ),
    ]
    if report.turns:
        rows.append(
            ("turns", f"{report.turns:,}, {report.turns / report.examples:.1f} per example")
        )
    if report.tokens is not None and report.trained_tokens is not None:
        share = report.trained_tokens / max(1, report.tokens)
        rows += [
            ("tokens", f"{report.tokens:,}"),
            ("trained on", f"{report.trained_tokens:,} ({share:.1%})"),
        ]
    if report.quantiles:
        median, *most, longest = (f"{length:,}" for length in report.quantiles.values())
        shares = ", ".join(map("{} % ≤ {}".format, (90, 95, 99), most))
        rows.append(("length", f"{report.shortest:,} to {longest}, median {median}; {shares}"))
        rows.append(
            (
                "truncated",
                f"{report.truncated:,} at {max_length:,} tokens" if max_length else "none",
            )
        )
        if not max_length:
            fits = report.quantiles["max"] <= (report.suggested_max_length or 0)
            covered = "all examples" if fits else "99 % of the examples"
            rows.append(("max_length", f"{report.suggested_max_length:,} suggested: {covered} fit"))
    if report.templated:
        rows.append(
            (
                "template",
                f"{report.templated:,} plain prompts become a user's turn, their completions the "
                "answer",
            )
        )
    print_table(("", ""), rows)
    if report.rendered:
        more = "…" * (len(report.rendered) > RENDERED)
        print_line(
            "\nthe first example, as the model reads it; ⟦ ⟧ is trained "
            f"on:\n{report.rendered[:RENDERED]}{more}"
        )
    shown: list[Group] = []
    for level in ("error", "warning"):
        of_level = (group for group in report.groups if group.level == level)
        shown += islice(of_level, limit)
    if shown:
        several = len(report.files) > 1
        stdout.print()
        print_table(
            ("", "row", "problem"),
            [(group.level, _place(group, several), group.problem) for group in shown],
        )
    total = report.errors + report.warnings
    if len(shown) < len(report.groups):
        print_line(f"… {', '.join(f'{kind}: {count:,}' for kind, count in report.counts.items())}")
    errors = f"{report.errors:,} error{'s' * (report.errors != 1)}"
    warnings = f"{report.warnings:,} warning{'s' * (report.warnings != 1)}"
    print_line(f"{errors}, {warnings}" if total else "no problems", style="bold")
    if report.tokens is None:
        print_note("There is no model, so tokens were not counted. Name a model with --base.")


def _place(problems: "Group", several_files: bool) -> str:
    """Where a group's rows are: its only row, or how many there are and the first."""
    file = f"{problems.file}:" if several_files and problems.row else ""
    if problems.rows == 1:
        return f"{file}{problems.row or problems.file}"
    return f"{problems.rows:,} rows; first: {file}{problems.row}"


def print_written(out: Path, done: "Conversion") -> None:
    for note in done.notes:
        print_note(note)
    for rows in done.skipped:
        print_note(f"skipped: {rows}")
    print_line(f"{out}: {done.rows:,} {'row' if done.rows == 1 else 'rows'} ({done.format})")


def print_cleaned(out: Path, done: "Cleaned") -> None:
    print_table(
        ("dropped", "rows", "such as"),
        [
            (reason, f"{rows:,}", _shown(done.examples.get(reason, [])))
            for reason, rows in done.dropped.items()
        ],
        right=("rows",),
    )
    if done.personal:
        stdout.print()
        rows = []
        for kind, count in done.personal.items():
            first = map("row {}".format, done.personal_rows[kind])
            rows.append((kind, f"{count:,}", ", ".join(first)))
        print_table(("likely personal data, kept", "rows", "such as"), rows, right=("rows",))
    print_line(f"{done.kept:,} of {done.rows:,} rows kept", style="bold")
    print_written(out, done.conversion)


def _shown(dropped: "Sequence[Dropped]") -> str:
    lines = (
        f"row {row.row}, {row.why}" + f": {row.text[:SHOWN_TEXT]}" * bool(row.text)
        for row in dropped
    )
    return "\n".join(lines)


def print_labels(example: "Example", encoded: "Encoded") -> None:
    from pipeline.data.examples import IGNORED

    tokens = zip(encoded.ids, _trained(encoded), strict=True)
    labels = [token if is_trained else IGNORED for token, is_trained in tokens]
    print_line(json.dumps({"row": example.line, "ids": encoded.ids, "labels": labels}))


def print_tokens(encoded: "Encoded", tokenizer: "Tokenizer") -> None:
    """An example's tokens, with those in ⟦ ⟧ that are trained on."""
    words = map(tokenizer.word, encoded.ids)
    tokens = zip(words, _trained(encoded), strict=True)
    for line in _lines(tokens, min(stdout.width, MAX_WIDTH)):
        stdout.print(line, soft_wrap=True)
    stdout.print()


def _trained(encoded: "Encoded") -> tuple[bool, ...]:
    """Which tokens are trained on. The first never is, as no token predicts it."""
    return (False, *encoded.trained[1:])


def _lines(tokens: Iterable[tuple[str, bool]], width: int) -> Iterator[Text]:
    """The tokens in lines, ⟦ before and ⟧ after a run of trained ones, │ between others.

    Line breaks in the text are kept.
    """
    line = Text()
    for is_trained, run in groupby(tokens, key=lambda token: token[1]):
        visible = ["".join(map(_visible, word)) for word, _ in run]
        if is_trained:
            visible[0] = f"⟦{visible[0]}"
        ends = ["│"] * (len(visible) - 1) + ["⟧" if is_trained else ""]
        for text in map("".join, zip(visible, ends, strict=True)):
            if line and line.cell_len + cell_len(text) > width:
                yield line
                line = Text()
            line.append(text, TRAINED if is_trained else "")
            if "↵" in text:
                yield line
                line = Text()
    if line:
        yield line


def _visible(character: str) -> str:
    """A sign for white space, a code for what cannot be printed."""
    shown = character if character.isprintable() else f"\\x{ord(character):02x}"
    return SYMBOLS.get(character, shown)
