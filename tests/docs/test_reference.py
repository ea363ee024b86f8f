"""The generated reference has what the program has: every option, column, manifest key and
message.
"""

import csv
import re
from pathlib import Path

from docs.generators.errors import pages as error_pages
from docs.generators.files import LOGGED, MANIFEST_KEYS
from docs.generators.keys import pages as key_pages
from pipeline.files.artifact import MANIFEST, read_manifest
from pipeline.project.logs.run_log import LOSS, TELEMETRY
from tests.conftest import Lora
from tests.helpers.projects import ROOT
from tests.journeys.command_lines import commands


def section(page: str, heading: str) -> str:
    """The text below a heading, up to the next."""
    (text,) = re.findall(
        rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", page, re.MULTILINE | re.DOTALL
    )
    return str(text)


def test_the_page_of_commands_has_every_option_below_its_command() -> None:
    page = (ROOT / "docs/reference/commands.md").read_text(encoding="utf-8")
    for path, parameters in commands():
        text = section(page, " ".join(("lora", *path)))
        shown = [each for each in parameters if each.param_type_name == "option"]
        assert all(f"`{name}" in text for each in shown for name in each.opts), path


def test_the_page_of_files_has_every_key_of_a_manifest_and_every_column_of_a_log(
    project: Path,
) -> None:
    manifests = [read_manifest(path.parent) for path in project.glob(f"artifacts/**/{MANIFEST}")]
    trained = next(each for each in manifests if each["stage"] == "finetune_lora")
    assert trained.keys() == MANIFEST_KEYS.keys()
    of_each = [key for key in MANIFEST_KEYS if key not in ("base", "parameters")]
    assert all(each.keys() >= set(of_each) for each in manifests)
    logs = [*project.glob(f"artifacts/**/{LOSS}"), *project.glob(f"runs/**/{TELEMETRY}")]
    assert len(logs) > 3
    for log in logs:
        with log.open(encoding="utf-8") as file:
            assert set(next(csv.reader(file))) <= LOGGED.keys(), log


def test_a_message_of_the_program_is_on_the_page_of_errors_with_names_for_its_values(
    cli: Lora, tmp_path: Path
) -> None:
    page = (ROOT / "docs/reference/errors.md").read_text(encoding="utf-8")
    templates = {
        "--price "
        "1": "--price needs --tokens: a cost is hours times a price. Add --tokens, such as 5M.",
        "--fit -1": "OPTION takes GiB of memory, which must be more than 0 and below 1,048,576, "
        "got GIB.",
        "--gpus "
        "many": "gpus must be a number up to MOST and a GPU, such as 8xH100 or 4x24GB, got TEXT.",
    }
    for options, template in templates.items():
        assert f"- `{template}` in [`" in page
        code, _, shown = cli("calc", *options.split(), cwd=tmp_path)
        pattern = re.sub("OPTION|GIB|MOST|TEXT", ".+", re.escape(template))
        assert code == 1 and re.fullmatch(f"error: {pattern}", " ".join(shown.split()))


def test_messages_without_a_word_of_their_own_are_left_out_and_constants_are_written_out() -> None:
    page = error_pages()["reference/errors.md"]
    assert "Merge it with `litgpt merge_lora`" in page and "- `ERROR` in" not in page


def test_each_key_with_a_name_is_on_the_page_of_keys_once_in_each_pane() -> None:
    rows = [
        line
        for line in key_pages()["reference/keys.md"].splitlines()
        if re.search(r"`\w+\.\w+` \|$", line)
    ]
    assert len(rows) == len(set(rows)) > 100
    assert "| `1` `F2` | Go to Pipeline | `app.pipeline` |" in rows
