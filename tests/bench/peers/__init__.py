"""What people would train with instead, one file each: the same shape, batch, data and AdamW.

A file has `NOTE` (what was adapted, whether it has an auxiliary loss) and functions that
`catalogue.py` names: `model(name, shape, gate)` makes a whole model whose call gives the loss,
`layer(name, shape)` makes one MoE layer. `training.py` is the step around a model: bf16 weights
with fp32 masters or fp32 weights, fused AdamW, no gradient clipping, no logging (ours has both).
Most files run in an environment of their own (`requirements-peers.txt`).
"""
