"""Fixtures: the app on a project, with the user's config and state in a temporary home."""

from pathlib import Path

import pytest

from tests.support import new_project


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where config and state are: nothing of the developer's own is read or written."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("COLORFGBG", raising=False)
    return tmp_path


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    """A project of which nothing is made yet."""
    return new_project(tmp_path / "empty")


@pytest.fixture
def no_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bar shows the same folder on every machine: for pictures."""
    monkeypatch.setattr("tui.app._short", lambda _: "~/project")
