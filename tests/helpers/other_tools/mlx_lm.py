# /// script
# dependencies = ["mlx-lm==0.32.*", "mlx[cpu]"]
# ///
"""Trains an adapter as `mlx_lm.lora` does: `mlx_lm.py BASE FOLDER`."""

import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

from mlx_lm.lora import CONFIG_DEFAULTS, run

base, folder = sys.argv[1:]
row = json.dumps({"text": "The currency of Bulgaria is the euro."}) + "\n"
with tempfile.TemporaryDirectory() as name:
    for part in ("train", "valid"):
        (Path(name) / f"{part}.jsonl").write_text(row * 8)
    mine = {"model": base, "data": name, "adapter_path": folder, "train": True, "iters": 3}
    run(SimpleNamespace(**CONFIG_DEFAULTS | mine | {"num_layers": -1, "learning_rate": 0.1}))
