"""Run on a forked rank: our model with imported weights, its logits, loss and every gradient, in
the names and shapes of the Hugging Face folder.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from megatron_ext.config import parse
from megatron_ext.device import start
from megatron_ext.hf.check import words_of
from megatron_ext.hf.importer import import_folder, plan_import
from megatron_ext.hf.logits import loaded_chunks
from megatron_ext.hf.shards import Shards
from megatron_ext.mesh.groups import process_groups
from megatron_ext.model.initialise import sharded_pieces, sharding_metadata
from megatron_ext.parity.names import parse_layout
from tests.hf.families import random_model, save


def loss_of(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Mean next-token loss in nats."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def theirs(variant: str, folder: Path, tokens: torch.Tensor) -> tuple[np.ndarray, Shards]:
    """Logits by transformers, and gradients: saved as weights, they come in the hub's names."""
    model = random_model(variant)
    save(model, folder / "weights")
    logits = model(tokens).logits
    loss_of(logits, tokens).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
    save(model, folder / "gradients")
    return logits.detach().numpy(), Shards(folder / "gradients")


def whole_gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Gradient by global name, of one rank that holds everything."""
    by_storage = {p.untyped_storage().data_ptr(): p for p in model.parameters()}
    whole: dict[str, torch.Tensor] = {}
    for piece in sharded_pieces(model.sharded_state_dict(metadata=sharding_metadata())):
        parameter = by_storage.get(piece.data.untyped_storage().data_ptr())
        if parameter is None:
            continue
        first = piece.data.storage_offset() - parameter.storage_offset()
        part = parameter.grad.flatten().as_strided(piece.data.shape, piece.data.stride(), first)
        target = whole.setdefault(piece.key, torch.full(piece.global_shape, float("nan")))
        lead = piece.prepend_axis_num
        index = tuple(piece.global_offset[:lead]) + tuple(
            slice(o, o + n) for o, n in zip(piece.global_offset[lead:], part.shape)
        )
        target[index] = part
    return whole


def compare(variant: str, folder: Path, training: bool) -> dict[str, object]:
    """Largest difference of logits; of gradients, relative to the tensor's norm, with its name."""
    warnings.simplefilter("ignore")
    tokens = torch.randint(0, 99, (2, 24), generator=torch.Generator().manual_seed(7))
    logits, gradients = theirs(variant, folder, tokens)
    plan = plan_import(folder / "weights")
    import_folder(plan, folder / "ours")
    words = words_of(plan, parse_layout("single"), tuple(tokens.shape), folder / "check.yaml")
    words += ["--moe-router-load-balancing-type", "none"]
    cfg = parse(words)
    device = start("cpu")
    with process_groups(cfg.parallel, device, cfg.train.seed):
        (model,) = loaded_chunks(cfg, folder / "ours")
        model.train(training)
        positions = torch.arange(tokens.shape[1])[None].expand_as(tokens)
        found = model(tokens, positions, None)[..., :99]
        loss_of(found, tokens).backward()
        mine = whole_gradients(model)
    worst, name, compared = 0.0, "", 0
    for entry in plan.entries:
        if entry.ours not in mine:
            continue  # a buffer
        box = tuple(slice(p, p + n) for p, n in zip(entry.place, entry.size))
        values = mine[entry.ours][: entry.shape[0]][box]
        for part, value in zip(entry.parts, entry.split(values)):
            reference = gradients.read(part.name, part.index)
            scale = max(float(reference.norm()), 1e-3)
            difference = float((value - reference).norm()) / scale
            compared += 1
            if not difference <= worst:
                worst, name = difference, part.name
    return {
        "logits": float(np.abs(found.detach().numpy() - logits).max()),
        "scale": float(np.abs(logits).max()),
        "gradient": worst,
        "name": name,
        "compared": compared,
        "tensors": sum(len(entry.parts) for entry in plan.entries),
    }
