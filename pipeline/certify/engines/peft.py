"""PEFT, on the transformers of its time."""

from pipeline.certify.engines import Engine, has, is_before, pinned


def _requirements(version: str | None) -> tuple[str, ...]:
    # PEFT 0.18 is the first that knows transformers 5
    transformers = "transformers<5" if is_before(version, 0, 19) else "transformers"
    return pinned("peft", version), transformers


ENGINE = Engine(
    1, "PEFT on transformers", _requirements, "transformers_models.py", lambda: has("peft")
)
