"""`python -m data.prepare` on many machines: datatrove's executors run our shards.

::

    plan.jsonl ─► ReadShard ─► filters ─► signatures ─┐                 stages of --dedup
                                                     ├─► duplicates found ─┐
                                                     ┘                    │
    plan.jsonl ─► ReadShard ─► filters ─► duplicates dropped ◄────────────┘
                                               └─► WriteShard ─► shard-000012.{bin,len,json}

A task is a shard of `data.shards.plan`, so the join of `data.prepare` gives the bytes of one
process.  A stage is one run of an executor; its finished tasks are datatrove's completion files in
PREFIX.parts/logs/STAGE/completions.  A shard counts as done when its files have the hashes of its
facts, whoever made it: --workers, a local pool, Slurm or Ray.

`flags` alone needs no datatrove; the other modules import it.
"""
