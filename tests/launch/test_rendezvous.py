"""Ranks that cannot meet end with 69 and one line, in the time of --rendezvous-timeout-s."""

from __future__ import annotations

import socket
import sys

import pytest

from launch import attempts
from tests.launch.programs import ROOT, fatal_lines, run
from tests.ranks.harness import free_port
from tests.ranks.tiny import TINY


def lonely(rank: int, port: int, run_dir: object):
    """One of two ranks, finished; the other is never started."""
    where = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "MASTER_PORT": port}
    words = [f"{name}={value}" for name, value in where.items()]
    program = [sys.executable, ROOT / "pretrain_moe.py", *TINY, "--run-dir", run_dir]
    patience = ["--rendezvous-timeout-s", "5"]
    return run(["env", "MASTER_ADDR=127.0.0.1", *words, *program, *patience], timeout_s=120)


def is_one_line_of_69(done) -> bool:
    """True where a rank says once that it could not join, and shows no traceback."""
    (line,) = fatal_lines(done.stderr)
    assert "Traceback" not in done.stderr
    return done.returncode == 69 and line.startswith("FATAL 69 ") and "could not join" in line


@pytest.mark.parametrize("rank", [0, 1])
def test_a_peer_that_never_comes(tmp_path, rank):
    """Rank 0 waits for rank 1; rank 1 finds nobody at the address."""
    assert is_one_line_of_69(lonely(rank, free_port(), tmp_path))


def test_a_port_in_use(tmp_path):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        assert is_one_line_of_69(lonely(0, taken.getsockname()[1], tmp_path))


@pytest.mark.parametrize(
    ("host", "address", "bound"),
    [
        ("10.1.2.3", "10.1.2.3", "10.1.2.3"),
        ("node1", "10.1.2.3", "10.1.2.3"),
        ("127.0.0.1", "127.0.0.1", "127.0.0.1"),
        ("localhost", "127.0.0.1", "127.0.0.1"),
        ("node1", "127.0.1.1", ""),
        ("node1", "192.0.2.9", ""),
        ("nowhere", None, ""),
    ],
)
def test_the_store_is_heard_on_the_network_of_its_endpoint_only(host, address, bound, monkeypatch):
    """Of a machine with the addresses 10.1.2.3 and those of the loopback."""

    class Socket:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def bind(self, place):
            if not place[0].startswith(("10.1.2.3", "127.")):
                raise OSError("not an address of this machine")

    def resolve(*_):
        if address is None:
            raise socket.gaierror("no such name")
        return [(0, 0, 0, "", (address, 0))]

    monkeypatch.setattr(attempts.socket, "socket", Socket)
    monkeypatch.setattr(attempts.socket, "getaddrinfo", resolve)
    assert attempts.interface(host) == bound


def test_a_store_of_several_nodes_is_bound_to_its_endpoint():
    with attempts.open_socket(("127.0.0.1", 0)) as listening:
        assert listening.getsockname()[0] == "127.0.0.1"
