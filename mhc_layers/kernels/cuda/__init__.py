"""CUDA C++ rows of the fused layer, compiled at run time for one (n, C) by :mod:`birkhoff.kernels.cuda.compiler`."""
