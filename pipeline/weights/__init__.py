"""Stored weights, tensor by tensor.

What a merge writes is in `merge.py`; the other modules compare and change adapters and checkpoints.
"""
