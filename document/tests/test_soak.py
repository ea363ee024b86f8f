"""Studies that are killed at any moment leave what they leave undisturbed."""

from functools import partial
from pathlib import Path

import pytest
from tests.lab_projects import GIVEN, new_project

from tests.journeys import soak


@pytest.mark.slow
def test_killed_anywhere_a_study_ends_with_the_same_bytes(tmp_path: Path) -> None:
    build = partial(soak.build_models, new=new_project, given=GIVEN)
    rows = soak.run(tmp_path, 6, 0, ("study_trajectory", "study_spectrum", "figures"), build=build)
    assert [problem for row in rows for problem in row.all_problems] == []
    assert sum(len(row.kills) for row in rows) == 6
