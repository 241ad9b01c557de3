"""The loop: `setup` (parts of a run) -> `loop` (when) -> `step` (what one optimizer step does) ->
`evaluate`.
"""
