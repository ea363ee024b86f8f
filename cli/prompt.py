"""`lora prompt` and `lora compare`: ask one model, or all of them side by side."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.options import DEFAULT_PARAMS, JsonOption, ParamsOption, TrustOption, group, project_of

if TYPE_CHECKING:
    from pipeline.inference.engine import LoadedModel

app = group()
MOST_COLUMNS = 8  # of candidates: a table with a column for each token of a vocabulary takes minutes to lay out


def _utf8(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise typer.BadParameter("it is not UTF-8.") from None
    return text


PromptBase = Annotated[
    Path | None,
    typer.Option(
        "--base",
        help="Model folder to prompt, or to load --adapter on; default: the adapter's base, or without --adapter the "
        "model trained last, artifacts/expanded if there is none.",
    ),
]
Text = Annotated[str, typer.Argument(metavar="TEXT", callback=_utf8, help="Text to complete.")]
TopK = Annotated[int, typer.Option("--top-k", min=1, help="Number of next-token candidates to show.")]
Chat = Annotated[bool, typer.Option("--chat", help="Put TEXT as a user turn into the model's chat template.")]
MaxTokens = Annotated[int, typer.Option(min=0, help="Maximum number of tokens to generate.")]


@app.command()
def prompt(
    text: Text,
    base: PromptBase = None,
    adapter: Annotated[Path | None, typer.Option(help="Adapter folder.")] = None,
    top_k: TopK = 5,
    max_tokens: MaxTokens = 20,
    temperature: Annotated[float, typer.Option(min=0, help="Sampling temperature; 0: greedy.")] = 0.0,
    sample_top_k: Annotated[int, typer.Option(min=0, help="Sample from the k most likely tokens; 0: from all.")] = 0,
    sample_top_p: Annotated[
        float, typer.Option("--top-p", help="Nucleus sampling: smallest set of tokens with this probability.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Random seed for sampling.")] = 0,
    chat: Chat = False,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Prompt a model: its top next tokens and a completion.

    By default the model trained last in this project.
    """
    from rich.text import Text as Line

    from cli.console import bar, print_json, stdout, table
    from pipeline.adapters.folder import base_of
    from pipeline.files.text import escape_whitespace
    from pipeline.inference.catalog import newest_model
    from pipeline.inference.engine import continued, load
    from pipeline.models.generate import Sampling
    from pipeline.workbench import current_project

    if not temperature and (sample_top_k or sample_top_p < 1 or seed):
        raise typer.BadParameter("--sample-top-k, --top-p and --seed need --temperature above 0.")
    chosen = base is None and adapter is None
    if chosen:
        base, adapter = (path and Path(os.path.relpath(path)) for path in newest_model(current_project()))
    base = base or base_of(adapter)
    loaded = load(base, adapter, trust_remote_code=trust_remote_code)
    asked = _asked(loaded, text, chat)
    said = continued(loaded, asked, max_tokens, Sampling(temperature, sample_top_k, sample_top_p, seed))
    answer = _answer(loaded, text, asked, top_k, said)
    _note_unbound(adapter)
    if as_json:
        print_json(answer)
        return
    _name(loaded, chosen)
    rows = [(escape_whitespace(c["token"]), f"{c['probability']:.1%}", bar(c["probability"])) for c in answer["top_k"]]
    stdout.print(table(("next", "probability", ""), rows, right=("probability",)))
    before, after = (f"{text}\n→ ", said.strip()) if chat else (text, said.rstrip())
    stdout.print(Line.assemble("\n", before, (after, "bold")), soft_wrap=True)


@app.command()
def compare(
    text: Text,
    params: ParamsOption = DEFAULT_PARAMS,
    top_k: TopK = 3,
    max_tokens: MaxTokens = 20,
    chat: Chat = False,
    as_json: JsonOption = False,
) -> None:
    """Ask every variant of the project, side by side."""
    from cli.console import print_json, stderr, stdout, table
    from cli.project.report import outdated, warn
    from pipeline.errors import UserError
    from pipeline.inference.engine import continued, variants
    from pipeline.project.stage_graph import VARIANTS

    project = project_of(params)
    answers: dict[str, dict[str, Any]] = {}
    for loaded in variants(project):
        asked = _asked(loaded, text, chat)
        if unknown := loaded.tokenizer.unknown_words(text):
            answers[loaded.name] = {"prompt": text, "unknown_words": unknown}
        else:
            answers[loaded.name] = _answer(loaded, text, asked, top_k, continued(loaded, asked, max_tokens))
    if not answers:
        raise UserError("There is no model yet. Run `make repro` for all of them, or `lora pretrain` to begin.")
    if all("unknown_words" in answer for answer in answers.values()):
        words = ", ".join(next(reversed(answers.values()))["unknown_words"])
        raise UserError(f"No variant knows: {words}. Use words of the training data, or add them with expand_vocab.")
    made_by = {name: VARIANTS[name][1] or VARIANTS[name][0] for name in answers}
    old = outdated(project, list(made_by.values()))
    for name, answer in answers.items():
        answer["outdated"] = list(old.get(made_by[name], ()))
    if marked := [name for name in answers if answers[name]["outdated"]]:
        reasons = dict.fromkeys(reason for name in marked for reason in answers[name]["outdated"])
        warn(f"{', '.join(marked)} {'is' if len(marked) == 1 else 'are'}", list(reasons), old)
    if as_json:
        print_json(answers)
        return
    shown = min(top_k, MOST_COLUMNS)
    columns = ("model", *(f"#{place}" for place in range(1, shown + 1)), "completion")
    stdout.print(table(columns, [(_marked(name, answer), *_cells(answer, shown)) for name, answer in answers.items()]))
    if shown < top_k:
        stderr.print(f"The table shows {shown} candidates; --json has all.")


def _marked(name: str, answer: dict[str, Any]) -> str:
    return f"{name} (outdated)" if answer["outdated"] else name


def _cells(answer: dict[str, Any], k: int) -> list[str]:
    if "unknown_words" in answer:
        return [*[""] * k, f"does not know: {', '.join(answer['unknown_words'])}"]
    from pipeline.files.text import escape_whitespace

    choices = [f"{escape_whitespace(choice['token'])} {choice['probability']:.1%}" for choice in answer["top_k"][:k]]
    return [*choices, *[""] * (k - len(choices)), " ".join(answer["completion"].split())]


def _asked(loaded: "LoadedModel", text: str, chat: bool) -> str:
    """What the model reads. Raises UserError where it has no chat template."""
    from pipeline.data.tokenizers.chat_template import render

    return render(loaded.base, text) if chat else text


def _answer(loaded: "LoadedModel", text: str, asked: str, k: int, said: str) -> dict[str, Any]:
    """`asked` is `text` as the model read it, `said` what it answered."""
    from pipeline.inference import engine

    return {
        "prompt": text,
        "model": str(loaded.base),
        "adapter": str(loaded.adapter) if loaded.adapter else None,
        "top_k": [vars(choice) for choice in engine.top_k(loaded, asked, k)],
        "completion": said.strip(),
    }


def _name(loaded: "LoadedModel", chosen: bool) -> None:
    """Says which model answers, and how to ask another where it was not named."""
    from cli.console import stderr

    model = f"{loaded.adapter} on {loaded.base}" if loaded.adapter else str(loaded.base)
    how = ", the newest trained model here; name another with --base or --adapter" * chosen
    stderr.print(f"model: {model}{how}", markup=False, soft_wrap=True)


def _note_unbound(adapter: Path | None) -> None:
    """Says so where nothing binds an adapter to its base: it was made elsewhere."""
    from cli.console import stderr
    from pipeline.files.artifact import MANIFEST

    if adapter is not None and not (adapter / MANIFEST).exists():
        stderr.print(f"{adapter} has no {MANIFEST}: names and shapes fit, its base cannot be checked.", markup=False)
