"""python -m megatron_ext.planner"""

from megatron_ext.errors import exit_on_fatal
from megatron_ext.planner.command import main

if __name__ == "__main__":
    with exit_on_fatal():
        main()
