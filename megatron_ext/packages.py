"""Which package of others is missing, and the line that installs it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OURS = ("data", "launch", "megatron_ext", "pretrain_moe", "tests")
DISTRIBUTIONS = {
    "PIL": "pillow",
    "google": "protobuf",
    "megatron": "megatron-core",
    "transformer_engine": "transformer-engine",
    "yaml": "PyYAML",
}
"""Packages that pip knows by another name than the import."""


def missing_package(error: BaseException) -> tuple[str, str] | None:
    """(what is missing, what to do) for an import of a package of others that is not there."""
    name = (getattr(error, "name", None) or "").partition(".")[0]
    is_others = name and name not in OURS and name not in sys.stdlib_module_names
    if not isinstance(error, ModuleNotFoundError) or not is_others:
        return None
    package = DISTRIBUTIONS.get(name, name)
    what = f"the package {package} is missing in {sys.executable}"
    for listed in sorted(ROOT.glob("requirements*.txt"), key=lambda path: len(path.name)):
        if re.search(rf"^{re.escape(package)}\W", listed.read_text(encoding="utf-8"), re.M | re.I):
            return (
                what,
                f"use the Python of the quickstart's .venv, or pip install -r {listed.name}",
            )
    return what, f"pip install {package}"
