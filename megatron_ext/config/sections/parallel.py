"""How many ranks, and how they are split."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_ext.ranges import Layers, Minutes, Parts, Positive, Wait


@dataclass(frozen=True)
class ParallelSection:
    """Sizes of the axes: dense pp x dp x cp x tp, expert pp x edp x ep x etp."""

    world_size: Parts | None = None
    """Number of ranks. Default: WORLD_SIZE of the environment, else 1. Set it for --dry-run; a real
    run must agree with the environment."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where tensors live. auto: cuda where a GPU is visible, else cpu."""

    device_memory_gb: Positive | None = None
    """Memory of a device in GB. --dry-run and the launcher refuse a run whose estimate of the
    fullest rank is above it."""

    cpu_kernels: Literal["auto", "native", "torch"] = "auto"
    """Row-wise steps (norms, SwiGLU, softmax ...) on a CPU. native: one pass each, and tensors
    whose memory is used again, compiled by g++ (seconds, once a machine); torch: as torch does;
    auto: native where g++ is found."""

    distributed_backend: Literal["nccl", "gloo"] | None = None
    """Collective library. Default: nccl on cuda, gloo on cpu (Megatron-LM's default is nccl)."""

    gloo_collectives: Literal["shared", "messages", "plain"] = "shared"
    """How gloo groups exchange. shared: through memory, among the ranks of one host; messages:
    reduce-scatter and all-gather made of gloo's faster collectives; plain: gloo's own. Two ranks
    get the same bits of each; more ranks the same sums in another order."""

    distributed_timeout_minutes: Minutes = 10
    """How long a collective may wait for its peers, in minutes."""

    rendezvous_timeout_s: Wait = 300.0
    """How long a rank waits at the start for the others, in seconds; then it leaves with 69."""

    tensor_model_parallel_size: Parts = 1
    """Ranks that share each layer's matrices (tp)."""

    pipeline_model_parallel_size: Parts = 1
    """Ranks that share the stack of layers (pp)."""

    virtual_pipeline_model_parallel_size: Layers | None = None
    """Model chunks a pipeline rank holds (vpp), for the interleaved schedule. Resolved from
    --num-virtual-stages-per-pipeline-rank, --num-layers-per-virtual-pipeline-stage or
    --pipeline-model-parallel-layout; None: not interleaved."""

    num_layers_per_virtual_pipeline_stage: Layers | None = None
    """Layers of one model chunk; the other way to ask for vpp."""

    num_virtual_stages_per_pipeline_rank: Layers | None = None
    """Model chunks a pipeline rank holds; excludes --num-layers-per-virtual-pipeline-stage."""

    context_parallel_size: Parts = 1
    """Ranks that share each sequence (cp)."""

    expert_model_parallel_size: Parts = 1
    """Ranks that share the experts of a layer (ep); must divide dp*cp*tp/etp."""

    expert_tensor_parallel_size: Parts | None = None
    """Ranks that share one expert's matrices (etp). Default: the tensor-model-parallel size."""

    sequence_parallel: bool = False
    """Split activations along the sequence between the tp ranks outside the matrices."""

    use_tp_pp_dp_mapping: bool = False
    """Rank order tp-cp-ep-pp-dp instead of tp-cp-ep-dp-pp: pipeline neighbours become closer."""

    num_distributed_optimizer_instances: Parts = 1
    """Copies of the sharded optimizer state inside the data-parallel group."""

    enable_gloo_process_groups: bool = field(
        default=True, metadata={"argparse_meta": {"arg_names": ["--disable-gloo-process-groups"]}}
    )
    """Make gloo groups beside nccl ones, for objects and checkpoints."""

    @property
    def data_parallel_size(self) -> int:
        """world / (tp*pp*cp), ranks that see different samples; 0 where it does not divide."""
        model = (
            self.tensor_model_parallel_size
            * self.pipeline_model_parallel_size
            * self.context_parallel_size
        )
        world = self.world_size or 0
        return world // model if model > 0 and world % model == 0 else 0

    @property
    def expert_data_parallel_size(self) -> int:
        """world / (etp*ep*pp), ranks that hold the same experts; 0 where it does not divide."""
        etp = self.expert_tensor_parallel_size or self.tensor_model_parallel_size
        expert = etp * self.expert_model_parallel_size * self.pipeline_model_parallel_size
        world = self.world_size or 0
        return world // expert if expert > 0 and world % expert == 0 else 0
