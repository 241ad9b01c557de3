"""python -m tests.bench NAME [options]: runs tests/bench/NAME.py."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

from megatron_ext.device import start


def main(argv: list[str]) -> int:
    """Hand the options to the module of that name."""
    names = sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py"))
    if not argv or argv[0] not in names:
        print(f"usage: python -m tests.bench {{{','.join(names)}}} [options]", file=sys.stderr)
        return 64
    start("cpu")  # before anything imports megatron-core
    return import_module(f"tests.bench.{argv[0]}").main(argv[1:]) or 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
