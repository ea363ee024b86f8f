"""transformers, which loads an adapter by its own code with PEFT's layers."""

from pipeline.certify.engines import Engine, is_before, pinned


# A transformers may need a newer PEFT than the one here: an environment finds out.
def _requirements(version: str | None) -> tuple[str, ...]:
    peft = "peft<0.19" if is_before(version, 5) else "peft"
    return pinned("transformers", version), peft


ENGINE = Engine(
    2, "transformers' load_adapter", _requirements, "transformers_models.py", lambda: False
)
