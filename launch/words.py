"""The words after launch/run.sh: the number of ranks, options of the launch, flags of the program.

The number is the first word that is no option; the options may stand anywhere, in any order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

EXAMPLE = "bash launch/run.sh 4 --config configs/quickstart.yaml"
SWITCHES = ("--cold", "--srun")
WITH_VALUE = ("--restarts", "--nnodes", "--node-rank", "--rdzv-endpoint")
USAGE = f"""usage: bash launch/run.sh RANKS [options] [flags of pretrain_moe.py...]

Start RANKS ranks of pretrain_moe.py on this machine: {EXAMPLE}

options, anywhere behind run.sh:
  --restarts N        start all ranks again from the newest checkpoint after a failure, N times at
                      most without a new checkpoint in between (default 0)
  --cold              every rank imports torch by itself (always so on CUDA)
  --nnodes N --node-rank R --rdzv-endpoint HOST:PORT
                      run the same on each of N machines; HOST is the one with rank 0
  --srun              inside a Slurm job: start this launcher on every node

flags of the program: bash launch/run.sh RANKS --help; codes and signals: docs/launching.md
"""


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


def _is_number(text: str, least: int) -> bool:
    return text.isascii() and text.isdigit() and int(text) >= least


def _number(option: str, text: str, least: int) -> int:
    if not _is_number(text, least):
        raise WordsError(f"{option} {text!r} is not a number from {least} on")
    return int(text)


def _endpoint(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not _is_number(port, 1) or int(port) > 65535:
        raise WordsError(
            f"--rdzv-endpoint {text!r} is not HOST:PORT", "--rdzv-endpoint node1:29500"
        )
    return host, int(port)


def asks_for_help(words: Sequence[str]) -> bool:
    """Whether --help stands before the number of ranks: behind it, it is the program's."""
    _, rest = _options(words)
    return rest[:1] in (["--help"], ["-h"])


def _options(words: Sequence[str]) -> tuple[dict, list[str]]:
    """(option -> value, the other words). Raises WordsError."""
    rest, given = [], {}
    left = list(words)
    while left:
        word = left.pop(0)
        name, is_joined, value = word.partition("=")
        if word in SWITCHES:
            given[word] = True
        elif name not in WITH_VALUE:
            rest.append(word)
        elif not is_joined and not left:
            raise WordsError(f"{name} wants a value")
        else:
            given[name] = value if is_joined else left.pop(0)
    return given, rest


def read_words(words: Sequence[str], environ: Mapping[str, str]) -> Options:
    """The words as `Options`; Slurm's variables fill the node's rank and the number of nodes.

    Raises WordsError.
    """
    given, rest = _options(words)
    if not rest or not _is_number(rest[0], 1):
        found = f"the first word is {rest[0]!r}" if rest else "no word given"
        raise WordsError(f"the number of ranks is missing: {found}")
    slurm = environ.get("SLURM_JOB_NUM_NODES", "1") if given.get("--srun") else "1"
    num_nodes = _number("--nnodes", given.get("--nnodes", slurm), 1)
    node_rank = given.get("--node-rank", environ.get("SLURM_NODEID", "0") if num_nodes > 1 else "0")
    endpoint = given.get("--rdzv-endpoint")
    if num_nodes > 1 and endpoint is None and not given.get("--srun"):
        raise WordsError("--nnodes wants --rdzv-endpoint", "--rdzv-endpoint FIRST_NODE:29500")
    return Options(
        num_ranks=int(rest[0]),
        flags=tuple(rest[1:]),
        restarts=_number("--restarts", given.get("--restarts", "0"), 0),
        cold=bool(given.get("--cold")),
        num_nodes=num_nodes,
        node_rank=_number("--node-rank", node_rank, 0),
        endpoint=None if endpoint is None else _endpoint(endpoint),
        srun=bool(given.get("--srun")),
    )
