"""Memory of CPU tensors that can be used again.

torch asks posix_memalign for every tensor. glibc before 2.38 makes such a block from a larger hole
and cuts both ends off; a hole of exactly that size is never filled again. After some steps that
make tensors of the same sizes a tenth of the process is such holes. With malloc, and the alignment
made by hand, a freed tensor's place serves the next one of its size.
"""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_ext.native import build

_SOURCE = Path(__file__).with_name("tensor_memory.cpp")


def _options() -> list[str]:
    """torch's headers and library; its version is among them so that another torch is another
    library (build.py).
    """
    torch_folder = Path(torch.__file__).parent
    return [
        "-std=c++20",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        f"-DMADE_FOR={torch.version.git_version}",
        f"-I{torch_folder / 'include'}",
        f"-L{torch_folder / 'lib'}",
        "-lc10",
    ]


def use() -> str:
    """Tensors that this process and its children make from now on come from malloc; -> why torch's
    way stays, or an empty string.

    It cannot be taken back: tensors of both kinds may live side by side, each knows its own way
    out.
    """
    try:
        build.load(_SOURCE, _options()).use_malloc()
    except build.BuildError as error:
        return str(error)
    return ""
