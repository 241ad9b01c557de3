"""Other places that get rank 0's records: Weights & Biases, Prometheus.

--wandb-project       every record goes to the wandb package, where it is installed; without network
                      set WANDB_MODE=offline, `wandb sync` sends the folder later
--prometheus-textfile the newest values as a file for node_exporter's textfile collector
--prometheus-port     the same text at http://127.0.0.1:PORT/metrics, this machine only

A sink gets the same record as metrics.jsonl: numbers by key, units in the key.
"""

from __future__ import annotations

import http.server
import logging
import os
import re
import threading
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import yaml

from megatron_ext.config import RunConfig

log = logging.getLogger(__name__)
PREFIX = "pretrain_moe_"
LOOPBACK = "127.0.0.1"


class Sink(Protocol):
    """Gets records; `close` when the run ends."""

    def write(self, record: Mapping[str, Any]) -> None:
        """A step's or an evaluation's record."""

    def close(self) -> None:
        """The run ends."""


def numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """The values that are one number; an evaluation's carry the name of its split."""
    split = f"{record['split']}/" if "split" in record else ""
    return {
        key if key == "step" else split + key: value
        for key, value in record.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }


class Wandb:
    """A run of the wandb package."""

    def __init__(self, package: Any, cfg: RunConfig, root: Path) -> None:
        observe = cfg.observe
        folder = Path(observe.wandb_save_dir or root)
        folder.mkdir(parents=True, exist_ok=True)
        self._run = package.init(
            project=observe.wandb_project,
            name=observe.wandb_exp_name or root.name,
            entity=observe.wandb_entity,
            dir=str(folder),
            config=yaml.safe_load(cfg.to_yaml()),
        )

    def write(self, record: Mapping[str, Any]) -> None:
        """Log the numbers at their step."""
        values = numbers(record)
        self._run.log(values, step=int(values.pop("step")))

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


def prometheus_text(values: Mapping[str, float]) -> str:
    """Prometheus' text format: every number a gauge."""
    lines = []
    for key, value in sorted(values.items()):
        name = PREFIX + re.sub(r"[^a-zA-Z0-9_]", "_", key)
        lines += [f"# TYPE {name} gauge", f"{name} {float(value)!r}"]
    return "\n".join(lines).replace(" inf", " +Inf").replace(" nan", " NaN") + "\n"


class Prometheus:
    """The newest value of each key, as a file and at a port of this machine."""

    def __init__(self, path: Path | None, port: int | None, every: int) -> None:
        self._values: dict[str, float] = {}
        self._path, self._every = path, every
        self._server: http.server.ThreadingHTTPServer | None = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        if port is not None:
            self._server = _serve(port, lambda: prometheus_text(dict(self._values)))

    @property
    def port(self) -> int | None:
        """Where it answers."""
        return self._server and self._server.server_address[1]

    def write(self, record: Mapping[str, Any]) -> None:
        """Keep the numbers; the file is renewed at each --log-interval and evaluation."""
        self._values.update(numbers(record))
        if self._path is not None and ("split" in record or record["step"] % self._every == 0):
            temporary = self._path.with_name(f"{self._path.name}.{os.getpid()}.tmp")
            temporary.write_text(prometheus_text(self._values))
            os.replace(temporary, self._path)

    def close(self) -> None:
        """Stop answering; the file stays."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()


def _serve(port: int, text) -> http.server.ThreadingHTTPServer:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # noqa: N802 - the base class's name
            body = text().encode()
            self.send_response(200 if self.path == "/metrics" else 404)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.end_headers()
            self.wfile.write(body if self.path == "/metrics" else b"")

        def log_message(self, *_: object) -> None:
            """Requests are not worth a line."""

    server = http.server.ThreadingHTTPServer((LOOPBACK, port), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def _wandb() -> Any | None:
    """The package; None with one warning where it is not installed."""
    try:
        return import_module("wandb")
    except ImportError:
        log.warning("--wandb-project has no effect: pip install wandb; metrics.jsonl has it all")
        return None


def open_sinks(cfg: RunConfig, root: Path) -> list[Sink]:
    """The sinks that the flags ask for (rank 0)."""
    observe, sinks = cfg.observe, []
    package = _wandb() if observe.wandb_project else None
    if package is not None:
        sinks.append(Wandb(package, cfg, root))
    path = Path(observe.prometheus_textfile) if observe.prometheus_textfile else None
    if path is not None or observe.prometheus_port is not None:
        sinks.append(Prometheus(path, observe.prometheus_port, observe.log_interval))
    for one in sinks:
        if isinstance(one, Prometheus) and one.port is not None:
            log.info("prometheus at http://%s:%s/metrics", LOOPBACK, one.port)
    return sinks
