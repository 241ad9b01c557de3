"""Seconds of a collective: alpha-beta on each level of links that its group reaches.

A group of n ranks that lies in d domains with l ranks each moves over two resources at once: inside
a domain each rank has its own port, between domains the l ranks of a domain use their l NICs::

    all-gather, reduce-scatter of S bytes   max(S*(l-1)/l / inside, S*(d-1)/d / (l * network))
    all-reduce                              twice that
    all-to-all of S bytes a rank            max(S*(l-1)/n / inside, S*(n-l)/n / network)

plus a latency for each step: log2 of the ranks on each level for large NCCL groups (trees), one a
peer for gloo.  A group that reaches several parts of the cluster sends S*(p-1)/p over `between`,
which the nodes share.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, log2

from megatron_ext.costs.cluster import Cluster, Link

GB, US = 1e9, 1e-6


@dataclass(frozen=True)
class Reach:
    """How far a group reaches: n ranks in `domains` domains with at least `local` each, in `parts`
    parts."""

    n: int
    local: int
    domains: int
    parts: int
    part: int = 0


def reach_of(cluster: Cluster, slots: Sequence[int]) -> Reach:
    """The reach of a group of physical ranks."""
    where = Counter(cluster.domain_of(slot) for slot in slots)
    parts = {part for part, _ in where}
    slow = min(parts, key=lambda p: cluster.parts[p].network.gb_per_s)
    return Reach(len(slots), min(where.values()), len(where), len(parts), slow)


@dataclass(frozen=True)
class Links:
    """The times on one cluster."""

    cluster: Cluster

    def gather(self, reach: Reach, total: float) -> float:
        """All-gather or reduce-scatter; `total` bytes of the whole result."""
        if reach.n == 1 or total <= 0:
            return 0.0
        inside, network = self._levels(reach)
        fast = total * (reach.local - 1) / reach.local / inside.gb_per_s
        slow = total * (reach.domains - 1) / reach.domains / (reach.local * network.gb_per_s)
        far = self._between(reach, total * (reach.parts - 1) / reach.parts)
        return max(fast, slow, far) / GB + self._latency(reach)

    def reduce(self, reach: Reach, total: float) -> float:
        """All-reduce of `total` bytes."""
        return 2 * self.gather(reach, total)

    def exchange(self, reach: Reach, sent: float) -> float:
        """All-to-all in which each rank sends `sent` bytes in all (its own part included)."""
        if reach.n == 1 or sent <= 0:
            return 0.0
        inside, network = self._levels(reach)
        fast = sent * (reach.local - 1) / reach.n / inside.gb_per_s
        slow = sent * (reach.n - reach.local) / reach.n / network.gb_per_s
        far = self._between(reach, sent * reach.local * (reach.parts - 1) / reach.parts)
        return max(fast, slow, far) / GB + self._latency(reach)

    def send(self, a: int, b: int, size: float) -> float:
        """Point-to-point between two physical ranks."""
        if a == b:
            return 0.0
        reach = reach_of(self.cluster, (a, b))
        inside, network = self._levels(reach)
        link = inside if reach.domains == 1 else network
        if reach.parts > 1 and self.cluster.between:
            link = self.cluster.between
            # each rank of a node has its share of the node's link to the other part
            share = self.cluster.parts[reach.part].gpus_per_node
            return size * share / (link.gb_per_s * GB) + link.latency_us * US
        return size / (link.gb_per_s * GB) + link.latency_us * US

    def _levels(self, reach: Reach) -> tuple[Link, Link]:
        part = self.cluster.parts[reach.part]
        return part.inside, part.network

    def _between(self, reach: Reach, size: float) -> float:
        if reach.parts == 1 or self.cluster.between is None:
            return 0.0
        share = max(1, self.cluster.parts[reach.part].gpus_per_node // max(1, reach.local))
        return size * share / self.cluster.between.gb_per_s

    def _latency(self, reach: Reach) -> float:
        inside, network = self._levels(reach)
        steps = inside.latency_us * ceil(log2(max(2, reach.local))) if reach.local > 1 else 0.0
        if reach.domains > 1:
            steps += network.latency_us * ceil(log2(reach.domains))
        if reach.parts > 1 and self.cluster.between:
            steps += self.cluster.between.latency_us * reach.parts
        return steps * US
