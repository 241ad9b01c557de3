"""A resumed run that is another run is refused before its first step, and one that is the same run
in another layout reads the same samples: both through pretrain_moe.py and its data loader.
"""

import contextlib
import io
import json
import os
import re
import shutil

import numpy as np
import pytest

from data.indexed import write_pair
from megatron_ext.checkpoint.fingerprint import (
    MAY_CHANGE,
    SECTIONS,
    differences,
    fingerprint,
    names,
    shown,
)
from megatron_ext.checkpoint.reader import StoredTensors
from megatron_ext.config import parse
from megatron_ext.config.flags import members
from megatron_ext.config.recipes import machines, models
from tests.checkpoint.test_layouts import LAYOUTS, PAIRS
from tests.ranks.fingerprint import history
from tests.ranks.harness import next_port, run_ranks
from tests.ranks.tiny import TINY, pretrain

CHANGES = {
    "data-path": "--data-path 0.3 {a} 0.7 {b}",
    "split": "--split 80,20,0",
    "seq-length": "--seq-length 32 --max-position-embeddings 32",
    "tokenizer-type": "--tokenizer-type GPT2BPETokenizer --vocab-file {v} --merge-file {m}",
    "num-experts": "--num-experts 4",
    "vocab-size": "--vocab-size 252",
    "moe-router-pre-softmax": "--moe-router-pre-softmax",
}
"""Through a whole program; the others of this kind are compared without one, below."""
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
    assert re.search(rf"--{name} \S.* -> \S", line)
    assert name in line.partition("--accept-change ")[2].split()[0].split(",")


def test_what_does_not_change_the_run_is_not_refused(outcomes):
    code, text = outcomes[""]
    assert code == 0, text


SMALL = """
--seed 77; --hidden-size 96; --num-layers 2; --moe-router-topk 4; --lr 2e-3; --clip-grad 0.5
--lr-decay-style linear; --global-batch-size 4; --moe-aux-loss-coeff 0.02
--moe-router-load-balancing-type seq_aux_loss; --moe-expert-capacity-factor 0.5
--moe-input-jitter-eps 0.1; --moe-router-topk-scaling-factor 2.5
--moe-router-num-groups 2 --moe-router-group-topk 1; --moe-router-dtype fp64; --rotary-percent 0.5
--use-rope-scaling; --window-size 16,0; --norm-epsilon 1e-3; --moe-router-score-function sigmoid
--moe-global-aux-scale megatron; --moe-capacity-scope shard; --squared-relu --no-swiglu
--qk-layernorm; --calculate-per-token-loss; --attention-softmax-in-fp32; --softmax-scale 0.2
--mtp-num-layers 1; --adam-beta2 0.95; --decoupled-lr 1e-4; --lr-warmup-iters 1
--fp16-lm-cross-entropy; --no-disable-bias-linear; --rampup-batch-size 4 4 16
"""


@pytest.mark.parametrize("words", re.split("; |\n", SMALL.strip()))
def test_each_flag_of_the_model_and_its_training_is_compared(words):
    """13.A4: ten of twenty-five passed silently while the fingerprint listed what counts."""
    saved = json.loads(json.dumps(fingerprint(_read(""))))
    changed = differences(saved, fingerprint(_read(words)), ())
    spelled = re.findall(r"--(\S+)", words)
    named = {name for name in map(shown, changed)}
    dests = {name for name in spelled if names(name) & set(changed)}
    assert dests, (words, named)
    assert not differences(saved, fingerprint(_read(words)), names(",".join(named)))


def _read(words: str, world: int = 1):
    check = ["--world-size", str(world), "--print-config", "yaml"]
    return parse([*TINY, *words.split(), *check], {})


def test_what_may_change_are_flags_that_exist_and_stand_once():
    listed = [name for group in MAY_CHANGE.values() for name in group.split()]
    assert len(listed) == len(set(listed))
    assert set(listed) <= {m.dest for section in SECTIONS for m in members()[section]}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_is_no_other_run(name):
    world, words = LAYOUTS[name]
    one = "--bf16" if "--bf16" in words else ""
    assert differences(fingerprint(_read(one)), fingerprint(_read(words, world)), ()) == {}


def test_a_tokenizer_of_another_size_is_another_run(tmp_path):
    """It may be smaller than the model's tables, which have the size of --vocab-size then."""
    flags = [*TINY, "--run-dir", str(tmp_path), "--exit-interval", "1"]
    ((code, text),) = run_ranks(_train_in_turn, 1, [flags], timeout_s=100)[0]
    assert code == 0, text
    saved = StoredTensors(tmp_path / "checkpoints/step_00000001").record["run"]["fingerprint"]
    cfg = _read("")
    assert differences(saved, fingerprint(cfg, 251), ()) == {}
    changed = differences(saved, fingerprint(cfg, 200), ())
    assert {shown(name): values for name, values in changed.items()} == {
        "--tokenizer-vocab-size": "251 -> 200"
    }


@pytest.mark.parametrize("model", [name for name in models() if machines(name)])
def test_a_recipe_is_the_same_run_on_every_machine(model):
    def of(name):
        return fingerprint(parse(["--config", name, "--print-config", "yaml"], {}))

    whole = of(model)
    for machine in machines(model):
        assert differences(whole, of(f"{model}.{machine}"), ()) == {}


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
