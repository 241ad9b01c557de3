"""The report: what it gathers, how it stays small, and what it says where something is missing."""

from __future__ import annotations

import base64
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest

from megatron_ext.observe import routing_file
from megatron_ext.observe.report import __main__ as report
from megatron_ext.observe.report.compose import PAGE, compose
from megatron_ext.observe.report.events import events
from megatron_ext.observe.report.flags import differing, flags
from megatron_ext.observe.report.gather import gather
from megatron_ext.observe.report.thin import every, extremes, packed, relative

MIB = 2**20


def write_metrics(run, num_steps, **more):
    run.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"step": n, "lm_loss": 3 + 1 / n, "step_time_s": 0.5, "grad_norm": 1.0, **more})
        for n in range(1, num_steps + 1)
    ]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return run


def data_of(page: str) -> dict:
    """The JSON that a page carries."""
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])


class Loads(HTMLParser):
    """Everything that a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.found += [value for name, value in attrs if name in ("src", "srcset", "data")]
        self.found += [value for name, value in attrs if name == "href" and tag == "link"]


def test_a_real_run_fills_every_part(trained, capsys):
    report.main([str(trained)])
    out = capsys.readouterr().out
    page = (trained / "report.html").read_text()
    assert str(trained / "report.html") in out
    (run,) = data_of(page)["runs"]
    assert run["num_steps"] == 8 and run["world_size"] == "4"
    assert [step for step, _ in run["curves"]["lm_loss"]] == list(range(1, 9))
    assert [step for step, _ in run["curves"]["validation/val_loss"]] == [3, 6, 8]
    assert run["time"]["steps"] == list(range(1, 9)) and len(run["ranks"]["rows"]) == 4
    kinds = {span[2] for span in run["trace"]["spans"]}
    assert {"forward", "backward", "pipeline_wait", "all_to_all", "optimizer"} <= kinds
    assert len(run["violations"]["rows"]) == 4 and run["routing"]["experts"] == 8
    assert run["routing"]["is_series"] and run["routing"]["steps"] == [2, 4, 6, 8]
    assert run["routing"]["domains"]["names"] == ["code", "english"]
    assert len(run["routing"]["domains"]["nmi"]) == 4 and run["routing"]["coselection"]["step"] == 8
    assert [step for step, _ in run["curves"]["validation/domain/code"]] == [3, 6, 8]
    starts = [(one["what"], one["step"]) for one in run["events"] if one["source"] == "run"]
    assert starts == [("start", 0), ("resume", 6)]
    assert any(one["source"] == "ledger" and one["step"] == 8 for one in run["events"])


def test_a_page_loads_nothing(trained):
    page = compose([gather(trained)])
    loads = Loads()
    loads.feed(page)
    assert loads.found == []
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in page and "default-src 'none'" in page


def test_texts_of_a_run_stay_texts(tmp_path):
    run = write_metrics(tmp_path / "<b>run", 2)
    evil = "</script><script>alert(1)</script><!--"
    (run / "config.yaml").write_text(f'observe:\n  run_dir: "{evil}"  # flag\n')
    (run / "logs").mkdir()
    line = f"2026-01-02 03:04:05,678 level=WARNING megatron_ext: {evil}\n"
    (run / "logs/rank_00000.log").write_text(line * 3)
    page = compose([gather(run)])
    assert evil not in page and "<b>run" not in page
    (found,) = data_of(page)["runs"]
    assert found["flags"][0]["value"] == f'"{evil}"'
    (event,) = found["events"]
    assert event["text"] == f"megatron_ext: {evil} (3 times)" and event["what"] == "warning"


def test_a_long_run_of_a_large_model_is_a_small_page(tmp_path):
    """100,000 steps; 64 layers x 256 experts over 300 intervals, with 8 domains."""
    run = write_metrics(tmp_path / "long", 100_000)
    generator = np.random.default_rng(0)
    counts = generator.integers(1, 5000, (64, 256))
    more = {"is_moe": [True] * 64, "domains": list("abcdefgh"), "nmi": [0.1] * 64}
    one = {"counts": counts, **more, "domain_counts": np.stack([counts] * 8)}
    line = routing_file.line_of(1, one)
    with (run / routing_file.NAME).open("w") as file:
        for step in range(100, 1001, 100):
            file.write(line.replace('"step":1,', f'"step":{step},', 1))
        for step in range(1100, 30_001, 100):
            short = line.split(',"domains"')[0] + "}"
            file.write(short.replace('"step":1,', f'"step":{step},', 1) + "\n")
    page = compose([gather(run)])
    assert len(page.encode()) < 5 * MIB
    (found,) = data_of(page)["runs"]
    assert found["routing"]["steps"][-1] == 30_000 and len(found["routing"]["steps"]) > 40
    assert found["routing"]["domains"]["steps"] == [100, 200, 300, 400, 600, 700, 900, 1000] or (
        found["routing"]["domains"]["steps"][-1] == 1000
    )
    assert len(found["curves"]["lm_loss"]) <= 810


def test_a_spike_survives_the_thinning_and_so_does_nan():
    points = [(n, 1.0) for n in range(50_000)]
    points[31_415], points[27_182] = (31_415, 9.0), (27_182, math.nan)
    kept = extremes(points)
    assert len(kept) < 900 and kept[0][0] == 0 and kept[-1][0] == 49_999
    assert (31_415, 9.0) in kept and any(math.isnan(value) for _, value in kept)
    assert [step for step, _ in kept] == sorted({step for step, _ in kept})
    assert every(range(100), 3) == [0, 50, 99] and every([1, 2], 1) == [2]


def test_only_dead_experts_are_zero():
    loads = relative(np.array([[0, 1, 9999], [0, 0, 0]]))
    levels = list(base64.b64decode(packed(loads)))
    assert levels == [0, 1, 150, 0, 0, 0]
    assert list(base64.b64decode(packed(np.array([99.0])))) == [255]


def test_an_old_run_with_metrics_only(tmp_path):
    (found,) = data_of(compose([gather(write_metrics(tmp_path / "old", 3))]))["runs"]
    parts = ("routing", "time", "ranks", "trace", "violations")
    assert [found[part] for part in parts] == [None] * 5
    assert found["flags"] == found["events"] == []


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "no metrics of a run"), ("", "has no record"), ("{\n{}\n", "line 1 is not JSON")],
)
def test_no_metrics_is_one_line(content, says, tmp_path, capsys):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(SystemExit) as ended:
        report.main([str(tmp_path)])
    error = capsys.readouterr().err
    assert ended.value.code == 65 and error.count("\n") == 1
    assert error.startswith("FATAL 65 ") and says in error


def test_no_such_run_and_no_such_place(tmp_path, capsys):
    for argv, code in (
        ([str(tmp_path / "nowhere")], 65),
        ([str(write_metrics(tmp_path / "run", 2)), "--out", "/proc/nowhere/page.html"], 74),
    ):
        with pytest.raises(SystemExit) as ended:
            report.main(argv)
        error = capsys.readouterr().err
        assert ended.value.code == code and error.count("\n") == 1, error


SCRIPT = """
globalThis.document = {getElementById: () => ({})};
const [file, resumes, box, highs] = process.argv.slice(1).map(
  (one, at) => at ? JSON.parse(one) : one);
const read = (name) => require("fs").readFileSync(`${file}/${name}.js`, "utf8");
const ask = "return [resumeLabels(resumes, (s) => s, box), highs.map((h) => timeAxis(h, 'time'))]";
const text = [...["draw", "lines", "bars"].map(read), ask].join("\\n");
const [labels, axes] = new Function("resumes", "box", "highs", text)(resumes, box, highs);
const shown = axes.map((one) => [one.y, ...one.ticks.map(one.format)]);
console.log(JSON.stringify([labels, shown]));
"""


def _drawn(resumes, left, right, highs):
    """What the page's scripts say, run by node: labels of resumes, axes of times."""
    words = [str(PAGE), *map(json.dumps, (resumes, {"left": left, "right": right}))]
    command = ["node", "-e", SCRIPT, *words, json.dumps(highs)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return json.loads(done.stdout)


@pytest.mark.skipif(shutil.which("node") is None, reason="no node")
def test_labels_of_resumes_stay_apart_and_inside():
    for places in ([84], [1140], [84, 90, 500], [1100, 1120, 1146], list(range(84, 1146, 7))):
        labels, _ = _drawn([[place, "#000"] for place in places], 84, 1146, [])
        ends = [(one["x"], one["x"] + 7.6 * len(one["text"])) for one in labels]
        assert ends and ends[0][0] >= 84 and ends[-1][1] <= 1146
        assert all(end <= begin for (_, end), (begin, _) in zip(ends, ends[1:]))
    labels, _ = _drawn([[84, "#000"], [90, "#000"], [500, "#000"]], 84, 1146, [])
    assert [one["text"] for one in labels] == ["resumed ×2", "resumed"]


@pytest.mark.skipif(shutil.which("node") is None, reason="no node")
def test_an_axis_of_times_has_one_unit():
    _, (seconds, milli, micro) = _drawn([], 0, 1, [2.5, 0.5, 4e-5])
    assert seconds[0] == "time (s)" and seconds[1:] == ["0", "0.5", "1", "1.5", "2", "2.5"]
    assert milli[0] == "time (ms)" and milli[1:] == ["0", "100", "200", "300", "400", "500"]
    assert micro[0] == "time (µs)" and micro[1:] == ["0", "10", "20", "30", "40"]


def test_the_baseline_and_the_sample_are_on_the_page(tmp_path):
    run = write_metrics(tmp_path / "run", 3)
    assert (gather(run)["unigram"], gather(run)["sample"]) == (None, None)
    (run / "data").mkdir()
    (run / "data/unigram.json").write_text('{"nats_per_token": 6.8283, "bits_per_byte": 2.826}')
    (run / "sample.txt").write_text("def f():\n  </script>\n")
    found = gather(run)
    assert found["unigram"] == {"nats_per_token": 6.8283, "bits_per_byte": 2.826}
    assert found["sample"] == "def f():\n  </script>"
    assert data_of(compose([found]))["runs"][0]["sample"] == found["sample"]
    (run / "data/unigram.json").write_text("[")
    assert gather(run)["unigram"] is None


def test_two_runs_and_the_flags_that_differ(trained, tmp_path, capsys):
    other = tmp_path / "other"
    ignored = shutil.ignore_patterns("checkpoints", "traces", "tensorboard")
    shutil.copytree(trained, other, ignore=ignored)
    text = (other / "config.yaml").read_text()
    changed = re.sub(r"(?m)^  lr: \S+  # .*$", "  lr: 0.5  # flag", text)
    assert changed != text
    (other / "config.yaml").write_text(changed)
    report.main([str(trained), "--compare", str(other), "--out", str(tmp_path / "two.html")])
    found = data_of((tmp_path / "two.html").read_text())
    assert [run["path"] for run in found["runs"]] == [str(trained), str(other)]
    assert {(one["flag"], one["a"], one["b"]) for one in found["differing"]} == {
        ("lr", "0.003", "0.5")
    }
    assert "MiB" in capsys.readouterr().out


def test_flags_keep_their_origin(tmp_path):
    text = 'a:\n#   w: 4  # environment\n  x: "y # z"  # file:c.yaml\nb:\n  x: null  # default\n'
    (tmp_path / "config.yaml").write_text(text)
    found = flags(tmp_path)
    assert [tuple(one.values()) for one in found] == [
        ("a", "w", "4", "environment"),
        ("a", "x", '"y # z"', "file:c.yaml"),
        ("b", "x", "null", "default"),
    ]
    assert differing(found, found) == []
    assert [one["b"] for one in differing(found, found[:2])] == ["-"]


def test_events_of_all_sources_come_by_time(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    ledger = '{"time": 5.0, "event": "durable", "step": 2, "bytes": 7}\n{"event": "sta'
    (tmp_path / "checkpoints/ledger.jsonl").write_text(ledger)
    (tmp_path / "health.jsonl").write_text('{"time": 4.0, "event": "collapse", "step": 1}\n')
    reason = {"code": 76, "rank": 3, "step": 3, "what": "NaN", "do": "look", "time": 6.0}
    (tmp_path / "exit_reason.json").write_text(json.dumps(reason))
    steps = [{"step": 1, "started_unix_s": 3.0}]
    steps += [{"step": 1, "health": "dead", "what": "w", "action": "warn", "layer": 0, "do": "d"}]
    found = [(one["what"], one["source"], one["step"]) for one in events(tmp_path, steps)]
    assert found == [
        ("start", "run", 0),
        ("dead", "health", 1),
        ("collapse", "health", 1),
        ("durable", "ledger", 2),
        ("exit 76", "exit", 3),
    ]


def test_the_routing_file_is_read_as_it_was_written(tmp_path):
    path = tmp_path / routing_file.NAME
    for step in (2, 4, 6):
        record = {"counts": np.array([[step, 1.0]]), "is_moe": [True], "nmi": None}
        routing_file.append(path, step, record)
    with path.open("a") as file:
        file.write('{"step": 8, "cou')
    read = routing_file.read(path)
    assert [one["step"] for one in read] == [2, 4, 6] and read[0]["counts"] == [[2, 1]]
    assert "nmi" not in read[0]
    routing_file.cut(path, 4)
    assert [one["step"] for one in routing_file.read(path)] == [2, 4]
