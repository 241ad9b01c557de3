"""The machine's ceilings as a candidate among the others: one measurement of all a step."""

from __future__ import annotations

from typing import Any

from tests.bench.gate import Gate


def run(name: str, spec: dict[str, Any], gate: Gate) -> None:
    """Measure for ever."""
    from megatron_ext.device.select import keep_large_blocks
    from tests.bench.ceilings import measure

    keep_large_blocks()
    gate.imported()
    found: dict[str, float] = {}
    gate.parts = lambda: {"ceilings": found}
    while True:
        gate.step()
        found = measure()
