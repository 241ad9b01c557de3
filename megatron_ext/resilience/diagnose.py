"""Who holds up the others: a pure function of all ranks' heartbeats.

    1  ranks that do not beat           stopped, dead, or their GIL is held
    2  ranks that wait in no collective while others do: their phase, and the collective they miss
    3  all wait: a rank that others wait for, counted; then the first call of it that differs from
       the others' (the collective it skipped or added)

Example: ranks 0..3, dp = all of them; rank 3 skipped all_reduce #12 and waits in a barrier. Ranks
0, 1 and 2 wait in #12 for {3}: rank 3 has three votes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_ext.resilience.heartbeat import POINT_TO_POINT, Collective, Heartbeat

MANY = 8
"""More ranks than this are shown as a number."""


@dataclass(frozen=True)
class Verdict:
    """What a hang is, for people and for programs."""

    ranks: tuple[int, ...]
    kind: str  # "silent", "busy", "missed", "different", "together", "link"
    text: str
    collective: str = ""


def name_ranks(ranks) -> str:
    """`rank 3`, `ranks 1, 2`, or how many."""
    ranks = sorted(ranks)
    if len(ranks) > MANY:
        return f"{len(ranks)} ranks ({ranks[0]} to {ranks[-1]})"
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def entered(beat: Heartbeat, group_id: str) -> int:
    """The last sequence number of a group's collectives that a rank has entered."""
    seqs = [c.seq for c in beat.ring if c.group_id == group_id and c.op not in POINT_TO_POINT]
    return max(seqs, default=0)


def missing(call: Collective, beats: Mapping[int, Heartbeat]) -> set[int]:
    """The ranks for which `call` waits."""
    if call.op in POINT_TO_POINT:
        return {call.peer} & set(beats)
    members = call.members or [
        rank for rank, beat in beats.items() if any(c.group_id == call.group_id for c in beat.ring)
    ]
    known = [rank for rank in members if rank in beats]
    return {rank for rank in known if entered(beats[rank], call.group_id) < call.seq}


def first_difference(rank: int, beats: Mapping[int, Heartbeat]) -> Collective | None:
    """The first call in the ring of `rank` that differs from what most other members of its group
    did under the same number, in operation, bytes, step or phase.
    """
    others: dict[tuple[str, int], list[tuple]] = {}
    for other, beat in beats.items():
        for call in beat.ring if other != rank else ():
            others.setdefault((call.group_id, call.seq), []).append(_signature(call))
    for call in beats[rank].ring:
        theirs = others.get((call.group_id, call.seq))
        if not theirs or call.op in POINT_TO_POINT:
            continue
        most, count = Counter(theirs).most_common(1)[0]
        if most != _signature(call) and 2 * count > len(theirs):
            return call
    return None


def _signature(call: Collective) -> tuple:
    return call.op, call.num_bytes, call.step, call.phase


def _theirs(rank: int, call: Collective, beats: Mapping[int, Heartbeat]) -> Collective | None:
    """What another rank did under the number of `call`."""
    return next(
        (
            c
            for other, beat in sorted(beats.items())
            for c in beat.ring
            if other != rank and (c.group_id, c.seq) == (call.group_id, call.seq)
        ),
        None,
    )


def _others_wait(odd: set[int], beats: Mapping[int, Heartbeat]) -> tuple[str, str]:
    """(text about the ranks that wait for `odd`, the collective)."""
    calls: dict[str, list[int]] = {}
    for rank, beat in beats.items():
        call = beat.waiting
        if rank not in odd and call is not None and missing(call, beats) & odd:
            calls.setdefault(str(call), []).append(rank)
    if not calls:
        waiting = [(rank, b.waiting) for rank, b in beats.items() if rank not in odd and b.waiting]
        if not waiting:
            return "", ""
        calls = {str(waiting[0][1]): [rank for rank, _ in waiting]}
    text, ranks = max(calls.items(), key=lambda item: len(item[1]))
    verb = "waits" if len(ranks) == 1 else "wait"
    return f"; it misses {text}, in which {name_ranks(ranks)} {verb}", text


def _where(rank: int, beats: Mapping[int, Heartbeat]) -> str:
    beat = beats[rank]
    return f"{beat.phase} of step {beat.step}, micro-batch {beat.micro_batch}"


def _silent(beats: Mapping[int, Heartbeat], silent: Mapping[int, str]) -> Verdict:
    odd = set(silent)
    first = min(odd)
    waits, call = _others_wait(odd, beats)
    text = f"{name_ranks(odd)}: {silent[first]}, in {_where(first, beats)}{waits}"
    return Verdict(tuple(sorted(odd)), "silent", text, call)


def _busy(beats: Mapping[int, Heartbeat], odd: set[int]) -> Verdict:
    """Some ranks are in no collective; on NCCL, where nobody blocks in one, those behind."""
    groups = {c.group_id for beat in beats.values() for c in beat.ring}
    behind = {
        rank
        for rank in odd
        for group in groups & {c.group_id for c in beats[rank].ring}
        if entered(beats[rank], group) < max(entered(b, group) for b in beats.values())
    }
    odd = behind or odd
    first = min(odd)
    waits, call = _others_wait(odd, beats)
    are = "is" if len(odd) == 1 else "are"
    text = f"{name_ranks(odd)} {are} stuck in {_where(first, beats)}{waits}"
    return Verdict(tuple(sorted(odd)), "busy", text, call)


def _deadlock(beats: Mapping[int, Heartbeat]) -> Verdict:
    """All ranks wait in collectives."""
    waits_for = {rank: missing(beat.waiting, beats) - {rank} for rank, beat in beats.items()}
    votes = Counter(target for targets in waits_for.values() for target in targets)
    most = max(votes.values(), default=0)
    odd = {rank for rank, count in votes.items() if count == most}
    if len(odd) != 1:  # nobody misses a call: someone's differs under the same number
        differ = {rank for rank in beats if first_difference(rank, beats)}
        odd = differ if 0 < len(differ) < len(beats) else odd or set(beats)
    first = min(odd)
    different = first_difference(first, beats)
    waits, call = _others_wait(odd, beats)
    inside = f"{name_ranks(odd)} waits in {beats[first].waiting}, {_where(first, beats)}"
    if different is None:
        return Verdict(tuple(sorted(odd)), "missed", inside + waits, call)
    theirs = _theirs(first, different, beats)
    text = f"{inside}{waits}; its first call that differs is {different} in {different.phase}"
    text += f", where the others did {theirs} in {theirs.phase}"
    return Verdict(tuple(sorted(odd)), "different", text, call or str(theirs))


def diagnose(beats: Mapping[int, Heartbeat], silent: Mapping[int, str]) -> Verdict:
    """The odd ranks of a run in which nobody gets on. `silent`: ranks that do not beat -> why."""
    if silent:
        return _silent(beats, silent)
    free = {rank for rank, beat in beats.items() if beat.waiting is None}
    if free and len(free) < len(beats):
        return _busy(beats, free)
    if not free:
        return _deadlock(beats)
    verdict = _busy(beats, free)
    if len(verdict.ranks) < len(beats):
        return verdict
    text = f"all {len(beats)} ranks are stuck in {_where(min(beats), beats)}"
    return Verdict(tuple(sorted(beats)), "together", text)
