"""Sizes are shown in one unit per column, with one minus sign and as many digits as mean
something.
"""

import pytest

from tui.screens.calculator.units import format_count_change, percent, short_count, unit_of

KIB, MIB, GIB = 2**10, 2**20, 2**30


@pytest.mark.parametrize(
    ("sizes", "shown"),
    [
        ([20 * GIB, 5 * MIB, 0, 1], ["20.00", "<0.01", "0", "<0.01"]),
        ([900 * MIB, 3 * MIB], ["900.00", "3.00"]),
        ([50 * MIB, 512], ["50.00", "<0.01"]),
        ([3 * KIB, 512], ["3.00", "0.50"]),
        ([20_000 * GIB, GIB], ["20,000.00", "1.00"]),
    ],
    ids=["gib", "below-one-gib", "mib", "kib", "huge"],
)
def test_a_column_has_one_unit(sizes: list[int], shown: list[str]) -> None:
    unit = unit_of(sizes)
    assert [unit.format(size) for size in sizes] == shown


def test_numbers_are_short_and_have_one_minus_sign() -> None:
    unit = unit_of([4 * GIB])
    assert [unit.format_change(size) for size in (GIB, -GIB, 0)] == ["+1.00", "−1.00", "0"]
    assert [format_count_change(count) for count in (1200, -1200, 0)] == ["+1,200", "−1,200", "0"]
    assert [short_count(n) for n in (8_190_735_360, 134_515_008, 26_000, 12)] == [
        "8.19 B",
        "135 M",
        "26 k",
        "12",
    ]
    shares = {
        0.00093614: "0.0936%",
        0.123456: "12.3%",
        1: "100%",
        0.025: "2.5%",
        1e-8: "1e-06%",
        0: "0%",
        10.5: "1,050%",
    }
    assert {share: percent(share) for share in shares} == shares
