"""`lora prompt` and `lora compare`: prompt one model, or all variants side by side."""

import os
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, BadParameter, Option

from cli.options import (
    ADAPTER,
    DEFAULT_PARAMS,
    DeviceOption,
    JsonOption,
    ParamsOption,
    TrustOption,
    adapter_folder,
    base_folder,
    group,
    project_of,
)
from pipeline.errors import UserError
from pipeline.files.text import escape_whitespace

if TYPE_CHECKING:
    from pipeline.inference.engine import LoadedModel

app = group()
# of candidates: a table with a column per token of a vocabulary takes minutes to lay out
MAX_COLUMNS = 8


def validate_utf8(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadParameter("it is not valid UTF-8.") from None
    return text


PromptBase = Annotated[
    Path | None,
    Option(
        "--base",
        callback=base_folder,
        help="Model to prompt, or to load --adapter on: a folder, .gguf file or hub id; "
        "default: the adapter's base, or without --adapter the model trained last, "
        "artifacts/expanded if there is none.",
    ),
]
Adapter = Annotated[Path | None, Option(metavar="PATH", parser=adapter_folder, help=ADAPTER)]
Temperature = Annotated[float, Option(min=0, help="Sampling temperature; 0: greedy.")]
Seed = Annotated[int, Option(min=0, help="Random seed for sampling.")]
Text = Annotated[str, Argument(metavar="TEXT", callback=validate_utf8, help="Text to complete.")]
TopK = Annotated[int, Option("--top-k", min=1, help="Number of next-token candidates to show.")]
Chat = Annotated[
    bool, Option("--chat", help="Put TEXT as a user turn into the model's chat template.")
]
MaxTokens = Annotated[int, Option(min=0, help="Maximum number of tokens to generate.")]


def chosen_model(
    base: Path | None, adapter: Path | None, merged: bool = True
) -> tuple[Path, Path | None]:
    """Base and adapter as given, or else the model that was trained last in this project.

    `merged`: whether that may be the merged one.
    """
    from pipeline.adapters.folder import base_of
    from pipeline.stages.registry import current_project
    from pipeline.views.models import newest_model

    if base is None and adapter is None:
        newest = newest_model(current_project(), merged)
        base, adapter = (path and Path(os.path.relpath(path)) for path in newest)
    return base or base_of(adapter), adapter


@app.command()
def prompt(
    text: Text,
    base: PromptBase = None,
    adapter: Adapter = None,
    top_k: TopK = 5,
    max_tokens: MaxTokens = 20,
    temperature: Temperature = 0.0,
    sample_top_k: Annotated[
        int, Option(min=0, help="Sample from the k most likely tokens; 0: from all.")
    ] = 0,
    sample_top_p: Annotated[
        float,
        Option("--top-p", help="Nucleus sampling: smallest set of tokens with this probability."),
    ] = 1.0,
    seed: Seed = 0,
    chat: Chat = False,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
    _device: DeviceOption = None,
) -> None:
    """Prompt a model: its top next tokens and a completion.

    By default the model trained last in this project.
    """
    from rich.text import Text as Line

    from cli.console import bar, print_json, print_note, print_table, stdout
    from lora_workbench import api
    from pipeline.data.tokenizers.chat_template import render
    from pipeline.files.artifact import MANIFEST

    if not temperature and (sample_top_k or sample_top_p < 1 or seed):
        raise BadParameter("--sample-top-k, --top-p and --seed need --temperature above 0.")
    is_newest = base is None and adapter is None
    base, adapter = chosen_model(base, adapter)
    loaded = api.load(adapter, base, trust_remote_code=trust_remote_code)
    completion = api.generate(
        loaded,
        text,
        chat=chat,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=sample_top_k,
        top_p=sample_top_p,
        seed=seed,
    )
    model_input = render(loaded.base, text) if chat else text
    answer = _answer(loaded, text, model_input, top_k, completion)
    if not chat and loaded.tokenizer.has_template and _trained_in_template(adapter or base):
        print_note(
            "TEXT is continued as it is; --chat asks it in the chat template, as the model was "
            "trained."
        )
    # made elsewhere: nothing binds it to its base
    if adapter is not None and not (adapter / MANIFEST).exists():
        print_note(
            f"{adapter} has no {MANIFEST}: names and shapes fit, its base cannot be checked."
        )
    if as_json:
        print_json(answer)
        return
    model = f"{loaded.adapter} on {loaded.base}" if loaded.adapter else str(loaded.base)
    hint = ", the newest trained model here; name another with --base or --adapter" * is_newest
    print_note(f"model: {model}{hint}")
    rows = [
        (escape_whitespace(c["token"]), f"{c['probability']:.1%}", bar(c["probability"]))
        for c in answer["top_k"]
    ]
    print_table(("next", "probability", ""), rows, right=("probability",))
    before, after = (f"{text}\n→ ", completion.strip()) if chat else (text, completion.rstrip())
    stdout.print(Line.assemble("\n", before, (after, "bold")), soft_wrap=True)


@app.command()
def compare(
    text: Text,
    params: ParamsOption = DEFAULT_PARAMS,
    top_k: TopK = 3,
    max_tokens: MaxTokens = 20,
    chat: Chat = False,
    as_json: JsonOption = False,
    _device: DeviceOption = None,
) -> None:
    """Ask every variant of the project, side by side."""
    from cli.console import print_json, print_note, print_table
    from cli.project.report import warn_outdated
    from pipeline.data.tokenizers.chat_template import render
    from pipeline.inference.engine import continued, variant_folders
    from pipeline.inference.model_pool import ModelPool
    from pipeline.views.stages import outdated

    project = project_of(params)
    answers: dict[str, dict[str, Any]] = {}
    folders, trusted = variant_folders(project), project.params.origin.trust_remote_code
    for loaded in ModelPool().in_turn(folders, trusted):
        model_input = render(loaded.base, text) if chat else text
        if unknown := loaded.tokenizer.unknown_words(text):
            answers[loaded.name] = {"prompt": text, "unknown_words": unknown}
        else:
            answers[loaded.name] = _answer(
                loaded, text, model_input, top_k, continued(loaded, model_input, max_tokens)
            )
    answers = {name: answers[name] for name in folders}
    if not answers:
        raise UserError(f"There is no model yet. Run {project.command('pretrain')}.")
    if all("unknown_words" in answer for answer in answers.values()):
        words = ", ".join(next(reversed(answers.values()))["unknown_words"])
        raise UserError(
            f"No variant knows: {words}. Use words of the training data, or add them with "
            "expand_vocab."
        )
    stage_of = {}
    for name in answers:
        model_stage, adapter_stage = project.variants[name]
        stage_of[name] = adapter_stage or model_stage
    old = outdated(project, list(stage_of.values()))
    for name, answer in answers.items():
        answer["outdated"] = list(old.get(stage_of[name], ()))
    if names := [name for name in answers if answers[name]["outdated"]]:
        reasons = chain.from_iterable(answers[name]["outdated"] for name in names)
        verb = "is" if len(names) == 1 else "are"
        warn_outdated(project, f"{', '.join(names)} {verb}", list(dict.fromkeys(reasons)), old)
    if as_json:
        print_json(answers)
        return
    shown = min(top_k, MAX_COLUMNS)
    rows = []
    for name, answer in answers.items():
        if "unknown_words" in answer:
            cells, said = [], f"does not know: {', '.join(answer['unknown_words'])}"
        else:
            choices = answer["top_k"][:shown]
            cells = [
                f"{escape_whitespace(choice['token'])} {choice['probability']:.1%}"
                for choice in choices
            ]
            said = " ".join(answer["completion"].split())
        cells += [""] * (shown - len(cells))
        rows.append((name + " (outdated)" * bool(answer["outdated"]), *cells, said))
    print_table(("model", *(f"#{number}" for number in range(1, shown + 1)), "completion"), rows)
    if shown < top_k:
        print_note(f"The table shows {shown} candidates; --json has all.")


def _trained_in_template(model: Path) -> bool:
    """Whether a stage trained the model with plain prompts in the base's template."""
    from pipeline.files.artifact import read_manifest

    try:
        return bool(read_manifest(model)["params"]["chat_template"] != "none")
    except (UserError, KeyError, TypeError):
        return False


def _answer(
    loaded: "LoadedModel", text: str, model_input: str, k: int, completion: str
) -> dict[str, Any]:
    """The JSON answer. `model_input`: `text` in the chat template; `completion`: generated text."""
    from pipeline.inference import engine

    return {
        "prompt": text,
        "model": str(loaded.base),
        "adapter": str(loaded.adapter) if loaded.adapter else None,
        "top_k": [vars(choice) for choice in engine.top_k(loaded, model_input, k)],
        "completion": completion.strip(),
    }
