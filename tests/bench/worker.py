"""A candidate in its own process: python -m tests.bench.worker MODULE:NAME SPEC.json

MODULE is a module of tests.bench with `run(name, spec, gate)`, which calls gate.step() before every
step, for ever. Whatever it raises is the candidate's line in the table.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from importlib import import_module
from pathlib import Path

from tests.bench.gate import Gate, private_stdout


def main(argv: list[str]) -> int:
    """Run one candidate until the driver closes the pipe."""
    module, _, name = argv[0].partition(":")
    spec = json.loads(Path(argv[1]).read_text())
    gate = Gate(private_stdout())
    warnings.simplefilter("ignore")
    try:
        import_module(f"tests.bench.{module}").run(name, spec, gate)
    except BaseException as error:  # whatever it is, it is this candidate's line in the table
        traceback.print_exc()
        text = str(error).strip().splitlines() or [""]
        gate.pipe.write(json.dumps({"error": f"{type(error).__name__}: {text[0][:160]}"}) + "\n")
        gate.pipe.flush()
        sys.stderr.flush()
        os._exit(1)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
