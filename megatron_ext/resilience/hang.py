"""What whoever leads the end of a hanging run does: a rank's watcher or the launcher.

claim      RUN/logs/hang.json, which exists once: who creates it leads
stacks     asked of the ranks of this host; a word for those that cannot answer
publish    RUN/logs/hang.txt, at which the others leave
error      the FATAL line and exit_reason.json, both in the name of the odd rank
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from megatron_ext.errors import HangError
from megatron_ext.resilience import heartbeat, stacks
from megatron_ext.resilience.clocks import is_alive
from megatron_ext.resilience.diagnose import Verdict
from megatron_ext.resilience.heartbeat import Heartbeat


def flag_path(logs: Path) -> Path:
    """Exists while a hang ends the run; its token says which launch's."""
    return logs / "hang.json"


def text_path(logs: Path) -> Path:
    """The verdict in words, and all stacks."""
    return logs / "hang.txt"


def has_leader(logs: Path, token: int) -> bool:
    """True where somebody ends this launch already."""
    try:
        return json.loads(flag_path(logs).read_text())["token"] == token
    except (OSError, ValueError, KeyError):
        return False


def claim(logs: Path, token: int, leader: int, verdict: Verdict) -> bool:
    """Create hang.json; False where another leads. A full disk does not stop the leader (`leader`:
    its rank, -1 the launcher).
    """
    flag = flag_path(logs)
    temporary = flag.with_suffix(f".{os.getpid()}.tmp")
    content = {"token": token, "leader": leader, "time": time.time()}
    try:
        temporary.write_text(json.dumps({**content, **asdict(verdict)}) + "\n")
        os.link(temporary, flag)
    except FileExistsError:
        return False
    except OSError as error:
        sys.stderr.write(f"no {flag}: {error}\n")
    finally:
        temporary.unlink(missing_ok=True)
    return True


def rewrite(logs: Path, verdict: Verdict) -> None:
    """The leader knows more by now."""
    flag = flag_path(logs)
    temporary = flag.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(json.loads(flag.read_text()) | asdict(verdict)) + "\n")
    os.replace(temporary, flag)


def collect_stacks(
    logs: Path, host: str, beats: Mapping[int, Heartbeat], silent: Mapping[int, str]
) -> None:
    """Stacks of these ranks of `host`, and a word about those that cannot answer."""
    asked = []
    for rank, beat in beats.items():
        is_stopped = heartbeat.process_state(beat.pid) in heartbeat.STOPPED
        if is_alive(beat, host) and not is_stopped and stacks.ask(beat.pid):
            asked.append(rank)
        elif rank in silent:
            words = f"no stack of rank {rank} on {beat.host}: {silent[rank]}\n"
            stacks.stack_path(logs, rank).write_text(words)
    stacks.wait_for(logs, asked)


def publish(logs: Path, verdict: Verdict, beats: Mapping[int, Heartbeat]) -> None:
    """Write hang.txt, so that it is seen whole or not at all."""
    clusters = stacks.cluster(stacks.read_all(logs, sorted(beats)))
    path = text_path(logs)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(f"{verdict.text}\n\n{stacks.format_clusters(clusters)}")
    os.replace(temporary, path)


def hang_error(
    logs: Path, verdict: Verdict, beats: Mapping[int, Heartbeat], limit_s: float
) -> HangError:
    """What the run ends with (78)."""
    odd = verdict.ranks[0]
    where = f"; rank {odd} is on host {beats[odd].host}" if odd in beats else ""
    do = "look at the stacks in hang.txt, then start again with --load (without that node where a"
    do += " process was stopped or gone)"
    if verdict.kind == "link":
        where, do = "", "look at the network between them, then start again with --load"
    error = HangError(
        f"no progress for {limit_s:g} s (--hang-limit-s): {verdict.text}{where}",
        do=do,
        path=text_path(logs),
    )
    error.step = max((beat.step for beat in beats.values()), default=None)
    return error


def forget(logs: Path) -> None:
    """Remove what an earlier run left here (rank 0, before the others look)."""
    for path in (flag_path(logs), text_path(logs)):
        path.unlink(missing_ok=True)
