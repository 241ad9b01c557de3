"""python -m megatron_ext.planner COMMAND --config FILE --cluster NAME --world-size N [flags]"""

from __future__ import annotations

import argparse
import difflib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from megatron_ext.command import CommandLine, number
from megatron_ext.config import RunConfig, parse
from megatron_ext.config.checks.numbers import divisors
from megatron_ext.costs.cluster import FOLDER, Cluster, load
from megatron_ext.errors import ConfigError
from megatron_ext.pipeline import draw
from megatron_ext.planner import job, placement
from megatron_ext.planner import memory as mem
from megatron_ext.planner.layouts import Verdict, broken_rule, sizes_of, verdicts
from megatron_ext.planner.search import flags_of, search, sharded, why_not
from megatron_ext.planner.step_time import report, step

COMMANDS = {
    "layouts": "every legal tp/pp/vpp/cp/ep/etp/dp of a world size",
    "memory": "bytes of each pipeline stage, and the worst rank",
    "time": "a simulated step",
    "search": "the fastest layouts that fit, with flags and an sbatch file",
    "explain": "memory and time of one layout in words",
    "calibrate": "measure this machine and write configs/clusters/this-machine.yaml",
}
CONFIGS = FOLDER.parent


def parser() -> argparse.ArgumentParser:
    """The planner's own options; all others are flags of pretrain_moe.py."""
    made = CommandLine(
        "python -m megatron_ext.planner",
        "Plans a run before it starts: no GPU, no process group. Every flag of"
        " pretrain_moe.py may follow and overrides the file.",
        epilog="\n".join(f"{name:10s} {text}" for name, text in COMMANDS.items()),
    )
    made.add_argument("command", choices=COMMANDS)
    made.add_argument("--config", help="YAML of a run, or its name in configs/")
    made.add_argument("--cluster", help="YAML of a cluster, or its name in configs/clusters/")
    made.add_argument("--world-size", type=number("Parts"), help="ranks")
    fullest = "fullest expert rank over mean"
    made.add_argument("--imbalance", type=number("Positive"), default=1.0, help=fullest)
    made.add_argument("--rejected", action="store_true", help="layouts: the others and their rule")
    made.add_argument("--limit", type=number("Whole"), default=50, help="most lines of a list")
    room = "search: memory of a rank (the cluster's)"
    made.add_argument("--memory-gb", type=number("Positive"), help=room)
    made.add_argument("--svg", help="time: write a picture of the timeline")
    made.add_argument("--sbatch", help="search: write an sbatch file")
    made.add_argument("--rank-order", help="time: write the best order of ranks")
    made.add_argument("--json", action="store_true", help="memory, time: as JSON")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command and print its answer."""
    own, flags = parser().parse_known_args(argv)
    if own.command == "calibrate":
        from megatron_ext.planner.calibrate import calibrate

        print(calibrate(own.cluster))
        return
    if own.imbalance < 1:
        raise ConfigError(f"--imbalance {own.imbalance:g} must be at least 1", do="use 1.0")
    cluster = None if own.cluster is None else load(own.cluster)
    world = own.world_size or 1
    if cluster and cluster.size is not None and world > cluster.size:
        raise ConfigError(
            f"--world-size {world}, but cluster {cluster.name} has {cluster.size} GPUs",
            do=f"use at most {cluster.size}, or raise nodes in {cluster.source}",
        )
    run = {"layouts": _layouts, "search": _search}.get(own.command, _one)
    print(run(own, flags, cluster, world))


def config_path(name: str | None) -> str:
    """The file of a name or path.

    Raises:
        ConfigError: neither; with the nearest names.
    """
    known = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    if name is None:
        raise ConfigError("--config is missing", do=f"use {', '.join(known)}")
    for path in (Path(name), CONFIGS / f"{name}.yaml"):
        if path.is_file():
            return str(path)
    model, dot, _ = name.lower().partition(".")
    if dot and model in known:  # a recipe with its machine: --config reads both files
        return name
    bare = Path(name).stem.lower()
    lower = {one.lower(): one for one in known}
    close = [lower[x] for x in difflib.get_close_matches(bare, lower, n=3, cutoff=0.3)] or known
    raise ConfigError(f"--config {name}: no such file or model", do=f"use {', '.join(close)}")


def _read(own, flags: list[str], world: int, checked: bool) -> RunConfig:
    """The configuration; with checked=False its own layout may not fit the world."""
    words = ["--config", config_path(own.config), *flags, "--world-size", str(world)]
    cfg = parse([*words, *(["--dry-run"] if checked else ["--print-config", "yaml"])], {})
    if own.command != "layouts" and not (cfg.model.vocab_size or cfg.model.padded_vocab_size):
        raise ConfigError("the vocabulary's size is unknown", do="add --vocab-size N")
    return cfg


def _need(cluster: Cluster | None) -> Cluster:
    if cluster is None:
        raise ConfigError("--cluster is missing", do="use a name in configs/clusters")
    return cluster


def _layouts(own, flags: list[str], cluster, world: int) -> str:
    cfg = _read(own, flags, world, checked=False)
    found = list(verdicts(cfg, world))
    good = [v for v in found if v.rule is None]
    if not good:
        raise _nothing_divides(cfg, world, found)
    lines = [f"{len(good)} legal layouts of {world} ranks, {len(found) - len(good)} rejected"]
    if own.rejected:
        bad = [v for v in found if v.rule is not None]
        lines += [f"{v.sizes}: {v.rule}" for v in bad[: own.limit]]
        rest = len(bad) - own.limit
    else:
        lines += [f"{v.sizes} dp{_dp(v, world)}" for v in good[: own.limit]]
        rest = len(good) - own.limit
    return "\n".join([*lines, *([f"... {rest} more (--limit)"] if rest > 0 else [])])


def _dp(verdict: Verdict, world: int) -> int:
    return world // (verdict.sizes.tp * verdict.sizes.pp * verdict.sizes.cp)


def _nothing_divides(cfg: RunConfig, world: int, found: list[Verdict]) -> ConfigError:
    rule, _ = Counter(v.rule for v in found).most_common(1)[0]
    batch = cfg.train.global_batch_size // cfg.train.micro_batch_size
    near = sorted(divisors(batch), key=lambda n: (abs(n - world), n))[:3]
    near = " or ".join(map(str, sorted(near)))
    return ConfigError(
        f"--world-size {world} has no legal layout; the commonest reason: {rule}",
        do=f"use {near} ranks, or change --global-batch-size",
    )


def _one(own, flags: list[str], cluster: Cluster | None, world: int) -> str:
    cfg = _read(own, flags, world, checked=True)
    if own.imbalance > 1 and not cfg.transformer.num_moe_experts:
        raise ConfigError("--imbalance needs a model with experts", do="leave it out")
    if own.command == "memory":
        stages = mem.all_stages(cfg, own.imbalance, cluster)
        return (
            json.dumps([asdict(s) for s in stages]) if own.json else _memory(cfg, stages, cluster)
        )
    if own.command == "explain":
        return _explain(cfg, _need(cluster), own.imbalance)
    return _time(own, cfg, _need(cluster))


def _memory(cfg: RunConfig, stages, cluster: Cluster | None) -> str:
    text = mem.table(stages)
    if cluster is None:
        return text
    top, room = mem.worst(stages).total, cluster.memory_bytes
    verdict = "fits" if top <= room else "DOES NOT FIT"
    return f"{text}\n{verdict}: {top / 1e9:.1f} of {room / 1e9:.1f} GB on {cluster.name}"


def _time(own, cfg: RunConfig, cluster: Cluster) -> str:
    made = step(cfg, cluster, own.imbalance)
    lines = []
    if len(cluster.parts) > 1:
        naive = step(cfg, cluster, own.imbalance, placement.naive_order(_layout(cfg)))
        order, made = placement.best_order(cfg, cluster)
        gain = naive.seconds / made.seconds
        lines.append(
            f"naive placement {naive.seconds:.4g} s, best {made.seconds:.4g} s: {gain:.2f}x"
        )
        cut = placement.uneven(cfg, cluster, order)
        if broken_rule(cut) is None:
            better = step(cut, cluster, own.imbalance, order)
            layout = sizes_of(cut).stages
            lines.append(f"stages by speed: {better.seconds:.4g} s with {layout}")
        if own.rank_order:
            placement.write_order(own.rank_order, order)
            lines.append(f"rank order written to {own.rank_order}")
    elif own.rank_order:
        placement.write_order(own.rank_order, range(cfg.parallel.world_size))
    if own.svg:
        tail = [("optimizer", made.optimizer)]
        tail += [(k, made.exposed[k]) for k in ("gradients", "weights") if k in made.exposed]
        Path(own.svg).write_text(draw.svg(made.pipeline, f"{cluster.name}, {sizes_of(cfg)}", tail))
        lines.append(f"timeline written to {own.svg}")
    if own.json:
        keys = ("seconds", "exposed", "optimizer", "tokens_per_s", "mfu", "model_tflops")
        return json.dumps({key: getattr(made, key) for key in keys})
    return "\n".join([report(cfg, made), *lines])


def _layout(cfg: RunConfig):
    """The layout of a configuration."""
    from megatron_ext.mesh.layout import layout_of

    return layout_of(cfg.parallel)


def _explain(cfg: RunConfig, cluster: Cluster, imbalance: float) -> str:
    made = step(cfg, cluster, imbalance)
    stages = mem.all_stages(cfg, imbalance, cluster)
    top = mem.worst(stages)
    named = {k: getattr(top, k) for k in mem.COLUMNS if k != "total"}
    ranked = sorted(named.items(), key=lambda item: -item[1])[:3]
    held = ", ".join(f"{k} {v / 1e9:.1f} GB" for k, v in ranked)
    busy = max(made.pipeline.busy)
    return "\n".join(
        [
            f"{sizes_of(cfg)} on {cfg.parallel.world_size} ranks of {cluster.name}",
            f"A rank of stage {top.stage} is fullest: {top.total / 1e9:.1f} GB, most of it {held}.",
            f"The busiest stage works {busy:.4g} s of a step of {made.seconds:.4g} s"
            f" ({busy / made.seconds:.0%}); the pipeline's fill and drain leave"
            f" {made.pipeline.bubble_share:.1%} idle.",
            report(cfg, made),
            draw.text(made.pipeline),
        ]
    )


def _search(own, flags: list[str], cluster: Cluster | None, world: int) -> str:
    cluster, cfg = _need(cluster), _read(own, flags, world, checked=False)
    limit = own.memory_gb * 1e9 if own.memory_gb else cluster.memory_bytes
    cfg, sharding = sharded(cfg)
    found, number = search(cfg, world, cluster, limit, own.imbalance)
    if not found:
        raise ConfigError(
            f"none of {number} layouts of {world} ranks fits into {limit / 1e9:.0f} GB a rank",
            do="use more ranks, or --micro-batch-size 1; see the command layouts --rejected",
        )
    lines = [f"{number} layouts priced, best {len(found)} (simulated, memory checked):"]
    for place, one in enumerate(found, 1):
        lines.append(
            f"{place}. {one.sizes}  {one.step.seconds:.4g} s  MFU {one.step.mfu:.1%}"
            f"  {one.memory.total / 1e9:.1f} GB"
        )
    for one in found[1:]:
        lines.append(f"{one.sizes} loses {why_not(found[0], one)}")
        break
    best = found[0]
    words = [*sharding, *flags_of(best.sizes, cfg)]
    lines.append("flags of the best:\n  " + " \\\n  ".join(words))
    about = f"{own.config} on {world} ranks of {cluster.name}: {best.sizes}"
    about += f", {best.step.seconds:.4g} s a step as predicted"
    batch = job.sbatch(own.config, cluster, world, [*flags, *" ".join(words).split()], about)
    if own.sbatch:
        Path(own.sbatch).write_text(batch, encoding="utf-8")
        lines.append(f"sbatch file written to {own.sbatch}")
    else:
        lines.append("sbatch file:\n" + batch)
    return "\n".join(lines)
