"""One loop for all training.

`loop.py` takes the steps and `step.py` computes one; `losses.py` has the cross-entropy,
`preferences/losses.py` DPO, IPO, KTO, ORPO and SimPO, `retention.py` the divergence from the base.
"""
