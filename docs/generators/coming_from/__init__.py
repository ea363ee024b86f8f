"""docs/coming-from: other tools' names, from the table that the code reads them with; a page for
each file here.
"""

import tempfile
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType

from pipeline.project.foreign import FORMATS, read_config
from pipeline.project.params.aliases import COMMANDS, IGNORED, KEYS, NO_COUNTERPART, why_none
from pipeline.project.params.edit import dump_inline
from pipeline.project.params.other_names import SAME
from pipeline.project.params.schema import hints
from pipeline.stages.registry import GRAPH

HEAD = """# Coming from PEFT, transformers, TRL, Axolotl, LLaMA-Factory or mlx-lm

Step by step: [PEFT, transformers and TRL](peft.md), [Axolotl](axolotl.md), [LLaMA-Factory](llama-factory.md),
[mlx-lm](mlx-lm.md). This page has all names; it is written by `python -m docs` from the table by which the code
takes them.

**What you type is taken.** In `params.yaml`, in `--set` and as options of `lora new`, `train` and `finetune`, keys may
have other tools' names and values: `--model_name_or_path org/model --train_file d.jsonl --num_train_epochs 3
--lora_r 8 --output_dir out` are options of `lora train`. Sections may too: `lora:`, `qlora:`, `dpo:`.

    lora finetune lora --set r=8 --set gradient_checkpointing=true
    lora finetune sweep --grid r=4,8,16 --grid lr=1e-4,2e-4

One line on stderr says what each is here: `finetune_lora.r is rank here, gradient_checkpointing full: taken.` `lora
params show`, manifests and forms have our names. A setting that changes no result (`output_dir`, `logging_steps`,
`push_to_hub`) is ignored, and the line says what to do instead; one that would change it, and has no counterpart, is
an error with the reason. A key under two names is an error too.

    lora train axolotl.yml       # or --config llamafactory.yaml, adapter_config.json, training_args.json, mlx.yaml
    lora new my-project --from axolotl.yml     # the project alone, which trains nothing yet

makes a project with the settings of another tool's config. It prints what is taken, under which name, and what is not,
and why; a value that breaks a rule is one message. Only what the file says is taken: what it leaves open is chosen as
by `lora new --base --data` ([new-project](../how-to/new-project.md)), not by the other tool's defaults. Data files
that are there are named where they lie; data sets of the hub, or of a list of the tool's own, are not taken: name yours
with `--data`. Configs are read as text: JSON, or YAML without aliases, of at most 100 kB; nothing in them is run.
"""


def pages() -> dict[str, str]:
    files = [
        " ".join((import_module(each.read.__module__).__doc__ or "").split())
        for each in FORMATS.values()
    ]
    names = ("| here | elsewhere |", "|---|---|")
    parts = [HEAD, "## Files\n", *(f"- {line}" for line in files)]
    parts += ["", "## Names of settings\n", *names, *_rows(KEYS)]
    parts += ["", "## Commands of `lora`\n", *names, *_rows(COMMANDS)]
    refused = {name: why for name, why in NO_COUNTERPART.items() if name not in IGNORED}
    for title, table in (("ignored", IGNORED), ("errors", refused)):
        parts += ["", f"## Settings without a counterpart: {title}\n"]
        parts += ["| why | settings |", "|---|---|", *_rows(table, code=False)]
    index = "\n".join(parts) + "\n"
    tools = [import_module(f"{__name__}.{each.name}") for each in iter_modules(__path__)]
    return {
        "coming-from/index.md": index,
        **{f"coming-from/{tool.PAGE}.md": _page(tool) for tool in tools},
    }


def _rows(table: dict[str, str], code: bool = True) -> list[str]:
    """A row for each value of the table, with all its keys."""
    grouped: dict[str, list[str]] = {}
    for other, here in table.items():
        grouped.setdefault(f"`{here}`" if code else here, []).append(f"`{other}`")
    return [f"| {here} | {' '.join(others)} |" for here, others in grouped.items()]


def _page(tool: ModuleType) -> str:
    """The text of a tool's file, its example config read by the code of `lora new --from`, and its
    names.

    `NAMES`: keys that the tool has. `RULES`: what is read by another rule than a name's.
    """
    parts = [tool.TEXT, "## A config, and what is taken from it\n", f"`{tool.FILE}`:\n"]
    parts += [f"    {line}" for line in tool.CONFIG.splitlines()]
    parts += [
        "",
        f"`lora new my-project --from {tool.FILE}` takes:\n",
        *_read(tool.FILE, tool.CONFIG, tool.DATA),
    ]
    parts += ["", "## Names of settings\n", "| there | here |", "|---|---|"]
    parts += [f"| `{name}` | {said} |" for name, said in tool.RULES.items()]
    parts += [f"| `{name}` | {_counterpart(name)} |" for name in tool.NAMES.split()]
    return "\n".join(parts) + "\n"


def _read(name: str, text: str, data: str) -> list[str]:
    """Tables of what is taken and what is not, where the config's data file is beside it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_text(text, encoding="utf-8")
        (path.parent / data).parent.mkdir(exist_ok=True)
        (path.parent / data).touch()
        foreign = read_config(path, GRAPH.sections)
        rows = [("base model", "base", foreign.base)] * bool(foreign.base)
        rows += [
            ("data", f"{foreign.section}.data", str(Path(each).relative_to(folder)))
            for each in foreign.data
        ]
    rows += [
        (theirs, f"{foreign.section}.{ours}", dump_inline(value))
        for ours, (theirs, value) in foreign.taken.items()
    ]
    lines = ["| there | here | value |", "|---|---|---|"]
    lines += [f"| {theirs} | `{ours}` | `{value}` |" for theirs, ours, value in rows]
    if foreign.left:
        lines += ["", "and leaves:\n", "| there | why |", "|---|---|"]
        lines += [f"| `{theirs}` | {why} |" for theirs, why in foreign.left.items()]
    return lines


def _counterpart(name: str) -> str:
    """Our key for another tool's, or why there is none. Raises KeyError for a name that the code
    does not know.
    """
    if ours := KEYS.get(name):
        return f"`{ours}`"
    if why := why_none(name):
        return f"none: {why}"
    if any(name in hints(kind) for kind in GRAPH.sections.values()):
        return "the same"
    if name in SAME:
        return f"none: always as with `{dump_inline(SAME[name])}`"
    raise KeyError(name)
