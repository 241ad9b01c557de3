"""Context parallelism is the same training: 10 steps of a tiny model against one rank.

Losses within 1e-5, gradient norms within 1e-4 (fp32; seen: 1e-7), also where the cp ranks hold
unequal shares of the loss mask, with multi-token prediction and with every other dimension.
"""

import pytest
import torch
from megatron.core.models.gpt import gpt_model
from megatron.core.transformer import multi_token_prediction

from megatron_ext.mesh.groups import stop
from tests.ranks.harness import run_ranks
from tests.ranks.tiny import TINY, pretrain, read_metrics

STEPS = 10
CP2 = "--context-parallel-size 2"
CP4 = "--context-parallel-size 4"
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
VPP2 = "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2"
LEVELS = "--cp-comm-type a2a+p2p --hierarchical-context-parallel-sizes 2 2"
MASKED = "--eod-mask-loss"
DOCUMENTS = f"{MASKED} --reset-attention-mask --reset-position-ids --eval-iters 1 --eval-interval 5"
MLA = (
    "--multi-latent-attention --kv-lora-rank 16 --qk-head-dim 16 --qk-pos-emb-head-dim 8"
    " --v-head-dim 16 --no-group-query-attention"
)
SINKS = "--window-size 16,0 --window-attn-skip-freq 2 --softmax-type learnable"
RECOMPUTE = "--recompute-granularity selective --recompute-modules core_attn"
BALANCE = (
    "--moe-router-load-balancing-type global_aux_loss seq_aux_loss --moe-aux-loss-coeff 0.01 0.001"
    " --moe-global-aux-mode exact"
)

LAYOUTS = {
    "cp2 p2p": (2, CP2, ""),
    "cp2 all_gather": (2, f"{CP2} --cp-comm-type all_gather", ""),
    "cp2 a2a": (2, f"{CP2} --cp-comm-type a2a", ""),
    "cp4 p2p": (4, CP4, ""),
    "cp4 a2a+p2p": (4, f"{CP4} {LEVELS}", ""),
    "cp2 tp2, documents": (4, f"{CP2} {TP2} --cp-comm-type all_gather", DOCUMENTS),
    "cp2 pp2 vpp2": (4, f"{CP2} {VPP2}", ""),
    "cp2 ep2": (2, f"{CP2} --expert-model-parallel-size 2", ""),
    "cp2 dp2 sharded optimizer": (4, f"{CP2} --use-distributed-optimizer", BALANCE),
    "a strategy per layer, recompute": (
        2,
        f"{CP2} --cp-comm-type p2p a2a all_gather p2p {RECOMPUTE}",
        "",
    ),
    "unequal masks, per-token loss": (2, CP2, f"--calculate-per-token-loss {MASKED}"),
    "unequal masks, multi-token prediction": (2, CP2, f"--mtp-num-layers 2 {MASKED}"),
    "latent attention": (2, f"{CP2} --cp-comm-type p2p a2a all_gather a2a", MLA),
    "window and sinks": (2, f"{CP2} --cp-comm-type p2p a2a all_gather a2a", SINKS),
}


@pytest.fixture(scope="module")
def curves(tmp_path_factory):
    """Curves by (ranks, flags), each trained once."""
    known: dict[tuple[int, str], dict[str, list[float]]] = {}

    def train(ranks: int, flags: str) -> dict[str, list[float]]:
        if (ranks, flags) not in known:
            where = tmp_path_factory.mktemp("run")
            size = ["--global-batch-size", "4", "--train-iters", str(STEPS)]
            run_ranks(pretrain, ranks, [*TINY, *size, "--run-dir", str(where), *flags.split()])
            keys = ("lm_loss", "val_loss", "mtp_loss", "grad_norm", "z_loss", "load_balancing_loss")
            known[ranks, flags] = {key: read_metrics(where, key) for key in keys}
        return known[ranks, flags]

    return train


def _difference(got: list[float], wanted: list[float]) -> float:
    assert len(got) == len(wanted)
    return max((abs(a - b) / max(abs(b), 1e-6) for a, b in zip(got, wanted)), default=0.0)


@pytest.mark.parametrize("name", LAYOUTS)
def test_same_curve_as_one_rank(name, curves):
    ranks, layout, model = LAYOUTS[name]
    got, wanted = curves(ranks, f"{layout} {model}"), curves(1, model)
    assert len(wanted["lm_loss"]) == STEPS
    for key in ("lm_loss", "val_loss", "mtp_loss"):
        assert _difference(got[key], wanted[key]) < 1e-5, key
    for key in ("grad_norm", "load_balancing_loss", "z_loss"):
        assert _difference(got[key], wanted[key]) < 1e-4, key


def test_a_strategy_reaches_its_layer():
    """Stock 0.16.1 reads cp_comm_type one layer too late."""
    assert run_ranks(_strategies_of_layers, 2) == [["p2p", "a2a", "all_gather", "p2p"]] * 2


def _strategies_of_layers() -> list[str]:
    from megatron_ext.config import parse
    from megatron_ext.device import start
    from megatron_ext.mesh.groups import process_groups
    from megatron_ext.model.gpt import build_chunks, vocabulary

    types = ["--cp-comm-type", "p2p", "a2a", "all_gather", "p2p"]
    cfg = parse([*TINY, *CP2.split(), *types])
    with process_groups(cfg.parallel, start("cpu"), 1):
        [chunk] = build_chunks(cfg, vocabulary(cfg, None))
        return [layer.self_attention.core_attention.strategy for layer in chunk.decoder.layers]


def test_future_tokens_are_counted_over_all_ranks():
    """Four tokens a rank; the last of the sequence, on rank 0, has no future."""
    assert run_ranks(_future_tokens, 2) == [(3.0, 3.5), (4.0, 3.5)]


def _future_tokens() -> tuple[float, float]:
    torch.distributed.init_process_group("gloo")
    mask, group = torch.ones(1, 4), torch.distributed.group.WORLD
    rolls = multi_token_prediction.roll_tensor, gpt_model.roll_tensor
    stock, ours = (float(roll(mask, cp_group=group)[1]) for roll in rolls)
    stop()
    return stock, ours
