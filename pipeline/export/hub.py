"""Publish an export on the Hugging Face hub, with a completed card, in one commit."""

import re
import sys
import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from functools import partial
from logging import ERROR, getLogger
from os.path import exists  # Path.exists raises for a text too long for a name
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.errors import UserError, first_line
from pipeline.export.formats import FORMATS, Export, unnamed_base, write
from pipeline.files import artifact
from pipeline.files.base_model import CARD, HUB, parse_source
from pipeline.project.runner import Event, Note

# Files that an earlier push of another format may have left: transformers and PEFT would load them
# instead of the new ones.
REPLACED = (
    "*.safetensors",
    "*.index.json",
    "*.gguf",
    "adapter_config.json",
    "config.json",
    "certificate.json",
)
DATASET = re.compile(r"(\w[\w.-]{0,95}/)?\w[\w.-]{0,95}", re.ASCII)
# ISO 639, or the hub's two words
LANGUAGE = re.compile(r"[a-z]{2,3}(-\w{2,8})*|code|multilingual", re.ASCII)


class Publication(NamedTuple):
    """Where an export is published, and what its card says beside what files here know."""

    repository: str
    private: bool = False
    revision: str | None = None  # a branch; default: main
    license: str | None = None  # default: the base's
    datasets: Sequence[str] = ()  # hub ids
    languages: Sequence[str] = ()  # ISO 639 codes


def check(publication: Publication, form: str, export: Export, dry_run: bool) -> None:
    """Raises UserError for all that can be known before an export, which may take minutes."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    from pipeline.export.model_card import LICENSE

    try:
        validate_repo_id(publication.repository)
    except HFValidationError as error:
        raise UserError(
            f"{publication.repository!r} is not a valid name on the hub: {first_line(error)}"
        ) from None
    if publication.repository.count("/") != 1:
        raise UserError(
            "the repository must be org/name, or your user name/name, got "
            f"{publication.repository!r}."
        )
    for option, values, rule, example in (
        ("license", filter(None, [publication.license]), LICENSE, "apache-2.0"),
        ("dataset", publication.datasets, DATASET, "org/name"),
        ("language", publication.languages, LANGUAGE, "en"),
    ):
        for value in values:
            if not rule.fullmatch(value):
                raise UserError(
                    f"--{option} must be an identifier of the hub such as {example}, got {value!r}."
                )
    _refuse_unnamed_base(form, export, dry_run)
    if not dry_run:
        _refuse_unwritable(publication)


def _refuse_unnamed_base(form: str, export: Export, dry_run: bool) -> None:
    """Raises UserError for an adapter whose base others cannot find by its name."""
    if export.base_name:
        kind = None
        with suppress(UserError):
            kind = parse_source(export.base_name, Path()).kind
        if not dry_run and kind != HUB:
            raise UserError(
                f"--base-name must be a hub id such as org/name, got {export.base_name!r}, which "
                "is none, or a path here."
            )
        return
    is_adapter = FORMATS[form].relation == "adapter"
    if is_adapter and (reason := unnamed_base(export)):
        raise UserError(
            f"{export.adapter}: {reason}. Name the base on the hub with --base-name org/name, or "
            "push with --format merged."
        )


def _refuse_unwritable(publication: Publication) -> None:
    """Raises UserError without a valid token, and for a repository that holds something else."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import RepositoryNotFoundError

    if get_token() is None:
        raise UserError(
            "there is no token for the hub. Log in with `hf auth login`, or set HF_TOKEN."
        )
    api = HfApi()
    name = publication.repository
    with _reported(name):
        api.whoami()
        try:
            there = api.model_info(name)
        except RepositoryNotFoundError:
            return
    from pipeline.export.model_card import TAG

    files = {file.rfilename for file in there.siblings or ()} - {".gitattributes"}
    if files and TAG not in (there.tags or ()):
        raise UserError(
            f"{name} exists and was not pushed by lora: its files would be replaced. Choose "
            "another name."
        )
    if publication.private and not there.private:
        raise UserError(
            f"{name} exists and is public. Make it private in its settings, or push without "
            "--private."
        )


def prepare(
    form: str, export: Export, publication: Publication, folder: Path
) -> Generator[Event, None, list[str]]:
    """Write the export to `folder` with a completed card; returns the format's lines on its use.

    Raises UserError.
    """
    from pipeline.export.model_card import has_card

    sources = [export.adapter]
    with suppress(UserError):  # a format that needs a base refuses its lack
        sources.append(export.find_base())
    is_export = has_card(folder) and not (folder / artifact.MANIFEST).exists()
    artifact.refuse_other(folder, is_export, sources)
    with artifact.writing(folder) as out:
        # A card may name the folder, and a file of the export may have the same name.
        inner = out / ".new" / folder.name
        lines = yield from write(form, export, inner)
        yield from _complete_card(inner / CARD, export, publication)
        for path in list(inner.iterdir()):
            path.rename(out / path.name)
        inner.rmdir()
        inner.parent.rmdir()
    return [line.replace(str(inner), str(folder)) for line in lines]


def _complete_card(path: Path, export: Export, publication: Publication) -> Iterator[Note]:
    """Write the publication's facts into a card; notes what it still lacks."""
    from huggingface_hub import ModelCard

    opened = f'from_pretrained("{publication.repository}"'  # in place of the folder
    text = re.sub(r'from_pretrained\("(?:[^"\\]|\\.)*"', opened, path.read_text(encoding="utf-8"))
    name = publication.repository.rpartition("/")[2]
    completed = ModelCard(text.replace(f"\n# {export.adapter.resolve().name}", f"\n# {name}", 1))
    data: Any = completed.data
    if publication.license:
        data.license, data.license_name, data.license_link = publication.license.lower(), None, None
    if data.eval_results:
        data.model_name = name
    data.datasets = list(publication.datasets) or None
    data.language = list(publication.languages) or None
    completed.save(path)
    if not data.license:
        yield Note(
            "The card names no license: that of the base is unknown. Give one with --license."
        )
    if not data.base_model:
        yield Note(
            "The card names no base: it was not imported from the hub. Give its hub id with "
            "--base-name."
        )


def _refuse_paths(folder: Path) -> None:
    """Raises UserError for a config that names a path of this machine, as other tools write."""
    for path in sorted(folder.glob("*.json")):
        if path.name in ("tokenizer.json", "vocab.json"):  # words, and some look like paths
            continue
        waiting = [artifact.read_json(path, "Export it again")]
        while waiting:
            value: Any = waiting.pop()
            if isinstance(value, dict | list):
                waiting += value.values() if isinstance(value, dict) else value
                continue
            is_path = isinstance(value, str) and len(value) > 1 and Path(value).is_absolute()
            if is_path and exists(value):  # noqa: PTH110
                raise UserError(
                    f"{path.name} names a path of this machine: {value}. Remove it where it comes "
                    "from."
                )


def files_of(folder: Path) -> dict[str, int]:
    """Name → size in bytes of each file that is sent."""
    return {
        p.relative_to(folder).as_posix(): p.stat().st_size
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def upload(folder: Path, publication: Publication) -> Generator[Event, None, str]:
    """Send the files of `folder` in one commit; returns its URL. Raises UserError."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    _refuse_paths(folder)
    api = HfApi()
    sent = files_of(folder)
    name, branch = publication.repository, publication.revision
    with _reported(name), warnings.catch_warnings(record=True) as warned:
        api.create_repo(name, private=publication.private or None, exist_ok=True)
        if branch:
            api.create_branch(name, branch=branch, exist_ok=True)
        there = [file for file in api.list_repo_files(name, revision=branch) if file not in sent]
        stale = [file for file in there if any(map(partial(fnmatchcase, file), REPLACED))]
        operations: list[Any] = [CommitOperationDelete(file) for file in stale]
        operations += [CommitOperationAdd(file, folder / file) for file in sent]
        commit = api.create_commit(
            name, operations, commit_message="Push from lora-workbench", revision=branch
        )
    # the hub's warnings about the card
    yield from (Note(" ".join(str(warning.message).split())) for warning in warned)
    return str(commit.commit_url)


@contextmanager
def _reported(repository: str) -> Iterator[None]:
    """Raise whatever goes wrong on the way to the hub as one UserError."""
    from huggingface_hub.constants import ENDPOINT
    from huggingface_hub.errors import OfflineModeIsEnabled
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    getLogger("huggingface_hub").setLevel(ERROR)  # each of its retries is a warning
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        yield
    except OfflineModeIsEnabled:
        raise UserError(
            "the hub is switched off by HF_HUB_OFFLINE. Unset it, or add --dry-run --out DIR."
        ) from None
    # errors of huggingface_hub, its HTTP client and its storage have no common base class
    except Exception as error:
        status = _status_of(error)
        reason = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
        namespace = repository.partition("/")[0]
        explained = {
            401: (
                "the hub rejects the token (401). Log in again with `hf auth login`, or set "
                "another HF_TOKEN"
            ),
            403: (
                f"the token may not write to {repository} (403). Use one that may, or a name "
                f"outside {namespace}"
            ),
            404: f"{repository}, or the branch, is not there (404). Check the name and --revision",
            409: (
                f"{repository} was changed by another commit at the same time (409). Run the same "
                "command again"
            ),
            429: (
                "the hub gets too many requests from here (429). Run the same command again in "
                "some minutes"
            ),
        }
        if status in explained:
            message = explained[status]
        elif status is not None and status >= 500:
            message = (
                f"the hub failed ({status}), nothing was committed. Run the same command again "
                "later"
            )
        # a rule of the hub for cards, names or sizes
        elif status is not None or type(error) is ValueError:
            message = f"the hub rejects {repository}: {reason}"
        else:
            message = (
                f"the push to {ENDPOINT} failed ({reason}). Check the connection and run the same "
                "command again"
            )
        raise UserError(f"{message}.") from None


def _status_of(error: BaseException | None) -> int | None:
    """The HTTP status in an error, or in what caused it."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
        error = error.__cause__
    return None
