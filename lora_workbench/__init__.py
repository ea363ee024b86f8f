"""LoRA workbench: adapt language models with LoRA, and measure what was learned and forgotten."""
