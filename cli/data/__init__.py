"""`lora data`: data files checked, shown as tokens, cleaned, and converted."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import chain, islice
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
from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.data.examples import Example
    from pipeline.data.quality.clean import Leaks
    from pipeline.data.tokenizers.word import Tokenizer

app = group()
data = group(help="Check, show, clean and convert data files.", no_args_is_help=True)
app.add_typer(data, name="data")

DEFAULT_BASES = (Path("artifacts/expanded"), Path("artifacts/base"))
SHOWN, COUNTED = 3, 1000  # examples that `show` prints, and counts
MOST = 1_000_000_000  # of what an option counts
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
    limit: Annotated[
        int, Option(min=0, max=MOST, help="Number of errors, and of warnings, to print.")
    ] = 20,
    as_json: JsonOption = False,
) -> None:
    """Check every row: errors, duplicates, lengths, tokens trained on.

    The exit code is 1 if training would be wrong.
    """
    from cli.console import print_json, print_note
    from cli.data.output import print_report
    from pipeline.data.check import check as check_files
    from pipeline.data.columns import clean_command

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
        print_report(report, max_length, limit)
        if report.counts.keys() & {"empty", "duplicate"}:
            cleaned = clean_command(report.files[0], columns_of(columns))
            print_note(f"`{cleaned}` writes a file without empty rows and duplicates.")
    if not report.ok:
        raise UserError(
            f"training needs data without errors, and this has {report.errors}. Correct the rows "
            "above."
        )


def _in_template(files: list[Path]) -> bool:
    """Whether plain prompts get the base's chat template, as in the project here."""
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


@data.command()
def show(
    file: Annotated[Path, Argument(metavar="FILE", help=FILE_HELP)],
    base: BaseOption = None,
    row: Annotated[int | None, Option(min=1, help="Show only this line or row.")] = None,
    columns: ColumnsOption = None,
    no_template: PlainOption = False,
    max_length: MaxLengthOption = 0,
    limit: Annotated[
        int | None,
        Option(min=0, max=MOST, help="Number of examples to print; default: 3, with --json all."),
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

    from cli.console import print_line, print_table
    from cli.data.output import print_labels, print_tokens
    from pipeline.data.columns import columns_option
    from pipeline.data.masking import Encoder
    from pipeline.data.windows import Corpus

    base = base or _default_base()
    if base is None:
        raise UserError(
            f"There is no model in {' or '.join(map(str, DEFAULT_BASES))}, and its tokenizer is "
            "needed. Name a model with --base, or run `lora import` or `lora pretrain`."
        )
    tokenizer, positions = _open_base(base)
    encode = Encoder(tokenizer, max_length, positions)
    examples = _examples(file, columns_of(columns), row, not no_template and _in_template([file]))
    if as_json:
        for example, encoded in encode.each(islice(examples, limit)):
            print_labels(example, encoded)
        return
    shown = list(encode.each(islice(examples, SHOWN if limit is None else limit)))
    for example, encoded in shown:
        parts = [example.location, f"{len(encoded.ids):,} tokens", f"{encoded.labels:,} trained on"]
        print_line(
            "  ".join(parts + [f"{encoded.cut:,} truncated"] * bool(encoded.cut)), style="bold"
        )
        print_tokens(encoded, tokenizer)
    if row:
        return
    with TemporaryDirectory() as folder:
        every = chain((example for example, _ in shown), examples)
        statistics = Corpus.of(encode.each(islice(every, COUNTED)), Path(folder)).statistics
    is_all = next(every, None) is None
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
    from cli.data.output import print_written
    from pipeline.data.convert import convert as convert_file

    with _row_counter("converting") as progress:
        done = convert_file(
            source,
            out,
            format_,
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
    print_written(out, done)


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
    from cli.data.output import print_cleaned
    from pipeline.data.masking import Encoder
    from pipeline.data.quality.clean import REASONS
    from pipeline.data.quality.clean import clean as clean_file

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
        encoder = Encoder(tokenizer)
        max_length = max_length or positions or 0
        if not max_length:
            raise UserError(
                "--drop too-long needs --max-length: the model does not say how many positions it "
                "has."
            )
    with _row_counter("cleaning") as progress:
        done = clean_file(
            source,
            out,
            reasons,
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
        print_cleaned(out, done)


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


def _default_base() -> Path | None:
    """The model whose tokenizer is used without --base."""
    return next((folder for folder in DEFAULT_BASES if folder.is_dir()), None)


def _open_base(base: Path) -> tuple["Tokenizer", int | None]:
    """The tokenizer of a base, and its number of positions if known."""
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

    def of_row(number: int, error: UserError) -> None:
        if row in (None, number):
            raise error

    examples = iter_examples(
        file, str(file), columns=columns, reading=Reading(of_row), templated=templated
    )
    if row is None:
        return examples
    example = next((example for example in examples if example.line >= row), None)
    if example is None or example.line != row:
        raise UserError(f"{file} has no example in row {row}. Name another --row.")
    return iter([example])
