"""Where LORA_STAND_IN says cuda, these tests run on a CUDA device without numbers."""

from collections.abc import Iterator
from functools import cache

import pytest

from pipeline.models import nf4
from pipeline.models.kernels import accelerator_attention, plain_attention
from tests.helpers.cuda_device import FakeCudaDevice
from tests.helpers.stand_in import STAND_IN


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if STAND_IN.type == "meta":
        yield
        return
    # tables are made once, fake ones too: all of a test are of one mode
    monkeypatch.setattr(nf4, "on_device", cache(nf4.on_device))
    for table in (accelerator_attention._seen, plain_attention.sequence_starts):
        monkeypatch.setattr(table, "__wrapped__", table)
        table.cache_clear()
    with FakeCudaDevice():
        yield
