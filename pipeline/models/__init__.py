"""MiniGPT, and any causal language model that transformers opens."""
