"""Every YAML in configs/ passes a dry run on the ranks that its `# ranks: N` line names."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain_moe import main

ROOT = Path(__file__).parent.parent.parent
CONFIGS = sorted(
    path
    for suffix in ("yaml", "yml")
    for path in ROOT.glob(f"configs/**/*.{suffix}")
    # machines: tests/planner reads them; layouts are half a run: tests/recipes
    if path.parent.name not in ("clusters", "layouts")
)


def ranks_of(path: Path) -> int:
    """The number in the line `# ranks: N`."""
    found = re.search(r"^# ranks: (\d+)$", path.read_text(), re.MULTILINE)
    assert found, f"{path} has no line '# ranks: N'"
    return int(found[1])


def dry_run(path: Path) -> subprocess.CompletedProcess[str]:
    """`pretrain_moe.py --config PATH --dry-run`, finished."""
    size = ["--world-size", str(ranks_of(path))]
    command = [sys.executable, ROOT / "pretrain_moe.py", "--config", path, "--dry-run", *size]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_there_is_a_config():
    assert ROOT / "configs/quickstart.yaml" in CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_config_passes_its_dry_run(path, capsys):
    main(["--config", str(path), "--dry-run", "--world-size", str(ranks_of(path))])
    shown = capsys.readouterr()
    assert shown.err == ""
    assert shown.out.startswith(f"{ranks_of(path)} ranks = ")


@pytest.mark.parametrize(
    ("old", "new", "flag"),
    [
        ("num-experts: 8", "num-experts: 7", "--num-experts 7"),
        ("num-layers: 4", "num-layers: 5", "--num-layers 5"),
        ("# ranks: 4", "# ranks: 3", "--world-size 3"),
        ("swiglu: true", "swigloo: true", "swigloo"),
    ],
)
def test_a_broken_config_does_not(tmp_path, old, new, flag):
    text = (ROOT / "configs/quickstart.yaml").read_text()
    assert old in text
    (tmp_path / "broken.yaml").write_text(text.replace(old, new))
    done = dry_run(tmp_path / "broken.yaml")
    assert done.returncode == 64
    assert flag in done.stderr


def test_a_config_without_its_ranks_is_found(tmp_path):
    (tmp_path / "a.yaml").write_text("num-layers: 4\n")
    with pytest.raises(AssertionError, match="no line"):
        ranks_of(tmp_path / "a.yaml")
