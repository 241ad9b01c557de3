"""World = pp * dp * cp * tp = pp * edp * ep * etp, and what each axis must divide."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from megatron_ext.config.checks.numbers import divisors, multiples_near, one_of
from megatron_ext.config.run_config import RunConfig
from megatron_ext.errors import Violation


def world_agrees_with_environment(
    cfg: RunConfig, environ: Mapping[str, str]
) -> Iterator[Violation]:
    """A real run has the launcher's number of ranks; only a dry run may imagine another."""
    text = environ.get("WORLD_SIZE", "")
    size = cfg.parallel.world_size
    if cfg.action == "train" and text.isdecimal() and int(text) != size:
        yield Violation(
            "--world-size",
            size,
            f"is not the launcher's WORLD_SIZE = {text}",
            "remove it, or add --dry-run",
        )


def rules(cfg: RunConfig) -> Iterator[Violation]:
    """Rank grid, experts over ranks, tensors over tp."""
    yield from _dense_grid(cfg)
    yield from _expert_grid(cfg)
    yield from _order(cfg)
    yield from _experts(cfg)
    yield from _tensors(cfg)
    yield from _experts_over_tp(cfg)
    yield from _instances(cfg)


def _dense_grid(cfg: RunConfig) -> Iterator[Violation]:
    p = cfg.parallel
    model = p.tensor_model_parallel_size * p.pipeline_model_parallel_size * p.context_parallel_size
    if p.world_size % model:
        grid = (
            f"{p.tensor_model_parallel_size}*{p.pipeline_model_parallel_size}"
            f"*{p.context_parallel_size} = {model}"
        )
        flag = "WORLD_SIZE" if cfg.origins["world_size"] == "environment" else "--world-size"
        yield Violation(
            flag,
            p.world_size,
            f"must be a multiple of tp*pp*cp = {grid}",
            f"use {one_of(multiples_near(p.world_size, model))} ranks",
        )


def _expert_grid(cfg: RunConfig) -> Iterator[Violation]:
    p = cfg.parallel
    ep, etp = p.expert_model_parallel_size, p.expert_tensor_parallel_size
    fold = p.data_parallel_size * p.context_parallel_size * p.tensor_model_parallel_size
    if fold == 0:
        return
    if fold % etp:
        yield Violation(
            "--expert-tensor-parallel-size",
            etp,
            f"must divide dp*cp*tp = {fold}",
            f"use {one_of(divisors(fold), etp)}",
        )
        return
    if (fold // etp) % ep:
        experts = cfg.transformer.num_moe_experts
        legal = [d for d in divisors(fold // etp) if not experts or experts % d == 0]
        yield Violation(
            "--expert-model-parallel-size",
            ep,
            f"must divide dp*cp*tp/etp = {fold // etp}",
            f"use {one_of(legal, ep)}",
        )


def _order(cfg: RunConfig) -> Iterator[Violation]:
    """megatron-core: with pp before dp, both folds must have the same data-parallel size."""
    p = cfg.parallel
    dp, edp = p.data_parallel_size, p.expert_data_parallel_size
    if p.use_tp_pp_dp_mapping and p.pipeline_model_parallel_size > 1 and dp and edp and dp != edp:
        yield Violation(
            "--use-tp-pp-dp-mapping",
            None,
            f"needs world/(tp*cp*pp) = {dp} equal to world/(etp*ep*pp) = {edp}",
            "remove it, or make ep*etp = tp*cp",
        )


def _experts(cfg: RunConfig) -> Iterator[Violation]:
    experts, ep = cfg.transformer.num_moe_experts, cfg.parallel.expert_model_parallel_size
    etp = cfg.parallel.expert_tensor_parallel_size
    if experts is None:
        if ep > 1:
            yield Violation(
                "--expert-model-parallel-size",
                ep,
                "needs --num-experts",
                "use 1, or give --num-experts",
            )
        return
    if experts % ep:
        yield Violation(
            "--num-experts",
            experts,
            f"must be a multiple of --expert-model-parallel-size = {ep}",
            f"use {one_of(multiples_near(experts, ep))} experts,"
            f" or ep {one_of(divisors(experts), ep)}",
        )
    width = cfg.transformer.moe_ffn_hidden_size
    if width and width % etp:
        yield Violation(
            "--moe-ffn-hidden-size",
            width,
            f"must be a multiple of --expert-tensor-parallel-size = {etp}",
            f"use {one_of(multiples_near(width, etp))}",
        )
    if cfg.transformer.add_bias_linear and etp > 1:
        yield Violation(
            "--expert-tensor-parallel-size",
            etp,
            "must be 1 where experts have biases",
            "use --disable-bias-linear, or --expert-tensor-parallel-size 1",
        )


def _tensors(cfg: RunConfig) -> Iterator[Violation]:
    t, tp = cfg.transformer, cfg.parallel.tensor_model_parallel_size
    heads, groups = t.num_attention_heads, t.num_query_groups
    if heads and heads % tp:
        yield Violation(
            "--tensor-model-parallel-size",
            tp,
            f"must divide --num-attention-heads = {heads}",
            f"use {one_of(divisors(heads), tp)}",
        )
    elif heads and groups and groups % tp and tp % groups:
        legal = [d for d in divisors(heads) if groups % d == 0 or d % groups == 0]
        yield Violation(
            "--tensor-model-parallel-size",
            tp,
            f"must divide or be a multiple of --num-query-groups = {groups}",
            f"use {one_of(legal, tp)}",
        )
    shared = t.moe_shared_expert_intermediate_size
    for flag, value in (
        ("--hidden-size", t.hidden_size),
        ("--ffn-hidden-size", t.ffn_hidden_size),
        ("--moe-shared-expert-intermediate-size", shared),
    ):
        if value and value % tp:
            yield Violation(
                flag,
                value,
                f"must be a multiple of --tensor-model-parallel-size = {tp}",
                f"use {one_of(multiples_near(value, tp))}",
            )


def _experts_over_tp(cfg: RunConfig) -> Iterator[Violation]:
    p, tp = cfg.parallel, cfg.parallel.tensor_model_parallel_size
    if cfg.transformer.num_moe_experts and tp > 1 and not p.sequence_parallel:
        yield Violation(
            "--tensor-model-parallel-size",
            tp,
            "with --num-experts needs --sequence-parallel",
            "add --sequence-parallel, or use --tensor-model-parallel-size 1",
        )


def _instances(cfg: RunConfig) -> Iterator[Violation]:
    p = cfg.parallel
    copies, ranks = p.num_distributed_optimizer_instances, p.data_parallel_size
    ranks *= p.context_parallel_size
    if copies > 1 and not cfg.ddp.use_distributed_optimizer:
        yield Violation(
            "--num-distributed-optimizer-instances",
            copies,
            "needs --use-distributed-optimizer",
            "add it, or use 1",
        )
    if ranks and ranks % copies:
        yield Violation(
            "--num-distributed-optimizer-instances",
            copies,
            f"must divide dp*cp = {ranks}",
            f"use {one_of(divisors(ranks), copies)}",
        )
