"""Pictures and RUN/routing.jsonl, made in a thread of rank 0 while the next steps compute."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from megatron_ext.moe.stats import RoutingRecord
from megatron_ext.observe import pictures, routing_file
from megatron_ext.observe.metrics import routing_interval

Show = Callable[[str, bytes, int], None]


class Artist:
    """Draws one step after the other; errors come out of the next `draw` or of `close`."""

    def __init__(self, folder: Path, show: Show, first_step: int) -> None:
        self._path, self._show = folder / routing_file.NAME, show
        self._worker = ThreadPoolExecutor(1, "pictures")
        self._last: Future | None = None
        routing_file.cut(self._path, first_step)

    def draw(self, step: int, routing: RoutingRecord, domains: Sequence[str]) -> None:
        """Ask for the pictures of a step with a close look; waits for those of the one before."""
        self.wait()
        self._last = self._worker.submit(self._make, step, routing, list(domains))

    def wait(self) -> None:
        """Until nothing is being drawn."""
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def close(self) -> None:
        """Finish."""
        try:
            self.wait()
        finally:
            self._worker.shutdown()

    def _make(self, step: int, routing: RoutingRecord, domains: Sequence[str]) -> None:
        for tag, png in routing_pictures(step, routing, domains).items():
            self._show(tag, png, step)
        routing_file.append(self._path, step, routing_interval(routing, domains))


def routing_pictures(step: int, routing: RoutingRecord, domains: Sequence[str]) -> dict[str, bytes]:
    """Tag -> PNG."""
    counts_LE, is_moe_L = routing.counts_LE.numpy(), routing.is_moe_L.numpy()
    if not np.any(is_moe_L):
        return {}
    made = {"moe/expert load": pictures.load(counts_LE, is_moe_L, step)}
    look = routing.look
    if look is not None:
        made["moe/co-selection"] = pictures.coselection(look.pairs_LEE.numpy(), is_moe_L, step)
        nmi_L = look.nmi_L().numpy()
        table = look.domains_LDE.numpy()
        made["moe/domains"] = pictures.domains(table, is_moe_L, nmi_L, domains, step)
    return made
