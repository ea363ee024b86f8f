"""The commands of the document's pages do what the pages say."""

import re
import subprocess

from pipeline.stages.methods.sweep import variants
from tests.helpers.projects import ROOT, load


def test_the_commands_of_the_loraplus_page_make_its_sweeps() -> None:
    text = (ROOT / "document/docs/loraplus.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"(?:^    .*\n)+", text, re.MULTILINE)
    prelude = "lora() { printf '%s\\0' \"$@\"; printf '\\n'; }; python() { :; }\n"
    ran = subprocess.run(
        ["bash", "-euc", prelude + block], check=True, capture_output=True, text=True
    ).stdout
    embeddings = []
    for line in ran.splitlines():
        *command, end = line.split("\0")
        assert (command[:2], end) == (["finetune", "sweep"], "")
        assert set(command[2::2]) == {"--set"}
        params = load(ROOT / "params.yaml", command[3::2])
        wanted = variants(params.finetune_lora, params.finetune_sweep).values()
        assert (
            len({(own.loraplus_ratio, own.learning_rate, own.seed) for own in wanted})
            == len(wanted)
            == 250
        )
        embeddings.append(
            (params.finetune_lora.train_embeddings, params.finetune_lora.init_lora_weights)
        )
    assert embeddings == [
        ("none", "document"),
        ("none", "kaiming"),
        ("new_rows", "document"),
        ("all", "document"),
    ]
