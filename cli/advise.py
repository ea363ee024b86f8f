"""`lora advise`: settings that published experiments advise against."""

from typing import TYPE_CHECKING

from cli.options import DEFAULT_PARAMS, JsonOption, ParamsOption, SetOption, group, project_of
from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.project.advice import Facts

app = group()


@app.command()
def advise(
    params: ParamsOption = DEFAULT_PARAMS, overrides: SetOption = None, as_json: JsonOption = False
) -> None:
    """Compare the settings with what experiments advise.

    Nothing of it is required. Once artifacts/base is there, the data is counted in tokens.
    """
    from cli.console import print_json, print_line, print_note, print_table
    from lora_workbench.advice import advice_on, gather_facts, is_advised
    from pipeline.project.advice import Facts
    from pipeline.project.params.edit import dump_inline

    project = project_of(params, overrides)
    stages = [stage for stage in project.stages.values() if is_advised(stage)]
    if not stages:
        raise UserError(
            f"{project.params.file} has no section that fine-tunes. Add `finetune_lora: {{}}` to "
            "it."
        )
    facts = gather_facts(project, stages)
    advice = list(advice_on(project, facts))
    if as_json:
        shown = [name for name in Facts._fields if name not in ("section", "left", "bf16")]
        known = {}
        for of_stage in facts:
            known[of_stage.section] = {name: getattr(of_stage, name) for name in shown}
        print_json({"facts": known, "advice": [rule._asdict() for rule in advice]})
        return
    for of_stage in facts:
        print_note(f"{of_stage.section}: {_describe(of_stage)}")
    if not advice:
        print_note("No rule disagrees with these settings.")
        return
    print_table(
        ("setting", "yours", "advised"),
        [(rule.key, dump_inline(rule.yours), rule.advised) for rule in advice],
    )
    for rule in advice:
        print_line(f"\n{rule.key}: {rule.why} ({rule.source})")


def _describe(facts: "Facts") -> str:
    more = " and more" if facts.more else ""
    parts = []
    if facts.base and facts.trained:
        parts.append(f"{facts.trained:,} of {facts.base:,} parameters train")
    if facts.examples:
        parts.append(f"{facts.examples:,} example{'s' * (facts.examples != 1)}{more}")
    if facts.tokens is None:
        parts.append("tokens unknown until the base is there")
    else:
        parts.append(f"{facts.tokens:,} trained tokens")
    if facts.cut:
        parts.append(f"{facts.cut:.0%} truncated")
    if facts.measured:
        parts.append(f"{', '.join(facts.measured)} as the best of the sweep")
    return ", ".join(parts)
