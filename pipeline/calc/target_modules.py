"""Matches target_modules with the names of a model's linears."""

import re
from collections.abc import Iterable, Sequence

from pipeline.errors import UserError

HEAD = "lm_head"
ALL_LINEAR = "all-linear"
GROUPS = {
    "attention": (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "out_proj",
        "qkv_proj",
        "q_a_proj",
        "q_b_proj",
        "kv_a_proj_with_mqa",
        "kv_b_proj",
        "in_proj_qkv",
        "in_proj_z",
        "in_proj_b",
        "in_proj_a",
        "c_attn",
        "attn.c_proj",
        "query_key_value",
        "attention.dense",
        "query",
        "key",
        "value",
        "attention.output.dense",
    ),
    "feed_forward": (
        "fc1",
        "fc2",
        "gate_proj",
        "up_proj",
        "down_proj",
        "gate_up_proj",
        "input_linear",
        "output_linear",
        "c_fc",
        "mlp.c_proj",
        "dense_h_to_4h",
        "dense_4h_to_h",
        "intermediate.dense",
        "output.dense",
    ),
}
ALIASES = {"o_proj": "out_proj", "out_proj": "o_proj"}  # Llama's name and OPT's


def select_linears(names: Iterable[str], targets: Iterable[str], head: str = HEAD) -> list[str]:
    """Linears among `names` that match a target, in their order.

    A target is a last name, a dotted suffix, `attention`, `feed_forward`, or `all-linear` (every
    linear except `head` and experts, as in PEFT).

    Raises UserError if a target matches nothing.
    """
    linears = list(names)
    selected: set[str] = set()
    for target in targets:
        # an alias only where the model lacks the name itself: Qwen3.5 has an o_proj and an out_proj
        matches = [name for name in linears if matches_suffix(name, target)]
        if not matches or target not in ALIASES:
            matches = [name for name in linears if matches_target(target, name, head)]
        if not matches:
            last_names = sorted({name.rsplit(".", 1)[-1] for name in linears})
            raise UserError(
                f"target_modules: {target!r} matches no linear layer. The model has "
                f"{', '.join(last_names)}; groups are {', '.join(GROUPS)} and all-linear."
            )
        selected.update(matches)
    return [name for name in linears if name in selected]


def matches_target(target: str, name: str, head: str = HEAD) -> bool:
    """Whether the target matches the linear with this full name."""
    if target == ALL_LINEAR:
        is_head = matches_suffix(name, head, f"{HEAD}.decoder")
        return not is_head and ".experts." not in f".{name}"
    if target in GROUPS:
        # attention comes first: attention.output.dense also ends like a feed-forward's output.dense
        groups = (group for group, ends in GROUPS.items() if matches_suffix(name, *ends))
        return next(groups, "") == target
    return matches_suffix(name, target, ALIASES.get(target, target))


def matches_suffix(name: str, *suffixes: str) -> bool:
    """Whether `name` is one of the dotted suffixes or ends with one."""
    return f".{name}".endswith(tuple(f".{suffix}" for suffix in suffixes))


# one entry of layers_to_transform: 3, 8-15 or last 8
BLOCKS = re.compile(r"(?P<first>\d{1,6})(?:-(?P<stop>\d{1,6}))?|last (?P<count>\d{1,6})")


def numbers_of(layers: Iterable[str], blocks: int) -> set[int]:
    """The numbers, from 0, of the `blocks` that `layers` means. Raises UserError."""
    numbers = set[int]()
    for entry in layers:
        match = BLOCKS.fullmatch(entry)
        chosen = range(0)
        if match and match["count"]:
            chosen = range(blocks - int(match["count"]), blocks)
        elif match:
            chosen = range(int(match["first"]), int(match["stop"] or match["first"]) + 1)
        if not chosen or chosen[0] < 0 or chosen[-1] >= blocks:
            raise UserError(
                f"layers_to_transform: {entry!r} is not among the model's {blocks} blocks, 0 to "
                f"{blocks - 1}. Name others."
            )
        numbers.update(chosen)
    return numbers


def narrowed(
    names: Sequence[str], layers: Sequence[str], excluded: Sequence[str], blocks: int
) -> list[str]:
    """The full `names` in the blocks `layers`, or in all, without those `excluded`, as in PEFT.

    Raises UserError for one that means nothing, and if they leave nothing of `names`.
    """
    for end in excluded:
        if not any(matches_suffix(name, end) for name in names):
            raise UserError(
                f"exclude_modules: {end!r} matches no layer of target_modules. Remove it."
            )
    numbers, left = numbers_of(layers, blocks), list[str]()
    for name in names:
        # the first number in a name is the block, a later one an expert
        match = re.search(r"\.(\d+)\.", name)
        is_in = not layers or (match is not None and int(match[1]) in numbers)
        if is_in and not matches_suffix(name, *excluded):
            left.append(name)
    if names and not left:
        raise UserError(
            "layers_to_transform and exclude_modules leave no layer that gets LoRA. Name others."
        )
    return left
