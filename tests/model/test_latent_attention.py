"""Stock multi-latent attention loses part of the rotary key's gradient over tp; ours does not."""

from tests.ranks.harness import run_ranks
from tests.ranks.tiny import TINY

MLA = (
    "--multi-latent-attention --kv-lora-rank 16 --qk-head-dim 16 --qk-pos-emb-head-dim 8"
    " --v-head-dim 16"
).split()
TP2 = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]


def _gradients(argv, stock: bool):
    """Gradients of the first step by name, as this rank's pieces."""
    from megatron_ext.model import latent_attention
    from megatron_ext.parity.report import _quiet_measure

    if stock:
        latent_attention.LatentAttention._whole_rows = lambda self, module, inputs, output: None
    return _quiet_measure(argv, 1).pieces


def _difference(world_size: int, layout: list[str], stock: bool) -> float:
    from megatron_ext.parity.compare import tensor_difference
    from megatron_ext.parity.measure import assemble

    at = TINY.index("--num-query-groups")
    argv = [*TINY[: at - 1], *TINY[at + 2 :], *MLA]
    name = "decoder.layers.3.self_attention.linear_kv_down_proj.weight"
    one = assemble(run_ranks(_gradients, 1, argv, False)[0])[name]
    parts = run_ranks(_gradients, world_size, [*argv, *layout], stock)
    return tensor_difference(assemble([p for part in parts for p in part])[name], one)


def test_the_rotary_key_gets_its_whole_gradient():
    assert _difference(2, TP2, stock=False) < 1e-5


def test_stock_loses_part_of_it():
    assert _difference(2, TP2, stock=True) > 1e-3, "upstream has changed: the class may go"
