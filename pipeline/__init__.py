"""From a text file to an evaluated, merged LoRA model."""
