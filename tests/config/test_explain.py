"""--explain-flags: every given flag stands in one group, with its value, origin and reason."""

from __future__ import annotations

import subprocess
import sys

import pytest

from megatron_ext.config import parse
from megatron_ext.config.explain import Explanation, explain, to_text
from pretrain_moe import main

MIXTRAL = """
--use-mcore-models --disable-bias-linear --seq-length 64 --max-position-embeddings 64
--num-layers 8 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4 --swiglu
--group-query-attention --num-query-groups 2 --position-embedding-type rope
--no-position-embedding --rotary-base 1000000 --num-experts 8 --moe-router-topk 2
--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2 --moe-grouped-gemm
--moe-token-dispatcher-type alltoall --moe-deepep-num-sms 20 --micro-batch-size 1
--lr 1e-4 --min-lr 1e-5 --train-iters 500 --lr-decay-style cosine --lr-wsd-decay-iters 50 --bf16
--tensor-model-parallel-size 2 --pipeline-model-parallel-size 4 --expert-model-parallel-size 4
--expert-tensor-parallel-size 1 --sequence-parallel --use-distributed-optimizer
--save-retain-interval 1000 --no-rope-fusion --fp8-format hybrid --no-one-logger
--wandb-exp-name first --log-interval 1 --use-flash-attn --tp-comm-overlap
"""


def explained(words: str, environ: dict | None = None) -> Explanation:
    return explain(parse([*words.split(), "--explain-flags"], environ or {}))


def flags_of(lines) -> dict[str, str]:
    return {line.flag: line.text for line in lines}


def test_every_given_flag_stands_in_exactly_one_group():
    found = explained(MIXTRAL)
    groups = [flags_of(g) for g in (found.used, found.no_effect, found.other_names)]
    given = {word for word in MIXTRAL.split() if word.startswith("--")}
    assert set().union(*groups) == given
    assert sum(map(len, groups)) == len(given)
    assert set(groups[1]) == {
        "--moe-deepep-num-sms",
        "--lr-wsd-decay-iters",
        "--no-rope-fusion",
        "--fp8-format",
        "--no-one-logger",
        "--wandb-exp-name",
        "--tp-comm-overlap",
    }
    assert set(groups[2]) == {
        "--use-mcore-models",
        "--no-position-embedding",
        "--save-retain-interval",
        "--use-flash-attn",
    }
    assert groups[0]["--lr"] == "learning rate and weight decay, megatron-core's OptimizerConfig"
    assert groups[1]["--wandb-exp-name"] == "--wandb-project is not given"
    assert groups[2]["--save-retain-interval"] == "write --keep-last 1 --keep-every N"


def test_what_follows_is_derived_and_the_world_is_the_smallest_that_fits():
    derived = {line.flag: line.value for line in explained(MIXTRAL).derived}
    assert derived["--world-size"] == "16"  # lcm(tp 2 * pp 4, etp 1 * pp 4 * ep 4)
    assert (derived["--keep-last"], derived["--keep-every"]) == ("1", "1000")
    assert derived["--global-batch-size"] == "2"
    launched = {line.flag: line for line in explained(MIXTRAL, {"WORLD_SIZE": "64"}).derived}
    assert launched["--world-size"].value == "64"
    assert launched["--world-size"].source == "environment"


def test_origins_are_named_and_what_was_overridden(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("lr: 1e-3\nseed: 7\nwandb-exp-name: a\n")
    found = explained(f"--config {path} {MIXTRAL} --seed 7 --seed 8")
    used = {line.flag: line for line in found.used}
    assert used["--lr"].source == f"flag, over 0.001 of {path}"
    assert used["--seed"].value == "8" and used["--seed"].source == "flag, over 7 of flag"
    unread = {line.flag: line for line in explained(f"--config {path} {MIXTRAL}").no_effect}
    assert unread["--wandb-exp-name"].source == f"flag, over a of {path}"


def test_a_value_that_a_rule_refined_shows_both():
    words = MIXTRAL.replace("--tensor-model-parallel-size 2", "--tensor-model-parallel-size 1")
    line = next(x for x in explained(words).no_effect if x.flag == "--sequence-parallel")
    assert (line.value, line.text) == ("-> False", "--tensor-model-parallel-size is 1")


def test_the_text_is_aligned_and_ends_with_the_defaults():
    blocks = to_text(explained(MIXTRAL)).split("\n\n")
    titles = [block.splitlines()[0].partition(":")[0] for block in blocks[:4]]
    assert titles == [
        "used",
        "no effect",
        "other or old names, read as said",
        "derived from these",
    ]
    rows = blocks[0].splitlines()[1:]
    assert len({row.index(" flag ") for row in rows}) == 1
    assert "values keep their default" in blocks[-1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--num-expert 8", "use --num-experts"),
        ("--global-batch-size 3", "must be a multiple"),
        ("--qk-clip", "needs Megatron-LM's own training loop"),
    ],
)
def test_a_wrong_command_line_is_explained_and_refused(words, said, capsys):
    with pytest.raises(SystemExit) as left:
        main([*MIXTRAL.split(), *words.split(), "--explain-flags"])
    shown = capsys.readouterr()
    assert left.value.code == 64
    assert shown.out.startswith("used: ") and "  --num-layers " in shown.out
    assert said in shown.err and "Traceback" not in shown.err


def test_what_a_training_misses_is_said():
    words = "--num-layers 4 --swiglu --lr x"
    explanation = explained(words)
    missing = [line.flag for line in explanation.missing]
    assert [line.flag for line in explanation.used] == ["--num-layers", "--swiglu"]
    assert "--hidden-size" in missing and "--data-path" in missing and "--lr" not in missing
    assert "missing for a training: " in to_text(explanation)


def test_the_program_explains_without_torch():
    code = (
        "import sys, pretrain_moe\n"
        f"pretrain_moe.main({MIXTRAL.split()!r} + ['--explain-flags'])\n"
        "assert not {'torch', 'numpy', 'megatron'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("used: ")
