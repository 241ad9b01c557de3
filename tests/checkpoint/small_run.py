"""A small training run on this rank, whose whole state can be compared: bit for bit per rank, or
gathered.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from types import SimpleNamespace

import torch
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_ext.checkpoint import Checkpointer, TrainState, rng
from megatron_ext.checkpoint import state as parts
from megatron_ext.config import parse
from megatron_ext.context import zigzag
from megatron_ext.device import start
from megatron_ext.mesh.groups import process_groups
from megatron_ext.model.gpt import build_chunks, vocabulary, wrap_for_training
from megatron_ext.optim.build import build_optimizer, build_scheduler
from tests.ranks.harness import next_port
from tests.ranks.tiny import TINY

SEQUENCE, MICRO, GLOBAL = 16, 2, 8
FLAGS = f"""
--hidden-size 32 --num-attention-heads 2 --num-query-groups 2 --ffn-hidden-size 64
--moe-ffn-hidden-size 48 --moe-layer-freq ([0]*1+[1]*3) --moe-shared-expert-intermediate-size 32
--moe-router-score-function sigmoid --moe-router-enable-expert-bias
--moe-router-load-balancing-type global_aux_loss --hidden-dropout 0.1
--seq-length {SEQUENCE} --max-position-embeddings {SEQUENCE} --micro-batch-size {MICRO}
--global-batch-size {GLOBAL} --vocab-size 128 --make-vocab-size-divisible-by 2 --train-iters 100
""".split()
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
PP2 = "--pipeline-model-parallel-size 2"
VPP2 = f"{PP2} --num-virtual-stages-per-pipeline-rank 2"
EP2 = "--expert-model-parallel-size 2"
DIST = "--use-distributed-optimizer"


def digest(tensor: torch.Tensor) -> str:
    """Short hash of dtype, shape and every bit."""
    tensor = tensor.detach().cpu().contiguous()
    raw = tensor.view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    return hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode() + raw).hexdigest()[:16]


class SmallRun:
    """Model, optimizer, scheduler of this rank and a step that draws its tokens from the step
    number.
    """

    def __init__(self, cfg) -> None:
        self.cfg = cfg
        chunks = wrap_for_training(cfg, build_chunks(cfg, vocabulary(cfg, None)))
        optimizer = build_optimizer(cfg, chunks)
        self.state = TrainState(chunks, optimizer, build_scheduler(cfg, optimizer))
        config = chunks[0].config
        config.finalize_model_grads_func = finalize_model_grads
        config.grad_scale_func = optimizer.scale_loss

    def step(self) -> float:
        """One optimizer step; its loss, equal on all ranks."""
        state, dp = self.state, parallel_state.get_data_parallel_world_size()
        generator = torch.Generator().manual_seed(state.progress.step)
        tokens = torch.randint(0, 120, (GLOBAL, SEQUENCE + 1), generator=generator)
        mine = tokens.view(-1, dp, MICRO, SEQUENCE + 1)[:, parallel_state.get_data_parallel_rank()]
        for chunk in state.chunks:
            chunk.zero_grad_buffer()
        state.optimizer.zero_grad()
        many = len(state.chunks) > 1
        reports = get_forward_backward_func()(
            forward_step_func=_forward,
            data_iterator=[iter(mine) for _ in state.chunks] if many else iter(mine),
            model=state.chunks if many else state.chunks[0],
            num_microbatches=len(mine),
            seq_length=SEQUENCE,
            micro_batch_size=MICRO,
            decoder_seq_length=SEQUENCE,
            forward_only=False,
        )
        state.before_update()
        state.optimizer.step()
        state.scheduler.step(increment=GLOBAL)
        progress = state.progress
        progress.step += 1
        progress.consumed_samples += GLOBAL
        progress.consumed_tokens += GLOBAL * SEQUENCE
        total = torch.tensor([sum(r["loss"].item() for r in reports)], dtype=torch.float64)
        torch.distributed.all_reduce(total)
        pp = parallel_state.get_pipeline_model_parallel_world_size()
        return total.item() * pp / torch.distributed.get_world_size() / len(mine)

    def steps(self, count: int) -> list[float]:
        """Losses of the next steps."""
        return [self.step() for _ in range(count)]

    def fingerprint(self) -> dict[str, object]:
        """Every bit of this rank: weights, buffers, optimizer states, step counts, schedule,
        counters, random streams.
        """
        state = self.state
        marks: dict[str, object] = {"progress": str(state.progress)}
        for number, chunk in enumerate(state.chunks):
            for name, tensor in parts.unwrap(chunk).state_dict().items():
                if torch.is_tensor(tensor):
                    marks[f"{number}.{name}"] = digest(tensor)
        for leaf_number, leaf in enumerate(parts.shards.leaf_optimizers(state.optimizer)):
            for group_number, group in enumerate(leaf.optimizer.param_groups):
                key = f"optimizer.{leaf_number}.{group_number}"
                marks[key] = str({k: v for k, v in group.items() if k != "params"})
                for index, parameter in enumerate(group["params"]):
                    for name, value in leaf.optimizer.state[parameter].items():
                        marks[f"{key}.{index}.{name}"] = digest(value)
                    marks[f"{key}.{index}"] = digest(parameter)
        marks["scheduler"] = str(state.scheduler.state_dict())
        marks.update({f"rng.{name}": digest(stream) for name, stream in rng.capture().items()})
        return marks

    def gathered(self, true_vocab: int | None = None) -> dict[str, str]:
        """Hash of every whole tensor of the run, assembled from all ranks: weights, buffers,
        optimizer states; of vocabulary tables only the first `true_vocab` rows.
        """
        model = parts.sharded_model(self.state.chunks)
        states, _ = parts.sharded_optimizer(self.state.optimizer, model)
        mine = []
        for piece in parts.built([model, states]):
            shape = (1,) * piece.prepend_axis_num + tuple(piece.local_shape)
            mine.append(
                (
                    piece.key,
                    piece.global_shape,
                    piece.global_offset,
                    piece.data.detach().reshape(shape).clone(),
                )
            )
        everyone: list = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, mine)
        whole: dict[str, torch.Tensor] = {}
        for key, shape, offset, data in (piece for rank in everyone for piece in rank):
            target = whole.setdefault(key, torch.full(shape, float("nan"), dtype=data.dtype))
            target[tuple(slice(o, o + s) for o, s in zip(offset, data.shape))] = data
        assert not any(tensor.isnan().any() for tensor in whole.values())
        for key in whole:
            if key.endswith(("word_embeddings.weight", "output_layer.weight")):
                whole[key] = whole[key][:true_vocab]
        return {key: digest(tensor) for key, tensor in whole.items()}


def _forward(batches, model, *_):
    batch = next(batches)
    cp_rank = parallel_state.get_context_parallel_rank()
    split = zigzag(parallel_state.get_context_parallel_world_size()).split
    tokens, labels = (split(part.contiguous(), cp_rank) for part in (batch[:, :-1], batch[:, 1:]))
    position_ids = split(torch.arange(SEQUENCE)[None].expand(MICRO, -1).contiguous(), cp_rank)
    output = model(tokens, position_ids, None, labels=labels)

    def loss(output):
        mean = output.float().mean()
        return mean, {"loss": mean.detach().clone()}

    return output, loss


def options(**changed) -> SimpleNamespace:
    """cfg.checkpoint with the defaults of the flags."""
    cfg = parse([*TINY, *FLAGS], environ={"WORLD_SIZE": "1"}).checkpoint
    values = {name: getattr(cfg, name) for name in cfg.__dataclass_fields__}
    return SimpleNamespace(**{**values, **changed})


@contextlib.contextmanager
def small_run(flags: str) -> Iterator[SmallRun]:
    """A run in the layout of `flags` on the ranks of this test, its groups destroyed at the end."""
    cfg = parse([*TINY, *FLAGS, *flags.split()])
    device = start("cpu")
    os.environ["MASTER_PORT"] = next_port()
    with process_groups(cfg.parallel, device, cfg.train.seed):
        yield SmallRun(cfg)


def checkpointer(folder, load=None, **changed) -> Checkpointer:
    """A Checkpointer over `folder` with changed options."""
    return Checkpointer(options(**changed), folder, load, run_info={"test": True})
