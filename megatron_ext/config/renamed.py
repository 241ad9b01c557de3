"""Flags with another name or form here: what each is read as, and what to write instead.

    --batch-size 4                    -> --micro-batch-size 4
    --save-retain-interval 1000       -> --keep-last 1 --keep-every 1000
    --non-persistent-ckpt-type local  -> --ckpt-tiers local,store ...

All translations are one line of `notes`, hence a warning. Where the modern flag is given, too, both
must say the same. `DEPRECATED` are spellings that work as they are and that Megatron-LM is leaving.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from megatron_ext.config.inert import Inert
from megatron_ext.config.text_file import read_text
from megatron_ext.errors import Violation


class _Values(Protocol):
    value: dict[str, object]
    origin: dict[str, str]
    notes: list[str]
    violations: list[Violation]

    def given(self, dest: str) -> bool: ...
    def derive(self, dest: str, value: object) -> None: ...
    def __getitem__(self, dest: str) -> object: ...


OTHER_NAMES = "other names, read as meant: "
"""How the note of all translations begins."""


def _old(dest: str, annotation: str, default: object, instead: str) -> Inert:
    return Inert(dest, annotation, default, instead, word="Old name of")


RENAMED: tuple[Inert, ...] = (
    _old("batch_size", "Size | None", None, "--micro-batch-size"),
    _old("warmup", "Chance | None", None, "--lr-warmup-fraction"),
    _old("model_parallel_size", "Parts | None", None, "--tensor-model-parallel-size"),
    _old("checkpoint_activations", "bool", False, "--recompute-activations"),
    _old("muon_nesterov", "bool", False, "--muon-use-nesterov"),
    _old("exit_signal_handler_for_training", "bool", False, "--exit-signal-handler"),
    _old(
        "no_weight_decay_cond_type",
        "Literal['apply_wd_to_qk_layernorm'] | None",
        None,
        "--apply-wd-to-qk-layernorm",
    ),
    _old("grad_reduce_in_bf16", "bool", False, "--no-accumulate-allreduce-grads-in-fp32"),
    _old("save_retain_interval", "Count | None", None, "--keep-last 1 --keep-every N"),
    _old("pretrained_checkpoint", "str | None", None, "--load DIR --finetune"),
    _old("data_args_path", "str | None", None, "--data-path"),
    _old("non_persistent_save_interval", "Count | None", None, "--ckpt-local-interval"),
    _old(
        "non_persistent_ckpt_type",
        "Literal['global', 'local', 'in_memory'] | None",
        None,
        "--ckpt-tiers",
    ),
    _old("non_persistent_global_ckpt_dir", "str | None", None, "--ckpt-local-dir"),
    _old("non_persistent_local_ckpt_dir", "str | None", None, "--ckpt-local-dir"),
)
"""Old flag, with the modern one in place of a reason."""

SAME_VALUE: dict[str, str] = {
    "batch_size": "micro_batch_size",
    "warmup": "lr_warmup_fraction",
    "model_parallel_size": "tensor_model_parallel_size",
    "checkpoint_activations": "recompute_activations",
    "muon_nesterov": "muon_use_nesterov",
    "exit_signal_handler_for_training": "exit_signal_handler",
}
"""Old dest -> modern dest that takes its value."""

DEPRECATED: dict[str, str] = {
    "use_rotary_position_embeddings": "--position-embedding-type rope",
    "add_position_embedding": "nothing: rope has no table of positions",
    "moe_enable_deepep": "--moe-token-dispatcher-type flex --moe-flex-dispatcher-backend deepep",
    "moe_layer_recompute": "--recompute-granularity selective --recompute-modules moe",
    "moe_router_topk_limited_devices": "--moe-router-group-topk",
    "moe_router_padding_for_fp8": "--moe-router-padding-for-quantization",
    "ckpt_fully_parallel_save": "nothing: all ranks write",
    "skip_train": "--eval-only",
    "recompute_activations": "--recompute-granularity selective",
    "enable_cuda_graph": "--cuda-graph-impl local",
    "external_cuda_graph": "--cuda-graph-impl transformer_engine",
    "cuda_graph_modules": "--cuda-graph-scope",
    "use_mcore_models": "nothing: the model is always megatron-core's",
    "use_flash_attn": "--attention-backend",
    "use_dist_ckpt": "nothing: checkpoints are always distributed",
    "dist_ckpt_format": "--ckpt-format",
    "lazy_mpu_init": "nothing: Megatron-LM removed it",
    "log_straggler": "--straggler-interval",
    "check_for_spiky_loss": "--spike-threshold",
    "enable_ft_package": "--hang-limit-s, and launch/run.sh --restarts",
}
"""dest -> what to write instead; the flag itself is read as always."""


def _spelled(dest: str) -> str:
    return "--" + dest.replace("_", "-")


def _modern(dest: str) -> str:
    from megatron_ext.config.flags import all_flags

    return all_flags()[dest].names[0]


def _set(v: _Values, old: str, dest: str, value: object) -> None:
    """Sets a modern value; a violation where it was given and is another one."""
    if v.given(dest) and v[dest] != value:
        rule = f"contradicts {_modern(dest)} {v[dest]}"
        use = f"keep only {_modern(dest)}"
        v.violations.append(Violation(_spelled(old), v[old], rule, use))
        return
    v.derive(dest, value)


def _same(v: _Values) -> None:
    for old, dest in SAME_VALUE.items():
        if v.given(old) and v[old]:
            _set(v, old, dest, v[old])


def _weight_decay(v: _Values) -> None:
    if v["no_weight_decay_cond_type"]:
        _set(v, "no_weight_decay_cond_type", "apply_wd_to_qk_layernorm", True)


def _gradients(v: _Values) -> None:
    if v["grad_reduce_in_bf16"]:
        _set(v, "grad_reduce_in_bf16", "grad_reduce_in_fp32", False)


def _retain(v: _Values) -> None:
    every = v["save_retain_interval"]
    if every is not None:
        _set(v, "save_retain_interval", "keep_last", v["keep_last"] or 1)
        _set(v, "save_retain_interval", "keep_every", every)


def _pretrained(v: _Values) -> None:
    """Megatron-LM reads it where --load holds nothing; here a disk does not decide which it is."""
    folder = v["pretrained_checkpoint"]
    if folder is None:
        return
    _set(v, "pretrained_checkpoint", "load", folder)
    _set(v, "pretrained_checkpoint", "finetune", True)


def _data(v: _Values) -> None:
    path = v["data_args_path"]
    if path is None:
        return
    try:
        words = read_text(str(path)).split()
    except ValueError as error:
        use = "give a file of weights and prefixes"
        v.violations.append(Violation("--data-args-path", path, f"is unreadable: {error}", use))
        return
    _set(v, "data_args_path", "data_path", words)


def _tiers(v: _Values) -> None:
    """`local` is our local tier, `in_memory` our memory tier; `global` a second one on the shared
    file system, which the local tier is as well where its folder is there.
    """
    kind, interval = v["non_persistent_ckpt_type"], v["non_persistent_save_interval"]
    if kind is None:
        return
    if kind == "in_memory":
        _set(v, "non_persistent_ckpt_type", "ckpt_tiers", "memory,store")
        if interval:
            _set(v, "non_persistent_save_interval", "ckpt_memory_interval", interval)
        return
    _set(v, "non_persistent_ckpt_type", "ckpt_tiers", "local,store")
    folder = v[f"non_persistent_{kind}_ckpt_dir"]
    if folder is None and kind == "global" and v["save"]:
        folder = str(Path(str(v["save"])) / "non_persistent")
    if folder is not None:
        _set(v, f"non_persistent_{kind}_ckpt_dir", "ckpt_local_dir", folder)
    if interval:
        _set(v, "non_persistent_save_interval", "ckpt_local_interval", interval)


RULES: tuple[Callable[[_Values], None], ...] = (
    _same,
    _weight_decay,
    _gradients,
    _retain,
    _pretrained,
    _data,
    _tiers,
)


def translate(v: _Values) -> None:
    """Sets what the old flags stand for, with one note for all of them."""
    for rule in RULES:
        rule(v)
    found = [i for i in RENAMED if v.given(i.dest) and v[i.dest] not in (None, False)]
    if found:
        text = "; ".join(f"{_spelled(i.dest)} (use {i.reason})" for i in found)
        v.notes.append(OTHER_NAMES + text)


def translate_before_scaling(v: _Values) -> None:
    """`translate`, after which the old flags are as if not given: --scale-down changes the modern
    ones, its data are made up, and files of data are not looked at.
    """
    v.value["data_args_path"] = None
    translate(v)
    for old in RENAMED:
        v.value[old.dest], v.origin[old.dest] = old.default, "default"
