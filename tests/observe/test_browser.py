"""What a person sees: TensorBoard and the report of a real run, in Chromium.

Screenshots stay in the run folder: RUN/screenshots/*.png.
"""

from __future__ import annotations

import json
import shutil
import sys
import urllib.request

import pytest

from megatron_ext.mesh.forks import free_port
from megatron_ext.observe.report import __main__ as report
from tests.observe.browser import browser, serving, unavailable

COLOURS = """
const seen = new Set();
const canvas = document.querySelectorAll("canvas")[arguments[0]];
const bytes = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
for (let i = 0; i < bytes.length; i += 4) {
  seen.add(bytes[i] << 16 | bytes[i + 1] << 8 | bytes[i + 2]);
}
return [...seen].sort();
"""
PICTURES = """
const deep = (root) => [...root.querySelectorAll("*")].flatMap((one) =>
  [one, ...(one.shadowRoot ? deep(one.shadowRoot) : [])]);
return deep(document).filter((one) => one.tagName === "IMG" && one.naturalWidth > 0
  && one.getBoundingClientRect().width > 20).length;
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A tab of a fresh Chromium."""
    reason = unavailable()
    if reason:
        pytest.skip(reason)
    with browser(tmp_path_factory.mktemp("chromium")) as tab:
        yield tab


@pytest.fixture(scope="module")
def board(trained, tmp_path_factory):
    """Address of TensorBoard over the run."""
    port = free_port()
    flags = f"--host 127.0.0.1 --port {port} --load_fast=false --reload_interval 0".split()
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(trained / "tensorboard")]
    log = tmp_path_factory.mktemp("tensorboard") / "log"
    with serving([*command, *flags], f"http://127.0.0.1:{port}/data/logdir", log):
        yield f"http://127.0.0.1:{port}"


def tags(board: str, plugin: str) -> set[str]:
    """Tags that TensorBoard's server knows of a plugin."""
    with urllib.request.urlopen(f"{board}/data/plugin/{plugin}/tags", timeout=30) as answer:
        runs = json.loads(answer.read())
    return {tag for found in runs.values() for tag in found}


def test_tensorboard_shows_the_scalars(board, page, trained):
    assert {"lm loss", "grad-norm", "learning-rate", "lm loss validation"} <= tags(board, "scalars")
    page.open(f"{board}/#scalars")
    page.until_text("lm loss", "grad-norm", "learning-rate")
    page.screenshot(trained / "screenshots/tensorboard_scalars.png")


def test_tensorboard_shows_the_pictures(board, page, trained):
    assert tags(board, "images")
    page.open(f"{board}/#images")
    assert page.until(PICTURES) > 0
    page.screenshot(trained / "screenshots/tensorboard_images.png")


def test_tensorboard_shows_the_config(board, page, trained):
    page.open(f"{board}/#text")
    page.until_text("config", "num_moe_experts", "moe_router_load_balancing_type")
    page.screenshot(trained / "screenshots/tensorboard_text.png")


@pytest.fixture(scope="module")
def shown(trained, page):
    """The report, opened from the disk."""
    report.main([str(trained)])
    page.complaints()
    page.open((trained / "report.html").as_uri())
    return page


def test_the_report_shows_every_part(shown, trained):
    text = shown.until_text(
        "Loss", "Learning rate", "Gradient norm", "Load of each expert", "Imbalance of each layer",
        "Where the time of a step goes", "Memory of each rank", "One step, rank by rank",
        "Configuration", "Events", "nats a token", "time of a step, mean over ranks",
    )  # fmt: skip
    assert "resumed" in text and "rank 0: waits for stages" in text
    assert "never" not in text and "undefined" not in text and "NaN" not in text
    curves = "return document.querySelectorAll('#loss svg path.curve').length"
    assert shown.script(curves) >= 5
    shown.screenshot(trained / "screenshots/report.png")
    assert shown.complaints() == []


def test_nothing_is_wider_than_the_window(shown):
    width = "return [document.documentElement.scrollWidth, window.innerWidth]"
    wide, window = shown.script(width)
    assert wide <= window == 1280


def test_the_timeline_has_the_colours_of_its_legend(shown, trained):
    all_ = "[...document.querySelectorAll('canvas')]"
    index = f"return {all_}.findIndex((one) => one.className === 'timeline')"
    shown.script("document.getElementById('pipeline').scrollIntoView()")
    colours = shown.script(COLOURS, shown.script(index))
    assert {0x0072B2, 0x009E73, 0xDFE3E8, 0xE69F00, 0x56B4E9} <= set(colours)
    shown.screenshot(trained / "screenshots/report_pipeline.png")


def test_hovering_says_the_values(shown):
    move = """
      const at = arguments[0].getBoundingClientRect();
      const [x, y] = [at.left + at.width * 0.6, at.top + at.height * 0.5];
      arguments[0].dispatchEvent(new MouseEvent("mousemove", {clientX: x, clientY: y}));
      return document.getElementById("tip").textContent;
    """
    find = "const found = document.querySelector('#loss svg');"
    said = shown.script(find + move.replace("arguments[0]", "found"))
    assert said.startswith("step 5\ntraining: 5.") and "validation: 5." in said


def test_the_slider_moves_through_the_routing(trained, page, tmp_path):
    """Three intervals whose busy expert moves: the picture follows, and says so."""
    from megatron_ext.observe import routing_file

    run = tmp_path / "run"
    shutil.copytree(trained, run, ignore=shutil.ignore_patterns("checkpoints", "routing.jsonl"))
    for step in (2, 4, 6):
        counts = [
            [60 if expert == step + layer - 2 else 1 for expert in range(8)] for layer in (0, 1)
        ]
        more = {"domains": ["code", "english"], "domain_counts": [counts, counts[::-1]]}
        record = {"counts": counts, "is_moe": [True, True], "nmi": [0.1, 0.2], **more}
        routing_file.append(run / routing_file.NAME, step, record)
    report.main([str(run)])
    page.complaints()
    page.open((run / "report.html").as_uri())
    page.until_text("Which domain uses which expert", "normalised mutual information")
    describe = """
      const canvas = document.querySelector("#experts canvas");
      const found = [];
      for (let column = 0; column < 8; column++) found.push(canvas.values(0, column));
      const label = document.querySelector("#experts output").textContent;
      return [label, found.indexOf(Math.max(...found))];
    """
    assert page.script(describe) == ["step 6", 4]
    move = """
      const input = document.querySelector("#experts input[type=range]");
      input.value = arguments[0];
      input.dispatchEvent(new Event("input"));
    """
    for index, step, busiest in ((0, 2, 0), (1, 4, 2)):
        page.script(move, index)
        assert page.script(describe) == [f"step {step}", busiest]
    page.script("document.getElementById('experts').scrollIntoView()")
    page.screenshot(trained / "screenshots/report_experts.png")
    assert page.complaints() == []


def test_two_runs_side_by_side(trained, page, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(trained, other, ignore=shutil.ignore_patterns("checkpoints", "traces"))
    config = other / "config.yaml"
    config.write_text(config.read_text().replace("  lr: 0.003", "  lr: 0.004", 1))
    report.main([str(trained), "--compare", str(other), "--out", str(tmp_path / "two.html")])
    page.complaints()
    page.open((tmp_path / "two.html").as_uri())
    text = page.until_text("Flags that differ", "0.003", "0.004", "other, training")
    assert "No trace: train with --trace-schedule STEP." in text
    page.screenshot(trained / "screenshots/report_compare.png")
    assert page.complaints() == []


def test_an_empty_run_is_a_page_too(page, tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "lm_loss": NaN}\n{"step": 2, "lm_loss": 2}\n'
    )
    report.main([str(tmp_path)])
    page.complaints()
    page.open((tmp_path / "report.html").as_uri())
    page.until_text("These records have no time split", "No config.yaml", "nats a token")
    assert page.complaints() == []
