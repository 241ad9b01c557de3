"""Each correction of megatron-core 0.16.1 beside the stock behaviour that makes it necessary."""

import importlib
import inspect
import subprocess
import sys
import types

import pytest
import torch
from megatron.core.tensor_parallel import mappings, random
from megatron.core.transformer.moe import moe_utils

from tests.ranks.harness import run_ranks


def _uncorrected(code: str) -> str:
    """What `code` prints on lifted megatron-core without any correction."""
    header = (
        "import warnings; warnings.simplefilter('ignore')\n"
        "from megatron_ext.device import lift; lift.lift()\nimport torch\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", header + code], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or done.stderr.strip().splitlines()[-1]


def test_router_without_transformer_engine():
    stock = _uncorrected(
        "from megatron.core.transformer.moe.moe_utils import router_gating_linear as f\n"
        "try:\n  f(torch.ones(2, 3), torch.ones(4, 3), None, torch.float32); print('works')\n"
        "except NameError as e: print('NameError', e.name)"
    )
    assert stock == "NameError te_general_gemm"
    out = moe_utils.router_gating_linear(torch.ones(2, 3), torch.ones(4, 3), None, torch.float32)
    assert out.tolist() == [[3.0] * 4] * 2


def test_split_sizes_are_numbers():
    stock = _uncorrected(
        "from megatron.core.transformer.moe.moe_utils import maybe_move_tensor_to_cpu as f\n"
        "print(type(f(torch.tensor([1, 2]), as_numpy=True)).__name__)"
    )
    assert stock == "Tensor"
    assert moe_utils.maybe_move_tensor_to_cpu(torch.tensor([1, 2]), as_numpy=True).tolist() == [
        1,
        2,
    ]


def test_forked_random_state_is_restored():
    stock = _uncorrected(
        "from megatron.core.tensor_parallel import random\n"
        "try:\n  random._set_cuda_rng_state(torch.get_rng_state()); print('works')\n"
        "except Exception as e: print(type(e).__name__)"
    )
    assert stock in ("AttributeError", "TypeError")
    tracker = random.CudaRNGStatesTracker()
    tracker.add("a", 1)
    before = torch.get_rng_state()
    with tracker.fork("a"):
        first = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)
    with tracker.fork("a"):
        second = torch.rand(3)
    assert not torch.equal(first, second)


def _uneven_gather():
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    mine = torch.full((rank + 1, 2), float(rank))
    whole = mappings._gather_along_first_dim(mine, dist.group.WORLD, [1, 2, 3])
    back = mappings._reduce_scatter_along_first_dim(whole, dist.group.WORLD, [1, 2, 3])
    try:
        pieces = [torch.empty(n + 1, 2) for n in range(3)]
        dist.all_gather(pieces, mine)
        stock = "works"
    except (RuntimeError, ValueError):
        stock = "refused"
    return whole[:, 0].tolist(), back[:, 0].tolist(), stock


def test_uneven_gather_and_reduce_scatter():
    results = run_ranks(_uneven_gather, 3)
    for rank, (whole, back, _) in enumerate(results):
        assert whole == [0.0, 1.0, 1.0, 2.0, 2.0, 2.0]
        assert back == [3.0 * rank] * (rank + 1)
    assert "refused" in [stock for *_, stock in results]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_rotary_halves_are_the_zigzag_chunks(size):
    from megatron.core.models.common.embeddings import rotary_pos_embedding

    class Group:
        def __init__(self, rank):
            self._rank = rank

        def size(self):
            return size

        def rank(self):
            return self._rank

    rows = torch.arange(16.0)[:, None]
    got = [rotary_pos_embedding.get_pos_emb_on_this_cp_rank(rows, 0, Group(r)) for r in range(size)]
    assert sorted(torch.cat(got).flatten().tolist()) == list(range(16))
    assert got[0][0] == 0 and got[0][-1] == 15


def _update_biases(stock: bool):
    """Biases of two routers with 4 and 8 experts, moved once; the message where that fails."""
    from megatron.core import parallel_state

    finalize = importlib.import_module("megatron.core.distributed.finalize_model_grads")
    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    routers = torch.nn.ModuleList()
    for size in (4, 8):
        router = torch.nn.Module()
        router.register_buffer("expert_bias", torch.zeros(size))
        router.register_buffer("local_tokens_per_expert", torch.arange(float(size)))
        routers.append(router)
    config = types.SimpleNamespace(moe_router_bias_update_rate=0.1)
    update = finalize._update_router_expert_bias
    while stock and "stock" in inspect.getclosurevars(update).nonlocals:
        update = inspect.getclosurevars(update).nonlocals["stock"]
    try:
        update([routers], config)
    except RuntimeError as error:
        return str(error)
    return [router.expert_bias.tolist() for router in routers]


def test_expert_bias_of_layers_that_differ():
    assert "equal size" in run_ranks(_update_biases, 1, True)[0]
    four, eight = run_ranks(_update_biases, 1, False)[0]
    assert four == pytest.approx([0.1, 0.1, -0.1, -0.1])
    assert eight == pytest.approx([0.1] * 4 + [-0.1] * 4)


def test_recompute_without_fp8():
    stock = _uncorrected(
        "from megatron.core.tensor_parallel.random import CheckpointWithoutOutput\n"
        "print(CheckpointWithoutOutput().fp8)"
    )
    assert stock == "True", "upstream has changed: this correction may go"
    assert random.CheckpointWithoutOutput().fp8 is False


def test_latent_attention_without_transformer_engine():
    stock = _uncorrected(
        "from megatron.core.transformer import multi_latent_attention as m; print(m.HAVE_TE)"
    )
    assert stock == "True", "upstream has changed: this correction may go"
    from megatron.core.transformer import multi_latent_attention

    assert multi_latent_attention.HAVE_TE is False
