"""One file a fine-tuning method. Reading one imports no torch; see `pipeline/stages/registry.py`."""
