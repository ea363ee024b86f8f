"""A Hugging Face `config.json`, its values checked as they are read."""

from collections.abc import Mapping
from typing import Any

from pipeline.errors import UserError

LARGEST = 2**31 - 1  # no dimension of a tensor that a GPU holds is larger
MOST_LAYERS = 10_000


class Config:
    """What `source` says; errors name it, the key, the rule and the value. A missing value is the family's default."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self._values, self.source = values, source

    def size(self, *keys: str, default: int | None = None, most: int = LARGEST) -> int:
        """A whole number from 1 to `most`, under the first of `keys` that is there."""
        for key in keys:
            value = self._values.get(key)
            if value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
                raise UserError(f"{self.source}: {key} must be a whole number from 1 to {most:,}, got {_short(value)}.")
            return value
        if default is None:
            raise UserError(f"{self.source}: {keys[0]} is missing, and the shapes depend on it.")
        return default

    def flag(self, key: str, default: bool) -> bool:
        value = self._values.get(key)
        if value is not None and not isinstance(value, bool):
            raise UserError(f"{self.source}: {key} must be true or false, got {_short(value)}.")
        return default if value is None else value

    def share(self, key: str, default: float) -> float:
        """A number above 0 and up to 1."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
            raise UserError(f"{self.source}: {key} must be more than 0 and at most 1, got {_short(value)}.")
        return float(value)

    def layers(self, key: str, count: int) -> set[int]:
        """Numbers of layers."""
        value = self.get(key, [])
        good = isinstance(value, list) and all(type(n) is int and 0 <= n < count for n in value)
        if not good:
            raise UserError(f"{self.source}: {key} must list layers from 0 to {count - 1}, got {_short(value)}.")
        return set(value)

    def is_null(self, key: str) -> bool:
        """Whether the config switches `key` off, which is not the same as being silent."""
        return key in self._values and self._values[key] is None

    def get(self, key: str, default: Any = None) -> Any:
        value = self._values.get(key)
        return default if value is None else value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
