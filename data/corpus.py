"""Builds the quickstart's corpus from what every machine has: the Python interpreter itself.

Two domains, so that expert specialisation can be seen:

- ``code.jsonl``: the standard library's modules, one document a file, docstrings taken out;
- ``english.jsonl``: the language's reference topics (``pydoc_data.topics``), the docstrings of the
  same modules (one document a module), licence and README texts.

Each line is ``{"text": ..., "source": ...}``.  Documents come in the order of their source, exact
duplicates and very short ones are dropped, so the same interpreter gives the same bytes.
``manifest.json`` counts documents and bytes.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import inspect
import json
import platform
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from data.storage import atomic_file, make_folder, write_json
from megatron_ext.command import CommandLine, number
from megatron_ext.errors import DataError, exit_on_fatal

MEGABYTE = 10**6
DEFAULT_MAX_BYTES = 6 * MEGABYTE
SHORTEST_DOCUMENT = 200
FULL_SHARE = 0.99
SHORTEST_DOCSTRING = 20
SKIPPED_FOLDERS = {
    "__pycache__",
    "dist-packages",
    "encodings",
    "idlelib",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
}
README_NAMES = (
    "LICENSE.txt",
    "LICENSE",
    "README.txt",
    "README",
    "README.rst",
    "NEWS.txt",
    "HISTORY",
    "CREDITS",
)
Document = tuple[str, str]
"""(source, text)"""


def library_folder() -> Path:
    """The folder of the running interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def library_modules(library: Path) -> Iterator[tuple[str, str, ast.Module]]:
    """(source, text, syntax tree) of each module of the standard library, ordered by path."""
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        if SKIPPED_FOLDERS & set(relative.parts[:-1]):
            continue
        try:
            text = path.read_text(encoding="utf-8")
            yield str(relative), text, ast.parse(text)
        except (OSError, UnicodeDecodeError, SyntaxError, ValueError):
            continue  # lib2to3 and friends carry files that are wrong on purpose


def documented_nodes(tree: ast.Module) -> Iterator[tuple[ast.AST, ast.Expr]]:
    """(owner, docstring statement) of the module and of each class and function in it."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                if isinstance(first.value.value, str):
                    yield node, first


def without_docstrings(text: str, tree: ast.Module) -> str:
    """The module's source without its docstrings (kept where a body has nothing else)."""
    dropped: set[int] = set()
    for owner, docstring in documented_nodes(tree):
        if len(owner.body) > 1 and owner.body[1].lineno > (docstring.end_lineno or 0):  # type: ignore[attr-defined]
            dropped.update(range(docstring.lineno, (docstring.end_lineno or 0) + 1))
    lines = text.splitlines(keepends=True)
    return "".join(line for number, line in enumerate(lines, 1) if number not in dropped)


def docstrings(tree: ast.Module) -> str:
    """All docstrings of a module as one English text, in the order of the source."""
    found = sorted(
        (statement.lineno, inspect.cleandoc(statement.value.value))  # type: ignore[attr-defined]
        for _, statement in documented_nodes(tree)
    )
    return "\n\n".join(text for _, text in found if len(text) >= SHORTEST_DOCSTRING)


def reference_topics() -> Iterator[Document]:
    """The language reference as the interpreter's own help shows it."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield f"pydoc_data/topics/{name}", topics[name]


def readme_texts(library: Path) -> Iterator[Document]:
    """Licence, README and history texts that come with the interpreter."""
    for path in sorted(path for name in README_NAMES for path in library.rglob(name)):
        relative = path.relative_to(library)
        if not SKIPPED_FOLDERS & set(relative.parts[:-1]):
            try:
                yield str(relative), path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue  # an unreadable README is no reason to have no corpus


def code_documents(library: Path) -> Iterator[Document]:
    """The code domain."""
    for source, text, tree in library_modules(library):
        yield source, without_docstrings(text, tree)


def english_documents(library: Path) -> Iterator[Document]:
    """The English domain."""
    yield from reference_topics()
    yield from readme_texts(library)
    for source, _, tree in library_modules(library):
        yield f"{source}:docstrings", docstrings(tree)


def chosen(documents: Iterable[Document], max_bytes: int) -> Iterator[Document]:
    """Drops short documents and exact duplicates, and stops before ``max_bytes`` of text."""
    seen: set[bytes] = set()
    total = 0
    for source, text in documents:
        encoded = text.encode("utf-8")
        digest = hashlib.sha256(encoded).digest()
        if len(encoded) < SHORTEST_DOCUMENT or digest in seen or total + len(encoded) > max_bytes:
            if total > FULL_SHARE * max_bytes:
                return
            continue
        seen.add(digest)
        total += len(encoded)
        yield source, text


def write_domain(path: Path, documents: Iterable[Document]) -> dict[str, int]:
    """Writes one jsonl file; returns its counts (``bytes`` are of text, without the JSON around
    it).
    """
    count = text_bytes = 0
    with atomic_file(path) as stream:
        for source, text in documents:
            line = json.dumps({"text": text, "source": source}, ensure_ascii=False)
            stream.write(line.encode("utf-8") + b"\n")
            count += 1
            text_bytes += len(text.encode("utf-8"))
        if not count:
            raise DataError(
                f"{path.stem} has no document: the standard library's sources are missing",
                do="install the interpreter's library sources (not only .pyc)",
                path=library_folder(),
            )
    return {"documents": count, "bytes": text_bytes}


def build(out: Path, max_bytes: int = DEFAULT_MAX_BYTES) -> dict:
    """Writes ``code.jsonl``, ``english.jsonl`` and ``manifest.json`` into ``out``; returns the
    manifest.
    """
    make_folder(out)
    library = library_folder()
    domains = {"code": code_documents(library), "english": english_documents(library)}
    counts = {
        name: write_domain(out / f"{name}.jsonl", chosen(documents, max_bytes))
        for name, documents in domains.items()
    }
    manifest = {"python": platform.python_version(), "max_bytes": max_bytes, "domains": counts}
    write_json(out / "manifest.json", manifest)
    return manifest


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = CommandLine("python -m data.corpus", __doc__)
    made.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder for code.jsonl, english.jsonl and manifest.json; created when missing",
    )
    made.add_argument(
        "--max-bytes",
        type=number("Count"),
        default=DEFAULT_MAX_BYTES,
        help="most bytes of text in each domain (default %(default)s)",
    )
    return made


def main(argv: list[str] | None = None) -> None:
    """Entry point of ``python -m data.corpus``."""
    args = parser().parse_args(argv)
    manifest = build(args.out, args.max_bytes)
    for name, counts in manifest["domains"].items():
        print(f"{args.out / name}.jsonl documents={counts['documents']} bytes={counts['bytes']}")


if __name__ == "__main__":
    with exit_on_fatal():
        main()
