"""Where a number first stopped being finite: hooks that watch one replay of a step.

    with Watch(chunks, num_micro_batches) as watch:   # healthy steps run without any hook
        ...forward, backward, reduce...
    worst = first(everybody's watch.findings)

The forward pass is watched module by module (router logits, balance losses, experts one by one),
the backward pass gradient by gradient, each before it is summed over ranks, so that the rank and
the micro-batch are known. `first` orders the findings of all ranks as data flows: forward before
backward, by micro-batch, by pipeline stage, then by the place in the stage.

Worked example, 4 ranks pp2 ep2, an expert of the third of 4 layers gives a NaN on rank 3: rank 3
finds it in its experts, rank 2 two modules later where the tokens come back, both in stage 1 of
micro-batch 0; rank 3's finding has the lower place and is the first.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from megatron.core import parallel_state
from torch import Tensor, nn

from megatron_ext.moe.experts import GroupedExperts
from megatron_ext.moe.router import Router

FORWARD, BACKWARD, REDUCED = 0, 1, 2
PHASES = ("forward", "backward", "after the reduction")


@dataclass(frozen=True, order=True)
class Finding:
    """One number that is not finite; the order is that of the data flow."""

    phase: int
    micro_batch: int
    stage: int  # of the pipeline, all chunks counted; negative in the backward pass
    place: int  # how many modules (gradients) of the stage came before
    rank: int
    module: str
    what: str  # output, router logits, load_balancing_loss, gradient of fc1_weight, ...
    expert: int | None = None  # global number

    def __str__(self) -> str:
        expert = "" if self.expert is None else f" expert {self.expert} (global)"
        return f"{self.module}{expert}: {self.what}, {PHASES[self.phase]}"

    def to_json(self) -> dict:
        """Plain JSON for the report."""
        return {**asdict(self), "phase": PHASES[self.phase], "stage": abs(self.stage)}


def first(findings: Iterable[Finding]) -> Finding | None:
    """The one that the others follow from."""
    return min(
        findings, key=lambda f: (f.phase, f.micro_batch, f.stage, f.place, f.rank), default=None
    )


def is_finite(value: object) -> bool:
    """False where a tensor (or one inside a tuple or list) holds a NaN or an infinity."""
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value).all())
    return not isinstance(value, (tuple, list)) or all(map(is_finite, value))


def bad_expert(rows_TH: Tensor, counts_e: Tensor) -> int | None:
    """The first local expert with a row that is not finite; rows [T, H] are sorted by expert."""
    bad_T = ~torch.isfinite(rows_TH).flatten(1).all(dim=1)
    if not bad_T.any():
        return None
    ends = torch.cumsum(counts_e.to(bad_T.device), 0)
    return int((ends <= bad_T.nonzero()[0, 0]).sum())


def global_names(chunk: nn.Module) -> dict[str, str]:
    """Module name in this chunk -> name in the whole model: layers have their number in the model
    (decoder.layers.0 of the second of two stages is decoder.layers.2), wrappers leave no trace.
    """
    numbers = {
        name: module.layer_number - 1
        for name, module in chunk.named_modules()
        if re.search(r"decoder\.layers\.\d+$", name) and hasattr(module, "layer_number")
    }

    def renamed(name: str) -> str:
        owner = next((o for o in numbers if f"{name}.".startswith(f"{o}.")), None)
        if owner is not None:
            name = f"{owner.rpartition('.')[0]}.{numbers[owner]}{name[len(owner) :]}"
        return re.sub(r"^(module\.)+|^module$", "", name)

    return {name: renamed(name) for name, _ in chunk.named_modules()}


def _stage(chunk_number: int) -> int:
    pp = parallel_state.get_pipeline_model_parallel_world_size()
    return chunk_number * pp + parallel_state.get_pipeline_model_parallel_rank()


def first_expert(local_experts: int) -> int:
    """Global number of this rank's expert 0."""
    return parallel_state.get_expert_model_parallel_rank() * local_experts


class _ChunkWatch:
    """The hooks of one model chunk."""

    def __init__(self, watch: Watch, chunk: nn.Module, number: int) -> None:
        self.watch, self.chunk, self.stage = watch, chunk, _stage(number)
        self.micro_batch, self.place, self.backward_place = -1, 0, 0

    def hooks(self) -> Iterator[Callable[[], None]]:
        """Attach everything; yields what takes it away."""
        names = global_names(self.chunk)
        yield self.chunk.register_forward_pre_hook(self._begins).remove
        for name, module in self.chunk.named_modules():
            if name == "" or isinstance(getattr(module, "module", None), nn.Module):
                continue  # the wrappers around the model
            yield module.register_forward_hook(self._after(names[name])).remove
            if isinstance(module, Router):
                yield self._watch_gating(module, names[name])
            for parameter_name, parameter in module.named_parameters(recurse=False):
                if parameter.requires_grad:
                    yield parameter.register_hook(
                        self._gradient(names[name], parameter_name, module)
                    ).remove

    def _begins(self, *_) -> None:
        self.micro_batch, self.place = (self.micro_batch + 1) % self.watch.num_micro_batches, 0

    def _add(self, module: str, what: str, expert: int | None = None) -> None:
        self.watch.findings.append(
            Finding(
                FORWARD,
                self.micro_batch,
                self.stage,
                self.place,
                torch.distributed.get_rank(),
                module,
                what,
                expert,
            )
        )

    def _after(self, name: str) -> Callable:
        def look(module: nn.Module, inputs: tuple, output: object) -> None:
            self.place += 1
            if self.watch.has(FORWARD):
                return
            if isinstance(module, Router):
                for loss, value in module.tally.losses.items():
                    if not is_finite(value):
                        self._add(name, loss)
                        return
            if is_finite(output):
                return
            expert = None
            if isinstance(module, GroupedExperts):
                local = bad_expert(*module.outputs_by_expert(inputs, output))
                expert = None if local is None else first_expert(module.num_local_experts) + local
            self._add(name, "output", expert)

        return look

    def _watch_gating(self, router: Router, name: str) -> Callable[[], None]:
        stock = router.gating

        def gating(hidden: Tensor) -> Tensor:
            logits = stock(hidden)
            self.place += 1
            if not self.watch.has(FORWARD) and not is_finite(logits) and is_finite(hidden):
                self._add(name, "router logits")
            return logits

        router.gating = gating
        return lambda: router.__dict__.pop("gating", None)

    def _gradient(self, module_name: str, name: str, module: nn.Module) -> Callable:
        calls = 0

        def look(gradient: Tensor) -> None:
            nonlocal calls
            self.backward_place += 1
            calls += 1
            if self.watch.has(BACKWARD) or is_finite(gradient):
                return
            self.watch.findings.append(
                Finding(
                    BACKWARD,
                    calls - 1,
                    -self.stage,
                    self.backward_place,
                    torch.distributed.get_rank(),
                    module_name,
                    f"gradient of {name}",
                    expert_of_gradient(module, gradient),
                )
            )

        return look

    def reduced(self) -> Iterator[Finding]:
        """Gradients that are not finite after the sums over ranks."""
        names = global_names(self.chunk)
        place = 0
        for module_name, module in self.chunk.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                place += 1
                gradient = getattr(parameter, "main_grad", parameter.grad)
                if gradient is not None and not is_finite(gradient):
                    yield Finding(
                        REDUCED,
                        0,
                        self.stage,
                        place,
                        torch.distributed.get_rank(),
                        names[module_name],
                        f"gradient of {name}",
                        expert_of_gradient(module, gradient),
                    )


def expert_of_gradient(module: nn.Module, gradient: Tensor) -> int | None:
    """Global number of the only expert whose rows of this gradient are not finite, else None."""
    if not isinstance(module, GroupedExperts):
        return None
    bad = (~torch.isfinite(gradient).flatten(1).all(dim=1)).nonzero().flatten().tolist()
    return first_expert(module.num_local_experts) + bad[0] if len(bad) == 1 else None


class Watch:
    """Hooks on all chunks of this rank; `findings` holds the first of each phase."""

    def __init__(self, chunks: Sequence[nn.Module], num_micro_batches: int) -> None:
        self.num_micro_batches = num_micro_batches
        self.findings: list[Finding] = []
        self._parts = [_ChunkWatch(self, chunk, number) for number, chunk in enumerate(chunks)]
        self._removers: list[Callable] = []

    def has(self, phase: int) -> bool:
        """True once this phase has its first finding."""
        return any(finding.phase == phase for finding in self.findings)

    def __enter__(self) -> Watch:
        for part in self._parts:
            self._removers += list(part.hooks())
        return self

    def __exit__(self, *_: object) -> None:
        for remove in self._removers:
            remove()
        self._removers.clear()

    def look_at_reduced(self) -> None:
        """Add the gradients as they are after the reduction."""
        for part in self._parts:
            self.findings += list(part.reduced())[:1]
