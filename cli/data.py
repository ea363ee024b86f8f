"""`lora data`: data files checked, shown as tokens, cleaned, and converted."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import chain, groupby, islice
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Literal

from typer import Argument, Option

from cli.options import (
    DEFAULT_PARAMS,
    ColumnsOption,
    JsonOption,
    PlainOption,
    base_folder,
    columns_of,
    finite,
    group,
    project_of,
)

if TYPE_CHECKING:
    from rich.text import Text

    from pipeline.data.check import DataReport
    from pipeline.data.convert import Conversion
    from pipeline.data.examples import Example
    from pipeline.data.masking import Encoded
    from pipeline.data.quality.clean import Cleaned, Dropped, Leaks
    from pipeline.data.tokenizers.word import Tokenizer
    from pipeline.files.problems import Group

app = group()
data = group(help="Check, show, clean and convert data files.", no_args_is_help=True)
app.add_typer(data, name="data")

DEFAULT_BASES = (Path("artifacts/expanded"), Path("artifacts/base"))
TRAINED = "bold green"
MAX_WIDTH = 100  # columns; longer lines of tokens are hard to read
SHOWN, COUNTED = 3, 1000  # examples that `show` prints, and counts
RENDERED = 2000  # characters of the example that `check` prints
SHOWN_TEXT = 60  # characters of a row that `clean` dropped
SYMBOLS = {" ": "·", "\n": "↵", "\r": "␍", "\t": "⇥"}
FILE_HELP = (
    "Data file: .txt, .jsonl, .json, .csv, .tsv, .parquet, .arrow; a saved folder, or a hub id."
)

BaseOption = Annotated[
    Path | None,
    Option(
        "--base",
        callback=base_folder,
        help=(
            "Model with the tokenizer: folder, .gguf file or hub id; default: artifacts/expanded, "
            "or artifacts/base."
        ),
    ),
]
SkipOption = Annotated[
    bool,
    Option(
        "--skip-invalid", help="Leave out rows that cannot be read or written, and report them."
    ),
]
ReplaceOption = Annotated[bool, Option("--force", help="Replace OUT if it exists.")]
MaxLengthOption = Annotated[
    int, Option("--max-length", min=0, help="Truncate examples to this many tokens; 0: never.")
]


@data.command()
def check(
    files: Annotated[list[Path], Argument(metavar="FILE...", help=FILE_HELP)],
    base: BaseOption = None,
    eval_files: Annotated[
        list[Path] | None,
        Option("--eval", metavar="FILE", help="Evaluation file, to compare with; repeatable."),
    ] = None,
    eval_share: Annotated[
        float, Option(min=0, max=1, callback=finite, help="Share that is held out.")
    ] = 0.0,
    columns: ColumnsOption = None,
    no_template: PlainOption = False,
    max_length: MaxLengthOption = 0,
    limit: Annotated[int, Option(min=0, help="Number of errors, and of warnings, to print.")] = 20,
    as_json: JsonOption = False,
) -> None:
    """Check every row: errors, duplicates, lengths, tokens trained on.

    The exit code is 1 if training would be wrong.
    """
    from cli.console import print_json, print_note
    from pipeline.data.check import check as check_files
    from pipeline.data.columns import clean_command
    from pipeline.errors import UserError

    base = base or _default_base()
    tokenizer, positions = _open_base(base) if base else (None, None)
    with _row_counter("checking") as progress:
        report = check_files(
            files,
            tokenizer,
            eval_files=eval_files or (),
            eval_share=eval_share,
            columns=columns_of(columns),
            max_length=max_length,
            positions=positions,
            progress=progress,
            templated=not no_template and _in_template(files),
        )
    if as_json:
        print_json({**report.as_json(), "base": base and str(base)})
    else:
        _print_report(report, max_length, limit)
        if report.counts.keys() & {"empty", "duplicate"}:
            cleaned = clean_command(report.files[0], columns_of(columns))
            print_note(f"`{cleaned}` writes a file without empty rows and duplicates.")
    if not report.ok:
        raise UserError(
            f"training needs data without errors, and this has {report.errors}. Correct the rows "
            "above."
        )


def _in_template(files: list[Path]) -> bool:
    """Whether plain prompts get the base's chat template: as in the project here, whose files they
    may be.
    """
    from pipeline.project.params.sections import Training

    if not DEFAULT_PARAMS.is_file():
        return True
    project = project_of(DEFAULT_PARAMS)
    sections = (project.params.section(stage.section) for stage in project.stages.values())
    trained = [section for section in sections if isinstance(section, Training)]
    paths = {file.resolve() for file in files}
    for section in trained:
        if any(
            (project.root / name).resolve() in paths for name in (*section.files, section.eval_data)
        ):
            return section.templated
    return bool(project.params.training.get("chat_template", "auto") == "auto")


def _print_report(report: "DataReport", max_length: int, limit: int) -> None:
    from cli.console import print_line, print_note, print_table, stdout

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
        shares = ", ".join(
            f"{share} % ≤ {length}" for share, length in zip((90, 95, 99), most, strict=True)
        )
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
    levels = [
        [each for each in report.groups if each.level == level][:limit]
        for level in ("error", "warning")
    ]
    shown = [each for groups in levels for each in groups]
    if shown:
        several = len(report.files) > 1
        stdout.print()
        print_table(
            ("", "row", "problem"),
            [(each.level, _place(each, several), each.problem) for each in shown],
        )
    total = report.errors + report.warnings
    if len(shown) < len(report.groups):
        print_line(f"… {', '.join(f'{kind}: {count:,}' for kind, count in report.counts.items())}")
    errors, warnings = (
        f"{count:,} {name}{'' if count == 1 else 's'}"
        for count, name in ((report.errors, "error"), (report.warnings, "warning"))
    )
    print_line(f"{errors}, {warnings}" if total else "no problems", style="bold")
    if report.tokens is None:
        print_note("There is no model, so tokens were not counted. Name a model with --base.")


def _place(problems: "Group", several_files: bool) -> str:
    """Where a group's rows are: its only row, or how many there are and the first."""
    file = f"{problems.file}:" if several_files and problems.row else ""
    if problems.rows == 1:
        return f"{file}{problems.row or problems.file}"
    return f"{problems.rows:,} rows; first: {file}{problems.row}"


@data.command()
def show(
    file: Annotated[Path, Argument(metavar="FILE", help=FILE_HELP)],
    base: BaseOption = None,
    row: Annotated[int | None, Option(min=1, help="Show only this line or row.")] = None,
    columns: ColumnsOption = None,
    no_template: PlainOption = False,
    max_length: MaxLengthOption = 0,
    limit: Annotated[
        int | None, Option(min=0, help="Number of examples to print; default: 3, with --json all.")
    ] = None,
    as_json: Annotated[
        bool,
        Option(
            "--json",
            help=(
                "Print a JSON line per row: ids, and labels with -100 where nothing is trained on."
            ),
        ),
    ] = False,
) -> None:
    """Show examples as tokens, and which of them are trained on.

    What is trained on is shown in ⟦ ⟧. Statistics are of the first 1,000 rows.
    """
    from tempfile import TemporaryDirectory

    from cli.console import print_line, print_table, stdout
    from pipeline.data.columns import columns_option
    from pipeline.data.masking import Encoder
    from pipeline.data.windows import Corpus
    from pipeline.errors import UserError

    base = base or _default_base()
    if base is None:
        raise UserError(
            f"There is no model in {' or '.join(map(str, DEFAULT_BASES))}, and its tokenizer is "
            "needed. "
            "Name a model with --base, or run `lora import` or `lora pretrain`."
        )
    tokenizer, positions = _open_base(base)
    encode = Encoder(tokenizer, max_length, positions)
    examples = _examples(file, columns_of(columns), row, not no_template and _in_template([file]))
    if as_json:
        for example, encoded in encode.each(islice(examples, limit)):
            _print_labels(example, encoded)
        return
    shown = list(encode.each(islice(examples, SHOWN if limit is None else limit)))
    for example, encoded in shown:
        parts = [example.location, f"{len(encoded.ids):,} tokens", f"{encoded.labels:,} trained on"]
        print_line(
            "  ".join(parts + [f"{encoded.cut:,} truncated"] * bool(encoded.cut)), style="bold"
        )
        for line in _lines(_tokens(encoded, tokenizer), min(stdout.width, MAX_WIDTH)):
            stdout.print(line, soft_wrap=True)
        stdout.print()
    if row:
        return
    with TemporaryDirectory() as folder:
        first = islice(chain((example for example, _ in shown), examples), COUNTED)
        statistics = Corpus.of(encode.each(first), Path(folder)).statistics
    is_all = next(examples, None) is None
    rows = [
        ("examples", f"{statistics.examples:,}"),
        ("tokens", f"{statistics.tokens:,}"),
        ("trained on", f"{statistics.labels:,} ({statistics.share:.1%})"),
        (
            "length",
            f"{statistics.shortest:,} to {statistics.longest:,}, median {statistics.median:,}",
        ),
        (
            "truncated",
            f"{statistics.truncated:,} at {max_length:,} tokens" if max_length else "none",
        ),
        ("skipped", f"{statistics.unlabelled:,} without a label"),
    ]
    print_table(("the file" if is_all else f"the first {COUNTED:,}", ""), rows)
    if not is_all:
        print_line(
            f"`lora data check {quote(str(file))}{columns_option(columns_of(columns))}` reads all."
        )


@data.command()
def convert(
    source: Annotated[Path, Argument(metavar="IN", help=FILE_HELP)],
    out: Annotated[
        Path,
        Argument(
            metavar="OUT",
            help=(
                "File to write: .jsonl, .json, .csv, .tsv, .txt (also .gz, .zst), .parquet, .arrow."
            ),
        ),
    ],
    format_: Annotated[
        Literal["messages", "alpaca", "sharegpt", "prompt_completion", "text"] | None,
        Option("--format", help="Format of its rows; default: that of the input."),
    ] = None,
    columns: ColumnsOption = None,
    skip_invalid: SkipOption = False,
    force: ReplaceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write data in another format or container.

    What the target cannot hold is an error, or left out with --skip-invalid. The new file is read
    again before it gets its name.
    """
    from cli.console import print_json
    from pipeline.data.convert import convert as convert_file

    with _row_counter("converting") as progress:
        done = convert_file(
            *(source, out, format_),
            columns=columns_of(columns),
            force=force,
            skip_invalid=skip_invalid,
            progress=progress,
        )
    if as_json:
        skipped = [asdict(rows) for rows in done.skipped]
        print_json(
            {
                "out": str(out),
                "rows": done.rows,
                "format": done.format,
                "notes": done.notes,
                "skipped": skipped,
            }
        )
        return
    _print_written(out, done)


def _print_written(out: Path, done: "Conversion") -> None:
    from cli.console import print_line, print_note

    for note in done.notes:
        print_note(note)
    for rows in done.skipped:
        print_note(f"skipped: {rows}")
    print_line(f"{out}: {done.rows:,} {'row' if done.rows == 1 else 'rows'} ({done.format})")


@data.command()
def clean(
    source: Annotated[Path, Argument(metavar="IN", help=FILE_HELP)],
    out: Annotated[Path, Argument(metavar="OUT", help="File to write, as of `lora data convert`.")],
    drop: Annotated[
        str,
        Option(
            "--drop",
            metavar="REASON,…",
            help="empty, duplicates, near-duplicates, too-long, leaks, personal.",
        ),
    ] = "empty,duplicates",
    eval_files: Annotated[
        list[Path] | None,
        Option("--eval", metavar="FILE", help="Evaluation file, for leaks; repeatable."),
    ] = None,
    tasks: Annotated[
        list[Path] | None,
        Option("--tasks", metavar="FILE", help="File of tasks, for leaks; repeatable."),
    ] = None,
    base: BaseOption = None,
    max_length: Annotated[
        int,
        Option(
            "--max-length",
            min=0,
            help="Most tokens of an example, for too-long; 0: the model's positions.",
        ),
    ] = 0,
    columns: ColumnsOption = None,
    no_template: PlainOption = False,
    skip_invalid: SkipOption = False,
    force: ReplaceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write a file without rows that spoil a training, and report them.

    Of rows that are alike the first stays. The new file has the keys of its format, so it needs no
    --columns. Rows with likely personal data are counted and stay, but for --drop personal.
    """
    from cli.console import print_json
    from pipeline.data.masking import Encoder
    from pipeline.data.quality.clean import REASONS
    from pipeline.data.quality.clean import clean as clean_file
    from pipeline.errors import UserError

    reasons = [reason.strip() for reason in drop.split(",")]
    if unknown := [reason for reason in reasons if reason not in REASONS]:
        raise UserError(f"--drop: unknown reason {unknown[0]!r}. Known: {', '.join(REASONS)}.")
    named = columns_of(columns)
    leaks = _leaks(eval_files or [], tasks or [], named)
    if ("leaks" in reasons) != bool(leaks):
        raise UserError(
            "--drop leaks goes with --eval or --tasks, the files whose questions must not be "
            "trained on."
        )
    encoder = None
    if "too-long" in reasons:
        base = base or _default_base()
        if base is None:
            raise UserError(
                "--drop too-long counts tokens, and there is no model. Name one with --base."
            )
        tokenizer, positions = _open_base(base)
        encoder, max_length = Encoder(tokenizer), max_length or positions or 0
        if not max_length:
            raise UserError(
                "--drop too-long needs --max-length: the model does not say how many positions it "
                "has."
            )
    with _row_counter("cleaning") as progress:
        done = clean_file(
            *(source, out, reasons),
            columns=named,
            leaks=leaks,
            encoder=encoder,
            max_length=max_length,
            templated=not no_template and _in_template([source]),
            force=force,
            skip_invalid=skip_invalid,
            progress=progress,
        )
    if as_json:
        print_json({"out": str(out), **done.as_json()})
    else:
        _print_cleaned(out, done)


def _leaks(eval_files: list[Path], tasks: list[Path], columns: dict[str, str]) -> "Leaks":
    """The questions of evaluation files and tasks."""
    from pipeline.data.quality.clean import Leaks
    from pipeline.evaluation.tasks import task_prompts

    leaks = Leaks()
    for file in eval_files:
        leaks.add_file(file, str(file), columns)
    for file in tasks:
        for prompt, location in task_prompts(file, str(file)):
            leaks.add(prompt, location)
    return leaks


def _print_cleaned(out: Path, done: "Cleaned") -> None:
    from cli.console import print_line, print_table, stdout

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
        rows = [
            (kind, f"{count:,}", ", ".join(f"row {row}" for row in done.personal_rows[kind]))
            for kind, count in done.personal.items()
        ]
        print_table(("likely personal data, kept", "rows", "such as"), rows, right=("rows",))
    print_line(f"{done.kept:,} of {done.rows:,} rows kept", style="bold")
    _print_written(out, done.conversion)


def _shown(dropped: "Sequence[Dropped]") -> str:
    lines = (
        f"row {row.row}, {row.why}" + f": {row.text[:SHOWN_TEXT]}" * bool(row.text)
        for row in dropped
    )
    return "\n".join(lines)


def _default_base() -> Path | None:
    """The model whose tokenizer is used without --base."""
    return next((folder for folder in DEFAULT_BASES if folder.is_dir()), None)


def _open_base(base: Path) -> tuple["Tokenizer", int | None]:
    """Its tokenizer and its number of positions."""
    from pipeline.data.tokenizers.word import load_tokenizer
    from pipeline.files.base_model import max_positions

    return load_tokenizer(base), max_positions(base)


@contextmanager
def _row_counter(text: str) -> Iterator[Callable[[int], None]]:
    """Rows read so far, on a terminal."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from cli.console import stderr

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,} rows"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as bar:
        task = bar.add_task(text, total=None)  # how many rows there are is known when all are read
        yield lambda rows: bar.update(task, completed=rows)


def _examples(
    file: Path, columns: dict[str, str], row: int | None, templated: bool
) -> Iterator["Example"]:
    """All examples, or that of one row. Raises UserError."""
    from pipeline.data.containers import Reading
    from pipeline.data.formats import iter_examples
    from pipeline.errors import UserError

    def of_row(number: int, error: UserError) -> None:
        if row in (None, number):
            raise error

    examples = iter_examples(
        file, str(file), columns=columns, reading=Reading(of_row), templated=templated
    )
    if row is None:
        return examples
    example = next((each for each in examples if each.line >= row), None)
    if example is None or example.line != row:
        raise UserError(f"{file} has no example in row {row}. Name another --row.")
    return iter([example])


def _print_labels(example: "Example", encoded: "Encoded") -> None:
    import json

    from cli.console import print_line
    from pipeline.data.examples import IGNORED

    # The first token is no label: no token predicts it.
    trained = (False, *encoded.trained[1:])
    labels = [id_ if on else IGNORED for id_, on in zip(encoded.ids, trained, strict=True)]
    print_line(json.dumps({"row": example.line, "ids": encoded.ids, "labels": labels}))


def _tokens(encoded: "Encoded", tokenizer: "Tokenizer") -> Iterator[tuple[int, str, bool]]:
    """Ids, words, and which are trained on. The first never is, as no token predicts it."""
    return zip(
        encoded.ids, map(tokenizer.word, encoded.ids), (False, *encoded.trained[1:]), strict=True
    )


def _lines(tokens: Iterator[tuple[int, str, bool]], width: int) -> Iterator["Text"]:
    """The tokens in lines, ⟦ before and ⟧ after a run of trained ones, │ between others.

    Line breaks in the text are kept.
    """
    from rich.cells import cell_len
    from rich.text import Text

    line = Text()
    for is_trained, run in groupby(tokens, key=lambda token: token[2]):
        visible = [
            "".join(SYMBOLS.get(c, c if c.isprintable() else f"\\x{ord(c):02x}") for c in word)
            for _, word, _ in run
        ]
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
