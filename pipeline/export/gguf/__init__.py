"""GGUF files for llama.cpp: families' metadata and layouts, the vocabulary, and the writer."""
