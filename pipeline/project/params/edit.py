"""Change values in params.yaml without touching comments, order and layout."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import UserError
from pipeline.files.artifact import write_file
from pipeline.project.params.load import TOP_LEVEL, Kinds, parse, read_text
from pipeline.project.params.schema import Section
from pipeline.project.params.sections import Training


def save(path: Path, values: Mapping[str, Any], kinds: Kinds) -> None:
    """Set `section.key` → value in the file atomically; `kinds` as in `load.parse`.

    Raises UserError if the file is invalid before or after, and OSError if it cannot be written.
    Then it is unchanged.
    """
    path = path.resolve()  # so that a symlink is kept
    write_file(path, edited(path, values, kinds), durable=True)


def edited(path: Path, values: Mapping[str, Any], kinds: Kinds) -> str:
    """The text of the file with new values, as `save` writes it. Raises UserError as `save`."""
    text = read_text(path)
    params = parse(text, path, kinds)
    new = set_values(text, values, params.as_written)
    parse(new, path, kinds)  # what the values' own rules or the layout do not allow
    return new


def set_values(text: str, values: Mapping[str, Any], as_written: Callable[[str], str] = str) -> str:
    """The valid params file `text` with new values, by `section.key` or key above the sections.

    `as_written`: such a path → its name in the text. A name of another tool's that says the value
    too, as load_in_4bit, is replaced by ours. Raises UserError if the layout does not allow it.
    """
    # Edited as text, by the marks where PyYAML found each value: it would write the whole file
    # anew, and the user's comments and layout would be gone.
    for ours, value in values.items():
        key = as_written(ours)
        section, _, name = key.partition(".")
        root: Any = yaml.compose(text)  # again for each: an edit moves all that is below it
        text = (
            _set(text, root, section, name, value) if name else _set_above(text, root, key, value)
        )
        ours = ours.rpartition(".")[2]
        if name and name != ours:
            from pipeline.project.params.other_names import CONVERSIONS, NAMES

            if ours in CONVERSIONS or ours in NAMES:
                text = _rename(text, section, name, ours)
    return text


def comments(text: str) -> dict[str, str]:
    """`section.key`, or key above the sections → what a params file says of it.

    That is the comment on its line, else the comment lines directly above it. There are none of a
    file that is not valid YAML.
    """
    try:
        root = yaml.compose(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, RecursionError):
        return {}
    lines, by_key = text.splitlines(), dict[str, str]()

    def read(prefix: str, node: yaml.Node | None) -> None:
        for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
            first, column = key.start_mark.line, key.start_mark.column
            # A comment follows the value if that ends on the key's line, else it follows the key.
            is_inline = value.start_mark.line == first
            end = value.end_mark if is_inline and value.end_mark.line == first else key.end_mark
            _, mark, comment = lines[first][end.column :].partition(" #")
            if not mark:
                above = first
                while above and lines[above - 1].startswith(f"{' ' * column}#"):
                    above -= 1
                comment = " ".join(line.strip(" #") for line in lines[above:first])
            if comment.strip():
                by_key[f"{prefix}{key.value}"] = comment.strip()
            if not prefix:
                read(f"{key.value}.", value)

    read("", root)
    return by_key


def remove_section(text: str, section: str) -> str:
    """`text` without a section and its trailing comments."""
    keep, remaining = True, []
    for line in text.splitlines(keepends=True):
        if line[0] not in " \t\r\n#":
            keep = line.partition(":")[0] != section
        if keep:
            remaining.append(line)
    return "".join(remaining)


def section_text(name: str, kind: type[Section], on_pretrained: bool = False) -> str:
    """A new section as text for params.yaml.

    It has the section's own keys, and shared keys of all training stages if their default differs
    here. On a pretrained base it has only its data: all else follows from the base.
    """
    default, shared = kind(), Training()
    lines = []
    for key in kind.__struct_fields__:
        value = getattr(default, key)
        is_shared = hasattr(shared, key) and value == getattr(shared, key)
        if key == "data" or not (key in TOP_LEVEL or is_shared or on_pretrained):
            lines.append(f"  {key}: {dump_inline(value)}\n")
    return f"{name}:\n{''.join(lines)}" if lines else f"{name}: {{}}\n"


def _set(text: str, root: yaml.MappingNode, section: str, name: str, value: Any) -> str:
    branch = _child(root, section)
    if branch is None:
        return f"{text.rstrip()}\n\n{section}:\n  {name}: {dump_inline(value)}\n"
    # `section:`, `section: null`, `section: {}`
    if not isinstance(branch, yaml.MappingNode) or not branch.value:
        return (
            f"{text[: branch.start_mark.index].rstrip(' ')}\n  {name}: "
            f"{dump_inline(value)}{text[_end(text, branch) :]}"
        )
    leaf = _child(branch, name)
    if leaf is not None:
        return _replace_node(text, leaf, value)
    if branch.flow_style:
        raise UserError(f"section {section} of the params file is in braces. Add {name} by hand.")
    last = text.find("\n", _end(text, branch.value[-1][1]))
    last = len(text) if last < 0 else last
    indent = " " * branch.value[0][0].start_mark.column
    return f"{text[:last]}\n{indent}{name}: {dump_inline(value)}{text[last:]}"


def _rename(text: str, section: str, name: str, new: str) -> str:
    """`text` with another name of a section's key."""
    branch: Any = _child(yaml.compose(text), section)  # type: ignore[arg-type]
    key = next(key for key, _ in branch.value if key.value == name)
    return text[: key.start_mark.index] + new + text[key.end_mark.index :]


def _set_above(text: str, root: yaml.MappingNode, key: str, value: Any) -> str:
    """`text` with a key that stands above the sections."""
    leaf = _child(root, key)
    if leaf is not None:
        return _replace_node(text, leaf, value)
    first = root.value[0][0].start_mark.index if root.value else len(text)
    return f"{text[:first]}{key}: {dump_inline(value)}\n\n{text[first:]}"


def _child(node: yaml.MappingNode, name: str) -> yaml.Node | None:
    return next((child for key, child in node.value if key.value == name), None)


def _replace_node(text: str, node: yaml.Node, value: Any) -> str:
    """`text` with `node` replaced by `value`; a comment after it keeps its column."""
    start, end = node.start_mark.index, _end(text, node)
    block = isinstance(node, yaml.CollectionNode) and not node.flow_style
    if block and isinstance(node, yaml.SequenceNode) and isinstance(value, list | tuple) and value:
        new = f"\n{' ' * node.start_mark.column}".join(f"- {dump_inline(item)}" for item in value)
    elif block and isinstance(node, yaml.MappingNode) and isinstance(value, Mapping) and value:
        lines = (dump_inline({key: item})[1:-1] for key, item in value.items())
        new = f"\n{' ' * node.start_mark.column}".join(lines)
    else:
        new = dump_inline(value)
        if block:  # a list may be level with its key, but no other value may
            new = f"  {new}"
    if start == end:  # `key:` with nothing after it: the mark is at the colon
        new = f" {new}"
    rest = text[end:]
    gap = len(rest) - len(rest.lstrip(" "))
    if rest[gap : gap + 1] == "#":
        rest = " " * max(1, gap + (end - start) - len(new)) + rest[gap:]
    return text[:start] + new + rest


def _end(text: str, node: yaml.Node) -> int:
    """The index where a node's text ends. A block's end mark is after the comments that follow."""
    if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        return _end(text, last[1] if isinstance(last, tuple) else last)
    index: int = node.end_mark.index
    if isinstance(node, yaml.ScalarNode) and node.style in ("|", ">"):
        return len(text[:index].rstrip())  # its end mark is at the start of a later line
    return index


def dump_inline(value: Any) -> str:
    """`value` as YAML on one line, but for newlines in texts; other line breaks are escaped."""
    plain = list(value) if isinstance(value, tuple) else value
    text = _dump(plain, readable=True)
    if any(mark in text for mark in "\x85\u2028\u2029"):
        text = _dump(plain, readable=False)
    return text.removesuffix("...\n").strip(" \n")


def _dump(value: Any, readable: bool) -> str:
    text: str = yaml.safe_dump(
        value, default_flow_style=True, allow_unicode=readable, width=float("inf"), sort_keys=False
    )
    return text
