"""`lora data`: which tokens of a data file are trained on."""

from collections.abc import Iterator
from itertools import chain, groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.options import JsonOption, group

if TYPE_CHECKING:
    from rich.text import Text

    from pipeline.data.examples import Example
    from pipeline.data.masking import Encoded
    from pipeline.data.token_file import Statistics
    from pipeline.data.tokenizers.word import Tokenizer

app = group()
data = group(help="Show what is trained on in a data file.", no_args_is_help=True)
app.add_typer(data, name="data")

TRAINED = "bold green"
MAX_WIDTH = 100  # columns; longer lines of tokens are hard to read


@data.callback()
def root() -> None:
    pass


@data.command()
def show(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Data file: .txt or .jsonl.")],
    base: Annotated[
        Path | None,
        typer.Option(help="Model folder with the tokenizer; default: artifacts/expanded, or artifacts/base."),
    ] = None,
    max_length: Annotated[int, typer.Option(min=0, help="Truncate examples to this many tokens; 0: never.")] = 0,
    limit: Annotated[int, typer.Option(min=0, help="Number of examples to print.")] = 3,
    as_json: JsonOption = False,
) -> None:
    """Show the first examples and statistics of the whole file.

    What is trained on is shown in ⟦ ⟧.
    """
    from dataclasses import asdict
    from tempfile import TemporaryDirectory

    from cli.console import print_json, stdout
    from pipeline.data.masking import encoder
    from pipeline.data.read import iter_examples
    from pipeline.data.token_file import Corpus
    from pipeline.data.tokenizers.word import load_tokenizer

    base = base or _default_base()
    tokenizer = load_tokenizer(base)
    encode = encoder(tokenizer, max_length, _max_positions(base))
    examples = iter_examples(file, str(file))
    shown = [(example, encode(example)) for example in islice(examples, limit)]
    with TemporaryDirectory() as folder:
        corpus = Corpus.build(chain((example for example, _ in shown), examples), encode, Path(folder))
        statistics = corpus.statistics
        del corpus  # unmaps its file before the folder is removed
    if as_json:
        numbers = {**asdict(statistics), "share": statistics.share}
        first = [_as_json(example, encoded, tokenizer) for example, encoded in shown]
        print_json({"file": str(file), "base": str(base), "statistics": numbers, "examples": first})
        return
    for example, encoded in shown:
        stdout.print(_heading(example, encoded), markup=False, style="bold", soft_wrap=True)
        for line in _lines(encoded, tokenizer, min(stdout.width, MAX_WIDTH)):
            stdout.print(line, soft_wrap=True)
        stdout.print()
    _print_statistics(statistics, max_length)


def _default_base() -> Path:
    """The expanded checkpoint of the pipeline, else the base. Raises UserError if there is none."""
    from pipeline.errors import UserError

    folders = [Path("artifacts/expanded"), Path("artifacts/base")]
    for folder in folders:
        if folder.is_dir():
            return folder
    raise UserError(
        f"There is no model in {' or '.join(map(str, folders))}, and its tokenizer is needed. "
        "Name a model folder with --base, or run `lora pretrain`."
    )


def _max_positions(base: Path) -> int | None:
    """The maximum number of tokens of the model; None if its config has none."""
    from pipeline.files.artifact import read_json

    config = read_json(base / "config.json", "A model folder needs its config")
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        for key in ("max_position_embeddings", "n_positions"):
            if type(part.get(key)) is int:
                return int(part[key])
    return None


def _as_json(example: "Example", encoded: "Encoded", tokenizer: "Tokenizer") -> dict[str, Any]:
    tokens = [
        {"id": id_, "token": tokenizer.word(id_), "learned": trained} for id_, trained in _trained_tokens(encoded)
    ]
    return {"place": example.location, "tokens": tokens, "labels": encoded.labels, "cut": encoded.cut}


def _trained_tokens(encoded: "Encoded") -> Iterator[tuple[int, bool]]:
    """Token ids, and whether each is trained on. The first never is, as no token predicts it."""
    return zip(encoded.ids, (False, *encoded.trained[1:]), strict=True)


def _heading(example: "Example", encoded: "Encoded") -> str:
    parts = [example.location, f"{len(encoded.ids):,} tokens", f"{encoded.labels:,} trained on"]
    return "  ".join(parts + ([f"{encoded.cut:,} truncated"] if encoded.cut else []))


def _lines(encoded: "Encoded", tokenizer: "Tokenizer", width: int) -> Iterator["Text"]:
    """Lines of tokens, those trained on in ⟦ ⟧ and in colour; line breaks in the text are kept."""
    from rich.cells import cell_len
    from rich.text import Text

    line = Text()
    for text, trained in _token_texts(encoded, tokenizer):
        if line and line.cell_len + cell_len(text) > width:
            yield line
            line = Text()
        line.append(text, TRAINED if trained else "")
        if "↵" in text:
            yield line
            line = Text()
    if line:
        yield line


def _token_texts(encoded: "Encoded", tokenizer: "Tokenizer") -> Iterator[tuple[str, bool]]:
    """Each token as printed: ⟦ before and ⟧ after a run of trained tokens, │ between other tokens."""
    for trained, run in groupby(_trained_tokens(encoded), key=lambda token: token[1]):
        words = [_visible(tokenizer.word(id_)) for id_, _ in run]
        for index, word in enumerate(words):
            last = index == len(words) - 1
            prefix = "⟦" if trained and not index else ""
            yield f"{prefix}{word}{'' if last and not trained else '⟧' if last else '│'}", trained


def _visible(word: str) -> str:
    """The word with whitespace and control characters as symbols."""
    symbols = {" ": "·", "\n": "↵", "\r": "␍", "\t": "⇥"}
    return "".join(symbols.get(char, char if char.isprintable() else f"\\x{ord(char):02x}") for char in word)


def _print_statistics(statistics: "Statistics", max_length: int) -> None:
    from cli.console import stdout, table

    rows = [
        ("examples", f"{statistics.examples:,}"),
        ("tokens", f"{statistics.tokens:,}"),
        ("trained on", f"{statistics.labels:,} ({statistics.share:.1%})"),
        ("length", f"{statistics.shortest:,} to {statistics.longest:,}, median {statistics.median:,}"),
        ("truncated", f"{statistics.truncated:,} at {max_length:,} tokens" if max_length else "none"),
        ("skipped", f"{statistics.unlabelled:,} without a label"),
    ]
    stdout.print(table(("the file", ""), rows))
