"""A byte-pair tokenizer without what its merges say already: a third of the bytes, compressed.

Its vocabulary is the tokens that no merge makes, then the token of each merge in their order.
"""

import json
from functools import lru_cache


@lru_cache(1)  # adapters have their base's
def unpack(text: str) -> str:
    """The whole tokenizer.json."""
    tree = json.loads(text)
    model = tree["model"]
    merges, vocabulary = model.get("merges"), model["vocab"]
    if not isinstance(merges, str):
        return text
    model["merges"] = [line.split(" ") for line in merges.split("\n")]
    for pair in model["merges"]:
        vocabulary["".join(pair)] = len(vocabulary)
    return json.dumps(tree, indent=2, ensure_ascii=False) + "\n"
