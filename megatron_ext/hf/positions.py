"""Rotary positions of a config.json <-> our flags: plain, linear, Llama-3.1 and YaRN.

transformers 4 writes `rope_theta` and `rope_scaling`, transformers 5 `rope_parameters` with both.
"""

from __future__ import annotations

import math
from typing import Any

from megatron_ext.config import RunConfig
from megatron_ext.hf.source import Source

LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""What megatron-core's --use-rope-scaling takes as given."""


def parameters(c: Source) -> dict[str, Any]:
    """rope_type, rope_theta and the scaling's numbers, whichever version wrote the file."""
    scaling = dict(c.get("rope_parameters", None) or c.get("rope_scaling", None) or {})
    scaling["rope_type"] = scaling.pop("rope_type", None) or scaling.pop("type", None) or "default"
    scaling.pop("type", None)
    scaling.setdefault("rope_theta", c.get("rope_theta", 10000.0))
    return scaling


def _mscale(factor: float, mscale: float = 1.0) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _yarn(c: Source, p: dict[str, Any], latent: bool) -> dict[str, Any]:
    """YaRN (Peng et al. 2023, arXiv:2309.00071); with latent attention also its softmax factor."""
    factor, mscale, all_dim = float(p["factor"]), p.get("mscale"), p.get("mscale_all_dim")
    if all_dim and not mscale:
        c.refuse(f"rope mscale_all_dim = {all_dim} without mscale", "the two go together")
    both = bool(mscale and all_dim)
    implied = _mscale(factor, mscale) / _mscale(factor, all_dim) if both else _mscale(factor)
    given = p.get("attention_factor")
    if given is not None and not math.isclose(given, implied, rel_tol=1e-9):
        c.refuse(f"rope attention_factor = {given}", f"the model computes {implied}")
    original = p.get("original_max_position_embeddings") or c.need("max_position_embeddings")
    truncate, fast, slow = p.get("truncate", True), p.get("beta_fast"), p.get("beta_slow")
    flags = {
        "rope_type": "yarn",
        "rotary_scaling_factor": factor,
        "mscale": float(mscale) if both else 1.0,
        "mscale_all_dim": float(all_dim) if both else 0.0,
    }
    prefix = "" if latent else "yarn_"
    flags[f"{prefix}original_max_position_embeddings"] = int(original)
    flags[f"{prefix}beta_fast"] = float(fast or 32)
    flags[f"{prefix}beta_slow"] = float(slow or 1)
    if not latent:
        flags["yarn_correction_range_round_to_int"] = bool(truncate)
    elif not truncate:
        c.refuse("rope truncate = false", "latent attention rounds the corrected range")
    return flags


def flags(c: Source, *, latent: bool = False) -> dict[str, Any]:
    """The flags of a file's positions."""
    p = parameters(c)
    kind, theta = p["rope_type"], float(p["rope_theta"])
    if theta != int(theta):
        c.refuse(f"rope_theta = {theta}", "--rotary-base is a whole number")
    found: dict[str, Any] = {"position_embedding_type": "rope", "rotary_base": int(theta)}
    if latent:
        found["rope_type"] = "rope"
    share = p.get("partial_rotary_factor", c.get("partial_rotary_factor", 1.0))
    if share != 1.0:
        if latent or kind != "default":
            c.refuse(f"partial_rotary_factor = {share}", "only with plain rotary positions")
        found["rotary_percent"] = float(share)
    if kind == "yarn":
        found |= _yarn(c, p, latent)
        found["position_embedding_type"] = "rope" if latent else "yarn"
    elif kind == "linear" and not latent and float(p["factor"]) == int(p["factor"]):
        found["rotary_seq_len_interpolation_factor"] = int(p["factor"])
    elif kind == "llama3" and not latent and all(p.get(k) == v for k, v in LLAMA3.items()):
        found |= {"use_rope_scaling": True, "rope_scaling_factor": float(p["factor"])}
    elif kind != "default":
        c.refuse(
            f"rope_type = {kind!r} with {p}", "supported: default, linear, llama3 (8192), yarn"
        )
    return found


def config(cfg: RunConfig) -> dict[str, Any]:
    """`rope_parameters` (transformers 5) and `rope_theta` (4) of our flags."""
    model, t = cfg.model, cfg.transformer
    p: dict[str, Any] = {"rope_type": "default", "rope_theta": float(model.rotary_base)}
    latent = t.multi_latent_attention
    if model.position_embedding_type == "yarn" or (latent and t.rope_type == "yarn"):
        source, prefix = (t, "") if latent else (model, "yarn_")
        p |= {"rope_type": "yarn", "factor": t.rotary_scaling_factor}
        for name in ("original_max_position_embeddings", "beta_fast", "beta_slow"):
            p[name] = getattr(source, prefix + name)
        if t.mscale_all_dim:
            p |= {"mscale": t.mscale, "mscale_all_dim": t.mscale_all_dim}
        if not latent:
            p["truncate"] = model.yarn_correction_range_round_to_int is not False
    elif model.use_rope_scaling:
        p |= {"rope_type": "llama3", "factor": model.rope_scaling_factor, **LLAMA3}
    elif model.rotary_seq_len_interpolation_factor:
        p |= {"rope_type": "linear", "factor": float(model.rotary_seq_len_interpolation_factor)}
    if model.rotary_percent != 1.0:
        p["partial_rotary_factor"] = model.rotary_percent
    old = {k: v for k, v in p.items() if k != "rope_theta"}
    return {
        "rope_parameters": p,
        "rope_theta": p["rope_theta"],
        "rope_scaling": None if p["rope_type"] == "default" else old,
    }
