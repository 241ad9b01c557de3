"""A fast tier that fails costs one warning: the run goes on and saves into the store."""

import errno
import logging
import os
import shutil
import stat

import pytest

from megatron_ext.checkpoint import folder, tiers, writer
from megatron_ext.checkpoint.store import Checkpointer
from tests.checkpoint.small_run import checkpointer, small_run
from tests.ranks.harness import run_ranks

OPTIONS = dict(ckpt_tiers="memory,store", save_interval=3, keep_last=None, ckpt_memory_interval=1)


def _a_file_in_its_place(memory):
    memory.write_text("")
    return memory.unlink


def _a_link_in_its_place(memory):
    (memory.parent / f"{memory.name}.elsewhere").mkdir()
    memory.symlink_to(memory.parent / f"{memory.name}.elsewhere")
    return memory.unlink


def _full(memory):
    return _opening(memory, errno.ENOSPC)


def _read_only(memory):
    return _opening(memory, errno.EROFS)


def _opening(memory, number):
    """Files of ranks cannot be made there."""
    real = writer._open

    def fails(path):
        if memory in path.parents:
            raise OSError(number, os.strerror(number), str(path))
        return real(path)

    writer._open = fails
    return lambda: setattr(writer, "_open", real)


def _no_space(memory):
    real = folder.free_bytes
    folder.free_bytes = lambda path: 0 if memory in (path, *path.parents) else real(path)
    return lambda: setattr(folder, "free_bytes", real)


KINDS = {
    "at the start: a file in its place": (_a_file_in_its_place, False),
    "at the start: a link in its place": (_a_link_in_its_place, False),
    "no space": (_no_space, True),
    "full while it is written": (_full, True),
    "read-only": (_read_only, True),
}


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _steps(run, saver: Checkpointer, count: int) -> None:
    for _ in range(count):
        run.step()
        if tier := saver.due(run.state.progress.step):
            saver.save(run.state, tier)


def _train(store, begin):
    """Six steps while the memory tier fails, three when it works again."""
    memory, told = tiers.memory_folder(store), _Lines()
    logging.getLogger("megatron_ext").addHandler(told)
    with small_run("") as run:
        mend = begin(memory)
        with checkpointer(store, None, **OPTIONS) as saver:
            _steps(run, saver, 6)
            held = folder.steps(store), folder.steps(memory)
            mend()
            _steps(run, saver, 2)
            found = folder.steps(memory)
            saver.finish()
    return held, found, told.lines


@pytest.mark.parametrize("kind", KINDS)
def test_the_run_goes_on_and_saves_into_the_store(kind, tmp_path):
    begin, is_tried_again = KINDS[kind]
    memory = tiers.memory_folder(tmp_path / "ckpt")
    try:
        held, found, lines = run_ranks(_train, 1, tmp_path / "ckpt", begin)[0]
    finally:
        shutil.rmtree(memory, ignore_errors=True)
        shutil.rmtree(f"{memory}.elsewhere", ignore_errors=True)
    assert held == ([6, 3], [])
    assert found[:1] == ([8] if is_tried_again else [])  # the one before may not be gone yet
    assert len(lines) == 1 and ("fast tier" in lines[0] or "memory tier" in lines[0]), lines


def _save_once(store, umask):
    os.umask(umask)
    with small_run("") as run, checkpointer(store, None) as saver:
        run.step()
        saver.save(run.state)


@pytest.mark.parametrize("umask", [0o002, 0o027, 0o077])
def test_checkpoints_obey_the_umask(umask, tmp_path):
    """A group that works together on checkpoints says so by its umask."""
    run_ranks(_save_once, 1, tmp_path / "run" / "checkpoints", umask)
    modes = {}
    for path in (tmp_path / "run").rglob("*"):
        base = 0o777 if path.is_dir() else 0o666
        modes[path.name] = (stat.S_IMODE(path.stat().st_mode), base & ~umask)
    assert {"manifest.json", "rank_00000.safetensors", "latest", "step_00000001"} <= set(modes)
    assert {name: pair for name, pair in modes.items() if pair[0] != pair[1]} == {}
