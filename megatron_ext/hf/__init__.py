"""Hugging Face weights in and out, bit for bit: `python -m megatron_ext.hf import|export|check`.

    folder (config.json, headers of the shards) -> architectures (flags, names, transforms)
    -> entries (one box of one of our tensors <-> one or more of theirs)
    import: read theirs -> join -> checkpoint.stream          (memory: one entry)
    export: checkpoint.stream -> split -> shards.py           (memory: one entry)
    check:  import, load in any layout, logits against transformers

An architecture is one small file of data in `architectures/`: which flags a config.json means, and
which of our global names holds which of theirs. Nothing here builds a model except `check`.
"""
