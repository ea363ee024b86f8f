"""A project on a chat model that is not imported yet."""

from pathlib import Path

from tests.helpers.json_files import write_json
from tests.helpers.tokenizers import SMOLLM2, folder_with

PARAMS = """\
base: base
training:
  window: 0
  max_length: 64
finetune_lora:
  data: data/chat.jsonl
  eval_data: data/heldout.csv
"""


def new_chat_project(root: Path, rows: str, max_positions: int) -> Path:
    """Its model has a tokenizer alone, and its data are `rows` and a pair that is held out."""
    model = folder_with(root / "base", SMOLLM2)
    write_json(model / "config.json", {"max_position_embeddings": max_positions})
    (root / "data").mkdir()
    (root / "params.yaml").write_text(PARAMS, encoding="utf-8")
    (root / "data/chat.jsonl").write_text(rows, encoding="utf-8")
    (root / "data/heldout.csv").write_text("prompt,completion\nWhere?,Here.\n", encoding="utf-8")
    return root
