"""Search kernels: token search in C++ (in numba without a C++ compiler), sparse search in numba."""
