"""Precedence, YAML, unknown names, printing: what a user meets first."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from megatron_ext.config import parse
from megatron_ext.errors import ConfigError

BASE = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --micro-batch-size 2 --seq-length 64"
    " --max-position-embeddings 64 --train-iters 5 --lr 1e-3 --mock-data --vocab-size 100"
)


def read(extra: str = "", environ: dict | None = None):
    return parse(f"{BASE} {extra}".split(), environ or {})


def lines_of(extra: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read(extra)
    assert caught.value.code == 64
    return caught.value.lines()


def write(tmp_path, text: str) -> str:
    path = tmp_path / "tiny.yaml"
    path.write_text(text)
    return str(path)


def test_the_last_value_wins_and_has_its_origin():
    cfg = read("--lr 2e-3 --seed 7 --lr 3e-3")
    assert cfg.schedule.lr == cfg.optimizer.lr == 3e-3
    assert cfg.origins["lr"] == cfg.origins["seed"] == "flag"
    assert cfg.origins["min_lr"] == "default"
    assert cfg.train.global_batch_size == 2
    assert cfg.origins["global_batch_size"] == "derived"


def test_a_flag_beats_the_file_and_the_file_beats_the_default(tmp_path):
    path = write(tmp_path, "seed: 5\nlr: 1e-4\nbf16: true\nlog_interval: 3\n")
    cfg = parse(f"--seed 6 --config {path} {BASE}".split(), {})
    assert (cfg.train.seed, cfg.schedule.lr, cfg.train.bf16) == (6, 1e-3, True)
    assert cfg.observe.log_interval == 3
    assert cfg.origins["bf16"] == cfg.origins["log_interval"] == f"file:{path}"
    assert cfg.observe.run_dir.startswith("runs/tiny-")


def test_yaml_values_become_words(tmp_path):
    text = """
    swiglu: true
    no-rope-fusion: true
    disable-bias-linear: false
    create-attention-mask-in-dataloader: false
    clip-grad: null
    data-path: [0.7, code, 0.3, text]
    moe:
      num-experts: 4
      moe-layer-freq: ([0]*1+[1]*3)
      moe_router_load_balancing_type: [aux_loss, seq_aux_loss]
      moe-aux-loss-coeff: [1e-2, 0.1]
    """
    cfg = parse(f"--config {write(tmp_path, text)} --print-config json".split(), {})
    assert cfg.model.swiglu and cfg.transformer.add_bias_linear
    assert cfg.transformer.apply_rope_fusion is False
    assert cfg.data.create_attention_mask_in_dataloader is False
    assert cfg.data.data_path == ["0.7", "code", "0.3", "text"]
    assert cfg.transformer.moe_layer_freq == [0, 1, 1, 1]
    assert cfg.transformer.moe_aux_loss_coeff == [0.01, 0.1]
    assert cfg.optimizer.clip_grad == 1.0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("hiden-size: 3", "hidden-size"),
        ("moe: {num-expert: 3}", "num-experts"),
        ("swiglu: maybe", "is a switch"),
        ("lr: [1, 2]", "takes one value, not 2"),
        ("lr: true", "needs a value"),
        ("lr: 1\nlr: 2", "given twice"),
        ("- a\n- b", "must be a mapping"),
        ("a: [", "not YAML"),
        ("num-layers: x", "must be a whole number"),
        ("config: other.yaml", "is not a flag"),
    ],
)
def test_a_bad_file_is_one_clear_line(tmp_path, text, said):
    with pytest.raises(ConfigError) as caught:
        parse(f"--config {write(tmp_path, text)} --print-config json".split(), {})
    assert len(caught.value.lines()) == 1
    assert said in caught.value.lines()[0]


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="No such file.*absent.yaml"):
        parse(["--config", str(tmp_path / "absent.yaml")], {})


@pytest.mark.parametrize(
    ("kind", "said"),
    [("pipe", "is a pipe"), ("/dev/zero", "is a device"), ("folder", "is a folder"),
     ("bytes", "is not UTF-8 text"), ("huge", "bytes, 16777216 at most")],
)  # fmt: skip
def test_what_is_no_file_of_text_is_refused_at_once(tmp_path, kind, said):
    path = kind if kind.startswith("/") else str(tmp_path / f"{kind}.yaml")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        os.mkdir(path)
    elif kind == "bytes":
        (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe")
    elif kind == "huge":
        with open(path, "wb") as file:
            file.truncate(2**40)
    for words in (["--config", path], [*BASE.split(), "--data-args-path", path]):
        with pytest.raises(ConfigError) as caught:
            parse(words, {})
        assert any(said in line and path in line for line in caught.value.lines())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--num-layer 3", "--num-layer is not a flag do=use --num-layers"),
        ("--moe-router-top-k 2", "use --moe-router-topk"),
        ("--tensor-model-paralel-size 2", "use --tensor-model-parallel-size"),
        ("--normalization RMSnorm", "use --normalization RMSNorm"),
        ("--num-layers 2.5", "must be a whole number"),
        ("--lr fast", "must be a number"),
        ("--lr nan", "not NaN"),
        ("--lr", "--lr needs a value"),
        ("--lr 1 2", "takes one value, not 2"),
        ("--bf16 true", "true is not a value of a switch do=write --bf16"),
        ("--moe-layer-freq __import__('os')", "must be a whole number or a pattern"),
        ("--window-size 3", "two whole numbers"),
    ],
)
def test_bad_words_name_the_flag_and_a_way_out(words, said):
    assert any(said in line for line in lines_of(words)), lines_of(words)


def test_all_bad_words_come_together():
    lines = lines_of("--foo 1 --lr x --num-layers y --normalization z")
    assert len(lines) == 4


def test_abbreviations_are_refused():
    assert "is not a flag" in lines_of("--num-lay 2")[0]


def test_print_config_needs_nothing_and_checks_nothing():
    cfg = parse(
        "--print-config json --transformer-impl transformer_engine --tokenizer-model /absent/model"
        " --tensor-model-parallel-size 3 --num-attention-heads 4".split(),
        {},
    )
    assert cfg.action == "print-config"
    table = json.loads(cfg.to_json())
    entry = table["transformer"]["num_attention_heads"]
    assert entry == {"value": 4, "origin": "flag"}
    assert table["data"]["tokenizer_model"]["value"] == "/absent/model"


def test_printed_yaml_is_read_back_to_the_same_values(tmp_path):
    extra = "--num-experts 4 --swiglu --bf16 --moe-layer-freq ([0]*1+[1]*3) --window-size (8,0)"
    first = read(extra + " --group-query-attention --num-query-groups 2 --print-config yaml")
    path = write(tmp_path, first.to_yaml())
    again = parse(["--config", path, "--print-config", "json"], {})
    for name, section in first.sections().items():
        assert getattr(again, name) == section, name
    assert again.megatron_only == first.megatron_only
    assert not again.warnings


def test_nothing_heavy_is_imported_and_help_is_quick():
    code = (
        "import sys; from megatron_ext.config import parse; import megatron_ext.errors\n"
        "try: parse(['--help'], {})\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert not {'torch', 'numpy', 'megatron'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=20
    )
    assert "--moe-router-topk" in done.stdout and "default here" in done.stdout


def test_the_world_comes_from_the_launcher():
    cfg = read("", {"WORLD_SIZE": "2"})
    assert (cfg.parallel.world_size, cfg.origins["world_size"]) == (2, "environment")
    assert cfg.train.global_batch_size == 4
    with pytest.raises(ConfigError, match="not the launcher's WORLD_SIZE = 2"):
        read("--world-size 4", {"WORLD_SIZE": "2"})
    assert read("--world-size 4 --dry-run", {"WORLD_SIZE": "2"}).parallel.world_size == 4
