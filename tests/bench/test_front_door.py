"""The front door, its parts, and one tiny comparison in real processes."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

from megatron_ext.config import parse
from tests.bench import __main__ as front_door
from tests.bench import ceilings, layer, step, table
from tests.bench.driver import Candidate, Result, faster
from tests.bench.peers.catalogue import DEFAULT, PEERS, chosen
from tests.bench.peers.plain import MoE
from tests.bench.peers.training import MasterAdamW
from tests.bench.shapes import Shape, flags_of, shape_of
from tests.bench.step_table import Found

TINY = Shape(32, 1, 2, 4, 2, 16, 64, 16, 2, 0.01)
TINY_MODEL = """
device: cpu
mock-data: true
tokenizer-type: NullTokenizer
vocab-size: 127
num-layers: 1
hidden-size: 32
num-attention-heads: 2
ffn-hidden-size: 16
moe-ffn-hidden-size: 16
num-experts: 4
moe-router-topk: 2
moe-router-load-balancing-type: aux_loss
moe-aux-loss-coeff: 0.01
moe-token-dispatcher-type: alltoall
moe-grouped-gemm: true
normalization: RMSNorm
swiglu: true
disable-bias-linear: true
position-embedding-type: rope
untie-embeddings-and-output-weights: true
hidden-dropout: 0.0
attention-dropout: 0.0
seq-length: 16
max-position-embeddings: 16
micro-batch-size: 2
lr: 1.0e-3
train-iters: 1
eval-iters: 0
"""


def test_an_unknown_table_is_a_usage_error(capsys):
    assert front_door.main([]) == front_door.main(["steps"]) == 64
    text = capsys.readouterr().err
    assert "step" in text and "layer" in text and "checkpoint" in text and "data" in text


def test_help_names_every_table(capsys):
    assert front_door.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n{name} " in text for name in front_door.TABLES)


def test_groups_of_peers_share_ours_and_the_ceilings():
    own = Candidate("ceilings", "x"), Candidate("ours", "x")
    found = Found(*map(Result, own))
    for number, seconds in enumerate((1.0, 2.0)):
        group = [*map(Result, own), Result(Candidate(f"peer {number}", "x"))]
        for result in group:
            result.rounds = [{"seconds": [seconds if result is group[1] else 3.0]}]
        found.add(group)
    assert found.ours.seconds() == [1.0, 2.0] and len(found.limits.rounds) == 2
    assert [quotient for _, quotient in found.others] == [3.0, 1.5]  # each within its group


def test_a_table_escapes_aligns_and_shows_what_is_missing():
    text = table.markdown(("name", "tokens/s"), [["a|b", "1,234"], ["c", math.nan]])
    head, rule, first, second = text.splitlines()
    assert rule == "| ---- | -------: |" and first == "| a\\|b |    1,234 |"
    assert second.split("|")[2].strip() == "-" and len(head) == len(rule) == len(second)


def test_ceilings_are_plausible(tmp_path):
    before = torch.get_float32_matmul_precision()
    for dtype in (torch.bfloat16, torch.float32):
        assert 0.1 < ceilings.matmul_gflops(dtype, side=256) < 1e6
    assert torch.get_float32_matmul_precision() == before
    assert 0.1 < ceilings.copy_gb_s(1 << 20) < 1e4
    rate = ceilings.direct_write_gb_s(str(tmp_path), ceilings.BLOCK)
    assert math.isnan(rate) or rate > 0
    found = {"bf16 GFLOP/s": 3.0, "fp32 GFLOP/s": 1.0, "fp32 oneDNN GFLOP/s": 2.0}
    assert ceilings.of_dtype(found, "bf16") == 3 and ceilings.of_dtype(found, "fp32") == 2
    assert "fp32 oneDNN 2.0 GFLOP/s" in ceilings.as_line(found)


def test_the_shape_of_bench_moe():
    cfg = parse([*flags_of("bench-moe", "fp32", 4), "--run-dir", "unused"])
    shape = shape_of(cfg)
    assert (shape.tokens, shape.vocabulary, shape.head) == (2048, 8192, 64)
    assert shape.flops_per_token == pytest.approx(31.56e6, rel=1e-3)
    assert not cfg.transformer.bf16


def test_quotients_are_taken_within_a_round():
    ours, other = Result(Candidate("ours", "x")), Result(Candidate("other", "x", ranks=2))
    ours.rounds = [{"seconds": [1.0, 1.0]}, {"seconds": [4.0]}, {"seconds": [2.0]}]
    other.rounds = [{"seconds": [2.0, 3.0]}, {"seconds": [10.0]}, {"seconds": [5.0]}]
    assert faster(ours, other) == 2.5 / 2  # the other did the work of two steps
    other.error = "no"
    assert math.isnan(faster(ours, other))


def test_peers_are_chosen_by_a_part_of_their_name():
    assert {peer.label for peer in chosen(None, "fp32")} == set(DEFAULT)
    assert chosen(["all"], "fp32") == PEERS and len(chosen(["plain"])) == 2
    assert len(chosen(["torchtitan"])) == 2 and len(chosen(["torchtitan"], "fp32")) == 4
    assert [peer.label for peer in chosen([DEFAULT[0]])] == [DEFAULT[0]]
    assert [peer.label for peer in chosen(["sequential"])] == ["megatron-core SequentialMLP"]


def test_plain_pytorch_equals_a_loop_over_experts():
    torch.manual_seed(1)
    moe = MoE(TINY)
    for p in moe.parameters():
        torch.nn.init.normal_(p, 0.0, 0.3)
    x = torch.randn(TINY.batch, TINY.sequence, TINY.hidden)
    rows = x.flatten(0, 1)
    weights, ids = moe.router(rows).softmax(-1).topk(TINY.topk)
    weights = weights / weights.sum(-1, keepdim=True)
    expected = torch.zeros_like(rows)
    for token in range(len(rows)):
        for weight, expert in zip(weights[token], ids[token]):
            gate, up = (rows[token] @ moe.up_EHF[expert]).chunk(2)
            expected[token] += weight * ((F.silu(gate) * up) @ moe.down_EFH[expert])
    torch.testing.assert_close(moe(x)[0].flatten(0, 1), expected, rtol=1e-4, atol=1e-5)


def test_masters_keep_what_bf16_would_lose():
    weight = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    recipe = {"lr": 1e-4, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.0, "clip": 0.0}
    optimizer = MasterAdamW([weight], recipe)
    for _ in range(100):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert weight.grad is None
    assert weight.float().max() < 1.0  # one update of 1e-4 is below the spacing at 1.0


def test_a_layer_counts_its_experts_products():
    shape = layer.shape_of((2048, 256, 128, 16, 2))
    assert layer.forward_flops(shape) == 6 * 2048 * 2 * 256 * 128
    assert layer.label_of((1, 2)) == "(1, 2)"


def test_one_tiny_step_of_ours_and_of_a_peer(tmp_path, capsys):
    model, written = tmp_path / "tiny.yaml", tmp_path / "step.json"
    model.write_text(TINY_MODEL)
    argv = f"--model {model} --dtype fp32 --rounds 1 --steps 2 --warm 1 --threads 1 --sequences 2"
    peers = ("plain PyTorch, grouped_mm", "HF Mixtral, eager")
    args = [*argv.split(), "--only", *peers, "--json", str(written)]
    # a peer whose package is not in that interpreter is a line of the table, no failure
    assert step.main([*args, "--peers-python", "/bin/false"]) == 0
    text = capsys.readouterr().out
    assert "| ours" in text and "not run: " in text and "ceilings measured in this run" in text
    found = {one["name"]: one for one in json.loads(written.read_text())["candidates"]}
    ours, plain = found["ours"], found["plain PyTorch, grouped_mm"]
    assert ours["parameters"] == plain["parameters"]
    assert len(ours["seconds"][0]) == 2 and ours["peak_mib"] > ours["imports_mib"]
    assert abs(ours["losses"][0] - math.log(128)) < 0.5 > abs(plain["losses"][0] - math.log(128))
