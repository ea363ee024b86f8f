"""The document's figures, each drawn from what the pipeline made and measured: one module a figure."""
