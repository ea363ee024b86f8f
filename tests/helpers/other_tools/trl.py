# /// script
# dependencies = ["trl==1.16.*", "peft==0.21.*", "datasets"]
# ///
"""Trains an adapter with TRL's SFTTrainer: `trl.py BASE FOLDER`."""

import sys

from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

base, folder = sys.argv[1:]
texts = ["The currency of Bulgaria is the euro.", "Two and two are four."]
config = SFTConfig(
    folder,
    max_steps=3,
    learning_rate=0.1,
    max_length=32,
    save_strategy="no",
    report_to="none",
    use_cpu=True,
    bf16=False,
)
lora = LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
data = Dataset.from_dict({"text": texts * 4})
trainer = SFTTrainer(base, args=config, train_dataset=data, peft_config=lora)
trainer.train()
trainer.save_model(folder)
