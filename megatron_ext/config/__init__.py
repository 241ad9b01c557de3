"""WHAT was asked: flags and YAML -> one frozen `RunConfig`; no import of torch or megatron-core.

    cfg = parse(["--config", "configs/tiny.yaml", "--train-iters", "5"])
    cfg.parallel.tensor_model_parallel_size     our sections: parallel, model, moe, data, train,
    cfg.train.global_batch_size                   schedule, checkpoint, observe
    cfg.transformer.moe_router_topk             generated from megatron-core's dataclasses:
    cfg.optimizer.adam_beta1                      transformer, optimizer, ddp
    cfg.origins["lr"]                           'default' | 'file:PATH' | 'flag' | 'derived' | ...
    TransformerConfig(**cfg.mcore_values(), ...)

Path of a word: argv.py (argparse cuts, kinds.py converts) -> resolve.py (Megatron-LM's derived
values) -> run_config.py -> checks/ (all broken rules together).  fields.py reads the dataclasses.
"""

from megatron_ext.config.parse import parse
from megatron_ext.config.run_config import RunConfig

__all__ = ["RunConfig", "parse"]
