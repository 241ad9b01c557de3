"""One HTML page of a finished or running training: reads files of the run directory only, no torch.

    python -m megatron_ext.observe.report RUN [--compare RUN2] [--out FILE]

    gather     RUN/ -> one dict for JSON: curves, routing, time, memory, trace, flags, events
    thin       long curves -> at most 800 points, routing tables -> bytes, so that the page is small
    compose    page/*.html, *.css, *.js and the JSON -> one text

Only metrics.jsonl must be there; a part without its file says which file or flag would fill it.
"""
