"""The words after launch/run.sh: options of the launch, the number of ranks, flags of the program.

[--restarts N] [--cold] [--nnodes N --node-rank R --rdzv-endpoint HOST:PORT | --srun] RANKS flags
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

EXAMPLE = "bash launch/run.sh 4 --config configs/quickstart.yaml"


class WordsError(ValueError):
    """A wrong word; `do` is the way out."""

    def __init__(self, what: str, do: str = EXAMPLE) -> None:
        super().__init__(what)
        self.do = do


@dataclass(frozen=True)
class Options:
    """How to launch.

    Args:
        num_ranks: ranks of each machine.
        flags: those of pretrain_moe.py.
        restarts: starts in place after a failure, with no new checkpoint in between; 0: none.
        cold: every rank imports torch by itself.
        num_nodes: machines; each runs this program, with its own `node_rank`.
        endpoint: where rank 0 listens: host and port of the machine with node rank 0.
        srun: start this program on every node of the Slurm job, by srun.
    """

    num_ranks: int
    flags: tuple[str, ...]
    restarts: int = 0
    cold: bool = False
    num_nodes: int = 1
    node_rank: int = 0
    endpoint: tuple[str, int] | None = None
    srun: bool = False

    @property
    def world_size(self) -> int:
        """Ranks of all machines."""
        return self.num_ranks * self.num_nodes


def _number(option: str, text: str, least: int) -> int:
    if not text.isdigit() or int(text) < least:
        raise WordsError(f"{option} {text!r} is not a number from {least} on")
    return int(text)


def _endpoint(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit():
        raise WordsError(
            f"--rdzv-endpoint {text!r} is not HOST:PORT", "--rdzv-endpoint node1:29500"
        )
    return host, int(port)


def read_words(words: Sequence[str], environ: Mapping[str, str]) -> Options:
    """The words as `Options`; Slurm's variables fill the node's rank and the number of nodes.

    Raises WordsError.
    """
    rest, given = list(words), {}
    while rest and rest[0].startswith("--"):
        name, is_joined, value = rest.pop(0).partition("=")
        if name in ("--cold", "--srun"):
            given[name[2:]] = True
            continue
        if name not in ("--restarts", "--nnodes", "--node-rank", "--rdzv-endpoint"):
            raise WordsError(f"the number of ranks is missing: it comes before {name}")
        if not is_joined and not rest:
            raise WordsError(f"{name} wants a value")
        given[name] = value if is_joined else rest.pop(0)
    if not rest or not rest[0].isdigit() or int(rest[0]) < 1:
        found = f"the first word is {rest[0]!r}" if rest else "no word given"
        raise WordsError(f"the number of ranks is missing: {found}")
    slurm = environ.get("SLURM_JOB_NUM_NODES", "1") if given.get("srun") else "1"
    num_nodes = _number("--nnodes", given.get("--nnodes", slurm), 1)
    node_rank = given.get("--node-rank", environ.get("SLURM_NODEID", "0") if num_nodes > 1 else "0")
    endpoint = given.get("--rdzv-endpoint")
    if num_nodes > 1 and endpoint is None and not given.get("srun"):
        raise WordsError("--nnodes wants --rdzv-endpoint", "--rdzv-endpoint FIRST_NODE:29500")
    return Options(
        num_ranks=int(rest[0]),
        flags=tuple(rest[1:]),
        restarts=_number("--restarts", given.get("--restarts", "0"), 0),
        cold=bool(given.get("cold")),
        num_nodes=num_nodes,
        node_rank=_number("--node-rank", node_rank, 0),
        endpoint=_endpoint(endpoint) if endpoint else None,
        srun=bool(given.get("srun")),
    )
