"""Everything that watches a run, behind one object: file, TensorBoard, console line, progress bar.

Rank 0 holds the real one; other ranks hold one without observers, so that the loop need not ask.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_ext.config import RunConfig
from megatron_ext.moe.stats import RoutingRecord
from megatron_ext.observe import console
from megatron_ext.observe.artist import Artist
from megatron_ext.observe.attempt import Attempts
from megatron_ext.observe.ledger_events import LedgerEvents
from megatron_ext.observe.metrics import MetricsFile
from megatron_ext.observe.run_dir import RunDirectory
from megatron_ext.observe.sinks import open_sinks
from megatron_ext.observe.tensorboard import TensorBoard
from megatron_ext.state_files import replace_text

AVERAGED = ("lm_loss", "step_time_s")


class Observers:
    """Shows each record where it belongs. `is_active` is true on rank 0 alone."""

    def __init__(
        self,
        cfg: RunConfig,
        where: RunDirectory,
        *,
        first_step: int,
        num_steps: int,
        is_active: bool,
    ) -> None:
        self.cfg, self.num_steps, self.is_active = cfg, num_steps, is_active
        self._where = where
        self._last_routing: tuple[int, RoutingRecord | None] = (first_step, None)
        self._pending: list[dict[str, Any]] = []
        self._bar: Progress | None = None
        self._attempt = Attempts()
        if not is_active:
            return
        self._metrics = self._attempt("metrics.jsonl", MetricsFile, where.metrics, first_step)
        self._board = self._attempt("TensorBoard", TensorBoard, where.tensorboard, cfg, first_step)
        self._artist = self._attempt("routing.jsonl", Artist, where.root, self._show, first_step)
        self._ledger = self._attempt("ledger.jsonl", LedgerEvents, where.save)
        self._sinks = self._attempt("wandb or prometheus", open_sinks, cfg, where.root) or []
        if sys.stdout.isatty():
            self._bar = _progress_bar()
            self._task = self._bar.add_task("train", total=num_steps, completed=first_step)
            self._bar.start()

    def say(self, text: str) -> None:
        """One line on the console of rank 0."""
        if not self.is_active:
            return
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            self._attempt("stdout", print, text, flush=True)

    def step(self, record: dict[str, Any], routing: RoutingRecord | None) -> None:
        """A finished training step and its routing (None for a dense model)."""
        if not self.is_active:
            return
        self._write(record)
        self._last_routing = (record["step"], routing)
        if record["step"] % self.cfg.observe.tensorboard_log_interval == 0:
            self._attempt("TensorBoard", lambda: self._board.write_step(record))
        if routing is not None and routing.look is not None:
            domains = list(record.get("tokens_seen_per_domain") or ())
            self._attempt(
                "routing.jsonl", lambda: self._artist.draw(record["step"], routing, domains)
            )
        if self._bar is not None:
            self._bar.update(self._task, completed=record["step"])
        self._pending.append(record)
        if record["step"] % self.cfg.observe.log_interval == 0:
            shown = dict(record)
            for key in AVERAGED:
                shown[key] = sum(one[key] for one in self._pending) / len(self._pending)
            self._pending.clear()
            self.say(
                console.step_line(
                    shown,
                    num_steps=self.num_steps,
                    log_throughput=self.cfg.observe.log_throughput,
                )
            )
            if routing is not None:
                self.say(console.expert_line(record, routing.num_experts))
            self._checkpoint_events()

    def validation(self, record: dict[str, Any]) -> None:
        """A finished evaluation."""
        if not self.is_active:
            return
        self._write(record)
        perplexity = self.cfg.observe.log_validation_ppl_to_tensorboard
        self._attempt("TensorBoard", lambda: self._board.write_validation(record, perplexity))
        line = console.validation_line(record)
        self.say("-" * len(line))
        self.say(line)
        self.say("-" * len(line))

    def verdict(self, found: Any) -> None:
        """A fault of the run's health (resilience.health.Verdict)."""
        if not self.is_active:
            return
        self._write(found.record())
        self._attempt(
            "TensorBoard", lambda: self._board.write_text("health", str(found), found.step)
        )
        self.say(f"warning: {found}")

    def straggler(self, finding: Any) -> None:
        """A rank that holds up the others (resilience.straggler.Finding)."""
        if not self.is_active:
            return
        self._write(finding.record())
        self.say(f"warning: {finding}")

    def close(self) -> None:
        """Flush and close the files."""
        if not self.is_active:
            return
        if self._bar is not None:
            self._bar.stop()
        self._checkpoint_events()
        self._attempt("expert_load.json", self._write_expert_load)
        self._attempt("routing.jsonl", lambda: self._artist.close())
        self._attempt("metrics.jsonl", lambda: self._metrics.close())
        self._attempt("TensorBoard", lambda: self._board.close())
        for sink in self._sinks:
            self._attempt(type(sink).__name__, sink.close)

    def _show(self, tag: str, png: bytes, step: int) -> None:
        self._attempt("TensorBoard", lambda: self._board.write_picture(tag, png, step))

    def _checkpoint_events(self) -> None:
        """Show what the checkpoints' ledger has got since the last look."""
        for event in self._attempt("ledger.jsonl", lambda: self._ledger.new()) or ():
            self._attempt(
                "TensorBoard", lambda event=event: self._board.write_checkpoint_event(event)
            )

    def _write(self, record: dict[str, Any]) -> None:
        self._attempt("metrics.jsonl", lambda: self._metrics.write(record))
        for sink in self._sinks:
            self._attempt(type(sink).__name__, sink.write, record)

    def _write_expert_load(self) -> None:
        """RUN/expert_load.json: assignments per layer and expert of the last step, [L][E]."""
        step, routing = self._last_routing
        if routing is None:
            return
        load = {
            "step": step,
            "counts": [[int(count) for count in row] for row in routing.counts_LE.tolist()],
            "is_moe": routing.is_moe_L.tolist(),
        }
        replace_text(self._where.expert_load, json.dumps(load))


def _progress_bar() -> Progress:
    return Progress(
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
