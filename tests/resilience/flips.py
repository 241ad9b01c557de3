"""Figure 11: bits are flipped in a tiny run; which of them does the run notice, and how soon?

python -m tests.resilience.flips --seed 1 --flips 720

Sign, exponent, high and low mantissa of gradients, weights, moments and masters, on 2 and 4
data-parallel ranks: see flip_trials.py. Prints the table of docs/resilience.md.
"""

from __future__ import annotations

import argparse


def main() -> None:
    """Print the table for a seed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--flips", type=int, default=360, help="of all; shared by the 72 cells")
    asked = parser.parse_args()

    from megatron_ext.device import start

    start("cpu")  # before megatron-core is imported
    from tests.resilience.flip_trials import NUM_CELLS, measure

    measure(asked.seed, max(1, asked.flips // NUM_CELLS))


if __name__ == "__main__":
    main()
