"""PEFT, on the transformers of its time."""

from pipeline.certify.engines import Engine, has, is_before, pinned


def _requirements(version: str | None) -> tuple[str, ...]:
    # transformers 5 came with PEFT 0.19
    transformers = "transformers<5" if is_before(version, 0, 19) else "transformers"
    return pinned("peft", version), transformers


ENGINE = Engine(1, _requirements, "transformers_models.py", lambda _: has("peft"))
