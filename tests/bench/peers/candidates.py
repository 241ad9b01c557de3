"""The peers as candidates of a table, and the flags that ask for them."""

from __future__ import annotations

import argparse
import os
import sys

from tests.bench.driver import ROOT, Candidate
from tests.bench.peers.catalogue import chosen


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Which peers, and how they run."""
    parser.add_argument("--peers", action="store_true", help="measure the peers as well")
    parser.add_argument("--only", nargs="+", help="peers whose label has this in it, or: all")
    parser.add_argument("--peers-python", help="interpreter with requirements-peers.txt")
    parser.add_argument(
        "--tune-peers", action="store_true", help="allocator and oneDNN settings of ours for peers"
    )


def peers_python(asked: str | None) -> str:
    """The interpreter that has the peers: the flag, $PEERS_PYTHON, .venv-peers, else this one."""
    found = asked or os.environ.get("PEERS_PYTHON")
    if found is None and (ROOT / ".venv-peers/bin/python").exists():
        found = str(ROOT / ".venv-peers/bin/python")
    return found or sys.executable


def candidates(args: argparse.Namespace, module: str, without: str = "") -> list[Candidate]:
    """The asked peers in tests.bench.`module`, each in the interpreter that has it; none of the
    peers' module `without`.
    """
    if not args.peers and not args.only:
        return []
    python = peers_python(args.peers_python)
    return [
        Candidate(
            peer.label,
            module,
            peer.label,
            python=sys.executable if peer.is_installed_here else python,
            threads=args.threads,
        )
        for peer in chosen(args.only, args.dtype)
        if peer.module != without
    ]
