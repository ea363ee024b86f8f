"""The program's fixtures, with the document's projects in place of the program's.

Run these tests by themselves: `pytest document/tests`. The program's own run without extensions.
"""

import os
import sys

import pytest

if "tests.helpers.projects" in sys.modules:
    raise pytest.UsageError(
        "Run `pytest document/tests` by itself: the program's tests have begun."
    )
os.environ["LORA_NO_EXTENSIONS"] = ""
pytest.register_assert_rewrite("tests.conftest")

from tests.lab_projects import brief, finished, houses, project, studied  # noqa: E402, F401

pytest_plugins = ("tests.conftest",)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that ask for `studied` are slow and run in one worker: the others would wait for it."""
    for item in items:
        if "studied" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("studied"))
            item.add_marker(pytest.mark.slow)
