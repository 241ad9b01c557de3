"""The house rules on every file of the house; the rules themselves are tested in test_rules.py."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.policy import rules

ROOT = Path(__file__).parent.parent.parent
PACKAGES = ("data", "launch", "megatron_ext")
SOURCES = [ROOT / "pretrain_moe.py", *(p for n in PACKAGES for p in (ROOT / n).rglob("*.py"))]
TESTS = sorted((ROOT / "tests").rglob("*.py"))
SECTIONS = sorted((ROOT / "megatron_ext/config/sections").glob("*.py"))
STANDIN = ROOT / "megatron_ext/device/standin.py"
"""Says what torch.cuda says, name by name: its functions need no other words."""


def over(paths, rule) -> list[str]:
    """The violations of a rule of (path, syntax tree)."""
    return [text for path in paths for text in rule(path.relative_to(ROOT), ast.parse(_read(path)))]


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _module(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def test_there_is_a_house():
    assert len(SOURCES) > 80 and len(SECTIONS) > 5


def test_packages_import_lower_layers_only():
    assert not over(SOURCES, lambda path, tree: rules.wrong_imports(_module(path), tree))


def test_files_and_functions_are_short():
    assert not [text for p in SOURCES for text in rules.long_file(p.relative_to(ROOT), _read(p))]
    assert not over(SOURCES, rules.long_functions)
    assert not over(SOURCES, rules.deep_nesting)


def test_the_program_is_one_screen_and_a_half():
    assert len(_read(ROOT / "pretrain_moe.py").splitlines()) <= 90


@pytest.mark.parametrize("rule", [rules.hidden_state, rules.swallowed_errors])
def test_no_hidden_state_and_no_swallowed_error(rule):
    assert not over([*SOURCES, *TESTS], rule)


def test_names_say_something():
    found = [text for p in [*SOURCES, *TESTS] for text in rules.vague_name(p.relative_to(ROOT))]
    assert not found


def test_nothing_is_left_for_later():
    found = [text for p in SOURCES for text in rules.left_for_later(p.relative_to(ROOT), _read(p))]
    assert not found


def test_public_things_are_documented():
    assert not over([path for path in SOURCES if path != STANDIN], rules.undocumented)


def test_our_config_fields_are_documented():
    assert not over(SECTIONS, rules.fields_without_help)


def test_shell_scripts_are_clean():
    shellcheck = Path(sys.executable).parent / "shellcheck"
    program = str(shellcheck) if shellcheck.exists() else shutil.which("shellcheck")
    if program is None:
        pytest.skip("shellcheck is not installed: pip install -r requirements-test.txt")
    scripts = [*ROOT.glob("launch/**/*.sh"), *ROOT.glob("launch/**/*.sbatch"), ROOT / ".ci/run"]
    scripts += ROOT.glob("tests/**/*.sh")
    assert len(scripts) >= 6
    command = [program, "--external-sources", *map(str, scripts)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
