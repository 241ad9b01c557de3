"""A resumed run that is another run is refused before its first step, and one that is the same run
in another layout reads the same samples: both through pretrain_moe.py and its data loader.
"""

import contextlib
import io
import json
import os
import shutil

import numpy as np
import pytest

from data.indexed import write_pair
from tests.checkpoint.test_layouts import LAYOUTS, PAIRS
from tests.ranks.fingerprint import history
from tests.ranks.harness import next_port, run_ranks
from tests.ranks.tiny import TINY, pretrain

CHANGES = {
    "data blend": "--data-path 0.3 {a} 0.7 {b}",
    "split": "--split 80,20,0",
    "seq_length": "--seq-length 32 --max-position-embeddings 32",
    "tokenizer_type": "--tokenizer-type GPT2BPETokenizer --vocab-file {v} --merge-file {m}",
    "seed": "--seed 77",
    "num_moe_experts": "--num-experts 4",
    "moe_router_topk": "--moe-router-topk 4",
    "lr": "--lr 2e-3",
    "lr_decay_style": "--lr-decay-style linear",
    "global_batch_size": "--global-batch-size 4",
    "hidden_size": "--hidden-size 96",
    "num_layers": "--num-layers 2",
    "vocab_size": "--vocab-size 252",
    "moe_aux_loss_coeff": "--moe-aux-loss-coeff 0.02",
    "moe_router_load_balancing_type": "--moe-router-load-balancing-type seq_aux_loss",
    "clip_grad": "--clip-grad 0.5",
}
SHOWN_AS = {"data blend": "data_path"}
HARMLESS = "--micro-batch-size 4 --eval-interval 7 --log-interval 3"


def _corpora(folder):
    """Two corpora and a tokenizer of 251 words, as the words of CHANGES."""
    generator = np.random.default_rng(1)
    for name in "ab":
        documents = [generator.integers(0, 250, size=200) for _ in range(30)]
        write_pair(folder / name, documents, np.uint16)
    words = ["<|endoftext|>", *(chr(number) for number in range(0x4E00, 0x4E00 + 250))]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    paths = {"v": folder / "vocab.json", "m": folder / "merges.txt"}
    return {"a": folder / "a", "b": folder / "b"} | paths


def _train_in_turn(commands):
    """Several runs in this rank's process: (exit code, what it wrote to stderr) of each."""
    found = []
    for argv in commands:
        os.environ["MASTER_PORT"] = next_port()
        text, code = io.StringIO(), 0
        with contextlib.redirect_stderr(text), contextlib.redirect_stdout(io.StringIO()):
            try:
                pretrain(argv)
            except SystemExit as error:
                code = error.code
        found.append((code, text.getvalue()))
    return found


def _base(folder):
    words = _corpora(folder)
    flags = [flag for flag in TINY if flag != "--mock-data"]
    blend = "--data-path 0.5 {a} 0.5 {b} --split 90,10,0".format(**words)
    return [*flags, *blend.split()], words


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Flag -> (exit code, stderr) of a resume with that change; "" without a change."""
    folder = tmp_path_factory.mktemp("changes")
    base, words = _base(folder)
    first = [*base, "--run-dir", str(folder / "run"), "--exit-interval", "1"]
    load = ["--load", str(folder / "run" / "checkpoints"), "--exit-interval", "1"]
    changes = {"": HARMLESS, **CHANGES}
    commands = [
        [*base, *text.format(**words).split(), *load, "--run-dir", str(folder / f"again{i}")]
        for i, text in enumerate(changes.values())
    ]
    results = run_ranks(_train_in_turn, 1, [first, *commands], timeout_s=300)[0]
    assert results[0][0] == 0, results[0][1]
    return dict(zip(changes, results[1:]))


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_the_run_is_refused_at_the_load(name, outcomes):
    """Row 24."""
    code, text = outcomes[name]
    assert code == 64, text
    (line,) = [line for line in text.splitlines() if line.startswith("FATAL")]
    assert "differs from the one that wrote the checkpoint" in line
    assert f"{SHOWN_AS.get(name, name)}: " in line and "--accept-change" in line


def test_what_does_not_change_the_run_is_not_refused(outcomes):
    code, text = outcomes[""]
    assert code == 0, text


def _commands(base, folder, world):
    """(saves, loads) of this number of ranks: two steps, then one more from the copy."""
    saves, loads = [], []
    for source in sorted({source for source, _ in PAIRS}):
        run = folder / source.replace(" ", "_")
        flags = [*base, *LAYOUTS[source][1].split(), "--run-dir", str(run)]
        saves += [[*flags, "--exit-interval", "2"]] if LAYOUTS[source][0] == world else []
    for number, (source, target) in enumerate(PAIRS):
        load = ["--load", str(folder / source.replace(" ", "_") / "checkpoints")]
        flags = [*base, *LAYOUTS[target][1].split(), *load, "--run-dir", str(folder / str(number))]
        loads += [[*flags, "--exit-interval", "3"]] if LAYOUTS[target][0] == world else []
    return saves, loads


def test_every_layout_goes_on_with_the_same_samples(tmp_path):
    """`samples_sha` of metrics.jsonl is a hash of the sample numbers of a global batch."""
    base, _ = _base(tmp_path)
    base += ["--max-position-embeddings", "64"]
    whole = [*base, "--run-dir", str(tmp_path / "whole"), "--exit-interval", "3"]
    for part in (0, 1):
        for world in (1, 2, 4):
            commands = _commands(base, tmp_path, world)[part]
            commands += [whole] if (part, world) == (0, 1) else []
            for outcome in run_ranks(_train_in_turn, world, commands, timeout_s=500):
                assert [code for code, _ in outcome] == [0] * len(commands), outcome
    wanted = {step: text.split()[2:] for step, text in history(tmp_path / "whole").items()}
    assert len({tuple(samples) for samples in wanted.values()}) == 3
    for number in range(len(PAIRS)):
        again = history(tmp_path / str(number))
        assert {step: text.split()[2:] for step, text in again.items()} == {3: wanted[3]}
    shutil.rmtree(tmp_path / "whole")
