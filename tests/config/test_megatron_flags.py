"""Every flag that Megatron-LM's launch scripts use is parsed, with its default and meaning."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from megatron_ext.config import parse
from megatron_ext.config.argv import spellings_table
from megatron_ext.config.flags import all_flags

FIXTURE = Path(__file__).with_name("megatron_flags.csv")
ROWS = list(csv.DictReader(FIXTURE.read_text().splitlines()))

EXAMPLES = {
    "--moe-layer-freq": ["([0]*3+[1]*58)"],
    "--window-attn-skip-freq": ["[1,1,1,0]"],
    "--window-size": ["(128,0)"],
    "--recompute-modules": ["core_attn", "moe_act"],
    "--cuda-graph-scope": ["attn", "moe_router"],
    "--moe-aux-loss-coeff": ["0.01", "1e-3"],
    "--pipeline-model-parallel-layout": ["Et|t*3L"],
    "--data-path": ["0.7", "code", "0.3", "text"],
    "--rampup-batch-size": ["32", "32", "1000"],
}
EXPECTED = {
    "--moe-layer-freq": [0] * 3 + [1] * 58,
    "--window-attn-skip-freq": [1, 1, 1, 0],
    "--window-size": (128, 0),
    "--moe-aux-loss-coeff": [0.01, 0.001],
    "--rampup-batch-size": [32, 32, 1000],
    "--profile-ranks": [7],
    "--iterations-to-skip": [7],
}
NOT_PLAIN_DEFAULTS = {
    # Derived by Megatron-LM from other flags, or None there means megatron-core's own default.
    "--num-experts",
    "--moe-hybridep-num-sms",
    "--rope-type",
    "--cuda-graph-scope",
    "--no-load-optim",
    "--no-load-rng",
    "--no-save-optim",
    "--no-save-rng",
    # A deprecated switch for what is on by default.
    "--ckpt-fully-parallel-save",
    # Ours differ, and say so in their help.
    "--transformer-impl",
    "--distributed-backend",
    "--rerun-mode",
    "--no-one-logger",
    "--use-mcore-models",
    "--use-dist-ckpt",
    # An empty list, None, or a number for the signal: the same meaning.
    "--moe-deepep-num-sms",
    "--use-cpu-initialization",
    "--yarn-correction-range-round-to-int",
    "--no-yarn-correction-range-round-to-int",
    "--profile-ranks",
    "--exit-signal",
    "--iterations-to-skip",
    "--no-overlap-p2p-communication",
    "--cp-comm-type",
}


def name(row: dict) -> str:
    return row["flags"].split()[0]


def words(row: dict) -> list[str]:
    if row["action"] != "Store":
        return []
    if name(row) in EXAMPLES:
        return EXAMPLES[name(row)]
    if row["choices"]:
        return [str(json.loads(row["choices"])[0])]
    return [str(number(row))] if row["type"] in ("int", "float") else ["word"]


def number(row: dict) -> float:
    """7, or what a share may be."""
    limits = spellings_table()[name(row).replace("_", "-")].kind.range
    return 7 if limits is None or limits.holds(7) else 0.5


def shown(argv: list[str]) -> dict[str, tuple[object, str]]:
    """dest -> (value, origin) of a run that only prints its configuration."""
    cfg = parse([*argv, "--print-config", "json"], {})
    table = json.loads(cfg.to_json())
    for extra in ("no_effect", "warnings"):
        table.pop(extra)
    entries = ((d, e) for section in table.values() for d, e in section.items())
    return {dest: (entry["value"], entry["origin"]) for dest, entry in entries}


def test_the_fixture_has_all_rows_that_must_parse():
    needs = [row["need"] for row in ROWS]
    assert {n: needs.count(n) for n in set(needs)} == {"must": 231, "accept": 63, "should": 232}


@pytest.mark.parametrize("row", ROWS, ids=name)
def test_a_flag_parses_with_its_value(row):
    table = spellings_table()
    for spelled in row["flags"].split():
        flag = table[spelled.replace("_", "-")]
        value, origin = shown([spelled, *words(row)])[flag.dest]
        if origin != "flag":
            # The value was refined by a rule, for instance sequence_parallel without tp.
            assert origin == "derived"
            continue
        if row["action"] == "StoreTrue":
            assert value is (spelled not in flag.negatives)
        elif row["action"] == "StoreFalse":
            assert value is False
        elif name(row) in EXPECTED:
            expected = EXPECTED[name(row)]
            assert value == (list(expected) if isinstance(expected, tuple) else expected)
        elif row["type"] in ("int", "float"):
            assert value == (json.loads(row["choices"])[0] if row["choices"] else number(row))


PLAIN = [row for row in ROWS if name(row) not in NOT_PLAIN_DEFAULTS]


@pytest.mark.parametrize("row", PLAIN, ids=name)
def test_a_default_is_megatrons(row):
    flag = spellings_table()[name(row).replace("_", "-")]
    default = flag.default
    if row["action"] == "StoreTrue":
        inverted = name(row) in flag.negatives
        assert default is inverted
    else:
        assert default == json.loads(row["default"] or "null")


def test_all_flags_at_once_make_one_warning_line():
    argv = [w for row in ROWS for w in (name(row), *words(row))]
    cfg = parse([*argv, "--print-config", "json"], {})
    lines = [w for w in cfg.warnings if w.startswith("no effect")]
    assert len(lines) == 1
    for flag in ("--fp8-format", "--enable-cuda-graph", "--inprocess-restart"):
        assert flag in lines[0]
    assert "\n" not in lines[0]


MIXTRAL_SCRIPT = """
--use-mcore-models --disable-bias-linear --seq-length 64 --max-position-embeddings 32768
--num-layers 2 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4
--init-method-std 0.01 --attention-dropout 0.0 --hidden-dropout 0.0 --normalization RMSNorm
--position-embedding-type rope --swiglu --untie-embeddings-and-output-weights
--group-query-attention --num-query-groups 2 --no-masked-softmax-fusion --no-position-embedding
--rotary-base 1000000 --num-experts 8 --moe-router-topk 2
--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2 --moe-grouped-gemm
--moe-token-dispatcher-type alltoall --overlap-param-gather --overlap-grad-reduce
--tokenizer-type Llama2Tokenizer --tokenizer-model m --data-path p --split 99990,8,2
--micro-batch-size 1 --global-batch-size 8 --lr 1e-4 --train-iters 500 --lr-decay-iters 320
--lr-decay-style cosine --min-lr 1.0e-5 --weight-decay 0.1 --lr-warmup-iters 50 --clip-grad 1.0
--bf16 --tensor-model-parallel-size 1 --pipeline-model-parallel-size 1
--expert-model-parallel-size 2 --use-distributed-optimizer --sequence-parallel --log-interval 1
--save-interval 100 --eval-interval 100 --eval-iters 10 --save s --load l --tensorboard-dir t
--no-load-optim --no-load-rng --distributed-timeout-minutes 60
"""


def test_a_mixtral_script_scaled_down_passes_every_rule():
    cfg = parse(MIXTRAL_SCRIPT.split(), {"WORLD_SIZE": "2"})
    assert cfg.action == "train"
    assert cfg.parallel.data_parallel_size == 2 and cfg.train.global_batch_size == 8
    assert (cfg.schedule.lr_decay_iters, cfg.schedule.lr_warmup_iters) == (320, 50)
    expected = "--sequence-parallel has no effect with --tensor-model-parallel-size 1"
    assert cfg.warnings == (expected,)


def test_scripts_defaults_need_no_warning():
    cfg = parse(
        "--use-mcore-models --no-one-logger --rerun-mode disabled --disable-msc --ckpt-format"
        " torch_dist --attention-backend auto --no-masked-softmax-fusion --no-rope-fusion"
        " --no-gradient-accumulation-fusion --print-config json".split(),
        {},
    )
    assert cfg.warnings == ()


def test_every_flag_has_help_and_one_section():
    for flag in all_flags().values():
        if flag.section not in ("transformer", "optimizer", "ddp"):
            assert flag.help, f"{flag.dest} has no docstring"
            assert flag.help.endswith("."), flag.dest
