"""Who gets the kernels and who is told that he cannot; no Triton is needed to ask."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ext.config import parse
from megatron_ext.config.checks import kernels as checks
from megatron_ext.errors import ConfigError
from megatron_ext.kernels import choose
from tests.ranks.tiny import TINY

ROOT = Path(__file__).parents[2]
INTERPRETED = {"TRITON_INTERPRET": "1"}


def _refusals(flags: str, environ: dict[str, str] = INTERPRETED) -> list[str]:
    try:
        parse([*TINY, "--moe-kernels", "triton", *flags.split()], environ)
    except ConfigError as error:
        return error.lines()
    return []


def test_torch_is_the_default():
    assert parse(TINY, {}).moe.moe_kernels == "torch"
    assert not choose.uses_triton("torch", "cuda")


@pytest.mark.parametrize("installed", [True, False])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("interpreted", ["0", "1"])
def test_triton_or_an_error(monkeypatch, installed, device, interpreted):
    monkeypatch.setattr(checks, "find_spec", lambda name: installed or None)
    monkeypatch.setenv("TRITON_INTERPRET", interpreted)
    if installed and (device == "cuda" or interpreted == "1"):
        assert choose.uses_triton("triton", device)
        return
    with pytest.raises(ConfigError, match="a CUDA device" if installed else "not installed"):
        choose.uses_triton("triton", device)


@pytest.mark.parametrize(
    "flags, said",
    {
        "--add-bias-linear": "no biases of experts",
        "--no-swiglu": "needs --swiglu",
        "--no-swiglu --quick-geglu": "needs --swiglu",
        "--activation-func-clamp-value 7": "excludes --activation-func-clamp-value",
        "--glu-linear-offset 1": "excludes --glu-linear-offset",
        "--moe-token-dispatcher-type allgather": "needs --moe-token-dispatcher-type alltoall",
        "--moe-expert-capacity-factor 1 --moe-pad-expert-input-to-capacity": "excludes --moe-pad",
        "--moe-apply-probs-on-input --moe-router-topk 1 --moe-router-pre-softmax": "excludes"
        " --moe-apply-probs-on-input",
        "--moe-shared-expert-intermediate-size 8 --moe-shared-expert-overlap": "excludes --moe-sha",
    }.items(),
)
def test_what_the_kernels_do_not_serve_is_refused(flags, said):
    lines = _refusals(flags)
    assert len(lines) == 1 and said in lines[0] and lines[0].endswith("--moe-kernels torch"), lines


def test_what_is_missing_is_said_before_torch_is_imported(monkeypatch):
    assert _refusals("") == []
    (line,) = _refusals("", environ={})
    assert "--moe-kernels triton needs a CUDA device, not --device cpu" in line
    assert _refusals("--dry-run", environ={}) == [line]  # --device cpu says which machine it is
    assert _refusals("--dry-run --device auto", environ={}) == []
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    (line,) = _refusals("")
    assert "--moe-kernels triton needs Triton, which is not installed" in line


def test_one_line_and_code_64_where_the_device_is_found_out(tmp_path):
    """--device auto on a machine without CUDA: nothing was started, no folder made."""
    code = (
        "import torch; torch.cuda.is_available = lambda: False\n"
        "import sys, pretrain_moe; pretrain_moe.main(sys.argv[1:])"
    )
    flags = ["--device", "auto", "--moe-kernels", "triton", "--run-dir", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-c", code, *TINY, *flags],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    fatal = [line for line in done.stderr.splitlines() if line.startswith("FATAL")]
    assert done.returncode == 64 and len(fatal) == 1, done.stderr
    assert "needs a CUDA device; this run's is cpu" in fatal[0]
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()


def test_the_package_is_imported_without_triton():
    """In a process of its own, since this one may have imported Triton."""
    code = (
        "import sys; sys.modules['triton'] = None; "
        "import megatron_ext.kernels, megatron_ext.kernels.choose, megatron_ext.kernels.order, "
        "megatron_ext.kernels.reference"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
