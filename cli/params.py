"""`lora params`: every setting with its value and where it comes from; what a key means and may be."""

from typing import Annotated, Any

from typer import Argument

from cli.options import DEFAULT_PARAMS, JsonOption, ParamsOption, SetOption, group, project_of

app = group()
params = group(help="Show every setting, its source and its meaning.", no_args_is_help=True)
app.add_typer(params, name="params")


@params.command()
def show(
    section: Annotated[str | None, Argument(metavar="SECTION", help="Only this section.")] = None,
    path: ParamsOption = DEFAULT_PARAMS,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show every stage's settings, and each value's source.

    That is a stage's defaults, the training block, the stage's section, --set: the last one counts.
    """
    from cli.console import print_json, print_table
    from pipeline.errors import UserError
    from pipeline.project.params.edit import dump_inline
    from pipeline.project.params.load import key_path
    from pipeline.project.params.schema import hints

    settings = project_of(path, overrides).params
    names = [name for name in settings.kinds if name in settings.sections]
    if section is not None and section not in names:
        raise UserError(f"{section} is not a section of this project. It has {', '.join(names)}.")
    rows = [
        (key_path(name, key), getattr(settings.section(name), key), settings.source(name, key))
        for name in (names if section is None else [section])
        for key in hints(settings.kinds[name])
    ]
    if as_json:
        print_json([{"key": key, "value": value, "source": source} for key, value, source in rows])
        return
    print_table(("key", "value", "from"), [(key, dump_inline(value), source) for key, value, source in rows])


@params.command()
def explain(
    key: Annotated[str, Argument(metavar="KEY", help="A key, such as finetune_lora.rank, or a section.")],
    as_json: JsonOption = False,
) -> None:
    """Say what a key means, which values it may have, and its default."""
    from cli.console import print_json, stdout
    from pipeline.errors import UserError
    from pipeline.project.params.aliases import KEYS, suggest
    from pipeline.project.params.edit import dump_inline
    from pipeline.project.params.load import TOP_LEVEL, TRAINING, key_path
    from pipeline.project.params.schema import Section, hints, meaning, rule
    from pipeline.project.params.sections import Training
    from pipeline.workbench import GRAPH

    kinds: dict[str, type[Section]] = {TRAINING: Training, **GRAPH.sections}
    section, _, name = (f"{TOP_LEVEL[key]}.{key}" if key in TOP_LEVEL else key).partition(".")
    if section not in kinds:
        meant = suggest(section, kinds, KEYS)
        raise UserError(f"There is no section {section}. " + (f"Did you mean {meant}?" if meant else ""))
    kind = kinds[section]
    if name and name not in hints(kind):
        meant = suggest(name, list(hints(kind)), KEYS, section)
        known = f"Did you mean {section}.{meant}?" if meant else f"Known: {', '.join(hints(kind))}."
        raise UserError(f"There is no key {key}. {known}")
    facts: list[dict[str, Any]] = [
        {
            "key": key_path(section, each),
            "meaning": meaning(kind, each),
            "rule": rule(kind, each),
            "default": dump_inline(getattr(kind(), each)),
        }
        for each in ([name] if name else hints(kind))
    ]
    if as_json:
        print_json(facts)
        return
    if not name:
        stdout.print(f"{section}: {' '.join((kind.__doc__ or '').split())}\n", markup=False)
    for fact in facts:
        stdout.print(fact["key"], style="bold", markup=False)
        stdout.print(f"  {fact['meaning']}\n  {fact['rule']}; default {fact['default']}", markup=False)
