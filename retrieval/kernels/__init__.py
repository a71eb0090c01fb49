"""Kernels of token search: C++ behind a plain C interface, and numba where there is no compiler."""
