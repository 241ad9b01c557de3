"""What torch does slowly or wastefully on a CPU, in C++ that is compiled where a compiler is found
(--cpu-kernels).

    loops.cpp, loops.py                   row-wise steps in one pass, as functions of tensors
    tensor_memory.cpp, tensor_memory.py   memory of tensors that can be used again
    build.py                              a call of g++, once for each machine and version

Nothing needs them: every caller of a loop has torch's form beside the call, and uses it where
`loops.serves` says no (no compiler, another dtype or device, --cpu-kernels torch).
"""
