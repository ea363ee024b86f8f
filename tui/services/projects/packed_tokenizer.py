"""A byte-pair tokenizer without what its merges say already: a third of the bytes, compressed.

Its vocabulary is the tokens that no merge makes, then the token of each merge in their order.
"""

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any


def pack(text: str) -> str:
    """A tokenizer.json that `unpack` reads; the same text if it is none of this kind."""
    tree = json.loads(text)
    model = tree["model"]
    merges = model.get("merges")
    if not merges:
        return text
    first = len(model["vocab"]) - len(merges)
    vocabulary = {token: id_ for token, id_ in model["vocab"].items() if id_ < first}
    lines = "\n".join(" ".join(pair) for pair in merges)
    packed = json.dumps({**tree, "model": {**model, "vocab": vocabulary, "merges": lines}})
    if json.loads(unpack(packed)) != tree:
        raise ValueError("The vocabulary is not in the order of the merges.")
    return packed


@lru_cache(1)  # adapters have their base's
def unpack(text: str) -> str:
    """The whole tokenizer.json."""
    tree = json.loads(text)
    merges = tree["model"].get("merges")
    if not isinstance(merges, str):
        return text
    pairs = [line.split(" ") for line in merges.split("\n")]
    vocabulary = tree["model"]["vocab"]
    made = {"".join(pair): len(vocabulary) + number for number, pair in enumerate(pairs)}
    model = {**tree["model"], "vocab": {**vocabulary, **made}, "merges": pairs}
    return _text({**tree, "model": model})


def _text(tree: Mapping[str, Any]) -> str:
    return json.dumps(tree, indent=2, ensure_ascii=False) + "\n"
