"""`lora data`: what a data file teaches, token by token."""

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

LEARNED = "bold green"
WIDEST = 100  # columns; longer lines of tokens are hard to follow


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
    from pipeline.data.examples import iter_examples
    from pipeline.data.masking import encoder
    from pipeline.data.token_file import Corpus
    from pipeline.data.tokenizers.word import load_tokenizer

    base = base or _default_base()
    tokenizer = load_tokenizer(base)
    encode = encoder(tokenizer, max_length, _positions(base))
    examples = iter_examples(file, str(file))
    shown = [(example, encode(example)) for example in islice(examples, limit)]
    with TemporaryDirectory() as folder:
        corpus = Corpus.build(chain((example for example, _ in shown), examples), encode, Path(folder))
        found = corpus.statistics
        del corpus  # before the file that it maps
    if as_json:
        numbers = {**asdict(found), "share": found.share}
        first = [_as_json(example, encoded, tokenizer) for example, encoded in shown]
        print_json({"file": str(file), "base": str(base), "statistics": numbers, "examples": first})
        return
    for example, encoded in shown:
        stdout.print(_heading(example, encoded), markup=False, style="bold", soft_wrap=True)
        for line in _lines(encoded, tokenizer, min(stdout.width, WIDEST)):
            stdout.print(line, soft_wrap=True)
        stdout.print()
    _print_statistics(found, max_length)


def _default_base() -> Path:
    """The newest checkpoint that the pipeline has made here. Raises UserError."""
    from pipeline.errors import UserError
    from pipeline.project.stage_graph import STAGES

    folders = [Path(STAGES[stage].path) for stage in ("expand_vocab", "pretrain")]
    for folder in folders:
        if folder.is_dir():
            return folder
    raise UserError(
        f"There is no model in {' or '.join(map(str, folders))}, and tokens are those of a model. "
        "Name one with --base, or run `lora pretrain`."
    )


def _positions(base: Path) -> int | None:
    """How many tokens the model takes, where its config says."""
    from pipeline.files.artifact import read_json

    config = read_json(base / "config.json", "A model folder needs its config")
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        for key in ("max_position_embeddings", "n_positions"):
            if type(part.get(key)) is int:
                return int(part[key])
    return None


def _as_json(example: "Example", encoded: "Encoded", tokenizer: "Tokenizer") -> dict[str, Any]:
    tokens = [{"id": id_, "token": tokenizer.word(id_), "learned": learned} for id_, learned in _learned(encoded)]
    return {"place": example.location, "tokens": tokens, "labels": encoded.labels, "cut": encoded.cut}


def _learned(encoded: "Encoded") -> Iterator[tuple[int, bool]]:
    """Tokens, and whether each is learned: the first never is, nothing stands before it."""
    return zip(encoded.ids, (False, *encoded.trained[1:]), strict=True)


def _heading(example: "Example", encoded: "Encoded") -> str:
    parts = [example.location, f"{len(encoded.ids):,} tokens", f"{encoded.labels:,} learned"]
    return "  ".join(parts + ([f"{encoded.cut:,} cut off"] if encoded.cut else []))


def _lines(encoded: "Encoded", tokenizer: "Tokenizer", width: int) -> Iterator["Text"]:
    """Tokens side by side, those that are learned in ⟦ ⟧ and in colour; a new line where the text has one."""
    from rich.cells import cell_len
    from rich.text import Text

    line = Text()
    for piece, learned in _pieces(encoded, tokenizer):
        if line and line.cell_len + cell_len(piece) > width:
            yield line
            line = Text()
        line.append(piece, LEARNED if learned else "")
        if "↵" in piece:
            yield line
            line = Text()
    if line:
        yield line


def _pieces(encoded: "Encoded", tokenizer: "Tokenizer") -> Iterator[tuple[str, bool]]:
    """Each token as it is printed: ⟦ before the first of a run that is learned, ⟧ behind its last, │ between others."""
    for learned, run in groupby(_learned(encoded), key=lambda token: token[1]):
        words = [_visible(tokenizer.word(id_)) for id_, _ in run]
        for index, word in enumerate(words):
            last = index == len(words) - 1
            opening = "⟦" if learned and not index else ""
            yield f"{opening}{word}{'' if last and not learned else '⟧' if last else '│'}", learned


def _visible(word: str) -> str:
    """White space and control characters as signs."""
    signs = {" ": "·", "\n": "↵", "\r": "␍", "\t": "⇥"}
    return "".join(signs.get(sign, sign if sign.isprintable() else f"\\x{ord(sign):02x}") for sign in word)


def _print_statistics(found: "Statistics", max_length: int) -> None:
    from cli.console import stdout, table

    rows = [
        ("examples", f"{found.examples:,}"),
        ("tokens", f"{found.tokens:,}"),
        ("learned", f"{found.labels:,} ({found.share:.1%})"),
        ("length", f"{found.shortest:,} to {found.longest:,}, median {found.median:,}"),
        ("cut off", f"{found.truncated:,} at {max_length:,} tokens" if max_length else "none"),
        ("left out", f"{found.unlabelled:,} with nothing left to learn"),
    ]
    stdout.print(table(("whole file", ""), rows))
