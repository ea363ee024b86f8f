"""What the panes of the screen say of themselves."""

from dataclasses import replace

from textual.binding import Binding, BindingType

from tui.panes.pane import About

OPEN = Binding("o", "screen.open_file", "Open a file", id="data.open")
COLUMNS = Binding("c", "screen.columns", "Columns", id="data.columns")
EDIT = Binding("e", "screen.edit", "Edit", id="data.edit")
COPY = Binding("y", "screen.copy", "Copy", id="data.copy")
EXPORT = Binding("x", "screen.export", "Export", id="data.export")
CHECK = Binding("m", "screen.measure", "Check all", id="data.measure")
NEXT = Binding("n", "screen.problem(1)", "Next problem", id="data.next")
PREVIOUS = Binding("N", "screen.problem(-1)", "Previous", id="data.previous")
FILES = About(
    "Files",
    """\
The data files of the project with what reads them, then other files in `data/`. Enter opens one;
`o` asks for any other: .txt, .jsonl, .json, .csv, .tsv (also .gz, .zst), .parquet, .arrow, a
folder of `save_to_disk`, a hub id. `c` says which columns of a file hold the prompt and the answer;
of a file that is trained on, params.yaml says it.
""",
    [OPEN, COLUMNS],
)
ROWS = About(
    "Rows",
    """\
Every row of the file: its line or row number, how it begins, and its tokens with the end token.

- **✗** cannot be read or encoded, **!** the check complains about it, **⊣** cut at `max_length`.
- `/` searches the whole file, whatever the case; `#120` goes to row 120.
- `e` edits the row into a copy of the file, which stays as it is. `x` writes all rows in another
  format.
- `m` checks all rows, which small files are at once. `n`, `N` go from problem to problem.
""",
    [EDIT, NEXT, EXPORT],
    filters="filter",
)
ROW = About(
    "Row",
    """\
The row as the model reads it: with a tokenizer as its chat template writes it, else its messages.

- **⟦green⟧** is trained on: the model learns to write it, with the end token behind it.
- Plain text is read, and no loss is computed on it. Dim text is what the template adds.
- **Struck out** is behind the cut at `max_length`, and never seen. `⊣` marks the place.

Without a model in `artifacts` there are no tokens: the mask is that of the roles.
""",
    [EDIT, COPY],
)
LENGTHS = About(
    "Lengths",
    """\
How many examples have which length in tokens, the end token included; a preference pair has that
of its longer answer.

- **▲ max_length** is where examples are cut: red bars lie behind it, and lose the rest of their
  text.
- **▲ window** is the length of a training window: longer examples give several, and lose nothing.
- `m` counts all rows. `lora data check FILE` prints the same.
""",
    [CHECK],
)
PROBLEMS = About(
    "Problems",
    """\
What `lora data check` says of the file: **✗** errors, which spoil a training, then **!** warnings.

Enter goes to the row; `n`, `N` go from one to the next from anywhere on this screen. Of each kind
the first 50 are listed, all are counted.
""",
    [NEXT, PREVIOUS, CHECK],
)
PANES = {"files": FILES, "rows": ROWS, "row": ROW, "lengths": LENGTHS, "problems": PROBLEMS}
# from anywhere on the screen
BINDINGS: list[BindingType] = [OPEN, EXPORT]
BINDINGS += [replace(each, show=False) for each in (COLUMNS, EDIT, CHECK, NEXT, PREVIOUS, COPY)]
