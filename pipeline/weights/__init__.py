"""Stored weights, tensor by tensor.

A merge is `merge.py`; the other modules compare and change adapters and checkpoints.
"""
