"""A list of lines that each belong to a key and change while they are shown."""

from collections.abc import Mapping
from typing import Any

from rich.text import Text
from textual.widgets import OptionList
from textual.widgets.option_list import Option


class KeyedList(OptionList):
    """Option ids are the keys. `show` touches only the lines that changed, so the cursor and the scroll offset stay."""

    DEFAULT_CSS = """
    KeyedList { height: auto; border: none; padding: 0; }
    KeyedList:focus { border: none; }
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(compact=True, **options)
        self._prompts: dict[str, Text] = {}

    def show(self, prompts: Mapping[str, Text], fallback: str = "") -> None:
        """Show these lines. The highlight stays on its key, or moves to `fallback`, or stays at its index."""
        before, self._prompts = self._prompts, dict(prompts)
        if list(before) == list(prompts):
            for key, prompt in prompts.items():
                if prompt != before[key]:
                    self.replace_option_prompt(key, prompt)
            return
        option, index, keys = self.highlighted_option, self.highlighted or 0, list(prompts)
        if option is not None:
            index = next((keys.index(key) for key in (str(option.id), fallback) if key in prompts), index)
        self.set_options(Option(prompt, id=key) for key, prompt in prompts.items())
        self.highlighted = min(index, len(keys) - 1) if keys else None
