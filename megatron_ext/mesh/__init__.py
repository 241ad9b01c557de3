"""WHO talks to whom: the rank layout, from which every group and the printed grid come.

layout.py   pure: sizes -> coordinates and groups (no torch)
grid.py     pure: the layout as text
groups.py   torch.distributed groups made from the layout
"""
