"""What a start into a folder means: a new run, the run that is there going on, or a mistake.

    the folder holds       this start                         then
    nothing, other files   any                                a new run
    a run                  the same flags                     goes on from the run's newest step,
                                                              whatever was loaded at first
    a run                  --load of its own folder           the same
    a run                  and --ckpt-step N                  goes back to N once; later steps are
                                                              set aside
    a run, all steps done  the same flags                     nothing is done
    a run                  another model, data, --load, ...   refused (64), with three ways out
    a run                  --overwrite-run                    the old run is moved aside

"Holds a run": checkpoints in the save folder, or steps in metrics.jsonl. Everything here only reads
and needs no torch: launchers and --dry-run ask, too. `settled` is what the run then does about it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_ext.checkpoint import folder, identity
from megatron_ext.checkpoint.fingerprint import (
    differences,
    fingerprint,
    free_to_change,
    names,
    shown,
)
from megatron_ext.checkpoint.identity import DEFAULT_START, LAUNCH, Identity
from megatron_ext.checkpoint.lost import check_none_lost
from megatron_ext.checkpoint.patience import patiently
from megatron_ext.checkpoint.record import read_record
from megatron_ext.config import RunConfig
from megatron_ext.errors import ConfigError, DiskError, Preempted, read_exit_reason
from megatron_ext.mesh.attempt import is_restart

STAMP = "PRETRAIN_MOE_START"
"""Environment variable: one name for all starts of a launch, a requeued job or a chain of jobs."""
_NOT_OF_THE_COURSE = ("parallel", "ddp", "observe", "megatron_only")


@dataclass(frozen=True)
class Start:
    """What is to be done.

    `step`: the newest one of the run in the folder, None without any. `goes_on`: from there.
    `goes_back`: by a load of the run's own folder that counts once; `command`: hash of its flags.
    """

    identity: Identity
    step: int | None = None
    goes_on: bool = False
    goes_back: bool = False
    is_new: bool = False
    overwrites: bool = False
    is_complete: bool = False
    command: str = ""
    note: str = ""

    def told(self, cfg: RunConfig) -> str:
        """What will be done, in one line."""
        root, own = folders(cfg)
        if self.is_complete:
            return f"{root}: the run is complete at step {self.step}: more steps need --train-iters"
        if self.overwrites:
            return f"{root}: a new run; the old one is moved to {root}.old-<time>"
        if self.goes_back:
            return f"{root}: goes back to a step of {own}; later ones are set aside"
        if self.goes_on:
            return f"{root}: the run goes on from step {self.step} of {own}"
        return f"{root}: the run begins"


def folders(cfg: RunConfig) -> tuple[Path, Path]:
    """(the run's, that of its checkpoints)."""
    root = Path(cfg.observe.run_dir)
    return root, Path(cfg.checkpoint.save or root / "checkpoints")


def named_load(cfg: RunConfig) -> RunConfig:
    """The config whose --load is a folder of checkpoints, where a run or a step was named. Raises
    ConfigError.
    """
    checkpoint = cfg.checkpoint
    if checkpoint.load is None:
        return cfg
    directory, step = folder.named_step(Path(checkpoint.load), checkpoint.ckpt_step)
    named = replace(checkpoint, load=str(directory), ckpt_step=step)
    return cfg if directory == Path(checkpoint.load) else replace(cfg, checkpoint=named)


def plan(cfg: RunConfig, environ: Mapping[str, str] = os.environ) -> Start:
    """What this start means. Raises ConfigError where it would damage a run, DataError where its
    checkpoints are gone, DiskError where the folders cannot be read.
    """
    try:
        return _Plan(named_load(cfg), environ).made()
    except OSError as error:
        raise DiskError(
            f"the run's folder cannot be read: {error.strerror}",
            do="name folders that you may read with --run-dir and --save",
            path=error.filename,
        ) from error


def settled(cfg: RunConfig, start: Start) -> RunConfig:
    """The config with which the run loads."""
    own, checkpoint = str(folders(cfg)[1]), cfg.checkpoint
    if start.goes_on:
        return replace(cfg, checkpoint=replace(checkpoint, **{**DEFAULT_START, "load": own}))
    if checkpoint.load is None and checkpoint.ckpt_step is not None:
        return replace(cfg, checkpoint=replace(checkpoint, load=own))
    return cfg


class _Plan:
    """The facts, and the rules over them."""

    def __init__(self, cfg: RunConfig, environ: Mapping[str, str]) -> None:
        self.cfg, self.environ = cfg, environ
        self.root, self.own = folders(cfg)
        self.asked = _asked(cfg)
        self.mine = fingerprint(cfg)
        self.has_history = _has_bytes(self.root / "metrics.jsonl")
        self.steps = patiently(lambda: folder.steps(self.own), self.own)
        known = identity.read(self.root)
        self.newest = self._newest(known)
        if self.newest is None and self.steps and not (known and self.has_history):
            self.newest = self._newest(None)  # another run's, which this folder has no part in yet
            known = None
        if known is None and self.newest is not None:
            known = identity.of_checkpoint(self.newest)
        self.is_new = known is None
        self.known = known or Identity()
        if self.newest is not None and not self.known.id:
            self.known = replace(self.known, id=self.newest["run"].get("id") or "")

    def _newest(self, known: Identity | None) -> dict[str, Any] | None:
        """The record of the newest step of this run in the order in which a load tries them."""
        latest = folder.latest_step(self.own)
        for step in sorted(self.steps, key=lambda step: (step != latest, -step)):
            record = read_record(self.own / folder.step_name(step))
            if record is not None and (known is None or known.owns(record["run"])):
                return record
        return None

    def made(self) -> Start:
        has_run = bool(self.steps) or self.has_history
        if self.cfg.observe.overwrite_run and not self._was_overwritten() and has_run:
            self._check_load_stays()
            return Start(
                self._signed(Identity(overwrote=True), self.asked), is_new=True, overwrites=True
            )
        if not self.steps and not self.cfg.checkpoint.allow_fresh_start:
            check_none_lost(self.own)
        if not has_run:
            is_same = self.known.id and self._is_known_start() and not self._changed()
            begun = self.known if is_same else Identity()
            return Start(self._signed(begun, self.asked), is_new=not is_same)
        self._check_folders()
        self._check_same_model()
        return self._with_steps() if self.steps else self._without_steps()

    def _with_steps(self) -> Start:
        step = self.newest["step"] if self.newest else self.steps[0]
        base = Start(self._signed(self.known), step, command=_command(self.cfg))
        if self._is_known_start():
            return replace(base, goes_on=True, is_complete=self._is_complete(step))
        if not self._loads_own() or self.asked["finetune"] or self.asked["moe_use_upcycling"]:
            raise self._other_origin()
        course = self.known.course or {}
        if course.get("command") != base.command or step <= course["step"]:
            return replace(base, goes_back=True)
        note = f"went back to step {course['step']} before: now goes on from step {step}"
        is_complete = self._is_complete(step)
        return replace(base, goes_on=True, is_complete=is_complete, note=note)

    def _without_steps(self) -> Start:
        """It has written metrics and saved nothing, or nothing here: from the beginning, or from
        where it is told to go on.
        """
        saved_to = Path(self.known.save) if self.known.save else self.own
        if _full(saved_to) == _full(self.own) or not folder.steps(saved_to):
            if not self._is_known_start() and not self._loads_own():
                raise self._other_origin()
            return Start(self._signed(self.known))
        if self.asked["load"] != str(_full(saved_to)):
            raise ConfigError(
                f"the run of {self.root} has its checkpoints in {saved_to}, none in {self.own}",
                do=f"--save {saved_to} goes on there, --load {saved_to} goes on from there with the"
                " new folder, another --run-dir begins another run",
                path=self.root,
            )
        return Start(self._signed(self.known, self.asked))

    def _is_known_start(self) -> bool:
        """It asks for nothing but to go on, or for what a start of this run has asked before."""
        own = {**DEFAULT_START, "load": str(_full(self.own))}
        return self.asked in (DEFAULT_START, own, *self.known.origins)

    def _loads_own(self) -> bool:
        load, step = self.asked["load"], self.asked["ckpt_step"]
        return load == str(_full(self.own)) or (load is None and step is not None)

    def _was_overwritten(self) -> bool:
        """A restart, a requeue or the next job of a chain has its old run moved aside already, and
        so has the same command again after 75.
        """
        last = read_exit_reason(self.root / "exit_reason.json") or {}
        if self.known.overwrote and last.get("code") == Preempted.code:
            return True
        stamp = self.environ.get(STAMP)
        if stamp is None:
            return is_restart(self.environ)
        return self.known.stamp == stamp

    def _check_load_stays(self) -> None:
        load = self.cfg.checkpoint.load
        if load and {_full(self.root), _full(self.own)} & {_full(load), *_full(load).parents}:
            raise ConfigError(
                f"--overwrite-run moves what --load {load} names",
                do="name another --run-dir for the new run",
                path=self.root,
            )

    def _check_folders(self) -> None:
        if self.newest is None and self.steps and not self.is_new and self.known.id:
            foreign = read_record(self.own / folder.step_name(self.steps[0]))
            if foreign is not None and not self.known.owns(foreign["run"]):
                raise ConfigError(
                    f"{self.own} holds step {self.steps[0]} of another run than {self.root}",
                    do="name another --save, or another --run-dir",
                    path=self.own,
                )

    def _changed(self) -> dict[str, str]:
        saved = (self.newest or {}).get("run", {}).get("fingerprint") or self.known.fingerprint
        accepted = free_to_change(self.cfg) | names(self.cfg.checkpoint.accept_change)
        return differences(saved, self.mine, accepted)

    def _check_same_model(self) -> None:
        changed = self._changed()
        if changed:
            listed = ", ".join(f"{shown(name)} {values}" for name, values in changed.items())
            accept = ",".join(shown(name).removeprefix("--") for name in changed)
            raise ConfigError(
                f"{self._held()}, from which this start differs: {listed}"[:1500],
                do=self._ways_out(f"--load {self.own} --accept-change {accept}"),
                path=self.root,
            )

    def _other_origin(self) -> ConfigError:
        given = {name: value for name, value in self.asked.items() if value not in (None, False)}
        flags = [f"{shown(name)} {value}" for name, value in given.items()]
        return ConfigError(
            f"{self._held()} that did not begin with {' '.join(flags).replace(' True', '')}",
            do=self._ways_out(f"the same without it, or --load {self.own},"),
            path=self.root,
        )

    def _held(self) -> str:
        where = self.root if self.has_history or not self.steps else self.own
        newest = f"step {self.steps[0]}" if self.steps else "no step saved"
        return f"{where} holds a run ({newest})"

    def _ways_out(self, going_on: str) -> str:
        return (
            f"{going_on} goes on with it; another --run-dir (and --save) begins another run;"
            f" --overwrite-run moves the old one to {self.root}.old-<time>"
        )

    def _is_complete(self, step: int) -> bool:
        """All steps were done up to a length that is no less than the one asked for."""
        done, asked = self.known.finished or {}, asked_length(self.cfg.train)
        units = [name for name, length in asked.items() if length is not None]
        is_long_enough = units and all((done.get(name) or 0) >= asked[name] for name in units)
        return done.get("step") == step and bool(is_long_enough) and not self.cfg.train.eval_only

    def _signed(self, run: Identity, origin: Mapping[str, Any] = DEFAULT_START) -> Identity:
        """With what this start adds."""
        is_new = origin not in (DEFAULT_START, *run.origins)
        return replace(
            run.named(),
            fingerprint=run.fingerprint if self.cfg.train.eval_only else self.mine,
            origins=(*run.origins, origin) if is_new else run.origins,
            save=str(_full(self.own)),
            launch=self.environ.get(LAUNCH),
            stamp=self.environ.get(STAMP),
        )


def asked_length(train: Any) -> dict[str, int | None]:
    """How far a run is asked to train."""
    return {"train_iters": train.train_iters, "train_samples": train.train_samples}


def _asked(cfg: RunConfig) -> dict[str, Any]:
    """What this start is told to load, as `Identity.origins` keeps it."""
    asked = {name: getattr(cfg.checkpoint, name) for name in DEFAULT_START}
    return asked | {"load": str(_full(asked["load"])) if asked["load"] else None}


def _command(cfg: RunConfig) -> str:
    """A hash of all values but those of layout and display."""
    values = {
        name: {key: entry["value"] for key, entry in section.items()}
        for name, section in cfg.to_dict().items()
        if isinstance(section, dict) and name not in ("no_effect", *_NOT_OF_THE_COURSE)
    }
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def _full(path: str | Path) -> Path:
    return Path(path).resolve()


def _has_bytes(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0
