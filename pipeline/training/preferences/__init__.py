"""DPO and its kin: the losses are in `losses.py`, pairs of answers in `batches.py`, `data.py`."""
