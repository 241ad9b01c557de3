"""OUR options: one frozen dataclass a section, one field = one flag = one default.

The docstring under a field is its help text and states the unit.  megatron-core's options are not
here: their flags are generated from megatron-core's own dataclasses (`mcore_fields`).
"""
