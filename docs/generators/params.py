"""docs/reference/params.md: every key of params.yaml as its section declares it."""

from docs.generators import cell
from pipeline.project.params.edit import dump_inline
from pipeline.project.params.load import RUNNING, TRAINING
from pipeline.project.params.schema import Pretrained, Section, hints, meaning, rule
from pipeline.project.params.sections import Running, Training
from pipeline.stages.registry import GRAPH

HEAD = f"""# The keys of params.yaml

Written by `python -m docs` from the declarations in the code. `lora params explain KEY` prints the same in a
terminal, `lora params show` a project's values with where each comes from: a section's own value wins over the
`{TRAINING}` block, and that over the default. A section below lists its own keys; those that train also have all keys
of `{TRAINING}`. A default after "pretrained" is that of a base which is imported, `base` in `params.yaml`; the other is
MiniGPT's.
"""


def described(section: str, kind: type[Section]) -> str:
    """The section's heading, what it is, and a table of its keys; without those that are as in
    `Training`.
    """
    inherited = hints(Training) if issubclass(kind, Training) and kind is not Training else {}
    rows = [
        f"| `{key}` | {cell(meaning(kind, key))} | {cell(rule(kind, key))} | "
        f"{_defaults(kind, key)} |"
        for key in hints(kind)
        if key not in inherited or _defaults(kind, key) != _defaults(Training, key)
    ]
    about = " ".join((kind.__doc__ or "").split())
    return "\n".join(
        (
            f"## {section}\n",
            about,
            "",
            "| key | meaning | values | default |",
            "|---|---|---|---|",
            *rows,
        )
    )


def _defaults(kind: type[Section], key: str) -> str:
    """The default; where it is another on a pretrained base, both."""
    plain, pretrained = (
        dump_inline(getattr(kind.defaults(base), key)) for base in (None, Pretrained())
    )
    return f"`{plain}`" if plain == pretrained else f"`{plain}`; pretrained `{pretrained}`"


def pages() -> dict[str, str]:
    sections: dict[str, type[Section]] = {RUNNING: Running, TRAINING: Training, **GRAPH.sections}
    text = (
        "\n\n".join((HEAD.rstrip(), *(described(name, kind) for name, kind in sections.items())))
        + "\n"
    )
    return {"reference/params.md": text}
