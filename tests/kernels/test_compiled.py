"""The kernels compile for GPUs that are not here: the interpreter knows no shared memory, no tensor
cores and no types of pointers.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed: requirements-test.txt brings it")

ROOT = Path(__file__).parents[2]
SHARED_BYTES = 227 * 1024
"""What a block of threads may have on compute capability 9.0 (CUDA C++ Programming Guide)."""
KERNELS = {
    "_spread", "_collect", "_row_dots", "_forward", "_backward",
    "_rows_times_weights", "_weight_gradient",
}  # fmt: skip


def test_every_kernel_compiles_for_hopper(tmp_path):
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compiled", "90", "bfloat16"],
        cwd=ROOT,
        env=environ | {"TRITON_CACHE_DIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {one["kernel"] for one in found} == KERNELS
    assert all(one["cubin_bytes"] for one in found)
    assert max(one["shared_bytes"] for one in found) <= SHARED_BYTES
    for one in found:
        if one["kernel"] in ("_rows_times_weights", "_weight_gradient"):
            is_large = one.get("BLOCK_M", 64) >= 64
            assert (one["wgmma"], one["mma"]) == (is_large, not is_large), one
