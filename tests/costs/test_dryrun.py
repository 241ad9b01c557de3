"""What --dry-run prints, for one rank and for 8,192."""

from __future__ import annotations

import subprocess
import sys
import time

from megatron_ext.costs.dryrun import dry_run, short
from tests.costs import models
from tests.costs.models import config

V3_GRID = (
    "--world-size 8192 --pipeline-model-parallel-size 16 --decoder-first-pipeline-num-layers 3"
    " --decoder-last-pipeline-num-layers 2 --expert-model-parallel-size 64"
    " --expert-tensor-parallel-size 1 --global-batch-size 15360"
    " --moe-router-load-balancing-type global_aux_loss --moe-aux-loss-coeff 0.01"
)


def test_eight_thousand_ranks_in_a_second():
    began = time.monotonic()
    text = dry_run(config(models.DEEPSEEK_V3, V3_GRID))
    assert time.monotonic() - began < 2
    assert text.startswith("8192 ranks = pp 16 x dp 512 x cp 1 x tp 1 = pp 16 x edp 8 x ep 64")
    assert "pp 15: layers 59-60 + loss" in text
    assert "total 671.03B (671026404352), active 37.55B" in text
    assert "15360 sequences = 30 micro-batches x 1 x dp 512" in text
    assert "global_aux_loss coefficient 0.01, effective 0.01 (--moe-global-aux-scale exact" in text


def test_megatrons_strength_is_shown():
    text = dry_run(config(models.DEEPSEEK_V3, V3_GRID + " --moe-global-aux-scale megatron"))
    assert "effective 1.95313e-05 (--moe-global-aux-scale megatron, dp 512)" in text


def test_one_rank_and_an_unknown_vocabulary():
    text = dry_run(config(models.TINY.replace("--vocab-size 1000", "")))
    assert "groups of rank 0: none, one rank" in text
    assert "its tables are NOT in the counts" in text
    assert "layers: 4 of 4 placed, 4 with experts; no pipeline" in text


def test_numbers_are_short():
    assert [short(n) for n in (5, 1500, 46_702_792_704, 2e12)] == ["5", "1.50K", "46.70B", "2.00T"]


def test_no_torch_is_imported():
    code = (
        "import sys; from tests.costs import models; from megatron_ext.costs.dryrun import dry_run;"
        "dry_run(models.config(models.TINY));"
        "assert not {'torch', 'numpy', 'megatron'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
