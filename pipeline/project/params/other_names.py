"""Params files and overrides with other tools' names, read by ours.

What has no counterpart here is ignored where it changes no result, and an error where it does.
"""

from collections.abc import Collection, Mapping
from typing import Any

from pipeline.errors import UserError
from pipeline.project.params.aliases import IGNORED, IMPLIED, KEYS, why_none
from pipeline.project.params.conversions import SAME, Why, translated
from pipeline.project.params.schema import Section, ValueSource, check_value, hints

Tree = Mapping[Any, Any]


class OtherNames:
    """Reads trees of sections, keys and values; remembers what it took and what it ignored.

    `kinds`: name → class of a section. `above`: keys that stand above the sections.
    """

    def __init__(self, kinds: Mapping[str, type[Section]], above: Collection[str]) -> None:
        self._kinds, self._above = kinds, above
        self.spelled: dict[str, str] = {}  # our section or key → as it is written
        self._taken: dict[str, str] = {}  # as it is written → ours, with a value that is another
        self._ignored: dict[str, list[str]] = {}  # why → as it is written

    def read(self, tree: Tree, origin: ValueSource, below: Tree | None = None) -> dict[str, Any]:
        """The tree by our names; `below`: one by our names that it overrides.

        Unknown names stay. Raises UserError for a setting that cannot be taken.
        """
        result: dict[str, Any] = {}
        for written, value in tree.items():
            name = self._ours_above(written, value)
            if name in self._above:
                text = name if name != written else ""
                self._put(result, name, value, name, written, origin, text)
            elif name in self._kinds and (value is None or isinstance(value, dict)):
                if name in result:
                    raise UserError(
                        f"{origin.of(written)}: {written} is {name} here, which is there too. Put "
                        "the keys of both into one section."
                    )
                if name != written:
                    self._note(name, written, name)
                section_below = (below or {}).get(name) or {}
                self._read_section(result, name, written, value or {}, origin, section_below)
            elif name in self._kinds or not self.ignores(written, written):
                self._refuse_alone(name, value, origin)
                result[name] = value
        return result

    def ignores(self, key: Any, path: Any) -> bool:
        """Whether a key has no counterpart and changes no result; the note then says why."""
        why = why_none(str(key), IGNORED)
        if why:
            self._ignored.setdefault(why, []).append(str(path))
        return why is not None

    def ours(self, key: Any) -> Any:
        """Our name of a key; the key itself if it has no other."""
        return KEYS.get(key, key)

    @property
    def note(self) -> str:
        """What was taken and what was ignored, in one line; empty if there was neither."""
        parts, before = list[str](), None
        for written, ours in self._taken.items():
            section, _, key = written.rpartition(".")
            name = key if section == before else written
            parts.append(f"{name} {ours}" if parts else f"{name} is {ours} here")
            before = section or written
        texts = [f"{', '.join(parts)}: taken."] * bool(parts)
        texts += [f"{', '.join(paths)} ignored: {why}." for why, paths in self._ignored.items()]
        return " ".join(texts)

    def _refuse_alone(self, key: Any, value: Any, origin: ValueSource) -> None:
        """Raises UserError for a section's key above the sections, as other tools have it."""
        is_key = self.ours(key) != key or key in hints(self._kinds["training"])
        if is_key and value is not None and not isinstance(value, dict):
            raise UserError(
                f"{origin.file}: {key} stands above the sections. Put it into one, such as "
                f"finetune_lora; of another tool's config `lora new DIR --from {origin.file}` "
                "makes a project."
            )

    def _ours_above(self, written: Any, value: Any) -> Any:
        """Our name of a section, or of a key above the sections; `written` if there is no other."""
        ours = KEYS.get(written)
        is_section = ours in self._kinds and (value is None or isinstance(value, dict))
        is_other = written not in self._kinds and (is_section or ours in self._above)
        return ours if is_other else written

    def _read_section(
        self,
        result: dict[str, Any],
        section: str,
        written: str,
        keys: Tree,
        origin: ValueSource,
        below: Tree,
    ) -> None:
        types, values = hints(self._kinds[section]), dict[Any, Any]()
        result[section] = values
        for theirs, value, ours, converted in translated(keys, section):
            path, key = f"{written}.{theirs}", f"{section}.{ours}"
            if ours in self._above and (ours != theirs or key in KEYS):
                self._put(result, ours, value, ours, path, origin, ours)
            elif ours not in types or ours in self._above:
                if converted is None and theirs in SAME:
                    self._ignored.setdefault("it is always so here", []).append(path)
                elif not self.ignores(theirs, path):
                    values[theirs] = value  # unknown
            elif theirs == ours and (
                isinstance(converted, Why)
                or converted == value
                or (converted is None and type(value) is not int)
                or _fits(types[ours], value)
            ):
                self._put(values, ours, value, key, path, origin)
            elif isinstance(converted, Why):
                raise UserError(
                    f"{origin.of(path)}: {path} cannot be taken: {converted}. Change or remove it."
                )
            elif converted is None and not _fits(types[ours], value):
                if ours in below:
                    raise UserError(f"--set {path}: {value} sets nothing here. Set {key}.")
                self._ignored.setdefault("it sets nothing", []).append(path)
            else:
                new = value if converted is None else converted
                text = ours if theirs != ours or new == value else ""
                if new != value:
                    text = f"{text} {new}".replace("'", "").strip()
                check_value(types[ours], new, path, origin)
                self._put(values, ours, new, key, path, origin, text)
        for key, value in IMPLIED.get(written, {}).items():
            if key not in values and key not in below:
                values[key] = value
                self._taken[written] += f" with {key} {value}"

    def _put(
        self,
        values: dict[Any, Any],
        key: str,
        value: Any,
        ours: str,
        path: str,
        origin: ValueSource,
        text: str = "",
    ) -> None:
        """Set a key, unless another name of it stands there; two of theirs may say the same.

        `text`: our name, and a value that is another; empty for our own key.
        """
        if key in values:
            other = self.spelled.get(ours, ours)
            if not text or ours not in self.spelled or values[key] != value:
                raise UserError(
                    f"{origin.of(path)}: {other} and {path} are both {key}. Remove one of them."
                )
        values[key] = value
        if text:
            self._note(ours, path, text)

    def _note(self, ours: str, written: str, text: str) -> None:
        self.spelled[ours] = written
        self._taken[written] = text


def _fits(rule: Any, value: Any) -> bool:
    try:
        check_value(rule, value, "", ValueSource(""))
    except UserError:
        return False
    return True
