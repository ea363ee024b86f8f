"""DPO and its kin: `losses.py` has the losses, `batches.py` and `data.py` their pairs of answers."""
