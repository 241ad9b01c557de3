"""Run megatron-core on a CPU by rewriting its CUDA words while its modules are imported.

megatron-core 0.16.1 names the device in its source: `torch.cuda.current_device()` (175 places),
`device="cuda"` (59), `.cuda()`, streams and events. `lift()` installs an import hook for
`megatron.core.*` alone that rewrites the syntax tree before it is compiled; torch itself and every
other package stay as they are.

    torch.cuda.X            ->  megatron_ext.device.standin.X
    from torch.cuda import  ->  from megatron_ext.device.standin import
    tensor.cuda(...)        ->  tensor.cpu()
    "cuda"                  ->  "cpu"
    "torch.cuda.FloatTensor" -> "torch.FloatTensor"   (what `Tensor.type()` says on a CPU)

Rewritten byte code is cached beside Python's own (its name carries the rewriter's version), so a
second start costs no more than a normal import. It is used where it belongs to this user, to root
or to the owner of the source, whose code runs here in any case, and nobody else may write it; else
it is made anew, with one warning.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.machinery
import importlib.util
import logging
import marshal
import os
import sys
import types
from pathlib import Path

from megatron_ext.owned import ForeignFile, read_own

PACKAGE = "megatron.core"
STANDIN = "megatron_ext.device.standin"
REWRITER_VERSION = 2
_ALIAS = "_cuda_standin"
_foreign: list[Path] = []  # of all modules, for one warning


class _Rewriter(ast.NodeTransformer):
    """The five rules of the module docstring."""

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        self.generic_visit(node)
        is_torch_cuda = (
            node.attr == "cuda" and isinstance(node.value, ast.Name) and node.value.id == "torch"
        )
        return ast.copy_location(ast.Name(_ALIAS, ast.Load()), node) if is_torch_cuda else node

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        if isinstance(node.func, ast.Attribute) and node.func.attr == "cuda":
            node.func.attr, node.args, node.keywords = "cpu", [], []
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        if isinstance(node.value, str):
            if node.value == "cuda":
                return ast.copy_location(ast.Constant("cpu"), node)
            if node.value.startswith("torch.cuda.") and node.value.endswith("Tensor"):
                return ast.copy_location(
                    ast.Constant("torch." + node.value.rpartition(".")[2]), node
                )
        return node

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.stmt:
        if node.module == "torch.cuda" and node.level == 0:
            node.module = STANDIN
        return node


def rewrite(source: str, filename: str = "<source>") -> ast.Module:
    """Return the syntax tree of `source` with every CUDA word replaced by its CPU counterpart."""
    tree = _Rewriter().visit(ast.parse(source, filename))
    first = 0
    for statement in tree.body:  # the import goes after the docstring and __future__ imports
        is_docstring = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
        is_future = isinstance(statement, ast.ImportFrom) and statement.module == "__future__"
        if not (is_docstring or is_future):
            break
        first += 1
    tree.body.insert(first, ast.Import([ast.alias(STANDIN, _ALIAS)]))
    return ast.fix_missing_locations(tree)


class _CpuLoader(importlib.machinery.SourceFileLoader):
    """Loads one megatron-core module from its rewritten source."""

    def exec_module(self, module: types.ModuleType) -> None:
        super().exec_module(module)
        if module.__name__ == f"{PACKAGE}.jit":
            # `jit_fuser` is torch.compile: it would need a C++ compiler at run time, pulls inductor
            # into every start (1.5 s), and is bound by decorators while the next modules are
            # imported.
            module.disable_jit_fuser()

    def get_code(self, fullname: str) -> types.CodeType | None:
        path = self.get_filename(fullname)
        source = self.get_data(path)
        if b"cuda" not in source:
            return super().get_code(fullname)
        cache = Path(importlib.util.cache_from_source(path, optimization=f"cpu{REWRITER_VERSION}"))
        key = importlib.util.source_hash(source)
        code = _kept(cache, key, os.stat(path).st_uid)
        if code is None:
            code = compile(rewrite(source.decode(), path), path, "exec", dont_inherit=True)
            if not sys.dont_write_bytecode:
                _keep(cache, key, code)
        return code


def _kept(cache: Path, key: bytes, source_owner: int) -> types.CodeType | None:
    """The byte code of a source with this hash; None where there is none, a torn or a foreign
    one.
    """
    try:
        descriptor, content = read_own(cache, owners=(0, source_owner))
    except OSError:
        return None
    except ForeignFile as error:
        if not _foreign and os.environ.get("LOCAL_RANK", "0") == "0":
            logging.getLogger(__name__).warning(
                "%s: byte code like it is made anew (remove *.opt-cpu*.pyc there)", error
            )
        _foreign.append(cache)
        return None
    os.close(descriptor)
    head = len(key) + hashlib.sha256().digest_size
    body = content[head:]
    is_whole = content[:head] == key + hashlib.sha256(body).digest()
    return marshal.loads(body) if is_whole else None


def _keep(cache: Path, key: bytes, code: types.CodeType) -> None:
    """Whole or not at all; a folder that cannot be written is fine."""
    body = marshal.dumps(code)
    fresh = cache.with_name(f"{cache.name}.{os.getpid()}")
    with contextlib.suppress(OSError):
        cache.parent.mkdir(exist_ok=True)
        with open(fresh, "xb", opener=lambda *how: os.open(*how, 0o644)) as file:
            os.fchmod(file.fileno(), 0o644)
            file.write(key + hashlib.sha256(body).digest() + body)
        os.replace(fresh, cache)


class _CpuFinder:
    """Meta path finder: megatron.core modules get the rewriting loader, nothing else changes."""

    @staticmethod
    def find_spec(fullname, path=None, target=None):
        if fullname != PACKAGE and not fullname.startswith(PACKAGE + "."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and type(spec.loader) is importlib.machinery.SourceFileLoader:
            spec.loader = _CpuLoader(spec.loader.name, spec.loader.path)
        return spec


def is_lifted() -> bool:
    """True when megatron-core is (or will be) imported for the CPU in this process."""
    return _CpuFinder in sys.meta_path


def lift() -> None:
    """From now on `import megatron.core` gives the CPU version. Call it before the first such
    import.
    """
    if is_lifted():
        return
    assert PACKAGE not in sys.modules, "lift() must run before megatron.core is imported"
    sys.meta_path.insert(0, _CpuFinder)
