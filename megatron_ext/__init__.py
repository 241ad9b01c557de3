"""pretrain-moe on top of megatron-core: what it lacks, in layers (see ARCHITECTURE.md).

``config`` and ``device`` lie at the bottom, ``train`` and ``planner`` at the top; a package
imports only lower layers or itself.
"""

import sys

from megatron_ext import errors

sys.excepthook = errors.leave_uncaught
