"""TRL, which opens an adapter to train it further, or to prefer answers by it."""

from pipeline.certify.engines import Engine, has, pinned


def _requirements(version: str | None) -> tuple[str, ...]:
    return pinned("trl", version), "peft", "datasets"


ENGINE = Engine(3, _requirements, "transformers_models.py", lambda _: has("trl", "peft"))
