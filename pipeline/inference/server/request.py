"""Validated access to the fields of a request."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

MAX_INTEGER = 2**62


class Request:
    """Fields by name. Every getter raises UserError with the field, the rule and the value."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self._fields = fields

    def text(self, key: str) -> str:
        value = self._fields.get(key)
        if not isinstance(value, str):
            raise UserError(f"{key} must be a string, got {value!r}.")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise UserError(f"{key} must be valid Unicode, got an unpaired surrogate.") from None
        return value

    def path(self, key: str) -> Path:
        text = self.text(key)
        if "\0" in text:
            raise UserError(f"{key} must be a path without NUL, got {text!r}.")
        return Path(text)

    def optional_path(self, key: str) -> Path | None:
        return None if self._fields.get(key) is None else self.path(key)

    def names(self, key: str) -> list[str]:
        value = self._fields.get(key)
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise UserError(f"{key} must be a list of names, got {value!r}.")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        """A non-negative integer."""
        value = self._value(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_INTEGER:
            raise UserError(f"{key} must be a whole number from 0, got {value!r}.")
        return value

    def number(self, key: str, default: float) -> float:
        return _number(key, self._value(key, default))

    def strength(self, name: str | None = None) -> float:
        """An adapter's strength, 0 to 2, default 1. With `name`, its entry in a mapping of strengths by model."""
        value = self._value("strength", 1.0 if name is None else {})
        if name is not None:
            if not isinstance(value, dict):
                raise UserError(f"strength must map models to numbers, got {value!r}.")
            value = value.get(name, 1.0)
        strength = _number("strength", value)
        if not 0 <= strength <= 2:
            raise UserError(f"strength must be from 0 to 2, got {value!r}.")
        return strength

    def flag(self, key: str) -> bool:
        """A boolean, default False."""
        value = self._value(key, False)
        if not isinstance(value, bool):
            raise UserError(f"{key} must be true or false, got {value!r}.")
        return value

    def _value(self, key: str, default: Any) -> Any:
        value = self._fields.get(key)
        return default if value is None else value


def _number(key: str, value: Any) -> float:
    try:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    except OverflowError:
        pass
    raise UserError(f"{key} must be a number, got {value!r}.")
