# /// script
# dependencies = ["unsloth==2026.10.9"]
# ///
"""Trains an adapter with Unsloth's model and TRL's SFTTrainer: `unsloth.py BASE FOLDER`."""

import sys

from unsloth import FastLanguageModel  # first: it changes the libraries below

from datasets import Dataset  # isort: skip
from trl import SFTConfig, SFTTrainer  # isort: skip

base, folder = sys.argv[1:]
model, tokenizer = FastLanguageModel.from_pretrained(base, 32, load_in_4bit=False)
model = FastLanguageModel.get_peft_model(model, r=4, lora_alpha=8)
texts = ["The currency of Bulgaria is the euro.", "Two and two are four."]
config = SFTConfig(
    folder, max_steps=3, learning_rate=0.1, max_length=32, save_strategy="no", report_to="none"
)
data = Dataset.from_dict({"text": texts * 4})
SFTTrainer(model, args=config, train_dataset=data, processing_class=tokenizer).train()
model.save_pretrained(folder)
tokenizer.save_pretrained(folder)
