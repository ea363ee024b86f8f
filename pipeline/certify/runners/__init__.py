"""Programs for the environments of engines. They import nothing of ours but the worker."""
