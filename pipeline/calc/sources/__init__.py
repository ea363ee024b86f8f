"""Where a model's shapes come from: a preset, a config, or the header of its weights."""
