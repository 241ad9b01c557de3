"""A checkpoint belongs to what is in the data and tokenizer files, not only to their names; and
files that change under a run end it before they get into a checkpoint.
"""

import json
import os

import pytest

from megatron_ext.checkpoint.content import content_differences
from megatron_ext.checkpoint.store import Checkpointer
from tests.checkpoint.test_same_run import _corpora, _train_in_turn
from tests.ranks.harness import run_ranks
from tests.ranks.tiny import TINY


def _exchanged(folder):
    for end in ("bin", "idx"):
        (folder / f"a.{end}").rename(folder / "kept")
        (folder / f"b.{end}").rename(folder / f"a.{end}")
        (folder / "kept").rename(folder / f"b.{end}")


def _garbage(folder):
    """Ids that are inside the vocabulary, as many as before."""
    size = (folder / "b.bin").stat().st_size
    (folder / "b.bin").write_bytes(bytes([7, 0]) * (size // 2))


def _edited(folder):
    words = json.loads((folder / "vocab.json").read_text())
    one, other = list(words)[5:7]
    words[one], words[other] = words[other], words[one]
    (folder / "vocab.json").write_text(json.dumps(words))


CHANGES = {
    "two domains exchanged": (_exchanged, "data-content", "a (bin)"),
    "garbage in a .bin": (_garbage, "data-content", "b (bin)"),
    "tokenizer edited": (_edited, "tokenizer-content", "vocab.json (hash)"),
}


def _flags(folder):
    words = _corpora(folder)
    flags = [flag for flag in TINY if flag != "--mock-data"]
    text = "--data-path 0.5 {a} 0.5 {b} --split 90,10,0 --tokenizer-type GPT2BPETokenizer"
    text += " --vocab-file {v} --merge-file {m}"
    return [*flags, *text.format(**words).split()]


def _resumed(folder, change, accepted):
    """A step and a save, the change, a resume without and with --accept-change, and once more."""
    base = [*_flags(folder), "--exit-interval", "1"]
    load = ["--load", str(folder / "run" / "checkpoints"), "--exit-interval", "2"]
    found = _train_in_turn([[*base, "--run-dir", str(folder / "run")]])
    same = [*base, *load, "--run-dir", str(folder / "same")]
    found += _train_in_turn([same])
    change(folder)
    again = [*base, *load, "--run-dir", str(folder / "again")]
    found += _train_in_turn([again, [*again, "--accept-change", accepted]])
    return found


@pytest.mark.parametrize("name", CHANGES)
def test_another_content_under_the_same_names_is_refused(name, tmp_path):
    change, accepted, shown = CHANGES[name]
    first, same, refused, taken = run_ranks(_resumed, 1, tmp_path, change, accepted)[0]
    assert (first[0], same[0], taken[0]) == (0, 0, 0), (first, same, taken)
    code, text = refused
    (line,) = [line for line in text.splitlines() if line.startswith("FATAL")]
    assert code == 64 and shown in line and f"--accept-change {accepted} " in line
    old, new = line.split(shown)[1].split()[0], line.split(" -> ")[1].split()[0].rstrip(";")
    assert len(old) == len(new) == 32 and old != new


def _rewritten_before_the_second_save(folder, which):
    base = [*_flags(folder), "--save-interval", "2", "--run-dir", str(folder / "run")]
    real = Checkpointer.save

    def save(self, state, *more):
        if state.progress.step == 4:
            os.utime(folder / which)
        return real(self, state, *more)

    Checkpointer.save = save
    return _train_in_turn([base])[0]


@pytest.mark.parametrize("which", ["b.bin", "vocab.json"])
def test_a_file_that_changes_under_the_run_ends_it(which, tmp_path):
    """65 at the next save, which is not made: the checkpoint before is of the file as it was."""
    code, text = run_ranks(_rewritten_before_the_second_save, 1, tmp_path, which)[0]
    (line,) = [line for line in text.splitlines() if line.startswith("FATAL")]
    assert code == 65 and f"path={tmp_path / which}" in line and "time of change" in line
    steps = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*"))
    assert steps == ["step_00000002"]


def test_what_is_compared():
    """Pairs and kinds of hashes that both know; nothing where a checkpoint of before has none."""
    pair = {"path": "a", "bytes": 8, "idx": "1", "bin": "2"}
    mine = {"data_content": {"a": pair}, "tokenizer_content": {"m": {"path": "x/m", "hash": "3"}}}
    assert content_differences({}, mine, ()) == {}
    assert content_differences(mine, mine, ()) == {}
    moved = {"data_content": {"elsewhere": {**pair, "bin": "9"}}}
    assert content_differences(moved, mine, ()) == {}
    blocks = {"a": {"path": "a", "bytes": 8, "idx": "1", "bin, 1024 blocks": "5"}}
    assert content_differences({"data_content": blocks}, mine, ()) == {}
    grown = {"data_content": {"a": {**pair, "bytes": 4}}, "tokenizer_content": {"m": {"hash": "4"}}}
    expected = {"data_content": "a (bytes) 4 -> 8", "tokenizer_content": "x/m (hash) 4 -> 3"}
    assert content_differences(grown, mine, ()) == expected
    assert list(content_differences(grown, mine, ["data_content"])) == ["tokenizer_content"]
    for hostile in ({"data_content": 7}, {"data_content": {"a": []}}, {"data_content": None}):
        assert content_differences(hostile, mine, ()) == {}

