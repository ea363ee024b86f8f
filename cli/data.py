"""`lora data`: which tokens of a data file are trained on."""

from collections.abc import Iterator
from itertools import chain, groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from cli.options import JsonOption, group

if TYPE_CHECKING:
    from rich.text import Text

    from pipeline.data.masking import Encoded

app = group()
data = group(help="Show what is trained on in a data file.", no_args_is_help=True)
app.add_typer(data, name="data")

DEFAULT_BASES = (Path("artifacts/expanded"), Path("artifacts/base"))
TRAINED = "bold green"
MAX_WIDTH = 100  # columns; longer lines of tokens are hard to read
SYMBOLS = {" ": "·", "\n": "↵", "\r": "␍", "\t": "⇥"}


@data.callback()  # or Typer makes of a single command no group
def root() -> None:
    pass


@data.command()
def show(
    file: Annotated[Path, Argument(metavar="FILE", help="Data file: .txt or .jsonl.")],
    base: Annotated[
        Path | None, Option(help="Model folder with the tokenizer; default: artifacts/expanded, or artifacts/base.")
    ] = None,
    max_length: Annotated[int, Option(min=0, help="Truncate examples to this many tokens; 0: never.")] = 0,
    limit: Annotated[int, Option(min=0, help="Number of examples to print.")] = 3,
    as_json: JsonOption = False,
) -> None:
    """Show the first examples and statistics of the whole file.

    What is trained on is shown in ⟦ ⟧.
    """
    from dataclasses import asdict
    from tempfile import TemporaryDirectory

    from cli.console import print_json, print_line, print_table, stdout
    from pipeline.data.formats import iter_examples
    from pipeline.data.masking import Encoder
    from pipeline.data.tokenizers.word import load_tokenizer
    from pipeline.data.windows import Corpus
    from pipeline.errors import UserError

    if base is None:
        base = next((folder for folder in DEFAULT_BASES if folder.is_dir()), None)
    if base is None:
        raise UserError(
            f"There is no model in {' or '.join(map(str, DEFAULT_BASES))}, and its tokenizer is needed. "
            "Name a model folder with --base, or run `lora import` or `lora pretrain`."
        )
    tokenizer = load_tokenizer(base)
    encode_one = Encoder(tokenizer, max_length, _max_positions(base))
    examples = iter_examples(file, str(file))
    shown = [(example, encode_one(example)) for example in islice(examples, limit)]
    with TemporaryDirectory() as folder:
        corpus = Corpus(chain((example for example, _ in shown), examples), encode_one, Path(folder))
        statistics = corpus.statistics
        del corpus  # unmaps its file before the folder is removed

    def tokens(encoded: "Encoded") -> Iterator[tuple[int, str, bool]]:
        """Ids, words, and which are trained on. The first never is, as no token predicts it."""
        return zip(encoded.ids, map(tokenizer.word, encoded.ids), (False, *encoded.trained[1:]), strict=True)

    if as_json:
        printed = [
            {
                "place": example.location,
                "tokens": [{"id": id_, "token": word, "learned": learned} for id_, word, learned in tokens(encoded)],
                "labels": encoded.labels,
                "cut": encoded.cut,
            }
            for example, encoded in shown
        ]
        numbers = {**asdict(statistics), "share": statistics.share}
        print_json({"file": str(file), "base": str(base), "statistics": numbers, "examples": printed})
        return
    for example, encoded in shown:
        parts = [example.location, f"{len(encoded.ids):,} tokens", f"{encoded.labels:,} trained on"]
        print_line("  ".join(parts + [f"{encoded.cut:,} truncated"] * bool(encoded.cut)), style="bold")
        for line in _lines(tokens(encoded), min(stdout.width, MAX_WIDTH)):
            stdout.print(line, soft_wrap=True)
        stdout.print()
    rows = [
        ("examples", f"{statistics.examples:,}"),
        ("tokens", f"{statistics.tokens:,}"),
        ("trained on", f"{statistics.labels:,} ({statistics.share:.1%})"),
        ("length", f"{statistics.shortest:,} to {statistics.longest:,}, median {statistics.median:,}"),
        ("truncated", f"{statistics.truncated:,} at {max_length:,} tokens" if max_length else "none"),
        ("skipped", f"{statistics.unlabelled:,} without a label"),
    ]
    print_table(("the file", ""), rows)


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


def _lines(tokens: Iterator[tuple[int, str, bool]], width: int) -> Iterator["Text"]:
    """The tokens in lines, ⟦ before and ⟧ after a run of trained ones, │ between others.

    Line breaks in the text are kept.
    """
    from rich.cells import cell_len
    from rich.text import Text

    line = Text()
    for is_trained, run in groupby(tokens, key=lambda token: token[2]):
        visible = [
            "".join(SYMBOLS.get(c, c if c.isprintable() else f"\\x{ord(c):02x}") for c in word) for _, word, _ in run
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
