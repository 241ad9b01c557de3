"""What README and the other documents name exists: files, modules, flags."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from megatron_ext.config.argv import every_flag

ROOT = Path(__file__).parent.parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
OTHER_PROGRAMS = re.compile(r"^(pip|git|apt-get|APEX|NVTE|\.venv/bin/(pip|tensorboard))")
SOURCE_FILE = re.compile(r"`([\w./-]+\.(?:py|sh|md|yaml|sbatch|txt|toml))(?:::\w+)?`")
LINK = re.compile(r"\]\(([^)#:]+)\)")


def code_blocks(text: str) -> list[str]:
    """The fenced blocks of bash."""
    return re.findall(r"```(?:bash|sh)\n(.*?)```", text, re.DOTALL)


def commands(text: str) -> list[str]:
    """One line for each command of the bash blocks; comments and continuation lines are joined."""
    joined = "\n".join(code_blocks(text)).replace("\\\n", " ")
    lines = (line.partition(" #")[0].strip() for line in joined.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def known_flags() -> set[str]:
    """Every spelling of the training program."""
    flags = every_flag().values()
    spellings = {name for flag in flags for name in (*flag.names, *flag.negatives)}
    return spellings | {"--config", "--dry-run", "--print-config", "--help"}


def missing_files(text: str) -> list[str]:
    """Files that a document names in backquotes or links to and that do not exist."""
    named = {*SOURCE_FILE.findall(text), *LINK.findall(text)}
    paths = {name for name in named if "/" in name or name.isupper() or name.endswith(".md")}
    bases = (ROOT, ROOT / "megatron_ext", ROOT / "docs")
    return sorted(p for p in paths if not any((base / p).exists() for base in bases))


def wrong_commands(text: str) -> list[str]:
    """Commands that name a missing script, module or flag."""
    return [line for line in commands(text) if not _is_right(line)]


def _is_right(line: str) -> bool:
    words = line.split()
    if OTHER_PROGRAMS.match(line):
        return True
    scripts = [word for word in words if word.endswith((".sh", ".py", ".sbatch"))]
    if not all((ROOT / script).exists() for script in scripts):
        return False
    if "-m" in words[:3]:
        module = words[words.index("-m") + 1]
        return importlib.util.find_spec(module) is not None
    is_training = any(word.endswith(("pretrain_moe.py", "launch/run.sh")) for word in words)
    flags = {word.partition("=")[0] for word in words if word.startswith("--")}
    launchers = {"--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint", "--restarts"}
    return not is_training or flags <= known_flags() | launchers


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_documents_name_what_exists(path):
    text = path.read_text(encoding="utf-8")
    assert not missing_files(text)
    assert not wrong_commands(text)


def test_the_readme_begins_with_the_two_commands():
    found = commands((ROOT / "README.md").read_text(encoding="utf-8"))
    assert found[:2] == ["bash launch/quickstart.sh", "bash tests/run.sh"]


def test_a_rotten_document_is_found():
    block = "```bash\n{}\n```\n"
    for bad in (
        "bash launch/nowhere.sh",
        "python -m data.nowhere --input x",
        "bash launch/run.sh 4 --num-expertz 8",
        "torchrun --nproc-per-node 2 pretrain_moe.py \\\n  --sequence-paralel",
    ):
        assert wrong_commands(block.format(bad)), bad
    good = "bash launch/run.sh 4 --config configs/quickstart.yaml  # trains\npip install x"
    assert not wrong_commands(block.format(good))
    assert missing_files("see `megatron_ext/nowhere.py` and [x](docs/none.md)")
    assert not missing_files("see `device/lift.py`, `pretrain_moe.py` and [x](launch/local.py)")
