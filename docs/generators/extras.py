"""docs/reference/extras.md: which command or setting needs which extra, from the table that `lora
doctor` reads.
"""

from pipeline.errors import OPTIONAL

HEAD = """# Extras

Written by `python -m docs` from the table that `lora doctor` and the error messages read. `pip install
'lora-workbench[gguf,serve]'` installs two of them, `lora-workbench[all]` every one; with pipx and uv see
[how-to/install.md](../how-to/install.md). `lora doctor` says which of them are missing here.

| command or setting | extra | libraries | without them |
|---|---|---|---|
"""


def pages() -> dict[str, str]:
    rows = (
        f"| `{user}` | `{needs.extra}` | {', '.join(needs.libraries)} | "
        f"{needs.without or 'an error'} |\n"
        for user, needs in OPTIONAL.items()
    )
    return {"reference/extras.md": HEAD + "".join(rows)}
