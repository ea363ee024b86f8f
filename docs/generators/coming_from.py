"""docs/coming-from: other tools' names, from the table that the code reads them with."""

from importlib import import_module

from pipeline.project.foreign import FORMATS
from pipeline.project.params.aliases import COMMANDS, KEYS, NO_COUNTERPART

HEAD = """# Coming from PEFT, transformers, TRL, Axolotl, LLaMA-Factory or mlx-lm

Written by `python -m docs` from the table by which the code answers other names ("Did you mean …?").

    lora new my-project --from axolotl.yml     # or llamafactory.yaml, adapter_config.json, training_args.json, mlx.yaml

makes a project with the settings of another tool's config. It prints what is taken, under which name, and what is not,
and why; a value that breaks a rule is one message. Only what the file says is taken: what it leaves open is chosen as
by `lora new --base --data` ([new-project](../how-to/new-project.md)), not by the other tool's defaults. Data files
that are there are named where they lie; data sets of the hub, or of a list of the tool's own, are not taken: name yours
with `--data`. Configs are read as text: JSON, or YAML without aliases, of at most 100 kB; nothing in them is run.
"""


def pages() -> dict[str, str]:
    files = [" ".join((import_module(each.read.__module__).__doc__ or "").split()) for each in FORMATS]
    names = ("| here | elsewhere |", "|---|---|")
    parts = [HEAD, "## Files\n", *(f"- {line}" for line in files)]
    parts += ["", "## Names of settings\n", *names, *_rows(KEYS)]
    parts += ["", "## Commands of `lora`\n", *names, *_rows(COMMANDS)]
    parts += ["", "## Settings without a counterpart\n", "| why | settings |", "|---|---|"]
    return {"coming-from/index.md": "\n".join([*parts, *_rows(NO_COUNTERPART, code=False)]) + "\n"}


def _rows(table: dict[str, str], code: bool = True) -> list[str]:
    """A row for each value of the table, with all its keys."""
    grouped: dict[str, list[str]] = {}
    for other, here in table.items():
        grouped.setdefault(f"`{here}`" if code else here, []).append(f"`{other}`")
    return [f"| {here} | {' '.join(others)} |" for here, others in grouped.items()]
