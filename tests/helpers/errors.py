"""Errors that are meant for the user."""

from collections.abc import Callable
from typing import Any

import pytest

from pipeline.errors import UserError


def user_error(call: Callable[..., object], *arguments: Any, **options: Any) -> str:
    """The message, of one line, of the UserError that a call raises."""
    with pytest.raises(UserError) as error:
        call(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)
