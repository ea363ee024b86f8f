"""Programs that run inside the environments of engines, and import nothing of ours but the worker."""
