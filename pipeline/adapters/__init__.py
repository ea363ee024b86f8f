"""LoRA layers, what they attach to, and PEFT's format on disk."""
