"""The schedule trace, the time split and the profiler of a real training on 4 ranks."""

from __future__ import annotations

import json
import time
from collections import defaultdict

import pytest
import torch

from megatron_ext.mesh.forks import run_ranks
from megatron_ext.observe.kinds import KINDS
from megatron_ext.observe.spans import HostClock, Recorder, Span, own_seconds
from megatron_ext.observe.trace_schedule import chrome, exchange, lanes, merge, offsets, write_rank
from tests.observe.conftest import PROFILED, TRACED


@pytest.fixture(scope="module")
def spans(trained) -> list[dict]:
    """What the traced step's file shows."""
    whole = json.loads((trained / f"traces/schedule_step_{TRACED}.json").read_text())
    assert whole["otherData"] == {"step": TRACED, "ranks": 4}
    return [event for event in whole["traceEvents"] if event["ph"] == "X"]


def ends(event: dict) -> float:
    return event["ts"] + event["dur"]


def passes(spans: list[dict]) -> dict:
    """(rank, kind, chunk, micro-batch) -> its span."""
    found = {}
    for event in spans:
        if event["tid"] == 0 and event["cat"] in ("forward", "backward"):
            key = (event["pid"], event["cat"], event["args"]["chunk"], event["args"]["micro_batch"])
            assert key not in found
            found[key] = event
    return found


def test_every_pass_of_every_rank_is_there_in_the_order_of_the_pipeline(spans):
    """2 micro-batches x 2 chunks x forward and backward on 4 ranks; data flows down, then up."""
    found = passes(spans)
    assert len(found) == 4 * 2 * 2 * 2
    order = [(0, 0), (2, 0), (0, 1), (2, 1)]  # (rank of data-parallel replica 0, chunk)
    for micro_batch in (0, 1):
        down = [found[rank, "forward", chunk, micro_batch] for rank, chunk in order]
        up = [found[rank, "backward", chunk, micro_batch] for rank, chunk in reversed(order)]
        path = [*down, *up]
        for one, then in zip(path, path[1:]):
            assert ends(one) <= then["ts"] + 1.0, (one, then)  # microseconds, rounded to 0.1


def test_main_rows_do_not_overlap_and_later_stages_wait(spans):
    rows = defaultdict(list)
    for event in spans:
        if event["tid"] == 0 and event["cat"] in ("forward", "backward", "optimizer", "data"):
            rows[event["pid"]].append(event)
    for row in rows.values():
        row.sort(key=lambda event: event["ts"])
        assert all(ends(one) <= then["ts"] + 1.0 for one, then in zip(row, row[1:]))
        assert {event["cat"] for event in row} == {"forward", "backward", "optimizer", "data"}
    first = passes(spans)[2, "forward", 0, 0]["ts"]
    waits = [e for e in spans if e["pid"] == 2 and e["tid"] == 0 and e["cat"] == "pipeline_wait"]
    assert any(wait["ts"] < first and wait["args"]["peer"] == 0 for wait in waits)


def test_a_collective_ends_on_all_its_ranks_after_it_began_on_each(spans):
    """The n-th all-to-all of ranks 0 and 1: none leaves before the other has arrived."""
    calls = defaultdict(list)
    for event in spans:
        if event["tid"] > 0 and event["cat"] == "all_to_all":
            calls[event["pid"]].append(event)
    pairs = list(zip(*(sorted(calls[rank], key=lambda e: e["ts"]) for rank in (0, 1))))
    assert len(calls[0]) == len(calls[1]) == len(pairs) >= 8
    assert all(min(map(ends, pair)) >= max(e["ts"] for e in pair) - 1.0 for pair in pairs)


def test_the_time_split_is_a_part_of_the_step(trained):
    records = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "lm_loss" in record]
    assert [record["step"] for record in steps] == list(range(1, 9))
    for record in steps:
        mean = {kind: record[f"time_{kind}_s"] for kind in KINDS}
        inside = sum(mean.values()) - mean["save"]
        assert 0.5 * record["step_time_s"] < inside
        for kind in KINDS:
            assert 0 <= mean[kind] <= record[f"time_{kind}_max_s"]
        busy = ("forward", "backward", "all_to_all", "pipeline_wait", "optimizer", "data")
        assert all(mean[kind] > 0 for kind in busy)
    assert any(record["time_save_s"] > 0 for record in steps)  # before step 4 and step 7
    starts = [record["step"] for record in steps if "started_unix_s" in record]
    assert starts == [1, 7]


def test_the_split_of_each_rank_and_the_weights_bytes(trained):
    found = json.loads((trained / "ranks.json").read_text())
    columns = {name: at for at, name in enumerate(found["columns"])}
    assert found["step"] == 8 and len(found["ranks"]) == 4
    for row in found["ranks"]:
        inside = sum(row[columns[kind]] for kind in KINDS if kind != "save")
        assert inside <= row[columns["step"]] * 1.001
        assert row[columns["memory_weights"]] > 0 and row[columns["memory_optimizer"]] > 0
        held = sum(row[columns[f"memory_{part}"]] for part in ("weights", "gradients", "optimizer"))
        assert held < row[columns["memory_peak"]]


def test_the_profiler_writes_the_asked_rank_only(trained):
    names = sorted(path.name for path in (trained / "traces").glob("profile_*"))
    assert names == ["profile_rank_1.json"]
    events = json.loads((trained / "traces" / names[0]).read_text())["traceEvents"]
    operations = {event["name"] for event in events if event.get("cat") == "cpu_op"}
    assert "aten::mm" in operations and any("Backward" in name for name in operations)
    assert PROFILED == 4


def test_own_time_is_without_what_is_inside():
    spans = [
        Span("forward", "F0", -1, 0.0, 10.0),
        Span("all_to_all", "a", 0, 2.0, 5.0),
        Span("collectives", "b", 0, 6.0, 7.0),
        Span("optimizer", "o", -1, 10.0, 12.0),
        Span("collectives", "c", 3, 10.5, 11.0),
    ]
    own = own_seconds(spans)
    assert own["forward"] == 6.0 and own["all_to_all"] == 3.0
    assert own["optimizer"] == 1.5 and own["collectives"] == 1.5
    assert sum(own.values()) == 12.0


def test_a_span_closes_when_its_work_fails():
    recorder = Recorder(HostClock())
    with pytest.raises(ValueError, match="no"), recorder.span("save"), recorder.span("collectives"):
        raise ValueError("no")
    with recorder.span("data"):
        pass
    outer, inner, after = recorder.take()
    assert (inner.parent, after.parent) == (0, -1)
    assert outer.start <= inner.start <= inner.end <= outer.end <= after.start


def test_offsets_of_machines_are_found_and_ranks_of_one_machine_share_theirs():
    """Rank 2 and 3 sit on a machine whose clock is 40 s ahead; exits jitter by up to a ms."""
    generator = torch.Generator().manual_seed(1)
    jitter = torch.rand(4, 9, generator=generator, dtype=torch.float64) * 1e-3
    exits = (torch.arange(9) + jitter + torch.tensor([0.0, 0.0, 40.0, 40.0])[:, None]).tolist()
    found = offsets(exits, [7, 7, 9, 9])
    assert found[0] == found[1] == 0.0 and found[2] == found[3]
    assert abs(found[2] - 40.0) < 1e-3


def _measure_offset() -> float:
    torch.distributed.init_process_group("gloo", init_method="env://")
    rank = torch.distributed.get_rank()
    try:
        return exchange(lambda: time.perf_counter() + 100.0 * rank, rank, torch.device("cpu"))
    finally:
        torch.distributed.destroy_process_group()


def test_the_exchange_finds_the_clock_of_another_machine():
    found = run_ranks(_measure_offset, 2)
    assert found[0] == 0.0 and abs(found[1] - 100.0) < 0.5


def test_overlapping_collectives_get_rows_of_their_own():
    calls = [
        ("collectives", name, start, end, {})
        for name, start, end in [("a", 0, 4), ("b", 1, 2), ("c", 2, 3), ("d", 5, 6)]
    ]
    assert [(row, call[1]) for row, call in lanes(calls)] == [
        (0, "a"),
        (1, "b"),
        (1, "c"),
        (0, "d"),
    ]


def test_ranks_meet_on_one_clock_and_a_missing_part_is_named(tmp_path):
    """Rank 1's clock is 50 s ahead; both did the same at the same time."""
    for rank, ahead in ((0, 0.0), (1, 50.0)):
        made = [Span("forward", "F0", -1, 3.0 + ahead, 4.0 + ahead, {"micro_batch": 0})]
        call = [("all_to_all", "all_to_all", 3.2 + ahead, 3.4 + ahead, {})]
        write_rank(tmp_path, 5, rank, ahead, made, call)
    assert merge(tmp_path, 5, 3) == [2]
    whole = json.loads((tmp_path / "schedule_step_5.json").read_text())
    shown = [
        (e["pid"], e["tid"], e["ts"], e["dur"]) for e in whole["traceEvents"] if e["ph"] == "X"
    ]
    assert shown == [(0, 0, 0, 1e6), (0, 1, 2e5, 2e5), (1, 0, 0, 1e6), (1, 1, 2e5, 2e5)]
    names = [e["args"]["name"] for e in whole["traceEvents"] if e["name"] == "thread_name"]
    assert names == ["rank 0", "collectives", "rank 1", "collectives"]
    assert list(tmp_path.iterdir()) == [tmp_path / "schedule_step_5.json"]
    assert chrome([])["traceEvents"] == []
