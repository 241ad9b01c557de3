"""Measurements that are no tests: python -m tests.bench NAME [options]. A module here with
`main(argv)` is a name.
"""
