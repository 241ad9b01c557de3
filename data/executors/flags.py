"""The flags of `data.prepare` for executors, filters and deduplication; needs no datatrove."""

from __future__ import annotations

import argparse
import os
import shutil
from dataclasses import dataclass
from importlib.util import find_spec

from megatron_ext.command import number
from megatron_ext.errors import ConfigError

INSTALL = "pip install -r requirements-data.txt"
PACKAGES = {"ray": "ray"}
SLURM_ONLY = ("slurm_partition", "slurm_time", "slurm_cpus_per_task", "slurm_mem_per_cpu_gb")
SLURM_TIME = "24:00:00"


@dataclass(frozen=True)
class Asked:
    """What the flags ask of datatrove."""

    executor: str
    """"local", "slurm" or "ray"; "" where today's processes of this machine do the work."""
    filters: tuple[str, ...]
    dedup: str
    words: str
    workers: int
    """Tasks at once; -1: no limit."""
    tasks_per_job: int
    slurm_partition: str | None
    slurm_time: str
    slurm_cpus_per_task: int
    slurm_mem_per_cpu_gb: int | None
    slurm_args: tuple[tuple[str, str], ...]

    @property
    def changes_documents(self) -> list:
        """What decides the bytes of the output, beside inputs and tokenizer; [] for nothing."""
        if not self.filters and self.dedup == "none":
            return []
        return [list(self.filters), self.dedup, self.words]


def add_executor_flags(parser: argparse.ArgumentParser) -> None:
    """The group of flags for more than one machine, filters and deduplication."""
    group = parser.add_argument_group("datatrove (pip install -r requirements-data.txt)")
    group.add_argument(
        "--executor",
        choices=("local", "slurm", "ray"),
        help="run the shards on this executor of datatrove; without it on processes of this "
        "machine, which is the fastest for one machine",
    )
    group.add_argument(
        "--filter",
        action="append",
        default=[],
        metavar="NAME[:KEY=VALUE,...]",
        help="drop documents by a filter of datatrove: gopher-quality, gopher-repetition, "
        "fineweb-quality, c4-quality, c4-paragraph, or regex:PATTERN; may be given several times",
    )
    group.add_argument(
        "--dedup",
        choices=("none", "exact", "minhash"),
        default="none",
        help="drop documents equal to an earlier one (exact), or like another one (minhash)",
    )
    group.add_argument(
        "--words",
        default="whitespace",
        metavar="LANGUAGE",
        help="how filters and minhash find words: whitespace (default), or a language of "
        "datatrove such as en, which needs spacy and is slower",
    )
    group.add_argument(
        "--tasks-per-job",
        type=number("Count"),
        default=1,
        metavar="N",
        help="slurm, ray: shards that one job does one after the other (default 1)",
    )
    _add_slurm_flags(group)


def _add_slurm_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--slurm-partition", metavar="NAME", help="default: the cluster's default")
    group.add_argument(
        "--slurm-time", metavar="TIME", help=f"limit of one job (default {SLURM_TIME})"
    )
    group.add_argument("--slurm-cpus-per-task", type=number("Count"), metavar="N", help="default 1")
    group.add_argument(
        "--slurm-mem-per-cpu-gb",
        type=number("Count"),
        metavar="N",
        help="default: the cluster's default",
    )
    group.add_argument(
        "--slurm-arg",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any other option of sbatch, such as account=physics; may be given several times",
    )


def asked_of(args: argparse.Namespace) -> Asked:
    """The flags, checked as far as that needs no datatrove; sets ``args.workers``."""
    needs_datatrove = bool(args.filter) or args.dedup != "none"
    executor = args.executor or ("local" if needs_datatrove else "")
    _check_slurm(args, executor)
    if executor:
        _check_installed(executor)
    if args.workers is None:
        args.workers = -1 if executor in ("slurm", "ray") else os.cpu_count() or 1
    return Asked(
        executor=executor,
        filters=tuple(args.filter),
        dedup=args.dedup,
        words=args.words,
        workers=args.workers,
        tasks_per_job=args.tasks_per_job,
        slurm_partition=args.slurm_partition,
        slurm_time=args.slurm_time or SLURM_TIME,
        slurm_cpus_per_task=args.slurm_cpus_per_task or 1,
        slurm_mem_per_cpu_gb=args.slurm_mem_per_cpu_gb,
        slurm_args=tuple(_pair(text) for text in args.slurm_arg),
    )


def _check_slurm(args: argparse.Namespace, executor: str) -> None:
    if executor != "slurm":
        given = [name for name in SLURM_ONLY if getattr(args, name) is not None]
        given += ["slurm_arg"] if args.slurm_arg else []
        if given:
            flag = "--" + given[0].replace("_", "-")
            raise ConfigError(f"{flag} is for --executor slurm", do="add it or leave this out")
        return
    missing = [name for name in ("sbatch", "squeue") if shutil.which(name) is None]
    if missing:
        raise ConfigError(
            f"--executor slurm: no {missing[0]} on the PATH",
            do="run on a login node of the cluster, or use --executor local",
        )
    if "SLURM_ARRAY_TASK_ID" in os.environ:
        raise ConfigError(
            "--executor slurm inside a job array would take itself for one of its tasks",
            do="run it on a login node or in a plain job",
        )


def _check_installed(executor: str) -> None:
    if find_spec("datatrove") is None:
        raise ConfigError("--executor, --filter and --dedup need the package datatrove", do=INSTALL)
    package = PACKAGES.get(executor)
    if package and find_spec(package) is None:
        raise ConfigError(
            f"--executor {executor} needs the package {package}", do=f"pip install {package}"
        )


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise ConfigError(f"--slurm-arg {text} must be KEY=VALUE", do="--slurm-arg account=physics")
    return key.lstrip("-"), value
