"""How the step of the real training loop grows: with experts, with ranks, with the sequence.

    experts   8 to 256 of the same width, the same top-k and tokens: what is computed stays, weights
              and their update grow. Floor of the update: 30 bytes a parameter (AdamW with fp32
              masters reads 16 and writes 14) at the copy rate
    ranks     1 to 16 gloo processes of one thread, dp or ep, one sequence each: CPU seconds a
              token, because a few cores cannot show the wall clock of 16 ranks. One number of ranks
              after the other (all at once would not fit into memory)
    sequence  512 to 8192 at constant tokens a step

Candidates of a table but those of `ranks` are measured in turn, with the machine's ceilings.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tests.bench import ceilings, driver
from tests.bench.driver import Candidate, Result
from tests.bench.shapes import Shape, flags_of, shape_of

UPDATE_BYTES = 30  # of a parameter; see above
SECONDS_TO_LOAD, SECONDS_OF_A_TURN = 900, 300
LIMITS = Candidate("ceilings", "limits")


@dataclass(frozen=True)
class Table:
    """What a part found: cells for people, lines for JSON."""

    title: str
    head: tuple[str, ...]
    rows: list[list[Any]]
    lines: list[dict[str, Any]]
    limits: dict[str, float]


def candidate(label: str, flags: Sequence[str], threads: int, ranks: int = 1) -> Candidate:
    """The real loop with `flags`."""
    more = {"flags": list(flags)}
    return Candidate(label, "ours", label, threads=threads, ranks=ranks, more=more)


def shape(flags: Sequence[str], ranks: int = 1) -> Shape:
    """The model and the batch of `flags`."""
    from megatron_ext.config import parse

    return shape_of(parse([*flags, "--world-size", str(ranks), "--run-dir", "unused"]))


def run(
    candidates: Sequence[Candidate], args: argparse.Namespace
) -> tuple[list[Result], dict[str, float]]:
    """All in turn, the ceilings among them; raises RuntimeError where one did not run."""
    with (
        tempfile.TemporaryDirectory() as folder,
        driver.started([LIMITS, *candidates], {"folder": folder}, SECONDS_TO_LOAD, args.warm) as of,
    ):
        limits, *results = driver.interleaved(of, args.rounds, args.steps, SECONDS_OF_A_TURN)
    for result in (limits, *results):
        if result.error:
            raise RuntimeError(f"{result.candidate.label}: {result.error}")
    return results, ceilings.medians(limits.rounds)


def facts(result: Result, tokens: int) -> dict[str, Any]:
    """What every part reports of a candidate that takes `tokens` a step."""
    seconds = statistics.median(result.seconds())
    return {
        "ms": 1000 * seconds,
        "tokens_per_s": tokens / seconds,
        "cpu_us_per_token": 1e6 * result.median("cpu_s") / tokens,
        "peak_mib": max(one["peak_mib"] for one in result.rounds),
        "parameters_of_a_rank": result.facts.get("parameters", 0),
        "ranks": result.candidate.ranks,
        "rounds_s": result.seconds(),
    }


def _cells(line: dict[str, Any], *names: str) -> list[str]:
    return [f"{line[name]:,.1f}" if name == "ms" else f"{line[name]:,.0f}" for name in names]


def experts(args: argparse.Namespace) -> Table:
    """Step time with the number of experts."""
    flags = flags_of(args.model, args.dtype, args.sequences)
    of = [
        candidate(f"{count}-experts", [*flags, "--num-experts", str(count)], args.threads)
        for count in args.experts
    ]
    results, limits = run(of, args)
    tokens, rows, lines = shape(flags).tokens, [], []
    for count, result in zip(args.experts, results):
        line = {"experts": count, **facts(result, tokens)}
        floor = 1e-6 * UPDATE_BYTES * line["parameters_of_a_rank"] / limits["copy GB/s"]
        ratio = statistics.median(b / a for a, b in zip(results[0].seconds(), result.seconds()))
        lines.append(line | {"update_floor_ms": floor, "by_first": ratio})
        rows.append(
            [
                *(count, *_cells(line, "parameters_of_a_rank", "ms", "tokens_per_s")),
                *(f"{ratio:.2f}x", f"{floor:.1f}", *_cells(line, "cpu_us_per_token", "peak_mib")),
            ]
        )
    head = (
        *("experts", "parameters", "ms a step", "tokens/s", f"by {args.experts[0]}"),
        *("floor of the update ms", "CPU us/token", "peak MiB"),
    )
    title = f"{args.model} {args.dtype} with more experts, {tokens} tokens a step"
    return Table(title, head, rows, lines, limits)


def ranks(args: argparse.Namespace) -> Table:
    """CPU seconds of a token with the number of ranks."""
    rows, lines, limits = [], [], {}
    tokens = shape(flags_of(args.model, args.dtype, 1) + ["--micro-batch-size", "1"]).tokens
    for layout in args.layouts:
        first = 0.0
        for count in args.ranks:
            flags = [*flags_of(args.model, args.dtype, count), "--micro-batch-size", "1"]
            if layout == "ep":
                flags += ["--expert-model-parallel-size", str(count)]
            (result,), limits = run([candidate(f"{layout}{count}", flags, 1, count)], args)
            line = {"layout": layout, **facts(result, tokens * count)}
            first = first or line["cpu_us_per_token"]
            lines.append(line)
            rows.append(
                [
                    *(layout, count, *_cells(line, "cpu_us_per_token")),
                    *(f"{line['cpu_us_per_token'] / first:.2f}x", *_cells(line, "ms", "peak_mib")),
                ]
            )
    head = ("layout", "ranks", "CPU us/token", "by one rank", "ms a step", "peak MiB of a rank")
    title = f"{args.model} {args.dtype}, {tokens} tokens of each rank a step, one thread a rank"
    return Table(title, head, rows, lines, limits)


def sequence(args: argparse.Namespace) -> Table:
    """Step time with the sequence length at constant tokens."""
    of, shapes = [], []
    for length in args.lengths:
        batch = str(max(1, args.tokens // length))
        flags = flags_of(args.model, args.dtype, int(batch)) + ["--micro-batch-size", batch]
        flags += ["--seq-length", str(length), "--max-position-embeddings", str(length)]
        of.append(candidate(f"{length}-long", flags, args.threads))
        shapes.append(shape(flags))
    results, limits = run(of, args)
    ceiling, rows, lines = ceilings.of_dtype(limits, args.dtype), [], []
    for one, result in zip(shapes, results):
        line = {"sequence": one.sequence, "batch": one.batch, **facts(result, one.tokens)}
        mfu = line["tokens_per_s"] * one.flops_per_token / 1e9 / ceiling
        ratio = statistics.median(b / a for a, b in zip(results[0].seconds(), result.seconds()))
        lines.append(line | {"flops_per_token": one.flops_per_token, "mfu": mfu})
        rows.append(
            [
                *(f"{one.batch} x {one.sequence}", f"{one.flops_per_token / 1e6:.1f}"),
                *(*_cells(line, "ms", "tokens_per_s"), f"{ratio:.2f}x"),
                *(f"{mfu:.1%}", *_cells(line, "peak_mib")),
            ]
        )
    head = (
        *("batch x sequence", "MFLOP/token", "ms a step", "tokens/s", f"by {args.lengths[0]}"),
        *("MFU", "peak MiB"),
    )
    title = f"{args.model} {args.dtype} with longer sequences, {args.tokens} tokens a step"
    return Table(title, head, rows, lines, limits)


PARTS: dict[str, Callable[[argparse.Namespace], Table]] = {
    "experts": experts,
    "ranks": ranks,
    "sequence": sequence,
}


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)
