"""No host synchronisation inside a layer on CUDA with the default flags (--moe-kernels torch).

The layer runs forward and backward on the device `meta`, whose tensors have no values, on the road
that CUDA takes: sorted dispatch without padding, grouped_mm, PyTorch's attention. What does wait is
listed in WAITS. One wait is not seen here: torch's grouped_mm is one kernel for bf16 on compute
capability 9 and 10; for other types and GPUs it copies the experts' offsets to the host and loops.
"""

import pytest
import torch

from tests.moe.host_reads import HostReadError, no_host_read
from tests.ranks.harness import run_ranks
from tests.ranks.tiny import TINY

ROADS = {
    "softmax": "",
    "sigmoid, bias, two balance losses": "--moe-router-score-function sigmoid"
    " --moe-router-enable-expert-bias --moe-router-topk-scaling-factor 2.5"
    " --moe-router-load-balancing-type seq_aux_loss global_aux_loss --moe-aux-loss-coeff 1e-2 1e-3",
    "groups, a shared expert": "--moe-router-num-groups 4 --moe-router-group-topk 2"
    " --moe-shared-expert-intermediate-size 32",
    "activations again": "--recompute-granularity selective --recompute-modules moe_act",
}
WAITS = {
    "a capacity, whose map is read": "--moe-expert-capacity-factor 1.0",
    "biases, repeated by the counts": "--add-bias-linear",
}


def _run(flags: list[str], whole_layer: bool) -> str:
    """ "" or what the host read."""
    from megatron_ext.config import parse
    from megatron_ext.device import start
    from megatron_ext.mesh.groups import process_groups
    from megatron_ext.model import attention
    from megatron_ext.model.gpt import Vocabulary, build_chunks

    cfg = parse([*TINY, "--bf16", *flags])
    with process_groups(cfg.parallel, start("cpu"), cfg.train.seed):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attention, "current_device", lambda: torch.device("meta"))
            model = build_chunks(cfg, Vocabulary(250, 256))[0].module
        angles = model.rotary_pos_emb(16).to("meta")
        layer = model.decoder.layers[0].to("meta").train()
        x = torch.randn(16, 2, 64, device="meta", dtype=torch.bfloat16, requires_grad=True)
        try:
            with no_host_read():
                if whole_layer:
                    out = layer(x, attention_mask=None, rotary_pos_emb=angles)[0]
                else:
                    out = layer.mlp(x)[0]
                out.backward(torch.zeros_like(out))
        except HostReadError as error:
            return str(error)
        assert x.grad is not None
        assert all(one.grad is not None for one in layer.mlp.parameters())
    return ""


@pytest.mark.parametrize("road", ROADS)
def test_a_layer_reads_nothing(road):
    """Attention, router, dispatch and experts."""
    assert run_ranks(_run, 1, ROADS[road].split(), True) == [""]


@pytest.mark.parametrize("road", WAITS)
def test_what_waits(road):
    (read,) = run_ranks(_run, 1, WAITS[road].split(), False)
    assert read in ("aten::nonzero", "aten::repeat_interleave.Tensor")


@pytest.mark.parametrize(
    "ask",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: int(x.sum()),
        lambda x: bool((x > 0).any()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.masked_select(x > 0),
        lambda x: x.repeat_interleave(torch.ones_like(x, dtype=torch.int64)),
        lambda x: x.cpu(),
        lambda x: x.to("meta"),
        lambda x: torch.empty(3, device="meta").copy_(x),
    ],
)
def test_a_read_is_seen(ask):
    with pytest.raises(HostReadError), no_host_read():
        ask(torch.ones(3))
