"""The journal of a run: how long it took, and how long it will take."""

from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.project.logs import run_state
from pipeline.project.logs.run_state import Journal, Writer, writing


class Clock:
    """Time as a test moves it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr("pipeline.project.logs.run_state.time.time", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def progress(
    writer: Writer, clock: Clock, seconds: float, total: int, start: int, end: int
) -> None:
    """Do the units from `start` to `end`, each in `seconds`."""
    for done in range(start, end + 1):
        writer.progress(done, total, "")
        clock.now += seconds


def read_journal(folder: Path) -> Journal:
    journal = run_state.read(folder)
    assert journal is not None
    return journal


def test_a_slow_start_does_not_spoil_the_estimate(tmp_path: Path, clock: Clock) -> None:
    """Ten units of 5 s, then units of 0.1 s: the mean of the run would say 53 s for what takes 20
    s.
    """
    with writing(tmp_path) as writer:
        progress(writer, clock, 5.0, 500, 0, 9)
        progress(writer, clock, 0.1, 500, 10, 300)
        eta = read_journal(tmp_path).eta
    assert eta is not None and 19 < eta < 30


def test_nothing_is_estimated_in_the_first_seconds_of_a_first_run(
    tmp_path: Path, clock: Clock
) -> None:
    with writing(tmp_path) as writer:
        progress(writer, clock, 0.3, 100, 0, 3)
        assert read_journal(tmp_path).eta is None
        progress(writer, clock, 0.3, 100, 4, 20)
        assert read_journal(tmp_path).eta == pytest.approx(80 * 0.3, rel=0.2)


def test_the_run_before_is_the_estimate_until_this_one_knows_better(
    tmp_path: Path, clock: Clock
) -> None:
    with writing(tmp_path) as writer:
        progress(writer, clock, 1.0, 100, 0, 100)
    assert read_journal(tmp_path).pace == pytest.approx(100 / 101, rel=0.01)
    with writing(tmp_path) as writer:
        progress(writer, clock, 0.5, 50, 0, 1)  # of other length: what counts is the time of a unit
        assert read_journal(tmp_path).eta == pytest.approx(49, rel=0.05)
        progress(writer, clock, 0.5, 50, 2, 40)
        eta = read_journal(tmp_path).eta
    # 10 units of 0.5 s, and a fifth of the weight on the run before
    assert eta is not None and 5 <= eta <= 7


def test_a_run_that_does_nothing_keeps_the_pace_of_the_one_before(
    tmp_path: Path, clock: Clock
) -> None:
    with writing(tmp_path) as writer:
        progress(writer, clock, 0.5, 10, 0, 10)
    pace = read_journal(tmp_path).pace
    with writing(tmp_path):  # its result is taken from the cache
        clock.now += 0.2
    assert read_journal(tmp_path).pace == pace
    assert read_journal(tmp_path).seconds == pytest.approx(0.2)


def test_another_kind_of_work_is_estimated_by_itself(tmp_path: Path, clock: Clock) -> None:
    with writing(tmp_path) as writer:
        progress(writer, clock, 0.01, 1000, 0, 1000)
        progress(writer, clock, 2.0, 10, 0, 5)
        assert read_journal(tmp_path).eta == pytest.approx(5 * 2.0, rel=0.3)


@pytest.mark.parametrize("error", [UserError("x"), KeyboardInterrupt()], ids=["failed", "stopped"])
def test_how_long_a_run_took_is_known_however_it_ended(
    tmp_path: Path, clock: Clock, error: BaseException
) -> None:
    with pytest.raises(type(error)), writing(tmp_path):
        assert read_journal(tmp_path).seconds is None
        clock.now += 7
        raise error
    assert read_journal(tmp_path).seconds == pytest.approx(7)


def test_a_path_that_is_not_utf_8_in_an_error_leaves_the_error_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="missing"), writing(tmp_path):
        raise UserError("\udcff is missing")
    assert read_journal(tmp_path).message == "? is missing"


def test_a_journal_that_an_older_version_wrote_is_read(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(
        '{"state": "done", "pid": 1, "started": 5.0, "done": 3, "total": 3}'
    )
    journal = read_journal(tmp_path)
    assert (journal.eta, journal.seconds, journal.pace) == (None, None, 0.0)
