"""What TensorBoard, the pictures, the console line and the ledger events are made of."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_ext.config import parse
from megatron_ext.observe import console, pictures, tags
from megatron_ext.observe.artist import Artist
from megatron_ext.observe.ledger_events import LedgerEvents
from megatron_ext.observe.routing_file import read
from megatron_ext.observe.tensorboard import TensorBoard
from tests.bench.observe import EXPERTS, LAYERS, record_of, synthetic
from tests.ranks.tiny import TINY


def test_at_most_400_tags_for_64_layers_and_256_experts_and_40_domains(tmp_path):
    flags = "--log-timers-to-tensorboard --log-memory-to-tensorboard --log-params-norm"
    cfg = parse([*TINY, *flags.split(), "--num-layers", str(LAYERS)])
    board = TensorBoard(tmp_path, cfg, 0)
    record = record_of(1, synthetic(True))
    domains = {f"domain {number}": 1.0 for number in range(40)}
    optional = dict.fromkeys([*tags.STEP_TAGS, *tags.TIMER_TAGS], 1.0)
    board.write_step({**optional, **record, "tokens_seen_per_domain": domains})
    for split in ("validation", "test"):
        one = {"step": 1, "split": split, "val_loss": 1.0, "bits_per_byte": 1.0}
        board.write_validation({**one, "val_loss_per_domain": domains}, True)
    for event in ("requested", "staged", "durable", "verified", "pruned", "failed", "quarantined"):
        board.write_checkpoint_event({"event": event, "step": 1})
    artist = Artist(tmp_path, board.write_picture, 0)
    artist.draw(1, synthetic(True), list(domains)[:5])
    artist.close()
    board.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    found = events.Tags()
    assert len(found["scalars"]) + len(found["images"]) <= tags.MOST_TAGS
    assert set(found["images"]) == {"moe/expert load", "moe/co-selection", "moe/domains"}
    wanted = {"lm loss", "moe/z_loss_layer_1", "moe/max_violation_layer_64", "time/all-to-all"}
    assert wanted | {"lm loss validation/domain 0", "checkpoint/durable"} <= set(found["scalars"])
    assert events.Scalars("lm loss")[0].value == 2.5
    assert "config/text_summary" in found["tensors"]
    assert [line["step"] for line in read(tmp_path / "routing.jsonl")] == [1]


def test_layers_without_experts_have_no_curves():
    record = {"max_violation_per_layer": [0, 0.5], "router_entropy_share_per_layer": [0.0, 0.9]}
    found = tags.step_scalars({**record, "step": 1})
    assert found["moe/max_violation_layer_2"] == 0.5
    assert not [tag for tag in found if tag.endswith(("_layer_0", "_layer_1"))]


@pytest.mark.parametrize(("count", "most"), [(3, 60), (61, 60), (94, 60), (1, 8)])
def test_spread_keeps_both_ends(count, most):
    places = tags.spread(count, most)
    assert len(places) <= most and places[0] == 0 and places[-1] == count - 1


def _colours(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def test_the_busiest_expert_is_yellow_and_a_dead_one_white():
    counts = np.full((4, 8), 10.0)
    counts[2, 5], counts[2, 1] = 60.0, 0.0
    pixels = _colours(pictures.load(counts, np.array([False, True, True, True]), 7))
    dark, light = np.array(pictures.ANCHORS[0]), np.array(pictures.ANCHORS[-1])
    height, width = pictures.cell_size(4, 8, 1)
    left, top = pictures.MARGIN + 7, pictures.LINE * 3
    middle = lambda row, column: pixels[  # noqa: E731
        top + row * height + height // 2, left + column * width + width // 2
    ]
    assert (middle(2, 5) == light).all() and (middle(2, 1) == 255).all()
    assert (middle(0, 3) == 255).all()  # a dense layer
    assert not (middle(1, 3) == dark).all() and not (middle(1, 3) == light).all()


def test_lightness_grows_along_the_scale():
    rgb = np.frombuffer(pictures.palette(), np.uint8).reshape(-1, 3)[: pictures.LEVELS]
    luma = rgb @ np.array([0.2126, 0.7152, 0.0722])
    assert (np.diff(luma) > -0.6).all() and luma[-1] > luma[0] + 150


def test_pictures_of_every_size_are_readable_pngs():
    made = synthetic(True)
    look, moe = made.look, np.ones(LAYERS, bool)
    names = ["code", "english", "a/very/long/name/of/a/domain", "x", "y"]
    nmi = look.nmi_L().numpy()
    for png in (
        pictures.coselection(look.pairs_LEE.numpy(), moe, 1),
        pictures.domains(look.domains_LDE.numpy(), moe, nmi, names, 1),
        pictures.load(np.ones((1, 2)), np.ones(1, bool), 1),
        pictures.load(np.ones((LAYERS, EXPERTS)), moe, 1),
    ):
        height, width, _ = _colours(png).shape
        assert 200 <= height <= 1200 and 200 <= width <= 1700


def test_the_line_of_the_experts_names_the_worst_layer():
    record = {
        "max_violation": 0.5,
        "max_violation_per_layer": [0.1, 0.9, 0.5],
        "dead_expert_share_per_layer": [0.0, 0.25, 0.0],
        "num_dead_experts": 2,
        "dead_expert_share": 1 / 12,
        "router_entropy_share": 0.8,
        "load_entropy_share": 0.95,
    }
    line = console.expert_line(record, 8)
    assert "MaxVio: 0.500" in line and "worst layer: 2 (MaxVio 0.900, dead 2 of 8)" in line
    assert "\n" not in line


def test_ledger_events_come_once_and_only_whole(tmp_path):
    path = tmp_path / "ledger.jsonl"
    path.write_text(json.dumps({"event": "old", "step": 1}) + "\n")
    events = LedgerEvents(tmp_path)
    assert events.new() == []
    with path.open("a") as file:
        file.write(json.dumps({"event": "durable", "step": 2}) + '\nnot json\n{"event": "ver')
    assert [one["event"] for one in events.new()] == ["durable"]
    with path.open("a") as file:
        file.write('ified", "step": 2}\n')
    assert [one["event"] for one in events.new()] == ["verified"]
    assert LedgerEvents(tmp_path / "none").new() == []


def test_a_checkpoint_event_is_a_card_of_its_own_step(tmp_path):
    """Seen ten steps later, it was shown there, as the value 180 at step 190."""
    board = TensorBoard(tmp_path, parse(TINY), 0)
    board.write_checkpoint_event({"event": "durable", "step": 180})
    board.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    (seen,) = events.Scalars("checkpoint/durable")
    assert (seen.step, seen.value) == (180, 180.0)
    assert [one.step for one in events.Tensors("checkpoint/text_summary")] == [180]


def test_a_step_without_a_close_look_draws_nothing():
    assert torch.equal(synthetic(False).counts_LE, synthetic(True).counts_LE)
    assert synthetic(False).look is None


def test_a_resume_forgets_the_pictures_of_steps_that_are_run_again(tmp_path):
    path = tmp_path / "routing.jsonl"
    for first, steps in ((0, (2, 4, 6)), (4, (6, 8))):
        artist = Artist(tmp_path, lambda tag, png, step: None, first)
        for step in steps:
            artist.draw(step, synthetic(False), [])
        artist.close()
    written = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert written == [2, 4, 6, 8]
