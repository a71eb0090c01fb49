"""The check for a C++ compiler, for KV policies with C++ kernels."""

from pilotfish._internal import cpp_build

from .contracts import Engine, Unsupported


def require_compiler(policy: str, engine: Engine) -> None:
    """Check that the C++ kernels of a KV policy can be compiled.

    Raises:
        Unsupported: The engine runs on a CPU, and there is no C++ compiler.
    """
    if engine.device == "cpu" and cpp_build.compiler() is None:
        raise Unsupported(policy, "its kernels need a C++ compiler", "install g++, or name one in CXX", engine.model)
