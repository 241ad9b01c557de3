#!/usr/bin/env python3
"""Pre-train a mixture-of-experts language model: the whole program on one screen.

    parse -> device -> groups -> tokenizer, data -> model -> optimizer -> checkpoint -> train ->
    evaluate

One rank: `python pretrain_moe.py --config configs/quickstart.yaml`; several: `torchrun
--nproc-per-node 4 pretrain_moe.py ...`.
"""

from megatron_ext.config import RunConfig, parse
from megatron_ext.errors import ConfigError, exit_on_fatal
from megatron_ext.mesh.attempt import die_with_parent
from megatron_ext.mesh.imports import without_collections
from megatron_ext.mesh.limits import check_limits
from megatron_ext.train.stop import StopRequest


def pretrain(cfg: RunConfig, stop: StopRequest) -> None:
    """Train, or only evaluate, what `cfg` describes, on the ranks of this launch."""
    with without_collections():
        from megatron_ext.device import start

        parallel = cfg.parallel
        device = start(parallel.device, parallel.distributed_backend, parallel.cpu_kernels)
        from megatron_ext.kernels.choose import check_kernels
        from megatron_ext.mesh.agree import agree
        from megatron_ext.model.gpt import build_chunks, vocabulary, wrap_for_training
        from megatron_ext.optim.build import build_optimizer, build_scheduler
        from megatron_ext.train import run_folder, setup
        from megatron_ext.train.loop import Run, evaluate_at_end, train

    check_kernels(cfg, device.kind)
    with setup.groups(cfg, device), run_folder.held(cfg) as held:
        cfg, where = held.cfg, held.where
        if run_folder.is_complete(held):
            return
        tokenizer = agree(lambda: setup.tokenizer(cfg))
        words = vocabulary(cfg, tokenizer.vocab_size)
        splits = setup.datasets(cfg, tokenizer)
        setup.leave_if_asked(stop, "building the model and reading the checkpoint")
        chunks = wrap_for_training(cfg, build_chunks(cfg, words))
        optimizer = build_optimizer(cfg, chunks)
        state = setup.train_state(chunks, optimizer, build_scheduler(cfg, optimizer))
        if cfg.checkpoint.moe_use_upcycling:
            from megatron_ext.upcycle.run import load_upcycled

            cfg, where = load_upcycled(cfg, where)
        with setup.watch(cfg, where), setup.saver(cfg, where, held, tokenizer, splits) as saver:
            run_folder.load(held, saver, state)
            setup.leave_if_asked(stop, "opening the logs", state.progress.step)
            with (
                setup.observers(cfg, where, held, state) as observers,
                setup.instruments(cfg, where, state, saver) as instruments,
            ):
                measures = setup.measures(cfg, tokenizer, words)
                run = Run(cfg, state, splits, saver, observers, instruments, *measures)
                setup.announce(run, device, words, held)
                if not cfg.train.eval_only:
                    observers.say(f"stopped: {train(run, stop)}")
                evaluate_at_end(run, stop)
                run_folder.finished(held, state.progress)


def main(argv: list[str] | None = None) -> None:
    """Read the flags and do what they ask: print them, check them, or train."""
    with exit_on_fatal():
        cfg = parse(argv)
        if cfg.action == "print-config":
            print(cfg.to_json() if cfg.print_format == "json" else cfg.to_yaml())
        elif cfg.action == "explain":
            from megatron_ext.config.explain import explain, to_text

            print(to_text(explain(cfg)))
            if cfg.broken:
                raise ConfigError(violations=cfg.broken)
        elif cfg.action == "dry-run":
            from megatron_ext.costs.dryrun import dry_run
            from megatron_ext.preflight import preflight

            print(dry_run(cfg, preflight(cfg)))
        else:
            die_with_parent()
            check_limits()
            with StopRequest(cfg.train) as stop:
                pretrain(cfg, stop)


if __name__ == "__main__":
    main()
