"""Folders of runs as the program leaves them, made without training, and starts into them."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path

from megatron_ext.checkpoint import folder, identity, starting
from megatron_ext.checkpoint.fingerprint import fingerprint
from megatron_ext.checkpoint.hashes import text_hash
from megatron_ext.config import RunConfig, parse
from tests.ranks.tiny import TINY

ENVIRON = {"WORLD_SIZE": "1"}


@functools.lru_cache(64)
def _parsed(*flags: str) -> RunConfig:
    return parse([*TINY, *flags], environ=ENVIRON)


class Folder:
    """A run's folder, and starts into it that a test imagines."""

    def __init__(self, root: Path) -> None:
        self.root, self.save = root, root / "checkpoints"

    def cfg(self, *flags: object):
        return _parsed("--run-dir", str(self.root), *map(str, flags))

    def plan(self, *flags: object, **environ: str):
        return starting.plan(self.cfg(*flags), {**ENVIRON, **environ})

    def begin(self, *flags: object, step: int | None = 3, old: bool = False, **known):
        """A run as its first start leaves it: with metrics, and a checkpoint where `step` says."""
        start = self.plan(*flags)
        self.root.mkdir(parents=True, exist_ok=True)
        if old:
            (self.root / "config.yaml").write_text(self.cfg(*flags).to_yaml())
        else:
            identity.write(self.root, replace(start.identity, **known))
        (self.root / "metrics.jsonl").write_text('{"step": 1, "lm_loss": 5.0}\n')
        if step is not None:
            self.saved(step, *flags, id=None if old else start.identity.id)
        return start.identity

    def saved(
        self, step: int, *flags: object, id: str | None, save: Path | None = None, **more: object
    ) -> None:
        cfg = self.cfg(*flags)
        run = {"config": cfg.to_yaml(), "fingerprint": fingerprint(cfg)}
        run |= {**more, **({"id": id} if id else {})}
        text = f'"manifest": {json.dumps({"step": step, "run": run})}}}\n'.encode()
        path = (save or self.save) / folder.step_name(step)
        path.mkdir(parents=True)
        (path / "manifest.json").write_bytes(f'{{"hash": "{text_hash(text)}",\n'.encode() + text)
        folder.point_at(path.parent, step)
