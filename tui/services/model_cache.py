"""What was read and measured of models, kept between starts while their files stay."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.inference.catalog import Model, VerificationResult

MAX_ENTRIES = 20_000  # of the store in a file, about 10 MB


def model_facts(model: Model) -> dict[str, Any]:
    """A model without its path."""
    return {key: value for key, value in asdict(model).items() if key != "path"}


def model_of(path: Path, facts: Mapping[str, Any]) -> Model | None:
    """The model with these facts; None if they are damaged."""
    with suppress(TypeError, KeyError):
        return Model(path=path, **{**facts, "targets": tuple(map(str, facts["targets"]))})
    return None


def verdict_of(facts: Mapping[str, Any]) -> VerificationResult | None:
    """The verdict with these facts; None if they are damaged."""
    with suppress(TypeError):
        return VerificationResult(**facts)
    return None
