"""Layout names: `tp2-sp-pp2-vpp2-cp2.p2p-dp2-dopt-ep4-etp1-alltoall`, parts in any order, each
optional.

    parse_layout("tp2-sp-dp2-ep4-etp1").flags  ->  ["--tensor-model-parallel-size", "2", ...]
    parse_layout("tp2-sp-dp2-ep4-etp1").world_size  ->  4

Parts: tpN ppN vppN dpN epN etpN, cpN or cpN.KIND (p2p, all_gather, a2a, a2a+p2p), sp, dopt (the
distributed optimizer), overlap (gradient reduction and parameter gathering), alltoall or allgather.
tp > 1 brings sp with it (a mixture of experts needs it); etp is 1 where it is left out, as the
expert dimensions fold freely over the dense ones.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from megatron_ext.errors import ConfigError

SIZES = ("tp", "pp", "vpp", "cp", "dp", "ep", "etp")
CP_KINDS = ("p2p", "all_gather", "a2a", "a2a+p2p")
DISPATCHERS = ("alltoall", "allgather")
SWITCHES = ("sp", "dopt", "overlap")
_SIZE = re.compile(r"(tp|pp|vpp|cp|dp|ep|etp)([0-9]+)(?:\.(.+))?")


@dataclass(frozen=True)
class NamedLayout:
    """One layout: sizes by axis (1 where absent), context-parallel kind, dispatcher, switches."""

    name: str
    sizes: dict[str, int]
    cp_kind: str | None
    dispatcher: str | None
    switches: frozenset[str]

    @property
    def world_size(self) -> int:
        """Ranks: tp * pp * cp * dp."""
        return self.sizes["tp"] * self.sizes["pp"] * self.sizes["cp"] * self.sizes["dp"]

    @property
    def flags(self) -> list[str]:
        """The trainer's flags of this layout."""
        size = self.sizes
        flags = [
            *("--tensor-model-parallel-size", str(size["tp"])),
            *("--pipeline-model-parallel-size", str(size["pp"])),
            *("--context-parallel-size", str(size["cp"])),
            *("--expert-model-parallel-size", str(size["ep"])),
            *("--expert-tensor-parallel-size", str(size["etp"])),
            "--sequence-parallel" if size["tp"] > 1 else "--no-sequence-parallel",
        ]
        if size["vpp"] > 1:
            flags += ["--num-virtual-stages-per-pipeline-rank", str(size["vpp"])]
        if self.cp_kind:
            flags += ["--cp-comm-type", self.cp_kind]
            if self.cp_kind == "a2a+p2p":
                flags += ["--hierarchical-context-parallel-sizes", "2", str(size["cp"] // 2)]
        if self.dispatcher:
            flags += ["--moe-token-dispatcher-type", self.dispatcher]
        if "dopt" in self.switches:
            flags.append("--use-distributed-optimizer")
        if "overlap" in self.switches:
            flags += ["--overlap-grad-reduce", "--overlap-param-gather"]
        return flags


def _refuse(name: str, part: str) -> ConfigError:
    legal = ", ".join([f"{size}N" for size in SIZES] + ["cpN.p2p", *SWITCHES, *DISPATCHERS])
    return ConfigError(f"--layouts {name}: {part!r} is not a part of a layout", do=f"use {legal}")


def parse_layout(name: str) -> NamedLayout:
    """The layout of a name. Raises ConfigError with the parts that exist."""
    sizes = dict.fromkeys(SIZES, 1)
    cp_kind = dispatcher = None
    switches = set()
    for part in name.strip().split("-"):
        match = _SIZE.fullmatch(part)
        if match and int(match[2]) > 0 and (match[3] is None or match[1] == "cp"):
            sizes[match[1]] = int(match[2])
            if match[3] is not None and match[3] not in CP_KINDS:
                raise _refuse(name, part)
            cp_kind = match[3] or cp_kind
        elif part in SWITCHES:
            switches.add(part)
        elif part in DISPATCHERS:
            dispatcher = part
        elif part not in ("", "1", "single"):
            raise _refuse(name, part)
    return NamedLayout(name.strip(), sizes, cp_kind, dispatcher, frozenset(switches))
