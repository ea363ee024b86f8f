"""transformers, which loads an adapter by its own code with PEFT's layers."""

from pipeline.certify.engines import Engine, is_before, pinned


def _requirements(version: str | None) -> tuple[str, ...]:
    peft = "peft<0.19" if is_before(version, 5) else "peft"
    return pinned("transformers", version), peft


# adapters never in this Python: a transformers may need a newer PEFT than is here
ENGINE = Engine(2, _requirements, "transformers_models.py", lambda kind: kind != "adapter")
