"""WHICH rank is where: one mixed-radix number per rank, every group is a slice of it.

Axes from slow to fast: dense ``pp dp cp tp``, expert ``pp edp ep etp`` (the expert axes fold the
same ranks anew, MoE Parallel Folding, arXiv 2504.14960).  Eight ranks, tp=2 pp=2, ep=4 etp=1::

    arange(8).view(pp=2, dp=2, cp=1, tp=2)       arange(8).view(pp=2, edp=1, ep=4, etp=1)
      pp 0: dp 0: [0 1]  dp 1: [2 3]               pp 0: ep: [0 1 2 3]
      pp 1: dp 0: [4 5]  dp 1: [6 7]               pp 1: ep: [4 5 6 7]

    groups("tp") = [0 1] [2 3] [4 5] [6 7]       groups("ep") = [0 1 2 3] [4 5 6 7]
    groups("dp") = [0 2] [1 3] [4 6] [5 7]       groups("edp") = [0] [1] ... [7]
    groups("pp") = [0 4] [1 5] [2 6] [3 7]       the same in both folds

The order of the axes is megatron-core's ``order`` text, fast to slow: ``tp-cp-ep-dp-pp``, or
``tp-cp-ep-pp-dp`` with --use-tp-pp-dp-mapping.  No torch, no process group: any world size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from megatron_ext.config.sections.parallel import ParallelSection

PP_LAST = "tp-cp-ep-dp-pp"
PP_BEFORE_DP = "tp-cp-ep-pp-dp"
DENSE = frozenset({"tp", "cp", "dp", "pp"})
EXPERT = frozenset({"etp", "ep", "edp", "pp"})
_EXPERT_NAME = {"tp": "etp", "ep": "ep", "dp": "edp", "pp": "pp"}


@dataclass(frozen=True)
class Layout:
    """Sizes of the axes; ``world_size`` must be a multiple of both tp*cp*pp and etp*ep*pp."""

    world_size: int
    tp: int = 1
    cp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int = 1
    order: str = PP_LAST

    def __post_init__(self) -> None:
        dense, expert = self.tp * self.cp * self.pp, self.etp * self.ep * self.pp
        assert self.world_size % dense == 0, f"{self.world_size} ranks % tp*cp*pp {dense} != 0"
        assert self.world_size % expert == 0, f"{self.world_size} ranks % etp*ep*pp {expert} != 0"
        assert sorted(self.order.split("-")) == ["cp", "dp", "ep", "pp", "tp"], self.order
        if self.pp > 1 and not self.order.endswith("pp"):
            assert self.dp == self.edp, f"order {self.order} needs dp {self.dp} = edp {self.edp}"

    @property
    def dp(self) -> int:
        """Ranks that see different samples."""
        return self.world_size // (self.tp * self.cp * self.pp)

    @property
    def edp(self) -> int:
        """Ranks that hold the same experts."""
        return self.world_size // (self.etp * self.ep * self.pp)

    def size(self, axis: str) -> int:
        """Ranks along one axis."""
        return getattr(self, axis)

    def axes(self, expert: bool) -> tuple[str, ...]:
        """The fold's axes, fast to slow."""
        names = self.order.split("-")
        if expert:
            return tuple(_EXPERT_NAME[n] for n in names if n in _EXPERT_NAME)
        return tuple(n for n in names if n in DENSE)

    def strides(self, expert: bool) -> dict[str, int]:
        """Distance in ranks between neighbours of each axis of a fold."""
        axes = self.axes(expert)
        return {a: prod(self.size(b) for b in axes[:i]) for i, a in enumerate(axes)}

    def coordinates(self, rank: int) -> dict[str, int]:
        """Where a rank is: ``{"pp", "dp", "cp", "tp", "edp", "ep", "etp"}``."""
        assert 0 <= rank < self.world_size, f"rank {rank} is not in 0..{self.world_size - 1}"
        both = {**self.strides(expert=False), **self.strides(expert=True)}
        found = {axis: rank // stride % self.size(axis) for axis, stride in both.items()}
        return {axis: found[axis] for axis in ("pp", "dp", "cp", "tp", "edp", "ep", "etp")}

    def groups(self, axes: str) -> list[list[int]]:
        """All groups along ``axes`` joined by hyphens (``"tp"``, ``"dp-cp"``, ``"etp-ep"``), ranks
        ascending, groups ordered by their first rank.

        Raises:
            ValueError: an unknown axis, or dense and expert axes mixed.
        """
        wanted, expert = self._fold(axes)
        strides = self.strides(expert)
        inside = [(strides[a], self.size(a)) for a in reversed(self.axes(expert)) if a in wanted]
        outside = [(s, self.size(a)) for a, s in strides.items() if a not in wanted]
        offsets = sorted(_sums(inside))
        return [[first + offset for offset in offsets] for first in sorted(_sums(outside))]

    def group_of(self, rank: int, axes: str) -> list[int]:
        """The group along ``axes`` that holds ``rank``, without making the others."""
        wanted, expert = self._fold(axes)
        strides = self.strides(expert)
        inside = [(strides[a], self.size(a)) for a in wanted]
        first = rank - sum(rank // s % n * s for s, n in inside)
        return sorted(first + offset for offset in _sums(inside))

    def _fold(self, axes: str) -> tuple[list[str], bool]:
        wanted = axes.split("-")
        if set(wanted) <= DENSE:
            return wanted, False
        if set(wanted) <= EXPERT:
            return wanted, True
        raise ValueError(f"{axes}: must join axes of pp-dp-cp-tp, or of pp-edp-ep-etp")


def _sums(steps: list[tuple[int, int]]) -> Iterator[int]:
    """Every ``sum(stride * index)`` with each index below its size."""
    if not steps:
        yield 0
        return
    (stride, size), *rest = steps
    for tail in _sums(rest):
        for index in range(size):
            yield stride * index + tail


def layout_of(parallel: ParallelSection) -> Layout:
    """The layout that the flags ask for; they have been checked by `parse`."""
    return Layout(
        world_size=parallel.world_size or 1,
        tp=parallel.tensor_model_parallel_size,
        cp=parallel.context_parallel_size,
        pp=parallel.pipeline_model_parallel_size,
        ep=parallel.expert_model_parallel_size,
        etp=parallel.expert_tensor_parallel_size or parallel.tensor_model_parallel_size,
        order=PP_BEFORE_DP if parallel.use_tp_pp_dp_mapping else PP_LAST,
    )
