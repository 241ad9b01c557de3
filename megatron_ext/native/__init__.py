"""Steps of a CPU's training step that torch makes in many passes, in one pass each, compiled where
a C++ compiler is found (--cpu-kernels).

    rows.cpp   the loops
    build.py   one call of g++, about a second, once for each machine and version of the loops
    rows.py    the loops as functions of tensors

Nothing needs them: every caller has torch's form beside the call, and uses it where `rows.serves`
says no (no compiler, another dtype or device, --cpu-kernels torch).
"""
