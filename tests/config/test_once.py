"""A run's config.yaml starts the run again: without what one start did once, and null unsets."""

from __future__ import annotations

import pytest
import yaml

from megatron_ext.config import parse
from megatron_ext.config.argv import build_parser, read_words
from megatron_ext.config.flags import all_flags
from megatron_ext.errors import ConfigError

BASE = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --micro-batch-size 2 --seq-length 64"
    " --max-position-embeddings 64 --train-iters 5 --lr 1e-3 --mock-data --vocab-size 100"
)


def write(path, text: str) -> str:
    path.write_text(text)
    return str(path)


def remembered(path, extra: str) -> str:
    """RUN/config.yaml of a start with these flags."""
    return write(path, parse(f"{BASE} --run-dir runs/a {extra}".split(), {}).to_yaml())


@pytest.mark.parametrize("flag", ["--skip-train", "--eval-only"])
def test_an_evaluation_is_not_remembered(tmp_path, flag):
    path = remembered(tmp_path / "config.yaml", f"{flag} --load runs/a/checkpoints")
    text = (tmp_path / "config.yaml").read_text()
    assert "#   eval_only: true" in text and yaml.safe_load(text)["train"]["train_iters"] == 5
    cfg = parse(["--config", path, "--load", "runs/a/checkpoints"], {})
    assert not cfg.train.eval_only and not cfg.train.skip_train


def test_more_steps_have_a_decay_of_their_own(tmp_path):
    path = remembered(tmp_path / "config.yaml", "")
    assert parse(["--config", path, "--train-iters", "9"], {}).schedule.lr_decay_iters == 9
    given = remembered(tmp_path / "given.yaml", "--lr-decay-iters 7")
    assert parse(["--config", given, "--train-iters", "9"], {}).schedule.lr_decay_iters == 7


FIRST = "--load other --finetune --ckpt-step 3 --no-load-optim --no-load-rng"


def test_how_the_first_load_was_read_is_not_how_the_run_is_resumed(tmp_path):
    path = remembered(tmp_path / "config.yaml", FIRST)
    again = parse(["--config", path], {}).checkpoint
    assert (again.load, again.finetune, again.ckpt_step, again.no_load_optim) == (
        "other", True, 3, True,
    )  # fmt: skip
    cfg = parse(["--config", path, "--load", "runs/a/checkpoints"], {})
    resumed = cfg.checkpoint
    assert (resumed.finetune, resumed.ckpt_step, resumed.no_load_optim) == (False, None, False)
    assert not resumed.no_load_rng
    assert sum("was for its --load other" in text for text in cfg.warnings) == 4
    asked = f"--config {path} --load runs/a/checkpoints --ckpt-step 2".split()
    assert parse(asked, {}).checkpoint.ckpt_step == 2
    another = parse(["--config", path, "--load", "third"], {}).checkpoint
    assert another.finetune and another.ckpt_step == 3


def test_null_takes_back_what_came_before(tmp_path):
    first = write(tmp_path / "a.yaml", "data-path: [a]\nbf16: true\nmin-lr: 1e-5\nseed: 7\n")
    later = write(tmp_path / "b.yaml", "data-path: null\nbf16: null\nmin-lr: null\n")
    files = ["--config", first, later]
    cfg = parse([*files, *BASE.split()], {})
    assert cfg.data.data_path is None and not cfg.train.bf16 and cfg.schedule.min_lr == 0.0
    assert cfg.train.seed == 7 and cfg.origins["data_path"] == "default"
    on_line = parse(f"--config {first} --data-path null --bf16=null {BASE}".split(), {})
    assert on_line.data.data_path is None and not on_line.train.bf16
    with pytest.raises(ConfigError, match="excludes data paths"):
        parse(f"--config {later} --data-path null --data-path b {BASE}".split(), {})


def test_an_empty_word_is_refused_by_every_flag(tmp_path):
    """The one flag whose default is empty means that."""
    parser, accepted = build_parser(), []
    for flag in all_flags().values():
        for word in ("", "  ") if flag.kind.base != "bool" else ():
            settings, violations = read_words([f"{flag.names[0]}={word}"], "flag", parser)
            accepted += [s.dest for s in settings]
            assert all("is empty: an unset variable" in v.rule for v in violations)
    assert accepted == ["config_logger_dir"]
    path = write(tmp_path / "a.yaml", 'load: ""\ndata-path: [a, ""]\n')
    with pytest.raises(ConfigError) as caught:
        parse(["--config", path], {})
    assert [line.split()[0] for line in caught.value.lines()] == ["what=--load", "what=--data-path"]
    with pytest.raises(ConfigError, match="is empty"):
        parse(["--config", ""], {})


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--bf16 false", "write --no-bf16"),
        ("--bf16=false", "write --no-bf16"),
        ("--no-bf16 true", "write --no-bf16"),
        ("--no-bf16 0", "write --bf16"),
        ("--disable-bias-linear False", "write --add-bias-linear"),
        ("--swiglu maybe", "write --swiglu or --no-swiglu"),
    ],
)
def test_a_switch_with_a_value_names_what_to_write(words, said):
    with pytest.raises(ConfigError) as caught:
        parse([*BASE.split(), *words.split()], {})
    (line,) = caught.value.lines()
    assert line.startswith(f"what={words.partition('=')[0].split()[0]} ") and said in line


def test_a_quoted_switch_in_a_file_names_it_too(tmp_path):
    with pytest.raises(ConfigError) as caught:
        parse(["--config", write(tmp_path / "a.yaml", 'bf16: "false"')], {})
    assert "write false, without quotes (--no-bf16)" in caught.value.lines()[0]
