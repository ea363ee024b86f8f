"""Runs in numbers: a pace, values of three digits."""

import pytest

from pipeline.project.logs.run_log import Telemetry
from pipeline.views.series import METRICS, Cost, Log


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("loss", 0.015849, "0.0158"),
        ("tokens_per_second", 6812.3, "6,810"),
        ("memory", 2**20, "1.00 MiB"),
    ],
    ids=["loss", "pace", "memory"],
)
def test_a_value_has_three_digits(name: str, value: float, said: str) -> None:
    assert METRICS[name].format(value) == said


def cost(rows: list[Telemetry], tokens: int = 16) -> Cost:
    log, result = Log(0.0), Cost(0.0)
    log.extend([(row.step, 1, 1.0, 1.0, 1.0, row.step * tokens) for row in rows])
    result.extend(rows, log)
    return result


def row(step: int, seconds: float, measured: int = 0) -> Telemetry:
    return Telemetry(step, seconds, 0.0, 1, 0, measured)


def test_the_pace_is_that_of_each_step_and_not_the_mean_since_the_start() -> None:
    result = cost([row(1, 9.0), row(2, 9.5), row(3, 10.0), row(4, 14.0)])
    assert list(result.series["tokens_per_second"].y) == [32.0, 32.0, 4.0]
    assert result.seconds_per_step is None, "three steps say too little"


def test_a_resumed_run_starts_its_clock_anew() -> None:
    result = cost(
        [*(row(n, n * 2.0) for n in range(1, 8)), *(row(n, n - 7.0) for n in range(8, 20))]
    )
    assert result.seconds_per_step == 1.0
    assert 7.0 not in result.series["tokens_per_second"].x[7:8]


def test_memory_is_what_was_measured() -> None:
    assert list(cost([row(1, 1.0), row(2, 2.0, 7), row(3, 3.0, 9)]).series["memory"].y) == [
        7.0,
        9.0,
    ]
