"""What every policy with kernels of ours in C++ asks of a machine."""

from pilotfish._internal import cpp_build

from .contracts import Engine, Unsupported


def require_compiler(policy: str, engine: Engine) -> None:
    """Raise `Unsupported` when ``policy`` would run on a CPU, and nothing there can compile its kernels."""
    if engine.device == "cpu" and cpp_build.compiler() is None:
        raise Unsupported(policy, "its kernels need a C++ compiler", "install g++, or name one in CXX", engine.model)
