"""Measurements that are no tests: python -m tests.bench TABLE [options]; `__main__.py` lists the
tables.

    driver.py    candidates in processes of their own, asked in turn; quotients within a round
    gate.py      a candidate's side: it takes steps in its turn and blocks otherwise
    worker.py    the process of a candidate; ours.py, limits.py, layer_worker.py, peers/ are such
    ceilings.py  what the machine can do at most; table.py  markdown and JSON; shapes.py  the model
"""
