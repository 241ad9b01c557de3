"""python -m tests.bench TABLE [options]: runs tests/bench/TABLE.py; each has --help.

step         the whole training step, ours and what people would use instead (--peers)
parts        where the time of a step goes, beside the floor of each part
layer        one MoE layer forward and backward, on a CPU or a GPU (--peers)
collectives  collectives of gloo, plain and ours
checkpoint   how long a save stops training, and how fast it reaches the disk
data         the loader and the preparation of data
start        imports, start, memory, and growth with experts, ranks and sequence
observe      what watching costs
"""

from __future__ import annotations

import signal
import sys
from importlib import import_module
from pathlib import Path

from megatron_ext.device import start

TABLES = ("step", "parts", "layer", "collectives", "checkpoint", "data", "start", "observe")
OF_WORKERS = ("step", "layer")
"""Their candidates are processes that choose a device for themselves."""
WITHOUT_PEERS = ("collectives", "data", "start", "observe")
"""What they compare with needs nothing that is not installed: --peers changes nothing."""


def main(argv: list[str]) -> int:
    """Hand the options to the module of that name."""
    if argv and argv[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    names = [name for name in TABLES if (Path(__file__).parent / f"{name}.py").exists()]
    if not argv or argv[0] not in names:
        print(f"usage: python -m tests.bench {{{','.join(names)}}} [options]", file=sys.stderr)
        return 64
    if argv[0] in OF_WORKERS:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the candidates end with us
    else:
        start("cpu")  # before anything imports megatron-core
    rest = [word for word in argv[1:] if argv[0] not in WITHOUT_PEERS or word != "--peers"]
    return import_module(f"tests.bench.{argv[0]}").main(rest) or 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
