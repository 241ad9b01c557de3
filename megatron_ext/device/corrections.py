"""What megatron-core 0.16.1 assumes wrongly, corrected in one place, call by call.

Each function below is one correction with its reason; `tests/device/test_corrections.py` shows the
stock behaviour failing for each, so that a correction can be deleted when upstream is fixed.
Corrections that belong to one module of ours (the router's loss scale, experts' gradient group)
live beside that module instead.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import warnings

import torch


def router_without_transformer_engine() -> None:
    """moe_utils reads `te_general_gemm`, a name that only exists where Transformer Engine is
    installed.
    """
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def latent_attention_without_transformer_engine() -> None:
    """Multi-latent attention takes HAVE_TE for true without Transformer Engine and then asks
    isinstance(x, None).
    """
    if importlib.util.find_spec("transformer_engine") is None:
        from megatron.core.transformer import multi_latent_attention

        multi_latent_attention.HAVE_TE = False


def recompute_without_fp8() -> None:
    """CheckpointWithoutOutput() takes its default fp8=False for "fp8 is on" and asks Transformer
    Engine's state.
    """
    from megatron.core.tensor_parallel import random

    stock = random.CheckpointWithoutOutput.__init__

    def init(self, fp8=False) -> None:
        stock(self, fp8)
        self.fp8 = bool(fp8)

    random.CheckpointWithoutOutput.__init__ = init


def expert_bias_of_layers_that_differ() -> None:
    """The update of expert biases stacks all layers' vectors: update them in groups of one size."""
    # the package shows the function of this name, not its module
    finalize = importlib.import_module("megatron.core.distributed.finalize_model_grads")
    stock = finalize._update_router_expert_bias

    def update(model, config) -> None:
        chunks = [list(finalize.get_attr_wrapped_model(chunk, "modules")()) for chunk in model]
        routers = [m for modules in chunks for m in modules if hasattr(m, "expert_bias")]
        for size in sorted({router.expert_bias.numel() for router in routers}):
            same = [router for router in routers if router.expert_bias.numel() == size]
            stock([torch.nn.ModuleList(same)], config)

    finalize._update_router_expert_bias = update


def split_sizes_as_lists() -> None:
    """`maybe_move_tensor_to_cpu` leaves CPU tensors as they are: all_to_all then gets tensors as
    split sizes.

    On a CPU the caller's `as_numpy=True` must still give numpy, since it calls `.tolist()` later.
    """
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    def move(tensor, as_numpy: bool = False, record_stream: bool = False):
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    moe_utils.maybe_move_tensor_to_cpu = move
    token_dispatcher.maybe_move_tensor_to_cpu = move


def random_state_of_the_cpu() -> None:
    """The RNG tracker forks CUDA generators; on a CPU the state that dropout draws from is torch's
    own.

    `fork` also warns that "CPU RNG state changed within GPU RNG context", which is here its
    purpose.
    """
    from megatron.core.tensor_parallel import random

    def get_state(device="cpu", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(state: torch.Tensor, device=-1, graph_safe: bool = False) -> None:
        torch.set_rng_state(state)

    random._get_cuda_rng_state = get_state
    random._set_cuda_rng_state = set_state
    logging.getLogger(random.__name__).setLevel(logging.ERROR)


def rotary_halves_without_pinned_memory() -> None:
    """The context-parallel RoPE helper pins its index tensor; a CPU build of torch refuses that."""
    from megatron.core.models.common.embeddings import rope_utils, rotary_pos_embedding
    from megatron.core.models.common.embeddings import yarn_rotary_pos_embedding as yarn

    def halves(pos_emb: torch.Tensor, seq_dim: int, cp_group) -> torch.Tensor:
        """Rows of this rank's two zig-zag chunks: chunk r and chunk 2*cp-1-r of 2*cp."""
        size, rank = cp_group.size(), cp_group.rank()
        chunks = pos_emb.chunk(2 * size, dim=seq_dim)
        return torch.cat((chunks[rank], chunks[2 * size - 1 - rank]), dim=seq_dim)

    for module in (rope_utils, rotary_pos_embedding, yarn):
        if hasattr(module, "get_pos_emb_on_this_cp_rank"):
            module.get_pos_emb_on_this_cp_rank = halves


def gather_of_uneven_pieces() -> None:
    """gloo's all_gather refuses pieces of different sizes (expert tensor parallelism needs them):
    pad, then cut.
    """
    from megatron.core.tensor_parallel import mappings

    stock = mappings._gather_along_first_dim

    def gather(input_, group, output_split_sizes=None, use_global_buffer=False):
        if output_split_sizes is None or group.size() == 1:
            return stock(input_, group, output_split_sizes, use_global_buffer)
        sizes = [int(size) for size in output_split_sizes]
        longest = max(sizes)
        padded = input_.new_zeros((longest, *input_.shape[1:]))
        padded[: input_.shape[0]] = input_
        gathered = input_.new_empty((longest * len(sizes), *input_.shape[1:]))
        torch.distributed.all_gather_into_tensor(gathered, padded, group=group)
        pieces = gathered.view(len(sizes), longest, *input_.shape[1:])
        return torch.cat([piece[:size] for piece, size in zip(pieces, sizes)])

    mappings._gather_along_first_dim = gather


def reduce_scatter_of_uneven_pieces() -> None:
    """gloo cannot reduce_scatter pieces of different sizes: sum everywhere, keep the own piece."""
    from megatron.core.tensor_parallel import mappings

    stock = mappings._reduce_scatter_along_first_dim

    def reduce_scatter(input_, group, input_split_sizes=None, use_global_buffer=False):
        if input_split_sizes is None or group.size() == 1:
            return stock(input_, group, input_split_sizes, use_global_buffer)
        total = input_.contiguous().clone()
        torch.distributed.all_reduce(total, group=group)
        return torch.split(total, [int(size) for size in input_split_sizes])[group.rank()].clone()

    mappings._reduce_scatter_along_first_dim = reduce_scatter


def future_tokens_of_the_own_document() -> None:
    """The mask of the multi-token-prediction losses moves with the labels and forgets what it has
    passed, so that depth k trains token t on token t + k + 1 of another document: a target counts
    where no place from t to it is masked. Depth by depth: mask_k[t] = mask_k-1[t] mask_k-1[t + 1].

    The loss also divides a cp rank's sum by its own number of tokens, which differs from rank to
    rank: divide by the mean over cp, so that the average over dp x cp is the loss of the whole
    sequence; and by 1 where nothing counts.
    """
    from megatron.core.models.gpt import gpt_model

    stock = gpt_model.roll_tensor

    def roll(tensor, shifts=-1, dims=-1, cp_group=None, packed_seq_params=None):
        rolled, total = stock(tensor, shifts, dims, cp_group, packed_seq_params)
        if not tensor.is_floating_point():
            return rolled, total
        joined = rolled * tensor
        total = joined.sum()
        if cp_group is not None and cp_group.size() > 1:
            torch.distributed.all_reduce(total, group=cp_group)
            total = total / cp_group.size()
        return joined, torch.where(total > 0, total, torch.ones_like(total))

    gpt_model.roll_tensor = roll


PARTS = (
    "megatron.core.dist_checkpointing",
    "megatron.core.distributed",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.optimizer",
    "megatron.core.pipeline_parallel",
)


def import_quietly() -> None:
    """Import the parts of megatron-core that a run uses without its import-time warnings (no Apex,
    no Transformer Engine, its own deprecations): each rank would print them, and none is news to
    the user.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in PARTS:
            importlib.import_module(name)


def apply(kind: str) -> None:
    """Import megatron-core and correct it for `kind` = "cpu" or "cuda". Call once, after `lift()`
    on a CPU.
    """
    import_quietly()
    router_without_transformer_engine()
    latent_attention_without_transformer_engine()
    recompute_without_fp8()
    expert_bias_of_layers_that_differ()
    future_tokens_of_the_own_document()
    if kind == "cpu":
        split_sizes_as_lists()
        random_state_of_the_cpu()
        rotary_halves_without_pinned_memory()
        gather_of_uneven_pieces()
        reduce_scatter_of_uneven_pieces()
