"""A cut link names the pairs that no longer hear each other, not everybody."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

from megatron_ext.resilience.diagnose import Verdict, diagnose
from megatron_ext.resilience.links import Link, cut, name_cut, own_links, parse
from tests.launch.programs import ROOT, environment, fatal_lines, wait_for
from tests.ranks.tiny import TINY
from tests.resilience.test_diagnose import all_reduce, rank_file

HAS_NETNS = (
    shutil.which("unshare")
    and shutil.which("ip")
    and not subprocess.run(["unshare", "-n", "true"], capture_output=True, check=False).returncode
)
needs_netns = pytest.mark.skipif(not HAS_NETNS, reason="no network namespace may be made here")

PROC_NET_TCP = """\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100090A:9C41 0200090A:9869 01 00001000:00000000 01:00000014 00000005     0        0 77 1 0 1
   1: 0100090A:9C42 0200090A:9870 01 00000000:00000000 00:00000000 00000000     0        0 78 1 0 1
   2: 0100090A:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 99 1 0 1
"""
MAPPED = "0000000000000000FFFF00000100090A:9C41"


def test_the_kernels_table():
    one, two = parse(PROC_NET_TCP, {77, 78})
    assert one == Link("0100090A:9C41", "0200090A:9869", 4096, 5) and one.is_cut
    assert not two.is_cut and parse(PROC_NET_TCP, {1}) == []
    mapped = PROC_NET_TCP.replace("0100090A:9C41", MAPPED)
    assert parse(mapped, {77}) == [one]


def mesh(size, broken=()):
    """Connections of all pairs; those of `broken` (from, to) are cut, seen by the one that sent."""
    links = {rank: [] for rank in range(size)}
    for a in range(size):
        for b in range(size):
            if a != b:
                here, there = f"A{a}:{min(a, b)}{max(a, b)}", f"A{b}:{min(a, b)}{max(a, b)}"
                links[a].append(Link(here, there, *((96, 4) if (a, b) in broken else (0, 0))))
    return links


def waiting_ranks(folder, size=4):
    return {r: rank_file(folder, r, [all_reduce(1), all_reduce(2)]) for r in range(size)}


def test_no_cut_no_pair(tmp_path):
    beats = waiting_ranks(tmp_path)
    verdict = diagnose(beats, {})
    assert cut(mesh(4)) == {} and name_cut(verdict, mesh(4), beats) == verdict


@pytest.mark.parametrize("broken", [{(1, 2)}, {(2, 1)}, {(1, 2), (2, 1)}])
def test_one_link_of_four_ranks(tmp_path, broken):
    """Whichever side sent; all four wait in the same all-reduce."""
    beats = waiting_ranks(tmp_path)
    verdict = name_cut(diagnose(beats, {}), mesh(4, broken), beats)
    assert verdict.ranks == (1, 2) and verdict.kind == "link"
    assert verdict.text.startswith("ranks 1 and 2 no longer hear each other (96 bytes of rank ")
    assert "in all_reduce #2 of group DP" in verdict.text


def test_two_nodes(tmp_path):
    beats = waiting_ranks(tmp_path)
    verdict = name_cut(diagnose(beats, {}), mesh(4, {(0, 2), (3, 1)}), beats)
    assert verdict.ranks == (0, 1, 2, 3)
    assert "ranks 0 and 2, 1 and 3 no longer hear each other" in verdict.text


def test_a_proxy_that_swallows_is_seen_from_the_calls(tmp_path):
    """Rank 1 sent to rank 0 what that still receives; the others wait for them."""
    beats = waiting_ranks(tmp_path)
    beats[0] = rank_file(tmp_path, 0, [(0, "recv", 4, 128, 1)])
    beats[1] = rank_file(tmp_path, 1, [(0, "send", 4, 128, 0), all_reduce(2)])
    verdict = name_cut(Verdict((0,), "missed", ""), mesh(4), beats)
    assert verdict.ranks == (0, 1) and "both are in recv #4 with rank 1" in verdict.text
    beats[1] = rank_file(tmp_path, 1, [all_reduce(2)])  # it did not send
    assert name_cut(Verdict((1,), "missed", "x"), mesh(4), beats).text == "x"


def test_a_stopped_rank_is_no_cut_link(tmp_path):
    verdict = Verdict((1,), "silent", "rank 1: the process is stopped (SIGSTOP)")
    assert name_cut(verdict, mesh(4, {(0, 1)}), waiting_ranks(tmp_path)) == verdict


def cut_loopback() -> None:
    """In a network namespace of its own: two ends in this process, the wire between them cut."""
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    server = socket.create_server(("127.0.0.1", 0))
    one = socket.create_connection(server.getsockname())
    other, _ = server.accept()
    one.sendall(b"heard")
    time.sleep(0.3)
    before = [link.is_cut for link in own_links()]
    subprocess.run(["ip", "link", "set", "lo", "down"], check=True)
    one.sendall(b"unheard")
    time.sleep(1.5)
    links = own_links()
    assert other.recv(5) == b"heard"
    print(json.dumps([before, [link.unacked for link in links if link.is_cut]]))


@needs_netns
def test_the_kernel_says_it():
    code = "from tests.resilience.test_links import cut_loopback as f; f()"
    done = subprocess.run(
        ["unshare", "-n", sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert json.loads(done.stdout) == [[False] * 3, [len(b"unheard")]]


@needs_netns
def test_a_run_whose_link_is_cut(tmp_path):
    flags = [*TINY, "--train-iters", "100000", "--run-dir", str(tmp_path), "--hang-limit-s", "3"]
    program = 'ip link set lo up && exec bash launch/run.sh 2 "$@" --gloo-collectives plain'
    process = subprocess.Popen(
        ["unshare", "-n", "bash", "-c", program, "run", *flags],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for(tmp_path / "metrics.jsonl", '"step": 2')
        inside = ["nsenter", "-t", str(process.pid), "-n"]
        subprocess.run([*inside, "ip", "link", "set", "lo", "down"], check=True)
        start = time.monotonic()
        _, errors = process.communicate(timeout=60)
        seconds = time.monotonic() - start
    finally:
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == 78, errors
    assert seconds < 3 + 10
    (line,) = fatal_lines(errors)
    assert re.search(r"ranks 0 and 1 no longer hear each other \(\d+ bytes of rank \d unack", line)
    verdict = json.loads((tmp_path / "logs/hang.json").read_text())
    assert (verdict["kind"], verdict["ranks"]) == ("link", [0, 1])
